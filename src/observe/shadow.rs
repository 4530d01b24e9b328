//! Counters of what a version did as a shadow: on copies of requests, for nobody.
//!
//! Invariants:
//! - They are a part of the version's counters and end with it.
//! - Only the thread of the shadows and readers of the page take the lock here; what the request
//!   path counts (copies that found no room) are atomics.
//! - Series are bounded: [`OUTPUTS_MAX`] outputs for each version that was compared with.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::families::{Versions, version_labels};
use super::page::{Family, Kind};
use crate::domain::{Version, WEIGHTS_MAX};

/// Outputs of a model that are compared; further ones are not.
pub const OUTPUTS_MAX: usize = 32;
/// Versions that one shadow is compared with, in the time that it is loaded.
const PRIMARIES_MAX: usize = WEIGHTS_MAX;

/// What became of a copy that was to be made for a shadow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ShadowOutcome {
    /// The shadow ran and its outputs were compared.
    Compared,
    /// The shadow could not take the inputs, or failed on them.
    Failed,
    /// The shadow was not done in time.
    Deadline,
    /// As many copies waited as may.
    QueueFull,
    /// The copies that waited or ran held as many bytes as they may.
    QueueBytes,
    /// Requests hold so many bytes that none are left for copies.
    Memory,
    /// No thread was free for it, or a request needed its place in the queue.
    Busy,
    /// The gateway is about to stop.
    Draining,
    /// The version that made the answer is gone.
    Retired,
}

impl ShadowOutcome {
    pub const ALL: [Self; 9] = [
        Self::Compared,
        Self::Failed,
        Self::Deadline,
        Self::QueueFull,
        Self::QueueBytes,
        Self::Memory,
        Self::Busy,
        Self::Draining,
        Self::Retired,
    ];

    /// Label of the metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Compared => "compared",
            Self::Failed => "failed",
            Self::Deadline => "deadline",
            Self::QueueFull => "queue_full",
            Self::QueueBytes => "queue_bytes",
            Self::Memory => "memory",
            Self::Busy => "busy",
            Self::Draining => "draining",
            Self::Retired => "retired",
        }
    }
}

/// How many predictions were compared, and how many of them agreed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Agreement {
    pub compared: u64,
    pub agreed: u64,
}

/// By the version that made the answer, and output.
type Agreements = BTreeMap<(Version, Arc<str>), Agreement>;

#[derive(Default)]
pub(super) struct ShadowCounts {
    outcomes: [AtomicU64; ShadowOutcome::ALL.len()],
    agreements: Mutex<Agreements>,
}

/// Folded numbers of one version.
#[derive(Clone, Debug, Default)]
pub(super) struct ShadowFold {
    pub(super) outcomes: [u64; ShadowOutcome::ALL.len()],
    pub(super) agreements: Agreements,
}

impl ShadowCounts {
    pub(super) fn ended(&self, outcome: ShadowOutcome) {
        self.outcomes[outcome as usize].fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn compared(&self, primary: Version, output: &Arc<str>, agreed: bool) {
        let mut agreements = self.agreements.lock();
        let key = (primary, Arc::clone(output));
        let room = agreements.len() < OUTPUTS_MAX * PRIMARIES_MAX;
        if room || agreements.contains_key(&key) {
            let agreement = agreements.entry(key).or_default();
            agreement.compared += 1;
            agreement.agreed += u64::from(agreed);
        }
    }

    pub(super) fn outcomes(&self) -> [u64; ShadowOutcome::ALL.len()] {
        self.outcomes.each_ref().map(|count| count.load(Ordering::Relaxed))
    }

    pub(super) fn fold(&self) -> ShadowFold {
        ShadowFold { outcomes: self.outcomes(), agreements: self.agreements.lock().clone() }
    }
}

impl ShadowFold {
    /// Joins what two instances of one version counted.
    pub(super) fn add(&mut self, other: Self) {
        for (total, more) in self.outcomes.iter_mut().zip(other.outcomes) {
            *total += more;
        }
        for (key, more) in other.agreements {
            let agreement = self.agreements.entry(key).or_default();
            agreement.compared += more.compared;
            agreement.agreed += more.agreed;
        }
    }
}

/// Of versions that were shadows: what became of the copies, and how far outputs agreed.
pub(super) fn families(versions: &Versions) -> [Family; 2] {
    let help = "Copies of requests for a shadow, by what became of them";
    let mut total = Family::new("tidegate_shadow_total", Kind::Counter, help);
    let help = "Share of the compared predictions whose output agreed, since the version loaded";
    let mut share = Family::new("tidegate_shadow_agreement", Kind::Gauge, help);
    for (key, view) in versions {
        let ShadowFold { outcomes, agreements } = &view.fold.shadow;
        if outcomes.iter().all(|count| *count == 0) {
            continue;
        }
        for (outcome, count) in ShadowOutcome::ALL.iter().zip(outcomes) {
            let mut labels = version_labels(key);
            labels.push(("outcome".into(), outcome.as_str().to_owned()));
            total.push(labels, *count as f64);
        }
        for ((primary, output), Agreement { compared, agreed }) in agreements {
            let mut labels = version_labels(key);
            labels.push(("primary".into(), primary.to_string()));
            labels.push(("output".into(), output.to_string()));
            share.push(labels, *agreed as f64 / (*compared).max(1) as f64);
        }
    }
    [total, share]
}
