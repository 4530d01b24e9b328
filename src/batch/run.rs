//! Runs one batch on one session and answers its members.
//!
//! Invariant: a request that fails alone never fails its neighbours.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::form::Elements;
use super::queue::Entry;
use super::running::Running;
use super::{BatchError, Job, Ran, Shared};
use crate::domain::{Tensor, Timings};
use crate::engine::{EngineError, Session};
use crate::panics;

/// Runs `batch` together, or one by one if that fails, and answers every member. `stoppable`: its
/// callers may leave meanwhile.
pub(super) fn run_batch(
    shared: &Shared,
    session: &mut dyn Session,
    batch: Vec<Entry<Job>>,
    free_since: Instant,
    stoppable: bool,
) {
    // The wait for the thread budget may have outlasted some.
    let batch = living(shared, batch);
    match batch.len() {
        0 => {}
        1 => run_each(shared, session, batch, free_since, stoppable),
        _ => match run_joined(shared, session, &batch, free_since, stoppable) {
            Ok(results) => {
                for (entry, ran) in batch.into_iter().zip(results) {
                    answer(entry.item.reply, Ok(ran));
                }
            }
            Err(error) => {
                tracing::debug!(model = %shared.model, %error, "batch failed, run one by one");
                run_each(shared, session, batch, free_since, stoppable);
            }
        },
    }
}

/// Those that somebody waits for and that have not expired; the others are answered.
fn living(shared: &Shared, batch: Vec<Entry<Job>>) -> Vec<Entry<Job>> {
    let now = Instant::now();
    let dead = |entry: &Entry<Job>| entry.expires_at <= now || entry.item.reply.is_closed();
    if !batch.iter().any(dead) {
        return batch;
    }
    let (dead, living) = batch.into_iter().partition(dead);
    let dead: Vec<Entry<Job>> = dead;
    dead.into_iter().for_each(|entry| shared.expire(entry, 0));
    living
}

fn run_each(
    shared: &Shared,
    session: &mut dyn Session,
    batch: Vec<Entry<Job>>,
    free_since: Instant,
    stoppable: bool,
) {
    for entry in batch {
        // The runs before may have outlasted it.
        for entry in living(shared, vec![entry]) {
            run_alone(shared, session, entry, free_since, stoppable);
        }
    }
}

fn run_alone(
    shared: &Shared,
    session: &mut dyn Session,
    entry: Entry<Job>,
    free_since: Instant,
    stoppable: bool,
) {
    let started = Instant::now();
    let one = std::slice::from_ref(&entry);
    let result = run_for(one, session, &entry.item.inputs, stoppable);
    let took = started.elapsed();
    if result.is_ok() {
        shared.cost.learn(entry.elements, took);
    }
    let timings =
        Timings { compute_infer: took, ..waits(shared, entry.queued_at, free_since, started) };
    shared.stats.executed(entry.rows, &timings);
    shared.count_elements(&[&entry.item.inputs], &entry.item.inputs);
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
    stoppable: bool,
) -> Result<Vec<Ran>, BatchError> {
    let started = Instant::now();
    let members: Vec<&[Tensor]> = batch.iter().map(|entry| &*entry.item.inputs).collect();
    let batched = shared.form.join(&members).ok_or(BatchError::NotJoined)?;
    let joined = Instant::now();
    let outputs = run_for(batch, session, &batched.inputs, stoppable)?;
    let ran = Instant::now();
    let cut = shared.form.cut(&batched, &outputs)?;
    let compute = Timings {
        compute_input: joined - started,
        compute_infer: ran - joined,
        compute_output: ran.elapsed(),
        ..Timings::default()
    };
    let rows = batched.rows();
    let elements = batch.iter().map(|entry| entry.elements).sum();
    shared.cost.learn(elements, started.elapsed());
    shared.stats.executed(rows, &compute);
    shared.count_elements(&members, &batched.inputs);
    let ran = batch.iter().zip(cut).map(|(entry, outputs)| {
        let waits = waits(shared, entry.queued_at, free_since, started);
        let timings = Timings { queue: waits.queue, batch_wait: waits.batch_wait, ..compute };
        Ran { outputs, timings, batch_size: rows }
    });
    Ok(ran.collect())
}

impl Shared {
    /// Counts what a run of `members` as `inputs` had of padding.
    pub(super) fn count_elements(&self, members: &[&[Tensor]], inputs: &[Tensor]) {
        if let Some(Elements { real, padding }) = self.form.counted(members, inputs) {
            self.stats.padded(real, padding);
        }
    }
}

/// A run that ends when nobody in `batch` waits for it any more.
fn run_for(
    batch: &[Entry<Job>],
    session: &mut dyn Session,
    inputs: &[Tensor],
    stoppable: bool,
) -> Result<Vec<Tensor>, BatchError> {
    let running = if stoppable { Running::begin(session, batch) } else { None };
    let result = run(session, inputs);
    if running.is_some_and(|running| running.over()) {
        tracing::debug!("a run was ended, nobody waited for it");
    }
    result
}

/// A panicking engine fails its request and nothing else.
pub(super) fn run(session: &mut dyn Session, inputs: &[Tensor]) -> Result<Vec<Tensor>, BatchError> {
    let caught = panics::caught(|| session.run(inputs));
    let result = caught.unwrap_or_else(|| Err(EngineError::Run("the engine panicked".to_owned())));
    result.map_err(|error| BatchError::Engine(Arc::new(error)))
}

fn answer(reply: oneshot::Sender<Result<Ran, BatchError>>, result: Result<Ran, BatchError>) {
    // A caller who left meanwhile is recorded as cancelled by its own completion.
    drop(reply.send(result));
}
