use std::sync::atomic::Ordering;

use super::*;
use crate::ledger::checkpoint::Notes;
use crate::ledger::testlog::{TestLog, WRITER};
use crate::ledger::tree::{TreeReader, consistency, extends, level_path, root};

fn settings(ledger: &Path) -> Settings {
    Settings {
        ledger: ledger.to_owned(),
        writer: WRITER,
        interval: Duration::ZERO,
        witnesses: Vec::new(),
    }
}

fn follow(log: &TestLog) -> Followed {
    let next = Arc::clone(&log.next);
    let durable = Box::new(move || Some(next.load(Ordering::SeqCst)));
    Followed { name: log.name, dir: log.dir.clone(), durable }
}

fn start(ledger: &Path, log: &TestLog) -> Notary {
    Notary::start(settings(ledger), vec![follow(log)], Box::new(|_, _| true)).unwrap()
}

/// Starts, signs what is there, and ends.
fn once(ledger: &Path, log: &TestLog) -> Standing {
    let notary = start(ledger, log);
    let shared = Arc::clone(&notary.shared);
    drop(notary);
    let stats = shared.stats.lock();
    stats.0[0].clone()
}

fn last(log: &TestLog) -> Note {
    Stored::read(&log.dir).unwrap().last.unwrap()
}

fn notes(file: &Path) -> Vec<(u64, Note)> {
    let bytes = std::fs::read(file).unwrap();
    let mut notes = Notes::new(&bytes[..], 0);
    std::iter::from_fn(|| notes.next_note().unwrap()).collect()
}

fn fill(log: &mut TestLog, records: usize) {
    (0..records).for_each(|at| {
        log.add(&format!("record {at}"));
    });
}

#[test]
fn a_log_is_signed_as_it_grows_and_each_time_goes_on_from_the_last() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = TestLog::new(folder.path(), "predictions");
    assert_eq!(once(folder.path(), &log).checkpoints, 0);
    let mut before: Option<State> = None;
    for records in [1, 300, 5, 0] {
        fill(&mut log, records);
        if records != 5 {
            log.seal();
        }
        let stats = once(folder.path(), &log);
        assert_eq!(stats.refused, None);
        let now = last(&log).checkpoint.tree;
        let reader = TreeReader::new(&log.dir);
        assert_eq!(now.size, log.next.load(Ordering::SeqCst));
        assert_eq!(root(&reader, now.size).unwrap(), now.root);
        if let Some(before) = before {
            let path = consistency(&reader, before.size, now.size).unwrap();
            assert!(extends(&before, &now, &path));
        }
        before = Some(now);
    }
    let keys = keys::published(folder.path()).unwrap();
    let all = notes(&log.dir.join(ALL));
    assert_eq!(all.len(), 3);
    all.iter().for_each(|(_, note)| drop(note.verify(&keys).unwrap()));
}

#[test]
fn a_running_log_gets_checkpoints_at_seals_and_a_new_key() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = TestLog::new(folder.path(), "predictions");
    let seen = folder.path().join("seen");
    let witness =
        witness::Settings { name: "w".into(), target: witness::Target::File(seen.clone()) };
    let settings = Settings {
        interval: Duration::from_secs(3600),
        witnesses: vec![witness],
        ..settings(folder.path())
    };
    let notary = Notary::start(settings, vec![follow(&log)], Box::new(|_, _| true)).unwrap();
    let wait = |what: &dyn Fn() -> bool| {
        let until = Instant::now() + Duration::from_secs(20);
        while !what() && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        assert!(what());
    };
    fill(&mut log, 10);
    wait(&|| notary.stats().0.first().is_some_and(|log| log.tree == 10));
    assert_eq!(notary.stats().0[0].checkpoints, 0);
    log.seal();
    fill(&mut log, 1);
    wait(&|| notary.stats().0[0].signed == 10);
    let public = notary.rotate().unwrap();
    wait(&|| !folder.path().join("keys/0001.key").exists());
    let note = last(&log);
    assert_eq!(note.signatures.len(), 2);
    assert_eq!(note.checkpoint.next_key().unwrap().to_string(), public[0]);
    fill(&mut log, 1);
    drop(notary);
    let by_new = last(&log);
    assert_eq!((by_new.checkpoint.tree.size, by_new.signatures.len()), (12, 1));
    let all = std::fs::read(log.dir.join(ALL)).unwrap();
    assert_eq!(std::fs::read(seen).unwrap(), all);
}

