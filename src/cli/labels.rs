//! `tidegate labels`: names of versions that callers may use instead of numbers.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::admin::table::{Table, cell};
use super::admin::{Client, Connection, Stop, Why, examples, finish, shown};
use crate::domain::{Label, ModelName, Version};

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List a model's labels
    #[command(after_help = examples!("labels list iris"))]
    List(List),
    /// Put a label on a version that is ready; it leaves the one that had it
    #[command(after_help = examples!("labels set iris stable 2 --reason 'a week without errors'"))]
    Set(Set),
    /// Take a label away
    #[command(after_help = examples!("labels delete iris canary"))]
    Delete(Delete),
}

#[derive(clap::Args)]
struct List {
    /// Name of the model
    model: ModelName,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct Set {
    /// Name of the model
    model: ModelName,
    /// The label: stable, canary, any name
    label: Label,
    /// Number of the version
    version: Version,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct Delete {
    /// Name of the model
    model: ModelName,
    /// The label
    label: Label,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(match &args.command {
        Command::List(args) => list(args),
        Command::Set(args) => set(args),
        Command::Delete(args) => delete(args),
    })
}

fn list(args: &List) -> Result<String, Stop> {
    let answer = Client::open(&args.connection)?.get(&format!("/models/{}/labels", args.model))?;
    Ok(shown(&args.connection, &answer, table))
}

fn set(args: &Set) -> Result<String, Stop> {
    let path = format!("/models/{}/labels/{}", args.model, args.label);
    let body = json!({"version": args.version.to_string()});
    let answer = Client::open(&args.connection)?.put(&path, body, &args.why)?;
    Ok(shown(&args.connection, &answer, table))
}

fn delete(args: &Delete) -> Result<String, Stop> {
    let path = format!("/models/{}/labels/{}", args.model, args.label);
    let answer = Client::open(&args.connection)?.delete(&path, &args.why)?;
    Ok(shown(&args.connection, &answer, table))
}

fn table(body: &Value) -> String {
    let mut table = Table::new(["label", "version"]);
    for (label, version) in body["labels"].as_object().into_iter().flatten() {
        table.row([label.clone(), cell(version)]);
    }
    table.text()
}
