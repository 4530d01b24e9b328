//! `tidegate approvals`: what was said of a version before it may take traffic.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::admin::table::{Table, cell, short_digest, time};
use super::admin::{Client, Connection, Stop, Why, examples, finish, shown};
use crate::domain::{ModelName, Version};

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List what was said of a version, and how many approvals it needs
    #[command(after_help = examples!("approvals list iris 2"))]
    List(List),
    /// Approve a version; it counts for the bytes that it has now
    #[command(after_help = examples!("approvals approve iris 2 --comment 'checked against the test set'"))]
    Approve(Say),
    /// Reject a version
    #[command(after_help = examples!("approvals reject iris 2 --comment 'owner unknown'"))]
    Reject(Say),
}

#[derive(clap::Args)]
struct List {
    /// Name of the model
    model: ModelName,
    /// Number of the version
    version: Version,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct Say {
    /// Name of the model
    model: ModelName,
    /// Number of the version
    version: Version,
    /// Why, for everyone to read
    #[arg(long, value_name = "TEXT", default_value = "")]
    comment: String,
    /// Digest that was looked at; refused when the version has another by now
    #[arg(long, value_name = "DIGEST")]
    digest: Option<String>,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(match &args.command {
        Command::List(args) => list(args),
        Command::Approve(args) => say(args, "approve"),
        Command::Reject(args) => say(args, "reject"),
    })
}

fn path(model: &ModelName, version: Version) -> String {
    format!("/models/{model}/versions/{version}/approvals")
}

fn list(args: &List) -> Result<String, Stop> {
    let answer = Client::open(&args.connection)?.get(&path(&args.model, args.version))?;
    Ok(shown(&args.connection, &answer, table))
}

fn say(args: &Say, decision: &str) -> Result<String, Stop> {
    let mut body = json!({"decision": decision, "comment": args.comment});
    if let Some(digest) = &args.digest {
        body["digest"] = json!(digest);
    }
    let client = Client::open(&args.connection)?;
    let answer = client.post(&path(&args.model, args.version), body, &args.why)?;
    Ok(shown(&args.connection, &answer, table))
}

fn table(body: &Value) -> String {
    let mut table = Table::new(["who", "said", "at", "until", "digest", "comment"]);
    for approval in body["approvals"].as_array().into_iter().flatten() {
        table.row([
            cell(&approval["principal"]),
            cell(&approval["decision"]),
            time(&approval["at"]),
            time(&approval["expires"]),
            short_digest(&approval["digest"]),
            cell(&approval["comment"]),
        ]);
    }
    let (have, need) = (cell(&body["have"]), cell(&body["need"]));
    format!("{}{have} of {need} approvals for {}\n", table.text(), short_digest(&body["digest"]))
}
