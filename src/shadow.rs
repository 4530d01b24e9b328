//! Runs versions on copies of requests, for nobody, and compares what they say with the answers.
//!
//! ```text
//! gateway ──answered──▶ offer ──try_send──▶ queue (≤ queue_max, ≤ queue_bytes_max)
//!                         │ no room                  │
//!                         ▼                          ▼ the thread `shadow`
//!                   counted, dropped      bind ─▶ Lane::infer_spare ─▶ compare ─▶ Tally
//! ```
//!
//! Invariants:
//! - The answer is made before its copy is, and waits for nothing here: a copy that finds no room
//!   is dropped and counted.
//! - Copies share the request's bytes. How many they keep, waiting and running, has a limit.
//! - Shadows go first when anything is short: threads, memory, room in a lane's queue, time to stop.
//! - Nothing that a shadow does or fails to do changes an answer, or counts as a client's request.
//! - Comparing happens on a thread of its own.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::Instant;

use crate::domain::{Completion, ModelName, Tensor, Version};
use crate::ledger::Ledger;
use crate::observe::{Observer, ShadowOutcome};
use crate::route::{ModelRoutes, Pick, Served};

mod compare;
mod report;
mod run;
mod tally;

pub use compare::TOLERANCE;
pub use report::{Example, Flips, OutputReport, PairReport, Snapshot, SpreadReport, VersionReport};

use tally::Tallies;

/// Limits of what is done for shadows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Copies that wait; more are dropped.
    pub queue_max: usize,
    /// Bytes of inputs and outputs that copies keep, waiting and running; more are dropped.
    pub queue_bytes_max: usize,
    /// Copies that run at once.
    pub running_max: usize,
    /// Time from the answer to the end of the comparison.
    pub timeout: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            queue_max: 256,
            queue_bytes_max: 16 << 20,
            running_max: 8,
            timeout: Duration::from_secs(10),
        }
    }
}

/// Says whether requests need all the memory that there is.
type Pressure = Box<dyn Fn() -> bool + Send + Sync>;

/// All that is done for shadows.
pub struct Shadows {
    shared: Arc<Shared>,
    /// Made, with its thread, for the first copy; `None` when there was no thread.
    queue: OnceLock<Option<mpsc::Sender<Job>>>,
}

struct Shared {
    settings: Settings,
    observer: Arc<Observer>,
    ledger: OnceLock<Arc<Ledger>>,
    /// Copies that wait or run, and the bytes that they keep.
    count: AtomicUsize,
    bytes: AtomicUsize,
    draining: AtomicBool,
    pressure: OnceLock<Pressure>,
    /// One place for runs that take a thread: shadows never have more than one of those.
    heavy: Semaphore,
    /// Guards what was found out; taken by the shadows' thread and by whoever reads it.
    tallies: Mutex<Tallies>,
}

/// What a shadow's record says of the request that it ran on a copy of.
#[derive(Clone, Debug, Default)]
pub struct Origin {
    /// Of the route table that the request saw.
    pub config_revision: u64,
    /// Whom its data is about.
    pub subject: Option<Box<str>>,
}

/// A request that was answered.
struct Answered {
    completion: Completion,
    origin: Origin,
    /// For the names of its inputs and outputs.
    served: Weak<Served>,
    deadline: Instant,
}

/// One copy for one shadow. Versions are held weakly: neither may live longer for it.
struct Job {
    answered: Arc<Answered>,
    shadow: Weak<Served>,
    share: u16,
    _kept: Kept,
}

/// Counts a copy for as long as it lives.
struct Kept {
    shared: Arc<Shared>,
    bytes: usize,
}

