//! Predictions over three wires, and the version that each answer proves.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::HeaderMap;
use http_body_util::{BodyExt as _, Full};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde_json::{Value, json};
use tidegate::proto::inference as pb;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tonic::transport::{Channel, Endpoint};

/// No answer after this is a failed test.
const PATIENCE: Duration = Duration::from_secs(60);
/// Values of `x`: sums with a version are exact in 32 bits.
const X_MAX: u32 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wire {
    Http1,
    Http2,
    Grpc,
}

impl Wire {
    /// Each in its turn.
    pub(crate) fn of(at: usize) -> Self {
        [Self::Http1, Self::Http2, Self::Grpc][at % 3]
    }
}

/// One prediction to ask for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ask {
    pub(crate) x: u32,
    /// A number or a label; empty: whatever the traffic table says.
    pub(crate) version: String,
    pub(crate) headers: Vec<(&'static str, String)>,
}

impl Ask {
    /// One in a row of requests that name no version.
    pub(crate) fn plain(at: usize) -> Self {
        // From 2, which no version was tried with before it served.
        let x = u32::try_from(at % 100_000).unwrap() + 2;
        Self { x, ..Self::default() }
    }
}

/// What an answer says of the version that gave it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ran {
    /// By its content.
    pub(crate) proven: u32,
    /// By its header.
    pub(crate) named: u32,
    pub(crate) arm: String,
    pub(crate) recorded: Option<Recorded>,
}

/// What the answer says of its record in the ledger.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Recorded {
    pub(crate) id: String,
    pub(crate) seq: u64,
}

/// What became of a request.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) ask: Ask,
    pub(crate) wire: Wire,
    pub(crate) due: Instant,
    pub(crate) started: Instant,
    pub(crate) ended: Instant,
    pub(crate) ran: Result<Ran, Failed>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Failed {
    /// By the header of the failed answer.
    pub(crate) named: Option<u32>,
    pub(crate) text: String,
}

impl Failed {
    fn new(text: impl ToString) -> Self {
        Self { named: None, text: text.to_string() }
    }
}

/// A client of one model.
#[derive(Clone)]
pub(crate) struct Client {
    model: Arc<str>,
    http: SocketAddr,
    one: Pool<HttpConnector, Full<Bytes>>,
    two: Pool<HttpConnector, Full<Bytes>>,
    grpc: Channel,
}

impl Client {
    /// In the runtime that its connections are to live in.
    pub(crate) fn new(model: &str, http: SocketAddr, grpc: SocketAddr) -> Self {
        let connector = || {
            let mut connector = HttpConnector::new();
            connector.set_nodelay(true);
            connector
        };
        let endpoint = Endpoint::from_shared(format!("http://{grpc}")).unwrap();
        Self {
            model: model.into(),
            http,
            one: Pool::builder(TokioExecutor::new()).build(connector()),
            two: Pool::builder(TokioExecutor::new()).http2_only(true).build(connector()),
            grpc: endpoint.connect_lazy(),
        }
    }

    pub(crate) async fn ask(&self, wire: Wire, ask: Ask, due: Instant) -> Answer {
        let started = Instant::now();
        let answer = async {
            match wire {
                Wire::Http1 => self.json(&ask).await,
                Wire::Http2 => self.binary(&ask).await,
                Wire::Grpc => self.call(&ask).await,
            }
        };
        let ran = timeout(PATIENCE, answer).await;
        let ran = ran.unwrap_or_else(|_| Err(Failed::new("no answer")));
        Answer { ask, wire, due, started, ended: Instant::now(), ran }
    }

    fn uri(&self, ask: &Ask) -> String {
        let version = match ask.version.as_str() {
            "" => String::new(),
            version => format!("/versions/{version}"),
        };
        format!("http://{}/v2/models/{}{version}/infer", self.http, self.model)
    }

