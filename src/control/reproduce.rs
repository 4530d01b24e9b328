//! Runs one recorded prediction again, here, with nothing served: on the bytes that its digest
//! names, in a child process.
//!
//! ```text
//! digest ─▶ <state>/cache/models/<digest>, or a version of the model in a repository (copied, hashed)
//!        ─▶ `tidegate probe` loads it on the recorded engine ─▶ runs the inputs ─▶ outputs
//! ```
//!
//! Invariant: nothing is run but bytes that have the recorded digest.

use std::path::{Path, PathBuf};

use super::ProbeLimits;
use super::fetch::{Cache, FetchError, Fetched, MODEL_FILE, Wanted, copy_in};
use super::probe::{self, Job, ProbeError, Ran, RunJob, pack, unpack};
use super::scan::Repository;
use super::signature::TrustedKeys;
use super::version::{PrepareError, open_model};
use super::{Settings, manifest_of};
use crate::domain::{Digest, EngineChoice, ModelName, NamedTensor, Version};

/// What was recorded.
#[derive(Clone, Debug)]
pub struct Prediction {
    pub model: ModelName,
    pub version: Version,
    /// Of all files of the version, as `tidegate-model-digest` says it.
    pub digest: Digest,
    /// That it ran on.
    pub engine: EngineChoice,
    pub inputs: Vec<NamedTensor>,
}

/// Where the model is looked for.
#[derive(Clone, Debug, Default)]
pub struct Places {
    /// State folders, whose copies of models are only read.
    pub state_dirs: Vec<PathBuf>,
    /// Folder of models, or of this one.
    pub repository: Option<PathBuf>,
    /// An empty folder for what comes out of `repository`.
    pub scratch: PathBuf,
    /// ONNX Runtime's shared library, if it is not in a usual place.
    pub ort_library: Option<PathBuf>,
}

/// What the model says now.
#[derive(Debug)]
pub struct Reproduced {
    pub outputs: Vec<NamedTensor>,
    /// Name and version.
    pub engine: String,
    /// Folder that the bytes were found in.
    pub found: PathBuf,
}

#[derive(Debug, thiserror::Error)]
pub enum ReproduceError {
    #[error("no model with {digest} is in {}", looked.join(" or "))]
    Nowhere { digest: Digest, looked: Vec<String> },
    #[error("{}: {reason}", path.display())]
    Repository { path: PathBuf, reason: String },
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Probe(#[from] ProbeError),
}

/// Finds the recorded bytes and runs them, under the limits of a trial.
///
/// # Errors
/// When the bytes are in none of the places, or do not load or run.
pub fn reproduce(prediction: &Prediction, places: &Places) -> Result<Reproduced, ReproduceError> {
    let (fetched, found) = find(prediction, places)?;
    let model = std::path::absolute(&fetched.model).map_err(FetchError::from)?;
    let job = RunJob {
        engine: prediction.engine,
        ort_library: places.ort_library.clone(),
        model,
        inputs: pack(&prediction.inputs),
    };
    let program = std::env::current_exe().map_err(ProbeError::Start)?;
    let ran: Ran = probe::run(&program, &ProbeLimits::default(), Job::Run(job))?;
    let outputs = unpack(&ran.outputs).map_err(ProbeError::Refused)?;
    Ok(Reproduced { outputs, engine: ran.engine, found })
}

fn find(prediction: &Prediction, places: &Places) -> Result<(Fetched, PathBuf), ReproduceError> {
    let digest = &prediction.digest;
    let mut looked = Vec::new();
    for state_dir in &places.state_dirs {
        if let Some(fetched) = copy_in(state_dir, digest)? {
            let found = fetched.model.parent().unwrap_or(state_dir).to_owned();
            return Ok((fetched, found));
        }
        looked.push(format!("the copies of {}", state_dir.display()));
    }
    if let Some(path) = &places.repository {
        if let Some(found) = in_repository(prediction, path, &places.scratch)? {
            return Ok(found);
        }
        looked.push(format!("the versions of '{}' in {}", prediction.model, path.display()));
    }
    Err(ReproduceError::Nowhere { digest: *digest, looked })
}

/// Tries the version of the recorded number first: others may hold the same bytes, or hold them now.
fn in_repository(
    prediction: &Prediction,
    path: &Path,
    scratch: &Path,
) -> Result<Option<(Fetched, PathBuf)>, ReproduceError> {
    let model = &prediction.model;
    let failed = |reason: String| ReproduceError::Repository { path: path.to_owned(), reason };
    let settings = Settings { model_name: Some(model.clone()), ..Settings::new(path, scratch) };
    let repository = Repository::new(&settings);
    let open = || open_model(&repository, model).map_err(|error| failed(error.to_string()));
    let manifest =
        manifest_of(&repository, model, None).map_err(|failure| failed(failure.message))?;
    let model_file = manifest.settings.model_file.as_deref().unwrap_or(MODEL_FILE);
    let mut versions = repository.versions(&open()?).map_err(|error| failed(error.to_string()))?;
    versions.sort_by_key(|version| *version != prediction.version);
    let cache = Cache::open(scratch).map_err(FetchError::from)?;
    let mut unread = None;
    for version in versions {
        let folder = match repository.version(open()?, version) {
            Ok(folder) => folder,
            Err(error) => {
                unread.get_or_insert(format!("version {version} {error}"));
                continue;
            }
        };
        let trusted = &TrustedKeys::default();
        let size_max = settings.model_size_max;
        let wanted = Wanted { model, version, model_file, size_max, trusted };
        let external = |model: &Path| external_data(model).map_err(|error| error.to_string());
        match cache.fetch(&folder, &wanted, &external) {
            Ok(fetched) if fetched.digest == prediction.digest => {
                let home =
                    if repository.sole().is_some() { path } else { &path.join(model.as_str()) };
                let found = Some(home.join(version.to_string())).filter(|found| found.is_dir());
                return Ok(Some((fetched, found.unwrap_or_else(|| home.to_owned()))));
            }
            Ok(other) => drop(other.model.parent().map(std::fs::remove_dir_all)),
            // What cannot be read is not it; when nothing else is, this may be why.
            Err(error) => drop(unread.get_or_insert(format!("version {version}: {error}"))),
        }
    }
    unread.map_or(Ok(None), |reason| Err(failed(reason)))
}

fn external_data(model: &Path) -> Result<std::collections::BTreeSet<String>, PrepareError> {
    let program = std::env::current_exe().map_err(ProbeError::Start)?;
    let model = std::path::absolute(model).map_err(ProbeError::Start)?;
    Ok(probe::run(&program, &ProbeLimits::default(), Job::ExternalData { model })?)
}
