//! What a crash, a disk or a hand can leave, and what becomes of it.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;

use super::super::disk::DiskFile;
use super::*;
use crate::ledger::frame::SEGMENT_HEAD_BYTES;

/// A log of `count` records that ended as in a crash. Its only segment, and where each record ends.
fn crashed(settings: &LogSettings, count: usize, bytes: usize) -> (PathBuf, Vec<u64>) {
    let (log, _) = open(settings);
    let mut ends = vec![SEGMENT_HEAD_BYTES as u64];
    block_on(async {
        for at in 0..count {
            let draft = draft(&format!("r{at}"), bytes + at % 7);
            ends.push(ends[at] + draft.len() as u64);
            let at = log.append(&draft).unwrap();
            log.written(at).await.unwrap();
        }
    });
    drop(log);
    (segment_path(&settings.dir, 0, false), ends)
}

/// Puts a file in the place of all segments.
fn only(settings: &LogSettings, name: &Path, bytes: &[u8]) {
    let folder = settings.dir.join(reader::SEGMENTS);
    for entry in fs::read_dir(&folder).unwrap() {
        fs::remove_file(entry.unwrap().path()).unwrap();
    }
    fs::write(name, bytes).unwrap();
}

/// Recovers, which is what opening does first, without the threads and without waiting for the disk.
fn recovered(settings: &LogSettings) -> Recovery {
    super::super::recovery::recover(&Unsynced, settings).unwrap()
}

struct Unsynced;

impl Disk for Unsynced {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(UnsyncedFile(RealDisk.create(path)?)))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Ok(Arc::new(UnsyncedFile(RealDisk.open(path)?)))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk.remove(path)
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        RealDisk.free_bytes(path)
    }
}

struct UnsyncedFile(Arc<dyn DiskFile>);

impl DiskFile for UnsyncedFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        self.0.write_at(bytes, offset)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.allocate(offset, len)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        self.0.truncate(len)
    }
}

#[test]
fn a_crash_loses_nothing_that_was_written() {
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let (_, ends) = crashed(&settings, 20, 300);
    let (log, recovery) = open(&settings);
    assert_eq!(recovery, Recovery { next_seq: 20, ..Recovery::default() });
    let sealed = segment_path(&settings.dir, 0, true);
    assert_eq!(fs::metadata(sealed).unwrap().len(), ends[20]);
    block_on(put(&log, "next")).unwrap();
    block_on(log.close());
    assert_eq!(texts(&settings).len(), 21);
}

/// Every length that the last 64 KiB of a segment can have been cut to.
#[test]
fn every_cut_of_the_tail_opens_and_keeps_what_was_whole() {
    const CUTS: u64 = 64 << 10;
    const THREADS: u64 = 4;
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            scope.spawn(move || {
                cut_tails((0..CUTS).skip(thread as usize).step_by(THREADS as usize))
            });
        }
    });
}

fn cut_tails(tails: impl Iterator<Item = u64>) {
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let (path, ends) = crashed(&settings, 34, 2000);
    let mut whole = fs::read(&path).unwrap();
    whole.truncate(*ends.last().unwrap() as usize);
    // As it is before anything was known to be on the disk.
    whole[8..12].fill(0);
    for tail in tails {
        let cut = whole.len() as u64 - tail - 1;
        only(&settings, &path, &whole[..cut as usize]);
        let kept = ends.iter().rposition(|end| *end <= cut).unwrap();
        let goes_on = tail % 4096 < 4;
        let found = if goes_on {
            let (log, found) = open(&settings);
            let torn = u64::from(found.cut_bytes > 0);
            let next = block_on(put(&log, "next")).unwrap();
            assert_eq!(next.seq, kept as u64 + torn, "cut at {cut}");
            block_on(log.close());
            assert_eq!(texts(&settings).len() as u64, kept as u64 + torn + 1);
            found
        } else {
            recovered(&settings)
        };
        // Zeros at its end cannot be told from what was never written.
        let torn = &whole[ends[kept] as usize..cut as usize];
        let torn = torn.iter().rposition(|byte| *byte != 0).map_or(0, |last| last as u64 + 1);
        let expected = Recovery { next_seq: kept as u64, cut_bytes: torn, damage: None };
        assert_eq!(found, expected, "cut at {cut}");
        if kept > 0 {
            let sealed = fs::read(segment_path(&settings.dir, 0, true)).unwrap();
            assert!(sealed[512..] == whole[512..ends[kept] as usize], "cut at {cut}");
        }
    }
}

