//! REST: the Open Inference Protocol, KServe v1, MLflow and SageMaker.
//!
//! ```text
//! handle ──▶ find (route table) ──▶ read_body ──▶ answer ──▶ compress ──▶ response
//!                                                  ├─ models · repository · openapi
//!                                                  └─ infer · v1 · invocations ──▶ gateway
//! ```
//!
//! Invariants:
//! - Every answer but an empty one is JSON or the binary tensor form; every failure is
//!   `{"error", "code"}`.
//! - A body is read only for a route that exists, and never past its limit.

use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, Method, StatusCode};
use http_body_util::BodyExt;
use percent_encoding::percent_decode_str;

use super::{Api, Body};
use crate::domain::{ErrorKind, Failure, ModelName, VersionRef};
use infer::Call;
use reply::Reply;

pub mod binary;
pub mod compress;
pub mod elements;
mod infer;
pub mod json;
mod models;
mod reply;
mod response;
mod shared;

/// Longest time for a whole body to arrive.
const BODY_TIME_MAX: Duration = Duration::from_secs(60);

/// Capacity reserved for a body on its sender's word alone.
const BODY_RESERVE_MAX_BYTES: usize = 1 << 20;

/// Answers one request; never fails, whatever it is given.
pub async fn handle<B>(api: Arc<Api>, request: http::Request<B>) -> http::Response<Body>
where
    B: http_body::Body<Data = bytes::Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (head, body) = request.into_parts();
    let accepted = compress::accepted(&head.headers);
    let compress_min = api.settings.compress_min_bytes;
    let reply = match find(&head.method, head.uri.path()) {
        Err(reply) => reply,
        Ok(route) => {
            let body = read_body(body, &head.headers, &api).await;
            // Boxed so that a connection's future stays small.
            Box::pin(answer(api, route, head.method, head.headers, body)).await
        }
    };
    compress::answer(reply, accepted, compress_min).await.into_response()
}

/// Everything that can be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Route {
    Server,
    Live,
    Ready,
    Ping,
    Models,
    Model(Of),
    ModelReady(Of),
    ModelConfig(Of),
    ModelStats(Option<Of>),
    Infer(Of),
    Generate,
}

/// A model, and the version that the path names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Of {
    model: ModelName,
    version: Option<VersionRef>,
}

/// Finds the route of a path, or its 404 or 405.
fn find(method: &Method, path: &str) -> Result<Route, Reply> {
    let decoded: Result<Vec<_>, _> = path
        .trim_matches('/')
        .split('/')
        .map(|part| percent_decode_str(part).decode_utf8())
        .collect();
    let unknown = || Failure::not_found(format!("no such path: {}", shown(path)));
    let segments = decoded.map_err(|_| unknown())?;
    let segments: Vec<&str> = segments.iter().map(AsRef::as_ref).collect();
    let (verbs, route) = table(&segments)?.ok_or_else(unknown)?;
    // HEAD is GET without the body, which the connection leaves out.
    let asked = if method == Method::HEAD { "GET" } else { method.as_str() };
    if verbs.split(", ").any(|verb| verb == asked) {
        return Ok(route);
    }
    let message = format!("method {method} is not allowed here, expected {verbs}");
    Err(Reply::failure(&Failure::new(ErrorKind::MethodNotAllowed, message)).allow(verbs))
}

/// The route table.
fn table(segments: &[&str]) -> Result<Option<(&'static str, Route)>, Failure> {
    let found = match segments {
        ["v2"] => ("GET", Route::Server),
        ["v2", "health", "live"] => ("GET", Route::Live),
        ["v2", "health", "ready"] => ("GET", Route::Ready),
        ["ping"] => ("GET", Route::Ping),
        ["v2", "models"] => ("GET", Route::Models),
        ["v2", "models", "stats"] => ("GET", Route::ModelStats(None)),
        ["v2", "models", model, "versions", version, rest @ ..] => {
            return Ok(of_model(of(model, Some(version))?, rest));
        }
        ["v2", "models", model, rest @ ..] => return Ok(of_model(of(model, None)?, rest)),
        _ => return Ok(None),
    };
    Ok(Some(found))
}

fn of_model(of: Of, rest: &[&str]) -> Option<(&'static str, Route)> {
    Some(match rest {
        [] => ("GET", Route::Model(of)),
        ["ready"] => ("GET", Route::ModelReady(of)),
        ["config"] => ("GET", Route::ModelConfig(of)),
        ["stats"] => ("GET", Route::ModelStats(Some(of))),
        ["infer"] => ("POST", Route::Infer(of)),
        ["generate" | "generate_stream"] => ("POST", Route::Generate),
        _ => return None,
    })
}

