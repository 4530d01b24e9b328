//! An inference request from its body: JSON, and raw tensors behind it.
//!
//! ```text
//! ├── JSON ──┤ first raw tensor │ second │ …   inference-header-content-length = length of the JSON
//! ├── one raw tensor ───────────────────────   inference-header-content-length = 0
//! ├── JSON ─────────────────────────────────   no such header
//! ```
//!
//! Invariants:
//! - Raw tensors are slices of the body, never copies.
//! - Each input has exactly one source: `data`, `binary_data_size` or `shared_memory_region`.
//! - Every byte of the body belongs to something.

use bytes::Bytes;

use super::json::{self, InputJson, OutputJson, ParametersJson};
use crate::domain::{
    DataType, Dim, Failure, Inputs, NamedTensor, ParameterValue, Parameters, RequestedOutput,
    Shape, Signature, Tensor,
};

/// A part of a registered shared memory region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SharedSlice {
    pub region: String,
    pub offset: u64,
    pub byte_size: u64,
}

/// How an output goes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    Json,
    Binary,
    Shared(SharedSlice),
}

/// A request, its inputs typed where the caller typed them.
pub struct Decoded {
    pub id: Option<String>,
    pub inputs: Inputs,
    /// As asked for; empty asks for every output in [`Decoded::form`].
    pub outputs: Vec<RequestedOutput>,
    /// As many as `outputs`.
    pub forms: Vec<Form>,
    /// Form of outputs that nobody asked for by name.
    pub form: Form,
    pub parameters: Parameters,
}

/// Reads from shared memory on behalf of a request.
pub type ReadShared<'a> = &'a dyn Fn(&SharedSlice) -> Result<Bytes, Failure>;

/// Reads a whole body; `json_len` is the value of `inference-header-content-length`, if sent.
///
/// # Errors
/// `InvalidInput` for whatever is wrong, `Unsupported` for sequences, and what `shared` answers.
pub fn decode(
    body: &Bytes,
    json_len: Option<usize>,
    shared: ReadShared<'_>,
) -> Result<Decoded, Failure> {
    if json_len == Some(0) {
        return Ok(raw(body.clone()));
    }
    let len = json_len.unwrap_or(body.len());
    if len > body.len() {
        return Err(Failure::invalid(format!(
            "header 'inference-header-content-length' is {len}, the body has {} bytes",
            body.len()
        )));
    }
    let request = json::parse(&body[..len])?;
    let parameters = RequestParameters::read(request.parameters.0)?;
    let mut rest = body.slice(len..);
    let mut named = Vec::with_capacity(request.inputs.0.len());
    for json::Object(input) in &request.inputs.0 {
        let tensor = tensor(input, json_len.is_some(), &mut rest, shared)?;
        named.push(NamedTensor { name: input.name.clone(), tensor });
    }
    if !rest.is_empty() {
        return Err(Failure::invalid(format!(
            "unexpected additional input data: {} bytes follow the last input",
            rest.len()
        )));
    }
    let form = if parameters.binary_output { Form::Binary } else { Form::Json };
    let mut outputs = Vec::new();
    let mut forms = Vec::new();
    let asked = request.outputs.map(|json::AtMost(outputs)| outputs);
    for json::Object(output) in asked.unwrap_or_default() {
        let (output, form) = requested(output, &form)?;
        outputs.push(output);
        forms.push(form);
    }
    let inputs = Inputs::Named(named);
    Ok(Decoded { id: request.id, inputs, outputs, forms, form, parameters: parameters.rest })
}

/// A whole body that is the one input of a model.
fn raw(body: Bytes) -> Decoded {
    let inputs = Inputs::Deferred(Box::new(move |signature| {
        let typed = raw_tensor(signature, body).map(|tensor| vec![tensor]);
        Box::pin(std::future::ready(typed))
    }));
    let (outputs, forms) = (Vec::new(), Vec::new());
    Decoded { id: None, inputs, outputs, forms, form: Form::Binary, parameters: Vec::new() }
}

