//! Lets requests of unequal length share a batch: which may, what is put behind the shorter ones,
//! and what is cut off again. Pure.
//!
//! Invariants:
//! - Requests of different buckets never join.
//! - Only a mix of lengths is padded: requests of one length run as they came, also together.
//! - No padding leaves: what is cut for a member has its own length.

use std::ops::Range;

use super::BatchError;
use crate::domain::{
    DataType, Dim, NamedTensor, PadValue, PaddedInput, PaddingSettings, Shape, Signature, Tensor,
    TensorSpec,
};

/// A model's padding, checked against its signature.
#[derive(Debug)]
pub struct Padding {
    /// Ascending; empty: powers of two.
    buckets: Vec<usize>,
    inputs: Vec<Input>,
    outputs: Vec<Output>,
    mask: Option<Mask>,
}

#[derive(Debug)]
struct Input {
    /// Position in the signature.
    at: usize,
    name: String,
    axis: usize,
    /// What padding is made of, as it stands in a tensor's data.
    element: Vec<u8>,
}

#[derive(Debug)]
struct Output {
    at: usize,
    name: String,
    axis: usize,
}

/// An input that is made where the caller leaves it out.
#[derive(Debug)]
struct Mask {
    name: String,
    datatype: DataType,
    dims: Vec<Dim>,
    axis: usize,
    one: Vec<u8>,
}

impl Padding {
    /// # Errors
    /// Everything in which the settings and the signature disagree.
    pub fn new(settings: &PaddingSettings, signature: &Signature) -> Result<Self, Vec<String>> {
        let mut check = Check { signature, problems: Vec::new(), symbols: Vec::new() };
        if !signature.batched {
            check.problems.push("batch.padding: the model is not batched".to_owned());
        }
        let inputs: Vec<Input> =
            settings.inputs.iter().filter_map(|input| check.input(input)).collect();
        let outputs: Vec<Output> = settings
            .outputs
            .iter()
            .filter_map(|output| {
                let at = check.axis("output", &signature.outputs, &output.name, output.axis)?;
                Some(Output { at, name: output.name.clone(), axis: output.axis })
            })
            .collect();
        let name = settings.mask.as_deref();
        let mask = name.and_then(|name| check.mask(name, &inputs));
        check.undeclared("input", &signature.inputs, &|at| inputs.iter().any(|x| x.at == at));
        check.undeclared("output", &signature.outputs, &|at| outputs.iter().any(|x| x.at == at));
        match check.problems.is_empty() {
            true => Ok(Self { buckets: settings.buckets.clone(), inputs, outputs, mask }),
            false => Err(check.problems),
        }
    }

    /// Adds the mask to `named` if the model has one and the caller left it out: ones, as long as
    /// the other padded inputs. Without one of those it is left to the binding to complain.
    pub fn fill_mask(&self, named: &mut Vec<NamedTensor>) {
        let Some(mask) = &self.mask else { return };
        if named.iter().any(|input| input.name == mask.name) {
            return;
        }
        let like = self.inputs.iter().find_map(|input| {
            let found = named.iter().find(|named| named.name == input.name)?;
            Some((&found.tensor, input.axis))
        });
        let filled = like.and_then(|(tensor, axis)| mask.ones(tensor, axis));
        named.extend(filled.map(|tensor| NamedTensor { name: mask.name.clone(), tensor }));
    }

    /// The length of a request's padded inputs.
    ///
    /// # Errors
    /// When they have none or not the same one.
    pub(super) fn length(&self, inputs: &[Tensor]) -> Result<usize, BatchError> {
        let mut first: Option<(&Input, usize)> = None;
        for input in &self.inputs {
            let Some(length) = input.length(inputs) else {
                let rank = inputs.get(input.at).map_or(0, |tensor| tensor.shape().len());
                let (input, axis) = (input.name.clone(), input.axis);
                return Err(BatchError::NoLength { input, axis, rank });
            };
            match first {
                Some((other, expected)) if expected != length => {
                    return Err(BatchError::UnequalLengths {
                        input: input.name.clone(),
                        length,
                        other: other.name.clone(),
                        expected,
                    });
                }
                Some(_) => {}
                None => first = Some((input, length)),
            }
        }
        Ok(first.map_or(0, |(_, length)| length))
    }

