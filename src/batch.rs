//! Turns single requests into batches.
//!
//! A *lane* serves one loaded version: a bounded queue in front, one OS thread per session behind.
//!
//! ```text
//! Lane::infer ──push──▶ Queue (≤ queue_max) ──take──▶ worker thread: Session::run
//!    ▲  │ cheap and idle                                      │
//!    │  └────▶ Session::run where the request stands          │
//!    └────────────────── oneshot reply ◀──────────────────────┘
//! ```
//!
//! Invariants:
//! - A request leaves exactly once, with outputs or with a [`BatchError`].
//! - Nothing here waits for queue space. A full queue is an answer, not a delay.
//! - A request that has expired or whose caller has gone never reaches the engine.
//! - A request that fails alone never fails its neighbours: a failed batch is run again one by one.
//!
//! Deliberately absent: retries; the caller owns the deadline.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::domain::{
    BatchSettings, Deadline, ErrorKind, Failure, ModelName, Tensor, Timings, Version,
};
use crate::engine::{EngineError, Session};
use crate::observe::VersionStats;

mod budget;
mod queue;

pub use budget::ThreadBudget;
use queue::{Entry, Queue, Take};

/// A run predicted to take less than this happens on the caller's thread when the lane is idle:
/// waking a worker and being woken by it costs about as much.
const INLINE_COST_MAX: Duration = Duration::from_micros(50);
/// Requests larger than this are never run inline: their cost is not the one that was learnt.
const INLINE_BYTES_MAX: usize = 64 << 10;

/// What a lane is made of.
pub struct LaneParts {
    pub model: ModelName,
    pub version: Version,
    pub batch: BatchSettings,
    /// The first dimension of every tensor is the batch; else requests are never joined.
    pub batched: bool,
    /// One worker thread each; at least one.
    pub sessions: Vec<Box<dyn Session>>,
    pub stats: Arc<VersionStats>,
    /// Runs that may happen at once, over all lanes.
    pub budget: Arc<ThreadBudget>,
}

/// Queue and workers of one loaded version. Dropping it lets what waits finish, then the workers
/// end and the sessions go.
pub struct Lane {
    shared: Arc<Shared>,
}

/// Outputs of one request and how it ran.
#[derive(Clone, Debug)]
pub struct Ran {
    /// In the signature's order.
    pub outputs: Vec<Tensor>,
    /// All but `total`.
    pub timings: Timings,
    /// Rows of the batch it ran in.
    pub batch_size: usize,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum BatchError {
    #[error("queue of model '{model}' is full ({queue_max} requests are waiting)")]
    QueueFull { model: ModelName, queue_max: usize, retry_after: Duration },
    #[error("deadline passed after {} ms", waited.as_millis())]
    DeadlineExceeded { waited: Duration },
    #[error("version is being retired")]
    Retired,
    #[error("batch size {rows} is over the model's limit of {rows_max}")]
    TooManyRows { rows: usize, rows_max: usize },
    #[error("priority {priority} is over the model's {levels} levels")]
    Priority { priority: u32, levels: u32 },
    #[error(transparent)]
    Engine(Arc<EngineError>),
    #[error("output {at} has {got} rows for a batch of {expected}")]
    OutputRows { at: usize, got: usize, expected: usize },
    #[error("inference worker was lost")]
    WorkerLost,
}

impl BatchError {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::QueueFull { .. } => ErrorKind::Overloaded,
            Self::DeadlineExceeded { .. } => ErrorKind::DeadlineExceeded,
            Self::Retired => ErrorKind::Unavailable,
            Self::TooManyRows { .. } | Self::Priority { .. } => ErrorKind::InvalidInput,
            Self::Engine(error) => error.kind(),
            Self::OutputRows { .. } => ErrorKind::ModelFailed,
            Self::WorkerLost => ErrorKind::Internal,
        }
    }

    /// What the caller sees.
    pub fn into_failure(self) -> Failure {
        let failure = Failure::new(self.kind(), self.to_string());
        match self {
            Self::QueueFull { retry_after, .. } => failure.retry_after(retry_after),
            Self::Retired => failure.retry_after(Duration::from_secs(1)),
            _ => failure,
        }
    }
}

struct Job {
    inputs: Vec<Tensor>,
    received: Instant,
    reply: oneshot::Sender<Result<Ran, BatchError>>,
}

/// A batch to run now.
struct Due {
    batch: Vec<Entry<Job>>,
    session: Box<dyn Session>,
    /// When the worker began to look for work.
    free_since: Instant,
}

struct State {
    queue: Queue<Job>,
    /// Sessions that nobody runs on now.
    idle: Vec<Box<dyn Session>>,
    running: usize,
    closed: bool,
}

