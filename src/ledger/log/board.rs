//! Who waits for what: callers for their record, the keeper for something to do.
//!
//! One lock guards both lists, so that a caller who does not find its record written is on the list
//! before the next records are called out: nobody is forgotten. Mostly nobody waits for a write, and
//! whoever wrote need not take the lock to see that: a caller counts itself before it looks whether
//! its record is written, and a writer says what it wrote before it looks at the count. With a fence
//! between the two on either side, one of them sees the other.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering, fence};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;

use super::{Appended, Unrecorded};

/// Breaks that are remembered, for callers that ask for a record of before. A caller asks at once.
const BREAKS_MAX: usize = 64;

type Answer = Result<(), Unrecorded>;

struct Waiter {
    seq: u64,
    answer: oneshot::Sender<Answer>,
}

/// What the keeper is asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Want {
    pub(super) write: bool,
    pub(super) sync: bool,
    pub(super) mend: bool,
    /// Nothing came since the timer was set.
    pub(super) due: bool,
    pub(super) stop: Option<Stop>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    /// Everything goes onto the disk first.
    Close,
    /// At once, as if the process had died.
    Drop,
}

/// Numbers from `written_seq` on were taken back: what had them was never written.
struct Break {
    epoch: u64,
    written_seq: u64,
    why: Unrecorded,
}

struct Inner {
    written: Vec<Waiter>,
    synced: Vec<Waiter>,
    /// Of `synced` that call the keeper.
    wake_at: usize,
    epoch: u64,
    breaks: Vec<Break>,
    /// Why nothing can be synced now.
    broken: Option<Unrecorded>,
    /// When what was appended is to be asked onto the disk.
    flush_at: Option<Instant>,
    write: bool,
    mend: bool,
    stop: Option<Stop>,
}

pub(super) struct Board {
    inner: Mutex<Inner>,
    call: Condvar,
    /// Callers that wait for a write, or are about to.
    waiting: AtomicUsize,
    /// Number after the last record that is on the disk.
    synced_seq: AtomicU64,
    /// Number after the last record that was handed over.
    written_seq: AtomicU64,
    /// Times that numbers were taken back.
    epoch: AtomicU64,
}

