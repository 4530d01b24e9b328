//! What the commands over the admin API share: where it is, who calls, and how a refusal is told.
//!
//! Invariants:
//! - The token comes from a file or the environment, never from an argument that others can see,
//!   and goes to the given address only: no proxy, no redirect.
//! - Whatever a server answers, what is printed holds no control characters.
//! - Exit code 0: done; 1: refused, failed, or nobody there; 2: wrong usage.

use std::fmt::Display;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Certificate, Identity, Method, Response, StatusCode};
use serde_json::{Value, json};

pub(super) mod table;

/// Where the API begins.
const PREFIX: &str = "/admin/v1";
/// Holds a token.
const TOKEN_VARIABLE: &str = "TIDEGATE_ADMIN_TOKEN";
/// The gateway's own setting; both often run in the same environment.
const STATE_VARIABLE: &str = "TIDEGATE_SERVER_STATE_DIR";
const STATE_DIR: &str = "tidegate-state";
/// In the state's folder.
const TOKEN_FILE: &str = "admin-token";
/// More than a token or certificates have; a file is not read any further.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Largest answer that is read.
const ANSWER_BYTES_MAX: usize = 64 << 20;
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// Longer than the gateway takes for anything but a load.
const ANSWER_MAX: Duration = Duration::from_secs(90);
/// The same for loads and unloads.
pub(super) const LOAD_ANSWER_MAX: Duration = Duration::from_secs(960);

/// Exit codes, for the help of every command.
macro_rules! examples {
    ($($line:literal),+ $(,)?) => {
        concat!(
            "Examples:\n", $("  tidegate ", $line, "\n",)+
            "\nExit code: 0 done, 1 refused or nobody there, 2 wrong usage"
        )
    };
}
pub(super) use examples;

/// Where the admin API is, and who calls.
#[derive(clap::Args)]
pub(super) struct Connection {
    /// Address of the admin API
    #[arg(
        long,
        value_name = "URL",
        default_value = "http://127.0.0.1:8003",
        help_heading = "Connection"
    )]
    address: String,
    /// File with a token, and nothing else
    #[arg(long, value_name = "FILE", help_heading = "Connection")]
    token_file: Option<PathBuf>,
    /// Folder of the gateway's state: its file 'admin-token' is used [default:
    /// TIDEGATE_SERVER_STATE_DIR, or tidegate-state]. A token in TIDEGATE_ADMIN_TOKEN goes before
    /// the default
    #[arg(long, value_name = "DIR", help_heading = "Connection", conflicts_with = "token_file")]
    state_dir: Option<PathBuf>,
    /// Certificates (PEM) that the gateway's is checked against [default: the system's]
    #[arg(long, value_name = "FILE", help_heading = "Connection")]
    ca: Option<PathBuf>,
    /// Client certificate (PEM)
    #[arg(long, value_name = "FILE", help_heading = "Connection", requires = "key")]
    cert: Option<PathBuf>,
    /// Its private key (PEM)
    #[arg(long, value_name = "FILE", help_heading = "Connection", requires = "cert")]
    key: Option<PathBuf>,
    /// Print the answer as JSON
    #[arg(long)]
    pub(super) json: bool,
}

impl Why {
    pub(super) fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }
}

impl Connection {
    /// Folder of the gateway's state, as far as it is known here.
    pub(super) fn state_dir(&self) -> PathBuf {
        let default = || variable(STATE_VARIABLE).unwrap_or_else(|| STATE_DIR.to_owned());
        self.state_dir.clone().unwrap_or_else(|| default().into())
    }
}

/// What a change may say of itself.
#[derive(clap::Args)]
pub(super) struct Why {
    /// Why, for the journal
    #[arg(long, value_name = "TEXT")]
    reason: Option<String>,
    /// Only if the resource still has this ETag
    #[arg(long, value_name = "ETAG")]
    if_match: Option<String>,
}

/// Why a command did not do what it was told.
#[derive(Debug)]
pub(super) enum Stop {
    /// Exit code 2.
    Usage(String),
    /// Exit code 1.
    Failed(String),
}

impl Stop {
    pub(super) fn usage(problem: impl Display) -> Self {
        Self::Usage(problem.to_string())
    }

    pub(super) fn failed(problem: impl Display) -> Self {
        Self::Failed(problem.to_string())
    }
}

/// What the gateway said.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) etag: Option<String>,
    pub(super) body: Value,
}

