//! The JSON part of an inference request.
//!
//! Invariants:
//! - Memory is bounded by the body: `data` is borrowed and read straight into tensor buffers.
//! - A key given twice, a value of the wrong kind or a shape that lies is refused. Keys that the
//!   protocol does not know are skipped, as its other servers do.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;

use bytes::Bytes;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;

use super::elements;
use crate::domain::{DataType, Failure, ParameterValue, Parameters, Shape, Tensor};

/// Most parameters of one request or tensor.
const PARAMETERS_MAX: usize = 256;

/// A request as it stands in the JSON.
#[derive(Debug, Deserialize)]
pub struct RequestJson<'a> {
    pub id: Option<String>,
    #[serde(default)]
    pub parameters: ParametersJson,
    #[serde(borrow)]
    pub inputs: Vec<Object<InputJson<'a>>>,
    #[serde(default)]
    pub outputs: Option<Vec<Object<OutputJson>>>,
}

#[derive(Debug, Deserialize)]
pub struct InputJson<'a> {
    pub name: String,
    pub shape: Vec<i64>,
    #[serde(borrow)]
    datatype: Cow<'a, str>,
    #[serde(default)]
    pub parameters: ParametersJson,
    #[serde(borrow)]
    data: Option<&'a RawValue>,
}

#[derive(Debug, Deserialize)]
pub struct OutputJson {
    pub name: String,
    #[serde(default)]
    pub parameters: ParametersJson,
}

/// Reads the JSON of a request; the data of its inputs is read later.
///
/// # Errors
/// `InvalidInput` with line and column.
pub fn parse(json: &[u8]) -> Result<RequestJson<'_>, Failure> {
    from_slice::<Object<RequestJson<'_>>>(json).map(|Object(request)| request)
}

/// Deepest nesting of lists and objects in any body.
pub const DEPTH_MAX: usize = 100;

/// What a text holds at most, counted without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Census {
    len: usize,
    /// Elements of lists and members of objects.
    elements: usize,
    members: usize,
}

impl Census {
    /// Bytes that its tensors take at most: eight for a number, four and itself for a string.
    pub(super) fn decoded_max(&self) -> usize {
        self.len + 8 * self.elements
    }

    /// The same for a table, of which each cell is found first: the place of its text, its name.
    pub(super) fn table_max(&self) -> usize {
        self.decoded_max() + 64 * self.elements + 96 * self.members
    }
}

/// Counts a text's elements.
///
/// # Errors
/// `InvalidInput` for one nested deeper than [`DEPTH_MAX`].
pub(super) fn census(json: &[u8]) -> Result<Census, Failure> {
    let (mut depth, mut commas, mut colons) = (0_usize, 0, 0);
    let mut at = 0;
    while let Some(&byte) = json.get(at) {
        match byte {
            b'"' => at += string_len(&json[at + 1..]),
            b',' => commas += 1,
            b':' => colons += 1,
            b'[' | b'{' => {
                depth += 1;
                if depth > DEPTH_MAX {
                    return Err(Failure::invalid(format!(
                        "request body: nested deeper than {DEPTH_MAX} levels at byte {at}"
                    )));
                }
            }
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        at += 1;
    }
    Ok(Census { len: json.len(), elements: commas + 1, members: colons })
}

/// Length of a string after its first quote, the last one included.
fn string_len(rest: &[u8]) -> usize {
    let mut at = 0;
    while let Some(&byte) = rest.get(at) {
        match byte {
            b'"' => return at + 1,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    rest.len()
}

/// Any JSON body.
pub(super) fn from_slice<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, Failure> {
    census(json)?;
    serde_json::from_slice(json).map_err(|error| Failure::invalid(format!("request body: {error}")))
}

impl InputJson<'_> {
    pub fn datatype(&self) -> Result<DataType, Failure> {
        self.datatype.parse().map_err(|error| self.invalid(&error))
    }

    pub fn wire_shape(&self) -> Result<Shape, Failure> {
        Tensor::shape_from_wire(&self.shape).map_err(|error| self.invalid(&error))
    }

    pub fn has_data(&self) -> bool {
        self.data.is_some()
    }

    /// The tensor in `data`.
    pub fn tensor(&self) -> Result<Tensor, Failure> {
        let (datatype, shape) = (self.datatype()?, self.wire_shape()?);
        let text = self.data.map_or("[]", RawValue::get);
        if !text.starts_with('[') {
            return Err(self.invalid(&"data must be a list"));
        }
        let elements = shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim));
        let elements = elements.unwrap_or(usize::MAX);
        // An element takes two characters at least, so a lying shape reserves no more than the
        // body's own size.
        let likely = elements.min(text.len() / 2).saturating_mul(datatype.size().unwrap_or(8));
        let mut data = Vec::with_capacity(likely);
        let nesting = elements::read(text, datatype, elements, &mut data)
            .map_err(|error| self.invalid(&error))?;
        if nesting.len() > 1 && nesting[..] != shape[..] && !cut_short(&nesting, &shape) {
            return Err(self.invalid(&format_args!(
                "data is nested as {:?}, the shape is {:?}",
                &nesting[..],
                &shape[..]
            )));
        }
        Tensor::new(datatype, shape, Bytes::from(data)).map_err(|error| self.invalid(&error))
    }

    pub fn invalid(&self, what: &dyn fmt::Display) -> Failure {
        Failure::invalid(format!("input '{}': {what}", self.name))
    }
}

