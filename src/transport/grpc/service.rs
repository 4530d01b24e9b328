//! The calls of `inference.GRPCInferenceService`, one function each.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;

use bytes::Bytes;
use http::HeaderMap;
use serde_json::{Map, Value};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status, Streaming};

use super::{decode, encode, stream, wire};
use crate::admit::Action;
use crate::domain::{
    AnswerHead, CallMeta, Failure, Inputs, ModelFile, ModelName, NamedTensor, Protocol, TensorSpec,
    VersionRef, VersionState,
};
use crate::observe::{BatchStat, DurationStat};
use crate::proto::inference as pb;
use crate::proto::inference::model_metadata_response::TensorMetadata;
use crate::proto::inference::model_repository_parameter::ParameterChoice as Choice;
use crate::route::Served;
use crate::transport::auth::Caller;
use crate::transport::intake::{Held, INLINE_MAX_BYTES};
use crate::transport::{Api, Body, SERVER_NAME, meta, model_config};

/// Prefix of load parameters that bring a file.
const FILE_PREFIX: &str = "file:";

/// A prediction that failed, with what is known for its metadata.
pub(super) struct Refusal {
    pub(super) failure: Failure,
    pub(super) head: Option<AnswerHead>,
    pub(super) asked: Asked,
}

/// What a message asked for, in its own words.
#[derive(Clone, Default)]
pub(super) struct Asked {
    pub(super) id: String,
    pub(super) model: String,
    pub(super) version: String,
}

impl Refusal {
    pub(super) fn status(&self) -> Status {
        encode::status(&self.failure, self.head.as_ref())
    }
}

/// Makes one prediction from a message, which `held` counts.
pub(super) async fn infer(
    api: &Arc<Api>,
    caller: &Caller,
    meta: CallMeta,
    message: Bytes,
    held: Arc<Held>,
) -> Result<(pb::ModelInferResponse, AnswerHead), Box<Refusal>> {
    // Nothing to record a prediction under: it is only counted.
    let unknown = |failure: Failure, asked: Asked| {
        api.gateway.observer().refused(meta.protocol, failure.kind);
        Box::new(Refusal { failure, head: None, asked })
    };
    let read = wire::request(held.keep(message)).map_err(wire::WireError::into_failure);
    let request = read.map_err(|failure| unknown(failure, Asked::default()))?;
    let asked = Asked {
        id: request.id.clone(),
        model: request.model_name.clone(),
        version: request.model_version.clone(),
    };
    let names = decode::names(&request.model_name, &request.model_version);
    let (model, version) = names.map_err(|failure| unknown(failure, asked.clone()))?;
    let decoded = match caller.check(Action::Predict, &model) {
        Ok(()) => decoded(api, &meta, request, &model, version.as_ref(), held).await,
        Err(failure) => Err(failure),
    };
    let decode::Decoded { request, placed } = match decoded {
        Ok(decoded) => decoded,
        Err(failure) => {
            let head = match caller.sees(&model) {
                true => api.gateway.refuse(&meta, model, version.as_ref(), &failure),
                false => api.gateway.refuse_unseen(&meta, model, &failure),
            };
            return Err(Box::new(Refusal { failure, head: Some(head), asked }));
        }
    };
    let write = async |answer| encode::answer(answer, &placed, &api.shm);
    api.gateway.infer(meta, request, write).await.map_err(|refused| {
        let refused = *refused;
        let (failure, head) = (refused.failure, Some(refused.head));
        Box::new(Refusal { failure, head, asked })
    })
}

/// Reads the tensors; where every element has to be looked at and there are many, on another
/// thread.
async fn decoded(
    api: &Arc<Api>,
    meta: &CallMeta,
    request: wire::Request,
    model: &ModelName,
    version: Option<&VersionRef>,
    held: Arc<Held>,
) -> Result<decode::Decoded, Failure> {
    let shm_max = api.settings.body_max_bytes;
    let (model, version) = (model.clone(), version.cloned());
    if request.looked_at_bytes() <= INLINE_MAX_BYTES {
        let grow = |more| held.grow(more);
        return decode::complete(request, model, version, &api.shm, shm_max, &grow);
    }
    let deadline = meta.received + meta.timeout.unwrap_or(super::DECODE_WAIT_MAX);
    let parts = Arc::clone(api);
    let decode = move || {
        let grow = |more| held.grow(more);
        let mut decoded = decode::complete(request, model, version, &parts.shm, shm_max, &grow)?;
        if let Inputs::Named(named) = &mut decoded.request.inputs {
            for NamedTensor { tensor, .. } in named {
                *tensor = tensor.clone().held_by(|data| held.keep(data));
            }
        }
        Ok(decoded)
    };
    api.intake.run(deadline, decode).await
}

