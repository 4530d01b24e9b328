//! Online statistics: what the rows of each version and arm look like now, against its reference.
//!
//! ```text
//! gateway ──answered──▶ Watch::offer ──nobody is woken──▶ queue (≤ items, ≤ bytes)
//!                            │ over the budget, or no room    │ the thread `monitor`, ten times a second
//!                            ▼                                ▼
//!                     counted as skipped   rows ─▶ counters of slots ─▶ scores, verdicts ─▶ Report
//!                                                       │ each slot        admin, metrics ◀───┘
//!                                                       └▶ <state>/monitor
//! ```
//!
//! Invariants:
//! - The answer is made before, and waits for nothing here. What is skipped is counted, and does not
//!   depend on what it holds.
//! - The work is bounded by a budget of values a second, the memory by a number of features, whatever
//!   comes; both are limits with a name.
//! - A version without a reference learns one from its first rows in the arm `stable`; it is
//!   *provisional*, and alerts nobody, until somebody freezes it.
//! - A restart continues the windows: at most the slot that was open is lost by `kill -9`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use crate::domain::{Arm, Digest, ModelName, Signature, Tensor, TensorSpec, Version};
use crate::drift::feature::{self, ELEMENTS_MAX, FEATURES_MAX, Feature, Role};
use crate::drift::profile::Profile;
use crate::observe::page::Family;

mod arm;
mod budget;
mod compare;
mod desk;
mod families;
mod form;
mod latest;
mod means;
mod memory;
mod report;
mod slots;
mod state;
#[cfg(test)]
mod tests;

pub use compare::{Compared, ComparedFeature, Pair};
pub use report::{
    ArmReport, Counted, FeatureReport, MeanReport, NewCategories, NewCategory, Odd, Oddities,
    ReferenceReport, VersionReport, WindowReport,
};

use budget::Budget;
use desk::Desk;

/// What an element of a tensor that is summed up costs of the budget: it is projected.
const ELEMENT_COST: usize = 4;
/// What of a version's rows is looked at; see [`Watch::wants`].
const NOTHING: u8 = 0;
const STABLE: u8 = 1;
const ALL: u8 = 2;

/// How often the thread takes what was offered.
const TURN: Duration = Duration::from_millis(100);
/// Arms of one version that are watched; rows of more are skipped.
pub const ARMS_MAX: usize = 8;

/// What the monitor may cost.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    pub enabled: bool,
    /// Values of features that are looked at in a second, of all models together; beyond it rows
    /// are skipped.
    pub values_per_second_max: u64,
    /// Calls that wait for the thread; more are skipped.
    pub queue_max: usize,
    /// Bytes of their tensors.
    pub queue_bytes_max: usize,
    /// How often windows are judged.
    pub interval: Duration,
    /// The latest values of a feature that are kept, where the reference has values to compare with.
    pub window_values: usize,
    /// Features that are watched, of all versions and arms together; of more, no statistics.
    pub features_max: usize,
    /// Rows that a reference is learnt from.
    pub provisional_rows: u64,
    /// Keep, and tell, which categories came that the reference lacks: values of inputs.
    pub new_categories: bool,
    /// Where the state lies.
    pub dir: PathBuf,
}

impl Settings {
    /// The usual limits, below a state folder.
    pub fn new(state_dir: &std::path::Path) -> Self {
        Self {
            enabled: true,
            values_per_second_max: 250_000,
            queue_max: 4096,
            queue_bytes_max: 16 << 20,
            interval: Duration::from_secs(10),
            window_values: crate::drift::window::WINDOW,
            features_max: 2000,
            provisional_rows: crate::drift::learn::PROVISIONAL_ROWS,
            new_categories: true,
            dir: state_dir.join("monitor"),
        }
    }
}

/// A reference and the digest of its file.
type Reference = (Arc<Profile>, Digest);

