//! Slow clients: each kind is cut in time, and nobody else notices.

use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt as _;
use tokio::net::{TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::support::{Control, FOREVER, Server, closed, descriptors, h2, infer};

const SETTINGS: &str = "header_timeout_ms = 1500\nidle_timeout_ms = 2000\n\
    write_timeout_ms = 2000\nbody_grace_ms = 1000\nbody_timeout_ms = 4000";
/// The slowest of them, and much for a machine that does other things too.
const LIMIT: Duration = Duration::from_secs(4 + 20);
/// Rows of an answer that no buffer of the kernel takes whole.
const ROWS: usize = 128 << 10;

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Connects and says nothing.
    Silent,
    /// A byte of a head each 100 ms.
    Head,
    /// A byte of HTTP/2's preface each 100 ms.
    Preface,
    /// Asks once, then nothing.
    Idle,
    /// HTTP/2 without a stream, but with pings.
    Idle2,
    /// A byte of a body each 100 ms.
    Body,
    /// A byte of an HTTP/2 stream's body each 100 ms.
    Body2,
    /// Never reads its answer.
    Deaf,
    /// Gives an HTTP/2 stream no window for its answer, and pings.
    Deaf2,
}

const KINDS: [(Kind, usize); 9] = [
    (Kind::Silent, 300),
    (Kind::Head, 300),
    (Kind::Preface, 100),
    (Kind::Idle, 300),
    (Kind::Idle2, 100),
    (Kind::Body, 300),
    (Kind::Body2, 100),
    (Kind::Deaf, 30),
    (Kind::Deaf2, 30),
];

/// Behaves as `kind` does until the server closes; gives the time it held on.
async fn held(server: std::net::SocketAddr, kind: Kind) -> Result<Duration, String> {
    let connected = async {
        let socket = TcpSocket::new_v4()?;
        if matches!(kind, Kind::Deaf) {
            socket.set_recv_buffer_size(4096)?;
        }
        socket.connect(server).await
    };
    let mut stream = connected.await.map_err(|error| format!("{kind:?}: connect: {error}"))?;
    let start = Instant::now();
    let (opening, drip) = speech(kind);
    let ended = timeout(LIMIT, async {
        if stream.write_all(&opening).await.is_err() {
            return;
        }
        match kind {
            Kind::Deaf => {
                // Closed when it can no longer be written to; reading would help the server.
                while stream.write_all(b"x").await.is_ok() {
                    sleep(Duration::from_millis(100)).await;
                }
            }
            _ if drip.is_empty() => {
                closed(&mut stream, LIMIT).await;
            }
            _ => dripping(&mut stream, &drip).await,
        }
    });
    match ended.await {
        Ok(()) => Ok(start.elapsed()),
        Err(_) => Err(format!("{kind:?} was still open after {LIMIT:?}")),
    }
}

/// What a client says at once, and what it goes on saying.
fn speech(kind: Kind) -> (Vec<u8>, Vec<u8>) {
    let ping = h2::frame(h2::PING, 0, 0, &[0; 8]);
    let get = b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\n";
    let path = "/v2/models/echo/infer";
    match kind {
        Kind::Silent => (Vec::new(), Vec::new()),
        Kind::Head => (get.to_vec(), b"x".to_vec()),
        Kind::Preface => (Vec::new(), h2::PREFACE[..23].to_vec()),
        Kind::Idle => ([get.as_slice(), b"\r\n"].concat(), Vec::new()),
        Kind::Idle2 => (h2::hello(&[]), ping),
        Kind::Body => {
            let head =
                "POST /v2/models/echo/infer HTTP/1.1\r\nhost: a\r\ncontent-length: 5000\r\n\r\n";
            (head.as_bytes().to_vec(), b"x".to_vec())
        }
        Kind::Body2 => {
            let head = h2::frame(h2::HEADERS, h2::END_HEADERS, 1, &h2::head("POST", path, &[]));
            ([h2::hello(&[]), head].concat(), h2::frame(h2::DATA, 0, 1, b"x"))
        }
        Kind::Deaf => (infer(ROWS, ""), Vec::new()),
        Kind::Deaf2 => {
            let hello = h2::hello(&h2::setting(h2::WINDOW, 0));
            let flags = h2::END_HEADERS | h2::END_STREAM;
            let head = h2::frame(h2::HEADERS, flags, 1, &h2::head("GET", "/v2", &[]));
            ([hello, head].concat(), ping)
        }
    }
}

