//! Disks that fail, dawdle, take less than they are given, or are full.

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize};
use std::task::Poll;

use parking_lot::Mutex as Lock;
use rustix::io::Errno;

use super::super::disk::DiskFile;
use super::*;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Op {
    Create,
    Open,
    Rename,
    Remove,
    SyncDir,
    Write,
    Sync,
    Allocate,
    Truncate,
}

#[derive(Clone, Copy, Debug)]
enum Act {
    Go,
    Fail(Errno),
    /// Takes no more than so many bytes.
    Short(usize),
    Wait(Duration),
}

type Hook = Arc<Lock<dyn FnMut(Op) -> Act + Send>>;

/// The real disk, but for what the hook has it do.
struct Faulty {
    hook: Hook,
}

fn faulty(hook: impl FnMut(Op) -> Act + Send + 'static) -> Arc<Faulty> {
    Arc::new(Faulty { hook: Arc::new(Lock::new(hook)) })
}

fn act(hook: &Hook, op: Op) -> io::Result<usize> {
    let act = hook.lock()(op);
    match act {
        Act::Go => Ok(usize::MAX),
        Act::Short(most) => Ok(most),
        Act::Fail(errno) => Err(errno.into()),
        Act::Wait(time) => {
            std::thread::sleep(time);
            Ok(usize::MAX)
        }
    }
}

impl Disk for Faulty {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        act(&self.hook, Op::Create)?;
        let file = RealDisk.create(path)?;
        Ok(Arc::new(FaultyFile { file, hook: self.hook.clone() }))
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        act(&self.hook, Op::Open)?;
        let file = RealDisk.open(path)?;
        Ok(Arc::new(FaultyFile { file, hook: self.hook.clone() }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        act(&self.hook, Op::Rename)?;
        RealDisk.rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        act(&self.hook, Op::Remove)?;
        RealDisk.remove(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        act(&self.hook, Op::SyncDir)?;
        RealDisk.sync_dir(path)
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        RealDisk.free_bytes(path)
    }
}

struct FaultyFile {
    file: Arc<dyn DiskFile>,
    hook: Hook,
}

impl DiskFile for FaultyFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let most = act(&self.hook, Op::Write)?;
        self.file.write_at(&bytes[..bytes.len().min(most)], offset)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        act(&self.hook, Op::Sync)?;
        self.file.sync()
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        act(&self.hook, Op::Allocate)?;
        self.file.allocate(offset, len)
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        act(&self.hook, Op::Truncate)?;
        self.file.truncate(len)
    }
}

fn open_on(disk: Arc<Faulty>, settings: &LogSettings) -> Log {
    Log::open_on(disk, settings.clone(), WRITER).unwrap().0
}

/// Three callers, each with its texts; every third record goes onto the disk. What got an answer,
/// by number.
async fn load(log: &Log, rounds: usize) -> BTreeMap<u64, String> {
    let acked = Lock::new(BTreeMap::new());
    let caller = async |caller: usize| {
        for at in 0..rounds {
            let text = format!("{caller}-{at}");
            let Ok(at) = log.append(&draft(&text, 100 + at % 90)) else { continue };
            let done = match at.seq % 3 {
                0 => log.synced(at).await,
                _ => log.written(at).await,
            };
            if done.is_ok() {
                assert_eq!(acked.lock().insert(at.seq, text), None, "a number was given twice");
            }
            tokio::task::yield_now().await;
        }
    };
    tokio::join!(caller(0), caller(1), caller(2));
    acked.into_inner()
}

/// What got an answer is there, once, under its number; and nothing is missing between.
fn check_acked(settings: &LogSettings, acked: &BTreeMap<u64, String>, case: &str) {
    let texts = texts(settings);
    for (seq, text) in acked {
        assert_eq!(texts.get(*seq as usize), Some(text), "{case}: record {seq}");
        assert_eq!(texts.iter().filter(|other| *other == text).count(), 1, "{case}: {text}");
    }
}

#[tokio::test]
async fn short_and_interrupted_writes_are_continued() {
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let mut count = 0_usize;
    let disk = faulty(move |op| {
        count += 1;
        match op {
            Op::Write if count.is_multiple_of(7) => Act::Fail(Errno::INTR),
            Op::Write => Act::Short(1 + count % 50),
            _ => Act::Go,
        }
    });
    let log = open_on(disk, &settings);
    let acked = load(&log, 60).await;
    assert_eq!(acked.len(), 180);
    log.close().await;
    drop(log);
    check_acked(&settings, &acked, "short writes");
    assert_eq!(texts(&settings).len(), 180);
}

