//! KServe v1: `{"instances": [...]}` and `{"predictions": [...]}`.
//!
//! Instances carry no datatypes, so they are read when the model is known, by its signature. A
//! model with one input takes an instance as it is or as `{"<input>": value}`; one with several
//! takes objects with a value for each input.

use bytes::Bytes;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::elements::{self, Nesting};
use super::infer::Typing;
use super::json::{AtMost, Members, Object, ROWS_MAX, from_slice};
use crate::domain::{DataType, Failure, NamedTensor, Shape, Signature, Tensor, TensorSpec};

#[derive(Deserialize)]
struct RequestJson<'a> {
    #[serde(borrow)]
    instances: &'a RawValue,
}

/// The inputs of a `:predict` body, typed later.
pub(super) fn typing(body: Bytes) -> Typing {
    Box::new(move |signature| decode(signature, &body))
}

/// Reads a `:predict` body for a model of this signature.
///
/// # Errors
/// `InvalidInput` for whatever is wrong.
pub fn decode(signature: &Signature, body: &[u8]) -> Result<Vec<NamedTensor>, Failure> {
    let Object(RequestJson { instances }) = from_slice(body)?;
    self::instances(signature, instances)
}

/// Reads a list of instances.
pub(super) fn instances(
    signature: &Signature,
    instances: &RawValue,
) -> Result<Vec<NamedTensor>, Failure> {
    let text = instances.get();
    let first = text.strip_prefix('[').map(str::trim_start);
    let Some(first) = first else {
        return Err(Failure::invalid("'instances' must be a list"));
    };
    if first.starts_with('{') {
        return objects(signature, text);
    }
    match &signature.inputs[..] {
        [input] => Ok(vec![tensor(input, [text].into_iter(), None)?]),
        inputs => Err(Failure::invalid(format!(
            "the model has {} inputs, expected 'instances' to be objects with a value for each",
            inputs.len()
        ))),
    }
}

fn objects(signature: &Signature, text: &str) -> Result<Vec<NamedTensor>, Failure> {
    let AtMost::<Members<'_>, ROWS_MAX>(rows) = from_slice(text.as_bytes())?;
    let mut tensors = Vec::with_capacity(signature.inputs.len());
    for input in &signature.inputs {
        let mut cells = Vec::with_capacity(rows.len());
        for (row, Members(members)) in rows.iter().enumerate() {
            let cell = members.iter().find(|(name, _)| *name == input.name);
            let Some((_, cell)) = cell else {
                return Err(Failure::invalid(format!(
                    "instance {row} lacks input '{}'",
                    input.name
                )));
            };
            if members.len() != signature.inputs.len() {
                return Err(Failure::invalid(format!(
                    "instance {row} has {} values, the model has {} inputs",
                    members.len(),
                    signature.inputs.len()
                )));
            }
            cells.push(cell.get());
        }
        tensors.push(tensor(input, cells.into_iter(), Some(rows.len()))?);
    }
    Ok(tensors)
}

/// One tensor from JSON values: of all rows in one list, or (`rows` given) one value per row.
pub(super) fn tensor<'a>(
    input: &TensorSpec,
    cells: impl Iterator<Item = &'a str>,
    rows: Option<usize>,
) -> Result<NamedTensor, Failure> {
    let wrong =
        |what: &dyn std::fmt::Display| Failure::invalid(format!("input '{}': {what}", input.name));
    let mut data = Vec::new();
    let mut common: Option<Nesting> = None;
    for cell in cells {
        let nesting = elements::read(cell, input.datatype, usize::MAX, &mut data)
            .map_err(|error| wrong(&error))?;
        match &common {
            Some(first) if *first != nesting => {
                return Err(wrong(&format_args!(
                    "rows differ in shape: {:?} and {:?}",
                    &first[..],
                    &nesting[..]
                )));
            }
            _ => common = Some(nesting),
        }
    }
    let mut shape: Shape = rows.into_iter().collect();
    shape.extend(common.unwrap_or_default());
    let tensor = build(input, shape, data).map_err(|error| wrong(&error))?;
    Ok(NamedTensor { name: input.name.clone(), tensor })
}

/// A tensor of `shape`, or of the declared one where rows came flat: `[3]` as `[3, 1]`.
pub(super) fn build(
    input: &TensorSpec,
    shape: Shape,
    data: Vec<u8>,
) -> Result<Tensor, crate::domain::TensorError> {
    let tensor = Tensor::new(input.datatype, shape, Bytes::from(data))?;
    let declared = input.wire_shape();
    let (Some(&rows), true) = (tensor.shape().first(), declared.len() > tensor.shape().len())
    else {
        return Ok(tensor);
    };
    let mut wider = Shape::from_slice(&[rows]);
    for dim in declared.get(1..).unwrap_or_default() {
        match usize::try_from(*dim) {
            Ok(size) => wider.push(size),
            Err(_) => return Ok(tensor),
        }
    }
    // Of another size: the tensor stays as it came, and binding says what is wrong.
    Ok(tensor.reshaped(wider).unwrap_or(tensor))
}

/// Shape `[rows, columns]` or, for one column where that is declared, `[rows]`.
pub(super) fn table_shape(input: &TensorSpec, rows: usize, columns: usize) -> Shape {
    match &input.shape {
        Some(dims) if dims.len() == 1 && columns == 1 => Shape::from_slice(&[rows]),
        _ => Shape::from_slice(&[rows, columns]),
    }
}

/// Datatypes that text can carry.
pub(super) fn textual(input: &TensorSpec) -> Result<(), Failure> {
    match input.datatype {
        DataType::Fp16 | DataType::Bf16 => Err(Failure::invalid(format!(
            "input '{}' of datatype {} has no text form, use the binary tensor extension",
            input.name, input.datatype
        ))),
        _ => Ok(()),
    }
}
