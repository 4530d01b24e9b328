//! Records as people and other programs read them: what of a log is wanted, and one line of JSON of
//! each record.
//!
//! ```text
//! segments ─▶ scan (only those that can hold what is wanted) ─▶ View ─┬─▶ JSON: a line
//!                                                                     └─▶ Parquet: a row
//! ```
//!
//! Invariants:
//! - Nothing is lost on the way out: a float's digits give back its bits, an integer that a double
//!   would round is a text, NaN and infinity have words, bytes that are no text are marked.
//! - Memory: one frame, and what the reader has beside it.
//! - Nothing that a file holds makes this panic; what cannot be read is an error with its place.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::frame::SegmentHead;
use super::reader::{
    self, Damage, Fault, Piece, ReadError, Rest, SEGMENTS, SegmentFile, SegmentReader,
};

mod civil;
mod json;
mod labels;
pub mod names;
mod view;

pub use civil::{Date, time};
pub use json::{line, tensors, text as json_text};
pub use labels::{LabelType, Labels, Said};
pub use view::{Content, TensorView, View};

/// A record is appended when its call has been answered, so later than the call came: by the
/// longest deadline that the gateway takes, and some time for clocks that were set.
const APPENDED_WITHIN_NS: i64 = 25 * 3_600 * 1_000_000_000;
/// A clock that was set back by no more than this hides nothing.
const CLOCK_SLACK_NS: i64 = 600 * 1_000_000_000;

/// Which records are wanted; the default is all.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Selection {
    /// Arrived then or later; nanoseconds since 1970.
    pub since_ns: Option<i64>,
    /// Arrived before that.
    pub until_ns: Option<i64>,
    pub model: Option<String>,
    pub version: Option<u64>,
    /// `ok`, or the word of an error.
    pub status: Option<String>,
    pub prediction_id: Option<uuid::Uuid>,
    /// Only predictions of which there is a label here, which stands beside them.
    pub labels: Option<Arc<Labels>>,
}

impl Selection {
    /// The record of one prediction. Its id says when it was made, so few segments are read: those
    /// written within a day of that.
    pub fn of(id: uuid::Uuid) -> Self {
        let at = id.get_timestamp().map(|at| {
            let (seconds, nanos) = at.to_unix();
            i64::try_from(u128::from(seconds) * 1_000_000_000 + u128::from(nanos))
        });
        let at = at.and_then(Result::ok);
        Self {
            // Made up to a second around the arrival.
            since_ns: at.map(|at| at.saturating_sub(1_000_000_000)),
            until_ns: at.map(|at| at.saturating_add(1_000_000_000)),
            prediction_id: Some(id),
            ..Self::default()
        }
    }

    pub fn takes(&self, view: &View<'_>) -> bool {
        let text = |wanted: &Option<String>, has: &str| wanted.as_ref().is_none_or(|it| it == has);
        self.prediction_id.is_none_or(|id| id.as_bytes()[..] == *view.prediction_id)
            && self.since_ns.is_none_or(|since| view.time_ns >= since)
            && self.until_ns.is_none_or(|until| view.time_ns < until)
            && text(&self.model, view.model)
            && self.version.is_none_or(|version| view.version == version)
            && text(&self.status, view.status)
            && self.labels.as_ref().is_none_or(|labels| labels.of(view.prediction_id).is_some())
    }

    /// Whether records that were appended between the two can be wanted.
    fn may_be_between(&self, from_ns: u64, to_ns: Option<u64>) -> bool {
        let from = i64::try_from(from_ns).unwrap_or(i64::MAX).saturating_sub(CLOCK_SLACK_NS);
        let to = to_ns.map_or(i64::MAX, |to| i64::try_from(to).unwrap_or(i64::MAX));
        let to = to.saturating_add(CLOCK_SLACK_NS);
        self.since_ns.is_none_or(|since| to >= since)
            && self.until_ns.is_none_or(|until| from <= until.saturating_add(APPENDED_WITHIN_NS))
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: std::io::Error },
    #[error("there is no ledger in {}: no folder '{SEGMENTS}' and none of a log", path.display())]
    NoLedger { path: PathBuf },
}

/// The folder of a log: given itself, the ledger's folder (its predictions), or the state's.
///
/// # Errors
/// When it is none of these.
pub fn log_folder(path: &Path) -> Result<PathBuf, ExportError> {
    let ways = ["", "predictions", "ledger/predictions"];
    let found = ways.iter().map(|way| path.join(way)).find(|log| log.join(SEGMENTS).is_dir());
    found.ok_or_else(|| ExportError::NoLedger { path: path.to_owned() })
}

