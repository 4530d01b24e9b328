//! Shapes and data that lie, through every form that a tensor can arrive in: what is refused is
//! refused with the input's name, what is accepted is what was meant, and nothing panics.
//!
//! `SHAPE_CASES` sets the number of cases.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test stops at the first surprise")]

use std::cell::Cell;

use bytes::Bytes;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use prost::Message as _;
use serde_json::{Value, json};
use tidegate::domain::{
    DataType, Dim, Failure, Inputs, NamedTensor, RANK_MAX, Signature, TensorSpec,
};
use tidegate::proto::inference::model_infer_request::InferInputTensor;
use tidegate::proto::inference::{InferTensorContents, ModelInferRequest};
use tidegate::transport::grpc;
use tidegate::transport::http::binary;
use tidegate::transport::shm::SharedMemory;

/// Each goes through every form: about four times as many requests.
const CASES: u32 = 30_000;
/// Elements of an honest tensor, at most.
const ELEMENTS_MAX: i64 = 64;

/// What is wrong with the data, if anything.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Lie {
    None,
    /// So many elements (or, raw, bytes) more or fewer.
    More(usize),
    Fewer(usize),
    /// `BOOL` byte 2, or a `BYTES` length past the end.
    Content,
}

#[derive(Clone, Debug)]
struct Case {
    datatype: DataType,
    dims: Vec<i64>,
    lie: Lie,
    fill: u8,
}

fn cases() -> impl Strategy<Value = Case> {
    let dim = prop_oneof![
        12 => 1..5_i64,
        2 => Just(0_i64),
        1 => prop::sample::select(vec![
            -1,
            i64::MIN,
            i64::MAX,
            1 << 31,
            1 << 32,
            1 << 62,
            (1 << 32) + 1,
            i64::MAX / 8 + 1,
        ]),
        1 => any::<i64>(),
    ];
    let lie = prop_oneof![
        4 => Just(Lie::None),
        1 => (1..9_usize).prop_map(Lie::More),
        1 => (1..9_usize).prop_map(Lie::Fewer),
        1 => Just(Lie::Content),
    ];
    let dims = prop_oneof![
        15 => prop::collection::vec(dim.clone(), 0..5),
        1 => prop::collection::vec(dim, 14..20),
        1 => Just(vec![1; 17]),
        1 => Just(vec![1; 16]),
    ];
    let datatype = prop::sample::select(DataType::ALL.to_vec());
    (datatype, dims, lie, any::<u8>()).prop_map(|(datatype, dims, lie, fill)| Case {
        datatype,
        dims,
        lie,
        fill,
    })
}

impl Case {
    /// Elements that the shape says, if it can be believed.
    fn said(&self) -> Option<i64> {
        let fine = self.dims.len() <= RANK_MAX && self.dims.iter().all(|dim| *dim >= 0);
        let nonzero = self.dims.iter().filter(|dim| **dim != 0);
        let product = nonzero.map(|dim| i128::from(*dim)).try_fold(1_i128, i128::checked_mul)?;
        let size = self.datatype.size().unwrap_or(1) as i128;
        let empty = self.dims.contains(&0);
        let bytes = product.checked_mul(if empty { 1 } else { size })?;
        let addressable = bytes <= i128::from(u64::MAX);
        let elements = if empty { 0 } else { i64::try_from(product).ok()? };
        (fine && addressable).then_some(elements)
    }

    /// Elements that are sent.
    fn sent(&self) -> usize {
        let honest = self.said().filter(|elements| *elements <= ELEMENTS_MAX).unwrap_or(3);
        let honest = usize::try_from(honest).unwrap();
        match self.lie {
            Lie::More(more) => honest + more,
            Lie::Fewer(fewer) => honest.saturating_sub(fewer),
            Lie::None | Lie::Content => honest,
        }
    }

