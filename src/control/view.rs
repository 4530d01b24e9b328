//! What runs where, and why: the resources that the admin API shows.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::call::Check;
use super::lineage::Lineage;
use crate::domain::{Label, ModelName, Traffic, Version};
pub use crate::shadow::Snapshot as ShadowView;

/// Where a version is in its life.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Life {
    Discovered,
    Fetching,
    Probing,
    Loading,
    Warming,
    Ready,
    /// Loaded and warm, and kept from traffic until it is approved.
    Held,
    Draining,
    Retired,
    Failed,
    /// Other bytes than those first seen under its number.
    Quarantined,
}

/// One step of a version's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[schema(as = LifeStep)]
pub struct Step {
    pub state: Life,
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// Why, and the error if it is one; empty when there is nothing to say.
    pub reason: String,
}

/// Who changed something last, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Change {
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    pub actor: String,
    pub reason: Option<String>,
    /// Place in the journal.
    pub seq: u64,
}

/// What decides which version a request gets that names none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Follow {
    /// The highest ready version.
    Latest,
    /// The version with label `stable`.
    Stable,
    /// The traffic table.
    Traffic,
}

/// A model: what answers for it, and how that came to be.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ModelView {
    pub name: ModelName,
    pub follow: Follow,
    pub labels: BTreeMap<Label, Version>,
    /// In force now; `None` while `follow` is not `traffic`.
    pub traffic: Option<Traffic>,
    /// What `:rollback` goes back to.
    pub last_good: Option<Traffic>,
    pub changed: Option<Change>,
    /// The rollout under way.
    pub rollout: Option<String>,
    pub versions: Vec<VersionView>,
    /// Why it has no versions; empty otherwise.
    pub problem: String,
}

/// A version: what it is, what it passed, what it gets.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct VersionView {
    pub version: Version,
    pub state: Life,
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// Why it is in this state; the error if it failed.
    pub reason: String,
    pub digest: Option<String>,
    pub engine: Option<String>,
    pub source: Option<String>,
    pub size_bytes: Option<u64>,
    /// Predicted before the load: the peak of its trial.
    pub memory_predicted_bytes: Option<u64>,
    /// Measured: how much more the process held after the load.
    pub memory_measured_bytes: Option<u64>,
    pub labels: Vec<Label>,
    /// Share of the requests that name no version, in percent, to 0.01.
    pub weight: f64,
    /// `stable`, `canary`, names of rules, `shadow`.
    pub arms: Vec<String>,
    /// Who put it where it is.
    pub changed: Option<Change>,
    pub lineage: Lineage,
    pub checks: Vec<Check>,
    pub approvals: Vec<Approval>,
    /// The last steps of its life, the newest last.
    pub history: Vec<Step>,
}

/// What somebody said of a version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Approval {
    pub principal: String,
    pub decision: Decision,
    pub comment: String,
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub expires: Option<Timestamp>,
    /// Of the bytes that were looked at: other bytes need another approval.
    pub digest: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Decision {
    Approve,
    Reject,
}

/// Whether a version may take traffic, and what was said of it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ApprovalsView {
    pub digest: Option<String>,
    /// Approvals that count: of this digest, in force, by others than the submitter.
    pub have: usize,
    pub need: usize,
    pub submitter: Option<String>,
    pub approvals: Vec<Approval>,
}

/// `POST /models/{m}/versions/{v}/approvals`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ApprovalRequest {
    pub decision: Decision,
    pub comment: String,
    /// Digest that was looked at; refused when the version has another by now.
    #[serde(default)]
    pub digest: Option<String>,
}

/// How a model's requests are divided now.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct TrafficView {
    pub follow: Follow,
    /// What a request gets that names no version, has no key and meets no rule, most of the time.
    pub version: Option<Version>,
    /// `None` while `follow` is not `traffic`.
    pub traffic: Option<Traffic>,
    /// What `:rollback` goes back to.
    pub last_good: Option<Traffic>,
    pub changed: Option<Change>,
}

/// What a look at the source found.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ReloadView {
    pub models: usize,
    pub versions: usize,
}
