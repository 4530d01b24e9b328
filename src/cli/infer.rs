//! `tidegate infer`: one request, and its answer printed.

use std::io::{Read as _, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, anyhow, ensure};
use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri};
use http_body_util::{BodyExt, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};

use crate::admit::Secret;
use crate::domain::{ModelName, VersionRef};

mod data;

/// Largest answer that is read, in bytes.
pub(super) const ANSWER_SIZE_MAX: usize = 1 << 30;
/// Values of an output that are printed; the rest is counted.
const VALUES_SHOWN_MAX: usize = 16;

#[derive(clap::Args)]
#[command(after_help = "Examples:\n  tidegate infer iris --random\n  \
                  tidegate infer iris --version 1 --input request.json --json\n  \
                  tidegate infer topics --random --shape tokens=1,12\n\n\
                  A key's token is taken from the variable TIDEGATE_TOKEN.\n\
                  Exit code: 0 an answer came, 1 the server refused or cannot be reached, \
                  2 wrong usage")]
#[command(group = clap::ArgGroup::new("source").required(true).args(["input", "random"]))]
pub(super) struct Args {
    /// Name of the model
    model: ModelName,
    /// The gateway
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    url: Uri,
    /// Number or label; the latest when left out
    #[arg(long = "version", value_name = "V", value_parser = parse_version)]
    model_version: Option<VersionRef>,
    /// Request body as JSON (- for standard input), or .npz with one array per input
    #[arg(long, value_name = "FILE")]
    input: Option<PathBuf>,
    /// Make up data that fits the model; sizes that vary are 1
    #[arg(long)]
    random: bool,
    /// Shape of a made-up input: NAME=1,4
    #[arg(long, value_name = "SHAPE", conflicts_with = "input", value_parser = data::parse_shape)]
    shape: Vec<(String, Vec<u64>)>,
    /// Print the whole answer as JSON
    #[arg(long)]
    json: bool,
}

fn parse_version(text: &str) -> Result<VersionRef, crate::domain::NameError> {
    VersionRef::parse(text)?.ok_or(crate::domain::NameError::BadVersion)
}

/// Holds a token for a gateway that asks for one. Not an argument: those can be seen by others.
pub(super) const TOKEN_VARIABLE: &str = "TIDEGATE_TOKEN";

/// Why there is no answer, by exit code.
enum Stop {
    Usage(anyhow::Error),
    Failed(anyhow::Error),
}

pub(super) fn run(args: &Args) -> ExitCode {
    let token = std::env::var(TOKEN_VARIABLE).ok().filter(|token| !token.is_empty());
    let (code, error) = match exchange(args, token.map(Secret::new).as_ref()) {
        Ok(answer) => match answer.print(args.json, &mut std::io::stdout().lock()) {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => (1, error.into()),
        },
        Err(Stop::Failed(error)) => (1, error),
        Err(Stop::Usage(error)) => (2, error),
    };
    // Nowhere is left to say that standard error is closed.
    let _written = writeln!(std::io::stderr(), "error: {error:#}");
    ExitCode::from(code)
}

fn exchange(args: &Args, token: Option<&Secret<String>>) -> Result<Answer, Stop> {
    if args.url.scheme_str() != Some("http") || args.url.host().is_none() {
        let url = &args.url;
        return Err(Stop::Usage(anyhow!("expected a URL like http://127.0.0.1:8000, got '{url}'")));
    }
    let credential = token.map(credential).transpose().map_err(Stop::Usage)?;
    let prepared = match &args.input {
        Some(path) => Some(from_file(path).map_err(Stop::Usage)?),
        None => None,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Stop::Failed(error.into()))?;
    runtime.block_on(send(args, prepared, credential.as_ref()))
}

