//! `tidegate drift`: the scores of two files, as a gateway, Evidently and scipy would give them.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::admin::{Stop, finish};
use super::frame::{self, Binding, Table};
use super::profile::{learn, sample_max};
use crate::domain::ModelName;
use crate::drift::counters::{Counters, Scores, score_sides};
use crate::drift::feature::{Feature, Part};
use crate::drift::learn::{Column, Data, LearnSettings, TEXTS_MAX};
use crate::drift::profile::{FeatureProfile, PROFILE_BYTES_MAX, Profile, Reference};
use crate::drift::quality::{Oddities, Quality};
use crate::drift::scores::{ColumnVerdict, Counts, Sides, column_test};
use crate::drift::verdict::{Verdict, judge};

mod check;
mod junit;
mod report;

use check::Limit;
use report::Report;

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  \
    tidegate drift --reference train.parquet --current june.parquet\n  \
    tidegate drift --reference reference.json --current june.csv --fail-on drifted=0 --junit drift.xml\n  \
    tidegate drift --reference reference.json --current tidegate-state/ledger/parquet/model=iris \
    --fail-on wasserstein=0.2 --fail-on ks_p=0.001 --json\n\n\
    Exit code: 0 done, 1 a score is beyond its limit or a file cannot be used, 2 wrong usage")]
pub(super) struct Args {
    /// A profile (.json), or a Parquet or CSV file
    #[arg(long, value_name = "FILE")]
    reference: PathBuf,
    /// A Parquet or CSV file, or a folder of the ledger's Parquet
    #[arg(long, value_name = "FILE|DIR")]
    current: PathBuf,
    /// Exit with 1 when a feature's score is above this (a p-value: below); also drifted=COUNT,
    /// insufficient=COUNT, share=SHARE
    #[arg(long, value_name = "SCORE=LIMIT", value_parser = check::limit)]
    fail_on: Vec<Limit>,
    /// Write a report that CI servers read
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

/// One feature of both sides.
struct Compared {
    feature: Feature,
    kind: &'static str,
    reference: Counters,
    current: Counters,
    /// Of the current values, how many came and how many were compared.
    kept: (u64, u64),
    quality: Quality,
    scores: Scores,
    evidently: Option<ColumnVerdict>,
    verdict: Verdict,
}

pub(super) fn run(args: &Args) -> ExitCode {
    match drift(args) {
        Ok((text, false)) => finish(Ok(text)),
        Ok((text, true)) => {
            finish(Ok(text));
            ExitCode::FAILURE
        }
        Err(stop) => finish(Err(stop)),
    }
}

/// The report, and whether it is beyond a limit.
fn drift(args: &Args) -> Result<(String, bool), Stop> {
    let Against { profile, data: reference, mut notes, is_file } = reference(&args.reference)?;
    // Of a ledger with several models that of the profile; rows of a file belong to no model.
    let model = (!is_file).then(|| profile.model.as_str());
    let table = Table::open(&args.current, model)?;
    let features: Vec<Feature> = profile.features.iter().map(|f| f.feature.clone()).collect();
    let binding = Binding::new(&features, &table)?;
    notes.extend(binding.notes(&features, &[]));
    let size = sample_max(features.len());
    let mut columns: Vec<Column> =
        (0..features.len() as u64).map(|seed| Column::new(size, TEXTS_MAX, seed)).collect();
    let mut counters: Vec<Counters> =
        profile.features.iter().map(FeatureProfile::counters).collect();
    let mut oddities = vec![Oddities::default(); features.len()];
    binding.read(&table, |number, value| {
        let feature = &profile.features[number];
        feature.add(&mut counters[number], value);
        oddities[number].count(feature.oddity(value), value);
        columns[number].add(value);
    })?;
    let mut compared = compare(&profile, &reference, &columns, counters);
    for (compared, oddities) in compared.iter_mut().zip(oddities) {
        compared.quality.values = oddities;
    }
    let report = Report {
        reference: args.reference.display().to_string(),
        current: args.current.display().to_string(),
        rows: (profile.source.rows, columns.iter().map(Column::rows).max().unwrap_or(0)),
        features: compared,
        notes,
    };
    let failures = check::failures(&args.fail_on, &report);
    if let Some(path) = &args.junit {
        let xml = junit::document(&args.fail_on, &report, &failures).map_err(Stop::failed)?;
        std::fs::write(path, xml)
            .map_err(|error| Stop::failed(format_args!("'{}': {error}", path.display())))?;
    }
    let text = match args.json {
        true => report.json(&failures),
        false => report.text(&failures),
    };
    Ok((text, !failures.is_empty()))
}

/// What rows are compared with.
struct Against {
    profile: Profile,
    /// Its features' values, where they are known.
    data: Vec<Option<Data>>,
    notes: Vec<String>,
    is_file: bool,
}

fn reference(path: &Path) -> Result<Against, Stop> {
    if path.extension().is_some_and(|extension| extension == "json") {
        let profile = Profile::read(&bytes(path)?)
            .map_err(|error| Stop::usage(format_args!("'{}': {error}", path.display())))?;
        let data = profile.features.iter().map(kept).collect::<Vec<_>>();
        let without = profile.features.iter().zip(&data).any(|(feature, data)| {
            data.is_none() && matches!(feature.reference, Reference::Num(_))
        });
        let note = "the profile keeps no values of numbers: scores that need them are left out";
        let notes = without.then(|| note.to_owned()).into_iter().collect();
        return Ok(Against { profile, data, notes, is_file: false });
    }
    let table = Table::open(path, None)?;
    let model: ModelName = "reference".parse().map_err(Stop::failed)?;
    let features = frame::of_table(&table)?;
    let learnt = learn(&table, features, LearnSettings::default(), (model, None))?;
    let mut notes = learnt.notes;
    if let Some(sampled) = learnt.profile.source.sampled {
        let rows = learnt.profile.source.rows;
        notes.push(format!("the reference is a sample: {sampled} of {rows} rows at least"));
    }
    let data = learnt.data.into_iter().map(Some).collect();
    Ok(Against { profile: learnt.profile, data, notes, is_file: true })
}

fn bytes(path: &Path) -> Result<Vec<u8>, Stop> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(path);
    let read = opened.and_then(|f| f.take(PROFILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes));
    read.map_err(|error| {
        Stop::usage(format_args!("'{}' cannot be read: {error}", path.display()))
    })?;
    Ok(bytes)
}

