//! tract: pure Rust, nothing to install.
//!
//! Invariants:
//! - A plan is made once and shared by all sessions; each run has a state of its own.
//! - Files of weights are read from the model's folder only.
//! - A panic inside the library is an error of that load or run.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use bytemuck::{AnyBitPattern, NoUninit};
use bytes::Bytes;
use tract_onnx::prelude::*;
use tract_onnx::tract_hir::infer::{Factoid, InferenceFact, InferenceModelExt};

use super::onnx::{self, OnnxModel};
use super::{Artifact, Backend, EngineError, LoadOptions, Model, Session};
use crate::domain::{self, DataType, Signature, TensorSpec};

mod bound;

/// Name of this engine.
pub const NAME: &str = "tract";

/// The library's version, which it doesn't tell by itself.
const VERSION: &str = "0.23.9";

/// Part of the memory for runs that one tensor may take.
const TENSOR_SHARE: usize = 4;

/// tract, ready to load models.
#[derive(Clone, Copy, Debug, Default)]
pub struct TractBackend {
    /// Most bytes of one tensor that a run makes; `None`: no limit.
    tensor_max: Option<usize>,
}

impl TractBackend {
    pub fn new() -> Self {
        Self::default()
    }

    /// With a limit on the memory of runs, in bytes. tract has no arena to hold it: no single
    /// tensor may take more than a quarter of it.
    pub fn with_memory_max(memory_max: Option<usize>) -> Self {
        Self { tensor_max: memory_max.map(|bytes| bytes / TENSOR_SHARE) }
    }
}

impl Backend for TractBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> String {
        VERSION.to_owned()
    }

    fn load(
        &self,
        artifact: &Artifact,
        options: &LoadOptions,
    ) -> Result<Arc<dyn Model>, EngineError> {
        let described = onnx::read(&artifact.path)?;
        described.confine_external_data(artifact.path.parent().unwrap_or(Path::new(".")))?;
        supported(&described)?;
        let made = catch_unwind(AssertUnwindSafe(|| plan(&artifact.path, &described)));
        let plan = match made {
            Ok(Ok(plan)) => plan,
            Ok(Err(error)) => return Err(unsupported(chain(&error))),
            Err(panic) => return Err(unsupported(panicked(&*panic))),
        };
        let mut notes = vec!["provider: cpu".to_owned()];
        if !options.providers.iter().all(|provider| *provider == domain::Provider::Cpu) {
            notes.push("cuda was asked for, tract runs on the cpu".to_owned());
        }
        let signature = Arc::new(described.signature);
        Ok(Arc::new(TractModel { signature, plan, tensor_max: self.tensor_max, notes }))
    }
}

fn unsupported(missing: String) -> EngineError {
    EngineError::Unsupported { engine: NAME, missing }
}

/// Every reason of an error in one line; the outermost alone seldom says what was wrong.
fn chain(error: &TractError) -> String {
    let causes: Vec<String> =
        error.chain().map(|cause| cause.to_string().replace('\n', " ")).collect();
    causes.join(": ")
}

fn panicked(panic: &(dyn Any + Send)) -> String {
    let text = panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("no reason given");
    format!("the library gave up: {text}")
}

/// Names the operators and datatypes that keep the model from running here.
fn supported(described: &OnnxModel) -> Result<(), EngineError> {
    let known = tract_onnx::onnx().op_register;
    let standard = |name: &str| name.rsplit("::").next().unwrap_or(name).to_owned();
    let missing: Vec<&str> = described
        .operators
        .keys()
        .filter(|name| !known.0.contains_key(&standard(name)))
        .map(String::as_str)
        .collect();
    if !missing.is_empty() {
        let noun = if missing.len() == 1 { "operator" } else { "operators" };
        return Err(unsupported(format!("{noun} {}", missing.join(", "))));
    }
    let signature = &described.signature;
    let lacking = |spec: &&TensorSpec| datum_type(spec.datatype).is_none();
    match signature.inputs.iter().chain(&signature.outputs).find(lacking) {
        Some(spec) => Err(unsupported(format!("datatype {} of '{}'", spec.datatype, spec.name))),
        None => Ok(()),
    }
}

