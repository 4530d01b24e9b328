//! What is done before a log is written: the folder made sure of, the last segment read to its end.
//!
//! What a crash leaves, and what becomes of it:
//! - *Behind the last whole frame* of the open segment the start of a group that was never written
//!   whole. It is cut off, nothing before it is: nobody has an answer for it.
//! - *After a power cut* any sectors of what was not synced may be missing, with whole frames behind
//!   them. They are cut off only if they lie behind the segment's mark, up to which everything is
//!   known to have been on the disk, and the first that is no frame has a sector that was never
//!   written: zeros to its end.
//! - *Anything else* is damage: it is said with file and offset, the file stays as it is and is
//!   sealed, and the sequence goes on after the highest number that is found in it.
//! - *Files that were prepared*, and segments that never had a record, are removed.
//! - *A segment that was left and not sealed* is sealed. If the next begins before it ends (a sync
//!   failed, and the crash came before it was cut), it ends where the next begins: what follows is in
//!   both, byte for byte.
//!
//! Only segments that are not sealed are read, and the last one: as a rule one.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::disk::{Disk, is_full, options};
use super::segment::{self, PREPARED};
use super::{LogSettings, OpenError, Recovery, frame};
use crate::ledger::frame::SEGMENT_HEAD_BYTES;
use crate::ledger::reader::{self, ReadError, SEGMENTS, SegmentFile, SegmentReader};

/// Written whole or not at all by any disk.
const SECTOR: u64 = 512;
const LOCK: &str = "lock";
/// What nobody reads and nobody removes.
const ASIDE: &str = "aside";

/// Makes sure of the folder, and that nobody else writes it as long as the file is held.
pub(super) fn prepare(settings: &LogSettings) -> Result<File, OpenError> {
    let folder = settings.dir.join(SEGMENTS);
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error| OpenError::Io { path, error }
    };
    for path in [&settings.dir, &folder] {
        if std::fs::symlink_metadata(path).is_err() {
            std::fs::create_dir_all(path).map_err(failed(path))?;
        }
        if !std::fs::symlink_metadata(path).map_err(failed(path))?.is_dir() {
            return Err(OpenError::Foreign { path: path.clone(), what: "not a folder" });
        }
        if let Some(parent) = path.parent().filter(|parent| *parent != Path::new("")) {
            File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed(parent))?;
        }
    }
    let path = settings.dir.join(LOCK);
    let file = match options().create(true).truncate(false).open(&path) {
        Err(error) if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
            return Err(OpenError::Foreign { path, what: "a link in the place of the lock" });
        }
        opened => opened.map_err(failed(&path))?,
    };
    if !file.metadata().map_err(failed(&path))?.is_file() {
        return Err(OpenError::Foreign { path, what: "not a plain file" });
    }
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(OpenError::Locked { path: settings.dir.clone() }),
        Err(error) => Err(OpenError::Io { path, error: error.into() }),
    }
}

/// Brings the log into a state in which only whole segments are left.
pub(super) fn recover(disk: &dyn Disk, settings: &LogSettings) -> Result<Recovery, OpenError> {
    let mut found = Recovery::default();
    remove_prepared(disk, settings)?;
    remove_doubles(disk, settings, &mut found)?;
    let mut segments = read(settings)?;
    // What was to take the place of a segment that failed, and has less than that: it was not
    // finished when it got its name, which no disk that keeps its word lets happen.
    for at in (1..segments.len()).rev() {
        if let [(_, Some(older)), (newer, Some(scan))] = &segments[at - 1..=at]
            && newer.first_seq < older.next_seq
            && scan.next_seq < older.next_seq
            && !newer.sealed
        {
            remove(disk, &newer.path)?;
            segments.remove(at);
        }
    }
    let firsts: Vec<u64> = segments.iter().map(|(segment, _)| segment.first_seq).collect();
    for (at, (segment, scan)) in segments.iter().enumerate() {
        let Some(scan) = scan else { continue };
        settle(disk, segment, scan, firsts.get(at + 1).copied(), &mut found)?;
        found.next_seq = found.next_seq.max(scan.next_seq);
    }
    Ok(found)
}

/// The segments; those that are not sealed, and the last, with what is in them.
fn read(settings: &LogSettings) -> Result<Vec<(SegmentFile, Option<Scan>)>, OpenError> {
    let segments = reader::segments(&settings.dir)?;
    let last = segments.len();
    let mut all = Vec::with_capacity(last);
    for (at, segment) in segments.into_iter().enumerate() {
        let facts = std::fs::symlink_metadata(&segment.path);
        if !facts.map_err(|error| failed(&segment.path, error))?.is_file() {
            return Err(OpenError::Foreign { path: segment.path, what: "not a plain file" });
        }
        let wanted = !segment.sealed || at + 1 == last;
        let scan = if wanted { Some(scan(&segment, None)?) } else { None };
        all.push((segment, scan));
    }
    Ok(all)
}

