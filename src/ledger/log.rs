//! One log: takes records, numbers them without a gap, and hands them to the operating system.
//!
//! ```text
//! append ──▶ pending ──(whoever stands there: one write)──▶ segment ──keeper: fdatasync──▶ disk
//!            number,     │ leader writes for all,             ▲
//!            copy        │ followers find it done             │ roll: the next one is ready
//!            no waiting  └ slow disk: the keeper writes    stores: spare, seal, free space
//! ```
//!
//! Why each step is safe:
//! - *Append.* Number, epoch and place in the group are given under one lock, so the order of the
//!   bytes is the order of the numbers. It copies; it allocates when the group is larger than any
//!   before, and never waits for the disk. What finds no room is refused: its number goes to the next.
//! - *Hand-over.* Only who holds the file's lock takes a group and writes it, behind what is there.
//!   `written_seq` moves when `pwrite` has taken the bytes: they are the kernel's then, and survive
//!   whatever becomes of the process. A short write is continued; after an error the whole frames
//!   that were taken count as written, and nothing else does.
//! - *Waiting.* A caller first lets those append who are ready on its thread; one write takes them
//!   all. Who cannot get the lock puts itself on the board's list, looks again whether it is
//!   written, and tries the lock once more. Whoever held it meanwhile looks at the list after giving
//!   it back: one of the two sees the other. A caller's thread writes at most one group that is slow;
//!   from then on only the keeper writes, until the disk is fast again.
//! - *Sync.* The keeper notes what is written, then syncs, then moves `synced_seq` to what it noted.
//!   A segment is left only when all of it is on the disk, and a new one's name is on the disk before
//!   anything in it counts as synced: `synced_seq` never speaks of two files.
//! - *A sync or write that failed* is never tried again on the same file: the kernel may have
//!   dropped the pages and call them clean. All from `synced_seq` on is read back (each frame by its
//!   checksum and number), written with the same numbers into a new file, synced, and only then given
//!   a name; after that the old file is cut where the new one begins. A crash in between leaves the
//!   same bytes twice, and the next start cuts the first. Readers that were ahead skip what they have.
//! - *When that fails too* the log is broken: what was numbered and not written is answered with an
//!   error, its numbers are taken back (the epoch tells a number from its successor), and records
//!   are refused until a probe of the keeper succeeds. What was served meanwhile is counted in a gap
//!   record, the first thing that is written then.
//! - *Recovery* cuts nothing but what is behind the last whole frame and was never known to be on
//!   the disk: see `recovery`.
//!
//! Deliberately absent: a queue between request and writer (waking a thread costs 35 us here, a
//! `pwrite` under one), and records held in memory until they are synced (the file has them).

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::{Mutex, MutexGuard};

use super::frame::{Draft, FRAME_BYTES_MAX, WriterId};
use super::reader::ReadError;
use super::{frame, reader, record};

mod board;
mod disk;
mod keeper;
mod recovery;
mod segment;
mod shared;
mod stores;
#[cfg(test)]
mod tests;

use board::Stop;
use disk::{Disk, RealDisk};
use keeper::Keeper;
use shared::{Active, Shared};

/// A caller tries so long to get the file's lock before it waits for whoever has it: a few writes.
const SPIN_MAX: Duration = Duration::from_micros(50);
/// Groups that one caller writes for those who wait, at most.
const LEAD_ROUNDS_MAX: usize = 4;

/// How a log is written.
#[derive(Clone, Debug)]
pub struct LogSettings {
    /// Folder of this log alone.
    pub dir: PathBuf,
    /// `predictions`, `admin` or `feedback`.
    pub name: &'static str,
    /// A segment is sealed at this size.
    pub segment_bytes: u64,
    /// A segment is sealed after this time, if anything is in it.
    pub segment_age_max: Duration,
    /// Longest time between a record's being handed over and its being asked onto the disk.
    pub flush_interval: Duration,
    /// Most bytes of records that wait to be handed over. A record that is larger alone is taken
    /// when nothing waits.
    pub queue_bytes_max: usize,
    /// Records are refused when less than this is free on the disk.
    pub free_bytes_min: u64,
}

