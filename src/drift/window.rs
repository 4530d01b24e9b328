//! The raw values of one feature: the latest of them, or a uniform sample of all.
//!
//! Invariants:
//! - Memory is 8 bytes a value up to `size`, which its maker says; nothing grows after that.
//! - A [`Reservoir`] of the same values, size and seed is the same reservoir.

use serde::{Deserialize, Serialize};

use super::random::mix;

/// Values that a window holds when nobody says otherwise.
pub const WINDOW: usize = 8192;
/// Most of them.
pub const WINDOW_MAX: usize = 65_536;

/// The latest values.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Ring<T = f64> {
    values: Vec<T>,
    size: usize,
    /// Where the next value goes when it is full.
    at: usize,
}

impl<T> Ring<T> {
    /// `size` is 1 at least and [`WINDOW_MAX`] at most.
    pub fn new(size: usize) -> Self {
        Self { values: Vec::new(), size: size.clamp(1, WINDOW_MAX), at: 0 }
    }

    pub fn push(&mut self, value: T) {
        if self.values.len() < self.size {
            self.values.push(value);
            return;
        }
        if let Some(oldest) = self.values.get_mut(self.at) {
            *oldest = value;
        }
        self.at = (self.at + 1) % self.size.max(1);
    }

    /// In no order.
    pub fn values(&self) -> &[T] {
        &self.values
    }

    pub fn clear(&mut self) {
        self.values.clear();
        self.at = 0;
    }
}

/// A sample in which each value that came is as likely as any other.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reservoir<T = f64> {
    values: Vec<T>,
    size: usize,
    seen: u64,
    seed: u64,
}

impl<T> Reservoir<T> {
    pub fn new(size: usize, seed: u64) -> Self {
        Self { values: Vec::new(), size: size.max(1), seen: 0, seed }
    }

    pub fn push(&mut self, value: T) {
        self.seen += 1;
        if self.values.len() < self.size {
            self.values.push(value);
            return;
        }
        // A number below `seen`, each about as likely.
        let drawn = u128::from(mix(self.seed, self.seen)) * u128::from(self.seen);
        let place = usize::try_from(drawn >> 64).unwrap_or(usize::MAX);
        if let Some(replaced) = self.values.get_mut(place) {
            *replaced = value;
        }
    }

    /// All values, in the order in which they came, while they are not more than its size.
    pub fn values(&self) -> &[T] {
        &self.values
    }

    /// Values that came.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Whether some of them are not in it.
    pub fn sampled(&self) -> bool {
        self.seen > self.values.len() as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_holds_the_latest() {
        let mut ring = Ring::new(3);
        for value in 0..8 {
            ring.push(f64::from(value));
        }
        let mut held = ring.values().to_vec();
        held.sort_by(f64::total_cmp);
        assert_eq!(held, [5.0, 6.0, 7.0]);
    }

    #[test]
    fn each_value_is_as_likely_to_stay() {
        // 2,000 reservoirs of 10 out of 100: each tenth of the values is kept 2,000 times on average,
        // with a standard deviation of 42.
        let mut kept = [0_u32; 10];
        for seed in 0..2000 {
            let mut reservoir = Reservoir::new(10, seed);
            for value in 0..100 {
                reservoir.push(f64::from(value));
            }
            assert_eq!((reservoir.values().len(), reservoir.seen()), (10, 100));
            for value in reservoir.values() {
                let tenths = (0..10).filter(|tenth| f64::from(*tenth) * 10.0 <= *value);
                kept[tenths.count() - 1] += 1;
            }
        }
        assert!(kept.iter().all(|count| (1830..2170).contains(count)), "{kept:?}");
    }
}
