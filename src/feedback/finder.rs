//! Finds records of a log without reading all of it: a prediction by its id, months later, or a
//! record by its number.
//!
//! ```text
//! segments that were written when the id says ─▶ marks: one for each 64 KiB, with the times of
//!                                                its ids ─▶ the few KiB that can have it ─▶ record
//! ```
//!
//! Ids are UUIDv7: they begin with the millisecond that their prediction came in, and records are
//! appended soon after that. Marks of a segment are made by reading it once, when somebody first
//! asks for something that may be in it, and kept while others are asked for less.
//!
//! Invariants:
//! - Memory: [`MARKED_MAX`] segments, some 40 bytes for each [`STRIDE`] of them.
//! - One call reads at most [`SEGMENTS_READ_MAX`] segments from end to end; the next goes on there.
//! - A segment that was written anew, since payloads of it were erased, is marked anew.

use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::time::Duration;

use uuid::Uuid;

use super::body::made_ms;
use crate::ledger::export::View;
use crate::ledger::frame::Frame;
use crate::ledger::reader::{self, Fault, ReadError, SegmentFile, SegmentReader};
use crate::ledger::record::Kind;

/// Bytes of a segment between two marks.
const STRIDE: u64 = 64 << 10;
/// Segments whose marks are kept; of 64 MiB each they are 32 GiB.
pub const MARKED_MAX: usize = 512;
/// Segments that are read whole for one call.
pub const SEGMENTS_READ_MAX: usize = 16;
/// A clock that was set back by no more than this hides nothing.
const CLOCK_SLACK_MS: u64 = 600_000;

/// Where a part of a segment begins, and the times of ids in it.
#[derive(Clone, Copy, Debug)]
struct Mark {
    offset: u64,
    first_seq: u64,
    min_ms: u64,
    max_ms: u64,
}

/// What is known of a segment.
#[derive(Debug)]
struct Marked {
    identity: (u64, u64),
    marks: Vec<Mark>,
    /// Where reading goes on.
    end: u64,
    next_seq: u64,
    /// Nothing is added any more.
    complete: bool,
    used: u64,
}

/// Looks into one log.
pub(super) struct Finder {
    log: PathBuf,
    /// A record is appended so long after its call came, at most.
    within: Duration,
    /// When each segment was begun, in milliseconds.
    begun: HashMap<u64, u64>,
    marked: HashMap<u64, Marked>,
    /// Grows with each use of a segment's marks.
    clock: u64,
}

/// What a call has left to read.
struct Budget(usize);

impl Finder {
    /// Of the log in this folder, which need not be there yet.
    pub(super) fn new(log: PathBuf, within: Duration) -> Self {
        Self { log, within, begun: HashMap::new(), marked: HashMap::new(), clock: 0 }
    }

    /// Gives `take` the predictions of these ids that are there; whether all places were looked
    /// at. If not, asking again goes on.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub(super) fn predictions(
        &mut self,
        ids: &[Uuid],
        mut take: impl FnMut(Uuid, &View<'_>),
    ) -> Result<bool, ReadError> {
        let made = |id: &Uuid| made_ms(id.as_bytes());
        let mut wanted: HashSet<Uuid> =
            ids.iter().filter(|id| made(id).is_some()).copied().collect();
        let (segments, mut budget, mut all) = (self.segments()?, Budget(SEGMENTS_READ_MAX), true);
        for (at, segment) in segments.iter().enumerate() {
            let next = segments.get(at + 1).map(|next| next.first_seq);
            let (from, until) = self.times(segment.first_seq, next);
            let mut times: Vec<u64> = wanted.iter().filter_map(made).collect();
            times.sort_unstable();
            let any = |from, until| {
                let first = times.partition_point(|made_ms| *made_ms < from);
                times.get(first).is_some_and(|made_ms| *made_ms <= until)
            };
            if !any(from, until) {
                continue;
            }
            let wants = |mark: &Mark| any(mark.min_ms, mark.max_ms);
            let Some(parts) = self.parts(segment, &mut budget, wants)? else {
                all = false;
                continue;
            };
            read(segment, &parts, |view| {
                let is_one = view.kind == Kind::Prediction as u64 && view.shadow_of.is_empty();
                if let Ok(id) = Uuid::from_slice(view.prediction_id)
                    && is_one
                    && wanted.remove(&id)
                {
                    take(id, view);
                }
                !wanted.is_empty()
            })?;
        }
        Ok(all || wanted.is_empty())
    }

