//! What a model's inputs and outputs looked like when it was made: `reference.json`.
//!
//! A profile is made once, from a file or from the first rows of stable traffic, and is all that a
//! gateway needs: no rows of the training data unless their values were kept on purpose, and then
//! column by column in ascending order.
//!
//! Invariants:
//! - What [`Profile::read`] gives has been checked: every size is within its limit, cells fit edges,
//!   names are unique. What comes after needs no checks of its own.
//! - A profile's edges survive a file bit by bit: an atom's cell is one double wide.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::counters::{Counters, Score};
use super::feature::{ELEMENTS_MAX, FEATURES_MAX, Feature, Part};
use super::grid::{Cells, Grid};
use super::scores::Sample;
use super::tally::{Dictionary, Tally};
use super::wide::{DIMENSIONS, Fourier, Kernel, Waves};
use crate::domain::{Digest, ModelName, Version};

mod exact;
mod packed;

pub use packed::Packed;

/// The form that this program writes and reads.
pub const SCHEMA_VERSION: u32 = 1;
/// Largest file.
pub const PROFILE_BYTES_MAX: usize = 64 << 20;
/// Kept values of one feature.
pub const VALUES_MAX: usize = 100_000;
/// Kept values of all features of one profile.
pub const VALUES_TOTAL_MAX: usize = 4 << 20;
/// Longest name or other text.
const TEXT_LEN_MAX: usize = 1024;

/// A reference to compare with.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Profile {
    pub schema_version: u32,
    pub created_at: jiff::Timestamp,
    pub tool_version: String,
    pub source: Source,
    pub model: ModelName,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<Version>,
    /// Learnt from traffic that nobody has looked at yet.
    #[serde(default)]
    pub provisional: bool,
    pub features: Vec<FeatureProfile>,
}

/// Where a profile comes from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    pub uri: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
    pub rows: u64,
    /// Rows that the counters were made from, if not all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampled: Option<u64>,
}

/// One feature of the reference.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureProfile {
    pub feature: Feature,
    pub reference: Reference,
    /// Limits of scores, by what the reference does to itself.
    #[serde(default)]
    pub thresholds: BTreeMap<Score, Threshold>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reference {
    Num(Box<Numeric>),
    Cat(Categorical),
    Mmd(Embedding),
}

/// A feature of numbers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Numeric {
    #[serde(with = "exact")]
    pub edges: Grid,
    pub cells: Cells,
    pub quantiles: Quantiles,
    /// Different values of the reference.
    pub distinct: u64,
    pub integers: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub values: Option<Packed>,
    #[serde(skip)]
    made: Made,
}

/// What is worked out when a profile is read, not kept in it.
#[derive(Clone, Debug, Default)]
struct Made {
    groups: Vec<usize>,
    sample: Option<Arc<Sample>>,
}

/// Quantiles of the reference (linear between values, as numpy has them), and the median of the
/// distances to the median.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quantiles {
    #[serde(with = "exact::number")]
    pub p0_1: f64,
    #[serde(with = "exact::number")]
    pub p1: f64,
    #[serde(with = "exact::number")]
    pub p5: f64,
    #[serde(with = "exact::number")]
    pub p25: f64,
    #[serde(with = "exact::number")]
    pub p50: f64,
    #[serde(with = "exact::number")]
    pub p75: f64,
    #[serde(with = "exact::number")]
    pub p95: f64,
    #[serde(with = "exact::number")]
    pub p99: f64,
    #[serde(with = "exact::number")]
    pub p99_9: f64,
    #[serde(with = "exact::number")]
    pub mad: f64,
}

/// A feature of categories.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Categorical {
    pub categories: Dictionary,
    pub tally: Tally,
}

/// A tensor's projection.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Embedding {
    pub kernel: Kernel,
    pub sums: Fourier,
    #[serde(skip)]
    waves: Option<Arc<Waves>>,
}

/// When a score is large: beyond the usual limit, and beyond the mean and three standard deviations of
/// what chunks of the reference score against the whole of it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Threshold {
    pub usual: f64,
    pub learnt_mean: f64,
    pub learnt_std: f64,
    /// Rows of a chunk: a window of fewer scores more by chance.
    pub chunk_rows: u64,
    pub chunks: u64,
}

