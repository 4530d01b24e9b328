use std::sync::atomic::AtomicBool;

mod ends;
mod flood;
mod gathering;
mod spare;

use super::*;
use crate::domain::{DataType, Digest, ErrorKind, Shape};
use crate::engine::fake::FakeModel;
use crate::engine::{EngineError, Model};
use crate::observe::Observer;

fn row(values: &[f32]) -> Tensor {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Tensor::new(DataType::Fp32, Shape::from_slice(&[values.len() / 2, 2]), data.into()).unwrap()
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
}

fn lane_of(sessions: Vec<Box<dyn Session>>, batch: BatchSettings) -> Lane {
    let model: ModelName = "fake".parse().unwrap();
    let version = Version::new(1).unwrap();
    let observer = Observer::default();
    let stats = VersionStats::new(&observer, &model, version, &Digest::new([0; 32]), "fake");
    let budget = Arc::new(ThreadBudget::new(2));
    let (batched, padding) = (true, None);
    let parts = LaneParts { model, version, batch, batched, padding, sessions, stats, budget };
    Lane::new(parts).unwrap()
}

fn lane(model: &FakeModel, sessions: usize, batch: BatchSettings) -> Lane {
    lane_of((0..sessions).map(|_| model.session().unwrap()).collect(), batch)
}

fn soon() -> Deadline {
    Deadline::new(Instant::now(), Duration::from_secs(20))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everyone_gets_their_own_rows_back() {
    let mut model = FakeModel::new(2, 0.5);
    model.cost = Duration::from_millis(2);
    let lane = Arc::new(lane(&model, 2, BatchSettings::default()));
    let mut calls = Vec::new();
    for i in 0..100_u8 {
        let lane = Arc::clone(&lane);
        calls.push(tokio::spawn(async move {
            let rows = usize::from(i % 3) + 1;
            let values = vec![f32::from(i); 2 * rows];
            let ran = lane.infer(vec![row(&values)], soon(), 0).await.unwrap();
            assert_eq!(floats(&ran.outputs[0]), vec![f32::from(i) + 0.5; 2 * rows]);
            ran.batch_size
        }));
    }
    let mut largest = 0;
    for call in calls {
        largest = largest.max(call.await.unwrap());
    }
    assert!(largest > 3, "requests that wait together run together, largest was {largest}");
    assert!(model.runs.load(Ordering::Relaxed) < 100);
    assert_eq!(model.rows.load(Ordering::Relaxed), 34 + 2 * 33 + 3 * 33);
    assert_eq!(lane.in_flight(), 0);
}

/// Tells when a run begins, and ends it when the test says so.
struct Gated {
    entered: std::sync::mpsc::SyncSender<()>,
    leave: std::sync::mpsc::Receiver<()>,
}

impl Session for Gated {
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        self.entered.send(()).unwrap();
        self.leave.recv_timeout(Duration::from_secs(20)).unwrap();
        Ok(inputs.to_vec())
    }
}

