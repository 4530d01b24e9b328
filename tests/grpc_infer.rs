//! gRPC as a client sees it, over a real connection: predictions, streams, status codes, health,
//! reflection, the repository and shared memory.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tidegate::batch::{Lane, LaneParts, ThreadBudget};
use tidegate::domain::{
    BatchSettings, Digest, Failure, IndexEntry, ModelControl, ModelFile, ModelName, ModelSettings,
    Recording, Version, VersionState,
};
use tidegate::engine::Model as _;
use tidegate::engine::fake::FakeModel;
use tidegate::gateway::{self, Gateway};
use tidegate::observe::{Observer, VersionStats};
use tidegate::proto::inference as pb;
use tidegate::proto::inference::infer_parameter::ParameterChoice;
use tidegate::proto::inference::model_infer_request::{
    InferInputTensor, InferRequestedOutputTensor,
};
use tidegate::route::{ModelRoutes, Published, RouteTable, Served};
use tidegate::transport::intake::Intake;
use tidegate::transport::listener::Listeners;
use tidegate::transport::shm::SharedMemory;
use tidegate::transport::toggles::Toggles;
use tidegate::transport::{Api, Health, Settings};
use tokio_stream::StreamExt as _;
use tonic::codec::CompressionEncoding;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_reflection::pb::{v1, v1alpha};

const SERVICE: &str = "inference.GRPCInferenceService";

/// A repository that remembers what it was asked to do.
#[derive(Default)]
struct Control {
    asked: Mutex<Vec<String>>,
}

type Done<'a> = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>>;

impl ModelControl for Control {
    fn index(&self) -> Vec<IndexEntry> {
        let entry = |name: &str, state| IndexEntry {
            model: name.parse().unwrap(),
            version: Version::new(1),
            state,
            reason: String::new(),
        };
        vec![entry("fake", VersionState::Ready), entry("late", VersionState::Loading)]
    }

    fn load<'a>(
        &'a self,
        model: &'a ModelName,
        config: Option<&'a str>,
        files: Vec<ModelFile>,
    ) -> Done<'a> {
        let files: Vec<_> = files.into_iter().map(|file| file.path).collect();
        self.asked.lock().push(format!("load {model} {config:?} {files:?}"));
        Box::pin(async { Ok(()) })
    }

    fn unload<'a>(&'a self, model: &'a ModelName) -> Done<'a> {
        self.asked.lock().push(format!("unload {model}"));
        Box::pin(async { Ok(()) })
    }
}

fn served(name: &str, fake: &FakeModel) -> Arc<Served> {
    let model: ModelName = name.parse().unwrap();
    let version = Version::new(1).unwrap();
    let digest = Digest::new([7; 32]);
    let stats = VersionStats::new(&Observer::default(), &model, version, &digest, "onnxruntime");
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

struct Server {
    api: Arc<Api>,
    control: Arc<Control>,
    channel: Channel,
    listeners: Listeners,
}

async fn start(settings: Settings, shm: bool) -> Server {
    let mut slow = FakeModel::new(2, 1.0);
    slow.cost = Duration::from_millis(300);
    let models = [("fake", FakeModel::new(2, 1.0)), ("slow", slow)];
    let models = models.map(|(name, fake)| {
        let served = served(name, &fake);
        let versions = BTreeMap::from([(served.version, served)]);
        (name.parse().unwrap(), ModelRoutes { versions, ..ModelRoutes::default() })
    });
    let table = RouteTable { models: BTreeMap::from(models), ..RouteTable::default() };
    let control = Arc::new(Control::default());
    let gateway = Gateway::new(
        Arc::new(Published::new(table)),
        Arc::new(Observer::default()),
        Arc::clone(&control) as Arc<dyn ModelControl>,
        gateway::Settings::default(),
    );
    let api = Arc::new(Api {
        gateway: Arc::new(gateway),
        health: Arc::new(Health::default()),
        shm: SharedMemory::new(shm),
        toggles: Toggles::default(),
        intake: Intake::new(&settings),
        settings,
    });
    api.health.set_ready();
    let mut listeners = Listeners::new(Arc::clone(&api)).unwrap();
    let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = format!("http://{}", socket.local_addr().unwrap());
    listeners.serve(socket);
    let channel = Endpoint::from_shared(address).unwrap().connect_lazy();
    Server { api, control, channel, listeners }
}

impl Server {
    fn client(&self) -> tonic::client::Grpc<Channel> {
        tonic::client::Grpc::new(self.channel.clone())
    }

    async fn unary<Q, A>(&self, path: &str, request: Q) -> Result<Response<A>, Status>
    where
        Q: prost::Message + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let mut client = self.client();
        client.ready().await.unwrap();
        let path = path.parse().unwrap();
        client.unary(Request::new(request), path, tonic_prost::ProstCodec::default()).await
    }

    async fn call<Q, A>(&self, method: &str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let answer = self.unary(&format!("/{SERVICE}/{method}"), request).await;
        answer.map(Response::into_inner)
    }

    async fn infer(
        &self,
        request: pb::ModelInferRequest,
    ) -> Result<Response<pb::ModelInferResponse>, Status> {
        self.unary(&format!("/{SERVICE}/ModelInfer"), request).await
    }

    async fn refused(&self, request: pb::ModelInferRequest) -> Status {
        self.infer(request).await.map(Response::into_inner).unwrap_err()
    }

    async fn stream<Q, A>(&self, path: &str, requests: Vec<Q>, strict: bool) -> Streaming<A>
    where
        Q: prost::Message + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let mut client = self.client();
        client.ready().await.unwrap();
        let mut request = Request::new(tokio_stream::iter(requests));
        if strict {
            request.metadata_mut().insert("triton_grpc_error", "true".parse().unwrap());
        }
        let codec = tonic_prost::ProstCodec::default();
        client.streaming(request, path.parse().unwrap(), codec).await.unwrap().into_inner()
    }
}

