//! HTTP/2 floods: each is ended by the server or costs it next to nothing, its memory stays, and
//! no more is run than was accepted.

use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{Control, Server, h2, infer};

const FRAMES: usize = 100_000;
/// For one attack; most are over long before.
const ATTACK_MAX: Duration = Duration::from_secs(4);
/// In debug builds too.
const GROWTH_MAX_MIB: f64 = 16.0;
const INFER: &str = "/v2/models/echo/infer";

/// How an attack ended.
#[derive(Debug, PartialEq, Eq)]
enum Ended {
    /// By `GOAWAY` with this code.
    Away(u32),
    /// Without a word.
    Closed,
    /// Everything was sent, or nothing more was taken.
    Outlived,
}

const CALM: u32 = 11;
/// To hear what the server has to say to the last of it.
const AFTER: Option<Duration> = Some(Duration::from_millis(500));

/// Says `opening`, then `part(0)`, `part(1)`…; reads along and for a while after, or not at all.
async fn attack(
    server: &Server,
    opening: Vec<u8>,
    parts: usize,
    listen_for: Option<Duration>,
    part: impl Fn(usize) -> Vec<u8>,
) -> Ended {
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    let (mut reader, mut writer) = stream.split();
    let write = async {
        writer.write_all(&opening).await?;
        let mut together = Vec::new();
        for at in 0..parts {
            together.extend(part(at));
            if together.len() > 16 << 10 {
                writer.write_all(&together).await?;
                together.clear();
            }
        }
        writer.write_all(&together).await
    };
    let mut came = Vec::new();
    let listen = async {
        let mut buffer = vec![0; 64 << 10];
        while let Ok(read @ 1..) = reader.read(&mut buffer).await {
            came.extend_from_slice(&buffer[..read]);
        }
    };
    let told = if let Some(patience) = listen_for {
        let both = async {
            tokio::pin!(listen);
            tokio::select! {
                () = &mut listen => return true,
                written = write => if written.is_ok() {
                    return timeout(patience, listen).await.is_ok();
                }
            }
            listen.await;
            true
        };
        timeout(ATTACK_MAX, both).await.unwrap_or(false)
    } else {
        let written = timeout(ATTACK_MAX, write).await;
        let ended = matches!(written, Ok(Err(_)));
        drop(timeout(Duration::from_millis(500), listen).await);
        ended
    };
    match away(&came) {
        Some(code) => Ended::Away(code),
        None if told => Ended::Closed,
        None => Ended::Outlived,
    }
}

/// Code of the last `GOAWAY` among frames.
fn away(mut frames: &[u8]) -> Option<u32> {
    let mut code = None;
    while let [a, b, c, kind, _flags, _, _, _, _, rest @ ..] = frames {
        let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
        let payload = rest.get(..length)?;
        if *kind == 7 && length >= 8 {
            code = Some(u32::from_be_bytes([payload[4], payload[5], payload[6], payload[7]]));
        }
        frames = &rest[length..];
    }
    code
}

fn id(at: usize) -> u32 {
    u32::try_from(at * 2 + 1).unwrap()
}

/// Headers and body of a prediction on a stream of its own.
pub(crate) fn prediction(stream: u32) -> Vec<u8> {
    let request = infer(1, "");
    let end = request.windows(4).position(|part| part == b"\r\n\r\n").unwrap();
    let body = &request[end + 4..];
    let json = (body.len() - 8).to_string();
    let block = h2::head("POST", INFER, &[("inference-header-content-length", &json)]);
    [
        h2::frame(h2::HEADERS, h2::END_HEADERS, stream, &block),
        h2::frame(h2::DATA, h2::END_STREAM, stream, body),
    ]
    .concat()
}

