//! How long records are kept, and what keeps them longer.
//!
//! ```text
//! manifests (which models and days a segment has) ─▶ due? ─▶ held? delivered? ─▶ RETENTION record
//!                                                                                 │ on the disk
//!                                      segment, its Parquet, its manifest go ◀────┘
//! ```
//!
//! Invariants:
//! - A segment goes when the time of all its records has come, nobody holds any of them, every sink
//!   has them, and those before it are gone: what is left of a log has no holes.
//! - It is recorded, and the record is on the disk, before anything goes.
//! - Nothing goes for want of space: a disk that fills up is told of, and refuses, instead.
//!
//! A model that keeps its records for a shorter time than others has its Parquet files removed then,
//! and a day later its payloads [erased](early); what is left of its records goes with their segment.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::parquet::{FileEntry, MANIFESTS, Manifest};
use super::reader::{self, SegmentFile};
use super::record::{Head, Kind, Payload};

mod early;
mod holds;

pub use holds::{HOLDS_MAX, Hold, HoldError, Holds};

/// Default of `ledger.retention_days`: logs of AI systems are kept for six months at least.
pub const DAYS: u32 = 180;
const DAY_NS: i64 = 86_400 * 1_000_000_000;
/// Word of a record that says that records went.
const REMOVE: &str = "retention.remove";

/// Days that a model's records are kept; `None` when nothing is known of it now.
pub type DaysOf = Arc<dyn Fn(&str) -> Option<u32> + Send + Sync>;
/// Writes a record; whether it is on the disk.
pub type Announce = Box<dyn FnMut(&Head, &Payload) -> bool + Send>;
/// Records before this number are with every sink.
pub type Delivered = Arc<dyn Fn() -> u64 + Send + Sync>;

/// What decides, and where what it decides about is.
pub struct Retention {
    /// Folder of the log.
    pub log: PathBuf,
    /// Its name.
    pub name: &'static str,
    /// Folder of the Parquet files.
    pub parquet: PathBuf,
    /// Of models that nothing else is known of; 0: for ever.
    pub days: u32,
    pub days_of: DaysOf,
    pub delivered: Delivered,
    pub holds: Arc<Holds>,
    pub announce: Announce,
}

/// What went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    pub segments: u64,
    pub records: u64,
    pub files: u64,
    /// Payloads whose erasure was ordered.
    pub erased: u64,
}

impl Retention {
    /// Removes whatever may go now.
    ///
    /// # Errors
    /// When a file cannot be removed; it is tried again at the next call.
    pub fn step(&mut self, now: SystemTime) -> io::Result<Removed> {
        let now_ns = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let now_ns = i64::try_from(now_ns).unwrap_or(i64::MAX);
        let mut removed = Removed::default();
        let segments = match reader::segments(&self.log) {
            Ok(segments) => segments,
            Err(error) if super::export::is_gone(&error) => return Ok(removed),
            Err(error) => return Err(io::Error::other(error)),
        };
        let mut manifests = Manifest::all(&self.parquet);
        manifests.retain(|manifest| manifest.log == self.name);
        self.finish_removals(&segments, &manifests)?;
        let due = self.due(&segments, &manifests, now_ns);
        if let Some(last) = due.last()
            && self.announce(&due, last, now_ns)
        {
            for (segment, manifest) in &due {
                std::fs::remove_file(&segment.path)?;
                self.remove_parquet(manifest)?;
                removed.segments += 1;
                removed.records += manifest.segment.records;
            }
            sync(&self.log.join(reader::SEGMENTS))?;
        }
        let gone = due.len();
        drop(due);
        let mut left = manifests.split_off(gone);
        for manifest in &mut left {
            removed.files += self.remove_files(manifest, now_ns)?;
        }
        removed.erased = self.erase_early(&segments, &mut left, now_ns)?;
        Ok(removed)
    }

