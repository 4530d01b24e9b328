//! What a record says: from a [`Completion`] to the bytes of a frame, and back.
//!
//! Written by hand, since it is on the path of every answer: the fields go from where they are
//! straight into the frame, without a message in between. Read by the generated code of
//! `proto/ledger.proto`; a test holds the two against each other.

use std::borrow::Cow;

use bytes::Bytes;
use prost::Message;
use uuid::Uuid;

use super::frame::{Draft, Form, Frame};
use crate::domain::{Completion, Outcome, Protocol, Signature, Tensor, TensorSpec};
use crate::proto::ledger;

pub use ledger::{Head, Kind, Payload, Protocol as Via};

/// What a record says of a call beside its completion.
#[derive(Clone, Copy, Debug)]
pub struct Context<'a> {
    /// Of the version that was picked, for the names of its tensors.
    pub signature: Option<&'a Signature>,
    /// Name and version of the engine; empty when none was picked.
    pub engine: &'a str,
    /// Of the route table that the request saw.
    pub config_revision: u64,
    /// What decided what is kept of the tensors.
    pub capture: &'a str,
    /// Names the one that the data is about, without telling who that is; empty: nobody asked.
    pub subject: &'a [u8],
}

/// Longest text of a caller's, or of an error, that a record holds; a longer one is cut.
pub const TEXT_BYTES_MAX: usize = 64 << 10;

/// What is left of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kept<'a> {
    pub content: Content<'a>,
    /// Columns that were made zero, or empty, before.
    pub masked: Vec<u64>,
}

/// What becomes of a tensor's bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content<'a> {
    Data(Cow<'a, [u8]>),
    Digest([u8; 32]),
    Hashed([u8; 32]),
    Sealed(Vec<u8>),
    Truncated(Cow<'a, [u8]>),
    /// Why.
    Dropped(&'static str),
}

impl<'a> From<Content<'a>> for Kept<'a> {
    fn from(content: Content<'a>) -> Self {
        Self { content, masked: Vec::new() }
    }
}

/// Makes the record of a call. `keep` decides what is kept of a tensor, by its name.
pub fn prediction<'a>(
    draft: &mut Draft,
    completion: &'a Completion,
    context: &Context<'_>,
    salt: &[u8; 32],
    mut keep: impl FnMut(&str, &'a Tensor) -> Kept<'a>,
) {
    draft.start();
    let head = draft.buffer();
    put_uint(head, 1, Kind::Prediction as u64);
    let since = completion.received_at.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    put_fixed(head, 2, u64::try_from(since.as_nanos()).unwrap_or(u64::MAX));
    put_bytes(head, 3, completion.prediction_id.as_bytes());
    put_bytes(head, 4, completion.model.as_str().as_bytes());
    put_uint(head, 5, completion.version.map_or(0, |version| version.get()));
    if let Some(digest) = &completion.digest {
        put_bytes(head, 6, digest.as_bytes());
    }
    if let Some(arm) = &completion.arm {
        put_bytes(head, 7, arm.as_str().as_bytes());
    }
    if let Some(reason) = &completion.reason {
        put_text(head, 8, reason);
    }
    put_uint(head, 9, protocol(completion.protocol) as u64);
    put_bytes(head, 10, completion.principal.as_deref().unwrap_or_default().as_bytes());
    if let Some(trace) = &completion.trace {
        put_bytes(head, 11, &trace.trace_id.to_be_bytes());
    }
    put_bytes(head, 12, completion.outcome.code().as_bytes());
    let timings = &completion.timings;
    put_uint(head, 13, nanos(timings.queue + timings.batch_wait));
    put_uint(head, 14, nanos(timings.compute_infer));
    put_uint(head, 15, nanos(timings.total));
    put_uint(head, 16, completion.batch_size as u64);
    put_uint(head, 17, u64::from(completion.cached));
    if let Some(of) = &completion.shadow_of {
        put_bytes(head, 18, of.as_bytes());
    }
    put_uint(head, 19, context.config_revision);
    put_bytes(head, 20, context.engine.as_bytes());
    put_uint(head, 21, completion.rows as u64);
    put_bytes(head, 22, context.capture.as_bytes());
    put_bytes(head, 23, context.subject);
    draft.body(Form::Whole, salt);
    let payload = draft.buffer();
    put_bytes(payload, 1, cut(&completion.request_id));
    if let Outcome::Failed { message, .. } = &completion.outcome {
        put_bytes(payload, 2, cut(message));
    }
    let specs = context.signature.map(|signature| (&signature.inputs[..], &signature.outputs[..]));
    let (inputs, outputs) = specs.unwrap_or_default();
    for (field, specs, tensors) in
        [(3, inputs, &completion.inputs), (4, outputs, &completion.outputs)]
    {
        for (at, tensor) in tensors.iter().enumerate() {
            let name = specs.get(at).map_or("", |spec: &TensorSpec| &spec.name);
            put_tensor(payload, field, name, tensor, &keep(name, tensor));
        }
    }
    draft.finish();
}

/// Makes a record from its messages: of anything that is not on the path of an answer.
pub fn other(draft: &mut Draft, head: &Head, payload: &Payload, salt: &[u8; 32]) {
    draft.start();
    head.encode_raw(draft.buffer());
    draft.body(Form::Whole, salt);
    payload.encode_raw(draft.buffer());
    draft.finish();
}

/// A record that was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub seq: u64,
    pub head: Head,
    /// `None` once it is erased.
    pub payload: Option<Payload>,
}