    /// When predictions came whose records may be in a segment, in milliseconds.
    fn times(&self, first_seq: u64, next: Option<u64>) -> (u64, u64) {
        let begun = |first_seq| self.begun.get(&first_seq).copied();
        let within = u64::try_from(self.within.as_millis()).unwrap_or(u64::MAX);
        let earlier = within.saturating_add(CLOCK_SLACK_MS);
        let from = begun(first_seq).unwrap_or(0).saturating_sub(earlier);
        let until = next.and_then(begun).unwrap_or(u64::MAX);
        (from, until.saturating_add(CLOCK_SLACK_MS))
    }

    /// Gives `take` the records with these numbers that are there.
    ///
    /// # Errors
    /// When the log cannot be read.
    pub(super) fn records(
        &mut self,
        seqs: &[u64],
        mut take: impl FnMut(&View<'_>),
    ) -> Result<(), ReadError> {
        let mut wanted = seqs.to_vec();
        wanted.sort_unstable();
        let between = |from: u64, to: u64| {
            let at = |seq| wanted.partition_point(|wanted| *wanted < seq);
            &wanted[at(from)..at(to)]
        };
        let segments = self.segments()?;
        for (at, segment) in segments.iter().enumerate() {
            let end = segments.get(at + 1).map_or(u64::MAX, |next| next.first_seq);
            let here = between(segment.first_seq, end);
            let Some(last) = here.last() else { continue };
            let marks = self.parts(segment, &mut Budget(1), |_| true)?.unwrap_or_default();
            let until = |at: usize| marks.get(at + 1).map_or(end, |next| next.first_seq);
            let holds =
                |(at, mark): &(usize, &Mark)| !between(mark.first_seq, until(*at)).is_empty();
            let parts: Vec<Mark> =
                marks.iter().enumerate().filter(holds).map(|(_, mark)| *mark).collect();
            read(segment, &parts, |view| {
                if here.binary_search(&view.seq).is_ok() {
                    take(view);
                }
                view.seq < *last
            })?;
        }
        Ok(())
    }

    /// The segments in order; when each was begun is known afterwards.
    fn segments(&mut self) -> Result<Vec<SegmentFile>, ReadError> {
        let segments = match reader::segments(&self.log) {
            Err(ReadError::Io { error, .. }) if error.kind() == std::io::ErrorKind::NotFound => {
                return Ok(Vec::new());
            }
            segments => segments?,
        };
        let first = segments.first().map_or(0, |segment| segment.first_seq);
        self.begun.retain(|first_seq, _| *first_seq >= first);
        self.marked.retain(|first_seq, _| *first_seq >= first);
        for segment in &segments {
            if self.begun.contains_key(&segment.first_seq) {
                continue;
            }
            if let Some(reader) = open(segment)? {
                self.begun.insert(segment.first_seq, reader.head().created_ns / 1_000_000);
            }
        }
        Ok(segments)
    }

    /// The parts of a segment that `wants` takes; `None` when there is nothing left to read it for.
    fn parts(
        &mut self,
        segment: &SegmentFile,
        budget: &mut Budget,
        wants: impl Fn(&Mark) -> bool,
    ) -> Result<Option<Vec<Mark>>, ReadError> {
        self.clock += 1;
        let Some(mut reader) = open(segment)? else { return Ok(Some(Vec::new())) };
        let identity = reader.identity();
        let identity = identity.map_err(|error| io(segment, error))?;
        let known = self.marked.get_mut(&segment.first_seq);
        let known = known.filter(|marked| marked.identity == identity);
        if known.is_none() {
            let Some(left) = budget.0.checked_sub(1) else { return Ok(None) };
            budget.0 = left;
            self.make_room();
            let marked = Marked {
                identity,
                marks: Vec::new(),
                end: reader.offset(),
                next_seq: segment.first_seq,
                complete: false,
                used: 0,
            };
            self.marked.insert(segment.first_seq, marked);
        }
        let Some(marked) = self.marked.get_mut(&segment.first_seq) else {
            return Ok(Some(Vec::new()));
        };
        marked.used = self.clock;
        if !marked.complete {
            marked.read_on(&mut reader)?;
        }
        Ok(Some(marked.marks.iter().filter(|mark| wants(mark)).copied().collect()))
    }

    fn make_room(&mut self) {
        if self.marked.len() < MARKED_MAX {
            return;
        }
        let oldest = self.marked.iter().min_by_key(|(_, marked)| marked.used);
        if let Some(first_seq) = oldest.map(|(first_seq, _)| *first_seq) {
            self.marked.remove(&first_seq);
        }
    }
}

/// Gives the records of these parts to `take`, as long as that wants more.
fn read(
    segment: &SegmentFile,
    parts: &[Mark],
    mut take: impl FnMut(&View<'_>) -> bool,
) -> Result<(), ReadError> {
    let Some(mut reader) = open(segment)? else { return Ok(()) };
    for part in parts {
        reader.skip_to(part.offset, part.first_seq);
        while reader.offset() < part.offset + STRIDE {
            let offset = reader.offset();
            let Some(frame) = reader.next_frame()? else { break };
            if !take(&view(segment, offset, &frame)?) {
                return Ok(());
            }
        }
    }
    Ok(())
}

impl Marked {
    /// Marks what has come to it since.
    fn read_on(&mut self, reader: &mut SegmentReader) -> Result<(), ReadError> {
        reader.skip_to(self.end, self.next_seq);
        let segment = reader.segment().clone();
        loop {
            let offset = reader.offset();
            let Some(frame) = reader.next_frame()? else { break };
            let made_ms = made_ms(view(&segment, offset, &frame)?.prediction_id);
            let first_seq = frame.seq;
            let fresh = Mark { offset, first_seq, min_ms: u64::MAX, max_ms: 0 };
            if self.marks.last().is_none_or(|mark| offset >= mark.offset + STRIDE) {
                self.marks.push(fresh);
            }
            if let (Some(mark), Some(made_ms)) = (self.marks.last_mut(), made_ms) {
                mark.min_ms = mark.min_ms.min(made_ms);
                mark.max_ms = mark.max_ms.max(made_ms);
            }
        }
        (self.end, self.next_seq) = (reader.offset(), reader.next_seq());
        self.complete = reader.segment().sealed;
        Ok(())
    }
}

/// `None` when it is gone: its time had come.
fn open(segment: &SegmentFile) -> Result<Option<SegmentReader>, ReadError> {
    match SegmentReader::open(segment) {
        Err(ReadError::Io { error, .. }) if error.kind() == std::io::ErrorKind::NotFound => {
            Ok(None)
        }
        opened => opened.map(Some),
    }
}

fn view<'a>(segment: &SegmentFile, offset: u64, frame: &Frame<'a>) -> Result<View<'a>, ReadError> {
    View::read(frame).map_err(|what| {
        let file = segment.path.clone();
        Fault { file, offset, what: what.to_owned() }.into()
    })
}

