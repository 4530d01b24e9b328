//! `ModelStreamInfer`: many predictions over one stream, answered in the order they came.
//!
//! ```text
//! reader task ──permit──▶ one task per request ──▶ Ordered (awaits them in turn) ──▶ client
//! ```
//!
//! Invariants:
//! - At most `stream_concurrency_max` requests are running or waiting to be sent; then the reader
//!   stops and flow control holds the client back.
//! - A client that goes away takes its running requests with it.
//! - The caller's key is looked at again for every request: a stream does not outlive it.
//! - Models here answer once, so every answer is final and no empty one follows it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::Stream;
use tokio_util::task::AbortOnDropHandle;
use tonic::{Request, Response, Status, Streaming};

use super::encode;
use super::frames::Bill;
use super::service::{Asked, Refusal, infer};
use crate::domain::{AnswerHead, CallMeta, Failure, Protocol};
use crate::proto::inference::infer_parameter::ParameterChoice;
use crate::proto::inference::{InferParameter, ModelInferResponse, ModelStreamInferResponse};
use crate::transport::auth::Caller;
use crate::transport::intake::Held;
use crate::transport::{Api, Body, meta};

/// Longest pause between requests of a stream while the server drains.
const QUIET_IN_DRAIN: Duration = Duration::from_secs(1);

const FINAL: &str = "triton_final_response";
/// Metadata with which a client asks for a status in place of `error_message`.
const GRPC_ERROR: &str = "triton_grpc_error";

type Finished = Result<ModelInferResponse, Status>;

/// What became of one request of the stream.
type Outcome = Result<ModelInferResponse, Box<Refusal>>;

type Running<T> = AbortOnDropHandle<(Result<T, Status>, OwnedSemaphorePermit)>;

/// Answers of a stream, in the order of its requests.
pub(super) struct Ordered<T> {
    running: mpsc::Receiver<Running<T>>,
    next: Option<Running<T>>,
    ended: bool,
    _reader: AbortOnDropHandle<()>,
}

/// Answers a whole call: in Triton's form, or in MLServer's (plain answers, and a status at the
/// first failure).
pub(super) async fn answer<B>(api: &Arc<Api>, request: http::Request<B>) -> http::Response<Body>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    if api.settings.mlserver_stream {
        let form = Form { api: Arc::clone(api), of: plain };
        return super::server(&api.settings).streaming(form, request).await;
    }
    let strict = request.headers().get(GRPC_ERROR);
    let strict = strict.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"true"));
    let form = Form { api: Arc::clone(api), of: if strict { wrap_strict } else { wrap } };
    super::server(&api.settings).streaming(form, request).await
}

/// A stream's service: what its answers look like.
struct Form<T> {
    api: Arc<Api>,
    of: fn(Outcome) -> Result<T, Status>,
}

impl<T: prost::Message + 'static> tonic::server::StreamingService<Bytes> for Form<T> {
    type Response = T;
    type ResponseStream = Ordered<T>;
    type Future = std::future::Ready<Result<Response<Ordered<T>>, Status>>;

    fn call(&mut self, request: Request<Streaming<Bytes>>) -> Self::Future {
        std::future::ready(start(&self.api, request, self.of).map(Response::new))
    }
}

fn start<T: Send + 'static>(
    api: &Arc<Api>,
    request: Request<Streaming<Bytes>>,
    form: fn(Outcome) -> Result<T, Status>,
) -> Result<Ordered<T>, Status> {
    let headers = request.metadata().as_ref();
    let arrived = super::arrived(&request);
    let opened =
        meta::call_meta(headers, Protocol::GrpcStream, arrived, api).map_err(|failure| {
            api.gateway.observer().refused(Protocol::GrpcStream, failure.kind);
            encode::status(&failure, None)
        })?;
    let caller = super::caller(&request);
    let opened = CallMeta { principal: caller.name(), ..opened };
    let opened = Opened { meta: opened, headers: headers.clone() };
    let bill = request.extensions().get::<Arc<Bill>>().cloned();
    let bill = bill.unwrap_or_else(|| Bill::new(api));
    let at_once = api.settings.stream_concurrency_max.max(1);
    let (sender, running) = mpsc::channel(at_once);
    let requests = Requests { messages: request.into_inner(), bill, caller };
    let reader = read(Arc::clone(api), requests, opened, at_once, sender, form);
    let reader = AbortOnDropHandle::new(tokio::spawn(reader));
    Ok(Ordered { running, next: None, ended: false, _reader: reader })
}

/// What a stream was opened with.
struct Opened {
    meta: CallMeta,
    headers: HeaderMap,
}

/// Messages as they come, the bill that counts them, and who sends them.
struct Requests {
    messages: Streaming<Bytes>,
    bill: Arc<Bill>,
    caller: Caller,
}

