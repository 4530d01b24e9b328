//! What each step of a request costs, from the bytes that came to the bytes that go.
//!
//! `make bench` runs all of it, `cargo bench -- decode` one group. Figures are of one thread, with
//! everything in the caches: the least that a step costs, not what it costs under load.

#![expect(clippy::unwrap_used, reason = "a benchmark stops at the first surprise")]

use std::collections::{BTreeMap, HashMap};
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::{BufMut, Bytes, BytesMut};
use criterion::{BatchSize, Criterion, Throughput, criterion_group, criterion_main};
use http_body_util::{BodyExt, Full};
use prost::Message;
use tidegate::batch::ThreadBudget;
use tidegate::domain::{
    Arm, BatchSettings, CallMeta, Completion, DataType, Deadline, Dim, EngineChoice, ErrorKind,
    ModelName, Outcome, Protocol, RULES_MAX, RouteHeaders, RouteReason, Shape, Signature, Tensor,
    TensorSpec, Timings, Traffic, Version,
};
use tidegate::engine::conformance::make_inputs;
use tidegate::engine::{Artifact, EngineError, Engines, LoadOptions, Session};
use tidegate::gateway;
use tidegate::monitor::{Given, Monitor, VersionReport};
use tidegate::observe::Observer;
use tidegate::proto::inference as pb;
use tidegate::route::{Keys, Mirror, ModelRoutes, Pick, Published, RouteTable, Served};
use tidegate::shadow::{self, Origin, Shadows};
use tidegate::transport::grpc::{self, Grpc};
use tidegate::transport::http::{binary, elements};
use tidegate::transport::shm::SharedMemory;
use tidegate::transport::{Api, Settings, http as rest};
use tokio::runtime::Runtime;
use tokio::time::Instant;

#[expect(unreachable_pub, reason = "shared with the tests")]
#[path = "../tests/support/gateway.rs"]
mod gateway_of;

/// A picture of 224 by 224 in three colours, in FP32: 602,112 bytes.
const PICTURE: usize = 3 * 224 * 224;
/// A small model's input: 200 bytes.
const SMALL: usize = 50;

fn floats(count: usize) -> Vec<f32> {
    (0..count).map(|at| (at % 1000) as f32 / 7.0).collect()
}

fn raw(count: usize) -> Bytes {
    floats(count).iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn tensor(rows: usize, width: usize) -> Tensor {
    Tensor::new(DataType::Fp32, Shape::from_slice(&[rows, width]), raw(rows * width)).unwrap()
}

/// A model that costs nothing: what remains is ours.
struct Echo;

impl Session for Echo {
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        Ok(inputs.to_vec())
    }
}

fn echo(observer: &Observer, name: &str, workers: usize, batch: BatchSettings) -> Arc<Served> {
    let spec = |name: &str| TensorSpec {
        name: name.to_owned(),
        datatype: DataType::Fp32,
        shape: Some(vec![Dim::Dynamic(None), Dim::Dynamic(None)]),
    };
    let signature = Signature { inputs: vec![spec("x")], outputs: vec![spec("y")], batched: true };
    let sessions = (0..workers).map(|_| Box::new(Echo) as Box<dyn Session>).collect();
    let budget = Arc::new(ThreadBudget::new(2));
    gateway_of::served(observer, &budget, name, &signature, sessions, batch)
}

/// Two workers that take requests as they come and give them back as they are.
fn api() -> Arc<Api> {
    let observer = Observer::new(tidegate::observe::Settings::default());
    let model = echo(&observer, "echo", 1, BatchSettings::default());
    let control = Arc::new(gateway_of::NoControl);
    gateway_of::api(observer, control, [model], gateway::Settings::default(), Settings::default())
}

