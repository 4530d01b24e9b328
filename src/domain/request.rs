//! A prediction request and its answer, free of any protocol.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;

use super::{
    Arm, Digest, Failure, ModelName, Protocol, Signature, Tensor, TraceContext, Version, VersionRef,
};

/// Longest sticky key, in bytes; a longer one counts as none.
pub const STICKY_KEY_LEN_MAX: usize = 256;

/// A tensor and the name that the model knows it by.
#[derive(Clone, Debug, PartialEq)]
pub struct NamedTensor {
    pub name: String,
    pub tensor: Tensor,
}

/// Value of a request or tensor parameter.
#[derive(Clone, Debug, PartialEq)]
pub enum ParameterValue {
    Bool(bool),
    Int(i64),
    Uint(u64),
    Double(f64),
    String(String),
}

/// Parameters in the order they came.
pub type Parameters = Vec<(String, ParameterValue)>;

/// Tensors in the making, perhaps on another thread.
pub type TypedInputs = Pin<Box<dyn Future<Output = Result<Vec<NamedTensor>, Failure>> + Send>>;

/// Makes a request's tensors once the model, and so its signature, is known.
pub type TypeInputs = Box<dyn FnOnce(&Signature) -> TypedInputs + Send>;

/// Where a request's tensors come from.
pub enum Inputs {
    /// The caller named and typed them.
    Named(Vec<NamedTensor>),
    /// They can only be typed by the model's signature (a raw body, `instances`, a data frame).
    Deferred(TypeInputs),
}

/// One output that the caller asked for.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestedOutput {
    pub name: String,
    /// Give the best `n` classes as `value:index[:label]` instead of the tensor; at least 1.
    pub classification: Option<usize>,
}

/// One prediction to make.
pub struct InferRequest {
    pub model: ModelName,
    /// `None` leaves the choice to the traffic table.
    pub version: Option<VersionRef>,
    /// The caller's own id, echoed; empty when there was none.
    pub id: String,
    pub inputs: Inputs,
    /// Empty asks for every output, in the model's order.
    pub outputs: Vec<RequestedOutput>,
    pub parameters: Parameters,
}

/// What transport knows of a call before its body is read.
#[derive(Clone, Debug)]
pub struct CallMeta {
    pub protocol: Protocol,
    pub received: Instant,
    /// How long the caller wants to wait at most, from its headers.
    pub timeout: Option<Duration>,
    pub trace: Option<TraceContext>,
    /// From `tidegate-sticky-key`.
    pub sticky_key: Option<String>,
    /// What else of its headers may decide its version.
    pub headers: RouteHeaders,
    /// Who is calling; `None` when nobody had to say.
    pub principal: Option<String>,
}

/// The headers of a call (gRPC: its metadata) that may decide its version.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RouteHeaders {
    /// The header that is configured for models whose traffic names no sticky key of its own.
    pub sticky_key: Option<String>,
    /// Those that some model's traffic asks for, by name in lower case.
    pub named: Vec<(Arc<str>, String)>,
    /// The header that is configured to say whom the data is about.
    pub subject: Option<String>,
}

impl RouteHeaders {
    /// Value of the header `name`, in lower case.
    pub fn get(&self, name: &str) -> Option<&str> {
        let found = self.named.iter().find(|(have, _)| **have == *name);
        found.map(|(_, value)| value.as_str())
    }
}

/// Absolute end of what the caller waits for, made on arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Deadline {
    pub received: Instant,
    pub at: Instant,
}

impl Deadline {
    pub fn new(received: Instant, wait: Duration) -> Self {
        Self { received, at: received + wait }
    }

    pub fn passed(&self, now: Instant) -> bool {
        self.at <= now
    }
}

/// What every answer to a prediction carries, a failed one too, once the model is known.
#[derive(Clone, Debug, PartialEq)]
pub struct AnswerHead {
    pub prediction_id: Uuid,
    pub version: Option<Version>,
    pub digest: Option<Digest>,
    pub arm: Option<Arm>,
    /// Number of its record, if it has one.
    pub ledger_seq: Option<u64>,
}

/// A prediction that was made, to be written in its caller's form.
#[derive(Clone, Debug)]
pub struct Answer {
    pub model: ModelName,
    pub version: Option<Version>,
    /// The caller's own.
    pub id: String,
    /// In the order asked for, or the model's.
    pub outputs: Vec<NamedTensor>,
}
