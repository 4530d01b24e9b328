//! Decides which versions exist and what each of them gets: finds, loads, splits, retires.
//!
//! ```text
//! source ─▶ registry: fetch (private copy, digest) ─▶ probe (child process) ─▶ load ─▶ warm ─┐
//! admin ──▶ director: check ─▶ store (durable, journal) ────────────────────────────────────┴▶ switchboard
//! ```
//!
//! Invariants:
//! - Everything that can fail happens before the table is swapped; the swap cannot fail.
//! - What was decided is durable before it is in force, and in force before it is answered; only going
//!   back is in force first.
//! - Only a verified, private copy of a model is ever loaded.
//! - A broken model is reported with its reason and never stops the others or the gateway.

use std::path::PathBuf;
use std::time::Duration;

use crate::domain::{EngineChoice, Failure, ModelName, RecordSettings};
use manifest::Manifest;

pub mod admin_log;
pub mod alerts;
pub mod bootstrap;
pub mod call;
mod confined;
pub mod desk;
pub mod director;
mod fetch;
pub mod hooks;
mod inspect;
pub mod keys;
pub mod lineage;
pub mod manifest;
pub mod probe;
pub mod registry;
pub mod reproduce;
pub mod rollout;
mod samples;
mod scan;
mod signature;
pub mod source;
pub mod store;
mod sweep;
pub mod switchboard;
mod trial;
mod turns;
mod version;
pub mod view;
mod yaml;

pub use crate::secret;
pub use director::Director;
pub use fetch::FetchError;
pub use inspect::{EngineTrial, Inspection, Verdict, inspect, validate};
pub use probe::ProbeError;
pub use registry::Registry;
pub use signature::{SignatureError, Signed, TrustedKeys};
pub use switchboard::Switchboard;
pub use version::{Checked, PrepareError, Preparer};

/// What the registry needs to know of the configuration.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Folder of models: `<model>/<version>/model.onnx`.
    pub repository: PathBuf,
    /// What the model is called when `repository` is one model's own folder.
    pub model_name: Option<ModelName>,
    /// Where the copies and verdicts are kept; made when missing.
    pub state_dir: PathBuf,
    /// Engine of the models that do not choose one themselves.
    pub engine: EngineChoice,
    /// ONNX Runtime's shared library, for the child process.
    pub ort_library: Option<PathBuf>,
    /// Threads that all models together may compute with; at least 1.
    pub threads: usize,
    pub probe: ProbeLimits,
    /// Largest model, external data included.
    pub model_size_max: u64,
    /// Copies kept of models that are not served any more.
    pub copies_max: usize,
    /// Newest versions that are loaded of a model that says nothing else; 0: all.
    pub versions_latest: usize,
    /// A version whose bytes are others than those first seen is quarantined.
    pub pin_digests: bool,
    /// Memory that the process may use, in bytes; `None`: nobody says.
    pub memory_max: Option<u64>,
    /// Load each new model in a child process first. Off only for trusted repositories.
    pub probe_enabled: bool,
    /// Program that the child process runs; `None`: this program's own file.
    pub probe_program: Option<PathBuf>,
    /// Model that `/invocations` means; `None`: the only one, if there is only one.
    pub default_model: Option<ModelName>,
    /// Longest wait for a retired version's requests.
    pub drain_max: Duration,
    /// Where models come from, when that is no folder, and how it is looked at.
    pub source: source::Settings,
    /// What the ledger keeps of models that say nothing else.
    pub recording: RecordSettings,
    /// Keys that versions must be signed with; none: signatures are not asked for.
    pub trusted_keys: TrustedKeys,
}

impl Settings {
    /// The defaults, over one repository and one state folder.
    pub fn new(repository: impl Into<PathBuf>, state_dir: impl Into<PathBuf>) -> Self {
        Self {
            repository: repository.into(),
            model_name: None,
            state_dir: state_dir.into(),
            engine: EngineChoice::Auto,
            ort_library: None,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            probe: ProbeLimits::default(),
            model_size_max: 16 << 30,
            copies_max: 8,
            versions_latest: 0,
            pin_digests: true,
            memory_max: None,
            probe_enabled: true,
            probe_program: None,
            default_model: None,
            drain_max: Duration::from_secs(60),
            source: source::Settings::default(),
            recording: RecordSettings::default(),
            trusted_keys: TrustedKeys::default(),
        }
    }
}

/// What a model may use while it is tried in a child process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ProbeLimits {
    /// Address space of the child, and the largest file that it may write.
    pub memory_max_bytes: u64,
    /// Processor time, all threads together.
    pub cpu_max: Duration,
    /// Time on the clock.
    pub wall_max: Duration,
}

impl Default for ProbeLimits {
    fn default() -> Self {
        Self {
            memory_max_bytes: 4 << 30,
            cpu_max: Duration::from_secs(120),
            wall_max: Duration::from_secs(60),
        }
    }
}

/// The one model whose own folder the repository is, if it is that.
pub fn sole_model(settings: &Settings) -> Option<ModelName> {
    scan::Repository::new(settings).sole().cloned()
}

/// Settings of a model, from its folder or from what a load call says instead.
fn manifest_of(
    repository: &scan::Repository,
    model: &ModelName,
    config: Option<&str>,
) -> Result<Manifest, Failure> {
    let read = match config {
        Some(config) => manifest::from_json(config, model.as_str()),
        None if repository.sole().is_some() => manifest::read_sole(repository.root()),
        None => manifest::read(&repository.path(model)),
    };
    let manifest =
        read.map_err(|error| Failure::invalid(format!("its configuration is wrong: {error}")))?;
    for warning in &manifest.warnings {
        tracing::warn!(%model, "{warning}");
    }
    Ok(manifest)
}
