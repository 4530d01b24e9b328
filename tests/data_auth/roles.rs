//! What each role may do, to which models, and that the others do not exist for it.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use serde_json::{Value, json};
use tidegate::admit::Role;
use tidegate::proto::inference as pb;
use tonic::Code;

use crate::grpc::{SERVICE, infer};
use crate::support::{Answer, House, INFER, MODELS, framed, model};

const ALL: [u16; 5] = [200; 5];
/// Viewer, predictor, deployer, auditor, admin.
const PREDICT: [u16; 5] = [403, 200, 403, 403, 200];
const VERSIONS: [u16; 5] = [403, 403, 200, 403, 200];
const GATEWAY: [u16; 5] = [403, 403, 403, 403, 200];

const FEEDBACK: &str = r#"{"prediction_id": "019ab7a2-6c1f-7d3e-9b5a-0c2d4e6f8a1b", "label": 1}"#;

/// Of one model: method, path, body, and what a key for all models gets by role.
const OF_MODEL: [(&str, &str, &str, [u16; 5]); 18] = [
    ("GET", "/v2/models/{m}", "", ALL),
    ("GET", "/v2/models/{m}/versions/1", "", ALL),
    ("GET", "/v2/models/{m}/ready", "", ALL),
    ("GET", "/v2/models/{m}/config", "", ALL),
    ("GET", "/v2/models/{m}/stats", "", ALL),
    ("GET", "/v2/models/{m}/versions/1/stats", "", ALL),
    ("GET", "/v2/models/{m}/openapi.json", "", ALL),
    ("GET", "/v2/models/{m}/trace/setting", "", ALL),
    ("GET", "/v1/models/{m}", "", ALL),
    ("POST", "/v2/models/{m}/infer", INFER, PREDICT),
    ("POST", "/v2/models/{m}/infer", "not json", PREDICT),
    ("POST", "/v2/models/{m}/versions/1/infer", INFER, PREDICT),
    ("POST", "/v2/models/{m}/versions/9/infer", INFER, PREDICT),
    ("POST", "/v2/models/{m}/feedback", FEEDBACK, PREDICT),
    ("POST", "/v1/models/{m}:predict", r#"{"instances": [[1, 2]]}"#, PREDICT),
    ("POST", "/v2/repository/models/{m}/load", "", VERSIONS),
    ("POST", "/v2/repository/models/{m}/unload", "", VERSIONS),
    ("POST", "/v2/models/{m}/trace/setting", "{}", GATEWAY),
];

/// Of the gateway.
const OF_GATEWAY: [(&str, &str, &str, [u16; 5]); 12] = [
    ("GET", "/v2", "", ALL),
    ("GET", "/v2/models", "", ALL),
    ("GET", "/v2/models/stats", "", ALL),
    ("GET", "/v1/models", "", ALL),
    ("POST", "/v2/repository/index", "", ALL),
    ("GET", "/v2/trace/setting", "", ALL),
    ("GET", "/v2/logging", "", ALL),
    ("POST", "/v2/trace/setting", "{}", GATEWAY),
    ("POST", "/v2/logging", "{}", GATEWAY),
    ("GET", "/v2/systemsharedmemory/status", "", PREDICT),
    ("POST", "/v2/systemsharedmemory/unregister", "", PREDICT),
    ("GET", "/v2/health/ready", "", ALL),
];

/// What stands for 200 where the request itself is wrong.
fn right(expected: u16, path: &str, body: &str) -> u16 {
    match (expected, body) {
        (200, "not json") => 400,
        (200, _) if path.contains("/versions/9/") => 404,
        // Nothing is recorded here that a label could be of.
        (200, _) if path.ends_with("/feedback") => 501,
        _ => expected,
    }
}

#[tokio::test]
async fn every_role_on_every_route() {
    let house = House::new(true);
    let mut cells = 0;
    for (at, role) in Role::ALL.iter().enumerate() {
        for (method, path, body, expected) in OF_MODEL {
            for name in MODELS {
                let path = path.replace("{m}", name);
                let whole = house.http(role.as_str(), method, &path, body).await.status;
                assert_eq!(whole, right(expected[at], &path, body), "{role} {method} {path}");
                let limited = house.http(&format!("mine-{role}"), method, &path, body).await.status;
                let expected = match name {
                    "other" => 404,
                    // A limit to some models is none to change the gateway.
                    _ if expected == GATEWAY => 403,
                    _ => right(expected[at], &path, body),
                };
                assert_eq!(limited, expected, "mine-{role} {method} {path}");
                cells += 2;
            }
        }
        for (method, path, body, expected) in OF_GATEWAY {
            let whole = house.http(role.as_str(), method, path, body).await.status;
            assert_eq!(whole, expected[at], "{role} {method} {path}");
            let limited = house.http(&format!("mine-{role}"), method, path, body).await.status;
            let expected = if expected == GATEWAY { 403 } else { expected[at] };
            assert_eq!(limited, expected, "mine-{role} {method} {path}");
            cells += 2;
        }
    }
    eprintln!("HTTP: {cells} cells of roles x limits x routes x models, 0 wrong");
}

/// An answer without what is this answer's alone.
fn described(answer: &Answer, name: &str) -> (u16, BTreeMap<String, String>, String) {
    let own = ["tidegate-prediction-id", "date", "grpc-message"];
    let headers = answer.headers.iter().filter(|(name, _)| !own.contains(&name.as_str()));
    let headers =
        headers.map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()));
    let body = String::from_utf8_lossy(&answer.body);
    let said = format!("{body}{}", answer.message).replace(name, "{m}");
    (answer.status.as_u16(), headers.collect(), said)
}

