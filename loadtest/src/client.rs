//! One caller: a connection without any pool, and one request over it.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use clap::ValueEnum;
use http::header::{CONTENT_TYPE, HOST, TE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::net::TcpStream;
use tokio::sync::Mutex;

use crate::tensors::{self, Encoding, Spec, Tensor};

const JSON_LEN: HeaderName = HeaderName::from_static("inference-header-content-length");
const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
/// As large as servers in use give theirs, so that big answers do not wait for window updates.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    Http1,
    /// REST over HTTP/2 with prior knowledge.
    Http2,
    Grpc,
}

impl Protocol {
    /// Whether one connection carries several requests at once.
    #[must_use]
    pub fn multiplexes(self) -> bool {
        self != Self::Http1
    }
}

/// A request that is sent again and again.
#[derive(Clone, Debug)]
pub struct Call {
    pub protocol: Protocol,
    request: Request<()>,
    pub body: Bytes,
    /// Length of the body of every answer, where it is checked.
    pub answer_len: Option<usize>,
}

impl Call {
    /// A prediction by `model` with these inputs. gRPC has one encoding, with raw contents.
    ///
    /// # Errors
    /// When the model's name cannot stand in a path.
    pub fn new(
        protocol: Protocol,
        encoding: Encoding,
        model: &str,
        inputs: &[Tensor],
    ) -> Result<Self> {
        let (path, body, json_len) = if protocol == Protocol::Grpc {
            (
                "/inference.GRPCInferenceService/ModelInfer".to_owned(),
                tensors::grpc(model, inputs)?,
                None,
            )
        } else {
            let (body, json_len) = tensors::http(inputs, encoding)?;
            (format!("/v2/models/{model}/infer"), body, json_len)
        };
        let mut request = Request::builder().method(Method::POST).body(())?;
        *request.uri_mut() = match protocol {
            Protocol::Http1 => path.parse(),
            _ => format!("http://loadtest{path}").parse(),
        }
        .with_context(|| format!("'{model}' cannot stand in a path"))?;
        headers(request.headers_mut(), protocol, json_len);
        Ok(Self { protocol, request, body, answer_len: None })
    }

    fn request(&self) -> Request<Full<Bytes>> {
        self.request.clone().map(|()| Full::new(self.body.clone()))
    }
}

fn headers(headers: &mut HeaderMap, protocol: Protocol, json_len: Option<usize>) {
    let content_type = match (protocol, json_len) {
        (Protocol::Grpc, _) => "application/grpc",
        (_, Some(_)) => "application/octet-stream",
        (_, None) => "application/json",
    };
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
    if let Some(len) = json_len {
        headers.insert(JSON_LEN, HeaderValue::from(len));
    }
    match protocol {
        Protocol::Grpc => headers.insert(TE, HeaderValue::from_static("trailers")),
        Protocol::Http1 => headers.insert(HOST, HeaderValue::from_static("loadtest")),
        Protocol::Http2 => None,
    };
}

/// A connection, opened when it is needed; callers of a multiplexing protocol share one.
pub struct Connection {
    address: SocketAddr,
    shared: Mutex<Option<http2::SendRequest<Full<Bytes>>>>,
}

enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Connection {
    #[must_use]
    pub fn new(address: SocketAddr) -> Self {
        Self { address, shared: Mutex::new(None) }
    }

    async fn open(&self, protocol: Protocol) -> Result<Sender> {
        if protocol == Protocol::Http1 {
            let (sender, connection) = http1::handshake(self.stream().await?).await?;
            tokio::spawn(connection);
            return Ok(Sender::Http1(sender));
        }
        let mut shared = self.shared.lock().await;
        if let Some(open) = shared.as_ref().filter(|open| !open.is_closed()) {
            return Ok(Sender::Http2(open.clone()));
        }
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .handshake(self.stream().await?)
            .await?;
        tokio::spawn(connection);
        *shared = Some(sender.clone());
        Ok(Sender::Http2(sender))
    }

    async fn stream(&self) -> std::io::Result<TokioIo<TcpStream>> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        Ok(TokioIo::new(stream))
    }
}

/// Sends one request at a time over its connection.
pub struct Caller {
    connection: Arc<Connection>,
    sender: Option<Sender>,
    timeout: Duration,
}

impl Caller {
    #[must_use]
    pub fn new(connection: Arc<Connection>, timeout: Duration) -> Self {
        Self { connection, sender: None, timeout }
    }

