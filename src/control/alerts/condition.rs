//! What may be wrong with a model, as the monitor and the labels have it: conditions of an effect and
//! evidence for it.
//!
//! Invariants:
//! - Nothing is judged from a provisional reference, nor from fewer rows than
//!   [`Limits::rows_min`]: then it is not known, which neither fires nor resolves anything.
//! - Pure: what it is given is what it judges.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::admit::ModelPatterns;
use crate::domain::{ModelName, Version};
use crate::drift::feature::Role;
use crate::drift::verdict::State;
use crate::feedback::{Report, VersionQuality};
use crate::monitor::{ArmReport, FeatureReport, VersionReport, WindowReport};
use crate::quality::{Estimate, share_bounds};

/// Features that an alert lists, the strongest first; the rest is only counted.
pub const FEATURES_MAX: usize = 16;
/// Bytes of a name that an alert has.
const NAME_BYTES_MAX: usize = 128;
/// Names of features in a summary.
const NAMED_MAX: usize = 3;
/// What an alert of all arms together has for one.
pub const ALL_ARMS: &str = "all";

/// What kind of condition.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
#[schema(as = AlertKind)]
pub enum Kind {
    /// Features of a window have drifted: an effect, and evidence.
    Drift,
    /// The evidence for a change since the version was watched first, however small that is.
    Alarm,
    /// The model is less sure of its outputs than it was.
    ConfidenceDrop,
    /// Rows with something wrong with them.
    DataQuality,
    /// What labels say of a version's predictions.
    Quality,
}

impl Kind {
    pub const ALL: [Self; 5] =
        [Self::Drift, Self::Alarm, Self::ConfidenceDrop, Self::DataQuality, Self::Quality];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Drift => "drift",
            Self::Alarm => "alarm",
            Self::ConfidenceDrop => "confidence_drop",
            Self::DataQuality => "data_quality",
            Self::Quality => "quality",
        }
    }

    /// Evidence without an effect is for people who look; answers that are wrong hurt now.
    pub fn severity(self) -> Severity {
        match self {
            Self::Alarm => Severity::Info,
            Self::Drift | Self::ConfidenceDrop | Self::DataQuality => Severity::Warning,
            Self::Quality => Severity::Critical,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = AlertSeverity)]
pub enum Severity {
    Info,
    Warning,
    Critical,
}

impl Severity {
    pub const ALL: [Self; 3] = [Self::Info, Self::Warning, Self::Critical];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Critical => "critical",
        }
    }
}

/// From where a condition holds.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Rows, of a window or with a label, from which anything is judged.
    pub rows_min: u64,
    /// `hour` or `day`: what drift and data quality are judged by.
    pub window: &'static str,
    /// Largest share of rows by what is wrong with them, above the reference's share; one that is
    /// absent is not looked at.
    pub odd_max: BTreeMap<&'static str, f64>,
    pub quality: Vec<QualityLimit>,
}

/// Where a figure of labels has to be.
#[derive(Clone, Debug)]
pub struct QualityLimit {
    /// `None`: all of them.
    pub models: Option<ModelPatterns>,
    /// `accuracy`, `log_loss`, `brier`, `mae`, `rmse`, or a metric of callers.
    pub metric: String,
    pub min: Option<f64>,
    pub max: Option<f64>,
    /// Of the predictions of the last so many days; `None`: of all that are kept.
    pub days: Option<u32>,
}

/// What of a model a condition is about: one alert fires of each at most.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Subject {
    pub version: Version,
    pub arm: String,
    pub kind: Kind,
    /// `inputs` or `outputs`; what is wrong with rows; a metric.
    pub about: String,
}

/// What is found of a subject.
#[derive(Clone, Debug, PartialEq)]
pub enum Found {
    Holds(Box<Detail>),
    Clear,
    /// Too few rows to say.
    Unknown,
}

/// The effect, and the evidence.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = AlertDetail)]
pub struct Detail {
    /// `hour` or `day`; none of labels.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<String>,
    /// Of the window, or with a label.
    #[schema(minimum = 0)]
    pub rows: u64,
    /// SHA-256 of the reference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<String>,
    /// Features that are beyond, the strongest first, sixteen at most.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub features: Vec<FeatureDetail>,
    /// All features that are beyond.
    #[serde(default)]
    #[schema(minimum = 0)]
    pub features_beyond: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<MetricDetail>,
}