    fn element(&self, index: usize) -> Vec<u8> {
        let fill = self.fill.wrapping_add(u8::try_from(index % 251).unwrap());
        match self.datatype {
            DataType::Bool => vec![fill & 1],
            DataType::Bytes => vec![b'a' + fill % 26; usize::from(fill % 4)],
            // Small numbers of either sign are finite in every format.
            other => {
                let mut bytes = vec![0; other.size().unwrap()];
                bytes[0] = fill & 0x7f;
                bytes
            }
        }
    }

    fn raw(&self) -> Vec<u8> {
        let mut data = Vec::new();
        for index in 0..self.sent() {
            let element = self.element(index);
            if self.datatype == DataType::Bytes {
                data.extend(u32::try_from(element.len()).unwrap().to_le_bytes());
            }
            data.extend(element);
        }
        if self.lie == Lie::Content && !data.is_empty() {
            match self.datatype {
                DataType::Bool => data[0] = 2,
                DataType::Bytes => data[3] = 0x7f,
                _ => {}
            }
        }
        data
    }

    /// Whether the data that is sent is what the shape says.
    fn is_honest(&self, raw: bool) -> bool {
        let corrupt = raw
            && self.lie == Lie::Content
            && self.sent() > 0
            && matches!(self.datatype, DataType::Bool | DataType::Bytes);
        self.said() == i64::try_from(self.sent()).ok() && !corrupt
    }

    fn binary(&self) -> (usize, Bytes) {
        let raw = self.raw();
        let json = json!({"inputs": [{
            "name": "x",
            "datatype": self.datatype.name(),
            "shape": self.dims,
            "parameters": {"binary_data_size": raw.len()},
        }]});
        let json = json.to_string();
        // Odd lengths of JSON leave the tensor unaligned.
        (json.len(), [json.as_bytes(), &raw].concat().into())
    }

    fn json(&self) -> Option<Bytes> {
        let elements: Option<Vec<Value>> =
            (0..self.sent()).map(|index| self.json_element(&self.element(index))).collect();
        let json = json!({"inputs": [{
            "name": "x",
            "datatype": self.datatype.name(),
            "shape": self.dims,
            "data": elements?,
        }]});
        Some(json.to_string().into())
    }

    fn json_element(&self, element: &[u8]) -> Option<Value> {
        let low = u64::from(element.first().copied().unwrap_or(0));
        Some(match self.datatype {
            DataType::Bool => json!(low == 1),
            DataType::Bytes => json!(std::str::from_utf8(element).unwrap()),
            DataType::Fp16 | DataType::Bf16 => return None,
            DataType::Fp32 => json!(f32::from_le_bytes(element.try_into().unwrap())),
            DataType::Fp64 => json!(f64::from_le_bytes(element.try_into().unwrap())),
            _ => json!(low),
        })
    }

    fn message(&self, raw: bool) -> Option<Bytes> {
        let mut input = InferInputTensor {
            name: "x".to_owned(),
            datatype: self.datatype.name().to_owned(),
            shape: self.dims.clone(),
            ..InferInputTensor::default()
        };
        let mut message = ModelInferRequest { model_name: "m".to_owned(), ..Default::default() };
        if raw {
            message.raw_input_contents = vec![self.raw().into()];
        } else {
            input.contents = Some(self.contents()?);
        }
        message.inputs = vec![input];
        Some(message.encode_to_vec().into())
    }

