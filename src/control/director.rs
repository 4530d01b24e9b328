//! The one who decides: every change of versions, labels, traffic, rollouts and approvals.
//!
//! ```text
//! admin call ──▶ check ──▶ store (one transaction, journal in it) ──▶ Switchboard ──▶ answer
//! registry, rollout controller ──▶ the same way, as actors
//! ```
//!
//! Invariants:
//! - One change at a time; each is durable, then in force, then answered. A rollback is in force
//!   first, then durable, then answered.
//! - A refused change changes nothing and is in the journal.
//! - A change that has begun is carried to its end when its caller goes away.
//! - The request path never waits for anything here: it reads the table.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::{Mutex, RwLock};
use serde::Serialize;
use serde_json::Value;
use tokio::sync::{Notify, broadcast};

use super::call::{Call, REASON_LEN_MAX, Refusal};
use super::desk::Pending;
use super::registry::Registry;
use super::rollout::controller::Handle;
use super::store::{Document, Event, EventOutcome, Kind, NewEvent, Put, Store};
use super::switchboard::{InForce, Switchboard};
use crate::domain::{Label, ModelName, Version};
use crate::feedback::Feedback;
use crate::monitor::Monitor;
use crate::observe::Observer;
use crate::shadow::Shadows;

mod approvals;
mod books;
mod desk;
mod labels;
mod overseer;
mod rollouts;
mod traffic;
mod versions;
mod views;
mod watch;

use books::{Books, Doc};
use versions::Hands;

/// Events that a reader of the feed may lag behind; then it is told and reads the journal.
const EVENTS_MAX: usize = 1024;

/// What the operator demands of releases.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Every change needs a reason.
    pub reason_required: bool,
    /// Approvals that a version needs before it may take traffic.
    pub approvals_required: usize,
    /// How long an approval counts.
    pub approval_age_max: Duration,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            reason_required: false,
            approvals_required: 0,
            approval_age_max: Duration::from_secs(30 * 24 * 3600),
        }
    }
}

/// Decides, remembers, and puts in force.
pub struct Director {
    inner: Arc<Inner>,
}

struct Inner {
    store: Arc<dyn Store>,
    registry: Arc<Registry>,
    board: Arc<Switchboard>,
    policy: Policy,
    /// Held during a change: one at a time.
    writing: Mutex<()>,
    /// Guards the copy of what the store holds; held for moments only.
    books: RwLock<BTreeMap<ModelName, Books>>,
    /// What operators are loading and unloading now; held for moments only.
    hands: Mutex<Hands>,
    events: broadcast::Sender<Arc<Event>>,
    /// Somebody says that the source has something new.
    hint: Notify,
    observer: Arc<Observer>,
    /// The loop that looks at rollouts, once it is there.
    rollouts: OnceLock<Handle>,
    /// What runs on copies of requests, once it is there.
    shadows: OnceLock<Arc<Shadows>>,
    /// None as long as nobody counts labels.
    feedback: OnceLock<Arc<Feedback>>,
    /// None as long as nobody watches rows.
    monitor: OnceLock<Arc<Monitor>>,
}

/// A change that was decided and not yet made.
struct Decided<'a> {
    action: &'a str,
    model: Option<&'a ModelName>,
    subject: String,
    before: Value,
    after: Value,
    puts: Vec<Put>,
}

impl Director {
    /// Reads what was decided before, and takes charge of `registry`'s versions.
    ///
    /// # Errors
    /// When the store cannot be read.
    pub fn open(
        store: Arc<dyn Store>,
        registry: Arc<Registry>,
        board: Arc<Switchboard>,
        observer: Arc<Observer>,
        policy: Policy,
    ) -> Result<Self, Refusal> {
        let books = books::read_all(&*store)?;
        for (model, books) in &books {
            board.set_labels(model, labels_of(books));
            if let Some(traffic) = &books.traffic.body.traffic {
                let salt = books.traffic.body.salt;
                board.set_traffic(model, Some(InForce { traffic: traffic.clone(), salt }));
            }
        }
        let (events, _) = broadcast::channel(EVENTS_MAX);
        let inner = Arc::new(Inner {
            store,
            registry: Arc::clone(&registry),
            board,
            policy,
            writing: Mutex::default(),
            books: RwLock::new(books),
            hands: Mutex::default(),
            events,
            hint: Notify::new(),
            observer,
            rollouts: OnceLock::new(),
            shadows: OnceLock::new(),
            feedback: OnceLock::new(),
            monitor: OnceLock::new(),
        });
        let overseer: Arc<Inner> = Arc::clone(&inner);
        registry.set_overseer(overseer);
        Ok(Self { inner })
    }