fn io(segment: &SegmentFile, error: std::io::Error) -> ReadError {
    ReadError::Io { file: segment.path.clone(), error }
}

#[cfg(test)]
mod tests {
    use uuid::{NoContext, Timestamp};

    use super::*;
    use crate::ledger::PREDICTIONS;
    use crate::ledger::record::{Head, Payload};
    use crate::ledger::testlog::TestLog;

    const DAY_S: u64 = 86_400;
    const BEGIN_S: u64 = 1_700_000_000;

    /// A prediction that came so many seconds after the begin.
    fn id(seconds: u64, counter: u32) -> Uuid {
        Uuid::new_v7(Timestamp::from_unix(NoContext, BEGIN_S + seconds, counter))
    }

    struct Year {
        dir: tempfile::TempDir,
        log: TestLog,
        ids: Vec<Uuid>,
    }

    /// A segment a day, each with some predictions of that day; the last is still written.
    fn year(days: u64) -> Year {
        let dir = tempfile::tempdir().unwrap();
        let mut log = TestLog::new(dir.path(), PREDICTIONS);
        let mut ids = Vec::new();
        for day in 0..days {
            log.seal();
            log.created_ns = (BEGIN_S + day * DAY_S) * 1_000_000_000;
            for at in 0..4_u32 {
                let id = id(day * DAY_S + u64::from(at) * 6 * 3600, at);
                put(&mut log, id, "iris", 0);
                ids.push(id);
            }
        }
        Year { dir, log, ids }
    }

    fn put(log: &mut TestLog, id: Uuid, model: &str, padding: usize) -> u64 {
        let head = Head {
            kind: Kind::Prediction.into(),
            prediction_id: id.as_bytes().to_vec().into(),
            model: model.to_owned(),
            ..Head::default()
        };
        let payload = Payload { error: "x".repeat(padding), ..Payload::default() };
        log.put(&head, &payload)
    }

    fn finder(log: &TestLog) -> Finder {
        Finder::new(log.dir.clone(), Duration::from_secs(3600))
    }

