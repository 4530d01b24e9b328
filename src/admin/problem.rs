//! What a refused call is answered with: RFC 9457, and what to do about it.
//!
//! A [`Problem`] travels to the edge of the listener beside an empty response and gets its body
//! there, so that every refusal, also one of the router itself, has the same form and the request's
//! id.
//!
//! Invariants:
//! - The codes are a closed set: [`KINDS`] says each one's status, title and hint.
//! - A problem holds nothing of paths, files, stack traces or other principals.

use axum::response::IntoResponse;
use http::header::{
    ALLOW, CACHE_CONTROL, CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{HeaderValue, Response, StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::control::call::Refusal;

/// Content type of every refusal.
pub const PROBLEM_JSON: &str = "application/problem+json";

/// Before the code in `type`: names, not places to look at.
const TYPE_PREFIX: &str = "urn:tidegate:problem:";

/// Seconds after which a call that found no room may be tried again.
const RETRY_AFTER_S: u64 = 1;

/// What kinds there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kind {
    pub code: &'static str,
    pub status: StatusCode,
    pub title: &'static str,
    pub hint: &'static str,
}

const fn kind(
    code: &'static str,
    status: StatusCode,
    title: &'static str,
    hint: &'static str,
) -> Kind {
    Kind { code, status, title, hint }
}

pub const INVALID: Kind = kind(
    "invalid",
    StatusCode::BAD_REQUEST,
    "The request is not right",
    "correct what 'problems' lists and send it again; /admin/v1/openapi.json has the schema",
);
pub const NEEDS_REASON: Kind = kind(
    "needs_reason",
    StatusCode::BAD_REQUEST,
    "This change needs a reason",
    "add \"reason\" to the JSON body, or the header 'tidegate-reason'",
);
pub const UNAUTHENTICATED: Kind = kind(
    "unauthenticated",
    StatusCode::UNAUTHORIZED,
    "No valid credential",
    "send 'Authorization: Bearer <token>'; the first token is in the file 'admin-token' of the \
     gateway's state folder, others are made with 'tidegate keys create'",
);
pub const FORBIDDEN: Kind = kind(
    "forbidden",
    StatusCode::FORBIDDEN,
    "Not allowed",
    "use a key whose role allows it; docs/admin-api.md lists roles per route",
);
pub const CROSS_ORIGIN: Kind = kind(
    "cross_origin",
    StatusCode::FORBIDDEN,
    "Web pages of other origins may not call this",
    "call from a program, or from a page that this listener's own address serves",
);
pub const NOT_FOUND: Kind = kind(
    "not_found",
    StatusCode::NOT_FOUND,
    "Not found",
    "GET /admin/v1/models lists the models that this key may see",
);
pub const METHOD_NOT_ALLOWED: Kind = kind(
    "method_not_allowed",
    StatusCode::METHOD_NOT_ALLOWED,
    "Method not allowed",
    "the header 'Allow' lists the methods of this path",
);
pub const SLOW_BODY: Kind = kind(
    "slow_body",
    StatusCode::REQUEST_TIMEOUT,
    "The body did not arrive in time",
    "send it again",
);
pub const CONFLICT: Kind = kind(
    "conflict",
    StatusCode::CONFLICT,
    "It cannot be done as things stand",
    "'detail' says what is in the way; GET the resource to see how it is",
);
pub const NEEDS_APPROVAL: Kind = kind(
    "needs_approval",
    StatusCode::CONFLICT,
    "This version is not approved",
    "somebody with the right role approves it: 'tidegate approvals approve MODEL VERSION'",
);
pub const STALE: Kind = kind(
    "stale",
    StatusCode::PRECONDITION_FAILED,
    "Somebody changed it in the meantime",
    "GET the resource, decide anew, and send its present ETag in If-Match",
);
pub const TOO_LARGE: Kind = kind(
    "too_large",
    StatusCode::PAYLOAD_TOO_LARGE,
    "The body is too large",
    "docs/limits.md lists the limits of the admin API",
);
pub const URI_TOO_LONG: Kind = kind(
    "uri_too_long",
    StatusCode::URI_TOO_LONG,
    "The path is too long",
    "docs/limits.md lists the limits of the admin API",
);
pub const UNSUPPORTED_MEDIA: Kind = kind(
    "unsupported_media",
    StatusCode::UNSUPPORTED_MEDIA_TYPE,
    "The body is not declared as JSON",
    "send 'Content-Type: application/json' and no Content-Encoding",
);
pub const MISDIRECTED: Kind = kind(
    "misdirected",
    StatusCode::MISDIRECTED_REQUEST,
    "This listener is not known by that name",
    "use its address or 'localhost', or add the name to the key 'admin.hosts'",
);
pub const INTERNAL: Kind = kind(
    "internal",
    StatusCode::INTERNAL_SERVER_ERROR,
    "Internal error",
    "the gateway's log has the rest under this request id",
);
pub const LATER: Kind = kind(
    "not_implemented",
    StatusCode::NOT_IMPLEMENTED,
    "Comes with a later part",
    "this version of the gateway does not have it",
);
pub const UNAVAILABLE: Kind = kind(
    "unavailable",
    StatusCode::SERVICE_UNAVAILABLE,
    "Not possible right now",
    "try again in a moment; if it stays, the gateway's log says why",
);
pub const OVERLOADED: Kind = kind(
    "overloaded",
    StatusCode::SERVICE_UNAVAILABLE,
    "Too many calls at once",
    "try again after the seconds of the header 'Retry-After'",
);
pub const TIMEOUT: Kind = kind(
    "timeout",
    StatusCode::GATEWAY_TIMEOUT,
    "It takes longer than we wait",
    "a change goes on without you: GET the resource to see what came of it",
);

/// Every kind there is.
pub const KINDS: [Kind; 20] = [
    INVALID,
    NEEDS_REASON,
    UNAUTHENTICATED,
    FORBIDDEN,
    CROSS_ORIGIN,
    NOT_FOUND,
    METHOD_NOT_ALLOWED,
    SLOW_BODY,
    CONFLICT,
    NEEDS_APPROVAL,
    STALE,
    TOO_LARGE,
    URI_TOO_LONG,
    UNSUPPORTED_MEDIA,
    MISDIRECTED,
    INTERNAL,
    LATER,
    UNAVAILABLE,
    OVERLOADED,
    TIMEOUT,
];

impl Kind {
    /// A problem of this kind, found by the listener.
    pub fn because(self, detail: impl Into<String>) -> Problem {
        Problem { kind: self, detail: detail.into(), problems: Vec::new(), journalled: false }
    }

    /// Of a word that the director uses.
    fn of_code(code: &str) -> Self {
        KINDS.into_iter().find(|kind| kind.code == code).unwrap_or(INTERNAL)
    }

    /// Of a status that the router answered by itself.
    fn of_status(status: StatusCode) -> Self {
        KINDS.into_iter().find(|kind| kind.status == status).unwrap_or(INTERNAL)
    }
}

/// Why a call was refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub kind: Kind,
    pub detail: String,
    /// Everything that is wrong with what was sent, each with its path.
    pub problems: Vec<String>,
    /// Whether the journal has it already.
    pub journalled: bool,
}