    /// Says what runs on copies of requests. Later calls have no effect.
    pub fn set_shadows(&self, shadows: Arc<Shadows>) {
        drop(self.inner.shadows.set(shadows));
    }

    /// Says where labels of predictions are counted. Later calls have no effect.
    pub fn set_feedback(&self, feedback: Arc<Feedback>) {
        drop(self.inner.feedback.set(feedback));
    }

    /// Says who watches rows. Later calls have no effect.
    pub fn set_monitor(&self, monitor: Arc<Monitor>) {
        drop(self.inner.monitor.set(monitor));
    }

    /// Journals a call that something else carries out.
    ///
    /// # Errors
    /// When it cannot be made durable, or lacks a reason.
    pub async fn journal_call(
        &self,
        action: &'static str,
        subject: &'static str,
        call: Call,
    ) -> Result<(), Refusal> {
        let noted = self.inner.run(move |inner| {
            inner.alone(action, None, subject, &call, || {
                inner.append(&[inner.event(action, None, subject, &call)])
            })
        });
        noted.await
    }

    /// Writes what alerts remember, and the journal of it, in one transaction.
    pub fn keep_alerts(&self, puts: Vec<Put>, events: Vec<NewEvent>) -> Pending<'static, ()> {
        self.inner.run(move |inner| {
            let _one = inner.writing.lock();
            let committed = inner.store.commit(&puts, &events).map_err(books::internal)?;
            inner.tell(committed.events);
            Ok(())
        })
    }

    /// Journals something of the gateway itself: its start, its end.
    pub async fn note(&self, action: &'static str, reason: String) {
        let noted = self.inner.run(move |inner| {
            let event = inner.event(action, None, "gateway", &Call::own("gateway", reason));
            inner.append(&[event])
        });
        if let Err(refusal) = noted.await {
            tracing::error!(%refusal, action, "not journalled");
        }
    }
}

