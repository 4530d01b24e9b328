//! `tidegate rollout`: a new version in small, watched, reversible steps.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Value, json};

use super::admin::table::{Table, cell, number, time};
use super::admin::{Answer, Client, Connection, Stop, Why, examples, finish, read_json, shown};
use crate::domain::{ModelName, VersionRef};

mod view;
mod watch;

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Begin a rollout
    #[command(after_help = examples!(
        "rollout start iris 2 --reason 'trained on November'",
        "rollout start iris 2 --shadow 100 --steps 1,5,25,50,100 --bake 60 --min-samples 500",
        "rollout start iris 2 --dry-run",
        "rollout start iris --file plan.json --watch",
    ))]
    Start(Box<Start>),
    /// Show a rollout: where it is, what its guards say, and how it came there
    #[command(after_help = examples!("rollout status iris", "rollout status iris --json"))]
    Status(One),
    /// List a model's rollouts, the newest first
    #[command(after_help = examples!("rollout list iris"))]
    List(List),
    /// Follow a rollout to its end; exit code 1 when it was rolled back, aborted or failed
    #[command(after_help = examples!("rollout watch iris", "rollout watch iris | tee rollout.log"))]
    Watch(One),
    /// Stay at the present step until further notice
    #[command(after_help = examples!("rollout pause iris --reason 'looking at a report'"))]
    Pause(Tell),
    /// Go on from a pause
    #[command(after_help = examples!("rollout resume iris"))]
    Resume(Tell),
    /// Give the candidate everything now, whatever the steps say
    #[command(after_help = examples!("rollout promote iris --reason 'it fixes an outage'"))]
    Promote(Tell),
    /// Give the stable version everything back, and end
    #[command(after_help = examples!("rollout abort iris --reason 'wrong candidate'"))]
    Abort(Tell),
}

