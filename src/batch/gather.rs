//! Joins cheap requests that are ready on one I/O thread at the same moment.
//!
//! The first becomes the leader: it lets every other ready task of its thread have its turn, once.
//! Whoever comes meanwhile leaves its request with the leader, which then runs all of them where it
//! stands and hands out the outputs. No timer, no worker, no other core.
//!
//! Invariants:
//! - Batches are formed by the rules of the queue.
//! - What a leader that is dropped had gathered goes to the queue; nothing is lost.
//! - Where nobody else tends to be there, hardly a request looks for company.

use std::cell::RefCell;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::queue::{Entry, Queue, Take};
use super::run::run_batch;
use super::{Job, Outcome, Shared, Work};
use crate::domain::Deadline;

/// After gathering in vain, so many requests at most do not try.
const SKIP_MAX: u32 = 64;
/// Most requests that one leader takes along.
const GATHER_MAX: usize = 256;

/// Requests left with a leader; `None` once it goes.
type Left = Mutex<Option<Vec<Entry<Job>>>>;

struct Open {
    /// Tells lanes apart by where they are.
    lane: usize,
    left: Arc<Left>,
}

thread_local! {
    /// Leaders of this thread that others can join.
    static OPEN: RefCell<Vec<Open>> = const { RefCell::new(Vec::new()) };
}

/// When looking for company is worth it, from how it went.
#[derive(Debug, Default)]
pub(super) struct Company {
    /// Requests that go without a look.
    skip: AtomicU32,
    /// What `skip` is set to after the next look in vain.
    penalty: AtomicU32,
}

impl Company {
    fn look(&self) -> bool {
        let skip = self.skip.load(Ordering::Relaxed);
        if skip > 0 {
            self.skip.store(skip - 1, Ordering::Relaxed);
        }
        skip == 0
    }

    fn found(&self, any: bool) {
        let penalty = self.penalty.load(Ordering::Relaxed);
        let (skip, penalty) = if any { (0, 0) } else { (penalty, (2 * penalty + 1).min(SKIP_MAX)) };
        self.skip.store(skip, Ordering::Relaxed);
        self.penalty.store(penalty, Ordering::Relaxed);
    }
}

/// What became of a request that looked for company.
pub(super) enum Gathered {
    /// Left with a leader, or with company of its own and run.
    Joined(Outcome),
    /// Nobody was there.
    Alone(Work),
}

impl Shared {
    /// Whether requests like this one are to look for company: cheaper together, and free to go in
    /// any order.
    pub(super) fn gathers(&self, work: &Work) -> bool {
        let batch = &self.batch;
        self.form.batched
            && work.rows < batch.size_max
            && batch.priority_levels == 0
            && !batch.preserve_ordering
            && batch.preferred.is_empty()
            && self.cost.joining_pays(work.elements)
    }

    /// Leaves the request with the leader of this thread, or becomes it.
    pub(super) async fn gather(&self, work: Work, deadline: Deadline) -> Gathered {
        let work = match self.follow(work, deadline) {
            Ok(outcome) => return Gathered::Joined(outcome),
            Err(work) => work,
        };
        if !self.company.look() {
            return Gathered::Alone(work);
        }
        let leader = Leader::new(self);
        // On the runtime of an I/O thread: until every task that is ready now has had its turn.
        tokio::task::yield_now().await;
        let others = leader.close();
        self.company.found(!others.is_empty());
        if others.is_empty() {
            return Gathered::Alone(work);
        }
        let (entry, outcome) = self.entry(work, 0, deadline);
        self.run_gathered(std::iter::once(entry).chain(others));
        Gathered::Joined(outcome)
    }

    fn follow(&self, work: Work, deadline: Deadline) -> Result<Outcome, Work> {
        OPEN.with_borrow_mut(|open| {
            // A leader that was moved to another thread could not take itself out.
            open.retain(|open| open.left.lock().is_some());
            let Some(open) = open.iter().find(|open| open.lane == self.address()) else {
                return Err(work);
            };
            let mut left = open.left.lock();
            match &mut *left {
                Some(left) if left.len() < GATHER_MAX.min(self.batch.queue_max) => {
                    let (entry, outcome) = self.entry(work, 0, deadline);
                    left.push(entry);
                    Ok(outcome)
                }
                _ => Err(work),
            }
        })
    }

    /// Runs all of them on an idle session, or queues them when there is none.
    fn run_gathered(&self, entries: impl Iterator<Item = Entry<Job>>) {
        let now = Instant::now();
        let Some(mut session) = self.take_idle() else { return self.queue_all(entries) };
        let mut queue = Queue::new(self.batch.priority_age);
        entries.for_each(|entry| queue.push(entry));
        let joins = |a: &Job, b: &Job| self.form.joins(&a.inputs, &b.inputs);
        let rule = self.rule_at_once(queue.elements());
        while let Take::Batch(batch) = queue.take(&rule, now, joins) {
            run_batch(self, &mut *session, batch, now, false);
        }
        self.give_back(session);
    }

    fn queue_all(&self, entries: impl Iterator<Item = Entry<Job>>) {
        for entry in entries {
            if let Err((entry, error)) = self.push(entry) {
                // A caller who left meanwhile is recorded as cancelled by its own completion.
                drop(entry.item.reply.send(Err(error)));
            }
        }
    }

    /// Stays the same for as long as the lane lives.
    fn address(&self) -> usize {
        std::ptr::from_ref(self).addr()
    }
}

/// Collects until it is closed.
struct Leader<'a> {
    shared: &'a Shared,
    left: Arc<Left>,
}

impl<'a> Leader<'a> {
    fn new(shared: &'a Shared) -> Self {
        let left = Arc::new(Mutex::new(Some(Vec::new())));
        let open = Open { lane: shared.address(), left: Arc::clone(&left) };
        OPEN.with_borrow_mut(|all| all.push(open));
        Self { shared, left }
    }

    fn close(self) -> Vec<Entry<Job>> {
        self.take()
    }

    fn take(&self) -> Vec<Entry<Job>> {
        let left = self.left.lock().take().unwrap_or_default();
        // Is not there any more while the thread ends, and then nobody looks.
        let _ended = OPEN.try_with(|open| {
            open.borrow_mut().retain(|open| !Arc::ptr_eq(&open.left, &self.left));
        });
        left
    }
}

impl Drop for Leader<'_> {
    fn drop(&mut self) {
        let left = self.take();
        self.shared.queue_all(left.into_iter());
    }
}
