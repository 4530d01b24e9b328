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
        principal = completion.principal.as_deref().and_then(shown).as_deref(),
        cached = completion.cached.then_some(true),
        prediction_id = %completion.prediction_id,
        request_id = shown(&completion.request_id).as_deref(),
        trace_id = completion.trace.map(|trace| format!("{:032x}", trace.trace_id)),
    );
}

/// A caller's text without what could forge lines, fill the disk or fool who reads; `None` when
/// there is none. A last `…` says that it was cut: those of the caller are escaped.
fn shown(text: &str) -> Option<String> {
    if text.is_empty() {
        return None;
    }
    let mut out = String::new();
    let mut chars = text.chars();
    for char in chars.by_ref().take(REQUEST_ID_MAX) {
        if plain(char) {
            out.push(char);
        } else {
            write!(out, "{}", char.escape_unicode()).expect("writing to a string cannot fail");
        }
    }
    if chars.next().is_some() {
        out.push('…');
    }
    Some(out)
}

/// Whether a character is shown as itself: neither white space nor control, nothing that turns the
/// direction of what follows or cannot be seen, nothing that a log's own syntax uses.
fn plain(char: char) -> bool {
    let unseen = matches!(
        char,
        '\u{ad}' | '\u{61c}' | '\u{115f}' | '\u{1160}' | '\u{17b4}' | '\u{17b5}' | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
            | '\u{2800}' | '\u{3164}' | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}'
    );
    !(unseen || char.is_control() || char.is_whitespace() || matches!(char, '"' | '\\' | '…'))
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;
    use std::time::{Duration, SystemTime};

    use parking_lot::Mutex;

    use super::*;
    use crate::domain::{Arm, ErrorKind, Protocol, Timings, TraceContext, Version};

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    /// The lines that two requests leave, the second of them refused.
    fn lines(mode: AccessLog) -> Vec<serde_json::Value> {
        let trace = TraceContext { trace_id: 0xabc, parent_span: 1, sampled: true };
        let mut completion = Completion {
            prediction_id: uuid::Uuid::nil(),
            request_id: "r 1".into(),
            received_at: SystemTime::UNIX_EPOCH,
            model: "iris".parse().unwrap(),
            version: Version::new(2),
            digest: None,
            arm: Some(Arm::Pinned),
            reason: None,
            protocol: Protocol::GrpcStream,
            principal: Some("ci@home".to_owned()),
            trace: Some(trace),
            outcome: Outcome::Ok,
            timings: Timings {
                queue: Duration::from_micros(100),
                batch_wait: Duration::from_micros(150),
                compute_infer: Duration::from_micros(1500),
                total: Duration::from_millis(2),
                ..Timings::default()
            },
            rows: 1,
            batch_size: 4,
            cached: false,
            shadow_of: None,
            inputs: Vec::new(),
            outputs: Vec::new(),
        };
        let written = Lines::default();
        let writer = written.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_writer(move || writer.clone())
            .finish();
        tracing::subscriber::with_default(subscriber, || {
            log(mode, &completion);
            completion.outcome =
                Outcome::Failed { kind: ErrorKind::InvalidInput, message: "secret".into() };
            completion.version = None;
            log(mode, &completion);
        });
        let text = String::from_utf8(written.0.lock().clone()).unwrap();
        assert!(!text.contains("secret"));
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn a_request_leaves_one_line_by_mode() {
        assert!(lines(AccessLog::Off).is_empty());
        let errors = lines(AccessLog::Errors);
        assert_eq!(errors.len(), 1);
        assert_eq!(errors[0]["status"], "invalid_input");
        assert!(errors[0].get("version").is_none());

        let all = lines(AccessLog::All);
        assert_eq!(all.len(), 2);
        let wanted = serde_json::json!({
            "level": "INFO", "target": "access", "model": "iris", "version": "2",
            "arm": "pinned", "protocol": "grpc_stream", "status": "ok", "total_ms": 2.0,
            "queue_ms": 0.25, "compute_ms": 1.5, "batch_size": 4,
            "principal": "ci@home", "prediction_id": "00000000-0000-0000-0000-000000000000",
            "request_id": r"r\u{20}1", "trace_id": "00000000000000000000000000000abc",
        });
        let mut got = all[0].clone();
        got.as_object_mut().unwrap().remove("timestamp").unwrap();
        assert_eq!(got, wanted);
    }

    #[test]
    fn a_request_id_is_capped_and_cannot_forge_a_line() {
        assert_eq!(shown(""), None);
        assert_eq!(shown("a-1").unwrap(), "a-1");
        assert_eq!(shown("a\nb \"\u{1b}").unwrap(), r"a\u{a}b\u{20}\u{22}\u{1b}");
        assert_eq!(shown("a\u{202e}b\u{2028}c").unwrap(), r"a\u{202e}b\u{2028}c");
        assert_eq!(shown(&"x".repeat(1000)).unwrap().chars().count(), REQUEST_ID_MAX + 1);
        // Nobody but us says that something was cut.
        assert_eq!(shown("a…").unwrap(), r"a\u{2026}");
    }
}
