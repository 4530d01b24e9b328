//! Trace and log settings as the protocol shows them.
//!
//! What a setting cannot do here is refused, never stored and ignored: traces are exported by
//! configuration, so the only trace level is `OFF`; log levels change when the program gave a
//! hook for it.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use serde_json::{Map, Value, json};

use crate::domain::Failure;

/// Most models with trace settings of their own.
const TRACED_MODELS_MAX: usize = 1024;

/// What is logged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogSettings {
    pub info: bool,
    pub warning: bool,
    pub error: bool,
    /// 0: nothing more than the above; 1: debug; 2 and up: trace.
    pub verbose_level: u32,
}

impl LogSettings {
    /// The log filter that these settings ask for; `configured` when they say nothing more.
    pub fn filter(self, configured: &str) -> String {
        match self {
            Self { verbose_level: 2.., .. } => "trace".to_owned(),
            Self { verbose_level: 1, .. } => "debug".to_owned(),
            Self { info: true, .. } => configured.to_owned(),
            Self { warning: true, .. } => "warn".to_owned(),
            Self { error: true, .. } => "error".to_owned(),
            _ => "off".to_owned(),
        }
    }
}

impl Default for LogSettings {
    fn default() -> Self {
        Self { info: true, warning: true, error: true, verbose_level: 0 }
    }
}

/// Receives changed log settings.
pub type OnLog = Box<dyn Fn(LogSettings) + Send + Sync>;

/// Settings that a client may read and partly change.
#[derive(Default)]
pub struct Toggles {
    trace: Mutex<Trace>,
    log: Mutex<LogSettings>,
    on_log: Mutex<Option<OnLog>>,
}

/// Settings that were changed, over the defaults.
#[derive(Clone, Default)]
struct Trace {
    global: BTreeMap<&'static str, String>,
    models: BTreeMap<String, BTreeMap<&'static str, String>>,
}

/// Counts that may be changed, with default and least value.
const TRACE_NUMBERS: [(&str, &str, i64); 3] =
    [("trace_rate", "1000", 1), ("trace_count", "-1", -1), ("log_frequency", "0", 0)];
const TRACE_MODE: &str = "opentelemetry";
const LOG_FORMAT: &str = "ISO8601";

impl Toggles {
    /// Log settings may be changed from now on, by calling `hook`.
    pub fn on_log(&self, hook: OnLog) {
        *self.on_log.lock() = Some(hook);
    }

    /// Settings of a model, or those for all.
    pub fn trace_get(&self, model: Option<&str>) -> Value {
        self.trace.lock().show(model)
    }

    /// Changes what `settings` names, all or nothing; `null` goes back to the global value, for
    /// the global settings to the default. Gives the settings after.
    ///
    /// # Errors
    /// `InvalidInput` for an unknown setting or value, `Unsupported` for what we do not do.
    pub fn trace_update(&self, model: Option<&str>, settings: &Value) -> Result<Value, Failure> {
        let mut trace = self.trace.lock();
        let mut next = trace.clone();
        for (key, value) in object(settings)? {
            let change = trace_change(key, value)?;
            let Some((key, value)) = change else { continue };
            let of = match model {
                None => &mut next.global,
                Some(model) => next.models.entry(model.to_owned()).or_default(),
            };
            match value {
                Some(value) => drop(of.insert(key, value)),
                None => drop(of.remove(key)),
            }
        }
        next.models.retain(|_, changed| !changed.is_empty());
        if next.models.len() > TRACED_MODELS_MAX {
            return Err(Failure::invalid(format!(
                "{TRACED_MODELS_MAX} models have trace settings of their own, no more fit"
            )));
        }
        *trace = next;
        Ok(trace.show(model))
    }

    pub fn log_get(&self) -> Value {
        show_log(*self.log.lock())
    }

