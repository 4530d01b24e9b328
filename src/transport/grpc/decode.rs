//! From the protocol's request message to ours.
//!
//! Invariants:
//! - Pure but for reads of shared memory; any message gives a request or a failure, never a panic.
//! - Raw tensors are slices of the message, not copies.

use bytes::Bytes;

use super::contents::{self, ContentsError};
use super::wire::{self, Input, Output, Parameter};
use crate::domain::{
    DataType, Failure, InferRequest, Inputs, ModelName, NamedTensor, ParameterValue, Parameters,
    RequestedOutput, Tensor, TensorError, VersionRef,
};
use crate::transport::intake::Grow;
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

/// Reads a request message. Inputs in shared memory may have `shm_bytes_max` bytes together; what
/// is not a slice of the message is counted by `grow` first.
///
/// # Errors
/// `InvalidInput` that names the input or parameter; `Unsupported` for sequences, and for shared
/// memory when it is off; what `grow` answers.
pub fn decode(
    message: Bytes,
    shm: &SharedMemory,
    shm_bytes_max: usize,
    grow: Grow<'_>,
) -> Result<Decoded, Failure> {
    let request = wire::request(message).map_err(wire::WireError::into_failure)?;
    let (model, version) = names(&request.model_name, &request.model_version)?;
    complete(request, model, version, shm, shm_bytes_max, grow)
}

/// Reads the rest of a request whose model is known.
pub(super) fn complete(
    request: wire::Request,
    model: ModelName,
    version: Option<VersionRef>,
    shm: &SharedMemory,
    shm_bytes_max: usize,
    grow: Grow<'_>,
) -> Result<Decoded, Failure> {
    let parameters = parameters(request.parameters)?;
    let mut sources = Sources { raw: request.raw.into_iter(), shm, shm_bytes_max, grow };
    let inputs = inputs(request.inputs, &mut sources)?;
    let mut outputs = Vec::with_capacity(request.outputs.len());
    let mut placed = Vec::new();
    for output in request.outputs {
        let (output, slice) = requested(output)?;
        if let Some(slice) = slice {
            // Refused now rather than after the model has run.
            drop(shm.status(Some(&slice.region))?);
            placed.push((output.name.clone(), slice));
        }
        outputs.push(output);
    }
    let id = request.id;
    let inputs = Inputs::Named(inputs);
    Ok(Decoded {
        request: InferRequest { model, version, id, inputs, outputs, parameters },
        placed,
    })
}

fn parameters(wire: Vec<Parameter>) -> Result<Parameters, Failure> {
    let mut parameters = Vec::with_capacity(wire.len());
    for (key, value) in wire {
        let value = value
            .ok_or_else(|| Failure::invalid(format!("parameter '{}' has no value", shown(&key))))?;
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

/// Where tensors come from beside their inputs.
struct Sources<'a> {
    raw: std::vec::IntoIter<Bytes>,
    shm: &'a SharedMemory,
    shm_bytes_max: usize,
    grow: Grow<'a>,
}

fn inputs(wire: Vec<Input>, sources: &mut Sources<'_>) -> Result<Vec<NamedTensor>, Failure> {
    let given = sources.raw.len();
    let mut shm_bytes = 0_usize;
    let mut inputs: Vec<NamedTensor> = Vec::with_capacity(wire.len());
    for input in wire {
        let Input { name, datatype, shape, rank, parameters, contents } = input;
        let bad = |what: String| Failure::invalid(format!("input '{}': {what}", shown(&name)));
        let datatype: DataType = datatype.parse().map_err(|error| bad(format!("{error}")))?;
        let tensor_error = |error: TensorError| bad(error.to_string());
        if rank > shape.len() {
            return Err(tensor_error(TensorError::Rank { rank }));
        }
        let shape = Tensor::shape_from_wire(&shape).map_err(tensor_error)?;
        let data = match (slice(&parameters, &name)?, contents) {
            (Some(_), Some(_)) => {
                return Err(bad("has contents and a shared memory region, expected one".into()));
            }
            (Some(slice), None) => {
                shm_bytes = shm_bytes.saturating_add(slice.byte_size);
                if shm_bytes > sources.shm_bytes_max {
                    return Err(bad(format!(
                        "shared memory of one request is over the limit of {} bytes",
                        sources.shm_bytes_max
                    )));
                }
                (sources.grow)(slice.byte_size)?;
                sources.shm.read(&slice.region, slice.offset, slice.byte_size)?
            }
            (None, Some(_)) if given > 0 => {
                return Err(bad(
                    "has contents, which cannot be mixed with raw_input_contents".to_owned()
                ));
            }
            (None, None) if given > 0 => sources.raw.next().ok_or_else(|| {
                bad(format!("has no data, raw_input_contents has only {given} entries"))
            })?,
            (None, contents) => {
                let read = contents::read(datatype, contents.unwrap_or_default(), sources.grow);
                read.map_err(|error| match error {
                    ContentsError::Full(failure) => failure,
                    error => bad(error.to_string()),
                })?
            }
        };
        let tensor = Tensor::new(datatype, shape, data).map_err(tensor_error)?;
        inputs.push(NamedTensor { name, tensor });
    }
    match sources.raw.len() {
        0 => Ok(inputs),
        left => Err(Failure::invalid(format!(
            "raw_input_contents has {given} entries, {left} more than inputs that take one"
        ))),
    }
}

fn requested(wire: Output) -> Result<(RequestedOutput, Option<Slice>), Failure> {
    let Output { name, parameters } = wire;
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
fn slice(parameters: &[Parameter], tensor: &str) -> Result<Option<Slice>, Failure> {
    if parameters.is_empty() {
        return Ok(None);
    }
    let byte_size = size(parameters, REGION_SIZE, tensor)?;
    let offset = size(parameters, REGION_OFFSET, tensor)?;
    let Some(parameter) = find(parameters, REGION) else {
        if byte_size.is_some() || offset.is_some() {
            return Err(Failure::invalid(format!(
                "tensor '{}' has a shared memory size or offset, but no '{REGION}'",
                shown(tensor)
            )));
        }
        return Ok(None);
    };
    let Some(ParameterValue::String(region)) = parameter else {
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

fn find<'a>(parameters: &'a [Parameter], key: &str) -> Option<&'a Option<ParameterValue>> {
    parameters.iter().find(|(name, _)| name == key).map(|(_, value)| value)
}

/// The parameter `key` as a non-negative integer, if it is there.
fn size(parameters: &[Parameter], key: &str, tensor: &str) -> Result<Option<usize>, Failure> {
    let Some(parameter) = find(parameters, key) else { return Ok(None) };
    let number = match parameter {
        Some(ParameterValue::Int(number)) => usize::try_from(*number).ok(),
        Some(ParameterValue::Uint(number)) => usize::try_from(*number).ok(),
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
pub(super) fn shown(name: &str) -> String {
    name.chars().take(128).collect()
}

#[cfg(test)]
mod tests;
