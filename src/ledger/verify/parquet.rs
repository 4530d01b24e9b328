//! Checks the Parquet files against their manifests, and those against the segments.
//!
//! The log is checked before: that its numbers go on without a gap is known, so how many records a
//! segment has follows from its successor.
//!
//! Invariants:
//! - Every file that a reader of the folder would take is named by a manifest, or by a segment whose
//!   turn it is.
//! - Nothing outside of the folder is opened, whatever a manifest says.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::path::{Component, Path, PathBuf};

use ::parquet::file::metadata::ParquetMetaDataReader;
use serde::Serialize;

use super::{LogReport, TRIES, TRY_AGAIN, VerifyError, fault, io_at};
use crate::checksum;
use crate::ledger::parquet::{FileEntry, MANIFESTS, Manifest};
use crate::ledger::reader;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ParquetReport {
    /// Segments that have a manifest.
    pub segments: u64,
    pub files: u64,
    pub rows: u64,
    pub bytes: u64,
    /// Files that went before their segment, as their model's retention says.
    pub removed: u64,
    /// Records that a segment has damaged, and that no file has.
    pub unreadable: u64,
    /// Sealed segments without a manifest.
    pub waiting: u64,
    /// Segments that were written anew since: their Parquet is made anew, too.
    pub stale: u64,
}

/// Checks the files below `root`, which are of this log.
pub(super) fn check(
    root: &Path,
    dir: &Path,
    log: &LogReport,
) -> Result<ParquetReport, VerifyError> {
    let mut report = ParquetReport::default();
    let mut named = BTreeSet::new();
    let segments = Segments::read(dir, log)?;
    for path in manifests(root)? {
        let mut tries = 1;
        let found = loop {
            let before = std::fs::read(&path).ok();
            match of_manifest(root, &path, before.as_deref(), &segments, log) {
                Err(error) if tries < TRIES => {
                    tries += 1;
                    std::thread::sleep(TRY_AGAIN);
                    // Made anew or removed meanwhile, by a gateway that runs?
                    if before == std::fs::read(&path).ok() {
                        return Err(error);
                    }
                }
                found => break found?,
            }
        };
        let Some((one, manifest)) = found else { continue };
        report.add(&one);
        named.extend(manifest.files.into_iter().map(|file| file.file));
    }
    report.waiting =
        segments.sealed.len() as u64 - report.segments.min(segments.sealed.len() as u64);
    strangers(root, &named, &segments)?;
    Ok(report)
}

impl ParquetReport {
    fn add(&mut self, other: &Self) {
        self.segments += other.segments;
        self.files += other.files;
        self.rows += other.rows;
        self.bytes += other.bytes;
        self.removed += other.removed;
        self.unreadable += other.unreadable;
        self.stale += other.stale;
    }
}

/// The sealed segments of the log: bytes, and number after the last record, by the first.
struct Segments {
    writer: String,
    sealed: BTreeMap<u64, (u64, u64)>,
    /// Number of the first record that is there.
    first_seq: u64,
}

impl Segments {
    fn read(dir: &Path, log: &LogReport) -> Result<Self, VerifyError> {
        let listed = reader::segments(dir)?;
        let mut sealed = BTreeMap::new();
        for (at, segment) in listed.iter().enumerate().filter(|(_, segment)| segment.sealed) {
            let end = listed.get(at + 1).map_or(log.next_seq, |next| next.first_seq);
            match std::fs::metadata(&segment.path) {
                Ok(meta) => drop(sealed.insert(segment.first_seq, (meta.len(), end))),
                // Its time had come.
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(io_at(&segment.path)(error)),
            }
        }
        let first_seq = listed.first().map_or(log.first_seq, |first| first.first_seq);
        Ok(Self { writer: log.writer.clone(), sealed, first_seq })
    }
}

