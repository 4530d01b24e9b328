//! From the section `[alerts]` to when alerts fire and who is told of them.

use std::collections::BTreeSet;
use std::time::Duration;

use toml::{Table, Value};

use super::layers::{Layers, Problems};
use crate::admit::ModelPatterns;
use crate::control::alerts::board::Times;
use crate::control::alerts::condition::{Kind, Limits, QualityLimit, Severity};
use crate::control::alerts::receiver::{
    PARAMETERS_MAX, PLACEHOLDERS, Parameters, Receiver, Target, usual_parameters,
};
use crate::control::alerts::{COOLDOWN_MAX, RECEIVERS_MAX, Settings};
use crate::outbound;
use crate::secret::SecretRef;

const DAY: Duration = Duration::from_secs(86_400);
/// Limits of figures that there may be.
const QUALITY_MAX: usize = 64;
/// Longest text of a table.
const TEXT_LEN_MAX: usize = 1024;
/// Longest name of a receiver.
const NAME_LEN_MAX: usize = 64;
/// GitHub takes no longer ones.
const EVENT_TYPE_LEN_MAX: usize = 100;
/// What may be wrong with rows, by its key.
const ODD: [(&str, &str); 5] = [
    ("missing", "alerts.missing_max"),
    ("nan", "alerts.nan_max"),
    ("infinite", "alerts.infinite_max"),
    ("out_of_range", "alerts.out_of_range_max"),
    ("unseen_category", "alerts.unseen_category_max"),
];

pub(super) fn settings(from: &mut Layers) -> Settings {
    let odd = ODD.map(|(kind, path)| (kind, from.ratio(path)));
    Settings {
        enabled: from.flag("alerts.enabled"),
        interval: Duration::from_secs(from.number("monitor.interval_s").max(1)),
        times: Times {
            for_: Duration::from_secs(from.number("alerts.for_s")),
            keep_firing_for: Duration::from_secs(from.number("alerts.keep_firing_for_s")),
        },
        limits: Limits {
            rows_min: from.number("alerts.rows_min"),
            window: if from.text("alerts.window").as_deref() == Some("day") {
                "day"
            } else {
                "hour"
            },
            // All rows are no limit.
            odd_max: odd.into_iter().filter(|(_, max)| *max < 1.0).collect(),
            quality: quality(from),
        },
        receivers: receivers(from),
        outbound: outbound::Settings {
            timeout: from.millis("alerts.timeout_ms"),
            attempts_max: u32::try_from(from.number("alerts.attempts_max")).unwrap_or(u32::MAX),
            backoff: Duration::from_secs(1),
        },
    }
}

fn receivers(from: &mut Layers) -> Vec<Receiver> {
    const PATH: &str = "alerts.receivers";
    let tables = from.tables(PATH);
    if tables.len() > RECEIVERS_MAX {
        let got = tables.len();
        from.problems.add(PATH, format!("expected at most {RECEIVERS_MAX} receivers, got {got}"));
    }
    let mut names = BTreeSet::new();
    let mut receivers = Vec::new();
    for (at, table) in tables.into_iter().take(RECEIVERS_MAX).enumerate() {
        let mut row = Row { path: format!("{PATH}[{at}]"), table, problems: &mut from.problems };
        let receiver = receiver(&mut row);
        row.end();
        let Some(receiver) = receiver else { continue };
        if !names.insert(receiver.name.clone()) {
            let message = format!("the name '{}' is there twice", receiver.name);
            from.problems.add(format!("{PATH}[{at}].name"), message);
        }
        receivers.push(receiver);
    }
    receivers
}

