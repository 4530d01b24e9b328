//! What callers and the log's own threads share: the pending group, the segment, the counts.
//!
//! Locks are taken in this order: active, pending, board. Whoever appends takes the second alone.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::oneshot;

use super::board::Board;
use super::disk::{Disk, write_all};
use super::segment::{Segment, step};
use super::stores::Stores;
use super::{
    Appended, Draft, FRAME_BYTES_MAX, LogSettings, LogStats, Unrecorded, closed, frame, too_large,
};
use crate::ledger::frame::{Parsed, WriterId};
use crate::observe::{LATENCY_BOUNDS_NS, LATENCY_BUCKETS};

/// A write that takes longer makes the disk a slow one: callers do not write any more.
const SLOW_WRITE: Duration = Duration::from_millis(5);
/// A write of the keeper's that takes less makes it a fast one again.
const FAST_WRITE: Duration = Duration::from_millis(1);
/// Records are refused when the disk has not answered for so long: who writes on might not return.
const STALL_MAX: Duration = Duration::from_secs(10);
/// A group's buffer that is larger is given back.
const BUFFER_KEPT_MAX: usize = 4 << 20;

/// The group that is gathered. A lock of its own, held for a copy.
pub(super) struct Pending {
    bytes: Vec<u8>,
    next_seq: u64,
    /// When the first of the group came.
    oldest: Option<Instant>,
    pub(super) refusals: Refusals,
    records: u64,
    record_bytes: u64,
}

/// Why nothing is taken, each set and cleared by whoever found it.
#[derive(Default)]
pub(super) struct Refusals {
    pub(super) closed: bool,
    pub(super) broken: Option<Unrecorded>,
    pub(super) low: bool,
    stalled: bool,
}

impl Refusals {
    fn first(&self) -> Option<Unrecorded> {
        if self.closed {
            return Some(closed());
        }
        if let Some(why) = &self.broken {
            return Some(why.clone());
        }
        if self.low {
            return Some(Unrecorded::DiskFull);
        }
        self.stalled.then(|| Unrecorded::Broken("the disk does not answer".to_owned()))
    }
}

/// What is written to. Its lock is held for a write, and by the keeper for a change of segment.
#[derive(Default)]
pub(super) struct Active {
    /// `None` while the log is broken from its start.
    pub(super) segment: Option<Segment>,
    /// Why nothing more is written to it.
    pub(super) failed: Option<io::Error>,
    /// What is being written, or failed to be; and the number after it.
    pub(super) group: Vec<u8>,
    pub(super) group_end: u64,
}

/// Predictions that were answered without a record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Missed {
    pub(super) count: u64,
    pub(super) first: SystemTime,
    pub(super) last: SystemTime,
}

impl Missed {
    fn and(self, other: Self) -> Self {
        Self {
            count: self.count + other.count,
            first: self.first.min(other.first),
            last: self.last.max(other.last),
        }
    }
}

pub(super) struct Counts {
    base: Instant,
    in_flight: AtomicU64,
    /// Times since `base`, in nanoseconds; 0: none. Of the oldest record that is written and not
    /// synced, and of the oldest in the sync that is going on.
    unsynced_since: AtomicU64,
    syncing_since: AtomicU64,
    fsyncs: AtomicU64,
    dropped: AtomicU64,
    pub(super) sealed: AtomicU64,
    pub(super) free_bytes: AtomicU64,
    commits: [AtomicU64; LATENCY_BUCKETS],
    commit_ns: AtomicU64,
}

pub(super) struct Shared {
    pub(super) disk: Arc<dyn Disk>,
    pub(super) settings: LogSettings,
    pub(super) writer: WriterId,
    pub(super) pending: Mutex<Pending>,
    pub(super) active: Mutex<Active>,
    pub(super) board: Board,
    pub(super) stores: Stores,
    pub(super) slow: AtomicBool,
    /// Somebody waits for the segment to be sealed.
    pub(super) seal_asked: AtomicBool,
    /// A flush is due some time.
    armed: AtomicBool,
    pub(super) counts: Counts,
    missed: Mutex<Option<Missed>>,
    closing: Mutex<Option<oneshot::Sender<()>>>,
    /// Held as long as the log is.
    _lock: File,
}

