//! `tidegate keys`: API keys, straight in the state, with a gateway running on it or not.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::admit::keys::{self as records, GrantRecord};
use crate::admit::{KeyRecord, ModelPatterns, Role};
use crate::config::schema;
use crate::control::keys::{self, By, NewKey};
use crate::control::store::{SqliteStore, state_file};

/// Days in a hundred years: longer than anybody means.
const DAYS_MAX: u32 = 36_500;

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Make a key; its token is printed once, alone on standard output
    #[command(
        after_help = "Examples:\n  tidegate keys create --name ci --role predictor --models 'fraud-*' --expires 90\n  \
                      TOKEN=$(tidegate keys create --name me --role admin)\n\n\
                      Exit code: 0 made, 1 not made, 2 wrong usage"
    )]
    Create(Create),
    /// List keys; tokens are not kept and cannot be shown
    #[command(after_help = "Example:\n  tidegate keys list --json\n\n\
                      Exit code: 0 listed, 1 the state cannot be read, 2 wrong usage")]
    List(List),
    /// End a key; a running gateway refuses it within 5 s
    #[command(
        after_help = "Example:\n  tidegate keys revoke tg_0123456789abcdef --reason 'left the team'\n\n\
                      Exit code: 0 revoked (or was before), 1 there is no such key, 2 wrong usage"
    )]
    Revoke(Revoke),
}

#[derive(clap::Args)]
struct State {
    /// Folder of the gateway's state [default: TIDEGATE_SERVER_STATE_DIR, or tidegate-state]
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
}

#[derive(clap::Args)]
struct Create {
    /// Who it is for, as the journal and records of predictions will say. Several keys may have the
    /// same name: make the next one, then revoke the last
    #[arg(long, value_name = "NAME", value_parser = name)]
    name: String,
    /// viewer, predictor, deployer, auditor or admin; may be given several times
    #[arg(long, value_name = "ROLE", required = true)]
    role: Vec<Role>,
    /// Only for models whose name matches; may be given several times [default: all models]
    #[arg(long, value_name = "GLOB", value_parser = glob)]
    models: Vec<String>,
    /// Days after which it is refused [default: never]
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=i64::from(DAYS_MAX)))]
    expires: Option<u32>,
    /// Why, for the journal
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    state: State,
}

#[derive(clap::Args)]
struct List {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    state: State,
}

#[derive(clap::Args)]
struct Revoke {
    /// Id of the key, as `keys list` shows it
    id: String,
    /// Why, for the journal
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    #[command(flatten)]
    state: State,
}

fn name(text: &str) -> Result<String, records::KeyNameError> {
    records::check_name(text).map(|()| text.to_owned())
}

fn glob(text: &str) -> Result<String, crate::admit::PatternError> {
    ModelPatterns::parse(&[text]).map(|_| text.to_owned())
}

