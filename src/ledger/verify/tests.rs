use std::cell::Cell;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::*;
use crate::ledger::frame::{Draft, MARK, Parsed, SEGMENT_HEAD_BYTES, parse};
use crate::ledger::notary::{Followed, Notary, Settings};
use crate::ledger::reader::segment_path;
use crate::ledger::record::{Head, Kind, Payload};
use crate::ledger::testlog::{TestLog, WRITER};
use crate::ledger::tree::TreeFiles;

/// A small ledger: predictions in three segments, one of them erased, signed as it grew, with a key
/// that was replaced on the way.
struct World {
    folder: tempfile::TempDir,
    predictions: TestLog,
    admin: TestLog,
    tampers: Cell<u64>,
}

fn sign(ledger: &Path, logs: &[&TestLog], rotate: bool) {
    let follow = |log: &&TestLog| {
        let next = Arc::clone(&log.next);
        let durable = Box::new(move || Some(next.load(Ordering::SeqCst)));
        Followed { name: log.name, dir: log.dir.clone(), durable }
    };
    let settings = Settings {
        ledger: ledger.to_owned(),
        writer: WRITER,
        interval: Duration::ZERO,
        witnesses: Vec::new(),
    };
    let logs = logs.iter().map(follow).collect();
    let notary = Notary::start(settings, logs, Box::new(|_, _| true)).unwrap();
    if rotate {
        notary.rotate().unwrap();
    }
}

impl World {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let predictions = TestLog::new(folder.path(), PREDICTIONS);
        let admin = TestLog::new(folder.path(), ADMIN);
        let mut world = Self { folder, predictions, admin, tampers: Cell::new(0) };
        let order = |body: &str| {
            let head = Head { kind: Kind::Erasure.into(), ..Head::default() };
            (head, Payload { body: body.to_owned().into(), ..Payload::default() })
        };
        for round in 0..3 {
            for _ in 0..3 {
                world.predictions.add("somebody's");
            }
            world.predictions.seal();
            let (head, payload) = order(r#"{"log":"predictions","records":[[1,2]]}"#);
            world.admin.put(&head, &payload);
            world.sign(round == 1);
        }
        world.admin.seal();
        let segment = &reader::segments(&world.predictions.dir).unwrap()[0];
        assert!(super::super::erase::rewrite(segment, &[(1, 2)]).unwrap());
        world.sign(false);
        world
    }

    fn sign(&self, rotate: bool) {
        sign(self.path(), &[&self.admin, &self.predictions], rotate);
    }

    fn path(&self) -> &Path {
        self.folder.path()
    }

    fn wanted(&self) -> Wanted {
        Wanted { dir: self.path().to_owned(), ..Wanted::default() }
    }

    fn last(&self) -> Note {
        Stored::read(&self.predictions.dir).unwrap().last.unwrap()
    }

    fn verify(&self) -> Result<Report, VerifyError> {
        verify(&self.wanted())
    }

    fn segments(&self) -> Vec<PathBuf> {
        let of = |log: &TestLog| reader::segments(&log.dir).unwrap();
        let all = [of(&self.predictions), of(&self.admin)].concat();
        all.into_iter().map(|segment| segment.path).collect()
    }

    /// Changes a file, expects that to show, and puts it back.
    fn tamper(&self, path: &Path, what: &str, with: impl FnOnce(&mut Vec<u8>)) {
        let before = std::fs::read(path).unwrap();
        let mut after = before.clone();
        with(&mut after);
        if after == before {
            return;
        }
        overwrite(path, &after);
        let log = if path.starts_with(&self.admin.dir) { &self.admin } else { &self.predictions };
        self.expect_fault_in(&log.dir, what);
        overwrite(path, &before);
    }

    fn expect_fault(&self, what: &str) {
        self.expect_fault_in(self.path(), what);
    }

    fn expect_fault_in(&self, dir: &Path, what: &str) {
        self.tampers.set(self.tampers.get() + 1);
        match verify(&Wanted { dir: dir.to_owned(), ..Wanted::default() }) {
            Err(VerifyError::Fault(fault)) => {
                assert!(fault.file.starts_with(self.path()), "{fault}")
            }
            Err(VerifyError::Io { .. }) => {}
            other => panic!("{what}: {other:?}"),
        }
    }

