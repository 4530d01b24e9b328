use super::*;
use crate::ledger::Settings;
use crate::ledger::prove::{Which, prove};
use crate::ledger::verify::{self, verify};

struct Bench {
    folder: tempfile::TempDir,
    runtime: tokio::runtime::Runtime,
}

impl Bench {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { folder, runtime }
    }

    fn open(&self) -> Arc<Ledger> {
        let mut settings = Settings::new(self.folder.path());
        settings.checkpoint_interval = Duration::from_millis(50);
        settings.segment_bytes = 1 << 16;
        settings.free_bytes_min = 0;
        let ledger = Ledger::open(settings, []).unwrap();
        ledger.start_notary().unwrap();
        ledger
    }

    fn dir(&self) -> PathBuf {
        self.folder.path().join(crate::ledger::FOLDER)
    }

    fn verified(&self, log: &str) -> verify::LogReport {
        let wanted = verify::Wanted { dir: self.dir(), ..verify::Wanted::default() };
        let report = verify(&wanted).unwrap();
        report.logs.into_iter().find(|of| of.log == log).unwrap()
    }

    fn holds(&self, text: &str) -> bool {
        let segments = reader::segments(&self.dir().join(PREDICTIONS)).unwrap();
        segments.iter().any(|segment| {
            let bytes = std::fs::read(&segment.path).unwrap();
            bytes.windows(text.len()).any(|part| part == text.as_bytes())
        })
    }
}

fn add(ledger: &Ledger, id: u128, of: Option<u128>, subject: &[u8], secret: &str) -> u64 {
    let bytes = |id: u128| Uuid::from_u128(id).as_bytes().to_vec();
    let head = Head {
        kind: Kind::Prediction.into(),
        time_ns: 1,
        prediction_id: bytes(id).into(),
        shadow_of: of.map(bytes).unwrap_or_default().into(),
        subject: subject.to_vec().into(),
        ..Head::default()
    };
    let payload = Payload { error: secret.to_owned(), ..Payload::default() };
    let mut draft = crate::ledger::frame::Draft::default();
    crate::ledger::record::other(&mut draft, &head, &payload, &[id.to_le_bytes()[0]; 32]);
    ledger.predictions().append(&draft).unwrap().seq
}

fn eventually(what: impl Fn() -> bool) {
    let until = Instant::now() + Duration::from_secs(30);
    while !what() {
        assert!(Instant::now() < until);
        std::thread::sleep(POLL);
    }
}

fn why() -> Why {
    Why { by: "anna".to_owned(), reason: "asked for".to_owned() }
}

#[test]
fn what_a_prediction_held_goes_from_everywhere_and_its_proof_holds() {
    let bench = Bench::new();
    let ledger = bench.open();
    let copies = Arc::new(parking_lot::Mutex::new(Vec::new()));
    let seen = Arc::clone(&copies);
    ledger.set_erasure_hook(Box::new(move |log, ranges| {
        seen.lock().push((log.to_owned(), ranges.to_vec()));
        Ok(())
    }));
    for id in 1..=5 {
        add(&ledger, id, None, b"", &format!("secret-{id}"));
    }
    add(&ledger, 6, Some(2), b"", "secret-2 in a shadow");
    eventually(|| ledger.predictions().stats().synced_seq == 6);
    let wanted = Wanted { ids: vec![Uuid::from_u128(2)], subject: None };
    let erased = ledger.erase(&wanted, &why()).unwrap();
    assert_eq!((erased.records, erased.key_destroyed), (2, false));
    eventually(|| ledger.erase_recorded().unwrap());
    assert!(!bench.holds("secret-2") && bench.holds("secret-3"));
    assert_eq!(copies.lock()[0], (PREDICTIONS.to_owned(), vec![(1, 2), (5, 6)]));
    assert!(matches!(ledger.erase(&wanted, &why()), Err(EraseError::Nothing { unreadable: 0 })));
    eventually(|| bench.verified(PREDICTIONS).signed == 6);
    bench.runtime.block_on(ledger.close());
    drop(ledger);
    assert_eq!(bench.verified(PREDICTIONS).erased, 2);
    let log = bench.dir().join(PREDICTIONS);
    let keys = crate::ledger::keys::published(&bench.dir()).unwrap();
    for seq in 0..6 {
        let proven = prove(&log, Which::Seq(seq), true).unwrap().check(&keys).unwrap();
        assert_eq!(proven.payload.is_none(), [1, 5].contains(&seq));
    }
    // The record of it says who and why, and cannot be erased itself.
    let orders = orders(&bench.dir(), 0).unwrap();
    assert_eq!((orders.len(), &*orders[0].1.reason), (1, "asked for"));
}

