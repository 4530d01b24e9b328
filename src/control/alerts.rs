//! Alerts: who has to know is told that a model drifts, that its data is odd, or that its labels say it
//! is not good enough any more; and pipelines that train it again are started.
//!
//! ```text
//! monitor, labels ─▶ conditions ─▶ Board of each model ─▶ store, journal ─▶ due tellings ─▶ outbound
//!   (every look)      effect and      fires, resolves       durable first      one at a time for
//!                     evidence                                                 each receiver
//!                                        ▲───────────── how it ended ◀──────────────┘
//! ```
//!
//! Invariants:
//! - One task owns the boards. Nothing on the path of a request, and nothing of the monitor, waits
//!   for it, and it waits for no receiver.
//! - What is told is durable before: a restart tells nobody twice what was told, and goes on with
//!   what was not, by the same id. A telling that was on its way may arrive twice.
//! - What cannot be written down is not told; it is tried again at the next look.
//! - Alerts, receivers, lists and bodies have limits; a condition beyond them is counted.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::{mpsc, oneshot};
use tokio::time::{MissedTickBehavior, interval};
use utoipa::ToSchema;

use super::call::{Call, Refusal};
use super::desk::Pending;
use super::store::{self, EventOutcome, Expect, NewEvent, Put, Store};
use crate::domain::{ModelName, Version};
use crate::feedback::{Feedback, Report};
use crate::monitor::{Monitor, VersionReport};
use crate::observe::page::{Family, Kind as FamilyKind};
use crate::outbound::{self, Answer, Sender};
use crate::panics;
use crate::route::{Published, RouteTable};

pub mod board;
pub mod condition;
pub mod receiver;
#[cfg(test)]
mod tests;

use board::{Alert, Board, Books, Change, Ending, Look, Phase, Progress, Silence, Times};
use condition::{Detail, Found, Kind, Limits, Severity, Subject};
use receiver::{Event, Receiver};

/// Who changes alerts, in the journal.
const ACTOR: &str = "alert-watcher";
/// Alerts that fire at once, of all models.
pub const FIRING_MAX: usize = 1024;
/// Receivers that there may be.
pub const RECEIVERS_MAX: usize = 16;
/// Longest cool-down.
pub const COOLDOWN_MAX: Duration = Duration::from_secs(30 * 86_400);
/// Longest silence.
pub const SILENCE_MAX: Duration = Duration::from_secs(30 * 86_400);
/// Calls of the admin API that wait.
const ASKED_MAX: usize = 16;
/// Rows of the journal that wait to be written, of one model; the oldest go.
const EVENTS_MAX: usize = store::COMMIT_ITEMS_MAX;

#[derive(Clone, Debug)]
pub struct Settings {
    pub enabled: bool,
    /// How often conditions are looked at.
    pub interval: Duration,
    pub times: Times,
    pub limits: Limits,
    pub receivers: Vec<Receiver>,
    pub outbound: outbound::Settings,
}

/// What alerts see of the gateway.
pub trait Sight: Send + Sync {
    /// Models and versions that can be asked.
    fn served(&self) -> BTreeMap<ModelName, Vec<Version>>;

    /// As they were judged last.
    fn rows(&self, model: &ModelName) -> Vec<Arc<VersionReport>>;

    /// Of the last so many days.
    fn labels(&self, model: &ModelName, days: Option<u32>) -> Report;
}

/// The gateway itself.
pub struct Gateway {
    pub table: Arc<Published<RouteTable>>,
    pub monitor: Option<Arc<Monitor>>,
    pub feedback: Arc<Feedback>,
}

impl Sight for Gateway {
    fn served(&self) -> BTreeMap<ModelName, Vec<Version>> {
        let table = self.table.snapshot();
        let models = table.models.iter();
        models.map(|(model, of)| (model.clone(), of.versions.keys().copied().collect())).collect()
    }

    fn rows(&self, model: &ModelName) -> Vec<Arc<VersionReport>> {
        self.monitor.as_ref().map(|monitor| monitor.reports(model)).unwrap_or_default()
    }

    fn labels(&self, model: &ModelName, days: Option<u32>) -> Report {
        self.feedback.report(model, days)
    }
}

/// Writes documents and the journal in one transaction.
pub type Keep = Box<dyn Fn(Vec<Put>, Vec<NewEvent>) -> Pending<'static, ()> + Send + Sync>;