fn floats(values: &[f32]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>().into()
}

/// One row of two numbers.
fn row(model: &str, id: &str, x: f32) -> pb::ModelInferRequest {
    pb::ModelInferRequest {
        model_name: model.to_owned(),
        id: id.to_owned(),
        inputs: vec![InferInputTensor {
            name: "x".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![1, 2],
            ..InferInputTensor::default()
        }],
        raw_input_contents: vec![floats(&[x, x])],
        ..pb::ModelInferRequest::default()
    }
}

fn parameter(choice: ParameterChoice) -> pb::InferParameter {
    pb::InferParameter { parameter_choice: Some(choice) }
}

fn int(number: i64) -> pb::InferParameter {
    parameter(ParameterChoice::Int64Param(number))
}

fn text(text: &str) -> pb::InferParameter {
    parameter(ParameterChoice::StringParam(text.to_owned()))
}

#[tokio::test]
async fn a_prediction_is_answered_raw_with_its_metadata() {
    let server = start(Settings::default(), false).await;
    let answer = server.infer(row("fake", "id-1", 4.0)).await.unwrap();
    for name in ["tidegate-prediction-id", "tidegate-model-digest"] {
        assert!(answer.metadata().contains_key(name), "{name}");
    }
    assert_eq!(answer.metadata().get("tidegate-model-version").unwrap(), "1");
    assert_eq!(answer.metadata().get("tidegate-arm").unwrap(), "stable");
    let answer = answer.into_inner();
    assert_eq!((answer.model_name.as_str(), answer.model_version.as_str()), ("fake", "1"));
    assert_eq!(answer.id, "id-1");
    assert_eq!(answer.outputs[0].name, "y");
    assert_eq!(
        (answer.outputs[0].datatype.as_str(), &answer.outputs[0].shape[..]),
        ("FP32", &[1_i64, 2][..])
    );
    assert_eq!(answer.raw_output_contents, [floats(&[5.0, 5.0])]);

    let mut typed = row("fake", "", 0.0);
    typed.raw_input_contents.clear();
    let contents = pb::InferTensorContents { fp32_contents: vec![1.0, 2.0], ..Default::default() };
    typed.inputs[0].contents = Some(contents);
    typed.model_version = "1".to_owned();
    let answer = server.infer(typed).await.unwrap();
    assert_eq!(answer.metadata().get("tidegate-arm").unwrap(), "pinned");
    assert_eq!(answer.get_ref().raw_output_contents, [floats(&[2.0, 3.0])]);
}

