//! A request message from its bytes, without what generated code would make of it.
//!
//! The generated types turn two bytes on the wire into hundreds in memory (an empty input) or
//! eight per byte (a list of small numbers), before anybody could count. Here the message is
//! walked once: lists have limits, tensors stay slices, typed contents stay as they came.
//!
//! Invariants:
//! - Any bytes give a request or an error, never a panic, and no recursion.
//! - What is kept is bounded by the limits below, whatever the message says.
//! - What the protocol's other servers accept is accepted: fields in any order, packed or not,
//!   unknown ones skipped.

use bytes::Bytes;
use smallvec::SmallVec;

use crate::domain::{Failure, ParameterValue, RANK_MAX};

/// Most inputs, requested outputs or raw contents of one request.
pub(super) const TENSORS_MAX: usize = 1024;
/// Most parameters of one request or tensor.
pub(super) const PARAMETERS_MAX: usize = 256;
/// Deepest nesting of groups, which are only skipped.
const GROUPS_MAX: usize = 100;

/// Why bytes are no request message.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum WireError {
    #[error("message ends inside {0}")]
    Short(&'static str),
    #[error("a number has more than 10 bytes")]
    Varint,
    #[error("a field has number 0 or one too large")]
    FieldNumber,
    #[error("{0} has another wire type than the protocol says")]
    Type(&'static str),
    #[error("groups are nested deeper than {GROUPS_MAX} levels, or end where none began")]
    Group,
    #[error("{0} is not UTF-8")]
    Text(&'static str),
    #[error("more than {max} {what}")]
    TooMany { what: &'static str, max: usize },
    #[error("parameter '{0}' is given twice")]
    Parameter(String),
    #[error("input '{input}' has contents twice, expected once")]
    Contents { input: String },
}

impl WireError {
    pub(super) fn into_failure(self) -> Failure {
        Failure::invalid(format!("request message: {self}"))
    }
}

/// A parameter; `None` without a value.
pub(super) type Parameter = (String, Option<ParameterValue>);

/// `ModelInferRequest`, its typed contents unread.
#[derive(Debug, Default)]
pub(super) struct Request {
    pub(super) model_name: String,
    pub(super) model_version: String,
    pub(super) id: String,
    pub(super) parameters: Vec<Parameter>,
    pub(super) inputs: Vec<Input>,
    pub(super) outputs: Vec<Output>,
    pub(super) raw: Vec<Bytes>,
}

#[derive(Debug, Default)]
pub(super) struct Input {
    pub(super) name: String,
    pub(super) datatype: String,
    /// At most [`RANK_MAX`] and one, so that a shape that is too long is seen as such.
    pub(super) shape: SmallVec<[i64; 4]>,
    /// Dimensions that the message had.
    pub(super) rank: usize,
    pub(super) parameters: Vec<Parameter>,
    /// The fields of `InferTensorContents`.
    pub(super) contents: Option<Bytes>,
}

#[derive(Debug, Default)]
pub(super) struct Output {
    pub(super) name: String,
    pub(super) parameters: Vec<Parameter>,
}

impl Request {
    /// Bytes that reading the tensors has to look at one by one; the others stay as they lie.
    pub(super) fn looked_at_bytes(&self) -> usize {
        let typed = self.inputs.iter().filter_map(|input| input.contents.as_ref());
        let walked = self.inputs.iter().any(|input| matches!(&*input.datatype, "BOOL" | "BYTES"));
        let raw = self.raw.iter().filter(|_| walked);
        typed.chain(raw).map(Bytes::len).sum()
    }
}

/// Value of one field.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Value {
    Varint(u64),
    Fixed64([u8; 8]),
    Bytes(Bytes),
    Fixed32([u8; 4]),
    /// A group; what was in it is skipped.
    Group,
}

impl Value {
    pub(super) fn bytes(self, what: &'static str) -> Result<Bytes, WireError> {
        match self {
            Self::Bytes(bytes) => Ok(bytes),
            _ => Err(WireError::Type(what)),
        }
    }

    fn text(self, what: &'static str) -> Result<String, WireError> {
        let bytes = self.bytes(what)?;
        let text = std::str::from_utf8(&bytes).map_err(|_| WireError::Text(what))?;
        Ok(text.to_owned())
    }

    fn varint(self, what: &'static str) -> Result<u64, WireError> {
        match self {
            Self::Varint(number) => Ok(number),
            _ => Err(WireError::Type(what)),
        }
    }
}

/// Walks the fields of one message.
pub(super) struct Fields {
    rest: Bytes,
}

impl Fields {
    pub(super) fn new(message: Bytes) -> Self {
        Self { rest: message }
    }

    /// Number and value of the next field.
    pub(super) fn next(&mut self) -> Result<Option<(u32, Value)>, WireError> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (number, kind) = self.tag()?;
        let value = match kind {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed64(self.fixed()?),
            2 => Value::Bytes(self.bytes()?),
            3 => {
                self.skip_group(number)?;
                Value::Group
            }
            5 => Value::Fixed32(self.fixed()?),
            _ => return Err(WireError::Group),
        };
        Ok(Some((number, value)))
    }

    fn tag(&mut self) -> Result<(u32, u8), WireError> {
        let tag = u32::try_from(self.varint()?).map_err(|_| WireError::FieldNumber)?;
        let kind = u8::try_from(tag & 7).unwrap_or(7);
        match tag >> 3 {
            0 => Err(WireError::FieldNumber),
            number if kind == 6 || kind == 7 => {
                // No such wire types; how long the value is cannot be known.
                tracing::trace!(number, kind, "no wire type");
                Err(WireError::Type("a field"))
            }
            number => Ok((number, kind)),
        }
    }

    fn varint(&mut self) -> Result<u64, WireError> {
        let (number, len) = varint(&self.rest)?;
        drop(self.rest.split_to(len));
        Ok(number)
    }

    fn fixed<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let value = *self.rest.first_chunk().ok_or(WireError::Short("a number"))?;
        drop(self.rest.split_to(N));
        Ok(value)
    }

    fn bytes(&mut self) -> Result<Bytes, WireError> {
        let len = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
        if len > self.rest.len() {
            return Err(WireError::Short("a field"));
        }
        Ok(self.rest.split_to(len))
    }

    /// Skips to behind the end of group `number`.
    fn skip_group(&mut self, number: u32) -> Result<(), WireError> {
        let mut open: SmallVec<[u32; 8]> = SmallVec::from_slice(&[number]);
        while let Some(&innermost) = open.last() {
            let (number, kind) = self.tag()?;
            match kind {
                0 => drop(self.varint()?),
                1 => drop(self.fixed::<8>()?),
                2 => drop(self.bytes()?),
                3 if open.len() < GROUPS_MAX => open.push(number),
                4 if number == innermost => drop(open.pop()),
                5 => drop(self.fixed::<4>()?),
                _ => return Err(WireError::Group),
            }
        }
        Ok(())
    }
}

