//! Follows a log: its records by number, from any of them on, for as long as more come.
//!
//! ```text
//! Follower::next ─▶ 17 18 19 ┊ 20 21 …    one segment after the other, and into the open one
//!                            └ sealed      None: no more for now, ask again later
//! ```
//!
//! Nothing on the write path knows of a follower: it polls the files, so a hundred of them cost the
//! writer nothing, and one in another process sees as much.
//!
//! Invariants:
//! - Records come in order, each once. One that is missing is a [`Gap`], one that a sealed segment
//!   has damaged a [`Damage`], and neither is passed over before it was said.
//! - What was erased before the last [`Follower::refresh`] is not seen.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::frame::{self, Frame};
use super::reader::{self, Fault, ReadError, SegmentFile, SegmentReader};

/// How often a folder is listed anew when what it listed is gone.
const LISTINGS_MAX: usize = 3;

/// Where to begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    Oldest,
    /// Behind the last record that is there now.
    End,
    /// With this record, which may not be there yet.
    At(u64),
}

/// Records that were there once, and whose segments were removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("records {from} to {} were removed", to - 1)]
pub struct Gap {
    pub from: u64,
    /// The first that is still there.
    pub to: u64,
}

/// Records that are there and cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("records {from} to {} cannot be read: {fault}", to - 1)]
pub struct Damage {
    pub from: u64,
    /// The first after them that may be whole.
    pub to: u64,
    pub fault: Fault,
}

