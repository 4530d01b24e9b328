//! The thread `monitor`: counts what was offered, judges windows, keeps the state.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Instant;

use super::arm::ArmState;
use super::compare::Comparisons;
use super::memory::{TEXTS_MAX, learner_weight, weight_of};
use super::report::{ReferenceReport, VersionReport};
use super::state::{self, StateDir};
use super::{
    ALL, ARMS_MAX, Freeze, FreezeError, Given, Id, NOTHING, Offer, Reference, Reports, STABLE,
    Settings, Shared, TURN, Watch,
};
use crate::domain::{Arm, Digest};
use crate::drift::feature::{Feature, Role, Value};
use crate::drift::learn::{LearnSettings, Learner};
use crate::drift::profile::{FeatureProfile, Profile};
use crate::drift::rows::{Plan, Scratch};
use crate::panics::caught;

/// Judging windows takes one part in so many of the thread's time.
const JUDGE_SHARE: u32 = 50;
/// Why nothing is watched of a version.
const FULL: &str = "as many features as monitor.features_max are watched already";
/// Names of arms that always have a place.
const OWN_ARMS: [&str; 3] = ["stable", "canary", "pinned"];

pub(super) struct Desk {
    shared: Arc<Shared>,
    watched: HashMap<Id, Watched>,
    comparisons: Comparisons,
    judge_at: Option<Instant>,
    memory: Memory,
}

/// A row's, to be used again.
#[derive(Default)]
pub(super) struct Memory {
    pub(super) scratch: Scratch,
    odd: Vec<bool>,
}

/// A version and what is known of it.
struct Watched {
    watch: Weak<Watch>,
    number: u64,
    dir: StateDir,
    basis: Basis,
    plan: Plan,
    arms: BTreeMap<String, ArmState>,
    /// Whether values of each feature of the reference may be seen.
    told: Vec<bool>,
    /// What is odd about the reference.
    note: Option<String>,
    /// Features that an arm, or learning, takes the memory of.
    weight: usize,
}

/// What rows are compared with.
enum Basis {
    Known {
        profile: Arc<Profile>,
        digest: Digest,
        kind: &'static str,
    },
    Learning(Box<Learner>),
    /// There is room for fewer features than it has.
    Full {
        features: usize,
    },
    Nothing(String),
}

