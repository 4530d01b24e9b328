//! `tidegate audit verify`: every record, tree and checkpoint, read from the files alone.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use crate::cli::admin::{Stop, examples, finish};
use crate::ledger::checkpoint::{Note, Notes};
use crate::ledger::keys::{self, VerifierKey};
use crate::ledger::verify::{LogReport, ParquetReport, Report, VerifyError, Wanted, verify};

/// More than a file of checkpoints that somebody gives has.
const CHECKPOINT_BYTES_MAX: u64 = 1 << 30;

#[derive(clap::Args)]
#[command(after_help = examples!(
    "audit verify tidegate-state/ledger",
    "audit verify tidegate-state/ledger --public-key auditor/keys.pub",
    "audit verify copy/predictions --checkpoint witness/checkpoints --public-key auditor/keys.pub",
))]
pub(super) struct Args {
    /// The ledger's folder, or that of one of its logs; of a gateway that runs or of a copy
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Checkpoints that were kept elsewhere: the log has to go on from each. Shows a log that was
    /// cut or written anew
    #[arg(long, value_name = "FILE")]
    checkpoint: Vec<PathBuf>,
    /// Verifier keys that are known from elsewhere [default: those in the ledger's own folder]
    #[arg(long, value_name = "FILE")]
    public_key: Vec<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(checked(args))
}

fn checked(args: &Args) -> Result<String, Stop> {
    let mut wanted = Wanted { dir: args.dir.clone(), ..Wanted::default() };
    for file in &args.public_key {
        wanted.keys.extend(public_keys(file)?);
    }
    for file in &args.checkpoint {
        wanted.anchors.extend(checkpoints(file)?);
    }
    match verify(&wanted) {
        Ok(report) if args.json => Ok(format!("{:#}\n", json!({"ok": true, "report": report}))),
        Ok(report) => Ok(text(&report)),
        Err(error @ VerifyError::NoLedger(_)) => Err(Stop::usage(error)),
        Err(error) if args.json => {
            let fault = match &error {
                VerifyError::Fault(fault) => json!({
                    "file": fault.file.display().to_string(),
                    "offset": fault.offset,
                    "what": fault.what,
                }),
                VerifyError::Missing { file, .. } => json!({
                    "file": file.display().to_string(),
                    "missing": true,
                    "what": error.to_string(),
                }),
                other => json!({ "what": other.to_string() }),
            };
            let answer = format!("{:#}\n", json!({"ok": false, "fault": fault}));
            // The complaint that follows is what the exit code speaks of.
            let _printed: ExitCode = finish(Ok(answer));
            Err(Stop::failed(error))
        }
        Err(error) => Err(Stop::failed(error)),
    }
}

pub(super) fn public_keys(file: &Path) -> Result<Vec<VerifierKey>, Stop> {
    let shown = file.display();
    keys::read_public(file).map_err(|error| Stop::usage(format_args!("'{shown}': {error}")))
}

/// One note, or several with an empty line behind each.
fn checkpoints(file: &Path) -> Result<Vec<Note>, Stop> {
    use std::io::Read as _;
    let wrong =
        |what: &dyn std::fmt::Display| Stop::usage(format_args!("'{}': {what}", file.display()));
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(file);
    let read = opened.and_then(|file| file.take(CHECKPOINT_BYTES_MAX).read_to_end(&mut bytes));
    read.map_err(|error| wrong(&error))?;
    bytes.push(b'\n');
    let (mut notes, mut found) = (Notes::new(&bytes[..], 0), Vec::new());
    while let Some((_, note)) = notes.next_note().map_err(|error| wrong(&error))? {
        found.push(note);
    }
    match found.is_empty() {
        true => Err(wrong(&"no checkpoint in it")),
        false => Ok(found),
    }
}

fn text(report: &Report) -> String {
    let mut out: String = report.logs.iter().map(of_log).collect();
    out += &report.parquet.as_ref().map(of_parquet).unwrap_or_default();
    out += match (report.keys_given, report.logs.iter().any(|log| log.key.is_some())) {
        (true, _) => "right, and signed by keys that were given\n",
        (false, true) => {
            "right, by the ledger's own keys; give --public-key or --checkpoint from elsewhere to \
             show that nobody wrote all of it anew\n"
        }
        (false, false) => "right, but nothing is signed yet\n",
    };
    out
}

fn of_parquet(parquet: &ParquetReport) -> String {
    let ParquetReport { segments, files, rows, bytes, .. } = parquet;
    let mut out =
        format!("parquet: {rows} rows in {files} files of {segments} segments, {bytes} bytes");
    let notes = [
        (parquet.removed, "files went as their retention says"),
        (parquet.unreadable, "records that are damaged in the log"),
        (parquet.waiting, "segments not converted yet"),
        (parquet.stale, "segments to be converted anew"),
    ];
    for (count, what) in notes.into_iter().filter(|(count, _)| *count > 0) {
        out += &format!(", {count} {what}");
    }
    out + "\n"
}

fn of_log(log: &LogReport) -> String {
    let mut out = format!(
        "{}: {} records (from {} on) in {} segments, {} bytes",
        log.log,
        log.next_seq - log.first_seq,
        log.first_seq,
        log.segments,
        log.bytes
    );
    if log.erased > 0 {
        out += &format!(", {} erased", log.erased);
    }
    if log.torn_bytes > 0 {
        out += &format!(", {} bytes of no whole record at the end", log.torn_bytes);
    }
    out += &format!("\n  {} checkpoints, the last of {} records", log.checkpoints, log.signed);
    if log.anchors > 0 {
        out += &format!(", {} of those given", log.anchors);
    }
    out += "\n";
    if let Some(key) = &log.key {
        out += &format!("  key {key}\n");
    }
    out
}
