//! Request bodies: tensors of seeded random values in each encoding, built once before the load.

use std::collections::BTreeMap;
use std::str::FromStr;

use anyhow::{Context, Result, bail, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use clap::ValueEnum;
use prost::Message;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::proto::ModelInferRequest;
use crate::proto::model_infer_request::InferInputTensor;
use crate::schedule::Random;

/// Integers are below this, so that they can be indexes into small tables.
const INTEGER_BELOW: u64 = 8;

/// How tensors are written into an HTTP body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Encoding {
    Json,
    /// The binary tensor data extension.
    Binary,
}

/// An input as a model's metadata tells it; free dimensions are -1.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
pub struct Spec {
    pub name: String,
    pub datatype: String,
    pub shape: Vec<i64>,
}

impl FromStr for Spec {
    type Err = anyhow::Error;

    /// `NAME:DATATYPE:D1,D2,…`
    fn from_str(text: &str) -> Result<Self> {
        let wanted = || format!("expected NAME:DATATYPE:D1,D2,…, got '{text}'");
        let mut parts = text.rsplitn(3, ':');
        let (shape, datatype, name) = (parts.next(), parts.next(), parts.next());
        let shape = shape.with_context(wanted)?;
        let shape =
            shape.split(',').map(str::parse).collect::<Result<_, _>>().with_context(wanted)?;
        Ok(Self {
            name: name.with_context(wanted)?.to_owned(),
            datatype: datatype.with_context(wanted)?.to_owned(),
            shape,
        })
    }
}

/// Sizes for the free dimensions of a model.
#[derive(Clone, Debug)]
pub struct Dims {
    /// For the first dimension where it is free.
    pub batch: i64,
    /// For others: by `input.axis`, else by `input`.
    pub named: BTreeMap<String, i64>,
}

impl Default for Dims {
    fn default() -> Self {
        Self { batch: 1, named: BTreeMap::new() }
    }
}

impl Dims {
    fn of(&self, spec: &Spec) -> Result<Vec<i64>> {
        let size = |(axis, dim): (usize, &i64)| {
            if *dim >= 0 {
                return Ok(*dim);
            }
            let key = format!("{}.{axis}", spec.name);
            let named = self.named.get(&key).or_else(|| self.named.get(&spec.name));
            match (axis, self.named.get(&key), named) {
                (0, None, _) => Ok(self.batch),
                (_, _, Some(size)) => Ok(*size),
                _ => {
                    bail!("dimension {axis} of input '{}' is free: say --dim {key}=SIZE", spec.name)
                }
            }
        };
        spec.shape.iter().enumerate().map(size).collect()
    }
}

/// Reads the size of a free dimension.
///
/// # Errors
/// When it is not `INPUT.AXIS=SIZE`.
pub fn dim(text: &str) -> Result<(String, i64)> {
    let wanted = || format!("expected INPUT.AXIS=SIZE, got '{text}'");
    let (input, size) = text.rsplit_once('=').with_context(wanted)?;
    Ok((input.to_owned(), size.parse().with_context(wanted)?))
}

/// One input with its values.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub datatype: String,
    pub shape: Vec<i64>,
    /// Little-endian; `BYTES` elements with a 4-byte length each.
    pub raw: Vec<u8>,
    values: Vec<Value>,
}

/// Random values for every input; the same for the same seed.
///
/// # Errors
/// When a free dimension has no size or a datatype has no random values.
pub fn random(specs: &[Spec], dims: &Dims, seed: u64) -> Result<Vec<Tensor>> {
    let mut random = Random::new(seed);
    specs.iter().map(|spec| tensor(spec, dims.of(spec)?, &mut random)).collect()
}

fn tensor(spec: &Spec, shape: Vec<i64>, random: &mut Random) -> Result<Tensor> {
    let count = usize::try_from(shape.iter().product::<i64>())?;
    let mut raw = Vec::new();
    let mut values = Vec::with_capacity(count);
    for _ in 0..count {
        values.push(element(&spec.datatype, random, &mut raw).with_context(|| {
            format!(
                "input '{}' has datatype '{}', which has no random values",
                spec.name, spec.datatype
            )
        })?);
    }
    Ok(Tensor { name: spec.name.clone(), datatype: spec.datatype.clone(), shape, raw, values })
}

