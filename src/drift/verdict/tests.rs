use super::super::feature::{Feature, Role, Value, of_rows};
use super::super::learn::{LearnSettings, Learner};
use super::super::profile::Profile;
use super::super::random::{mix, normal};
use super::*;
use crate::domain::DataType;

/// Twenty features of 4,000 reference rows.
fn reference(seed: u64) -> Profile {
    let features: Vec<Feature> = of_rows(Role::Input, "x", DataType::Fp64, Some(&[20]));
    let mut learner = Learner::new(features, LearnSettings::default()).unwrap();
    for row in 0..4000 {
        for feature in 0..20 {
            learner.add(feature, Value::Number(normal(mix(seed, feature as u64), row)));
        }
    }
    let model = "iris".parse().unwrap();
    learner.finish((model, None), "train.csv", jiff::Timestamp::UNIX_EPOCH).unwrap().profile
}

/// How many of the features a window of `rows` calls drifted, the first of them shifted.
fn drifted(profile: &Profile, seed: u64, rows: u64, shift: f64, missing: u64) -> Vec<State> {
    let counters: Vec<Counters> = profile
        .features
        .iter()
        .enumerate()
        .map(|(number, feature)| {
            let mut counters = feature.counters();
            for row in 0..rows {
                let moved = if number == 0 { shift } else { 0.0 };
                let value = normal(mix(seed, 1000 + number as u64), row) + moved;
                let gone = number == 0 && row < missing;
                feature
                    .add(&mut counters, if gone { Value::Missing } else { Value::Number(value) });
            }
            counters
        })
        .collect();
    let scores: Vec<Scores> =
        profile.features.iter().zip(&counters).map(|(feature, own)| feature.score(own)).collect();
    let all = profile.features.iter().zip(&counters).zip(&scores);
    let verdicts = judge(all.map(|((feature, counters), scores)| (feature, counters, scores)));
    verdicts.into_iter().map(|verdict| verdict.state).collect()
}

#[test]
fn windows_without_a_change_raise_no_alert() {
    // Small windows: PSI is above 0.1 by chance in one of twenty, and is no evidence then.
    let profile = reference(1);
    let windows = 30;
    let alerts = (0..windows)
        .filter(|seed| drifted(&profile, 100 + seed, 200, 0.0, 0).contains(&State::Drifted))
        .count();
    assert!(alerts <= 2, "{alerts} of {windows} windows at a nominal 5 %");
}

#[test]
fn a_shift_is_told_of_its_feature_alone() {
    let profile = reference(2);
    for (shift, missing) in [(0.5, 0), (0.0, 200)] {
        let states = drifted(&profile, 7, 1000, shift, missing);
        assert_eq!(states[0], State::Drifted, "{shift} {missing}");
        assert!(states[1..].iter().all(|state| *state == State::Steady), "{states:?}");
    }
    // A tenth of a standard deviation is seen, but not large.
    assert_eq!(drifted(&profile, 7, 4000, 0.12, 0)[0], State::Steady);
    assert_eq!(drifted(&profile, 7, 199, 3.0, 0)[0], State::InsufficientData);
}