/// A number and how many bytes it takes.
pub(super) fn varint(bytes: &[u8]) -> Result<(u64, usize), WireError> {
    let mut number = 0_u64;
    for (at, byte) in bytes.iter().take(10).enumerate() {
        let low = u64::from(byte & 0x7f);
        if at == 9 && low > 1 {
            return Err(WireError::Varint);
        }
        number |= low << (7 * at);
        if byte & 0x80 == 0 {
            return Ok((number, at + 1));
        }
    }
    if bytes.len() < 10 { Err(WireError::Short("a number")) } else { Err(WireError::Varint) }
}

/// Reads a whole message.
pub(super) fn request(message: Bytes) -> Result<Request, WireError> {
    let mut request = Request::default();
    let mut fields = Fields::new(message);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => request.model_name = value.text("model_name")?,
            2 => request.model_version = value.text("model_version")?,
            3 => request.id = value.text("id")?,
            4 => parameter(value, &mut request.parameters)?,
            5 => push(&mut request.inputs, input(value.bytes("inputs")?)?, "inputs")?,
            6 => push(&mut request.outputs, output(value.bytes("outputs")?)?, "outputs")?,
            7 => {
                let raw = value.bytes("raw_input_contents")?;
                push(&mut request.raw, raw, "raw_input_contents")?;
            }
            _ => {}
        }
    }
    Ok(request)
}