/// Prints what `work` gives, or what went wrong.
pub(super) fn finish(work: Result<String, Stop>) -> ExitCode {
    let (problem, code) = match work {
        Ok(text) => match io::stdout().lock().write_all(text.as_bytes()) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => (format!("cannot print: {error}"), 1),
        },
        Err(Stop::Failed(problem)) => (problem, 1),
        Err(Stop::Usage(problem)) => (problem, 2),
    };
    super::complain(&problem);
    ExitCode::from(code)
}

/// The answer for people, or as it came.
pub(super) fn shown(
    connection: &Connection,
    answer: &Answer,
    text: impl FnOnce(&Value) -> String,
) -> String {
    match connection.json {
        true => format!("{:#}\n", answer.body),
        false => text(&answer.body),
    }
}

/// A caller of the admin API.
pub(super) struct Client {
    http: reqwest::Client,
    base: String,
    runtime: tokio::runtime::Runtime,
}

impl Client {
    /// # Errors
    /// `Usage` for an address that is none, and files that cannot be read.
    pub(super) fn open(connection: &Connection) -> Result<Self, Stop> {
        let base = base(&connection.address)?;
        let mut headers = HeaderMap::new();
        if let Some(token) = token(connection)? {
            let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
                .map_err(|_| Stop::usage("the token has characters that no token has"))?;
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        // A second one would be refused, and the first is as good.
        drop(rustls::crypto::ring::default_provider().install_default());
        let mut http = reqwest::Client::builder()
            .default_headers(headers)
            .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .no_proxy()
            .connect_timeout(CONNECT_MAX);
        if let Some(path) = &connection.ca {
            let pem = read(path)?;
            let roots = Certificate::from_pem_bundle(&pem)
                .ok()
                .filter(|roots| !roots.is_empty())
                .ok_or_else(|| {
                Stop::usage(format_args!("'{}' has no certificates", path.display()))
            })?;
            http = http.tls_certs_only(roots);
        }
        if let (Some(cert), Some(key)) = (&connection.cert, &connection.key) {
            let pem = [read(cert)?, b"\n".to_vec(), read(key)?].concat();
            let identity = Identity::from_pem(&pem).map_err(|error| {
                let (cert, key) = (cert.display(), key.display());
                Stop::usage(format_args!("'{cert}' and '{key}' are no client certificate: {error}"))
            })?;
            http = http.identity(identity);
        }
        let http = http.build().map_err(Stop::failed)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Self { http, base, runtime: runtime.map_err(Stop::failed)? })
    }

    pub(super) fn run<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    pub(super) fn get(&self, path: &str) -> Result<Answer, Stop> {
        self.run(self.get_async(path))
    }

    pub(super) async fn get_async(&self, path: &str) -> Result<Answer, Stop> {
        let request = self.http.get(self.url(path)).timeout(ANSWER_MAX);
        answer(self.send(request).await?).await
    }

    /// The answer as it came: its numbers have all of their digits.
    pub(super) fn get_text(&self, path: &str) -> Result<String, Stop> {
        self.run(async {
            let response = self.send(self.http.get(self.url(path)).timeout(ANSWER_MAX)).await?;
            match response.status().is_success() {
                true => String::from_utf8(bytes(response).await?).map_err(Stop::failed),
                false => Err(refused(response).await),
            }
        })
    }

    /// A stream of events after `after`, whatever time it takes.
    pub(super) async fn events(&self, after: Option<u64>) -> Result<Response, Stop> {
        let mut request = self.http.get(self.url("/events")).header("accept", "text/event-stream");
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        let response = self.send(request).await?;
        match response.status() {
            StatusCode::OK => Ok(response),
            _ => Err(refused(response).await),
        }
    }

    pub(super) fn post(&self, path: &str, body: Value, why: &Why) -> Result<Answer, Stop> {
        self.change(Method::POST, path, Some(body), why, ANSWER_MAX)
    }

    pub(super) fn put(&self, path: &str, body: Value, why: &Why) -> Result<Answer, Stop> {
        self.change(Method::PUT, path, Some(body), why, ANSWER_MAX)
    }

    pub(super) fn delete(&self, path: &str, why: &Why) -> Result<Answer, Stop> {
        self.change(Method::DELETE, path, None, why, ANSWER_MAX)
    }

    pub(super) fn change(
        &self,
        method: Method,
        path: &str,
        body: Option<Value>,
        why: &Why,
        within: Duration,
    ) -> Result<Answer, Stop> {
        let mut request = self.http.request(method, self.url(path)).timeout(within);
        if let Some(tag) = &why.if_match {
            request = request.header("if-match", header_value("--if-match", &quoted(tag))?);
        }
        match body {
            Some(mut body) => {
                if let (Some(members), Some(reason)) = (body.as_object_mut(), &why.reason) {
                    members.insert("reason".to_owned(), json!(reason));
                }
                request = request.json(&body);
            }
            None => {
                if let Some(reason) = &why.reason {
                    let name = HeaderName::from_static("tidegate-reason");
                    request = request.header(name, header_value("--reason", reason)?);
                }
            }
        }
        self.run(async { answer(self.send(request).await?).await })
    }