impl Shared {
    pub(super) fn new(
        disk: Arc<dyn Disk>,
        settings: LogSettings,
        writer: WriterId,
        next_seq: u64,
        lock: File,
    ) -> Self {
        let pending = Pending {
            bytes: Vec::new(),
            next_seq,
            oldest: None,
            refusals: Refusals::default(),
            records: 0,
            record_bytes: 0,
        };
        let counts = Counts {
            base: Instant::now(),
            in_flight: AtomicU64::new(0),
            unsynced_since: AtomicU64::new(0),
            syncing_since: AtomicU64::new(0),
            fsyncs: AtomicU64::new(0),
            dropped: AtomicU64::new(0),
            sealed: AtomicU64::new(0),
            free_bytes: AtomicU64::new(0),
            commits: Default::default(),
            commit_ns: AtomicU64::new(0),
        };
        Self {
            disk,
            settings,
            writer,
            pending: Mutex::new(pending),
            active: Mutex::new(Active { group_end: next_seq, ..Active::default() }),
            board: Board::new(next_seq),
            stores: Stores::default(),
            slow: AtomicBool::new(false),
            seal_asked: AtomicBool::new(false),
            armed: AtomicBool::new(false),
            counts,
            missed: Mutex::new(None),
            closing: Mutex::new(None),
            _lock: lock,
        }
    }

    pub(super) fn append(&self, draft: &Draft) -> Result<Appended, Unrecorded> {
        let mut pending = self.pending.lock();
        if let Some(why) = pending.refusals.first() {
            return Err(why);
        }
        self.put(&mut pending, draft)
    }

    /// The same for records of the log's own, which it takes as long as it can write.
    pub(super) fn append_own(&self, draft: &Draft) -> Result<Appended, Unrecorded> {
        let mut pending = self.pending.lock();
        match &pending.refusals.broken {
            Some(why) => Err(why.clone()),
            None => self.put(&mut pending, draft),
        }
    }

    fn put(&self, pending: &mut Pending, draft: &Draft) -> Result<Appended, Unrecorded> {
        let len = draft.len();
        if len > FRAME_BYTES_MAX {
            return Err(too_large(len));
        }
        let in_flight = self.counts.in_flight.load(Ordering::Relaxed);
        let queued = pending.bytes.len() + usize::try_from(in_flight).unwrap_or(usize::MAX);
        if queued > 0 && queued + len > self.settings.queue_bytes_max {
            return Err(Unrecorded::Full);
        }
        let seq = pending.next_seq;
        draft.put(seq, &mut pending.bytes);
        pending.next_seq = seq + 1;
        pending.records += 1;
        pending.record_bytes += len as u64;
        // The keeper must hear of the first record after a flush, whoever writes it.
        let arms = !self.armed.load(Ordering::Relaxed) && !self.armed.swap(true, Ordering::SeqCst);
        if pending.oldest.is_none() {
            let now = Instant::now();
            pending.oldest = Some(now);
            if arms {
                self.board.flush_by(now + self.settings.flush_interval);
            }
        } else if arms {
            self.board.flush_by(Instant::now() + self.settings.flush_interval);
        }
        Ok(Appended { seq, epoch: self.board.epoch() })
    }

