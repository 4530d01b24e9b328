//! A desk of paper: it writes down what it is told, and knows two models.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::sync::broadcast;

use crate::control::call::{Call, Refusal, Versioned};
use crate::control::desk::{Desk, Labels, Pending};
use crate::control::rollout::{Command, Now, Plan, Rollout, Start};
use crate::control::store::{Event, EventOutcome, EventQuery};
use crate::control::view::{
    ApprovalRequest, ApprovalsView, Follow, Life, ModelView, ReloadView, ShadowView, TrafficView,
    VersionView,
};
use crate::domain::{Digest, Label, ModelName, Traffic, Version, VersionRef};

/// Events that a reader of the feed may lag behind.
const EVENTS_MAX: usize = 64;

pub(super) struct Paper {
    changes: Mutex<Vec<String>>,
    refusals: Mutex<Vec<String>>,
    journal: Mutex<Vec<Event>>,
    events: broadcast::Sender<Arc<Event>>,
    hints: AtomicUsize,
    revision: AtomicUsize,
    reasons: AtomicBool,
    traffic: Mutex<Option<Traffic>>,
}

fn name(text: &str) -> ModelName {
    text.parse().unwrap()
}

fn version(number: u64) -> Version {
    Version::new(number).unwrap()
}

impl Paper {
    pub(super) fn new() -> Self {
        Self {
            changes: Mutex::default(),
            refusals: Mutex::default(),
            journal: Mutex::default(),
            events: broadcast::channel(EVENTS_MAX).0,
            hints: AtomicUsize::new(0),
            revision: AtomicUsize::new(0),
            reasons: AtomicBool::new(false),
            traffic: Mutex::default(),
        }
    }

    pub(super) fn changes(&self) -> Vec<String> {
        self.changes.lock().clone()
    }

    pub(super) fn refusals(&self) -> Vec<String> {
        self.refusals.lock().clone()
    }

    pub(super) fn hints(&self) -> usize {
        self.hints.load(Ordering::Relaxed)
    }

    pub(super) fn want_reasons(&self) {
        self.reasons.store(true, Ordering::Relaxed);
    }

    pub(super) fn back_to_revision_one(&self) {
        self.revision.store(1, Ordering::Relaxed);
    }

    pub(super) fn write_down(&self, action: &str, model: Option<&ModelName>, call: &Call) {
        let model = model.map_or("gateway", ModelName::as_str);
        let reason = call.reason.as_deref().unwrap_or("-");
        let condition = call.if_match.as_ref().map(|tag| format!(" if {tag}")).unwrap_or_default();
        let id = call.request_id.as_deref().unwrap_or("-");
        let line = format!("{action} {model} by {}: {reason}{condition} ({id})", call.actor);
        self.changes.lock().push(line);
    }

    pub(super) fn journal_one(&self, action: &str, model: &str) {
        let mut journal = self.journal.lock();
        let event = Event {
            seq: journal.len() as u64 + 1,
            at: Timestamp::now(),
            gateway: "test".to_owned(),
            actor: "ci".to_owned(),
            action: action.to_owned(),
            model: (!model.is_empty()).then(|| name(model)),
            subject: model.to_owned(),
            outcome: EventOutcome::Done,
            before: None,
            after: None,
            reason: None,
            request_id: None,
            detail: None,
            cut: false,
        };
        journal.push(event.clone());
        drop(self.events.send(Arc::new(event)));
    }

    pub(super) fn journal_three(&self) {
        self.journal_one("label.put", "iris");
        self.journal_one("traffic.put", "risk");
        self.journal_one("reload", "");
    }

    fn etag(&self) -> String {
        format!("\"{}\"", self.revision.load(Ordering::Relaxed))
    }

    fn tagged<T>(&self, value: T) -> Versioned<T> {
        Versioned { value, etag: self.etag() }
    }

    fn known(&self, model: &ModelName) -> Result<(), Refusal> {
        match model.as_str() {
            "iris" | "risk" | "slow" => Ok(()),
            "broken" => Err(Refusal::Internal("/var/lib/tidegate/state.db is gone".to_owned())),
            "panic" => {
                std::hint::black_box(None::<u8>).expect("a desk that falls over");
                Ok(())
            }
            "busy" => Err(Refusal::Unavailable("the store is busy".to_owned())),
            "locked" => {
                let (version, digest) = ("locked/2".to_owned(), "sha256:00".to_owned());
                Err(Refusal::NeedsApproval { version, digest, have: 0, need: 1 })
            }
            other => Err(Refusal::NotFound(format!("model '{other}' is not known"))),
        }
    }

