//! Runs a cheap request where it stands, without waking a worker.

use std::time::Duration;

use tokio::time::Instant;

use super::run::run;
use super::{BatchError, Ran, Shared, Work};
use crate::domain::Timings;
use crate::engine::Session;

/// A run predicted to take less than this happens on the caller's thread when the lane is idle:
/// waking a worker and being woken by it costs about as much.
const INLINE_COST_MAX: Duration = Duration::from_micros(50);
/// Requests larger than this are never run inline.
const INLINE_BYTES_MAX: usize = 64 << 10;

impl Shared {
    /// Whether a request is known to be cheap enough to run where it stands.
    pub(super) fn cheap(&self, work: &Work) -> bool {
        let cheap = |cost: Duration| cost < INLINE_COST_MAX;
        self.inline
            && work.bytes <= INLINE_BYTES_MAX
            && self.cost.predict(work.elements).is_some_and(cheap)
    }

    /// Runs where the request stands, if the lane is idle.
    pub(super) fn run_inline(&self, work: &Work) -> Option<Result<Ran, BatchError>> {
        let mut session = self.take_idle()?;
        let started = Instant::now();
        let result = run(&mut *session, &work.inputs);
        let took = started.elapsed();
        self.give_back(session);
        if result.is_ok() {
            self.cost.learn(work.elements, took);
        }
        let timings = Timings { compute_infer: took, ..Timings::default() };
        self.stats.executed(work.rows, &timings);
        self.count_elements(&[&work.inputs], &work.inputs);
        Some(result.map(|outputs| Ran { outputs, timings, batch_size: work.rows }))
    }

    /// A session that nobody runs on while nobody waits for one; what is spare may wait.
    pub(super) fn take_idle(&self) -> Option<Box<dyn Session>> {
        let mut state = self.state.lock();
        let waits = state.queue.len() > 0 && !state.queue.only_spare();
        if waits || (self.batch.preserve_ordering && state.running > 0) {
            return None;
        }
        state.begin()
    }
}
