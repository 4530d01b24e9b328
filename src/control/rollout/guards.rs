//! Whether a rollout may go on: each guard's answer, with the numbers that led to it.
//!
//! Three answers, as in other rollout tools: *pass*, *fail* (the candidate goes, at once) and
//! *inconclusive* (the rollout does not go on, and pauses when that lasts).
//!
//! Invariants:
//! - Pure: what was seen and the plan decide, nothing else.
//! - Asked for or not: a guard of the plan always answers, so none is left out in silence.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::evidence::{
    Count, Event, Evidence, Level, OwnDrift, ShadowTally, Tally, Thresholds, share_bounds,
};
use super::labels::LabelEvidence;
use super::outputs::OutputFeature;
use super::plan::{
    DEFAULT_ALPHA, DriftGuard, FeedbackGuard, Floor, Guards, LatencyRatio, NonFinite,
    ReferenceDriftGuard, SampleRatio, ShadowDisagreement,
};
use crate::drift::evidence::ROWS_MIN;
use crate::observe::LATENCY_BOUNDS_NS;

/// Largest e-value that is shown; JSON has no infinity.
const EVIDENCE_MAX_LN: f64 = 690.0;
/// Features that a report names.
const SHOWN_MAX: usize = 5;
/// Requests of the stable version from which its latency quantile is taken.
pub const LEARN_MIN: u64 = 1000;

#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Guard {
    ErrorRate,
    ErrorCeiling,
    SlowShare,
    LatencyRatio,
    ShadowDisagreement,
    SampleRatio,
    NonFinite,
    Feedback,
    Drift,
    ReferenceDrift,
    Floor,
}

impl Guard {
    /// Label of the metrics, and key of the plan.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ErrorRate => "error_rate",
            Self::ErrorCeiling => "error_ceiling",
            Self::SlowShare => "slow_share",
            Self::LatencyRatio => "latency_ratio",
            Self::ShadowDisagreement => "shadow_disagreement",
            Self::SampleRatio => "sample_ratio",
            Self::NonFinite => "non_finite",
            Self::Feedback => "feedback",
            Self::Drift => "drift",
            Self::ReferenceDrift => "reference_drift",
            Self::Floor => "floor",
        }
    }
}

impl fmt::Display for Guard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum GuardOutcome {
    Pass,
    Fail,
    Inconclusive,
}

impl GuardOutcome {
    pub const ALL: [Self; 3] = [Self::Pass, Self::Fail, Self::Inconclusive];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pass => "pass",
            Self::Fail => "fail",
            Self::Inconclusive => "inconclusive",
        }
    }
}

/// One guard's answer, and what led to it. Numbers that it does not use are left out.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct GuardReport {
    pub guard: Guard,
    pub outcome: GuardOutcome,
    /// In words.
    pub why: String,
    /// What the candidate did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidate: Option<Count>,
    /// What the stable version did at the same time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stable: Option<Count>,
    /// An e-value, which fails at `limit`; of `sample_ratio` a probability, which is too small
    /// below it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub evidence: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<f64>,
    /// Where the true share lies; of `drift`, the true score of the output that differs most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub low: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub high: Option<f64>,
    /// A request counts when it takes longer: a bound of the latency histograms.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub threshold_ms: Option<f64>,
}

impl GuardReport {
    fn new(guard: Guard, outcome: GuardOutcome, why: impl Into<String>) -> Self {
        Self {
            guard,
            outcome,
            why: why.into(),
            candidate: None,
            stable: None,
            evidence: None,
            limit: None,
            low: None,
            high: None,
            threshold_ms: None,
        }
    }

    fn with_arms(mut self, candidate: Count, stable: Option<Count>) -> Self {
        (self.candidate, self.stable) = (Some(candidate), stable);
        self
    }

    fn with_threshold(mut self, at: Option<usize>) -> Self {
        self.threshold_ms = at.and_then(|at| LATENCY_BOUNDS_NS.get(at)).map(|ns| *ns as f64 / 1e6);
        self
    }
}

/// What guards look at.
#[derive(Clone, Copy, Debug)]
pub struct Sight<'a> {
    pub guards: &'a Guards,
    pub evidence: &'a Evidence,
    pub own_drift: &'a OwnDrift,
    /// The candidate's present share of the split, in basis points.
    pub share: u16,
    /// Requests of one caller stay together, so they are not split one by one.
    pub sticky: bool,
    pub thresholds: Thresholds,
    /// Requests of the stable version that its latency quantile can be taken from so far.
    pub learnt_from: u64,
}

