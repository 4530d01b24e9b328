//! What is served: metadata, readiness, configuration, statistics, health.

use http::StatusCode;
use serde_json::{Value, json};

use super::openapi;
use super::reply::Reply;
use crate::domain::{Failure, ModelName, TensorSpec, VersionRef, VersionState};
use crate::observe::{BatchStat, DurationStat, StatsSnapshot};
use crate::route::{RouteTable, Served};
use crate::transport::auth::Caller;
use crate::transport::{Api, SERVER_NAME, model_config};

pub(super) fn server(api: &Api) -> Reply {
    let extensions = api.extensions();
    let version = env!("CARGO_PKG_VERSION");
    Reply::value(&json!({"name": SERVER_NAME, "version": version, "extensions": extensions}))
}

/// The bodies satisfy clients that read `live`, `ready` or only the status.
pub(super) fn live(api: &Api) -> Reply {
    let live = api.gateway.is_live();
    let body = json!({"live": live}).to_string();
    Reply::json(if live { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, body)
}

pub(super) fn ready(api: &Api) -> Reply {
    let ready = api.health.is_ready();
    let body = json!({"live": true, "ready": ready}).to_string();
    Reply::json(if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, body)
}

pub(super) fn list(api: &Api, caller: &Caller) -> Reply {
    let table = api.gateway.table();
    let seen = table.models.keys().filter(|model| caller.sees(model));
    let names: Vec<&str> = seen.map(ModelName::as_str).collect();
    Reply::value(&json!({"models": names}))
}

pub(super) fn metadata(
    api: &Api,
    model: &ModelName,
    version: Option<&VersionRef>,
) -> Result<Reply, Failure> {
    let table = api.gateway.table();
    let served = table.pick(model, version)?.served;
    Ok(Reply::value(&json!({
        "name": served.model,
        "versions": versions(&table, model),
        "platform": model_config::platform(served.engine).0,
        "inputs": tensors(&served.signature.inputs),
        "outputs": tensors(&served.signature.outputs),
    })))
}

fn tensors(specs: &[TensorSpec]) -> Value {
    let tensor = |spec: &TensorSpec| json!({"name": spec.name, "datatype": spec.datatype.name(), "shape": spec.wire_shape()});
    specs.iter().map(tensor).collect()
}

/// 200 when ready, 503 when known but not ready, 404 when unknown.
pub(super) fn model_ready(
    api: &Api,
    model: &ModelName,
    version: Option<&VersionRef>,
) -> Result<Reply, Failure> {
    let picked = api.gateway.served(model, version);
    let index = if picked.is_ok() { Vec::new() } else { api.gateway.control().index() };
    let known = index.iter().any(|entry| {
        entry.model == *model
            && match (version, entry.version) {
                (Some(VersionRef::Number(asked)), Some(number)) => *asked == number,
                (Some(_), _) => false,
                (None, _) => entry.state != VersionState::Ready,
            }
    });
    let status = match picked {
        Ok(_) => StatusCode::OK,
        Err(_) if known => StatusCode::SERVICE_UNAVAILABLE,
        Err(failure) => return Err(failure),
    };
    let ready = status == StatusCode::OK;
    Ok(Reply::json(status, json!({"name": model, "ready": ready}).to_string()))
}

pub(super) fn config(
    api: &Api,
    model: &ModelName,
    version: Option<&VersionRef>,
) -> Result<Reply, Failure> {
    let served = api.gateway.served(model, version)?;
    Ok(Reply::value(&model_config::to_json(&served)))
}

pub(super) fn openapi(
    api: &Api,
    model: &ModelName,
    version: Option<&VersionRef>,
) -> Result<Reply, Failure> {
    let table = api.gateway.table();
    let served = table.pick(model, version)?.served;
    Ok(Reply::value(&openapi::document(&served, &versions(&table, model))))
}

fn versions(table: &RouteTable, model: &ModelName) -> Vec<String> {
    let routes = table.models.get(model);
    routes.into_iter().flat_map(|r| r.versions.keys()).map(ToString::to_string).collect()
}

/// Statistics of one version, or of one model's versions.
pub(super) fn stats(
    api: &Api,
    model: &ModelName,
    version: Option<&VersionRef>,
) -> Result<Reply, Failure> {
    let table = api.gateway.table();
    // Fails for a model that is not served.
    let picked = table.pick(model, version)?.served;
    let all: Vec<Value> = match (version, table.models.get(model)) {
        (None, Some(routes)) => routes.versions.values().map(|s| version_stats(s)).collect(),
        _ => vec![version_stats(&picked)],
    };
    Ok(Reply::value(&json!({"model_stats": all})))
}

/// Statistics of all that the caller may see.
pub(super) fn stats_of_all(api: &Api, caller: &Caller) -> Reply {
    let table = api.gateway.table();
    let seen = table.models.iter().filter(|(model, _)| caller.sees(model));
    let versions = seen.flat_map(|(_, routes)| routes.versions.values());
    let all: Vec<Value> = versions.map(|served| version_stats(served)).collect();
    Reply::value(&json!({"model_stats": all}))
}

/// Every key that clients read is there, zeros included.
fn version_stats(served: &Served) -> Value {
    let StatsSnapshot {
        last_inference_ms,
        inference_count,
        execution_count,
        success,
        fail,
        queue,
        compute_input,
        compute_infer,
        compute_output,
        cache_hit,
        cache_miss,
        batches,
    } = served.stats.snapshot();
    json!({
        "name": served.model,
        "version": served.version.to_string(),
        "last_inference": last_inference_ms,
        "inference_count": inference_count,
        "execution_count": execution_count,
        "inference_stats": {
            "success": duration(success),
            "fail": duration(fail),
            "queue": duration(queue),
            "compute_input": duration(compute_input),
            "compute_infer": duration(compute_infer),
            "compute_output": duration(compute_output),
            "cache_hit": duration(cache_hit),
            "cache_miss": duration(cache_miss),
        },
        "response_stats": {},
        "batch_stats": batches.iter().map(batch).collect::<Vec<_>>(),
        "memory_usage": [],
    })
}

fn batch(batch: &BatchStat) -> Value {
    json!({
        "batch_size": batch.batch_size,
        "compute_input": duration(batch.compute_input),
        "compute_infer": duration(batch.compute_infer),
        "compute_output": duration(batch.compute_output),
    })
}

fn duration(stat: DurationStat) -> Value {
    json!({"count": stat.count, "ns": stat.ns})
}
