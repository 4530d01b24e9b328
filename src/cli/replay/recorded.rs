//! A record's inputs and outputs as values to send and to compare.
//!
//! Numbers are read from their own digits, and never by way of another type: what is sent again has
//! the bits that were recorded.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_json::{Value, json};

use crate::domain::DataType;

/// A record that has all of its inputs and outputs.
pub(super) struct Recorded {
    pub(super) id: String,
    pub(super) model: String,
    pub(super) inputs: Vec<Tensor>,
    pub(super) outputs: Vec<Tensor>,
}

/// A tensor's elements, little endian as they are sent.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) datatype: DataType,
    pub(super) shape: Vec<u64>,
    pub(super) data: Vec<u8>,
}

/// A line of an export, as far as it is needed here.
#[derive(Deserialize)]
struct Line<'a> {
    prediction_id: Option<String>,
    model: Option<String>,
    #[serde(borrow)]
    inputs: Option<Vec<TensorText<'a>>>,
    #[serde(borrow)]
    outputs: Option<Vec<TensorText<'a>>>,
}

/// A tensor of an export, or of an answer.
#[derive(Deserialize)]
pub(super) struct TensorText<'a> {
    name: String,
    datatype: String,
    shape: Vec<u64>,
    #[serde(borrow)]
    data: Option<Vec<&'a RawValue>>,
    data_base64: Option<String>,
    /// Some of it is not what was sent.
    #[serde(default)]
    masked: Vec<u64>,
}

impl Recorded {
    /// Of one line of an export; `None` when something of it was not kept.
    pub(super) fn of(line: &str) -> Option<Self> {
        let line: Line<'_> = serde_json::from_str(line).ok()?;
        let list = |list: Option<Vec<TensorText<'_>>>| -> Option<Vec<Tensor>> {
            list?.iter().map(Tensor::of).collect()
        };
        let (inputs, outputs) = (list(line.inputs)?, list(line.outputs)?);
        let whole = !inputs.is_empty() && !outputs.is_empty();
        whole.then_some(Self { id: line.prediction_id?, model: line.model?, inputs, outputs })
    }

    /// Body of the binary tensor extension that asks for outputs in the same form, and the length
    /// of its JSON.
    pub(super) fn body(&self) -> (Vec<u8>, usize) {
        let about = |tensor: &Tensor| {
            json!({
                "name": tensor.name, "datatype": tensor.datatype.name(), "shape": tensor.shape,
                "parameters": {"binary_data_size": tensor.data.len()},
            })
        };
        let inputs: Vec<Value> = self.inputs.iter().map(about).collect();
        let head = json!({"inputs": inputs, "parameters": {"binary_data_output": true}});
        let mut body = head.to_string().into_bytes();
        let json_len = body.len();
        self.inputs.iter().for_each(|tensor| body.extend_from_slice(&tensor.data));
        (body, json_len)
    }
}

impl Tensor {
    /// `None` when its data is not all there.
    pub(super) fn of(text: &TensorText<'_>) -> Option<Self> {
        let datatype: DataType = text.datatype.parse().ok()?;
        if !text.masked.is_empty() {
            return None;
        }
        let mut data = Vec::new();
        match (&text.data, &text.data_base64) {
            (Some(elements), _) => {
                elements.iter().try_for_each(|element| put(&mut data, datatype, element.get()))?;
            }
            (None, Some(text)) => data = STANDARD.decode(text).ok()?,
            (None, None) => return None,
        }
        Some(Self { name: text.name.clone(), datatype, shape: text.shape.clone(), data })
    }

    /// Its elements as numbers; `None` for texts.
    pub(super) fn numbers(&self) -> Option<Vec<f64>> {
        macro_rules! all {
            ($type:ty, $as:expr) => {{
                let (chunks, _) = self.data.as_chunks::<{ size_of::<$type>() }>();
                let to = $as;
                chunks.iter().map(|chunk| to(<$type>::from_le_bytes(*chunk))).collect()
            }};
        }
        Some(match self.datatype {
            DataType::Bool | DataType::Uint8 => all!(u8, f64::from),
            DataType::Uint16 => all!(u16, f64::from),
            DataType::Uint32 => all!(u32, f64::from),
            DataType::Uint64 => all!(u64, |value| value as f64),
            DataType::Int8 => all!(i8, f64::from),
            DataType::Int16 => all!(i16, f64::from),
            DataType::Int32 => all!(i32, f64::from),
            DataType::Int64 => all!(i64, |value| value as f64),
            DataType::Fp16 => all!(half::f16, half::f16::to_f64),
            DataType::Bf16 => all!(half::bf16, half::bf16::to_f64),
            DataType::Fp32 => all!(f32, f64::from),
            DataType::Fp64 => all!(f64, |value| value),
            DataType::Bytes => return None,
        })
    }
}

