//! What the monitor has found, for the admin API and the metrics.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use crate::drift::counters::Score;
use crate::drift::feature::Role;
use crate::drift::grid::ROWS_MAX;
pub use crate::drift::quality::Oddities;
use crate::drift::verdict::State;

/// One version: what it is compared with, and how its arms do.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct VersionReport {
    pub model: String,
    pub version: String,
    pub model_digest: String,
    pub reference: ReferenceReport,
    /// Rows that were not looked at: over the budget of values a second, or no room.
    #[schema(minimum = 0)]
    pub skipped_rows: u64,
    pub arms: Vec<ArmReport>,
}

/// What rows are compared with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct ReferenceReport {
    /// `file`, `frozen`, `provisional`, `learning`, or `none`.
    pub kind: &'static str,
    /// Rows of it; of one that is being learnt, so far.
    #[schema(minimum = 0)]
    pub rows: u64,
    /// SHA-256 of its file.
    pub digest: Option<String>,
    /// Where it comes from.
    pub source: Option<String>,
    /// Why there is none.
    pub problem: Option<String>,
    /// Inputs and outputs of the model that it has no feature of, and that nobody looks at therefore.
    pub without: Vec<String>,
}

/// The rows of one version that came in one way.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ArmReport {
    pub arm: String,
    #[serde(flatten)]
    pub total: Counted,
    /// The same since this process has the version, for the metrics page.
    #[serde(skip)]
    pub own: Counted,
    pub windows: Vec<WindowReport>,
    /// Outputs that the model is less sure of than it was: the mean of the largest score went `down`.
    pub confidence_drop: Vec<String>,
    /// Of features that had any; none where values are not to be seen.
    pub new_categories: Vec<NewCategories>,
}

/// Categories of one feature that the reference lacks, since the version was watched first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct NewCategories {
    pub feature: String,
    /// `input` or `output`.
    #[schema(value_type = String)]
    pub role: Role,
    pub tensor: String,
    /// The most frequent ones, 32 at most.
    pub values: Vec<NewCategory>,
}

/// It came `count` times at most, and `count - over_count` times at least.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct NewCategory {
    /// Its first 64 bytes.
    pub value: String,
    #[schema(minimum = 1)]
    pub count: u64,
    #[schema(minimum = 0)]
    pub over_count: u64,
    /// Start of the five minutes in which it came last.
    pub last_seen: Option<String>,
}

/// Since the version was watched first, restarts included.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, serde::Deserialize, ToSchema)]
pub struct Counted {
    /// Rows that were looked at.
    #[schema(minimum = 0)]
    pub rows: u64,
    /// Rows with at least one value that is far out, or was never seen.
    #[schema(minimum = 0)]
    pub outlier_rows: u64,
    pub quality: Oddities,
}

impl Counted {
    /// Whether adding to it can go on for ever. For what comes from a file.
    pub(super) fn fits(&self) -> bool {
        let counts = self.quality.counts();
        counts.iter().chain([&self.rows, &self.outlier_rows]).all(|count| *count <= ROWS_MAX)
    }
}

/// Where a feature's mean is, held against the reference's: since the version was watched first, the day
/// began or the hour, whichever says most.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
pub struct MeanReport {
    /// Values since then.
    #[schema(minimum = 0)]
    pub rows: u64,
    pub mean: f64,
    pub reference_mean: f64,
    /// What the mean is apart from the reference's by chance at most, however often one looks.
    pub band: f64,
    /// From where a change of the mean is held to be large.
    pub limit: f64,
    /// `insufficient_data`, `steady`, or what is both beyond the band and large: `up` or `down`.
    pub state: &'static str,
}

/// A stretch of time, or a number of rows.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct WindowReport {
    /// `hour`, `day`, or `latest`: the latest values, where the reference has values to compare with.
    pub window: &'static str,
    /// When it begins; none of `latest`.
    pub since: Option<String>,
    #[schema(minimum = 0)]
    pub rows: u64,
    /// `insufficient_data`, `steady` or `drifted`.
    #[schema(value_type = String)]
    pub state: State,
    /// Features that have drifted.
    #[schema(minimum = 0)]
    pub drifted: usize,
    pub features: Vec<FeatureReport>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct FeatureReport {
    pub feature: String,
    /// `input` or `output`.
    #[schema(value_type = String)]
    pub role: Role,
    pub tensor: String,
    #[schema(minimum = 0)]
    pub rows: u64,
    #[schema(value_type = String)]
    pub state: State,
    /// By name, see docs/monitor.md.
    #[schema(value_type = BTreeMap<String, f64>)]
    pub scores: BTreeMap<Score, f64>,
    /// Scores at or beyond their limits, whether that is evidence or not, with the limits.
    #[schema(value_type = BTreeMap<String, f64>)]
    pub beyond: BTreeMap<Score, f64>,
    /// Level at which this feature alone would be a finding; none of `latest`.
    pub p_value: Option<f64>,
    /// Natural logarithm of the evidence for a change since the version was loaded, which may be
    /// looked at at any time; of the window `hour` only.
    pub ln_evidence: Option<f64>,
    /// The evidence is beyond what chance reaches once in twenty versions.
    pub alarm: bool,
    /// Of numbers, and of the window `hour` only.
    pub mean: Option<MeanReport>,
    /// All values of the window are one, and the reference has several.
    pub constant: bool,
    /// By what is wrong with rows as such: `missing`, `nan`, `infinite`, `out_of_range` (of the
    /// reference's smallest and largest value), `unseen_category`; absent where there are none.
    #[schema(value_type = BTreeMap<String, Odd>)]
    pub odd: BTreeMap<&'static str, Odd>,
}

/// Rows of a feature that something is wrong with.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = OddRows)]
pub struct Odd {
    #[schema(minimum = 0)]
    pub rows: u64,
    /// The same as a share of the reference's rows.
    pub reference: f64,
}
