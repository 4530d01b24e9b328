//! Whether the mean of a feature has moved: by more than chance, and by enough to matter.

use super::report::MeanReport;
use crate::drift::evidence::ROWS_MIN;
use crate::drift::feature::Part;
use crate::drift::profile::{FeatureProfile, Reference};
use crate::drift::sequential::{Band, MeanFound, Means};

/// Bands are narrowest near so many values.
const EXPECTED: u64 = 2000;
/// A change of the mean is large from so many of the reference's standard deviations on: where
/// `wasserstein`, which is never less, is held to be.
const LARGE: f64 = 0.1;
/// And a change of the confidence is at least so large: one in a hundred.
const CONFIDENCE_LARGE_MIN: f64 = 0.01;

/// Whether a feature has a mean that can be held against the reference's.
pub(super) fn has_mean(feature: &FeatureProfile) -> bool {
    matches!(&feature.reference, Reference::Num(numeric) if numeric.cells.std() > 0.0)
}

/// What to say of a feature's mean; `alpha` is this feature's part.
pub(super) fn report(of: &FeatureProfile, means: &Means, alpha: f64) -> Option<MeanReport> {
    let Reference::Num(numeric) = &of.reference else { return None };
    let cells = &numeric.cells;
    let (std, reference_mean) = (cells.std(), cells.mean);
    let band = Band { std, reference: Some(cells.len()), expected: EXPECTED };
    let confidence = of.feature.part == Part::Confidence;
    let limit = (LARGE * std).max(if confidence { CONFIDENCE_LARGE_MIN } else { 0.0 });
    let apart = |found: &MeanFound| found.mean - reference_mean;
    let enough = |found: &MeanFound| found.count.min(cells.len()) >= ROWS_MIN;
    let moved = |found: &MeanFound| {
        enough(found) && apart(found).abs() > found.band && apart(found).abs() >= limit
    };
    let strength = |found: &MeanFound| (moved(found), apart(found).abs() / found.band);
    let most = means.found(&band, alpha).into_iter().max_by(|a, b| {
        let ((a_moved, a), (b_moved, b)) = (strength(a), strength(b));
        a_moved.cmp(&b_moved).then(a.total_cmp(&b))
    })?;
    let state = match (moved(&most), enough(&most)) {
        (true, _) if apart(&most) < 0.0 => DOWN,
        (true, _) => UP,
        (false, true) => "steady",
        (false, false) => "insufficient_data",
    };
    let (rows, mean, band) = (most.count, most.mean, most.band);
    Some(MeanReport { rows, mean, reference_mean, band, limit, state })
}

/// States of a mean that has moved.
pub(super) const UP: &str = "up";
pub(super) const DOWN: &str = "down";

impl MeanReport {
    /// Whether it is both beyond its band and large.
    pub fn has_moved(&self) -> bool {
        matches!(self.state, UP | DOWN)
    }
}
