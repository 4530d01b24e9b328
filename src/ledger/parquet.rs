//! Segments as Parquet: what analysts, notebooks and warehouses read as it is.
//!
//! ```text
//! <state>/ledger/parquet/model=iris/date=2026-11-25/<writer>-<first_seq>.parquet
//!                        _segments/<writer>-<first_seq>.json     says what became of that segment
//!
//! segment ─▶ survey (which models, days and tensors) ─▶ sheets ─▶ fsync, rename ─▶ manifest
//! ```
//!
//! The columns are the fields of one line of JSON, by the same names, but for `model`, which a
//! folder of the path names, as every reader of such folders expects; and for each tensor that
//! occurs a column of its own, `in_<name>` or `out_<name>`, with its elements in a list, and
//! `…_shape` beside it. `inputs` and `outputs` have everything, as JSON; of a tensor with much data
//! they name the column that has it.
//!
//! Invariants:
//! - A file has its name once it is whole and on the disk. The manifest comes last: with it the
//!   segment is converted, without it none of its files count, and making them again gives the same
//!   bytes.
//! - Whatever is no file for a reader begins with `.` or `_`, which readers of folders leave out.
//! - Memory: some sheets at a time, each a row group of at most [`ROW_GROUP_BYTES_MAX`]; a segment
//!   with more models or days than that is read more than once.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::parquet::errors::ParquetError as WriteError;
use sha2::{Digest as _, Sha256};

use super::export::{Date, ExportError, Labels, Selection, View, scan_around, scan_file};
use super::frame::SegmentHead;
use super::reader::{self, Fault, ReadError, SegmentFile, SegmentReader};

mod converter;
mod labels;
mod manifest;
mod sheet;

pub use converter::{Converter, ConverterSettings, Progress};
pub use manifest::{FileEntry, MANIFESTS, Manifest, SegmentEntry, Unreadable};
use sheet::{Sheet, Survey};

/// Folder below the ledger's.
pub const FOLDER: &str = "parquet";
/// Rows of a group: what one thread of a reader takes at a time.
pub const ROW_GROUP_ROWS: usize = 128 << 10;
/// A group is ended before it grows beyond this, whatever its rows.
pub const ROW_GROUP_BYTES_MAX: usize = 32 << 20;
/// Sheets that are written at once.
const SHEETS_MAX: usize = 8;
/// A checkpoint is a few lines.
const CHECKPOINT_BYTES_MAX: u64 = 64 << 10;
/// The folder of records that are about no model, as Hive names it.
const NO_MODEL: &str = "__HIVE_DEFAULT_PARTITION__";

#[derive(Debug, thiserror::Error)]
pub enum ParquetError {
    #[error(transparent)]
    Export(#[from] ExportError),
    #[error("{}: {error}", path.display())]
    Write { path: PathBuf, error: WriteError },
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("stopped before it was done")]
    Stopped,
}

/// How a segment is converted.
pub struct Job<'a> {
    pub wanted: &'a Selection,
    /// Asked now and then whether to break off.
    pub stopped: &'a dyn Fn() -> bool,
    /// Days that a model's records are kept, for the manifest.
    pub days_of: &'a dyn Fn(&str) -> Option<u32>,
}

impl<'a> Job<'a> {
    /// To its end, by somebody who removes nothing.
    pub fn of(wanted: &'a Selection) -> Self {
        Self { wanted, stopped: &|| false, days_of: &|_| None }
    }
}

/// Writes what is wanted of a segment below `root`, and its manifest. What a sealed one has damaged
/// is left out, logged, and named in the manifest.
///
/// # Errors
/// When the segment cannot be read, or a file not be written; what was written is no harm then.
pub fn convert(
    segment: &SegmentFile,
    root: &Path,
    job: &Job<'_>,
) -> Result<Manifest, ParquetError> {
    let mut entry = SegmentEntry::of(segment)?;
    let mut unreadable = Vec::new();
    let (head, parts) = survey(segment, job, &mut entry, &mut unreadable)?;
    entry.last_seq = entry.last_seq.max(unreadable.last().map(|last| last.last_seq));
    let head = match head {
        Some(head) => head,
        // Nothing of it can be told, but which log it is of.
        None => match of_another(segment).filter(|_| !unreadable.is_empty()) {
            Some(head) => head,
            None => return Ok(Manifest::default()),
        },
    };
    // What went before its segment does not come back when that is written anew.
    let before = Manifest::read(root, head.writer, head.first_seq).unwrap_or_default().files;
    let gone: Vec<FileEntry> = before.into_iter().filter(|file| file.removed).collect();
    let is_gone = |(model, date): &Part| {
        gone.iter().any(|file| file.model == *model && file.date == date.to_string())
    };
    let parts: Vec<(Part, Survey)> = parts.into_iter().filter(|(part, _)| !is_gone(part)).collect();
    let mut manifest = Manifest::new(&head, entry);
    for some in parts.chunks(SHEETS_MAX) {
        let files = write_parts(segment, root, job, &head, some, manifest.segment.last_seq)?;
        manifest.files.extend(files);
    }
    manifest.files.extend(gone);
    manifest.unreadable = unreadable;
    manifest.checkpoint = checkpoint(segment, manifest.segment.last_seq);
    manifest.write(root)?;
    Ok(manifest)
}

