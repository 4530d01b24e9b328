use std::path::PathBuf;
use std::time::Duration;

use super::*;
use crate::domain::{
    Capture, Columns, Durability, EngineChoice, OnUnrecorded, PadValue, PaddedInput, PaddedOutput,
    PaddingSettings, Provider, RecordSettings, TensorRule, Treatment, VersionPolicy,
};

struct Folder {
    _keep: tempfile::TempDir,
    path: PathBuf,
}

fn folder(files: &[(&str, &str)]) -> Folder {
    let keep = tempfile::tempdir().unwrap();
    let path = keep.path().join("m");
    std::fs::create_dir(&path).unwrap();
    for (name, text) in files {
        std::fs::write(path.join(name), text).unwrap();
    }
    Folder { _keep: keep, path }
}

fn pbtxt(text: &str) -> Result<Manifest, ManifestError> {
    read(&folder(&[(PBTXT, text)]).path)
}

fn toml(text: &str) -> Result<Manifest, ManifestError> {
    read(&folder(&[(TOML, text)]).path)
}

const FULL: &str = r#"
# A comment with max_batch_size: 0
name: "m"
platform: "onnxruntime_onnx"
max_batch_size: 16
input [ { name: "x" data_type: TYPE_FP32 dims: [ -1, 4 ] } ]
output [ { name: "y" data_type: TYPE_STRING dims: [ 3 ] label_filename: "labels.txt" } ]
instance_group [ { count: 2 kind: KIND_GPU gpus: [ 1 ] } ]
version_policy: { specific { versions: [ 1, 3 ] } }
default_model_filename: "net.onnx"
dynamic_batching {
  preferred_batch_size: [ 4, 8 ]
  max_queue_delay_microseconds: 100
  preserve_ordering: true
  priority_levels: 3
  default_priority_level: 2
  default_queue_policy { default_timeout_microseconds: 5000 max_queue_size: 7 }
}
parameters { key: "intra_op_thread_count" value: { string_value: "2" } }
parameters { key: "memory.enable_memory_arena_shrinkage" value: { string_value: "cpu:0" } }
optimization { execution_accelerators { gpu_execution_accelerator : [ { name : "tensorrt" } ] } }
response_cache { enable: true }
model_warmup [ { name: "w" batch_size: 4 count: 5 } ]
"#;

#[test]
fn no_file_means_defaults() {
    assert_eq!(read(&folder(&[]).path), Ok(Manifest::default()));
}

#[test]
fn a_full_config_is_read() {
    let manifest =
        read(&folder(&[(PBTXT, FULL), ("labels.txt", "cat\ndog\nbird\n")]).path).unwrap();
    let settings = &manifest.settings;
    assert_eq!(settings.batched, Some(true));
    assert_eq!((settings.batch.size_max, settings.batch.rows_max), (16, 16));
    assert_eq!(settings.batch.preferred, [4, 8]);
    assert_eq!(settings.batch.wait_max, Duration::from_micros(100));
    assert!(settings.batch.preserve_ordering && !settings.batch.allow_timeout_override);
    assert_eq!((settings.batch.priority_levels, settings.batch.priority_default), (3, 2));
    assert_eq!(settings.batch.queue_max, 7);
    assert_eq!(settings.batch.queue_wait_max, Some(Duration::from_millis(5)));
    assert_eq!(settings.instances, Some(2));
    let cuda = Provider::Cuda { device_id: 1, memory_max_bytes: None };
    assert_eq!(settings.providers, [cuda, Provider::Cpu]);
    assert_eq!(settings.versions, Some(VersionPolicy::Specific(vec![1, 3])));
    assert_eq!(settings.model_file.as_deref(), Some("net.onnx"));
    assert_eq!(settings.intra_threads, Some(2));
    assert_eq!(settings.warmup.runs, 5);
    assert!(settings.cached);
    let labels = vec!["cat".to_owned(), "dog".to_owned(), "bird".to_owned()];
    assert_eq!(settings.labels, [("y".to_owned(), labels)]);
    let declared = manifest.declared.unwrap();
    assert_eq!(declared.inputs[0].dims, [-1, 4]);
    assert_eq!(declared.outputs[0].datatype, DataType::Bytes);
    let mut warned: Vec<&str> =
        manifest.warnings.iter().filter_map(|line| line.split(": ").nth(1)).collect();
    warned.sort_unstable();
    assert_eq!(
        warned,
        [
            "optimization.execution_accelerators.gpu_execution_accelerator",
            "parameters[memory.enable_memory_arena_shrinkage]",
        ]
    );
}

#[test]
fn ragged_inputs_are_read_with_a_warning() {
    let text = "input [ { name: 'x' data_type: TYPE_FP32 dims: [ -1 ] allow_ragged_batch: true } ]";
    let warnings = pbtxt(text).unwrap().warnings;
    assert_eq!(warnings.len(), 1, "{warnings:?}");
    let start = "config.pbtxt: input[x].allow_ragged_batch: has no effect: requests of unequal";
    assert!(warnings[0].starts_with(start), "{warnings:?}");
}