    /// What every change is checked for.
    fn change(&self, action: &str, model: &ModelName, call: &Call) -> Result<(), Refusal> {
        self.known(model)?;
        if self.reasons.load(Ordering::Relaxed) && call.reason.is_none() {
            return Err(Refusal::NeedsReason);
        }
        match &call.if_match {
            Some(expected) if *expected != self.etag() => {
                return Err(Refusal::Stale { expected: expected.clone(), current: self.etag() });
            }
            _ => {}
        }
        self.write_down(action, Some(model), call);
        self.revision.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn view(&self) -> TrafficView {
        let traffic = self.traffic.lock().clone();
        let follow = if traffic.is_some() { Follow::Traffic } else { Follow::Latest };
        TrafficView { follow, version: Some(version(1)), traffic, last_good: None, changed: None }
    }
}

fn version_view(number: u64) -> VersionView {
    VersionView {
        version: version(number),
        state: Life::Ready,
        since: Timestamp::UNIX_EPOCH,
        reason: String::new(),
        digest: None,
        engine: None,
        source: None,
        size_bytes: None,
        memory_predicted_bytes: None,
        memory_measured_bytes: None,
        labels: Vec::new(),
        weight: 0.0,
        arms: Vec::new(),
        changed: None,
        lineage: Default::default(),
        checks: Vec::new(),
        approvals: Vec::new(),
        history: Vec::new(),
    }
}

fn model_view(model: &str) -> ModelView {
    ModelView {
        name: name(model),
        follow: Follow::Latest,
        labels: BTreeMap::new(),
        traffic: None,
        last_good: None,
        changed: None,
        rollout: None,
        versions: vec![version_view(1), version_view(2)],
        problem: String::new(),
    }
}

fn rollout() -> Rollout {
    let start = Start {
        model: name("iris"),
        candidate: version(2),
        stable: version(1),
        plan: Plan::of("2".parse().map(VersionRef::Number).unwrap()),
        before: Traffic::all_to(version(1)),
    };
    let now = Now { at: Timestamp::UNIX_EPOCH, monotonic: Duration::ZERO };
    let (mut rollout, _) = Rollout::start(start, now, &Call::own("ci", "test"));
    "r-1".clone_into(&mut rollout.id);
    rollout
}

fn now<'a, T: Send + 'a>(done: Result<T, Refusal>) -> Pending<'a, T> {
    Box::pin(async move { done })
}

impl Desk for Paper {
    fn models(&self) -> Vec<ModelView> {
        vec![model_view("iris"), model_view("risk")]
    }

    fn model(&self, model: &ModelName) -> Option<ModelView> {
        self.known(model).ok().map(|()| model_view(model.as_str()))
    }

    fn version(
        &self,
        model: &ModelName,
        version: Version,
    ) -> Result<Versioned<VersionView>, Refusal> {
        self.known(model).map(|()| self.tagged(version_view(version.get())))
    }

