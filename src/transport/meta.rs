//! What both protocols read from headers before a body, and write into headers after.

use std::sync::Arc;
use std::time::Duration;

use http::{HeaderMap, HeaderName, HeaderValue};
use tokio::time::Instant;

use super::Api;
use crate::domain::{
    AnswerHead, CallMeta, Failure, Protocol, RouteHeaders, STICKY_KEY_LEN_MAX, TraceContext,
    VALUE_LEN_MAX,
};

/// So much of a header that traffic tables ask for is kept: enough to tell that it is longer than
/// anything it may be compared with.
const ASKED_LEN_MAX: usize = VALUE_LEN_MAX + 4;

const PREDICTION_ID: HeaderName = HeaderName::from_static("tidegate-prediction-id");
const MODEL_VERSION: HeaderName = HeaderName::from_static("tidegate-model-version");
const ARM: HeaderName = HeaderName::from_static("tidegate-arm");
const LEDGER_SEQ: HeaderName = HeaderName::from_static("tidegate-ledger-seq");
const MODEL_DIGEST: HeaderName = HeaderName::from_static("tidegate-model-digest");

/// When a request's headers were there; its deadline and its total time count from here.
#[derive(Clone, Copy, Debug)]
pub struct Arrived(pub Instant);

/// Reads deadline, trace context, and what may decide the version.
///
/// # Errors
/// `InvalidInput` for a deadline that is no number.
pub fn call_meta(
    headers: &HeaderMap,
    protocol: Protocol,
    Arrived(received): Arrived,
    api: &Api,
) -> Result<CallMeta, Failure> {
    let timeout = match protocol {
        Protocol::Http => http_timeout(headers)?,
        Protocol::Grpc | Protocol::GrpcStream => grpc_timeout(headers)?,
    };
    let trace = headers.get("traceparent").and_then(|value| value.to_str().ok());
    Ok(CallMeta {
        protocol,
        received,
        timeout,
        trace: trace.and_then(trace_context),
        sticky_key: sticky_key(headers, "tidegate-sticky-key"),
        headers: route_headers(headers, api),
        principal: None,
    })
}

/// The headers that traffic tables ask for at this moment. Of the usual gateway, whose tables ask
/// for none, they are none.
pub fn route_headers(headers: &HeaderMap, api: &Api) -> RouteHeaders {
    let configured = api.settings.sticky_header.as_deref();
    RouteHeaders {
        sticky_key: configured.and_then(|name| sticky_key(headers, name)),
        subject: api.settings.subject_header.as_deref().and_then(|name| sticky_key(headers, name)),
        named: api.gateway.look_at_table(|table| asked(headers, table.header_names())),
    }
}

fn sticky_key(headers: &HeaderMap, name: &str) -> Option<String> {
    let key = text(headers.get(name)?).filter(|key| key.len() <= STICKY_KEY_LEN_MAX);
    key.map(str::to_owned)
}

/// Those of `names`, which are in order, that are there. The shorter list is gone through: neither
/// many tables nor a caller with many headers makes it long.
fn asked(headers: &HeaderMap, names: &[Arc<str>]) -> Vec<(Arc<str>, String)> {
    let value = |name: &Arc<str>, value: &HeaderValue| {
        let text = text(value)?;
        let kept = &text[..text.floor_char_boundary(ASKED_LEN_MAX)];
        Some((Arc::clone(name), kept.to_owned()))
    };
    if names.len() <= headers.keys_len() {
        let there = names.iter().filter_map(|name| Some((name, headers.get(&**name)?)));
        return there.filter_map(|(name, found)| value(name, found)).collect();
    }
    let find = |name: &HeaderName| {
        let at = names.binary_search_by(|asked| (**asked).cmp(name.as_str())).ok()?;
        value(&names[at], headers.get(name)?)
    };
    headers.keys().filter_map(find).collect()
}

/// What a header says, if it is text.
fn text(value: &HeaderValue) -> Option<&str> {
    std::str::from_utf8(value.as_bytes()).ok()
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
    if let Some(seq) = head.ledger_seq {
        let mut value = HeaderValue::from(seq);
        // As the id: it never comes again.
        value.set_sensitive(true);
        headers.insert(LEDGER_SEQ, value);
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
    fn what_tables_ask_for_is_copied_and_nothing_else() {
        let mut headers = HeaderMap::new();
        let long = "ü".repeat(200);
        for (name, value) in [("x-a", "1"), ("x-a", "2"), ("x-b", ""), ("x-long", long.as_str())] {
            headers.append(name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        headers.insert("x-bytes", HeaderValue::from_bytes(&[0xff]).unwrap());
        let names = |names: &[&str]| names.iter().map(|name| Arc::from(*name)).collect::<Vec<_>>();
        let asked = |wanted: &[&str]| {
            let found = asked(&headers, &names(wanted)).into_iter();
            found.map(|(name, value)| (name.to_string(), value.len())).collect::<Vec<_>>()
        };
        let pair = |name: &str, len| (name.to_owned(), len);
        assert_eq!(asked(&[]), []);
        assert_eq!(asked(&["x-a", "x-none"]), [pair("x-a", 1)]);
        let few = [pair("x-b", 0), pair("x-long", 260)];
        assert_eq!(asked(&["x-b", "x-bytes", "x-long"]), few);
        // More names than headers: the headers are gone through.
        let mut found = asked(&["a", "b", "c", "d", "x-b", "x-bytes", "x-long"]);
        found.sort();
        assert_eq!(found, few);
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
