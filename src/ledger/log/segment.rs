//! One file of a log, from the space that is taken ahead to the seal.
//!
//! ```text
//! prepare ─▶ spare-N.new ──begin──▶ <first_seq>.open ──seal──▶ <first_seq>.seg
//!            space taken             head, then frames           cut to its length
//! ```
//!
//! Four bytes of the head, which no checksum covers, are the *mark*: in an open segment a length up
//! to which everything is known to be on the disk, in a sealed one its length. A mark of zero says
//! nothing.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use super::disk::{Disk, DiskFile, read_all, write_all};
use super::{LogSettings, frame, reader};
use crate::ledger::frame::{MARK, Parsed, SEGMENT_HEAD_BYTES, SegmentHead, WriterId};

/// Largest of the steps that space is taken in: a log in which little happens takes little.
pub(super) const ALLOCATE_STEP: u64 = 8 << 20;
/// Name of a file that is prepared.
pub(super) const PREPARED: &str = "new";
/// Bytes that are copied at once from a segment that failed.
const COPY_BYTES: usize = 1 << 20;

/// Where frames are written.
pub(super) struct Segment {
    pub(super) file: Arc<dyn DiskFile>,
    pub(super) path: PathBuf,
    pub(super) first_seq: u64,
    /// End of what was written, and of what is on the disk.
    pub(super) end: u64,
    pub(super) synced_end: u64,
    /// End of what space was taken for, or asked for.
    pub(super) allocated: u64,
    pub(super) began: Instant,
}

/// A file with space and without a name of its own yet.
pub(super) struct Spare {
    file: Arc<dyn DiskFile>,
    path: PathBuf,
    allocated: u64,
}

impl Spare {
    /// Takes the space of a segment and has that on the disk: all that can be done before the first
    /// number is known.
    pub(super) fn prepare(disk: &dyn Disk, settings: &LogSettings, name: u64) -> io::Result<Self> {
        let folder = settings.dir.join(reader::SEGMENTS);
        let path = folder.join(format!("spare-{name}.{PREPARED}"));
        let file = disk.create(&path)?;
        let allocated = step(settings);
        match file.allocate(0, allocated).and_then(|()| file.sync()) {
            Ok(()) => Ok(Self { file, path, allocated }),
            Err(error) => {
                drop(file);
                // What is left of it is removed when the log is opened again.
                disk.remove(&path).ok();
                Err(error)
            }
        }
    }

    pub(super) fn discard(self, disk: &dyn Disk) {
        if let Err(error) = disk.remove(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "a prepared segment stays");
        }
    }

    fn write_head(&self, writer: WriterId, log: &str, first_seq: u64) -> io::Result<()> {
        let created = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let head = SegmentHead {
            log: log.to_owned(),
            writer,
            first_seq,
            created_ns: u64::try_from(created.as_nanos()).unwrap_or(u64::MAX),
        };
        write_all(&*self.file, &head.encode(), 0).map_err(|(_, error)| error)
    }

    /// Makes it the segment that begins with this number. The name is not on the disk yet.
    pub(super) fn begin(
        self,
        disk: &dyn Disk,
        settings: &LogSettings,
        writer: WriterId,
        first_seq: u64,
    ) -> Result<Segment, (Self, io::Error)> {
        // The head first, so that no segment is ever seen without one.
        let written =
            self.write_head(writer, settings.name, first_seq).and_then(|()| self.file.sync());
        match written {
            Err(error) => Err((self, error)),
            Ok(()) => self.adopt(disk, settings, first_seq, SEGMENT_HEAD_BYTES as u64),
        }
    }

    /// The same, with what stands in `old` behind its synced end and then `group`; all of it is on
    /// the disk before it gets its name. Whole frames or nothing are copied: when what is to be
    /// copied cannot be read, [`Lost`].
    pub(super) fn rescue(&self, from: &Rescued<'_>) -> io::Result<Result<u64, Lost>> {
        let mut end = SEGMENT_HEAD_BYTES as u64;
        if let Some(old) = from.old {
            match copy(old, &*self.file, from.seqs.clone())? {
                Ok(copied) => end += copied,
                Err(lost) => return Ok(Err(lost)),
            }
        }
        self.write_head(from.writer, from.log, from.seqs.start)?;
        write_all(&*self.file, from.group, end).map_err(|(_, error)| error)?;
        self.file.sync()?;
        Ok(Ok(end + from.group.len() as u64))
    }

    /// Gives what [`Spare::rescue`] made its name, which is not on the disk yet either.
    pub(super) fn adopt(
        self,
        disk: &dyn Disk,
        settings: &LogSettings,
        first_seq: u64,
        end: u64,
    ) -> Result<Segment, (Self, io::Error)> {
        let path = reader::segment_path(&settings.dir, first_seq, false);
        match disk.rename(&self.path, &path) {
            Err(error) => Err((self, error)),
            Ok(()) => Ok(self.named(path, first_seq, end)),
        }
    }

    fn named(self, path: PathBuf, first_seq: u64, end: u64) -> Segment {
        Segment {
            file: self.file,
            path,
            first_seq,
            end,
            synced_end: SEGMENT_HEAD_BYTES as u64,
            allocated: self.allocated.max(end),
            began: Instant::now(),
        }
    }
}