#[tokio::test]
async fn classes_are_given_in_place_of_scores() {
    let server = start(Settings::default(), false).await;
    let mut request = row("fake", "", 0.0);
    request.raw_input_contents = vec![floats(&[1.0, 3.0])];
    let parameters = HashMap::from([("classification".to_owned(), int(1))]);
    request.outputs = vec![InferRequestedOutputTensor { name: "y".to_owned(), parameters }];
    let answer = server.infer(request).await.unwrap().into_inner();
    assert_eq!(answer.outputs[0].datatype, "BYTES");
    assert!(answer.raw_output_contents[0].ends_with(b":1"));
}

#[tokio::test]
async fn every_failure_has_its_status_and_metadata() {
    let settings = Settings { body_max_bytes: 1 << 16, ..Settings::default() };
    let server = start(settings, false).await;
    let with = |change: &dyn Fn(&mut pb::ModelInferRequest)| {
        let mut request = row("fake", "", 1.0);
        change(&mut request);
        request
    };
    let cases = [
        ("model", Code::NotFound, with(&|request| request.model_name = "other".to_owned())),
        ("version", Code::NotFound, with(&|request| request.model_version = "9".to_owned())),
        ("shape", Code::InvalidArgument, with(&|request| request.inputs[0].shape = vec![2, 1])),
        ("input", Code::InvalidArgument, with(&|request| request.inputs[0].name.clear())),
        (
            "sequence",
            Code::Unimplemented,
            with(&|request| {
                request.parameters.insert("sequence_id".to_owned(), int(5));
            }),
        ),
        (
            "shared memory",
            Code::Unimplemented,
            with(&|request| {
                request.raw_input_contents.clear();
                let parameters = &mut request.inputs[0].parameters;
                parameters.insert("shared_memory_region".to_owned(), text("r"));
                parameters.insert("shared_memory_byte_size".to_owned(), int(8));
            }),
        ),
        (
            "deadline",
            Code::DeadlineExceeded,
            with(&|request| {
                request.model_name = "slow".to_owned();
                request.parameters.insert("timeout".to_owned(), int(20_000));
            }),
        ),
    ];
    for (name, code, request) in cases {
        let status = server.refused(request).await;
        assert_eq!(status.code(), code, "{name}: {status}");
        assert!(status.metadata().contains_key("tidegate-prediction-id"), "{name}");
    }
    let large = with(&|request| request.raw_input_contents = vec![vec![0; 1 << 17].into()]);
    assert_eq!(server.refused(large).await.code(), Code::ResourceExhausted);
    for path in [format!("/{SERVICE}/Nothing"), "/some.Other/Call".to_owned()] {
        let status = server.unary::<(), ()>(&path, ()).await.map(|_| ()).unwrap_err();
        assert_eq!(status.code(), Code::Unimplemented, "{path}");
    }
}

#[tokio::test]
async fn compressed_requests_get_compressed_answers() {
    let settings = Settings { body_max_bytes: 1 << 20, ..Settings::default() };
    let server = start(settings, false).await;
    for encoding in [CompressionEncoding::Gzip, CompressionEncoding::Deflate] {
        let mut client = server.client().send_compressed(encoding).accept_compressed(encoding);
        client.ready().await.unwrap();
        let mut request = row("fake", "", 0.0);
        request.inputs[0].shape = vec![1000, 2];
        request.raw_input_contents = vec![vec![0; 8000].into()];
        let path = format!("/{SERVICE}/ModelInfer").parse().unwrap();
        let codec = tonic_prost::ProstCodec::<_, pb::ModelInferResponse>::default();
        let answer = client.unary(Request::new(request), path, codec).await.unwrap();
        assert_eq!(answer.get_ref().raw_output_contents[0].len(), 8000);
        assert!(answer.metadata().contains_key("grpc-encoding"));
    }
    let bomb = {
        let mut client = server.client().send_compressed(CompressionEncoding::Gzip);
        client.ready().await.unwrap();
        let mut request = row("fake", "", 0.0);
        request.raw_input_contents = vec![vec![0; 8 << 20].into()];
        let path = format!("/{SERVICE}/ModelInfer").parse().unwrap();
        let codec = tonic_prost::ProstCodec::<_, pb::ModelInferResponse>::default();
        client.unary(Request::new(request), path, codec).await.map(|_| ()).unwrap_err()
    };
    assert_eq!(bomb.code(), Code::ResourceExhausted, "{bomb}");
}

