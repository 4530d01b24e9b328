//! Predictions over HTTP: from a body to the gateway, and from its answer to a body.
//!
//! Invariant: whatever becomes of a prediction, it is recorded once and its answer carries the
//! `tidegate-*` headers.

use std::sync::Arc;

use bytes::Bytes;
use http::HeaderMap;

use super::binary::{self, Decoded};
use super::reply::{JSON_LENGTH, Reply};
use super::{response, shared};
use crate::domain::{
    Answer, CallMeta, Failure, InferRequest, Inputs, ModelName, Protocol, VersionRef,
};
use crate::transport::meta::Arrived;
use crate::transport::{Api, meta};

/// What is known of a prediction before its body is looked at.
pub(super) struct Call {
    pub(super) api: Arc<Api>,
    pub(super) model: ModelName,
    pub(super) version: Option<VersionRef>,
    pub(super) headers: HeaderMap,
    /// As read from the connection, decompressed; a failure to do so is the prediction's.
    pub(super) body: Result<Bytes, Failure>,
    pub(super) arrived: Arrived,
}

impl Call {
    /// The Open Inference Protocol's own form.
    pub(super) async fn infer(mut self) -> Reply {
        let meta = match self.meta() {
            Ok(meta) => meta,
            Err(reply) => return *reply,
        };
        let api = Arc::clone(&self.api);
        let decoded = self.body().and_then(|body| {
            let json_len = json_len(&self.headers)?;
            binary::decode(&body, json_len, &|slice| shared::read(&api, slice))
        });
        let Decoded { id, inputs, outputs, forms, form, parameters } = match decoded {
            Ok(decoded) => decoded,
            Err(failure) => return self.refuse(&meta, &failure),
        };
        let request = InferRequest {
            model: self.model,
            version: self.version,
            id: id.unwrap_or_default(),
            inputs,
            outputs,
            parameters,
        };
        answer(&api, meta, request, |answer| {
            response::write(answer, &forms, &form, &|slice, data| shared::write(&api, slice, data))
        })
        .await
    }

    /// Forms whose tensors only the model's signature can type; they answer `predictions`.
    pub(super) async fn predict(
        mut self,
        inputs: impl FnOnce(Bytes, &HeaderMap) -> Result<Inputs, Failure>,
    ) -> Reply {
        let meta = match self.meta() {
            Ok(meta) => meta,
            Err(reply) => return *reply,
        };
        let inputs = match self.body().and_then(|body| inputs(body, &self.headers)) {
            Ok(inputs) => inputs,
            Err(failure) => return self.refuse(&meta, &failure),
        };
        let request = InferRequest {
            model: self.model,
            version: self.version,
            id: String::new(),
            inputs,
            outputs: Vec::new(),
            parameters: Vec::new(),
        };
        answer(&self.api, meta, request, |answer| response::write_predictions(&answer.outputs))
            .await
    }

    /// Reads the headers; a bad one is the prediction's failure.
    fn meta(&mut self) -> Result<CallMeta, Box<Reply>> {
        let settings = &self.api.settings;
        meta::call_meta(&self.headers, Protocol::Http, self.arrived, settings).map_err(|failure| {
            // Only the deadline can be wrong; without it there is enough to record the refusal.
            self.headers.remove("tidegate-timeout-ms");
            let without =
                meta::call_meta(&self.headers, Protocol::Http, self.arrived, &self.api.settings);
            Box::new(match without {
                Ok(meta) => self.refuse(&meta, &failure),
                Err(_) => Reply::failure(&failure),
            })
        })
    }

    fn body(&mut self) -> Result<Bytes, Failure> {
        std::mem::replace(&mut self.body, Ok(Bytes::new()))
    }

    fn refuse(&self, meta: &CallMeta, failure: &Failure) -> Reply {
        let gateway = &self.api.gateway;
        let head = gateway.refuse(meta, self.model.clone(), self.version.as_ref(), failure);
        Reply::failure(failure).head(&head)
    }
}

async fn answer(
    api: &Api,
    meta: CallMeta,
    request: InferRequest,
    write: impl FnOnce(&Answer) -> Result<Reply, Failure>,
) -> Reply {
    match api.gateway.infer(meta, request).await {
        Ok(answer) => write(&answer).unwrap_or_else(Reply::from).head(&answer.head),
        Err(refused) => Reply::failure(&refused.failure).head(&refused.head),
    }
}

fn json_len(headers: &HeaderMap) -> Result<Option<usize>, Failure> {
    let Some(value) = headers.get(JSON_LENGTH) else { return Ok(None) };
    let digits = value.to_str().ok().map(str::trim);
    let digits = digits.filter(|text| text.bytes().all(|byte| byte.is_ascii_digit()));
    match digits.and_then(|text| text.parse().ok()) {
        Some(len) => Ok(Some(len)),
        None => Err(Failure::invalid(format!(
            "header '{JSON_LENGTH}' must be a number of bytes, got {value:?}"
        ))),
    }
}
