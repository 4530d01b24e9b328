//! Every route once, and what it needs; `docs/admin-api.md` has the same table for people.

use std::sync::Arc;

use axum::body::Body;
use axum::response::{IntoResponse, Response};
use http::header::{CONTENT_TYPE, ETAG, LOCATION};
use http::{HeaderValue, StatusCode};
use serde::Serialize;
use utoipa_axum::routes;

use super::Admin;
use super::asked::Asked;
use super::doors::Doors;
use super::etag::{self, Condition};
use super::gate::Needs;
use super::problem::{INTERNAL, Problem};
use crate::admit::Action;
use crate::control::call::Versioned;

mod alerts;
mod approvals;
mod audit;
mod drift;
mod erase;
pub(super) mod events;
mod gateway;
mod holds;
mod journal;
mod models;
mod predictions;
mod quality;
mod rollouts;
mod traffic;

/// The table.
pub(super) fn all(admin: Arc<Admin>) -> Doors {
    use Action::{
        Approve, ChangeKeys, ChangeTraffic, ChangeVersions, Drain, Erase, Hold, ReadJournal,
        ReadModels, ReadPredictions, Reload, Rollout, TestAlerts,
    };
    Doors::new(admin)
        .add(Needs::Nothing, routes!(gateway::health))
        .add(Needs::Credential, routes!(gateway::openapi))
        .add(Needs::Some(ReadModels), routes!(models::list))
        .add(Needs::Right(ReadModels), routes!(models::one))
        .add(Needs::Right(ReadModels), routes!(models::version))
        .add(Needs::Right(ChangeVersions), routes!(models::load))
        .add(Needs::Right(ChangeVersions), routes!(models::unload))
        .add(Needs::Right(ReadModels), routes!(models::labels))
        .add(Needs::Right(ChangeVersions), routes!(models::put_label))
        .add(Needs::Right(ChangeVersions), routes!(models::delete_label))
        .add(Needs::Right(ReadModels), routes!(traffic::get))
        .add(Needs::Right(ChangeTraffic), routes!(traffic::put))
        .add(Needs::Right(ChangeTraffic), routes!(traffic::delete))
        .add(Needs::Right(Rollout), routes!(traffic::rollback))
        .add(Needs::Right(ReadModels), routes!(traffic::shadow))
        .add(Needs::Right(ReadModels), routes!(quality::get))
        .add(Needs::Right(ReadModels), routes!(drift::get))
        .add(Needs::Right(Rollout), routes!(drift::freeze))
        .add(Needs::Right(Rollout), routes!(rollouts::start))
        .add(Needs::Right(ReadModels), routes!(rollouts::list))
        .add(Needs::Right(ReadModels), routes!(rollouts::one))
        .add(Needs::Right(Rollout), routes!(rollouts::pause))
        .add(Needs::Right(Rollout), routes!(rollouts::resume))
        .add(Needs::Right(Rollout), routes!(rollouts::promote))
        .add(Needs::Right(Rollout), routes!(rollouts::abort))
        .add(Needs::Right(ReadModels), routes!(approvals::get))
        .add(Needs::Right(Approve), routes!(approvals::post))
        .add(Needs::Some(ReadModels), routes!(alerts::list))
        .add(Needs::Right(TestAlerts), routes!(alerts::test))
        .add(Needs::Right(Rollout), routes!(alerts::put_silence))
        .add(Needs::Right(Rollout), routes!(alerts::delete_silence))
        .add(Needs::Some(ReadJournal), routes!(journal::get))
        .add(Needs::Some(ReadModels), routes!(events::get))
        .add(Needs::Some(ReadPredictions), routes!(predictions::get))
        .add(Needs::Some(ReadJournal), routes!(audit::stats))
        .add(Needs::Some(ReadJournal), routes!(holds::list))
        .add(Needs::Right(Hold), routes!(holds::put))
        .add(Needs::Right(Hold), routes!(holds::delete))
        .add(Needs::Right(Erase), routes!(erase::erase))
        .add(Needs::Right(ChangeKeys), routes!(erase::rotate_key))
        .add(Needs::Right(Drain), routes!(gateway::drain))
        .add(Needs::Right(Reload), routes!(gateway::reload))
        .add(Needs::Nothing, routes!(gateway::mlflow))
}

/// A resource as JSON.
fn json(status: StatusCode, value: &impl Serialize) -> Response {
    match serde_json::to_vec(value) {
        Ok(bytes) => json_bytes(status, bytes),
        Err(error) => {
            tracing::error!(%error, "an admin answer cannot be written as JSON");
            INTERNAL.because("the gateway failed at this").into_response()
        }
    }
}

fn json_bytes(status: StatusCode, bytes: Vec<u8>) -> Response {
    let mut answer = Response::new(Body::from(bytes));
    *answer.status_mut() = status;
    let of_json = HeaderValue::from_static("application/json");
    answer.headers_mut().insert(CONTENT_TYPE, of_json);
    answer
}

/// A resource with the tag of its revision.
fn tagged<T: Serialize>(status: StatusCode, versioned: &Versioned<T>) -> Response {
    with_tag(json(status, &versioned.value), &versioned.etag)
}

/// A new resource, and where it is.
fn created<T: Serialize>(path: &str, versioned: &Versioned<T>) -> Response {
    let mut answer = tagged(StatusCode::CREATED, versioned);
    if let Ok(location) = HeaderValue::from_str(path) {
        answer.headers_mut().insert(LOCATION, location);
    }
    answer
}

/// A read of a resource that has a tag: 304 when the caller has it.
fn read<T: Serialize>(asked: &Asked, versioned: &Versioned<T>) -> Response {
    match Condition::not_modified(&asked.headers, &versioned.etag) {
        true => not_modified(&versioned.etag),
        false => tagged(StatusCode::OK, versioned),
    }
}

/// The same for a view that has no revision of its own.
fn read_view(asked: &Asked, view: &impl Serialize) -> Result<Response, Problem> {
    let bytes = serde_json::to_vec(view).map_err(|error| {
        tracing::error!(%error, "an admin answer cannot be written as JSON");
        INTERNAL.because("the gateway failed at this")
    })?;
    let tag = etag::of_bytes(&bytes);
    Ok(match Condition::not_modified(&asked.headers, &tag) {
        true => not_modified(&tag),
        false => with_tag(json_bytes(StatusCode::OK, bytes), &tag),
    })
}

fn not_modified(tag: &str) -> Response {
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = StatusCode::NOT_MODIFIED;
    with_tag(answer, tag)
}

fn with_tag(mut answer: Response, tag: &str) -> Response {
    if let Ok(tag) = HeaderValue::from_str(tag) {
        answer.headers_mut().insert(ETAG, tag);
    }
    answer
}
