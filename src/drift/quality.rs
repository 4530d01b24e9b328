//! What is wrong with rows as such, by kind: nothing that needs a score.

use serde::{Deserialize, Serialize};

use super::counters::Counters;
use super::grid::Cells;
use super::profile::{FeatureProfile, Reference};

/// Rows of one feature, by what is wrong with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quality {
    /// Without a value: left out, or a row of another shape than the reference's.
    pub missing: u64,
    pub nan: u64,
    pub infinite: u64,
    /// Below the reference's smallest value or above its largest.
    pub out_of_range: u64,
    /// Of a category that the reference has not; 0 where its dictionary has not all of its own.
    pub unseen_category: u64,
    /// All rows have one value, where the reference has several.
    pub constant: bool,
}

impl Quality {
    pub const KINDS: [&str; 5] = ["missing", "nan", "infinite", "out_of_range", "unseen_category"];

    /// In the order of [`Quality::KINDS`].
    pub fn counts(&self) -> [u64; 5] {
        [self.missing, self.nan, self.infinite, self.out_of_range, self.unseen_category]
    }
}

impl FeatureProfile {
    pub fn quality(&self, current: &Counters) -> Quality {
        match (&self.reference, current) {
            (Reference::Num(numeric), Counters::Num(cells)) => Quality {
                missing: cells.missing,
                nan: cells.nan,
                infinite: cells.infinite,
                out_of_range: cells.out_of_range(),
                unseen_category: 0,
                constant: is_one(cells) && !is_one(&numeric.cells),
            },
            (Reference::Cat(cat), Counters::Cat(tally)) => {
                let several =
                    |counts: Vec<u64>| counts.iter().filter(|count| **count > 0).count() > 1;
                let closed = cat.tally.outside == 0;
                Quality {
                    missing: tally.missing,
                    unseen_category: if closed { tally.outside } else { 0 },
                    constant: tally.len() > 1
                        && !several(tally.cells())
                        && several(cat.tally.cells()),
                    ..Quality::default()
                }
            }
            (_, Counters::Mmd(sums)) => Quality { missing: sums.missing, ..Quality::default() },
            _ => Quality::default(),
        }
    }
}

fn is_one(cells: &Cells) -> bool {
    cells.len() > 1 && cells.min == cells.max
}
