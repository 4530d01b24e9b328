//! The thread `monitor`: counts what was offered, judges windows, keeps the state.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::arm::ArmState;
use super::report::{ReferenceReport, VersionReport};
use super::state::{self, StateDir};
use super::{
    ARMS_MAX, Freeze, FreezeError, Given, Id, Offer, Reference, Reports, Settings, Shared, TURN,
    Watch,
};
use crate::domain::{Arm, Digest};
use crate::drift::feature::{Role, Value};
use crate::drift::learn::{LearnSettings, Learner};
use crate::drift::profile::Profile;
use crate::drift::rows::{Plan, Scratch};
use crate::panics::caught;

pub(super) struct Desk {
    shared: Arc<Shared>,
    watched: HashMap<Id, Watched>,
    judged: Option<Instant>,
    memory: Memory,
}

/// A row's, to be used again.
#[derive(Default)]
struct Memory {
    scratch: Scratch,
    odd: Vec<bool>,
}

/// A version and what is known of it.
struct Watched {
    watch: Weak<Watch>,
    dir: StateDir,
    basis: Basis,
    plan: Plan,
    arms: BTreeMap<String, ArmState>,
}

/// What rows are compared with.
enum Basis {
    Known { profile: Arc<Profile>, digest: Digest, kind: &'static str },
    Learning(Box<Learner>),
    Nothing(String),
}

impl Desk {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, watched: HashMap::new(), judged: None, memory: Memory::default() }
    }

    pub(super) fn run(mut self) {
        state::sweep(&self.shared.settings.dir);
        loop {
            let (freeze, stop) = self.wait();
            // A panic must not end the watch for good; the hook has told where it was.
            if caught(|| self.round(freeze, stop)).is_none() {
                tracing::error!("the monitor has panicked, and counts anew");
                self.watched.clear();
            }
            if stop {
                return;
            }
        }
    }

    /// Until the next turn; what was asked for meanwhile.
    fn wait(&self) -> (Vec<Freeze>, bool) {
        let mut asked = self.shared.asked.lock();
        if !asked.stop && asked.freeze.is_empty() {
            self.shared.woken.wait_for(&mut asked, TURN);
        }
        (std::mem::take(&mut asked.freeze), asked.stop)
    }

    fn round(&mut self, freeze: Vec<Freeze>, stop: bool) {
        self.follow_versions();
        for offer in self.shared.intake.all() {
            self.take(&offer);
        }
        let now = jiff::Timestamp::now().as_second();
        for watched in self.watched.values_mut() {
            if watched.turn(now) || stop {
                watched.keep();
            }
        }
        for wish in freeze {
            let done = self.freeze(&wish);
            // Whoever asked may have gone.
            wish.answer.send(done).ok();
        }
        let interval = self.shared.settings.interval;
        if self.judged.is_none_or(|at| at.elapsed() >= interval) {
            self.judged = Some(Instant::now());
            self.publish();
        }
    }

    /// Begins to watch versions that came, and forgets those that went.
    fn follow_versions(&mut self) {
        let mut features: usize = self.watched.values().map(Watched::features).sum();
        let mut gone = Vec::new();
        for (id, watched) in &mut self.watched {
            if watched.watch.strong_count() == 0 {
                watched.keep();
                gone.push(id.clone());
            }
        }
        for id in gone {
            self.watched.remove(&id);
        }
        let mut watches = self.shared.watches.lock();
        watches.retain(|watch| watch.strong_count() > 0);
        let watches: Vec<_> = watches.iter().filter_map(Weak::upgrade).collect();
        for watch in watches {
            let known = self.watched.get(&watch.id);
            if known.is_some_and(|watched| watched.watch.strong_count() > 0) {
                continue;
            }
            let settings = &self.shared.settings;
            let left = settings.features_max.saturating_sub(features);
            let watched = Watched::new(&watch, settings, left);
            features += watched.features();
            self.watched.insert(watch.id.clone(), watched);
        }
    }

    fn take(&mut self, offer: &Offer) {
        let Some(watch) = offer.watch.upgrade() else { return };
        let features: usize = self.watched.values().map(Watched::features).sum();
        let left = self.shared.settings.features_max.saturating_sub(features);
        let Some(watched) = self.watched.get_mut(&watch.id) else { return };
        if !watched.take(&watch, offer, &self.shared.settings, left, &mut self.memory) {
            let rows = rows_of(&watch, offer) as u64;
            watch.skipped.fetch_add(rows, Ordering::Relaxed);
        }
    }

    fn freeze(&mut self, wish: &Freeze) -> Result<Arc<VersionReport>, FreezeError> {
        let is =
            |(id, _): &(&Id, &mut Watched)| id.model == wish.model && id.version == wish.version;
        let found = self.watched.iter_mut().find(is);
        let Some((id, watched)) = found else { return Err(FreezeError::Unknown(wish.version)) };
        watched.freeze(self.shared.settings.provisional_rows)?;
        let report = Arc::new(watched.report(id));
        let key = (id.model.clone(), id.version);
        self.shared.reports.lock().insert(key, Arc::clone(&report));
        Ok(report)
    }

    fn publish(&mut self) {
        let mut reports = Reports::new();
        for (id, watched) in &mut self.watched {
            if watched.watch.strong_count() > 0 {
                let report = Arc::new(watched.report(id));
                reports.insert((id.model.clone(), id.version), report);
            }
        }
        *self.shared.reports.lock() = reports;
    }
}