#[tokio::test]
async fn a_stream_answers_in_order_and_goes_on_after_a_failure() {
    let settings = Settings { stream_concurrency_max: 4, ..Settings::default() };
    let server = start(settings, false).await;
    let mut requests = vec![row("slow", "0", 0.0), row("other", "1", 0.0)];
    requests.extend((2..40_u8).map(|id| row("fake", &id.to_string(), f32::from(id))));
    let path = format!("/{SERVICE}/ModelStreamInfer");
    let answers = server.stream(&path, requests.clone(), false).await;
    let answers: Vec<pb::ModelStreamInferResponse> =
        answers.map(Result::unwrap).collect::<Vec<_>>().await;
    assert_eq!(answers.len(), requests.len());
    for (at, answer) in answers.iter().enumerate() {
        let response = answer.infer_response.as_ref().unwrap();
        assert_eq!(response.id, at.to_string());
        assert_eq!(answer.error_message.is_empty(), at != 1, "{at}: {}", answer.error_message);
        let last = parameter(ParameterChoice::BoolParam(true));
        assert_eq!(response.parameters.get("triton_final_response"), Some(&last));
        assert!(response.parameters.contains_key("tidegate-prediction-id"));
    }

    let strict = server.stream::<_, pb::ModelStreamInferResponse>(&path, requests, true).await;
    let strict: Vec<_> = strict.collect().await;
    assert_eq!(strict.len(), 2, "the stream ends with the first failure");
    assert_eq!(strict[1].as_ref().unwrap_err().code(), Code::NotFound);
}

#[tokio::test]
async fn a_stream_may_be_plain() {
    let settings = Settings { mlserver_stream: true, ..Settings::default() };
    let server = start(settings, false).await;
    let path = format!("/{SERVICE}/ModelStreamInfer");
    let requests = vec![row("fake", "a", 1.0), row("other", "b", 1.0), row("fake", "c", 1.0)];
    let answers = server.stream::<_, pb::ModelInferResponse>(&path, requests, false).await;
    let answers: Vec<_> = answers.collect().await;
    assert_eq!(answers[0].as_ref().unwrap().raw_output_contents, [floats(&[2.0, 2.0])]);
    assert_eq!(answers[1].as_ref().unwrap_err().code(), Code::NotFound);
    assert_eq!(answers.len(), 2);
}

#[tokio::test]
async fn metadata_readiness_configuration_and_statistics() {
    let server = start(Settings::default(), false).await;
    let live: pb::ServerLiveResponse =
        server.call("ServerLive", pb::ServerLiveRequest {}).await.unwrap();
    let ready: pb::ServerReadyResponse =
        server.call("ServerReady", pb::ServerReadyRequest {}).await.unwrap();
    assert!(live.live && ready.ready);
    for (name, want) in [("fake", true), ("other", false), ("", false)] {
        let request = pb::ModelReadyRequest { name: name.to_owned(), version: String::new() };
        let ready: pb::ModelReadyResponse = server.call("ModelReady", request).await.unwrap();
        assert_eq!(ready.ready, want, "{name}");
    }
    let about: pb::ServerMetadataResponse =
        server.call("ServerMetadata", pb::ServerMetadataRequest {}).await.unwrap();
    assert_eq!(about.name, "tidegate");
    assert!(about.extensions.iter().any(|extension| extension == "classification"));
    let name = "fake".to_owned();
    let request = pb::ModelMetadataRequest { name: name.clone(), version: String::new() };
    let model: pb::ModelMetadataResponse = server.call("ModelMetadata", request).await.unwrap();
    assert_eq!(
        (model.platform.as_str(), &model.versions[..]),
        ("onnxruntime_onnx", &["1".to_owned()][..])
    );
    assert_eq!(model.inputs[0].shape, [-1, 2]);
    let request = pb::ModelConfigRequest { name: name.clone(), version: String::new() };
    let config: pb::ModelConfigResponse = server.call("ModelConfig", request).await.unwrap();
    assert_eq!(config.config.unwrap().name, "fake");

    server.infer(row("fake", "", 1.0)).await.unwrap();
    let request = pb::ModelStatisticsRequest { name, version: String::new() };
    let stats: pb::ModelStatisticsResponse = server.call("ModelStatistics", request).await.unwrap();
    assert_eq!(stats.model_stats[0].inference_count, 1);
    let all = pb::ModelStatisticsRequest::default();
    let stats: pb::ModelStatisticsResponse = server.call("ModelStatistics", all).await.unwrap();
    assert_eq!(stats.model_stats.len(), 2);
}

