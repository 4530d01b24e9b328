//! Models whose output is as large as an input's value says, in a gateway under a memory limit.

use std::fmt::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;
use tidegate::domain::ModelSettings;
use tidegate::engine::fake::FakeModel;
use tidegate::gateway;
use tidegate::proto::inference as pb;
use tidegate::transport::Settings;

use crate::onnx;
use crate::process::{Process, put};
use crate::support::{Inside, message};

/// Address space of the whole process: what would bring the kernel's killer elsewhere.
const SPACE_MB: u64 = 8192;
/// Arena of ONNX Runtime's runs.
const RUNS_MB: u64 = 1024;
/// Largest outputs of one request.
const OUTPUT_MB: u64 = 64;

/// 32 GiB; 4 GiB; just over the arena; over the outputs' limit but not the arena's.
const SIZES: [u64; 4] = [1 << 33, 1 << 30, 1 << 28, 1 << 25];

fn body(model: &str, n: u64) -> Vec<u8> {
    let mut inputs = vec![json!({"name": "n", "datatype": "INT64", "shape": [1], "data": [n]})];
    if !matches!(model, "fill" | "range") {
        inputs.push(json!({"name": "x", "datatype": "FP32", "shape": [1], "data": [1.5]}));
    }
    let outputs = [json!({"name": "y", "parameters": {"binary_data": true}})];
    json!({"inputs": inputs, "outputs": outputs}).to_string().into_bytes()
}

/// A tensor of 14 GB from an input of 240 kB: no value is needed, shapes do.
fn square_up(process: &Process) -> (u16, String) {
    let n = 60_000;
    let input = json!({"name": "x", "datatype": "FP32", "shape": [n, 1], "data": vec![1; n]});
    let body = json!({"inputs": [input]}).to_string();
    let (status, _, text) = process.connect().post("/v2/models/square/infer", "", body.as_bytes());
    (status, String::from_utf8_lossy(&text).into_owned())
}

fn explode(engine: &str, sizes: &[u64], rounds: usize) {
    let root = tempfile::tempdir().unwrap();
    let models = root.path().join("models");
    let bombs = onnx::bombs();
    for (name, content) in &bombs {
        put(&models, name, content);
    }
    put(&models, "good", &onnx::relu());
    put(&models, "square", &onnx::square());
    let config = [
        ("TIDEGATE_ENGINE_ENGINE", engine),
        ("TIDEGATE_ENGINE_RUN_MEMORY_MAX_MB", &RUNS_MB.to_string()),
        ("TIDEGATE_SERVER_OUTPUT_BYTES_MAX", &(OUTPUT_MB << 20).to_string()),
    ];
    let limit = format!("ulimit -v {};", SPACE_MB * 1024);
    let mut process = Process::start(root.path(), &config, &limit);
    let idle = process.resident_mb();
    let loaded: Vec<&str> = bombs
        .iter()
        .map(|(name, _)| *name)
        .filter(|name| process.connect().get(&format!("/v2/models/{name}/ready")).0 == 200)
        .collect();
    eprintln!("{engine}: loaded {loaded:?}, idle at {idle} MiB");
    if engine == "ort" {
        assert_eq!(loaded.len(), bombs.len(), "{:#?}", process.lines.lock());
    }
    let (sent, answered) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let mut report = String::new();
    for round in 0..rounds {
        std::thread::scope(|scope| {
            for model in &loaded {
                let (process, sent, answered) = (&process, &sent, &answered);
                scope.spawn(move || {
                    for &n in sizes {
                        sent.fetch_add(1, Ordering::Relaxed);
                        let mut connection = process.connect();
                        let path = format!("/v2/models/{model}/infer");
                        let (status, _, text) = connection.post(&path, "", &body(model, n));
                        answered.fetch_add(1, Ordering::Relaxed);
                        // What fits the arena and leaves little is a run like others.
                        let fits = *model == "inner" && n == 1 << 25;
                        let text = String::from_utf8_lossy(&text);
                        assert!(
                            fits || matches!(status, 400 | 413 | 500),
                            "{model} {n}: {status} {text}"
                        );
                        if round == 0 {
                            eprintln!("{model} of {n}: {status} {text}");
                        }
                    }
                });
            }
            // Control requests answer throughout.
            for _ in 0..20 {
                assert_eq!(process.connect().get("/v2/health/live").0, 200);
            }
        });
        let good = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2],
            "data": [-1.0, 2.0]}]})
        .to_string();
        for _ in 0..4 {
            let answer = process.connect().post("/v2/models/good/infer", "", good.as_bytes());
            assert_eq!(answer.0, 200, "{}", String::from_utf8_lossy(&answer.2));
        }
        sent.fetch_add(1, Ordering::Relaxed);
        let (status, text) = square_up(&process);
        answered.fetch_add(1, Ordering::Relaxed);
        assert_eq!(status, 500, "{text}");
        assert!(text.contains("14400000000 bytes"), "{text}");
        write!(report, " {}", process.resident_mb()).unwrap();
    }
    assert!(process.alive(), "{:#?}", process.lines.lock());
    let (sent, answered) = (sent.into_inner(), answered.into_inner());
    eprintln!(
        "{engine}: {answered} of {sent} bombs answered, 0 kills; MiB after each round:{report}"
    );
    assert_eq!(sent, answered);
    let after = process.resident_mb();
    assert!(after < idle + RUNS_MB, "{after} MiB after, {idle} MiB before");
}