pub(super) fn credential(token: &Secret<String>) -> anyhow::Result<HeaderValue> {
    let value = HeaderValue::try_from(format!("Bearer {}", token.expose().trim()));
    let mut value = value.map_err(|_| anyhow!("{TOKEN_VARIABLE} holds no token"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// What is posted; `json_len` is set when tensors follow the JSON.
struct Prepared {
    body: Vec<u8>,
    json_len: Option<usize>,
}

impl Prepared {
    fn new(arrays: &[data::Array]) -> Self {
        let (body, json_len) = data::request_body(arrays);
        Self { body, json_len: Some(json_len) }
    }
}

fn from_file(path: &std::path::Path) -> anyhow::Result<Prepared> {
    let shown = path.display();
    if path.extension().is_some_and(|extension| extension == "npz") {
        let file = std::fs::File::open(path).with_context(|| format!("open '{shown}'"))?;
        return Ok(Prepared::new(&data::read_npz(file).with_context(|| format!("'{shown}'"))?));
    }
    let mut body = Vec::new();
    if path.as_os_str() == "-" {
        std::io::stdin().read_to_end(&mut body)?;
    } else {
        body = std::fs::read(path).with_context(|| format!("read '{shown}'"))?;
    }
    let request: Value =
        serde_json::from_slice(&body).with_context(|| format!("'{shown}' is not JSON"))?;
    ensure!(request["inputs"].is_array(), "'{shown}' is no request: it has no \"inputs\"");
    Ok(Prepared { body, json_len: None })
}

async fn send(
    args: &Args,
    prepared: Option<Prepared>,
    credential: Option<&HeaderValue>,
) -> Result<Answer, Stop> {
    let base = args.url.to_string();
    let mut path = format!("{}/v2/models/{}", base.trim_end_matches('/'), args.model);
    if let Some(version) = &args.model_version {
        path = format!("{path}/versions/{version}");
    }
    let prepared = match prepared {
        Some(prepared) => prepared,
        None => {
            let nothing = Prepared { body: Vec::new(), json_len: None };
            let metadata = call(Method::GET, &path, nothing, credential).await;
            let metadata = metadata.map_err(Stop::Failed)?;
            let arrays = data::made_up(&metadata.body, &args.shape).map_err(Stop::Usage)?;
            Prepared::new(&arrays)
        }
    };
    let path = format!("{path}/infer");
    call(Method::POST, &path, prepared, credential).await.map_err(Stop::Failed)
}

async fn call(
    method: Method,
    url: &str,
    prepared: Prepared,
    credential: Option<&HeaderValue>,
) -> anyhow::Result<Answer> {
    let mut request = Request::builder().method(method).uri(url);
    if let Some(credential) = credential {
        request = request.header(AUTHORIZATION, credential);
    }
    request = match prepared.json_len {
        Some(len) => request
            .header("content-type", "application/octet-stream")
            .header("inference-header-content-length", len),
        None => request.header("content-type", "application/json"),
    };
    let request = request.body(Full::new(Bytes::from(prepared.body)))?;
    let client = Client::builder(TokioExecutor::new()).build_http();
    let response = client.request(request).await.with_context(|| format!("cannot reach {url}"))?;
    let (head, body) = response.into_parts();
    let body = Limited::new(body, ANSWER_SIZE_MAX).collect().await;
    let body = body.map_err(|error| anyhow!("read the answer: {error}"))?.to_bytes();
    Answer::new(head.status, head.headers, &body)
}

#[derive(Debug)]
struct Answer {
    headers: HeaderMap,
    body: Value,
}

impl Answer {
    fn new(status: StatusCode, headers: HeaderMap, body: &[u8]) -> anyhow::Result<Self> {
        let body: Result<Value, _> = serde_json::from_slice(body);
        if !status.is_success() {
            let message = body.ok().and_then(|body| body["error"].as_str().map(str::to_owned));
            let message = message.unwrap_or_else(|| "without a message".to_owned());
            let answer = Self { headers, body: Value::Null };
            let id = answer.header("tidegate-prediction-id");
            let id = id.map(|id| format!(" (prediction {id})")).unwrap_or_default();
            return Err(anyhow!("{status}: {message}{id}"));
        }
        Ok(Self { headers, body: body.context("the answer is not JSON")? })
    }

    fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    fn print(&self, as_json: bool, out: &mut impl Write) -> std::io::Result<()> {
        let names = ["prediction-id", "model-version", "arm", "model-digest"];
        let found: Vec<(&str, &str)> = names
            .iter()
            .filter_map(|name| Some((*name, self.header(&format!("tidegate-{name}"))?)))
            .collect();
        if as_json {
            let headers: serde_json::Map<String, Value> = found
                .into_iter()
                .map(|(name, value)| (name.replace('-', "_"), value.into()))
                .collect();
            return writeln!(out, "{:#}", json!({"headers": headers, "response": self.body}));
        }
        writeln!(out, "model: {}", text(&self.body["model_name"]))?;
        for (name, value) in found {
            writeln!(out, "{name}: {value}")?;
        }
        for output in self.body["outputs"].as_array().into_iter().flatten() {
            let (name, datatype) = (text(&output["name"]), text(&output["datatype"]));
            let mut values = Vec::new();
            flatten(&output["data"], &mut values);
            let more = match values.len().saturating_sub(VALUES_SHOWN_MAX) {
                0 => String::new(),
                more => format!(", … ({more} more)"),
            };
            values.truncate(VALUES_SHOWN_MAX);
            writeln!(out, "{name} {datatype} {}: {}{more}", output["shape"], values.join(", "))?;
        }
        Ok(())
    }
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or("?")
}

fn flatten(value: &Value, out: &mut Vec<String>) {
    match value {
        Value::Array(items) => items.iter().for_each(|item| flatten(item, out)),
        Value::Null => {}
        value => out.push(value.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(clap::Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &[&str]) -> Result<Args, clap::Error> {
        Line::try_parse_from([&["infer"], line].concat()).map(|line| line.args)
    }

    #[test]
    fn wrong_usage_is_told_apart() {
        assert!(parse(&["iris", "--random"]).is_ok());
        assert!(parse(&["iris"]).is_err());
        assert!(parse(&["iris", "--random", "--input", "x.json"]).is_err());
        assert!(parse(&["iris", "--input", "x.json", "--shape", "x=1"]).is_err());
        assert!(parse(&["../iris", "--random"]).is_err());
        assert!(parse(&["iris", "--random", "--version", "../1"]).is_err());
        let https = parse(&["iris", "--random", "--url", "https://127.0.0.1"]).unwrap();
        assert!(matches!(exchange(&https, None), Err(Stop::Usage(_))));
        let missing = parse(&["iris", "--input", "/nonexistent.json"]).unwrap();
        assert!(matches!(exchange(&missing, None), Err(Stop::Usage(_))));
        let right = parse(&["iris", "--random"]).unwrap();
        let no_token = Secret::new("a\nb".to_owned());
        let Err(Stop::Usage(error)) = exchange(&right, Some(&no_token)) else { unreachable!() };
        assert_eq!(error.to_string(), "TIDEGATE_TOKEN holds no token");
    }

    #[test]
    fn nobody_there_is_a_failure() {
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let args = parse(&["iris", "--random", "--url", &format!("http://127.0.0.1:{port}")]);
        assert!(matches!(exchange(&args.unwrap(), None), Err(Stop::Failed(_))));
    }

    #[test]
    fn a_made_up_request_is_sent_and_its_answer_printed() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let server = std::thread::spawn(move || {
            let metadata = r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[-1,4]}]}"#;
            let answer = r#"{"model_name":"iris","outputs":[{"name":"y","datatype":"FP32","shape":[1,20],"data":[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20]}]}"#;
            [metadata, answer].map(|body| reply(&listener, body))
        });
        let args = parse(&["iris", "--version", "2", "--random", "--url", &url]).unwrap();
        let token = Secret::new("tg_1.x\n".to_owned());
        let Ok(answer) = exchange(&args, Some(&token)) else { unreachable!("the server answers") };
        let requests = server.join().unwrap();
        assert!(requests[0].starts_with("GET /v2/models/iris/versions/2 HTTP/1.1"));
        assert!(requests[1].starts_with("POST /v2/models/iris/versions/2/infer HTTP/1.1"));
        assert!(requests[1].contains("inference-header-content-length: "));
        let shown = "authorization: Bearer tg_1.x\r\n";
        assert!(requests.iter().all(|request| request.contains(shown)), "{requests:?}");
        let mut out = Vec::new();
        answer.print(false, &mut out).unwrap();
        let out = String::from_utf8(out).unwrap();
        assert!(out.contains("prediction-id: abc\n"), "{out}");
        assert!(out.contains("y FP32 [1,20]: 1, 2, 3"), "{out}");
        assert!(out.contains("16, … (4 more)"), "{out}");
        let mut out = Vec::new();
        answer.print(true, &mut out).unwrap();
        let json: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(json["headers"]["prediction_id"], "abc");
        assert_eq!(json["response"]["model_name"], "iris");
    }

    /// Answers one request on a connection of its own; gives what came first.
    fn reply(listener: &std::net::TcpListener, body: &str) -> String {
        let (mut stream, _) = listener.accept().unwrap();
        let mut buffer = vec![0; 4096];
        let len = stream.read(&mut buffer).unwrap();
        let len_of_body = body.len();
        let head = format!(
            "HTTP/1.1 200 OK\r\ncontent-length: {len_of_body}\r\ntidegate-prediction-id: abc\r\n\
             connection: close\r\n\r\n"
        );
        stream.write_all((head + body).as_bytes()).unwrap();
        String::from_utf8_lossy(&buffer[..len]).into_owned()
    }

    #[test]
    fn a_refusal_says_what_the_server_said() {
        let refused = Answer::new(StatusCode::NOT_FOUND, HeaderMap::new(), br#"{"error":"no"}"#);
        assert_eq!(refused.unwrap_err().to_string(), "404 Not Found: no");
        assert!(Answer::new(StatusCode::OK, HeaderMap::new(), b"<html>").is_err());
    }
}
