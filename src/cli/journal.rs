//! `tidegate journal`: who changed what, when and why, and who was refused.

use std::process::ExitCode;

use serde_json::Value;

use super::admin::table::{Table, cell, time};
use super::admin::{Answer, Client, Connection, Stop, examples, finish, shown};
use crate::domain::ModelName;

#[derive(clap::Args)]
#[command(after_help = examples!(
    "journal",
    "journal --model iris --action rollout. --limit 20",
    "journal --outcome refused --json",
))]
pub(super) struct Args {
    /// Only of this model
    #[arg(long, value_name = "MODEL")]
    model: Option<ModelName>,
    /// Only actions that begin so: 'traffic.put', 'rollout.'
    #[arg(long, value_name = "START")]
    action: Option<String>,
    /// Only what this principal did
    #[arg(long, value_name = "NAME")]
    actor: Option<String>,
    /// Only what was done, or refused
    #[arg(long, value_parser = ["done", "refused"])]
    outcome: Option<String>,
    /// The oldest first, from behind this number
    #[arg(long, value_name = "SEQ", conflicts_with = "before")]
    after: Option<u64>,
    /// The newest first, from before this number
    #[arg(long, value_name = "SEQ")]
    before: Option<u64>,
    /// How many entries
    #[arg(long, value_name = "COUNT", default_value_t = 50, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    limit: u64,
    #[command(flatten)]
    connection: Connection,
}

/// Entries of one page.
const PAGE: u64 = 100;

pub(super) fn run(args: &Args) -> ExitCode {
    finish(journal(args))
}

fn journal(args: &Args) -> Result<String, Stop> {
    let client = Client::open(&args.connection)?;
    let mut events = Vec::new();
    let (mut cursor, direction) = match args.after {
        Some(after) => (Some(after), "after"),
        None => (args.before, "before"),
    };
    loop {
        let left = args.limit.saturating_sub(events.len() as u64).min(PAGE);
        let page = client.get(&format!("/journal?{}", args.query(direction, cursor, left)))?;
        events.extend(page.body["events"].as_array().cloned().unwrap_or_default());
        cursor = page.body["next"].as_u64();
        if cursor.is_none() || events.len() as u64 >= args.limit {
            break;
        }
    }
    let body = serde_json::json!({"events": events, "next": cursor});
    let answer = Answer { etag: None, body };
    Ok(shown(&args.connection, &answer, |body| {
        table(body["events"].as_array().map_or(&[], Vec::as_slice))
    }))
}

impl Args {
    fn query(&self, direction: &str, cursor: Option<u64>, limit: u64) -> String {
        let mut query = url::form_urlencoded::Serializer::new(String::new());
        query.append_pair("limit", &limit.to_string());
        if let Some(cursor) = cursor {
            query.append_pair(direction, &cursor.to_string());
        }
        let model = self.model.as_ref().map(ModelName::as_str);
        for (name, value) in [
            ("model", model),
            ("action", self.action.as_deref()),
            ("actor", self.actor.as_deref()),
            ("outcome", self.outcome.as_deref()),
        ] {
            if let Some(value) = value {
                query.append_pair(name, value);
            }
        }
        query.finish()
    }
}

fn table(events: &[Value]) -> String {
    let mut table = Table::new(["seq", "at", "who", "action", "subject", "outcome", "why"]);
    for event in events {
        table.row([
            cell(&event["seq"]),
            time(&event["at"]),
            cell(&event["actor"]),
            cell(&event["action"]),
            cell(&event["subject"]),
            cell(&event["outcome"]),
            why(event),
        ]);
    }
    table.text()
}

/// The reason, and for a refusal what was in the way.
pub(super) fn why(event: &Value) -> String {
    let parts = [cell(&event["reason"]), cell(&event["detail"])];
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn filters_are_sent_as_they_are() {
        let words = ["journal", "--model", "iris", "--action", "rollout.", "--actor", "a&b=c"];
        let args = Cli::try_parse_from(words).unwrap().args;
        let query = args.query("before", Some(7), 50);
        assert_eq!(query, "limit=50&before=7&model=iris&action=rollout.&actor=a%26b%3Dc");
        assert!(Cli::try_parse_from(["journal", "--outcome", "perhaps"]).is_err());
        assert!(Cli::try_parse_from(["journal", "--after", "1", "--before", "2"]).is_err());
    }

    #[test]
    fn refusals_say_what_was_in_the_way() {
        assert_eq!(why(&json!({"reason": "canary", "detail": "not ready"})), "canary; not ready");
        assert_eq!(why(&json!({"detail": "not ready"})), "not ready");
        assert_eq!(why(&json!({})), "");
    }
}