impl Watched {
    /// `left`: features that may still be watched.
    fn new(watch: &Arc<Watch>, settings: &Settings, left: usize) -> Self {
        let dir = StateDir::new(&settings.dir, &watch.id);
        let mut watched = Self {
            watch: Arc::downgrade(watch),
            dir,
            basis: Basis::Nothing("none of its inputs and outputs can be watched".to_owned()),
            plan: Plan::new([]),
            arms: BTreeMap::new(),
        };
        let learnt = || {
            let (profile, digest) = watched.dir.learnt()?;
            let kind = if profile.provisional { "provisional" } else { "frozen" };
            Some(((profile, digest), kind))
        };
        let given = std::mem::replace(&mut *watch.given.lock(), Given::AsBefore);
        let known = match given {
            Given::File(bytes, profile) => {
                if let Err(error) = watched.dir.keep_given(&bytes) {
                    let (model, version) = (&watch.id.model, watch.id.version);
                    tracing::warn!(%error, %model, %version, "its reference is not kept");
                }
                Some(((profile, Profile::digest(&bytes)), "file"))
            }
            Given::AsBefore => {
                watched.dir.given().map(|reference| (reference, "file")).or_else(learnt)
            }
            Given::Nothing => {
                watched.dir.forget_given();
                learnt()
            }
        };
        let count = known.as_ref().map_or(watch.features.len(), |((own, _), _)| own.features.len());
        if count > left {
            let max = settings.features_max;
            watched.basis = Basis::Nothing(format!("monitor.features_max = {max} are watched"));
        } else if let Some((reference, kind)) = known {
            watched.arms = watched.dir.arms(&reference);
            for arm in watched.arms.values_mut() {
                arm.begin_latest(&reference.0, settings.window_values);
            }
            watched.compare_with(reference, kind);
        } else if !watch.features.is_empty() {
            watched.learn(watch, settings);
        }
        watched
    }

    fn learn(&mut self, watch: &Watch, settings: &Settings) {
        let sample_max = usize::try_from(settings.provisional_rows).unwrap_or(usize::MAX);
        let how = LearnSettings { sample_max, ..LearnSettings::default() };
        self.plan = Plan::new(&watch.features);
        self.basis = match Learner::new(watch.features.clone(), how) {
            Ok(learner) => Basis::Learning(Box::new(learner)),
            Err(error) => Basis::Nothing(error.to_string()),
        };
    }

    fn compare_with(&mut self, (profile, digest): Reference, kind: &'static str) {
        self.plan = Plan::new(profile.features.iter().map(|feature| &feature.feature));
        self.basis = Basis::Known { profile, digest, kind };
    }

    /// Features that are held in memory, of all arms.
    fn features(&self) -> usize {
        match &self.basis {
            Basis::Known { profile, .. } => profile.features.len() * self.arms.len().max(1),
            Basis::Learning(learner) => learner.features().len(),
            Basis::Nothing(_) => 0,
        }
    }

    /// Counts a call's rows; whether they were.
    fn take(
        &mut self,
        watch: &Watch,
        offer: &Offer,
        settings: &Settings,
        left: usize,
        memory: &mut Memory,
    ) -> bool {
        let rows = rows_of(watch, offer);
        let Memory { scratch, odd } = memory;
        match &mut self.basis {
            Basis::Nothing(_) => return false,
            Basis::Learning(_) if offer.arm != Arm::Stable => return false,
            Basis::Learning(learner) => {
                read(&self.plan, watch, offer, scratch, |_, feature, value| {
                    learner.add(feature, value);
                });
                if learner.rows() >= settings.provisional_rows {
                    self.learnt(watch);
                }
            }
            Basis::Known { profile, .. } => {
                let name = offer.arm.as_str();
                if !self.arms.contains_key(name) {
                    // The first arm's features are counted already.
                    let more = if self.arms.is_empty() { 0 } else { profile.features.len() };
                    if self.arms.len() >= ARMS_MAX || more > left {
                        return false;
                    }
                    let now = jiff::Timestamp::now().as_second();
                    let state = ArmState::new(profile, now, settings.window_values);
                    self.arms.insert(name.to_owned(), state);
                }
                let Some(arm) = self.arms.get_mut(name) else { return false };
                let mut counting = arm.counting(profile, rows, odd);
                read(&self.plan, watch, offer, scratch, |row, feature, value| {
                    counting.add(row, feature, value);
                });
                counting.end();
            }
        }
        true
    }