struct Shared {
    model: ModelName,
    batch: BatchSettings,
    batched: bool,
    stats: Arc<VersionStats>,
    budget: Arc<ThreadBudget>,
    /// Guards the queue and the idle sessions; held for a push or a take, never during a run.
    state: Mutex<State>,
    work: Condvar,
    /// Smoothed time of one run, in nanoseconds; 0 before the first.
    cost_ns: AtomicU64,
    in_flight: AtomicUsize,
}

impl Lane {
    /// Starts the workers.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn new(parts: LaneParts) -> std::io::Result<Self> {
        let workers = parts.sessions.len();
        let name = format!("lane-{}-{}", parts.model, parts.version);
        let shared = Arc::new(Shared {
            model: parts.model,
            batch: parts.batch,
            batched: parts.batched,
            stats: parts.stats,
            budget: parts.budget,
            state: Mutex::new(State {
                queue: Queue::new(),
                idle: parts.sessions,
                running: 0,
                closed: false,
            }),
            work: Condvar::new(),
            cost_ns: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
        });
        let lane = Self { shared };
        for _ in 0..workers {
            let shared = Arc::clone(&lane.shared);
            std::thread::Builder::new().name(name.clone()).spawn(move || worker(shared))?;
        }
        Ok(lane)
    }

    /// Queues one request and waits for its outputs, but not for room in the queue. Dropping the
    /// future withdraws the request. `priority` 0 means the model's default, 1 is the highest.
    ///
    /// # Errors
    /// Full queue, passed deadline, retired lane, or the engine's error.
    pub async fn infer(
        &self,
        inputs: Vec<Tensor>,
        deadline: Deadline,
        priority: u32,
    ) -> Result<Ran, BatchError> {
        let shared = &*self.shared;
        let rows = shared.rows(&inputs);
        let rows_max = shared.batch.rows_max;
        if shared.batched && rows > rows_max {
            return Err(BatchError::TooManyRows { rows, rows_max });
        }
        let priority = shared.priority(priority)?;
        if deadline.passed(Instant::now()) {
            return Err(BatchError::DeadlineExceeded { waited: deadline.received.elapsed() });
        }
        let _in_flight = InFlight::enter(&shared.in_flight);
        if let Some(ran) = shared.run_inline(&inputs, rows) {
            return ran;
        }
        let outcome = shared.push(inputs, rows, priority, deadline)?;
        match timeout_at(deadline.at, outcome).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(BatchError::WorkerLost),
            Err(_) => Err(BatchError::DeadlineExceeded { waited: deadline.received.elapsed() }),
        } // Dropping `outcome` is how the worker learns that nobody waits.
    }

    /// Requests waiting or running.
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::Relaxed)
    }

    /// Requests waiting.
    pub fn queue_depth(&self) -> usize {
        self.shared.state.lock().queue.len()
    }

    /// Reads (in flight, waiting) for as long as the lane lives, then zeros; for gauges.
    pub fn gauges(&self) -> impl Fn() -> (usize, usize) + Send + Sync + use<> {
        let shared = Arc::downgrade(&self.shared);
        move || {
            shared.upgrade().map_or((0, 0), |shared| {
                let waiting = shared.state.lock().queue.len();
                (shared.in_flight.load(Ordering::Relaxed), waiting)
            })
        }
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.work.notify_all();
    }
}

impl Shared {
    fn rows(&self, inputs: &[Tensor]) -> usize {
        let first = inputs.first().filter(|_| self.batched);
        first.and_then(|tensor| tensor.shape().first().copied()).unwrap_or(1)
    }

    fn priority(&self, wanted: u32) -> Result<u32, BatchError> {
        let levels = self.batch.priority_levels;
        match wanted {
            _ if levels == 0 => Ok(0), // A model without priorities ignores them, as Triton does.
            0 => Ok(self.batch.priority_default),
            priority if priority <= levels => Ok(priority),
            priority => Err(BatchError::Priority { priority, levels }),
        }
    }

    fn cost(&self) -> Duration {
        Duration::from_nanos(self.cost_ns.load(Ordering::Relaxed))
    }

    fn learn(&self, took: Duration) {
        let sample = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        let old = self.cost_ns.load(Ordering::Relaxed);
        // A lost update between two workers only makes the estimate a little older.
        let new = if old == 0 { sample } else { old - old / 8 + sample / 8 };
        self.cost_ns.store(new.max(1), Ordering::Relaxed);
    }

