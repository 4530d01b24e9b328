//! How many values a second are looked at: the budget that keeps the monitor cheap.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What may be taken at once, in seconds of the budget.
const BURST_NS: u64 = 1_000_000_000;

/// A rate, as the time at which all that was taken would have been earned.
#[derive(Debug)]
pub(super) struct Budget {
    base: Instant,
    per_second: u64,
    /// Nanoseconds since `base`.
    earned_at: AtomicU64,
}

impl Budget {
    pub(super) fn new(per_second: u64) -> Self {
        let (base, per_second) = (Instant::now(), per_second.max(1));
        Self { base, per_second, earned_at: AtomicU64::new(0) }
    }

    /// Takes so much, if it is not more than a second ahead; one that is larger than a second's is
    /// taken when nothing is owed.
    pub(super) fn take(&self, values: u64, now: Instant) -> bool {
        let now = u64::try_from(now.saturating_duration_since(self.base).as_nanos());
        let now = now.unwrap_or(u64::MAX);
        let cost = u128::from(values) * 1_000_000_000 / u128::from(self.per_second);
        let cost = u64::try_from(cost).unwrap_or(u64::MAX);
        let taken = |earned_at: u64| {
            let from = earned_at.max(now.saturating_sub(BURST_NS));
            let owed = from > now.saturating_sub(BURST_NS);
            let after = from.saturating_add(cost);
            (after <= now || !owed).then_some(after)
        };
        self.earned_at.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn no_more_is_taken_than_the_rate_and_one_burst() {
        let budget = Budget::new(1000);
        let at = |ms: u64| budget.base + Duration::from_millis(ms);
        // The first second's burst is earned only then.
        assert!((0..2000).filter(|_| budget.take(1, at(1000))).count() <= 1001);
        let taken = (0..5000).filter(|ms| budget.take(1, at(1000 + ms))).count();
        assert!((4900..=5100).contains(&taken), "{taken}");
    }

    #[test]
    fn what_is_larger_than_a_second_passes_alone() {
        let budget = Budget::new(1000);
        let at = |ms: u64| budget.base + Duration::from_millis(ms);
        assert!(budget.take(5000, at(2000)));
        assert!(!budget.take(1, at(2001)));
        assert!(!budget.take(1, at(5000)));
        assert!(budget.take(1, at(6100)));
    }
}
