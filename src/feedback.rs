//! What became of predictions: labels and metrics that callers give later, and how good the
//! predictions were by those.
//!
//! ```text
//! call ─▶ queue ─▶ thread `feedback` ─┬─ its predictions: Finder, in the log of predictions
//!                                     ├─ said before? Index (SQLite), by prediction and metric
//!          answer waits ◀── durable ──┤─ records ─▶ log `feedback`
//!                                     └─ that log, and that of predictions, read on ─▶ Board
//!                                                     Board ─▶ reports, metrics, rollouts
//! ```
//!
//! Invariants:
//! - An answer leaves after its records are where the model's `durability` says; then they are in
//!   the log, whatever becomes of the process.
//! - Figures are made from the logs alone: what a start finds in them is what was counted before.
//! - One thread decides what is new, so the same fact is never recorded twice, and the last one
//!   that was recorded counts.
//! - Nothing here waits on the path of a prediction.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use tokio::sync::oneshot;
use uuid::Uuid;

use crate::domain::{Arm, Durability, ModelName, Protocol, TraceContext, Version};
use crate::ledger::Ledger;
use crate::ledger::log::Unrecorded;
use board::{Board, day_of};

mod board;
mod body;
mod finder;
mod index;
mod item;
mod metrics;
mod reading;
#[cfg(test)]
mod tests;
mod worker;

pub use board::{Day, Report, Series, TALLIES_MAX, VersionQuality};
pub use body::Body;
pub use finder::{MARKED_MAX, SEGMENTS_READ_MAX};
pub use item::{Item, ItemError, LABEL_BYTES_MAX, LABELS_MAX, Label, METRIC_LEN_MAX, Said};
pub use reading::How;

/// When a caller may try again that could not be served.
pub const RETRY_AFTER: Duration = Duration::from_secs(1);

#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the index lies.
    pub state_dir: PathBuf,
    /// Most predictions that one call speaks of.
    pub items_max: usize,
    /// Calls that wait.
    pub queue_max: usize,
    /// Days of predictions that figures are of, today included.
    pub window_days: u32,
    /// A prediction is recorded so long after its call came, at most.
    pub made_within: Duration,
}

impl Settings {
    /// The defaults, in this state folder.
    pub fn new(state_dir: PathBuf) -> Self {
        Self {
            state_dir,
            items_max: 1000,
            queue_max: 64,
            window_days: 30,
            made_within: Duration::from_secs(3600),
        }
    }
}

/// What is known of the versions that are loaded.
pub trait Models: Send + Sync {
    /// How the outputs of a version are to be read; `None` when it is not loaded.
    fn how(&self, model: &str, version: u64) -> Option<How>;

    /// Whether any version of it is.
    fn serves(&self, model: &str) -> bool;
}

/// What one caller says.
#[derive(Clone, Debug)]
pub struct Call {
    pub model: ModelName,
    pub items: Vec<Item>,
    pub durability: Durability,
    pub received: SystemTime,
    pub protocol: Protocol,
    pub principal: Option<String>,
    pub trace: Option<TraceContext>,
}

/// What became of one item.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    NotFound,
    /// It is known, and nothing was written.
    Unchanged,
    Recorded,
    /// Another one was known, and this one counts from now on.
    Corrected,
}

impl Outcome {
    pub const ALL: [Self; 4] = [Self::NotFound, Self::Unchanged, Self::Recorded, Self::Corrected];

    /// Word of answers, and label of the metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::NotFound => "not_found",
            Self::Unchanged => "unchanged",
            Self::Recorded => "recorded",
            Self::Corrected => "corrected",
        }
    }
}

/// Why nothing was taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FeedbackError {
    #[error("{count} items, the limit is {max}")]
    TooMany { count: usize, max: usize },
    #[error("{count} labels of rows, the limit is {LABELS_MAX}")]
    TooManyLabels { count: usize },
    #[error("item {at}: {why}")]
    Item { at: usize, why: String },
    #[error("prediction '{id}' of model '{model}' is not found")]
    NotFound { id: Uuid, model: ModelName },
    #[error("labels cannot be recorded at this moment")]
    Unrecorded(#[from] Unrecorded),
    #[error("as many calls wait as may")]
    Busy,
    #[error("the predictions are still being looked for")]
    Searching,
    #[error("labels cannot be taken at this moment")]
    Broken,
}

/// One call on its way to the thread.
struct Job {
    call: Call,
    reply: oneshot::Sender<Result<Vec<Outcome>, FeedbackError>>,
}

/// What the thread and readers share.
#[derive(Default)]
struct Shared {
    /// Guards the tallies: the thread changes them, reports and the metrics page read them.
    board: Mutex<Board>,
    /// Guards the counts of what became of items, by model; of models that are not served under "".
    counts: Mutex<BTreeMap<String, Counts>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    outcomes: [u64; Outcome::ALL.len()],
    refused: u64,
}