/// Body of every refusal (RFC 9457), as `application/problem+json`.
#[derive(Clone, Debug, Serialize, Deserialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody {
    /// `urn:tidegate:problem:` and the code.
    #[serde(rename = "type")]
    pub kind: String,
    pub title: String,
    #[schema(minimum = 400, maximum = 599)]
    pub status: u16,
    /// What is wrong with this call.
    pub detail: String,
    /// Stable word to decide by.
    pub code: String,
    /// Everything that is wrong with what was sent, each with its path; often empty.
    #[serde(default)]
    pub problems: Vec<String>,
    /// What to do about it.
    pub hint: String,
    /// Also in the header `x-request-id`, in the log and in the journal.
    pub request_id: String,
}

impl Problem {
    /// Everything that is wrong with what was sent.
    pub fn invalid(problems: Vec<String>) -> Self {
        Self { detail: problems.join("; "), problems, kind: INVALID, journalled: false }
    }

    /// What the router answered without a handler; `None` for a success.
    pub fn of_status(status: StatusCode) -> Option<Self> {
        let detail = match status {
            StatusCode::NOT_FOUND => "there is no such path",
            StatusCode::METHOD_NOT_ALLOWED => "this path has other methods",
            _ => "the request was refused",
        };
        (status.is_client_error() || status.is_server_error())
            .then(|| Kind::of_status(status).because(detail))
    }

