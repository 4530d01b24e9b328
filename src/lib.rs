//! Tidegate: a model-serving gateway for ONNX models.
//!
//! Modules in reading order; `docs/architecture.md` has the picture and the import arrows that
//! `tests/tidy.rs` checks.

pub mod domain;
pub mod engine;
pub mod observe;
pub mod batch;
pub mod route;
pub mod gateway;
pub mod control;
pub mod transport;
pub mod config;
pub mod app;
pub mod cli;
pub mod proto;
