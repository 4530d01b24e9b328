//! The ledger against kill -9: clients keep books of what they were answered, and hold them against
//! what is in the log after the next start.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::time::{Duration, Instant};

use tidegate::ledger::reader::{self, SegmentReader};
use tidegate::ledger::record::{Kind, Record};
use tidegate::ledger::{ADMIN, FOLDER, PREDICTIONS};

use crate::gateway::Gateway;
use crate::kills::Random;
use crate::load::{Ask, Client, Recorded, Stop, Wire, closed_loop};
use crate::{alone, count, models};

const MODEL: &str = "sum";
const CALLERS: usize = 8;
/// The longest that a gateway is under load before it is killed.
const LOAD_MAX_MS: u64 = 250;
/// How long an orderly end may take.
const END_MAX: Duration = Duration::from_secs(30);

/// Every record of a log, in the order of the files.
fn records(root: &Path, log: &str) -> Vec<Record> {
    let folder = root.join("state").join(FOLDER).join(log);
    let mut found = Vec::new();
    for segment in reader::segments(&folder).unwrap() {
        let mut reader = SegmentReader::open(&segment).unwrap();
        while let Some(frame) = reader.next_frame().unwrap() {
            found.push(Record::read(&frame).unwrap());
        }
    }
    found
}

/// Holds the books against the log: how many records it has that nobody was told of.
fn agree(root: &Path, books: &[Recorded], durability: &str) -> usize {
    let found = records(root, PREDICTIONS);
    for (at, record) in (0_u64..).zip(&found) {
        assert_eq!(record.seq, at, "numbers without a gap");
    }
    let mut by_id: HashMap<String, u64> = HashMap::new();
    for record in found.iter().filter(|record| record.head.kind() == Kind::Prediction) {
        let id = record.prediction_id().unwrap().to_string();
        assert!(by_id.insert(id, record.seq).is_none(), "{durability}: twice: {record:?}");
    }
    let missing: Vec<&Recorded> =
        books.iter().filter(|acked| by_id.get(&acked.id) != Some(&acked.seq)).collect();
    assert!(missing.is_empty(), "{durability}: {} missing: {missing:?}", missing.len());
    by_id.len() - books.len()
}

#[test]
fn what_was_acked_is_recorded_once_after_kill_9() {
    let kills = count("LEDGER_KILLS", 10);
    for (durability, kills) in [("buffered", kills.div_ceil(2)), ("sync", kills / 2)] {
        let root = tempfile::tempdir().unwrap();
        models::put(root.path(), MODEL, 1, &models::add(1));
        // Small segments, so that they are left under load as well.
        let settings = [
            ("TIDEGATE_LEDGER_DURABILITY", durability),
            ("TIDEGATE_LEDGER_SEGMENT_BYTES", "262144"),
            ("TIDEGATE_LEDGER_FREE_BYTES_MIN", "0"),
            ("TIDEGATE_LEDGER_CHECKPOINT_INTERVAL_S", "1"),
        ];
        alone(|runtime| {
            let (mut random, mut books, mut failed) = (Random(0x1ed6e2), Vec::new(), 0);
            for life in 0..=kills {
                let mut gateway = Gateway::start(root.path(), &settings);
                // At the end of a long run; the log is read whole.
                if life < 10 || life % 50 == 0 || life == kills {
                    agree(root.path(), &books, durability);
                }
                let client = {
                    let _inside = runtime.enter();
                    Client::new(MODEL, gateway.http, gateway.grpc)
                };
                let stop = Stop::default();
                let load = runtime.spawn(closed_loop(client, CALLERS, stop.clone(), Ask::plain));
                let some = if life == kills { 100 } else { 1 };
                while stop.done() < some {
                    std::thread::sleep(Duration::from_millis(1));
                }
                if life == kills {
                    stop.stop();
                } else {
                    std::thread::sleep(Duration::from_millis(random.below(LOAD_MAX_MS)));
                    gateway.kill();
                    stop.stop();
                }
                for answer in runtime.block_on(load).unwrap() {
                    match answer.ran {
                        Ok(ran) => books.push(ran.recorded.unwrap()),
                        Err(_) => failed += 1,
                    }
                }
                if life == kills {
                    drained(&mut gateway);
                }
            }
            let others = agree(root.path(), &books, durability);
            sealed(root.path());
            eprintln!(
                "E5: {kills} kills ({durability}): {} predictions acked, 0 missing, 0 twice; {failed} failed, \
                 {others} recorded whose answer nobody got",
                books.len(),
            );
        });
    }
}