    fn url(&self, path: &str) -> String {
        format!("{}{PREFIX}{path}", self.base)
    }

    async fn send(&self, request: reqwest::RequestBuilder) -> Result<Response, Stop> {
        request.send().await.map_err(|error| {
            // The URL is ours and has no secret; the cause is what says why.
            let cause = causes(&error);
            if error.is_timeout() {
                return Stop::failed(format_args!("{} did not answer in time", self.base));
            }
            Stop::failed(format_args!("cannot reach the admin API at {}: {cause}", self.base))
        })
    }
}

impl Why {
    /// The same, bound to what was read.
    pub(super) fn bound_to(&self, etag: Option<&String>) -> Self {
        let if_match = self.if_match.clone().or_else(|| etag.cloned());
        Self { reason: self.reason.clone(), if_match }
    }
}

/// The innermost cause: the outer ones say only that it failed.
fn causes(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

fn header_value(flag: &str, text: &str) -> Result<HeaderValue, Stop> {
    HeaderValue::from_bytes(text.as_bytes())
        .map_err(|_| Stop::usage(format_args!("{flag}: expected one line of text")))
}

/// As people copy it, with its quotes or without.
fn quoted(tag: &str) -> String {
    match tag {
        "*" => tag.to_owned(),
        tag if tag.contains('"') => tag.to_owned(),
        bare => format!("\"{bare}\""),
    }
}

/// `http://host:port` without a slash at the end.
fn base(address: &str) -> Result<String, Stop> {
    let url = url::Url::parse(address).ok().filter(|url| {
        matches!(url.scheme(), "http" | "https")
            && url.has_host()
            && url.path() == "/"
            && url.query().is_none()
            && url.fragment().is_none()
            && url.username().is_empty()
            && url.password().is_none()
    });
    let wrong = || {
        let expected = "expected a URL like http://127.0.0.1:8003 or https://gate:8003";
        Stop::usage(format_args!("--address: {expected}, got '{address}'"))
    };
    url.map(|url| url.as_str().trim_end_matches('/').to_owned()).ok_or_else(wrong)
}

/// The first that there is: `--token-file`, `--state-dir`, the variable, the state's default place.
/// None is no error where a certificate speaks for the caller.
fn token(connection: &Connection) -> Result<Option<String>, Stop> {
    if let Some(path) = &connection.token_file {
        return one_line(path).map(Some);
    }
    if let Some(folder) = &connection.state_dir {
        return one_line(&folder.join(TOKEN_FILE)).map(Some);
    }
    if let Some(token) = variable(TOKEN_VARIABLE) {
        return Ok(Some(token.trim().to_owned()));
    }
    let path = connection.state_dir().join(TOKEN_FILE);
    if connection.cert.is_some() && !path.exists() {
        return Ok(None);
    }
    one_line(&path).map(Some).map_err(|_| {
        Stop::usage(format_args!(
            "no token: there is none in {TOKEN_VARIABLE} and no file '{}' that can be read; give \
             --state-dir or --token-file",
            path.display()
        ))
    })
}

/// A variable that is set, and not empty.
fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn one_line(path: &Path) -> Result<String, Stop> {
    let bytes = read(path)?;
    let text = String::from_utf8(bytes).unwrap_or_default();
    let text = text.trim();
    if text.is_empty() || text.contains(char::is_whitespace) {
        return Err(Stop::usage(format_args!("'{}' is not a file with one token", path.display())));
    }
    Ok(text.to_owned())
}

pub(super) fn read(path: &Path) -> Result<Vec<u8>, Stop> {
    use std::io::Read as _;
    let shown = path.display();
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(path);
    let read = opened.and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut bytes));
    read.map_err(|error| Stop::usage(format_args!("'{shown}' cannot be read: {error}")))?;
    match bytes.len() as u64 > FILE_BYTES_MAX {
        true => Err(Stop::usage(format_args!("'{shown}' has more than {FILE_BYTES_MAX} bytes"))),
        false => Ok(bytes),
    }
}

