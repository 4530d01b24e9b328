//! One client for both protocols, and load whose arrivals do not wait for answers.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use tidegate::proto::inference as pb;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};

/// More than the streams that one connection may have open wait for their turn at the client.
const CHANNELS: usize = 4;
/// No answer after this is a failed test.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Wire {
    Http,
    Grpc,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Ok,
    /// For lack of room or time, with a hint when to come back.
    Shed,
    /// The deadline passed.
    Late,
    Other(String),
}

#[derive(Clone)]
pub(crate) struct Client {
    address: SocketAddr,
    http: Pool<HttpConnector, Full<Bytes>>,
    grpc: Arc<Vec<Channel>>,
    next: Arc<AtomicUsize>,
}

impl Client {
    /// In the runtime that its connections are to live in.
    pub(crate) fn new(address: SocketAddr) -> Self {
        let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        Self {
            address,
            http: Pool::builder(TokioExecutor::new()).build(connector),
            grpc: Arc::new((0..CHANNELS).map(|_| endpoint.connect_lazy()).collect()),
            next: Arc::default(),
        }
    }

    /// Sends one row that begins with `x`.
    pub(crate) async fn infer(
        &self,
        wire: Wire,
        model: &str,
        x: f32,
        wait: Option<Duration>,
    ) -> Outcome {
        let answer = async {
            match wire {
                Wire::Http => self.infer_http(model, x, wait).await,
                Wire::Grpc => self.infer_grpc(model, x, wait).await,
            }
        };
        let silent = |_| Outcome::Other("no answer".to_owned());
        timeout(PATIENCE, answer).await.unwrap_or_else(silent)
    }

    async fn infer_http(&self, model: &str, x: f32, wait: Option<Duration>) -> Outcome {
        let uri = format!("http://{}/v2/models/{model}/infer", self.address);
        let mut request = http::Request::post(uri).header("inference-header-content-length", "0");
        if let Some(wait) = wait {
            request = request.header("tidegate-timeout-ms", wait.as_millis().to_string());
        }
        let body = row(x);
        let response = self.http.request(request.body(Full::new(body.clone())).unwrap()).await;
        let (head, answer) = match response {
            Ok(response) => response.into_parts(),
            Err(error) => return Outcome::Other(format!("{error:?}")),
        };
        let answer = match answer.collect().await {
            Ok(answer) => answer.to_bytes(),
            Err(error) => return Outcome::Other(format!("{error:?}")),
        };
        let waits = head.headers.get("retry-after").and_then(|value| value.to_str().ok());
        let waits = waits.and_then(|text| text.parse::<u64>().ok()).is_some_and(|s| s > 0);
        match head.status.as_u16() {
            200 if answer.ends_with(&body) => Outcome::Ok,
            503 if waits => Outcome::Shed,
            504 => Outcome::Late,
            status => Outcome::Other(format!("{status} {:?} {answer:?}", head.headers)),
        }
    }

    async fn infer_grpc(&self, model: &str, x: f32, wait: Option<Duration>) -> Outcome {
        let at = self.next.fetch_add(1, Ordering::Relaxed) % CHANNELS;
        let mut client = tonic::client::Grpc::new(self.grpc[at].clone());
        if let Err(error) = client.ready().await {
            return Outcome::Other(error.to_string());
        }
        let body = row(x);
        let mut request = Request::new(message(model, body.clone()));
        if let Some(wait) = wait {
            let text = format!("{}m", wait.as_millis());
            request.metadata_mut().insert("grpc-timeout", text.parse().unwrap());
        }
        let path = "/inference.GRPCInferenceService/ModelInfer".parse().unwrap();
        let codec =
            tonic_prost::ProstCodec::<pb::ModelInferRequest, pb::ModelInferResponse>::default();
        match client.unary(request, path, codec).await {
            Ok(answer) if answer.get_ref().raw_output_contents == [body] => Outcome::Ok,
            Ok(answer) => Outcome::Other(format!("{answer:?}")),
            Err(status) => {
                let has = |name| status.metadata().contains_key(name);
                match status.code() {
                    Code::Unavailable if has("retry-after") && has("grpc-retry-pushback-ms") => {
                        Outcome::Shed
                    }
                    Code::DeadlineExceeded => Outcome::Late,
                    // The client's own clock was faster than the gateway's answer.
                    Code::Cancelled if status.message() == "Timeout expired" => Outcome::Late,
                    _ => Outcome::Other(format!("{status:?}")),
                }
            }
        }
    }