/// Answers a call of `ModelInfer`.
pub(super) async fn unary<B>(api: &Arc<Api>, request: http::Request<B>) -> http::Response<Body>
where
    B: http_body::Body<Data = Bytes> + Send + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>> + Send,
{
    struct Infer(Arc<Api>);
    impl tonic::server::UnaryService<Bytes> for Infer {
        type Response = pb::ModelInferResponse;
        type Future = Pin<Box<dyn Future<Output = Answered<Self::Response>> + Send>>;

        fn call(&mut self, request: Request<Bytes>) -> Self::Future {
            let api = Arc::clone(&self.0);
            Box::pin(async move { answer(&api, request).await })
        }
    }
    super::server(&api.settings).unary(Infer(Arc::clone(api)), request).await
}

async fn answer(api: &Arc<Api>, request: Request<Bytes>) -> Answered<pb::ModelInferResponse> {
    let held = super::held(&request, api);
    let caller = super::caller(&request);
    let headers = request.metadata().as_ref();
    let arrived = super::arrived(&request);
    let meta = meta::call_meta(headers, Protocol::Grpc, arrived, api);
    let meta = meta.map_err(|failure| {
        api.gateway.observer().refused(Protocol::Grpc, failure.kind);
        encode::status(&failure, None)
    })?;
    let meta = CallMeta { principal: caller.name(), ..meta };
    let done = infer(api, &caller, meta, request.into_inner(), held).await;
    let (message, head) = done.map_err(|refusal| refusal.status())?;
    let bytes: usize = message.raw_output_contents.iter().map(Bytes::len).sum();
    let mut headers = HeaderMap::new();
    meta::answer_headers(&head, &mut headers);
    let mut response = Response::new(message);
    *response.metadata_mut() = MetadataMap::from_headers(headers);
    if bytes < api.settings.compress_min_bytes {
        response.disable_compression();
    }
    Ok(response)
}

/// Implements the service on the gateway.
#[derive(Clone)]
pub(super) struct Service {
    api: Arc<Api>,
}

type Answered<T> = Result<Response<T>, Status>;

impl Service {
    pub(super) fn new(api: Arc<Api>) -> Self {
        Self { api }
    }

    /// A version that the caller may see.
    fn served(&self, caller: &Caller, name: &str, version: &str) -> Result<Arc<Served>, Failure> {
        let (model, version) = decode::names(name, version)?;
        caller.check(Action::ReadModels, &model)?;
        self.api.gateway.served(&model, version.as_ref())
    }

    fn metadata(
        &self,
        caller: &Caller,
        name: &str,
        version: &str,
    ) -> Result<pb::ModelMetadataResponse, Failure> {
        let (model, version) = decode::names(name, version)?;
        caller.check(Action::ReadModels, &model)?;
        let table = self.api.gateway.table();
        let served = table.pick(&model, version.as_ref())?.served;
        let versions = table.models.get(&model).map(|routes| routes.versions.keys());
        Ok(pb::ModelMetadataResponse {
            name: model.to_string(),
            versions: versions.into_iter().flatten().map(ToString::to_string).collect(),
            platform: model_config::platform(served.engine).0.to_owned(),
            inputs: served.signature.inputs.iter().map(tensor_metadata).collect(),
            outputs: served.signature.outputs.iter().map(tensor_metadata).collect(),
        })
    }

