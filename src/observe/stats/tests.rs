//! Counting under contention, Triton's meanings, and series that end.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::*;
use crate::observe::{Observer, Settings, page};

pub(super) fn completion(arm: Arm, protocol: Protocol) -> Completion {
    Completion {
        prediction_id: uuid::Uuid::now_v7(),
        request_id: String::new(),
        received_at: SystemTime::UNIX_EPOCH + Duration::from_millis(1234),
        model: "iris".parse().unwrap(),
        version: Version::new(1),
        digest: None,
        arm: Some(arm),
        reason: None,
        protocol,
        principal: None,
        trace: None,
        outcome: Outcome::Ok,
        timings: Timings {
            queue: Duration::from_micros(100),
            batch_wait: Duration::from_micros(50),
            compute_input: Duration::from_micros(5),
            compute_infer: Duration::from_micros(300),
            compute_output: Duration::from_micros(5),
            total: Duration::from_micros(500),
        },
        rows: 3,
        batch_size: 8,
        cached: false,
        shadow_of: None,
        inputs: Vec::new(),
        outputs: Vec::new(),
    }
}

pub(super) fn failed(mut completion: Completion, kind: ErrorKind) -> Completion {
    completion.outcome = Outcome::Failed { kind, message: "x".into() };
    completion.batch_size = 0;
    completion.timings = Timings { total: Duration::from_micros(20), ..Timings::default() };
    completion
}

pub(super) fn stats(observer: &Observer) -> Arc<VersionStats> {
    let model = "iris".parse().unwrap();
    let version = Version::new(1).unwrap();
    VersionStats::new(observer, &model, version, &Digest::new([7; 32]), "tract")
}

fn text(observer: &Observer) -> String {
    String::from_utf8(observer.page(None).1.to_vec()).unwrap()
}

/// The value of the line that starts with `series`.
fn value(page: &str, series: &str) -> f64 {
    let line = page.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
    line.unwrap_or_else(|| panic!("no {series} in\n{page}")).parse().unwrap()
}

#[test]
fn threads_lose_no_count() {
    const THREADS: u64 = 12;
    const EACH: u64 = 2_000;
    let observer = Observer::default();
    let stats = stats(&observer);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (observer, stats) = (&observer, &stats);
            scope.spawn(move || {
                for at in 0..EACH {
                    let rule: Label = format!("rule-{}", at % 3).parse().unwrap();
                    let arm = if at % 2 == 0 { Arm::Stable } else { Arm::Rule(rule) };
                    let protocol = Protocol::ALL[(thread % 3) as usize];
                    observer.completed(Some(stats), &completion(arm, protocol));
                    stats.executed(8, &completion(Arm::Stable, protocol).timings);
                }
            });
        }
    });
    let all = THREADS * EACH;
    let snapshot = stats.snapshot();
    assert_eq!(snapshot.success, DurationStat { count: all, ns: all * 500_000 });
    assert_eq!(snapshot.inference_count, all * 3);
    assert_eq!(snapshot.execution_count, all);
    let fold = stats.fold();
    let requests: u64 = fold.series.values().map(|series| series.request.count()).sum();
    assert_eq!(requests, all);
    let overhead: u64 = fold.series.values().map(|series| series.overhead.sum_ns).sum();
    assert_eq!(overhead, all * 50_000);
    assert_eq!(fold.batch_sizes.sum, all * 8);
}

#[test]
fn statistics_mean_what_triton_means() {
    let observer = Observer::default();
    let stats = stats(&observer);
    let ok = completion(Arm::Pinned, Protocol::Grpc);
    stats.executed(6, &ok.timings);
    stats.completed(&ok);
    stats.completed(&ok);
    stats.completed(&failed(ok.clone(), ErrorKind::InvalidInput));
    let got = stats.snapshot();
    assert_eq!(got.last_inference_ms, 1234);
    assert_eq!((got.inference_count, got.execution_count), (6, 1));
    assert_eq!(got.success, DurationStat { count: 2, ns: 1_000_000 });
    assert_eq!(got.fail, DurationStat { count: 1, ns: 20_000 });
    assert_eq!(got.queue, DurationStat { count: 2, ns: 300_000 });
    assert_eq!(got.compute_infer, DurationStat { count: 2, ns: 600_000 });
    assert_eq!(got.batches.len(), 1);
    assert_eq!(got.batches[0].batch_size, 6);
    assert_eq!(got.batches[0].compute_infer, DurationStat { count: 1, ns: 300_000 });
}

