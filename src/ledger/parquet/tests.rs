use std::time::Duration;

use ::parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Int64Type, UInt64Type};
use arrow_array::{Array, RecordBatch};

use super::*;
use crate::ledger::export::tests::{append, head, log, payload, tensor};
use crate::ledger::reader;
use crate::ledger::record::{Head, Payload};

/// A sealed segment of the records.
fn sealed(dir: &Path, records: impl IntoIterator<Item = (Head, Payload)>) -> SegmentFile {
    let log = log(dir);
    for (head, payload) in records {
        append(&log, &head, &payload);
    }
    drop(log);
    // Whoever opens it seals what was left.
    drop(self::log(dir));
    reader::segments(dir).unwrap().into_iter().rfind(|segment| segment.sealed).unwrap()
}

fn read(path: &Path) -> RecordBatch {
    let reader = ParquetRecordBatchReaderBuilder::try_new(File::open(path).unwrap()).unwrap();
    let batches: Vec<RecordBatch> =
        reader.with_batch_size(1 << 20).build().unwrap().map(Result::unwrap).collect();
    assert_eq!(batches.len(), 1);
    batches.into_iter().next().unwrap()
}

fn column<'a>(batch: &'a RecordBatch, name: &str) -> &'a dyn Array {
    batch.column_by_name(name).unwrap_or_else(|| panic!("no column {name}"))
}

#[test]
fn a_segment_becomes_a_file_for_each_model_and_day() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, root) = (folder.path().join("log"), folder.path().join("parquet"));
    let day = |number: u64| head(number * 86_400_000);
    let other = Head { model: "digits".into(), ..head(1) };
    let gap = Head { kind: 2, model: String::new(), count: 7, ..head(2) };
    let records =
        [(head(0), payload()), (other, payload()), (day(1), payload()), (gap, Payload::default())];
    let segment = sealed(&dir, records);
    let manifest = convert(&segment, &root, &Job::of(&Selection::default())).unwrap();
    let files: Vec<&str> = manifest.files.iter().map(|file| &*file.file).collect();
    let name = "abababababababab-00000000000000000000.parquet";
    assert_eq!(
        files,
        [
            format!("model=__HIVE_DEFAULT_PARTITION__/date=2025-11-25/{name}"),
            format!("model=digits/date=2025-11-25/{name}"),
            format!("model=iris/date=2025-11-25/{name}"),
            format!("model=iris/date=2025-11-26/{name}"),
        ]
    );
    let of_iris = &manifest.files[2];
    assert_eq!((of_iris.rows, of_iris.first_seq, of_iris.last_seq), (1, 0, 0));
    let bytes = std::fs::read(root.join(&of_iris.file)).unwrap();
    let digest: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!((digest, bytes.len() as u64), (of_iris.sha256.clone(), of_iris.bytes));
    let read_back = Manifest::read(&root, crate::ledger::frame::WriterId([0xab; 8]), 0).unwrap();
    assert_eq!(read_back, manifest);
    assert_eq!(Manifest::all(&root), std::slice::from_ref(&manifest));
    assert!(manifest.fits(&segment));
    // Once more: the same bytes under the same names.
    let again = convert(&segment, &root, &Job::of(&Selection::default())).unwrap();
    assert_eq!(again, manifest);
}

