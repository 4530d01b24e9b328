//! `tidegate health`: asks a gateway how it is, for images that have no shell and no curl.
//!
//! Invariants:
//! - It ends within its time limit, whatever the other side does.
//! - It needs no file, no thread and no engine, so that it works when the gateway's limits are tight.

use std::fmt::Display;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use http::Uri;
use serde_json::json;

/// Where a gateway listens when nothing is said.
const ADDRESS: &str = "127.0.0.1:8000";
/// The gateway's own setting; in a container both see the same environment.
const ADDRESS_VARIABLE: &str = "TIDEGATE_SERVER_HTTP_ADDRESS";
/// Most bytes that are read of an answer; its first line is all that matters.
const ANSWER_MAX: usize = 4096;

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  tidegate health\n  \
                  tidegate health --live --url http://127.0.0.1:8002 --json\n\n\
                  Exit code: 0 ready (or, with --live, alive), 1 not, 2 wrong usage")]
pub(super) struct Args {
    /// The gateway [default: the port of TIDEGATE_SERVER_HTTP_ADDRESS on this machine, or
    /// http://127.0.0.1:8000]
    #[arg(long, value_name = "URL")]
    url: Option<Uri>,
    /// Ask whether the process answers, not whether it is ready for requests
    #[arg(long)]
    live: bool,
    /// Longest time to wait for the answer
    #[arg(long, value_name = "MILLISECONDS", default_value_t = 2000, value_parser = clap::value_parser!(u64).range(1..=600_000))]
    timeout_ms: u64,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What was asked and what came of it.
struct Answer {
    url: String,
    result: Result<u16, String>,
}

pub(super) fn run(args: &Args) -> ExitCode {
    let address = std::env::var(ADDRESS_VARIABLE).ok();
    let (authority, address) = match target(args.url.as_ref(), address.as_deref()) {
        Ok(target) => target,
        Err(problem) => {
            super::complain(&problem);
            return ExitCode::from(2);
        }
    };
    let path = if args.live { "/v2/health/live" } else { "/v2/health/ready" };
    let result = ask(&authority, &address, path, Duration::from_millis(args.timeout_ms));
    let answer = Answer { url: format!("http://{authority}{path}"), result };
    // A closed standard output does not make a gateway unwell.
    drop(answer.print(args.json, &mut std::io::stdout().lock()));
    if answer.ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Answer {
    fn ok(&self) -> bool {
        self.result == Ok(200)
    }

    fn print(&self, as_json: bool, out: &mut impl Write) -> std::io::Result<()> {
        let (status, error) = match &self.result {
            Ok(status) => (Some(status), None),
            Err(error) => (None, Some(error)),
        };
        if as_json {
            let value = json!({"ok": self.ok(), "url": self.url, "status": status, "error": error});
            return writeln!(out, "{value:#}");
        }
        let verdict = if self.ok() { "ok" } else { "not ok" };
        let detail: &dyn Display = match &self.result {
            Ok(status) => status,
            Err(error) => error,
        };
        writeln!(out, "{verdict}: {} answered {detail}", self.url)
    }
}

/// What to put into the Host header, and what to connect to.
fn target(url: Option<&Uri>, listener: Option<&str>) -> Result<(String, String), String> {
    if let Some(url) = url {
        let wrong = || format!("expected a URL like http://127.0.0.1:8000, got '{url}'");
        if url.scheme_str() != Some("http") || !matches!(url.path(), "" | "/") {
            return Err(wrong());
        }
        let host = url.host().ok_or_else(wrong)?;
        let address = format!("{host}:{}", url.port_u16().unwrap_or(80));
        return Ok((address.clone(), address));
    }
    let listener = listener.filter(|text| !text.is_empty()).unwrap_or(ADDRESS);
    let mut address: SocketAddr = listener.parse().map_err(|_| {
        format!("{ADDRESS_VARIABLE}: expected an address like {ADDRESS}, got '{listener}'")
    })?;
    // Listening everywhere includes here, and the unspecified address is no place to connect to.
    if address.ip().is_unspecified() {
        let here: SocketAddr = match address {
            SocketAddr::V4(_) => ([127, 0, 0, 1], address.port()).into(),
            SocketAddr::V6(_) => (std::net::Ipv6Addr::LOCALHOST, address.port()).into(),
        };
        address = here;
    }
    Ok((address.to_string(), address.to_string()))
}

/// The status of the answer to one GET.
fn ask(host: &str, address: &str, path: &str, limit: Duration) -> Result<u16, String> {
    let end = Instant::now() + limit;
    let mut stream = connect(address, end)?;
    let request = format!(
        "GET {path} HTTP/1.1\r\nhost: {host}\r\nuser-agent: tidegate-health\r\nconnection: close\r\n\r\n"
    );
    stream.set_write_timeout(Some(left(end)?)).map_err(|error| error.to_string())?;
    stream.write_all(request.as_bytes()).map_err(|error| said(&error))?;
    let mut answer = Vec::new();
    let mut buffer = [0; 512];
    while !answer.contains(&b'\n') && answer.len() < ANSWER_MAX {
        stream.set_read_timeout(Some(left(end)?)).map_err(|error| error.to_string())?;
        match stream.read(&mut buffer).map_err(|error| said(&error))? {
            0 => break,
            read => answer.extend_from_slice(&buffer[..read]),
        }
    }
    status(&answer).ok_or_else(|| "something other than HTTP".to_owned())
}

fn connect(address: &str, end: Instant) -> Result<TcpStream, String> {
    let addresses = address.to_socket_addrs().map_err(|error| format!("nothing: {error}"))?;
    let mut last = "nothing: no such address".to_owned();
    for address in addresses {
        match TcpStream::connect_timeout(&address, left(end)?) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = said(&error),
        }
    }
    Err(last)
}

/// Time until `end`, which a socket takes as its timeout: never zero.
fn left(end: Instant) -> Result<Duration, String> {
    match end.saturating_duration_since(Instant::now()) {
        Duration::ZERO => Err("nothing in time".to_owned()),
        left => Ok(left),
    }
}

fn said(error: &std::io::Error) -> String {
    match error.kind() {
        std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut => {
            "nothing in time".to_owned()
        }
        _ => format!("nothing: {error}"),
    }
}

/// `HTTP/1.1 200 OK` → 200.
fn status(answer: &[u8]) -> Option<u16> {
    let line = answer.split(|&byte| byte == b'\n').next()?;
    let line = std::str::from_utf8(line).ok()?;
    line.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    /// A server that gives one answer after it has read a request.
    fn server(answer: &'static str) -> (SocketAddr, std::thread::JoinHandle<String>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 1024];
            let read = stream.read(&mut request).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
            String::from_utf8_lossy(&request[..read]).into_owned()
        });
        (address, thread)
    }

    fn asked(answer: &'static str) -> (Result<u16, String>, String) {
        let (address, thread) = server(answer);
        let address = address.to_string();
        let result = ask(&address, &address, "/v2/health/ready", Duration::from_secs(20));
        (result, thread.join().unwrap())
    }

    #[test]
    fn the_status_is_what_counts() {
        let (ready, request) = asked("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n");
        assert_eq!(ready, Ok(200));
        assert!(request.starts_with("GET /v2/health/ready HTTP/1.1\r\nhost: 127.0.0.1:"));
        assert_eq!(asked("HTTP/1.1 503 Service Unavailable\r\n\r\n").0, Ok(503));
        assert_eq!(asked("HTTP/1.0 200\r\n\r\n").0, Ok(200));
        assert!(asked("SSH-2.0-OpenSSH\r\n").0.is_err());
        assert!(asked("").0.is_err());
    }

    #[test]
    fn nobody_there_and_nobody_answering_are_failures() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        // The kernel accepts for the listener; nobody reads.
        let silent = ask(&address, &address, "/", Duration::from_millis(50));
        assert_eq!(silent, Err("nothing in time".to_owned()));
        drop(listener);
        assert!(ask(&address, &address, "/", Duration::from_secs(20)).is_err());
    }

    #[test]
    fn the_gateways_own_setting_says_where_it_is() {
        let of = |url: Option<&str>, listener| {
            target(url.map(|url| url.parse().unwrap()).as_ref(), listener).map(|(_, to)| to)
        };
        let to = |text: &str| Ok(text.to_owned());
        assert_eq!(of(None, None), to("127.0.0.1:8000"));
        assert_eq!(of(None, Some("")), to("127.0.0.1:8000"));
        assert_eq!(of(None, Some("0.0.0.0:9000")), to("127.0.0.1:9000"));
        assert_eq!(of(None, Some("[::]:9000")), to("[::1]:9000"));
        assert_eq!(of(None, Some("10.1.2.3:80")), to("10.1.2.3:80"));
        assert_eq!(of(Some("http://gate:81"), Some("0.0.0.0:9000")), to("gate:81"));
        assert_eq!(of(Some("http://gate/"), None), to("gate:80"));
        assert_eq!(of(Some("http://[::1]:81"), None), to("[::1]:81"));
        for wrong in ["https://gate", "gate:80", "http://gate/v2"] {
            assert!(of(Some(wrong), None).unwrap_err().contains(wrong), "{wrong}");
        }
        assert!(of(None, Some("everywhere")).unwrap_err().contains("TIDEGATE_SERVER_HTTP_ADDRESS"));
    }

    #[test]
    fn the_answer_is_told_as_text_and_as_json() {
        let print = |result, as_json| {
            let mut out = Vec::new();
            let answer = Answer { url: "http://gate:80/v2/health/live".to_owned(), result };
            answer.print(as_json, &mut out).unwrap();
            String::from_utf8(out).unwrap()
        };
        assert_eq!(print(Ok(200), false), "ok: http://gate:80/v2/health/live answered 200\n");
        let refused = Err("nothing: refused".to_owned());
        assert!(print(refused.clone(), false).ends_with("answered nothing: refused\n"));
        let json: serde_json::Value = serde_json::from_str(&print(refused, true)).unwrap();
        assert_eq!((&json["ok"], &json["status"]), (&json!(false), &json!(null)));
        assert_eq!(json["error"], "nothing: refused");
    }
}
