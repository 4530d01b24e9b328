//! Signed webhooks, so that another system can be told of a rollout and decide about it.
//!
//! ```text
//! tell ──try_send──▶ queue (≤ queue_max) ──▶ one delivery after the other ─┐
//! ask ─────────────────────────────────────▶ at once, and waited for       ├─▶ POST, signed
//!                                            2xx go · 4xx no · else again ─┘
//! ```
//!
//! The body is a CloudEvent 1.0 in structured mode. The signature is that of Standard Webhooks:
//! `webhook-signature: v1,<base64 of HMAC-SHA256(secret, "{webhook-id}.{webhook-timestamp}.{body}")>`.
//!
//! Invariants:
//! - Nothing waits for whoever is told: what finds no room in the queue is dropped and counted.
//! - A delivery has the same id and the same body however often it is tried.
//! - The secret is read where it is kept each time, and is in no log, error or debug output.
//! - The address is one that the operator wrote: redirects are not followed, and plain HTTP goes to
//!   this machine only.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use reqwest::StatusCode;
use reqwest::header::{CONTENT_TYPE, RETRY_AFTER};
use serde_json::json;
use tokio::sync::mpsc;
use tokio::time::sleep;
use url::{Host, Url};

use super::rollout::controller::{Answering, Callout, Notice};
use super::rollout::{HookAnswer, HookKind, Rollout};
use super::secret::{SecretError, SecretRef};
use crate::observe::page::{Family, Kind};

mod signature;

pub use signature::KeyError;

use signature::Key;

/// Type of an event: this and the hook's word.
pub const TYPE_PREFIX: &str = "dev.tidegate.rollout.";
/// Longest wait between two tries, whatever the receiver asks for.
const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Bytes of an answer that are read for what it says.
const ANSWER_BYTES_MAX: usize = 4096;
/// Characters of what an answer says that are kept.
const SAID_MAX: usize = 200;

/// Where webhooks go, and how hard it is tried.
#[derive(Clone, Debug)]
pub struct Settings {
    pub url: Url,
    pub secret: SecretRef,
    /// Longest wait for an answer, connecting included.
    pub timeout: Duration,
    /// Tries of one delivery, the first included.
    pub attempts_max: u32,
    /// First wait before another try; each further one is twice as long, up to a minute.
    pub backoff: Duration,
    /// Deliveries that wait for the ones before them.
    pub queue_max: usize,
}

/// Reads a receiver's address.
///
/// # Errors
/// What is wrong with it.
pub fn parse_url(text: &str) -> Result<Url, String> {
    let url: Url = text.parse().map_err(|error| format!("'{text}' is no URL: {error}"))?;
    let local = match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    };
    match url.scheme() {
        "https" => {}
        "http" if local => {}
        "http" => return Err("expected https; plain http only goes to this machine".to_owned()),
        other => return Err(format!("expected https, got '{other}'")),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("holds a name or password; requests are signed instead".to_owned());
    }
    Ok(url)
}

#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("the secret {0}")]
    Key(#[from] KeyError),
    #[error("no HTTP client: {0}")]
    Client(#[from] reqwest::Error),
}

/// Asks and tells one receiver.
#[derive(Clone)]
pub struct Hooks {
    queue: mpsc::Sender<Delivery>,
    sender: Arc<Sender>,
}

/// Delivers what is told, until it is dropped.
pub struct Courier {
    queue: mpsc::Receiver<Delivery>,
    sender: Arc<Sender>,
}

struct Sender {
    settings: Settings,
    client: reqwest::Client,
    /// By kind and by how it ended.
    counts: [[AtomicU64; Ended::ALL.len()]; HookKind::ALL.len()],
}

/// How a delivery ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ended {
    /// Answered with 2xx.
    Delivered,
    /// Answered with a 4xx that stands.
    Refused,
    /// Tried as often as may be.
    Failed,
    /// Found no room in the queue.
    Dropped,
}

