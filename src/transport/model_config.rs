//! A served version as Triton's model configuration: message and JSON.
//!
//! Invariants:
//! - Names equal those of the metadata, and `dims` is the metadata's shape without the batch
//!   dimension when `max_batch_size` is above 0: clients put the two together.
//! - In JSON every field without presence is there, also when it has its default value.

use prost::Message as _;
use prost_reflect::{DynamicMessage, SerializeOptions};

use crate::domain::{BatchSettings, ModelSettings, Provider, TensorSpec, VersionPolicy};
use crate::proto::{self, inference as pb};
use crate::route::Served;

/// What `max_batch_size`, counts and numbers say when ours is beyond 32 bits.
const INT_MAX: i32 = i32::MAX;

/// The configuration as `ModelConfig` answers it.
pub fn to_proto(served: &Served) -> pb::ModelConfig {
    let Served { model, signature, settings, engine, .. } = served;
    let (platform, backend) = platform(engine);
    let batched = signature.batched;
    pb::ModelConfig {
        name: model.to_string(),
        platform: platform.to_owned(),
        backend: backend.to_owned(),
        version_policy: Some(version_policy(settings.versions.as_ref())),
        max_batch_size: if batched { int(settings.batch.rows_max) } else { 0 },
        input: signature.inputs.iter().map(|spec| input(spec, batched)).collect(),
        output: signature.outputs.iter().map(|spec| output(spec, batched)).collect(),
        instance_group: instance_group(model.as_str(), settings),
        default_model_filename: model_file(settings).to_owned(),
        response_cache: settings.cached.then_some(pb::ModelResponseCache { enable: true }),
        scheduling_choice: (batched && settings.batch.size_max > 1)
            .then(|| dynamic_batching(&settings.batch)),
        ..pb::ModelConfig::default()
    }
}

/// The configuration as `GET …/config` answers it.
pub fn to_json(served: &Served) -> serde_json::Value {
    message_json(&to_proto(served))
}

/// Word for `platform` in metadata and configuration, and for `backend` in configuration.
pub fn platform(engine: &str) -> (&'static str, &'static str) {
    match engine {
        "tract" => ("tract_onnx", "tract"),
        _ => ("onnxruntime_onnx", "onnxruntime"),
    }
}

fn message_json(config: &pb::ModelConfig) -> serde_json::Value {
    let options = SerializeOptions::new()
        .use_proto_field_name(true)
        .skip_default_fields(false)
        .stringify_64_bit_integers(false);
    let descriptor = proto::message("inference.ModelConfig");
    DynamicMessage::decode(descriptor, config.encode_to_vec().as_slice())
        .ok()
        .and_then(|message| {
            message.serialize_with_options(serde_json::value::Serializer, &options).ok()
        })
        .unwrap_or_default()
}

fn int(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(INT_MAX)
}

fn model_file(settings: &ModelSettings) -> &str {
    settings.model_file.as_deref().unwrap_or("model.onnx")
}

fn dims(spec: &TensorSpec, batched: bool) -> Vec<i64> {
    spec.wire_shape().into_iter().skip(usize::from(batched)).collect()
}

fn input(spec: &TensorSpec, batched: bool) -> pb::ModelInput {
    pb::ModelInput {
        name: spec.name.clone(),
        data_type: spec.datatype.config_number(),
        dims: dims(spec, batched),
        ..pb::ModelInput::default()
    }
}

fn output(spec: &TensorSpec, batched: bool) -> pb::ModelOutput {
    pb::ModelOutput {
        name: spec.name.clone(),
        data_type: spec.datatype.config_number(),
        dims: dims(spec, batched),
        ..pb::ModelOutput::default()
    }
}

fn version_policy(policy: Option<&VersionPolicy>) -> pb::ModelVersionPolicy {
    use pb::model_version_policy::{All, Latest, PolicyChoice, Specific};
    let choice = match policy {
        None | Some(VersionPolicy::All) => PolicyChoice::All(All {}),
        Some(VersionPolicy::Latest(count)) => {
            let num_versions = u32::try_from(*count).unwrap_or(u32::MAX);
            PolicyChoice::Latest(Latest { num_versions })
        }
        Some(VersionPolicy::Specific(versions)) => {
            let number = |version: &u64| i64::try_from(*version).unwrap_or(i64::MAX);
            PolicyChoice::Specific(Specific { versions: versions.iter().map(number).collect() })
        }
    };
    pb::ModelVersionPolicy { policy_choice: Some(choice) }
}

/// Empty while nobody said how many sessions there are to be.
fn instance_group(model: &str, settings: &ModelSettings) -> Vec<pb::ModelInstanceGroup> {
    use pb::model_instance_group::Kind;
    let gpus: Vec<i32> = settings
        .providers
        .iter()
        .filter_map(|provider| match provider {
            Provider::Cuda { device_id, .. } => Some(*device_id),
            Provider::Cpu => None,
        })
        .collect();
    if settings.instances.is_none() && gpus.is_empty() {
        return Vec::new();
    }
    let kind = if gpus.is_empty() { Kind::Cpu } else { Kind::Gpu };
    vec![pb::ModelInstanceGroup {
        name: model.to_owned(),
        kind: kind.into(),
        count: int(settings.instances.unwrap_or(1)),
        gpus,
        ..pb::ModelInstanceGroup::default()
    }]
}

