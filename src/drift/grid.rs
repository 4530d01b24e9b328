//! Counters of one numeric feature on cells that the reference's quantiles cut.
//!
//! ```text
//!   below │ [e0, e1) │ [e1, e2) │ … │ [eM-1, eM) │ at or above eM
//! ```
//!
//! A value that much of the reference has is an *atom* and gets a cell of its own, as wide as the step
//! to the next double. Each cell has its count and the sum of its values' distances to its upper edge:
//! enough for bounds on the Wasserstein and Kolmogorov-Smirnov distances that hold for certain.
//!
//! Invariants:
//! - Counters of parts add up to those of the whole: counts exactly, sums but for rounding.
//! - [`Cells::wasserstein_low`] is never above the true distance, [`Cells::ks_bounds`] encloses it.
//! - Memory: 16 bytes a cell and 120 more, whatever comes.

use serde::{Deserialize, Serialize};

/// Cells that the reference is cut into, without those of atoms.
pub const CELLS: usize = 64;
/// Most of them, and fewest.
pub const CELLS_MAX: usize = 256;
pub const CELLS_MIN: usize = 16;
/// Edges of a grid at most: each cell's, and two for each atom.
pub const EDGES_MAX: usize = 3 * CELLS_MAX + 2;
/// Cells are put together into groups of about a tenth of the reference each for PSI and its like.
pub const GROUPS: usize = 10;

/// Larger values are counted with the infinities: their squares would become one.
pub const LARGEST: f64 = 1e140;
/// Rows that counters which are read from a file may have: sums of them stay exact.
pub const ROWS_MAX: u64 = 1 << 50;

/// Where the cells are: edges, ascending and finite; at least two.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<f64>", into = "Vec<f64>")]
pub struct Grid(Vec<f64>);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GridError {
    #[error("a grid has 2 to {EDGES_MAX} edges, got {0}")]
    Edges(usize),
    #[error("edge {0} of a grid is not above the one before it, or not finite")]
    Order(usize),
}

impl TryFrom<Vec<f64>> for Grid {
    type Error = GridError;

    fn try_from(edges: Vec<f64>) -> Result<Self, GridError> {
        if !(2..=EDGES_MAX).contains(&edges.len()) {
            return Err(GridError::Edges(edges.len()));
        }
        if let Some(at) = edges.iter().position(|edge| !edge.is_finite()) {
            return Err(GridError::Order(at));
        }
        match edges.windows(2).position(|pair| pair[0] >= pair[1]) {
            Some(at) => Err(GridError::Order(at + 1)),
            None => Ok(Self(edges)),
        }
    }
}

impl From<Grid> for Vec<f64> {
    fn from(grid: Grid) -> Self {
        grid.0
    }
}

impl Grid {
    /// Cut so that each cell has about as many of the values. `None` without values; these are
    /// ascending and finite.
    pub fn over(sorted: &[f64], cells: usize) -> Option<Self> {
        let (first, last) = (*sorted.first()?, *sorted.last()?);
        let cells = cells.clamp(CELLS_MIN, CELLS_MAX);
        let mut edges: Vec<f64> =
            (0..cells).map(|cell| sorted[cell * sorted.len() / cells]).collect();
        edges.extend([first, last.next_up()]);
        for atom in sorted.chunk_by(|a, b| a == b).filter(|run| run.len() * cells > sorted.len()) {
            edges.extend([atom[0], atom[0].next_up()]);
        }
        edges.retain(|edge| edge.is_finite());
        edges.sort_unstable_by(f64::total_cmp);
        // -0.0 and 0.0 are one edge.
        edges.dedup_by(|a, b| a == b);
        Self::try_from(edges).ok()
    }

    pub fn edges(&self) -> &[f64] {
        &self.0
    }

    /// The number of the cell that a value is in: 0 is below all edges.
    fn cell(&self, value: f64) -> usize {
        self.0.partition_point(|edge| *edge <= value)
    }

