//! `tidegate audit prove` and `check-proof`: one record, and that it is in the log.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::{Value, json};
use uuid::Uuid;

use super::verify::public_keys;
use crate::cli::admin::table::plain;
use crate::cli::admin::{Stop, examples, finish};
use crate::ledger::export::log_folder;
use crate::ledger::prove::{Proof, Proven, Which, prove};

/// Larger than any proof: a record has 32 MiB at most.
const PROOF_BYTES_MAX: u64 = 64 << 20;

#[derive(clap::Args)]
#[command(after_help = examples!(
    "audit prove 01998d3c-8f4e-7000-8000-000000000001 --log tidegate-state/ledger",
    "audit prove --seq 4711 --log tidegate-state/ledger/admin --without-payload",
))]
pub(super) struct ProveArgs {
    /// Id of the prediction
    #[arg(value_name = "ID", required_unless_present = "seq", conflicts_with = "seq")]
    id: Option<Uuid>,
    /// Number of the record instead
    #[arg(long, value_name = "N")]
    seq: Option<u64>,
    /// Folder of the state, the ledger (then its predictions are meant) or one log
    #[arg(long, value_name = "DIR")]
    log: PathBuf,
    /// Leave out what is not committed to directly: inputs, outputs, the caller's request id
    #[arg(long)]
    without_payload: bool,
}

#[derive(clap::Args)]
#[command(after_help = examples!("audit check-proof proof.json --public-key auditor/keys.pub"))]
pub(super) struct CheckArgs {
    /// What 'audit prove' printed
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Verifier keys that are known from elsewhere
    #[arg(long, value_name = "FILE", required = true)]
    public_key: Vec<PathBuf>,
    /// Print the result as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &ProveArgs) -> ExitCode {
    finish(proof(args))
}

fn proof(args: &ProveArgs) -> Result<String, Stop> {
    let by_id = args.id.map(Which::Id);
    let which = by_id.or(args.seq.map(Which::Seq)).ok_or_else(|| Stop::usage("which record?"))?;
    let log = log_folder(&args.log).map_err(Stop::usage)?;
    let proof = prove(&log, which, !args.without_payload).map_err(Stop::failed)?;
    serde_json::to_string_pretty(&proof).map(|text| text + "\n").map_err(Stop::failed)
}

pub(super) fn check(args: &CheckArgs) -> ExitCode {
    finish(checked(args))
}

fn checked(args: &CheckArgs) -> Result<String, Stop> {
    let mut keys = Vec::new();
    for file in &args.public_key {
        keys.extend(public_keys(file)?);
    }
    let proof = read(&args.file)?;
    let proven = proof.check(&keys).map_err(Stop::failed)?;
    let shown = shown(&proof, &proven);
    Ok(match args.json {
        true => format!("{shown:#}\n"),
        false => text(&shown),
    })
}

fn read(file: &Path) -> Result<Proof, Stop> {
    use std::io::Read as _;
    let shown = file.display();
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(file);
    let read = opened.and_then(|file| file.take(PROOF_BYTES_MAX).read_to_end(&mut bytes));
    read.map_err(|error| Stop::usage(format_args!("'{shown}' cannot be read: {error}")))?;
    serde_json::from_slice(&bytes)
        .map_err(|error| Stop::failed(format_args!("'{shown}' is no proof: {error}")))
}

fn shown(proof: &Proof, proven: &Proven) -> Value {
    let Proven { head, payload, note, key } = proven;
    let id = Uuid::from_slice(&head.prediction_id).ok();
    let time = jiff::Timestamp::from_nanosecond(i128::from(head.time_ns)).ok();
    json!({
        "ok": true,
        "log": proof.origin,
        "seq": proof.seq,
        "kind": head.kind().as_str_name().to_lowercase(),
        "prediction_id": id.map(|id| id.to_string()),
        "time": time.map(|time| time.to_string()),
        "model": head.model,
        "version": head.version,
        "status": head.status,
        "principal": head.principal,
        "payload": if payload.is_some() { "proven" } else { "not in the proof" },
        "request_id": payload.as_ref().map(|payload| &payload.request_id),
        "inputs": payload.as_ref().map(|payload| payload.inputs.len()),
        "outputs": payload.as_ref().map(|payload| payload.outputs.len()),
        "records": note.checkpoint.tree.size,
        "signed_at": note.checkpoint.extension("time"),
        "key": key.to_string(),
    })
}

fn text(shown: &Value) -> String {
    let mut out = "the record is in the log\n".to_owned();
    for (name, value) in shown.as_object().into_iter().flatten().filter(|(name, _)| *name != "ok") {
        let value = value.as_str().map_or_else(|| value.to_string(), plain);
        out += &format!("  {name}: {value}\n");
    }
    out
}
