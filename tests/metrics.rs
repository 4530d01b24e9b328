//! The metrics page as a scraper sees it: strict text, and protobuf that says the same.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use prost::Message as _;
use tidegate::domain::{
    Arm, Completion, Digest, ErrorKind, Label, Outcome, Protocol, Timings, Version,
};
use tidegate::observe::page::{PROTOBUF, TEXT, wire};
use tidegate::observe::{Observer, Settings, VersionStats};

/// Series (name and sorted labels) and their values.
type Series = BTreeMap<(String, BTreeMap<String, String>), f64>;

/// An observer that has seen requests of two models, failures, and every protocol.
fn busy() -> (Arc<Observer>, Vec<Arc<VersionStats>>) {
    let observer = Observer::new(Settings::default());
    observer.engine_info("tract", "0.23 \"quoted\" \\ back");
    let mut all = Vec::new();
    for (model, number) in [("iris", 1), ("iris", 2), ("digits", 1)] {
        let version = Version::new(number).unwrap();
        let digest = Digest::new([3; 32]);
        let model = model.parse().unwrap();
        let stats = VersionStats::new(&observer, &model, version, &digest, "tract");
        stats.loaded_in(Duration::from_millis(70));
        let rule: Label = "mobile".parse().unwrap();
        for protocol in Protocol::ALL {
            for arm in [Arm::Stable, Arm::Pinned, Arm::Rule(rule.clone())] {
                for total in [10, 25, 26, 400, 90_000, 100_000_000] {
                    let completion = completion(arm.clone(), protocol, total, Outcome::Ok);
                    observer.completed(Some(&stats), &completion);
                    stats.executed(4, &completion.timings);
                }
            }
        }
        let kind = ErrorKind::InvalidInput;
        let failed = Outcome::Failed { kind, message: "secret".into() };
        let failed = completion(Arm::Stable, Protocol::Http, 5, failed);
        observer.completed(Some(&stats), &failed);
        observer.completed(None, &failed);
        all.push(stats);
    }
    (observer, all)
}

fn completion(arm: Arm, protocol: Protocol, total_us: u64, outcome: Outcome) -> Completion {
    Completion {
        prediction_id: uuid::Uuid::now_v7(),
        request_id: "secret".into(),
        received_at: SystemTime::now(),
        model: "iris".parse().unwrap(),
        version: Version::new(1),
        digest: None,
        arm: Some(arm),
        reason: None,
        protocol,
        principal: None,
        trace: None,
        batch_size: usize::from(outcome == Outcome::Ok) * 4,
        outcome,
        timings: Timings {
            compute_infer: Duration::from_micros(total_us / 2),
            total: Duration::from_micros(total_us),
            ..Timings::default()
        },
        rows: 1,
        cached: false,
        shadow_of: None,
        inputs: Vec::new(),
        outputs: Vec::new(),
    }
}

/// Reads text format 0.0.4 and fails on anything that is out of place.
fn parse_strictly(text: &str) -> Series {
    assert!(text.ends_with('\n'), "the last line must end");
    let mut series = Series::new();
    let mut families = BTreeSet::new();
    let (mut family, mut kind, mut help) = ("", "", "");
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            help = rest.split_once(' ').expect("a help text").0;
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            (family, kind) = rest.split_once(' ').expect("a type");
            assert_eq!(help, family, "HELP stands before TYPE");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(families.insert(family), "{family} comes twice");
        } else {
            let (name, labels, value) = parse_sample(line);
            let suffix = name.strip_prefix(family).expect("samples follow their TYPE");
            let suffixes: &[&str] =
                if kind == "histogram" { &["_bucket", "_sum", "_count"] } else { &[""] };
            assert!(suffixes.contains(&suffix), "{line}");
            assert!(kind == "gauge" || value >= 0.0, "{line}");
            let before = series.insert((name, labels), value);
            assert!(before.is_none(), "a series comes twice: {line}");
        }
    }
    series
}

fn parse_sample(line: &str) -> (String, BTreeMap<String, String>, f64) {
    let named = |char: char| char.is_ascii_alphanumeric() || char == '_' || char == ':';
    let end = line.find(|char| !named(char)).expect("more than a name");
    let (name, mut rest) = line.split_at(end);
    assert!(!name.is_empty() && !name.starts_with(|char: char| char.is_ascii_digit()), "{line}");
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        loop {
            let (label, after) = rest.split_once("=\"").expect("a label");
            assert!(label.chars().all(|char| named(char) && char != ':'), "{line}");
            let (value, after) = unquote(after);
            assert!(labels.insert(label.to_owned(), value).is_none(), "{line}");
            if let Some(after) = after.strip_prefix('}') {
                rest = after;
                break;
            }
            rest = after.strip_prefix(',').expect("a comma between labels");
        }
    }
    let value = rest.strip_prefix(' ').expect("one space before the value");
    let plain = value.chars().all(|char| char.is_ascii_digit() || ".-".contains(char));
    assert!(plain || ["+Inf", "-Inf", "NaN"].contains(&value), "{line}");
    (name.to_owned(), labels, value.parse().unwrap())
}

