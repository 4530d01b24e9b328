//! Typed contents (`fp32_contents`, `int64_contents`, …) straight into a tensor's bytes.
//!
//! Invariants:
//! - Only the field of the datatype may be filled; a number that the datatype cannot hold is
//!   refused, never narrowed.
//! - Numbers of fixed size are used where they lie in the message; others are written once, and
//!   counted before.

use bytes::Bytes;

use super::wire::{Fields, Value, WireError, varint};
use crate::domain::{DataType, Failure};
use crate::transport::intake::Grow;

/// What is wrong with typed contents.
#[derive(Debug, thiserror::Error)]
pub(super) enum ContentsError {
    #[error("{0} goes only into raw_input_contents")]
    RawOnly(DataType),
    #[error("{datatype} goes into {field}, got {other}")]
    Field { datatype: DataType, field: &'static str, other: &'static str },
    #[error("element {index} is {value}, out of range for {datatype}")]
    Range { index: usize, value: i128, datatype: DataType },
    #[error("element {index} has 4 GiB or more")]
    Long { index: usize },
    #[error("contents: {0}")]
    Wire(#[from] WireError),
    /// Not the input's fault.
    #[error(transparent)]
    Full(Failure),
}

/// Fields of `InferTensorContents`, in the order of their numbers.
const FIELDS: [&str; 8] = [
    "bool_contents",
    "int_contents",
    "int64_contents",
    "uint_contents",
    "uint64_contents",
    "fp32_contents",
    "fp64_contents",
    "bytes_contents",
];

/// Number of the field that a datatype goes into.
fn field_of(datatype: DataType) -> Option<u32> {
    Some(match datatype {
        DataType::Bool => 1,
        DataType::Int8 | DataType::Int16 | DataType::Int32 => 2,
        DataType::Int64 => 3,
        DataType::Uint8 | DataType::Uint16 | DataType::Uint32 => 4,
        DataType::Uint64 => 5,
        DataType::Fp32 => 6,
        DataType::Fp64 => 7,
        DataType::Bytes => 8,
        DataType::Fp16 | DataType::Bf16 => return None,
    })
}

fn name_of(field: u32) -> &'static str {
    let at = usize::try_from(field).unwrap_or(0).wrapping_sub(1);
    FIELDS.get(at).copied().unwrap_or("an unknown field")
}

/// Bytes of the tensor that `contents` hold.
pub(super) fn read(
    datatype: DataType,
    contents: Bytes,
    grow: Grow<'_>,
) -> Result<Bytes, ContentsError> {
    let field = field_of(datatype).ok_or(ContentsError::RawOnly(datatype))?;
    if datatype == DataType::Bytes {
        // An element of n bytes takes n + 2 here at least, and n + 4 in the tensor.
        grow(contents.len().saturating_mul(2)).map_err(ContentsError::Full)?;
    }
    let mut data = Data::new(datatype, grow);
    let mut fields = Fields::new(contents);
    while let Some((number, value)) = fields.next()? {
        if number == field {
            data.add(value)?;
        } else if name_of(number) != "an unknown field" && value != Value::Bytes(Bytes::new()) {
            let (field, other) = (name_of(field), name_of(number));
            return Err(ContentsError::Field { datatype, field, other });
        }
    }
    Ok(data.whole.unwrap_or_else(|| data.joined.into()))
}

/// A tensor's bytes as they grow.
struct Data<'a> {
    datatype: DataType,
    grow: Grow<'a>,
    /// All there is so far, where it lies.
    whole: Option<Bytes>,
    joined: Vec<u8>,
    count: usize,
}

impl<'a> Data<'a> {
    fn new(datatype: DataType, grow: Grow<'a>) -> Self {
        Self { datatype, grow, whole: None, joined: Vec::new(), count: 0 }
    }

    fn add(&mut self, value: Value) -> Result<(), ContentsError> {
        let wrong =
            || ContentsError::Wire(WireError::Type(name_of(field_of(self.datatype).unwrap_or(0))));
        match (self.datatype, value) {
            (DataType::Bytes, Value::Bytes(element)) => self.element(&element),
            (DataType::Fp32, Value::Fixed32(number)) => self.fixed(&number),
            (DataType::Fp64, Value::Fixed64(number)) => self.fixed(&number),
            (DataType::Fp32 | DataType::Fp64, Value::Bytes(packed)) => {
                let size = self.datatype.size().unwrap_or(1);
                if !packed.len().is_multiple_of(size) {
                    return Err(WireError::Short("a number").into());
                }
                if self.whole.is_none() && self.joined.is_empty() {
                    self.whole = Some(packed);
                    return Ok(());
                }
                self.fixed(&packed)
            }
            (DataType::Fp32 | DataType::Fp64 | DataType::Bytes, _) => Err(wrong()),
            (_, Value::Varint(number)) => {
                self.reserve(1)?;
                self.number(number)
            }
            (_, Value::Bytes(packed)) => {
                // As many numbers as bytes that end one.
                self.reserve(packed.iter().filter(|byte| **byte < 0x80).count())?;
                let mut rest = &packed[..];
                while !rest.is_empty() {
                    let (number, len) = varint(rest)?;
                    self.number(number)?;
                    rest = &rest[len..];
                }
                Ok(())
            }
            _ => Err(wrong()),
        }
    }

    /// Makes room for `count` numbers.
    fn reserve(&mut self, count: usize) -> Result<(), ContentsError> {
        let bytes = count * self.datatype.size().unwrap_or(1);
        (self.grow)(bytes).map_err(ContentsError::Full)?;
        self.joined.reserve(bytes);
        Ok(())
    }

    /// Numbers as they lie in a tensor.
    fn fixed(&mut self, numbers: &[u8]) -> Result<(), ContentsError> {
        let before = self.whole.take().unwrap_or_default();
        (self.grow)(before.len() + numbers.len()).map_err(ContentsError::Full)?;
        self.joined.extend_from_slice(&before);
        self.joined.extend_from_slice(numbers);
        Ok(())
    }

    fn element(&mut self, element: &[u8]) -> Result<(), ContentsError> {
        let index = self.count;
        let len = u32::try_from(element.len()).map_err(|_| ContentsError::Long { index })?;
        self.count += 1;
        self.joined.extend_from_slice(&len.to_le_bytes());
        self.joined.extend_from_slice(element);
        Ok(())
    }

    fn number(&mut self, number: u64) -> Result<(), ContentsError> {
        let (index, datatype) = (self.count, self.datatype);
        self.count += 1;
        let signed = number.cast_signed();
        let out = &mut self.joined;
        macro_rules! put {
            ($number:ty, $value:expr) => {
                match <$number>::try_from($value) {
                    Ok(narrow) => out.extend_from_slice(&narrow.to_le_bytes()),
                    Err(_) => {
                        let value = i128::from($value);
                        return Err(ContentsError::Range { index, value, datatype });
                    }
                }
            };
        }
        match datatype {
            DataType::Bool => out.push(u8::from(number != 0)),
            DataType::Int8 => put!(i8, signed),
            DataType::Int16 => put!(i16, signed),
            DataType::Int32 => put!(i32, signed),
            DataType::Int64 => put!(i64, signed),
            DataType::Uint8 => put!(u8, number),
            DataType::Uint16 => put!(u16, number),
            DataType::Uint32 => put!(u32, number),
            DataType::Uint64 => put!(u64, number),
            DataType::Fp16 | DataType::Bf16 | DataType::Fp32 | DataType::Fp64 | DataType::Bytes => {
                return Err(ContentsError::RawOnly(datatype));
            }
        }
        Ok(())
    }
}
