//! What a recorded prediction said, as far as a label can be held against it.
//!
//! ```text
//! output FP32 [rows, k≥2], each row adds up to 1 ─▶ probabilities: the largest is the class
//! output of whole numbers, texts or booleans     ─▶ the class itself
//! output of floats, one a row                    ─▶ a value; a score of two classes where the
//!                                                   model says so, or its labels are booleans
//! ```
//!
//! Invariant: what was not kept, or is no such output, is no prediction here; it is never guessed.

use crate::domain::{BytesElements, DataType, FeedbackSettings, FeedbackTask};
use crate::ledger::export::{TensorView, View};
use crate::quality::{ClassRow, Judged, Scores, ValueRow};

use super::item::Label;

/// What a row of probabilities may be off by from 1: floats of 16 bits are.
const SUM_SLACK: f64 = 5e-3;
/// A score is the second class's from here on, if the model says nothing else.
const THRESHOLD: f64 = 0.5;

/// How a model's outputs are to be read.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct How {
    pub settings: FeedbackSettings,
    /// Names of classes, by output.
    pub classes: Vec<(String, Vec<String>)>,
}

impl How {
    fn threshold(&self) -> f64 {
        self.settings.threshold_ppm.map_or(THRESHOLD, |ppm| f64::from(ppm) / 1e6)
    }
}

/// Why a label cannot be held against a prediction.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum LabelError {
    #[error("label '{label}' is none of the {classes} classes, whose numbers begin with 0{names}")]
    NoClass { label: String, classes: usize, names: &'static str },
    #[error("label '{label}' is no class")]
    Fraction { label: String },
    #[error("label '{label}' is no number, and the model predicts numbers")]
    NoNumber { label: String },
    #[error("label '{label}' is none of two classes: expected true, false, 0, 1 or a class's name")]
    NotBinary { label: String },
}

/// What was predicted.
#[derive(Debug, PartialEq)]
pub(super) struct Predicted<'a> {
    what: What,
    /// Names of the classes; empty when they have none.
    names: &'a [String],
}

#[derive(Debug, PartialEq)]
enum What {
    Scores {
        width: usize,
        values: Vec<f64>,
        probabilities: bool,
    },
    Classes {
        values: Vec<String>,
        of: DataType,
    },
    /// One number a row.
    Values(Vec<f64>),
}

