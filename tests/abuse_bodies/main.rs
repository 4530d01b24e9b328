//! Bodies that mean harm, against the real program: memory is measured from outside, and a small
//! prediction has to work meanwhile. Each test prints its figure.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

mod gateway;
mod grpc;
mod json;

use std::io::{Read, Write};
use std::time::{Duration, Instant};

use flate2::Compression;
use flate2::write::{GzEncoder, ZlibEncoder};

use gateway::Gateway;

const MIB: u64 = 1 << 20;
const INFER: &str = "/v2/models/identity_fp32/infer";

/// One test at a time: each measures.
static ALONE: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

#[test]
fn stalled_bodies_hold_no_more_than_the_budget() {
    const CLIENTS: usize = 200;
    const BUDGET: u64 = 64 * MIB;
    let _alone = ALONE.lock();
    let mut gateway = Gateway::start(&format!("in_flight_bytes_max = {BUDGET}"));
    assert!(gateway.is_well());
    gateway.forget_peak();
    let (before, _) = gateway.memory();
    // No length said, so nothing can be refused before it comes; then silence.
    let chunk = vec![b' '; 1 << 20];
    let stalled: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let mut stream = gateway.connect();
            let head = format!(
                "POST {INFER} HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n100000\r\n"
            );
            // A refused one is closed while we write.
            drop(stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&chunk)));
            stream
        })
        .collect();
    let well = (0..20).filter(|_| gateway.is_well()).count();
    // What was written last may still lie in the sockets: on a busy machine it is judged later.
    let refused = || gateway.metric("tidegate_shed_total{reason=\"bytes\"}");
    let patience = Instant::now();
    while refused() < 130.0 && patience.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(50));
    }
    let (refused, held) = (refused(), gateway.metric("tidegate_in_flight_bytes"));
    let (_, peak) = gateway.memory();
    let growth = peak.saturating_sub(before);
    // A body that says how long it is need not come to be refused.
    let announced = gateway.post(INFER, "", &vec![b' '; 40 << 20]);
    drop(stalled);
    assert!(gateway.settles(), "bytes are given back");
    eprintln!(
        "{CLIENTS} stalled bodies of 1 MiB: {:.0} MiB held, {refused} refused, \
         resident memory +{:.1} MiB, small predictions {well}/20",
        held / MIB as f64,
        mib(growth)
    );
    assert!(held <= BUDGET as f64 && held > BUDGET as f64 / 2.0, "{held}");
    assert!(refused >= 130.0, "{refused}");
    assert_eq!(well, 20);
    // Beside the bodies, each connection has buffers, those that are being refused too.
    assert!(growth <= BUDGET + 64 * MIB, "{growth}");
    assert_eq!(announced.0, 503, "{}", announced.1);
    assert!(gateway.is_well() && gateway.is_alive());
}

