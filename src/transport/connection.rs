//! One connection of the data plane: HTTP/1.1, HTTP/2 and gRPC told apart, and its limits.
//!
//! Invariants:
//! - Every answer leaves through [`respond`]; a panic in a handler is a 500, not a lost connection.
//! - Draining: answers tell the client to close, what is open finishes what it has.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::header::{CONNECTION, CONTENT_TYPE};
use http::{HeaderValue, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::Watcher;
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::grpc::Grpc;
use super::{Api, Body, Settings, http as rest};
use crate::panics;

/// 600 KB tensors over HTTP/2 go twice as fast as with the default windows.
const HTTP2_STREAM_WINDOW: u32 = 1 << 20;
const HTTP2_CONNECTION_WINDOW: u32 = 4 << 20;
const HTTP2_FRAME_MAX: u32 = 1 << 20;
const HEADER_LIST_MAX_BYTES: u32 = 16 << 10;
const HTTP1_BUFFER_MAX_BYTES: usize = 64 << 10;
/// Streams that a client may reset before the connection is closed (rapid reset).
const HTTP2_RESETS_MAX: usize = 64;

/// What every connection shares.
pub(super) struct Front {
    pub(super) api: Arc<Api>,
    /// One permit for each connection that may be open.
    pub(super) connections: Arc<Semaphore>,
    grpc: Grpc,
    http: auto::Builder<TokioExecutor>,
}

impl Front {
    pub(super) fn new(api: Arc<Api>) -> Self {
        let grpc = Grpc::new(Arc::clone(&api));
        let http = builder(&api.settings);
        let connections = Arc::new(Semaphore::new(api.settings.connections_max));
        Self { api, connections, grpc, http }
    }
}

fn builder(settings: &Settings) -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(settings.header_timeout)
        .max_buf_size(HTTP1_BUFFER_MAX_BYTES)
        .half_close(false);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(settings.http2_streams_max)
        .initial_stream_window_size(HTTP2_STREAM_WINDOW)
        .initial_connection_window_size(HTTP2_CONNECTION_WINDOW)
        .max_frame_size(HTTP2_FRAME_MAX)
        .max_header_list_size(HEADER_LIST_MAX_BYTES)
        .max_pending_accept_reset_streams(HTTP2_RESETS_MAX)
        .max_local_error_reset_streams(HTTP2_RESETS_MAX)
        // A peer that vanished without a word is noticed.
        .keep_alive_interval(Duration::from_secs(60))
        .keep_alive_timeout(Duration::from_secs(20));
    builder
}

/// Serves one connection until it ends.
pub(super) async fn connection(
    front: Arc<Front>,
    stream: TcpStream,
    peer: SocketAddr,
    watcher: Watcher,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%peer, %error, "no TCP_NODELAY");
    }
    // hyper's own timer starts once it knows the protocol; a peer that sends nothing ends here.
    let first_byte = timeout(front.api.settings.header_timeout, stream.readable());
    if !matches!(first_byte.await, Ok(Ok(()))) {
        return;
    }
    let service = {
        let front = Arc::clone(&front);
        service_fn(move |request| {
            let front = Arc::clone(&front);
            async move { Ok::<_, Infallible>(respond(&front, request).await) }
        })
    };
    let served = front.http.serve_connection(TokioIo::new(stream), service).into_owned();
    if let Err(error) = watcher.watch(served).await {
        tracing::debug!(%peer, %error, "connection ended");
    }
}

async fn respond(front: &Front, request: Request<Incoming>) -> Response<Body> {
    let version = request.version();
    let is_grpc = request
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    let answer = if is_grpc {
        panics::caught_async(front.grpc.call(request)).await
    } else {
        panics::caught_async(rest::handle(Arc::clone(&front.api), request)).await
    };
    let mut answer = answer.unwrap_or_else(|| internal_error(is_grpc));
    if version < Version::HTTP_2 && front.api.health.is_draining() {
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

fn internal_error(is_grpc: bool) -> Response<Body> {
    if is_grpc {
        return tonic::Status::internal("internal error").into_http();
    }
    let body = r#"{"error":"internal error","code":"internal"}"#;
    let mut answer = Response::new(Body::new(http_body_util::Full::new(body.into())));
    *answer.status_mut() = StatusCode::INTERNAL_SERVER_ERROR;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}