/// Reads the output that labels are about; `None` when it was not kept, or there is none.
pub(super) fn read<'a>(view: &View<'_>, how: &'a How) -> Option<Predicted<'a>> {
    let rows = usize::try_from(view.rows).ok()?.max(1);
    let wanted = how.settings.output.as_deref();
    let mut found: Option<(u8, Predicted<'a>)> = None;
    for tensor in view.outputs.iter().filter(|tensor| wanted.is_none_or(|it| it == tensor.name)) {
        let Some(what) = what(tensor, rows, how.settings.task, wanted.is_some()) else { continue };
        let rank = match what {
            What::Scores { .. } => 0,
            What::Classes { .. } => 1,
            What::Values(_) => 2,
        };
        if found.as_ref().is_none_or(|(best, _)| rank < *best) {
            let names = how.classes.iter().find(|(output, _)| output == tensor.name);
            let names = names.map_or(&[][..], |(_, names)| names);
            found = Some((rank, Predicted { what, names }));
        }
    }
    found.map(|(_, predicted)| predicted)
}

fn what(
    tensor: &TensorView<'_>,
    rows: usize,
    task: Option<FeedbackTask>,
    named: bool,
) -> Option<What> {
    let data = tensor.data()?;
    let datatype: DataType = tensor.datatype.parse().ok()?;
    if let Some(values) = floats(datatype, data) {
        let width = width(values.len(), rows)?;
        if width == 1 {
            return Some(What::Values(values));
        }
        let flat = tensor.shape.len() <= 2;
        let probabilities = flat && values.chunks(width).all(adds_up);
        // Scores that are no probabilities are classes only where somebody says so.
        let said = named && task != Some(FeedbackTask::Regression)
            || task == Some(FeedbackTask::Classification);
        let usable = task != Some(FeedbackTask::Regression) && (probabilities || flat && said);
        let sound = values.iter().all(|value| !value.is_nan());
        return (usable && sound).then_some(What::Scores { width, values, probabilities });
    }
    let values = classes(datatype, data)?;
    (width(values.len(), rows)? == 1).then_some(())?;
    if task == Some(FeedbackTask::Regression) {
        let numbers: Result<Vec<f64>, _> = values.iter().map(|value| value.parse()).collect();
        return numbers.ok().map(What::Values);
    }
    Some(What::Classes { values, of: datatype })
}

/// Elements of one row.
fn width(elements: usize, rows: usize) -> Option<usize> {
    (elements >= rows && elements.is_multiple_of(rows)).then(|| elements / rows)
}

fn adds_up(row: &[f64]) -> bool {
    let inside = row.iter().all(|p| (-SUM_SLACK..=1.0 + SUM_SLACK).contains(p));
    inside && (row.iter().sum::<f64>() - 1.0).abs() <= SUM_SLACK
}

fn floats(datatype: DataType, data: &[u8]) -> Option<Vec<f64>> {
    fn all<const N: usize>(data: &[u8], of: impl Fn([u8; N]) -> f64) -> Option<Vec<f64>> {
        let (chunks, rest) = data.as_chunks::<N>();
        rest.is_empty().then(|| chunks.iter().map(|chunk| of(*chunk)).collect())
    }
    match datatype {
        DataType::Fp16 => all(data, |bytes| half::f16::from_le_bytes(bytes).to_f64()),
        DataType::Bf16 => all(data, |bytes| half::bf16::from_le_bytes(bytes).to_f64()),
        DataType::Fp32 => all(data, |bytes| f32::from_le_bytes(bytes).into()),
        DataType::Fp64 => all(data, f64::from_le_bytes),
        _ => None,
    }
}

fn classes(datatype: DataType, data: &[u8]) -> Option<Vec<String>> {
    fn all<const N: usize>(data: &[u8], of: impl Fn([u8; N]) -> String) -> Option<Vec<String>> {
        let (chunks, rest) = data.as_chunks::<N>();
        rest.is_empty().then(|| chunks.iter().map(|chunk| of(*chunk)).collect())
    }
    match datatype {
        DataType::Bool => Some(data.iter().map(|byte| (*byte != 0).to_string()).collect()),
        DataType::Int8 => all(data, |bytes| i8::from_le_bytes(bytes).to_string()),
        DataType::Int16 => all(data, |bytes| i16::from_le_bytes(bytes).to_string()),
        DataType::Int32 => all(data, |bytes| i32::from_le_bytes(bytes).to_string()),
        DataType::Int64 => all(data, |bytes| i64::from_le_bytes(bytes).to_string()),
        DataType::Uint8 => all(data, |bytes| u8::from_le_bytes(bytes).to_string()),
        DataType::Uint16 => all(data, |bytes| u16::from_le_bytes(bytes).to_string()),
        DataType::Uint32 => all(data, |bytes| u32::from_le_bytes(bytes).to_string()),
        DataType::Uint64 => all(data, |bytes| u64::from_le_bytes(bytes).to_string()),
        DataType::Bytes => BytesElements::new(data)
            .map(|element| Some(std::str::from_utf8(element.ok()?).ok()?.to_owned()))
            .collect(),
        _ => None,
    }
}

impl Predicted<'_> {
    /// Probability of the predicted class, of each row of a model that gives probabilities.
    pub(super) fn confidences(&self, how: &How) -> impl Iterator<Item = f64> {
        let (width, values) = match &self.what {
            What::Scores { width, values, probabilities: true } => (*width, &values[..]),
            What::Values(values) if how.settings.task == Some(FeedbackTask::Classification) => {
                (1, &values[..])
            }
            _ => (1, &[][..]),
        };
        let threshold = how.threshold();
        values.chunks(width).filter_map(move |row| match row {
            [score] => (0.0..=1.0)
                .contains(score)
                .then(|| if *score >= threshold { *score } else { 1.0 - score }),
            row => Some(row[largest(row)].clamp(0.0, 1.0)),
        })
    }

    /// Holds the labels of its rows against it. As many as there are rows.
    ///
    /// # Errors
    /// For a label that is nothing that the model could have said.
    pub(super) fn judge(&self, labels: &[Option<Label>], how: &How) -> Result<Judged, LabelError> {
        match &self.what {
            What::Scores { width, values, probabilities } => {
                let rows = values.chunks(*width).zip(labels);
                let said = rows.filter_map(|(row, label)| Some((row, label.as_ref()?)));
                let judged = said.map(|(row, label)| {
                    let class = self.class(label, *width)?;
                    Ok(self.scored(row, class, largest(row), *probabilities))
                });
                judged.collect::<Result<_, _>>().map(Judged::Classification)
            }
            What::Classes { values, of } => {
                let said = values.iter().zip(labels);
                let said = said.filter_map(|(value, label)| Some((value, label.as_ref()?)));
                let judged = said.map(|(value, label)| {
                    let label = self.class_text(label, *of)?;
                    Ok(ClassRow { label, predicted: value.clone(), scores: None })
                });
                judged.collect::<Result<_, _>>().map(Judged::Classification)
            }
            What::Values(values) => self.judge_values(values, labels, how),
        }
    }

    fn judge_values(
        &self,
        values: &[f64],
        labels: &[Option<Label>],
        how: &How,
    ) -> Result<Judged, LabelError> {
        let said = values.iter().zip(labels);
        let said = said.filter_map(|(value, label)| Some((*value, label.as_ref()?)));
        let booleans = || labels.iter().flatten().all(|label| matches!(label, Label::Bool(_)));
        let scores = || values.iter().all(|value| (0.0..=1.0).contains(value));
        let classification = match how.settings.task {
            Some(task) => task == FeedbackTask::Classification,
            None => booleans() && scores(),
        };
        if !classification {
            let judged = said.filter(|(value, _)| value.is_finite()).map(|(predicted, label)| {
                let label = match label {
                    Label::Int(number) => *number as f64,
                    Label::Number(number) => *number,
                    Label::Bool(_) | Label::Text(_) => {
                        return Err(LabelError::NoNumber { label: label.to_string() });
                    }
                };
                Ok(ValueRow { label, predicted })
            });
            return judged.collect::<Result<_, _>>().map(Judged::Regression);
        }
        let probabilities = scores();
        let judged = said.filter(|(value, _)| !value.is_nan()).map(|(score, label)| {
            let class = self.class(label, 2).map_err(|_| {
                let label = label.to_string();
                LabelError::NotBinary { label }
            })?;
            let predicted = usize::from(score >= how.threshold());
            Ok(self.scored(&[1.0 - score, score], class, predicted, probabilities))
        });
        judged.collect::<Result<_, _>>().map(Judged::Classification)
    }

    fn scored(&self, row: &[f64], label: usize, predicted: usize, probabilities: bool) -> ClassRow {
        let scores = probabilities.then(|| {
            let off = |(at, p): (usize, &f64)| (p - f64::from(u8::from(at == label))).powi(2);
            let brier: f64 = row.iter().enumerate().map(off).sum();
            Scores {
                probability: row[label].clamp(0.0, 1.0),
                confidence: row[predicted].clamp(0.0, 1.0),
                brier: if row.len() == 2 { brier / 2.0 } else { brier },
            }
        });
        ClassRow { label: self.name(label), predicted: self.name(predicted), scores }
    }

    fn name(&self, class: usize) -> String {
        self.names.get(class).cloned().unwrap_or_else(|| class.to_string())
    }

    /// The class that a label means, of so many.
    fn class(&self, label: &Label, classes: usize) -> Result<usize, LabelError> {
        let class = match label {
            Label::Bool(value) if classes == 2 => Some(usize::from(*value)),
            Label::Int(number) => usize::try_from(*number).ok(),
            Label::Text(text) => self.names.iter().position(|name| name == text),
            Label::Bool(_) | Label::Number(_) => None,
        };
        let none = || LabelError::NoClass {
            label: label.to_string(),
            classes,
            names: if self.names.is_empty() { "; they have no names" } else { "" },
        };
        class.filter(|class| *class < classes).ok_or_else(none)
    }

    /// A label in the words of an output that holds classes.
    fn class_text(&self, label: &Label, of: DataType) -> Result<String, LabelError> {
        let wrong = || LabelError::Fraction { label: label.to_string() };
        Ok(match (label, of) {
            (Label::Bool(value), DataType::Bool | DataType::Bytes) => value.to_string(),
            (Label::Int(number @ (0 | 1)), DataType::Bool) => (*number == 1).to_string(),
            (Label::Text(text), DataType::Bytes) => text.clone(),
            (Label::Text(_), DataType::Bool) | (Label::Number(_), _) => return Err(wrong()),
            (Label::Int(_), DataType::Bool) => return Err(wrong()),
            (Label::Bool(value), _) => u8::from(*value).to_string(),
            (Label::Int(number), _) => number.to_string(),
            (Label::Text(text), _) => match self.names.iter().position(|name| name == text) {
                Some(class) => class.to_string(),
                None => text.parse::<i64>().map_err(|_| wrong())?.to_string(),
            },
        })
    }
}

