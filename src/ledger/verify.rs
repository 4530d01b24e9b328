//! Checks a ledger from its files alone: of a gateway that runs, that stopped, or of a copy.
//!
//! ```text
//! segments ─▶ frames: checksum, number, writer ─▶ leaves ─┬─▶ each hash of the tree's files
//!             (one thread)             (another)          ├─▶ root of each checkpoint
//!                                                         └─▶ root of each anchor kept elsewhere
//! checkpoints ─▶ signature of the key whose turn it is ─▶ after the one before
//! erased frames, records that are gone ─▶ there is a record that says so
//! Parquet files ─▶ digest and rows as their manifests say, and those as the segments have them
//! ```
//!
//! What a writer of the files could still do is cut the end off after the last checkpoint, or write
//! everything anew with keys of his own. Against the first helps the next checkpoint; against the
//! second a public key or a checkpoint that he cannot change: give them.
//!
//! Invariants:
//! - The first thing that is not as it has to be ends it, with file and offset.
//! - Memory is flat: batches of hashes, and the ranges of numbers that were erased.

use std::fs::File;
use std::io::{self, BufReader, Read as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use serde::Serialize;

use super::checkpoint::{self, ALL, LAST, Note, NoteError, Notes, NotesError, Stored, StoredError};
use super::erase::Erasures;
use super::frame::{Form, WriterId};
use super::keys::{self, VerifierKey};
use super::reader::{self, Fault, ReadError, Rest, SEGMENTS, SegmentFile, SegmentReader};
use super::tree::{Frontier, HASH_BYTES, Hash, LEVELS, STEP, TREE, level_len, level_path};
use super::{ADMIN, FEEDBACK, PREDICTIONS};

mod parquet;

pub use parquet::ParquetReport;

/// Leaves that go from one thread to the other at once, and batches that may wait.
const BATCH: usize = 8192;
const BATCHES_MAX: usize = 4;
/// A log that is written meanwhile may look damaged at a bad moment; it is looked at so often.
const TRIES: u32 = 3;
const TRY_AGAIN: Duration = Duration::from_millis(200);

/// What is checked, and against what.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// The ledger's folder, or that of one log.
    pub dir: PathBuf,
    /// Keys that are known from elsewhere. Without any, those in the ledger's own folder.
    pub keys: Vec<VerifierKey>,
    /// Checkpoints that were kept elsewhere.
    pub anchors: Vec<Note>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Report {
    pub logs: Vec<LogReport>,
    /// Of the Parquet files beside the logs; `None` when there are none, or one log alone is checked.
    pub parquet: Option<ParquetReport>,
    /// Whether the keys came from elsewhere: if not, everything may have been written anew.
    pub keys_given: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct LogReport {
    pub log: String,
    pub writer: String,
    pub segments: u64,
    pub bytes: u64,
    /// Number of the first record that is there, and number after the last.
    pub first_seq: u64,
    pub next_seq: u64,
    /// Records whose payload was erased.
    pub erased: u64,
    /// Bytes at the end that are no whole record: what a crash leaves.
    pub torn_bytes: u64,
    pub checkpoints: u64,
    /// Records that the last checkpoint covers.
    pub signed: u64,
    pub key: Option<String>,
    /// Anchors that this log agrees with.
    pub anchors: u64,
    /// Root of the tree over all records, in base64.
    pub root: String,
}

#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error("{}: {error}", file.display())]
    Io { file: PathBuf, error: io::Error },
    #[error("{}: not there, although {} names it", file.display(), named_by.display())]
    Missing { file: PathBuf, named_by: PathBuf },
    #[error("{}: neither a ledger nor one of its logs", .0.display())]
    NoLedger(PathBuf),
    #[error("no log here is '{0}', of which a checkpoint was given")]
    NoAnchored(String),
}

impl From<ReadError> for VerifyError {
    fn from(error: ReadError) -> Self {
        match error {
            ReadError::Fault(fault) => Self::Fault(fault),
            ReadError::Io { file, error } => Self::Io { file, error },
        }
    }
}

impl From<StoredError> for VerifyError {
    fn from(error: StoredError) -> Self {
        match error {
            StoredError::Io { file, error } => Self::Io { file, error },
            StoredError::Note { file, offset, error } => fault(&file, offset, error).into(),
        }
    }
}

fn fault(file: &Path, offset: u64, what: impl std::fmt::Display) -> Fault {
    Fault { file: file.to_owned(), offset, what: what.to_string() }
}

fn io_at(file: &Path) -> impl FnOnce(io::Error) -> VerifyError {
    let file = file.to_owned();
    move |error| VerifyError::Io { file, error }
}

/// Checks every log that is there.
///
/// # Errors
/// The first fault, or what could not be read.
pub fn verify(wanted: &Wanted) -> Result<Report, VerifyError> {
    let single = wanted.dir.join(SEGMENTS).is_dir();
    let ledger = if single { parent(&wanted.dir) } else { wanted.dir.clone() };
    let mut logs = Vec::new();
    // Changes first: they say what may be missing in the others.
    for name in [ADMIN, PREDICTIONS, FEEDBACK] {
        let dir = ledger.join(name);
        if dir.join(SEGMENTS).is_dir() && (!single || same(&dir, &wanted.dir)) {
            logs.push(dir);
        }
    }
    if !single && !logs.is_empty() && !logs.contains(&ledger.join(ADMIN)) {
        return Err(fault(&ledger.join(ADMIN), 0, "the log of changes is not there").into());
    }
    if logs.is_empty() && single {
        logs.push(wanted.dir.clone());
    }
    if logs.is_empty() {
        return Err(VerifyError::NoLedger(wanted.dir.clone()));
    }
    let published = match ledger.join(super::KEYS).is_dir() {
        true => keys::published(&ledger).map_err(io_at(&ledger.join(super::KEYS)))?,
        false => Vec::new(),
    };
    let keys_given = !wanted.keys.is_empty();
    let mut report = Report { logs: Vec::new(), parquet: None, keys_given };
    let mut writer = None;
    for dir in &logs {
        let check = Check { dir, ledger: &ledger, wanted, published: &published, writer };
        let found = check.patiently()?;
        writer = found.0.or(writer);
        report.logs.push(found.1);
    }
    let root = ledger.join(super::parquet::FOLDER);
    if !single
        && root.is_dir()
        && let Some(log) = report.logs.iter().find(|log| log.log == PREDICTIONS)
    {
        report.parquet = Some(parquet::check(&root, &ledger.join(PREDICTIONS), log)?);
    }
    let known = |anchor: &&Note| {
        let origin = |log: &LogReport| checkpoint::origin(&log.writer, &log.log);
        report.logs.iter().any(|log| origin(log) == anchor.checkpoint.origin)
    };
    match wanted.anchors.iter().find(|anchor| !known(anchor)) {
        Some(anchor) => Err(VerifyError::NoAnchored(anchor.checkpoint.origin.clone())),
        None => Ok(report),
    }
}

fn parent(dir: &Path) -> PathBuf {
    let full = std::fs::canonicalize(dir).unwrap_or_else(|_| dir.to_owned());
    full.parent().map_or_else(|| dir.to_owned(), Path::to_owned)
}

fn same(one: &Path, other: &Path) -> bool {
    matches!((one.canonicalize(), other.canonicalize()), (Ok(one), Ok(other)) if one == other)
}

/// One log.
struct Check<'a> {
    dir: &'a Path,
    ledger: &'a Path,
    wanted: &'a Wanted,
    published: &'a [VerifierKey],
    /// Of the logs beside it.
    writer: Option<WriterId>,
}

