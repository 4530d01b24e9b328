//! The closed set of ways a request can fail.

use std::time::Duration;

/// Every failure is one of these; `transport::status` says what each is over HTTP and gRPC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ErrorKind {
    InvalidInput,
    Unauthenticated,
    Forbidden,
    NotFound,
    MethodNotAllowed,
    TooLarge,
    UnsupportedMedia,
    /// This caller asks too much: slow down.
    RateLimited,
    /// The model or server is not ready.
    Unavailable,
    /// No capacity for anyone: go elsewhere.
    Overloaded,
    DeadlineExceeded,
    /// The caller went away.
    Cancelled,
    Unsupported,
    /// The model failed on this input.
    ModelFailed,
    Internal,
}

impl ErrorKind {
    pub const ALL: [Self; 15] = [
        Self::InvalidInput,
        Self::Unauthenticated,
        Self::Forbidden,
        Self::NotFound,
        Self::MethodNotAllowed,
        Self::TooLarge,
        Self::UnsupportedMedia,
        Self::RateLimited,
        Self::Unavailable,
        Self::Overloaded,
        Self::DeadlineExceeded,
        Self::Cancelled,
        Self::Unsupported,
        Self::ModelFailed,
        Self::Internal,
    ];

    /// Stable word for error bodies, metric labels and the ledger's `status`.
    pub fn code(self) -> &'static str {
        match self {
            Self::InvalidInput => "invalid_input",
            Self::Unauthenticated => "unauthenticated",
            Self::Forbidden => "forbidden",
            Self::NotFound => "not_found",
            Self::MethodNotAllowed => "method_not_allowed",
            Self::TooLarge => "too_large",
            Self::UnsupportedMedia => "unsupported_media",
            Self::RateLimited => "rate_limited",
            Self::Unavailable => "unavailable",
            Self::Overloaded => "overloaded",
            Self::DeadlineExceeded => "deadline",
            Self::Cancelled => "cancelled",
            Self::Unsupported => "unsupported",
            Self::ModelFailed => "model_failed",
            Self::Internal => "internal",
        }
    }
}

/// A failure as the caller sees it: a kind and a text the caller can act on.
///
/// The text never holds paths, stack traces or another caller's data; those go to the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    pub kind: ErrorKind,
    pub message: String,
    /// When trying again may help.
    pub retry_after: Option<Duration>,
}

impl Failure {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into(), retry_after: None }
    }

    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::InvalidInput, message)
    }

    pub fn not_found(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::NotFound, message)
    }

    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }
}
