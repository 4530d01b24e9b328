#![expect(clippy::cast_possible_truncation, reason = "offsets and numbers of small logs")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tempfile::TempDir;

use super::record::{Head, Kind, Record};
use super::*;
use crate::ledger::frame::Form;
use crate::ledger::reader::{SegmentReader, segment_path, segments};

mod faults;
mod kills;
mod power;
mod recovery;
mod simulated;

const WRITER: WriterId = WriterId([7; 8]);

fn settings(dir: &Path) -> LogSettings {
    LogSettings {
        dir: dir.join("predictions"),
        name: "predictions",
        segment_bytes: 1 << 20,
        segment_age_max: Duration::from_secs(3600),
        flush_interval: Duration::from_millis(20),
        queue_bytes_max: 16 << 20,
        free_bytes_min: 0,
    }
}

fn open(settings: &LogSettings) -> (Log, Recovery) {
    let until = Instant::now() + Duration::from_secs(5);
    loop {
        match Log::open(settings.clone(), WRITER) {
            // A process that another test of this one has just started has the lock until it is
            // the program that it is to be.
            Err(OpenError::Locked { .. }) if Instant::now() < until => std::thread::yield_now(),
            opened => return opened.unwrap(),
        }
    }
}

/// A record with this text, of about as many bytes as asked for.
fn draft(text: &str, bytes: usize) -> Draft {
    let mut draft = Draft::default();
    draft.start();
    draft.buffer().extend_from_slice(text.as_bytes());
    draft.body(Form::Whole, &[1; 32]);
    let fill = bytes.saturating_sub(draft.len());
    draft.buffer().extend((0..fill).map(|at| (at % 251) as u8 + 1));
    draft.finish();
    draft
}

/// Texts of all records in order, whose numbers must be gapless. A segment that begins before the
/// end of the one before is read from there on.
fn texts(settings: &LogSettings) -> Vec<String> {
    let mut texts = Vec::new();
    for segment in segments(&settings.dir).unwrap() {
        let mut reader = SegmentReader::open(&segment).unwrap();
        while let Some(frame) = reader.next_frame().unwrap() {
            if (frame.seq as usize) < texts.len() {
                continue;
            }
            assert_eq!(frame.seq as usize, texts.len(), "{}", segment.path.display());
            texts.push(String::from_utf8_lossy(frame.head).into_owned());
        }
    }
    texts
}

fn records(settings: &LogSettings) -> Vec<Record> {
    let mut records = Vec::new();
    for segment in segments(&settings.dir).unwrap() {
        let mut reader = SegmentReader::open(&segment).unwrap();
        while let Some(frame) = reader.next_frame().unwrap() {
            records.extend(Record::read(&frame).ok());
        }
    }
    records
}

/// Waits for something that another thread does.
fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let until = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

async fn put(log: &Log, text: &str) -> Result<Appended, Unrecorded> {
    let at = log.append(&draft(text, 200))?;
    log.written(at).await?;
    Ok(at)
}

#[tokio::test]
async fn what_is_written_is_read_before_and_after_the_end() {
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let (log, recovery) = open(&settings);
    assert_eq!(recovery, Recovery::default());
    for at in 0..10 {
        assert_eq!(put(&log, &format!("r{at}")).await.unwrap().seq, at);
        assert_eq!(texts(&settings).len() as u64, at + 1);
    }
    let stats = log.stats();
    assert_eq!((stats.records, stats.written_seq, stats.queued_bytes), (10, 10, 0));
    log.close().await;
    log.close().await;
    assert!(log.append(&draft("late", 0)).is_err());
    drop(log);
    let found = segments(&settings.dir).unwrap();
    assert_eq!(found.len(), 1);
    assert!(found[0].sealed);
    let (log, recovery) = open(&settings);
    assert_eq!(recovery, Recovery { next_seq: 10, ..Recovery::default() });
    put(&log, "r10").await.unwrap();
    log.close().await;
    let expected: Vec<String> = (0..11).map(|at| format!("r{at}")).collect();
    assert_eq!(texts(&settings), expected);
}

#[tokio::test]
async fn a_log_that_nobody_wrote_to_leaves_nothing() {
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    for _ in 0..2 {
        let (log, _) = open(&settings);
        log.close().await;
    }
    drop(open(&settings));
    let (log, recovery) = open(&settings);
    assert_eq!(recovery, Recovery::default());
    log.close().await;
    assert_eq!(segments(&settings.dir).unwrap(), []);
    assert_eq!(std::fs::read_dir(settings.dir.join(reader::SEGMENTS)).unwrap().count(), 0);
}

#[tokio::test]
async fn a_record_gets_onto_the_disk_by_itself() {
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let (log, _) = open(&settings);
    // Without anybody who asks for its being written.
    log.append(&draft("alone", 0)).unwrap();
    eventually("it is synced", || log.stats().synced_seq == 1);
    assert_eq!(log.stats().lag, Duration::ZERO);
    assert_eq!(texts(&settings), ["alone"]);
    let at = log.append(&draft("asked", 0)).unwrap();
    log.synced(at).await.unwrap();
    assert_eq!(log.stats().synced_seq, 2);
    assert_eq!(log.stats().commit_buckets.iter().sum::<u64>(), log.stats().fsyncs);
}

