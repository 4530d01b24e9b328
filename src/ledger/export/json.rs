//! One line of JSON of a record.
//!
//! What JSON cannot say: NaN and the infinities are the texts `"NaN"`, `"Infinity"`, `"-Infinity"`
//! (a NaN whose bits are not the usual ones has them behind it: `"NaN:0x7fc00001"`); an integer
//! beyond ±2⁵³ is a text of its digits, since most readers keep numbers as doubles; an element of
//! `BYTES` that is no UTF-8 is `{"base64": "…"}`. Data that does not fit its own datatype stands
//! whole under `data_base64`. `masked`, where it is, names columns of the last axis that were made zero
//! or empty before anything else was done.

use std::io::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::civil::time;
use super::names::{digest_text, hex_text, kind_name, prefixed, protocol_name, uuid_text};
use super::view::{Content, TensorView, View};
use crate::domain::{BytesElements, DataType};

/// Largest integer that a double holds, and all below it.
const EXACT_MAX: u64 = 1 << 53;

/// Appends the record as one object, without the end of the line. `writer` is whose log it is from.
pub fn line(out: &mut Vec<u8>, writer: &str, view: &View<'_>) {
    let kept = !view.erased;
    let mut object = Object { out, first: true };
    object.out.push(b'{');
    object.uint("seq", view.seq);
    object.text("writer", writer);
    object.optional("prediction_id", uuid_text(view.prediction_id).as_deref());
    object.optional("request_id", kept.then_some(view.request_id).filter(|id| !id.is_empty()));
    object.text("time", &time(view.time_ns));
    object.word("model", view.model);
    object.positive("version", view.version);
    object.optional("model_digest", digest_text("sha256", view.model_digest).as_deref());
    object.word("arm", view.arm);
    object.word("route_reason", view.route_reason);
    object.optional("protocol", protocol_name(view.protocol));
    object.word("principal", view.principal);
    object.optional("trace_id", hex_text(view.trace_id).as_deref());
    object.word("status", view.status);
    object.micros("queue_us", view.queue_ns);
    object.micros("compute_us", view.compute_ns);
    object.micros("total_us", view.total_ns);
    object.uint("batch_size", view.batch_size);
    object.raw("cached", if view.cached { "true" } else { "false" });
    object.optional("shadow_of", uuid_text(view.shadow_of).as_deref());
    for (name, list) in [("inputs", &view.inputs), ("outputs", &view.outputs)] {
        object.name(name);
        match kept {
            true => tensors(object.out, list, |_| None),
            false => object.out.extend_from_slice(b"null"),
        }
    }
    object.uint("config_revision", view.config_revision);
    object.word("engine", view.engine);
    rest(&mut object, view);
    object.out.push(b'}');
}

/// What the contract leaves to us: what kind of record it is, and what only some kinds have.
fn rest(object: &mut Object<'_>, view: &View<'_>) {
    object.text("kind", kind_name(view.kind));
    object.uint("rows", view.rows);
    object.word("error", view.error);
    object.raw("erased", if view.erased { "true" } else { "false" });
    object.word("capture", view.capture);
    object.optional("subject", hex_text(view.subject).as_deref());
    if view.count > 0 {
        object.uint("count", view.count);
    }
    if view.until_ns != 0 {
        object.text("until", &time(view.until_ns));
    }
    if !view.action.is_empty() {
        object.text("action", view.action);
    }
    if !view.body.is_empty() {
        object.name("body");
        body(object.out, view.body);
    }
}

/// Appends a list of tensors. Of one that `column` has a name for, that stands there and not the
/// data.
pub fn tensors<'a>(
    out: &mut Vec<u8>,
    list: &[TensorView<'_>],
    mut column: impl FnMut(&TensorView<'_>) -> Option<&'a str>,
) {
    out.push(b'[');
    for (at, tensor) in list.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        out.extend_from_slice(b"{\"name\":");
        text(out, tensor.name);
        out.extend_from_slice(b",\"datatype\":");
        text(out, tensor.datatype);
        out.extend_from_slice(b",\"shape\":[");
        list_of(out, tensor.shape.iter(), |out, dim| integer(out, i128::from(*dim)));
        out.push(b']');
        if !tensor.masked.is_empty() {
            out.extend_from_slice(b",\"masked\":[");
            list_of(out, tensor.masked.iter(), |out, at| integer(out, i128::from(*at)));
            out.push(b']');
        }
        match column(tensor) {
            Some(column) => {
                out.extend_from_slice(b",\"column\":");
                text(out, column);
            }
            None => content(out, tensor),
        }
        out.push(b'}');
    }
    out.push(b']');
}

