//! Tests that may be looked at after every row, for as long as one likes.
//!
//! A [`Monitor`] watches counts in cells, [`Means`] a mean; the reference of both is a sample, not the
//! truth. A process that started long ago reacts slowly, so some run side by side, from the deployment,
//! the day and the hour, each with a [`Share`] of what may be spent on false alarms.
//!
//! Invariants:
//! - With data like the reference's, the evidence reaches `1 / alpha` with probability `alpha` at most,
//!   over all looks together, and a mean leaves its band with no more. That is so on the average over
//!   reference samples (exchangeability); the simulation in `tests` holds it to that.
//! - No clock: who has one calls [`Monitor::restart`] and [`Means::restart`].

use serde::{Deserialize, Serialize};
use statrs::function::gamma::ln_gamma;

use super::grid::ROWS_MAX;

/// Prior rows of each cell.
const PRIOR: f64 = 0.5;
/// Rows that the alternative's prior weighs: it lies around the reference, this loosely.
const SPREAD: f64 = 100.0;

/// A process's part of what may be spent: of the weighted mean of evidence, or of `alpha`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
struct Share {
    /// Over all of its starts; all processes together 1.
    weight: f64,
    /// How often it has started; 0 for the one that never starts again.
    runs: u64,
}

impl Share {
    /// The process that runs from now on for ever has half, `restarting` others share the rest.
    fn all(restarting: usize) -> impl Iterator<Item = Self> {
        (0..=restarting).map(move |process| Self {
            weight: match (process, restarting) {
                (0, 0) => 1.0,
                (0, _) => 0.5,
                _ => 0.5 / restarting as f64,
            },
            runs: u64::from(process > 0),
        })
    }

    /// The present start's: 1/2, 1/6, 1/12 and so on of the process's, which sum to all of it. What an
    /// earlier start has found is given up.
    fn part(&self) -> f64 {
        let runs = self.runs as f64;
        self.weight * if self.runs == 0 { 1.0 } else { 1.0 / (runs * (runs + 1.0)) }
    }

    fn restart(&mut self) {
        self.runs = self.runs.saturating_add(1);
    }
}

/// How much a count of cells speaks for another distribution than the reference's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Monitor {
    /// Reference rows in each cell, with the prior's.
    reference: Vec<f64>,
    starts: Vec<Start>,
}

/// One of the processes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Start {
    share: Share,
    counts: Vec<u64>,
}

impl Monitor {
    /// `reference` are counts of the reference's rows in the cells. The process that runs from now on
    /// for ever has half of the weight, `restarting` others share the rest.
    pub fn new(reference: &[u64], restarting: usize) -> Self {
        let start = |share| Start { share, counts: vec![0; reference.len()] };
        Self {
            reference: reference.iter().map(|count| *count as f64 + PRIOR).collect(),
            starts: Share::all(restarting).map(start).collect(),
        }
    }

    /// Whether it watches the same reference, in the same way. For what comes from a file.
    pub fn like(&self, other: &Self) -> bool {
        let shape = |of: &Self| -> Vec<usize> {
            of.starts.iter().map(|start| start.counts.len()).collect()
        };
        let same = |(a, b): (&Start, &Start)| a.share.weight == b.share.weight;
        let weights = self.starts.iter().zip(&other.starts).all(same);
        let sum =
            |counts: &Vec<u64>| counts.iter().try_fold(0_u64, |sum, count| sum.checked_add(*count));
        let few = |start: &Start| sum(&start.counts).is_some_and(|rows| rows <= ROWS_MAX);
        self.reference == other.reference
            && shape(self) == shape(other)
            && weights
            && self.starts.iter().all(few)
    }

    /// Adds rows that came since the last look, as counts in the cells; what is longer than the
    /// reference is left out.
    pub fn add(&mut self, counts: &[u64]) {
        for start in &mut self.starts {
            for (have, more) in start.counts.iter_mut().zip(counts) {
                *have = have.saturating_add(*more);
            }
        }
    }

    /// Starts the restarting process of this number (from 0) again: at the hour, at the day.
    pub fn restart(&mut self, process: usize) {
        if let Some(start) = self.starts.get_mut(process.saturating_add(1)) {
            start.counts.fill(0);
            start.share.restart();
        }
    }

    /// Logarithm of the evidence now: of the weighted mean of the processes'. Alarm when it is
    /// `ln(1 / alpha)` or more.
    pub fn ln_evidence(&self) -> f64 {
        let ln = |start: &Start| start.share.part().ln() + self.ln_of(&start.counts);
        let parts: Vec<f64> = self.starts.iter().map(ln).collect();
        let largest = parts.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if largest == f64::NEG_INFINITY {
            return largest;
        }
        largest + parts.iter().map(|part| (part - largest).exp()).sum::<f64>().ln()
    }

