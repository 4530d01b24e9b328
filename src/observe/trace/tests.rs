//! Spans' shape, sampling, and an export to a collector on loopback.

use std::time::Duration;

use bytes::Bytes;
use http_body_util::BodyExt as _;
use hyper_util::rt::{TokioExecutor, TokioIo};

use super::*;
use crate::domain::Protocol;

const TRACE: u128 = 0x4bf9_2f35_77b3_4da6_a3ce_929d_0e0e_4736;
const PARENT: u64 = 0x00f0_67aa_0ba9_02b7;

fn completion(trace: Option<TraceContext>) -> Completion {
    Completion {
        prediction_id: uuid::Uuid::now_v7(),
        request_id: String::new(),
        received_at: SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000),
        model: "iris".parse().unwrap(),
        version: None,
        digest: None,
        arm: None,
        reason: None,
        protocol: Protocol::Http,
        principal: None,
        trace,
        outcome: Outcome::Ok,
        timings: Timings {
            queue: Duration::from_micros(100),
            batch_wait: Duration::ZERO,
            compute_input: Duration::from_micros(10),
            compute_infer: Duration::from_micros(200),
            compute_output: Duration::from_micros(20),
            total: Duration::from_micros(400),
        },
        rows: 1,
        batch_size: 1,
        cached: false,
        shadow_of: None,
        inputs: Vec::new(),
        outputs: Vec::new(),
    }
}

fn called() -> Option<TraceContext> {
    Some(TraceContext { trace_id: TRACE, parent_span: PARENT, sampled: true })
}

fn traces(endpoint: &str, sample_ratio: f64) -> Traces {
    let (endpoint, service_name) = (endpoint.to_owned(), "test".to_owned());
    Traces::new(Otlp { endpoint, sample_ratio, service_name }, metrics::Counter::noop())
}

#[test]
fn phases_lie_inside_the_request_under_the_callers_trace() {
    let spans = spans(&finished(TRACE, &completion(called())));
    let names: Vec<&str> = spans.iter().map(|span| &*span.name).collect();
    assert_eq!(names, ["infer", "queue", "compute_input", "compute_infer", "compute_output"]);
    let root = &spans[0];
    assert_eq!(root.parent_span_id, SpanId::from(PARENT));
    assert!(root.parent_span_is_remote);
    let mut ids = std::collections::HashSet::new();
    for span in &spans {
        assert_eq!(span.span_context.trace_id(), TraceId::from(TRACE));
        assert!(span.span_context.is_valid() && ids.insert(span.span_context.span_id()));
        assert!(root.start_time <= span.start_time && span.end_time <= root.end_time);
    }
    for (span, next) in spans[1..].iter().zip(&spans[2..]) {
        assert_eq!(span.parent_span_id, root.span_context.span_id());
        assert_eq!(span.end_time, next.start_time);
    }
    assert_eq!(spans[4].end_time, root.end_time);
}

#[test]
fn the_caller_decides_and_else_the_ratio() {
    let waiting = |ratio: f64, trace: Option<TraceContext>| {
        let traces = traces("http://127.0.0.1:1", ratio);
        for _ in 0..1000 {
            traces.offer(&completion(trace));
        }
        QUEUE_MAX - traces.queue.capacity()
    };
    assert_eq!(waiting(1.0, None), 1000);
    assert_eq!(waiting(0.0, None), 0);
    assert_eq!(waiting(0.0, called()), 1000);
    assert_eq!(waiting(1.0, called().map(|trace| TraceContext { sampled: false, ..trace })), 0);
    let half = waiting(0.5, None);
    assert!((350..650).contains(&half), "{half}");
}

#[test]
fn a_full_queue_never_blocks() {
    let traces = traces("http://127.0.0.1:1", 1.0);
    for _ in 0..QUEUE_MAX + 10 {
        traces.offer(&completion(None));
    }
    assert_eq!(traces.queue.capacity(), 0);
}

/// Answers one connection's exports as a collector does, and gives their bodies.
async fn collect(listener: tokio::net::TcpListener) -> Vec<u8> {
    let (sender, mut bodies) = channel::<Vec<u8>>(16);
    let (stream, _) = listener.accept().await.unwrap();
    let service =
        hyper::service::service_fn(move |request: http::Request<hyper::body::Incoming>| {
            let sender = sender.clone();
            async move {
                assert_eq!(
                    request.uri().path(),
                    "/opentelemetry.proto.collector.trace.v1.TraceService/Export"
                );
                let body = request.into_body().collect().await.unwrap().to_bytes();
                sender.send(body.to_vec()).await.unwrap();
                let mut trailers = http::HeaderMap::new();
                trailers.insert("grpc-status", http::HeaderValue::from_static("0"));
                let body = http_body_util::Full::new(Bytes::from_static(&[0; 5]))
                    .with_trailers(std::future::ready(Some(Ok(trailers))));
                let answer = http::Response::builder().header("content-type", "application/grpc");
                Ok::<_, std::convert::Infallible>(answer.body(body).unwrap())
            }
        });
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        done = connection => panic!("the exporter went away first: {done:?}"),
        body = bodies.recv() => body.unwrap(),
    }
}

#[tokio::test]
async fn spans_reach_a_collector_before_the_export_ends() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let traces = traces(&format!("http://{}", listener.local_addr().unwrap()), 1.0);
    traces.offer(&completion(called()));
    // Asked to stop at once, it still sends what was handed over.
    let collected = tokio::spawn(collect(listener));
    let export = traces.export(std::future::ready(()));
    let body = tokio::select! {
        body = collected => body.unwrap(),
        () = async { export.await; std::future::pending().await } => unreachable!(),
    };
    let holds = |needle: &[u8]| body.windows(needle.len()).any(|window| window == needle);
    assert!(holds(&TRACE.to_be_bytes()) && holds(&PARENT.to_be_bytes()));
    for name in ["infer", "queue", "compute_infer", "tidegate.prediction_id", "test"] {
        assert!(holds(name.as_bytes()), "{name}");
    }
}
