//! Over gRPC: the same door.

use bytes::Bytes;
use prost::Message as _;
use tidegate::proto::inference as pb;
use tidegate::proto::inference::model_infer_request::InferInputTensor;
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic::transport::Endpoint;

use crate::support::{House, framed};

pub(crate) const SERVICE: &str = "/inference.GRPCInferenceService";

const METHODS: [&str; 22] = [
    "ServerMetadata",
    "ModelReady",
    "ModelMetadata",
    "ModelInfer",
    "ModelStreamInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "RepositoryModelLoad",
    "RepositoryModelUnload",
    "SystemSharedMemoryStatus",
    "SystemSharedMemoryRegister",
    "SystemSharedMemoryUnregister",
    "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister",
    "CudaSharedMemoryUnregister",
    "TraceSetting",
    "LogSettings",
    "NoSuchMethod",
    "serverlive",
    "ServerLive/",
    "",
];

const OTHERS: [&str; 10] = [
    "/grpc.health.v1.Health/List",
    "/grpc.health.v1.Health/",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/tidegate.v1.Feedback/Send",
    "/no.Service/Method",
    "//inference.GRPCInferenceService/ServerLive",
    "/v2/models",
    "/v2/health/live",
    "/",
];

pub(crate) fn infer(model: &str) -> pb::ModelInferRequest {
    let data: Vec<u8> = [1.0_f32, 2.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    pb::ModelInferRequest {
        model_name: model.to_owned(),
        inputs: vec![InferInputTensor {
            name: "x".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![1, 2],
            ..InferInputTensor::default()
        }],
        raw_input_contents: vec![data.into()],
        ..pb::ModelInferRequest::default()
    }
}

#[tokio::test]
async fn no_call_is_answered_without_a_credential_that_holds() {
    let house = House::new(true);
    let bad = house.bad_credentials();
    let methods = METHODS.map(|method| format!("{SERVICE}/{method}"));
    let paths = methods.iter().map(String::as_str).chain(OTHERS);
    let bodies =
        [Bytes::new(), framed(&pb::ModelReadyRequest::default()), framed(&infer("mine-a"))];
    let mut probes = 0;
    for path in paths {
        for credential in &bad {
            for body in &bodies {
                let metadata: Vec<_> =
                    credential.iter().map(|(name, value)| (*name, value.as_str())).collect();
                let answer = house.grpc_with(&metadata, path, body.clone()).await;
                assert_eq!(answer.code, Some(Code::Unauthenticated), "{path} {credential:?}");
                assert!(answer.body.is_empty());
                probes += 1;
            }
        }
    }
    eprintln!("gRPC: {probes} method x credential x body probes, 0 unauthenticated OK");
    for path in [
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ServerReady",
        "/grpc.health.v1.Health/Check",
    ] {
        let answer = house.grpc_with(&[], path, framed(&pb::ServerLiveRequest {})).await;
        assert_eq!(answer.code, Some(Code::Ok), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_real_client_shows_its_key_in_metadata() {
    let house = House::new(true);
    let (address, _listeners) = house.listen().await;
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    let call = async |values: &[&str]| {
        let mut client = tonic::client::Grpc::new(channel.clone());
        client.ready().await.unwrap();
        let mut request = tonic::Request::new(infer("mine-a"));
        for value in values {
            request.metadata_mut().append("authorization", value.parse().unwrap());
        }
        let path = format!("{SERVICE}/ModelInfer").parse().unwrap();
        let codec =
            tonic_prost::ProstCodec::<pb::ModelInferRequest, pb::ModelInferResponse>::default();
        client.unary(request, path, codec).await.map(drop).map_err(|status| status.code())
    };
    let good = house.bearer("predictor");
    assert_eq!(call(&[&good]).await, Ok(()));
    assert_eq!(call(&[]).await, Err(Code::Unauthenticated));
    assert_eq!(call(&[&good, &good]).await, Err(Code::Unauthenticated));
    assert_eq!(call(&["Bearer x"]).await, Err(Code::Unauthenticated));
    assert_eq!(call(&[&house.bearer("viewer")]).await, Err(Code::PermissionDenied));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_does_not_outlive_its_key() {
    let house = House::new(true);
    let (address, _listeners) = house.listen().await;
    let channel = Endpoint::from_shared(format!("http://{address}")).unwrap().connect_lazy();
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let (sender, receiver) = mpsc::channel(4);
    let mut request = tonic::Request::new(ReceiverStream::new(receiver));
    let bearer = house.bearer("mine-predictor");
    request.metadata_mut().insert("authorization", bearer.parse().unwrap());
    let path = format!("{SERVICE}/ModelStreamInfer").parse().unwrap();
    let codec =
        tonic_prost::ProstCodec::<pb::ModelInferRequest, pb::ModelStreamInferResponse>::default();
    let mut answers = client.streaming(request, path, codec).await.unwrap().into_inner();
    let mut ask = async |model: &str| {
        sender.send(infer(model)).await.unwrap();
        answers.next().await.unwrap().unwrap().error_message
    };
    assert_eq!(ask("mine-a").await, "");
    assert_eq!(ask("other").await, "model 'other' is not found");
    assert_eq!(ask("absent").await, "model 'absent' is not found");
    house.publish(|name| name != "mine-predictor");
    assert_eq!(ask("mine-a").await, "the token is not valid");
    house.publish(|_| true);
    assert_eq!(ask("mine-b").await, "", "and it is good again when its key is");
}

#[test]
fn the_prefix_is_right() {
    assert_eq!(framed(&infer("m")).len(), 5 + infer("m").encoded_len());
}
