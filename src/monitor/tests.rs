#![expect(clippy::cast_possible_truncation, reason = "single floats are what models take")]

use std::path::Path;
use std::time::{Duration, Instant};

use super::compare::LEARN_ROWS;
use super::*;
use crate::domain::{DataType, Dim};
use crate::drift::learn::{LearnSettings, Learner};
use crate::drift::random;
use crate::drift::verdict::State;

fn signature() -> Signature {
    let spec = |name: &str, width: usize| TensorSpec {
        name: name.to_owned(),
        datatype: DataType::Fp32,
        shape: Some([Dim::Dynamic(None), Dim::Fixed(width)].into_iter().collect()),
    };
    Signature { inputs: vec![spec("x", 2)], outputs: vec![spec("y", 2)], batched: true }
}

fn settings(dir: &Path) -> Settings {
    Settings {
        interval: Duration::from_millis(1),
        values_per_second_max: 1_000_000_000,
        queue_max: 1 << 20,
        queue_bytes_max: 1 << 30,
        provisional_rows: 2000,
        ..Settings::new(dir)
    }
}

fn floats(shape: &[usize], values: &[f32]) -> Tensor {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Tensor::new(DataType::Fp32, shape.into(), data.into()).unwrap()
}

/// One row: two normal numbers, the first moved by `shift`, and the scores of two classes.
fn row(number: u64, shift: f32) -> [[f32; 2]; 2] {
    let (a, b) = (random::normal(1, number) as f32, random::normal(2, number) as f32);
    let score = 1.0 / (1.0 + (-(a + shift)).exp());
    [[a + shift, b], [score, 1.0 - score]]
}

fn offer(watch: &Arc<Watch>, arm: &Arm, rows: std::ops::Range<u64>, shift: f32) {
    for number in rows {
        let [x, y] = row(number, shift);
        watch.offer(arm, &[floats(&[1, 2], &x)], &[floats(&[1, 2], &y)]);
    }
}

/// A profile of 5,000 rows as [`offer`] makes them.
fn reference() -> Given {
    reference_of(&[Role::Input, Role::Output])
}

/// The same, of a table that has only some of the columns.
fn reference_of(roles: &[Role]) -> Given {
    let mut features = features_of(&signature());
    features.retain(|feature| roles.contains(&feature.role));
    let plan = crate::drift::rows::Plan::new(&features);
    let how = LearnSettings { keep_values: true, ..LearnSettings::default() };
    let mut learner = Learner::new(features, how).unwrap();
    let mut scratch = crate::drift::rows::Scratch::default();
    for number in 100_000..105_000 {
        let [x, y] = row(number, 0.0);
        for (role, name, values) in [(Role::Input, "x", x), (Role::Output, "y", y)] {
            let tensor = floats(&[1, 2], &values);
            plan.read(role, name, &tensor, true, &mut scratch, |_, feature, value| {
                learner.add(feature, value);
            });
        }
    }
    let of = ("m".parse().unwrap(), None);
    let profile = learner.finish(of, "test", jiff::Timestamp::UNIX_EPOCH).unwrap().profile;
    let bytes = profile.write().unwrap();
    let profile = Arc::new(Profile::read(&bytes).unwrap());
    Given::File(bytes.into(), profile)
}

fn watch(monitor: &Monitor, given: Given) -> Arc<Watch> {
    let digest = Digest::new([7; 32]);
    let (model, version) = ("m".parse().unwrap(), Version::new(1).unwrap());
    monitor.watch(&model, version, digest, &signature(), given, Vec::new())
}

/// The report once it is as wanted; it may take a turn or two.
fn report(monitor: &Monitor, wanted: impl Fn(&VersionReport) -> bool) -> Arc<VersionReport> {
    let began = Instant::now();
    loop {
        let reports = monitor.reports(&"m".parse().unwrap());
        if let Some(report) = reports.into_iter().find(|report| wanted(report)) {
            return report;
        }
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", monitor.shared.reports.lock());
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn arm<'a>(report: &'a VersionReport, name: &str) -> Option<&'a ArmReport> {
    report.arms.iter().find(|arm| arm.arm == name)
}

fn rows_are(report: &VersionReport, name: &str, rows: u64) -> bool {
    arm(report, name).is_some_and(|arm| arm.total.rows == rows)
}

