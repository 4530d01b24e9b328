//! What a client sees of a split: over HTTP and gRPC, sticky keys, rules, pins, shadows.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use tidegate::batch::ThreadBudget;
use tidegate::domain::{BatchSettings, ModelName, Tensor, Traffic, Version};
use tidegate::engine::fake::FakeModel;
use tidegate::engine::{EngineError, Model as _, Session};
use tidegate::gateway::{self, Gateway};
use tidegate::observe::Observer;
use tidegate::proto::inference as pb;
use tidegate::proto::inference::infer_parameter::ParameterChoice;
use tidegate::proto::inference::model_infer_request::InferInputTensor;
use tidegate::route::{ModelRoutes, Published, RouteTable, Served};
use tidegate::transport::listener::Listeners;
use tidegate::transport::shm::SharedMemory;
use tidegate::transport::toggles::Toggles;
use tidegate::transport::{Api, Health, Settings, http as rest};
use tokio_stream::StreamExt as _;
use tonic::metadata::{MetadataKey, MetadataMap};
use tonic::transport::{Channel, Endpoint};

#[expect(unreachable_pub, dead_code, reason = "shared with other tests")]
#[path = "support/gateway.rs"]
mod gateway_of;

fn version(number: u64) -> Version {
    Version::new(number).unwrap()
}

/// A gateway whose model `m` answers `x + n` as version `n`, so that the answer proves who gave it.
struct Inside {
    api: Arc<Api>,
    observer: Arc<Observer>,
    budget: Arc<ThreadBudget>,
    table: Arc<Published<RouteTable>>,
    channel: Channel,
    _listeners: Listeners,
}

/// Who answered, by the numbers and by the headers, and as which arm.
#[derive(Debug, PartialEq)]
struct Got {
    version: u64,
    arm: String,
}

impl Inside {
    async fn start(settings: Settings) -> Self {
        let observer = Observer::new(tidegate::observe::Settings::default());
        let table = Arc::new(Published::new(RouteTable::default()));
        let control = Arc::new(gateway_of::NoControl);
        let gateway = Gateway::new(
            Arc::clone(&table),
            Arc::clone(&observer),
            control,
            gateway::Settings::default(),
        );
        let api = Arc::new(Api {
            gateway: Arc::new(gateway),
            health: Arc::new(Health::default()),
            shm: SharedMemory::new(false),
            toggles: Toggles::default(),
            intake: tidegate::transport::intake::Intake::new(&settings),
            settings,
        });
        api.health.set_ready();
        let mut listeners = Listeners::new(Arc::clone(&api)).unwrap();
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", socket.local_addr().unwrap());
        listeners.serve(socket);
        let channel = Endpoint::from_shared(address).unwrap().connect_lazy();
        let budget = Arc::new(ThreadBudget::new(2));
        let inside = Self { api, observer, budget, table, channel, _listeners: listeners };
        for number in 1..=3 {
            let fake = FakeModel::new(1, f32::from(u8::try_from(number).unwrap()));
            inside.load(number, fake.session().unwrap());
        }
        inside
    }

    fn load(&self, number: u64, session: Box<dyn Session>) -> Arc<Served> {
        let model: ModelName = "m".parse().unwrap();
        let signature = FakeModel::new(1, 0.0).signature().clone();
        let batch = BatchSettings::default();
        let of = (model, version(number));
        let served = gateway_of::served_as(
            &self.observer,
            &self.budget,
            of,
            &signature,
            vec![session],
            batch,
        );
        let loaded = Arc::clone(&served);
        self.change(|routes| drop(routes.versions.insert(version(number), served)));
        loaded
    }

    fn change(&self, change: impl FnOnce(&mut ModelRoutes)) {
        let mut table = RouteTable::clone(&self.table.snapshot());
        let routes = table.models.entry("m".parse().unwrap()).or_default();
        change(routes);
        routes.refresh();
        table.revision += 1;
        drop(self.table.publish(table));
    }

    fn traffic(&self, traffic: &Value, salt: u64) {
        let traffic: Traffic = serde_json::from_value(traffic.clone()).unwrap();
        traffic.check().unwrap();
        self.change(|routes| routes.set_traffic(Some(&traffic), salt));
    }

    async fn http(&self, asked: &str, headers: &[(&str, &str)], parameters: Value) -> Got {
        let (status, got) = self.http_any(asked, headers, parameters).await;
        assert_eq!(status, 200, "{got:?}");
        got.unwrap()
    }

