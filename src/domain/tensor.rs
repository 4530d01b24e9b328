//! A tensor is bytes with a datatype and a shape.

use bytes::Bytes;
use smallvec::SmallVec;

use super::DataType;

/// Dimensions of a concrete tensor, outermost first.
pub type Shape = SmallVec<[usize; 4]>;

/// Most dimensions a tensor may have.
pub const RANK_MAX: usize = 16;

/// Row-major, little-endian elements without padding, shared and never changed.
///
/// `data` is exactly as long as `datatype` and `shape` say; `BYTES` elements are each a 4-byte
/// little-endian length and the bytes; `BOOL` bytes are 0 or 1. The start may be unaligned.
#[derive(Clone, Debug, PartialEq)]
pub struct Tensor {
    datatype: DataType,
    shape: Shape,
    data: Bytes,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TensorError {
    #[error("rank {rank} is over the limit of {RANK_MAX}")]
    Rank { rank: usize },
    #[error("dimension {dim} is negative or too large")]
    Dimension { dim: i64 },
    #[error("shape {shape:?} has more elements than can be addressed")]
    Overflow { shape: Vec<usize> },
    #[error("{datatype} tensor of shape {shape:?} takes {expected} bytes, got {got}")]
    Size { datatype: DataType, shape: Vec<usize>, expected: usize, got: usize },
    #[error("BYTES tensor of shape {shape:?} takes {expected} elements, its data holds {got}")]
    Elements { shape: Vec<usize>, expected: usize, got: usize },
    #[error("BYTES element {index} says it has {len} bytes, {left} are left")]
    BytesLength { index: usize, len: usize, left: usize },
    #[error("BOOL element {index} is {value}, expected 0 or 1")]
    Bool { index: usize, value: u8 },
}

impl Tensor {
    /// Checks everything the type promises; O(1) but for `BOOL` and `BYTES`, which are walked.
    pub fn new(datatype: DataType, shape: Shape, data: Bytes) -> Result<Self, TensorError> {
        let elements = element_count(&shape)?;
        match datatype.size() {
            Some(size) => {
                let expected = elements
                    .checked_mul(size)
                    .ok_or_else(|| TensorError::Overflow { shape: shape.to_vec() })?;
                if data.len() != expected {
                    let got = data.len();
                    return Err(TensorError::Size {
                        datatype,
                        shape: shape.to_vec(),
                        expected,
                        got,
                    });
                }
                if datatype == DataType::Bool
                    && let Some(index) = data.iter().position(|&byte| byte > 1)
                {
                    return Err(TensorError::Bool { index, value: data[index] });
                }
            }
            None => {
                let mut got = 0;
                for element in BytesElements::new(&data) {
                    element?;
                    got += 1;
                }
                if got != elements {
                    return Err(TensorError::Elements {
                        shape: shape.to_vec(),
                        expected: elements,
                        got,
                    });
                }
            }
        }
        Ok(Self { datatype, shape, data })
    }

    /// Shape as it comes from the wire, where dimensions are signed.
    pub fn shape_from_wire(dims: &[i64]) -> Result<Shape, TensorError> {
        if dims.len() > RANK_MAX {
            return Err(TensorError::Rank { rank: dims.len() });
        }
        dims.iter()
            .map(|&dim| usize::try_from(dim).map_err(|_| TensorError::Dimension { dim }))
            .collect()
    }

    /// `BYTES` tensor from its elements.
    pub fn from_elements<E: AsRef<[u8]>>(
        shape: Shape,
        elements: &[E],
    ) -> Result<Self, TensorError> {
        let size = elements.iter().map(|element| element.as_ref().len() + 4).sum();
        let mut data = Vec::with_capacity(size);
        for (index, element) in elements.iter().enumerate() {
            let element = element.as_ref();
            let len = u32::try_from(element.len()).map_err(|_| TensorError::BytesLength {
                index,
                len: element.len(),
                left: u32::MAX as usize,
            })?;
            data.extend_from_slice(&len.to_le_bytes());
            data.extend_from_slice(element);
        }
        Self::new(DataType::Bytes, shape, data.into())
    }