#[tokio::test]
async fn a_model_outside_the_limit_is_one_that_does_not_exist() {
    let house = House::new(true);
    let mut compared = 0;
    for role in Role::ALL {
        let key = format!("mine-{role}");
        for (method, path, body, _) in OF_MODEL {
            let ask = async |name: &str| {
                let path = path.replace("{m}", name);
                described(&house.http(&key, method, &path, body).await, name)
            };
            // As long as the other, so that lengths can be compared.
            let (there, not_there) = (ask("other").await, ask("nothr").await);
            assert_eq!(there, not_there, "{key} {method} {path}");
            assert_eq!(there.0, 404, "{key} {method} {path}");
            assert!(
                !there.1.keys().any(|name| name.contains("version") || name.contains("digest"))
            );
            compared += 1;
        }
    }
    // In the words of a model that is not there for anybody.
    let unknown = house.http("admin", "GET", "/v2/models/nothr", "").await;
    let unseen = house.http("mine-viewer", "GET", "/v2/models/other", "").await;
    assert_eq!(described(&unknown, "nothr"), described(&unseen, "other"));
    // The default model is one as well.
    let frame = r#"{"instances": [[1, 2]]}"#;
    assert_eq!(house.http("predictor", "POST", "/invocations", frame).await.status, 200);
    assert_eq!(house.http("viewer", "POST", "/invocations", frame).await.status, 403);
    let unseen = house.http("mine-predictor", "POST", "/invocations", frame).await;
    assert_eq!(unseen.status, 404);
    assert!(!String::from_utf8_lossy(&unseen.body).contains("other"), "{unseen:?}");
    eprintln!("HTTP: {compared} answers about a model out of sight, each equal to one about none");
}

