//! The monitor's metric families. `docs/metrics.md` describes each.

use std::sync::Arc;

use super::means::{DOWN, UP};
use super::report::{FeatureReport, MeanReport, Oddities, VersionReport};
use crate::drift::counters::Score;
use crate::drift::feature::Role;
use crate::drift::verdict::State;
use crate::observe::page::{Family, Kind, Labels};

/// Scores that have series; the admin API has all.
const SHOWN: [Score; 5] =
    [Score::CellPsi, Score::WassersteinLow, Score::KsLow, Score::Mmd, Score::Missing];
/// Features of one version and arm that have series of their own.
pub(super) const SERIES_FEATURES_MAX: usize = 100;

pub(super) fn of(reports: &[Arc<VersionReport>]) -> Vec<Family> {
    let mut scores = Family::new(
        "tidegate_drift_score",
        Kind::Gauge,
        "How far the last hour's rows are from the reference, by feature and statistic",
    );
    let mut samples = Family::new(
        "tidegate_drift_samples",
        Kind::Gauge,
        "Rows in the last hour's window, by version and arm",
    );
    let mut drifted = Family::new(
        "tidegate_drift_features",
        Kind::Gauge,
        "Features of the last hour's window, by state",
    );
    let mut alarms = Family::new(
        "tidegate_drift_alarms",
        Kind::Gauge,
        "Features with evidence of a change since the version was loaded",
    );
    let mut means = Family::new(
        "tidegate_drift_means",
        Kind::Gauge,
        "Features whose mean has moved by more than chance, and by much, by direction",
    );
    let mut sure = Family::new(
        "tidegate_confidence_drop",
        Kind::Gauge,
        "1 for an output that the model is less sure of than it was, else 0",
    );
    let mut constant = Family::new(
        "tidegate_drift_constant_features",
        Kind::Gauge,
        "Features with one value in the last hour, where the reference has several",
    );
    let mut quality = Family::new(
        "tidegate_data_quality_total",
        Kind::Counter,
        "Values that should not be so, by kind",
    );
    let mut outliers = Family::new(
        "tidegate_outlier_rows_total",
        Kind::Counter,
        "Rows with a value that is far out, or was never seen",
    );
    let mut rows =
        Family::new("tidegate_monitored_rows_total", Kind::Counter, "Rows that were looked at");
    let mut skipped = Family::new(
        "tidegate_monitor_skipped_rows_total",
        Kind::Counter,
        "Rows that were not looked at: over the budget of values a second, or no room",
    );
    let mut reference = Family::new(
        "tidegate_drift_reference_info",
        Kind::Gauge,
        "1 for the kind of reference that a version is compared with",
    );
    for report in reports {
        let version = version_labels(report);
        skipped.push(version.clone(), report.skipped_rows as f64);
        let kind = ("kind".into(), report.reference.kind.to_owned());
        reference.push(version.iter().cloned().chain([kind]).collect(), 1.0);
        for arm in &report.arms {
            let labels = with(&version, "arm", &arm.arm);
            rows.push(labels.clone(), arm.own.rows as f64);
            outliers.push(labels.clone(), arm.own.outlier_rows as f64);
            for (kind, count) in Oddities::KINDS.into_iter().zip(arm.own.quality.counts()) {
                quality.push(with(&labels, "kind", kind), count as f64);
            }
            let Some(hour) = arm.windows.iter().find(|window| window.window == "hour") else {
                continue;
            };
            samples.push(labels.clone(), hour.rows as f64);
            for state in [State::InsufficientData, State::Steady, State::Drifted] {
                let count = hour.features.iter().filter(|feature| feature.state == state).count();
                drifted.push(with(&labels, "state", state.name()), count as f64);
            }
            let alarmed = hour.features.iter().filter(|feature| feature.alarm).count();
            alarms.push(labels.clone(), alarmed as f64);
            let same = hour.features.iter().filter(|feature| feature.constant).count();
            constant.push(labels.clone(), same as f64);
            for direction in [UP, DOWN] {
                let is = |mean: &MeanReport| mean.state == direction;
                let features = hour.features.iter().filter_map(|feature| feature.mean.as_ref());
                let moved = features.filter(|mean| is(mean)).count();
                means.push(with(&labels, "direction", direction), moved as f64);
            }
            for feature in hour.features.iter().take(SERIES_FEATURES_MAX) {
                let is_output = feature.role == Role::Output && feature.mean.is_some();
                if is_output && feature.feature == format!("confidence({})", feature.tensor) {
                    let dropped = arm.confidence_drop.contains(&feature.tensor);
                    sure.push(with(&labels, "tensor", &feature.tensor), f64::from(dropped));
                }
            }
            features(&mut scores, &labels, &hour.features);
        }
    }
    vec![
        scores, samples, drifted, alarms, means, sure, constant, quality, outliers, rows, skipped,
        reference,
    ]
}

fn features(scores: &mut Family, labels: &Labels, features: &[FeatureReport]) {
    for feature in features.iter().take(SERIES_FEATURES_MAX) {
        let role = if feature.role == Role::Input { "input" } else { "output" };
        let tensor = with(labels, "tensor", &feature.tensor);
        let labels = with(&with(&tensor, "role", role), "feature", &feature.feature);
        for score in SHOWN {
            if let Some(value) = feature.scores.get(&score) {
                scores.push(with(&labels, "statistic", score.name()), *value);
            }
        }
    }
}

fn version_labels(report: &VersionReport) -> Labels {
    vec![("model".into(), report.model.clone()), ("version".into(), report.version.clone())]
}

fn with(labels: &Labels, name: &'static str, value: &str) -> Labels {
    labels.iter().cloned().chain([(name.into(), value.to_owned())]).collect()
}
