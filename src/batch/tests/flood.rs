//! A real lane under many threads: whatever comes and goes, nothing is lost, doubled, mixed or over a
//! limit, and what was answered with outputs ran once.

use std::collections::HashMap;

use proptest::prelude::*;

use super::*;

const SIZE_MAX: usize = 8;
const ELEMENTS_MAX: usize = 12;

/// Each run: the value of each of its rows.
type Seen = Arc<parking_lot::Mutex<Vec<Vec<f32>>>>;

struct Recording(Seen);

impl Session for Recording {
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        let rows = floats(&inputs[0]).as_chunks::<2>().0.iter().map(|row| row[0]).collect();
        self.0.lock().push(rows);
        std::thread::sleep(Duration::from_micros(200));
        Ok(inputs.to_vec())
    }
}

/// One caller: rows, priority, and how it waits.
#[derive(Clone, Debug)]
enum Caller {
    Patient,
    /// Has so many microseconds.
    Hasty(u64),
    /// Goes away after so many microseconds.
    Leaving(u64),
}

fn caller() -> impl Strategy<Value = (usize, u32, Caller)> {
    let kind = prop_oneof![
        4 => Just(Caller::Patient),
        1 => (0_u64..3000).prop_map(Caller::Hasty),
        1 => (0_u64..3000).prop_map(Caller::Leaving),
    ];
    (1_usize..5, 0_u32..4, kind)
}

async fn answered(lane: &Lane, at: u32, rows: usize, priority: u32, caller: Caller) -> bool {
    let value = f32::from(u16::try_from(at).unwrap());
    let inputs = vec![row(&vec![value; 2 * rows])];
    let wait = match caller {
        Caller::Hasty(micros) => Duration::from_micros(micros),
        Caller::Patient | Caller::Leaving(_) => Duration::from_secs(60),
    };
    let call = lane.infer(inputs, Deadline::new(Instant::now(), wait), priority);
    let result = match caller {
        Caller::Leaving(micros) => {
            let Ok(result) = tokio::time::timeout(Duration::from_micros(micros), call).await else {
                return false;
            };
            result
        }
        Caller::Patient | Caller::Hasty(_) => call.await,
    };
    match result {
        Ok(ran) => {
            assert_eq!(floats(&ran.outputs[0]), vec![value; 2 * rows], "another's rows");
            true
        }
        Err(error) => {
            let expected = [ErrorKind::DeadlineExceeded, ErrorKind::Overloaded];
            assert!(expected.contains(&error.kind()), "{error:?}");
            assert!(!matches!(caller, Caller::Patient), "{error:?}");
            false
        }
    }
}

fn flood(callers: &[(usize, u32, Caller)], sessions: usize, batch: &BatchSettings) {
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(4).enable_all().build().unwrap();
    let seen = Seen::default();
    let session = || -> Box<dyn Session> { Box::new(Recording(Arc::clone(&seen))) };
    let lane = Arc::new(lane_of((0..sessions).map(|_| session()).collect(), batch.clone()));
    let answers = runtime.block_on(async {
        let calls: Vec<_> = (0_u32..)
            .zip(callers)
            .map(|(at, (rows, priority, caller))| {
                let (lane, caller) = (Arc::clone(&lane), caller.clone());
                let (rows, priority) = (*rows, *priority);
                tokio::spawn(async move { answered(&lane, at, rows, priority, caller).await })
            })
            .collect();
        let mut answers = Vec::new();
        for call in calls {
            answers.push(call.await.unwrap());
        }
        answers
    });
    assert_eq!((lane.in_flight(), lane.queue_depth()), (0, 0));
    drop(lane);
    let mut times: HashMap<u32, usize> = HashMap::new();
    for run in &*seen.lock() {
        let mut members: Vec<u32> = run.iter().map(|value| value.to_bits()).collect();
        let rows = members.len();
        members.dedup();
        assert!(members.len() == 1 || rows <= SIZE_MAX, "{run:?}");
        assert!(members.len() == 1 || 2 * rows <= ELEMENTS_MAX, "{run:?}");
        members.into_iter().for_each(|member| *times.entry(member).or_default() += 1);
    }
    for ((at, (.., caller)), ok) in (0_u16..).zip(callers).zip(answers) {
        let runs = times.get(&f32::from(at).to_bits()).copied().unwrap_or(0);
        assert!(runs <= 1, "request {at} ran {runs} times");
        assert!(runs == 1 || !ok, "request {at} was answered without a run");
        assert!(!matches!(caller, Caller::Hasty(0)) || runs == 0, "expired work ran");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn every_caller_gets_its_own_and_every_request_runs_at_most_once(
        callers in prop::collection::vec(caller(), 1..300),
        sessions in 1_usize..4,
        preserve_ordering: bool,
        priority_levels in 3_u32..4,
        wait_us in prop_oneof![Just(0_u64), 0_u64..500],
    ) {
        let batch = BatchSettings {
            size_max: SIZE_MAX,
            elements_max: ELEMENTS_MAX,
            wait_max: Duration::from_micros(wait_us),
            preserve_ordering,
            priority_levels,
            priority_default: 2,
            priority_age: Duration::from_millis(1),
            ..BatchSettings::default()
        };
        flood(&callers, sessions, &batch);
        // Without priorities; cheap runs may be gathered.
        flood(&callers, sessions, &BatchSettings { priority_levels: 0, ..batch });
    }
}
