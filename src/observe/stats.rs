//! Counters of one loaded version.

use crate::domain::{Completion, Digest, ModelName, Version};

/// How often and for how long, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DurationStat {
    pub count: u64,
    pub ns: u64,
}

/// Executions of one batch size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchStat {
    pub batch_size: u64,
    pub compute_input: DurationStat,
    pub compute_infer: DurationStat,
    pub compute_output: DurationStat,
}

/// What the statistics extension shows of a version.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatsSnapshot {
    /// Milliseconds since the epoch; 0 when there was none.
    pub last_inference_ms: u64,
    /// Rows answered.
    pub inference_count: u64,
    pub execution_count: u64,
    pub success: DurationStat,
    pub fail: DurationStat,
    pub queue: DurationStat,
    pub compute_input: DurationStat,
    pub compute_infer: DurationStat,
    pub compute_output: DurationStat,
    pub batches: Vec<BatchStat>,
}

/// Made when a version loads, gone with it.
pub struct VersionStats {}

impl VersionStats {
    /// Registers the version's series with `observer`; they end when the last `Arc` goes.
    pub fn new(
        _observer: &super::Observer,
        _model: &ModelName,
        _version: Version,
        _digest: &Digest,
        _engine: &'static str,
    ) -> std::sync::Arc<Self> {
        std::sync::Arc::new(Self {})
    }

    pub fn completed(&self, _completion: &Completion) {}

    /// One execution of a batch of `rows`.
    pub fn executed(&self, _rows: usize, _timings: &crate::domain::Timings) {}

    pub fn snapshot(&self) -> StatsSnapshot {
        StatsSnapshot::default()
    }
}