fn receiver(row: &mut Row<'_>) -> Option<Receiver> {
    let name = row.needed("name");
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    let fits = |name: &String| name.len() <= NAME_LEN_MAX && name.bytes().all(plain);
    if name.as_ref().is_some_and(|name| !fits(name)) {
        row.problem("name", format!("expected up to {NAME_LEN_MAX} of 'a-z', 'A-Z', '0-9', '._-'"));
    }
    let secret = row.needed("secret").and_then(|text| {
        let parsed = text.parse::<SecretRef>();
        parsed.map_err(|error| row.problem("secret", error.to_string())).ok()
    });
    let target = target(row);
    // A pipeline is started for what another model might be better at, and once.
    let pipeline = !matches!(target, Some(Target::CloudEvents { .. }));
    let usual: &[Kind] = if pipeline { &[Kind::Drift, Kind::Quality] } else { &Kind::ALL };
    let kinds = row.list("kinds").map(|words| {
        let known = |word: &String| Kind::ALL.into_iter().find(|kind| kind.as_str() == word);
        let kinds: Option<Vec<Kind>> = words.iter().map(known).collect();
        kinds.unwrap_or_else(|| {
            let all = Kind::ALL.map(Kind::as_str).join(", ");
            row.problem("kinds", format!("expected some of {all}"));
            Vec::new()
        })
    });
    let severity = row.text("severity_min").map(|word| {
        let known = Severity::ALL.into_iter().find(|severity| severity.as_str() == word);
        known.unwrap_or_else(|| {
            let all = Severity::ALL.map(Severity::as_str).join(", ");
            row.problem("severity_min", format!("expected one of {all}"));
            Severity::Info
        })
    });
    let models = models(row);
    let resolved = row.flag("resolved").unwrap_or(!pipeline);
    let repeat = row.seconds("repeat_s").unwrap_or(if pipeline { Duration::ZERO } else { DAY });
    let cooldown = row.seconds("cooldown_s").unwrap_or(if pipeline { DAY } else { Duration::ZERO });
    Some(Receiver {
        name: name?,
        target: target?,
        secret: secret?,
        models,
        kinds: kinds.unwrap_or_else(|| usual.to_vec()),
        severity_min: severity.unwrap_or(Severity::Info),
        resolved,
        repeat,
        cooldown,
    })
}

fn target(row: &mut Row<'_>) -> Option<Target> {
    let kind = row.needed("kind")?;
    match kind.as_str() {
        "cloudevents" => Some(Target::CloudEvents { url: row.url("url", None)? }),
        "github" => {
            let api = row.url("url", Some("https://api.github.com"));
            let event_type = row.text("event_type").unwrap_or_else(|| "tidegate-alert".to_owned());
            if event_type.len() > EVENT_TYPE_LEN_MAX {
                row.problem("event_type", format!("expected at most {EVENT_TYPE_LEN_MAX} bytes"));
            }
            let repository = row.needed("repository")?;
            let parts = repository.split_once('/').filter(|(owner, name)| {
                let fits = |part: &str| !part.is_empty() && !part.contains('/') && part != "..";
                fits(owner) && fits(name)
            });
            let Some((owner, name)) = parts else {
                row.problem("repository", "expected OWNER/NAME".to_owned());
                return None;
            };
            let (owner, repository) = (owner.to_owned(), name.to_owned());
            Some(Target::GitHub { api: api?, owner, repository, event_type })
        }
        "gitlab" => {
            let url = row.url("url", Some("https://gitlab.com"));
            let (project, branch) = (row.needed("project"), row.text("ref"));
            let parameters = parameters(row).unwrap_or_else(usual_parameters);
            let branch = branch.unwrap_or_else(|| "main".to_owned());
            Some(Target::GitLab { url: url?, project: project?, branch, parameters })
        }
        "jenkins" => {
            let (job, user) = (row.url("url", None), row.needed("user"));
            let parameters = parameters(row).unwrap_or_else(usual_parameters);
            Some(Target::Jenkins { job: job?, user: user?, parameters })
        }
        "kubeflow" => {
            let (url, pipeline) = (row.url("url", None), row.needed("pipeline_id"));
            let pipeline_version = row.text("pipeline_version_id");
            let experiment = row.text("experiment_id");
            // It refuses parameters that a pipeline has not.
            let parameters = parameters(row).unwrap_or_default();
            let (url, pipeline) = (url?, pipeline?);
            Some(Target::Kubeflow { url, pipeline, pipeline_version, experiment, parameters })
        }
        _ => {
            let all = "cloudevents, github, gitlab, jenkins, kubeflow";
            row.problem("kind", format!("expected one of {all}"));
            None
        }
    }
}

/// Names, and texts whose braces name something that there is.
fn parameters(row: &mut Row<'_>) -> Option<Parameters> {
    let table = match row.table.remove("parameters")? {
        Value::Table(table) => table,
        _ => {
            row.problem("parameters", "expected names and texts".to_owned());
            return None;
        }
    };
    if table.len() > PARAMETERS_MAX {
        row.problem("parameters", format!("expected at most {PARAMETERS_MAX}"));
    }
    let mut parameters = Parameters::new();
    for (name, value) in table {
        let text = value.as_str().filter(|text| text.len() <= TEXT_LEN_MAX);
        let Some(text) = text.filter(|_| name.len() <= TEXT_LEN_MAX) else {
            row.problem("parameters", format!("expected texts of up to {TEXT_LEN_MAX} bytes"));
            continue;
        };
        let named = text.split('{').skip(1).filter_map(|rest| Some(rest.split_once('}')?.0));
        for unknown in named.filter(|named| !PLACEHOLDERS.contains(named)) {
            let all = PLACEHOLDERS.join(", ");
            row.problem("parameters", format!("'{{{unknown}}}' is none of {all}"));
        }
        parameters.insert(name, text.to_owned());
    }
    Some(parameters)
}

