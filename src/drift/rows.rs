//! From a call's tensors to the values of features, row by row.
//!
//! A [`Plan`] is made once for a list of features; after that a call costs what its rows have, and no
//! memory but one row's.

use std::fmt::Write as _;

use half::{bf16, f16};

use super::feature::{Feature, Part, Role, Value};
use super::scored::scored;
use super::wide::{self, DIMENSIONS, READ_MAX, Summary};
use crate::domain::{DataType, Tensor};

/// Which features come from which tensors.
#[derive(Clone, Debug)]
pub struct Plan {
    tensors: Vec<OfTensor>,
}

#[derive(Clone, Debug)]
struct OfTensor {
    role: Role,
    name: String,
    /// Features by the element that they are, ascending.
    elements: Vec<(usize, usize)>,
    /// Features of the row's scores.
    scored: Vec<(Part, usize)>,
    /// Features of the row as a whole.
    whole: Vec<(Part, usize)>,
    projected: bool,
}

/// A row's memory, to be used again.
#[derive(Clone, Debug, Default)]
pub struct Scratch {
    numbers: Vec<f64>,
    text: String,
}

impl Plan {
    /// `features` in the order in which they are numbered.
    pub fn new<'a>(features: impl IntoIterator<Item = &'a Feature>) -> Self {
        Self::numbered(features.into_iter().enumerate())
    }

    /// Some features, by their numbers.
    pub fn numbered<'a>(features: impl IntoIterator<Item = (usize, &'a Feature)>) -> Self {
        let mut tensors: Vec<OfTensor> = Vec::new();
        for (number, feature) in features {
            let is = |t: &OfTensor| t.role == feature.role && t.name == feature.tensor;
            let at = tensors.iter().position(is).unwrap_or_else(|| {
                tensors.push(OfTensor::new(feature));
                tensors.len() - 1
            });
            let tensor = &mut tensors[at];
            match feature.part {
                Part::Element(element) => tensor.elements.push((element, number)),
                _ if feature.of_scores() => tensor.scored.push((feature.part, number)),
                part => {
                    tensor.projected |= matches!(part, Part::Projection(_) | Part::Mmd);
                    tensor.whole.push((part, number));
                }
            }
        }
        for tensor in &mut tensors {
            tensor.elements.sort_unstable();
        }
        Self { tensors }
    }

    /// Calls `put` with the row, the feature's number and its value, for all features of one tensor.
    /// `batched`: the first axis is that of the rows; else the tensor is one row. Elements that a row
    /// has not are missing.
    pub fn read(
        &self,
        role: Role,
        name: &str,
        tensor: &Tensor,
        batched: bool,
        scratch: &mut Scratch,
        mut put: impl FnMut(usize, usize, Value<'_>),
    ) {
        let is = |t: &&OfTensor| t.role == role && t.name == name;
        let Some(plan) = self.tensors.iter().find(is) else { return };
        let rows = if batched { tensor.shape().first().copied().unwrap_or(1) } else { 1 };
        let len = tensor.elements().checked_div(rows).unwrap_or(0);
        if tensor.datatype() == DataType::Bytes {
            plan.texts(tensor, rows, len, &mut put);
            return;
        }
        for row in 0..rows {
            let step = plan.step(len);
            decode(tensor, row * len, len, step, &mut scratch.numbers);
            plan.numbers(&scratch.numbers, len, step, &mut scratch.text, |feature, value| {
                put(row, feature, value);
            });
        }
    }

    /// The same for one row of texts.
    pub fn read_texts(
        &self,
        role: Role,
        name: &str,
        row: &[Option<&[u8]>],
        mut put: impl FnMut(usize, Value<'_>),
    ) {
        let is = |t: &&OfTensor| t.role == role && t.name == name;
        let Some(plan) = self.tensors.iter().find(is) else { return };
        for (element, feature) in &plan.elements {
            let text = row.get(*element).copied().flatten();
            put(*feature, text.map_or(Value::Missing, Value::Text));
        }
    }

    /// The same for one row whose elements are numbers already, as files have them.
    pub fn read_numbers(
        &self,
        role: Role,
        name: &str,
        row: &[f64],
        scratch: &mut Scratch,
        put: impl FnMut(usize, Value<'_>),
    ) {
        let is = |t: &&OfTensor| t.role == role && t.name == name;
        let Some(plan) = self.tensors.iter().find(is) else { return };
        let step = plan.step(row.len());
        if step == 1 {
            plan.numbers(row, row.len(), 1, &mut scratch.text, put);
        } else {
            scratch.numbers.clear();
            scratch.numbers.extend(row.iter().step_by(step));
            plan.numbers(&scratch.numbers, row.len(), step, &mut scratch.text, put);
        }
    }
}

impl OfTensor {
    fn new(feature: &Feature) -> Self {
        Self {
            role: feature.role,
            name: feature.tensor.clone(),
            elements: Vec::new(),
            scored: Vec::new(),
            whole: Vec::new(),
            projected: false,
        }
    }

    /// Every how many elements of a row one is read.
    fn step(&self, len: usize) -> usize {
        let sampled = self.scored.is_empty() && self.elements.is_empty();
        if sampled { len.div_ceil(READ_MAX).max(1) } else { 1 }
    }

    fn texts(
        &self,
        tensor: &Tensor,
        rows: usize,
        len: usize,
        put: &mut impl FnMut(usize, usize, Value<'_>),
    ) {
        let mut texts = tensor.bytes_elements();
        for row in 0..rows {
            let mut wanted = self.elements.iter().peekable();
            for (at, text) in texts.by_ref().take(len).enumerate() {
                if let Some((_, feature)) = wanted.next_if(|(element, _)| *element == at) {
                    put(row, *feature, Value::Text(text));
                }
            }
            for (_, feature) in wanted {
                put(row, *feature, Value::Missing);
            }
        }
    }

    /// `read` are every `step`-th of the `len` elements of a row.
    fn numbers(
        &self,
        read: &[f64],
        len: usize,
        step: usize,
        text: &mut String,
        mut put: impl FnMut(usize, Value<'_>),
    ) {
        for (element, feature) in &self.elements {
            put(*feature, read.get(*element).map_or(Value::Missing, |value| Value::Number(*value)));
        }
        if !self.scored.is_empty() {
            self.scores(read, text, &mut put);
        }
        if self.whole.is_empty() {
            return;
        }
        let summary = Summary::of(read);
        let vector: [f64; DIMENSIONS] = match self.projected && summary.is_some() {
            true => wide::project(read, step, wide::SEED),
            false => [0.0; DIMENSIONS],
        };
        for (part, feature) in &self.whole {
            let value = match (part, &summary) {
                (Part::Length, _) => Value::Number(len as f64),
                (_, None) => Value::Missing,
                (Part::Projection(at), _) => {
                    vector.get(*at).map_or(Value::Missing, |value| Value::Number(*value))
                }
                (Part::Mmd, _) => Value::Vector(&vector),
                (part, Some(summary)) => summary.part(*part).map_or(Value::Missing, Value::Number),
            };
            put(*feature, value);
        }
    }

    fn scores(&self, row: &[f64], text: &mut String, put: &mut impl FnMut(usize, Value<'_>)) {
        let found = scored(row);
        for (part, feature) in &self.scored {
            let value = match (&found, part) {
                (None, _) => Value::Missing,
                (Some(found), Part::Class) => {
                    text.clear();
                    // Writing to a string does not fail.
                    write!(text, "{}", found.class).unwrap_or_default();
                    Value::Text(text.as_bytes())
                }
                (Some(found), Part::Confidence) => Value::Number(found.confidence),
                (Some(found), Part::Margin) => Value::Number(found.margin),
                (Some(found), _) => Value::Number(found.entropy),
            };
            put(*feature, value);
        }
    }
}

/// Every `step`-th of `len` elements from `from` on, as doubles; of 64-bit integers the nearest.
fn decode(tensor: &Tensor, from: usize, len: usize, step: usize, into: &mut Vec<f64>) {
    fn each<const SIZE: usize>(
        bytes: &[u8],
        step: usize,
        into: &mut Vec<f64>,
        of: impl Fn([u8; SIZE]) -> f64,
    ) {
        let (elements, _) = bytes.as_chunks::<SIZE>();
        into.extend(elements.iter().step_by(step).map(|element| of(*element)));
    }
    into.clear();
    let Some(size) = tensor.datatype().size() else { return };
    let Some(bytes) = tensor.data().get(from * size..(from + len) * size) else { return };
    match tensor.datatype() {
        DataType::Bool | DataType::Uint8 => each(bytes, step, into, |[byte]| f64::from(byte)),
        DataType::Int8 => each(bytes, step, into, |byte| f64::from(i8::from_le_bytes(byte))),
        DataType::Uint16 => each(bytes, step, into, |b| f64::from(u16::from_le_bytes(b))),
        DataType::Int16 => each(bytes, step, into, |b| f64::from(i16::from_le_bytes(b))),
        DataType::Uint32 => each(bytes, step, into, |b| f64::from(u32::from_le_bytes(b))),
        DataType::Int32 => each(bytes, step, into, |b| f64::from(i32::from_le_bytes(b))),
        DataType::Uint64 => each(bytes, step, into, |b| u64::from_le_bytes(b) as f64),
        DataType::Int64 => each(bytes, step, into, |b| i64::from_le_bytes(b) as f64),
        DataType::Fp16 => each(bytes, step, into, |b| f16::from_le_bytes(b).to_f64()),
        DataType::Bf16 => each(bytes, step, into, |b| bf16::from_le_bytes(b).to_f64()),
        DataType::Fp32 => each(bytes, step, into, |b| f64::from(f32::from_le_bytes(b))),
        DataType::Fp64 => each(bytes, step, into, f64::from_le_bytes),
        DataType::Bytes => {}
    }
}

#[cfg(test)]
mod tests {
    use smallvec::smallvec;

    use super::super::feature::of_rows;
    use super::*;

    fn read(features: &[Feature], name: &str, tensor: &Tensor) -> Vec<(usize, String, String)> {
        let mut found = Vec::new();
        let plan = Plan::new(features);
        let role = features[0].role;
        plan.read(role, name, tensor, true, &mut Scratch::default(), |row, feature, value| {
            let value = match value {
                Value::Text(text) => String::from_utf8_lossy(text).into_owned(),
                Value::Number(number) => number.to_string(),
                Value::Vector(_) => "vector".into(),
                Value::Missing => "missing".into(),
            };
            found.push((row, features[feature].name.clone(), value));
        });
        found
    }

    fn floats(shape: &[usize], values: &[f32]) -> Tensor {
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor::new(DataType::Fp32, shape.into(), data.into()).unwrap()
    }

    #[test]
    fn rows_become_values_of_features() {
        let features = of_rows(Role::Output, "y", DataType::Fp32, Some(&[2]));
        let found = read(&features, "y", &floats(&[2, 2], &[0.25, 0.75, 3.0, 4.0]));
        let of = |row: usize, name: &str| {
            let found = found.iter().find(|(r, n, _)| (*r, n.as_str()) == (row, name));
            found.map(|(_, _, value)| value.clone()).unwrap()
        };
        assert_eq!((of(0, "y[1]"), of(1, "y[0]")), ("0.75".into(), "3".into()));
        assert_eq!((of(0, "class(y)"), of(0, "margin(y)")), ("1".into(), "0.5".into()));
        assert_eq!(of(1, "class(y)"), "missing");
        // A row that is too short lacks an element.
        let found = read(&features, "y", &floats(&[1, 1], &[1.0]));
        assert!(found.contains(&(0, "y[1]".into(), "missing".into())), "{found:?}");
        assert!(read(&features, "z", &floats(&[1, 1], &[1.0])).is_empty());
    }

    #[test]
    fn texts_are_found_by_place() {
        let features = of_rows(Role::Input, "x", DataType::Bytes, Some(&[2]));
        let tensor = Tensor::from_elements(smallvec![2, 2], &["a", "b", "c", "d"]).unwrap();
        let found = read(&features, "x", &tensor);
        let want = [(0, "x[0]", "a"), (0, "x[1]", "b"), (1, "x[0]", "c"), (1, "x[1]", "d")];
        let want = want.map(|(row, name, value)| (row, name.to_owned(), value.to_owned()));
        assert_eq!(found, want);
    }

    #[test]
    fn wide_rows_are_summed_up() {
        let features = of_rows(Role::Input, "x", DataType::Fp32, None);
        let found = read(&features, "x", &floats(&[1, 4], &[1.0, 3.0, f32::NAN, 2.0]));
        for (name, want) in
            [("length(x)", "4"), ("mean(x)", "2"), ("max(x)", "3"), ("mmd(x)", "vector")]
        {
            assert!(found.contains(&(0, name.into(), want.into())), "{name}: {found:?}");
        }
        assert_eq!(found.len(), features.len());
        let found = read(&features, "x", &floats(&[1, 0], &[]));
        assert!(found.contains(&(0, "mean(x)".into(), "missing".into())), "{found:?}");
    }
}
