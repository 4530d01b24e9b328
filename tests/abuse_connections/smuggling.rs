//! Requests that two readers could cut in two ways. After each comes a canary on the same
//! connection: either the connection ends, or both are answered and what lies between them was a
//! body, not a request.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{FOREVER, Server};

/// What would be run if a body were taken for a request; its answer names it.
const SMUGGLED: &str = "GET /v2/models/SMUGGLED HTTP/1.1\r\nhost: a\r\n\r\n";
const CANARY: &str = "GET /v2/health/live HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Expect {
    /// One error, then the end.
    Refused,
    /// One answer of any kind, then the end.
    Last,
    /// One answer, then the end or the canary's: what is not read by then ends the connection.
    Either,
    /// So many answers, and the canary's.
    Served(usize),
}
use Expect::{Either, Last, Refused, Served};

struct Case {
    name: String,
    bytes: Vec<u8>,
    expect: Expect,
}

fn case(name: impl Into<String>, bytes: impl Into<Vec<u8>>, expect: Expect) -> Case {
    Case { name: name.into(), bytes: bytes.into(), expect }
}

/// A POST whose body would be `{}` if nothing else is said.
fn post(headers: &str, body: &str) -> Vec<u8> {
    format!("POST /v2/repository/index HTTP/1.1\r\nhost: a\r\n{headers}\r\n\r\n{body}").into()
}

/// A GET with whatever lies between its line and its end.
fn get(headers: &str) -> Vec<u8> {
    format!("GET /v2/health/live HTTP/1.1\r\n{headers}\r\n").into()
}

fn lengths() -> Vec<Case> {
    let length = |value: &str| post(&format!("content-length:{value}"), "{}");
    let mut cases = vec![
        case(
            "length and length, unlike",
            post("content-length: 2\r\ncontent-length: 50", "{}"),
            Refused,
        ),
        case(
            "length and length, alike",
            post("content-length: 2\r\ncontent-length: 2", "{}"),
            Served(1),
        ),
        case("length with a tab before", length("\t2"), Served(1)),
        case("length with a space after", length(" 2 "), Served(1)),
        case("length with zeros before", length(" 0002"), Served(1)),
    ];
    let bad = [
        " 2, 2",
        " 2, 50",
        " +2",
        " -2",
        " 0x2",
        "",
        " 2e0",
        " 99999999999999999999",
        " 2;",
        " 1_0",
        " 2 2",
        " \u{ff12}",
        " 2.0",
        " \"2\"",
        " two",
        " 18446744073709551617",
        " -0",
        " 2\u{b}",
    ];
    cases.extend(bad.map(|value| case(format!("length '{value}'"), length(value), Refused)));
    cases
}

fn encodings() -> Vec<Case> {
    let zero = "0\r\n\r\n";
    let inside = format!("{zero}{SMUGGLED}");
    let both = inside.len();
    let mut cases = vec![
        case(
            "length, encoding",
            post(&format!("content-length: {both}\r\ntransfer-encoding: chunked"), zero),
            Refused,
        ),
        case(
            "encoding, length",
            post(&format!("transfer-encoding: chunked\r\ncontent-length: {both}"), zero),
            Refused,
        ),
        case(
            "encoding, small length",
            post("transfer-encoding: chunked\r\ncontent-length: 4", zero),
            Refused,
        ),
        case(
            "length, encoding, more after",
            post("content-length: 5\r\ntransfer-encoding: chunked", &inside),
            Refused,
        ),
        case("chunked", post("transfer-encoding: chunked", "2\r\n{}\r\n0\r\n\r\n"), Last),
        case("CHUNKED", post("Transfer-Encoding: CHUNKED", "2\r\n{}\r\n0\r\n\r\n"), Last),
        case("a tab before chunked", post("transfer-encoding:\tchunked", zero), Last),
        case(
            "chunked twice",
            post("transfer-encoding: chunked\r\ntransfer-encoding: chunked", zero),
            Refused,
        ),
        case(
            "chunked, then identity",
            post("transfer-encoding: chunked\r\ntransfer-encoding: identity", zero),
            Refused,
        ),
        case(
            "identity, then chunked",
            post("transfer-encoding: identity\r\ntransfer-encoding: chunked", zero),
            Refused,
        ),
        case(
            "an underscore",
            post("transfer_encoding: chunked\r\ncontent-length: 2", "{}"),
            Served(1),
        ),
        case(
            "HTTP/1.0 and chunked",
            "POST /v2/repository/index HTTP/1.0\r\nhost: a\r\nconnection: keep-alive\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            Refused,
        ),
        case(
            "chunked on GET",
            format!(
                "GET /v2/health/live HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n{inside}"
            ),
            Last,
        ),
    ];
    let bad = [
        "xchunked",
        "chunkedx",
        "chunked, identity",
        "identity",
        "gzip, chunked",
        "chunked, chunked",
        "chunked;q=1",
        "\"chunked\"",
        "chunked,",
        ",chunked",
        "",
        "\u{b}chunked",
        "chu nked",
        "x",
    ];
    cases.extend(bad.map(|value| {
        let headers = format!("transfer-encoding: {value}\r\ncontent-length: {both}");
        case(format!("encoding '{value}'"), post(&headers, &inside), Refused)
    }));
    cases
}