    /// Writes what is pending as one group; whether there was any, and it was written.
    pub(super) fn write_pending(&self, active: &mut Active) -> bool {
        let Some(segment) = active.segment.as_mut().filter(|_| active.failed.is_none()) else {
            return false;
        };
        let began = Instant::now();
        // What is left of a group that nobody finished is written again, to where it belongs.
        if active.group.is_empty() {
            let mut pending = self.pending.lock();
            if pending.bytes.is_empty() {
                return false;
            }
            std::mem::swap(&mut pending.bytes, &mut active.group);
            active.group_end = pending.next_seq;
            self.counts.in_flight.store(active.group.len() as u64, Ordering::Relaxed);
            let since = self.counts.since(pending.oldest.take().unwrap_or(began));
            self.counts.oldest_unsynced(since);
            pending.refusals.stalled = self.counts.unsynced_for(began) > STALL_MAX;
        }
        let written = match write_all(&*segment.file, &active.group, segment.end) {
            Ok(()) => {
                segment.end += active.group.len() as u64;
                active.group.clear();
                active.group_end
            }
            Err((taken, error)) => {
                let (bytes, records) = whole_frames(&active.group[..taken]);
                segment.end += bytes as u64;
                active.group.drain(..bytes);
                active.failed = Some(error);
                self.board.ask(|want| want.mend = true);
                self.board.written_seq() + records
            }
        };
        if active.group.capacity() > BUFFER_KEPT_MAX && active.group.is_empty() {
            active.group = Vec::new();
        }
        self.counts.in_flight.store(active.group.len() as u64, Ordering::Relaxed);
        let step = step(&self.settings);
        if segment.allocated < segment.end + step / 2 {
            let len = step.max(segment.end + step - segment.allocated.min(segment.end));
            self.stores.grow(&segment.file, segment.allocated, len);
            segment.allocated += len;
        }
        self.board.wrote(written);
        self.judge(began.elapsed());
        active.failed.is_none()
    }

    /// Gives the file back, and looks who came meanwhile: the keeper writes for them.
    pub(super) fn give_back(&self, active: MutexGuard<'_, Active>) {
        drop(active);
        if self.board.someone_waits() {
            self.board.ask(|want| want.write = true);
        }
    }

    fn judge(&self, took: Duration) {
        if took > SLOW_WRITE {
            self.slow.store(true, Ordering::Relaxed);
        } else if took < FAST_WRITE && self.slow.load(Ordering::Relaxed) {
            self.slow.store(false, Ordering::Relaxed);
        }
    }

    /// A sync begins: of what is appended later, the first arms the next.
    pub(super) fn disarm(&self) {
        self.armed.store(false, Ordering::SeqCst);
        self.board.flushing();
    }

    /// Gives up all that was numbered and not written, and refuses more.
    pub(super) fn break_with(&self, why: &Unrecorded) {
        let mut active = self.active.lock();
        let written_seq = self.board.written_seq();
        let mut pending = self.pending.lock();
        pending.refusals.broken = Some(why.clone());
        pending.bytes = Vec::new();
        pending.oldest = None;
        pending.next_seq = written_seq;
        drop(pending);
        active.group = Vec::new();
        active.group_end = written_seq;
        self.counts.in_flight.store(0, Ordering::Relaxed);
        self.board.broke(self.board.epoch(), written_seq, why);
    }

    /// Takes records again, this one first.
    pub(super) fn resume(&self, first: Option<&Draft>) {
        self.board.resumed();
        self.disarm();
        let mut pending = self.pending.lock();
        pending.refusals.broken = None;
        if let Some(draft) = first {
            // The queue is empty: it fits.
            self.put(&mut pending, draft).ok();
        }
    }

    pub(super) fn set_low(&self, low: bool) {
        let mut pending = self.pending.lock();
        if pending.refusals.low != low {
            pending.refusals.low = low;
            let log = self.settings.name;
            match low {
                true => tracing::error!(log, "the disk is full, records are refused"),
                false => tracing::info!(log, "the disk has space again"),
            }
        }
    }

    pub(super) fn answered(&self) {
        self.pending.lock().refusals.stalled = false;
    }

    pub(super) fn missed(&self, arrived: SystemTime) {
        self.counts.dropped.fetch_add(1, Ordering::Relaxed);
        self.put_missed(Missed { count: 1, first: arrived, last: arrived });
    }

    pub(super) fn put_missed(&self, missed: Missed) {
        let mut all = self.missed.lock();
        *all = Some(all.map_or(missed, |all| all.and(missed)));
    }

    pub(super) fn take_missed(&self) -> Option<Missed> {
        self.missed.lock().take()
    }

    pub(super) fn check(&self) -> Result<(), Unrecorded> {
        self.pending.lock().refusals.first().map_or(Ok(()), Err)
    }

