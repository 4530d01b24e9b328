//! What the next batch may be, from what is configured, what was learnt and what waits.

use std::time::Duration;

use tokio::time::Instant;

use super::queue::Rule;
use super::{Shared, State};

/// A run predicted to take longer is heavy: it takes a place of the thread budget, and what waits
/// is shared out over idle sessions.
pub(super) const HEAVY_MIN: Duration = Duration::from_millis(1);
/// What one more run has to save before work is shared out for it.
const SHARE_GAIN_MIN: Duration = Duration::from_micros(100);
/// So many usual gaps without a request mean that nobody is coming.
const LULL_GAPS: u32 = 4;

impl Shared {
    /// How the next batch is closed.
    pub(super) fn rule(&self, state: &State, now: Instant) -> Rule<'_> {
        let batch = &self.batch;
        let mut wait_max = batch.wait_max;
        let gap = state.arrivals.gap();
        if state.closed || gap.is_some_and(|gap| gap > wait_max) || state.arrivals.over(now) {
            wait_max = Duration::ZERO;
        }
        let mut elements_max = batch.elements_max;
        // With preferred sizes, the operator has decided.
        if batch.preferred.is_empty() {
            let waiting = state.queue.elements();
            elements_max = elements_max.min(self.cost.worth(waiting));
            if wait_max.is_zero() {
                elements_max = elements_max.min(self.share(state, waiting.min(elements_max)));
            }
        }
        Rule {
            rows_max: batch.size_max,
            elements_max,
            preferred: &batch.preferred,
            wait_max,
            lull: gap.map_or(Duration::MAX, |gap| gap.saturating_mul(LULL_GAPS)),
        }
    }

    /// How batches are closed that run at once, on one session.
    pub(super) fn rule_at_once(&self, waiting: usize) -> Rule<'_> {
        let batch = &self.batch;
        Rule {
            rows_max: batch.size_max,
            elements_max: batch.elements_max.min(self.cost.worth(waiting)),
            preferred: &[],
            wait_max: Duration::ZERO,
            lull: Duration::ZERO,
        }
    }

    /// Each idle session's share of `waiting` elements, if they are heavy and done sooner so.
    fn share(&self, state: &State, waiting: usize) -> usize {
        let idle = state.idle.len();
        let whole = self.cost.predict(waiting).filter(|_| idle > 1);
        let Some(whole) = whole.filter(|whole| *whole >= HEAVY_MIN) else { return usize::MAX };
        let part = waiting.div_ceil(idle.min(self.budget.free()).max(1));
        let sooner = |part: Duration| part + SHARE_GAIN_MIN < whole;
        if self.cost.predict(part).is_some_and(sooner) { part } else { usize::MAX }
    }

    /// How long `elements` take with every session at work; `None` before anything was learnt.
    pub(super) fn drain(&self, elements: usize) -> Option<Duration> {
        let parallel = self.sessions.min(self.budget.threads()).max(1);
        Some(self.cost.drain(elements)? / u32::try_from(parallel).unwrap_or(u32::MAX))
    }
}

/// When requests come: the usual gap between two, which bursts and pauses do not upset.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    last: Option<Instant>,
    /// Near the median of all gaps.
    gap: Option<Duration>,
}

impl Arrivals {
    pub(super) fn came(&mut self, now: Instant) {
        if let Some(last) = self.last {
            let seen = now.saturating_duration_since(last);
            self.gap = Some(match self.gap {
                None => seen,
                Some(gap) if seen < gap => gap - gap / 8,
                // A gap of zero has to grow too.
                Some(gap) => gap + (gap / 8).max(Duration::from_nanos(100)),
            });
        }
        self.last = Some(now);
    }

    fn gap(&self) -> Option<Duration> {
        self.gap
    }

    /// Whether nobody has come for several gaps.
    fn over(&self, now: Instant) -> bool {
        let since = |last| now.saturating_duration_since(last);
        let lull = self.gap.map(|gap| gap.saturating_mul(LULL_GAPS));
        self.last.zip(lull).is_some_and(|(last, lull)| since(last) > lull)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_gap_is_learnt_through_bursts() {
        let mut arrivals = Arrivals::default();
        assert_eq!(arrivals.gap(), None);
        let mut now = Instant::now();
        for at in 0..400 {
            now += if at % 8 == 0 { Duration::from_millis(50) } else { Duration::from_micros(100) };
            arrivals.came(now);
        }
        let gap = arrivals.gap().unwrap();
        assert!(gap < Duration::from_micros(300), "{gap:?}");
        assert!(!arrivals.over(now) && arrivals.over(now + Duration::from_millis(2)));
        for _ in 0..100 {
            now += Duration::from_millis(50);
            arrivals.came(now);
        }
        let gap = arrivals.gap().unwrap();
        assert!(gap > Duration::from_millis(30), "{gap:?}");
    }
}
