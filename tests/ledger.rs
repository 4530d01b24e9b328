//! What the ledger has of calls: each once, whatever became of it and over whatever it came; and
//! what a caller sees of the ledger.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use tidegate::batch::ThreadBudget;
use tidegate::domain::{
    BatchSettings, Capture, Durability, OnUnrecorded, RecordSettings, Signature, Tensor,
    TensorRule, Traffic, Treatment, Version,
};
use tidegate::engine::fake::FakeModel;
use tidegate::engine::{EngineError, Model as _, Session};
use tidegate::gateway::{self, Gateway};
use tidegate::ledger::reader::{self, SegmentReader};
use tidegate::ledger::record::{Kind, Record};
use tidegate::ledger::{self, Ledger, capture};
use tidegate::observe::Observer;
use tidegate::proto::inference as pb;
use tidegate::proto::inference::model_infer_request::InferInputTensor;
use tidegate::proto::ledger::tensor::Content;
use tidegate::proto::ledger::{Protocol, Tensor as Kept};
use tidegate::route::{ModelRoutes, Published, RouteTable, Served};
use tidegate::transport::listener::Listeners;
use tidegate::transport::shm::SharedMemory;
use tidegate::transport::toggles::Toggles;
use tidegate::transport::{Api, Health, Settings, http as rest};
use tokio_stream::StreamExt as _;
use tonic::transport::{Channel, Endpoint};

#[expect(unreachable_pub, dead_code, reason = "shared with other tests")]
#[path = "support/gateway.rs"]
mod gateway_of;

const SEQ: &str = "tidegate-ledger-seq";
const ID: &str = "tidegate-prediction-id";

/// A gateway with a ledger in a folder of its own.
struct Bench {
    dir: tempfile::TempDir,
    api: Arc<Api>,
    table: Arc<Published<RouteTable>>,
    observer: Arc<Observer>,
    budget: Arc<ThreadBudget>,
    ledger: Arc<Ledger>,
}

struct Got {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Got {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }

    fn seq(&self) -> Option<u64> {
        self.headers.get(SEQ).map(|value| value.to_str().unwrap().parse().unwrap())
    }

    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

impl Bench {
    fn new() -> Self {
        Self::with(tempfile::tempdir().unwrap(), |settings| settings.free_bytes_min = 0)
    }

    /// With models `fake` (`y = x + 1`, two numbers a row), `slow` (the same, in 300 ms) and `cached`.
    fn with(dir: tempfile::TempDir, change: impl FnOnce(&mut ledger::Settings)) -> Self {
        let mut settings = ledger::Settings::new(dir.path());
        change(&mut settings);
        let ledger = Ledger::open(settings, [("fake", "9.9".to_owned())]).unwrap();
        let observer = Observer::new(tidegate::observe::Settings::default());
        let table = Arc::new(Published::new(RouteTable::default()));
        let gateway = Gateway::new(
            Arc::clone(&table),
            Arc::clone(&observer),
            Arc::new(gateway_of::NoControl),
            gateway::Settings::default(),
        )
        .with_ledger(Arc::clone(&ledger));
        let settings = Settings {
            sticky_header: Some("x-user".to_owned()),
            subject_header: Some("x-subject".to_owned()),
            ..Settings::default()
        };
        let api = Arc::new(Api {
            gateway: Arc::new(gateway),
            health: Arc::new(Health::default()),
            shm: SharedMemory::new(false),
            toggles: Toggles::default(),
            intake: tidegate::transport::intake::Intake::new(&settings),
            settings,
        });
        api.health.set_ready();
        let budget = Arc::new(ThreadBudget::new(2));
        let bench = Self { dir, api, table, observer, budget, ledger };
        let mut slow = FakeModel::new(2, 1.0);
        slow.cost = Duration::from_millis(300);
        bench.put("fake", 1, &FakeModel::new(2, 1.0), |_| {});
        bench.put("slow", 1, &slow, |_| {});
        bench.put("cached", 1, &FakeModel::new(2, 1.0), |served| served.settings.cached = true);
        bench
    }

