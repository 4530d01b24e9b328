//! Reads a log: of a gateway that is running, of one that stopped, or of a copy of its files.
//!
//! ```text
//! <log>/segments/00000000000000000000.seg     sealed: nothing is added any more
//!                00000000000000004711.open    what is being written; its last frame may be half there
//! ```
//!
//! Invariants:
//! - A reader never writes, locks or waits for anybody.
//! - The end of an open segment is where a frame is not whole yet. Anything else that is no frame is
//!   a [`Fault`], with file and offset, and never taken for the end.
//! - Memory: one frame, and at most [`CHUNK`] bytes beside it; [`SegmentReader::rest`] takes what is
//!   left of its segment.

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use super::frame::{self, Frame, Parsed, SEGMENT_HEAD_BYTES, SegmentHead};

/// Bytes that are read at once.
pub const CHUNK: usize = 1 << 20;
/// Times that what looks like damage is looked at.
const LOOKS: u32 = 4;
/// Folder of a log's segments.
pub const SEGMENTS: &str = "segments";
pub const SEALED: &str = "seg";
pub const OPEN: &str = "open";

/// A segment's file.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct SegmentFile {
    pub first_seq: u64,
    pub sealed: bool,
    pub path: PathBuf,
}

/// Something in a log that should not be there, or not so.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}: at byte {offset}: {what}", file.display())]
pub struct Fault {
    pub file: PathBuf,
    pub offset: u64,
    pub what: String,
}

#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error("{}: {error}", file.display())]
    Io { file: PathBuf, error: io::Error },
}

/// The path of a segment.
pub fn segment_path(log: &Path, first_seq: u64, sealed: bool) -> PathBuf {
    let extension = if sealed { SEALED } else { OPEN };
    log.join(SEGMENTS).join(format!("{first_seq:020}.{extension}"))
}

/// The segments of the log in this folder, in order. A segment that is sealed meanwhile is listed
/// once.
///
/// # Errors
/// When the folder cannot be read.
pub fn segments(log: &Path) -> Result<Vec<SegmentFile>, ReadError> {
    let folder = log.join(SEGMENTS);
    let failed = |error| ReadError::Io { file: folder.clone(), error };
    let mut found: Vec<SegmentFile> = Vec::new();
    for entry in std::fs::read_dir(&folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let extension = path.extension().and_then(|extension| extension.to_str());
        let sealed = match extension {
            Some(SEALED) => true,
            Some(OPEN) => false,
            _ => continue,
        };
        let stem = path.file_stem().and_then(|stem| stem.to_str());
        let Some(first_seq) = stem.and_then(|stem| stem.parse().ok()) else { continue };
        found.push(SegmentFile { first_seq, sealed, path });
    }
    found.sort_by_key(|segment| (segment.first_seq, !segment.sealed));
    found.dedup_by_key(|segment| segment.first_seq);
    Ok(found)
}

/// Reads one segment from its first frame to its last.
#[derive(Debug)]
pub struct SegmentReader {
    file: File,
    segment: SegmentFile,
    head: SegmentHead,
    /// What was read and not consumed: `buffer[at..]`.
    buffer: Vec<u8>,
    at: usize,
    /// Offset in the file of `buffer[at]`.
    offset: u64,
    next_seq: u64,
}

impl SegmentReader {
    /// # Errors
    /// When the file cannot be read, does not begin as a segment does, or is not as long as it was when
    /// it was sealed.
    pub fn open(segment: &SegmentFile) -> Result<Self, ReadError> {
        match Self::open_cut(segment)? {
            (reader, None) => Ok(reader),
            (_, Some(fault)) => Err(fault.into()),
        }
    }

