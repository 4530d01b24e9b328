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
use serde::de::value::{CowStrDeserializer, MapAccessDeserializer};
use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;
use smallvec::SmallVec;

use super::elements;
use crate::domain::{DataType, Failure, ParameterValue, Parameters, Shape, Tensor};

/// Most characters of a key that an error shows.
const SHOWN_MAX: usize = 40;

/// Most parameters of one request or tensor.
const PARAMETERS_MAX: usize = 256;

/// A request as it stands in the JSON.
#[derive(Debug, Deserialize)]
pub struct RequestJson<'a> {
    pub id: Option<String>,
    #[serde(default)]
    pub parameters: ParametersJson,
    #[serde(borrow)]
    pub inputs: Tensors<Object<InputJson<'a>>>,
    #[serde(default)]
    pub outputs: Option<Tensors<Object<OutputJson>>>,
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

/// A JSON object with each key once, and nothing else; `serde` alone would take a list for a struct too.
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
                T::deserialize(MapAccessDeserializer::new(Unique { map, seen: SmallVec::new() }))
            }
        }
        deserializer.deserialize_map(Only(PhantomData)).map(Object)
    }
}

/// Most keys of an object whose keys have meanings.
const KEYS_MAX: usize = 256;

/// An object's members, none of them twice; those that are skipped count too.
struct Unique<'de, A> {
    map: A,
    seen: SmallVec<[Cow<'de, str>; 8]>,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Unique<'de, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        let Some(Text(key)) = self.map.next_key::<Text<'de>>()? else { return Ok(None) };
        if self.seen.contains(&key) {
            let shown: String = key.chars().take(SHOWN_MAX).collect();
            return Err(A::Error::custom(format_args!("duplicate field `{shown}`")));
        }
        if self.seen.len() == KEYS_MAX {
            return Err(A::Error::custom(format_args!("more than {KEYS_MAX} keys in one object")));
        }
        let value = seed.deserialize(CowStrDeserializer::new(key.clone()))?;
        self.seen.push(key);
        Ok(Some(value))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.map.next_value_seed(seed)
    }
}

/// A string, borrowed where it has no escapes.
struct Text<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for Text<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }
        deserializer.deserialize_str(Any)
    }
}

/// Any value, objects with each key once: what is read as a value would keep the last of two.
pub(super) struct Strict(pub(super) Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = Value;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_unit<E>(self) -> Result<Value, E> {
                Ok(Value::Null)
            }

            fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_str<E>(self, value: &str) -> Result<Value, E> {
                Ok(value.into())
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
                let mut all = Vec::new();
                while let Some(Strict(value)) = list.next_element()? {
                    all.push(value);
                }
                Ok(Value::Array(all))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Value, A::Error> {
                let mut map = Unique { map, seen: SmallVec::new() };
                let mut all = serde_json::Map::new();
                while let Some((key, Strict(value))) = map.next_entry::<String, _>()? {
                    all.insert(key, value);
                }
                Ok(Value::Object(all))
            }
        }
        deserializer.deserialize_any(Any).map(Strict)
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
                while let Some(Text(name)) = map.next_key::<Text<'de>>()? {
                    if members.len() == COLUMNS_MAX {
                        return Err(A::Error::custom(format_args!(
                            "more than {COLUMNS_MAX} members in one object"
                        )));
                    }
                    if !seen.insert(name.clone()) {
                        return Err(A::Error::custom(format_args!("duplicate member `{name}`")));
                    }
                    members.push((name, map.next_value()?));
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

/// Most inputs or requested outputs of one request.
pub const TENSORS_MAX: usize = 1024;

/// Inputs or requested outputs.
pub type Tensors<T> = AtMost<T, TENSORS_MAX>;

/// A list of at most `MAX` elements.
#[derive(Debug)]
pub struct AtMost<T, const MAX: usize>(pub Vec<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for AtMost<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements<T, const MAX: usize>(PhantomData<T>);
        impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for Elements<T, MAX> {
            type Value = Vec<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let what = if MAX == TENSORS_MAX { "inputs or outputs" } else { "elements" };
                write!(f, "a list of at most {MAX} {what}")
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

/// Rows of a table, all cells in one list: a list for each narrow row would be many times its text.
#[derive(Debug)]
pub(super) struct Rows<'a> {
    pub(super) cells: Vec<&'a RawValue>,
    /// Cells of each row.
    pub(super) widths: Vec<u32>,
}

impl<'de: 'a, 'a> Deserialize<'de> for Rows<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct All;
        impl<'de> Visitor<'de> for All {
            type Value = Rows<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a list of at most {ROWS_MAX} elements")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Rows<'de>, A::Error> {
                let mut rows = Rows { cells: Vec::new(), widths: Vec::new() };
                while let Some(width) = list.next_element_seed(Row(&mut rows.cells))? {
                    if rows.widths.len() == ROWS_MAX {
                        return Err(A::Error::invalid_length(ROWS_MAX + 1, &self));
                    }
                    rows.widths.push(width);
                }
                Ok(rows)
            }
        }
        deserializer.deserialize_seq(All)
    }
}

/// Appends the cells of one row; gives how many they are.
struct Row<'r, 'de>(&'r mut Vec<&'de RawValue>);

impl<'de> DeserializeSeed<'de> for Row<'_, 'de> {
    type Value = u32;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<u32, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Row<'_, 'de> {
    type Value = u32;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of at most {COLUMNS_MAX} elements")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<u32, A::Error> {
        let mut width = 0;
        while let Some(cell) = list.next_element()? {
            if width == COLUMNS_MAX {
                return Err(A::Error::invalid_length(COLUMNS_MAX + 1, &self));
            }
            self.0.push(cell);
            width += 1;
        }
        Ok(u32::try_from(width).unwrap_or(u32::MAX))
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
                    let Scalar(value) = map.next_value()?;
                    all.push((name, value));
                }
                Ok(all)
            }
        }
        deserializer.deserialize_map(All).map(Self)
    }
}

struct Scalar(ParameterValue);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Plain;
        impl Visitor<'_> for Plain {
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
        deserializer.deserialize_any(Plain).map(Self)
    }
}
