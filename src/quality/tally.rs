//! Counts of what labels said, which add up and can be taken away again.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Classes with counts of their own in one tally; rows of further ones count in its totals.
pub const CLASSES_MAX: usize = 256;
/// Metrics of callers in one tally.
pub const METRICS_MAX: usize = 32;
/// Bins of confidence.
pub(super) const BINS: usize = 10;
/// Delays are told apart by powers of two of a second; the last one holds all from two years on.
pub(super) const DELAYS: usize = 28;
/// Least probability that a logarithm is taken of, as scikit-learn has it for doubles.
const PROBABILITY_MIN: f64 = f64::EPSILON;

/// A prediction held against its label, row by row. Rows without a label are left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "task", content = "rows", rename_all = "snake_case")]
pub enum Judged {
    Classification(Vec<ClassRow>),
    Regression(Vec<ValueRow>),
}

/// One row of a classifier.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassRow {
    /// What it was.
    pub label: String,
    /// What the model took it for.
    pub predicted: String,
    /// Where the model gives probabilities.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<Scores>,
}

/// What probabilities come to, against a label.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Scores {
    /// Of the label's class.
    pub probability: f64,
    /// Of the predicted class.
    pub confidence: f64,
    /// Squared distance to the label, over all classes; of two classes half of it.
    pub brier: f64,
}

/// One row of a regression.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ValueRow {
    pub label: f64,
    pub predicted: f64,
}

/// How often, and sums that mean and variance are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Moments {
    pub count: u64,
    pub sum: f64,
    pub squares: f64,
}

impl Moments {
    pub fn of(value: f64) -> Self {
        Self { count: 1, sum: value, squares: value * value }
    }

    pub fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }

    /// Of the sample; never negative, whatever rounding does.
    pub fn variance(&self) -> f64 {
        let n = self.count as f64;
        ((self.squares - self.sum * self.sum / n) / (n - 1.0)).max(0.0)
    }

    pub(super) fn add(&mut self, more: &Self) {
        self.count += more.count;
        self.sum += more.sum;
        self.squares += more.squares;
    }

    fn remove(&mut self, less: &Self) {
        self.count = self.count.saturating_sub(less.count);
        // What is left of nothing is nothing, not the rounding of its parts.
        (self.sum, self.squares) = match self.count {
            0 => (0.0, 0.0),
            _ => (self.sum - less.sum, (self.squares - less.squares).max(0.0)),
        };
    }
}

/// Rows of one class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ClassCount {
    /// Labelled so.
    pub(super) support: u64,
    /// Taken for it.
    pub(super) predicted: u64,
    /// Both.
    pub(super) hits: u64,
}

/// Rows whose confidence lies in one tenth.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct BinCount {
    pub(super) rows: u64,
    pub(super) correct: u64,
    pub(super) confidence: f64,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct ClassTally {
    pub(super) rows: u64,
    pub(super) correct: u64,
    pub(super) log_loss: Moments,
    pub(super) brier: Moments,
    pub(super) bins: [BinCount; BINS],
    pub(super) classes: BTreeMap<String, ClassCount>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct ValueTally {
    pub(super) absolute: Moments,
    pub(super) square: Moments,
    pub(super) error: Moments,
}

/// What is known of some predictions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Tally {
    /// Answered, with a label or without.
    pub predictions: u64,
    /// With a label.
    pub labelled: u64,
    /// With a label that could not be held against the prediction, since that was not kept.
    pub unjudged: u64,
    /// Probability of the class that was predicted, of every row, with a label or without.
    pub confidence: Moments,
    pub(super) delays: [u64; DELAYS],
    pub(super) classification: ClassTally,
    pub(super) regression: ValueTally,
    pub(super) metrics: BTreeMap<String, Moments>,
}

impl Tally {
    /// Of one label. `None`: there was nothing to hold it against.
    pub fn of_label(judged: Option<&Judged>) -> Self {
        let mut tally = Self::default();
        match judged {
            None => tally.unjudged = 1,
            Some(Judged::Classification(rows)) => {
                rows.iter().for_each(|row| tally.classification.see(row));
            }
            Some(Judged::Regression(rows)) => {
                rows.iter().for_each(|row| tally.regression.see(*row));
            }
        }
        tally
    }

    /// Of one value of a caller's metric.
    pub fn of_metric(name: &str, value: f64) -> Self {
        let metrics = BTreeMap::from([(name.to_owned(), Moments::of(value))]);
        Self { metrics, ..Self::default() }
    }

    /// Notes that a prediction has got its first label, so long after it was made.
    pub fn first_label(&mut self, delay: Duration) {
        self.labelled += 1;
        let at = u64::BITS - delay.as_secs().leading_zeros();
        let at = usize::try_from(at).unwrap_or(DELAYS).min(DELAYS - 1);
        self.delays[at] += 1;
    }

    /// Notes the probability of the class that a row was taken for.
    pub fn see_confidence(&mut self, confidence: f64) {
        self.confidence.add(&Moments::of(confidence));
    }

    /// Rows and values that labels were held against.
    pub fn judged(&self) -> u64 {
        self.classification.rows + self.regression.absolute.count
    }

