//! Predictions as CloudEvents over HTTP, in the shape that KServe's logger gives them.
//!
//! ```text
//! record ─┬─▶ POST  ce-type org.kubeflow.serving.inference.request   ce-id <prediction>  {inputs}
//!         └─▶ POST  ce-type org.kubeflow.serving.inference.response  ce-id <prediction>  {outputs}
//! ```
//!
//! Records that do not come are one event of a type of our own, [`UNDELIVERED`].
//!
//! What takes those of KServe (drift detectors, explainers, Knative's brokers) takes these. As there,
//! a call that failed has a request and no response, and shadows are not among them.
//!
//! Invariants:
//! - 2xx is taken; 429, 408, 425, 5xx and silence are tried again for as long as it takes; any other
//!   answer is tried `attempts_max` times, then the event is given up and counted.
//! - An event that was taken is not sent again because another of its batch was not.
//! - The address is one that the operator wrote: redirects are not followed.

use std::cell::Cell;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt as _;
use futures_util::future::LocalBoxFuture;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, RETRY_AFTER};
use reqwest::{RequestBuilder, StatusCode};
use url::Url;

use super::stores::is_near;
use super::worker::{Again, Item, Lost, Sent, Sink};
use crate::bucket::chain;
use crate::ledger::export::{self, View};
use crate::secret::{Secret, SecretRef};

/// Type of the event that says which records do not come.
const UNDELIVERED: &str = "dev.tidegate.ledger.undelivered";

/// Where events go, and what is said of where they come from.
#[derive(Clone, Debug)]
pub struct EventsSettings {
    pub url: Url,
    /// Shown as a bearer token.
    pub token: Option<SecretRef>,
    /// Longest wait for an answer.
    pub timeout: Duration,
    /// Tries of an event that is refused.
    pub attempts_max: u32,
    /// Events on their way at once.
    pub in_flight_max: usize,
    pub namespace: String,
    pub component: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Part {
    Request,
    Response,
}

impl Part {
    fn kind(self) -> &'static str {
        match self {
            Self::Request => "org.kubeflow.serving.inference.request",
            Self::Response => "org.kubeflow.serving.inference.response",
        }
    }
}

type Id = (u64, Part);

/// What came of one try.
#[derive(Debug)]
enum Tried {
    Taken,
    Again(Again),
    Refused(String),
}

pub(super) struct Events {
    settings: EventsSettings,
    source: String,
    client: Option<reqwest::Client>,
    /// Of the batch that is being sent: what is done, and how often the rest was refused.
    done: HashSet<Id>,
    refusals: HashMap<Id, u32>,
}

impl Events {
    pub(super) fn new(settings: EventsSettings, writer: &str) -> Self {
        let source = format!("/tidegate/{writer}");
        let (done, refusals) = (HashSet::new(), HashMap::new());
        Self { settings, source, client: None, done, refusals }
    }

    fn client(&mut self) -> Result<reqwest::Client, Again> {
        if let Some(client) = &self.client {
            return Ok(client.clone());
        }
        // Whoever comes first installs it; it is the same for all.
        drop(rustls::crypto::ring::default_provider().install_default());
        let mut builder = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(self.settings.timeout)
            .connect_timeout(self.settings.timeout)
            .pool_max_idle_per_host(self.settings.in_flight_max)
            .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")));
        if is_near(&self.settings.url) {
            // To this machine, and not through a proxy on the way there.
            builder = builder.no_proxy();
        }
        let client = builder.build().map_err(|error| Again::new(chain(&error)))?;
        Ok(self.client.insert(client).clone())
    }

    fn token(&self) -> Result<Option<Secret>, Again> {
        let read = self.settings.token.as_ref().map(SecretRef::read).transpose();
        read.map_err(|error| Again::new(error.to_string()))
    }

    async fn say(&mut self, lost: &Lost) -> Result<(), Again> {
        let (client, token) = (self.client()?, self.token()?);
        let writer = self.source.rsplit('/').next().unwrap_or_default();
        let mut headers = HeaderMap::new();
        let time = export::time(i64::try_from(lost.at_ns).unwrap_or(i64::MAX));
        let id = format!("{writer}-{}-{}", lost.from, lost.to);
        let about = [
            ("ce-specversion", "1.0"),
            ("ce-id", &id),
            ("ce-source", &self.source),
            ("ce-type", UNDELIVERED),
            ("ce-time", &time),
            ("ce-sequence", &lost.from.to_string()),
        ];
        about.into_iter().for_each(|(name, value)| put(&mut headers, name, value));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        let post = client.post(self.settings.url.clone()).headers(headers).body(lost.json(writer));
        match attempt(with_token(post, token.as_ref())).await {
            Tried::Taken => Ok(()),
            Tried::Again(again) => Err(again),
            Tried::Refused(why) => {
                // A receiver of KServe's events need not know this one: it is in the log as well.
                tracing::warn!(sink = "events", why, "the receiver takes no word of what is lost");
                Ok(())
            }
        }
    }