impl Board {
    pub(super) fn new(next_seq: u64) -> Self {
        let inner = Inner {
            written: Vec::new(),
            synced: Vec::new(),
            wake_at: 1,
            epoch: 0,
            breaks: Vec::new(),
            broken: None,
            flush_at: None,
            write: false,
            mend: false,
            stop: None,
        };
        Self {
            inner: Mutex::new(inner),
            call: Condvar::new(),
            waiting: AtomicUsize::new(0),
            synced_seq: AtomicU64::new(next_seq),
            written_seq: AtomicU64::new(next_seq),
            epoch: AtomicU64::new(0),
        }
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Whether a record is known to be handed over. Reads the number before the epoch: numbers are
    /// given again only after the epoch has changed, so a number of a later epoch shows.
    pub(super) fn is_written(&self, at: Appended) -> bool {
        at.seq < self.written_seq() && at.epoch == self.epoch()
    }

    pub(super) fn written_seq(&self) -> u64 {
        self.written_seq.load(Ordering::Acquire)
    }

    pub(super) fn synced_seq(&self) -> u64 {
        self.synced_seq.load(Ordering::Acquire)
    }

    /// Records up to `next_seq` were handed over.
    pub(super) fn wrote(&self, next_seq: u64) {
        self.written_seq.store(next_seq, Ordering::Release);
        if !self.someone_waits() {
            return;
        }
        let mut inner = self.inner.lock();
        let done = take(&mut inner.written, next_seq);
        self.waiting.store(inner.written.len(), Ordering::Relaxed);
        drop(inner);
        tell(done, &Ok(()));
    }

    /// Records up to `next_seq` are on the disk; how many waited for that.
    pub(super) fn synced(&self, next_seq: u64) -> usize {
        self.synced_seq.store(next_seq, Ordering::Release);
        let done = take(&mut self.inner.lock().synced, next_seq);
        let count = done.len();
        tell(done, &Ok(()));
        count
    }

    /// Whether somebody waits for a write, of those who had not seen what the caller did before.
    pub(super) fn someone_waits(&self) -> bool {
        fence(Ordering::SeqCst);
        self.waiting.load(Ordering::Relaxed) > 0
    }

    /// What became of a record of an earlier epoch; `None`: it was written.
    fn taken_back(inner: &Inner, at: Appended) -> Option<Unrecorded> {
        if at.epoch == inner.epoch {
            return None;
        }
        match inner.breaks.iter().find(|one| one.epoch == at.epoch) {
            Some(one) if at.seq < one.written_seq => None,
            Some(one) => Some(one.why.clone()),
            None => Some(Unrecorded::Broken("asked too late".to_owned())),
        }
    }

    /// The answer for a record, or a place on the list of those who wait for its being written.
    pub(super) fn join_written(&self, at: Appended) -> Result<Answer, oneshot::Receiver<Answer>> {
        let mut inner = self.inner.lock();
        if let Some(why) = Self::taken_back(&inner, at) {
            return Ok(Err(why));
        }
        self.waiting.store(inner.written.len() + 1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        if at.seq < self.written_seq() {
            self.waiting.store(inner.written.len(), Ordering::Relaxed);
            return Ok(Ok(()));
        }
        let (answer, receiver) = oneshot::channel();
        inner.written.push(Waiter { seq: at.seq, answer });
        Err(receiver)
    }

    /// The same for its being on the disk. Calls the keeper.
    pub(super) fn join_synced(&self, at: Appended) -> Result<Answer, oneshot::Receiver<Answer>> {
        let mut inner = self.inner.lock();
        if let Some(why) = Self::taken_back(&inner, at) {
            return Ok(Err(why));
        }
        if at.seq < self.synced_seq() {
            return Ok(Ok(()));
        }
        if let Some(why) = &inner.broken {
            return Ok(Err(why.clone()));
        }
        let (answer, receiver) = oneshot::channel();
        inner.synced.push(Waiter { seq: at.seq, answer });
        if inner.wake_at <= inner.synced.len() {
            self.call.notify_one();
        }
        Err(receiver)
    }

    /// Takes back all numbers from `written_seq` on, and tells those who wait.
    pub(super) fn broke(&self, epoch: u64, written_seq: u64, why: &Unrecorded) {
        let mut inner = self.inner.lock();
        if inner.breaks.len() == BREAKS_MAX {
            inner.breaks.remove(0);
        }
        inner.breaks.push(Break { epoch, written_seq, why: why.clone() });
        inner.epoch = epoch + 1;
        inner.broken = Some(why.clone());
        inner.flush_at = None;
        self.epoch.store(inner.epoch, Ordering::Release);
        let done = take(&mut inner.written, written_seq);
        let mut lost = std::mem::take(&mut inner.written);
        self.waiting.store(0, Ordering::Relaxed);
        lost.append(&mut inner.synced);
        drop(inner);
        tell(done, &Ok(()));
        tell(lost, &Err(why.clone()));
    }

    pub(super) fn resumed(&self) {
        self.inner.lock().broken = None;
    }

    /// Has what was appended asked onto the disk at `at`, if not before.
    pub(super) fn flush_by(&self, at: Instant) {
        self.inner.lock().flush_at.get_or_insert(at);
        self.call.notify_one();
    }

    /// A flush begins: what comes from now on needs another.
    pub(super) fn flushing(&self) {
        let mut inner = self.inner.lock();
        inner.flush_at = None;
        // The keeper looks when it is back; until then nobody need call it.
        inner.wake_at = usize::MAX;
    }

    pub(super) fn ask(&self, change: impl FnOnce(&mut Want)) {
        let mut want = Want::default();
        change(&mut want);
        let mut inner = self.inner.lock();
        inner.write |= want.write;
        inner.mend |= want.mend;
        inner.stop = inner.stop.or(want.stop);
        self.call.notify_one();
    }

    /// Waits for something to do, no longer than to `until`.
    pub(super) fn wait(&self, until: Instant) -> Want {
        let mut inner = self.inner.lock();
        inner.wake_at = 1;
        loop {
            let now = Instant::now();
            let due = inner.flush_at.is_some_and(|at| at <= now);
            let asked = inner.write || inner.mend || inner.stop.is_some();
            if asked || due || !inner.synced.is_empty() || until <= now {
                return Want {
                    write: std::mem::take(&mut inner.write),
                    sync: due || !inner.synced.is_empty(),
                    mend: std::mem::take(&mut inner.mend),
                    due: until <= now,
                    stop: inner.stop,
                };
            }
            let until = inner.flush_at.map_or(until, |at| at.min(until));
            self.call.wait_until(&mut inner, until);
        }
    }

    /// How many wait for the disk.
    pub(super) fn crowd(&self) -> usize {
        self.inner.lock().synced.len()
    }

    /// Waits until so many want the disk, as long as more come within `patience`, in all no longer
    /// than `most`.
    pub(super) fn gather(&self, crowd: usize, patience: Duration, most: Duration) {
        let mut inner = self.inner.lock();
        let until = Instant::now() + most;
        while inner.synced.len() < crowd && inner.stop.is_none() {
            let before = inner.synced.len();
            inner.wake_at = crowd;
            let step = (Instant::now() + patience).min(until);
            while inner.synced.len() < crowd && !self.call.wait_until(&mut inner, step).timed_out()
            {
            }
            if inner.synced.len() == before || until <= Instant::now() {
                break;
            }
        }
    }
}

/// Those whose record is below `next_seq`. They are told without the lock.
fn take(waiters: &mut Vec<Waiter>, next_seq: u64) -> Vec<Waiter> {
    if waiters.is_empty() {
        return Vec::new();
    }
    waiters.extract_if(.., |waiter| waiter.seq < next_seq).collect()
}

fn tell(waiters: Vec<Waiter>, answer: &Answer) {
    for waiter in waiters {
        // Who went meanwhile need not know.
        waiter.answer.send(answer.clone()).ok();
    }
}
