//! `tidegate audit show`: one prediction, all that is recorded of it.

use std::fmt::Write as _;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use serde_json::Value;
use uuid::Uuid;

use crate::cli::admin::table::{cell, plain};
use crate::cli::admin::{Client, Connection, Stop, examples, finish};
use crate::cli::replay::{Again, reproduce, state_dirs};
use crate::ledger::export::{ExportError, Selection, line as line_of, log_folder, scan};

/// Values of a tensor that are printed; the rest is counted.
const VALUES_SHOWN_MAX: usize = 16;

#[derive(clap::Args)]
#[command(after_help = examples!(
    "audit show 019ab7a2-6c1f-7d3e-9b5a-0c2d4e6f8a1b",
    "audit show 019ab7a2-6c1f-7d3e-9b5a-0c2d4e6f8a1b --log tidegate-state --json",
    "audit show 019ab7a2-6c1f-7d3e-9b5a-0c2d4e6f8a1b --log tidegate-state --reproduce",
    "audit show 019ab7a2-6c1f-7d3e-9b5a-0c2d4e6f8a1b --log /backup/ledger --reproduce --offline --model-repository models",
))]
pub(super) struct Args {
    /// Id of the prediction: the answer's header 'tidegate-prediction-id'
    #[arg(value_name = "ID")]
    id: Uuid,
    /// Read this folder (of the state, the ledger or one log) instead of asking the gateway
    #[arg(long, value_name = "DIR")]
    log: Option<PathBuf>,
    #[command(flatten)]
    again: Again,
    #[command(flatten)]
    connection: Connection,
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(show(args))
}

fn show(args: &Args) -> Result<String, Stop> {
    let record = match &args.log {
        Some(dir) => read(dir, args.id)?,
        None => {
            let client = Client::open(&args.connection)?;
            client.get_text(&format!("/predictions/{}", args.id))?
        }
    };
    if args.again.is_wanted() {
        let mut states: Vec<PathBuf> = args.log.iter().flat_map(|log| state_dirs(log)).collect();
        if states.is_empty() {
            states.push(args.connection.state_dir());
        }
        return reproduce(&args.again, &record, states, args.connection.json);
    }
    let record: Value = serde_json::from_str(&record)
        .map_err(|error| Stop::failed(format_args!("the answer is not JSON: {error}")))?;
    Ok(match args.connection.json {
        true => format!("{record:#}\n"),
        false => text(&record),
    })
}

/// The record as a line of JSON. Looks where the id's time says that it is; then, since clocks are set, everywhere.
pub(super) fn read(dir: &Path, id: Uuid) -> Result<String, Stop> {
    let log = log_folder(dir).map_err(Stop::usage)?;
    let near = Selection::of(id);
    let everywhere = Selection { prediction_id: Some(id), ..Selection::default() };
    for wanted in [near, everywhere] {
        let mut found = None;
        scan::<ExportError>(&log, &wanted, |head, view| {
            // Others, of erasures, are about it.
            if view.kind == crate::ledger::record::Kind::Prediction as u64 {
                let mut text = Vec::new();
                line_of(&mut text, &head.writer.to_string(), view);
                found = Some(String::from_utf8_lossy(&text).into_owned());
                return Ok(ControlFlow::Break(()));
            }
            Ok(ControlFlow::Continue(()))
        })
        .map_err(Stop::failed)?;
        if let Some(found) = found {
            return Ok(found);
        }
    }
    Err(Stop::failed(format_args!("no prediction {id} in {}", log.display())))
}

fn text(record: &Value) -> String {
    let mut out = String::new();
    for (name, value) in record.as_object().into_iter().flatten() {
        if matches!(name.as_str(), "inputs" | "outputs") {
            out += &tensors(name.trim_end_matches('s'), value);
        } else if !value.is_null() {
            line(&mut out, name, &cell(value));
        }
    }
    if record["erased"] == true {
        out += "its inputs, outputs and the caller's own id were erased\n";
    }
    out
}

fn line(out: &mut String, name: &str, value: &str) {
    // Into a text: there is nothing that fails.
    writeln!(out, "{name}: {value}").ok();
}

fn tensors(which: &str, list: &Value) -> String {
    let mut out = String::new();
    for tensor in list.as_array().into_iter().flatten() {
        let about = format!(
            "{which} {} {} {}",
            cell(&tensor["name"]),
            cell(&tensor["datatype"]),
            plain(&tensor["shape"].to_string())
        );
        let rest = tensor.as_object().into_iter().flatten();
        let rest = rest.filter(|(name, _)| !matches!(&***name, "name" | "datatype" | "shape"));
        for (name, value) in rest {
            match value.as_array() {
                Some(values) => line(&mut out, &about, &some(values)),
                None => line(&mut out, &about, &format!("{name} {}", cell(value))),
            }
        }
    }
    out
}

fn some(values: &[Value]) -> String {
    let shown: Vec<String> = values.iter().take(VALUES_SHOWN_MAX).map(cell).collect();
    match values.len().saturating_sub(VALUES_SHOWN_MAX) {
        0 => shown.join(", "),
        more => format!("{}, … ({more} more)", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_record_is_shown_without_what_it_has_not() {
        let record = json!({
            "seq": 4, "model": "iris\u{1b}[2J", "arm": null,
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 20], "data": vec![0.5; 20]}],
            "outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "digest": "sha256:00"}],
        });
        let text = text(&record);
        assert!(text.contains("seq: 4\n") && !text.contains("arm"), "{text}");
        assert!(text.contains("model: iris\u{fffd}[2J\n"), "{text}");
        assert!(
            text.contains("input x FP32 [1,20]: 0.5, 0.5") && text.contains("(4 more)"),
            "{text}"
        );
        assert!(text.contains("output y FP32 [1]: digest sha256:00\n"), "{text}");
    }
}
