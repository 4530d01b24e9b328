//! Legal holds: records that must not go, whatever their retention says.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::erase::{apart, ledger};
use super::json;
use crate::admin::Admin;
use crate::admin::asked::{Asked, Change};
use crate::admin::problem::{
    CONFLICT, INTERNAL, INVALID, NEEDS_REASON, NOT_FOUND, Problem, UNAVAILABLE,
};
use crate::domain::ModelName;
use crate::ledger::export::time;
use crate::ledger::retention::{Hold, HoldError};
use crate::ledger::upkeep::HoldingError;

/// What is held.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct HoldBody {
    /// Records of this model; of all without it.
    model: Option<String>,
    /// Those that arrived then or later: RFC 3339.
    since: Option<String>,
    /// Those that arrived before that.
    until: Option<String>,
}

type HoldChange = Change<HoldBody>;

/// All holds.
#[derive(Serialize, ToSchema)]
pub(super) struct HoldsView {
    holds: Vec<HoldView>,
}

#[derive(Serialize, ToSchema)]
pub(super) struct HoldView {
    name: String,
    model: Option<String>,
    since: Option<String>,
    until: Option<String>,
    reason: String,
    /// Who put it.
    by: String,
    put_at: String,
}

impl From<Hold> for HoldView {
    fn from(hold: Hold) -> Self {
        let Hold { name, model, since_ns, until_ns, reason, by, put_ns } = hold;
        let (since, until, put_at) = (since_ns.map(time), until_ns.map(time), time(put_ns));
        Self { name, model, since, until, reason, by, put_at }
    }
}

/// Every hold that is in force.
#[utoipa::path(get, path = "/audit/holds", operation_id = "hold.list", tag = "audit",
    responses((status = 200, description = "The holds.", body = HoldsView)))]
pub(super) async fn list(State(admin): State<Arc<Admin>>, _: Asked) -> Result<Response, Problem> {
    let holds = ledger(&admin)?.holds().into_iter().map(HoldView::from).collect();
    Ok(json(StatusCode::OK, &HoldsView { holds }))
}

/// Hold records: none of them goes until the hold is lifted. Takes a reason; is recorded.
#[utoipa::path(put, path = "/audit/holds/{hold}", operation_id = "hold.put", tag = "audit",
    request_body(content = HoldChange),
    responses((status = 200, description = "It holds.", body = HoldView)))]
pub(super) async fn put(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: HoldChange,
) -> Result<Response, Problem> {
    let ledger = ledger(&admin)?;
    let call = asked.plain_call(change.reason);
    let Some(reason) = call.reason.clone() else {
        return Err(NEEDS_REASON.because("a hold takes a reason"));
    };
    let HoldBody { model, since, until } = change.what;
    let mut problems = Vec::new();
    let named = model.as_ref().map(|model| model.parse::<ModelName>()).transpose();
    let named = named.unwrap_or_else(|error| {
        problems.push(format!("model: {error}"));
        None
    });
    let mut moment = |name: &str, text: Option<String>| {
        let text = text?;
        let at = text.parse::<jiff::Timestamp>().ok();
        let at = at.and_then(|at| i64::try_from(at.as_nanosecond()).ok());
        if at.is_none() {
            problems.push(format!("{name}: expected a time like 2026-11-25T10:00:00Z"));
        }
        at
    };
    let (since_ns, until_ns) = (moment("since", since), moment("until", until));
    if !problems.is_empty() {
        return Err(Problem::invalid(problems));
    }
    let put_ns = i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap_or(i64::MAX);
    let name = asked.names.prediction.clone().unwrap_or_default();
    let hold = Hold { name, model, since_ns, until_ns, reason, by: call.actor.clone(), put_ns };
    let shown = HoldView::from(hold.clone());
    apart(move || ledger.put_hold(hold)).await?.map_err(problem)?;
    admin.desk.noted("hold.put", named.as_ref(), &shown.name, &call).await?;
    Ok(json(StatusCode::OK, &shown))
}

/// Lift a hold. Takes a reason, in the header `tidegate-reason`; is recorded.
#[utoipa::path(delete, path = "/audit/holds/{hold}", operation_id = "hold.delete", tag = "audit",
    responses((status = 200, description = "It is lifted.", body = HoldView)))]
pub(super) async fn delete(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    let ledger = ledger(&admin)?;
    let call = asked.plain_call(None);
    let Some(reason) = call.reason.clone() else {
        return Err(NEEDS_REASON.because("lifting a hold takes a reason"));
    };
    let name = asked.names.prediction.clone().unwrap_or_default();
    let by = call.actor.clone();
    let lifted = apart(move || ledger.lift_hold(&name, &by, &reason)).await?.map_err(problem)?;
    let model = lifted.model.as_ref().and_then(|model| model.parse::<ModelName>().ok());
    admin.desk.noted("hold.delete", model.as_ref(), &lifted.name, &call).await?;
    Ok(json(StatusCode::OK, &HoldView::from(lifted)))
}

fn problem(error: HoldingError) -> Problem {
    let kind = match &error {
        HoldingError::Hold(HoldError::Unknown(_)) => NOT_FOUND,
        HoldingError::Hold(HoldError::Exists(_) | HoldError::TooMany) => CONFLICT,
        HoldingError::Hold(HoldError::Name | HoldError::Time) => INVALID,
        HoldingError::Hold(HoldError::Io { .. }) => {
            tracing::error!(%error, "a hold cannot be kept");
            return INTERNAL.because("the ledger cannot be written; the log says more");
        }
        HoldingError::Unrecorded(_) | HoldingError::Unsynced | HoldingError::NoUpkeep => {
            UNAVAILABLE
        }
    };
    kind.because(error.to_string())
}