/// Threads that all append and wait: no gap, and what was waited for is there to be read.
#[test]
fn many_threads_leave_no_gap() {
    const THREADS: usize = 8;
    const EACH: usize = 400;
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let (log, _) = open(&settings);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (log, settings) = (&log, &settings);
            scope.spawn(move || {
                block_on(async {
                    for at in 0..EACH {
                        let done = log.append(&draft(&format!("{thread}-{at}"), 700)).unwrap();
                        match at % 5 {
                            0 if thread % 2 == 0 => log.synced(done).await.unwrap(),
                            _ => log.written(done).await.unwrap(),
                        }
                        if at % 97 == 0 {
                            let texts = texts(settings);
                            assert_eq!(texts[done.seq as usize], format!("{thread}-{at}"));
                        }
                    }
                });
            });
        }
    });
    block_on(log.close());
    let mut found = texts(&settings);
    assert!(segments(&settings.dir).unwrap().len() > 1, "the log changed its segment");
    // Each thread's own are in its order.
    for thread in 0..THREADS {
        let own = found.iter().filter(|text| text.starts_with(&format!("{thread}-")));
        let expected: Vec<String> = (0..EACH).map(|at| format!("{thread}-{at}")).collect();
        assert_eq!(own.cloned().collect::<Vec<_>>(), expected);
    }
    found.sort();
    found.dedup();
    assert_eq!(found.len(), THREADS * EACH);
}

#[tokio::test]
async fn segments_change_at_their_size_and_age() {
    let dir = TempDir::new().unwrap();
    let mut settings = settings(dir.path());
    settings.segment_bytes = 4096;
    let (log, _) = open(&settings);
    for at in 0..100 {
        put(&log, &format!("r{at}")).await.unwrap();
        if at % 20 == 0 {
            let sealed = log.stats().segments_sealed;
            let at = log.append(&draft("synced", 0)).unwrap();
            log.synced(at).await.unwrap();
            if at.seq > 0 {
                eventually("a segment is sealed", || {
                    log.append(&draft("more", 0)).unwrap();
                    log.stats().segments_sealed > sealed
                });
            }
        }
    }
    log.close().await;
    drop(log);
    let texts = texts(&settings);
    assert_eq!(texts.iter().filter(|text| text.starts_with('r')).count(), 100);
    settings.segment_bytes = 1 << 20;
    settings.segment_age_max = Duration::from_millis(50);
    let (log, _) = open(&settings);
    put(&log, "old").await.unwrap();
    eventually("a segment is sealed for its age", || log.stats().segments_sealed == 1);
    // A segment without a record gets as old as it likes.
    tokio::time::sleep(Duration::from_millis(1500)).await;
    assert_eq!(log.stats().segments_sealed, 1);
}

#[test]
fn records_have_a_largest_size() {
    let dir = TempDir::new().unwrap();
    let settings = LogSettings { queue_bytes_max: 100_000, ..settings(dir.path()) };
    let (log, _) = open(&settings);
    let too_large = log.append(&draft("x", FRAME_BYTES_MAX + 1));
    assert!(matches!(too_large, Err(Unrecorded::TooLarge { .. })), "{too_large:?}");
    // Larger than the queue, but nothing waits.
    let at = log.append(&draft("x", 1 << 20)).unwrap();
    block_on(log.written(at)).unwrap();
    for round in 0.. {
        assert!(round < 10_000_000);
        match log.append(&draft("y", 30_000)) {
            Ok(_) => {}
            Err(error) => {
                assert_eq!(error, Unrecorded::Full);
                break;
            }
        }
    }
    eventually("there is room again", || log.append(&draft("z", 0)).is_ok());
}

#[tokio::test]
async fn what_was_missed_is_recorded() {
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let (log, _) = open(&settings);
    let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
    for seconds in [20, 10, 30] {
        log.missed(at(seconds));
    }
    assert_eq!(log.stats().dropped, 3);
    log.close().await;
    let records = records(&settings);
    let gaps: Vec<&Head> = records.iter().map(|record| &record.head).collect();
    assert_eq!(gaps.iter().map(|gap| gap.count).sum::<u64>(), 3);
    assert!(gaps.iter().all(|gap| gap.kind() == Kind::Gap));
    assert_eq!(gaps.iter().map(|gap| gap.time_ns).min(), Some(10_000_000_000));
    assert_eq!(gaps.iter().map(|gap| gap.until_ns).max(), Some(30_000_000_000));
}

/// Prints how fast it is here; the figures that count are those of `benches/ledger.rs`.
#[test]
fn one_thread_writes_fast() {
    let dir = TempDir::new().unwrap();
    let settings = LogSettings { segment_bytes: 64 << 20, ..settings(dir.path()) };
    let (log, _) = open(&settings);
    let draft = draft("fast", 500);
    let began = Instant::now();
    block_on(async {
        for _ in 0..50_000 {
            let at = log.append(&draft).unwrap();
            log.written(at).await.unwrap();
        }
    });
    let rate = 50_000.0 / began.elapsed().as_secs_f64();
    tracing::info!(rate, "records a second");
    eprintln!("{rate:.0} records a second");
    assert_eq!(log.stats().written_seq, 50_000);
}