#[test]
fn tensors_have_columns_of_their_types() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, root) = (folder.path().join("log"), folder.path().join("parquet"));
    let mut two = payload();
    let nan = f32::from_bits(0x7fc0_0001);
    let data: Vec<u8> = [nan, f32::INFINITY].iter().flat_map(|it| it.to_le_bytes()).collect();
    two.inputs = vec![
        tensor("x", "FP32", &[2, 1], &data),
        tensor("t", "BYTES", &[2], b"\x02\0\0\0hi\x01\0\0\0\xff"),
    ];
    two.outputs = Vec::new();
    let mut three = payload();
    three.inputs = vec![tensor("x", "INT64", &[1], &i64::MIN.to_le_bytes())];
    let segment = sealed(&dir, [(head(0), payload()), (head(1), two), (head(2), three)]);
    let manifest = convert(&segment, &root, &Job::of(&Selection::default())).unwrap();
    let batch = read(&root.join(&manifest.files[0].file));
    assert!(batch.column_by_name("model").is_none(), "the folder says it");
    let x = column(&batch, "in_x").as_list::<i32>();
    assert_eq!(x.value(0).as_primitive::<Float32Type>().values()[..], [5.1, 3.5, 1.4, 0.2]);
    assert_eq!(x.value(1).as_primitive::<Float32Type>().value(0).to_bits(), 0x7fc0_0001);
    assert!(x.is_null(2));
    let shape = column(&batch, "in_x_shape").as_list::<i32>();
    assert_eq!(shape.value(1).as_primitive::<UInt64Type>().values()[..], [2, 1]);
    let other = column(&batch, "in_x_int64").as_list::<i32>();
    assert_eq!(other.value(2).as_primitive::<Int64Type>().value(0), i64::MIN);
    let text = column(&batch, "in_t").as_list::<i32>();
    let text = text.value(1);
    let text = text.as_string::<i32>();
    assert_eq!((text.value(0), text.is_null(1)), ("hi", true));
    let label = column(&batch, "out_label").as_list::<i32>();
    assert_eq!((label.value(0).len(), label.is_null(1)), (1, true));
    let json = column(&batch, "inputs").as_string::<i32>();
    let first = r#"[{"name":"x","datatype":"FP32","shape":[1,4],"data":[5.1,3.5,1.4,0.2]}]"#;
    assert_eq!(json.value(0), first);
    assert!(json.value(1).contains(r#"{"base64":"/w=="}"#), "{}", json.value(1));
    let time = column(&batch, "time").as_primitive::<arrow_array::types::TimestampNanosecondType>();
    assert_eq!(time.value(0), head(0).time_ns);
}

#[test]
fn much_data_is_in_its_column_alone() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, root) = (folder.path().join("log"), folder.path().join("parquet"));
    let mut large = payload();
    large.inputs = vec![tensor("x", "FP32", &[5000], &[0; 20_000])];
    // Not text: the column has not everything.
    let bytes = [&20_000_u32.to_le_bytes()[..], &[0xff; 20_000]].concat();
    large.outputs = vec![tensor("y", "BYTES", &[1], &bytes)];
    let segment = sealed(&dir, [(head(0), large)]);
    let manifest = convert(&segment, &root, &Job::of(&Selection::default())).unwrap();
    let batch = read(&root.join(&manifest.files[0].file));
    let json = column(&batch, "inputs").as_string::<i32>().value(0);
    assert_eq!(json, r#"[{"name":"x","datatype":"FP32","shape":[5000],"column":"in_x"}]"#);
    assert_eq!(column(&batch, "in_x").as_list::<i32>().value(0).len(), 5000);
    assert!(column(&batch, "outputs").as_string::<i32>().value(0).contains("base64"));
}

#[test]
fn one_file_has_the_model_as_a_column() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("log");
    let other = Head { model: "digits".into(), ..head(1) };
    sealed(&dir, [(head(0), payload()), (other, payload())]);
    let path = folder.path().join("all.parquet");
    assert_eq!(single(&dir, &Selection::default(), &path).unwrap(), 2);
    let batch = read(&path);
    let model = column(&batch, "model").as_string::<i32>();
    assert_eq!((model.value(0), model.value(1)), ("iris", "digits"));
    let none = Selection { model: Some("none".into()), ..Selection::default() };
    assert_eq!(single(&dir, &none, &path).unwrap(), 0);
    assert!(ParquetRecordBatchReaderBuilder::try_new(File::open(&path).unwrap()).is_ok());
}