    fn put(&self, model: &str, number: u64, fake: &FakeModel, change: impl FnOnce(&mut Served)) {
        self.put_session(model, number, fake.signature(), fake.session().unwrap(), change);
    }

    fn put_session(
        &self,
        model: &str,
        number: u64,
        signature: &Signature,
        session: Box<dyn Session>,
        change: impl FnOnce(&mut Served),
    ) {
        let version = Version::new(number).unwrap();
        let of = (model.parse().unwrap(), version);
        let batch = BatchSettings::default();
        let served = gateway_of::served_as(
            &self.observer,
            &self.budget,
            of,
            signature,
            vec![session],
            batch,
        );
        let mut served = Arc::into_inner(served).unwrap();
        change(&mut served);
        self.change(model, |routes| drop(routes.versions.insert(version, Arc::new(served))));
    }

    fn change(&self, model: &str, change: impl FnOnce(&mut ModelRoutes)) {
        let mut table = RouteTable::clone(&self.table.snapshot());
        let routes = table.models.entry(model.parse().unwrap()).or_default();
        change(routes);
        routes.refresh();
        table.revision += 1;
        table.default_model = Some("fake".parse().unwrap());
        drop(self.table.publish(table));
    }

    /// As `change` says, held against the model's signature.
    fn record(&self, model: &str, change: impl FnOnce(&mut RecordSettings)) {
        let mut asked = RecordSettings::default();
        change(&mut asked);
        let fake = FakeModel::new(2, 1.0);
        let recording =
            capture::resolve(&asked, &RecordSettings::default(), fake.signature()).unwrap();
        self.put(model, 1, &fake, |served| served.recording = recording);
    }

    async fn post(&self, path: &str, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Got {
        let mut request = Request::post(path);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body.into())).unwrap();
        let (head, body) = rest::handle(Arc::clone(&self.api), request).await.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Got { status: head.status, headers: head.headers, body }
    }

