//! What the outputs of two versions say: how far apart they are, and whether that is chance.
//!
//! Both versions' rows are counted in the same cells ([`crate::monitor::Compared`]). The evidence is the two-sample test of [`super::labels`] for any
//! number of cells: of the rows that came between two looks, *c₁(j)* of the candidate's and *c₀(j)* of
//! the stable version's in cell *j*, *n₁* and *n₀* together,
//!
//! ```text
//! E ·= Π_j p₁(j)^c₁(j) p₀(j)^c₀(j) / p(j)^(c₁(j)+c₀(j))      p = (n₁p₁ + n₀p₀) / (n₁ + n₀)
//! ```
//!
//! with p₁ and p₀ guessed from the rows before. Whatever one distribution both have, the factor's
//! expected value is at most 1.
//!
//! Evidence alone says that two versions differ, which a retrained one always does: what a guard goes
//! by is the [`Distance`] as well.
//!
//! Invariants:
//! - The order of rows matters, so the logarithm is kept, beside the counts.
//! - Rows in other cells, as after a restart, are no more of the same: everything begins anew.

use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::drift::scores::Shares;
use crate::monitor::{Compared, ComparedFeature};

/// Rows of each cell that the guess of the stable version's distribution begins with.
const PRIOR: f64 = 0.5;
/// Rows that the guess of the candidate's distribution begins with: they lie as the stable version's.
const SPREAD: f64 = 100.0;
/// Cells in which the version with fewer rows would have fewer than this are one cell of the distance.
const CELL_ROWS_MIN: f64 = 5.0;

/// Outputs that came since a rollout began.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OutputEvidence {
    pub features: Vec<OutputFeature>,
    /// Features of outputs that are not compared.
    #[schema(minimum = 0)]
    pub left_out: usize,
    /// Why nothing is compared.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
    #[serde(skip)]
    #[schema(ignore)]
    seen: Option<Arc<Compared>>,
}

/// One feature of an output.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct OutputFeature {
    pub feature: String,
    /// Rows in each cell; the last are those without a value.
    pub candidate: Vec<u64>,
    pub stable: Vec<u64>,
    /// Logarithm of the e-value.
    pub ln: f64,
}

/// How far apart two distributions are: the population stability index, less what it would be by
/// chance, with the band that it lies in.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Distance {
    pub score: f64,
    /// Three standard errors around it.
    pub low: f64,
    pub high: f64,
}

impl OutputEvidence {
    /// Takes what has come since the last look, if anybody counts.
    pub fn add(&mut self, now: Option<&Arc<Compared>>) {
        let Some(now) = now else { return };
        let before = self.seen.replace(Arc::clone(now));
        let before = before.filter(|before| before.epoch == now.epoch);
        self.problem.clone_from(&now.problem);
        self.left_out = now.left_out;
        if before.as_ref().is_none_or(|before| before.features.is_empty()) {
            self.features = now.features.iter().map(OutputFeature::new).collect();
        }
        for (at, (own, now)) in self.features.iter_mut().zip(&now.features).enumerate() {
            let before = before.as_ref().and_then(|before| before.features.get(at));
            own.add(before, now);
        }
    }

    /// Rows of the candidate and of the stable version.
    pub fn rows(&self) -> (u64, u64) {
        let rows = |of: fn(&OutputFeature) -> &Vec<u64>| {
            self.features.iter().map(|feature| of(feature).iter().sum()).max().unwrap_or(0)
        };
        (rows(|feature| &feature.candidate), rows(|feature| &feature.stable))
    }
}

impl OutputFeature {
    fn new(of: &ComparedFeature) -> Self {
        let nothing = vec![0; of.stable.len()];
        let feature = of.name.clone();
        Self { feature, candidate: nothing.clone(), stable: nothing, ln: 0.0 }
    }