/// Alerts of all models that the caller may see, who is told, and what is silent.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AlertsView {
    /// Those that fire, then those that are over, the newest first.
    pub alerts: Vec<Alert>,
    /// By model.
    pub silences: BTreeMap<String, Silence>,
    pub receivers: Vec<ReceiverView>,
}

/// Who is told; where and with which secret is in the configuration only.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = AlertReceiver)]
pub struct ReceiverView {
    pub name: String,
    /// `cloudevents`, `github`, `gitlab`, `jenkins` or `kubeflow`.
    pub kind: &'static str,
    /// Patterns; none: all models.
    pub models: Vec<String>,
    pub kinds: Vec<Kind>,
    pub severity_min: Severity,
    pub resolved: bool,
    #[schema(minimum = 0)]
    pub repeat_s: u64,
    #[schema(minimum = 0)]
    pub cooldown_s: u64,
}

/// What became of a test.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[schema(as = AlertTest)]
pub struct TestView {
    pub receiver: String,
    /// Id of the event.
    pub event: String,
    /// `delivered`, `refused` or `failed`.
    pub outcome: Progress,
    pub detail: Option<String>,
}

/// What handles and the task share.
struct Shared {
    receivers: Vec<Receiver>,
    /// Guards what is shown, for as long as it is read or replaced.
    shown: Mutex<BTreeMap<ModelName, Books>>,
    /// By receiver and by how it ended: delivered, refused, failed.
    counts: Vec<[AtomicU64; ENDED.len()]>,
    /// By kind.
    fired: [AtomicU64; Kind::ALL.len()],
    without_room: AtomicUsize,
}

const ENDED: [(Progress, &str); 3] = [
    (Progress::Delivered, "delivered"),
    (Progress::Refused, "refused"),
    (Progress::Failed, "failed"),
];

enum Asked {
    Test {
        receiver: String,
        reply: oneshot::Sender<Result<TestView, Refusal>>,
    },
    Silence {
        model: ModelName,
        silence: Option<Silence>,
        call: Call,
        reply: oneshot::Sender<Result<(), Refusal>>,
    },
}

/// Reaches the alerts. Cheap to clone.
#[derive(Clone)]
pub struct Alerts {
    shared: Arc<Shared>,
    asked: mpsc::Sender<Asked>,
}

impl Alerts {
    /// Of the models that `sees` lets through.
    pub fn view(&self, sees: impl Fn(&ModelName) -> bool) -> AlertsView {
        let shown = self.shared.shown.lock();
        let books = || shown.iter().filter(|(model, _)| sees(model));
        let mut alerts: Vec<Alert> = books().flat_map(|(_, of)| of.alerts.clone()).collect();
        let silences =
            books().filter_map(|(model, of)| Some((model.to_string(), of.silence.clone()?)));
        let silences = silences.collect();
        drop(shown);
        alerts.sort_by_key(|alert| {
            let at = alert.resolved_at.unwrap_or(alert.fired_at);
            (alert.resolved_at.is_some(), std::cmp::Reverse(at))
        });
        let receivers = self.shared.receivers.iter().map(ReceiverView::of).collect();
        AlertsView { alerts, silences, receivers }
    }

    /// Whether there is such a receiver.
    pub fn knows(&self, receiver: &str) -> bool {
        self.shared.receivers.iter().any(|known| known.name == receiver)
    }

    /// Sends a receiver an event that says that it is a test, once.
    ///
    /// # Errors
    /// `NotFound` for a receiver that there is not.
    pub async fn test(&self, receiver: &str) -> Result<TestView, Refusal> {
        let receiver = receiver.to_owned();
        self.ask(|reply| Asked::Test { receiver, reply }).await
    }

    /// Tells nobody of a model's alerts for a while, or again.
    ///
    /// # Errors
    /// `NotFound` for an end of none; when it cannot be made durable.
    pub async fn silence(
        &self,
        model: &ModelName,
        silence: Option<Silence>,
        call: Call,
    ) -> Result<(), Refusal> {
        let model = model.clone();
        self.ask(|reply| Asked::Silence { model, silence, call, reply }).await
    }

    async fn ask<T>(
        &self,
        asked: impl FnOnce(oneshot::Sender<Result<T, Refusal>>) -> Asked,
    ) -> Result<T, Refusal> {
        let (reply, answer) = oneshot::channel();
        let busy = |_| Refusal::Unavailable("alerts are being asked as much as may be".to_owned());
        self.asked.try_send(asked(reply)).map_err(busy)?;
        let gone = |_| Refusal::Unavailable("the gateway stops".to_owned());
        answer.await.map_err(gone)?
    }

