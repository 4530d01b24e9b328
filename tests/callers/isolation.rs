//! One caller's bad row in a batch with 31 good ones of others, on each engine.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate::batch::{BatchError, Lane, LaneParts, Ran, ThreadBudget};
use tidegate::domain::{BatchSettings, DataType, Deadline, Digest, ErrorKind, ModelName, Shape};
use tidegate::domain::{Tensor, Version};
use tidegate::engine::ort::OrtBackend;
use tidegate::engine::tract::TractBackend;
use tidegate::engine::{Artifact, Backend, LoadOptions, Model};
use tidegate::observe::{Observer, VersionStats};

const ROWS: usize = 32;
/// The scheduler may close a batch before all are there; so often it is tried again until the
/// poison has had company.
const TRIES: usize = 20;
/// Rows that count as company.
const COMPANY: usize = 8;

fn load(backend: &dyn Backend, name: &str) -> Arc<dyn Model> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/fixtures/{name}.onnx"));
    let options = LoadOptions { intra_threads: 1, sessions: 1, providers: Vec::new() };
    backend.load(&Artifact { path, derived: None }, &options).unwrap()
}

fn lane(model: &dyn Model) -> Arc<Lane> {
    let name: ModelName = "m".parse().unwrap();
    let version = Version::new(1).unwrap();
    let digest = Digest::new([0; 32]);
    let stats = VersionStats::new(&Observer::default(), &name, version, &digest, "test");
    // Closed when all are there.
    let batch = BatchSettings {
        size_max: ROWS,
        wait_max: Duration::from_secs(20),
        ..BatchSettings::default()
    };
    let parts = LaneParts {
        model: name,
        version,
        batch,
        batched: true,
        sessions: vec![model.session().unwrap()],
        stats,
        budget: Arc::new(ThreadBudget::new(1)),
        padding: None,
    };
    Arc::new(Lane::new(parts).unwrap())
}

/// Each row as a request of its own, all at once.
async fn together(lane: &Arc<Lane>, rows: &[Tensor]) -> Vec<Result<Ran, BatchError>> {
    let deadline = Deadline::new(tokio::time::Instant::now(), Duration::from_secs(60));
    let asked = rows.iter().map(|row| {
        let (lane, row) = (Arc::clone(lane), row.clone());
        tokio::spawn(async move { lane.infer(vec![row], deadline, 0).await })
    });
    let mut answers = Vec::new();
    for one in asked.collect::<Vec<_>>() {
        answers.push(one.await.unwrap());
    }
    answers
}

fn tensor(datatype: DataType, shape: &[usize], data: Vec<u8>) -> Tensor {
    Tensor::new(datatype, Shape::from_slice(shape), data.into()).unwrap()
}

fn index(at: i64) -> Tensor {
    tensor(DataType::Int64, &[1], at.to_le_bytes().to_vec())
}

fn pair(a: f32, b: f32) -> Tensor {
    let data = [a, b].iter().flat_map(|value| value.to_le_bytes()).collect();
    tensor(DataType::Fp32, &[1, 2], data)
}

fn engines() -> [Box<dyn Backend>; 2] {
    let ort = OrtBackend::open(None)
        .unwrap_or_else(|error| panic!("this needs ONNX Runtime, see `make ort`: {error}"));
    [Box::new(ort), Box::new(TractBackend::new())]
}

/// A row that fails the run it is in.
#[tokio::test]
async fn a_row_that_fails_leaves_31_of_31_bit_equal() {
    for engine in engines() {
        let model = load(&*engine, "lookup");
        let mut alone = model.session().unwrap();
        let lane = lane(&*model);
        let rows = |poison: Option<usize>| -> Vec<Tensor> {
            let at =
                |row| if Some(row) == poison { 1 << 40 } else { i64::try_from(row % 4).unwrap() };
            (0..ROWS).map(|row| index(at(row))).collect()
        };
        // The rows do meet in batches.
        let together_once = async || {
            let answers = together(&lane, &rows(None)).await;
            answers.iter().all(|ran| ran.as_ref().unwrap().batch_size >= COMPANY)
        };
        assert!(tried(together_once).await, "{}", engine.name());
        for poison in [0, 17, ROWS - 1] {
            let rows = rows(Some(poison));
            let start = Instant::now();
            let answers = together(&lane, &rows).await;
            let mut equal = 0;
            for (at, (row, answer)) in rows.iter().zip(&answers).enumerate() {
                if at == poison {
                    let failure = answer.clone().map(|_| ()).unwrap_err().into_failure();
                    let kind = failure.kind;
                    let own = matches!(kind, ErrorKind::InvalidInput | ErrorKind::ModelFailed);
                    assert!(own, "{}: {failure:?}", engine.name());
                } else {
                    let expected = alone.run(std::slice::from_ref(row)).unwrap();
                    equal += usize::from(answer.as_ref().unwrap().outputs == expected);
                }
            }
            eprintln!(
                "{}, poison at {poison}: {equal} of 31 in {:?}",
                engine.name(),
                start.elapsed()
            );
            assert_eq!(equal, ROWS - 1);
        }
    }
}

/// A row of NaN and infinities, which runs with the others.
#[tokio::test]
async fn a_row_of_nan_leaves_31_of_31_bit_equal() {
    for engine in engines() {
        let model = load(&*engine, "mlp");
        let mut alone = model.session().unwrap();
        let lane = lane(&*model);
        for poison in [f32::NAN, f32::INFINITY, f32::MIN_POSITIVE / 2.0] {
            let x = |row: usize| f32::from(u8::try_from(row).unwrap()) / 7.0 - 2.0;
            let mut rows: Vec<Tensor> = (0..ROWS).map(|row| pair(x(row), -x(row))).collect();
            rows[11] = pair(poison, poison);
            let expected: Vec<Vec<Tensor>> =
                rows.iter().map(|row| alone.run(std::slice::from_ref(row)).unwrap()).collect();
            let in_company = tried(async || {
                let answers = together(&lane, &rows).await;
                let equal = |(at, answer): (usize, &Result<Ran, BatchError>)| {
                    answer.as_ref().unwrap().outputs == expected[at]
                };
                let equal = answers
                    .iter()
                    .enumerate()
                    .filter(|(at, _)| *at != 11)
                    .filter(|one| equal(*one));
                assert_eq!(equal.count(), ROWS - 1, "{poison} on {}", engine.name());
                answers[11].as_ref().unwrap().batch_size >= COMPANY
            });
            assert!(in_company.await, "{poison} on {}", engine.name());
            eprintln!("{}, {poison} at 11: 31 of 31", engine.name());
        }
    }
}

/// Whether `attempt` succeeds once.
async fn tried(mut attempt: impl AsyncFnMut() -> bool) -> bool {
    for _ in 0..TRIES {
        if attempt().await {
            return true;
        }
    }
    false
}
