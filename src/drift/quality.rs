//! What is wrong with rows as such, by kind: nothing that needs a score. A gateway and `tidegate drift`
//! count alike.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::counters::Counters;
use super::feature::Value;
use super::grid::LARGEST;
use super::outliers::Oddity;
use super::profile::{FeatureProfile, Reference};

/// Values that should not be so, by kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Oddities {
    /// No value where the reference always has one.
    #[schema(minimum = 0)]
    pub missing: u64,
    #[schema(minimum = 0)]
    pub nan: u64,
    #[schema(minimum = 0)]
    pub infinite: u64,
    /// Rows shorter or longer than any of the reference, of a tensor whose length varies.
    #[schema(minimum = 0)]
    pub shape: u64,
    /// Outside the quantiles 0.1 % and 99.9 % of the reference.
    #[schema(minimum = 0)]
    pub out_of_range: u64,
    /// Farther than six robust standard deviations from its median.
    #[schema(minimum = 0)]
    pub far_out: u64,
    #[schema(minimum = 0)]
    pub unseen_category: u64,
}

impl Oddities {
    pub const KINDS: [&str; 7] =
        ["missing", "nan", "infinite", "shape", "out_of_range", "far_out", "unseen_category"];

    pub fn add(&mut self, more: &Self) {
        self.missing += more.missing;
        self.nan += more.nan;
        self.infinite += more.infinite;
        self.shape += more.shape;
        self.out_of_range += more.out_of_range;
        self.far_out += more.far_out;
        self.unseen_category += more.unseen_category;
    }

    /// In the order of [`Oddities::KINDS`].
    pub fn counts(&self) -> [u64; 7] {
        [
            self.missing,
            self.nan,
            self.infinite,
            self.shape,
            self.out_of_range,
            self.far_out,
            self.unseen_category,
        ]
    }

    /// Counts one value, of which [`FeatureProfile::oddity`] says what is odd; whether that makes its
    /// row an outlier: it is far out, or nothing like it was ever seen.
    pub fn count(&mut self, odd: Option<Oddity>, value: Value<'_>) -> bool {
        if let Value::Number(number) = value {
            self.nan += u64::from(number.is_nan());
            self.infinite += u64::from(number.abs() > LARGEST);
        }
        match odd {
            None => {}
            Some(Oddity::NoValue) => {
                self.missing += u64::from(!matches!(value, Value::Number(_)));
            }
            Some(Oddity::OutOfRange) => self.out_of_range += 1,
            Some(Oddity::Shape) => self.shape += 1,
            Some(Oddity::FarOut) => self.far_out += 1,
            Some(Oddity::UnseenCategory) => self.unseen_category += 1,
        }
        matches!(odd, Some(Oddity::Shape | Oddity::FarOut | Oddity::UnseenCategory))
    }
}

/// Rows of one feature, by what is wrong with them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Quality {
    #[serde(flatten)]
    pub values: Oddities,
    /// All rows have one value, where the reference has several.
    pub constant: bool,
}

/// What counters alone know of, in the order of [`FeatureProfile::counted`].
pub const COUNTED: [&str; 5] = ["missing", "nan", "infinite", "out_of_range", "unseen_category"];

impl FeatureProfile {
    /// Rows by what is wrong with them, as far as counters tell: of [`COUNTED`], where `out_of_range` is
    /// beyond the reference's smallest and largest value.
    pub fn counted(&self, current: &Counters) -> [u64; COUNTED.len()] {
        match (&self.reference, current) {
            (Reference::Num(_), Counters::Num(cells)) => {
                [cells.missing, cells.nan, cells.infinite, cells.out_of_range(), 0]
            }
            (Reference::Cat(cat), Counters::Cat(tally)) => {
                let unseen = if cat.tally.outside == 0 { tally.outside } else { 0 };
                [tally.missing, 0, 0, 0, unseen]
            }
            (_, Counters::Mmd(sums)) => [sums.missing, 0, 0, 0, 0],
            _ => [0; COUNTED.len()],
        }
    }

    /// Whether all rows have one value where the reference has several. Too few rows are not.
    pub fn is_constant(&self, current: &Counters) -> bool {
        let several = |counts: Vec<u64>| counts.iter().filter(|count| **count > 0).count() > 1;
        current.sufficient()
            && match (&self.reference, current) {
                (Reference::Num(numeric), Counters::Num(cells)) => {
                    numeric.distinct > 1 && cells.min == cells.max
                }
                (Reference::Cat(cat), Counters::Cat(tally)) => {
                    several(cat.tally.cells()) && !several(tally.cells())
                }
                _ => false,
            }
    }
}
