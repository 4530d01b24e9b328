//! Both engines and the fake against one suite, and each against values worked out by hand.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use tidegate::domain::{DataType, EngineChoice, Provider, Shape, Tensor};
use tidegate::engine::conformance::conforms;
use tidegate::engine::fake::FakeModel;
use tidegate::engine::ort::OrtBackend;
use tidegate::engine::tract::TractBackend;
use tidegate::engine::{Artifact, Backend, EngineError, Engines, LoadOptions, Model};

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
        let inputs = tidegate::engine::conformance::make_inputs(model.signature(), 5).unwrap();
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

/// 2 MiB of weights in a file beside the model, and a model that multiplies by them.
fn wide(folder: &Path) -> Artifact {
    let path = folder.join("wide.onnx");
    std::fs::copy(fixture("wide"), &path).unwrap();
    let weights: Vec<u8> = (0..512 * 1024_u32)
        .flat_map(|n| (f32::from(u8::try_from(n % 13).unwrap()) - 6.0).to_le_bytes())
        .collect();
    std::fs::write(folder.join("wide.bin"), weights).unwrap();
    Artifact { path, derived: Some(folder.join("derived")) }
}

#[test]
fn sessions_share_weights_and_agree_with_a_plain_load() {
    let folder = tempfile::tempdir().unwrap();
    let artifact = wide(folder.path());
    let backend = ort();
    let plain = backend.load(&artifact, &options()).unwrap();
    let x = floats(&[2, 512], &(0..1024_u16).map(|n| f32::from(n % 5)).collect::<Vec<_>>());
    let expected = run(&*plain, std::slice::from_ref(&x));
    // The second load finds the graph that the first one left.
    for _ in 0..2 {
        let options = LoadOptions { sessions: 3, ..options() };
        let shared = backend.load(&artifact, &options).unwrap();
        let notes = shared.notes().join("\n");
        assert!(notes.contains("shared by all sessions"), "{notes}");
        for _ in 0..3 {
            assert_eq!(run(&*shared, std::slice::from_ref(&x)), expected);
        }
        conforms(&*shared).unwrap();
        let kept = std::fs::read_dir(folder.path().join("derived")).unwrap().count();
        assert_eq!(kept, 1, "one derived graph and nothing half done");
    }
    // A derived graph that was damaged is made anew, and the load doesn't fail.
    for entry in std::fs::read_dir(folder.path().join("derived")).unwrap() {
        std::fs::write(entry.unwrap().path(), b"damaged").unwrap();
    }
    let options = LoadOptions { sessions: 2, ..options() };
    let model = backend.load(&artifact, &options).unwrap();
    assert_eq!(run(&*model, &[x]), expected);
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
