//! The threads behind a lane: each waits for a batch and an idle session, and runs the one on the
//! other.

use std::sync::Arc;

use tokio::time::Instant;

use super::queue::{Entry, Take};
use super::run::run_batch;
use super::{Job, Shared};
use crate::engine::Session;

/// A batch to run now.
struct Due {
    batch: Vec<Entry<Job>>,
    session: Box<dyn Session>,
    /// When the worker began to look for work.
    free_since: Instant,
}

/// One worker's life: it ends when the lane is closed and nothing waits.
pub(super) fn work(shared: Arc<Shared>) {
    while let Some(Due { batch, mut session, free_since }) = shared.next_batch() {
        let elements = batch.iter().map(|entry| entry.elements).sum();
        let permit = shared.budget.enter(shared.cost.predict(elements));
        run_batch(&shared, &mut *session, batch, free_since, true);
        drop(permit);
        shared.give_back(session);
    }
    // Another worker may sleep with nothing left to do.
    shared.work.notify_all();
    drop(shared);
    crate::engine::release_memory();
}

impl Shared {
    pub(super) fn give_back(&self, session: Box<dyn Session>) {
        let mut state = self.state.lock();
        state.end(session);
        let wanted = state.queue.len() > 0 || state.closed;
        drop(state);
        if wanted {
            self.work.notify_one();
        }
    }

    /// Waits for the next batch and a session to run it on; `None` when the lane is closed and
    /// nothing waits.
    fn next_batch(&self) -> Option<Due> {
        let joins = |a: &Job, b: &Job| self.form.joins(&a.inputs, &b.inputs);
        let free_since = Instant::now();
        let mut state = self.state.lock();
        loop {
            let now = Instant::now();
            self.bury(&mut state, now);
            let held = self.batch.preserve_ordering && state.running > 0;
            // What is spare leaves one session to requests that may come.
            let kept = usize::from(state.queue.only_spare() && self.sessions > 1);
            let may_run = !held && state.idle.len() > kept;
            let mut wake_at = state.queue.next_expiry();
            if may_run {
                let rule = self.rule(&state, now);
                match state.queue.take(&rule, now, joins) {
                    Take::Batch(batch) => {
                        let session = state.begin()?;
                        let more = state.queue.len() > 0 && !state.idle.is_empty();
                        drop(state);
                        if more {
                            self.work.notify_one();
                        }
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