#[test]
fn a_subject_is_erased_with_its_key() {
    let bench = Bench::new();
    let ledger = bench.open();
    let keys = Arc::clone(ledger.subject_keys().unwrap());
    let tag = keys.tag(b"bert");
    let sealed = keys.key_for(&tag).unwrap().seal(b"data").unwrap();
    add(&ledger, 1, None, &tag, "about bert");
    add(&ledger, 2, None, &keys.tag(b"carl"), "about carl");
    eventually(|| ledger.predictions().stats().synced_seq == 2);
    let wanted = Wanted { ids: Vec::new(), subject: Some(tag) };
    let erased = ledger.erase(&wanted, &why()).unwrap();
    assert_eq!((erased.records, erased.key_destroyed), (1, true));
    eventually(|| ledger.erase_recorded().unwrap());
    assert!(!bench.holds("about bert") && bench.holds("about carl"));
    assert!(keys.existing(&tag).unwrap().is_none());
    assert!(keys.key_for(&tag).unwrap().open(&sealed).is_none());
    let nobody = Wanted { ids: Vec::new(), subject: Some(keys.tag(b"nobody")) };
    assert!(matches!(ledger.erase(&nobody, &why()), Err(EraseError::Nothing { unreadable: 0 })));
    bench.runtime.block_on(ledger.close());
}

#[test]
fn what_was_recorded_and_not_done_is_done_after_the_next_start() {
    let bench = Bench::new();
    let ledger = bench.open();
    (1..=4).for_each(|id| drop(add(&ledger, id, None, b"", &format!("secret-{id}")).to_string()));
    // The order is in the log of changes, and the process ends.
    let order = Order {
        log: PREDICTIONS.to_owned(),
        records: vec![(2, 3)],
        reason: "asked for".to_owned(),
        ..Order::default()
    };
    ledger.record(&[order], &why()).unwrap();
    bench.runtime.block_on(ledger.close());
    drop(ledger);
    // Half a copy is left from before.
    let segment = reader::segments(&bench.dir().join(PREDICTIONS)).unwrap().remove(0);
    std::fs::write(segment.path.with_added_extension(TEMPORARY), b"half").unwrap();
    let ledger = bench.open();
    eventually(|| !bench.holds("secret-3"));
    eventually(|| ledger.erase_recorded().unwrap());
    assert_eq!(done_up_to(&bench.dir()).unwrap(), {
        let orders = orders(&bench.dir(), 0).unwrap();
        orders.last().unwrap().0 + 1
    });
    bench.runtime.block_on(ledger.close());
    drop(ledger);
    assert_eq!(bench.verified(PREDICTIONS).erased, 1);
}

/// Changes a sealed segment's bytes.
fn spoil(segment: &SegmentFile, how: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = std::fs::read(&segment.path).unwrap();
    how(&mut bytes);
    std::fs::write(&segment.path, bytes).unwrap();
}

