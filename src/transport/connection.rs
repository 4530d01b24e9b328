//! One connection of the data plane: HTTP/1.1, HTTP/2 and gRPC told apart, and its limits.
//!
//! ```text
//! connection ─ admit (per client) ─ TLS ─ first bytes ─▶ HTTP/1 or HTTP/2 ─▶ respond ─▶ http · grpc
//!                                                    ▲ timed by drive, from what watch says
//! ```
//!
//! Invariants:
//! - Every answer leaves through [`respond`]; a panic in a handler is a 500, not a lost connection.
//! - Whatever a peer does or does not do, its connection ends: by the time for a head, for a body,
//!   for taking an answer, or for being idle. Only work in progress has other limits.
//! - Draining: answers tell the client to close, what is open finishes what it has.

use std::convert::Infallible;
use std::future::{Future, poll_fn};
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::header::{CONNECTION, CONTENT_TYPE, TRANSFER_ENCODING};
use http::{HeaderValue, Request, Response, StatusCode, Version};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::sync::{Semaphore, watch as signal};
use tokio::time::{Instant, Sleep, sleep_until, timeout};

use self::bodies::{AnswerBody, Pace, Paced};
use self::peers::{Counted, Peers};
use self::socket::{First, Socket};
use self::stream::Stream;
use self::watch::{Limits, Open, Seen, Watch};
use super::grpc::Grpc;
use super::{Api, Body, Settings, accept, http as rest};
use crate::observe::CloseReason;
use crate::panics;

mod bodies;
mod head;
mod lines;
mod peers;
mod socket;
mod stream;
mod watch;

pub(super) use bodies::TooSlow;

/// 600 KB tensors over HTTP/2 go twice as fast as with the default windows.
const HTTP2_STREAM_WINDOW: u32 = 1 << 20;
const HTTP2_CONNECTION_WINDOW: u32 = 4 << 20;
/// Connections that get those windows; with more open than this, further ones get the small
/// windows, so that what all clients together may send unasked stays bounded.
const HTTP2_WIDE_CONNECTIONS_MAX: usize = 512;
const HTTP2_SMALL_WINDOW: u32 = 256 << 10;
const HTTP2_FRAME_MAX: u32 = 1 << 20;
/// Table that a client's compressed headers may refer to.
const HTTP2_HEADER_TABLE_BYTES: u32 = 4 << 10;
/// Answer bytes of one stream that wait for the client's window, beside the piece in hand.
const HTTP2_SEND_BUFFER_BYTES: usize = 256 << 10;
/// Streams that a client may reset before they are accepted (rapid reset).
const HTTP2_RESETS_MAX: usize = 64;
/// Streams that a client's errors may make us reset (MadeYouReset).
const HTTP2_ERROR_RESETS_MAX: usize = 256;
/// A peer that vanished without a word is noticed.
const HTTP2_PING_EVERY: Duration = Duration::from_secs(60);
const HTTP2_PING_TIMEOUT: Duration = Duration::from_secs(20);
const HTTP1_BUFFER_MAX_BYTES: usize = 64 << 10;
const HTTP1_HEADERS_MAX: usize = 100;
/// Unsent bytes that the kernel holds for one connection. A client makes progress, as far as we
/// can see, with each half of it that it takes.
const UNSENT_MAX_BYTES: u32 = 256 << 10;

/// Connections are scarce when less than one in this many is left.
const CROWDED_BELOW: usize = 8;

/// What every connection shares.
pub(super) struct Front {
    pub(super) api: Arc<Api>,
    /// One permit for each connection that may be open.
    pub(super) connections: Arc<Semaphore>,
    connections_max: usize,
    grpc: Grpc,
    peers: Arc<Peers>,
    limits: Limits,
    /// While connections are scarce.
    limits_crowded: Limits,
    pace: Pace,
    http1: http1::Builder,
    http2: http2::Builder<TokioExecutor>,
    /// The same with small windows.
    http2_small: http2::Builder<TokioExecutor>,
}

