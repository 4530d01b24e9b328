//! Figures of a tally, as people and programs read them.

use std::collections::BTreeMap;

use serde::Serialize;
use utoipa::ToSchema;

use super::interval::{f1_bounds, mean_bounds, share_bounds};
use super::tally::{BINS, ClassCount, ClassTally, Moments, Tally, ValueTally};

/// A figure, and where the truth behind it lies with a probability of 95 %: of shares by Wilson, of
/// means by a confidence sequence, which holds at every look.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = QualityEstimate)]
pub struct Estimate {
    pub value: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub low: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub high: Option<f64>,
}

/// How good some predictions were. What there are no labels for is absent.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = QualityFigures)]
pub struct Figures {
    /// Answered, with a label or without.
    pub predictions: u64,
    /// With a label.
    pub labelled: u64,
    /// With a label that could not be held against the prediction, whose outputs were not kept.
    pub unjudged: u64,
    /// `labelled` over `predictions`. Labels that come for some predictions rather than for others
    /// say little about those others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub coverage: Option<Estimate>,
    /// From the prediction to its first label.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub delay: Option<Delay>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub classification: Option<Classification>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub regression: Option<Regression>,
    /// Of callers, by name.
    pub metrics: BTreeMap<String, MetricFigures>,
    /// No measurement: what the accuracy would be if the model's probabilities were right.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub estimated_accuracy: Option<Estimated>,
}

/// How long labels took, in seconds: bounds, at most twice too high.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = QualityDelay)]
pub struct Delay {
    pub p50_s: u64,
    pub p90_s: u64,
    pub p99_s: u64,
}

#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = QualityClassification)]
pub struct Classification {
    /// Rows with a label.
    pub rows: u64,
    pub accuracy: Estimate,
    /// Mean over the classes, as the next two.
    pub precision: f64,
    pub recall: f64,
    pub f1: f64,
    /// Of models that give probabilities, as the next two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub log_loss: Option<Estimate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub brier: Option<Estimate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub calibration: Option<Calibration>,
    /// Every class that was a label or a prediction, at most 256.
    pub classes: Vec<ClassFigures>,
}

#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = QualityClass)]
pub struct ClassFigures {
    pub class: String,
    /// Rows with this label.
    pub support: u64,
    /// Rows that were taken for it.
    pub predicted: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub precision: Option<Estimate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recall: Option<Estimate>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub f1: Option<Estimate>,
}

/// Whether the probability of what was predicted is how often that was right.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = QualityCalibration)]
pub struct Calibration {
    /// Expected calibration error: mean distance of confidence and accuracy over ten bins of
    /// confidence, by their rows.
    pub ece: f64,
    /// Those that have rows.
    pub bins: Vec<Bin>,
}

/// Rows whose confidence lies in `(from, to]`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = QualityBin)]
pub struct Bin {
    pub from: f64,
    pub to: f64,
    pub rows: u64,
    /// Mean.
    pub confidence: f64,
    pub accuracy: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = QualityRegression)]
pub struct Regression {
    /// Rows with a label.
    pub rows: u64,
    pub mae: Estimate,
    pub rmse: Estimate,
    /// Mean of prediction less label.
    pub bias: Estimate,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = QualityMetric)]
pub struct MetricFigures {
    pub count: u64,
    pub mean: Estimate,
}

/// An estimate without labels.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = QualityEstimated)]
pub struct Estimated {
    pub value: f64,
    /// Rows of predictions that gave probabilities.
    pub rows: u64,
}

impl Estimate {
    fn share(hits: u64, of: u64) -> Option<Self> {
        let (low, high) = share_bounds(hits, of)?;
        let value = hits.min(of) as f64 / of as f64;
        Some(Self { value, low: Some(low), high: Some(high) })
    }

    fn mean(moments: &Moments) -> Option<Self> {
        let bounds = mean_bounds(moments);
        let (low, high) = (bounds.map(|(low, _)| low), bounds.map(|(_, high)| high));
        (moments.count > 0).then(|| Self { value: moments.mean(), low, high })
    }

    /// Of what is never negative.
    fn positive_mean(moments: &Moments) -> Option<Self> {
        let mean = Self::mean(moments)?;
        Some(Self { low: mean.low.map(|low| low.max(0.0)), ..mean })
    }