#[test]
fn what_a_reference_lacks_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watch = watch(&monitor, reference_of(&[Role::Input]));
    offer(&watch, &Arm::Stable, 0..300, 0.0);
    let found = report(&monitor, |report| rows_are(report, "stable", 300));
    assert_eq!(
        (found.reference.kind, &found.reference.without[..]),
        ("file", &["y".to_owned()][..])
    );
    let features = &arm(&found, "stable").unwrap().windows[0].features;
    assert!(features.iter().all(|feature| feature.role == Role::Input), "{features:?}");
}

#[test]
fn a_shift_is_seen_and_its_absence_too() {
    let dir = tempfile::tempdir().unwrap();
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watch = watch(&monitor, reference());
    offer(&watch, &Arm::Stable, 0..3000, 0.0);
    offer(&watch, &Arm::Canary, 3000..6000, 1.0);
    let report = report(&monitor, |report| {
        rows_are(report, "stable", 3000) && rows_are(report, "canary", 3000)
    });
    assert_eq!((report.reference.kind, report.skipped_rows), ("file", 0));
    assert_eq!(report.reference.without, Vec::<String>::new());
    let window = |name: &str, window: &str| {
        let arm = arm(&report, name).unwrap();
        arm.windows.iter().find(|found| found.window == window).unwrap().clone()
    };
    for name in ["hour", "day"] {
        let hour = window("stable", name);
        assert_eq!((hour.state, hour.drifted, hour.rows), (State::Steady, 0, 3000), "{name}");
        assert!(hour.features.iter().all(|feature| !feature.alarm), "{hour:?}");
    }
    let hour = window("canary", "hour");
    assert_eq!(hour.state, State::Drifted);
    let drifted = |name: &str| {
        let feature = hour.features.iter().find(|feature| feature.feature == name).unwrap();
        (feature.state == State::Drifted, feature.alarm)
    };
    assert_eq!((drifted("x[0]"), drifted("x[1]")), ((true, true), (false, false)));
    assert_eq!(drifted("class(y)"), (true, true));
    // The latest values, as scipy would have them: the mean moved by one standard deviation.
    let latest = window("canary", "latest");
    let moved = latest.features.iter().find(|feature| feature.feature == "x[0]").unwrap();
    let score = moved.scores[&crate::drift::counters::Score::Wasserstein];
    assert!((score - 1.0).abs() < 0.1, "{score}");
    let families = monitor.families();
    let of = |name: &str| families.iter().find(|family| family.name == name).unwrap();
    assert!(of("tidegate_drift_score").samples.len() > 10);
    assert_eq!(of("tidegate_drift_samples").samples.len(), 2);
}

#[test]
fn odd_values_are_counted_by_kind() {
    let dir = tempfile::tempdir().unwrap();
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watch = watch(&monitor, reference());
    let x = floats(&[3, 2], &[f32::NAN, 0.0, 1000.0, 0.0, f32::INFINITY, 0.1]);
    let y = floats(&[3, 2], &[0.5, 0.5, 0.5, 0.5, 0.5, 0.5]);
    watch.offer(&Arm::Pinned, &[x], &[y]);
    let report = report(&monitor, |report| rows_are(report, "pinned", 3));
    let pinned = arm(&report, "pinned").unwrap();
    let Oddities { nan, infinite, far_out, .. } = pinned.total.quality;
    assert_eq!((nan, infinite, far_out, pinned.total.outlier_rows), (1, 1, 1, 1));
    assert_eq!(pinned.windows[0].state, State::InsufficientData);
}

