//! The part of MLflow's REST API that is read.
//!
//! Invariant: an answer has a largest size, a list a largest number of pages, and a page token that
//! comes twice ends it with an error.

use std::collections::{BTreeMap, HashSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use http::StatusCode;
use http::header::{AUTHORIZATION, HeaderValue};
use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer};
use tokio::sync::Semaphore;
use url::Url;

use super::super::download::{Backoff, again};
use super::super::net::{self, Net};
use super::super::{MODELS_MAX, MlflowSettings, SecretRef, SourceError, VERSIONS_MAX};
use crate::bucket;
use crate::control::lineage::{ENTRIES_MAX, short};

const API: &str = "api/2.0/mlflow";
pub(super) const ARTIFACTS: &str = "api/2.0/mlflow-artifacts/artifacts";
/// Largest answer of the API.
const ANSWER_SIZE_MAX: usize = 8 << 20;
/// Largest answer that says what went wrong.
const ERROR_SIZE_MAX: usize = 64 << 10;
const PAGES_MAX: usize = 200;
/// Requests at one time, files not counted.
const REQUESTS_MAX: usize = 8;

/// Talks to one server.
pub(super) struct Api {
    net: Net,
    base: Url,
    auth: Auth,
    backoff: Backoff,
    slots: Semaphore,
}

/// How we say who we are; read anew for each request.
pub(super) enum Auth {
    None,
    Basic { username: SecretRef, password: SecretRef },
    Bearer(SecretRef),
}

impl Auth {
    /// As configured; else from the environment that MLflow's own clients read.
    pub(super) fn new(settings: &MlflowSettings) -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let own = |name: &str| SecretRef::Env(name.to_owned());
        const TOKEN: &str = "MLFLOW_TRACKING_TOKEN";
        const USERNAME: &str = "MLFLOW_TRACKING_USERNAME";
        const PASSWORD: &str = "MLFLOW_TRACKING_PASSWORD";
        match (&settings.token, &settings.username, &settings.password) {
            (Some(token), _, _) => Self::Bearer(token.clone()),
            (None, Some(username), Some(password)) => {
                Self::Basic { username: username.clone(), password: password.clone() }
            }
            _ if set(USERNAME) && set(PASSWORD) => {
                Self::Basic { username: own(USERNAME), password: own(PASSWORD) }
            }
            _ if set(TOKEN) => Self::Bearer(own(TOKEN)),
            _ => Self::None,
        }
    }

    fn header(&self) -> Result<Option<HeaderValue>, SourceError> {
        let text = match self {
            Self::None => return Ok(None),
            Self::Bearer(token) => format!("Bearer {}", token.read()?.expose()),
            Self::Basic { username, password } => {
                let (username, password) = (username.read()?, password.read()?);
                let pair = format!("{}:{}", username.expose(), password.expose());
                format!("Basic {}", STANDARD.encode(pair))
            }
        };
        let mut value = HeaderValue::try_from(text).map_err(|_| {
            SourceError::Unsupported("the MLflow credential is no header's value".to_owned())
        })?;
        value.set_sensitive(true);
        Ok(Some(value))
    }
}

#[derive(Deserialize)]
pub(super) struct RegisteredModel {
    pub(super) name: String,
    #[serde(default)]
    pub(super) tags: Vec<Tag>,
    #[serde(default)]
    pub(super) aliases: Vec<Alias>,
}

#[derive(Deserialize)]
pub(super) struct Tag {
    pub(super) key: String,
    #[serde(default)]
    pub(super) value: String,
}

#[derive(Deserialize)]
pub(super) struct Alias {
    pub(super) alias: String,
    #[serde(deserialize_with = "text")]
    pub(super) version: String,
}

#[derive(Clone, Default, Deserialize)]
pub(super) struct ModelVersion {
    #[serde(deserialize_with = "text")]
    pub(super) version: String,
    #[serde(default, deserialize_with = "text")]
    pub(super) creation_timestamp: String,
    #[serde(default)]
    pub(super) status: String,
    #[serde(default)]
    pub(super) status_message: String,
    #[serde(default)]
    pub(super) description: String,
    #[serde(default)]
    pub(super) source: String,
    #[serde(default)]
    pub(super) run_id: String,
    #[serde(default)]
    pub(super) user_id: String,
    #[serde(default, deserialize_with = "tags")]
    pub(super) tags: BTreeMap<String, String>,
}

#[derive(Deserialize)]
pub(super) struct Run {
    #[serde(default)]
    pub(super) info: RunInfo,
    #[serde(default)]
    pub(super) data: RunData,
    #[serde(default)]
    pub(super) inputs: RunInputs,
}

#[derive(Default, Deserialize)]
pub(super) struct RunInfo {
    #[serde(default)]
    pub(super) user_id: String,
    #[serde(default, deserialize_with = "text")]
    pub(super) start_time: String,
    #[serde(default, deserialize_with = "text")]
    pub(super) end_time: String,
}