/// Appends one value and gives it for JSON; floats are in `0.5..1.0`.
fn element(datatype: &str, random: &mut Random, raw: &mut Vec<u8>) -> Option<Value> {
    // A thousandth is short in JSON, as measured features are.
    let thousandths = 500 + random.below(500);
    let integer = random.below(INTEGER_BELOW);
    let byte = u8::try_from(integer).ok()?;
    match datatype {
        "FP64" => {
            let value = thousandths as f64 / 1000.0;
            raw.extend(value.to_le_bytes());
            return Some(json!(value));
        }
        "FP32" => {
            let value = f32::from(u16::try_from(thousandths).ok()?) / 1000.0;
            raw.extend(value.to_le_bytes());
            return Some(json!(thousandths as f64 / 1000.0));
        }
        // 0.5, the one value whose bits need no arithmetic.
        "FP16" => raw.extend(0x3800_u16.to_le_bytes()),
        "BF16" => raw.extend(0x3f00_u16.to_le_bytes()),
        "INT64" | "UINT64" => raw.extend(integer.to_le_bytes()),
        "INT32" | "UINT32" => raw.extend(u32::from(byte).to_le_bytes()),
        "INT16" | "UINT16" => raw.extend(u16::from(byte).to_le_bytes()),
        "INT8" | "UINT8" => raw.push(byte),
        "BOOL" => {
            raw.push(byte % 2);
            return Some(json!(byte % 2 == 1));
        }
        "BYTES" => {
            let word = format!("word-{thousandths}");
            raw.extend(u32::try_from(word.len()).ok()?.to_le_bytes());
            raw.extend(word.as_bytes());
            return Some(json!(word));
        }
        _ => return None,
    }
    Some(if datatype.contains('F') { json!(0.5) } else { json!(integer) })
}

/// A body for `POST /v2/models/{model}/infer`, and the length of its JSON when tensors follow.
///
/// # Errors
/// Never for tensors made by [`random`].
pub fn http(tensors: &[Tensor], encoding: Encoding) -> Result<(Bytes, Option<usize>)> {
    let inputs: Vec<Value> = tensors.iter().map(|tensor| input(tensor, encoding)).collect();
    if encoding == Encoding::Json {
        return Ok((serde_json::to_vec(&json!({ "inputs": inputs }))?.into(), None));
    }
    let head = json!({ "inputs": inputs, "parameters": { "binary_data_output": true } });
    let mut body = serde_json::to_vec(&head)?;
    let json_len = body.len();
    tensors.iter().for_each(|tensor| body.extend(&tensor.raw));
    Ok((body.into(), Some(json_len)))
}

fn input(tensor: &Tensor, encoding: Encoding) -> Value {
    let mut input =
        json!({ "name": tensor.name, "datatype": tensor.datatype, "shape": tensor.shape });
    match encoding {
        Encoding::Json => input["data"] = json!(tensor.values),
        Encoding::Binary => input["parameters"] = json!({ "binary_data_size": tensor.raw.len() }),
    }
    input
}

/// The one message of a `ModelInfer` call with its gRPC prefix.
///
/// # Errors
/// When it is longer than gRPC can say.
pub fn grpc(model: &str, tensors: &[Tensor]) -> Result<Bytes> {
    let input = |tensor: &Tensor| InferInputTensor {
        name: tensor.name.clone(),
        datatype: tensor.datatype.clone(),
        shape: tensor.shape.clone(),
        ..InferInputTensor::default()
    };
    let message = ModelInferRequest {
        model_name: model.to_owned(),
        inputs: tensors.iter().map(input).collect(),
        raw_input_contents: tensors.iter().map(|tensor| tensor.raw.clone().into()).collect(),
        ..ModelInferRequest::default()
    };
    framed(&message)
}

