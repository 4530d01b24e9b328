//! What each fuzz target does with its bytes; `tests/fuzz_corpus.rs` replays the corpus through
//! the same functions.
//!
//! Each decodes hostile bytes, which may be refused but never panic, and checks that whatever was
//! accepted keeps the promises of its type.

use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use tidegate::domain::{
    DataType, Dim, Failure, Inputs, NamedTensor, Shape, Signature, Tensor, TensorSpec,
};
use tidegate::drift::feature::Value;
use tidegate::drift::profile::Profile;
use tidegate::drift::verdict::judge;
use tidegate::ledger::checkpoint::{Note, Notes};
use tidegate::ledger::frame::{self, Parsed, SegmentHead, WriterId};
use tidegate::ledger::prove::Proof;
use tidegate::ledger::reader::{SegmentFile, SegmentReader};
use tidegate::ledger::record::Record;
use tidegate::transport::grpc;
use tidegate::transport::http::binary::{self, SharedSlice};
use tidegate::transport::http::compress::{self, Encoding};
use tidegate::transport::http::{elements, invocations, v1};
use tidegate::transport::shm::SharedMemory;

pub type Decoder = fn(&[u8]);

/// Every target by its name, which is also its folder in the corpus.
pub const DECODERS: &[(&str, Decoder)] = &[
    ("infer_json", infer_json),
    ("infer_binary", infer_binary),
    ("infer_raw", infer_raw),
    ("v1", v1),
    ("invocations_json", invocations_json),
    ("invocations_csv", invocations_csv),
    ("compressed", compressed),
    ("grpc_infer", grpc_infer),
    ("onnx", onnx),
    ("ledger", ledger),
    ("profile", profile),
];

pub fn infer_json(data: &[u8]) {
    infer(data, None);
}

/// The first two bytes are the length of the JSON, little-endian.
pub fn infer_binary(data: &[u8]) {
    if let Some((length, body)) = data.split_first_chunk::<2>() {
        infer(body, Some(usize::from(u16::from_le_bytes(*length)).max(1)));
    }
}

pub fn infer_raw(data: &[u8]) {
    infer(data, Some(0));
}

pub fn v1(data: &[u8]) {
    for signature in signatures() {
        check(v1::decode(&signature, data));
    }
}

pub fn invocations_json(data: &[u8]) {
    for signature in signatures() {
        check(invocations::decode(&signature, invocations::Form::Json, data));
    }
}

pub fn invocations_csv(data: &[u8]) {
    for signature in signatures() {
        check(invocations::decode(&signature, invocations::Form::Csv, data));
    }
}

pub fn compressed(data: &[u8]) {
    const SIZE_MAX: usize = 4 << 20;
    for encoding in [Encoding::Gzip, Encoding::Deflate] {
        if let Ok(body) = compress::inflate(encoding, data, SIZE_MAX, 100, &|_| Ok(())) {
            assert!(body.len() <= SIZE_MAX);
        }
    }
}

pub fn grpc_infer(data: &[u8]) {
    const SHM_BYTES_MAX: usize = 1 << 20;
    let shm = SharedMemory::new(false);
    let Ok(decoded) = grpc::decode(Bytes::copy_from_slice(data), &shm, SHM_BYTES_MAX, &|_| Ok(()))
    else {
        return;
    };
    if let Inputs::Named(named) = decoded.request.inputs {
        check(Ok(named));
    }
}

/// A model file, of which the signature is read before any engine sees it.
pub fn onnx(data: &[u8]) {
    let Ok(model) = tidegate::engine::onnx::parse(data) else { return };
    let signature = &model.signature;
    assert!(!signature.outputs.is_empty());
    assert!(signature.inputs.iter().chain(&signature.outputs).all(|spec| !spec.name.is_empty()));
}

/// A reference profile: what is read is used as a gateway uses it, with values of every kind.
pub fn profile(data: &[u8]) {
    let Ok(profile) = Profile::read(data) else { return };
    let vector = [0.5; 16];
    let numbers = [0.0, -1.5, 1e300, f64::NAN, f64::INFINITY].map(Value::Number);
    let others =
        [Value::Text(b"red"), Value::Text(&[0xff; 300]), Value::Vector(&vector), Value::Missing];
    for feature in &profile.features {
        let mut counters = feature.counters();
        for value in numbers.iter().chain(&others) {
            feature.add(&mut counters, *value);
            feature.oddity(*value);
        }
        counters.merge(&counters.clone());
        assert!(feature.fits(&counters) && feature.fits(&feature.own()));
        let scores = feature.score(&counters);
        assert!(scores.iter().all(|(_, score)| score.is_finite()));
        assert_eq!(judge([(feature, &counters, &scores)]).len(), 1);
        feature.is_constant(&counters);
    }
    assert!(profile.write().is_ok_and(|bytes| Profile::read(&bytes).is_ok()));
}