#[tokio::test]
async fn lists_leave_out_what_the_caller_may_not_see() {
    let house = House::new(true);
    let list = async |key: &str, method: &str, path: &str| {
        let answer = house.http(key, method, path, "").await;
        assert_eq!(answer.status, 200, "{key} {path}");
        answer.json()
    };
    for role in Role::ALL {
        for (key, names) in
            [(role.to_string(), &MODELS[..]), (format!("mine-{role}"), &MODELS[..2])]
        {
            assert_eq!(list(&key, "GET", "/v2/models").await, json!({"models": names}));
            assert_eq!(list(&key, "GET", "/v1/models").await, json!({"models": names}));
            let index: Vec<Value> = names.iter().map(|name| model(name)).collect();
            assert_eq!(list(&key, "POST", "/v2/repository/index").await, json!(index));
            let stats = list(&key, "GET", "/v2/models/stats").await;
            let seen: Vec<_> = stats["model_stats"]
                .as_array()
                .unwrap()
                .iter()
                .map(|stats| stats["name"].as_str().unwrap())
                .collect();
            assert_eq!(seen, names);

            let index = house
                .grpc(
                    &key,
                    &format!("{SERVICE}/RepositoryIndex"),
                    &pb::RepositoryIndexRequest::default(),
                )
                .await;
            let index: pb::RepositoryIndexResponse = index.decoded();
            let seen: Vec<_> = index.models.iter().map(|model| model.name.as_str()).collect();
            assert_eq!(seen, names);
            let stats = house
                .grpc(
                    &key,
                    &format!("{SERVICE}/ModelStatistics"),
                    &pb::ModelStatisticsRequest::default(),
                )
                .await;
            let stats: pb::ModelStatisticsResponse = stats.decoded();
            let seen: Vec<_> = stats.model_stats.iter().map(|stats| stats.name.as_str()).collect();
            assert_eq!(seen, names);
        }
    }
}

#[tokio::test]
async fn every_role_on_every_call() {
    use Code::{NotFound, Ok as Fine, PermissionDenied as Denied};
    const SEEN: [Code; 5] = [Fine; 5];
    const PREDICT: [Code; 5] = [Denied, Fine, Denied, Denied, Fine];
    const VERSIONS: [Code; 5] = [Denied, Denied, Fine, Denied, Fine];
    const GATEWAY: [Code; 5] = [Denied, Denied, Denied, Denied, Fine];
    let house = House::new(true);
    let name = |name: &str| name.to_owned();
    let of_model = |model: &str| {
        let setting = pb::trace_setting_request::SettingValue { value: vec!["1".to_owned()] };
        let metadata = pb::ModelMetadataRequest { name: name(model), ..Default::default() };
        let config = pb::ModelConfigRequest { name: name(model), ..Default::default() };
        let stats = pb::ModelStatisticsRequest { name: name(model), ..Default::default() };
        let load = pb::RepositoryModelLoadRequest { model_name: name(model), ..Default::default() };
        // Some clients name the model here.
        let unload =
            pb::RepositoryModelUnloadRequest { repository_name: name(model), ..Default::default() };
        let trace = pb::TraceSettingRequest { model_name: name(model), ..Default::default() };
        let mut change = trace.clone();
        change.settings.insert("trace_rate".to_owned(), setting);
        vec![
            ("ModelMetadata", framed(&metadata), SEEN),
            ("ModelConfig", framed(&config), SEEN),
            ("ModelStatistics", framed(&stats), SEEN),
            ("ModelInfer", framed(&infer(model)), PREDICT),
            ("RepositoryModelLoad", framed(&load), VERSIONS),
            ("RepositoryModelUnload", framed(&unload), VERSIONS),
            ("TraceSetting", framed(&trace), SEEN),
            ("TraceSetting", framed(&change), GATEWAY),
        ]
    };
    let of_gateway = || {
        use pb::log_settings_request::SettingValue;
        use pb::log_settings_request::setting_value::ParameterChoice;
        let mut log = pb::LogSettingsRequest::default();
        let value = SettingValue { parameter_choice: Some(ParameterChoice::BoolParam(true)) };
        log.settings.insert("log_info".to_owned(), value);
        let region = pb::SystemSharedMemoryUnregisterRequest::default();
        vec![
            ("ServerMetadata", framed(&pb::ServerMetadataRequest {}), SEEN),
            ("LogSettings", framed(&pb::LogSettingsRequest::default()), SEEN),
            ("LogSettings", framed(&log), GATEWAY),
            ("SystemSharedMemoryUnregister", framed(&region), PREDICT),
            (
                "SystemSharedMemoryStatus",
                framed(&pb::SystemSharedMemoryStatusRequest::default()),
                PREDICT,
            ),
        ]
    };
    let mut cells = 0;
    for (at, role) in Role::ALL.iter().enumerate() {
        let ask = async |key: &str, method: &str, body| {
            let bearer = house.bearer(key);
            house
                .grpc_with(&[("authorization", &bearer)], &format!("{SERVICE}/{method}"), body)
                .await
        };
        let mine = format!("mine-{role}");
        for model in MODELS.into_iter().chain(["nothr"]) {
            for (method, body, expected) in of_model(model) {
                let whole = ask(role.as_str(), method, body.clone()).await;
                let right = match (model, expected[at], method) {
                    ("nothr", Fine, "RepositoryModelLoad" | "RepositoryModelUnload") => Fine,
                    ("nothr", Fine, _) => NotFound,
                    // That there is none is found before what may be changed.
                    ("nothr", Denied, "TraceSetting") => NotFound,
                    (_, code, _) => code,
                };
                assert_eq!(whole.code, Some(right), "{role} {method} {model}: {}", whole.message);
                let limited = ask(&mine, method, body).await;
                let right = match model {
                    "other" | "nothr" => NotFound,
                    _ if expected == GATEWAY => Denied,
                    _ => expected[at],
                };
                assert_eq!(
                    limited.code,
                    Some(right),
                    "{mine} {method} {model}: {}",
                    limited.message
                );
                if right == NotFound {
                    assert_eq!(limited.message, format!("model%20'{model}'%20is%20not%20found"));
                    assert!(limited.header("tidegate-model-version").is_none());
                }
                cells += 2;
            }
            let ready = pb::ModelReadyRequest { name: name(model), ..Default::default() };
            let ready: pb::ModelReadyResponse =
                ask(&mine, "ModelReady", framed(&ready)).await.decoded();
            assert_eq!(ready.ready, model.starts_with("mine"), "{mine} {model}");
        }
        for (method, body, expected) in of_gateway() {
            let whole = ask(role.as_str(), method, body.clone()).await;
            assert_eq!(whole.code, Some(expected[at]), "{role} {method}: {}", whole.message);
            let limited = ask(&mine, method, body).await;
            let right = if expected == GATEWAY { Denied } else { expected[at] };
            assert_eq!(limited.code, Some(right), "{mine} {method}: {}", limited.message);
            cells += 2;
        }
    }
    eprintln!("gRPC: {cells} cells of roles x limits x calls x models, 0 wrong");
}

