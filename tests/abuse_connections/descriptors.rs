//! Running out of descriptors, and one client that wants every connection: who is connected is
//! served, others wait, and it ends by itself.

use std::process::Command;
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::{sleep, timeout};

use crate::support::{FOREVER, Server, ask, closed, infer};

const LIVE: &str = "GET /v2/health/live HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

async fn many(server: &Server, count: usize) -> Vec<TcpStream> {
    let mut streams = Vec::new();
    for _ in 0..count {
        // The kernel takes them even where the gateway does not.
        let connected = timeout(Duration::from_secs(5), TcpStream::connect(server.http)).await;
        streams.push(connected.unwrap().unwrap());
    }
    streams
}

async fn predict(stream: &mut TcpStream) {
    stream.write_all(&infer(1, "")).await.unwrap();
    let mut buffer = [0; 4096];
    let read = timeout(FOREVER, stream.read(&mut buffer)).await.unwrap().unwrap();
    assert!(buffer[..read].starts_with(b"HTTP/1.1 200"));
}

/// Time until a new client is served.
async fn served_again(server: &Server) -> Duration {
    let start = Instant::now();
    assert!(ask(server.http, LIVE.as_bytes()).await.unwrap().is_ok());
    start.elapsed()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fewer_descriptors_than_connections() {
    let mut server = Server::start("", &["--nofile=260:260"]).await;
    let pid = server.pid();
    let mut early = TcpStream::connect(server.http).await.unwrap();
    predict(&mut early).await;
    let streams = many(&server, 400).await;
    predict(&mut early).await;
    let open = server.metric("process_open_fds", "").await;
    assert!(open < 255.0, "connections left {open} of 260 descriptors");
    drop(streams);
    let took = served_again(&server).await;
    println!("B6: 400 connections for 260 descriptors, {open} open; served again after {took:?}");
    assert!(server.is_running() && server.pid() == pid);
    assert!(server.metric("tidegate_accept_errors_total", "").await < 0.5);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_descriptor_left() {
    let mut server = Server::start("", &[]).await;
    let pid = server.pid();
    let mut early = TcpStream::connect(server.http).await.unwrap();
    predict(&mut early).await;
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let limit = format!("--nofile={}:", open + 20);
    let limited = Command::new("prlimit").args(["--pid", &pid.to_string(), &limit]).status();
    assert!(limited.unwrap().success());
    let streams = many(&server, 200).await;
    sleep(Duration::from_millis(1500)).await;
    predict(&mut early).await;
    drop(streams);
    let took = served_again(&server).await;
    let errors = server.metric("tidegate_accept_errors_total", "").await;
    println!(
        "B6: no descriptor left for 1.5 s, {errors} refusals, served again after {took:?}, pid unchanged"
    );
    assert!(errors > 0.5, "the limit was never reached");
    // It tried now and then, not all the time.
    assert!(errors < 100.0, "{errors}");
    assert!(server.is_running() && server.pid() == pid);
    predict(&mut early).await;
}

/// An attacker on one address takes what one client may have, and the others have the rest.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_client_cannot_have_every_connection() {
    let server = Server::start("connections_max = 120\nconnections_per_ip_max = 60", &[]).await;
    let from = |ip: [u8; 4]| {
        let address = server.http;
        async move {
            let socket = TcpSocket::new_v4()?;
            socket.bind((ip, 0).into())?;
            socket.connect(address).await
        }
    };
    let mut held = Vec::new();
    for _ in 0..60 {
        held.push(from([127, 0, 0, 2]).await.unwrap());
    }
    let (mut refused, mut asked, mut served) = (0, 0, 0);
    for _ in 0..200 {
        // Says it is somebody else; nobody believes it.
        let mut more = from([127, 0, 0, 2]).await.unwrap();
        let request =
            "GET /v2/health/live HTTP/1.1\r\nhost: a\r\nx-forwarded-for: 10.0.0.9\r\n\r\n";
        drop(more.write_all(request.as_bytes()).await);
        refused += usize::from(closed(&mut more, FOREVER).await.is_some());
        if asked < 100 {
            asked += 1;
            let mut victim = from([127, 0, 0, 3]).await.unwrap();
            victim.write_all(LIVE.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            drop(timeout(FOREVER, victim.read_to_end(&mut answer)).await);
            served += usize::from(answer.starts_with(b"HTTP/1.1 200"));
        }
    }
    let counted = server.metric("tidegate_connections_closed_total", "per_ip").await;
    println!(
        "B18: one address: {refused} of 200 refused ({counted} counted); another: {served} of {asked} served"
    );
    assert_eq!((refused, served), (200, asked));
    assert!(counted >= 200.0);
}
