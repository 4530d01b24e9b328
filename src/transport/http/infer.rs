//! Predictions over HTTP: from a body to the gateway, and from its answer to a body.
//!
//! Invariant: whatever becomes of a prediction, it is recorded once and its answer carries the
//! `tidegate-*` headers.

use std::sync::Arc;

use bytes::Bytes;
use http::HeaderMap;

use super::binary::{self, Decoded, Form, SharedSlice};
use super::json::census;
use super::reply::{JSON_LENGTH, Reply};
use super::{WORK_WAIT_MAX, response, shared};
use crate::domain::{
    Answer, CallMeta, Failure, InferRequest, Inputs, ModelName, NamedTensor, Protocol, Signature,
    VersionRef,
};
use crate::transport::auth::Caller;
use crate::transport::intake::{Held, INLINE_MAX_BYTES};
use crate::transport::meta::Arrived;
use crate::transport::{Api, meta};

/// What is known of a prediction before its body is looked at.
pub(super) struct Call {
    pub(super) api: Arc<Api>,
    pub(super) caller: Caller,
    pub(super) model: ModelName,
    pub(super) version: Option<VersionRef>,
    pub(super) headers: HeaderMap,
    /// As read from the connection, decompressed; a failure to do so, or the caller's not being
    /// allowed to bring it, is the prediction's.
    pub(super) body: Result<Bytes, Failure>,
    pub(super) arrived: Arrived,
    /// Counts the body, and what it becomes.
    pub(super) held: Arc<Held>,
}

/// Reads a body once the model's signature is known.
pub(super) type Typing = Box<dyn FnOnce(&Signature) -> Result<Vec<NamedTensor>, Failure> + Send>;

impl Call {
    /// The Open Inference Protocol's own form.
    pub(super) async fn infer(mut self) -> Reply {
        let meta = match self.meta() {
            Ok(meta) => meta,
            Err(reply) => return *reply,
        };
        let api = Arc::clone(&self.api);
        let decoded = match self.body() {
            Ok(body) => self.decode(body).await,
            Err(failure) => Err(failure),
        };
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
        let all_binary = forms.iter().chain([&form]).all(|form| *form == Form::Binary);
        let writer = Arc::clone(&api);
        let json_max = api.settings.answer_json_max_bytes;
        answer(&api, meta, request, all_binary, move |answer| {
            let shared = |slice: &SharedSlice, data: &[u8]| shared::write(&writer, slice, data);
            response::write(answer, &forms, &form, &shared, json_max)
        })
        .await
    }

    /// Makes a request of a body; of one with much JSON on another thread.
    async fn decode(&self, body: Bytes) -> Result<Decoded, Failure> {
        let json_len = json_len(&self.headers)?;
        let text_len = json_len.unwrap_or(body.len()).min(body.len());
        let (api, held) = (Arc::clone(&self.api), Arc::clone(&self.held));
        let decode = move || {
            let read = |slice: &SharedSlice| {
                // A copy of the region, which no body's limit bounds.
                held.grow(usize::try_from(slice.byte_size).unwrap_or(usize::MAX))?;
                shared::read(&api, slice)
            };
            if text_len <= INLINE_MAX_BYTES {
                return binary::decode(&body, json_len, &read);
            }
            held.grow(census(&body[..text_len])?.decoded_max())?;
            let mut decoded = binary::decode(&body, json_len, &read)?;
            if let Inputs::Named(named) = decoded.inputs {
                decoded.inputs = Inputs::Named(kept(named, &held));
            }
            Ok(decoded)
        };
        if text_len <= INLINE_MAX_BYTES {
            return decode();
        }
        self.api.intake.run(Self::work_deadline(), decode).await
    }

    /// Until when work on the body may be waited for.
    fn work_deadline() -> tokio::time::Instant {
        tokio::time::Instant::now() + WORK_WAIT_MAX
    }