/// What was logged.
#[derive(Clone, Default)]
struct Lines(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_prediction_is_recorded_with_its_caller() {
    let written = Lines::default();
    let writer = written.clone();
    let subscriber = tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_writer(move || writer.clone())
        .finish();
    let _guard = tracing::subscriber::set_default(subscriber);
    let house = House::new(false);
    house.http("mine-predictor", "POST", "/v2/models/mine-a/infer", INFER).await;
    house.http("mine-predictor", "POST", "/v2/models/other/infer", INFER).await;
    house.http("viewer", "POST", "/v1/models/mine-a:predict", "not json").await;
    house.grpc("admin", &format!("{SERVICE}/ModelInfer"), &infer("mine-a")).await;
    house.http_with(&[], "POST", "/v2/models/mine-a/infer", INFER).await;
    let text = String::from_utf8(written.0.lock().clone()).unwrap();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let lines: Vec<_> = lines.filter(|line| line["target"] == "access").collect();
    let said = |at: usize, name: &str| lines[at][name].as_str();
    let whose: Vec<_> = (0..lines.len()).map(|at| said(at, "principal")).collect();
    let names = ["mine-predictor", "mine-predictor", "viewer", "admin"].map(Some);
    assert_eq!(whose, [&names[..], &[None]].concat());
    let status: Vec<_> = (0..lines.len()).map(|at| said(at, "status").unwrap()).collect();
    assert_eq!(status, ["ok", "not_found", "forbidden", "ok", "ok"]);
    // What is refused out of sight names no version, though one is served.
    let versions: Vec<_> = (0..lines.len()).map(|at| said(at, "version")).collect();
    assert_eq!(versions, [Some("1"), None, Some("1"), Some("1"), Some("1")]);
    assert!(!text.contains(&house.token("admin")[20..]), "no log holds a token");
}