impl Front {
    pub(super) fn new(api: Arc<Api>) -> Self {
        let settings = &api.settings;
        let connections_max = accept::connections_max(settings.connections_max);
        let limits = Limits::new(settings);
        Self {
            connections: Arc::new(Semaphore::new(connections_max)),
            connections_max,
            grpc: Grpc::new(Arc::clone(&api)),
            peers: Peers::new(settings.connections_per_ip_max),
            limits_crowded: limits.crowded(),
            limits,
            pace: Pace::new(settings),
            http1: http1_builder(settings),
            http2: http2_builder(settings, HTTP2_STREAM_WINDOW, HTTP2_CONNECTION_WINDOW),
            http2_small: http2_builder(settings, HTTP2_SMALL_WINDOW, HTTP2_SMALL_WINDOW),
            api,
        }
    }

    /// What connections are held to now: less when nearly all of them are taken.
    fn limits(&self) -> &Limits {
        let left = self.connections.available_permits();
        if left > self.connections_max / CROWDED_BELOW {
            &self.limits
        } else {
            &self.limits_crowded
        }
    }

    fn http2(&self) -> &http2::Builder<TokioExecutor> {
        let open = self.connections_max - self.connections.available_permits();
        if open <= HTTP2_WIDE_CONNECTIONS_MAX { &self.http2 } else { &self.http2_small }
    }

    /// `None` when the client has as many connections as it may.
    pub(super) fn admit(&self, peer: SocketAddr) -> Option<Counted> {
        let counted = self.peers.admit(peer.ip());
        if counted.is_none() {
            tracing::debug!(%peer, "refused, the client has all the connections that it may have");
            self.closed(CloseReason::PerIp);
        }
        counted
    }

    fn closed(&self, reason: CloseReason) {
        self.api.gateway.observer().connection_closed(reason);
    }
}

fn http1_builder(settings: &Settings) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        // Timed by `drive`: for hyper a connection without a request is one that sends its head.
        .header_read_timeout(None)
        .max_buf_size(HTTP1_BUFFER_MAX_BYTES)
        .max_headers(HTTP1_HEADERS_MAX)
        .max_header_size(settings.header_max_bytes)
        // A client that closes while its request waits is noticed, and the request dropped.
        .half_close(false);
    builder
}

fn http2_builder(
    settings: &Settings,
    stream_window: u32,
    connection_window: u32,
) -> http2::Builder<TokioExecutor> {
    let header_list = u32::try_from(settings.header_max_bytes).unwrap_or(u32::MAX);
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(settings.http2_streams_max)
        .initial_stream_window_size(stream_window)
        .initial_connection_window_size(connection_window)
        .max_frame_size(HTTP2_FRAME_MAX)
        .max_header_list_size(header_list)
        .header_table_size(HTTP2_HEADER_TABLE_BYTES)
        .max_send_buf_size(HTTP2_SEND_BUFFER_BYTES)
        .max_pending_accept_reset_streams(HTTP2_RESETS_MAX)
        .max_local_error_reset_streams(HTTP2_ERROR_RESETS_MAX)
        .keep_alive_interval(HTTP2_PING_EVERY)
        .keep_alive_timeout(HTTP2_PING_TIMEOUT);
    builder
}

/// Tells every connection to finish.
pub(super) struct Graceful(signal::Sender<()>);

/// The other end, one for each connection.
pub(super) struct Watcher(signal::Receiver<()>);

impl Graceful {
    pub(super) fn new() -> Self {
        Self(signal::Sender::new(()))
    }

    pub(super) fn watcher(&self) -> Watcher {
        Watcher(self.0.subscribe())
    }

    /// Connections that are open.
    pub(super) fn count(&self) -> usize {
        self.0.receiver_count()
    }

    /// Ends when the last connection has.
    pub(super) async fn shutdown(self) {
        self.0.send_replace(());
        self.0.closed().await;
    }
}

