//! Parameters that are the server's to set are refused, those that clients send are not.

use serde_json::{Value, json};
use tidegate::domain::ModelSettings;
use tidegate::engine::fake::FakeModel;
use tidegate::gateway;
use tidegate::proto::inference as pb;
use tidegate::proto::inference::infer_parameter::ParameterChoice;

use crate::support::{Inside, message};

const OURS: &[&str] = &[
    "version",
    "model_version",
    "model-version",
    "arm",
    "Arm",
    "canary_bucket",
    "bucket",
    "tenant",
    "TENANT",
    "principal",
    "prediction_id",
    "Prediction-Id",
    "ledger_seq",
    "audit_id",
    "digest",
    "model_digest",
    "route_reason",
    "shadow_of",
    "tidegate",
    "tidegate_arm",
    "tidegate-model-version",
    "Tidegate.tenant",
    "headers",
    "triton_final_response",
    "triton_anything",
];

fn theirs() -> Vec<(&'static str, Value)> {
    vec![
        ("sequence_id", json!(0)),
        ("sequence_start", json!(false)),
        ("sequence_end", json!(false)),
        ("priority", json!(0)),
        ("timeout", json!(5_000_000)),
        ("binary_data_output", json!(false)),
        ("max_tokens", json!(5)),
        ("temperature", json!(0.5)),
        ("my_version", json!("a")),
        ("versions", json!("a")),
        ("armour", json!("a")),
        ("x-tenant", json!("a")),
        ("traceparent", json!("00-1-2-01")),
        ("user", json!("me")),
        ("content_type", json!("np")),
    ]
}

fn parameter(value: &Value) -> pb::InferParameter {
    let choice = match value {
        Value::Bool(value) => ParameterChoice::BoolParam(*value),
        Value::Number(value) => match value.as_i64() {
            Some(value) => ParameterChoice::Int64Param(value),
            None => ParameterChoice::DoubleParam(value.as_f64().unwrap()),
        },
        other => ParameterChoice::StringParam(other.as_str().unwrap().to_owned()),
    };
    pb::InferParameter { parameter_choice: Some(choice) }
}

async fn over_both(inside: &Inside, key: &str, value: &Value) -> [Result<(), String>; 2] {
    let body = json!({"parameters": {key: value}, "inputs": [{"name": "x", "datatype": "FP32",
        "shape": [1, 2], "data": [1, 2]}]});
    let http = inside.http("POST", "/v2/models/m/infer", body.to_string()).await;
    let http = match http.status.as_u16() {
        200 => Ok(()),
        400 => Err(http.json()["error"].as_str().unwrap().to_owned()),
        other => panic!("{key}: {other} {:?}", http.body),
    };
    let mut asked = message("m", &[1, 2], &[1.0, 2.0]);
    asked.parameters.insert(key.to_owned(), parameter(value));
    let grpc: Result<pb::ModelInferResponse, _> = inside.grpc("ModelInfer", asked).await;
    let grpc = grpc.map(|_| ()).map_err(|status| {
        assert_eq!(status.code(), tonic::Code::InvalidArgument, "{key}: {status}");
        status.message().to_owned()
    });
    [http, grpc]
}

#[tokio::test]
async fn keys_of_ours_are_refused_by_name_on_both_transports() {
    let inside = Inside::start(gateway::Settings::default()).await;
    inside.serve("m", &FakeModel::new(2, 1.0), 1, ModelSettings::default());
    for key in OURS {
        for value in [json!("v"), json!(1), json!(true)] {
            for answer in over_both(&inside, key, &value).await {
                let message = answer.unwrap_err();
                assert!(message.contains(&format!("'{key}'")), "{message}");
            }
        }
    }
    for (key, value) in theirs() {
        for answer in over_both(&inside, key, &value).await {
            assert_eq!(answer, Ok(()), "{key}");
        }
    }
    eprintln!("{} keys refused, {} taken, on 2 transports", OURS.len(), theirs().len());
}

#[tokio::test]
async fn headers_of_our_answers_mean_nothing_in_a_request() {
    let inside = Inside::start(gateway::Settings::default()).await;
    inside.serve("m", &FakeModel::new(2, 1.0), 1, ModelSettings::default());
    let forged = "00000000-0000-7000-8000-000000000000";
    let headers = [
        ("tidegate-prediction-id", forged),
        ("tidegate-model-version", "9"),
        ("tidegate-model-digest", "sha256:00"),
        ("tidegate-arm", "canary"),
        ("tidegate-principal", "admin"),
    ];
    let body = r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[1,2]}]}"#;
    let answer = inside.http_with("POST", "/v2/models/m/infer", &headers, body).await;
    assert_eq!(answer.status, 200);
    let header = |name: &str| answer.headers[name].to_str().unwrap().to_owned();
    assert_ne!(header("tidegate-prediction-id"), forged);
    assert_eq!(header("tidegate-model-version"), "1");
    assert_eq!(header("tidegate-arm"), "stable");
    assert!(header("tidegate-model-digest").starts_with("sha256:0101"));
}
