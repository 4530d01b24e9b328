//! What a run costs, learnt from the runs themselves, and which size of batch is worth it.
//!
//! The size of a run is the number of elements of all its inputs. For a model of fixed shapes that
//! is as good as its rows; for others it also tells a short sequence from a long one. One point is
//! kept for each power of two: the smoothed size and time of the runs between it and the last.
//!
//! Invariants:
//! - No lock. An update lost between two threads makes an estimate a little older, no more.
//! - One outlier (a first run, a page fault, a lost time slice) moves nothing: what counts is the
//!   shorter of two runs in a row.
//! - Trying sizes that seem not to pay costs at most 1/[`EXPLORE_SHARE`] of the time of all runs.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

/// Sizes up to 2^47 elements are told apart.
const POINTS: usize = 48;
/// Sizes are kept in 1/256ths, so that smoothing small ones does not get stuck.
const SIZE_SCALE: u64 = 256;
/// What a run costs beyond itself: the queue, a wake-up, the answers.
const DISPATCH_NS: f64 = 5_000.0;
/// A larger batch is worth it if an element in it costs less than this share of what it costs in
/// a smaller one; else the smaller is taken, whose first answers leave sooner.
const GAIN_MIN: f64 = 0.97;
/// The same where joining is not free.
const JOIN_GAIN_MIN: f64 = 0.9;
const EXPLORE_SHARE: u64 = 128;
/// `best` before the first run.
const UNKNOWN: usize = usize::MAX;

#[derive(Debug, Default)]
struct Point {
    /// Smoothed, times [`SIZE_SCALE`].
    size: AtomicU64,
    /// Smoothed, in nanoseconds; 0 before the first run.
    time: AtomicU64,
    /// Time of the last run.
    last: AtomicU64,
}

/// What is known of one point.
#[derive(Clone, Copy)]
struct Known {
    size: f64,
    ns: f64,
}

impl Known {
    fn per_element(self) -> f64 {
        (self.ns + DISPATCH_NS) / self.size
    }
}

#[derive(Debug)]
pub(super) struct Cost {
    points: [Point; POINTS],
    /// The point whose batches are worth it.
    best: AtomicUsize,
    /// Nanoseconds that may be lost by trying a size that seems not to pay.
    explore: AtomicU64,
}

impl Cost {
    pub(super) fn new() -> Self {
        Self {
            points: std::array::from_fn(|_| Point::default()),
            best: AtomicUsize::new(UNKNOWN),
            explore: AtomicU64::new(0),
        }
    }

