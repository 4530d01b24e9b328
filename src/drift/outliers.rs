//! Whether one row is unlike the reference, feature by feature: cheap enough for every request.

use super::counters::number_name;
use super::feature::{Part, Value};
use super::grid::LARGEST;
use super::profile::{FeatureProfile, Numeric, Reference};
use super::tally::category;

/// Distances from the median, in units that would be standard deviations of a normal distribution.
pub const ROBUST_Z_MAX: f64 = 6.0;
/// Makes the median distance from the median a standard deviation of a normal distribution.
const MAD_TO_STD: f64 = 1.4826;

/// What is odd about one value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Oddity {
    /// Outside the quantiles 0.1 % and 99.9 % of the reference.
    OutOfRange,
    /// More than [`ROBUST_Z_MAX`] from the median as well.
    FarOut,
    /// A row shorter or longer than any of the reference: its `length(x)` says so.
    Shape,
    /// A category that the reference has not.
    UnseenCategory,
    /// NaN or infinite, or nothing at all, where the reference has always a value.
    NoValue,
}

impl FeatureProfile {
    /// `None` when there is nothing odd.
    pub fn oddity(&self, value: Value<'_>) -> Option<Oddity> {
        match (&self.reference, value) {
            (Reference::Num(numeric), Value::Number(number)) if number.abs() <= LARGEST => {
                match self.feature.part {
                    Part::Length => {
                        let seen = (numeric.cells.min..=numeric.cells.max).contains(&number);
                        (!seen).then_some(Oddity::Shape)
                    }
                    _ => far(numeric, number),
                }
            }
            (Reference::Num(numeric), _) => {
                let always = numeric.cells.rows() == numeric.cells.len();
                always.then_some(Oddity::NoValue)
            }
            (Reference::Cat(cat), Value::Missing | Value::Vector(_)) => {
                (cat.tally.missing == 0).then_some(Oddity::NoValue)
            }
            (Reference::Cat(cat), value) => {
                // A dictionary that has not all of the reference's categories cannot tell.
                let closed = cat.tally.outside == 0;
                let known = match value {
                    Value::Text(bytes) => cat.categories.number(&category(bytes)),
                    Value::Number(number) => cat.categories.number(&number_name(number)),
                    _ => None,
                };
                (closed && known.is_none()).then_some(Oddity::UnseenCategory)
            }
            (Reference::Mmd(_), _) => None,
        }
    }
}

fn far(numeric: &Numeric, number: f64) -> Option<Oddity> {
    let q = &numeric.quantiles;
    if (q.p0_1..=q.p99_9).contains(&number) {
        return None;
    }
    let z = (number - q.p50).abs() / (MAD_TO_STD * q.mad);
    // Without a median distance any other value is infinitely far.
    Some(if z > ROBUST_Z_MAX { Oddity::FarOut } else { Oddity::OutOfRange })
}
