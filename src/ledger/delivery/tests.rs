//! Sinks that take, refuse, are away and come back, over segments as the log lays them down.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::path::Path;
use std::time::Instant;

use super::offset::{Keeper, Offset};
use super::worker::{Again, Item, Lost, Reason, Sent, Sink};
use super::*;
use crate::ledger::PREDICTIONS;
use crate::ledger::frame::{Draft, SegmentHead, WriterId};
use crate::ledger::reader;
use crate::ledger::record::{self, Head, Payload};
use crate::proto::ledger::{Kind as RecordKind, Tensor, tensor::Content};

const WRITER: &str = "0102030405060708";
const WAIT_MAX: Duration = Duration::from_secs(20);

/// A ledger's folder with the predictions in it.
pub(super) struct Ledger {
    pub(super) dir: tempfile::TempDir,
    end: Arc<AtomicU64>,
}

impl Ledger {
    pub(super) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join(PREDICTIONS).join(reader::SEGMENTS)).unwrap();
        Self { dir, end: Arc::default() }
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join(PREDICTIONS)
    }

    fn open(&self, first_seq: u64) -> &Self {
        let head = SegmentHead {
            log: PREDICTIONS.to_owned(),
            writer: WriterId([1; 8]),
            first_seq,
            created_ns: 1,
        };
        std::fs::write(reader::segment_path(&self.log(), first_seq, false), head.encode()).unwrap();
        self
    }

    fn add(&self, first_seq: u64, records: Range<u64>) -> &Self {
        self.add_of(first_seq, records, "iris")
    }

    fn add_of(&self, first_seq: u64, records: Range<u64>, model: &str) -> &Self {
        let path = reader::segment_path(&self.log(), first_seq, false);
        let mut file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
        for seq in records {
            file.write_all(&frame_of(seq, model, "ok", "")).unwrap();
            self.end.store(seq + 1, Ordering::Relaxed);
        }
        self
    }

    fn seal(&self, first_seq: u64) -> &Self {
        let path = |sealed| reader::segment_path(&self.log(), first_seq, sealed);
        std::fs::rename(path(false), path(true)).unwrap();
        self
    }

    /// Changes a byte of a sealed segment, so many before its end.
    fn damage(&self, first_seq: u64, before_end: usize) -> &Self {
        let path = reader::segment_path(&self.log(), first_seq, true);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = bytes.len() - before_end;
        bytes[at] ^= 0x55;
        std::fs::write(&path, bytes).unwrap();
        self
    }

    fn remove(&self, first_seq: u64) -> &Self {
        std::fs::remove_file(reader::segment_path(&self.log(), first_seq, true)).unwrap();
        self
    }

    pub(super) fn source(&self) -> Source {
        let end = Arc::clone(&self.end);
        Source {
            dir: self.dir.path().to_owned(),
            writer: WRITER.to_owned(),
            end: Arc::new(move || end.load(Ordering::Relaxed)),
        }
    }

    fn keeper(&self, sink: &str) -> Keeper {
        Keeper::new(self.dir.path(), sink)
    }
}

fn id_of(seq: u64) -> uuid::Uuid {
    uuid::Uuid::from_u128(u128::from(seq) + 1)
}

fn frame_of(seq: u64, model: &str, status: &str, arm: &str) -> Vec<u8> {
    let head = Head {
        kind: RecordKind::Prediction as i32,
        time_ns: 1_700_000_000_000_000_000 + i64::try_from(seq).unwrap(),
        prediction_id: id_of(seq).as_bytes().to_vec().into(),
        model: model.to_owned(),
        version: 3,
        arm: arm.to_owned(),
        status: status.to_owned(),
        ..Head::default()
    };
    let tensor = |name: &str, value: f32| Tensor {
        name: name.to_owned(),
        datatype: "FP32".to_owned(),
        shape: vec![1, 1],
        content: Some(Content::Data(value.to_le_bytes().to_vec().into())),
        ..Tensor::default()
    };
    let payload = Payload {
        request_id: format!("r{seq}"),
        inputs: vec![tensor("x", 1.5)],
        outputs: vec![tensor("y", 0.1)],
        ..Payload::default()
    };
    let (mut draft, mut bytes) = (Draft::default(), Vec::new());
    record::other(&mut draft, &head, &payload, &[7; 32]);
    draft.put(seq, &mut bytes);
    bytes
}