    /// Rows of the process that has run the longest.
    pub fn rows(&self) -> u64 {
        self.starts.iter().map(|start| start.counts.iter().sum()).max().unwrap_or(0)
    }

    /// The counts' likelihood around a distribution that is free, over that of the reference's own.
    fn ln_of(&self, counts: &[u64]) -> f64 {
        let total: f64 = self.reference.iter().sum();
        let mut ln = 0.0;
        let rows: u64 = counts.iter().sum();
        ln += ratio(SPREAD, rows) - ratio(total, rows);
        for (count, own) in counts.iter().zip(&self.reference) {
            ln -= ratio(SPREAD * own / total, *count) - ratio(*own, *count);
        }
        ln
    }
}

/// `lnΓ(a) - lnΓ(a + count)`
fn ratio(a: f64, count: u64) -> f64 {
    if count == 0 { 0.0 } else { ln_gamma(a) - ln_gamma(a + count as f64) }
}

/// What a mean is held against.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Band {
    /// The reference's standard deviation.
    pub std: f64,
    /// Values that the reference's mean is of; `None`: it is the truth.
    pub reference: Option<u64>,
    /// The band is narrowest near so many values.
    pub expected: u64,
}

impl Band {
    /// Half the width of the band around the reference's mean that the mean of `n` values never leaves,
    /// with probability `1 - alpha`, when nothing has changed: a normal mixture. Infinite without values.
    /// With a reference of `m` values the mean is compared under two distributions of
    /// the true one around the reference's, both normal: with variance `1/m`, as it is when nothing has
    /// changed, and with `1/m + rho²`; their ratio is `1 / alpha` at the band. It has a width that it
    /// never goes below, however many values come.
    pub fn half_width(&self, n: u64, alpha: f64) -> f64 {
        if n == 0 {
            return f64::INFINITY;
        }
        let ln = (1.0 / alpha).ln();
        // The mixture's variance, as Waudby-Smith and others choose it for a time of interest.
        let rho2 = (2.0 * ln + (2.0 * ln + 1.0).ln()) / (self.expected.max(1) as f64);
        let own = self.reference.map_or(0.0, |m| 1.0 / m.max(1) as f64);
        let narrow = 1.0 / n as f64 + own;
        let wide = narrow + rho2;
        let apart = 1.0 / narrow - 1.0 / wide;
        self.std * (2.0 / apart * ((wide / narrow).sqrt() / alpha).ln()).sqrt()
    }
}

/// The mean of one feature, since the deployment, the day and the hour.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Means(Vec<MeanStart>);

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct MeanStart {
    share: Share,
    count: u64,
    sum: f64,
}

/// The mean of one process, and its band.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MeanFound {
    pub count: u64,
    pub mean: f64,
    /// Half the width of its band, with its share of `alpha`.
    pub band: f64,
}

impl Means {
    /// Processes as those of [`Monitor::new`].
    pub fn new(restarting: usize) -> Self {
        Self(Share::all(restarting).map(|share| MeanStart { share, count: 0, sum: 0.0 }).collect())
    }

    /// Adds values that came since the last look.
    pub fn add(&mut self, count: u64, sum: f64) {
        for start in &mut self.0 {
            start.count = start.count.saturating_add(count);
            start.sum += sum;
        }
    }

    /// As [`Monitor::restart`].
    pub fn restart(&mut self, process: usize) {
        if let Some(start) = self.0.get_mut(process.saturating_add(1)) {
            (start.count, start.sum) = (0, 0.0);
            start.share.restart();
        }
    }

    /// What each process has found, with its share of `alpha`: that any of them leaves its band has
    /// probability `alpha` at most. None of a process without values.
    pub fn found(&self, band: &Band, alpha: f64) -> Vec<MeanFound> {
        let some = self.0.iter().filter(|start| start.count > 0);
        some.map(|start| MeanFound {
            count: start.count,
            mean: start.sum / start.count as f64,
            band: band.half_width(start.count, alpha * start.share.part()),
        })
        .collect()
    }

    /// Whether it is watched in the same way, and its numbers are some. For what comes from a file.
    pub fn like(&self, other: &Self) -> bool {
        let same = |(a, b): (&MeanStart, &MeanStart)| a.share.weight == b.share.weight;
        self.0.len() == other.0.len()
            && self.0.iter().zip(&other.0).all(same)
            && self.0.iter().all(|start| start.sum.is_finite() && start.count <= ROWS_MAX)
    }
}

#[cfg(test)]
mod tests;