    /// For the metrics page.
    pub fn families(&self) -> Vec<Family> {
        let shared = &self.shared;
        let mut firing = Family::new(FIRING, FamilyKind::Gauge, "Alerts that fire");
        let mut count: BTreeMap<[String; 4], u32> = BTreeMap::new();
        for alert in shared.shown.lock().values().flat_map(|of| &of.alerts) {
            if alert.resolved_at.is_none() {
                let (model, version) = (alert.model.to_string(), alert.version.to_string());
                let series = [model, version, alert.arm.clone(), alert.kind.to_string()];
                *count.entry(series).or_default() += 1;
            }
        }
        for (series, count) in count {
            let names = ["model", "version", "arm", "kind"].map(Into::into);
            firing.push(names.into_iter().zip(series).collect(), f64::from(count));
        }
        let mut fired = Family::new(FIRED, FamilyKind::Counter, "Alerts that have fired");
        for (kind, count) in Kind::ALL.iter().zip(&shared.fired) {
            let labels = vec![("kind".into(), kind.to_string())];
            fired.push(labels, count.load(Ordering::Relaxed) as f64);
        }
        let mut room =
            Family::new(WITHOUT_ROOM, FamilyKind::Gauge, "Conditions that no alert had room for");
        room.push(Vec::new(), shared.without_room.load(Ordering::Relaxed) as f64);
        let help = "Tellings of alerts, by what came of them";
        let mut deliveries = Family::new(DELIVERIES, FamilyKind::Counter, help);
        for (receiver, counts) in shared.receivers.iter().zip(&shared.counts) {
            for ((_, word), count) in ENDED.iter().zip(counts) {
                let labels = vec![
                    ("receiver".into(), receiver.name.clone()),
                    ("outcome".into(), (*word).to_owned()),
                ];
                deliveries.push(labels, count.load(Ordering::Relaxed) as f64);
            }
        }
        vec![firing, fired, room, deliveries]
    }
}

const FIRING: &str = "tidegate_alerts_firing";
const FIRED: &str = "tidegate_alerts_fired_total";
const WITHOUT_ROOM: &str = "tidegate_alerts_without_room";
const DELIVERIES: &str = "tidegate_alert_deliveries_total";

impl ReceiverView {
    fn of(receiver: &Receiver) -> Self {
        Self {
            name: receiver.name.clone(),
            kind: receiver.target.kind(),
            models: receiver.models.as_ref().map(|of| of.texts().to_vec()).unwrap_or_default(),
            kinds: receiver.kinds.clone(),
            severity_min: receiver.severity_min,
            resolved: receiver.resolved,
            repeat_s: receiver.repeat.as_secs(),
            cooldown_s: receiver.cooldown.as_secs(),
        }
    }
}

/// Looks, decides, remembers and tells.
pub struct Watcher {
    settings: Settings,
    sight: Box<dyn Sight>,
    keep: Keep,
    shared: Arc<Shared>,
    asked: mpsc::Receiver<Asked>,
    senders: Vec<Arc<Sender>>,
    boards: BTreeMap<ModelName, Board>,
    /// Models whose document has changed since it was written, with rows of the journal.
    unwritten: BTreeMap<ModelName, Vec<NewEvent>>,
    /// Whether each receiver is being told something.
    busy: Vec<bool>,
    ending: mpsc::Sender<(ModelName, Ending)>,
    ended: mpsc::Receiver<(ModelName, Ending)>,
    started: Timestamp,
}

impl Watcher {
    /// Takes up what was remembered.
    ///
    /// # Errors
    /// When there can be no HTTP client, or the store cannot be read.
    pub fn new(
        settings: Settings,
        sight: Box<dyn Sight>,
        store: &dyn Store,
        keep: Keep,
    ) -> anyhow::Result<(Alerts, Self)> {
        let receivers = settings.receivers.clone();
        let senders: Result<Vec<_>, _> = receivers
            .iter()
            .map(|one| Sender::new(one.target.url(), settings.outbound.clone()).map(Arc::new))
            .collect();
        let (asking, asked) = mpsc::channel(ASKED_MAX);
        let (ending, ended) = mpsc::channel(RECEIVERS_MAX);
        let shared = Arc::new(Shared {
            counts: receivers.iter().map(|_| Default::default()).collect(),
            receivers,
            shown: Mutex::default(),
            fired: Default::default(),
            without_room: AtomicUsize::new(0),
        });
        let mut watcher = Self {
            busy: vec![false; shared.receivers.len()],
            senders: senders?,
            settings,
            sight,
            keep,
            shared: Arc::clone(&shared),
            asked,
            boards: read(store)?,
            unwritten: BTreeMap::new(),
            ending,
            ended,
            started: Timestamp::now(),
        };
        for (model, board) in &mut watcher.boards {
            if board.without(&shared.receivers, watcher.started) {
                watcher.unwritten.entry(model.clone()).or_default();
            }
        }
        watcher.show_all();
        Ok((Alerts { shared, asked: asking }, watcher))
    }

