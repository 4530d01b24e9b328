//! The layers of a configuration, laid over each other key by key, and its problems.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::Path;

use toml::Value;

use super::ServeArgs;
use super::schema::{self, Key, Kind};

/// Largest configuration file that is read.
const FILE_SIZE_MAX: u64 = 1 << 20;

/// Read by the commands over the admin API, which often run where the gateway does.
const OF_THE_CLI: &str = "TIDEGATE_ADMIN_TOKEN";

/// One thing that is wrong, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Key (`server.http_address`), or file.
    pub path: String,
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.path, self.message)
    }
}

/// Everything that is wrong; never empty when given as an error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Problems(pub Vec<Problem>);

impl Problems {
    pub fn add(&mut self, path: impl Into<String>, message: impl Into<String>) {
        self.0.push(Problem { path: path.into(), message: message.into() });
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, problem) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// A value and where it came from, for messages.
struct Entry {
    value: Value,
    origin: String,
}

#[derive(Default)]
pub(super) struct Layers {
    entries: BTreeMap<&'static str, Entry>,
    pub(super) problems: Problems,
    pub(super) notes: Vec<String>,
}

impl Layers {
    pub(super) fn read_file(&mut self, path: &Path) {
        let shown = path.display().to_string();
        let text = std::fs::metadata(path).and_then(|meta| {
            if meta.len() > FILE_SIZE_MAX {
                let why = format!("file has {} bytes, the limit is {FILE_SIZE_MAX}", meta.len());
                return Err(std::io::Error::other(why));
            }
            std::fs::read_to_string(path)
        });
        match text {
            Ok(text) => self.add_file(&shown, &text),
            Err(error) => self.problems.add(shown, format!("cannot be read: {error}")),
        }
    }

    fn add_file(&mut self, shown: &str, text: &str) {
        let table: toml::Table = match text.parse() {
            Ok(table) => table,
            Err(error) => {
                let error = error.to_string();
                return self.problems.add(shown, format!("is not TOML: {}", error.trim_end()));
            }
        };
        for (section, content) in table {
            let prefix = format!("{section}.");
            if !schema::KEYS.iter().any(|key| key.path.starts_with(&prefix)) {
                self.problems.add(section, "unknown section");
                continue;
            }
            let Value::Table(content) = content else {
                let got = content.type_str();
                self.problems.add(section, format!("expected a section, got a value ({got})"));
                continue;
            };
            for (name, value) in content {
                let path = format!("{prefix}{name}");
                match schema::find(&path) {
                    Some(key) => self.set(key, value, shown.to_owned()),
                    None => self.problems.add(path, "unknown key"),
                }
            }
        }
    }

    pub(super) fn add_environment(&mut self, environment: impl Iterator<Item = (String, String)>) {
        let keys: BTreeMap<String, &'static Key> =
            schema::KEYS.iter().map(|key| (schema::variable(key.path), key)).collect();
        for (name, text) in environment {
            if let Some(key) = keys.get(&name) {
                self.set(key, from_text(key.kind, text), name);
            } else if name.starts_with("TIDEGATE_") && name != OF_THE_CLI {
                // Not a problem: orchestrators inject variables named after services.
                self.notes.push(format!("environment variable {name} is no key and has no effect"));
            }
        }
    }

    pub(super) fn add_flags(&mut self, args: &ServeArgs) {
        let texts = [
            ("repository.path", "--model-repository", &args.model_repository),
            ("repository.model_name", "--model-name", &args.model_name),
            ("server.state_dir", "--state-dir", &args.state_dir),
            ("server.http_address", "--http-address", &args.http_address),
            ("server.grpc_address", "--grpc-address", &args.grpc_address),
            ("server.metrics_address", "--metrics-address", &args.metrics_address),
            ("server.admin_address", "--admin-address", &args.admin_address),
            ("engine.engine", "--engine", &args.engine),
            ("log.format", "--log-format", &args.log_format),
        ];
        for (path, flag, text) in texts {
            if let (Some(key), Some(text)) = (schema::find(path), text) {
                self.set(key, Value::String(text.clone()), flag.to_owned());
            }
        }
        let unauthenticated = args.allow_unauthenticated.then_some(true);
        let switches = [
            ("server.allow_unauthenticated", "--allow-unauthenticated", unauthenticated),
            ("telemetry.triton_metrics", "--triton-metrics", args.triton_metrics),
        ];
        for (path, flag, switch) in switches {
            if let (Some(key), Some(switch)) = (schema::find(path), switch) {
                self.set(key, Value::Boolean(switch), flag.to_owned());
            }
        }
    }

    fn set(&mut self, key: &'static Key, value: Value, origin: String) {
        self.entries.insert(key.path, Entry { value, origin });
    }