#[test]
fn a_torn_tail_is_recorded() {
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let (path, ends) = crashed(&settings, 3, 300);
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[0; 4], 8).unwrap();
    file.write_all_at(&[0; 100], ends[3] - 100).unwrap();
    let (log, recovery) = open(&settings);
    let cut = ends[3] - 100 - ends[2];
    assert_eq!(recovery, Recovery { next_seq: 2, cut_bytes: cut, damage: None });
    block_on(put(&log, "next")).unwrap();
    block_on(log.close());
    let records = records(&settings);
    let [.., recovered] = &records[..] else { panic!() };
    assert_eq!((recovered.seq, recovered.head.kind()), (2, Kind::Recovered));
    assert_eq!(recovered.head.count, cut);
    assert_eq!(texts(&settings).len(), 4);
}

/// Reads a sealed log to its end, or its first fault.
fn fault(settings: &LogSettings) -> Option<(PathBuf, u64)> {
    for segment in segments(&settings.dir).unwrap() {
        let read = SegmentReader::open(&segment).and_then(|mut reader| {
            while reader.next_frame()?.is_some() {}
            Ok(())
        });
        match read {
            Ok(()) => {}
            Err(ReadError::Fault(fault)) => return Some((fault.file, fault.offset)),
            Err(error) => panic!("{error}"),
        }
    }
    None
}

#[test]
fn every_flipped_byte_shows_with_its_place() {
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let (_, ends) = crashed(&settings, 100, 150);
    recovered(&settings);
    let path = segment_path(&settings.dir, 0, true);
    let whole = fs::read(&path).unwrap();
    assert_eq!(whole.len() as u64, *ends.last().unwrap());
    let mut reports = 0;
    for at in 0..whole.len() {
        let mut bad = whole.clone();
        bad[at] ^= 1 << (at % 8);
        fs::write(&path, &bad).unwrap();
        let (file, offset) = fault(&settings).unwrap_or_else(|| panic!("byte {at} not seen"));
        assert_eq!(file, path);
        let frame = ends.iter().rfind(|end| **end <= at as u64).copied().unwrap_or(0);
        assert!(offset == frame || (at < 12 && offset == 8), "byte {at}: reported at {offset}");
        // Opening says so too, leaves the file, and goes on after what it finds.
        if at % 37 == 0 {
            let found = recovered(&settings);
            let damage = found.damage.unwrap();
            assert!(damage.contains("00000000000000000000.seg: at byte"), "{damage}");
            let last = ends[99] <= at as u64;
            assert_eq!(found.next_seq, if last { 99 } else { 100 }, "byte {at}");
            assert_eq!(fs::read(&path).unwrap(), bad);
            reports += 1;
        }
    }
    assert!(reports > 400);
    fs::write(&path, &whole).unwrap();
    assert_eq!(fault(&settings), None);
}

#[test]
fn damage_in_the_open_segment_is_never_its_end() {
    type Harm = fn(&mut Vec<u8>, &[u64]);
    let cases: [(&str, Harm); 6] = [
        ("a flipped bit", |bytes, ends| bytes[ends[50] as usize + 60] ^= 1),
        ("a length of zero", |bytes, ends| bytes[ends[50] as usize..][..8].fill(0)),
        ("a zeroed block", |bytes, _| bytes[4096..8192].fill(0)),
        ("swapped blocks", |bytes, _| {
            let (left, right) = bytes.split_at_mut(8192);
            left[4096..8192].swap_with_slice(&mut right[..4096]);
        }),
        ("swapped records", |bytes, ends| {
            let one = bytes[ends[7] as usize..ends[8] as usize].to_vec();
            let other = bytes[ends[14] as usize..ends[15] as usize].to_vec();
            bytes[ends[7] as usize..ends[8] as usize].copy_from_slice(&other);
            bytes[ends[14] as usize..ends[15] as usize].copy_from_slice(&one);
        }),
        ("a head that is none", |bytes, _| bytes[20] ^= 1),
    ];
    for (name, harm) in cases {
        let dir = TempDir::new().unwrap();
        let settings = settings(dir.path());
        let (path, ends) = crashed(&settings, 100, 200);
        let mut bytes = fs::read(&path).unwrap();
        let end = *ends.last().unwrap();
        bytes[8..12].copy_from_slice(&u32::try_from(end).unwrap().to_le_bytes());
        harm(&mut bytes, &ends);
        fs::write(&path, &bytes).unwrap();
        let (log, found) = open(&settings);
        assert_eq!(found.next_seq, 100, "{name}");
        let damage = found.damage.unwrap_or_else(|| panic!("{name}: not seen"));
        assert!(damage.contains(".open: at byte"), "{name}: {damage}");
        block_on(log.close());
        let kept = fs::read(segment_path(&settings.dir, 0, true)).unwrap();
        assert_eq!(kept, bytes, "{name}: the file is as it was");
        let records: Vec<Record> = last_records(&settings);
        assert_eq!(records[0].head.kind(), Kind::Recovered);
        assert_eq!(records[0].seq, 100);
        let payload = records[0].payload.clone().unwrap();
        let body = String::from_utf8_lossy(&payload.body);
        assert!(body.contains("at byte"), "{body}");
    }
}

