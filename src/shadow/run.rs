//! The thread of the shadows: takes copies from the queue, runs them, compares.
//!
//! Invariants:
//! - At most `running_max` copies are in lanes, and at most one that takes a place of the thread
//!   budget; that one only while a place is left to requests, if there are two at all.
//! - Each copy that is taken ends in one outcome, a panic included.
//! - No request wakes this thread.
//! - Each run of a shadow ends in one [`Completion`], for the record.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{Semaphore, SemaphorePermit, mpsc};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use super::compare::{Difference, compare};
use super::tally::Comparison;
use super::{Answered, Job, Shared};
use crate::batch::{BatchError, Ran, ThreadBudget};
use crate::domain::{
    Completion, Deadline, ErrorKind, Failure, NamedTensor, Outcome, RouteReason, Tensor, Timings,
};
use crate::ledger::About;
use crate::observe::{OUTPUTS_MAX, ShadowOutcome};
use crate::panics;
use crate::route::Served;

/// Shortest and longest time between two looks at an empty queue: short enough that a queue of
/// usual size is not filled meanwhile, and long enough to cost nothing when there are no copies.
const LOOK_EVERY: (Duration, Duration) = (Duration::from_millis(2), Duration::from_millis(50));
/// Longest wait for a free thread.
const BUSY_WAIT_MAX: Duration = Duration::from_millis(250);
/// How often that is looked for.
const BUSY_POLL: Duration = Duration::from_millis(1);

/// Starts the thread; `None` when the operating system gives none.
pub(super) fn start(shared: &Arc<Shared>) -> Option<mpsc::Sender<Job>> {
    let (queue, jobs) = mpsc::channel(shared.settings.queue_max.max(1));
    let shared = Arc::clone(shared);
    let thread = std::thread::Builder::new().name("shadow".to_owned()).spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build();
        match runtime {
            Ok(runtime) => runtime.block_on(serve(shared, jobs)),
            Err(error) => tracing::error!(%error, "no runtime for shadows, they do not run"),
        }
    });
    if let Err(error) = thread {
        tracing::error!(%error, "no thread for shadows, they do not run");
        return None;
    }
    Some(queue)
}

/// Until the gateway that it is for has gone.
///
/// The queue is looked at now and then, rather than waited for: who leaves a copy has a request to
/// answer, and to wake a thread costs more than all the rest of it.
async fn serve(shared: Arc<Shared>, mut jobs: mpsc::Receiver<Job>) {
    let places = shared.settings.running_max.clamp(1, Semaphore::MAX_PERMITS);
    let places = Arc::new(Semaphore::new(places));
    let mut pause = LOOK_EVERY.0;
    loop {
        let job = match jobs.try_recv() {
            Ok(job) => job,
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => {
                sleep(pause).await;
                pause = (2 * pause).min(LOOK_EVERY.1);
                continue;
            }
        };
        pause = LOOK_EVERY.0;
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
        let shared = Arc::clone(&shared);
        tokio::spawn(async move {
            shared.end(job).await;
            drop(place);
        });
    }
}

/// A copy on its way through a shadow.
struct Run<'a> {
    answered: &'a Answered,
    shadow: &'a Arc<Served>,
    share: u16,
}

impl Shared {
    async fn end(&self, job: Job) {
        // What is gone has no counters either.
        let Some(shadow) = job.shadow.upgrade() else { return };
        let attempt = panics::caught_async(self.attempt(&job, &shadow)).await;
        let outcome = attempt.unwrap_or(Err(ShadowOutcome::Failed));
        shadow.stats.shadow_ended(outcome.err().unwrap_or(ShadowOutcome::Compared));
    }

    async fn attempt(&self, job: &Job, shadow: &Arc<Served>) -> Result<(), ShadowOutcome> {
        if self.draining.load(Ordering::Relaxed) {
            return Err(ShadowOutcome::Draining);
        }
        let answered = &*job.answered;
        if answered.deadline <= Instant::now() {
            return Err(ShadowOutcome::Deadline);
        }
        let run = Run { answered, shadow, share: job.share };
        let started = Instant::now();
        // Not kept while the shadow runs: it may be on its way out.
        let bound = run.bind(&*run.primary()?);
        let mut completion = run.completion();
        let done = self.infer(&run, bound, &mut completion).await;
        completion.timings.total = started.elapsed();
        if let Err(Stopped { failure, .. }) = &done {
            let message = failure.message.clone();
            completion.outcome = Outcome::Failed { kind: failure.kind, message };
        }
        match &done {
            // Nothing was begun that would have to be recorded.
            Err(Stopped { outcome: ShadowOutcome::Busy, .. }) => {}
            _ => {
                self.observer.completed(Some(&shadow.stats), &completion);
                self.record(&run, &completion);
            }
        }
        done.map_err(|stopped| stopped.outcome)?;
        self.compare(&run, &*run.primary()?, &completion);
        Ok(())
    }

    /// Nobody waits for it.
    fn record(&self, run: &Run<'_>, completion: &Completion) {
        let Some(ledger) = self.ledger.get() else { return };
        let (shadow, origin) = (run.shadow, &run.answered.origin);
        let about = About {
            signature: Some(&shadow.signature),
            engine: shadow.engine,
            recording: Some(&shadow.recording),
            config_revision: origin.config_revision,
            subject: origin.subject.as_deref(),
        };
        if let Err(why) = ledger.append(completion, &about) {
            tracing::debug!(%why, "a shadow could not be recorded");
            ledger.miss(completion.received_at);
        }
    }

