//! From the protocol's request message to ours.
//!
//! Invariants:
//! - Pure but for reads of shared memory; any message gives a request or a failure, never a panic.
//! - Raw tensors are slices of the message, not copies.

use std::collections::HashMap;

use bytes::Bytes;

use crate::domain::{
    DataType, Failure, InferRequest, Inputs, ModelName, NamedTensor, ParameterValue, Parameters,
    RequestedOutput, Tensor, TensorError, VersionRef,
};
use crate::proto::inference::infer_parameter::ParameterChoice;
use crate::proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use crate::proto::inference::{InferParameter, InferTensorContents, ModelInferRequest};
use crate::transport::shm::SharedMemory;

const REGION: &str = "shared_memory_region";
const REGION_SIZE: &str = "shared_memory_byte_size";
const REGION_OFFSET: &str = "shared_memory_offset";
/// The one key under Triton's reserved prefix that a caller may set.
const EMPTY_FINAL: &str = "triton_enable_empty_final_response";

/// Bytes inside a registered region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    pub region: String,
    pub offset: usize,
    pub byte_size: usize,
}

/// A request, and where the caller wants outputs that do not go into the answer.
pub struct Decoded {
    pub request: InferRequest,
    /// By output name.
    pub placed: Vec<(String, Slice)>,
}

/// Model and version that a message names.
///
/// # Errors
/// `InvalidInput` for no model or a bad version, `NotFound` for a name that no model can have.
pub(super) fn names(
    model: &str,
    version: &str,
) -> Result<(ModelName, Option<VersionRef>), Failure> {
    if model.is_empty() {
        return Err(Failure::invalid("model name is empty"));
    }
    let name = model.parse().map_err(|_| {
        let shown: String = model.chars().take(crate::transport::shm::SHM_NAME_LEN_MAX).collect();
        Failure::not_found(format!("model '{shown}' is not found"))
    })?;
    let version = VersionRef::parse(version)
        .map_err(|error| Failure::invalid(format!("version of model '{name}': {error}")))?;
    Ok((name, version))
}

/// Reads a request message. Inputs in shared memory may have `shm_bytes_max` bytes together.
///
/// # Errors
/// `InvalidInput` that names the input or parameter; `Unsupported` for sequences, and for shared
/// memory when it is off.
pub fn decode(
    message: ModelInferRequest,
    shm: &SharedMemory,
    shm_bytes_max: usize,
) -> Result<Decoded, Failure> {
    let (model, version) = names(&message.model_name, &message.model_version)?;
    let parameters = parameters(message.parameters)?;
    let inputs = inputs(message.inputs, message.raw_input_contents, shm, shm_bytes_max)?;
    let mut outputs = Vec::with_capacity(message.outputs.len());
    let mut placed = Vec::new();
    for output in message.outputs {
        let (output, slice) = requested(output)?;
        if let Some(slice) = slice {
            // Refused now rather than after the model has run.
            drop(shm.status(Some(&slice.region))?);
            placed.push((output.name.clone(), slice));
        }
        outputs.push(output);
    }
    let id = message.id;
    let inputs = Inputs::Named(inputs);
    Ok(Decoded {
        request: InferRequest { model, version, id, inputs, outputs, parameters },
        placed,
    })
}

