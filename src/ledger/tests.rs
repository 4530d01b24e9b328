use std::path::Path;
use std::time::{Duration, UNIX_EPOCH};

use uuid::Uuid;

use super::*;
use crate::domain::{Outcome, Protocol, Timings};
use reader::SegmentReader;
use record::Record;

fn settings(dir: &Path) -> Settings {
    Settings { free_bytes_min: 0, ..Settings::new(dir) }
}

fn open(dir: &Path) -> Arc<Ledger> {
    Ledger::open(settings(dir), [("tract", "0.23".to_owned())]).unwrap()
}

pub(super) fn completion(id: u128, request_id: &str) -> Completion {
    Completion {
        prediction_id: Uuid::from_u128(id),
        request_id: request_id.to_owned(),
        received_at: UNIX_EPOCH + Duration::from_secs(1_700_000_000),
        model: "iris".parse().unwrap(),
        version: None,
        digest: None,
        arm: None,
        reason: None,
        protocol: Protocol::Http,
        principal: None,
        trace: None,
        outcome: Outcome::Ok,
        timings: Timings::default(),
        rows: 1,
        batch_size: 0,
        cached: false,
        shadow_of: None,
        inputs: Vec::new(),
        outputs: Vec::new(),
    }
}

const ABOUT: About<'_> =
    About { signature: None, engine: "tract", recording: None, config_revision: 3, subject: None };

fn records(dir: &Path, log: &str) -> Vec<Record> {
    let mut found = Vec::new();
    for segment in reader::segments(&dir.join(FOLDER).join(log)).unwrap() {
        let mut reader = SegmentReader::open(&segment).unwrap();
        while let Some(frame) = reader.next_frame().unwrap() {
            found.push(Record::read(&frame).unwrap());
        }
    }
    found
}

#[tokio::test]
async fn a_ledger_keeps_its_writer_and_its_numbers() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let writer = ledger.writer();
    let at = ledger.append(&completion(1, "a"), &ABOUT).unwrap().unwrap();
    ledger.settled(at, Durability::Sync).await.unwrap();
    ledger.close().await;
    drop(ledger);
    let ledger = open(dir.path());
    assert_eq!(ledger.writer(), writer);
    let next = ledger.append(&completion(2, "b"), &ABOUT).unwrap().unwrap();
    ledger.settled(next, Durability::Buffered).await.unwrap();
    ledger.close().await;
    let found: Vec<Record> = records(dir.path(), PREDICTIONS)
        .into_iter()
        .filter(|record| record.head.kind() == record::Kind::Prediction)
        .collect();
    let ids: Vec<_> =
        found.iter().map(|record| record.prediction_id().unwrap().as_u128()).collect();
    assert_eq!(ids, [1, 2]);
    assert_eq!((found[0].seq, found[1].seq), (at.seq, next.seq));
    assert_eq!((&*found[0].head.engine, found[0].head.config_revision), ("tract 0.23", 3));
    assert!(found[0].head.capture.starts_with("full-"));
}

#[tokio::test]
async fn what_is_off_has_no_record() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let recording = Recording { durability: Durability::Off, ..Recording::default() };
    let about = About { recording: Some(&recording), ..ABOUT };
    assert_eq!(ledger.append(&completion(1, ""), &about), Ok(None));
    assert_eq!(ledger.check(&recording), Ok(()));
}

#[test]
fn a_text_of_any_length_is_recorded_up_to_a_limit() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = open(dir.path());
    let long = "ü".repeat(record::TEXT_BYTES_MAX);
    ledger.append(&completion(1, &long), &ABOUT).unwrap().unwrap();
    let at = futures_util::FutureExt::now_or_never(async {
        ledger.close().await;
    });
    if at.is_some() {
        let found = records(dir.path(), PREDICTIONS);
        let payload = found[0].payload.as_ref().unwrap();
        assert_eq!(payload.request_id.len(), record::TEXT_BYTES_MAX);
    }
}