pub(super) fn settings() -> Settings {
    Settings { backoff_max: Duration::from_millis(50), ..Settings::default() }
}

pub(super) fn until(what: &str, mut is: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < WAIT_MAX, "never: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A sink in memory.
#[derive(Default)]
struct Memory {
    taken: Mutex<Vec<u64>>,
    told: Mutex<Vec<Lost>>,
    away: AtomicBool,
    panics: AtomicBool,
}

impl Memory {
    fn lost(&self) -> Vec<(u64, u64, Reason)> {
        self.told.lock().iter().map(|lost| (lost.from, lost.to, lost.reason)).collect()
    }
}

struct MemorySink(Arc<Memory>);

impl Sink for MemorySink {
    fn send<'a>(&'a mut self, batch: &'a [Item]) -> LocalBoxFuture<'a, Result<Sent, Again>> {
        assert!(!self.0.panics.swap(false, Ordering::Relaxed), "a bug of ours");
        Box::pin(async move {
            if self.0.away.load(Ordering::Relaxed) {
                return Err(Again::new("away"));
            }
            self.0.taken.lock().extend(batch.iter().map(|item| item.seq));
            Ok(Sent::default())
        })
    }

    fn tell<'a>(&'a mut self, lost: &'a Lost) -> LocalBoxFuture<'a, Result<(), Again>> {
        Box::pin(async move {
            if self.0.away.load(Ordering::Relaxed) {
                return Err(Again::new("away"));
            }
            self.0.told.lock().push(lost.clone());
            Ok(())
        })
    }
}

/// A worker with a sink in memory, on a thread as the real ones.
struct Running {
    shared: Arc<Shared>,
    stop: CancellationToken,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Running {
    fn start(ledger: &Ledger, settings: &Settings, memory: &Arc<Memory>) -> Self {
        let (source, stop) = (ledger.source(), CancellationToken::new());
        let shared = Shared::new("memory", false);
        worker::place(&source, follow::end(&ledger.log()).unwrap(), &shared);
        let (given, stopped) = (Arc::clone(&shared), stop.clone());
        let (settings, memory) = (settings.clone(), Arc::clone(memory));
        let make: Make = Box::new(move || {
            let sink = Box::new(MemorySink(Arc::clone(&memory)));
            let given = Arc::clone(&given);
            Box::pin(Worker::new(&settings, &source, given, stopped.clone(), sink).run())
        });
        let (given, stopped) = (Arc::clone(&shared), stop.clone());
        let thread = std::thread::spawn(move || run(vec![(given, make)], &stopped));
        Self { shared, stop, thread: Some(thread) }
    }

    fn stop(mut self) {
        self.stop.cancel();
        self.thread.take().unwrap().join().unwrap();
    }

    fn stats(&self, ledger: &Ledger) -> SinkStats {
        self.shared.stats((ledger.source().end)(), now_ns())
    }
}

#[test]
fn what_a_sink_missed_comes_when_it_is_back_and_once() {
    let ledger = Ledger::new();
    ledger.open(0).add(0, 0..10);
    let memory = Arc::new(Memory::default());
    let running = Running::start(&ledger, &settings(), &memory);
    until("ten", || memory.taken.lock().len() == 10);
    memory.away.store(true, Ordering::Relaxed);
    ledger.add(0, 10..700).seal(0).open(700).add(700, 700..1500);
    until("a failure", || !running.stats(&ledger).up);
    let stats = running.stats(&ledger);
    assert_eq!((stats.lag_records, stats.problem.as_deref()), (1490, Some("away")));
    assert!(stats.lag_seconds > 1.0, "{stats:?}");
    memory.away.store(false, Ordering::Relaxed);
    until("all", || memory.taken.lock().len() >= 1500);
    assert_eq!(*memory.taken.lock(), (0..1500).collect::<Vec<u64>>());
    until("idle", || running.stats(&ledger).lag_seconds == 0.0);
    let stats = running.stats(&ledger);
    assert_eq!((stats.lag_records, stats.up, stats.problem), (0, true, None));
    assert_eq!(stats.delivered, 1500);
    running.stop();
    let kept = ledger.keeper("memory").load::<Offset>();
    assert_eq!(kept, Some(Offset { writer: WRITER.to_owned(), next_seq: 1500 }));
    // The next start goes on behind it.
    ledger.add(700, 1500..1502);
    let running = Running::start(&ledger, &settings(), &memory);
    until("two more", || memory.taken.lock().len() >= 1502);
    assert_eq!(memory.taken.lock()[1500..], [1500, 1501]);
    running.stop();
}

#[test]
fn what_was_taken_before_the_offset_was_kept_is_taken_again() {
    let ledger = Ledger::new();
    ledger.open(0).add(0, 0..10);
    let memory = Arc::new(Memory::default());
    Running::start(&ledger, &settings(), &memory).stop();
    // As if the process had ended between the sink's answer and the offset.
    ledger.keeper("memory").save(&Offset { writer: WRITER.to_owned(), next_seq: 4 }).unwrap();
    Running::start(&ledger, &settings(), &memory).stop();
    assert_eq!(*memory.taken.lock(), (0..10).chain(4..10).collect::<Vec<u64>>());
}

#[test]
fn an_offset_beyond_the_log_or_of_another_is_not_believed() {
    for (writer, next_seq, want) in
        [(WRITER, 14, 10_u64), (WRITER, 10, 10), ("ffffffffffffffff", 5, 0)]
    {
        let ledger = Ledger::new();
        ledger.open(0).add(0, 0..10);
        ledger.keeper("memory").save(&Offset { writer: writer.to_owned(), next_seq }).unwrap();
        let memory = Arc::new(Memory::default());
        let running = Running::start(&ledger, &settings(), &memory);
        // Has the number of a record that was lost.
        ledger.add(0, 10..11);
        until("the last", || memory.taken.lock().last() == Some(&10));
        assert_eq!(*memory.taken.lock(), (want..11).collect::<Vec<u64>>(), "{writer} {next_seq}");
        running.stop();
    }
}

#[test]
fn what_was_removed_is_counted_and_passed_over() {
    let ledger = Ledger::new();
    ledger.open(0).add(0, 0..3).seal(0).remove(0).open(3).add(3, 3..5);
    let memory = Arc::new(Memory::default());
    let running = Running::start(&ledger, &settings(), &memory);
    until("two", || memory.taken.lock().len() == 2);
    assert_eq!(running.stats(&ledger).skipped, 3);
    running.stop();
    assert_eq!(memory.lost(), [(0, 3, Reason::Removed)]);
}

#[test]
fn what_is_damaged_is_counted_and_said_in_its_place() {
    let ledger = Ledger::new();
    ledger.open(0).add(0, 0..5).seal(0).open(5).add(5, 5..7);
    ledger.damage(0, frame_of(4, "iris", "ok", "stable").len() + 20);
    let memory = Arc::new(Memory::default());
    let running = Running::start(&ledger, &settings(), &memory);
    until("what is whole", || memory.taken.lock().len() == 6);
    assert_eq!(*memory.taken.lock(), [0, 1, 2, 4, 5, 6]);
    assert_eq!(memory.lost(), [(3, 4, Reason::Damaged)]);
    let stats = running.stats(&ledger);
    assert_eq!((stats.damaged, stats.skipped, stats.delivered, stats.up), (1, 0, 6, true));
    running.stop();
}

#[test]
fn an_offset_is_kept_once_the_sink_knows_what_it_lost() {
    let ledger = Ledger::new();
    ledger.open(0).add(0, 0..3).seal(0).remove(0).open(3).add(3, 3..5);
    let memory = Arc::new(Memory::default());
    memory.away.store(true, Ordering::Relaxed);
    let running = Running::start(&ledger, &settings(), &memory);
    until("a failure", || !running.stats(&ledger).up);
    running.stop();
    assert_eq!(ledger.keeper("memory").load::<Offset>(), None);
    memory.away.store(false, Ordering::Relaxed);
    let running = Running::start(&ledger, &settings(), &memory);
    until("two", || memory.taken.lock().len() == 2);
    running.stop();
    assert_eq!(memory.lost(), [(0, 3, Reason::Removed)]);
}

#[test]
fn what_is_lost_is_an_event_of_its_own() {
    let ledger = Ledger::new();
    ledger.open(0).add(0, 0..2).seal(0).open(2).add(2, 2..3);
    ledger.damage(0, 20);
    let receiver = Receiver::start(Box::new(|at, _| match at {
        // Said again until it is taken.
        2 => "503 Service Unavailable",
        _ => "200 OK",
    }));
    let delivery = Delivery::start(&receiver.settings(), ledger.source()).unwrap();
    until("the last", || delivery.stats()[0].lag_records == 0);
    let requests = receiver.requests.lock().clone();
    let told: Vec<_> = requests
        .iter()
        .filter(|(head, _)| header(head, "ce-type") == Some("dev.tidegate.ledger.undelivered"))
        .collect();
    assert_eq!(told.len(), 2, "{requests:?}");
    let (head, body) = told[1];
    assert_eq!(header(head, "ce-id"), Some("0102030405060708-1-2"));
    assert_eq!(header(head, "ce-sequence"), Some("1"));
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    assert!(body["time"].as_str().is_some_and(|time| time.ends_with('Z')));
    assert_eq!(
        (&body["kind"], &body["writer"], &body["seq"], &body["count"], &body["reason"]),
        (
            &"undelivered".into(),
            &WRITER.into(),
            &serde_json::json!(1),
            &serde_json::json!(1),
            &"damaged".into()
        )
    );
    let page = crate::observe::page::text(&delivery.families());
    let line = "tidegate_ledger_sink_records_total{sink=\"events\",outcome=\"damaged\"} 1";
    assert!(page.contains(line), "{page}");
}

#[test]
fn what_waits_beyond_the_cap_is_kept_or_passed_over() {
    for on_cap in [OnCap::Keep, OnCap::Skip] {
        let ledger = Ledger::new();
        ledger.open(0).add(0, 0..100).seal(0).open(100).add(100, 100..200).seal(100);
        ledger.open(200).add(200, 200..210);
        let bytes =
            std::fs::metadata(reader::segment_path(&ledger.log(), 100, true)).unwrap().len();
        let memory = Arc::new(Memory::default());
        memory.away.store(true, Ordering::Relaxed);
        let cap = Cap { bytes_max: bytes + 1, age_max: None, on_cap };
        let running = Running::start(&ledger, &Settings { cap, ..settings() }, &memory);
        until("a failure", || !running.stats(&ledger).up);
        let stats = running.stats(&ledger);
        let keep = on_cap == OnCap::Keep;
        assert_eq!((stats.over_cap, stats.skipped), (keep, if keep { 0 } else { 100 }));
        memory.away.store(false, Ordering::Relaxed);
        until("all", || running.stats(&ledger).lag_records == 0);
        let first = if keep { 0 } else { 100 };
        assert_eq!(*memory.taken.lock(), (first..210).collect::<Vec<u64>>(), "{on_cap:?}");
        running.stop();
    }
}

#[test]
fn only_models_that_are_wanted_are_delivered() {
    let ledger = Ledger::new();
    ledger.open(0).add_of(0, 0..3, "iris").add_of(0, 3..5, "fraud").add_of(0, 5..6, "iris-v2");
    let memory = Arc::new(Memory::default());
    let models = Models::parse("iris*, nobody").unwrap();
    let running = Running::start(&ledger, &Settings { models, ..settings() }, &memory);
    until("all", || running.stats(&ledger).lag_records == 0);
    assert_eq!(*memory.taken.lock(), [0, 1, 2, 5]);
    running.stop();
    assert!(Models::parse("a[").is_err());
    assert!(Models::parse("").unwrap().contain("anything"));
}

/// A receiver of HTTP; what it answers is decided for each request by its number.
struct Receiver {
    address: String,
    requests: Arc<Mutex<Vec<(String, String)>>>,
}

type Answer = Box<dyn Fn(usize, &str) -> &'static str + Send>;

impl Receiver {
    fn start(answer: Answer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let requests: Arc<Mutex<Vec<(String, String)>>> = Arc::default();
        let seen = Arc::clone(&requests);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let Some((head, body)) = read_request(&mut stream) else { continue };
                let status = answer(seen.lock().len(), &head);
                seen.lock().push((head, body));
                let end = "content-length: 0\r\nconnection: close\r\n\r\n";
                stream.write_all(format!("HTTP/1.1 {status}\r\n{end}").as_bytes()).ok();
            }
        });
        Self { address, requests }
    }

    fn settings(&self) -> Settings {
        let events = EventsSettings {
            url: format!("http://{}/events", self.address).parse().unwrap(),
            token: None,
            timeout: Duration::from_secs(5),
            attempts_max: 3,
            in_flight_max: 4,
            namespace: "default".to_owned(),
            component: "predictor".to_owned(),
        };
        Settings { events: Some(events), ..settings() }
    }

    /// Types of the events with this id, as they came.
    fn kinds(&self, seq: u64) -> Vec<String> {
        let id = id_of(seq).to_string();
        let requests = self.requests.lock();
        let of = requests.iter().filter(|(head, _)| header(head, "ce-id") == Some(&id));
        let kind = |(head, _): &(String, String)| {
            header(head, "ce-type").unwrap().rsplit('.').next().unwrap().to_owned()
        };
        let mut kinds: Vec<String> = of.map(kind).collect();
        kinds.sort();
        kinds
    }
}