pub(super) fn run(args: &Args) -> ExitCode {
    let done = match &args.command {
        Command::Create(args) => create(args),
        Command::List(args) => list(args),
        Command::Revoke(args) => revoke(args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            super::complain(&format_args!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn create(args: &Create) -> anyhow::Result<()> {
    let store = SqliteStore::open(&args.state.folder())?;
    let grant = |role: &Role| GrantRecord { role: *role, models: args.models.clone() };
    let days = args.expires.map(|days| SignedDuration::from_hours(24 * i64::from(days)));
    let expires_at = days.map(|days| Timestamp::now().checked_add(days)).transpose()?;
    let grants = args.role.iter().map(grant).collect();
    let asked = NewKey { name: args.name.clone(), grants, expires_at };
    let (record, token) = keys::create(&store, &asked, &by(args.reason.as_ref()))?;
    let printed = print(&format!("{}\n", token.text().expose()));
    if printed.is_err() {
        anyhow::bail!(
            "key {} was made, but its token could not be printed: revoke it",
            record.shown()
        );
    }
    super::complain(&format_args!("made key {}; its token is not shown again", record.shown()));
    Ok(())
}

fn list(args: &List) -> anyhow::Result<()> {
    let store = args.state.existing()?;
    let records = keys::list(&store)?;
    let now = Timestamp::now();
    let text = match args.json {
        true => format!("{:#}\n", records.iter().map(|key| shown(key, now)).collect::<Value>()),
        false => table(&records, now),
    };
    print(&text)?;
    Ok(())
}

fn revoke(args: &Revoke) -> anyhow::Result<()> {
    let store = args.state.existing()?;
    let record = keys::revoke(&store, &args.id, &by(args.reason.as_ref()))?;
    super::complain(&format_args!("revoked key {} ({})", record.shown(), record.name));
    Ok(())
}

impl State {
    fn folder(&self) -> PathBuf {
        let given = self.state_dir.clone();
        let variable = || std::env::var_os(schema::variable("server.state_dir")).map(Into::into);
        let default = || schema::find("server.state_dir").map_or("", |key| key.default).into();
        given.or_else(variable).unwrap_or_else(default)
    }

    /// The store of a state that is there: looking must not make one.
    fn existing(&self) -> anyhow::Result<SqliteStore> {
        let folder = self.folder();
        if !state_file(&folder).exists() {
            anyhow::bail!("there is no state in '{}'", folder.display());
        }
        Ok(SqliteStore::open(&folder)?)
    }
}

fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

fn shown(key: &KeyRecord, now: Timestamp) -> Value {
    let mut value = key.public();
    value["prefix"] = json!(key.shown());
    value["state"] = json!(key.state(now));
    value
}

fn table(records: &[KeyRecord], now: Timestamp) -> String {
    let header = ["ID", "NAME", "ROLE", "MODELS", "STATE", "CREATED", "BY", "EXPIRES"];
    let mut rows = vec![header.map(str::to_owned)];
    rows.extend(records.iter().map(|key| {
        let roles: Vec<&str> = key.grants.iter().map(|grant| grant.role.as_str()).collect();
        let models: Vec<String> = key.grants.iter().map(|grant| models(&grant.models)).collect();
        // Nearly always the same for all.
        let models = match models.split_first() {
            Some((first, rest)) if rest.iter().all(|other| other == first) => first.clone(),
            _ => models.join("; "),
        };
        let ends = key.expires_at.map_or_else(|| "never".to_owned(), day);
        [
            key.shown(),
            key.name.clone(),
            roles.join(","),
            models,
            key.state(now).as_str().to_owned(),
            day(key.created_at),
            key.created_by.clone(),
            ends,
        ]
    }));
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: Vec<usize> = (0..header.len()).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &[String; 8]| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn models(globs: &[String]) -> String {
    if globs.is_empty() { "*".to_owned() } else { globs.join(",") }
}

fn day(at: Timestamp) -> String {
    let text = at.to_string();
    text.split('T').next().unwrap_or_default().to_owned()
}

fn by(reason: Option<&String>) -> By {
    By { actor: format!("cli:{}", user()), reason: reason.cloned(), request_id: None }
}

/// Who runs this, by the system's list of users: what the environment says anybody can set.
fn user() -> String {
    let uid = rustix::process::getuid().as_raw().to_string();
    let users = std::fs::read_to_string(Path::new("/etc/passwd")).unwrap_or_default();
    let name = users.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)? == uid).then(|| name.to_owned())
    });
    name.unwrap_or(uid)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(name: &str, grants: Vec<GrantRecord>) -> KeyRecord {
        KeyRecord {
            id: "0123456789abcdef".to_owned(),
            name: name.to_owned(),
            grants,
            digest: "sha256:00".to_owned(),
            created_at: Timestamp::UNIX_EPOCH,
            created_by: "cli:root".to_owned(),
            expires_at: Some(Timestamp::from_second(86_400 * 30).unwrap()),
            revoked_at: None,
            revoked_by: None,
        }
    }

    #[test]
    fn keys_are_shown_without_their_hash() {
        let of = |role, models: &[&str]| GrantRecord {
            role,
            models: models.iter().map(|text| (*text).to_owned()).collect(),
        };
        let records = [
            record("ci", vec![of(Role::Predictor, &["a-*", "b"]), of(Role::Viewer, &["a-*", "b"])]),
            record("somebody", vec![of(Role::Admin, &[]), of(Role::Viewer, &["x"])]),
        ];
        let table = table(&records, Timestamp::UNIX_EPOCH);
        let expected = "\
ID                   NAME      ROLE              MODELS  STATE  CREATED     BY        EXPIRES
tg_0123456789abcdef  ci        predictor,viewer  a-*,b   live   1970-01-01  cli:root  1970-01-31
tg_0123456789abcdef  somebody  admin,viewer      *; x    live   1970-01-01  cli:root  1970-01-31
";
        assert_eq!(table, expected);
        let json = shown(&records[0], Timestamp::from_second(86_400 * 40).unwrap());
        assert_eq!((&json["state"], &json["digest"]), (&json!("expired"), &Value::Null));
        assert_eq!(json["prefix"], "tg_0123456789abcdef");
    }

    #[test]
    fn the_user_is_the_systems() {
        assert!(!user().is_empty() && user() != "$USER");
    }
}
