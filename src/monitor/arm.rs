//! One arm of one version: its counters, its latest values, its evidence.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::latest::Latest;
use super::means::{self, has_mean};
use super::report::{
    ArmReport, Counted, FeatureReport, NewCategories, NewCategory, Odd, Oddities, WindowReport,
};
use super::slots::{Slots, Turned, Window};
use crate::drift::counters::{Counters, Score, Scores, number_name};
use crate::drift::feature::{Part, Value};
use crate::drift::frequent::{Frequent, Kept};
use crate::drift::grid::ROWS_MAX;
use crate::drift::outliers::Oddity;
use crate::drift::profile::{FeatureProfile, Profile};
use crate::drift::quality::COUNTED;
use crate::drift::sequential::{self, Means};
use crate::drift::tally::category;
use crate::drift::verdict::{State, Verdict, judge};

/// A version alarms by chance with this probability at most, however long it is watched; one of its
/// means moves by chance with no more.
const ALPHA: f64 = 0.05;
/// Processes of evidence that begin anew: by the day and by the hour.
const DAILY: usize = 0;
const HOURLY: usize = 1;

/// All that is kept of an arm; what survives a restart.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct ArmState {
    slots: Slots,
    /// Of features that are counted in cells.
    evidence: Vec<Option<sequential::Monitor>>,
    /// Rows in the cells of the open slot that the evidence has already.
    fed: Vec<Vec<u64>>,
    /// Of features that have a mean; and what it has of the open slot: how many values, and their sum.
    means: Vec<Option<Means>>,
    fed_means: Vec<(u64, f64)>,
    /// Categories of each feature that the reference lacks.
    strange: Vec<Frequent>,
    total: Counted,
    /// The same since this process has it: what a counter of the metrics page must not lose.
    #[serde(skip)]
    own: Counted,
    /// Begins anew with a restart.
    #[serde(skip)]
    latest: Latest,
}

/// Counters for one row after the other of one call.
pub(super) struct Counting<'a> {
    profile: &'a Profile,
    state: &'a mut ArmState,
    /// Whether each row of the call has been odd.
    odd: &'a mut Vec<bool>,
    /// Whether values of each feature may be seen.
    told: &'a [bool],
}

impl ArmState {
    pub(super) fn new(profile: &Profile, now: i64, window_values: usize) -> Self {
        let evidence = profile.features.iter().map(|feature| {
            let own = feature.cells(&feature.own());
            (!own.is_empty()).then(|| sequential::Monitor::new(&own, 2))
        });
        Self {
            slots: Slots::new(now, empty(profile)),
            evidence: evidence.collect(),
            fed: vec![Vec::new(); profile.features.len()],
            means: profile.features.iter().map(|of| has_mean(of).then(|| Means::new(2))).collect(),
            fed_means: vec![(0, 0.0); profile.features.len()],
            strange: vec![Frequent::default(); profile.features.len()],
            total: Counted::default(),
            own: Counted::default(),
            latest: Latest::new(profile, window_values),
        }
    }

    /// After a restart.
    pub(super) fn begin_latest(&mut self, profile: &Profile, window_values: usize) {
        self.latest = Latest::new(profile, window_values);
    }

    /// Whether it is of this profile. For what comes from a file.
    pub(super) fn fits(&self, profile: &Profile) -> bool {
        let count = profile.features.len();
        let cells = |counters: &[Counters]| {
            counters.len() == count
                && profile.features.iter().zip(counters).all(|(feature, own)| feature.fits(own))
        };
        let fresh = Self::new(profile, 0, 1);
        self.evidence.len() == count
            && self.fed.len() == count
            && self.strange.len() == count
            && self.strange.iter().all(Frequent::fits)
            && self.fed.iter().flatten().all(|rows| *rows <= ROWS_MAX)
            && self.total.fits()
            && alike(&self.evidence, &fresh.evidence, sequential::Monitor::like)
            && alike(&self.means, &fresh.means, Means::like)
            && self.fed_means.len() == count
            && self.fed_means.iter().all(|(rows, sum)| *rows <= ROWS_MAX && sum.is_finite())
            && self.slots.fits(cells)
    }

