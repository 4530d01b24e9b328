//! What has been seen of two arms, and how much it says.
//!
//! ```text
//! observation ──difference to the one before──▶ Level { share, candidate, stable }   one per weight
//!                                                        │
//!                                    Mixture::add(share, events, others) ──▶ ln E ≥ ln 1/α: act
//! ```
//!
//! Counts are kept, not sums of logarithms: a few whole numbers per weight say all that the tests
//! need, they are written and read back exactly, and anyone can compute the evidence again from the
//! journal.
//!
//! The test is the one-sided mixture of likelihood ratios for "the candidate's events are θ times
//! as frequent": an event that happens while the candidate has share `w` of the requests is the
//! candidate's with probability `wθ / (wθ + 1 − w)` then, and with at most `w` when it is no worse.
//! The mixture over θ has an expected value of at most 1 under the latter whenever one looks, so
//! the probability that it ever reaches 1/α is at most α (Ville). There is no number of samples to
//! fix beforehand, and looking often costs nothing.
//!
//! Invariants:
//! - Memory does not grow with requests or time: one [`Level`] for each weight, at most
//!   [`LEVELS_MAX`].
//! - What cannot be attributed exactly makes the evidence weaker, never stronger.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::labels::{LabelEvidence, LabelTotals};
use super::outputs::OutputEvidence;
use super::plan::STEPS_MAX;
use crate::domain::{Traffic, Version};
use crate::monitor::Compared;
use crate::observe::{ArmTotals, LATENCY_BOUNDS_NS, LATENCY_BUCKETS, VersionStats, Watched};

/// How many times as frequent the candidate's events may be, all equally likely beforehand.
pub const FACTORS: [f64; 8] = [1.25, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0, 50.0];
/// Different weights that are kept apart. A plan's steps are fewer; a dry run follows weights that
/// are set by hand.
pub const LEVELS_MAX: usize = 2 * STEPS_MAX;
/// The whole traffic, in basis points.
pub const SHARE_WHOLE: u16 = 10_000;

/// Evidence that events fall on one arm more often than its share.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mixture {
    /// Log likelihood ratio of each factor.
    logs: [f64; FACTORS.len()],
}

impl Mixture {
    /// Takes `events` on the arm and `others` beside it, in whatever order, all while the arm's
    /// share was `share`. Where the arm has nothing or everything, there is nothing to compare.
    pub fn add(&mut self, share: f64, events: u64, others: u64) {
        if !(share > 0.0 && share < 1.0) {
            return;
        }
        let (events, all) = (events as f64, (events + others) as f64);
        for (log, factor) in self.logs.iter_mut().zip(FACTORS) {
            // ln(wθ + 1 − w) with no digit lost where w is small.
            *log += events * factor.ln() - all * (share * (factor - 1.0)).ln_1p();
        }
    }

    /// Logarithm of the e-value.
    pub fn ln(&self) -> f64 {
        let largest = self.logs.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = self.logs.iter().map(|log| (log - largest).exp()).sum();
        largest + (sum / FACTORS.len() as f64).ln()
    }
}

/// Events among requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Count {
    pub events: u64,
    pub of: u64,
}

impl Count {
    pub fn share(self) -> f64 {
        if self.of == 0 { 0.0 } else { self.events as f64 / self.of as f64 }
    }
}

/// What one arm's requests came to at one weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Tally {
    /// Given to the version, whatever became of them.
    pub started: u64,
    /// Ended in an answer or a failure that counts.
    pub requests: u64,
    /// Of those, failed through no fault of the caller.
    pub failures: u64,
    /// Took longer than the guard `slow_share` says.
    pub slow: u64,
    /// Took longer than the guard `latency_ratio` found.
    pub over: u64,
    /// Answers with a value that is not finite.
    pub non_finite: u64,
}

impl Tally {
    pub fn add(&mut self, more: &Self) {
        self.started += more.started;
        self.requests += more.requests;
        self.failures += more.failures;
        self.slow += more.slow;
        self.over += more.over;
        self.non_finite += more.non_finite;
    }

    /// One of its counts, among its requests.
    pub fn count(&self, what: Event) -> Count {
        Count { events: self.get(what), of: self.requests }
    }

    fn get(&self, what: Event) -> u64 {
        match what {
            Event::Failure => self.failures,
            Event::Slow => self.slow,
            Event::Over => self.over,
            Event::NonFinite => self.non_finite,
        }
    }
}

