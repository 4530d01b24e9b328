//! How many runs may happen at once, over all models.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::plan::HEAVY_MIN;

/// Places for runs, shared by every lane; as many as inference threads.
#[derive(Debug)]
pub struct ThreadBudget {
    threads: usize,
    /// Guards the number of places left.
    free: Mutex<usize>,
    freed: Condvar,
}

/// One place, given back when dropped.
#[derive(Debug)]
pub struct Permit<'a> {
    budget: Option<&'a ThreadBudget>,
}

impl ThreadBudget {
    pub fn new(threads: usize) -> Self {
        let threads = threads.max(1);
        Self { threads, free: Mutex::new(threads), freed: Condvar::new() }
    }

    /// All places, free or not.
    pub fn threads(&self) -> usize {
        self.threads
    }

    /// Places free at this moment.
    pub fn free(&self) -> usize {
        *self.free.lock()
    }

    /// Waits for a place, unless a run of this `cost` needs none: it is over before the wait would
    /// pay, and a tiny model must not stand behind a heavy one.
    pub fn enter(&self, cost: Option<Duration>) -> Permit<'_> {
        if cost.is_some_and(|cost| cost < HEAVY_MIN) {
            return Permit { budget: None };
        }
        let mut free = self.free.lock();
        while *free == 0 {
            self.freed.wait(&mut free);
        }
        *free -= 1;
        Permit { budget: Some(self) }
    }
}

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        if let Some(budget) = self.budget {
            *budget.free.lock() += 1;
            budget.freed.notify_one();
        }
    }
}