    async fn http_any(
        &self,
        asked: &str,
        headers: &[(&str, &str)],
        parameters: Value,
    ) -> (StatusCode, Option<Got>) {
        let body = json!({"parameters": parameters,
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1], "data": [0.0]}]});
        let mut request = Request::post(format!("/v2/models/m{asked}/infer"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(Bytes::from(body.to_string()))).unwrap();
        let (head, body) = rest::handle(Arc::clone(&self.api), request).await.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        if head.status != 200 {
            return (head.status, None);
        }
        let answer: Value = serde_json::from_slice(&body).unwrap();
        let said = answer["outputs"][0]["data"][0].as_f64().unwrap();
        let text = |name: &str| head.headers[name].to_str().unwrap().to_owned();
        let version: u64 = text("tidegate-model-version").parse().unwrap();
        assert_eq!(said, version as f64, "the header names who answered");
        (head.status, Some(Got { version, arm: text("tidegate-arm") }))
    }

    async fn grpc(&self, asked: &str, metadata: &[(&str, &str)], user: Option<i64>) -> Got {
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        client.ready().await.unwrap();
        let path = "/inference.GRPCInferenceService/ModelInfer".parse().unwrap();
        let codec = tonic_prost::ProstCodec::<_, pb::ModelInferResponse>::default();
        let mut request = tonic::Request::new(message(asked, user));
        put(request.metadata_mut(), metadata);
        let response = client.unary(request, path, codec).await.unwrap();
        let said = first(&response.get_ref().raw_output_contents[0]);
        let text = |name: &str| response.metadata().get(name).unwrap().to_str().unwrap().to_owned();
        let version: u64 = text("tidegate-model-version").parse().unwrap();
        assert_eq!(f64::from(said), version as f64);
        Got { version, arm: text("tidegate-arm") }
    }

    fn page(&self) -> String {
        String::from_utf8(self.observer.page(None).1.to_vec()).unwrap()
    }

    async fn settled(&self) {
        let end = tokio::time::Instant::now() + Duration::from_secs(20);
        while self.api.gateway.shadows().in_progress() > 0 {
            assert!(tokio::time::Instant::now() < end, "waited too long");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn put(metadata: &mut MetadataMap, pairs: &[(&str, &str)]) {
    for (name, value) in pairs {
        let name: MetadataKey<_> = name.parse().unwrap();
        metadata.insert(name, value.parse().unwrap());
    }
}

fn first(data: &[u8]) -> f32 {
    f32::from_le_bytes(data[..4].try_into().unwrap())
}

fn message(asked: &str, user: Option<i64>) -> pb::ModelInferRequest {
    let parameter =
        |user| pb::InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(user)) };
    pb::ModelInferRequest {
        model_name: "m".to_owned(),
        model_version: asked.to_owned(),
        parameters: user.map(|user| ("user".to_owned(), parameter(user))).into_iter().collect(),
        inputs: vec![InferInputTensor {
            name: "x".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![1, 1],
            ..InferInputTensor::default()
        }],
        raw_input_contents: vec![0.0_f32.to_le_bytes().to_vec().into()],
        ..pb::ModelInferRequest::default()
    }
}

fn got(version: u64, arm: &str) -> Got {
    Got { version, arm: arm.to_owned() }
}

#[tokio::test]
async fn rules_and_pins_hold_over_http_and_grpc() {
    let inside = Inside::start(Settings::default()).await;
    let none = || json!({});
    assert_eq!(inside.http("", &[], none()).await, got(3, "stable"), "the highest");
    let label = |name: &str, number| {
        inside.change(|routes| {
            routes.labels.insert(name.parse().unwrap(), version(number));
        });
    };
    label("stable", 1);
    assert_eq!(inside.http("", &[], none()).await, got(1, "stable"));
    label("next", 3);
    let split = json!({"weights": {"1": 100, "2": 0}, "rules": [
        {"name": "beta", "header": "X-Group", "equals": "beta", "version": "2"},
        {"name": "b", "header": "x-group", "prefix": "b", "version": "next"}]});
    inside.traffic(&split, 1);
    type Case<'a> = (&'a str, &'a [(&'a str, &'a str)], Got);
    let cases: &[Case<'_>] = &[
        ("", &[], got(1, "stable")),
        ("", &[("x-group", "beta")], got(2, "beta")),
        ("", &[("x-group", "b")], got(3, "b")),
        ("", &[("x-group", "BETA")], got(1, "stable")),
        ("2", &[], got(2, "pinned")),
        ("1", &[("x-group", "beta")], got(1, "pinned")),
        ("next", &[("x-group", "beta")], got(3, "pinned")),
        ("stable", &[], got(1, "pinned")),
    ];
    for (asked, headers, wanted) in cases {
        let path = if asked.is_empty() { String::new() } else { format!("/versions/{asked}") };
        assert_eq!(inside.http(&path, headers, none()).await, *wanted, "{asked} {headers:?}");
        assert_eq!(inside.grpc(asked, headers, None).await, *wanted, "{asked} {headers:?}");
    }
    let page = inside.page();
    let counted = r#"tidegate_requests_total{model="m",version="2",arm="beta",protocol="grpc",outcome="ok"} 1"#;
    assert!(page.contains(counted), "{page}");

    // Nothing that the weights name is there: not ready, to be asked again.
    inside.change(|routes| routes.versions.retain(|number, _| *number == version(3)));
    assert_eq!(inside.http_any("", &[], none()).await.0, 503);
    assert_eq!(inside.http_any("/versions/1", &[], none()).await.0, 404);
    assert_eq!(inside.http("", &[("x-group", "b")], none()).await, got(3, "b"));
}

