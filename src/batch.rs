//! Turns single requests into batches.

use std::sync::Arc;

use crate::domain::{
    BatchSettings, Deadline, ErrorKind, Failure, ModelName, Tensor, Timings, Version,
};
use crate::engine::Session;
use crate::observe::VersionStats;

/// What a lane is made of.
pub struct LaneParts {
    pub model: ModelName,
    pub version: Version,
    pub batch: BatchSettings,
    /// The first dimension of every tensor is the batch; else requests are never joined.
    pub batched: bool,
    /// One worker thread each; at least one.
    pub sessions: Vec<Box<dyn Session>>,
    pub stats: Arc<VersionStats>,
}

/// Queue, former and workers of one loaded version.
pub struct Lane {}

/// Outputs of one request and how it ran.
#[derive(Clone, Debug)]
pub struct Ran {
    /// In the signature's order.
    pub outputs: Vec<Tensor>,
    /// All but `total`.
    pub timings: Timings,
    /// Rows of the batch it ran in.
    pub batch_size: usize,
}

#[derive(Clone, Debug, thiserror::Error)]
pub enum BatchError {
    #[error("not built yet")]
    Later,
}

impl BatchError {
    pub fn into_failure(self) -> Failure {
        Failure::new(ErrorKind::Internal, self.to_string())
    }
}

impl Lane {
    pub fn new(_parts: LaneParts) -> std::io::Result<Self> {
        Ok(Self {})
    }

    /// Queues one request and waits for its outputs, but not for room in the queue. Dropping the
    /// future withdraws the request. `priority` 0 means the model's default, 1 is the highest.
    ///
    /// # Errors
    /// Full queue, passed deadline, retired lane, or the engine's error.
    pub async fn infer(
        &self,
        _inputs: Vec<Tensor>,
        _deadline: Deadline,
        _priority: u32,
    ) -> Result<Ran, BatchError> {
        Err(BatchError::Later)
    }

    /// Requests waiting or running.
    pub fn in_flight(&self) -> usize {
        0
    }

    /// Requests waiting.
    pub fn queue_depth(&self) -> usize {
        0
    }
}