    /// The longest that a request of `length` may become in company. What is empty stays so: a
    /// row of nothing but padding has no meaning.
    fn bucket(&self, length: usize) -> usize {
        if self.buckets.is_empty() && length > 0 {
            return length.checked_next_power_of_two().unwrap_or(length);
        }
        let fits = |bucket: &&usize| **bucket >= length && length > 0;
        self.buckets.iter().find(fits).copied().unwrap_or(length)
    }

    /// Equal shapes but for the rows and, within one bucket, the length.
    pub(super) fn joins(&self, a: &[Tensor], b: &[Tensor]) -> bool {
        let bucket = |inputs: &[Tensor]| self.length(inputs).ok().map(|length| self.bucket(length));
        let equal = |(at, (a, b)): (usize, (&Tensor, &Tensor))| {
            let axis = self.inputs.iter().find(|input| input.at == at).map(|input| input.axis);
            let dims = a.shape().iter().zip(b.shape()).enumerate();
            a.datatype() == b.datatype()
                && a.shape().len() == b.shape().len()
                && dims.skip(1).all(|(at, (a, b))| a == b || Some(at) == axis)
        };
        a.len() == b.len()
            && a.iter().zip(b).enumerate().all(equal)
            && bucket(a).is_some_and(|bucket_a| bucket(b) == Some(bucket_a))
    }

    /// Elements that a request's inputs have when they are as long as their bucket.
    pub(super) fn elements(&self, inputs: &[Tensor]) -> usize {
        let each = inputs.iter().enumerate().map(|(at, tensor)| {
            let padded = self.inputs.iter().find(|input| input.at == at);
            match padded.and_then(|input| input.length(inputs)).filter(|length| *length > 0) {
                None => tensor.elements(),
                Some(length) => (tensor.elements() / length).saturating_mul(self.bucket(length)),
            }
        });
        each.fold(0, usize::saturating_add)
    }

    /// The length that members of these lengths are padded to; `None` when they are all equal.
    pub(super) fn target(&self, lengths: &[usize]) -> Option<usize> {
        let longest = lengths.iter().copied().max()?;
        if lengths.iter().all(|length| *length == longest) {
            return None;
        }
        Some(if self.buckets.is_empty() { longest } else { self.bucket(longest) })
    }

    /// Input `at` of all members in one tensor, those shorter than `target` padded. `None` if they
    /// do not join or there is no memory for it.
    pub(super) fn join(&self, at: usize, parts: &[&Tensor], target: usize) -> Option<Tensor> {
        match self.inputs.iter().find(|input| input.at == at) {
            Some(input) => concat(parts, input.axis, target, &input.element),
            None => Tensor::concat(parts),
        }
    }

    /// Whether input `at` is one that is padded.
    pub(super) fn pads(&self, at: usize) -> bool {
        self.inputs.iter().any(|input| input.at == at)
    }

    /// One member's rows of output `at`, cut back from `target` to its own `length`.
    ///
    /// # Errors
    /// When the output is not as long as the inputs were.
    pub(super) fn cut(
        &self,
        at: usize,
        rows: Tensor,
        target: usize,
        length: usize,
    ) -> Result<Tensor, BatchError> {
        let Some(output) = self.outputs.iter().find(|output| output.at == at) else {
            return Ok(rows);
        };
        let got = rows.shape().get(output.axis).copied();
        let cut = if got == Some(target) { shorten(&rows, output.axis, length) } else { None };
        cut.ok_or_else(|| BatchError::OutputLength {
            output: output.name.clone(),
            shape: rows.shape().to_vec(),
            axis: output.axis,
            expected: target,
        })
    }
}

impl Input {
    fn length(&self, inputs: &[Tensor]) -> Option<usize> {
        inputs.get(self.at)?.shape().get(self.axis).copied()
    }
}