    /// Takes no more records; gives what tells the end, once.
    pub(super) fn close(&self) -> Option<oneshot::Receiver<()>> {
        let mut closing = self.closing.lock();
        if std::mem::replace(&mut self.pending.lock().refusals.closed, true) {
            return None;
        }
        let (sender, receiver) = oneshot::channel();
        *closing = Some(sender);
        Some(receiver)
    }

    pub(super) fn end(&self) {
        drop(self.closing.lock().take());
    }

    pub(super) fn stats(&self) -> LogStats {
        let now = Instant::now();
        let counts = &self.counts;
        let (records, bytes, queued, waits) = {
            let pending = self.pending.lock();
            let waits = pending.oldest.map_or(Duration::ZERO, |oldest| now - oldest);
            (pending.records, pending.record_bytes, pending.bytes.len() as u64, waits)
        };
        let load = |count: &AtomicU64| count.load(Ordering::Relaxed);
        LogStats {
            records,
            bytes,
            fsyncs: load(&counts.fsyncs),
            dropped: load(&counts.dropped),
            written_seq: self.board.written_seq(),
            synced_seq: self.board.synced_seq(),
            queued_bytes: queued + load(&counts.in_flight),
            segments_sealed: load(&counts.sealed),
            lag: waits.max(counts.unsynced_for(now)),
            free_bytes: load(&counts.free_bytes),
            commit_buckets: std::array::from_fn(|at| load(&counts.commits[at])),
            commit_seconds: Duration::from_nanos(load(&counts.commit_ns)).as_secs_f64(),
        }
    }
}

impl Counts {
    fn since(&self, at: Instant) -> u64 {
        nanos(at.saturating_duration_since(self.base)).max(1)
    }

    fn oldest_unsynced(&self, since: u64) {
        self.unsynced_since.compare_exchange(0, since, Ordering::Relaxed, Ordering::Relaxed).ok();
    }

    /// Age of the oldest record that is written and not on the disk.
    fn unsynced_for(&self, now: Instant) -> Duration {
        let now = self.since(now);
        let age = |since: &AtomicU64| match since.load(Ordering::Relaxed) {
            0 => 0,
            since => now.saturating_sub(since),
        };
        Duration::from_nanos(age(&self.unsynced_since).max(age(&self.syncing_since)))
    }

    /// Called with the segment's lock, by the keeper: what is written by now is being synced.
    pub(super) fn sync_begins(&self) {
        let since = self.unsynced_since.swap(0, Ordering::Relaxed);
        let before = self.syncing_since.load(Ordering::Relaxed);
        let oldest = if before == 0 { since } else { before };
        self.syncing_since.store(oldest, Ordering::Relaxed);
    }

    pub(super) fn sync_ended(&self, took: Duration, done: bool) {
        self.fsyncs.fetch_add(1, Ordering::Relaxed);
        let took = nanos(took);
        let bucket = LATENCY_BOUNDS_NS.partition_point(|bound| *bound < took);
        self.commits[bucket].fetch_add(1, Ordering::Relaxed);
        self.commit_ns.fetch_add(took, Ordering::Relaxed);
        if done {
            self.syncing_since.store(0, Ordering::Relaxed);
        }
    }

    /// Everything that was written is on the disk.
    pub(super) fn all_synced(&self) {
        self.syncing_since.store(0, Ordering::Relaxed);
        self.unsynced_since.store(0, Ordering::Relaxed);
    }
}

/// Length and number of the whole frames at the start of bytes that are frames.
fn whole_frames(bytes: &[u8]) -> (usize, u64) {
    let (mut whole, mut records) = (0, 0);
    while let Parsed::Frame(frame) = frame::parse(&bytes[whole..]) {
        (whole, records) = (whole + frame.bytes.len(), records + 1);
    }
    (whole, records)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

/// Nanoseconds since 1970, as records have them.
pub(super) fn unix_nanos(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// Starts one of the log's own threads, which nothing works without.
pub(super) fn spawn(
    shared: &Arc<Shared>,
    role: &str,
    work: impl FnOnce(&Shared) + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let name = format!("{}-{role}", shared.settings.name);
    let shared = shared.clone();
    let named = name.clone();
    std::thread::Builder::new()
        .name(named)
        .spawn(move || crate::panics::fatal(&name, || work(&shared)))
}