    fn done(&self, what: &str) {
        self.verify().unwrap();
        let tampers = self.tampers.get();
        eprintln!("{what}: {tampers} of {tampers} tampers detected");
    }
}

/// Without cutting it first: that would wait for the disk.
fn overwrite(path: &Path, bytes: &[u8]) {
    use std::io::Write as _;
    let mut file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all(bytes).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
}

/// The frames of a segment, each with its bytes.
fn frames(segment: &[u8]) -> Vec<Vec<u8>> {
    let (mut at, mut found) = (SEGMENT_HEAD_BYTES, Vec::new());
    while let Parsed::Frame(frame) = parse(&segment[at..]) {
        found.push(frame.bytes.to_vec());
        at += frame.bytes.len();
    }
    found
}

/// The same frame with other content, and a checksum that fits.
fn again(bytes: &[u8], seq: Option<u64>, bend: impl FnOnce(&mut Vec<u8>, &mut Vec<u8>)) -> Vec<u8> {
    let Parsed::Frame(frame) = parse(bytes) else { panic!() };
    let (mut head, mut body) = (frame.head.to_vec(), [&frame.salt[..], frame.payload].concat());
    bend(&mut head, &mut body);
    let mut draft = Draft::default();
    draft.start();
    draft.buffer().extend_from_slice(&head);
    draft.body(frame.form, body[..32].try_into().unwrap());
    draft.buffer().extend_from_slice(&body[32..]);
    draft.finish();
    let mut out = Vec::new();
    draft.put(seq.unwrap_or(frame.seq), &mut out);
    out
}

#[test]
fn an_untouched_ledger_is_right() {
    let world = World::new();
    let report = world.verify().unwrap();
    let of = |name: &str| report.logs.iter().find(|log| log.log == name).unwrap();
    let predictions = of(PREDICTIONS);
    assert_eq!((predictions.segments, predictions.next_seq, predictions.erased), (3, 9, 1));
    assert_eq!((predictions.checkpoints, predictions.signed), (3, 9));
    assert_eq!(of(ADMIN).next_seq, 3);
    // From each key that ever signed the way leads to the last.
    let published = keys::published(world.path()).unwrap();
    assert_eq!(published.len(), 6);
    for key in [0, 3] {
        let both = vec![published[key].clone(), published[key + 1].clone()];
        let wanted = Wanted { keys: both, anchors: vec![world.last()], ..world.wanted() };
        let report = verify(&wanted).unwrap();
        assert_eq!(report.logs.iter().map(|log| log.anchors).sum::<u64>(), 1);
    }
    // One log alone, as a copy has it.
    let dir = world.predictions.dir.clone();
    assert_eq!(verify(&Wanted { dir, ..Wanted::default() }).unwrap().logs.len(), 1);
    assert!(matches!(verify(&Wanted::default()), Err(VerifyError::NoLedger(_))));
}

#[test]
fn every_flipped_bit_of_predictions_shows() {
    every_flipped_bit_shows(0..3);
}

#[test]
fn every_flipped_bit_of_changes_shows() {
    every_flipped_bit_shows(3..4);
}