    /// Forms whose tensors only the model's signature can type; they answer `predictions`.
    pub(super) async fn predict(
        mut self,
        typing: impl FnOnce(Bytes, &HeaderMap) -> Result<Typing, Failure>,
    ) -> Reply {
        let meta = match self.meta() {
            Ok(meta) => meta,
            Err(reply) => return *reply,
        };
        let inputs = match self.body() {
            Ok(body) => self.deferred(body, typing),
            Err(failure) => Err(failure),
        };
        let inputs = match inputs {
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
        let json_max = self.api.settings.answer_json_max_bytes;
        let write = move |answer: &Answer| response::write_predictions(&answer.outputs, json_max);
        answer(&self.api, meta, request, false, write).await
    }

    /// Inputs that are read when the model is known; those of a large body on another thread.
    fn deferred(
        &self,
        body: Bytes,
        typing: impl FnOnce(Bytes, &HeaderMap) -> Result<Typing, Failure>,
    ) -> Result<Inputs, Failure> {
        let len = body.len();
        if len <= INLINE_MAX_BYTES {
            let typing = typing(body, &self.headers)?;
            return Ok(Inputs::Deferred(Box::new(move |signature| {
                Box::pin(std::future::ready(typing(signature)))
            })));
        }
        let text = body.clone();
        let typing = typing(body, &self.headers)?;
        let (api, held) = (Arc::clone(&self.api), Arc::clone(&self.held));
        let deadline = Self::work_deadline();
        Ok(Inputs::Deferred(Box::new(move |signature| {
            let signature = signature.clone();
            Box::pin(async move {
                let decode = move || {
                    held.grow(census(&text)?.table_max())?;
                    Ok(kept(typing(&signature)?, &held))
                };
                api.intake.run(deadline, decode).await
            })
        })))
    }

    /// Reads the headers; a bad one is the prediction's failure.
    fn meta(&mut self) -> Result<CallMeta, Box<Reply>> {
        self.read_meta().map_err(|failure| {
            // Only the deadline can be wrong; without it there is enough to record the refusal.
            self.headers.remove("tidegate-timeout-ms");
            Box::new(match self.read_meta() {
                Ok(meta) => self.refuse(&meta, &failure),
                Err(_) => Reply::failure(&failure),
            })
        })
    }

    fn read_meta(&self) -> Result<CallMeta, Failure> {
        let meta = meta::call_meta(&self.headers, Protocol::Http, self.arrived, &self.api)?;
        Ok(CallMeta { principal: self.caller.name(), ..meta })
    }

    fn body(&mut self) -> Result<Bytes, Failure> {
        std::mem::replace(&mut self.body, Ok(Bytes::new()))
    }

    fn refuse(&self, meta: &CallMeta, failure: &Failure) -> Reply {
        let gateway = &self.api.gateway;
        let head = match self.caller.sees(&self.model) {
            true => gateway.refuse(meta, self.model.clone(), self.version.as_ref(), failure),
            false => gateway.refuse_unseen(meta, self.model.clone(), failure),
        };
        Reply::failure(failure).head(&head)
    }
}

/// Ties decoded tensors to the account of their request.
fn kept(named: Vec<NamedTensor>, held: &Arc<Held>) -> Vec<NamedTensor> {
    let keep = |NamedTensor { name, tensor }| NamedTensor {
        name,
        tensor: tensor.held_by(|data| held.keep(data)),
    };
    named.into_iter().map(keep).collect()
}

/// Makes the prediction and writes its answer; one with much JSON on another thread.
async fn answer(
    api: &Api,
    meta: CallMeta,
    request: InferRequest,
    all_binary: bool,
    write: impl FnOnce(&Answer) -> Result<Reply, Failure> + Send + 'static,
) -> Reply {
    let write = async |answer: Answer| {
        let bytes: usize = answer.outputs.iter().map(|output| output.tensor.data().len()).sum();
        if all_binary || bytes <= INLINE_MAX_BYTES {
            return write(&answer);
        }
        let deadline = tokio::time::Instant::now() + WORK_WAIT_MAX;
        api.intake.run(deadline, move || write(&answer)).await
    };
    match api.gateway.infer(meta, request, write).await {
        Ok((reply, head)) => reply.head(&head),
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