fn last_records(settings: &LogSettings) -> Vec<Record> {
    let last = segments(&settings.dir).unwrap().pop().unwrap();
    let mut reader = SegmentReader::open(&last).unwrap();
    let mut records = Vec::new();
    while let Some(frame) = reader.next_frame().unwrap() {
        records.push(Record::read(&frame).unwrap());
    }
    records
}

#[test]
fn a_tail_that_was_on_the_disk_does_not_go_unseen() {
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let (path, ends) = crashed(&settings, 100, 200);
    let whole = fs::read(&path).unwrap();
    let marked = |mark: u64| {
        let mut bytes = whole.clone();
        bytes[8..12].copy_from_slice(&u32::try_from(mark).unwrap().to_le_bytes());
        bytes
    };
    // Gone at a record's end, and in the middle of one.
    for cut in [ends[90], ends[90] + 50] {
        let mut bytes = marked(ends[95]);
        bytes.truncate(cut as usize);
        only(&settings, &path, &bytes);
        let found = recovered(&settings);
        assert!(found.damage.is_some(), "{cut}");
        assert_eq!((found.next_seq, found.cut_bytes), (90, 0));
    }
    // Behind the mark a sector that was never written is the end, whatever is behind it.
    let mut bytes = marked(ends[40]);
    let hole = (ends[60] as usize / 512 + 1) * 512;
    bytes[hole..hole + 512].fill(0);
    only(&settings, &path, &bytes);
    let found = recovered(&settings);
    let kept = ends.iter().rposition(|end| *end <= hole as u64).unwrap();
    assert_eq!((found.next_seq, found.damage), (kept as u64, None));
    // But for the zeros of the last number.
    assert_eq!(found.cut_bytes, ends[100] - 7 - ends[kept]);
    // A flipped bit there is none.
    let mut bytes = marked(ends[40]);
    bytes[hole] ^= 1;
    only(&settings, &path, &bytes);
    let found = recovered(&settings);
    assert!(found.damage.is_some());
    assert_eq!((found.next_seq, found.cut_bytes), (100, 0));
}

#[test]
fn what_was_begun_and_not_finished_is_put_right() {
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let (path, ends) = crashed(&settings, 10, 200);
    let whole = fs::read(&path).unwrap();
    let folder = settings.dir.join(reader::SEGMENTS);
    let spare = folder.join("spare-0.new");
    let names = || {
        let names = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<String> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    };
    let (first, second) = ("00000000000000000000.seg", "00000000000000000010.seg");

    // Prepared, and not used.
    only(&settings, &path, &whole);
    fs::write(&spare, [0; 4096]).unwrap();
    assert_eq!(recovered(&settings).next_seq, 10);
    assert_eq!(names(), [first]);

    // A next segment with only a head; one whose head never got there.
    for head in [fs::read(path.with_extension("seg")).unwrap()[..512].to_vec(), vec![0; 512]] {
        only(&settings, &path, &whole);
        let mut head = head;
        if head[0] != 0 {
            let mut decoded = frame::SegmentHead::decode(&head).unwrap();
            decoded.first_seq = 10;
            head = decoded.encode().to_vec();
        }
        head.resize(8192, 0);
        fs::write(segment_path(&settings.dir, 10, false), &head).unwrap();
        assert_eq!(recovered(&settings), Recovery { next_seq: 10, ..Recovery::default() });
        assert_eq!(names(), [first]);
    }

    // Cut, and not renamed.
    only(&settings, &path, &whole[..ends[10] as usize]);
    assert_eq!(recovered(&settings).next_seq, 10);
    assert_eq!(names(), [first]);
    let sealed = fs::read(path.with_extension("seg")).unwrap();

    // Left for another, and not sealed.
    only(&settings, &path, &whole);
    let next = || segment_of(&settings, 10, &["a", "b"]);
    fs::write(segment_path(&settings.dir, 10, false), next()).unwrap();
    assert_eq!(recovered(&settings), Recovery { next_seq: 12, ..Recovery::default() });
    assert_eq!(names(), [first, second]);
    assert_eq!(fs::read(path.with_extension("seg")).unwrap(), sealed);

    // Left for another before its end, and not cut.
    only(&settings, &path, &whole);
    let mut copy = whole.clone();
    let mut head = frame::SegmentHead::decode(&whole[..512]).unwrap();
    head.first_seq = 7;
    copy.splice(..ends[7] as usize, head.encode());
    fs::write(segment_path(&settings.dir, 7, false), &copy).unwrap();
    assert_eq!(recovered(&settings), Recovery { next_seq: 10, ..Recovery::default() });
    assert_eq!(names(), [first, "00000000000000000007.seg"]);
    assert_eq!(fs::metadata(path.with_extension("seg")).unwrap().len(), ends[7]);
    assert_eq!(texts(&settings).len(), 10);

    // That other one has not all of it.
    only(&settings, &path, &whole);
    copy.truncate((512 + ends[9] - ends[7]) as usize);
    fs::write(segment_path(&settings.dir, 7, false), &copy).unwrap();
    assert_eq!(recovered(&settings), Recovery { next_seq: 10, ..Recovery::default() });
    assert_eq!(names(), [first]);

    // Both names of one file, and of two.
    only(&settings, &path, &whole);
    fs::write(path.with_extension("seg"), &sealed).unwrap();
    assert_eq!(recovered(&settings), Recovery { next_seq: 10, ..Recovery::default() });
    assert_eq!(names(), [first]);
    fs::write(&path, segment_of(&settings, 0, &["x"; 12])).unwrap();
    let found = recovered(&settings);
    assert_eq!(found.next_seq, 10);
    assert!(found.damage.unwrap().contains(".aside"));
    assert_eq!(names(), ["00000000000000000000.aside", first]);

    // Records are missing between two.
    only(&settings, &path, &whole[..ends[8] as usize]);
    fs::write(segment_path(&settings.dir, 10, false), next()).unwrap();
    let found = recovered(&settings);
    assert!(found.damage.unwrap().contains("ends before 8, the next begins with 10"));
    assert_eq!(found.next_seq, 12);
}