fn content(out: &mut Vec<u8>, tensor: &TensorView<'_>) {
    let mut member = |name: &str, value: &str| {
        out.push(b',');
        text(out, name);
        out.push(b':');
        text(out, value);
    };
    match tensor.content {
        Content::Data(bytes) => data(out, tensor, bytes),
        Content::Digest(digest) => member("digest", &prefixed("sha256", digest)),
        Content::Hashed(hash) => member("hashed", &prefixed("hmac-sha256", hash)),
        Content::Sealed(sealed) => member("sealed", &STANDARD.encode(sealed)),
        Content::Truncated(start) => member("truncated", &STANDARD.encode(start)),
        Content::Dropped(why) => member("dropped", why),
        Content::None => member("dropped", "unknown"),
    }
}

fn data(out: &mut Vec<u8>, tensor: &TensorView<'_>, bytes: &[u8]) {
    let start = out.len();
    out.extend_from_slice(b",\"data\":[");
    let datatype = tensor.datatype.parse::<DataType>().ok();
    if datatype.is_some_and(|datatype| elements(out, datatype, bytes).is_some()) {
        out.push(b']');
        return;
    }
    out.truncate(start);
    out.extend_from_slice(b",\"data_base64\":");
    text(out, &STANDARD.encode(bytes));
}

/// `None` when the bytes are none of that datatype.
fn elements(out: &mut Vec<u8>, datatype: DataType, bytes: &[u8]) -> Option<()> {
    macro_rules! numbers {
        ($type:ty, $write:expr) => {{
            let (chunks, rest) = bytes.as_chunks::<{ size_of::<$type>() }>();
            if !rest.is_empty() {
                return None;
            }
            let write = $write;
            list_of(out, chunks.iter(), |out, chunk| write(out, <$type>::from_le_bytes(*chunk)));
        }};
    }
    macro_rules! integers {
        ($type:ty) => {
            numbers!($type, |out: &mut Vec<u8>, value: $type| integer(out, i128::from(value)))
        };
    }
    match datatype {
        DataType::Bool => {
            if bytes.iter().any(|byte| *byte > 1) {
                return None;
            }
            let word = |byte: &u8| if *byte == 1 { &b"true"[..] } else { b"false" };
            list_of(out, bytes.iter(), |out, byte| out.extend_from_slice(word(byte)));
        }
        DataType::Uint8 => integers!(u8),
        DataType::Uint16 => integers!(u16),
        DataType::Uint32 => integers!(u32),
        DataType::Uint64 => integers!(u64),
        DataType::Int8 => integers!(i8),
        DataType::Int16 => integers!(i16),
        DataType::Int32 => integers!(i32),
        DataType::Int64 => integers!(i64),
        DataType::Fp16 => numbers!(half::f16, |out: &mut Vec<u8>, value: half::f16| float32(
            out,
            value.to_f32(),
            (value.to_bits() != half::f16::NAN.to_bits()).then(|| u64::from(value.to_bits())),
        )),
        DataType::Bf16 => numbers!(half::bf16, |out: &mut Vec<u8>, value: half::bf16| float32(
            out,
            value.to_f32(),
            (value.to_bits() != half::bf16::NAN.to_bits()).then(|| u64::from(value.to_bits())),
        )),
        DataType::Fp32 => numbers!(f32, |out: &mut Vec<u8>, value: f32| float32(
            out,
            value,
            (value.to_bits() != f32::NAN.to_bits()).then(|| u64::from(value.to_bits())),
        )),
        DataType::Fp64 => numbers!(f64, float64),
        DataType::Bytes => {
            let all: Result<Vec<&[u8]>, _> = BytesElements::new(bytes).collect();
            list_of(out, all.ok()?.into_iter(), element);
        }
    }
    Some(())
}

fn list_of<T>(
    out: &mut Vec<u8>,
    items: impl Iterator<Item = T>,
    mut write: impl FnMut(&mut Vec<u8>, T),
) {
    for (at, item) in items.enumerate() {
        if at > 0 {
            out.push(b',');
        }
        write(out, item);
    }
}

fn integer(out: &mut Vec<u8>, value: i128) {
    let quote: &[u8] = if value.unsigned_abs() > u128::from(EXACT_MAX) { b"\"" } else { b"" };
    out.extend_from_slice(quote);
    put(out, format_args!("{value}"));
    out.extend_from_slice(quote);
}

