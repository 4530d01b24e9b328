//! Decides which versions exist: reads the repository, loads, warms and retires.

pub mod manifest;
