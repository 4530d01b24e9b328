//! Floors: the least that a server on the same libraries can do with the same bytes.
//!
//! The HTTP floor reads a body with hyper and sends it back; the gRPC floor decodes the protocol's
//! message with tonic and sends it back. Neither looks at what it holds.

use std::convert::Infallible;
use std::net::SocketAddr;

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::ValueEnum;
use http::{Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use socket2::{Domain, Protocol, Socket, Type};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Builder;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::TcpListenerStream;

use crate::proto::ModelInferRequest;
use crate::proto::echo::g_r_p_c_inference_service_server::{
    GRPCInferenceService, GRPCInferenceServiceServer,
};

const BACKLOG: i32 = 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// hyper, HTTP/1.1 only.
    Http1,
    /// hyper, HTTP/2 only.
    Http2,
    /// hyper, whichever the client speaks.
    Http,
    /// tonic.
    Grpc,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Layout {
    /// One runtime whose threads share all connections.
    #[default]
    Multi,
    /// A runtime of one thread per core, each with a listener of its own (`SO_REUSEPORT`).
    PerCore,
}

/// Serves until the process ends; `threads` 0 is one per core.
///
/// # Errors
/// When it cannot listen.
pub fn serve(kind: Kind, address: SocketAddr, layout: Layout, threads: usize) -> Result<()> {
    let threads = match threads {
        0 => std::thread::available_parallelism()?.get(),
        threads => threads,
    };
    match layout {
        Layout::Multi => {
            let socket = listener(address, false)?;
            let runtime =
                Builder::new_multi_thread().worker_threads(threads).enable_all().build()?;
            // As in servers in use, the accept loop is a task, not the main thread.
            runtime.block_on(async { tokio::spawn(accept(kind, socket)).await })?
        }
        Layout::PerCore => {
            // All listen before the first serves, so that none misses its share.
            let sockets: Vec<_> =
                (0..threads).map(|_| listener(address, true)).collect::<Result<_>>()?;
            let one = |socket| -> Result<()> {
                let runtime = Builder::new_current_thread().enable_all().build()?;
                runtime.block_on(accept(kind, socket))
            };
            std::thread::scope(|scope| {
                let all: Vec<_> =
                    sockets.into_iter().map(|s| scope.spawn(move || one(s))).collect();
                all.into_iter().try_for_each(|thread| {
                    thread.join().map_err(|_| anyhow::anyhow!("a floor's thread panicked"))?
                })
            })
        }
    }
}

fn listener(address: SocketAddr, shared: bool) -> Result<std::net::TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    if shared {
        socket.set_reuse_port(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into()).with_context(|| format!("cannot listen on {address}"))?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

async fn accept(kind: Kind, listener: std::net::TcpListener) -> Result<()> {
    let listener = TcpListener::from_std(listener)?;
    if kind == Kind::Grpc {
        let incoming = TcpListenerStream::new(listener)
            .map(|stream| stream.and_then(|stream| stream.set_nodelay(true).map(|()| stream)));
        let mut server = tonic::transport::Server::builder();
        let router = server.add_service(GRPCInferenceServiceServer::new(Echo));
        return Ok(router.serve_with_incoming(incoming).await?);
    }
    loop {
        let (stream, _) = listener.accept().await?;
        stream.set_nodelay(true)?;
        tokio::spawn(connection(kind, stream));
    }
}

/// The end of a connection, even by an error, is the client's matter.
async fn connection(kind: Kind, stream: TcpStream) {
    let io = TokioIo::new(stream);
    match kind {
        Kind::Http1 => drop(http1::Builder::new().serve_connection(io, service_fn(echo)).await),
        Kind::Http2 => {
            let builder = http2::Builder::new(TokioExecutor::new());
            drop(builder.serve_connection(io, service_fn(echo)).await);
        }
        Kind::Http | Kind::Grpc => {
            let builder = auto::Builder::new(TokioExecutor::new());
            drop(builder.serve_connection(io, service_fn(echo)).await);
        }
    }
}

async fn echo(request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    let body = request.into_body().collect().await.map(http_body_util::Collected::to_bytes);
    // A body that broke off has nobody left to answer.
    Ok(Response::new(Full::new(body.unwrap_or_default())))
}

struct Echo;

#[tonic::async_trait]
impl GRPCInferenceService for Echo {
    async fn model_infer(
        &self,
        request: tonic::Request<ModelInferRequest>,
    ) -> Result<tonic::Response<ModelInferRequest>, tonic::Status> {
        Ok(tonic::Response::new(request.into_inner()))
    }
}
