//! Requests with known answers that a version brings along, and their comparison.
//!
//! `samples.json` holds `{"samples": [{"request": …, "response": …, "tolerance": 1e-4}]}` with the
//! protocol's JSON bodies; `samples/*.json` hold the same, or one sample each.

use half::{bf16, f16};
use serde::Deserialize;
use serde_json::Value;

use crate::domain::{DataType, NamedTensor, Shape, Signature, Tensor};

/// Largest difference from an expected floating-point value, absolute and relative, when the
/// sample names none.
const TOLERANCE: f64 = 1e-4;

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum File {
    Many { samples: Vec<Sample> },
    One(Sample),
}

/// One request and what it must give.
#[derive(Debug, Deserialize)]
pub(super) struct Sample {
    request: Request,
    response: Response,
    tolerance: Option<f64>,
}

#[derive(Debug, Deserialize)]
struct Request {
    inputs: Vec<JsonTensor>,
}

#[derive(Debug, Deserialize)]
struct Response {
    outputs: Vec<JsonTensor>,
}

#[derive(Debug, Deserialize)]
struct JsonTensor {
    name: String,
    datatype: String,
    shape: Vec<i64>,
    data: Value,
}

/// Reads one samples file.
pub(super) fn parse(text: &str) -> Result<Vec<Sample>, String> {
    match serde_json::from_str(text) {
        Ok(File::Many { samples }) => Ok(samples),
        Ok(File::One(sample)) => Ok(vec![sample]),
        Err(error) => Err(format!("expected samples with a request and a response: {error}")),
    }
}

impl Sample {
    /// Inputs in the signature's order.
    pub(super) fn inputs(&self, signature: &Signature) -> Result<Vec<Tensor>, String> {
        let named: Result<Vec<NamedTensor>, String> =
            self.request.inputs.iter().map(JsonTensor::named).collect();
        signature.bind(named?).map_err(|failure| failure.message)
    }

    /// What differs between `outputs`, in the signature's order, and what is expected.
    pub(super) fn compare(&self, signature: &Signature, outputs: &[Tensor]) -> Result<(), String> {
        let tolerance = self.tolerance.unwrap_or(TOLERANCE);
        for expected in &self.response.outputs {
            let NamedTensor { name, tensor } = expected.named()?;
            let at = signature.output_at(&name);
            let got = at.and_then(|at| outputs.get(at));
            let got = got.ok_or_else(|| format!("the model has no output '{name}'"))?;
            if got.shape() != tensor.shape() || got.datatype() != tensor.datatype() {
                let (datatype, shape) = (tensor.datatype(), tensor.shape());
                let (got_type, got_shape) = (got.datatype(), got.shape());
                return Err(format!(
                    "output '{name}': expected {datatype} {shape:?}, got {got_type} {got_shape:?}"
                ));
            }
            same(&tensor, got, tolerance).map_err(|what| format!("output '{name}'{what}"))?;
        }
        Ok(())
    }
}

/// Whether two tensors of one datatype and shape hold the same, floating-point values within
/// `tolerance` of each other.
pub(super) fn same(expected: &Tensor, got: &Tensor, tolerance: f64) -> Result<(), String> {
    let (Some(expected_values), Some(values)) = (floats(expected), floats(got)) else {
        return match expected.data() == got.data() {
            true => Ok(()),
            false => Err(" differs from what is expected".to_owned()),
        };
    };
    for (at, (want, got)) in expected_values.zip(values).enumerate() {
        let equal = want == got || (want.is_nan() && got.is_nan());
        let bound = tolerance + tolerance * want.abs();
        // Written so that a NaN on one side only is a difference.
        let near = (want - got).abs() <= bound;
        if !equal && !near {
            return Err(format!("[{at}]: expected {want}, got {got}, tolerance {tolerance}"));
        }
    }
    Ok(())
}

fn floats(tensor: &Tensor) -> Option<Box<dyn Iterator<Item = f64> + '_>> {
    let data = tensor.data();
    Some(match tensor.datatype() {
        DataType::Fp16 => {
            Box::new(data.as_chunks().0.iter().map(|&b| f16::from_le_bytes(b).into()))
        }
        DataType::Bf16 => {
            Box::new(data.as_chunks().0.iter().map(|&b| bf16::from_le_bytes(b).into()))
        }
        DataType::Fp32 => {
            Box::new(data.as_chunks().0.iter().map(|&b| f32::from_le_bytes(b).into()))
        }
        DataType::Fp64 => Box::new(data.as_chunks().0.iter().map(|&b| f64::from_le_bytes(b))),
        _ => return None,
    })
}

impl JsonTensor {
    fn named(&self) -> Result<NamedTensor, String> {
        let name = &self.name;
        let wrong = |what: String| format!("tensor '{name}': {what}");
        let datatype: DataType =
            self.datatype.parse().map_err(|error| wrong(format!("{error}")))?;
        let shape =
            Tensor::shape_from_wire(&self.shape).map_err(|error| wrong(error.to_string()))?;
        let mut flat = Vec::new();
        flatten(&self.data, &mut flat);
        let tensor = tensor(datatype, shape, &flat).map_err(wrong)?;
        Ok(NamedTensor { name: name.clone(), tensor })
    }
}

