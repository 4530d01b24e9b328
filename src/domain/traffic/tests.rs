use proptest::prelude::*;
use serde_json::{from_str, from_value, json, to_value};

use super::*;

fn version(number: u64) -> Version {
    Version::new(number).unwrap()
}

fn weighing(weights: &[f64]) -> Traffic {
    let weights = (1..).zip(weights).map(|(number, weight)| (version(number), *weight));
    Traffic { weights: weights.collect(), ..Traffic::default() }
}

fn shares(weights: &[f64]) -> Vec<u16> {
    weighing(weights).shares().into_values().collect()
}

#[test]
fn traffic_is_json_as_the_contract_says() {
    let text = json!({
        "weights": {"1": 95.0, "2": 5.0},
        "sticky": {"header": "x-user-id"},
        "rules": [
            {"name": "beta", "header": "x-group", "equals": "beta", "version": "canary"},
            {"name": "eu", "header": "x-region", "prefix": "eu-", "version": "2"},
        ],
        "shadows": [{"version": "3", "percent": 12.5}],
    });
    let traffic: Traffic = from_value(text.clone()).unwrap();
    traffic.check().unwrap();
    assert_eq!(to_value(&traffic).unwrap(), text);
    let named: Vec<u64> = traffic.versions().into_iter().map(Version::get).collect();
    assert_eq!(named, [1, 2, 3]);
    assert_eq!(traffic.labels().into_iter().map(|l| l.to_string()).collect::<Vec<_>>(), ["canary"]);
    assert!(traffic.rules[0].matches("beta") && !traffic.rules[0].matches("beta2"));
    assert!(traffic.rules[1].matches("eu-west") && !traffic.rules[1].matches("us-eu-"));

    let least: Traffic = from_value(json!({"weights": {"7": 1}})).unwrap();
    assert_eq!(
        to_value(&least).unwrap(),
        json!({"weights": {"7": 1.0}, "rules": [], "shadows": []})
    );
    let numbers: Traffic = from_value(json!({
        "weights": {"1": 1}, "shadows": [{"version": 2, "percent": 1}],
        "rules": [{"name": "a", "header": "b", "equals": "", "version": 2}],
        "sticky": {"parameter": "user"},
    }))
    .unwrap();
    numbers.check().unwrap();
    assert_eq!(numbers.versions().len(), 2);
}

#[test]
fn what_is_not_traffic_is_refused() {
    for bad in [
        r#"{}"#,
        r#"{"weights": {"0": 1}}"#,
        r#"{"weights": {"01": 1}}"#,
        r#"{"weights": {"canary": 1}}"#,
        r#"{"weights": {"1": "1"}}"#,
        r#"{"weights": {"1": 1e400}}"#,
        r#"{"weights": {"1": 1, "1": 99}}"#,
        r#"{"weights": {"1": 1}, "split": 1}"#,
        r#"{"weights": {"1": 1}, "sticky": {"cookie": "x"}}"#,
        r#"{"weights": {"1": 1}, "sticky": {"header": "x", "parameter": "y"}}"#,
        r#"{"weights": {"1": 1}, "rules": [{"name": "a", "header": "x", "version": "1", "regex": "."}]}"#,
        r#"{"weights": {"1": 1}, "rules": [{"name": "a b", "header": "x", "version": "1"}]}"#,
        r#"{"weights": {"1": 1}, "shadows": [{"version": "1"}]}"#,
        r#"{"weights": {"1": 1}, "shadows": [{"version": "stable", "percent": 1}]}"#,
    ] {
        assert!(from_str::<Traffic>(bad).is_err(), "{bad}");
    }
}

