//! What concerns the whole process, through the `metrics` facade and its Prometheus exporter, and
//! the usual `process_*` families.
//!
//! The facade has one recorder per process, so this is the one place with global state. It holds
//! only what lives as long as the process: no call can remove a series from it.

use std::sync::OnceLock;
use std::time::{SystemTime, UNIX_EPOCH};

use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};

use super::CloseReason;
use super::page::{self, Family, Kind, Labels};

const BUILD_INFO: &str = "tidegate_build_info";
const CONNECTIONS: &str = "tidegate_connections";
const CLOSED: &str = "tidegate_connections_closed_total";
const ACCEPT_ERRORS: &str = "tidegate_accept_errors_total";
const LOAD_FAILURES: &str = "tidegate_model_load_failures_total";
const CACHE_BYTES: &str = "tidegate_cache_bytes";
const CACHE_ENTRIES: &str = "tidegate_cache_entries";
const CACHE_EVICTIONS: &str = "tidegate_cache_evictions_total";
const SPANS_DROPPED: &str = "tidegate_spans_dropped_total";
const LOG_LINES_DROPPED: &str = "tidegate_access_lines_dropped_total";

/// Memory of the process that is resident, in bytes; 0 where the system does not tell.
pub fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0);
    pages * rustix::param::page_size() as u64
}

/// Handles to the process-wide series.
pub(super) struct Process {
    pub(super) connections: metrics::Gauge,
    /// In the order of [`CloseReason::ALL`].
    pub(super) closed: [metrics::Counter; CloseReason::ALL.len()],
    pub(super) accept_errors: metrics::Counter,
    pub(super) load_failures: metrics::Counter,
    pub(super) spans_dropped: metrics::Counter,
    pub(super) lines_dropped: metrics::Counter,
    pub(super) cache_bytes: metrics::Gauge,
    pub(super) cache_entries: metrics::Gauge,
    pub(super) cache_evictions: metrics::Counter,
}

impl Process {
    pub(super) fn new() -> Self {
        exporter();
        metrics::describe_gauge!(BUILD_INFO, "This program; always 1");
        metrics::describe_gauge!(CONNECTIONS, "Open connections on the data listeners");
        metrics::describe_counter!(CLOSED, "Connections that a limit closed");
        metrics::describe_counter!(ACCEPT_ERRORS, "Connections that could not be accepted");
        metrics::describe_counter!(LOAD_FAILURES, "Loads of model versions that failed");
        metrics::describe_counter!(SPANS_DROPPED, "Traced requests that were not exported");
        metrics::describe_counter!(LOG_LINES_DROPPED, "Access log lines that found no room");
        metrics::describe_gauge!(CACHE_BYTES, "Memory of answers kept, a second ago at most");
        metrics::describe_gauge!(CACHE_ENTRIES, "Answers kept, a second ago at most");
        metrics::describe_counter!(CACHE_EVICTIONS, "Answers that made room for others");
        metrics::gauge!(BUILD_INFO, "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        let process = Self {
            connections: metrics::gauge!(CONNECTIONS),
            closed: CloseReason::ALL
                .map(|reason| metrics::counter!(CLOSED, "reason" => reason.as_str())),
            accept_errors: metrics::counter!(ACCEPT_ERRORS),
            load_failures: metrics::counter!(LOAD_FAILURES),
            spans_dropped: metrics::counter!(SPANS_DROPPED),
            lines_dropped: metrics::counter!(LOG_LINES_DROPPED),
            cache_bytes: metrics::gauge!(CACHE_BYTES),
            cache_entries: metrics::gauge!(CACHE_ENTRIES),
            cache_evictions: metrics::counter!(CACHE_EVICTIONS),
        };
        // Shows them from zero.
        process.connections.increment(0.0);
        process.cache_bytes.increment(0.0);
        process.cache_entries.increment(0.0);
        let counters = [
            &process.accept_errors,
            &process.load_failures,
            &process.spans_dropped,
            &process.lines_dropped,
            &process.cache_evictions,
        ];
        for counter in counters.into_iter().chain(&process.closed) {
            counter.increment(0);
        }
        process
    }
}

