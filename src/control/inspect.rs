//! Looks at models without serving them.

use std::fs::File;
use std::io;
use std::path::Path;

use super::fetch::FetchError;
use super::manifest::Manifest;
use super::probe::{self, Job, Report, TrialJob};
use super::scan::{self, Repository};
use super::version::{PrepareError, Preparer, open_model};
use super::{ProbeLimits, manifest_of};
use crate::checksum;
use crate::domain::{Digest, EngineChoice, ModelName, ModelSettings, Signature, Version};
use crate::engine::onnx::{self, OnnxModel};

/// What a model file says, and who can run it.
#[derive(Debug)]
pub struct Inspection {
    pub onnx: OnnxModel,
    /// Of the model file alone.
    pub digest: Digest,
    /// Of the model file alone.
    pub size: u64,
    /// Each engine's name, and what a trial on it gave or why it failed.
    pub engines: Vec<(&'static str, Result<EngineTrial, String>)>,
}

/// A trial that passed.
#[derive(Debug)]
pub struct EngineTrial {
    pub signature: Signature,
    pub notes: Vec<String>,
    pub memory_bytes: u64,
    pub load_ms: u64,
}

/// Reads a model file and tries it on every engine, each in a child process.
///
/// # Errors
/// When the file cannot be read as a model, or its external data lies outside its folder.
pub fn inspect(
    path: &Path,
    ort_library: Option<&Path>,
    limits: &ProbeLimits,
) -> Result<Inspection, PrepareError> {
    let onnx = onnx::read(path)?;
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    onnx.confine_external_data(folder.unwrap_or(Path::new(".")))?;
    let (digest, size) = File::open(path).and_then(checksum::sha256).map_err(FetchError::from)?;
    let program = std::env::current_exe().map_err(probe::ProbeError::Start)?;
    let try_on = |engine: EngineChoice| {
        let job = TrialJob {
            engine,
            ort_library: ort_library.map(Path::to_owned),
            model: path.to_owned(),
            derived: None,
            intra_threads: 1,
            settings: ModelSettings { engine, ..ModelSettings::default() },
            samples: Vec::new(),
            recorded: Vec::new(),
        };
        let report: Result<Report, _> = probe::run(&program, limits, Job::Trial(Box::new(job)));
        let report = report.map_err(|error| error.to_string())?;
        Ok(EngineTrial {
            signature: report.signature,
            notes: report.findings.notes,
            memory_bytes: report.memory_bytes,
            load_ms: report.load_ms,
        })
    };
    let engines =
        vec![("onnxruntime", try_on(EngineChoice::Ort)), ("tract", try_on(EngineChoice::Tract))];
    Ok(Inspection { onnx, digest, size, engines })
}

/// What became of one version of a repository that was checked.
#[derive(Debug)]
pub struct Verdict {
    pub model: ModelName,
    /// `None` when the model as a whole is at fault.
    pub version: Option<Version>,
    pub result: Result<super::Checked, String>,
}

/// Takes every version of a repository that would be served through all steps but the last.
///
/// # Errors
/// When the repository itself cannot be read.
pub fn validate(preparer: &Preparer) -> io::Result<Vec<Verdict>> {
    let repository = Repository::new(preparer.settings());
    let mut verdicts = Vec::new();
    for model in repository.models()? {
        match model_of(&repository, &model) {
            Err(reason) => verdicts.push(Verdict { model, version: None, result: Err(reason) }),
            Ok((manifest, versions)) => {
                verdicts.extend(versions.into_iter().map(|version| {
                    let checked = preparer.check(&repository, &model, version, &manifest, &|_| {});
                    let result = checked.map_err(|error| error.to_string());
                    Verdict { model: model.clone(), version: Some(version), result }
                }));
            }
        }
    }
    Ok(verdicts)
}

fn model_of(
    repository: &Repository,
    model: &ModelName,
) -> Result<(Manifest, Vec<Version>), String> {
    let folder = open_model(repository, model).map_err(|error| error.to_string())?;
    let manifest = manifest_of(repository, model, None).map_err(|failure| failure.message)?;
    let there = repository.versions(&folder).map_err(|error| error.to_string())?;
    let chosen = scan::chosen(&there, manifest.settings.versions.as_ref());
    if chosen.is_empty() {
        return Err("it has no version: no folder is named by a number".to_owned());
    }
    Ok((manifest, chosen))
}
