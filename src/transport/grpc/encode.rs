//! From our answers and failures to the protocol's messages and status.

use std::collections::HashMap;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue};
use tonic::Status;
use tonic::metadata::MetadataMap;

use super::decode::Slice;
use crate::domain::{Answer, AnswerHead, Failure};
use crate::proto::inference::infer_parameter::ParameterChoice;
use crate::proto::inference::model_infer_response::InferOutputTensor;
use crate::proto::inference::{InferParameter, ModelInferResponse};
use crate::transport::shm::SharedMemory;
use crate::transport::{meta, status};

const RETRY_AFTER: HeaderName = HeaderName::from_static("retry-after");
/// What gRPC clients with a retry policy obey.
const RETRY_PUSHBACK: HeaderName = HeaderName::from_static("grpc-retry-pushback-ms");

/// The status that a failure is, with its metadata.
pub(super) fn status(failure: &Failure, head: Option<&AnswerHead>) -> Status {
    let (_, code) = status::status(failure.kind);
    let mut headers = HeaderMap::new();
    if let Some(head) = head {
        meta::answer_headers(head, &mut headers);
    }
    if let Some(wait) = failure.retry_after {
        let seconds = wait.as_millis().div_ceil(1000).max(1);
        for (name, number) in [(RETRY_AFTER, seconds), (RETRY_PUSHBACK, wait.as_millis())] {
            if let Ok(value) = HeaderValue::from_str(&number.to_string()) {
                headers.insert(name, value);
            }
        }
    }
    Status::with_metadata(code, failure.message.clone(), MetadataMap::from_headers(headers))
}

/// The answer's message. Outputs in `placed` are written to shared memory, and leave an empty
/// entry so that the others keep their place.
///
/// # Errors
/// `InvalidInput` when an output does not fit where it should go.
pub(super) fn answer(
    answer: Answer,
    placed: &[(String, Slice)],
    shm: &SharedMemory,
) -> Result<ModelInferResponse, Failure> {
    let Answer { model, version, id, outputs } = answer;
    let mut message = ModelInferResponse {
        model_name: model.to_string(),
        model_version: version.map(|version| version.to_string()).unwrap_or_default(),
        id,
        parameters: HashMap::new(),
        outputs: Vec::with_capacity(outputs.len()),
        raw_output_contents: Vec::with_capacity(outputs.len()),
    };
    for output in outputs {
        let tensor = &output.tensor;
        let mut parameters = HashMap::new();
        let raw = match placed.iter().find(|(name, _)| *name == output.name) {
            None => tensor.data().clone(),
            Some((name, slice)) => {
                place(name, slice, tensor.data(), shm)?;
                parameters = placement(slice, tensor.data().len());
                Bytes::new()
            }
        };
        message.raw_output_contents.push(raw);
        let dim = |size: &usize| i64::try_from(*size).unwrap_or(i64::MAX);
        message.outputs.push(InferOutputTensor {
            datatype: tensor.datatype().name().to_owned(),
            shape: tensor.shape().iter().map(dim).collect(),
            name: output.name,
            parameters,
            contents: None,
        });
    }
    Ok(message)
}

pub(super) fn bool_parameter(value: bool) -> InferParameter {
    InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(value)) }
}

fn place(name: &str, slice: &Slice, data: &Bytes, shm: &SharedMemory) -> Result<(), Failure> {
    if data.len() > slice.byte_size {
        return Err(Failure::invalid(format!(
            "output '{name}' has {} bytes, its shared memory takes {}",
            data.len(),
            slice.byte_size
        )));
    }
    shm.write(&slice.region, slice.offset, data)
}

fn placement(slice: &Slice, len: usize) -> HashMap<String, InferParameter> {
    let int = |number: usize| InferParameter {
        parameter_choice: Some(ParameterChoice::Int64Param(
            i64::try_from(number).unwrap_or(i64::MAX),
        )),
    };
    let region = ParameterChoice::StringParam(slice.region.clone());
    HashMap::from([
        ("shared_memory_region".to_owned(), InferParameter { parameter_choice: Some(region) }),
        ("shared_memory_byte_size".to_owned(), int(len)),
        ("shared_memory_offset".to_owned(), int(slice.offset)),
    ])
}