/// Every guard of the plan, in a fixed order.
pub fn evaluate(sight: &Sight<'_>) -> Vec<GuardReport> {
    let Guards {
        error_rate,
        error_ceiling,
        slow_share,
        latency_ratio,
        shadow_disagreement,
        sample_ratio,
        non_finite,
        floor,
        feedback,
        drift,
        reference_drift,
    } = sight.guards;
    let reports = [
        error_rate
            .as_ref()
            .map(|guard| sight.compare(Guard::ErrorRate, Event::Failure, guard.alpha)),
        error_ceiling.as_ref().map(|guard| sight.ceiling(guard.share_max, guard.alpha)),
        slow_share.as_ref().map(|guard| {
            let report = sight.compare(Guard::SlowShare, Event::Slow, guard.alpha);
            report.with_threshold(sight.thresholds.slow)
        }),
        latency_ratio.as_ref().map(|guard| sight.ratio(guard)),
        shadow_disagreement.as_ref().map(|guard| disagreement(&sight.evidence.shadow, guard)),
        sample_ratio.as_ref().map(|guard| sight.split(guard)),
        non_finite.as_ref().map(|guard| sight.non_finite(guard)),
        feedback.as_ref().map(|guard| sight.labels(guard)),
        drift.as_ref().map(|guard| sight.outputs(guard)),
        reference_drift.as_ref().map(|guard| sight.reference(guard)),
        floor.as_ref().map(|guard| sight.floor(guard)),
    ];
    reports.into_iter().flatten().collect()
}

