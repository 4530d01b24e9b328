//! What Evidently 0.7.23 would say of a column: its bins, its choice of a test, its verdict.

use serde::{Deserialize, Serialize};

use super::{Sample, Shares, Sides, ks_distance, ks_p_value, wasserstein};

/// References with more rows are judged by distances, not by p-values.
const ROWS_SMALL_MAX: u64 = 1000;
/// A numeric column with no more distinct values is taken for categories when a test is chosen.
const DISTINCT_FEW_MAX: usize = 5;
/// A numeric reference with no more distinct values has a bin for each value.
const DISTINCT_BINNED_MAX: usize = 20;
/// A normed Wasserstein distance is divided by no less.
const STD_MIN: f64 = 0.001;
/// Share of drifted columns from which a data set counts as drifted.
pub const DATASET_SHARE: f64 = 0.5;

/// A test of Evidently's, by its name there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ColumnTest {
    /// p-value of Kolmogorov-Smirnov.
    Ks,
    /// p-value of Pearson's chi-square.
    Chisquare,
    /// p-value of the two-proportion z-test.
    Z,
    /// Wasserstein distance over the reference's standard deviation.
    Wasserstein,
    Jensenshannon,
    Psi,
    KlDiv,
    Hellinger,
}

/// A column's score and what follows from it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct ColumnVerdict {
    pub test: ColumnTest,
    pub value: f64,
    pub threshold: f64,
    pub drifted: bool,
}

impl ColumnTest {
    /// What Evidently takes for a column when nobody says otherwise; by the rows of the reference and
    /// the distinct values of both sides.
    pub fn default_for(sides: &Sides<'_>) -> Self {
        let distinct = sides.by_value().len();
        let numbers = matches!(sides, Sides::Numbers { .. });
        let many = numbers && distinct > DISTINCT_FEW_MAX;
        match (sides.rows().0 <= ROWS_SMALL_MAX, many) {
            (true, true) => Self::Ks,
            (true, false) if distinct > 2 => Self::Chisquare,
            (true, false) => Self::Z,
            (false, true) => Self::Wasserstein,
            (false, false) => Self::Jensenshannon,
        }
    }

    fn threshold(self) -> f64 {
        if self.is_p_value() { 0.05 } else { 0.1 }
    }

    fn is_p_value(self) -> bool {
        matches!(self, Self::Ks | Self::Chisquare | Self::Z)
    }

    fn drifted(self, value: f64) -> bool {
        match self {
            Self::Ks => value <= self.threshold(),
            Self::Chisquare | Self::Z => value < self.threshold(),
            _ => value >= self.threshold(),
        }
    }

    /// The test's value. `None` when a side is empty, or the test is one of numbers and the column is
    /// none.
    pub fn value(self, sides: &Sides<'_>) -> Option<f64> {
        let (n, m) = sides.rows();
        if n == 0 || m == 0 {
            return None;
        }
        match (self, sides) {
            (Self::Ks, Sides::Numbers { reference, current }) => {
                let distance = ks_distance(reference.sorted(), current.sorted());
                Some(ks_p_value(distance, reference.len(), current.len()))
            }
            (Self::Wasserstein, Sides::Numbers { reference, current }) => {
                let distance = wasserstein(reference.sorted(), current.sorted());
                Some(distance / reference.std().max(STD_MIN))
            }
            (Self::Ks | Self::Wasserstein, Sides::Categories { .. }) => None,
            (Self::Chisquare, _) => Some(Shares::new(sides.by_value())?.chi_square_p()),
            (Self::Z, _) => Some(Shares::new(sides.by_value())?.z_p()),
            (Self::Jensenshannon, _) => Some(binned(sides)?.jensen_shannon()),
            (Self::Psi, _) => Some(binned(sides)?.psi()),
            (Self::KlDiv, _) => Some(binned(sides)?.kl()),
            (Self::Hellinger, Sides::Numbers { reference, current }) => {
                Some(over_distinct(reference, current)?.hellinger())
            }
            (Self::Hellinger, _) => Some(Shares::new(sides.by_value())?.hellinger()),
        }
    }
}

/// Evidently's verdict on a column by the test that it takes by itself; `None` when a side is empty.
pub fn column_test(sides: &Sides<'_>) -> Option<ColumnVerdict> {
    let test = ColumnTest::default_for(sides);
    let value = test.value(sides)?;
    Some(ColumnVerdict { test, value, threshold: test.threshold(), drifted: test.drifted(value) })
}

/// Whether a data set with so many drifted columns of `columns` has drifted.
pub fn dataset_drifts(drifted: usize, columns: usize) -> bool {
    columns > 0 && drifted as f64 / columns as f64 >= DATASET_SHARE
}

/// The bins of PSI, KL and Jensen-Shannon.
fn binned(sides: &Sides<'_>) -> Option<Shares> {
    match sides {
        Sides::Numbers { reference, current } if reference.distinct() > DISTINCT_BINNED_MAX => {
            let range = range(reference, current)?;
            let size = reference.len() + current.len();
            let edges = sturges(range, size, reference.integers && current.integers);
            Shares::new(histogram(reference, current, &edges))
        }
        _ => Shares::new(sides.by_value()),
    }
}

/// The bins of Hellinger's distance: of the distinct values, not of the samples.
fn over_distinct(reference: &Sample, current: &Sample) -> Option<Shares> {
    let sides = Sides::Numbers { reference, current };
    let size = sides.by_value().len();
    let integers = reference.integers && current.integers;
    let edges = sturges(range(reference, current)?, size, integers);
    Shares::new(histogram(reference, current, &edges))
}

fn range(a: &Sample, b: &Sample) -> Option<(f64, f64)> {
    let (a, b) = (a.sorted(), b.sorted());
    Some((a.first()?.min(*b.first()?), a.last()?.max(*b.last()?)))
}

/// Edges of equal bins by the rule of Sturges, as `numpy.histogram_bin_edges` makes them.
pub(super) fn sturges((low, high): (f64, f64), size: usize, integers: bool) -> Vec<f64> {
    if low == high {
        return vec![low - 0.5, high + 0.5];
    }
    let width = (high - low) / ((size as f64).log2() + 1.0);
    let width = if integers { width.max(1.0) } else { width };
    #[expect(clippy::cast_possible_truncation, reason = "log2 of a length, plus one")]
    #[expect(clippy::cast_sign_loss, reason = "both are above 0")]
    let bins = (((high - low) / width).ceil() as usize).max(1);
    let step = (high - low) / bins as f64;
    let mut edges: Vec<f64> = (0..bins).map(|i| i as f64 * step + low).collect();
    edges.push(high);
    edges
}

/// Counts in half-open bins, the last of which is closed.
fn histogram(a: &Sample, b: &Sample, edges: &[f64]) -> Vec<(u64, u64)> {
    let last = edges.len() - 1;
    let below = |sample: &Sample, at: usize| {
        let sorted = sample.sorted();
        match at == last {
            true => sorted.partition_point(|value| *value <= edges[at]),
            false => sorted.partition_point(|value| *value < edges[at]),
        }
    };
    let mut before = (below(a, 0), below(b, 0));
    (1..=last)
        .map(|at| {
            let here = (below(a, at), below(b, at));
            let cell = ((here.0 - before.0) as u64, (here.1 - before.1) as u64);
            before = here;
            cell
        })
        .collect()
}