#[test]
fn bombs_are_errors_on_onnx_runtime() {
    explode("ort", &SIZES, 4);
}

#[test]
fn bombs_are_errors_on_tract() {
    explode("tract", &[1 << 40, 1 << 33, 1 << 28, 1 << 24], 4);
}

#[tokio::test]
async fn outputs_that_shapes_tell_are_refused_before_the_run() {
    let gateway = gateway::Settings { output_bytes_max: 80, ..gateway::Settings::default() };
    let inside = Inside::start(gateway).await;
    let (wide, narrow) = (FakeModel::new(2, 1.0), FakeModel::new(2, 1.0));
    inside.serve("wide", &wide, 1, ModelSettings::default());
    let own = ModelSettings { output_bytes_max: Some(40), ..ModelSettings::default() };
    inside.serve("narrow", &narrow, 1, own);
    for (model, fake, rows) in [("wide", &wide, 10), ("narrow", &narrow, 5)] {
        let ask = |rows: usize| {
            let data = vec![1.0; rows * 2];
            let shape = [i64::try_from(rows).unwrap(), 2];
            inside.grpc("ModelInfer", message(model, &shape, &data))
        };
        let answer: pb::ModelInferResponse = ask(rows).await.unwrap();
        assert_eq!(answer.outputs.len(), 1);
        let refused = ask(rows + 1).await.map(|_: pb::ModelInferResponse| ()).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::ResourceExhausted);
        let bytes = (rows + 1) * 8;
        let expected = format!("the outputs would take {bytes} bytes, the limit is {}", rows * 8);
        assert_eq!(refused.message(), expected);
        assert_eq!(fake.runs.load(Ordering::Relaxed), 1, "{model}");
    }
}

#[tokio::test]
async fn json_of_an_answer_is_bounded_and_binary_is_offered() {
    let settings = Settings { answer_json_max_bytes: 4096, ..Settings::default() };
    let inside = Inside::start_with(gateway::Settings::default(), settings).await;
    inside.serve("m", &FakeModel::new(2, 1.0), 1, ModelSettings::default());
    // A float of four bytes is written with up to twelve characters.
    let ask = async |rows: usize, form: &str| {
        let mut body = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [rows, 2],
            "data": vec![0.123_456_7; rows * 2]}]});
        body["outputs"] = json!([{"name": "y", "parameters": {"binary_data": form == "binary"}}]);
        let body = if form == "predict" {
            json!({"instances": vec![[0.123_456_7, 0.5]; rows]})
        } else {
            body
        };
        let path = if form == "predict" { "/v1/models/m:predict" } else { "/v2/models/m/infer" };
        inside.http("POST", path, body.to_string()).await
    };
    for form in ["json", "predict"] {
        assert_eq!(ask(100, form).await.status, 200, "{form}");
        let refused = ask(1000, form).await;
        assert_eq!(refused.status, 413, "{form}");
        let error = refused.json()["error"].as_str().unwrap().to_owned();
        assert!(error.starts_with("output 'y': the answer's JSON is over the limit of 4096 bytes"));
    }
    assert_eq!(ask(1000, "binary").await.status, 200);
}
