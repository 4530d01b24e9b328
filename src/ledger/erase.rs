//! Takes payloads out of records that stay: what was in them is gone, their proofs go on to hold.
//!
//! ```text
//! order ─▶ record in the log of changes, on the disk ─▶ key of the subject overwritten
//!                                                    ─▶ each sealed segment: copy without the
//!                                                       payloads, synced, renamed over it
//!                                                    ─▶ copies elsewhere (hook)
//!                                                    ─▶ <ledger>/erased: done up to this record
//! ```
//!
//! A frame without its payload keeps the payload's salted hash, which is what its leaf was made of.
//!
//! Invariants:
//! - No payload goes before the record that says so is on the disk.
//! - A segment is the old one or the new one, whenever the power fails. What was begun is ended
//!   after the next start, from the records alone.
//! - Only predictions and feedback can be erased: never a record that says what was done.
//! - What is damaged stays as it is, and where it is: it is evidence. It holds up nothing else, and
//!   whoever erases is told how many records could not be read.

use std::fs::File;
use std::io::{self, BufWriter, Read as _, Seek as _, SeekFrom, Write as _};
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::durable::{self, PUBLIC, TEMPORARY};
use super::frame::{self, Form, Frame, MARK, SEGMENT_HEAD_BYTES};
use super::log::Unrecorded;
use super::proofs::now_ns;
use super::reader::{self, Damage, Piece, ReadError, SegmentFile, SegmentReader};
use super::record::{Head, Kind, Payload, Record};
use super::subjects::Tag;
use super::{ADMIN, FEEDBACK, Ledger, PREDICTIONS};

mod offline;

pub use offline::{OfflineError, erase_offline};

/// Number after the last record of the log of changes whose erasure is done.
const DONE: &str = "erased";
/// Where the mark stands in a segment's head.
const MARK_AT: u64 = 8;
/// Ranges of numbers that one record names; what has more becomes several.
pub(super) const RANGES_MAX: usize = 10_000;
/// What such a record calls itself.
const ACTION: &str = "audit.erase";
/// How long a caller waits for the record to be on the disk, and for a segment to be sealed.
const SYNC_MAX: Duration = Duration::from_secs(10);
const SEAL_MAX: Duration = Duration::from_secs(5);
const POLL: Duration = Duration::from_millis(10);
/// Between two tries of what could not be ended at once.
const AGAIN: Duration = Duration::from_secs(5);

/// Numbers of records: from the first up to the one before the second.
pub type Range = (u64, u64);

/// Whose payloads are to go.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Of predictions; what was recorded of them elsewhere (shadows, feedback) goes with them.
    pub ids: Vec<Uuid>,
    pub subject: Option<Tag>,
}

/// Who asked for it, and why.
#[derive(Clone, Debug, Default)]
pub struct Why {
    pub by: String,
    pub reason: String,
}

/// What came of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Erased {
    /// Records whose payload is gone, or goes.
    pub records: u64,
    /// A subject's key was destroyed.
    pub key_destroyed: bool,
    /// Records that cannot be read, and may hold such a payload.
    pub unreadable: u64,
    /// All is done. If not, it is ended in a while: a segment is still written, or a copy in use.
    pub done: bool,
}

#[derive(Debug, thiserror::Error)]
pub enum EraseError {
    #[error("no record here has such a payload{}", besides(*unreadable))]
    Nothing { unreadable: u64 },
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("the erasure cannot be recorded, so nothing was erased: {0}")]
    Unrecorded(#[from] Unrecorded),
    #[error("the record of the erasure is not on the disk yet; it is done once it is")]
    Unsynced,
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

fn besides(unreadable: u64) -> String {
    match unreadable {
        0 => String::new(),
        _ => format!("; {unreadable} records cannot be read, and may"),
    }
}

/// What a record says that payloads, or whole records, went.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Order {
    log: String,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    records: Vec<Range>,
    /// Records before this one are gone whole.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    removed_below: Option<u64>,
    /// Tag of the subject whose key was destroyed, in hex.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    subject: Option<String>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    reason: String,
}

