//! What every change is asked with, and the closed set of ways in which it is refused.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::domain::{ErrorKind, Failure};

/// Longest reason of a change, in bytes.
pub const REASON_LEN_MAX: usize = 2000;

/// Who asks for a change, and why.
#[derive(Clone, Debug, Default)]
pub struct Call {
    /// A principal's name, or one of our own: `rollout-controller`, `registry-watcher`, `start`.
    pub actor: String,
    pub reason: Option<String>,
    /// The `ETag` that the resource must still have; `None`: whatever it has.
    pub if_match: Option<String>,
    pub request_id: Option<String>,
}

impl Call {
    /// A change that the gateway makes by itself.
    pub fn own(actor: &str, reason: impl Into<String>) -> Self {
        Self { actor: actor.to_owned(), reason: Some(reason.into()), ..Self::default() }
    }
}

/// A resource and the tag of its present revision.
#[derive(Clone, Debug)]
pub struct Versioned<T> {
    pub value: T,
    /// As in the `ETag` header, with its quotes.
    pub etag: String,
}

/// Why a change was not made. Nothing was changed, and the journal says so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("{0}")]
    NotFound(String),
    /// Every problem of what was sent, each with its path.
    #[error("{}", .0.join("; "))]
    Invalid(Vec<String>),
    /// It cannot be done as things stand.
    #[error("{0}")]
    Conflict(String),
    #[error("the resource is at {current} now, not at {expected}: read it again and decide anew")]
    Stale { expected: String, current: String },
    #[error("say why: this change needs a 'reason' of 1 to {REASON_LEN_MAX} bytes")]
    NeedsReason,
    #[error(
        "version {version} has {have} of {need} approvals for {digest}: somebody other than its \
         submitter has to approve it"
    )]
    NeedsApproval { version: String, digest: String, have: usize, need: usize },
    #[error("{0}")]
    Forbidden(String),
    #[error("{0}")]
    Unavailable(String),
    /// The log has the rest.
    #[error("internal error: {0}")]
    Internal(String),
}

impl Refusal {
    /// Stable word for problem bodies and the journal.
    pub fn code(&self) -> &'static str {
        match self {
            Self::NotFound(_) => "not_found",
            Self::Invalid(_) => "invalid",
            Self::Conflict(_) => "conflict",
            Self::Stale { .. } => "stale",
            Self::NeedsReason => "needs_reason",
            Self::NeedsApproval { .. } => "needs_approval",
            Self::Forbidden(_) => "forbidden",
            Self::Unavailable(_) => "unavailable",
            Self::Internal(_) => "internal",
        }
    }

    /// HTTP status.
    pub fn status(&self) -> u16 {
        match self {
            Self::NotFound(_) => 404,
            Self::Invalid(_) | Self::NeedsReason => 400,
            Self::Conflict(_) | Self::NeedsApproval { .. } => 409,
            Self::Stale { .. } => 412,
            Self::Forbidden(_) => 403,
            Self::Unavailable(_) => 503,
            Self::Internal(_) => 500,
        }
    }
}

impl From<Failure> for Refusal {
    fn from(failure: Failure) -> Self {
        match failure.kind {
            ErrorKind::NotFound => Self::NotFound(failure.message),
            ErrorKind::InvalidInput => Self::Conflict(failure.message),
            ErrorKind::Unavailable | ErrorKind::Overloaded => Self::Unavailable(failure.message),
            _ => Self::Internal(failure.message),
        }
    }
}

/// One check that a version passed or not, before it could take traffic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, serde::Deserialize, utoipa::ToSchema)]
pub struct Check {
    /// `digest`, `signature`, `loads`, `io_signature`, `samples`, `warm_up`, `approval`, …
    pub name: String,
    pub outcome: CheckOutcome,
    pub detail: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, serde::Deserialize, utoipa::ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckOutcome {
    Pass,
    Warn,
    Fail,
}

/// Named values beside a resource.
pub type Tags = BTreeMap<String, String>;