    /// Gives the length of the answer's body, or the kind of error.
    ///
    /// # Errors
    /// For every answer that is no success; after some the next call opens a new connection.
    pub async fn call(&mut self, call: &Call) -> Result<usize, String> {
        if let Ok(answer) = tokio::time::timeout(self.timeout, self.untimed(call)).await {
            answer
        } else {
            self.sender = None;
            Err("timeout".to_owned())
        }
    }

    /// Opens the connection ahead of the first call.
    ///
    /// # Errors
    /// When it cannot be opened.
    pub async fn open(&mut self, protocol: Protocol) -> Result<(), String> {
        let opened = self.connection.open(protocol).await;
        self.sender = Some(opened.map_err(|error| format!("connect: {error}"))?);
        Ok(())
    }

    async fn untimed(&mut self, call: &Call) -> Result<usize, String> {
        // A request cannot be sent on a connection that the server has closed: not an error.
        if self.sender.as_ref().is_none_or(Sender::is_closed) {
            self.open(call.protocol).await?;
        }
        let Some(sender) = &mut self.sender else { return Err("connect".to_owned()) };
        let answer = match sender {
            Sender::Http1(sender) => match sender.ready().await {
                Ok(()) => sender.send_request(call.request()).await,
                Err(error) => Err(error),
            },
            Sender::Http2(sender) => match sender.ready().await {
                Ok(()) => sender.send_request(call.request()).await,
                Err(error) => Err(error),
            },
        };
        let read = match answer {
            Ok(answer) => read(answer, call).await,
            Err(error) => Err(transport(&error)),
        };
        if matches!(&read, Err(kind) if kind.starts_with("transport")) {
            self.sender = None;
        }
        read
    }
}

impl Sender {
    fn is_closed(&self) -> bool {
        match self {
            Self::Http1(sender) => sender.is_closed(),
            Self::Http2(sender) => sender.is_closed(),
        }
    }
}

fn transport(error: &hyper::Error) -> String {
    format!("transport: {error}")
}

async fn read(answer: Response<Incoming>, call: &Call) -> Result<usize, String> {
    let (head, mut body) = answer.into_parts();
    let mut len = 0;
    // An error without a body has its status among the headers.
    let mut status = head.headers.get(GRPC_STATUS).cloned();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| transport(&error))?;
        match frame.data_ref() {
            Some(data) => len += data.len(),
            None => {
                let trailers = frame.trailers_ref();
                status = trailers.and_then(|all| all.get(GRPC_STATUS).cloned()).or(status);
            }
        }
    }
    if head.status != StatusCode::OK {
        return Err(format!("http {}", head.status.as_u16()));
    }
    if call.protocol == Protocol::Grpc {
        match status.as_ref().map(HeaderValue::as_bytes) {
            Some(b"0") => {}
            Some(other) => return Err(format!("grpc {}", String::from_utf8_lossy(other))),
            None => return Err("grpc without status".to_owned()),
        }
    }
    match call.answer_len {
        Some(expected) if expected != len => Err("answer of another length".to_owned()),
        _ => Ok(len),
    }
}

/// The inputs of a model, from its metadata.
///
/// # Errors
/// When the server is not there or does not know the model.
pub async fn inputs(address: SocketAddr, model: &str) -> Result<Vec<Spec>> {
    #[derive(serde::Deserialize)]
    struct Metadata {
        inputs: Vec<Spec>,
    }
    let (status, body) = get(address, &format!("/v2/models/{model}")).await?;
    if status != StatusCode::OK {
        bail!("metadata of model '{model}': {status} {}", String::from_utf8_lossy(&body));
    }
    Ok(serde_json::from_slice::<Metadata>(&body).context("model metadata")?.inputs)
}

/// # Errors
/// When there is no answer.
pub async fn get(address: SocketAddr, path: &str) -> Result<(StatusCode, Bytes)> {
    let connection = Connection::new(address);
    let stream =
        connection.stream().await.with_context(|| format!("cannot connect to {address}"))?;
    let (mut sender, connection) = http1::handshake::<_, Full<Bytes>>(stream).await?;
    tokio::spawn(connection);
    let request = Request::get(path).header(HOST, "loadtest").body(Full::default())?;
    let answer = sender.send_request(request).await?;
    Ok((answer.status(), answer.into_body().collect().await?.to_bytes()))
}
