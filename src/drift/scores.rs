//! Distances between two samples or two tables of counts, each by one published definition.
//!
//! What is called as Evidently calls it is computed as Evidently 0.7.23 computes it, its bins and its
//! filling of empty ones included; Kolmogorov-Smirnov and Wasserstein as scipy does. Logarithms are
//! natural. Values are doubles: a frame of 32-bit floats gives Evidently's edges of bins other last
//! digits.
//!
//! Invariants:
//! - Samples come ascending and without NaN and infinities: [`Sample`] takes them out.
//! - A score that does not exist (of an empty sample) is `None`, never a number that looks like one.

use statrs::function::erf::erfc;
use statrs::function::gamma::gamma_ur;

mod evidently;
mod ks;
mod sample;
mod shares;

pub use evidently::{ColumnTest, ColumnVerdict, DATASET_SHARE, column_test, dataset_drifts};
pub use ks::{ks_distance, ks_p_value};
pub use sample::{Counts, Sample, Sides};
pub use shares::Shares;

/// P(X² >= `x`) with `df` degrees of freedom; 1 without any.
pub fn chi_square_sf(x: f64, df: usize) -> f64 {
    match (df, x) {
        (0, _) => 1.0,
        (_, x) if x <= 0.0 => 1.0,
        (_, x) if x.is_infinite() => 0.0,
        (df, x) if x.is_nan() || df > 1 << 30 => f64::NAN,
        (df, x) => gamma_ur(df as f64 / 2.0, x / 2.0).clamp(0.0, 1.0),
    }
}

/// P(|Z| >= |z|) of the standard normal distribution.
pub fn normal_two_sided(z: f64) -> f64 {
    if z.is_nan() { f64::NAN } else { erfc(z.abs() / std::f64::consts::SQRT_2) }
}

/// First Wasserstein distance, `∫|F_a - F_b|`, in the values' own unit. Both ascending, not empty.
pub fn wasserstein(a: &[f64], b: &[f64]) -> f64 {
    let (n, m) = (a.len() as f64, b.len() as f64);
    let mut area = 0.0;
    walk(a, b, |below_a, below_b, from, to| {
        if let Some(to) = to {
            area += (below_a as f64 / n - below_b as f64 / m).abs() * (to - from);
        }
    });
    area
}

/// Calls for each distinct value with how many of each sample are at or below it, the value, and the
/// next one.
fn walk(a: &[f64], b: &[f64], mut each: impl FnMut(usize, usize, f64, Option<f64>)) {
    let (mut i, mut j) = (0, 0);
    let least = |i: usize, j: usize| match (a.get(i), b.get(j)) {
        (Some(x), Some(y)) => Some(x.min(*y)),
        (x, y) => x.or(y).copied(),
    };
    while let Some(value) = least(i, j) {
        while a.get(i).is_some_and(|x| *x <= value) {
            i += 1;
        }
        while b.get(j).is_some_and(|y| *y <= value) {
            j += 1;
        }
        each(i, j, value, least(i, j));
    }
}

#[cfg(test)]
mod tests;