    /// The rows that were learnt from become the reference.
    fn learnt(&mut self, watch: &Watch) {
        let before = std::mem::replace(&mut self.basis, Basis::Nothing(String::new()));
        let Basis::Learning(learner) = before else { return };
        let of = (watch.id.model.clone(), Some(watch.id.version));
        let profile = match learner.finish(of, "traffic", jiff::Timestamp::now()) {
            Ok(learnt) => Profile { provisional: true, ..learnt.profile },
            Err(error) => {
                self.basis = Basis::Nothing(error.to_string());
                return;
            }
        };
        let (model, version) = (&watch.id.model, watch.id.version);
        match self.dir.keep_learnt(&profile) {
            Ok(digest) => {
                let rows = profile.source.rows;
                tracing::info!(%model, %version, rows, "a provisional reference was learnt");
                self.compare_with((Arc::new(profile), digest), "provisional");
            }
            Err(error) => {
                tracing::warn!(%error, %model, %version, "a learnt reference cannot be kept");
                self.basis = Basis::Nothing(format!("it could not be kept: {error}"));
            }
        }
    }

    fn freeze(&mut self, wanted: u64) -> Result<(), FreezeError> {
        match &self.basis {
            Basis::Known { kind: "file", .. } => Err(FreezeError::Given),
            Basis::Known { kind: "frozen", .. } => Ok(()),
            Basis::Known { profile, .. } => {
                let profile = Profile { provisional: false, ..Profile::clone(profile) };
                let digest = self.dir.keep_learnt(&profile)?;
                self.basis = Basis::Known { profile: Arc::new(profile), digest, kind: "frozen" };
                self.keep();
                Ok(())
            }
            Basis::Learning(learner) => Err(FreezeError::Learning { have: learner.rows(), wanted }),
            Basis::Nothing(why) => Err(FreezeError::Nothing(why.clone())),
        }
    }

    /// Ends slots; whether any has ended.
    fn turn(&mut self, now: i64) -> bool {
        let Basis::Known { profile, .. } = &self.basis else { return false };
        let mut turned = false;
        for arm in self.arms.values_mut() {
            turned |= arm.turn(profile, now);
        }
        turned
    }

    fn keep(&mut self) {
        let Basis::Known { digest, .. } = &self.basis else { return };
        if self.arms.is_empty() {
            return;
        }
        let kept: io::Result<()> = self.dir.keep_arms(digest, &self.arms);
        if let Err(error) = kept {
            tracing::warn!(%error, dir = %self.dir.path().display(), "statistics are not kept");
        }
    }

    fn report(&mut self, id: &Id) -> VersionReport {
        let reference = match &self.basis {
            Basis::Known { profile, digest, kind } => ReferenceReport {
                kind,
                rows: profile.source.rows,
                digest: Some(digest.to_string()),
                source: Some(profile.source.uri.clone()),
                problem: None,
            },
            Basis::Learning(learner) => {
                ReferenceReport { kind: "learning", rows: learner.rows(), ..Default::default() }
            }
            Basis::Nothing(why) => {
                ReferenceReport { kind: "none", problem: Some(why.clone()), ..Default::default() }
            }
        };
        let mut arms = Vec::new();
        if let Basis::Known { profile, .. } = &self.basis {
            arms.extend(self.arms.iter_mut().map(|(name, arm)| arm.report(name, profile)));
        }
        let skipped = self.watch.upgrade().map(|watch| watch.skipped.load(Ordering::Relaxed));
        VersionReport {
            model: id.model.to_string(),
            version: id.version.to_string(),
            model_digest: id.digest.to_string(),
            reference,
            skipped_rows: skipped.unwrap_or(0),
            arms,
        }
    }
}

fn rows_of(watch: &Watch, offer: &Offer) -> usize {
    match offer.inputs.first().or(offer.outputs.first()) {
        Some(tensor) if watch.batched => tensor.shape().first().copied().unwrap_or(1),
        _ => 1,
    }
}

/// Every value of a call.
fn read(
    plan: &Plan,
    watch: &Watch,
    offer: &Offer,
    scratch: &mut Scratch,
    mut put: impl FnMut(usize, usize, Value<'_>),
) {
    let sides = [
        (Role::Input, &watch.inputs, &offer.inputs),
        (Role::Output, &watch.outputs, &offer.outputs),
    ];
    for (role, names, tensors) in sides {
        for (name, tensor) in names.iter().zip(tensors) {
            plan.read(role, name, tensor, watch.batched, scratch, &mut put);
        }
    }
}
