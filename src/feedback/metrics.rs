//! What the metrics page shows of feedback, and of the quality of versions that are loaded.

use super::{Feedback, Outcome, Series, today};
use crate::observe::page::{Family, Kind, Labels};
use crate::quality::{Figures, Tally};

/// `model` of items about models that are not served, so that callers cannot make series.
const OTHER: &str = "other";

impl Feedback {
    /// For the page.
    pub fn families(&self) -> Vec<Family> {
        vec![self.taken_total()].into_iter().chain(self.quality()).collect()
    }

    fn taken_total(&self) -> Family {
        let help = "Labels and metrics that callers gave, by what became of them";
        let mut family = Family::new("tidegate_feedback_total", Kind::Counter, help);
        let mut counts = self.shared.counts.lock().clone();
        counts.retain(|model, _| model.is_empty() || self.models.serves(model));
        for (model, counts) in counts {
            let model = if model.is_empty() { OTHER.to_owned() } else { model };
            let outcomes = Outcome::ALL.iter().map(|outcome| outcome.as_str());
            let all = outcomes.zip(counts.outcomes).chain([("refused", counts.refused)]);
            for (outcome, count) in all.filter(|(_, count)| *count > 0) {
                let labels =
                    vec![("model".into(), model.clone()), ("outcome".into(), outcome.to_owned())];
                family.push(labels, count as f64);
            }
        }
        family
    }

    /// Of versions that are loaded.
    fn quality(&self) -> [Family; 2] {
        let help = "How good predictions were by their labels, over the days that are kept";
        let mut quality = Family::new("tidegate_quality", Kind::Gauge, help);
        let help = "Rows of predictions that labels were held against, over the days that are kept";
        let mut samples = Family::new("tidegate_quality_samples", Kind::Gauge, help);
        let first = today() - i64::from(self.settings.window_days) + 1;
        let loaded = |series: &Series| self.models.how(&series.model, series.version).is_some();
        let sums = self.shared.board.lock().sums(first, loaded);
        for (series, tally) in &sums {
            samples.push(labels(series), tally.judged() as f64);
            for (metric, value) in values(tally) {
                let mut labels = labels(series);
                labels.push(("metric".into(), metric.to_owned()));
                quality.push(labels, value);
            }
        }
        [quality, samples]
    }
}

fn labels(series: &Series) -> Labels {
    vec![
        ("model".into(), series.model.clone()),
        ("version".into(), series.version.to_string()),
        ("arm".into(), series.arm.clone()),
    ]
}

/// The figures of the page, by name.
fn values(tally: &Tally) -> Vec<(&'static str, f64)> {
    let figures = Figures::from(tally);
    let mut values = Vec::new();
    let mut put = |name, value: Option<f64>| values.extend(value.map(|value| (name, value)));
    put("coverage", figures.coverage.map(|coverage| coverage.value));
    put("estimated_accuracy", figures.estimated_accuracy.map(|estimated| estimated.value));
    if let Some(of) = &figures.classification {
        put("accuracy", Some(of.accuracy.value));
        put("precision", Some(of.precision));
        put("recall", Some(of.recall));
        put("f1", Some(of.f1));
        put("log_loss", of.log_loss.map(|loss| loss.value));
        put("brier", of.brier.map(|brier| brier.value));
        put("ece", of.calibration.as_ref().map(|calibration| calibration.ece));
    }
    if let Some(of) = &figures.regression {
        put("mae", Some(of.mae.value));
        put("rmse", Some(of.rmse.value));
        put("bias", Some(of.bias.value));
    }
    values
}