impl Threshold {
    pub fn learnt(&self) -> f64 {
        self.learnt_mean + 3.0 * self.learnt_std
    }

    pub fn limit(&self) -> f64 {
        self.usual.max(self.learnt())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    #[error("a profile has at most {PROFILE_BYTES_MAX} bytes, got {0}")]
    Size(usize),
    #[error("not a profile: {0}")]
    Form(#[from] serde_json::Error),
    #[error("schema_version is {0}, this program reads {SCHEMA_VERSION}")]
    Schema(u32),
    #[error("a profile has 1 to {FEATURES_MAX} features, got {0}")]
    Features(usize),
    #[error("feature '{0}' is in it twice")]
    Twice(String),
    #[error("feature '{feature}': {problem}")]
    Feature { feature: String, problem: &'static str },
}

impl Profile {
    /// From the bytes of a file, checked.
    ///
    /// # Errors
    /// When they are no profile, or one of its parts is beyond a limit or does not fit another.
    pub fn read(bytes: &[u8]) -> Result<Self, ProfileError> {
        #[derive(Deserialize)]
        struct Schema {
            schema_version: u32,
        }
        if bytes.len() > PROFILE_BYTES_MAX {
            return Err(ProfileError::Size(bytes.len()));
        }
        // First which form it has: another may have other fields.
        let Schema { schema_version } = serde_json::from_slice(bytes)?;
        if schema_version != SCHEMA_VERSION {
            return Err(ProfileError::Schema(schema_version));
        }
        let mut profile: Self = serde_json::from_slice(bytes)?;
        profile.check()?;
        Ok(profile)
    }

    /// The bytes of its file.
    ///
    /// # Errors
    /// When they are more than [`PROFILE_BYTES_MAX`].
    pub fn write(&self) -> Result<Vec<u8>, ProfileError> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        match bytes.len() {
            len if len > PROFILE_BYTES_MAX => Err(ProfileError::Size(len)),
            _ => Ok(bytes),
        }
    }

    /// SHA-256 of a profile's file.
    pub fn digest(bytes: &[u8]) -> Digest {
        Digest::new(Sha256::digest(bytes).into())
    }

    /// Checks every part, and works out what is not kept.
    pub(super) fn check(&mut self) -> Result<(), ProfileError> {
        if !(1..=FEATURES_MAX).contains(&self.features.len()) {
            return Err(ProfileError::Features(self.features.len()));
        }
        let mut labels = HashSet::new();
        let mut values = 0_usize;
        for feature in &mut self.features {
            let label = feature.feature.label();
            let kept = feature.check().map_err(|problem| ProfileError::Feature {
                feature: label.chars().take(TEXT_LEN_MAX).collect(),
                problem,
            })?;
            values += kept;
            if values > VALUES_TOTAL_MAX {
                let problem = "the profile has more values than its limit";
                return Err(ProfileError::Feature { feature: label, problem });
            }
            if !labels.insert(label.clone()) {
                return Err(ProfileError::Twice(label));
            }
        }
        Ok(())
    }
}

impl FeatureProfile {
    pub(super) fn new(feature: Feature, reference: Reference) -> Self {
        Self { feature, reference, thresholds: BTreeMap::new() }
    }

    /// How many values it keeps, or what is wrong with it.
    pub(super) fn check(&mut self) -> Result<usize, &'static str> {
        let Feature { name, tensor, .. } = &self.feature;
        if name.len() > TEXT_LEN_MAX || tensor.len() > TEXT_LEN_MAX {
            return Err("its name is too long");
        }
        let known = match self.feature.part {
            Part::Element(at) => at < ELEMENTS_MAX,
            Part::Projection(at) => at < DIMENSIONS,
            _ => true,
        };
        let whole = self.feature.part == Part::Mmd;
        if !known || whole != matches!(self.reference, Reference::Mmd(_)) {
            return Err(
                "it is no part of a row that is watched, or of another kind than that part",
            );
        }
        let finite = |t: &Threshold| {
            [t.usual, t.learnt_mean, t.learnt_std].iter().all(|number| number.is_finite())
        };
        if !self.thresholds.values().all(finite) {
            return Err("a threshold is not finite");
        }
        match &mut self.reference {
            Reference::Num(numeric) => numeric.check(),
            Reference::Cat(cat) if !cat.tally.fits(&cat.categories) => {
                Err("its counts do not fit its categories")
            }
            Reference::Cat(_) => Ok(0),
            Reference::Mmd(embedding) => embedding.check().map(|()| 0),
        }
    }

    /// Counters for rows to compare with it.
    pub fn counters(&self) -> Counters {
        match &self.reference {
            Reference::Num(numeric) => Counters::Num(Cells::new(&numeric.edges)),
            Reference::Cat(cat) => Counters::Cat(Tally::new(&cat.categories)),
            Reference::Mmd(_) => Counters::Mmd(Fourier::default()),
        }
    }

    /// The reference's own counters.
    pub fn own(&self) -> Counters {
        match &self.reference {
            Reference::Num(numeric) => Counters::Num(numeric.cells.clone()),
            Reference::Cat(cat) => Counters::Cat(cat.tally.clone()),
            Reference::Mmd(embedding) => Counters::Mmd(embedding.sums.clone()),
        }
    }

    /// The reference's values, where they were kept.
    pub fn sample(&self) -> Option<&Sample> {
        match &self.reference {
            Reference::Num(numeric) => numeric.made.sample.as_deref(),
            _ => None,
        }
    }

    /// Limit of a score: the profile's, or the usual one; `None` for a score that has none.
    pub fn limit(&self, score: Score) -> Option<f64> {
        let own = self.thresholds.get(&score).map(Threshold::limit);
        own.or_else(|| score.usual_limit())
    }
}

impl Numeric {
    pub(super) fn new(
        edges: Grid,
        cells: Cells,
        quantiles: Quantiles,
        (distinct, integers): (u64, bool),
        values: Option<Packed>,
    ) -> Self {
        let made = Made::default();
        Self { edges, cells, quantiles, distinct, integers, values, made }
    }

