//! Our own metric families, made from folded counters. `docs/metrics.md` describes each.

use std::collections::BTreeMap;

use super::histogram::{BATCH_BOUNDS, LATENCY_BOUNDS_NS, Latency};
use super::page::{Family, Kind, Labels};
use super::stats::{OUTCOMES, SeriesFold, VersionFold, outcome_word};
use crate::domain::{Digest, ModelName, Protocol, Version};

/// A version on the page, by model and number.
pub(super) type Versions = BTreeMap<(ModelName, Version), VersionView>;

/// What the page shows of one version.
pub(super) struct VersionView {
    pub(super) digest: Digest,
    pub(super) engine: &'static str,
    pub(super) fold: VersionFold,
}

/// Requests without a version, by protocol and outcome.
pub(super) type Unrouted = [[u64; OUTCOMES]; Protocol::ALL.len()];

/// `model` label of requests that no version answered for, so that callers cannot make series.
pub(super) const MODEL_OTHER: &str = "other";

pub(super) fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

pub(super) fn version_labels((model, version): &(ModelName, Version)) -> Labels {
    vec![("model".into(), model.to_string()), ("version".into(), version.to_string())]
}

/// Families of the request path.
pub(super) fn requests(versions: &Versions, unrouted: &Unrouted) -> Vec<Family> {
    let mut families = vec![requests_total(versions, unrouted)];
    families.extend(latencies(versions));
    families.push(batch_sizes(versions));
    families.push(padded_elements(versions));
    families.push(per_version(
        versions,
        "tidegate_executions_total",
        Kind::Counter,
        "Batches run on the model",
        |view| Some(view.fold.stats.execution_count as f64),
    ));
    families.push(per_version(
        versions,
        "tidegate_in_flight",
        Kind::Gauge,
        "Requests waiting or running",
        |view| Some(view.fold.load.in_flight as f64),
    ));
    families.push(per_version(
        versions,
        "tidegate_queue_depth",
        Kind::Gauge,
        "Requests waiting",
        |view| Some(view.fold.load.queue_depth as f64),
    ));
    families.extend(cache(versions));
    families
}

/// Of versions that have asked the cache, so that others have no series of it.
fn cache(versions: &Versions) -> [Family; 2] {
    let of = |view: &VersionView, count: u64| uses_cache(view).then_some(count as f64);
    [
        per_version(
            versions,
            "tidegate_cache_hits_total",
            Kind::Counter,
            "Requests answered with what the model said before",
            |view| of(view, view.fold.stats.cache_hit.count),
        ),
        per_version(
            versions,
            "tidegate_cache_misses_total",
            Kind::Counter,
            "Requests that the cache could not answer and the model did",
            |view| of(view, view.fold.stats.cache_miss.count),
        ),
    ]
}

pub(super) fn uses_cache(view: &VersionView) -> bool {
    view.fold.stats.cache_hit.count + view.fold.stats.cache_miss.count > 0
}

/// Families of what is loaded.
pub(super) fn models(versions: &Versions) -> Vec<Family> {
    let mut info = Family::new("tidegate_model_info", Kind::Gauge, "Loaded versions; always 1");
    for (key, view) in versions {
        let mut labels = version_labels(key);
        labels.push(("digest".into(), view.digest.to_string()));
        labels.push(("engine".into(), view.engine.to_owned()));
        info.push(labels, 1.0);
    }
    let load = per_version(
        versions,
        "tidegate_model_load_seconds",
        Kind::Gauge,
        "Time that loading and warming the version took",
        |view| view.fold.loaded_in.map(|took| took.as_secs_f64()),
    );
    vec![info, load]
}

/// A family with at most one number for each version.
pub(super) fn per_version(
    versions: &Versions,
    name: &'static str,
    kind: Kind,
    help: &'static str,
    value: impl Fn(&VersionView) -> Option<f64>,
) -> Family {
    let mut family = Family::new(name, kind, help);
    for (key, view) in versions {
        if let Some(value) = value(view) {
            family.push(version_labels(key), value);
        }
    }
    family
}

/// Only of models with padding.
fn padded_elements(versions: &Versions) -> Family {
    let help = "Elements of padded inputs in executed batches, by what they are";
    let mut family = Family::new("tidegate_batch_elements_total", Kind::Counter, help);
    for (key, view) in versions {
        let Some(padded) = view.fold.padded else { continue };
        for (kind, count) in [("real", padded.real), ("padding", padded.padding)] {
            let mut labels = version_labels(key);
            labels.push(("kind".into(), kind.to_owned()));
            family.push(labels, count as f64);
        }
    }
    family
}

fn requests_total(versions: &Versions, unrouted: &Unrouted) -> Family {
    let help = "Finished requests, by how they ended";
    let mut family = Family::new("tidegate_requests_total", Kind::Counter, help);
    let mut push = |labels: &Labels, outcomes: &[u64; OUTCOMES], ok_always: bool| {
        for (at, count) in outcomes.iter().enumerate() {
            if *count > 0 || (at == 0 && ok_always) {
                let mut labels = labels.clone();
                labels.push(("outcome".into(), outcome_word(at).to_owned()));
                family.push(labels, *count as f64);
            }
        }
    };
    for (key, view) in versions {
        for (series, fold) in &view.fold.series {
            push(&series_labels(key, series), &fold.outcomes, true);
        }
    }
    for (protocol, outcomes) in Protocol::ALL.iter().zip(unrouted) {
        let labels = vec![
            ("model".into(), MODEL_OTHER.to_owned()),
            ("version".into(), String::new()),
            ("arm".into(), String::new()),
            ("protocol".into(), protocol.as_str().to_owned()),
        ];
        push(&labels, outcomes, false);
    }
    family
}

fn series_labels(key: &(ModelName, Version), (arm, protocol): &(String, &'static str)) -> Labels {
    let mut labels = version_labels(key);
    labels.push(("arm".into(), arm.clone()));
    labels.push(("protocol".into(), (*protocol).to_owned()));
    labels
}

fn latencies(versions: &Versions) -> [Family; 5] {
    let family = |name, help, pick: fn(&SeriesFold) -> &Latency| {
        let mut family = Family::new(name, Kind::Histogram, help);
        for (key, view) in versions {
            for (series, fold) in &view.fold.series {
                let latency = pick(fold);
                let bounds = LATENCY_BOUNDS_NS.into_iter().map(seconds);
                let labels = series_labels(key, series);
                family.push_histogram(labels, bounds, &latency.buckets, seconds(latency.sum_ns));
            }
        }
        family
    };
    [
        family("tidegate_request_seconds", "From arrival to the answer's being ready", |fold| {
            &fold.request
        }),
        family("tidegate_queue_seconds", "In the queue, without the batch window", |fold| {
            &fold.queue
        }),
        family("tidegate_batch_wait_seconds", "Held back for others to join the batch", |fold| {
            &fold.batch_wait
        }),
        family("tidegate_compute_seconds", "In the model", |fold| &fold.compute),
        family("tidegate_overhead_seconds", "All but queue, batch window and model", |fold| {
            &fold.overhead
        }),
    ]
}

fn batch_sizes(versions: &Versions) -> Family {
    let mut family =
        Family::new("tidegate_batch_size", Kind::Histogram, "Rows of executed batches");
    for (key, view) in versions {
        let sizes = &view.fold.batch_sizes;
        let bounds = BATCH_BOUNDS.into_iter().map(|bound| bound as f64);
        family.push_histogram(version_labels(key), bounds, &sizes.buckets, sizes.sum as f64);
    }
    family
}
