use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::*;
use crate::ledger::export::Selection;
use crate::ledger::export::tests::{append, head, log, payload};
use crate::ledger::parquet::{Job, convert};

const DAY: u64 = 86_400;
/// When the first record of [`head`] came, in seconds.
const BEGAN: u64 = 1_764_065_472;

struct Bench {
    _folder: tempfile::TempDir,
    retention: Retention,
    records: Arc<Mutex<Vec<(Head, Payload)>>>,
    delivered: Arc<AtomicU64>,
}

/// A log of two sealed segments, a day apart, of two models each, and an open one.
fn bench(days_of: impl Fn(&str) -> Option<u32> + Send + Sync + 'static) -> Bench {
    let folder = tempfile::tempdir().unwrap();
    let (dir, root) = (folder.path().join("predictions"), folder.path().join("parquet"));
    for day in 0..3_u64 {
        let log = log(&dir);
        for (at, model) in ["iris", "digits"].into_iter().enumerate() {
            let head = Head { model: model.into(), ..head(day * DAY * 1000 + at as u64) };
            append(&log, &head, &payload());
        }
    }
    let segments = reader::segments(&dir).unwrap();
    assert_eq!(segments.iter().filter(|segment| segment.sealed).count(), 2);
    for segment in segments.iter().filter(|segment| segment.sealed) {
        convert(segment, &root, &Job::of(&Selection::default())).unwrap();
    }
    let (records, delivered) =
        (Arc::<Mutex<Vec<_>>>::default(), Arc::new(AtomicU64::new(u64::MAX)));
    let (noted, so_far) = (Arc::clone(&records), Arc::clone(&delivered));
    let retention = Retention {
        log: dir,
        name: "predictions",
        parquet: root,
        days: 10,
        days_of: Arc::new(days_of),
        delivered: Arc::new(move || so_far.load(Ordering::Relaxed)),
        holds: Arc::new(Holds::open(folder.path()).unwrap()),
        announce: Box::new(move |head, payload| {
            noted.lock().push((head.clone(), payload.clone()));
            true
        }),
    };
    Bench { _folder: folder, retention, records, delivered }
}

impl Bench {
    /// So many days after the first record.
    fn step(&mut self, days: u64) -> Removed {
        let now = UNIX_EPOCH + Duration::from_secs(BEGAN + days * DAY + 60);
        self.retention.step(now).unwrap()
    }

    fn first_seqs(&self) -> Vec<u64> {
        reader::segments(&self.retention.log).unwrap().iter().map(|it| it.first_seq).collect()
    }

    fn hold(&self, model: Option<&str>, since_ns: Option<i64>, until_ns: Option<i64>) {
        let hold = Hold {
            name: "case-1".into(),
            model: model.map(Into::into),
            since_ns,
            until_ns,
            reason: "court".into(),
            by: "counsel".into(),
            put_ns: 1,
        };
        self.retention.holds.put(hold).unwrap();
    }
}

#[test]
fn a_segment_goes_when_its_time_has_come_and_that_is_recorded() {
    let mut bench = bench(|_| None);
    assert_eq!(bench.step(9), Removed::default());
    assert!(bench.records.lock().is_empty());
    assert_eq!(bench.step(10), Removed { segments: 1, records: 2, ..Removed::default() });
    assert_eq!(bench.first_seqs(), [2, 4]);
    let (head, payload) = bench.records.lock()[0].clone();
    assert_eq!((head.kind(), &*head.action, head.count), (Kind::Retention, REMOVE, 2));
    let body: serde_json::Value = serde_json::from_slice(&payload.body).unwrap();
    assert_eq!((&body["log"], &body["removed_below"]), (&json!("predictions"), &json!(2)));
    assert_eq!(body["models"], json!(["digits", "iris"]));
    let left = Manifest::all(&bench.retention.parquet);
    assert_eq!(left.len(), 1);
    assert!(!bench.retention.parquet.join("model=iris/date=2025-11-25").exists());
    assert!(bench.retention.parquet.join(&left[0].files[0].file).exists());
    // The open segment never goes.
    assert_eq!(bench.step(1000).segments, 1);
    assert_eq!(bench.first_seqs(), [4]);
}

