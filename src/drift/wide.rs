//! Images, embeddings and sequences: never element by element.
//!
//! A row becomes seven numbers and a random projection to 16 dimensions; the projection's distribution
//! is compared as a whole, too, by random Fourier features: the squared distance of their means is an
//! estimate of the maximum mean discrepancy with a Gaussian kernel (Rahimi and Recht 2007).
//!
//! Invariants:
//! - Cost: at most [`READ_MAX`] elements of a row are read, evenly spread over it.
//! - A projection depends on the elements' places only: no matrix is kept, and all versions have the same.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use super::feature::Part;
use super::grid::{LARGEST, ROWS_MAX};
use super::random::{mix, normal, uniform};

/// Dimensions of the projection.
pub const DIMENSIONS: usize = 16;
/// Random features of the projection.
pub const FEATURES: usize = 256;
/// Elements of a row that are read.
pub const READ_MAX: usize = 65_536;
/// The seed of what no profile says another of.
pub const SEED: u64 = 0x7464_6774;
/// Rows whose distances to each other say how wide the kernel is.
const MEDIAN_ROWS: usize = 500;

/// The numbers that sum up a row, beside its projection.
pub const PARTS: [Part; 6] =
    [Part::Mean, Part::Std, Part::Min, Part::Max, Part::Norm, Part::Saturated];

/// A row, summed up; of its finite elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    pub mean: f64,
    pub std: f64,
    pub min: f64,
    pub max: f64,
    /// Root of the sum of squares.
    pub norm: f64,
    /// Share of the elements that equal the smallest or the largest.
    pub saturated: f64,
}

impl Summary {
    /// `None` when there is no finite element.
    pub fn of(row: &[f64]) -> Option<Self> {
        let (mut len, mut sum, mut squares) = (0_u64, 0.0, 0.0);
        let (mut min, mut max) = (f64::INFINITY, f64::NEG_INFINITY);
        for value in row.iter().copied().filter(|value| value.is_finite()) {
            len += 1;
            sum += value;
            squares += value * value;
            min = min.min(value);
            max = max.max(value);
        }
        if len == 0 {
            return None;
        }
        let len = len as f64;
        let at_an_end = row.iter().filter(|value| **value == min || **value == max).count() as f64;
        let mean = sum / len;
        let std = (squares / len - mean * mean).max(0.0).sqrt();
        Some(Self { mean, std, min, max, norm: squares.sqrt(), saturated: at_an_end / len })
    }

    pub fn part(&self, part: Part) -> Option<f64> {
        match part {
            Part::Mean => Some(self.mean),
            Part::Std => Some(self.std),
            Part::Min => Some(self.min),
            Part::Max => Some(self.max),
            Part::Norm => Some(self.norm),
            Part::Saturated => Some(self.saturated),
            _ => None,
        }
    }
}

/// `Σ ± x_i / sqrt(k)`, with signs for each of the dimensions drawn by the place of the element, which
/// is `step` times its place in `row`. What is not finite is left out.
pub fn project(row: &[f64], step: usize, seed: u64) -> [f64; DIMENSIONS] {
    let mut sums = [0.0; DIMENSIONS];
    for (at, value) in row.iter().enumerate().filter(|(_, value)| value.is_finite()) {
        let signs = mix(seed, (at * step) as u64);
        for (dimension, sum) in sums.iter_mut().enumerate() {
            *sum += if signs >> dimension & 1 == 0 { *value } else { -*value };
        }
    }
    let scale = (row.len().max(1) as f64).sqrt();
    sums.map(|sum| sum / scale)
}

/// The random features: `sqrt(2/D) cos(w·x + b)`, `w` normal with standard deviation `1/sigma`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Kernel {
    pub seed: u64,
    /// Width of the Gaussian kernel.
    pub sigma: f64,
}

impl Kernel {
    /// With the median distance between rows as its width; 1 when all rows are one.
    pub fn over(rows: &[[f64; DIMENSIONS]], seed: u64) -> Self {
        let step = rows.len().div_ceil(MEDIAN_ROWS).max(1);
        let some: Vec<&[f64; DIMENSIONS]> = rows.iter().step_by(step).collect();
        let mut distances = Vec::with_capacity(some.len() * some.len() / 2);
        for (at, a) in some.iter().enumerate() {
            for b in &some[..at] {
                let square: f64 = a.iter().zip(*b).map(|(x, y)| (x - y).powi(2)).sum();
                distances.push(square.sqrt());
            }
        }
        distances.sort_unstable_by(f64::total_cmp);
        let median = distances.get(distances.len() / 2).copied().unwrap_or(0.0);
        let sigma = if median > 0.0 && median.is_finite() { median } else { 1.0 };
        Self { seed, sigma }
    }

    /// The frequencies and phases, which take some tens of microseconds to draw.
    pub fn waves(&self) -> Waves {
        let at = |feature: usize, dimension: usize| (feature * (DIMENSIONS + 1) + dimension) as u64;
        let wave = |feature: usize| {
            let frequency = std::array::from_fn(|d| normal(self.seed, at(feature, d)) / self.sigma);
            let phase = 2.0 * PI * uniform(!self.seed, at(feature, DIMENSIONS));
            (frequency, phase)
        };
        Waves((0..FEATURES).map(wave).collect())
    }
}

/// A kernel's features, drawn.
#[derive(Clone, Debug, PartialEq)]
pub struct Waves(Vec<([f64; DIMENSIONS], f64)>);

/// Sums of random features of the rows so far; those of parts add up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Fourier {
    pub rows: u64,
    pub missing: u64,
    #[serde(with = "super::sparse")]
    pub sums: Vec<f64>,
}

impl Default for Fourier {
    fn default() -> Self {
        Self { rows: 0, missing: 0, sums: vec![0.0; FEATURES] }
    }
}

impl Fourier {
    pub fn add(&mut self, waves: &Waves, row: &[f64; DIMENSIONS]) {
        if !row.iter().all(|value| value.abs() <= LARGEST) {
            self.missing += 1;
            return;
        }
        self.rows += 1;
        let scale = (2.0 / FEATURES as f64).sqrt();
        for (sum, (frequency, phase)) in self.sums.iter_mut().zip(&waves.0) {
            let angle: f64 = frequency.iter().zip(row).map(|(w, x)| w * x).sum::<f64>() + phase;
            *sum += scale * angle.cos();
        }
    }

    pub fn merge(&mut self, other: &Self) {
        self.rows += other.rows;
        self.missing += other.missing;
        for (have, more) in self.sums.iter_mut().zip(&other.sums) {
            *have += more;
        }
    }

    /// Squared distance of the means: 0 for one distribution, but for `(1/n + 1/m)` or less by chance;
    /// 2 at most. `None` when either has no rows.
    pub fn mmd2(&self, other: &Self) -> Option<f64> {
        if self.rows == 0 || other.rows == 0 {
            return None;
        }
        let (n, m) = (self.rows as f64, other.rows as f64);
        Some(self.sums.iter().zip(&other.sums).map(|(a, b)| (a / n - b / m).powi(2)).sum())
    }

    pub(super) fn fits(&self) -> bool {
        self.sums.len() == FEATURES
            && self.sums.iter().all(|sum| sum.is_finite())
            && self.rows.max(self.missing) <= ROWS_MAX
    }
}

#[cfg(test)]
mod tests;
