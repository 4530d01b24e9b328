//! Both engines and the fake against one suite, and each against values worked out by hand.

#![cfg(all(feature = "ort", feature = "tract"))]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use prost::Message;
use tidegate::domain::{DataType, EngineChoice, Provider, Shape, Tensor};
use tidegate::engine::conformance::{close, conforms, make_inputs};
use tidegate::engine::fake::FakeModel;
use tidegate::engine::ort::OrtBackend;
use tidegate::engine::tract::TractBackend;
use tidegate::engine::{Artifact, Backend, EngineError, Engines, LoadOptions, Model};
use tidegate::proto::onnx as pb;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/{name}.onnx"))
}

fn artifact(name: &str) -> Artifact {
    Artifact { path: fixture(name), derived: None }
}

fn options() -> LoadOptions {
    LoadOptions { intra_threads: 1, sessions: 1, providers: Vec::new() }
}

fn ort() -> Arc<dyn Backend> {
    match OrtBackend::open(None) {
        Ok(backend) => Arc::new(backend),
        Err(error) => panic!("these tests need ONNX Runtime, which `make ort` fetches: {error}"),
    }
}

fn tract() -> Arc<dyn Backend> {
    Arc::new(TractBackend::new())
}

fn load(backend: &dyn Backend, name: &str) -> Arc<dyn Model> {
    let model = backend.load(&artifact(name), &options());
    model.unwrap_or_else(|error| panic!("{name} on {}: {error}", backend.name()))
}

fn floats(shape: &[usize], values: &[f32]) -> Tensor {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Tensor::new(DataType::Fp32, Shape::from_slice(shape), data.into()).unwrap()
}

fn run(model: &dyn Model, inputs: &[Tensor]) -> Vec<Tensor> {
    model.session().unwrap().run(inputs).unwrap()
}

/// Everything that is not about one datatype.
const MODELS: [&str; 3] = ["mlp", "tokens", "unnamed"];

fn suite(backend: &dyn Backend, lacking: &[DataType]) {
    for name in MODELS {
        conforms(&*load(backend, name)).unwrap_or_else(|broken| panic!("{name}: {broken}"));
    }
    for datatype in DataType::ALL {
        let name = format!("identity_{}", datatype.name().to_lowercase());
        if lacking.contains(&datatype) {
            let refused = backend.load(&artifact(&name), &options()).err();
            assert!(
                matches!(refused, Some(EngineError::Unsupported { .. })),
                "{name}: {refused:?}"
            );
            continue;
        }
        let model = load(backend, &name);
        conforms(&*model).unwrap_or_else(|broken| panic!("{name}: {broken}"));
        let inputs = make_inputs(model.signature(), 5).unwrap();
        assert_eq!(run(&*model, &inputs), inputs, "{name}");
    }
}

fn known_values(backend: &dyn Backend) {
    let mlp = load(backend, "mlp");
    assert!(mlp.signature().batched);
    let y = run(&*mlp, &[floats(&[3, 2], &[1.0, 2.0, 2.0, 0.0, 0.0, 0.0])]);
    assert_eq!(y, [floats(&[3, 1], &[11.5, 302.5, 0.5])]);

    let tokens = load(backend, "tokens");
    let data: Vec<u8> = [1_i64, 2, 3, 10, 20, 30].iter().flat_map(|id| id.to_le_bytes()).collect();
    let ids = Tensor::new(DataType::Int64, Shape::from_slice(&[2, 3]), data.into()).unwrap();
    let outputs = run(&*tokens, &[ids]);
    assert_eq!(outputs[0], floats(&[2, 3], &[2.0, 4.0, 6.0, 20.0, 40.0, 60.0]));
    assert_eq!(outputs[1], floats(&[2], &[6.0, 60.0]));

    let unnamed = load(backend, "unnamed");
    assert!(unnamed.signature().batched);
    let sum = run(&*unnamed, &[floats(&[1, 2], &[1.0, 2.0]), floats(&[1, 2], &[3.0, 4.0])]);
    assert_eq!(sum, [floats(&[1, 2], &[4.0, 6.0])]);
}

#[test]
fn onnx_runtime_conforms() {
    suite(&*ort(), &[]);
    known_values(&*ort());
}

#[test]
fn tract_conforms() {
    suite(&*tract(), &[DataType::Bf16]);
    known_values(&*tract());
}

#[test]
fn the_fake_conforms() {
    conforms(&FakeModel::new(4, 1.0)).unwrap();
}

