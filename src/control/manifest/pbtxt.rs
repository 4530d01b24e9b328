//! Triton's model configuration, as text format or JSON, into settings.

use std::time::Duration;

use prost_reflect::text_format::ParseError;
use prost_reflect::{DynamicMessage, Value};

use super::{Declared, DeclaredTensor, Draft};
use crate::domain::{DataType, EngineChoice, Provider, VersionPolicy};
use crate::proto::{self, inference as pb};

/// Most warm-up runs that a configuration may ask for.
const WARMUP_RUNS_MAX: u32 = 100;

/// Fields with an effect here, or whose meaning is checked. A message stands for all below it.
const SUPPORTED: &[&str] = &[
    "name",
    "platform",
    "backend",
    "max_batch_size",
    "version_policy",
    "input.name",
    "input.data_type",
    "input.dims",
    // Named in a warning of its own.
    "input.allow_ragged_batch",
    "output.name",
    "output.data_type",
    "output.dims",
    "output.label_filename",
    "instance_group.name",
    "instance_group.count",
    "instance_group.kind",
    "instance_group.gpus",
    "dynamic_batching.preferred_batch_size",
    "dynamic_batching.max_queue_delay_microseconds",
    "dynamic_batching.preserve_ordering",
    "dynamic_batching.priority_levels",
    "dynamic_batching.default_priority_level",
    "dynamic_batching.default_queue_policy",
    // Refused with a reason of their own.
    "batch_input",
    "batch_output",
    "sequence_batching",
    "ensemble_scheduling",
    "default_model_filename",
    "response_cache.enable",
    "parameters",
    "model_warmup",
];

pub(super) fn apply_text(draft: &mut Draft<'_>, text: &str) {
    let descriptor = proto::message("inference.ModelConfig");
    let text = with_colons(text);
    match DynamicMessage::parse_text_format(descriptor, &text) {
        Ok(message) => apply(draft, &message, says_batch_size(&text)),
        Err(error) => {
            let line = line_of(&error, &text);
            draft.problem(&format!("line {line}"), error);
        }
    }
}

pub(super) fn apply_json(draft: &mut Draft<'_>, json: &str) {
    let descriptor = proto::message("inference.ModelConfig");
    let mut deserializer = serde_json::Deserializer::from_str(json);
    let message = DynamicMessage::deserialize(descriptor, &mut deserializer)
        .and_then(|message| deserializer.end().map(|()| message));
    match message {
        Ok(message) => {
            let said = json.contains("\"max_batch_size\"") || json.contains("\"maxBatchSize\"");
            apply(draft, &message, said);
        }
        Err(error) => {
            draft.problem(
                &format!("line {}", error.line()),
                format!("is not a configuration: {error}"),
            );
        }
    }
}

/// Writes `input [` as `input: [`: the format lets a list of messages go without its colon, as
/// nearly every configuration does, and the parser does not. Lines stay what they were.
fn with_colons(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 16);
    let mut quote = None;
    let mut in_comment = false;
    let mut escaped = false;
    // Whether the last token is a word.
    let mut after_word = false;
    for symbol in text.chars() {
        match (quote, symbol) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), '\\') => escaped = true,
            (Some(open), _) if symbol == open || symbol == '\n' => quote = None,
            (Some(_), _) => {}
            (None, '\n') => in_comment = false,
            (None, _) if in_comment => {}
            (None, '#') => in_comment = true,
            (None, '"' | '\'') => (quote, after_word) = (Some(symbol), false),
            (None, '[') if after_word => {
                out.push(':');
                after_word = false;
            }
            (None, _) if symbol.is_whitespace() => {}
            (None, _) => after_word = symbol.is_ascii_alphanumeric() || symbol == '_',
        }
        out.push(symbol);
    }
    out
}

/// The format cannot tell "0" from nothing said, but a user means different things.
fn says_batch_size(text: &str) -> bool {
    let code = |line: &str| line.split('#').next().unwrap_or_default().contains("max_batch_size");
    text.lines().any(code)
}