fn push<T>(list: &mut Vec<T>, item: T, what: &'static str) -> Result<(), WireError> {
    if list.len() == TENSORS_MAX {
        return Err(WireError::TooMany { what, max: TENSORS_MAX });
    }
    list.push(item);
    Ok(())
}

fn input(message: Bytes) -> Result<Input, WireError> {
    let mut input = Input::default();
    let mut fields = Fields::new(message);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => input.name = value.text("name of an input")?,
            2 => input.datatype = value.text("datatype of an input")?,
            3 => match value {
                Value::Varint(dim) => input.dimension(dim),
                Value::Bytes(mut packed) => {
                    while !packed.is_empty() {
                        let (dim, len) = varint(&packed)?;
                        drop(packed.split_to(len));
                        input.dimension(dim);
                    }
                }
                _ => return Err(WireError::Type("shape of an input")),
            },
            4 => parameter(value, &mut input.parameters)?,
            5 => {
                let contents = value.bytes("contents of an input")?;
                if input.contents.replace(contents).is_some() {
                    return Err(WireError::Contents { input: super::decode::shown(&input.name) });
                }
            }
            _ => {}
        }
    }
    Ok(input)
}

impl Input {
    fn dimension(&mut self, dim: u64) {
        self.rank += 1;
        if self.shape.len() <= RANK_MAX {
            self.shape.push(dim.cast_signed());
        }
    }
}

fn output(message: Bytes) -> Result<Output, WireError> {
    let mut output = Output::default();
    let mut fields = Fields::new(message);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => output.name = value.text("name of an output")?,
            2 => parameter(value, &mut output.parameters)?,
            _ => {}
        }
    }
    Ok(output)
}

/// One entry of a map of parameters.
fn parameter(entry: Value, parameters: &mut Vec<Parameter>) -> Result<(), WireError> {
    let (mut key, mut choice) = (String::new(), None);
    let mut fields = Fields::new(entry.bytes("parameters")?);
    while let Some((number, value)) = fields.next()? {
        match number {
            1 => key = value.text("key of a parameter")?,
            2 => choice = parameter_value(value.bytes("value of a parameter")?)?,
            _ => {}
        }
    }
    if parameters.len() == PARAMETERS_MAX {
        return Err(WireError::TooMany { what: "parameters", max: PARAMETERS_MAX });
    }
    if parameters.iter().any(|(have, _)| *have == key) {
        return Err(WireError::Parameter(super::decode::shown(&key)));
    }
    parameters.push((key, choice));
    Ok(())
}

/// `InferParameter`: the last of its fields counts, as in any `oneof`.
fn parameter_value(message: Bytes) -> Result<Option<ParameterValue>, WireError> {
    const WHAT: &str = "value of a parameter";
    let mut choice = None;
    let mut fields = Fields::new(message);
    while let Some((number, value)) = fields.next()? {
        choice = Some(match number {
            1 => ParameterValue::Bool(value.varint(WHAT)? != 0),
            2 => ParameterValue::Int(value.varint(WHAT)?.cast_signed()),
            3 => ParameterValue::String(value.text(WHAT)?),
            4 => match value {
                Value::Fixed64(bytes) => ParameterValue::Double(f64::from_le_bytes(bytes)),
                _ => return Err(WireError::Type(WHAT)),
            },
            5 => ParameterValue::Uint(value.varint(WHAT)?),
            _ => continue,
        });
    }
    Ok(choice)
}

#[cfg(test)]
mod tests;