/// A record that has its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    pub seq: u64,
    /// Tells it from a later record of the same number, when this one was never written.
    epoch: u64,
}

/// Why a record is not in the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unrecorded {
    #[error("the ledger's queue is full")]
    Full,
    #[error("the ledger's disk is full")]
    DiskFull,
    #[error("the ledger cannot be written: {0}")]
    Broken(String),
    #[error("the record has {bytes} bytes, the limit is {max}")]
    TooLarge { bytes: usize, max: usize },
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: std::io::Error },
    #[error("another process writes the ledger in {}", path.display())]
    Locked { path: PathBuf },
    #[error("{}: {what}", path.display())]
    Foreign { path: PathBuf, what: &'static str },
    #[error(transparent)]
    Read(#[from] ReadError),
}

/// What was found when a log was opened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovery {
    /// Number after the last record, and bytes of the last segment that were no whole record.
    pub next_seq: u64,
    pub cut_bytes: u64,
    /// Text of what was damaged in the middle, if anything: file, offset and what.
    pub damage: Option<String>,
}

/// Counters of a log, for metrics and `audit stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LogStats {
    /// Of this process.
    pub records: u64,
    pub bytes: u64,
    pub fsyncs: u64,
    /// Served without a record.
    pub dropped: u64,
    /// Number after the last record that was handed over, and after the last on the disk.
    pub written_seq: u64,
    pub synced_seq: u64,
    pub queued_bytes: u64,
    pub segments_sealed: u64,
    /// Age of the oldest record that is not on the disk yet.
    pub lag: Duration,
    /// Free on the disk, as it was within the last second.
    pub free_bytes: u64,
    /// Group commits by how long they took, in the buckets of
    /// [`LATENCY_BOUNDS_NS`](crate::observe::LATENCY_BOUNDS_NS), and their sum in seconds.
    pub commit_buckets: [u64; crate::observe::LATENCY_BUCKETS],
    pub commit_seconds: f64,
}

pub struct Log {
    shared: Arc<Shared>,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

impl Log {
    /// # Errors
    /// When the folder cannot be used, or another process uses it. A disk that is full is no error:
    /// the log says so when it is asked, and goes on when there is space.
    pub fn open(settings: LogSettings, writer: WriterId) -> Result<(Self, Recovery), OpenError> {
        Self::open_on(Arc::new(RealDisk), settings, writer)
    }

    /// The same on a disk that may be a test's.
    pub(in crate::ledger) fn open_on(
        disk: Arc<dyn Disk>,
        settings: LogSettings,
        writer: WriterId,
    ) -> Result<(Self, Recovery), OpenError> {
        let lock = recovery::prepare(&settings)?;
        let found = recovery::recover(&*disk, &settings)?;
        let shared = Arc::new(Shared::new(disk, settings, writer, found.next_seq, lock));
        let mut keeper = Keeper::new(shared.clone());
        keeper.start(&found)?;
        let threads = [shared::spawn(&shared, "stores", stores::run), keeper.spawn()];
        let threads = threads.into_iter().collect::<Result<Vec<_>, _>>();
        let path = shared.settings.dir.clone();
        let threads = threads.map_err(|error| OpenError::Io { path, error })?;
        Ok((Self { shared, threads: Mutex::new(threads) }, found))
    }

    pub fn settings(&self) -> &LogSettings {
        &self.shared.settings
    }

    /// Gives a finished draft its number and a place in the group that is handed over next. Does
    /// not wait for the disk.
    ///
    /// # Errors
    /// When the record can't be taken; it has no number then.
    pub fn append(&self, draft: &Draft) -> Result<Appended, Unrecorded> {
        self.shared.append(draft)
    }

