//! What a caller says of a prediction: a label, or a value of a metric of its own.

use std::fmt;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// Longest text of a label, in bytes.
pub const LABEL_BYTES_MAX: usize = 1024;
/// Longest name of a metric.
pub const METRIC_LEN_MAX: usize = 64;
/// Labels of rows in one call, all of its items together.
pub const LABELS_MAX: usize = 65_536;
/// Largest integer that a double holds, and all below it.
const EXACT_MAX: f64 = 9_007_199_254_740_992.0;

/// What one row was: a class, by name or number, or a number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Label {
    Bool(bool),
    Int(i64),
    Number(f64),
    Text(String),
}

/// Why something is no label, metric, time or id.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ItemError {
    #[error("prediction_id: expected the id that came with a prediction, a UUID, got '{0}'")]
    Id(String),
    #[error("expected a label, or a metric with a value")]
    Nothing,
    #[error("metric: has no value")]
    NoValue,
    #[error("value: has no metric that it is of")]
    NoMetric,
    #[error("metric: expected 1 to {METRIC_LEN_MAX} letters, digits, '.', '_' and '-', got '{0}'")]
    Metric(String),
    #[error("value: expected a finite number")]
    Value,
    #[error("label: expected true or false, a number, a text, or a list of those")]
    Label,
    #[error("label: a text has {len} bytes, the limit is {LABEL_BYTES_MAX}")]
    LabelLong { len: usize },
    #[error("label: a list without a label says nothing")]
    LabelEmpty,
    #[error("at: expected a time like 2026-11-25T10:00:00Z, got '{0}'")]
    At(String),
}

impl Label {
    /// A number; a whole one is the same however it was written.
    ///
    /// # Errors
    /// For one that is not finite.
    pub fn number(number: f64) -> Result<Self, ItemError> {
        if !number.is_finite() {
            return Err(ItemError::Label);
        }
        if number.fract() == 0.0 && number.abs() < EXACT_MAX {
            #[expect(clippy::cast_possible_truncation, reason = "whole, and an i64 has it")]
            return Ok(Self::Int(number as i64));
        }
        Ok(Self::Number(number))
    }

    /// # Errors
    /// For one that is too long.
    pub fn text(text: String) -> Result<Self, ItemError> {
        match text.len() {
            len if len > LABEL_BYTES_MAX => Err(ItemError::LabelLong { len }),
            _ => Ok(Self::Text(text)),
        }
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bool(value) => value.fmt(f),
            Self::Int(value) => value.fmt(f),
            Self::Number(value) => value.fmt(f),
            Self::Text(value) => value.fmt(f),
        }
    }
}

/// What is said of one prediction.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    pub id: Uuid,
    /// One for each row; `None` for a row of which nothing is said. Empty: no label.
    pub labels: Vec<Option<Label>>,
    pub metric: Option<(String, f64)>,
    /// When it came to be known, if not with the call.
    pub at: Option<Timestamp>,
}

/// As it came, before it is looked at.
#[derive(Clone, Debug, Default)]
pub struct Said<'a> {
    pub id: &'a str,
    pub labels: Vec<Option<Label>>,
    pub metric: Option<&'a str>,
    pub value: Option<f64>,
    pub at: Option<&'a str>,
}

impl Item {
    /// # Errors
    /// What is wrong with it first.
    pub fn new(said: Said<'_>) -> Result<Self, ItemError> {
        let Said { id, labels, metric, value, at } = said;
        let parsed = id.parse().map_err(|_| ItemError::Id(shown(id)))?;
        if !labels.is_empty() && labels.iter().all(Option::is_none) {
            return Err(ItemError::LabelEmpty);
        }
        let metric = match (metric, value) {
            (None, None) if labels.is_empty() => return Err(ItemError::Nothing),
            (None, None) => None,
            (Some(_), None) => return Err(ItemError::NoValue),
            (None, Some(_)) => return Err(ItemError::NoMetric),
            (Some(name), Some(_)) if !is_name(name) => {
                return Err(ItemError::Metric(shown(name)));
            }
            (Some(_), Some(value)) if !value.is_finite() => return Err(ItemError::Value),
            (Some(name), Some(value)) => Some((name.to_owned(), value)),
        };
        let at = at.map(|at| at.parse().map_err(|_| ItemError::At(shown(at)))).transpose()?;
        Ok(Self { id: parsed, labels, metric, at })
    }
}

fn is_name(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    (1..=METRIC_LEN_MAX).contains(&name.len()) && name.bytes().all(plain)
}

/// The start of a text from outside, for an error message.
fn shown(text: &str) -> String {
    const SHOWN_MAX: usize = 80;
    text.chars().take(SHOWN_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "019ab7a2-6c1f-7d3e-9b5a-0c2d4e6f8a1b";

    #[test]
    fn items_say_one_thing_at_least_and_nothing_by_halves() {
        let label = || vec![Some(Label::Int(1))];
        let said = || Said { id: ID, ..Said::default() };
        let good = [
            Said { labels: label(), ..said() },
            Said { metric: Some("revenue"), value: Some(-1.5), ..said() },
            Said { labels: label(), metric: Some("clicks"), value: Some(0.0), ..said() },
            Said { labels: label(), at: Some("2026-11-25T10:00:00+01:00"), ..said() },
            Said { labels: vec![None, Some(Label::Bool(true))], ..said() },
        ];
        for said in good {
            assert!(Item::new(said.clone()).is_ok(), "{said:?}");
        }
        let long = "m".repeat(METRIC_LEN_MAX + 1);
        let bad = [
            (Said { id: "17", labels: label(), ..said() }, "prediction_id"),
            (said(), "expected a label"),
            (Said { metric: Some("m"), ..said() }, "has no value"),
            (Said { value: Some(1.0), ..said() }, "has no metric"),
            (Said { metric: Some("a b"), value: Some(1.0), ..said() }, "metric: expected"),
            (Said { metric: Some(&long), value: Some(1.0), ..said() }, "metric: expected"),
            (Said { metric: Some("m"), value: Some(f64::NAN), ..said() }, "finite"),
            (Said { labels: vec![None, None], ..said() }, "says nothing"),
            (Said { labels: label(), at: Some("yesterday"), ..said() }, "at: expected"),
        ];
        for (said, why) in bad {
            let error = Item::new(said.clone()).unwrap_err().to_string();
            assert!(error.contains(why), "{said:?}: {error}");
        }
    }

    #[test]
    fn whole_numbers_are_one_label_however_written() {
        assert_eq!(Label::number(1.0), Ok(Label::Int(1)));
        assert_eq!(Label::number(-0.0), Ok(Label::Int(0)));
        assert_eq!(Label::number(0.5), Ok(Label::Number(0.5)));
        assert_eq!(Label::number(1e300), Ok(Label::Number(1e300)));
        assert!(Label::number(f64::INFINITY).is_err());
        assert!(Label::text("x".repeat(LABEL_BYTES_MAX + 1)).is_err());
        for label in [Label::Bool(true), Label::Int(3), Label::Number(0.5), Label::Text("3".into())]
        {
            let text = serde_json::to_string(&label).unwrap();
            assert_eq!(serde_json::from_str::<Label>(&text).unwrap(), label, "{text}");
        }
    }
}