fn every_flipped_bit_shows(which: std::ops::Range<usize>) {
    let world = World::new();
    for path in world.segments().drain(which) {
        let len = std::fs::read(&path).unwrap().len();
        // All of the frames, and of the head each byte.
        // But for the mark of a segment that was never sealed: it says nothing.
        let marked = |bit: &usize| (8..12).contains(&(bit / 8));
        let chosen = |bit: &usize| bit / 8 >= SEGMENT_HEAD_BYTES || bit % 8 == bit / 8 % 8;
        for bit in (0..len * 8).filter(|bit| chosen(bit) && !marked(bit)) {
            world.tamper(&path, "bit", |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
        }
    }
    world.done("bits of segments");
}

#[test]
fn every_flipped_bit_of_what_is_derived_shows() {
    let world = World::new();
    for log in [&world.predictions, &world.admin] {
        for path in [log.dir.join(ALL), log.dir.join(LAST), level_path(&log.dir, 0)] {
            let len = std::fs::read(&path).unwrap().len();
            for bit in (0..len * 8).filter(|bit| bit % 8 == bit / 8 % 8 || bit % 8 == 5) {
                let what = format!("{} bit {bit}", path.display());
                world.tamper(&path, &what, |bytes| bytes[bit / 8] ^= 1 << (bit % 8));
            }
            for len in 0..len {
                // A tree cut to whole hashes or not, checkpoints cut anywhere.
                let what = format!("{} cut to {len}", path.display());
                let newest = Stored::read(&log.dir).unwrap().newest.unwrap().to_string().len();
                let whole = std::fs::metadata(&path).unwrap().len();
                // What a crash leaves while the last checkpoint is appended is no fault.
                if path.ends_with(ALL) && len as u64 >= whole - newest as u64 - 1 {
                    continue;
                }
                if path.ends_with(LAST) || len % 3 == 0 {
                    world.tamper(&path, &what, |bytes| bytes.truncate(len));
                }
            }
            world.tamper(&path, "longer", |bytes| bytes.extend_from_slice(&[7; 32]));
        }
    }
    world.done("bits of trees and checkpoints");
}

#[test]
fn changed_records_with_right_checksums_show() {
    let world = World::new();
    for path in world.segments() {
        let before = std::fs::read(&path).unwrap();
        let all = frames(&before);
        // Whoever changes a segment says its length as well.
        let mut head = before[..SEGMENT_HEAD_BYTES].to_vec();
        head[MARK].fill(0);
        let put = |frames: &[Vec<u8>]| [&head[..], &frames.concat()].concat();
        for (at, frame) in all.iter().enumerate() {
            let Parsed::Frame(parsed) = parse(frame) else { panic!() };
            let (head, body) = (parsed.head.len(), 32 + parsed.payload.len());
            for byte in 0..head + body {
                let mut bent = all.clone();
                bent[at] = again(frame, None, |head_bytes, body_bytes| match byte < head {
                    true => head_bytes[byte] ^= 0x11,
                    false => body_bytes[byte - head] ^= 0x11,
                });
                world.tamper(&path, "content", |bytes| *bytes = put(&bent));
            }
            // Erased without a record; a payload that moved into the head; longer; gone; doubled.
            let mut bent = all.clone();
            if parsed.form == Form::Whole && path.starts_with(&world.predictions.dir) {
                bent[at] = parsed.erased();
                world.tamper(&path, "erased", |bytes| *bytes = put(&bent));
            }
            bent[at] = again(frame, None, |head, _| head.push(0));
            world.tamper(&path, "longer head", |bytes| *bytes = put(&bent));
            if parsed.form == Form::Whole {
                bent[at] = again(frame, None, |_, body| body.push(0));
                world.tamper(&path, "longer payload", |bytes| *bytes = put(&bent));
            }
            let mut gone = all.clone();
            gone.remove(at);
            world.tamper(&path, "gone", |bytes| *bytes = put(&gone));
            let renumber = |frames: &[Vec<u8>]| {
                let Parsed::Frame(first) = parse(&all[0]) else { panic!() };
                let number = |(at, frame): (usize, &Vec<u8>)| {
                    again(frame, Some(first.seq + at as u64), |_, _| {})
                };
                put(&frames.iter().enumerate().map(number).collect::<Vec<_>>())
            };
            world.tamper(&path, "gone, renumbered", |bytes| *bytes = renumber(&gone));
            let mut doubled = all.clone();
            doubled.insert(at, frame.clone());
            world.tamper(&path, "doubled", |bytes| *bytes = put(&doubled));
            // The last of all, once more, is a record that came after the last checkpoint.
            if !path.ends_with("00000000000000000006.seg")
                && path.starts_with(&world.predictions.dir)
            {
                world.tamper(&path, "doubled, renumbered", |bytes| *bytes = renumber(&doubled));
            }
            for other in 0..at {
                let mut swapped = all.clone();
                swapped.swap(at, other);
                world.tamper(&path, "swapped", |bytes| *bytes = put(&swapped));
                world.tamper(&path, "swapped, renumbered", |bytes| *bytes = renumber(&swapped));
            }
        }
        for size in [8, 16, 64, 512] {
            for (one, other) in
                (0..before.len() / size).flat_map(|a| (0..a).map(move |b| (a, b))).step_by(11)
            {
                world.tamper(&path, "blocks", |bytes| {
                    for at in 0..size {
                        bytes.swap(one * size + at, other * size + at);
                    }
                });
            }
        }
        for len in (0..before.len()).step_by(3) {
            world.tamper(&path, "cut", |bytes| bytes.truncate(len));
        }
        world.tamper(&path, "zeros behind it", |bytes| bytes.extend_from_slice(&[0; 64]));
    }
    world.done("records");
}

#[test]
fn segments_that_are_gone_moved_or_too_many_show() {
    let world = World::new();
    let segments = world.segments();
    for path in &segments {
        let bytes = std::fs::read(path).unwrap();
        std::fs::remove_file(path).unwrap();
        world.expect_fault("gone");
        std::fs::write(path, &bytes).unwrap();
        let folder = path.parent().unwrap();
        for name in ["00000000000000000099.seg", "99.seg", "copy.seg", "00000000000000000099.open"]
        {
            let copy = folder.join(name);
            std::fs::write(&copy, &bytes).unwrap();
            world.expect_fault(name);
            // As if it were that one.
            let mut head = reader_head(&bytes);
            head.first_seq = 99;
            let bent = [&head.encode()[..], &bytes[SEGMENT_HEAD_BYTES..]].concat();
            std::fs::write(&copy, bent).unwrap();
            world.expect_fault(name);
            std::fs::remove_file(copy).unwrap();
        }
        for bend in 0..3 {
            let mut head = reader_head(&bytes);
            match bend {
                0 => head.log = FEEDBACK.to_owned(),
                1 => head.writer = WriterId([9; 8]),
                _ => head.first_seq += 1,
            }
            world.tamper(path, "head", |bytes| {
                bytes[..SEGMENT_HEAD_BYTES].copy_from_slice(&head.encode());
            });
        }
        let open = path.with_extension("open");
        std::fs::rename(path, &open).unwrap();
        std::fs::write(&open, &bytes[..bytes.len() - 1]).unwrap();
        world.expect_fault("opened again and cut");
        std::fs::remove_file(open).unwrap();
        std::fs::write(path, &bytes).unwrap();
        for other in &segments {
            world.tamper(path, "swapped", |bytes| *bytes = std::fs::read(other).unwrap());
        }
    }
    let admin = world.path().join(ADMIN);
    std::fs::rename(&admin, world.path().join("elsewhere")).unwrap();
    world.expect_fault("no log of changes");
    std::fs::rename(world.path().join("elsewhere"), &admin).unwrap();
    world.done("segments");
}

fn reader_head(bytes: &[u8]) -> crate::ledger::frame::SegmentHead {
    crate::ledger::frame::SegmentHead::decode(bytes).unwrap()
}

#[test]
fn checkpoints_that_are_gone_changed_or_forged_show() {
    let world = World::new();
    let dir = &world.predictions.dir;
    let bytes = std::fs::read(dir.join(ALL)).unwrap();
    let mut notes = Notes::new(&bytes[..], 0);
    let all: Vec<Note> =
        std::iter::from_fn(|| notes.next_note().unwrap().map(|(_, note)| note)).collect();
    let write = |notes: &[Note]| -> Vec<u8> {
        notes.iter().map(|note| format!("{note}\n")).collect::<String>().into_bytes()
    };
    let path = dir.join(ALL);
    for at in 0..all.len() {
        let mut fewer = all.clone();
        fewer.remove(at);
        // The last one is in its own file.
        if at + 1 < all.len() {
            world.tamper(&path, "gone", |bytes| *bytes = write(&fewer));
        }
        let mut more = all.clone();
        more.insert(at, all[at].clone());
        world.tamper(&path, "doubled", |bytes| *bytes = write(&more));
        for other in 0..at {
            let mut swapped = all.clone();
            swapped.swap(at, other);
            world.tamper(&path, "swapped", |bytes| *bytes = write(&swapped));
        }
        let forger = keys::SigningKey::generate().unwrap();
        let mut forged = all.clone();
        forged[at] = all[at].checkpoint.clone().sign(&[&forger]);
        world.tamper(&path, "forged", |bytes| *bytes = write(&forged));
        let mut handed = all[at].checkpoint.clone();
        let name = handed.origin.clone();
        handed.extensions.push(format!("next-key {}", forger.verifier(&name)));
        forged[at] = handed.sign(&[&forger]);
        world.tamper(&path, "handed over", |bytes| *bytes = write(&forged));
        let mut unsigned = all.clone();
        unsigned[at].signatures.remove(0);
        if !unsigned[at].signatures.is_empty() {
            world.tamper(&path, "unsigned", |bytes| *bytes = write(&unsigned));
        }
    }
    world.tamper(&path, "none", Vec::clear);
    world.done("checkpoints");
}

/// What a writer of the files could do who has the program too: only what was kept elsewhere shows
/// it.
#[test]
fn a_cut_or_rewritten_history_contradicts_what_was_kept_elsewhere() {
    let world = World::new();
    let anchor = world.last();
    let published = keys::published(world.path()).unwrap();
    let mut tampers = 0;
    let mut expect = |path: &Path, what: &str, by_key: bool| {
        let plain = Wanted { dir: path.to_owned(), ..Wanted::default() };
        verify(&plain).unwrap_or_else(|error| panic!("{what} would show anyway: {error}"));
        // The anchor's own signature counts, so its key has to come from elsewhere as well.
        let keys = published.clone();
        let anchored = Wanted { anchors: vec![anchor.clone()], keys, ..plain.clone() };
        assert!(verify(&anchored).is_err(), "{what}");
        tampers += 1;
        if by_key {
            assert!(verify(&Wanted { keys: published.clone(), ..plain }).is_err(), "{what}");
            tampers += 1;
        }
    };
    // Another history of the same writer, with other keys.
    for records in 1..40 {
        let folder = tempfile::tempdir().unwrap();
        let mut admin = TestLog::new(folder.path(), ADMIN);
        let mut log = TestLog::new(folder.path(), PREDICTIONS);
        admin.add("x");
        (0..records).for_each(|_| drop(log.add("forged").to_string()));
        log.seal();
        sign(folder.path(), &[&admin, &log], false);
        expect(folder.path(), "restamped", true);
    }
    // The end is gone, with everything that was derived from it.
    for keep in 1..3 {
        let world = World::new();
        let dir = &world.predictions.dir;
        let bytes = std::fs::read(dir.join(ALL)).unwrap();
        let mut notes = Notes::new(&bytes[..], 0);
        let all: Vec<Note> =
            std::iter::from_fn(|| notes.next_note().unwrap().map(|(_, note)| note)).collect();
        let kept: String = all[..keep].iter().map(|note| format!("{note}\n")).collect();
        std::fs::write(dir.join(ALL), kept).unwrap();
        std::fs::write(dir.join(LAST), all[keep - 1].to_string()).unwrap();
        for gone in keep..3 {
            std::fs::remove_file(segment_path(dir, gone as u64 * 3, true)).unwrap();
        }
        drop(TreeFiles::open(dir, keep as u64 * 3).unwrap());
        expect(world.path(), "cut", false);
    }
    // With the very key.
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("keys");
    std::fs::create_dir(&copy).unwrap();
    for entry in std::fs::read_dir(world.path().join("keys")).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, copy.join(path.file_name().unwrap())).unwrap();
    }
    let mut admin = TestLog::new(folder.path(), ADMIN);
    let mut log = TestLog::new(folder.path(), PREDICTIONS);
    admin.add("x");
    (0..9).for_each(|_| drop(log.add("forged").to_string()));
    log.seal();
    sign(folder.path(), &[&admin, &log], false);
    expect(folder.path(), "restamped with its key", false);
    eprintln!("histories: {tampers} of {tampers} tampers detected");
}

