//! What errors tell: nothing of where the gateway lives or what else it was given.

use serde_json::json;
use tidegate::proto::inference as pb;
use tidegate::proto::inference::model_repository_parameter::ParameterChoice;
use tonic::transport::{Channel, Endpoint};

use crate::onnx;
use crate::process::{Process, put};
use crate::support::{grpc, message};

/// In every path and variable that an error could quote.
const CANARY: &str = "canary7f3a";
const ERRORS_MIN: usize = 200;

/// Other things that have no place in an answer.
const TELLTALES: &[&str] = &[
    "/tmp/",
    "/root",
    "/home",
    "/usr/",
    "/proc/",
    "/etc/",
    ".cargo",
    "registry/src",
    "src/",
    ".rs:",
    "/onnxruntime",
    ".cc:",
    "panicked",
    "RUST_BACKTRACE",
    "thread '",
    "0x7f",
    "target/debug",
];

struct Errors {
    texts: Vec<(String, String)>,
}

impl Errors {
    fn http(&mut self, what: impl Into<String>, (status, head, body): crate::process::Raw) {
        if status >= 400 {
            let body = String::from_utf8_lossy(&body);
            self.texts.push((what.into(), format!("{head}{body}")));
        }
    }

    async fn grpc<Q, A>(&mut self, channel: &Channel, method: &str, request: Q)
    where
        Q: prost::Message + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        if let Err(status) = grpc::<Q, A>(channel, method, request).await {
            let text = format!("{} {:?}", status.message(), status.metadata());
            let details = String::from_utf8_lossy(status.details()).into_owned();
            self.texts.push((format!("grpc {method}"), text + &details));
        }
    }
}

/// Bodies for a model that is there, wrong in one way each.
fn bodies() -> Vec<Vec<u8>> {
    let input = |name: &str, datatype: &str, shape: serde_json::Value, data: serde_json::Value| json!({"inputs": [{"name": name, "datatype": datatype, "shape": shape, "data": data}]});
    let right = || input("x", "FP32", json!([1, 2]), json!([1, 2]));
    let with = |key: &str, value: serde_json::Value| {
        let mut body = right();
        body[key] = value;
        body
    };
    let mut wrong = vec![
        input("z", "FP32", json!([1, 2]), json!([1, 2])),
        input("../../none/passwd", "FP32", json!([1, 2]), json!([1, 2])),
        input("x", "FP64", json!([1, 2]), json!([1, 2])),
        input("x", "QUUX", json!([1, 2]), json!([1, 2])),
        input("x", "BYTES", json!([1, 2]), json!(["a", "b"])),
        input("x", "FP32", json!([1, 3]), json!([1, 2, 3])),
        input("x", "FP32", json!([0, 2]), json!([])),
        input("x", "FP32", json!([-1, 2]), json!([1, 2])),
        input("x", "FP32", json!([1_u64 << 40, 1_u64 << 40]), json!([1])),
        input("x", "FP32", json!([1, 2]), json!([1])),
        input("x", "FP32", json!([1, 2]), json!([1, "a"])),
        input("x", "FP32", json!([1, 2]), json!([[[1], [2, 3]]])),
        input("x", "FP32", json!(vec![1; 20]), json!([1])),
        json!({}),
        json!([]),
        json!(1),
        json!({"inputs": []}),
        json!({"inputs": "x"}),
        with("outputs", json!([{"name": "q"}])),
        with("outputs", json!([{"name": "y"}, {"name": "y"}])),
        with("outputs", json!([{"name": "y", "parameters": {"classification": 0}}])),
        with(
            "outputs",
            json!([{"name": "y", "parameters": {"shared_memory_region": "r",
            "shared_memory_byte_size": 8}}]),
        ),
        with("parameters", json!({"timeout": -1})),
        with("parameters", json!({"timeout": "x"})),
        with("parameters", json!({"priority": 1.5})),
        with("parameters", json!({"tenant": "a"})),
        with("parameters", json!({"triton_x": "a"})),
        with("parameters", json!({"sequence_id": 5})),
        with("id", json!(5)),
    ];
    let mut double = right();
    double["inputs"] = json!([double["inputs"][0], double["inputs"][0]]);
    wrong.push(double);
    let mut bodies: Vec<Vec<u8>> = wrong.iter().map(|body| body.to_string().into_bytes()).collect();
    bodies.extend([&b""[..], b"{", b"\xff\xfe", b"null", b"{\"inputs\":[{}]}"].map(<[u8]>::to_vec));
    bodies
}