#[test]
fn every_problem_is_told_with_its_path() {
    let weights = |weights: &[f64]| weighing(weights).check().unwrap_err().join("\n");
    assert_eq!(weights(&[]), "weights: at least one has to be positive");
    assert_eq!(weights(&[0.0, 0.0]), "weights: at least one has to be positive");
    assert_eq!(
        weights(&[f64::NAN, -1.0, 1.0, f64::INFINITY]),
        "weights.1: expected a number of at least 0, got NaN\n\
         weights.2: expected a number of at least 0, got -1\n\
         weights.4: expected a number of at least 0, got inf"
    );
    assert_eq!(weights(&[f64::MAX, f64::MAX]), "weights: their sum is too large");
    assert_eq!(weights(&[1.0; 65]), "weights: expected at most 64 versions, got 65");

    let rule = |name: &str, header: &str, equals: Option<&str>, prefix: Option<&str>| Rule {
        name: name.parse().unwrap(),
        header: header.to_owned(),
        equals: equals.map(str::to_owned),
        prefix: prefix.map(str::to_owned),
        version: version(1).into(),
    };
    let long = "x".repeat(257);
    let mut traffic = weighing(&[1.0]);
    traffic.sticky = Some(Sticky::Header("x y".to_owned()));
    traffic.rules = vec![
        rule("stable", "x", Some("a"), None),
        rule("b", "x", None, None),
        rule("b", "", Some("a"), Some("b")),
        rule("c", "Authorization", Some(&long), None),
        rule("d", "x", None, Some("")),
        rule("e", "x", None, Some("a\n")),
    ];
    let shadow = |number, percent| Shadow { version: version(number), percent };
    traffic.shadows = vec![shadow(2, f64::NAN), shadow(2, 100.5), shadow(3, 100.0), shadow(4, 0.0)];
    let wanted = [
        "sticky.header: 'x y' is no header name",
        "rules.0.name: 'stable' is the name of another arm",
        "rules.1: expected either 'equals' or 'prefix'",
        "rules.2.name: 'b' is the name of two rules",
        "rules.2.header: expected 1 to 64 bytes, got 0",
        "rules.2: expected either 'equals' or 'prefix'",
        "rules.3.header: 'Authorization' holds secrets, which a rule must not spell out",
        "rules.3.equals: expected at most 256 bytes, got 257",
        "rules.4.prefix: an empty one would match any value",
        "rules.5.prefix: a header holds no control characters",
        "shadows.0.percent: expected a number from 0 to 100, got NaN",
        "shadows.1.percent: expected a number from 0 to 100, got 100.5",
        "shadows.1.version: 2 is there twice",
    ];
    assert_eq!(traffic.check().unwrap_err(), wanted);

    let mut many = weighing(&[1.0]);
    many.rules = vec![rule("a", "x", Some("a"), None); 40];
    many.shadows = vec![shadow(1, 1.0); 9];
    let problems = many.check().unwrap_err();
    assert_eq!(problems[0], "rules: expected at most 32, got 40");
    assert!(problems.contains(&"shadows: expected at most 8, got 9".to_owned()));
}

#[test]
fn shares_are_hundredths_of_a_percent() {
    assert_eq!(shares(&[95.0, 5.0]), [9500, 500]);
    assert_eq!(shares(&[1.0, 1.0, 1.0]), [3333, 3333, 3334]);
    assert_eq!(shares(&[99.99, 0.01]), [9999, 1]);
    assert_eq!(shares(&[0.0, 3.0, 0.0]), [0, 10_000, 0]);
    assert_eq!(shares(&[f64::MAX, f64::MIN_POSITIVE]), [10_000, 0]);
    assert_eq!(shares(&[5e-324, 5e-324]), [5000, 5000]);
    assert_eq!(shares(&[0.1, 0.2, 0.7]), [1000, 2000, 7000]);
    assert!(shares(&[f64::NAN, 1.0]).is_empty());
    assert_eq!(
        Traffic::all_to(version(4)).shares().into_iter().collect::<Vec<_>>(),
        [(version(4), 10_000)]
    );
    let percent = |percent| Shadow { version: version(1), percent }.share();
    assert_eq!([0.0, 0.01, 12.345, 100.0].map(percent), [0, 1, 1235, 10_000]);
}

#[test]
fn the_stable_version_is_the_labelled_one_or_the_largest() {
    let traffic = weighing(&[5.0, 90.0, 5.0]);
    assert_eq!(traffic.stable(None), Some(version(2)));
    assert_eq!(traffic.stable(Some(version(3))), Some(version(3)));
    assert_eq!(traffic.stable(Some(version(9))), Some(version(2)));
    assert_eq!(weighing(&[1.0, 1.0]).stable(None), Some(version(1)));
    assert_eq!(weighing(&[0.0]).stable(None), None);
    let order = |labelled| -> Vec<u64> {
        traffic.shares_beside(labelled).iter().map(|(version, _)| version.get()).collect()
    };
    assert_eq!(order(Some(version(2))), [1, 3, 2]);
    assert_eq!(order(None), [2, 3, 1], "whoever has most");
}

/// Weights of every size, many of them such that nothing divides evenly.
fn some_weights() -> impl Strategy<Value = Vec<f64>> {
    let weight = prop_oneof![
        3 => 0.0..100.0_f64,
        1 => (0..5_u8).prop_map(f64::from),
        1 => 1e-300..1e300_f64,
        1 => Just(1.0 / 3.0),
    ];
    prop::collection::vec(weight, 1..12)
}

