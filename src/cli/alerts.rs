//! `tidegate alerts`: what is wrong with models, and who was told.

use std::process::ExitCode;
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::admin::table::{Table, cell, time};
use super::admin::{Client, Connection, Stop, Why, examples, finish, shown};
use crate::domain::ModelName;

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List alerts that fire, and those of the last week
    #[command(after_help = examples!("alerts list", "alerts list --json"))]
    List(List),
    /// Send a receiver a test, once; a pipeline is started by it
    #[command(after_help = examples!("alerts test ops"))]
    Test(Test),
    /// Tell nobody of a model's alerts for some hours
    #[command(after_help = examples!("alerts silence iris --hours 4 --reason 'we know, and train'"))]
    Silence(SilenceArgs),
    /// Tell of a model's alerts again
    #[command(after_help = examples!("alerts unsilence iris"))]
    Unsilence(Unsilence),
}

#[derive(clap::Args)]
struct List {
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct Test {
    /// Name of the receiver, as the configuration has it
    receiver: String,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct SilenceArgs {
    /// Name of the model
    model: ModelName,
    /// For how long
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=720))]
    hours: u32,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct Unsilence {
    /// Name of the model
    model: ModelName,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(match &args.command {
        Command::List(args) => list(args),
        Command::Test(args) => test(args),
        Command::Silence(args) => silence(args),
        Command::Unsilence(args) => unsilence(args),
    })
}

fn list(args: &List) -> Result<String, Stop> {
    let answer = Client::open(&args.connection)?.get("/alerts")?;
    Ok(shown(&args.connection, &answer, table))
}

fn test(args: &Test) -> Result<String, Stop> {
    let segment: String = url::form_urlencoded::byte_serialize(args.receiver.as_bytes()).collect();
    let path = format!("/alerts/receivers/{segment}:test");
    let answer = Client::open(&args.connection)?.post(&path, json!({}), &args.why)?;
    let text = shown(&args.connection, &answer, |body| {
        let detail = cell(&body["detail"]);
        let detail = if detail.is_empty() { detail } else { format!(": {detail}") };
        format!("{} {}{detail}\n", cell(&body["receiver"]), cell(&body["outcome"]))
    });
    match answer.body["outcome"].as_str() {
        Some("delivered") => Ok(text),
        _ => Err(Stop::failed(text.trim_end())),
    }
}

fn silence(args: &SilenceArgs) -> Result<String, Stop> {
    let hours = Duration::from_secs(u64::from(args.hours) * 3600);
    let hours = SignedDuration::try_from(hours).map_err(Stop::usage)?;
    // Not beyond what may be, when the gateway's clock is behind.
    let until = Timestamp::now().checked_add(hours).map_err(Stop::usage)?;
    let until = until.checked_sub(SignedDuration::from_secs(60)).map_err(Stop::usage)?;
    let (path, body) =
        (format!("/models/{}/silence", args.model), json!({"until": until.to_string()}));
    let answer = Client::open(&args.connection)?.put(&path, body, &args.why)?;
    Ok(shown(&args.connection, &answer, |body| {
        format!("{} is silent until {}\n", cell(&body["model"]), time(&body["silence"]["until"]))
    }))
}

fn unsilence(args: &Unsilence) -> Result<String, Stop> {
    let path = format!("/models/{}/silence", args.model);
    let answer = Client::open(&args.connection)?.delete(&path, &args.why)?;
    Ok(shown(&args.connection, &answer, |body| {
        format!("{} is silent no more\n", cell(&body["model"]))
    }))
}

fn table(body: &Value) -> String {
    let mut table = Table::new(["state", "severity", "since", "what", "told"]);
    for alert in body["alerts"].as_array().into_iter().flatten() {
        let told = alert["deliveries"].as_object().into_iter().flatten().map(|(name, told)| {
            let last =
                if told["resolved"].is_object() { &told["resolved"] } else { &told["firing"] };
            format!("{name} {}", cell(&last["state"]))
        });
        table.row([
            cell(&alert["state"]),
            cell(&alert["severity"]),
            time(&alert["fired_at"]),
            cell(&alert["summary"]),
            told.collect::<Vec<_>>().join(", "),
        ]);
    }
    let mut text = table.text();
    for (model, silence) in body["silences"].as_object().into_iter().flatten() {
        let (until, why) = (time(&silence["until"]), cell(&silence["reason"]));
        text += &format!("{model} is silent until {until}: {why}\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_telling_is_what_is_shown() {
        let body = json!({
            "alerts": [{
                "state": "resolved", "severity": "warning", "fired_at": "2026-11-26T10:00:00Z",
                "summary": "1 input of iris version 2 (stable) drifted: x",
                "deliveries": {
                    "ops": {"firing": {"state": "delivered"}, "resolved": {"state": "pending"}},
                    "train": {"firing": {"state": "waiting"}},
                },
            }],
            "silences": {"iris": {"until": "2026-11-26T12:00:00Z", "reason": "we know"}},
        });
        let text = table(&body);
        assert!(text.contains("ops pending, train waiting"), "{text}");
        assert!(text.contains("iris is silent until") && text.contains("we know"), "{text}");
    }
}
