//! The repository: index, load and unload.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::json::{Object, ParametersJson, from_slice};
use super::reply::Reply;
use crate::domain::{
    ErrorKind, Failure, IndexEntry, ModelFile, ModelName, ParameterValue, VersionState,
};
use crate::transport::Api;
use crate::transport::auth::Caller;

/// Prefix of a parameter that brings a file.
const FILE: &str = "file:";

#[derive(Default, Deserialize)]
struct IndexJson {
    #[serde(default)]
    ready: bool,
}

#[derive(Default, Deserialize)]
struct ControlJson {
    #[serde(default)]
    parameters: ParametersJson,
}

pub(super) fn index(api: &Api, caller: &Caller, body: &[u8]) -> Result<Reply, Failure> {
    let IndexJson { ready } = optional(body)?;
    let entries = api.gateway.control().index();
    let entries = entries.iter().filter(|entry| caller.sees(&entry.model));
    let entries = entries.filter(|entry| !ready || entry.state == VersionState::Ready);
    Ok(Reply::value(&entries.map(entry_json).collect::<Value>()))
}

fn entry_json(entry: &IndexEntry) -> Value {
    let mut members = Map::new();
    members.insert("name".to_owned(), json!(entry.model));
    let version = entry.version.map(|version| version.to_string());
    members.insert("version".to_owned(), json!(version.unwrap_or_default()));
    members.insert("state".to_owned(), json!(entry.state.as_str()));
    if !entry.reason.is_empty() {
        members.insert("reason".to_owned(), json!(entry.reason));
    }
    Value::Object(members)
}

pub(super) async fn load(api: &Api, model: &ModelName, body: &[u8]) -> Result<Reply, Failure> {
    allowed(api)?;
    let ControlJson { parameters } = optional(body)?;
    let (config, files) = load_parameters(parameters)?;
    api.gateway.control().load(model, config.as_deref(), files).await?;
    Ok(Reply::empty(http::StatusCode::OK))
}

pub(super) async fn unload(api: &Api, model: &ModelName, body: &[u8]) -> Result<Reply, Failure> {
    allowed(api)?;
    let ControlJson { parameters } = optional(body)?;
    for (key, value) in parameters.0 {
        // No model depends on another here, so there is nothing more to unload.
        if key != "unload_dependents" || !matches!(value, ParameterValue::Bool(_)) {
            return Err(Failure::invalid(format!(
                "parameter '{key}' is unknown, expected 'unload_dependents', a boolean"
            )));
        }
    }
    api.gateway.control().unload(model).await?;
    Ok(Reply::empty(http::StatusCode::OK))
}

fn allowed(api: &Api) -> Result<(), Failure> {
    if api.settings.model_control {
        return Ok(());
    }
    let message =
        "loading and unloading over this port is off, set 'repository.model_control' to allow it";
    Err(Failure::new(ErrorKind::Forbidden, message))
}

/// Clients send no body at all when they have nothing to say.
fn optional<'a, T: Default + Deserialize<'a>>(body: &'a [u8]) -> Result<T, Failure> {
    if body.iter().all(u8::is_ascii_whitespace) {
        return Ok(T::default());
    }
    from_slice::<Object<T>>(body).map(|Object(value)| value)
}

fn load_parameters(
    parameters: ParametersJson,
) -> Result<(Option<String>, Vec<ModelFile>), Failure> {
    let mut config = None;
    let mut files = Vec::new();
    for (key, value) in parameters.0 {
        let ParameterValue::String(text) = value else {
            return Err(Failure::invalid(format!("parameter '{key}' must be a string")));
        };
        if key == "config" {
            config = Some(text);
        } else if let Some(path) = key.strip_prefix(FILE) {
            let content = STANDARD.decode(&text).map_err(|error| {
                Failure::invalid(format!("parameter '{key}' is no base64: {error}"))
            })?;
            files.push(ModelFile { path: path.to_owned(), content: content.into() });
        } else {
            return Err(Failure::invalid(format!(
                "parameter '{key}' is unknown, expected 'config' or 'file:<path>'"
            )));
        }
    }
    if config.is_none() && !files.is_empty() {
        return Err(Failure::invalid("files need parameter 'config' beside them"));
    }
    Ok((config, files))
}
