//! REST: the Open Inference Protocol, KServe v1, MLflow and SageMaker.

use std::sync::Arc;

use super::{Api, Body};

/// Answers one request; never fails, whatever it is given.
pub async fn handle<B>(_api: Arc<Api>, _request: http::Request<B>) -> http::Response<Body>
where
    B: http_body::Body<Data = bytes::Bytes> + Send + Unpin + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    http::Response::new(Body::empty())
}