impl Record {
    /// # Errors
    /// When its messages cannot be read: somebody else's format.
    pub fn read(frame: &Frame<'_>) -> Result<Self, prost::DecodeError> {
        let payload = match frame.form {
            Form::Erased => None,
            Form::Whole => Some(Payload::decode(Bytes::copy_from_slice(frame.payload))?),
        };
        let head = Head::decode(Bytes::copy_from_slice(frame.head))?;
        Ok(Self { seq: frame.seq, head, payload })
    }

    pub fn prediction_id(&self) -> Option<Uuid> {
        Uuid::from_slice(&self.head.prediction_id).ok()
    }
}

fn protocol(protocol: Protocol) -> ledger::Protocol {
    match protocol {
        Protocol::Http => ledger::Protocol::Http,
        Protocol::Grpc => ledger::Protocol::Grpc,
        Protocol::GrpcStream => ledger::Protocol::GrpcStream,
    }
}

fn nanos(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn cut(text: &str) -> &[u8] {
    &text.as_bytes()[..text.floor_char_boundary(TEXT_BYTES_MAX)]
}

fn put_tensor(out: &mut Vec<u8>, field: u32, name: &str, tensor: &Tensor, kept: &Kept<'_>) {
    let datatype = tensor.datatype().name();
    let dims: usize = tensor.shape().iter().map(|dim| varint_len(*dim as u64)).sum();
    let masked: usize = kept.masked.iter().map(|column| varint_len(*column)).sum();
    let (tag, content): (u32, &[u8]) = match &kept.content {
        Content::Data(data) => (4, data),
        Content::Digest(digest) => (5, digest),
        Content::Hashed(hash) => (6, hash),
        Content::Sealed(sealed) => (7, sealed),
        Content::Truncated(data) => (8, data),
        Content::Dropped(why) => (9, why.as_bytes()),
    };
    let field_len = |len: usize| if len == 0 { 0 } else { 1 + varint_len(len as u64) + len };
    // A oneof is there even when what it holds is empty.
    let content_len = 1 + varint_len(content.len() as u64) + content.len();
    let len = field_len(name.len())
        + field_len(datatype.len())
        + field_len(dims)
        + content_len
        + field_len(masked);
    put_varint(out, u64::from(field << 3 | 2));
    put_varint(out, len as u64);
    put_bytes(out, 1, name.as_bytes());
    put_bytes(out, 2, datatype.as_bytes());
    if dims > 0 {
        put_varint(out, 3 << 3 | 2);
        put_varint(out, dims as u64);
        tensor.shape().iter().for_each(|dim| put_varint(out, *dim as u64));
    }
    put_varint(out, u64::from(tag << 3 | 2));
    put_varint(out, content.len() as u64);
    out.extend_from_slice(content);
    if masked > 0 {
        put_varint(out, 10 << 3 | 2);
        put_varint(out, masked as u64);
        kept.masked.iter().for_each(|column| put_varint(out, *column));
    }
}

/// As proto3 has it: what is empty or zero is left out.
fn put_bytes(out: &mut Vec<u8>, field: u32, bytes: &[u8]) {
    if !bytes.is_empty() {
        put_varint(out, u64::from(field << 3 | 2));
        put_varint(out, bytes.len() as u64);
        out.extend_from_slice(bytes);
    }
}

/// A short text that is made here: a label's name and a few words.
fn put_text(out: &mut Vec<u8>, field: u32, text: &impl std::fmt::Display) {
    use std::io::Write as _;
    let mut room = [0; 256];
    let mut left = &mut room[..];
    // What is too long for the room is cut; nothing that is written here is.
    write!(left, "{text}").ok();
    let len = 256 - left.len();
    put_bytes(out, field, &room[..len]);
}

fn put_uint(out: &mut Vec<u8>, field: u32, value: u64) {
    if value != 0 {
        put_varint(out, u64::from(field << 3));
        put_varint(out, value);
    }
}

fn put_fixed(out: &mut Vec<u8>, field: u32, value: u64) {
    if value != 0 {
        put_varint(out, u64::from(field << 3 | 1));
        out.extend_from_slice(&value.to_le_bytes());
    }
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value.to_le_bytes()[0] | 0x80);
        value >>= 7;
    }
    out.push(value.to_le_bytes()[0]);
}

