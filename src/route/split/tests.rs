use std::collections::BTreeSet;

use proptest::prelude::*;
use statrs::distribution::{Binomial, DiscreteCDF as _};
use tokio::time::Instant;

use super::*;
use crate::domain::{CallMeta, Protocol};

const SALT: u64 = 0x5a17;

fn version(number: u64) -> Version {
    Version::new(number).unwrap()
}

fn weighing(weights: &[f64]) -> Traffic {
    let weights = (1..).zip(weights).map(|(number, weight)| (version(number), *weight));
    Traffic { weights: weights.collect(), ..Traffic::default() }
}

/// With these versions loaded.
fn split_of(traffic: &Traffic, loaded: &[u64], labels: &[(&str, u64)], salt: u64) -> Split {
    let versions = loaded.iter().map(|number| (version(*number), ())).collect();
    let label = |(name, number): &(&str, u64)| (name.parse().unwrap(), version(*number));
    Split::compile(traffic, &labels.iter().map(label).collect(), salt, &versions)
}

fn split(weights: &[f64]) -> Split {
    let all: Vec<u64> = (1..=weights.len() as u64).collect();
    split_of(&weighing(weights), &all, &[], SALT)
}

fn call() -> CallMeta {
    CallMeta {
        protocol: Protocol::Http,
        received: Instant::now(),
        timeout: None,
        trace: None,
        sticky_key: None,
        headers: RouteHeaders::default(),
        principal: None,
    }
}

fn keyed(key: &str) -> CallMeta {
    CallMeta { sticky_key: Some(key.to_owned()), ..call() }
}

fn choose(split: &Split, call: &CallMeta, parameters: &[(String, ParameterValue)]) -> Choice {
    split.choose(&Keys { call, parameters, prediction_id: Uuid::nil() }).unwrap()
}

/// The version that each bucket gets.
fn by_bucket(split: &Split) -> Vec<u64> {
    (0..BUCKETS).map(|bucket| split.at(bucket, false).unwrap().version.get()).collect()
}

fn count(of: &[u64], number: u64) -> usize {
    of.iter().filter(|have| **have == number).count()
}

/// A long period and no dependency.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 =
            self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.0 >> 20
    }
}

#[test]
fn canaries_have_the_low_buckets_and_stable_what_is_left() {
    let traffic = weighing(&[93.0, 5.0, 2.0]);
    let of = |labels: &[(&str, u64)]| split_of(&traffic, &[1, 2, 3], labels, SALT);
    let buckets = by_bucket(&of(&[]));
    assert!(buckets[..500].iter().all(|number| *number == 2));
    assert!(buckets[500..700].iter().all(|number| *number == 3));
    assert!(buckets[700..].iter().all(|number| *number == 1));
    let arms = |split: &Split| -> Vec<(u64, &'static str, u16)> {
        let named = |arm: &Arm| if *arm == Arm::Stable { "stable" } else { "canary" };
        split.shares().map(|(version, arm, share)| (version.get(), named(arm), share)).collect()
    };
    let wanted = [(2, "canary", 500), (3, "canary", 200), (1, "stable", 9300)];
    assert_eq!(arms(&of(&[])), wanted);
    // The label decides, if it is on one with a weight.
    let wanted = [(1, "canary", 9300), (3, "canary", 200), (2, "stable", 500)];
    assert_eq!(arms(&of(&[("stable", 2)])), wanted);
    assert_eq!(by_bucket(&of(&[("stable", 9)])), buckets);
    assert_eq!(of(&[("stable", 3)]).usual().unwrap().version, version(3));
}

