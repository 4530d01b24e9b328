//! Tests that may be looked at after every row, for as long as one likes.
//!
//! A [`Monitor`] watches counts in cells; its reference is a sample, not the truth. A process that
//! started long ago reacts slowly, so some run side by side, from the deployment, the day and the
//! hour; their weighted mean is evidence of the same kind. [`mean_band`] is for a mean.
//!
//! Invariants:
//! - With data like the reference's, the evidence reaches `1 / alpha` with probability `alpha` at most,
//!   over all looks together. That is so on the average over reference samples (exchangeability); the
//!   simulation in `tests` holds it to that.
//! - No clock: who has one calls [`Monitor::restart`].

use serde::{Deserialize, Serialize};
use statrs::function::gamma::ln_gamma;

/// Prior rows of each cell.
const PRIOR: f64 = 0.5;
/// Rows that the alternative's prior weighs: it lies around the reference, this loosely.
const SPREAD: f64 = 100.0;

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
    /// Its part of the mean, over all of its starts; all processes together 1.
    weight: f64,
    /// How often it has started; 0 for the one that never starts again.
    runs: u64,
    counts: Vec<u64>,
}

impl Start {
    /// Its present start's part: 1/2, 1/6, 1/12 and so on of the process's, which sum to all of it.
    /// What an earlier start has found is given up.
    fn ln_weight(&self) -> f64 {
        let runs = self.runs as f64;
        let part = if self.runs == 0 { 1.0 } else { 1.0 / (runs * (runs + 1.0)) };
        (self.weight * part).ln()
    }
}

impl Monitor {
    /// `reference` are counts of the reference's rows in the cells. The process that runs from now on
    /// for ever has half of the weight, `restarting` others share the rest.
    pub fn new(reference: &[u64], restarting: usize) -> Self {
        let start = |process: usize| Start {
            weight: match (process, restarting) {
                (0, 0) => 1.0,
                (0, _) => 0.5,
                _ => 0.5 / restarting as f64,
            },
            runs: u64::from(process > 0),
            counts: vec![0; reference.len()],
        };
        Self {
            reference: reference.iter().map(|count| *count as f64 + PRIOR).collect(),
            starts: (0..=restarting).map(start).collect(),
        }
    }

    /// Whether it watches the same reference, in the same way. For what comes from a file.
    pub fn like(&self, other: &Self) -> bool {
        let shape = |of: &Self| -> Vec<usize> {
            of.starts.iter().map(|start| start.counts.len()).collect()
        };
        let weights = self.starts.iter().zip(&other.starts).all(|(a, b)| a.weight == b.weight);
        self.reference == other.reference && shape(self) == shape(other) && weights
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
            start.runs = start.runs.saturating_add(1);
        }
    }

    /// Logarithm of the evidence now: of the weighted mean of the processes'. Alarm when it is
    /// `ln(1 / alpha)` or more.
    pub fn ln_evidence(&self) -> f64 {
        let parts: Vec<f64> =
            self.starts.iter().map(|start| start.ln_weight() + self.ln_of(&start.counts)).collect();
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

/// Half the width of the band around the reference's mean that the mean of `n` values never leaves,
/// with probability `1 - alpha`, when nothing has changed: a normal mixture that is narrowest near
/// `expected` values. `std` is the reference's; infinite without values.
pub fn mean_band(std: f64, n: u64, expected: u64, alpha: f64) -> f64 {
    if n == 0 {
        return f64::INFINITY;
    }
    let n = n as f64;
    let ln = (1.0 / alpha).ln();
    // The mixture's variance, as Waudby-Smith and others choose it for a time of interest.
    let rho2 = (2.0 * ln + (2.0 * ln + 1.0).ln()) / (expected.max(1) as f64);
    let grown = n * rho2 + 1.0;
    std * (2.0 * grown / (n * n * rho2) * (grown.sqrt() / alpha).ln()).sqrt()
}

#[cfg(test)]
mod tests;