/// Where the largest is; of equals the first.
fn largest(row: &[f64]) -> usize {
    (1..row.len()).fold(0, |best, at| if row[at] > row[best] { at } else { best })
}

#[cfg(test)]
mod tests {
    use smallvec::smallvec;

    use super::*;
    use crate::ledger::export::Content;

    fn tensor<'a>(datatype: &'a str, shape: &[u64], data: &'a [u8]) -> TensorView<'a> {
        let (name, content) = ("y", Content::Data(data));
        TensorView { name, datatype, shape: shape.into(), content, masked: smallvec![] }
    }

    fn singles(values: &[f32]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn judge(rows: u64, output: TensorView<'_>, how: &How, labels: &[Label]) -> Option<String> {
        let view = View { rows, outputs: smallvec![output], ..View::default() };
        let labels: Vec<_> = labels.iter().cloned().map(Some).collect();
        Some(match read(&view, how)?.judge(&labels, how) {
            Ok(judged) => serde_json::to_string(&judged).unwrap(),
            Err(error) => error.to_string(),
        })
    }

    fn how(task: Option<FeedbackTask>, names: &[&str]) -> How {
        let names = names.iter().map(|name| (*name).to_owned()).collect();
        let settings = FeedbackSettings { task, ..FeedbackSettings::default() };
        How { settings, classes: vec![("y".to_owned(), names)] }
    }

    #[test]
    fn probabilities_are_read_as_classes() {
        let data = singles(&[0.25, 0.75, 0.0, 0.5, 0.5, 0.0]);
        let output = || tensor("FP32", &[2, 3], &data);
        let named = how(None, &["cat", "dog", "cow"]);
        let labels = [Label::Text("dog".into()), Label::Int(2)];
        let want = r#"{"task":"classification","rows":[{"label":"dog","predicted":"dog","scores":{"probability":0.75,"confidence":0.75,"brier":0.125}},{"label":"cow","predicted":"cat","scores":{"probability":0.0,"confidence":0.5,"brier":1.5}}]}"#;
        assert_eq!(judge(2, output(), &named, &labels).unwrap(), want);
        for wrong in [Label::Int(3), Label::Int(-1), Label::Text("cut".into()), Label::Bool(true)] {
            let said = judge(2, output(), &named, &[wrong.clone(), Label::Int(0)]).unwrap();
            assert!(said.contains("none of the 3 classes"), "{wrong}: {said}");
        }
        let unnamed = judge(2, output(), &how(None, &[]), &[Label::Text("0".into())]).unwrap();
        assert!(unnamed.contains("have no names"), "{unnamed}");
    }

    #[test]
    fn what_adds_up_to_nothing_is_read_only_on_demand() {
        let data = singles(&[-3.0, 4.0]);
        let output = || tensor("FP32", &[1, 2], &data);
        let classes = how(Some(FeedbackTask::Classification), &[]);
        let label = [Label::Int(1)];
        assert_eq!(judge(1, output(), &how(None, &[]), &label), None);
        let want = r#"{"task":"classification","rows":[{"label":"1","predicted":"1"}]}"#;
        assert_eq!(judge(1, output(), &classes, &label).unwrap(), want);
        let gone = TensorView { content: Content::Digest(b"x"), ..output() };
        assert_eq!(judge(1, gone, &classes, &label), None);
        let nan = singles(&[f32::NAN, 1.0]);
        assert_eq!(judge(1, tensor("FP32", &[1, 2], &nan), &classes, &label), None);
    }

    #[test]
    fn a_number_a_row_is_a_value_or_a_score() {
        let data = singles(&[0.5]);
        let output = || tensor("FP32", &[1, 1], &data);
        let auto = how(None, &[]);
        let value = r#"{"task":"regression","rows":[{"label":1.0,"predicted":0.5}]}"#;
        assert_eq!(judge(1, output(), &auto, &[Label::Int(1)]).unwrap(), value);
        let score = r#"{"task":"classification","rows":[{"label":"1","predicted":"1","scores":{"probability":0.5,"confidence":0.5,"brier":0.25}}]}"#;
        assert_eq!(judge(1, output(), &auto, &[Label::Bool(true)]).unwrap(), score);
        let mut binary = how(Some(FeedbackTask::Classification), &[]);
        assert_eq!(judge(1, output(), &binary, &[Label::Int(1)]).unwrap(), score);
        let said = judge(1, output(), &binary, &[Label::Int(2)]).unwrap();
        assert!(said.contains("none of two classes"), "{said}");
        binary.settings.threshold_ppm = Some(600_000);
        let said = judge(1, output(), &binary, &[Label::Int(1)]).unwrap();
        assert!(said.contains(r#""predicted":"0""#), "{said}");
        let said = judge(1, output(), &auto, &[Label::Text("x".into())]).unwrap();
        assert!(said.contains("no number"), "{said}");
    }

    #[test]
    fn classes_are_compared_in_the_outputs_words() {
        let text = [3, 0, 0, 0, b'd', b'o', b'g'];
        let seven = 7_i64.to_le_bytes();
        let one = |tensor, label| {
            let judged = judge(1, tensor, &how(None, &["a", "b"]), &[label]).unwrap();
            judged.contains("\"rows\"").then(|| {
                judged.contains(r#""label":"7","predicted":"7""#)
                    || judged.contains(r#""label":"dog","predicted":"dog""#)
                    || judged.contains(r#""label":"true","predicted":"true""#)
            })
        };
        let int = || tensor("INT64", &[1], &seven);
        assert_eq!(one(int(), Label::Int(7)), Some(true));
        assert_eq!(one(int(), Label::Text("7".into())), Some(true));
        assert_eq!(one(int(), Label::Text("b".into())), Some(false));
        assert_eq!(one(int(), Label::Number(7.5)), None);
        assert_eq!(one(tensor("BYTES", &[1], &text), Label::Text("dog".into())), Some(true));
        assert_eq!(one(tensor("BOOL", &[1], &[1]), Label::Bool(true)), Some(true));
        assert_eq!(one(tensor("BOOL", &[1], &[1]), Label::Int(1)), Some(true));
        assert_eq!(one(tensor("BOOL", &[1], &[1]), Label::Int(7)), None);
    }
}