    fn statistics(
        &self,
        caller: &Caller,
        name: &str,
        version: &str,
    ) -> Result<Vec<pb::ModelStatistics>, Failure> {
        let table = self.api.gateway.table();
        if name.is_empty() {
            caller.check_some(Action::ReadModels)?;
            let seen = table.models.iter().filter(|(model, _)| caller.sees(model));
            let all = seen.flat_map(|(_, routes)| routes.versions.values());
            return Ok(all.map(|served| statistics(served)).collect());
        }
        let (model, version) = decode::names(name, version)?;
        caller.check(Action::ReadModels, &model)?;
        let picked = table.pick(&model, version.as_ref())?.served;
        match (version, table.models.get(&model)) {
            (None, Some(routes)) => {
                Ok(routes.versions.values().map(|served| statistics(served)).collect())
            }
            _ => Ok(vec![statistics(&picked)]),
        }
    }

    fn index(
        &self,
        caller: &Caller,
        request: &pb::RepositoryIndexRequest,
    ) -> Result<Vec<Index>, Failure> {
        caller.check_some(Action::ReadModels)?;
        if !request.repository_name.is_empty() {
            return Err(Failure::unsupported("'repository_name' is not supported, leave it empty"));
        }
        let entries = self.api.gateway.control().index().into_iter();
        let seen = entries.filter(|entry| caller.sees(&entry.model));
        let wanted = seen.filter(|entry| !request.ready || entry.state == VersionState::Ready);
        Ok(wanted
            .map(|entry| Index {
                name: entry.model.to_string(),
                version: entry.version.map(|version| version.to_string()).unwrap_or_default(),
                state: entry.state.as_str().to_owned(),
                reason: entry.reason,
            })
            .collect())
    }

    /// The model to load or unload. Some clients name it in the repository's field.
    fn controlled(
        &self,
        caller: &Caller,
        repository: &str,
        model: &str,
    ) -> Result<ModelName, Failure> {
        if !self.api.settings.model_control {
            return Err(Failure::unsupported(
                "loading and unloading is off, set 'repository.model_control' to turn it on",
            ));
        }
        let (model, _) = match (repository, model) {
            (model, "") | ("", model) => decode::names(model, "")?,
            _ => {
                let message = "'repository_name' is not supported, leave it empty";
                return Err(Failure::unsupported(message));
            }
        };
        caller.check(Action::ChangeVersions, &model)?;
        Ok(model)
    }

    async fn load(
        &self,
        caller: &Caller,
        request: pb::RepositoryModelLoadRequest,
    ) -> Result<ModelName, Failure> {
        let model = self.controlled(caller, &request.repository_name, &request.model_name)?;
        let (config, files) = load_parameters(request.parameters)?;
        self.api.gateway.control().load(&model, config.as_deref(), files).await?;
        Ok(model)
    }

    async fn unload(
        &self,
        caller: &Caller,
        request: pb::RepositoryModelUnloadRequest,
    ) -> Result<ModelName, Failure> {
        let model = self.controlled(caller, &request.repository_name, &request.model_name)?;
        for (key, value) in request.parameters {
            let is_bool = matches!(value.parameter_choice, Some(Choice::BoolParam(_)));
            if key != "unload_dependents" || !is_bool {
                return Err(Failure::invalid(
                    "an unload takes only the parameter 'unload_dependents', a bool",
                ));
            }
        }
        self.api.gateway.control().unload(&model).await?;
        Ok(model)
    }

    fn trace(&self, caller: &Caller, request: pb::TraceSettingRequest) -> Result<Value, Failure> {
        let model = Some(request.model_name.as_str()).filter(|name| !name.is_empty());
        match model {
            Some(name) => drop(self.served(caller, name, "")?),
            None => caller.check_some(Action::ReadModels)?,
        }
        if request.settings.is_empty() {
            return Ok(self.api.toggles.trace_get(model));
        }
        caller.check_gateway(Action::Reload)?;
        let settings: Map<String, Value> = request
            .settings
            .into_iter()
            .map(|(key, setting)| match setting.value.is_empty() {
                true => (key, Value::Null),
                false => (key, Value::from(setting.value)),
            })
            .collect();
        self.api.toggles.trace_update(model, &Value::Object(settings))
    }

