//! One copy of a model's weights for all of its sessions.
//!
//! ```text
//! model.onnx ──optimise once──▶ derived/… .onnx ──▶ weights (one copy) ─┐
//!                                      └──────── every session ◀────────┘
//! ```
//!
//! Invariant: what can't be shared is loaded plainly; sharing never makes a load fail.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ort::session::builder::PrepackedWeights;
use ort::value::{DynValue, PrimitiveTensorElementType};
use prost::Message;
use sha2::{Digest, Sha256};

use super::{Recipe, Sharing, tensors};
use crate::domain::DataType;
use crate::engine::{Artifact, onnx};
use crate::proto::onnx as pb;

/// Below this a model's weights are not worth sharing.
const MODEL_BYTES_MIN: u64 = 1 << 20;

/// Smaller weights stay in each session.
const WEIGHT_BYTES_MIN: usize = 1024;

/// One of a model's weights, as every session sees it.
pub(super) struct Weight {
    pub(super) name: String,
    pub(super) value: Arc<DynValue>,
}

/// A recipe whose sessions share weights, and its first session. `None`: better not.
pub(super) fn share(
    plain: &Recipe,
    artifact: &Artifact,
    version: &str,
    notes: &mut Vec<String>,
) -> Option<(Recipe, ort::session::Session)> {
    let derived = artifact.derived.as_deref()?;
    if std::fs::metadata(&artifact.path).ok()?.len() < MODEL_BYTES_MIN {
        return None;
    }
    match try_share(plain, &artifact.path, derived, version) {
        Ok(shared) => {
            notes.push("weights: shared by all sessions".to_owned());
            Some(shared)
        }
        Err(reason) => {
            notes.push(format!("weights: one copy per session, because {reason}"));
            None
        }
    }
}

fn try_share(
    plain: &Recipe,
    model: &Path,
    derived: &Path,
    version: &str,
) -> Result<(Recipe, ort::session::Session), String> {
    let optimised = optimised(plain, model, derived, version)?;
    let weights = read(&optimised)?;
    if weights.is_empty() {
        return Err("it has none that are large and plain".to_owned());
    }
    let mut recipe = plain.clone();
    recipe.path = optimised;
    recipe.sharing =
        Sharing::Weights { prepacked: PrepackedWeights::new(), weights: Arc::new(weights) };
    match recipe.session() {
        Ok(session) => Ok((recipe, session)),
        Err(error) => {
            // It may have been cut short when it was written; the next load makes a new one.
            let removed = std::fs::remove_file(&recipe.path);
            Err(format!("the optimised graph did not load: {error} (removed: {})", removed.is_ok()))
        }
    }
}

/// The graph as the runtime optimises it for this kind of CPU; made when it isn't there yet.
fn optimised(
    plain: &Recipe,
    model: &Path,
    derived: &Path,
    version: &str,
) -> Result<PathBuf, String> {
    let io = |error: std::io::Error| format!("the derived graph cannot be kept: {error}");
    let bytes = std::fs::read(model).map_err(io)?;
    let digest = Sha256::digest(&bytes);
    drop(bytes);
    let digest: String = digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    let path = derived.join(format!("{digest}-{version}-{}.onnx", cpu()));
    if path.is_file() {
        return Ok(path);
    }
    std::fs::create_dir_all(derived).map_err(io)?;
    // Written aside and renamed, so that a load which dies leaves nothing half done in place.
    let aside = derived.join(format!("{digest}-{}.part", std::process::id()));
    let made = plain
        .builder()
        .and_then(|builder| {
            let mut builder = builder
                .with_optimized_model_path(&aside)
                .map_err(|error| ort::Error::new_with_code(error.code(), error.message()))?;
            builder.commit_from_file(&plain.path)
        })
        .map_err(|error| error.message().to_owned());
    let placed = made.and_then(|_session| std::fs::rename(&aside, &path).map_err(io));
    if placed.is_err() && aside.exists() {
        std::fs::remove_file(&aside).map_err(io)?;
    }
    placed.map(|()| path)
}

/// Names the instructions that optimised graphs depend on.
fn cpu() -> String {
    #[cfg(target_arch = "x86_64")]
    {
        let has = [
            ("avx", std::is_x86_feature_detected!("avx")),
            ("avx2", std::is_x86_feature_detected!("avx2")),
            ("avx512f", std::is_x86_feature_detected!("avx512f")),
            ("avx512vnni", std::is_x86_feature_detected!("avx512vnni")),
        ];
        let features: String =
            has.iter().filter(|(_, has)| *has).map(|(name, _)| format!("-{name}")).collect();
        format!("x86_64{features}")
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        std::env::consts::ARCH.to_owned()
    }
}

/// Weights of a graph file that are large, plain and inside it.
fn read(path: &Path) -> Result<Vec<Weight>, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    // From `Bytes`, payloads are slices of the file and not copies.
    let model =
        pb::Weights::decode(bytes::Bytes::from(bytes)).map_err(|error| error.to_string())?;
    let tensors = model.graph.map(|graph| graph.initializer).unwrap_or_default();
    let large = |tensor: &&pb::WeightsTensor| {
        tensor.data_location == 0 && tensor.raw_data.len() >= WEIGHT_BYTES_MIN
    };
    tensors.iter().filter(large).filter_map(|tensor| weight(tensor).transpose()).collect()
}

/// `None` for an element type whose weights we leave where they are.
fn weight(tensor: &pb::WeightsTensor) -> Result<Option<Weight>, String> {
    let value = match onnx::datatype(tensor.data_type) {
        Some(DataType::Fp32) => copy::<f32>(tensor),
        Some(DataType::Fp16) => copy::<half::f16>(tensor),
        Some(DataType::Bf16) => copy::<half::bf16>(tensor),
        Some(DataType::Fp64) => copy::<f64>(tensor),
        Some(DataType::Int8) => copy::<i8>(tensor),
        Some(DataType::Uint8) => copy::<u8>(tensor),
        Some(DataType::Int32) => copy::<i32>(tensor),
        _ => return Ok(None),
    };
    let value = value.map_err(|error| error.message().to_owned())?;
    Ok(Some(Weight { name: tensor.name.clone(), value: Arc::new(value) }))
}

fn copy<T>(tensor: &pb::WeightsTensor) -> ort::Result<DynValue>
where
    T: PrimitiveTensorElementType + bytemuck::AnyBitPattern + bytemuck::NoUninit + std::fmt::Debug,
{
    if tensor.raw_data.len() % size_of::<T>() != 0 {
        return Err(ort::Error::new("a weight's payload is not a whole number of elements"));
    }
    let elements = tensors::aligned::<T>(&tensor.raw_data);
    Ok(ort::value::Tensor::from_array((&tensor.dims[..], elements))?.into_dyn())
}
