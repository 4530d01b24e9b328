//! What enters the queue, and the answer to what does not.
//!
//! Invariants:
//! - With nothing ahead of it a request is always let in, so that an estimate that is too high is
//!   corrected by the next run.
//! - Nothing spare keeps a request out.

use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::queue::{Entry, SPARE};
use super::running::{Ticket, Waiter};
use super::{BatchError, Job, Outcome, Shared, State, Work};
use crate::domain::Deadline;

/// Least and longest time after which a refused caller is asked to come back.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

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

    /// A request as the queue holds it, and how its caller waits for it.
    pub(super) fn entry(
        &self,
        work: Work,
        priority: u32,
        deadline: Deadline,
    ) -> (Entry<Job>, Outcome) {
        let (reply, receiver) = oneshot::channel();
        let ticket = Ticket::default();
        let queued_at = Instant::now();
        let mut expires_at = deadline.at;
        if let Some(longest) = self.batch.queue_wait_max {
            expires_at = expires_at.min(queued_at + longest);
        }
        let Work { inputs, rows, elements, bytes } = work;
        let item = Job { inputs, deadline, reply, ticket: ticket.clone() };
        let entry = Entry { rows, elements, bytes, priority, queued_at, expires_at, item };
        (entry, Outcome { receiver, _waiter: Waiter(ticket), deadline })
    }

    /// Queues one request, or says at once why it cannot wait here.
    pub(super) fn push(&self, entry: Entry<Job>) -> Result<(), (Box<Entry<Job>>, BatchError)> {
        let now = entry.queued_at;
        let mut state = self.state.lock();
        if state.closed {
            return Err((Box::new(entry), BatchError::Retired));
        }
        if self.refusal(&state, &entry).is_some() {
            // The dead make room before the living are refused, and then what is spare.
            self.bury(&mut state, now);
            if entry.priority != SPARE && self.refusal(&state, &entry).is_some() {
                self.give_way(&mut state);
            }
            if let Some(error) = self.refusal(&state, &entry) {
                return Err((Box::new(entry), error));
            }
        }
        if entry.priority != SPARE {
            state.arrivals.came(now);
        }
        let entry = self.to_start_in_time(&state, entry);
        state.queue.push(entry);
        drop(state);
        self.work.notify_one();
        Ok(())
    }

    /// Why the queue has no place for `entry` as things stand.
    fn refusal(&self, state: &State, entry: &Entry<Job>) -> Option<BatchError> {
        let (queue, model) = (&state.queue, &self.model);
        let retry_after = || self.retry_after(queue.elements());
        let queue_max = self.batch.queue_max;
        if queue.len() >= queue_max {
            let (model, retry_after) = (model.clone(), retry_after());
            return Some(BatchError::QueueFull { model, queue_max, retry_after });
        }
        let bytes_max = self.batch.queue_bytes_max;
        if queue.len() > 0 && queue.bytes().saturating_add(entry.bytes) > bytes_max {
            let (model, retry_after) = (model.clone(), retry_after());
            return Some(BatchError::QueueBytes { model, bytes_max, retry_after });
        }
        let before = queue.elements_before(entry.queued_at, entry.priority);
        if before == 0 && !state.idle.is_empty() {
            return None;
        }
        let run = self.cost.predict(entry.elements)?;
        // What runs now is half done, on average.
        let ahead = if state.idle.is_empty() { run / 2 } else { Duration::ZERO };
        let (wait, run) = (self.drain(before)? + ahead, with_margin(run));
        let starts_at = entry.queued_at + wait;
        if starts_at < entry.expires_at && starts_at + run <= entry.item.deadline.at {
            return None;
        }
        let (model, retry_after) = (model.clone(), retry_after());
        Some(BatchError::NotInTime { model, wait, run, retry_after })
    }

    /// Lets `entry` expire when it could not be done by its deadline any more, rather than at it:
    /// a run that ends too late is time taken from those that would be in time. One that can start
    /// at once is left alone, or an estimate that is too high would never be corrected.
    fn to_start_in_time(&self, state: &State, mut entry: Entry<Job>) -> Entry<Job> {
        let at_once = state.queue.len() == 0 && !state.idle.is_empty();
        if let Some(run) = self.cost.predict(entry.elements).filter(|_| !at_once)
            && let Some(latest) = entry.item.deadline.at.checked_sub(with_margin(run))
        {
            entry.expires_at = entry.expires_at.min(latest);
        }
        entry
    }

    fn retry_after(&self, elements: usize) -> Duration {
        let drained = self.drain(elements).unwrap_or_default();
        drained.clamp(RETRY_AFTER.0, RETRY_AFTER.1)
    }

    /// Takes what expired, or was left by its caller, out of the queue and answers it.
    pub(super) fn bury(&self, state: &mut State, now: Instant) {
        for entry in state.queue.take_dead(now, |job| job.reply.is_closed()) {
            self.expire(entry, state.queue.elements());
        }
    }

    /// Takes what is spare out of the queue and answers it.
    fn give_way(&self, state: &mut State) {
        for entry in state.queue.take_spare() {
            // Nobody waits any more where this cannot be sent.
            drop(entry.item.reply.send(Err(BatchError::GaveWay)));
        }
    }

    /// Answers a request that is of no use any more; `elements` wait behind it.
    pub(super) fn expire(&self, entry: Entry<Job>, elements: usize) {
        let Job { deadline, reply, .. } = entry.item;
        let error = if deadline.passed(Instant::now()) {
            BatchError::DeadlineExceeded { waited: deadline.received.elapsed() }
        } else {
            let waited = entry.queued_at.elapsed();
            let (model, retry_after) = (self.model.clone(), self.retry_after(elements));
            BatchError::WaitedTooLong { model, waited, retry_after }
        };
        // A caller who left meanwhile is recorded as cancelled by its own completion.
        drop(reply.send(Err(error)));
    }
}

/// Runs take a little longer than the shortest, which is what is learnt, and so do their answers.
fn with_margin(run: Duration) -> Duration {
    run + run / 8
}
