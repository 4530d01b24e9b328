//! gRPC calls that break the rules: each is answered with a status, and counted once.

use bytes::Bytes;
use http::{HeaderMap, Request};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use tidegate::proto::inference::model_infer_request::{
    InferInputTensor, InferRequestedOutputTensor,
};
use tidegate::proto::inference::{InferParameter, InferTensorContents, ModelInferRequest};

use super::gateway::Gateway;
use super::{ALONE, MIB, gzip, mib};

const INFER: &str = "/inference.GRPCInferenceService/ModelInfer";
const OK: u32 = 0;
const INVALID: u32 = 3;
const NOT_FOUND: u32 = 5;
const EXHAUSTED: u32 = 8;
const UNIMPLEMENTED: u32 = 12;
const INTERNAL: u32 = 13;

/// One call: what is sent beside the usual headers, and the status that it gets.
struct Call {
    name: &'static str,
    path: &'static str,
    headers: Vec<(&'static str, String)>,
    body: Vec<Bytes>,
    trailers: bool,
    want: u32,
}

fn call(name: &'static str, body: Vec<u8>, want: u32) -> Call {
    let body = if body.is_empty() { Vec::new() } else { vec![Bytes::from(body)] };
    Call { name, path: INFER, headers: Vec::new(), body, trailers: false, want }
}

impl Call {
    fn header(mut self, name: &'static str, value: &str) -> Self {
        self.headers.push((name, value.to_owned()));
        self
    }

