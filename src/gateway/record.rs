//! The record of one call: its completion in the making, and its place in the ledger.
//!
//! Invariant: whatever becomes of the call, the observer and the ledger get it once.

use std::future::{Future as _, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

use super::Gateway;
use crate::domain::{
    Answer, AnswerHead, CallMeta, Completion, Deadline, Durability, ErrorKind, Failure, ModelName,
    NamedTensor, OnUnrecorded, Outcome, ParameterValue, Recording, Tensor, Timings,
};
use crate::ledger::log::{Appended, Unrecorded};
use crate::ledger::{About, Ledger};
use crate::route::{Keys, Pick, Served};
use crate::shadow::Origin;

/// When a caller may try again whose prediction could not be recorded.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Becomes the request's one completion; as cancelled if it is dropped unfinished.
pub(super) struct Record<'a> {
    gateway: &'a Gateway,
    completion: Option<Completion>,
    pick: Option<Pick>,
    received: Instant,
    /// Of the route table that was looked at.
    revision: u64,
    /// Whom the data is about, where that is asked.
    subject: Option<Box<str>>,
    entry: Entry,
}

/// What the ledger was told.
#[derive(Clone, Copy)]
enum Entry {
    Nothing,
    /// There is no record, and no second attempt.
    Left,
    Taken(Appended),
}

impl<'a> Record<'a> {
    pub(super) fn new(gateway: &'a Gateway, meta: &CallMeta, model: ModelName, id: String) -> Self {
        let received_at = SystemTime::now()
            .checked_sub(meta.received.elapsed())
            .unwrap_or(SystemTime::UNIX_EPOCH);
        let completion = Completion {
            prediction_id: Uuid::now_v7(),
            request_id: id,
            received_at,
            model,
            version: None,
            digest: None,
            arm: None,
            reason: None,
            protocol: meta.protocol,
            principal: meta.principal.clone(),
            trace: meta.trace,
            outcome: Outcome::Ok,
            timings: Timings::default(),
            rows: 1,
            batch_size: 0,
            cached: false,
            shadow_of: None,
            inputs: Vec::new(),
            outputs: Vec::new(),
        };
        Self {
            gateway,
            completion: Some(completion),
            pick: None,
            received: meta.received,
            revision: 0,
            subject: None,
            entry: Entry::Nothing,
        }
    }

    fn open(&mut self) -> &mut Completion {
        self.completion.as_mut().expect("a record is finished once, by a call that consumes it")
    }

    fn completion(&self) -> &Completion {
        self.completion.as_ref().expect("as in open")
    }

    pub(super) fn model(&self) -> &ModelName {
        &self.completion().model
    }

    pub(super) fn id(&self) -> Uuid {
        self.completion().prediction_id
    }

    /// What is written for the caller.
    pub(super) fn answer(&self, outputs: Vec<NamedTensor>) -> Answer {
        let completion = self.completion();
        let (model, version) = (completion.model.clone(), completion.version);
        Answer { model, version, id: self.caller_id(), outputs }
    }

    /// The caller's id, for its answer.
    pub(super) fn caller_id(&self) -> String {
        self.completion().request_id.clone()
    }

    pub(super) fn head(&self) -> AnswerHead {
        let completion = self.completion();
        AnswerHead {
            prediction_id: completion.prediction_id,
            version: completion.version,
            digest: completion.digest,
            arm: completion.arm.clone(),
            ledger_seq: match self.entry {
                Entry::Taken(at) => Some(at.seq),
                Entry::Nothing | Entry::Left => None,
            },
        }
    }

    pub(super) fn looked_at(&mut self, revision: u64) {
        self.revision = revision;
    }

