//! The gateway as a whole: health, document, drain, reload, and registries that call us.

use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::Response;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderValue, StatusCode};
use serde::Serialize;
use utoipa::ToSchema;

use super::json;
use crate::admin::Admin;
use crate::admin::asked::{Asked, Reason, whole};
use crate::admin::problem::{NOT_FOUND, Problem};
use crate::control::view::ReloadView;

/// That the admin API answers.
#[derive(Serialize, ToSchema)]
pub(super) struct HealthView {
    /// `ok`
    status: &'static str,
    /// Of this program.
    version: &'static str,
}

/// That the gateway is on its way out.
#[derive(Serialize, ToSchema)]
pub(super) struct DrainView {
    draining: bool,
}

/// That a webhook was taken as a hint.
#[derive(Serialize, ToSchema)]
pub(super) struct HintView {
    accepted: bool,
}

/// Whether the admin API answers; says nothing of models. Needs no credential.
#[utoipa::path(get, path = "/health", operation_id = "health", tag = "gateway",
    responses((status = 200, description = "It answers.", body = HealthView)))]
pub(super) async fn health() -> Response {
    json(StatusCode::OK, &HealthView { status: "ok", version: env!("CARGO_PKG_VERSION") })
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", operation_id = "openapi", tag = "gateway",
    responses((status = 200, description = "OpenAPI 3.1.", body = serde_json::Value)))]
pub(super) async fn openapi(State(admin): State<Arc<Admin>>) -> Response {
    let document = admin.document.get().cloned().unwrap_or_default();
    let mut answer = Response::new(Body::from(document));
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("private, max-age=60"));
    answer
}

/// Drain, as SIGTERM does: not ready at once, so that load balancers look away; what is under way is
/// finished; then the process ends.
#[utoipa::path(post, path = "/drain", operation_id = "drain", tag = "gateway",
    request_body(content = Reason, description = "May be empty."),
    responses((status = 202, description = "It has begun.", body = DrainView)))]
pub(super) async fn drain(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: Reason,
) -> Result<Response, Problem> {
    (admin.drain)(asked.plain_call(change.reason)).await?;
    Ok(json(StatusCode::ACCEPTED, &DrainView { draining: true }))
}

/// Look at the source of models now, instead of at the next poll.
#[utoipa::path(post, path = "/reload", operation_id = "reload", tag = "gateway",
    request_body(content = Reason, description = "May be empty."),
    responses((status = 200, description = "What was found.", body = ReloadView)))]
pub(super) async fn reload(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: Reason,
) -> Result<Response, Problem> {
    let found = admin.desk.reload(asked.plain_call(change.reason)).await?;
    Ok(json(StatusCode::OK, &found))
}

/// A registry says that something changed. Its signature is checked; what it says is only a hint to
/// look, never believed.
#[utoipa::path(post, path = "/webhooks/mlflow", operation_id = "webhook.mlflow", tag = "gateway",
    params(
        ("X-MLflow-Delivery-Id" = Option<String>, Header, description = "Id of the delivery."),
        ("X-MLflow-Timestamp" = Option<String>, Header, description = "Seconds since 1970."),
        ("X-MLflow-Signature" = Option<String>, Header, description = "`v1,<base64 HMAC-SHA256>`."),
    ),
    request_body(content = serde_json::Value, description = "As MLflow sends it."),
    responses(
        (status = 202, description = "Taken as a hint.", body = HintView),
        (status = 404, description = "No registry with webhooks is configured.",
            body = crate::admin::problem::ProblemBody, content_type = "application/problem+json"),
        (status = 413, description = "The body is too large.",
            body = crate::admin::problem::ProblemBody, content_type = "application/problem+json"),
        (status = 415, description = "The body is encoded.",
            body = crate::admin::problem::ProblemBody, content_type = "application/problem+json"),
        (status = 408, description = "The body did not arrive in time.",
            body = crate::admin::problem::ProblemBody, content_type = "application/problem+json"),
    ))]
pub(super) async fn mlflow(
    State(admin): State<Arc<Admin>>,
    request: Request,
) -> Result<Response, Problem> {
    let Some(check) = &admin.mlflow else {
        return Err(NOT_FOUND.because("no MLflow registry with a webhook secret is configured"));
    };
    let (head, body) = request.into_parts();
    let bytes = whole(&head.headers, body).await?;
    check(&head.headers, &bytes)?;
    admin.desk.webhook_hint();
    Ok(json(StatusCode::ACCEPTED, &HintView { accepted: true }))
}