fn chunks() -> Vec<Case> {
    let chunked = |body: &str| post("transfer-encoding: chunked", body);
    let long = "x".repeat(1 << 20);
    let bad = [
        ("size with 0x", "0x2\r\n{}\r\n0\r\n\r\n".to_owned()),
        ("size below zero", "-2\r\n{}\r\n0\r\n\r\n".to_owned()),
        ("size with a plus", "+2\r\n{}\r\n0\r\n\r\n".to_owned()),
        ("size over 64 bits", "fffffffffffffffff\r\n{}\r\n0\r\n\r\n".to_owned()),
        ("no size", "\r\n{}\r\n0\r\n\r\n".to_owned()),
        ("a space before the size", " 2\r\n{}\r\n0\r\n\r\n".to_owned()),
        ("size that ends with LF", "2\n{}\r\n0\r\n\r\n".to_owned()),
        ("size that ends with CR", "2\r{}\r\n0\r\n\r\n".to_owned()),
        ("data longer than its size", "2\r\n{}}}\r\n0\r\n\r\n".to_owned()),
        ("data that ends with LF", "2\r\n{}\n0\r\n\r\n".to_owned()),
        ("an extension of 1 MiB", format!("2;{long}\r\n{{}}\r\n0\r\n\r\n")),
        ("an extension with LF", "2;a\nb\r\n{}\r\n0\r\n\r\n".to_owned()),
        ("trailers of 1 MiB", format!("0\r\na: {long}\r\n\r\n")),
        ("a trailer without a colon", "0\r\nabc\r\n\r\n".to_owned()),
    ];
    let mut cases: Vec<_> =
        bad.into_iter().map(|(name, body)| case(name, chunked(&body), Last)).collect();
    cases.extend([
        case("an extension", chunked("2;a=b\r\n{}\r\n0\r\n\r\n"), Last),
        case(
            "trailers that pass for headers",
            chunked("0\r\nauthorization: a\r\nhost: b\r\ncontent-length: 9\r\n\r\n"),
            Last,
        ),
        case("what follows the last chunk", chunked(&format!("0\r\n\r\n{SMUGGLED}")), Last),
    ]);
    cases
}