impl Mask {
    fn ones(&self, like: &Tensor, like_axis: usize) -> Option<Tensor> {
        let (rows, length) = (*like.shape().first()?, *like.shape().get(like_axis)?);
        // Dimensions beside a zero are claims that no byte stands for.
        if like.elements() < rows.checked_mul(length)? {
            return None;
        }
        let dims = self.dims.iter().enumerate().map(|(at, dim)| match dim {
            _ if at == 0 => rows,
            _ if at == self.axis => length,
            Dim::Fixed(size) => *size,
            Dim::Dynamic(_) => 1,
        });
        let shape: Shape = dims.collect();
        let elements = shape.iter().try_fold(1, |product: usize, dim| product.checked_mul(*dim))?;
        let mut data = Vec::new();
        data.try_reserve_exact(elements.checked_mul(self.one.len())?).ok()?;
        (0..elements).for_each(|_| data.extend_from_slice(&self.one));
        Tensor::new(self.datatype, shape, data.into()).ok()
    }
}

/// Compares settings and signature, and gathers what is wrong.
struct Check<'a> {
    signature: &'a Signature,
    problems: Vec<String>,
    /// Names that the signature gives the padded dimension.
    symbols: Vec<&'a str>,
}

impl<'a> Check<'a> {
    /// Position of the tensor, if it has such an axis of any size.
    fn axis(
        &mut self,
        role: &str,
        specs: &'a [TensorSpec],
        name: &str,
        axis: usize,
    ) -> Option<usize> {
        let problem = match specs.iter().position(|spec| spec.name == name) {
            None => {
                let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
                format!("the model has the {role}s {}", names.join(", "))
            }
            Some(at) => match specs[at].shape.as_deref().map(|dims| (dims, dims.get(axis))) {
                // Checked with each request.
                None => return Some(at),
                Some((_, Some(Dim::Dynamic(symbol)))) => {
                    self.symbols.extend(symbol.as_deref());
                    return Some(at);
                }
                Some((_, Some(Dim::Fixed(size)))) => {
                    format!("expected an axis of any size, axis {axis} always has {size}")
                }
                Some((dims, None)) => {
                    let rank = dims.len();
                    format!("axis {axis} is out of range, the {role} has {rank} dimensions")
                }
            },
        };
        self.problems.push(format!("batch.padding.{role} '{name}': {problem}"));
        None
    }

    fn input(&mut self, input: &PaddedInput) -> Option<Input> {
        let PaddedInput { name, axis, value } = input;
        let inputs = &self.signature.inputs;
        let at = self.axis("input", inputs, name, *axis)?;
        match element(value, inputs[at].datatype) {
            Ok(element) => Some(Input { at, name: name.clone(), axis: *axis, element }),
            Err(problem) => {
                self.problems.push(format!("batch.padding.input '{name}': {problem}"));
                None
            }
        }
    }

    fn mask(&mut self, name: &str, inputs: &[Input]) -> Option<Mask> {
        let input = inputs.iter().find(|input| input.name == name)?;
        let spec = &self.signature.inputs[input.at];
        let one = element(&PadValue::Int(1), spec.datatype);
        let other = |(at, dim): (usize, &Dim)| {
            at != 0 && at != input.axis && matches!(dim, Dim::Dynamic(_))
        };
        let problem = match (&spec.shape, one) {
            (None, _) => "the model does not say its shape".to_owned(),
            (_, Err(problem)) => problem,
            (Some(dims), Ok(_)) if dims.iter().enumerate().any(other) => {
                let (shape, axis) = (spec.wire_shape(), input.axis);
                format!("its shape is {shape:?}, expected axes 0 and {axis} alone to vary")
            }
            _ if !inputs.iter().any(|input| input.name != name) => {
                "expected another padded input, whose length it takes".to_owned()
            }
            (Some(dims), Ok(one)) => {
                let (name, dims) = (name.to_owned(), dims.clone());
                return Some(Mask { name, datatype: spec.datatype, dims, axis: input.axis, one });
            }
        };
        self.problems.push(format!("batch.padding.mask '{name}': {problem}"));
        None
    }

