//! Outputs of two versions of one model, counted in the same cells while somebody wants to know: for
//! the guard of a rollout.
//!
//! Each version's own counters are of its own reference's cells, which are not another's, and may have
//! no outputs at all. Here the first rows of the stable version say what the cells are; then the rows
//! of both are counted in them.
//!
//! Invariants:
//! - Only rows that the split sent are counted, whatever it calls the version: who names one is no
//!   random sample.
//! - Rows that the cells were learnt from are not counted: they would fit them too well.
//! - Who does not ask for [`KEPT_FOR`] is forgotten; nobody has to say that he is gone.
//! - Counts of one [`Compared::epoch`] only grow. Another epoch has other cells, and begins at nothing.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::desk::{Memory, read};
use super::memory::TEXTS_MAX;
use super::{Offer, Watch};
use crate::domain::{Arm, Digest, ModelName, Version};
use crate::drift::counters::Counters;
use crate::drift::feature::{Feature, Role};
use crate::drift::learn::{LearnSettings, Learner};
use crate::drift::profile::Profile;
use crate::drift::rows::Plan;

/// A comparison ends when nobody has asked for it for so long.
const KEPT_FOR: Duration = Duration::from_secs(60);
/// Rows of the stable version that the cells are learnt from.
pub(super) const LEARN_ROWS: u64 = 500;
/// Cells of one version that are counted, of all features together; features beyond it are left out.
pub(super) const CELLS_MAX: usize = 2048;

/// Who is compared, for whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pair {
    pub model: ModelName,
    pub stable: Version,
    pub candidate: Version,
}

/// Rows of both versions so far.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Compared {
    /// Counts of another epoch are in other cells.
    pub epoch: u64,
    pub features: Vec<ComparedFeature>,
    /// Features that are not counted: they have no cells, or there is no room.
    pub left_out: usize,
    /// Why nothing is counted.
    pub problem: Option<String>,
}

/// Rows in each cell of one output feature; the last are those without a value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ComparedFeature {
    pub name: String,
    pub stable: Vec<u64>,
    pub candidate: Vec<u64>,
}

/// What was asked for, by whom: a rollout's id.
pub(super) type Asked = HashMap<String, Wanted>;

pub(super) struct Wanted {
    pair: Pair,
    at: Instant,
    seen: Arc<Compared>,
}

/// Asks for a comparison, which begins if it has not; what it has found so far.
pub(super) fn ask(asked: &mut Asked, of: &str, pair: &Pair) -> Arc<Compared> {
    let now = Instant::now();
    match asked.get_mut(of) {
        Some(wanted) if wanted.pair == *pair => {
            wanted.at = now;
            Arc::clone(&wanted.seen)
        }
        _ => {
            let seen = Arc::<Compared>::default();
            let wanted = Wanted { pair: pair.clone(), at: now, seen: Arc::clone(&seen) };
            asked.insert(of.to_owned(), wanted);
            seen
        }
    }
}

/// The comparisons that the thread counts for.
#[derive(Default)]
pub(super) struct Comparisons {
    running: HashMap<String, Comparison>,
    epochs: u64,
}

struct Comparison {
    pair: Pair,
    epoch: u64,
    /// The stable version's.
    digest: Option<Digest>,
    basis: Basis,
    /// Something came since it was shown last.
    changed: bool,
}

/// Which of the two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Stable,
    Candidate,
}

enum Basis {
    Learning { learner: Box<Learner>, plan: Plan },
    Known(Box<Sides>),
    Nothing(String),
}

struct Sides {
    profile: Profile,
    plan: Plan,
    /// Places in the profile's list.
    features: Vec<usize>,
    left_out: usize,
    stable: Vec<Counters>,
    candidate: Vec<Counters>,
}

impl Comparisons {
    pub(super) fn is_empty(&self) -> bool {
        self.running.is_empty()
    }

    /// Takes up what was asked for, shows what was found, and forgets what nobody asks for.
    pub(super) fn follow(
        &mut self,
        asked: &mut Asked,
        watch: impl Fn(&ModelName, Version) -> Option<Arc<Watch>>,
    ) {
        let now = Instant::now();
        asked.retain(|_, wanted| now.saturating_duration_since(wanted.at) < KEPT_FOR);
        self.running
            .retain(|of, running| asked.get(of).is_some_and(|wanted| wanted.pair == running.pair));
        for (of, wanted) in asked {
            let running = self.running.entry(of.clone()).or_insert_with(|| Comparison {
                pair: wanted.pair.clone(),
                epoch: 0,
                digest: None,
                basis: Basis::Nothing("the stable version is not watched yet".to_owned()),
                changed: true,
            });
            // One that is loaded again is not there for a moment.
            if let Some(stable) = watch(&wanted.pair.model, wanted.pair.stable)
                && running.digest != Some(stable.id.digest)
            {
                self.epochs += 1;
                running.begin(self.epochs, &stable);
            }
            if std::mem::take(&mut running.changed) {
                wanted.seen = Arc::new(running.compared());
            }
        }
    }

    /// Has the versions that are compared leave their rows, and no others that do not want to.
    pub(super) fn tell(&self, watch: &Watch) {
        let wanted = self.running.values().any(|running| running.side_of(watch).is_some());
        watch.compared.store(wanted, Ordering::Relaxed);
    }

