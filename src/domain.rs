//! The nouns of the product: names, tensors, signatures, requests, completions, error kinds.
//!
//! No IO, no async, no protocol. Everything above imports from here and this imports nothing of
//! ours.

mod completion;
mod datatype;
mod error;
mod index;
mod names;
mod recording;
mod request;
mod settings;
mod signature;
mod tensor;
mod traffic;

pub use completion::{Arm, Completion, Outcome, Protocol, RouteReason, Timings, TraceContext};
pub use datatype::DataType;
pub use error::{ErrorKind, Failure};
pub use index::{IndexEntry, ModelControl, ModelFile, VersionState};
pub use names::{Digest, Label, ModelName, NameError, Version, VersionRef};
pub use recording::{
    Capture, Columns, Durability, OnUnrecorded, RecordSettings, Recording, SAMPLE_ALL,
    TENSOR_RULES_MAX, TensorRule, Treatment, sample_of,
};
pub use request::{
    Answer, AnswerHead, CallMeta, Deadline, InferRequest, Inputs, NamedTensor, ParameterValue,
    Parameters, RequestedOutput, RouteHeaders, STICKY_KEY_LEN_MAX, TypeInputs, TypedInputs,
};
pub use settings::{
    BatchSettings, EngineChoice, FeedbackSettings, FeedbackTask, ModelSettings, PAD_BUCKETS_MAX,
    PAD_LENGTH_MAX, PadValue, PaddedInput, PaddedOutput, PaddingSettings, Provider, VersionPolicy,
    WARMUP_RECORDS_MAX, WarmupSettings,
};
pub use signature::{Dim, Signature, TensorSpec};
pub use tensor::{BytesElements, RANK_MAX, Shape, Tensor, TensorError};
pub use traffic::{
    BUCKETS, HEADER_LEN_MAX, PARAMETER_LEN_MAX, RULES_MAX, Rule, SHADOWS_MAX, Shadow, Sticky,
    Traffic, VALUE_LEN_MAX, WEIGHTS_MAX,
};