impl Ended {
    const ALL: [Self; 4] = [Self::Delivered, Self::Refused, Self::Failed, Self::Dropped];

    fn as_str(self) -> &'static str {
        match self {
            Self::Delivered => "delivered",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Dropped => "dropped",
        }
    }
}

/// One event on its way.
struct Delivery {
    id: String,
    kind: HookKind,
    body: Vec<u8>,
}

/// What came of one try.
enum Attempt {
    Go,
    No(String),
    /// Why not yet, and how long the receiver asks to wait.
    Again(String, Option<Duration>),
}

impl Hooks {
    /// # Errors
    /// When the secret cannot be read, or no client can be made.
    pub fn new(settings: Settings) -> Result<(Self, Courier), HookError> {
        key(&settings)?;
        // Whoever comes first installs it; it is the same for all.
        drop(rustls::crypto::ring::default_provider().install_default());
        let mut client = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(settings.timeout)
            .connect_timeout(settings.timeout)
            .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")));
        if settings.url.scheme() == "http" {
            // To this machine, and not through a proxy on the way there.
            client = client.no_proxy();
        }
        let (queue, waiting) = mpsc::channel(settings.queue_max.max(1));
        let client = client.build()?;
        let sender = Arc::new(Sender { settings, client, counts: Default::default() });
        let courier = Courier { queue: waiting, sender: Arc::clone(&sender) };
        Ok((Self { queue, sender }, courier))
    }

    /// For the metrics page.
    pub fn families(&self) -> Vec<Family> {
        let help = "Webhooks, by what came of them";
        let mut family = Family::new(DELIVERIES, Kind::Counter, help);
        for (kind, counts) in HookKind::ALL.iter().zip(&self.sender.counts) {
            for (ended, count) in Ended::ALL.iter().zip(counts) {
                let labels = vec![
                    ("kind".into(), kind.as_str().to_owned()),
                    ("outcome".into(), ended.as_str().to_owned()),
                ];
                family.push(labels, count.load(Ordering::Relaxed) as f64);
            }
        }
        vec![family]
    }
}

const DELIVERIES: &str = "tidegate_hook_deliveries_total";

impl Callout for Hooks {
    fn ask(&self, notice: Notice) -> Answering {
        let sender = Arc::clone(&self.sender);
        Box::pin(async move { sender.deliver(&Delivery::of(&notice)).await })
    }

    fn tell(&self, notice: Notice) {
        let delivery = Delivery::of(&notice);
        if self.queue.try_send(delivery).is_err() {
            self.sender.count(notice.kind, Ended::Dropped);
            tracing::warn!(id = notice.id, "webhook dropped: too many wait");
        }
    }
}

impl Courier {
    /// Delivers one after the other until every [`Hooks`] is gone.
    pub async fn run(mut self) {
        while let Some(delivery) = self.queue.recv().await {
            self.sender.deliver(&delivery).await;
        }
    }
}