/// Each call of the disk in a run with several segments fails once, in a run of its own.
#[tokio::test]
async fn any_call_may_fail_once() {
    const ROUNDS: usize = 25;
    // How many calls there are depends on how records are grouped; so many runs without the one that
    // would have failed, and there are no more.
    const BEYOND: usize = 8;
    let mut sites = BTreeMap::new();
    let (mut failing, mut beyond) = (0, 0);
    while beyond < BEYOND {
        let dir = TempDir::new().unwrap();
        let settings = LogSettings { segment_bytes: 4096, ..settings(dir.path()) };
        let count = Arc::new(AtomicUsize::new(0));
        let hit = Arc::new(Lock::new(None));
        let (counts, hits) = (count.clone(), hit.clone());
        let errno = [Errno::IO, Errno::NOSPC][failing % 2];
        let disk = faulty(move |op| {
            if counts.fetch_add(1, Ordering::Relaxed) == failing {
                *hits.lock() = Some(op);
                return Act::Fail(errno);
            }
            Act::Go
        });
        if let Ok((log, _)) = Log::open_on(disk, settings.clone(), WRITER) {
            let acked = load(&log, ROUNDS).await;
            log.close().await;
            drop(log);
            check_acked(&settings, &acked, &format!("call {failing} failed: {:?}", hit.lock()));
            // And it opens again, whatever was left.
            let (log, found) = open(&settings);
            assert_eq!(found.damage, None, "call {failing} failed: {:?}", hit.lock());
            assert!(acked.last_key_value().is_none_or(|(last, _)| *last < found.next_seq));
            let next = put(&log, "next").await.unwrap();
            log.close().await;
            drop(log);
            assert_eq!(texts(&settings)[next.seq as usize], "next");
            check_acked(&settings, &acked, &format!("call {failing}, opened again"));
        }
        match *hit.lock() {
            Some(op) => {
                *sites.entry(op).or_insert(0) += 1;
                beyond = 0;
            }
            None => beyond += 1,
        }
        failing += 1;
    }
    eprintln!("{} calls failed: {sites:?}", failing - BEYOND);
    for op in [Op::Create, Op::Rename, Op::SyncDir, Op::Write, Op::Sync, Op::Truncate] {
        assert!(sites.contains_key(&op), "{op:?} never failed");
    }
}

#[tokio::test]
async fn a_sync_that_failed_is_not_tried_again_on_its_file() {
    for nth in 1..=60 {
        let dir = TempDir::new().unwrap();
        let settings = settings(dir.path());
        let (armed, mut seen) = (Arc::new(AtomicBool::new(false)), 0);
        let arm = armed.clone();
        let disk = faulty(move |op| {
            if op != Op::Sync || !arm.load(Ordering::Relaxed) {
                return Act::Go;
            }
            seen += 1;
            if seen == nth { Act::Fail(Errno::IO) } else { Act::Go }
        });
        let log = open_on(disk, &settings);
        armed.store(true, Ordering::Relaxed);
        let acked = load(&log, 30).await;
        assert_eq!(acked.len(), 90, "the first failure is mended");
        assert_eq!(log.check(), Ok(()));
        log.close().await;
        drop(log);
        check_acked(&settings, &acked, &format!("sync {nth}"));
        assert_eq!(texts(&settings).len(), 90, "sync {nth}");
    }
}

/// Everything fails, and then nothing does.
#[tokio::test]
async fn a_log_that_broke_says_so_and_goes_on_by_itself() {
    for errno in [Errno::IO, Errno::NOSPC] {
        let dir = TempDir::new().unwrap();
        let settings = settings(dir.path());
        let ill = Arc::new(AtomicBool::new(false));
        let sick = ill.clone();
        let disk = faulty(move |op| match op {
            Op::Write | Op::Sync | Op::Create if sick.load(Ordering::Relaxed) => Act::Fail(errno),
            _ => Act::Go,
        });
        let log = open_on(disk, &settings);
        let mut acked = load(&log, 10).await;
        ill.store(true, Ordering::Relaxed);
        let refused = put(&log, "lost").await.unwrap_err();
        match errno {
            Errno::IO => assert!(matches!(refused, Unrecorded::Broken(_)), "{refused}"),
            _ => assert_eq!(refused, Unrecorded::DiskFull),
        }
        assert_eq!(log.check(), Err(refused.clone()));
        assert_eq!(log.append(&draft("refused", 0)), Err(refused));
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        log.missed(at(100));
        log.missed(at(200));
        ill.store(false, Ordering::Relaxed);
        eventually("it takes records again", || log.check().is_ok());
        acked.extend(load(&log, 10).await);
        log.close().await;
        drop(log);
        let texts = texts(&settings);
        assert_eq!(texts.len(), 61, "no number is missing, none is there twice");
        assert!(!texts.iter().any(|text| text == "lost" || text == "refused"));
        for (seq, text) in acked {
            assert_eq!(texts[seq as usize], text);
        }
        let records = records(&settings);
        let gap = records.iter().find(|record| record.head.kind() == Kind::Gap).unwrap();
        assert_eq!((gap.seq, gap.head.count), (30, 2), "it is the first thing that is written");
        assert_eq!(gap.head.time_ns, 100_000_000_000);
        assert_eq!(gap.head.until_ns, 200_000_000_000);
    }
}

