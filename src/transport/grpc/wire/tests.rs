use proptest::prelude::*;
use prost::Message as _;

use super::*;
use crate::proto::inference::infer_parameter::ParameterChoice;
use crate::proto::inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
use crate::proto::inference::{InferParameter, InferTensorContents, ModelInferRequest};

fn choices() -> impl Strategy<Value = Option<ParameterChoice>> {
    prop_oneof![
        Just(None),
        any::<bool>().prop_map(|value| Some(ParameterChoice::BoolParam(value))),
        any::<i64>().prop_map(|value| Some(ParameterChoice::Int64Param(value))),
        any::<u64>().prop_map(|value| Some(ParameterChoice::Uint64Param(value))),
        (-1e9..1e9_f64).prop_map(|value| Some(ParameterChoice::DoubleParam(value))),
        ".{0,5}".prop_map(|value| Some(ParameterChoice::StringParam(value))),
    ]
}

type Wire = std::collections::HashMap<String, InferParameter>;

fn parameters() -> impl Strategy<Value = Wire> {
    let one = choices().prop_map(|parameter_choice| InferParameter { parameter_choice });
    prop::collection::hash_map(".{0,5}", one, 0..4)
}

fn inputs() -> impl Strategy<Value = InferInputTensor> {
    let contents = prop::collection::vec(any::<i64>(), 0..4)
        .prop_map(|int64_contents| InferTensorContents { int64_contents, ..Default::default() });
    let shape = prop::collection::vec(any::<i64>(), 0..20);
    (".{0,5}", ".{0,5}", shape, parameters(), prop::option::of(contents)).prop_map(
        |(name, datatype, shape, parameters, contents)| InferInputTensor {
            name,
            datatype,
            shape,
            parameters,
            contents,
        },
    )
}

fn messages() -> impl Strategy<Value = ModelInferRequest> {
    let outputs = (".{0,5}", parameters())
        .prop_map(|(name, parameters)| InferRequestedOutputTensor { name, parameters });
    let raw = prop::collection::vec(any::<u8>(), 0..9).prop_map(Bytes::from);
    (
        (".{0,5}", ".{0,5}", ".{0,5}"),
        parameters(),
        prop::collection::vec(inputs(), 0..4),
        prop::collection::vec(outputs, 0..4),
        prop::collection::vec(raw, 0..4),
    )
        .prop_map(|((model_name, model_version, id), parameters, inputs, outputs, raw)| {
            ModelInferRequest {
                model_name,
                model_version,
                id,
                parameters,
                inputs,
                outputs,
                raw_input_contents: raw,
            }
        })
}

fn sorted(ours: &[Parameter]) -> Vec<(String, Option<ParameterValue>)> {
    let mut all = ours.to_vec();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

fn theirs(wire: &Wire) -> Vec<(String, Option<ParameterValue>)> {
    let value = |parameter: &InferParameter| {
        parameter.parameter_choice.clone().map(|choice| match choice {
            ParameterChoice::BoolParam(value) => ParameterValue::Bool(value),
            ParameterChoice::Int64Param(value) => ParameterValue::Int(value),
            ParameterChoice::Uint64Param(value) => ParameterValue::Uint(value),
            ParameterChoice::DoubleParam(value) => ParameterValue::Double(value),
            ParameterChoice::StringParam(value) => ParameterValue::String(value),
        })
    };
    let mut all: Vec<_> = wire.iter().map(|(key, one)| (key.clone(), value(one))).collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all
}

proptest! {
    #[test]
    fn what_the_generated_code_writes_is_read_the_same(message in messages()) {
        let request = request(message.encode_to_vec().into()).unwrap();
        prop_assert_eq!(&request.model_name, &message.model_name);
        prop_assert_eq!(&request.model_version, &message.model_version);
        prop_assert_eq!(&request.id, &message.id);
        prop_assert_eq!(sorted(&request.parameters), theirs(&message.parameters));
        prop_assert_eq!(&request.raw, &message.raw_input_contents);
        prop_assert_eq!(request.inputs.len(), message.inputs.len());
        for (ours, wire) in request.inputs.iter().zip(&message.inputs) {
            prop_assert_eq!(&ours.name, &wire.name);
            prop_assert_eq!(&ours.datatype, &wire.datatype);
            prop_assert_eq!(ours.rank, wire.shape.len());
            let kept = wire.shape.len().min(RANK_MAX + 1);
            prop_assert_eq!(&ours.shape[..], &wire.shape[..kept]);
            prop_assert_eq!(sorted(&ours.parameters), theirs(&wire.parameters));
            let contents = wire.contents.as_ref().map(|contents| contents.encode_to_vec());
            prop_assert_eq!(ours.contents.as_ref().map(|bytes| bytes.to_vec()), contents);
        }
        prop_assert_eq!(request.outputs.len(), message.outputs.len());
        for (ours, wire) in request.outputs.iter().zip(&message.outputs) {
            prop_assert_eq!(&ours.name, &wire.name);
            prop_assert_eq!(sorted(&ours.parameters), theirs(&wire.parameters));
        }
    }

    /// Bent messages: what we take, the generated code takes too.
    #[test]
    fn nothing_is_taken_that_the_generated_code_refuses(
        message in messages(),
        bends in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut bytes = message.encode_to_vec();
        prop_assume!(!bytes.is_empty());
        for (at, byte) in bends {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let bytes = Bytes::from(bytes);
        if let Ok(request) = request(bytes.clone()) {
            // Contents are read later, when the datatype is known; so is a wrong type in a field
            // that only the generated code knows.
            let read = request.inputs.iter().all(|input| {
                input.contents.clone().is_none_or(|contents| InferTensorContents::decode(contents).is_ok())
            });
            prop_assert!(!read || ModelInferRequest::decode(bytes).is_ok());
        }
    }
}

#[test]
fn shapes_may_come_unpacked() {
    let input = [0x18, 0x02, 0x18, 0x03, 0x1a, 0x01, 0x04];
    let message = [&[0x2a, u8::try_from(input.len()).unwrap()][..], &input].concat();
    let request = request(message.into()).unwrap();
    assert_eq!((request.inputs[0].rank, &request.inputs[0].shape[..]), (3, &[2, 3, 4][..]));
}