#[test]
fn many_models_are_written_some_at_a_time() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, root) = (folder.path().join("log"), folder.path().join("parquet"));
    let of = |number: u64| Head { model: format!("m{:02}", number % 20), ..head(number) };
    let segment = sealed(&dir, (0..100).map(|number| (of(number), payload())));
    let manifest = convert(&segment, &root, &Job::of(&Selection::default())).unwrap();
    assert_eq!(manifest.files.len(), 20);
    for (at, file) in manifest.files.iter().enumerate() {
        let batch = read(&root.join(&file.file));
        let seqs = column(&batch, "seq").as_primitive::<UInt64Type>().values().to_vec();
        let want: Vec<u64> = (0..5).map(|round| round * 20 + at as u64).collect();
        assert_eq!(seqs, want);
    }
}

#[test]
fn names_of_columns_differ() {
    let mut survey = Survey::default();
    let mut view = View::default();
    for (name, datatype) in [("a", "FP32"), ("A", "FP32"), ("a_shape", "FP32"), ("a", "INT8")] {
        let content = crate::ledger::export::Content::Data(&[]);
        let tensor =
            crate::ledger::export::TensorView { name, datatype, content, ..Default::default() };
        view.inputs.push(tensor);
    }
    survey.add(&view);
    let columns: Vec<String> = survey.columns().into_iter().map(|column| column.name).collect();
    assert_eq!(columns, ["in_a", "in_A_fp32", "in_a_shape_fp32", "in_a_int8"]);
}

#[test]
fn what_is_damaged_is_left_out_and_named() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, root) = (folder.path().join("log"), folder.path().join("parquet"));
    let segment = sealed(&dir, (0..6).map(|number| (head(number), payload())));
    let bytes = std::fs::read(&segment.path).unwrap();
    let len = (bytes.len() - crate::ledger::frame::SEGMENT_HEAD_BYTES) / 6;
    let convert_with = |changed: &[usize]| {
        let mut bytes = bytes.clone();
        changed.iter().for_each(|at| bytes[*at] ^= 0x55);
        std::fs::write(&segment.path, bytes).unwrap();
        convert(&segment, &root, &Job::of(&Selection::default())).unwrap()
    };
    let at = |record: usize| crate::ledger::frame::SEGMENT_HEAD_BYTES + record * len;
    let manifest = convert_with(&[at(1) + 60, at(2) + 60]);
    let [lost] = &manifest.unreadable[..] else { panic!("{manifest:?}") };
    assert_eq!((lost.first_seq, lost.last_seq, lost.offset), (1, 2, at(1) as u64));
    assert_eq!((manifest.files[0].rows, manifest.segment.last_seq), (4, Some(5)));
    let batch = read(&root.join(&manifest.files[0].file));
    let seq = column(&batch, "seq").as_primitive::<UInt64Type>().values().to_vec();
    assert_eq!(seq, [0, 3, 4, 5]);
    // A length: the rest of the segment, whose end the next one tells.
    let manifest = convert_with(&[at(4)]);
    assert_eq!((manifest.unreadable[0].first_seq, manifest.unreadable[0].last_seq), (4, 5));
    assert_eq!((manifest.segment.records, manifest.segment.last_seq), (4, Some(5)));
    assert_eq!(Manifest::all(&root), [manifest]);
    // Cut in the last record, and behind the last but one.
    for end in [at(5) + 7, at(5)] {
        let mut cut = bytes[..end].to_vec();
        let sealed_with = u32::try_from(bytes.len()).unwrap();
        cut[crate::ledger::frame::MARK].copy_from_slice(&sealed_with.to_le_bytes());
        std::fs::write(&segment.path, cut).unwrap();
        let manifest = convert(&segment, &root, &Job::of(&Selection::default())).unwrap();
        assert_eq!((manifest.unreadable[0].first_seq, manifest.unreadable[0].last_seq), (5, 5));
        assert_eq!((manifest.segment.records, manifest.unreadable.len()), (5, 1));
    }
    // Put right from a copy, it is whole again.
    assert!(convert_with(&[]).unreadable.is_empty());
}

