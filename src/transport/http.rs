//! REST: the Open Inference Protocol, KServe v1, MLflow and SageMaker.
//!
//! ```text
//! handle ──▶ admit ──▶ find (route table) ──▶ permit ──▶ read_body ──▶ answer ──▶ compress ──▶ response
//!                                                  ├─ models · repository · openapi
//!                                                  └─ infer · v1 · invocations · feedback ──▶ gateway
//! ```
//!
//! Invariants:
//! - Every answer but an empty one is JSON or the binary tensor form; every failure is
//!   `{"error", "code"}`.
//! - Who is calling is known before the route is looked for.
//! - A body is read only for a route that exists and that the caller may use, and never past its
//!   limit.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::CONTENT_LENGTH;
use http::{HeaderMap, Method};
use http_body_util::BodyExt;
use percent_encoding::percent_decode_str;
use smallvec::SmallVec;
use tokio::time::Instant;

use super::auth::Caller;
use super::connection::TooSlow;
use super::intake::Held;
use super::meta::Arrived;
use super::{Api, Body, CONTROL_BYTES_MAX, Settings};
use crate::admit::Action;
use crate::domain::{ErrorKind, Failure, ModelName, Protocol, VersionRef};
use infer::Call;
use reply::Reply;
use shared::Act;

// The order for a newcomer, as everywhere in this house; the blank lines keep it.
pub mod binary;

pub mod json;

pub mod elements;

mod infer;
mod response;

pub mod invocations;
pub mod v1;

mod feedback;

mod models;
mod openapi;
mod repository;
mod shared;

pub mod compress;
mod pieces;
mod reply;

/// Longest wait for a thread to decode or encode a large body on.
const WORK_WAIT_MAX: Duration = Duration::from_secs(60);

/// Capacity reserved for a body on its sender's word alone.
const BODY_RESERVE_MAX_BYTES: usize = 1 << 20;

/// Parts of the longest route's path.
const SEGMENTS_USUAL: usize = 8;

/// Answers one request; never fails, whatever it is given.
pub async fn handle<B>(api: Arc<Api>, request: http::Request<B>) -> http::Response<Body>
where
    B: http_body::Body<Data = bytes::Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let arrived = Arrived(Instant::now());
    let (head, body) = request.into_parts();
    let accepted = compress::accepted(&head.headers);
    let compressing = Arc::clone(&api);
    let path = head.uri.path();
    let admitted = api.settings.auth.admit(Protocol::Http, path, &head.headers);
    let found = match admitted {
        Ok(caller) => find(&head.method, path).map(|route| (caller, route)),
        Err(error) => {
            api.gateway.observer().refused(Protocol::Http, ErrorKind::Unauthenticated);
            Err(Box::new(Reply::failure(&error.into())))
        }
    };
    let reply = match found {
        Err(reply) => *reply,
        Ok((caller, route)) => {
            let held = api.intake.open();
            let limit = body_limit(&route, &api.settings);
            let body = match permit(&caller, &route, &head.method) {
                Ok(()) => read_body(body, &head.headers, &api, limit, &held).await,
                Err(failure) => Err(failure),
            };
            let arrival = Arrival { at: arrived, held, caller };
            // Boxed so that a connection's future stays small.
            Box::pin(answer(api, route, head.method, head.headers, body, arrival)).await
        }
    };
    compress::answer(reply, accepted, &compressing).await.into_response()
}

/// When a request came, what it holds since, and whose it is.
struct Arrival {
    at: Arrived,
    held: Arc<Held>,
    caller: Caller,
}

/// Everything that can be asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Route {
    Server,
    Live,
    Ready,
    Models,
    Model(Of),
    ModelReady(Of),
    ModelConfig(Of),
    ModelStats(Option<Of>),
    OpenApi(Of),
    Infer(Of),
    Feedback(ModelName),
    Generate,
    Index,
    NamedRepository,
    Load(ModelName),
    Unload(ModelName),
    Trace(Option<ModelName>),
    Logging,
    Shared(Act),
    CudaShared,
    V1Models,
    V1Model(Of),
    V1Predict(Of),
    Invocations,
}

/// A model, and the version that the path names.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Of {
    model: ModelName,
    version: Option<VersionRef>,
}