    /// Runs where the request stands, if the lane is idle and the model known to be cheap.
    fn run_inline(&self, inputs: &[Tensor], rows: usize) -> Option<Result<Ran, BatchError>> {
        let cost = self.cost();
        let cheap = !cost.is_zero() && cost < INLINE_COST_MAX && self.batch.wait_max.is_zero();
        if !cheap
            || inputs.iter().map(|tensor| tensor.data().len()).sum::<usize>() > INLINE_BYTES_MAX
        {
            return None;
        }
        let mut session = {
            let mut state = self.state.lock();
            if state.queue.len() > 0 || (self.batch.preserve_ordering && state.running > 0) {
                return None;
            }
            let session = state.idle.pop()?;
            state.running += 1;
            session
        };
        let started = Instant::now();
        let result = run(&mut *session, inputs);
        let took = started.elapsed();
        self.give_back(session);
        self.learn(took);
        let timings = Timings { compute_infer: took, ..Timings::default() };
        self.stats.executed(rows, &timings);
        Some(result.map(|outputs| Ran { outputs, timings, batch_size: rows }))
    }

    fn push(
        &self,
        inputs: Vec<Tensor>,
        rows: usize,
        priority: u32,
        deadline: Deadline,
    ) -> Result<oneshot::Receiver<Result<Ran, BatchError>>, BatchError> {
        let (reply, outcome) = oneshot::channel();
        let queued_at = Instant::now();
        let mut expires_at = deadline.at;
        if let Some(longest) = self.batch.queue_wait_max {
            expires_at = expires_at.min(queued_at + longest);
        }
        let item = Job { inputs, received: deadline.received, reply };
        let entry = Entry { rows, priority, queued_at, expires_at, item };
        let mut state = self.state.lock();
        if state.closed {
            return Err(BatchError::Retired);
        }
        if state.queue.len() >= self.batch.queue_max {
            // The dead make room before the living are refused.
            let dead = state.queue.take_dead(queued_at, |job| job.reply.is_closed());
            if dead.is_empty() {
                return Err(self.queue_full());
            }
            dead.into_iter().for_each(expire);
        }
        state.queue.push(entry);
        drop(state);
        self.work.notify_one();
        Ok(outcome)
    }

    fn queue_full(&self) -> BatchError {
        let queue_max = self.batch.queue_max;
        let runs = queue_max / self.batch.size_max.max(1) + 1;
        let drained = self.cost().saturating_mul(u32::try_from(runs).unwrap_or(u32::MAX));
        let retry_after = drained.clamp(Duration::from_secs(1), Duration::from_secs(30));
        BatchError::QueueFull { model: self.model.clone(), queue_max, retry_after }
    }

    fn give_back(&self, session: Box<dyn Session>) {
        let mut state = self.state.lock();
        state.idle.push(session);
        state.running -= 1;
        let wanted = state.queue.len() > 0 || state.closed;
        drop(state);
        if wanted {
            self.work.notify_one();
        }
    }

    /// Waits for the next batch and a session to run it on; `None` when the lane is closed and
    /// nothing waits.
    fn next_batch(&self) -> Option<Due> {
        let joins = |a: &Job, b: &Job| self.batched && joins(&a.inputs, &b.inputs);
        let free_since = Instant::now();
        let mut state = self.state.lock();
        loop {
            let now = Instant::now();
            let dead = state.queue.take_dead(now, |job| job.reply.is_closed());
            dead.into_iter().for_each(expire);
            let held = self.batch.preserve_ordering && state.running > 0;
            let may_run = !held && !state.idle.is_empty();
            let mut wake_at = state.queue.next_expiry();
            if may_run {
                match state.queue.take(&self.batch, now, joins) {
                    Take::Batch(batch) => {
                        let session = state.idle.pop()?;
                        state.running += 1;
                        return Some(Due { batch, session, free_since });
                    }
                    Take::Wait(due_at) => {
                        wake_at = Some(wake_at.map_or(due_at, |at| at.min(due_at)));
                    }
                    Take::Empty if state.closed => return None,
                    Take::Empty => {}
                }
            }
            match wake_at {
                None => self.work.wait(&mut state),
                Some(at) => {
                    let wait = at.saturating_duration_since(now);
                    self.work.wait_for(&mut state, wait);
                }
            }
        }
    }
}

/// Two requests may share a batch: equal datatypes and shapes but for the rows.
fn joins(a: &[Tensor], b: &[Tensor]) -> bool {
    a.len() == b.len()
        && a.iter()
            .zip(b)
            .all(|(a, b)| a.datatype() == b.datatype() && a.shape().get(1..) == b.shape().get(1..))
}

fn expire(entry: Entry<Job>) {
    let waited = entry.item.received.elapsed();
    answer(entry.item.reply, Err(BatchError::DeadlineExceeded { waited }));
}

fn answer(reply: oneshot::Sender<Result<Ran, BatchError>>, result: Result<Ran, BatchError>) {
    // A caller who left meanwhile is recorded as cancelled by its own completion.
    drop(reply.send(result));
}

fn worker(shared: Arc<Shared>) {
    while let Some(Due { batch, mut session, free_since }) = shared.next_batch() {
        let permit = shared.budget.enter(shared.cost());
        run_batch(&shared, &mut *session, batch, free_since);
        drop(permit);
        shared.give_back(session);
    }
    // Another worker may sleep with nothing left to do.
    shared.work.notify_all();
    drop(shared);
    crate::engine::release_memory();
}