/// The orders in the log of changes from record `from` on, each with its number.
fn orders(ledger: &Path, from: u64) -> Result<Vec<(u64, Order)>, ReadError> {
    let (log, mut found) = (ledger.join(ADMIN), Vec::new());
    if !log.join(reader::SEGMENTS).is_dir() {
        return Ok(found);
    }
    let segments = reader::segments(&log)?;
    let skip = segments.iter().rposition(|segment| segment.first_seq <= from).unwrap_or(0);
    for segment in &segments[skip..] {
        let mut reader = SegmentReader::open(segment)?;
        while let Some(frame) = reader.next_frame()? {
            let seq = frame.seq;
            if seq >= from
                && let Some(order) = order(&frame)
            {
                found.push((seq, order));
            }
        }
    }
    Ok(found)
}

fn order(frame: &Frame<'_>) -> Option<Order> {
    let record = Record::read(frame).ok()?;
    let is_one = matches!(record.head.kind(), Kind::Erasure | Kind::Retention);
    serde_json::from_slice(&record.payload.filter(|_| is_one)?.body).ok()
}

/// What may be missing in a log, since a record says so.
#[derive(Clone, Debug, Default)]
pub struct Erasures {
    /// In order, none touching another.
    ranges: Vec<Range>,
    removed_below: u64,
    /// There is no log of changes here to ask.
    unknown: bool,
}

impl Erasures {
    /// # Errors
    /// When the log of changes cannot be read.
    pub fn read(ledger: &Path, log: &str) -> Result<Self, ReadError> {
        let unknown = !ledger.join(ADMIN).join(reader::SEGMENTS).is_dir();
        let mut erasures = Self { unknown, ..Self::default() };
        let mut ranges = Vec::new();
        for (_, order) in orders(ledger, 0)?.into_iter().filter(|(_, order)| order.log == log) {
            ranges.extend(order.records);
            erasures.removed_below =
                erasures.removed_below.max(order.removed_below.unwrap_or_default());
        }
        erasures.ranges = merged(ranges);
        Ok(erasures)
    }

    /// Whether this record's payload may be gone.
    pub fn erased(&self, seq: u64) -> bool {
        self.unknown || within(&self.ranges, seq)
    }

    /// Whether all records before this one may be gone.
    pub fn removed(&self, first: u64) -> bool {
        self.unknown || first <= self.removed_below
    }
}

fn merged(mut ranges: Vec<Range>) -> Vec<Range> {
    ranges.retain(|(from, to)| from < to);
    ranges.sort_unstable();
    let mut merged: Vec<Range> = Vec::new();
    for (from, to) in ranges {
        match merged.last_mut() {
            Some((_, end)) if from <= *end => *end = to.max(*end),
            _ => merged.push((from, to)),
        }
    }
    merged
}

fn within(ranges: &[Range], seq: u64) -> bool {
    let at = ranges.partition_point(|(from, _)| *from <= seq);
    at > 0 && seq < ranges[at - 1].1
}

/// Records of this log with a payload that is wanted gone, and how many cannot be read.
///
/// # Errors
/// When the log cannot be read.
pub fn find(log: &Path, wanted: &Wanted) -> Result<(Vec<Range>, u64), ReadError> {
    let (mut ranges, mut unreadable) = (Vec::new(), 0);
    if !log.join(reader::SEGMENTS).is_dir() {
        return Ok((ranges, unreadable));
    }
    let segments = reader::segments(log)?;
    for (at, segment) in segments.iter().enumerate() {
        let end = segments.get(at + 1).map(|next| next.first_seq);
        unreadable += each(segment, end, |piece| {
            if let Piece::Frame(frame) = piece
                && frame.form == Form::Whole
                && is_wanted(frame, wanted)
            {
                ranges.push((frame.seq, frame.seq + 1));
            }
            Ok(())
        })?;
    }
    Ok((merged(ranges), unreadable))
}