    fn body(&self, request_id: &str) -> ProblemBody {
        ProblemBody {
            kind: format!("{TYPE_PREFIX}{}", self.kind.code),
            title: self.kind.title.to_owned(),
            status: self.kind.status.as_u16(),
            detail: self.detail.clone(),
            code: self.kind.code.to_owned(),
            problems: self.problems.clone(),
            hint: self.kind.hint.to_owned(),
            request_id: request_id.to_owned(),
        }
    }

    /// The whole response; `bare` is the one that was to go out, whose `Allow` stays.
    pub fn respond(
        &self,
        request_id: &str,
        bare: &Response<axum::body::Body>,
    ) -> Response<axum::body::Body> {
        // Strings and numbers: it cannot fail.
        let json = serde_json::to_vec(&self.body(request_id)).unwrap_or_default();
        let mut answer = Response::new(axum::body::Body::from(json));
        *answer.status_mut() = self.kind.status;
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(PROBLEM_JSON));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(allow) = bare.headers().get(ALLOW) {
            headers.insert(ALLOW, allow.clone());
        }
        if self.kind.status == StatusCode::UNAUTHORIZED {
            let challenge = HeaderValue::from_static("Bearer realm=\"tidegate admin\"");
            headers.insert(WWW_AUTHENTICATE, challenge);
        }
        if self.kind.status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(RETRY_AFTER, HeaderValue::from(RETRY_AFTER_S));
        }
        headers.remove(CONTENT_LENGTH);
        answer
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Self {
        let kind = Kind::of_code(refusal.code());
        let detail = match &refusal {
            // The log has it; the caller gets the request id.
            Refusal::Internal(error) => {
                tracing::error!(%error, "an admin call failed");
                "the gateway failed at this".to_owned()
            }
            told => told.to_string(),
        };
        let problems = match refusal {
            Refusal::Invalid(problems) => problems,
            _ => Vec::new(),
        };
        Self { kind, detail, problems, journalled: true }
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> axum::response::Response {
        let mut answer = Response::new(axum::body::Body::empty());
        *answer.status_mut() = self.kind.status;
        answer.extensions_mut().insert(self);
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_code_is_one_kind_and_each_refusal_has_one() {
        for (at, kind) in KINDS.iter().enumerate() {
            assert!(KINDS[at + 1..].iter().all(|other| other.code != kind.code), "{}", kind.code);
            assert!(!kind.hint.is_empty() && !kind.title.ends_with('.'), "{}", kind.code);
        }
        let text = || "why".to_owned();
        let refusals = [
            Refusal::NotFound(text()),
            Refusal::Invalid(vec![text()]),
            Refusal::Conflict(text()),
            Refusal::Stale { expected: text(), current: text() },
            Refusal::NeedsReason,
            Refusal::NeedsApproval { version: text(), digest: text(), have: 0, need: 1 },
            Refusal::Forbidden(text()),
            Refusal::Unavailable(text()),
            Refusal::Internal("/secret/path".to_owned()),
        ];
        for refusal in refusals {
            let (code, status) = (refusal.code(), refusal.status());
            let problem = Problem::from(refusal);
            assert_eq!((problem.kind.code, problem.kind.status.as_u16()), (code, status));
            assert!(problem.journalled && !problem.detail.contains("/secret"), "{problem:?}");
        }
    }

    #[test]
    fn the_router_s_own_refusals_become_problems() {
        let code = |status| Problem::of_status(status).map(|problem| problem.kind.code);
        assert_eq!(code(StatusCode::OK), None);
        assert_eq!(code(StatusCode::NOT_MODIFIED), None);
        assert_eq!(code(StatusCode::NOT_FOUND), Some("not_found"));
        assert_eq!(code(StatusCode::METHOD_NOT_ALLOWED), Some("method_not_allowed"));
        assert_eq!(code(StatusCode::IM_A_TEAPOT), Some("internal"));
    }
}