fn lines() -> Vec<Case> {
    let inside = format!("content-length: {}", SMUGGLED.len());
    let many: String = (0..101).map(|at| format!("h{at}: 1\r\n")).collect();
    let raw = |line: &str| format!("{line}\r\nhost: a\r\n\r\n");
    let refused = [
        ("a space before a colon", post("content-length : 2", "{}")),
        ("a space before the encoding's colon", post("transfer-encoding : chunked", "0\r\n\r\n")),
        ("a folded line", post("x: a\r\n content-length: 2", "{}")),
        ("a folded encoding", post("transfer-encoding:\r\n chunked", "0\r\n\r\n")),
        ("a folded first line", get(" x: a\r\nhost: a\r\n")),
        ("NUL in a name", post("content-length\0: 2", "{}")),
        ("NUL in a value", get("host: a\r\nx: a\0b\r\n")),
        ("CR in a value", post("x: a\rcontent-length: 2", "{}")),
        ("LF ends a line", post("x: a\ncontent-length: 2", "{}")),
        ("LF ends the head", b"GET /v2/health/live HTTP/1.1\nhost: a\n\n".to_vec()),
        ("LF CR LF ends the head", b"GET /v2/health/live HTTP/1.1\r\nhost: a\n\r\n".to_vec()),
        ("DEL in a value", get("host: a\r\nx: a\x7fb\r\n")),
        ("no colon", get("host: a\r\ncontent-length\r\n")),
        ("no name", get("host: a\r\n: 2\r\n")),
        ("a name that is not ASCII", get("host: a\r\nx\u{e9}: 1\r\n")),
        ("101 headers", get(&format!("host: a\r\n{many}"))),
        ("a head of 20 KiB", get(&format!("host: a\r\nx: {}\r\n", "x".repeat(20 << 10)))),
        ("HTTP/1.2", raw("GET /v2/health/live HTTP/1.2").into()),
        ("HTTP/2.0", raw("GET /v2/health/live HTTP/2.0").into()),
        ("http/1.1", raw("GET /v2/health/live http/1.1").into()),
        ("HTTP/1.10", raw("GET /v2/health/live HTTP/1.10").into()),
        ("HTTP/0.9", b"GET /v2/health/live\r\n".to_vec()),
        ("two spaces in the line", raw("GET  /v2/health/live HTTP/1.1").into()),
        ("a tab in the line", raw("GET\t/v2/health/live HTTP/1.1").into()),
        ("a space in the path", raw("GET /v2/health /live HTTP/1.1").into()),
        ("NUL in the path", raw("GET /v2/health\0/live HTTP/1.1").into()),
        ("a method with brackets", raw("G(T /v2/health/live HTTP/1.1").into()),
        ("a path of 9 KiB", raw(&format!("GET /{} HTTP/1.1", "x".repeat(9 << 10))).into()),
        ("no host", get("")),
        ("two hosts", get("host: a\r\nhost: b\r\n")),
        ("two equal hosts", get("host: a\r\nhost: a\r\n")),
        ("a host with a space", get("host: a b\r\n")),
        ("a host with a path", get("host: a/b\r\n")),
        ("a host with a user", get("host: a@b\r\n")),
        ("a host of 20 KiB", get(&format!("host: {}\r\n", "a".repeat(20 << 10)))),
        ("another host in the line", raw("GET http://b/v2/health/live HTTP/1.1").into()),
        ("another expectation", post("expect: 200-ok\r\ncontent-length: 2", "{}")),
        ("HTTP/2 within HTTP/1", b"PRI * HTTP/2.0\r\n\r\nxx\r\n\r\n".to_vec()),
    ];
    let mut cases: Vec<_> =
        refused.into_iter().map(|(name, bytes)| case(name, bytes, Refused)).collect();
    cases.extend([
        case("the same host in the line", raw("GET http://a/v2/health/live HTTP/1.1"), Served(1)),
        case("an empty line before", format!("\r\n{}", raw("GET /v2/health/live HTTP/1.1")), Served(1)),
        case("a body on GET", get(&format!("host: a\r\n{inside}\r\n\r\n{SMUGGLED}")).strip_suffix(b"\r\n").unwrap(), Served(1)),
        case("a body on an unknown path", format!("POST /nothing HTTP/1.1\r\nhost: a\r\n{inside}\r\n\r\n{SMUGGLED}"), Either),
        case("a body on DELETE", format!("DELETE /v2 HTTP/1.1\r\nhost: a\r\n{inside}\r\n\r\n{SMUGGLED}"), Either),
        case("a body that is not read for its encoding", post(&format!("content-encoding: br\r\n{inside}"), SMUGGLED), Either),
        case("an upgrade to h2c", get("host: a\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"), Served(1)),
        case("a length named by connection", post("connection: content-length\r\ncontent-length: 2", "{}"), Served(1)),
        case("bytes over 127 in a value", get("host: a\r\nx: \u{e9}\r\n"), Served(1)),
        case("two in one", [post("content-length: 2", "{}"), get("host: a\r\n")].concat(), Served(2)),
        case("HTTP/1.0 kept alive", "POST /v2/repository/index HTTP/1.0\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\n{}", Served(1)),
        case("HTTP/1.0", "POST /v2/repository/index HTTP/1.0\r\ncontent-length: 2\r\n\r\n{}", Last),
        case("close, and more after", [get("host: a\r\nconnection: close\r\n"), SMUGGLED.into()].concat(), Last),
        case("CONNECT", "CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n", Served(1)),
        case("expect, body at once", post("expect: 100-continue\r\ncontent-length: 2", "{}"), Served(1)),
    ]);
    cases
}

