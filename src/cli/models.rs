//! `tidegate models`: look at a model file, check a repository, without serving.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use serde_json::{Value, json};

use crate::control::{self, Inspection, Preparer, ProbeLimits, Settings, Verdict};
use crate::domain::{EngineChoice, Signature, TensorSpec};
use crate::engine::Engines;

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List the models and versions of a folder, bucket or registry, without serving
    List(super::list::List),
    /// Show a model file's signature, operators, digest, and which engines can run it
    #[command(after_help = "Example:\n  tidegate models inspect models/iris/1/model.onnx")]
    Inspect(Inspect),
    /// Check every model of a repository as `serve` would, without serving; 1 if any fails
    #[command(after_help = "Example:\n  tidegate models validate models --json")]
    Validate(Validate),
}

#[derive(clap::Args)]
struct Inspect {
    /// Model file, or a version's folder with a `model.onnx` in it
    path: PathBuf,
    #[command(flatten)]
    shared: Shared,
}

#[derive(clap::Args)]
struct Validate {
    /// Folder of models: `<model>/<version>/model.onnx`
    repository: PathBuf,
    /// Engine to try the models on: auto, ort or tract
    #[arg(long, default_value = "auto", value_parser = engine)]
    engine: EngineChoice,
    #[command(flatten)]
    shared: Shared,
}

#[derive(clap::Args)]
struct Shared {
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
    /// ONNX Runtime's shared library, if it is not in a usual place
    #[arg(long, value_name = "PATH")]
    ort_library: Option<PathBuf>,
    /// Seconds that trying one model may take
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    wall_max: u64,
    /// Bytes of memory that trying one model may take
    #[arg(long, value_name = "BYTES", default_value_t = 4 << 30)]
    memory_max_bytes: u64,
}

impl Shared {
    fn limits(&self) -> ProbeLimits {
        ProbeLimits {
            memory_max_bytes: self.memory_max_bytes,
            wall_max: std::time::Duration::from_secs(self.wall_max),
            ..ProbeLimits::default()
        }
    }
}

pub(super) fn engine(text: &str) -> Result<EngineChoice, String> {
    match text {
        "auto" => Ok(EngineChoice::Auto),
        "ort" => Ok(EngineChoice::Ort),
        "tract" => Ok(EngineChoice::Tract),
        other => Err(format!("expected auto, ort or tract, got '{other}'")),
    }
}