proptest! {
    #[test]
    fn every_version_gets_its_share_of_the_buckets(
        weights in prop::collection::vec(prop_oneof![0.0..100.0_f64, Just(0.0), 1e-9..1e9_f64], 1..20),
        stable in 1_u64..20,
    ) {
        let traffic = weighing(&weights);
        prop_assume!(traffic.check().is_ok());
        let all: Vec<u64> = (1..=weights.len() as u64).collect();
        let split = split_of(&traffic, &all, &[("stable", stable)], SALT);
        let buckets = by_bucket(&split);
        for (version, share) in traffic.shares_beside(Some(version(stable))) {
            prop_assert_eq!(count(&buckets, version.get()), usize::from(share));
        }
        for (version, _, share) in split.shares() {
            prop_assert_eq!(count(&buckets, version.get()), usize::from(share));
        }
    }

    #[test]
    fn raising_a_weight_moves_nobody_back(
        weights in prop::collection::vec(prop_oneof![0.001..100.0_f64, 1e-6..1e6_f64], 2..6),
        raised in 0_usize..5,
        by in prop_oneof![1e-9..1e-3_f64, 0.0..3.0_f64, 1.0..1e6_f64],
        salt in any::<u64>(),
    ) {
        let raised = raised % weights.len();
        let mut more = weights.clone();
        more[raised] *= 1.0 + by;
        let all: Vec<u64> = (1..=weights.len() as u64).collect();
        let of = |weights: &[f64]| split_of(&weighing(weights), &all, &[("stable", 1)], salt);
        let (before, after) = (of(&weights), of(&more));
        let number = raised as u64 + 1;
        for (before, after) in by_bucket(&before).into_iter().zip(by_bucket(&after)) {
            prop_assert!(before != number || after == number, "{before} moved to {after}");
        }
        for user in 0..200 {
            let call = keyed(&format!("user-{user}"));
            let chosen = |split: &Split| choose(split, &call, &[]).version.get();
            prop_assert!(chosen(&before) != number || chosen(&after) == number);
        }
    }

    #[test]
    fn those_that_are_loaded_share_what_is_not(
        weights in prop::collection::vec(0.01..100.0_f64, 2..6),
        missing in prop::collection::btree_set(1_u64..6, 1..5),
    ) {
        let traffic = weighing(&weights);
        let all: Vec<u64> = (1..=weights.len() as u64).collect();
        let here: Vec<u64> = all.iter().copied().filter(|v| !missing.contains(v)).collect();
        let whole = by_bucket(&split_of(&traffic, &all, &[], SALT));
        let shares = traffic.shares();
        let left: f64 = here.iter().map(|number| f64::from(shares[&version(*number)])).sum();
        let part = split_of(&traffic, &here, &[], SALT);
        if left == 0.0 {
            prop_assert!(part.at(0, false).is_none() && part.usual().is_none());
            return Ok(());
        }
        let buckets = by_bucket(&part);
        for (before, after) in whole.iter().zip(&buckets) {
            prop_assert!(here.contains(after));
            prop_assert!(!here.contains(before) || before == after, "{before} moved to {after}");
        }
        for number in here {
            let wanted = f64::from(shares[&version(number)]) / left * 10_000.0;
            let got = count(&buckets, number) as f64;
            // One rounding for each version that is missing.
            prop_assert!((got - wanted).abs() <= 5.0, "{number}: {got} for {wanted}");
        }
    }

    #[test]
    fn nothing_makes_it_panic(
        weights in prop::collection::btree_map(1_u64..9, any::<f64>(), 0..9),
        loaded in prop::collection::vec(1_u64..9, 0..9),
        key in prop::option::of(".{0,300}"),
        hash in any::<u64>(),
    ) {
        let weights = weights.into_iter().map(|(number, weight)| (version(number), weight));
        let traffic = Traffic { weights: weights.collect(), ..Traffic::default() };
        let split = split_of(&traffic, &loaded, &[], hash);
        let call = CallMeta { sticky_key: key, ..call() };
        let keys = Keys { call: &call, parameters: &[], prediction_id: Uuid::nil() };
        let chosen = split.choose(&keys).map(|choice| choice.version.get());
        prop_assert!(chosen.is_none_or(|number| loaded.contains(&number)));
        prop_assert!(bucket(hash) < BUCKETS);
    }
}

