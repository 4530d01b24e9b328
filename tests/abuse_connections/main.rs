//! Hostile connections against the real program: slow clients, floods, smuggling, floods of
//! descriptors and callers who vanish. Each test prints its figure.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]
#![expect(dead_code, reason = "for the tests to come")]
#![expect(clippy::print_stdout, reason = "the figures of the tests")]

mod slow;
mod smuggling;
mod support;
