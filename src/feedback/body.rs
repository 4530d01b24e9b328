//! The record of one fact in the log `feedback`: a label, held against its prediction when it came,
//! or a value of a caller's metric.
//!
//! Its head says which prediction it is of, and of which model, version and arm, so that figures are
//! made again from this log alone. What was said is in the payload, which can be erased.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::item::Label;
use crate::ledger::export::View;
use crate::ledger::record::{Head, Kind};
use crate::quality::{Judged, Tally};

/// What a record says that it did.
const LABEL: &str = "feedback.label";
const METRIC: &str = "feedback.metric";

/// The payload.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Body {
    /// One for each row; `null` for one that nothing is said of.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub labels: Vec<Option<Label>>,
    /// Name of a caller's metric.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metric: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub value: Option<f64>,
    /// When it came to be known, if not with the call.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub at: Option<Timestamp>,
    /// The labels beside what was predicted; none when that was not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub judged: Option<Judged>,
}

impl Body {
    /// Tells facts of one prediction apart: the label has no name.
    pub(super) fn key(&self) -> &str {
        self.metric.as_deref().unwrap_or_default()
    }

    /// Whether somebody says the same again.
    pub(super) fn says_the_same(&self, other: &Self) -> bool {
        self.labels == other.labels && self.metric == other.metric && self.value == other.value
    }

    pub(super) fn tally(&self) -> Tally {
        match (&self.metric, self.value) {
            (Some(metric), Some(value)) => Tally::of_metric(metric, value),
            _ => Tally::of_label(self.judged.as_ref()),
        }
    }

    pub(super) fn read(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok()
    }
}

/// Who says it, and how it came.
#[derive(Clone, Debug, Default)]
pub(super) struct Origin {
    pub(super) time_ns: i64,
    pub(super) protocol: crate::ledger::record::Via,
    pub(super) principal: String,
    pub(super) trace_id: Vec<u8>,
}

/// What a head has of the prediction that it is of.
pub(super) fn head(of: &View<'_>, body: &Body, origin: &Origin) -> Head {
    let bytes = |bytes: &[u8]| bytes.to_vec().into();
    Head {
        kind: Kind::Feedback.into(),
        time_ns: origin.time_ns,
        prediction_id: bytes(of.prediction_id),
        model: of.model.to_owned(),
        version: of.version,
        model_digest: bytes(of.model_digest),
        arm: of.arm.to_owned(),
        protocol: origin.protocol.into(),
        principal: origin.principal.clone(),
        trace_id: bytes(&origin.trace_id),
        rows: of.rows,
        // With its subject the prediction is erased, and this with it.
        subject: bytes(of.subject),
        action: if body.metric.is_some() { METRIC } else { LABEL }.to_owned(),
        ..Head::default()
    }
}

/// Milliseconds since 1970 that an id of a prediction has in its first six bytes.
pub(super) fn made_ms(id: &[u8]) -> Option<u64> {
    let id = Uuid::from_slice(id).ok().filter(|id| id.get_version_num() == 7)?;
    Some(u64::try_from(id.as_u128() >> 80).unwrap_or(u64::MAX))
}