    /// Until `stop` is there; what is on its way then is told again after the next start.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut tick = interval(self.settings.interval);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tokio::pin!(stop);
        loop {
            tokio::select! {
                () = &mut stop => break,
                _ = tick.tick() => self.look(Timestamp::now()),
                Some((model, ending)) = self.ended.recv() => self.finish(&model, ending),
                Some(asked) = self.asked.recv() => self.answer(asked).await,
            }
            self.write().await;
            self.tell();
        }
        self.write().await;
    }

    fn look(&mut self, now: Timestamp) {
        let served = self.sight.served();
        let mut models: Vec<ModelName> = served.keys().cloned().collect();
        models.extend(self.boards.keys().filter(|model| !served.contains_key(*model)).cloned());
        let firing: usize = self.boards.values().map(|board| board.firing().count()).sum();
        let (mut room, mut without_room) = (FIRING_MAX.saturating_sub(firing), 0);
        for model in models {
            let versions = served.get(&model).map(Vec::as_slice).unwrap_or_default();
            let found = self.found(&model, versions);
            let times = self.settings.times;
            let look = Look { times, now, started: self.started, room };
            let board = self.boards.entry(model.clone()).or_default();
            let seen = board.look(&model, &found, &self.shared.receivers, &look);
            let planned = board.plan(&self.shared.receivers, now);
            without_room += seen.without_room;
            room = room.saturating_sub(fired(&seen.changes));
            if planned || seen.forgot || !seen.changes.is_empty() {
                let events = seen.changes.iter().map(|change| self.event(change)).collect();
                self.note(&model, events);
            }
        }
        self.boards.retain(|model, board| !board.is_empty() || self.unwritten.contains_key(model));
        self.shared.without_room.store(without_room, Ordering::Relaxed);
        self.show_all();
    }

    fn found(&self, model: &ModelName, versions: &[Version]) -> BTreeMap<Subject, Found> {
        let limits = &self.settings.limits;
        let mut found = condition::of_rows(&self.sight.rows(model), limits);
        let labels = |days| self.sight.labels(model, days);
        found.extend(condition::of_labels(model, limits, labels));
        found.retain(|subject, _| versions.contains(&subject.version));
        found
    }

    /// The journal's row of a change.
    fn event(&self, change: &Change) -> NewEvent {
        let (alert, action, reason) = match change {
            Change::Fired(alert) => {
                tracing::warn!(model = %alert.model, alert = alert.id, "alert fires: {}", alert.summary);
                let at = Kind::ALL.iter().position(|kind| *kind == alert.kind);
                if let Some(count) = at.and_then(|at| self.shared.fired.get(at)) {
                    count.fetch_add(1, Ordering::Relaxed);
                }
                (alert, "alert.fire", alert.summary.clone())
            }
            Change::Resolved(alert) => {
                let why = alert.resolution.clone().unwrap_or_default();
                tracing::info!(model = %alert.model, alert = alert.id, "alert is over: {why}");
                (alert, "alert.resolve", why)
            }
        };
        NewEvent {
            after: serde_json::to_value(Alert { deliveries: BTreeMap::new(), ..alert.clone() })
                .ok(),
            reason: Some(reason),
            ..row(action, &alert.model, &alert.id)
        }
    }

    /// The model's document has changed, by these rows of the journal.
    fn note(&mut self, model: &ModelName, events: Vec<NewEvent>) {
        let unwritten = self.unwritten.entry(model.clone()).or_default();
        unwritten.extend(events);
        let over = unwritten.len().saturating_sub(EVENTS_MAX);
        if over > 0 {
            tracing::error!(%model, over, "changes of alerts are lost to the journal");
            unwritten.drain(..over);
        }
    }

    /// Makes what changed durable; what cannot be is tried again the next time.
    async fn write(&mut self) {
        for model in self.unwritten.keys().cloned().collect::<Vec<_>>() {
            let books = self.boards.get(&model).map(|board| &board.books);
            let books = books.filter(|books| **books != Books::default());
            let put = Put {
                kind: store::Kind::Alert,
                name: model.to_string(),
                body: books.and_then(|books| serde_json::to_value(books).ok()),
                expect: Expect::Any,
            };
            let events = self.unwritten.get(&model).cloned().unwrap_or_default();
            match (self.keep)(vec![put], events).await {
                Ok(()) => drop(self.unwritten.remove(&model)),
                Err(refusal) => {
                    tracing::error!(%refusal, %model, "alerts are not kept, and so not told");
                }
            }
            self.show(&model);
        }
    }

    /// Begins what is durable and due, one telling at a time for each receiver.
    fn tell(&mut self) {
        for (at, receiver) in self.shared.receivers.iter().enumerate() {
            if self.busy.get(at).copied().unwrap_or(true) {
                continue;
            }
            let durable =
                self.boards.iter().filter(|(model, _)| !self.unwritten.contains_key(*model));
            let next =
                durable.filter_map(|(model, board)| Some((model, board.next(&receiver.name)?)));
            let next = next.min_by_key(|(_, (alert, phase, _))| match phase {
                Phase::Firing => alert.fired_at,
                Phase::Resolved => alert.resolved_at.unwrap_or(alert.fired_at),
            });
            let (Some((model, (alert, phase, number))), Some(sender)) =
                (next, self.senders.get(at))
            else {
                continue;
            };
            self.busy[at] = true;
            let event = Event::of(alert, phase, number);
            let (model, alert) = (model.clone(), alert.id.clone());
            let (sender, receiver) = (Arc::clone(sender), receiver.clone());
            let ended = self.ending.clone();
            tokio::spawn(async move {
                let request = |client: &reqwest::Client| receiver.request(client, &event);
                let told = panics::caught_async(sender.deliver(&event.id, request)).await;
                let (state, detail) = progress(told);
                let ending =
                    Ending { alert, receiver: receiver.name.clone(), phase, state, detail };
                // Nobody is there to hear at the end: it is told again after the next start.
                drop(ended.send((model, ending)).await);
            });
        }
    }

    fn finish(&mut self, model: &ModelName, ending: Ending) {
        let known = self.shared.receivers.iter().position(|one| one.name == ending.receiver);
        let Some(at) = known else { return };
        self.busy[at] = false;
        self.count(at, ending.state);
        let Some(board) = self.boards.get_mut(model) else { return };
        if !board.ended(&ending, Timestamp::now()) {
            return;
        }
        let Ending { alert, receiver, phase, state, detail } = ending;
        let word = if phase == Phase::Firing { "firing" } else { "resolved" };
        let outcome = match state {
            Progress::Delivered => EventOutcome::Done,
            _ => EventOutcome::Refused,
        };
        let event = NewEvent {
            reason: Some(format!("{word}, to receiver '{receiver}'")),
            outcome,
            detail,
            ..row("alert.tell", model, &alert)
        };
        self.note(model, vec![event]);
    }

    fn count(&self, receiver: usize, state: Progress) {
        let at = ENDED.iter().position(|(ended, _)| *ended == state);
        let counts = self.shared.counts.get(receiver);
        if let (Some(at), Some(counts)) = (at, counts) {
            counts[at].fetch_add(1, Ordering::Relaxed);
        }
    }

    async fn answer(&mut self, asked: Asked) {
        match asked {
            Asked::Test { receiver, reply } => self.test(&receiver, reply),
            Asked::Silence { model, silence, call, reply } => {
                let done = self.silence(&model, silence, &call).await;
                // Whoever asked may be gone.
                drop(reply.send(done));
            }
        }
    }

    fn test(&self, name: &str, reply: oneshot::Sender<Result<TestView, Refusal>>) {
        let known = self.shared.receivers.iter().position(|one| one.name == name);
        let found =
            known.and_then(|at| Some((self.shared.receivers.get(at)?, self.senders.get(at)?)));
        let Some((receiver, sender)) = found else {
            let refusal = Refusal::NotFound(format!("receiver '{name}' is not configured"));
            return drop(reply.send(Err(refusal)));
        };
        let (receiver, sender) = (receiver.clone(), Arc::clone(sender));
        tokio::spawn(async move {
            let event = example();
            let request = |client: &reqwest::Client| receiver.request(client, &event);
            let told = panics::caught_async(sender.deliver_once(&event.id, request)).await;
            let (outcome, detail) = progress(told);
            let view = TestView {
                receiver: receiver.name.clone(),
                event: event.id.clone(),
                outcome,
                detail,
            };
            drop(reply.send(Ok(view)));
        });
    }

    /// In force when it is durable.
    async fn silence(
        &mut self,
        model: &ModelName,
        silence: Option<Silence>,
        call: &Call,
    ) -> Result<(), Refusal> {
        let board = self.boards.entry(model.clone()).or_default();
        if silence.is_none() && board.books.silence.is_none() {
            return Err(Refusal::NotFound(format!("model '{model}' is not silent")));
        }
        let before = std::mem::replace(&mut board.books.silence, silence.clone());
        let json = |silence: &Option<Silence>| serde_json::to_value(silence.as_ref()?).ok();
        let action = if silence.is_some() { "silence.put" } else { "silence.delete" };
        let event = NewEvent {
            actor: call.actor.clone(),
            before: json(&before),
            after: json(&silence),
            reason: call.reason.clone(),
            request_id: call.request_id.clone(),
            ..row(action, model, model.as_str())
        };
        self.note(model, vec![event]);
        self.write().await;
        if self.unwritten.contains_key(model) {
            if let Some(board) = self.boards.get_mut(model) {
                board.books.silence = before;
            }
            if let Some(events) = self.unwritten.get_mut(model) {
                events.pop();
            }
            return Err(Refusal::Unavailable("the state cannot be written".to_owned()));
        }
        Ok(())
    }

    fn show(&self, model: &ModelName) {
        let mut shown = self.shared.shown.lock();
        match self.boards.get(model) {
            Some(board) => drop(shown.insert(model.clone(), board.books.clone())),
            None => drop(shown.remove(model)),
        }
    }

    fn show_all(&self) {
        let boards = self.boards.iter();
        let all = boards.map(|(model, board)| (model.clone(), board.books.clone())).collect();
        *self.shared.shown.lock() = all;
    }
}