    async fn infer(&self, model: &str, id: &str, x: f32) -> Got {
        let body = json!({"id": id,
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [x, x]}]});
        self.post(&format!("/v2/models/{model}/infer"), &[], body.to_string()).await
    }

    /// Ends the log, and reads all of it.
    async fn records(&self) -> BTreeMap<u64, Record> {
        self.ledger.close().await;
        records(self.dir.path())
    }

    async fn settled(&self) {
        let end = tokio::time::Instant::now() + Duration::from_secs(20);
        while self.api.gateway.shadows().in_progress() > 0 {
            assert!(tokio::time::Instant::now() < end, "waited too long");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Those of predictions, by number; none has another's number or id.
fn records(dir: &Path) -> BTreeMap<u64, Record> {
    let mut found = BTreeMap::new();
    let mut ids = std::collections::BTreeSet::new();
    let log = dir.join(ledger::FOLDER).join(ledger::PREDICTIONS);
    for segment in reader::segments(&log).unwrap() {
        let mut reader = SegmentReader::open(&segment).unwrap();
        while let Some(frame) = reader.next_frame().unwrap() {
            let record = Record::read(&frame).unwrap();
            if record.head.kind() == Kind::Prediction {
                assert!(ids.insert(record.prediction_id().unwrap()), "twice: {record:?}");
                assert!(found.insert(record.seq, record).is_none());
            }
        }
    }
    found
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn inputs(record: &Record) -> &[Kept] {
    &record.payload.as_ref().unwrap().inputs
}

fn content(tensor: &Kept) -> &Content {
    tensor.content.as_ref().unwrap()
}

fn message(model: &str, id: &str, x: f32) -> pb::ModelInferRequest {
    pb::ModelInferRequest {
        model_name: model.to_owned(),
        id: id.to_owned(),
        inputs: vec![InferInputTensor {
            name: "x".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![1, 2],
            ..InferInputTensor::default()
        }],
        raw_input_contents: vec![floats(&[x, x]).into()],
        ..pb::ModelInferRequest::default()
    }
}

async fn connected(bench: &Bench) -> (Listeners, tonic::client::Grpc<Channel>) {
    let mut listeners = Listeners::new(Arc::clone(&bench.api)).unwrap();
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", socket.local_addr().unwrap());
    listeners.serve(socket);
    let channel = Endpoint::from_shared(address).unwrap().connect_lazy();
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    (listeners, client)
}

#[tokio::test]
async fn every_answer_has_its_record_and_says_which() {
    let bench = Bench::new();
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let body = json!({"id": "mine",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": [1, 2, 3, 4]}]});
    let infer = bench
        .post("/v2/models/fake/versions/1/infer", &[("traceparent", trace)], body.to_string())
        .await;
    let instances = json!({"instances": [[1.0, 2.0]]}).to_string();
    let v1 = bench.post("/v1/models/fake:predict", &[], instances.clone()).await;
    let json = [("content-type", "application/json")];
    let invocations = bench.post("/invocations", &json, instances).await;
    for got in [&infer, &v1, &invocations] {
        assert_eq!(got.status, 200, "{:?}", got.body);
    }
    let (_listeners, mut client) = connected(&bench).await;
    let codec = tonic_prost::ProstCodec::<_, pb::ModelInferResponse>::default();
    let path = "/inference.GRPCInferenceService/ModelInfer".parse().unwrap();
    let request = tonic::Request::new(message("fake", "over grpc", 5.0));
    let unary = client.unary(request, path, codec).await.unwrap();
    let of_unary: u64 = unary.metadata().get(SEQ).unwrap().to_str().unwrap().parse().unwrap();
    let codec = tonic_prost::ProstCodec::<_, pb::ModelStreamInferResponse>::default();
    let path = "/inference.GRPCInferenceService/ModelStreamInfer".parse().unwrap();
    let messages = [message("fake", "first", 6.0), message("none", "second", 7.0)];
    client.ready().await.unwrap();
    let requests = tonic::Request::new(tokio_stream::iter(messages));
    let mut stream = client.streaming(requests, path, codec).await.unwrap().into_inner();
    let mut of_stream = Vec::new();
    while let Some(item) = stream.next().await {
        use pb::infer_parameter::ParameterChoice::StringParam;
        let response = item.unwrap().infer_response.unwrap();
        let seq = response.parameters[SEQ].parameter_choice.clone().unwrap();
        let StringParam(seq) = seq else { panic!("{seq:?}") };
        of_stream.push(seq.parse::<u64>().unwrap());
    }

    let records = bench.records().await;
    assert_eq!(records.len(), 6);
    let record = &records[&infer.seq().unwrap()];
    assert_eq!(record.prediction_id().unwrap().to_string(), infer.header(ID));
    let head = &record.head;
    assert_eq!((&*head.model, head.version, &*head.arm), ("fake", 1, "pinned"));
    assert_eq!((&*head.route_reason, &*head.status), ("version", "ok"));
    assert_eq!((&*head.engine, head.rows, head.batch_size), ("fake 9.9", 2, 2));
    assert_eq!(head.config_revision, bench.table.snapshot().revision);
    assert_eq!(head.trace_id[..], 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736_u128.to_be_bytes());
    assert_eq!(head.model_digest[..], [7; 32]);
    assert!(head.total_ns > 0 && head.compute_ns <= head.total_ns);
    let payload = record.payload.as_ref().unwrap();
    assert_eq!(payload.request_id, "mine");
    let [input] = &payload.inputs[..] else { panic!() };
    assert_eq!((&*input.name, &*input.datatype, &input.shape[..]), ("x", "FP32", &[2, 2][..]));
    assert_eq!(*content(input), Content::Data(floats(&[1.0, 2.0, 3.0, 4.0]).into()));
    let [output] = &payload.outputs[..] else { panic!() };
    assert_eq!(*content(output), Content::Data(floats(&[2.0, 3.0, 4.0, 5.0]).into()));
    for got in [&v1, &invocations] {
        let record = &records[&got.seq().unwrap()];
        assert_eq!(record.prediction_id().unwrap().to_string(), got.header(ID));
        assert_eq!(*content(&inputs(record)[0]), Content::Data(floats(&[1.0, 2.0]).into()));
    }
    let of = |seq| {
        let record: &Record = &records[&seq];
        let id = record.payload.as_ref().unwrap().request_id.clone();
        (record.head.protocol(), id, record.head.status.clone())
    };
    let words = |id: &str, status: &str| (id.to_owned(), status.to_owned());
    let (id, status) = words("over grpc", "ok");
    assert_eq!(of(of_unary), (Protocol::Grpc, id, status));
    let (id, status) = words("first", "ok");
    assert_eq!(of(of_stream[0]), (Protocol::GrpcStream, id, status));
    let (id, status) = words("second", "not_found");
    assert_eq!(of(of_stream[1]), (Protocol::GrpcStream, id, status));
}

#[tokio::test]
async fn what_failed_or_was_refused_is_recorded_as_that() {
    let bench = Bench::new();
    let wrong =
        json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [1, 2, 3]}]});
    let late = [("tidegate-timeout-ms", "1")];
    let right =
        json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}]});
    let fake = "/v2/models/fake/infer";
    let cases = [
        ("/v2/models/none/infer", &[][..], right.to_string(), "not_found", 0),
        ("/v2/models/fake/versions/7/infer", &[], right.to_string(), "not_found", 0),
        (fake, &[], "{\"inputs\": [".to_owned(), "invalid_input", 1),
        (fake, &[], wrong.to_string(), "invalid_input", 1),
        ("/v2/models/slow/infer", &late, right.to_string(), "deadline", 1),
    ];
    let mut asked = Vec::new();
    for (path, headers, body, code, version) in cases {
        let got = bench.post(path, headers, body).await;
        assert_eq!(got.json()["code"], code, "{path}");
        asked.push((got.seq().unwrap(), got.header(ID).to_owned(), code, version, got.json()));
    }
    let records = bench.records().await;
    assert_eq!(records.len(), asked.len());
    for (seq, id, code, version, body) in asked {
        let record = &records[&seq];
        assert_eq!(record.prediction_id().unwrap().to_string(), id);
        assert_eq!((&*record.head.status, record.head.version), (code, version));
        assert_eq!(body["error"], record.payload.as_ref().unwrap().error);
        assert!(record.payload.as_ref().unwrap().outputs.is_empty());
    }
}