/// What a version's own files say its rows are like.
#[derive(Clone, Debug)]
pub enum Given {
    /// `reference.json`, its bytes and what they say.
    File(Arc<[u8]>, Arc<Profile>),
    Nothing,
    /// It was restored without its files: what they said when they were seen last.
    AsBefore,
}

/// The version that is watched.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Id {
    model: ModelName,
    version: Version,
    digest: Digest,
}

/// One version, to whoever answers its requests.
pub struct Watch {
    id: Id,
    intake: Arc<Intake>,
    inputs: Vec<String>,
    outputs: Vec<String>,
    batched: bool,
    features: Vec<Feature>,
    /// Tensors whose values nobody is to see.
    hidden: Vec<String>,
    /// Guards what its files say, until the thread has taken it.
    given: Mutex<Given>,
    /// Set by the thread.
    wanted: AtomicU8,
    /// Set by the thread while the version is one of two that are compared.
    compared: AtomicBool,
    /// Later watches have larger numbers.
    number: u64,
    /// Rows that nobody looked at.
    skipped: AtomicU64,
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Watch").field("id", &self.id).finish_non_exhaustive()
    }
}

/// A call that was answered. Its version stays watched until its rows are counted.
struct Offer {
    watch: Arc<Watch>,
    arm: Arm,
    inputs: Vec<Tensor>,
    outputs: Vec<Tensor>,
    bytes: usize,
}

/// Between those who answer and the thread.
struct Intake {
    budget: Budget,
    queue_max: usize,
    queue_bytes_max: usize,
    /// Guards what waits, for as long as one is put there or all are taken.
    queue: Mutex<Waiting>,
}

#[derive(Default)]
struct Waiting {
    offers: Vec<Offer>,
    bytes: usize,
    /// The thread has ended: offers would hold their watches, and those this, for ever.
    closed: bool,
}

impl Intake {
    fn new(settings: &Settings) -> Self {
        Self {
            budget: Budget::new(settings.values_per_second_max),
            queue_max: settings.queue_max,
            queue_bytes_max: settings.queue_bytes_max,
            queue: Mutex::default(),
        }
    }

    /// Whether there was room for it.
    fn put(&self, offer: Offer) -> bool {
        let mut queue = self.queue.lock();
        let bytes = queue.bytes + offer.bytes;
        let full = queue.offers.len() >= self.queue_max || bytes > self.queue_bytes_max;
        if queue.closed || full {
            return false;
        }
        queue.bytes = bytes;
        queue.offers.push(offer);
        true
    }

    fn all(&self) -> Vec<Offer> {
        std::mem::take(&mut self.queue.lock().offers)
    }

    /// Takes no more, and forgets what waits.
    fn close(&self) {
        let mut queue = self.queue.lock();
        queue.closed = true;
        let waiting = std::mem::take(&mut queue.offers);
        drop(queue);
        drop(waiting);
    }

    /// So many bytes are held no more.
    fn done(&self, bytes: usize) {
        let mut queue = self.queue.lock();
        queue.bytes = queue.bytes.saturating_sub(bytes);
    }
}

/// Reports by model and version.
type Reports = BTreeMap<(ModelName, Version), Arc<VersionReport>>;

struct Shared {
    settings: Settings,
    intake: Arc<Intake>,
    /// Versions so far.
    watched: AtomicU64,
    /// Guard lists, for as long as something is put there or read.
    watches: Mutex<Vec<Weak<Watch>>>,
    reports: Mutex<Reports>,
    /// Guards who is compared, for as long as it is asked for or shown.
    compared: Mutex<compare::Asked>,
    /// Guards what the thread was asked to do, which it sleeps on.
    asked: Mutex<Asked>,
    woken: Condvar,
}

#[derive(Default)]
struct Asked {
    freeze: Vec<Freeze>,
    stop: bool,
}

struct Freeze {
    model: ModelName,
    version: Version,
    answer: oneshot::Sender<Result<Arc<VersionReport>, FreezeError>>,
}

