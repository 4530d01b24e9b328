//! What is known of each version: where it is in its life, how it came there, what it passed.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use jiff::Timestamp;
use parking_lot::Mutex;

use crate::control::call::Check;
use crate::control::lineage::Lineage;
use crate::control::view::{Life, Step};
use crate::domain::{Digest, IndexEntry, ModelName, Version, VersionState};

/// Steps that are remembered of one version; the oldest go first, the journal has them all.
const HISTORY_MAX: usize = 32;

/// What is known of one model.
#[derive(Default)]
pub(super) struct Known {
    pub(super) versions: BTreeMap<Version, Record>,
    /// Why it has no versions.
    pub(super) problem: String,
    /// Held during a load or unload.
    pub(super) busy: Arc<Mutex<()>>,
}

/// What is known of one version.
#[derive(Clone, Debug)]
pub struct Record {
    pub state: Life,
    pub since: Timestamp,
    /// Why it is in this state; empty when there is nothing to say.
    pub reason: String,
    /// Of what was fetched last.
    pub digest: Option<Digest>,
    pub engine: Option<String>,
    pub size: Option<u64>,
    /// Peak of its trial, in bytes.
    pub memory_predicted: Option<u64>,
    /// How much more the process held after the load, in bytes.
    pub memory_measured: Option<u64>,
    pub lineage: Lineage,
    pub checks: Vec<Check>,
    /// The retention leaves it out, and nobody asked for it.
    pub(super) left_out: bool,
    /// Of the source when it was last tried; the same one is not tried again by itself.
    pub(super) fingerprint: Option<String>,
    history: VecDeque<Step>,
}

impl Record {
    pub(super) fn new() -> Self {
        let mut record = Self {
            state: Life::Discovered,
            since: Timestamp::now(),
            reason: String::new(),
            digest: None,
            engine: None,
            size: None,
            memory_predicted: None,
            memory_measured: None,
            lineage: Lineage::default(),
            checks: Vec::new(),
            left_out: false,
            fingerprint: None,
            history: VecDeque::new(),
        };
        record.note(Life::Discovered, "");
        record
    }

    /// Enters a state.
    pub(super) fn enter(&mut self, state: Life, reason: &str) {
        if self.state == state && self.reason == reason {
            return;
        }
        self.state = state;
        self.left_out = false;
        self.since = Timestamp::now();
        reason.clone_into(&mut self.reason);
        self.note(state, reason);
    }

    fn note(&mut self, state: Life, reason: &str) {
        if self.history.len() == HISTORY_MAX {
            self.history.pop_front();
        }
        self.history.push_back(Step { state, at: Timestamp::now(), reason: reason.to_owned() });
    }

    pub fn history(&self) -> Vec<Step> {
        self.history.iter().cloned().collect()
    }

    /// Whether requests can be routed to it, or could if nobody held it.
    pub(super) fn serves(&self) -> bool {
        matches!(self.state, Life::Ready | Life::Held)
    }
}

/// As the protocol's repository index says it.
pub(super) fn index_state(life: Life) -> VersionState {
    match life {
        Life::Ready => VersionState::Ready,
        Life::Draining => VersionState::Unloading,
        Life::Discovered | Life::Fetching | Life::Probing | Life::Loading | Life::Warming => {
            VersionState::Loading
        }
        Life::Held | Life::Retired | Life::Failed | Life::Quarantined => VersionState::Unavailable,
    }
}

pub(super) fn index(models: &BTreeMap<ModelName, Known>) -> Vec<IndexEntry> {
    let entries = models.iter().flat_map(|(model, known)| {
        let shown = known.versions.iter().filter(|(_, record)| !record.left_out);
        let versions = shown.map(|(version, record)| IndexEntry {
            model: model.clone(),
            version: Some(*version),
            state: index_state(record.state),
            reason: record.reason.clone(),
        });
        let alone = known.versions.is_empty().then(|| IndexEntry {
            model: model.clone(),
            version: None,
            state: VersionState::Unavailable,
            reason: known.problem.clone(),
        });
        versions.chain(alone).collect::<Vec<_>>()
    });
    entries.collect()
}
