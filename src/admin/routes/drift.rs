//! How far what a model is asked and answers has moved from what it was made for.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::{json, read_view};
use crate::admin::Admin;
use crate::admin::asked::{Asked, Reason};
use crate::admin::problem::{LATER, Problem};
use crate::control::call::Refusal;
use crate::monitor::{FreezeError, Monitor, VersionReport};

/// Every version of a model that is loaded.
#[derive(Serialize, ToSchema)]
pub(super) struct DriftView {
    model: String,
    versions: Vec<VersionReport>,
}

fn monitor(admin: &Admin) -> Result<&Arc<Monitor>, Problem> {
    let nobody = || LATER.because("this gateway does not look at rows: monitor.enabled is false");
    admin.monitor.as_ref().ok_or_else(nobody)
}

/// Scores of every input and output against the version's reference, by version, arm and window, with
/// the limits that they are beyond and the evidence; data quality and outliers.
#[utoipa::path(get, path = "/models/{model}/drift", operation_id = "drift.get", tag = "models",
    responses(
        (status = 200, description = "As it was judged last.", body = DriftView,
            headers(("ETag" = String))),
        (status = 304, description = "As `If-None-Match` has it."),
    ))]
pub(super) async fn get(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    let monitor = monitor(&admin)?;
    let model = asked.model()?;
    let versions = monitor.reports(model);
    let versions: Vec<_> = versions.iter().map(|report| VersionReport::clone(report)).collect();
    if versions.is_empty() {
        // Says so when there is no such model.
        admin.desk.traffic(model)?;
    }
    read_view(&asked, &DriftView { model: model.to_string(), versions })
}

/// Take the reference that was learnt from a version's first rows for good: alerts are made of it from
/// now on.
#[utoipa::path(post, path = "/models/{model}/versions/{version}:freeze",
    operation_id = "reference.freeze", tag = "models",
    request_body(content = Reason, description = "May be empty."),
    responses((status = 200, description = "It is the reference.", body = VersionReport)))]
pub(super) async fn freeze(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: Reason,
) -> Result<Response, Problem> {
    let (model, version) = (asked.model()?, asked.version()?);
    // Says so when there is no such version.
    admin.desk.version(model, version)?;
    let call = asked.plain_call(change.reason);
    let frozen = monitor(&admin)?.freeze(model, version).await.map_err(refusal)?;
    admin.desk.noted("reference.freeze", Some(model), &version.to_string(), &call).await?;
    Ok(json(StatusCode::OK, &*frozen))
}

fn refusal(error: FreezeError) -> Refusal {
    let text = error.to_string();
    match error {
        FreezeError::State(_) | FreezeError::Stopped => Refusal::Unavailable(text),
        FreezeError::Unknown(_)
        | FreezeError::Given
        | FreezeError::Learning { .. }
        | FreezeError::Nothing(_) => Refusal::Conflict(text),
    }
}