#[test]
fn holds_win_and_so_do_sinks_and_models_that_keep_longer() {
    let mut held = bench(|_| None);
    held.hold(Some("iris"), None, Some(i64::MAX));
    // The other model's Parquet goes, the segment stays.
    assert_eq!(held.step(1000), Removed { files: 2, erased: 2, ..Removed::default() });
    held.retention.holds.lift("case-1").unwrap();
    assert_eq!(held.step(1000).segments, 2);

    let mut elsewhere = bench(|_| None);
    elsewhere.hold(None, None, Some(1));
    assert_eq!(elsewhere.step(1000).segments, 2);

    let mut waiting = bench(|_| None);
    waiting.delivered.store(3, Ordering::Relaxed);
    assert_eq!(waiting.step(1000).segments, 1);

    let mut longer = bench(|model| (model == "iris").then_some(100));
    assert_eq!(longer.step(50), Removed { files: 2, erased: 2, ..Removed::default() });
    assert_eq!(longer.step(102).segments, 2);

    let mut for_ever = bench(|_| Some(0));
    assert_eq!(for_ever.step(10_000), Removed::default());
}

/// What the records of erasures name.
fn ordered(bench: &Bench) -> Vec<serde_json::Value> {
    let records = bench.records.lock();
    let orders = records.iter().filter(|(head, _)| head.action == early::ERASE);
    orders.map(|(_, payload)| serde_json::from_slice(&payload.body).unwrap()).collect()
}

#[test]
fn payloads_go_a_day_after_their_time_where_others_keep_longer() {
    let mut bench = bench(|model| (model == "iris").then_some(100));
    // The Parquet of the other model goes on its day.
    assert_eq!(bench.step(10), Removed { files: 1, ..Removed::default() });
    let parquet = bench.retention.parquet.clone();
    assert!(!parquet.join("model=digits/date=2025-11-25").exists());
    // The sinks have not got it: it stays.
    bench.delivered.store(1, Ordering::Relaxed);
    assert_eq!(bench.step(11), Removed::default());
    bench.delivered.store(u64::MAX, Ordering::Relaxed);
    assert_eq!(bench.step(11), Removed { files: 1, erased: 1, ..Removed::default() });
    let want = json!({"log": "predictions", "records": [[1, 2]], "reason": "retention"});
    assert_eq!(ordered(&bench), [want]);
    // As whoever carries out orders does.
    let segment = reader::segments(&bench.retention.log).unwrap().remove(0);
    assert!(crate::ledger::erase::rewrite(&segment, &[(1, 2)]).unwrap());
    let manifest = convert(&segment, &parquet, &Job::of(&Selection::default())).unwrap();
    let of = |model: &str| manifest.files.iter().find(|file| file.model == model).unwrap();
    assert!(of("digits").removed && of("digits").erased && !of("iris").removed);
    assert!(!parquet.join("model=digits/date=2025-11-25").exists());
    assert!(parquet.join(&of("iris").file).exists());
    // Once: the next day it is the next segment's turn.
    assert_eq!(bench.step(11), Removed::default());
    assert_eq!(bench.step(12), Removed { erased: 1, ..Removed::default() });
    assert_eq!(ordered(&bench)[1]["records"], json!([[3, 4]]));
    assert_eq!(bench.step(50), Removed::default());
}

#[test]
fn a_hold_keeps_payloads_and_what_is_not_recorded_stays() {
    let mut bench = bench(|model| (model == "iris").then_some(100));
    bench.hold(Some("digits"), None, None);
    assert_eq!(bench.step(50), Removed::default());
    bench.retention.holds.lift("case-1").unwrap();
    let announce = std::mem::replace(&mut bench.retention.announce, Box::new(|_, _| false));
    assert_eq!(bench.step(50), Removed { files: 2, ..Removed::default() });
    bench.retention.announce = announce;
    assert_eq!(bench.step(50), Removed { erased: 2, ..Removed::default() });
    assert_eq!(ordered(&bench)[0]["records"], json!([[1, 2], [3, 4]]));
}

