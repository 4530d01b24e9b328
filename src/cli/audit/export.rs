//! `tidegate audit export`: records as lines of JSON or as Parquet, of a log that is written or not.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use serde_json::{Value, json};
use uuid::Uuid;

use super::select::Select;
use crate::cli::admin::{Stop, examples, finish};
use crate::ledger::export::{
    ExportError, Labels, Said, Selection, line, log_folder, scan, segments,
};
use crate::ledger::parquet::{self, ParquetError};

#[derive(clap::Args)]
#[command(after_help = examples!(
    "audit export tidegate-state --format jsonl --out - --since 1h",
    "audit export tidegate-state/ledger --format jsonl --out iris.jsonl --model iris --status ok",
    "audit export /backup/predictions --format parquet --out audit/        # a folder for each model and day",
    "audit export tidegate-state --format parquet --out train.parquet --model iris --labelled",
    "audit export tidegate-state --format parquet --out day.parquet --since 2026-11-25 --until 2026-11-26",
))]
pub(super) struct Args {
    /// Folder of the state, of the ledger or of one log
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    #[arg(long, value_enum)]
    format: Format,
    /// Where to: a file, - for standard output (lines only); Parquet goes into one file if the name
    /// ends with .parquet, else into a folder
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    #[command(flatten)]
    select: Select,
    /// Only the prediction with this id
    #[arg(long, value_name = "UUID")]
    id: Option<Uuid>,
    /// Only predictions that have a label by now, with that beside them: for training. Takes some
    /// hundred bytes of memory for each
    #[arg(long)]
    labelled: bool,
    /// Print what was done as JSON
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Format {
    /// A line of JSON for each record
    Jsonl,
    Parquet,
}

/// What was written.
#[derive(Default)]
struct Done {
    records: u64,
    files: Vec<String>,
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(export(args))
}

fn export(args: &Args) -> Result<String, Stop> {
    let log = log_folder(&args.dir).map_err(Stop::usage)?;
    let mut wanted = args.select.selection(args.id);
    if args.labelled {
        let labels = Labels::beside(&log, wanted.model.as_deref()).map_err(Stop::failed)?;
        wanted.labels = Some(Arc::new(labels));
    }
    let to_stdout = args.out.as_os_str() == "-";
    let done = match args.format {
        Format::Jsonl if to_stdout => {
            let records = lines(&log, &wanted, io::stdout().lock())?;
            Done { records, files: Vec::new() }
        }
        Format::Jsonl => {
            let failed = |error| Stop::failed(format_args!("{}: {error}", args.out.display()));
            let records = lines(&log, &wanted, File::create(&args.out).map_err(failed)?)?;
            Done { records, files: vec![args.out.display().to_string()] }
        }
        Format::Parquet if to_stdout => {
            return Err(Stop::usage("--out: Parquet goes to a file or a folder, not to '-'"));
        }
        Format::Parquet => as_parquet(&log, &wanted, &args.out)?,
    };
    let told = told(args, &done);
    if to_stdout {
        // Standard output has the records.
        crate::cli::complain(&told.trim_end());
        return Ok(String::new());
    }
    Ok(told)
}

fn told(args: &Args, done: &Done) -> String {
    let Done { records, files } = done;
    match args.json {
        true => format!("{:#}\n", json!({"records": records, "files": files})),
        false if files.is_empty() => format!("{records} records\n"),
        false => format!("{records} records in {}\n", files.join(", ")),
    }
}

/// Writes until the end or the first fault; what stands before a fault is written.
fn lines(log: &Path, wanted: &Selection, out: impl Write) -> Result<u64, Stop> {
    let mut out = BufWriter::with_capacity(1 << 20, out);
    let (mut text, mut records) = (Vec::new(), 0_u64);
    let scanned = scan::<LineError>(log, wanted, |head, view| {
        text.clear();
        line(&mut text, &head.writer.to_string(), view);
        let said = wanted.labels.as_ref().and_then(|labels| labels.of(view.prediction_id));
        if let Some(said) = said {
            beside(&mut text, said);
        }
        text.push(b'\n');
        out.write_all(&text)?;
        records += 1;
        Ok(ControlFlow::Continue(()))
    });
    let flushed = out.flush();
    match scanned {
        // Whoever read has enough.
        Err(LineError::Out(error)) if error.kind() == io::ErrorKind::BrokenPipe => Ok(records),
        Err(LineError::Out(error)) => Err(Stop::failed(format_args!("cannot write: {error}"))),
        Err(LineError::Read(error)) => {
            let so_far = format_args!("{error}; {records} records before it were exported");
            Err(Stop::failed(so_far))
        }
        Ok(taken) => {
            flushed.map_err(|error| Stop::failed(format_args!("cannot write: {error}")))?;
            Ok(taken)
        }
    }
}

/// Puts what was said of a prediction into its line, as its last members.
fn beside(line: &mut Vec<u8>, said: &Said) {
    // Texts and numbers: it cannot fail.
    let members = serde_json::to_vec(said).unwrap_or_default();
    if line.pop_if(|last| *last == b'}').is_some() {
        line.push(b',');
        line.extend_from_slice(members.get(1..).unwrap_or_default());
    }
}

#[derive(Debug)]
enum LineError {
    Read(ExportError),
    Out(io::Error),
}

impl From<ExportError> for LineError {
    fn from(error: ExportError) -> Self {
        Self::Read(error)
    }
}

impl From<io::Error> for LineError {
    fn from(error: io::Error) -> Self {
        Self::Out(error)
    }
}

fn as_parquet(log: &Path, wanted: &Selection, out: &Path) -> Result<Done, Stop> {
    if out.extension().is_some_and(|extension| extension == "parquet") {
        let records = parquet::single(log, wanted, out).map_err(Stop::failed)?;
        return Ok(Done { records, files: vec![out.display().to_string()] });
    }
    let mut done = Done::default();
    let mut problems = Vec::new();
    for segment in segments(log, wanted).map_err(Stop::failed)? {
        match parquet::convert(&segment, out, &parquet::Job::of(wanted)) {
            Ok(manifest) => {
                done.records += manifest.segment.records;
                let files = manifest.files.iter().map(|file| out.join(&file.file));
                done.files.extend(files.map(|path| path.display().to_string()));
                let file = segment.path.display();
                problems.extend(manifest.unreadable.iter().map(|it| {
                    let parquet::Unreadable { first_seq, last_seq, offset, what } = it;
                    format!("{file}: at byte {offset}: {what} (records {first_seq} to {last_seq})")
                }));
            }
            Err(ParquetError::Stopped) => {}
            Err(error) => problems.push(error.to_string()),
        }
    }
    match problems.is_empty() {
        true => Ok(done),
        false => Err(Stop::failed(format_args!(
            "{} records were exported, but not all: {}",
            done.records,
            problems.join("; ")
        ))),
    }
}

/// The line of one record as a value.
pub(super) fn value(writer: &str, view: &crate::ledger::export::View<'_>) -> Value {
    let mut text = Vec::new();
    line(&mut text, writer, view);
    // It was just made.
    serde_json::from_slice(&text).unwrap_or_default()
}
