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
//! - Where it may go, and that the secret is shown nowhere: see [`crate::outbound`], which sends.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use reqwest::header::CONTENT_TYPE;
use serde_json::json;
use tokio::sync::mpsc;
use url::Url;

use super::rollout::controller::{Answering, Callout, Notice};
use super::rollout::{HookAnswer, HookKind, Rollout};
use super::secret::{Secret, SecretRef};
use crate::observe::page::{Family, Kind};
use crate::outbound::{self, Answer, Key, RequestError};

/// Type of an event: this and the hook's word.
pub const TYPE_PREFIX: &str = "dev.tidegate.rollout.";

/// Where webhooks go, and how hard it is tried.
#[derive(Clone, Debug)]
pub struct Settings {
    pub url: Url,
    pub secret: SecretRef,
    pub outbound: outbound::Settings,
    /// Deliveries that wait for the ones before them.
    pub queue_max: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error(transparent)]
    Request(#[from] RequestError),
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
    outbound: outbound::Sender,
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

impl Hooks {
    /// # Errors
    /// When the secret cannot be read, or no client can be made.
    pub fn new(settings: Settings) -> Result<(Self, Courier), HookError> {
        key(&settings)?;
        let outbound = outbound::Sender::new(&settings.url, settings.outbound.clone())?;
        let (queue, waiting) = mpsc::channel(settings.queue_max.max(1));
        let sender = Arc::new(Sender { settings, outbound, counts: Default::default() });
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
        let request = |client: &reqwest::Client| {
            let (secret, key) = key(&self.settings)?;
            let request = client
                .post(self.settings.url.clone())
                .header(CONTENT_TYPE, "application/cloudevents+json; charset=utf-8");
            let body = delivery.body.clone();
            Ok((outbound::signed(request, &key, &delivery.id, body), secret))
        };
        let (ended, answer) = match self.outbound.deliver(&delivery.id, request).await {
            Answer::Yes(_) => (Ended::Delivered, HookAnswer::Go),
            Answer::No(said) => (Ended::Refused, HookAnswer::No(said)),
            Answer::None(why) => (Ended::Failed, HookAnswer::None(why)),
        };
        self.count(delivery.kind, ended);
        answer
    }
}

fn key(settings: &Settings) -> Result<(Secret, Key), RequestError> {
    let secret = settings.secret.read()?;
    let key = Key::of(&secret)?;
    Ok((secret, key))
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