fn read_request(stream: &mut TcpStream) -> Option<(String, String)> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        let read = stream.read(&mut chunk).ok().filter(|read| *read > 0)?;
        bytes.extend_from_slice(&chunk[..read]);
        let text = String::from_utf8_lossy(&bytes).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let size: usize = header(head, "content-length").map_or(0, |size| size.parse().unwrap());
        if body.len() >= size {
            return Some((head.to_owned(), body.to_owned()));
        }
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let lines = head.lines().filter_map(|line| line.split_once(": "));
    lines.into_iter().find(|(found, _)| found.eq_ignore_ascii_case(name)).map(|(_, value)| value)
}

fn append(path: &Path, frame: &[u8]) {
    let mut file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
    file.write_all(frame).unwrap();
}

#[test]
fn predictions_become_events_as_those_of_kserve() {
    let ledger = Ledger::new();
    ledger.open(0);
    let path = reader::segment_path(&ledger.log(), 0, false);
    append(&path, &frame_of(0, "iris", "ok", "canary"));
    append(&path, &frame_of(1, "iris", "internal", "stable"));
    let receiver = Receiver::start(Box::new(|_, _| "202 Accepted"));
    let delivery = Delivery::start(&receiver.settings(), ledger.source()).unwrap();
    until("three events", || receiver.requests.lock().len() == 3);
    assert_eq!(receiver.kinds(0), ["request", "response"]);
    assert_eq!(receiver.kinds(1), ["request"]);
    let requests = receiver.requests.lock().clone();
    let of = |kind: &str, seq| {
        let id = id_of(seq).to_string();
        let is = |(head, _): &&(String, String)| {
            header(head, "ce-id") == Some(&id) && header(head, "ce-type").unwrap().ends_with(kind)
        };
        requests.iter().find(is).unwrap().clone()
    };
    let (head, body) = of(".response", 0);
    for (name, value) in [
        ("ce-specversion", "1.0"),
        ("ce-source", "/tidegate/0102030405060708"),
        ("ce-type", "org.kubeflow.serving.inference.response"),
        ("ce-time", "2023-11-14T22:13:20.000000000Z"),
        ("ce-inferenceservicename", "iris"),
        ("ce-namespace", "default"),
        ("ce-component", "predictor"),
        ("ce-endpoint", "canary"),
        ("content-type", "application/json"),
    ] {
        assert_eq!(header(&head, name), Some(value), "{name}");
    }
    let want = r#"{"model_name":"iris","model_version":"3","id":"r0","outputs":[{"name":"y","datatype":"FP32","shape":[1,1],"data":[0.1]}]}"#;
    assert_eq!(body, want);
    let (head, body) = of(".request", 1);
    assert_eq!(header(&head, "ce-endpoint"), Some("default"));
    let want =
        r#"{"id":"r1","inputs":[{"name":"x","datatype":"FP32","shape":[1,1],"data":[1.5]}]}"#;
    assert_eq!(body, want);
    drop(delivery);
}

