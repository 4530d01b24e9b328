//! `tidegate profile`: what a model's inputs and outputs look like, from a file, for drift.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use super::admin::{Stop, finish, table::Table as Shown};
use super::frame::{self, Binding, Table};
use crate::checksum;
use crate::domain::{Digest, EngineChoice, ModelName, Signature, Version};
use crate::drift::feature::Feature;
use crate::drift::grid::{CELLS, CELLS_MAX, CELLS_MIN};
use crate::drift::learn::{LearnSettings, Learner, Learnt};
use crate::drift::profile::{FeatureProfile, Profile, Reference};
use crate::engine::onnx;

mod predict;

use predict::Predictor;

/// Values that are looked at, of one feature and of all: 8 bytes each.
const SAMPLE_MAX: usize = 1_000_000;
const SAMPLE_TOTAL_MAX: usize = 32 << 20;

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    tidegate profile train.parquet --model iris --repository models --out models/iris/2/reference.json\n  \
    tidegate profile train.csv --model iris --repository models --predict --out models/iris/2/reference.json\n  \
    tidegate profile train.csv --model iris --out reference.json --keep-values\n  \
    tidegate profile tidegate-state/ledger/parquet/model=iris --model iris --out may.json --json\n\n\
    A column is the feature of its name: `x`, `x[3]`; a list is the tensor of its name.\n\
    Exit code: 0 done, 1 the file cannot be used, 2 wrong usage")]
pub(super) struct Args {
    /// Parquet or CSV file, or a folder of the ledger's Parquet
    #[arg(value_name = "REFERENCE")]
    reference: PathBuf,
    /// The model that it was made with
    #[arg(long, value_name = "NAME")]
    model: ModelName,
    /// The profile: `reference.json` beside the version's model file
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    /// Folder of models: names and shapes are those of the model's graph
    #[arg(long, value_name = "DIR")]
    repository: Option<PathBuf>,
    /// The model's version [default: the highest in the repository]
    #[arg(long = "model-version", value_name = "NUMBER")]
    version: Option<Version>,
    /// Run the model on the rows, for outputs that have no column: a table of inputs alone has none
    #[arg(long, requires = "repository")]
    predict: bool,
    /// Engine to run it on: auto, ort or tract
    #[arg(long, default_value = "auto", value_parser = super::models::engine, requires = "predict")]
    engine: EngineChoice,
    /// ONNX Runtime's shared library, if it is not in a usual place
    #[arg(long, value_name = "PATH", requires = "predict")]
    ort_library: Option<PathBuf>,
    /// Cells of a numeric feature, 16 to 256; more for narrower bounds
    #[arg(long, value_name = "COUNT", default_value_t = CELLS, value_parser = cells)]
    cells: usize,
    /// Keep the values of numbers, column by column in ascending order: for the scores of Evidently
    /// and scipy, which need them
    #[arg(long, overrides_with = "no_values")]
    keep_values: bool,
    /// Keep counts and quantiles only (the default)
    #[arg(long, overrides_with = "keep_values")]
    no_values: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

fn cells(text: &str) -> Result<usize, String> {
    let wanted = text.parse().ok().filter(|cells| (CELLS_MIN..=CELLS_MAX).contains(cells));
    wanted.ok_or_else(|| format!("expected {CELLS_MIN} to {CELLS_MAX}"))
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(profile(args))
}

fn profile(args: &Args) -> Result<String, Stop> {
    let table = Table::open(&args.reference, Some(args.model.as_str()))?;
    let (features, version, predictor) = match &args.repository {
        None => (frame::of_table(&table)?, args.version, None),
        Some(repository) => {
            let found = Found::new(repository, &args.model, args.version)?;
            let predictor = args.predict.then(|| Predictor::new(args, &found, &table));
            let features = frame::of_signature(&found.signature);
            (features, Some(found.version), predictor.transpose()?)
        }
    };
    let settings = LearnSettings {
        cells: args.cells,
        keep_values: args.keep_values,
        ..LearnSettings::default()
    };
    let model = (args.model.clone(), version);
    let mut learnt = learn_with(predictor, &table, features, settings, model)?;
    if args.reference.is_file() {
        let file = File::open(&args.reference).and_then(checksum::sha256);
        learnt.profile.source.sha256 = Some(file.map_err(Stop::failed)?.0);
    }
    let bytes = learnt.profile.write().map_err(Stop::failed)?;
    // What is written has to be what a gateway reads.
    Profile::read(&bytes).map_err(Stop::failed)?;
    place(&args.out, &bytes)
        .map_err(|error| Stop::failed(format_args!("'{}': {error}", args.out.display())))?;
    let digest = Profile::digest(&bytes);
    Ok(match args.json {
        true => as_json(args, &learnt, digest),
        false => as_text(args, &learnt, digest),
    })
}

/// Rows of a table, learnt; at most so many values of each feature that all together have room.
pub(super) fn learn(
    table: &Table,
    features: Vec<Feature>,
    settings: LearnSettings,
    model: (ModelName, Option<Version>),
) -> Result<Learnt, Stop> {
    learn_with(None, table, features, settings, model)
}

/// The same; outputs that the table lacks are what the predictor says of its rows.
fn learn_with(
    predictor: Option<Predictor>,
    table: &Table,
    features: Vec<Feature>,
    settings: LearnSettings,
    model: (ModelName, Option<Version>),
) -> Result<Learnt, Stop> {
    let binding = Binding::new(&features, table)?;
    let settings = LearnSettings { sample_max: sample_max(features.len()), ..settings };
    let mut learner = Learner::new(features, settings).map_err(Stop::failed)?;
    binding.read(table, |feature, value| learner.add(feature, value))?;
    let predicted = predictor.map(|predictor| predictor.fill(table, &binding, &mut learner));
    let predicted = predicted.transpose()?.unwrap_or_default();
    let mut notes = binding.notes(learner.features(), &predicted.features);
    notes.extend(predicted.notes);
    let uri = table.path().display().to_string();
    let learnt = learner.finish(model, &uri, jiff::Timestamp::now());
    let mut learnt = learnt
        .map_err(|error| Stop::failed(format_args!("'{}': {error}", table.path().display())))?;
    learnt.notes.splice(0..0, notes);
    Ok(learnt)
}

/// Values that are kept in memory of each of so many features.
pub(super) fn sample_max(features: usize) -> usize {
    SAMPLE_MAX.min(SAMPLE_TOTAL_MAX / features.max(1))
}

/// A version of a repository.
struct Found {
    path: PathBuf,
    signature: Signature,
    version: Version,
}

impl Found {
    /// Of no version the highest.
    fn new(repository: &Path, model: &ModelName, version: Option<Version>) -> Result<Self, Stop> {
        let folder = repository.join(model.as_str());
        let wrong = |problem: &dyn std::fmt::Display| {
            Stop::usage(format_args!("'{}': {problem}", folder.display()))
        };
        let version = match version {
            Some(version) => version,
            None => {
                let entries = std::fs::read_dir(&folder).map_err(|error| wrong(&error))?;
                let names = entries.flatten().map(|entry| entry.file_name());
                let versions = names.filter_map(|name| name.to_str()?.parse::<Version>().ok());
                versions.max().ok_or_else(|| wrong(&"it has no version"))?
            }
        };
        let path = folder.join(version.to_string()).join("model.onnx");
        let model = onnx::read(&path)
            .map_err(|error| Stop::usage(format_args!("'{}': {error}", path.display())))?;
        Ok(Self { path, signature: model.signature, version })
    }
}

/// Gives a file its name once it is whole: a gateway may be looking.
fn place(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    let temporary = path.with_file_name(format!(".{}.tmp", name.unwrap_or_default()));
    let mut file = File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)
}