/// Ends a segment that was read. `until` is where the next one begins.
fn settle(
    disk: &dyn Disk,
    segment: &SegmentFile,
    scan: &Scan,
    until: Option<u64>,
    found: &mut Recovery,
) -> Result<(), OpenError> {
    let missing = until.filter(|until| scan.next_seq < *until);
    let damage = scan.damage.clone().or_else(|| {
        let (from, until) = (scan.next_seq, missing?);
        Some(format!(
            "{}: ends before {from}, the next begins with {until}",
            segment.path.display()
        ))
    });
    if let Some(damage) = damage {
        tracing::error!(damage, "a segment of the ledger is damaged; it stays as it is");
        note(found, &damage);
        if segment.sealed {
            return Ok(());
        }
        return tolerated(segment, segment::name_sealed(disk, &segment.path));
    }
    if segment.sealed {
        return Ok(());
    }
    // Behind the end of an earlier one is what the next one has.
    if until.is_none() {
        found.cut_bytes += scan.torn;
    }
    if scan.next_seq == segment.first_seq {
        return remove(disk, &segment.path);
    }
    let end = match until {
        Some(until) if until < scan.next_seq => self::scan(segment, Some(until))?.end,
        _ => scan.end,
    };
    if end == SEGMENT_HEAD_BYTES as u64 {
        return remove(disk, &segment.path);
    }
    let file = disk.open(&segment.path).map_err(|error| failed(&segment.path, error))?;
    tolerated(segment, segment::seal(disk, &*file, &segment.path, end))
}

/// On a full disk a segment stays unsealed until the log is opened with more space.
fn tolerated(segment: &SegmentFile, done: io::Result<()>) -> Result<(), OpenError> {
    match done {
        Err(error) if is_full(&error) => {
            tracing::warn!(path = %segment.path.display(), %error, "a segment stays unsealed");
            Ok(())
        }
        done => done.map_err(|error| failed(&segment.path, error)),
    }
}

fn note(found: &mut Recovery, damage: &str) {
    match &mut found.damage {
        Some(all) => {
            all.push_str("; ");
            all.push_str(damage);
        }
        none => *none = Some(damage.to_owned()),
    }
}

/// What was found in a segment.
#[derive(Debug)]
struct Scan {
    /// Number after the last record, and end of the last before anything that is none.
    next_seq: u64,
    end: u64,
    /// Bytes behind that end that may go.
    torn: u64,
    damage: Option<String>,
}

/// Reads a segment to its end, or to the record before `stop`.
fn scan(segment: &SegmentFile, stop: Option<u64>) -> Result<Scan, OpenError> {
    let mut reader = match SegmentReader::open(segment) {
        Ok(reader) => reader,
        Err(ReadError::Fault(fault)) => return without_head(segment, fault.to_string()),
        Err(error) => return Err(error.into()),
    };
    let mut fault = None;
    while stop != Some(reader.next_seq()) {
        match reader.next_frame() {
            Ok(Some(_)) => {}
            Ok(None) => break,
            Err(ReadError::Fault(found)) => {
                fault = Some(found.to_string());
                break;
            }
            Err(error) => return Err(error.into()),
        }
    }
    let (end, next_seq) = (reader.offset(), reader.next_seq());
    if stop == Some(next_seq) || (segment.sealed && fault.is_none()) {
        return Ok(Scan { next_seq, end, torn: 0, damage: None });
    }
    let (head, rest) = bytes(&segment.path, end).map_err(|error| failed(&segment.path, error))?;
    let used = used(&rest);
    let behind_mark = frame::mark(&head).is_none_or(|mark| mark <= end);
    if fault.is_none() && used == 0 && behind_mark {
        return Ok(Scan { next_seq, end, torn: 0, damage: None });
    }
    let last = highest(&rest, used, next_seq);
    let torn =
        fault.is_none() && behind_mark && (last.is_none() || never_written(end, &rest[..used]));
    if torn {
        return Ok(Scan { next_seq, end, torn: used as u64, damage: None });
    }
    let damage = fault.unwrap_or_else(|| {
        let what = if used == 0 { "the end is missing" } else { "no frame" };
        format!("{}: at byte {end}: {what}", segment.path.display())
    });
    let next_seq = last.map_or(next_seq, |last| last + 1);
    Ok(Scan { next_seq, end, torn: 0, damage: Some(damage) })
}

