//! `tidegate audit rotate-key` and `public-key`: who signs the ledger's checkpoints.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;

use crate::cli::admin::{Client, Connection, Stop, Why, examples, finish, shown};
use crate::ledger::keys::{self, Keys};

#[derive(clap::Args)]
#[command(after_help = examples!(
    "audit rotate-key --reason 'every year'",
    "audit rotate-key --ledger tidegate-state/ledger",
))]
pub(super) struct Args {
    /// The ledger's folder of a gateway that is stopped, instead of a running one's admin API
    #[arg(long, value_name = "DIR")]
    ledger: Option<PathBuf>,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
#[command(after_help = examples!("audit public-key tidegate-state/ledger"))]
pub(super) struct PublicArgs {
    /// The ledger's folder
    #[arg(value_name = "DIR")]
    ledger: PathBuf,
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(rotated(args))
}

fn rotated(args: &Args) -> Result<String, Stop> {
    if let Some(ledger) = &args.ledger {
        return offline(ledger);
    }
    let client = Client::open(&args.connection)?;
    let answer = client.post("/audit:rotateKey", json!({}), &args.why)?;
    Ok(shown(&args.connection, &answer, |body| {
        let keys = body["keys"].as_array().into_iter().flatten();
        keys.filter_map(|key| Some(format!("{}\n", key.as_str()?))).collect()
    }))
}

fn offline(ledger: &Path) -> Result<String, Stop> {
    let lock = std::fs::File::options().write(true).open(ledger.join("lock"));
    let lock = lock.map_err(|error| {
        Stop::usage(format_args!("'{}' is no ledger: {error}", ledger.display()))
    })?;
    lock.try_lock()
        .map_err(|_| Stop::failed("a gateway uses this ledger; ask it: leave --ledger out"))?;
    let writer = std::fs::read_to_string(ledger.join("writer")).map_err(Stop::failed)?;
    let mut keys = Keys::open(ledger, writer.trim()).map_err(Stop::failed)?;
    keys.rotate().map_err(Stop::failed)?;
    Ok(keys.public().iter().map(|key| format!("{key}\n")).collect())
}

pub(super) fn public(args: &PublicArgs) -> ExitCode {
    let keys = keys::published(&args.ledger).map_err(|error| {
        Stop::usage(format_args!("'{}' has no keys: {error}", args.ledger.display()))
    });
    finish(keys.map(|keys| keys.iter().map(|key| format!("{key}\n")).collect()))
}