/// What a test counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Failure,
    Slow,
    Over,
    NonFinite,
}

/// Both arms while the candidate had one share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Level {
    /// The candidate's share of the split, in basis points.
    pub share: u16,
    pub candidate: Tally,
    pub stable: Tally,
}

impl Level {
    fn weight(&self) -> f64 {
        f64::from(self.share) / f64::from(SHARE_WHOLE)
    }

    /// The candidate's part of the requests.
    pub fn realised(&self) -> Count {
        let (candidate, stable) = (self.candidate.started, self.stable.started);
        Count { events: candidate, of: candidate + stable }
    }

    /// Probability of a split at least as far from the share by chance; 1 while there is too
    /// little to say.
    pub fn split_p(&self) -> f64 {
        let (weight, realised) = (self.weight(), self.realised());
        let all = realised.of as f64;
        // The usual condition for the approximation: five expected on either side.
        if all * weight < 5.0 || all * (1.0 - weight) < 5.0 {
            return 1.0;
        }
        let off = realised.events as f64 - all * weight;
        chi_square_p(off * off / (all * weight * (1.0 - weight)))
    }

    /// The weight that tests use. Where requests are not split one by one at random, because they
    /// stick to keys or because something is broken, the part that came stands in for the share
    /// if it is larger: the evidence falls as the weight rises.
    fn tested_weight(&self, by_requests: bool) -> f64 {
        let weight = self.weight();
        if by_requests { weight.max(self.realised().share()) } else { weight }
    }
}

/// Copied requests, compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ShadowTally {
    /// Answered by both, and compared.
    pub compared: u64,
    /// Of those, answered differently.
    pub disagreed: u64,
    /// Failed in the candidate through no fault of the caller, while the stable version answered.
    pub failed: u64,
    /// Answers of the candidate with a value that is not finite.
    pub non_finite: u64,
}

impl ShadowTally {
    /// Copies that ended.
    pub fn samples(&self) -> u64 {
        self.compared + self.failed
    }

    pub fn disagreements(&self) -> Count {
        Count { events: self.disagreed + self.failed, of: self.samples() }
    }

    fn since(&self, before: &Self) -> Self {
        Self {
            compared: since(self.compared, before.compared),
            disagreed: since(self.disagreed, before.disagreed),
            failed: since(self.failed, before.failed),
            non_finite: since(self.non_finite, before.non_finite),
        }
    }

    fn add(&mut self, more: &Self) {
        self.compared += more.compared;
        self.disagreed += more.disagreed;
        self.failed += more.failed;
        self.non_finite += more.non_finite;
    }
}

/// Shadow comparisons of a candidate since counting began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShadowTotals {
    /// Tells these counters from others, which begin at 0.
    pub instance: u64,
    pub tally: ShadowTally,
}

/// What is to be seen of a rollout at one moment.
#[derive(Debug, Default)]
pub struct Observation {
    /// The candidate's share of the split in force, in basis points.
    pub share: u16,
    /// The traffic table in force; `None` when there is none.
    pub traffic: Option<Traffic>,
    /// What the split sent to each version ([`crate::observe::VersionStats::split_totals`]);
    /// `None` for one that is not loaded.
    pub stable: Option<ArmTotals>,
    pub candidate: Option<ArmTotals>,
    pub shadow: ShadowTotals,
    /// What labels say of requests that the split sent; `None` while that is not known.
    pub labels: Option<LabelTotals>,
    /// What both versions answered since the rollout began; `None` when nobody counts that.
    pub outputs: Option<Arc<Compared>>,
    /// How the candidate's rows compare with its own reference.
    pub own_drift: OwnDrift,
    /// Keeps the versions under watch until the next observation.
    pub watched: Vec<Watched>,
}

impl Observation {
    /// Of loaded versions' counters (`None` for one that is not loaded) and the table in force.
    pub fn of(
        candidate: (Version, Option<&Arc<VersionStats>>),
        stable: Option<&Arc<VersionStats>>,
        traffic: Option<Traffic>,
        shadow: ShadowTotals,
        labels: Option<LabelTotals>,
    ) -> Self {
        let shares = traffic.as_ref().map(Traffic::shares).unwrap_or_default();
        let totals = |stats: &Arc<VersionStats>| stats.split_totals();
        Self {
            share: shares.get(&candidate.0).copied().unwrap_or(0),
            traffic,
            stable: stable.map(totals),
            candidate: candidate.1.map(totals),
            shadow,
            labels,
            outputs: None,
            own_drift: OwnDrift::default(),
            watched: candidate.1.into_iter().chain(stable).map(VersionStats::watch).collect(),
        }
    }
}