fn row(action: &str, model: &ModelName, subject: &str) -> NewEvent {
    NewEvent {
        actor: ACTOR.to_owned(),
        action: action.to_owned(),
        model: Some(model.clone()),
        subject: subject.to_owned(),
        ..NewEvent::default()
    }
}

fn fired(changes: &[Change]) -> usize {
    changes.iter().filter(|change| matches!(change, Change::Fired(_))).count()
}

fn progress(told: Option<Answer>) -> (Progress, Option<String>) {
    match told {
        Some(Answer::Yes(made)) => (Progress::Delivered, made),
        Some(Answer::No(said)) => (Progress::Refused, Some(said)),
        Some(Answer::None(why)) => (Progress::Failed, Some(why)),
        None => (Progress::Failed, Some("the gateway failed at this".to_owned())),
    }
}

fn read(store: &dyn Store) -> Result<BTreeMap<ModelName, Board>, store::StoreError> {
    let mut boards = BTreeMap::new();
    for document in store.documents(store::Kind::Alert)? {
        let books = serde_json::from_value::<Books>(document.body);
        match (document.name.parse::<ModelName>(), books) {
            (Ok(model), Ok(books)) => drop(boards.insert(model, Board::of(books))),
            (_, Err(error)) => {
                tracing::error!(%error, model = document.name, "alerts cannot be read, and begin anew");
            }
            (Err(error), _) => tracing::error!(%error, "alerts of no model"),
        }
    }
    Ok(boards)
}

/// An event that is a test: of no model that there is.
fn example() -> Event {
    let now = Timestamp::now();
    let model: ModelName = "test".parse().expect("a name");
    let alert = Alert {
        id: uuid::Uuid::now_v7().to_string(),
        model,
        version: Version::new(1).expect("a number"),
        arm: condition::ALL_ARMS.to_owned(),
        kind: Kind::Drift,
        about: "test".to_owned(),
        severity: Severity::Info,
        state: board::State::Firing,
        summary: "a test of this receiver: nothing is wrong".to_owned(),
        since: now,
        fired_at: now,
        resolved_at: None,
        resolution: None,
        detail: Detail::default(),
        deliveries: BTreeMap::new(),
    };
    Event { id: format!("{}-test", alert.id), word: "test", at: now, number: 0, alert }
}