#[derive(Default, Deserialize)]
pub(super) struct RunData {
    #[serde(default)]
    pub(super) metrics: Vec<Metric>,
    #[serde(default)]
    pub(super) params: Vec<Tag>,
    #[serde(default, deserialize_with = "tags")]
    pub(super) tags: BTreeMap<String, String>,
}

#[derive(Deserialize)]
pub(super) struct Metric {
    pub(super) key: String,
    /// JSON has no NaN: the server may write it as a text.
    pub(super) value: serde_json::Value,
}

#[derive(Default, Deserialize)]
pub(super) struct RunInputs {
    #[serde(default)]
    pub(super) dataset_inputs: Vec<DatasetInput>,
}

#[derive(Deserialize)]
pub(super) struct DatasetInput {
    #[serde(default, deserialize_with = "tags")]
    pub(super) tags: BTreeMap<String, String>,
    pub(super) dataset: RunDataset,
}

#[derive(Deserialize)]
pub(super) struct RunDataset {
    pub(super) name: String,
    #[serde(default)]
    pub(super) digest: String,
    #[serde(default)]
    pub(super) source: String,
}

#[derive(Deserialize)]
pub(super) struct ArtifactFile {
    pub(super) path: String,
    #[serde(default)]
    pub(super) is_dir: bool,
    #[serde(default, deserialize_with = "text")]
    pub(super) file_size: String,
}

#[derive(Deserialize)]
struct ApiError {
    #[serde(default)]
    error_code: String,
    #[serde(default)]
    message: String,
}

/// Numbers that some servers write as texts.
fn text<'de, D: Deserializer<'de>>(from: D) -> Result<String, D::Error> {
    match serde_json::Value::deserialize(from)? {
        serde_json::Value::String(text) => Ok(text),
        serde_json::Value::Number(number) => Ok(number.to_string()),
        serde_json::Value::Null => Ok(String::new()),
        _ => Err(serde::de::Error::custom("expected a number or a text")),
    }
}

fn tags<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, String>, D::Error> {
    Ok(tag_map(Vec::<Tag>::deserialize(from)?))
}

/// Within the limits of what is shown.
pub(super) fn tag_map(tags: Vec<Tag>) -> BTreeMap<String, String> {
    let tags = tags.into_iter().take(ENTRIES_MAX);
    tags.map(|tag| (short(&tag.key), short(&tag.value))).collect()
}

impl Api {
    pub(super) fn new(net: Net, base: Url, auth: Auth, backoff: Backoff) -> Self {
        Self { net, base, auth, backoff, slots: Semaphore::new(REQUESTS_MAX) }
    }

    pub(super) fn backoff(&self) -> Backoff {
        self.backoff
    }

    pub(super) fn base(&self) -> &Url {
        &self.base
    }

    /// An address of the server: `path` as it stands, `parts` as one part each, whatever is in them.
    pub(super) fn url(&self, path: &str, parts: &[&str], query: &[(&str, &str)]) -> Url {
        let mut url = self.base.clone();
        if let Ok(mut segments) = url.path_segments_mut() {
            segments.pop_if_empty().extend(path.split('/')).extend(parts);
        }
        if !query.is_empty() {
            url.query_pairs_mut().extend_pairs(query);
        }
        url
    }

    /// Sends a GET; the answer's head when it is a success.
    pub(super) async fn get(
        &self,
        url: &Url,
        range: Option<&HeaderValue>,
    ) -> Result<reqwest::Response, SourceError> {
        let mut request = reqwest::Request::new(http::Method::GET, url.clone());
        if let Some(value) = self.auth.header()? {
            request.headers_mut().insert(AUTHORIZATION, value);
        }
        if let Some(range) = range {
            request.headers_mut().insert(http::header::RANGE, range.clone());
            *request.timeout_mut() = Some(net::FILE_TIME_MAX);
        }
        let response = self.net.send(request).await?;
        match response.status() {
            status if status.is_success() => Ok(response),
            status => Err(refused(status, response).await),
        }
    }

    /// A whole file that has to be small, with its entity tag.
    pub(super) async fn small(
        &self,
        url: &Url,
        size_max: usize,
    ) -> Result<(Bytes, Option<String>), SourceError> {
        again(self.backoff, || async move {
            // Never closed; if it were, the limit would be the server's affair.
            let _slot = self.slots.acquire().await.ok();
            let response = self.get(url, None).await?;
            let tag = entity_tag(&response);
            Ok((net::read(response, size_max).await?, tag))
        })
        .await
    }

    async fn json<T: DeserializeOwned>(
        &self,
        method: &str,
        query: &[(&str, &str)],
    ) -> Result<T, SourceError> {
        let url = self.url(&format!("{API}/{method}"), &[], query);
        self.json_of(&url).await
    }

    async fn json_of<T: DeserializeOwned>(&self, url: &Url) -> Result<T, SourceError> {
        let (body, _) = self.small(url, ANSWER_SIZE_MAX).await?;
        serde_json::from_slice(&body).map_err(|error| SourceError::Answer {
            what: net::shown(url),
            reason: format!("expected MLflow's JSON: {}", bucket::detail(&error.to_string())),
        })
    }