/// Finds the route of a path, or its 404 or 405.
fn find(method: &Method, path: &str) -> Result<Route, Box<Reply>> {
    // As many as any route has, without an allocation.
    let decoded: Result<SmallVec<[_; SEGMENTS_USUAL]>, _> = path
        .trim_matches('/')
        .split('/')
        .map(|part| percent_decode_str(part).decode_utf8())
        .collect();
    let unknown = || Failure::not_found(format!("no such path: {}", shown(path)));
    let refused = |failure: Failure| Box::new(Reply::failure(&failure));
    let segments = decoded.map_err(|_| refused(unknown()))?;
    let segments: SmallVec<[&str; SEGMENTS_USUAL]> = segments.iter().map(AsRef::as_ref).collect();
    let (verbs, route) =
        table(&segments).and_then(|found| found.ok_or_else(unknown)).map_err(refused)?;
    // HEAD is GET without the body, which the connection leaves out.
    let asked = if method == Method::HEAD { "GET" } else { method.as_str() };
    if verbs.split(", ").any(|verb| verb == asked) {
        return Ok(route);
    }
    let message = format!("method {method} is not allowed here, expected {verbs}");
    let failure = Failure::new(ErrorKind::MethodNotAllowed, message);
    Err(Box::new(Reply::failure(&failure).allow(verbs)))
}

/// The route table: verbs and route of a path.
fn table(segments: &[&str]) -> Result<Option<(&'static str, Route)>, Failure> {
    let name = |model: &str| Ok::<_, Failure>(of(model, None)?.model);
    let text = |text: &&str| Some((*text).to_owned());
    Ok(Some(match segments {
        ["v2"] => ("GET", Route::Server),
        ["v2", "health", "live"] => ("GET", Route::Live),
        ["v2", "health", "ready"] | ["ping"] => ("GET", Route::Ready),
        ["v2", "models"] => ("GET", Route::Models),
        ["v2", "models", "stats"] => ("GET", Route::ModelStats(None)),
        ["v2", "models", model, "trace", "setting"] => {
            ("GET, POST", Route::Trace(Some(name(model)?)))
        }
        ["v2", "models", model, "feedback"] => ("POST", Route::Feedback(name(model)?)),
        ["v2", "models", model, "versions", version, rest @ ..] => {
            return Ok(of_model(of(model, Some(version))?, rest));
        }
        ["v2", "models", model, rest @ ..] => return Ok(of_model(of(model, None)?, rest)),
        ["v2", "repository", "index"] => ("POST", Route::Index),
        ["v2", "repository", _, "index"] => ("POST", Route::NamedRepository),
        ["v2", "repository", "models", model, "load"] => ("POST", Route::Load(name(model)?)),
        ["v2", "repository", "models", model, "unload"] => ("POST", Route::Unload(name(model)?)),
        ["v2", "repository", _, "models", _, "load" | "unload"] => ("POST", Route::NamedRepository),
        ["v2", "trace", "setting"] => ("GET, POST", Route::Trace(None)),
        ["v2", "logging"] => ("GET, POST", Route::Logging),
        ["v2", "systemsharedmemory", rest @ ..] => match rest {
            ["status"] => ("GET", Route::Shared(Act::Status(None))),
            ["region", region, "status"] => ("GET", Route::Shared(Act::Status(text(region)))),
            ["region", region, "register"] => {
                ("POST", Route::Shared(Act::Register((*region).to_owned())))
            }
            ["unregister"] => ("POST", Route::Shared(Act::Unregister(None))),
            ["region", region, "unregister"] => {
                ("POST", Route::Shared(Act::Unregister(text(region))))
            }
            _ => return Ok(None),
        },
        ["v2", "cudasharedmemory", rest @ ..] => match rest {
            ["status"] | ["region", _, "status"] => ("GET", Route::CudaShared),
            ["unregister"] | ["region", _, "register" | "unregister"] => {
                ("POST", Route::CudaShared)
            }
            _ => return Ok(None),
        },
        ["v1", "models"] => ("GET", Route::V1Models),
        ["v1", "models", model] => match model.rsplit_once(':') {
            Some((model, "predict")) => ("POST", Route::V1Predict(of(model, None)?)),
            Some(_) => return Ok(None),
            None => ("GET", Route::V1Model(of(model, None)?)),
        },
        ["invocations"] => ("POST", Route::Invocations),
        _ => return Ok(None),
    }))
}