#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = AlertFeature)]
pub struct FeatureDetail {
    pub feature: String,
    pub tensor: String,
    #[schema(minimum = 0)]
    pub rows: u64,
    /// What is beyond its limit.
    pub scores: BTreeMap<String, f64>,
    pub limits: BTreeMap<String, f64>,
    /// Level at which this feature alone would be a finding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p_value: Option<f64>,
    /// Natural logarithm of the evidence for a change since the version was watched first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ln_evidence: Option<f64>,
    /// Of a share: the lower bound of it, with a confidence of 95 %.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = AlertMetric)]
pub struct MetricDetail {
    pub metric: String,
    pub value: f64,
    /// The truth is within these with a confidence of 95 %.
    pub low: f64,
    pub high: f64,
    /// The bound that is beyond it is `high` of a `min`, `low` of a `max`.
    pub limit: f64,
    /// `min` or `max`
    pub bound: String,
    /// First and last day of the predictions, UTC.
    pub from: String,
    pub to: String,
}

/// What the monitor's reports of a model's versions say.
pub fn of_rows(reports: &[impl AsRef<VersionReport>], limits: &Limits) -> BTreeMap<Subject, Found> {
    let mut found = BTreeMap::new();
    for report in reports.iter().map(AsRef::as_ref) {
        let trusted = matches!(report.reference.kind, "file" | "frozen");
        let Ok(version) = report.version.parse::<Version>() else { continue };
        for arm in report.arms.iter().filter(|_| trusted) {
            let mut add = |kind, about: &str, what: Found| {
                let (arm, about) = (arm.arm.clone(), about.to_owned());
                let what = with_reference(what, report.reference.digest.as_deref());
                found.insert(Subject { version, arm, kind, about }, what);
            };
            for role in [Role::Input, Role::Output] {
                let about = if role == Role::Input { "inputs" } else { "outputs" };
                if let Some(window) = window(arm, limits.window) {
                    add(Kind::Drift, about, drift(window, role, limits));
                }
                if let Some(hour) = window(arm, "hour") {
                    add(Kind::Alarm, about, alarm(hour, role));
                }
            }
            if let Some(found) = window(arm, "hour").and_then(|hour| less_sure(hour, arm)) {
                add(Kind::ConfidenceDrop, "outputs", found);
            }
            for (odd, max) in &limits.odd_max {
                if let Some(window) = window(arm, limits.window) {
                    add(Kind::DataQuality, odd, odd_rows(window, odd, *max, limits));
                }
            }
        }
    }
    found
}

/// What labels of a model's predictions say of its versions.
pub fn of_labels(
    model: &ModelName,
    limits: &Limits,
    report: impl Fn(Option<u32>) -> Report,
) -> BTreeMap<Subject, Found> {
    let mut found = BTreeMap::new();
    for limit in &limits.quality {
        if limit.models.as_ref().is_some_and(|models| !models.matches(model)) {
            continue;
        }
        let report = report(limit.days);
        for version in &report.versions {
            let subject = Subject {
                version: version.version,
                arm: ALL_ARMS.to_owned(),
                kind: Kind::Quality,
                about: limit.metric.clone(),
            };
            let found_now = metric(version, limit, &report, limits.rows_min);
            // Two limits of one metric: what holds is what counts.
            match found.get(&subject) {
                Some(Found::Holds(_)) => {}
                _ => drop(found.insert(subject, found_now)),
            }
        }
    }
    found
}

fn window<'a>(arm: &'a ArmReport, name: &str) -> Option<&'a WindowReport> {
    arm.windows.iter().find(|window| window.window == name)
}

fn with_reference(mut found: Found, digest: Option<&str>) -> Found {
    if let Found::Holds(detail) = &mut found {
        detail.reference = digest.map(ToOwned::to_owned);
    }
    found
}

fn of_role(window: &WindowReport, role: Role) -> impl Iterator<Item = &FeatureReport> {
    window.features.iter().filter(move |feature| feature.role == role)
}