    /// Status and body of a GET.
    pub(crate) async fn get(&self, address: SocketAddr, path: &str) -> (u16, String) {
        let uri = format!("http://{address}{path}").parse().unwrap();
        let response = timeout(PATIENCE, self.http.get(uri)).await.unwrap().unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    /// Status and body of an empty POST.
    pub(crate) async fn post(&self, path: &str) -> (u16, String) {
        let request = http::Request::post(format!("http://{}{path}", self.address));
        let request = request.body(Full::default()).unwrap();
        let response = timeout(PATIENCE, self.http.request(request)).await.unwrap().unwrap();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }

    /// Any unary call of the inference service.
    pub(crate) async fn call<Q, A>(&self, method: &str, request: Q) -> Result<A, tonic::Status>
    where
        Q: prost::Message + Default + Send + Sync + 'static,
        A: prost::Message + Default + Send + Sync + 'static,
    {
        let at = self.next.fetch_add(1, Ordering::Relaxed) % CHANNELS;
        let mut client = tonic::client::Grpc::new(self.grpc[at].clone());
        client.ready().await.map_err(|error| tonic::Status::unknown(error.to_string()))?;
        let path = format!("/inference.GRPCInferenceService/{method}").parse().unwrap();
        let codec = tonic_prost::ProstCodec::<Q, A>::default();
        client.unary(Request::new(request), path, codec).await.map(tonic::Response::into_inner)
    }

    /// Sum of all series of a family.
    pub(crate) async fn metric(&self, metrics: SocketAddr, family: &str) -> f64 {
        let (_, page) = self.get(metrics, "/metrics").await;
        let ours = page.lines().filter(|line| {
            line.strip_prefix(family).is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        ours.map(|line| line.rsplit_once(' ').unwrap().1.parse::<f64>().unwrap()).sum()
    }
}

/// One row of two numbers.
pub(crate) fn row(x: f32) -> Bytes {
    [x, 0.5].iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>().into()
}

pub(crate) fn message(model: &str, rows: Bytes) -> pb::ModelInferRequest {
    pb::ModelInferRequest {
        model_name: model.to_owned(),
        inputs: vec![pb::model_infer_request::InferInputTensor {
            name: "x".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![i64::try_from(rows.len() / 8).unwrap(), 2],
            ..Default::default()
        }],
        raw_input_contents: vec![rows],
        ..Default::default()
    }
}

/// What became of the requests of one stretch of load.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) sent: usize,
    pub(crate) ok: usize,
    pub(crate) shed: usize,
    pub(crate) late: usize,
    pub(crate) other: Vec<String>,
    /// The longest that the machine kept the load itself waiting, beyond when it was due.
    pub(crate) held_up: Duration,
    /// Good answers per second, without the first fifth.
    pub(crate) goodput: f64,
    /// Of good answers, from when they were due to be sent.
    pub(crate) took: Vec<Duration>,
}

/// Beyond this the machine was busy with other things, and times say nothing about the gateway.
const HELD_UP_MAX: Duration = Duration::from_millis(50);

impl Seen {
    /// Whether times and shares of this stretch can be judged; says so where they cannot.
    pub(crate) fn counts(&self, name: &str) -> bool {
        let counts = self.held_up <= HELD_UP_MAX;
        if !counts {
            eprintln!("{name}: not judged, the machine held the load up for {:?}", self.held_up);
        }
        counts
    }

    pub(crate) fn quantile(&self, share: f64) -> Duration {
        quantile(&self.took, share)
    }
}

pub(crate) fn quantile(times: &[Duration], share: f64) -> Duration {
    let mut sorted = times.to_vec();
    sorted.sort_unstable();
    let at = (sorted.len().saturating_sub(1) as f64 * share).round();
    sorted.into_iter().nth(whole(at)).unwrap_or_default()
}

#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "small and positive")]
pub(crate) fn whole(number: f64) -> usize {
    number as usize
}

/// Requests at `rate` a second, each when it is due, whatever became of those before. The first
/// number of each row is `from` and counts up.
pub(crate) async fn open_loop(
    client: &Client,
    wire: Wire,
    model: &'static str,
    rate: f64,
    lasting: Duration,
    wait: Option<Duration>,
) -> Seen {
    let start = Instant::now() + Duration::from_millis(10);
    let count = whole(rate * lasting.as_secs_f64());
    let mut calls = JoinSet::new();
    let mut held_up = Duration::ZERO;
    for at in 0..count {
        let due = start + Duration::from_secs_f64(at as f64 / rate);
        sleep_until(due).await;
        held_up = held_up.max(due.elapsed());
        let client = client.clone();
        calls.spawn(async move {
            let outcome = client.infer(wire, model, at as f32, wait).await;
            (outcome, due, Instant::now())
        });
    }
    let mut seen = Seen { sent: count, held_up, ..Seen::default() };
    let (from, to) = (start + lasting / 5, start + lasting);
    let mut counted = 0;
    while let Some(done) = calls.join_next().await {
        let (outcome, due, ended) = done.unwrap();
        match outcome {
            Outcome::Ok => {
                seen.ok += 1;
                seen.took.push(ended - due);
                counted += usize::from(from <= ended && ended < to);
            }
            Outcome::Shed => seen.shed += 1,
            Outcome::Late => seen.late += 1,
            Outcome::Other(what) => seen.other.push(what),
        }
    }
    seen.goodput = counted as f64 / (to - from).as_secs_f64();
    seen
}