fn kind(feature: &FeatureProfile) -> &'static str {
    match &feature.reference {
        Reference::Num(_) => "num",
        Reference::Cat(_) => "cat",
        Reference::Mmd(_) => "mmd",
    }
}

fn as_json(args: &Args, learnt: &Learnt, digest: Digest) -> String {
    let profile = &learnt.profile;
    let features = profile.features.iter().map(|feature| {
        let own = feature.own();
        json!({
            "name": feature.feature.name,
            "role": feature.feature.role,
            "kind": kind(feature),
            "rows": own.rows(),
            "missing": own.rows() - own.len(),
            "values": feature.sample().map_or(0, |sample| sample.len()),
        })
    });
    let report = json!({
        "out": args.out.display().to_string(),
        "digest": digest,
        "model": profile.model,
        "version": profile.version,
        "rows": profile.source.rows,
        "sampled": profile.source.sampled,
        "features": features.collect::<Vec<_>>(),
        "notes": learnt.notes,
    });
    format!("{report:#}\n")
}

fn as_text(args: &Args, learnt: &Learnt, digest: Digest) -> String {
    let mut table = Shown::new(["FEATURE", "KIND", "ROWS", "MISSING", "FROM", "TO"]);
    for feature in &learnt.profile.features {
        let own = feature.own();
        let (from, to) = match &feature.reference {
            Reference::Num(numeric) => {
                (format!("{:.6}", numeric.cells.min), format!("{:.6}", numeric.cells.max))
            }
            Reference::Cat(cat) => {
                (format!("{} categories", cat.categories.names().len()), String::new())
            }
            Reference::Mmd(_) => (String::new(), String::new()),
        };
        let missing = (own.rows() - own.len()).to_string();
        let label = feature.feature.label();
        table.row([label, kind(feature).to_owned(), own.rows().to_string(), missing, from, to]);
    }
    let source = &learnt.profile.source;
    let mut text = table.text();
    if let Some(sampled) = source.sampled {
        text += &format!("of some features a sample: {sampled} of {} rows at least\n", source.rows);
    }
    for note in &learnt.notes {
        text += &format!("note: {}\n", super::admin::table::plain(note));
    }
    text + &format!("{} rows in {} {digest}\n", source.rows, args.out.display())
}