    /// A run of `size` elements took this long.
    pub(super) fn learn(&self, size: usize, took: Duration) {
        let sample = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX).max(1);
        let point = &self.points[at(size)];
        let last = point.last.swap(sample, Ordering::Relaxed);
        let sample = if last == 0 { sample } else { sample.min(last) };
        let scaled = (size.max(1) as u64).saturating_mul(SIZE_SCALE);
        let (time, mean) = (point.time.load(Ordering::Relaxed), point.size.load(Ordering::Relaxed));
        let (time, mean) = if time == 0 || time / 2 > sample {
            (sample, scaled)
        } else {
            (time - time / 4 + sample / 4, mean - mean / 4 + scaled / 4)
        };
        point.time.store(time.max(1), Ordering::Relaxed);
        point.size.store(mean, Ordering::Relaxed);
        self.explore.fetch_add(sample / EXPLORE_SHARE, Ordering::Relaxed);
        self.best.store(self.find_best(), Ordering::Relaxed);
    }

    fn known(&self, at: usize) -> Option<Known> {
        let point = self.points.get(at)?;
        let ns = point.time.load(Ordering::Relaxed);
        let size = point.size.load(Ordering::Relaxed).max(SIZE_SCALE) as f64 / SIZE_SCALE as f64;
        (ns > 0).then_some(Known { size, ns: ns as f64 })
    }

    fn find_best(&self) -> usize {
        let mut best = (UNKNOWN, f64::INFINITY);
        for at in 0..POINTS {
            if let Some(known) = self.known(at)
                && known.per_element() < best.1 * GAIN_MIN
            {
                best = (at, known.per_element());
            }
        }
        best.0
    }

    /// How long a run of `size` elements will take; `None` before the first run.
    pub(super) fn predict(&self, size: usize) -> Option<Duration> {
        let wanted = size.max(1) as f64;
        let mut below = (0..=at(size)).rev().filter_map(|at| self.known(at));
        let mut above = (at(size)..POINTS).filter_map(|at| self.known(at));
        let lower = below.find(|known| known.size <= wanted);
        let upper = above.find(|known| known.size > wanted);
        let ns = match (lower, upper) {
            (None, None) => return None,
            (Some(a), Some(b)) => a.ns + (b.ns - a.ns) * (wanted - a.size) / (b.size - a.size),
            // Fewer elements take at most as long.
            (None, Some(b)) => b.ns,
            (Some(a), None) => {
                let in_proportion = a.ns * wanted / a.size;
                let onwards = below.next().map(|b| {
                    a.ns + (a.ns - b.ns).max(0.0) * (wanted - a.size) / (a.size - b.size).max(1.0)
                });
                onwards.map_or(in_proportion, |ns| ns.min(in_proportion))
            }
        };
        Some(Duration::from_secs_f64(ns.clamp(1.0, 1e18) / 1e9))
    }

    /// Time that `size` elements take in batches of the best size, one after the other.
    pub(super) fn drain(&self, size: usize) -> Option<Duration> {
        let best = self.known(self.best.load(Ordering::Relaxed))?;
        let ns = best.ns / best.size * size as f64;
        Some(Duration::from_secs_f64(ns.min(1e18) / 1e9))
    }

    /// Most elements that are worth joining when `waiting` of them wait: the best size known, at
    /// times the next larger, so that a verdict can change.
    pub(super) fn worth(&self, waiting: usize) -> usize {
        let best = self.best.load(Ordering::Relaxed);
        let Some(known) = self.known(best) else { return usize::MAX };
        let most = 1_usize << best;
        if waiting <= most || best + 1 >= POINTS {
            return most;
        }
        // Over what it would have to cost to be worth it.
        let loss = self
            .known(best + 1)
            .map_or(0.0, |next| next.ns + DISPATCH_NS - known.per_element() * GAIN_MIN * next.size);
        if loss > 0.0 && !self.spend(loss) {
            return most;
        }
        most * 2
    }

    /// Whether an element costs less in a larger run than in one of `size`, or that is not known,
    /// or is to be found out again. For runs without a dispatch: joining them saves no more than
    /// the runs themselves do, and costs a little.
    pub(super) fn joining_pays(&self, size: usize) -> bool {
        let Some(one) = self.known(at(size)) else { return false };
        let per_element = |known: Known| known.ns / known.size;
        let mut larger = (at(size) + 1..POINTS).filter_map(|at| self.known(at)).peekable();
        let Some(next) = larger.peek().copied() else { return true };
        let most = per_element(one) * JOIN_GAIN_MIN;
        larger.any(|known| per_element(known) < most) || self.spend(next.ns)
    }

    /// Whether so much may be lost now.
    fn spend(&self, loss: f64) -> bool {
        let have = self.explore.load(Ordering::Relaxed);
        let may = loss <= have as f64;
        if may {
            // What was not needed is not kept either: one try, not a series of them.
            self.explore.store(0, Ordering::Relaxed);
        }
        may
    }
}

