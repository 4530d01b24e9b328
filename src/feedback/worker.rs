//! The thread `feedback`: decides what is new, records it, and reads both logs on.
//!
//! Invariants:
//! - What counts is what was read back from the log, live and after a start alike.
//! - Whatever fails here fails the calls that wait, and the thread begins again from what was
//!   written down; what was promised is in the log.

use std::collections::{BTreeSet, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError};
use std::time::{Duration, Instant, UNIX_EPOCH};

use uuid::Uuid;

use super::board::{Board, Day, Series, day_of};
use super::body::{Body, Origin, head, made_ms};
use super::finder::Finder;
use super::index::{Index, Taken};
use super::reading::{self, How, Predicted};
use super::{FeedbackError, Item, Job, Models, Outcome, Settings, Shared, today};
use crate::domain::{Durability, Protocol};
use crate::ledger::export::{self, Selection, View};
use crate::ledger::follow::{self, FollowError, Follower, Start};
use crate::ledger::frame::Frame;
use crate::ledger::log::{OpenError, Unrecorded};
use crate::ledger::reader::{ReadError, SEGMENTS};
use crate::ledger::record::{Head, Kind, Payload, Record, Via};
use crate::ledger::{FEEDBACK, Ledger, PREDICTIONS};
use crate::quality::{METRICS_MAX, Tally};

/// How long the thread waits for a call before it looks at the logs.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often what was taken in is written down.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// Predictions that are counted between two looks at the queue.
const COUNTED_AT_ONCE: usize = 2048;
/// While there are more than that, the outputs of one prediction in so many are read for the estimate.
const SAMPLED: u64 = 16;
/// Calls, and items of them, that share one wait for the disk.
const GROUP_MAX: usize = 64;
const GROUP_ITEMS_MAX: usize = 4096;
/// Before the thread begins again after something failed.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Before predictions are counted on after their log could not be read.
const COUNT_AGAIN_AFTER: Duration = Duration::from_secs(60);
/// Below what serves, as for Parquet.
const NICE: i32 = 5;

/// What the thread works with.
pub(super) struct Parts {
    pub(super) settings: Settings,
    pub(super) ledger: Arc<Ledger>,
    pub(super) models: Arc<dyn Models>,
    pub(super) shared: Arc<Shared>,
}

#[derive(Debug, thiserror::Error)]
enum WorkError {
    #[error("its index: {0}")]
    Index(#[from] rusqlite::Error),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Export(#[from] export::ExportError),
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("its thread: {0}")]
    Runtime(std::io::Error),
}

/// Works until nobody can send anything any more.
pub(super) fn run(parts: &Parts, jobs: &Receiver<Job>) {
    // On Linux of this thread alone. Without it the work is done all the same.
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::debug!(%error, "the thread that takes feedback runs as others do");
    }
    let mut told = String::new();
    loop {
        // A panic must not end feedback for good; the hook has told where it was.
        let work = || Worker::open(parts).and_then(|mut worker| worker.work(jobs));
        match crate::panics::caught(work) {
            Some(Ok(())) => return,
            Some(Err(error)) => {
                let text = error.to_string();
                if text != told {
                    tracing::error!(%error, "feedback cannot be taken");
                }
                told = text;
            }
            None => {}
        }
        let until = Instant::now() + AGAIN_AFTER;
        loop {
            match jobs.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(job) => job.answer(Err(FeedbackError::Broken)),
                Err(RecvTimeoutError::Timeout) => break,
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}

impl Job {
    fn answer(self, answer: Result<Vec<Outcome>, FeedbackError>) {
        // Who has gone away needs no answer.
        self.reply.send(answer).ok();
    }
}

/// A fact that is to be recorded.
struct Fact {
    id: Uuid,
    head: Head,
    body: Body,
}

impl Fact {
    fn key(&self) -> Key {
        (self.id, self.body.key().to_owned())
    }
}

/// Metrics of callers: as many as there is room for.
struct Room<'a> {
    board: &'a Board,
    names: HashMap<(Series, Day), BTreeSet<String>>,
}

impl Room<'_> {
    fn take(&mut self, facts: Vec<Fact>) -> Result<Vec<Fact>, String> {
        for fact in &facts {
            let (Some(metric), Some(place)) = (&fact.body.metric, place(&fact.head)) else {
                continue;
            };
            let known = |(series, day): &(Series, Day)| self.board.metrics(series, *day);
            let names = self.names.entry(place).or_insert_with_key(known);
            names.insert(metric.clone());
            if names.len() > METRICS_MAX {
                return Err(format!("metric: {METRICS_MAX} others are known already"));
            }
        }
        Ok(facts)
    }
}

