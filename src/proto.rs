//! Generated protobuf code, in one place with lints off.

use std::sync::LazyLock;

use prost_reflect::{DescriptorPool, MessageDescriptor};

#[expect(unreachable_pub, clippy::all, clippy::pedantic, rustdoc::all, reason = "generated code")]
#[allow(clippy::allow_attributes, unfulfilled_lint_expectations, reason = "generated code varies")]
mod generated {
    pub mod inference {
        tonic::include_proto!("inference");
    }
    pub mod onnx {
        tonic::include_proto!("onnx");
    }
    pub mod feedback {
        tonic::include_proto!("tidegate.v1");
    }
    pub mod ledger {
        tonic::include_proto!("tidegate.ledger.v1");
    }
}

pub use generated::{feedback, inference, ledger, onnx};

/// Every compiled file, for reflection and text-format parsing.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Every message type, for text formats.
static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(DESCRIPTORS).expect("the build wrote these descriptors")
});

/// The type with this full name.
///
/// # Panics
/// When no compiled file has it.
pub fn message(full_name: &str) -> MessageDescriptor {
    POOL.get_message_by_name(full_name).expect("callers name messages of our own files")
}