/// The line an error points at, from 1. The error says where only in its debug form.
fn line_of(error: &ParseError, text: &str) -> usize {
    let debug = format!("{error:?}");
    let offset = debug.rfind("span: ").and_then(|at| {
        let digits = debug[at + "span: ".len()..].split("..").next()?;
        digits.parse::<usize>().ok()
    });
    let before = text.as_bytes().get(..offset.unwrap_or(text.len())).unwrap_or(text.as_bytes());
    1 + before.iter().filter(|byte| **byte == b'\n').count()
}

fn apply(draft: &mut Draft<'_>, message: &DynamicMessage, said_batch_size: bool) {
    let mut ignored = Vec::new();
    unsupported(message, "", &mut ignored);
    for path in ignored {
        draft.warn(&path, "is not supported and has no effect");
    }
    let config: pb::ModelConfig = match message.transcode_to() {
        Ok(config) => config,
        Err(error) => return draft.problem("configuration", error),
    };
    check_kind(draft, &config);
    declared(draft, &config);
    batching(draft, &config, said_batch_size);
    instances(draft, &config.instance_group);
    versions(draft, config.version_policy.as_ref());
    if let Some(cache) = &config.response_cache {
        draft.manifest.settings.cached = cache.enable;
    }
    if !config.default_model_filename.is_empty() {
        draft.set_model_file("default_model_filename", &config.default_model_filename);
    }
    parameters(draft, &config);
    warmup(draft, &config.model_warmup);
}

/// Paths of set fields that nothing reads.
fn unsupported(message: &DynamicMessage, prefix: &str, ignored: &mut Vec<String>) {
    for (field, value) in message.fields() {
        let path = format!("{prefix}{}", field.name());
        if SUPPORTED.contains(&path.as_str()) {
            continue;
        }
        let below = format!("{path}.");
        let partly = SUPPORTED.iter().any(|supported| supported.starts_with(&below));
        match value {
            Value::Message(inner) if partly || inner.fields().next().is_some() => {
                unsupported(inner, &below, ignored);
            }
            Value::List(items) if partly => {
                for item in items.iter().filter_map(Value::as_message) {
                    unsupported(item, &below, ignored);
                }
            }
            _ if ignored.contains(&path) => {}
            _ => ignored.push(path),
        }
    }
}

fn check_kind(draft: &mut Draft<'_>, config: &pb::ModelConfig) {
    if let Some(folder) = draft.name
        && !config.name.is_empty()
        && config.name != folder
    {
        let what = if draft.folder.is_some() { "folder" } else { "model" };
        let message = format!("is '{}', but the {what} is '{folder}'", config.name);
        draft.problem("name", message);
    }
    if !["", "onnxruntime_onnx", "tract_onnx"].contains(&config.platform.as_str()) {
        let message = format!("expected onnxruntime_onnx, got '{}'", config.platform);
        draft.problem("platform", message);
    }
    match config.backend.as_str() {
        "" | "onnxruntime" => {}
        "tract" => draft.manifest.settings.engine = EngineChoice::Tract,
        other => draft.problem("backend", format!("expected onnxruntime, got '{other}'")),
    }
}

fn declared(draft: &mut Draft<'_>, config: &pb::ModelConfig) {
    let mut lists = Declared {
        max_batch_size: usize::try_from(config.max_batch_size).unwrap_or(0),
        ..Declared::default()
    };
    for input in &config.input {
        let tensor = tensor(draft, "input", &input.name, input.data_type, &input.dims);
        lists.inputs.extend(tensor);
        if input.allow_ragged_batch {
            draft.warn(
                &format!("input[{}].allow_ragged_batch", input.name),
                "has no effect: requests of unequal shapes run apart, or padded where \
                 tidegate.toml has batch.padding",
            );
        }
    }
    // The graph has inputs that callers do not send, or outputs that are not one row per example.
    for (path, used) in [
        ("batch_input", !config.batch_input.is_empty()),
        ("batch_output", !config.batch_output.is_empty()),
    ] {
        if used {
            draft.problem(path, "models for ragged batches are not supported");
        }
    }
    for output in &config.output {
        let tensor = tensor(draft, "output", &output.name, output.data_type, &output.dims);
        lists.outputs.extend(tensor);
        if !output.label_filename.is_empty() {
            let path = format!("output[{}].label_filename", output.name);
            draft.read_labels(&path, &output.name, &output.label_filename);
        }
    }
    if !config.input.is_empty() || !config.output.is_empty() {
        draft.manifest.declared = Some(lists);
    }
}