/// Appends one element, from the forms that an export has for it.
fn put(out: &mut Vec<u8>, datatype: DataType, element: &str) -> Option<()> {
    macro_rules! integer {
        ($type:ty) => {{
            let digits = element.trim_matches('"');
            out.extend_from_slice(&digits.parse::<$type>().ok()?.to_le_bytes());
        }};
    }
    // Halves have fewer digits than a single, which so gives each of them back.
    macro_rules! float {
        ($bits:ty, $read:ty, $make:expr) => {{
            let bytes = match element.trim_matches('"').strip_prefix("NaN:0x") {
                Some(bits) => <$bits>::from_str_radix(bits, 16).ok()?.to_le_bytes(),
                None => $make(of_words::<$read>(element)?).to_le_bytes(),
            };
            out.extend_from_slice(&bytes);
        }};
    }
    match datatype {
        DataType::Bool => out.push(u8::from(element.parse::<bool>().ok()?)),
        DataType::Uint8 => integer!(u8),
        DataType::Uint16 => integer!(u16),
        DataType::Uint32 => integer!(u32),
        DataType::Uint64 => integer!(u64),
        DataType::Int8 => integer!(i8),
        DataType::Int16 => integer!(i16),
        DataType::Int32 => integer!(i32),
        DataType::Int64 => integer!(i64),
        DataType::Fp16 => float!(u16, f32, half::f16::from_f32),
        DataType::Bf16 => float!(u16, f32, half::bf16::from_f32),
        DataType::Fp32 => float!(u32, f32, |value: f32| value),
        DataType::Fp64 => float!(u64, f64, |value: f64| value),
        DataType::Bytes => {
            let bytes = match serde_json::from_str::<Value>(element).ok()? {
                Value::String(text) => text.into_bytes(),
                marked => STANDARD.decode(marked["base64"].as_str()?).ok()?,
            };
            out.extend_from_slice(&u32::try_from(bytes.len()).ok()?.to_le_bytes());
            out.extend_from_slice(&bytes);
        }
    }
    Some(())
}

/// Rust reads the words of an export, and the shortest digits, as what they were.
fn of_words<T: std::str::FromStr>(element: &str) -> Option<T> {
    element.trim_matches('"').parse().ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::ledger::export::{Content, TensorView, tensors};

    fn there_and_back(datatype: DataType, data: &[u8]) -> Vec<u8> {
        let content = Content::Data(data);
        let view =
            TensorView { name: "x", datatype: datatype.name(), content, ..Default::default() };
        let mut out = Vec::new();
        tensors(&mut out, &[view], |_| None);
        let list: Vec<TensorText<'_>> = serde_json::from_slice(&out).unwrap();
        Tensor::of(&list[0]).unwrap().data
    }

    proptest! {
        #[test]
        fn what_is_exported_comes_back_bit_by_bit(
            datatype in prop::sample::select(DataType::ALL.to_vec()),
            data in prop::collection::vec(any::<u8>(), 0..64),
        ) {
            prop_assert_eq!(there_and_back(datatype, &data), data);
        }

        #[test]
        fn so_do_texts(texts in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 0..5)) {
            let mut data = Vec::new();
            for text in &texts {
                data.extend_from_slice(&u32::try_from(text.len()).unwrap().to_le_bytes());
                data.extend_from_slice(text);
            }
            prop_assert_eq!(there_and_back(DataType::Bytes, &data), data);
        }
    }

    #[test]
    fn what_was_not_kept_cannot_be_sent() {
        let whole = json!({"name": "x", "datatype": "FP32", "shape": [1], "data": [1.5]});
        let digest = json!({"name": "x", "datatype": "FP32", "shape": [1], "digest": "sha256:00"});
        let record = |inputs: &Value, outputs: &Value| {
            let (inputs, outputs) = ([inputs], [outputs]);
            json!({"prediction_id": "a", "model": "m", "inputs": inputs, "outputs": outputs})
                .to_string()
        };
        assert!(Recorded::of(&record(&whole, &whole)).is_some());
        assert!(Recorded::of(&record(&digest, &whole)).is_none());
        assert!(Recorded::of(&record(&whole, &digest)).is_none());
        assert!(Recorded::of(r#"{"inputs": null, "outputs": null}"#).is_none());
    }
}