impl Sender {
    fn count(&self, kind: HookKind, ended: Ended) {
        let kind = HookKind::ALL.iter().position(|known| *known == kind);
        if let Some(counts) = kind.and_then(|at| self.counts.get(at)) {
            counts[ended as usize].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Tries until it is answered or has been tried often enough.
    async fn deliver(&self, delivery: &Delivery) -> HookAnswer {
        let mut wait = self.settings.backoff;
        let mut attempt = 1;
        loop {
            let (why, asked) = match self.attempt(delivery).await {
                Attempt::Go => {
                    self.count(delivery.kind, Ended::Delivered);
                    return HookAnswer::Go;
                }
                Attempt::No(said) => {
                    self.count(delivery.kind, Ended::Refused);
                    tracing::warn!(id = delivery.id, said, "webhook refused");
                    return HookAnswer::No(said);
                }
                Attempt::Again(why, asked) => (why, asked),
            };
            if attempt >= self.settings.attempts_max {
                self.count(delivery.kind, Ended::Failed);
                tracing::warn!(id = delivery.id, attempt, why, "webhook given up");
                return HookAnswer::None(format!("no answer after {attempt} tries: {why}"));
            }
            tracing::debug!(id = delivery.id, attempt, why, "webhook to be tried again");
            sleep(asked.unwrap_or_else(|| jittered(wait)).min(BACKOFF_MAX)).await;
            wait = (wait * 2).min(BACKOFF_MAX);
            attempt += 1;
        }
    }

    async fn attempt(&self, delivery: &Delivery) -> Attempt {
        let key = match key(&self.settings) {
            Ok(key) => key,
            Err(error) => return Attempt::Again(error.to_string(), None),
        };
        let timestamp = jiff::Timestamp::now().as_second().to_string();
        let signature = key.sign(&delivery.id, &timestamp, &delivery.body);
        let request = self
            .client
            .post(self.settings.url.clone())
            .header(CONTENT_TYPE, "application/cloudevents+json; charset=utf-8")
            .header("webhook-id", &delivery.id)
            .header("webhook-timestamp", timestamp)
            .header("webhook-signature", signature)
            .body(delivery.body.clone());
        let response = match request.send().await {
            Ok(response) => response,
            // The address stays out of what is shown: its path may be a secret.
            Err(error) => return Attempt::Again(causes(&error.without_url()), None),
        };
        let status = response.status();
        if status.is_success() {
            return Attempt::Go;
        }
        let later =
            [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS];
        if !status.is_client_error() || later.contains(&status) {
            let seconds = response.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
            let asked = seconds.and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
            return Attempt::Again(format!("status {}", status.as_u16()), asked);
        }
        let said = said(response).await.map_or_else(String::new, |said| format!(": {said}"));
        Attempt::No(format!("status {}{said}", status.as_u16()))
    }
}

fn key(settings: &Settings) -> Result<Key, HookError> {
    Ok(Key::of(&settings.secret.read()?)?)
}

/// The `reason` of an answer that is JSON and has one.
async fn said(mut response: reqwest::Response) -> Option<String> {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() > ANSWER_BYTES_MAX {
            return None;
        }
    }
    let answer: serde_json::Value = serde_json::from_slice(&body).ok()?;
    let reason = answer.get("reason")?.as_str()?;
    // It goes to logs and terminals.
    Some(reason.chars().filter(|char| !char.is_control()).take(SAID_MAX).collect())
}

/// An error with what is behind it: a client's own text says only that it could not send.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Between half of it and all of it, so that gateways do not come back in step.
fn jittered(wait: Duration) -> Duration {
    let part = getrandom::u32().map_or(1.0, |random| f64::from(random) / f64::from(u32::MAX));
    wait.mul_f64(0.5 + part / 2.0)
}

impl Delivery {
    fn of(notice: &Notice) -> Self {
        let Notice { id, kind, at, rollout } = notice;
        let Rollout { model, .. } = &**rollout;
        let event = json!({
            "specversion": "1.0",
            "id": id,
            "source": "/tidegate",
            "type": format!("{TYPE_PREFIX}{kind}"),
            "subject": format!("models/{model}/rollouts/{}", rollout.id),
            "time": at.to_string(),
            "datacontenttype": "application/json",
            "data": data(rollout),
        });
        Self { id: id.clone(), kind: *kind, body: event.to_string().into_bytes() }
    }
}

/// What is said of a rollout: how it stands and why, not how it came there.
fn data(rollout: &Rollout) -> serde_json::Value {
    json!({
        "model": rollout.model,
        "rollout": rollout.id,
        "candidate": rollout.candidate,
        "stable": rollout.stable,
        "state": rollout.state.as_str(),
        "stage": rollout.state.stage(),
        "weight": rollout.weight,
        "reason": rollout.reason,
        "guards": rollout.guards,
        "dry_run": rollout.plan.dry_run,
        "started_by": rollout.started_by,
        "started_for": rollout.started_for,
    })
}

#[cfg(test)]
mod tests;
