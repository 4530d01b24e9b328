//! The child's side: limits first, then the job.

use std::io::{self, Read, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::time::Instant;

use rustix::process::{Resource, Rlimit, Signal};

use super::super::{samples, trial};
use super::{
    Job, Order, Parcel, ProbeError, ProbeLimits, RECORDED_MARK, REPLY_MARK, Ran, Report, RunJob,
    TrialJob, unpack,
};
use crate::engine::{Artifact, Engines, LoadOptions, onnx};

/// Reads an order from stdin, does it, and replies on stdout. What `tidegate probe` runs.
pub fn child_main() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The parent reads this from our stderr; when even that fails there is nobody to tell.
            drop(writeln!(io::stderr().lock(), "probe: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    let mut order = Vec::new();
    io::stdin().lock().read_to_end(&mut order)?;
    let order: Order = serde_json::from_slice(&order)?;
    let parent = rustix::process::getppid().map(|pid| pid.as_raw_nonzero().get().unsigned_abs());
    if parent != Some(order.parent) {
        return Err(io::Error::other("the parent is gone"));
    }
    confine(&order.limits)?;
    let reply = match order.job {
        Job::ExternalData { model } => reply(|| {
            onnx::read(&model).map(|read| read.external_data).map_err(|error| error.to_string())
        }),
        Job::Trial(job) => reply(|| open_and_try(&job)),
        Job::Run(job) => reply(|| run_once(&job)),
    }?;
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "\n{REPLY_MARK}{reply}")?;
    stdout.flush()
}

fn reply<R: serde::Serialize>(job: impl FnOnce() -> Result<R, String>) -> io::Result<String> {
    let done = catch_unwind(AssertUnwindSafe(job))
        .unwrap_or_else(|_| Err("loading the model made the engine panic".to_owned()));
    Ok(serde_json::to_string(&done)?)
}

fn confine(limits: &ProbeLimits) -> io::Result<()> {
    let set = |resource, soft: u64, hard: u64| {
        // A stricter limit that is there already stays.
        let before = rustix::process::getrlimit(resource).maximum.unwrap_or(u64::MAX);
        let limit = Rlimit { current: Some(soft.min(before)), maximum: Some(hard.min(before)) };
        rustix::process::setrlimit(resource, limit)
    };
    // In a container the memory limit is shared with the gateway: when it is reached, the kernel is to
    // take the trial. Where it may not be told, the other limits hold all the same.
    drop(std::fs::write("/proc/self/oom_score_adj", "1000"));
    let cpu = limits.cpu_max.as_secs().max(1);
    set(Resource::Core, 0, 0)?;
    set(Resource::As, limits.memory_max_bytes, limits.memory_max_bytes)?;
    set(Resource::Fsize, limits.memory_max_bytes, limits.memory_max_bytes)?;
    // The first signal says why, the second cannot be ignored.
    set(Resource::Cpu, cpu, cpu + 2)?;
    Ok(())
}

/// Does a trial in this process, for repositories that are trusted.
pub(in super::super) fn run_here(engines: &Engines, job: &TrialJob) -> Result<Report, ProbeError> {
    try_model(engines, job, || {}).map_err(ProbeError::Refused)
}

fn open_and_try(job: &TrialJob) -> Result<Report, String> {
    let engines = Engines::open(job.engine, job.ort_library.as_deref());
    try_model(&engines.map_err(|error| error.to_string())?, job, || {
        let mut stdout = io::stdout().lock();
        // Only for the reason, should this be the end.
        writeln!(stdout, "\n{RECORDED_MARK}").and_then(|()| stdout.flush()).ok();
    })
}

/// `at_recorded` is called before the recorded inputs are run, if there are any.
fn try_model(
    engines: &Engines,
    job: &TrialJob,
    at_recorded: impl FnOnce(),
) -> Result<Report, String> {
    let artifact = Artifact { path: job.model.clone(), derived: job.derived.clone() };
    // On the CPU, whatever the providers: a GPU's address space cannot be limited.
    let options =
        LoadOptions { intra_threads: job.intra_threads, sessions: 1, providers: Vec::new() };
    let started = Instant::now();
    let loaded = engines.load(job.settings.engine, &artifact, &options);
    let (engine, model) = loaded.map_err(|error| error.to_string())?;
    let load_ms = u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut session = model.session().map_err(|error| error.to_string())?;
    let mut signature = model.signature().clone();
    let mut findings = trial::explore(&mut *session, &signature, job.settings.batched)?;
    signature.batched = findings.batched;
    let padding = job.settings.batch.padding.as_ref();
    let padded = trial::padding::explore(&mut *session, &signature, padding, &mut findings);
    let mut checked = 0;
    for (name, text) in &job.samples {
        let samples = samples::parse(text).map_err(|error| format!("{name}: {error}"))?;
        let mut fits = trial::check_samples(&mut *session, &signature, &samples);
        if let (Ok(()), Some(form)) = (&fits, &padded) {
            fits = trial::padding::check_samples(&mut *session, &signature, form, &samples);
        }
        fits.map_err(|error| format!("{name}: {error}"))?;
        checked += samples.len();
    }
    let runs = job.settings.warmup.runs;
    trial::warm(&mut *session, &signature, &findings, &[1], runs)
        .map_err(|error| format!("warm-up failed: {error}"))?;
    let mut rerun = trial::Rerun::default();
    if !job.recorded.is_empty() {
        at_recorded();
        let recorded = job.recorded.iter().map(|parcels| unpack(parcels));
        let recorded: Vec<_> = recorded.collect::<Result<_, _>>()?;
        let asked: Vec<_> = recorded.iter().map(Vec::as_slice).collect();
        rerun = trial::rerun(&mut *session, &signature, &asked, trial::RERUN_TIME_MAX).0;
    }
    Ok(Report {
        engine: engine.to_owned(),
        signature,
        findings,
        samples: checked,
        rerun,
        memory_bytes: peak_memory(),
        load_ms,
    })
}

fn run_once(job: &RunJob) -> Result<Ran, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let engines =
        Engines::open(job.engine, job.ort_library.as_deref()).map_err(|error| text(&error))?;
    let artifact = Artifact { path: job.model.clone(), derived: None };
    let options = LoadOptions { intra_threads: 1, sessions: 1, providers: Vec::new() };
    let (name, model) =
        engines.load(job.engine, &artifact, &options).map_err(|error| text(&error))?;
    let signature = model.signature();
    let inputs = signature.bind(unpack(&job.inputs)?).map_err(|failure| failure.message)?;
    let mut session = model.session().map_err(|error| text(&error))?;
    let outputs = session.run(&inputs).map_err(|error| text(&error))?;
    let outputs = signature.outputs.iter().zip(&outputs);
    let described = engines.describe();
    let version = described.iter().find(|(known, _)| *known == name);
    Ok(Ran {
        engine: version.map_or(name.to_owned(), |(_, version)| format!("{name} {version}")),
        outputs: outputs.map(|(spec, tensor)| Parcel::new(&spec.name, tensor)).collect(),
    })
}

/// Peak resident memory of this process; 0 when the system does not say.
fn peak_memory() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}