/// Model files of the repository's own `models/`.
fn served() -> Vec<Artifact> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("models");
    let folders = |path: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(path).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
    };
    let versions = folders(&root).into_iter().flat_map(|model| folders(&model));
    let files = versions.map(|version| version.join("model.onnx")).filter(|path| path.is_file());
    files.map(|path| Artifact { path, derived: None }).collect()
}

/// tract is the second opinion on what ONNX Runtime says, where it can run a model at all.
#[test]
fn the_engines_agree_on_the_models_that_we_ship() {
    let models = served();
    assert!(models.len() >= 4, "{models:?}");
    let mut agreed = 0;
    for artifact in &models {
        let path = artifact.path.display();
        let model = ort().load(artifact, &options()).unwrap();
        conforms(&*model).unwrap_or_else(|broken| panic!("{path} on ONNX Runtime: {broken}"));
        let second = match tract().load(artifact, &options()) {
            Ok(second) => second,
            Err(EngineError::Unsupported { .. }) => continue,
            Err(error) => panic!("{path} on tract: {error}"),
        };
        conforms(&*second).unwrap_or_else(|broken| panic!("{path} on tract: {broken}"));
        let inputs = make_inputs(model.signature(), 2).unwrap();
        let (left, right) = (run(&*model, &inputs), run(&*second, &inputs));
        assert!(
            left.iter().zip(&right).all(|(left, right)| close(left, right)),
            "{path}: {left:?} {right:?}"
        );
        agreed += 1;
    }
    assert!(agreed >= 2, "only {agreed} of {} models run on both", models.len());
}

#[test]
fn strings_that_the_runtime_would_mangle_are_refused() {
    let model = load(&*ort(), "identity_bytes");
    for element in [&b"\xff\xfe"[..], b"a\0b"] {
        let tensor =
            Tensor::from_elements(Shape::from_slice(&[1, 2]), &[b"fine", element]).unwrap();
        let error = model.session().unwrap().run(&[tensor]).unwrap_err();
        assert!(matches!(error, EngineError::Input { .. }), "{error}");
        assert!(error.to_string().contains("element 1"), "{error}");
    }
}

#[test]
fn a_refusal_names_the_operator_and_the_other_engine() {
    let engines = Engines::open(EngineChoice::Auto, None).unwrap();
    assert_eq!(engines.ort_problem(), None, "these tests need ONNX Runtime: `make ort`");
    let load = |choice, name| engines.load(choice, &artifact(name), &options());
    let refusal = |choice, name| load(choice, name).err().unwrap().to_string();

    let text = refusal(EngineChoice::Tract, "scaler");
    assert!(text.contains("Scaler") && text.contains("onnxruntime can run it"), "{text}");
    let text = refusal(EngineChoice::Auto, "frobnicate");
    assert!(text.contains("Frobnicate") && text.contains("tract cannot run it either"), "{text}");
    assert_eq!(load(EngineChoice::Auto, "mlp").unwrap().0, "onnxruntime");
    assert_eq!(load(EngineChoice::Tract, "mlp").unwrap().0, "tract");

    let alone = Engines::open(EngineChoice::Tract, None).unwrap();
    let error = alone.load(EngineChoice::Ort, &artifact("mlp"), &options()).err().unwrap();
    assert!(matches!(error, EngineError::NotAvailable { .. }), "{error}");
}

#[test]
fn a_broken_file_is_an_error_on_both() {
    let folder = tempfile::tempdir().unwrap();
    let whole = std::fs::read(fixture("mlp")).unwrap();
    for cut in (0..whole.len()).step_by(7) {
        let path = folder.path().join("model.onnx");
        std::fs::write(&path, &whole[..cut]).unwrap();
        let broken = Artifact { path, derived: None };
        for backend in [ort(), tract()] {
            // A prefix may happen to be a smaller model; it must only not panic.
            let _outcome = backend.load(&broken, &options());
        }
    }
}

#[test]
fn cuda_without_a_gpu_is_a_note_and_the_cpu() {
    let providers = vec![Provider::Cuda { device_id: 0, memory_max_bytes: None }, Provider::Cpu];
    let options = LoadOptions { providers, ..options() };
    let model = ort().load(&artifact("mlp"), &options).unwrap();
    let notes = model.notes().join("\n");
    assert!(notes.contains("cuda"), "{notes}");
    conforms(&*model).unwrap();
}

const WIDE: (usize, usize) = (512, 1024);

fn weights() -> Vec<u8> {
    let count = WIDE.0 * WIDE.1;
    (0_u8..13).cycle().take(count).flat_map(|n| (f32::from(n) - 6.0).to_le_bytes()).collect()
}