    async fn json(&self, ask: &Ask) -> Result<Ran, Failed> {
        let body = json!({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 1],
            "data": [ask.x]}]});
        let request = http::Request::post(self.uri(ask));
        let (head, body) = send(&self.one, request, ask, body.to_string().into()).await?;
        let body: Value = serde_json::from_slice(&body).map_err(Failed::new)?;
        let y = body["outputs"][0]["data"][0].as_f64();
        ran(ask, y.ok_or_else(|| Failed::new(&body))?, &head)
    }

    async fn binary(&self, ask: &Ask) -> Result<Ran, Failed> {
        let request =
            http::Request::post(self.uri(ask)).header("inference-header-content-length", "0");
        let (head, body) = send(&self.two, request, ask, raw(ask.x)).await?;
        let y = body.last_chunk().map(|bytes| f32::from_le_bytes(*bytes));
        ran(ask, y.ok_or_else(|| Failed::new("empty"))?.into(), &head)
    }

    async fn call(&self, ask: &Ask) -> Result<Ran, Failed> {
        let mut client = tonic::client::Grpc::new(self.grpc.clone());
        client.ready().await.map_err(Failed::new)?;
        let mut request = tonic::Request::new(pb::ModelInferRequest {
            model_name: self.model.to_string(),
            model_version: ask.version.clone(),
            inputs: vec![pb::model_infer_request::InferInputTensor {
                name: "x".to_owned(),
                datatype: "FP32".to_owned(),
                shape: vec![1, 1],
                ..Default::default()
            }],
            raw_input_contents: vec![raw(ask.x)],
            ..Default::default()
        });
        for (name, value) in &ask.headers {
            request.metadata_mut().insert(*name, value.parse().unwrap());
        }
        let path = "/inference.GRPCInferenceService/ModelInfer".parse().unwrap();
        let codec =
            tonic_prost::ProstCodec::<pb::ModelInferRequest, pb::ModelInferResponse>::default();
        match client.unary(request, path, codec).await {
            Ok(answer) => {
                let (metadata, answer, _) = answer.into_parts();
                let y = answer.raw_output_contents.first().and_then(|raw| raw.last_chunk());
                let y = y.ok_or_else(|| Failed::new("no output"))?;
                ran(ask, f32::from_le_bytes(*y).into(), &metadata.into_headers())
            }
            Err(status) => {
                let named = named(status.metadata().as_ref());
                Err(Failed { named, text: format!("{:?} {}", status.code(), status.message()) })
            }
        }
    }
}

async fn send(
    pool: &Pool<HttpConnector, Full<Bytes>>,
    mut request: http::request::Builder,
    ask: &Ask,
    body: Bytes,
) -> Result<(HeaderMap, Bytes), Failed> {
    for (name, value) in &ask.headers {
        request = request.header(*name, value);
    }
    let request = request.body(Full::new(body)).unwrap();
    let failed = |error: &dyn std::fmt::Debug| Failed::new(format!("{error:?}"));
    let answer = pool.request(request).await.map_err(|error| failed(&error))?;
    let (head, body) = answer.into_parts();
    let body = body.collect().await.map_err(|error| failed(&error))?.to_bytes();
    if head.status == 200 {
        return Ok((head.headers, body));
    }
    let text = format!("{} {}", head.status, String::from_utf8_lossy(&body));
    Err(Failed { named: named(&head.headers), text })
}

#[expect(clippy::cast_precision_loss, reason = "exact below 2^24")]
fn raw(x: u32) -> Bytes {
    assert!(x < X_MAX);
    (x as f32).to_le_bytes().to_vec().into()
}

fn named(headers: &HeaderMap) -> Option<u32> {
    headers.get("tidegate-model-version")?.to_str().ok()?.parse().ok()
}

fn recorded(headers: &HeaderMap) -> Option<Recorded> {
    let id = headers.get("tidegate-prediction-id")?.to_str().ok()?.to_owned();
    let seq = headers.get("tidegate-ledger-seq")?.to_str().ok()?.parse().ok()?;
    Some(Recorded { id, seq })
}