/// A version's rows of the last hour that the split sent, against its own reference.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OwnDrift {
    pub rows: u64,
    /// Features that have drifted for certain: an effect beyond its limit, and anytime-valid evidence.
    pub drifted: Vec<String>,
    /// Why nothing is to be said.
    pub problem: Option<String>,
}

/// Bounds of the latency histograms beyond which a request counts, as places in
/// [`LATENCY_BOUNDS_NS`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Thresholds {
    pub slow: Option<usize>,
    pub over: Option<usize>,
}

/// Latency of one arm since the rollout began or the gateway was started, whichever was later.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Quantiles {
    pub requests: u64,
    pub p50_ms: f64,
    pub p95_ms: f64,
    pub p99_ms: f64,
}

/// Latency of both arms. Between the histograms' bounds it is interpolated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Latencies {
    pub candidate: Quantiles,
    pub stable: Quantiles,
}

/// Everything that a rollout has seen.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Evidence {
    /// By ascending share.
    pub levels: Vec<Level>,
    pub shadow: ShadowTally,
    #[serde(default)]
    pub labels: LabelEvidence,
    /// What the guard `drift` goes by; empty without it.
    #[serde(default)]
    pub outputs: OutputEvidence,
    /// Most failures of the candidate in a row.
    pub failures_in_a_row: u64,
    /// For people: no guard reads it.
    #[serde(default)]
    pub latency: Latencies,
    #[serde(skip)]
    #[schema(ignore)]
    before: Before,
    #[serde(skip)]
    #[schema(ignore)]
    histograms: Histograms,
}

/// What the next difference is taken from.
#[derive(Clone, Debug, Default, PartialEq)]
enum Before {
    /// Nothing: a record that was read back belongs to a process whose counters began after it.
    #[default]
    Zero,
    /// The next observation: what was counted before the rollout is not its own.
    Next,
    Seen(Box<Seen>),
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
    stable: ArmTotals,
    candidate: ArmTotals,
    shadow: ShadowTotals,
}

#[derive(Clone, Debug, Default, PartialEq)]
struct Histograms {
    candidate: [u64; LATENCY_BUCKETS],
    stable: [u64; LATENCY_BUCKETS],
}

impl Evidence {
    /// Of a rollout that starts: the first observation only says where counting begins.
    pub fn starting() -> Self {
        Self { before: Before::Next, ..Self::default() }
    }

    /// Takes what has happened since the observation before.
    pub fn add(&mut self, seen: &Observation, thresholds: Thresholds) {
        self.labels.add(seen.labels);
        self.outputs.add(seen.outputs.as_ref());
        let stable = seen.stable.clone().unwrap_or_default();
        let candidate = seen.candidate.clone().unwrap_or_default();
        let now = Box::new(Seen { stable, candidate, shadow: seen.shadow });
        let before = match std::mem::replace(&mut self.before, Before::Seen(now.clone())) {
            Before::Zero => Box::default(),
            Before::Next => return,
            Before::Seen(seen) => seen,
        };
        // What is not loaded has counted nothing; loaded again, it counts from 0.
        let candidate = Difference::of(&before.candidate, &now.candidate);
        let stable = Difference::of(&before.stable, &now.stable);
        let shadow = match before.shadow.instance == now.shadow.instance {
            true => now.shadow.tally.since(&before.shadow.tally),
            false => now.shadow.tally,
        };
        self.shadow.add(&shadow);
        self.failures_in_a_row = self.failures_in_a_row.max(now.candidate.failures_in_a_row);
        self.add_latency(&candidate, &stable);
        if let Some(level) = self.level(seen.share) {
            level.candidate.add(&candidate.tally(thresholds));
            level.stable.add(&stable.tally(thresholds));
        }
    }

    fn add_latency(&mut self, candidate: &Difference, stable: &Difference) {
        let histograms = &mut self.histograms;
        add_buckets(&mut histograms.candidate, &candidate.latency);
        add_buckets(&mut histograms.stable, &stable.latency);
        self.latency = Latencies {
            candidate: quantiles(&histograms.candidate),
            stable: quantiles(&histograms.stable),
        };
    }