    /// A tensor that shares the padded dimension by name must be declared as well.
    fn undeclared(&mut self, role: &str, specs: &[TensorSpec], declared: &dyn Fn(usize) -> bool) {
        for (_, spec) in specs.iter().enumerate().filter(|(at, _)| !declared(*at)) {
            let dims = spec.shape.iter().flatten().enumerate().skip(1);
            let shared = dims.into_iter().find_map(|(axis, dim)| match dim {
                Dim::Dynamic(Some(symbol)) if self.symbols.contains(&symbol.as_str()) => {
                    Some((axis, symbol))
                }
                _ => None,
            });
            if let Some((axis, symbol)) = shared {
                let name = &spec.name;
                self.problems.push(format!(
                    "batch.padding: axis {axis} of {role} '{name}' is the padded '{symbol}' too, \
                     expected an entry in batch.padding.{role}"
                ));
            }
        }
    }
}

/// `value` as one element of a tensor's data.
fn element(value: &PadValue, datatype: DataType) -> Result<Vec<u8>, String> {
    let unfit = || format!("value {} does not fit {datatype}", shown(value));
    let int = match value {
        PadValue::Zero => Some(0),
        PadValue::Bool(bit) if datatype == DataType::Bool => Some(i64::from(*bit)),
        PadValue::Int(number) => Some(*number),
        _ => None,
    };
    let float = match value {
        PadValue::Float(bits) => Some(f64::from_bits(*bits)),
        _ => int.map(|number| number as f64),
    };
    let bytes = match datatype {
        DataType::Bytes => {
            let text = match value {
                PadValue::Zero => "",
                PadValue::Text(text) => text,
                _ => return Err(unfit()),
            };
            let length = u32::try_from(text.len()).map_err(|_| unfit())?;
            Some([&length.to_le_bytes(), text.as_bytes()].concat())
        }
        DataType::Bool => {
            int.and_then(|number| u8::try_from(number).ok()).filter(|bit| *bit < 2).map(|b| vec![b])
        }
        DataType::Uint8 => fixed::<u8, 1>(int, u8::to_le_bytes),
        DataType::Uint16 => fixed::<u16, 2>(int, u16::to_le_bytes),
        DataType::Uint32 => fixed::<u32, 4>(int, u32::to_le_bytes),
        DataType::Uint64 => fixed::<u64, 8>(int, u64::to_le_bytes),
        DataType::Int8 => fixed::<i8, 1>(int, i8::to_le_bytes),
        DataType::Int16 => fixed::<i16, 2>(int, i16::to_le_bytes),
        DataType::Int32 => fixed::<i32, 4>(int, i32::to_le_bytes),
        DataType::Int64 => fixed::<i64, 8>(int, i64::to_le_bytes),
        DataType::Fp16 => float.and_then(|value| {
            let half = half::f16::from_f64(value);
            fits(value, half.to_f64()).then(|| half.to_le_bytes().to_vec())
        }),
        DataType::Bf16 => float.and_then(|value| {
            let half = half::bf16::from_f64(value);
            fits(value, half.to_f64()).then(|| half.to_le_bytes().to_vec())
        }),
        DataType::Fp32 => float.and_then(|value| {
            #[expect(clippy::cast_possible_truncation, reason = "what is lost is looked at next")]
            let single = value as f32;
            fits(value, single.into()).then(|| single.to_le_bytes().to_vec())
        }),
        DataType::Fp64 => float.map(|value| value.to_le_bytes().to_vec()),
    };
    bytes.ok_or_else(unfit)
}

fn fixed<T: TryFrom<i64>, const N: usize>(
    int: Option<i64>,
    to_bytes: fn(T) -> [u8; N],
) -> Option<Vec<u8>> {
    int.and_then(|number| T::try_from(number).ok()).map(|number| to_bytes(number).to_vec())
}

/// A float may lose digits but not become infinite.
fn fits(value: f64, stored: f64) -> bool {
    value.is_finite() == stored.is_finite()
}

