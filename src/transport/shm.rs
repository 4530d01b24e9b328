//! System shared memory regions that clients registered; off by default.

/// Registered regions.
#[derive(Debug, Default)]
pub struct SharedMemory {}