    /// For each cell the group that it belongs to, each with about a tenth of the reference's rows:
    /// what is below or above all edges belongs to the first or the last.
    pub fn groups(&self, reference: &Cells) -> Vec<usize> {
        let inner = &reference.counts[1..reference.counts.len() - 1];
        let total: u64 = inner.iter().sum();
        let (mut group, mut taken, mut groups) = (0, 0_u64, vec![0]);
        let mut left = total;
        let share = total.div_ceil(GROUPS as u64).max(1);
        for count in inner {
            groups.push(group);
            taken += count;
            left -= count;
            // What is left may be too little for a group of its own.
            if taken >= share && left > share / 2 {
                (group, taken) = (group + 1, 0);
            }
        }
        groups.push(group);
        groups
    }
}

/// Counters over a grid's cells.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cells {
    /// Rows in each cell: one more than there are edges.
    #[serde(with = "super::sparse")]
    pub counts: Vec<u64>,
    /// Sum of the distances to the cell's upper edge; in the last cell to its lower one.
    #[serde(with = "super::sparse")]
    pub sums: Vec<f64>,
    /// All of `counts` together: the finite values.
    len: u64,
    pub missing: u64,
    pub nan: u64,
    pub infinite: u64,
    pub zeros: u64,
    /// Of the finite values; 0 without any.
    pub min: f64,
    pub max: f64,
    pub mean: f64,
    /// Sum of the squared distances to the mean.
    pub squares: f64,
}

impl Cells {
    pub fn new(grid: &Grid) -> Self {
        let cells = grid.0.len() + 1;
        Self {
            counts: vec![0; cells],
            sums: vec![0.0; cells],
            len: 0,
            missing: 0,
            nan: 0,
            infinite: 0,
            zeros: 0,
            min: 0.0,
            max: 0.0,
            mean: 0.0,
            squares: 0.0,
        }
    }

    /// Finite values.
    pub fn len(&self) -> u64 {
        self.len
    }

    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All rows, whatever they had.
    pub fn rows(&self) -> u64 {
        self.len + self.missing + self.nan + self.infinite
    }

    /// Standard deviation as of a population; 0 without values.
    pub fn std(&self) -> f64 {
        if self.len == 0 { 0.0 } else { (self.squares / self.len as f64).max(0.0).sqrt() }
    }

    /// Values below the reference's smallest and above its largest.
    pub fn out_of_range(&self) -> u64 {
        self.counts.first().unwrap_or(&0) + self.counts.last().unwrap_or(&0)
    }

    pub(super) fn fits(&self, grid: &Grid) -> bool {
        let cells = grid.0.len() + 1;
        let finite = [self.min, self.max, self.mean, self.squares];
        let total = self.counts.iter().try_fold(0_u64, |sum, count| sum.checked_add(*count));
        self.counts.len() == cells
            && self.sums.len() == cells
            && total.is_some_and(|total| total == self.len && total <= ROWS_MAX)
            && [self.missing, self.nan, self.infinite, self.zeros].iter().all(|n| *n <= ROWS_MAX)
            && self.sums.iter().chain(&finite).all(|value| value.is_finite())
    }
}

impl Cells {
    /// Counts one value.
    pub fn add(&mut self, grid: &Grid, value: f64) {
        if !(-LARGEST..=LARGEST).contains(&value) {
            self.nan += u64::from(value.is_nan());
            self.infinite += u64::from(!value.is_nan());
            return;
        }
        let cell = grid.cell(value);
        let distance = match grid.0.get(cell) {
            Some(upper) => upper - value,
            None => value - grid.0[cell - 1],
        };
        // Counters of another grid may have fewer cells.
        let (Some(count), Some(sum)) = (self.counts.get_mut(cell), self.sums.get_mut(cell)) else {
            return;
        };
        *count += 1;
        *sum += distance;
        self.zeros += u64::from(value == 0.0);
        if self.len == 0 {
            (self.min, self.max) = (value, value);
        }
        self.min = self.min.min(value);
        self.max = self.max.max(value);
        self.len += 1;
        let apart = value - self.mean;
        self.mean += apart / self.len as f64;
        self.squares += apart * (value - self.mean);
    }