impl Check<'_> {
    /// A fault in a log that is written meanwhile may be none: it is looked for again.
    fn patiently(&self) -> Result<(Option<WriterId>, LogReport), VerifyError> {
        let mut tries = 1;
        loop {
            let before = self.looks();
            match self.once() {
                Err(_) if tries < TRIES && before != self.looks() => {
                    tries += 1;
                    std::thread::sleep(TRY_AGAIN);
                }
                result => return result,
            }
        }
    }

    /// What changes when anybody writes here.
    fn looks(&self) -> Vec<Option<(u64, Option<std::time::SystemTime>)>> {
        let segments = reader::segments(self.dir).unwrap_or_default();
        let last = segments.iter().rev().take(2).map(|segment| segment.path.clone());
        let files = [ALL, LAST, SEGMENTS].map(|name| self.dir.join(name));
        let look = |path: &Path| {
            let meta = std::fs::metadata(path).ok()?;
            Some((meta.len(), meta.modified().ok()))
        };
        let mut found: Vec<_> = files.iter().map(|path| look(path)).collect();
        found.extend(last.map(|path| look(&path)));
        found
    }

    fn once(&self) -> Result<(Option<WriterId>, LogReport), VerifyError> {
        // What is derived from the records is looked at before they are: it never is ahead of them.
        let tree = TreeCheck::open(self.dir)?;
        let stored = Stored::read(self.dir)?;
        let segments = self.segments()?;
        let Some(first) = segments.first() else { return self.empty(&stored) };
        let head = SegmentReader::open(first)?.head().clone();
        let (writer, log) = (head.writer, head.log.clone());
        let folder = self.dir.file_name().and_then(|name| name.to_str());
        if folder.is_some_and(|name| [ADMIN, PREDICTIONS, FEEDBACK].contains(&name) && name != log)
        {
            return Err(fault(&first.path, 0, format!("a segment of the log '{log}'")).into());
        }
        if self.writer.is_some_and(|of| of != writer) {
            return Err(fault(
                &first.path,
                0,
                format!("written by {writer}, not as the logs beside it"),
            )
            .into());
        }
        let origin = checkpoint::origin(writer, &log);
        let notes = NoteCheck::open(self, &origin, &stored)?;
        let mut report = LogReport { log, writer: writer.to_string(), ..LogReport::default() };
        report.first_seq = first.first_seq;
        let erasures = Erasures::read(self.ledger, &report.log)?;
        if first.first_seq > 0 && !erasures.removed(first.first_seq) {
            let what = format!("no record before {}, and none says why", first.first_seq);
            return Err(fault(&first.path, 0, what).into());
        }
        let mut sums = Sums { dir: self.dir, frontier: Frontier::default(), tree, notes };
        sums.gone(first.first_seq)?;
        self.frames(&segments, &erasures, &mut sums, &mut report)?;
        sums.finish(self, &segments, &mut report)?;
        Ok((Some(writer), report))
    }

    fn empty(&self, stored: &Stored) -> Result<(Option<WriterId>, LogReport), VerifyError> {
        if stored.last.is_some() {
            let what = "a checkpoint of records that are not there";
            return Err(fault(&self.dir.join(LAST), 0, what).into());
        }
        let log = self.dir.file_name().map(|name| name.to_string_lossy().into_owned());
        Ok((None, LogReport { log: log.unwrap_or_default(), ..LogReport::default() }))
    }

    /// The segments, and nothing that looks like one.
    fn segments(&self) -> Result<Vec<SegmentFile>, VerifyError> {
        let segments = reader::segments(self.dir)?;
        let folder = self.dir.join(SEGMENTS);
        for entry in std::fs::read_dir(&folder).map_err(io_at(&folder))? {
            let path = entry.map_err(io_at(&folder))?.path();
            let extension = path.extension().and_then(|extension| extension.to_str());
            let is_one = extension.is_some_and(|of| of == reader::SEALED || of == reader::OPEN);
            if is_one && !segments.iter().any(|segment| segment.path == path) {
                // Sealed between two looks.
                let sealed = path.with_extension(reader::SEALED);
                if path.exists() || !segments.iter().any(|segment| segment.path == sealed) {
                    return Err(fault(&path, 0, "not a segment of this log").into());
                }
            }
            if is_one && std::fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_symlink()) {
                return Err(fault(&path, 0, "a link, not a segment").into());
            }
        }
        for segment in &segments {
            let name = reader::segment_path(self.dir, segment.first_seq, segment.sealed);
            if name.file_name() != segment.path.file_name() {
                return Err(fault(&segment.path, 0, "not the name of a segment").into());
            }
        }
        Ok(segments)
    }

    /// Reads every frame, on a thread of its own, and sums up the leaves here.
    fn frames(
        &self,
        segments: &[SegmentFile],
        erasures: &Erasures,
        sums: &mut Sums<'_>,
        report: &mut LogReport,
    ) -> Result<(), VerifyError> {
        let (leaves, taken) = mpsc::sync_channel::<Vec<Hash>>(BATCHES_MAX);
        std::thread::scope(|scope| {
            let reading = scope.spawn(move || {
                let mut reading = Reading { erasures, leaves, batch: Vec::new(), report };
                segments.iter().try_for_each(|segment| reading.segment(segment))?;
                reading.send();
                Ok(())
            });
            let mut summed = Ok(());
            for batch in taken {
                summed = batch.iter().try_for_each(|leaf| sums.push(leaf));
                if summed.is_err() {
                    break;
                }
            }
            let read = reading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            summed.and(read)
        })
    }
}

