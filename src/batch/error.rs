//! Why a lane did not answer with outputs.

use std::sync::Arc;
use std::time::Duration;

use crate::domain::{ErrorKind, Failure, ModelName};
use crate::engine::EngineError;

#[derive(Clone, Debug, thiserror::Error)]
pub enum BatchError {
    #[error("queue of model '{model}' is full ({queue_max} requests are waiting)")]
    QueueFull { model: ModelName, queue_max: usize, retry_after: Duration },
    #[error("queue of model '{model}' is full (the limit is {bytes_max} bytes)")]
    QueueBytes { model: ModelName, bytes_max: usize, retry_after: Duration },
    #[error(
        "model '{model}' is too busy for this request's deadline: about {} ms of waiting and {} ms of \
         running are ahead of it", wait.as_millis(), run.as_millis()
    )]
    NotInTime { model: ModelName, wait: Duration, run: Duration, retry_after: Duration },
    #[error("model '{model}' is too busy: not begun after {} ms in the queue", waited.as_millis())]
    WaitedTooLong { model: ModelName, waited: Duration, retry_after: Duration },
    #[error("deadline passed after {} ms", waited.as_millis())]
    DeadlineExceeded { waited: Duration },
    #[error("version is being retired")]
    Retired,
    #[error("made room for a request")]
    GaveWay,
    #[error("batch size {rows} is over the model's limit of {rows_max}")]
    TooManyRows { rows: usize, rows_max: usize },
    #[error("priority {priority} is over the model's {levels} levels")]
    Priority { priority: u32, levels: u32 },
    #[error(transparent)]
    Engine(Arc<EngineError>),
    #[error("output {at} has {got} rows for a batch of {expected}")]
    OutputRows { at: usize, got: usize, expected: usize },
    #[error("input '{input}' has {rank} dimensions, expected a length along axis {axis}")]
    NoLength { input: String, axis: usize, rank: usize },
    #[error("input '{input}' has length {length}, expected {expected} as input '{other}' has")]
    UnequalLengths { input: String, length: usize, other: String, expected: usize },
    #[error("output '{output}' has shape {shape:?}, expected {expected} along axis {axis}")]
    OutputLength { output: String, shape: Vec<usize>, axis: usize, expected: usize },
    #[error("requests of a batch could not be joined")]
    NotJoined,
    #[error("inference worker was lost")]
    WorkerLost,
}

impl BatchError {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::QueueFull { .. }
            | Self::QueueBytes { .. }
            | Self::NotInTime { .. }
            | Self::WaitedTooLong { .. }
            | Self::GaveWay => ErrorKind::Overloaded,
            Self::DeadlineExceeded { .. } => ErrorKind::DeadlineExceeded,
            Self::Retired => ErrorKind::Unavailable,
            Self::TooManyRows { .. }
            | Self::Priority { .. }
            | Self::NoLength { .. }
            | Self::UnequalLengths { .. } => ErrorKind::InvalidInput,
            Self::Engine(error) => error.kind(),
            Self::OutputRows { .. } | Self::OutputLength { .. } => ErrorKind::ModelFailed,
            Self::NotJoined | Self::WorkerLost => ErrorKind::Internal,
        }
    }

    /// What the caller sees.
    pub fn into_failure(self) -> Failure {
        let failure = Failure::new(self.kind(), self.to_string());
        match self {
            Self::QueueFull { retry_after, .. }
            | Self::QueueBytes { retry_after, .. }
            | Self::NotInTime { retry_after, .. }
            | Self::WaitedTooLong { retry_after, .. } => failure.retry_after(retry_after),
            Self::Retired => failure.retry_after(Duration::from_secs(1)),
            _ => failure,
        }
    }
}
