//! Turns single requests into batches.
//!
//! A *lane* serves one loaded version: a bounded queue in front, one OS thread per session behind.
//!
//! ```text
//! Lane::infer ──push──▶ Queue (≤ queue_max) ──take──▶ worker thread: Session::run
//!    ▲  │ cheap and idle                                      │
//!    │  └─▶ gather ─▶ Session::run where the request stands   │
//!    └────────────────── oneshot reply ◀──────────────────────┘
//! ```
//!
//! Invariants:
//! - A request leaves exactly once, with outputs or with a [`BatchError`].
//! - Nothing here waits for queue space. A full queue is an answer, not a delay, and so is a queue
//!   too long for the request's deadline.
//! - A request that has expired or whose caller has gone never reaches the engine.
//! - A run is ended when all that it was for have expired or gone, where the engine can (ONNX
//!   Runtime, between two operators).
//! - A request that fails alone never fails its neighbours: a failed batch is run again one by one.
//! - What nobody waits for ([`Lane::infer_spare`]) goes behind every request, in batches of its own,
//!   and leaves the queue when a request needs its place.
//!
//! Deliberately absent: retries; the caller owns the deadline.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};

use crate::domain::{BatchSettings, Deadline, ModelName, Tensor, Timings, Version};
use crate::engine::Session;
use crate::observe::VersionStats;
use crate::panics;

mod admit;
mod budget;
mod cost;
mod error;
mod form;
mod gather;
mod inline;
mod pad;
mod plan;
mod queue;
mod run;
mod running;
mod worker;

pub use budget::ThreadBudget;
use cost::Cost;
pub use error::BatchError;
pub use form::{Form, Joined};
use gather::{Company, Gathered};
pub use pad::Padding;
use plan::Arrivals;
use queue::Queue;
use running::{Ticket, Waiter};

/// What a lane is made of.
pub struct LaneParts {
    pub model: ModelName,
    pub version: Version,
    pub batch: BatchSettings,
    /// The first dimension of every tensor is the batch; else requests are never joined.
    pub batched: bool,
    /// How requests of unequal length are joined; `None`: they are not.
    pub padding: Option<Padding>,
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

/// One request to run, measured.
struct Work {
    inputs: Vec<Tensor>,
    rows: usize,
    /// Of all inputs; what costs are learnt by.
    elements: usize,
    /// Of all inputs.
    bytes: usize,
}

struct Job {
    inputs: Vec<Tensor>,
    deadline: Deadline,
    reply: oneshot::Sender<Result<Ran, BatchError>>,
    ticket: Ticket,
}

/// How a caller waits for its request. Dropping it withdraws the request: the worker sees that
/// nobody waits, and a run that was only for this one is ended.
struct Outcome {
    receiver: oneshot::Receiver<Result<Ran, BatchError>>,
    _waiter: Waiter,
    deadline: Deadline,
}

impl Outcome {
    async fn wait(mut self) -> Result<Ran, BatchError> {
        match timeout_at(self.deadline.at, &mut self.receiver).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(BatchError::WorkerLost),
            Err(_) => {
                Err(BatchError::DeadlineExceeded { waited: self.deadline.received.elapsed() })
            }
        }
    }
}

struct State {
    queue: Queue<Job>,
    /// Sessions that nobody runs on now.
    idle: Vec<Box<dyn Session>>,
    running: usize,
    /// When a run last ended, or the first of those in progress began.
    progress_at: Instant,
    arrivals: Arrivals,
    closed: bool,
}

impl State {
    /// Takes an idle session to run on.
    fn begin(&mut self) -> Option<Box<dyn Session>> {
        let session = self.idle.pop()?;
        if self.running == 0 {
            self.progress_at = Instant::now();
        }
        self.running += 1;
        Some(session)
    }

    fn end(&mut self, session: Box<dyn Session>) {
        self.idle.push(session);
        self.running -= 1;
        self.progress_at = Instant::now();
    }
}

struct Shared {
    model: ModelName,
    batch: BatchSettings,
    form: Form,
    stats: Arc<VersionStats>,
    budget: Arc<ThreadBudget>,
    /// Guards the queue and the idle sessions; held for a push or a take, never during a run.
    state: Mutex<State>,
    work: Condvar,
    /// Sessions, idle or not.
    sessions: usize,
    cost: Cost,
    /// Requests may run on the thread that they stand on.
    inline: bool,
    company: Company,
    in_flight: AtomicUsize,
}

