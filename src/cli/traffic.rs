//! `tidegate traffic`: what decides which version a request gets.

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::{Map, Value, json};

use super::admin::table::{Table, cell, change, number, plain};
use super::admin::{Answer, Client, Connection, Stop, Why, examples, finish, read_json, shown};
use crate::domain::{Label, ModelName, Version, VersionRef};

#[derive(clap::Args)]
#[command(arg_required_else_help = true)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    /// Show what is in force, and what a rollback goes back to
    #[command(after_help = examples!("traffic get iris", "traffic get iris --json"))]
    Get(Get),
    /// Put a traffic table in force, whole
    #[command(after_help = examples!(
        "traffic set iris 1=95 2=5 --reason 'canary of version 2'",
        "traffic set iris 1=95 2=5 --sticky-header x-user-id --shadow 3=10",
        "traffic set iris 1=100 --rule beta:x-beta==1:2 --rule staff:x-mail^=staff-:canary",
        "traffic set iris 1=90 2=10 --keep",
        "traffic set iris --file table.json",
    ))]
    Set(Box<Set>),
    /// Take the table away: the label 'stable' decides again, or else the latest version
    #[command(after_help = examples!("traffic clear iris"))]
    Clear(Clear),
    /// Go back to the last good table at once
    #[command(after_help = examples!("traffic rollback iris --reason 'errors in version 2'"))]
    Rollback(Clear),
    /// Show how shadows answered, beside what was answered for real
    #[command(after_help = examples!("traffic shadow iris"))]
    Shadow(Get),
}

#[derive(clap::Args)]
struct Get {
    /// Name of the model
    model: ModelName,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct Clear {
    /// Name of the model
    model: ModelName,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

#[derive(clap::Args)]
struct Set {
    /// Name of the model
    model: ModelName,
    /// Weights; each version gets its part of their sum
    #[arg(value_name = "VERSION=WEIGHT", value_parser = weight, required_unless_present = "file")]
    weights: Vec<(Version, f64)>,
    /// Requests with the same value of this header get the same version
    #[arg(long, value_name = "NAME", conflicts_with = "sticky_parameter")]
    sticky_header: Option<String>,
    /// Requests with the same value of this parameter get the same version
    #[arg(long, value_name = "NAME")]
    sticky_parameter: Option<String>,
    /// Requests with this header get this version, before any weight; may be given several times.
    /// '==' for the whole value, '^=' for its beginning
    #[arg(long, value_name = "NAME:HEADER==VALUE:VERSION", value_parser = rule)]
    rule: Vec<Value>,
    /// Run this version on copies of so many percent of the requests; may be given several times
    #[arg(long, value_name = "VERSION=PERCENT", value_parser = weight)]
    shadow: Vec<(Version, f64)>,
    /// Keep the sticky key, rules and shadows that are in force, where none are given
    #[arg(long)]
    keep: bool,
    /// The whole table as JSON (- for standard input)
    #[arg(long, value_name = "FILE", conflicts_with_all = ["weights", "sticky_header",
        "sticky_parameter", "rule", "shadow", "keep"])]
    file: Option<PathBuf>,
    #[command(flatten)]
    why: Why,
    #[command(flatten)]
    connection: Connection,
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(match &args.command {
        Command::Get(args) => get(args),
        Command::Set(args) => set(args),
        Command::Clear(args) => clear(args),
        Command::Rollback(args) => rollback(args),
        Command::Shadow(args) => shadow(args),
    })
}

/// `2=5`
fn weight(text: &str) -> Result<(Version, f64), String> {
    let wrong = || format!("expected VERSION=NUMBER like 2=5, got '{text}'");
    let (version, weight) = text.split_once('=').ok_or_else(wrong)?;
    let weight: f64 = weight.parse().map_err(|_| wrong())?;
    if !weight.is_finite() || weight < 0.0 {
        return Err(format!("expected a number of at least 0, got '{text}'"));
    }
    Ok((version.parse().map_err(|_| wrong())?, weight))
}

