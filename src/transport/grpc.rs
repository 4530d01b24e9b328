//! gRPC: the Open Inference Protocol with Triton's extensions, health and reflection.

use std::sync::Arc;

use super::{Api, Body};

/// Every gRPC service on one listener.
#[derive(Clone)]
pub struct Grpc {
    _api: Arc<Api>,
}

impl Grpc {
    pub fn new(api: Arc<Api>) -> Self {
        Self { _api: api }
    }

    /// Answers one call; never fails, whatever it is given.
    pub async fn call<B>(&self, _request: http::Request<B>) -> http::Response<Body>
    where
        B: http_body::Body<Data = bytes::Bytes> + Send + 'static,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        http::Response::new(Body::empty())
    }
}
