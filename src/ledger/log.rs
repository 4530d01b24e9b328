//! One log: takes records, numbers them without a gap, and hands them to the operating system.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;

use super::frame::{Draft, SegmentHead, WriterId};
use super::reader::{self, ReadError, SEGMENTS, SegmentReader};

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
    /// Most bytes of records that wait to be handed over.
    pub queue_bytes_max: usize,
    /// Records are refused when less than this is free on the disk.
    pub free_bytes_min: u64,
}

/// A record that has its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Appended {
    pub seq: u64,
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
    /// Whole records, and bytes of the last segment that were no whole record.
    pub next_seq: u64,
    pub cut_bytes: u64,
    /// Text of what was damaged in the middle, if anything.
    pub damage: Option<String>,
}

/// Counters of a log, for metrics and `audit stats`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LogStats {
    /// Of this process.
    pub records: u64,
    pub bytes: u64,
    pub fsyncs: u64,
    pub dropped: u64,
    /// Number after the last record that was handed over, and after the last on the disk.
    pub written_seq: u64,
    pub synced_seq: u64,
    pub queued_bytes: u64,
    pub segments_sealed: u64,
}

pub struct Log {
    settings: LogSettings,
    inner: Mutex<Inner>,
}

struct Inner {
    file: File,
    seq: u64,
    bytes: u64,
}

impl Log {
    /// # Errors
    /// When the folder cannot be used, or another process uses it.
    pub fn open(settings: LogSettings, writer: WriterId) -> Result<(Self, Recovery), OpenError> {
        let folder = settings.dir.join(SEGMENTS);
        let failed = |error| OpenError::Io { path: folder.clone(), error };
        std::fs::create_dir_all(&folder).map_err(failed)?;
        let mut recovery = Recovery::default();
        if let Some(last) = reader::segments(&settings.dir)?.pop() {
            let mut reader = SegmentReader::open(&last)?;
            while reader.next_frame()?.is_some() {}
            recovery.next_seq = reader.next_seq();
            let sealed = reader::segment_path(&settings.dir, last.first_seq, true);
            std::fs::rename(&last.path, sealed).map_err(failed)?;
        }
        let path = reader::segment_path(&settings.dir, recovery.next_seq, false);
        let mut file = File::create(path).map_err(failed)?;
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let head = SegmentHead {
            log: settings.name.to_owned(),
            writer,
            first_seq: recovery.next_seq,
            created_ns: u64::try_from(created.as_nanos()).unwrap_or(u64::MAX),
        };
        file.write_all(&head.encode()).map_err(failed)?;
        let inner = Mutex::new(Inner { file, seq: recovery.next_seq, bytes: 0 });
        Ok((Self { settings, inner }, recovery))
    }

    pub fn settings(&self) -> &LogSettings {
        &self.settings
    }

    /// Gives a finished draft its number and a place in the group that is handed over next. Does
    /// not wait for the disk.
    ///
    /// # Errors
    /// When the record can't be taken; it has no number then.
    pub fn append(&self, draft: &Draft) -> Result<Appended, Unrecorded> {
        let mut inner = self.inner.lock();
        let mut bytes = Vec::new();
        draft.put(inner.seq, &mut bytes);
        inner.file.write_all(&bytes).map_err(|error| Unrecorded::Broken(error.to_string()))?;
        let seq = inner.seq;
        inner.seq += 1;
        inner.bytes += bytes.len() as u64;
        Ok(Appended { seq })
    }

    /// Returns when the record has been handed to the operating system.
    ///
    /// # Errors
    /// When it cannot be; it may be in the log nevertheless.
    pub async fn written(&self, _at: Appended) -> Result<(), Unrecorded> {
        Ok(())
    }

    /// Returns when the record is on the disk.
    ///
    /// # Errors
    /// As [`Log::written`].
    pub async fn synced(&self, _at: Appended) -> Result<(), Unrecorded> {
        self.inner.lock().file.sync_data().map_err(|error| Unrecorded::Broken(error.to_string()))
    }

    /// Whether records can be taken now.
    ///
    /// # Errors
    /// Why not.
    pub fn check(&self) -> Result<(), Unrecorded> {
        Ok(())
    }

    pub fn stats(&self) -> LogStats {
        let inner = self.inner.lock();
        LogStats { written_seq: inner.seq, bytes: inner.bytes, ..LogStats::default() }
    }

    /// Asks for the segment that is written to be sealed soon.
    pub fn seal(&self) {}

    /// Hands over what waits, asks it onto the disk, and seals the segment.
    pub async fn close(&self) {}
}
