//! How good a model's predictions were, by the labels that came for them.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Response;
use serde::Deserialize;
use utoipa::IntoParams;

use super::read_view;
use crate::admin::Admin;
use crate::admin::asked::Asked;
use crate::admin::problem::{LATER, Problem};
use crate::feedback::Report;

/// Most days that can be asked for; more than are kept are as many as are kept.
const DAYS_MAX: u32 = 3650;

/// Which predictions.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct QualityQuery {
    /// Of the last so many days, today (UTC) included; all that are kept, if not given.
    #[param(minimum = 1, maximum = 3650)]
    days: Option<u32>,
}

/// Accuracy, errors, calibration and more by version and arm, with bounds; how many predictions have
/// a label, and how late those came.
#[utoipa::path(get, path = "/models/{model}/quality", operation_id = "quality.get",
    tag = "models", params(QualityQuery),
    responses(
        (status = 200, description = "Figures of the days that were asked for.", body = Report,
            headers(("ETag" = String))),
        (status = 304, description = "As `If-None-Match` has it."),
    ))]
pub(super) async fn get(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    query: Result<Query<QualityQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(QualityQuery { days }) = query.map_err(|rejection| {
        use std::error::Error as _;
        let inner = rejection.source().map_or_else(|| rejection.to_string(), ToString::to_string);
        Problem::invalid(vec![format!("query: {inner}")])
    })?;
    if days.is_some_and(|days| !(1..=DAYS_MAX).contains(&days)) {
        return Err(Problem::invalid(vec![format!("days: expected 1 to {DAYS_MAX}")]));
    }
    let Some(feedback) = &admin.feedback else {
        return Err(LATER.because("this gateway takes no feedback"));
    };
    let model = asked.model()?;
    let report = feedback.report(model, days);
    if report.versions.is_empty() {
        // Says so when there is no such model.
        admin.desk.traffic(model)?;
    }
    read_view(&asked, &report)
}
