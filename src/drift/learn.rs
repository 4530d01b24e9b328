//! Makes a profile from rows: of a file, or the first ones of stable traffic.
//!
//! ```text
//! rows ─▶ Column for each feature (a uniform sample, categories by number) ─▶ Profile, and its values
//! ```
//!
//! What kind a feature is: texts, booleans and predicted classes are categories; so are integers with
//! at most [`INTEGER_CATEGORIES_MAX`] different values, as Evidently has it. All else are numbers.

use std::collections::BTreeMap;

use super::counters::{Counters, Score};
use super::feature::{FEATURES_MAX, Feature, Value};
use super::grid::{CELLS, Cells, Grid};
use super::profile::{
    Categorical, Embedding, FeatureProfile, Numeric, Packed, Profile, ProfileError, Quantiles,
    Reference, SCHEMA_VERSION, Source, Threshold, VALUES_MAX, VALUES_TOTAL_MAX,
};
use super::scores::Sample;
use super::tally::Dictionary;
use super::wide::{Fourier, Kernel, SEED};
use crate::domain::{ModelName, Version};

mod column;

pub use column::{Column, Data};

/// Different integers that are still taken for categories.
pub const INTEGER_CATEGORIES_MAX: usize = 10;
/// Rows that a provisional reference is learnt from.
pub const PROVISIONAL_ROWS: u64 = 10_000;
/// Different texts of one feature that are told apart while it is learnt.
pub const TEXTS_MAX: usize = 100_000;
/// Rows whose projections are kept while they are learnt from.
const VECTORS_MAX: usize = 4096;
/// Chunks of the reference that thresholds are learnt from, and the fewest rows of one.
const CHUNKS: usize = 10;
const CHUNK_ROWS_MIN: usize = 200;
/// More rows without a distribution, and an output is no output of scores.
const NO_SCORES_SHARE_MAX: f64 = 0.01;

/// How a profile is made.
#[derive(Clone, Debug)]
pub struct LearnSettings {
    /// Cells of a numeric feature's grid.
    pub cells: usize,
    /// Keep the values, for scores that need them.
    pub keep_values: bool,
    /// Different texts of one feature that are told apart.
    pub texts_max: usize,
    /// Values of one feature that are looked at; of more, a uniform sample of as many.
    pub sample_max: usize,
}