/// Status codes of what came back, or what was wrong with it.
fn statuses(mut bytes: &[u8]) -> Result<Vec<u16>, String> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let end = bytes.windows(4).position(|part| part == b"\r\n\r\n");
        let end = end.ok_or("an answer's head has no end")?;
        let head = String::from_utf8_lossy(&bytes[..end]).to_ascii_lowercase();
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok());
        let status = status.ok_or_else(|| format!("no status in {head:?}"))?;
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: "));
        let length: usize = length.map_or(0, |length| length.parse().unwrap());
        bytes = bytes.get(end + 4 + length..).ok_or("an answer is cut short")?;
        if status != 100 {
            found.push(status);
        }
    }
    Ok(found)
}

fn judge(expect: Expect, answered: &[u8]) -> Result<(), String> {
    if answered.windows(8).any(|part| part == b"SMUGGLED") {
        return Err("a body was run as a request".to_owned());
    }
    let statuses = statuses(answered)?;
    let right = match (expect, statuses.as_slice()) {
        (Refused, [status]) => (400..=501).contains(status),
        (Last | Either, [_]) | (Either, [_, 200]) => true,
        (Served(count), [answers @ .., canary]) => answers.len() == count && *canary == 200,
        _ => false,
    };
    if right { Ok(()) } else { Err(format!("got {statuses:?}")) }
}

/// Sends `bytes` in parts of `step`, and gives all that comes until the end.
async fn answered(server: &Server, bytes: &[u8], step: usize) -> Result<Vec<u8>, String> {
    let mut stream = TcpStream::connect(server.http).await.unwrap();
    let (mut reader, mut writer) = stream.split();
    let write = async {
        for part in bytes.chunks(step) {
            // Who is refused is not read any further.
            if writer.write_all(part).await.is_err() {
                break;
            }
            if step < bytes.len() {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
    };
    let mut all = Vec::new();
    let read = async {
        let mut buffer = [0; 4096];
        while let Ok(read @ 1..) = reader.read(&mut buffer).await {
            all.extend_from_slice(&buffer[..read]);
        }
    };
    let done = timeout(Duration::from_secs(20), async { tokio::join!(write, read) }).await;
    done.map_err(|_| "neither answered nor closed".to_owned())?;
    Ok(all)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_reader_cuts_requests_alike() {
    let server = Server::start("body_timeout_ms = 15000", &[]).await;
    let cases: Vec<_> = [lengths(), encodings(), chunks(), lines()].into_iter().flatten().collect();
    assert!(cases.len() >= 60, "{}", cases.len());
    let mut wrong = Vec::new();
    for case in &cases {
        let bytes = [case.bytes.as_slice(), CANARY.as_bytes()].concat();
        // In one piece, and in pieces that cut every part of a head.
        for step in [bytes.len(), 7] {
            if step == 7 && bytes.len() > 2000 {
                continue;
            }
            let judged = match answered(&server, &bytes, step).await {
                Ok(answered) => judge(case.expect, &answered).map_err(|problem| {
                    format!("{problem}: {}", String::from_utf8_lossy(&answered))
                }),
                Err(problem) => Err(problem),
            };
            if let Err(problem) = judged {
                wrong.push(format!(
                    "{} (step {step}), expected {:?}: {problem}",
                    case.name, case.expect
                ));
            }
        }
    }
    println!("B8: {} cases, {} desync", cases.len(), wrong.len());
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let control = timeout(FOREVER, answered(&server, CANARY.as_bytes(), 1000)).await.unwrap();
    assert_eq!(statuses(&control.unwrap()).unwrap(), [200]);
}