/// The point of a size: sizes over `2^(at - 1)` and up to `2^at`.
fn at(size: usize) -> usize {
    let at = usize::BITS - size.max(1).saturating_sub(1).leading_zeros();
    (at as usize).min(POINTS - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const US: Duration = Duration::from_micros(1);

    /// A lane's memory after `runs` runs of each size, each of which takes what `took` says.
    fn learnt(sizes: &[usize], took: impl Fn(usize) -> Duration) -> Cost {
        let cost = Cost::new();
        for size in sizes {
            for _ in 0..4 {
                cost.learn(*size, took(*size));
            }
        }
        cost
    }

    fn near(got: Option<Duration>, want: Duration) -> bool {
        let (got, want) = (got.unwrap().as_secs_f64(), want.as_secs_f64());
        (got / want - 1.0).abs() < 0.02
    }

    #[test]
    fn what_lies_between_and_beyond_is_estimated() {
        let cost = Cost::new();
        assert_eq!(cost.predict(4), None);
        assert_eq!(cost.drain(4), None);
        assert_eq!(cost.worth(1000), usize::MAX, "nothing is known, nothing is held back");
        let cost = learnt(&[100, 800], |size| US * 50 + US * u32::try_from(size).unwrap());
        assert!(near(cost.predict(100), US * 150));
        assert!(near(cost.predict(450), US * 500));
        assert!(near(cost.predict(1600), US * 1650));
        assert!(near(cost.predict(10), US * 150), "fewer take at most as long");
        let cost = learnt(&[100], |_| US * 100);
        assert!(near(cost.predict(400), US * 400), "in proportion, for want of better");
    }

    #[test]
    fn an_outlier_moves_nothing_and_a_change_moves_it_soon() {
        let cost = Cost::new();
        cost.learn(8, US * 90_000);
        cost.learn(8, US * 10);
        assert!(near(cost.predict(8), US * 10), "the first run was slow");
        for _ in 0..20 {
            cost.learn(8, US * 10);
        }
        cost.learn(8, US * 50_000);
        assert!(near(cost.predict(8), US * 10));
        cost.learn(8, US * 10);
        assert!(near(cost.predict(8), US * 10));
        for _ in 0..9 {
            cost.learn(8, US * 1000);
        }
        assert!(cost.predict(8).unwrap() > US * 800);
    }

    #[test]
    fn a_size_is_worth_it_only_if_elements_get_cheaper() {
        let sizes = [64, 128, 256, 512];
        let flat = learnt(&sizes, |size| US * 1000 * u32::try_from(size).unwrap());
        assert_eq!(flat.worth(64), 64);
        let fixed = learnt(&sizes, |size| US * 1000 + US * u32::try_from(size).unwrap());
        assert_eq!(fixed.worth(512), 512);
        assert_eq!(fixed.worth(9000), 1024, "an unknown size is tried");
        // Falls off a cliff beyond 128, and that is tried again only now and then.
        let cliff = |size: usize| if size > 128 { US * 400_000 } else { US * 1000 };
        let cost = learnt(&sizes, cliff);
        cost.explore.store(0, Ordering::Relaxed);
        let (mut total, mut tried) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..200_000 {
            let size = cost.worth(9000);
            cost.learn(size, cliff(size));
            total += cliff(size);
            tried += if size > 128 { cliff(size) } else { Duration::ZERO };
        }
        assert!(tried > Duration::ZERO, "a verdict can change");
        assert!(tried < total / 50, "{tried:?} of {total:?} went into trying");
        assert_eq!(cost.worth(128), 128);
        // The cliff goes: the larger sizes are found.
        for _ in 0..200_000 {
            cost.learn(cost.worth(9000), US * 1000);
        }
        assert!(cost.worth(9000) >= 8192);
    }

    proptest! {
        #[test]
        fn estimates_stay_within_what_was_seen(
            runs in prop::collection::vec((1_usize..5000, 1_u64..1_000_000), 1..200),
            asked in 1_usize..5000,
        ) {
            let cost = Cost::new();
            for (size, ns) in &runs {
                cost.learn(*size, Duration::from_nanos(*ns));
            }
            let got = cost.predict(asked).unwrap().as_secs_f64() * 1e9;
            let most = runs.iter().map(|(_, ns)| *ns).max().unwrap() as f64;
            let least = runs.iter().map(|(size, _)| *size).min().unwrap() as f64;
            prop_assert!(got >= 0.5);
            // Beyond the largest size that was seen, at most in proportion.
            prop_assert!(got <= most * (asked as f64 / least).max(1.0) * 1.01);
            prop_assert!(cost.worth(asked) >= 1);
        }
    }
}