fn http_json(count: usize) -> Bytes {
    let data = serde_json::to_string(&floats(count)).unwrap();
    let input = format!(r#"{{"name":"x","datatype":"FP32","shape":[1,{count}],"data":{data}}}"#);
    format!(r#"{{"inputs":[{input}]}}"#).into()
}

/// Body, and length of its JSON.
fn http_binary(count: usize) -> (Bytes, usize) {
    let size = count * 4;
    let input = format!(
        r#"{{"name":"x","datatype":"FP32","shape":[1,{count}],"parameters":{{"binary_data_size":{size}}}}}"#
    );
    let json = format!(r#"{{"inputs":[{input}],"parameters":{{"binary_data_output":true}}}}"#);
    let mut body = BytesMut::with_capacity(json.len() + size);
    body.put(json.as_bytes());
    body.put(raw(count));
    (body.freeze(), json.len())
}

fn grpc_message(count: usize, typed: bool) -> pb::ModelInferRequest {
    let contents = pb::InferTensorContents { fp32_contents: floats(count), ..Default::default() };
    let input = pb::model_infer_request::InferInputTensor {
        name: "x".to_owned(),
        datatype: "FP32".to_owned(),
        shape: vec![1, i64::try_from(count).unwrap()],
        parameters: HashMap::new(),
        contents: typed.then_some(contents),
    };
    pb::ModelInferRequest {
        model_name: "echo".to_owned(),
        inputs: vec![input],
        raw_input_contents: if typed { Vec::new() } else { vec![raw(count)] },
        ..Default::default()
    }
}

fn decode(c: &mut Criterion) {
    let mut group = c.benchmark_group("decode");
    for (size, count) in [("200B", SMALL), ("600KB", PICTURE)] {
        group.throughput(Throughput::Bytes((count * 4) as u64));
        let (body, json_len) = http_binary(count);
        group.bench_function(format!("http_binary/{size}"), |b| {
            b.iter(|| binary::decode(black_box(&body), Some(json_len), &|_| unreachable!()));
        });
        let body = http_json(count);
        group.bench_function(format!("http_json/{count}_floats"), |b| {
            b.iter(|| binary::decode(black_box(&body), None, &|_| unreachable!()));
        });
        for (form, typed) in [("raw", false), ("fp32_contents", true)] {
            let body = Bytes::from(grpc_message(count, typed).encode_to_vec());
            let shm = SharedMemory::new(false);
            group.bench_function(format!("grpc_{form}/{size}"), |b| {
                b.iter(|| grpc::decode(black_box(body.clone()), &shm, 0, &|_| Ok(())));
            });
        }
    }
    group.finish();
}

fn pick(c: &mut Criterion) {
    let mut group = c.benchmark_group("pick");
    let observer = Observer::default();
    let served = echo(&observer, "echo", 0, BatchSettings::default());
    for count in [1_usize, 100, 10_000] {
        // All share one version: what is measured is finding it.
        let one = gateway_of::table([Arc::clone(&served)]);
        let routes = one.models.values().next().unwrap();
        let name = |at: usize| format!("model-{at}").parse::<ModelName>().unwrap();
        let models = (0..count).map(|at| (name(at), routes.clone())).collect();
        let table = Published::new(RouteTable { models, ..RouteTable::default() });
        let wanted = name(count / 2);
        group.bench_function(format!("{count}_models"), |b| {
            b.iter(|| table.snapshot().pick(black_box(&wanted), None));
        });
    }
    for (name, split, key) in [
        ("none", None, None),
        ("by_key", Some(r#"{"weights": {"1": 95, "2": 5}}"#), Some("user-4711")),
        ("by_id", Some(r#"{"weights": {"1": 95, "2": 5}}"#), None),
        ("16_versions", Some(SIXTEEN), Some("user-4711")),
        ("32_rules", Some(RULES), Some("user-4711")),
        ("shadow", Some(SHADOW), Some("user-4711")),
    ] {
        let mut routes = ModelRoutes::default();
        for number in 1..=16 {
            routes.versions.insert(Version::new(number).unwrap(), Arc::clone(&served));
        }
        let mut traffic: Option<Traffic> = split.map(|text| serde_json::from_str(text).unwrap());
        if let Some(traffic) = &mut traffic {
            // One rule becomes as many as there may be; none of them matches.
            traffic.rules = traffic.rules.iter().cycle().take(RULES_MAX).cloned().collect();
        }
        routes.set_traffic(traffic.as_ref(), 7);
        let models = BTreeMap::from([("m".parse().unwrap(), routes)]);
        let table = Published::new(RouteTable { models, ..RouteTable::default() });
        let wanted: ModelName = "m".parse().unwrap();
        let call = CallMeta {
            protocol: Protocol::Http,
            received: Instant::now(),
            timeout: None,
            trace: None,
            sticky_key: key.map(str::to_owned),
            headers: RouteHeaders {
                named: vec![("x-group".into(), "nobody".to_owned())],
                ..RouteHeaders::default()
            },
            principal: None,
        };
        let keys = Keys { call: &call, parameters: &[], prediction_id: uuid::Uuid::now_v7() };
        group.bench_function(format!("split/{name}"), |b| {
            b.iter(|| table.look(|table| table.pick_for(black_box(&wanted), None, &keys)));
        });
    }
    group.finish();
}

const SIXTEEN: &str = r#"{"weights": {"1": 85, "2": 1, "3": 1, "4": 1, "5": 1, "6": 1, "7": 1,
    "8": 1, "9": 1, "10": 1, "11": 1, "12": 1, "13": 1, "14": 1, "15": 1, "16": 1}}"#;
const RULES: &str = r#"{"weights": {"1": 95, "2": 5}, "rules": [
    {"name": "beta", "header": "x-group", "equals": "beta", "version": "2"}]}"#;
const SHADOW: &str =
    r#"{"weights": {"1": 95, "2": 5}, "shadows": [{"version": "3", "percent": 100}]}"#;

/// What a request pays for its shadow: leaving a copy where there is room, and where there is none.
fn copies(c: &mut Criterion) {
    let mut group = c.benchmark_group("shadow");
    let observer = Observer::new(tidegate::observe::Settings::default());
    let primary = echo(&observer, "primary", 0, BatchSettings::default());
    let stuck = echo(&observer, "stuck", 0, BatchSettings::default());
    let cheap = echo(&observer, "cheap", 1, BatchSettings::default());
    cheap.lane.seed(vec![tensor(1, SMALL)], Duration::from_micros(1));
    for (name, served) in [("room", cheap), ("no_room", stuck)] {
        let shadows = Shadows::new(shadow::Settings::default(), Arc::clone(&observer));
        let mirrors = [Mirror { served: Arc::downgrade(&served), share: 10_000 }];
        let mirrors = mirrors.into_iter().collect();
        let (arm, reason) = (Arm::Stable, RouteReason::Latest);
        let pick = Pick { served: Arc::clone(&primary), arm, reason, mirrors };
        group.bench_function(format!("offer/{name}"), |b| {
            b.iter_batched(
                || {
                    // The other's queue is full, and stays so.
                    while name == "room" && shadows.in_progress() > 200 {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    completion(&primary, Outcome::Ok)
                },
                |completion| shadows.offer(&pick, completion, Origin::default()),
                BatchSize::NumIterations(20),
            );
        });
    }
    group.finish();
}

fn form_a_batch(c: &mut Criterion) {
    let mut group = c.benchmark_group("form_a_batch");
    for (size, width) in [("200B", SMALL), ("600KB", PICTURE)] {
        for count in [1_usize, 8, 32] {
            let rows: Vec<Tensor> = (0..count).map(|_| tensor(1, width)).collect();
            let parts: Vec<&Tensor> = rows.iter().collect();
            group.throughput(Throughput::Elements(count as u64));
            group.bench_function(format!("join_and_cut/{size}/{count}"), |b| {
                b.iter(|| {
                    let joined = Tensor::concat(black_box(&parts)).unwrap();
                    (0..count).map(|at| joined.rows(at, at + 1).unwrap()).collect::<Vec<_>>()
                });
            });
        }
    }
    group.finish();
}

/// From a request to its outputs, without transport: where it stands, and through the queue.
fn lane(c: &mut Criterion) {
    let mut group = c.benchmark_group("lane");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let observer = Observer::default();
    let input = tensor(1, SMALL);

    let inline = echo(&observer, "inline", 1, BatchSettings::default());
    group.bench_function("inline", |b| {
        per_call(b, &runtime, || inline.lane.infer(vec![input.clone()], soon(), 0));
    });
    for count in [1_usize, 8, 32] {
        // A window that only a full batch ends: no request runs where it stands.
        let batch = BatchSettings {
            size_max: count,
            wait_max: Duration::from_secs(20),
            ..BatchSettings::default()
        };
        let queued = echo(&observer, "queued", 1, batch);
        group.throughput(Throughput::Elements(count as u64));
        group.bench_function(format!("queued/{count}"), |b| {
            per_call(b, &runtime, || {
                let calls: Vec<_> = (0..count)
                    .map(|_| Box::pin(queued.lane.infer(vec![input.clone()], soon(), 0)))
                    .collect();
                all(calls)
            });
        });
    }
    group.finish();
}

fn soon() -> Deadline {
    Deadline::new(Instant::now(), Duration::from_secs(60))
}

/// Polls all until all are done.
async fn all<F: Future + Unpin>(mut calls: Vec<F>) {
    std::future::poll_fn(|cx| {
        calls.retain_mut(|call| std::pin::Pin::new(call).poll(cx).is_pending());
        if calls.is_empty() { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

/// Times `call` inside the runtime, so that entering it is not counted.
fn per_call<F: Future>(b: &mut criterion::Bencher<'_>, runtime: &Runtime, call: impl Fn() -> F) {
    b.iter_custom(|times| {
        runtime.block_on(async {
            let started = std::time::Instant::now();
            for _ in 0..times {
                black_box(call().await);
            }
            started.elapsed()
        })
    });
}

fn execute(c: &mut Criterion) {
    let mut group = c.benchmark_group("execute");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let models = [
        ("mlp", "tests/fixtures/mlp.onnx"),
        ("iris", "models/iris/2/model.onnx"),
        ("digits", "models/digits/1/model.onnx"),
    ];
    for (engine, choice) in [("ort", EngineChoice::Ort), ("tract", EngineChoice::Tract)] {
        // Without the library (`make ort`) there is the one engine.
        let Ok(engines) = Engines::open(choice, None) else { continue };
        for (name, path) in models {
            let artifact = Artifact { path: root.join(path), derived: None };
            let options = LoadOptions { intra_threads: 1, sessions: 1, providers: Vec::new() };
            // Not every model runs on each engine.
            let Ok((_, model)) = engines.load(choice, &artifact, &options) else { continue };
            let mut session = model.session().unwrap();
            for rows in [1, 32] {
                let inputs = make_inputs(model.signature(), rows).unwrap();
                group.throughput(Throughput::Elements(rows as u64));
                group.bench_function(format!("{engine}/{name}/{rows}"), |b| {
                    b.iter(|| session.run(black_box(&inputs)).unwrap());
                });
            }
        }
    }
    group.finish();
}

fn encode(c: &mut Criterion) {
    let mut group = c.benchmark_group("encode");
    for (size, count) in [("200B", SMALL), ("600KB", PICTURE)] {
        group.throughput(Throughput::Bytes((count * 4) as u64));
        let output = tensor(1, count);
        group.bench_function(format!("http_json/{count}_floats"), |b| {
            b.iter_batched(
                || Vec::with_capacity(count * 16),
                |mut out| {
                    elements::write_flat(black_box(&output), &mut out).unwrap();
                    out
                },
                BatchSize::LargeInput,
            );
        });
        let message = pb::ModelInferResponse {
            model_name: "echo".to_owned(),
            model_version: "1".to_owned(),
            outputs: vec![pb::model_infer_response::InferOutputTensor {
                name: "y".to_owned(),
                datatype: "FP32".to_owned(),
                shape: vec![1, i64::try_from(count).unwrap()],
                ..Default::default()
            }],
            raw_output_contents: vec![output.data().clone()],
            ..Default::default()
        };
        group.bench_function(format!("grpc_raw/{size}"), |b| {
            b.iter(|| black_box(&message).encode_to_vec());
        });
    }
    group.finish();
}

/// From a request to a response, all but the connection: the model costs nothing.
fn whole_request(c: &mut Criterion) {
    let mut group = c.benchmark_group("whole_request");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let api = api();
    let grpc = Grpc::new(Arc::clone(&api));
    for (size, count) in [("200B", SMALL), ("600KB", PICTURE)] {
        let (body, json_len) = http_binary(count);
        group.bench_function(format!("http_binary/{size}"), |b| {
            per_call(b, &runtime, || http_call(&api, &body, Some(json_len)));
        });
        let body = http_json(count);
        group.bench_function(format!("http_json/{size}"), |b| {
            per_call(b, &runtime, || http_call(&api, &body, None));
        });
        let message = grpc_message(count, false).encode_to_vec();
        let mut framed = BytesMut::with_capacity(message.len() + 5);
        framed.put_u8(0);
        framed.put_u32(u32::try_from(message.len()).unwrap());
        framed.put(&message[..]);
        let framed = framed.freeze();
        group.bench_function(format!("grpc/{size}"), |b| {
            per_call(b, &runtime, || grpc_call(&grpc, &framed));
        });
    }
    group.finish();
}

async fn http_call(api: &Arc<Api>, body: &Bytes, json_len: Option<usize>) -> usize {
    let mut request = http::Request::post("/v2/models/echo/infer");
    if let Some(json_len) = json_len {
        request = request.header("inference-header-content-length", json_len);
    }
    let request = request.body(Full::new(body.clone())).unwrap();
    let response = rest::handle(Arc::clone(api), request).await;
    assert_eq!(response.status(), 200);
    response.into_body().collect().await.unwrap().to_bytes().len()
}

async fn grpc_call(grpc: &Grpc, body: &Bytes) -> usize {
    let request = http::Request::post("/inference.GRPCInferenceService/ModelInfer")
        .version(http::Version::HTTP_2)
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    let response = grpc.call(request.body(Full::new(body.clone())).unwrap()).await;
    let collected = response.into_body().collect().await.unwrap();
    assert_eq!(collected.trailers().unwrap()["grpc-status"], "0");
    collected.to_bytes().len()
}

fn record(c: &mut Criterion) {
    let mut group = c.benchmark_group("record");
    let observer = Observer::default();
    let served = echo(&observer, "echo", 0, BatchSettings::default());
    for (name, outcome) in [
        ("ok", Outcome::Ok),
        ("failed", Outcome::Failed { kind: ErrorKind::Overloaded, message: "full".to_owned() }),
    ] {
        let completion = completion(&served, outcome);
        group.bench_function(format!("completed/{name}"), |b| {
            b.iter(|| observer.completed(Some(&served.stats), black_box(&completion)));
        });
    }
    for count in [1_usize, 100] {
        let observer = Observer::default();
        let models: Vec<_> = (0..count)
            .map(|at| echo(&observer, &format!("model-{at}"), 0, BatchSettings::default()))
            .collect();
        for served in &models {
            observer.completed(Some(&served.stats), &completion(served, Outcome::Ok));
        }
        group.bench_function(format!("page/{count}_models"), |b| b.iter(|| observer.page(None)));
    }
    let (observer, _kept) = everything_shown(100);
    let protobuf = Some(tidegate::observe::page::PROTOBUF);
    for (name, accept) in [("text", None), ("protobuf", protobuf)] {
        group.bench_function(format!("page/100_models_all_series/{name}"), |b| {
            b.iter(|| observer.page(accept));
        });
    }
    group.finish();
}

/// So many models with two arms over two protocols each, and the monitor's series of all of them: as
/// many features are watched as the usual limit lets be. And what has to live as long.
fn everything_shown(count: usize) -> (Arc<Observer>, impl Sized) {
    let observer = Observer::new(tidegate::observe::Settings::default());
    let models: Vec<_> = (0..count)
        .map(|at| echo(&observer, &format!("model-{at}"), 0, BatchSettings::default()))
        .collect();
    let state = tempfile::tempdir().unwrap();
    let settings = tidegate::monitor::Settings {
        interval: Duration::from_secs(1),
        values_per_second_max: 1 << 40,
        provisional_rows: 200,
        ..tidegate::monitor::Settings::new(state.path())
    };
    let features = settings.features_max / count / 2;
    let monitor = Monitor::start(settings).unwrap().unwrap();
    let spec = |name: &str, width: usize| TensorSpec {
        name: name.to_owned(),
        datatype: DataType::Fp32,
        shape: Some(vec![Dim::Dynamic(None), Dim::Fixed(width)]),
    };
    let (inputs, outputs) = (vec![spec("x", features - 1)], vec![spec("y", 1)]);
    let signature = Signature { inputs, outputs, batched: true };
    let mut watches = Vec::new();
    for served in &models {
        for (arm, protocol) in [Arm::Stable, Arm::Canary]
            .into_iter()
            .flat_map(|arm| [(arm.clone(), Protocol::Http), (arm, Protocol::Grpc)])
        {
            let arm = Some(arm);
            let completion = Completion { arm, protocol, ..completion(served, Outcome::Ok) };
            observer.completed(Some(&served.stats), &completion);
        }
        let (given, hidden) = (Given::Nothing, Vec::new());
        let watch =
            monitor.watch(&served.model, served.version, served.digest, &signature, given, hidden);
        // What is learnt from, and then rows to compare.
        watch.offer(&Arm::Stable, &[tensor(200, features - 1)], &[tensor(200, 1)]);
        watches.push(watch);
    }
    let all = |wanted: &dyn Fn(&VersionReport) -> bool| {
        while !models.iter().all(|of| monitor.reports(&of.model).iter().any(|it| wanted(it))) {
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    all(&|report| report.reference.kind == "provisional");
    for watch in &watches {
        for arm in [Arm::Stable, Arm::Canary] {
            watch.offer(&arm, &[tensor(200, features - 1)], &[tensor(200, 1)]);
        }
    }
    all(&|report| report.arms.len() == 2);
    let shown = Arc::clone(&monitor);
    observer.add_families(Box::new(move || shown.families()));
    let lines = observer.page(None).1.iter().filter(|byte| **byte == b'\n').count();
    eprintln!("{count} models: {lines} lines, {features} features in each of two arms");
    (observer, (models, watches, state))
}

fn completion(served: &Served, outcome: Outcome) -> Completion {
    Completion {
        prediction_id: uuid::Uuid::now_v7(),
        request_id: String::new(),
        received_at: SystemTime::now(),
        model: served.model.clone(),
        version: Some(served.version),
        digest: Some(served.digest),
        arm: Some(Arm::Stable),
        reason: Some(RouteReason::Latest),
        protocol: Protocol::Http,
        principal: None,
        trace: None,
        outcome,
        timings: Timings {
            queue: Duration::from_micros(3),
            compute_infer: Duration::from_micros(20),
            total: Duration::from_micros(45),
            ..Timings::default()
        },
        rows: 1,
        batch_size: 1,
        cached: false,
        shadow_of: None,
        inputs: vec![tensor(1, SMALL)],
        outputs: vec![tensor(1, SMALL)],
    }
}

criterion_group! {
    name = steps;
    config = Criterion::default()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2))
        .sample_size(30);
    targets = decode, pick, copies, form_a_batch, lane, execute, encode, whole_request, record
}
criterion_main!(steps);
