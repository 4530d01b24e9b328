//! `tidegate audit erase`: takes out what a record, or everything about somebody, held.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::json;
use uuid::Uuid;

use crate::cli::admin::{
    Answer, Client, Connection, LOAD_ANSWER_MAX, Stop, Why, examples, finish, shown,
};
use crate::control::call::REASON_LEN_MAX;
use crate::ledger::erase::{self, OfflineError, erase_offline};

#[derive(clap::Args)]
#[command(after_help = examples!(
    "audit erase 01998d3c-8f4e-7000-8000-000000000001 --reason 'request 17'",
    "audit erase --subject customer-4711 --reason 'request 18'",
    "audit erase --subject customer-4711 --reason 'request 18' --ledger tidegate-state/ledger",
))]
pub(super) struct Args {
    /// Ids of predictions
    #[arg(value_name = "ID", required_unless_present = "subject")]
    ids: Vec<Uuid>,
    /// Everything that is recorded about this subject, and the key that it was encrypted with
    #[arg(long, value_name = "SUBJECT")]
    subject: Option<String>,
    /// The ledger's folder of a gateway that is stopped, instead of a running one's admin API
    #[arg(long, value_name = "DIR")]
    ledger: Option<PathBuf>,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(erased(args))
}

fn offline(args: &Args, ledger: &Path) -> Result<Answer, Stop> {
    let reason = args.why.reason().filter(|reason| !reason.trim().is_empty());
    let reason = reason.ok_or_else(|| Stop::usage("--reason: expected why"))?;
    if reason.len() > REASON_LEN_MAX {
        return Err(Stop::usage(format_args!("--reason: expected at most {REASON_LEN_MAX} bytes")));
    }
    let user = rustix::process::getuid().as_raw();
    let why = erase::Why { by: format!("local:uid {user}"), reason: reason.to_owned() };
    let erased = erase_offline(ledger, args.ids.clone(), args.subject.as_deref(), &why);
    match erased {
        Ok(erased) => Ok(Answer { etag: None, body: json!(erased) }),
        Err(error @ OfflineError::NoLedger { .. }) => Err(Stop::usage(error)),
        Err(error) => Err(Stop::failed(error)),
    }
}

fn erased(args: &Args) -> Result<String, Stop> {
    let answer = match &args.ledger {
        Some(ledger) => offline(args, ledger)?,
        None => asked(args)?,
    };
    Ok(shown(&args.connection, &answer, |body| {
        let mut text = format!("{} records erased", body["records"]);
        if body["key_destroyed"] == true {
            text += ", the subject's key destroyed";
        }
        if let Some(unreadable) = body["unreadable"].as_u64().filter(|count| *count > 0) {
            text += &format!("; {unreadable} records cannot be read, and may hold more");
        }
        if body["done"] != true {
            text += "; recorded, and done in a while: a segment is still written";
        }
        text + "\n"
    }))
}

fn asked(args: &Args) -> Result<Answer, Stop> {
    let client = Client::open(&args.connection)?;
    let ids: Vec<String> = args.ids.iter().map(Uuid::to_string).collect();
    let mut body = json!({ "ids": ids });
    if let Some(subject) = &args.subject {
        body["subject"] = json!(subject);
    }
    client.change(http::Method::POST, "/audit:erase", Some(body), &args.why, LOAD_ANSWER_MAX)
}
