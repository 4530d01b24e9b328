//! The admin listener's sockets: HTTP/1.1 and HTTP/2, plain or over TLS, with every limit set by
//! hand, because none of the libraries sets them all.
//!
//! Invariants:
//! - Whoever is silent is closed: in the handshake, before a request, in its headers, between
//!   requests; sooner while connections are scarce. The first bytes count too, so that who sends
//!   none at all is seen.
//! - A connection ends by itself after [`AGE_MAX`]; one that does not read its answer is cut then.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_rustls::server::TlsStream;

use super::Api;
use super::gate::Peer;
use super::limits::{
    AGE_MAX, CONNECTION_WINDOW, CONNECTIONS_MAX, CONNECTIONS_SCARCE, HANDSHAKE_MAX,
    HEADER_BYTES_MAX, HEADER_WAIT_MAX, HEADERS_MAX, IDLE_MAX, IDLE_SCARCE_MAX, LAST_ANSWER_MAX,
    PING_EVERY, PONG_MAX, RESETS_MAX, SEND_BUFFER_MAX, STALL_MAX, STREAM_WINDOW, STREAMS_MAX,
};
use crate::admit::PeerName;

/// Pause after the operating system had nothing for a connection.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How often a connection is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// A handshake under way, with the name in the client's certificate if it showed one.
pub type Handshake =
    Pin<Box<dyn Future<Output = io::Result<(TlsStream<TcpStream>, Option<PeerName>)>> + Send>>;

/// Begins a handshake, with the certificates of this moment.
pub type Tls = Arc<dyn Fn(TcpStream) -> Handshake + Send + Sync>;

/// Serves until the process ends: while it drains, who operates it wants to see how it is.
pub async fn serve(listener: TcpListener, api: Arc<Api>, tls: Option<Tls>) {
    let slots = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        let (stream, address) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection to the admin API");
                sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let connection = Connection { api: Arc::clone(&api), slots: Arc::clone(&slots), address };
        tokio::spawn(connection.run(stream, tls.clone(), slot));
    }
}

struct Connection {
    api: Arc<Api>,
    slots: Arc<Semaphore>,
    address: SocketAddr,
}

impl Connection {
    async fn run(self, stream: TcpStream, tls: Option<Tls>, slot: OwnedSemaphorePermit) {
        let socket = socket2::SockRef::from(&stream);
        // The kernel cuts who takes nothing of what we send.
        let set = socket.set_tcp_user_timeout(Some(STALL_MAX));
        if let Err(error) = set.and_then(|()| stream.set_nodelay(true)) {
            tracing::debug!(%error, "admin connection");
        }
        let address = self.address;
        match tls {
            None => self.speak(stream, Peer { address, name: None }).await,
            Some(tls) => match timeout(HANDSHAKE_MAX, tls(stream)).await {
                Ok(Ok((stream, name))) => self.speak(stream, Peer { address, name }).await,
                Ok(Err(error)) => tracing::debug!(%error, %address, "admin TLS handshake failed"),
                Err(_) => tracing::debug!(%address, "admin TLS handshake took too long"),
            },
        }
        drop(slot);
    }

    async fn speak(&self, io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static, peer: Peer) {
        let activity = Arc::new(Activity::new());
        let service = service_fn(|request: Request<Incoming>| {
            let (api, peer, under_way) = (Arc::clone(&self.api), peer.clone(), activity.begin());
            async move {
                let answer = api.answer(&peer, request).await;
                Ok::<_, Infallible>(
                    answer.map(|body| Body::new(Tracked { body, _under_way: under_way })),
                )
            }
        });
        let builder = builder();
        let mut served = pin!(builder.serve_connection(TokioIo::new(io), service));
        let ended = tokio::select! {
            ended = served.as_mut() => ended,
            () = self.over(&activity) => {
                served.as_mut().graceful_shutdown();
                let rest = if activity.is_idle() { Duration::ZERO } else { LAST_ANSWER_MAX };
                timeout(rest.max(LOOK_EVERY), served).await.unwrap_or(Ok(()))
            }
        };
        if let Err(error) = ended {
            tracing::debug!(%error, "admin connection ended");
        }
    }

    /// When the connection has been silent for too long, or is too old.
    async fn over(&self, activity: &Activity) {
        let old = Instant::now() + AGE_MAX;
        loop {
            tokio::select! {
                () = sleep(LOOK_EVERY) => {}
                () = sleep_until(old) => return,
            }
            let scarce = self.slots.available_permits() < CONNECTIONS_SCARCE;
            let max = if scarce { IDLE_SCARCE_MAX } else { IDLE_MAX };
            if activity.idle_for().is_some_and(|idle| idle >= max) {
                return;
            }
        }
    }
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_WAIT_MAX)
        .max_buf_size(HEADER_BYTES_MAX)
        .max_headers(HEADERS_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_pending_accept_reset_streams(RESETS_MAX)
        .max_local_error_reset_streams(RESETS_MAX)
        .max_header_list_size(u32::try_from(HEADER_BYTES_MAX).unwrap_or(u32::MAX))
        .max_send_buf_size(SEND_BUFFER_MAX)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .keep_alive_interval(PING_EVERY)
        .keep_alive_timeout(PONG_MAX);
    builder
}

/// Requests of one connection that are under way, and since when there are none.
#[derive(Debug)]
struct Activity {
    /// Guards the count and the time together.
    state: Mutex<(usize, Instant)>,
}

impl Activity {
    fn new() -> Self {
        Self { state: Mutex::new((0, Instant::now())) }
    }

    fn begin(self: &Arc<Self>) -> UnderWay {
        self.state.lock().0 += 1;
        UnderWay(Arc::clone(self))
    }

    fn is_idle(&self) -> bool {
        self.state.lock().0 == 0
    }

    fn idle_for(&self) -> Option<Duration> {
        let (count, since) = *self.state.lock();
        (count == 0).then(|| since.elapsed())
    }
}

/// Counts a request until its answer has been sent or given up.
struct UnderWay(Arc<Activity>);

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut state = self.0.state.lock();
        state.0 = state.0.saturating_sub(1);
        state.1 = Instant::now();
    }
}

/// A body that keeps its request counted.
struct Tracked {
    body: Body,
    _under_way: UnderWay,
}

impl http_body::Body for Tracked {
    type Data = bytes::Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
