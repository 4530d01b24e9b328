//! A gateway inside the test, and HTTP and gRPC to it.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use serde_json::Value;
use tidegate::batch::{Lane, LaneParts, ThreadBudget};
use tidegate::domain::{
    BatchSettings, Digest, Failure, IndexEntry, ModelControl, ModelFile, ModelName, ModelSettings,
    Recording, Version,
};
use tidegate::engine::Model;
use tidegate::gateway::{self, Gateway};
use tidegate::observe::{Observer, VersionStats};
use tidegate::proto::inference as pb;
use tidegate::proto::inference::model_infer_request::InferInputTensor;
use tidegate::route::{ModelRoutes, Published, RouteTable, Served};
use tidegate::transport::listener::Listeners;
use tidegate::transport::shm::SharedMemory;
use tidegate::transport::toggles::Toggles;
use tidegate::transport::{Api, Health, Settings, http as rest};
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// A repository that cannot be changed.
struct Control;

type Done<'a> = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>>;

impl ModelControl for Control {
    fn index(&self) -> Vec<IndexEntry> {
        Vec::new()
    }

    fn load<'a>(&'a self, _: &'a ModelName, _: Option<&'a str>, _: Vec<ModelFile>) -> Done<'a> {
        Box::pin(async { Err(Failure::unsupported("not here")) })
    }

    fn unload<'a>(&'a self, _: &'a ModelName) -> Done<'a> {
        Box::pin(async { Err(Failure::unsupported("not here")) })
    }
}

/// A gateway with tables that the test publishes.
pub(crate) struct Inside {
    pub(crate) api: Arc<Api>,
    pub(crate) observer: Arc<Observer>,
    table: Arc<Published<RouteTable>>,
    channel: Channel,
    _listeners: Listeners,
}

/// What an HTTP call gave.
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|_| panic!("{:?}", self.body))
    }
}

impl Inside {
    pub(crate) async fn start(settings: gateway::Settings) -> Self {
        Self::start_with(settings, Settings::default()).await
    }

    pub(crate) async fn start_with(settings: gateway::Settings, transport: Settings) -> Self {
        let table = Arc::new(Published::new(RouteTable::default()));
        let observer = Observer::new(tidegate::observe::Settings::default());
        let gateway =
            Gateway::new(Arc::clone(&table), Arc::clone(&observer), Arc::new(Control), settings);
        let api = Arc::new(Api {
            gateway: Arc::new(gateway),
            health: Arc::new(Health::default()),
            shm: SharedMemory::new(false),
            toggles: Toggles::default(),
            intake: tidegate::transport::intake::Intake::new(&Settings::default()),
            settings: transport,
        });
        api.health.set_ready();
        let mut listeners = Listeners::new(Arc::clone(&api)).unwrap();
        let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", socket.local_addr().unwrap());
        listeners.serve(socket);
        let channel = Endpoint::from_shared(address).unwrap().connect_lazy();
        Self { api, observer, table, channel, _listeners: listeners }
    }

    /// Serves `model` as version 1 of `name`, beside what is served already.
    pub(crate) fn serve(&self, name: &str, model: &dyn Model, digest: u8, settings: ModelSettings) {
        let name: ModelName = name.parse().unwrap();
        let version = Version::new(1).unwrap();
        let digest = Digest::new([digest; 32]);
        let stats = VersionStats::new(&self.observer, &name, version, &digest, "onnxruntime");
        let lane = Lane::new(LaneParts {
            model: name.clone(),
            version,
            batch: BatchSettings::default(),
            batched: model.signature().batched,
            padding: None,
            sessions: vec![model.session().unwrap()],
            stats: Arc::clone(&stats),
            budget: Arc::new(ThreadBudget::new(2)),
        });
        let served = Served {
            model: name.clone(),
            version,
            digest,
            engine: "onnxruntime",
            signature: model.signature().clone(),
            settings,
            lane: lane.unwrap(),
            stats,
            recording: Recording::default(),
            watch: None,
        };
        let mut table = RouteTable::clone(&self.table.snapshot());
        let versions = BTreeMap::from([(version, Arc::new(served))]);
        table.models.insert(name, ModelRoutes { versions, ..ModelRoutes::default() });
        table.revision += 1;
        drop(self.table.publish(table));
    }

    pub(crate) async fn http(&self, method: &str, path: &str, body: impl Into<Bytes>) -> Answer {
        self.http_with(method, path, &[], body).await
    }

    pub(crate) async fn http_with(
        &self,
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
        let (head, body) = rest::handle(Arc::clone(&self.api), request).await.into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        Answer { status: head.status, headers: head.headers, body }
    }

    pub(crate) async fn grpc<Q, A>(&self, method: &str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        grpc(&self.channel, method, request).await
    }

    pub(crate) fn page(&self) -> String {
        String::from_utf8(self.observer.page(None).1.to_vec()).unwrap()
    }
}

/// One unary call of the inference service.
pub(crate) async fn grpc<Q, A>(channel: &Channel, method: &str, request: Q) -> Result<A, Status>
where
    Q: prost::Message + Default + Send + Sync + 'static,
    A: prost::Message + Default + Send + Sync + 'static,
{
    let mut client = tonic::client::Grpc::new(channel.clone());
    client.ready().await.unwrap();
    let path = format!("/inference.GRPCInferenceService/{method}").parse().unwrap();
    let codec = tonic_prost::ProstCodec::default();
    client.unary(tonic::Request::new(request), path, codec).await.map(Response::into_inner)
}

pub(crate) fn floats(values: &[f32]) -> Bytes {
    values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>().into()
}

/// A request over gRPC for one FP32 input `x`.
pub(crate) fn message(model: &str, shape: &[i64], values: &[f32]) -> pb::ModelInferRequest {
    pb::ModelInferRequest {
        model_name: model.to_owned(),
        inputs: vec![InferInputTensor {
            name: "x".to_owned(),
            datatype: "FP32".to_owned(),
            shape: shape.to_vec(),
            ..InferInputTensor::default()
        }],
        raw_input_contents: vec![floats(values)],
        ..pb::ModelInferRequest::default()
    }
}