    fn check(&mut self) -> Result<usize, &'static str> {
        if !self.cells.fits(&self.edges) {
            return Err("its cells do not fit its edges");
        }
        if self.cells.is_empty() {
            return Err("it has no values");
        }
        let q = &self.quantiles;
        let finite = [q.p0_1, q.p1, q.p5, q.p25, q.p50, q.p75, q.p95, q.p99, q.p99_9, q.mad];
        if !finite.iter().all(|number| number.is_finite()) {
            return Err("a quantile is not finite");
        }
        self.made.groups = self.edges.groups(&self.cells);
        self.made.sample = match &self.values {
            None => None,
            Some(packed) => {
                let values = packed.values().ok_or("its values cannot be read")?;
                if values.is_empty() || values.len() > VALUES_MAX {
                    return Err("it keeps no values, or more than its limit");
                }
                if !values.iter().all(|value| value.is_finite()) {
                    return Err("one of its values is not finite");
                }
                Some(Arc::new(Sample::new(values, self.integers)))
            }
        };
        Ok(self.made.sample.as_ref().map_or(0, |sample| sample.len()))
    }

    /// For each cell the group that PSI and its like count it in.
    pub fn groups(&self) -> &[usize] {
        &self.made.groups
    }
}

impl Embedding {
    pub(super) fn new(kernel: Kernel, sums: Fourier) -> Self {
        Self { kernel, sums, waves: None }
    }

    fn check(&mut self) -> Result<(), &'static str> {
        if !self.sums.fits() || self.sums.rows == 0 {
            return Err("its sums of random features are not as many as there are");
        }
        if !(self.kernel.sigma.is_finite() && self.kernel.sigma > 0.0) {
            return Err("its kernel has no width");
        }
        self.waves = Some(Arc::new(self.kernel.waves()));
        Ok(())
    }

    /// Drawn when the profile was checked.
    pub(super) fn waves(&self) -> Option<&Waves> {
        self.waves.as_deref()
    }
}

#[cfg(test)]
mod tests;