    fn path(mut self, path: &'static str) -> Self {
        self.path = path;
        self
    }
}

/// A message with its head.
fn framed(message: &[u8]) -> Vec<u8> {
    flagged(0, u32::try_from(message.len()).unwrap(), message)
}

fn flagged(flag: u8, len: u32, message: &[u8]) -> Vec<u8> {
    [&[flag], &len.to_be_bytes()[..], message].concat()
}

fn row() -> ModelInferRequest {
    ModelInferRequest {
        model_name: "identity_fp32".to_owned(),
        inputs: vec![InferInputTensor {
            name: "x".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![1, 2],
            ..InferInputTensor::default()
        }],
        raw_input_contents: vec![vec![0; 8].into()],
        ..ModelInferRequest::default()
    }
}

fn with(change: impl FnOnce(&mut ModelInferRequest)) -> Vec<u8> {
    let mut request = row();
    change(&mut request);
    framed(&request.encode_to_vec())
}

/// A good message with bytes behind it.
fn and(more: &[u8]) -> Vec<u8> {
    framed(&[&row().encode_to_vec()[..], more].concat())
}

/// Groups of field 100, one in the other.
fn groups(levels: usize, closed: bool) -> Vec<u8> {
    let mut bytes = [0xa3, 0x06].repeat(levels);
    if closed {
        bytes.extend([0xa4, 0x06].repeat(levels));
    }
    bytes
}

fn calls() -> Vec<Call> {
    let parameter = |at: usize| (at.to_string(), InferParameter::default());
    let typed = |contents: InferTensorContents, datatype: &'static str| {
        move |request: &mut ModelInferRequest| {
            request.raw_input_contents.clear();
            request.inputs[0].datatype = datatype.to_owned();
            request.inputs[0].contents = Some(contents);
        }
    };
    let bomb = gzip(&vec![0; 20 << 20]);
    let packed = |body: &[u8]| flagged(1, u32::try_from(body.len()).unwrap(), body);
    let good = with(|_| {});
    let mut calls = vec![
        call("right", good.clone(), OK),
        call("length of 4 GiB", flagged(0, u32::MAX, b""), EXHAUSTED),
        call("one byte over the limit", flagged(0, (64 << 20) + 1, b""), EXHAUSTED),
        call("shorter than it says", flagged(0, 100, &[0; 10]), INTERNAL),
        call("half a head", vec![0, 0, 0], INTERNAL),
        call("no message", Vec::new(), INTERNAL),
        call("two messages", [good.clone(), good.clone()].concat(), INVALID),
        call("100,000 empty messages", framed(b"").repeat(100_000), INVALID),
        call("empty message", framed(b""), INVALID),
        call("no protobuf", framed(&[0xff; 64]), INVALID),
        call("field 0", and(&[0x00, 0x01]), INVALID),
        call("wire type 7", and(&[0x0f]), INVALID),
        call(
            "number without an end",
            and(&[[0x80, 0x06].as_slice(), &[0xff; 12]].concat()),
            INVALID,
        ),
        call("field past the end", and(&[0xa2, 0x06, 0x7f, 0x00]), INVALID),
        call("model name is a number", framed(&[0x08, 0x01]), INVALID),
        call("model name is no text", framed(&[0x0a, 0x02, 0xff, 0xfe]), INVALID),
        call("50 groups", and(&groups(50, true)), OK),
        call("101 groups", and(&groups(101, true)), INVALID),
        call("a million groups", and(&groups(1_000_000, false)), INVALID),
        call("a group that ends and never began", and(&[0xa4, 0x06]), INVALID),
        call("unknown fields", and(&[0xa2, 0x06, 0x03, 1, 2, 3, 0xa0, 0x06, 0x05]), OK),
        call("compressed, and not said how", flagged(1, 4, &[0; 4]), INTERNAL),
        call("flag 2", flagged(2, 4, &[0; 4]), INTERNAL),
        call("zstd", packed(&bomb[..64]), UNIMPLEMENTED).header("grpc-encoding", "zstd"),
        call("br", packed(&bomb[..64]), UNIMPLEMENTED).header("grpc-encoding", "br"),
        call("gzip bomb", packed(&bomb), EXHAUSTED).header("grpc-encoding", "gzip"),
        call("deflate that is none", packed(&bomb), INVALID).header("grpc-encoding", "deflate"),
        call("gzip cut short", packed(&bomb[..64]), INVALID).header("grpc-encoding", "gzip"),
        call("nothing, compressed", packed(b""), INVALID).header("grpc-encoding", "gzip"),
        call("gzip", packed(&gzip(&row().encode_to_vec())), OK).header("grpc-encoding", "gzip"),
        call("plain although gzip is said", good.clone(), OK).header("grpc-encoding", "gzip"),
        call("11,000 years", good.clone(), OK).header("grpc-timeout", "99999999H"),
        call("trailers only", Vec::new(), INTERNAL),
        call("no model", with(|request| request.model_name.clear()), INVALID),
        call("no such model", with(|request| request.model_name = "m".to_owned()), NOT_FOUND),
        call(
            "a path for a model",
            with(|request| request.model_name = "../x".to_owned()),
            NOT_FOUND,
        ),
        call("no version", with(|request| request.model_version = "0".to_owned()), INVALID),
        call(
            "1,025 inputs",
            with(|request| request.inputs = vec![InferInputTensor::default(); 1025]),
            INVALID,
        ),
        call("a million empty inputs", framed(&[0x2a, 0x00].repeat(1_000_000)), INVALID),
        call(
            "1,025 outputs",
            with(|request| request.outputs = vec![InferRequestedOutputTensor::default(); 1025]),
            INVALID,
        ),
        call(
            "1,025 raw contents",
            with(|request| request.raw_input_contents = vec![Bytes::new(); 1025]),
            INVALID,
        ),
        call(
            "257 parameters",
            with(|request| request.parameters = (0..257).map(parameter).collect()),
            INVALID,
        ),
        call(
            "one parameter twice",
            and(&[0x22, 0x03, 0x0a, 0x01, b'p', 0x22, 0x03, 0x0a, 0x01, b'p']),
            INVALID,
        ),
        call("rank 100,000", with(|request| request.inputs[0].shape = vec![1; 100_000]), INVALID),
        call("negative dimension", with(|request| request.inputs[0].shape = vec![-1, 2]), INVALID),
        call(
            "product that overflows",
            with(|request| request.inputs[0].shape = vec![i64::MAX, i64::MAX]),
            INVALID,
        ),
        call(
            "bytes that are not the product",
            with(|request| request.raw_input_contents = vec![vec![0; 7].into()]),
            INVALID,
        ),
        call(
            "BYTES past the end",
            with(|request| {
                request.inputs[0].datatype = "BYTES".to_owned();
                request.raw_input_contents = vec![vec![0xff; 8].into()];
            }),
            INVALID,
        ),
        call(
            "BOOL that is 2",
            with(|request| {
                request.inputs[0].datatype = "BOOL".to_owned();
                request.raw_input_contents = vec![vec![2, 0].into()];
            }),
            INVALID,
        ),
        call(
            "300 for UINT8",
            with(typed(
                InferTensorContents { uint_contents: vec![300, 0], ..Default::default() },
                "UINT8",
            )),
            INVALID,
        ),
        call(
            "contents of another field",
            with(typed(
                InferTensorContents { int_contents: vec![1, 2], ..Default::default() },
                "FP32",
            )),
            INVALID,
        ),
        call("unknown service", good.clone(), UNIMPLEMENTED).path("/other.Service/Call"),
        call("unknown method", good.clone(), UNIMPLEMENTED)
            .path("/inference.GRPCInferenceService/Other"),
        call("no method", good.clone(), UNIMPLEMENTED).path("/"),
    ];
    for timeout in ["", "1", "H", "-1S", "999999999S", "1x", "1 S", "S1", "1.5S", "0x1S"] {
        calls.push(call("timeout", good.clone(), INVALID).header("grpc-timeout", timeout));
    }
    for call in &mut calls {
        call.trailers = call.name == "trailers only";
    }
    calls
}