#[tokio::test(flavor = "multi_thread")]
async fn no_error_tells_a_path_a_variable_or_a_place_in_the_code() {
    let place = tempfile::Builder::new().prefix(CANARY).tempdir().unwrap();
    let root = place.path();
    let models = root.join("models");
    put(&models, "m", &onnx::relu());
    for (name, content) in onnx::bombs() {
        put(&models, name, &content);
    }
    put(&models, "broken", b"broken");
    put(&models, "empty", b"");
    put(&models, "cut", &onnx::relu()[..40]);
    put(&models, "config", &onnx::relu());
    std::fs::write(models.join("config/config.pbtxt"), "max_batch_size: -1").unwrap();
    put(&models, "labels", &onnx::relu());
    let labels = "output { name: 'y' data_type: TYPE_FP32 dims: 2 label_filename: 'none.txt' }";
    std::fs::write(models.join("labels/config.pbtxt"), labels).unwrap();
    let home = root.join("home");
    let variables = [
        ("TIDEGATE_REPOSITORY_MODEL_CONTROL", "true"),
        ("TIDEGATE_ENGINE_RUN_MEMORY_MAX_MB", "256"),
        ("TIDEGATE_SERVER_OUTPUT_BYTES_MAX", "1048576"),
        ("HOME", home.to_str().unwrap()),
        ("TMPDIR", root.to_str().unwrap()),
        ("SECRET_TOKEN", "canary7f3a-secret"),
    ];
    let mut process = Process::start(root, &variables, "");
    let mut errors = Errors { texts: Vec::new() };

    let paths = [
        "/v2/models/m/infer",
        "/v2/models/m/versions/9/infer",
        "/v2/models/nobody/infer",
        "/v1/models/m:predict",
        "/v2/models/range/infer",
        "/v2/models/broken/infer",
    ];
    for path in paths {
        for body in bodies() {
            errors.http(format!("POST {path}"), process.connect().post(path, "", &body));
        }
    }
    let headers = [
        "content-encoding: gzip\r\n",
        "content-encoding: br\r\n",
        "inference-header-content-length: 99999\r\n",
        "inference-header-content-length: x\r\n",
        "tidegate-timeout-ms: x\r\n",
        "content-type: text/csv\r\n",
    ];
    for header in headers {
        let answer = process.connect().post("/v2/models/m/infer", header, b"{\"inputs\":[]}");
        errors.http(header, answer);
        errors.http(header, process.connect().post("/invocations", header, b"a,b\n1"));
    }
    for n in [-1_i64, 1 << 20, 1 << 28, 1 << 33, i64::MAX] {
        for (model, _) in onnx::bombs() {
            let x = (!matches!(model, "fill" | "range"))
                .then(|| json!({"name": "x", "datatype": "FP32", "shape": [1], "data": [1]}));
            let n = json!({"name": "n", "datatype": "INT64", "shape": [1], "data": [n]});
            let inputs: Vec<_> = x.into_iter().chain([n]).collect();
            let body = json!({"inputs": inputs}).to_string();
            let path = format!("/v2/models/{model}/infer");
            errors.http(&path, process.connect().post(&path, "", body.as_bytes()));
        }
    }
    let gets = [
        "/",
        "/../../none/passwd",
        "/v2/../../x",
        "/%2e%2e/%2e%2e/none/passwd",
        "/v2/models/..%2f..",
        "/v2/models/nobody",
        "/v2/models/nobody/config",
        "/v2/models/m/versions/x",
        "/v2/models/m/stats/x",
        "/v2/models/broken/ready",
        "/v2/health/x",
        "/metrics",
        "/v2/models/m/infer",
        "/admin",
    ];
    for path in gets {
        errors.http(path, process.connect().get(path));
    }
    let shared = [
        (
            "/v2/systemsharedmemory/region/r/register",
            json!({"key": "/none", "offset": 0, "byte_size": 8}),
        ),
        ("/v2/cudasharedmemory/region/r/register", json!({})),
        ("/v2/logging", json!({"log_file": "/none/passwd"})),
        ("/v2/trace/setting", json!({"trace_file": "/none/passwd"})),
    ];
    for (path, body) in shared {
        errors.http(path, process.connect().post(path, "", body.to_string().as_bytes()));
    }
    let loads = ["broken", "empty", "cut", "config", "labels", "nobody", "..", "models"];
    for model in loads {
        for body in [
            json!({}),
            json!({"parameters": {"config": "{\"max_batch_size\": \"x\"}"}}),
            json!({"parameters": {"config": "{", "file:1/model.onnx": "AAAA"}}),
            json!({"parameters": {"config": "{}", "file:1/model.onnx": "AAAA"}}),
            json!({"parameters": {"config": "{}", "file:../../x": "AAAA"}}),
        ] {
            let path = format!("/v2/repository/models/{model}/load");
            errors.http(&path, process.connect().post(&path, "", body.to_string().as_bytes()));
        }
        let path = format!("/v2/repository/models/{model}/unload");
        errors.http(&path, process.connect().post(&path, "", b"{}"));
    }
    // Why a model is not served is told on request, and counts as an error's text.
    let index = process.connect().post("/v2/repository/index", "", b"{}");
    let text = String::from_utf8_lossy(&index.2).into_owned();
    assert!(text.contains("UNAVAILABLE"), "{text}");
    errors.texts.push(("index".to_owned(), text));

    let channel = Endpoint::from_shared(format!("http://{}", process.http)).unwrap().connect_lazy();
    over_grpc(&mut errors, &channel).await;

    assert!(process.alive());
    let count = errors.texts.len();
    let mut hits = Vec::new();
    for (what, text) in &errors.texts {
        let found = [CANARY].iter().chain(TELLTALES).find(|word| text.contains(**word));
        hits.extend(found.map(|word| format!("{word} in the answer to {what}: {text}")));
    }
    eprintln!("{} hits in {count} error bodies", hits.len());
    assert!(hits.is_empty(), "{}", hits.join("\n"));
    assert!(count >= ERRORS_MIN, "only {count} errors");
}