fn plan(path: &Path, described: &OnnxModel) -> TractResult<Arc<TypedRunnableModel>> {
    let mut model = tract_onnx::onnx().model_for_path(path)?;
    name_dimensions(&mut model, &described.signature)?;
    model.into_optimized()?.into_runnable()
}

/// tract plans only with dimensions that have a name: the batch shares one, all others differ.
fn name_dimensions(model: &mut InferenceModel, signature: &Signature) -> TractResult<()> {
    let named = |spec: &TensorSpec| match spec.shape.as_deref().and_then(<[_]>::first) {
        Some(domain::Dim::Dynamic(symbol)) => symbol.clone(),
        _ => None,
    };
    let batch = signature.inputs.iter().find_map(named).unwrap_or_else(|| "batch".to_owned());
    for (at, spec) in signature.inputs.iter().enumerate() {
        let Some(dims) = &spec.shape else { continue };
        let fact = model.input_fact(at)?.clone();
        let mut shape: TVec<TDim> = tvec!();
        for (axis, dim) in dims.iter().enumerate() {
            let known = fact.shape.dim(axis).and_then(|dim| dim.concretize());
            shape.push(match (dim, known) {
                (_, Some(known)) => known,
                (domain::Dim::Fixed(size), None) => size.to_dim(),
                (domain::Dim::Dynamic(_), None) if axis == 0 && signature.batched => {
                    model.symbols.sym(&batch).into()
                }
                (domain::Dim::Dynamic(_), None) => {
                    model.symbols.sym(&format!("dim_{at}_{axis}")).into()
                }
            });
        }
        let datum = datum_type(spec.datatype).unwrap_or(DatumType::F32);
        model.set_input_fact(at, InferenceFact::dt_shape(datum, shape))?;
    }
    Ok(())
}

/// `None`: the library has no such type.
fn datum_type(datatype: DataType) -> Option<DatumType> {
    Some(match datatype {
        DataType::Bool => DatumType::Bool,
        DataType::Uint8 => DatumType::U8,
        DataType::Uint16 => DatumType::U16,
        DataType::Uint32 => DatumType::U32,
        DataType::Uint64 => DatumType::U64,
        DataType::Int8 => DatumType::I8,
        DataType::Int16 => DatumType::I16,
        DataType::Int32 => DatumType::I32,
        DataType::Int64 => DatumType::I64,
        DataType::Fp16 => DatumType::F16,
        DataType::Fp32 => DatumType::F32,
        DataType::Fp64 => DatumType::F64,
        DataType::Bytes => DatumType::String,
        DataType::Bf16 => return None,
    })
}

struct TractModel {
    signature: Arc<Signature>,
    plan: Arc<TypedRunnableModel>,
    tensor_max: Option<usize>,
    notes: Vec<String>,
}

impl Model for TractModel {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn session(&self) -> Result<Box<dyn Session>, EngineError> {
        let (signature, plan) = (Arc::clone(&self.signature), Arc::clone(&self.plan));
        Ok(Box::new(TractSession { signature, plan, tensor_max: self.tensor_max }))
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }
}

struct TractSession {
    signature: Arc<Signature>,
    plan: Arc<TypedRunnableModel>,
    tensor_max: Option<usize>,
}

impl Session for TractSession {
    fn run(&mut self, inputs: &[domain::Tensor]) -> Result<Vec<domain::Tensor>, EngineError> {
        super::check_inputs(&self.signature.inputs, inputs)?;
        let values = self
            .signature
            .inputs
            .iter()
            .zip(inputs)
            .map(|(spec, tensor)| value(&spec.name, tensor))
            .collect::<Result<TVec<TValue>, _>>()?;
        let outputs = match catch_unwind(AssertUnwindSafe(|| match self.tensor_max {
            None => self.plan.run(values),
            Some(max) => bound::run(&self.plan, values, max),
        })) {
            Ok(Ok(outputs)) => outputs,
            Ok(Err(error)) => return Err(EngineError::Run(chain(&error))),
            Err(panic) => return Err(EngineError::Run(panicked(&*panic))),
        };
        let specs = &self.signature.outputs;
        specs.iter().zip(outputs).map(|(spec, output)| tensor(spec, output.into_tensor())).collect()
    }
}

