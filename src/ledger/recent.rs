//! The newest inputs of one model that the log has whole: what a version that is being loaded is
//! warmed with.
//!
//! Invariants:
//! - Only reads, as any [reader](super::reader): the log, and who writes it, notice nothing.
//! - Holds no more than [`Limits`] says, and looks no longer. What cannot be read is left out: for
//!   a warm-up, fewer inputs are no fault, and damage is told of by those who look for it.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Instant;

use bytes::Bytes;
use uuid::Uuid;

use super::export::{TensorView, View};
use super::reader::{ReadError, SegmentFile, SegmentReader, segments};
use super::record::Kind;
use crate::domain::{DataType, Digest, ModelName, NamedTensor, Tensor};

/// Newest segments that are looked into.
const SEGMENTS_MAX: usize = 4;
/// Frames between two looks at the clock.
const FRAMES_A_LOOK: u32 = 256;

/// How much is taken, and how long it is looked for.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub records_max: usize,
    /// Of all inputs together.
    pub bytes_max: usize,
    pub until: Instant,
}

/// What one prediction was asked.
#[derive(Clone, Debug, PartialEq)]
pub struct Recent {
    pub prediction_id: Uuid,
    /// Of the model that answered it.
    pub digest: Digest,
    pub inputs: Vec<NamedTensor>,
}

/// Inputs of predictions that `model` answered, of whatever version, the newest last. None when
/// there is no log.
pub fn inputs(log: &Path, model: &ModelName, limits: Limits) -> Vec<Recent> {
    let (mut found, mut left) = (Vec::new(), limits);
    for segment in segments(log).unwrap_or_default().iter().rev().take(SEGMENTS_MAX) {
        if left.records_max == 0 || left.bytes_max == 0 || Instant::now() >= left.until {
            break;
        }
        let mut last = Last { model, limits: left, kept: VecDeque::new(), bytes: 0 };
        if let Err(error) = last.scan(segment) {
            tracing::warn!(%model, %error, "not all of the log could be read for a warm-up");
        }
        left.records_max -= last.kept.len();
        left.bytes_max -= last.bytes;
        // All of it is older than what was found before.
        let mut older = Vec::from(last.kept);
        older.append(&mut found);
        found = older;
    }
    found
}

/// The last ones of a segment.
struct Last<'a> {
    model: &'a ModelName,
    limits: Limits,
    kept: VecDeque<Recent>,
    bytes: usize,
}

impl Last<'_> {
    fn scan(&mut self, segment: &SegmentFile) -> Result<(), ReadError> {
        let mut reader = SegmentReader::open(segment)?;
        let mut frames = 0_u32;
        while let Some(frame) = reader.next_frame()? {
            frames = frames.wrapping_add(1);
            if frames.is_multiple_of(FRAMES_A_LOOK) && Instant::now() >= self.limits.until {
                break;
            }
            let view = View::read(&frame).ok().filter(|view| self.is_wanted(view));
            if let Some(recent) = view.and_then(|view| recent(&view)) {
                self.keep(recent);
            }
        }
        Ok(())
    }

    /// A shadow ran on what another record has.
    fn is_wanted(&self, view: &View<'_>) -> bool {
        view.kind == Kind::Prediction as u64
            && view.model == self.model.as_str()
            && view.status == "ok"
            && view.shadow_of.is_empty()
            && !view.inputs.is_empty()
            && view.inputs.iter().filter_map(TensorView::data).map(<[u8]>::len).sum::<usize>()
                <= self.limits.bytes_max
    }

    fn keep(&mut self, recent: Recent) {
        self.bytes += recent.bytes();
        self.kept.push_back(recent);
        while self.kept.len() > self.limits.records_max || self.bytes > self.limits.bytes_max {
            let Some(oldest) = self.kept.pop_front() else { break };
            self.bytes -= oldest.bytes();
        }
    }
}

