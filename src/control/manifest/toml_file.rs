//! `tidegate.toml`, our own keys of one model.

use std::time::Duration;

use toml::Value;

use super::{Draft, padding, recording};
use crate::domain::{
    BatchSettings, EngineChoice, FeedbackTask, Provider, VersionPolicy, WARMUP_RECORDS_MAX,
};

/// Every key but those of `[labels]`, which are output names.
#[cfg(test)]
pub(super) const KEYS: &[(&str, &str)] = &[
    ("engine.engine", "'tract'"),
    ("engine.execution_providers", "['cuda', 'cpu']"),
    ("engine.device_id", "1"),
    ("engine.memory_max_mb", "1024"),
    ("engine.instances", "2"),
    ("engine.intra_threads", "2"),
    ("model.file", "'m.onnx'"),
    ("batch.enabled", "true"),
    ("batch.size_max", "16"),
    ("batch.rows_max", "32"),
    ("batch.preferred", "[4, 8]"),
    ("batch.elements_max", "4096"),
    ("batch.wait_max_us", "500"),
    ("batch.queue_max", "10"),
    ("batch.queue_bytes_max", "65536"),
    ("batch.queue_wait_max_us", "1000"),
    ("batch.allow_timeout_override", "false"),
    ("batch.preserve_ordering", "true"),
    ("batch.priority_levels", "2"),
    ("batch.priority_default", "1"),
    ("batch.priority_age_ms", "20"),
    ("batch.padding.buckets", "[16, 32]"),
    ("batch.padding.input", "[{ name = 'x', axis = 1, value = 0 }]"),
    ("batch.padding.output", "[{ name = 'y', axis = 1 }]"),
    ("batch.padding.mask", "'x'"),
    ("limits.timeout_max_ms", "500"),
    ("limits.output_bytes_max", "1048576"),
    ("cache.enabled", "true"),
    ("warmup.runs", "3"),
    ("warmup.records", "4"),
    ("versions.latest", "2"),
    ("versions.all", "true"),
    ("versions.signature_change", "true"),
    ("versions.specific", "[1, 3]"),
    ("ledger.durability", "'sync'"),
    ("ledger.on_error", "'serve'"),
    ("ledger.capture", "'digest'"),
    ("ledger.sample_rate", "0.5"),
    ("ledger.tensor_bytes_max", "1024"),
    ("ledger.record_bytes_max", "4096"),
    ("ledger.retention_days", "365"),
    ("ledger.tensors", "[{ name = 'x', action = 'hash' }]"),
    ("feedback.task", "'classification'"),
    ("feedback.output", "'y'"),
    ("feedback.threshold", "0.4"),
];

/// What `[engine]` says about providers, until all of it is read.
#[derive(Default)]
struct Devices {
    names: Option<Vec<String>>,
    device_id: Option<i32>,
    memory_max_bytes: Option<usize>,
}

pub(super) fn apply(draft: &mut Draft<'_>, text: &str) {
    let table: toml::Table = match text.parse() {
        Ok(table) => table,
        Err(error) => {
            let error = error.to_string();
            return draft.problems.push(format!(
                "{}: is not TOML: {}",
                draft.file,
                error.trim_end()
            ));
        }
    };
    let mut devices = Devices::default();
    let (mut rows_said, mut size_said) = (false, false);
    for (section, content) in &table {
        let Value::Table(content) = content else {
            draft.problem(section, "expected a section");
            continue;
        };
        for (name, value) in content {
            let path = format!("{section}.{name}");
            rows_said |= path == "batch.rows_max";
            size_said |= path == "batch.size_max";
            let done = match section.as_str() {
                "engine" => engine(draft, &mut devices, name, value),
                "batch" if name == "padding" => {
                    padding::apply(draft, value);
                    Ok(())
                }
                "batch" => batch(draft, name, value),
                "ledger" => recording::apply(draft, name, value),
                "feedback" => feedback(draft, name, value),
                "labels" => labels(draft, &path, name, value),
                _ => other(draft, &path, value),
            };
            if let Err(message) = done {
                draft.problem(&path, message);
            }
        }
    }
    finish_devices(draft, devices);
    finish_batch(draft, rows_said, size_said);
}

pub(super) type Done = Result<(), String>;

pub(super) fn unknown() -> Done {
    Err("unknown key".to_owned())
}