/// JSON has no infinity: the model ran, and its caller gets an error.
#[tokio::test]
async fn an_answer_that_cannot_be_written_is_recorded_as_failed() {
    let bench = Bench::new();
    bench.put("endless", 1, &FakeModel::new(2, f32::INFINITY), |_| {});
    let got = bench.infer("endless", "1", 1.0).await;
    assert!(got.status.is_client_error() || got.status.is_server_error(), "{}", got.status);
    let code = got.json()["code"].as_str().unwrap().to_owned();
    let records = bench.records().await;
    assert_eq!(records[&got.seq().unwrap()].head.status, code);
    let (_, page) = bench.observer.page(None);
    let page = String::from_utf8(page.to_vec()).unwrap();
    let counted =
        |line: &&str| line.starts_with("tidegate_requests_total") && line.contains("\"endless\"");
    let lines: Vec<&str> = page.lines().filter(counted).collect();
    let outcome = format!("outcome=\"{code}\"");
    assert!(lines.iter().any(|line| line.contains(&outcome) && line.ends_with(" 1")), "{lines:?}");
    assert!(lines.iter().all(|line| line.contains(&outcome) || line.ends_with(" 0")), "{lines:?}");
}

#[tokio::test]
async fn a_caller_that_goes_away_leaves_one_record() {
    let bench = Bench::new();
    let went = tokio::time::timeout(Duration::from_millis(30), bench.infer("slow", "gone", 1.0));
    assert!(went.await.is_err());
    let records = bench.records().await;
    let all: Vec<&Record> = records.values().collect();
    let [record] = all[..] else { panic!("{records:?}") };
    assert_eq!((&*record.head.status, &*record.head.model), ("cancelled", "slow"));
    assert_eq!(record.payload.as_ref().unwrap().request_id, "gone");
}

#[tokio::test]
async fn answers_from_the_cache_are_recorded_as_that() {
    let bench = Bench::new();
    let first = bench.infer("cached", "", 1.0).await.seq().unwrap();
    let again = bench.infer("cached", "", 1.0).await.seq().unwrap();
    let records = bench.records().await;
    assert!(!records[&first].head.cached && records[&again].head.cached);
    let outputs = |seq| records[&seq].payload.as_ref().unwrap().outputs.clone();
    assert_eq!(outputs(first), outputs(again));
    assert_eq!(records[&again].head.batch_size, 0);
}

