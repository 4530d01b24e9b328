//! Runs a batch on a loaded model: synchronous, no queue, no clock.
//!
//! ```text
//! Backend ──load──▶ Model ──session──▶ Session (one per inference thread) ──run──▶ tensors
//! ```
//!
//! Invariants:
//! - Row `i` of the outputs belongs to row `i` of the inputs, whatever else is in the batch.
//! - Bad input and a failing model are errors, never panics.

use std::path::PathBuf;
use std::sync::Arc;

use crate::domain::{Dim, ErrorKind, Provider, Signature, Tensor, TensorSpec};

pub mod conformance;
mod engines;
pub mod fake;
pub mod onnx;
#[cfg(feature = "ort")]
pub mod ort;
#[cfg(feature = "tract")]
pub mod tract;

pub use engines::{Engines, keep_little_memory, leave, prepare_environment, release_memory};

/// A kind of engine, ready to load models.
pub trait Backend: Send + Sync {
    /// `onnxruntime` or `tract`.
    fn name(&self) -> &'static str;
    /// Version of the library in use.
    fn version(&self) -> String;
    /// Reads and optimises a model; slow.
    fn load(
        &self,
        artifact: &Artifact,
        options: &LoadOptions,
    ) -> Result<Arc<dyn Model>, EngineError>;
}

/// A verified, private copy of a model's files.
#[derive(Clone, Debug)]
pub struct Artifact {
    /// The model file; external data lies beside it.
    pub path: PathBuf,
    /// A folder for what the engine derives from this model (optimised graphs); may be removed.
    pub derived: Option<PathBuf>,
}

#[derive(Clone, Debug)]
pub struct LoadOptions {
    /// Threads inside one run; at least 1.
    pub intra_threads: usize,
    /// Sessions that will be made, so that an engine knows if sharing weights pays.
    pub sessions: usize,
    /// In order of preference; empty: the CPU.
    pub providers: Vec<Provider>,
}

/// A loaded model: what sessions share.
pub trait Model: Send + Sync {
    fn signature(&self) -> &Signature;
    /// A new session on the shared weights.
    fn session(&self) -> Result<Box<dyn Session>, EngineError>;
    /// Providers in use and other facts an operator wants to see, one line each.
    fn notes(&self) -> Vec<String> {
        Vec::new()
    }
}

/// One thread's way to run the model.
pub trait Session: Send {
    /// Inputs in the signature's order; outputs likewise.
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError>;
    /// The way to end a run from another thread, where there is one.
    fn stopper(&self) -> Option<Arc<dyn Stop>> {
        None
    }
    /// Whether the model has loops, so that what a run takes may hang on the inputs' values.
    fn loops(&self) -> bool {
        false
    }
}

/// Ends runs of one session from another thread.
pub trait Stop: Send + Sync {
    /// The run in progress, and each later one until [`Stop::reset`], ends early and fails.
    fn stop(&self);
    /// Later runs run to their end.
    fn reset(&self);
}

/// Inputs as a session was promised them: as many as declared, of their datatypes and ranks.
fn check_inputs(specs: &[TensorSpec], inputs: &[Tensor]) -> Result<(), EngineError> {
    if specs.len() != inputs.len() {
        let (expected, got) = (specs.len(), inputs.len());
        return Err(EngineError::Run(format!("expected {expected} inputs, got {got}")));
    }
    for (spec, tensor) in specs.iter().zip(inputs) {
        let refuse = |reason: String| Err(EngineError::Input { name: spec.name.clone(), reason });
        if spec.datatype != tensor.datatype() {
            let (expected, got) = (spec.datatype, tensor.datatype());
            return refuse(format!("expected datatype {expected}, got {got}"));
        }
        let fits = |dims: &Vec<Dim>| {
            dims.len() == tensor.shape().len()
                && dims.iter().zip(tensor.shape()).all(|(dim, size)| match dim {
                    Dim::Fixed(fixed) => fixed == size,
                    Dim::Dynamic(_) => true,
                })
        };
        if !spec.shape.as_ref().is_none_or(fits) {
            let (expected, got) = (spec.wire_shape(), tensor.shape());
            return refuse(format!("expected shape {expected:?}, got {got:?}"));
        }
    }
    Ok(())
}

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The file is no model that any engine can read.
    #[error("model is broken: {0}")]
    Broken(String),
    /// This engine lacks something that another may have.
    #[error("{engine} cannot run this model: {missing}")]
    Unsupported { engine: &'static str, missing: String },
    #[error("engine {engine} is not available: {reason}")]
    NotAvailable { engine: &'static str, reason: String },
    #[error("input '{name}': {reason}")]
    Input { name: String, reason: String },
    #[error("run failed: {0}")]
    Run(String),
    #[error("{0}")]
    Io(String),
}

impl EngineError {
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Input { .. } => ErrorKind::InvalidInput,
            Self::Unsupported { .. } => ErrorKind::Unsupported,
            Self::NotAvailable { .. } => ErrorKind::Unavailable,
            Self::Run(_) => ErrorKind::ModelFailed,
            Self::Broken(_) | Self::Io(_) => ErrorKind::Internal,
        }
    }
}
