//! Generated code: the messages of the Open Inference Protocol and the echo service of the floor.

#![expect(clippy::all, clippy::allow_attributes, reason = "generated code")]

tonic::include_proto!("inference");

pub mod echo {
    include!(concat!(env!("OUT_DIR"), "/inference.GRPCInferenceService.rs"));
}
