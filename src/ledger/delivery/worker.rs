//! Gives records to one sink, in order, batch after batch.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use futures_util::future::LocalBoxFuture;
use serde_json::json;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::offset::{Keeper, Offset};
use super::pace::Pace;
use super::{Cap, Models, OnCap, Settings, Shared, Source, now_ns};
use crate::ledger::PREDICTIONS;
use crate::ledger::export::{View, time};
use crate::ledger::follow::{FollowError, Follower, Start};
use crate::ledger::frame;
use crate::ledger::reader;
use crate::ledger::record::Kind;

/// How often it is looked for more.
const POLL: Duration = Duration::from_millis(100);
/// Records that are given at once, their bytes, and records that are looked at for them.
const BATCH_RECORDS_MAX: usize = 500;
const BATCH_BYTES_MAX: usize = 4 << 20;
const BATCH_LOOKED_AT_MAX: usize = 5_000;
/// An offset is kept as often: what a crash may bring a second time.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// How often it is looked what waits.
const CAP_EVERY: Duration = Duration::from_secs(5);
/// How often it is said that too much waits.
const CAP_SAID_EVERY: Duration = Duration::from_secs(3600);

/// One record for a sink: its frame.
pub(super) struct Item {
    bytes: Vec<u8>,
    pub(super) seq: u64,
}

impl Item {
    /// What it says. It could be read when it came into the batch.
    pub(super) fn view(&self) -> Option<View<'_>> {
        frame::split(&self.bytes).ok().and_then(|frame| View::read(&frame).ok())
    }
}

/// What became of a batch that the sink has done with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    /// Of its records so many were given up.
    pub(super) refused: u64,
}

/// A batch that has to be given again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Again {
    pub(super) why: String,
    /// How long the sink asks to be left alone.
    pub(super) wait: Option<Duration>,
}

impl Again {
    pub(super) fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), wait: None }
    }
}

/// Records that a sink does not get: said to it in their place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Lost {
    /// Numbers from the first up to the one before the second.
    pub(super) from: u64,
    pub(super) to: u64,
    pub(super) reason: Reason,
    /// When that was found, in nanoseconds since 1970.
    pub(super) at_ns: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reason {
    /// The log cannot be read there.
    Damaged,
    /// Their time had come before the sink took them.
    Removed,
    /// More waited than may.
    OverCap,
}

impl Lost {
    /// As JSON, for whoever reads the stream.
    pub(super) fn json(&self, writer: &str) -> Vec<u8> {
        let reason = match self.reason {
            Reason::Damaged => "damaged",
            Reason::Removed => "removed",
            Reason::OverCap => "over_cap",
        };
        let time = time(i64::try_from(self.at_ns).unwrap_or(i64::MAX));
        let said = json!({
            "kind": "undelivered", "writer": writer, "seq": self.from, "count": self.to - self.from,
            "reason": reason, "time": time,
        });
        said.to_string().into_bytes()
    }
}

/// Where records go.
pub(super) trait Sink {
    /// Gives all of them; may be given some of them again after an [`Again`].
    fn send<'a>(&'a mut self, batch: &'a [Item]) -> LocalBoxFuture<'a, Result<Sent, Again>>;

    /// Says which ones do not come; may be said again, as records may come again.
    fn tell<'a>(&'a mut self, lost: &'a Lost) -> LocalBoxFuture<'a, Result<(), Again>>;
}

/// Finds where a sink goes on. `end` is the log's now, before anything is written.
pub(super) fn place(source: &Source, end: u64, shared: &Shared) {
    let keeper = Keeper::new(&source.dir, shared.name);
    let mut next_seq = 0;
    if let Some(offset) = keeper.load::<Offset>() {
        let sink = shared.name;
        if offset.writer != source.writer {
            tracing::warn!(sink, "its offset is of another ledger, all of this one is delivered");
        } else if offset.next_seq > end {
            // Taken by the sink and lost here: what is written now has those numbers again.
            tracing::warn!(
                sink,
                lost = offset.next_seq - end,
                "the sink has records that the log lost"
            );
            next_seq = end;
        } else {
            next_seq = offset.next_seq;
        }
    }
    shared.next_seq.store(next_seq, Ordering::Relaxed);
    shared.saved_seq.store(next_seq, Ordering::Relaxed);
}

/// What a look at the log brought.
#[derive(Default)]
struct Batch {
    items: Vec<Item>,
    /// When the first record came that was looked at.
    first_ns: u64,
    /// Records that are none.
    unreadable: u64,
    next_seq: u64,
}

enum Step {
    Went,
    Idle,
    Failed(Option<Duration>),
}

pub(super) struct Worker {
    log: PathBuf,
    writer: String,
    models: Models,
    cap: Cap,
    sink: Box<dyn Sink>,
    shared: Arc<Shared>,
    stop: CancellationToken,
    keeper: Keeper,
    follower: Option<Follower>,
    pace: Pace,
    next_seq: u64,
    /// Passed over, and not said to the sink yet.
    untold: Option<Lost>,
    saved_at: Instant,
    capped_at: Option<Instant>,
    said_cap_at: Option<Instant>,
}

