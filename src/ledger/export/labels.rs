//! What callers said of predictions later, to stand beside them in an export.
//!
//! Read from the log `feedback` before anything is exported, and held in memory: some hundred bytes
//! for each prediction with a label. Of several labels of one prediction the last counts.

use std::collections::{BTreeMap, HashMap};
use std::ops::ControlFlow;
use std::path::Path;

use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;
use uuid::Uuid;

use super::{ExportError, Selection, scan};
use crate::ledger::FEEDBACK;
use crate::ledger::reader::SEGMENTS;
use crate::ledger::record::Kind;

/// What a record of feedback says, as far as an export has it.
#[derive(Deserialize)]
struct Body {
    #[serde(default)]
    labels: Vec<Value>,
    metric: Option<String>,
    value: Option<f64>,
}

/// What was said of one prediction.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Said {
    /// One for each row; `null` for one of which nothing is known. Empty: no label.
    #[serde(rename = "label")]
    pub labels: Vec<Value>,
    /// When the label came, in nanoseconds since 1970.
    #[serde(rename = "label_time", serialize_with = "as_time")]
    pub time_ns: i64,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
}

/// What labels are, all of one export together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LabelType {
    Bool,
    Int,
    Number,
    /// Texts, or labels of several kinds, as texts.
    #[default]
    Text,
}

/// What was said of predictions, by their ids.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Labels {
    said: HashMap<Uuid, Said>,
    pub kind: LabelType,
}

impl Labels {
    /// Reads the log of feedback beside a log of predictions; without one, nothing was said.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn beside(log: &Path, model: Option<&str>) -> Result<Self, ExportError> {
        let mut labels = Self::default();
        let log = log.parent().unwrap_or(log).join(FEEDBACK);
        if !log.join(SEGMENTS).is_dir() {
            return Ok(labels);
        }
        let wanted = Selection { model: model.map(str::to_owned), ..Selection::default() };
        scan::<ExportError>(&log, &wanted, |_, view| {
            // One that was erased has no body.
            if view.kind == Kind::Feedback as u64
                && let Ok(id) = Uuid::from_slice(view.prediction_id)
                && let Ok(body) = serde_json::from_slice::<Body>(view.body)
            {
                let said = labels.said.entry(id).or_default();
                match (body.metric, body.value) {
                    (Some(metric), Some(value)) => drop(said.metrics.insert(metric, value)),
                    _ => (said.labels, said.time_ns) = (body.labels, view.time_ns),
                }
            }
            Ok(ControlFlow::Continue(()))
        })?;
        labels.said.retain(|_, said| !said.labels.is_empty());
        labels.kind = kind(labels.said.values().flat_map(|said| &said.labels));
        Ok(labels)
    }

    /// Of so many predictions.
    pub fn len(&self) -> usize {
        self.said.len()
    }

    pub fn is_empty(&self) -> bool {
        self.said.is_empty()
    }

    pub fn of(&self, id: &[u8]) -> Option<&Said> {
        self.said.get(&Uuid::from_slice(id).ok()?)
    }
}

fn as_time<S: Serializer>(ns: &i64, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&super::time(*ns))
}

/// The narrowest that holds all of them.
fn kind<'a>(labels: impl Iterator<Item = &'a Value>) -> LabelType {
    let mut kinds = labels.filter(|label| !label.is_null()).map(|label| match label {
        Value::Bool(_) => LabelType::Bool,
        Value::Number(number) if number.is_i64() => LabelType::Int,
        Value::Number(_) => LabelType::Number,
        _ => LabelType::Text,
    });
    let first = kinds.next().unwrap_or_default();
    kinds.fold(first, |all, kind| match (all, kind) {
        (all, kind) if all == kind => all,
        (LabelType::Int | LabelType::Number, LabelType::Int | LabelType::Number) => {
            LabelType::Number
        }
        _ => LabelType::Text,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::ledger::record::{Head, Payload};
    use crate::ledger::testlog::TestLog;

    #[test]
    fn the_last_label_counts_and_metrics_alone_are_no_label() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = TestLog::new(dir.path(), FEEDBACK);
        let mut say = |id: u128, model: &str, body: Value| {
            let head = Head {
                kind: Kind::Feedback.into(),
                time_ns: 7,
                prediction_id: Uuid::from_u128(id).as_bytes().to_vec().into(),
                model: model.to_owned(),
                ..Head::default()
            };
            let body = body.to_string().into_bytes().into();
            log.put(&head, &Payload { body, ..Payload::default() });
        };
        say(1, "iris", json!({"labels": [1, null]}));
        say(1, "iris", json!({"labels": [2, 0.5]}));
        say(1, "iris", json!({"metric": "revenue", "value": 2.0}));
        say(2, "iris", json!({"metric": "revenue", "value": 2.0}));
        say(3, "other", json!({"labels": ["cat"]}));
        let log = dir.path().join("predictions");
        let iris = Labels::beside(&log, Some("iris")).unwrap();
        assert_eq!((iris.len(), iris.kind), (1, LabelType::Number));
        let said = iris.of(Uuid::from_u128(1).as_bytes()).unwrap();
        assert_eq!((&said.labels[..], said.time_ns), (&[json!(2), json!(0.5)][..], 7));
        assert_eq!(said.metrics["revenue"], 2.0);
        let all = Labels::beside(&log, None).unwrap();
        assert_eq!((all.len(), all.kind), (2, LabelType::Text));
        assert!(Labels::beside(&dir.path().join("none/predictions"), None).unwrap().is_empty());
    }

    #[test]
    fn the_narrowest_type_holds_all() {
        let of = |labels: Value| kind(labels.as_array().unwrap().iter());
        assert_eq!(of(json!([true, null, false])), LabelType::Bool);
        assert_eq!(of(json!([1, 2])), LabelType::Int);
        assert_eq!(of(json!([1, 2.5])), LabelType::Number);
        assert_eq!(of(json!([1, true])), LabelType::Text);
        assert_eq!(of(json!(["a"])), LabelType::Text);
        assert_eq!(of(json!([])), LabelType::Text);
    }
}