/// The shortest digits that give back the number; `bits` of a NaN that is not the usual one.
fn float32(out: &mut Vec<u8>, value: f32, bits: Option<u64>) {
    match value.is_finite() {
        true => serialized(out, &value),
        false => not_finite(out, f64::from(value), bits),
    }
}

fn float64(out: &mut Vec<u8>, value: f64) {
    let bits = (value.to_bits() != f64::NAN.to_bits()).then(|| value.to_bits());
    match value.is_finite() {
        true => serialized(out, &value),
        false => not_finite(out, value, bits),
    }
}

fn not_finite(out: &mut Vec<u8>, value: f64, bits: Option<u64>) {
    match (value.is_nan(), bits) {
        (true, Some(bits)) => put(out, format_args!("\"NaN:{bits:#x}\"")),
        (true, None) => out.extend_from_slice(b"\"NaN\""),
        _ if value > 0.0 => out.extend_from_slice(b"\"Infinity\""),
        _ => out.extend_from_slice(b"\"-Infinity\""),
    }
}

fn element(out: &mut Vec<u8>, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(string) => text(out, string),
        Err(_) => {
            out.extend_from_slice(b"{\"base64\":");
            text(out, &STANDARD.encode(bytes));
            out.push(b'}');
        }
    }
}

/// JSON as it is, but on one line; what is none as a text of base64.
fn body(out: &mut Vec<u8>, bytes: &[u8]) {
    match serde_json::from_slice::<&serde_json::value::RawValue>(bytes) {
        // Ends of lines are space between texts, and escaped within.
        Ok(json) => {
            let one_line = escaped(json.get()).replace(['\n', '\r'], " ");
            out.extend_from_slice(one_line.as_bytes());
        }
        Err(_) => element(out, bytes),
    }
}

/// Appends a text as JSON has it.
pub fn text(out: &mut Vec<u8>, string: &str) {
    match string.is_ascii() || !string.contains(LINE_ENDS) {
        true => serialized(out, string),
        false => {
            let start = out.len();
            serialized(out, string);
            let written = String::from_utf8_lossy(&out.split_off(start)).into_owned();
            out.extend_from_slice(escaped(&written).as_bytes());
        }
    }
}

/// What JSON allows in a text, and some programs take for the end of a line.
const LINE_ENDS: [char; 3] = ['\u{85}', '\u{2028}', '\u{2029}'];

fn escaped(json: &str) -> String {
    LINE_ENDS.iter().fold(json.to_owned(), |json, end| {
        json.replace(*end, &format!("\\u{:04x}", u32::from(*end)))
    })
}

fn serialized(out: &mut Vec<u8>, value: &(impl serde::Serialize + ?Sized)) {
    // A text or a number into memory: there is nothing that fails.
    serde_json::to_writer(out, value).ok();
}

fn put(out: &mut Vec<u8>, args: std::fmt::Arguments<'_>) {
    out.write_fmt(args).ok();
}

/// An object that is being written.
struct Object<'a> {
    out: &'a mut Vec<u8>,
    first: bool,
}

impl Object<'_> {
    fn name(&mut self, name: &str) {
        if !std::mem::take(&mut self.first) {
            self.out.push(b',');
        }
        self.out.push(b'"');
        self.out.extend_from_slice(name.as_bytes());
        self.out.extend_from_slice(b"\":");
    }

    fn raw(&mut self, name: &str, value: &str) {
        self.name(name);
        self.out.extend_from_slice(value.as_bytes());
    }

    fn text(&mut self, name: &str, value: &str) {
        self.name(name);
        text(self.out, value);
    }

    fn optional(&mut self, name: &str, value: Option<&str>) {
        match value {
            Some(value) => self.text(name, value),
            None => self.raw(name, "null"),
        }
    }

    /// Empty: there is none.
    fn word(&mut self, name: &str, value: &str) {
        self.optional(name, Some(value).filter(|value| !value.is_empty()));
    }

    fn uint(&mut self, name: &str, value: u64) {
        self.name(name);
        integer(self.out, i128::from(value));
    }

    /// 0: there is none.
    fn positive(&mut self, name: &str, value: u64) {
        match value {
            0 => self.raw(name, "null"),
            value => self.uint(name, value),
        }
    }

    /// Microseconds with as many places as the nanoseconds need.
    fn micros(&mut self, name: &str, nanos: u64) {
        self.name(name);
        put(self.out, format_args!("{}", nanos / 1000));
        if !nanos.is_multiple_of(1000) {
            let places = format!("{:03}", nanos % 1000);
            put(self.out, format_args!(".{}", places.trim_end_matches('0')));
        }
    }
}
