//! How one model is to be served: what `config.pbtxt` and `tidegate.toml` say, merged.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::RecordSettings;

/// Which engine a model runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// ONNX Runtime when it is there, tract otherwise.
    #[default]
    Auto,
    Ort,
    Tract,
}

/// Execution provider of ONNX Runtime, in order of preference.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Provider {
    Cpu,
    Cuda { device_id: i32, memory_max_bytes: Option<usize> },
}

/// How requests wait and are joined. `size_max` 1 means they never are joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct BatchSettings {
    /// Most rows in one batch.
    pub size_max: usize,
    /// Most rows that one request may bring; more is refused. At least `size_max`.
    pub rows_max: usize,
    /// Sizes at which a batch is closed at once; empty: only when full or due.
    pub preferred: Vec<usize>,
    /// How long the first request of a batch may be held back for others.
    pub wait_max: Duration,
    /// Most elements, of all inputs, in one batch; a request that alone brings more runs alone.
    pub elements_max: usize,
    /// Most requests waiting.
    pub queue_max: usize,
    /// Most bytes waiting; a request that alone is larger waits only in an empty queue.
    pub queue_bytes_max: usize,
    /// Longest time in the queue; `None`: only the deadline counts, and every request has one.
    pub queue_wait_max: Option<Duration>,
    /// A request's own timeout may shorten the wait.
    pub allow_timeout_override: bool,
    /// Answers leave in the order that requests came.
    pub preserve_ordering: bool,
    /// Number of priorities; 0 means all are equal. 1 is the highest.
    pub priority_levels: u32,
    pub priority_default: u32,
    /// Head start of a priority over the next lower one: so much longer has the lower one to wait
    /// until it goes first.
    pub priority_age: Duration,
    /// How requests of unequal length share a batch; `None`: they do not.
    pub padding: Option<PaddingSettings>,
}

/// Most lengths that a list of buckets may hold.
pub const PAD_BUCKETS_MAX: usize = 64;
/// Longest bucket.
pub const PAD_LENGTH_MAX: usize = 1 << 20;

/// Which inputs and outputs have a length that varies, and what stands behind a shorter one.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PaddingSettings {
    /// Lengths that requests are padded to, ascending; a longer one keeps its own. Empty: those of
    /// one power of two go together and are padded to the longest among them.
    pub buckets: Vec<usize>,
    pub inputs: Vec<PaddedInput>,
    pub outputs: Vec<PaddedOutput>,
    /// The one of `inputs` that is made of ones where the caller leaves it out.
    pub mask: Option<String>,
}

/// `axis` counts from the batch, which is 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PaddedInput {
    pub name: String,
    pub axis: usize,
    pub value: PadValue,
}

/// An output that is cut back to its request's length.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PaddedOutput {
    pub name: String,
    pub axis: usize,
}

/// An element, before its datatype is known.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum PadValue {
    /// 0, false or the empty text.
    #[default]
    Zero,
    Bool(bool),
    Int(i64),
    /// The bits of an `f64`: JSON has no infinity.
    Float(u64),
    Text(String),
}

impl Default for BatchSettings {
    /// No delay: a batch is what waits when a worker is free.
    fn default() -> Self {
        Self {
            size_max: 64,
            rows_max: 4096,
            preferred: Vec::new(),
            wait_max: Duration::ZERO,
            elements_max: 16 << 20,
            queue_max: 1024,
            queue_bytes_max: 256 << 20,
            queue_wait_max: None,
            allow_timeout_override: true,
            preserve_ordering: false,
            priority_levels: 0,
            priority_default: 0,
            padding: None,
            priority_age: Duration::from_secs(1),
        }
    }
}

/// What is run before a version takes traffic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmupSettings {
    /// Runs with zeros for each batch size tried.
    pub runs: usize,
    /// Newest inputs of the model, from the ledger, that are run besides; 0: none.
    #[serde(default = "WarmupSettings::records")]
    pub records: usize,
}

/// Most recorded inputs that a version is warmed with.
pub const WARMUP_RECORDS_MAX: usize = 256;

impl WarmupSettings {
    fn records() -> usize {
        Self::default().records
    }
}

impl Default for WarmupSettings {
    fn default() -> Self {
        Self { runs: 2, records: 16 }
    }
}

/// Everything about serving one model, with defaults filled in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelSettings {
    pub engine: EngineChoice,
    /// Empty: the CPU.
    pub providers: Vec<Provider>,
    /// Sessions, each with a worker thread; `None`: as many as the thread budget allows.
    pub instances: Option<usize>,
    /// Threads inside one run; `None`: 1.
    pub intra_threads: Option<usize>,
    pub batch: BatchSettings,
    /// `Some(false)`: never join requests, whatever the graph looks like. `Some(true)`: the first
    /// dimension is the batch. `None`: infer it from the graph.
    pub batched: Option<bool>,
    pub warmup: WarmupSettings,
    /// Class names per output, for the classification extension.
    pub labels: Vec<(String, Vec<String>)>,
    /// File of the model inside a version folder; `None`: `model.onnx`.
    pub model_file: Option<String>,
    /// Triton's `version_policy`; `None`: the latest only is served by default but all are loaded.
    pub versions: Option<VersionPolicy>,
    /// A version may take over although its inputs or outputs differ from those of the one before.
    #[serde(default)]
    pub signature_change: bool,
    /// Deadline when the caller sets none, and the longest one that it may set.
    pub timeout_max: Option<Duration>,
    /// Equal inputs may be answered with what the model said before.
    pub cached: bool,
    /// Most bytes of one request's outputs; `None`: the gateway's.
    pub output_bytes_max: Option<usize>,
    /// What the ledger keeps of its predictions.
    #[serde(default, skip_serializing_if = "RecordSettings::is_default")]
    pub ledger: RecordSettings,
    /// What labels are held against.
    #[serde(default, skip_serializing_if = "FeedbackSettings::is_default")]
    pub feedback: FeedbackSettings,
}

/// How outputs are read that labels are held against.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FeedbackSettings {
    /// `None`: what the outputs look like.
    pub task: Option<FeedbackTask>,
    /// `None`: the first that fits.
    pub output: Option<String>,
    /// A score of two classes is the second one's from here on, in millionths; `None`: a half.
    pub threshold_ppm: Option<u32>,
}

impl FeedbackSettings {
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// What a model is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum FeedbackTask {
    Classification,
    Regression,
}

/// Which of a model's versions are loaded.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum VersionPolicy {
    Latest(usize),
    All,
    Specific(Vec<u64>),
}
