//! Scores of two tables of counts over the same cells.

use super::chi_square_sf;

/// Counts of reference and current rows in the same cells.
#[derive(Clone, Debug, PartialEq)]
pub struct Shares {
    cells: Vec<(u64, u64)>,
    /// Rows of each side; more than the cells' sum when some rows are in none.
    rows: (u64, u64),
}

impl Shares {
    /// `None` when a side has no rows.
    pub fn new(cells: Vec<(u64, u64)>) -> Option<Self> {
        let sum = |side: fn(&(u64, u64)) -> u64| cells.iter().map(side).sum::<u64>();
        let rows = (sum(|cell| cell.0), sum(|cell| cell.1));
        (rows.0 > 0 && rows.1 > 0).then_some(Self { cells, rows })
    }

    /// Cells that either side has.
    pub fn cells(&self) -> usize {
        self.cells.iter().filter(|cell| **cell != (0, 0)).count()
    }

    fn shares(&self) -> impl Iterator<Item = (f64, f64)> + '_ {
        let (n, m) = (self.rows.0 as f64, self.rows.1 as f64);
        self.cells.iter().map(move |(a, b)| (*a as f64 / n, *b as f64 / m))
    }

    /// With empty cells filled as Evidently fills them: 0.0001, or a millionth of the smallest share
    /// when that is no larger than 0.0001. Shares then sum to a little more than 1.
    fn filled(&self) -> Vec<(f64, f64)> {
        let fill = |side: fn(&(f64, f64)) -> f64| {
            let present = self.shares().map(|cell| side(&cell)).filter(|share| *share > 0.0);
            let least = present.fold(f64::INFINITY, f64::min);
            if least <= 1e-4 { least / 1e6 } else { 1e-4 }
        };
        let (for_p, for_q) = (fill(|cell| cell.0), fill(|cell| cell.1));
        let filled = |share: f64, with: f64| if share == 0.0 { with } else { share };
        self.shares().map(|(p, q)| (filled(p, for_p), filled(q, for_q))).collect()
    }

    /// Population stability index: `Σ (p - q) ln(p / q)`, empty cells filled.
    pub fn psi(&self) -> f64 {
        self.filled().iter().map(|(p, q)| (p - q) * (p / q).ln()).sum()
    }

    /// Kullback-Leibler divergence `Σ p ln(p / q)`, empty cells filled, both sides summing to 1 again.
    pub fn kl(&self) -> f64 {
        let filled = self.filled();
        let (sum_p, sum_q) =
            filled.iter().fold((0.0, 0.0), |sum, cell| (sum.0 + cell.0, sum.1 + cell.1));
        filled.iter().map(|(p, q)| p / sum_p * (p / sum_p / (q / sum_q)).ln()).sum()
    }

    /// Jensen-Shannon distance with natural logarithms: 0 to `sqrt(ln 2)` = 0.8326.
    pub fn jensen_shannon(&self) -> f64 {
        let part = |share: f64, middle: f64| {
            if share > 0.0 { share * (share / middle).ln() } else { 0.0 }
        };
        let sum: f64 =
            self.shares().map(|(p, q)| part(p, p.midpoint(q)) + part(q, p.midpoint(q))).sum();
        (sum / 2.0).max(0.0).sqrt()
    }

    /// Hellinger distance: `sqrt(1 - Σ sqrt(p q))`, 0 to 1.
    pub fn hellinger(&self) -> f64 {
        let alike: f64 = self.shares().map(|(p, q)| (p * q).sqrt()).sum();
        (1.0 - alike.clamp(0.0, 1.0)).sqrt()
    }

    /// Largest difference of a share.
    pub fn l_infinity(&self) -> f64 {
        self.shares().map(|(p, q)| (p - q).abs()).fold(0.0, f64::max)
    }

    /// p-value of Pearson's test with the reference's shares as the truth. A cell that the reference
    /// lacks gives 0.
    pub fn chi_square_p(&self) -> f64 {
        let scale = self.rows.1 as f64 / self.rows.0 as f64;
        let taken = self.cells.iter().filter(|cell| **cell != (0, 0));
        let statistic: f64 = taken
            .map(|(a, b)| {
                let expected = *a as f64 * scale;
                (*b as f64 - expected).powi(2) / expected
            })
            .sum();
        chi_square_sf(statistic, self.cells().saturating_sub(1))
    }

    /// p-value of the test that both sides are drawn from one distribution, which takes the reference
    /// for the sample that it is. Cells are joined, smallest first, until each has 5 expected rows of
    /// either side.
    pub fn same_source_p(&self) -> f64 {
        let (n, m) = (self.rows.0 as f64, self.rows.1 as f64);
        let least = self.rows.0.min(self.rows.1) as f64 / (n + m);
        let mut cells: Vec<(u64, u64)> =
            self.cells.iter().copied().filter(|cell| *cell != (0, 0)).collect();
        cells.sort_unstable_by_key(|(a, b)| a + b);
        let mut joined: Vec<(u64, u64)> = Vec::with_capacity(cells.len());
        for (a, b) in cells {
            match joined.last_mut() {
                Some(last) if ((last.0 + last.1) as f64) * least < EXPECTED_MIN => {
                    *last = (last.0 + a, last.1 + b);
                }
                _ => joined.push((a, b)),
            }
        }
        let statistic: f64 = joined
            .iter()
            .map(|(a, b)| {
                let both = (a + b) as f64 / (n + m);
                let (of_n, of_m) = (both * n, both * m);
                (*a as f64 - of_n).powi(2) / of_n + (*b as f64 - of_m).powi(2) / of_m
            })
            .sum();
        chi_square_sf(statistic, joined.len().saturating_sub(1))
    }

    /// p-value of the two-proportion z-test for "not the first cell", as Evidently takes it for
    /// columns of two values; 1 for one value.
    pub fn z_p(&self) -> f64 {
        let (n, m) = (self.rows.0 as f64, self.rows.1 as f64);
        if self.cells() < 2 {
            return 1.0;
        }
        let Some(first) = self.cells.iter().find(|cell| **cell != (0, 0)) else { return 1.0 };
        let (p, q) = (1.0 - first.0 as f64 / n, 1.0 - first.1 as f64 / m);
        let both = (p * n + q * m) / (n + m);
        super::normal_two_sided((p - q) / (both * (1.0 - both) * (1.0 / n + 1.0 / m)).sqrt())
    }

    /// The value that PSI stays below with probability `1 - alpha` when nothing has changed:
    /// `(1/n + 1/m) χ²`. `alpha` within (0, 1).
    pub fn psi_critical(&self, alpha: f64) -> f64 {
        crate::drift::evidence::psi_critical(self.rows.0, self.rows.1, self.cells(), alpha)
    }
}

/// Fewer expected rows in a cell make its part of a chi-square unlike one.
const EXPECTED_MIN: f64 = 5.0;
