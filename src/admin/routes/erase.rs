//! What changes the ledger: erasures, and the key that signs it. Both are recorded in it.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::json;
use crate::admin::asked::{Asked, Change, Reason};
use crate::admin::problem::{
    CONFLICT, INTERNAL, LATER, NEEDS_REASON, NOT_FOUND, Problem, UNAVAILABLE,
};
use crate::admin::{Admin, Audit};
use crate::ledger::Ledger;
use crate::ledger::erase::{EraseError, Erased, Wanted, Why};
use crate::ledger::proofs::RotateError;

/// Most ids of one call, and the longest subject.
const IDS_MAX: usize = 1000;
const SUBJECT_BYTES_MAX: usize = 1024;

/// Whose payloads are to go.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Erase {
    /// Ids of predictions; with each goes what was recorded of its shadows and its feedback.
    #[serde(default)]
    #[schema(max_items = 1000, value_type = Vec<Uuid>)]
    ids: Vec<String>,
    /// Everything that is recorded about this subject, and the key that it was encrypted with.
    #[schema(max_length = 1024)]
    subject: Option<String>,
}

type EraseChange = Change<Erase>;

/// What came of it.
#[derive(Serialize, ToSchema)]
pub(super) struct ErasedView {
    /// Records whose payload is gone, or goes.
    #[schema(minimum = 0)]
    records: u64,
    /// The subject had a key; it is destroyed.
    key_destroyed: bool,
    /// Records that cannot be read, and may hold such a payload.
    #[schema(minimum = 0)]
    unreadable: u64,
    /// All is done. If not, it is recorded, and done in a while.
    done: bool,
}

/// Who signs from now on.
#[derive(Serialize, ToSchema)]
pub(super) struct KeysView {
    /// Verifier keys, one for each log.
    keys: Vec<String>,
}

/// Erase what records hold. The records stay, and so do their proofs; that they were erased, by whom
/// and why, is recorded first. Takes a reason.
#[utoipa::path(post, path = "/audit:erase", operation_id = "audit.erase", tag = "audit",
    request_body(content = EraseChange),
    responses(
        (status = 200, description = "What was erased.", body = ErasedView),
        (status = 404, description = "No record here has such a payload.",
            body = crate::admin::problem::ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn erase(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: EraseChange,
) -> Result<Response, Problem> {
    let ledger = ledger(&admin)?;
    let call = asked.plain_call(change.reason);
    let Some(reason) = call.reason.clone() else {
        return Err(NEEDS_REASON.because("an erasure takes a reason"));
    };
    let Erase { ids, subject } = change.what;
    let mut problems = Vec::new();
    let mut parsed = Vec::new();
    for (at, id) in ids.iter().take(IDS_MAX).enumerate() {
        match id.parse::<Uuid>() {
            Ok(id) => parsed.push(id),
            Err(_) => problems.push(format!("ids[{at}]: expected a UUID")),
        }
    }
    if ids.is_empty() && subject.is_none() {
        problems.push("expected 'ids' or 'subject'".to_owned());
    }
    if ids.len() > IDS_MAX {
        problems.push(format!("ids: expected at most {IDS_MAX}, got {}", ids.len()));
    }
    if subject.as_ref().is_some_and(|subject| subject.len() > SUBJECT_BYTES_MAX) {
        problems.push(format!("subject: expected at most {SUBJECT_BYTES_MAX} bytes"));
    }
    if !problems.is_empty() {
        return Err(Problem::invalid(problems));
    }
    // Never whom it is about: the journal stays.
    let about = match (&subject, &ids[..]) {
        (Some(_), _) => "a subject".to_owned(),
        (None, [id]) => id.clone(),
        (None, ids) => format!("{} predictions", ids.len()),
    };
    let tag = subject.and_then(|subject| Some(ledger.subject_keys()?.tag(subject.as_bytes())));
    let wanted = Wanted { ids: parsed, subject: tag };
    let why = Why { by: call.actor.clone(), reason };
    let erased = apart(move || ledger.erase(&wanted, &why)).await?.map_err(problem)?;
    admin.desk.noted("audit.erase", None, &about, &call).await?;
    let Erased { records, key_destroyed, unreadable, done } = erased;
    Ok(json(StatusCode::OK, &ErasedView { records, key_destroyed, unreadable, done }))
}

/// Make a new key that checkpoints are signed with. The last checkpoint of the old one names it.
#[utoipa::path(post, path = "/audit:rotateKey", operation_id = "audit.rotateKey", tag = "audit",
    request_body(content = Reason, description = "May be empty."),
    responses((status = 200, description = "Who signs from now on.", body = KeysView)))]
pub(super) async fn rotate_key(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: Reason,
) -> Result<Response, Problem> {
    let ledger = ledger(&admin)?;
    let call = asked.plain_call(change.reason);
    let keys = apart(move || ledger.rotate_key()).await?.map_err(|error| match error {
        RotateError::Keys(crate::ledger::keys::KeysError::Rotating) => {
            CONFLICT.because(error.to_string())
        }
        error => UNAVAILABLE.because(error.to_string()),
    })?;
    admin.desk.noted("audit.rotateKey", None, "ledger", &call).await?;
    Ok(json(StatusCode::OK, &KeysView { keys }))
}

pub(super) fn ledger(admin: &Admin) -> Result<Arc<Ledger>, Problem> {
    match &admin.audit {
        Some(Audit { ledger, .. }) => Ok(Arc::clone(ledger)),
        None => Err(LATER.because("this gateway has no ledger")),
    }
}

/// On a thread of its own: it reads files and waits for the disk.
pub(super) async fn apart<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Problem> {
    let (done, answer) = tokio::sync::oneshot::channel();
    let thread = std::thread::Builder::new().name("audit".to_owned()).spawn(move || {
        // A caller that is gone gets no answer.
        drop(done.send(work()));
    });
    let failed = || INTERNAL.because("the gateway failed at this");
    thread.map_err(|_| failed())?;
    answer.await.map_err(|_| failed())
}

fn problem(error: EraseError) -> Problem {
    match &error {
        EraseError::Nothing { .. } => NOT_FOUND.because(error.to_string()),
        EraseError::Unrecorded(_) | EraseError::Unsynced => UNAVAILABLE.because(error.to_string()),
        EraseError::Read(_) | EraseError::Io { .. } => {
            tracing::error!(%error, "an erasure failed");
            INTERNAL.because("the ledger cannot be read or written; the log says more")
        }
    }
}
