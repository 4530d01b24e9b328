//! What a rollout is to do: steps, and what has to hold before each.
//!
//! A plan is checked whole before it starts, and every problem is reported at once with its path.
//!
//! Invariant: what a plan asks for is done or refused, never left out in silence. What this version
//! cannot do is refused.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::domain::VersionRef;
use crate::drift::evidence::ROWS_MIN;
use crate::drift::feature::FEATURES_MAX;

/// Steps of one plan.
pub const STEPS_MAX: usize = 32;
/// Longest of the times that a plan may name, in seconds: 30 days.
pub const TIME_MAX_S: u64 = 30 * 24 * 3600;
/// Most requests that a step may wait for.
pub const SAMPLES_MAX: u64 = 1_000_000_000;
/// Longest threshold of a slow request, in milliseconds: the last bound of the latency histograms.
pub const THRESHOLD_MAX_MS: f64 = 60_000.0;
/// `alpha` of a plan that says nothing else.
pub const DEFAULT_ALPHA: f64 = 0.05;
/// Largest limit of the guard `drift`; two distributions with nothing in common score some 18.
const SCORE_MAX: f64 = 20.0;
/// Failures in a row, or requests, that a floor may ask for.
const FLOOR_MAX: u64 = 1_000_000;

/// A way for a new version from no traffic to all of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// The new version: a number, or a label that is resolved when the rollout starts.
    #[schema(value_type = String, example = "2")]
    pub candidate: VersionRef,
    /// Copies of requests before any answer of the candidate's is given to a caller.
    #[serde(default)]
    pub shadow: Option<ShadowStep>,
    /// Ascending weights. None: 1, 5, 25, 50 and 100 %, after a shadow step of 100 % if `shadow` is
    /// not given either.
    #[serde(default)]
    pub steps: Vec<Step>,
    /// What has to hold. `gates` means the same.
    #[serde(default, alias = "gates")]
    pub guards: Guards,
    /// Most probable share of rollouts of a version that is no worse that the guards together take
    /// back. Guards that say nothing else share it equally.
    #[serde(default = "default_alpha")]
    pub alpha: f64,
    /// Time between two decisions to go on. Decisions to go back are not held up by it.
    #[serde(default = "default_interval_s")]
    pub interval_s: u64,
    /// How long a step may be held by nothing but a guard that is inconclusive; then the rollout
    /// pauses.
    #[serde(default = "default_inconclusive_max_s")]
    pub inconclusive_max_s: u64,
    /// What to do when the last step has passed.
    #[serde(default)]
    pub on_pass: OnPass,
    /// Whether a guard that fails takes the candidate out of a paused rollout too. Nothing else
    /// happens while it is paused.
    #[serde(default = "yes")]
    pub roll_back_when_paused: bool,
    /// Decide and record, and change no traffic.
    #[serde(default)]
    pub dry_run: bool,
    /// Webhooks to call. What only tells is told by default; what confirms has to be asked for.
    #[serde(default = "HookKind::telling")]
    pub hooks: Vec<HookKind>,
}

/// One weight, and what it takes to leave it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Share of the requests that name no version, in percent, to 0.01.
    #[schema(minimum = 0.01, maximum = 100)]
    pub weight: f64,
    /// Least time at this weight.
    #[serde(default = "default_bake_s")]
    pub bake_s: u64,
    /// Least number of the candidate's requests at this weight.
    #[serde(default = "default_min_samples")]
    pub min_samples: u64,
}

/// A first step that no caller notices.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ShadowStep {
    /// Share of the requests that are copied, in percent, to 0.01.
    #[serde(default = "default_percent")]
    #[schema(minimum = 0.01, maximum = 100)]
    pub percent: f64,
    /// Least time.
    #[serde(default = "default_bake_s")]
    pub bake_s: u64,
    /// Least number of copies that ended.
    #[serde(default = "default_min_samples")]
    pub samples: u64,
}

/// What to do when the last step has passed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnPass {
    /// Give the candidate everything.
    #[default]
    Promote,
    /// Wait for somebody to resume or promote.
    Pause,
}