    pub fn add_missing(&mut self) {
        self.missing += 1;
    }

    /// Adds the counters of other rows on the same grid; of another grid nothing is added.
    pub fn merge(&mut self, other: &Self) {
        let (n, m) = (self.len() as f64, other.len() as f64);
        if self.counts.len() != other.counts.len() {
            return;
        }
        for (have, more) in self.counts.iter_mut().zip(&other.counts) {
            *have += more;
        }
        self.len += other.len;
        for (have, more) in self.sums.iter_mut().zip(&other.sums) {
            *have += more;
        }
        self.missing += other.missing;
        self.nan += other.nan;
        self.infinite += other.infinite;
        self.zeros += other.zeros;
        if m == 0.0 {
            return;
        }
        if n == 0.0 {
            (self.min, self.max) = (other.min, other.max);
            (self.mean, self.squares) = (other.mean, other.squares);
            return;
        }
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        let apart = other.mean - self.mean;
        self.mean += apart * m / (n + m);
        self.squares += other.squares + apart * apart * n * m / (n + m);
    }

    /// A number that the first Wasserstein distance of the two is never below, in the values' unit:
    /// `Σ_cells |∫(F_a - F_b)|`; equal to it where the difference keeps its sign within each cell.
    /// `None` when either is empty.
    pub fn wasserstein_low(&self, other: &Self, grid: &Grid) -> Option<f64> {
        let (n, m) = self.both(other)?;
        let last = grid.0.len();
        let tail = |cell: usize| (self.sums[cell] / n - other.sums[cell] / m).abs();
        let mut area = tail(0) + tail(last);
        let (mut below_a, mut below_b) = (self.counts[0], other.counts[0]);
        for (cell, edges) in (1..last).zip(grid.0.windows(2)) {
            let width = edges[1] - edges[0];
            let of = |below: u64, sum: f64, rows: f64| (width * below as f64 + sum) / rows;
            let (a, b) = (of(below_a, self.sums[cell], n), of(below_b, other.sums[cell], m));
            area += (a - b).abs();
            below_a += self.counts[cell];
            below_b += other.counts[cell];
        }
        Some(area)
    }

    /// Two numbers that the Kolmogorov-Smirnov distance of the two lies between. `None` when either is
    /// empty.
    pub fn ks_bounds(&self, other: &Self, grid: &Grid) -> Option<(f64, f64)> {
        let (n, m) = self.both(other)?;
        let (mut low, mut high) = (0.0_f64, 0.0_f64);
        let (mut before_a, mut before_b) = (0.0_f64, 0.0_f64);
        for cell in 0..self.counts.len() {
            let a = before_a + self.counts[cell] as f64 / n;
            let b = before_b + other.counts[cell] as f64 / m;
            low = low.max((a - b).abs());
            // Within the cell each function is between its ends; where it has one value it jumps.
            let single =
                cell > 0 && grid.0.get(cell).is_some_and(|e| *e == grid.0[cell - 1].next_up());
            high = high.max(match single {
                true => (a - b).abs(),
                false => (a - before_b).max(b - before_a),
            });
            (before_a, before_b) = (a, b);
        }
        Some((low, high.max(low).min(1.0)))
    }

    /// Rows in each group of cells.
    pub fn grouped(&self, groups: &[usize]) -> Vec<u64> {
        let mut counts = vec![0; groups.last().map_or(0, |last| last + 1)];
        for (group, count) in groups.iter().zip(&self.counts) {
            counts[*group] += count;
        }
        counts
    }

    fn both(&self, other: &Self) -> Option<(f64, f64)> {
        let (n, m) = (self.len(), other.len());
        let fit = self.counts.len() == other.counts.len();
        (fit && n > 0 && m > 0).then_some((n as f64, m as f64))
    }
}

#[cfg(test)]
mod tests;