/// A file that does not begin as a segment does: one that was never synced, or damage.
fn without_head(segment: &SegmentFile, fault: String) -> Result<Scan, OpenError> {
    let end = SEGMENT_HEAD_BYTES as u64;
    let (head, rest) = bytes(&segment.path, end).map_err(|error| failed(&segment.path, error))?;
    let used = used(&rest);
    let last = highest(&rest, used, segment.first_seq);
    let next_seq = last.map_or(segment.first_seq, |last| last + 1);
    let blank = head.iter().all(|byte| *byte == 0);
    if blank && last.is_none() && !segment.sealed {
        return Ok(Scan { next_seq, end, torn: used as u64, damage: None });
    }
    Ok(Scan { next_seq, end, torn: 0, damage: Some(fault) })
}

/// A segment's head, or what there is of it, and all from `offset` on.
fn bytes(path: &Path, offset: u64) -> io::Result<(Vec<u8>, Vec<u8>)> {
    let mut file = options().write(false).open(path)?;
    let (mut head, mut rest) = (Vec::new(), Vec::new());
    file.by_ref().take(SEGMENT_HEAD_BYTES as u64).read_to_end(&mut head)?;
    file.seek(SeekFrom::Start(offset))?;
    file.read_to_end(&mut rest)?;
    Ok((head, rest))
}

/// How many bytes there are to the last that is not zero.
fn used(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

/// The highest number of a whole frame that begins in the first `used` of these bytes.
fn highest(bytes: &[u8], used: usize, next_seq: u64) -> Option<u64> {
    let (mut at, mut last) = (0, None);
    while at < used {
        match frame::later(&bytes[at..], next_seq) {
            Some(frame) => {
                last = last.max(Some(frame.seq));
                at += frame.bytes.len();
            }
            None => at += 1,
        }
    }
    last
}

/// Whether what should be a frame at `offset` has a sector of zeros, from its start or from where
/// the frame before ends: one that the disk never wrote. `bytes` begins there.
fn never_written(offset: u64, bytes: &[u8]) -> bool {
    let len = bytes.first_chunk().map_or(0, |len| u64::from(u32::from_le_bytes(*len)));
    let end = offset + (len + 8).min(bytes.len() as u64);
    let mut from = offset;
    while from < end {
        let to = (from / SECTOR + 1) * SECTOR;
        let in_bytes =
            |at: u64| usize::try_from(at - offset).unwrap_or(usize::MAX).min(bytes.len());
        if bytes[in_bytes(from)..in_bytes(to)].iter().all(|byte| *byte == 0) {
            return true;
        }
        from = to;
    }
    false
}

fn failed(path: &Path, error: io::Error) -> OpenError {
    OpenError::Io { path: path.to_owned(), error }
}

fn remove(disk: &dyn Disk, path: &Path) -> Result<(), OpenError> {
    disk.remove(path).map_err(|error| failed(path, error))
}

fn remove_prepared(disk: &dyn Disk, settings: &LogSettings) -> Result<(), OpenError> {
    let folder = settings.dir.join(SEGMENTS);
    for entry in std::fs::read_dir(&folder).map_err(|error| failed(&folder, error))? {
        let path = entry.map_err(|error| failed(&folder, error))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.starts_with("spare-") && name.ends_with(PREPARED) {
            remove(disk, &path)?;
        }
    }
    Ok(())
}

/// A segment that is there both sealed and not: a disk that kept both names, or somebody's copy.
fn remove_doubles(
    disk: &dyn Disk,
    settings: &LogSettings,
    found: &mut Recovery,
) -> Result<(), OpenError> {
    for sealed in reader::segments(&settings.dir)?.into_iter().filter(|segment| segment.sealed) {
        let path = reader::segment_path(&settings.dir, sealed.first_seq, false);
        if std::fs::symlink_metadata(&path).is_err() {
            continue;
        }
        let open = SegmentFile { sealed: false, path: path.clone(), ..sealed.clone() };
        let (whole, more) = (scan(&sealed, None)?, scan(&open, None)?);
        if whole.damage.is_none() && more.next_seq <= whole.next_seq {
            remove(disk, &path)?;
            continue;
        }
        let aside = path.with_extension(ASIDE);
        disk.rename(&path, &aside).map_err(|error| failed(&path, error))?;
        note(found, &format!("{}: not what the sealed one has", aside.display()));
    }
    Ok(())
}