/// Reads frames, and gives their leaves away.
struct Reading<'a> {
    erasures: &'a Erasures,
    leaves: mpsc::SyncSender<Vec<Hash>>,
    batch: Vec<Hash>,
    report: &'a mut LogReport,
}

impl Reading<'_> {
    fn segment(&mut self, segment: &SegmentFile) -> Result<(), VerifyError> {
        let mut reader = SegmentReader::open(segment)?;
        let (head, due) = (reader.head(), self.report.next_seq.max(self.report.first_seq));
        let report = &mut *self.report;
        let what = match () {
            () if head.log != report.log => format!("a segment of the log '{}'", head.log),
            () if head.writer.to_string() != report.writer => format!("written by {}", head.writer),
            () if head.first_seq != due => {
                format!("begins with {} where {due} is due", head.first_seq)
            }
            () => String::new(),
        };
        if !what.is_empty() {
            return Err(fault(&segment.path, 0, what).into());
        }
        report.segments += 1;
        loop {
            self.read(&mut reader)?;
            match reader.rest()? {
                Rest::Nothing => break,
                Rest::More => {}
                Rest::Torn { bytes } => {
                    self.report.torn_bytes += bytes;
                    break;
                }
                Rest::Damage(damage) => return Err(damage.into()),
            }
        }
        self.report.bytes += reader.offset();
        self.report.next_seq = reader.next_seq();
        Ok(())
    }

    fn read(&mut self, reader: &mut SegmentReader) -> Result<(), VerifyError> {
        loop {
            let offset = reader.offset();
            let Some(frame) = reader.next_frame()? else { return Ok(()) };
            self.batch.push(frame.leaf());
            if frame.form == Form::Erased {
                self.report.erased += 1;
                if !self.erasures.erased(frame.seq) {
                    let what =
                        format!("record {} has no payload, and no record says why", frame.seq);
                    return Err(fault(&reader.segment().path, offset, what).into());
                }
            }
            if self.batch.len() >= BATCH {
                self.send();
            }
        }
    }

    fn send(&mut self) {
        // Nobody takes them any more when there is a fault already.
        drop(self.leaves.send(std::mem::replace(&mut self.batch, Vec::with_capacity(BATCH))));
    }
}