/// Says a byte (HTTP/2: a frame) each 100 ms until the server closes or ends the stream.
async fn dripping(stream: &mut TcpStream, drip: &[u8]) {
    let (mut reader, mut writer) = stream.split();
    let framed = drip.len() > 1 && !drip.starts_with(b"PRI");
    let write = async {
        let mut at = 0;
        loop {
            let part = if framed { drip } else { &drip[at % drip.len()..][..1] };
            if writer.write_all(part).await.is_err() {
                return;
            }
            at += 1;
            sleep(Duration::from_millis(100)).await;
        }
    };
    let read = async {
        let mut buffer = [0; 4096];
        loop {
            match tokio::io::AsyncReadExt::read(&mut reader, &mut buffer).await {
                Ok(0) | Err(_) => return,
                // The answer to a body that came too slowly; over HTTP/2 the connection lives on.
                Ok(read) if buffer[..read].windows(8).any(|part| part == b"too slow") => return,
                Ok(_) => {}
            }
        }
    };
    tokio::select! { () = write => {} () = read => {} }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_clients_are_cut_and_nobody_else_notices() {
    let server = Server::start(SETTINGS, &[]).await;
    let room = descriptors();
    let all: usize = KINDS.iter().map(|(_, count)| count).sum();
    let share = |count: usize| if all < room { count } else { count * room / all };
    let control = Control::start(server.http);
    let mut clients = JoinSet::new();
    let mut opened = 0;
    for (kind, count) in KINDS {
        for _ in 0..share(count) {
            let address = server.http;
            clients.spawn(async move { (kind, held(address, kind).await) });
            opened += 1;
            if opened % 50 == 0 {
                sleep(Duration::from_millis(5)).await;
            }
        }
    }
    let mut longest = Duration::ZERO;
    while let Some(client) = clients.join_next().await {
        let (_, held) = client.unwrap();
        longest = longest.max(held.unwrap());
    }
    let seen = control.stop().await;
    seen.unharmed();
    println!(
        "B5: {opened} slow connections of {} kinds held {:.1} s at most; control client: {} of {} \
         failed, p99 {:.0} ms",
        KINDS.len(),
        longest.as_secs_f64(),
        seen.failures.len(),
        seen.sent,
        seen.percentile_ms(99)
    );
    for reason in ["header_timeout", "idle", "write_stall", "slow_body"] {
        let count = server.metric("tidegate_connections_closed_total", reason).await;
        println!("B5: {reason}: {count}");
        assert!(count > 0.0, "{reason}");
    }
    server.metric_becomes("tidegate_connections", "", 0.0).await;
    server.metric_becomes("tidegate_in_flight", "", 0.0).await;
}

/// Connections that are slow, but not too slow, or quiet where they may be.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn patience_with_those_who_make_progress() {
    let server = Server::start(
        "header_timeout_ms = 600\nidle_timeout_ms = 2000\nwrite_timeout_ms = 2000\n\
         body_grace_ms = 500\nbody_rate_min = 100\nbody_timeout_ms = 20000",
        &[],
    )
    .await;
    // Kept alive for longer than the time for a head.
    let idle = async {
        let mut stream = TcpStream::connect(server.http).await.unwrap();
        for _ in 0..3 {
            stream.write_all(&infer(1, "")).await.unwrap();
            assert!(read_some(&mut stream).await.starts_with(b"HTTP/1.1 200"));
            sleep(Duration::from_millis(1200)).await;
        }
    };
    // Slower than its grace, faster than the least rate.
    let body = async {
        let mut stream = TcpStream::connect(server.http).await.unwrap();
        let request = infer(64, "connection: close\r\n");
        let body = request.len() - 512;
        stream.write_all(&request[..body]).await.unwrap();
        for part in request[body..].chunks(64) {
            sleep(Duration::from_millis(200)).await;
            stream.write_all(part).await.unwrap();
        }
        assert!(read_some(&mut stream).await.starts_with(b"HTTP/1.1 200"));
    };
    // Takes its answer in small parts for longer than it may take nothing, or be idle.
    let answer = async {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(64 << 10).unwrap();
        let mut stream = socket.connect(server.http).await.unwrap();
        stream.write_all(&infer(ROWS * 2, "connection: close\r\n")).await.unwrap();
        let (mut total, start) = (0, Instant::now());
        let mut buffer = vec![0; 32 << 10];
        loop {
            let read = tokio::io::AsyncReadExt::read(&mut stream, &mut buffer).await.unwrap();
            if read == 0 {
                break;
            }
            total += read;
            sleep(Duration::from_millis(150)).await;
        }
        assert!(total > ROWS * 16, "cut after {total} bytes and {:?}", start.elapsed());
    };
    timeout(FOREVER, async { tokio::join!(idle, body, answer) }).await.unwrap();
    for reason in ["header_timeout", "idle", "write_stall", "slow_body"] {
        let count = server.metric("tidegate_connections_closed_total", reason).await;
        assert!(count < 0.5, "{reason}: {count}");
    }
}