    /// The level of a share; when there is room for no more, that of the next larger share, which
    /// makes the same events say less.
    fn level(&mut self, share: u16) -> Option<&mut Level> {
        let at = self.levels.partition_point(|level| level.share < share);
        let known = self.levels.get(at).is_some_and(|level| level.share == share);
        if !known && self.levels.len() < LEVELS_MAX {
            self.levels.insert(at, Level { share, ..Level::default() });
        }
        self.levels.get_mut(at)
    }

    /// Of one share.
    pub fn at(&self, share: u16) -> Level {
        let level = self.levels.iter().find(|level| level.share == share);
        level.copied().unwrap_or(Level { share, ..Level::default() })
    }

    /// Of all shares.
    pub fn candidate(&self) -> Tally {
        self.levels.iter().fold(Tally::default(), |mut sum, level| {
            sum.add(&level.candidate);
            sum
        })
    }

    /// Of all shares.
    pub fn stable(&self) -> Tally {
        self.levels.iter().fold(Tally::default(), |mut sum, level| {
            sum.add(&level.stable);
            sum
        })
    }

    /// Evidence that the candidate's events are more frequent than the stable version's.
    ///
    /// `by_requests` says whether a level's requests were not split one by one ([`Level`]).
    pub fn compared(&self, what: Event, by_requests: impl Fn(&Level) -> bool) -> Mixture {
        let mut mixture = Mixture::default();
        for level in &self.levels {
            let weight = level.tested_weight(by_requests(level));
            mixture.add(weight, level.candidate.get(what), level.stable.get(what));
        }
        mixture
    }

    /// Evidence that the candidate's events are more frequent than a fixed share of its requests.
    /// The same mixture: θ multiplies the odds of that share.
    pub fn exceeding(&self, what: Event, share: f64) -> Mixture {
        let tally = self.candidate();
        let mut mixture = Mixture::default();
        let events = tally.get(what).min(tally.requests);
        mixture.add(share, events, tally.requests - events);
        mixture
    }
}

/// What one arm did between two observations.
struct Difference {
    started: u64,
    requests: u64,
    failures: u64,
    non_finite: u64,
    latency: [u64; LATENCY_BUCKETS],
}

impl Difference {
    fn of(before: &ArmTotals, now: &ArmTotals) -> Self {
        let none = ArmTotals::default();
        let before = if before.instance == now.instance { before } else { &none };
        Self {
            // A request that ends while counters are read may be seen twice or not at all, so this
            // may be less than nothing for a moment.
            started: since(now.started(), before.started()),
            requests: since(now.requests(), before.requests()),
            failures: since(now.failures, before.failures),
            non_finite: since(now.non_finite, before.non_finite),
            latency: std::array::from_fn(|at| since(now.latency[at], before.latency[at])),
        }
    }

    fn tally(&self, thresholds: Thresholds) -> Tally {
        let beyond = |bound: Option<usize>| match bound {
            Some(at) => self.latency.iter().skip(at + 1).sum(),
            None => 0,
        };
        Tally {
            started: self.started,
            requests: self.requests,
            failures: self.failures,
            slow: beyond(thresholds.slow),
            over: beyond(thresholds.over),
            non_finite: self.non_finite,
        }
    }
}

fn since(now: u64, before: u64) -> u64 {
    now.saturating_sub(before)
}

fn add_buckets(total: &mut [u64; LATENCY_BUCKETS], more: &[u64; LATENCY_BUCKETS]) {
    for (total, more) in total.iter_mut().zip(more) {
        *total += more;
    }
}

fn quantiles(buckets: &[u64; LATENCY_BUCKETS]) -> Quantiles {
    let ms = |q| quantile_ns(buckets, q).unwrap_or(0.0) / 1e6;
    Quantiles {
        requests: buckets.iter().sum(),
        p50_ms: ms(0.5),
        p95_ms: ms(0.95),
        p99_ms: ms(0.99),
    }
}