/// Sums up leaves, and compares with whatever says what they have to come to.
struct Sums<'a> {
    dir: &'a Path,
    frontier: Frontier,
    tree: TreeCheck,
    notes: NoteCheck<'a>,
}

impl Sums<'_> {
    /// Leaves of records that are gone: the tree's file has them.
    fn gone(&mut self, records: u64) -> Result<(), VerifyError> {
        let path = level_path(self.dir, 0);
        if records == 0 {
            return Ok(());
        }
        let mut file = BufReader::with_capacity(1 << 18, File::open(&path).map_err(io_at(&path))?);
        for _ in 0..records {
            let mut leaf = [0; 32];
            file.read_exact(&mut leaf).map_err(io_at(&path))?;
            self.push(&leaf)?;
        }
        Ok(())
    }

    fn push(&mut self, leaf: &Hash) -> Result<(), VerifyError> {
        let (tree, mut wrong) = (&mut self.tree, Ok(()));
        self.frontier.push(*leaf, |height, hash| {
            if height.is_multiple_of(STEP) && wrong.is_ok() {
                wrong = tree.hash(height / STEP, hash);
            }
        });
        wrong?;
        self.notes.reached(&self.frontier)
    }

    fn finish(
        mut self,
        check: &Check<'_>,
        segments: &[SegmentFile],
        report: &mut LogReport,
    ) -> Result<(), VerifyError> {
        let size = self.frontier.size();
        let last = segments.last().map(|segment| segment.path.clone()).unwrap_or_default();
        let cut = |of: &str, signed: u64| {
            let end = std::fs::metadata(&last).map_or(0, |meta| meta.len());
            fault(&last, end, format!("the log ends with {size} records, {of} says {signed}"))
        };
        if let Some(signed) = self.notes.due() {
            return Err(cut("a checkpoint", signed).into());
        }
        self.tree.finish(size, self.notes.signed)?;
        let given = &check.wanted.keys;
        if !given.is_empty() && size > 0 && !self.notes.given_seen {
            let what = "no checkpoint is signed by a key that was given";
            return Err(fault(&check.dir.join(ALL), 0, what).into());
        }
        use base64::Engine as _;
        report.root = base64::engine::general_purpose::STANDARD.encode(self.frontier.root());
        report.next_seq = size;
        report.checkpoints = self.notes.count;
        report.signed = self.notes.signed;
        report.anchors = self.notes.anchors_met;
        report.key = self.notes.active.take().map(|key| key.to_string());
        Ok(())
    }
}

