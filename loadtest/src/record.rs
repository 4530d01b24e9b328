//! What was seen: counts, errors by kind and a latency histogram, and the report made of them.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::{Deserialize, Serialize};

/// Latencies beyond this are recorded as this.
const LATENCY_MAX: Duration = Duration::from_secs(600);
/// Three significant digits: a value is at most 0.1 % off.
const DIGITS: u8 = 3;

/// The measured part of a run; the warm-up before it and what ends after it are not counted.
#[derive(Clone, Copy, Debug)]
pub struct Window {
    pub start: Instant,
    pub end: Instant,
}

impl Window {
    #[must_use]
    pub fn has(&self, at: Instant) -> bool {
        self.start <= at && at < self.end
    }
}

/// Counts of one client thread, then of all.
pub struct Record {
    /// Requests answered within the window: what rates and costs are divided by.
    pub answered: u64,
    /// Requests that the schedule of an open loop put into the window.
    pub due: u64,
    pub errors: BTreeMap<String, u64>,
    latencies: Histogram<u64>,
}

impl Default for Record {
    fn default() -> Self {
        let max = nanos(LATENCY_MAX);
        let latencies = Histogram::new_with_bounds(1, max, DIGITS);
        Self {
            answered: 0,
            due: 0,
            errors: BTreeMap::new(),
            latencies: latencies.unwrap_or_else(|_| unreachable!("constant bounds are in order")),
        }
    }
}

impl Record {
    pub fn latency(&mut self, latency: Duration) {
        self.latencies.saturating_record(nanos(latency));
    }

    pub fn error(&mut self, kind: &str) {
        match self.errors.get_mut(kind) {
            Some(count) => *count += 1,
            None => drop(self.errors.insert(kind.to_owned(), 1)),
        }
    }

    pub fn add(&mut self, other: &Self) {
        self.answered += other.answered;
        self.due += other.due;
        for (kind, count) in &other.errors {
            *self.errors.entry(kind.clone()).or_default() += count;
        }
        // Both have the same bounds.
        if self.latencies.add(&other.latencies).is_err() {
            unreachable!("histograms of the same bounds add up");
        }
    }

    #[must_use]
    pub fn latencies(&self) -> Latencies {
        let us = |value: u64| value as f64 / 1e3;
        let at = |quantile| us(self.latencies.value_at_quantile(quantile));
        Latencies {
            count: self.latencies.len(),
            mean: self.latencies.mean() / 1e3,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            p99_9: at(0.999),
            max: us(self.latencies.max()),
        }
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// Microseconds.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Latencies {
    pub count: u64,
    pub mean: f64,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p99_9: f64,
    pub max: f64,
}

/// What a process used during the window.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub struct Usage {
    /// User and system time of all its threads, over requests answered.
    pub cpu_us_per_request: f64,
    /// Processors that it kept busy.
    pub cores: f64,
    /// Share of system time; the kernel tells it to 10 ms.
    pub system_share: f64,
    /// Resident memory at the end of the window.
    pub rss_mib: f64,
}

/// One run.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub struct Report {
    pub seconds: f64,
    pub requests: u64,
    /// Requests that were due in the window, in an open loop.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub due: Option<u64>,
    pub errors: BTreeMap<String, u64>,
    pub requests_per_s: f64,
    pub latency_us: Latencies,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<Usage>,
    pub client_cpu_us_per_request: f64,
    /// Processors that everything but server and client kept busy, or that the host took away.
    /// Ticks of 10 ms and interrupts make it inexact; it tells a quiet machine from a loud one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub others_cores: Option<f64>,
    pub request_bytes: usize,
    pub answer_bytes: usize,
}

impl Report {
    #[must_use]
    pub fn errors_total(&self) -> u64 {
        self.errors.values().sum()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let l = &self.latency_us;
        writeln!(f, "requests    {} in {:.2} s", self.requests, self.seconds)?;
        if let Some(due) = self.due {
            writeln!(f, "due         {due}")?;
        }
        writeln!(f, "errors      {}", self.errors_total())?;
        for (kind, count) in &self.errors {
            writeln!(f, "            {count} × {kind}")?;
        }
        writeln!(f, "requests/s  {:.1}", self.requests_per_s)?;
        writeln!(
            f,
            "latency     p50 {:.1} us, p90 {:.1} us, p99 {:.1} us, p99.9 {:.1} us, max {:.1} us, mean {:.1} us",
            l.p50, l.p90, l.p99, l.p99_9, l.max, l.mean
        )?;
        if let Some(server) = &self.server {
            writeln!(
                f,
                "server      {:.2} us of processor per request ({:.0} % system), {:.2} cores, {:.1} MiB resident",
                server.cpu_us_per_request,
                server.system_share * 100.0,
                server.cores,
                server.rss_mib
            )?;
        }
        writeln!(
            f,
            "client      {:.2} us of processor per request",
            self.client_cpu_us_per_request
        )?;
        if let Some(others) = self.others_cores {
            writeln!(f, "others      {others:.2} cores")?;
        }
        write!(f, "bytes       {} sent, {} answered", self.request_bytes, self.answer_bytes)
    }
}

/// The value in the middle; of an even number, the mean of the two.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[n / 2],
        n => f64::midpoint(sorted[n / 2 - 1], sorted[n / 2]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_the_promised_error() {
        let mut record = Record::default();
        for us in 1..=100_000 {
            record.latency(Duration::from_micros(us));
        }
        let got = record.latencies();
        let near = |got: f64, expected: f64| {
            assert!((got / expected - 1.0).abs() < 0.0011, "{got}, expected {expected}");
        };
        assert_eq!(got.count, 100_000);
        near(got.p50, 50_000.0);
        near(got.p90, 90_000.0);
        near(got.p99, 99_000.0);
        near(got.p99_9, 99_900.0);
        near(got.max, 100_000.0);
        near(got.mean, 50_000.5);
    }

    #[test]
    fn records_of_threads_add_up() {
        let mut all = Record::default();
        for errors in [&["timeout"][..], &["timeout", "http 503"]] {
            let mut one = Record { answered: 2, due: 3, ..Record::default() };
            one.latency(Duration::from_millis(5));
            errors.iter().for_each(|kind| one.error(kind));
            all.add(&one);
        }
        assert_eq!((all.answered, all.due, all.latencies().count), (4, 6, 2));
        let errors: Vec<_> =
            all.errors.iter().map(|(kind, count)| (kind.as_str(), *count)).collect();
        assert_eq!(errors, [("http 503", 1), ("timeout", 2)]);
    }

    #[test]
    fn a_latency_beyond_the_scale_is_kept_as_the_longest() {
        let mut record = Record::default();
        record.latency(2 * LATENCY_MAX);
        assert!(record.latencies().max >= LATENCY_MAX.as_secs_f64() * 1e6);
    }

    #[test]
    fn a_report_names_every_kind_of_error() {
        let errors = BTreeMap::from([("http 503".to_owned(), 2), ("timeout".to_owned(), 1)]);
        let text = Report { errors, requests: 7, ..Report::default() }.to_string();
        for part in ["requests    7", "errors      3", "2 × http 503", "1 × timeout", "p99.9"] {
            assert!(text.contains(part), "'{part}' in {text}");
        }
    }

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert!(median(&[]).is_nan());
    }
}