fn parameters(wire: HashMap<String, InferParameter>) -> Result<Parameters, Failure> {
    let mut parameters = Vec::with_capacity(wire.len());
    for (key, value) in wire {
        let value = value_of(&key, value)?;
        match (key.as_str(), &value) {
            ("sequence_start" | "sequence_end" | EMPTY_FINAL, ParameterValue::Bool(_)) => {}
            ("sequence_start" | "sequence_end" | EMPTY_FINAL, _) => {
                return Err(wrong_kind(&key, "a bool", &value));
            }
            ("sequence_id", ParameterValue::Int(0) | ParameterValue::Uint(0)) => {}
            ("sequence_id", ParameterValue::String(text)) if text.is_empty() => {}
            (
                "sequence_id",
                ParameterValue::Int(_) | ParameterValue::Uint(_) | ParameterValue::String(_),
            ) => {
                return Err(Failure::unsupported(
                    "sequences are not supported, leave out 'sequence_id'",
                ));
            }
            ("sequence_id", _) => {
                return Err(wrong_kind(&key, "an integer or a string", &value));
            }
            (reserved, _) if reserved.starts_with("triton_") => {
                return Err(Failure::invalid(format!(
                    "parameter '{}' has the reserved prefix 'triton_'",
                    shown(reserved)
                )));
            }
            _ => parameters.push((key, value)),
        }
    }
    // The wire has no order.
    parameters.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    Ok(parameters)
}

fn value_of(key: &str, parameter: InferParameter) -> Result<ParameterValue, Failure> {
    Ok(match parameter.parameter_choice {
        Some(ParameterChoice::BoolParam(value)) => ParameterValue::Bool(value),
        Some(ParameterChoice::Int64Param(value)) => ParameterValue::Int(value),
        Some(ParameterChoice::Uint64Param(value)) => ParameterValue::Uint(value),
        Some(ParameterChoice::DoubleParam(value)) => ParameterValue::Double(value),
        Some(ParameterChoice::StringParam(value)) => ParameterValue::String(value),
        None => {
            return Err(Failure::invalid(format!("parameter '{}' has no value", shown(key))));
        }
    })
}

fn inputs(
    wire: Vec<InferInputTensor>,
    raw: Vec<Bytes>,
    shm: &SharedMemory,
    shm_bytes_max: usize,
) -> Result<Vec<NamedTensor>, Failure> {
    let all_raw = !raw.is_empty();
    let given = raw.len();
    let mut raw = raw.into_iter();
    let mut shm_bytes = 0_usize;
    let mut inputs = Vec::with_capacity(wire.len());
    for input in wire {
        let InferInputTensor { name, datatype, shape, parameters, contents } = input;
        let bad = |what: String| Failure::invalid(format!("input '{}': {what}", shown(&name)));
        let datatype: DataType = datatype.parse().map_err(|error| bad(format!("{error}")))?;
        let tensor_error = |error: TensorError| bad(error.to_string());
        let shape = Tensor::shape_from_wire(&shape).map_err(tensor_error)?;
        let data = match (slice(&parameters, &name)?, contents) {
            (Some(_), Some(_)) => {
                return Err(bad("has contents and a shared memory region, expected one".into()));
            }
            (Some(slice), None) => {
                shm_bytes = shm_bytes.saturating_add(slice.byte_size);
                if shm_bytes > shm_bytes_max {
                    return Err(bad(format!(
                        "shared memory of one request is over the limit of {shm_bytes_max} bytes"
                    )));
                }
                shm.read(&slice.region, slice.offset, slice.byte_size)?
            }
            (None, Some(_)) if all_raw => {
                return Err(bad(
                    "has contents, which cannot be mixed with raw_input_contents".to_owned()
                ));
            }
            (None, None) if all_raw => raw.next().ok_or_else(|| {
                bad(format!("has no data, raw_input_contents has only {given} entries"))
            })?,
            (None, contents) => {
                typed(datatype, contents.unwrap_or_default()).map_err(|error| bad(error.0))?
            }
        };
        let tensor = Tensor::new(datatype, shape, data).map_err(tensor_error)?;
        inputs.push(NamedTensor { name, tensor });
    }
    match raw.len() {
        0 => Ok(inputs),
        left => Err(Failure::invalid(format!(
            "raw_input_contents has {given} entries, {left} more than inputs that take one"
        ))),
    }
}

/// What is wrong with typed contents.
struct ContentsError(String);

