//! One finished request, whole: what metrics, access log, traces and the ledger read.

use std::fmt;
use std::time::{Duration, SystemTime};

use uuid::Uuid;

use super::{Digest, ErrorKind, Label, ModelName, Tensor, Version};

/// Which share of the traffic a request belonged to.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Arm {
    Stable,
    Canary,
    /// The caller named the version or label.
    Pinned,
    /// A routing rule's name.
    Rule(Label),
}

impl Arm {
    /// What the split names: which of the two a version is called depends on its share, not on whether
    /// it is the candidate of a rollout.
    pub const SPLIT: [Self; 2] = [Self::Stable, Self::Canary];

    /// Whether the split names an arm so.
    pub fn is_of_split(name: &str) -> bool {
        Self::SPLIT.iter().any(|arm| arm.as_str() == name)
    }

    pub fn as_str(&self) -> &str {
        match self {
            Self::Stable => "stable",
            Self::Canary => "canary",
            Self::Pinned => "pinned",
            Self::Rule(name) => name.as_str(),
        }
    }
}

/// Why the route table picked this version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RouteReason {
    /// No traffic table and no label `stable`: the highest ready version.
    Latest,
    /// The caller named the version.
    Version,
    /// The caller named the label; or nobody named anything, there is no traffic table, and the
    /// label is `stable`.
    Label(Label),
    /// A rule of the traffic table, by its name.
    Rule(Label),
    /// The weights of the traffic table.
    Weight {
        /// Where the request fell, of [`BUCKETS`](super::BUCKETS).
        bucket: u16,
        /// The version's share of them at that moment.
        share: u16,
        /// By a key that the caller sent, not by the prediction id.
        sticky: bool,
    },
    /// A copy of another request, made for so many of all [`BUCKETS`](super::BUCKETS).
    Shadow { share: u16 },
}

/// As the ledger keeps it.
impl fmt::Display for RouteReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Version => f.write_str("version"),
            Self::Label(label) => write!(f, "label {label}"),
            Self::Rule(name) => write!(f, "rule {name}"),
            Self::Weight { bucket, share, sticky } => {
                let sticky = if *sticky { ", sticky" } else { "" };
                write!(f, "weight share {share}, bucket {bucket}{sticky}")
            }
            Self::Shadow { share } => write!(f, "shadow share {share}"),
        }
    }
}

/// Dialect that the caller spoke.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Protocol {
    Http,
    Grpc,
    GrpcStream,
}

impl Protocol {
    pub const ALL: [Self; 3] = [Self::Http, Self::Grpc, Self::GrpcStream];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
            Self::GrpcStream => "grpc_stream",
        }
    }
}

/// Where a request's time went. Parts that it never reached are zero.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Timings {
    /// From the queue to a worker, without the batch window.
    pub queue: Duration,
    /// Held back for others to join the batch.
    pub batch_wait: Duration,
    /// Joining inputs.
    pub compute_input: Duration,
    /// In the model.
    pub compute_infer: Duration,
    /// Cutting outputs.
    pub compute_output: Duration,
    /// From arrival to the answer's being ready.
    pub total: Duration,
}

impl Timings {
    /// Our own share: all but the waiting and the model.
    pub fn overhead(&self) -> Duration {
        self.total.saturating_sub(self.queue + self.batch_wait + self.compute_infer)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    Failed { kind: ErrorKind, message: String },
}

impl Outcome {
    /// `ok`, or the error's stable word.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed { kind, .. } => kind.code(),
        }
    }
}

/// W3C trace context of the caller, and our own span in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceContext {
    pub trace_id: u128,
    /// The caller's span; ours is its child.
    pub parent_span: u64,
    pub sampled: bool,
}

#[derive(Clone, Debug)]
pub struct Completion {
    pub prediction_id: Uuid,
    pub request_id: String,
    pub received_at: SystemTime,
    pub model: ModelName,
    pub version: Option<Version>,
    pub digest: Option<Digest>,
    pub arm: Option<Arm>,
    pub reason: Option<RouteReason>,
    pub protocol: Protocol,
    pub principal: Option<String>,
    pub trace: Option<TraceContext>,
    pub outcome: Outcome,
    pub timings: Timings,
    /// Rows this request brought; 1 for a model without a batch dimension.
    pub rows: usize,
    /// Rows of the batch it ran in; 0 when it never ran.
    pub batch_size: usize,
    /// Answered with what the model said before.
    pub cached: bool,
    /// The prediction whose inputs this one ran on a copy of, for nobody; it is no client's
    /// request and has no arm.
    pub shadow_of: Option<Uuid>,
    /// In the signature's order; empty when they were never bound.
    pub inputs: Vec<Tensor>,
    pub outputs: Vec<Tensor>,
}