#[tokio::test]
async fn a_key_stays_with_its_version_wherever_it_is_sent() {
    let settings = Settings { sticky_header: Some("x-session".to_owned()), ..Settings::default() };
    let inside = Inside::start(settings).await;
    let weights = json!({"1": 50, "2": 50});
    let mut seen = BTreeSet::new();
    for user in 0..40_i64 {
        inside.traffic(&json!({"weights": weights}), 7);
        let text = user.to_string();
        let wanted = inside.http("", &[("tidegate-sticky-key", &text)], json!({})).await;
        seen.insert(wanted.version);
        assert_eq!(inside.grpc("", &[("tidegate-sticky-key", &text)], None).await, wanted);
        assert_eq!(inside.http("", &[("x-session", &text)], json!({})).await, wanted);
        inside.traffic(&json!({"weights": weights, "sticky": {"header": "X-User-Id"}}), 7);
        assert_eq!(inside.http("", &[("x-user-id", &text)], json!({})).await, wanted);
        assert_eq!(inside.grpc("", &[("x-user-id", &text)], None).await, wanted);
        inside.traffic(&json!({"weights": weights, "sticky": {"parameter": "user"}}), 7);
        assert_eq!(inside.http("", &[], json!({"user": user})).await, wanted);
        assert_eq!(inside.http("", &[], json!({"user": text})).await, wanted);
        assert_eq!(inside.grpc("", &[], Some(user)).await, wanted);
    }
    assert_eq!(seen, BTreeSet::from([1, 2]));
}

/// The messages of one stream are requests of their own: each is routed by the table of its moment,
/// also by a header that no table asked for when the stream began.
#[tokio::test]
async fn a_stream_follows_the_table() {
    let inside = Inside::start(Settings::default()).await;
    inside.traffic(&json!({"weights": {"1": 1}}), 1);
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let mut client = tonic::client::Grpc::new(inside.channel.clone());
    client.ready().await.unwrap();
    let path = "/inference.GRPCInferenceService/ModelStreamInfer".parse().unwrap();
    let codec = tonic_prost::ProstCodec::<_, pb::ModelStreamInferResponse>::default();
    let messages = tokio_stream::wrappers::ReceiverStream::new(receiver);
    let mut request = tonic::Request::new(messages);
    put(request.metadata_mut(), &[("x-group", "beta")]);
    let mut answers = client.streaming(request, path, codec).await.unwrap().into_inner();
    for round in 0..6_u64 {
        let wanted = round % 3 + 1;
        let rule = json!({"name": "beta", "header": "x-group", "equals": "beta",
            "version": wanted.to_string()});
        let rules = if wanted == 1 { json!([]) } else { json!([rule]) };
        inside.traffic(&json!({"weights": {"1": 1}, "rules": rules}), 1);
        sender.send(message("", None)).await.unwrap();
        let answer = answers.next().await.unwrap().unwrap().infer_response.unwrap();
        assert_eq!(f64::from(first(&answer.raw_output_contents[0])), wanted as f64, "{round}");
    }
}

/// Runs when it is told to; says how many rows it ran.
struct Held {
    leave: std::sync::mpsc::Receiver<()>,
    ran: Arc<AtomicU64>,
}

