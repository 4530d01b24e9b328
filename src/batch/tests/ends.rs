//! Runs that nobody waits for are ended, others are not.

use super::*;

/// A run that would outlast any test.
const ENDLESS: Duration = Duration::from_secs(600);

fn slow(cost: Duration, batch: BatchSettings) -> (FakeModel, Arc<Lane>) {
    let mut model = FakeModel::new(2, 1.0);
    model.cost = cost;
    let lane = Arc::new(lane(&model, 1, batch));
    (model, lane)
}

fn call(lane: &Arc<Lane>, wait: Duration) -> Call {
    let lane = Arc::clone(lane);
    let deadline = Deadline::new(Instant::now(), wait);
    tokio::spawn(async move { lane.infer(vec![row(&[0.0; 2])], deadline, 0).await })
}

async fn until_idle(lane: &Lane) {
    until(|| lane.shared.state.lock().idle.len() == 1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_run_ends_with_its_last_caller() {
    let (model, lane) = slow(ENDLESS, BatchSettings::default());
    // Its deadline passes.
    let late = call(&lane, Duration::from_millis(50)).await.unwrap().unwrap_err();
    assert_eq!(late.kind(), ErrorKind::DeadlineExceeded);
    until_idle(&lane).await;
    // It goes away.
    let gone = call(&lane, ENDLESS);
    until(|| model.runs.load(Ordering::Relaxed) == 2).await;
    gone.abort();
    until_idle(&lane).await;
    assert_eq!(model.runs.load(Ordering::Relaxed), 2);
}

type Call = tokio::task::JoinHandle<Result<Ran, BatchError>>;

/// Three calls that run as one batch, and have begun to.
async fn three(model: &FakeModel, lane: &Arc<Lane>) -> [Call; 3] {
    let runs = model.runs.load(Ordering::Relaxed);
    let session = lane.shared.take_idle().unwrap();
    let calls = [call(lane, ENDLESS), call(lane, ENDLESS), call(lane, ENDLESS)];
    until(|| lane.queue_depth() == 3).await;
    lane.shared.give_back(session);
    until(|| model.runs.load(Ordering::Relaxed) == runs + 1).await;
    calls
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_runs_on_for_the_one_who_stays() {
    let (model, lane) = slow(Duration::from_millis(300), BatchSettings::default());
    let [stays, goes, too] = three(&model, &lane).await;
    goes.abort();
    too.abort();
    assert_eq!(stays.await.unwrap().unwrap().batch_size, 3);
    until_idle(&lane).await;
    // When all leave it ends, and the session is not left stopped.
    three(&model, &lane).await.iter().for_each(Call::abort);
    until_idle(&lane).await;
    for call in three(&model, &lane).await {
        call.await.unwrap().unwrap();
    }
    assert_eq!(model.runs.load(Ordering::Relaxed), 3, "what was ended is not run again");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_dead_before_its_turn_is_never_run() {
    let batch = BatchSettings { size_max: 1, ..BatchSettings::default() };
    let (model, lane) = slow(Duration::from_millis(300), batch);
    let first = call(&lane, ENDLESS);
    until(|| model.runs.load(Ordering::Relaxed) == 1).await;
    let late: Vec<_> = (0..20).map(|_| call(&lane, Duration::from_millis(30))).collect();
    let gone: Vec<_> = (0..20).map(|_| call(&lane, ENDLESS)).collect();
    until(|| lane.queue_depth() == 40).await;
    gone.iter().for_each(Call::abort);
    for call in late {
        let error = call.await.unwrap().unwrap_err();
        assert_eq!(error.kind(), ErrorKind::DeadlineExceeded);
    }
    first.await.unwrap().unwrap();
    call(&lane, ENDLESS).await.unwrap().unwrap();
    assert_eq!(model.runs.load(Ordering::Relaxed), 2, "executions for dead requests");
}