/// Types a raw body by the model's only input, as one row.
pub fn raw_tensor(signature: &Signature, body: Bytes) -> Result<NamedTensor, Failure> {
    let [input] = &signature.inputs[..] else {
        return Err(Failure::invalid(format!(
            "a raw request needs a model with 1 input, this one has {}",
            signature.inputs.len()
        )));
    };
    let name = input.name.clone();
    let wrong = |what: String| Failure::invalid(format!("input '{name}' as a raw request: {what}"));
    let Some(dims) = &input.shape else {
        return Err(wrong("the model does not declare its shape".to_owned()));
    };
    let mut shape = Shape::new();
    let mut open = None;
    for (at, dim) in dims.iter().enumerate() {
        shape.push(match dim {
            _ if at == 0 && signature.batched => 1,
            Dim::Fixed(size) => *size,
            Dim::Dynamic(_) => match open.replace(at) {
                None => 1,
                Some(_) => {
                    return Err(wrong("more than one dimension is variable".to_owned()));
                }
            },
        });
    }
    let tensor = if input.datatype == DataType::Bytes {
        if shape.iter().product::<usize>() != 1 {
            return Err(wrong(format!("BYTES of shape {:?}, expected one element", &shape[..])));
        }
        Tensor::from_elements(shape, &[&body])
    } else {
        if let Some(at) = open {
            let row = shape.iter().try_fold(input.datatype.size().unwrap_or(1), |product, &dim| {
                product.checked_mul(dim)
            });
            // What does not divide is told by the tensor's own check.
            shape[at] = row.and_then(|row| body.len().checked_div(row)).unwrap_or(0);
        }
        Tensor::new(input.datatype, shape, body)
    };
    let tensor = tensor.map_err(|error| wrong(error.to_string()))?;
    Ok(NamedTensor { name, tensor })
}

/// The tensor of one input, from the one source that it names.
fn tensor(
    input: &InputJson<'_>,
    has_header: bool,
    rest: &mut Bytes,
    shared: ReadShared<'_>,
) -> Result<Tensor, Failure> {
    let size = unsigned(&input.parameters, "binary_data_size", &input.name)?;
    let slice = shared_slice(&input.parameters, &input.name)?;
    let data = match (input.has_data(), size, slice) {
        (true, None, None) => return input.tensor(),
        (false, Some(_), None) if !has_header => {
            return Err(input
                .invalid(&"binary_data_size needs the header 'inference-header-content-length'"));
        }
        (false, Some(size), None) => {
            let left = rest.len();
            match usize::try_from(size).ok().filter(|size| *size <= left) {
                Some(size) => rest.split_to(size),
                None => {
                    return Err(input.invalid(&format_args!(
                        "binary_data_size is {size}, {left} bytes are left in the body"
                    )));
                }
            }
        }
        (false, None, Some(slice)) => shared(&slice)?,
        (false, None, None) => {
            return Err(input
                .invalid(&"has no data, expected data, binary_data_size or shared_memory_region"));
        }
        _ => {
            return Err(input
                .invalid(&"has more than one of data, binary_data_size and shared_memory_region"));
        }
    };
    Tensor::new(input.datatype()?, input.wire_shape()?, data).map_err(|error| input.invalid(&error))
}

fn requested(output: OutputJson, form: &Form) -> Result<(RequestedOutput, Form), Failure> {
    let OutputJson { name, parameters } = output;
    let binary = boolean(&parameters, "binary_data", &name)?;
    let classes = unsigned(&parameters, "classification", &name)?;
    let slice = shared_slice(&parameters, &name)?;
    let classification = match classes {
        None => None,
        Some(0) => {
            return Err(Failure::invalid(format!(
                "output '{name}': classification is 0, expected at least 1"
            )));
        }
        Some(count) => Some(usize::try_from(count).unwrap_or(usize::MAX)),
    };
    let form = match (slice, binary) {
        (Some(_), Some(true)) => {
            return Err(Failure::invalid(format!(
                "output '{name}': shared_memory_region excludes binary_data"
            )));
        }
        (Some(_), _) if classification.is_some() => {
            return Err(Failure::invalid(format!(
                "output '{name}': shared_memory_region excludes classification"
            )));
        }
        (Some(slice), _) => Form::Shared(slice),
        (None, Some(true)) => Form::Binary,
        (None, Some(false)) => Form::Json,
        (None, None) => form.clone(),
    };
    Ok((RequestedOutput { name, classification }, form))
}

/// Parameters of the whole request.
struct RequestParameters {
    binary_output: bool,
    /// What the gateway reads or passes on.
    rest: Parameters,
}

