//! What every engine must hold to, whatever the model: run by tests over all of them.
//!
//! Inputs are made up from the model's signature, so any model that takes small numbers will do.

use bytes::Bytes;

use super::{EngineError, Model, Session};
use crate::domain::{DataType, Dim, Shape, Signature, Tensor};

/// Rows of a made-up batch.
const ROWS: usize = 3;

/// Size of every other dynamic dimension.
const INNER: usize = 2;

/// Largest difference, relative to the values, between a row alone and in a batch: kernels may add
/// in another order when there are more rows.
const TOLERANCE: f64 = 1e-4;

/// Checks a loaded model against the promises of [`Model`] and [`Session`]; the error says which
/// one is broken.
pub fn conforms(model: &dyn Model) -> Result<(), String> {
    let signature = model.signature();
    let mut session = model.session().map_err(|error| format!("no session: {error}"))?;
    let inputs = make_inputs(signature, ROWS)?;
    let outputs = run(&mut *session, &inputs, "first run")?;
    declared(signature, &outputs)?;
    same(&outputs, &run(&mut *session, &inputs, "second run")?, "second run")?;
    let mut other = model.session().map_err(|error| format!("no second session: {error}"))?;
    same(&outputs, &run(&mut *other, &inputs, "other session")?, "other session")?;
    same(&outputs, &run(&mut *other, &misaligned(&inputs)?, "misaligned")?, "misaligned")?;
    if signature.batched {
        rows_are_independent(&mut *session, &inputs, &outputs)?;
    }
    refuses(signature, &mut *session, &inputs)?;
    same(&outputs, &run(&mut *session, &inputs, "after errors")?, "after errors")?;
    let kept: Vec<Tensor> = outputs.clone();
    drop(session);
    drop(other);
    same(&outputs, &kept, "after the session's end")
}

fn run(session: &mut dyn Session, inputs: &[Tensor], what: &str) -> Result<Vec<Tensor>, String> {
    session.run(inputs).map_err(|error| format!("{what}: {error}"))
}

/// Small numbers that differ from element to element; texts for strings.
pub fn make_inputs(signature: &Signature, rows: usize) -> Result<Vec<Tensor>, String> {
    let mut inputs = Vec::with_capacity(signature.inputs.len());
    for spec in &signature.inputs {
        let dims = spec.shape.clone().unwrap_or_else(|| vec![Dim::Dynamic(None)]);
        let size = |(axis, dim): (usize, &Dim)| match dim {
            Dim::Fixed(size) => *size,
            Dim::Dynamic(_) if axis == 0 => rows,
            Dim::Dynamic(_) => INNER,
        };
        let shape: Shape = dims.iter().enumerate().map(size).collect();
        inputs.push(make(spec.datatype, shape)?);
    }
    Ok(inputs)
}

fn make(datatype: DataType, shape: Shape) -> Result<Tensor, String> {
    let count: usize = shape.iter().product();
    if datatype == DataType::Bytes {
        let texts: Vec<String> = (0..count).map(|n| format!("é{n}")).collect();
        return Tensor::from_elements(shape, &texts).map_err(|error| error.to_string());
    }
    let mut data = Vec::new();
    for number in (0_u8..7).cycle().take(count) {
        match datatype {
            DataType::Bool => data.push(number % 2),
            DataType::Fp16 => data.extend(half::f16::from_f32(number.into()).to_le_bytes()),
            DataType::Bf16 => data.extend(half::bf16::from_f32(number.into()).to_le_bytes()),
            DataType::Fp32 => data.extend((f32::from(number) / 2.0).to_le_bytes()),
            DataType::Fp64 => data.extend((f64::from(number) / 2.0).to_le_bytes()),
            _ => {
                data.push(number);
                data.resize(data.len() + datatype.size().unwrap_or(1) - 1, 0);
            }
        }
    }
    Tensor::new(datatype, shape, data.into()).map_err(|error| error.to_string())
}

/// The same tensors at odd addresses.
fn misaligned(inputs: &[Tensor]) -> Result<Vec<Tensor>, String> {
    let shift = |tensor: &Tensor| {
        let mut moved: Vec<u8> = Vec::with_capacity(tensor.data().len() + 2);
        let at = usize::from(moved.as_ptr().addr().is_multiple_of(2));
        moved.resize(at, 0);
        moved.extend_from_slice(tensor.data());
        let data = Bytes::from(moved).slice(at..);
        Tensor::new(tensor.datatype(), Shape::from_slice(tensor.shape()), data)
    };
    inputs.iter().map(|tensor| shift(tensor).map_err(|error| error.to_string())).collect()
}