fn engine(draft: &mut Draft<'_>, devices: &mut Devices, name: &str, value: &Value) -> Done {
    let settings = &mut draft.manifest.settings;
    match name {
        "engine" => {
            settings.engine = match value.as_str() {
                Some("auto") => EngineChoice::Auto,
                Some("ort") => EngineChoice::Ort,
                Some("tract") => EngineChoice::Tract,
                _ => return Err(format!("expected 'auto', 'ort' or 'tract', got {value}")),
            }
        }
        "execution_providers" => {
            let names = texts(value).filter(|names| {
                !names.is_empty() && names.iter().all(|name| name == "cpu" || name == "cuda")
            });
            let expected = || format!("expected a list of 'cuda' and 'cpu', got {value}");
            devices.names = Some(names.ok_or_else(expected)?);
        }
        "device_id" => {
            let number = value.as_integer().and_then(|number| i32::try_from(number).ok());
            let number = number.filter(|number| *number >= 0);
            devices.device_id = Some(number.ok_or_else(|| whole(value, 0))?);
        }
        "memory_max_mb" => {
            devices.memory_max_bytes = Some(size(value, 1)?.saturating_mul(1 << 20));
        }
        "instances" => settings.instances = Some(size(value, 1)?),
        "intra_threads" => settings.intra_threads = Some(size(value, 1)?),
        _ => return unknown(),
    }
    Ok(())
}

fn batch(draft: &mut Draft<'_>, name: &str, value: &Value) -> Done {
    if name == "enabled" {
        draft.manifest.settings.batched = Some(switch(value)?);
        return Ok(());
    }
    let batch: &mut BatchSettings = &mut draft.manifest.settings.batch;
    match name {
        "size_max" => batch.size_max = size(value, 1)?,
        "rows_max" => batch.rows_max = size(value, 1)?,
        "preferred" => {
            let sizes = value.as_array().ok_or_else(|| whole(value, 1))?;
            batch.preferred = sizes.iter().map(|value| size(value, 1)).collect::<Result<_, _>>()?;
        }
        "wait_max_us" => batch.wait_max = Duration::from_micros(number(value, 0)?),
        "elements_max" => batch.elements_max = size(value, 1)?,
        "queue_max" => batch.queue_max = size(value, 1)?,
        "queue_bytes_max" => batch.queue_bytes_max = size(value, 1)?,
        "queue_wait_max_us" => {
            batch.queue_wait_max = Some(Duration::from_micros(number(value, 1)?));
        }
        "allow_timeout_override" => batch.allow_timeout_override = switch(value)?,
        "preserve_ordering" => batch.preserve_ordering = switch(value)?,
        "priority_levels" => batch.priority_levels = level(value)?,
        "priority_default" => batch.priority_default = level(value)?,
        "priority_age_ms" => batch.priority_age = Duration::from_millis(number(value, 0)?),
        _ => return unknown(),
    }
    Ok(())
}

fn feedback(draft: &mut Draft<'_>, name: &str, value: &Value) -> Done {
    let feedback = &mut draft.manifest.settings.feedback;
    match name {
        "task" => {
            feedback.task = Some(match value.as_str() {
                Some("classification") => FeedbackTask::Classification,
                Some("regression") => FeedbackTask::Regression,
                _ => {
                    return Err(format!("expected 'classification' or 'regression', got {value}"));
                }
            });
        }
        "output" => {
            let output = value.as_str().filter(|name| !name.is_empty());
            let expected = || format!("expected an output's name, got {value}");
            feedback.output = Some(output.ok_or_else(expected)?.to_owned());
        }
        "threshold" => {
            #[expect(clippy::cast_precision_loss, reason = "0 and 1 are what it may be")]
            let number = value.as_float().or_else(|| value.as_integer().map(|whole| whole as f64));
            let ratio = number.filter(|ratio| (0.0..=1.0).contains(ratio));
            let ratio =
                ratio.ok_or_else(|| format!("expected a number from 0 to 1, got {value}"))?;
            #[expect(clippy::cast_possible_truncation, reason = "at most a million")]
            #[expect(clippy::cast_sign_loss, reason = "not negative")]
            let ppm = (ratio * 1e6).round() as u32;
            feedback.threshold_ppm = Some(ppm);
        }
        _ => return unknown(),
    }
    Ok(())
}

fn labels(draft: &mut Draft<'_>, path: &str, output: &str, value: &Value) -> Done {
    if let Some(file) = value.as_str() {
        draft.read_labels(path, output, file);
        return Ok(());
    }
    let names = texts(value)
        .ok_or_else(|| format!("expected a file name or a list of texts, got {value}"))?;
    draft.set_labels(output, names);
    Ok(())
}