fn drift(window: &WindowReport, role: Role, limits: &Limits) -> Found {
    let judged = |feature: &FeatureReport| {
        feature.state != State::InsufficientData && feature.rows >= limits.rows_min
    };
    let judged: Vec<&FeatureReport> = of_role(window, role).filter(|of| judged(of)).collect();
    if judged.is_empty() {
        return Found::Unknown;
    }
    let drifted = judged.into_iter().filter(|feature| feature.state == State::Drifted);
    holds(window, drifted.map(|feature| (effect(feature), feature_detail(feature))).collect())
}

fn alarm(hour: &WindowReport, role: Role) -> Found {
    let alarmed = of_role(hour, role).filter(|feature| feature.alarm);
    let evidence = |feature: &FeatureReport| feature.ln_evidence.unwrap_or(f64::MAX);
    holds(hour, alarmed.map(|feature| (evidence(feature), feature_detail(feature))).collect())
}

/// `None` without an output of scores. Means are since the arm was watched first, the day, or the hour.
fn less_sure(hour: &WindowReport, arm: &ArmReport) -> Option<Found> {
    let confidences = of_role(hour, Role::Output)
        .filter(|feature| feature.feature == format!("confidence({})", feature.tensor));
    let judged: Vec<_> = confidences.filter_map(|of| Some((of, of.mean.as_ref()?))).collect();
    if judged.is_empty() {
        return None;
    }
    if judged.iter().all(|(_, mean)| mean.state == "insufficient_data") {
        return Some(Found::Unknown);
    }
    let dropped = judged.into_iter().filter(|(of, _)| arm.confidence_drop.contains(&of.tensor));
    let details = dropped.map(|(feature, found)| {
        let by = found.reference_mean - found.mean;
        let limit = found.reference_mean - found.limit;
        let detail = FeatureDetail {
            scores: BTreeMap::from([("mean".to_owned(), found.mean)]),
            limits: BTreeMap::from([("mean".to_owned(), limit)]),
            rows: found.rows,
            ..named(feature)
        };
        (by, detail)
    });
    Some(holds(hour, details.collect()))
}

fn odd_rows(window: &WindowReport, odd: &str, max: f64, limits: &Limits) -> Found {
    let judged = window.features.iter().filter(|feature| feature.rows >= limits.rows_min);
    let mut beyond = Vec::new();
    let mut any = false;
    for feature in judged {
        any = true;
        let Some(found) = feature.odd.get(odd) else { continue };
        let share = found.rows as f64 / feature.rows.max(1) as f64;
        let low = share_bounds(found.rows, feature.rows).map_or(0.0, |(low, _)| low);
        let limit = (found.reference + max).min(1.0);
        if low > limit {
            let detail = FeatureDetail {
                scores: BTreeMap::from([(odd.to_owned(), share)]),
                limits: BTreeMap::from([(odd.to_owned(), limit)]),
                low: Some(low),
                ..named(feature)
            };
            beyond.push((share, detail));
        }
    }
    if any { holds(window, beyond) } else { Found::Unknown }
}

/// Features that are beyond, by their strength.
fn holds(window: &WindowReport, mut beyond: Vec<(f64, FeatureDetail)>) -> Found {
    if beyond.is_empty() {
        return Found::Clear;
    }
    let features_beyond = beyond.len();
    beyond.sort_by(|(a, _), (b, _)| b.total_cmp(a));
    beyond.truncate(FEATURES_MAX);
    Found::Holds(Box::new(Detail {
        window: Some(window.window.to_owned()),
        rows: window.rows,
        features: beyond.into_iter().map(|(_, detail)| detail).collect(),
        features_beyond,
        ..Detail::default()
    }))
}

/// By how many times its limit a feature's largest score is.
fn effect(feature: &FeatureReport) -> f64 {
    let scores = feature.beyond.iter().filter_map(|(score, limit)| {
        let value = feature.scores.get(score)?;
        Some(value / limit.max(f64::MIN_POSITIVE))
    });
    scores.fold(0.0, f64::max)
}

fn named(feature: &FeatureReport) -> FeatureDetail {
    let (name, tensor) = (cut(&feature.feature), cut(&feature.tensor));
    FeatureDetail { feature: name, tensor, rows: feature.rows, ..FeatureDetail::default() }
}