/// Files with names of manifests.
fn manifests(root: &Path) -> Result<Vec<PathBuf>, VerifyError> {
    let folder = root.join(MANIFESTS);
    let entries = match std::fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io_at(&folder))?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(io_at(&folder))?.path();
        if !is_hidden(&path) && path.extension().is_some_and(|extension| extension == "json") {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn is_hidden(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'))
}

/// What one manifest says, if that is right; `None` when it is gone.
fn of_manifest(
    root: &Path,
    path: &Path,
    text: Option<&[u8]>,
    segments: &Segments,
    log: &LogReport,
) -> Result<Option<(ParquetReport, Manifest)>, VerifyError> {
    let wrong = |what: &dyn std::fmt::Display| VerifyError::from(fault(path, 0, what));
    let Some(text) = text else {
        return match path.exists() {
            true => Err(wrong(&"cannot be read")),
            false => Ok(None),
        };
    };
    let manifest: Manifest = serde_json::from_slice(text)
        .map_err(|error| wrong(&format_args!("no manifest of a segment: {error}")))?;
    let first_seq = manifest.segment.first_seq;
    let name = format!("{}-{first_seq:020}.json", manifest.writer);
    if manifest.writer != segments.writer || manifest.log != log.log || !path.ends_with(name) {
        return Err(wrong(&"a manifest of another log, or of another name"));
    }
    let mut report = ParquetReport { segments: 1, ..ParquetReport::default() };
    report.unreadable = manifest
        .unreadable
        .iter()
        .map(|lost| lost.last_seq + 1 - lost.first_seq.min(lost.last_seq))
        .sum();
    let rows = manifest.files.iter().map(|file| file.rows).sum::<u64>();
    if rows != manifest.segment.records {
        let records = manifest.segment.records;
        return Err(wrong(&format_args!("{records} records, and files with {rows} rows")));
    }
    match segments.sealed.get(&first_seq) {
        // It was written anew since; a copy without its payloads is always shorter.
        Some((bytes, _)) if *bytes != manifest.segment.bytes => report.stale = 1,
        Some((_, end)) => {
            let (has, says) = (end - first_seq, rows + report.unreadable);
            if has != says {
                return Err(wrong(&format_args!("the segment has {has} records, not {says}")));
            }
        }
        // What a crash left of a removal goes at the next start.
        None if first_seq < segments.first_seq => report.segments = 0,
        None => return Err(wrong(&"its segment is not there")),
    }
    for file in &manifest.files {
        if file.removed {
            report.removed += 1;
            continue;
        }
        // What is made anew is not what the manifest says until that is written, too; what a crash left
        // of a removal need not be there.
        if report.stale == 0 && report.segments > 0 {
            of_file(root, path, file)?;
        }
        report.files += 1;
        report.rows += file.rows;
        report.bytes += file.bytes;
    }
    Ok(Some((report, manifest)))
}

fn of_file(root: &Path, manifest: &Path, entry: &FileEntry) -> Result<(), VerifyError> {
    let name = Path::new(&entry.file);
    if !name.components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(
            fault(manifest, 0, format!("'{}' is no file of this folder", entry.file)).into()
        );
    }
    let path = root.join(name);
    let mut file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(VerifyError::Missing { file: path, named_by: manifest.to_owned() });
        }
        Err(error) => return Err(io_at(&path)(error)),
    };
    let (sha256, bytes) = checksum::sha256(&mut file).map_err(io_at(&path))?;
    let sha256 = sha256.hex();
    if bytes != entry.bytes || sha256 != entry.sha256 {
        let what = format!(
            "{bytes} bytes with SHA-256 {sha256}, its manifest says {} with {}",
            entry.bytes, entry.sha256
        );
        return Err(fault(&path, 0, what).into());
    }
    let read = crate::panics::caught(|| {
        ParquetMetaDataReader::new().parse_and_finish(&file).map_err(|error| error.to_string())
    });
    let meta = read.unwrap_or_else(|| Err("its end cannot be read".to_owned()));
    let meta = meta.map_err(|error| fault(&path, 0, format!("no Parquet file: {error}")))?;
    match u64::try_from(meta.file_metadata().num_rows()) {
        Ok(rows) if rows == entry.rows => Ok(()),
        _ => {
            let (has, says) = (meta.file_metadata().num_rows(), entry.rows);
            Err(fault(&path, 0, format!("{has} rows, its manifest says {says}")).into())
        }
    }
}

/// Looks for files that readers would take and that nothing names: `model=…/date=…/*.parquet`.
fn strangers(
    root: &Path,
    named: &BTreeSet<String>,
    segments: &Segments,
) -> Result<(), VerifyError> {
    let folders = |folder: &Path| -> Result<Vec<PathBuf>, VerifyError> {
        let entries = match std::fs::read_dir(folder) {
            // Its last file went.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(io_at(folder))?,
        };
        entries.map(|entry| entry.map(|entry| entry.path()).map_err(io_at(folder))).collect()
    };
    for model in
        folders(root)?.into_iter().filter(|path| path.is_dir() && !path.ends_with(MANIFESTS))
    {
        for day in folders(&model)?.into_iter().filter(|path| path.is_dir()) {
            for path in folders(&day)?.into_iter().filter(|path| !is_hidden(path)) {
                let name = path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned();
                if !named.contains(&name) && !segments.may_become(&path) && path.exists() {
                    return Err(fault(&path, 0, "a file that no manifest names").into());
                }
            }
        }
    }
    Ok(())
}

impl Segments {
    /// Whether it may be a file that is written now, or was until a crash: its manifest comes last.
    fn may_become(&self, path: &Path) -> bool {
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let first_seq = stem.strip_prefix(&self.writer).and_then(|rest| rest.strip_prefix('-'));
        let first_seq = first_seq.and_then(|digits| digits.parse().ok());
        let folder = path.ancestors().nth(3).unwrap_or(path);
        first_seq.is_some_and(|first_seq: u64| {
            let manifest = folder.join(MANIFESTS).join(format!("{stem}.json"));
            !manifest.exists()
                && (self.sealed.contains_key(&first_seq) || first_seq < self.first_seq)
        })
    }
}