/// The files of the tree, read in step with the leaves.
struct TreeCheck {
    levels: Vec<Level>,
    /// There is a tree at all: a copy may go without.
    there: bool,
}

struct Level {
    path: PathBuf,
    file: Option<BufReader<File>>,
    /// Whole hashes when it was opened, and those that were compared.
    have: u64,
    at: u64,
    bytes: u64,
}

impl TreeCheck {
    fn open(log: &Path) -> Result<Self, VerifyError> {
        let open = |level| {
            let path = level_path(log, level);
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    return Ok(Level { path, file: None, have: 0, at: 0, bytes: 0 });
                }
                Err(error) => return Err(VerifyError::Io { file: path, error }),
            };
            let bytes = file.metadata().map_err(io_at(&path))?.len();
            let file = Some(BufReader::with_capacity(1 << 16, file));
            Ok(Level { path, file, have: bytes / HASH_BYTES, at: 0, bytes })
        };
        let levels = (0..LEVELS).map(open).collect::<Result<_, _>>()?;
        Ok(Self { levels, there: log.join(TREE).is_dir() })
    }

    /// The next hash of a level has to be this one, if there is one.
    fn hash(&mut self, level: u32, want: &Hash) -> Result<(), VerifyError> {
        let Some(level) = self.levels.get_mut(level as usize) else { return Ok(()) };
        let (at, offset) = (level.at, level.at * HASH_BYTES);
        let Some(file) = level.file.as_mut().filter(|_| offset < level.bytes) else {
            return Ok(());
        };
        // At its end there may be half a hash.
        let len = usize::try_from((level.bytes - offset).min(HASH_BYTES)).unwrap_or(32);
        let mut found = [0; 32];
        file.read_exact(&mut found[..len]).map_err(io_at(&level.path))?;
        level.at += 1;
        match found[..len] == want[..len] {
            true => Ok(()),
            false => {
                let what = format!("hash {at} is not that of the records");
                Err(fault(&level.path, offset, what).into())
            }
        }
    }

    fn finish(&self, size: u64, signed: u64) -> Result<(), VerifyError> {
        for (at, level) in (0..).zip(&self.levels).filter(|_| self.there) {
            if level.bytes > level.at * HASH_BYTES {
                let what = format!("hashes of more than the {size} records that there are");
                return Err(fault(&level.path, level.at * HASH_BYTES, what).into());
            }
            if level.have < level_len(at, signed) {
                let what = "shorter than it was for the last checkpoint";
                return Err(fault(&level.path, level.bytes, what).into());
            }
        }
        Ok(())
    }
}

/// The checkpoints of a log, read in step with the leaves.
struct NoteCheck<'a> {
    file: PathBuf,
    notes: Option<Notes<BufReader<io::Take<File>>>>,
    /// The next one; its root is compared when so many leaves are there.
    next: Option<(PathBuf, u64, Note)>,
    /// The last of all, while it is not among the others.
    last: Option<Note>,
    last_file: PathBuf,
    origin: &'a str,
    given: &'a [VerifierKey],
    published: Vec<&'a VerifierKey>,
    /// Who signs now.
    active: Option<VerifierKey>,
    given_seen: bool,
    anchors: Vec<&'a Note>,
    anchors_met: u64,
    signed: u64,
    count: u64,
}

