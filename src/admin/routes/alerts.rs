//! Alerts: what is wrong with models, who was told, and what is silent.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::StatusCode;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{json, read_view};
use crate::admin::Admin;
use crate::admin::asked::{Asked, Change, Reason};
use crate::admin::problem::{LATER, NEEDS_REASON, NOT_FOUND, Problem};
use crate::admit::Action;
use crate::control::alerts::board::Silence;
use crate::control::alerts::{Alerts, AlertsView, SILENCE_MAX, TestView};

/// `PUT …/silence`
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SilenceBody {
    /// RFC 3339, at most 30 days from now.
    until: String,
}

type SilenceChange = Change<SilenceBody>;

/// Whether a model is silent.
#[derive(Serialize, ToSchema)]
pub(super) struct SilenceView {
    model: String,
    silence: Option<Silence>,
}

fn alerts(admin: &Admin) -> Result<&Alerts, Problem> {
    let nobody = || LATER.because("this gateway makes no alerts: alerts.enabled is false");
    admin.alerts.as_ref().ok_or_else(nobody)
}

/// Alerts that fire, and those of the last week; whom each was told, silences and receivers.
#[utoipa::path(get, path = "/alerts", operation_id = "alert.list", tag = "alerts",
    responses(
        (status = 200, description = "Of the models that the caller may see.", body = AlertsView,
            headers(("ETag" = String))),
        (status = 304, description = "As `If-None-Match` has it."),
    ))]
pub(super) async fn list(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    let sees = |model: &_| asked.caller.principal.may(Action::ReadModels, Some(model));
    read_view(&asked, &alerts(&admin)?.view(sees))
}

/// Send a receiver an event that says that it is a test, once. A pipeline is started by it.
#[utoipa::path(post, path = "/alerts/receivers/{receiver}:test", operation_id = "alert.test",
    tag = "alerts",
    request_body(content = Reason, description = "May be empty."),
    responses((status = 200, description = "What became of it.", body = TestView)))]
pub(super) async fn test(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: Reason,
) -> Result<Response, Problem> {
    let alerts = alerts(&admin)?;
    let receiver = asked.names.prediction.clone().unwrap_or_default();
    if !alerts.knows(&receiver) {
        return Err(NOT_FOUND.because(format!("receiver '{receiver}' is not configured")));
    }
    let call = asked.plain_call(change.reason);
    admin.desk.noted("alert.test", None, &receiver, &call).await?;
    Ok(json(StatusCode::OK, &alerts.test(&receiver).await?))
}

/// Tell nobody of a model's alerts until then; what fires still is told at the end. Takes a reason.
#[utoipa::path(put, path = "/models/{model}/silence", operation_id = "silence.put", tag = "alerts",
    request_body(content = SilenceChange),
    responses((status = 200, description = "It is silent.", body = SilenceView)))]
pub(super) async fn put_silence(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: SilenceChange,
) -> Result<Response, Problem> {
    let (alerts, model) = (alerts(&admin)?, asked.model()?);
    // Says so when there is no such model.
    admin.desk.traffic(model)?;
    let call = asked.plain_call(change.reason);
    let Some(reason) = call.reason.clone().filter(|reason| !reason.trim().is_empty()) else {
        return Err(NEEDS_REASON.because("a silence takes a reason"));
    };
    let now = Timestamp::now();
    let fits = |until: &Timestamp| {
        let left = std::time::Duration::try_from(until.duration_since(now));
        left.is_ok_and(|left| !left.is_zero() && left <= SILENCE_MAX)
    };
    let until = change.what.until.parse::<Timestamp>().ok().filter(fits);
    let Some(until) = until else {
        let days = SILENCE_MAX.as_secs() / 86_400;
        let message =
            format!("until: expected a time like 2026-11-25T10:00:00Z, within {days} days");
        return Err(Problem::invalid(vec![message]));
    };
    let silence = Silence { until, reason, by: call.actor.clone() };
    alerts.silence(model, Some(silence.clone()), call).await?;
    let view = SilenceView { model: model.to_string(), silence: Some(silence) };
    Ok(json(StatusCode::OK, &view))
}

/// Tell of a model's alerts again.
#[utoipa::path(delete, path = "/models/{model}/silence", operation_id = "silence.delete",
    tag = "alerts",
    responses((status = 200, description = "It is silent no more.", body = SilenceView)))]
pub(super) async fn delete_silence(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    let (alerts, model) = (alerts(&admin)?, asked.model()?);
    alerts.silence(model, None, asked.plain_call(None)).await?;
    Ok(json(StatusCode::OK, &SilenceView { model: model.to_string(), silence: None }))
}