/// The exporter behind the facade, installed by the first call.
fn exporter() -> &'static PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| {
        let recorder = PrometheusBuilder::new().build_recorder();
        let handle = recorder.handle();
        if metrics::set_global_recorder(recorder).is_err() {
            tracing::warn!(
                "another metrics recorder is installed; process-wide series are missing"
            );
        }
        handle
    })
}

/// Moves what was recorded in histograms into their buckets; nothing else does. Once a second.
pub(super) fn upkeep() {
    exporter().run_upkeep();
}

/// Everything of this module, ready for the page.
pub(super) fn families() -> Vec<Family> {
    let mut families = page::parse(&exporter().render());
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let mut one = |name, kind, help, value: Option<f64>| {
        if let Some(value) = value {
            let mut family = Family::new(name, kind, help);
            family.push(Labels::new(), value);
            families.push(family);
        }
    };
    let usage = Usage::parse(&stat);
    one(
        "process_cpu_seconds_total",
        Kind::Counter,
        "Processor time used by the process",
        usage.map(|usage| usage.cpu_seconds),
    );
    one(
        "process_resident_memory_bytes",
        Kind::Gauge,
        "Memory of the process that is resident",
        usage.map(|usage| usage.resident_bytes),
    );
    one(
        "process_start_time_seconds",
        Kind::Gauge,
        "Start of the process, in seconds since the epoch",
        usage.and_then(|usage| started_at(usage.started_after_boot)),
    );
    one("process_open_fds", Kind::Gauge, "Open file descriptors", open_files());
    families
}

/// From `/proc/self/stat`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Usage {
    cpu_seconds: f64,
    resident_bytes: f64,
    started_after_boot: f64,
}

impl Usage {
    fn parse(stat: &str) -> Option<Self> {
        // The second field is the program's name, which may hold anything but ends the last ')'.
        let (_, rest) = stat.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // `rest` starts with field 3 of proc(5): utime 14, stime 15, starttime 22, rss 24.
        let field = |number: usize| fields.get(number - 3)?.parse::<f64>().ok();
        let tick = rustix::param::clock_ticks_per_second() as f64;
        Some(Self {
            cpu_seconds: (field(14)? + field(15)?) / tick,
            resident_bytes: field(24)? * rustix::param::page_size() as f64,
            started_after_boot: field(22)? / tick,
        })
    }
}

fn started_at(after_boot: f64) -> Option<f64> {
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let uptime: f64 = uptime.split_whitespace().next()?.parse().ok()?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs_f64();
    // Whole seconds: the difference of two clocks would wander in the digits after.
    Some((now - uptime + after_boot).round())
}

fn open_files() -> Option<f64> {
    let entries = std::fs::read_dir("/proc/self/fd").ok()?;
    // One of them is the folder that is being read.
    Some(entries.count().saturating_sub(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn process_figures_are_plausible() {
        let _process = Process::new();
        let families = families();
        let value = |name: &str| {
            let family = families.iter().find(|family| family.name == name);
            match family.map(|family| &family.samples[0].value) {
                Some(page::Value::Number(value)) => *value,
                other => panic!("{name}: {other:?}"),
            }
        };
        assert!(value("process_resident_memory_bytes") > 1e6);
        assert!(value("process_open_fds") >= 3.0);
        assert!(value("process_start_time_seconds") > 1.6e9);
        assert!(value("process_cpu_seconds_total") >= 0.0);
        assert_eq!(value(BUILD_INFO).total_cmp(&1.0), std::cmp::Ordering::Equal);
        assert!(value(CONNECTIONS) >= 0.0);
    }

    #[test]
    fn a_program_name_with_brackets_does_not_confuse() {
        let stat = "1 (a) b (c) S 1 1 1 0 -1 0 0 0 0 0 100 50 0 0 20 0 1 0 300 1000 10 0";
        let usage = Usage::parse(stat).unwrap();
        assert!((usage.cpu_seconds - 1.5).abs() < 1e-9);
        assert!((usage.started_after_boot - 3.0).abs() < 1e-9);
    }
}