fn models(row: &mut Row<'_>) -> Option<ModelPatterns> {
    let patterns = row.list("models")?;
    let parsed = ModelPatterns::parse(&patterns);
    parsed.map_err(|error| row.problem("models", error.to_string())).ok().flatten()
}

fn quality(from: &mut Layers) -> Vec<QualityLimit> {
    const PATH: &str = "alerts.quality";
    let tables = from.tables(PATH);
    if tables.len() > QUALITY_MAX {
        let got = tables.len();
        from.problems.add(PATH, format!("expected at most {QUALITY_MAX} limits, got {got}"));
    }
    let mut limits = Vec::new();
    for (at, table) in tables.into_iter().take(QUALITY_MAX).enumerate() {
        let mut row = Row { path: format!("{PATH}[{at}]"), table, problems: &mut from.problems };
        let (models, metric) = (models(&mut row), row.needed("metric"));
        let (min, max) = (row.number("min"), row.number("max"));
        if min.is_none() && max.is_none() {
            row.problem("min", "expected min, max or both".to_owned());
        }
        let days = row.whole("days", 1, 3650).and_then(|days| u32::try_from(days).ok());
        row.end();
        limits.extend(metric.map(|metric| QualityLimit { models, metric, min, max, days }));
    }
    limits
}

/// One table of a list, whose keys are taken out as they are read.
struct Row<'a> {
    path: String,
    table: Table,
    problems: &'a mut Problems,
}

impl Row<'_> {
    fn problem(&mut self, key: &str, message: String) {
        self.problems.add(format!("{}.{key}", self.path), message);
    }

    /// Takes a value; what it is not is not repeated: it may be a secret.
    fn take<T>(
        &mut self,
        key: &str,
        expected: &str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Option<T> {
        let value = self.table.remove(key)?;
        let read = read(&value);
        if read.is_none() {
            self.problem(key, format!("expected {expected}, got another {}", value.type_str()));
        }
        read
    }

    fn text(&mut self, key: &str) -> Option<String> {
        let fits = |text: &&str| !text.is_empty() && text.len() <= TEXT_LEN_MAX;
        let expected = format!("a text of 1 to {TEXT_LEN_MAX} bytes");
        self.take(key, &expected, |value| value.as_str().filter(fits).map(ToOwned::to_owned))
    }

    fn needed(&mut self, key: &str) -> Option<String> {
        if !self.table.contains_key(key) {
            self.problem(key, "is missing".to_owned());
        }
        self.text(key)
    }

    fn flag(&mut self, key: &str) -> Option<bool> {
        self.take(key, "true or false", Value::as_bool)
    }

    fn number(&mut self, key: &str) -> Option<f64> {
        let read =
            |value: &Value| value.as_float().or(value.as_integer().map(|whole| whole as f64));
        self.take(key, "a number", |value| read(value).filter(|number| number.is_finite()))
    }

    fn whole(&mut self, key: &str, min: i64, max: i64) -> Option<i64> {
        let expected = format!("a whole number from {min} to {max}");
        let fits = |number: &i64| (min..=max).contains(number);
        self.take(key, &expected, |value| value.as_integer().filter(fits))
    }

    fn seconds(&mut self, key: &str) -> Option<Duration> {
        let max = i64::try_from(COOLDOWN_MAX.as_secs()).unwrap_or(i64::MAX);
        let seconds = self.whole(key, 0, max)?;
        u64::try_from(seconds).ok().map(Duration::from_secs)
    }

    fn list(&mut self, key: &str) -> Option<Vec<String>> {
        let texts = |value: &Value| -> Option<Vec<String>> {
            value.as_array()?.iter().map(|text| Some(text.as_str()?.to_owned())).collect()
        };
        self.take(key, "a list of texts", texts)
    }

    fn url(&mut self, key: &str, usual: Option<&str>) -> Option<url::Url> {
        if usual.is_none() && !self.table.contains_key(key) {
            self.problem(key, "is missing".to_owned());
        }
        let text = self.text(key).or(usual.map(ToOwned::to_owned))?;
        let parsed = outbound::parse_url(&text);
        parsed.map_err(|problem| self.problem(key, problem)).ok()
    }

    fn end(self) {
        for key in self.table.keys() {
            self.problems.add(format!("{}.{key}", self.path), "unknown key");
        }
    }
}
