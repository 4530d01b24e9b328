//! gRPC bodies are held to the same pace; streams may be quiet between two messages only.

use std::time::{Duration, Instant};

use bytes::{BufMut as _, Bytes, BytesMut};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::Frame;
use prost::Message as _;
use tidegate::proto::inference as pb;
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tower_service::Service as _;

use crate::support::{FOREVER, Server};

const SERVICE: &str = "/inference.GRPCInferenceService";
const DEADLINE_EXCEEDED: &str = "4";

/// A call whose body is what is sent; gives its answer's head.
async fn call(
    channel: &mut Channel,
    method: &str,
) -> (mpsc::Sender<Bytes>, tokio::task::JoinHandle<http::Response<tonic::body::Body>>) {
    let (sender, receiver) = mpsc::channel(16);
    let frames =
        ReceiverStream::new(receiver).map(|data| Ok::<_, tonic::Status>(Frame::data(data)));
    let request = http::Request::post(format!("http://a{SERVICE}/{method}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(tonic::body::Body::new(StreamBody::new(frames)))
        .unwrap();
    std::future::poll_fn(|cx| channel.poll_ready(cx)).await.unwrap();
    let answer = channel.call(request);
    (sender, tokio::spawn(async move { answer.await.unwrap() }))
}

fn message() -> Bytes {
    let input = pb::model_infer_request::InferInputTensor {
        name: "x".to_owned(),
        datatype: "FP32".to_owned(),
        shape: vec![1, 2],
        ..Default::default()
    };
    let request = pb::ModelInferRequest {
        model_name: "echo".to_owned(),
        inputs: vec![input],
        raw_input_contents: vec![vec![0; 8].into()],
        ..Default::default()
    };
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(request.encoded_len()).unwrap());
    request.encode(&mut framed).unwrap();
    framed.freeze()
}

fn status(headers: &http::HeaderMap) -> Option<String> {
    let status = headers.get("grpc-status")?;
    Some(format!("{} {:?}", status.to_str().unwrap(), headers.get("grpc-message")))
}

/// Waits for the end of a call: its status.
async fn ended(answer: http::Response<tonic::body::Body>) -> String {
    match status(answer.headers()) {
        Some(status) => status,
        None => {
            let body = answer.into_body().collect().await.unwrap();
            body.trailers().and_then(status).unwrap()
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn messages_have_to_come_at_a_pace() {
    let server =
        Server::start("body_grace_ms = 800\nbody_timeout_ms = 3000\nidle_timeout_ms = 1000", &[])
            .await;
    let endpoint = Endpoint::from_shared(format!("http://{}", server.http)).unwrap();
    let mut channel = endpoint.connect().await.unwrap();
    let whole = message();
    let start = Instant::now();

    // A stream that is quiet for longer than any of the times, between messages.
    let (quiet, answers) = call(&mut channel, "ModelStreamInfer").await;
    let quiet_stream = async {
        for _ in 0..2 {
            sleep(Duration::from_millis(1800)).await;
            quiet.send(whole.clone()).await.unwrap();
        }
        drop(quiet);
        ended(timeout(FOREVER, answers).await.unwrap().unwrap()).await
    };
    // One that stops within a message, and a call that does.
    let mut other = channel.clone();
    let cut = async {
        let (stuck, answers) = call(&mut other, "ModelStreamInfer").await;
        stuck.send(whole.clone()).await.unwrap();
        stuck.send(whole.slice(..9)).await.unwrap();
        let stream = ended(timeout(FOREVER, answers).await.unwrap().unwrap()).await;
        let (stuck_call, answer) = call(&mut other, "ModelInfer").await;
        stuck_call.send(whole.slice(..9)).await.unwrap();
        let unary = ended(timeout(FOREVER, answer).await.unwrap().unwrap()).await;
        drop((stuck, stuck_call));
        (stream, unary)
    };
    let (quiet, (stream, unary)) = tokio::join!(quiet_stream, cut);
    println!(
        "B5: gRPC: quiet stream: {quiet}; stuck stream: {stream}; stuck call: {unary}; {:?}",
        start.elapsed()
    );
    assert!(quiet.starts_with('0'), "{quiet}");
    assert!(stream.starts_with(DEADLINE_EXCEEDED), "{stream}");
    assert!(unary.starts_with(DEADLINE_EXCEEDED), "{unary}");
    assert!(
        (server.metric("tidegate_connections_closed_total", "slow_body").await - 2.0).abs() < 0.5
    );
    // The connection has no call now, and ends though its client would keep it.
    server.metric_becomes("tidegate_connections", "", 0.0).await;
    assert!(server.metric("tidegate_connections_closed_total", "idle").await > 0.5);
}
