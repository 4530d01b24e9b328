//! The steps of one version: fetch, probe, load, warm.

use std::collections::{BTreeSet, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::confined::{ConfineError, Folder};
use super::fetch::{
    Cache, FetchError, Fetched, MODEL_FILE, Staging, Wanted, hex, make_folder, write_whole,
};
use super::lineage::{Lineage, LineageError};
use super::manifest::{Declared, DeclaredTensor, Manifest};
use super::probe::{self, Job, ProbeError, Report, TrialJob, pack};
use super::scan::Repository;
use super::signature::Signed;
use super::trial::{RERUN_TIME_MAX, Rerun};
use super::view::Life;
use super::{Settings, lineage, sweep, trial};
use crate::batch::{Lane, LaneParts, Padding, ThreadBudget};
use crate::domain::{
    Digest, Durability, ModelName, ModelSettings, RecordSettings, Recording, Signature, TensorSpec,
    Version,
};
use crate::drift::profile::{PROFILE_BYTES_MAX, Profile, ProfileError};
use crate::engine::{Artifact, EngineError, Engines, LoadOptions};
use crate::ledger::recent::{self, Recent};
use crate::ledger::{self, capture};
use crate::monitor::{Given, Monitor};
use crate::observe::{Observer, VersionStats};
use crate::route::Served;

/// What a version's rows are compared with, beside its model file.
pub(super) const REFERENCE_FILE: &str = "reference.json";
/// Most bytes of a version's samples, all files together.
const SAMPLES_SIZE_MAX: u64 = 64 << 20;
/// Most bytes of the recorded inputs that one version is warmed with.
const RECORDED_BYTES_MAX: usize = 16 << 20;
/// How long the ledger is searched for them.
const RECORDED_SEARCH_MAX: Duration = Duration::from_millis(250);
/// Most sessions of one version.
const SESSIONS_MAX: usize = 256;

#[derive(Debug, thiserror::Error)]
pub enum PrepareError {
    #[error("the {what} {reason}")]
    Folder { what: &'static str, reason: String },
    #[error("the state folder cannot be used: {0}")]
    State(String),
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error("samples: {0}")]
    Samples(io::Error),
    #[error(transparent)]
    Lineage(#[from] LineageError),
    #[error("{REFERENCE_FILE}: {0}")]
    Reference(#[from] ProfileError),
    #[error("{REFERENCE_FILE}: {0}")]
    ReadReference(io::Error),
    #[error(transparent)]
    Probe(#[from] ProbeError),
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The configuration and the graph say different things.
    #[error("{0}")]
    Contradiction(String),
    #[error("warm-up failed: {0}")]
    Warmup(String),
    #[error("could not start its workers: {0}")]
    Workers(io::Error),
    #[error("the copy with {0} is not there any more")]
    NoCopy(Digest),
}

impl PrepareError {
    /// Whether the same bytes may fare better another time.
    pub(super) fn is_passing(&self) -> bool {
        matches!(
            self,
            Self::State(_)
                | Self::Workers(_)
                | Self::NoCopy(_)
                | Self::Fetch(FetchError::Io(_) | FetchError::Changed { .. })
                | Self::Samples(_)
                | Self::ReadReference(_)
        ) || matches!(self, Self::Probe(error) if error.is_passing())
    }
}

/// A version that passed its trial.
#[derive(Debug)]
pub struct Checked {
    pub digest: Digest,
    /// As found in the trial: `batched` was tried.
    pub signature: Signature,
    /// Engine that the trial ran on.
    pub engine: String,
    pub notes: Vec<String>,
    pub samples: usize,
    /// Bytes of all its files.
    pub size: u64,
    /// Who signed it; `None` when no keys are configured.
    pub signed: Option<Signed>,
    /// What its own files say of where it comes from.
    pub lineage: Lineage,
    /// Peak memory of the trial; 0 when unknown.
    pub memory_bytes: u64,
    /// What its own files say its rows are like.
    pub reference: Given,
    report: Report,
    /// How it did on recorded inputs; `None`: it was not tried now.
    tried: Option<Tried>,
    model: PathBuf,
}

impl Checked {
    fn new(fetched: Fetched, report: Report) -> Self {
        Self {
            digest: fetched.digest,
            signature: report.signature.clone(),
            engine: report.engine.clone(),
            notes: report.findings.notes.clone(),
            samples: report.samples,
            size: fetched.size,
            signed: fetched.signed,
            lineage: Lineage::default(),
            memory_bytes: report.memory_bytes,
            reference: Given::AsBefore,
            report,
            tried: None,
            model: fetched.model,
        }
    }

    /// What the trial found, to be remembered.
    pub(super) fn into_report(self) -> Report {
        self.report
    }
}

/// How a version did on what its model was asked lately.
#[derive(Clone, Debug, Default)]
struct Tried {
    ran: Vec<Recent>,
    /// Ids of the predictions whose inputs made it fail.
    failed: Vec<Uuid>,
}

impl Tried {
    fn new(recent: Vec<Recent>, rerun: &Rerun) -> Self {
        let id = |at: &usize| recent.get(*at).map(|recent| recent.prediction_id);
        let failed = rerun.failed.iter().filter_map(id).collect();
        let ran = |(at, recent)| rerun.ran.contains(&at).then_some(recent);
        Self { ran: recent.into_iter().enumerate().filter_map(ran).collect(), failed }
    }
}

/// What a version was warmed with besides made-up rows.
#[derive(Debug)]
pub(super) struct Warmed {
    /// Recorded inputs that ran.
    pub(super) ran: usize,
    /// Ids of the predictions whose inputs made it fail.
    pub(super) failed: Vec<Uuid>,
}

/// Takes versions through their steps.
pub struct Preparer {
    settings: Settings,
    engines: Arc<Engines>,
    cache: Result<Cache, String>,
    /// Shared by all versions.
    budget: Arc<ThreadBudget>,
    monitor: OnceLock<Arc<Monitor>>,
}

impl Preparer {
    pub fn new(settings: Settings, engines: Arc<Engines>) -> Self {
        let cache = Cache::open(&settings.state_dir).map_err(|error| error.to_string());
        let budget = Arc::new(ThreadBudget::new(settings.threads));
        Self { settings, engines, cache, budget, monitor: OnceLock::new() }
    }

    /// Says who looks at the rows of versions that are loaded from now on. Later calls have no effect.
    pub(super) fn set_monitor(&self, monitor: Arc<Monitor>) {
        drop(self.monitor.set(monitor));
    }

    pub(super) fn settings(&self) -> &Settings {
        &self.settings
    }

    fn cache(&self) -> Result<&Cache, PrepareError> {
        self.cache.as_ref().map_err(|reason| PrepareError::State(reason.clone()))
    }

    /// Removes copies of what is not `served`, but for the last few.
    pub(super) fn sweep(&self, served: &HashSet<Digest>) {
        let Ok(cache) = &self.cache else { return };
        match cache.sweep(served, self.settings.copies_max, sweep::AGE_MIN) {
            Ok(0) => {}
            Ok(copies) => tracing::info!(copies, "copies of models removed"),
            Err(error) => tracing::warn!(%error, "the state folder could not be tidied"),
        }
    }

    /// A private folder, for files that a client sends.
    pub(super) fn staging(&self) -> Result<Staging, PrepareError> {
        self.cache()?.staging().map_err(|error| PrepareError::State(error.to_string()))
    }

    /// Fetches a version and tries it; a verdict that is known is not sought again. `progress` is told
    /// what it is at.
    pub(super) fn check(
        &self,
        repository: &Repository,
        model: &ModelName,
        version: Version,
        manifest: &Manifest,
        progress: &dyn Fn(Life),
    ) -> Result<Checked, PrepareError> {
        let settings = &manifest.settings;
        let folder = open_version(repository, model, version)?;
        let file = settings.model_file.as_deref().unwrap_or(MODEL_FILE);
        let cache = self.cache()?;
        let wanted = Wanted {
            model,
            version,
            model_file: file,
            size_max: self.settings.model_size_max,
            trusted: &self.settings.trusted_keys,
        };
        let fetched = cache.fetch(&folder, &wanted, &|path| {
            self.external_data(path).map_err(|error| error.to_string())
        })?;
        let samples = read_samples(&folder).map_err(PrepareError::Samples)?;
        let lineage = lineage::read(&folder)?;
        let reference = read_reference(&folder)?;
        progress(Life::Probing);
        let (report, tried) = self.report(cache, &fetched, model, settings, samples)?;
        if let Some(declared) = &manifest.declared {
            agree(declared, &report.signature).map_err(PrepareError::Contradiction)?;
        }
        recording(settings, &self.settings.recording, &report.signature)?;
        padding(settings, &report.signature).map_err(|error| {
            match report.findings.notes.first() {
                Some(note) if !report.findings.batched => {
                    PrepareError::Contradiction(format!("{error} ({note})"))
                }
                _ => error,
            }
        })?;
        Ok(Checked { lineage, tried, reference, ..Checked::new(fetched, report) })
    }

    /// What the model was asked lately, of whatever version.
    fn recent(&self, model: &ModelName, settings: &ModelSettings) -> Vec<Recent> {
        let log = self.settings.state_dir.join(ledger::FOLDER).join(ledger::PREDICTIONS);
        let limits = recent::Limits {
            records_max: settings.warmup.records,
            bytes_max: RECORDED_BYTES_MAX,
            until: Instant::now() + RECORDED_SEARCH_MAX,
        };
        recent::inputs(&log, model, limits)
    }

    /// A version that passed before, from the copy that was made of it then.
    pub(super) fn recall(&self, digest: Digest, report: Report) -> Result<Checked, PrepareError> {
        let fetched = self.cache()?.recall(&digest)?.ok_or(PrepareError::NoCopy(digest))?;
        Ok(Checked::new(fetched, report))
    }

    fn external_data(&self, model: &Path) -> Result<BTreeSet<String>, PrepareError> {
        if !self.settings.probe_enabled {
            return Ok(crate::engine::onnx::read(model)?.external_data);
        }
        let job = Job::ExternalData { model: absolute(model)? };
        Ok(probe::run(&self.program()?, &self.settings.probe, job)?)
    }

    fn report(
        &self,
        cache: &Cache,
        fetched: &Fetched,
        model: &ModelName,
        settings: &ModelSettings,
        samples: Vec<(String, String)>,
    ) -> Result<(Report, Option<Tried>), PrepareError> {
        let key = self.verdict_key(fetched, settings, &samples);
        let known = cache.folder("probe").join(key + ".json");
        if let Ok(text) = std::fs::read(&known)
            && let Ok(report) = serde_json::from_slice(&text)
        {
            return Ok((report, None));
        }
        let recent = self.recent(model, settings);
        let job = TrialJob {
            engine: self.settings.engine,
            ort_library: self.settings.ort_library.clone(),
            model: absolute(&fetched.model)?,
            derived: Some(absolute(&self.derived(fetched)?)?),
            intra_threads: settings.intra_threads.unwrap_or(1),
            settings: settings.clone(),
            samples,
            recorded: recent.iter().map(|recent| pack(&recent.inputs)).collect(),
        };
        let mut report: Report = if self.settings.probe_enabled {
            let job = Job::Trial(Box::new(job));
            probe::run(&self.program()?, &self.settings.probe, job)?
        } else {
            probe::run_here(&self.engines, &job)?
        };
        let tried = Tried::new(recent, &std::mem::take(&mut report.rerun));
        // Only a pass is kept: what failed may have failed for want of memory or time.
        let text = serde_json::to_vec(&report).map_err(io::Error::from);
        if let Err(error) = text.and_then(|text| write_whole(&known, &text)) {
            tracing::warn!(%error, "verdict not kept, the model will be tried again");
        }
        Ok((report, Some(tried)))
    }

    /// Everything that the verdict hangs on.
    fn verdict_key(
        &self,
        fetched: &Fetched,
        settings: &ModelSettings,
        samples: &[(String, String)],
    ) -> String {
        let engines = self.engines.describe();
        let limits = self.settings.probe;
        let all = serde_json::json!([
            env!("CARGO_PKG_VERSION"),
            fetched.digest.hex(),
            settings,
            samples,
            engines,
            self.settings.engine,
            limits,
        ]);
        hex(&Sha256::digest(all.to_string().as_bytes()).into())
    }

    fn derived(&self, fetched: &Fetched) -> Result<PathBuf, PrepareError> {
        let folder = self.cache()?.folder("derived").join(fetched.digest.hex());
        make_folder(&folder).map_err(|error| PrepareError::State(error.to_string()))?;
        Ok(folder)
    }

    fn program(&self) -> Result<PathBuf, PrepareError> {
        match &self.settings.probe_program {
            Some(program) => Ok(program.clone()),
            None => Ok(std::env::current_exe().map_err(ProbeError::Start)?),
        }
    }

    /// Recorded inputs that the version may be warmed with in this process: those that ran in its
    /// trial now, or else those that the very same model has answered. What nobody saw it live
    /// through could take the gateway with it, at every start.
    fn recorded(&self, model: &ModelName, checked: &Checked, settings: &ModelSettings) -> Tried {
        checked.tried.clone().unwrap_or_else(|| {
            let recent = self.recent(model, settings).into_iter();
            let ran = recent.filter(|recent| recent.digest == checked.digest).collect();
            Tried { ran, failed: Vec::new() }
        })
    }

    /// Loads a checked version into this process and starts its workers; also, what became of the
    /// recorded inputs that it was warmed with.
    pub(super) fn load(
        &self,
        model: &ModelName,
        version: Version,
        checked: &Checked,
        settings: &ModelSettings,
        observer: &Observer,
    ) -> Result<(Served, Warmed), PrepareError> {
        let artifact =
            Artifact {
                path: checked.model.clone(),
                derived: checked.model.parent().and_then(Path::file_name).and_then(|digest| {
                    Some(self.cache.as_ref().ok()?.folder("derived").join(digest))
                }),
            };
        let intra_threads = settings.intra_threads.unwrap_or(1).max(1);
        let sessions = settings.instances.unwrap_or(self.settings.threads / intra_threads);
        let sessions = sessions.clamp(1, SESSIONS_MAX);
        let providers = settings.providers.clone();
        let options = LoadOptions { intra_threads, sessions, providers };
        let (engine, loaded) = self.engines.load(settings.engine, &artifact, &options)?;
        let batched = checked.report.findings.batched;
        let signature = Signature { batched, ..loaded.signature().clone() };
        let mut batch = settings.batch.clone();
        if !batched {
            batch.size_max = 1;
        }
        let padding = padding(settings, &signature)?
            .filter(|_| checked.report.findings.padded && batch.size_max > 1);
        let recording = recording(settings, &self.settings.recording, &signature)?;
        let rows = warm_rows(if batched { batch.size_max } else { 1 });
        let (mut ready, mut warmed) = (Vec::with_capacity(sessions), Vec::new());
        let Tried { ran: recorded, mut failed } = self.recorded(model, checked, settings);
        let asked: Vec<_> = recorded.iter().map(|recent| &*recent.inputs).collect();
        let mut ran = 0;
        let rerun_time = RERUN_TIME_MAX / u32::try_from(sessions).unwrap_or(1);
        for _ in 0..sessions {
            let mut session = loaded.session()?;
            let (findings, runs) = (&checked.report.findings, settings.warmup.runs);
            let seen = trial::warm(&mut *session, &signature, findings, &rows, runs)
                .map_err(PrepareError::Warmup)?;
            warmed.extend(seen);
            let (told, seen) = trial::rerun(&mut *session, &signature, &asked, rerun_time);
            warmed.extend(seen);
            if ready.is_empty() {
                ran = told.ran.len();
                failed.extend(told.failed.iter().map(|at| recorded[*at].prediction_id));
            }
            ready.push(session);
        }
        if recording.durability == Durability::Off {
            tracing::warn!(%model, %version, "predictions are not recorded");
        }
        if settings.batch.padding.is_some() && padding.is_none() {
            tracing::warn!(%model, %version, "batch.padding has no effect");
        }
        if ran > 0 || !failed.is_empty() {
            let failed = failed.len();
            tracing::info!(%model, %version, ran, failed, "warmed with recorded inputs");
        }
        for note in loaded.notes().iter().chain(&checked.notes) {
            tracing::info!(%model, %version, engine, "{note}");
        }
        let stats = VersionStats::new(observer, model, version, &checked.digest, engine);
        let parts = LaneParts {
            model: model.clone(),
            version,
            batch,
            batched,
            padding,
            sessions: ready,
            stats: Arc::clone(&stats),
            budget: Arc::clone(&self.budget),
        };
        let lane = Lane::new(parts).map_err(PrepareError::Workers)?;
        for (inputs, took) in warmed {
            lane.seed(inputs, took);
        }
        let watch = self.monitor.get().map(|monitor| {
            let given = checked.reference.clone();
            let hidden = hidden(&recording, &signature);
            monitor.watch(model, version, checked.digest, &signature, given, hidden)
        });
        let served = Served {
            model: model.clone(),
            version,
            digest: checked.digest,
            engine,
            signature,
            settings: settings.clone(),
            lane,
            stats,
            recording,
            watch,
        };
        Ok((served, Warmed { ran, failed }))
    }
}

/// Sizes of batch that costs are learnt for, the largest included.
fn warm_rows(size_max: usize) -> Vec<usize> {
    let powers = std::iter::successors(Some(1_usize), |rows| rows.checked_mul(2));
    let mut rows: Vec<usize> = powers.take_while(|rows| *rows < size_max).collect();
    rows.push(size_max.max(1));
    rows
}

/// What the ledger keeps of the model's predictions.
fn recording(
    settings: &ModelSettings,
    all: &RecordSettings,
    signature: &Signature,
) -> Result<Recording, PrepareError> {
    if let Some(output) = &settings.feedback.output
        && signature.output_at(output).is_none()
    {
        let names: Vec<&str> = signature.outputs.iter().map(|it| it.name.as_str()).collect();
        let why = "feedback.output: no output is called";
        let why = format!("{why} '{output}', there are {}", names.join(", "));
        return Err(PrepareError::Contradiction(why));
    }
    let resolved = capture::resolve(&settings.ledger, all, signature);
    resolved.map_err(|problems| PrepareError::Contradiction(problems.join("; ")))
}

/// Tensors whose values nobody is to see: those that the ledger does not keep as they are.
fn hidden(recording: &Recording, signature: &Signature) -> Vec<String> {
    let names = signature.inputs.iter().chain(&signature.outputs).map(|spec| &spec.name);
    names.filter(|name| !recording.keeps_as_is(name)).cloned().collect()
}

/// How the model's requests are padded, if `tidegate.toml` says so.
fn padding(
    settings: &ModelSettings,
    signature: &Signature,
) -> Result<Option<Padding>, PrepareError> {
    let Some(padding) = &settings.batch.padding else { return Ok(None) };
    match Padding::new(padding, signature) {
        Ok(padding) => Ok(Some(padding)),
        Err(problems) => Err(PrepareError::Contradiction(problems.join("; "))),
    }
}

/// Whether what `config.pbtxt` declares is what the graph says.
fn agree(declared: &Declared, signature: &Signature) -> Result<(), String> {
    let sides = [
        ("input", &declared.inputs, &signature.inputs),
        ("output", &declared.outputs, &signature.outputs),
    ];
    for (role, tensors, specs) in sides {
        for tensor in tensors {
            let name = &tensor.name;
            let Some(spec) = specs.iter().find(|spec| spec.name == *name) else {
                let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
                let names = names.join(", ");
                return Err(format!(
                    "the configuration declares {role} '{name}', the graph has the {role}s {names}"
                ));
            };
            same_tensor(tensor, spec, declared.max_batch_size > 0)
                .map_err(|what| format!("{role} '{name}': {what}"))?;
        }
    }
    Ok(())
}

fn same_tensor(tensor: &DeclaredTensor, spec: &TensorSpec, batched: bool) -> Result<(), String> {
    if tensor.datatype != spec.datatype {
        let (says, is) = (tensor.datatype, spec.datatype);
        return Err(format!("the configuration says datatype {says}, the graph says {is}"));
    }
    if spec.shape.is_none() {
        return Ok(());
    }
    let mut says = tensor.dims.clone();
    if batched {
        says.insert(0, -1);
    }
    let is = spec.wire_shape();
    let fits = |(says, is): (&i64, &i64)| *says < 0 || *is < 0 || says == is;
    if says.len() != is.len() || !says.iter().zip(&is).all(fits) {
        return Err(format!("the configuration says shape {says:?}, the graph says {is:?}"));
    }
    Ok(())
}

pub(super) fn open_model(
    repository: &Repository,
    model: &ModelName,
) -> Result<Folder, PrepareError> {
    let refused = |what, reason: String| PrepareError::Folder { what, reason };
    let folder =
        repository.open(model).map_err(|error| refused("repository", error.to_string()))?;
    folder.map_err(|error| refused("model's folder", error.to_string()))
}

fn open_version(
    repository: &Repository,
    model: &ModelName,
    version: Version,
) -> Result<Folder, PrepareError> {
    let folder = repository.version(open_model(repository, model)?, version);
    folder.map_err(|error| PrepareError::Folder {
        what: "version's folder",
        reason: error.to_string(),
    })
}

/// `reference.json`, if there is one, checked.
fn read_reference(version: &Folder) -> Result<Given, PrepareError> {
    let max = PROFILE_BYTES_MAX as u64;
    let Some(text) = version.text(REFERENCE_FILE, max).map_err(PrepareError::ReadReference)? else {
        return Ok(Given::Nothing);
    };
    let profile = Profile::read(text.as_bytes())?;
    Ok(Given::File(text.as_bytes().into(), Arc::new(profile)))
}

/// `samples.json` and `samples/*.json`, by name.
fn read_samples(version: &Folder) -> io::Result<Vec<(String, String)>> {
    let mut left = SAMPLES_SIZE_MAX;
    let mut samples = Vec::new();
    let mut read = |folder: &Folder, name: &str| -> io::Result<()> {
        if let Some(text) = folder.text(name, left)? {
            left -= text.len() as u64;
            samples.push((name.to_owned(), text));
        }
        Ok(())
    };
    read(version, "samples.json")?;
    match version.folder("samples") {
        Ok(folder) => {
            let names = folder.names()?;
            for name in names.iter().filter(|name| name.ends_with(".json")) {
                read(&folder, name)?;
            }
        }
        Err(ConfineError::Missing) => {}
        Err(error) => return Err(io::Error::other(format!("'samples' {error}"))),
    }
    Ok(samples)
}

fn absolute(path: &Path) -> Result<PathBuf, PrepareError> {
    std::path::absolute(path).map_err(|error| PrepareError::State(error.to_string()))
}
