//! The state after an unclean end: a process that commits is killed in the middle of it, again and
//! again, and every commit that it was told of is there afterwards, whole.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::json;
use tidegate::control::store::{
    EventQuery, Expect, Kind, NewEvent, Put, SqliteStore, Store, StoreError,
};

const KILLS: u64 = 40;
/// Tells the test binary that it is the one to be killed, and where to write.
const FOLDER: &str = "STATE_STORE_TEST_FOLDER";

/// Two documents and two events in one commit, all with the same number.
fn write(store: &SqliteStore, number: u64) -> Result<(), StoreError> {
    let put = |name: &str| Put {
        kind: Kind::Traffic,
        name: name.to_owned(),
        // Large enough that a commit is many pages.
        body: Some(json!({"number": number, "fill": "x".repeat(9000)})),
        expect: Expect::Any,
    };
    let event = |action: &str| NewEvent {
        actor: "writer".to_owned(),
        action: action.to_owned(),
        subject: number.to_string(),
        ..NewEvent::default()
    };
    store.commit(&[put("left"), put("right")], &[event("left"), event("right")]).map(drop)
}

/// Not a test: what the test below starts and kills.
#[test]
fn a_writer_that_is_killed() {
    let Ok(folder) = std::env::var(FOLDER) else { return };
    let store = SqliteStore::open(Path::new(&folder)).unwrap();
    let last = store.document(Kind::Traffic, "left").unwrap();
    let last = last.map_or(0, |document| document.body["number"].as_u64().unwrap());
    let mut out = std::io::stdout().lock();
    for number in last + 1.. {
        write(&store, number).unwrap();
        writeln!(out, "acked {number}").unwrap();
        out.flush().unwrap();
    }
}

/// Starts the writer, lets it commit for a while, kills it; gives the last commit it told of.
fn killed_after(folder: &Path, commits: u64) -> u64 {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_writer_that_is_killed", "--nocapture", "--test-threads=1"])
        .env(FOLDER, folder)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let acked =
        |line: String| line.rsplit_once("acked ").map(|(_, number)| number.parse().unwrap());
    let mut last = 0;
    let mut seen = 0;
    while seen < commits {
        let Some(line) = lines.next() else { panic!("the writer ended by itself") };
        if let Some(number) = acked(line.unwrap()) {
            last = number;
            seen += 1;
        }
    }
    // SIGKILL, wherever it is by now.
    child.kill().unwrap();
    child.wait().unwrap();
    // It was told of these before it died.
    lines.map_while(Result::ok).filter_map(acked).fold(last, u64::max)
}

#[test]
fn every_commit_that_returned_survives_kill_9() {
    let folder = tempfile::tempdir().unwrap();
    let mut unacked = 0;
    let mut slowest = Duration::ZERO;
    let mut last = 0;
    for round in 0..KILLS {
        let acked = killed_after(folder.path(), 1 + round % 7);
        let started = Instant::now();
        let store = SqliteStore::open(folder.path()).unwrap();
        slowest = slowest.max(started.elapsed());
        let number = |name: &str| {
            let document = store.document(Kind::Traffic, name).unwrap().unwrap();
            assert_eq!(document.revision, document.body["number"].as_u64().unwrap());
            document.revision
        };
        let (left, right) = (number("left"), number("right"));
        assert_eq!(left, right, "a commit is there whole");
        // The one that it was killed in may be there or not.
        assert!(left == acked || left == acked + 1, "acked {acked}, found {left}");
        unacked += u64::from(left > acked);
        assert_eq!(store.head().unwrap(), 2 * left);
        last = left;
    }
    let store = SqliteStore::open(folder.path()).unwrap();
    let mut counted: BTreeMap<u64, u64> = BTreeMap::new();
    let mut after = 0;
    loop {
        let page = store.events(&EventQuery { after: Some(after), ..EventQuery::default() });
        let page = page.unwrap();
        let Some(end) = page.last() else { break };
        after = end.seq;
        for event in &page {
            *counted.entry(event.subject.parse().unwrap()).or_default() += 1;
        }
    }
    let whole = (1..=last).map(|number| (number, 2)).collect::<BTreeMap<_, _>>();
    assert_eq!(counted, whole, "each commit's events, once");
    eprintln!(
        "{KILLS} kills, {last} commits: 0 lost, 0 torn, {unacked} were on the disk before they could \
         be told of; opened again in at most {slowest:?}"
    );
}

/// What a change costs, for the figures, beside what the disk alone takes; the bound only tells a
/// disk that is stuck.
#[test]
fn a_commit_takes_little_longer_than_its_sync() {
    const COMMITS: usize = 200;
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(folder.path()).unwrap();
    let mut plain = std::fs::File::create(folder.path().join("plain")).unwrap();
    let (mut commits, mut syncs) = (Vec::new(), Vec::new());
    for number in 0..COMMITS {
        let table = json!({"weights": {"1": 95, "2": 5}, "sticky": {"header": "x-user-id"}});
        let put = Put {
            kind: Kind::Traffic,
            name: "iris".to_owned(),
            body: Some(table.clone()),
            expect: Expect::Any,
        };
        let event = NewEvent {
            actor: "writer".to_owned(),
            action: "traffic.put".to_owned(),
            subject: number.to_string(),
            after: Some(table),
            ..NewEvent::default()
        };
        let started = Instant::now();
        store.commit(&[put], &[event]).unwrap();
        commits.push(started.elapsed());
        let started = Instant::now();
        plain.write_all(&[7; 3 * 4096]).unwrap();
        plain.sync_data().unwrap();
        syncs.push(started.elapsed());
    }
    for (what, mut took) in [("a change of traffic, journalled", commits), ("a sync alone", syncs)]
    {
        took.sort();
        let (half, most) = (took[COMMITS / 2], took[COMMITS * 99 / 100]);
        eprintln!("{what}: p50 {half:?}, p99 {most:?}");
        assert!(half < Duration::from_secs(1));
    }
}

#[test]
fn a_child_that_dies_leaves_no_lock() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(folder.path()).unwrap();
    let acked = killed_after(folder.path(), 3);
    let started = Instant::now();
    write(&store, acked + 10).unwrap();
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    assert!(store.changed_elsewhere().unwrap());
}
