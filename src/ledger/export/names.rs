//! Numbers and bytes of a record by the names that people read.

use crate::ledger::record::Kind;
use crate::proto::ledger::Protocol;

pub fn kind_name(kind: u64) -> &'static str {
    match i32::try_from(kind).ok().and_then(|kind| Kind::try_from(kind).ok()) {
        Some(Kind::Prediction) => "prediction",
        Some(Kind::Gap) => "gap",
        Some(Kind::Recovered) => "recovered",
        Some(Kind::Admin) => "admin",
        Some(Kind::Feedback) => "feedback",
        Some(Kind::Erasure) => "erasure",
        Some(Kind::Retention) => "retention",
        Some(Kind::Key) => "key",
        Some(Kind::Unspecified) | None => "unknown",
    }
}

pub fn protocol_name(protocol: u64) -> Option<&'static str> {
    match i32::try_from(protocol).ok().and_then(|it| Protocol::try_from(it).ok())? {
        Protocol::Http => Some("http"),
        Protocol::Grpc => Some("grpc"),
        Protocol::GrpcStream => Some("grpc_stream"),
        Protocol::Unspecified => None,
    }
}

pub fn uuid_text(bytes: &[u8]) -> Option<String> {
    uuid::Uuid::from_slice(bytes).ok().map(|id| id.to_string())
}

pub fn hex_text(bytes: &[u8]) -> Option<String> {
    (!bytes.is_empty()).then(|| hex(bytes))
}

pub fn digest_text(algorithm: &str, bytes: &[u8]) -> Option<String> {
    (!bytes.is_empty()).then(|| prefixed(algorithm, bytes))
}

pub(super) fn prefixed(algorithm: &str, bytes: &[u8]) -> String {
    format!("{algorithm}:{}", hex(bytes))
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |at: u8| char::from(DIGITS[usize::from(at)]);
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}
