//! Tensor elements between JSON text and the typed little-endian form.
//!
//! Reading goes over text that `serde_json` has already found to be well formed, without
//! recursion and straight into the tensor's buffer, so nesting costs no stack and numbers are
//! rounded once: `f32` from its digits, not by way of `f64`.
//!
//! Invariants:
//! - A value that the datatype cannot hold is refused, never narrowed.
//! - What is written reads back as the same bytes.

use smallvec::SmallVec;

use crate::domain::{BytesElements, DataType, RANK_MAX, Shape, Tensor};

/// Most characters of a bad value that an error shows.
const SHOWN_MAX: usize = 40;

/// Why JSON data is no tensor, or a tensor has no JSON form.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElementError {
    #[error("data is nested deeper than {RANK_MAX} levels")]
    Depth,
    #[error(
        "data is ragged: a list at level {level} has {got} elements, one before it has {expected}"
    )]
    Ragged { level: usize, expected: usize, got: usize },
    #[error("data mixes lists and values at level {level}")]
    Mixed { level: usize },
    #[error("element {index} is {got}, expected {expected}")]
    Value { index: usize, got: String, expected: &'static str },
    #[error("data has more than the {limit} elements that the shape says")]
    TooMany { limit: usize },
    #[error("datatype {0} has no JSON form, use the binary tensor extension")]
    NoJson(DataType),
    #[error(
        "element {index} is {got}, which JSON cannot carry, ask for this output as binary data"
    )]
    NotFinite { index: usize, got: String },
    #[error("the answer's JSON is over the limit of {limit} bytes, ask for binary data")]
    TooLong { limit: usize },
    #[error("element {index} is not UTF-8, ask for this output as binary data")]
    NotText { index: usize },
}

/// How data was nested: the length of the lists at each level.
pub type Nesting = SmallVec<[usize; 4]>;

/// Appends the elements of `text`, a well-formed JSON value, to `out`; gives how it was nested.
///
/// A bare value has no level; an empty list ends its branch, so levels below it stay unknown.
///
/// # Errors
/// Ragged or mixed nesting, values that `datatype` cannot hold, more than `limit` elements.
pub fn read(
    text: &str,
    datatype: DataType,
    limit: usize,
    out: &mut Vec<u8>,
) -> Result<Nesting, ElementError> {
    if matches!(datatype, DataType::Fp16 | DataType::Bf16) {
        return Err(ElementError::NoJson(datatype));
    }
    let mut walk = Walk::default();
    let bytes = text.as_bytes();
    let mut at = 0;
    while let Some(&byte) = bytes.get(at) {
        match byte {
            b' ' | b'\t' | b'\n' | b'\r' | b',' => at += 1,
            b'[' => {
                walk.open()?;
                at += 1;
            }
            b']' => {
                walk.close()?;
                at += 1;
            }
            _ => {
                let index = walk.value()?;
                if index >= limit {
                    return Err(ElementError::TooMany { limit });
                }
                let end = at + token_len(&bytes[at..]);
                push(&text[at..end], datatype, index, out)?;
                at = end;
            }
        }
    }
    Ok(walk.levels.into_iter().map_while(|level| level).collect())
}

/// State of the walk over nested lists.
#[derive(Default)]
struct Walk {
    /// Length of the lists at each level, once one has ended.
    levels: SmallVec<[Option<usize>; 4]>,
    /// Elements so far of each list that is open.
    open: SmallVec<[usize; 4]>,
    /// Level of the values, once one was seen.
    values_at: Option<usize>,
    count: usize,
}

