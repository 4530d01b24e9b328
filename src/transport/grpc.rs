//! gRPC: the Open Inference Protocol with Triton's extensions, feedback, health and reflection.
//!
//! ```text
//! call ──admit, path──▶ service (one call)  ──decode──▶ gateway ──encode──▶ answer
//!               │         └▶ stream (many)  ──┘
//!               ├─────▶ feedback, health, reflection
//!               └─────▶ UNIMPLEMENTED
//! ```

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http::{HeaderValue, header::HeaderName};
use tokio::time::Instant;
use tonic::codec::CompressionEncoding;
use tonic::{Code, Status};
use tonic_health::pb::health_server::HealthServer;
use tower_service::Service as _;

use super::auth::Caller;
use super::intake::Held;
use super::meta::Arrived;
use super::{Api, Body, CONTROL_BYTES_MAX};
use crate::domain::{ErrorKind, Protocol};
use crate::proto::DESCRIPTORS;
use crate::proto::feedback::feedback_server::FeedbackServer;
use crate::proto::inference::grpc_inference_service_server::GrpcInferenceServiceServer;
use frames::{Bill, Frames, Limits};

mod codec;
mod contents;
mod decode;
mod encode;
mod feedback;
mod frames;
mod health;
mod service;
mod stream;
mod wire;

pub use decode::{Decoded, Slice, decode};

/// Largest message that clients take.
const MESSAGE_BYTES_MAX: usize = (1 << 31) - 1;
/// Longest wait for a thread to decode a message on.
const DECODE_WAIT_MAX: Duration = Duration::from_secs(60);
const SERVICE: &str = "inference.GRPCInferenceService";
const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const STREAM_INFER: &str = "/inference.GRPCInferenceService/ModelStreamInfer";

const ACCEPT_ENCODING: HeaderName = HeaderName::from_static("grpc-accept-encoding");
const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");

type Answering = Pin<Box<dyn Future<Output = http::Response<Body>> + Send>>;
type Route = Arc<dyn Fn(http::Request<Body>) -> Answering + Send + Sync>;

/// Every gRPC service on one listener.
#[derive(Clone)]
pub struct Grpc {
    api: Arc<Api>,
    inference: GrpcInferenceServiceServer<service::Service>,
    feedback: FeedbackServer<feedback::Service>,
    health: HealthServer<health::Watched>,
    reflection: Route,
    reflection_alpha: Route,
}

impl Grpc {
    pub fn new(api: Arc<Api>) -> Self {
        let inference = GrpcInferenceServiceServer::new(service::Service::new(Arc::clone(&api)))
            .max_decoding_message_size(api.settings.body_max_bytes)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
            .accept_compressed(CompressionEncoding::Gzip)
            .accept_compressed(CompressionEncoding::Deflate)
            .send_compressed(CompressionEncoding::Gzip)
            .send_compressed(CompressionEncoding::Deflate);
        let feedback = FeedbackServer::new(feedback::Service::new(Arc::clone(&api)))
            .max_decoding_message_size(api.settings.body_max_bytes);
        let health = HealthServer::new(health::Watched::new(Arc::clone(&api)));
        let described = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        let reflection = described().build_v1().expect("the build wrote these descriptors");
        let alpha = described().build_v1alpha().expect("the build wrote these descriptors");
        let (reflection, reflection_alpha) = (route(reflection), route(alpha));
        Self { api, inference, feedback, health, reflection, reflection_alpha }
    }

    /// Whether the call at `path` takes a stream of messages, which may pause between two.
    pub(super) fn takes_a_stream(path: &str) -> bool {
        path == STREAM_INFER || path.starts_with("/grpc.reflection.")
    }