impl Sight<'_> {
    /// Whether requests came otherwise than one by one at random.
    fn by_requests(&self, level: &Level) -> bool {
        let p_min = self.guards.sample_ratio.unwrap_or_default().p_min;
        self.sticky || level.split_p() < p_min
    }

    fn arms(&self, what: Event) -> (Count, Count) {
        let (candidate, stable) = (self.evidence.candidate(), self.evidence.stable());
        (candidate.count(what), stable.count(what))
    }

    fn compare(&self, guard: Guard, what: Event, alpha: Option<f64>) -> GuardReport {
        let mixture = self.evidence.compared(what, |level| self.by_requests(level));
        let (candidate, stable) = self.arms(what);
        by_evidence(guard, mixture.ln(), alpha, candidate).with_arms(candidate, Some(stable))
    }

    fn ceiling(&self, share: f64, alpha: Option<f64>) -> GuardReport {
        let mixture = self.evidence.exceeding(Event::Failure, share);
        let (candidate, _) = self.arms(Event::Failure);
        by_evidence(Guard::ErrorCeiling, mixture.ln(), alpha, candidate).with_arms(candidate, None)
    }

    fn ratio(&self, guard: &LatencyRatio) -> GuardReport {
        let (candidate, stable) = self.arms(Event::Over);
        let Some(at) = self.thresholds.over else {
            let why = match self.learnt_from < LEARN_MIN {
                true => format!(
                    "the stable version has had {} of {LEARN_MIN} requests to take its quantile from",
                    self.learnt_from
                ),
                false => {
                    "the threshold would be beyond the longest time that is told apart".to_owned()
                }
            };
            return GuardReport::new(Guard::LatencyRatio, GuardOutcome::Inconclusive, why);
        };
        let mixture = self.evidence.exceeding(Event::Over, 1.0 - guard.quantile);
        let report = by_evidence(Guard::LatencyRatio, mixture.ln(), guard.alpha, candidate);
        report.with_arms(candidate, Some(stable)).with_threshold(Some(at))
    }

    fn split(&self, guard: &SampleRatio) -> GuardReport {
        let level = self.evidence.at(self.share);
        let realised = level.realised();
        let p = level.split_p();
        let percent = f64::from(self.share) / 100.0;
        let came = format!(
            "{:.2} % of {} requests came where {percent} % was meant",
            realised.share() * 100.0,
            realised.of
        );
        let (outcome, why) = if self.sticky {
            let why = "; callers stay together, so chance says nothing of it";
            (GuardOutcome::Pass, came + why)
        } else if p < guard.p_min {
            (GuardOutcome::Inconclusive, format!("the assignment is broken: {came}, p = {p:.1e}"))
        } else {
            (GuardOutcome::Pass, came)
        };
        let mut report = GuardReport::new(Guard::SampleRatio, outcome, why);
        (report.evidence, report.limit) = (Some(p), Some(guard.p_min));
        report.with_arms(realised, None)
    }

    fn non_finite(&self, guard: &NonFinite) -> GuardReport {
        let (candidate, stable) = self.arms(Event::NonFinite);
        let copied = self.evidence.shadow.non_finite;
        let report = if candidate.events.max(copied) <= guard.max {
            let why = format!("at most {} answers are not finite", guard.max);
            GuardReport::new(Guard::NonFinite, GuardOutcome::Pass, why)
        } else if stable.events == 0 {
            let given = candidate.events.max(copied);
            let why = format!("{given} answers are not finite, and none of the stable version's");
            GuardReport::new(Guard::NonFinite, GuardOutcome::Fail, why)
        } else {
            let mixture = self.evidence.compared(Event::NonFinite, |level| self.by_requests(level));
            by_evidence(Guard::NonFinite, mixture.ln(), Some(guard.alpha), candidate)
        };
        report.with_arms(candidate, Some(stable))
    }

    fn labels(&self, guard: &FeedbackGuard) -> GuardReport {
        let LabelEvidence { candidate, stable, ln, .. } = self.evidence.labels;
        if self.share == 0 && candidate.of == 0 {
            return self.nothing_yet(Guard::Feedback);
        }
        let mut report = by_evidence(Guard::Feedback, ln, guard.alpha, candidate);
        if report.outcome == GuardOutcome::Pass && candidate.of < guard.min_labels {
            report.outcome = GuardOutcome::Inconclusive;
            report.why =
                format!("{} of {} labels of the candidate's", candidate.of, guard.min_labels);
        }
        report.with_arms(candidate, Some(stable))
    }

    /// Callers see nothing of the candidate: only copies are sent to it.
    fn nothing_yet(&self, guard: Guard) -> GuardReport {
        GuardReport::new(
            guard,
            GuardOutcome::Pass,
            "the candidate has no share of the requests yet",
        )
    }

    /// The output that differs most decides. It fails when it differs for certain, and by more than is
    /// allowed.
    fn outputs(&self, guard: &DriftGuard) -> GuardReport {
        let outputs = &self.evidence.outputs;
        let (candidate, stable) = outputs.rows();
        let of = |rows| Count { events: 0, of: rows };
        if self.share == 0 && candidate == 0 {
            return self.nothing_yet(Guard::Drift);
        }
        let features = outputs.features.len().max(1) as f64;
        let limit = features / guard.alpha.unwrap_or(DEFAULT_ALPHA);
        let distances = outputs.features.iter().filter_map(|own| Some((own, own.distance()?)));
        let evident = |own: &OutputFeature| own.ln >= limit.ln();
        let worst = distances.max_by(|(a, x), (b, y)| {
            let by = |own: &OutputFeature, low: f64| if evident(own) { low } else { f64::MIN };
            by(a, x.low).total_cmp(&by(b, y.low)).then(x.score.total_cmp(&y.score))
        });
        let few = candidate < guard.min_rows || stable < guard.min_rows;
        let rows = || {
            let (DriftGuard { min_rows, .. }, rows) = (guard, "rows of the candidate's");
            format!("{candidate} of {min_rows} {rows} and {stable} of the stable version's")
        };
        let Some((own, distance)) = worst else {
            let why = outputs.problem.clone().unwrap_or_else(rows);
            let report = GuardReport::new(Guard::Drift, GuardOutcome::Inconclusive, why);
            return report.with_arms(of(candidate), Some(of(stable)));
        };
        let evidence = own.ln.min(EVIDENCE_MAX_LN).exp();
        let mut why = format!(
            "{} differs by {:.3} ({:.3} to {:.3}), allowed is {}: evidence {evidence:.3}, limit {limit:.3}",
            own.feature, distance.score, distance.low, distance.high, guard.score_max
        );
        let outcome = if evident(own) && distance.low >= guard.score_max {
            GuardOutcome::Fail
        } else if few {
            why = format!("{}; {why}", rows());
            GuardOutcome::Inconclusive
        } else if distance.score >= guard.score_max {
            GuardOutcome::Inconclusive
        } else {
            GuardOutcome::Pass
        };
        let mut report = GuardReport::new(Guard::Drift, outcome, why);
        (report.evidence, report.limit) = (Some(evidence), Some(limit));
        (report.low, report.high) = (Some(distance.low), Some(distance.high));
        report.with_arms(of(candidate), Some(of(stable)))
    }

    fn reference(&self, guard: &ReferenceDriftGuard) -> GuardReport {
        let OwnDrift { rows, drifted, problem } = self.own_drift;
        let of = Count { events: 0, of: *rows };
        let (outcome, why) = if self.share == 0 && *rows == 0 {
            return self.nothing_yet(Guard::ReferenceDrift);
        } else if let Some(problem) = problem {
            (GuardOutcome::Inconclusive, problem.clone())
        } else if *rows < ROWS_MIN {
            (GuardOutcome::Inconclusive, format!("{rows} of {ROWS_MIN} rows in the last hour"))
        } else if drifted.len() as u64 > guard.features_max {
            let shown: Vec<&str> = drifted.iter().take(SHOWN_MAX).map(String::as_str).collect();
            let more = drifted.len() - shown.len();
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            let why = format!("{} of {rows} rows have drifted{more}", shown.join(", "));
            (GuardOutcome::Fail, why)
        } else {
            (GuardOutcome::Pass, format!("{} features of {rows} rows have drifted", drifted.len()))
        };
        GuardReport::new(Guard::ReferenceDrift, outcome, why).with_arms(of, None)
    }

    fn floor(&self, guard: &Floor) -> GuardReport {
        let candidate = self.evidence.candidate();
        let level = self.evidence.at(self.share).candidate;
        let shadow = &self.evidence.shadow;
        let copies = Count { events: shadow.failed, of: shadow.samples() };
        let in_a_row = self.evidence.failures_in_a_row;
        let all_copies = shadow.compared == 0 && shadow.failed >= guard.consecutive_failures;
        let failure = if in_a_row >= guard.consecutive_failures {
            Some(format!("{in_a_row} failures in a row"))
        } else if all_copies {
            Some(format!("all {} copied requests failed", shadow.failed))
        } else {
            let failures = |tally: &Tally| tally.count(Event::Failure);
            let counts = [failures(&candidate), failures(&level), copies];
            let over =
                |count: &Count| count.of >= guard.requests && count.share() >= guard.failure_share;
            let found = counts.into_iter().find(over);
            found.map(|count| format!("{} of {} requests failed", count.events, count.of))
        };
        let outcome = if failure.is_some() { GuardOutcome::Fail } else { GuardOutcome::Pass };
        let why = failure.unwrap_or_else(|| format!("at most {in_a_row} failures in a row"));
        let report = GuardReport::new(Guard::Floor, outcome, why);
        report.with_arms(candidate.count(Event::Failure), None)
    }
}

