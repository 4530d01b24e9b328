//! What a feature takes of memory, as a number of features of the usual kind: of that the limit
//! `monitor.features_max` is made.
//!
//! Invariant: what an arm holds of a feature, in all of its slots, its evidence and what is reported of
//! it, is no more than its weight in units of [`FEATURE_BYTES`]; `tests` measures it. Besides come the
//! latest values, 8 bytes each, where there are some.

use super::Settings;
use crate::domain::DataType;
use crate::drift::feature::{Feature, Part};
use crate::drift::frequent;
use crate::drift::profile::{FeatureProfile, Profile, Reference};
use crate::drift::tally::CATEGORY_LEN_MAX;
use crate::drift::wide::{DIMENSIONS, FEATURES};

/// Bytes that one feature of the limit stands for: those of a number in 64 cells.
pub(super) const FEATURE_BYTES: usize = 50 << 10;
/// Slots that counters are kept of: 13 short ones, 25 hours, and the two that are open.
const SLOTS: usize = 40;
/// Of one slot's counters beside their cells: lists' heads, sums, what an allocation costs.
const SLOT_BYTES: usize = 128;
/// Of what is reported: names, scores and limits in two windows, before and after.
const REPORT_BYTES: usize = 2 << 10;
/// Different texts of one feature that are told apart while a reference is learnt.
pub(super) const TEXTS_MAX: usize = 1000;

/// Of a profile's features in one arm.
pub(super) fn weight_of(profile: &Profile) -> usize {
    profile.features.iter().map(|feature| bytes_of(feature).div_ceil(FEATURE_BYTES)).sum()
}

fn bytes_of(feature: &FeatureProfile) -> usize {
    let counters = match &feature.reference {
        Reference::Num(numeric) => 16 * (numeric.edges.edges().len() + 1),
        Reference::Cat(cat) => 8 * (cat.categories.names().len() + 1),
        Reference::Mmd(_) => 8 * FEATURES,
    };
    // Evidence: what the reference has in each cell, three processes, and what they were given last.
    let (evidence, names) = match &feature.reference {
        Reference::Num(_) => (5 * 8 * 16, 0),
        Reference::Cat(cat) => {
            let count = cat.categories.names().len();
            (5 * 8 * (count + 1), count * 2 * CATEGORY_LEN_MAX)
        }
        Reference::Mmd(_) => (0, 0),
    };
    let strange = match &feature.reference {
        Reference::Cat(_) => frequent::KEPT_MAX * (2 * frequent::TEXT_LEN_MAX + 64),
        Reference::Num(_) | Reference::Mmd(_) => 0,
    };
    SLOTS * (counters + SLOT_BYTES) + evidence + names + strange + REPORT_BYTES
}

/// The same of a feature while it is learnt.
pub(super) fn learner_weight(feature: &Feature, settings: &Settings) -> usize {
    let rows = usize::try_from(settings.provisional_rows).unwrap_or(usize::MAX);
    let bytes = match (feature.part, feature.datatype) {
        (Part::Mmd, _) => rows.min(4096) * 8 * DIMENSIONS,
        (_, DataType::Bytes) => rows * 4 + TEXTS_MAX * 2 * CATEGORY_LEN_MAX,
        _ => rows * 8,
    };
    bytes.div_ceil(FEATURE_BYTES).max(1)
}

#[cfg(test)]
#[cfg(target_os = "linux")]
mod tests {
    use super::super::arm::ArmState;
    use super::super::form::tests::full;
    use super::*;
    use crate::drift::counters::Counters;
    use crate::drift::feature::{Role, Value, of_rows};
    use crate::drift::learn::{LearnSettings, Learner};
    use crate::drift::random::normal;

    /// Memory of the process that is no file's, in bytes.
    fn resident() -> usize {
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().trim().parse::<usize>().unwrap() << 10
    }

    /// Bytes that one arm of a profile holds, with what is reported of it: before, and after.
    fn measured(profile: &Profile, arm: &ArmState) -> usize {
        const ARMS: usize = 4;
        let hold = || {
            let mut arm = arm.clone();
            let reports = [arm.report("stable", profile), arm.report("stable", profile)];
            (arm, reports)
        };
        // What was freed before is used first.
        let mut held: Vec<_> = (0..3).map(|_| hold()).collect();
        let before = resident();
        held.extend((0..ARMS).map(|_| hold()));
        let grown = resident().saturating_sub(before);
        drop(held);
        grown / ARMS
    }

    fn holds(name: &str, profile: &Profile, arm: &ArmState) {
        let (features, weight) = (profile.features.len(), weight_of(profile));
        let (bytes, limit) = (measured(profile, arm), weight * FEATURE_BYTES);
        eprintln!("{name}: {} bytes a feature, weight {}", bytes / features, weight / features);
        assert!(bytes <= limit, "{name}: {bytes} bytes in {features} features of weight {weight}");
        assert!(
            bytes >= limit / 4,
            "{name}: {bytes} bytes in {features} features of weight {weight}"
        );
    }

    fn learnt(features: Vec<Feature>, add: impl Fn(&mut Learner)) -> (Profile, ArmState) {
        let mut learner = Learner::new(features, LearnSettings::default()).unwrap();
        add(&mut learner);
        let of = ("m".parse().unwrap(), None);
        let profile = learner.finish(of, "test", jiff::Timestamp::UNIX_EPOCH).unwrap().profile;
        let counters: Vec<Counters> = profile.features.iter().map(FeatureProfile::own).collect();
        let arm = ArmState::full(&profile, &counters, 1);
        (profile, arm)
    }

    // Each in a process of its own, as nextest has it: what another has freed would be used first.

    #[test]
    fn a_number_takes_no_more_than_its_weight() {
        let (profile, arm) = full(200);
        holds("a number", &profile, &arm);
    }

    #[test]
    fn categories_take_no_more_than_their_weight() {
        let features = of_rows(Role::Input, "t", DataType::Bytes, Some(&[20]));
        let (profile, arm) = learnt(features, |learner| {
            for feature in 0..20 {
                for name in 0..1000 {
                    let text = format!("a category of a usual length, number {name}");
                    learner.add(feature, Value::Text(text.as_bytes()));
                }
            }
        });
        holds("1,000 categories", &profile, &arm);
    }

    #[test]
    fn a_projection_takes_no_more_than_its_weight() {
        let parts =
            |tensor: usize| of_rows(Role::Input, &format!("x{tensor}"), DataType::Fp32, None);
        let whole = (0..100).flat_map(parts).filter(|feature| feature.part == Part::Mmd);
        let (profile, arm) = learnt(whole.collect(), |learner| {
            for feature in 0..100 {
                for row in 0..20 {
                    let vector = std::array::from_fn(|at| normal(at as u64, row));
                    learner.add(feature, Value::Vector(&vector));
                }
            }
        });
        holds("mmd", &profile, &arm);
    }
}