/// Bytes of typed contents; only the field of the datatype may be filled.
fn typed(datatype: DataType, contents: InferTensorContents) -> Result<Bytes, ContentsError> {
    let InferTensorContents {
        bool_contents,
        int_contents,
        int64_contents,
        uint_contents,
        uint64_contents,
        fp32_contents,
        fp64_contents,
        bytes_contents,
    } = contents;
    let fields = [
        ("bool_contents", bool_contents.is_empty()),
        ("int_contents", int_contents.is_empty()),
        ("int64_contents", int64_contents.is_empty()),
        ("uint_contents", uint_contents.is_empty()),
        ("uint64_contents", uint64_contents.is_empty()),
        ("fp32_contents", fp32_contents.is_empty()),
        ("fp64_contents", fp64_contents.is_empty()),
        ("bytes_contents", bytes_contents.is_empty()),
    ];
    let Some(field) = field_of(datatype) else {
        return Err(ContentsError(format!("{datatype} goes only into raw_input_contents")));
    };
    if let Some((other, _)) = fields.iter().find(|(name, empty)| !empty && *name != field) {
        return Err(ContentsError(format!("{datatype} goes into {field}, got {other}")));
    }
    Ok(match datatype {
        DataType::Bool => bool_contents.into_iter().map(u8::from).collect(),
        DataType::Int8 => narrow::<i8, 1, _>(&int_contents, datatype, i8::to_le_bytes)?,
        DataType::Int16 => narrow::<i16, 2, _>(&int_contents, datatype, i16::to_le_bytes)?,
        DataType::Int32 => little(&int_contents, i32::to_le_bytes),
        DataType::Int64 => little(&int64_contents, i64::to_le_bytes),
        DataType::Uint8 => narrow::<u8, 1, _>(&uint_contents, datatype, u8::to_le_bytes)?,
        DataType::Uint16 => narrow::<u16, 2, _>(&uint_contents, datatype, u16::to_le_bytes)?,
        DataType::Uint32 => little(&uint_contents, u32::to_le_bytes),
        DataType::Uint64 => little(&uint64_contents, u64::to_le_bytes),
        DataType::Fp32 => little(&fp32_contents, f32::to_le_bytes),
        DataType::Fp64 => little(&fp64_contents, f64::to_le_bytes),
        DataType::Bytes => return prefixed(&bytes_contents),
        DataType::Fp16 | DataType::Bf16 => Bytes::new(),
    })
}

fn field_of(datatype: DataType) -> Option<&'static str> {
    Some(match datatype {
        DataType::Bool => "bool_contents",
        DataType::Int8 | DataType::Int16 | DataType::Int32 => "int_contents",
        DataType::Int64 => "int64_contents",
        DataType::Uint8 | DataType::Uint16 | DataType::Uint32 => "uint_contents",
        DataType::Uint64 => "uint64_contents",
        DataType::Fp32 => "fp32_contents",
        DataType::Fp64 => "fp64_contents",
        DataType::Bytes => "bytes_contents",
        DataType::Fp16 | DataType::Bf16 => return None,
    })
}

fn little<T: Copy, const N: usize>(values: &[T], bytes: impl Fn(T) -> [u8; N]) -> Bytes {
    let mut data = Vec::with_capacity(values.len() * N);
    for value in values {
        data.extend_from_slice(&bytes(*value));
    }
    data.into()
}

fn narrow<T, const N: usize, W>(
    values: &[W],
    datatype: DataType,
    bytes: impl Fn(T) -> [u8; N],
) -> Result<Bytes, ContentsError>
where
    T: TryFrom<W>,
    W: Copy + std::fmt::Display,
{
    let mut data = Vec::with_capacity(values.len() * N);
    for (index, value) in values.iter().enumerate() {
        let narrowed = T::try_from(*value).map_err(|_| {
            ContentsError(format!("element {index} is {value}, out of range for {datatype}"))
        })?;
        data.extend_from_slice(&bytes(narrowed));
    }
    Ok(data.into())
}

