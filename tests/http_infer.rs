//! REST as a client sees it, without a socket: routes, inference in every form, error bodies.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::collections::BTreeMap;
use std::future::Future;
use std::io::{Read, Write};
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use serde_json::{Value, json};
use tidegate::batch::{Lane, LaneParts, ThreadBudget};
use tidegate::domain::{
    BatchSettings, Digest, Failure, IndexEntry, ModelControl, ModelFile, ModelName, ModelSettings,
    Recording, Version, VersionState,
};
use tidegate::engine::Model as _;
use tidegate::engine::fake::FakeModel;
use tidegate::gateway::{self, Gateway};
use tidegate::observe::{Observer, VersionStats};
use tidegate::route::{ModelRoutes, Published, RouteTable, Served};
use tidegate::transport::intake::Intake;
use tidegate::transport::shm::SharedMemory;
use tidegate::transport::toggles::Toggles;
use tidegate::transport::{Api, Health, Settings, http as rest};

/// A repository that knows one loaded model and one that is still loading.
struct Control;

type Done<'a> = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>>;

impl ModelControl for Control {
    fn index(&self) -> Vec<IndexEntry> {
        let entry = |name: &str, state| IndexEntry {
            model: name.parse().unwrap(),
            version: Version::new(1),
            state,
            reason: if state == VersionState::Ready { String::new() } else { "warming".to_owned() },
        };
        vec![entry("fake", VersionState::Ready), entry("slow", VersionState::Loading)]
    }

    fn load<'a>(
        &'a self,
        model: &'a ModelName,
        config: Option<&'a str>,
        files: Vec<ModelFile>,
    ) -> Done<'a> {
        Box::pin(async move {
            let files: Vec<_> =
                files.iter().map(|file| (file.path.clone(), file.content.to_vec())).collect();
            Err(Failure::not_found(format!("{model} {config:?} {files:?}")))
        })
    }

    fn unload<'a>(&'a self, _model: &'a ModelName) -> Done<'a> {
        Box::pin(async { Ok(()) })
    }
}

fn served(name: &str, version: u64, plus: f32) -> Arc<Served> {
    let model: ModelName = name.parse().unwrap();
    let version = Version::new(version).unwrap();
    let fake = FakeModel::new(2, plus);
    let digest = Digest::new([7; 32]);
    let stats = VersionStats::new(&Observer::default(), &model, version, &digest, "fake");
    let parts = LaneParts {
        model: model.clone(),
        version,
        batch: BatchSettings::default(),
        batched: true,
        padding: None,
        sessions: vec![fake.session().unwrap()],
        stats: Arc::clone(&stats),
        budget: Arc::new(ThreadBudget::new(2)),
    };
    Arc::new(Served {
        model,
        version,
        digest,
        engine: "onnxruntime",
        signature: fake.signature().clone(),
        settings: ModelSettings::default(),
        lane: Lane::new(parts).unwrap(),
        stats,
        recording: Recording::default(),
        watch: None,
    })
}

fn api_with(settings: Settings) -> Arc<Api> {
    let versions = BTreeMap::from_iter([1_u64, 2].map(|number| {
        let served = served("fake", number, if number == 1 { 1.0 } else { 2.0 });
        (served.version, served)
    }));
    let name: ModelName = "fake".parse().unwrap();
    let routes = ModelRoutes { versions, ..ModelRoutes::default() };
    let table = RouteTable {
        models: BTreeMap::from([(name.clone(), routes)]),
        default_model: Some(name),
        ..RouteTable::default()
    };
    let gateway = Gateway::new(
        Arc::new(Published::new(table)),
        Arc::new(Observer::default()),
        Arc::new(Control),
        gateway::Settings::default(),
    );
    let health = Arc::new(Health::default());
    health.set_ready();
    Arc::new(Api {
        gateway: Arc::new(gateway),
        health,
        shm: SharedMemory::new(false),
        toggles: Toggles::default(),
        intake: Intake::new(&settings),
        settings,
    })
}

fn api() -> Arc<Api> {
    api_with(Settings::default())
}

struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Answer {
    fn json(&self) -> Value {
        assert_eq!(self.headers["content-type"], "application/json");
        serde_json::from_slice(&self.body).unwrap()
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

async fn send(
    api: &Arc<Api>,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> Answer {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(Full::new(body.into())).unwrap();
    let (head, body) = rest::handle(Arc::clone(api), request).await.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    Answer { status: head.status, headers: head.headers, body }
}

async fn get(api: &Arc<Api>, path: &str) -> Answer {
    send(api, "GET", path, &[], "").await
}

async fn post(api: &Arc<Api>, path: &str, body: &Value) -> Answer {
    send(api, "POST", path, &[], body.to_string()).await
}

fn input(data: Value) -> Value {
    json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 2], "data": data}]})
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

const INFER: &str = "/v2/models/fake/infer";

#[tokio::test]
async fn json_inference_flat_and_nested() {
    let api = api();
    for data in [json!([1, 2.5, 3, 4]), json!([[1, 2.5], [3, 4]])] {
        let answer = post(&api, INFER, &input(data)).await;
        assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
        assert_eq!(
            answer.json(),
            json!({
                "model_name": "fake",
                "model_version": "2",
                "outputs": [
                    {"name": "y", "datatype": "FP32", "shape": [2, 2], "data": [3.0, 4.5, 5.0, 6.0]}
                ],
            })
        );
        assert_eq!(answer.header("tidegate-model-version"), "2");
        assert_eq!(answer.header("tidegate-arm"), "stable");
        assert!(answer.header("tidegate-model-digest").starts_with("sha256:0707"));
        assert_eq!(answer.header("tidegate-prediction-id").len(), 36);
        assert!(!answer.headers.contains_key("inference-header-content-length"));
    }
}

#[tokio::test]
async fn versions_labels_and_ids() {
    let api = api();
    let mut body = input(json!([0, 0, 0, 0]));
    body["id"] = json!("mine");
    let answer = post(&api, "/v2/models/fake/versions/1/infer", &body).await;
    assert_eq!(answer.json()["model_version"], "1");
    assert_eq!(answer.json()["id"], "mine");
    assert_eq!(answer.header("tidegate-arm"), "pinned");
    let answer = post(&api, "/v2/models/fake/versions/stable/infer", &body).await;
    assert_eq!(answer.json()["model_version"], "2");
    let answer = post(&api, "/v2/models/fake/versions/9/infer", &body).await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    // Quoted by careful clients.
    assert_eq!(get(&api, "/v2/models/f%61ke").await.json()["name"], "fake");
}

