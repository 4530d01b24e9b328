//! One log line per request, under the target `access`.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::domain::{Completion, Outcome};

/// Longest part of a caller's request id that is logged, in characters.
const REQUEST_ID_MAX: usize = 128;

/// Which requests are logged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AccessLog {
    #[default]
    Off,
    /// Those that failed.
    Errors,
    All,
}

/// Writes the line, never inputs, outputs or the error's text, which may quote an input.
pub(super) fn log(mode: AccessLog, completion: &Completion) {
    let wanted = match mode {
        AccessLog::Off => false,
        AccessLog::Errors => completion.outcome != Outcome::Ok,
        AccessLog::All => true,
    };
    if !wanted {
        return;
    }
    let ms = |duration: std::time::Duration| duration.as_micros() as f64 / 1000.0;
    let timings = &completion.timings;
    tracing::info!(
        target: super::log::ACCESS,
        model = %completion.model,
        version = completion.version.map(tracing::field::display),
        arm = completion.arm.as_ref().map(|arm| arm.as_str()),
        protocol = completion.protocol.as_str(),
        status = completion.outcome.code(),
        total_ms = ms(timings.total),
        queue_ms = ms(timings.queue + timings.batch_wait),
        compute_ms = ms(timings.compute_infer),
        batch_size = completion.batch_size,
        prediction_id = %completion.prediction_id,
        request_id = shown(&completion.request_id).as_deref(),
        trace_id = completion.trace.map(|trace| format!("{:032x}", trace.trace_id)),
    );
}

/// A caller's text without what could forge lines or fill the disk; `None` when there is none.
fn shown(text: &str) -> Option<String> {
    if text.is_empty() {
        return None;
    }
    let mut out = String::new();
    for char in text.chars().take(REQUEST_ID_MAX) {
        if char.is_control() || char.is_whitespace() || matches!(char, '"' | '\\') {
            write!(out, "{}", char.escape_unicode()).expect("writing to a string cannot fail");
        } else {
            out.push(char);
        }
    }
    if text.chars().nth(REQUEST_ID_MAX).is_some() {
        out.push('…');
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_id_is_capped_and_cannot_forge_a_line() {
        assert_eq!(shown(""), None);
        assert_eq!(shown("a-1").unwrap(), "a-1");
        assert_eq!(shown("a\nb \"\u{1b}").unwrap(), r"a\u{a}b\u{20}\u{22}\u{1b}");
        assert_eq!(shown(&"x".repeat(1000)).unwrap().chars().count(), REQUEST_ID_MAX + 1);
    }
}