#[tokio::test]
async fn a_shadow_has_a_record_of_its_own() {
    let bench = Bench::new();
    bench.put("fake", 2, &FakeModel::new(2, 2.0), |_| {});
    let traffic = json!({"weights": {"1": 1}, "shadows": [{"version": "2", "percent": 100}]});
    let traffic: Traffic = serde_json::from_value(traffic).unwrap();
    bench.change("fake", |routes| routes.set_traffic(Some(&traffic), 7));
    let got = bench.infer("fake", "both", 1.0).await;
    bench.settled().await;
    let records = bench.records().await;
    assert_eq!(records.len(), 2);
    let answer = &records[&got.seq().unwrap()];
    let shadow = records.values().find(|record| !record.head.shadow_of.is_empty()).unwrap();
    assert_eq!(shadow.head.shadow_of, answer.head.prediction_id);
    assert_eq!((shadow.head.version, &*shadow.head.arm), (2, ""));
    assert_eq!(shadow.head.route_reason, "shadow share 10000");
    assert_eq!(shadow.head.config_revision, answer.head.config_revision);
    let output = &shadow.payload.as_ref().unwrap().outputs[0];
    assert_eq!(*content(output), Content::Data(floats(&[3.0, 3.0]).into()));
}

/// Texts of every kind that has ever broken a log.
fn hostile(at: u32) -> String {
    const PARTS: [&str; 16] = [
        "\r\n",
        "\0",
        "\u{1b}[2J",
        "\u{2028}",
        "\u{202e}",
        "\u{feff}",
        "\"",
        "\\",
        "{\"a\":1}",
        "\u{7f}",
        "\n{\"seq\":0}\n",
        "😀",
        "ü",
        "\u{10ffff}",
        "a",
        " ",
    ];
    let mut state = u64::from(at).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut text = String::new();
    for _ in 0..at % 12 {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        text.push_str(PARTS[usize::try_from(state % 16).unwrap()]);
    }
    text
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_hostile_ids_come_back_as_they_were() {
    let bench = Arc::new(Bench::new());
    let tasks: Vec<_> = (0..8_u32)
        .map(|part| {
            let bench = Arc::clone(&bench);
            tokio::spawn(async move {
                let mut sent = Vec::new();
                for at in (0..10_000).filter(|at| at % 8 == part) {
                    let id = hostile(at);
                    let got = bench.infer("fake", &id, 0.5).await;
                    assert_eq!(got.status, 200, "{id:?}: {:?}", got.body);
                    assert_eq!(got.json()["id"].as_str().unwrap_or_default(), id);
                    sent.push((got.seq().unwrap(), id));
                }
                sent
            })
        })
        .collect();
    let mut sent = BTreeMap::new();
    for task in tasks {
        sent.extend(task.await.unwrap());
    }
    let records = bench.records().await;
    assert_eq!((sent.len(), records.len()), (10_000, 10_000));
    for (seq, id) in sent {
        assert_eq!(records[&seq].payload.as_ref().unwrap().request_id, id);
    }
}

#[tokio::test]
async fn each_policy_keeps_what_it_says() {
    let bench = Bench::new();
    let rule = |treatment| vec![TensorRule { name: "x".to_owned(), treatment, columns: None }];
    type Change = Box<dyn FnOnce(&mut RecordSettings)>;
    let policies: Vec<(&str, Change)> = vec![
        ("full", Box::new(|_| {})),
        ("digest", Box::new(|asked| asked.capture = Some(Capture::Digest))),
        ("none", Box::new(|asked| asked.capture = Some(Capture::None))),
        ("sample", Box::new(|asked| asked.sample = Some(0))),
        ("large", Box::new(|asked| asked.tensor_bytes_max = Some(7))),
        ("drop", Box::new(move |asked| asked.tensors = rule(Treatment::Drop))),
        ("hash", Box::new(move |asked| asked.tensors = rule(Treatment::Hash))),
        ("cut", Box::new(move |asked| asked.tensors = rule(Treatment::Truncate(3)))),
        ("sealed", Box::new(move |asked| asked.tensors = rule(Treatment::Encrypt))),
    ];
    let mut seqs = BTreeMap::new();
    for (model, change) in policies {
        bench.record(model, change);
        let got = bench.infer(model, "", 1.5).await;
        assert_eq!(got.status, 200, "{model}: {:?}", got.body);
        seqs.insert(model, got.seq().unwrap());
    }
    let records = bench.records().await;
    let kept = |model: &str| content(&inputs(&records[&seqs[model]])[0]).clone();
    let output =
        |model: &str| content(&records[&seqs[model]].payload.as_ref().unwrap().outputs[0]).clone();
    let (x, y) = (floats(&[1.5, 1.5]), floats(&[2.5, 2.5]));
    let dropped = |why: &str| Content::Dropped(why.to_owned());
    let digest = |data: &[u8]| {
        use sha2::Digest as _;
        Content::Digest(sha2::Sha256::digest(data).to_vec().into())
    };
    assert_eq!(
        (kept("full"), output("full")),
        (Content::Data(x.clone().into()), Content::Data(y.clone().into()))
    );
    assert_eq!((kept("digest"), output("digest")), (digest(&x), digest(&y)));
    assert_eq!((kept("none"), output("none")), (dropped("policy"), dropped("policy")));
    assert_eq!((kept("sample"), output("sample")), (dropped("sample"), dropped("sample")));
    assert_eq!((kept("large"), output("large")), (digest(&x), digest(&y)));
    assert_eq!((kept("drop"), output("drop")), (dropped("policy"), Content::Data(y.into())));
    assert!(matches!(kept("hash"), Content::Hashed(hash) if hash.len() == 32));
    assert_eq!(kept("cut"), Content::Truncated(x[..3].to_vec().into()));
    // Nobody said whom it is about.
    assert_eq!(kept("sealed"), dropped("subject"));
    let stamps: std::collections::BTreeSet<_> =
        seqs.values().map(|seq| records[seq].head.capture.clone()).collect();
    assert_eq!(stamps.len(), seqs.len(), "{stamps:?}");
}

/// Names subjects by their length, and hides data by turning its bits over.
struct Mirror;

impl capture::Subjects for Mirror {
    fn name(&self, subject: &str) -> Vec<u8> {
        subject.len().to_le_bytes().to_vec()
    }

    fn seal(&self, _subject: &str, data: &[u8]) -> Option<Vec<u8>> {
        Some(data.iter().map(|byte| !byte).collect())
    }
}

#[tokio::test]
async fn whom_data_is_about_is_said_by_a_parameter_a_header_or_the_sticky_key() {
    let bench = Bench::with(tempfile::tempdir().unwrap(), |settings| {
        settings.free_bytes_min = 0;
        settings.subject_parameter = Some("patient".to_owned());
    });
    bench.ledger.set_subjects(Arc::new(Mirror));
    bench.record("fake", |asked| {
        let (name, treatment) = ("x".to_owned(), Treatment::Encrypt);
        asked.tensors = vec![TensorRule { name, treatment, columns: None }];
    });
    let body = |parameters: Value| {
        json!({"parameters": parameters,
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1, 1]}]})
        .to_string()
    };
    let path = "/v2/models/fake/infer";
    let (header, sticky) = (("x-subject", "22"), ("tidegate-sticky-key", "333"));
    type Case<'a> = (&'a [(&'a str, &'a str)], Value, usize);
    let cases: [Case<'_>; 5] = [
        (&[header, sticky], json!({"patient": "1"}), 1),
        (&[header, sticky], json!({}), 2),
        (&[sticky], json!({}), 3),
        (&[("x-user", "4444")], json!({}), 4),
        (&[], json!({"patient": 55555}), 5),
    ];
    let mut wanted = Vec::new();
    for (headers, parameters, len) in cases {
        let got = bench.post(path, headers, body(parameters)).await;
        assert_eq!(got.status, 200, "{:?}", got.body);
        wanted.push((got.seq().unwrap(), len));
    }
    let records = bench.records().await;
    for (seq, len) in wanted {
        let record = &records[&seq];
        assert_eq!(record.head.subject[..], len.to_le_bytes());
        let sealed: Vec<u8> = floats(&[1.0, 1.0]).iter().map(|byte| !byte).collect();
        assert_eq!(*content(&inputs(record)[0]), Content::Sealed(sealed.into()));
    }
}