/// A model that multiplies by 2 MiB of weights, which lie in a file beside it.
fn wide(folder: &Path) -> Artifact {
    let path = folder.join("wide.onnx");
    std::fs::copy(fixture("wide"), &path).unwrap();
    std::fs::write(folder.join("wide.bin"), weights()).unwrap();
    Artifact { path, derived: Some(folder.join("derived")) }
}

/// The same model with the weights inside.
fn wide_inside(folder: &Path) -> Artifact {
    let path = folder.join("wide.onnx");
    let tensor = pb::WeightsTensor {
        dims: vec![512, 1024],
        data_type: 1,
        name: "w".to_owned(),
        raw_data: weights().into(),
        ..Default::default()
    };
    let graph = pb::WeightsGraph { initializer: vec![tensor] };
    // Two encodings one after the other are one message with the parts of both.
    let mut model = std::fs::read(fixture("wide_inside")).unwrap();
    pb::Weights { graph: Some(graph) }.encode(&mut model).unwrap();
    std::fs::write(&path, model).unwrap();
    Artifact { path, derived: Some(folder.join("derived")) }
}

fn sessions_share_weights(folder: &Path, artifact: &Artifact) {
    let backend = ort();
    let plain = backend.load(artifact, &options()).unwrap();
    let x = floats(&[2, 512], &(0..1024_u16).map(|n| f32::from(n % 5)).collect::<Vec<_>>());
    let expected = run(&*plain, std::slice::from_ref(&x));
    let options = LoadOptions { sessions: 3, ..options() };
    // The second load finds the graph that the first one left.
    for _ in 0..2 {
        let shared = backend.load(artifact, &options).unwrap();
        let notes = shared.notes().join("\n");
        assert!(notes.contains("shared by all sessions"), "{notes}");
        for _ in 0..3 {
            assert_eq!(run(&*shared, std::slice::from_ref(&x)), expected);
        }
        conforms(&*shared).unwrap();
        let kept = std::fs::read_dir(folder.join("derived")).unwrap().count();
        assert_eq!(kept, 1, "one derived graph and nothing half done");
    }
    // A derived graph that was damaged doesn't make a load fail, and the next one makes it anew.
    for entry in std::fs::read_dir(folder.join("derived")).unwrap() {
        std::fs::write(entry.unwrap().path(), b"damaged").unwrap();
    }
    for sharing in [false, true] {
        let model = backend.load(artifact, &options).unwrap();
        assert_eq!(run(&*model, std::slice::from_ref(&x)), expected);
        let notes = model.notes().join("\n");
        assert_eq!(notes.contains("shared by all sessions"), sharing, "{notes}");
    }
}

#[test]
fn sessions_share_weights_that_lie_inside_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = wide_inside(folder.path());
    sessions_share_weights(folder.path(), &artifact);
}

#[test]
fn sessions_share_weights_that_lie_beside_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = wide(folder.path());
    sessions_share_weights(folder.path(), &artifact);
}

#[test]
fn both_read_weights_beside_the_model() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = wide(folder.path());
    let x = floats(&[1, 512], &(0..512_u16).map(|n| f32::from(n % 5)).collect::<Vec<_>>());
    let outputs = [ort(), tract()].map(|backend| {
        run(&*backend.load(&artifact, &options()).unwrap(), std::slice::from_ref(&x))
    });
    assert_eq!(outputs[0], outputs[1]);
}

#[test]
fn an_index_past_the_end_is_an_error_and_the_session_goes_on() {
    for backend in [ort(), tract()] {
        let model = load(&*backend, "lookup");
        let mut session = model.session().unwrap();
        let at = |index: i64| {
            let data = index.to_le_bytes().to_vec();
            Tensor::new(DataType::Int64, Shape::from_slice(&[1]), data.into()).unwrap()
        };
        let error = session.run(&[at(99)]).unwrap_err();
        let blamed = matches!(error, EngineError::Input { .. } | EngineError::Run(_));
        assert!(blamed, "{}: {error}", backend.name());
        assert_eq!(session.run(&[at(2)]).unwrap(), [floats(&[1, 2], &[4.0, 5.0])]);
    }
}

#[test]
fn external_data_outside_the_folder_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = wide(folder.path());
    let aside = tempfile::tempdir().unwrap();
    let secret = aside.path().join("secret");
    std::fs::rename(folder.path().join("wide.bin"), &secret).unwrap();
    std::os::unix::fs::symlink(&secret, folder.path().join("wide.bin")).unwrap();
    for backend in [ort(), tract()] {
        let error = backend.load(&artifact, &options()).err().unwrap();
        assert!(matches!(error, EngineError::Broken(_)), "{}: {error}", backend.name());
    }
}
