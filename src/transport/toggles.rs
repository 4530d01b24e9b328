//! Trace and log settings as the protocol shows them.

/// Settings that a client may read and partly change.
#[derive(Debug, Default)]
pub struct Toggles {}