/// Why a reference is not frozen.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    #[error("version {0} is not watched")]
    Unknown(Version),
    #[error("its reference comes with its files")]
    Given,
    #[error("its reference has seen {have} rows of {wanted}")]
    Learning { have: u64, wanted: u64 },
    #[error("it has no reference: {0}")]
    Nothing(String),
    #[error("it cannot be kept: {0}")]
    State(#[from] std::io::Error),
    #[error("the gateway stops")]
    Stopped,
}

/// The thread that counts, and what it found; dropped, it ends.
pub struct Monitor {
    shared: Arc<Shared>,
    /// Guards the thread, for whoever ends it.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Monitor {
    /// Starts the thread; `None` when nothing is to be watched.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(settings: Settings) -> std::io::Result<Option<Arc<Self>>> {
        if !settings.enabled {
            return Ok(None);
        }
        let shared = Arc::new(Shared {
            intake: Arc::new(Intake::new(&settings)),
            settings,
            watched: AtomicU64::new(0),
            watches: Mutex::default(),
            reports: Mutex::default(),
            compared: Mutex::default(),
            asked: Mutex::default(),
            woken: Condvar::new(),
        });
        let desk = Desk::new(Arc::clone(&shared));
        let thread = std::thread::Builder::new().name("monitor".to_owned());
        let thread = thread.spawn(move || desk.run())?;
        Ok(Some(Arc::new(Self { shared, thread: Mutex::new(Some(thread)) })))
    }

    /// Watches a version from now on, for as long as the watch is held. `hidden` are tensors whose
    /// values nobody is to see: no report has one.
    pub fn watch(
        &self,
        model: &ModelName,
        version: Version,
        digest: Digest,
        signature: &Signature,
        given: Given,
        hidden: Vec<String>,
    ) -> Arc<Watch> {
        let names = |specs: &[TensorSpec]| specs.iter().map(|spec| spec.name.clone()).collect();
        let features = features_of(signature);
        let watch = Arc::new(Watch {
            id: Id { model: model.clone(), version, digest },
            intake: Arc::clone(&self.shared.intake),
            inputs: names(&signature.inputs),
            outputs: names(&signature.outputs),
            batched: signature.batched,
            features,
            hidden,
            given: Mutex::new(given),
            wanted: AtomicU8::new(ALL),
            compared: AtomicBool::new(false),
            number: self.shared.watched.fetch_add(1, Ordering::Relaxed),
            skipped: AtomicU64::new(0),
        });
        self.shared.watches.lock().push(Arc::downgrade(&watch));
        watch
    }

    /// What was found of a model's versions when they were judged last.
    pub fn reports(&self, model: &ModelName) -> Vec<Arc<VersionReport>> {
        let reports = self.shared.reports.lock();
        let of_model = reports.iter().filter(|((name, _), _)| name == model);
        of_model.map(|(_, report)| Arc::clone(report)).collect()
    }

    /// What two versions of a model answered since somebody with this name, a rollout's, asked first; to
    /// be asked again every few seconds, or it begins anew.
    pub fn compare(&self, of: &str, pair: &Pair) -> Arc<Compared> {
        compare::ask(&mut self.shared.compared.lock(), of, pair)
    }

    /// Makes a learnt reference one that alerts are made of.
    ///
    /// # Errors
    /// When there is none, or it cannot be written.
    pub async fn freeze(
        &self,
        model: &ModelName,
        version: Version,
    ) -> Result<Arc<VersionReport>, FreezeError> {
        let (answer, frozen) = oneshot::channel();
        {
            let mut asked = self.shared.asked.lock();
            if asked.stop {
                return Err(FreezeError::Stopped);
            }
            asked.freeze.push(Freeze { model: model.clone(), version, answer });
        }
        self.shared.woken.notify_all();
        frozen.await.unwrap_or(Err(FreezeError::Stopped))
    }

    /// For the metrics page.
    pub fn families(&self) -> Vec<Family> {
        let reports: Vec<_> = self.shared.reports.lock().values().map(Arc::clone).collect();
        families::of(&reports)
    }

    /// Writes the state down and ends the thread.
    pub fn stop(&self) {
        self.shared.asked.lock().stop = true;
        self.shared.woken.notify_all();
        if let Some(thread) = self.thread.lock().take()
            && thread.join().is_err()
        {
            tracing::error!("the monitor's thread had panicked");
        }
        self.shared.intake.close();
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.stop();
    }
}

