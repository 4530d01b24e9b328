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
use crate::load::{Ask, Client, Recorded, Stop, closed_loop};
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
