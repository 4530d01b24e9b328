//! What reports and labels make of conditions.

use std::sync::Arc;

use super::*;
use crate::drift::counters::Score;
use crate::monitor::{Counted, MeanReport, Odd, ReferenceReport};
use crate::quality::{ClassRow, Figures, Judged, Tally};

fn limits() -> Limits {
    Limits {
        rows_min: 500,
        window: "hour",
        odd_max: BTreeMap::from([("nan", 0.01), ("missing", 0.05)]),
        quality: Vec::new(),
    }
}

fn feature(name: &str, role: Role, state: State) -> FeatureReport {
    FeatureReport {
        feature: name.to_owned(),
        role,
        tensor: "x".to_owned(),
        rows: 1000,
        state,
        scores: BTreeMap::from([(Score::CellPsi, 0.4), (Score::Wasserstein, f64::INFINITY)]),
        beyond: BTreeMap::from([(Score::CellPsi, 0.1)]),
        p_value: Some(1e-9),
        ln_evidence: Some(12.0),
        alarm: false,
        constant: false,
        mean: None,
        odd: BTreeMap::new(),
    }
}

fn window(name: &'static str, features: Vec<FeatureReport>) -> WindowReport {
    let drifted = features.iter().filter(|of| of.state == State::Drifted).count();
    WindowReport { window: name, since: None, rows: 1000, state: State::Steady, drifted, features }
}

fn report(kind: &'static str, windows: Vec<WindowReport>) -> Arc<VersionReport> {
    let reference = ReferenceReport { kind, digest: Some("sha256:1".into()), ..Default::default() };
    let (total, own) = (Counted::default(), Counted::default());
    let arms = vec![ArmReport {
        arm: "stable".to_owned(),
        total,
        own,
        windows,
        confidence_drop: Vec::new(),
        new_categories: Vec::new(),
    }];
    Arc::new(VersionReport {
        model: "loans".to_owned(),
        version: "2".to_owned(),
        model_digest: "sha256:0".to_owned(),
        reference,
        skipped_rows: 0,
        arms,
    })
}

fn find<'a>(found: &'a BTreeMap<Subject, Found>, kind: Kind, about: &str) -> &'a Found {
    found.iter().find(|(of, _)| of.kind == kind && of.about == about).unwrap().1
}

fn detail(found: &Found) -> &Detail {
    match found {
        Found::Holds(detail) => detail,
        other => panic!("{other:?}"),
    }
}

fn rows(features: Vec<FeatureReport>) -> BTreeMap<Subject, Found> {
    of_rows(&[report("file", vec![window("hour", features)])], &limits())
}

#[test]
fn inputs_and_outputs_are_told_apart_with_effect_and_evidence() {
    let mut strong = feature("income", Role::Input, State::Drifted);
    strong.scores.insert(Score::CellPsi, 0.9);
    let found = rows(vec![
        feature("age", Role::Input, State::Drifted),
        strong,
        feature("rooms", Role::Input, State::Steady),
        feature("confidence(y)", Role::Output, State::Steady),
    ]);
    let inputs = detail(find(&found, Kind::Drift, "inputs"));
    assert_eq!(
        (inputs.features_beyond, inputs.rows, inputs.window.as_deref()),
        (2, 1000, Some("hour"))
    );
    let names: Vec<&str> = inputs.features.iter().map(|of| &*of.feature).collect();
    assert_eq!(names, ["income", "age"], "the strongest first");
    let first = &inputs.features[0];
    assert_eq!((first.scores["cell_psi"], first.limits["cell_psi"]), (0.9, 0.1));
    assert_eq!((first.p_value, first.ln_evidence), (Some(1e-9), Some(12.0)));
    assert_eq!(inputs.reference.as_deref(), Some("sha256:1"));
    assert_eq!(*find(&found, Kind::Drift, "outputs"), Found::Clear);
    // Whatever is listed, its JSON can be read again.
    let json = serde_json::to_string(inputs).unwrap();
    assert_eq!(serde_json::from_str::<Detail>(&json).unwrap(), *inputs);
}