impl Lane {
    /// Starts the workers.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn new(parts: LaneParts) -> std::io::Result<Self> {
        let workers = parts.sessions.len();
        // A loop that runs long for some inputs must not hold up a thread that serves others.
        let steady = !parts.sessions.iter().any(|session| session.loops());
        let inline = steady && parts.batch.wait_max.is_zero();
        let name = format!("lane-{}-{}", parts.model, parts.version);
        let shared = Arc::new(Shared {
            model: parts.model,
            form: Form { batched: parts.batched, padding: parts.padding },
            stats: parts.stats,
            budget: parts.budget,
            state: Mutex::new(State {
                queue: Queue::new(parts.batch.priority_age).in_order(parts.batch.preserve_ordering),
                idle: parts.sessions,
                running: 0,
                progress_at: Instant::now(),
                arrivals: Arrivals::default(),
                closed: false,
            }),
            batch: parts.batch,
            work: Condvar::new(),
            sessions: workers,
            cost: Cost::new(),
            inline,
            company: Company::default(),
            in_flight: AtomicUsize::new(0),
        });
        let lane = Self { shared };
        for _ in 0..workers {
            let shared = Arc::clone(&lane.shared);
            std::thread::Builder::new()
                .name(name.clone())
                .spawn(move || panics::fatal("lane worker", || worker::work(shared)))?;
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
        let mut work = shared.work(inputs)?;
        let priority = shared.priority(priority)?;
        if deadline.passed(Instant::now()) {
            return Err(BatchError::DeadlineExceeded { waited: deadline.received.elapsed() });
        }
        let _in_flight = InFlight::enter(&shared.in_flight);
        if shared.cheap(&work) {
            if shared.gathers(&work) {
                work = match shared.gather(work, deadline).await {
                    Gathered::Joined(outcome) => return outcome.wait().await,
                    Gathered::Alone(work) => work,
                };
            }
            if let Some(ran) = shared.run_inline(&work) {
                return ran;
            }
        }
        let (entry, outcome) = shared.entry(work, priority, deadline);
        shared.push(entry).map_err(|(_, error)| error)?;
        outcome.wait().await
    }

    /// As [`Lane::infer`], for what nobody waits for: on a worker, behind every request, and the
    /// first to go when the queue is full. One session is left to requests where there are more.
    ///
    /// # Errors
    /// As there, or because it made room.
    pub async fn infer_spare(
        &self,
        inputs: Vec<Tensor>,
        deadline: Deadline,
    ) -> Result<Ran, BatchError> {
        let shared = &*self.shared;
        let work = shared.work(inputs)?;
        if deadline.passed(Instant::now()) {
            return Err(BatchError::DeadlineExceeded { waited: deadline.received.elapsed() });
        }
        let _in_flight = InFlight::enter(&shared.in_flight);
        let (entry, outcome) = shared.entry(work, queue::SPARE, deadline);
        shared.push(entry).map_err(|(_, error)| error)?;
        outcome.wait().await
    }

    /// Whether a run of these inputs takes a place of the thread budget, or may do so for all
    /// that is known.
    pub fn is_heavy(&self, inputs: &[Tensor]) -> bool {
        let cost = self.shared.cost.predict(self.shared.form.elements(inputs));
        cost.is_none_or(|cost| cost >= plan::HEAVY_MIN)
    }

    /// The thread budget that this lane shares with others.
    pub fn budget(&self) -> &ThreadBudget {
        &self.shared.budget
    }

    /// How this lane joins requests.
    pub fn form(&self) -> &Form {
        &self.shared.form
    }

    /// Lets the lane know what a run of these inputs took before it had any traffic.
    pub fn seed(&self, inputs: Vec<Tensor>, took: Duration) {
        let work = self.shared.form.measure(inputs);
        self.shared.cost.learn(work.elements, took);
    }

    /// Requests waiting or running.
    pub fn in_flight(&self) -> usize {
        self.shared.in_flight.load(Ordering::Relaxed)
    }

    /// Requests waiting.
    pub fn queue_depth(&self) -> usize {
        self.shared.state.lock().queue.len()
    }

    /// How long runs have been in progress without any that ended; zero when nothing runs.
    pub fn stuck_for(&self) -> Duration {
        let state = self.shared.state.lock();
        if state.running == 0 { Duration::ZERO } else { state.progress_at.elapsed() }
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

impl Shared {
    /// Inputs that may be queued, measured.
    fn work(&self, inputs: Vec<Tensor>) -> Result<Work, BatchError> {
        self.form.check(&inputs)?;
        let work = self.form.measure(inputs);
        let (rows, rows_max) = (work.rows, self.batch.rows_max);
        if self.form.batched && rows > rows_max {
            return Err(BatchError::TooManyRows { rows, rows_max });
        }
        Ok(work)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        self.shared.state.lock().closed = true;
        self.shared.work.notify_all();
    }
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