    pub fn datatype(&self) -> DataType {
        self.datatype
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn data(&self) -> &Bytes {
        &self.data
    }

    /// With its data held in another way: `hold` gives back the same bytes.
    #[must_use]
    pub fn held_by(mut self, hold: impl FnOnce(Bytes) -> Bytes) -> Self {
        let len = self.data.len();
        self.data = hold(self.data);
        debug_assert_eq!(self.data.len(), len, "the bytes stay the same");
        self
    }

    /// Number of elements: the product of the shape; 1 for a scalar.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Elements of a `BYTES` tensor, in order.
    pub fn bytes_elements(&self) -> impl Iterator<Item = &[u8]> {
        BytesElements::new(&self.data).filter_map(Result::ok)
    }

    /// Rows `from..to` along the first axis, without a copy. `None` when out of range, for a scalar.
    pub fn rows(&self, from: usize, to: usize) -> Option<Self> {
        let rows = *self.shape.first()?;
        if from > to || to > rows {
            return None;
        }
        let per_row: usize = self.shape[1..].iter().product();
        let data = match self.datatype.size() {
            Some(size) => self.data.slice(from * per_row * size..to * per_row * size),
            None => {
                let mut walk = BytesElements::new(&self.data);
                let start = walk.skip_elements(from * per_row);
                let end = walk.skip_elements((to - from) * per_row);
                self.data.slice(start..end)
            }
        };
        let mut shape = self.shape.clone();
        shape[0] = to - from;
        Some(Self { datatype: self.datatype, shape, data })
    }

    /// The same tensor in memory of its own, and no more of it than it takes.
    #[must_use]
    pub fn copied(&self) -> Self {
        let data = Bytes::copy_from_slice(&self.data);
        Self { datatype: self.datatype, shape: self.shape.clone(), data }
    }

    /// Joins tensors of one datatype and one inner shape along the first axis, in one copy.
    ///
    /// `None` when there is none, or they differ in more than the first dimension.
    pub fn concat(parts: &[&Self]) -> Option<Self> {
        let first = parts.first()?;
        let inner = first.shape.get(1..)?;
        let mut rows = 0_usize;
        let mut size = 0;
        for part in parts {
            if part.datatype != first.datatype || part.shape.get(1..) != Some(inner) {
                return None;
            }
            rows += part.shape[0];
            size += part.data.len();
        }
        let mut data = Vec::with_capacity(size);
        for part in parts {
            data.extend_from_slice(&part.data);
        }
        let mut shape = first.shape.clone();
        shape[0] = rows;
        Some(Self { datatype: first.datatype, shape, data: data.into() })
    }

    /// Same data under another shape of as many elements.
    pub fn reshaped(&self, shape: Shape) -> Result<Self, TensorError> {
        let expected = element_count(&shape)?;
        if expected != self.elements() {
            let got = self.elements();
            return Err(TensorError::Elements { shape: shape.to_vec(), expected, got });
        }
        Ok(Self { datatype: self.datatype, shape, data: self.data.clone() })
    }
}

fn element_count(shape: &Shape) -> Result<usize, TensorError> {
    if shape.len() > RANK_MAX {
        return Err(TensorError::Rank { rank: shape.len() });
    }
    // A zero anywhere makes the product zero whatever the others are, but the others must still
    // multiply without overflow, because rows are cut from them.
    let overflow = || TensorError::Overflow { shape: shape.to_vec() };
    let nonzero = shape.iter().filter(|&&dim| dim != 0);
    nonzero.copied().try_fold(1_usize, usize::checked_mul).ok_or_else(overflow)?;
    Ok(shape.iter().product())
}

/// Walks length-prefixed elements; ends after the first error.
pub struct BytesElements<'a> {
    data: &'a [u8],
    at: usize,
    index: usize,
}

impl<'a> BytesElements<'a> {
    pub fn new(data: &'a [u8]) -> Self {
        Self { data, at: 0, index: 0 }
    }