/// The part that takes feedback.
pub struct Feedback {
    settings: Settings,
    models: Arc<dyn Models>,
    shared: Arc<Shared>,
    /// Guards the way to the thread, which ends when this is taken away.
    jobs: Mutex<Option<SyncSender<Job>>>,
    /// Guards the thread, for whoever waits for its end.
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Feedback {
    /// Starts the thread.
    ///
    /// # Errors
    /// When there can be none.
    pub fn start(
        settings: Settings,
        ledger: Arc<Ledger>,
        models: Arc<dyn Models>,
    ) -> std::io::Result<Arc<Self>> {
        let (sender, jobs) = sync_channel(settings.queue_max);
        let shared = Arc::new(Shared::default());
        let parts = worker::Parts {
            settings: settings.clone(),
            ledger,
            models: Arc::clone(&models),
            shared: Arc::clone(&shared),
        };
        let thread = std::thread::Builder::new().name("feedback".to_owned());
        let thread = thread.spawn(move || worker::run(&parts, &jobs))?;
        let (jobs, thread) = (Mutex::new(Some(sender)), Mutex::new(Some(thread)));
        Ok(Arc::new(Self { settings, models, shared, jobs, thread }))
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Takes what a caller says; what became of each item, in their order. Waits for the disk as
    /// the model's durability says. When the returned future is dropped, it may be taken all the
    /// same: saying it again does no harm.
    ///
    /// # Errors
    /// Why nothing of it was taken; with [`FeedbackError::Unrecorded`] parts may have been.
    pub async fn send(&self, call: Call) -> Result<Vec<Outcome>, FeedbackError> {
        let (model, items) = (call.model.clone(), call.items.len());
        let done = self.taken(call).await;
        self.count(&model, items, &done);
        done
    }

    async fn taken(&self, call: Call) -> Result<Vec<Outcome>, FeedbackError> {
        let (count, max) = (call.items.len(), self.settings.items_max);
        if count > max {
            return Err(FeedbackError::TooMany { count, max });
        }
        let count = call.items.iter().map(|item| item.labels.len()).sum();
        if count > LABELS_MAX {
            return Err(FeedbackError::TooManyLabels { count });
        }
        let Some(first) = call.items.first().map(|item| item.id) else { return Ok(Vec::new()) };
        let model = call.model.clone();
        let (reply, answer) = oneshot::channel();
        let sent = match &*self.jobs.lock() {
            Some(jobs) => jobs.try_send(Job { call, reply }),
            None => return Err(FeedbackError::Broken),
        };
        sent.map_err(|error| match error {
            TrySendError::Full(_) => FeedbackError::Busy,
            TrySendError::Disconnected(_) => FeedbackError::Broken,
        })?;
        let outcomes = answer.await.unwrap_or(Err(FeedbackError::Broken))?;
        match outcomes.iter().all(|outcome| *outcome == Outcome::NotFound) {
            true => Err(FeedbackError::NotFound { id: first, model }),
            false => Ok(outcomes),
        }
    }

    /// How good a model's predictions of the last days were; of all that are kept, if nobody says.
    pub fn report(&self, model: &ModelName, days: Option<u32>) -> Report {
        let days = days.unwrap_or(u32::MAX).clamp(1, self.settings.window_days);
        let last = today();
        let first = last - i64::from(days) + 1;
        self.shared.board.lock().report(model.as_str(), first, last)
    }

    /// Rows that a version took for another class than their label says, and all rows that labels
    /// were held against, of the requests that the split sent to it. `None` while that is not known:
    /// at the start, and after something failed.
    pub fn mistakes(&self, model: &ModelName, version: Version) -> Option<(u64, u64)> {
        let wants = |series: &Series| {
            series.model == model.as_str()
                && series.version == version.get()
                && Arm::is_of_split(&series.arm)
        };
        self.shared.board.lock().mistakes(wants)
    }

    /// Ends the thread, after what waits. Waits for that.
    pub fn stop(&self) {
        drop(self.jobs.lock().take());
        let thread = self.thread.lock().take();
        if let Some(thread) = thread
            && thread.join().is_err()
        {
            tracing::error!("the thread that takes feedback had panicked");
        }
    }

    fn count(&self, model: &ModelName, items: usize, done: &Result<Vec<Outcome>, FeedbackError>) {
        let mut all = self.shared.counts.lock();
        let known = self.models.serves(model.as_str());
        let name = if known { model.as_str() } else { "" };
        let counts = all.entry(name.to_owned()).or_default();
        match done {
            Ok(outcomes) => {
                outcomes.iter().for_each(|outcome| counts.outcomes[*outcome as usize] += 1);
            }
            Err(FeedbackError::NotFound { .. }) => {
                counts.outcomes[Outcome::NotFound as usize] += items as u64;
            }
            Err(_) => counts.refused += items as u64,
        }
    }
}

/// In days since 1970.
fn today() -> Day {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    day_of(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
