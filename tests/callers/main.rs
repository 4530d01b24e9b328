//! What one caller can do to another, to the operator's logs and metrics, and to the process:
//! with figures for each.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[expect(unreachable_pub, reason = "shared with other tests")]
#[path = "../support/wire.rs"]
mod wire;

mod cache;
mod isolation;
mod labels;
mod onnx;
mod oracle;
mod outputs;
mod process;
mod reserved;
mod support;
mod text;