/// What a profile knows of a feature's values.
fn kept(feature: &FeatureProfile) -> Option<Data> {
    match &feature.reference {
        Reference::Num(_) => feature.sample().cloned().map(Data::Numbers),
        Reference::Cat(cat) => {
            let mut counts: Counts = cat
                .categories
                .names()
                .iter()
                .cloned()
                .zip(cat.tally.counts.iter().copied())
                .collect();
            if cat.tally.outside > 0 {
                *counts.entry("…".to_owned()).or_default() += cat.tally.outside;
            }
            Some(Data::Categories(counts))
        }
        Reference::Mmd(_) => Some(Data::Vectors),
    }
}

fn compare(
    profile: &Profile,
    reference: &[Option<Data>],
    columns: &[Column],
    counters: Vec<Counters>,
) -> Vec<Compared> {
    let mut all = Vec::with_capacity(counters.len());
    for (number, feature) in profile.features.iter().enumerate() {
        let categories = matches!(feature.reference, Reference::Cat(_));
        let current = columns[number].data(&feature.feature, categories);
        let sides = match (&reference[number], &current) {
            (Some(Data::Numbers(reference)), Data::Numbers(current)) => {
                Some(Sides::Numbers { reference, current })
            }
            (Some(Data::Categories(reference)), Data::Categories(current)) => {
                Some(Sides::Categories { reference, current })
            }
            _ => None,
        };
        let mut scores = feature.score(&counters[number]);
        scores.extend(sides.as_ref().map(score_sides).unwrap_or_default());
        let own = matches!(feature.feature.part, Part::Element(_));
        all.push((scores, sides.filter(|_| own).and_then(|sides| column_test(&sides))));
    }
    let judged = profile.features.iter().zip(&counters).zip(&all);
    let verdicts =
        judge(judged.map(|((feature, counters), (scores, _))| (feature, counters, scores)));
    let with = profile.features.iter().zip(counters).zip(columns).zip(all).zip(verdicts);
    with.map(|((((feature, current), column), (scores, evidently)), verdict)| Compared {
        feature: feature.feature.clone(),
        kind: match &feature.reference {
            Reference::Num(_) => "num",
            Reference::Cat(_) => "cat",
            Reference::Mmd(_) => "mmd",
        },
        reference: feature.own(),
        quality: Quality { constant: feature.is_constant(&current), ..Quality::default() },
        current,
        kept: column.kept(),
        scores,
        evidently,
        verdict,
    })
    .collect()
}