    /// Changes what `settings` names, all or nothing, and gives the settings after.
    ///
    /// # Errors
    /// As `trace_update`.
    pub fn log_update(&self, settings: &Value) -> Result<Value, Failure> {
        let mut log = self.log.lock();
        let mut next = *log;
        for (key, value) in object(settings)? {
            log_change(&mut next, key, value)?;
        }
        if next != *log {
            let hook = self.on_log.lock();
            let Some(hook) = &*hook else {
                return Err(Failure::unsupported("log settings of this server are fixed at start"));
            };
            hook(next);
            *log = next;
        }
        Ok(show_log(next))
    }
}

impl Trace {
    fn show(&self, model: Option<&str>) -> Value {
        let own = model.and_then(|model| self.models.get(model));
        let mut shown = Map::new();
        shown.insert("trace_level".to_owned(), json!(["OFF"]));
        shown.insert("trace_file".to_owned(), json!(""));
        shown.insert("trace_mode".to_owned(), json!(TRACE_MODE));
        for (key, default, _) in TRACE_NUMBERS {
            let changed = own.and_then(|own| own.get(key)).or_else(|| self.global.get(key));
            shown.insert(key.to_owned(), json!(changed.map_or(default, String::as_str)));
        }
        Value::Object(shown)
    }
}