    pub(super) fn counting<'a>(
        &'a mut self,
        profile: &'a Profile,
        rows: usize,
        odd: &'a mut Vec<bool>,
        told: &'a [bool],
    ) -> Counting<'a> {
        odd.clear();
        odd.resize(rows, false);
        Counting { profile, state: self, odd, told }
    }

    /// Forgets values of features that are not to be seen.
    pub(super) fn hide(&mut self, told: &[bool]) {
        for (strange, told) in self.strange.iter_mut().zip(told) {
            if !told {
                *strange = Frequent::default();
            }
        }
    }

    /// Ends slots that have ended; whether any has.
    pub(super) fn turn(&mut self, profile: &Profile, now: i64) -> bool {
        if !self.slots.is_due(now) {
            // Nothing but a clock that went back.
            self.slots.turn(now, || empty(profile));
            return false;
        }
        // The evidence must have had all of a slot before it goes.
        self.feed(profile);
        let turned = self.slots.turn(now, || empty(profile));
        if turned != Turned::Nothing {
            self.fed.iter_mut().for_each(Vec::clear);
            self.fed_means.fill((0, 0.0));
        }
        let ended: &[usize] = match turned {
            Turned::Day => &[DAILY, HOURLY],
            Turned::Hour => &[HOURLY],
            Turned::Slot | Turned::Nothing => &[],
        };
        for process in ended {
            self.evidence.iter_mut().flatten().for_each(|own| own.restart(*process));
            self.means.iter_mut().flatten().for_each(|own| own.restart(*process));
        }
        turned != Turned::Nothing
    }

    /// Gives the evidence what came since it was given the last.
    fn feed(&mut self, profile: &Profile) {
        let counters = &self.slots.open.counters;
        let features = profile.features.iter().zip(counters);
        for ((feature, counters), (evidence, fed)) in
            features.zip(self.evidence.iter_mut().zip(&mut self.fed))
        {
            let Some(evidence) = evidence else { continue };
            let cells = feature.cells(counters);
            let before = |at: usize| fed.get(at).copied().unwrap_or(0);
            let new: Vec<u64> =
                cells.iter().enumerate().map(|(at, now)| now.saturating_sub(before(at))).collect();
            evidence.add(&new);
            *fed = cells;
        }
        for ((counters, means), fed) in
            counters.iter().zip(&mut self.means).zip(&mut self.fed_means)
        {
            if let (Counters::Num(cells), Some(means)) = (counters, means) {
                let now = (cells.len(), cells.mean * cells.len() as f64);
                means.add(now.0.saturating_sub(fed.0), now.1 - fed.1);
                *fed = now;
            }
        }
    }

    fn keep_strange(&mut self, feature: usize, value: Value<'_>) {
        let now = self.slots.open.from;
        let Some(strange) = self.strange.get_mut(feature) else { return };
        match value {
            Value::Text(bytes) => strange.add(&category(bytes), now),
            Value::Number(number) => strange.add(&number_name(number), now),
            Value::Vector(_) | Value::Missing => {}
        }
    }

    /// Whether no row came for a day.
    pub(super) fn is_idle(&self) -> bool {
        self.slots.is_empty()
    }

    pub(super) fn report(&mut self, arm: &str, profile: &Profile) -> ArmReport {
        self.feed(profile);
        let mut windows = vec![
            self.window("hour", Window::Hour, profile),
            self.window("day", Window::Day, profile),
        ];
        windows.extend(self.latest(profile));
        let new_categories = self.new_categories(profile);
        let dropped = |of: &FeatureProfile, report: &FeatureReport| {
            of.feature.part == Part::Confidence
                && report.mean.is_some_and(|mean| mean.state == means::DOWN)
        };
        // The first window is the hour, which has the means.
        let hour = windows.first().map_or(&[][..], |hour: &WindowReport| &hour.features);
        let drops = profile.features.iter().zip(hour).filter(|(of, report)| dropped(of, report));
        let confidence_drop = drops.map(|(of, _)| of.feature.tensor.clone()).collect();
        let (total, own) = (self.total, self.own);
        ArmReport { arm: arm.to_owned(), total, own, windows, confidence_drop, new_categories }
    }

    fn new_categories(&self, profile: &Profile) -> Vec<NewCategories> {
        let features = profile.features.iter().zip(&self.strange);
        let some = features.filter(|(_, strange)| !strange.is_empty());
        let told = |kept: &Kept| NewCategory {
            value: kept.text.clone(),
            count: kept.count,
            over_count: kept.over_count,
            last_seen: jiff::Timestamp::from_second(kept.last_at).ok().map(|at| at.to_string()),
        };
        some.map(|(of, strange)| NewCategories {
            feature: of.feature.name.clone(),
            role: of.feature.role,
            tensor: of.feature.tensor.clone(),
            values: strange.ordered().into_iter().map(told).collect(),
        })
        .collect()
    }

    fn window(&self, name: &'static str, window: Window, profile: &Profile) -> WindowReport {
        let sum = self.slots.sum(window);
        let scores: Vec<Scores> = profile
            .features
            .iter()
            .zip(&sum.counters)
            .map(|(feature, counters)| feature.score(counters))
            .collect();
        let judged = profile.features.iter().zip(&sum.counters).zip(&scores);
        let verdicts =
            judge(judged.map(|((feature, counters), scores)| (feature, counters, scores)));
        let watched = self.evidence.iter().flatten().count().max(1);
        let alpha_of_mean = ALPHA / self.means.iter().flatten().count().max(1) as f64;
        let mut features = Vec::with_capacity(verdicts.len());
        for (at, (verdict, scores)) in verdicts.into_iter().zip(&scores).enumerate() {
            let (of, counters) = (&profile.features[at], &sum.counters[at]);
            let evidence = self.evidence.get(at).and_then(Option::as_ref);
            let ln = evidence.filter(|_| window == Window::Hour).map(|own| own.ln_evidence());
            let mut report = feature_report(&of.feature, counters.rows(), verdict, scores);
            report.alarm = ln.is_some_and(|ln| ln >= (watched as f64 / ALPHA).ln());
            report.ln_evidence = ln.filter(|ln| ln.is_finite());
            report.odd = odd(of, counters);
            report.constant = of.is_constant(counters);
            let means = self.means.get(at).and_then(Option::as_ref);
            let means = means.filter(|_| window == Window::Hour);
            report.mean = means.and_then(|own| means::report(of, own, alpha_of_mean));
            features.push(report);
        }
        finish(name, Some(sum.from), features)
    }

    /// What Evidently and scipy would say of the latest values.
    fn latest(&self, profile: &Profile) -> Option<WindowReport> {
        let mut features = Vec::new();
        for (at, of) in profile.features.iter().enumerate() {
            let Some((rows, scores)) = self.latest.scores(at, of) else { continue };
            let enough = rows >= crate::drift::evidence::ROWS_MIN;
            // For people: alerts are made of the other windows.
            let state = if enough { State::Steady } else { State::InsufficientData };
            let verdict = Verdict { state, beyond: Vec::new(), p: f64::NAN };
            features.push(feature_report(&of.feature, rows, verdict, &scores));
        }
        (!features.is_empty()).then(|| finish("latest", None, features))
    }
}