/// The head that a segment would have, by that of another of its log.
fn of_another(segment: &SegmentFile) -> Option<SegmentHead> {
    let all = reader::segments(segment.path.parent()?.parent()?).ok()?;
    let head =
        all.iter().find_map(|other| Some(SegmentReader::open(other).ok()?.head().clone()))?;
    Some(SegmentHead { first_seq: segment.first_seq, ..head })
}

/// The log's latest checkpoint, if it covers the segment: its second line is how many records it
/// covers.
fn checkpoint(segment: &SegmentFile, last_seq: Option<u64>) -> Option<String> {
    let log = segment.path.parent()?.parent()?;
    let path = log.join("checkpoint");
    let len = std::fs::metadata(&path).ok()?.len();
    let text = (len <= CHECKPOINT_BYTES_MAX).then(|| std::fs::read_to_string(path).ok())??;
    let size: u64 = text.lines().nth(1)?.parse().ok()?;
    (size > last_seq?).then_some(text)
}

/// Writes what is wanted of a log into one file, `model` being a column.
///
/// # Errors
/// As [`convert`].
pub fn single(log: &Path, wanted: &Selection, path: &Path) -> Result<u64, ParquetError> {
    let mut survey = Survey::default();
    let mut ends = HashMap::new();
    let segments = super::export::segments(log, wanted)?;
    for segment in &segments {
        scan_file::<ParquetError>(segment, wanted, |_, view| {
            survey.add(view);
            ends.insert(segment.first_seq, view.seq);
            Ok(ControlFlow::Continue(()))
        })?;
    }
    let labels = wanted.labels.clone();
    let mut sheet = Temporary::create(path, survey.columns(), &[], true, labels)?;
    for segment in &segments {
        let Some(end) = ends.get(&segment.first_seq).copied() else { continue };
        scan_file::<ParquetError>(segment, wanted, |head, view| {
            if view.seq > end {
                return Ok(ControlFlow::Break(()));
            }
            sheet.push(head, view)?;
            Ok(ControlFlow::Continue(()))
        })?;
    }
    sheet.finish()?;
    Ok(survey.rows)
}

/// The model and day of a file.
type Part = (String, Date);

fn survey(
    segment: &SegmentFile,
    job: &Job<'_>,
    entry: &mut SegmentEntry,
    unreadable: &mut Vec<Unreadable>,
) -> Result<(Option<SegmentHead>, BTreeMap<Part, Survey>), ParquetError> {
    let mut parts: HashMap<Date, HashMap<String, Survey>> = HashMap::new();
    let take = |_: &SegmentHead, view: &View<'_>| {
        if view.seq.is_multiple_of(1024) && (job.stopped)() {
            return Err(ParquetError::Stopped);
        }
        entry.last_seq = Some(view.seq);
        entry.records += 1;
        let of_day = parts.entry(Date::of(view.time_ns)).or_default();
        match of_day.get_mut(view.model) {
            Some(survey) => survey.add(view),
            None => of_day.entry(view.model.to_owned()).or_default().add(view),
        }
        Ok(ControlFlow::Continue(()))
    };
    let reader = scan_around::<ParquetError>(segment, job.wanted, take, |(from, to), fault| {
        let to = to.map_or_else(|| next_first(segment, &fault), Ok)?;
        if to <= from {
            return Ok(());
        }
        let (file, offset, what) = (fault.file.display(), fault.offset, &fault.what);
        tracing::error!(%file, offset, what, from, to = to - 1, "records cannot be made Parquet");
        let (first_seq, last_seq, what) = (from, to - 1, fault.what);
        unreadable.push(Unreadable { first_seq, last_seq, offset, what });
        Ok(())
    })?;
    let flat = parts.into_iter().flat_map(|(date, of_day)| {
        of_day.into_iter().map(move |(model, survey)| ((model, date), survey))
    });
    Ok((reader.map(|reader| reader.head().clone()), flat.collect()))
}

/// Where the records of a sealed segment end, as its successor says.
fn next_first(segment: &SegmentFile, fault: &Fault) -> Result<u64, ExportError> {
    let log = segment.path.parent().and_then(Path::parent).unwrap_or(Path::new("."));
    let all = reader::segments(log)?;
    let next = all.iter().find(|other| other.first_seq > segment.first_seq);
    let next = next.filter(|_| segment.sealed).map(|next| next.first_seq);
    next.ok_or_else(|| ExportError::from(ReadError::from(fault.clone())))
}

