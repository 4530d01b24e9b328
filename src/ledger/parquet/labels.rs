//! Columns of what was said of a prediction later: `label`, a list with one for each row,
//! `label_time`, and `metrics`, as JSON.

use std::sync::Arc;

use arrow_array::ArrayRef;
use arrow_array::builder::{
    ArrayBuilder, BooleanBuilder, Float64Builder, Int64Builder, ListBuilder, StringBuilder,
    TimestampNanosecondBuilder,
};
use arrow_schema::{DataType as ArrowType, Field};
use serde_json::Value;

use super::sheet::{list_of, moment};
use crate::ledger::export::{LabelType, Labels};

/// The columns in the making.
pub(super) struct LabelColumns {
    labels: Arc<Labels>,
    label: List,
    time: TimestampNanosecondBuilder,
    metrics: StringBuilder,
}

enum List {
    Bool(ListBuilder<BooleanBuilder>),
    Int(ListBuilder<Int64Builder>),
    Number(ListBuilder<Float64Builder>),
    Text(ListBuilder<StringBuilder>),
}

impl LabelColumns {
    pub(super) fn new(labels: Arc<Labels>) -> Self {
        let label = match labels.kind {
            LabelType::Bool => List::Bool(ListBuilder::default()),
            LabelType::Int => List::Int(ListBuilder::default()),
            LabelType::Number => List::Number(ListBuilder::default()),
            LabelType::Text => List::Text(ListBuilder::default()),
        };
        let time = TimestampNanosecondBuilder::new().with_data_type(moment());
        Self { labels, label, time, metrics: StringBuilder::new() }
    }

    pub(super) fn fields(&self) -> [Field; 3] {
        let item = match &self.label {
            List::Bool(_) => ArrowType::Boolean,
            List::Int(_) => ArrowType::Int64,
            List::Number(_) => ArrowType::Float64,
            List::Text(_) => ArrowType::Utf8,
        };
        [
            Field::new("label", list_of(item), true),
            Field::new("label_time", moment(), true),
            Field::new("metrics", ArrowType::Utf8, true),
        ]
    }

    /// Adds what was said of this prediction.
    pub(super) fn push(&mut self, id: &[u8]) {
        let said = self.labels.of(id);
        let labels = said.map_or(&[][..], |said| &said.labels);
        let known = said.is_some();
        match &mut self.label {
            List::Bool(list) => {
                labels.iter().for_each(|label| list.values().append_option(label.as_bool()));
                list.append(known);
            }
            List::Int(list) => {
                labels.iter().for_each(|label| list.values().append_option(label.as_i64()));
                list.append(known);
            }
            List::Number(list) => {
                labels.iter().for_each(|label| list.values().append_option(label.as_f64()));
                list.append(known);
            }
            List::Text(list) => {
                labels.iter().for_each(|label| list.values().append_option(text(label)));
                list.append(known);
            }
        }
        self.time.append_option(said.map(|said| said.time_ns));
        let metrics = said.filter(|said| !said.metrics.is_empty());
        // Names and numbers: it cannot fail.
        let metrics = metrics.map(|said| serde_json::to_string(&said.metrics).unwrap_or_default());
        self.metrics.append_option(metrics);
    }

    pub(super) fn finish(&mut self) -> [ArrayRef; 3] {
        let label = match &mut self.label {
            List::Bool(list) => ArrayBuilder::finish(list),
            List::Int(list) => ArrayBuilder::finish(list),
            List::Number(list) => ArrayBuilder::finish(list),
            List::Text(list) => ArrayBuilder::finish(list),
        };
        [label, ArrayBuilder::finish(&mut self.time), ArrayBuilder::finish(&mut self.metrics)]
    }
}

fn text(label: &Value) -> Option<String> {
    match label {
        Value::Null => None,
        Value::String(text) => Some(text.clone()),
        other => Some(other.to_string()),
    }
}
