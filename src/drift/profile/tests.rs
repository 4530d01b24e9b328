use serde_json::{Value as Json, json};

use super::super::feature::{Role, Value, of_rows};
use super::super::learn::{LearnSettings, Learner};
use super::super::random::normal;
use super::*;
use crate::domain::DataType;

#[expect(clippy::cast_possible_truncation, reason = "as 32-bit floats have it")]
fn narrow(value: f64) -> f32 {
    value as f32
}

fn profile(keep_values: bool, atoms: bool) -> Profile {
    let mut features = of_rows(Role::Input, "x", DataType::Fp32, Some(&[2]));
    features.extend(of_rows(Role::Input, "colour", DataType::Bytes, Some(&[])));
    features.extend(of_rows(Role::Output, "wide", DataType::Fp32, None));
    let settings = LearnSettings { keep_values, ..LearnSettings::default() };
    let mut learner = Learner::new(features.clone(), settings).unwrap();
    for row in 0..3000 {
        // 0.1 as a 32-bit float has 17 digits: an atom that a rounded reading would miss.
        let atom = if atoms && row % 3 == 0 { f64::from(0.1_f32) } else { normal(1, row) };
        learner.add(0, Value::Number(f64::from(narrow(atom))));
        learner.add(1, Value::Number(normal(2, row)));
        learner.add(2, Value::Text(if row % 4 == 0 { b"red" } else { b"blue" }));
        learner.add(
            features.len() - 1,
            Value::Vector(&std::array::from_fn(|d| normal(3, row + d as u64))),
        );
    }
    let model = "iris".parse().unwrap();
    learner.finish((model, None), "train.csv", jiff::Timestamp::UNIX_EPOCH).unwrap().profile
}

#[test]
fn a_profile_comes_back_from_its_file_bit_by_bit() {
    let made = profile(true, true);
    let bytes = made.write().unwrap();
    let read = Profile::read(&bytes).unwrap();
    assert_eq!(read.features.len(), 4);
    for (made, read) in made.features.iter().zip(&read.features) {
        assert_eq!(made.feature, read.feature);
        match (&made.reference, &read.reference) {
            (Reference::Num(made), Reference::Num(read)) => {
                assert_eq!(made.edges, read.edges);
                assert_eq!(made.cells.counts, read.cells.counts);
                assert_eq!(made.groups(), read.groups());
                assert_eq!(made.values, read.values);
                assert_eq!(made.quantiles, read.quantiles);
            }
            (Reference::Cat(made), Reference::Cat(read)) => assert_eq!(made.tally, read.tally),
            (Reference::Mmd(made), Reference::Mmd(read)) => assert_eq!(made.kernel, read.kernel),
            _ => panic!("another kind"),
        }
        // The reference against itself.
        let scores = read.score(&read.own());
        let zero = |score: &Score| !score.is_p_value() && *score != Score::KsHigh;
        assert!(
            scores.iter().all(|(score, value)| !zero(score) || value.abs() < 1e-6),
            "{scores:?}"
        );
    }
    assert!(
        matches!(&read.features[0].reference, Reference::Num(n) if matches!(n.values, Some(Packed::F32(_))))
    );
    assert!(
        matches!(&read.features[1].reference, Reference::Num(n) if matches!(n.values, Some(Packed::F64(_))))
    );
    assert_eq!(read.features[0].sample(), made.features[0].sample());
}

#[test]
fn values_are_kept_only_on_purpose() {
    let text = String::from_utf8(profile(false, true).write().unwrap()).unwrap();
    assert!(!text.contains("\"values\""));
    assert!(Profile::read(text.as_bytes()).unwrap().features[0].sample().is_none());
}

#[test]
fn what_does_not_fit_is_refused() {
    // The test's own reading of numbers is the rounded one, so without atoms.
    let whole: Json = serde_json::from_slice(&profile(true, false).write().unwrap()).unwrap();
    type Change = fn(&mut Json);
    let cases: &[(&str, Change)] = &[
        ("schema_version is 2", |p| p["schema_version"] = json!(2)),
        ("unknown field", |p| p["features"][0]["colour"] = json!(1)),
        ("1 to 4096 features", |p| p["features"] = json!([])),
        ("no part of a row", |p| {
            p["features"][0]["feature"]["part"] = json!({"element": u64::MAX});
        }),
        ("twice", |p| p["features"][1] = p["features"][0].clone()),
        ("do not fit its edges", |p| {
            p["features"][0]["reference"]["num"]["cells"]["counts"] = json!([1])
        }),
        ("do not fit its edges", |p| {
            p["features"][0]["reference"]["num"]["cells"]["len"] = json!(1)
        }),
        ("is not above the one before", |p| {
            p["features"][0]["reference"]["num"]["edges"][1] = json!(-1e9)
        }),
        ("edges that are numbers", |p| {
            p["features"][0]["reference"]["num"]["edges"][1] = json!("x")
        }),
        ("values cannot be read", |p| {
            p["features"][0]["reference"]["num"]["values"] = json!({"f32": "!"})
        }),
        ("not finite", |p| {
            p["features"][0]["reference"]["num"]["values"] = json!({"f32": "AADAfw=="})
        }),
        ("keeps no values", |p| {
            p["features"][0]["reference"]["num"]["values"] = json!({"f32": ""})
        }),
        ("do not fit its categories", |p| {
            p["features"][2]["reference"]["cat"]["tally"]["counts"] = json!([])
        }),
        ("twice in the list", |p| {
            p["features"][2]["reference"]["cat"]["categories"][0] = json!("red")
        }),
        ("no width", |p| p["features"][3]["reference"]["mmd"]["kernel"]["sigma"] = json!(0)),
        ("random features", |p| p["features"][3]["reference"]["mmd"]["sums"]["sums"] = json!([1])),
    ];
    for (want, change) in cases {
        let mut changed = whole.clone();
        change(&mut changed);
        let error = Profile::read(changed.to_string().as_bytes()).unwrap_err();
        assert!(error.to_string().contains(want), "{want}: {error}");
    }
    assert!(matches!(
        Profile::read(&vec![b' '; PROFILE_BYTES_MAX + 1]),
        Err(ProfileError::Size(_))
    ));
    assert!(matches!(Profile::read(b"{}"), Err(ProfileError::Form(_))));
}

#[test]
fn a_value_that_never_changes_is_nothing_odd_after_a_file() {
    // As numbers of JSON, some of these are read one step off.
    for hundredth in [3.0_f32, 11.0, 12.0, 23.0] {
        let value = Value::Number(f64::from(hundredth / 100.0));
        let features = of_rows(Role::Input, "x", DataType::Fp32, Some(&[1]));
        let mut learner = Learner::new(features, LearnSettings::default()).unwrap();
        (0..1000).for_each(|_| learner.add(0, value));
        let of = ("m".parse().unwrap(), None);
        let made = learner.finish(of, "test", jiff::Timestamp::UNIX_EPOCH).unwrap().profile;
        let read = Profile::read(&made.write().unwrap()).unwrap();
        assert_eq!(read.features[0].oddity(value), None, "{hundredth}");
    }
}