/// The version that `y` proves.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "checked before")]
fn ran(ask: &Ask, y: f64, headers: &HeaderMap) -> Result<Ran, Failed> {
    let k = y - f64::from(ask.x);
    if !(k.fract() == 0.0 && (1.0..10_000.0).contains(&k)) {
        return Err(Failed::new(format!("x {} gave {y}", ask.x)));
    }
    let arm = headers.get("tidegate-arm").and_then(|arm| arm.to_str().ok());
    match (named(headers), arm) {
        (Some(named), Some(arm)) => {
            let (arm, recorded) = (arm.to_owned(), recorded(headers));
            Ok(Ran { proven: k as u32, named, arm, recorded })
        }
        _ => Err(Failed::new(format!("no version or arm in {headers:?}"))),
    }
}

/// Ends a load, and says how far it is.
#[derive(Clone, Default)]
pub(crate) struct Stop(Arc<(AtomicBool, AtomicUsize)>);

impl Stop {
    pub(crate) fn stop(&self) {
        self.0.0.store(true, Ordering::Release);
    }

    pub(crate) fn is_set(&self) -> bool {
        self.0.0.load(Ordering::Acquire)
    }

    /// Requests that were answered, or failed.
    pub(crate) fn done(&self) -> usize {
        self.0.1.load(Ordering::Acquire)
    }

    fn count(&self) {
        self.0.1.fetch_add(1, Ordering::AcqRel);
    }
}

/// Requests at `rate` a second, each when it is due, whatever became of those before, over all
/// wires in turn, until `stop`.
pub(crate) async fn open_loop(client: Client, rate: f64, stop: Stop) -> Vec<Answer> {
    let start = tokio::time::Instant::now();
    let mut calls = JoinSet::new();
    let mut answers = Vec::new();
    for at in 0_usize.. {
        if stop.is_set() {
            break;
        }
        let due = start + Duration::from_secs_f64(precise(at) / rate);
        tokio::time::sleep_until(due).await;
        let (client, stop) = (client.clone(), stop.clone());
        calls.spawn(async move {
            let answer = client.ask(Wire::of(at), Ask::plain(at), due.into_std()).await;
            stop.count();
            answer
        });
        while let Some(done) = calls.try_join_next() {
            answers.push(done.unwrap());
        }
    }
    answers.extend(calls.join_all().await);
    answers.sort_by_key(|answer| answer.started);
    answers
}

/// `callers` that ask one after another what `next` says, until `stop`.
pub(crate) async fn closed_loop(
    client: Client,
    callers: usize,
    stop: Stop,
    next: impl Fn(usize) -> Ask + Send + Sync + 'static,
) -> Vec<Answer> {
    let (taken, next) = (Arc::new(AtomicUsize::new(0)), Arc::new(next));
    let mut all = JoinSet::new();
    for _ in 0..callers {
        let (client, taken, next) = (client.clone(), Arc::clone(&taken), Arc::clone(&next));
        let stop = stop.clone();
        all.spawn(async move {
            let mut answers = Vec::new();
            loop {
                let at = taken.fetch_add(1, Ordering::Relaxed);
                if stop.is_set() {
                    return answers;
                }
                let answer = client.ask(Wire::of(at), next(at), Instant::now()).await;
                stop.count();
                answers.push(answer);
            }
        });
    }
    let mut answers: Vec<Answer> = all.join_all().await.into_iter().flatten().collect();
    answers.sort_by_key(|answer| answer.started);
    answers
}

/// Times from when a request was due until it was answered.
pub(crate) fn times<'a>(answers: impl IntoIterator<Item = &'a Answer>) -> Vec<Duration> {
    answers.into_iter().map(|answer| answer.ended - answer.due).collect()
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a position in a list")]
pub(crate) fn quantile(times: &[Duration], share: f64) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let at = (precise(sorted.len().saturating_sub(1)) * share).round();
    sorted.get(at as usize).copied().unwrap_or_default()
}

#[expect(clippy::cast_precision_loss, reason = "counts of requests")]
pub(crate) fn precise(count: usize) -> f64 {
    count as f64
}
