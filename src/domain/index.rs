//! The repository as a client sees it, and the one interface through which a client may change it.

use std::future::Future;
use std::pin::Pin;

use bytes::Bytes;

use super::{Failure, ModelName, Version};

/// Where a version is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VersionState {
    Loading,
    Ready,
    Unloading,
    Unavailable,
}

impl VersionState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Loading => "LOADING",
            Self::Ready => "READY",
            Self::Unloading => "UNLOADING",
            Self::Unavailable => "UNAVAILABLE",
        }
    }
}

/// One line of the repository index. A model without any version has no `version`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexEntry {
    pub model: ModelName,
    pub version: Option<Version>,
    pub state: VersionState,
    /// Why it is not ready; empty when there is nothing to say.
    pub reason: String,
}

/// A file that a load call brings along: `file:<path>`.
#[derive(Clone, Debug)]
pub struct ModelFile {
    /// Relative to the model's folder: `1/model.onnx`.
    pub path: String,
    pub content: Bytes,
}

type Done<'a> = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>>;

/// Control of the repository from the data plane; implemented by `control`, which the request
/// path never imports.
pub trait ModelControl: Send + Sync {
    /// Every known version, ordered by model and version.
    fn index(&self) -> Vec<IndexEntry>;

    /// Loads or reloads a model; returns when it is ready or has failed.
    ///
    /// `config` replaces the model's configuration (Triton's JSON mapping); `files` replace its
    /// folder and need `config`.
    fn load<'a>(
        &'a self,
        model: &'a ModelName,
        config: Option<&'a str>,
        files: Vec<ModelFile>,
    ) -> Done<'a>;

    /// Takes a model out of service; returns when its requests have drained.
    fn unload<'a>(&'a self, model: &'a ModelName) -> Done<'a>;
}