/// Who waits for the disk is told when it cannot be had, and who was written stays so.
#[tokio::test]
async fn waiters_are_told_of_a_disk_that_broke() {
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let ill = Arc::new(AtomicBool::new(false));
    let sick = ill.clone();
    let disk = faulty(move |op| match op {
        Op::Sync if sick.load(Ordering::Relaxed) => Act::Fail(Errno::IO),
        _ => Act::Go,
    });
    let log = open_on(disk, &settings);
    put(&log, "synced").await.unwrap();
    let at = log.append(&draft("both", 0)).unwrap();
    log.synced(at).await.unwrap();
    ill.store(true, Ordering::Relaxed);
    let at = put(&log, "written").await.unwrap();
    assert!(log.synced(at).await.is_err());
    assert_eq!(log.written(at).await, Ok(()), "it was");
    assert!(log.synced(at).await.is_err());
    ill.store(false, Ordering::Relaxed);
    eventually("it takes records again", || log.check().is_ok());
    assert_eq!(log.synced(at).await, Ok(()), "it was taken along");
    assert_eq!(put(&log, "next").await.unwrap().seq, 3);
    log.close().await;
    assert_eq!(texts(&settings), ["synced", "both", "written", "next"]);
}

#[tokio::test]
async fn a_slow_sync_holds_up_only_who_waits_for_it() {
    const SYNC: Duration = Duration::from_millis(300);
    let dir = TempDir::new().unwrap();
    let settings = settings(dir.path());
    let slow = Arc::new(AtomicBool::new(false));
    let dawdle = slow.clone();
    let disk = faulty(move |op| match op {
        Op::Sync if dawdle.load(Ordering::Relaxed) => Act::Wait(SYNC),
        _ => Act::Go,
    });
    let log = open_on(disk, &settings);
    slow.store(true, Ordering::Relaxed);
    let began = Instant::now();
    let at = put(&log, "first").await.unwrap();
    let crowd: Vec<_> =
        (0..20).map(|at| log.append(&draft(&format!("{at}"), 0)).unwrap()).collect();
    let syncs = log.stats().fsyncs;
    let (first, rest) = tokio::join!(log.synced(at), async {
        // While the first is being synced others are written.
        while log.stats().fsyncs == syncs && began.elapsed() < SYNC / 2 {
            put(&log, "meanwhile").await.unwrap();
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let written = began.elapsed();
        futures_util::future::try_join_all(crowd.into_iter().map(|at| log.synced(at)))
            .await
            .unwrap();
        written
    });
    first.unwrap();
    assert!(rest < SYNC, "{rest:?}");
    let syncs = log.stats().fsyncs - syncs;
    assert!(syncs <= 3, "{syncs} syncs for a crowd");
    assert!(log.stats().commit_seconds > SYNC.as_secs_f64() * 0.9);
    slow.store(false, Ordering::Relaxed);
}

/// A thread is held up by a slow write once; then only the keeper writes, until it is fast again.
#[tokio::test]
async fn a_slow_write_holds_up_a_caller_once() {
    const WRITE: Duration = Duration::from_millis(40);
    let dir = TempDir::new().unwrap();
    let settings = LogSettings { queue_bytes_max: 20_000, ..settings(dir.path()) };
    let slow = Arc::new(AtomicBool::new(false));
    let (dawdle, writes) = (slow.clone(), Arc::new(AtomicU64::new(0)));
    let written = writes.clone();
    let disk = faulty(move |op| match op {
        Op::Write if dawdle.load(Ordering::Relaxed) => {
            written.fetch_add(1, Ordering::Relaxed);
            Act::Wait(WRITE)
        }
        _ => Act::Go,
    });
    let log = open_on(disk, &settings);
    put(&log, "fast").await.unwrap();
    slow.store(true, Ordering::Relaxed);
    put(&log, "held up").await.unwrap();
    let (mut longest, mut full) = (Duration::ZERO, 0);
    let mut waiting = Vec::new();
    for at in 0..200 {
        match log.append(&draft(&format!("{at}"), 200)) {
            Err(Unrecorded::Full) => {
                full += 1;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Err(error) => panic!("{error}"),
            Ok(at) => {
                let mut future = Box::pin(log.written(at));
                let began = Instant::now();
                let polled = std::future::poll_fn(|cx| Poll::Ready(future.as_mut().poll(cx))).await;
                longest = longest.max(began.elapsed());
                if polled.is_pending() {
                    waiting.push(future);
                }
            }
        }
    }
    assert!(longest < WRITE / 2, "a caller was held up for {longest:?}");
    assert!(full > 0, "the queue has its limit");
    assert!(waiting.len() > 50);
    assert!(log.stats().queued_bytes <= 20_000 + 200);
    futures_util::future::try_join_all(waiting).await.unwrap();
    assert!(writes.load(Ordering::Relaxed) < 20, "groups grow");
    slow.store(false, Ordering::Relaxed);
    put(&log, "by the keeper").await.unwrap();
    eventually("callers write again", || !log.shared.slow.load(Ordering::Relaxed));
    put(&log, "by the caller").await.unwrap();
}

/// A disk of a few megabytes, where mounting is possible.
struct SmallDisk {
    dir: TempDir,
}

impl SmallDisk {
    fn mount(size: &str) -> Option<Self> {
        let dir = TempDir::new().unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs"])
            .arg(dir.path())
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self { dir }),
            failed => {
                eprintln!("SKIPPED: no file system can be mounted here: {failed:?}");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let unmounted = std::process::Command::new("umount").arg(self.dir.path()).status();
        assert!(unmounted.is_ok_and(|status| status.success()));
    }
}

#[tokio::test]
async fn a_full_disk_refuses_and_resumes() {
    let Some(small) = SmallDisk::mount("40m") else { return };
    let settings = settings(small.dir.path());
    let settings = LogSettings { free_bytes_min: 1 << 20, segment_bytes: 4 << 20, ..settings };
    let filler = small.dir.path().join("filler");
    let fill = || {
        let mut file = std::fs::File::create(&filler).unwrap();
        while std::io::Write::write_all(&mut file, &[1; 65536]).is_ok() {}
    };
    let (log, _) = open(&settings);
    let mut acked = Vec::new();
    for round in 0..2 {
        eventually("the disk has space", || log.check().is_ok());
        fill();
        let until = Instant::now() + Duration::from_secs(20);
        let refused = loop {
            assert!(Instant::now() < until, "never full: {:?}", log.stats());
            let text = format!("{round}-{}", acked.len());
            let done = match log.append(&draft(&text, 20_000)) {
                Ok(at) => log.synced(at).await.map(|()| at),
                Err(error) => Err(error),
            };
            match done {
                Ok(at) => acked.push((at.seq, text)),
                Err(error) => break error,
            }
        };
        assert_eq!(refused, Unrecorded::DiskFull);
        log.missed(SystemTime::now());
        std::fs::remove_file(&filler).unwrap();
        let began = Instant::now();
        eventually("it takes records again", || log.check().is_ok());
        eprintln!("{} records, resumed after {:?}", acked.len(), began.elapsed());
    }
    // Full when it is closed, and when it is opened.
    fill();
    log.close().await;
    drop(log);
    fill();
    let next_seq = texts(&settings).len() as u64;
    let (log, found) = open(&settings);
    assert_eq!((found.next_seq, found.damage), (next_seq, None));
    assert_eq!(log.check(), Err(Unrecorded::DiskFull));
    std::fs::remove_file(&filler).unwrap();
    eventually("it takes records", || log.check().is_ok());
    acked.push((put(&log, "last").await.unwrap().seq, "last".to_owned()));
    log.close().await;
    drop(log);
    let texts = texts(&settings);
    for (seq, text) in &acked {
        assert_eq!(&texts[*seq as usize], text);
    }
    let gaps = records(&settings);
    let missing = gaps.iter().filter(|record| record.head.kind() == Kind::Gap);
    assert_eq!(missing.map(|gap| gap.head.count).sum::<u64>(), 2);
}
