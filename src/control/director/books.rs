//! What the director has decided, as the store holds it.
//!
//! One document for each subject: `traffic/<model>`, `labels/<model>`, `version/<model>/<number>`,
//! `approval/<model>/<number>`, `rollout/<id>`. The copy here is what was read or written last.

use std::collections::{BTreeMap, BTreeSet};

use jiff::Timestamp;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::control::call::{Call, Refusal};
use crate::control::registry::Remembered;
use crate::control::rollout::Rollout;
use crate::control::store::{Document, Expect, Kind, Put, Store, StoreError};
use crate::control::view::{Approval, Change};
use crate::domain::{Label, ModelName, Traffic, Version};

/// A document, and which revision of it this is; 0: there is none.
#[derive(Clone, Debug)]
pub(super) struct Doc<T> {
    pub(super) revision: u64,
    /// Its place in the change feed.
    pub(super) seq: u64,
    pub(super) body: T,
}

impl<T: Default> Default for Doc<T> {
    fn default() -> Self {
        Self { revision: 0, seq: 0, body: T::default() }
    }
}

impl<T: DeserializeOwned> Doc<T> {
    pub(super) fn read(document: &Document) -> Result<Self, Refusal> {
        let body = serde_json::from_value(document.body.clone()).map_err(|error| {
            let (kind, name) = (document.kind, &document.name);
            Refusal::Internal(format!("document {kind:?} '{name}' cannot be read: {error}"))
        })?;
        Ok(Self { revision: document.revision, seq: document.seq, body })
    }
}

impl<T> Doc<T> {
    /// Which revision a change was decided on.
    pub(super) fn expect(&self) -> Expect {
        match self.revision {
            0 => Expect::Absent,
            revision => Expect::Revision(revision),
        }
    }

    pub(super) fn etag(&self) -> String {
        format!("\"{}\"", self.revision)
    }
}

/// Who decided something, and why.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Said {
    pub(super) at: Timestamp,
    pub(super) actor: String,
    pub(super) reason: Option<String>,
}

impl Said {
    pub(super) fn now(call: &Call) -> Self {
        Self { at: Timestamp::now(), actor: call.actor.clone(), reason: call.reason.clone() }
    }

    pub(super) fn change(&self, seq: u64) -> Change {
        let Self { at, actor, reason } = self.clone();
        Change { at, actor, reason, seq }
    }
}

/// How a model's requests are divided.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct TrafficDoc {
    /// `None`: the version with label `stable`, else the highest.
    pub(super) traffic: Option<Traffic>,
    /// What sticky keys are hashed with.
    pub(super) salt: u64,
    /// The last table that gave everything to one version, before this one.
    pub(super) good: Option<Traffic>,
    pub(super) said: Option<Said>,
}

/// One label.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct LabelEntry {
    pub(super) version: Version,
    pub(super) said: Said,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct LabelsDoc {
    pub(super) labels: BTreeMap<Label, LabelEntry>,
    /// What the source said last: only what it says anew moves a label.
    pub(super) source: BTreeMap<Label, Version>,
}

/// A version as it is remembered.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct VersionDoc {
    #[serde(flatten)]
    pub(super) what: Remembered,
    /// It could take traffic when it was loaded, and may again.
    pub(super) cleared: bool,
    /// It was taken out of service: the next start does not bring it back by itself.
    #[serde(default)]
    pub(super) retired: bool,
    /// An operator asked for it by its number: it stays until one unloads it.
    pub(super) asked: bool,
    pub(super) first_seen: Timestamp,
    pub(super) said: Said,
}

impl VersionDoc {
    /// Whether the next start brings it back by itself.
    pub(super) fn serves_again(&self) -> bool {
        self.what.wanted && !self.retired
    }
}