fn shown(value: &PadValue) -> String {
    match value {
        PadValue::Zero => "0".to_owned(),
        PadValue::Bool(bit) => bit.to_string(),
        PadValue::Int(number) => number.to_string(),
        PadValue::Float(bits) => f64::from_bits(*bits).to_string(),
        PadValue::Text(text) => format!("'{text}'"),
    }
}

/// A tensor's data as `outer` blocks of `length` steps of `inner` elements along `axis`.
struct Blocks {
    outer: usize,
    length: usize,
    inner: usize,
}

impl Blocks {
    fn of(tensor: &Tensor, axis: usize) -> Option<Self> {
        let (before, rest) = tensor.shape().split_at_checked(axis)?;
        let (length, after) = rest.split_first()?;
        let (outer, inner) = (before.iter().product(), after.iter().product());
        Some(Self { outer, length: *length, inner })
    }
}

/// Steps through a tensor's data by elements, whatever their size.
struct Walk<'a> {
    data: &'a [u8],
    size: Option<usize>,
    at: usize,
}

impl<'a> Walk<'a> {
    fn new(tensor: &'a Tensor) -> Self {
        Self { data: tensor.data(), size: tensor.datatype().size(), at: 0 }
    }

    /// Where the next `count` elements lie.
    fn step(&mut self, count: usize) -> Range<usize> {
        let from = self.at;
        match self.size {
            Some(size) => self.at += count * size,
            None => (0..count).for_each(|_| {
                let rest = self.data.get(self.at..).and_then(|rest| rest.first_chunk::<4>());
                self.at += rest.map_or(0, |length| 4 + u32::from_le_bytes(*length) as usize);
            }),
        }
        from..self.at
    }
}

/// Joins along the first axis, each part filled up along `axis` with `element` to length `to`, in
/// one copy.
fn concat(parts: &[&Tensor], axis: usize, to: usize, element: &[u8]) -> Option<Tensor> {
    let first = parts.first()?;
    let mut rows = 0_usize;
    let mut size = 0_usize;
    let mut fill_max = 0;
    for part in parts {
        let Blocks { outer, length, inner } = Blocks::of(part, axis)?;
        let fill = to.checked_sub(length)?.checked_mul(inner)?.checked_mul(element.len())?;
        fill_max = fill_max.max(fill);
        size = size.checked_add(part.data().len())?.checked_add(fill.checked_mul(outer)?)?;
        rows = rows.checked_add(*part.shape().first()?)?;
    }
    let mut data = Vec::new();
    data.try_reserve_exact(size).ok()?;
    let fill_all = element.repeat(fill_max / element.len().max(1));
    for part in parts {
        let Blocks { outer, length, inner } = Blocks::of(part, axis)?;
        let fill = fill_all.get(..(to - length) * inner * element.len())?;
        let mut walk = Walk::new(part);
        for _ in 0..outer {
            data.extend_from_slice(part.data().get(walk.step(length * inner))?);
            data.extend_from_slice(fill);
        }
    }
    let mut shape = Shape::from_slice(first.shape());
    shape[0] = rows;
    *shape.get_mut(axis)? = to;
    Tensor::new(first.datatype(), shape, data.into()).ok()
}

/// The first `to` steps along `axis`; without a copy where they lie in one piece.
fn shorten(tensor: &Tensor, axis: usize, to: usize) -> Option<Tensor> {
    let Blocks { outer, length, inner } = Blocks::of(tensor, axis)?;
    if to == length {
        return Some(tensor.clone());
    }
    let (keep, skip) = (to * inner, length.checked_sub(to)? * inner);
    let mut walk = Walk::new(tensor);
    let data = if outer == 1 {
        tensor.data().slice(walk.step(keep))
    } else {
        let mut kept = Vec::with_capacity(tensor.data().len() / length.max(1) * to);
        for _ in 0..outer {
            kept.extend_from_slice(tensor.data().get(walk.step(keep))?);
            walk.step(skip);
        }
        kept.into()
    };
    let mut shape = Shape::from_slice(tensor.shape());
    *shape.get_mut(axis)? = to;
    Tensor::new(tensor.datatype(), shape, data).ok()
}

#[cfg(test)]
mod tests;
