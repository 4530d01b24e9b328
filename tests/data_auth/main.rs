//! Who may call the data plane, and what for: every route of both protocols, with and without a
//! credential, in process and over sockets.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[expect(dead_code, unreachable_pub, reason = "shared with other tests and the benchmarks")]
#[path = "../support/gateway.rs"]
mod gateway;

mod grpc;
mod http;
mod roles;
mod support;
