//! What was found out about shadows, as the admin API shows it.

use std::collections::BTreeMap;

use jiff::Timestamp;
use serde::{Serialize, Serializer};
use utoipa::ToSchema;
use uuid::Uuid;

use super::compare::{Difference, Floats};
use super::tally::{OutputTally, Pair, Spread, Tallies, Worst};
use crate::domain::{BUCKETS, Digest, ModelName, Version};
use crate::observe::ShadowOutcome;
use crate::route::{ModelRoutes, Served};

/// How the shadows of a model do.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = ShadowReport)]
pub struct Snapshot {
    pub model: ModelName,
    /// Those that run now, and those that did since they were loaded.
    pub shadows: Vec<VersionReport>,
}

/// One version that runs, or ran, on copies of requests.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = ShadowVersion)]
pub struct VersionReport {
    pub version: Version,
    pub digest: Digest,
    /// Percentage of requests that are copied now; absent when none are.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent: Option<f64>,
    /// Copies by what became of them: `compared`, `failed`, `deadline`, `queue_full`,
    /// `queue_bytes`, `memory`, `busy`, `draining`, `retired`.
    #[schema(value_type = BTreeMap<String, u64>)]
    pub outcomes: BTreeMap<&'static str, u64>,
    /// By the version that made the answers.
    pub pairs: Vec<PairReport>,
}

/// A shadow beside the version that made the answers.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = ShadowPair)]
pub struct PairReport {
    /// The version that made the answers.
    pub primary: Version,
    pub primary_digest: Digest,
    /// When comparing began.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    /// Predictions.
    pub compared: u64,
    /// Of those, predictions all of whose outputs agreed.
    pub agreed: u64,
    /// `agreed` over `compared`.
    pub agreement: f64,
    pub outputs: Vec<OutputReport>,
}

/// One output of the shadow beside the same of the answers.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = ShadowOutput)]
pub struct OutputReport {
    pub name: String,
    /// Of the answers.
    pub datatype: &'static str,
    pub compared: u64,
    /// Predictions with the same winner in every row of class scores; or, of other numbers, none
    /// that is off by more than 0.001 plus 0.1 %; or, of anything else, all equal.
    pub agreed: u64,
    pub agreement: f64,
    /// Predictions that could not be compared: another shape or datatype, or no such output.
    pub unlike: u64,
    pub elements: u64,
    /// Elements that differ, or are beyond what numbers may be off by.
    pub unequal: u64,
    /// Elements of which one is no finite number and the other not the same.
    pub non_finite: u64,
    /// Rows of class scores; absent for an output that is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top1: Option<Flips>,
    /// Largest absolute difference of a prediction; of floats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_abs: Option<SpreadReport>,
    /// Largest difference of a prediction, relative to the larger of both numbers; of floats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rel: Option<SpreadReport>,
    /// 1 less the cosine of the two outputs; of floats.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cosine_distance: Option<SpreadReport>,
    /// Those that differ the most, the worst first; at most 16.
    pub worst: Vec<Example>,
}

/// Rows in which another class than in the answer has the highest score.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = ShadowFlips)]
pub struct Flips {
    pub rows: u64,
    pub flips: u64,
    /// `flips` over `rows`.
    pub rate: f64,
}

/// How a figure is spread over predictions. Quantiles are bounds, at most an eighth too high.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = ShadowSpread)]
pub struct SpreadReport {
    pub count: u64,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub max: f64,
}

/// A prediction whose output differed.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = ShadowExample)]
pub struct Example {
    /// Of the answer.
    #[serde(serialize_with = "shown")]
    pub prediction_id: Uuid,
    /// Of the shadow's own record.
    #[serde(serialize_with = "shown")]
    pub shadow_prediction_id: Uuid,
    /// `missing`, `datatype` or `shape`, where they could not be compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub unlike: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_abs: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_rel: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cosine: Option<f64>,
    pub elements: u64,
    pub unequal: u64,
    pub non_finite: u64,
    pub flips: u64,
}

