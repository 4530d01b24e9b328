//! `tidegate audit erase`: takes out what a record, or everything about somebody, held.

use std::process::ExitCode;

use serde_json::json;
use uuid::Uuid;

use crate::cli::admin::{Client, Connection, LOAD_ANSWER_MAX, Stop, Why, examples, finish, shown};

#[derive(clap::Args)]
#[command(after_help = examples!(
    "audit erase 01998d3c-8f4e-7000-8000-000000000001 --reason 'request 17'",
    "audit erase --subject customer-4711 --reason 'request 18'",
))]
pub(super) struct Args {
    /// Ids of predictions
    #[arg(value_name = "ID", required_unless_present = "subject")]
    ids: Vec<Uuid>,
    /// Everything that is recorded about this subject, and the key that it was encrypted with
    #[arg(long, value_name = "SUBJECT")]
    subject: Option<String>,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(erased(args))
}

fn erased(args: &Args) -> Result<String, Stop> {
    let client = Client::open(&args.connection)?;
    let ids: Vec<String> = args.ids.iter().map(Uuid::to_string).collect();
    let mut body = json!({ "ids": ids });
    if let Some(subject) = &args.subject {
        body["subject"] = json!(subject);
    }
    let answer = client.change(
        http::Method::POST,
        "/audit:erase",
        Some(body),
        &args.why,
        LOAD_ANSWER_MAX,
    )?;
    Ok(shown(&args.connection, &answer, |body| {
        let mut text = format!("{} records erased", body["records"]);
        if body["key_destroyed"] == true {
            text += ", the subject's key destroyed";
        }
        if body["done"] != true {
            text += "; recorded, and done in a while: a segment is still written";
        }
        text + "\n"
    }))
}
