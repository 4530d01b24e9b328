//! The generator against the floors: what is sent is answered, counted and timed, in each protocol.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use loadtest::client::{Call, Protocol};
use loadtest::drive::{self, Load, Pace};
use loadtest::floor::{Kind, Layout};
use loadtest::record::Report;
use loadtest::schedule::{self, Arrivals};
use loadtest::servers::Server;
use loadtest::tensors::{self, Dims, Encoding};

fn call(protocol: Protocol, encoding: Encoding) -> Call {
    let inputs = tensors::random(&["x:FP32:1,16".parse().unwrap()], &Dims::default(), 1).unwrap();
    Call::new(protocol, encoding, "mlp", &inputs).unwrap()
}

fn load() -> Load {
    Load {
        pace: Pace::Closed,
        connections: 4,
        streams_per_connection: 1,
        threads: 2,
        warmup: Duration::from_millis(100),
        length: Duration::from_secs(1),
        timeout: Duration::from_secs(10),
    }
}

fn floor(kind: Kind, layout: Layout) -> Server {
    Server::floor_of(Path::new(env!("CARGO_BIN_EXE_loadtest")), kind, layout, 2, None).unwrap()
}

fn consistent(report: &Report, name: &str) {
    assert_eq!(report.errors.len(), 0, "{name}: {report}");
    assert!(report.requests > 0, "{name}: {report}");
    assert_eq!(report.answer_bytes, report.request_bytes, "{name}: an echo");
    let latency = &report.latency_us;
    let rising = [latency.p50, latency.p90, latency.p99, latency.p99_9, latency.max];
    assert!(rising.is_sorted() && rising[0] > 0.0, "{name}: {rising:?}");
    let server = report.server.unwrap();
    assert!(server.cpu_us_per_request > 0.0 && server.rss_mib > 0.5, "{name}: {server:?}");
}

#[test]
fn a_closed_loop_is_answered_in_every_protocol() {
    let cases = [
        (Kind::Http1, Layout::Multi, Protocol::Http1, Encoding::Binary, 1),
        (Kind::Http, Layout::PerCore, Protocol::Http1, Encoding::Json, 1),
        (Kind::Http2, Layout::PerCore, Protocol::Http2, Encoding::Binary, 3),
        (Kind::Http, Layout::Multi, Protocol::Http2, Encoding::Json, 1),
        (Kind::Grpc, Layout::Multi, Protocol::Grpc, Encoding::Binary, 3),
        (Kind::Grpc, Layout::PerCore, Protocol::Grpc, Encoding::Binary, 1),
    ];
    for (kind, layout, protocol, encoding, streams_per_connection) in cases {
        let name = format!("{kind:?} {layout:?} {protocol:?}");
        let server = floor(kind, layout);
        let mut call = call(protocol, encoding);
        call.answer_len = Some(call.body.len());
        let load = Load { streams_per_connection, ..load() };
        let report = drive::run(server.address, &call, &load, Some(server.process())).unwrap();
        consistent(&report, &name);
        // In a closed loop each caller has its latencies one after the other.
        assert_eq!(report.latency_us.count, report.requests, "{name}");
        let callers = (load.connections * streams_per_connection) as f64;
        let busy = report.latency_us.mean / 1e6 * report.requests as f64;
        assert!(busy < callers * 1.5, "{name}: {callers} callers were busy for {busy} s");
    }
}

#[test]
fn an_open_loop_sends_what_its_schedule_says() {
    let server = floor(Kind::Http1, Layout::Multi);
    for arrivals in [Arrivals::Constant, Arrivals::Poisson] {
        let pace = Pace::Open { rate: 200.0, arrivals, seed: 5 };
        let load = Load { pace, ..load() };
        let call = call(Protocol::Http1, Encoding::Binary);
        let report = drive::run(server.address, &call, &load, Some(server.process())).unwrap();
        consistent(&report, &format!("{arrivals:?}"));
        let all = schedule::offsets(arrivals, 200.0, load.warmup + load.length, 5);
        let due = all.iter().filter(|at| **at >= load.warmup).count() as u64;
        assert_eq!(report.due, Some(due), "{arrivals:?}");
        assert_eq!(report.latency_us.count, due, "{arrivals:?}: each due request has a latency");
    }
}

/// Answers with `status`; under load, each connection's first request after `stall`.
fn stalling(stall: Duration, status: &'static str) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for (index, stream) in listener.incoming().enumerate() {
            let (mut stream, mut buffer) = (stream.unwrap(), [0; 4096]);
            // The first connection only asks whether it works.
            let mut pause = (index > 0).then_some(stall);
            while stream.read(&mut buffer).is_ok_and(|len| len > 0) {
                std::thread::sleep(pause.take().unwrap_or_default());
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\n\r\nok");
                if stream.write_all(answer.as_bytes()).is_err() {
                    break;
                }
            }
        }
    });
    address
}

#[test]
fn a_stall_is_in_the_latency_of_every_request_that_was_due_meanwhile() {
    let address = stalling(Duration::from_millis(500), "200 OK");
    let load = Load {
        pace: Pace::Open { rate: 100.0, arrivals: Arrivals::Constant, seed: 1 },
        connections: 1,
        threads: 1,
        warmup: Duration::ZERO,
        ..load()
    };
    let report = drive::run(address, &call(Protocol::Http1, Encoding::Json), &load, None).unwrap();
    assert_eq!(report.latency_us.count, 100, "{report}");
    // Half of them were due while the server stood still: they waited 250 ms on average. A client
    // that counts from when it sends would see one slow request.
    assert!(report.latency_us.mean > 100_000.0, "{report}");
}

#[test]
fn a_refusal_is_an_error_and_no_answer() {
    let address = stalling(Duration::ZERO, "503 Service Unavailable");
    let call = call(Protocol::Http1, Encoding::Json);
    let error = drive::run(address, &call, &load(), None).unwrap_err();
    assert!(format!("{error:#}").ends_with("http 503"), "{error:#}");
}
