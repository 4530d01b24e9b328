//! What was found out about shadows so far: counts, means, largest, quantiles, the worst.
//!
//! Invariants:
//! - Everything here has a size that does not grow with the number of comparisons.
//! - A version that is loaded anew from other bytes begins anew; one that is gone is forgotten.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use jiff::Timestamp;
use uuid::Uuid;

use super::compare::{Difference, Floats};
use super::run::Compared;
use crate::domain::{Digest, ModelName, Version};
use crate::observe::OUTPUTS_MAX;
use crate::route::Served;

/// Pairs of shadow and version, of all models together; what is beyond is run and not compared
/// here, only in the metrics.
pub(super) const PAIRS_MAX: usize = 256;
/// Predictions that are kept for each output, of those that differ the most.
pub(super) const WORST_MAX: usize = 16;

/// One prediction's outputs beside its answer's.
pub(super) struct Comparison<'a> {
    pub(super) prediction_id: Uuid,
    pub(super) shadow_id: Uuid,
    pub(super) primary: &'a Served,
    pub(super) shadow: &'a Arc<Served>,
    pub(super) outputs: &'a [Compared],
}

/// Model, shadow, and the version that made the answers.
type Key = (ModelName, Version, Version);

#[derive(Default)]
pub(super) struct Tallies {
    pub(super) pairs: BTreeMap<Key, Pair>,
}

pub(super) struct Pair {
    pub(super) digest: Digest,
    pub(super) primary_digest: Digest,
    shadow: Weak<Served>,
    pub(super) since: Timestamp,
    pub(super) compared: u64,
    /// Predictions all of whose outputs agreed.
    pub(super) agreed: u64,
    /// In the order of the model's outputs.
    pub(super) outputs: Vec<OutputTally>,
}

pub(super) struct OutputTally {
    pub(super) name: Arc<str>,
    pub(super) datatype: &'static str,
    pub(super) compared: u64,
    pub(super) agreed: u64,
    pub(super) unlike: u64,
    pub(super) elements: u64,
    pub(super) unequal: u64,
    pub(super) non_finite: u64,
    pub(super) rows: u64,
    pub(super) flips: u64,
    pub(super) max_abs: Spread,
    pub(super) max_rel: Spread,
    /// Of 1 − cosine: what is near 1 has no spread to speak of.
    pub(super) distance: Spread,
    /// The worst first.
    pub(super) worst: Vec<Worst>,
}

/// A prediction that differed.
#[derive(Clone, Debug)]
pub(super) struct Worst {
    pub(super) prediction_id: Uuid,
    pub(super) shadow_id: Uuid,
    pub(super) difference: Difference,
}

impl Tallies {
    pub(super) fn add(&mut self, comparison: &Comparison<'_>) {
        let (primary, shadow) = (comparison.primary, comparison.shadow);
        let key = (shadow.model.clone(), shadow.version, primary.version);
        let same =
            |pair: &Pair| (pair.digest, pair.primary_digest) == (shadow.digest, primary.digest);
        if !self.pairs.get(&key).is_some_and(same) {
            self.pairs.remove(&key);
            self.forget_the_gone();
            if self.pairs.len() >= PAIRS_MAX {
                return;
            }
        }
        let pair = self.pairs.entry(key).or_insert_with(|| Pair::new(comparison));
        // The same bytes may have been loaded again.
        pair.shadow = Arc::downgrade(shadow);
        pair.add(comparison);
    }

    pub(super) fn reset(&mut self, model: &ModelName) {
        self.pairs.retain(|(of, _, _), _| of != model);
    }

    pub(super) fn forget_the_gone(&mut self) {
        self.pairs.retain(|_, pair| pair.shadow.strong_count() > 0);
    }
}

impl Pair {
    fn new(comparison: &Comparison<'_>) -> Self {
        Self {
            digest: comparison.shadow.digest,
            primary_digest: comparison.primary.digest,
            shadow: Arc::downgrade(comparison.shadow),
            since: Timestamp::now(),
            compared: 0,
            agreed: 0,
            outputs: Vec::new(),
        }
    }

    fn add(&mut self, comparison: &Comparison<'_>) {
        self.compared += 1;
        let all = comparison.outputs.iter().all(|output| output.difference.agrees);
        self.agreed += u64::from(all);
        for output in comparison.outputs {
            let at = self.outputs.iter().position(|tally| tally.name == output.name);
            let at = match at {
                Some(at) => at,
                None if self.outputs.len() >= OUTPUTS_MAX => continue,
                None => {
                    self.outputs.push(OutputTally::new(output));
                    self.outputs.len() - 1
                }
            };
            self.outputs[at].add(comparison, &output.difference);
        }
    }
}

impl OutputTally {
    fn new(output: &Compared) -> Self {
        Self {
            name: Arc::clone(&output.name),
            datatype: output.datatype,
            compared: 0,
            agreed: 0,
            unlike: 0,
            elements: 0,
            unequal: 0,
            non_finite: 0,
            rows: 0,
            flips: 0,
            max_abs: Spread::default(),
            max_rel: Spread::default(),
            distance: Spread::default(),
            worst: Vec::new(),
        }
    }

    fn add(&mut self, comparison: &Comparison<'_>, difference: &Difference) {
        self.compared += 1;
        self.agreed += u64::from(difference.agrees);
        self.elements += difference.elements;
        self.unequal += difference.unequal;
        self.non_finite += difference.non_finite;
        self.rows += difference.rows;
        self.flips += difference.flips;
        self.unlike += u64::from(difference.unlike.is_some());
        if let Some(Floats { max_abs, max_rel, cosine }) = difference.floats {
            self.max_abs.add(max_abs);
            self.max_rel.add(max_rel);
            if let Some(cosine) = cosine {
                self.distance.add((1.0 - cosine).max(0.0));
            }
        }
        self.keep(comparison, difference);
    }