fn framed(message: &impl Message) -> Result<Bytes> {
    let len = message.encoded_len();
    let mut frame = BytesMut::with_capacity(5 + len);
    frame.put_u8(0);
    frame.put_u32(u32::try_from(len).context("the message is longer than gRPC can say")?);
    message.encode(&mut frame)?;
    ensure!(frame.len() == 5 + len, "the message has another length than it said");
    Ok(frame.freeze())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs(texts: &[&str]) -> Vec<Spec> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn free_dimensions_take_the_batch_and_the_named_sizes() {
        let specs = specs(&["ids:INT64:-1,-1", "x:FP32:-1,3"]);
        let named = BTreeMap::from([("ids.1".to_owned(), 5)]);
        let got = random(&specs, &Dims { batch: 2, named }, 1).unwrap();
        assert_eq!((&got[0].shape[..], got[0].raw.len()), (&[2, 5][..], 80));
        assert_eq!((&got[1].shape[..], got[1].raw.len()), (&[2, 3][..], 24));
        let error = random(&specs, &Dims::default(), 1).unwrap_err().to_string();
        assert!(error.contains("--dim ids.1=SIZE"), "{error}");
    }

    #[test]
    fn every_datatype_has_its_width_and_repeats_with_the_seed() {
        let widths =
            [("BOOL", 1), ("UINT8", 1), ("INT16", 2), ("FP16", 2), ("BF16", 2), ("UINT32", 4)]
                .into_iter()
                .chain([("INT64", 8), ("FP32", 4), ("FP64", 8), ("BYTES", 12)]);
        for (datatype, width) in widths {
            let specs = specs(&[&format!("x:{datatype}:7")]);
            let got = random(&specs, &Dims::default(), 9).unwrap();
            assert_eq!(got[0].raw.len(), 7 * width, "{datatype}");
            assert_eq!(got[0].values.len(), 7, "{datatype}");
            assert_eq!(got[0].raw, random(&specs, &Dims::default(), 9).unwrap()[0].raw);
        }
        let error = random(&specs(&["x:COMPLEX:1"]), &Dims::default(), 1).unwrap_err();
        assert!(error.to_string().contains("COMPLEX"), "{error}");
    }

    #[test]
    fn json_and_raw_hold_the_same_values() {
        let tensors = random(&specs(&["x:FP32:2,2"]), &Dims::default(), 1).unwrap();
        let (body, none) = http(&tensors, Encoding::Json).unwrap();
        assert_eq!(none, None);
        let body: Value = serde_json::from_slice(&body).unwrap();
        for (at, value) in body["inputs"][0]["data"].as_array().unwrap().iter().enumerate() {
            let raw: [u8; 4] = tensors[0].raw[4 * at..4 * at + 4].try_into().unwrap();
            let difference = f64::from(f32::from_le_bytes(raw)) - value.as_f64().unwrap();
            assert!(difference.abs() < 1e-6, "{value}");
        }
    }

    #[test]
    fn a_binary_body_is_its_json_and_then_the_tensors() {
        let tensors = random(&specs(&["a:FP32:3", "b:INT8:2"]), &Dims::default(), 1).unwrap();
        let (body, json_len) = http(&tensors, Encoding::Binary).unwrap();
        let (head, raw) = body.split_at(json_len.unwrap());
        let head: Value = serde_json::from_slice(head).unwrap();
        assert_eq!(head["inputs"][0]["parameters"]["binary_data_size"], 12);
        assert_eq!(raw, [&tensors[0].raw[..], &tensors[1].raw].concat());
    }

    #[test]
    fn a_grpc_frame_holds_one_message() {
        let tensors = random(&specs(&["a:FP32:1,3"]), &Dims::default(), 1).unwrap();
        let frame = grpc("mlp", &tensors).unwrap();
        assert_eq!(frame[0], 0);
        assert_eq!(u32::from_be_bytes(frame[1..5].try_into().unwrap()) as usize, frame.len() - 5);
        let message = ModelInferRequest::decode(&frame[5..]).unwrap();
        assert_eq!(message.model_name, "mlp");
        assert_eq!(message.raw_input_contents, [tensors[0].raw.clone()]);
    }

    #[test]
    fn a_tensor_is_named_with_any_colons() {
        let spec: Spec = "input:0:FP32:1,4".parse().unwrap();
        assert_eq!((spec.name.as_str(), &spec.shape[..]), ("input:0", &[1, 4][..]));
        assert!("x:FP32".parse::<Spec>().unwrap_err().to_string().contains("NAME:DATATYPE"));
    }
}