#[test]
fn what_is_damaged_holds_up_nothing_and_stays_as_it_is() {
    let bench = Bench::new();
    let ledger = bench.open();
    let segments = || reader::segments(&bench.dir().join(PREDICTIONS)).unwrap();
    let seal = |records: u64| {
        eventually(|| ledger.predictions().stats().synced_seq == records);
        ledger.predictions().seal();
        eventually(|| {
            segments().iter().all(|segment| segment.sealed || segment.first_seq == records)
        });
    };
    for first in [1, 5, 9, 13] {
        for id in first..first + 4 {
            add(&ledger, id, None, b"", &format!("secret-{id:02}"));
        }
        seal(u64::try_from(first + 3).unwrap());
    }
    let sealed: Vec<SegmentFile> = segments().into_iter().filter(|own| own.sealed).collect();
    assert_eq!(sealed.len(), 4);
    // A flipped byte in the second record; a cut within the last one; a head that is none.
    spoil(&sealed[0], |bytes| {
        let at = bytes.windows(9).position(|part| part == b"secret-02").unwrap();
        bytes[at] ^= 1;
    });
    spoil(&sealed[1], |bytes| bytes.truncate(bytes.len() - 3));
    spoil(&sealed[2], |bytes| bytes[0] ^= 1);
    let wanted = |ids: &[u128]| Wanted {
        ids: ids.iter().map(|id| Uuid::from_u128(*id)).collect(),
        subject: None,
    };
    let erased = ledger.erase(&wanted(&[1, 4, 5, 14]), &why()).unwrap();
    assert_eq!((erased.records, erased.unreadable), (4, 1 + 1 + 4));
    eventually(|| ledger.erase_recorded().unwrap());
    for id in [1, 4, 5, 14] {
        assert!(!bench.holds(&format!("secret-{id:02}")), "{id}");
    }
    for id in [3, 6, 7, 9, 12, 13, 15] {
        assert!(bench.holds(&format!("secret-{id:02}")), "{id}");
    }
    // What is damaged is found to be so afterwards, at the same records.
    let state = |at: usize| {
        let mut reader = SegmentReader::open(&sealed[at])?;
        while reader.next_frame()?.is_some() {}
        Ok::<_, ReadError>(())
    };
    let faults: Vec<String> = (0..3).map(|at| state(at).unwrap_err().to_string()).collect();
    assert!(faults[1].contains("sealed with"), "{faults:?}");
    assert!(state(3).is_ok());
    let missing = frame::mark(&std::fs::read(&sealed[1].path).unwrap()).unwrap()
        - std::fs::metadata(&sealed[1].path).unwrap().len();
    assert_eq!(missing, 3);
    let mut reader = SegmentReader::open(&sealed[0]).unwrap();
    assert_eq!(reader.next_frame().unwrap().unwrap().form, Form::Erased);
    assert!(reader.next_frame().is_err());
    assert_eq!(reader.skip_damage().unwrap(), Some(2));
    let lost = ledger.erase(&wanted(&[2, 10]), &why()).unwrap_err();
    assert!(lost.to_string().ends_with("6 records cannot be read, and may"), "{lost}");
    bench.runtime.block_on(ledger.close());
}

#[test]
fn a_segment_that_ends_between_two_records_lacks_those_that_follow() {
    let bench = Bench::new();
    let ledger = bench.open();
    for id in 1..=3 {
        add(&ledger, id, None, b"", "secret");
    }
    eventually(|| ledger.predictions().stats().synced_seq == 3);
    ledger.predictions().seal();
    let log = bench.dir().join(PREDICTIONS);
    let segments = || reader::segments(&log).unwrap();
    eventually(|| segments().len() == 2 && segments()[0].sealed);
    let first = segments().remove(0);
    let mut reader = SegmentReader::open(&first).unwrap();
    reader.next_frame().unwrap();
    let end = usize::try_from(reader.offset()).unwrap();
    // As one of more than 4 GiB, it does not say how long it was.
    spoil(&first, |bytes| {
        bytes.truncate(end);
        bytes[MARK].fill(0);
    });
    let wanted = Wanted { ids: vec![Uuid::from_u128(1)], subject: None };
    let (found, unreadable) = find(&log, &wanted).unwrap();
    assert_eq!((found.len(), unreadable), (1, 2));
    bench.runtime.block_on(ledger.close());
}

#[test]
fn ranges_are_merged_and_found() {
    let ranges = merged(vec![(5, 6), (1, 3), (3, 4), (9, 9), (2, 3)]);
    assert_eq!(ranges, [(1, 4), (5, 6)]);
    let inside: Vec<u64> = (0..8).filter(|seq| within(&ranges, *seq)).collect();
    assert_eq!(inside, [1, 2, 3, 5]);
}