impl RequestParameters {
    fn read(parameters: Parameters) -> Result<Self, Failure> {
        let mut binary_output = false;
        let mut rest = Parameters::new();
        for (key, value) in parameters {
            match (key.as_str(), &value) {
                ("binary_data_output", ParameterValue::Bool(value)) => binary_output = *value,
                ("binary_data_output" | "sequence_start" | "sequence_end", value)
                    if !matches!(value, ParameterValue::Bool(_)) =>
                {
                    return Err(Failure::invalid(format!("parameter '{key}' must be a boolean")));
                }
                ("sequence_start" | "sequence_end", _) => {}
                ("sequence_id", value) => no_sequence(value)?,
                ("headers", _) => return Err(reserved(&key)),
                _ if key.starts_with("triton_") => return Err(reserved(&key)),
                _ => rest.push((key, value)),
            }
        }
        Ok(Self { binary_output, rest })
    }
}

fn reserved(key: &str) -> Failure {
    Failure::invalid(format!("parameter '{key}' is reserved"))
}

/// Id 0 or empty means that there is no sequence.
fn no_sequence(id: &ParameterValue) -> Result<(), Failure> {
    match id {
        ParameterValue::Uint(0) => Ok(()),
        ParameterValue::String(id) if id.is_empty() => Ok(()),
        ParameterValue::Uint(_) | ParameterValue::String(_) => {
            Err(Failure::unsupported("sequences are not supported, leave out 'sequence_id'"))
        }
        _ => Err(Failure::invalid(
            "parameter 'sequence_id' must be a non-negative integer or a string",
        )),
    }
}

fn shared_slice(parameters: &ParametersJson, tensor: &str) -> Result<Option<SharedSlice>, Failure> {
    let size = unsigned(parameters, "shared_memory_byte_size", tensor)?;
    let offset = unsigned(parameters, "shared_memory_offset", tensor)?;
    let region = match find(parameters, "shared_memory_region") {
        None if size.is_some() || offset.is_some() => {
            return Err(Failure::invalid(format!(
                "'{tensor}': shared_memory_byte_size and shared_memory_offset need shared_memory_region"
            )));
        }
        None => return Ok(None),
        Some(ParameterValue::String(region)) => region.clone(),
        Some(_) => return Err(wrong_kind(tensor, "shared_memory_region", "a string")),
    };
    let Some(byte_size) = size else {
        return Err(Failure::invalid(format!(
            "'{tensor}': shared_memory_region needs shared_memory_byte_size"
        )));
    };
    Ok(Some(SharedSlice { region, offset: offset.unwrap_or(0), byte_size }))
}

fn find<'a>(parameters: &'a ParametersJson, key: &str) -> Option<&'a ParameterValue> {
    parameters.0.iter().find(|(name, _)| name == key).map(|(_, value)| value)
}

fn unsigned(parameters: &ParametersJson, key: &str, tensor: &str) -> Result<Option<u64>, Failure> {
    match find(parameters, key) {
        None => Ok(None),
        Some(ParameterValue::Uint(value)) => Ok(Some(*value)),
        Some(_) => Err(wrong_kind(tensor, key, "a non-negative integer")),
    }
}

fn boolean(parameters: &ParametersJson, key: &str, tensor: &str) -> Result<Option<bool>, Failure> {
    match find(parameters, key) {
        None => Ok(None),
        Some(ParameterValue::Bool(value)) => Ok(Some(*value)),
        Some(_) => Err(wrong_kind(tensor, key, "a boolean")),
    }
}