/// Serves one connection until it ends.
pub(super) async fn connection(
    front: Arc<Front>,
    stream: TcpStream,
    peer: SocketAddr,
    watcher: Watcher,
) {
    if let Err(error) = set_options(&stream) {
        tracing::debug!(%peer, %error, "socket options were not set");
    }
    let born = Instant::now();
    let opened = in_header_time(&front, born, open(&front, stream)).await;
    let (stream, first) = match opened {
        Some(Ok(Some(opened))) => opened,
        Some(Ok(None)) => return,
        Some(Err(error)) => return tracing::debug!(%peer, %error, "connection not opened"),
        None => return front.closed(CloseReason::HeaderTimeout),
    };
    let http2 = first.is_http2();
    let watch = Watch::new(born, !http2, age_max(&front.api.settings, peer));
    let service = {
        let (front, watch) = (Arc::clone(&front), Arc::clone(&watch));
        service_fn(move |request| {
            let (front, open) = (Arc::clone(&front), Open::new(&watch));
            async move { Ok::<_, Infallible>(respond(&front, request, open).await) }
        })
    };
    let socket = TokioIo::new(Socket::new(stream, first, Arc::clone(&watch)));
    let ended = if http2 {
        let served = front.http2().serve_connection(socket, service);
        drive(served, &front, &watch, watcher).await
    } else {
        let served = front.http1.serve_connection(socket, service);
        drive(served, &front, &watch, watcher).await
    };
    match ended {
        Ended::Itself(Ok(())) => {}
        Ended::Itself(Err(error)) => tracing::debug!(%peer, %error, "connection ended"),
        Ended::Cut(reason) => {
            tracing::debug!(%peer, reason = reason.as_str(), "connection cut");
        }
    }
}

/// Shakes hands where that is wanted, and reads until it is clear which protocol the peer speaks;
/// `None` when it closed before.
async fn open(front: &Front, stream: TcpStream) -> std::io::Result<Option<(Stream, First)>> {
    let mut stream = match &front.api.settings.tls {
        None => Stream::Plain(stream),
        Some(tls) => Stream::Tls(Box::new(tls.accept(stream).await?)),
    };
    let first = First::read(&mut stream).await?;
    Ok(first.map(|first| (stream, first)))
}

/// `None` when it is not done by the time for a head, which may become shorter meanwhile.
async fn in_header_time<T>(
    front: &Front,
    born: Instant,
    opening: impl Future<Output = T>,
) -> Option<T> {
    let mut opening = pin!(opening);
    loop {
        let left = front.limits().header().checked_sub(born.elapsed())?;
        let wait = left.min(front.limits.look());
        if let Ok(opened) = timeout(wait, opening.as_mut()).await {
            return Some(opened);
        }
    }
}

/// A tenth more at most, by the peer's port, so that connections made together end apart.
fn age_max(settings: &Settings, peer: SocketAddr) -> Option<Duration> {
    settings.connection_age_max.map(|age| age + age / 1000 * u32::from(peer.port() % 100))
}

fn set_options(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    SockRef::from(stream).set_tcp_notsent_lowat(UNSENT_MAX_BYTES)
}

/// A connection of either protocol.
trait Served: Future<Output = hyper::Result<()>> {
    fn finish(self: Pin<&mut Self>);
}

