//! Who is told of alerts, and in which words: CloudEvents for any system, and calls that start a
//! pipeline at GitHub, GitLab, Jenkins and Kubeflow Pipelines.
//!
//! | kind | call | secret |
//! | --- | --- | --- |
//! | `cloudevents` | CloudEvents 1.0, structured, signed as Standard Webhooks are | key |
//! | `github` | `POST /repos/{owner}/{repo}/dispatches` | bearer token |
//! | `gitlab` | `POST /api/v4/projects/{project}/trigger/pipeline` | trigger token |
//! | `jenkins` | `POST {job}/buildWithParameters` | API token of a user |
//! | `kubeflow` | `POST /apis/v2beta1/runs` | bearer token |
//!
//! Invariants:
//! - A body is bounded: an alert lists few features, and its names and texts are cut.
//! - The same event makes the same body, whenever it is sent.

use std::collections::BTreeMap;
use std::time::Duration;

use jiff::Timestamp;
use reqwest::header::{ACCEPT, CONTENT_TYPE};
use reqwest::{Client, RequestBuilder};
use serde_json::{Value, json};
use url::Url;

use super::board::{Alert, Phase};
use super::condition::{Kind, Severity};
use crate::admit::ModelPatterns;
use crate::outbound::{self, Key, RequestError};
use crate::secret::{Secret, SecretRef};

/// Type of an event: this, and `firing`, `resolved` or `test`.
pub const TYPE_PREFIX: &str = "dev.tidegate.alert.";
/// Parameters of one pipeline.
pub const PARAMETERS_MAX: usize = 32;
/// Bytes of a parameter's value.
const PARAMETER_BYTES_MAX: usize = 1024;
/// The version of GitHub's API that this is written for.
const GITHUB_VERSION: &str = "2022-11-28";

/// What a parameter's text may have in braces.
pub const PLACEHOLDERS: [&str; 11] = [
    "event", "alert", "state", "model", "version", "arm", "kind", "about", "severity", "summary",
    "features",
];

/// Who is told, of what, and how often.
#[derive(Clone, Debug)]
pub struct Receiver {
    /// Stands in the journal, metrics and the admin API.
    pub name: String,
    pub target: Target,
    pub secret: SecretRef,
    /// `None`: all of them.
    pub models: Option<ModelPatterns>,
    pub kinds: Vec<Kind>,
    pub severity_min: Severity,
    /// Whether it is told that an alert is over.
    pub resolved: bool,
    /// After which an alert that still fires is told again; zero: never.
    pub repeat: Duration,
    /// For which it is told of no other alert of the same model; zero: none.
    pub cooldown: Duration,
}

/// Where it is, and what it takes.
#[derive(Clone, Debug)]
pub enum Target {
    CloudEvents {
        url: Url,
    },
    GitHub {
        api: Url,
        owner: String,
        repository: String,
        event_type: String,
    },
    GitLab {
        url: Url,
        project: String,
        branch: String,
        parameters: Parameters,
    },
    Jenkins {
        job: Url,
        user: String,
        parameters: Parameters,
    },
    Kubeflow {
        url: Url,
        pipeline: String,
        pipeline_version: Option<String>,
        experiment: Option<String>,
        parameters: Parameters,
    },
}

/// Names of a pipeline's parameters, and texts with [`PLACEHOLDERS`] in braces.
pub type Parameters = BTreeMap<String, String>;

/// What is told.
#[derive(Clone, Debug)]
pub struct Event {
    pub id: String,
    /// `firing`, `resolved` or `test`.
    pub word: &'static str,
    pub at: Timestamp,
    /// Of the telling that it fires; 0 of a test.
    pub number: u32,
    pub alert: Alert,
}

impl Event {
    pub fn of(alert: &Alert, phase: Phase, number: u32) -> Self {
        let (word, at) = match phase {
            Phase::Firing => ("firing", alert.fired_at),
            Phase::Resolved => ("resolved", alert.resolved_at.unwrap_or(alert.fired_at)),
        };
        let id = alert.event_id(phase, number);
        Self { id, word, at, number, alert: alert.clone() }
    }

    fn data(&self) -> Value {
        let alert = &self.alert;
        json!({
            "alert": alert.id, "state": self.word, "number": self.number,
            "model": alert.model, "version": alert.version, "arm": alert.arm,
            "kind": alert.kind, "about": alert.about, "severity": alert.severity,
            "summary": alert.summary,
            "since": alert.since.to_string(), "fired_at": alert.fired_at.to_string(),
            "resolved_at": alert.resolved_at.map(|at| at.to_string()),
            "resolution": alert.resolution,
            "detail": alert.detail,
        })
    }

    fn cloud_event(&self) -> Vec<u8> {
        let Alert { id, model, version, .. } = &self.alert;
        let event = json!({
            "specversion": "1.0",
            "id": self.id,
            "source": "/tidegate",
            "type": format!("{TYPE_PREFIX}{}", self.word),
            "subject": format!("models/{model}/versions/{version}/alerts/{id}"),
            "time": self.at.to_string(),
            "datacontenttype": "application/json",
            "data": self.data(),
        });
        event.to_string().into_bytes()
    }

    /// GitHub takes ten properties at most.
    fn client_payload(&self) -> Value {
        let alert = &self.alert;
        json!({
            "event": self.id, "state": self.word,
            "model": alert.model, "version": alert.version, "arm": alert.arm,
            "kind": alert.kind, "about": alert.about, "severity": alert.severity,
            "summary": alert.summary, "detail": alert.detail,
        })
    }

