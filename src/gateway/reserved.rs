//! Parameters that a caller may not set, because the gateway says what they are.
//!
//! Nothing reads them from a request. They are refused all the same, so that no caller believes
//! to have chosen an arm, a tenant or a place in the ledger, and no later reader is fooled.

use crate::domain::{Failure, ParameterValue};

/// In lower case, with `_` for `-`.
const OURS: &[&str] = &[
    "arm",
    "audit_id",
    "bucket",
    "canary_bucket",
    "digest",
    "headers",
    "ledger_seq",
    "model_digest",
    "model_version",
    "prediction_id",
    "principal",
    "route_reason",
    "shadow_of",
    "tenant",
    "version",
];

/// Every key of ours beside those begins so.
const PREFIX: &str = "tidegate";

/// # Errors
/// `InvalidInput` that names the first key that is ours.
pub(super) fn check(parameters: &[(String, ParameterValue)]) -> Result<(), Failure> {
    match parameters.iter().find(|(key, _)| is_ours(key)) {
        None => Ok(()),
        Some((key, _)) => {
            let shown: String = key.chars().take(64).collect();
            Err(Failure::invalid(format!("parameter '{shown}' is set by the server, leave it out")))
        }
    }
}

fn is_ours(key: &str) -> bool {
    let starts_with = |ours: &str| {
        key.len() >= ours.len()
            && ours.bytes().zip(key.bytes()).all(|(ours, byte)| ours == folded(byte))
    };
    starts_with(PREFIX) || OURS.iter().any(|ours| ours.len() == key.len() && starts_with(ours))
}

fn folded(byte: u8) -> u8 {
    if byte == b'-' { b'_' } else { byte.to_ascii_lowercase() }
}