/// A quantile in nanoseconds, evenly spread within its bucket; the last bound for what is beyond
/// it. `None` when nothing was counted.
pub fn quantile_ns(buckets: &[u64; LATENCY_BUCKETS], q: f64) -> Option<f64> {
    let all: u64 = buckets.iter().sum();
    let rank = q * all as f64;
    let mut below = 0_u64;
    for (at, count) in buckets.iter().enumerate().filter(|(_, count)| **count > 0) {
        let inside = (rank - below as f64) / *count as f64;
        if inside <= 1.0 {
            let from = at.checked_sub(1).map_or(0, |at| LATENCY_BOUNDS_NS[at]) as f64;
            let to = LATENCY_BOUNDS_NS.get(at).map_or(from, |bound| *bound as f64);
            return Some(from + (to - from) * inside.max(0.0));
        }
        below += count;
    }
    None
}

/// Place of the first bound of the latency histograms at or above a time; `None` beyond the last.
pub fn bound_at(ns: f64) -> Option<usize> {
    let at = LATENCY_BOUNDS_NS.partition_point(|bound| (*bound as f64) < ns);
    (at < LATENCY_BOUNDS_NS.len()).then_some(at)
}

/// Where the true share of a count lies, whenever one looks: both ends are wrong with a probability
/// of at most `alpha`, over all looks together.
///
/// The share `p` is left out when the beta-binomial mixture (a = b = ½) speaks against it with
/// 1/α: `B(½+k, ½+n−k) / B(½, ½) ≥ p^k (1−p)^(n−k) / α`.
pub fn share_bounds(count: Count, alpha: f64) -> (f64, f64) {
    let (k, n) = (count.events as f64, count.of as f64);
    if count.of == 0 {
        return (0.0, 1.0);
    }
    let mixed = ln_beta(0.5 + k, 0.5 + n - k) - ln_beta(0.5, 0.5);
    let against = |p: f64| {
        let hits = if k > 0.0 { k * p.ln() } else { 0.0 };
        let misses = if k < n { (n - k) * (-p).ln_1p() } else { 0.0 };
        mixed - hits - misses >= -alpha.ln()
    };
    let best = k / n;
    let low = if k > 0.0 { boundary(0.0, best, &against) } else { 0.0 };
    let high = if k < n { boundary(1.0, best, &against) } else { 1.0 };
    (low, high)
}

/// Between a share that is ruled out and one that is not.
fn boundary(mut out: f64, mut within: f64, against: &impl Fn(f64) -> bool) -> f64 {
    // As many halvings as a share has bits that matter.
    for _ in 0..60 {
        let middle = f64::midpoint(out, within);
        *(if against(middle) { &mut out } else { &mut within }) = middle;
    }
    // The outer side: bounds are rather too far than too near.
    out
}

fn ln_beta(a: f64, b: f64) -> f64 {
    ln_gamma(a) + ln_gamma(b) - ln_gamma(a + b)
}

/// Logarithm of the gamma function for positive arguments: Stirling's series, after stepping up to
/// where four terms give all digits.
fn ln_gamma(x: f64) -> f64 {
    let (mut x, mut steps) = (x, 1.0);
    while x < 15.0 {
        steps *= x;
        x += 1.0;
    }
    let inverse = 1.0 / (x * x);
    let series =
        (1.0 / 12.0 - inverse * (1.0 / 360.0 - inverse * (1.0 / 1260.0 - inverse / 1680.0))) / x;
    let half_ln_two_pi = 0.5 * (2.0 * std::f64::consts::PI).ln();
    (x - 0.5) * x.ln() - x + half_ln_two_pi + series - f64::ln(steps)
}

/// Probability that a chi-square of one degree of freedom is at least `x`.
fn chi_square_p(x: f64) -> f64 {
    erfc((x / 2.0).sqrt())
}

/// Complementary error function for arguments from 0: Chebyshev's approximation of Numerical
/// Recipes (6.2), within 1.2e-7 of the value.
fn erfc(z: f64) -> f64 {
    const COEFFICIENTS: [f64; 10] = [
        -1.265_512_23,
        1.000_023_68,
        0.374_091_96,
        0.096_784_18,
        -0.186_288_06,
        0.278_868_07,
        -1.135_203_98,
        1.488_515_87,
        -0.822_152_23,
        0.170_872_77,
    ];
    let t = 1.0 / (1.0 + 0.5 * z);
    let exponent = COEFFICIENTS.iter().rev().fold(0.0, |sum, next| sum * t + next);
    t * (-z * z + exponent).exp()
}

#[cfg(test)]
mod tests;