#[test]
fn the_converter_finds_what_is_sealed_and_what_changed() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, root) = (folder.path().join("log"), folder.path().join("parquet"));
    let segment = sealed(&dir, [(head(0), payload())]);
    let settings = ConverterSettings {
        log: dir.clone(),
        root: root.clone(),
        days_of: std::sync::Arc::new(|_| Some(7)),
        every: Duration::from_millis(5),
    };
    let mut converter = Converter::start(settings, || {}).unwrap();
    let wait = |what: &dyn Fn() -> bool| {
        for _ in 0..2000 {
            if what() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("it did not come: {:?}", converter.progress());
    };
    wait(&|| converter.progress().segments == 1);
    assert_eq!((converter.progress().rows, converter.progress().waiting), (1, 0));
    // Written anew, as after an erasure.
    let bytes = std::fs::read(&segment.path).unwrap();
    std::fs::write(&segment.path, bytes).unwrap();
    wait(&|| converter.progress().segments == 2);
    // No segment at all: told, and others go on.
    std::fs::write(dir.join("segments/00000000000000000009.seg"), b"no").unwrap();
    wait(&|| converter.progress().failures > 0);
    converter.stop();
    assert_eq!(converter.progress().segments, 2);
}

#[tokio::test]
async fn what_is_sealed_last_is_converted_at_the_end_if_there_is_time() {
    for (time_max, want) in [(Duration::from_secs(60), 1), (Duration::ZERO, 0)] {
        let folder = tempfile::tempdir().unwrap();
        let settings = ConverterSettings {
            log: folder.path().join("log"),
            root: folder.path().join("parquet"),
            days_of: std::sync::Arc::new(|_| None),
            every: Duration::from_secs(3600),
        };
        let (looked, looks) = std::sync::mpsc::sync_channel(8);
        let converter =
            Converter::start(settings.clone(), move || looked.send(()).unwrap()).unwrap();
        looks.recv().unwrap();
        sealed(&settings.log, [(head(0), payload())]);
        converter.finish(time_max).await;
        assert_eq!(Manifest::all(&settings.root).len(), want);
        // Nothing is removed once the log is closed.
        assert!(looks.try_recv().is_err());
    }
}

/// Not a test of right or wrong: how fast it is, for `cargo test --release -- --ignored`.
#[test]
#[ignore = "takes a while, and tells a figure"]
fn how_fast_small_records_become_parquet() {
    let folder = tempfile::tempdir().unwrap();
    let (dir, root) = (folder.path().join("log"), folder.path().join("parquet"));
    let rows = 400_000;
    let id = |number: u64| {
        let at = uuid::Timestamp::from_unix(uuid::NoContext, 1_764_065_472 + number / 1000, 0);
        uuid::Uuid::new_v7(at).as_bytes().to_vec()
    };
    let of = |number: u64| (Head { prediction_id: id(number).into(), ..head(number) }, payload());
    let segment = sealed(&dir, (0..rows).map(of));
    let started = std::time::Instant::now();
    let manifest = convert(&segment, &root, &Job::of(&Selection::default())).unwrap();
    let took = started.elapsed();
    let bytes: u64 = manifest.files.iter().map(|file| file.bytes).sum();
    let rate = rows as f64 / took.as_secs_f64();
    eprintln!("{rate:.0} records/s to Parquet, {} bytes from {}", bytes, manifest.segment.bytes);
    let (started, mut sum) = (std::time::Instant::now(), 0);
    let mut out = Vec::new();
    crate::ledger::export::scan::<ExportError>(&dir, &Selection::default(), |head, view| {
        out.clear();
        crate::ledger::export::line(&mut out, &head.writer.to_string(), view);
        sum += out.len();
        Ok(ControlFlow::Continue(()))
    })
    .unwrap();
    let rate = rows as f64 / started.elapsed().as_secs_f64();
    eprintln!("{rate:.0} lines/s of JSON, {sum} bytes");
}