impl Session for Held {
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        assert!(self.leave.recv_timeout(Duration::from_secs(20)).is_ok());
        self.ran.fetch_add(inputs[0].shape()[0] as u64, Ordering::Relaxed);
        Ok(inputs.to_vec())
    }
}

fn held() -> (Box<dyn Session>, SyncSender<()>, Arc<AtomicU64>) {
    let (release, leave) = sync_channel(1024);
    let ran = Arc::new(AtomicU64::new(0));
    (Box::new(Held { leave, ran: Arc::clone(&ran) }), release, ran)
}

fn counted(page: &str, family: &str, labels: &str) -> u64 {
    let of = |line: &&str| line.starts_with(family) && line.contains(labels);
    let value = |line: &str| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap();
    #[expect(clippy::cast_possible_truncation, reason = "counts of a test")]
    page.lines().filter(of).map(|line| value(line) as u64).sum()
}

/// All requests are answered while their shadow is stuck, and none of its work is a request.
#[tokio::test]
async fn a_shadow_that_is_stuck_holds_up_nobody() {
    const CALLS: u64 = 1000;
    let inside = Inside::start(Settings::default()).await;
    let (session, release, ran) = held();
    inside.load(2, session);
    let split = json!({"weights": {"1": 1}, "shadows": [{"version": "2", "percent": 100}]});
    inside.traffic(&split, 1);
    for call in 0..CALLS {
        let wanted = got(1, "stable");
        if call % 2 == 0 {
            assert_eq!(inside.http("", &[], json!({})).await, wanted);
        } else {
            assert_eq!(inside.grpc("", &[], None).await, wanted);
        }
    }
    assert_eq!(ran.load(Ordering::Relaxed), 0, "not one of its runs is over");
    let page = inside.page();
    let requests = |page: &str, of: &str| counted(page, "tidegate_requests_total", of);
    assert_eq!(requests(&page, r#"version="1""#), CALLS);
    let shed = counted(&page, "tidegate_shadow_total", r#"outcome="queue_full""#);
    let busy = counted(&page, "tidegate_shadow_total", r#"outcome="busy""#);
    assert!(shed + busy >= CALLS - 300, "{shed} found no room and {busy} no thread");
    while release.try_send(()).is_ok() {}
    inside.settled().await;
    let page = inside.page();
    let copies = |of: &str| counted(&page, "tidegate_shadow_total", of);
    assert_eq!(copies(""), CALLS, "each copy ends in one way");
    assert_eq!(copies(r#"outcome="compared""#), ran.load(Ordering::Relaxed));
    assert_eq!(requests(&page, r#"version="2""#), 0);
    assert_eq!(requests(&page, ""), CALLS);
}

/// Fails whatever it is asked.
struct Broken;

impl Session for Broken {
    fn run(&mut self, _: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        Err(EngineError::Run("told to fail".to_owned()))
    }
}

#[tokio::test]
async fn a_shadow_that_fails_fails_nobody() {
    let inside = Inside::start(Settings::default()).await;
    inside.load(2, Box::new(Broken));
    let split = json!({"weights": {"1": 1}, "shadows": [{"version": "2", "percent": 100},
        {"version": "3", "percent": 100}]});
    inside.traffic(&split, 1);
    for _ in 0..50 {
        assert_eq!(inside.http("", &[], json!({})).await, got(1, "stable"));
        inside.settled().await;
    }
    // Who names a version wants that one, not a comparison.
    assert_eq!(inside.http("/versions/1", &[], json!({})).await, got(1, "pinned"));
    inside.settled().await;
    let page = inside.page();
    let copies = |of: &str| counted(&page, "tidegate_shadow_total", of);
    assert_eq!(copies(r#"version="2",outcome="failed""#), 50);
    assert_eq!(copies(r#"version="3",outcome="compared""#), 50);
    let routes = inside.table.snapshot().models[&"m".parse::<ModelName>().unwrap()].clone();
    let snapshot = inside.api.gateway.shadows().snapshot(&"m".parse().unwrap(), &routes);
    let pairs: BTreeMap<u64, usize> =
        snapshot.shadows.iter().map(|shadow| (shadow.version.get(), shadow.pairs.len())).collect();
    assert_eq!(pairs, BTreeMap::from([(2, 0), (3, 1)]));
    let pair = &snapshot.shadows[1].pairs[0];
    assert_eq!((pair.compared, pair.agreed), (50, 0));
    // 0 + 1 beside 0 + 3.
    assert_eq!(pair.outputs[0].max_abs.unwrap().mean, 2.0);
}
