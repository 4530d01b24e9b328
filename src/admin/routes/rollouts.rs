//! Rollouts: a new version in small, watched, reversible steps.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::{created, read, read_view, tagged};
use crate::admin::asked::{Asked, Change, Reason};
use crate::admin::problem::Problem;
use crate::admin::{Admin, PREFIX};
use crate::control::rollout::{Command, Plan, Rollout};

type PlanChange = Change<Plan>;

/// The rollouts of one model.
#[derive(Serialize, ToSchema)]
pub(super) struct RolloutsView {
    /// The newest first.
    rollouts: Vec<Rollout>,
}

/// Begin a rollout; with `dry_run` it decides and reports, and moves nothing.
#[utoipa::path(post, path = "/models/{model}/rollouts", operation_id = "rollout.start",
    tag = "rollouts", request_body(content = PlanChange),
    responses((status = 201, description = "It has begun.", body = Rollout,
        headers(("ETag" = String), ("Location" = String)))))]
pub(super) async fn start(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: PlanChange,
) -> Result<Response, Problem> {
    let model = asked.model()?;
    let call = asked.plain_call(change.reason);
    let rollout = admin.desk.start_rollout(model, change.what, call).await?;
    let path = format!("{PREFIX}/models/{model}/rollouts/{}", rollout.value.id);
    Ok(created(&path, &rollout))
}

/// The rollouts of a model, the newest first.
#[utoipa::path(get, path = "/models/{model}/rollouts", operation_id = "rollout.list",
    tag = "rollouts",
    responses(
        (status = 200, description = "Under way and ended.", body = RolloutsView,
            headers(("ETag" = String))),
        (status = 304, description = "As `If-None-Match` has it."),
    ))]
pub(super) async fn list(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    let rollouts = admin.desk.rollouts(asked.model()?)?;
    read_view(&asked, &RolloutsView { rollouts })
}

/// One rollout: where it is, what its guards say, and how it came there.
#[utoipa::path(get, path = "/models/{model}/rollouts/{rollout}", operation_id = "rollout.get",
    tag = "rollouts",
    responses(
        (status = 200, description = "The rollout.", body = Rollout, headers(("ETag" = String))),
        (status = 304, description = "As `If-None-Match` has it."),
    ))]
pub(super) async fn one(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    Ok(read(&asked, &admin.desk.rollout(asked.model()?, asked.rollout()?)?))
}

/// Stay at the present step; guards go on and still roll back.
#[utoipa::path(post, path = "/models/{model}/rollouts/{rollout}:pause",
    operation_id = "rollout.pause", tag = "rollouts",
    request_body(content = Reason, description = "May be empty."),
    responses((status = 200, description = "It is paused.", body = Rollout,
        headers(("ETag" = String)))))]
pub(super) async fn pause(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: Reason,
) -> Result<Response, Problem> {
    command(&admin, &asked, change, Command::Pause).await
}

/// Go on from a pause.
#[utoipa::path(post, path = "/models/{model}/rollouts/{rollout}:resume",
    operation_id = "rollout.resume", tag = "rollouts",
    request_body(content = Reason, description = "May be empty."),
    responses((status = 200, description = "It goes on.", body = Rollout,
        headers(("ETag" = String)))))]
pub(super) async fn resume(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: Reason,
) -> Result<Response, Problem> {
    command(&admin, &asked, change, Command::Resume).await
}

/// Give the candidate everything now, whatever the steps say.
#[utoipa::path(post, path = "/models/{model}/rollouts/{rollout}:promote",
    operation_id = "rollout.promote", tag = "rollouts",
    request_body(content = Reason, description = "May be empty."),
    responses((status = 200, description = "It is promoted.", body = Rollout,
        headers(("ETag" = String)))))]
pub(super) async fn promote(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: Reason,
) -> Result<Response, Problem> {
    command(&admin, &asked, change, Command::Promote).await
}

/// End it, and go back to the traffic before it.
#[utoipa::path(post, path = "/models/{model}/rollouts/{rollout}:abort",
    operation_id = "rollout.abort", tag = "rollouts",
    request_body(content = Reason, description = "May be empty."),
    responses((status = 200, description = "It is rolled back.", body = Rollout,
        headers(("ETag" = String)))))]
pub(super) async fn abort(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: Reason,
) -> Result<Response, Problem> {
    command(&admin, &asked, change, Command::Abort).await
}

async fn command(
    admin: &Admin,
    asked: &Asked,
    change: Reason,
    command: Command,
) -> Result<Response, Problem> {
    let (model, id) = (asked.model()?, asked.rollout()?);
    let call = asked.call(change.reason, || Some(admin.desk.rollout(model, id).ok()?.etag))?;
    let rollout = admin.desk.command_rollout(model, id, command, call).await?;
    Ok(tagged(StatusCode::OK, &rollout))
}
