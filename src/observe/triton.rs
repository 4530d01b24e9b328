//! Triton's metric names beside our own, so that existing dashboards and tools keep working.
//!
//! Same meanings and units as there. Without a GPU there are no GPU families, as there; pinned
//! memory pools are left out because we have none. The response cache has series where it is used.

use super::families::{VersionView, Versions, per_version, uses_cache, version_labels};
use super::page::{Family, Kind, Labels};
use super::stats::{OUTCOMES, StatsSnapshot, outcome_word};

/// Triton's words for why a request failed.
const REASONS: [&str; 4] = ["REJECTED", "CANCELED", "BACKEND", "OTHER"];

/// Place in [`REASONS`] of one of our outcomes.
fn reason(outcome: &str) -> usize {
    match outcome {
        // What the scheduler turns away before it runs.
        "overloaded" | "rate_limited" | "deadline" => 0,
        "cancelled" => 1,
        "model_failed" => 2,
        _ => 3,
    }
}

pub(super) fn families(versions: &Versions) -> Vec<Family> {
    let counter =
        |name, help, value: fn(&StatsSnapshot) -> u64| {
            per_version(versions, name, Kind::Counter, help, |view| {
                Some(value(&view.fold.stats) as f64)
            })
        };
    let cache = |name, help, value: fn(&StatsSnapshot) -> u64| {
        per_version(versions, name, Kind::Counter, help, |view| {
            uses_cache(view).then(|| value(&view.fold.stats) as f64)
        })
    };
    vec![
        cache("nv_cache_num_hits_per_model", "Requests that the cache answered", |stats| {
            stats.cache_hit.count
        }),
        cache("nv_cache_num_misses_per_model", "Requests that the cache did not answer", |stats| {
            stats.cache_miss.count
        }),
        cache("nv_cache_hit_duration_per_model", "Time of cache hits, us, cumulative", |stats| {
            stats.cache_hit.ns / 1000
        }),
        cache(
            "nv_cache_miss_duration_per_model",
            "Time of cache misses, us, cumulative",
            |stats| stats.cache_miss.ns / 1000,
        ),
        counter("nv_inference_request_success", "Successful inference requests", |stats| {
            stats.success.count
        }),
        failures(versions),
        counter("nv_inference_count", "Inferences made: rows, not requests", |stats| {
            stats.inference_count
        }),
        counter("nv_inference_exec_count", "Model executions", |stats| stats.execution_count),
        counter("nv_inference_request_duration_us", "Request time, cumulative", |stats| {
            stats.success.ns / 1000
        }),
        counter("nv_inference_queue_duration_us", "Queue time, cumulative", |stats| {
            stats.queue.ns / 1000
        }),
        counter("nv_inference_compute_input_duration_us", "Input time, cumulative", |stats| {
            stats.compute_input.ns / 1000
        }),
        counter("nv_inference_compute_infer_duration_us", "Inference time, cumulative", |stats| {
            stats.compute_infer.ns / 1000
        }),
        counter("nv_inference_compute_output_duration_us", "Output time, cumulative", |stats| {
            stats.compute_output.ns / 1000
        }),
        per_version(
            versions,
            "nv_inference_pending_request_count",
            Kind::Gauge,
            "Requests waiting to be run",
            |view| Some(view.fold.load.queue_depth as f64),
        ),
        per_version(
            versions,
            "nv_model_load_duration_secs",
            Kind::Gauge,
            "Time that loading the model took",
            |view| view.fold.loaded_in.map(|took| took.as_secs_f64()),
        ),
    ]
}

/// All four reasons, from zero.
fn failures(versions: &Versions) -> Family {
    let help = "Failed inference requests";
    let mut family = Family::new("nv_inference_request_failure", Kind::Counter, help);
    for (key, view) in versions {
        for (word, count) in REASONS.into_iter().zip(by_reason(view)) {
            let mut labels = version_labels(key);
            labels.push(("reason".into(), word.to_owned()));
            family.push(labels, count as f64);
        }
    }
    family
}

fn by_reason(view: &VersionView) -> [u64; REASONS.len()] {
    let mut counts = [0; REASONS.len()];
    for fold in view.fold.series.values() {
        for at in 1..OUTCOMES {
            counts[reason(outcome_word(at))] += fold.outcomes[at];
        }
    }
    counts
}

/// Busy and total processor time of the whole machine, in ticks, as last seen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CpuTimes {
    busy: u64,
    total: u64,
}

impl CpuTimes {
    /// From the first line of `/proc/stat`: user nice system idle iowait irq softirq steal.
    pub(super) fn parse(stat: &str) -> Option<Self> {
        let line = stat.lines().next()?.strip_prefix("cpu ")?;
        let ticks: Vec<u64> = line.split_whitespace().map_while(|word| word.parse().ok()).collect();
        // The two after `steal` are guests, which `user` counts already.
        let total = ticks.iter().take(8).sum();
        let idle: u64 = ticks.get(3..5)?.iter().sum();
        Some(Self { busy: u64::saturating_sub(total, idle), total })
    }

    /// Share of the time since `before` that the processors worked; 0 to 1.
    pub(super) fn utilization(&self, before: &Self) -> f64 {
        let total = self.total.saturating_sub(before.total);
        let busy = self.busy.saturating_sub(before.busy);
        if total == 0 { 0.0 } else { (busy as f64 / total as f64).min(1.0) }
    }
}

/// The machine's processors and memory; empty where `/proc` does not say.
pub(super) fn machine(stat: &str, meminfo: &str, before: &mut CpuTimes) -> Vec<Family> {
    let mut families = Vec::new();
    let mut gauge = |name, help, value: Option<f64>| {
        if let Some(value) = value {
            let mut family = Family::new(name, Kind::Gauge, help);
            family.push(Labels::new(), value);
            families.push(family);
        }
    };
    let utilization = CpuTimes::parse(stat).map(|now| {
        let utilization = now.utilization(before);
        *before = now;
        utilization
    });
    gauge("nv_cpu_utilization", "Processor use since the last scrape, 0 to 1", utilization);
    let bytes = |key: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
        let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
        Some((kib * 1024) as f64)
    };
    let total = bytes("MemTotal");
    let used = total.zip(bytes("MemAvailable")).map(|(total, free)| total - free);
    gauge("nv_cpu_memory_total_bytes", "Memory of the machine", total);
    gauge("nv_cpu_memory_used_bytes", "Memory of the machine in use", used);
    families
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machine_figures_come_from_proc() {
        let mut before = CpuTimes::default();
        let stat = "cpu  10 0 10 70 10 0 0 0 5 0\ncpu0 1\n";
        let meminfo = "MemTotal:  100 kB\nMemFree: 1 kB\nMemAvailable:  40 kB\n";
        let families = machine(stat, meminfo, &mut before);
        let page = super::super::page::text(&families);
        assert!(page.contains("\nnv_cpu_utilization 0.2\n"), "{page}");
        assert!(page.contains("\nnv_cpu_memory_total_bytes 102400\n"), "{page}");
        assert!(page.contains("\nnv_cpu_memory_used_bytes 61440\n"), "{page}");
        let later = CpuTimes::parse("cpu  60 0 10 120 10 0 0 0\n").unwrap();
        assert!((later.utilization(&before) - 0.5).abs() < 1e-9);
        assert!(machine("", "", &mut before).is_empty());
    }
}