/// Sends a call on a connection of its own; its status and message.
async fn send(gateway: &Gateway, call: &Call) -> (u32, String) {
    let stream = tokio::net::TcpStream::connect(gateway.data).await.unwrap();
    let handshake =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream));
    let (mut sender, connection) = handshake.await.unwrap();
    tokio::spawn(connection);
    let uri = format!("http://{}{}", gateway.data, call.path);
    let mut request =
        Request::post(uri).header("content-type", "application/grpc").header("te", "trailers");
    for (name, value) in &call.headers {
        request = request.header(*name, value);
    }
    let data = call.body.iter().cloned().map(Frame::data);
    let trailers = call.trailers.then(|| Frame::trailers(HeaderMap::new()));
    let frames: Vec<_> = data.chain(trailers).map(Ok::<_, std::io::Error>).collect();
    let request = request.body(StreamBody::new(tokio_stream::iter(frames))).unwrap();
    let answer = sender.send_request(request).await.unwrap_or_else(|error| {
        panic!("{}: no answer: {error:?}", call.name);
    });
    let mut headers = answer.headers().clone();
    // What is sent after the answer's end may be reset.
    if let Ok(body) = answer.into_body().collect().await
        && let Some(trailers) = body.trailers()
    {
        headers.extend(trailers.clone());
    }
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let status = text("grpc-status").and_then(|text| text.parse().ok());
    let status = status.unwrap_or_else(|| panic!("{}: no status in {headers:?}", call.name));
    (status, text("grpc-message").unwrap_or_default().to_owned())
}

#[test]
fn every_broken_call_is_answered_and_counted() {
    let _alone = ALONE.lock();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut gateway = Gateway::start("");
    assert!(gateway.is_well());
    gateway.forget_peak();
    let (before, _) = gateway.memory();
    let calls = calls();
    let predictions = calls.iter().filter(|call| call.path == INFER).count();
    let mut wrong = Vec::new();
    for call in &calls {
        let (status, message) = runtime.block_on(send(&gateway, call));
        if status != call.want {
            wrong.push(format!("{}: {status} ({message}), expected {}", call.name, call.want));
        }
        assert!(gateway.is_well(), "after {}", call.name);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let (_, peak) = gateway.memory();
    let counted = gateway.sum("tidegate_requests_total{", "protocol=\"grpc\"");
    eprintln!(
        "{} broken calls, all answered with a status, {counted} of {predictions} predictions \
         counted, memory +{:.1} MiB",
        calls.len(),
        mib(peak.saturating_sub(before))
    );
    assert!((counted - predictions as f64).abs() < 0.5, "{counted} of {predictions}");
    assert!(peak.saturating_sub(before) < 96 * MIB);
    assert!(gateway.settles() && gateway.is_alive());
}

#[test]
fn metadata_over_the_limit_is_refused() {
    let _alone = ALONE.lock();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let gateway = Gateway::start("");
    let large = call("metadata", with(|_| {}), OK).header("x-large", &"m".repeat(20 << 10));
    let refused = runtime.block_on(async {
        let stream = tokio::net::TcpStream::connect(gateway.data).await.unwrap();
        let io = TokioIo::new(stream);
        let client = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        let (mut sender, connection) = client.handshake(io).await.unwrap();
        tokio::spawn(connection);
        let request = Request::post(format!("http://{}{INFER}", gateway.data))
            .header("content-type", "application/grpc")
            .header("x-large", &large.headers[0].1)
            .body(http_body_util::Full::new(large.body[0].clone()))
            .unwrap();
        let answer = sender.send_request(request).await;
        answer.map_or(0, |answer| answer.status().as_u16())
    });
    // Answered as too large, or its stream reset by the protocol.
    assert!([0, 431].contains(&refused), "{refused}");
    assert!(gateway.is_well());
    eprintln!("20 KiB of metadata: {refused}");
}

#[test]
fn typed_contents_cost_what_they_hold() {
    let _alone = ALONE.lock();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut gateway = Gateway::start("");
    assert!(gateway.is_well());
    let mut message = row();
    message.model_name = "identity_int64".to_owned();
    message.raw_input_contents.clear();
    message.inputs[0].datatype = "INT64".to_owned();
    message.inputs[0].shape = vec![4 << 20, 2];
    message.inputs[0].contents =
        Some(InferTensorContents { int64_contents: vec![0; 8 << 20], ..Default::default() });
    let body = framed(&message.encode_to_vec());
    let len = body.len() as u64;
    gateway.forget_peak();
    let (before, _) = gateway.memory();
    // Its rows are over the model's limit, which is known once it is decoded.
    let (status, text) = runtime.block_on(send(&gateway, &call("small numbers", body, INVALID)));
    let growth = gateway.memory().1.saturating_sub(before);
    eprintln!(
        "{:.0} MiB of one-byte numbers: memory +{:.1} MiB, {:.1} times",
        mib(len),
        mib(growth),
        growth as f64 / len as f64
    );
    assert_eq!(status, INVALID, "{text}");
    assert!(growth <= 20 * len, "{growth}");
    assert!(gateway.settles() && gateway.is_alive());
}
