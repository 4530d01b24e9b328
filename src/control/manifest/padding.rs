//! `[batch.padding]` of `tidegate.toml`: which inputs and outputs have a length that varies.
//!
//! Names and axes are held against the graph later, when it is known.

use toml::{Table, Value};

use super::Draft;
use super::toml_file::size;
use crate::domain::{
    PAD_BUCKETS_MAX, PAD_LENGTH_MAX, PadValue, PaddedInput, PaddedOutput, PaddingSettings,
};

const PATH: &str = "batch.padding";

pub(super) fn apply(draft: &mut Draft<'_>, value: &Value) {
    let Some(table) = value.as_table() else {
        return draft.problem(PATH, "expected a section");
    };
    let mut settings = PaddingSettings::default();
    for (name, value) in table {
        let path = format!("{PATH}.{name}");
        let done = match name.as_str() {
            "buckets" => buckets(value).map(|buckets| settings.buckets = buckets),
            "mask" => text(value).map(|mask| settings.mask = Some(mask)),
            "input" => {
                settings.inputs = entries(draft, &path, value, input);
                Ok(())
            }
            "output" => {
                settings.outputs = entries(draft, &path, value, output);
                Ok(())
            }
            _ => Err("unknown key".to_owned()),
        };
        if let Err(message) = done {
            draft.problem(&path, message);
        }
    }
    check(draft, &settings, table.contains_key("input"));
    draft.manifest.settings.batch.padding = Some(settings);
}

/// What only the whole section can tell. With entries that were refused, fewer are there.
fn check(draft: &mut Draft<'_>, settings: &PaddingSettings, inputs_said: bool) {
    if settings.inputs.is_empty() && !inputs_said {
        draft.problem(&format!("{PATH}.input"), "expected at least one input that is padded");
    }
    let inputs = settings.inputs.iter().map(|input| &input.name);
    let outputs = settings.outputs.iter().map(|output| &output.name);
    for (list, names) in
        [("input", inputs.collect::<Vec<_>>()), ("output", outputs.collect::<Vec<_>>())]
    {
        for (at, name) in names.iter().enumerate() {
            if names[..at].contains(name) {
                draft.problem(&format!("{PATH}.{list}"), format!("'{name}' is there twice"));
            }
        }
    }
    let Some(mask) = &settings.mask else { return };
    let path = format!("{PATH}.mask");
    match settings.inputs.iter().find(|input| input.name == *mask) {
        None => {
            let message = format!("expected the name of one in {PATH}.input, got '{mask}'");
            draft.problem(&path, message);
        }
        Some(PaddedInput {
            value: PadValue::Zero | PadValue::Int(0) | PadValue::Bool(false),
            ..
        }) => {}
        Some(_) => draft.problem(&path, format!("expected '{mask}' to be padded with 0")),
    }
}

fn buckets(value: &Value) -> Result<Vec<usize>, String> {
    let expected = || {
        format!(
            "expected 1 to {PAD_BUCKETS_MAX} ascending lengths of 1 to {PAD_LENGTH_MAX}, got {value}"
        )
    };
    let lengths = value.as_array().ok_or_else(expected)?;
    let lengths: Vec<usize> = lengths
        .iter()
        .map(|value| size(value, 1).map_err(|_| expected()))
        .collect::<Result<_, _>>()?;
    let fit = !lengths.is_empty()
        && lengths.len() <= PAD_BUCKETS_MAX
        && lengths.is_sorted_by(|a, b| a < b)
        && lengths.iter().all(|length| *length <= PAD_LENGTH_MAX);
    if fit { Ok(lengths) } else { Err(expected()) }
}

/// The entries of a list of tables that are right.
fn entries<T>(
    draft: &mut Draft<'_>,
    path: &str,
    value: &Value,
    read: fn(&Table) -> Result<T, String>,
) -> Vec<T> {
    let Some(list) = value.as_array().filter(|list| !list.is_empty()) else {
        draft.problem(path, format!("expected a list of tables, got {value}"));
        return Vec::new();
    };
    let mut entries = Vec::with_capacity(list.len());
    for (at, item) in list.iter().enumerate() {
        let table = item.as_table().ok_or_else(|| format!("expected a table, got {item}"));
        match table.and_then(read) {
            Ok(entry) => entries.push(entry),
            Err(message) => draft.problem(&format!("{path}[{at}]"), message),
        }
    }
    entries
}

fn input(table: &Table) -> Result<PaddedInput, String> {
    known(table, &["name", "axis", "value"])?;
    let value = match table.get("value") {
        None => PadValue::Zero,
        Some(Value::Boolean(bit)) => PadValue::Bool(*bit),
        Some(Value::Integer(number)) => PadValue::Int(*number),
        Some(Value::Float(number)) => PadValue::Float(number.to_bits()),
        Some(Value::String(text)) => PadValue::Text(text.clone()),
        Some(other) => return Err(format!("value: expected one element, got {other}")),
    };
    Ok(PaddedInput { name: name(table)?, axis: axis(table)?, value })
}

fn output(table: &Table) -> Result<PaddedOutput, String> {
    known(table, &["name", "axis"])?;
    Ok(PaddedOutput { name: name(table)?, axis: axis(table)? })
}

fn known(table: &Table, keys: &[&str]) -> Result<(), String> {
    match table.keys().find(|key| !keys.contains(&key.as_str())) {
        Some(key) => Err(format!("unknown key '{key}', expected {}", keys.join(", "))),
        None => Ok(()),
    }
}

fn name(table: &Table) -> Result<String, String> {
    let value = table.get("name").ok_or_else(|| "expected a name".to_owned())?;
    text(value).map_err(|message| format!("name: {message}"))
}

/// The batch is axis 0 and is not padded.
fn axis(table: &Table) -> Result<usize, String> {
    let value = table.get("axis").ok_or_else(|| "expected an axis".to_owned())?;
    size(value, 1).map_err(|message| format!("axis: {message}"))
}

fn text(value: &Value) -> Result<String, String> {
    let text = value.as_str().filter(|text| !text.is_empty());
    text.map(str::to_owned).ok_or_else(|| format!("expected a text, got {value}"))
}