async fn read<T: Send + 'static>(
    api: Arc<Api>,
    mut requests: Requests,
    opened: Opened,
    at_once: usize,
    running: mpsc::Sender<Running<T>>,
    form: fn(Outcome) -> Result<T, Status>,
) {
    let permits = Arc::new(Semaphore::new(at_once));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let message = tokio::select! {
            biased;
            message = requests.messages.message() => message,
            () = quiet_in_drain(&api) => return,
        };
        let (task, last) = match message {
            Ok(None) => return,
            Ok(Some(message)) => {
                let (api, meta) = (Arc::clone(&api), opened.arrived(&api));
                let (held, caller) = (requests.bill.take(), requests.caller.clone());
                let task =
                    async move { (form(one(&api, &caller, meta, message, held).await), permit) };
                (tokio::spawn(task), false)
            }
            Err(status) => {
                let kind = super::kind_of(status.code());
                api.gateway.observer().refused(Protocol::GrpcStream, kind);
                (tokio::spawn(async move { (Err(broken(status)), permit) }), true)
            }
        };
        if running.send(AbortOnDropHandle::new(task)).await.is_err() || last {
            return;
        }
    }
}

/// Ready when the server drains and nothing came for a while: an open stream with nothing to do
/// must not hold up the end.
async fn quiet_in_drain(api: &Api) {
    let mut changes = api.health.changes();
    while !api.health.is_draining() {
        if !changes.changed().await {
            return std::future::pending().await;
        }
    }
    tokio::time::sleep(QUIET_IN_DRAIN).await;
}

impl Opened {
    /// The call's metadata for a request that comes now: a deadline of the stream is one for each,
    /// and traffic tables may ask for other headers than they did before.
    fn arrived(&self, api: &Api) -> CallMeta {
        let Self { meta: opened, headers } = self;
        let mut now = opened.clone();
        now.received = tokio::time::Instant::now();
        now.timeout = opened.timeout.map(|wait| wait.saturating_sub(opened.received.elapsed()));
        now.headers = meta::route_headers(headers, api);
        now
    }
}

/// As in `too_large` of the module above, where a stream's status does not pass.
fn broken(status: Status) -> Status {
    match status.code() {
        tonic::Code::OutOfRange => Status::resource_exhausted(status.message().to_owned()),
        _ => status,
    }
}

async fn one(
    api: &Arc<Api>,
    caller: &Caller,
    meta: CallMeta,
    message: Bytes,
    held: Arc<Held>,
) -> Outcome {
    let caller = api.settings.auth.renewed(caller).map_err(|error| {
        let failure = Failure::from(error);
        api.gateway.observer().refused(meta.protocol, failure.kind);
        Box::new(Refusal { failure, head: None, asked: Asked::default() })
    })?;
    infer(api, &caller, meta, message, held).await.map(|(mut response, head)| {
        describe(&mut response, Some(&head));
        response
    })
}

/// Puts into an item's parameters what a single call has in its metadata.
fn describe(response: &mut ModelInferResponse, head: Option<&AnswerHead>) {
    response.parameters.insert(FINAL.to_owned(), encode::bool_parameter(true));
    let mut headers = HeaderMap::new();
    if let Some(head) = head {
        meta::answer_headers(head, &mut headers);
    }
    for (name, value) in &headers {
        let value = ParameterChoice::StringParam(value.to_str().unwrap_or_default().to_owned());
        let value = InferParameter { parameter_choice: Some(value) };
        response.parameters.insert(name.as_str().to_owned(), value);
    }
}

fn wrap(outcome: Outcome) -> Result<ModelStreamInferResponse, Status> {
    Ok(match outcome {
        Ok(response) => ModelStreamInferResponse {
            error_message: String::new(),
            infer_response: Some(response),
        },
        Err(refusal) => {
            let Asked { id, model, version } = refusal.asked;
            let mut response = ModelInferResponse {
                id,
                model_name: model,
                model_version: version,
                ..ModelInferResponse::default()
            };
            describe(&mut response, refusal.head.as_ref());
            ModelStreamInferResponse {
                error_message: refusal.failure.message,
                infer_response: Some(response),
            }
        }
    })
}

fn wrap_strict(outcome: Outcome) -> Result<ModelStreamInferResponse, Status> {
    let response = plain(outcome)?;
    Ok(ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) })
}

fn plain(outcome: Outcome) -> Finished {
    outcome.map_err(|refusal| refusal.status())
}

impl<T> Stream for Ordered<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            if let Some(running) = &mut self.next {
                let done = ready!(Pin::new(running).poll(context));
                self.next = None;
                let item = match done {
                    Ok((item, _permit)) => item,
                    Err(error) => {
                        tracing::error!(%error, "a request of a stream was lost");
                        Err(Status::internal("the request was lost"))
                    }
                };
                self.ended = item.is_err();
                return Poll::Ready(Some(item));
            }
            match ready!(self.running.poll_recv(context)) {
                Some(running) => self.next = Some(running),
                None => self.ended = true,
            }
        }
    }
}