    /// Runs the shadow, and puts into `completion` what came of it.
    async fn infer(
        &self,
        run: &Run<'_>,
        bound: Result<Vec<Tensor>, Failure>,
        completion: &mut Completion,
    ) -> Result<(), Stopped> {
        let failed = |failure| Stopped { outcome: ShadowOutcome::Failed, failure };
        let bound = bound.map_err(failed)?;
        completion.inputs.clone_from(&bound);
        let lane = &run.shadow.lane;
        let wait = run.answered.deadline.saturating_duration_since(Instant::now());
        let deadline = Deadline::new(Instant::now(), wait);
        let place = match lane.is_heavy(&bound) {
            true => Some(self.place(lane.budget()).await?),
            false => None,
        };
        let Ran { outputs, timings, batch_size } = lane.infer_spare(bound, deadline).await?;
        drop(place);
        completion.timings = timings;
        completion.batch_size = batch_size;
        completion.outputs = outputs;
        Ok(())
    }

    /// The right to one run that takes a thread. One thread is left to requests where there are
    /// more.
    async fn place(&self, budget: &ThreadBudget) -> Result<SemaphorePermit<'_>, Stopped> {
        let needed = budget.threads().min(2);
        let place = async {
            let place = self.heavy.acquire().await.map_err(|_| Stopped::busy())?;
            while budget.free() < needed {
                sleep(BUSY_POLL).await;
            }
            Ok(place)
        };
        timeout(BUSY_WAIT_MAX, place).await.unwrap_or_else(|_| Err(Stopped::busy()))
    }

    fn compare(&self, run: &Run<'_>, primary: &Served, completion: &Completion) {
        let compared = run.differences(primary, &completion.outputs);
        let comparison = Comparison {
            prediction_id: run.answered.completion.prediction_id,
            shadow_id: completion.prediction_id,
            primary,
            shadow: run.shadow,
            outputs: &compared,
        };
        self.tallies.lock().add(&comparison);
        for output in &compared {
            let agrees = output.difference.agrees;
            run.shadow.stats.shadow_compared(primary.version, &output.name, agrees);
        }
    }
}

/// One output and how far it was off.
pub(super) struct Compared {
    pub(super) name: Arc<str>,
    pub(super) datatype: &'static str,
    pub(super) difference: Difference,
}

impl Run<'_> {
    /// The record of a run that has not begun.
    fn completion(&self) -> Completion {
        let of = &self.answered.completion;
        Completion {
            prediction_id: Uuid::now_v7(),
            received_at: std::time::SystemTime::now(),
            version: Some(self.shadow.version),
            digest: Some(self.shadow.digest),
            arm: None,
            reason: Some(RouteReason::Shadow { share: self.share }),
            outcome: Outcome::Ok,
            timings: Timings::default(),
            batch_size: 0,
            cached: false,
            shadow_of: Some(of.prediction_id),
            inputs: Vec::new(),
            outputs: Vec::new(),
            ..of.clone()
        }
    }

    /// The version that made the answer, if it is there still.
    fn primary(&self) -> Result<Arc<Served>, ShadowOutcome> {
        self.answered.served.upgrade().ok_or(ShadowOutcome::Retired)
    }

    /// The request's inputs as the shadow wants them: by name, in its own order.
    fn bind(&self, primary: &Served) -> Result<Vec<Tensor>, Failure> {
        let inputs = primary.signature.inputs.iter().zip(&self.answered.completion.inputs);
        let mut named: Vec<NamedTensor> = inputs
            .map(|(spec, tensor)| NamedTensor { name: spec.name.clone(), tensor: tensor.clone() })
            .collect();
        if let Some(padding) = &self.shadow.lane.form().padding {
            padding.fill_mask(&mut named);
        }
        self.shadow.signature.bind(named)
    }

    /// Of the answer's first [`OUTPUTS_MAX`] outputs.
    fn differences(&self, primary: &Served, shadow: &[Tensor]) -> Vec<Compared> {
        let answer = &self.answered.completion.outputs;
        let outputs = primary.signature.outputs.iter().zip(answer).take(OUTPUTS_MAX);
        let compared = outputs.map(|(spec, answer)| {
            let other = self.shadow.signature.output_at(&spec.name).and_then(|at| shadow.get(at));
            let labels = &primary.settings.labels;
            let labelled = labels.iter().any(|(output, _)| *output == spec.name);
            Compared {
                name: spec.name.as_str().into(),
                datatype: spec.datatype.name(),
                difference: compare(answer, other, labelled),
            }
        });
        compared.collect()
    }
}

/// Why a shadow did not come to an end.
struct Stopped {
    outcome: ShadowOutcome,
    failure: Failure,
}

impl Stopped {
    fn busy() -> Self {
        let failure = Failure::new(ErrorKind::Overloaded, "no thread was free for a shadow");
        Self { outcome: ShadowOutcome::Busy, failure }
    }
}

impl From<BatchError> for Stopped {
    fn from(error: BatchError) -> Self {
        let outcome = match error.kind() {
            ErrorKind::DeadlineExceeded => ShadowOutcome::Deadline,
            ErrorKind::Overloaded => ShadowOutcome::Busy,
            ErrorKind::Unavailable => ShadowOutcome::Retired,
            _ => ShadowOutcome::Failed,
        };
        Self { outcome, failure: error.into_failure() }
    }
}