#[tokio::test]
async fn binary_both_ways() {
    let api = api();
    let head = json!({
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2],
            "parameters": {"binary_data_size": 8}}],
        "parameters": {"binary_data_output": true},
    })
    .to_string();
    let length = head.len().to_string();
    let body = [head.as_bytes(), &floats(&[0.5, 1.5])].concat();
    let headers = [("Inference-Header-Content-Length", length.as_str())];
    let answer = send(&api, "POST", INFER, &headers, body.clone()).await;
    assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
    assert_eq!(answer.header("content-type"), "application/octet-stream");
    let json_len: usize = answer.header("inference-header-content-length").parse().unwrap();
    let json: Value = serde_json::from_slice(&answer.body[..json_len]).unwrap();
    assert_eq!(json["outputs"][0]["parameters"]["binary_data_size"], 8);
    assert_eq!(answer.body[json_len..], floats(&[2.5, 3.5]));

    let longer = [&body[..], b"x"].concat();
    let answer = send(&api, "POST", INFER, &headers, longer).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
    assert!(answer.json()["error"].as_str().unwrap().contains("unexpected additional input data"));
    let shorter = body[..body.len() - 1].to_vec();
    assert_eq!(send(&api, "POST", INFER, &headers, shorter).await.status, StatusCode::BAD_REQUEST);
    let answer =
        send(&api, "POST", INFER, &[("inference-header-content-length", "-1")], body).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_raw_body_is_the_one_input() {
    let api = api();
    let headers = [("inference-header-content-length", "0")];
    let answer = send(&api, "POST", INFER, &headers, floats(&[1.0, 2.0])).await;
    assert_eq!(answer.status, StatusCode::OK, "{:?}", answer.body);
    let json_len: usize = answer.header("inference-header-content-length").parse().unwrap();
    assert_eq!(answer.body[json_len..], floats(&[3.0, 4.0]));
    let answer = send(&api, "POST", INFER, &headers, "abc").await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn outputs_in_the_form_asked_for() {
    let api = api();
    let mut body = input(json!([0.0, 1.0, 3.0, 2.0]));
    body["outputs"] = json!([{"name": "y", "parameters": {"classification": 1}}]);
    let answer = post(&api, INFER, &body).await.json();
    let expected = json!([{"name": "y", "datatype": "BYTES", "shape": [2, 1],
        "data": ["3.000000:1", "5.000000:0"]}]);
    assert_eq!(answer["outputs"], expected);
    body["outputs"] = json!([{"name": "y", "parameters": {"binary_data": true}}]);
    let answer = post(&api, INFER, &body).await;
    assert_eq!(answer.header("content-type"), "application/octet-stream");
    body["outputs"] = json!([{"name": "z"}]);
    assert_eq!(post(&api, INFER, &body).await.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn bad_requests_say_what_is_wrong() {
    let api = api();
    let x = |more: &str| {
        format!(r#"{{"inputs":[{{"name":"x","datatype":"FP32","shape":[1,2]{more}}}]}}"#)
    };
    let cases: &[(&str, String, u16, &str)] = &[
        ("no json", "hello".into(), 400, "request body: expected value at line 1 column 1"),
        ("a list", "[]".into(), 400, "expected an object"),
        ("no data", x(""), 400, "input 'x': has no data"),
        ("too few", x(r#","data":[1]"#), 400, "takes 8 bytes, got 4"),
        ("too many", x(r#","data":[1,2,3]"#), 400, "more than the 2 elements"),
        ("ragged", x(r#","data":[[1],[]]"#), 400, "ragged"),
        ("wrong nesting", x(r#","data":[[1],[2]]"#), 400, "nested as [2, 1], the shape is [1, 2]"),
        ("text", x(r#","data":["a","b"]"#), 400, r#"element 0 is "a", expected a finite number"#),
        ("null", x(r#","data":[null,1]"#), 400, "element 0 is null"),
        ("overflow", x(r#","data":[1e400,1]"#), 400, "element 0 is 1e400"),
        ("over fp32", x(r#","data":[1e39,1]"#), 400, "element 0 is 1e39"),
        ("nan", x(r#","data":[NaN,1]"#), 400, "request body"),
        ("data twice", x(r#","data":[1,2],"data":[1,2]"#), 400, "duplicate field `data`"),
        (
            "two sources",
            x(r#","data":[1,2],"parameters":{"binary_data_size":8}"#),
            400,
            "more than one",
        ),
        ("no header", x(r#","parameters":{"binary_data_size":8}"#), 400, "needs the header"),
        (
            "shm off",
            x(r#","parameters":{"shared_memory_region":"r","shared_memory_byte_size":8}"#),
            501,
            "shared memory",
        ),
        ("nested parameter", x(r#","data":[1,2],"parameters":{"a":{}}"#), 400, "a parameter:"),
        ("deep", x(&format!(r#","data":{}"#, "[".repeat(100_000))), 400, "request body"),
        (
            "deep and whole",
            x(&format!(r#","data":{}{}"#, "[".repeat(90), "]".repeat(90))),
            400,
            "deeper than 16",
        ),
        (
            "deeper than any body",
            x(&format!(r#","unknown":{}{}"#, "[".repeat(200), "]".repeat(200))),
            400,
            "deeper than 100",
        ),
        (
            "datatype",
            r#"{"inputs":[{"name":"x","datatype":"FP31","shape":[1],"data":[1]}]}"#.into(),
            400,
            "unknown datatype 'FP31'",
        ),
        (
            "int for float input",
            r#"{"inputs":[{"name":"x","datatype":"INT32","shape":[1,2],"data":[1,2]}]}"#.into(),
            400,
            "input 'x' has datatype INT32, expected FP32",
        ),
        (
            "half",
            r#"{"inputs":[{"name":"x","datatype":"FP16","shape":[1,2],"data":[1,2]}]}"#.into(),
            400,
            "no JSON form",
        ),
        (
            "negative",
            r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[-1,2],"data":[1,2]}]}"#.into(),
            400,
            "dimension -1",
        ),
        (
            "sequence",
            x(r#","data":[1,2]"#)
                .replace(r#"{"inputs""#, r#"{"parameters":{"sequence_id":3},"inputs""#),
            501,
            "sequences are not supported",
        ),
        (
            "reserved",
            x(r#","data":[1,2]"#)
                .replace(r#"{"inputs""#, r#"{"parameters":{"triton_x":3},"inputs""#),
            400,
            "reserved",
        ),
    ];
    for (name, body, status, error) in cases {
        let answer = send(&api, "POST", INFER, &[], body.clone()).await;
        let json = answer.json();
        let text = json["error"].as_str().unwrap();
        assert_eq!(answer.status.as_u16(), *status, "{name}: {text}");
        assert!(text.contains(error), "{name}: {text}");
        assert_eq!(answer.header("tidegate-prediction-id").len(), 36, "{name}");
    }
}

#[tokio::test]
async fn paths_and_verbs() {
    let api = api();
    let answer = send(&api, "GET", INFER, &[], "").await;
    assert_eq!(answer.status, StatusCode::METHOD_NOT_ALLOWED);
    assert_eq!(answer.header("allow"), "POST");
    assert_eq!(answer.json()["code"], "method_not_allowed");
    for path in [
        "/",
        "/v3",
        "/v2/models/fake/nothing",
        "/v2/models/%ff",
        "/v2/models/..%2f",
        "/v1/models/fake:x",
    ] {
        let answer = get(&api, path).await;
        assert_eq!(answer.status, StatusCode::NOT_FOUND, "{path}");
        assert_eq!(answer.json()["code"], "not_found", "{path}");
    }
    let answer = post(&api, "/v2/models/other/infer", &input(json!([0, 0, 0, 0]))).await;
    assert_eq!(answer.status, StatusCode::NOT_FOUND);
    assert_eq!(answer.json(), json!({"error": "model 'other' is not found", "code": "not_found"}));
    for path in [
        "/v2/models/fake/generate",
        "/v2/repository/other/index",
        "/v2/cudasharedmemory/unregister",
    ] {
        assert_eq!(
            post(&api, path, &json!({})).await.status,
            StatusCode::NOT_IMPLEMENTED,
            "{path}"
        );
    }
}

#[tokio::test]
async fn metadata_health_and_statistics() {
    let api = api();
    let server = get(&api, "/v2").await.json();
    assert_eq!(server["name"], "tidegate");
    assert!(!server["extensions"].as_array().unwrap().contains(&json!("sequence")));
    assert_eq!(get(&api, "/v2/health/live").await.json(), json!({"live": true}));
    assert_eq!(get(&api, "/v2/health/ready").await.json(), json!({"live": true, "ready": true}));
    assert_eq!(get(&api, "/v2/models").await.json(), json!({"models": ["fake"]}));
    let tensor = |name: &str| json!({"name": name, "datatype": "FP32", "shape": [-1, 2]});
    assert_eq!(
        get(&api, "/v2/models/fake").await.json(),
        json!({"name": "fake", "versions": ["1", "2"], "platform": "onnxruntime_onnx",
            "inputs": [tensor("x")], "outputs": [tensor("y")]})
    );
    let ready = get(&api, "/v2/models/fake/ready").await;
    assert_eq!(ready.json(), json!({"name": "fake", "ready": true}));
    assert_eq!(get(&api, "/v2/models/slow/ready").await.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(get(&api, "/v2/models/none/ready").await.status, StatusCode::NOT_FOUND);
    let config = get(&api, "/v2/models/fake/config").await.json();
    assert_eq!(config["input"][0]["name"], "x");
    for (path, count) in [
        ("/v2/models/stats", 2),
        ("/v2/models/fake/stats", 2),
        ("/v2/models/fake/versions/1/stats", 1),
    ] {
        let stats = get(&api, path).await.json();
        let all = stats["model_stats"].as_array().unwrap();
        assert_eq!(all.len(), count, "{path}");
        assert!(all[0]["inference_stats"]["cache_hit"]["ns"].is_u64());
    }
    api.health.set_draining();
    let answer = get(&api, "/v2/health/ready").await;
    assert_eq!(answer.status, StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(get(&api, "/ping").await.status, StatusCode::SERVICE_UNAVAILABLE);
}

#[tokio::test]
async fn repository_control_is_off_until_allowed() {
    let off = api();
    let load = "/v2/repository/models/fake/load";
    let answer = post(&off, load, &json!({})).await;
    assert_eq!(answer.status, StatusCode::FORBIDDEN);
    assert!(answer.json()["error"].as_str().unwrap().contains("repository.model_control"));

    let on = api_with(Settings { model_control: true, ..Settings::default() });
    let body = json!({"parameters": {"config": "{}", "file:1/model.onnx": "AQI="}});
    let answer = post(&on, load, &body).await;
    assert_eq!(answer.json()["error"], r#"fake Some("{}") [("1/model.onnx", [1, 2])]"#);
    let body = json!({"parameters": {"file:1/model.onnx": "AQI="}});
    assert_eq!(post(&on, load, &body).await.status, StatusCode::BAD_REQUEST);
    let unload = send(&on, "POST", "/v2/repository/models/fake/unload", &[], "").await;
    assert_eq!((unload.status, unload.body.len()), (StatusCode::OK, 0));

    let index = send(&on, "POST", "/v2/repository/index", &[], "").await.json();
    assert_eq!(index[0], json!({"name": "fake", "version": "1", "state": "READY"}));
    assert_eq!(index[1]["reason"], "warming");
    let ready = post(&on, "/v2/repository/index", &json!({"ready": true})).await.json();
    assert_eq!(ready.as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn kserve_v1() {
    let api = api();
    assert_eq!(get(&api, "/v1/models").await.json(), json!({"models": ["fake"]}));
    let path = "/v1/models/fake:predict";
    for instances in [json!([[1, 2], [3, 4]]), json!([{"x": [1, 2]}, {"x": [3, 4]}])] {
        let answer = post(&api, path, &json!({"instances": instances})).await;
        assert_eq!(answer.json(), json!({"predictions": [[3.0, 4.0], [5.0, 6.0]]}));
        assert_eq!(answer.header("tidegate-model-version"), "2");
    }
    for bad in [
        json!({}),
        json!({"instances": 3}),
        json!({"instances": [[1]]}),
        json!({"instances": [[1, 2], [3]]}),
        json!({"instances": [{"z": [1, 2]}]}),
        json!({"instances": []}),
    ] {
        assert_eq!(post(&api, path, &bad).await.status, StatusCode::BAD_REQUEST, "{bad}");
    }
}

#[tokio::test]
async fn mlflow_and_sagemaker() {
    let api = api();
    let expected = json!({"predictions": [[3.0, 4.0], [5.0, 6.0]]});
    for body in [
        json!({"dataframe_split": {"columns": ["a", "b"], "data": [[1, 2], [3, 4]]}}),
        json!({"dataframe_records": [{"a": 1, "b": 2}, {"b": 4, "a": 3}]}),
        json!({"instances": [[1, 2], [3, 4]]}),
        json!({"inputs": [[1, 2], [3, 4]]}),
        json!({"inputs": {"x": [[1, 2], [3, 4]]}}),
    ] {
        let answer = post(&api, "/invocations", &body).await;
        assert_eq!(answer.json(), expected, "{body}");
    }
    let csv = |body: &'static str| {
        let api = Arc::clone(&api);
        async move { send(&api, "POST", "/invocations", &[("content-type", "text/csv")], body).await }
    };
    assert_eq!(csv("a,b\n1, 2\n3.0,4\n").await.json(), expected);
    for bad in ["", "a,b\n1\n", "a,b\n1,\n", "a,b\n1,inf\n", "a\n1\n"] {
        assert_eq!(csv(bad).await.status, StatusCode::BAD_REQUEST, "{bad}");
    }
    let headers = [("content-type", "text/html")];
    let answer = send(&api, "POST", "/invocations", &headers, "").await;
    assert_eq!(answer.status, StatusCode::UNSUPPORTED_MEDIA_TYPE);
}

#[tokio::test]
async fn compression_both_ways() {
    let api = api();
    let body = input(json!([0, 0, 0, 0])).to_string();
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(body.as_bytes()).unwrap();
    let gzip = gzip.finish().unwrap();
    let answer = send(&api, "POST", INFER, &[("content-encoding", "gzip")], gzip.clone()).await;
    assert_eq!(answer.status, StatusCode::OK);
    for (encoding, body, status) in [
        ("br", gzip.clone(), 415),
        ("gzip, gzip", gzip.clone(), 415),
        ("deflate", gzip.clone(), 400),
        ("gzip", gzip[..gzip.len() - 4].to_vec(), 400),
        ("gzip", [&gzip[..], b"x"].concat(), 400),
    ] {
        let answer = send(&api, "POST", INFER, &[("content-encoding", encoding)], body).await;
        assert_eq!(answer.status.as_u16(), status, "{encoding}");
    }
    let small = api_with(Settings { compress_min_bytes: 1, ..Settings::default() });
    let headers = [("accept-encoding", "gzip;q=0.5, deflate")];
    let answer = send(&small, "POST", INFER, &headers, body).await;
    assert_eq!(answer.header("content-encoding"), "deflate");
    let mut text = String::new();
    flate2::read::ZlibDecoder::new(&answer.body[..]).read_to_string(&mut text).unwrap();
    assert!(text.starts_with(r#"{"model_name":"fake""#));
}

#[tokio::test]
async fn bodies_have_limits() {
    let api = api_with(Settings { body_max_bytes: 2 << 20, ..Settings::default() });
    let answer = send(&api, "POST", INFER, &[], vec![b' '; (2 << 20) + 1]).await;
    assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(answer.json()["code"], "too_large");
    for spaces in [(1 << 20) + 1, 3 << 20] {
        let mut bomb = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
        bomb.write_all(&vec![b' '; spaces]).unwrap();
        let bomb = bomb.finish().unwrap();
        let answer = send(&api, "POST", INFER, &[("content-encoding", "gzip")], bomb).await;
        assert_eq!(answer.status, StatusCode::PAYLOAD_TOO_LARGE, "{spaces}");
    }
}

#[tokio::test]
async fn a_document_with_real_names() {
    let api = api();
    let document = get(&api, "/v2/models/fake/openapi.json").await.json();
    assert_eq!(document["openapi"], "3.1.0");
    let feedback = &document["paths"]["/v2/models/fake/feedback"]["post"];
    assert_eq!(feedback["operationId"], "feedback");
    let schemas = &document["components"]["schemas"];
    let tensor = &schemas["InferRequest"]["properties"]["inputs"]["items"]["oneOf"][0];
    assert_eq!(tensor["properties"]["name"]["const"], "x");
    // Its own example is a request that works.
    let example = &schemas["InferRequest"]["examples"][0];
    assert_eq!(post(&api, INFER, example).await.status, StatusCode::OK);
}

#[tokio::test]
async fn settings_of_traces_and_logs() {
    let api = api();
    assert!(get(&api, "/v2/trace/setting").await.json().is_object());
    assert!(get(&api, "/v2/models/fake/trace/setting").await.json().is_object());
    assert_eq!(get(&api, "/v2/models/no/trace/setting").await.status, StatusCode::NOT_FOUND);
    assert!(get(&api, "/v2/logging").await.json().is_object());
    let answer = post(&api, "/v2/logging", &json!({"nonsense": 1})).await;
    assert_eq!(answer.status, StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_bad_deadline_and_a_passed_one() {
    let api = api();
    let body = input(json!([0, 0, 0, 0])).to_string();
    for (value, status) in [("soon", 400), ("0", 504)] {
        let headers = [("tidegate-timeout-ms", value)];
        let answer = send(&api, "POST", INFER, &headers, body.clone()).await;
        assert_eq!(answer.status.as_u16(), status, "{value}");
        assert_eq!(answer.header("tidegate-model-version"), "2", "{value}");
    }
}