/// Goes through a segment, over what is damaged if it is sealed; how many records that is. `end` is the
/// number of the next segment's first record, if there is one.
pub(super) fn each(
    segment: &SegmentFile,
    end: Option<u64>,
    mut take: impl FnMut(&Piece<'_>) -> io::Result<()>,
) -> Result<u64, ReadError> {
    let failed = |error| ReadError::Io { file: segment.path.clone(), error };
    let (mut unreadable, mut to_its_end) = (0, false);
    let mut one = |piece: Piece<'_>| {
        if let Piece::Damage(Damage { seq: (from, to), .. }) = &piece {
            let lost = to.or(end).map_or(1, |to| to.saturating_sub(*from));
            unreadable += lost;
            to_its_end |= to.is_none();
        }
        take(&piece).map_err(failed).map(ControlFlow::Continue)
    };
    match SegmentReader::open_cut(segment) {
        Ok((mut reader, cut)) => {
            reader.around(cut, |error| error, one)?;
            // One that does not say how long it was may end between two records.
            if !to_its_end {
                unreadable += end.map_or(0, |end| end.saturating_sub(reader.next_seq()));
            }
        }
        Err(ReadError::Fault(fault)) if segment.sealed => {
            let (offset, seq) = ((0, None), (segment.first_seq, None));
            one(Piece::Damage(Damage { offset, seq, fault })).map(|_| ())?;
        }
        Err(error) => return Err(error),
    }
    Ok(unreadable)
}

fn is_wanted(frame: &Frame<'_>, wanted: &Wanted) -> bool {
    let Ok(head) = <Head as prost::Message>::decode(frame.head) else { return false };
    let erasable = matches!(head.kind(), Kind::Prediction | Kind::Feedback);
    let is = |id: &[u8]| Uuid::from_slice(id).is_ok_and(|id| wanted.ids.contains(&id));
    let subject = wanted.subject.as_ref().is_some_and(|tag| head.subject[..] == tag[..]);
    erasable && (subject || is(&head.prediction_id) || is(&head.shadow_of))
}

/// Puts a copy of a sealed segment in its place in which these records have no payload, and what is
/// damaged is as it was; whether there was any to take out.
///
/// # Errors
/// When it cannot be done; the segment is what it was.
pub fn rewrite(segment: &SegmentFile, ranges: &[Range]) -> Result<bool, EraseError> {
    let failed = |error| EraseError::Io { path: segment.path.clone(), error };
    if !has_payloads(segment, ranges)? {
        return Ok(false);
    }
    let temporary = segment.path.with_added_extension(TEMPORARY);
    let file = File::create(&temporary).map_err(failed)?;
    let mut copy = BufWriter::with_capacity(1 << 20, file);
    let mut head = [0; SEGMENT_HEAD_BYTES];
    let mut source = File::open(&segment.path).map_err(failed)?;
    let len = source.metadata().map_err(failed)?.len();
    source.read_exact(&mut head).map_err(failed)?;
    // It says how long the segment was. What was missing then goes on to be.
    let missing = frame::mark(&head).map_or(0, |mark| mark.saturating_sub(len));
    head[MARK].fill(0);
    copy.write_all(&head).map_err(failed)?;
    each(segment, None, |piece| match piece {
        Piece::Frame(frame) if frame.form == Form::Whole && within(ranges, frame.seq) => {
            copy.write_all(&frame.erased())
        }
        Piece::Frame(frame) => copy.write_all(frame.bytes),
        Piece::Damage(Damage { offset: (from, to), .. }) => {
            source.seek(SeekFrom::Start(*from))?;
            let len = to.map_or(u64::MAX, |to| to.saturating_sub(*from));
            io::copy(&mut (&source).take(len), &mut copy).map(drop)
        }
    })?;
    let placed = copy.into_inner().map_err(io::IntoInnerError::into_error).and_then(|file| {
        // The mark of a sealed segment is its length.
        let len = u32::try_from(file.metadata()?.len() + missing).unwrap_or(0);
        file.write_all_at(&len.to_le_bytes(), MARK_AT)?;
        file.sync_all()?;
        std::fs::rename(&temporary, &segment.path)?;
        durable::sync_folder_of(&segment.path)
    });
    placed.map_err(failed)?;
    Ok(true)
}

