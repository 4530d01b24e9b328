//! What the metrics page shows of the ledger.

use super::Ledger;
use super::delivery::Delivery;
use super::log::LogStats;
use super::notary::Notary;
use crate::observe::LATENCY_BOUNDS_NS;
use crate::observe::page::{Family, Kind};

impl Ledger {
    /// For the page: one series for each log.
    pub fn families(&self) -> Vec<Family> {
        let stats = self.stats();
        let family = |name, kind, help, of: fn(&LogStats) -> f64| {
            let mut family = Family::new(name, kind, help);
            for (log, stats) in &stats {
                family.push(vec![("log".into(), (*log).to_owned())], of(stats));
            }
            family
        };
        let counter = |name, help, of| family(name, Kind::Counter, help, of);
        let mut families = vec![
            counter("tidegate_ledger_records_total", "Records that a log took", |log| {
                log.records as f64
            }),
            counter("tidegate_ledger_bytes_total", "Bytes of records that a log took", |log| {
                log.bytes as f64
            }),
            counter(
                "tidegate_ledger_fsyncs_total",
                "Times that a log was asked onto the disk",
                |log| log.fsyncs as f64,
            ),
            counter("tidegate_ledger_dropped_total", "Calls that have no record", |log| {
                log.dropped as f64
            }),
            family(
                "tidegate_ledger_lag_seconds",
                Kind::Gauge,
                "Age of the oldest record that is not on the disk",
                |log| log.lag.as_secs_f64(),
            ),
        ];
        let help = "Time of a group of records to where it is waited for";
        let mut commits = Family::new("tidegate_ledger_commit_seconds", Kind::Histogram, help);
        for (log, stats) in &stats {
            let bounds = LATENCY_BOUNDS_NS.iter().map(|bound| *bound as f64 / 1e9);
            let (counts, sum) = (&stats.commit_buckets, stats.commit_seconds);
            commits.push_histogram(vec![("log".into(), (*log).to_owned())], bounds, counts, sum);
        }
        families.push(commits);
        families.extend(self.upkeep_families());
        families.extend(self.notary.lock().iter().flat_map(Notary::families));
        families.extend(self.delivery().into_iter().flat_map(Delivery::families));
        families
    }
}