/// Bytes of a segment with these records.
fn segment_of(settings: &LogSettings, first_seq: u64, texts: &[&str]) -> Vec<u8> {
    let log = settings.name.to_owned();
    let head = frame::SegmentHead { log, writer: WRITER, first_seq, created_ns: 1 };
    let mut bytes = head.encode().to_vec();
    for (at, text) in texts.iter().enumerate() {
        draft(text, 100).put(first_seq + at as u64, &mut bytes);
    }
    bytes
}

#[test]
fn one_process_writes() {
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let (log, _) = open(&settings);
    let second = Log::open(settings.clone(), WRITER);
    assert!(matches!(second, Err(OpenError::Locked { .. })), "{:?}", second.err());
    drop(log);
    drop(open(&settings));
}

#[test]
fn what_is_no_file_of_ours_is_refused() {
    let foreign = |prepare: fn(&LogSettings)| {
        let dir = TempDir::new().unwrap();
        let settings = settings(dir.path());
        prepare(&settings);
        match Log::open(settings, WRITER) {
            Err(OpenError::Foreign { path, what }) => format!("{}: {what}", path.display()),
            other => panic!("{:?}", other.map(|(_, found)| found)),
        }
    };
    foreign(|settings| {
        let elsewhere = settings.dir.with_extension("elsewhere");
        fs::create_dir_all(&elsewhere).unwrap();
        std::os::unix::fs::symlink(elsewhere, &settings.dir).unwrap();
    });
    foreign(|settings| fs::write(&settings.dir, "x").unwrap());
    foreign(|settings| {
        fs::create_dir_all(&settings.dir).unwrap();
        std::os::unix::fs::symlink("/tmp", settings.dir.join(reader::SEGMENTS)).unwrap();
    });
    foreign(|settings| {
        fs::create_dir_all(settings.dir.join(reader::SEGMENTS)).unwrap();
        let aim = settings.dir.join("aim");
        fs::write(&aim, segment_of(settings, 0, &["a"])).unwrap();
        std::os::unix::fs::symlink(aim, segment_path(&settings.dir, 0, false)).unwrap();
    });
    foreign(|settings| {
        fs::create_dir_all(&settings.dir).unwrap();
        std::os::unix::fs::symlink("/dev/null", settings.dir.join("lock")).unwrap();
    });
    foreign(|settings| {
        fs::create_dir_all(settings.dir.join(reader::SEGMENTS)).unwrap();
        mkfifo(&segment_path(&settings.dir, 3, true));
    });
    foreign(|settings| {
        fs::create_dir_all(&settings.dir).unwrap();
        mkfifo(&settings.dir.join("lock"));
    });
    foreign(|settings| {
        fs::create_dir_all(segment_path(&settings.dir, 3, false)).unwrap();
    });
}

fn mkfifo(path: &Path) {
    use rustix::fs::{CWD, FileType, Mode};
    rustix::fs::mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
}