/// The number of 100,000 keys on each version lies within the exact binomial interval of 99.9 %,
/// for sticky keys and for prediction ids.
#[test]
fn the_split_is_within_the_binomial_interval() {
    const KEYS: u32 = 100_000;
    let weights = [88.0, 5.0, 1.0, 6.0];
    let split = split(&weights);
    let mut random = Random(11);
    let keys: BTreeSet<String> = (0..KEYS).map(|at| format!("{:x}-{at}", random.next())).collect();
    let ids: Vec<Uuid> = (0..KEYS).map(|_| Uuid::now_v7()).collect();
    let by_key = keys.iter().map(|key| choose(&split, &keyed(key), &[]).version.get());
    let by_key: Vec<u64> = by_key.collect();
    let (call, parameters) = (call(), &[]);
    let by_id = ids.iter().map(|id| {
        let keys = Keys { call: &call, parameters, prediction_id: *id };
        split.choose(&keys).unwrap().version.get()
    });
    let by_id: Vec<u64> = by_id.collect();
    for (number, weight) in (1..).zip(weights) {
        let exact = Binomial::new(weight / 100.0, KEYS.into()).unwrap();
        let interval =
            |alpha: f64| exact.inverse_cdf(alpha / 2.0)..=exact.inverse_cdf(1.0 - alpha / 2.0);
        let (of_keys, of_ids) = (count(&by_key, number) as u64, count(&by_id, number) as u64);
        assert!(interval(0.001).contains(&of_keys), "{number}: {of_keys} keys");
        // These are new in each run of the test: an interval that is left once in 10^9 of them.
        assert!(interval(1e-9).contains(&of_ids), "{number}: {of_ids} ids");
    }
}

#[test]
fn another_salt_is_another_assignment() {
    let traffic = weighing(&[50.0, 50.0]);
    let splits = [1, 2].map(|salt| split_of(&traffic, &[1, 2], &[], salt));
    let differs = |key: &u32| {
        let call = keyed(&key.to_string());
        let [a, b] = splits.each_ref().map(|split| choose(split, &call, &[]).version);
        a != b
    };
    let moved = (0..10_000_u32).filter(differs).count();
    assert!((4700..5300).contains(&moved), "{moved} of 10,000 keys moved");
}

#[test]
fn one_key_is_one_version_wherever_it_stands() {
    let mut traffic = weighing(&[50.0, 50.0]);
    let reason = |split: &Split, call: &CallMeta, parameters: &[(String, ParameterValue)]| {
        choose(split, call, parameters).reason
    };
    let plain = split_of(&traffic, &[1, 2], &[], SALT);
    let wanted = reason(&plain, &keyed("42"), &[]);
    assert!(matches!(wanted, RouteReason::Weight { sticky: true, share: 5000, .. }), "{wanted:?}");

    traffic.sticky = Some(Sticky::Header("X-User".to_owned()));
    let by_header = split_of(&traffic, &[1, 2], &[], SALT);
    let with_header = |name: &str, value: &str| {
        let named = vec![(name.into(), value.to_owned())];
        CallMeta { headers: RouteHeaders { named, ..RouteHeaders::default() }, ..call() }
    };
    assert_eq!(reason(&by_header, &with_header("x-user", "42"), &[]), wanted);
    assert_eq!(by_header.header_names(), [Arc::from("x-user")]);

    traffic.sticky = Some(Sticky::Parameter("user".to_owned()));
    let by_parameter = split_of(&traffic, &[1, 2], &[], SALT);
    assert!(by_parameter.header_names().is_empty());
    for value in [
        ParameterValue::String("42".to_owned()),
        ParameterValue::Int(42),
        ParameterValue::Uint(42),
        ParameterValue::Double(42.0),
    ] {
        let parameters = [("other".to_owned(), ParameterValue::Int(1)), ("user".to_owned(), value)];
        assert_eq!(reason(&by_parameter, &call(), &parameters), wanted);
    }
    let other = [("user".to_owned(), ParameterValue::Int(7))];
    assert_eq!(reason(&by_parameter, &keyed("42"), &other), wanted, "the key's own header wins");
    let configured = CallMeta {
        headers: RouteHeaders { sticky_key: Some("42".into()), ..RouteHeaders::default() },
        ..call()
    };
    assert_eq!(reason(&plain, &configured, &[]), wanted);
    assert_ne!(reason(&by_parameter, &configured, &other), wanted, "the table's own comes first");

    // What is no key: nothing, or too much.
    let long = "x".repeat(STICKY_KEY_LEN_MAX + 1);
    for key in ["", &long] {
        let reason = reason(&plain, &keyed(key), &[]);
        assert!(matches!(reason, RouteReason::Weight { sticky: false, .. }), "{reason:?}");
    }
}