/// `beta:x-beta==1:2`, `staff:x-mail^=staff-:canary`
fn rule(text: &str) -> Result<Value, String> {
    let wrong = || {
        format!("expected NAME:HEADER==VALUE:VERSION or NAME:HEADER^=START:VERSION, got '{text}'")
    };
    let (name, rest) = text.split_once(':').ok_or_else(wrong)?;
    let (test, version) = rest.rsplit_once(':').ok_or_else(wrong)?;
    let exact = test.find("==").unwrap_or(usize::MAX);
    let start = test.find("^=").unwrap_or(usize::MAX);
    let (at, key) = if exact < start { (exact, "equals") } else { (start, "prefix") };
    let (header, value) = (test.get(..at), test.get(at.saturating_add(2)..));
    let (Some(header), Some(value)) = (header, value) else { return Err(wrong()) };
    name.parse::<Label>().map_err(|error| format!("rule '{name}': {error}"))?;
    let version = match VersionRef::parse(version) {
        Ok(Some(version)) if !header.is_empty() => version.to_string(),
        _ => return Err(wrong()),
    };
    let mut rule = json!({"name": name, "header": header, "version": version});
    rule[key] = json!(value);
    Ok(rule)
}

fn path(model: &ModelName) -> String {
    format!("/models/{model}/traffic")
}

fn get(args: &Get) -> Result<String, Stop> {
    let answer = Client::open(&args.connection)?.get(&path(&args.model))?;
    Ok(view(&args.connection, &answer))
}

fn set(args: &Set) -> Result<String, Stop> {
    let client = Client::open(&args.connection)?;
    let path = path(&args.model);
    let (table, why) = match &args.file {
        Some(file) => (read_json(file)?, args.why.bound_to(None)),
        None if args.keep => {
            let now = client.get(&path)?;
            (args.table(&now.body["traffic"])?, args.why.bound_to(now.etag.as_ref()))
        }
        None => (args.table(&Value::Null)?, args.why.bound_to(None)),
    };
    let answer = client.put(&path, table, &why)?;
    Ok(view(&args.connection, &answer))
}

impl Set {
    /// The table that the flags say; what they leave out is as it is in `kept`.
    fn table(&self, kept: &Value) -> Result<Value, Stop> {
        let mut weights = Map::new();
        for (version, weight) in &self.weights {
            if weights.insert(version.to_string(), json!(weight)).is_some() {
                return Err(Stop::usage(format_args!("version {version} has two weights")));
            }
        }
        let shadows = self.shadow.iter();
        let shadows = shadows
            .map(|(version, percent)| json!({"version": version.to_string(), "percent": percent}));
        let shadows: Vec<Value> = shadows.collect();
        let sticky = match (&self.sticky_header, &self.sticky_parameter) {
            (Some(header), _) => json!({"header": header}),
            (None, Some(parameter)) => json!({"parameter": parameter}),
            (None, None) => kept["sticky"].clone(),
        };
        let or_kept = |given: Vec<Value>, name: &str| match (given.is_empty(), &kept[name]) {
            (true, kept) if kept.is_array() => kept.clone(),
            _ => json!(given),
        };
        let mut table = json!({
            "weights": weights,
            "rules": or_kept(self.rule.clone(), "rules"),
            "shadows": or_kept(shadows, "shadows"),
        });
        if !sticky.is_null() {
            table["sticky"] = sticky;
        }
        Ok(table)
    }
}

fn clear(args: &Clear) -> Result<String, Stop> {
    let answer = Client::open(&args.connection)?.delete(&path(&args.model), &args.why)?;
    Ok(view(&args.connection, &answer))
}

fn rollback(args: &Clear) -> Result<String, Stop> {
    let client = Client::open(&args.connection)?;
    let answer = client.post(&format!("/models/{}:rollback", args.model), json!({}), &args.why)?;
    Ok(view(&args.connection, &answer))
}

fn shadow(args: &Get) -> Result<String, Stop> {
    let answer = Client::open(&args.connection)?.get(&format!("/models/{}/shadow", args.model))?;
    Ok(shown(&args.connection, &answer, shadows))
}