impl Worker {
    pub(super) fn new(
        settings: &Settings,
        source: &Source,
        shared: Arc<Shared>,
        stop: CancellationToken,
        sink: Box<dyn Sink>,
    ) -> Self {
        Self {
            log: source.dir.join(PREDICTIONS),
            writer: source.writer.clone(),
            models: settings.models.clone(),
            cap: settings.cap,
            sink,
            keeper: Keeper::new(&source.dir, shared.name),
            follower: None,
            pace: Pace::new(settings.backoff_max),
            next_seq: shared.next_seq.load(Ordering::Relaxed),
            untold: None,
            saved_at: Instant::now(),
            capped_at: None,
            said_cap_at: None,
            shared,
            stop,
        }
    }

    /// Delivers until it is stopped, and then what it can without waiting.
    pub(super) async fn run(mut self) {
        loop {
            self.mind_cap();
            let wait = match self.step().await {
                Step::Went => {
                    self.pace.reset();
                    None
                }
                Step::Idle => Some(POLL),
                Step::Failed(asked) => {
                    // What is tried again is read again: it may have been erased meanwhile.
                    self.follower = None;
                    Some(self.pace.wait(asked))
                }
            };
            self.save(SAVE_EVERY);
            let Some(wait) = wait else {
                // A sink that is always ready must not keep the others from their turn.
                tokio::task::yield_now().await;
                continue;
            };
            if self.stop.is_cancelled() {
                break;
            }
            tokio::select! {
                () = sleep(wait) => {}
                () = self.stop.cancelled() => {}
            }
        }
        self.save(Duration::ZERO);
    }

    async fn step(&mut self) -> Step {
        if let Some(lost) = &self.untold {
            if let Err(again) = self.sink.tell(lost).await {
                self.shared.failed(&again.why);
                return Step::Failed(again.wait);
            }
            self.untold = None;
        }
        let batch = match self.batch() {
            Ok(batch) => batch,
            Err(FollowError::Gap(gap)) => {
                let why = "records were removed before they were delivered";
                self.pass_over(gap.to, Reason::Removed, why);
                return Step::Went;
            }
            Err(FollowError::Damage(damage)) => {
                let fault = &damage.fault;
                let (sink, file, offset) = (self.shared.name, fault.file.display(), fault.offset);
                tracing::error!(sink, %file, offset, what = fault.what, "the log is damaged");
                self.pass_over(damage.to, Reason::Damaged, "records cannot be delivered");
                return Step::Went;
            }
            Err(FollowError::Read(error)) => {
                self.shared.failed(&error.to_string());
                return Step::Failed(None);
            }
        };
        if batch.next_seq == self.next_seq {
            self.shared.oldest_ns.store(0, Ordering::Relaxed);
            return Step::Idle;
        }
        self.shared.oldest_ns.store(batch.first_ns, Ordering::Relaxed);
        if !batch.items.is_empty() {
            match self.sink.send(&batch.items).await {
                Ok(sent) => {
                    Shared::add(&self.shared.refused, sent.refused);
                    self.shared.took((batch.items.len() as u64).saturating_sub(sent.refused));
                }
                Err(again) => {
                    self.shared.failed(&again.why);
                    return Step::Failed(again.wait);
                }
            }
        }
        Shared::add(&self.shared.refused, batch.unreadable);
        self.next_seq = batch.next_seq;
        self.shared.next_seq.store(self.next_seq, Ordering::Relaxed);
        Step::Went
    }

    fn batch(&mut self) -> Result<Batch, FollowError> {
        let follower = match &mut self.follower {
            Some(follower) => follower,
            none => none.insert(Follower::new(&*self.log, Start::At(self.next_seq))?),
        };
        follower.refresh();
        let mut batch = Batch { next_seq: self.next_seq, ..Batch::default() };
        let mut bytes = 0;
        for _ in 0..BATCH_LOOKED_AT_MAX {
            if batch.items.len() >= BATCH_RECORDS_MAX || bytes >= BATCH_BYTES_MAX {
                break;
            }
            let frame = match follower.next_frame() {
                Ok(Some(frame)) => frame,
                // What is there goes first; the error comes again after it.
                Err(error) if batch.next_seq == self.next_seq => return Err(error),
                Ok(None) | Err(_) => break,
            };
            match View::read(&frame) {
                Ok(view) => {
                    if batch.first_ns == 0 {
                        batch.first_ns = u64::try_from(view.time_ns).unwrap_or(0);
                    }
                    let prediction = view.kind == Kind::Prediction as u64;
                    if prediction && self.models.contain(view.model) {
                        bytes += frame.bytes.len();
                        batch.items.push(Item { bytes: frame.bytes.to_vec(), seq: frame.seq });
                    }
                }
                Err(why) => {
                    let (sink, seq) = (self.shared.name, frame.seq);
                    tracing::error!(sink, seq, why, "a record cannot be read, it is not delivered");
                    batch.unreadable += 1;
                }
            }
            batch.next_seq = frame.seq + 1;
        }
        Ok(batch)
    }