/// What is to be done for a call.
#[derive(Default)]
struct Decided {
    outcomes: Vec<Outcome>,
    facts: Vec<Fact>,
}

/// What was said of a prediction, by its id and metric.
type Known = HashMap<Key, Body>;

/// A prediction, and the metric; the label has none.
type Key = (Uuid, String);

struct Worker<'a> {
    parts: &'a Parts,
    index: Index,
    /// Of the log of feedback, which is taken in.
    feedback: Follower,
    /// Of the log of predictions, which are counted.
    predictions: Follower,
    /// Before this, predictions are not looked at.
    count_from: Instant,
    /// There were more predictions than were counted at once.
    busy: bool,
    made: Finder,
    said: Finder,
    /// Bodies of records that what is being decided may correct, by their numbers.
    earlier: HashMap<u64, Body>,
    written: Taken,
    committed: Instant,
    /// Waits for records to be on the disk.
    runtime: tokio::runtime::Runtime,
}

impl<'a> Worker<'a> {
    fn open(parts: &'a Parts) -> Result<Self, WorkError> {
        let folder = |log: &str| parts.ledger.settings().dir.join(log);
        let said = folder(FEEDBACK);
        if said.join(SEGMENTS).is_dir() {
            // What a crash left of its last record is cut off now.
            parts.ledger.feedback()?;
        }
        let index = Index::open(&parts.settings.state_dir, follow::end(&said)?)?;
        let written = index.taken()?;
        *parts.shared.board.lock() = Board::of(index.tallies()?);
        let first = today() - i64::from(parts.settings.window_days) + 1;
        let from = first_prediction(&folder(PREDICTIONS), written.predictions, first)?;
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let made_within = parts.settings.made_within;
        Ok(Self {
            parts,
            index,
            feedback: Follower::new(&said, Start::At(written.feedback))?,
            predictions: Follower::new(folder(PREDICTIONS), from)?,
            count_from: Instant::now(),
            busy: false,
            made: Finder::new(folder(PREDICTIONS), made_within),
            said: Finder::new(said, Duration::ZERO),
            earlier: HashMap::new(),
            written,
            committed: Instant::now(),
            runtime: runtime.map_err(WorkError::Runtime)?,
        })
    }

    fn work(&mut self, jobs: &Receiver<Job>) -> Result<(), WorkError> {
        self.catch_up()?;
        self.parts.shared.board.lock().whole = true;
        loop {
            let more = self.count_predictions();
            let job = match more {
                true => jobs.try_recv().map_err(|error| error == TryRecvError::Disconnected),
                false => jobs
                    .recv_timeout(LOOK_EVERY)
                    .map_err(|error| error == RecvTimeoutError::Disconnected),
            };
            let ends = match job {
                Ok(job) => {
                    self.serve(job, jobs)?;
                    false
                }
                Err(ends) => ends,
            };
            if ends || self.committed.elapsed() >= COMMIT_EVERY {
                self.commit()?;
            }
            if ends {
                return Ok(());
            }
        }
    }

    /// Serves a call, and those that wait behind it, with one wait for the disk.
    fn serve(&mut self, first: Job, jobs: &Receiver<Job>) -> Result<(), WorkError> {
        let (mut known, mut decided, mut items) = (Known::new(), Vec::new(), 0);
        let mut next = Some(first);
        while let Some(job) = next.take() {
            items += job.call.items.len();
            // Whoever has gone away will say it again.
            if !job.reply.is_closed() {
                match self.decide(&job, &mut known) {
                    Ok(Ok(done)) => decided.push((job, done)),
                    Ok(Err(refused)) => job.answer(Err(refused)),
                    Err(error) => {
                        let waiting = decided.into_iter().map(|(job, _)| job).chain([job]);
                        waiting.for_each(|job| job.answer(Err(FeedbackError::Broken)));
                        return Err(error);
                    }
                }
            }
            if decided.len() < GROUP_MAX && items < GROUP_ITEMS_MAX {
                next = jobs.try_recv().ok();
            }
        }
        let recorded = self.record(&decided);
        // What is recorded is promised, whether or not it can be counted at once.
        let counted = self.catch_up();
        self.earlier = HashMap::new();
        for (job, Decided { outcomes, .. }) in decided {
            job.answer(recorded.clone().map(|()| outcomes).map_err(FeedbackError::from));
        }
        counted
    }