#[test]
fn what_nobody_vouches_for_and_too_few_rows_say_nothing() {
    for kind in ["provisional", "learning", "none"] {
        let drifted = vec![feature("age", Role::Input, State::Drifted)];
        let found = of_rows(&[report(kind, vec![window("hour", drifted)])], &limits());
        assert!(found.is_empty(), "{kind}");
    }
    let mut few = feature("age", Role::Input, State::Drifted);
    few.rows = 499;
    few.odd.insert("nan", Odd { rows: 499, reference: 0.0 });
    let found = rows(vec![few, feature("rooms", Role::Output, State::InsufficientData)]);
    assert_eq!(*find(&found, Kind::Drift, "inputs"), Found::Unknown);
    assert_eq!(*find(&found, Kind::Drift, "outputs"), Found::Unknown);
    // The other feature has rows enough to see that they are no NaN.
    assert_eq!(*find(&found, Kind::DataQuality, "nan"), Found::Clear);
}

#[test]
fn a_model_that_is_less_sure_is_told_of() {
    let mean = |state| MeanReport {
        rows: 900,
        mean: 0.7,
        reference_mean: 0.9,
        band: 0.02,
        limit: 0.05,
        state,
    };
    let judged = |state: &'static str, dropped: &[&str]| {
        let mut confidence = feature("confidence(x)", Role::Output, State::Steady);
        confidence.mean = Some(mean(state));
        let mut other = feature("x[0]", Role::Output, State::Steady);
        other.mean = Some(mean("down"));
        let mut report =
            VersionReport::clone(&report("file", vec![window("hour", vec![confidence, other])]));
        report.arms[0].confidence_drop = dropped.iter().map(|name| (*name).to_owned()).collect();
        of_rows(&[Arc::new(report)], &limits())
    };
    let found = judged("down", &["x"]);
    let dropped = detail(find(&found, Kind::ConfidenceDrop, "outputs"));
    let [only] = &dropped.features[..] else { panic!("{dropped:?}") };
    assert_eq!((&*only.feature, only.rows, only.scores["mean"]), ("confidence(x)", 900, 0.7));
    assert!((only.limits["mean"] - 0.85).abs() < 1e-12, "{only:?}");
    let (subject, _) = found.iter().find(|(of, _)| of.kind == Kind::ConfidenceDrop).unwrap();
    let said = summary(&"loans".parse().unwrap(), subject, dropped);
    assert_eq!(said, "loans version 2 (stable) is less sure of 1 output: confidence(x)");
    let steady = judged("steady", &[]);
    assert_eq!(*find(&steady, Kind::ConfidenceDrop, "outputs"), Found::Clear);
    let few = judged("insufficient_data", &[]);
    assert_eq!(*find(&few, Kind::ConfidenceDrop, "outputs"), Found::Unknown);
    // Of a model without scores there is nothing to say.
    let none = rows(vec![feature("y[0]", Role::Output, State::Steady)]);
    assert!(none.keys().all(|of| of.kind != Kind::ConfidenceDrop));
}

#[test]
fn the_window_is_the_one_that_is_asked_for() {
    let windows = || {
        vec![
            window("hour", vec![feature("age", Role::Input, State::Steady)]),
            window("day", vec![feature("age", Role::Input, State::Drifted)]),
        ]
    };
    let by = |name| of_rows(&[report("frozen", windows())], &Limits { window: name, ..limits() });
    assert_eq!(*find(&by("hour"), Kind::Drift, "inputs"), Found::Clear);
    assert_eq!(detail(find(&by("day"), Kind::Drift, "inputs")).window.as_deref(), Some("day"));
}

#[test]
fn an_alarm_needs_no_effect() {
    let mut alarmed = feature("age", Role::Output, State::Steady);
    alarmed.alarm = true;
    alarmed.beyond.clear();
    let found = rows(vec![alarmed, feature("rooms", Role::Input, State::Steady)]);
    assert_eq!(detail(find(&found, Kind::Alarm, "outputs")).features[0].ln_evidence, Some(12.0));
    assert_eq!(*find(&found, Kind::Alarm, "inputs"), Found::Clear);
    assert_eq!(*find(&found, Kind::Drift, "outputs"), Found::Clear);
    assert_eq!(Kind::Alarm.severity(), Severity::Info);
}