/// A ledger with Parquet of its three segments, and what is wrong with it once `change` has been there.
fn parquet_after(change: impl FnOnce(&Path)) -> Result<ParquetReport, VerifyError> {
    use crate::ledger::export::Selection;
    use crate::ledger::parquet::{FOLDER, Job, convert};
    let world = World::new();
    let root = world.path().join(FOLDER);
    for segment in reader::segments(&world.predictions.dir).unwrap() {
        convert(&segment, &root, &Job::of(&Selection::default())).unwrap();
    }
    change(&root);
    verify(&world.wanted()).map(|report| report.parquet.unwrap())
}

fn first_with(folder: &Path, extension: &str) -> PathBuf {
    let mut found: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|of| of == extension))
        .collect();
    found.sort();
    found.remove(0)
}

const DAY: &str = "model=iris/date=1970-01-01";

fn edit(root: &Path, from: &str, to: &str) {
    let path = first_with(&root.join("_segments"), "json");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} in {text}");
    std::fs::write(path, text.replace(from, to)).unwrap();
}

#[test]
fn parquet_is_held_against_its_manifests_and_those_against_the_log() {
    let right = parquet_after(|_| {}).unwrap();
    assert_eq!((right.segments, right.files, right.rows), (3, 3, 9));
    assert_eq!((right.waiting, right.stale, right.removed, right.unreadable), (0, 0, 0, 0));
    // Not converted yet, with or without a file of the attempt.
    let waiting = parquet_after(|root| {
        std::fs::remove_file(first_with(&root.join("_segments"), "json")).unwrap();
    });
    assert_eq!(waiting.unwrap().waiting, 1);
    type Change = fn(&Path);
    let cases: [(&str, Change, &str); 8] = [
        (
            "missing",
            |root| std::fs::remove_file(first_with(&root.join(DAY), "parquet")).unwrap(),
            "not there, although",
        ),
        (
            "a flipped bit",
            |root| {
                let path = first_with(&root.join(DAY), "parquet");
                let mut bytes = std::fs::read(&path).unwrap();
                bytes[100] ^= 1;
                std::fs::write(&path, bytes).unwrap();
            },
            "with SHA-256",
        ),
        (
            "a file too many",
            |root| {
                let path = first_with(&root.join(DAY), "parquet");
                std::fs::copy(&path, path.with_file_name("other.parquet")).unwrap();
            },
            "a file that no manifest names",
        ),
        (
            "a folder too many",
            |root| {
                let path = first_with(&root.join(DAY), "parquet");
                std::fs::create_dir_all(root.join("model=other/date=x")).unwrap();
                std::fs::copy(path, root.join("model=other/date=x/a.parquet")).unwrap();
            },
            "a file that no manifest names",
        ),
        (
            "other rows",
            |root| edit(root, "\"rows\": 3", "\"rows\": 4"),
            "3 records, and files with 4 rows",
        ),
        (
            "other records",
            |root| {
                edit(root, "\"rows\": 3", "\"rows\": 4");
                edit(root, "\"records\": 3", "\"records\": 4");
            },
            "the segment has 3 records, not 4",
        ),
        ("elsewhere", |root| edit(root, DAY, "../predictions"), "is no file of this folder"),
        ("no JSON", |root| edit(root, "{", "["), "no manifest of a segment"),
    ];
    for (name, change, want) in cases {
        let error = parquet_after(change).unwrap_err();
        assert!(error.to_string().contains(want), "{name}: {error}");
        assert_eq!(matches!(error, VerifyError::Missing { .. }), name == "missing");
    }
    // A file that is right by its digest, and has other rows: somebody wrote the manifest as well.
    let forged = parquet_after(|root| {
        let path = first_with(&root.join(DAY), "parquet");
        let log = root.parent().unwrap().join(PREDICTIONS);
        crate::ledger::parquet::single(&log, &Default::default(), &path).unwrap();
        let text = std::fs::read_to_string(first_with(&root.join("_segments"), "json")).unwrap();
        let manifest: serde_json::Value = serde_json::from_str(&text).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let sha256: [u8; 32] = <sha2::Sha256 as sha2::Digest>::digest(&bytes).into();
        let file = &manifest["files"][0];
        edit(root, file["sha256"].as_str().unwrap(), &crate::ledger::erase::hex(&sha256));
        let says = |bytes: u64| format!("\"bytes\": {bytes},\n      \"rows\"");
        edit(root, &says(file["bytes"].as_u64().unwrap()), &says(bytes.len() as u64));
    });
    assert!(forged.unwrap_err().to_string().contains("9 rows, its manifest says 3"));
}

