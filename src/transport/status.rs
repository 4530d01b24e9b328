//! The only place that knows both protocols' codes.

use http::StatusCode;
use tonic::Code;

use crate::domain::ErrorKind;

/// What a kind of failure is over HTTP and gRPC.
///
/// Triton's table, with quota apart from capacity and deadlines as gateways answer them.
pub fn status(kind: ErrorKind) -> (StatusCode, Code) {
    use ErrorKind as Kind;
    match kind {
        Kind::InvalidInput => (StatusCode::BAD_REQUEST, Code::InvalidArgument),
        Kind::Unauthenticated => (StatusCode::UNAUTHORIZED, Code::Unauthenticated),
        Kind::Forbidden => (StatusCode::FORBIDDEN, Code::PermissionDenied),
        Kind::NotFound => (StatusCode::NOT_FOUND, Code::NotFound),
        Kind::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, Code::Unimplemented),
        Kind::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, Code::ResourceExhausted),
        Kind::UnsupportedMedia => (StatusCode::UNSUPPORTED_MEDIA_TYPE, Code::InvalidArgument),
        Kind::RateLimited => (StatusCode::TOO_MANY_REQUESTS, Code::ResourceExhausted),
        Kind::Unavailable | Kind::Overloaded => {
            (StatusCode::SERVICE_UNAVAILABLE, Code::Unavailable)
        }
        Kind::DeadlineExceeded => (StatusCode::GATEWAY_TIMEOUT, Code::DeadlineExceeded),
        // Nobody is there to read it; 499 is what proxies log for it.
        Kind::Cancelled => (StatusCode::BAD_REQUEST, Code::Cancelled),
        Kind::Unsupported => (StatusCode::NOT_IMPLEMENTED, Code::Unimplemented),
        Kind::ModelFailed | Kind::Internal => (StatusCode::INTERNAL_SERVER_ERROR, Code::Internal),
    }
}
