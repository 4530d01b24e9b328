//! How good predictions were: what labels said of them, as counts that add up, and figures of those.
//!
//! ```text
//! prediction + label ─▶ Judged ─▶ Tally ──add, remove──▶ Tally of a day, of an arm, of a version
//!                                                              └─▶ Figures: shares, means, bounds
//! ```
//!
//! The figures are those of scikit-learn by the same names; a test holds them against it.
//!
//! Invariants:
//! - Pure: no clock, no files, nothing of ours.
//! - A tally that is added and removed again leaves nothing: a correction replaces what it corrects.
//! - Memory is bounded: [`CLASSES_MAX`] classes and [`METRICS_MAX`] metrics in one tally.

mod figures;
mod interval;
mod tally;

pub use figures::{
    Bin, Calibration, ClassFigures, Classification, Delay, Estimate, Estimated, Figures,
    MetricFigures, Regression,
};
pub use interval::{CONFIDENCE, mean_bounds, share_bounds};
pub use tally::{CLASSES_MAX, ClassRow, Judged, METRICS_MAX, Moments, Scores, Tally, ValueRow};

#[cfg(test)]
mod tests;