#[test]
fn a_log_that_is_written_meanwhile_is_right() {
    let folder = tempfile::tempdir().unwrap();
    let mut log = TestLog::new(folder.path(), PREDICTIONS);
    TestLog::new(folder.path(), ADMIN);
    log.add("first");
    let dir = folder.path().to_owned();
    let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    let checking = std::thread::spawn(move || {
        let mut checks = 0;
        while !seen.load(Ordering::SeqCst) || checks < 20 {
            verify(&Wanted { dir: dir.clone(), ..Wanted::default() }).unwrap();
            checks += 1;
        }
    });
    let settings = Settings {
        ledger: folder.path().to_owned(),
        writer: WRITER,
        interval: Duration::ZERO,
        witnesses: Vec::new(),
    };
    let next = Arc::clone(&log.next);
    let durable = Box::new(move || Some(next.load(Ordering::SeqCst)));
    let followed = Followed { name: log.name, dir: log.dir.clone(), durable };
    let notary = Notary::start(settings, vec![followed], Box::new(|_, _| true)).unwrap();
    for at in 1..400 {
        log.add("more");
        if at % 60 == 0 {
            log.seal();
        }
    }
    drop(notary);
    stop.store(true, Ordering::SeqCst);
    checking.join().unwrap();
}

/// CPU time of this process, all threads: other work on the machine does not count.
fn cpu() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    let ticks = |at: usize| fields[at].parse::<f64>().unwrap();
    (ticks(11) + ticks(12)) / 100.0
}