impl Inner {
    /// Runs `work` where it may wait for the disk; it is finished even when the caller goes away.
    fn run<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>) -> Result<T, Refusal> + Send + 'static,
    ) -> Pending<'static, T> {
        let inner = Arc::clone(self);
        let task = tokio::task::spawn_blocking(move || work(&inner));
        Box::pin(async move {
            task.await.unwrap_or_else(|error| {
                tracing::error!(%error, "a change ended without a result");
                Err(Refusal::Internal("the change ended without a result".to_owned()))
            })
        })
    }

    /// Makes one change, alone; journals it when it is refused.
    fn alone<T>(
        &self,
        action: &str,
        model: Option<&ModelName>,
        subject: &str,
        call: &Call,
        work: impl FnOnce() -> Result<T, Refusal>,
    ) -> Result<T, Refusal> {
        let _one = self.writing.lock();
        let done = self.check_reason(call).and_then(|()| work());
        if let Err(refusal) = &done {
            self.journal_refused(action, model, subject, call, &refusal.to_string());
        }
        done
    }

    /// Makes what was decided durable; gives the documents as they are now.
    fn commit(&self, decided: Decided<'_>, call: &Call) -> Result<Vec<Document>, Refusal> {
        let event = NewEvent {
            before: Some(decided.before).filter(|value| !value.is_null()),
            after: Some(decided.after).filter(|value| !value.is_null()),
            ..self.event(decided.action, decided.model, &decided.subject, call)
        };
        let committed = self.store.commit(&decided.puts, &[event]).map_err(books::internal)?;
        self.tell(committed.events);
        Ok(committed.documents)
    }

    fn append(&self, events: &[NewEvent]) -> Result<(), Refusal> {
        let committed = self.store.commit(&[], events).map_err(books::internal)?;
        self.tell(committed.events);
        Ok(())
    }

    fn tell(&self, events: Vec<Event>) {
        for event in events {
            // Nobody may be listening.
            drop(self.events.send(Arc::new(event)));
        }
    }

    fn event(
        &self,
        action: &str,
        model: Option<&ModelName>,
        subject: &str,
        call: &Call,
    ) -> NewEvent {
        NewEvent {
            actor: call.actor.clone(),
            action: action.to_owned(),
            model: model.cloned(),
            subject: subject.to_owned(),
            outcome: EventOutcome::Done,
            before: None,
            after: None,
            reason: call.reason.clone(),
            request_id: call.request_id.clone(),
            detail: None,
        }
    }

    fn journal_refused(
        &self,
        action: &str,
        model: Option<&ModelName>,
        subject: &str,
        call: &Call,
        detail: &str,
    ) {
        let event = NewEvent {
            outcome: EventOutcome::Refused,
            detail: Some(detail.to_owned()),
            ..self.event(action, model, subject, call)
        };
        if let Err(refusal) = self.append(&[event]) {
            tracing::error!(%refusal, action, subject, detail, "a refused change is not journalled");
        }
    }

    fn check_reason(&self, call: &Call) -> Result<(), Refusal> {
        match call.reason.as_deref().map(str::trim) {
            Some("") | None if self.policy.reason_required => Err(Refusal::NeedsReason),
            Some(reason) if reason.len() > REASON_LEN_MAX => {
                let got = reason.len();
                Err(Refusal::Invalid(vec![format!(
                    "reason: expected at most {REASON_LEN_MAX} bytes, got {got}"
                )]))
            }
            _ => Ok(()),
        }
    }

    /// A copy of what was decided of a model; empty when nothing was.
    fn books(&self, model: &ModelName) -> Books {
        self.books.read().get(model).cloned().unwrap_or_default()
    }

    fn with_books<T>(&self, model: &ModelName, change: impl FnOnce(&mut Books) -> T) -> T {
        change(self.books.write().entry(model.clone()).or_default())
    }

    /// # Errors
    /// `NotFound` for a model that neither the source nor the state knows.
    fn known(&self, model: &ModelName) -> Result<Books, Refusal> {
        let books = self.books.read().get(model).cloned();
        match books {
            Some(books) => Ok(books),
            None if self.registry.knows(model) => Ok(Books::default()),
            None => Err(Refusal::NotFound(format!("model '{model}' is not known"))),
        }
    }
}

/// # Errors
/// `Stale` when the caller read another revision than there is now.
fn check_match<T>(call: &Call, doc: &Doc<T>) -> Result<(), Refusal> {
    match &call.if_match {
        Some(expected) if *expected != doc.etag() => {
            Err(Refusal::Stale { expected: expected.clone(), current: doc.etag() })
        }
        _ => Ok(()),
    }
}

fn labels_of(books: &Books) -> HashMap<Label, Version> {
    let labels = books.labels.body.labels.iter();
    labels.map(|(label, entry)| (label.clone(), entry.version)).collect()
}

fn json<T: Serialize>(value: &T) -> Value {
    serde_json::to_value(value).unwrap_or(Value::Null)
}

/// The document of a kind among those that a commit gave back.
fn committed<T: serde::de::DeserializeOwned>(
    documents: &[Document],
    kind: Kind,
) -> Result<Doc<T>, Refusal> {
    let document = documents.iter().find(|document| document.kind == kind);
    let missing = || Refusal::Internal("the store gave no document back".to_owned());
    Doc::read(document.ok_or_else(missing)?)
}

fn now() -> Timestamp {
    Timestamp::now()
}
