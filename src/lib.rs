//! Tidegate: a model-serving gateway for ONNX models.
//!
//! Modules in reading order; `docs/architecture.md` has the picture and the import arrows that
//! `tests/tidy.rs` checks.

pub mod admin;
pub mod admit;
pub mod app;
pub mod batch;
pub mod bucket;
pub mod cache;
pub mod checksum;
pub mod cli;
pub mod config;
pub mod control;
pub mod domain;
pub mod drift;
pub mod engine;
pub mod feedback;
pub mod gateway;
pub mod ledger;
pub mod monitor;
pub mod observe;
pub mod outbound;
pub mod panics;
pub mod proto;
pub mod quality;
pub mod route;
pub mod secret;
pub mod shadow;
pub mod transport;