/// Segments of a log that can hold what is wanted, in order: of each, what is known without reading
/// it is when it and its successor were begun.
///
/// # Errors
/// When the log's folder or a segment's head cannot be read.
pub fn segments(log: &Path, wanted: &Selection) -> Result<Vec<SegmentFile>, ExportError> {
    let all = reader::segments(log)?;
    if wanted.since_ns.is_none() && wanted.until_ns.is_none() {
        return Ok(all);
    }
    let mut begun = Vec::with_capacity(all.len());
    for segment in &all {
        begun.push(match SegmentReader::open(segment) {
            Ok(reader) => Some(reader.head().created_ns),
            Err(error) if is_gone(&error) => None,
            Err(error) => return Err(error.into()),
        });
    }
    let within = |at: usize| {
        let next = begun[at + 1..].iter().flatten().next().copied();
        begun[at].is_some_and(|from| wanted.may_be_between(from, next))
    };
    Ok(all.iter().enumerate().filter(|(at, _)| within(*at)).map(|(_, it)| it.clone()).collect())
}

/// Gives every record that is wanted to `take`, in order, until it breaks off; how many it took.
/// Of a log that is written meanwhile, those that were there when its end was reached.
///
/// # Errors
/// What `take` says, or the first place that cannot be read.
pub fn scan<E: From<ExportError>>(
    log: &Path,
    wanted: &Selection,
    mut take: impl FnMut(&SegmentHead, &View<'_>) -> Result<ControlFlow<()>, E>,
) -> Result<u64, E> {
    let (mut taken, mut flow) = (0, ControlFlow::Continue(()));
    for segment in segments(log, wanted)? {
        let reader = scan_file(&segment, wanted, |head, view| {
            taken += 1;
            flow = take(head, view)?;
            Ok::<_, E>(flow)
        })?;
        if flow.is_break() {
            break;
        }
        // In a sealed one anything that is no record was told of by now.
        if let Some(mut reader) = reader.filter(|reader| !reader.segment().sealed)
            && let Rest::Damage(fault) = reader.rest().map_err(ExportError::from)?
        {
            return Err(ExportError::from(ReadError::from(fault)).into());
        }
    }
    Ok(taken)
}

/// The same for one segment, up to the end that it seems to have; `None` when it is gone: its time
/// had come.
///
/// # Errors
/// As [`scan`].
pub fn scan_file<E: From<ExportError>>(
    segment: &SegmentFile,
    wanted: &Selection,
    take: impl FnMut(&SegmentHead, &View<'_>) -> Result<ControlFlow<()>, E>,
) -> Result<Option<SegmentReader>, E> {
    scan_around(segment, wanted, take, |_, fault| Err(ExportError::from(ReadError::from(fault))))
}

/// The same, and `damaged` decides about each place that cannot be read: whether to go on behind it.
/// It is given the numbers that are lost; the second is `None` when the rest of the segment is.
///
/// # Errors
/// As [`scan`], and what `damaged` says.
pub(super) fn scan_around<E: From<ExportError>>(
    segment: &SegmentFile,
    wanted: &Selection,
    mut take: impl FnMut(&SegmentHead, &View<'_>) -> Result<ControlFlow<()>, E>,
    mut damaged: impl FnMut((u64, Option<u64>), Fault) -> Result<(), ExportError>,
) -> Result<Option<SegmentReader>, E> {
    let (mut reader, cut) = match SegmentReader::open_cut(segment) {
        Err(error) if is_gone(&error) => return Ok(None),
        // Nothing of it can be told.
        Err(ReadError::Fault(fault)) => {
            damaged((segment.first_seq, None), fault)?;
            return Ok(None);
        }
        opened => opened.map_err(ExportError::from)?,
    };
    let head = reader.head().clone();
    let mut at = reader.offset();
    let failed = |error| ExportError::from(error).into();
    reader.around(cut, failed, |piece| {
        let frame = match piece {
            Piece::Frame(frame) => frame,
            Piece::Damage(Damage { offset, seq, fault }) => {
                at = offset.1.unwrap_or(at);
                damaged(seq, fault)?;
                return Ok(ControlFlow::Continue(()));
            }
        };
        let offset = at;
        at += frame.bytes.len() as u64;
        match View::read(frame) {
            Ok(view) if wanted.takes(&view) => take(&head, &view),
            Ok(_) => Ok(ControlFlow::Continue(())),
            Err(what) => {
                let fault = Fault { file: segment.path.clone(), offset, what: what.to_owned() };
                damaged((frame.seq, Some(frame.seq + 1)), fault)?;
                Ok(ControlFlow::Continue(()))
            }
        }
    })?;
    Ok(Some(reader))
}

/// Retention took the segment since it was listed.
pub(super) fn is_gone(error: &ReadError) -> bool {
    matches!(error, ReadError::Io { error, .. } if error.kind() == std::io::ErrorKind::NotFound)
}

#[cfg(test)]
pub(in crate::ledger) mod tests;