/// Space is taken ahead in steps of this much.
pub(super) fn step(settings: &LogSettings) -> u64 {
    ALLOCATE_STEP.min(settings.segment_bytes).max(SEGMENT_HEAD_BYTES as u64)
}

/// What is taken along from a segment that failed.
pub(super) struct Rescued<'a> {
    pub(super) old: Option<&'a OldSegment>,
    /// Numbers of the frames in `old` that are not known to be on the disk.
    pub(super) seqs: std::ops::Range<u64>,
    /// Frames that were not written anywhere.
    pub(super) group: &'a [u8],
    pub(super) writer: WriterId,
    pub(super) log: &'a str,
}

/// A segment that nothing is written to any more.
#[derive(Clone)]
pub(super) struct OldSegment {
    pub(super) file: Arc<dyn DiskFile>,
    pub(super) path: PathBuf,
    pub(super) end: u64,
    pub(super) synced_end: u64,
}

impl From<&Segment> for OldSegment {
    fn from(segment: &Segment) -> Self {
        Self {
            file: segment.file.clone(),
            path: segment.path.clone(),
            end: segment.end,
            synced_end: segment.synced_end,
        }
    }
}

/// What was to be copied is not what was written.
#[derive(Debug)]
pub(super) struct Lost;

/// Copies the frames of `old` behind its synced end, each of which must be whole and have its
/// number.
fn copy(
    old: &OldSegment,
    to: &dyn DiskFile,
    seqs: std::ops::Range<u64>,
) -> io::Result<Result<u64, Lost>> {
    let mut buffer = Vec::new();
    let (mut next, mut at, mut out) = (seqs.start, old.synced_end, SEGMENT_HEAD_BYTES as u64);
    while at < old.end {
        let want = usize::try_from(old.end - at).unwrap_or(usize::MAX);
        let want = want.min(COPY_BYTES.max(buffer.len() * 2));
        buffer.resize(want, 0);
        match read_all(&*old.file, &mut buffer, at) {
            Ok(read) if read == want => {}
            _ => return Ok(Err(Lost)),
        }
        let mut whole = 0;
        while let Parsed::Frame(frame) = frame::parse(&buffer[whole..]) {
            if frame.seq != next {
                return Ok(Err(Lost));
            }
            (next, whole) = (next + 1, whole + frame.bytes.len());
        }
        // Not one frame in as much as any may have, or in all there is.
        if whole == 0 && (want as u64 == old.end - at || want > frame::FRAME_BYTES_MAX) {
            return Ok(Err(Lost));
        }
        write_all(to, &buffer[..whole], out).map_err(|(_, error)| error)?;
        (at, out) = (at + whole as u64, out + whole as u64);
    }
    let complete = next == seqs.end;
    Ok(if complete { Ok(out - SEGMENT_HEAD_BYTES as u64) } else { Err(Lost) })
}

/// Says in the head how far the segment is on the disk. Reaches the disk with the next sync, and
/// harms nothing if it does not.
pub(super) fn mark(file: &dyn DiskFile, len: u64) -> io::Result<()> {
    // A segment that is larger has no mark.
    let mark = u32::try_from(len).unwrap_or(0).to_le_bytes();
    write_all(file, &mark, MARK.start as u64).map_err(|(_, error)| error)
}

/// Ends a segment: cuts it to `len`, and names it as one that does not change any more.
pub(super) fn seal(disk: &dyn Disk, file: &dyn DiskFile, path: &Path, len: u64) -> io::Result<()> {
    file.truncate(len)?;
    mark(file, len)?;
    file.sync()?;
    name_sealed(disk, path)
}

/// Names a segment as sealed, whatever is in it.
pub(super) fn name_sealed(disk: &dyn Disk, path: &Path) -> io::Result<()> {
    disk.rename(path, &path.with_extension(reader::SEALED))?;
    match path.parent() {
        Some(folder) => disk.sync_dir(folder),
        None => Ok(()),
    }
}