    fn contents(&self) -> Option<InferTensorContents> {
        let mut contents = InferTensorContents::default();
        for index in 0..self.sent() {
            let element = self.element(index);
            let low = element.first().copied().unwrap_or(0);
            match self.datatype {
                DataType::Bool => contents.bool_contents.push(low == 1),
                DataType::Int8 | DataType::Int16 | DataType::Int32 => {
                    contents.int_contents.push(low.into());
                }
                DataType::Int64 => contents.int64_contents.push(low.into()),
                DataType::Uint8 | DataType::Uint16 | DataType::Uint32 => {
                    contents.uint_contents.push(low.into());
                }
                DataType::Uint64 => contents.uint64_contents.push(low.into()),
                DataType::Fp32 => {
                    let number = f32::from_le_bytes(element[..].try_into().unwrap());
                    contents.fp32_contents.push(number);
                }
                DataType::Fp64 => {
                    let number = f64::from_le_bytes(element[..].try_into().unwrap());
                    contents.fp64_contents.push(number);
                }
                DataType::Bytes => contents.bytes_contents.push(element.into()),
                DataType::Fp16 | DataType::Bf16 => return None,
            }
        }
        Some(contents)
    }
}

fn named(inputs: Result<Inputs, Failure>) -> Result<Vec<NamedTensor>, Failure> {
    match inputs? {
        Inputs::Named(named) => Ok(named),
        Inputs::Deferred(_) => panic!("the caller typed the input"),
    }
}

fn http(body: &Bytes, json_len: Option<usize>) -> Result<Vec<NamedTensor>, Failure> {
    let off = |_: &_| Err(Failure::unsupported("off"));
    named(binary::decode(body, json_len, &off).map(|decoded| decoded.inputs))
}

fn over_grpc(message: Bytes) -> Result<Vec<NamedTensor>, Failure> {
    let shm = SharedMemory::new(false);
    named(grpc::decode(message, &shm, 0, &|_| Ok(())).map(|decoded| decoded.request.inputs))
}

/// Accepted means: as sent, and bound by a model that takes it. Refused: by name.
fn check(case: &Case, form: &str, honest: bool, got: Result<Vec<NamedTensor>, Failure>) {
    match got {
        Ok(named) => {
            assert!(honest, "{form} accepted {case:?}");
            let tensor = &named[0].tensor;
            let expected = Case { lie: Lie::None, ..case.clone() }.raw();
            assert_eq!(tensor.data()[..], expected[..], "{form} {case:?}");
            assert!(tensor.shape().iter().map(|dim| *dim as i64).eq(case.dims.iter().copied()));
            bind(case, named);
        }
        Err(failure) => {
            assert!(!honest, "{form} refused {case:?}: {failure}");
            assert!(failure.message.contains("'x'"), "{form} {case:?}: {failure}");
        }
    }
}

/// Models of other shapes and datatypes say what they expected and what came.
fn bind(case: &Case, named: Vec<NamedTensor>) {
    let dims = case.dims.iter().map(|dim| Dim::Fixed(usize::try_from(*dim).unwrap()));
    let model = |datatype, dims: Vec<Dim>| Signature {
        inputs: vec![TensorSpec { name: "x".to_owned(), datatype, shape: Some(dims) }],
        outputs: Vec::new(),
        batched: false,
    };
    let dims: Vec<Dim> = dims.collect();
    assert!(model(case.datatype, dims.clone()).bind(named.clone()).is_ok(), "{case:?}");
    let other = if case.datatype == DataType::Fp32 { DataType::Int8 } else { DataType::Fp32 };
    let failure = model(other, dims.clone()).bind(named.clone()).unwrap_err().message;
    let (got, expected) = (case.datatype, other);
    assert_eq!(failure, format!("input 'x' has datatype {got}, expected {expected}"));
    let longer: Vec<Dim> = dims.into_iter().chain([Dim::Fixed(7)]).collect();
    let failure = model(case.datatype, longer).bind(named).unwrap_err().message;
    assert!(failure.starts_with("input 'x' has shape ["), "{failure}");
    assert!(failure.contains("expected ["), "{failure}");
}