    /// Steps over `count` elements; gives the offset reached.
    fn skip_elements(&mut self, count: usize) -> usize {
        for _ in 0..count {
            if !matches!(self.next(), Some(Ok(_))) {
                break;
            }
        }
        self.at
    }
}

impl<'a> Iterator for BytesElements<'a> {
    type Item = Result<&'a [u8], TensorError>;

    fn next(&mut self) -> Option<Self::Item> {
        let rest = self.data.get(self.at..).filter(|rest| !rest.is_empty())?;
        let index = self.index;
        let Some((prefix, rest)) = rest.split_first_chunk::<4>() else {
            self.at = self.data.len();
            return Some(Err(TensorError::BytesLength { index, len: 4, left: rest.len() }));
        };
        let len = u32::from_le_bytes(*prefix) as usize;
        let Some(element) = rest.get(..len) else {
            self.at = self.data.len();
            return Some(Err(TensorError::BytesLength { index, len, left: rest.len() }));
        };
        self.at += 4 + len;
        self.index += 1;
        Some(Ok(element))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use smallvec::smallvec;

    use super::*;

    #[test]
    fn a_tensor_is_checked_when_made() {
        type Case<'a> = (&'a str, DataType, &'a [usize], &'a [u8], bool);
        let cases: &[Case<'_>] = &[
            ("exact", DataType::Uint8, &[2, 2], &[1, 2, 3, 4], true),
            ("short", DataType::Uint8, &[2, 2], &[1, 2, 3], false),
            ("scalar", DataType::Int16, &[], &[1, 0], true),
            ("empty", DataType::Fp32, &[0, 4], &[], true),
            ("overflow hidden by a zero", DataType::Fp32, &[0, usize::MAX, 2], &[], false),
            ("bool", DataType::Bool, &[2], &[0, 1], true),
            ("bool of two", DataType::Bool, &[2], &[0, 2], false),
            ("bytes", DataType::Bytes, &[1], &[1, 0, 0, 0, 65], true),
            ("bytes past the end", DataType::Bytes, &[1], &[9, 0, 0, 0, 65], false),
            ("bytes with half a prefix", DataType::Bytes, &[1], &[1, 0], false),
            ("too many elements", DataType::Bytes, &[1], &[0, 0, 0, 0, 0, 0, 0, 0], false),
        ];
        for (name, datatype, shape, data, ok) in cases {
            let shape = Shape::from_slice(shape);
            let made = Tensor::new(*datatype, shape, Bytes::copy_from_slice(data));
            assert_eq!(made.is_ok(), *ok, "{name}: {made:?}");
        }
        assert!(Tensor::new(DataType::Bool, smallvec![1; RANK_MAX + 1], Bytes::new()).is_err());
    }

    proptest! {
        #[test]
        fn rows_and_concat_undo_each_other(
            elements in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..9), 1..20),
            cut in 0_usize..20,
        ) {
            let whole = Tensor::from_elements(smallvec![elements.len()], &elements).unwrap();
            let cut = cut.min(elements.len());
            let head = whole.rows(0, cut).unwrap();
            let tail = whole.rows(cut, elements.len()).unwrap();
            prop_assert_eq!(&Tensor::concat(&[&head, &tail]).unwrap(), &whole);
            prop_assert!(Tensor::new(DataType::Bytes, smallvec![cut], head.data().clone()).is_ok());
        }

        #[test]
        fn hostile_bytes_never_panic(data in prop::collection::vec(any::<u8>(), 0..64), n in 0_usize..8) {
            let _checked = Tensor::new(DataType::Bytes, smallvec![n], data.into());
        }
    }
}