fn shadows(body: &Value) -> String {
    let mut table = Table::new([
        "shadow",
        "of",
        "beside",
        "output",
        "compared",
        "agreed",
        "largest difference",
    ]);
    let mut notes = String::new();
    for shadow in body["shadows"].as_array().into_iter().flatten() {
        let version = cell(&shadow["version"]);
        let share = number(&shadow["percent"]);
        let share = if share.is_empty() { "none now".to_owned() } else { format!("{share} %") };
        for pair in shadow["pairs"].as_array().into_iter().flatten() {
            for output in pair["outputs"].as_array().into_iter().flatten() {
                let agreed = json!(output["agreement"].as_f64().unwrap_or(0.0) * 100.0);
                table.row([
                    version.clone(),
                    share.clone(),
                    cell(&pair["primary"]),
                    cell(&output["name"]),
                    cell(&output["compared"]),
                    format!("{} %", number(&agreed)),
                    cell(&output["max_abs"]["max"]),
                ]);
            }
        }
        let outcomes = shadow["outcomes"].as_object().into_iter().flatten();
        let outcomes = outcomes.filter(|(_, count)| count.as_u64().is_some_and(|count| count > 0));
        let outcomes =
            outcomes.map(|(outcome, count)| format!("{} {}", cell(count), plain(outcome)));
        let outcomes = outcomes.collect::<Vec<_>>().join(", ");
        let outcomes = if outcomes.is_empty() { "no copies yet".to_owned() } else { outcomes };
        notes += &format!("version {version}, {share} of the requests: {outcomes}\n");
    }
    match notes.is_empty() {
        true => "no shadows\n".to_owned(),
        false => table.text() + &notes,
    }
}

fn view(connection: &Connection, answer: &Answer) -> String {
    shown(connection, answer, |body| {
        let mut out = format!("follows: {}\n", cell(&body["follow"]));
        if !body["version"].is_null() {
            out += &format!("version: {}\n", cell(&body["version"]));
        }
        if body["traffic"].is_object() {
            out += &table(&body["traffic"]);
        }
        if body["last_good"].is_object() {
            out += &format!("rollback goes to: {}\n", one_line(&body["last_good"]));
        }
        if body["changed"].is_object() {
            out += &format!("changed: {}\n", change(&body["changed"]));
        }
        if let Some(etag) = &answer.etag {
            out += &format!("etag: {}\n", plain(etag));
        }
        out
    })
}

fn table(traffic: &Value) -> String {
    let weights = traffic["weights"].as_object().cloned().unwrap_or_default();
    let sum: f64 = weights.values().filter_map(Value::as_f64).sum();
    let mut table = Table::new(["version", "weight", "share"]);
    let mut rows: Vec<_> = weights.into_iter().collect();
    rows.sort_by_key(|(version, _)| version.parse::<u64>().unwrap_or(u64::MAX));
    for (version, weight) in rows {
        let share = json!(weight.as_f64().unwrap_or(0.0) * 100.0 / sum);
        table.row([version, number(&weight), format!("{} %", number(&share))]);
    }
    let mut out = table.text();
    for kind in ["header", "parameter"] {
        if let Some(name) = traffic["sticky"][kind].as_str() {
            out += &format!("sticky: {kind} {}\n", plain(name));
        }
    }
    for rule in traffic["rules"].as_array().into_iter().flatten() {
        let (sign, value) = match &rule["equals"] {
            Value::Null => ("^=", &rule["prefix"]),
            equals => ("==", equals),
        };
        out += &format!(
            "rule {}: {} {sign} '{}' gets version {}\n",
            cell(&rule["name"]),
            cell(&rule["header"]),
            cell(value),
            cell(&rule["version"])
        );
    }
    for shadow in traffic["shadows"].as_array().into_iter().flatten() {
        let (version, percent) = (cell(&shadow["version"]), number(&shadow["percent"]));
        out += &format!("shadow: version {version} on {percent} % of the requests\n");
    }
    out
}

