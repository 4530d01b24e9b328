//! `tidegate versions`: which versions run, and why; load and unload one.

use std::process::ExitCode;

use reqwest::Method;
use serde_json::{Value, json};

use super::admin::table::{Table, cell, change, number, plain, short_digest, time};
use super::admin::{Client, Connection, LOAD_ANSWER_MAX, Stop, Why, examples, finish, shown};
use crate::domain::{Digest, ModelName, Version};

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// List versions: state, share of the traffic, digest, and who put them there
    #[command(after_help = examples!("versions list", "versions list iris --json"))]
    List(List),
    /// Show one version: lineage, checks, approvals, and how it came to be
    #[command(after_help = examples!("versions show iris 2"))]
    Show(Show),
    /// Load a version; returns when it is ready
    #[command(after_help = examples!("versions load iris 2 --reason 'back for a comparison'"))]
    Load(Load),
    /// Unload a version that takes no traffic; returns when its last request has ended
    #[command(after_help = examples!("versions unload iris 1"))]
    Unload(Changed),
    /// Show how far a model's rows have moved from their reference, by version and arm
    #[command(after_help = examples!("versions drift iris", "versions drift iris --json"))]
    Drift(Drift),
    /// Take the reference that was learnt from a version's first rows for good
    #[command(after_help = examples!("versions freeze iris 2 --reason 'a good week'"))]
    Freeze(Changed),
}

/// New categories of a feature that are shown to people; `--json` has all that are kept.
const CATEGORIES_SHOWN: usize = 5;

