//! Hostile connections against the real program: slow clients, floods, smuggling, floods of
//! descriptors and callers who vanish. Each test prints its figure.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![expect(clippy::print_stdout, reason = "the figures of the tests")]

#[expect(unreachable_pub, reason = "shared with the benchmarks")]
#[path = "../support/gateway.rs"]
mod gateway_of;

mod calls;
mod descriptors;
mod floods;
mod gone;
mod slow;
mod smuggling;
mod support;