#[derive(clap::Args)]
struct Start {
    /// Name of the model
    model: ModelName,
    /// The new version: a number or a label
    #[arg(value_parser = version, required_unless_present = "file")]
    candidate: Option<VersionRef>,
    /// The whole plan as JSON (- for standard input); a candidate given here wins
    #[arg(long, value_name = "FILE", conflicts_with_all = ["shadow", "shadow_samples", "steps",
        "bake", "min_samples", "pause_at_end"])]
    file: Option<PathBuf>,
    /// First run it on copies of so many percent of the requests
    #[arg(long, value_name = "PERCENT")]
    shadow: Option<f64>,
    /// Copies that have to end before the first step
    #[arg(long, value_name = "COUNT", requires = "shadow")]
    shadow_samples: Option<u64>,
    /// Weights in percent, ascending [default: 1,5,25,50,100]
    #[arg(long, value_name = "PERCENT,…", value_delimiter = ',')]
    steps: Vec<f64>,
    /// Least seconds at each step
    #[arg(long, value_name = "SECONDS")]
    bake: Option<u64>,
    /// Least requests of the candidate at each step
    #[arg(long, value_name = "COUNT")]
    min_samples: Option<u64>,
    /// Wait for 'resume' or 'promote' when the last step has passed
    #[arg(long)]
    pause_at_end: bool,
    /// Decide and record, and change no traffic
    #[arg(long)]
    dry_run: bool,
    /// Follow it to its end
    #[arg(long)]
    watch: bool,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct One {
    /// Name of the model
    model: ModelName,
    /// Id of the rollout [default: the one under way, or else the last]
    #[arg(value_parser = id)]
    id: Option<String>,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct List {
    /// Name of the model
    model: ModelName,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct Tell {
    /// Name of the model
    model: ModelName,
    /// Id of the rollout [default: the one under way]
    #[arg(value_parser = id)]
    id: Option<String>,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

fn version(text: &str) -> Result<VersionRef, crate::domain::NameError> {
    VersionRef::parse(text)?.ok_or(crate::domain::NameError::BadVersion)
}

fn id(text: &str) -> Result<String, String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    match !text.is_empty() && text.len() <= 128 && text.bytes().all(plain) {
        true => Ok(text.to_owned()),
        false => Err("expected the id of a rollout, as 'rollout list' shows it".to_owned()),
    }
}

pub(super) fn run(args: &Args) -> ExitCode {
    match &args.command {
        Command::Start(args) if args.watch => match start(args) {
            Ok((client, answer)) => {
                let id = cell(&answer.body["id"]);
                watch::run(&client, &args.model, &id, args.connection.json)
            }
            Err(stop) => finish(Err(stop)),
        },
        Command::Start(args) => {
            finish(start(args).map(|(_, answer)| shown(&args.connection, &answer, view::text)))
        }
        Command::Status(args) => finish(status(args)),
        Command::List(args) => finish(list(args)),
        Command::Watch(args) => match found(args) {
            Ok((client, id)) => watch::run(&client, &args.model, &id, args.connection.json),
            Err(stop) => finish(Err(stop)),
        },
        Command::Pause(args) => finish(tell(args, "pause")),
        Command::Resume(args) => finish(tell(args, "resume")),
        Command::Promote(args) => finish(tell(args, "promote")),
        Command::Abort(args) => finish(tell(args, "abort")),
    }
}

fn start(args: &Start) -> Result<(Client, Answer), Stop> {
    let plan = args.plan()?;
    let client = Client::open(&args.connection)?;
    let answer = client.post(&format!("/models/{}/rollouts", args.model), plan, &args.why)?;
    Ok((client, answer))
}

/// What the gateway uses when a plan names no steps.
const DEFAULT_STEPS: [f64; 5] = [1.0, 5.0, 25.0, 50.0, 100.0];

impl Start {
    fn plan(&self) -> Result<Value, Stop> {
        let mut plan = match &self.file {
            Some(file) => read_json(file)?,
            None => json!({}),
        };
        if let Some(candidate) = &self.candidate {
            plan["candidate"] = json!(candidate.to_string());
        }
        if self.dry_run {
            plan["dry_run"] = json!(true);
        }
        if self.pause_at_end {
            plan["on_pass"] = json!("pause");
        }
        if let Some(percent) = self.shadow {
            plan["shadow"] = json!({"percent": percent});
            for (name, value) in [("bake_s", self.bake), ("samples", self.shadow_samples)] {
                if let Some(value) = value {
                    plan["shadow"][name] = json!(value);
                }
            }
        }
        let weights = match (self.steps.is_empty(), self.bake.or(self.min_samples)) {
            (false, _) => &self.steps[..],
            // What holds for each step needs steps to stand in.
            (true, Some(_)) => &DEFAULT_STEPS,
            (true, None) => &[],
        };
        let step = |weight: &f64| {
            let mut step = json!({"weight": weight});
            for (name, value) in [("bake_s", self.bake), ("min_samples", self.min_samples)] {
                if let Some(value) = value {
                    step[name] = json!(value);
                }
            }
            step
        };
        if !weights.is_empty() {
            plan["steps"] = weights.iter().map(step).collect();
        }
        Ok(plan)
    }
}

fn path(model: &ModelName, id: &str) -> String {
    format!("/models/{model}/rollouts/{id}")
}

fn status(args: &One) -> Result<String, Stop> {
    let (client, id) = found(args)?;
    let answer = client.get(&path(&args.model, &id))?;
    Ok(shown(&args.connection, &answer, view::text))
}

/// The rollout that is meant.
fn found(args: &One) -> Result<(Client, String), Stop> {
    let client = Client::open(&args.connection)?;
    let id = match &args.id {
        Some(id) => id.clone(),
        None => under_way(&client, &args.model, true)?,
    };
    Ok((client, id))
}

/// Id of the rollout under way, or, if that will do, of the last.
fn under_way(client: &Client, model: &ModelName, or_last: bool) -> Result<String, Stop> {
    let answer = client.get(&format!("/models/{model}/rollouts"))?;
    let rollouts = answer.body["rollouts"].as_array().map_or(&[][..], Vec::as_slice);
    let running = rollouts.iter().find(|rollout| !view::ended(rollout));
    let last = rollouts.first().filter(|_| or_last);
    let id = running.or(last).and_then(|rollout| rollout["id"].as_str());
    let what = if or_last { "has no rollouts" } else { "has no rollout under way" };
    id.map(ToOwned::to_owned).ok_or_else(|| Stop::failed(format_args!("model '{model}' {what}")))
}

fn list(args: &List) -> Result<String, Stop> {
    let client = Client::open(&args.connection)?;
    let answer = client.get(&format!("/models/{}/rollouts", args.model))?;
    Ok(shown(&args.connection, &answer, table))
}

fn table(body: &Value) -> String {
    let mut table =
        Table::new(["id", "candidate", "stable", "state", "weight", "started", "by", "ended"]);
    for rollout in body["rollouts"].as_array().into_iter().flatten() {
        table.row([
            cell(&rollout["id"]),
            cell(&rollout["candidate"]),
            cell(&rollout["stable"]),
            view::state(rollout),
            format!("{} %", number(&rollout["weight"])),
            time(&rollout["started_at"]),
            cell(&rollout["started_by"]),
            time(&rollout["ended_at"]),
        ]);
    }
    table.text()
}

fn tell(args: &Tell, command: &str) -> Result<String, Stop> {
    let client = Client::open(&args.connection)?;
    let id = match &args.id {
        Some(id) => id.clone(),
        None => under_way(&client, &args.model, false)?,
    };
    let path = format!("{}:{command}", path(&args.model, &id));
    let answer = client.post(&path, json!({}), &args.why)?;
    Ok(shown(&args.connection, &answer, view::text))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: Args,
    }

    fn plan(words: &str) -> Result<Value, String> {
        let words = format!("tidegate start {words}");
        let parsed = Cli::try_parse_from(words.split(' ')).map_err(|error| error.to_string())?;
        match parsed.args.command {
            Command::Start(start) => start.plan().map_err(|stop| format!("{stop:?}")),
            _ => Err("another command".to_owned()),
        }
    }

    #[test]
    fn a_plan_is_what_the_flags_say() {
        assert_eq!(plan("iris 2"), Ok(json!({"candidate": "2"})));
        assert_eq!(
            plan("iris canary --dry-run"),
            Ok(json!({"candidate": "canary", "dry_run": true}))
        );
        let steps = json!([{"weight": 5.0, "bake_s": 9}, {"weight": 100.0, "bake_s": 9}]);
        let whole = json!({
            "candidate": "2", "shadow": {"percent": 50.0, "bake_s": 9, "samples": 7}, "steps": steps,
            "on_pass": "pause",
        });
        let words = "iris 2 --shadow 50 --shadow-samples 7 --steps 5,100 --bake 9 --pause-at-end";
        assert_eq!(plan(words), Ok(whole));
        let usual = plan("iris 2 --min-samples 3").unwrap();
        assert_eq!(usual["steps"].as_array().unwrap().len(), DEFAULT_STEPS.len());
        assert_eq!(usual["steps"][4], json!({"weight": 100.0, "min_samples": 3}));
    }

    #[test]
    fn a_plan_out_of_a_file_takes_the_candidate_given_beside_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("plan.json");
        std::fs::write(&path, r#"{"candidate": "1", "interval_s": 1}"#).unwrap();
        let shown = path.display();
        assert_eq!(plan(&format!("iris --file {shown}")).unwrap()["candidate"], "1");
        assert_eq!(plan(&format!("iris 2 --file {shown}")).unwrap()["candidate"], "2");
        std::fs::write(&path, "[]").unwrap();
        assert!(plan(&format!("iris --file {shown}")).unwrap_err().contains("Usage"));
    }

    #[test]
    fn what_is_no_plan_is_wrong_usage() {
        for words in [
            "iris",
            "iris 0",
            "iris 2 --steps a",
            "iris 2 --shadow-samples 1",
            "iris --file a --bake 1",
        ] {
            assert!(plan(words).is_err(), "{words}");
        }
        for wrong in ["", "a/b", "a:b", &"x".repeat(129)] {
            assert!(id(wrong).is_err(), "{wrong}");
        }
    }
}