fn write_parts(
    segment: &SegmentFile,
    root: &Path,
    job: &Job<'_>,
    head: &SegmentHead,
    parts: &[(Part, Survey)],
    end: Option<u64>,
) -> Result<Vec<FileEntry>, ParquetError> {
    let mut sheets = Vec::with_capacity(parts.len());
    let mut index: HashMap<Date, HashMap<&str, usize>> = HashMap::new();
    for (at, ((model, date), survey)) in parts.iter().enumerate() {
        let path = root.join(file_name(model, *date, head));
        let about = [
            ("tidegate.writer", head.writer.to_string()),
            ("tidegate.log", head.log.clone()),
            ("tidegate.model", model.clone()),
            ("tidegate.first_seq", survey.first_seq.to_string()),
            ("tidegate.last_seq", survey.last_seq.to_string()),
        ];
        let labels = job.wanted.labels.clone();
        sheets.push(Temporary::create(&path, survey.columns(), &about, false, labels)?);
        index.entry(*date).or_default().insert(model, at);
    }
    let take = |head: &SegmentHead, view: &View<'_>| {
        // Came since the survey; of an open segment only.
        if Some(view.seq) > end {
            return Ok(ControlFlow::Break(()));
        }
        if view.seq.is_multiple_of(1024) && (job.stopped)() {
            return Err(ParquetError::Stopped);
        }
        let of_day = index.get(&Date::of(view.time_ns));
        if let Some(at) = of_day.and_then(|of_day| of_day.get(view.model)) {
            sheets[*at].push(head, view)?;
        }
        Ok(ControlFlow::Continue(()))
    };
    // Damage was found by the survey.
    scan_around::<ParquetError>(segment, job.wanted, take, |_, _| Ok(()))?;
    let mut files = Vec::with_capacity(parts.len());
    for (((model, date), survey), sheet) in parts.iter().zip(sheets) {
        let (sha256, bytes) = sheet.finish()?;
        files.push(FileEntry {
            file: file_name(model, *date, head),
            model: model.clone(),
            date: date.to_string(),
            sha256,
            bytes,
            rows: survey.rows,
            first_seq: survey.first_seq,
            last_seq: survey.last_seq,
            first_time_ns: survey.first_ns,
            last_time_ns: survey.last_ns,
            retention_days: (job.days_of)(model),
            removed: false,
            erased: false,
        });
    }
    Ok(files)
}

/// `model=iris/date=2026-11-25/<writer>-<first_seq>.parquet`
fn file_name(model: &str, date: Date, head: &SegmentHead) -> String {
    let (writer, first_seq) = (head.writer, head.first_seq);
    format!("model={}/date={date}/{writer}-{first_seq:020}.parquet", folder_value(model))
}

/// A model's name is always one segment of a path; what is none, from a file that was altered, is
/// made one.
fn folder_value(model: &str) -> String {
    if model.is_empty() {
        return NO_MODEL.to_owned();
    }
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    let mut value = String::with_capacity(model.len());
    for byte in model.bytes() {
        match plain(byte) {
            true => value.push(char::from(byte)),
            false => value += &format!("%{byte:02X}"),
        }
    }
    value
}

/// A sheet in a file that has not its name yet.
struct Temporary {
    sheet: Sheet<Hashing>,
    path: PathBuf,
    temporary: PathBuf,
}

impl Temporary {
    fn create(
        path: &Path,
        columns: Vec<sheet::Column>,
        about: &[(&str, String)],
        with_model: bool,
        labels: Option<Arc<Labels>>,
    ) -> Result<Self, ParquetError> {
        let folder = folder_of(path);
        let failed = |error| ParquetError::Io { path: path.to_owned(), error };
        std::fs::create_dir_all(folder).map_err(failed)?;
        let temporary = temporary(path);
        let file = File::create(&temporary).map_err(failed)?;
        let hashing = Hashing { file, hash: Sha256::new(), bytes: 0 };
        let sheet = Sheet::new(hashing, columns, about, with_model, labels)
            .map_err(|error| ParquetError::Write { path: path.to_owned(), error })?;
        Ok(Self { sheet, path: path.to_owned(), temporary })
    }

    fn push(&mut self, head: &SegmentHead, view: &View<'_>) -> Result<(), ParquetError> {
        let pushed = self.sheet.push(&head.writer.to_string(), view);
        pushed.map_err(|error| ParquetError::Write { path: self.path.clone(), error })
    }

    /// The SHA-256 of what is on the disk now under its name, and its bytes.
    fn finish(self) -> Result<(String, u64), ParquetError> {
        let Self { sheet, path, temporary } = self;
        let hashing = sheet.finish();
        let hashing = hashing.map_err(|error| ParquetError::Write { path: path.clone(), error })?;
        let digest = hashing.hash.finalize();
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        let placed = hashing.file.sync_all().and_then(|()| place(&temporary, &path));
        placed.map_err(|error| ParquetError::Io { path, error })?;
        Ok((digest, hashing.bytes))
    }
}

/// Gives a file its name, on the disk too.
fn place(temporary: &Path, path: &Path) -> io::Result<()> {
    std::fs::rename(temporary, path)?;
    // The file's folder, and those above it that may be new: the day's, the model's, and the root.
    for folder in path.ancestors().skip(1).take(3) {
        let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Where a file is until it is whole.
fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
    folder_of(path).join(format!(".{}.tmp", name.unwrap_or_default()))
}

/// A file that sums up what is written to it.
struct Hashing {
    file: File,
    hash: Sha256,
    bytes: u64,
}

impl Write for Hashing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write_all(bytes)?;
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests;
