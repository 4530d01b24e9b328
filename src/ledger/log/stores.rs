//! What is done to files away from the path of any record: space taken ahead, segments sealed, the
//! disk's free space watched.
//!
//! The spare segment is the reserve: with it, a log whose disk has become full can still end what
//! it has begun and say what is missing.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use super::disk::{DiskFile, is_full};
use super::segment::{self, ALLOCATE_STEP, OldSegment, Spare};
use super::shared::Shared;

/// How often free space is looked at, and what failed is tried again.
const TICK: Duration = Duration::from_secs(1);

/// Where space is to be taken, from where on, and how much.
type Grow = (Arc<dyn DiskFile>, u64, u64);
/// A segment and its length.
type Seal = (OldSegment, u64);

#[derive(Default)]
pub(super) struct Stores {
    inner: Mutex<Inner>,
    call: Condvar,
    spares: AtomicU64,
}

#[derive(Default)]
struct Inner {
    spare: Option<Spare>,
    grow: Vec<Grow>,
    seals: VecDeque<Seal>,
    asked: bool,
    stop: bool,
}

impl Stores {
    /// Has space taken for a segment.
    pub(super) fn grow(&self, file: &Arc<dyn DiskFile>, from: u64, len: u64) {
        self.inner.lock().grow.push((file.clone(), from, len));
        self.call.notify_one();
    }

    /// Has a segment sealed at this length.
    pub(super) fn seal(&self, old: OldSegment, len: u64) {
        self.inner.lock().seals.push_back((old, len));
        self.call.notify_one();
    }

    /// The segment that is ready, if one is; another is prepared then.
    pub(super) fn take(&self) -> Option<Spare> {
        let mut inner = self.inner.lock();
        inner.asked = true;
        self.call.notify_one();
        inner.spare.take()
    }

    pub(super) fn put_back(&self, spare: Spare, shared: &Shared) {
        let more = {
            let mut inner = self.inner.lock();
            // Nobody would remove it.
            if inner.stop { Some(spare) } else { inner.spare.replace(spare) }
        };
        if let Some(more) = more {
            more.discard(&*shared.disk);
        }
    }

    pub(super) fn prepare(&self, shared: &Shared) -> io::Result<Spare> {
        let name = self.spares.fetch_add(1, Ordering::Relaxed);
        Spare::prepare(&*shared.disk, &shared.settings, name)
    }

    pub(super) fn stop(&self) {
        self.inner.lock().stop = true;
        self.call.notify_one();
    }

    /// Does what is left, and removes what is ready for nothing.
    pub(super) fn finish(&self, shared: &Shared) {
        let (seals, spare) = {
            let mut inner = self.inner.lock();
            (std::mem::take(&mut inner.seals), inner.spare.take())
        };
        seals.iter().for_each(|(old, len)| seal(shared, old, *len));
        if let Some(spare) = spare {
            spare.discard(&*shared.disk);
        }
    }

    /// What is to be done; `None` at the end.
    fn wait(&self) -> Option<(Vec<Grow>, Option<Seal>)> {
        let mut inner = self.inner.lock();
        let until = Instant::now() + TICK;
        while !inner.stop && !inner.asked && inner.grow.is_empty() && inner.seals.is_empty() {
            if self.call.wait_until(&mut inner, until).timed_out() {
                break;
            }
        }
        inner.asked = false;
        (!inner.stop).then(|| (std::mem::take(&mut inner.grow), inner.seals.pop_front()))
    }

    fn has_spare(&self) -> bool {
        self.inner.lock().spare.is_some()
    }
}

/// The thread's work.
pub(super) fn run(shared: &Shared) {
    let mut short = Shortage::default();
    short.look(shared);
    while let Some((grow, old)) = shared.stores.wait() {
        for (file, from, len) in grow {
            short.note(shared, "take space", file.allocate(from, len));
        }
        if let Some((old, len)) = old {
            seal(shared, &old, len);
        }
        short.look(shared);
    }
}

/// Sees to free space and the spare.
#[derive(Default)]
struct Shortage {
    /// Space was asked for and not there.
    denied: bool,
    last: Option<String>,
}

impl Shortage {
    fn look(&mut self, shared: &Shared) {
        if let Some(free) = free_bytes(shared) {
            let enough = shared.settings.free_bytes_min <= free;
            self.denied &= free < 2 * ALLOCATE_STEP;
            shared.set_low(!enough || self.denied);
        }
        if !shared.stores.has_spare() {
            let spare = shared.stores.prepare(shared);
            if let Some(spare) = self.note(shared, "prepare a segment", spare) {
                shared.stores.put_back(spare, shared);
            }
        }
    }

    /// Logs what failed, once as long as it is the same.
    fn note<T>(&mut self, shared: &Shared, what: &str, done: io::Result<T>) -> Option<T> {
        let log = shared.settings.name;
        match done {
            Ok(done) => {
                self.last = None;
                Some(done)
            }
            Err(error) => {
                self.denied |= is_full(&error);
                shared.set_low(
                    self.denied || free_bytes(shared) < Some(shared.settings.free_bytes_min),
                );
                let text = error.to_string();
                if self.last.as_ref() != Some(&text) {
                    tracing::warn!(log, %error, "the ledger cannot {what}");
                    self.last = Some(text);
                }
                None
            }
        }
    }
}

/// What is free now; `None` when the disk does not say.
pub(super) fn free_bytes(shared: &Shared) -> Option<u64> {
    let free = shared.disk.free_bytes(&shared.settings.dir).ok()?;
    shared.counts.free_bytes.store(free, Ordering::Relaxed);
    Some(free)
}

/// A seal that fails is done when the log is opened again: all that it holds is on the disk.
fn seal(shared: &Shared, old: &OldSegment, len: u64) {
    match segment::seal(&*shared.disk, &*old.file, &old.path, len) {
        Ok(()) => {
            shared.counts.sealed.fetch_add(1, Ordering::Relaxed);
        }
        Err(error) => {
            let (log, path) = (shared.settings.name, old.path.display());
            tracing::error!(log, %path, %error, "a segment could not be sealed");
        }
    }
}