fn tensor(
    draft: &mut Draft<'_>,
    list: &str,
    name: &str,
    number: i32,
    dims: &[i64],
) -> Option<DeclaredTensor> {
    let path = format!("{list}[{name}]");
    if name.is_empty() {
        draft.problem(list, "expected a name");
        return None;
    }
    if let Some(dim) = dims.iter().find(|dim| **dim < -1) {
        draft.problem(&path, format!("expected dims of -1 or more, got {dim}"));
    }
    let datatype = DataType::from_config_number(number);
    if datatype.is_none() {
        draft.problem(&path, "expected a data_type");
    }
    Some(DeclaredTensor { name: name.to_owned(), datatype: datatype?, dims: dims.to_vec() })
}

fn batching(draft: &mut Draft<'_>, config: &pb::ModelConfig, said: bool) {
    use pb::model_config::SchedulingChoice;
    let declares = !config.input.is_empty();
    let size = usize::try_from(config.max_batch_size).ok();
    match size {
        None => {
            let message = format!("expected 0 or more, got {}", config.max_batch_size);
            draft.problem("max_batch_size", message);
        }
        Some(0) if said || declares => draft.manifest.settings.batched = Some(false),
        Some(0) => {}
        Some(size) => {
            draft.manifest.settings.batched = Some(true);
            draft.manifest.settings.batch.rows_max = size;
            // Without a scheduler that joins requests, each runs alone.
            draft.manifest.settings.batch.size_max = 1;
        }
    }
    match &config.scheduling_choice {
        None => {}
        Some(SchedulingChoice::DynamicBatching(_)) if size == Some(0) && (said || declares) => {
            draft.warn("dynamic_batching", "has no effect with max_batch_size 0");
        }
        Some(SchedulingChoice::DynamicBatching(dynamic)) => {
            if let Some(size) = size.filter(|size| *size > 0) {
                draft.manifest.settings.batch.size_max = size;
            }
            dynamic_batching(draft, dynamic);
        }
        Some(SchedulingChoice::SequenceBatching(_)) => {
            draft.problem("sequence_batching", "models that keep state are not supported");
        }
        Some(SchedulingChoice::EnsembleScheduling(_)) => {
            draft.problem("ensemble_scheduling", "ensembles are not supported");
        }
    }
}

fn dynamic_batching(draft: &mut Draft<'_>, dynamic: &pb::ModelDynamicBatching) {
    let mut batch = draft.manifest.settings.batch.clone();
    batch.wait_max = Duration::from_micros(dynamic.max_queue_delay_microseconds);
    batch.preserve_ordering = dynamic.preserve_ordering;
    for size in &dynamic.preferred_batch_size {
        match usize::try_from(*size).ok().filter(|size| *size > 0) {
            Some(size) => batch.preferred.push(size),
            None => draft.problem(
                "dynamic_batching.preferred_batch_size",
                format!("expected sizes of 1 or more, got {size}"),
            ),
        }
    }
    for (number, path, to) in [
        (dynamic.priority_levels, "dynamic_batching.priority_levels", &mut batch.priority_levels),
        (
            dynamic.default_priority_level,
            "dynamic_batching.default_priority_level",
            &mut batch.priority_default,
        ),
    ] {
        match u32::try_from(number) {
            Ok(number) => *to = number,
            Err(_) => draft.problem(path, format!("{number} is too large")),
        }
    }
    if let Some(policy) = &dynamic.default_queue_policy {
        if policy.max_queue_size > 0 {
            batch.queue_max = usize::try_from(policy.max_queue_size).unwrap_or(usize::MAX);
        }
        if policy.default_timeout_microseconds > 0 {
            batch.queue_wait_max = Some(Duration::from_micros(policy.default_timeout_microseconds));
        }
        batch.allow_timeout_override = policy.allow_timeout_override;
        if policy.timeout_action() == pb::model_queue_policy::TimeoutAction::Delay {
            let path = "dynamic_batching.default_queue_policy.timeout_action";
            draft.warn(path, "DELAY is not supported, requests that waited too long are rejected");
        }
    }
    draft.manifest.settings.batch = batch;
}