impl<I, S> Served for http1::Connection<I, S>
where
    S: hyper::service::HttpService<Incoming, ResBody = AnswerBody>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    I: hyper::rt::Read + hyper::rt::Write + Unpin + 'static,
{
    fn finish(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

impl<I, S> Served for http2::Connection<I, S, TokioExecutor>
where
    S: hyper::service::HttpService<Incoming, ResBody = AnswerBody>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    S::Future: Send + 'static,
    I: hyper::rt::Read + hyper::rt::Write + Unpin + 'static,
{
    fn finish(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

enum Ended {
    Itself(hyper::Result<()>),
    Cut(CloseReason),
}

/// Serves until the connection ends, finishes when told to, and cuts what breaks a limit.
async fn drive(
    served: impl Served,
    front: &Front,
    watch: &Watch,
    Watcher(mut told): Watcher,
) -> Ended {
    let mut served = pin!(served);
    let mut told = pin!(told.changed());
    let mut timed = pin!(Timed::new(front, watch));
    let mut finishing = false;
    poll_fn(|cx| {
        loop {
            if let Poll::Ready(ended) = served.as_mut().poll(cx) {
                return Poll::Ready(Ended::Itself(ended));
            }
            if !finishing && told.as_mut().poll(cx).is_ready() {
                finishing = true;
                served.as_mut().finish();
                continue;
            }
            match timed.as_mut().poll_broken(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Broken::Finish(reason)) => {
                    front.closed(reason);
                    served.as_mut().finish();
                }
                Poll::Ready(Broken::Cut(reason)) => return Poll::Ready(Ended::Cut(reason)),
            }
        }
    })
    .await
}

/// The one timer of a connection. It is moved only to go off earlier; when it goes off early, it
/// is set to what is due then.
struct Timed<'a> {
    front: &'a Front,
    watch: &'a Watch,
    seen: Seen,
    timer: Pin<Box<Sleep>>,
    /// Whether the timer already accounts for requests being open.
    ticking: bool,
}

enum Broken {
    /// Let it end by itself.
    Finish(CloseReason),
    Cut(CloseReason),
}

impl<'a> Timed<'a> {
    fn new(front: &'a Front, watch: &'a Watch) -> Self {
        let mut seen = Seen::default();
        let (due, _) = watch.due(front.limits(), &mut seen);
        let due = due.min(Instant::now() + front.limits.look());
        Self { front, watch, seen, timer: Box::pin(sleep_until(due)), ticking: false }
    }

    fn poll_broken(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Broken> {
        loop {
            let limits = self.front.limits();
            let (mut due, reason) = self.watch.due(limits, &mut self.seen);
            if self.watch.is_open() && !self.ticking {
                self.ticking = true;
                due = due.min(Instant::now() + limits.tick);
            }
            if due < self.timer.deadline() {
                self.timer.as_mut().reset(due);
            }
            if self.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            let now = Instant::now();
            self.watch.expire_bodies(now);
            let (due, reason) = match due <= now {
                true => self.watch.due(limits, &mut self.seen),
                false => (due, reason),
            };
            if due <= now {
                return Poll::Ready(self.broken(reason, now));
            }
            self.ticking = self.watch.is_open();
            let look = if self.ticking { limits.tick } else { limits.look() };
            self.timer.as_mut().reset(due.min(now + look));
        }
    }

    fn broken(&mut self, reason: CloseReason, now: Instant) -> Broken {
        match reason {
            CloseReason::Idle | CloseReason::Age if self.seen.closing.is_none() => {
                self.seen.closing = Some(now);
                Broken::Finish(reason)
            }
            // It was asked and counted before.
            CloseReason::Idle => Broken::Cut(reason),
            _ => {
                self.front.closed(reason);
                Broken::Cut(reason)
            }
        }
    }
}

async fn respond(
    front: &Arc<Front>,
    request: Request<Incoming>,
    open: Open,
) -> Response<AnswerBody> {
    let version = request.version();
    let http2 = version >= Version::HTTP_2;
    let checked = match open.watch().is_unequivocal() {
        true => head::check(&request, front.api.settings.uri_max_bytes),
        false => Err(head::TWO_READINGS),
    };
    let mut answer = match checked {
        Ok(()) => {
            // Where its body ends is a matter of opinion among proxies; nothing may follow it.
            let last = !http2
                && (request.headers().contains_key(TRANSFER_ENCODING)
                    || front.api.health.is_draining());
            let mut answer = dispatch(front, request, &open).await;
            if last || (!http2 && front.api.health.is_draining()) {
                answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            }
            answer
        }
        Err(refused) => {
            front.closed(CloseReason::Malformed);
            refused.answer(http2)
        }
    };
    if http2 {
        answer.headers_mut().remove(CONNECTION);
    }
    answer.map(|body| AnswerBody::new(body, open, http2))
}

async fn dispatch(front: &Arc<Front>, request: Request<Incoming>, open: &Open) -> Response<Body> {
    let is_grpc = request
        .headers()
        .get(CONTENT_TYPE)
        .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc"));
    let stream = is_grpc && Grpc::takes_a_stream(request.uri().path());
    let request = request.map(|body| Paced::new(body, front, open, stream));
    // Boxed, each for itself: HTTP/2 makes a task of every request, which would be copied and
    // allocated at the size of the larger one, several times over.
    let answer = if is_grpc {
        panics::caught_async(Box::pin(front.grpc.call(request))).await
    } else {
        panics::caught_async(Box::pin(rest::handle(Arc::clone(&front.api), request))).await
    };
    answer.unwrap_or_else(|| internal_error(is_grpc))
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