type Change = Option<(&'static str, Option<String>)>;

/// What a trace setting changes, if anything.
fn trace_change(key: &str, value: &Value) -> Result<Change, Failure> {
    if let Some((key, _, least)) = TRACE_NUMBERS.into_iter().find(|(name, ..)| *name == key) {
        if value.is_null() {
            return Ok(Some((key, None)));
        }
        let number = match one(value) {
            Value::String(text) => text.parse().ok(),
            other => other.as_i64(),
        };
        return match number {
            Some(number) if number >= least => Ok(Some((key, Some(number.to_string())))),
            _ => Err(Failure::invalid(format!(
                "trace setting '{key}' must be an integer of at least {least}, got {}",
                brief(value)
            ))),
        };
    }
    match key {
        "trace_level" => trace_level(value).map(|()| None),
        "trace_file" => Err(Failure::unsupported("trace setting 'trace_file' cannot be changed")),
        "trace_mode" if value.is_null() || one(value) == TRACE_MODE => Ok(None),
        "trace_mode" => Err(Failure::unsupported(format!(
            "trace setting 'trace_mode' is '{TRACE_MODE}' and cannot be changed"
        ))),
        _ => Err(unknown("trace", key)),
    }
}

fn trace_level(value: &Value) -> Result<(), Failure> {
    let levels = match value {
        Value::Null => return Ok(()),
        Value::Array(levels) => levels.as_slice(),
        other => std::slice::from_ref(other),
    };
    for level in levels {
        match level.as_str() {
            Some("OFF") => {}
            Some("TIMESTAMPS" | "TENSORS" | "MIN" | "MAX") => {
                return Err(Failure::unsupported(format!(
                    "trace level {} is not supported, traces are exported by configuration",
                    brief(level)
                )));
            }
            _ => {
                return Err(Failure::invalid(format!(
                    "trace setting 'trace_level' must be OFF, TIMESTAMPS or TENSORS, got {}",
                    brief(level)
                )));
            }
        }
    }
    Ok(())
}

fn log_change(log: &mut LogSettings, key: &str, value: &Value) -> Result<(), Failure> {
    let flag = || {
        value.as_bool().ok_or_else(|| {
            Failure::invalid(format!("log setting '{key}' must be a bool, got {}", brief(value)))
        })
    };
    match key {
        "log_info" => log.info = flag()?,
        "log_warning" => log.warning = flag()?,
        "log_error" => log.error = flag()?,
        "log_verbose_level" => {
            let level = value.as_u64().and_then(|level| u32::try_from(level).ok());
            log.verbose_level = level.ok_or_else(|| {
                Failure::invalid(format!(
                    "log setting 'log_verbose_level' must be a non-negative integer, got {}",
                    brief(value)
                ))
            })?;
        }
        "log_format" => match value.as_str() {
            Some(LOG_FORMAT) => {}
            Some("default") => {
                return Err(Failure::unsupported(format!(
                    "log format 'default' is not supported, times are always {LOG_FORMAT}"
                )));
            }
            _ => {
                return Err(Failure::invalid(format!(
                    "log setting 'log_format' must be default or {LOG_FORMAT}, got {}",
                    brief(value)
                )));
            }
        },
        "log_file" => {
            return Err(Failure::unsupported("log setting 'log_file' cannot be changed"));
        }
        _ => return Err(unknown("log", key)),
    }
    Ok(())
}

fn show_log(log: LogSettings) -> Value {
    json!({
        "log_file": "",
        "log_info": log.info,
        "log_warning": log.warning,
        "log_error": log.error,
        "log_verbose_level": log.verbose_level,
        "log_format": LOG_FORMAT,
    })
}

/// gRPC gives every trace setting as a list.
fn one(value: &Value) -> &Value {
    match value {
        Value::Array(values) if values.len() == 1 => &values[0],
        other => other,
    }
}

fn object(settings: &Value) -> Result<&Map<String, Value>, Failure> {
    settings.as_object().ok_or_else(|| {
        Failure::invalid(format!("settings must be an object, got {}", brief(settings)))
    })
}

fn unknown(what: &str, key: &str) -> Failure {
    let key: String = key.chars().take(64).collect();
    Failure::invalid(format!("unknown {what} setting '{key}'"))
}

fn brief(value: &Value) -> String {
    value.to_string().chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::domain::ErrorKind;

    #[test]
    fn a_model_inherits_what_it_does_not_set() {
        let toggles = Toggles::default();
        toggles.trace_update(None, &json!({"trace_rate": "7"})).unwrap();
        assert_eq!(toggles.trace_get(Some("m"))["trace_rate"], "7");
        toggles.trace_update(Some("m"), &json!({"trace_rate": ["9"], "trace_count": 3})).unwrap();
        assert_eq!(toggles.trace_get(Some("m"))["trace_rate"], "9");
        assert_eq!(toggles.trace_get(None)["trace_rate"], "7");
        let after = toggles.trace_update(Some("m"), &json!({"trace_rate": null})).unwrap();
        assert_eq!(after["trace_rate"], "7");
        assert_eq!(after["trace_count"], "3");
        assert_eq!(after["trace_level"], json!(["OFF"]));
    }

    #[test]
    fn what_cannot_be_done_is_refused_whole() {
        let toggles = Toggles::default();
        let cases = [
            (json!({"trace_rate": "5", "trace_level": ["TIMESTAMPS"]}), ErrorKind::Unsupported),
            (json!({"trace_rate": "5", "trace_level": ["LOUD"]}), ErrorKind::InvalidInput),
            (json!({"trace_rate": "5", "trace_file": "/x"}), ErrorKind::Unsupported),
            (json!({"trace_rate": "5", "zzz": "1"}), ErrorKind::InvalidInput),
            (json!({"trace_rate": "0"}), ErrorKind::InvalidInput),
            (json!([]), ErrorKind::InvalidInput),
        ];
        for (settings, kind) in cases {
            let refused = toggles.trace_update(None, &settings).unwrap_err();
            assert_eq!(refused.kind, kind, "{settings}");
            assert_eq!(toggles.trace_get(None)["trace_rate"], "1000");
        }
    }

    #[test]
    fn log_settings_change_through_the_hook_only() {
        let toggles = Toggles::default();
        let quiet = json!({"log_info": false, "log_verbose_level": 1});
        assert_eq!(toggles.log_update(&quiet).unwrap_err().kind, ErrorKind::Unsupported);
        assert_eq!(toggles.log_update(&json!({"log_info": true})).unwrap()["log_info"], true);
        let seen = Arc::new(Mutex::new(None));
        let sink = Arc::clone(&seen);
        toggles.on_log(Box::new(move |log| *sink.lock() = Some(log)));
        assert_eq!(toggles.log_update(&quiet).unwrap()["log_verbose_level"], 1);
        assert!(seen.lock().is_some_and(|log| !log.info && log.verbose_level == 1));
        assert!(toggles.log_update(&json!({"log_file": "x"})).is_err());
        assert_eq!(toggles.log_get()["log_info"], false);
    }
}