/// What is watched of a model that has these tensors, if that is not too much.
fn features_of(signature: &Signature) -> Vec<Feature> {
    let of = |role, specs: &[TensorSpec]| -> Vec<Feature> {
        specs.iter().flat_map(|spec| feature::of_spec(role, spec, signature.batched)).collect()
    };
    let mut features = of(Role::Input, &signature.inputs);
    features.extend(of(Role::Output, &signature.outputs));
    if features.len() > FEATURES_MAX {
        features.clear();
    }
    features
}

impl Watch {
    /// Its files were read again.
    pub fn given(&self, given: Given) {
        *self.given.lock() = given;
    }

    /// Inputs and outputs that a profile has no feature of.
    fn without(&self, profile: &Profile) -> Vec<String> {
        let known = |role: Role, name: &str| {
            profile.features.iter().any(|of| of.feature.role == role && of.feature.tensor == name)
        };
        let inputs = self.inputs.iter().filter(|name| !known(Role::Input, name));
        let outputs = self.outputs.iter().filter(|name| !known(Role::Output, name));
        inputs.chain(outputs).cloned().collect()
    }

    /// Whether rows of this arm would be looked at.
    fn wants(&self, arm: &Arm) -> bool {
        match self.wanted.load(Ordering::Relaxed) {
            ALL => true,
            STABLE if *arm == Arm::Stable => true,
            _ => self.compared.load(Ordering::Relaxed),
        }
    }

    /// What a call costs of the budget: its features, and of what is summed up every element; twice that
    /// while it is compared with another version's as well.
    fn cost(&self, rows: usize, inputs: &[Tensor], outputs: &[Tensor]) -> u64 {
        let wide = |tensor: &Tensor| {
            let elements = tensor.elements();
            let summed_up = elements.checked_div(rows).is_some_and(|row| row > ELEMENTS_MAX);
            if summed_up { elements * ELEMENT_COST } else { 0 }
        };
        let summed_up: usize = inputs.iter().chain(outputs).map(wide).sum();
        let values = (rows as u64).saturating_mul(self.features.len() as u64);
        let times = 1 + u64::from(self.compared.load(Ordering::Relaxed));
        values.saturating_add(summed_up as u64).saturating_mul(times)
    }

    /// Leaves a call's tensors to be looked at, if there is room for them. Never waits.
    pub fn offer(self: &Arc<Self>, arm: &Arm, inputs: &[Tensor], outputs: &[Tensor]) {
        let rows = match inputs.first().or(outputs.first()) {
            Some(tensor) if self.batched => tensor.shape().first().copied().unwrap_or(1),
            _ => 1,
        };
        let leave = || {
            let bytes = inputs.iter().chain(outputs).map(|tensor| tensor.data().len()).sum();
            let (watch, arm) = (Arc::clone(self), arm.clone());
            let (inputs, outputs) = (inputs.to_vec(), outputs.to_vec());
            self.intake.put(Offer { watch, arm, inputs, outputs, bytes })
        };
        let values = self.cost(rows, inputs, outputs);
        if !self.wants(arm) || !self.intake.budget.take(values, Instant::now()) || !leave() {
            self.skipped.fetch_add(rows as u64, Ordering::Relaxed);
        }
    }
}