/// Whether the caller may use the route; lists leave out what it may not see.
fn permit(caller: &Caller, route: &Route, method: &Method) -> Result<(), Failure> {
    let changes = method == Method::POST;
    match route {
        Route::Live | Route::Ready => Ok(()),
        Route::Server
        | Route::Models
        | Route::V1Models
        | Route::ModelStats(None)
        | Route::Index
        | Route::NamedRepository
        | Route::Generate
        | Route::CudaShared => caller.check_some(Action::ReadModels),
        Route::Model(of)
        | Route::ModelReady(of)
        | Route::ModelConfig(of)
        | Route::ModelStats(Some(of))
        | Route::OpenApi(of)
        | Route::V1Model(of) => caller.check(Action::ReadModels, &of.model),
        Route::Infer(of) | Route::V1Predict(of) => caller.check(Action::Predict, &of.model),
        Route::Feedback(model) => caller.check(Action::Feedback, model),
        // Its model is looked up, once, and asked about there.
        Route::Invocations => caller.check_some(Action::Predict),
        // Regions are for inputs and outputs.
        Route::Shared(_) => caller.check_some(Action::Predict),
        Route::Load(model) | Route::Unload(model) => caller.check(Action::ChangeVersions, model),
        Route::Trace(Some(model)) => {
            caller.check(Action::ReadModels, model)?;
            if changes { caller.check_gateway(Action::Reload) } else { Ok(()) }
        }
        Route::Trace(None) | Route::Logging if changes => caller.check_gateway(Action::Reload),
        Route::Trace(None) | Route::Logging => caller.check_some(Action::ReadModels),
    }
}

