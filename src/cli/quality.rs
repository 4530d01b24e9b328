//! `tidegate quality`: how good a model's predictions were, by the labels that came for them.

use std::process::ExitCode;

use serde_json::Value;

use super::admin::table::{Table, cell};
use super::admin::{Client, Connection, Stop, examples, finish, shown};
use crate::domain::ModelName;

#[derive(clap::Args)]
#[command(after_help = examples!(
    "quality iris",
    "quality iris --days 7",
    "quality iris --json",
))]
pub(super) struct Args {
    /// Name of the model
    model: ModelName,
    /// Of the last so many days, today (UTC) included [default: all that are kept]
    #[arg(long, value_name = "DAYS", value_parser = clap::value_parser!(u32).range(1..=3650))]
    days: Option<u32>,
    #[command(flatten)]
    connection: Connection,
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(quality(args))
}

fn quality(args: &Args) -> Result<String, Stop> {
    let days = args.days.map(|days| format!("?days={days}")).unwrap_or_default();
    let path = format!("/models/{}/quality{days}", args.model);
    let answer = Client::open(&args.connection)?.get(&path)?;
    Ok(shown(&args.connection, &answer, text))
}

fn text(body: &Value) -> String {
    let mut table = Table::new(["version", "arm", "predictions", "labelled", "figure", "value"]);
    let mut rows = 0;
    for version in body["versions"].as_array().into_iter().flatten() {
        for (arm, figures) in version["arms"].as_object().into_iter().flatten() {
            let counts = [cell(&figures["predictions"]), cell(&figures["labelled"])];
            let mut head = [cell(&version["version"]), arm.clone()].into_iter().chain(counts);
            for (name, value) in self::figures(figures) {
                // Once for all figures of an arm.
                let mut next = || head.next().unwrap_or_default();
                table.row([next(), next(), next(), next(), name, value]);
                rows += 1;
            }
        }
    }
    let (from, to) = (cell(&body["from"]), cell(&body["to"]));
    match rows {
        0 => format!("no predictions from {from} to {to}\n"),
        _ => format!("{}predictions from {from} to {to}; 95 % bounds\n", table.text()),
    }
}

/// What there is, by name.
fn figures(of: &Value) -> Vec<(String, String)> {
    let mut all = Vec::new();
    let mut put = |name: &str, value: &Value| match value {
        Value::Null => {}
        Value::Object(_) => all.push((name.to_owned(), estimate(value))),
        value => all.push((name.to_owned(), short(value))),
    };
    put("coverage", &of["coverage"]);
    for name in ["accuracy", "precision", "recall", "f1", "log_loss", "brier"] {
        put(name, &of["classification"][name]);
    }
    put("ece", &of["classification"]["calibration"]["ece"]);
    for name in ["mae", "rmse", "bias"] {
        put(name, &of["regression"][name]);
    }
    for (name, metric) in of["metrics"].as_object().into_iter().flatten() {
        put(name, &metric["mean"]);
    }
    put("estimated_accuracy", &of["estimated_accuracy"]["value"]);
    if of["delay"].is_object() {
        let seconds = |name: &str| cell(&of["delay"][name]);
        let text =
            format!("half within {} s, 99 % within {} s", seconds("p50_s"), seconds("p99_s"));
        all.push(("delay".to_owned(), text));
    }
    all
}

/// `0.953 (0.921 to 0.974)`
fn estimate(value: &Value) -> String {
    let own = short(&value["value"]);
    match value["low"].is_null() {
        true => own,
        false => format!("{own} ({} to {})", short(&value["low"]), short(&value["high"])),
    }
}

/// With four places, as many as are looked at.
fn short(value: &Value) -> String {
    let Some(value) = value.as_f64() else { return cell(value) };
    let text = format!("{value:.4}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_arm_is_told_once_and_what_is_not_there_not_at_all() {
        let body = json!({
            "model": "iris", "from": "2026-10-28", "to": "2026-11-26",
            "versions": [{"version": "2", "arms": {"stable": {
                "predictions": 20, "labelled": 10,
                "coverage": {"value": 0.5, "low": 0.299_34, "high": 0.700_66},
                "classification": {"accuracy": {"value": 0.9}, "calibration": {"ece": 0.012_349}},
                "metrics": {"revenue": {"count": 3, "mean": {"value": 2.5}}},
                "delay": {"p50_s": 64, "p90_s": 64, "p99_s": 128},
            }}}],
        });
        let text = text(&body);
        let lines: Vec<Vec<&str>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(
            lines[1],
            ["2", "stable", "20", "10", "coverage", "0.5", "(0.2993", "to", "0.7007)"]
        );
        assert_eq!(lines[2], ["accuracy", "0.9"]);
        assert_eq!(lines[3], ["ece", "0.0123"]);
        assert_eq!(lines[4], ["revenue", "2.5"]);
        assert_eq!(lines.len(), 7);
        assert!(!text.contains("mae"), "{text}");
        let none = super::text(&json!({"from": "a", "to": "b", "versions": []}));
        assert_eq!(none, "no predictions from a to b\n");
    }
}
