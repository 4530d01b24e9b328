//! Payloads whose own time has come, in segments that stay: of a model that keeps its records for a
//! shorter time than others, or of records that only a hold on others keeps in place.
//!
//! ```text
//! manifests ─▶ files a day beyond their time ─▶ which records have a payload yet ─▶ RETENTION record
//!                                        erasure: segments without them, Parquet anew ◀────┘
//! ```
//!
//! The record alone is written here. It names the records, so whoever carries out [erasures](crate::ledger::erase)
//! does the rest, now or after the next start, and verifiers know why a payload is gone.

use std::io;

use serde_json::json;

use super::{DAY_NS, Manifest, Retention};
use crate::ledger::erase::{RANGES_MAX, Range, each};
use crate::ledger::export::{Date, View};
use crate::ledger::reader::{Piece, ReadError, SegmentFile};
use crate::ledger::record::{Head, Kind, Payload};

/// Word of a record that says that payloads went.
pub(super) const ERASE: &str = "retention.erase";
/// How long after its time a payload goes: most segments are gone whole by then, and those that stay are
/// written anew once for each day, not for each record.
const AFTER_NS: i64 = DAY_NS;
/// Segments that are read for one record; the rest has its turn at the next look.
const SEGMENTS_MAX: usize = 16;

/// A file of a manifest, by its place.
type Place = (usize, usize);

impl Retention {
    /// Orders the erasure of payloads whose time has come; how many records.
    ///
    /// # Errors
    /// When a manifest cannot be written; it is tried again at the next call.
    pub(super) fn erase_early(
        &mut self,
        segments: &[SegmentFile],
        manifests: &mut [Manifest],
        now_ns: i64,
    ) -> io::Result<u64> {
        let delivered = (self.delivered)();
        let (mut ranges, mut places) = (Vec::new(), Vec::<Place>::new());
        let mut read = 0;
        for (at, manifest) in manifests.iter().enumerate() {
            let due = manifest.files.iter().enumerate().filter(|(_, file)| {
                let since = now_ns.saturating_sub(AFTER_NS);
                !file.erased && !file.model.is_empty() && self.is_due(file, since)
            });
            let due: Vec<usize> = due.map(|(at, _)| at).collect();
            let taken = manifest.segment.last_seq.is_some_and(|last| last < delivered);
            let segment =
                segments.iter().find(|it| it.first_seq == manifest.segment.first_seq && it.sealed);
            // One that was written anew gets a manifest that fits first.
            let segment = segment.filter(|segment| taken && manifest.fits(segment));
            let Some(segment) = segment.filter(|_| !due.is_empty()) else { continue };
            if read == SEGMENTS_MAX || ranges.len() >= RANGES_MAX {
                break;
            }
            read += 1;
            match payloads(segment, manifest, &due) {
                Ok(found) => ranges.extend(found),
                // The others are not to wait for it.
                Err(error) => {
                    tracing::warn!(%error, "payloads stay beyond their time");
                    continue;
                }
            }
            places.extend(due.into_iter().map(|file| (at, file)));
        }
        let count = ranges.iter().map(|(from, to)| to - from).sum();
        if !self.order(&ranges, count, now_ns) {
            return Ok(0);
        }
        for (at, file) in &places {
            manifests[*at].files[*file].erased = true;
        }
        places.dedup_by_key(|(at, _)| *at);
        for (at, _) in places {
            manifests[at].write(&self.parquet).map_err(io::Error::other)?;
        }
        Ok(count)
    }

    /// Whether it is recorded; nothing to erase needs no record.
    fn order(&mut self, ranges: &[Range], count: u64, now_ns: i64) -> bool {
        for ranges in ranges.chunks(RANGES_MAX) {
            let head = Head {
                kind: Kind::Retention as i32,
                time_ns: now_ns,
                action: ERASE.to_owned(),
                principal: "retention".to_owned(),
                count: ranges.iter().map(|(from, to)| to - from).sum(),
                ..Head::default()
            };
            let body = json!({ "log": self.name, "records": ranges, "reason": "retention" });
            let body = body.to_string().into_bytes().into();
            if !(self.announce)(&head, &Payload { body, ..Payload::default() }) {
                let log = self.name;
                tracing::warn!(log, "payloads stay beyond their time: it cannot be recorded");
                return false;
            }
        }
        if count > 0 {
            tracing::info!(log = self.name, count, "payloads erased, as their retention says");
        }
        true
    }
}

/// Records of these files whose payload is there, as far as they can be read.
fn payloads(
    segment: &SegmentFile,
    manifest: &Manifest,
    files: &[usize],
) -> Result<Vec<Range>, ReadError> {
    let mut ranges = Vec::<Range>::new();
    each(segment, None, |piece| {
        let Piece::Frame(frame) = piece else { return Ok(()) };
        let Ok(view) = View::read_head(frame) else { return Ok(()) };
        let of = |file: &usize| {
            let file = &manifest.files[*file];
            file.model == view.model && file.date == Date::of(view.time_ns).to_string()
        };
        let erasable = view.kind == Kind::Prediction as u64 && !view.erased;
        if erasable && files.iter().any(of) {
            match ranges.last_mut() {
                Some((_, to)) if *to == view.seq => *to += 1,
                _ => ranges.push((view.seq, view.seq + 1)),
            }
        }
        Ok(())
    })?;
    Ok(ranges)
}