    /// Returns when the record has been handed to the operating system.
    ///
    /// # Errors
    /// When it cannot be; it is not in the log then.
    pub async fn written(&self, at: Appended) -> Result<(), Unrecorded> {
        if self.hand_over(at) {
            return Ok(());
        }
        let receiver = match self.shared.board.join_written(at) {
            Ok(answer) => return answer,
            Err(receiver) => receiver,
        };
        self.try_once_more();
        receiver.await.unwrap_or_else(|_| Err(closed()))
    }

    /// Returns when the record is on the disk.
    ///
    /// # Errors
    /// When it cannot be asked there; it may be in the log nevertheless.
    pub async fn synced(&self, at: Appended) -> Result<(), Unrecorded> {
        match self.shared.board.join_synced(at) {
            Ok(answer) => answer,
            Err(receiver) => receiver.await.unwrap_or_else(|_| Err(closed())),
        }
    }

    /// Writes what is pending where the caller stands, if it can have the file soon; whether the
    /// record is written.
    fn hand_over(&self, at: Appended) -> bool {
        let board = &self.shared.board;
        let mut until = None;
        while !board.is_written(at) {
            if self.shared.slow.load(Ordering::Relaxed) {
                return false;
            }
            if let Some(active) = self.shared.active.try_lock() {
                self.lead(active);
                return board.is_written(at);
            }
            let now = Instant::now();
            if *until.get_or_insert(now + SPIN_MAX) < now {
                return false;
            }
            (0..64).for_each(|_| std::hint::spin_loop());
        }
        true
    }

    /// Writes, for the caller and those who wait meanwhile.
    fn lead(&self, mut active: MutexGuard<'_, Active>) {
        for _ in 0..LEAD_ROUNDS_MAX {
            if !self.shared.write_pending(&mut active) {
                break;
            }
        }
        self.shared.give_back(active);
    }

    /// Whoever held the file may have given it back before the caller was on the list.
    fn try_once_more(&self) {
        if !self.shared.slow.load(Ordering::Relaxed)
            && let Some(active) = self.shared.active.try_lock()
        {
            self.lead(active);
        } else if self.shared.slow.load(Ordering::Relaxed) {
            self.shared.board.ask(|want| want.write = true);
        }
    }

    /// Notes that a prediction was answered without a record; a gap record tells how many, and of
    /// what time, as soon as one can be written.
    pub fn missed(&self, arrived: SystemTime) {
        self.shared.missed(arrived);
    }

    /// Whether records can be taken now.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), Unrecorded> {
        self.shared.check()
    }

    pub fn stats(&self) -> LogStats {
        self.shared.stats()
    }

    /// Asks for the segment that is written to be sealed soon, if anything is in it.
    pub fn seal(&self) {
        self.shared.seal_asked.store(true, Ordering::Release);
    }

    /// Hands over what waits, asks it onto the disk, and seals the segment.
    pub async fn close(&self) {
        let done = self.shared.close();
        self.shared.board.ask(|want| want.stop = Some(Stop::Close));
        if let Some(done) = done {
            // The keeper has gone before: nothing is left to wait for.
            done.await.ok();
        }
        self.join();
    }

    fn join(&self) {
        for thread in self.threads.lock().drain(..) {
            // Its panic has ended the process.
            thread.join().ok();
        }
    }
}

/// Ends as a crash would: without a last write, and unsealed. [`Log::close`] is the other way.
impl Drop for Log {
    fn drop(&mut self) {
        self.shared.board.ask(|want| want.stop = Some(Stop::Drop));
        self.join();
    }
}

fn closed() -> Unrecorded {
    Unrecorded::Broken("the log is closed".to_owned())
}

fn too_large(bytes: usize) -> Unrecorded {
    Unrecorded::TooLarge { bytes, max: FRAME_BYTES_MAX }
}
