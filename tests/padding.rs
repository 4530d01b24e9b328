//! Requests of unequal length share a batch and get what they get alone.
//!
//! `masked.json` holds what ONNX Runtime's Python package gives for each request alone.

#![cfg(all(feature = "ort", feature = "tract"))]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use tidegate::control::{Registry, Settings, Switchboard, source};
use tidegate::domain::{
    Answer, CallMeta, DataType, EngineChoice, Failure, InferRequest, Inputs, ModelControl,
    ModelName, NamedTensor, Protocol, RouteHeaders, Shape, Tensor,
};
use tidegate::engine::Engines;
use tidegate::gateway::{self, Gateway};
use tidegate::observe::{Observer, StatsSnapshot};
use tidegate::route::{Published, RouteTable};
use tokio::time::Instant;

/// Largest difference, absolute and relative, that a row may show for having had company.
const TOLERANCE: f32 = 1e-5;

#[derive(Clone, Deserialize)]
struct Case {
    ids: Vec<Vec<i64>>,
    hidden: Vec<f32>,
    pooled: Vec<f32>,
}

fn cases() -> Vec<Case> {
    serde_json::from_str(include_str!("fixtures/masked.json")).unwrap()
}

struct Serving {
    _root: tempfile::TempDir,
    registry: Arc<Registry>,
    gateway: Arc<Gateway>,
    model: ModelName,
}

impl Serving {
    /// One model with a `tidegate.toml`, on the engine of that name.
    async fn new(engine: EngineChoice, fixture: &str, toml: &str) -> Self {
        Self::with(engine, fixture, toml, None).await
    }

    async fn with(engine: EngineChoice, fixture: &str, toml: &str, samples: Option<&str>) -> Self {
        let root = tempfile::tempdir().unwrap();
        let folder = root.path().join("models/m");
        std::fs::create_dir_all(folder.join("1")).unwrap();
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        let from = fixtures.join(format!("{fixture}.onnx"));
        std::fs::copy(from, folder.join("1/model.onnx")).unwrap();
        std::fs::write(folder.join("tidegate.toml"), toml).unwrap();
        if let Some(samples) = samples {
            std::fs::write(folder.join("1/samples.json"), samples).unwrap();
        }
        let settings = Settings {
            engine,
            threads: 2,
            probe_enabled: false,
            source: source::Settings { quiet: Duration::ZERO, ..source::Settings::default() },
            ..Settings::new(root.path().join("models"), root.path().join("state"))
        };
        let engines = Arc::new(Engines::open(engine, None).unwrap());
        let table = Arc::new(Published::new(RouteTable::default()));
        let observer = Arc::new(Observer::default());
        let source = source::open(&settings).unwrap();
        let board = Arc::new(Switchboard::new(Arc::clone(&table), None));
        let registry = Registry::new(settings, engines, source, board, Arc::clone(&observer));
        registry.load_all().await.unwrap();
        let control = Arc::clone(&registry) as Arc<dyn ModelControl>;
        let gateway = Gateway::new(table, observer, control, gateway::Settings::default());
        Self { _root: root, registry, gateway: Arc::new(gateway), model: "m".parse().unwrap() }
    }

    async fn infer(&self, inputs: Vec<NamedTensor>) -> Result<Answer, Failure> {
        let meta = CallMeta {
            protocol: Protocol::Http,
            received: Instant::now(),
            timeout: None,
            trace: None,
            sticky_key: None,
            headers: RouteHeaders::default(),
            principal: None,
        };
        let request = InferRequest {
            model: self.model.clone(),
            version: None,
            id: String::new(),
            inputs: Inputs::Named(inputs),
            outputs: Vec::new(),
            parameters: Vec::new(),
        };
        let answer = self.gateway.infer(meta, request, async |answer| Ok(answer)).await;
        answer.map(|(answer, _)| answer).map_err(|refused| refused.failure)
    }

    /// All at once: every request has been sent before any of them can be answered.
    async fn infer_all(self: &Arc<Self>, requests: Vec<Vec<NamedTensor>>) -> Vec<Answer> {
        let calls = requests.into_iter().map(|inputs| self.infer(inputs));
        let answers = futures_util::future::join_all(calls).await.into_iter();
        answers.map(|answer| answer.unwrap_or_else(|f| panic!("{}", f.message))).collect()
    }

    /// All at once, again until they ran as one batch: a window may close early on a busy machine.
    /// Gives the answers, and how many elements and how much padding ran.
    async fn infer_as_one(
        self: &Arc<Self>,
        requests: &[Vec<NamedTensor>],
    ) -> (Vec<Answer>, u64, u64) {
        let counted = || {
            let of = |kind| self.elements(kind).unwrap_or(0);
            (self.stats().execution_count, of("real"), of("padding"))
        };
        for _ in 0..200 {
            let before = counted();
            let answers = self.infer_all(requests.to_vec()).await;
            let after = counted();
            if after.0 == before.0 + 1 {
                return (answers, after.1 - before.1, after.2 - before.2);
            }
        }
        panic!("never ran as one batch: {:?}", self.stats().batches);
    }

