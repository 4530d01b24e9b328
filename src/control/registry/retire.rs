//! Takes versions out of service and lets them go once their requests are done.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Shared;
use crate::control::call::Call;
use crate::control::turns;
use crate::control::view::Life;
use crate::domain::{Failure, ModelName, Version};
use crate::engine::release_memory;
use crate::route::Served;

/// How often a retired version is looked at.
const DRAIN_POLL: Duration = Duration::from_millis(5);
/// After this long, a version without requests is let go even if its `Arc` is still held.
const DRAIN_HELD_MAX: Duration = Duration::from_secs(1);

impl Shared {
    /// Takes the versions out of service that are neither `chosen` nor named by anything, but for
    /// the one that answers who names none.
    pub(super) fn retire_others(
        &self,
        model: &ModelName,
        chosen: &BTreeSet<Version>,
        warm: bool,
        call: &Call,
    ) {
        let mut gone = Vec::new();
        self.overseer().undisturbed(&mut || {
            let named = self.overseer().named(model, warm);
            let there = self.board.loaded(model);
            let unwanted: Vec<Version> = there
                .iter()
                .map(|served| served.version)
                .filter(|version| !chosen.contains(version) && !named.contains(version))
                .collect();
            if !unwanted.is_empty() {
                gone = self.board.remove(model, &unwanted);
            }
        });
        for served in gone {
            self.enter(model, served.version, Life::Draining, "not kept any more");
            self.retire_aside(served, call.clone());
        }
    }

    /// Lets a version that was replaced go, without keeping anyone waiting.
    pub(super) fn drop_aside(&self, served: Arc<Served>) {
        let longest = self.preparer.settings().drain_max;
        aside(move || drain(served, longest));
    }

    /// As [`Shared::drop_aside`], and says so when it is gone.
    fn retire_aside(&self, served: Arc<Served>, call: Call) {
        let longest = self.preparer.settings().drain_max;
        let (model, version) = (served.model.clone(), served.version);
        let overseer = self.overseer.get().cloned();
        if let Some(known) = self.models.lock().get_mut(&model)
            && let Some(record) = known.versions.get_mut(&version)
        {
            record.enter(Life::Retired, "not kept any more");
            record.left_out = true;
        }
        aside(move || {
            drain(served, longest);
            if let Some(overseer) = overseer {
                overseer.entered(&model, version, Life::Retired, "not kept any more", &call);
            }
        });
    }

    /// A model that the source does not list any more goes on serving: a source that lies or forgets
    /// disturbs nobody. What was not serving is forgotten.
    pub(super) fn missing(&self, model: &ModelName) {
        let mut models = self.models.lock();
        let Some(known) = models.get_mut(model) else { return };
        known.versions.retain(|_, record| record.serves());
        for record in known.versions.values_mut() {
            let (state, reason) = (record.state, "gone from the source, serving on");
            if record.reason != reason {
                record.enter(state, reason);
            }
        }
        if known.versions.is_empty() {
            models.remove(model);
        }
    }

    pub(super) fn unload(&self, model: &ModelName, call: &Call) -> Result<(), Failure> {
        if !self.models.lock().contains_key(model) {
            let message = format!("failed to unload '{model}': it is not in the repository");
            return Err(Failure::not_found(message));
        }
        let versions: Vec<Version> =
            self.board.loaded(model).iter().map(|served| served.version).collect();
        if versions.is_empty() {
            return Ok(());
        }
        self.unload_versions(model, &versions, call)?;
        tracing::info!(%model, "model unloaded");
        Ok(())
    }

    pub(super) fn unload_versions(
        &self,
        model: &ModelName,
        versions: &[Version],
        call: &Call,
    ) -> Result<(), Failure> {
        let busy = self.busy(model);
        let _one = busy.lock();
        let gone = self.board.remove(model, versions);
        if gone.is_empty() {
            let named: Vec<String> = versions.iter().map(Version::to_string).collect();
            let message = format!("version {} of '{model}' is not loaded", named.join(", "));
            return Err(Failure::not_found(message));
        }
        for served in &gone {
            self.enter(model, served.version, Life::Draining, "");
        }
        let longest = self.preparer.settings().drain_max;
        for served in gone {
            let version = served.version;
            drain(served, longest);
            self.enter(model, version, Life::Retired, "unloaded");
            self.overseer().entered(model, version, Life::Retired, "unloaded", call);
        }
        release_memory();
        self.sweep();
        Ok(())
    }
}

fn aside(work: impl FnOnce() + Send + 'static) {
    let thread = std::thread::Builder::new().name("retire".to_owned()).spawn(move || {
        turns::shorten();
        work();
        release_memory();
    });
    if let Err(error) = thread {
        tracing::warn!(%error, "no thread to retire a version on");
    }
}

/// Waits until nobody uses the version, then drops it.
fn drain(served: Arc<Served>, longest: Duration) {
    let started = Instant::now();
    loop {
        let waited = started.elapsed();
        let held = Arc::strong_count(&served) > 1 && waited < DRAIN_HELD_MAX;
        if served.lane.in_flight() == 0 && !held {
            return;
        }
        if waited >= longest {
            let (model, version) = (&served.model, served.version);
            let requests = served.lane.in_flight();
            tracing::warn!(%model, %version, requests, "version retired with requests left");
            return;
        }
        std::thread::sleep(DRAIN_POLL);
    }
}