    async fn give(&mut self, batch: &[Item]) -> Result<Sent, Again> {
        let (client, token) = (self.client()?, self.token()?);
        let wanted = batch.iter().filter_map(|item| Some((item, item.view()?)));
        let jobs = wanted.flat_map(|(item, view)| {
            parts(&view).map(move |part| ((item.seq, part), view.clone()))
        });
        let jobs: Vec<_> = jobs.filter(|(id, _)| !self.done.contains(id)).collect();
        let failed = Cell::new(false);
        let (settings, source, failed) = (&self.settings, &self.source, &failed);
        let (client, token) = (&client, &token);
        let tries = jobs.into_iter().map(|(id, view)| async move {
            // The rest would fail as well, each after as long a wait.
            if failed.get() {
                return (id, None);
            }
            let (headers, data) = event(settings, source, id, &view);
            let post = client.post(settings.url.clone()).headers(headers).body(data);
            let tried = attempt(with_token(post, token.as_ref())).await;
            failed.set(failed.get() || matches!(tried, Tried::Again(_)));
            (id, Some(tried))
        });
        let tries = futures_util::stream::iter(tries).buffer_unordered(settings.in_flight_max);
        let tried: Vec<_> = tries.collect().await;
        self.judge(tried)
    }

    fn judge(&mut self, tried: Vec<(Id, Option<Tried>)>) -> Result<Sent, Again> {
        let mut again = None;
        for (id, tried) in tried {
            match tried {
                None => {}
                Some(Tried::Taken) => drop(self.done.insert(id)),
                Some(Tried::Again(why)) => again = Some(why),
                Some(Tried::Refused(why)) => {
                    let refusals = self.refusals.entry(id).or_default();
                    *refusals += 1;
                    if *refusals < self.settings.attempts_max {
                        again.get_or_insert_with(|| Again::new(why));
                        continue;
                    }
                    let (seq, kind) = (id.0, id.1.kind());
                    tracing::error!(sink = "events", seq, kind, why, "event refused, given up");
                    self.done.insert(id);
                }
            }
        }
        if let Some(again) = again {
            return Err(again);
        }
        let most = self.settings.attempts_max;
        let gone = self.refusals.iter().filter(|(_, count)| **count >= most);
        let refused: HashSet<u64> = gone.map(|((seq, _), _)| *seq).collect();
        self.done.clear();
        self.refusals.clear();
        Ok(Sent { refused: refused.len() as u64 })
    }
}

impl Sink for Events {
    fn send<'a>(&'a mut self, batch: &'a [Item]) -> LocalBoxFuture<'a, Result<Sent, Again>> {
        Box::pin(self.give(batch))
    }

    fn tell<'a>(&'a mut self, lost: &'a Lost) -> LocalBoxFuture<'a, Result<(), Again>> {
        Box::pin(self.say(lost))
    }
}

fn with_token(post: RequestBuilder, token: Option<&Secret>) -> RequestBuilder {
    match token {
        Some(token) => post.bearer_auth(token.expose()),
        None => post,
    }
}

/// All of it is made here or checked where it came in; a header that is none is left out.
fn put(headers: &mut HeaderMap, name: &'static str, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(HeaderName::from_static(name), value);
    }
}

/// The events of a record.
fn parts(view: &View<'_>) -> impl Iterator<Item = Part> + use<> {
    let is_one = view.shadow_of.is_empty() && !view.erased;
    let answered = view.status == "ok";
    let request = is_one.then_some(Part::Request);
    request.into_iter().chain((is_one && answered).then_some(Part::Response))
}

/// Headers and data, in binary mode.
fn event(
    settings: &EventsSettings,
    source: &str,
    (seq, part): Id,
    view: &View<'_>,
) -> (HeaderMap, Bytes) {
    let id = uuid::Uuid::from_slice(view.prediction_id).unwrap_or_default().to_string();
    let endpoint = if view.arm == "canary" { "canary" } else { "default" };
    let mut headers = HeaderMap::new();
    let mut put = |name: &'static str, value: &str| put(&mut headers, name, value);
    put("ce-specversion", "1.0");
    put("ce-id", &id);
    put("ce-source", source);
    put("ce-type", part.kind());
    put("ce-time", &export::time(view.time_ns));
    put("ce-inferenceservicename", view.model);
    put("ce-namespace", &settings.namespace);
    put("ce-component", &settings.component);
    put("ce-endpoint", endpoint);
    put("ce-modelversion", &view.version.to_string());
    put("ce-sequence", &seq.to_string());
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    (headers, data(part, &id, view))
}

/// As the Open Inference Protocol has it. A tensor that was not kept has no `data` but what stands
/// for it.
fn data(part: Part, id: &str, view: &View<'_>) -> Bytes {
    let mut out = Vec::new();
    let id = if view.request_id.is_empty() { id } else { view.request_id };
    match part {
        Part::Request => out.extend_from_slice(b"{\"id\":"),
        Part::Response => {
            out.extend_from_slice(b"{\"model_name\":");
            export::json_text(&mut out, view.model);
            out.extend_from_slice(b",\"model_version\":");
            export::json_text(&mut out, &view.version.to_string());
            out.extend_from_slice(b",\"id\":");
        }
    }
    export::json_text(&mut out, id);
    let (name, list): (&[u8], _) = match part {
        Part::Request => (b",\"inputs\":", &view.inputs),
        Part::Response => (b",\"outputs\":", &view.outputs),
    };
    out.extend_from_slice(name);
    export::tensors(&mut out, list, |_| None);
    out.push(b'}');
    out.into()
}

async fn attempt(post: RequestBuilder) -> Tried {
    let response = match post.send().await {
        Ok(response) => response,
        // The address stays out of what is shown: its path may be a secret.
        Err(error) => return Tried::Again(Again::new(chain(&error.without_url()))),
    };
    let status = response.status();
    if status.is_success() {
        return Tried::Taken;
    }
    let why = format!("status {}", status.as_u16());
    let later = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS];
    if !status.is_server_error() && !later.contains(&status) {
        return Tried::Refused(why);
    }
    let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let wait = seconds.and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
    Tried::Again(Again { why, wait })
}