/// Ends it in order.
fn drained(gateway: &mut Gateway) {
    let pid = rustix::process::Pid::from_raw(gateway.pid().cast_signed()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    let start = Instant::now();
    while gateway.alive() {
        assert!(start.elapsed() < END_MAX, "it does not end");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Nothing is open after an orderly end, and every check of it passes.
fn sealed(root: &Path) {
    let ledger = root.join("state").join(FOLDER);
    for log in [PREDICTIONS, ADMIN] {
        let segments = reader::segments(&ledger.join(log)).unwrap();
        let open: Vec<_> = segments.iter().filter(|segment| !segment.sealed).collect();
        assert!(open.is_empty(), "{open:?}");
    }
    let verified = std::process::Command::new(env!("CARGO_BIN_EXE_tidegate"))
        .args(["audit", "verify"])
        .arg(&ledger)
        .output()
        .unwrap();
    assert!(verified.status.success(), "{verified:?}");
}

/// The journal is in the log `admin` once, whatever was killed when.
#[test]
fn every_change_is_in_the_admin_log_once_after_kill_9() {
    let root = tempfile::tempdir().unwrap();
    models::put(root.path(), MODEL, 1, &models::add(1));
    models::put(root.path(), MODEL, 2, &models::add(2));
    alone(|_| {
        let mut random = Random(0xad_41);
        for _ in 0..3 {
            let mut gateway = Gateway::start(root.path(), &[]);
            let mut admin = gateway.admin();
            for version in [1, 2] {
                admin.all_to(MODEL, version).done();
                std::thread::sleep(Duration::from_millis(random.below(400)));
            }
            gateway.kill();
        }
        let mut gateway = Gateway::start(root.path(), &[]);
        let mut admin = gateway.admin();
        let journal = admin.get("/journal?after=0&limit=500").done();
        let mut wanted: BTreeMap<u64, String> = BTreeMap::new();
        for event in journal.body["events"].as_array().unwrap() {
            let (seq, action) = (event["seq"].as_u64().unwrap(), event["action"].as_str().unwrap());
            wanted.insert(seq, action.to_owned());
        }
        drained(&mut gateway);
        let mut found = BTreeMap::new();
        for record in records(root.path(), ADMIN) {
            if record.head.kind() == Kind::Admin {
                let body = &record.payload.unwrap().body;
                let event: serde_json::Value = serde_json::from_slice(body).unwrap();
                let seq = event["seq"].as_u64().unwrap();
                assert!(found.insert(seq, record.head.action).is_none(), "twice: {event}");
            }
        }
        for (seq, action) in &wanted {
            assert_eq!(found.get(seq), Some(action));
        }
        assert!(wanted.values().filter(|action| *action == "traffic.put").count() >= 6);
        assert!(found.values().any(|action| action == "gateway.stop"), "{found:?}");
        eprintln!("E5: {} changes in the admin log, each once", found.len());
    });
}

/// Takes space on a disk until it is dropped.
struct Ballast(std::path::PathBuf);

impl Ballast {
    fn of(path: std::path::PathBuf, bytes: u64) -> Self {
        let file = std::fs::File::create(&path).unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).unwrap();
        Self(path)
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        std::fs::remove_file(&self.0).unwrap();
    }
}

/// Whether a load balancer would send it traffic.
fn is_ready(gateway: &Gateway) -> bool {
    use std::io::{Read as _, Write as _};
    let mut stream = std::net::TcpStream::connect(gateway.http).unwrap();
    let head = "GET /v2/health/ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    answer.starts_with(b"HTTP/1.1 200")
}

fn ready_becomes(gateway: &Gateway, wanted: bool) -> Duration {
    let start = Instant::now();
    while is_ready(gateway) != wanted {
        assert!(start.elapsed() < END_MAX, "ready is not {wanted}");
        std::thread::sleep(Duration::from_millis(5));
    }
    start.elapsed()
}

#[test]
fn a_gateway_is_not_ready_while_its_ledgers_disk_is_full() {
    const BALLAST: u64 = 64 << 20;
    // A disk that nobody else writes much to.
    let root = tempfile::tempdir_in("/dev/shm").unwrap();
    let room = rustix::fs::statvfs(root.path()).unwrap();
    let free = room.f_bavail * room.f_frsize;
    if free < 8 * BALLAST {
        return eprintln!("no room in /dev/shm, nothing was tested");
    }
    models::put(root.path(), MODEL, 1, &models::add(1));
    let keep = (free - BALLAST).to_string();
    let settings = [
        ("TIDEGATE_LEDGER_FREE_BYTES_MIN", keep.as_str()),
        ("TIDEGATE_LEDGER_SEGMENT_BYTES", "1048576"),
    ];
    alone(|runtime| {
        let gateway = Gateway::start(root.path(), &settings);
        let client = {
            let _inside = runtime.enter();
            Client::new(MODEL, gateway.http, gateway.grpc)
        };
        let ask = |at| {
            let asked = client.ask(Wire::of(at), Ask::plain(at), Instant::now());
            runtime.block_on(asked).ran.map(|ran| ran.recorded.unwrap())
        };
        let mut books: Vec<Recorded> = (0..6).map(|at| ask(at).unwrap()).collect();
        let ballast = Ballast::of(root.path().join("ballast"), 2 * BALLAST);
        let gone = ready_becomes(&gateway, false);
        let refused: Vec<String> = (0..3).map(|at| ask(at).unwrap_err().text).collect();
        assert!(refused.iter().all(|text| text.contains("cannot be recorded")), "{refused:?}");
        drop(ballast);
        let back = ready_becomes(&gateway, true);
        books.extend((0..6).map(|at| ask(at).unwrap()));
        agree(root.path(), &books, "full");
        let gaps: u64 = records(root.path(), PREDICTIONS)
            .iter()
            .filter(|record| record.head.kind() == Kind::Gap)
            .map(|record| record.head.count)
            .sum();
        assert_eq!(gaps, 3, "each refused call is in a gap record");
        eprintln!("E5: disk full: not ready after {gone:?}, ready {back:?} after there was room");
    });
}