/// `None` when some input was not kept as it came.
fn recent(view: &View<'_>) -> Option<Recent> {
    let digest = Digest::new(<[u8; 32]>::try_from(view.model_digest).ok()?);
    let inputs = view.inputs.iter().map(named).collect::<Option<_>>()?;
    let prediction_id = Uuid::from_slice(view.prediction_id).ok()?;
    Some(Recent { prediction_id, digest, inputs })
}

fn named(input: &TensorView<'_>) -> Option<NamedTensor> {
    let data = input.data().filter(|_| input.masked.is_empty())?;
    let datatype: DataType = input.datatype.parse().ok()?;
    let dims = input.shape.iter().map(|dim| usize::try_from(*dim).ok());
    let tensor = Tensor::new(datatype, dims.collect::<Option<_>>()?, Bytes::copy_from_slice(data));
    Some(NamedTensor { name: input.name.to_owned(), tensor: tensor.ok()? })
}

impl Recent {
    fn bytes(&self) -> usize {
        self.inputs.iter().map(|input| input.tensor.data().len()).sum()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ledger::export::tests as written;
    use crate::ledger::record::{Head, Payload};

    fn limits(records_max: usize, bytes_max: usize) -> Limits {
        Limits { records_max, bytes_max, until: Instant::now() + Duration::from_secs(60) }
    }

    fn head(model: &str, status: &str) -> Head {
        Head {
            kind: Kind::Prediction.into(),
            model: model.to_owned(),
            status: status.to_owned(),
            prediction_id: vec![5; 16].into(),
            model_digest: vec![7; 32].into(),
            ..Head::default()
        }
    }

    fn asked(value: u8) -> Payload {
        let x = written::tensor("x", "UINT8", &[1, 2], &[value, value]);
        Payload { inputs: vec![x], ..Payload::default() }
    }

    fn found(log: &Path, limits: Limits) -> Vec<u8> {
        let all = inputs(log, &"iris".parse().unwrap(), limits);
        all.iter().map(|recent| recent.inputs[0].tensor.data()[0]).collect()
    }

    #[test]
    fn the_newest_whole_inputs_of_a_model_come_in_order() {
        let dir = tempfile::tempdir().unwrap();
        assert!(found(dir.path(), limits(9, 99)).is_empty());
        for segment in 0..3 {
            let log = written::log(dir.path());
            for value in 0..3 {
                written::append(&log, &head("iris", "ok"), &asked(10 * segment + value));
                written::append(&log, &head("other", "ok"), &asked(99));
                written::append(&log, &head("iris", "internal"), &asked(98));
            }
            let shadow = Head { shadow_of: vec![1; 16].into(), ..head("iris", "ok") };
            written::append(&log, &shadow, &asked(97));
            let mut masked = asked(96);
            masked.inputs[0].masked = vec![0];
            written::append(&log, &head("iris", "ok"), &masked);
            let digest = Some(crate::proto::ledger::tensor::Content::Digest(vec![0; 32].into()));
            let mut hashed = asked(95);
            hashed.inputs[0].content = digest;
            written::append(&log, &head("iris", "ok"), &hashed);
        }
        assert_eq!(found(dir.path(), limits(4, 99)), [12, 20, 21, 22]);
        assert_eq!(found(dir.path(), limits(99, 99)), [0, 1, 2, 10, 11, 12, 20, 21, 22]);
        // Two bytes each.
        assert_eq!(found(dir.path(), limits(99, 5)), [21, 22]);
        assert!(found(dir.path(), limits(99, 1)).is_empty());
        let over = Limits { until: Instant::now(), ..limits(99, 99) };
        assert!(found(dir.path(), over).is_empty());
    }

    #[test]
    fn damage_costs_inputs_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        for value in 0..2 {
            let log = written::log(dir.path());
            written::append(&log, &head("iris", "ok"), &asked(value));
        }
        let first = segments(dir.path()).unwrap().remove(0).path;
        let mut bytes = std::fs::read(&first).unwrap();
        let at = bytes.len() - 20;
        bytes[at] ^= 1;
        std::fs::write(&first, bytes).unwrap();
        assert_eq!(found(dir.path(), limits(9, 99)), [1]);
    }
}
