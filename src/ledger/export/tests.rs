use std::cell::Cell;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};
use uuid::Uuid;

use super::*;
use crate::ledger::frame::{Draft, WriterId};
use crate::ledger::record::{Head, Kind, Payload, Record, other};
use crate::proto::ledger::{Tensor, tensor};

/// A segment that is written without a log: nothing else may decide when it is sealed.
pub(in crate::ledger) struct Written {
    file: std::cell::RefCell<File>,
    next_seq: Cell<u64>,
}

/// Seals the segment that is open, if one is, and begins the next.
pub(in crate::ledger) fn log(dir: &Path) -> Written {
    std::fs::create_dir_all(dir.join(SEGMENTS)).unwrap();
    let mut first_seq = 0;
    if let Some(last) = reader::segments(dir).unwrap().pop() {
        let mut reader = SegmentReader::open(&last).unwrap();
        while reader.next_frame().unwrap().is_some() {}
        first_seq = reader.next_seq();
        std::fs::rename(&last.path, reader::segment_path(dir, last.first_seq, true)).unwrap();
    }
    let mut file = File::create(reader::segment_path(dir, first_seq, false)).unwrap();
    let now = jiff::Timestamp::now().as_nanosecond();
    let head = SegmentHead {
        log: "predictions".into(),
        writer: WriterId([0xab; 8]),
        first_seq,
        created_ns: u64::try_from(now).unwrap(),
    };
    file.write_all(&head.encode()).unwrap();
    Written { file: file.into(), next_seq: Cell::new(first_seq) }
}

pub(in crate::ledger) fn append(log: &Written, head: &Head, payload: &Payload) -> u64 {
    let mut draft = Draft::default();
    other(&mut draft, head, payload, &[7; 32]);
    let (seq, mut bytes) = (log.next_seq.get(), Vec::new());
    draft.put(seq, &mut bytes);
    log.file.borrow_mut().write_all(&bytes).unwrap();
    log.next_seq.set(seq + 1);
    seq
}

pub(in crate::ledger) fn tensor(name: &str, datatype: &str, shape: &[u64], data: &[u8]) -> Tensor {
    let content = Some(tensor::Content::Data(data.to_vec().into()));
    Tensor {
        name: name.into(),
        datatype: datatype.into(),
        shape: shape.to_vec(),
        content,
        masked: Vec::new(),
    }
}

pub(in crate::ledger) fn head(number: u64) -> Head {
    Head {
        kind: Kind::Prediction as i32,
        time_ns: 1_764_065_472_123_456_789 + number.cast_signed() * 1_000_000,
        prediction_id: Uuid::from_u128(u128::from(number) + 1).as_bytes().to_vec().into(),
        model: "iris".into(),
        version: 3,
        model_digest: vec![0xcd; 32].into(),
        arm: "stable".into(),
        route_reason: "latest".into(),
        protocol: 2,
        principal: "team-a".into(),
        trace_id: 77_u128.to_be_bytes().to_vec().into(),
        status: "ok".into(),
        queue_ns: 1_500,
        compute_ns: 250_000,
        total_ns: 300_001,
        batch_size: 8,
        cached: false,
        config_revision: 12,
        engine: "tract 0.23".into(),
        rows: 1,
        ..Head::default()
    }
}

pub(in crate::ledger) fn payload() -> Payload {
    let floats = |values: &[f32]| values.iter().flat_map(|it| it.to_le_bytes()).collect::<Vec<_>>();
    Payload {
        request_id: "r \"1\"\n".into(),
        inputs: vec![tensor("x", "FP32", &[1, 4], &floats(&[5.1, 3.5, 1.4, 0.2]))],
        outputs: vec![tensor("label", "INT64", &[1], &1_i64.to_le_bytes())],
        ..Payload::default()
    }
}

fn lines(dir: &Path, wanted: &Selection) -> Vec<Value> {
    let mut all = Vec::new();
    scan::<ExportError>(dir, wanted, |head, view| {
        let mut out = Vec::new();
        line(&mut out, &head.writer.to_string(), view);
        assert!(!out.contains(&b'\n'));
        all.push(serde_json::from_slice(&out).unwrap());
        Ok(ControlFlow::Continue(()))
    })
    .unwrap();
    all
}