#[test]
fn rules_come_before_weights_and_in_order() {
    let mut traffic = weighing(&[100.0]);
    traffic.sticky = Some(Sticky::Header("x-user".to_owned()));
    let rule = |name: &str, equals: Option<&str>, prefix: Option<&str>, to: &str| Rule {
        name: name.parse().unwrap(),
        header: "X-Group".to_owned(),
        equals: equals.map(str::to_owned),
        prefix: prefix.map(str::to_owned),
        version: to.parse().unwrap(),
    };
    traffic.rules = vec![
        rule("gone", None, Some("b"), "9"),
        rule("beta", Some("beta"), None, "2"),
        rule("b", None, Some("b"), "next"),
        rule("back", Some("s"), None, "stable"),
        rule("nowhere", Some("n"), None, "unknown"),
    ];
    let split = split_of(&traffic, &[1, 2, 3], &[("next", 3)], SALT);
    let names: Vec<&str> = split.header_names().iter().map(|name| &**name).collect();
    assert_eq!(names, ["x-group", "x-user"]);
    let cases = [
        ("beta", 2, "beta"),
        ("b", 3, "b"),
        ("beta2", 3, "b"),
        ("s", 1, "back"),
        ("n", 1, "stable"),
        ("x", 1, "stable"),
        ("Beta", 1, "stable"),
    ];
    for (group, number, arm) in cases {
        let named = vec![("x-group".into(), group.to_owned())];
        let call =
            CallMeta { headers: RouteHeaders { named, ..RouteHeaders::default() }, ..keyed("u") };
        let chosen = choose(&split, &call, &[]);
        assert_eq!((chosen.version.get(), chosen.arm.as_str()), (number, arm), "{group}");
    }
    // A rule leads where no weight does, but does not make up for what has one.
    let only = split_of(&traffic, &[2], &[], SALT);
    let named = vec![("x-group".into(), "beta".to_owned())];
    let call =
        CallMeta { headers: RouteHeaders { named, ..RouteHeaders::default() }, ..keyed("u") };
    assert_eq!(choose(&only, &call, &[]).version, version(2));
    assert!(only.usual().is_none());
}

#[test]
fn shadows_are_sampled_by_the_prediction_id() {
    let mut traffic = weighing(&[50.0, 50.0]);
    let shadow = |number, percent| Shadow { version: version(number), percent };
    traffic.shadows =
        vec![shadow(3, 12.5), shadow(4, 100.0), shadow(1, 100.0), shadow(5, 0.0), shadow(6, 50.0)];
    let split = split_of(&traffic, &[1, 2, 3, 4, 5], &[], SALT);
    let mut hits = BTreeMap::<(u64, u64), u64>::new();
    let call = call();
    for _ in 0..40_000 {
        let id = Uuid::now_v7();
        let keys = Keys { call: &call, parameters: &[], prediction_id: id };
        let primary = split.choose(&keys).unwrap().version;
        let hit: Vec<(u64, u16)> =
            split.mirrors(id, primary).map(|(version, share)| (version.get(), share)).collect();
        let again: Vec<(u64, u16)> =
            split.mirrors(id, primary).map(|(version, share)| (version.get(), share)).collect();
        assert_eq!(hit, again);
        for (number, share) in hit {
            assert_eq!(share, if number == 3 { 1250 } else { 10_000 });
            *hits.entry((primary.get(), number)).or_default() += 1;
        }
    }
    // Nothing runs beside itself, nothing that is not loaded, nothing for no percent.
    assert!(hits.keys().all(|(primary, number)| primary != number && *number < 5), "{hits:?}");
    assert_eq!(hits[&(1, 4)] + hits[&(2, 4)], 40_000);
    // The sample hangs on no version.
    for primary in [1, 2] {
        let of_primary = hits[&(primary, 4)];
        let exact = Binomial::new(0.125, of_primary).unwrap();
        let interval = exact.inverse_cdf(5e-10)..=exact.inverse_cdf(1.0 - 5e-10);
        assert!(interval.contains(&hits[&(primary, 3)]), "{hits:?}");
    }
}