#[test]
fn outcomes_have_their_words() {
    for kind in ErrorKind::ALL {
        let outcome = Outcome::Failed { kind, message: String::new() };
        assert_eq!(outcome_word(outcome_index(&outcome)), kind.code());
    }
    assert_eq!(outcome_word(outcome_index(&Outcome::Ok)), "ok");
    for (at, protocol) in Protocol::ALL.into_iter().enumerate() {
        assert_eq!(protocol as usize, at);
    }
}

#[test]
fn rules_beyond_the_limit_share_a_series() {
    let observer = Observer::default();
    let stats = stats(&observer);
    for at in 0..RULES_MAX + 5 {
        let rule = format!("r{at}").parse().unwrap();
        stats.completed(&completion(Arm::Rule(rule), Protocol::Http));
    }
    stats.completed(&completion(Arm::Rule("stable".parse().unwrap()), Protocol::Http));
    let fold = stats.fold();
    assert_eq!(fold.series.len(), RULES_MAX + 2);
    assert_eq!(fold.series[&(ARM_OTHER.to_owned(), "http")].outcomes[0], 5);
    assert_eq!(fold.series[&("stable".to_owned(), "http")].outcomes[0], 1);
}

#[test]
fn series_end_with_their_version() {
    let observer = Observer::default();
    let one = stats(&observer);
    observer.completed(Some(&one), &completion(Arm::Stable, Protocol::Http));
    one.loaded_in(Duration::from_millis(1500));
    one.set_gauges(Box::new(|| (5, 2)));
    let page = text(&observer);
    let series = "{model=\"iris\",version=\"1\"}";
    assert!((value(&page, &format!("tidegate_in_flight{series}")) - 5.0).abs() < 1e-9);
    assert!((value(&page, &format!("tidegate_model_load_seconds{series}")) - 1.5).abs() < 1e-9);
    assert!(
        (value(&page, &format!("nv_inference_pending_request_count{series}")) - 2.0).abs() < 1e-9
    );

    // A reload: both instances live, each series stands once and holds both.
    let two = stats(&observer);
    observer.completed(Some(&two), &completion(Arm::Stable, Protocol::Http));
    let page = text(&observer);
    let requests = "tidegate_requests_total{model=\"iris\",version=\"1\",arm=\"stable\",\
                    protocol=\"http\",outcome=\"ok\"}";
    assert!((value(&page, requests) - 2.0).abs() < 1e-9);
    assert_eq!(page.matches(requests).count(), 1);

    drop(one);
    assert!((value(&text(&observer), requests) - 1.0).abs() < 1e-9);
    drop(two);
    assert!(!text(&observer).contains("iris"));
}

#[test]
fn failures_without_a_version_and_shed_load_are_counted() {
    let observer = Observer::default();
    let unknown = failed(completion(Arm::Stable, Protocol::Http), ErrorKind::NotFound);
    observer.completed(None, &unknown);
    let full = failed(completion(Arm::Stable, Protocol::Http), ErrorKind::Overloaded);
    let stats = stats(&observer);
    observer.completed(Some(&stats), &full);
    let page = text(&observer);
    let other = "tidegate_requests_total{model=\"other\",version=\"\",arm=\"\",protocol=\"http\",\
                 outcome=\"not_found\"}";
    assert!((value(&page, other) - 1.0).abs() < 1e-9);
    assert!((value(&page, "tidegate_shed_total{reason=\"overloaded\"}") - 1.0).abs() < 1e-9);
    assert!(value(&page, "tidegate_shed_total{reason=\"deadline\"}").abs() < 1e-9);
    for (reason, want) in [("REJECTED", 1.0), ("CANCELED", 0.0), ("BACKEND", 0.0), ("OTHER", 0.0)] {
        let series = format!(
            "nv_inference_request_failure{{model=\"iris\",version=\"1\",reason=\"{reason}\"}}"
        );
        assert!((value(&page, &series) - want).abs() < 1e-9, "{reason}");
    }
}

#[test]
fn tritons_names_can_be_switched_off() {
    let observer = Observer::new(Settings { triton_metrics: false, ..Settings::default() });
    let _stats = stats(&observer);
    let (content_type, _) = observer.page(Some("text/plain"));
    assert_eq!(content_type, page::TEXT);
    assert!(!text(&observer).contains("nv_"));
}