fn varint_len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::domain::{
        Arm, DataType, Digest, ErrorKind, RouteReason, Timings, TraceContext, Version,
    };
    use crate::ledger::frame::{Parsed, parse};

    fn completion() -> Completion {
        let data = Bytes::from_static(&[0, 0, 128, 63, 0, 0, 0, 64]);
        Completion {
            prediction_id: Uuid::from_u128(0x1234),
            request_id: "a\r\n\u{0}\u{2028}b".to_owned(),
            received_at: UNIX_EPOCH + Duration::from_nanos(1_700_000_000_123_456_789),
            model: "iris".parse().unwrap(),
            version: Version::new(3),
            digest: Some(Digest::new([9; 32])),
            arm: Some(Arm::Canary),
            reason: Some(RouteReason::Weight { bucket: 17, share: 500, sticky: true }),
            protocol: Protocol::Grpc,
            principal: Some("team-a".to_owned()),
            trace: Some(TraceContext { trace_id: 77, parent_span: 1, sampled: true }),
            outcome: Outcome::Failed { kind: ErrorKind::Internal, message: "no".to_owned() },
            timings: Timings { total: Duration::from_micros(300), ..Timings::default() },
            rows: 2,
            batch_size: 8,
            cached: true,
            shadow_of: Some(Uuid::from_u128(5)),
            inputs: vec![Tensor::new(DataType::Fp32, [1, 2].into_iter().collect(), data).unwrap()],
            outputs: Vec::new(),
        }
    }

    #[test]
    fn what_is_written_by_hand_is_read_by_the_generated_code() {
        let (completion, salt) = (completion(), [3; 32]);
        let spec = TensorSpec { name: "x".to_owned(), datatype: DataType::Fp32, shape: None };
        let signature = Signature { inputs: vec![spec], outputs: Vec::new(), batched: true };
        let context = Context {
            signature: Some(&signature),
            engine: "tract 0.23",
            config_revision: 12,
            capture: "full",
            subject: &[1, 2],
        };
        let (mut draft, mut bytes) = (Draft::default(), Vec::new());
        prediction(&mut draft, &completion, &context, &salt, |_, tensor| Kept {
            content: Content::Data(Cow::Borrowed(tensor.data())),
            masked: vec![1, 300],
        });
        draft.put(4, &mut bytes);
        assert_eq!(bytes.len(), draft.len());
        let Parsed::Frame(frame) = parse(&bytes) else { panic!("{:?}", parse(&bytes)) };
        let record = Record::read(&frame).unwrap();
        assert_eq!(record.prediction_id(), Some(completion.prediction_id));
        let head = &record.head;
        assert_eq!(head.kind(), Kind::Prediction);
        assert_eq!(head.time_ns, 1_700_000_000_123_456_789);
        assert_eq!((&*head.model, head.version, &*head.arm), ("iris", 3, "canary"));
        assert_eq!(head.route_reason, "weight share 500, bucket 17, sticky");
        assert_eq!((head.protocol(), &*head.principal), (ledger::Protocol::Grpc, "team-a"));
        assert_eq!((&*head.status, head.total_ns), ("internal", 300_000));
        assert_eq!((head.batch_size, head.rows, head.cached), (8, 2, true));
        assert_eq!(head.shadow_of, completion.shadow_of.unwrap().as_bytes()[..]);
        assert_eq!((head.config_revision, &*head.engine), (12, "tract 0.23"));
        assert_eq!((&*head.capture, &head.subject[..]), ("full", &[1, 2][..]));
        let payload = record.payload.unwrap();
        assert_eq!((payload.request_id, &*payload.error), (completion.request_id, "no"));
        let [input] = &payload.inputs[..] else { panic!() };
        assert_eq!((&*input.name, &*input.datatype, &input.shape[..]), ("x", "FP32", &[1, 2][..]));
        let Some(ledger::tensor::Content::Data(data)) = &input.content else { panic!() };
        assert_eq!(data, completion.inputs[0].data());
        assert_eq!(input.masked, [1, 300]);
        // Written as the generated code would write it, to the byte.
        let mut again = Vec::new();
        head.encode_raw(&mut again);
        assert_eq!(again, frame.head);
    }
}
