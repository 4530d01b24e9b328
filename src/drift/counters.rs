//! The counters of any feature, and what they score against the reference's.

use serde::{Deserialize, Serialize};

use super::evidence::ROWS_MIN;
use super::feature::Value;
use super::grid::Cells;
use super::profile::{FeatureProfile, Reference};
use super::scores::{ColumnTest, Sample, Shares, Sides, ks_distance};
use super::tally::{Tally, category};
use super::wide::Fourier;

/// Everything that is scored, by the name that it has in metrics and reports.
///
/// Those that begin with `cell_` are over groups of the reference's cells, each with about a tenth of
/// it, or over its categories; they need counters only. Those of Evidently need values.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Score {
    CellPsi,
    CellJensenshannon,
    CellHellinger,
    /// Largest difference of a share, L∞.
    CellLInfinity,
    /// p-value of Pearson's test that both are samples of one distribution.
    CellP,
    /// A lower bound of `wasserstein`.
    WassersteinLow,
    /// Bounds of `ks`.
    KsLow,
    KsHigh,
    /// Squared distance of the means of random features.
    Mmd,
    /// The change of the share of rows without a number or a category.
    Missing,
    Psi,
    KlDiv,
    Jensenshannon,
    Hellinger,
    /// First Wasserstein distance over the reference's standard deviation.
    Wasserstein,
    /// The distance D; `ks_p` is its p-value.
    Ks,
    KsP,
    ChisquareP,
    ZP,
}

impl Score {
    pub const ALL: [Self; 19] = [
        Self::CellPsi,
        Self::CellJensenshannon,
        Self::CellHellinger,
        Self::CellLInfinity,
        Self::CellP,
        Self::WassersteinLow,
        Self::KsLow,
        Self::KsHigh,
        Self::Mmd,
        Self::Missing,
        Self::Psi,
        Self::KlDiv,
        Self::Jensenshannon,
        Self::Hellinger,
        Self::Wasserstein,
        Self::Ks,
        Self::KsP,
        Self::ChisquareP,
        Self::ZP,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::CellPsi => "cell_psi",
            Self::CellJensenshannon => "cell_jensenshannon",
            Self::CellHellinger => "cell_hellinger",
            Self::CellLInfinity => "cell_l_infinity",
            Self::CellP => "cell_p",
            Self::WassersteinLow => "wasserstein_low",
            Self::KsLow => "ks_low",
            Self::KsHigh => "ks_high",
            Self::Mmd => "mmd",
            Self::Missing => "missing",
            Self::Psi => "psi",
            Self::KlDiv => "kl_div",
            Self::Jensenshannon => "jensenshannon",
            Self::Hellinger => "hellinger",
            Self::Wasserstein => "wasserstein",
            Self::Ks => "ks",
            Self::KsP => "ks_p",
            Self::ChisquareP => "chisquare_p",
            Self::ZP => "z_p",
        }
    }

    /// Whether small is what speaks for a change.
    pub fn is_p_value(self) -> bool {
        matches!(self, Self::CellP | Self::KsP | Self::ChisquareP | Self::ZP)
    }

    /// From where a score is commonly held to be large; `None` where nobody holds anything.
    pub fn usual_limit(self) -> Option<f64> {
        match self {
            Self::CellPsi | Self::Psi | Self::KlDiv | Self::CellJensenshannon => Some(0.1),
            Self::Jensenshannon | Self::Hellinger | Self::CellHellinger => Some(0.1),
            Self::Wasserstein | Self::WassersteinLow | Self::CellLInfinity => Some(0.1),
            Self::KsLow => Some(0.1),
            Self::Missing => Some(0.05),
            Self::Mmd => Some(0.015),
            _ => None,
        }
    }
}

impl std::fmt::Display for Score {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(self.name())
    }
}