    /// What a call comes to, after all that is known, which is what it says afterwards.
    fn decide(
        &mut self,
        job: &Job,
        known: &mut Known,
    ) -> Result<Result<Decided, FeedbackError>, WorkError> {
        let drafts = match self.drafts(job) {
            Ok(drafts) => drafts,
            Err(refused) => return Ok(Err(refused)),
        };
        let keys = drafts.iter().flatten().map(Fact::key).filter(|key| !known.contains_key(key));
        self.look_up(&keys.collect::<Vec<_>>())?;
        let (mut decided, mut own) = (Decided::default(), Known::new());
        for facts in drafts {
            let mut outcome = Outcome::NotFound;
            for fact in facts {
                let key = fact.key();
                let before = match own.get(&key).or_else(|| known.get(&key)) {
                    Some(body) => Some(body.clone()),
                    None => self.fact(&fact.id, &key.1)?.1,
                };
                outcome = outcome.max(match &before {
                    Some(before) if before.says_the_same(&fact.body) => Outcome::Unchanged,
                    Some(_) => Outcome::Corrected,
                    None => Outcome::Recorded,
                });
                if before.is_none_or(|before| !before.says_the_same(&fact.body)) {
                    own.insert(key, fact.body.clone());
                    decided.facts.push(fact);
                }
            }
            decided.outcomes.push(outcome);
        }
        known.extend(own);
        Ok(Ok(decided))
    }

    /// The facts of each item, none for one whose prediction is not found.
    fn drafts(&mut self, job: &Job) -> Result<Vec<Vec<Fact>>, FeedbackError> {
        let call = &job.call;
        let mut places: HashMap<Uuid, Vec<usize>> = HashMap::new();
        for (at, item) in call.items.iter().enumerate() {
            places.entry(item.id).or_default().push(at);
        }
        let ids: Vec<Uuid> = places.keys().copied().collect();
        let mut drafts: Vec<_> = call.items.iter().map(|_| None).collect();
        let (mut hows, origin) = (HashMap::new(), origin(job));
        let models = &self.parts.models;
        let found = self.made.predictions(&ids, |id, view| {
            // Of another model it is none that this caller may know of.
            if view.model != call.model.as_str() {
                return;
            }
            let how: &How = hows
                .entry(view.version)
                .or_insert_with(|| models.how(view.model, view.version).unwrap_or_default());
            let ok = view.status == "ok";
            let predicted = ok.then(|| reading::read(view, how)).flatten();
            for at in places.get(&id).into_iter().flatten() {
                drafts[*at] = Some(draft(view, &call.items[*at], predicted.as_ref(), how, &origin));
            }
        });
        match found {
            Ok(true) => {}
            Ok(false) => return Err(FeedbackError::Searching),
            // Other calls ask for predictions of other days.
            Err(error) => {
                tracing::warn!(%error, "predictions that labels came for cannot be looked for");
                return Err(FeedbackError::Broken);
            }
        }
        let mut room = Room { board: &self.parts.shared.board.lock(), names: HashMap::new() };
        let drafts = drafts.into_iter().enumerate().map(|(at, draft)| {
            let facts = draft.transpose().and_then(|facts| room.take(facts.unwrap_or_default()));
            facts.map_err(|why| FeedbackError::Item { at, why })
        });
        drafts.collect()
    }

    /// Reads what was said before of these, all at once.
    fn look_up(&mut self, keys: &[Key]) -> Result<(), WorkError> {
        let mut seqs = Vec::new();
        for (id, metric) in keys {
            seqs.extend(self.index.fact(id, metric)?);
        }
        let earlier = &mut self.earlier;
        self.said.records(&seqs, |view| {
            earlier.extend(Body::read(view.body).map(|body| (view.seq, body)));
        })?;
        Ok(())
    }

    /// Records facts, and waits until their answers may leave.
    fn record(&self, decided: &[(Job, Decided)]) -> Result<(), Unrecorded> {
        let (ledger, mut last) = (&self.parts.ledger, None);
        for fact in decided.iter().flat_map(|(_, decided)| &decided.facts) {
            // Numbers and texts: it cannot fail.
            let body = serde_json::to_vec(&fact.body).unwrap_or_default();
            let payload = Payload { body: body.into(), ..Payload::default() };
            last = Some(ledger.append_feedback(&fact.head, &payload)?);
        }
        let Some(last) = last else { return Ok(()) };
        let synced = |(job, _): &(Job, Decided)| job.call.durability == Durability::Sync;
        let durability = match decided.iter().any(synced) {
            true => Durability::Sync,
            false => Durability::Buffered,
        };
        self.runtime.block_on(ledger.feedback_settled(last, durability))
    }

