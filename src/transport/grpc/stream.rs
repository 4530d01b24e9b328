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
//! - Models here answer once, so every answer is final and no empty one follows it.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use http::HeaderMap;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_stream::Stream;
use tokio_util::task::AbortOnDropHandle;
use tonic::codec::{CompressionEncoding, EnabledCompressionEncodings};
use tonic::{Request, Response, Status, Streaming};

use super::encode;
use super::service::{Refusal, infer};
use crate::domain::{AnswerHead, CallMeta, Protocol};
use crate::proto::inference::infer_parameter::ParameterChoice;
use crate::proto::inference::{
    InferParameter, ModelInferRequest, ModelInferResponse, ModelStreamInferResponse,
};
use crate::transport::{Api, Body, meta};

/// Longest pause between requests of a stream while the server drains.
const QUIET_IN_DRAIN: Duration = Duration::from_secs(1);

const FINAL: &str = "triton_final_response";
/// Metadata with which a client asks for a status in place of `error_message`.
const GRPC_ERROR: &str = "triton_grpc_error";

type Finished = Result<ModelInferResponse, Status>;

/// What became of one request of the stream.
struct Item {
    id: String,
    model: String,
    version: String,
    outcome: Result<ModelInferResponse, Box<Refusal>>,
}

type Running<T> = AbortOnDropHandle<(Result<T, Status>, OwnedSemaphorePermit)>;

/// Answers of a stream, in the order of its requests.
pub(super) struct Ordered<T> {
    running: mpsc::Receiver<Running<T>>,
    next: Option<Running<T>>,
    ended: bool,
    _reader: AbortOnDropHandle<()>,
}

/// A stream in Triton's form.
pub(super) fn wrapped(
    api: &Arc<Api>,
    request: Request<Streaming<ModelInferRequest>>,
) -> Result<Response<Ordered<ModelStreamInferResponse>>, Status> {
    let strict = request.metadata().get(GRPC_ERROR);
    let strict = strict.is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"true"));
    Ok(Response::new(start(api, request, if strict { wrap_strict } else { wrap })?))
}

/// Answers a whole call in MLServer's form: plain answers, and a status at the first failure.
pub(super) async fn unwrapped(api: Arc<Api>, request: http::Request<Body>) -> http::Response<Body> {
    struct Plain(Arc<Api>);
    impl tonic::server::StreamingService<ModelInferRequest> for Plain {
        type Response = ModelInferResponse;
        type ResponseStream = Ordered<ModelInferResponse>;
        type Future = std::future::Ready<Result<Response<Self::ResponseStream>, Status>>;

        fn call(&mut self, request: Request<Streaming<ModelInferRequest>>) -> Self::Future {
            std::future::ready(start(&self.0, request, plain).map(Response::new))
        }
    }
    let mut encodings = EnabledCompressionEncodings::default();
    encodings.enable(CompressionEncoding::Gzip);
    encodings.enable(CompressionEncoding::Deflate);
    let codec = tonic_prost::ProstCodec::default();
    let mut grpc = tonic::server::Grpc::new(codec)
        .apply_compression_config(encodings, encodings)
        .apply_max_message_size_config(
            Some(api.settings.body_max_bytes),
            Some(super::MESSAGE_BYTES_MAX),
        );
    grpc.streaming(Plain(api), request).await
}

fn start<T: Send + 'static>(
    api: &Arc<Api>,
    request: Request<Streaming<ModelInferRequest>>,
    form: fn(Item) -> Result<T, Status>,
) -> Result<Ordered<T>, Status> {
    let headers = request.metadata().as_ref();
    let arrived = super::arrived(&request);
    let opened = meta::call_meta(headers, Protocol::GrpcStream, arrived, &api.settings)
        .map_err(|failure| encode::status(&failure, None))?;
    let at_once = api.settings.stream_concurrency_max.max(1);
    let (sender, running) = mpsc::channel(at_once);
    let reader = read(Arc::clone(api), request.into_inner(), opened, at_once, sender, form);
    let reader = AbortOnDropHandle::new(tokio::spawn(reader));
    Ok(Ordered { running, next: None, ended: false, _reader: reader })
}

async fn read<T: Send + 'static>(
    api: Arc<Api>,
    mut requests: Streaming<ModelInferRequest>,
    opened: CallMeta,
    at_once: usize,
    running: mpsc::Sender<Running<T>>,
    form: fn(Item) -> Result<T, Status>,
) {
    let permits = Arc::new(Semaphore::new(at_once));
    loop {
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let message = tokio::select! {
            biased;
            message = requests.message() => message,
            () = quiet_in_drain(&api) => return,
        };
        let (task, last) = match message {
            Ok(None) => return,
            Ok(Some(message)) => {
                let (api, meta) = (Arc::clone(&api), arrived(&opened));
                let task = async move { (form(answer(&api, meta, message).await), permit) };
                (tokio::spawn(task), false)
            }
            Err(status) => (tokio::spawn(async move { (Err(broken(status)), permit) }), true),
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

/// The call's metadata for a request that comes now: a deadline of the stream is one for each.
fn arrived(opened: &CallMeta) -> CallMeta {
    let mut meta = opened.clone();
    meta.received = tokio::time::Instant::now();
    meta.timeout = opened.timeout.map(|wait| wait.saturating_sub(opened.received.elapsed()));
    meta
}

/// As in `too_large` of the module above, where a stream's status does not pass.
fn broken(status: Status) -> Status {
    match status.code() {
        tonic::Code::OutOfRange => Status::resource_exhausted(status.message().to_owned()),
        _ => status,
    }
}

async fn answer(api: &Api, meta: CallMeta, message: ModelInferRequest) -> Item {
    let id = message.id.clone();
    let model = message.model_name.clone();
    let version = message.model_version.clone();
    let outcome = infer(api, meta, message).await.map(|(mut response, head)| {
        describe(&mut response, Some(&head));
        response
    });
    Item { id, model, version, outcome }
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

fn wrap(item: Item) -> Result<ModelStreamInferResponse, Status> {
    let Item { id, model, version, outcome } = item;
    Ok(match outcome {
        Ok(response) => ModelStreamInferResponse {
            error_message: String::new(),
            infer_response: Some(response),
        },
        Err(refusal) => {
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

fn wrap_strict(item: Item) -> Result<ModelStreamInferResponse, Status> {
    let response = plain(item)?;
    Ok(ModelStreamInferResponse { error_message: String::new(), infer_response: Some(response) })
}

fn plain(item: Item) -> Finished {
    item.outcome.map_err(|refusal| refusal.status())
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