fn prefixed(elements: &[Bytes]) -> Result<Bytes, ContentsError> {
    let mut data = Vec::with_capacity(elements.iter().map(|element| element.len() + 4).sum());
    for (index, element) in elements.iter().enumerate() {
        let len = u32::try_from(element.len())
            .map_err(|_| ContentsError(format!("element {index} has 4 GiB or more")))?;
        data.extend_from_slice(&len.to_le_bytes());
        data.extend_from_slice(element);
    }
    Ok(data.into())
}

fn requested(
    wire: InferRequestedOutputTensor,
) -> Result<(RequestedOutput, Option<Slice>), Failure> {
    let InferRequestedOutputTensor { name, parameters } = wire;
    let slice = slice(&parameters, &name)?;
    let classification = match size(&parameters, "classification", &name)? {
        Some(0) => {
            return Err(Failure::invalid(format!(
                "parameter 'classification' of output '{}' must be at least 1",
                shown(&name)
            )));
        }
        other => other,
    };
    if slice.is_some() && classification.is_some() {
        return Err(Failure::invalid(format!(
            "output '{}' asks for classification and shared memory, expected one",
            shown(&name)
        )));
    }
    Ok((RequestedOutput { name, classification }, slice))
}

/// The shared memory that a tensor's parameters name, if any.
fn slice(
    parameters: &HashMap<String, InferParameter>,
    tensor: &str,
) -> Result<Option<Slice>, Failure> {
    if parameters.is_empty() {
        return Ok(None);
    }
    let byte_size = size(parameters, REGION_SIZE, tensor)?;
    let offset = size(parameters, REGION_OFFSET, tensor)?;
    let Some(parameter) = parameters.get(REGION) else {
        if byte_size.is_some() || offset.is_some() {
            return Err(Failure::invalid(format!(
                "tensor '{}' has a shared memory size or offset, but no '{REGION}'",
                shown(tensor)
            )));
        }
        return Ok(None);
    };
    let Some(ParameterChoice::StringParam(region)) = &parameter.parameter_choice else {
        return Err(Failure::invalid(format!(
            "parameter '{REGION}' of tensor '{}' must be a string",
            shown(tensor)
        )));
    };
    let Some(byte_size) = byte_size else {
        return Err(Failure::invalid(format!(
            "tensor '{}' has '{REGION}' without '{REGION_SIZE}'",
            shown(tensor)
        )));
    };
    Ok(Some(Slice { region: region.clone(), offset: offset.unwrap_or(0), byte_size }))
}

/// The parameter `key` as a non-negative integer, if it is there.
fn size(
    parameters: &HashMap<String, InferParameter>,
    key: &str,
    tensor: &str,
) -> Result<Option<usize>, Failure> {
    let Some(parameter) = parameters.get(key) else { return Ok(None) };
    let number = match &parameter.parameter_choice {
        Some(ParameterChoice::Int64Param(number)) => usize::try_from(*number).ok(),
        Some(ParameterChoice::Uint64Param(number)) => usize::try_from(*number).ok(),
        _ => None,
    };
    number.map(Some).ok_or_else(|| {
        Failure::invalid(format!(
            "parameter '{key}' of tensor '{}' must be a non-negative integer",
            shown(tensor)
        ))
    })
}

fn wrong_kind(key: &str, expected: &str, got: &ParameterValue) -> Failure {
    let got = match got {
        ParameterValue::Bool(_) => "a bool",
        ParameterValue::Int(_) | ParameterValue::Uint(_) => "an integer",
        ParameterValue::Double(_) => "a double",
        ParameterValue::String(_) => "a string",
    };
    Failure::invalid(format!("parameter '{key}' must be {expected}, got {got}"))
}

/// A caller's name, short enough for an error message.
fn shown(name: &str) -> String {
    name.chars().take(128).collect()
}

#[cfg(test)]
mod tests;
