//! Models, their versions and labels.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{read, read_view, tagged};
use crate::admin::Admin;
use crate::admin::asked::{Asked, Change, Reason, no_model};
use crate::admin::problem::Problem;
use crate::admit::Action;
use crate::control::call::Versioned;
use crate::control::desk::Labels;
use crate::control::view::{ModelView, VersionView};
use crate::domain::{Digest, Label, Version};

/// What runs where, and why.
#[derive(Serialize, ToSchema)]
pub(super) struct ModelsView {
    models: Vec<ModelView>,
}

/// `POST …:load`
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LoadRequest {
    /// Digest of the bytes that a quarantined version has now, and that are right.
    #[serde(default)]
    #[schema(pattern = "^sha256:[0-9a-f]{64}$")]
    accept_digest: Option<String>,
}

/// `PUT …/labels/{label}`
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct LabelRequest {
    /// Number of a version that is ready.
    version: Version,
}

type LoadChange = Change<LoadRequest>;
type LabelChange = Change<LabelRequest>;

/// The labels of one model.
#[derive(Serialize, ToSchema)]
pub(super) struct LabelsView {
    /// Each label's version.
    labels: BTreeMap<Label, Version>,
}

impl LabelsView {
    fn of(labels: Versioned<Labels>) -> Versioned<Self> {
        Versioned { value: Self { labels: labels.value }, etag: labels.etag }
    }
}

/// The models that the caller may see.
#[utoipa::path(get, path = "/models", operation_id = "model.list", tag = "models",
    responses(
        (status = 200, description = "By name.", body = ModelsView, headers(("ETag" = String))),
        (status = 304, description = "As `If-None-Match` has it."),
    ))]
pub(super) async fn list(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    let mut models = admin.desk.models();
    models.retain(|model| asked.caller.may(Action::ReadModels, Some(&model.name)));
    read_view(&asked, &ModelsView { models })
}

/// One model: versions with state, digest, engine, labels, weights, and who put them there.
#[utoipa::path(get, path = "/models/{model}", operation_id = "model.get", tag = "models",
    responses(
        (status = 200, description = "The model.", body = ModelView, headers(("ETag" = String))),
        (status = 304, description = "As `If-None-Match` has it."),
    ))]
pub(super) async fn one(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    let name = asked.model()?;
    let model = admin.desk.model(name).ok_or_else(|| no_model(name))?;
    read_view(&asked, &model)
}

/// One version: what it is, what it passed, what it gets, and who put it there.
#[utoipa::path(get, path = "/models/{model}/versions/{version}", operation_id = "version.get",
    tag = "models",
    responses(
        (status = 200, description = "The version.", body = VersionView,
            headers(("ETag" = String))),
        (status = 304, description = "As `If-None-Match` has it."),
    ))]
pub(super) async fn version(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    Ok(read(&asked, &admin.desk.version(asked.model()?, asked.version()?)?))
}

/// Load a version. Answers when it is ready, or held because it waits for approvals.
#[utoipa::path(post, path = "/models/{model}/versions/{version}:load", operation_id = "version.load",
    tag = "models", request_body(content = LoadChange, description = "May be empty."),
    responses((status = 200, description = "The version is loaded.", body = VersionView,
        headers(("ETag" = String)))))]
pub(super) async fn load(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: LoadChange,
) -> Result<Response, Problem> {
    let digest = match &change.what.accept_digest {
        Some(text) => Some(Digest::parse(text).ok_or_else(|| {
            let expected = "accept_digest: expected 'sha256:' and 64 hexadecimal digits";
            Problem::invalid(vec![expected.to_owned()])
        })?),
        None => None,
    };
    let (model, version) = (asked.model()?, asked.version()?);
    let call = asked.call(change.reason, || Some(admin.desk.version(model, version).ok()?.etag))?;
    let loaded = admin.desk.load(model, version, digest, call).await?;
    Ok(tagged(StatusCode::OK, &loaded))
}

/// Unload a version that takes no traffic. Answers when its last request has ended.
#[utoipa::path(post, path = "/models/{model}/versions/{version}:unload",
    operation_id = "version.unload", tag = "models",
    request_body(content = Reason, description = "May be empty."),
    responses((status = 200, description = "The version is not loaded.", body = VersionView,
        headers(("ETag" = String)))))]
pub(super) async fn unload(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: Reason,
) -> Result<Response, Problem> {
    let (model, version) = (asked.model()?, asked.version()?);
    let call = asked.call(change.reason, || Some(admin.desk.version(model, version).ok()?.etag))?;
    let unloaded = admin.desk.unload(model, version, call).await?;
    Ok(tagged(StatusCode::OK, &unloaded))
}

/// The labels of a model.
#[utoipa::path(get, path = "/models/{model}/labels", operation_id = "label.list", tag = "models",
    responses(
        (status = 200, description = "Labels and their versions.", body = LabelsView,
            headers(("ETag" = String))),
        (status = 304, description = "As `If-None-Match` has it."),
    ))]
pub(super) async fn labels(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    Ok(read(&asked, &LabelsView::of(admin.desk.labels(asked.model()?)?)))
}

/// Put a label on a version that is ready; it leaves the one that had it.
#[utoipa::path(put, path = "/models/{model}/labels/{label}", operation_id = "label.put",
    tag = "models", request_body(content = LabelChange),
    responses((status = 200, description = "The model's labels now.", body = LabelsView,
        headers(("ETag" = String)))))]
pub(super) async fn put_label(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    change: LabelChange,
) -> Result<Response, Problem> {
    let (model, label) = (asked.model()?, asked.label()?.clone());
    let call = asked.call(change.reason, || Some(admin.desk.labels(model).ok()?.etag))?;
    let labels = admin.desk.put_label(model, label, change.what.version, call).await?;
    Ok(tagged(StatusCode::OK, &LabelsView::of(labels)))
}

/// Take a label away.
#[utoipa::path(delete, path = "/models/{model}/labels/{label}", operation_id = "label.delete",
    tag = "models",
    responses((status = 200, description = "The model's labels now.", body = LabelsView,
        headers(("ETag" = String)))))]
pub(super) async fn delete_label(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    let (model, label) = (asked.model()?, asked.label()?);
    let call = asked.call(None, || Some(admin.desk.labels(model).ok()?.etag))?;
    let labels = admin.desk.delete_label(model, label, call).await?;
    Ok(tagged(StatusCode::OK, &LabelsView::of(labels)))
}