impl Counting<'_> {
    pub(super) fn add(&mut self, row: usize, feature: usize, value: Value<'_>) {
        let Some(of) = self.profile.features.get(feature) else { return };
        if let Some(counters) = self.state.slots.open.counters.get_mut(feature) {
            of.add(counters, value);
        }
        self.state.latest.add(feature, of, value);
        let odd = of.oddity(value);
        if odd == Some(Oddity::UnseenCategory) && self.told.get(feature) == Some(&true) {
            self.state.keep_strange(feature, value);
        }
        let mut own = Oddities::default();
        if own.count(odd, value)
            && let Some(row) = self.odd.get_mut(row)
        {
            *row = true;
        }
        self.state.own.quality.add(&own);
        self.state.total.quality.add(&own);
    }

    /// All features of the call have been added.
    pub(super) fn end(self) {
        let outliers = self.odd.iter().filter(|odd| **odd).count() as u64;
        for counted in [&mut self.state.own, &mut self.state.total] {
            counted.rows += self.odd.len() as u64;
            counted.outlier_rows += outliers;
        }
    }
}

/// Whether each of a list is like that of another, where there is one.
fn alike<T>(have: &[Option<T>], want: &[Option<T>], like: impl Fn(&T, &T) -> bool) -> bool {
    let both = |(have, want): (&Option<T>, &Option<T>)| match (have, want) {
        (Some(have), Some(want)) => like(have, want),
        (have, want) => have.is_none() && want.is_none(),
    };
    have.len() == want.len() && have.iter().zip(want).all(both)
}

