//! The metrics listener: `GET /metrics`, and the health routes for probes that look there.

use std::convert::Infallible;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE};
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{Empty, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::accept::Refusals;
use super::{Api, Body, http as rest};

/// Scrapers connected at once; more wait.
const CONNECTIONS_MAX: usize = 64;
const HEADER_TIMEOUT: Duration = Duration::from_secs(30);
/// Then a connection ends, so that none is held by who does not read.
const AGE_MAX: Duration = Duration::from_secs(600);
/// For the answer that is under way then.
const LAST_ANSWER_MAX: Duration = Duration::from_secs(30);

/// Serves until the process ends: metrics are wanted most while it drains.
pub async fn serve(listener: TcpListener, api: Arc<Api>) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut refusals = Refusals::new();
    loop {
        let Ok(slot) = Arc::clone(&connections).acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok((stream, _peer)) => {
                refusals.accepted();
                stream
            }
            Err(error) => {
                tokio::time::sleep(refusals.pause(&error)).await;
                continue;
            }
        };
        let api = Arc::clone(&api);
        tokio::spawn(async move {
            let service = service_fn(|request| {
                let api = Arc::clone(&api);
                async move { Ok::<_, Infallible>(respond(api, request).await) }
            });
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .serve_connection(TokioIo::new(stream), service);
            let mut served = pin!(served);
            let ended = match timeout(AGE_MAX, served.as_mut()).await {
                Ok(ended) => ended,
                Err(_) => {
                    served.as_mut().graceful_shutdown();
                    timeout(LAST_ANSWER_MAX, served).await.unwrap_or(Ok(()))
                }
            };
            if let Err(error) = ended {
                tracing::debug!(%error, "metrics connection ended");
            }
            drop(slot);
        });
    }
}

async fn respond(api: Arc<Api>, request: Request<Incoming>) -> Response<Body> {
    match request.uri().path() {
        "/metrics" => {}
        // Only health: predictions and the repository are for the data listeners.
        path if path.starts_with("/v2/health/") => {
            // A body is not waited for: nothing here would time it.
            return rest::handle(api, request.map(|_| Empty::<Bytes>::new())).await;
        }
        _ => {
            let mut answer = Response::new(Body::empty());
            *answer.status_mut() = StatusCode::NOT_FOUND;
            return answer;
        }
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut answer = Response::new(Body::empty());
        *answer.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
        return answer;
    }
    let accept = request.headers().get(ACCEPT).and_then(|value| value.to_str().ok());
    let (content_type, page) = api.gateway.observer().page(accept);
    let mut answer = Response::new(Body::new(Full::new(page)));
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    answer
}