    /// The first segments of the log, as many as may go.
    fn due<'a>(
        &self,
        segments: &'a [SegmentFile],
        manifests: &'a [Manifest],
        now_ns: i64,
    ) -> Vec<(&'a SegmentFile, &'a Manifest)> {
        let delivered = (self.delivered)();
        let of = |segment: &SegmentFile| {
            manifests.iter().find(|it| it.segment.first_seq == segment.first_seq)
        };
        // Those of which nothing can be told go with what came after them.
        let (mut due, mut untold) = (Vec::new(), Vec::new());
        for segment in segments.iter().filter(|segment| segment.sealed) {
            // What is not converted yet is not that old, or cannot be read: then it stays.
            let Some(manifest) = of(segment).filter(|manifest| manifest.fits(segment)) else {
                break;
            };
            if manifest.files.is_empty() && !manifest.unreadable.is_empty() {
                untold.push((segment, manifest));
                continue;
            }
            let is_due = manifest.files.iter().all(|file| self.is_due(file, now_ns))
                && manifest.segment.last_seq.is_some_and(|last| last < delivered);
            if !is_due {
                break;
            }
            due.append(&mut untold);
            due.push((segment, manifest));
        }
        due
    }

    fn is_due(&self, file: &FileEntry, now_ns: i64) -> bool {
        let days = (self.days_of)(&file.model).or(file.retention_days).unwrap_or(self.days);
        let until = file.last_time_ns.saturating_add(i64::from(days).saturating_mul(DAY_NS));
        days > 0 && until < now_ns && !self.holds.hold(file)
    }

    fn announce(
        &mut self,
        due: &[(&SegmentFile, &Manifest)],
        (_, last): &(&SegmentFile, &Manifest),
        now_ns: i64,
    ) -> bool {
        let first = due.first().map_or(0, |(segment, _)| segment.first_seq);
        let below = last.segment.last_seq.map_or(0, |last| last + 1);
        let count = due.iter().map(|(_, manifest)| manifest.segment.records).sum();
        let mut models: Vec<&str> =
            due.iter().flat_map(|(_, it)| it.files.iter().map(|file| &*file.model)).collect();
        models.sort_unstable();
        models.dedup();
        let body = json!({
            "log": self.name, "removed_below": below, "reason": "retention",
            "first_seq": first, "segments": due.len(), "models": models,
        });
        let head = Head {
            kind: Kind::Retention as i32,
            time_ns: now_ns,
            action: REMOVE.to_owned(),
            principal: "retention".to_owned(),
            count,
            ..Head::default()
        };
        let payload = Payload { body: body.to_string().into_bytes().into(), ..Payload::default() };
        let recorded = (self.announce)(&head, &payload);
        match recorded {
            true => tracing::info!(
                log = self.name,
                first,
                below,
                count,
                "records removed, as their retention says"
            ),
            false => tracing::warn!(
                log = self.name,
                "records stay beyond their time: that they go cannot be recorded"
            ),
        }
        recorded
    }

    /// Ends what a crash interrupted: the segment was gone, its files were not.
    fn finish_removals(&self, segments: &[SegmentFile], manifests: &[Manifest]) -> io::Result<()> {
        let Some(first) = segments.first().map(|segment| segment.first_seq) else { return Ok(()) };
        for manifest in manifests.iter().filter(|manifest| manifest.segment.first_seq < first) {
            self.remove_parquet(manifest)?;
        }
        Ok(())
    }

    fn remove_parquet(&self, manifest: &Manifest) -> io::Result<()> {
        for file in &manifest.files {
            if_there(std::fs::remove_file(self.parquet.join(&file.file)))?;
            self.remove_empty(&file.file);
        }
        let (writer, first_seq) = (&manifest.writer, manifest.segment.first_seq);
        let path = self.parquet.join(MANIFESTS).join(format!("{writer}-{first_seq:020}.json"));
        if_there(std::fs::remove_file(path))
    }

    /// Parquet files whose own time has come, of segments that stay.
    fn remove_files(&self, manifest: &mut Manifest, now_ns: i64) -> io::Result<u64> {
        let delivered = (self.delivered)();
        let mut removed = 0;
        for at in 0..manifest.files.len() {
            let file = &manifest.files[at];
            let due = !file.removed && self.is_due(file, now_ns);
            if !due || manifest.segment.last_seq.is_none_or(|last| last >= delivered) {
                continue;
            }
            let name = file.file.clone();
            if_there(std::fs::remove_file(self.parquet.join(&name)))?;
            self.remove_empty(&name);
            tracing::info!(file = name, "a Parquet file removed, as its model's retention says");
            manifest.files[at].removed = true;
            removed += 1;
        }
        if removed > 0 {
            manifest.write(&self.parquet).map_err(io::Error::other)?;
        }
        Ok(removed)
    }

    /// The day's and the model's folder, if nothing is in them any more.
    fn remove_empty(&self, file: &str) {
        for folder in Path::new(file).ancestors().skip(1).take(2) {
            // One that is not empty stays, and that is right.
            if folder.as_os_str().is_empty()
                || std::fs::remove_dir(self.parquet.join(folder)).is_err()
            {
                return;
            }
        }
    }
}

fn if_there(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests;