impl Walk {
    fn open(&mut self) -> Result<(), ElementError> {
        let level = self.open.len();
        if level >= RANK_MAX {
            return Err(ElementError::Depth);
        }
        if self.values_at.is_some_and(|values| level >= values) {
            return Err(ElementError::Mixed { level });
        }
        if let Some(length) = self.open.last_mut() {
            *length += 1;
        }
        self.open.push(0);
        if self.levels.len() <= level {
            self.levels.push(None);
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), ElementError> {
        let Some(got) = self.open.pop() else { return Ok(()) };
        let level = self.open.len();
        match self.levels[level].replace(got) {
            Some(expected) if expected != got => Err(ElementError::Ragged { level, expected, got }),
            _ => Ok(()),
        }
    }

    /// Counts a value; gives its index.
    fn value(&mut self) -> Result<usize, ElementError> {
        let level = self.open.len();
        // As many levels as were ever open: no list beside a value, before it or after.
        if self.levels.len() != level {
            return Err(ElementError::Mixed { level });
        }
        self.values_at = Some(level);
        if let Some(length) = self.open.last_mut() {
            *length += 1;
        }
        self.count += 1;
        Ok(self.count - 1)
    }
}

/// Length of the value that starts here; objects run to the end of the text and are refused.
fn token_len(bytes: &[u8]) -> usize {
    match bytes.first() {
        Some(b'"') => {
            let mut at = 1;
            while let Some(&byte) = bytes.get(at) {
                match byte {
                    b'\\' => at += 2,
                    b'"' => return at + 1,
                    _ => at += 1,
                }
            }
            bytes.len()
        }
        Some(b'{') => bytes.len(),
        _ => {
            let ends =
                |byte: &u8| matches!(byte, b',' | b']' | b'}' | b' ' | b'\t' | b'\n' | b'\r');
            bytes.iter().position(ends).unwrap_or(bytes.len()).max(1)
        }
    }
}

/// Appends one JSON value.
pub(super) fn push(
    token: &str,
    datatype: DataType,
    index: usize,
    out: &mut Vec<u8>,
) -> Result<(), ElementError> {
    match datatype {
        DataType::Bool => match token {
            "true" => out.push(1),
            "false" => out.push(0),
            _ => return Err(bad(index, token, "true or false")),
        },
        DataType::Bytes => push_string(token, index, out)?,
        _ => push_number(token, datatype, index, out)?,
    }
    Ok(())
}

fn push_string(token: &str, index: usize, out: &mut Vec<u8>) -> Result<(), ElementError> {
    let inner = token.strip_prefix('"').and_then(|rest| rest.strip_suffix('"'));
    let Some(inner) = inner else { return Err(bad(index, token, "a string")) };
    if !inner.contains('\\') {
        return push_bytes(inner.as_bytes(), index, out);
    }
    match serde_json::from_str::<String>(token) {
        Ok(text) => push_bytes(text.as_bytes(), index, out),
        Err(_) => Err(bad(index, token, "a string of whole Unicode characters")),
    }
}

/// Appends one `BYTES` element.
pub(super) fn push_bytes(
    element: &[u8],
    index: usize,
    out: &mut Vec<u8>,
) -> Result<(), ElementError> {
    let len = u32::try_from(element.len())
        .map_err(|_| bad(index, "too long", "a string of less than 4 GiB"))?;
    out.extend_from_slice(&len.to_le_bytes());
    out.extend_from_slice(element);
    Ok(())
}

/// Appends a number given by its digits.
pub(super) fn push_number(
    token: &str,
    datatype: DataType,
    index: usize,
    out: &mut Vec<u8>,
) -> Result<(), ElementError> {
    macro_rules! integer {
        ($number:ty, $expected:literal) => {
            match token.parse::<$number>() {
                Ok(number) if !token.starts_with('+') => {
                    out.extend_from_slice(&number.to_le_bytes());
                }
                _ => return Err(bad(index, token, $expected)),
            }
        };
    }
    macro_rules! float {
        ($number:ty, $expected:literal) => {
            // Rust reads "inf" and "nan" too, and overflow as infinity.
            match token.parse::<$number>() {
                Ok(number) if number.is_finite() => out.extend_from_slice(&number.to_le_bytes()),
                _ => return Err(bad(index, token, $expected)),
            }
        };
    }
    match datatype {
        DataType::Uint8 => integer!(u8, "an integer from 0 to 255"),
        DataType::Uint16 => integer!(u16, "an integer from 0 to 65535"),
        DataType::Uint32 => integer!(u32, "an integer from 0 to 4294967295"),
        DataType::Uint64 => integer!(u64, "an integer from 0 to 18446744073709551615"),
        DataType::Int8 => integer!(i8, "an integer from -128 to 127"),
        DataType::Int16 => integer!(i16, "an integer from -32768 to 32767"),
        DataType::Int32 => integer!(i32, "an integer from -2147483648 to 2147483647"),
        DataType::Int64 => {
            integer!(i64, "an integer from -9223372036854775808 to 9223372036854775807");
        }
        DataType::Fp32 => float!(f32, "a finite number within FP32"),
        DataType::Fp64 => float!(f64, "a finite number within FP64"),
        DataType::Fp16 | DataType::Bf16 | DataType::Bool | DataType::Bytes => {
            return Err(ElementError::NoJson(datatype));
        }
    }
    Ok(())
}

pub(super) fn bad(index: usize, got: &str, expected: &'static str) -> ElementError {
    let mut shown: String = got.chars().take(SHOWN_MAX).collect();
    if shown.len() < got.len() {
        shown.push('…');
    }
    ElementError::Value { index, got: shown, expected }
}

/// Appends `tensor` as one flat list.
///
/// # Errors
/// Datatypes, numbers and strings that JSON cannot carry.
pub fn write_flat(tensor: &Tensor, out: &mut Vec<u8>) -> Result<(), ElementError> {
    write_flat_within(tensor, usize::MAX, out)
}

/// As [`write_flat`], until `out` has `limit` bytes.
///
/// # Errors
/// As [`write_flat`], and `TooLong` for more.
pub fn write_flat_within(
    tensor: &Tensor,
    limit: usize,
    out: &mut Vec<u8>,
) -> Result<(), ElementError> {
    write(tensor, &[tensor.elements()], limit, out)
}

/// Appends `tensor` as lists nested as its shape; a scalar as a bare value.
///
/// # Errors
/// As [`write_flat`].
pub fn write_nested(tensor: &Tensor, out: &mut Vec<u8>) -> Result<(), ElementError> {
    write_nested_within(tensor, usize::MAX, out)
}

/// As [`write_nested`], until `out` has `limit` bytes.
///
/// # Errors
/// As [`write_flat_within`].
pub fn write_nested_within(
    tensor: &Tensor,
    limit: usize,
    out: &mut Vec<u8>,
) -> Result<(), ElementError> {
    write(tensor, &Shape::from_slice(tensor.shape()), limit, out)
}

fn write(
    tensor: &Tensor,
    shape: &[usize],
    limit: usize,
    out: &mut Vec<u8>,
) -> Result<(), ElementError> {
    let data = tensor.data();
    macro_rules! plain {
        ($number:ty, $size:literal) => {{
            let mut chunks = data.as_chunks::<$size>().0.iter();
            lists(shape, limit, out, &mut |out| {
                if let Some(chunk) = chunks.next() {
                    json(&<$number>::from_le_bytes(*chunk), out);
                }
                Ok(())
            })
        }};
    }
    macro_rules! float {
        ($number:ty, $size:literal) => {{
            let mut chunks = data.as_chunks::<$size>().0.iter().enumerate();
            lists(shape, limit, out, &mut |out| {
                let Some((index, chunk)) = chunks.next() else { return Ok(()) };
                let number = <$number>::from_le_bytes(*chunk);
                if !number.is_finite() {
                    return Err(ElementError::NotFinite { index, got: number.to_string() });
                }
                json(&number, out);
                Ok(())
            })
        }};
    }
    match tensor.datatype() {
        DataType::Bool => {
            let mut bytes = data.iter();
            lists(shape, limit, out, &mut |out| {
                json(&bytes.next().is_some_and(|byte| *byte == 1), out);
                Ok(())
            })
        }
        DataType::Uint8 => plain!(u8, 1),
        DataType::Uint16 => plain!(u16, 2),
        DataType::Uint32 => plain!(u32, 4),
        DataType::Uint64 => plain!(u64, 8),
        DataType::Int8 => plain!(i8, 1),
        DataType::Int16 => plain!(i16, 2),
        DataType::Int32 => plain!(i32, 4),
        DataType::Int64 => plain!(i64, 8),
        DataType::Fp32 => float!(f32, 4),
        DataType::Fp64 => float!(f64, 8),
        DataType::Bytes => {
            let mut elements = BytesElements::new(data).filter_map(Result::ok).enumerate();
            lists(shape, limit, out, &mut |out| {
                let Some((index, element)) = elements.next() else { return Ok(()) };
                let text =
                    std::str::from_utf8(element).map_err(|_| ElementError::NotText { index })?;
                json(text, out);
                Ok(())
            })
        }
        DataType::Fp16 | DataType::Bf16 => Err(ElementError::NoJson(tensor.datatype())),
    }
}

/// Calls `element` once per element of `shape`, with brackets and commas around. The depth is a
/// tensor's rank, so at most [`RANK_MAX`].
fn lists(
    shape: &[usize],
    limit: usize,
    out: &mut Vec<u8>,
    element: &mut dyn FnMut(&mut Vec<u8>) -> Result<(), ElementError>,
) -> Result<(), ElementError> {
    let Some((&length, inner)) = shape.split_first() else { return element(out) };
    out.push(b'[');
    for at in 0..length {
        if at > 0 {
            out.push(b',');
        }
        if out.len() > limit {
            return Err(ElementError::TooLong { limit });
        }
        if inner.is_empty() {
            element(out)?;
        } else {
            lists(inner, limit, out, element)?;
        }
    }
    out.push(b']');
    Ok(())
}

/// Appends a value as JSON; floats in the fewest digits that read back the same.
pub(super) fn json<T: serde::Serialize + ?Sized>(value: &T, out: &mut Vec<u8>) {
    // Neither a Vec nor a number, text or boolean can fail.
    serde_json::to_writer(out, value).expect("plain values are written to memory");
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read_all(text: &str, datatype: DataType) -> Result<(Nesting, Vec<u8>), ElementError> {
        let mut out = Vec::new();
        read(text, datatype, usize::MAX, &mut out).map(|nesting| (nesting, out))
    }

    #[test]
    fn nesting_is_seen_or_refused() {
        let cases: &[(&str, Option<&[usize]>)] = &[
            ("7", Some(&[])),
            ("[]", Some(&[0])),
            ("[1, 2]", Some(&[2])),
            (" [ [1,2] , [3,4] , [5,6] ] ", Some(&[3, 2])),
            ("[[],[]]", Some(&[2, 0])),
            ("[[[1]],[[2]]]", Some(&[2, 1, 1])),
            ("[[1],[2,3]]", None),
            ("[[1],2]", None),
            ("[1,[2]]", None),
            ("[[],1]", None),
            ("[[[1]],[2]]", None),
            ("[{}]", None),
            ("[{\"a\":[1]}]", None),
            ("[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]", None),
        ];
        for (text, expected) in cases {
            let got = read_all(text, DataType::Uint8).ok().map(|(nesting, _)| nesting);
            assert_eq!(got.as_deref(), *expected, "{text}");
        }
    }

    #[test]
    fn values_fit_their_datatype_or_are_refused() {
        let cases: &[(DataType, &str, &str)] = &[
            (DataType::Uint8, "255", "256"),
            (DataType::Int8, "-128", "-129"),
            (DataType::Uint16, "65535", "-1"),
            (DataType::Int16, "-32768", "32768"),
            (DataType::Uint32, "4294967295", "4294967296"),
            (DataType::Int32, "-2147483648", "1.0"),
            (DataType::Uint64, "18446744073709551615", "18446744073709551616"),
            (DataType::Int64, "-9223372036854775808", "1e3"),
            (DataType::Fp32, "3.4028235e38", "3.5e38"),
            (DataType::Fp64, "1.7976931348623157e308", "1e309"),
            (DataType::Bool, "true", "1"),
            (DataType::Bytes, r#""a\u00e9\ud83d\ude00""#, r#""\ud800""#),
            (DataType::Fp64, "-0", "null"),
        ];
        for (datatype, good, bad) in cases {
            assert!(read_all(good, *datatype).is_ok(), "{datatype} {good}");
            assert!(read_all(bad, *datatype).is_err(), "{datatype} {bad}");
        }
        // By way of FP64 this one would round the other way.
        let (_, bytes) = read_all("1.00000017881393432617187499", DataType::Fp32).unwrap();
        assert_eq!(bytes, 1.000_000_1_f32.to_le_bytes());
    }

    #[test]
    fn what_json_cannot_carry_is_said() {
        let tensor = |datatype, data: &[u8]| {
            Tensor::new(datatype, Shape::from_slice(&[1]), data.to_vec().into()).unwrap()
        };
        for bad in [
            tensor(DataType::Fp32, &f32::NAN.to_le_bytes()),
            tensor(DataType::Fp64, &f64::NEG_INFINITY.to_le_bytes()),
            tensor(DataType::Fp16, &[0, 0]),
            tensor(DataType::Bf16, &[0, 0]),
            tensor(DataType::Bytes, &[1, 0, 0, 0, 0xff]),
        ] {
            let error = write_flat(&bad, &mut Vec::new()).unwrap_err();
            assert!(error.to_string().contains("binary"), "{error}");
        }
    }

    /// Any tensor whose values JSON can carry.
    fn tensors() -> impl Strategy<Value = Tensor> {
        let datatypes: Vec<DataType> = DataType::ALL
            .into_iter()
            .filter(|datatype| !matches!(datatype, DataType::Fp16 | DataType::Bf16))
            .collect();
        let shapes = prop::collection::vec(0_usize..4, 0..4);
        (prop::sample::select(datatypes), shapes, any::<u64>()).prop_map(
            |(datatype, dims, seed)| {
                let shape = Shape::from_slice(&dims);
                let count: usize = dims.iter().product();
                if datatype == DataType::Bytes {
                    let elements: Vec<String> = (0..count)
                        .map(|at| format!("{}\"\\é\n{seed}", "x".repeat(at % 3)))
                        .collect();
                    return Tensor::from_elements(shape, &elements).unwrap();
                }
                let size = datatype.size().unwrap();
                let mut state = seed;
                let mut data = Vec::new();
                for _ in 0..count {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let bits = state ^ (state >> 29);
                    let element = match datatype {
                        DataType::Bool => vec![u8::from(bits & 1 == 1)],
                        DataType::Fp32 => {
                            let low = u32::try_from(bits >> 32).unwrap();
                            let value = f32::from_bits(low);
                            (if value.is_finite() { value } else { 0.1 }).to_le_bytes().to_vec()
                        }
                        DataType::Fp64 => {
                            let value = f64::from_bits(bits);
                            (if value.is_finite() { value } else { 0.1 }).to_le_bytes().to_vec()
                        }
                        _ => bits.to_le_bytes()[..size].to_vec(),
                    };
                    data.extend(element);
                }
                Tensor::new(datatype, shape, data.into()).unwrap()
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_written_reads_back(tensor in tensors()) {
            for nested in [false, true] {
                let mut text = Vec::new();
                if nested { write_nested(&tensor, &mut text) } else { write_flat(&tensor, &mut text) }
                    .unwrap();
                let text = String::from_utf8(text).unwrap();
                prop_assert!(serde_json::from_str::<serde_json::Value>(&text).is_ok(), "{}", text);
                let (nesting, data) = read_all(&text, tensor.datatype()).unwrap();
                prop_assert_eq!(&data[..], &tensor.data()[..]);
                if nested && tensor.elements() > 0 {
                    prop_assert_eq!(&nesting[..], tensor.shape());
                }
            }
        }

        #[test]
        fn hostile_text_never_panics(text in "[\\[\\]{},\"\\\\ 0-9eé.tn-]{0,40}") {
            for datatype in DataType::ALL {
                let _refused = read_all(&text, datatype).is_err();
            }
        }
    }
}