fn instances(draft: &mut Draft<'_>, groups: &[pb::ModelInstanceGroup]) {
    use pb::model_instance_group::Kind;
    let mut count = 0_usize;
    for group in groups {
        match usize::try_from(group.count) {
            Ok(number) => count = count.saturating_add(number),
            Err(_) => {
                let message = format!("expected 0 or more, got {}", group.count);
                draft.problem("instance_group.count", message);
            }
        }
    }
    if count > 0 {
        draft.manifest.settings.instances = Some(count);
    }
    let on_gpu = groups.iter().find(|group| group.kind() == Kind::Gpu);
    if let Some(group) = on_gpu {
        let device_id = group.gpus.first().copied().unwrap_or(0);
        draft.manifest.settings.providers =
            vec![Provider::Cuda { device_id, memory_max_bytes: None }, Provider::Cpu];
        if group.gpus.len() > 1 || groups.len() > 1 {
            let message =
                format!("one device per model is supported, all instances use {device_id}");
            draft.warn("instance_group.gpus", message);
        }
    }
}

fn versions(draft: &mut Draft<'_>, policy: Option<&pb::ModelVersionPolicy>) {
    use pb::model_version_policy::PolicyChoice;
    let Some(choice) = policy.and_then(|policy| policy.policy_choice.as_ref()) else { return };
    let policy = match choice {
        PolicyChoice::All(_) => VersionPolicy::All,
        PolicyChoice::Latest(latest) if latest.num_versions == 0 => {
            let path = "version_policy.latest.num_versions";
            return draft.problem(path, "expected 1 or more, got 0");
        }
        PolicyChoice::Latest(latest) => {
            VersionPolicy::Latest(usize::try_from(latest.num_versions).unwrap_or(usize::MAX))
        }
        PolicyChoice::Specific(specific) => {
            let positive =
                |version: &i64| u64::try_from(*version).ok().filter(|number| *number > 0);
            let numbers: Option<Vec<u64>> = specific.versions.iter().map(positive).collect();
            let Some(numbers) = numbers.filter(|numbers| !numbers.is_empty()) else {
                let path = "version_policy.specific.versions";
                return draft.problem(path, "expected at least one version, all of them positive");
            };
            VersionPolicy::Specific(numbers)
        }
    };
    draft.manifest.settings.versions = Some(policy);
}

fn parameters(draft: &mut Draft<'_>, config: &pb::ModelConfig) {
    let mut names: Vec<&String> = config.parameters.keys().collect();
    names.sort();
    for name in names {
        let text = &config.parameters[name].string_value;
        let path = format!("parameters[{name}]");
        if name != "intra_op_thread_count" {
            draft.warn(&path, "is not supported and has no effect");
            continue;
        }
        match text.parse::<usize>() {
            // 0 leaves it to the runtime there and to us here.
            Ok(0) => {}
            Ok(threads) => draft.manifest.settings.intra_threads = Some(threads),
            Err(_) => draft.problem(&path, format!("expected a whole number, got '{text}'")),
        }
    }
}

fn warmup(draft: &mut Draft<'_>, samples: &[pb::ModelWarmup]) {
    use pb::model_warmup::input::InputDataType;
    let Some(runs) = samples.iter().map(|sample| sample.count.max(1)).max() else { return };
    let runs = usize::try_from(runs.min(WARMUP_RUNS_MAX)).unwrap_or(1);
    draft.manifest.settings.warmup.runs = runs;
    let other_data = samples
        .iter()
        .flat_map(|sample| sample.inputs.values())
        .any(|input| !matches!(input.input_data_type, None | Some(InputDataType::ZeroData(_))));
    if other_data {
        draft.warn("model_warmup.inputs", "only zeros are supported and are used instead");
    }
}
