//! `tidegate audit hold` and `audit holds`: records that must not go, whatever their retention says.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::select::Moment;
use crate::cli::admin::table::{Table, cell, time as shown_time};
use crate::cli::admin::{Client, Connection, Stop, Why, examples, finish, shown};
use crate::domain::ModelName;
use crate::ledger::export::time;

#[derive(clap::Args)]
#[command(after_help = examples!(
    "audit hold case-17 --model fraud --since 2026-01-01 --until 2026-04-01 --reason 'court order 17'",
    "audit hold everything --reason 'investigation'",
    "audit hold case-17 --lift --reason 'closed'",
))]
pub(super) struct HoldArgs {
    /// Name of the hold
    name: String,
    /// Only records of this model
    #[arg(long, value_name = "MODEL", conflicts_with = "lift")]
    model: Option<ModelName>,
    /// Only records that arrived then or later
    #[arg(long, value_name = "TIME", conflicts_with = "lift")]
    since: Option<Moment>,
    /// Only records that arrived before that
    #[arg(long, value_name = "TIME", conflicts_with = "lift")]
    until: Option<Moment>,
    /// Take the hold away
    #[arg(long)]
    lift: bool,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
#[command(after_help = examples!("audit holds", "audit holds --json"))]
pub(super) struct HoldsArgs {
    #[command(flatten)]
    connection: Connection,
}

pub(super) fn hold(args: &HoldArgs) -> ExitCode {
    finish(change(args))
}

fn change(args: &HoldArgs) -> Result<String, Stop> {
    let client = Client::open(&args.connection)?;
    let name: String = url::form_urlencoded::byte_serialize(args.name.as_bytes()).collect();
    let path = format!("/audit/holds/{name}");
    let answer = match args.lift {
        true => client.delete(&path, &args.why)?,
        false => {
            let moment = |at: &Option<Moment>| at.map(|at| time(at.0));
            let mut body = json!({});
            let parts = [
                ("model", args.model.as_ref().map(ToString::to_string)),
                ("since", moment(&args.since)),
                ("until", moment(&args.until)),
            ];
            for (name, value) in parts {
                if let Some(value) = value {
                    body[name] = value.into();
                }
            }
            client.put(&path, body, &args.why)?
        }
    };
    Ok(shown(&args.connection, &answer, |hold| table(std::slice::from_ref(hold))))
}

pub(super) fn holds(args: &HoldsArgs) -> ExitCode {
    finish(Client::open(&args.connection).and_then(|client| {
        let answer = client.get("/audit/holds")?;
        Ok(shown(&args.connection, &answer, |body| {
            table(body["holds"].as_array().map_or(&[], Vec::as_slice))
        }))
    }))
}

fn table(holds: &[Value]) -> String {
    let mut table = Table::new(["hold", "model", "since", "until", "by", "put", "why"]);
    for hold in holds {
        table.row([
            cell(&hold["name"]),
            cell(&hold["model"]),
            shown_time(&hold["since"]),
            shown_time(&hold["until"]),
            cell(&hold["by"]),
            shown_time(&hold["put_at"]),
            cell(&hold["reason"]),
        ]);
    }
    table.text()
}