async fn until(what: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(20);
    while !what() {
        assert!(Instant::now() < end, "waited too long");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_queue_answers_and_the_dead_never_run() {
    let (entered, runs) = std::sync::mpsc::sync_channel(8);
    let (release, leave) = std::sync::mpsc::sync_channel(8);
    let batch = BatchSettings { size_max: 1, queue_max: 2, ..BatchSettings::default() };
    let lane = Arc::new(lane_of(vec![Box::new(Gated { entered, leave })], batch));
    let call = |deadline| {
        let lane = Arc::clone(&lane);
        tokio::spawn(async move { lane.infer(vec![row(&[0.0; 2])], deadline, 0).await })
    };
    let running = call(soon());
    tokio::task::block_in_place(|| runs.recv_timeout(Duration::from_secs(20))).unwrap();
    let waiting = call(soon());
    until(|| lane.queue_depth() == 1).await;
    let leaving = call(soon());
    until(|| lane.queue_depth() == 2).await;

    let refused = lane.infer(vec![row(&[0.0; 2])], soon(), 0).await.unwrap_err();
    assert!(matches!(refused, BatchError::QueueFull { queue_max: 2, .. }), "{refused:?}");
    assert!(refused.into_failure().retry_after.is_some());

    // One leaves; what takes its place has too little time.
    leaving.abort();
    assert!(leaving.await.unwrap_err().is_cancelled());
    let late = Deadline::new(Instant::now(), Duration::from_millis(50));
    let expired = lane.infer(vec![row(&[0.0; 2])], late, 0).await.unwrap_err();
    assert_eq!(expired.kind(), ErrorKind::DeadlineExceeded);

    for _ in 0..4 {
        release.send(()).unwrap();
    }
    running.await.unwrap().unwrap();
    waiting.await.unwrap().unwrap();
    until(|| lane.queue_depth() == 0).await;
    drop(lane);
    assert_eq!(runs.iter().count(), 1, "after the first, only the one that was waited for ran");
}

/// Fails or panics on any batch that holds a NaN.
struct Picky(Arc<AtomicBool>);

impl Session for Picky {
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        std::thread::sleep(Duration::from_millis(5));
        if floats(&inputs[0]).iter().any(|x| x.is_nan()) {
            assert!(!self.0.load(Ordering::Relaxed), "told to panic");
            return Err(EngineError::Run("NaN".to_owned()));
        }
        Ok(inputs.to_vec())
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_poisoned_row_leaves_its_neighbours_whole() {
    for panics in [false, true] {
        let session = Picky(Arc::new(AtomicBool::new(panics)));
        let lane = Arc::new(lane_of(vec![Box::new(session)], BatchSettings::default()));
        let calls: Vec<_> = (0..32_u8)
            .map(|i| {
                let lane = Arc::clone(&lane);
                let x = if i == 7 { f32::NAN } else { f32::from(i) };
                tokio::spawn(async move { lane.infer(vec![row(&[x; 2])], soon(), 0).await })
            })
            .collect();
        for (i, call) in (0_u8..).zip(calls) {
            match call.await.unwrap() {
                Ok(ran) => assert_eq!(floats(&ran.outputs[0]), [f32::from(i); 2]),
                Err(error) => assert_eq!((i, error.kind()), (7, ErrorKind::ModelFailed)),
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_lane_finishes_what_waits() {
    let mut model = FakeModel::new(2, 1.0);
    model.cost = Duration::from_millis(30);
    let batch = BatchSettings { size_max: 1, ..BatchSettings::default() };
    let shared = Arc::new(lane(&model, 1, batch));
    let calls: Vec<_> = (0..4)
        .map(|_| {
            let lane = Arc::clone(&shared);
            tokio::spawn(async move { lane.infer(vec![row(&[0.0; 2])], soon(), 0).await })
        })
        .collect();
    tokio::time::sleep(Duration::from_millis(10)).await;
    drop(shared);
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(model.runs.load(Ordering::Relaxed), 4);
}

#[tokio::test]
async fn limits_are_answered() {
    let model = FakeModel::new(2, 0.0);
    let batch = BatchSettings {
        size_max: 2,
        rows_max: 3,
        priority_levels: 2,
        priority_default: 1,
        ..BatchSettings::default()
    };
    let lane = lane(&model, 1, batch);
    let many = lane.infer(vec![row(&[0.0; 8])], soon(), 0).await.unwrap_err();
    assert!(matches!(many, BatchError::TooManyRows { rows: 4, rows_max: 3 }));
    let alone = lane.infer(vec![row(&[0.0; 6])], soon(), 0).await.unwrap();
    assert_eq!(alone.batch_size, 3, "over size_max but allowed: runs alone");
    let level = lane.infer(vec![row(&[0.0; 2])], soon(), 3).await.unwrap_err();
    assert_eq!(level.kind(), ErrorKind::InvalidInput);
    let past = Deadline::new(Instant::now(), Duration::ZERO);
    let late = lane.infer(vec![row(&[0.0; 2])], past, 0).await.unwrap_err();
    assert_eq!(late.kind(), ErrorKind::DeadlineExceeded);
}

/// Most elements of the next batch when eight rows of two elements wait and `idle` sessions of
/// two have nothing to do, after one run of each size took what `took` says.
fn planned(idle: usize, took: fn(f64) -> f64) -> usize {
    let lane = lane(&FakeModel::new(2, 0.0), 2, BatchSettings::default());
    for rows in [1, 2, 4, 8] {
        let took = Duration::from_secs_f64(took(rows as f64) / 1e3);
        lane.seed(vec![row(&vec![0.0; 2 * rows])], took);
    }
    let mut state = lane.shared.state.lock();
    let now = Instant::now();
    for _ in 0..8 {
        let (reply, _gone) = oneshot::channel();
        let ticket = Ticket::default();
        let item = Job { inputs: Vec::new(), deadline: soon(), reply, ticket };
        let expires_at = item.deadline.at;
        state.queue.push(queue::Entry {
            rows: 1,
            elements: 2,
            bytes: 8,
            priority: 0,
            queued_at: now,
            expires_at,
            item,
        });
    }
    let busy: Vec<_> = (idle..2).filter_map(|_| state.idle.pop()).collect();
    // The first may try a larger one, and then not for long.
    let tried = lane.shared.rule(&state, now).elements_max;
    let elements = lane.shared.rule(&state, now).elements_max;
    assert!(elements <= tried);
    drop(state.queue.take_dead(now, |_| true));
    state.idle.extend(busy);
    elements
}

#[test]
fn no_batch_is_larger_than_what_pays() {
    assert_eq!(planned(1, |rows| 4.0 * rows), 2, "a row costs the same in any batch");
    assert_eq!(planned(1, |rows| 4.0 * rows.powf(1.5)), 2, "a row costs more in a larger one");
    assert_eq!(planned(1, |_| 4.0), 16, "eight rows cost as much as one");
    assert_eq!(planned(1, |rows| if rows > 4.0 { 90.0 } else { 4.0 }), 8, "up to four pay");
}

#[test]
fn heavy_work_is_shared_out_over_idle_sessions() {
    let ms: fn(f64) -> f64 = |rows| 15.0 * (rows + 1.0);
    assert_eq!(planned(1, ms), 16, "all eight rows on the one session");
    assert_eq!(planned(2, ms), 8, "half of them on each");
    assert_eq!(planned(2, |rows| 15.0 * (rows + 1.0) / 1e3), 16, "too light to share");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_done_in_time_is_refused_at_once() {
    let (entered, runs) = std::sync::mpsc::sync_channel(8);
    let (release, leave) = std::sync::mpsc::sync_channel(8);
    let batch = BatchSettings { size_max: 1, ..BatchSettings::default() };
    let lane = Arc::new(lane_of(vec![Box::new(Gated { entered, leave })], batch));
    lane.seed(vec![row(&[0.0; 2])], Duration::from_secs(10));
    let call = |wait: Duration| {
        let lane = Arc::clone(&lane);
        let deadline = Deadline::new(Instant::now(), wait);
        tokio::spawn(async move { lane.infer(vec![row(&[0.0; 2])], deadline, 0).await })
    };
    let hour = Duration::from_secs(3600);
    let running = call(hour);
    tokio::task::block_in_place(|| runs.recv_timeout(Duration::from_secs(20))).unwrap();
    let waiting: Vec<_> = (0..4).map(|_| call(hour)).collect();
    until(|| lane.queue_depth() == 4).await;
    let refused = call(Duration::from_secs(40)).await.unwrap().unwrap_err();
    assert!(matches!(refused, BatchError::NotInTime { .. }), "{refused:?}");
    assert_eq!(refused.kind(), ErrorKind::Overloaded);
    assert!(refused.into_failure().retry_after.is_some());
    for _ in 0..5 {
        release.send(()).unwrap();
    }
    for call in std::iter::once(running).chain(waiting) {
        call.await.unwrap().unwrap();
    }
    drop(lane);
    assert_eq!(runs.iter().count(), 4, "the refused one never ran");
}

#[tokio::test]
async fn with_nothing_ahead_a_request_may_try() {
    let lane = lane(&FakeModel::new(2, 0.0), 1, BatchSettings::default());
    lane.seed(vec![row(&[0.0; 2])], Duration::from_secs(3600));
    lane.infer(vec![row(&[0.0; 2])], soon(), 0).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_queue_is_bounded_by_bytes_and_age() {
    let (entered, runs) = std::sync::mpsc::sync_channel(8);
    let (release, leave) = std::sync::mpsc::sync_channel(8);
    let batch = BatchSettings {
        size_max: 1,
        queue_bytes_max: 20,
        queue_wait_max: Some(Duration::from_millis(50)),
        ..BatchSettings::default()
    };
    let lane = Arc::new(lane_of(vec![Box::new(Gated { entered, leave })], batch));
    let call = |rows: usize| {
        let lane = Arc::clone(&lane);
        tokio::spawn(async move { lane.infer(vec![row(&vec![0.0; 2 * rows])], soon(), 0).await })
    };
    let running = call(1);
    tokio::task::block_in_place(|| runs.recv_timeout(Duration::from_secs(20))).unwrap();
    // Larger than the limit, but alone.
    let waiting = call(3);
    until(|| lane.queue_depth() == 1).await;
    let full = call(1).await.unwrap().unwrap_err();
    assert!(matches!(full, BatchError::QueueBytes { bytes_max: 20, .. }), "{full:?}");
    release.send(()).unwrap();
    running.await.unwrap().unwrap();
    release.send(()).unwrap();
    // Whether it got its turn in 50 ms or not, it is answered; if not, then as overload.
    if let Err(error) = waiting.await.unwrap() {
        assert!(matches!(error, BatchError::WaitedTooLong { .. }), "{error:?}");
    }
    assert_eq!(lane.queue_depth(), 0);
}