fn run_batch(
    shared: &Shared,
    session: &mut dyn Session,
    mut batch: Vec<Entry<Job>>,
    free_since: Instant,
) {
    // The wait for the thread budget may have outlasted some.
    let now = Instant::now();
    for at in (0..batch.len()).rev() {
        if batch[at].expires_at <= now || batch[at].item.reply.is_closed() {
            expire(batch.remove(at));
        }
    }
    match batch.len() {
        0 => {}
        1 => batch.into_iter().for_each(|entry| run_alone(shared, session, entry, free_since)),
        _ => match run_joined(shared, session, &batch, free_since) {
            Ok(results) => {
                for (entry, ran) in batch.into_iter().zip(results) {
                    answer(entry.item.reply, Ok(ran));
                }
            }
            Err(error) => {
                tracing::debug!(model = %shared.model, %error, "batch failed, run one by one");
                for entry in batch {
                    run_alone(shared, session, entry, free_since);
                }
            }
        },
    }
}

fn run_alone(shared: &Shared, session: &mut dyn Session, entry: Entry<Job>, free_since: Instant) {
    let started = Instant::now();
    let result = run(session, &entry.item.inputs);
    let took = started.elapsed();
    shared.learn(took);
    let timings =
        Timings { compute_infer: took, ..waits(shared, entry.queued_at, free_since, started) };
    shared.stats.executed(entry.rows, &timings);
    let ran = result.map(|outputs| Ran { outputs, timings, batch_size: entry.rows });
    answer(entry.item.reply, ran);
}

/// Time in the queue, split into waiting for a worker and waiting for company.
fn waits(shared: &Shared, queued_at: Instant, free_since: Instant, started: Instant) -> Timings {
    let waited = started.saturating_duration_since(queued_at);
    let batch_wait = if shared.batch.wait_max.is_zero() {
        Duration::ZERO
    } else {
        started.saturating_duration_since(queued_at.max(free_since)).min(shared.batch.wait_max)
    };
    Timings { queue: waited.saturating_sub(batch_wait), batch_wait, ..Timings::default() }
}

fn run_joined(
    shared: &Shared,
    session: &mut dyn Session,
    batch: &[Entry<Job>],
    free_since: Instant,
) -> Result<Vec<Ran>, BatchError> {
    let rows: usize = batch.iter().map(|entry| entry.rows).sum();
    let started = Instant::now();
    let inputs = join(batch).ok_or(BatchError::WorkerLost)?;
    let joined = Instant::now();
    let outputs = run(session, &inputs)?;
    let ran = Instant::now();
    for (at, output) in outputs.iter().enumerate() {
        let got = output.shape().first().copied().unwrap_or(0);
        if got != rows {
            return Err(BatchError::OutputRows { at, got, expected: rows });
        }
    }
    let mut from = 0;
    let mut cut = Vec::with_capacity(batch.len());
    for entry in batch {
        let to = from + entry.rows;
        cut.push(outputs.iter().filter_map(|output| output.rows(from, to)).collect::<Vec<_>>());
        from = to;
    }
    let compute = Timings {
        compute_input: joined - started,
        compute_infer: ran - joined,
        compute_output: ran.elapsed(),
        ..Timings::default()
    };
    shared.learn(compute.compute_infer);
    shared.stats.executed(rows, &compute);
    let ran = batch.iter().zip(cut).map(|(entry, outputs)| {
        let waits = waits(shared, entry.queued_at, free_since, started);
        let timings = Timings { queue: waits.queue, batch_wait: waits.batch_wait, ..compute };
        Ran { outputs, timings, batch_size: rows }
    });
    Ok(ran.collect())
}

/// Each input of all requests, joined along the first axis.
fn join(batch: &[Entry<Job>]) -> Option<Vec<Tensor>> {
    let first = batch.first()?;
    (0..first.item.inputs.len())
        .map(|at| {
            let parts: Option<Vec<&Tensor>> =
                batch.iter().map(|entry| entry.item.inputs.get(at)).collect();
            Tensor::concat(&parts?)
        })
        .collect()
}

/// A panicking engine fails its request and nothing else.
fn run(session: &mut dyn Session, inputs: &[Tensor]) -> Result<Vec<Tensor>, BatchError> {
    let caught = catch_unwind(AssertUnwindSafe(|| session.run(inputs)));
    let result = caught.unwrap_or_else(|_| Err(EngineError::Run("the engine panicked".to_owned())));
    result.map_err(|error| BatchError::Engine(Arc::new(error)))
}

/// Counts a request as in flight for as long as it lives.
struct InFlight<'a>(&'a AtomicUsize);

impl<'a> InFlight<'a> {
    fn enter(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests;