fn has_payloads(segment: &SegmentFile, ranges: &[Range]) -> Result<bool, ReadError> {
    let mut has = false;
    each(segment, None, |piece| {
        if let Piece::Frame(frame) = piece {
            has |= frame.form == Form::Whole && within(ranges, frame.seq);
        }
        Ok(())
    })?;
    Ok(has)
}

/// Rewrites the sealed segments that have any of these records; whether none is left in one that is
/// still written.
fn rewrite_all(log: &Path, ranges: &[Range]) -> Result<bool, EraseError> {
    let segments = reader::segments(log)?;
    let mut done = true;
    for (at, segment) in segments.iter().enumerate() {
        let end = segments.get(at + 1).map_or(u64::MAX, |next| next.first_seq);
        if !ranges.iter().any(|(from, to)| *from < end && *to > segment.first_seq) {
            continue;
        }
        match segment.sealed {
            true => drop(rewrite(segment, ranges)?),
            false => done &= !has_payloads(segment, ranges)?,
        }
    }
    Ok(done)
}

/// Takes payloads out of copies elsewhere: of these records of the log of this name.
pub type Hook = Box<dyn Fn(&str, &[Range]) -> io::Result<()> + Send + Sync>;

impl Ledger {
    /// Says where copies of payloads are. Later calls have no effect.
    pub fn set_erasure_hook(&self, hook: Hook) {
        drop(self.erasure_hook.set(hook));
    }

    /// Erases payloads. Waits for the disk, and for as long as reading the logs takes.
    ///
    /// # Errors
    /// When there are none, or it cannot be recorded. With anything else, what was recorded is done
    /// later.
    pub fn erase(&self, wanted: &Wanted, why: &Why) -> Result<Erased, EraseError> {
        let mut erased = Erased::default();
        let mut orders = Vec::new();
        for log in [PREDICTIONS, FEEDBACK] {
            let (found, unreadable) = find(&self.settings.dir.join(log), wanted)?;
            erased.unreadable += unreadable;
            for ranges in found.chunks(RANGES_MAX) {
                erased.records += ranges.iter().map(|(from, to)| to - from).sum::<u64>();
                orders.push(Order {
                    log: log.to_owned(),
                    records: ranges.to_vec(),
                    reason: why.reason.clone(),
                    ..Order::default()
                });
            }
        }
        if let (Some(tag), Some(keys)) = (&wanted.subject, self.subject_keys()) {
            let path = self.settings.dir.join(super::KEYS);
            let key = keys.existing(tag).map_err(|error| EraseError::Io { path, error })?;
            erased.key_destroyed = key.is_some();
        }
        if orders.is_empty() && !erased.key_destroyed {
            return Err(EraseError::Nothing { unreadable: erased.unreadable });
        }
        if let (Some(tag), true) = (&wanted.subject, erased.key_destroyed) {
            orders.push(Order {
                log: PREDICTIONS.to_owned(),
                subject: Some(hex(tag)),
                reason: why.reason.clone(),
                ..Order::default()
            });
        }
        self.record(&orders, why)?;
        let until = Instant::now() + SEAL_MAX;
        loop {
            erased.done = self.erase_recorded()?;
            if erased.done || Instant::now() > until {
                return Ok(erased);
            }
            std::thread::sleep(POLL);
        }
    }