#[tokio::test]
async fn health_is_checked_and_watched_until_the_drain() {
    let server = start(Settings::default(), false).await;
    for (service, want) in [("", Ok(1)), (SERVICE, Ok(1)), ("other", Err(Code::NotFound))] {
        let request = HealthCheckRequest { service: service.to_owned() };
        let got = server.unary::<_, HealthCheckResponse>("/grpc.health.v1.Health/Check", request);
        let got = got.await.map(|got| got.into_inner().status).map_err(|status| status.code());
        assert_eq!(got, want, "{service}");
    }
    let mut client = server.client();
    client.ready().await.unwrap();
    let codec = tonic_prost::ProstCodec::<HealthCheckRequest, HealthCheckResponse>::default();
    let path = "/grpc.health.v1.Health/Watch".parse().unwrap();
    let watch = client.server_streaming(Request::new(HealthCheckRequest::default()), path, codec);
    let mut watch = watch.await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().status, 1);
    server.api.health.set_draining();
    assert_eq!(watch.message().await.unwrap().unwrap().status, 2);
    assert!(watch.message().await.unwrap().is_none(), "a watch does not hold up the drain");
    drop((watch, client));
    assert_eq!(server.listeners.drain(Duration::from_secs(5)).await, 0);
}

#[tokio::test]
async fn reflection_lists_every_service() {
    let server = start(Settings::default(), false).await;
    let ask = v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(v1::server_reflection_request::MessageRequest::ListServices(
            String::new(),
        )),
    };
    let path = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo";
    let mut answers =
        server.stream::<_, v1::ServerReflectionResponse>(path, vec![ask], false).await;
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let v1::server_reflection_response::MessageResponse::ListServicesResponse(list) = answer else {
        panic!("expected a list, got {answer:?}");
    };
    let names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    for name in [SERVICE, "grpc.health.v1.Health", "tidegate.v1.Feedback"] {
        assert!(names.iter().any(|have| have == name), "{name} in {names:?}");
    }
    let ask = v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(
            v1alpha::server_reflection_request::MessageRequest::FileContainingSymbol(
                "inference.ModelConfig".to_owned(),
            ),
        ),
    };
    let path = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
    let mut answers =
        server.stream::<_, v1alpha::ServerReflectionResponse>(path, vec![ask], false).await;
    let answer = answers.message().await.unwrap().unwrap().message_response.unwrap();
    use v1alpha::server_reflection_response::MessageResponse::FileDescriptorResponse;
    assert!(matches!(answer, FileDescriptorResponse(_)), "{answer:?}");
}

#[tokio::test]
async fn the_repository_speaks_both_dialects_when_allowed() {
    let load = |repository: &str, model: &str| pb::RepositoryModelLoadRequest {
        repository_name: repository.to_owned(),
        model_name: model.to_owned(),
        parameters: HashMap::new(),
    };
    type Loaded = pb::RepositoryModelLoadResponse;
    let closed = start(Settings::default(), false).await;
    let refused = closed.call::<_, Loaded>("RepositoryModelLoad", load("", "fake")).await;
    assert_eq!(refused.unwrap_err().code(), Code::Unimplemented);
    let index: pb::RepositoryIndexResponse =
        closed.call("RepositoryIndex", pb::RepositoryIndexRequest::default()).await.unwrap();
    assert_eq!(index.models.len(), 2);
    assert_eq!(index.models[1].state, "LOADING");

    let settings = Settings { model_control: true, ..Settings::default() };
    let open = start(settings, false).await;
    for request in [load("", "fake"), load("fake", "")] {
        let loaded: Loaded = open.call("RepositoryModelLoad", request).await.unwrap();
        assert!(loaded.is_loaded && loaded.model_name == "fake");
    }
    use pb::model_repository_parameter::ParameterChoice as Choice;
    let mut files = load("", "fake");
    for (key, choice) in [
        ("config", Choice::StringParam("{}".to_owned())),
        ("file:1/model.onnx", Choice::BytesParam(Bytes::from_static(b"x"))),
    ] {
        let value = pb::ModelRepositoryParameter { parameter_choice: Some(choice) };
        files.parameters.insert(key.to_owned(), value);
    }
    open.call::<_, Loaded>("RepositoryModelLoad", files).await.unwrap();
    let request =
        pb::RepositoryModelUnloadRequest { model_name: "fake".to_owned(), ..Default::default() };
    let gone: pb::RepositoryModelUnloadResponse =
        open.call("RepositoryModelUnload", request).await.unwrap();
    assert!(gone.is_unloaded);
    assert_eq!(
        *open.control.asked.lock(),
        [
            "load fake None []",
            "load fake None []",
            "load fake Some(\"{}\") [\"1/model.onnx\"]",
            "unload fake",
        ]
    );
}