impl std::str::FromStr for Score {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|score| score.name() == text)
            .ok_or_else(|| format!("expected one of {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// Scores of one feature; those that do not exist are absent.
pub type Scores = Vec<(Score, f64)>;

/// Counters of one feature over some rows.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Counters {
    Num(Cells),
    Cat(Tally),
    Mmd(Fourier),
}

impl Counters {
    /// Rows, whatever they had.
    pub fn rows(&self) -> u64 {
        match self {
            Self::Num(cells) => cells.rows(),
            Self::Cat(tally) => tally.rows(),
            Self::Mmd(fourier) => fourier.rows + fourier.missing,
        }
    }

    /// Rows that had a number or a category.
    pub fn len(&self) -> u64 {
        match self {
            Self::Num(cells) => cells.len(),
            Self::Cat(tally) => tally.len(),
            Self::Mmd(fourier) => fourier.rows,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds those of other rows; of another kind nothing is added.
    pub fn merge(&mut self, other: &Self) {
        match (self, other) {
            (Self::Num(have), Self::Num(more)) => have.merge(more),
            (Self::Cat(have), Self::Cat(more)) => have.merge(more),
            (Self::Mmd(have), Self::Mmd(more)) => have.merge(more),
            _ => {}
        }
    }

    /// Whether there are rows enough for a score to say anything.
    pub fn sufficient(&self) -> bool {
        self.len() >= ROWS_MIN
    }
}

impl FeatureProfile {
    /// Counts one row's value.
    pub fn add(&self, counters: &mut Counters, value: Value<'_>) {
        match (&self.reference, counters) {
            (Reference::Num(numeric), Counters::Num(cells)) => match value {
                Value::Number(number) => cells.add(&numeric.edges, number),
                _ => cells.add_missing(),
            },
            (Reference::Cat(cat), Counters::Cat(tally)) => match value {
                Value::Text(bytes) => tally.add(&cat.categories, &category(bytes)),
                Value::Number(number) if !number.is_nan() => {
                    tally.add(&cat.categories, &number_name(number));
                }
                _ => tally.missing += 1,
            },
            (Reference::Mmd(embedding), Counters::Mmd(fourier)) => {
                match (value, embedding.waves()) {
                    (Value::Vector(row), Some(waves)) => fourier.add(waves, row),
                    _ => fourier.missing += 1,
                }
            }
            _ => {}
        }
    }

    /// Whether counters are this feature's: of its kind, with its cells. For what comes from a file.
    pub fn fits(&self, counters: &Counters) -> bool {
        match (&self.reference, counters) {
            (Reference::Num(numeric), Counters::Num(cells)) => cells.fits(&numeric.edges),
            (Reference::Cat(cat), Counters::Cat(tally)) => tally.fits(&cat.categories),
            (Reference::Mmd(_), Counters::Mmd(fourier)) => fourier.fits(),
            _ => false,
        }
    }

    /// Rows of counters in the cells that [`super::sequential::Monitor`] watches.
    pub fn cells(&self, counters: &Counters) -> Vec<u64> {
        match (&self.reference, counters) {
            (Reference::Num(numeric), Counters::Num(cells)) => cells.grouped(numeric.groups()),
            (Reference::Cat(_), Counters::Cat(tally)) => tally.cells(),
            _ => Vec::new(),
        }
    }

    /// What counters alone say about rows against the reference.
    pub fn score(&self, current: &Counters) -> Scores {
        self.score_between(&self.own(), current)
    }

    /// The same with other rows in the reference's place: another version's, another arm's.
    pub fn score_between(&self, reference: &Counters, current: &Counters) -> Scores {
        let mut scores = Scores::new();
        let shares = |a: Vec<u64>, b: Vec<u64>| Shares::new(a.into_iter().zip(b).collect());
        if let Some(shares) = shares(self.cells(reference), self.cells(current)) {
            scores.extend([
                (Score::CellPsi, shares.psi()),
                (Score::CellJensenshannon, shares.jensen_shannon()),
                (Score::CellHellinger, shares.hellinger()),
                (Score::CellLInfinity, shares.l_infinity()),
                (Score::CellP, shares.same_source_p()),
            ]);
        }
        match (&self.reference, reference, current) {
            (Reference::Num(numeric), Counters::Num(a), Counters::Num(b)) => {
                if let Some(low) = a.wasserstein_low(b, &numeric.edges) {
                    scores.push((Score::WassersteinLow, low / a.std().max(STD_MIN)));
                }
                if let Some((low, high)) = a.ks_bounds(b, &numeric.edges) {
                    scores.extend([(Score::KsLow, low), (Score::KsHigh, high)]);
                }
            }
            (_, Counters::Mmd(a), Counters::Mmd(b)) => {
                scores.extend(a.mmd2(b).map(|distance| (Score::Mmd, distance)));
            }
            _ => {}
        }
        let without = |counters: &Counters| match counters.rows() {
            0 => None,
            rows => Some((rows - counters.len()) as f64 / rows as f64),
        };
        if let (Some(a), Some(b)) = (without(reference), without(current)) {
            scores.push((Score::Missing, (a - b).abs()));
        }
        scores.retain(|(_, score)| score.is_finite());
        scores
    }

    /// What the values say, as Evidently and scipy would: of numbers whose reference values were kept.
    pub fn score_values(&self, current: &Sample) -> Scores {
        let Some(reference) = self.sample() else { return Scores::new() };
        score_sides(&Sides::Numbers { reference, current })
    }
}

/// Every score of Evidently's and scipy's that exists for these columns.
pub fn score_sides(sides: &Sides<'_>) -> Scores {
    let tests = [
        (Score::Psi, ColumnTest::Psi),
        (Score::KlDiv, ColumnTest::KlDiv),
        (Score::Jensenshannon, ColumnTest::Jensenshannon),
        (Score::Hellinger, ColumnTest::Hellinger),
        (Score::Wasserstein, ColumnTest::Wasserstein),
        (Score::KsP, ColumnTest::Ks),
    ];
    let mut scores = Scores::new();
    for (score, test) in tests {
        scores.extend(test.value(sides).map(|value| (score, value)));
    }
    match sides {
        Sides::Numbers { reference, current } if !reference.is_empty() && !current.is_empty() => {
            scores.push((Score::Ks, ks_distance(reference.sorted(), current.sorted())));
        }
        Sides::Categories { .. } => {
            let p_values = [(Score::ChisquareP, ColumnTest::Chisquare), (Score::ZP, ColumnTest::Z)];
            let two = sides.by_value().len() <= 2;
            for (score, test) in
                p_values.into_iter().filter(|(score, _)| *score != Score::ZP || two)
            {
                scores.extend(test.value(sides).map(|value| (score, value)));
            }
        }
        Sides::Numbers { .. } => {}
    }
    scores.retain(|(_, score)| score.is_finite());
    scores
}

/// A number as the name of a category: `3`, `2.5`.
pub fn number_name(number: f64) -> String {
    // Zero has no sign here, and what has hundreds of digits has an exponent.
    if number.abs() < 1e16 { format!("{}", number + 0.0) } else { format!("{number:e}") }
}

/// A standard deviation that a distance is divided by is no smaller, as Evidently has it.
const STD_MIN: f64 = 0.001;