/// Everything that was decided of one model.
#[derive(Clone, Debug, Default)]
pub(super) struct Books {
    pub(super) traffic: Doc<TrafficDoc>,
    pub(super) labels: Doc<LabelsDoc>,
    pub(super) versions: BTreeMap<Version, Doc<VersionDoc>>,
    pub(super) approvals: BTreeMap<Version, Doc<Vec<Approval>>>,
    pub(super) rollouts: BTreeMap<String, Doc<Rollout>>,
    /// What a caller got lately who named no version; to see that it moved.
    pub(super) follows: Option<Version>,
}

impl Books {
    /// Versions that labels, the traffic table and rollouts name.
    pub(super) fn named(&self) -> BTreeSet<Version> {
        let mut named: BTreeSet<Version> =
            self.labels.body.labels.values().map(|entry| entry.version).collect();
        named.extend(self.traffic.body.traffic.iter().flat_map(Traffic::versions));
        let rollouts = self.rollouts.values().filter(|doc| !doc.body.state.ended());
        named.extend(rollouts.flat_map(|doc| [doc.body.stable, doc.body.candidate]));
        named
    }

    /// Those, what a rollback goes back to, and what somebody loaded by its number.
    pub(super) fn kept(&self) -> BTreeSet<Version> {
        let mut kept = self.named();
        kept.extend(self.traffic.body.good.iter().flat_map(Traffic::versions));
        kept.extend(self.versions.iter().filter(|(_, doc)| doc.body.asked).map(|(v, _)| *v));
        kept
    }

    /// The rollout under way.
    pub(super) fn running(&self) -> Option<&Doc<Rollout>> {
        self.rollouts.values().find(|doc| !doc.body.state.ended())
    }
}

/// Reads everything that the store holds.
pub(super) fn read_all(store: &dyn Store) -> Result<BTreeMap<ModelName, Books>, Refusal> {
    let mut all: BTreeMap<ModelName, Books> = BTreeMap::new();
    let of = |name: &str| -> Option<ModelName> { name.parse().ok() };
    for document in store.documents(Kind::Traffic).map_err(internal)? {
        if let Some(model) = of(&document.name) {
            all.entry(model).or_default().traffic = Doc::read(&document)?;
        }
    }
    for document in store.documents(Kind::Labels).map_err(internal)? {
        if let Some(model) = of(&document.name) {
            all.entry(model).or_default().labels = Doc::read(&document)?;
        }
    }
    for document in store.documents(Kind::Version).map_err(internal)? {
        if let Some((model, version)) = split(&document.name) {
            all.entry(model).or_default().versions.insert(version, Doc::read(&document)?);
        }
    }
    for document in store.documents(Kind::Approval).map_err(internal)? {
        if let Some((model, version)) = split(&document.name) {
            all.entry(model).or_default().approvals.insert(version, Doc::read(&document)?);
        }
    }
    for document in store.documents(Kind::Rollout).map_err(internal)? {
        let rollout: Doc<Rollout> = Doc::read(&document)?;
        let books = all.entry(rollout.body.model.clone()).or_default();
        books.rollouts.insert(document.name.clone(), rollout);
    }
    Ok(all)
}

/// `<model>/<version>`.
pub(super) fn version_name(model: &ModelName, version: Version) -> String {
    format!("{model}/{version}")
}

fn split(name: &str) -> Option<(ModelName, Version)> {
    let (model, version) = name.rsplit_once('/')?;
    Some((model.parse().ok()?, version.parse().ok()?))
}

pub(super) fn put<T: Serialize>(
    kind: Kind,
    name: impl Into<String>,
    body: &T,
    expect: Expect,
) -> Result<Put, Refusal> {
    let name = name.into();
    let body = serde_json::to_value(body)
        .map_err(|error| Refusal::Internal(format!("{kind:?} '{name}': {error}")))?;
    Ok(Put { kind, name, body: Some(body), expect })
}

pub(super) fn internal(error: StoreError) -> Refusal {
    match error {
        StoreError::Stale { .. } => Refusal::Conflict(format!(
            "somebody else changed it at the same time: {error}; read it again"
        )),
        error => {
            tracing::error!(%error, "the state store failed");
            Refusal::Unavailable("the state cannot be written or read, see the log".to_owned())
        }
    }
}