/// What is called over HTTP.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
pub enum HookKind {
    /// Asked before anything changes.
    #[serde(rename = "confirm-rollout", alias = "confirm_rollout")]
    ConfirmRollout,
    /// Asked before the candidate gets everything.
    #[serde(rename = "confirm-promotion", alias = "confirm_promotion")]
    ConfirmPromotion,
    /// Told of each weight.
    #[serde(rename = "step")]
    Step,
    #[serde(rename = "promoted")]
    Promoted,
    #[serde(rename = "rolled_back")]
    RolledBack,
    #[serde(rename = "paused")]
    Paused,
    /// Ended by somebody, by a hook's answer or by a table set by hand; or it could not go on.
    #[serde(rename = "ended")]
    Ended,
}

impl HookKind {
    pub const ALL: [Self; 7] = [
        Self::ConfirmRollout,
        Self::ConfirmPromotion,
        Self::Step,
        Self::Promoted,
        Self::RolledBack,
        Self::Paused,
        Self::Ended,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::ConfirmRollout => "confirm-rollout",
            Self::ConfirmPromotion => "confirm-promotion",
            Self::Step => "step",
            Self::Promoted => "promoted",
            Self::RolledBack => "rolled_back",
            Self::Paused => "paused",
            Self::Ended => "ended",
        }
    }

    /// Whether the answer decides something.
    pub fn asks(self) -> bool {
        matches!(self, Self::ConfirmRollout | Self::ConfirmPromotion)
    }

    fn telling() -> Vec<Self> {
        Self::ALL.into_iter().filter(|kind| !kind.asks()).collect()
    }
}

impl fmt::Display for HookKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// What has to hold. `error_rate`, `sample_ratio`, `non_finite` and `floor` hold unless they are
/// `null`; the others only where they are given.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Guards {
    /// The candidate fails no more often than the stable version does at the same time.
    #[serde(default = "given")]
    pub error_rate: Option<ErrorRate>,
    /// The candidate fails no more often than a fixed share. The only one that knows more than the
    /// floor at a weight of 100 %, where there is nothing to compare with.
    #[serde(default)]
    pub error_ceiling: Option<ErrorCeiling>,
    /// The candidate is slow no more often than the stable version is at the same time.
    #[serde(default)]
    pub slow_share: Option<SlowShare>,
    /// The candidate's latency quantile is at most so many times that of the stable version.
    #[serde(default)]
    pub latency_ratio: Option<LatencyRatio>,
    /// Copied requests get the same answer. Needs a shadow step.
    #[serde(default)]
    pub shadow_disagreement: Option<ShadowDisagreement>,
    /// Requests are split as the weights say.
    #[serde(default = "given")]
    pub sample_ratio: Option<SampleRatio>,
    /// The candidate gives no NaN and no infinity where the stable version gives none.
    #[serde(default = "given")]
    pub non_finite: Option<NonFinite>,
    /// What no statistics is needed for.
    #[serde(default = "given")]
    pub floor: Option<Floor>,
    /// The candidate's outputs are distributed as the stable version's. Needs the monitor.
    #[serde(default)]
    pub drift: Option<DriftGuard>,
    /// What the candidate gets and answers is as in its own reference. Needs the monitor, and a
    /// reference that is not provisional.
    #[serde(default)]
    pub reference_drift: Option<ReferenceDriftGuard>,
    /// By the labels that callers give, the candidate is mistaken no more often than the stable
    /// version.
    #[serde(default)]
    pub feedback: Option<FeedbackGuard>,
}

