//! Sends recorded inputs to a gateway, one after the other over one connection.

use anyhow::{Context as _, anyhow};
use bytes::Bytes;
use http::header::AUTHORIZATION;
use http::{HeaderMap, HeaderValue, Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::recorded::{Recorded, Tensor, TensorText};
use crate::admit::Secret;
use crate::cli::admin::Stop;
use crate::cli::infer::{ANSWER_SIZE_MAX, TOKEN_VARIABLE, credential};
use crate::domain::{ModelName, VersionRef};

/// What came back.
pub(super) enum Answer {
    Outputs {
        outputs: Vec<Tensor>,
        /// Of the model that gave them: `sha256:…`.
        digest: String,
        /// Of this prediction.
        id: String,
    },
    /// Why there are none.
    Refused(String),
}

pub(super) struct Sender {
    client: Client<HttpConnector, Full<Bytes>>,
    runtime: tokio::runtime::Runtime,
    base: String,
    credential: Option<HeaderValue>,
}

impl Sender {
    /// # Errors
    /// For a URL that is none of a gateway.
    pub(super) fn open(url: &Uri) -> Result<Self, Stop> {
        if url.scheme_str() != Some("http") || url.host().is_none() {
            let expected = "expected a URL like http://127.0.0.1:8000";
            return Err(Stop::usage(format_args!("--url: {expected}, got '{url}'")));
        }
        let token = std::env::var(TOKEN_VARIABLE).ok().filter(|token| !token.is_empty());
        let credential = token.map(|token| credential(&Secret::new(token))).transpose();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Self {
            client: Client::builder(TokioExecutor::new()).build_http(),
            runtime: runtime.map_err(Stop::failed)?,
            base: url.to_string().trim_end_matches('/').to_owned(),
            credential: credential.map_err(Stop::usage)?,
        })
    }

    /// # Errors
    /// When the gateway cannot be reached, or answers with what is none of its answers.
    pub(super) fn send(
        &self,
        model: &ModelName,
        version: Option<&VersionRef>,
        recorded: &Recorded,
    ) -> Result<Answer, Stop> {
        let version = version.map(|version| format!("/versions/{version}")).unwrap_or_default();
        let url = format!("{}/v2/models/{model}{version}/infer", self.base);
        let sent = self.runtime.block_on(self.exchange(&url, recorded));
        sent.map_err(|error| Stop::failed(format_args!("{error:#}")))
    }

    async fn exchange(&self, url: &str, recorded: &Recorded) -> anyhow::Result<Answer> {
        let (body, json_len) = recorded.body();
        let mut request = Request::post(url)
            .header("content-type", "application/octet-stream")
            .header("inference-header-content-length", json_len);
        if let Some(credential) = &self.credential {
            request = request.header(AUTHORIZATION, credential);
        }
        let request = request.body(Full::new(Bytes::from(body)))?;
        let response = self.client.request(request).await;
        let response = response.with_context(|| format!("cannot reach {url}"))?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, ANSWER_SIZE_MAX).collect().await;
        let body = body.map_err(|error| anyhow!("read the answer: {error}"))?.to_bytes();
        answer(head.status, &head.headers, &body)
    }
}

fn answer(status: StatusCode, headers: &HeaderMap, body: &[u8]) -> anyhow::Result<Answer> {
    let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
    if !status.is_success() {
        let said: Option<Value> = serde_json::from_slice(body).ok();
        let said = said.and_then(|said| said["error"].as_str().map(ToOwned::to_owned));
        return Ok(Answer::Refused(format!("{status}: {}", said.unwrap_or_default())));
    }
    let json_len = header("inference-header-content-length").and_then(|text| text.parse().ok());
    let (json, binary) = body
        .split_at_checked(json_len.unwrap_or(body.len()))
        .context("the answer is shorter than it says")?;
    let outputs = outputs(json, binary).context("the answer is none of a gateway")?;
    let text = |name: &str| header(name).unwrap_or_default().to_owned();
    Ok(Answer::Outputs {
        outputs,
        digest: text("tidegate-model-digest"),
        id: text("tidegate-prediction-id"),
    })
}

#[derive(Deserialize)]
struct Outputs<'a> {
    #[serde(borrow)]
    outputs: Vec<&'a RawValue>,
}

/// The outputs in order; those in binary form have their sizes in the JSON.
fn outputs(json: &[u8], mut binary: &[u8]) -> Option<Vec<Tensor>> {
    let all: Outputs<'_> = serde_json::from_slice(json).ok()?;
    let mut outputs = Vec::with_capacity(all.outputs.len());
    for raw in all.outputs {
        let about: Value = serde_json::from_str(raw.get()).ok()?;
        let size = about["parameters"]["binary_data_size"].as_u64();
        outputs.push(match size.and_then(|size| usize::try_from(size).ok()) {
            None => Tensor::of(&serde_json::from_str::<TensorText<'_>>(raw.get()).ok()?)?,
            Some(size) => {
                let (data, rest) = binary.split_at_checked(size)?;
                binary = rest;
                let shape = about["shape"].as_array()?.iter().map(Value::as_u64);
                Tensor {
                    name: about["name"].as_str()?.to_owned(),
                    datatype: about["datatype"].as_str()?.parse().ok()?,
                    shape: shape.collect::<Option<_>>()?,
                    data: data.to_vec(),
                }
            }
        });
    }
    Some(outputs)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outputs_come_in_two_forms() {
        let json = br#"{"outputs":[
            {"name":"y","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}},
            {"name":"z","datatype":"INT64","shape":[1],"data":[7]}]}"#;
        let binary = [0, 0, 128, 63, 0, 0, 0, 64];
        let found = outputs(json, &binary).unwrap();
        assert_eq!(found[0].numbers().unwrap(), [1.0, 2.0]);
        assert_eq!(found[1].numbers().unwrap(), [7.0]);
        assert!(outputs(json, &binary[..4]).is_none());
        assert!(outputs(b"<html>", &[]).is_none());
    }
}