/// Lists that hold nothing hide the levels below them: `[[], []]` is of shape `[2, 0, 3]`.
fn cut_short(nesting: &[usize], shape: &[usize]) -> bool {
    nesting.last() == Some(&0) && shape.starts_with(nesting)
}

/// A JSON object and nothing else; `serde` alone would take a list for a struct too.
#[derive(Debug)]
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Only<T>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>> Visitor<'de> for Only<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }
        deserializer.deserialize_map(Only(PhantomData)).map(Object)
    }
}

/// Members of an object in their order, values unread, names unique.
#[derive(Debug)]
pub(super) struct Members<'a>(pub(super) Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de: 'a, 'a> Deserialize<'de> for Members<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All<'a>(PhantomData<&'a ()>);
        impl<'de: 'a, 'a> Visitor<'de> for All<'a> {
            type Value = Members<'a>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'a>, A::Error> {
                let mut members = Vec::new();
                let mut seen = std::collections::HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    if members.len() == COLUMNS_MAX {
                        return Err(A::Error::custom(format_args!(
                            "more than {COLUMNS_MAX} members in one object"
                        )));
                    }
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!("duplicate member `{name}`")));
                    }
                    members.push((Cow::Owned(name), map.next_value()?));
                }
                Ok(Members(members))
            }
        }
        deserializer.deserialize_map(All(PhantomData))
    }
}

/// Most rows of a table or list of instances: what is kept beside a row's text is many times it.
pub(super) const ROWS_MAX: usize = 100_000;

/// Most columns of a table.
pub(super) const COLUMNS_MAX: usize = 10_000;

/// A list of at most `MAX` elements.
#[derive(Debug)]
pub(super) struct AtMost<T, const MAX: usize>(pub(super) Vec<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for AtMost<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Elements<T, MAX> {
            type Value = Vec<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {MAX} elements")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
                let mut all = Vec::new();
                while let Some(element) = list.next_element()? {
                    if all.len() == MAX {
                        return Err(A::Error::invalid_length(MAX + 1, &self));
                    }
                    all.push(element);
                }
                Ok(all)
            }
        }
        deserializer.deserialize_seq(Elements::<T, MAX>(PhantomData)).map(Self)
    }
}

/// Parameters: an object of strings, numbers and booleans.
#[derive(Debug, Default)]
pub struct ParametersJson(pub Parameters);

impl<'de> Deserialize<'de> for ParametersJson {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Parameters;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of parameters")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Parameters, A::Error> {
                let mut all = Parameters::new();
                while let Some(name) = map.next_key::<String>()? {
                    if all.len() == PARAMETERS_MAX {
                        return Err(A::Error::custom(format_args!(
                            "more than {PARAMETERS_MAX} parameters"
                        )));
                    }
                    if all.iter().any(|(have, _)| *have == name) {
                        return Err(A::Error::custom(format_args!("duplicate parameter `{name}`")));
                    }
                    let Value(value) = map.next_value()?;
                    all.push((name, value));
                }
                Ok(all)
            }
        }
        deserializer.deserialize_map(All).map(Self)
    }
}

struct Value(ParameterValue);

impl<'de> Deserialize<'de> for Value {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Scalar;
        impl Visitor<'_> for Scalar {
            type Value = ParameterValue;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a parameter: string, number or boolean")
            }

            fn visit_bool<E>(self, value: bool) -> Result<ParameterValue, E> {
                Ok(ParameterValue::Bool(value))
            }

            fn visit_u64<E>(self, value: u64) -> Result<ParameterValue, E> {
                Ok(ParameterValue::Uint(value))
            }

            fn visit_i64<E>(self, value: i64) -> Result<ParameterValue, E> {
                Ok(ParameterValue::Int(value))
            }

            fn visit_f64<E>(self, value: f64) -> Result<ParameterValue, E> {
                Ok(ParameterValue::Double(value))
            }

            fn visit_str<E>(self, value: &str) -> Result<ParameterValue, E> {
                Ok(ParameterValue::String(value.to_owned()))
            }
        }
        deserializer.deserialize_any(Scalar).map(Self)
    }
}
