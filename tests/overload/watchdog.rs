//! A run that does not end makes liveness fail, over HTTP too; one that does makes it well again.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use tidegate::gateway;
use tidegate::transport::Settings;
use tokio::time::Instant;

use crate::alone;
use crate::client::{Client, Outcome, Wire};
use crate::server::{Server, Slow};

const COST: Duration = Duration::from_secs(2);

/// Status line of the liveness route.
fn live(address: SocketAddr) -> String {
    let mut stream = TcpStream::connect(address).unwrap();
    let request = "GET /v2/health/live HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer.lines().next().unwrap_or_default().to_owned()
}

#[test]
fn a_stuck_model_makes_liveness_fail() {
    alone(|runtime| {
        let slow = Slow::new("slow", COST, 1);
        let watchdog = Some(COST / 4);
        let settings = gateway::Settings { watchdog, ..gateway::Settings::default() };
        let server = Server::with(&[&slow], settings, Settings::default());
        assert_eq!(live(server.data), "HTTP/1.1 200 OK");
        let started = Instant::now();
        let data = server.data;
        let call = runtime
            .spawn(async move { Client::new(data).infer(Wire::Http, "slow", 0.0, None).await });
        let mut failed = None;
        while failed.is_none() && !call.is_finished() {
            failed = (live(data) == "HTTP/1.1 503 Service Unavailable").then(|| started.elapsed());
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("C7: a watchdog of {:?} saw a stuck run after {failed:?}", COST / 4);
        assert!(failed.is_some_and(|after| after >= COST / 4), "{failed:?}");
        assert_eq!(runtime.block_on(call).unwrap(), Outcome::Ok);
        assert_eq!(live(data), "HTTP/1.1 200 OK");
    });
}
