//! Answers before they become HTTP messages.

use http::header::{ALLOW, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, Response, StatusCode};

use super::pieces::Pieces;
use crate::domain::{AnswerHead, ErrorKind, Failure};
use crate::transport::{Body, meta, status};

/// Length of the JSON part of a body with raw tensors behind it.
pub(super) const JSON_LENGTH: HeaderName =
    HeaderName::from_static("inference-header-content-length");
/// Headers of a prediction's answer, so that their map need not grow.
const HEADERS_USUAL: usize = 8;

/// One answer.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Pieces,
}

impl Reply {
    pub(super) fn empty(status: StatusCode) -> Self {
        let headers = HeaderMap::with_capacity(HEADERS_USUAL);
        Self { status, headers, body: Pieces::default() }
    }

    /// JSON; the content type without a charset, which some clients compare exactly.
    pub(super) fn json(status: StatusCode, body: impl Into<Pieces>) -> Self {
        let mut reply = Self::empty(status);
        reply.body = body.into();
        reply.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        reply
    }

    pub(super) fn value(value: &serde_json::Value) -> Self {
        Self::json(StatusCode::OK, value.to_string())
    }

    /// JSON of `json_len` bytes and raw tensors behind.
    pub(super) fn binary(json_len: usize, body: Pieces) -> Self {
        let mut reply = Self::empty(StatusCode::OK);
        reply.body = body;
        reply.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        reply.headers.insert(JSON_LENGTH, HeaderValue::from(json_len));
        reply
    }

    pub(super) fn failure(failure: &Failure) -> Self {
        let (status, _) = status::status(failure.kind);
        let body = serde_json::json!({"error": failure.message, "code": failure.kind.code()});
        let mut reply = Self::json(status, body.to_string());
        if failure.kind == ErrorKind::Unauthenticated {
            reply.headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if let Some(wait) = failure.retry_after {
            // Whole seconds, rounded up: sooner would be too soon.
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            reply.headers.insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        reply
    }

    /// For a known path and another verb.
    pub(super) fn allow(mut self, verbs: &'static str) -> Self {
        self.headers.insert(ALLOW, HeaderValue::from_static(verbs));
        self
    }

    /// With what every answer to a prediction carries.
    pub(super) fn head(mut self, head: &AnswerHead) -> Self {
        meta::answer_headers(head, &mut self.headers);
        self
    }

    pub(super) fn into_response(self) -> Response<Body> {
        let mut response = Response::new(Body::new(self.body));
        *response.status_mut() = self.status;
        *response.headers_mut() = self.headers;
        response
    }
}

impl From<Failure> for Reply {
    fn from(failure: Failure) -> Self {
        Self::failure(&failure)
    }
}
