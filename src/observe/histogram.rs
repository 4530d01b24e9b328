//! Histograms of durations, and of batch sizes, that many threads record into at once.
//!
//! Buckets hold their own counts, not running totals, so that a record is two additions: one
//! bucket, one sum. A reader folds shards and gets totals that agree with each other, because the
//! count is the sum of the buckets.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the latency buckets in nanoseconds, the last one open.
///
/// From 25 us, about what we add to a request ourselves, to 60 s, the longest deadline by default.
/// Steps of two or two and a half keep a quantile's error below that factor at any latency, for 21
/// counters a series.
pub const LATENCY_BOUNDS_NS: [u64; 20] = [
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    10_000_000,
    25_000_000,
    50_000_000,
    100_000_000,
    250_000_000,
    500_000_000,
    1_000_000_000,
    2_500_000_000,
    5_000_000_000,
    10_000_000_000,
    30_000_000_000,
    60_000_000_000,
];

/// Upper bounds of the batch size buckets: powers of two, as batches are usually limited to one.
pub const BATCH_BOUNDS: [u64; 13] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096];

/// The bounds' buckets and the open one.
pub const LATENCY_BUCKETS: usize = LATENCY_BOUNDS_NS.len() + 1;

/// One thread shard's counts.
#[derive(Default)]
pub(super) struct LatencyShard {
    buckets: [AtomicU64; LATENCY_BUCKETS],
    sum_ns: AtomicU64,
}

impl LatencyShard {
    pub(super) fn record(&self, duration: Duration) {
        let ns = nanos(duration);
        let at = LATENCY_BOUNDS_NS.partition_point(|bound| *bound < ns);
        self.buckets[at].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(ns, Ordering::Relaxed);
    }

    pub(super) fn fold_into(&self, folded: &mut Latency) {
        for (total, bucket) in folded.buckets.iter_mut().zip(&self.buckets) {
            *total += bucket.load(Ordering::Relaxed);
        }
        folded.sum_ns += self.sum_ns.load(Ordering::Relaxed);
    }
}

/// Folded counts of a latency histogram.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Latency {
    pub(super) buckets: [u64; LATENCY_BUCKETS],
    pub(super) sum_ns: u64,
}

impl Latency {
    #[cfg(test)]
    pub(super) fn count(&self) -> u64 {
        self.buckets.iter().sum()
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (total, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *total += more;
        }
        self.sum_ns += other.sum_ns;
    }
}

/// Counts of a batch size histogram.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct BatchSizes {
    pub(super) buckets: [u64; BATCH_BOUNDS.len() + 1],
    pub(super) sum: u64,
}

impl BatchSizes {
    pub(super) fn record(&mut self, rows: u64) {
        self.buckets[BATCH_BOUNDS.partition_point(|bound| *bound < rows)] += 1;
        self.sum += rows;
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (total, more) in self.buckets.iter_mut().zip(&other.buckets) {
            *total += more;
        }
        self.sum += other.sum;
    }
}

/// Whole nanoseconds; 584 years at most.
pub(super) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket_of(duration: Duration) -> usize {
        let shard = LatencyShard::default();
        shard.record(duration);
        let mut folded = Latency::default();
        shard.fold_into(&mut folded);
        assert_eq!(folded.count(), 1);
        folded.buckets.iter().position(|count| *count == 1).unwrap()
    }

    #[test]
    fn a_bound_belongs_to_its_bucket() {
        let last = LATENCY_BOUNDS_NS.len();
        assert_eq!(bucket_of(Duration::ZERO), 0);
        for (at, bound) in LATENCY_BOUNDS_NS.into_iter().enumerate() {
            assert_eq!(bucket_of(Duration::from_nanos(bound - 1)), at);
            assert_eq!(bucket_of(Duration::from_nanos(bound)), at);
            assert_eq!(bucket_of(Duration::from_nanos(bound + 1)), at + 1);
        }
        assert_eq!(bucket_of(Duration::MAX), last);
        assert!(LATENCY_BOUNDS_NS.is_sorted() && BATCH_BOUNDS.is_sorted());
    }

    #[test]
    fn batch_sizes_fall_at_or_below_their_bound() {
        let mut sizes = BatchSizes::default();
        for rows in [1, 2, 3, 4, 5, 4096, 4097] {
            sizes.record(rows);
        }
        assert_eq!(sizes.buckets, [1, 1, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1]);
        assert_eq!(sizes.sum, 1 + 2 + 3 + 4 + 5 + 4096 + 4097);
    }
}