    /// The same for a segment that may not be as long as it was, which is told then.
    ///
    /// # Errors
    /// When the file cannot be read, or does not begin as a segment does.
    pub fn open_cut(segment: &SegmentFile) -> Result<(Self, Option<Fault>), ReadError> {
        let mut segment = segment.clone();
        let file = match File::open(&segment.path) {
            // Sealed since it was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !segment.sealed => {
                segment.path.set_extension(SEALED);
                segment.sealed = true;
                File::open(&segment.path)
            }
            opened => opened,
        };
        let path = segment.path.clone();
        let failed = |error| ReadError::Io { file: path.clone(), error };
        let mut file = file.map_err(failed)?;
        let mut head = Vec::with_capacity(SEGMENT_HEAD_BYTES);
        let limit = SEGMENT_HEAD_BYTES as u64;
        file.by_ref().take(limit).read_to_end(&mut head).map_err(failed)?;
        let mark = frame::mark(&head);
        let head = SegmentHead::decode(&head).map_err(|what| fault(&path, 0, what))?;
        if head.first_seq != segment.first_seq {
            let what = format!("the head says that it begins with {}", head.first_seq);
            return Err(fault(&path, 0, what).into());
        }
        let mut cut = None;
        if segment.sealed
            && let Some(mark) = mark
        {
            let len = file.metadata().map_err(failed)?.len();
            let what = || format!("{len} bytes, sealed with {mark}");
            cut = (len != mark).then(|| fault(&path, frame::MARK.start as u64, what()));
        }
        let next_seq = head.first_seq;
        let (buffer, at, offset) = (Vec::new(), 0, limit);
        Ok((Self { file, segment, head, buffer, at, offset, next_seq }, cut))
    }

    pub fn head(&self) -> &SegmentHead {
        &self.head
    }

    pub fn segment(&self) -> &SegmentFile {
        &self.segment
    }

    /// Goes on at a frame whose place and number are known: one that this segment has been read up
    /// to before. If it was written anew since, the next frame is a fault.
    pub fn skip_to(&mut self, offset: u64, next_seq: u64) {
        (self.buffer, self.at) = (Vec::new(), 0);
        (self.offset, self.next_seq) = (offset, next_seq);
    }

    /// Which file it is, whatever its name becomes.
    ///
    /// # Errors
    /// When that cannot be asked.
    pub fn identity(&self) -> io::Result<(u64, u64)> {
        use std::os::unix::fs::MetadataExt as _;
        self.file.metadata().map(|own| (own.dev(), own.ino()))
    }

    /// Where the next frame begins, in the file.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The number that the next frame must have.
    pub fn next_seq(&self) -> u64 {
        self.next_seq
    }

    /// Whether another file has this one's name by now: payloads of it were erased.
    pub fn is_replaced(&self) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        let path = &self.segment.path;
        let there = std::fs::metadata(path)
            .or_else(|_| std::fs::metadata(path.with_extension(SEALED)))
            .map(|there| (there.dev(), there.ino()));
        self.identity().ok().zip(there.ok()).is_some_and(|(own, there)| own != there)
    }

    /// The next frame; `None` at the end of what is there by now. More may come to an open segment,
    /// and this may be called again then: what was no whole frame is read anew.
    ///
    /// # Errors
    /// In a sealed segment at the first thing that is no frame, in any at one whose turn it is not.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, ReadError> {
        let len = loop {
            let left = &self.buffer[self.at..];
            let needed = match frame::parse(left) {
                Parsed::Frame(frame) => break frame.bytes.len(),
                Parsed::Short { needed } => needed,
                Parsed::End if left.is_empty() => 1,
                Parsed::End => return self.end("zeros where a frame is due"),
                Parsed::Bad(what) => return self.end(what),
            };
            if !self.fill(needed)? {
                return self.end("half a frame");
            }
        };
        let bytes = &self.buffer[self.at..self.at + len];
        let frame = frame::split(bytes).map_err(|what| self.fault(what))?;
        if frame.seq != self.next_seq {
            let what = format!("number {} where {} is due", frame.seq, self.next_seq);
            return Err(fault(&self.segment.path, self.offset, what).into());
        }
        self.at += len;
        self.offset += len as u64;
        self.next_seq += 1;
        Ok(Some(frame))
    }

    /// No frame begins here: the end of an open segment, a fault in a sealed one.
    fn end(&mut self, what: &'static str) -> Result<Option<Frame<'_>>, ReadError> {
        let nothing = self.buffer.len() == self.at;
        self.buffer.truncate(self.at);
        if !self.segment.sealed {
            let mut sealed = self.segment.path.clone();
            sealed.set_extension(SEALED);
            // Sealed while it was read: what was its end may not have been.
            if self.segment.path.exists() || !sealed.exists() {
                return Ok(None);
            }
            (self.segment.path, self.segment.sealed) = (sealed, true);
            return self.next_frame();
        }
        if nothing { Ok(None) } else { Err(self.fault(what).into()) }
    }

    /// What is behind the last whole frame, now that [`SegmentReader::next_frame`] gave `None`. What
    /// looks like damage in a segment that is being written is looked at again: a group of records
    /// that comes meanwhile may be seen in parts.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn rest(&mut self) -> Result<Rest, ReadError> {
        let mut looks = 1;
        loop {
            match self.look()? {
                Rest::Damage(_) if looks < LOOKS => looks += 1,
                rest => return Ok(rest),
            }
        }
    }

    fn look(&mut self) -> Result<Rest, ReadError> {
        (self.buffer, self.at) = (Vec::new(), 0);
        let mut rest = Vec::new();
        self.file
            .seek(SeekFrom::Start(self.offset))
            .and_then(|_| self.file.read_to_end(&mut rest))
            .map_err(|error| ReadError::Io { file: self.segment.path.clone(), error })?;
        let Some(last) = rest.iter().rposition(|byte| *byte != 0) else { return Ok(Rest::Nothing) };
        let later = |at: usize| frame::later(&rest[at..], self.next_seq);
        if later(0).is_some_and(|frame| frame.seq == self.next_seq) {
            return Ok(Rest::More);
        }
        match (0..last).find(|at| later(*at).is_some()) {
            None => Ok(Rest::Torn { bytes: last as u64 + 1 }),
            Some(at) => {
                let found = self.offset + at as u64;
                let what = format!("no frame, although one begins at byte {found}");
                Ok(Rest::Damage(self.fault(&what)))
            }
        }
    }

    /// Goes on behind a fault that [`SegmentReader::next_frame`] gave: at the next whole frame that
    /// the lengths of the damaged ones lead to, and that has as high a number. Gives that number;
    /// `None` when nothing more of this segment can be told from what was damaged. Bytes are never
    /// searched for frames: what a caller sent may look like one.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn skip_damage(&mut self) -> Result<Option<u64>, ReadError> {
        loop {
            let left = &self.buffer[self.at..];
            let total = match frame::total(left) {
                Some(total) if total <= left.len() => total,
                Some(total) => match self.fill(total)? {
                    true => continue,
                    false => return Ok(None),
                },
                None if left.len() < frame::PRELUDE && self.fill(frame::PRELUDE)? => continue,
                None => return Ok(None),
            };
            match frame::parse(&left[..total]) {
                Parsed::Frame(frame) if frame.seq >= self.next_seq => {
                    self.next_seq = frame.seq;
                    return Ok(Some(frame.seq));
                }
                _ => {
                    self.at += total;
                    self.offset += total as u64;
                    self.next_seq += 1;
                }
            }
        }
    }

    /// Goes through a sealed segment over what is damaged in it, as far as `take` likes; of one that is still
    /// written, to the first fault.
    ///
    /// # Errors
    /// When the file cannot be read, as `failed` puts it, and what `take` says.
    pub fn around<E>(
        &mut self,
        cut: Option<Fault>,
        failed: impl Fn(ReadError) -> E,
        mut take: impl FnMut(Piece<'_>) -> Result<ControlFlow<()>, E>,
    ) -> Result<(), E> {
        loop {
            let flow = match self.next_frame() {
                Ok(Some(frame)) => take(Piece::Frame(&frame))?,
                Ok(None) => {
                    let Some(fault) = cut else { return Ok(()) };
                    let (offset, seq) = ((self.offset, None), (self.next_seq, None));
                    return take(Piece::Damage(Damage { offset, seq, fault })).map(|_| ());
                }
                Err(ReadError::Fault(fault)) => {
                    if !self.segment.sealed {
                        return Err(failed(fault.into()));
                    }
                    let (offset, seq) = (self.offset, self.next_seq);
                    let next = self.skip_damage().map_err(&failed)?;
                    let (offset, seq) = ((offset, next.map(|_| self.offset)), (seq, next));
                    let flow = take(Piece::Damage(Damage { offset, seq, fault }))?;
                    if next.is_none() { ControlFlow::Break(()) } else { flow }
                }
                Err(error) => return Err(failed(error)),
            };
            if flow.is_break() {
                return Ok(());
            }
        }
    }

    /// Reads until `needed` bytes are there, a chunk at least; whether any came.
    fn fill(&mut self, needed: usize) -> Result<bool, ReadError> {
        self.buffer.drain(..self.at);
        self.at = 0;
        let have = self.buffer.len();
        let want = needed.saturating_sub(have).max(CHUNK) as u64;
        let from = SeekFrom::Start(self.offset + have as u64);
        let (file, buffer) = (&mut self.file, &mut self.buffer);
        let read = file.seek(from).and_then(|_| file.by_ref().take(want).read_to_end(buffer));
        let read =
            read.map_err(|error| ReadError::Io { file: self.segment.path.clone(), error })?;
        Ok(read > 0)
    }

    fn fault(&self, what: &str) -> Fault {
        fault(&self.segment.path, self.offset, what)
    }
}

/// A part of a segment.
#[derive(Debug)]
pub enum Piece<'a> {
    Frame(&'a Frame<'a>),
    Damage(Damage),
}

/// What of a sealed segment cannot be read.
#[derive(Debug)]
pub struct Damage {
    /// Bytes of the file, from the first to before the second; all that follow where there is no second.
    pub offset: (u64, Option<u64>),
    /// Numbers of records, likewise.
    pub seq: (u64, Option<u64>),
    pub fault: Fault,
}

/// What is behind the last whole frame of a segment.
#[derive(Debug)]
pub enum Rest {
    Nothing,
    /// The frame that is due: it was written since.
    More,
    /// The start of a frame, or several in a group, that never was written whole: so many bytes to
    /// the last that is not zero.
    Torn {
        bytes: u64,
    },
    /// Whole frames come later: something was lost or changed before them.
    Damage(Fault),
}

fn fault(file: &Path, offset: u64, what: impl Into<String>) -> Fault {
    Fault { file: file.to_owned(), offset, what: what.into() }
}