#[test]
fn a_line_has_what_the_contract_says() {
    let folder = tempfile::tempdir().unwrap();
    let log = log(folder.path());
    append(&log, &head(0), &payload());
    let lines = lines(folder.path(), &Selection::default());
    assert_eq!(
        lines[0],
        json!({
            "seq": 0, "writer": "abababababababab",
            "prediction_id": "00000000-0000-0000-0000-000000000001", "request_id": "r \"1\"\n",
            "time": "2025-11-25T10:11:12.123456789Z", "model": "iris", "version": 3,
            "model_digest": format!("sha256:{}", "cd".repeat(32)),
            "arm": "stable", "route_reason": "latest", "protocol": "grpc", "principal": "team-a",
            "trace_id": "0000000000000000000000000000004d", "status": "ok",
            "queue_us": 1.5, "compute_us": 250, "total_us": 300.001, "batch_size": 8,
            "cached": false, "shadow_of": null,
            "inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [5.1, 3.5, 1.4, 0.2]}],
            "outputs": [{"name": "label", "datatype": "INT64", "shape": [1], "data": [1]}],
            "config_revision": 12, "engine": "tract 0.23",
            "kind": "prediction", "rows": 1, "error": null, "erased": false, "capture": null,
            "subject": null,
        })
    );
}

#[test]
fn what_json_cannot_say_has_words() {
    let of = |datatype: &str, data: &[u8]| {
        let tensor = TensorView {
            name: "x",
            datatype,
            content: Content::Data(data),
            ..TensorView::default()
        };
        let mut out = Vec::new();
        tensors(&mut out, &[tensor], |_| None);
        let list: Value = serde_json::from_slice(&out).unwrap();
        let mut tensor = list[0].clone();
        tensor
            .as_object_mut()
            .unwrap()
            .retain(|name, _| name.starts_with("data") && name != "datatype");
        tensor
    };
    let floats = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -0.0, f32::from_bits(0x7fc0_0001)];
    let floats: Vec<u8> = floats.iter().flat_map(|it| it.to_le_bytes()).collect();
    let words = json!(["NaN", "Infinity", "-Infinity", -0.0, "NaN:0x7fc00001"]);
    assert_eq!(of("FP32", &floats)["data"], words);
    let ints = [1_i64 << 53, (1 << 53) + 1, i64::MIN].map(i64::to_le_bytes).concat();
    let words = json!([9_007_199_254_740_992_i64, "9007199254740993", "-9223372036854775808"]);
    assert_eq!(of("INT64", &ints)["data"], words);
    let texts = b"\x02\0\0\0hi\x00\0\0\0\x02\0\0\0\xff\0\x03\0\0\0\"\n\0";
    assert_eq!(of("BYTES", texts)["data"], json!(["hi", "", {"base64": "/wA="}, "\"\n\u{0}"]));
    assert_eq!(of("BOOL", &[0, 1])["data"], json!([false, true]));
    assert_eq!(of("BOOL", &[2]), json!({"data_base64": "Ag=="}));
    assert_eq!(of("FP32", &[1]), json!({"data_base64": "AQ=="}));
    assert_eq!(of("BYTES", &[9, 0, 0, 0]), json!({"data_base64": "CQAAAA=="}));
    assert_eq!(of("COMPLEX", &[1]), json!({"data_base64": "AQ=="}));
    assert_eq!(of("FP16", &half::f16::from_f32(0.5).to_le_bytes())["data"], json!([0.5]));
}

#[test]
fn what_was_not_kept_says_so() {
    let digest = [1; 32];
    let hex = "01".repeat(32);
    for (content, name, value) in [
        (Content::Digest(&digest), "digest", format!("sha256:{hex}")),
        (Content::Hashed(&digest), "hashed", format!("hmac-sha256:{hex}")),
        (Content::Sealed(b"ab"), "sealed", "YWI=".to_owned()),
        (Content::Truncated(b"ab"), "truncated", "YWI=".to_owned()),
        (Content::Dropped("policy"), "dropped", "policy".to_owned()),
    ] {
        let tensor = TensorView { name: "x", datatype: "FP32", content, ..TensorView::default() };
        let mut out = Vec::new();
        tensors(&mut out, &[tensor], |_| None);
        let list: Value = serde_json::from_slice(&out).unwrap();
        assert_eq!(list[0][name], json!(value));
    }
}