    /// Every registered model.
    pub(super) async fn models(&self) -> Result<Vec<RegisteredModel>, SourceError> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            registered_models: Vec<RegisteredModel>,
            next_page_token: Option<String>,
        }
        let query = [("max_results", "100")];
        let method = "registered-models/search";
        self.pages(method, &query, MODELS_MAX, |page: Page| {
            (page.registered_models, page.next_page_token)
        })
        .await
    }

    pub(super) async fn model(&self, name: &str) -> Result<RegisteredModel, SourceError> {
        #[derive(Deserialize)]
        struct Answer {
            registered_model: RegisteredModel,
        }
        let answer: Answer = self.json("registered-models/get", &[("name", name)]).await?;
        Ok(answer.registered_model)
    }

    /// Every version of a model, the newest first.
    pub(super) async fn versions(&self, name: &str) -> Result<Vec<ModelVersion>, SourceError> {
        #[derive(Deserialize)]
        struct Page {
            #[serde(default)]
            model_versions: Vec<ModelVersion>,
            next_page_token: Option<String>,
        }
        // A model's name has no quote: it was checked.
        let filter = format!("name='{name}'");
        let query = [
            ("filter", filter.as_str()),
            ("max_results", "200"),
            ("order_by", "version_number DESC"),
        ];
        let method = "model-versions/search";
        self.pages(method, &query, VERSIONS_MAX, |page: Page| {
            (page.model_versions, page.next_page_token)
        })
        .await
    }

    pub(super) async fn version(
        &self,
        name: &str,
        version: &str,
    ) -> Result<ModelVersion, SourceError> {
        #[derive(Deserialize)]
        struct Answer {
            model_version: ModelVersion,
        }
        let query = [("name", name), ("version", version)];
        let answer: Answer = self.json("model-versions/get", &query).await?;
        Ok(answer.model_version)
    }

    /// Where a version's artifact lies.
    pub(super) async fn artifact_of(
        &self,
        name: &str,
        version: &str,
    ) -> Result<String, SourceError> {
        #[derive(Deserialize)]
        struct Answer {
            artifact_uri: String,
        }
        let query = [("name", name), ("version", version)];
        let answer: Answer = self.json("model-versions/get-download-uri", &query).await?;
        Ok(answer.artifact_uri)
    }

    pub(super) async fn run(&self, id: &str) -> Result<Run, SourceError> {
        #[derive(Deserialize)]
        struct Answer {
            run: Run,
        }
        let answer: Answer = self.json("runs/get", &[("run_id", id)]).await?;
        Ok(answer.run)
    }

    /// What lies in one folder of the server's artifacts.
    pub(super) async fn artifacts(&self, path: &str) -> Result<Vec<ArtifactFile>, SourceError> {
        #[derive(Deserialize)]
        struct Answer {
            #[serde(default)]
            files: Vec<ArtifactFile>,
        }
        let answer: Answer = self.json_of(&self.url(ARTIFACTS, &[], &[("path", path)])).await?;
        Ok(answer.files)
    }

    async fn pages<Page: DeserializeOwned, T>(
        &self,
        method: &str,
        query: &[(&str, &str)],
        most: usize,
        open: impl Fn(Page) -> (Vec<T>, Option<String>),
    ) -> Result<Vec<T>, SourceError> {
        let (mut all, mut seen) = (Vec::new(), HashSet::new());
        let mut token = String::new();
        for _ in 0..PAGES_MAX {
            let mut query = query.to_vec();
            if !token.is_empty() {
                query.push(("page_token", &token));
            }
            let (found, next) = open(self.json(method, &query).await?);
            all.extend(found);
            if all.len() > most {
                let what = format!("{method} lists more than fits");
                return Err(SourceError::Limit { what, limit: most as u64 });
            }
            match next.filter(|next| !next.is_empty()) {
                None => return Ok(all),
                Some(next) if !seen.insert(next.clone()) => break,
                Some(next) => token = next,
            }
        }
        let reason = "its pages have no end".to_owned();
        Err(SourceError::Answer { what: method.to_owned(), reason })
    }
}

pub(super) fn entity_tag(response: &reqwest::Response) -> Option<String> {
    let tag = response.headers().get(http::header::ETAG)?.to_str().ok()?;
    (tag.len() <= 256).then(|| tag.to_owned())
}

/// An answer that is no success.
async fn refused(status: StatusCode, response: reqwest::Response) -> SourceError {
    let what = net::shown(response.url());
    if status == StatusCode::NOT_FOUND {
        return SourceError::Missing { what };
    }
    let detail = match net::read(response, ERROR_SIZE_MAX).await {
        Ok(body) => serde_json::from_slice::<ApiError>(&body).ok(),
        Err(_) => None,
    };
    let detail = match (status, detail) {
        // Where it leads to is not followed, and not repeated.
        (status, _) if status.is_redirection() => ", a redirect, which is not followed".to_owned(),
        (_, Some(error)) => bucket::detail(&format!(" ({}: {})", error.error_code, error.message)),
        (_, None) => String::new(),
    };
    SourceError::Status { what, status: status.as_u16(), detail }
}
