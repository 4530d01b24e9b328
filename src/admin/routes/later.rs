//! Routes of the contract that a later part of the gateway brings: they say so, and are in no
//! document until then.

use axum::response::{IntoResponse, Response};

use crate::admin::problem::LATER;

#[utoipa::path(get, path = "/models/{model}/drift", operation_id = "drift.get")]
pub(super) async fn drift() -> Response {
    LATER.because("drift comes with monitoring").into_response()
}