#[test]
fn an_erased_record_has_nulls_and_a_body_stays_on_its_line() {
    let mut bytes = Vec::new();
    let mut draft = Draft::default();
    other(&mut draft, &head(0), &payload(), &[7; 32]);
    draft.put(0, &mut bytes);
    let crate::ledger::frame::Parsed::Frame(frame) = crate::ledger::frame::parse(&bytes) else {
        unreachable!("it was just made")
    };
    let erased = frame.erased();
    let crate::ledger::frame::Parsed::Frame(frame) = crate::ledger::frame::parse(&erased) else {
        unreachable!("it was just made")
    };
    let mut out = Vec::new();
    line(&mut out, "w", &View::read(&frame).unwrap());
    let value: Value = serde_json::from_slice(&out).unwrap();
    assert_eq!((&value["erased"], &value["inputs"]), (&json!(true), &Value::Null));
    assert_eq!((&value["request_id"], &value["status"]), (&Value::Null, &json!("ok")));

    let view =
        View { body: b"{\r\n \"a\": \"b\\n\",\n\"n\": 123456789012345678901 }", ..View::default() };
    let mut out = Vec::new();
    line(&mut out, "w", &view);
    assert!(!out.contains(&b'\n') && !out.contains(&b'\r'));
    let text = String::from_utf8(out).unwrap();
    assert!(text.contains(r#""n": 123456789012345678901"#), "{text}");
}

#[test]
fn segments_that_cannot_hold_what_is_wanted_are_not_read() {
    const HOUR: i64 = 3_600_000_000_000;
    let wanted =
        |since, until| Selection { since_ns: since, until_ns: until, ..Selection::default() };
    let hours = |hours: i64| u64::try_from(hours * HOUR).unwrap();
    // Begun at 100 h, its successor at 101 h.
    let may = |wanted: Selection| wanted.may_be_between(hours(100), Some(hours(101)));
    assert!(may(wanted(None, None)));
    assert!(may(wanted(Some(101 * HOUR), None)));
    assert!(!may(wanted(Some(102 * HOUR), None)));
    // A call that took a day came before the segment was begun.
    assert!(may(wanted(None, Some(76 * HOUR))));
    assert!(!may(wanted(None, Some(74 * HOUR))));
    let id = Uuid::new_v7(uuid::Timestamp::from_unix(uuid::NoContext, 360_000, 0));
    let by_id = Selection::of(id);
    assert!(by_id.may_be_between(hours(100), None));
    assert!(!by_id.may_be_between(hours(98), Some(hours(99))));
    // Another kind of id has no time: everything is read.
    assert_eq!(Selection::of(Uuid::from_u128(7)).since_ns, None);
}

#[test]
fn records_are_found_by_what_they_are() {
    let folder = tempfile::tempdir().unwrap();
    let log = log(folder.path());
    let now = i64::try_from(jiff::Timestamp::now().as_nanosecond()).unwrap();
    let at = |number: u64| now + number.cast_signed();
    for number in 0..10 {
        let mut head = Head { time_ns: at(number), ..head(number) };
        if number % 2 == 1 {
            (head.model, head.version, head.status) = ("digits".into(), 1, "timeout".into());
        }
        append(&log, &head, &payload());
    }
    let found = |wanted: &Selection| {
        lines(folder.path(), wanted)
            .iter()
            .map(|it| it["seq"].as_u64().unwrap())
            .collect::<Vec<_>>()
    };
    let all = Selection::default;
    assert_eq!(found(&Selection { model: Some("digits".into()), ..all() }), [1, 3, 5, 7, 9]);
    assert_eq!(found(&Selection { version: Some(3), ..all() }), [0, 2, 4, 6, 8]);
    assert_eq!(found(&Selection { status: Some("timeout".into()), ..all() }), [1, 3, 5, 7, 9]);
    let between = Selection { since_ns: Some(at(3)), until_ns: Some(at(5)), ..all() };
    assert_eq!(found(&between), [3, 4]);
    assert_eq!(found(&Selection { prediction_id: Some(Uuid::from_u128(8)), ..all() }), [7]);
    assert!(log_folder(folder.path()).is_ok());
    assert!(log_folder(&folder.path().join("segments")).is_err());
}

fn any_tensor() -> impl Strategy<Value = Tensor> {
    let content = prop_oneof![
        prop::collection::vec(any::<u8>(), 0..64).prop_map(|it| tensor::Content::Data(it.into())),
        prop::collection::vec(any::<u8>(), 32).prop_map(|it| tensor::Content::Digest(it.into())),
        prop::collection::vec(any::<u8>(), 0..40).prop_map(|it| tensor::Content::Sealed(it.into())),
        ".{0,8}".prop_map(tensor::Content::Dropped),
    ];
    let datatype = prop::sample::select(crate::domain::DataType::ALL.to_vec());
    (".{0,8}", datatype, prop::collection::vec(any::<u64>(), 0..6), content).prop_map(
        |(name, datatype, shape, content)| Tensor {
            name,
            datatype: datatype.name().into(),
            shape,
            content: Some(content),
            masked: vec![3],
        },
    )
}

fn any_record() -> impl Strategy<Value = (Head, Payload)> {
    let texts = prop::collection::vec(".{0,12}", 8);
    let numbers = prop::collection::vec(any::<u64>(), 8);
    let tensors = || prop::collection::vec(any_tensor(), 0..6);
    (texts, numbers, any::<i64>(), tensors(), tensors(), prop::collection::vec(any::<u8>(), 0..40))
        .prop_map(|(texts, numbers, time_ns, inputs, outputs, body)| {
            let text = |at: usize| texts[at].clone();
            let head = Head {
                kind: (numbers[0] % 9) as i32,
                time_ns,
                prediction_id: numbers[1].to_be_bytes().repeat(2).into(),
                model: text(0),
                version: numbers[2],
                arm: text(1),
                protocol: (numbers[3] % 4) as i32,
                principal: text(2),
                status: text(3),
                queue_ns: numbers[4],
                cached: numbers[5] % 2 == 1,
                engine: text(4),
                count: numbers[6],
                until_ns: time_ns,
                action: text(5),
                ..Head::default()
            };
            let payload =
                Payload { request_id: text(6), error: text(7), inputs, outputs, body: body.into() };
            (head, payload)
        })
}

/// Whoever reads a log may be the one who makes it grow.
#[test]
fn a_log_that_grows_while_it_is_read_is_not_damaged() {
    let dir = tempfile::tempdir().unwrap();
    let log = log(dir.path());
    for number in 0..3 {
        append(&log, &head(number), &Payload::default());
    }
    let mut seen = 0;
    let taken = scan::<ExportError>(dir.path(), &Selection::default(), |_, view| {
        assert_eq!(view.seq, seen);
        seen += 1;
        append(&log, &head(100 + seen), &Payload::default());
        Ok(if seen < 50 { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
    });
    assert!(taken.unwrap() >= 3);
    let segment = reader::segments(dir.path()).unwrap().remove(0);
    let mut reader = SegmentReader::open(&segment).unwrap();
    while reader.next_frame().unwrap().is_some() {}
    append(&log, &head(7), &Payload::default());
    assert!(matches!(reader.rest().unwrap(), Rest::More));
    assert!(reader.next_frame().unwrap().is_some());
}

proptest! {
    #[test]
    fn a_view_reads_what_the_generated_code_reads((head, payload) in any_record()) {
        let mut bytes = Vec::new();
        let mut draft = Draft::default();
        other(&mut draft, &head, &payload, &[7; 32]);
        draft.put(5, &mut bytes);
        let crate::ledger::frame::Parsed::Frame(frame) = crate::ledger::frame::parse(&bytes) else {
            unreachable!("it was just made")
        };
        let view = View::read(&frame).unwrap();
        let record = Record::read(&frame).unwrap();
        prop_assert_eq!((view.seq, view.kind), (record.seq, record.head.kind as u64));
        prop_assert_eq!(view.time_ns, record.head.time_ns);
        prop_assert_eq!(view.prediction_id, &record.head.prediction_id[..]);
        prop_assert_eq!((view.model, view.version), (&*record.head.model, record.head.version));
        prop_assert_eq!((view.status, view.engine), (&*record.head.status, &*record.head.engine));
        prop_assert_eq!((view.queue_ns, view.cached), (record.head.queue_ns, record.head.cached));
        let payload = record.payload.unwrap();
        prop_assert_eq!((view.request_id, view.error), (&*payload.request_id, &*payload.error));
        prop_assert_eq!(view.body, &payload.body[..]);
        for (views, tensors) in [(&view.inputs, &payload.inputs), (&view.outputs, &payload.outputs)] {
            prop_assert_eq!(views.len(), tensors.len());
            for (view, tensor) in views.iter().zip(tensors) {
                prop_assert_eq!((view.name, view.datatype), (&*tensor.name, &*tensor.datatype));
                prop_assert_eq!(&view.shape[..], &tensor.shape[..]);
                prop_assert_eq!(&view.masked[..], &tensor.masked[..]);
                match (&view.content, tensor.content.as_ref().unwrap()) {
                    (Content::Data(a), tensor::Content::Data(b))
                    | (Content::Digest(a), tensor::Content::Digest(b))
                    | (Content::Sealed(a), tensor::Content::Sealed(b)) => prop_assert_eq!(*a, &b[..]),
                    (Content::Dropped(a), tensor::Content::Dropped(b)) => prop_assert_eq!(a, b),
                    other => prop_assert!(false, "{:?}", other),
                }
            }
        }
        let mut out = Vec::new();
        line(&mut out, "w", &view);
        prop_assert!(!out.contains(&b'\n'));
        let value: Value = serde_json::from_slice(&out).unwrap();
        prop_assert_eq!(value["model"].as_str().unwrap_or_default(), view.model);
    }

    #[test]
    fn no_bytes_of_a_message_panic(head in prop::collection::vec(any::<u8>(), 0..64), payload in prop::collection::vec(any::<u8>(), 0..64)) {
        let mut draft = Draft::default();
        draft.start();
        draft.buffer().extend_from_slice(&head);
        draft.body(crate::ledger::frame::Form::Whole, &[7; 32]);
        draft.buffer().extend_from_slice(&payload);
        draft.finish();
        let mut bytes = Vec::new();
        draft.put(0, &mut bytes);
        if let crate::ledger::frame::Parsed::Frame(frame) = crate::ledger::frame::parse(&bytes)
            && let Ok(view) = View::read(&frame)
        {
            let mut out = Vec::new();
            line(&mut out, "w", &view);
            prop_assert!(serde_json::from_slice::<Value>(&out).is_ok());
        }
    }

    #[test]
    fn floats_come_back_bit_by_bit(bits in any::<u32>(), wide in any::<u64>()) {
        let of = |datatype: &str, data: &[u8]| {
            let tensor = TensorView { datatype, content: Content::Data(data), ..TensorView::default() };
            let mut out = Vec::new();
            tensors(&mut out, &[tensor], |_| None);
            let text = String::from_utf8(out).unwrap();
            text.split_once(r#""data":["#).unwrap().1.trim_end_matches("]}]").to_owned()
        };
        let (single, double) = (f32::from_bits(bits), f64::from_bits(wide));
        if single.is_finite() {
            let text = of("FP32", &bits.to_le_bytes());
            prop_assert_eq!(text.parse::<f32>().unwrap().to_bits(), bits);
        }
        if double.is_finite() {
            let text = of("FP64", &wide.to_le_bytes());
            prop_assert_eq!(text.parse::<f64>().unwrap().to_bits(), wide);
        }
    }

    #[test]
    fn times_are_those_of_the_calendar(time_ns in any::<i64>()) {
        let ours = time(time_ns);
        let theirs: jiff::Timestamp = ours.parse().unwrap();
        prop_assert_eq!(theirs.as_nanosecond(), i128::from(time_ns));
        prop_assert!(ours.starts_with(&Date::of(time_ns).to_string()));
    }
}