#[test]
fn shapes_that_lie_are_refused_by_name_in_every_form() {
    let cases_wanted = std::env::var("SHAPE_CASES").ok().and_then(|text| text.parse().ok());
    let count = cases_wanted.unwrap_or(CASES);
    let config =
        ProptestConfig { cases: count, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = TestRunner::new(config);
    let (honest_seen, forms_seen) = (Cell::new(0_u64), Cell::new(0_u64));
    let done = runner.run(&cases(), |case| {
        let raw = case.is_honest(true);
        let (json_len, body) = case.binary();
        check(&case, "HTTP binary", raw, http(&body, Some(json_len)));
        check(&case, "gRPC raw", raw, over_grpc(case.message(true).unwrap()));
        let typed = case.is_honest(false);
        let typeable = !matches!(case.datatype, DataType::Fp16 | DataType::Bf16);
        if let Some(body) = case.json().filter(|_| typeable) {
            check(&case, "HTTP JSON", typed, http(&body, None));
            forms_seen.set(forms_seen.get() + 1);
        }
        if let Some(message) = case.message(false).filter(|_| typeable) {
            check(&case, "gRPC typed", typed, over_grpc(message));
            forms_seen.set(forms_seen.get() + 1);
        }
        honest_seen.set(honest_seen.get() + u64::from(raw));
        forms_seen.set(forms_seen.get() + 2);
        Ok(())
    });
    done.unwrap();
    let (honest, forms) = (honest_seen.get(), forms_seen.get());
    eprintln!("{count} cases, {forms} requests, {honest} cases honest, 0 panics");
    assert!(honest > u64::from(count) / 10, "the honest ones are too few to mean anything");
}

/// A request with `inputs` of the JSON form, or what refuses it.
fn refused(inputs: &str) -> String {
    http(&Bytes::from(format!("{{\"inputs\":{inputs}}}")), None).unwrap_err().message
}

#[test]
fn very_long_shapes_and_many_inputs_are_refused() {
    let dims = vec!["1"; 100_000].join(",");
    let input = format!(r#"[{{"name":"x","datatype":"FP32","shape":[{dims}],"data":[1]}}]"#);
    assert!(refused(&input).contains("input 'x': rank 100000 is over the limit of 16"));

    let message = |shape: Vec<i64>, count: usize| {
        let input = InferInputTensor {
            name: "x".to_owned(),
            datatype: "FP32".to_owned(),
            shape,
            ..InferInputTensor::default()
        };
        let message = ModelInferRequest {
            model_name: "m".to_owned(),
            inputs: vec![input; count],
            ..ModelInferRequest::default()
        };
        over_grpc(message.encode_to_vec().into()).unwrap_err().message
    };
    assert!(message(vec![1; 100_000], 1).contains("input 'x': rank 100000 is over the limit"));
    assert!(message(vec![0], 1025).contains("more than 1024 inputs"));

    let many = vec![r#"{"name":"x","datatype":"FP32","shape":[0],"data":[]}"#; 1025].join(",");
    assert!(
        refused(&format!("[{many}]")).contains("a list of at most 1024 inputs"),
        "inputs are counted"
    );
}

#[test]
fn inputs_are_given_once() {
    let model = Signature {
        inputs: ["a", "b"]
            .map(|name| TensorSpec {
                name: name.to_owned(),
                datatype: DataType::Int8,
                shape: Some(vec![Dim::Dynamic(None)]),
            })
            .to_vec(),
        outputs: Vec::new(),
        batched: false,
    };
    let input =
        |name: &str| format!(r#"{{"name":"{name}","datatype":"INT8","shape":[1],"data":[1]}}"#);
    let bound = |names: [&str; 2]| {
        let inputs = names.map(input).join(",");
        let named = http(&Bytes::from(format!("{{\"inputs\":[{inputs}]}}")), None).unwrap();
        model.bind(named).map_err(|failure| failure.message)
    };
    assert!(bound(["b", "a"]).is_ok());
    assert_eq!(bound(["a", "a"]).unwrap_err(), "input 'a' is given twice");
    assert!(bound(["a", "c"]).unwrap_err().contains("unexpected input 'c'"));
}