fn value(name: &str, tensor: &domain::Tensor) -> Result<TValue, EngineError> {
    let made = match tensor.datatype() {
        DataType::Bool => {
            let elements: Vec<bool> = tensor.data().iter().map(|&byte| byte != 0).collect();
            Tensor::from_shape(tensor.shape(), &elements)
        }
        DataType::Uint8 => plain::<u8>(tensor),
        DataType::Uint16 => plain::<u16>(tensor),
        DataType::Uint32 => plain::<u32>(tensor),
        DataType::Uint64 => plain::<u64>(tensor),
        DataType::Int8 => plain::<i8>(tensor),
        DataType::Int16 => plain::<i16>(tensor),
        DataType::Int32 => plain::<i32>(tensor),
        DataType::Int64 => plain::<i64>(tensor),
        DataType::Fp16 => plain::<half::f16>(tensor),
        DataType::Fp32 => plain::<f32>(tensor),
        DataType::Fp64 => plain::<f64>(tensor),
        DataType::Bytes => return strings(name, tensor),
        DataType::Bf16 => return Err(unsupported(format!("datatype BF16 of '{name}'"))),
    };
    let refused =
        |error: TractError| EngineError::Input { name: name.to_owned(), reason: chain(&error) };
    made.map(IntoTValue::into_tvalue).map_err(refused)
}

fn plain<T>(tensor: &domain::Tensor) -> TractResult<Tensor>
where
    T: Datum + Copy + AnyBitPattern + NoUninit,
{
    if let Ok(elements) = bytemuck::try_cast_slice::<u8, T>(tensor.data()) {
        return Tensor::from_shape(tensor.shape(), elements);
    }
    let mut elements = vec![T::zeroed(); tensor.data().len() / size_of::<T>()];
    bytemuck::cast_slice_mut::<T, u8>(&mut elements).copy_from_slice(tensor.data());
    Tensor::from_shape(tensor.shape(), &elements)
}

fn strings(name: &str, tensor: &domain::Tensor) -> Result<TValue, EngineError> {
    let refuse = |reason: String| EngineError::Input { name: name.to_owned(), reason };
    let mut texts = Vec::with_capacity(tensor.elements());
    for (index, element) in tensor.bytes_elements().enumerate() {
        let text = std::str::from_utf8(element).map_err(|_| {
            refuse(format!("element {index} is not UTF-8, which the model's strings must be"))
        })?;
        texts.push(text.to_owned());
    }
    let array = tract_ndarray::ArrayD::from_shape_vec(tensor.shape(), texts);
    let array = array.map_err(|error| refuse(error.to_string()))?;
    Ok(Tensor::from(array).into_tvalue())
}

/// Our tensor of an output, in the datatype that the model declares.
fn tensor(spec: &TensorSpec, output: Tensor) -> Result<domain::Tensor, EngineError> {
    let failed = |reason: String| EngineError::Run(format!("output '{}': {reason}", spec.name));
    let Some(expected) = datum_type(spec.datatype) else {
        return Err(unsupported(format!("datatype {} of '{}'", spec.datatype, spec.name)));
    };
    // Sizes that the graph computes come in a type of tract's own.
    let output = if output.datum_type() == expected {
        output
    } else {
        output.cast_to_dt(expected).map_err(|error| failed(chain(&error)))?.into_owned()
    };
    let shape = domain::Shape::from_slice(output.shape());
    if spec.datatype == DataType::Bytes {
        let texts =
            output.to_plain_array_view::<String>().map_err(|error| failed(chain(&error)))?;
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        return domain::Tensor::from_elements(shape, &texts)
            .map_err(|error| failed(error.to_string()));
    }
    if output.as_plain_ram().is_none() {
        return Err(failed("its elements are not plain memory".to_owned()));
    }
    let data = if output.len() == 0 { Bytes::new() } else { Bytes::from_owner(Owned(output)) };
    domain::Tensor::new(spec.datatype, shape, data).map_err(|error| failed(error.to_string()))
}

/// Keeps an output until its last reader is done.
struct Owned(Tensor);

impl AsRef<[u8]> for Owned {
    fn as_ref(&self) -> &[u8] {
        self.0.as_plain_ram().map_or(&[], |view| view.as_bytes())
    }
}