    fn load<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
        _: Option<Digest>,
        call: Call,
    ) -> Pending<'a, Versioned<VersionView>> {
        let done = self.change("version.load", model, &call);
        now(done.map(|()| self.tagged(version_view(version.get()))))
    }

    fn unload<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
        call: Call,
    ) -> Pending<'a, Versioned<VersionView>> {
        let done = self.change("version.unload", model, &call);
        now(done.map(|()| self.tagged(version_view(version.get()))))
    }

    fn labels(&self, model: &ModelName) -> Result<Versioned<Labels>, Refusal> {
        self.known(model).map(|()| self.tagged(Labels::new()))
    }

    fn put_label<'a>(
        &'a self,
        model: &'a ModelName,
        label: Label,
        version: Version,
        call: Call,
    ) -> Pending<'a, Versioned<Labels>> {
        let done = self.change("label.put", model, &call);
        now(done.map(|()| self.tagged(Labels::from([(label, version)]))))
    }

    fn delete_label<'a>(
        &'a self,
        model: &'a ModelName,
        _: &'a Label,
        call: Call,
    ) -> Pending<'a, Versioned<Labels>> {
        let done = self.change("label.delete", model, &call);
        now(done.map(|()| self.tagged(Labels::new())))
    }

    fn traffic(&self, model: &ModelName) -> Result<Versioned<TrafficView>, Refusal> {
        self.known(model).map(|()| self.tagged(self.view()))
    }

    fn put_traffic<'a>(
        &'a self,
        model: &'a ModelName,
        traffic: Traffic,
        call: Call,
    ) -> Pending<'a, Versioned<TrafficView>> {
        if traffic.versions().contains(&version(9)) {
            return now(Err(Refusal::Invalid(vec!["weights.9: is not ready".to_owned()])));
        }
        let done = self.change("traffic.put", model, &call);
        now(done.map(|()| {
            *self.traffic.lock() = Some(traffic);
            self.tagged(self.view())
        }))
    }

    fn delete_traffic<'a>(
        &'a self,
        model: &'a ModelName,
        call: Call,
    ) -> Pending<'a, Versioned<TrafficView>> {
        let done = self.change("traffic.delete", model, &call);
        now(done.map(|()| self.tagged(self.view())))
    }

    fn rollback<'a>(
        &'a self,
        model: &'a ModelName,
        call: Call,
    ) -> Pending<'a, Versioned<TrafficView>> {
        Box::pin(async move {
            if model.as_str() == "slow" {
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            self.change("traffic.rollback", model, &call)?;
            Ok(self.tagged(self.view()))
        })
    }

    fn start_rollout<'a>(
        &'a self,
        model: &'a ModelName,
        _: Plan,
        call: Call,
    ) -> Pending<'a, Versioned<Rollout>> {
        now(self.change("rollout.start", model, &call).map(|()| self.tagged(rollout())))
    }

    fn rollouts(&self, model: &ModelName) -> Result<Vec<Rollout>, Refusal> {
        self.known(model).map(|()| vec![rollout()])
    }

    fn rollout(&self, model: &ModelName, _: &str) -> Result<Versioned<Rollout>, Refusal> {
        self.known(model).map(|()| self.tagged(rollout()))
    }

    fn command_rollout<'a>(
        &'a self,
        model: &'a ModelName,
        _: &'a str,
        command: Command,
        call: Call,
    ) -> Pending<'a, Versioned<Rollout>> {
        let action = format!("rollout.{command:?}").to_lowercase();
        now(self.change(&action, model, &call).map(|()| self.tagged(rollout())))
    }

    fn approvals(
        &self,
        model: &ModelName,
        _: Version,
    ) -> Result<Versioned<ApprovalsView>, Refusal> {
        self.known(model).map(|()| self.tagged(approvals()))
    }

    fn approve<'a>(
        &'a self,
        model: &'a ModelName,
        _: Version,
        _: ApprovalRequest,
        call: Call,
    ) -> Pending<'a, Versioned<ApprovalsView>> {
        now(self.change("approval.post", model, &call).map(|()| self.tagged(approvals())))
    }

    fn journal(&self, query: EventQuery) -> Pending<'_, Vec<Event>> {
        let mut events: Vec<Event> = self.journal.lock().clone();
        if query.newest_first {
            events.reverse();
        }
        events.retain(|event| {
            query.after.is_none_or(|after| event.seq > after)
                && query.before.is_none_or(|before| event.seq < before)
                && query.model.as_ref().is_none_or(|model| event.model.as_ref() == Some(model))
                && query.action.as_ref().is_none_or(|start| event.action.starts_with(start))
        });
        events.truncate(query.limit);
        now(Ok(events))
    }

    fn events(&self) -> broadcast::Receiver<Arc<Event>> {
        self.events.subscribe()
    }

    fn refused<'a>(
        &'a self,
        action: &'a str,
        model: Option<&'a ModelName>,
        subject: &'a str,
        call: &'a Call,
        detail: &'a str,
    ) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        let id = call.request_id.as_deref().unwrap_or("-");
        let model = model.map_or("-", ModelName::as_str);
        let line = format!("{action} {model} {subject} by {} ({id}): {detail}", call.actor);
        self.refusals.lock().push(line);
        Box::pin(async {})
    }

    fn noted<'a>(
        &'a self,
        action: &'a str,
        model: Option<&'a ModelName>,
        subject: &'a str,
        call: &'a Call,
    ) -> Pending<'a, ()> {
        self.write_down(&format!("{action} {subject}"), model, call);
        now(Ok(()))
    }

    fn reload(&self, call: Call) -> Pending<'_, ReloadView> {
        self.write_down("reload", None, &call);
        now(Ok(ReloadView { models: 2, versions: 4 }))
    }

    fn shadow(&self, model: &ModelName) -> Result<ShadowView, Refusal> {
        self.known(model).map(|()| ShadowView { model: model.clone(), shadows: Vec::new() })
    }

    fn webhook_hint(&self) {
        self.hints.fetch_add(1, Ordering::Relaxed);
    }
}

fn approvals() -> ApprovalsView {
    ApprovalsView { digest: None, have: 0, need: 1, submitter: None, approvals: Vec::new() }
}