    /// The key's value when it is right; notes the problem and gives `None` otherwise.
    fn checked(&mut self, path: &str) -> Option<Value> {
        let Some(key) = schema::find(path) else {
            self.problems.add(path, "is read but no key of the schema");
            return None;
        };
        let Some(entry) = self.entries.get(key.path) else {
            return (!key.default.is_empty()).then(|| from_text(key.kind, key.default.to_owned()));
        };
        match mismatch(key.kind, &entry.value) {
            None => Some(entry.value.clone()),
            Some(expected) => {
                let got = match key.kind {
                    // What stands there is long, and was meant to name secrets.
                    Kind::Tables => entry.value.type_str().to_owned(),
                    _ => entry.value.to_string(),
                };
                let message = format!("expected {expected}, got {got} ({})", entry.origin);
                self.problems.add(path, message);
                None
            }
        }
    }

    pub(super) fn text(&mut self, path: &str) -> Option<String> {
        match self.checked(path)? {
            Value::String(text) if !text.is_empty() => Some(text),
            _ => None,
        }
    }

    pub(super) fn flag(&mut self, path: &str) -> bool {
        self.checked(path).and_then(|value| value.as_bool()).unwrap_or(false)
    }

    /// A number within the key's bounds; 0 after a problem.
    pub(super) fn number(&mut self, path: &str) -> u64 {
        let number = self.checked(path).and_then(|value| value.as_integer()).unwrap_or(0);
        u64::try_from(number).unwrap_or(0)
    }

    pub(super) fn size(&mut self, path: &str) -> usize {
        usize::try_from(self.number(path)).unwrap_or(usize::MAX)
    }

    pub(super) fn millis(&mut self, path: &str) -> std::time::Duration {
        std::time::Duration::from_millis(self.number(path))
    }

    pub(super) fn ratio(&mut self, path: &str) -> f64 {
        self.checked(path).and_then(|value| number_of(&value)).unwrap_or(0.0)
    }

    /// The tables of a list; none after a problem.
    pub(super) fn tables(&mut self, path: &str) -> Vec<toml::Table> {
        let list = self.checked(path).and_then(|value| value.as_array().cloned());
        let tables = list.unwrap_or_default().into_iter();
        tables.filter_map(|value| value.as_table().cloned()).collect()
    }

    /// An address; any free port of this machine after a problem.
    pub(super) fn address(&mut self, path: &str) -> SocketAddr {
        let text = self.text(path);
        text.and_then(|text| address(&text))
            .unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], 0)))
    }
}

/// What the kind expects, when `value` is not that.
fn mismatch(kind: Kind, value: &Value) -> Option<String> {
    let (right, expected) = match kind {
        Kind::Text => (value.is_str(), "a text".to_owned()),
        Kind::Bool => (value.is_bool(), "true or false".to_owned()),
        Kind::Int(min, max) => {
            let right = value.as_integer().is_some_and(|number| (min..=max).contains(&number));
            (right, format!("a whole number from {min} to {max}"))
        }
        Kind::Ratio => {
            let right = number_of(value).is_some_and(|number| (0.0..=1.0).contains(&number));
            (right, "a number from 0 to 1".to_owned())
        }
        Kind::Address => {
            let right = value.as_str().and_then(address).is_some();
            (right, "an IP address and port like 127.0.0.1:8000".to_owned())
        }
        Kind::Tables => {
            let tables = value.as_array().is_some_and(|list| list.iter().all(Value::is_table));
            (tables, "a list of tables".to_owned())
        }
        Kind::OneOf(words) => {
            let right = value.as_str().is_some_and(|text| words.contains(&text));
            (right, format!("one of {}", words.join(", ")))
        }
    };
    (!right).then_some(expected)
}

fn number_of(value: &Value) -> Option<f64> {
    match value {
        Value::Float(number) => Some(*number),
        Value::Integer(0) => Some(0.0),
        Value::Integer(1) => Some(1.0),
        _ => None,
    }
}

fn address(text: &str) -> Option<SocketAddr> {
    // The one name everyone writes, and no resolver is asked for it.
    match text.strip_prefix("localhost:") {
        Some(port) => Some(SocketAddr::from(([127, 0, 0, 1], port.parse().ok()?))),
        None => text.parse().ok(),
    }
}

/// As TOML has it: `[{name = "ops"}]`.
fn list(text: &str) -> Option<Value> {
    let table = format!("list = {text}").parse::<toml::Table>().ok()?;
    // Nothing but one value: a text may not bring keys of its own.
    table.get("list").filter(|_| table.len() == 1).cloned()
}

/// A text of the environment as the kind's TOML value; left a text when it is none.
fn from_text(kind: Kind, text: String) -> Value {
    let value = match kind {
        Kind::Bool => text.parse().ok().map(Value::Boolean),
        Kind::Int(..) => text.parse().ok().map(Value::Integer),
        Kind::Ratio => text.parse().ok().map(Value::Float),
        Kind::Tables => list(&text),
        Kind::Text | Kind::Address | Kind::OneOf(_) => None,
    };
    value.unwrap_or(Value::String(text))
}