impl Kept {
    /// `None` when there is no room for so many bytes more.
    fn keep(shared: &Arc<Shared>, bytes: usize) -> Option<Self> {
        shared.count.fetch_add(1, Ordering::Relaxed);
        let before = shared.bytes.fetch_add(bytes, Ordering::Relaxed);
        // Given back when it is dropped, also when there is no room.
        let kept = Self { shared: Arc::clone(shared), bytes };
        (before.saturating_add(bytes) <= shared.settings.queue_bytes_max).then_some(kept)
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        self.shared.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.shared.count.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shadows {
    pub fn new(settings: Settings, observer: Arc<Observer>) -> Self {
        let shared = Shared {
            settings,
            observer,
            ledger: OnceLock::new(),
            count: AtomicUsize::new(0),
            bytes: AtomicUsize::new(0),
            draining: AtomicBool::new(false),
            pressure: OnceLock::new(),
            heavy: Semaphore::new(1),
            tallies: Mutex::default(),
        };
        Self { shared: Arc::new(shared), queue: OnceLock::new() }
    }

    /// Says how to tell that requests need the memory: no copies are made then. Later calls have
    /// no effect.
    pub fn shed_when(&self, pressure: Box<dyn Fn() -> bool + Send + Sync>) {
        drop(self.shared.pressure.set(pressure));
    }

    /// Says which ledger has a record of each run. Later calls have no effect.
    pub fn record_in(&self, ledger: Arc<Ledger>) {
        drop(self.shared.ledger.set(ledger));
    }

    /// Drops all that waits, and makes no more copies.
    pub fn drain(&self) {
        self.shared.draining.store(true, Ordering::Relaxed);
    }

    /// Leaves a copy of an answered request to each of its shadows. Never waits.
    pub fn offer(&self, pick: &Pick, completion: Completion, origin: Origin) {
        let bytes = bytes_of(&completion.inputs).saturating_add(bytes_of(&completion.outputs));
        let deadline = Instant::now() + self.shared.settings.timeout;
        let served = Arc::downgrade(&pick.served);
        let answered = Arc::new(Answered { completion, origin, served, deadline });
        for mirror in &pick.mirrors {
            // What is gone has no counters either.
            let Some(shadow) = mirror.served.upgrade() else { continue };
            if let Err(outcome) = self.admit(&answered, &mirror.served, mirror.share, bytes) {
                shadow.stats.shadow_ended(outcome);
            }
        }
    }

    fn admit(
        &self,
        answered: &Arc<Answered>,
        shadow: &Weak<Served>,
        share: u16,
        bytes: usize,
    ) -> Result<(), ShadowOutcome> {
        let shared = &self.shared;
        if shared.draining.load(Ordering::Relaxed) {
            return Err(ShadowOutcome::Draining);
        }
        if shared.pressure.get().is_some_and(|pressed| pressed()) {
            return Err(ShadowOutcome::Memory);
        }
        let kept = Kept::keep(shared, bytes).ok_or(ShadowOutcome::QueueBytes)?;
        let queue = self.queue.get_or_init(|| run::start(shared));
        let (answered, shadow) = (Arc::clone(answered), Weak::clone(shadow));
        let job = Job { answered, shadow, share, _kept: kept };
        match queue.as_ref().ok_or(ShadowOutcome::Failed)?.try_send(job) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => Err(ShadowOutcome::QueueFull),
            Err(TrySendError::Closed(_)) => Err(ShadowOutcome::Failed),
        }
    }

    /// Copies that wait or run.
    pub fn in_progress(&self) -> usize {
        self.shared.count.load(Ordering::Relaxed)
    }

    /// Bytes that they keep.
    pub fn bytes(&self) -> usize {
        self.shared.bytes.load(Ordering::Relaxed)
    }

    /// What was found out about the shadows of a model whose versions are these.
    pub fn snapshot(&self, model: &ModelName, routes: &ModelRoutes) -> Snapshot {
        self.shared.tallies.lock().snapshot(model, routes)
    }

    /// What was found out about one shadow beside the version that made the answers; `None` when
    /// nothing was compared yet.
    pub fn pair(
        &self,
        model: &ModelName,
        version: Version,
        primary: Version,
    ) -> Option<PairReport> {
        self.shared.tallies.lock().pair(model, version, primary)
    }

    /// Forgets what was found out about the shadows of a model: a new comparison begins.
    pub fn reset(&self, model: &ModelName) {
        self.shared.tallies.lock().reset(model);
    }
}

fn bytes_of(tensors: &[Tensor]) -> usize {
    tensors.iter().map(|tensor| tensor.data().len()).fold(0, usize::saturating_add)
}

#[cfg(test)]
mod tests;