impl Desk {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            watched: HashMap::new(),
            comparisons: Comparisons::default(),
            judge_at: None,
            memory: Memory::default(),
        }
    }

    pub(super) fn run(mut self) {
        state::sweep(&self.shared.settings.dir);
        loop {
            let (freeze, stop) = self.wait();
            // A panic must not end the watch for good; the hook has told where it was.
            if caught(|| self.round(freeze, stop)).is_none() {
                tracing::error!("the monitor has panicked, and counts anew");
                self.watched.clear();
                self.comparisons = Comparisons::default();
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
        // Before the list of versions is read: whoever made an offer is on it then.
        let offers = self.shared.intake.all();
        self.follow_versions();
        for offer in offers {
            self.take(&offer);
            self.shared.intake.done(offer.bytes);
        }
        self.compare();
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
        let began = Instant::now();
        if self.judge_at.is_none_or(|at| began >= at) {
            self.publish();
            // However much there is to judge, it is a small part of the time.
            let apart = self.shared.settings.interval.max(began.elapsed() * JUDGE_SHARE);
            self.judge_at = Some(began + apart);
        }
    }

    /// Begins to watch versions that came, and forgets those that went.
    fn follow_versions(&mut self) {
        let watches: Vec<Arc<Watch>> = {
            let mut watches = self.shared.watches.lock();
            watches.retain(|watch| watch.strong_count() > 0);
            watches.iter().filter_map(Weak::upgrade).collect()
        };
        let there: HashSet<&Id> = watches.iter().map(|watch| &watch.id).collect();
        self.watched.retain(|id, watched| {
            let stays = there.contains(id);
            if !stays {
                watched.keep();
            }
            stays
        });
        for watch in &watches {
            let others = self.watched.iter().filter(|(id, _)| **id != watch.id);
            let features: usize = others.map(|(_, watched)| watched.features()).sum();
            let settings = &self.shared.settings;
            let left = settings.features_max.saturating_sub(features);
            if let Some(known) = self.watched.get_mut(&watch.id) {
                if known.is_as_given(watch) && known.fits(watch) && !known.finds_room(left) {
                    known.follow(watch, settings);
                    continue;
                }
                known.keep();
            }
            let watched = Watched::new(watch, settings, left);
            self.watched.insert(watch.id.clone(), watched);
        }
    }

    fn take(&mut self, offer: &Offer) {
        let watch = &offer.watch;
        let compared = self.comparisons.take(watch, offer, &mut self.memory);
        if !self.count(watch, offer) && !compared {
            let rows = rows_of(watch, offer) as u64;
            watch.skipped.fetch_add(rows, Ordering::Relaxed);
        }
    }

    /// Counts a call's rows against its version's reference; whether they were.
    fn count(&mut self, watch: &Watch, offer: &Offer) -> bool {
        let settings = &self.shared.settings;
        let Some(watched) = self.watched.get_mut(&watch.id) else { return false };
        let more = watched.features_of_arm(offer);
        if more > 0 {
            let features: usize = self.watched.values().map(Watched::features).sum();
            if features + more > settings.features_max {
                return false;
            }
        }
        let Some(watched) = self.watched.get_mut(&watch.id) else { return false };
        watched.take(watch, offer, settings, &mut self.memory)
    }

    /// Follows who is compared, and says what was found.
    fn compare(&mut self) {
        let mut asked = self.shared.compared.lock();
        if asked.is_empty() && self.comparisons.is_empty() {
            return;
        }
        let watched = &self.watched;
        self.comparisons.follow(&mut asked, |model, version| {
            let of = watched.iter().filter(|(id, _)| id.model == *model && id.version == version);
            of.max_by_key(|(_, watched)| watched.number)?.1.watch.upgrade()
        });
        for watch in self.watched.values().filter_map(|watched| watched.watch.upgrade()) {
            self.comparisons.tell(&watch);
        }
    }

    fn freeze(&mut self, wish: &Freeze) -> Result<Arc<VersionReport>, FreezeError> {
        let is = |id: &Id| id.model == wish.model && id.version == wish.version;
        let found = self.watched.iter_mut().filter(|(id, _)| is(id));
        let newest = found.max_by_key(|(_, watched)| watched.number);
        let Some((id, watched)) = newest else { return Err(FreezeError::Unknown(wish.version)) };
        watched.freeze(self.shared.settings.provisional_rows)?;
        let report = Arc::new(watched.report(id));
        let key = (id.model.clone(), id.version);
        self.shared.reports.lock().insert(key, Arc::clone(&report));
        Ok(report)
    }

    fn publish(&mut self) {
        let mut found: Vec<_> = self.watched.iter_mut().collect();
        // Of two that are one version, since its bytes are being replaced, the newer one is told of.
        found.sort_by_key(|(_, watched)| watched.number);
        let reports = found
            .into_iter()
            .map(|(id, watched)| ((id.model.clone(), id.version), Arc::new(watched.report(id))));
        let reports: Reports = reports.collect();
        *self.shared.reports.lock() = reports;
    }
}

impl Watched {
    /// `left`: features that may still be watched.
    fn new(watch: &Arc<Watch>, settings: &Settings, left: usize) -> Self {
        let dir = StateDir::new(&settings.dir, &watch.id);
        let mut watched = Self {
            watch: Arc::downgrade(watch),
            number: watch.number,
            dir,
            basis: Basis::Nothing("none of its inputs and outputs can be watched".to_owned()),
            plan: Plan::new([]),
            arms: BTreeMap::new(),
            told: Vec::new(),
            note: None,
            weight: 0,
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
        let features = match &known {
            Some(((profile, _), _)) => weight_of(profile),
            None => watch.features.iter().map(|feature| learner_weight(feature, settings)).sum(),
        };
        if features > left {
            watched.basis = Basis::Full { features };
        } else if let Some((reference, kind)) = known {
            let now = jiff::Timestamp::now().as_second();
            watched.arms = watched.dir.arms(&reference);
            while watched.arms.len().saturating_mul(features) > left && watched.arms.len() > 1 {
                watched.arms.pop_last();
            }
            for arm in watched.arms.values_mut() {
                arm.begin_latest(&reference.0, settings.window_values);
                arm.turn(&reference.0, now);
            }
            watched.note = strangers(&reference.0, watch);
            watched.compare_with(reference, kind, watch, settings);
        } else if !watch.features.is_empty() {
            watched.learn(watch, settings);
        }
        watched.tell(watch);
        watched
    }

    /// Says whose rows are looked at.
    fn tell(&self, watch: &Watch) {
        let wanted = match self.basis {
            Basis::Known { .. } => ALL,
            Basis::Learning(_) => STABLE,
            Basis::Full { .. } | Basis::Nothing(_) => NOTHING,
        };
        watch.wanted.store(wanted, Ordering::Relaxed);
    }

    /// Whether it is compared with what the version's files said last. If so, that is not looked at again.
    fn is_as_given(&self, watch: &Watch) -> bool {
        let mut given = watch.given.lock();
        let same = match (&*given, &self.basis) {
            (Given::AsBefore, _) => true,
            (Given::File(bytes, _), Basis::Known { digest, kind: "file", .. }) => {
                Profile::digest(bytes) == *digest
            }
            (Given::File(..), _)
            | (Given::Nothing, Basis::Known { kind: "file", .. } | Basis::Full { .. }) => false,
            (Given::Nothing, _) => true,
        };
        if same {
            *given = Given::AsBefore;
        }
        same
    }

    /// Whether what is being learnt is what this watch has.
    fn fits(&self, watch: &Watch) -> bool {
        match &self.basis {
            Basis::Learning(learner) => learner.features() == watch.features,
            _ => true,
        }
    }

    /// Goes on with a watch that came later: the version was loaded again.
    fn follow(&mut self, watch: &Arc<Watch>, settings: &Settings) {
        if watch.number <= self.number {
            return;
        }
        if let Some(before) = self.watch.upgrade() {
            let skipped = before.skipped.load(Ordering::Relaxed);
            watch.skipped.fetch_add(skipped, Ordering::Relaxed);
        }
        (self.watch, self.number) = (Arc::downgrade(watch), watch.number);
        if let Basis::Known { profile, .. } = &self.basis {
            let profile = Arc::clone(profile);
            self.hide(&profile, watch, settings);
        }
        self.tell(watch);
    }

    /// Keeps and tells no values of tensors that nobody is to see.
    fn hide(&mut self, profile: &Profile, watch: &Watch, settings: &Settings) {
        let told = |feature: &FeatureProfile| {
            settings.new_categories && !watch.hidden.contains(&feature.feature.tensor)
        };
        self.told = profile.features.iter().map(told).collect();
        for arm in self.arms.values_mut() {
            arm.hide(&self.told);
        }
    }

    /// Whether there is room now, and was none.
    fn finds_room(&self, left: usize) -> bool {
        matches!(self.basis, Basis::Full { features } if features <= left)
    }

    fn learn(&mut self, watch: &Watch, settings: &Settings) {
        let sample_max = usize::try_from(settings.provisional_rows).unwrap_or(usize::MAX);
        let how = LearnSettings { sample_max, texts_max: TEXTS_MAX, ..LearnSettings::default() };
        self.plan = Plan::new(&watch.features);
        let weights = watch.features.iter().map(|feature| learner_weight(feature, settings));
        self.weight = weights.sum();
        self.basis = match Learner::new(watch.features.clone(), how) {
            Ok(learner) => Basis::Learning(Box::new(learner)),
            Err(error) => Basis::Nothing(error.to_string()),
        };
    }

    fn compare_with(
        &mut self,
        (profile, digest): Reference,
        kind: &'static str,
        watch: &Watch,
        settings: &Settings,
    ) {
        self.hide(&profile, watch, settings);
        self.plan = Plan::new(profile.features.iter().map(|feature| &feature.feature));
        self.weight = weight_of(&profile);
        self.basis = Basis::Known { profile, digest, kind };
    }

    /// Features that are held in memory, of all arms.
    fn features(&self) -> usize {
        match &self.basis {
            Basis::Known { .. } => self.weight * self.arms.len().max(1),
            Basis::Learning(_) => self.weight,
            Basis::Full { .. } | Basis::Nothing(_) => 0,
        }
    }

    /// How many more that would be with the arm of this call.
    fn features_of_arm(&self, offer: &Offer) -> usize {
        // The first arm's are counted already.
        let is_new = !self.arms.is_empty() && !self.arms.contains_key(offer.arm.as_str());
        if is_new { self.weight } else { 0 }
    }

    /// Counts a call's rows; whether they were.
    fn take(
        &mut self,
        watch: &Watch,
        offer: &Offer,
        settings: &Settings,
        memory: &mut Memory,
    ) -> bool {
        let rows = rows_of(watch, offer);
        let Memory { scratch, odd } = memory;
        match &mut self.basis {
            Basis::Full { .. } | Basis::Nothing(_) => return false,
            Basis::Learning(_) if offer.arm != Arm::Stable => return false,
            Basis::Learning(learner) => {
                read(&self.plan, watch, offer, scratch, |_, feature, value| {
                    learner.add(feature, value);
                });
                if learner.rows() >= settings.provisional_rows {
                    self.learnt(watch, settings);
                }
            }
            Basis::Known { profile, .. } => {
                let name = offer.arm.as_str();
                if !self.arms.contains_key(name) {
                    let own = |name: &str| OWN_ARMS.contains(&name);
                    let rules = self.arms.keys().filter(|name| !own(name)).count();
                    if !own(name) && rules >= ARMS_MAX - OWN_ARMS.len() {
                        return false;
                    }
                    let now = jiff::Timestamp::now().as_second();
                    let state = ArmState::new(profile, now, settings.window_values);
                    self.arms.insert(name.to_owned(), state);
                }
                let Some(arm) = self.arms.get_mut(name) else { return false };
                let mut counting = arm.counting(profile, rows, odd, &self.told);
                read(&self.plan, watch, offer, scratch, |row, feature, value| {
                    counting.add(row, feature, value);
                });
                counting.end();
            }
        }
        true
    }

    /// The rows that were learnt from become the reference.
    fn learnt(&mut self, watch: &Watch, settings: &Settings) {
        let before = std::mem::replace(&mut self.basis, Basis::Nothing(String::new()));
        let Basis::Learning(learner) = before else { return };
        let of = (watch.id.model.clone(), Some(watch.id.version));
        let profile = match learner.finish(of, "traffic", jiff::Timestamp::now()) {
            Ok(learnt) => Profile { provisional: true, ..learnt.profile },
            Err(error) => {
                self.basis = Basis::Nothing(error.to_string());
                self.tell(watch);
                return;
            }
        };
        let (model, version) = (&watch.id.model, watch.id.version);
        match self.dir.keep_learnt(&profile) {
            Ok(digest) => {
                let rows = profile.source.rows;
                tracing::info!(%model, %version, rows, "a provisional reference was learnt");
                let reference = (Arc::new(profile), digest);
                self.compare_with(reference, "provisional", watch, settings);
            }
            Err(error) => {
                tracing::warn!(%error, %model, %version, "a learnt reference cannot be kept");
                self.note = Some(format!("it could not be kept: {error}"));
                let nowhere = Digest::new([0; 32]);
                let reference = (Arc::new(profile), nowhere);
                self.compare_with(reference, "provisional", watch, settings);
            }
        }
        self.tell(watch);
    }

    fn freeze(&mut self, wanted: u64) -> Result<(), FreezeError> {
        match &self.basis {
            Basis::Known { kind: "file", .. } => Err(FreezeError::Given),
            Basis::Known { kind: "frozen", .. } => Ok(()),
            Basis::Known { profile, .. } => {
                let profile = Profile { provisional: false, ..Profile::clone(profile) };
                let digest = self.dir.keep_frozen(&profile)?;
                self.basis = Basis::Known { profile: Arc::new(profile), digest, kind: "frozen" };
                self.keep();
                Ok(())
            }
            Basis::Learning(learner) => Err(FreezeError::Learning { have: learner.rows(), wanted }),
            Basis::Full { .. } => Err(FreezeError::Nothing(FULL.to_owned())),
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
        if turned {
            // One that nobody asks any more makes room for another.
            self.arms.retain(|_, arm| !arm.is_idle());
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
        let watch = self.watch.upgrade();
        let reference = match &self.basis {
            Basis::Known { profile, digest, kind } => ReferenceReport {
                kind,
                rows: profile.source.rows,
                digest: Some(digest.to_string()),
                source: Some(profile.source.uri.clone()),
                problem: self.note.clone(),
                without: watch.as_ref().map_or_else(Vec::new, |watch| watch.without(profile)),
            },
            Basis::Learning(learner) => {
                ReferenceReport { kind: "learning", rows: learner.rows(), ..Default::default() }
            }
            Basis::Full { .. } => {
                let problem = Some(FULL.to_owned());
                ReferenceReport { kind: "none", problem, ..Default::default() }
            }
            Basis::Nothing(why) => {
                ReferenceReport { kind: "none", problem: Some(why.clone()), ..Default::default() }
            }
        };
        let mut arms = Vec::new();
        if let Basis::Known { profile, .. } = &self.basis {
            arms.extend(self.arms.iter_mut().map(|(name, arm)| arm.report(name, profile)));
        }
        let skipped = watch.map(|watch| watch.skipped.load(Ordering::Relaxed));
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

/// What to say of a profile that is another model's, as a whole or in part.
fn strangers(profile: &Profile, watch: &Watch) -> Option<String> {
    let known = |feature: &Feature| {
        let names = if feature.role == Role::Input { &watch.inputs } else { &watch.outputs };
        names.contains(&feature.tensor)
    };
    let strange = profile.features.iter().filter(|of| !known(&of.feature)).count();
    let all = profile.features.len();
    (strange > 0).then(|| format!("{strange} of its {all} features are of tensors that it has not"))
}

fn rows_of(watch: &Watch, offer: &Offer) -> usize {
    match offer.inputs.first().or(offer.outputs.first()) {
        Some(tensor) if watch.batched => tensor.shape().first().copied().unwrap_or(1),
        _ => 1,
    }
}

/// Every value of a call.
pub(super) fn read(
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
