//! Arrival times of an open loop: fixed before the load starts, the same for the same seed.

use std::time::Duration;

use clap::ValueEnum;

/// How arrivals are spread.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Arrivals {
    /// One every 1/rate seconds.
    Constant,
    /// Independent of each other, as from many callers: exponential gaps.
    #[default]
    Poisson,
}

/// Offsets from the start of all arrivals at `rate` per second during `length`, in order.
#[must_use]
pub fn offsets(arrivals: Arrivals, rate: f64, length: Duration, seed: u64) -> Vec<Duration> {
    let mut random = Random::new(seed);
    let mut offsets = Vec::new();
    let end = length.as_secs_f64();
    let mut at = 0.0;
    loop {
        // A constant schedule is computed from the index, so that no error adds up.
        match arrivals {
            Arrivals::Constant => at = offsets.len() as f64 / rate,
            Arrivals::Poisson => at -= (1.0 - random.unit()).ln() / rate,
        }
        if at >= end {
            return offsets;
        }
        offsets.push(Duration::from_secs_f64(at));
    }
}

/// `SplitMix64`: small, seeded and good enough for loads.
pub struct Random(u64);

impl Random {
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// In `0.0..1.0`.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// In `0..below`; `below` is at least 1.
    pub fn below(&mut self, below: u64) -> u64 {
        self.bits() % below.max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn constant_arrivals_are_evenly_spaced_without_drift() {
        let got = offsets(Arrivals::Constant, 1000.0, 10 * SECOND, 1);
        assert_eq!(got.len(), 10_000);
        assert_eq!(got[0], Duration::ZERO);
        let last = Duration::from_secs_f64(9.999);
        assert!(got[9_999].abs_diff(last) < Duration::from_nanos(10), "{:?}", got[9_999]);
    }

    #[test]
    fn poisson_arrivals_have_the_rate_and_the_spread_of_independent_callers() {
        let got = offsets(Arrivals::Poisson, 1000.0, 100 * SECOND, 7);
        let count = got.len() as f64;
        // The standard deviation of the count is 316.
        assert!((count - 100_000.0).abs() < 1600.0, "{count}");
        let gaps: Vec<f64> = got.windows(2).map(|two| (two[1] - two[0]).as_secs_f64()).collect();
        let mean = gaps.iter().sum::<f64>() / gaps.len() as f64;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / gaps.len() as f64;
        let ratio = variance.sqrt() / mean;
        assert!((ratio - 1.0).abs() < 0.05, "an exponential's deviation is its mean: {ratio}");
    }

    #[test]
    fn arrivals_are_in_order_within_the_length_and_repeat_with_the_seed() {
        for arrivals in [Arrivals::Constant, Arrivals::Poisson] {
            let got = offsets(arrivals, 333.0, SECOND, 3);
            assert!(got.is_sorted());
            assert!(got.iter().all(|at| *at < SECOND));
            assert_eq!(got, offsets(arrivals, 333.0, SECOND, 3));
        }
        let other = offsets(Arrivals::Poisson, 333.0, SECOND, 4);
        assert_ne!(other, offsets(Arrivals::Poisson, 333.0, SECOND, 3));
    }
}