fn other(draft: &mut Draft<'_>, path: &str, value: &Value) -> Done {
    match path {
        "model.file" => {
            let name = value.as_str().ok_or_else(|| format!("expected a text, got {value}"))?;
            draft.set_model_file(path, name);
        }
        "limits.timeout_max_ms" => {
            draft.manifest.settings.timeout_max = Some(Duration::from_millis(number(value, 1)?));
        }
        "limits.output_bytes_max" => {
            draft.manifest.settings.output_bytes_max = Some(size(value, 1)?);
        }
        "cache.enabled" => draft.manifest.settings.cached = switch(value)?,
        "warmup.runs" => draft.manifest.settings.warmup.runs = size(value, 0)?,
        "warmup.records" => {
            let records = size(value, 0)?;
            if records > WARMUP_RECORDS_MAX {
                return Err(format!("expected at most {WARMUP_RECORDS_MAX}, got {records}"));
            }
            draft.manifest.settings.warmup.records = records;
        }
        "versions.latest" => {
            draft.manifest.settings.versions = Some(VersionPolicy::Latest(size(value, 1)?));
        }
        "versions.signature_change" => draft.manifest.settings.signature_change = switch(value)?,
        "versions.all" if switch(value)? => {
            draft.manifest.settings.versions = Some(VersionPolicy::All);
        }
        "versions.all" => return Err("expected true; leave it out otherwise".to_owned()),
        "versions.specific" => {
            let versions = value.as_array().filter(|versions| !versions.is_empty());
            let versions =
                versions.ok_or_else(|| format!("expected a list of versions, got {value}"))?;
            let numbers: Result<Vec<u64>, String> =
                versions.iter().map(|value| number(value, 1)).collect();
            draft.manifest.settings.versions = Some(VersionPolicy::Specific(numbers?));
        }
        _ => return unknown(),
    }
    Ok(())
}

/// Puts `device_id` and `memory_max_mb` into the CUDA provider, be it named here or in
/// `config.pbtxt`.
fn finish_devices(draft: &mut Draft<'_>, devices: Devices) {
    if let Some(names) = devices.names {
        let cuda = || Provider::Cuda { device_id: 0, memory_max_bytes: None };
        draft.manifest.settings.providers =
            names.iter().map(|name| if name == "cuda" { cuda() } else { Provider::Cpu }).collect();
    }
    if devices.device_id.is_none() && devices.memory_max_bytes.is_none() {
        return;
    }
    let mut found = false;
    for provider in &mut draft.manifest.settings.providers {
        if let Provider::Cuda { device_id, memory_max_bytes } = provider {
            found = true;
            *device_id = devices.device_id.unwrap_or(*device_id);
            *memory_max_bytes = devices.memory_max_bytes.or(*memory_max_bytes);
        }
    }
    if !found {
        draft.warn("engine", "device_id and memory_max_mb have no effect without 'cuda'");
    }
}

/// The key that was said moves the other; only when both were said can they contradict.
fn finish_batch(draft: &mut Draft<'_>, rows_said: bool, size_said: bool) {
    let batch = &mut draft.manifest.settings.batch;
    if batch.rows_max >= batch.size_max {
        return;
    }
    match (rows_said, size_said) {
        (true, true) => {
            let (rows, size) = (batch.rows_max, batch.size_max);
            let message = format!("expected at least batch.size_max, {size}, got {rows}");
            draft.problem("batch.rows_max", message);
        }
        (true, false) => batch.size_max = batch.rows_max,
        (false, _) => batch.rows_max = batch.size_max,
    }
}

fn whole(value: &Value, min: u64) -> String {
    format!("expected a whole number of at least {min}, got {value}")
}

fn number(value: &Value, min: u64) -> Result<u64, String> {
    let number = value.as_integer().and_then(|number| u64::try_from(number).ok());
    number.filter(|number| *number >= min).ok_or_else(|| whole(value, min))
}

pub(super) fn size(value: &Value, min: u64) -> Result<usize, String> {
    usize::try_from(number(value, min)?).map_err(|_| whole(value, min))
}

fn level(value: &Value) -> Result<u32, String> {
    u32::try_from(number(value, 0)?).map_err(|_| whole(value, 0))
}

fn switch(value: &Value) -> Result<bool, String> {
    value.as_bool().ok_or_else(|| format!("expected true or false, got {value}"))
}

fn texts(value: &Value) -> Option<Vec<String>> {
    value.as_array()?.iter().map(|item| item.as_str().map(str::to_owned)).collect()
}