#[test]
fn events_are_tried_again_or_given_up_and_the_rest_comes_once() {
    let ledger = Ledger::new();
    ledger.open(0).add(0, 0..6);
    let refused = id_of(4).to_string();
    // Two answers that ask to come again, and one event that is never taken.
    let receiver = Receiver::start(Box::new(move |at, head| match at {
        1 => "503 Service Unavailable\r\nretry-after: 0",
        2 => "429 Too Many Requests",
        _ if header(head, "ce-id") == Some(&refused) => "400 Bad Request",
        _ => "200 OK",
    }));
    let delivery = Delivery::start(&receiver.settings(), ledger.source()).unwrap();
    until("the batch", || delivery.stats()[0].lag_records == 0);
    let stats = delivery.stats().remove(0);
    assert_eq!((stats.delivered, stats.refused), (5, 1));
    assert!(stats.failures >= 2, "{stats:?}");
    let tries: usize = (0..6).filter(|seq| *seq != 4).map(|seq| receiver.kinds(seq).len()).sum();
    // Ten events, of which two were tried twice unless the refused one was what came to be asked again.
    assert!((10..=12).contains(&tries), "{tries}");
    // Three tries of each of its events, and what was asked to come again.
    assert!((6..=8).contains(&receiver.kinds(4).len()), "{:?}", receiver.kinds(4));
    drop(delivery);
}