fn gzip(data: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

fn zlib(data: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(data).unwrap();
    encoder.finish().unwrap()
}

/// Data that compresses a little less than a hundredfold.
fn thin(size: usize) -> Vec<u8> {
    let mut data = vec![0; size];
    let mut seed = 1_u64;
    for block in data.chunks_mut(64 << 10) {
        for byte in block.iter_mut().take(500) {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (seed >> 56) as u8;
        }
    }
    data
}

/// Name, encoding, body, how many, and the statuses that they may get.
type Bombs<'a> = (&'a str, &'a str, &'a [u8], usize, &'a [u16]);

#[test]
fn bombs_take_no_more_memory_than_the_budget() {
    const BUDGET: u64 = 48 * MIB;
    let _alone = ALONE.lock();
    let mut gateway =
        Gateway::start(&format!("in_flight_bytes_max = {BUDGET}\nbody_max_bytes = 16777216"));
    assert!(gateway.is_well());
    let zeros = vec![0; 12 << 20];
    let (zipped, deflated) = (gzip(&zeros), zlib(&zeros));
    let below_ratio = gzip(&thin(14 << 20));
    let nested = gzip(&zipped);
    let member = gzip(b"{}");
    let members = member.repeat(20_000);
    let kinds: [Bombs<'_>; 6] = [
        ("gzip, a thousandfold", "gzip", &zipped, 77, &[413, 503]),
        ("deflate, a thousandfold", "deflate", &deflated, 75, &[413, 503]),
        ("below the ratio", "gzip", &below_ratio, 8, &[400, 503]),
        ("nested", "gzip", &nested, 14, &[400, 503]),
        ("nested, said so", "gzip, gzip", &nested, 13, &[415]),
        ("many members", "gzip", &members, 13, &[400, 503]),
    ];
    gateway.forget_peak();
    let (before, _) = gateway.memory();
    let mut answers = std::collections::BTreeMap::new();
    let total: usize = kinds.iter().map(|(_, _, _, count, _)| count).sum();
    std::thread::scope(|scope| {
        let senders: Vec<_> = (0..16)
            .map(|worker| {
                let (gateway, kinds) = (&gateway, &kinds);
                scope.spawn(move || {
                    let mut seen = Vec::new();
                    for (name, encoding, body, count, expected) in kinds {
                        for _ in (worker..*count).step_by(16) {
                            let header = format!("content-encoding: {encoding}\r\n");
                            let (status, text) = gateway.post(INFER, &header, body);
                            assert!(expected.contains(&status), "{name}: {status} {text}");
                            seen.push((*name, status));
                        }
                    }
                    seen
                })
            })
            .collect();
        for sender in senders {
            for seen in sender.join().unwrap() {
                *answers.entry(seen).or_insert(0) += 1;
            }
        }
    });
    let (_, peak) = gateway.memory();
    let growth = peak.saturating_sub(before);
    eprintln!(
        "{total} bombs: resident memory +{:.1} MiB with a budget of {:.0} MiB; {answers:?}",
        mib(growth),
        mib(BUDGET)
    );
    assert_eq!(total, 200);
    assert!(growth <= BUDGET + 32 * MIB, "{growth}");
    for encoding in ["zstd", "br", "compress"] {
        let header = format!("content-encoding: {encoding}\r\n");
        assert_eq!(gateway.post(INFER, &header, &zipped).0, 415, "{encoding}");
    }
    assert!(gateway.settles() && gateway.is_well() && gateway.is_alive());
}

#[test]
fn large_bodies_leave_small_ones_their_turn() {
    let _alone = ALONE.lock();
    let gateway = Gateway::start("");
    let data = vec!["0.5"; 2_000_000].join(",");
    let body = format!(
        r#"{{"inputs":[{{"name":"x","datatype":"FP32","shape":[1000000,2],"data":[{data}]}}]}}"#
    );
    std::thread::scope(|scope| {
        let large: Vec<_> =
            (0..8).map(|_| scope.spawn(|| gateway.post(INFER, "", body.as_bytes()).0)).collect();
        std::thread::sleep(Duration::from_millis(100));
        // They all decode for seconds, more of them than there are threads; this one does not wait
        // for any.
        let mut answered = 0;
        while large.iter().any(|large| !large.is_finished()) {
            assert!(gateway.is_well());
            answered += 1;
        }
        eprintln!("small predictions answered while 8 bodies of 8 MB were decoded: {answered}");
        assert!(answered >= 8, "{answered}");
        for large in large {
            // More rows than the model takes, which is known once they are decoded.
            assert_eq!(large.join().unwrap(), 400);
        }
    });
}

#[test]
fn calls_that_bring_no_tensors_stay_small() {
    let _alone = ALONE.lock();
    let gateway = Gateway::start("");
    let large = vec![b' '; 2 << 20];
    for path in ["/v2/repository/index", "/v2/logging", "/v2/trace/setting"] {
        assert_eq!(gateway.post(path, "", &large).0, 413, "{path}");
    }
    let mut stream = gateway.connect();
    stream
        .write_all(b"GET /v2/health/ready HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
}