fn empty(profile: &Profile) -> Vec<Counters> {
    profile.features.iter().map(|feature| feature.counters()).collect()
}

fn feature_report(
    feature: &crate::drift::feature::Feature,
    rows: u64,
    verdict: Verdict,
    scores: &Scores,
) -> FeatureReport {
    FeatureReport {
        feature: feature.name.clone(),
        role: feature.role,
        tensor: feature.tensor.clone(),
        rows,
        state: verdict.state,
        scores: scores.iter().copied().collect::<BTreeMap<Score, f64>>(),
        beyond: verdict.beyond.iter().map(|beyond| (beyond.score, beyond.limit)).collect(),
        p_value: Some(verdict.p).filter(|p| p.is_finite()),
        ln_evidence: None,
        alarm: false,
        mean: None,
        constant: false,
        odd: BTreeMap::new(),
    }
}

fn finish(name: &'static str, since: Option<i64>, features: Vec<FeatureReport>) -> WindowReport {
    let drifted = features.iter().filter(|feature| feature.state == State::Drifted).count();
    let enough = features.iter().any(|feature| feature.state != State::InsufficientData);
    let state = match (drifted, enough) {
        (0, false) => State::InsufficientData,
        (0, true) => State::Steady,
        _ => State::Drifted,
    };
    let since = since.and_then(|at| jiff::Timestamp::from_second(at).ok());
    let rows = features.iter().map(|feature| feature.rows).max().unwrap_or(0);
    WindowReport {
        window: name,
        since: since.map(|at| at.to_string()),
        rows,
        state,
        drifted,
        features,
    }
}

/// Rows that something is wrong with, beside those of the reference.
fn odd(of: &FeatureProfile, counters: &Counters) -> BTreeMap<&'static str, Odd> {
    let now = of.counted(counters);
    if now.iter().all(|rows| *rows == 0) {
        return BTreeMap::new();
    }
    let own = of.own();
    let (before, all) = (of.counted(&own), own.rows().max(1) as f64);
    let pairs = COUNTED.into_iter().zip(now.into_iter().zip(before));
    let pairs = pairs.filter(|(_, (rows, _))| *rows > 0);
    pairs.map(|(kind, (rows, own))| (kind, Odd { rows, reference: own as f64 / all })).collect()
}

#[cfg(test)]
impl ArmState {
    /// As after a day and an hour with these counters in each slot.
    pub(super) fn full(profile: &Profile, counters: &[Counters], window_values: usize) -> Self {
        let mut state = Self::new(profile, 0, window_values);
        let hours = (1..=25).map(|hour| hour * 3600);
        let slots = (1..=12).map(|slot| 25 * 3600 + slot * super::slots::SLOT_S);
        for until in hours.chain(slots) {
            state.slots.open.counters = counters.to_vec();
            state.turn(profile, until);
        }
        state.slots.open.counters = counters.to_vec();
        state
    }
}
