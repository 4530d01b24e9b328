//! Load generator, floors and comparisons: what the figures of `docs/performance.md` are measured with.
//!
//! Invariants:
//! - A request's body is built once, before the load; the client spends as little as it can.
//! - In an open loop the arrival times are fixed before the load starts, and a latency counts from
//!   there, so that a server that stalls is seen stalling (no coordinated omission).
//! - What is compared runs in turns, in one run, on the same machine.

pub mod client;
pub mod compare;
pub mod drive;
pub mod floor;
#[cfg(feature = "inprocess")]
pub mod inprocess;
pub mod process;
pub mod proto;
pub mod record;
pub mod repository;
pub mod schedule;
pub mod servers;
pub mod tensors;