pub(super) fn run(args: &Args) -> ExitCode {
    let done = match &args.command {
        Command::List(args) => super::list::run(args),
        Command::Inspect(args) => inspect(args),
        Command::Validate(args) => validate(args),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            // When stderr is gone too there is nobody to tell.
            drop(writeln!(io::stderr().lock(), "error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn inspect(args: &Inspect) -> anyhow::Result<ExitCode> {
    let path = match args.path.is_dir() {
        true => args.path.join("model.onnx"),
        false => args.path.clone(),
    };
    let library = args.shared.ort_library.as_deref();
    let inspection = control::inspect(&path, library, &args.shared.limits())?;
    let text = match args.shared.json {
        true => serde_json::to_string_pretty(&inspection_json(&path, &inspection))? + "\n",
        false => inspection_text(&path, &inspection),
    };
    print(&text)?;
    let any = inspection.engines.iter().any(|(_, trial)| trial.is_ok());
    Ok(if any { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn validate(args: &Validate) -> anyhow::Result<ExitCode> {
    // Away from any gateway's state, and gone afterwards.
    let state = Scratch::new()?;
    let settings = Settings {
        engine: args.engine,
        ort_library: args.shared.ort_library.clone(),
        probe: args.shared.limits(),
        ..Settings::new(&args.repository, &state.path)
    };
    let engines = Engines::open(args.engine, args.shared.ort_library.as_deref())?;
    let preparer = Preparer::new(settings, Arc::new(engines));
    let verdicts = control::validate(&preparer).map_err(|error| {
        anyhow::anyhow!("repository {} cannot be read: {error}", args.repository.display())
    })?;
    let text = match args.shared.json {
        true => {
            let verdicts: Vec<Value> = verdicts.iter().map(verdict_json).collect();
            serde_json::to_string_pretty(&verdicts)? + "\n"
        }
        false => verdicts_text(&verdicts),
    };
    print(&text)?;
    let failed = verdicts.iter().any(|verdict| verdict.result.is_err());
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// A private folder under the system's temporary one.
pub(super) struct Scratch {
    pub(super) path: PathBuf,
}

impl Scratch {
    pub(super) fn new() -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let name = format!("tidegate-{}", uuid::Uuid::now_v7().simple());
        let path = std::env::temp_dir().join(name);
        std::fs::DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Self { path })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Left to the system's own cleaning when it cannot be removed.
        drop(std::fs::remove_dir_all(&self.path));
    }
}

/// A reader that stopped reading (`| head`) is no error.
pub(super) fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other,
    }
}

fn tensors_json(specs: &[TensorSpec]) -> Vec<Value> {
    let tensor = |spec: &TensorSpec| json!({"name": spec.name, "datatype": spec.datatype.name(), "shape": spec.wire_shape()});
    specs.iter().map(tensor).collect()
}

fn inspection_json(path: &Path, inspection: &Inspection) -> Value {
    let onnx = &inspection.onnx;
    let engines: Vec<Value> = inspection
        .engines
        .iter()
        .map(|(name, trial)| match trial {
            Ok(trial) => json!({
                "engine": name, "runs": true, "batched": trial.signature.batched,
                "load_ms": trial.load_ms, "memory_bytes": trial.memory_bytes, "notes": trial.notes,
            }),
            Err(reason) => json!({"engine": name, "runs": false, "reason": reason}),
        })
        .collect();
    json!({
        "path": path.display().to_string(),
        "digest": inspection.digest.to_string(),
        "size_bytes": inspection.size,
        "ir_version": onnx.ir_version,
        "producer": onnx.producer,
        "opsets": onnx.opsets,
        "operators": onnx.operators,
        "nodes": onnx.nodes,
        "weight_bytes": onnx.weight_bytes,
        "external_data": onnx.external_data,
        "inputs": tensors_json(&onnx.signature.inputs),
        "outputs": tensors_json(&onnx.signature.outputs),
        "engines": engines,
    })
}

fn inspection_text(path: &Path, inspection: &Inspection) -> String {
    let onnx = &inspection.onnx;
    let opsets: Vec<String> =
        onnx.opsets.iter().map(|(domain, version)| format!("{domain} {version}")).collect();
    let operators: Vec<String> =
        onnx.operators.iter().map(|(name, count)| format!("{name} x{count}")).collect();
    let mut text = format!(
        "file       {}\ndigest     {}\nsize       {} bytes, {} of them weights\nproducer   {}\nopsets     {}\noperators  {}\n",
        path.display(),
        inspection.digest,
        inspection.size,
        onnx.weight_bytes,
        onnx.producer,
        opsets.join(", "),
        operators.join(", "),
    );
    if !onnx.external_data.is_empty() {
        let files: Vec<&str> = onnx.external_data.iter().map(String::as_str).collect();
        text.push_str(&format!("external   {}\n", files.join(", ")));
    }
    text.push_str(&signature_text(&onnx.signature));
    for (name, trial) in &inspection.engines {
        match trial {
            Ok(trial) => {
                let batched = if trial.signature.batched { "batched" } else { "not batched" };
                let (ms, mebibytes) = (trial.load_ms, trial.memory_bytes >> 20);
                text.push_str(&format!(
                    "engine     {name}: runs it, {batched}, loaded in {ms} ms, {mebibytes} MiB at most\n"
                ));
                for note in &trial.notes {
                    text.push_str(&format!("           {note}\n"));
                }
            }
            Err(reason) => text.push_str(&format!("engine     {name}: no: {reason}\n")),
        }
    }
    text
}

fn signature_text(signature: &Signature) -> String {
    let line = |role: &str, spec: &TensorSpec| {
        let dims: Vec<String> = match &spec.shape {
            Some(dims) => dims.iter().map(ToString::to_string).collect(),
            None => vec!["?".to_owned()],
        };
        format!("{role:<10} {} {} [{}]\n", spec.name, spec.datatype, dims.join(", "))
    };
    let inputs = signature.inputs.iter().map(|spec| line("input", spec));
    let outputs = signature.outputs.iter().map(|spec| line("output", spec));
    inputs.chain(outputs).collect()
}

fn verdict_json(verdict: &Verdict) -> Value {
    let mut row = json!({
        "model": verdict.model.as_str(),
        "version": verdict.version.map(|version| version.get()),
    });
    let more = match &verdict.result {
        Ok(checked) => json!({
            "state": "ok",
            "digest": checked.digest.to_string(),
            "size_bytes": checked.size,
            "engine": checked.engine,
            "batched": checked.signature.batched,
            "samples": checked.samples,
            "memory_bytes": checked.memory_bytes,
            "notes": checked.notes,
        }),
        Err(reason) => json!({"state": "failed", "reason": reason}),
    };
    if let (Value::Object(row), Value::Object(more)) = (&mut row, more) {
        row.extend(more);
    }
    row
}

fn verdicts_text(verdicts: &[Verdict]) -> String {
    let width =
        verdicts.iter().map(|verdict| verdict.model.as_str().len()).max().unwrap_or(0).max(5);
    let mut text = format!("{:<width$}  {:>7}  {:<6}  {}\n", "MODEL", "VERSION", "STATE", "REASON");
    for verdict in verdicts {
        let version = verdict.version.map_or_else(|| "-".to_owned(), |version| version.to_string());
        let (state, reason) = match &verdict.result {
            Ok(checked) => ("ok", passed(checked)),
            Err(reason) => ("failed", reason.clone()),
        };
        let model = verdict.model.as_str();
        text.push_str(&format!("{model:<width$}  {version:>7}  {state:<6}  {reason}\n"));
    }
    text
}

fn passed(checked: &control::Checked) -> String {
    let batched = if checked.signature.batched { "batched" } else { "not batched" };
    let mut parts =
        vec![format!("{}, {batched}, {} samples match", checked.engine, checked.samples)];
    parts.extend(checked.notes.iter().cloned());
    parts.join("; ")
}