fn open_post() -> Vec<u8> {
    let head = h2::frame(h2::HEADERS, h2::END_HEADERS, 1, &h2::head("POST", INFER, &[]));
    [h2::hello(&[]), head].concat()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn floods_end_or_cost_nothing() {
    let mut server =
        Server::start("write_timeout_ms = 1500\nbody_grace_ms = 1500\nidle_timeout_ms = 3000", &[])
            .await;
    let control = Control::start(server.http);
    let ping = h2::frame(h2::PING, 0, 0, &[7; 8]);
    let start = Instant::now();
    // What any traffic makes it keep has been kept before it is measured.
    for _ in 0..3 {
        attack(&server, h2::hello(&[]), 2000, AFTER, |at| prediction(id(at))).await;
    }
    let before = server.resident_mib();
    let mut highest = before;
    let mut all = Vec::new();
    let mut ended = |name: &str, ended: Ended| {
        highest = highest.max(server.resident_mib());
        println!("B7: {name}: {ended:?}");
        all.push((name.to_owned(), ended));
    };

    let reset = |stream| h2::frame(h2::RST_STREAM, 0, stream, &[0, 0, 0, 8]);
    let rapid = |at| [prediction(id(at)), reset(id(at))].concat();
    ended("rapid reset", attack(&server, h2::hello(&[]), FRAMES / 10, AFTER, rapid).await);
    let update = |at, by: u32| h2::frame(h2::WINDOW_UPDATE, 0, id(at), &by.to_be_bytes());
    let over = |at| [prediction(id(at)), update(at, (1 << 31) - 1)].concat();
    ended("made you reset", attack(&server, h2::hello(&[]), FRAMES / 10, AFTER, over).await);
    let zero = |at| [prediction(id(at)), update(at, 0)].concat();
    ended("window of nothing", attack(&server, h2::hello(&[]), FRAMES / 10, AFTER, zero).await);
    let block = h2::head("POST", INFER, &[]);
    let headers = [h2::hello(&[]), h2::frame(h2::HEADERS, 0, 1, &block)].concat();
    let more = h2::header("x", &"y".repeat(100)).repeat(100);
    let more = h2::frame(h2::CONTINUATION, 0, 1, &more);
    ended("continuation", attack(&server, headers.clone(), 10_000, AFTER, |_| more.clone()).await);
    let nothing = h2::frame(h2::CONTINUATION, 0, 1, &[]);
    ended("empty continuation", attack(&server, headers, FRAMES, AFTER, |_| nothing.clone()).await);
    let empty = h2::frame(h2::DATA, 0, 1, &[]);
    ended("empty data", attack(&server, open_post(), FRAMES, AFTER, |_| empty.clone()).await);
    let byte = h2::frame(h2::DATA, 0, 1, b"x");
    ended("data of a byte", attack(&server, open_post(), FRAMES, AFTER, |_| byte.clone()).await);
    let settings = h2::frame(h2::SETTINGS, 0, 0, &h2::setting(h2::WINDOW, 70_000));
    ended("settings", attack(&server, h2::hello(&[]), FRAMES, None, |_| settings.clone()).await);
    ended("ping", attack(&server, h2::hello(&[]), FRAMES, None, |_| ping.clone()).await);
    let priority = h2::frame(h2::PRIORITY, 0, 1, &[0, 0, 0, 3, 200]);
    ended("priority", attack(&server, h2::hello(&[]), FRAMES, AFTER, |_| priority.clone()).await);
    let window = h2::frame(h2::WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]);
    ended("window", attack(&server, h2::hello(&[]), FRAMES, AFTER, |_| window.clone()).await);
    let unknown = h2::frame(99, 0, 0, &[0; 16]);
    ended(
        "unknown frames",
        attack(&server, h2::hello(&[]), FRAMES, AFTER, |_| unknown.clone()).await,
    );
    ended("header bomb", attack(&server, h2::hello(&[]), 200, AFTER, header_bomb).await);
    let hello = h2::hello(&h2::setting(h2::WINDOW, 0));
    ended(
        "window held",
        attack(&server, hello, 200, Some(ATTACK_MAX), |at| prediction(id(at))).await,
    );

    let growth = highest - before;
    let seen = control.stop().await;
    seen.unharmed();
    assert!(server.is_running());
    server.metric_becomes("tidegate_connections", "", 0.0).await;
    server.metric_becomes("tidegate_in_flight", "", 0.0).await;
    let executed = server.metric("tidegate_executions_total", "").await;
    let accepted = server.metric("tidegate_requests_total", "echo").await;
    println!(
        "B7: {} attacks in {:.1} s, executed/accepted {executed}/{accepted} = {:.3}, memory +{growth:.1} MiB, \
         control client: {} of {} failed, p99 {:.0} ms",
        all.len(),
        start.elapsed().as_secs_f64(),
        executed / accepted,
        seen.failures.len(),
        seen.sent,
        seen.percentile_ms(99),
    );
    assert!(executed <= accepted * 1.05, "{executed} of {accepted}");
    assert!(growth <= GROWTH_MAX_MIB, "{growth} MiB");
    let calmed = ["continuation", "empty continuation"];
    for (name, ended) in &all {
        if calmed.contains(&name.as_str()) {
            assert_eq!(*ended, Ended::Away(CALM), "{name}");
        }
        if name == "window held" {
            assert_eq!(*ended, Ended::Closed, "{name}");
        }
    }
}

/// A header of 3 KiB in the table, then named a thousand times: 3 MiB from 1 KiB.
fn header_bomb(at: usize) -> Vec<u8> {
    let mut block = h2::head("GET", "/v2", &[]);
    // Literal with indexing: into the table, so that 62 names it.
    let value = vec![b'y'; 3000];
    block.extend([0x40, 1, b'x', 0x7f]);
    let rest = u16::try_from(value.len() - 127).unwrap();
    block.push(u8::try_from(rest & 0x7f).unwrap() | 0x80);
    block.push(u8::try_from(rest >> 7).unwrap());
    block.extend(value);
    block.extend([0x80 | 62; 1000]);
    h2::frame(h2::HEADERS, h2::END_HEADERS | h2::END_STREAM, id(at), &block)
}