    fn pass_over(&mut self, to: u64, reason: Reason, why: &str) {
        let (sink, from) = (self.shared.name, self.next_seq);
        tracing::error!(sink, from, to = to - 1, "{why}");
        let counter = match reason {
            Reason::Damaged => &self.shared.damaged,
            Reason::Removed | Reason::OverCap => &self.shared.skipped,
        };
        Shared::add(counter, to - from);
        // While a sink is away only the cap passes over, and what it does is one piece.
        let from = self.untold.take().map_or(from, |before| before.from);
        self.untold = Some(Lost { from, to, reason, at_ns: now_ns() });
        self.next_seq = to;
        self.shared.next_seq.store(to, Ordering::Relaxed);
        if let Some(follower) = &mut self.follower {
            follower.skip(to);
        }
    }

    /// Keeps the offset on the disk, unless that was done `every` ago.
    fn save(&mut self, every: Duration) {
        let saved = self.shared.saved_seq.load(Ordering::Relaxed) == self.next_seq;
        // What was not said is found again after a crash, and said then.
        if saved || self.untold.is_some() || self.saved_at.elapsed() < every {
            return;
        }
        self.saved_at = Instant::now();
        let offset = Offset { writer: self.writer.clone(), next_seq: self.next_seq };
        match self.keeper.save(&offset) {
            Ok(()) => self.shared.saved_seq.store(self.next_seq, Ordering::Relaxed),
            Err(error) => {
                // Delivery goes on: at worst it is done again.
                tracing::error!(sink = self.shared.name, %error, "the offset cannot be kept");
            }
        }
    }

    /// Looks how much waits, and does what is decided about too much.
    fn mind_cap(&mut self) {
        if self.capped_at.is_some_and(|at| at.elapsed() < CAP_EVERY) {
            return;
        }
        self.capped_at = Some(Instant::now());
        let Ok(waiting) = waiting(&self.log, self.next_seq) else { return };
        let bytes = waiting.iter().map(|segment| segment.bytes).sum();
        self.shared.lag_bytes.store(bytes, Ordering::Relaxed);
        let now = SystemTime::now();
        let kept = self.cap.kept(&waiting, now);
        let over = kept < waiting.len();
        // What fits counts after what was passed over.
        self.shared.over_cap.store(over && self.cap.on_cap == OnCap::Keep, Ordering::Relaxed);
        if !over {
            self.said_cap_at = None;
            return;
        }
        if self.cap.on_cap == OnCap::Skip {
            let to = waiting[waiting.len() - kept - 1].end;
            let why = "more waits for a sink than may, the oldest is passed over";
            self.pass_over(to, Reason::OverCap, why);
        } else if self.said_cap_at.is_none_or(|at| at.elapsed() >= CAP_SAID_EVERY) {
            self.said_cap_at = Some(Instant::now());
            let sink = self.shared.name;
            tracing::error!(sink, bytes, "more waits for a sink than may, it is kept nevertheless");
        }
    }
}

/// A sealed segment that has something for a sink.
struct Waiting {
    /// Number after its last record.
    end: u64,
    bytes: u64,
    sealed_at: SystemTime,
}

/// The sealed segments with records that are not delivered, in order.
fn waiting(log: &std::path::Path, next_seq: u64) -> Result<Vec<Waiting>, reader::ReadError> {
    let segments = reader::segments(log)?;
    let ends = segments.iter().skip(1).map(|segment| segment.first_seq);
    let sealed =
        segments.iter().zip(ends).filter(|(segment, end)| segment.sealed && *end > next_seq);
    let found = sealed.filter_map(|(segment, end)| {
        // Removed since it was listed: it does not wait.
        let meta = std::fs::metadata(&segment.path).ok()?;
        let sealed_at = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        Some(Waiting { end, bytes: meta.len(), sealed_at })
    });
    Ok(found.collect())
}

impl Cap {
    /// How many of the segments that wait may, from the newest.
    fn kept(&self, waiting: &[Waiting], now: SystemTime) -> usize {
        let mut bytes = 0_u64;
        let fits = |segment: &&Waiting| {
            bytes = bytes.saturating_add(segment.bytes);
            let age = now.duration_since(segment.sealed_at).unwrap_or_default();
            (self.bytes_max == 0 || bytes <= self.bytes_max)
                && self.age_max.is_none_or(|most| age <= most)
        };
        waiting.iter().rev().take_while(fits).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_that_fit_are_kept() {
        let now = SystemTime::now();
        let at =
            |end, bytes, age| Waiting { end, bytes, sealed_at: now - Duration::from_secs(age) };
        let waiting = [at(10, 100, 30), at(20, 50, 20), at(30, 60, 10)];
        let kept = |bytes_max, age: Option<u64>| {
            let age_max = age.map(Duration::from_secs);
            Cap { bytes_max, age_max, on_cap: OnCap::Skip }.kept(&waiting, now)
        };
        assert_eq!(kept(0, None), 3);
        assert_eq!(kept(210, None), 3);
        assert_eq!(kept(209, None), 2);
        assert_eq!(kept(60, None), 1);
        assert_eq!(kept(59, None), 0);
        assert_eq!(kept(0, Some(25)), 2);
        assert_eq!(kept(60, Some(25)), 1);
    }
}