async fn read_some(stream: &mut TcpStream) -> Vec<u8> {
    let mut buffer = vec![0; 4096];
    let read = tokio::io::AsyncReadExt::read(stream, &mut buffer).await.unwrap();
    buffer.truncate(read);
    buffer
}

/// An answer that comes before its body is read to the end reaches a client that first sends all.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn early_answers_arrive() {
    const BODY: usize = 8 << 20;
    let server = Server::start("body_max_bytes = 1048576", &[]).await;
    for (path, length, status) in [
        ("/nothing", BODY, "404"),
        ("/v2/models/echo/infer", BODY, "413"),
        ("/v2/models/echo/infer\r\ncontent-encoding: br", 1000, "415"),
    ] {
        let (path, more) = path.split_once("\r\n").unwrap_or((path, "x: y"));
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: a\r\n{more}\r\ncontent-length: {length}\r\n\r\n"
        );
        for _ in 0..10 {
            let mut stream = TcpStream::connect(server.http).await.unwrap();
            stream.write_all(head.as_bytes()).await.unwrap();
            for part in vec![b'x'; length].chunks(64 << 10) {
                stream.write_all(part).await.unwrap_or_else(|error| panic!("{path}: {error}"));
            }
            let answer = timeout(FOREVER, read_some(&mut stream)).await.unwrap();
            let answer = String::from_utf8_lossy(&answer);
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{path}: {answer}");
        }
    }
}

/// A connection that is old enough is asked to end, and ends between requests.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn old_connections_end_between_requests() {
    let server = Server::start("connection_age_max_ms = 700", &[]).await;
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    let mut second = TcpStream::connect(server.http).await.unwrap();
    second.write_all(&h2::hello(&[])).await.unwrap();
    let start = Instant::now();
    let mut answered = 0;
    loop {
        assert!(start.elapsed() < FOREVER, "never asked to end");
        // Either it is closed between requests, or an answer says that it was the last.
        if stream.write_all(&infer(1, "")).await.is_err() {
            break;
        }
        let mut buffer = [0; 4096];
        match tokio::io::AsyncReadExt::read(&mut stream, &mut buffer).await {
            Ok(read @ 1..) => assert!(buffer[..read].starts_with(b"HTTP/1.1 200")),
            _ => break,
        }
        answered += 1;
        sleep(Duration::from_millis(20)).await;
    }
    assert!(start.elapsed() >= Duration::from_millis(650), "{:?}", start.elapsed());
    println!("age: {answered} answers in {:?}, then closed", start.elapsed());
    assert!(closed(&mut second, FOREVER).await.is_some());
    let counted = server.metric("tidegate_connections_closed_total", "age").await;
    assert!((counted - 2.0).abs() < 0.5, "{counted}");
}

/// With long times and every connection taken by who does nothing, there is room again in seconds.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_does_nothing_makes_room_when_connections_are_scarce() {
    let long = "connections_max = 90\nconnections_per_ip_max = 0\n\
        header_timeout_ms = 600000\nidle_timeout_ms = 600000";
    let server = Server::start(long, &[]).await;
    let mut held = Vec::new();
    for at in 0..90 {
        let mut stream = TcpStream::connect(server.http).await.unwrap();
        let kind = [Kind::Silent, Kind::Head, Kind::Idle, Kind::Idle2][at % 4];
        stream.write_all(&speech(kind).0).await.unwrap();
        held.push(stream);
    }
    let control = Control::start(server.http);
    sleep(Duration::from_secs(1)).await;
    let start = Instant::now();
    let last = crate::support::ask(server.http, &infer(1, "connection: close\r\n")).await.unwrap();
    assert!(last.is_ok());
    println!(
        "B5: all 90 connections taken by idle clients: room again after {:?}",
        start.elapsed()
    );
    control.stop().await.unharmed();
    drop(held);
}
