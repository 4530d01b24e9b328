//! How many runs may happen at once, over all models.

use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// Runs shorter than this do not take a place: they are over before the wait would pay, and a
/// tiny model must not stand behind a heavy one.
const FREE_COST_MAX: Duration = Duration::from_millis(1);

/// Places for runs, shared by every lane; as many as inference threads.
#[derive(Debug)]
pub struct ThreadBudget {
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
        Self { free: Mutex::new(threads.max(1)), freed: Condvar::new() }
    }

    /// Waits for a place, unless a run of this `cost` needs none. An unknown cost is zero.
    pub fn enter(&self, cost: Duration) -> Permit<'_> {
        if !cost.is_zero() && cost < FREE_COST_MAX {
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