fn of_model(of: Of, rest: &[&str]) -> Option<(&'static str, Route)> {
    Some(match rest {
        [] => ("GET", Route::Model(of)),
        ["ready"] => ("GET", Route::ModelReady(of)),
        ["config"] => ("GET", Route::ModelConfig(of)),
        ["stats"] => ("GET", Route::ModelStats(Some(of))),
        ["openapi.json"] => ("GET", Route::OpenApi(of)),
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
///
/// A prediction whose body cannot be read is a failed prediction; elsewhere the body's failure is
/// the answer.
async fn answer(
    api: Arc<Api>,
    route: Route,
    method: Method,
    headers: HeaderMap,
    body: Result<Bytes, Failure>,
    Arrival { at: arrived, held, caller }: Arrival,
) -> Reply {
    let call = |Of { model, version }: Of, api: Arc<Api>, caller, headers, body| Call {
        api,
        caller,
        model,
        version,
        headers,
        body,
        arrived,
        held,
    };
    match route {
        Route::Infer(of) => call(of, api, caller, headers, body).infer().await,
        Route::V1Predict(of) => {
            call(of, api, caller, headers, body).predict(|body, _| Ok(v1::typing(body))).await
        }
        Route::Invocations => match default_model(&api, &caller) {
            Some(model) => {
                let body =
                    body.and_then(|body| caller.check(Action::Predict, &model).map(|()| body));
                let of = Of { model, version: None };
                call(of, api, caller, headers, body).predict(invocations::typing).await
            }
            None => Reply::failure(&Failure::not_found(
                "there is no default model for /invocations, use /v2/models/{model}/infer",
            )),
        },
        Route::Feedback(model) => match body {
            Ok(body) => {
                let call = (&headers, arrived);
                let done = feedback::answer(&api, &caller, &model, call, &body).await;
                done.unwrap_or_else(Reply::from)
            }
            Err(failure) => Reply::failure(&failure),
        },
        route => match body {
            Ok(body) => {
                let done = plain(&api, &caller, &route, &method, &body).await;
                done.unwrap_or_else(Reply::from)
            }
            Err(failure) => Reply::failure(&failure),
        },
    }
}

/// What `/invocations` means to this caller.
fn default_model(api: &Api, caller: &Caller) -> Option<ModelName> {
    api.gateway.table().default_model.clone().filter(|model| caller.sees(model))
}

/// Answers whatever is no prediction.
async fn plain(
    api: &Api,
    caller: &Caller,
    route: &Route,
    method: &Method,
    body: &[u8],
) -> Result<Reply, Failure> {
    let get = method != Method::POST;
    match route {
        Route::Server => Ok(models::server(api)),
        Route::Live => Ok(models::live(api)),
        Route::Ready => Ok(models::ready(api)),
        Route::Models | Route::V1Models => Ok(models::list(api, caller)),
        Route::Model(of) => models::metadata(api, &of.model, of.version.as_ref()),
        Route::ModelReady(of) | Route::V1Model(of) => {
            models::model_ready(api, &of.model, of.version.as_ref())
        }
        Route::ModelConfig(of) => models::config(api, &of.model, of.version.as_ref()),
        Route::ModelStats(None) => Ok(models::stats_of_all(api, caller)),
        Route::ModelStats(Some(of)) => models::stats(api, &of.model, of.version.as_ref()),
        Route::OpenApi(of) => models::openapi(api, &of.model, of.version.as_ref()),
        Route::Index => repository::index(api, caller, body),
        Route::Load(model) => repository::load(api, model, body).await,
        Route::Unload(model) => repository::unload(api, model, body).await,
        Route::Trace(model) => {
            let model = model.as_ref();
            if let Some(model) = model {
                api.gateway.served(model, None)?;
            }
            let model = model.map(ModelName::as_str);
            let settings = match get {
                true => api.toggles.trace_get(model),
                false => api.toggles.trace_update(model, &settings(body)?)?,
            };
            Ok(Reply::value(&settings))
        }
        Route::Logging => {
            let settings = match get {
                true => api.toggles.log_get(),
                false => api.toggles.log_update(&settings(body)?)?,
            };
            Ok(Reply::value(&settings))
        }
        Route::Shared(act) => shared::act(api, act, body),
        Route::CudaShared => Err(Failure::unsupported("CUDA shared memory is not supported")),
        Route::NamedRepository => {
            Err(Failure::unsupported("repositories have no names here, leave the name out"))
        }
        Route::Generate => Err(Failure::unsupported(
            "generate is not supported, models take and give tensors: use infer",
        )),
        Route::Infer(_) | Route::Feedback(_) | Route::V1Predict(_) | Route::Invocations => {
            Err(Failure::new(ErrorKind::Internal, "a call went astray"))
        }
    }
}

/// A body of settings; none at all changes nothing.
fn settings(body: &[u8]) -> Result<serde_json::Value, Failure> {
    if body.is_empty() {
        return Ok(serde_json::Value::Object(serde_json::Map::new()));
    }
    json::from_slice(body).map(|json::Strict(settings)| settings)
}

/// Largest body of a route, before and after decompression.
fn body_limit(route: &Route, settings: &Settings) -> usize {
    match route {
        Route::Infer(_) | Route::V1Predict(_) | Route::Invocations => settings.body_max_bytes,
        // It may bring a model.
        Route::Load(_) if settings.model_control => settings.body_max_bytes,
        _ => settings.body_max_bytes.min(CONTROL_BYTES_MAX),
    }
}

/// Reads a body up to its limit and decompresses it; `held` counts every byte of it.
async fn read_body<B>(
    body: B,
    headers: &HeaderMap,
    api: &Api,
    limit: usize,
    held: &Arc<Held>,
) -> Result<Bytes, Failure>
where
    B: http_body::Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let encoding = compress::content_encoding(headers)?;
    let announced = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
    // Timed by the connection.
    let body = collect(body, limit, announced, held).await?;
    match encoding {
        None => Ok(held.keep(body)),
        Some(_) if body.is_empty() => Ok(body),
        Some(encoding) => {
            let deadline = Instant::now() + WORK_WAIT_MAX;
            compress::decode(encoding, body, api, limit, deadline, held).await
        }
    }
}

fn broken_off(error: Box<dyn std::error::Error + Send + Sync>) -> Failure {
    if let Some(slow) = error.downcast_ref::<TooSlow>() {
        return Failure::new(ErrorKind::DeadlineExceeded, slow.to_string());
    }
    tracing::debug!(%error, "request body broke off");
    Failure::new(ErrorKind::Cancelled, "request body broke off")
}

async fn collect<B>(
    mut body: B,
    limit: usize,
    announced: Option<usize>,
    held: &Held,
) -> Result<Bytes, Failure>
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
    held.expect(announced.unwrap_or(0))?;
    let mut first: Option<Bytes> = None;
    let mut joined = Vec::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broken_off(error.into()))?;
        let Ok(data) = frame.into_data() else { continue };
        let have = first.as_ref().map_or(joined.len(), Bytes::len);
        if have.saturating_add(data.len()) > limit {
            return Err(too_large());
        }
        held.grow(data.len())?;
        // A body in one piece, as most are, is used where it lies.
        match first.take() {
            None if joined.is_empty() => first = Some(data),
            None => append(&mut joined, &data, announced),
            Some(start) => {
                append(&mut joined, &start, announced);
                append(&mut joined, &data, announced);
            }
        }
    }
    Ok(first.unwrap_or_else(|| joined.into()))
}

/// Appends to a body of which `announced` bytes are to come. Room is made for little more than what
/// has come: a stalled body must not hold what its sender only promised.
fn append(joined: &mut Vec<u8>, data: &[u8], announced: Option<usize>) {
    let need = joined.len() + data.len();
    if need > joined.capacity() {
        let room = match announced {
            Some(announced) => announced.min(need.saturating_mul(2).max(BODY_RESERVE_MAX_BYTES)),
            None => need + need / 4,
        };
        joined.reserve_exact(room.max(need) - joined.len());
    }
    joined.extend_from_slice(data);
}