    fn keep(&mut self, comparison: &Comparison<'_>, difference: &Difference) {
        let severity = severity(difference);
        if severity == NONE {
            return;
        }
        let before = |worst: &Worst| compare_severity(self::severity(&worst.difference), severity);
        let at = self.worst.partition_point(|worst| before(worst).is_ge());
        if at >= WORST_MAX {
            return;
        }
        self.worst.truncate(WORST_MAX - 1);
        let (prediction_id, shadow_id) = (comparison.prediction_id, comparison.shadow_id);
        let difference = difference.clone();
        self.worst.insert(at, Worst { prediction_id, shadow_id, difference });
    }
}

/// By what a difference is ranked: that the outputs have nothing in common, rows that flipped,
/// elements that are no numbers, exact elements that differ, how far numbers are off.
type Severity = (bool, u64, u64, u64, f64);

const NONE: Severity = (false, 0, 0, 0, 0.0);

fn severity(difference: &Difference) -> Severity {
    let Difference { unlike, flips, non_finite, unequal, floats, .. } = difference;
    // Of numbers, how far they are off tells more than how many are.
    let (unequal, off) = match floats {
        Some(floats) => (0, floats.max_abs),
        None => (*unequal, 0.0),
    };
    (unlike.is_some(), *flips, *non_finite, unequal, off)
}

fn compare_severity(a: Severity, b: Severity) -> std::cmp::Ordering {
    let counts = |of: Severity| (of.0, of.1, of.2, of.3);
    counts(a).cmp(&counts(b)).then(a.4.total_cmp(&b.4))
}

/// Parts that each power of two is cut into: a quantile is told to an eighth.
const PARTS: u64 = 8;
/// Bits of a float's mantissa that tell the part.
const PART_BITS: u32 = 52 - PARTS.trailing_zeros();
/// Powers of two between which values are told apart: from 2^−40 to 2^40, about 10^±12.
const OCTAVES: usize = 80;
const FIRST: u64 = (1023 - 40) * PARTS;
const BUCKETS: usize = OCTAVES * 8;

/// How values that are not negative are spread.
#[derive(Clone, Debug, Default)]
pub(super) struct Spread {
    pub(super) count: u64,
    sum: f64,
    pub(super) max: f64,
    /// Values of exactly zero, which are most where two versions are alike.
    zeros: u64,
    /// By size; made for the first value that is not zero.
    buckets: Option<Box<[u32; BUCKETS]>>,
}

impl Spread {
    pub(super) fn add(&mut self, value: f64) {
        self.count += 1;
        self.sum = (self.sum + value).min(f64::MAX);
        self.max = self.max.max(value);
        if value == 0.0 {
            self.zeros += 1;
            return;
        }
        let buckets = self.buckets.get_or_insert_with(|| Box::new([0; BUCKETS]));
        // The bits of positive floats are in their order: exponent, then mantissa.
        let at = (value.to_bits() >> PART_BITS).saturating_sub(FIRST);
        let at = usize::try_from(at).unwrap_or(BUCKETS).min(BUCKETS - 1);
        buckets[at] = buckets[at].saturating_add(1);
    }

    pub(super) fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }

    /// A bound that `share` of the values do not pass, at most an eighth above the least such.
    pub(super) fn quantile(&self, share: f64) -> f64 {
        let wanted = share * self.count as f64;
        let mut seen = self.zeros as f64;
        if seen >= wanted {
            return 0.0;
        }
        for (at, count) in (FIRST..).zip(self.buckets.iter().flat_map(|buckets| buckets.iter())) {
            seen += f64::from(*count);
            if seen >= wanted {
                return f64::from_bits((at + 1) << PART_BITS).min(self.max);
            }
        }
        self.max
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_spread_of_nothing_is_zero() {
        let spread = Spread::default();
        assert_eq!((spread.mean(), spread.quantile(0.5), spread.max), (0.0, 0.0, 0.0));
    }

    #[test]
    fn a_spread_tells_the_mean_the_largest_and_quantiles() {
        let mut spread = Spread::default();
        (0..900).for_each(|_| spread.add(0.0));
        (1..=100).for_each(|value| spread.add(f64::from(value)));
        assert_eq!((spread.count, spread.mean(), spread.max), (1000, 5.05, 100.0));
        assert_eq!((spread.quantile(0.5), spread.quantile(0.9)), (0.0, 0.0));
        assert_eq!((spread.quantile(0.95), spread.quantile(1.0)), (52.0, 100.0));
        // What is too small or too large to be told apart is still in order.
        for value in [1e-300, f64::MIN_POSITIVE, 1e300, f64::MAX] {
            let mut spread = Spread::default();
            spread.add(value);
            assert!(spread.quantile(0.5) >= 1e-12_f64.min(value), "{value}");
            assert!(spread.quantile(0.5) <= value.max(1e-11), "{value}");
        }
    }

    proptest! {
        #[test]
        fn quantiles_are_within_an_eighth(
            mut values in prop::collection::vec(1e-9..1e9_f64, 1..200),
            share in 0.01..1.0_f64,
        ) {
            let mut spread = Spread::default();
            values.iter().for_each(|value| spread.add(*value));
            values.sort_by(f64::total_cmp);
            #[expect(clippy::cast_possible_truncation, reason = "at most 200")]
            let rank = (share * values.len() as f64).ceil() as usize;
            let exact = values[rank.clamp(1, values.len()) - 1];
            let got = spread.quantile(share);
            prop_assert!(exact <= got && got <= exact * 1.126, "{got} for {exact}");
        }
    }
}