    fn log(&self, caller: &Caller, request: pb::LogSettingsRequest) -> Result<Value, Failure> {
        use pb::log_settings_request::setting_value::ParameterChoice as Setting;
        caller.check_some(Action::ReadModels)?;
        if request.settings.is_empty() {
            return Ok(self.api.toggles.log_get());
        }
        caller.check_gateway(Action::Reload)?;
        let settings: Map<String, Value> = request
            .settings
            .into_iter()
            .map(|(key, setting)| {
                let value = match setting.parameter_choice {
                    Some(Setting::BoolParam(value)) => Value::from(value),
                    Some(Setting::Uint32Param(value)) => Value::from(value),
                    Some(Setting::StringParam(value)) => Value::from(value),
                    None => Value::Null,
                };
                (key, value)
            })
            .collect();
        self.api.toggles.log_update(&Value::Object(settings))
    }
}

type Index = pb::repository_index_response::ModelIndex;

/// Shared memory is for inputs and outputs.
fn may_use_regions<T>(request: &Request<T>) -> Result<(), Failure> {
    super::caller(request).check_some(Action::Predict)
}

/// A result without a prediction behind it.
fn answered<T>(result: Result<T, Failure>) -> Answered<T> {
    result.map(Response::new).map_err(|failure| encode::status(&failure, None))
}

#[tonic::async_trait]
impl pb::grpc_inference_service_server::GrpcInferenceService for Service {
    type ModelStreamInferStream = stream::Ordered<pb::ModelStreamInferResponse>;

    async fn server_live(
        &self,
        _: Request<pb::ServerLiveRequest>,
    ) -> Answered<pb::ServerLiveResponse> {
        answered(Ok(pb::ServerLiveResponse { live: self.api.gateway.is_live() }))
    }

    async fn server_ready(
        &self,
        _: Request<pb::ServerReadyRequest>,
    ) -> Answered<pb::ServerReadyResponse> {
        answered(Ok(pb::ServerReadyResponse { ready: self.api.health.is_ready() }))
    }