fn flatten<'a>(value: &'a Value, flat: &mut Vec<&'a Value>) {
    match value {
        Value::Array(values) => values.iter().for_each(|value| flatten(value, flat)),
        scalar => flat.push(scalar),
    }
}

fn tensor(datatype: DataType, shape: Shape, values: &[&Value]) -> Result<Tensor, String> {
    if datatype == DataType::Bytes {
        let texts: Option<Vec<&str>> = values.iter().map(|value| value.as_str()).collect();
        let texts = texts.ok_or("BYTES data must be strings")?;
        return Tensor::from_elements(shape, &texts).map_err(|error| error.to_string());
    }
    let mut data = Vec::new();
    for value in values {
        let done = push(datatype, value, &mut data);
        done.ok_or_else(|| format!("{value} is no {datatype}"))?;
    }
    Tensor::new(datatype, shape, data.into()).map_err(|error| error.to_string())
}

/// Appends one element; `None` when it is not of the datatype.
#[expect(clippy::cast_possible_truncation, reason = "a sample's number is rounded to its type")]
fn push(datatype: DataType, value: &Value, data: &mut Vec<u8>) -> Option<()> {
    // JSON has no NaN; samples write it as a string, as Python's `str` does.
    let float = || match value.as_str() {
        Some(text) => text.parse::<f64>().ok(),
        None => value.as_f64(),
    };
    let signed = || value.as_i64();
    let unsigned = || value.as_u64();
    match datatype {
        DataType::Bool => data.push(match value {
            Value::Bool(bit) => u8::from(*bit),
            other => u8::try_from(other.as_u64().filter(|&bit| bit < 2)?).ok()?,
        }),
        DataType::Uint8 => data.push(unsigned()?.try_into().ok()?),
        DataType::Uint16 => data.extend(u16::try_from(unsigned()?).ok()?.to_le_bytes()),
        DataType::Uint32 => data.extend(u32::try_from(unsigned()?).ok()?.to_le_bytes()),
        DataType::Uint64 => data.extend(unsigned()?.to_le_bytes()),
        DataType::Int8 => data.extend(i8::try_from(signed()?).ok()?.to_le_bytes()),
        DataType::Int16 => data.extend(i16::try_from(signed()?).ok()?.to_le_bytes()),
        DataType::Int32 => data.extend(i32::try_from(signed()?).ok()?.to_le_bytes()),
        DataType::Int64 => data.extend(signed()?.to_le_bytes()),
        DataType::Fp16 => data.extend(f16::from_f64(float()?).to_le_bytes()),
        DataType::Bf16 => data.extend(bf16::from_f64(float()?).to_le_bytes()),
        DataType::Fp32 => data.extend((float()? as f32).to_le_bytes()),
        DataType::Fp64 => data.extend(float()?.to_le_bytes()),
        DataType::Bytes => return None,
    }
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Dim, TensorSpec};

    fn signature() -> Signature {
        let spec = |name: &str| TensorSpec {
            name: name.to_owned(),
            datatype: DataType::Fp32,
            shape: Some(vec![Dim::Dynamic(None), Dim::Fixed(2)]),
        };
        Signature { inputs: vec![spec("x")], outputs: vec![spec("y")], batched: true }
    }

    #[test]
    fn a_sample_is_compared_within_its_tolerance() {
        let text = r#"{"samples": [{
            "request": {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [[1, 2.5]]}]},
            "response": {"outputs": [{"name": "y", "datatype": "FP32", "shape": [1, 2], "data": [1, "nan"]}]},
            "tolerance": 0.01}]}"#;
        let samples = parse(text).unwrap();
        let inputs = samples[0].inputs(&signature()).unwrap();
        assert_eq!(inputs[0].data().len(), 8);
        let outputs = |values: [f32; 2]| {
            let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            [Tensor::new(DataType::Fp32, Shape::from_slice(&[1, 2]), data.into()).unwrap()]
        };
        assert_eq!(samples[0].compare(&signature(), &outputs([1.005, f32::NAN])), Ok(()));
        assert!(samples[0].compare(&signature(), &outputs([1.5, f32::NAN])).is_err());
        let error = samples[0].compare(&signature(), &outputs([1.0, 3.0])).unwrap_err();
        assert!(error.contains("output 'y'[1]: expected NaN, got 3"), "{error}");
    }

    #[test]
    fn wrong_samples_say_what_is_wrong() {
        assert!(parse("{}").is_err());
        let request = |tensor: &str| {
            let text = format!(
                r#"{{"request": {{"inputs": [{tensor}]}}, "response": {{"outputs": []}}}}"#
            );
            parse(&text).unwrap().remove(0).inputs(&signature()).unwrap_err()
        };
        let cases = [
            (r#"{"name": "z", "datatype": "FP32", "shape": [1, 2], "data": [1, 2]}"#, "unexpected"),
            (r#"{"name": "x", "datatype": "FP31", "shape": [1, 2], "data": [1, 2]}"#, "FP31"),
            (r#"{"name": "x", "datatype": "FP32", "shape": [1, -2], "data": [1, 2]}"#, "negative"),
            (r#"{"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [1]}"#, "8 bytes"),
            (r#"{"name": "x", "datatype": "INT8", "shape": [1], "data": [300]}"#, "300 is no INT8"),
        ];
        for (tensor, expected) in cases {
            let error = request(tensor);
            assert!(error.contains(expected), "{error}");
        }
    }
}