#[tokio::test]
async fn a_model_may_wait_for_the_disk_or_have_no_record_at_all() {
    let bench = Bench::new();
    bench.record("synced", |asked| asked.durability = Some(Durability::Sync));
    bench.record("silent", |asked| asked.durability = Some(Durability::Off));
    let synced = bench.infer("synced", "", 1.0).await;
    let silent = bench.infer("silent", "", 1.0).await;
    let log = bench.ledger.predictions().stats();
    assert!(synced.seq().unwrap() < log.synced_seq, "{log:?}");
    assert_eq!((silent.status, silent.seq()), (StatusCode::OK, None));
    let records = bench.records().await;
    let models: Vec<&str> = records.values().map(|record| &*record.head.model).collect();
    assert_eq!(models, ["synced"]);
}

/// Says how many times it ran.
struct Counted(Box<dyn Session>, Arc<std::sync::atomic::AtomicUsize>);

impl Session for Counted {
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        self.1.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        self.0.run(inputs)
    }
}

/// Takes space in the folder until it is dropped.
struct Ballast(std::path::PathBuf);

impl Ballast {
    fn of(dir: &Path, bytes: u64) -> Self {
        let path = dir.join("ballast");
        let file = std::fs::File::create(&path).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).unwrap();
        Self(path)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

#[tokio::test]
async fn without_room_for_records_there_are_no_answers_until_there_is_room_again() {
    const BALLAST: u64 = 64 << 20;
    // Nobody else writes much there.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let free = || {
        let room = rustix::fs::statvfs(dir.path()).unwrap();
        room.f_bavail * room.f_frsize
    };
    if free() < 4 * BALLAST {
        return eprintln!("no room in /dev/shm, nothing was tested");
    }
    let path = dir.path().to_owned();
    let keep = free() - BALLAST / 2;
    let bench = Bench::with(dir, |settings| {
        settings.segment_bytes = 1 << 20;
        settings.free_bytes_min = keep;
    });
    bench.record("serves", |asked| asked.on_error = Some(OnUnrecorded::Serve));
    let runs = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let fake = FakeModel::new(2, 1.0);
    let session = Box::new(Counted(fake.session().unwrap(), Arc::clone(&runs)));
    bench.put_session("counted", 1, fake.signature(), session, |_| {});
    assert_eq!(bench.infer("counted", "", 1.0).await.status, 200);

