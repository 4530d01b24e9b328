//! What both protocols read from headers before a body, and write into headers after.

use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;

use super::Settings;
use crate::domain::{AnswerHead, CallMeta, Failure, Protocol, TraceContext};

/// Longest sticky key that is looked at, in bytes.
const STICKY_KEY_LEN_MAX: usize = 256;

const PREDICTION_ID: HeaderName = HeaderName::from_static("tidegate-prediction-id");
const MODEL_VERSION: HeaderName = HeaderName::from_static("tidegate-model-version");
const ARM: HeaderName = HeaderName::from_static("tidegate-arm");
const MODEL_DIGEST: HeaderName = HeaderName::from_static("tidegate-model-digest");

/// When a request's headers were there; its deadline and its total time count from here.
#[derive(Clone, Copy, Debug)]
pub struct Arrived(pub Instant);

/// Reads deadline, trace context and sticky key.
///
/// # Errors
/// `InvalidInput` for a deadline that is no number.
pub fn call_meta(
    headers: &HeaderMap,
    protocol: Protocol,
    Arrived(received): Arrived,
    settings: &Settings,
) -> Result<CallMeta, Failure> {
    let timeout = match protocol {
        Protocol::Http => http_timeout(headers)?,
        Protocol::Grpc | Protocol::GrpcStream => grpc_timeout(headers)?,
    };
    let text = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    let configured = settings.sticky_header.as_deref().and_then(text);
    let sticky_key = text("tidegate-sticky-key").or(configured);
    Ok(CallMeta {
        protocol,
        received,
        timeout,
        trace: text("traceparent").and_then(trace_context),
        sticky_key: sticky_key.filter(|key| key.len() <= STICKY_KEY_LEN_MAX).map(str::to_owned),
        principal: None,
    })
}

/// Headers (gRPC: metadata) that every answer to a prediction carries.
pub fn answer_headers(head: &AnswerHead, headers: &mut HeaderMap) {
    let mut id = [0; uuid::fmt::Hyphenated::LENGTH];
    let id = head.prediction_id.hyphenated().encode_lower(&mut id);
    if let Ok(mut value) = HeaderValue::from_str(id) {
        // Not for secrecy: HTTP/2 then keeps it out of the connection's table of headers, where a
        // value that never comes again would only push out those that do.
        value.set_sensitive(true);
        headers.insert(PREDICTION_ID, value);
    }
    if let Some(version) = head.version {
        headers.insert(MODEL_VERSION, HeaderValue::from(version.get()));
    }
    let mut put = |name: HeaderName, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            headers.insert(name, value);
        }
    };
    if let Some(arm) = &head.arm {
        put(ARM, arm.as_str());
    }
    if let Some(digest) = &head.digest {
        put(MODEL_DIGEST, &digest.to_string());
    }
}

fn http_timeout(headers: &HeaderMap) -> Result<Option<Duration>, Failure> {
    let Some(value) = headers.get("tidegate-timeout-ms") else { return Ok(None) };
    let millis = value.to_str().ok().and_then(|text| text.parse().ok());
    match millis {
        Some(millis) => Ok(Some(Duration::from_millis(millis))),
        None => Err(Failure::invalid(
            "header 'tidegate-timeout-ms' must be a whole number of milliseconds",
        )),
    }
}

/// `grpc-timeout`: at most eight digits and a unit of `HMSmun`.
fn grpc_timeout(headers: &HeaderMap) -> Result<Option<Duration>, Failure> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    let bad = || Failure::invalid("metadata 'grpc-timeout' must be up to 8 digits and a unit");
    let text = value.to_str().map_err(|_| bad())?;
    let (digits, unit) = text.split_at_checked(text.len().saturating_sub(1)).ok_or_else(bad)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(bad());
    }
    let count: u64 = digits.parse().map_err(|_| bad())?;
    Ok(Some(match unit {
        "H" => Duration::from_secs(count * 3600),
        "M" => Duration::from_secs(count * 60),
        "S" => Duration::from_secs(count),
        "m" => Duration::from_millis(count),
        "u" => Duration::from_micros(count),
        "n" => Duration::from_nanos(count),
        _ => return Err(bad()),
    }))
}

/// W3C `traceparent`; anything malformed counts as absent, as the recommendation says.
fn trace_context(text: &str) -> Option<TraceContext> {
    let mut parts = text.trim().split('-');
    let (version, trace, parent, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |part: &str, len: usize| {
        part.len() == len && part.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    };
    if !hex(version, 2) || version == "ff" || !hex(trace, 32) || !hex(parent, 16) || !hex(flags, 2)
    {
        return None;
    }
    if version == "00" && parts.next().is_some() {
        return None;
    }
    let trace_id = u128::from_str_radix(trace, 16).ok().filter(|id| *id != 0)?;
    let parent_span = u64::from_str_radix(parent, 16).ok().filter(|id| *id != 0)?;
    let sampled = u8::from_str_radix(flags, 16).ok()? & 1 == 1;
    Some(TraceContext { trace_id, parent_span, sampled })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traceparent_is_read_strictly() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert!(trace_context(good).is_some_and(|trace| trace.sampled));
        for bad in [
            "",
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01-x",
        ] {
            assert_eq!(trace_context(bad), None, "{bad}");
        }
    }

    #[test]
    fn deadlines_are_read_or_refused() {
        let read = |text: &'static str| {
            let headers = HeaderMap::from_iter([(
                HeaderName::from_static("grpc-timeout"),
                HeaderValue::from_static(text),
            )]);
            grpc_timeout(&headers).ok().flatten()
        };
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "m", "1", "123456789S", "-1S", "1.5S", "1x"] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
