//! Runs a cheap request where it stands, without waking a worker.

use std::time::Duration;

use tokio::time::Instant;

use super::run::run;
use super::{BatchError, Ran, Shared};
use crate::domain::{Tensor, Timings};

/// waking a worker and being woken by it costs about as much.
const INLINE_COST_MAX: Duration = Duration::from_micros(50);
/// Requests larger than this are never run inline: their cost is not the one that was learnt.
const INLINE_BYTES_MAX: usize = 64 << 10;

impl Shared {
    /// Runs where the request stands, if the lane is idle and the model known to be cheap.
    pub(super) fn run_inline(
        &self,
        inputs: &[Tensor],
        rows: usize,
    ) -> Option<Result<Ran, BatchError>> {
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
        self.count_elements(&[inputs], inputs);
        Some(result.map(|outputs| Ran { outputs, timings, batch_size: rows }))
    }
}