fn some_text() -> impl Strategy<Value = String> {
    prop_oneof![".{0,300}", "[a-z-]{1,9}", Just(String::new())]
}

prop_compose! {
    fn some_rule()(
        name in "[A-Za-z0-9._-]{1,9}",
        header in some_text(),
        equals in prop::option::of(some_text()),
        prefix in prop::option::of(some_text()),
        number in any::<u64>(),
    ) -> Option<Rule> {
        let version = Version::new(number).map(VersionRef::from)?;
        Some(Rule { name: name.parse().ok()?, header, equals, prefix, version })
    }
}

proptest! {
    #[test]
    fn shares_add_up_and_are_within_one_of_exact(weights in some_weights()) {
        let traffic = weighing(&weights);
        let sum: f64 = weights.iter().sum();
        prop_assume!(traffic.check().is_ok());
        for stable in [None, Some(version(1)), Some(version(weights.len() as u64))] {
            let shares = traffic.shares_beside(stable);
            prop_assert_eq!(shares.len(), weights.len());
            let total: u32 = shares.iter().map(|(_, share)| u32::from(*share)).sum();
            prop_assert_eq!(total, 10_000);
            for (version, share) in shares {
                let weight = traffic.weights[&version];
                let off = f64::from(share) - weight / sum * 10_000.0;
                prop_assert!(off.abs() < 1.0 + 1e-6, "{version}: {share} is off by {off}");
                prop_assert!(weight > 0.0 || share == 0);
            }
        }
    }

    #[test]
    fn a_growing_share_takes_in_all_that_it_had(
        weights in prop::collection::vec(prop_oneof![0.0..100.0_f64, 1e-9..1e9_f64], 2..6),
        raised in 0_usize..5,
        by in prop_oneof![1e-12..1e-3_f64, 0.0..3.0_f64, 1.0..1e6_f64],
        labelled in any::<bool>(),
    ) {
        let raised = raised % weights.len();
        let mut more = weights.clone();
        more[raised] += more[raised] * by + by;
        let stable = labelled.then(|| version(2));
        let place = |weights: &[f64]| {
            let mut from = 0;
            for (version, share) in weighing(weights).shares_beside(stable) {
                if version.get() == raised as u64 + 1 {
                    return (from, from + share);
                }
                from += share;
            }
            (from, from)
        };
        let (before, after) = (place(&weights), place(&more));
        if before.0 < before.1 {
            prop_assert!(after.0 <= before.0 && before.1 <= after.1, "{before:?} {after:?}");
        }
    }

    #[test]
    fn nothing_makes_the_check_panic(
        weights in prop::collection::btree_map(1..u64::MAX, any::<f64>(), 0..70),
        sticky in prop::option::of((any::<bool>(), some_text())),
        rules in prop::collection::vec(some_rule(), 0..40),
        shadows in prop::collection::vec((1..4_u64, any::<f64>()), 0..12),
    ) {
        let traffic = Traffic {
            weights: weights.into_iter().map(|(number, w)| (version(number), w)).collect(),
            sticky: sticky.map(|(header, name)| {
                if header { Sticky::Header(name) } else { Sticky::Parameter(name) }
            }),
            rules: rules.into_iter().flatten().collect(),
            shadows: shadows
                .into_iter()
                .map(|(number, percent)| Shadow { version: version(number), percent })
                .collect(),
        };
        let fine = traffic.check().is_ok();
        let total: u32 = traffic.shares().values().map(|share| u32::from(*share)).sum();
        prop_assert!(total == 10_000 || (total == 0 && !fine));
        prop_assert!(traffic.shadows.iter().all(|shadow| shadow.share() <= BUCKETS));
        if fine {
            let mut back: Traffic = from_str(&serde_json::to_string(&traffic).unwrap()).unwrap();
            // The last bit of a number may be lost.
            let close = |a: f64, b: f64| (a - b).abs() <= b * f64::EPSILON;
            let mut pairs = back.weights.iter().zip(&traffic.weights);
            prop_assert!(pairs.all(|(a, b)| a.0 == b.0 && close(*a.1, *b.1)));
            back.weights.clone_from(&traffic.weights);
            back.shadows.clone_from(&traffic.shadows);
            prop_assert_eq!(back, traffic);
        }
    }
}