#[test]
fn rows_of_another_length_than_any_before_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let wanted = Settings { provisional_rows: 200, ..settings(dir.path()) };
    let monitor = Monitor::start(wanted).unwrap().unwrap();
    let spec = |name: &str, width: Dim| TensorSpec {
        name: name.to_owned(),
        datatype: DataType::Fp32,
        shape: Some([Dim::Dynamic(None), width].into_iter().collect()),
    };
    let (inputs, outputs) = (vec![spec("x", Dim::Dynamic(None))], vec![spec("y", Dim::Fixed(1))]);
    let signature = Signature { inputs, outputs, batched: true };
    let (model, version) = ("m".parse().unwrap(), Version::new(1).unwrap());
    let (digest, given) = (Digest::new([7; 32]), Given::Nothing);
    let watched = monitor.watch(&model, version, digest, &signature, given, Vec::new());
    let send = |length: usize| {
        let x: Vec<f32> = (0..length).map(|at| at as f32).collect();
        watched.offer(&Arm::Stable, &[floats(&[1, length], &x)], &[floats(&[1, 1], &[0.5])]);
    };
    (0..200).for_each(|row| send(4 + row % 6));
    report(&monitor, |report| report.reference.kind == "provisional");
    [4, 9, 3, 10, 12].into_iter().for_each(send);
    let found = report(&monitor, |report| rows_are(report, "stable", 5));
    let counted = arm(&found, "stable").unwrap().total;
    assert_eq!((counted.quality.shape, counted.outlier_rows), (3, 3));
    let families = monitor.families();
    let quality = families.iter().find(|family| family.name == "tidegate_data_quality_total");
    let shape = |labels: &crate::observe::page::Labels| {
        labels.iter().any(|(name, value)| name == "kind" && value == "shape")
    };
    let sample = quality.unwrap().samples.iter().find(|sample| shape(&sample.labels)).unwrap();
    assert_eq!(sample.value, crate::observe::page::Value::Number(3.0));
}

#[test]
fn a_reference_is_learnt_kept_and_frozen() {
    let dir = tempfile::tempdir().unwrap();
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watched = watch(&monitor, Given::Nothing);
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let freeze = |monitor: &Monitor| {
        let (model, version) = ("m".parse().unwrap(), Version::new(1).unwrap());
        runtime.block_on(monitor.freeze(&model, version))
    };
    // Of other arms nothing is learnt.
    offer(&watched, &Arm::Canary, 0..500, 3.0);
    offer(&watched, &Arm::Stable, 0..1999, 0.0);
    report(&monitor, |report| report.reference.rows == 1999);
    assert!(matches!(freeze(&monitor), Err(FreezeError::Learning { have: 1999, wanted: 2000 })));
    offer(&watched, &Arm::Stable, 1999..2000, 0.0);
    report(&monitor, |report| report.reference.kind == "provisional");
    offer(&watched, &Arm::Stable, 2000..2500, 0.0);
    report(&monitor, |report| rows_are(report, "stable", 500));
    monitor.stop();
    drop(watched);

    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watched = watch(&monitor, Given::Nothing);
    // The windows go on.
    let found = report(&monitor, |report| rows_are(report, "stable", 500));
    assert_eq!((found.reference.kind, found.reference.rows), ("provisional", 2000));
    assert_eq!(freeze(&monitor).unwrap().reference.kind, "frozen");
    drop(watched);
    drop(monitor);

    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watched = watch(&monitor, Given::Nothing);
    let found = report(&monitor, |report| rows_are(report, "stable", 500));
    assert_eq!(found.reference.kind, "frozen");
    // Its bytes are others: nothing of the old ones counts.
    drop(watched);
    let other = monitor.watch(
        &"m".parse().unwrap(),
        Version::new(1).unwrap(),
        Digest::new([8; 32]),
        &signature(),
        Given::Nothing,
        Vec::new(),
    );
    let found = report(&monitor, |report| report.reference.kind == "learning");
    assert!(found.arms.is_empty());
    drop(other);
    report_gone(&monitor);
}

