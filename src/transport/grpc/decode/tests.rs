use proptest::prelude::*;
use prost::Message as _;

use std::collections::HashMap;

use super::*;
use crate::domain::ErrorKind;
use crate::proto::inference::infer_parameter::ParameterChoice;
use crate::proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use crate::proto::inference::{InferParameter, InferTensorContents, ModelInferRequest};

const LIMIT: usize = 1 << 20;

fn tensor(
    datatype: &str,
    shape: &[i64],
    contents: Option<InferTensorContents>,
) -> InferInputTensor {
    InferInputTensor {
        name: "x".to_owned(),
        datatype: datatype.to_owned(),
        shape: shape.to_vec(),
        parameters: HashMap::new(),
        contents,
    }
}

fn message(inputs: Vec<InferInputTensor>, raw: &[&'static [u8]]) -> ModelInferRequest {
    ModelInferRequest {
        model_name: "m".to_owned(),
        inputs,
        raw_input_contents: raw.iter().map(|raw| Bytes::from_static(raw)).collect(),
        ..ModelInferRequest::default()
    }
}

fn inputs_of(message: ModelInferRequest) -> Result<Vec<NamedTensor>, Failure> {
    let decoded = whole(&message)?;
    match decoded.request.inputs {
        Inputs::Named(named) => Ok(named),
        Inputs::Deferred(_) => Err(Failure::invalid("deferred")),
    }
}

fn whole(message: &ModelInferRequest) -> Result<Decoded, Failure> {
    of_bytes(message.encode_to_vec().into())
}

fn of_bytes(message: Bytes) -> Result<Decoded, Failure> {
    decode(message, &SharedMemory::new(false), LIMIT, &|_| Ok(()))
}

fn int(number: i64) -> InferParameter {
    InferParameter { parameter_choice: Some(ParameterChoice::Int64Param(number)) }
}

fn string(text: &str) -> InferParameter {
    InferParameter { parameter_choice: Some(ParameterChoice::StringParam(text.to_owned())) }
}

#[test]
fn typed_contents_become_little_endian_bytes() {
    let empty = InferTensorContents::default;
    let cases: Vec<(&str, InferTensorContents, &[u8])> = vec![
        ("BOOL", InferTensorContents { bool_contents: vec![true, false], ..empty() }, &[1, 0]),
        ("INT8", InferTensorContents { int_contents: vec![-1, 127], ..empty() }, &[255, 127]),
        ("INT16", InferTensorContents { int_contents: vec![-2, 1], ..empty() }, &[254, 255, 1, 0]),
        ("UINT8", InferTensorContents { uint_contents: vec![255, 0], ..empty() }, &[255, 0]),
        (
            "FP32",
            InferTensorContents { fp32_contents: vec![1.0, 0.0], ..empty() },
            &[0, 0, 128, 63, 0, 0, 0, 0],
        ),
        (
            "BYTES",
            InferTensorContents { bytes_contents: vec!["a".into(), "".into()], ..empty() },
            &[1, 0, 0, 0, b'a', 0, 0, 0, 0],
        ),
    ];
    for (datatype, contents, want) in cases {
        let named = inputs_of(message(vec![tensor(datatype, &[2], Some(contents))], &[]));
        assert_eq!(&named.unwrap()[0].tensor.data()[..], want, "{datatype}");
    }
}

#[test]
fn contents_that_do_not_fit_are_refused() {
    let empty = InferTensorContents::default;
    let floats = || InferTensorContents { fp32_contents: vec![1.0], ..empty() };
    let two = InferTensorContents { int_contents: vec![1], ..floats() };
    let one = |datatype, contents| message(vec![tensor(datatype, &[1], Some(contents))], &[]);
    let cases = [
        ("other field", one("INT32", floats())),
        ("two fields", one("FP32", two)),
        ("FP16 has no field", one("FP16", floats())),
        ("too large", one("INT8", InferTensorContents { int_contents: vec![128], ..empty() })),
        ("negative", one("INT16", InferTensorContents { int_contents: vec![-32769], ..empty() })),
        ("no data", message(vec![tensor("FP32", &[1], None)], &[])),
        ("unknown datatype", one("FLOAT", floats())),
        ("negative dimension", message(vec![tensor("FP32", &[-1], Some(floats()))], &[])),
        ("mixed", message(vec![tensor("FP32", &[1], Some(floats()))], &[&[0; 4]])),
        ("raw too short", message(vec![tensor("FP32", &[2], None)], &[&[0; 4]])),
        ("raw left over", message(vec![tensor("FP32", &[1], None)], &[&[0; 4], &[0; 4]])),
        (
            "raw missing",
            message(vec![tensor("FP32", &[1], None), tensor("FP32", &[1], None)], &[&[0; 4]]),
        ),
    ];
    for (name, message) in cases {
        let refused = inputs_of(message).map_err(|failure| failure.kind);
        assert_eq!(refused.unwrap_err(), ErrorKind::InvalidInput, "{name}");
    }
}

#[test]
fn raw_contents_are_not_copied() {
    let mut request = message(vec![tensor("FP32", &[16], None)], &[]);
    request.raw_input_contents = vec![vec![0; 64].into()];
    let typed = InferTensorContents { fp32_contents: vec![1.0; 16], ..Default::default() };
    let typed = message(vec![tensor("FP32", &[16], Some(typed))], &[]);
    for request in [request, typed] {
        let bytes = Bytes::from(request.encode_to_vec());
        let Inputs::Named(named) = of_bytes(bytes.clone()).unwrap().request.inputs else {
            panic!("deferred");
        };
        assert!(bytes.as_ptr_range().contains(&named[0].tensor.data().as_ptr()));
    }
}

#[test]
fn parameters_are_strict() {
    let flag = |value| InferParameter { parameter_choice: Some(ParameterChoice::BoolParam(value)) };
    let cases = [
        ("priority", int(1), None),
        ("custom", string("kept"), None),
        ("sequence_id", int(0), None),
        ("sequence_id", string(""), None),
        (EMPTY_FINAL, flag(true), None),
        ("sequence_id", int(7), Some(ErrorKind::Unsupported)),
        ("sequence_id", string("s"), Some(ErrorKind::Unsupported)),
        ("sequence_id", flag(true), Some(ErrorKind::InvalidInput)),
        ("sequence_start", int(1), Some(ErrorKind::InvalidInput)),
        ("triton_other", int(1), Some(ErrorKind::InvalidInput)),
        (EMPTY_FINAL, int(1), Some(ErrorKind::InvalidInput)),
        ("empty", InferParameter { parameter_choice: None }, Some(ErrorKind::InvalidInput)),
    ];
    for (key, value, want) in cases {
        let mut request = message(vec![], &[]);
        request.parameters.insert(key.to_owned(), value);
        let got = whole(&request).err();
        assert_eq!(got.map(|failure| failure.kind), want, "{key}");
    }
}

#[test]
fn shared_memory_is_one_source_and_within_limits() {
    let parameters = |size: Option<i64>| {
        let mut parameters = HashMap::from([(REGION.to_owned(), string("r"))]);
        parameters.extend(size.map(|size| (REGION_SIZE.to_owned(), int(size))));
        parameters
    };
    let shared = |size: Option<i64>, contents| {
        let mut input = tensor("UINT8", &[4], contents);
        input.parameters = parameters(size);
        message(vec![input], &[])
    };
    let contents = InferTensorContents { uint_contents: vec![1; 4], ..Default::default() };
    let cases = [
        (shared(Some(4), None), ErrorKind::Unsupported),
        (shared(Some(4), Some(contents)), ErrorKind::InvalidInput),
        (shared(None, None), ErrorKind::InvalidInput),
        (shared(Some(-4), None), ErrorKind::InvalidInput),
        (shared(Some(1 << 40), None), ErrorKind::InvalidInput),
    ];
    for (request, want) in cases {
        assert_eq!(inputs_of(request).unwrap_err().kind, want);
    }
    let mut request = message(vec![], &[]);
    let mut parameters = parameters(Some(4));
    parameters.insert("classification".to_owned(), int(2));
    request.outputs.push(InferRequestedOutputTensor { name: "y".to_owned(), parameters });
    assert_eq!(inputs_of(request).unwrap_err().kind, ErrorKind::InvalidInput);
}

#[test]
fn a_model_that_cannot_be_is_not_found() {
    for (model, version, want) in [
        ("", "", ErrorKind::InvalidInput),
        ("../etc", "", ErrorKind::NotFound),
        ("m", "-3", ErrorKind::InvalidInput),
    ] {
        assert_eq!(names(model, version).unwrap_err().kind, want, "{model} {version}");
    }
}

proptest! {
    #[test]
    fn hostile_messages_never_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..256),
        datatype in prop::sample::select(DataType::ALL.to_vec()),
        shape in prop::collection::vec(any::<i64>(), 0..5),
        ints in prop::collection::vec(any::<i32>(), 0..5),
        raw in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..20), 0..3),
    ) {
        drop(of_bytes(bytes.into()));
        let contents = InferTensorContents { int_contents: ints, ..Default::default() };
        let contents = raw.is_empty().then_some(contents);
        let mut request = message(vec![tensor(datatype.name(), &shape, contents)], &[]);
        request.raw_input_contents = raw.into_iter().map(Bytes::from).collect();
        drop(inputs_of(request));
    }

    #[test]
    fn raw_and_typed_agree(values in prop::collection::vec(any::<i64>(), 0..20)) {
        let shape = [i64::try_from(values.len()).unwrap()];
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let contents = InferTensorContents { int64_contents: values, ..Default::default() };
        let typed = inputs_of(message(vec![tensor("INT64", &shape, Some(contents))], &[])).unwrap();
        let mut request = message(vec![tensor("INT64", &shape, None)], &[]);
        request.raw_input_contents = vec![bytes.into()];
        prop_assert_eq!(typed, inputs_of(request).unwrap());
    }
}