#[test]
fn odd_rows_count_by_their_lower_bound_and_above_the_reference() {
    let share = |rows, reference| {
        let mut odd = feature("age", Role::Input, State::Steady);
        odd.odd.insert("nan", Odd { rows, reference });
        rows_of(odd)
    };
    fn rows_of(feature: FeatureReport) -> Found {
        find(&rows(vec![feature]), Kind::DataQuality, "nan").clone()
    }
    assert_eq!(share(11, 0.0), Found::Clear, "1.1 % may be 1 % by chance");
    let beyond = share(30, 0.0);
    let found = &detail(&beyond).features[0];
    assert_eq!((found.scores["nan"], found.limits["nan"]), (0.03, 0.01));
    assert!(found.low.is_some_and(|low| (0.01..0.03).contains(&low)));
    assert_eq!(share(30, 0.03), Found::Clear, "the reference has as many");
    assert_eq!(share(1000, 0.999), Found::Clear, "no more than all");
}

#[test]
fn lists_are_cut_and_counted() {
    let many = (0..400).map(|at| {
        let name = format!("{at}{}", "n".repeat(1000));
        feature(&name, Role::Input, State::Drifted)
    });
    let found = rows(many.collect());
    let detail = detail(find(&found, Kind::Drift, "inputs"));
    assert_eq!((detail.features.len(), detail.features_beyond), (FEATURES_MAX, 400));
    assert!(detail.features.iter().all(|of| of.feature.len() == NAME_BYTES_MAX));
    let subject = found.keys().find(|of| of.kind == Kind::Drift).unwrap();
    let text = summary(&"loans".parse().unwrap(), subject, detail);
    assert!(text.starts_with("400 inputs of loans version 2 (stable) drifted: "), "{text}");
    assert!(text.ends_with('…') && text.len() < 600, "{text}");
}

fn labels(right: u64, wrong: u64) -> Report {
    let row = |at| ClassRow {
        label: "a".to_owned(),
        predicted: if at < right { "a" } else { "b" }.to_owned(),
        scores: None,
    };
    let judged = Judged::Classification((0..right + wrong).map(row).collect());
    let all = Figures::from(&Tally::of_label(Some(&judged)));
    let version = Version::new(2).unwrap();
    Report {
        model: "loans".to_owned(),
        from: "2026-11-01".to_owned(),
        to: "2026-11-26".to_owned(),
        versions: vec![VersionQuality { version, all, arms: BTreeMap::new() }],
    }
}

#[test]
fn labels_hold_a_metric_to_its_limit_by_its_bound() {
    let limit = |metric: &str, min, max| QualityLimit {
        models: crate::admit::ModelPatterns::parse(&["loan*"]).unwrap(),
        metric: metric.to_owned(),
        min,
        max,
        days: Some(7),
    };
    let judged = |model: &str, limit: QualityLimit, right, wrong| {
        let limits = Limits { quality: vec![limit], ..limits() };
        let found = of_labels(&model.parse().unwrap(), &limits, |days| {
            assert_eq!(days, Some(7));
            labels(right, wrong)
        });
        found.into_values().next()
    };
    let accuracy = |right, wrong| judged("loans", limit("accuracy", Some(0.9), None), right, wrong);
    assert_eq!(accuracy(950, 50), Some(Found::Clear));
    // Below it, and no evidence for that.
    assert_eq!(accuracy(890, 110), Some(Found::Clear));
    assert_eq!(accuracy(0, 499), Some(Found::Unknown));
    let found = accuracy(800, 200).unwrap();
    let metric = detail(&found).metric.clone().unwrap();
    assert_eq!((metric.value, metric.limit, &*metric.bound), (0.8, 0.9, "min"));
    assert!(metric.low < 0.8 && metric.high > 0.8 && metric.high < 0.9, "{metric:?}");
    assert_eq!(detail(&found).rows, 1000);
    assert_eq!(judged("fraud", limit("accuracy", Some(0.9), None), 0, 1000), None);
    let most = judged("loans", limit("accuracy", None, Some(0.5)), 900, 100).unwrap();
    assert_eq!(detail(&most).metric.as_ref().unwrap().bound, "max");
    assert_eq!(judged("loans", limit("mae", None, Some(0.5)), 900, 100), Some(Found::Unknown));
    assert_eq!(judged("loans", limit("clicks", Some(1.0), None), 900, 100), Some(Found::Unknown));
}