    fn value(&self, placeholder: &str) -> Option<String> {
        let alert = &self.alert;
        Some(match placeholder {
            "event" => self.id.clone(),
            "alert" => alert.id.clone(),
            "state" => self.word.to_owned(),
            "model" => alert.model.to_string(),
            "version" => alert.version.to_string(),
            "arm" => alert.arm.clone(),
            "kind" => alert.kind.as_str().to_owned(),
            "about" => alert.about.clone(),
            "severity" => alert.severity.as_str().to_owned(),
            "summary" => alert.summary.clone(),
            "features" => {
                let names: Vec<&str> =
                    alert.detail.features.iter().map(|of| of.feature.as_str()).collect();
                names.join(",")
            }
            _ => return None,
        })
    }

    /// A parameter's text with the values in it.
    fn filled(&self, text: &str) -> String {
        let mut filled = String::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            filled.push_str(before);
            let named = after.split_once('}');
            match named.and_then(|(name, after)| Some((self.value(name)?, after))) {
                Some((value, after)) => {
                    filled.push_str(&value);
                    rest = after;
                }
                None => {
                    filled.push('{');
                    rest = after;
                }
            }
        }
        filled.push_str(rest);
        let end = filled.floor_char_boundary(PARAMETER_BYTES_MAX);
        filled.truncate(end);
        filled
    }
}

impl Target {
    /// The word of the configuration.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::CloudEvents { .. } => "cloudevents",
            Self::GitHub { .. } => "github",
            Self::GitLab { .. } => "gitlab",
            Self::Jenkins { .. } => "jenkins",
            Self::Kubeflow { .. } => "kubeflow",
        }
    }

    /// Where it begins.
    pub fn url(&self) -> &Url {
        match self {
            Self::CloudEvents { url } | Self::GitLab { url, .. } | Self::Kubeflow { url, .. } => {
                url
            }
            Self::GitHub { api, .. } => api,
            Self::Jenkins { job, .. } => job,
        }
    }
}

/// The parameters that a pipeline gets when nothing is said of them.
pub fn usual_parameters() -> Parameters {
    let names = PLACEHOLDERS
        .iter()
        .map(|name| (format!("TIDEGATE_{}", name.to_ascii_uppercase()), format!("{{{name}}}")));
    names.collect()
}

/// The address with more segments of its path; each is encoded.
fn below(url: &Url, segments: &[&str]) -> Url {
    let mut url = url.clone();
    if let Ok(mut path) = url.path_segments_mut() {
        path.pop_if_empty().extend(segments);
    }
    url
}

impl Receiver {
    pub fn wants(&self, alert: &Alert) -> bool {
        self.kinds.contains(&alert.kind)
            && alert.severity >= self.severity_min
            && self.models.as_ref().is_none_or(|models| models.matches(&alert.model))
    }

    /// The call that tells it; made anew for each try, so that the secret is the one of this moment.
    ///
    /// # Errors
    /// When the secret cannot be read, or is none to sign with.
    pub fn request(
        &self,
        client: &Client,
        event: &Event,
    ) -> Result<(RequestBuilder, Secret), RequestError> {
        let secret = self.secret.read()?;
        let filled = |parameters: &Parameters| -> Parameters {
            parameters.iter().map(|(name, text)| (name.clone(), event.filled(text))).collect()
        };
        let request = match &self.target {
            Target::CloudEvents { url } => {
                let key = Key::of(&secret)?;
                let request = client
                    .post(url.clone())
                    .header(CONTENT_TYPE, "application/cloudevents+json; charset=utf-8");
                outbound::signed(request, &key, &event.id, event.cloud_event())
            }
            Target::GitHub { api, owner, repository, event_type } => client
                .post(below(api, &["repos", owner, repository, "dispatches"]))
                .header(ACCEPT, "application/vnd.github+json")
                .header("x-github-api-version", GITHUB_VERSION)
                .bearer_auth(secret.expose())
                .json(&json!({"event_type": event_type, "client_payload": event.client_payload()})),
            Target::GitLab { url, project, branch, parameters } => {
                let mut form = vec![
                    ("token".to_owned(), secret.expose().to_owned()),
                    ("ref".to_owned(), branch.clone()),
                ];
                let variables = filled(parameters).into_iter();
                form.extend(variables.map(|(name, value)| (format!("variables[{name}]"), value)));
                let path = ["api", "v4", "projects", project, "trigger", "pipeline"];
                form_of(client.post(below(url, &path)), form)
            }
            Target::Jenkins { job, user, parameters } => {
                let request = client.post(below(job, &["buildWithParameters"]));
                form_of(request.basic_auth(user, Some(secret.expose())), filled(parameters))
            }
            Target::Kubeflow { url, pipeline, pipeline_version, experiment, parameters } => {
                let mut reference = json!({"pipeline_id": pipeline});
                if let Some(version) = pipeline_version {
                    reference["pipeline_version_id"] = json!(version);
                }
                let mut run = json!({
                    "display_name": event.filled("tidegate {model} {version} {event}"),
                    "description": event.filled("{summary}"),
                    "pipeline_version_reference": reference,
                    "runtime_config": {"parameters": filled(parameters)},
                });
                if let Some(experiment) = experiment {
                    run["experiment_id"] = json!(experiment);
                }
                let path = ["apis", "v2beta1", "runs"];
                client.post(below(url, &path)).bearer_auth(secret.expose()).json(&run)
            }
        };
        Ok((request, secret))
    }
}

fn form_of(
    request: RequestBuilder,
    fields: impl IntoIterator<Item = (String, String)>,
) -> RequestBuilder {
    let mut form = url::form_urlencoded::Serializer::new(String::new());
    form.extend_pairs(fields);
    request.header(CONTENT_TYPE, "application/x-www-form-urlencoded").body(form.finish())
}

#[cfg(test)]
mod tests;
