//! What became of a segment: its files, with their digests; its presence says that they are whole.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::{Deserialize, Serialize};

use super::{ParquetError, place, temporary};
use crate::ledger::frame::{SegmentHead, WriterId};
use crate::ledger::reader::SegmentFile;

/// Folder of the manifests below the one of the Parquet files.
pub const MANIFESTS: &str = "_segments";
/// A manifest has some hundred bytes for each model and day.
const BYTES_MAX: u64 = 64 << 20;

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Of this form of manifest: 1.
    pub format: u32,
    pub writer: String,
    pub log: String,
    pub segment: SegmentEntry,
    pub files: Vec<FileEntry>,
    /// What the segment has damaged.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreadable: Vec<Unreadable>,
    /// The log's checkpoint that covers the segment, if there was one by then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoint: Option<String>,
    pub created_by: String,
}

/// Records that are in none of the files.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unreadable {
    pub first_seq: u64,
    pub last_seq: u64,
    /// Where in the segment the fault is, and which.
    pub offset: u64,
    pub what: String,
}

/// The segment that was converted, as it was then.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentEntry {
    pub file: String,
    pub bytes: u64,
    /// Of the file; other than that it was written anew, since payloads were erased.
    pub modified_ns: u64,
    pub first_seq: u64,
    /// `None` when nothing is in it.
    pub last_seq: Option<u64>,
    pub records: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    /// Below the folder of the Parquet files.
    pub file: String,
    pub model: String,
    pub date: String,
    pub sha256: String,
    pub bytes: u64,
    pub rows: u64,
    pub first_seq: u64,
    pub last_seq: u64,
    pub first_time_ns: i64,
    pub last_time_ns: i64,
    /// What its model said of how long, when the file was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub retention_days: Option<u32>,
    /// Its time had come before that of its segment.
    #[serde(default)]
    pub removed: bool,
    /// Nor do its records have payloads in the segment any more, or their erasure is ordered.
    #[serde(default)]
    pub erased: bool,
}

impl SegmentEntry {
    /// # Errors
    /// When there is no such file.
    pub(super) fn of(segment: &SegmentFile) -> Result<Self, ParquetError> {
        let failed = |error| ParquetError::Io { path: segment.path.clone(), error };
        let about = std::fs::metadata(&segment.path).map_err(failed)?;
        let modified = about.modified().map_err(failed)?;
        let modified = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
        let file = segment.path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Self {
            file,
            bytes: about.len(),
            modified_ns: u64::try_from(modified.as_nanos()).unwrap_or(u64::MAX),
            first_seq: segment.first_seq,
            last_seq: None,
            records: 0,
        })
    }
}

impl Manifest {
    pub(super) fn new(head: &SegmentHead, segment: SegmentEntry) -> Self {
        Self {
            format: 1,
            writer: head.writer.to_string(),
            log: head.log.clone(),
            segment,
            files: Vec::new(),
            unreadable: Vec::new(),
            checkpoint: None,
            created_by: format!("tidegate {}", env!("CARGO_PKG_VERSION")),
        }
    }

    pub fn path(root: &Path, writer: WriterId, first_seq: u64) -> PathBuf {
        root.join(MANIFESTS).join(format!("{writer}-{first_seq:020}.json"))
    }

    /// The manifest of a segment; `None` when it is not converted, or what is there cannot be read.
    pub fn read(root: &Path, writer: WriterId, first_seq: u64) -> Option<Self> {
        Self::read_file(&Self::path(root, writer, first_seq))
    }

    fn read_file(path: &Path) -> Option<Self> {
        let len = std::fs::metadata(path).ok()?.len();
        let bytes = (len <= BYTES_MAX).then(|| std::fs::read(path).ok()).flatten()?;
        serde_json::from_slice(&bytes).ok().filter(|manifest: &Self| manifest.format == 1)
    }

    /// All manifests that are there, by their segments' first numbers.
    pub fn all(root: &Path) -> Vec<Self> {
        let entries = std::fs::read_dir(root.join(MANIFESTS)).into_iter().flatten().flatten();
        let json = entries.map(|entry| entry.path()).filter(|path| {
            let hidden =
                path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
            !hidden && path.extension().is_some_and(|extension| extension == "json")
        });
        let mut all: Vec<Self> = json.filter_map(|path| Self::read_file(&path)).collect();
        all.sort_by(|a, b| (a.segment.first_seq, &a.writer).cmp(&(b.segment.first_seq, &b.writer)));
        all
    }

    /// Whether the segment is still as it was when it was converted.
    pub fn fits(&self, segment: &SegmentFile) -> bool {
        SegmentEntry::of(segment).is_ok_and(|now| {
            (now.bytes, now.modified_ns) == (self.segment.bytes, self.segment.modified_ns)
        })
    }

    pub fn write(&self, root: &Path) -> Result<(), ParquetError> {
        let name = format!("{}-{:020}.json", self.writer, self.segment.first_seq);
        let path = root.join(MANIFESTS).join(name);
        let failed = |error| ParquetError::Io { path: path.clone(), error };
        std::fs::create_dir_all(root.join(MANIFESTS)).map_err(failed)?;
        let temporary = temporary(&path);
        let bytes =
            serde_json::to_vec_pretty(self).map_err(std::io::Error::from).map_err(failed)?;
        let mut file = File::create(&temporary).map_err(failed)?;
        file.write_all(&bytes)
            .and_then(|()| file.sync_all())
            .and_then(|()| place(&temporary, &path))
            .map_err(failed)
    }
}
