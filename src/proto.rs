//! Generated protobuf code, in one place with lints off.

#[expect(unreachable_pub, clippy::all, clippy::pedantic, rustdoc::all, reason = "generated code")]
#[allow(clippy::allow_attributes, unfulfilled_lint_expectations, reason = "generated code varies")]
mod generated {
    pub mod inference {
        tonic::include_proto!("inference");
    }
    pub mod onnx {
        tonic::include_proto!("onnx");
    }
}

pub use generated::{inference, onnx};

/// Every compiled file, for reflection and text-format parsing.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