    fn stats(&self) -> StatsSnapshot {
        self.gateway.served(&self.model, None).unwrap().stats.snapshot()
    }

    /// Elements of this kind on the metrics page; `None` when it does not tell.
    fn elements(&self, kind: &str) -> Option<u64> {
        let (_, page) = self.gateway.observer().page(None);
        let page = String::from_utf8(page.to_vec()).unwrap();
        let label = format!("kind=\"{kind}\"");
        let line = page.lines().find(|line| {
            line.starts_with("tidegate_batch_elements_total{") && line.contains(&label)
        })?;
        line.rsplit(' ').next()?.parse().ok()
    }
}

fn ints(name: &str, rows: &[Vec<i64>]) -> NamedTensor {
    let data: Vec<u8> = rows.iter().flatten().flat_map(|value| value.to_le_bytes()).collect();
    let shape = Shape::from_slice(&[rows.len(), rows[0].len()]);
    let tensor = Tensor::new(DataType::Int64, shape, data.into()).unwrap();
    NamedTensor { name: name.to_owned(), tensor }
}

/// With a mask of its own, or without.
fn inputs(case: &Case, with_mask: bool) -> Vec<NamedTensor> {
    let mut inputs = vec![ints("ids", &case.ids)];
    if with_mask {
        inputs.push(ints("mask", &vec![vec![1; case.ids[0].len()]; case.ids.len()]));
    }
    inputs
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn assert_answer(case: &Case, answer: &Answer) {
    let (rows, length) = (case.ids.len(), case.ids[0].len());
    assert_eq!(answer.outputs[0].tensor.shape(), [rows, length, 8]);
    assert_eq!(answer.outputs[1].tensor.shape(), [rows, 8]);
    for (output, want) in answer.outputs.iter().zip([&case.hidden, &case.pooled]) {
        for (got, want) in floats(&output.tensor).iter().zip(want) {
            let near = (got - want).abs() <= TOLERANCE * (1.0 + want.abs());
            assert!(near, "{} of length {length}: {got}, expected {want}", output.name);
        }
    }
}

const PADDED: &str = "
[batch.padding]
mask = 'mask'
input = [{ name = 'ids', axis = 1, value = 31 }, { name = 'mask', axis = 1 }]
output = [{ name = 'hidden', axis = 1 }]
";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_lengths_of_a_bucket_run_as_one_batch() {
    let cases = cases();
    let rows: usize = cases.iter().map(|case| case.ids.len()).sum();
    let toml = format!(
        "[batch]\nsize_max = {rows}\nwait_max_us = 20_000_000\n{}\n",
        PADDED.replace("[batch.padding]", "[batch.padding]\nbuckets = [40]")
    );
    for engine in [EngineChoice::Ort, EngineChoice::Tract] {
        let serving = Arc::new(Serving::new(engine, "masked", &toml).await);
        let requests = cases.iter().enumerate().map(|(at, case)| inputs(case, at % 2 == 0));
        let requests: Vec<_> = requests.collect();
        let (answers, ran, padding) = serving.infer_as_one(&requests).await;
        for (case, answer) in cases.iter().zip(&answers) {
            assert_answer(case, answer);
        }
        let real: usize = cases.iter().map(|case| 2 * case.ids.len() * case.ids[0].len()).sum();
        assert_eq!((ran, padding), (real as u64, (2 * rows * 40 - real) as u64), "{engine:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn powers_of_two_are_the_buckets_when_none_are_listed() {
    let cases = cases();
    let serving = Arc::new(Serving::new(EngineChoice::Ort, "masked", PADDED).await);
    for _ in 0..20 {
        let requests = cases.iter().map(|case| inputs(case, false)).collect();
        for (case, answer) in cases.iter().zip(serving.infer_all(requests).await) {
            assert_answer(case, &answer);
        }
    }
    let (real, padding) = (serving.elements("real").unwrap(), serving.elements("padding").unwrap());
    assert!(padding < real, "at most twice the length: {padding} of padding, {real} real");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_length_is_never_padded_and_keeps_its_bits() {
    let case = cases().into_iter().find(|case| case.ids[0].len() == 9).unwrap();
    let toml = format!("[batch]\nsize_max = 4\nwait_max_us = 20_000_000\n{PADDED}");
    let serving = Arc::new(Serving::new(EngineChoice::Ort, "masked", &toml).await);
    let rows = |count| Case { ids: vec![case.ids[0].clone(); count], ..case.clone() };
    let (answers, _, padding) = serving.infer_as_one(&vec![inputs(&rows(1), false); 4]).await;
    let plain = Serving::new(EngineChoice::Ort, "masked", "[batch]\nsize_max = 1").await;
    // The engine itself adds up in another order for other numbers of rows.
    let as_one = plain.infer(inputs(&rows(4), true)).await.unwrap();
    assert_eq!(padding, 0);
    for answer in answers {
        for (got, want) in answer.outputs.iter().zip(&as_one.outputs) {
            let row = |at| want.tensor.rows(at, at + 1).unwrap();
            assert!((0..4).any(|at| got.tensor == row(at)), "{}", got.name);
        }
    }
    assert_eq!(plain.elements("real"), None, "only models with padding have the series");
}

#[tokio::test]
async fn lengths_that_disagree_are_refused_by_name() {
    let serving = Serving::new(EngineChoice::Ort, "masked", PADDED).await;
    let inputs = vec![ints("ids", &[vec![1, 2, 3]]), ints("mask", &[vec![1, 1]])];
    let failure = serving.infer(inputs).await.unwrap_err();
    assert_eq!(failure.message, "input 'mask' has length 2, expected 3 as input 'ids' has");
    let failure = serving.infer(vec![ints("mask", &[vec![1, 1]])]).await.unwrap_err();
    assert_eq!(failure.message, "expected 2 inputs ('ids', 'mask'), got 1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_model_that_padding_changes_is_not_padded() {
    let toml = "
        [batch]
        size_max = 2
        [batch.padding]
        buckets = [8]
        input = [{ name = 'ids', axis = 1 }]
    ";
    let serving = Arc::new(Serving::new(EngineChoice::Ort, "unmasked", toml).await);
    let of = |length: usize| vec![ints("ids", &[vec![3; length]])];
    let alone = serving.infer(of(2)).await.unwrap();
    for _ in 0..20 {
        let answers = serving.infer_all((2..=5).map(of).collect()).await;
        for answer in answers {
            // A mean of equal things does not hang on how many there are.
            let (got, want) = (&answer.outputs[0].tensor, &alone.outputs[0].tensor);
            let near = |(got, want): (f32, f32)| (got - want).abs() <= TOLERANCE;
            assert!(floats(got).into_iter().zip(floats(want)).all(near), "{got:?}, {want:?}");
        }
    }
    assert_eq!(serving.elements("real"), None);
    assert_eq!(serving.stats().execution_count, 81, "unequal lengths never ran together");
}

#[tokio::test]
async fn padding_that_the_model_cannot_have_fails_the_load() {
    let cases = [
        (
            "axis = 1, value = 31 }, { name = 'mask', axis = 1",
            "axis = 1 }, { name = 'mask', axis = 2",
            "batch.padding.input 'mask': axis 2 is out of range, the input has 2 dimensions",
        ),
        ("value = 31", "value = 0.5", "batch.padding.input 'ids': value 0.5 does not fit INT64"),
        (
            "'hidden'",
            "'hiden'",
            "batch.padding.output 'hiden': the model has the outputs hidden, pooled",
        ),
    ];
    for (from, to, message) in cases {
        let serving = Serving::new(EngineChoice::Ort, "masked", &PADDED.replace(from, to)).await;
        let index = serving.registry.index();
        assert!(index[0].reason.contains(message), "{message}: {}", index[0].reason);
    }
}

/// Ones and zeros do not show that this model's padding is wrong.
#[tokio::test]
async fn samples_next_to_each_other_are_also_tried_padded() {
    let sample = |values: &[f32], peak: f32| {
        let length = values.len();
        serde_json::json!({
            "request": {"inputs": [
                {"name": "x", "datatype": "FP32", "shape": [1, length], "data": values}
            ]},
            "response": {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1], "data": [peak]}]},
        })
    };
    let toml = "[batch.padding]\ninput = [{ name = 'x', axis = 1 }]";
    let long = sample(&[0.5, 2.0, 1.5, 3.5], 3.5);
    let cases = [
        (sample(&[-1.0, 4.0, -2.0], 4.0), ""),
        (sample(&[-1.0, -4.0, -2.0], -1.0), "samples 0 and 1 padded to one length: output 'y'[0]"),
        (sample(&[-1.0, -4.0], -1.0), ""), // Another bucket.
    ];
    for (short, reason) in cases {
        let samples = serde_json::json!({"samples": [long, short]}).to_string();
        let serving = Serving::with(EngineChoice::Ort, "peak", toml, Some(&samples)).await;
        let index = serving.registry.index();
        assert!(index[0].reason.contains(reason), "{reason}: {}", index[0].reason);
        assert_eq!(index[0].reason.is_empty(), reason.is_empty());
    }
}