    fn root(self) -> Self {
        let root = |value: f64| value.max(0.0).sqrt();
        Self { value: root(self.value), low: self.low.map(root), high: self.high.map(root) }
    }
}

impl From<&Tally> for Figures {
    fn from(tally: &Tally) -> Self {
        let metrics = tally.metrics.iter().filter_map(|(name, moments)| {
            let mean = Estimate::mean(moments)?;
            Some((name.clone(), MetricFigures { count: moments.count, mean }))
        });
        let confidence = &tally.confidence;
        let estimated = || Estimated { value: confidence.mean(), rows: confidence.count };
        Self {
            predictions: tally.predictions,
            labelled: tally.labelled,
            unjudged: tally.unjudged,
            // Predictions are counted a moment after they were made.
            coverage: Estimate::share(tally.labelled, tally.predictions.max(tally.labelled)),
            delay: delay(&tally.delays),
            classification: classification(&tally.classification),
            regression: regression(&tally.regression),
            metrics: metrics.collect(),
            estimated_accuracy: (confidence.count > 0).then(estimated),
        }
    }
}

fn delay(delays: &[u64]) -> Option<Delay> {
    let all: u64 = delays.iter().sum();
    let quantile = |share: f64| {
        let mut seen = 0;
        let reached = delays.iter().position(|count| {
            seen += count;
            seen as f64 >= share * all as f64
        });
        // The bucket of 2^n holds what is shorter.
        1_u64 << reached.unwrap_or(delays.len() - 1)
    };
    let figures = || Delay { p50_s: quantile(0.5), p90_s: quantile(0.9), p99_s: quantile(0.99) };
    (all > 0).then(figures)
}

fn classification(tally: &ClassTally) -> Option<Classification> {
    let accuracy = Estimate::share(tally.correct, tally.rows)?;
    let classes: Vec<ClassFigures> = tally.classes.iter().map(class).collect();
    // As scikit-learn has it, a figure without any rows counts as 0.
    let mean = |of: fn(&ClassFigures) -> Option<Estimate>| {
        let sum: f64 = classes.iter().filter_map(of).map(|estimate| estimate.value).sum();
        sum / classes.len().max(1) as f64
    };
    Some(Classification {
        rows: tally.rows,
        accuracy,
        precision: mean(|class| class.precision),
        recall: mean(|class| class.recall),
        f1: mean(|class| class.f1),
        log_loss: Estimate::positive_mean(&tally.log_loss),
        brier: Estimate::positive_mean(&tally.brier),
        calibration: calibration(tally),
        classes,
    })
}

fn class((class, count): (&String, &ClassCount)) -> ClassFigures {
    let ClassCount { support, predicted, hits } = *count;
    let f1 = f1_bounds(hits, support, predicted).map(|(low, high)| Estimate {
        value: 2.0 * hits as f64 / (support + predicted) as f64,
        low: Some(low),
        high: Some(high),
    });
    ClassFigures {
        class: class.clone(),
        support,
        predicted,
        precision: Estimate::share(hits, predicted),
        recall: Estimate::share(hits, support),
        f1,
    }
}

fn calibration(tally: &ClassTally) -> Option<Calibration> {
    let all: u64 = tally.bins.iter().map(|bin| bin.rows).sum();
    let (mut ece, mut bins) = (0.0, Vec::new());
    for (at, bin) in tally.bins.iter().enumerate().filter(|(_, bin)| bin.rows > 0) {
        let rows = bin.rows as f64;
        let (confidence, accuracy) = (bin.confidence / rows, bin.correct as f64 / rows);
        ece += rows / all as f64 * (confidence - accuracy).abs();
        let edge = |at: usize| at as f64 / BINS as f64;
        bins.push(Bin { from: edge(at), to: edge(at + 1), rows: bin.rows, confidence, accuracy });
    }
    (all > 0).then_some(Calibration { ece, bins })
}

fn regression(tally: &ValueTally) -> Option<Regression> {
    Some(Regression {
        rows: tally.absolute.count,
        mae: Estimate::positive_mean(&tally.absolute)?,
        rmse: Estimate::mean(&tally.square)?.root(),
        bias: Estimate::mean(&tally.error)?,
    })
}