#[test]
fn a_shorter_or_another_log_is_not_signed() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = TestLog::new(folder.path(), "predictions");
    fill(&mut log, 20);
    log.seal();
    assert_eq!(once(folder.path(), &log).signed, 20);
    let signed = last(&log);
    log.next.store(19, Ordering::SeqCst);
    let stats = once(folder.path(), &log);
    assert!(stats.refused.unwrap().contains("19 records"));
    // Another beginning, of the same length.
    std::fs::remove_dir_all(&log.dir).unwrap();
    let mut other = TestLog::new(folder.path(), "predictions");
    other.add("another");
    fill(&mut other, 30);
    other.seal();
    let text = signed.to_string();
    std::fs::write(other.dir.join(LAST), &text).unwrap();
    std::fs::write(other.dir.join(ALL), format!("{text}\n")).unwrap();
    let stats = once(folder.path(), &other);
    assert!(stats.refused.unwrap().contains("not those that were signed"));
    assert_eq!(last(&other), signed);
}

#[test]
fn a_tree_that_is_gone_is_made_anew() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = TestLog::new(folder.path(), "predictions");
    fill(&mut log, 300);
    log.seal();
    fill(&mut log, 300);
    let want = once(folder.path(), &log).signed;
    let whole = std::fs::read(level_path(&log.dir, 0)).unwrap();
    let first = crate::ledger::reader::segment_path(&log.dir, 0, true);
    for what in ["level", "short", "bent", "segment"] {
        match what {
            "level" => std::fs::remove_file(level_path(&log.dir, 1)).unwrap(),
            "short" => std::fs::write(level_path(&log.dir, 0), &whole[..9000]).unwrap(),
            // The last hashes are part of every root.
            "bent" => {
                let mut bent = whole.clone();
                *bent.last_mut().unwrap() ^= 1;
                std::fs::write(level_path(&log.dir, 0), bent).unwrap();
            }
            // As retention leaves it: the leaves of the first segment are in the tree alone.
            _ => {
                std::fs::remove_file(&first).unwrap();
                std::fs::remove_file(level_path(&log.dir, 1)).unwrap();
            }
        }
        let stats = once(folder.path(), &log);
        assert_eq!((stats.refused, stats.tree, stats.signed), (None, want, want), "{what}");
        assert_eq!(std::fs::read(level_path(&log.dir, 0)).unwrap(), whole, "{what}");
        assert_eq!(std::fs::metadata(level_path(&log.dir, 1)).unwrap().len(), 64);
    }
}

#[test]
fn an_end_in_the_middle_of_signing_is_made_up_for() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = TestLog::new(folder.path(), "predictions");
    fill(&mut log, 5);
    once(folder.path(), &log);
    fill(&mut log, 5);
    once(folder.path(), &log);
    let all = std::fs::read(log.dir.join(ALL)).unwrap();
    let first = notes(&log.dir.join(ALL))[1].0;
    for cut in (usize::try_from(first).unwrap()..=all.len()).step_by(5) {
        std::fs::write(log.dir.join(ALL), &all[..cut]).unwrap();
        assert_eq!(once(folder.path(), &log).refused, None);
        assert_eq!(std::fs::read(log.dir.join(ALL)).unwrap(), all);
    }
}

#[test]
fn a_key_is_announced_until_that_is_kept() {
    let folder = tempfile::tempdir().unwrap();
    let log = TestLog::new(folder.path(), "admin");
    let tries = Arc::new(std::sync::atomic::AtomicU32::new(0));
    let of_thread = Arc::clone(&tries);
    let announce = move |serial, keys: &[String]| {
        assert_eq!((serial, keys.len()), (1, 3));
        of_thread.fetch_add(1, Ordering::SeqCst) > 0
    };
    let notary = Notary::start(settings(folder.path()), vec![follow(&log)], Box::new(announce));
    let until = Instant::now() + Duration::from_secs(20);
    while tries.load(Ordering::SeqCst) < 2 && Instant::now() < until {
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(notary);
    assert_eq!(tries.load(Ordering::SeqCst), 2);
}