impl<'a> NoteCheck<'a> {
    fn open(check: &Check<'a>, origin: &'a str, stored: &Stored) -> Result<Self, VerifyError> {
        let file = check.dir.join(ALL);
        let notes = match File::open(&file) {
            // What is appended meanwhile is not looked at.
            Ok(all) => Some(Notes::new(BufReader::new(all.take(stored.end)), 0)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(VerifyError::Io { file, error }),
        };
        let published = check.published.iter().filter(|key| key.name == origin).collect();
        let mut anchors: Vec<&Note> =
            check.wanted.anchors.iter().filter(|note| note.checkpoint.origin == origin).collect();
        anchors.sort_by_key(|note| note.checkpoint.tree.size);
        let mut this = Self {
            notes,
            next: None,
            last: stored.last.clone().filter(|_| stored.last != stored.newest),
            last_file: check.dir.join(LAST),
            file,
            origin,
            given: &check.wanted.keys,
            published,
            active: None,
            given_seen: false,
            anchors,
            anchors_met: 0,
            signed: 0,
            count: 0,
        };
        this.advance()?;
        for anchor in &this.anchors {
            // A checkpoint from elsewhere is evidence if its signature is by a key of this log.
            let keys = this.published.iter().copied().chain(this.given);
            if let Err(error) = anchor.verify(keys) {
                return Err(fault(
                    &this.file,
                    0,
                    format!("the checkpoint that was given: {error}"),
                )
                .into());
            }
        }
        this.reached(&Frontier::default())?;
        Ok(this)
    }

    /// Takes the next checkpoint, and checks who signed it and what it follows.
    fn advance(&mut self) -> Result<(), VerifyError> {
        let Some(notes) = &mut self.notes else { return self.take_last() };
        let at = notes.end();
        match notes.next_note() {
            Ok(Some((offset, note))) => self.check(self.file.clone(), offset, note),
            Ok(None) => {
                self.notes = None;
                self.take_last()
            }
            Err(NotesError::Io(error)) => Err(VerifyError::Io { file: self.file.clone(), error }),
            Err(NotesError::Note(error)) => Err(fault(&self.file, at, error).into()),
        }
    }

    fn take_last(&mut self) -> Result<(), VerifyError> {
        match self.last.take() {
            Some(note) => self.check(self.last_file.clone(), 0, note),
            None => Ok(()),
        }
    }

    fn check(&mut self, file: PathBuf, offset: u64, note: Note) -> Result<(), VerifyError> {
        let wrong = |what: &dyn std::fmt::Display| VerifyError::from(fault(&file, offset, what));
        let checkpoint = &note.checkpoint;
        if checkpoint.origin != self.origin {
            return Err(wrong(&format_args!("a checkpoint of '{}'", checkpoint.origin)));
        }
        if checkpoint.after() != Some(self.signed) || checkpoint.tree.size < self.signed {
            let before = self.signed;
            return Err(wrong(&format_args!("does not follow the checkpoint of size {before}")));
        }
        let good = note.verify(self.published.iter().copied().chain(self.given));
        let mut by = match (&self.active, good) {
            (_, Err(error @ NoteError::Forged(_))) => return Err(wrong(&error)),
            (None, good) => good.map_err(|error| wrong(&error))?[0].clone(),
            (Some(active), _) => {
                note.verify([active]).map_err(|error| wrong(&error))?;
                active.clone()
            }
        };
        self.given_seen |= self.given.contains(&by);
        if let Some(next) = checkpoint.next_key() {
            note.verify([&next]).map_err(|error| wrong(&error))?;
            self.given_seen |= self.given.contains(&next);
            by = next;
        }
        let known = |signature: &checkpoint::Signature| {
            let mut keys = self.published.iter().copied().chain(self.given).chain([&by]);
            keys.any(|key| key.name == signature.name && key.id == signature.id)
        };
        // A signature that nobody can check could be anything.
        if !note.signatures.iter().all(known) {
            return Err(wrong(&"signed by a key that nobody named"));
        }
        self.active = Some(by);
        self.count += 1;
        self.signed = checkpoint.tree.size;
        self.next = Some((file, offset, note));
        Ok(())
    }

    /// Compares with whatever speaks of so many leaves.
    fn reached(&mut self, frontier: &Frontier) -> Result<(), VerifyError> {
        while let Some((file, offset, note)) =
            self.next.take_if(|(_, _, note)| note.checkpoint.tree.size <= frontier.size())
        {
            if note.checkpoint.tree.root != frontier.root() {
                let size = frontier.size();
                let what = format!("its root is not that of the first {size} records");
                return Err(fault(&file, offset, what).into());
            }
            self.advance()?;
        }
        while let Some(anchor) =
            self.anchors.first().filter(|note| note.checkpoint.tree.size <= frontier.size())
        {
            if anchor.checkpoint.tree.root != frontier.root() {
                let size = frontier.size();
                let what =
                    format!("the checkpoint that was given has another root of {size} records");
                return Err(fault(&self.file, 0, what).into());
            }
            // Whoever signed it vouches for what is before it.
            self.given_seen |= anchor.verify(self.given).is_ok();
            self.anchors.remove(0);
            self.anchors_met += 1;
        }
        Ok(())
    }

    /// Size of a checkpoint that there are not enough records for.
    fn due(&self) -> Option<u64> {
        let next = self.next.as_ref().map(|(_, _, note)| note.checkpoint.tree.size);
        let anchor = self.anchors.first().map(|note| note.checkpoint.tree.size);
        next.into_iter().chain(anchor).min()
    }
}

#[cfg(test)]
mod tests;