#[test]
fn a_receiver_that_is_away_holds_nobody_up_and_its_offset_holds_segments() {
    let ledger = Ledger::new();
    ledger.open(0).add(0, 0..5);
    let unused = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let receiver = Receiver { address: unused.to_string(), requests: Arc::default() };
    let delivery = Delivery::start(&receiver.settings(), ledger.source()).unwrap();
    until("a failure", || !delivery.stats()[0].up);
    assert_eq!((delivery.delivered_up_to(), delivery.stats()[0].lag_records), (0, 5));
    let page = crate::observe::page::text(&delivery.families());
    for line in [
        "tidegate_ledger_sink_up{sink=\"events\"} 0",
        "tidegate_ledger_sink_lag_records{sink=\"events\"} 5",
        "tidegate_ledger_sink_records_total{sink=\"events\",outcome=\"delivered\"} 0",
    ] {
        assert!(page.contains(line), "{line} in\n{page}");
    }
    let start = Instant::now();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(delivery.stop());
    assert!(start.elapsed() < STOP_MAX + Duration::from_secs(2));
}

#[test]
fn a_panic_in_one_sink_ends_nobody() {
    let ledger = Ledger::new();
    ledger.open(0).add(0, 0..5);
    let memory = Arc::new(Memory::default());
    memory.panics.store(true, Ordering::Relaxed);
    let running = Running::start(&ledger, &settings(), &memory);
    until("all", || memory.taken.lock().len() == 5);
    assert!(running.stats(&ledger).failures > 0);
    running.stop();
}