#[tokio::test]
async fn settings_are_shown_and_what_cannot_change_is_refused() {
    let server = start(Settings::default(), false).await;
    type Trace = pb::TraceSettingResponse;
    let ask = pb::TraceSettingRequest::default();
    let trace: Trace = server.call("TraceSetting", ask.clone()).await.unwrap();
    assert_eq!(trace.settings["trace_level"].value, ["OFF"]);
    let mut loud = ask;
    let value = pb::trace_setting_request::SettingValue { value: vec!["TIMESTAMPS".to_owned()] };
    loud.settings.insert("trace_level".to_owned(), value);
    let refused = server.call::<_, Trace>("TraceSetting", loud).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
    let log: pb::LogSettingsResponse =
        server.call("LogSettings", pb::LogSettingsRequest::default()).await.unwrap();
    use pb::log_settings_response::setting_value::ParameterChoice as Setting;
    assert_eq!(log.settings["log_info"].parameter_choice, Some(Setting::BoolParam(true)));
    let cuda = pb::CudaSharedMemoryStatusRequest::default();
    let cuda = server.call::<_, pb::CudaSharedMemoryStatusResponse>("CudaSharedMemoryStatus", cuda);
    assert_eq!(cuda.await.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test]
async fn tensors_go_through_shared_memory_when_it_is_on() {
    let server = start(Settings::default(), true).await;
    let memory = tempfile::Builder::new().prefix("grpc-test-").tempfile_in("/dev/shm").unwrap();
    std::fs::write(memory.path(), [floats(&[1.0, 2.0]), floats(&[0.0, 0.0])].concat()).unwrap();
    let key = memory.path().file_name().unwrap().to_str().unwrap();
    let register = pb::SystemSharedMemoryRegisterRequest {
        name: "r".to_owned(),
        key: format!("/{key}"),
        offset: 0,
        byte_size: 16,
    };
    let _: pb::SystemSharedMemoryRegisterResponse =
        server.call("SystemSharedMemoryRegister", register).await.unwrap();
    let place = |offset| {
        HashMap::from([
            ("shared_memory_region".to_owned(), text("r")),
            ("shared_memory_byte_size".to_owned(), int(8)),
            ("shared_memory_offset".to_owned(), int(offset)),
        ])
    };
    let mut request = row("fake", "", 0.0);
    request.raw_input_contents.clear();
    request.inputs[0].parameters = place(0);
    let output = InferRequestedOutputTensor { name: "y".to_owned(), parameters: place(8) };
    request.outputs = vec![output];
    let answer = server.infer(request).await.unwrap().into_inner();
    assert_eq!(answer.raw_output_contents, [Bytes::new()]);
    assert_eq!(answer.outputs[0].parameters.get("shared_memory_byte_size"), Some(&int(8)));
    assert_eq!(std::fs::read(memory.path()).unwrap()[8..], floats(&[2.0, 3.0])[..]);
    let status: pb::SystemSharedMemoryStatusResponse = server
        .call("SystemSharedMemoryStatus", pb::SystemSharedMemoryStatusRequest::default())
        .await
        .unwrap();
    assert_eq!(status.regions["r"].byte_size, 16);
}