impl Default for LearnSettings {
    fn default() -> Self {
        Self { cells: CELLS, keep_values: false, texts_max: TEXTS_MAX, sample_max: 1_000_000 }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LearnError {
    #[error("a model has at most {FEATURES_MAX} features that are watched, got {0}")]
    Features(usize),
    #[error("no feature has a value")]
    Empty,
    #[error(transparent)]
    Profile(#[from] ProfileError),
}

/// Collects rows, feature by feature.
#[derive(Clone, Debug)]
pub struct Learner {
    features: Vec<Feature>,
    columns: Vec<Column>,
    settings: LearnSettings,
}

/// A profile, each of its features' values, and what was left out and why.
#[derive(Debug)]
pub struct Learnt {
    pub profile: Profile,
    pub data: Vec<Data>,
    pub notes: Vec<String>,
}

impl Learner {
    /// # Errors
    /// When there are more features than [`FEATURES_MAX`].
    pub fn new(features: Vec<Feature>, settings: LearnSettings) -> Result<Self, LearnError> {
        if features.len() > FEATURES_MAX {
            return Err(LearnError::Features(features.len()));
        }
        let columns = (0..features.len() as u64)
            .map(|seed| Column::new(settings.sample_max, settings.texts_max, seed));
        Ok(Self { columns: columns.collect(), features, settings })
    }

    pub fn features(&self) -> &[Feature] {
        &self.features
    }

    pub fn add(&mut self, feature: usize, value: Value<'_>) {
        if let Some(column) = self.columns.get_mut(feature) {
            column.add(value);
        }
    }

    /// Rows of the feature that has the most.
    pub fn rows(&self) -> u64 {
        self.columns.iter().map(Column::rows).max().unwrap_or(0)
    }

    /// Makes the profile.
    ///
    /// # Errors
    /// When no feature has a value.
    pub fn finish(
        self,
        (model, version): (ModelName, Option<Version>),
        uri: &str,
        created_at: jiff::Timestamp,
    ) -> Result<Learnt, LearnError> {
        let rows = self.rows();
        let sampled = self.columns.iter().map(Column::kept).filter(|(seen, kept)| seen > kept);
        let sampled = sampled.map(|(_, kept)| kept).min();
        let values_max = VALUES_MAX.min(VALUES_TOTAL_MAX / self.features.len().max(1));
        let (mut features, mut data, mut notes) = (Vec::new(), Vec::new(), Vec::new());
        for (feature, column) in self.features.into_iter().zip(&self.columns) {
            let label = feature.label();
            match learn(feature, column, &self.settings, values_max) {
                Ok((profile, of_feature)) => {
                    features.push(profile);
                    data.push(of_feature);
                }
                Err(why) => notes.push(format!("{label} is left out: {why}")),
            }
        }
        if features.is_empty() {
            return Err(LearnError::Empty);
        }
        let mut profile = Profile {
            schema_version: SCHEMA_VERSION,
            created_at,
            tool_version: env!("CARGO_PKG_VERSION").to_owned(),
            source: Source { uri: uri.to_owned(), sha256: None, rows, sampled },
            model,
            version,
            provisional: false,
            features,
        };
        profile.check()?;
        for (feature, column) in profile.features.iter_mut().zip(&data) {
            feature.thresholds = match column {
                (of, Data::Vectors) => thresholds(feature, of.vectors.values(), Value::Vector),
                (of, Data::Numbers(_)) => {
                    thresholds(feature, of.numbers.values(), |number| Value::Number(*number))
                }
                (of, Data::Categories(_)) if of.texts.seen() == 0 => {
                    thresholds(feature, of.numbers.values(), |number| Value::Number(*number))
                }
                (of, Data::Categories(_)) => {
                    let mut names = vec![""; of.numbered.len()];
                    for (name, number) in &of.numbered {
                        names[*number as usize] = name;
                    }
                    thresholds(feature, of.texts.values(), |number| {
                        Value::Text(names[*number as usize].as_bytes())
                    })
                }
            };
        }
        let data = data.into_iter().map(|(_, data)| data).collect();
        Ok(Learnt { profile, data, notes })
    }
}

/// A feature's part of the profile, and its column with the values as they are compared.
fn learn<'a>(
    feature: Feature,
    column: &'a Column,
    settings: &LearnSettings,
    values_max: usize,
) -> Result<(FeatureProfile, (&'a Column, Data)), &'static str> {
    let (seen, _) = column.kept();
    if seen == 0 {
        return Err("it has no value");
    }
    let rows = column.rows() as f64;
    if feature.of_scores() && (column.missing + column.nan) as f64 > NO_SCORES_SHARE_MAX * rows {
        return Err("its rows are no distributions");
    }
    let data = column.data(&feature, column.is_categories(&feature));
    let reference = match &data {
        Data::Vectors => {
            let kernel = Kernel::over(column.vectors.values(), SEED);
            let (waves, mut sums) = (kernel.waves(), Fourier::default());
            for vector in column.vectors.values() {
                sums.add(&waves, vector);
            }
            sums.missing = column.scaled(column.missing);
            Reference::Mmd(Embedding::new(kernel, sums))
        }
        Data::Categories(counts) => {
            let missing = column.scaled(column.missing + column.nan);
            let (categories, tally) = Dictionary::over(counts, missing);
            Reference::Cat(Categorical { categories, tally })
        }
        Data::Numbers(sample) => {
            Reference::Num(Box::new(numeric(column, sample, settings, values_max)?))
        }
    };
    Ok((FeatureProfile::new(feature, reference), (column, data)))
}

fn numeric(
    column: &Column,
    sample: &Sample,
    settings: &LearnSettings,
    values_max: usize,
) -> Result<Numeric, &'static str> {
    let sorted = sample.sorted();
    let edges = Grid::over(sorted, settings.cells).ok_or("its values have no range")?;
    let mut cells = Cells::new(&edges);
    for value in sorted {
        cells.add(&edges, *value);
    }
    cells.missing = column.scaled(column.missing);
    cells.nan = column.scaled(column.nan);
    cells.infinite = column.scaled(column.infinite);
    let kept: Vec<f64> = match (settings.keep_values, sorted.len() > values_max) {
        (false, _) => Vec::new(),
        (true, false) => sorted.to_vec(),
        // Evenly spread over the ascending values.
        (true, true) => (0..values_max).map(|at| sorted[at * sorted.len() / values_max]).collect(),
    };
    let values = settings.keep_values.then(|| Packed::new(&kept));
    let distinct = sample.distinct() as u64;
    Ok(Numeric::new(edges, cells, quantiles(sorted), (distinct, sample.integers), values))
}

fn quantiles(sorted: &[f64]) -> Quantiles {
    let p50 = quantile(sorted, 0.5);
    let mut apart: Vec<f64> = sorted.iter().map(|value| (value - p50).abs()).collect();
    apart.sort_unstable_by(f64::total_cmp);
    Quantiles {
        p0_1: quantile(sorted, 0.001),
        p1: quantile(sorted, 0.01),
        p5: quantile(sorted, 0.05),
        p25: quantile(sorted, 0.25),
        p50,
        p75: quantile(sorted, 0.75),
        p95: quantile(sorted, 0.95),
        p99: quantile(sorted, 0.99),
        p99_9: quantile(sorted, 0.999),
        mad: quantile(&apart, 0.5),
    }
}

/// Linear between values, as numpy's default; `share` within [0, 1], values ascending and not empty.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * (sorted.len() - 1) as f64;
    #[expect(clippy::cast_possible_truncation, reason = "within the list")]
    #[expect(clippy::cast_sign_loss, reason = "a share is not below 0")]
    let below = at as usize;
    let (low, high) = (sorted[below], sorted[(below + 1).min(sorted.len() - 1)]);
    low + (high - low) * (at - below as f64)
}

/// What chunks of the reference, in the order of its rows, score against the whole of it.
fn thresholds<'a, T>(
    feature: &FeatureProfile,
    values: &'a [T],
    value: impl Fn(&'a T) -> Value<'a>,
) -> BTreeMap<Score, Threshold> {
    let chunk_rows = values.len() / CHUNKS;
    if chunk_rows < CHUNK_ROWS_MIN {
        return BTreeMap::new();
    }
    let own = feature.own();
    let mut found: BTreeMap<Score, Vec<f64>> = BTreeMap::new();
    for chunk in values.chunks_exact(chunk_rows) {
        let mut counters: Counters = feature.counters();
        for each in chunk {
            feature.add(&mut counters, value(each));
        }
        // Rows without a value are in no chunk.
        let scores = feature.score_between(&own, &counters).into_iter();
        let limited = scores.filter(|(score, _)| *score != Score::Missing && !score.is_p_value());
        for (score, value) in limited {
            found.entry(score).or_default().push(value);
        }
    }
    let threshold = |(score, values): (Score, Vec<f64>)| {
        let usual = score.usual_limit()?;
        let count = values.len() as f64;
        let learnt_mean = values.iter().sum::<f64>() / count;
        let squares: f64 = values.iter().map(|value| (value - learnt_mean).powi(2)).sum();
        let learnt_std = (squares / count).sqrt();
        let chunk_rows = chunk_rows as u64;
        let chunks = values.len() as u64;
        Some((score, Threshold { usual, learnt_mean, learnt_std, chunk_rows, chunks }))
    };
    found.into_iter().filter_map(threshold).collect()
}

#[cfg(test)]
mod tests;
