//! One prediction by its id, as the ledger has it.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::StatusCode;
use tokio::sync::Semaphore;
use uuid::Uuid;

use super::erase::{apart, ledger};
use super::json_bytes;
use crate::admin::Admin;
use crate::admin::asked::Asked;
use crate::admin::limits::{LOOKUPS_MAX, PATH_TEXT_MAX};
use crate::admin::problem::{INTERNAL, NOT_FOUND, OVERLOADED, Problem};
use crate::admit::Action;
use crate::domain::ModelName;
use crate::ledger::PREDICTIONS;
use crate::ledger::export::{ExportError, Selection, line, scan_file, segments};
use crate::ledger::record::Kind;

/// Each reads a segment or two from the disk.
static LOOKUPS: Semaphore = Semaphore::const_new(LOOKUPS_MAX);

/// A record, and the model that it is of.
struct Found {
    line: Vec<u8>,
    model: Option<ModelName>,
}

/// One prediction: everything that is recorded of it, as `tidegate audit export` writes it. That it
/// was read is journalled.
#[utoipa::path(get, path = "/predictions/{id}", operation_id = "prediction.get", tag = "audit",
    responses((status = 200, description = "The record.", body = serde_json::Value)))]
pub(super) async fn get(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    let ledger = ledger(&admin)?;
    let text = asked.names.prediction.clone().unwrap_or_default();
    let missing = || {
        let shown: String = text.chars().take(PATH_TEXT_MAX).collect();
        NOT_FOUND.because(format!("prediction '{shown}' is not found"))
    };
    // Only ids of this kind say when they were made: of others everything would have to be read.
    let id = text.parse::<Uuid>().ok().filter(|id| id.get_timestamp().is_some());
    let id = id.ok_or_else(missing)?;
    let busy = || OVERLOADED.because("other predictions are being looked for");
    let _one_of_few = LOOKUPS.try_acquire().map_err(|_| busy())?;
    let log = ledger.settings().dir.join(PREDICTIONS);
    let found = apart(move || find(&log, id)).await?.map_err(|error| {
        tracing::error!(%error, "a prediction cannot be looked for");
        INTERNAL.because("the ledger cannot be read; the log says more")
    })?;
    let found = found.ok_or_else(missing)?;
    // As if there was none.
    if !asked.caller.may(Action::ReadPredictions, found.model.as_ref()) {
        return Err(missing());
    }
    let call = asked.plain_call(None);
    admin.desk.noted("prediction.read", found.model.as_ref(), &id.to_string(), &call).await?;
    Ok(json_bytes(StatusCode::OK, found.line))
}

/// Reads the segments that were written when the id says, or up to a day later.
fn find(log: &Path, id: Uuid) -> Result<Option<Found>, ExportError> {
    let (wanted, mut found) = (Selection::of(id), None);
    for segment in segments(log, &wanted)? {
        scan_file::<ExportError>(&segment, &wanted, |head, view| {
            // Others, of erasures, are about it.
            if view.kind != Kind::Prediction as u64 {
                return Ok(ControlFlow::Continue(()));
            }
            let mut text = Vec::new();
            line(&mut text, &head.writer.to_string(), view);
            found = Some(Found { line: text, model: view.model.parse().ok() });
            Ok(ControlFlow::Break(()))
        })?;
        if found.is_some() {
            break;
        }
    }
    Ok(found)
}
