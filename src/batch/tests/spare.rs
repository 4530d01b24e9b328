//! Work that nobody waits for gives way to work that somebody does.

use super::*;

type Call = tokio::task::JoinHandle<Result<Ran, BatchError>>;

fn spare(lane: &Arc<Lane>, value: f32) -> Call {
    let lane = Arc::clone(lane);
    tokio::spawn(async move { lane.infer_spare(vec![row(&[value; 2])], soon()).await })
}

fn request(lane: &Arc<Lane>, value: f32) -> Call {
    let lane = Arc::clone(lane);
    tokio::spawn(async move { lane.infer(vec![row(&[value; 2])], soon(), 0).await })
}

/// A lane whose runs begin and end when the test says so.
struct Stage {
    lane: Arc<Lane>,
    runs: std::sync::mpsc::Receiver<()>,
    release: Vec<std::sync::mpsc::SyncSender<()>>,
}

impl Stage {
    fn new(sessions: usize, batch: BatchSettings) -> Self {
        let (entered, runs) = std::sync::mpsc::sync_channel(16);
        let mut release = Vec::new();
        let mut session = || {
            let (sender, leave) = std::sync::mpsc::sync_channel(16);
            release.push(sender);
            Box::new(Gated { entered: entered.clone(), leave }) as Box<dyn Session>
        };
        let sessions = (0..sessions).map(|_| session()).collect();
        Self { lane: Arc::new(lane_of(sessions, batch)), runs, release }
    }

    fn begun(&self) {
        tokio::task::block_in_place(|| self.runs.recv_timeout(Duration::from_secs(20))).unwrap();
    }

    fn release_all(&self) {
        self.release.iter().for_each(|release| while release.try_send(()).is_ok() {});
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_spare_leaves_a_full_queue_and_runs_last() {
    let batch = BatchSettings { size_max: 8, queue_max: 2, ..BatchSettings::default() };
    let stage = Stage::new(1, batch);
    let running = request(&stage.lane, 0.0);
    stage.begun();
    let out = [spare(&stage.lane, 1.0), spare(&stage.lane, 2.0)];
    until(|| stage.lane.queue_depth() == 2).await;
    let refused = spare(&stage.lane, 3.0).await.unwrap().unwrap_err();
    assert!(matches!(refused, BatchError::QueueFull { .. }), "{refused:?}");
    // A request takes the place of all of it.
    let waiting = request(&stage.lane, 4.0);
    for call in out {
        let error = call.await.unwrap().unwrap_err();
        assert!(matches!(error, BatchError::GaveWay), "{error:?}");
        assert_eq!(error.kind(), ErrorKind::Overloaded);
    }
    let last = spare(&stage.lane, 5.0);
    until(|| stage.lane.queue_depth() == 2).await;
    stage.release_all();
    assert_eq!(floats(&running.await.unwrap().unwrap().outputs[0]), [0.0; 2]);
    for (call, value) in [(waiting, 4.0), (last, 5.0)] {
        let ran = call.await.unwrap().unwrap();
        assert_eq!((floats(&ran.outputs[0]), ran.batch_size), (vec![value; 2], 1));
    }
    assert_eq!(stage.runs.try_iter().count(), 2, "they did not share a batch");
    assert_eq!(stage.lane.in_flight(), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_spare_leaves_one_session_to_requests() {
    let batch = BatchSettings { size_max: 1, ..BatchSettings::default() };
    let stage = Stage::new(2, batch);
    let mut calls = vec![spare(&stage.lane, 1.0)];
    stage.begun();
    calls.push(spare(&stage.lane, 2.0));
    until(|| stage.lane.queue_depth() == 1).await;
    calls.push(request(&stage.lane, 3.0));
    stage.begun();
    // Both sessions run: the second one that is spare waits still.
    assert_eq!(stage.lane.queue_depth(), 1);
    stage.release_all();
    for call in calls {
        call.await.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_spare_is_done_when_nothing_else_is() {
    let model = FakeModel::new(2, 0.5);
    let lane = Arc::new(lane(&model, 2, BatchSettings::default()));
    assert!(lane.is_heavy(&[row(&[0.0; 2])]), "nothing is known yet");
    lane.seed(vec![row(&[0.0; 2])], Duration::from_micros(10));
    assert!(!lane.is_heavy(&[row(&[0.0; 2])]));
    for value in [1.0, 2.0, 3.0] {
        let ran = spare(&lane, value).await.unwrap().unwrap();
        assert_eq!(floats(&ran.outputs[0]), [value + 0.5; 2]);
    }
    assert_eq!(lane.budget().threads(), 2);
    let late = Deadline::new(Instant::now(), Duration::ZERO);
    let error = lane.infer_spare(vec![row(&[0.0; 2])], late).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::DeadlineExceeded);
}