    pub(super) fn picked(&mut self, pick: Pick, keys: &Keys<'_>) {
        let completion = self.open();
        completion.version = Some(pick.served.version);
        completion.digest = Some(pick.served.digest);
        completion.arm = Some(pick.arm.clone());
        completion.reason = Some(pick.reason.clone());
        if pick.served.recording.needs_subject
            && let Some(ledger) = &self.gateway.ledger
        {
            self.subject = subject(ledger, keys);
        }
        self.pick = Some(pick);
    }

    pub(super) fn bound(&mut self, served: &Served, inputs: &[Tensor]) {
        let completion = self.open();
        if served.signature.batched {
            completion.rows = inputs.first().and_then(|x| x.shape().first().copied()).unwrap_or(1);
        }
        completion.inputs = inputs.to_vec();
    }

    pub(super) fn ran(&mut self, ran: &crate::batch::Ran) {
        let completion = self.open();
        completion.timings = ran.timings;
        completion.batch_size = ran.batch_size;
        completion.outputs.clone_from(&ran.outputs);
    }

    pub(super) fn without_outputs(&mut self) {
        self.open().outputs = Vec::new();
    }

    pub(super) fn recalled(&mut self, outputs: &[Tensor]) {
        let completion = self.open();
        completion.cached = true;
        completion.outputs = outputs.to_vec();
    }

    /// Whether the prediction may be begun, as far as the ledger is concerned.
    pub(super) fn check(&self) -> Result<(), Failure> {
        let (Some(ledger), Some(recording)) = (&self.gateway.ledger, self.recording()) else {
            return Ok(());
        };
        ledger.check(recording).map_err(|why| unrecorded(&why))
    }

    /// Records a prediction that was made, and waits until its answer may leave. At the deadline
    /// it waits no longer: nobody would take the answer.
    pub(super) async fn settle(&mut self, deadline: Deadline) -> Result<(), Failure> {
        let gateway = self.gateway;
        let (Some(ledger), Some(recording)) = (&gateway.ledger, self.recording()) else {
            return Ok(());
        };
        let (durability, on_error) = (recording.durability, recording.on_error);
        self.end(Outcome::Ok);
        let settled = match self.append() {
            Err(why) => Err(why),
            Ok(None) => return Ok(()),
            Ok(Some(at)) => wait(ledger, at, durability, deadline).await?,
        };
        let Err(why) = settled else { return Ok(()) };
        self.missed(&why);
        match on_error {
            OnUnrecorded::Refuse => Err(unrecorded(&why)),
            OnUnrecorded::Serve => Ok(()),
        }
    }

    /// Finishes a request that was answered, and leaves it to the monitor and to its shadows.
    pub(super) fn answered(mut self) {
        let Some(completion) = self.send(Outcome::Ok) else { return };
        if let Some(pick) = &self.pick
            && let Some(watch) = &pick.served.watch
        {
            watch.offer(&pick.arm, &completion.inputs, &completion.outputs);
        }
        if let Some(pick) = &self.pick
            && !pick.mirrors.is_empty()
        {
            let origin = Origin { config_revision: self.revision, subject: self.subject.take() };
            self.gateway.shadows.offer(pick, completion, origin);
        }
    }

    /// Finishes a request that failed, and gives the head that its answer carries.
    pub(super) fn failed(mut self, failure: &Failure) -> AnswerHead {
        self.end(Outcome::Failed { kind: failure.kind, message: failure.message.clone() });
        self.note();
        let head = self.head();
        self.observe();
        head
    }

    fn send(&mut self, outcome: Outcome) -> Option<Completion> {
        if self.completion.is_some() {
            self.end(outcome);
            self.note();
        }
        self.observe()
    }

    fn end(&mut self, outcome: Outcome) {
        let total = self.received.elapsed();
        let completion = self.open();
        completion.outcome = outcome;
        completion.timings.total = total;
    }

    /// Sees to it that the ledger has been told. Nobody waits for that.
    fn note(&mut self) {
        if matches!(self.entry, Entry::Nothing)
            && let Err(why) = self.append()
        {
            self.missed(&why);
        }
    }

