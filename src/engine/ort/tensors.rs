//! Tensors to and from the runtime's values.
//!
//! Invariant: memory that both sides see is never written, and outlives whoever reads it.

use std::fmt::Debug;
use std::marker::PhantomData;

use bytemuck::{AnyBitPattern, NoUninit, checked};
use bytes::Bytes;
use half::{bf16, f16};
use ort::session::SessionInputValue;
use ort::value::{DynValue, PrimitiveTensorElementType, TensorElementType, TensorRef};

use crate::domain::{DataType, Shape, Tensor};
use crate::engine::EngineError;

/// A value that borrows the tensor's bytes when they are aligned.
pub(super) fn value<'a>(
    name: &str,
    tensor: &'a Tensor,
) -> Result<SessionInputValue<'a>, EngineError> {
    let value = match tensor.datatype() {
        DataType::Bool => boolean(tensor),
        DataType::Uint8 => plain::<u8>(tensor),
        DataType::Uint16 => plain::<u16>(tensor),
        DataType::Uint32 => plain::<u32>(tensor),
        DataType::Uint64 => plain::<u64>(tensor),
        DataType::Int8 => plain::<i8>(tensor),
        DataType::Int16 => plain::<i16>(tensor),
        DataType::Int32 => plain::<i32>(tensor),
        DataType::Int64 => plain::<i64>(tensor),
        DataType::Fp16 => plain::<f16>(tensor),
        DataType::Fp32 => plain::<f32>(tensor),
        DataType::Fp64 => plain::<f64>(tensor),
        DataType::Bf16 => plain::<bf16>(tensor),
        DataType::Bytes => return strings(name, tensor),
    };
    value.map_err(|error| refused(name, &error))
}

fn refused(name: &str, error: &ort::Error) -> EngineError {
    EngineError::Input { name: name.to_owned(), reason: error.message().to_owned() }
}

fn plain<'a, T>(tensor: &'a Tensor) -> ort::Result<SessionInputValue<'a>>
where
    T: PrimitiveTensorElementType + AnyBitPattern + NoUninit + Debug,
{
    match bytemuck::try_cast_slice::<u8, T>(tensor.data()) {
        Ok(elements) => Ok(TensorRef::from_array_view((tensor.shape(), elements))?.into()),
        Err(_) => {
            let aligned = aligned::<T>(tensor.data());
            Ok(ort::value::Tensor::from_array((tensor.shape(), aligned))?.into())
        }
    }
}

/// A copy at an address that fits the type; one that borrowed would not.
pub(super) fn aligned<T: AnyBitPattern + NoUninit>(data: &[u8]) -> Vec<T> {
    let mut elements = vec![T::zeroed(); data.len() / size_of::<T>()];
    bytemuck::cast_slice_mut::<T, u8>(&mut elements).copy_from_slice(data);
    elements
}

fn boolean(tensor: &Tensor) -> ort::Result<SessionInputValue<'_>> {
    let elements = checked::try_cast_slice::<u8, bool>(tensor.data())
        .map_err(|error| ort::Error::new(error.to_string()))?;
    Ok(TensorRef::from_array_view((tensor.shape(), elements))?.into())
}

fn strings<'a>(name: &str, tensor: &'a Tensor) -> Result<SessionInputValue<'a>, EngineError> {
    let refuse = |index: usize, what: &str| EngineError::Input {
        name: name.to_owned(),
        reason: format!("element {index} {what}"),
    };
    let mut texts = Vec::with_capacity(tensor.elements());
    for (index, element) in tensor.bytes_elements().enumerate() {
        let text = std::str::from_utf8(element)
            .map_err(|_| refuse(index, "is not UTF-8, which the model's strings must be"))?;
        // The runtime takes strings up to their first zero.
        if text.contains('\0') {
            return Err(refuse(index, "has a zero byte, which the model's strings cannot have"));
        }
        texts.push(text.to_owned());
    }
    let value = ort::value::Tensor::from_string_array((tensor.shape(), &texts[..]));
    value.map(Into::into).map_err(|error| refused(name, &error))
}

/// Our tensor of a value that a run gave, without a copy but for strings.
pub(super) fn tensor(name: &str, value: DynValue) -> Result<Tensor, EngineError> {
    let failed = |reason: String| EngineError::Run(format!("output '{name}': {reason}"));
    let ort::value::ValueType::Tensor { ty, shape, .. } = value.dtype() else {
        return Err(failed(format!("expected a tensor, got {}", value.dtype())));
    };
    let ty = *ty;
    let shape = Tensor::shape_from_wire(shape).map_err(|error| failed(error.to_string()))?;
    let (datatype, data) = match ty {
        TensorElementType::Bool => (DataType::Bool, owned::<bool>(value)),
        TensorElementType::Uint8 => (DataType::Uint8, owned::<u8>(value)),
        TensorElementType::Uint16 => (DataType::Uint16, owned::<u16>(value)),
        TensorElementType::Uint32 => (DataType::Uint32, owned::<u32>(value)),
        TensorElementType::Uint64 => (DataType::Uint64, owned::<u64>(value)),
        TensorElementType::Int8 => (DataType::Int8, owned::<i8>(value)),
        TensorElementType::Int16 => (DataType::Int16, owned::<i16>(value)),
        TensorElementType::Int32 => (DataType::Int32, owned::<i32>(value)),
        TensorElementType::Int64 => (DataType::Int64, owned::<i64>(value)),
        TensorElementType::Float16 => (DataType::Fp16, owned::<f16>(value)),
        TensorElementType::Float32 => (DataType::Fp32, owned::<f32>(value)),
        TensorElementType::Float64 => (DataType::Fp64, owned::<f64>(value)),
        TensorElementType::Bfloat16 => (DataType::Bf16, owned::<bf16>(value)),
        TensorElementType::String => return texts(name, shape, &value),
        other => return Err(failed(format!("element type {other} is not in the protocol"))),
    };
    let data = data.map_err(|error| failed(error.message().to_owned()))?;
    Tensor::new(datatype, shape, data).map_err(|error| failed(error.to_string()))
}

fn texts(name: &str, shape: Shape, value: &DynValue) -> Result<Tensor, EngineError> {
    let failed = |reason: String| EngineError::Run(format!("output '{name}': {reason}"));
    let (_, texts) =
        value.try_extract_strings().map_err(|error| failed(error.message().to_owned()))?;
    Tensor::from_elements(shape, &texts).map_err(|error| failed(error.to_string()))
}

fn owned<T>(value: DynValue) -> ort::Result<Bytes>
where
    T: PrimitiveTensorElementType + NoUninit + Send + 'static,
{
    // Here, so that a value of another type or place is an error and not an empty tensor.
    value.try_extract_tensor::<T>()?;
    Ok(Bytes::from_owner(Owned::<T> { value, element: PhantomData }))
}

/// Keeps the runtime's memory until the last reader is done.
struct Owned<T> {
    value: DynValue,
    element: PhantomData<T>,
}

impl<T: PrimitiveTensorElementType + NoUninit> AsRef<[u8]> for Owned<T> {
    fn as_ref(&self) -> &[u8] {
        self.value
            .try_extract_tensor::<T>()
            .map_or(&[], |(_, elements)| bytemuck::cast_slice(elements))
    }
}
