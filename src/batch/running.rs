//! Ends a run that nobody waits for any more.
//!
//! No thread watches: whoever is the last to leave, because its deadline passed or its caller went
//! away, ends the run on its way out.
//!
//! Invariants:
//! - A run with one member that still waits is never ended.
//! - After [`Running::over`] nothing reaches the session any more, so that the next run is safe.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;

use super::Job;
use super::queue::Entry;
use crate::engine::{Session, Stop};

/// One run, and how many still wait for it.
pub(super) struct Running {
    waiting: AtomicUsize,
    /// Guards the way to the session: `None` once the run is over.
    stop: Mutex<Option<Arc<dyn Stop>>>,
    stopped: AtomicUsize,
}

impl Running {
    /// The run of `batch` on `session`, which is about to begin; `None` where the engine cannot
    /// end a run.
    pub(super) fn begin(session: &dyn Session, batch: &[Entry<Job>]) -> Option<Arc<Self>> {
        let stop = Mutex::new(Some(session.stopper()?));
        // One for ourselves, so that nobody is the last before all are counted.
        let waiting = AtomicUsize::new(1);
        let running = Arc::new(Self { waiting, stop, stopped: AtomicUsize::new(0) });
        for entry in batch {
            entry.item.ticket.board(&running);
        }
        running.leave();
        Some(running)
    }

    fn leave(&self) {
        if self.waiting.fetch_sub(1, Ordering::AcqRel) == 1
            && let Some(stop) = &*self.stop.lock()
        {
            self.stopped.store(1, Ordering::Relaxed);
            stop.stop();
        }
    }

    /// The run has ended; whether it was made to.
    pub(super) fn over(&self) -> bool {
        let stop = self.stop.lock().take();
        let stopped = self.stopped.load(Ordering::Relaxed) > 0;
        if let Some(stop) = stop.filter(|_| stopped) {
            stop.reset();
        }
        stopped
    }
}

/// What a waiting caller and the one who runs its request share.
#[derive(Clone, Default)]
pub(super) struct Ticket(Arc<Mutex<Place>>);

#[derive(Default)]
enum Place {
    #[default]
    Waiting,
    Running(Arc<Running>),
    Gone,
}

impl Ticket {
    fn board(&self, running: &Arc<Running>) {
        let mut place = self.0.lock();
        match &*place {
            Place::Gone => {}
            // Run again, after the batch failed.
            Place::Waiting | Place::Running(_) => {
                running.waiting.fetch_add(1, Ordering::AcqRel);
                *place = Place::Running(Arc::clone(running));
            }
        }
    }
}

/// Held by the caller for as long as it waits.
pub(super) struct Waiter(pub(super) Ticket);

impl Drop for Waiter {
    fn drop(&mut self) {
        let place = std::mem::replace(&mut *self.0.0.lock(), Place::Gone);
        if let Place::Running(running) = place {
            running.leave();
        }
    }
}