    /// An unknown model is an answer here, not an error.
    async fn model_ready(
        &self,
        request: Request<pb::ModelReadyRequest>,
    ) -> Answered<pb::ModelReadyResponse> {
        let caller = super::caller(&request);
        let pb::ModelReadyRequest { name, version } = request.get_ref();
        let ready = self.served(&caller, name, version).is_ok();
        answered(Ok(pb::ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        request: Request<pb::ServerMetadataRequest>,
    ) -> Answered<pb::ServerMetadataResponse> {
        let seen = super::caller(&request).check_some(Action::ReadModels);
        answered(seen.map(|()| pb::ServerMetadataResponse {
            name: SERVER_NAME.to_owned(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            extensions: self.api.extensions().into_iter().map(str::to_owned).collect(),
        }))
    }

    async fn model_metadata(
        &self,
        request: Request<pb::ModelMetadataRequest>,
    ) -> Answered<pb::ModelMetadataResponse> {
        let caller = super::caller(&request);
        let pb::ModelMetadataRequest { name, version } = request.get_ref();
        answered(self.metadata(&caller, name, version))
    }

    /// Never called: [`unary`] answers before the generated code would read the message.
    async fn model_infer(
        &self,
        _: Request<pb::ModelInferRequest>,
    ) -> Answered<pb::ModelInferResponse> {
        Err(Status::internal("a prediction went astray"))
    }

    /// Never called: as above, [`stream::answer`].
    async fn model_stream_infer(
        &self,
        _: Request<Streaming<pb::ModelInferRequest>>,
    ) -> Answered<Self::ModelStreamInferStream> {
        Err(Status::internal("a prediction went astray"))
    }

    async fn model_config(
        &self,
        request: Request<pb::ModelConfigRequest>,
    ) -> Answered<pb::ModelConfigResponse> {
        let caller = super::caller(&request);
        let pb::ModelConfigRequest { name, version } = request.get_ref();
        let served = self.served(&caller, name, version);
        let config = served.map(|served| model_config::to_proto(&served));
        answered(config.map(|config| pb::ModelConfigResponse { config: Some(config) }))
    }

    async fn model_statistics(
        &self,
        request: Request<pb::ModelStatisticsRequest>,
    ) -> Answered<pb::ModelStatisticsResponse> {
        let caller = super::caller(&request);
        let pb::ModelStatisticsRequest { name, version } = request.get_ref();
        let stats = self.statistics(&caller, name, version);
        answered(stats.map(|model_stats| pb::ModelStatisticsResponse { model_stats }))
    }

    async fn repository_index(
        &self,
        request: Request<pb::RepositoryIndexRequest>,
    ) -> Answered<pb::RepositoryIndexResponse> {
        let models = self.index(&super::caller(&request), request.get_ref());
        answered(models.map(|models| pb::RepositoryIndexResponse { models }))
    }

    async fn repository_model_load(
        &self,
        request: Request<pb::RepositoryModelLoadRequest>,
    ) -> Answered<pb::RepositoryModelLoadResponse> {
        let caller = super::caller(&request);
        answered(self.load(&caller, request.into_inner()).await.map(|model| {
            pb::RepositoryModelLoadResponse { model_name: model.to_string(), is_loaded: true }
        }))
    }

    async fn repository_model_unload(
        &self,
        request: Request<pb::RepositoryModelUnloadRequest>,
    ) -> Answered<pb::RepositoryModelUnloadResponse> {
        let caller = super::caller(&request);
        answered(self.unload(&caller, request.into_inner()).await.map(|model| {
            pb::RepositoryModelUnloadResponse { model_name: model.to_string(), is_unloaded: true }
        }))
    }

    async fn system_shared_memory_status(
        &self,
        request: Request<pb::SystemSharedMemoryStatusRequest>,
    ) -> Answered<pb::SystemSharedMemoryStatusResponse> {
        use pb::system_shared_memory_status_response::RegionStatus;
        let name = Some(request.get_ref().name.as_str()).filter(|name| !name.is_empty());
        let regions = may_use_regions(&request).and_then(|()| self.api.shm.status(name));
        let regions = regions.map(|regions| {
            let status = |region: crate::transport::shm::Region| RegionStatus {
                name: region.name,
                key: region.key,
                offset: region.offset as u64,
                byte_size: region.byte_size as u64,
            };
            regions.into_iter().map(|region| (region.name.clone(), status(region))).collect()
        });
        answered(regions.map(|regions| pb::SystemSharedMemoryStatusResponse { regions }))
    }

    async fn system_shared_memory_register(
        &self,
        request: Request<pb::SystemSharedMemoryRegisterRequest>,
    ) -> Answered<pb::SystemSharedMemoryRegisterResponse> {
        let pb::SystemSharedMemoryRegisterRequest { name, key, offset, byte_size } =
            request.get_ref();
        // What does not fit a usize fits no memory either.
        let number = |number: u64| usize::try_from(number).unwrap_or(usize::MAX);
        let done = may_use_regions(&request)
            .and_then(|()| self.api.shm.register(name, key, number(*offset), number(*byte_size)));
        answered(done.map(|()| pb::SystemSharedMemoryRegisterResponse {}))
    }

    async fn system_shared_memory_unregister(
        &self,
        request: Request<pb::SystemSharedMemoryUnregisterRequest>,
    ) -> Answered<pb::SystemSharedMemoryUnregisterResponse> {
        let name = Some(request.get_ref().name.as_str()).filter(|name| !name.is_empty());
        let done = may_use_regions(&request).and_then(|()| self.api.shm.unregister(name));
        answered(done.map(|()| pb::SystemSharedMemoryUnregisterResponse {}))
    }

    async fn cuda_shared_memory_status(
        &self,
        _: Request<pb::CudaSharedMemoryStatusRequest>,
    ) -> Answered<pb::CudaSharedMemoryStatusResponse> {
        answered(Err(no_cuda()))
    }

    async fn cuda_shared_memory_register(
        &self,
        _: Request<pb::CudaSharedMemoryRegisterRequest>,
    ) -> Answered<pb::CudaSharedMemoryRegisterResponse> {
        answered(Err(no_cuda()))
    }

    /// Clients clear all regions before they start, whether or not they will use any.
    async fn cuda_shared_memory_unregister(
        &self,
        request: Request<pb::CudaSharedMemoryUnregisterRequest>,
    ) -> Answered<pb::CudaSharedMemoryUnregisterResponse> {
        match request.get_ref().name.is_empty() {
            true => answered(Ok(pb::CudaSharedMemoryUnregisterResponse {})),
            false => answered(Err(no_cuda())),
        }
    }

    async fn trace_setting(
        &self,
        request: Request<pb::TraceSettingRequest>,
    ) -> Answered<pb::TraceSettingResponse> {
        use pb::trace_setting_response::SettingValue;
        let caller = super::caller(&request);
        let shown = self.trace(&caller, request.into_inner()).map(|shown| {
            let settings = entries(shown).map(|(key, value)| {
                let value = match value {
                    Value::Array(values) => values.into_iter().map(text).collect(),
                    other => vec![text(other)],
                };
                (key, SettingValue { value })
            });
            pb::TraceSettingResponse { settings: settings.collect() }
        });
        answered(shown)
    }

    async fn log_settings(
        &self,
        request: Request<pb::LogSettingsRequest>,
    ) -> Answered<pb::LogSettingsResponse> {
        use pb::log_settings_response::SettingValue;
        use pb::log_settings_response::setting_value::ParameterChoice as Setting;
        let caller = super::caller(&request);
        let shown = self.log(&caller, request.into_inner()).map(|shown| {
            let settings = entries(shown).map(|(key, value)| {
                let value = match value {
                    Value::Bool(value) => Setting::BoolParam(value),
                    Value::Number(value) => {
                        let value = value.as_u64().and_then(|value| u32::try_from(value).ok());
                        Setting::Uint32Param(value.unwrap_or(u32::MAX))
                    }
                    other => Setting::StringParam(text(other)),
                };
                (key, SettingValue { parameter_choice: Some(value) })
            });
            pb::LogSettingsResponse { settings: settings.collect() }
        });
        answered(shown)
    }
}

fn no_cuda() -> Failure {
    Failure::unsupported("CUDA shared memory is not supported, use system shared memory or none")
}

fn entries(object: Value) -> impl Iterator<Item = (String, Value)> {
    let entries = match object {
        Value::Object(entries) => Some(entries),
        _ => None,
    };
    entries.into_iter().flatten()
}

fn text(value: Value) -> String {
    match value {
        Value::String(text) => text,
        other => other.to_string(),
    }
}

type LoadParameters = HashMap<String, pb::ModelRepositoryParameter>;

fn load_parameters(wire: LoadParameters) -> Result<(Option<String>, Vec<ModelFile>), Failure> {
    let mut config = None;
    let mut files = Vec::new();
    for (key, value) in wire {
        match (key.strip_prefix(FILE_PREFIX), value.parameter_choice) {
            (Some(path), Some(Choice::BytesParam(content))) => {
                files.push(ModelFile { path: path.to_owned(), content });
            }
            (None, Some(Choice::StringParam(text))) if key == "config" => config = Some(text),
            _ => {
                return Err(Failure::invalid(
                    "a load takes the parameters 'config', a string, and 'file:<path>', bytes",
                ));
            }
        }
    }
    files.sort_unstable_by(|a, b| a.path.cmp(&b.path));
    Ok((config, files))
}

fn tensor_metadata(spec: &TensorSpec) -> TensorMetadata {
    TensorMetadata {
        name: spec.name.clone(),
        datatype: spec.datatype.name().to_owned(),
        shape: spec.wire_shape(),
    }
}

fn statistics(served: &Served) -> pb::ModelStatistics {
    let stats = served.stats.snapshot();
    let duration =
        |stat: DurationStat| Some(pb::StatisticDuration { count: stat.count, ns: stat.ns });
    let batch = |stat: BatchStat| pb::InferBatchStatistics {
        batch_size: stat.batch_size,
        compute_input: duration(stat.compute_input),
        compute_infer: duration(stat.compute_infer),
        compute_output: duration(stat.compute_output),
    };
    pb::ModelStatistics {
        name: served.model.to_string(),
        version: served.version.to_string(),
        last_inference: stats.last_inference_ms,
        inference_count: stats.inference_count,
        execution_count: stats.execution_count,
        inference_stats: Some(pb::InferStatistics {
            success: duration(stats.success),
            fail: duration(stats.fail),
            queue: duration(stats.queue),
            compute_input: duration(stats.compute_input),
            compute_infer: duration(stats.compute_infer),
            compute_output: duration(stats.compute_output),
            cache_hit: duration(stats.cache_hit),
            cache_miss: duration(stats.cache_miss),
        }),
        batch_stats: stats.batches.into_iter().map(batch).collect(),
        memory_usage: Vec::new(),
        response_stats: HashMap::new(),
    }
}