    /// Counts a call's rows; whether anybody wanted them.
    pub(super) fn take(&mut self, watch: &Watch, offer: &Offer, memory: &mut Memory) -> bool {
        if !Arm::SPLIT.contains(&offer.arm) {
            return false;
        }
        let mut taken = false;
        for running in self.running.values_mut() {
            if let Some(side) = running.side_of(watch) {
                running.take(side, watch, offer, memory);
                taken = true;
            }
        }
        taken
    }
}

impl Comparison {
    /// Whose rows this version's are.
    fn side_of(&self, watch: &Watch) -> Option<Side> {
        let Pair { model, stable, candidate } = &self.pair;
        match watch.id.version {
            _ if watch.id.model != *model => None,
            version if version == *stable => Some(Side::Stable),
            version if version == *candidate => Some(Side::Candidate),
            _ => None,
        }
    }

    fn begin(&mut self, epoch: u64, stable: &Watch) {
        (self.epoch, self.digest, self.changed) = (epoch, Some(stable.id.digest), true);
        let outputs = stable.features.iter().filter(|feature| feature.role == Role::Output);
        let outputs: Vec<Feature> = outputs.cloned().collect();
        let plan = Plan::new(&outputs);
        let sample_max = usize::try_from(LEARN_ROWS).unwrap_or(usize::MAX);
        let how = LearnSettings { sample_max, texts_max: TEXTS_MAX, ..LearnSettings::default() };
        self.basis = match Learner::new(outputs, how) {
            Ok(learner) => Basis::Learning { learner: Box::new(learner), plan },
            Err(error) => Basis::Nothing(format!("no output can be watched: {error}")),
        };
    }

    fn take(&mut self, side: Side, watch: &Watch, offer: &Offer, memory: &mut Memory) {
        self.changed = true;
        match &mut self.basis {
            Basis::Learning { learner, plan } if side == Side::Stable => {
                read(plan, watch, offer, &mut memory.scratch, |_, feature, value| {
                    learner.add(feature, value);
                });
                if learner.rows() >= LEARN_ROWS {
                    self.learnt();
                }
            }
            Basis::Learning { .. } | Basis::Nothing(_) => {}
            Basis::Known(sides) => {
                let Sides { profile, plan, features, stable, candidate, .. } = &mut **sides;
                let counters = if side == Side::Stable { stable } else { candidate };
                read(plan, watch, offer, &mut memory.scratch, |_, at, value| {
                    let of = features.get(at).and_then(|of| profile.features.get(*of));
                    if let (Some(of), Some(counters)) = (of, counters.get_mut(at)) {
                        of.add(counters, value);
                    }
                });
            }
        }
    }

    fn learnt(&mut self) {
        let before = std::mem::replace(&mut self.basis, Basis::Nothing(String::new()));
        let Basis::Learning { learner, .. } = before else { return };
        let of = (self.pair.model.clone(), Some(self.pair.stable));
        self.basis = match learner.finish(of, "traffic", jiff::Timestamp::now()) {
            Ok(learnt) => Basis::Known(Box::new(Sides::new(learnt.profile))),
            Err(error) => Basis::Nothing(format!("no output can be compared: {error}")),
        };
    }

    fn compared(&self) -> Compared {
        let sides = match &self.basis {
            Basis::Known(sides) => sides,
            Basis::Learning { learner, .. } => {
                let rows = learner.rows();
                let problem = format!(
                    "{rows} of {LEARN_ROWS} rows of the stable version's, from which the cells are learnt"
                );
                let (epoch, problem) = (self.epoch, Some(problem));
                return Compared { epoch, problem, ..Compared::default() };
            }
            Basis::Nothing(problem) => {
                let (epoch, problem) = (self.epoch, Some(problem.clone()));
                return Compared { epoch, problem, ..Compared::default() };
            }
        };
        let counted = sides.features.iter().zip(sides.stable.iter().zip(&sides.candidate));
        let features = counted.filter_map(|(at, (stable, candidate))| {
            let of = sides.profile.features.get(*at)?;
            let cells = |counters: &Counters| {
                let mut cells = of.cells(counters);
                cells.push(counters.rows() - counters.len());
                cells
            };
            Some(ComparedFeature {
                name: of.feature.name.clone(),
                stable: cells(stable),
                candidate: cells(candidate),
            })
        });
        Compared {
            epoch: self.epoch,
            features: features.collect(),
            left_out: sides.left_out,
            problem: sides.features.is_empty().then(|| "no output can be compared".to_owned()),
        }
    }
}

impl Sides {
    fn new(profile: Profile) -> Self {
        let (mut features, mut left_out, mut cells) = (Vec::new(), 0, 0);
        for (at, of) in profile.features.iter().enumerate() {
            // And one of rows without a value.
            let more = of.cells(&of.own()).len() + 1;
            if more == 1 || cells + more > CELLS_MAX {
                left_out += 1;
                continue;
            }
            cells += more;
            features.push(at);
        }
        let counters = || features.iter().map(|at| profile.features[*at].counters()).collect();
        let plan = Plan::new(features.iter().map(|at| &profile.features[*at].feature));
        let (stable, candidate) = (counters(), counters());
        Self { plan, left_out, stable, candidate, features, profile }
    }
}