/// `1=95 2=5`, with what else there is as a count.
fn one_line(traffic: &Value) -> String {
    let weights = traffic["weights"].as_object().into_iter().flatten();
    let weights = weights.map(|(version, weight)| format!("{version}={}", number(weight)));
    let mut text = weights.collect::<Vec<_>>().join(" ");
    for (name, word) in [("rules", "rules"), ("shadows", "shadows")] {
        let count = traffic[name].as_array().map_or(0, Vec::len);
        if count > 0 {
            text += &format!(", {count} {word}");
        }
    }
    text
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

    fn set_of(words: &str) -> Result<Set, String> {
        let words = format!("tidegate set {words}");
        let parsed = Cli::try_parse_from(words.split(' ')).map_err(|error| error.to_string())?;
        match parsed.args.command {
            Command::Set(set) => Ok(*set),
            _ => Err("another command".to_owned()),
        }
    }

    #[test]
    fn a_table_is_what_the_flags_say() {
        let set = set_of(
            "iris 1=95 2=5 --sticky-header x-user-id --shadow 3=10 --rule beta:x-beta==1:2 \
             --rule time:x-at^=10:30:canary",
        );
        let table = set.unwrap().table(&Value::Null).unwrap();
        let want = json!({
            "weights": {"1": 95.0, "2": 5.0},
            "sticky": {"header": "x-user-id"},
            "rules": [
                {"name": "beta", "header": "x-beta", "equals": "1", "version": "2"},
                {"name": "time", "header": "x-at", "prefix": "10:30", "version": "canary"},
            ],
            "shadows": [{"version": "3", "percent": 10.0}],
        });
        assert_eq!(table, want);
    }

    #[test]
    fn what_is_kept_is_what_no_flag_says() {
        let kept = json!({
            "weights": {"1": 100}, "sticky": {"parameter": "user"}, "rules": [{"name": "beta"}],
            "shadows": [{"version": "3", "percent": 1}],
        });
        let table = set_of("iris 1=90 2=10 --keep --shadow 4=2").unwrap().table(&kept).unwrap();
        assert_eq!(table["weights"], json!({"1": 90.0, "2": 10.0}));
        assert_eq!((&table["sticky"], &table["rules"]), (&kept["sticky"], &kept["rules"]));
        assert_eq!(table["shadows"], json!([{"version": "4", "percent": 2.0}]));
    }

    #[test]
    fn what_is_no_table_is_wrong_usage() {
        for words in [
            "iris",
            "iris 1",
            "iris 1=x",
            "iris 1=-1",
            "iris 1=NaN",
            "iris 0=1",
            "iris stable=1",
            "iris 1=1 --file x",
            "iris 1=1 --rule beta",
            "iris 1=1 --rule beta:x-beta=1:2",
            "iris 1=1 --rule 7:x==1:2",
            "iris 1=1 --rule beta:==1:2",
            "iris 1=1 --rule beta:x==1:",
            "iris 1=1 --sticky-header a --sticky-parameter b",
            "a/b 1=1",
        ] {
            assert!(set_of(words).is_err(), "{words}");
        }
        assert!(set_of("iris 1=1 1=2").unwrap().table(&Value::Null).is_err());
    }

    #[test]
    fn shadows_are_shown_beside_what_they_shadow() {
        assert_eq!(shadows(&json!({"model": "iris", "shadows": []})), "no shadows\n");
        let body = json!({"shadows": [{
            "version": "3", "percent": 10.0, "outcomes": {"compared": 7, "failed": 0, "busy": 2},
            "pairs": [{"primary": "1", "outputs": [
                {"name": "y", "compared": 7, "agreement": 0.857, "max_abs": {"max": 0.5}},
            ]}],
        }]});
        assert_eq!(
            shadows(&body),
            "shadow  of    beside  output  compared  agreed  largest difference\n\
             3       10 %  1       y       7         85.7 %  0.5\n\
             version 3, 10 % of the requests: 2 busy, 7 compared\n"
        );
    }

    #[test]
    fn tables_are_shown_by_number() {
        let traffic = json!({
            "weights": {"10": 1, "2": 3}, "sticky": {"header": "x-user"},
            "rules": [{"name": "beta", "header": "x-beta", "equals": "1", "version": "2"}],
            "shadows": [{"version": "3", "percent": 12.5}],
        });
        assert_eq!(
            table(&traffic),
            "version  weight  share\n2        3       75 %\n10       1       25 %\nsticky: header x-user\n\
             rule beta: x-beta == '1' gets version 2\nshadow: version 3 on 12.5 % of the requests\n"
        );
        assert_eq!(one_line(&traffic), "10=1 2=3, 1 rules, 1 shadows");
    }
}
