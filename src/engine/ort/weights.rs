//! One copy of a model's weights for all of its sessions.
//!
//! ```text
//! model.onnx ──optimise once──▶ derived/… .onnx ──▶ weights (one copy) ─┐
//!                                      └──────── every session ◀────────┘
//! ```
//!
//! Invariant: what can't be shared is loaded plainly; sharing never makes a load fail.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use ort::session::builder::PrepackedWeights;
use ort::value::{DynValue, PrimitiveTensorElementType};
use prost::Message;

use super::{Recipe, Sharing, tensors};
use crate::checksum;
use crate::domain::DataType;
use crate::engine::{Artifact, onnx};
use crate::proto::onnx as pb;

/// Below this a model's weights are not worth sharing.
pub(super) const SHARED_BYTES_MIN: u64 = 1 << 20;

/// Smaller weights stay in each session.
const WEIGHT_BYTES_MIN: usize = 1024;

/// One of a model's weights, as every session sees it.
pub(super) struct Weight {
    pub(super) name: String,
    /// The graph says that it lies in another file.
    pub(super) external: bool,
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
    match try_share(plain, &artifact.path, derived, version) {
        Ok(shared) => {
            notes.push("provider: cpu".to_owned());
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
    let path = optimised(plain, model, derived, version)?;
    let shared = shared(plain, model, &path);
    if shared.is_err() {
        // The graph may have been damaged on disk; the next load makes a new one.
        std::fs::remove_file(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    }
    shared
}

fn shared(
    plain: &Recipe,
    model: &Path,
    optimised: &Path,
) -> Result<(Recipe, ort::session::Session), String> {
    let weights = read(optimised, model)?;
    if weights.is_empty() {
        return Err("it has none that are large and plain".to_owned());
    }
    let mut recipe = plain.clone();
    recipe.path = optimised.to_path_buf();
    recipe.sharing =
        Sharing::Weights { prepacked: PrepackedWeights::new(), weights: Arc::new(weights) };
    let session = recipe.session();
    let session = session.map_err(|error| format!("its optimised graph did not load: {error}"))?;
    Ok((recipe, session))
}

/// The graph as the runtime optimises it for this kind of CPU; made when it isn't there yet.
fn optimised(
    plain: &Recipe,
    model: &Path,
    derived: &Path,
    version: &str,
) -> Result<PathBuf, String> {
    let io = |error: std::io::Error| format!("the derived graph cannot be kept: {error}");
    let digest = File::open(model).and_then(checksum::sha256).map_err(io)?.0.hex();
    let digest = &digest[..32];
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

/// Weights of a graph file, those that are large or lie outside it.
fn read(path: &Path, model: &Path) -> Result<Vec<Weight>, String> {
    let bytes = std::fs::read(path).map_err(|error| error.to_string())?;
    // From `Bytes`, payloads are slices of the file and not copies.
    let graph = pb::Weights::decode(Bytes::from(bytes)).map_err(|error| error.to_string())?;
    let tensors = graph.graph.map(|graph| graph.initializer).unwrap_or_default();
    let folder = model.parent().unwrap_or(Path::new("."));
    let mut weights = Vec::new();
    for tensor in &tensors {
        // The optimised graph names files relative to the model's folder, which is not its own,
        // so the runtime would look for them in the wrong place.
        let payload = if tensor.data_location == 0 {
            tensor.raw_data.clone()
        } else {
            external(tensor, folder)?
        };
        if tensor.data_location == 0 && payload.len() < WEIGHT_BYTES_MIN {
            continue;
        }
        weights.extend(weight(tensor, &payload)?);
    }
    Ok(weights)
}

/// The payload of a weight in another file.
fn external(tensor: &pb::WeightsTensor, folder: &Path) -> Result<Bytes, String> {
    let entry = |key: &str| {
        tensor.external_data.iter().find(|entry| entry.key == key).map(|entry| entry.value.as_str())
    };
    let location = entry("location").unwrap_or_default();
    onnx::confined(folder, location).map_err(|error| error.to_string())?;
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("'{text}' is no offset"));
    let offset = entry("offset").map_or(Ok(0), number)?;
    let mut file = File::open(folder.join(location)).map_err(|error| error.to_string())?;
    let left = file.metadata().map_err(|error| error.to_string())?.len().saturating_sub(offset);
    let length = entry("length").map_or(Ok(left), number)?;
    if length > left {
        return Err(format!("'{location}' has {left} bytes where a weight says it has {length}"));
    }
    file.seek(SeekFrom::Start(offset)).map_err(|error| error.to_string())?;
    let mut payload = Vec::new();
    file.take(length).read_to_end(&mut payload).map_err(|error| error.to_string())?;
    Ok(payload.into())
}

/// `None` for an element type whose weights we leave where they are.
fn weight(tensor: &pb::WeightsTensor, payload: &[u8]) -> Result<Option<Weight>, String> {
    let dims = &tensor.dims[..];
    let value = match onnx::datatype(tensor.data_type) {
        Some(DataType::Fp32) => copy::<f32>(dims, payload),
        Some(DataType::Fp16) => copy::<half::f16>(dims, payload),
        Some(DataType::Bf16) => copy::<half::bf16>(dims, payload),
        Some(DataType::Fp64) => copy::<f64>(dims, payload),
        Some(DataType::Int8) => copy::<i8>(dims, payload),
        Some(DataType::Uint8) => copy::<u8>(dims, payload),
        Some(DataType::Int32) => copy::<i32>(dims, payload),
        Some(DataType::Int64) => copy::<i64>(dims, payload),
        _ => return Ok(None),
    };
    let value = value.map_err(|error| error.message().to_owned())?;
    let external = tensor.data_location != 0;
    Ok(Some(Weight { name: tensor.name.clone(), external, value: Arc::new(value) }))
}

fn copy<T>(dims: &[i64], payload: &[u8]) -> ort::Result<DynValue>
where
    T: PrimitiveTensorElementType
        + bytemuck::AnyBitPattern
        + bytemuck::NoUninit
        + std::fmt::Debug
        + 'static,
{
    if !payload.len().is_multiple_of(size_of::<T>()) {
        return Err(ort::Error::new("a weight's payload is not a whole number of elements"));
    }
    let elements = tensors::aligned::<T>(payload);
    Ok(ort::value::Tensor::from_array((dims, elements))?.into_dyn())
}
