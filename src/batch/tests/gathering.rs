//! Cheap requests of one thread that are ready together run together.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use super::*;

/// Cheap, and cheaper together.
fn cheap(sessions: usize, batch: BatchSettings) -> (FakeModel, Arc<Lane>) {
    let model = FakeModel::new(2, 1.0);
    let lane = lane(&model, sessions, batch);
    for rows in [1, 8, 8, 64, 64] {
        lane.seed(vec![row(&vec![0.0; 2 * rows])], Duration::from_nanos(4000 + 20 * rows as u64));
    }
    (model, Arc::new(lane))
}

async fn together(lane: &Arc<Lane>, count: u8) -> usize {
    let calls: Vec<_> = (0..count)
        .map(|i| {
            let lane = Arc::clone(lane);
            tokio::spawn(async move { lane.infer(vec![row(&[f32::from(i); 2])], soon(), 0).await })
        })
        .collect();
    let mut largest = 0;
    for (i, call) in (0..count).zip(calls) {
        let ran = call.await.unwrap().unwrap();
        assert_eq!(floats(&ran.outputs[0]), [f32::from(i) + 1.0; 2]);
        largest = largest.max(ran.batch_size);
    }
    largest
}

#[tokio::test]
async fn requests_that_are_ready_together_run_together() {
    let batch = BatchSettings { size_max: 16, ..BatchSettings::default() };
    let (model, lane) = cheap(1, batch);
    assert_eq!(together(&lane, 64).await, 16, "as many as a batch holds");
    assert_eq!(model.runs.load(Ordering::Relaxed), 4);
    assert_eq!(model.rows.load(Ordering::Relaxed), 64);
    assert_eq!((lane.in_flight(), lane.queue_depth()), (0, 0));
}

#[tokio::test]
async fn order_and_priorities_are_left_to_the_queue() {
    for batch in [
        BatchSettings { preserve_ordering: true, ..BatchSettings::default() },
        BatchSettings { priority_levels: 2, priority_default: 1, ..BatchSettings::default() },
        BatchSettings { size_max: 1, ..BatchSettings::default() },
    ] {
        let (model, lane) = cheap(1, batch);
        assert_eq!(together(&lane, 8).await, 1);
        assert_eq!(model.runs.load(Ordering::Relaxed), 8);
    }
}

#[tokio::test]
async fn what_is_not_cheaper_together_runs_alone() {
    let model = FakeModel::new(2, 1.0);
    let lane = lane(&model, 1, BatchSettings::default());
    for rows in [1_u8, 1, 8, 8] {
        let inputs = vec![row(&vec![0.0; 2 * usize::from(rows)])];
        lane.seed(inputs, Duration::from_micros(10) * u32::from(rows));
    }
    assert_eq!(together(&Arc::new(lane), 8).await, 1);
    assert_eq!(model.runs.load(Ordering::Relaxed), 8);
}

#[tokio::test]
async fn without_an_idle_session_they_wait_in_the_queue() {
    let (model, lane) = cheap(1, BatchSettings::default());
    let session = lane.shared.take_idle().unwrap();
    let calls: Vec<_> = (0..8)
        .map(|_| {
            let lane = Arc::clone(&lane);
            tokio::spawn(async move { lane.infer(vec![row(&[0.0; 2])], soon(), 0).await })
        })
        .collect();
    until(|| lane.queue_depth() == 8).await;
    lane.shared.give_back(session);
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(model.rows.load(Ordering::Relaxed), 8);
}

#[tokio::test]
async fn a_leader_that_leaves_hands_over() {
    fn poll<F: Future>(future: &mut Pin<Box<F>>) -> Poll<F::Output> {
        future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
    }
    let (model, lane) = cheap(1, BatchSettings::default());
    let mut leader = Box::pin(lane.infer(vec![row(&[1.0; 2])], soon(), 0));
    assert!(poll(&mut leader).is_pending());
    let mut followers: Vec<_> =
        (0..3_u8).map(|i| Box::pin(lane.infer(vec![row(&[f32::from(i); 2])], soon(), 0))).collect();
    for follower in &mut followers {
        assert!(poll(follower).is_pending());
    }
    assert_eq!(model.runs.load(Ordering::Relaxed), 0);
    drop(leader);
    for (i, follower) in (0..3_u8).zip(followers) {
        let ran = follower.await.unwrap();
        assert_eq!(floats(&ran.outputs[0]), [f32::from(i) + 1.0; 2]);
    }
    assert_eq!(model.rows.load(Ordering::Relaxed), 3, "the leader had withdrawn");
    assert_eq!(lane.in_flight(), 0);
}

#[tokio::test]
async fn a_lone_caller_soon_stops_looking() {
    let (model, lane) = cheap(1, BatchSettings::default());
    let mut looked = 0;
    for _ in 0..1000 {
        let mut call = Box::pin(lane.infer(vec![row(&[0.0; 2])], soon(), 0));
        let first = call.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        if first.is_pending() {
            looked += 1;
            call.await.unwrap();
        }
    }
    assert!((5..40).contains(&looked), "looked for company {looked} times of 1000");
    assert_eq!(model.runs.load(Ordering::Relaxed), 1000);
    // When there is company, it is found again.
    for _ in 0..4 {
        together(&lane, 64).await;
    }
    assert!(together(&lane, 64).await > 1);
}