    fn add(&mut self, before: Option<&ComparedFeature>, now: &ComparedFeature) {
        let candidate = since(&now.candidate, before.map(|before| &before.candidate));
        let stable = since(&now.stable, before.map(|before| &before.stable));
        self.ln += self.factor(&candidate, &stable);
        add(&mut self.candidate, &candidate);
        add(&mut self.stable, &stable);
    }

    /// Logarithm of what the rows of one look say.
    fn factor(&self, candidate: &[u64], stable: &[u64]) -> f64 {
        let (n1, n0) = (sum(candidate), sum(stable));
        if n1 == 0.0 || n0 == 0.0 {
            return 0.0;
        }
        let before = (sum(&self.candidate), sum(&self.stable));
        let cells = self.stable.len() as f64;
        let mut ln = 0.0;
        for (at, (c1, c0)) in candidate.iter().zip(stable).enumerate() {
            let had = |counts: &[u64]| counts.get(at).map_or(0.0, |count| *count as f64);
            let p0 = (had(&self.stable) + PRIOR) / (before.1 + PRIOR * cells);
            let p1 = (had(&self.candidate) + SPREAD * p0) / (before.0 + SPREAD);
            let p = (n1 * p1 + n0 * p0) / (n1 + n0);
            ln += *c1 as f64 * (p1 / p).ln() + *c0 as f64 * (p0 / p).ln();
        }
        ln
    }

    /// `None` without rows of both.
    pub fn distance(&self) -> Option<Distance> {
        let (n, m) = (sum(&self.stable), sum(&self.candidate));
        // Rare cells together: alone they would be chance and nothing else.
        let least = n.min(m) / (n + m);
        let (mut rest, mut cells) = ((0, 0), Vec::new());
        for (a, b) in self.stable.iter().copied().zip(self.candidate.iter().copied()) {
            if (a + b) as f64 * least < CELL_ROWS_MIN {
                rest = (rest.0 + a, rest.1 + b);
            } else {
                cells.push((a, b));
            }
        }
        if rest != (0, 0) {
            cells.push(rest);
        }
        let spread = spread(&cells, n, m);
        let shares = Shares::new(cells)?;
        let by_chance = (1.0 / n + 1.0 / m) * (shares.cells() as f64 - 1.0);
        let score = shares.psi() - by_chance;
        Some(Distance { score, low: score - 3.0 * spread, high: score + 3.0 * spread })
    }
}

/// Standard error of the index, by the delta method.
fn spread(cells: &[(u64, u64)], n: f64, m: f64) -> f64 {
    let (mut of_p, mut of_q) = (Moments::default(), Moments::default());
    for (a, b) in cells {
        // Half a row more, so that none is empty.
        let (p, q) = ((*a as f64 + 0.5) / n, (*b as f64 + 0.5) / m);
        of_p.add(p, (p / q).ln() + 1.0 - q / p);
        of_q.add(q, (q / p).ln() + 1.0 - p / q);
    }
    (of_p.variance() / n + of_q.variance() / m).sqrt()
}

/// Of a value that each cell has, weighted by its share.
#[derive(Default)]
struct Moments {
    weight: f64,
    first: f64,
    second: f64,
}

impl Moments {
    fn add(&mut self, weight: f64, value: f64) {
        self.weight += weight;
        self.first += weight * value;
        self.second += weight * value * value;
    }

    fn variance(&self) -> f64 {
        let mean = self.first / self.weight;
        (self.second / self.weight - mean * mean).max(0.0)
    }
}

fn sum(counts: &[u64]) -> f64 {
    counts.iter().sum::<u64>() as f64
}

fn since(now: &[u64], before: Option<&Vec<u64>>) -> Vec<u64> {
    let had = |at: usize| before.and_then(|before| before.get(at)).copied().unwrap_or(0);
    now.iter().enumerate().map(|(at, now)| now.saturating_sub(had(at))).collect()
}

fn add(total: &mut [u64], more: &[u64]) {
    for (have, more) in total.iter_mut().zip(more) {
        *have = have.saturating_add(*more);
    }
}

#[cfg(test)]
mod tests;