    let full = Ballast::of(&path, BALLAST);
    let refused = until(&bench, "counted", StatusCode::SERVICE_UNAVAILABLE).await;
    assert_eq!(refused.json()["code"], "unavailable");
    assert!(!refused.header("retry-after").is_empty());
    let ran = runs.load(std::sync::atomic::Ordering::SeqCst);
    assert_eq!(bench.infer("counted", "", 1.0).await.status, 503);
    assert_eq!(runs.load(std::sync::atomic::Ordering::SeqCst), ran, "what is refused does not run");
    let served = bench.infer("serves", "", 1.0).await;
    assert_eq!((served.status, served.seq()), (StatusCode::OK, None));

    drop(full);
    until(&bench, "counted", StatusCode::OK).await;
    let acked = runs.load(std::sync::atomic::Ordering::SeqCst);
    let records = bench.records().await;
    let ok = records.values().filter(|record| record.head.status == "ok").count();
    assert_eq!(ok, acked, "each that was answered, and no other");
}

/// Asks until this is the answer.
async fn until(bench: &Bench, model: &str, status: StatusCode) -> Got {
    let end = tokio::time::Instant::now() + Duration::from_secs(20);
    loop {
        let got = bench.infer(model, "", 1.0).await;
        if got.status == status {
            return got;
        }
        assert!(tokio::time::Instant::now() < end, "still {}: {:?}", got.status, got.body);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