    /// Takes in what is in the log of feedback by now.
    fn catch_up(&mut self) -> Result<(), WorkError> {
        self.feedback.refresh();
        loop {
            let record = match self.feedback.next_frame() {
                Ok(Some(frame)) => Record::read(&frame),
                Ok(None) => return Ok(()),
                Err(FollowError::Gap(gap)) => {
                    self.feedback.skip(gap.to);
                    continue;
                }
                Err(FollowError::Damage(damage)) => {
                    tracing::error!(%damage, "feedback that cannot be read does not count");
                    self.feedback.skip(damage.to);
                    continue;
                }
                Err(FollowError::Read(error)) => return Err(error.into()),
            };
            match record {
                Ok(record) => self.take_in(&record)?,
                Err(error) => tracing::warn!(%error, "a record of feedback is of another form"),
            }
            if self.committed.elapsed() >= COMMIT_EVERY {
                self.commit()?;
            }
        }
    }

    fn take_in(&mut self, record: &Record) -> Result<(), WorkError> {
        let (Some(payload), Some(id), Some((series, day))) =
            (&record.payload, record.prediction_id(), place(&record.head))
        else {
            return Ok(());
        };
        let Some(body) = Body::read(&payload.body) else { return Ok(()) };
        let (is_known, before) = self.fact(&id, body.key())?;
        if day >= self.first_day() {
            let mut board = self.parts.shared.board.lock();
            board.change(&series, day, |tally| {
                if let Some(before) = before {
                    tally.remove(&before.tally());
                }
                tally.add(&body.tally());
                if !is_known && body.metric.is_none() {
                    tally.first_label(delay(record, &body));
                }
            });
        }
        Ok(self.index.put(&id, body.key(), record.seq)?)
    }

    /// Whether something of this kind was said of a prediction, and what, if that was not erased.
    fn fact(&mut self, id: &Uuid, key: &str) -> Result<(bool, Option<Body>), WorkError> {
        let Some(seq) = self.index.fact(id, key)? else { return Ok((false, None)) };
        let mut body = self.earlier.get(&seq).cloned();
        if body.is_none() {
            self.said.records(&[seq], |view| body = Body::read(view.body))?;
        }
        Ok((true, body))
    }

    /// Counts some of the predictions that came since; whether there may be more.
    fn count_predictions(&mut self) -> bool {
        if Instant::now() < self.count_from {
            return false;
        }
        self.predictions.refresh();
        let (mut seen, first) = (0, self.first_day());
        let mut counts = Counts { every: if self.busy { SAMPLED } else { 1 }, of: Vec::new() };
        while seen < COUNTED_AT_ONCE {
            seen += 1;
            match self.predictions.next_frame() {
                Ok(Some(frame)) => {
                    if let Err(what) = counts.add(&frame, first, &*self.parts.models) {
                        tracing::debug!(what, "a record is of another form");
                    }
                }
                Ok(None) => break,
                Err(FollowError::Gap(gap)) => self.predictions.skip(gap.to),
                Err(FollowError::Damage(damage)) => {
                    tracing::error!(%damage, "predictions that cannot be read do not count");
                    self.predictions.skip(damage.to);
                }
                Err(FollowError::Read(error)) => {
                    tracing::warn!(%error, "predictions cannot be counted for their quality");
                    self.count_from = Instant::now() + COUNT_AGAIN_AFTER;
                    break;
                }
            }
        }
        let mut board = self.parts.shared.board.lock();
        for Counted { series, day, tally: counted, .. } in counts.of {
            board.change(&series, day, |tally| tally.add(&counted));
        }
        self.busy = seen == COUNTED_AT_ONCE;
        self.busy
    }

    fn first_day(&self) -> Day {
        today() - i64::from(self.parts.settings.window_days) + 1
    }

    fn commit(&mut self) -> Result<(), WorkError> {
        self.committed = Instant::now();
        let predictions = Some(self.predictions.next_seq());
        let taken = Taken { feedback: self.feedback.next_seq(), predictions };
        let first = self.first_day();
        let mut board = self.parts.shared.board.lock();
        if taken == self.written && !board.is_changed() {
            return Ok(());
        }
        let first = board.forget(first);
        self.index.commit(taken, board.changed(), first)?;
        board.written();
        self.written = taken;
        Ok(())
    }
}

/// Where counting begins: where it ended, or with the first prediction of the window.
fn first_prediction(log: &Path, counted: Option<u64>, day: Day) -> Result<Start, WorkError> {
    if let Some(seq) = counted {
        // Power loss may have taken records back that were counted.
        return Ok(Start::At(seq.min(follow::end(log)?)));
    }
    if !log.join(SEGMENTS).is_dir() {
        return Ok(Start::Oldest);
    }
    let since_ns = Some(day.saturating_mul(86_400_000_000_000));
    let wanted = Selection { since_ns, ..Selection::default() };
    let first = export::segments(log, &wanted)?.first().map(|segment| segment.first_seq);
    Ok(first.map_or(Start::End, Start::At))
}