#[test]
fn a_segment_that_cannot_be_read_keeps_no_other_waiting() {
    let mut bench = bench(|model| (model == "iris").then_some(100));
    let segment = reader::segments(&bench.retention.log).unwrap().remove(0);
    let modified = std::fs::metadata(&segment.path).unwrap().modified().unwrap();
    let mut bytes = std::fs::read(&segment.path).unwrap();
    let at = bytes.len() - 20;
    bytes[at] ^= 1;
    std::fs::write(&segment.path, bytes).unwrap();
    // A disk that forgets changes no time.
    File::options().write(true).open(&segment.path).unwrap().set_modified(modified).unwrap();
    assert_eq!(bench.step(50), Removed { files: 2, erased: 1, ..Removed::default() });
    assert_eq!(ordered(&bench)[0]["records"], json!([[3, 4]]));
}

#[test]
fn a_segment_of_which_nothing_can_be_told_goes_with_the_next() {
    let mut bench = bench(|_| None);
    let segment = reader::segments(&bench.retention.log).unwrap().remove(0);
    let mut bytes = std::fs::read(&segment.path).unwrap();
    bytes[0] ^= 1;
    std::fs::write(&segment.path, bytes).unwrap();
    let root = &bench.retention.parquet;
    std::fs::remove_dir_all(root).unwrap();
    for segment in reader::segments(&bench.retention.log).unwrap() {
        if segment.sealed {
            convert(&segment, root, &Job::of(&Selection::default())).unwrap();
        }
    }
    let lost = Manifest::all(root).remove(0);
    assert_eq!((lost.files.len(), lost.segment.last_seq), (0, Some(1)), "{lost:?}");
    assert_eq!((lost.unreadable[0].first_seq, lost.unreadable[0].last_seq), (0, 1));
    // The second one's time comes a day after the first one's would have.
    assert_eq!((bench.step(10).segments, bench.first_seqs()), (0, vec![0, 2, 4]));
    assert_eq!((bench.step(11).segments, bench.first_seqs()), (2, vec![4]));
}

#[test]
fn nothing_goes_that_cannot_be_recorded() {
    let mut bench = bench(|_| None);
    bench.retention.announce = Box::new(|_, _| false);
    assert_eq!(bench.step(1000).segments, 0);
    assert_eq!(bench.first_seqs(), [0, 2, 4]);
}

#[test]
fn what_a_crash_left_goes_at_the_next_look() {
    let mut bench = bench(|_| None);
    let first = reader::segments(&bench.retention.log).unwrap().remove(0);
    std::fs::remove_file(first.path).unwrap();
    bench.step(0);
    let left: Vec<u64> =
        Manifest::all(&bench.retention.parquet).iter().map(|it| it.segment.first_seq).collect();
    assert_eq!(left, [2]);
    assert!(!bench.retention.parquet.join("model=iris/date=2025-11-25").exists());
}

#[test]
fn holds_are_kept_and_wrong_ones_refused() {
    let folder = tempfile::tempdir().unwrap();
    let holds = Holds::open(folder.path()).unwrap();
    let hold = |name: &str| Hold {
        name: name.into(),
        model: None,
        since_ns: None,
        until_ns: None,
        reason: String::new(),
        by: String::new(),
        put_ns: 0,
    };
    holds.put(hold("a")).unwrap();
    holds.put(hold("a")).unwrap();
    let other = Hold { model: Some("iris".into()), ..hold("a") };
    assert!(matches!(holds.put(other), Err(HoldError::Exists(_))));
    assert!(matches!(holds.put(hold("../a")), Err(HoldError::Name)));
    let backwards = Hold { since_ns: Some(2), until_ns: Some(1), ..hold("b") };
    assert!(matches!(holds.put(backwards), Err(HoldError::Time)));
    assert_eq!(Holds::open(folder.path()).unwrap().all(), [hold("a")]);
    assert!(matches!(holds.lift("b"), Err(HoldError::Unknown(_))));
    holds.lift("a").unwrap();
    assert!(Holds::open(folder.path()).unwrap().all().is_empty());
    std::fs::write(folder.path().join("holds.json"), "{").unwrap();
    assert!(Holds::open(folder.path()).is_err());
}