#[derive(clap::Args)]
struct List {
    /// Name of a model [default: all that this key may see]
    model: Option<ModelName>,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct Show {
    /// Name of the model
    model: ModelName,
    /// Number of the version
    version: Version,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct Load {
    /// Name of the model
    model: ModelName,
    /// Number of the version
    version: Version,
    /// Take the version although its bytes changed: the digest that it has now
    #[arg(long, value_name = "DIGEST", value_parser = digest)]
    accept_digest: Option<String>,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct Changed {
    /// Name of the model
    model: ModelName,
    /// Number of the version
    version: Version,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct Drift {
    /// Name of the model
    model: ModelName,
    /// The stretch of time: hour, day, or latest (values, where the reference has some)
    #[arg(long, default_value = "hour", value_parser = ["hour", "day", "latest"])]
    window: String,
    #[command(flatten)]
    connection: Connection,
}

fn digest(text: &str) -> Result<String, String> {
    let wrong = || format!("expected 64 hexadecimal digits, got '{text}'");
    Digest::parse(text).map(|digest| digest.to_string()).ok_or_else(wrong)
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(match &args.command {
        Command::List(args) => list(args),
        Command::Show(args) => show(args),
        Command::Load(args) => load(args),
        Command::Unload(args) => unload(args),
        Command::Drift(args) => drift(args),
        Command::Freeze(args) => freeze(args),
    })
}

fn list(args: &List) -> Result<String, Stop> {
    let client = Client::open(&args.connection)?;
    let path = match &args.model {
        Some(model) => format!("/models/{model}"),
        None => "/models".to_owned(),
    };
    let answer = client.get(&path)?;
    Ok(shown(&args.connection, &answer, |body| match body["models"].as_array() {
        Some(models) => table(models),
        None => table(std::slice::from_ref(body)),
    }))
}

fn table(models: &[Value]) -> String {
    let mut table = Table::new([
        "model", "version", "state", "weight", "arms", "labels", "digest", "engine", "changed",
    ]);
    let mut notes = String::new();
    for model in models {
        let name = cell(&model["name"]);
        for version in model["versions"].as_array().into_iter().flatten() {
            table.row([
                name.clone(),
                cell(&version["version"]),
                cell(&version["state"]),
                format!("{} %", number(&version["weight"])),
                cell(&version["arms"]),
                cell(&version["labels"]),
                short_digest(&version["digest"]),
                cell(&version["engine"]),
                change(&version["changed"]),
            ]);
            let reason = cell(&version["reason"]);
            if matches!(version["state"].as_str(), Some("failed" | "quarantined" | "held")) {
                notes += &format!("{name} {}: {reason}\n", cell(&version["version"]));
            }
        }
        let problem = cell(&model["problem"]);
        if !problem.is_empty() {
            notes += &format!("{name}: {problem}\n");
        }
        if let Some(rollout) = model["rollout"].as_str() {
            notes += &format!("{name}: rollout {} is under way\n", plain(rollout));
        }
    }
    table.text() + &notes
}

fn show(args: &Show) -> Result<String, Stop> {
    let path = format!("/models/{}/versions/{}", args.model, args.version);
    let answer = Client::open(&args.connection)?.get(&path)?;
    Ok(shown(&args.connection, &answer, version_text))
}

fn version_text(version: &Value) -> String {
    let mut out = String::new();
    for (name, text) in [
        ("version", cell(&version["version"])),
        ("state", cell(&version["state"])),
        ("since", time(&version["since"])),
        ("because", cell(&version["reason"])),
        ("weight", format!("{} %", number(&version["weight"]))),
        ("arms", cell(&version["arms"])),
        ("labels", cell(&version["labels"])),
        ("digest", cell(&version["digest"])),
        ("engine", cell(&version["engine"])),
        ("source", cell(&version["source"])),
        ("size", cell(&version["size_bytes"])),
        ("memory", cell(&version["memory_measured_bytes"])),
        ("changed", change(&version["changed"])),
    ] {
        if !text.is_empty() {
            out += &format!("{name:<8}  {text}\n");
        }
    }
    for (name, value) in version["lineage"].as_object().into_iter().flatten() {
        let empty = value.is_null() || value.as_object().is_some_and(serde_json::Map::is_empty);
        let text = cell(value);
        if !empty && !text.is_empty() {
            out += &format!("lineage.{}: {text}\n", plain(name));
        }
    }
    for check in version["checks"].as_array().into_iter().flatten() {
        let (name, outcome) = (cell(&check["name"]), cell(&check["outcome"]));
        out += &format!("check {name}: {outcome} {}\n", cell(&check["detail"]));
    }
    for step in version["history"].as_array().into_iter().flatten() {
        let (at, state) = (time(&step["at"]), cell(&step["state"]));
        out += format!("{at} {state} {}", cell(&step["reason"])).trim_end();
        out.push('\n');
    }
    out
}

fn load(args: &Load) -> Result<String, Stop> {
    let path = format!("/models/{}/versions/{}:load", args.model, args.version);
    let body = match &args.accept_digest {
        Some(digest) => json!({"accept_digest": digest}),
        None => json!({}),
    };
    let client = Client::open(&args.connection)?;
    let answer = client.change(Method::POST, &path, Some(body), &args.why, LOAD_ANSWER_MAX)?;
    Ok(shown(&args.connection, &answer, |body| moved(&args.model, body)))
}

fn unload(args: &Changed) -> Result<String, Stop> {
    let path = format!("/models/{}/versions/{}:unload", args.model, args.version);
    let client = Client::open(&args.connection)?;
    let answer = client.change(Method::POST, &path, Some(json!({})), &args.why, LOAD_ANSWER_MAX)?;
    Ok(shown(&args.connection, &answer, |body| moved(&args.model, body)))
}

fn moved(model: &ModelName, body: &Value) -> String {
    let (version, state) = (cell(&body["version"]), cell(&body["state"]));
    let reason = cell(&body["reason"]);
    let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
    format!("{model} {version} is {state}{why}\n")
}

fn drift(args: &Drift) -> Result<String, Stop> {
    let answer = Client::open(&args.connection)?.get(&format!("/models/{}/drift", args.model))?;
    Ok(shown(&args.connection, &answer, |body| drift_text(body, &args.window)))
}

fn drift_text(body: &Value, window: &str) -> String {
    let mut table = Table::new([
        "version", "arm", "feature", "role", "rows", "state", "scores", "mean", "alarm",
    ]);
    let mut notes = String::new();
    for version in body["versions"].as_array().into_iter().flatten() {
        let (number, reference) = (cell(&version["version"]), &version["reference"]);
        let (kind, rows) = (cell(&reference["kind"]), cell(&reference["rows"]));
        let problem = cell(&reference["problem"]);
        notes += &format!("version {number}: reference {kind}, {rows} rows {problem}\n");
        let without = cell(&reference["without"]);
        if !without.is_empty() {
            notes += &format!("version {number}: not in the reference, not watched: {without}\n");
        }
        for arm in version["arms"].as_array().into_iter().flatten() {
            if arm["confidence_drop"].as_array().is_some_and(|outputs| !outputs.is_empty()) {
                let outputs = cell(&arm["confidence_drop"]);
                notes +=
                    &format!("version {number}: less sure of {outputs} ({})\n", cell(&arm["arm"]));
            }
            notes += &new_categories(&number, arm);
            let windows = arm["windows"].as_array().into_iter().flatten();
            for found in windows.filter(|found| found["window"] == window) {
                for feature in found["features"].as_array().into_iter().flatten() {
                    table.row([
                        number.clone(),
                        cell(&arm["arm"]),
                        cell(&feature["feature"]),
                        cell(&feature["role"]),
                        cell(&feature["rows"]),
                        cell(&feature["state"]),
                        scores(&feature["scores"]),
                        mean(&feature["mean"]),
                        if feature["alarm"] == true { "yes".to_owned() } else { String::new() },
                    ]);
                }
            }
        }
    }
    table.text() + &notes
}

/// A mean that has moved, and from where.
fn mean(of: &Value) -> String {
    let (state, mean, before) = (cell(&of["state"]), &of["mean"], &of["reference_mean"]);
    match (state.as_str(), mean.as_f64(), before.as_f64()) {
        ("up" | "down", Some(mean), Some(before)) => {
            format!("{state} to {mean:.4} from {before:.4}")
        }
        _ => String::new(),
    }
}

/// A line for each feature with categories that the reference lacks.
fn new_categories(version: &str, arm: &Value) -> String {
    let mut lines = String::new();
    for feature in arm["new_categories"].as_array().into_iter().flatten() {
        let values = feature["values"].as_array().into_iter().flatten().take(CATEGORIES_SHOWN);
        let each: Vec<String> = values
            .map(|value| {
                let (count, over) = (&value["count"], value["over_count"].as_u64().unwrap_or(0));
                let at_most = if over > 0 { " at most" } else { "" };
                format!("'{}' {}{at_most}", cell(&value["value"]), cell(count))
            })
            .collect();
        let (arm, feature) = (cell(&arm["arm"]), cell(&feature["feature"]));
        lines += &format!("version {version}: new in {feature} ({arm}): {}\n", each.join(", "));
    }
    lines
}

/// Those that say most in a line.
fn scores(of: &Value) -> String {
    let named = ["cell_psi", "wasserstein_low", "psi", "wasserstein", "ks", "mmd", "missing"];
    let there = named.iter().filter_map(|name| Some((name, of[*name].as_f64()?)));
    let worth = there.filter(|(name, value)| **name != "missing" || *value > 0.0);
    let each: Vec<String> = worth.map(|(name, value)| format!("{name} {value:.3}")).collect();
    each.join(", ")
}

fn freeze(args: &Changed) -> Result<String, Stop> {
    let path = format!("/models/{}/versions/{}:freeze", args.model, args.version);
    let client = Client::open(&args.connection)?;
    let answer = client.post(&path, json!({}), &args.why)?;
    Ok(shown(&args.connection, &answer, |body| {
        let rows = cell(&body["reference"]["rows"]);
        format!("version {}: {rows} rows are the reference\n", cell(&body["version"]))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_that_has_moved_stands_beside_its_feature() {
        let mean = |state: &str| json!({"state": state, "mean": 0.55, "reference_mean": 0.71004});
        let feature = |name: &str, state: &str| {
            json!({"feature": name, "role": "output", "rows": 600, "state": "steady",
                "scores": {"cell_psi": 0.01}, "mean": mean(state), "alarm": false})
        };
        let features = [feature("confidence(y)", "down"), feature("margin(y)", "steady")];
        let arm = json!({"arm": "stable", "confidence_drop": ["y"],
            "windows": [{"window": "hour", "features": features}]});
        let reference =
            json!({"kind": "file", "rows": 1000, "problem": null, "without": ["a", "b"]});
        let body = json!({"versions": [{"version": "2", "reference": reference, "arms": [arm]}]});
        let text = drift_text(&body, "hour");
        assert!(text.contains("cell_psi 0.010  down to 0.5500 from 0.7100"), "{text}");
        assert_eq!(text.matches(" from ").count(), 1, "{text}");
        assert!(text.contains("version 2: less sure of y (stable)\n"), "{text}");
        assert!(text.contains("version 2: not in the reference, not watched: a, b\n"), "{text}");
    }

    #[test]
    fn new_categories_are_a_line_for_each_feature() {
        let value = |value: &str, count: u64, over: u64| json!({"value": value, "count": count, "over_count": over});
        let arm = json!({"arm": "stable", "new_categories": [
            {"feature": "colour", "values": [value("mauve\u{7}", 12, 0), value("pink", 3, 2)]},
        ]});
        let want = "version 2: new in colour (stable): 'mauve\u{fffd}' 12, 'pink' 3 at most\n";
        assert_eq!(new_categories("2", &arm), want);
    }

    #[test]
    fn a_list_shows_what_runs_and_what_is_wrong() {
        let models = [json!({
            "name": "iris", "problem": "", "rollout": "r-1",
            "versions": [
                {"version": "1", "state": "ready", "weight": 95.0, "arms": ["stable"],
                 "labels": ["stable"], "digest": "sha256:0123456789abcdef", "engine": "tract",
                 "reason": "", "changed": {"at": "2026-11-25T10:11:12Z", "actor": "ci", "reason": null}},
                {"version": "2", "state": "failed", "weight": 0.0, "arms": [], "labels": [],
                 "digest": null, "engine": null, "reason": "samples differ", "changed": null},
            ],
        })];
        assert_eq!(
            table(&models),
            "model  version  state   weight  arms    labels  digest        engine  changed\n\
             iris   1        ready   95 %    stable  stable  0123456789ab  tract   2026-11-25 10:11:12 by ci\n\
             iris   2        failed  0 %\n\
             iris 2: samples differ\niris: rollout r-1 is under way\n"
        );
    }
}