    /// Answers one call; never fails, whatever it is given.
    pub async fn call<B>(&self, request: http::Request<B>) -> http::Response<Body>
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + Unpin + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let mut request = request;
        // Many clients accept compression always and want it never: only who compresses gets it.
        if request.headers().get(ENCODING).is_none_or(|encoding| encoding == "identity") {
            request.headers_mut().remove(ACCEPT_ENCODING);
        }
        let arrived = Instant::now();
        let caller = match self.admit(request.uri().path(), request.headers()) {
            Ok(caller) => caller,
            Err(refused) => return *refused,
        };
        request.extensions_mut().insert(caller);
        request.extensions_mut().insert(Arrived(arrived));
        let bill = Bill::new(&self.api);
        request.extensions_mut().insert(Arc::clone(&bill));
        let encoding = frames::encoding(request.headers());
        if encoding.is_some() {
            // The codec sees plain messages only.
            request.headers_mut().remove(ENCODING);
        }
        let path = request.uri().path().to_owned();
        let limits = self.limits(&path);
        let deadline = arrived + DECODE_WAIT_MAX;
        let request =
            request.map(|body| Frames::new(body, Arc::clone(&bill), encoding, limits, deadline));
        let mut response = match path.strip_prefix('/').and_then(|path| path.split_once('/')) {
            Some((SERVICE, _)) if path == INFER => {
                let response = service::unary(&self.api, request).await;
                self.count_unread(&bill, response.headers());
                response
            }
            Some((SERVICE, _)) if path == STREAM_INFER => stream::answer(&self.api, request).await,
            Some((SERVICE, _)) => infallible(self.inference.clone().call(request).await),
            Some(("tidegate.v1.Feedback", _)) => {
                infallible(self.feedback.clone().call(request).await)
            }
            Some(("grpc.health.v1.Health", _)) => {
                infallible(self.health.clone().call(request).await)
            }
            Some(("grpc.reflection.v1.ServerReflection", _)) => {
                (self.reflection)(request.map(Body::new)).await
            }
            Some(("grpc.reflection.v1alpha.ServerReflection", _)) => {
                (self.reflection_alpha)(request.map(Body::new)).await
            }
            _ => Status::unimplemented("unknown service").into_http(),
        };
        too_large(response.headers_mut());
        response
    }

    /// Lets a call in, before its path means anything.
    fn admit(
        &self,
        path: &str,
        metadata: &http::HeaderMap,
    ) -> Result<Caller, Box<http::Response<Body>>> {
        let protocol = match path {
            STREAM_INFER => Protocol::GrpcStream,
            _ => Protocol::Grpc,
        };
        self.api.settings.auth.admit(protocol, path, metadata).map_err(|error| {
            self.api.gateway.observer().refused(protocol, ErrorKind::Unauthenticated);
            Box::new(encode::status(&error.into(), None).into_http())
        })
    }

    fn limits(&self, path: &str) -> Limits {
        let settings = &self.api.settings;
        // Predictions bring tensors, and a load may bring a model.
        let large = [INFER, STREAM_INFER].contains(&path) || settings.model_control;
        let message_bytes =
            settings.body_max_bytes.min(if large { usize::MAX } else { CONTROL_BYTES_MAX });
        let one = path != STREAM_INFER && !path.starts_with("/grpc.reflection.");
        Limits { one, message_bytes }
    }

    /// A prediction whose message never arrived whole is counted all the same.
    fn count_unread(&self, bill: &Bill, headers: &http::HeaderMap) {
        if !bill.is_read() {
            let code = headers
                .get("grpc-status")
                .map_or(Code::Unknown, |code| Code::from_bytes(code.as_bytes()));
            self.api.gateway.observer().refused(Protocol::Grpc, kind_of(code));
        }
    }
}

/// The failure that a status of the codec stands for.
fn kind_of(code: Code) -> ErrorKind {
    match code {
        Code::ResourceExhausted | Code::OutOfRange => ErrorKind::TooLarge,
        Code::Unavailable => ErrorKind::Overloaded,
        Code::Unimplemented => ErrorKind::UnsupportedMedia,
        Code::Cancelled => ErrorKind::Cancelled,
        Code::DeadlineExceeded => ErrorKind::DeadlineExceeded,
        _ => ErrorKind::InvalidInput,
    }
}

/// What the calls that bring tensors are served by.
fn server<T: prost::Message + Send + 'static>(
    settings: &super::Settings,
) -> tonic::server::Grpc<codec::Unread<T>> {
    tonic::server::Grpc::new(codec::Unread::default())
        .max_decoding_message_size(settings.body_max_bytes)
        .max_encoding_message_size(MESSAGE_BYTES_MAX)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate)
        .send_compressed(CompressionEncoding::Gzip)
        .send_compressed(CompressionEncoding::Deflate)
}

/// When the call came; what tonic hands over has its message read already.
fn arrived<T>(request: &tonic::Request<T>) -> Arrived {
    let arrived = request.extensions().get::<Arrived>().copied();
    arrived.unwrap_or_else(|| Arrived(Instant::now()))
}

/// Whose call it is; nobody's, who may do nothing, if that was lost on the way.
fn caller<T>(request: &tonic::Request<T>) -> Caller {
    request.extensions().get::<Caller>().cloned().unwrap_or_else(Caller::nobody)
}

/// The account of a message that has arrived.
fn held<T>(request: &tonic::Request<T>, api: &Api) -> Arc<Held> {
    let bill = request.extensions().get::<Arc<Bill>>();
    bill.map_or_else(|| api.intake.open(), |bill| bill.take())
}

/// The codec calls a message over the limit OUT_OF_RANGE; nothing else here does.
fn too_large(headers: &mut http::HeaderMap) {
    const OUT_OF_RANGE: &str = "11";
    const RESOURCE_EXHAUSTED: HeaderValue = HeaderValue::from_static("8");
    if let Some(status) = headers.get_mut("grpc-status")
        && status == OUT_OF_RANGE
    {
        *status = RESOURCE_EXHAUSTED;
    }
}

/// A service whose type has no name.
fn route<S>(service: S) -> Route
where
    S: tower_service::Service<
            http::Request<Body>,
            Response = http::Response<Body>,
            Error = Infallible,
        > + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    Arc::new(move |request| {
        let answering = service.clone().call(request);
        Box::pin(async move { infallible(answering.await) })
    })
}

fn infallible<T>(result: Result<T, Infallible>) -> T {
    let Ok(value) = result;
    value
}