/// What an e-value says. Half of what it takes to fail is enough not to give the candidate more.
fn by_evidence(guard: Guard, ln: f64, alpha: Option<f64>, candidate: Count) -> GuardReport {
    let limit = 1.0 / alpha.unwrap_or(DEFAULT_ALPHA);
    let evidence = ln.min(EVIDENCE_MAX_LN).exp();
    let outcome = if ln >= limit.ln() {
        GuardOutcome::Fail
    } else if evidence >= (limit / 2.0).max(2.0) {
        GuardOutcome::Inconclusive
    } else {
        GuardOutcome::Pass
    };
    let Count { events, of } = candidate;
    let what = match guard {
        Guard::SlowShare | Guard::LatencyRatio => "were slow",
        Guard::NonFinite => "got answers that are not finite",
        Guard::Feedback => "were taken for something else than their label",
        _ => "failed",
    };
    let rows = if guard == Guard::Feedback { "labelled rows" } else { "requests" };
    let why = format!("{events} of {of} {rows} {what}: evidence {evidence:.3}, limit {limit:.3}");
    let mut report = GuardReport::new(guard, outcome, why);
    (report.evidence, report.limit) = (Some(evidence), Some(limit));
    report
}

fn disagreement(shadow: &ShadowTally, guard: &ShadowDisagreement) -> GuardReport {
    let count = shadow.disagreements();
    let (low, high) = share_bounds(count, guard.alpha.unwrap_or(DEFAULT_ALPHA));
    let outcome = if low > guard.max {
        GuardOutcome::Fail
    } else if high <= guard.max {
        GuardOutcome::Pass
    } else {
        GuardOutcome::Inconclusive
    };
    let Count { events, of } = count;
    let why = format!(
        "{events} of {of} copied requests got another answer or none: {:.2} to {:.2} %, allowed are {} %",
        low * 100.0,
        high * 100.0,
        guard.max * 100.0
    );
    let mut report = GuardReport::new(Guard::ShadowDisagreement, outcome, why);
    (report.low, report.high) = (Some(low), Some(high));
    report.with_arms(count, None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::rollout::plan::{ErrorCeiling, SlowShare};
    use GuardOutcome::{Fail, Inconclusive, Pass};

    /// (started, failures, slow, over, not finite) of each arm, at a share.
    type Arms = (u16, [u64; 5], [u64; 5]);

    fn evidence(levels: &[Arms]) -> Evidence {
        let tally = |[started, failures, slow, over, non_finite]: [u64; 5]| Tally {
            started,
            requests: started,
            failures,
            slow,
            over,
            non_finite,
        };
        let levels = levels.iter().map(|(share, candidate, stable)| Level {
            share: *share,
            candidate: tally(*candidate),
            stable: tally(*stable),
        });
        let mut evidence = Evidence::default();
        evidence.levels = levels.collect();
        evidence
    }

    static NO_DRIFT: OwnDrift = OwnDrift { rows: 0, drifted: Vec::new(), problem: None };

    fn all() -> Guards {
        Guards {
            error_ceiling: Some(ErrorCeiling { share_max: 0.05, alpha: None }),
            slow_share: Some(SlowShare { threshold_ms: 100.0, alpha: None }),
            latency_ratio: Some(LatencyRatio { quantile: 0.95, ratio_max: 1.5, alpha: None }),
            shadow_disagreement: Some(ShadowDisagreement { max: 0.02, alpha: None }),
            ..Guards::default()
        }
    }

    fn sight<'a>(guards: &'a Guards, evidence: &'a Evidence) -> Sight<'a> {
        let share = evidence.levels.last().map_or(0, |level| level.share);
        let thresholds = Thresholds { slow: Some(11), over: Some(12) };
        Sight {
            guards,
            evidence,
            own_drift: &NO_DRIFT,
            share,
            sticky: false,
            thresholds,
            learnt_from: LEARN_MIN,
        }
    }

    fn outcome(sight: &Sight<'_>, guard: Guard) -> GuardOutcome {
        let reports = evaluate(sight);
        reports.into_iter().find(|report| report.guard == guard).unwrap().outcome
    }

    #[test]
    fn each_guard_passes_fails_or_waits_by_its_own_numbers() {
        use Guard::{
            ErrorCeiling, ErrorRate, Floor, LatencyRatio, NonFinite, SampleRatio, SlowShare,
        };
        let fine = [1_000, 5, 5, 5, 0];
        let stable = [19_000, 95, 95, 95, 0];
        let with = |at: usize, count| {
            let mut arm = fine;
            arm[at] = count;
            arm
        };
        let cases: &[(&str, Guard, Arms, GuardOutcome)] = &[
            ("as many", ErrorRate, (500, fine, stable), Pass),
            ("none", ErrorRate, (500, with(1, 0), stable), Pass),
            ("eight times as many", ErrorRate, (500, with(1, 40), stable), Fail),
            ("a few more", ErrorRate, (500, with(1, 13), stable), Inconclusive),
            ("all, and nothing to compare", ErrorRate, (10_000, with(1, 400), [0; 5]), Pass),
            ("below the ceiling", ErrorCeiling, (500, with(1, 40), stable), Pass),
            ("above the ceiling", ErrorCeiling, (10_000, with(1, 100), [0; 5]), Fail),
            ("slow", SlowShare, (500, with(2, 40), stable), Fail),
            ("not slow", SlowShare, (500, fine, stable), Pass),
            ("over the quantile", LatencyRatio, (500, with(3, 100), stable), Fail),
            ("under the quantile", LatencyRatio, (500, with(3, 50), stable), Pass),
            ("split as meant", SampleRatio, (500, fine, stable), Pass),
            ("split otherwise", SampleRatio, (500, fine, [9_000, 0, 0, 0, 0]), Inconclusive),
            ("not finite", NonFinite, (500, with(4, 1), stable), Fail),
            ("neither is", NonFinite, (500, with(4, 1), [19_000, 0, 0, 0, 19]), Pass),
            ("far more than it", NonFinite, (500, with(4, 40), [19_000, 0, 0, 0, 19]), Fail),
            ("half of them", Floor, (500, [20, 10, 0, 0, 0], [380, 0, 0, 0, 0]), Fail),
            ("half of too few", Floor, (500, [19, 10, 0, 0, 0], [380, 0, 0, 0, 0]), Pass),
        ];
        let guards = all();
        for (name, guard, arms, want) in cases {
            let evidence = evidence(&[*arms]);
            let got = outcome(&sight(&guards, &evidence), *guard);
            assert_eq!(got, *want, "{name}: {:#?}", evaluate(&sight(&guards, &evidence)));
        }
    }

    #[test]
    fn the_floor_sees_rows_of_failures_the_present_weight_and_copies() {
        let guards = all();
        let mut seen = evidence(&[(100, [10_000, 0, 0, 0, 0], [990_000, 0, 0, 0, 0])]);
        assert_eq!(outcome(&sight(&guards, &seen), Guard::Floor), Pass);
        seen.failures_in_a_row = 5;
        assert_eq!(outcome(&sight(&guards, &seen), Guard::Floor), Fail);
        // Good for long, bad since the last step.
        let late = [
            (100, [10_000, 0, 0, 0, 0], [990_000, 0, 0, 0, 0]),
            (500, [20, 12, 0, 0, 0], [380, 0, 0, 0, 0]),
        ];
        assert_eq!(outcome(&sight(&guards, &evidence(&late)), Guard::Floor), Fail);
        for (compared, failed, want) in [(0, 4, Pass), (0, 5, Fail), (9, 9, Pass), (10, 10, Fail)] {
            let mut seen = evidence(&[]);
            seen.shadow = ShadowTally { compared, failed, ..ShadowTally::default() };
            assert_eq!(outcome(&sight(&guards, &seen), Guard::Floor), want, "{compared} {failed}");
        }
    }

    #[test]
    fn copies_agree_only_when_enough_of_them_were_seen() {
        let guards = all();
        let cases = [
            (0, 0, 0, Inconclusive),
            (100, 0, 0, Inconclusive),
            (1_000, 2, 0, Pass),
            (1_000, 20, 0, Inconclusive),
            (1_000, 0, 60, Fail),
            (1_000, 60, 0, Fail),
        ];
        for (compared, disagreed, failed, want) in cases {
            let mut seen = evidence(&[]);
            seen.shadow = ShadowTally { compared, disagreed, failed, non_finite: 0 };
            let sight = sight(&guards, &seen);
            assert_eq!(outcome(&sight, Guard::ShadowDisagreement), want, "{compared} {disagreed}");
        }
        let mut seen = evidence(&[]);
        seen.shadow.non_finite = 1;
        assert_eq!(outcome(&sight(&guards, &seen), Guard::NonFinite), Fail);
    }

    #[test]
    fn labels_decide_once_there_are_enough_of_them() {
        let feedback =
            FeedbackGuard { metric: "accuracy".to_owned(), min_labels: 50, alpha: Some(0.05) };
        let guards = Guards { feedback: Some(feedback), ..all() };
        let cases = [
            (0, 0.0, Inconclusive),
            (49, 0.0, Inconclusive),
            (50, 0.0, Pass),
            (50, f64::ln(10.0), Inconclusive),
            (50, f64::ln(20.0) + 1e-9, Fail),
            // What is clear is clear.
            (7, f64::ln(25.0), Fail),
        ];
        for (of, ln, want) in cases {
            let mut seen = evidence(&[(500, [0; 5], [0; 5])]);
            (seen.labels.candidate.of, seen.labels.ln) = (of, ln);
            assert_eq!(outcome(&sight(&guards, &seen), Guard::Feedback), want, "{of} {ln}");
        }
    }

    #[test]
    fn outputs_decide_by_distance_and_evidence() {
        let drift = DriftGuard { score_max: 0.1, min_rows: 500, alpha: Some(0.05) };
        let guards = Guards { drift: Some(drift), ..all() };
        let equal = [500, 500];
        let cases = [
            ("nothing yet", [0, 0], [0, 0], 0.0, Inconclusive),
            ("too few", equal, [200, 200], 0.0, Inconclusive),
            ("the same", equal, [300, 300], 0.0, Pass),
            ("far, and no evidence", equal, [600, 100], 0.0, Inconclusive),
            ("far, and evident", equal, [600, 100], 50.0, Fail),
            ("clear before all rows are there", equal, [90, 1], 9.0, Fail),
            ("evident, and near", equal, [340, 300], 50.0, Pass),
            ("evident, perhaps near", equal, [450, 230], 50.0, Inconclusive),
        ];
        for (name, stable, candidate, ln, want) in cases {
            let mut seen = evidence(&[(500, [0; 5], [0; 5])]);
            let own = OutputFeature {
                feature: "class(y)".to_owned(),
                stable: stable.to_vec(),
                candidate: candidate.to_vec(),
                ln,
            };
            let half = own.candidate.iter().sum::<u64>() / 2;
            let (feature, candidate) = ("z".to_owned(), vec![half; 2]);
            let other = OutputFeature { feature, candidate, ln: 1.0, ..own.clone() };
            seen.outputs.features = vec![own, other];
            let sight = sight(&guards, &seen);
            assert_eq!(outcome(&sight, Guard::Drift), want, "{name}: {:#?}", evaluate(&sight));
        }
        // While only copies are sent to it, there is nothing to wait for.
        let seen = evidence(&[]);
        assert_eq!(outcome(&sight(&guards, &seen), Guard::Drift), Pass);
    }

    #[test]
    fn its_own_reference_decides_once_there_are_rows() {
        let guards =
            Guards { reference_drift: Some(ReferenceDriftGuard { features_max: 1 }), ..all() };
        let seen = evidence(&[(500, [0; 5], [0; 5])]);
        let names = |count: usize| (0..count).map(|at| format!("x[{at}]")).collect();
        for (rows, drifted, problem, want) in [
            (0, 0, None, Inconclusive),
            (199, 9, None, Inconclusive),
            (200, 1, None, Pass),
            (200, 9, None, Fail),
            (200, 0, Some("it is provisional".to_owned()), Inconclusive),
        ] {
            let own = OwnDrift { rows, drifted: names(drifted), problem };
            let sight = Sight { own_drift: &own, ..sight(&guards, &seen) };
            assert_eq!(outcome(&sight, Guard::ReferenceDrift), want, "{own:?}");
        }
    }

    #[test]
    fn sticky_or_broken_splits_are_not_held_against_the_candidate() {
        let guards = all();
        // One busy caller: 10 % came where 5 % was meant, and failures likewise.
        let seen = evidence(&[(500, [1_000, 60, 0, 0, 0], [9_000, 540, 0, 0, 0])]);
        let mut sight = sight(&guards, &seen);
        assert_eq!(outcome(&sight, Guard::SampleRatio), Inconclusive);
        assert_eq!(outcome(&sight, Guard::ErrorRate), Pass);
        sight.sticky = true;
        assert_eq!(outcome(&sight, Guard::SampleRatio), Pass);
        assert_eq!(outcome(&sight, Guard::ErrorRate), Pass);
    }

    #[test]
    fn a_ratio_waits_for_the_quantile_it_is_taken_of() {
        let guards = all();
        let seen = evidence(&[(500, [1_000, 0, 0, 0, 0], [19_000, 0, 0, 0, 0])]);
        let mut sight = sight(&guards, &seen);
        sight.thresholds.over = None;
        for learnt_from in [0, LEARN_MIN] {
            sight.learnt_from = learnt_from;
            assert_eq!(outcome(&sight, Guard::LatencyRatio), Inconclusive);
        }
    }

    #[test]
    fn every_guard_of_the_plan_answers_and_numbers_are_json() {
        let seen = evidence(&[(500, [u64::MAX / 8, u64::MAX / 8, 0, 0, 9], [0; 5])]);
        let guards = all();
        let reports = evaluate(&sight(&guards, &seen));
        assert_eq!(reports.len(), 8);
        let text = serde_json::to_string(&reports).unwrap();
        assert!(!text.contains("null"), "{text}");
        let read: Vec<GuardReport> = serde_json::from_str(&text).unwrap();
        assert_eq!(read.len(), 8);
        for report in &reports {
            let word = serde_json::to_value(report.guard).unwrap();
            assert_eq!(word, report.guard.as_str());
            assert_eq!(serde_json::to_value(report.outcome).unwrap(), report.outcome.as_str());
        }
        let none = Guards {
            error_rate: None,
            sample_ratio: None,
            non_finite: None,
            floor: None,
            ..Guards::default()
        };
        assert!(evaluate(&sight(&none, &seen)).is_empty());
    }
}