impl Default for Guards {
    fn default() -> Self {
        Self {
            error_rate: given(),
            error_ceiling: None,
            slow_share: None,
            latency_ratio: None,
            shadow_disagreement: None,
            sample_ratio: given(),
            non_finite: given(),
            floor: given(),
            drift: None,
            reference_drift: None,
            feedback: None,
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ErrorRate {
    /// This guard's part of the plan's `alpha`; an equal part where nothing is said.
    pub alpha: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ErrorCeiling {
    /// Share of failures that is allowed, above 0 and below 1.
    pub share_max: f64,
    /// As of `error_rate`.
    #[serde(default)]
    pub alpha: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SlowShare {
    /// A request is slow that takes longer. Rounded up to a bound of the latency histograms, which
    /// the guard's report shows.
    pub threshold_ms: f64,
    /// As of `error_rate`.
    #[serde(default)]
    pub alpha: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct LatencyRatio {
    /// Of which quantile; 0.95 is the time that one request in twenty exceeds.
    #[serde(default = "default_quantile")]
    pub quantile: f64,
    /// Most times that the candidate's may be the stable version's, at least 1.
    pub ratio_max: f64,
    /// As of `error_rate`.
    #[serde(default)]
    pub alpha: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ShadowDisagreement {
    /// Share of copied requests whose answer may differ, or fail.
    pub max: f64,
    /// As of `error_rate`.
    #[serde(default)]
    pub alpha: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct SampleRatio {
    /// The split is broken when it, or a worse one, would come by chance with less than this.
    pub p_min: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NonFinite {
    /// Answers of the candidate that may hold such a value, while the stable version gives none.
    pub max: u64,
    /// Where the stable version gives such values too, the candidate may not give more. Not a part
    /// of the plan's `alpha`.
    pub alpha: f64,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Floor {
    /// So many of the candidate's failures in a row take it out at once.
    pub consecutive_failures: u64,
    /// So does this share of failures, once it has had `requests`.
    pub failure_share: f64,
    pub requests: u64,
}

/// What the guard `feedback` compares.
const ACCURACY: &str = "accuracy";

/// Drift of the candidate's outputs against the stable version's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DriftGuard {
    /// Largest population stability index of any output's feature, less what it is by chance; above 0.
    #[serde(default = "default_score_max")]
    pub score_max: f64,
    /// Rows of each version before which the candidate cannot pass.
    #[serde(default = "default_min_samples")]
    pub min_rows: u64,
    /// As of `error_rate`.
    #[serde(default)]
    pub alpha: Option<f64>,
}

/// Drift of the candidate's inputs and outputs against its own reference.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReferenceDriftGuard {
    /// Features that may have drifted.
    pub features_max: u64,
}

/// Quality by the callers' feedback.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct FeedbackGuard {
    /// `accuracy`.
    #[serde(default = "accuracy")]
    pub metric: String,
    /// The candidate's rows with a label before which it cannot pass.
    #[serde(default = "default_min_labels")]
    pub min_labels: u64,
    #[serde(default)]
    pub alpha: Option<f64>,
}

impl Default for SampleRatio {
    fn default() -> Self {
        Self { p_min: 1e-4 }
    }
}

impl Default for NonFinite {
    fn default() -> Self {
        Self { max: 0, alpha: 0.005 }
    }
}

impl Default for Floor {
    fn default() -> Self {
        Self { consecutive_failures: 5, failure_share: 0.5, requests: 20 }
    }
}

impl Default for ShadowStep {
    fn default() -> Self {
        Self {
            percent: default_percent(),
            bake_s: default_bake_s(),
            samples: default_min_samples(),
        }
    }
}

impl Guards {
    /// The guards that test: each one's part of the plan's `alpha`.
    fn alphas(&mut self) -> impl Iterator<Item = &mut Option<f64>> {
        let alphas = [
            self.error_rate.as_mut().map(|guard| &mut guard.alpha),
            self.error_ceiling.as_mut().map(|guard| &mut guard.alpha),
            self.slow_share.as_mut().map(|guard| &mut guard.alpha),
            self.latency_ratio.as_mut().map(|guard| &mut guard.alpha),
            self.shadow_disagreement.as_mut().map(|guard| &mut guard.alpha),
            self.feedback.as_mut().map(|guard| &mut guard.alpha),
            self.drift.as_mut().map(|guard| &mut guard.alpha),
        ];
        alphas.into_iter().flatten()
    }

    /// Equal parts: the probabilities of false alarms add up, at worst.
    fn share_out(&mut self, alpha: f64) {
        let guards = self.alphas().count().max(1) as f64;
        for part in self.alphas() {
            part.get_or_insert(alpha / guards);
        }
    }
}

fn given<T: Default>() -> Option<T> {
    Some(T::default())
}

/// What labels are counted for.
fn accuracy() -> String {
    ACCURACY.to_owned()
}

fn default_score_max() -> f64 {
    0.1
}

fn default_min_labels() -> u64 {
    100
}

fn yes() -> bool {
    true
}

fn default_alpha() -> f64 {
    DEFAULT_ALPHA
}

fn default_quantile() -> f64 {
    0.95
}

fn default_percent() -> f64 {
    100.0
}

fn default_bake_s() -> u64 {
    60
}

fn default_min_samples() -> u64 {
    500
}

fn default_interval_s() -> u64 {
    10
}

fn default_inconclusive_max_s() -> u64 {
    3600
}

/// Weights of a plan that names none, in percent.
const DEFAULT_WEIGHTS: [f64; 5] = [1.0, 5.0, 25.0, 50.0, 100.0];

impl Plan {
    /// The default plan for a version.
    pub fn of(candidate: VersionRef) -> Self {
        Self {
            candidate,
            shadow: None,
            steps: Vec::new(),
            guards: Guards::default(),
            alpha: default_alpha(),
            interval_s: default_interval_s(),
            inconclusive_max_s: default_inconclusive_max_s(),
            on_pass: OnPass::default(),
            roll_back_when_paused: true,
            dry_run: false,
            hooks: HookKind::telling(),
        }
    }

    /// With its steps written out where it names none, and each guard's part of `alpha`.
    #[must_use]
    pub fn filled(mut self) -> Self {
        if self.steps.is_empty() {
            let (bake_s, min_samples) = (default_bake_s(), default_min_samples());
            self.steps =
                DEFAULT_WEIGHTS.map(|weight| Step { weight, bake_s, min_samples }).to_vec();
            // A dry run copies nothing, so it could not leave a step that waits for copies.
            if !self.dry_run {
                self.shadow.get_or_insert_default();
            }
        }
        self.guards.share_out(self.alpha);
        self
    }

    /// Holds it against all its rules.
    ///
    /// # Errors
    /// Every problem, each with its path.
    pub fn check(&self) -> Result<(), Vec<String>> {
        let mut problems = Problems(Vec::new());
        self.check_steps(&mut problems);
        self.check_times(&mut problems);
        self.check_guards(&mut problems);
        self.check_hooks(&mut problems);
        if problems.0.is_empty() { Ok(()) } else { Err(problems.0) }
    }

    /// Webhooks whose answers it waits for.
    pub fn asks(&self) -> impl Iterator<Item = HookKind> {
        self.hooks.iter().copied().filter(|kind| kind.asks())
    }

    pub fn calls(&self, kind: HookKind) -> bool {
        self.hooks.contains(&kind)
    }

    fn check_steps(&self, problems: &mut Problems) {
        if self.steps.len() > STEPS_MAX {
            problems.add("steps", format!("has {}, the limit is {STEPS_MAX}", self.steps.len()));
        }
        let mut before = 0.0;
        for (at, step) in self.steps.iter().take(STEPS_MAX).enumerate() {
            let path = |field: &str| format!("steps[{at}].{field}");
            if problems.percent(&path("weight"), step.weight) && step.weight <= before {
                let message = format!(
                    "is {}, but weights ascend and the one before is {before}",
                    step.weight
                );
                problems.add(path("weight"), message);
            }
            before = step.weight;
            problems.at_most(&path("bake_s"), step.bake_s, TIME_MAX_S);
            problems.at_most(&path("min_samples"), step.min_samples, SAMPLES_MAX);
        }
        if let Some(shadow) = &self.shadow {
            problems.percent("shadow.percent", shadow.percent);
            problems.at_most("shadow.bake_s", shadow.bake_s, TIME_MAX_S);
            problems.at_most("shadow.samples", shadow.samples, SAMPLES_MAX);
            if self.dry_run {
                problems.add("shadow", "a dry run copies no requests; leave the step out");
            }
        }
    }

    fn check_times(&self, problems: &mut Problems) {
        problems.between("interval_s", self.interval_s, 1, 3600);
        problems.between("inconclusive_max_s", self.inconclusive_max_s, 1, TIME_MAX_S);
    }

    fn check_guards(&self, problems: &mut Problems) {
        let guards = &self.guards;
        problems.alpha("alpha", Some(self.alpha));
        if let Some(guard) = &guards.error_rate {
            problems.alpha("guards.error_rate.alpha", guard.alpha);
        }
        if let Some(guard) = &guards.error_ceiling {
            problems.share("guards.error_ceiling.share_max", guard.share_max);
            problems.alpha("guards.error_ceiling.alpha", guard.alpha);
        }
        if let Some(guard) = &guards.slow_share {
            let (path, ms) = ("guards.slow_share.threshold_ms", guard.threshold_ms);
            if !(ms > 0.0 && ms < THRESHOLD_MAX_MS) {
                problems
                    .add(path, format!("expected above 0 and below {THRESHOLD_MAX_MS}, got {ms}"));
            }
            problems.alpha("guards.slow_share.alpha", guard.alpha);
        }
        if let Some(guard) = &guards.latency_ratio {
            problems.share("guards.latency_ratio.quantile", guard.quantile);
            let ratio = guard.ratio_max;
            if !(1.0..=1000.0).contains(&ratio) {
                let message = format!("expected a number from 1 to 1000, got {ratio}");
                problems.add("guards.latency_ratio.ratio_max", message);
            }
            problems.alpha("guards.latency_ratio.alpha", guard.alpha);
        }
        if let Some(guard) = &guards.shadow_disagreement {
            problems.share("guards.shadow_disagreement.max", guard.max);
            problems.alpha("guards.shadow_disagreement.alpha", guard.alpha);
            if self.shadow.is_none() && (!self.steps.is_empty() || self.dry_run) {
                problems.add("guards.shadow_disagreement", "needs the step 'shadow'");
            }
        }
        if let Some(guard) = &guards.sample_ratio {
            problems.share("guards.sample_ratio.p_min", guard.p_min);
        }
        if let Some(guard) = &guards.non_finite {
            problems.alpha("guards.non_finite.alpha", Some(guard.alpha));
        }
        if let Some(guard) = &guards.floor {
            let path = "guards.floor.consecutive_failures";
            problems.between(path, guard.consecutive_failures, 1, FLOOR_MAX);
            problems.share("guards.floor.failure_share", guard.failure_share);
            problems.between("guards.floor.requests", guard.requests, 1, FLOOR_MAX);
        }
        if let Some(guard) = &guards.feedback {
            if guard.metric != ACCURACY {
                problems.add("guards.feedback.metric", format!("expected '{ACCURACY}'"));
            }
            problems.at_most("guards.feedback.min_labels", guard.min_labels, SAMPLES_MAX);
            problems.alpha("guards.feedback.alpha", guard.alpha);
        }
        if let Some(guard) = &guards.drift {
            let path = "guards.drift.score_max";
            if !(guard.score_max > 0.0 && guard.score_max <= SCORE_MAX) {
                problems.add(path, format!("expected above 0 and at most {SCORE_MAX}"));
            }
            problems.between("guards.drift.min_rows", guard.min_rows, ROWS_MIN, SAMPLES_MAX);
            problems.alpha("guards.drift.alpha", guard.alpha);
        }
        if let Some(guard) = &guards.reference_drift {
            let path = "guards.reference_drift.features_max";
            problems.at_most(path, guard.features_max, FEATURES_MAX as u64);
        }
    }

    fn check_hooks(&self, problems: &mut Problems) {
        for (at, kind) in self.hooks.iter().enumerate().take(HookKind::ALL.len() + 1) {
            if self.hooks[..at].contains(kind) {
                problems.add(format!("hooks[{at}]"), format!("'{kind}' is there twice"));
            }
        }
    }
}

/// Everything that is wrong with a plan.
struct Problems(Vec<String>);

impl Problems {
    fn add(&mut self, path: impl fmt::Display, message: impl fmt::Display) {
        self.0.push(format!("{path}: {message}"));
    }

    fn at_most(&mut self, path: &str, got: u64, max: u64) {
        self.between(path, got, 0, max);
    }

    fn between(&mut self, path: &str, got: u64, min: u64, max: u64) {
        if !(min..=max).contains(&got) {
            self.add(path, format!("expected {min} to {max}, got {got}"));
        }
    }

    /// A share of the traffic; whether it is one.
    fn percent(&mut self, path: &str, got: f64) -> bool {
        let hundredths = got * 100.0;
        let ok = (0.01..=100.0).contains(&got) && (hundredths - hundredths.round()).abs() < 1e-6;
        if !ok {
            self.add(path, format!("expected 0.01 to 100, to 0.01, got {got}"));
        }
        ok
    }

    /// A probability that is neither never nor always.
    fn share(&mut self, path: &str, got: f64) {
        if !(got > 0.0 && got < 1.0) {
            self.add(path, format!("expected above 0 and below 1, got {got}"));
        }
    }

    fn alpha(&mut self, path: &str, got: Option<f64>) {
        let Some(got) = got else { return };
        if !(got > 0.0 && got <= 0.5) {
            self.add(path, format!("expected above 0 and at most 0.5, got {got}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn plan(value: serde_json::Value) -> Plan {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn the_shortest_plan_is_the_default_one() {
        let short = plan(json!({"candidate": "2"}));
        assert_eq!(short, Plan::of(VersionRef::parse("2").unwrap().unwrap()));
        assert!(short.check().is_ok());
        let filled = short.filled();
        assert_eq!(
            filled.steps.iter().map(|step| step.weight).collect::<Vec<_>>(),
            DEFAULT_WEIGHTS
        );
        assert_eq!(filled.shadow, Some(ShadowStep::default()));
        assert_eq!(filled.guards.error_rate, Some(ErrorRate { alpha: Some(0.05) }));
        assert!(filled.check().is_ok());
        assert_eq!(filled.clone().filled(), filled);
        assert_eq!(filled.asks().count(), 0);
        // Whoever names steps gets those.
        let steps = plan(json!({"candidate": "canary", "steps": [{"weight": 10}]})).filled();
        assert_eq!(steps.shadow, None);
        assert_eq!(steps.steps, [Step { weight: 10.0, bake_s: 60, min_samples: 500 }]);
        let dry = plan(json!({"candidate": "2", "dry_run": true})).filled();
        assert_eq!(dry.shadow, None);
    }

    #[test]
    fn a_guard_is_on_off_or_set() {
        let given = plan(json!({"candidate": "2", "gates": {
            "error_rate": null, "floor": {"requests": 40}, "error_ceiling": {"share_max": 0.02},
        }}));
        assert_eq!(given.guards.error_rate, None);
        assert_eq!(given.guards.floor, Some(Floor { requests: 40, ..Floor::default() }));
        let ceiling = ErrorCeiling { share_max: 0.02, alpha: None };
        assert_eq!(given.guards.error_ceiling, Some(ceiling));
        assert_eq!(given.guards.sample_ratio, Some(SampleRatio { p_min: 1e-4 }));
    }

    #[test]
    fn guards_share_alpha_unless_they_say_more() {
        let filled = plan(json!({"candidate": "2", "alpha": 0.04, "guards": {
            "slow_share": {"threshold_ms": 5}, "latency_ratio": {"ratio_max": 2, "alpha": 0.001},
            "error_ceiling": {"share_max": 0.1},
        }}))
        .filled();
        let guards = &filled.guards;
        assert_eq!(guards.error_rate.unwrap().alpha, Some(0.01));
        assert_eq!(guards.slow_share.unwrap().alpha, Some(0.01));
        assert_eq!(guards.latency_ratio.unwrap().alpha, Some(0.001));
        assert_eq!(filled.clone().filled(), filled);
    }

    #[test]
    fn a_plan_reads_back_as_it_was_written() {
        let whole = plan(json!({
            "candidate": "canary",
            "shadow": {"percent": 12.5, "samples": 9},
            "steps": [{"weight": 0.01, "bake_s": 1, "min_samples": 2}, {"weight": 99.99}],
            "guards": {
                "slow_share": {"threshold_ms": 12.5, "alpha": 0.01},
                "latency_ratio": {"ratio_max": 1.5},
                "shadow_disagreement": {"max": 0.02},
                "drift": {"score_max": 0.2}, "reference_drift": {},
                "non_finite": null,
            },
            "interval_s": 5, "inconclusive_max_s": 60, "on_pass": "pause", "dry_run": false,
            "roll_back_when_paused": false,
            "hooks": ["confirm-rollout", "confirm_promotion", "promoted"],
        }));
        assert!(whole.check().is_ok(), "{:?}", whole.check());
        let written = serde_json::to_value(&whole).unwrap();
        assert_eq!(written["hooks"], json!(["confirm-rollout", "confirm-promotion", "promoted"]));
        assert_eq!(plan(written), whole);
        for kind in HookKind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), json!(kind.as_str()));
        }
    }

    #[test]
    fn every_problem_is_reported_with_its_path() {
        let wrong = plan(json!({
            "candidate": "2",
            "steps": [
                {"weight": 5, "bake_s": 99_999_999}, {"weight": 5}, {"weight": 0.001},
                {"weight": 101, "min_samples": 9_999_999_999_u64},
            ],
            "guards": {
                "error_rate": {"alpha": 0}, "error_ceiling": {"share_max": 1, "alpha": 0.6},
                "slow_share": {"threshold_ms": 60000}, "latency_ratio": {"ratio_max": 0.5, "quantile": 1},
                "shadow_disagreement": {"max": 0}, "sample_ratio": {"p_min": 0},
                "non_finite": {"alpha": -1}, "floor": {"consecutive_failures": 0, "failure_share": 1},
                "drift": {"score_max": 0, "min_rows": 10, "alpha": 2},
                "reference_drift": {"features_max": 5000}, "feedback": {"metric": "f1", "alpha": 1},
            },
            "alpha": 0.9, "interval_s": 0, "inconclusive_max_s": 0, "hooks": ["step", "step"],
        }));
        let problems = wrong.check().unwrap_err();
        let paths: Vec<&str> =
            problems.iter().map(|problem| problem.split_once(": ").unwrap().0).collect();
        let want = [
            "steps[0].bake_s",
            "steps[1].weight",
            "steps[2].weight",
            "steps[3].weight",
            "steps[3].min_samples",
            "interval_s",
            "inconclusive_max_s",
            "alpha",
            "guards.error_rate.alpha",
            "guards.error_ceiling.share_max",
            "guards.error_ceiling.alpha",
            "guards.slow_share.threshold_ms",
            "guards.latency_ratio.quantile",
            "guards.latency_ratio.ratio_max",
            "guards.shadow_disagreement.max",
            "guards.shadow_disagreement",
            "guards.sample_ratio.p_min",
            "guards.non_finite.alpha",
            "guards.floor.consecutive_failures",
            "guards.floor.failure_share",
            "guards.feedback.metric",
            "guards.feedback.alpha",
            "guards.drift.score_max",
            "guards.drift.min_rows",
            "guards.drift.alpha",
            "guards.reference_drift.features_max",
            "hooks[1]",
        ];
        assert_eq!(paths, want, "{problems:#?}");
        let many = json!({"candidate": "2", "steps": vec![json!({"weight": 1}); 33]});
        assert!(plan(many).check().unwrap_err()[0].starts_with("steps: has 33"));
        let dry = json!({"candidate": "2", "dry_run": true, "shadow": {}});
        assert_eq!(plan(dry).check().unwrap_err().len(), 1);
    }

    #[test]
    fn unknown_fields_are_refused_everywhere() {
        for wrong in [
            json!({"candidate": "2", "x": 1}),
            json!({"candidate": "2", "steps": [{"weight": 1, "x": 1}]}),
            json!({"candidate": "2", "shadow": {"x": 1}}),
            json!({"candidate": "2", "guards": {"x": null}}),
            json!({"candidate": "2", "guards": {"floor": {"x": 1}}}),
            json!({"candidate": "2", "guards": {"slow_share": {}}}),
            json!({"candidate": "2", "hooks": ["x"]}),
            json!({"candidate": "2", "on_pass": "x"}),
            json!({"candidate": "a/b"}),
            json!({}),
        ] {
            assert!(serde_json::from_value::<Plan>(wrong.clone()).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_documentations_plans_are_right_and_whole() {
        let page = include_str!("../../../docs/rollouts.md");
        let blocks = page.split("```json\n").skip(1).filter_map(|rest| rest.split("```").next());
        let mut plans = 0;
        for block in blocks {
            let value: serde_json::Value = serde_json::from_str(block).unwrap();
            if value.get("candidate").is_some() {
                assert_eq!(plan(value).check(), Ok(()));
                plans += 1;
            }
        }
        assert_eq!(plans, 2);
        let all = serde_json::to_value(Plan::of(VersionRef::parse("2").unwrap().unwrap())).unwrap();
        let guards = all["guards"].as_object().unwrap();
        for key in all.as_object().unwrap().keys().chain(guards.keys()) {
            assert!(page.contains(&format!("`{key}`")), "docs/rollouts.md lacks {key}");
        }
        for kind in HookKind::ALL {
            assert!(page.contains(&format!("`{kind}`")), "docs/rollouts.md lacks {kind}");
        }
    }
}