fn report_gone(monitor: &Monitor) {
    let began = Instant::now();
    while !monitor.reports(&"m".parse().unwrap()).is_empty() {
        assert!(began.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn what_does_not_fit_begins_anew() {
    let dir = tempfile::tempdir().unwrap();
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watched = watch(&monitor, reference());
    offer(&watched, &Arm::Stable, 0..300, 0.0);
    report(&monitor, |report| rows_are(report, "stable", 300));
    drop(monitor);
    drop(watched);
    let id = "m/1-0707070707070707/counters";
    let path = dir.path().join("monitor").join(id);
    let whole = std::fs::read(&path).unwrap();
    let mut damaged = whole.clone();
    damaged[100] ^= 4;
    for (wrong, rows) in [(&damaged[..], 0), (&whole[..40], 0), (b"{}", 0), (&[], 0), (&whole, 300)]
    {
        std::fs::write(&path, wrong).unwrap();
        let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
        // Restored without its files.
        let watched = watch(&monitor, Given::AsBefore);
        let found = report(&monitor, |report| report.reference.kind == "file");
        assert_eq!(arm(&found, "stable").map_or(0, |arm| arm.total.rows), rows, "{}", wrong.len());
        drop(watched);
    }
}

#[test]
fn the_budget_and_the_queue_hold() {
    let dir = tempfile::tempdir().unwrap();
    let few = Settings { values_per_second_max: 100, ..settings(dir.path()) };
    let monitor = Monitor::start(few).unwrap().unwrap();
    let watched = watch(&monitor, reference());
    offer(&watched, &Arm::Stable, 0..1000, 0.0);
    let found = report(&monitor, |report| report.skipped_rows > 900);
    let seen = arm(&found, "stable").map_or(0, |arm| arm.total.rows);
    assert!(seen + found.skipped_rows <= 1000 && seen < 100, "{seen}");
    drop(monitor);
    let none = Settings { features_max: 3, ..settings(&dir.path().join("other")) };
    let monitor = Monitor::start(none).unwrap().unwrap();
    let watched = watch(&monitor, reference());
    offer(&watched, &Arm::Stable, 0..10, 0.0);
    let found = report(&monitor, |report| report.skipped_rows == 10);
    assert_eq!(found.reference.kind, "none");
    assert!(found.reference.problem.as_ref().is_some_and(|why| why.contains("features_max")));
}

#[test]
fn a_reference_that_comes_later_counts_from_then_on() {
    let dir = tempfile::tempdir().unwrap();
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watched = watch(&monitor, Given::Nothing);
    offer(&watched, &Arm::Canary, 0..10, 0.0);
    report(&monitor, |report| report.reference.kind == "learning" && report.skipped_rows == 10);
    watched.given(reference());
    report(&monitor, |report| report.reference.kind == "file");
    offer(&watched, &Arm::Canary, 0..10, 0.0);
    report(&monitor, |report| rows_are(report, "canary", 10));
    // The same again changes nothing.
    watched.given(reference());
    offer(&watched, &Arm::Canary, 0..10, 0.0);
    report(&monitor, |report| rows_are(report, "canary", 20));
    watched.given(Given::Nothing);
    report(&monitor, |report| report.reference.kind == "learning");
}

#[test]
fn rules_leave_room_for_the_arms_that_are_always_there() {
    let dir = tempfile::tempdir().unwrap();
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watched = watch(&monitor, reference());
    for rule in 0..10 {
        let arm = Arm::Rule(format!("rule-{rule}").parse().unwrap());
        offer(&watched, &arm, 0..1, 0.0);
    }
    for arm in [Arm::Stable, Arm::Canary, Arm::Pinned] {
        offer(&watched, &arm, 0..1, 0.0);
    }
    let found = report(&monitor, |report| rows_are(report, "pinned", 1));
    assert_eq!((found.arms.len(), found.skipped_rows), (ARMS_MAX, 5));
}

/// Of a model that takes a colour and gives a number: a reference with three colours.
pub(super) fn colours() -> (Signature, Given) {
    let spec = |name: &str, datatype: DataType| TensorSpec {
        name: name.to_owned(),
        datatype,
        shape: Some([Dim::Dynamic(None), Dim::Fixed(1)].into_iter().collect()),
    };
    let (inputs, outputs) =
        (vec![spec("colour", DataType::Bytes)], vec![spec("price", DataType::Fp32)]);
    let signature = Signature { inputs, outputs, batched: true };
    let mut learner = Learner::new(features_of(&signature), LearnSettings::default()).unwrap();
    for row in 0..300_u32 {
        learner
            .add(0, crate::drift::feature::Value::Text([b"red", b"tan", b"sky"][row as usize % 3]));
        learner.add(1, crate::drift::feature::Value::Number(f64::from(row)));
    }
    let of = ("m".parse().unwrap(), None);
    let profile = learner.finish(of, "test", jiff::Timestamp::UNIX_EPOCH).unwrap().profile;
    let bytes = profile.write().unwrap();
    let profile = Arc::new(Profile::read(&bytes).unwrap());
    (signature, Given::File(bytes.into(), profile))
}

#[test]
fn new_categories_are_told_of_unless_they_are_not_to_be_seen() {
    let dir = tempfile::tempdir().unwrap();
    let watch = |monitor: &Monitor, hidden: &[&str]| {
        let (signature, given) = colours();
        let (model, version) = ("m".parse().unwrap(), Version::new(1).unwrap());
        let hidden = hidden.iter().map(|name| (*name).to_owned()).collect();
        monitor.watch(&model, version, Digest::new([7; 32]), &signature, given, hidden)
    };
    let offer = |watch: &Arc<Watch>, colours: &[&str]| {
        let x = Tensor::from_elements([colours.len(), 1].as_slice().into(), colours).unwrap();
        let prices = vec![1.0; colours.len()];
        watch.offer(&Arm::Stable, &[x], &[floats(&[colours.len(), 1], &prices)]);
    };
    let told = |monitor: &Monitor, rows: u64| -> Vec<(String, u64, u64)> {
        let found = report(monitor, |report| rows_are(report, "stable", rows));
        let [of] = &arm(&found, "stable").unwrap().new_categories[..] else { return Vec::new() };
        assert_eq!((of.feature.as_str(), of.tensor.as_str()), ("colour", "colour"));
        assert!(of.values.iter().all(|value| value.last_seen.is_some()));
        of.values.iter().map(|of| (of.value.clone(), of.count, of.over_count)).collect()
    };
    let want = |counts: &[(&str, u64)]| -> Vec<(String, u64, u64)> {
        counts.iter().map(|(name, count)| ((*name).to_owned(), *count, 0)).collect()
    };
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watched = watch(&monitor, &["price"]);
    offer(&watched, &["red", "mauve", "pink", "mauve"]);
    assert_eq!(told(&monitor, 4), want(&[("mauve", 2), ("pink", 1)]));
    drop(monitor);
    drop(watched);
    // They survive a restart, as all counts do.
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watched = watch(&monitor, &[]);
    offer(&watched, &["pink", "pink"]);
    assert_eq!(told(&monitor, 6), want(&[("pink", 3), ("mauve", 2)]));
    drop(monitor);
    drop(watched);
    // The ledger does not keep the tensor any more: what was kept here goes, too.
    for (hidden, new_categories) in [(&["colour"][..], true), (&[][..], false)] {
        let settings = Settings { new_categories, ..settings(dir.path()) };
        let monitor = Monitor::start(settings).unwrap().unwrap();
        let watched = watch(&monitor, hidden);
        let before = report(&monitor, |report| arm(report, "stable").is_some());
        let before = arm(&before, "stable").unwrap().total;
        offer(&watched, &["violet"]);
        assert_eq!(told(&monitor, before.rows + 1), []);
        let after = report(&monitor, |report| rows_are(report, "stable", before.rows + 1));
        let after = arm(&after, "stable").unwrap().total;
        assert_eq!(after.quality.unseen_category, before.quality.unseen_category + 1);
        drop(monitor);
        drop(watched);
    }
}

#[test]
fn a_model_that_is_less_sure_is_told_of() {
    let dir = tempfile::tempdir().unwrap();
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watched = watch(&monitor, reference());
    let mean = |report: &VersionReport, name: &str, feature: &str| {
        let arm = arm(report, name).unwrap();
        let of = |window: &WindowReport| {
            let found = window.features.iter().find(|found| found.feature == feature);
            found.and_then(|found| found.mean)
        };
        // Since the version was watched, not since a window's begin: it stands in one of them.
        assert!(arm.windows[1..].iter().all(|window| of(window).is_none()));
        of(&arm.windows[0]).unwrap()
    };
    // The same inputs, and answers that are hardly any.
    for number in 0..600 {
        let [x, _] = row(number, 0.0);
        watched.offer(&Arm::Stable, &[floats(&[1, 2], &x)], &[floats(&[1, 2], &[0.55, 0.45])]);
    }
    offer(&watched, &Arm::Canary, 0..600, 0.0);
    offer(&watched, &Arm::Pinned, 0..150, 2.0);
    let all = |report: &VersionReport| {
        rows_are(report, "stable", 600)
            && rows_are(report, "canary", 600)
            && rows_are(report, "pinned", 150)
    };
    let found = report(&monitor, all);
    let drops = |name: &str| arm(&found, name).unwrap().confidence_drop.clone();
    assert_eq!(
        (drops("stable"), drops("canary"), drops("pinned")),
        (vec!["y".to_owned()], vec![], vec![])
    );
    let sure = mean(&found, "stable", "confidence(y)");
    assert_eq!((sure.state, sure.rows), ("down", 600));
    assert!((sure.mean - 0.55).abs() < 1e-6 && sure.reference_mean > 0.65, "{sure:?}");
    assert!(sure.reference_mean - sure.mean > sure.band && sure.limit >= 0.01, "{sure:?}");
    let inputs = mean(&found, "stable", "x[0]");
    assert_eq!(inputs.state, "steady");
    assert!((inputs.mean - inputs.reference_mean).abs() < inputs.band, "{inputs:?}");
    assert_eq!(mean(&found, "canary", "confidence(y)").state, "steady");
    // However far: too few rows are neither good nor bad.
    assert_eq!(mean(&found, "pinned", "x[0]").state, "insufficient_data");
    let series = |name: &str, of: &[(&str, &str)]| -> f64 {
        let families = monitor.families();
        let family = families.iter().find(|family| family.name == name).unwrap();
        let is = |(label, value): &(&str, &str), labels: &crate::observe::page::Labels| {
            labels.iter().any(|(have, is)| have == label && is == value)
        };
        let sample = family.samples.iter().find(|it| of.iter().all(|want| is(want, &it.labels)));
        match sample.unwrap().value {
            crate::observe::page::Value::Number(number) => number,
            crate::observe::page::Value::Histogram { .. } => f64::NAN,
        }
    };
    assert_eq!(series("tidegate_confidence_drop", &[("arm", "stable"), ("tensor", "y")]), 1.0);
    assert_eq!(series("tidegate_confidence_drop", &[("arm", "canary"), ("tensor", "y")]), 0.0);
    assert!(series("tidegate_drift_means", &[("arm", "stable"), ("direction", "down")]) >= 1.0);
    assert_eq!(series("tidegate_drift_means", &[("arm", "canary"), ("direction", "down")]), 0.0);
    // What it has seen survives a restart.
    drop(monitor);
    drop(watched);
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watched = watch(&monitor, reference());
    offer(&watched, &Arm::Stable, 0..1, 0.0);
    let found = report(&monitor, |report| rows_are(report, "stable", 601));
    let sure = mean(&found, "stable", "confidence(y)");
    assert_eq!((sure.state, sure.rows), ("down", 601));
}

#[test]
fn series_are_no_more_than_the_limits_allow() {
    const MODELS: usize = 100;
    let dir = tempfile::tempdir().unwrap();
    // Room for two arms of each.
    let settings = Settings { features_max: MODELS * 4, ..settings(dir.path()) };
    let monitor = Monitor::start(settings).unwrap().unwrap();
    let (signature, given) = colours();
    let name = |model: usize| -> ModelName { format!("m{model}").parse().unwrap() };
    let (version, digest) = (Version::new(1).unwrap(), Digest::new([7; 32]));
    let watches: Vec<Arc<Watch>> = (0..MODELS)
        .map(|at| monitor.watch(&name(at), version, digest, &signature, given.clone(), Vec::new()))
        .collect();
    let colours = vec!["red"; 10];
    let x = [Tensor::from_elements([10, 1].as_slice().into(), &colours).unwrap()];
    let y = [floats(&[10, 1], &[1.0; 10])];
    for arm in [Arm::Stable, Arm::Canary, Arm::Pinned] {
        watches.iter().for_each(|watch| watch.offer(&arm, &x, &y));
    }
    let began = Instant::now();
    // The third arm finds no room.
    let done = |at: usize| {
        monitor.reports(&name(at)).iter().any(|it| it.arms.len() == 2 && it.skipped_rows == 10)
    };
    while !(0..MODELS).all(done) {
        assert!(began.elapsed() < Duration::from_secs(30));
        std::thread::sleep(Duration::from_millis(20));
    }
    let families = monitor.families();
    let mut seen = std::collections::HashSet::new();
    for family in &families {
        for sample in &family.samples {
            assert!(seen.insert((family.name.clone(), sample.labels.clone())), "{sample:?}");
        }
    }
    let of = |name: &str| families.iter().find(|it| it.name == name).unwrap().samples.len();
    // Of categories cell_psi and missing, of numbers wasserstein_low and ks_low besides.
    assert_eq!(of("tidegate_drift_score"), MODELS * 2 * (2 + 4));
    assert_eq!(of("tidegate_data_quality_total"), MODELS * 2 * Oddities::KINDS.len());
    assert_eq!(of("tidegate_drift_features"), MODELS * 2 * 3);
    assert_eq!(of("tidegate_drift_means"), MODELS * 2 * 2);
    assert_eq!(of("tidegate_confidence_drop"), 0, "a price is no distribution");
    for one in
        ["tidegate_drift_constant_features", "tidegate_drift_samples", "tidegate_drift_alarms"]
    {
        assert_eq!(of(one), MODELS * 2, "{one}");
    }
    // A model of many features has series of its first ones only.
    drop(watches);
    let features = families::SERIES_FEATURES_MAX + 50;
    let wide = TensorSpec {
        name: "x".to_owned(),
        datatype: DataType::Fp32,
        shape: Some([Dim::Dynamic(None), Dim::Fixed(features)].into_iter().collect()),
    };
    let signature = Signature { inputs: vec![wide], outputs: Vec::new(), batched: true };
    let mut learner = Learner::new(features_of(&signature), LearnSettings::default()).unwrap();
    for feature in 0..features {
        (0..300).for_each(|row| {
            learner.add(feature, crate::drift::feature::Value::Number(f64::from(row)));
        });
    }
    let of = ("m".parse().unwrap(), None);
    let profile = learner.finish(of, "test", jiff::Timestamp::UNIX_EPOCH).unwrap().profile;
    let given = Given::File(profile.write().unwrap().into(), Arc::new(profile));
    let model: ModelName = "m".parse().unwrap();
    let wide = monitor.watch(&model, version, digest, &signature, given, Vec::new());
    wide.offer(&Arm::Stable, &[floats(&[1, features], &vec![1.0; features])], &[]);
    report(&monitor, |report| rows_are(report, "stable", 1));
    let families = monitor.families();
    let scores = families.iter().find(|family| family.name == "tidegate_drift_score").unwrap();
    let value = |sample: &crate::observe::page::Sample, name: &str| {
        let label = sample.labels.iter().find(|(label, _)| label == name);
        label.map(|(_, value)| value.clone())
    };
    let of_model = scores.samples.iter().filter(|it| value(it, "model").as_deref() == Some("m"));
    let shown: std::collections::HashSet<_> = of_model.map(|it| value(it, "feature")).collect();
    assert_eq!(shown.len(), families::SERIES_FEATURES_MAX);
}

#[test]
fn a_version_that_is_loaded_again_loses_no_row() {
    let dir = tempfile::tempdir().unwrap();
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let mut watched = watch(&monitor, reference());
    for load in 0..5_u64 {
        offer(&watched, &Arm::Stable, load * 100..load * 100 + 100, 0.0);
        // The old one goes before anybody has looked at its rows.
        watched = watch(&monitor, reference());
    }
    let found = report(&monitor, |report| rows_are(report, "stable", 500));
    assert_eq!(found.skipped_rows, 0);
    // The latest values go on, too.
    let latest =
        arm(&found, "stable").unwrap().windows.iter().find(|found| found.window == "latest");
    assert_eq!(latest.unwrap().rows, 500);
    drop(watched);
    report_gone(&monitor);

    let other = tempfile::tempdir().unwrap();
    let monitor = Monitor::start(settings(other.path())).unwrap().unwrap();
    let first = watch(&monitor, Given::Nothing);
    offer(&first, &Arm::Canary, 0..10, 0.0);
    offer(&first, &Arm::Stable, 0..1000, 0.0);
    report(&monitor, |report| report.reference.rows == 1000 && report.skipped_rows == 10);
    let second = watch(&monitor, Given::Nothing);
    offer(&second, &Arm::Stable, 1000..1500, 0.0);
    let found = report(&monitor, |report| report.reference.rows == 1500);
    assert_eq!((found.reference.kind, found.skipped_rows), ("learning", 10));
    drop(first);
    monitor.stop();
    // Nobody holds what is offered too late.
    offer(&second, &Arm::Stable, 0..1, 0.0);
    assert_eq!((Arc::strong_count(&second), second.skipped.load(Ordering::Relaxed)), (1, 11));
}

#[test]
fn what_is_summed_up_costs_what_it_has() {
    let dir = tempfile::tempdir().unwrap();
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let watched = watch(&monitor, reference());
    let (narrow, wide) = (floats(&[2, 2], &[0.0; 4]), floats(&[1, 1000], &[0.0; 1000]));
    let features = watched.features.len() as u64;
    assert_eq!(watched.cost(2, &[narrow], &[]), 2 * features);
    assert_eq!(watched.cost(1, &[wide], &[]), features + 4000);
}

#[test]
fn outputs_of_two_versions_are_counted_in_the_same_cells() {
    let dir = tempfile::tempdir().unwrap();
    let monitor = Monitor::start(settings(dir.path())).unwrap().unwrap();
    let model: ModelName = "m".parse().unwrap();
    let version = |number| Version::new(number).unwrap();
    // Neither has a reference; the candidate's rows are wanted all the same.
    let watch = |number: u8| {
        let digest = Digest::new([number; 32]);
        let of = (version(number.into()), digest);
        monitor.watch(&model, of.0, of.1, &signature(), Given::Nothing, Vec::new())
    };
    let (one, two, other) = (watch(1), watch(2), watch(3));
    let pair = Pair { model: model.clone(), stable: version(1), candidate: version(2) };
    let found = |wanted: &dyn Fn(&Compared) -> bool| {
        let began = Instant::now();
        loop {
            let found = monitor.compare("rollout", &pair);
            if wanted(&found) {
                return found;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "{found:?}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    let learning =
        found(&|found| found.problem.as_ref().is_some_and(|why| why.starts_with("0 of")));
    assert!(learning.features.is_empty(), "{learning:?}");
    offer(&two, &Arm::Canary, 0..100, 0.0);
    offer(&one, &Arm::Stable, 0..LEARN_ROWS, 0.0);
    let begun = found(&|found| !found.features.is_empty());
    let names: Vec<&str> = begun.features.iter().map(|own| own.name.as_str()).collect();
    assert!(names.contains(&"y[0]") && names.contains(&"class(y)"), "{names:?}");
    // Whoever has more than half is called stable.
    offer(&one, &Arm::Stable, 1000..2000, 0.0);
    offer(&one, &Arm::Canary, 2000..3000, 0.0);
    offer(&one, &Arm::Pinned, 3000..3100, 5.0);
    offer(&two, &Arm::Canary, 4000..4500, 1.0);
    offer(&two, &Arm::Stable, 4500..5000, 1.0);
    offer(&two, &Arm::Rule("r".parse().unwrap()), 5000..5100, 5.0);
    offer(&other, &Arm::Canary, 6000..6100, 5.0);
    let rows = |cells: &[u64]| cells.iter().sum::<u64>();
    let done = found(&|found| {
        found.features.iter().all(|own| (rows(&own.stable), rows(&own.candidate)) == (2000, 1000))
    });
    assert_eq!((done.epoch, done.left_out), (begun.epoch, 0));
    let class = done.features.iter().find(|own| own.name == "class(y)").unwrap();
    // One more in the first score's logit: half of the stable version's rows, 84 % of the candidate's.
    let share =
        |cells: &[u64]| cells.iter().max().copied().unwrap_or(0) as f64 / rows(cells) as f64;
    assert!((share(&class.stable) - 0.5).abs() < 0.05, "{class:?}");
    assert!((share(&class.candidate) - 0.84).abs() < 0.05, "{class:?}");
    // Others are not the same comparison, and other bytes of the stable version are other cells.
    assert_eq!(monitor.compare("another", &pair).features, []);
    drop(one);
    let digest = Digest::new([9; 32]);
    let _again =
        monitor.watch(&model, version(1), digest, &signature(), Given::Nothing, Vec::new());
    let anew = found(&|found| found.epoch != done.epoch);
    assert!(anew.features.is_empty(), "{anew:?}");
}