/// `cargo test --release --lib how_fast -- --ignored --nocapture`
#[test]
#[ignore = "takes long, and says something of an optimised build alone"]
fn how_fast_it_is() {
    use std::io::Write as _;
    for payload_bytes in [500, 4096] {
        let folder = tempfile::tempdir().unwrap();
        let log = TestLog::new(folder.path(), PREDICTIONS);
        TestLog::new(folder.path(), ADMIN);
        let (mut seq, per_segment) = (0, (64 << 20) / payload_bytes);
        for _ in 0..8 {
            let head = crate::ledger::frame::SegmentHead {
                log: PREDICTIONS.to_owned(),
                writer: WRITER,
                first_seq: seq,
                created_ns: 1,
            };
            let file = File::create(segment_path(&log.dir, seq, true)).unwrap();
            let mut out = io::BufWriter::with_capacity(1 << 20, file);
            out.write_all(&head.encode()).unwrap();
            let (mut draft, mut bytes) = (Draft::default(), Vec::new());
            for _ in 0..per_segment {
                draft.start();
                draft.buffer().extend_from_slice(&[7; 150]);
                draft.body(Form::Whole, &[9; 32]);
                draft.buffer().resize(16 + 150 + payload_bytes, 3);
                draft.finish();
                bytes.clear();
                draft.put(seq, &mut bytes);
                out.write_all(&bytes).unwrap();
                seq += 1;
            }
            out.flush().unwrap();
        }
        log.next.store(seq, Ordering::SeqCst);
        let start = std::time::Instant::now();
        sign(folder.path(), &[&log], false);
        let signed = start.elapsed();
        let (start, before) = (std::time::Instant::now(), cpu());
        let wanted = Wanted { dir: log.dir.clone(), ..Wanted::default() };
        let report = verify(&wanted).unwrap();
        let (took, used, bytes) = (start.elapsed(), cpu() - before, report.logs[0].bytes as f64);
        let speed = |time: Duration| bytes / time.as_secs_f64() / 1e6;
        eprintln!(
            "payloads of {payload_bytes}: {seq} records, {:.0} MB; verify {took:.2?} {:.0} MB/s, \
             {:.0} records/s, {:.0} MB per second of CPU; \
             notary {signed:.2?} {:.0} MB/s",
            bytes / 1e6,
            speed(took),
            seq as f64 / took.as_secs_f64(),
            bytes / used / 1e6,
            speed(signed),
        );
    }
}