#[test]
fn lists_of_messages_need_no_colon() {
    let text = "input # [ a comment's
        [ { name: 'a [\\' b [' data_type: TYPE_BOOL dims [ 1 ] }, { name: \"y\" data_type: TYPE_BF16 } ]
        instance_group[{ count: 2 }]";
    let manifest = pbtxt(text).unwrap();
    let inputs = manifest.declared.unwrap().inputs;
    assert_eq!(inputs[0].name, "a [' b [");
    assert_eq!((inputs.len(), manifest.settings.instances), (2, Some(2)));
}

#[test]
fn without_a_scheduler_requests_are_not_joined() {
    let settings = pbtxt("max_batch_size: 8").unwrap().settings;
    assert_eq!((settings.batch.size_max, settings.batch.rows_max), (1, 8));
    let settings = pbtxt("max_batch_size: 0").unwrap().settings;
    assert_eq!(settings.batched, Some(false));
    // Nothing said about batching leaves it to the graph.
    assert_eq!(pbtxt("# max_batch_size: 0\nname: 'm'").unwrap().settings.batched, None);
}

#[test]
fn wrong_fields_are_refused_with_their_line() {
    let error = pbtxt("name: 'm'\nmax_batch_size: 4\nmax_bach_size: 4\n").unwrap_err();
    assert_eq!(error.problems.len(), 1);
    assert!(error.problems[0].starts_with("config.pbtxt: line 3: "), "{error}");
    let error = pbtxt("name: 'm'\nmax_batch_size: 'four'\n").unwrap_err();
    assert!(error.problems[0].starts_with("config.pbtxt: line 2: "), "{error}");
    assert!(pbtxt("name: 'm' input [ {").is_err());
}

#[test]
fn every_problem_is_named_at_once() {
    let text = "
        name: 'other'
        platform: 'tensorrt_plan'
        backend: 'python'
        max_batch_size: -1
        input [ { name: 'x' dims: [ -7 ] } ]
        output [ { name: 'y' data_type: TYPE_FP32 dims: [ 1 ] label_filename: '../secret' } ]
        version_policy { latest { } }
        default_model_filename: '../model.onnx'
        sequence_batching { }
        batch_input [ { kind: BATCH_ELEMENT_COUNT target_name: 'n' data_type: TYPE_FP32 } ]
        batch_output [ { target_name: 'y' } ]
        instance_group [ { count: -1 } ]
        parameters { key: 'intra_op_thread_count' value: { string_value: 'many' } }
    ";
    let error = read(&folder(&[(PBTXT, text), (TOML, "[batch]\nsize = 1\nqueue_max = 0")]).path);
    let problems = error.unwrap_err().problems;
    for path in [
        "config.pbtxt: name",
        "config.pbtxt: platform",
        "config.pbtxt: backend",
        "config.pbtxt: max_batch_size",
        "config.pbtxt: input[x]",
        "config.pbtxt: output[y].label_filename",
        "config.pbtxt: version_policy.latest.num_versions",
        "config.pbtxt: default_model_filename",
        "config.pbtxt: sequence_batching",
        "config.pbtxt: batch_input",
        "config.pbtxt: batch_output",
        "config.pbtxt: instance_group.count",
        "config.pbtxt: parameters[intra_op_thread_count]",
        "tidegate.toml: batch.size",
        "tidegate.toml: batch.queue_max",
    ] {
        assert!(
            problems.iter().any(|line| line.starts_with(&format!("{path}: "))),
            "{path}: {problems:?}"
        );
    }
}

#[test]
fn labels_stay_inside_the_folder() {
    let folder = folder(&[(TOML, "[labels]\ny = 'labels.txt'")]);
    let outside = folder.path.parent().unwrap().join("secret");
    std::fs::write(&outside, "secret").unwrap();
    std::os::unix::fs::symlink(&outside, folder.path.join("labels.txt")).unwrap();
    let error = read(&folder.path).unwrap_err();
    assert!(error.to_string().contains("leaves the model's folder"), "{error}");
}

#[test]
fn our_file_wins() {
    let ours = "[engine]\nengine = 'ort'\ndevice_id = 3\nmemory_max_mb = 1\n[batch]\nsize_max = 32\n[labels]\ny = ['a', 'b']";
    let files = [(PBTXT, FULL), (TOML, ours), ("labels.txt", "cat\n")];
    let settings = read(&folder(&files).path).unwrap().settings;
    assert_eq!(settings.engine, EngineChoice::Ort);
    assert_eq!((settings.batch.size_max, settings.batch.rows_max), (32, 32));
    assert_eq!(settings.batch.preferred, [4, 8]);
    let cuda = Provider::Cuda { device_id: 3, memory_max_bytes: Some(1 << 20) };
    assert_eq!(settings.providers, [cuda, Provider::Cpu]);
    assert_eq!(settings.labels, [("y".to_owned(), vec!["a".to_owned(), "b".to_owned()])]);
}

#[test]
fn rows_below_the_batch_are_refused() {
    let error = toml("[batch]\nsize_max = 8\nrows_max = 4").unwrap_err();
    assert!(error.problems[0].contains("batch.rows_max"), "{error}");
    assert!(toml("[batch]\nsize_max = 8\npreferred = [9]").is_err());
}

#[test]
fn json_is_read_as_the_text_is() {
    let json = r#"{"name": "m", "max_batch_size": 4, "dynamic_batching": {},
        "input": [{"name": "x", "data_type": "TYPE_INT64", "dims": ["-1", 2]}]}"#;
    let manifest = from_json(json, "m").unwrap();
    assert_eq!(manifest.settings.batch.size_max, 4);
    assert_eq!(manifest.declared.unwrap().inputs[0].dims, [-1, 2]);
    assert!(from_json("{\"max_bach_size\": 4}", "m").is_err());
    assert!(from_json("{} {}", "m").is_err());
    assert!(from_json("", "m").is_err());
    let other = from_json(json, "other").unwrap_err();
    assert_eq!(other.problems, ["config: name: is 'm', but the model is 'other'"]);
}

#[test]
fn every_documented_key_of_a_model_is_accepted_and_no_other_exists() {
    let page = include_str!("../../../docs/configuration.md");
    let models = page.split("## A model").nth(1).expect("the page has the section");
    let mut documented: Vec<&str> = models
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .filter(|name| name.contains('.') && !name.starts_with("labels."))
        .collect();
    let mut known: Vec<&str> = toml_file::KEYS.iter().map(|(path, _)| *path).collect();
    documented.sort_unstable();
    known.sort_unstable();
    assert_eq!(documented, known);
    for (path, value) in toml_file::KEYS {
        // Some keys are right only beside another.
        let beside = match *path {
            "batch.priority_levels" => "batch.priority_default = 1\n",
            "batch.priority_default" => "batch.priority_levels = 1\n",
            "batch.padding.buckets" | "batch.padding.output" | "batch.padding.mask" => {
                "batch.padding.input = [{ name = 'x', axis = 1 }]\n"
            }
            _ => "",
        };
        let read = toml(&format!("{beside}{path} = {value}\n"));
        assert!(read.is_ok(), "{path}: {read:?}");
    }
}

const PADDED: &str = "
[batch.padding]
buckets = [16, 32]
mask = 'mask'
[[batch.padding.input]]
name = 'ids'
axis = 1
value = 7
[[batch.padding.input]]
name = 'mask'
axis = 2
[[batch.padding.output]]
name = 'hidden'
axis = 1
";

#[test]
fn padding_is_read() {
    let manifest = toml(PADDED).unwrap();
    let padding = manifest.settings.batch.padding.unwrap();
    let input = |name: &str, axis, value| PaddedInput { name: name.to_owned(), axis, value };
    let inputs = vec![input("ids", 1, PadValue::Int(7)), input("mask", 2, PadValue::Zero)];
    let outputs = vec![PaddedOutput { name: "hidden".to_owned(), axis: 1 }];
    let mask = Some("mask".to_owned());
    assert_eq!(padding, PaddingSettings { buckets: vec![16, 32], inputs, outputs, mask });
    assert_eq!(manifest.warnings, Vec::<String>::new());
    let alone = toml(&format!("[batch]\nsize_max = 1\n{PADDED}")).unwrap();
    assert_eq!(
        alone.warnings,
        ["tidegate.toml: batch.padding: has no effect, requests are never joined"]
    );
}

#[test]
fn every_problem_of_padding_is_named() {
    let cases: &[(&str, &str, &str)] = &[
        ("padding = 1", "batch.padding", "a section"),
        ("padding.mask = 'x'", "batch.padding.input", "at least one"),
        ("padding.colour = 'x'", "batch.padding.colour", "unknown key"),
        ("padding.input = []", "batch.padding.input", "a list of tables"),
        ("padding.input = [7]", "batch.padding.input[0]", "expected a table, got 7"),
        ("padding.input = [{ axis = 1 }]", "batch.padding.input[0]", "expected a name"),
        ("padding.input = [{ name = 'x' }]", "batch.padding.input[0]", "expected an axis"),
        (
            "padding.input = [{ name = 'x', axis = 0 }]",
            "batch.padding.input[0]",
            "at least 1, got 0",
        ),
        (
            "padding.input = [{ name = 'x', axis = 1, vale = 0 }]",
            "batch.padding.input[0]",
            "'vale'",
        ),
        (
            "padding.input = [{ name = 'x', axis = 1, value = [] }]",
            "batch.padding.input[0]",
            "one element",
        ),
        ("padding.buckets = []", "batch.padding.buckets", "ascending"),
        ("padding.buckets = [4, 4]", "batch.padding.buckets", "ascending"),
        ("padding.buckets = [0, 4]", "batch.padding.buckets", "ascending"),
        ("padding.buckets = [2_000_000]", "batch.padding.buckets", "1048576, got [2000000]"),
        (
            "padding.input = [{ name = 'x', axis = 1 }, { name = 'x', axis = 2 }]",
            "batch.padding.input",
            "'x' is there twice",
        ),
        (
            "padding.input = [{ name = 'x', axis = 1 }]\npadding.mask = 'y'",
            "batch.padding.mask",
            "expected the name of one in batch.padding.input, got 'y'",
        ),
        (
            "padding.input = [{ name = 'x', axis = 1, value = 1 }]\npadding.mask = 'x'",
            "batch.padding.mask",
            "padded with 0",
        ),
        (
            "enabled = false\npadding.input = [{ name = 'x', axis = 1 }]",
            "batch.padding",
            "batching is off",
        ),
    ];
    for (text, path, message) in cases {
        let error = toml(&format!("[batch]\n{text}")).unwrap_err();
        let named = error
            .problems
            .iter()
            .any(|line| line.contains(&format!(": {path}: ")) && line.contains(message));
        assert!(named, "{text}: {:?}", error.problems);
    }
}

const RECORDED: &str = "
[ledger]
durability = 'sync'
on_error = 'serve'
capture = 'digest'
sample_rate = 0.25
tensor_bytes_max = 10
record_bytes_max = 100
retention_days = 30
[[ledger.tensors]]
name = 'age*'
action = 'truncate'
truncate_bytes = 4
[[ledger.tensors]]
name = 'x'
fields_mask = [0, 2]
";

#[test]
fn what_is_recorded_is_read() {
    let ledger = toml(RECORDED).unwrap().settings.ledger;
    let rule =
        |name: &str, treatment, columns| TensorRule { name: name.to_owned(), treatment, columns };
    assert_eq!(
        ledger,
        RecordSettings {
            durability: Some(Durability::Sync),
            on_error: Some(OnUnrecorded::Serve),
            capture: Some(Capture::Digest),
            sample: Some(1 << 30),
            tensor_bytes_max: Some(10),
            record_bytes_max: Some(100),
            retention_days: Some(30),
            tensors: vec![
                rule("age*", Treatment::Truncate(4), None),
                rule("x", Treatment::Keep, Some(Columns::Mask(vec![0, 2]))),
            ],
        }
    );
}

#[test]
fn every_problem_of_what_is_recorded_is_named() {
    let cases: &[(&str, &str, &str)] = &[
        ("durability = 'fast'", "ledger.durability", "'sync', 'buffered', 'off'"),
        ("durable = true", "ledger.durable", "unknown key"),
        ("on_error = 1", "ledger.on_error", "'refuse', 'serve'"),
        ("sample_rate = 2", "ledger.sample_rate", "from 0 to 1, got 2"),
        ("tensor_bytes_max = 1000000000", "ledger.tensor_bytes_max", "at most 25165824"),
        ("tensors = 1", "ledger.tensors", "sections"),
        ("tensors = [{ action = 'drop' }]", "ledger.tensors[0].name", "a tensor's name"),
        ("tensors = [{ name = 'x' }]", "ledger.tensors[0].action", "what is done"),
        ("tensors = [{ name = 'x', action = 'eat' }]", "ledger.tensors[0].action", "'eat'"),
        ("tensors = [{ name = 'x', acton = 'drop' }]", "ledger.tensors[0].acton", "unknown key"),
        (
            "tensors = [{ name = 'x', action = 'truncate' }]",
            "ledger.tensors[0].truncate_bytes",
            "is expected",
        ),
        (
            "tensors = [{ name = 'x', action = 'keep', truncate_bytes = 1 }]",
            "ledger.tensors[0].truncate_bytes",
            "only then",
        ),
        (
            "tensors = [{ name = 'x', fields_keep = [-1] }]",
            "ledger.tensors[0].fields_keep",
            "numbers of columns",
        ),
        (
            "tensors = [{ name = 'x', fields_keep = [1], fields_mask = [1] }]",
            "ledger.tensors[0].fields_mask",
            "without",
        ),
    ];
    for (text, path, message) in cases {
        let error = toml(&format!("[ledger]\n{text}")).unwrap_err();
        let named = error
            .problems
            .iter()
            .any(|line| line.contains(&format!(": {path}: ")) && line.contains(message));
        assert!(named, "{text}: {:?}", error.problems);
    }
}
