//! What enters the queue, and the answer to what does not.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::queue::Entry;
use super::run::expire;
use super::{BatchError, Job, Ran, Shared};
use crate::domain::{Deadline, Tensor};

impl Shared {
    pub(super) fn priority(&self, wanted: u32) -> Result<u32, BatchError> {
        let levels = self.batch.priority_levels;
        match wanted {
            _ if levels == 0 => Ok(0), // A model without priorities ignores them, as Triton does.
            0 => Ok(self.batch.priority_default),
            priority if priority <= levels => Ok(priority),
            priority => Err(BatchError::Priority { priority, levels }),
        }
    }

    /// Queues one request, or answers at once that it cannot wait here.
    pub(super) fn push(
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
}