impl Tallies {
    pub(super) fn snapshot(&mut self, model: &ModelName, routes: &ModelRoutes) -> Snapshot {
        self.forget_the_gone();
        let shadows = routes.versions.values().filter_map(|served| {
            let percent = percent(routes, served.version);
            let outcomes = served.stats.shadow_outcomes();
            let was = outcomes.iter().any(|count| *count > 0);
            (percent.is_some() || was).then(|| VersionReport {
                version: served.version,
                digest: served.digest,
                percent,
                outcomes: ShadowOutcome::ALL.iter().map(|of| of.as_str()).zip(outcomes).collect(),
                pairs: self.of_version(model, served),
            })
        });
        Snapshot { model: model.clone(), shadows: shadows.collect() }
    }

    fn of_version(&self, model: &ModelName, served: &Served) -> Vec<PairReport> {
        let of = self.pairs.iter().filter(|((of, version, _), pair)| {
            of == model && *version == served.version && pair.digest == served.digest
        });
        of.map(|((_, _, primary), pair)| pair.report(*primary)).collect()
    }

    pub(super) fn pair(
        &self,
        model: &ModelName,
        version: Version,
        primary: Version,
    ) -> Option<PairReport> {
        let pair = self.pairs.get(&(model.clone(), version, primary))?;
        Some(pair.report(primary))
    }
}

/// What the traffic table says now.
fn percent(routes: &ModelRoutes, version: Version) -> Option<f64> {
    let shadows = &routes.split.as_ref()?.traffic().shadows;
    let shadow = shadows.iter().find(|shadow| shadow.version == version)?;
    Some(f64::from(shadow.share()) / f64::from(BUCKETS) * 100.0)
}

impl Pair {
    fn report(&self, primary: Version) -> PairReport {
        PairReport {
            primary,
            primary_digest: self.primary_digest,
            since: self.since,
            compared: self.compared,
            agreed: self.agreed,
            agreement: share(self.agreed, self.compared),
            outputs: self.outputs.iter().map(OutputReport::from).collect(),
        }
    }
}

impl From<&OutputTally> for OutputReport {
    fn from(tally: &OutputTally) -> Self {
        let (rows, flips) = (tally.rows, tally.flips);
        Self {
            name: tally.name.to_string(),
            datatype: tally.datatype,
            compared: tally.compared,
            agreed: tally.agreed,
            agreement: share(tally.agreed, tally.compared),
            unlike: tally.unlike,
            elements: tally.elements,
            unequal: tally.unequal,
            non_finite: tally.non_finite,
            top1: (rows > 0).then(|| Flips { rows, flips, rate: share(flips, rows) }),
            max_abs: SpreadReport::of(&tally.max_abs),
            max_rel: SpreadReport::of(&tally.max_rel),
            cosine_distance: SpreadReport::of(&tally.distance),
            worst: tally.worst.iter().map(Example::from).collect(),
        }
    }
}

impl SpreadReport {
    fn of(spread: &Spread) -> Option<Self> {
        let report = || Self {
            count: spread.count,
            mean: spread.mean(),
            p50: spread.quantile(0.5),
            p90: spread.quantile(0.9),
            p99: spread.quantile(0.99),
            max: spread.max,
        };
        (spread.count > 0).then(report)
    }
}

impl From<&Worst> for Example {
    fn from(worst: &Worst) -> Self {
        let Difference { elements, unequal, non_finite, floats, flips, unlike, .. } =
            worst.difference;
        let floats: Option<Floats> = floats;
        Self {
            prediction_id: worst.prediction_id,
            shadow_prediction_id: worst.shadow_id,
            unlike,
            max_abs: floats.map(|floats| floats.max_abs),
            max_rel: floats.map(|floats| floats.max_rel),
            cosine: floats.and_then(|floats| floats.cosine),
            elements,
            unequal,
            non_finite,
            flips,
        }
    }
}

fn share(part: u64, whole: u64) -> f64 {
    part as f64 / whole.max(1) as f64
}

fn shown<S: Serializer>(id: &Uuid, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(id)
}