/// A file of a ledger: a segment, sealed or not, a checkpoint, a proof.
pub fn ledger(data: &[u8]) {
    if let Ok(head) = SegmentHead::decode(data) {
        assert_eq!(SegmentHead::decode(&head.encode()), Ok(head));
    }
    let path = std::env::temp_dir().join(format!("tidegate-fuzz-{}", std::process::id()));
    let head = SegmentHead {
        log: "predictions".to_owned(),
        writer: WriterId([7; 8]),
        first_seq: 0,
        created_ns: 0,
    };
    for sealed in [false, true] {
        // What is a segment as it is, and what follows the head of one.
        for bytes in [data, &[&head.encode(), data].concat()] {
            std::fs::write(&path, bytes).expect("a temporary file");
            let segment = SegmentFile { first_seq: 0, sealed, path: path.clone() };
            if let Ok(reader) = SegmentReader::open(&segment) {
                frames(reader, bytes.len());
            }
        }
    }
    drop(std::fs::remove_file(&path));
    if let Ok(text) = std::str::from_utf8(data)
        && let Ok(note) = text.parse::<Note>()
    {
        assert_eq!(note.to_string(), text);
        assert!(note.verify([]).is_err());
    }
    let mut notes = Notes::new(data, 0);
    while let Ok(Some((at, _))) = notes.next_note() {
        assert!(at < notes.end());
    }
    if let Ok(proof) = serde_json::from_slice::<Proof>(data) {
        assert!(proof.check(&[]).is_err());
    }
}

/// Every frame that is accepted is one, and stays the same leaf without its payload.
fn frames(mut reader: SegmentReader, len: usize) {
    let mut next = 0;
    while let Ok(Some(frame)) = reader.next_frame() {
        assert_eq!(frame.seq, next);
        let (leaf, erased) = (frame.leaf(), frame.erased());
        let Parsed::Frame(erased) = frame::parse(&erased) else { unreachable!("not a frame") };
        assert_eq!((erased.seq, erased.leaf()), (frame.seq, leaf));
        drop(Record::read(&frame));
        next += 1;
    }
    assert!(reader.offset() <= len as u64);
    drop(reader.rest());
    // Behind damage it goes on with a whole frame, or ends; it never goes back.
    while let Ok(Some(seq)) = reader.skip_damage() {
        assert!(seq >= next);
        let Ok(Some(frame)) = reader.next_frame() else { unreachable!("no frame where one is") };
        assert_eq!(frame.seq, seq);
        next = seq + 1;
    }
    assert!(reader.offset() <= len as u64);
}

fn infer(body: &[u8], json_len: Option<usize>) {
    let body = Bytes::copy_from_slice(body);
    let shared = |slice: &SharedSlice| Ok(Bytes::from(slice.region.clone()));
    let Ok(decoded) = binary::decode(&body, json_len, &shared) else { return };
    assert_eq!(decoded.outputs.len(), decoded.forms.len());
    match decoded.inputs {
        Inputs::Named(named) => check(Ok(named)),
        Inputs::Deferred(make) => check(at_once(make(&signatures()[0]))),
    }
}

/// What is ready without waiting.
fn at_once<F: Future + Unpin>(mut future: F) -> F::Output {
    let mut context = Context::from_waker(Waker::noop());
    match Pin::new(&mut future).poll(&mut context) {
        Poll::Ready(output) => output,
        Poll::Pending => unreachable!("a decoder waits"),
    }
}

/// Accepted tensors are well formed and survive a trip through JSON.
fn check(named: Result<Vec<NamedTensor>, Failure>) {
    for NamedTensor { tensor, .. } in named.unwrap_or_default() {
        let shape = Shape::from_slice(tensor.shape());
        assert!(Tensor::new(tensor.datatype(), shape, tensor.data().clone()).is_ok());
        let mut text = Vec::new();
        // A tensor without elements may still say that it has any number of empty rows.
        let write =
            if tensor.elements() == 0 { elements::write_flat } else { elements::write_nested };
        if write(&tensor, &mut text).is_ok() {
            let text = std::str::from_utf8(&text).expect("JSON is UTF-8");
            let mut back = Vec::new();
            let read = elements::read(text, tensor.datatype(), usize::MAX, &mut back);
            assert!(read.is_ok());
            assert_eq!(back[..], tensor.data()[..]);
        }
    }
}

/// Models of one input and of several, with the datatypes that are read differently.
fn signatures() -> Vec<Signature> {
    let input = |name: &str, datatype, dims: &[Option<usize>]| TensorSpec {
        name: name.to_owned(),
        datatype,
        shape: Some(dims.iter().map(|dim| dim.map_or(Dim::Dynamic(None), Dim::Fixed)).collect()),
    };
    let signature = |inputs| Signature { inputs, outputs: Vec::new(), batched: true };
    vec![
        signature(vec![input("x", DataType::Fp32, &[None, Some(2)])]),
        signature(vec![
            input("a", DataType::Int64, &[None, Some(1)]),
            input("b", DataType::Bytes, &[None]),
            input("c", DataType::Bool, &[None, Some(1), Some(1)]),
        ]),
    ]
}
