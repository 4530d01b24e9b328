//! `tidegate models list`: what a source has, as the gateway would see it.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::config::{self, Config, ServeArgs};
use crate::control::source::{self, Listing, ModelListing, Source, VersionListing};
use crate::domain::{ModelName, Version};

#[derive(clap::Args)]
#[command(after_help = "Example:\n  tidegate models list models\n  \
                  tidegate models list 'mlflow+https://mlflow.example.com/?models=iris' --json\n\n\
                  Credentials come from the configuration, by reference, or the environment.")]
pub(super) struct List {
    /// Folder, or URL of a bucket or registry [default: the configuration's]
    #[arg(value_name = "DIR|URL")]
    repository: Option<String>,
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Print JSON instead of text
    #[arg(long)]
    json: bool,
    /// Bring one version to the folder `--into` instead
    #[arg(long, hide = true, value_name = "MODEL@VERSION", requires = "into")]
    stage: Option<String>,
    #[arg(long, hide = true, value_name = "DIR", requires = "stage")]
    into: Option<PathBuf>,
}

pub(super) fn run(args: &List) -> anyhow::Result<ExitCode> {
    let serve = ServeArgs {
        config: args.config.clone(),
        model_repository: args.repository.clone(),
        ..ServeArgs::default()
    };
    let config = match config::load(&serve) {
        Ok(config) => config,
        Err(problems) => {
            super::complain(&problems);
            return Ok(ExitCode::from(2));
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the runtime")?;
    let text = runtime.block_on(answer(args, &config))?;
    super::models::print(&text)?;
    Ok(ExitCode::SUCCESS)
}

async fn answer(args: &List, config: &Config) -> anyhow::Result<String> {
    let source = source::open(&config.control)?;
    if let (Some(stage), Some(into)) = (&args.stage, &args.into) {
        return Ok(staged(&source, stage, into).await?.to_string() + "\n");
    }
    let listing = source.list().await?;
    Ok(match args.json {
        true => format!("{:#}\n", listing_json(&source.describe(), &listing)),
        false => listing_text(&listing),
    })
}

async fn staged(source: &Arc<dyn Source>, what: &str, into: &PathBuf) -> anyhow::Result<Value> {
    let (model, version) = what.split_once('@').context("expected MODEL@VERSION")?;
    let (model, version): (ModelName, Version) = (model.parse()?, version.parse()?);
    std::fs::create_dir_all(into).context("make the folder")?;
    let staged = source.stage(&model, version, into).await?;
    let lineage = source.lineage(&model, version).await?;
    Ok(json!({
        "fingerprint": staged.fingerprint.hex(),
        "files": staged.files,
        "bytes": staged.bytes,
        "lineage": lineage,
    }))
}

/// Whether a version can be taken.
fn state(version: &VersionListing) -> &'static str {
    match (&version.problem, version.settled) {
        (Some(_), _) => "refused",
        (None, true) => "settled",
        (None, false) => "arriving",
    }
}

fn listing_json(source: &str, listing: &Listing) -> Value {
    let models: Vec<Value> =
        listing.models.iter().map(|(name, model)| model_json(name, model)).collect();
    json!({"source": source, "models": models, "notes": listing.notes})
}

fn model_json(name: &ModelName, model: &ModelListing) -> Value {
    let labels: serde_json::Map<String, Value> = model
        .labels
        .iter()
        .map(|(label, version)| (label.to_string(), version.get().into()))
        .collect();
    let version = |(version, found): (&Version, &VersionListing)| {
        let modified = found.modified.and_then(|time| Timestamp::try_from(time).ok());
        json!({
            "version": version.get(),
            "state": state(found),
            "fingerprint": found.fingerprint.hex(),
            "files": found.files,
            "bytes": found.bytes,
            "modified": modified.map(|time| time.to_string()),
            "run": found.run,
            "tags": found.tags,
            "problem": found.problem,
        })
    };
    json!({
        "name": name.as_str(),
        "labels": labels,
        "tags": model.tags,
        "versions": model.versions.iter().map(version).collect::<Vec<_>>(),
        "problem": model.problem,
        "notes": model.notes,
    })
}

fn listing_text(listing: &Listing) -> String {
    let names = listing.models.keys().map(|name| name.as_str().len());
    let width = names.max().unwrap_or(0).max(5);
    let mut text = format!(
        "{:<width$}  {:>7}  {:<8}  {:>5}  {:>12}  NOTE\n",
        "MODEL", "VERSION", "STATE", "FILES", "BYTES"
    );
    for (name, model) in &listing.models {
        let name = name.as_str();
        if let Some(problem) = &model.problem {
            text.push_str(&format!("{name:<width$}  {:>7}  unknown   {problem}\n", "-"));
        }
        for (version, found) in &model.versions {
            let labels: Vec<String> = model
                .labels
                .iter()
                .filter(|(_, labelled)| *labelled == version)
                .map(|(label, _)| label.to_string())
                .collect();
            let note = match &found.problem {
                Some(problem) => problem.clone(),
                None => labels.join(", "),
            };
            let (state, files, bytes) = (state(found), found.files, found.bytes);
            let row = format!(
                "{name:<width$}  {version:>7}  {state:<8}  {files:>5}  {bytes:>12}  {note}"
            );
            text.push_str(row.trim_end());
            text.push('\n');
        }
        for note in &model.notes {
            text.push_str(&format!("note: {name}: {note}\n"));
        }
    }
    for note in &listing.notes {
        text.push_str(&format!("note: {note}\n"));
    }
    text
}