fn of(model: &str, version: Option<&str>) -> Result<Of, Failure> {
    let model = model.parse::<ModelName>().map_err(|error| {
        Failure::not_found(format!("model '{}' is not found: {error}", shown(model)))
    })?;
    let version = match version {
        None => None,
        Some(text) => VersionRef::parse(text).map_err(|error| {
            Failure::not_found(format!("model '{model}' has no version '{}': {error}", shown(text)))
        })?,
    };
    Ok(Of { model, version })
}

/// The start of a text from outside, for an error message.
fn shown(text: &str) -> String {
    const SHOWN_MAX: usize = 200;
    text.chars().take(SHOWN_MAX).collect()
}

/// Answers a request whose route is known.
async fn answer(
    api: Arc<Api>,
    route: Route,
    _method: Method,
    headers: HeaderMap,
    body: Result<Bytes, Failure>,
) -> Reply {
    // A prediction whose body cannot be read is a failed prediction; elsewhere the body's failure
    // is the answer.
    let (route, body) = match (route, body) {
        (Route::Infer(Of { model, version }), body) => {
            return Call { api, model, version, headers, body }.infer().await;
        }
        (_, Err(failure)) => return Reply::failure(&failure),
        (route, Ok(body)) => (route, body),
    };
    let _unread = body;
    let api = &*api;
    let done = match &route {
        Route::Server => Ok(models::server()),
        Route::Live => Ok(models::live()),
        Route::Ready => Ok(models::ready(api)),
        Route::Ping => Ok(models::ready(api)),
        Route::Models => Ok(models::list(api)),
        Route::Model(of) => models::metadata(api, &of.model, of.version.as_ref()),
        Route::ModelReady(of) => models::model_ready(api, &of.model, of.version.as_ref()),
        Route::ModelConfig(of) => models::config(api, &of.model, of.version.as_ref()),
        Route::ModelStats(None) => models::stats(api, None, None),
        Route::ModelStats(Some(of)) => models::stats(api, Some(&of.model), of.version.as_ref()),
        Route::Generate => Err(Failure::unsupported(
            "generate is not supported, models take and give tensors: use infer",
        )),
        Route::Infer(_) => Ok(Reply::empty(StatusCode::INTERNAL_SERVER_ERROR)),
    };
    done.unwrap_or_else(Reply::from)
}

/// Reads a body up to its limit and decompresses it.
async fn read_body<B>(body: B, headers: &HeaderMap, api: &Api) -> Result<Bytes, Failure>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let encoding = compress::content_encoding(headers)?;
    let limit = api.settings.body_max_bytes;
    let announced = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    let body = match tokio::time::timeout(BODY_TIME_MAX, collect(body, limit, announced)).await {
        Ok(body) => body?,
        Err(_) => {
            let seconds = BODY_TIME_MAX.as_secs();
            let message = format!("request body did not arrive within {seconds} s");
            return Err(Failure::new(ErrorKind::DeadlineExceeded, message));
        }
    };
    match encoding {
        None => Ok(body),
        Some(_) if body.is_empty() => Ok(body),
        Some(encoding) => compress::decode(encoding, body, &api.settings).await,
    }
}

async fn collect<B>(mut body: B, limit: usize, announced: Option<usize>) -> Result<Bytes, Failure>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let too_large = || {
        let message = format!("request body is over the limit of {limit} bytes");
        Failure::new(ErrorKind::TooLarge, message)
    };
    if announced.is_some_and(|announced| announced > limit) {
        return Err(too_large());
    }
    let mut first: Option<Bytes> = None;
    let mut joined = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| {
            tracing::debug!(error = %error.into(), "request body broke off");
            Failure::new(ErrorKind::Cancelled, "request body broke off")
        })?;
        let Ok(data) = frame.into_data() else { continue };
        let have = first.as_ref().map_or(joined.len(), Bytes::len);
        if have.saturating_add(data.len()) > limit {
            return Err(too_large());
        }
        // A body in one piece, as most are, is used where it lies.
        match first.take() {
            None if joined.is_empty() => first = Some(data),
            None => joined.extend_from_slice(&data),
            Some(start) => {
                let announced = announced.unwrap_or(0).max(have + data.len());
                joined.reserve(announced.min(BODY_RESERVE_MAX_BYTES));
                joined.extend_from_slice(&start);
                joined.extend_from_slice(&data);
            }
        }
    }
    Ok(first.unwrap_or_else(|| joined.freeze()))
}
