//! Clients that vanish: nothing of theirs stays.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, sleep};

use crate::alone;
use crate::client::{Client, Outcome, Wire};
use crate::server::{Server, Slow};

/// Of each kind.
const ABORTS: usize = 1000;
const COST: Duration = Duration::from_millis(1);
/// One in so many is large.
const LARGE_EVERY: usize = 40;
/// 8 MiB.
const LARGE_ROWS: usize = 1 << 20;

/// A request of `rows` rows, as bytes on the wire.
fn request(rows: usize) -> Vec<u8> {
    let body = vec![0_u8; rows * 8];
    let json = format!(
        r#"{{"inputs":[{{"name":"x","datatype":"FP32","shape":[{rows},2],"parameters":{{"binary_data_size":{}}}}}],"parameters":{{"binary_data_output":true}}}}"#,
        body.len()
    );
    let head = format!(
        "POST /v2/models/slow/infer HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\ninference-header-content-length: {}\r\n\r\n",
        json.len() + body.len(),
        json.len()
    );
    [head.as_bytes(), json.as_bytes(), &body].concat()
}

/// Leaves with a reset rather than a farewell.
fn reset(stream: TcpStream) {
    let socket = socket2::Socket::from(stream);
    socket.set_linger(Some(Duration::ZERO)).unwrap();
}

/// Sends the first `share` of a request, reads `read` bytes of the answer, and is gone.
fn vanish(address: SocketAddr, request: &[u8], share: f64, read: usize, hard: bool) {
    let mut stream = TcpStream::connect(address).unwrap();
    let part = crate::client::whole(request.len() as f64 * share);
    stream.write_all(&request[..part]).unwrap();
    if read > 0 {
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.read_exact(&mut vec![0; read]).unwrap();
    }
    if hard {
        reset(stream);
    }
}

#[test]
fn nothing_is_left_of_clients_that_vanish() {
    alone(|runtime| {
        let mut slow = Slow::new("slow", COST, 2);
        slow.batch.rows_max = LARGE_ROWS;
        let server = Server::start(&[&slow]);
        let client = runtime.block_on(async { Client::new(server.data) });
        let address = server.data;
        let small = request(1);
        // More than the sockets' buffers hold, so that the answer is still being written.
        let large = request(LARGE_ROWS);
        for at in 0..ABORTS {
            let hard = at % 2 == 0;
            let share = (at % 97) as f64 / 97.0;
            vanish(address, &small, share, 0, hard); // mid-request
            vanish(address, &small, 1.0, 0, hard); // before the answer
            if at % LARGE_EVERY == 0 {
                vanish(address, &large, 1.0, 100, hard); // mid-response
            }
        }
        runtime.block_on(async {
            let mut calls = JoinSet::new();
            for at in 0..ABORTS {
                let client = client.clone();
                calls.spawn(async move {
                    let call = client.infer(Wire::Grpc, "slow", 0.0, None);
                    let patience = Duration::from_micros(u64::try_from(at).unwrap() * 37 % 9000);
                    tokio::time::timeout(patience, call).await.is_ok()
                });
            }
            let answered = calls.join_all().await.into_iter().filter(|done| *done).count();
            let asked = Instant::now();
            loop {
                let mut left = Vec::new();
                for gauge in ["tidegate_in_flight", "tidegate_queue_depth"] {
                    left.push(client.metric(server.metrics, gauge).await);
                }
                if left.iter().all(|count| *count == 0.0) {
                    break;
                }
                assert!(asked.elapsed() < Duration::from_secs(20), "left: {left:?}");
                sleep(Duration::from_millis(10)).await;
            }
            let runs = client.metric(server.metrics, "tidegate_executions_total").await;
            eprintln!(
                "C13: {} HTTP and {} gRPC aborts, gauges at 0 after {:?}; {runs} executions",
                2 * ABORTS + ABORTS / LARGE_EVERY,
                ABORTS - answered,
                asked.elapsed(),
            );
            for wire in [Wire::Http, Wire::Grpc] {
                assert_eq!(client.infer(wire, "slow", 1.0, None).await, Outcome::Ok);
            }
        });
    });
}