#[derive(Debug, thiserror::Error)]
pub enum FollowError {
    /// [`Follower::skip`] goes on behind it.
    #[error(transparent)]
    Gap(#[from] Gap),
    /// As behind a gap.
    #[error(transparent)]
    Damage(#[from] Damage),
    #[error(transparent)]
    Read(#[from] ReadError),
}

impl From<Fault> for FollowError {
    fn from(fault: Fault) -> Self {
        Self::Read(fault.into())
    }
}

/// A place in a log.
#[derive(Debug)]
pub struct Follower {
    log: PathBuf,
    next_seq: u64,
    reader: Option<SegmentReader>,
    /// What the reader stands behind, until it is passed over.
    damage: Option<Damage>,
    /// The frame that was given last.
    bytes: Vec<u8>,
}

impl Follower {
    /// Follows the log in this folder, which need not be there yet.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn new(log: impl Into<PathBuf>, start: Start) -> Result<Self, ReadError> {
        let log = log.into();
        let next_seq = match start {
            Start::At(seq) => seq,
            Start::Oldest => segments(&log)?.first().map_or(0, |oldest| oldest.first_seq),
            Start::End => end(&log)?,
        };
        Ok(Self { log, next_seq, reader: None, damage: None, bytes: Vec::new() })
    }

    /// The number of the record that comes next.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// The next record; `None` when it is not there yet.
    ///
    /// # Errors
    /// When it was removed or is damaged, or the log cannot be read. Asking again tries again.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, FollowError> {
        if !self.advance()? {
            return Ok(None);
        }
        self.next_seq += 1;
        let frame = frame::split(&self.bytes);
        let broken = |what: &str| Fault {
            file: self.log.clone(),
            offset: 0,
            what: format!("record {}: {what}", self.next_seq - 1),
        };
        Ok(Some(frame.map_err(broken)?))
    }

    /// Sees to it that what was erased by now is not read: a segment that was written anew since it
    /// was opened is opened again.
    pub fn refresh(&mut self) {
        if self.reader.as_ref().is_some_and(SegmentReader::is_replaced) {
            (self.reader, self.damage) = (None, None);
        }
    }

    /// Goes on behind a gap or damage, with the record of this number.
    pub fn skip(&mut self, to: u64) {
        if self.damage.take().is_none_or(|damage| damage.to != to) {
            self.reader = None;
        }
        self.next_seq = to.max(self.next_seq);
    }

    /// Brings the frame that is due into `self.bytes`; whether there is one.
    fn advance(&mut self) -> Result<bool, FollowError> {
        loop {
            if let Some(damage) = &self.damage {
                return Err(damage.clone().into());
            }
            let Some(reader) = &mut self.reader else {
                match self.find() {
                    Ok(Some(reader)) => self.reader = Some(reader),
                    Ok(None) => return Ok(false),
                    Err(FollowError::Read(ReadError::Fault(fault))) => self.pass(fault)?,
                    Err(error) => return Err(error),
                }
                continue;
            };
            match reader.next_frame() {
                // Those before are read only to come here.
                Ok(Some(frame)) if frame.seq < self.next_seq => continue,
                Ok(Some(frame)) => {
                    self.bytes.clear();
                    self.bytes.extend_from_slice(frame.bytes);
                    return Ok(true);
                }
                Ok(None) => {}
                Err(ReadError::Fault(fault)) => {
                    self.pass(fault)?;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            let (own, due) = (reader.segment().first_seq, reader.next_seq());
            let listed = segments(&self.log)?;
            let Some(next) = listed.iter().find(|segment| segment.first_seq > own) else {
                return Ok(false);
            };
            if next.first_seq <= due {
                self.reader = None;
                // Wanted is a record of a later segment, or the first of the next.
                self.next_seq = self.next_seq.max(due);
                continue;
            }
            // More was written between the look at the end and the listing, or it was removed.
            if listed.iter().any(|segment| segment.first_seq == own) {
                if reader.next_frame()?.is_some() {
                    self.reader = None;
                } else if reader.segment().sealed {
                    let (file, offset) = (reader.segment().path.clone(), reader.offset());
                    let what = format!("the end, where record {due} is due");
                    self.pass(Fault { file, offset, what })?;
                } else {
                    return Ok(false);
                }
                continue;
            }
            let gap = Gap { from: self.next_seq, to: next.first_seq };
            self.reader = None;
            return Err(gap.into());
        }
    }

    /// Notes which records a sealed segment has damaged, and stands behind them. Those that were
    /// passed over before are passed over again.
    ///
    /// # Errors
    /// The fault, when it is not known yet how far it goes: the segment is written still, or the last.
    fn pass(&mut self, fault: Fault) -> Result<(), FollowError> {
        if fault.file.extension().is_none_or(|extension| extension != reader::SEALED) {
            return Err(fault.into());
        }
        let from = self.reader.as_ref().map_or(0, SegmentReader::next_seq);
        let within = self.reader.as_mut().map(SegmentReader::skip_damage).transpose()?.flatten();
        let to = match within {
            Some(to) => to,
            // The rest of it is lost.
            None => {
                self.reader = None;
                let listed = segments(&self.log)?;
                let own = listed.iter().position(|segment| segment.path == fault.file);
                let next = own.and_then(|own| listed.get(own + 1));
                next.ok_or(fault.clone())?.first_seq
            }
        };
        if to > self.next_seq {
            let from = from.max(self.next_seq);
            self.damage = Some(Damage { from, to, fault });
        } else if within.is_none() {
            return Err(fault.into());
        }
        Ok(())
    }

    /// Opens the segment that holds the record that is due; `None` when there is none yet.
    fn find(&self) -> Result<Option<SegmentReader>, FollowError> {
        for _ in 0..LISTINGS_MAX {
            let listed = segments(&self.log)?;
            let holds = |segment: &&SegmentFile| segment.first_seq <= self.next_seq;
            let Some(segment) = listed.iter().rfind(holds) else {
                return match listed.first() {
                    Some(oldest) => Err(Gap { from: self.next_seq, to: oldest.first_seq }.into()),
                    None => Ok(None),
                };
            };
            match SegmentReader::open(segment) {
                // Removed since.
                Err(ReadError::Io { error, .. }) if error.kind() == ErrorKind::NotFound => {}
                opened => return Ok(Some(opened?)),
            }
        }
        Ok(None)
    }
}

/// The number after the last record of a log; 0 when there is none.
///
/// # Errors
/// When it cannot be read.
pub fn end(log: &Path) -> Result<u64, ReadError> {
    for _ in 0..LISTINGS_MAX {
        let Some(last) = segments(log)?.pop() else { return Ok(0) };
        let mut reader = match SegmentReader::open(&last) {
            Err(ReadError::Io { error, .. }) if error.kind() == ErrorKind::NotFound => continue,
            opened => opened?,
        };
        while reader.next_frame()?.is_some() {}
        return Ok(reader.next_seq());
    }
    Ok(0)
}

/// The segments of a log that may not have been opened yet.
fn segments(log: &Path) -> Result<Vec<SegmentFile>, ReadError> {
    match reader::segments(log) {
        Err(ReadError::Io { error, .. }) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        listed => listed,
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;
    use crate::ledger::frame::{Draft, Form, SegmentHead, WriterId};

    /// Segments as the log lays them down.
    struct Segments(tempfile::TempDir);

    impl Segments {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            std::fs::create_dir(dir.path().join(reader::SEGMENTS)).unwrap();
            Self(dir)
        }

        fn open(&self, first_seq: u64) -> &Self {
            let head = SegmentHead {
                log: "predictions".to_owned(),
                writer: WriterId([1; 8]),
                first_seq,
                created_ns: 1,
            };
            std::fs::write(reader::segment_path(self.0.path(), first_seq, false), head.encode())
                .unwrap();
            self
        }

        fn add(&self, first_seq: u64, records: std::ops::Range<u64>) -> &Self {
            let path = reader::segment_path(self.0.path(), first_seq, false);
            let mut file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
            records.for_each(|seq| file.write_all(&frame_of(seq)).unwrap());
            self
        }

        fn seal(&self, first_seq: u64) -> &Self {
            let path = |sealed| reader::segment_path(self.0.path(), first_seq, sealed);
            std::fs::rename(path(false), path(true)).unwrap();
            self
        }

        fn remove(&self, first_seq: u64) -> &Self {
            std::fs::remove_file(reader::segment_path(self.0.path(), first_seq, true)).unwrap();
            self
        }

        fn follow(&self, start: Start) -> Follower {
            Follower::new(self.0.path(), start).unwrap()
        }
    }

    fn frame_of(seq: u64) -> Vec<u8> {
        let (mut draft, mut bytes) = (Draft::default(), Vec::new());
        draft.start();
        draft.buffer().extend_from_slice(b"head");
        draft.body(Form::Whole, &[7; 32]);
        draft.finish();
        draft.put(seq, &mut bytes);
        bytes
    }

    fn all(follower: &mut Follower) -> Vec<u64> {
        let mut found = Vec::new();
        while let Some(frame) = follower.next_frame().unwrap() {
            found.push(frame.seq);
        }
        found
    }

    fn gap(follower: &mut Follower) -> Gap {
        match follower.next_frame() {
            Err(FollowError::Gap(gap)) => gap,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn records_come_once_across_segments_and_as_they_are_written() {
        let log = Segments::new();
        let mut early = log.follow(Start::Oldest);
        assert_eq!(all(&mut early), Vec::<u64>::new());
        log.open(0).add(0, 0..3);
        assert_eq!(all(&mut early), [0, 1, 2]);
        log.add(0, 3..5);
        assert_eq!(all(&mut early), [3, 4]);
        // Written, sealed and followed by another between two looks.
        log.add(0, 5..6).seal(0).open(6).add(6, 6..8);
        assert_eq!(all(&mut early), [5, 6, 7]);
        log.seal(6).open(8);
        assert_eq!(all(&mut early), Vec::<u64>::new());
        log.add(8, 8..9);
        assert_eq!(all(&mut early), [8]);
        assert_eq!(all(&mut log.follow(Start::At(4))), [4, 5, 6, 7, 8]);
        assert_eq!(all(&mut log.follow(Start::At(6))), [6, 7, 8]);
        assert_eq!(all(&mut log.follow(Start::Oldest)).len(), 9);
        let mut late = log.follow(Start::End);
        let mut later = log.follow(Start::At(10));
        assert_eq!((all(&mut late), all(&mut later)), (vec![], vec![]));
        log.add(8, 9..12);
        assert_eq!((all(&mut late), all(&mut later)), (vec![9, 10, 11], vec![10, 11]));
    }

    #[test]
    fn half_a_frame_and_zeros_are_the_end_until_more_comes() {
        let log = Segments::new();
        log.open(0).add(0, 0..1);
        let mut follower = log.follow(Start::Oldest);
        let frame = frame_of(1);
        let path = reader::segment_path(log.0.path(), 0, false);
        let before = std::fs::read(&path).unwrap();
        // Its last bytes are zeros: the number's.
        for written in [0, 1, 7, 8, 30, frame.len() - 8] {
            let mut bytes = before.clone();
            bytes.extend_from_slice(&frame[..written]);
            bytes.resize(4096, 0);
            std::fs::write(&path, bytes).unwrap();
            assert_eq!(all(&mut follower), if written == 0 { vec![0] } else { vec![] });
        }
        let mut bytes = before;
        bytes.extend_from_slice(&frame);
        bytes.resize(4096, 0);
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(all(&mut follower), [1]);
    }

    #[test]
    fn what_was_removed_is_a_gap() {
        let log = Segments::new();
        log.open(0).add(0, 0..3).seal(0).open(3).add(3, 3..5).seal(3).open(5).add(5, 5..6);
        let (mut before, mut inside) = (log.follow(Start::Oldest), log.follow(Start::Oldest));
        inside.next_frame().unwrap();
        log.remove(0);
        let found = gap(&mut before);
        assert_eq!(
            (found, found.to_string()),
            (Gap { from: 0, to: 3 }, "records 0 to 2 were removed".into())
        );
        // Says so until it is told to go on.
        assert_eq!(gap(&mut before), found);
        before.skip(found.to);
        assert_eq!(all(&mut before), [3, 4, 5]);
        // What is open is read to its end.
        assert_eq!(all(&mut inside), [1, 2, 3, 4, 5]);
        assert_eq!(all(&mut log.follow(Start::Oldest)), [3, 4, 5]);
    }

    #[test]
    fn a_segment_that_went_unseen_is_a_gap() {
        let log = Segments::new();
        log.open(0).add(0, 0..2);
        let mut follower = log.follow(Start::Oldest);
        assert_eq!(all(&mut follower), [0, 1]);
        // Grew and was sealed and removed; then a later one as well.
        log.seal(0).remove(0).open(5).add(5, 5..6).seal(5).open(6).add(6, 6..7);
        assert_eq!(gap(&mut follower), Gap { from: 2, to: 5 });
        log.remove(5);
        assert_eq!(gap(&mut follower), Gap { from: 2, to: 6 });
        follower.skip(6);
        assert_eq!(all(&mut follower), [6]);
    }

    #[test]
    fn what_was_erased_is_not_read_after_a_refresh() {
        let log = Segments::new();
        log.open(0).add(0, 0..3);
        let mut follower = log.follow(Start::Oldest);
        follower.next_frame().unwrap();
        log.seal(0).open(3);
        follower.refresh();
        let path = reader::segment_path(log.0.path(), 0, true);
        let bytes = std::fs::read(&path).unwrap();
        let mut anew = bytes[..frame::SEGMENT_HEAD_BYTES].to_vec();
        for seq in 0..3 {
            let frame = frame_of(seq);
            let frame::Parsed::Frame(frame) = frame::parse(&frame) else { panic!() };
            anew.extend_from_slice(&frame.erased());
        }
        std::fs::write(path.with_extension("new"), anew).unwrap();
        std::fs::rename(path.with_extension("new"), &path).unwrap();
        follower.refresh();
        let frame = follower.next_frame().unwrap().unwrap();
        assert_eq!((frame.seq, frame.form), (1, Form::Erased));
        assert_eq!(all(&mut follower), [2]);
    }

    /// Changes a byte of a sealed segment, so many before its end.
    fn damage(log: &Segments, first_seq: u64, before_end: usize) {
        let path = reader::segment_path(log.0.path(), first_seq, true);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() - before_end;
        bytes[at] ^= 0x55;
        std::fs::write(&path, bytes).unwrap();
    }

    fn damaged(follower: &mut Follower) -> Damage {
        match follower.next_frame() {
            Err(FollowError::Damage(damage)) => damage,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_damaged_is_said_until_it_is_passed_over() {
        let log = Segments::new();
        let len = frame_of(0).len();
        log.open(0).add(0, 0..6).seal(0).open(6).add(6, 6..7);
        // Two in the middle; the numbers and lengths of the others lead behind them.
        damage(&log, 0, 4 * len - 20);
        damage(&log, 0, 3 * len - 20);
        let mut follower = log.follow(Start::Oldest);
        assert_eq!(follower.next_frame().unwrap().unwrap().seq, 0);
        assert_eq!(follower.next_frame().unwrap().unwrap().seq, 1);
        let found = damaged(&mut follower);
        assert_eq!((found.from, found.to), (2, 4));
        let file = reader::segment_path(log.0.path(), 0, true);
        let offset = (frame::SEGMENT_HEAD_BYTES + 2 * len) as u64;
        assert_eq!((&found.fault.file, found.fault.offset), (&file, offset));
        assert!(found.to_string().starts_with("records 2 to 3 cannot be read: "), "{found}");
        assert_eq!((damaged(&mut follower), follower.next_seq()), (found, 2));
        follower.skip(4);
        assert_eq!(all(&mut follower), [4, 5, 6]);
        // Whoever begins behind it does not meet it, and within it only the rest.
        assert_eq!(all(&mut log.follow(Start::At(4))), [4, 5, 6]);
        assert_eq!(damaged(&mut log.follow(Start::At(3))).from, 3);
    }

    #[test]
    fn what_leads_nowhere_costs_the_rest_of_its_segment() {
        let len = frame_of(0).len();
        // A length; the last frame; the head; the file's end.
        let cases = [(2 * len, 1..3), (5, 2..3), (3 * len + 60, 0..3), (0, 2..3)];
        for (before_end, lost) in cases {
            let log = Segments::new();
            log.open(0).add(0, 0..3).seal(0);
            match before_end {
                0 => {
                    let path = reader::segment_path(log.0.path(), 0, true);
                    let bytes = std::fs::read(&path).unwrap();
                    std::fs::write(&path, &bytes[..bytes.len() - len]).unwrap();
                }
                at => damage(&log, 0, at),
            }
            let mut follower = log.follow(Start::At(0));
            for _ in 0..lost.start {
                follower.next_frame().unwrap().unwrap();
            }
            // How far it goes is known once there is a next segment.
            if before_end > 0 {
                let found = follower.next_frame();
                assert!(matches!(found, Err(FollowError::Read(_))), "{before_end}: {found:?}");
            }
            log.open(3).add(3, 3..5);
            let found = damaged(&mut follower);
            assert_eq!(found.from..found.to, lost, "{before_end}");
            follower.skip(found.to);
            assert_eq!(all(&mut follower), [3, 4], "{before_end}");
        }
    }

    #[test]
    fn what_a_caller_sent_is_never_taken_for_a_record() {
        let log = Segments::new();
        log.open(0);
        let path = reader::segment_path(log.0.path(), 0, false);
        // Record 0 holds a whole frame with number 1; its own length is damaged.
        let (mut draft, mut bytes) = (Draft::default(), Vec::new());
        draft.start();
        draft.body(Form::Whole, &[7; 32]);
        draft.buffer().extend_from_slice(&frame_of(1));
        draft.finish();
        draft.put(0, &mut bytes);
        bytes[0] ^= 1;
        let mut file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
        file.write_all(&bytes).unwrap();
        log.add(0, 1..2).seal(0).open(2).add(2, 2..3);
        let mut follower = log.follow(Start::Oldest);
        let found = damaged(&mut follower);
        assert_eq!((found.from, found.to), (0, 2));
        follower.skip(2);
        assert_eq!(all(&mut follower), [2]);
    }

    #[test]
    fn a_segment_that_is_written_is_waited_for_and_not_passed_over() {
        let log = Segments::new();
        log.open(0).add(0, 0..1).add(0, 5..6);
        let mut follower = log.follow(Start::Oldest);
        follower.next_frame().unwrap();
        for _ in 0..2 {
            assert!(matches!(follower.next_frame(), Err(FollowError::Read(ReadError::Fault(_)))));
        }
        assert_eq!(follower.next_seq(), 1);
    }
}