fn origin(job: &Job) -> Origin {
    let call = &job.call;
    let since = call.received.duration_since(UNIX_EPOCH).unwrap_or_default();
    Origin {
        time_ns: i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
        protocol: match call.protocol {
            Protocol::Http => Via::Http,
            Protocol::Grpc => Via::Grpc,
            Protocol::GrpcStream => Via::GrpcStream,
        },
        principal: call.principal.clone().unwrap_or_default(),
        trace_id: call.trace.map(|trace| trace.trace_id.to_be_bytes().to_vec()).unwrap_or_default(),
    }
}

/// What an item says of the prediction that was found.
fn draft(
    view: &View<'_>,
    item: &Item,
    predicted: Option<&Predicted<'_>>,
    how: &How,
    origin: &Origin,
) -> Result<Vec<Fact>, String> {
    let mut bodies = Vec::with_capacity(2);
    if !item.labels.is_empty() {
        let (rows, labels) = (view.rows.max(1), item.labels.len());
        if rows != labels as u64 {
            return Err(format!(
                "the prediction has {rows} rows and the label {labels}: give a list with one for \
                 each row, null where nothing is known"
            ));
        }
        let judged = predicted.map(|predicted| predicted.judge(&item.labels, how)).transpose();
        let judged = judged.map_err(|error| error.to_string())?;
        let (labels, at) = (item.labels.clone(), item.at);
        bodies.push(Body { labels, at, judged, ..Body::default() });
    }
    if let Some((metric, value)) = &item.metric {
        let (metric, value, at) = (Some(metric.clone()), Some(*value), item.at);
        bodies.push(Body { metric, value, at, ..Body::default() });
    }
    let fact = |body: Body| Fact { id: item.id, head: head(view, &body, origin), body };
    Ok(bodies.into_iter().map(fact).collect())
}

/// Where a fact counts.
fn place(head: &Head) -> Option<(Series, Day)> {
    (head.kind() == Kind::Feedback).then_some(())?;
    let day = day_of(made_ms(&head.prediction_id)?);
    let (model, arm) = (head.model.clone(), head.arm.clone());
    Some((Series { model, version: head.version, arm }, day))
}

/// From the prediction to what is known of it.
fn delay(record: &Record, body: &Body) -> Duration {
    let known_ms = match body.at {
        Some(at) => at.as_millisecond(),
        None => record.head.time_ns / 1_000_000,
    };
    let made_ms = made_ms(&record.head.prediction_id).unwrap_or(0);
    Duration::from_millis(u64::try_from(known_ms).unwrap_or(0).saturating_sub(made_ms))
}

/// What some predictions come to, before the board is locked for it.
struct Counts {
    /// Of so many predictions the outputs of one are read.
    every: u64,
    /// A few: models and arms that answered in a moment.
    of: Vec<Counted>,
}

struct Counted {
    series: Series,
    day: Day,
    tally: Tally,
    how: How,
}

impl Counted {
    fn is_of(&self, view: &View<'_>, day: Day) -> bool {
        let Series { model, version, arm } = &self.series;
        self.day == day && *version == view.version && *arm == view.arm && *model == view.model
    }
}

impl Counts {
    fn add(
        &mut self,
        frame: &Frame<'_>,
        first: Day,
        models: &dyn Models,
    ) -> Result<(), &'static str> {
        let view = View::read_head(frame)?;
        let is_one = view.kind == Kind::Prediction as u64
            && view.status == "ok"
            && view.shadow_of.is_empty();
        let Some(day) = made_ms(view.prediction_id).map(day_of) else { return Ok(()) };
        if !is_one || day < first {
            return Ok(());
        }
        let at = self.of.iter().position(|known| known.is_of(&view, day)).unwrap_or_else(|| {
            let (model, arm) = (view.model.to_owned(), view.arm.to_owned());
            let how = models.how(view.model, view.version).unwrap_or_default();
            let series = Series { model, version: view.version, arm };
            self.of.push(Counted { series, day, tally: Tally::default(), how });
            self.of.len() - 1
        });
        let Counted { tally, how, .. } = &mut self.of[at];
        tally.predictions += 1;
        if frame.seq.is_multiple_of(self.every)
            && let Some(predicted) = reading::read(&View::read(frame)?, how)
        {
            predicted.confidences(how).for_each(|confidence| tally.see_confidence(confidence));
        }
        Ok(())
    }
}
