//! What is seen of the gateway: metrics, statistics, access log, traces.
//!
//! The request path hands over each finished [`Completion`] once and never waits here.

use crate::domain::Completion;

mod stats;

pub use stats::{BatchStat, DurationStat, StatsSnapshot, VersionStats};

/// Receives every completion.
#[derive(Default)]
pub struct Observer {}

impl Observer {
    /// Counts, and hands on to the access log and the trace exporter. `stats` is the version's,
    /// when one was picked.
    pub fn completed(&self, stats: Option<&VersionStats>, completion: &Completion) {
        if let Some(stats) = stats {
            stats.completed(completion);
        }
    }
}
