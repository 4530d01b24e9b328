//! The latest values of an arm's features, scored as Evidently and scipy would score them.
//!
//! Kept where the reference has its values to compare with: numbers of a profile that keeps them, and
//! categories of such a profile, all of which its counts name. A category is kept as a number, so each
//! value takes 8 bytes, whatever it is.
//!
//! Begins anew with a restart.

use std::hash::{BuildHasher as _, RandomState};

use crate::drift::counters::{Scores, number_name, score_sides};
use crate::drift::feature::Value;
use crate::drift::grid::LARGEST;
use crate::drift::profile::{Categorical, FeatureProfile, Profile, Reference};
use crate::drift::scores::{Counts, Sample, Sides};
use crate::drift::tally::category;
use crate::drift::window::Ring;

/// Marks the hash of a category that the reference lacks; others are the dictionary's numbers.
const UNSEEN: u64 = 1 << 63;

/// The latest values of all features of an arm.
#[derive(Clone, Debug, Default)]
pub(super) struct Latest {
    features: Vec<Option<Values>>,
    hashes: RandomState,
}

#[derive(Clone, Debug)]
enum Values {
    Numbers(Ring),
    Categories(Ring<u64>),
}

impl Latest {
    /// `size`: values of each feature.
    pub(super) fn new(profile: &Profile, size: usize) -> Self {
        let keeps = profile.features.iter().any(|feature| feature.sample().is_some());
        let values = |feature: &FeatureProfile| match &feature.reference {
            Reference::Num(_) => feature.sample().map(|_| Values::Numbers(Ring::new(size))),
            Reference::Cat(cat) => {
                (keeps && cat.tally.outside == 0).then(|| Values::Categories(Ring::new(size)))
            }
            Reference::Mmd(_) => None,
        };
        Self { features: profile.features.iter().map(values).collect(), hashes: RandomState::new() }
    }

    /// Keeps a value of a feature, if it is a number or a category.
    pub(super) fn add(&mut self, at: usize, of: &FeatureProfile, value: Value<'_>) {
        let Some(Some(values)) = self.features.get_mut(at) else { return };
        match (values, &of.reference, value) {
            (Values::Numbers(ring), _, Value::Number(number)) if number.abs() <= LARGEST => {
                ring.push(number);
            }
            (Values::Categories(ring), Reference::Cat(cat), Value::Text(bytes)) => {
                ring.push(numbered(cat, &category(bytes), &self.hashes));
            }
            (Values::Categories(ring), Reference::Cat(cat), Value::Number(number))
                if !number.is_nan() =>
            {
                ring.push(numbered(cat, &number_name(number), &self.hashes));
            }
            _ => {}
        }
    }

    /// How many values of a feature there are, and their scores; `None` of a feature without.
    pub(super) fn scores(&self, at: usize, of: &FeatureProfile) -> Option<(u64, Scores)> {
        let values = self.features.get(at)?.as_ref()?;
        match (values, &of.reference) {
            (Values::Numbers(ring), Reference::Num(numeric)) => {
                let current = Sample::new(ring.values().to_vec(), numeric.integers);
                Some((ring.values().len() as u64, of.score_values(&current)))
            }
            (Values::Categories(ring), Reference::Cat(cat)) => {
                let names = cat.categories.names();
                let own = names.iter().cloned().zip(cat.tally.counts.iter().copied());
                let (reference, current) = (own.collect(), counts(names, ring.values()));
                let sides = Sides::Categories { reference: &reference, current: &current };
                Some((ring.values().len() as u64, score_sides(&sides)))
            }
            _ => None,
        }
    }
}

fn numbered(cat: &Categorical, name: &str, hashes: &RandomState) -> u64 {
    let number = cat.categories.number(name).and_then(|number| u64::try_from(number).ok());
    number.unwrap_or_else(|| hashes.hash_one(name) | UNSEEN)
}

/// By name; what the reference lacks by its hash, which no name begins like.
fn counts(names: &[String], values: &[u64]) -> Counts {
    let mut counts = Counts::new();
    for value in values {
        let known = usize::try_from(*value).ok().and_then(|number| names.get(number));
        let name = known.cloned().unwrap_or_else(|| format!("\u{0}{value:x}"));
        *counts.entry(name).or_default() += 1;
    }
    counts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::DataType;
    use crate::drift::feature::{Role, of_rows};
    use crate::drift::learn::{LearnSettings, Learner};

    fn profile(keep_values: bool) -> Profile {
        let mut features = of_rows(Role::Input, "n", DataType::Fp32, Some(&[]));
        features.extend(of_rows(Role::Input, "t", DataType::Bytes, Some(&[])));
        let how = LearnSettings { keep_values, ..LearnSettings::default() };
        let mut learner = Learner::new(features, how).unwrap();
        for row in 0..300 {
            learner.add(0, Value::Number(f64::from(row % 50)));
            learner.add(1, Value::Text(if row % 3 == 0 { b"red" } else { b"green" }));
        }
        let of = ("m".parse().unwrap(), None);
        learner.finish(of, "test", jiff::Timestamp::UNIX_EPOCH).unwrap().profile
    }

    #[test]
    fn categories_are_scored_by_name_whether_the_reference_has_them_or_not() {
        let profile = profile(true);
        let mut latest = Latest::new(&profile, 100);
        // The first 20 go again.
        let texts = ["old"].iter().cycle().take(20);
        let kept: Vec<&str> =
            ["red", "blue", "green", "grey"].into_iter().cycle().take(100).collect();
        for text in texts.chain(&kept) {
            latest.add(1, &profile.features[1], Value::Text(text.as_bytes()));
        }
        let of = |names: &[(&str, u64)]| -> Counts {
            names.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
        };
        let reference = of(&[("green", 200), ("red", 100)]);
        let current = of(&[("blue", 25), ("green", 25), ("grey", 25), ("red", 25)]);
        let want = score_sides(&Sides::Categories { reference: &reference, current: &current });
        let (rows, found) = latest.scores(1, &profile.features[1]).unwrap();
        assert_eq!((rows, found.len()), (100, want.len()));
        for ((score, found), (wanted, want)) in found.iter().zip(&want) {
            assert_eq!(score, wanted);
            assert!((found - want).abs() <= 1e-12 * want.abs(), "{score}: {found}, not {want}");
        }
        assert_eq!(latest.scores(0, &profile.features[0]).unwrap().0, 0);
    }

    #[test]
    fn without_values_nothing_is_kept() {
        let profile = profile(false);
        let mut latest = Latest::new(&profile, 100);
        for (at, feature) in profile.features.iter().enumerate() {
            latest.add(at, feature, Value::Number(1.0));
            assert!(latest.scores(at, feature).is_none(), "{at}");
        }
    }
}