/// Outputs are those that the signature declares.
fn declared(signature: &Signature, outputs: &[Tensor]) -> Result<(), String> {
    if outputs.len() != signature.outputs.len() {
        let (expected, got) = (signature.outputs.len(), outputs.len());
        return Err(format!("expected {expected} outputs, got {got}"));
    }
    for (spec, tensor) in signature.outputs.iter().zip(outputs) {
        let name = &spec.name;
        if spec.datatype != tensor.datatype() {
            let (expected, got) = (spec.datatype, tensor.datatype());
            return Err(format!("output '{name}': expected {expected}, got {got}"));
        }
        let fits = |dims: &Vec<Dim>| {
            dims.len() == tensor.shape().len()
                && dims
                    .iter()
                    .zip(tensor.shape())
                    .all(|(dim, got)| *dim == Dim::Fixed(*got) || matches!(dim, Dim::Dynamic(_)))
        };
        if !spec.shape.as_ref().is_none_or(fits) {
            let (expected, got) = (spec.wire_shape(), tensor.shape());
            return Err(format!("output '{name}': expected shape {expected:?}, got {got:?}"));
        }
    }
    Ok(())
}

fn same(expected: &[Tensor], got: &[Tensor], what: &str) -> Result<(), String> {
    if expected == got {
        Ok(())
    } else {
        Err(format!("{what}: expected {expected:?}, got {got:?}"))
    }
}

/// Row `i` comes out the same whatever else is in the batch.
fn rows_are_independent(
    session: &mut dyn Session,
    inputs: &[Tensor],
    outputs: &[Tensor],
) -> Result<(), String> {
    for row in 0..ROWS {
        let cut = |tensor: &Tensor| {
            tensor.rows(row, row + 1).ok_or_else(|| format!("no row {row} in {:?}", tensor.shape()))
        };
        let alone: Vec<Tensor> = inputs.iter().map(cut).collect::<Result<_, _>>()?;
        let got = run(session, &alone, "row alone")?;
        for (together, alone) in outputs.iter().zip(&got) {
            let together = cut(together)?;
            if !close(&together, alone) {
                return Err(format!("row {row}: together {together:?}, alone {alone:?}"));
            }
        }
    }
    Ok(())
}

/// Equal, or nearly so where elements are floating point.
pub fn close(left: &Tensor, right: &Tensor) -> bool {
    if left == right {
        return true;
    }
    if left.shape() != right.shape() || left.datatype() != right.datatype() {
        return false;
    }
    let near = |left: f64, right: f64| {
        (left - right).abs() <= TOLERANCE * left.abs().max(right.abs()).max(1.0)
    };
    let numbers = |tensor: &Tensor| -> Option<Vec<f64>> {
        let (size, data) = (tensor.datatype().size()?, tensor.data());
        let number = |chunk: &[u8]| match tensor.datatype() {
            DataType::Fp32 => Some(f32::from_le_bytes(chunk.try_into().ok()?).into()),
            DataType::Fp64 => Some(f64::from_le_bytes(chunk.try_into().ok()?)),
            _ => None,
        };
        data.chunks_exact(size).map(number).collect()
    };
    match (numbers(left), numbers(right)) {
        (Some(left), Some(right)) => left.iter().zip(&right).all(|(l, r)| near(*l, *r)),
        _ => false,
    }
}

/// What doesn't fit the signature is an error and not a panic.
fn refuses(
    signature: &Signature,
    session: &mut dyn Session,
    inputs: &[Tensor],
) -> Result<(), String> {
    let mut surplus = inputs.to_vec();
    surplus.extend(inputs.first().cloned());
    if inputs.is_empty() || session.run(&surplus).is_ok() || session.run(&[]).is_ok() {
        return Err("a wrong number of inputs ran".to_owned());
    }
    let Some((first, spec)) = inputs.first().zip(signature.inputs.first()) else { return Ok(()) };
    let other = if first.datatype() == DataType::Int16 { DataType::Fp32 } else { DataType::Int16 };
    let mut wrong = inputs.to_vec();
    wrong[0] = make(other, Shape::from_slice(first.shape()))?;
    refused(session.run(&wrong), "a wrong datatype")?;
    if spec.shape.is_some() {
        let mut deeper = Shape::from_slice(first.shape());
        deeper.push(1);
        wrong[0] = first.reshaped(deeper).map_err(|error| error.to_string())?;
        refused(session.run(&wrong), "a wrong rank")?;
    }
    // Nothing to compute: either is fine, as long as it comes back.
    let none = make_inputs(signature, 0)?;
    if let Ok(outputs) = session.run(&none) {
        declared(signature, &outputs)?;
    }
    Ok(())
}

fn refused(result: Result<Vec<Tensor>, EngineError>, what: &str) -> Result<(), String> {
    match result {
        Err(EngineError::Input { .. }) => Ok(()),
        Err(error) => Err(format!("{what}: expected an error about the input, got: {error}")),
        Ok(_) => Err(format!("{what} ran")),
    }
}