/// A model's names may be anything; these go to other systems.
fn cut(name: &str) -> String {
    let name = &name[..name.floor_char_boundary(NAME_BYTES_MAX)];
    name.chars().filter(|char| !char.is_control()).collect()
}

fn feature_detail(feature: &FeatureReport) -> FeatureDetail {
    // JSON has no infinity.
    let finite = |value: &f64| value.is_finite();
    let limits = feature.beyond.iter().filter(|(_, limit)| finite(limit));
    let scores = limits.clone().filter_map(|(score, _)| {
        let value = feature.scores.get(score).copied().filter(finite)?;
        Some((score.name().to_owned(), value))
    });
    FeatureDetail {
        scores: scores.collect(),
        limits: limits.map(|(score, limit)| (score.name().to_owned(), *limit)).collect(),
        p_value: feature.p_value.filter(finite),
        ln_evidence: feature.ln_evidence.filter(finite),
        ..named(feature)
    }
}

/// A figure, and how many rows it is of.
fn figure(version: &VersionQuality, metric: &str) -> Option<(Estimate, u64)> {
    let figures = &version.all;
    let of_classes = figures.classification.as_ref();
    let of_values = figures.regression.as_ref();
    match metric {
        "accuracy" => of_classes.map(|of| (of.accuracy, of.rows)),
        "log_loss" => of_classes.and_then(|of| Some((of.log_loss?, of.rows))),
        "brier" => of_classes.and_then(|of| Some((of.brier?, of.rows))),
        "mae" => of_values.map(|of| (of.mae, of.rows)),
        "rmse" => of_values.map(|of| (of.rmse, of.rows)),
        own => figures.metrics.get(own).map(|of| (of.mean, of.count)),
    }
}

fn metric(version: &VersionQuality, limit: &QualityLimit, report: &Report, rows_min: u64) -> Found {
    let Some((estimate, rows)) = figure(version, &limit.metric) else { return Found::Unknown };
    let (Some(low), Some(high)) = (estimate.low, estimate.high) else { return Found::Unknown };
    if rows < rows_min || ![estimate.value, low, high].iter().all(|value| value.is_finite()) {
        return Found::Unknown;
    }
    let under = limit.min.filter(|min| high < *min).map(|min| ("min", min));
    let over = limit.max.filter(|max| low > *max).map(|max| ("max", max));
    let Some((bound, limit_at)) = under.or(over) else { return Found::Clear };
    let metric = MetricDetail {
        metric: limit.metric.clone(),
        value: estimate.value,
        low,
        high,
        limit: limit_at,
        bound: bound.to_owned(),
        from: report.from.clone(),
        to: report.to.clone(),
    };
    Found::Holds(Box::new(Detail { rows, metric: Some(metric), ..Detail::default() }))
}

/// One sentence for people.
pub fn summary(model: &ModelName, subject: &Subject, detail: &Detail) -> String {
    let Subject { version, arm, kind, about } = subject;
    let of = format!("{model} version {version} ({arm})");
    let count = detail.features_beyond;
    let mut names: Vec<&str> =
        detail.features.iter().take(NAMED_MAX).map(|feature| &*feature.feature).collect();
    if count > NAMED_MAX {
        names.push("…");
    }
    let names = names.join(", ");
    let one = about.strip_suffix('s').unwrap_or(about);
    let features = if count == 1 { format!("1 {one}") } else { format!("{count} {about}") };
    match (kind, &detail.metric) {
        (Kind::Drift, _) => format!("{features} of {of} drifted: {names}"),
        (Kind::Alarm, _) => {
            format!("{features} of {of} changed for certain, by however much: {names}")
        }
        (Kind::ConfidenceDrop, _) => format!("{of} is less sure of {features}: {names}"),
        (Kind::DataQuality, _) => {
            let features = if count == 1 { "1 feature" } else { &format!("{count} features") };
            format!("too many rows of {features} of {of} are {about}: {names}")
        }
        (Kind::Quality, Some(metric)) => format!(
            "{} of {of} is {:.4} ({:.4} to {:.4}), beyond the {} of {}",
            metric.metric, metric.value, metric.low, metric.high, metric.bound, metric.limit
        ),
        (Kind::Quality, None) => format!("{about} of {of} is beyond its limit"),
    }
}

#[cfg(test)]
mod tests;