    /// Rows that a classifier took for another class than they were, and all of its rows.
    pub fn mistakes(&self) -> (u64, u64) {
        let ClassTally { rows, correct, .. } = self.classification;
        (rows - correct.min(rows), rows)
    }

    /// Of callers.
    pub fn metric_names(&self) -> impl Iterator<Item = &str> {
        self.metrics.keys().map(String::as_str)
    }

    pub fn add(&mut self, more: &Self) {
        self.predictions += more.predictions;
        self.labelled += more.labelled;
        self.unjudged += more.unjudged;
        self.confidence.add(&more.confidence);
        for (total, more) in self.delays.iter_mut().zip(more.delays) {
            *total += more;
        }
        self.classification.add(&more.classification);
        let ValueTally { absolute, square, error } = &more.regression;
        self.regression.absolute.add(absolute);
        self.regression.square.add(square);
        self.regression.error.add(error);
        for (name, more) in &more.metrics {
            if self.metrics.len() < METRICS_MAX || self.metrics.contains_key(name) {
                self.metrics.entry(name.clone()).or_default().add(more);
            }
        }
    }

    /// Takes away what was added before.
    pub fn remove(&mut self, less: &Self) {
        self.predictions = self.predictions.saturating_sub(less.predictions);
        self.labelled = self.labelled.saturating_sub(less.labelled);
        self.unjudged = self.unjudged.saturating_sub(less.unjudged);
        self.confidence.remove(&less.confidence);
        for (total, less) in self.delays.iter_mut().zip(less.delays) {
            *total = total.saturating_sub(less);
        }
        self.classification.remove(&less.classification);
        let ValueTally { absolute, square, error } = &less.regression;
        self.regression.absolute.remove(absolute);
        self.regression.square.remove(square);
        self.regression.error.remove(error);
        for (name, less) in &less.metrics {
            if let Some(moments) = self.metrics.get_mut(name) {
                moments.remove(less);
            }
        }
        self.metrics.retain(|_, moments| moments.count > 0);
    }
}

impl ClassTally {
    fn see(&mut self, row: &ClassRow) {
        let ClassRow { label, predicted, scores } = row;
        let correct = u64::from(label == predicted);
        self.rows += 1;
        self.correct += correct;
        let of = |support, predicted, hits| ClassCount { support, predicted, hits };
        if correct == 1 {
            self.count(label, of(1, 1, 1));
        } else {
            self.count(label, of(1, 0, 0));
            self.count(predicted, of(0, 1, 0));
        }
        let Some(Scores { probability, confidence, brier }) = *scores else { return };
        let probability = probability.clamp(PROBABILITY_MIN, 1.0);
        self.log_loss.add(&Moments::of(-probability.ln()));
        self.brier.add(&Moments::of(brier));
        let bin = &mut self.bins[bin_of(confidence)];
        bin.rows += 1;
        bin.correct += correct;
        bin.confidence += confidence;
    }

    fn count(&mut self, class: &str, more: ClassCount) {
        if self.classes.len() >= CLASSES_MAX && !self.classes.contains_key(class) {
            return;
        }
        let count = self.classes.entry(class.to_owned()).or_default();
        count.support += more.support;
        count.predicted += more.predicted;
        count.hits += more.hits;
    }

    fn add(&mut self, more: &Self) {
        self.rows += more.rows;
        self.correct += more.correct;
        self.log_loss.add(&more.log_loss);
        self.brier.add(&more.brier);
        for (bin, more) in self.bins.iter_mut().zip(more.bins) {
            bin.rows += more.rows;
            bin.correct += more.correct;
            bin.confidence += more.confidence;
        }
        for (class, more) in &more.classes {
            self.count(class, *more);
        }
    }

    fn remove(&mut self, less: &Self) {
        self.rows = self.rows.saturating_sub(less.rows);
        self.correct = self.correct.saturating_sub(less.correct);
        self.log_loss.remove(&less.log_loss);
        self.brier.remove(&less.brier);
        for (bin, less) in self.bins.iter_mut().zip(less.bins) {
            bin.rows = bin.rows.saturating_sub(less.rows);
            bin.correct = bin.correct.saturating_sub(less.correct);
            bin.confidence = if bin.rows == 0 { 0.0 } else { bin.confidence - less.confidence };
        }
        for (class, less) in &less.classes {
            if let Some(count) = self.classes.get_mut(class) {
                count.support = count.support.saturating_sub(less.support);
                count.predicted = count.predicted.saturating_sub(less.predicted);
                count.hits = count.hits.saturating_sub(less.hits);
            }
        }
        self.classes.retain(|_, count| *count != ClassCount::default());
    }
}

impl ValueTally {
    fn see(&mut self, ValueRow { label, predicted }: ValueRow) {
        let error = predicted - label;
        self.error.add(&Moments::of(error));
        self.absolute.add(&Moments::of(error.abs()));
        self.square.add(&Moments::of(error * error));
    }
}

/// The tenth that a confidence lies in: open below, closed above, as `(0.1, 0.2]`.
fn bin_of(confidence: f64) -> usize {
    (0..BINS - 1).find(|bin| confidence <= (bin + 1) as f64 / BINS as f64).unwrap_or(BINS - 1)
}
