//! What decides which version a request gets: the traffic table, the way back, and shadows.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::StatusCode;

use super::{read, read_view, tagged};
use crate::admin::Admin;
use crate::admin::asked::{Asked, Change, Reason};
use crate::admin::problem::Problem;
use crate::control::view::{ShadowView, TrafficView};
use crate::domain::Traffic;

type TrafficChange = Change<Traffic>;

/// What is in force, what `:rollback` goes back to, and who put it there.
#[utoipa::path(get, path = "/models/{model}/traffic", operation_id = "traffic.get", tag = "traffic",
    responses(
        (status = 200, description = "The traffic.", body = TrafficView, headers(("ETag" = String))),
        (status = 304, description = "As `If-None-Match` has it."),
    ))]
pub(super) async fn get(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    Ok(read(&asked, &admin.desk.traffic(asked.model()?)?))
}

/// Put a traffic table in force, whole.
#[utoipa::path(put, path = "/models/{model}/traffic", operation_id = "traffic.put", tag = "traffic",
    request_body(content = TrafficChange),
    responses((status = 200, description = "It is in force.", body = TrafficView,
        headers(("ETag" = String)))))]
pub(super) async fn put(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: TrafficChange,
) -> Result<Response, Problem> {
    let model = asked.model()?;
    let call = asked.call(change.reason, || Some(admin.desk.traffic(model).ok()?.etag))?;
    let traffic = admin.desk.put_traffic(model, change.what, call).await?;
    Ok(tagged(StatusCode::OK, &traffic))
}

/// Take the table away: the label `stable` decides again, or without it the latest version.
#[utoipa::path(delete, path = "/models/{model}/traffic", operation_id = "traffic.delete",
    tag = "traffic",
    responses((status = 200, description = "There is no table.", body = TrafficView,
        headers(("ETag" = String)))))]
pub(super) async fn delete(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    let model = asked.model()?;
    let call = asked.call(None, || Some(admin.desk.traffic(model).ok()?.etag))?;
    let traffic = admin.desk.delete_traffic(model, call).await?;
    Ok(tagged(StatusCode::OK, &traffic))
}

/// Back to the last good table at once; its versions are still warm. Ends a rollout under way, and
/// never needs an approval.
#[utoipa::path(post, path = "/models/{model}:rollback", operation_id = "traffic.rollback",
    tag = "traffic", request_body(content = Reason, description = "May be empty."),
    responses((status = 200, description = "It is in force.", body = TrafficView,
        headers(("ETag" = String)))))]
pub(super) async fn rollback(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: Reason,
) -> Result<Response, Problem> {
    let model = asked.model()?;
    let call = asked.call(change.reason, || Some(admin.desk.traffic(model).ok()?.etag))?;
    let traffic = admin.desk.rollback(model, call).await?;
    Ok(tagged(StatusCode::OK, &traffic))
}

/// How shadows answered, beside what was answered for real.
#[utoipa::path(get, path = "/models/{model}/shadow", operation_id = "shadow.get", tag = "traffic",
    responses(
        (status = 200, description = "Counts and differences since they began.", body = ShadowView,
            headers(("ETag" = String))),
        (status = 304, description = "As `If-None-Match` has it."),
    ))]
pub(super) async fn shadow(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    read_view(&asked, &admin.desk.shadow(asked.model()?)?)
}
