//! What somebody said of a version before it may take traffic.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::StatusCode;

use super::{read, tagged};
use crate::admin::Admin;
use crate::admin::asked::{Asked, Change};
use crate::admin::problem::Problem;
use crate::control::view::{ApprovalRequest, ApprovalsView};

type ApprovalChange = Change<ApprovalRequest>;

/// Approvals and rejections of a version, and how many it needs.
#[utoipa::path(get, path = "/models/{model}/versions/{version}/approvals",
    operation_id = "approval.list", tag = "approvals",
    responses(
        (status = 200, description = "What was said.", body = ApprovalsView,
            headers(("ETag" = String))),
        (status = 304, description = "As `If-None-Match` has it."),
    ))]
pub(super) async fn get(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    Ok(read(&asked, &admin.desk.approvals(asked.model()?, asked.version()?)?))
}

/// Approve or reject a version, with a comment. It counts for the bytes that were looked at.
#[utoipa::path(post, path = "/models/{model}/versions/{version}/approvals",
    operation_id = "approval.post", tag = "approvals",
    request_body(content = ApprovalChange),
    responses((status = 200, description = "What was said so far.", body = ApprovalsView,
        headers(("ETag" = String)))))]
pub(super) async fn post(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: ApprovalChange,
) -> Result<Response, Problem> {
    let (model, version) = (asked.model()?, asked.version()?);
    let current = || Some(admin.desk.approvals(model, version).ok()?.etag);
    // Its comment is why.
    let reason = change.reason.or_else(|| Some(change.what.comment.clone()));
    let call = asked.call(reason.filter(|text| !text.trim().is_empty()), current)?;
    let approvals = admin.desk.approve(model, version, change.what, call).await?;
    Ok(tagged(StatusCode::OK, &approvals))
}
