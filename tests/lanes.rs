//! Lanes on real engines: a row gets the same bits in a batch as alone, and a run that nobody waits
//! for is ended.

#![cfg(all(feature = "ort", feature = "tract"))]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tidegate::batch::{BatchError, Lane, LaneParts, Ran, ThreadBudget};
use tidegate::domain::{
    BatchSettings, DataType, Deadline, Digest, ErrorKind, ModelName, Shape, Tensor, Version,
};
use tidegate::engine::ort::OrtBackend;
use tidegate::engine::tract::TractBackend;
use tidegate::engine::{Artifact, Backend, LoadOptions, Model};
use tidegate::observe::{Observer, VersionStats};
use tokio::time::Instant;

/// A sum of two inputs in another order may differ by so much; see docs/tune.md.
const TOLERANCE: f32 = 1e-5;

fn ort() -> Arc<dyn Backend> {
    match OrtBackend::open(None) {
        Ok(backend) => Arc::new(backend),
        Err(error) => panic!("these tests need ONNX Runtime, which `make ort` fetches: {error}"),
    }
}

fn load(backend: &dyn Backend, path: &str) -> Arc<dyn Model> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    let options = LoadOptions { intra_threads: 1, sessions: 1, providers: Vec::new() };
    backend.load(&Artifact { path, derived: None }, &options).unwrap()
}

fn lane(model: &dyn Model, batched: bool, batch: BatchSettings) -> Arc<Lane> {
    let name: ModelName = "m".parse().unwrap();
    let version = Version::new(1).unwrap();
    let stats =
        VersionStats::new(&Observer::default(), &name, version, &Digest::new([0; 32]), "any");
    let parts = LaneParts {
        model: name,
        version,
        batch,
        batched,
        padding: None,
        sessions: vec![model.session().unwrap()],
        stats,
        budget: Arc::new(ThreadBudget::new(1)),
    };
    Arc::new(Lane::new(parts).unwrap())
}

async fn infer(lane: &Lane, inputs: Vec<Tensor>, wait: Duration) -> Result<Ran, BatchError> {
    lane.infer(inputs, Deadline::new(Instant::now(), wait), 0).await
}

/// Rows that differ, of the model's only input.
fn row(model: &dyn Model, at: usize) -> Tensor {
    let spec = &model.signature().inputs[0];
    let mut shape: Shape =
        spec.wire_shape().iter().map(|dim| usize::try_from(*dim).unwrap_or(8)).collect();
    shape[0] = 1;
    let elements: usize = shape.iter().product();
    let value = |i: usize| u8::try_from((i * 7 + at * 13) % 31).unwrap();
    let data: Vec<u8> = match spec.datatype {
        DataType::Fp32 => {
            (0..elements).flat_map(|i| (f32::from(value(i)) / 31.0 - 0.5).to_le_bytes()).collect()
        }
        DataType::Int64 => {
            (0..elements).flat_map(|i| i64::from(value(i) % 16).to_le_bytes()).collect()
        }
        other => panic!("no values for {other}"),
    };
    Tensor::new(spec.datatype, shape, data.into()).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_row_in_a_batch_is_what_it_is_alone() {
    const ROWS: usize = 24;
    let tract: Arc<dyn Backend> = Arc::new(TractBackend::new());
    let models =
        ["tests/fixtures/mlp.onnx", "tests/fixtures/tokens.onnx", "tests/fixtures/unmasked.onnx"];
    let (mut same, mut all, mut joined) = (0, 0, 0);
    for backend in [ort(), tract] {
        for path in models {
            let model = load(&*backend, path);
            if model.signature().inputs.len() != 1 {
                continue;
            }
            // Whoever comes within a usual gap or two joins.
            let wait_max = Duration::from_secs(20);
            let batch = BatchSettings { size_max: ROWS, wait_max, ..BatchSettings::default() };
            let lane = lane(&*model, true, batch);
            let calls: Vec<_> = (0..ROWS)
                .map(|at| {
                    let (lane, inputs) = (Arc::clone(&lane), vec![row(&*model, at)]);
                    tokio::spawn(async move { infer(&lane, inputs, wait_max).await })
                })
                .collect();
            let mut session = model.session().unwrap();
            for (at, call) in calls.into_iter().enumerate() {
                let together = call.await.unwrap().unwrap();
                joined += usize::from(together.batch_size > 1);
                let alone = session.run(&[row(&*model, at)]).unwrap();
                for (alone, together) in alone.iter().zip(&together.outputs) {
                    all += 1;
                    same += usize::from(alone == together);
                    if alone == together || alone.datatype() != DataType::Fp32 {
                        assert_eq!(alone, together, "{path} on {}", backend.name());
                        continue;
                    }
                    for (a, b) in floats(alone).into_iter().zip(floats(together)) {
                        let near = (a - b).abs() <= TOLERANCE * a.abs().max(1.0);
                        assert!(near, "{path} on {}: {a} alone, {b} together", backend.name());
                    }
                }
            }
        }
    }
    assert!(joined > ROWS, "only {joined} had company");
    eprintln!("{same} of {all} outputs have the same bits in a batch as alone");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_endless_loop_ends_with_its_deadline() {
    let model = load(&*ort(), "tests/fixtures/loop.onnx");
    let lane = lane(&*model, false, BatchSettings::default());
    let turns = |count: i64| {
        let data = count.to_le_bytes().to_vec();
        vec![Tensor::new(DataType::Int64, Shape::from_slice(&[1]), data.into()).unwrap()]
    };
    let patient = Duration::from_secs(60);
    let three = infer(&lane, turns(3), patient).await.unwrap();
    assert_eq!(floats(&three.outputs[0]), [3.0]);
    // Hours of work. What comes next gets its turn only if that is ended.
    let late = infer(&lane, turns(1 << 40), Duration::from_millis(300)).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::DeadlineExceeded);
    let next = infer(&lane, turns(5), patient).await.unwrap();
    assert_eq!(floats(&next.outputs[0]), [5.0]);
    // And when the caller goes away.
    let gone = tokio::time::timeout(
        Duration::from_millis(300),
        infer(&lane, turns(1 << 40), Duration::from_secs(3600)),
    );
    assert!(gone.await.is_err());
    let next = infer(&lane, turns(7), patient).await.unwrap();
    assert_eq!(floats(&next.outputs[0]), [7.0]);
}