    /// There is no record, nor a number of one that could be told.
    fn missed(&mut self, why: &Unrecorded) {
        tracing::debug!(%why, "a call could not be recorded");
        self.entry = Entry::Left;
        if let Some(ledger) = &self.gateway.ledger {
            ledger.miss(self.completion().received_at);
        }
    }

    fn append(&mut self) -> Result<Option<Appended>, Unrecorded> {
        let Some(ledger) = &self.gateway.ledger else { return Ok(None) };
        let served = self.pick.as_ref().map(|pick| &*pick.served);
        let about = About {
            signature: served.map(|served| &served.signature),
            engine: served.map_or("", |served| served.engine),
            recording: served.map(|served| &served.recording),
            config_revision: self.revision,
            subject: self.subject.as_deref(),
        };
        let appended = ledger.append(self.completion(), &about);
        self.entry = match appended {
            Ok(Some(at)) => Entry::Taken(at),
            _ => Entry::Left,
        };
        appended
    }

    fn observe(&mut self) -> Option<Completion> {
        let completion = self.completion.take()?;
        let stats = self.pick.as_ref().map(|pick| &*pick.served.stats);
        self.gateway.observer.completed(stats, &completion);
        Some(completion)
    }

    fn recording(&self) -> Option<&Recording> {
        self.pick.as_ref().map(|pick| &pick.served.recording)
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        let (kind, message) = match std::thread::panicking() {
            true => (ErrorKind::Internal, "internal error"),
            false => (ErrorKind::Cancelled, "the caller went away"),
        };
        self.send(Outcome::Failed { kind, message: message.to_owned() });
    }
}

/// Waits for a record as long as the caller waits for its answer. No timer is started for one that
/// is there at once.
async fn wait(
    ledger: &Arc<Ledger>,
    at: Appended,
    durability: Durability,
    deadline: Deadline,
) -> Result<Result<(), Unrecorded>, Failure> {
    if durability == Durability::Buffered {
        // Whoever else is ready on this thread appends first, and one write takes all of it.
        tokio::task::yield_now().await;
    }
    let mut settled = pin!(ledger.settled(at, durability));
    let first = poll_fn(|context| Poll::Ready(settled.as_mut().poll(context))).await;
    if let Poll::Ready(done) = first {
        return Ok(done);
    }
    let late = |_| {
        let message = "deadline passed while the prediction was being recorded";
        Failure::new(ErrorKind::DeadlineExceeded, message)
    };
    timeout_at(deadline.at, settled).await.map_err(late)
}

/// The log says what is wrong; the caller learns what it can do.
fn unrecorded(why: &Unrecorded) -> Failure {
    let message = match why {
        Unrecorded::Full => "predictions cannot be recorded fast enough at this moment",
        _ => "predictions cannot be recorded at this moment, so none is made",
    };
    Failure::new(ErrorKind::Unavailable, message).retry_after(RETRY_AFTER)
}

/// Whom the data is about: the configured header or parameter, else the sticky key.
fn subject(ledger: &Ledger, keys: &Keys<'_>) -> Option<Box<str>> {
    let named = ledger.settings().subject_parameter.as_deref();
    let parameter = named.and_then(|name| {
        let found = keys.parameters.iter().find(|(parameter, _)| parameter == name);
        found.and_then(|(_, value)| match value {
            ParameterValue::String(text) => Some(text.as_str().into()),
            ParameterValue::Int(number) => Some(number.to_string().into()),
            ParameterValue::Uint(number) => Some(number.to_string().into()),
            ParameterValue::Bool(_) | ParameterValue::Double(_) => None,
        })
    });
    let headers = &keys.call.headers;
    let header = || headers.subject.as_deref().map(Box::from);
    let sticky = || keys.call.sticky_key.as_deref().or(headers.sticky_key.as_deref());
    parameter.or_else(header).or_else(|| sticky().map(Box::from))
}
