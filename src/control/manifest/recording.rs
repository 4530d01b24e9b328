//! `[ledger]` of `tidegate.toml`: what is kept of a model's predictions.
//!
//! Names of tensors are held against the graph later, when it is known.

use toml::{Table, Value};

use super::Draft;
use super::toml_file::{Done, size, unknown};
use crate::domain::{
    Capture, Columns, Durability, OnUnrecorded, TENSOR_RULES_MAX, TensorRule, Treatment, sample_of,
};

/// Most that may be kept of one record; a frame of the log has a limit.
const RECORD_BYTES_MAX: usize = 24 << 20;
/// A hundred years.
const DAYS_MAX: u32 = 36_500;
/// Most columns that a rule may name.
const COLUMNS_MAX: usize = 65_536;

pub(super) fn apply(draft: &mut Draft<'_>, name: &str, value: &Value) -> Done {
    if name == "tensors" {
        let rules = rules(draft, value);
        draft.manifest.settings.ledger.tensors = rules;
        return Ok(());
    }
    let ledger = &mut draft.manifest.settings.ledger;
    match name {
        "durability" => {
            let parse = Durability::parse;
            ledger.durability = Some(word(value, Durability::NAMES, parse)?);
        }
        "on_error" => {
            ledger.on_error = Some(word(value, OnUnrecorded::NAMES, OnUnrecorded::parse)?);
        }
        "capture" => ledger.capture = Some(word(value, Capture::NAMES, Capture::parse)?),
        "sample_rate" => ledger.sample = Some(sample(value)?),
        "tensor_bytes_max" => ledger.tensor_bytes_max = Some(bytes(value)?),
        "retention_days" => ledger.retention_days = Some(days(value)?),
        "record_bytes_max" => ledger.record_bytes_max = Some(bytes(value)?),
        _ => return unknown(),
    }
    Ok(())
}

fn word<T>(value: &Value, names: &[&str], parse: fn(&str) -> Option<T>) -> Result<T, String> {
    let found = value.as_str().and_then(parse);
    found.ok_or_else(|| format!("expected one of '{}', got {value}", names.join("', '")))
}

fn sample(value: &Value) -> Result<u64, String> {
    #[expect(clippy::cast_precision_loss, reason = "0 and 1 are what it may be")]
    let number = value.as_float().or_else(|| value.as_integer().map(|number| number as f64));
    let ratio = number.filter(|ratio| (0.0..=1.0).contains(ratio));
    let ratio = ratio.ok_or_else(|| format!("expected a number from 0 to 1, got {value}"))?;
    Ok(sample_of(ratio))
}

fn bytes(value: &Value) -> Result<usize, String> {
    let bytes = size(value, 0)?;
    match bytes <= RECORD_BYTES_MAX {
        true => Ok(bytes),
        false => Err(format!("expected at most {RECORD_BYTES_MAX}, got {bytes}")),
    }
}

/// 0: for ever.
fn days(value: &Value) -> Result<u32, String> {
    let days = value.as_integer().and_then(|days| u32::try_from(days).ok());
    let days = days.filter(|days| *days <= DAYS_MAX);
    days.ok_or_else(|| format!("expected 0 (for ever) to {DAYS_MAX} days, got {value}"))
}

/// Those that are right; what is wrong with the others is a problem of the draft.
fn rules(draft: &mut Draft<'_>, value: &Value) -> Vec<TensorRule> {
    let path = "ledger.tensors";
    let Some(entries) = value.as_array().filter(|all| all.iter().all(Value::is_table)) else {
        draft.problem(path, "expected sections [[ledger.tensors]]");
        return Vec::new();
    };
    if entries.len() > TENSOR_RULES_MAX {
        let count = entries.len();
        draft.problem(path, format!("expected at most {TENSOR_RULES_MAX} sections, got {count}"));
        return Vec::new();
    }
    let mut rules = Vec::with_capacity(entries.len());
    for (at, entry) in entries.iter().filter_map(Value::as_table).enumerate() {
        match rule(entry) {
            Ok(rule) => rules.push(rule),
            Err((key, message)) => draft.problem(&format!("{path}[{at}].{key}"), message),
        }
    }
    rules
}

/// The key that is wrong, and how.
type Wrong = (String, String);

fn rule(entry: &Table) -> Result<TensorRule, Wrong> {
    const KNOWN: [&str; 5] = ["name", "action", "truncate_bytes", "fields_keep", "fields_mask"];
    let wrong = |key: &str, message: String| (key.to_owned(), message);
    if let Some(key) = entry.keys().find(|key| !KNOWN.contains(&key.as_str())) {
        return Err(wrong(key, "unknown key".to_owned()));
    }
    let name = entry.get("name").and_then(Value::as_str).filter(|name| !name.is_empty());
    let name = name.ok_or_else(|| wrong("name", "expected a tensor's name".to_owned()))?;
    let columns = columns(entry)?;
    let action = match entry.get("action") {
        // Who masks columns wants the others.
        None if columns.is_some() => "keep",
        None => {
            let message = "expected what is done: keep, drop, digest, hash, truncate or encrypt";
            return Err(wrong("action", message.to_owned()));
        }
        Some(action) => action.as_str().unwrap_or_default(),
    };
    let truncate = entry.get("truncate_bytes").map(|value| size(value, 1)).transpose();
    let truncate = truncate.map_err(|message| wrong("truncate_bytes", message))?;
    if truncate.is_some() != (action == "truncate") {
        let message = "is expected with action = 'truncate', and only then";
        return Err(wrong("truncate_bytes", message.to_owned()));
    }
    let treatment = match (action, truncate) {
        ("keep", _) => Treatment::Keep,
        ("drop", _) => Treatment::Drop,
        ("digest", _) => Treatment::Digest,
        ("hash", _) => Treatment::Hash,
        ("encrypt", _) => Treatment::Encrypt,
        ("truncate", Some(bytes)) => Treatment::Truncate(bytes),
        _ => {
            let message = "expected keep, drop, digest, hash, truncate or encrypt";
            return Err(wrong("action", format!("{message}, got '{action}'")));
        }
    };
    Ok(TensorRule { name: name.to_owned(), treatment, columns })
}

fn columns(entry: &Table) -> Result<Option<Columns>, Wrong> {
    let list = |key: &str| {
        let Some(value) = entry.get(key) else { return Ok(None) };
        let expected = || {
            let message = format!("expected 1 to {COLUMNS_MAX} numbers of columns, got {value}");
            (key.to_owned(), message)
        };
        let numbers = value.as_array().filter(|all| (1..=COLUMNS_MAX).contains(&all.len()));
        let numbers = numbers.ok_or_else(expected)?.iter().map(|number| size(number, 0));
        numbers.collect::<Result<Vec<usize>, _>>().map(Some).map_err(|_| expected())
    };
    match (list("fields_keep")?, list("fields_mask")?) {
        (None, None) => Ok(None),
        (Some(keep), None) => Ok(Some(Columns::Keep(keep))),
        (None, Some(mask)) => Ok(Some(Columns::Mask(mask))),
        (Some(_), Some(_)) => {
            Err(("fields_mask".to_owned(), "is expected without fields_keep".to_owned()))
        }
    }
}