fn dynamic_batching(batch: &BatchSettings) -> pb::model_config::SchedulingChoice {
    let micros = |wait: std::time::Duration| u64::try_from(wait.as_micros()).unwrap_or(u64::MAX);
    pb::model_config::SchedulingChoice::DynamicBatching(pb::ModelDynamicBatching {
        preferred_batch_size: batch.preferred.iter().copied().map(int).collect(),
        max_queue_delay_microseconds: micros(batch.wait_max),
        preserve_ordering: batch.preserve_ordering,
        priority_levels: batch.priority_levels.into(),
        default_priority_level: batch.priority_default.into(),
        default_queue_policy: Some(pb::ModelQueuePolicy {
            default_timeout_microseconds: batch.queue_wait_max.map_or(0, micros),
            allow_timeout_override: batch.allow_timeout_override,
            max_queue_size: u32::try_from(batch.queue_max).unwrap_or(u32::MAX),
            ..pb::ModelQueuePolicy::default()
        }),
        ..pb::ModelDynamicBatching::default()
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::batch::{Lane, LaneParts, ThreadBudget};
    use crate::domain::{Digest, Version};
    use crate::engine::Model as _;
    use crate::engine::fake::FakeModel;
    use crate::observe::{Observer, VersionStats};

    fn served(settings: ModelSettings, batched: bool) -> Served {
        let fake = FakeModel::new(4, 1.0);
        let mut signature = fake.signature().clone();
        signature.batched = batched;
        let (model, version) =
            ("m".parse::<crate::domain::ModelName>().unwrap(), Version::new(3).unwrap());
        let digest = Digest::new([0; 32]);
        let stats =
            VersionStats::new(&Observer::default(), &model, version, &digest, "onnxruntime");
        let parts = LaneParts {
            model: model.clone(),
            version,
            batch: settings.batch.clone(),
            batched,
            padding: None,
            sessions: vec![fake.session().unwrap()],
            stats: Arc::clone(&stats),
            budget: Arc::new(ThreadBudget::new(1)),
        };
        let lane = Lane::new(parts).unwrap();
        let recording = crate::domain::Recording::default();
        Served {
            model,
            version,
            digest,
            engine: "onnxruntime",
            signature,
            settings,
            lane,
            stats,
            recording,
            watch: None,
        }
    }

    #[test]
    fn a_batched_model_leaves_the_batch_out_of_dims() {
        let mut settings = ModelSettings::default();
        settings.batch.rows_max = 16;
        settings.batch.preferred = vec![4, 8];
        let json = to_json(&served(settings, true));
        assert_eq!(json["max_batch_size"], 16);
        assert_eq!(json["platform"], "onnxruntime_onnx");
        assert_eq!(json["input"][0]["dims"], serde_json::json!([4]));
        assert_eq!(json["input"][0]["data_type"], "TYPE_FP32");
        assert_eq!(json["input"][0]["is_shape_tensor"], false);
        assert_eq!(json["input"][0]["optional"], false);
        assert_eq!(json["output"][0]["is_shape_tensor"], false);
        assert_eq!(json["dynamic_batching"]["preferred_batch_size"], serde_json::json!([4, 8]));
        assert_eq!(json["dynamic_batching"]["priority_levels"], 0);
        assert_eq!(json["version_policy"]["all"], serde_json::json!({}));
        assert_eq!(json["default_model_filename"], "model.onnx");
        // Clients take these keys' being there to mean that they have content.
        for absent in ["sequence_batching", "ensemble_scheduling", "model_transaction_policy"] {
            assert_eq!(json.get(absent), None, "{absent}");
        }
    }

    #[test]
    fn an_unbatched_model_shows_all_dims() {
        let settings = ModelSettings {
            instances: Some(2),
            providers: vec![Provider::Cuda { device_id: 1, memory_max_bytes: None }, Provider::Cpu],
            versions: Some(VersionPolicy::Specific(vec![1, 3])),
            ..ModelSettings::default()
        };
        let json = to_json(&served(settings, false));
        assert_eq!(json["max_batch_size"], 0);
        assert_eq!(json["input"][0]["dims"], serde_json::json!([-1, 4]));
        assert_eq!(json.get("dynamic_batching"), None);
        assert_eq!(json["instance_group"][0]["kind"], "KIND_GPU");
        assert_eq!(json["instance_group"][0]["gpus"], serde_json::json!([1]));
        assert_eq!(json["version_policy"]["specific"]["versions"], serde_json::json!([1, 3]));
    }
}