    /// All of them, however often that has to be asked.
    fn found(finder: &mut Finder, ids: &[Uuid]) -> Vec<Uuid> {
        let mut found = Vec::new();
        while !finder.predictions(ids, |id, _| found.push(id)).unwrap() {
            found.clear();
        }
        found.sort_unstable();
        found
    }

    #[test]
    fn a_prediction_is_found_months_later_by_reading_its_day() {
        let Year { log, ids, dir: _dir } = year(200);
        let mut finder = finder(&log);
        assert_eq!(found(&mut finder, &[ids[40]]), [ids[40]]);
        // Its own, and that of the day after, when it could have been recorded.
        assert!(finder.marked.len() <= 2, "{} segments were read", finder.marked.len());
        assert_eq!(found(&mut finder, &[id(5, 99)]), Vec::<Uuid>::new());
        assert_eq!(found(&mut finder, &[Uuid::from_u128(17)]), Vec::<Uuid>::new());
        let some: Vec<Uuid> = ids.iter().copied().step_by(7).collect();
        assert_eq!(found(&mut finder, &some), some);
    }

    #[test]
    fn one_call_reads_so_many_segments_and_the_next_goes_on() {
        let Year { log, ids, dir: _dir } = year(3 * SEGMENTS_READ_MAX as u64);
        let mut finder = finder(&log);
        let (mut calls, mut all) = (0, false);
        while !all {
            calls += 1;
            let mut seen = 0;
            all = finder.predictions(&ids, |_, _| seen += 1).unwrap();
            assert!(finder.marked.len() <= calls * SEGMENTS_READ_MAX);
            assert!(seen >= ids.len() * calls / 4, "{seen} after {calls} calls");
        }
        assert_eq!(calls, 3);
    }

    #[test]
    fn what_comes_later_is_found_as_it_comes() {
        let Year { mut log, ids, dir: _dir } = year(1);
        let mut finder = finder(&log);
        assert_eq!(found(&mut finder, &ids), ids);
        // Several marks' worth, in one segment that grows between looks.
        for round in 0..3 {
            let fresh: Vec<Uuid> = (0..6).map(|at| id(80_000 + round * 100 + at, 7)).collect();
            assert_eq!(found(&mut finder, &fresh), Vec::<Uuid>::new());
            for id in &fresh {
                put(&mut log, *id, "iris", 200_000);
            }
            assert_eq!(found(&mut finder, &fresh), fresh);
        }
        let marks: usize = finder.marked.values().map(|marked| marked.marks.len()).sum();
        assert!(marks > 5, "{marks}");
        log.seal();
        assert_eq!(found(&mut finder, &ids), ids);
    }

    fn records(finder: &mut Finder, seqs: &[u64]) -> Vec<u64> {
        let mut found = Vec::new();
        finder.records(seqs, |view| found.push(view.seq)).unwrap();
        found
    }

    #[test]
    fn records_are_found_by_their_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = TestLog::new(dir.path(), PREDICTIONS);
        for at in 0..30_u64 {
            put(&mut log, id(at, 0), "iris", 50_000);
            if at % 11 == 10 {
                log.seal();
            }
        }
        let mut finder = finder(&log);
        for seq in [0, 1, 10, 11, 29, 17] {
            assert_eq!(records(&mut finder, &[seq]), [seq]);
        }
        assert_eq!(records(&mut finder, &[29, 3, 30, 11, 10, 3, 99]), [3, 10, 11, 29]);
        let mut none = Finder::new(dir.path().join("none"), Duration::ZERO);
        assert_eq!(records(&mut none, &[0]), Vec::<u64>::new());
    }

    #[test]
    fn a_segment_that_was_written_anew_is_marked_anew() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = TestLog::new(dir.path(), PREDICTIONS);
        let ids: Vec<Uuid> = (0..12).map(|at| id(at, 0)).collect();
        for id in &ids {
            put(&mut log, *id, "iris", 100_000);
        }
        log.seal();
        let mut finder = finder(&log);
        assert_eq!(found(&mut finder, &ids), ids);
        let segment = reader::segments(&log.dir).unwrap().remove(0);
        crate::ledger::erase::rewrite(&segment, &[(0, 9)]).unwrap();
        assert_eq!(found(&mut finder, &ids), ids);
        let mut erased = Vec::new();
        finder.records(&[3, 11], |view| erased.push((view.seq, view.erased))).unwrap();
        assert_eq!(erased, [(3, true), (11, false)]);
    }
}
