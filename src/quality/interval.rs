//! Where the truth behind a share or a mean may lie.

use super::tally::Moments;

/// That the truth lies within the bounds.
pub const CONFIDENCE: f64 = 0.95;
/// Standard deviations that hold [`CONFIDENCE`] of a normal distribution.
const Z: f64 = 1.959_963_984_540_054;
/// Samples at which the bounds of a mean are the tightest.
const TIGHTEST_AT: f64 = 500.0;

/// Wilson's bounds of a share, for one look at it. `None` of nothing.
pub fn share_bounds(hits: u64, of: u64) -> Option<(f64, f64)> {
    if of == 0 {
        return None;
    }
    let n = of as f64;
    let share = hits.min(of) as f64 / n;
    let scale = 1.0 + Z * Z / n;
    let centre = (share + Z * Z / (2.0 * n)) / scale;
    let half = Z / scale * (share * (1.0 - share) / n + Z * Z / (4.0 * n * n)).sqrt();
    Some(((centre - half).max(0.0), (centre + half).min(1.0)))
}

/// Bounds of an F1, from those of its share of hits among everything that was one class or taken
/// for it: F1 = 2s / (1 + s) grows with that.
pub(super) fn f1_bounds(hits: u64, support: u64, predicted: u64) -> Option<(f64, f64)> {
    let either = (support + predicted).saturating_sub(hits);
    let f1 = |share: f64| 2.0 * share / (1.0 + share);
    share_bounds(hits, either).map(|(low, high)| (f1(low), f1(high)))
}

/// Bounds of a mean that hold at every look at once: a confidence sequence by a normal mixture,
/// with the variance that was seen (asymptotic). `None` of fewer than two.
pub fn mean_bounds(moments: &Moments) -> Option<(f64, f64)> {
    if moments.count < 2 {
        return None;
    }
    let alpha = 1.0 - CONFIDENCE;
    let log = -2.0 * f64::ln(alpha);
    let rho2 = (log + log.ln() + 1.0) / TIGHTEST_AT;
    let (n, mean) = (moments.count as f64, moments.mean());
    let grown = n * rho2 + 1.0;
    let half = (2.0 * grown / (n * n * rho2) * (grown.sqrt() / alpha).ln()).sqrt();
    let half = moments.variance().sqrt() * half;
    Some((mean - half, mean + half))
}