fn wrong_kind(tensor: &str, key: &str, expected: &str) -> Failure {
    Failure::invalid(format!("'{tensor}': parameter '{key}' must be {expected}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::domain::{Dim, TensorSpec};

    fn decode_alone(body: &Bytes, json_len: Option<usize>) -> Result<Vec<NamedTensor>, Failure> {
        let decoded = decode(body, json_len, &|_| Err(Failure::unsupported("off")))?;
        match decoded.inputs {
            Inputs::Named(named) => Ok(named),
            Inputs::Deferred(_) => Ok(Vec::new()),
        }
    }

    fn request(tensors: &[Tensor]) -> (usize, Bytes) {
        let mut raw = Vec::new();
        let mut inputs = Vec::new();
        for (at, tensor) in tensors.iter().enumerate() {
            raw.extend_from_slice(tensor.data());
            inputs.push(json!({
                "name": at.to_string(),
                "datatype": tensor.datatype().name(),
                "shape": tensor.shape(),
                "parameters": {"binary_data_size": tensor.data().len()},
            }));
        }
        let json = json!({ "inputs": inputs }).to_string();
        (json.len(), [json.as_bytes(), &raw].concat().into())
    }

    #[test]
    fn raw_tensors_are_slices_of_the_body() {
        let shape = Shape::from_slice(&[2]);
        let tensor = Tensor::new(DataType::Fp16, shape, vec![1, 2, 3, 4].into()).unwrap();
        let (len, body) = request(&[tensor]);
        let named = decode_alone(&body, Some(len)).unwrap();
        assert_eq!(named[0].tensor.data().as_ptr(), body[len..].as_ptr());
    }

    #[test]
    fn a_raw_body_takes_the_shape_that_is_left() {
        let model = |datatype, dims: &[Option<usize>], batched| Signature {
            inputs: vec![TensorSpec {
                name: "x".to_owned(),
                datatype,
                shape: Some(
                    dims.iter().map(|dim| dim.map_or(Dim::Dynamic(None), Dim::Fixed)).collect(),
                ),
            }],
            outputs: Vec::new(),
            batched,
        };
        type Dims<'a> = &'a [Option<usize>];
        type Expected<'a> = Option<&'a [usize]>;
        let cases: &[(DataType, Dims<'_>, bool, usize, Expected<'_>)] = &[
            (DataType::Fp32, &[None, Some(2)], true, 8, Some(&[1, 2])),
            (DataType::Fp32, &[None, None, Some(2)], true, 16, Some(&[1, 2, 2])),
            (DataType::Fp32, &[None, Some(2)], false, 16, Some(&[2, 2])),
            (DataType::Fp32, &[None, None, None], true, 16, None),
            (DataType::Fp32, &[None, Some(2)], true, 9, None),
            (DataType::Fp32, &[None, Some(0)], false, 8, None),
            (DataType::Bytes, &[None, Some(1)], true, 5, Some(&[1, 1])),
            (DataType::Bytes, &[None, Some(2)], true, 5, None),
        ];
        for (datatype, dims, batched, len, expected) in cases {
            let made = raw_tensor(&model(*datatype, dims, *batched), vec![0; *len].into());
            let shape = made.ok().map(|named| named.tensor.shape().to_vec());
            assert_eq!(shape.as_deref(), *expected, "{datatype} {dims:?} {len}");
        }
    }

    proptest! {
        #[test]
        fn every_datatype_goes_there_and_back(
            parts in prop::collection::vec((0_usize..14, 0_usize..5, any::<u8>()), 0..5),
        ) {
            let tensors: Vec<Tensor> = parts
                .into_iter()
                .map(|(datatype, count, fill)| {
                    let datatype = DataType::ALL[datatype];
                    let shape = Shape::from_slice(&[count]);
                    match datatype.size() {
                        None => Tensor::from_elements(shape, &vec![[fill; 3]; count]),
                        Some(size) => {
                            let fill = if datatype == DataType::Bool { fill & 1 } else { fill };
                            Tensor::new(datatype, shape, vec![fill; size * count].into())
                        }
                    }
                    .unwrap()
                })
                .collect();
            let (len, body) = request(&tensors);
            let back: Vec<Tensor> =
                decode_alone(&body, Some(len)).unwrap().into_iter().map(|named| named.tensor).collect();
            prop_assert_eq!(back, tensors);
        }

        #[test]
        fn shapes_that_lie_are_refused(dims in prop::collection::vec(any::<i64>(), 0..20), count in 0_usize..6) {
            let said: Option<i64> = dims.iter().try_fold(1_i64, |product, dim| product.checked_mul(*dim));
            let honest = dims.iter().all(|dim| *dim >= 0) && said == i64::try_from(count).ok();
            let input = json!({"name": "x", "datatype": "INT8", "shape": dims, "data": vec![1; count]});
            let body = json!({"inputs": [input]}).to_string();
            let decoded = decode_alone(&body.into(), None);
            prop_assert!(honest || decoded.is_err());
        }

        #[test]
        fn hostile_bytes_never_panic(body in prop::collection::vec(any::<u8>(), 0..200), len in 0_usize..220) {
            let body = Bytes::from(body);
            let _refused = decode_alone(&body, Some(len)).is_err();
        }
    }
}