async fn over_grpc(errors: &mut Errors, channel: &Channel) {
    let values = [1.0, 2.0];
    let mut requests = vec![
        message("m", &[1, 3], &values),
        message("m", &[-1, 2], &values),
        message("m", &[1, 2], &[1.0]),
        message("nobody", &[1, 2], &values),
        message("../..", &[1, 2], &values),
        message("broken", &[1, 2], &values),
        message("", &[1, 2], &values),
        message("range", &[1, 2], &values),
    ];
    for change in 0..8 {
        let mut request = message("m", &[1, 2], &values);
        match change {
            0 => request.model_version = "x/y".to_owned(),
            1 => request.inputs.clear(),
            2 => request.raw_input_contents.clear(),
            3 => request.inputs[0].datatype = "Q".to_owned(),
            4 => request.inputs[0].name = "/none".to_owned(),
            5 => request.outputs.push(Default::default()),
            6 => drop(request.parameters.insert("tenant".to_owned(), Default::default())),
            _ => request.model_version = "7".to_owned(),
        }
        requests.push(request);
    }
    for request in requests {
        errors.grpc::<_, pb::ModelInferResponse>(channel, "ModelInfer", request).await;
    }
    for model in ["broken", "empty", "cut", "config", "labels", "nobody", ".."] {
        let mut request =
            pb::RepositoryModelLoadRequest { model_name: model.to_owned(), ..Default::default() };
        errors
            .grpc::<_, pb::RepositoryModelLoadResponse>(
                channel,
                "RepositoryModelLoad",
                request.clone(),
            )
            .await;
        let file = pb::ModelRepositoryParameter {
            parameter_choice: Some(ParameterChoice::BytesParam(b"AAAA".to_vec().into())),
        };
        request.parameters.insert("file:1/model.onnx".to_owned(), file);
        errors
            .grpc::<_, pb::RepositoryModelLoadResponse>(channel, "RepositoryModelLoad", request)
            .await;
        let request = pb::ModelMetadataRequest { name: model.to_owned(), version: "3".to_owned() };
        errors.grpc::<_, pb::ModelMetadataResponse>(channel, "ModelMetadata", request).await;
        let request = pb::ModelConfigRequest { name: model.to_owned(), version: "3".to_owned() };
        errors.grpc::<_, pb::ModelConfigResponse>(channel, "ModelConfig", request).await;
    }
}