fn unquote(text: &str) -> (String, &str) {
    let mut value = String::new();
    let mut chars = text.char_indices();
    loop {
        match chars.next().expect("a closing quote") {
            (at, '"') => return (value, &text[at + 1..]),
            (_, '\\') => value.push(match chars.next().expect("an escaped character").1 {
                'n' => '\n',
                same @ ('\\' | '"') => same,
                other => panic!("'\\{other}' is no escape"),
            }),
            (_, other) => value.push(other),
        }
    }
}

/// The same series from delimited protobuf.
fn parse_protobuf(mut bytes: bytes::Bytes) -> Series {
    let mut series = Series::new();
    while !bytes.is_empty() {
        let family = wire::MetricFamily::decode_length_delimited(&mut bytes).unwrap();
        let name = family.name.unwrap();
        for metric in family.metric {
            let labels: BTreeMap<String, String> =
                metric.label.into_iter().map(|l| (l.name.unwrap(), l.value.unwrap())).collect();
            if let Some(number) = metric.counter.or(metric.gauge) {
                series.insert((name.clone(), labels), number.value.unwrap());
            } else {
                let histogram = metric.histogram.unwrap();
                let count = histogram.sample_count.unwrap() as f64;
                let mut put = |suffix: &str, le: Option<String>, value: f64| {
                    let mut labels = labels.clone();
                    labels.extend(le.map(|le| ("le".to_owned(), le)));
                    series.insert((format!("{name}{suffix}"), labels), value);
                };
                for bucket in histogram.bucket {
                    let le = bucket.upper_bound.unwrap().to_string();
                    put("_bucket", Some(le), bucket.cumulative_count.unwrap() as f64);
                }
                put("_bucket", Some("+Inf".into()), count);
                put("_sum", None, histogram.sample_sum.unwrap());
                put("_count", None, count);
            }
        }
    }
    series
}

fn text(observer: &Observer) -> String {
    let (content_type, body) = observer.page(None);
    assert_eq!(content_type, TEXT);
    String::from_utf8(body.to_vec()).unwrap()
}

/// Figures of the machine and process move between two pages.
fn moves((name, _): &(String, BTreeMap<String, String>)) -> bool {
    name.starts_with("process_") || name.starts_with("nv_cpu_")
}

#[test]
fn the_text_is_valid_and_the_protobuf_says_the_same() {
    let (observer, _stats) = busy();
    let mut from_text = parse_strictly(&text(&observer));
    let (content_type, body) = observer.page(Some(PROTOBUF));
    assert_eq!(content_type, PROTOBUF);
    let mut from_protobuf = parse_protobuf(body);
    from_text.retain(|series, _| !moves(series));
    from_protobuf.retain(|series, _| !moves(series));
    assert!(from_text.len() > 500, "{}", from_text.len());
    assert_eq!(from_text, from_protobuf);
}

#[test]
fn histograms_grow_to_their_count() {
    let (observer, _stats) = busy();
    let series = parse_strictly(&text(&observer));
    let mut checked = 0;
    for ((name, labels), count) in &series {
        let Some(family) = name.strip_suffix("_count") else { continue };
        if family.starts_with("nv_") {
            continue; // Triton has counters of that name.
        }
        let mut buckets: Vec<(f64, f64)> = Vec::new();
        for ((bucket, of), value) in &series {
            let mut of = of.clone();
            if *bucket == format!("{family}_bucket")
                && let Some(le) = of.remove("le")
                && of == *labels
            {
                buckets.push((le.parse().unwrap(), *value));
            }
        }
        buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
        assert!(buckets.is_sorted_by(|a, b| a.1 <= b.1), "{name} {labels:?}");
        let last = buckets.last().unwrap();
        assert!(last.0.is_infinite() && (last.1 - count).abs() < 1e-9, "{name} {labels:?}");
        checked += 1;
    }
    assert!(checked > 40, "{checked}");
}

#[test]
fn a_retired_versions_series_vanish() {
    let (observer, mut stats) = busy();
    let of = |page: &str| page.matches("model=\"iris\",version=\"2\"").count();
    assert!(of(&text(&observer)) > 0);
    stats.remove(1);
    let page = text(&observer);
    assert_eq!(of(&page), 0);
    assert!(page.contains("model=\"iris\",version=\"1\""));
}

#[test]
fn nothing_of_a_request_reaches_the_page() {
    let (observer, _stats) = busy();
    assert!(!text(&observer).contains("secret"));
}