    fn record(&self, orders: &[Order], why: &Why) -> Result<(), EraseError> {
        let mut last = 0;
        for order in orders {
            let count = order.records.iter().map(|(from, to)| to - from).sum();
            let head = Head {
                kind: Kind::Erasure.into(),
                time_ns: now_ns(),
                principal: why.by.clone(),
                action: ACTION.to_owned(),
                count,
                ..Head::default()
            };
            let body = serde_json::to_vec(order).unwrap_or_default();
            let payload = Payload { body: body.into(), ..Payload::default() };
            last = self.append_admin(&head, &payload)?.seq;
        }
        let until = Instant::now() + SYNC_MAX;
        while self.admin.stats().synced_seq <= last {
            self.admin.check()?;
            if Instant::now() > until {
                return Err(EraseError::Unsynced);
            }
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// Does what the log of changes says and is not done yet; whether all of it is now.
    fn erase_recorded(&self) -> Result<bool, EraseError> {
        let _one_at_a_time = self.erasing.lock();
        let dir = &self.settings.dir;
        let from = done_up_to(dir)?;
        let durable = self.admin.stats().synced_seq;
        let mut up_to = from;
        for (seq, order) in orders(dir, from)?.into_iter().filter(|(seq, _)| *seq < durable) {
            if !self.obey(&order)? {
                self.set_done(from, up_to)?;
                return Ok(false);
            }
            up_to = seq + 1;
        }
        self.set_done(from, up_to)?;
        Ok(true)
    }

    fn set_done(&self, from: u64, up_to: u64) -> Result<(), EraseError> {
        let path = self.settings.dir.join(DONE);
        if from == up_to {
            return Ok(());
        }
        durable::replace(&path, PUBLIC, format!("{up_to}\n").as_bytes())
            .map_err(|error| EraseError::Io { path, error })
    }

    fn obey(&self, order: &Order) -> Result<bool, EraseError> {
        if let Some(tag) = order.subject.as_deref().and_then(unhex)
            && let Some(keys) = self.subject_keys()
        {
            let path = self.settings.dir.join(super::KEYS);
            keys.destroy(&tag).map_err(|error| EraseError::Io { path, error })?;
        }
        // Only these names are folders of ours.
        let Some(log) = [PREDICTIONS, FEEDBACK].into_iter().find(|name| *name == order.log) else {
            return Ok(true);
        };
        if order.records.is_empty() {
            return Ok(true);
        }
        let ranges = merged(order.records.clone());
        let dir = self.settings.dir.join(log);
        if !rewrite_all(&dir, &ranges)? {
            self.logs().filter(|(name, _)| *name == log).for_each(|(_, log)| log.seal());
            return Ok(false);
        }
        match self.erasure_hook.get().map(|hook| hook(log, &ranges)) {
            Some(Err(error)) => {
                tracing::warn!(log, %error, "a copy of what is erased is still there");
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// Ends what the last process began, and what could not be ended at once, on a thread of its own.
    pub(super) fn keep_erasing(self: &Arc<Self>) -> io::Result<()> {
        let ledger = Arc::downgrade(self);
        let run = move || {
            while let Some(wait) = crate::panics::caught(|| again(&ledger)).flatten() {
                std::thread::sleep(wait);
            }
        };
        std::thread::Builder::new().name("erasure".to_owned()).spawn(run).map(drop)
    }
}

/// `None` once the ledger is gone.
fn again(ledger: &Weak<Ledger>) -> Option<Duration> {
    let ledger = ledger.upgrade()?;
    if let Err(error) = ledger.erase_recorded() {
        tracing::warn!(%error, "an erasure is not done yet");
    }
    Some(AGAIN)
}

fn done_up_to(ledger: &Path) -> Result<u64, EraseError> {
    let path = ledger.join(DONE);
    match std::fs::read_to_string(&path) {
        // Whatever else it says: doing it once more does no harm.
        Ok(text) => Ok(text.trim().parse().unwrap_or(0)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(EraseError::Io { path, error }),
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<Tag> {
    let digit =
        |at: usize| text.get(at * 2..at * 2 + 2).and_then(|two| u8::from_str_radix(two, 16).ok());
    let bytes: Option<Vec<u8>> = (0..32).map(digit).collect();
    bytes.filter(|_| text.len() == 64)?.try_into().ok()
}

#[cfg(test)]
mod tests;