/// JSON out of a file, or standard input for `-`.
pub(super) fn read_json(path: &Path) -> Result<Value, Stop> {
    let bytes = match path.as_os_str() == "-" {
        true => {
            use std::io::Read as _;
            let mut bytes = Vec::new();
            let input = io::stdin().lock().take(FILE_BYTES_MAX);
            let mut input = input;
            input.read_to_end(&mut bytes).map_err(Stop::usage)?;
            bytes
        }
        false => read(path)?,
    };
    let value: Value = serde_json::from_slice(&bytes)
        .map_err(|error| Stop::usage(format_args!("'{}' is not JSON: {error}", path.display())))?;
    match value.is_object() {
        true => Ok(value),
        false => Err(Stop::usage(format_args!("'{}' holds no object", path.display()))),
    }
}

async fn answer(response: Response) -> Result<Answer, Stop> {
    if !response.status().is_success() {
        return Err(refused(response).await);
    }
    let etag =
        response.headers().get("etag").and_then(|tag| tag.to_str().ok()).map(ToOwned::to_owned);
    let bytes = bytes(response).await?;
    let body = serde_json::from_slice(&bytes)
        .map_err(|error| Stop::failed(format_args!("the answer is not JSON: {error}")))?;
    Ok(Answer { etag, body })
}

async fn bytes(mut response: Response) -> Result<Vec<u8>, Stop> {
    let mut all = Vec::new();
    loop {
        let chunk = response.chunk().await;
        let chunk = chunk.map_err(|error| {
            Stop::failed(format_args!("the answer ended before it was whole: {}", causes(&error)))
        })?;
        let Some(chunk) = chunk else { return Ok(all) };
        if all.len() + chunk.len() > ANSWER_BYTES_MAX {
            return Err(Stop::failed(format_args!(
                "the answer has more than {ANSWER_BYTES_MAX} bytes"
            )));
        }
        all.extend_from_slice(&chunk);
    }
}

/// A refusal in words: what, why, and what to do.
async fn refused(response: Response) -> Stop {
    let status = response.status();
    let body = bytes(response).await.unwrap_or_default();
    match serde_json::from_slice::<Value>(&body) {
        Ok(problem) if problem["hint"].is_string() => Stop::Failed(problem_text(&problem)),
        _ => Stop::failed(format_args!(
            "the server answered {status}, and not as the admin API does"
        )),
    }
}

fn problem_text(problem: &Value) -> String {
    let text = |name: &str| table::plain(problem[name].as_str().unwrap_or_default());
    let mut out =
        format!("{} ({} {}): {}", text("title"), problem["status"], text("code"), text("detail"));
    let problems: Vec<String> = problem["problems"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|each| each.as_str().map(table::plain))
        .collect();
    if problems.len() > 1 {
        for each in problems {
            out += &format!("\n  - {each}");
        }
    }
    out += &format!("\n  what to do: {}", text("hint"));
    out += &format!("\n  request id: {}", text("request_id"));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_origins() {
        let of = |text: &str| base(text).map_err(|stop| matches!(stop, Stop::Usage(_)));
        assert_eq!(of("http://127.0.0.1:8003"), Ok("http://127.0.0.1:8003".to_owned()));
        assert_eq!(of("https://gate/"), Ok("https://gate".to_owned()));
        assert_eq!(of("http://[::1]:1"), Ok("http://[::1]:1".to_owned()));
        for wrong in [
            "gate:8003",
            "ftp://gate",
            "http://",
            "http://gate/admin",
            "http://a:b@gate",
            "http://gate?x",
        ] {
            assert_eq!(of(wrong), Err(true), "{wrong}");
        }
    }

    #[test]
    fn tags_are_quoted_once() {
        for (text, want) in [("7", "\"7\""), ("\"7\"", "\"7\""), ("*", "*"), ("W/\"7\"", "W/\"7\"")]
        {
            assert_eq!(quoted(text), want);
        }
    }

    #[test]
    fn a_problem_says_what_to_do() {
        let problem = json!({
            "title": "The request is not right", "status": 400, "code": "invalid",
            "detail": "a; b", "problems": ["weights.2: a", "rules[0]: b\u{1b}[2J"],
            "hint": "correct it", "request_id": "id-1",
        });
        let text = problem_text(&problem);
        assert_eq!(
            text,
            "The request is not right (400 invalid): a; b\n  - weights.2: a\n  - rules[0]: b\u{fffd}[2J\n  \
             what to do: correct it\n  request id: id-1"
        );
    }

    #[test]
    fn a_token_is_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        for (text, right) in
            [("tg_a.b\n", true), ("tg_a.b", true), ("", false), ("a b", false), ("a\nb", false)]
        {
            std::fs::write(&path, text).unwrap();
            assert_eq!(one_line(&path).is_ok(), right, "{text:?}");
        }
        assert!(matches!(one_line(&folder.path().join("none")), Err(Stop::Usage(_))));
    }
}
