use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::SystemTime;

use smallvec::smallvec;
use uuid::Uuid;

use super::*;
use crate::batch::{Lane, LaneParts, ThreadBudget};
use crate::domain::{
    Arm, BatchSettings, DataType, Digest, ModelSettings, Outcome, Protocol, Recording, RouteReason,
    Shape, Signature, Timings,
};
use crate::engine::fake::FakeModel;
use crate::engine::{EngineError, Model, Session};
use crate::observe::VersionStats;
use crate::route::Mirror;

const PATIENCE: Duration = Duration::from_secs(20);

fn version(number: u64) -> Version {
    Version::new(number).unwrap()
}

fn row(values: [f32; 2]) -> Tensor {
    let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    Tensor::new(DataType::Fp32, Shape::from_slice(&[1, 2]), data.into()).unwrap()
}

/// Shadows, and what they run on.
struct Stage {
    shadows: Shadows,
    observer: Arc<Observer>,
    budget: Arc<ThreadBudget>,
}

impl Stage {
    fn new(settings: Settings) -> Self {
        let observer = Observer::new(crate::observe::Settings::default());
        let budget = Arc::new(ThreadBudget::new(2));
        Self { shadows: Shadows::new(settings, Arc::clone(&observer)), observer, budget }
    }

    fn served(
        &self,
        number: u64,
        digest: u8,
        signature: &Signature,
        session: Box<dyn Session>,
    ) -> Arc<Served> {
        let (model, version) = ("m".parse::<ModelName>().unwrap(), version(number));
        let digest = Digest::new([digest; 32]);
        let stats = VersionStats::new(&self.observer, &model, version, &digest, "fake");
        let lane = Lane::new(LaneParts {
            model: model.clone(),
            version,
            batch: BatchSettings::default(),
            batched: true,
            padding: None,
            sessions: vec![session],
            stats: Arc::clone(&stats),
            budget: Arc::clone(&self.budget),
        });
        Arc::new(Served {
            model,
            version,
            digest,
            engine: "fake",
            signature: signature.clone(),
            settings: ModelSettings::default(),
            lane: lane.unwrap(),
            stats,
            recording: Recording::default(),
            watch: None,
        })
    }

    /// Known to be cheap, so that none waits for another.
    fn fake(&self, number: u64, model: &FakeModel) -> Arc<Served> {
        let served = self.unknown(number, model);
        served.lane.seed(vec![row([0.0; 2])], Duration::from_micros(1));
        served
    }

    /// Nothing is known of what it costs.
    fn unknown(&self, number: u64, model: &FakeModel) -> Arc<Served> {
        let digest = u8::try_from(number).unwrap();
        self.served(number, digest, model.signature(), model.session().unwrap())
    }

    /// Offers a copy of a request that got `outputs`; its prediction id.
    fn offer(
        &self,
        primary: &Arc<Served>,
        shadow: &Arc<Served>,
        input: [f32; 2],
        output: [f32; 2],
    ) -> Uuid {
        let mirrors = smallvec![Mirror { served: Arc::downgrade(shadow), share: 10_000 }];
        let (arm, reason) = (Arm::Stable, RouteReason::Latest);
        let pick = Pick { served: Arc::clone(primary), arm, reason, mirrors };
        let completion = answered(primary, input, output);
        let id = completion.prediction_id;
        self.shadows.offer(&pick, completion, Origin::default());
        id
    }

    fn settle(&self) {
        until(|| self.shadows.in_progress() == 0);
        assert_eq!(self.shadows.bytes(), 0);
    }

    fn page(&self) -> String {
        String::from_utf8(self.observer.page(None).1.to_vec()).unwrap()
    }
}

fn answered(primary: &Served, input: [f32; 2], output: [f32; 2]) -> Completion {
    Completion {
        prediction_id: Uuid::now_v7(),
        request_id: "r".to_owned(),
        received_at: SystemTime::now(),
        model: primary.model.clone(),
        version: Some(primary.version),
        digest: Some(primary.digest),
        arm: Some(Arm::Stable),
        reason: Some(RouteReason::Latest),
        protocol: Protocol::Http,
        principal: None,
        trace: None,
        outcome: Outcome::Ok,
        timings: Timings::default(),
        rows: 1,
        batch_size: 1,
        cached: false,
        shadow_of: None,
        inputs: vec![row(input)],
        outputs: vec![row(output)],
    }
}

fn until(what: impl Fn() -> bool) {
    let end = std::time::Instant::now() + PATIENCE;
    while !what() {
        assert!(std::time::Instant::now() < end, "waited too long");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn outcomes(served: &Served) -> BTreeMap<&'static str, u64> {
    let counts = ShadowOutcome::ALL.iter().map(|outcome| outcome.as_str());
    counts.zip(served.stats.shadow_outcomes()).filter(|(_, count)| *count > 0).collect()
}

/// Says when a run begins, and ends it when the test says so.
struct Gated {
    entered: SyncSender<()>,
    leave: Receiver<()>,
}

impl Session for Gated {
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        self.entered.send(()).unwrap();
        assert!(self.leave.recv_timeout(PATIENCE).is_ok());
        Ok(inputs.to_vec())
    }
}

/// A session, what tells that a run of it began, and what lets it end.
fn gated() -> (Box<dyn Session>, Receiver<()>, SyncSender<()>) {
    let (entered, runs) = sync_channel(64);
    let (release, leave) = sync_channel(64);
    (Box::new(Gated { entered, leave }), runs, release)
}

#[test]
fn a_shadow_is_compared_with_the_answers_output_by_output() {
    let stage = Stage::new(Settings::default());
    let (one, other) = (FakeModel::new(2, 1.0), FakeModel::new(2, 1.25));
    let (primary, shadow) = (stage.fake(1, &one), stage.fake(2, &other));
    let same = stage.offer(&primary, &shadow, [1.0, 2.0], [2.25, 3.25]);
    let ids: Vec<Uuid> =
        (0..9).map(|_| stage.offer(&primary, &shadow, [1.0, -1.0], [2.0, 0.0])).collect();
    stage.settle();

    let pair = stage.shadows.pair(&primary.model, version(2), version(1)).unwrap();
    assert_eq!((pair.compared, pair.agreed, pair.agreement), (10, 1, 0.1));
    let output = &pair.outputs[0];
    assert_eq!((output.name.as_str(), output.datatype, output.elements), ("y", "FP32", 20));
    assert_eq!((output.unequal, output.unlike, output.non_finite, output.top1), (18, 0, 0, None));
    let max_abs = output.max_abs.unwrap();
    assert_eq!((max_abs.count, max_abs.mean, max_abs.max), (10, 0.225, 0.25));
    assert_eq!((max_abs.p50, max_abs.p99), (0.25, 0.25));
    // (2, 0) beside (2.25, 0.25): relative to the larger number, and 1 − 4.5 / (2 √5.125).
    assert_eq!(output.max_rel.unwrap().max, 1.0);
    let distance = 1.0 - 4.5 / (2.0 * 5.125_f64.sqrt());
    assert!((output.cosine_distance.unwrap().max - distance).abs() < 1e-12);
    assert_eq!(output.worst.len(), 9);
    assert!(output.worst.iter().all(|example| ids.contains(&example.prediction_id)));
    assert!(output.worst.iter().all(|example| example.max_abs == Some(0.25)));
    assert!(output.worst.iter().all(|example| example.prediction_id != same));

    assert_eq!(outcomes(&shadow), BTreeMap::from([("compared", 10)]));
    assert_eq!(other.rows.load(Ordering::Relaxed), 10);
    assert_eq!(one.rows.load(Ordering::Relaxed), 0);
    let page = stage.page();
    for line in [
        r#"tidegate_shadow_total{model="m",version="2",outcome="compared"} 10"#,
        r#"tidegate_shadow_total{model="m",version="2",outcome="queue_full"} 0"#,
        r#"tidegate_shadow_agreement{model="m",version="2",primary="1",output="y"} 0.1"#,
    ] {
        assert!(page.contains(line), "{page}");
    }
    assert!(!page.contains("tidegate_requests_total"), "nobody asked for it: {page}");
    let executions = page
        .lines()
        .find(|line| line.starts_with(r#"tidegate_executions_total{model="m",version="2"}"#));
    assert!(executions.is_some_and(|line| !line.ends_with(" 0")), "{page}");

    // The series end with the version.
    drop(shadow);
    until(|| !stage.page().contains(r#"version="2""#));
    assert!(stage.shadows.snapshot(&primary.model, &ModelRoutes::default()).shadows.is_empty());
    assert!(stage.shadows.shared.tallies.lock().pairs.is_empty());
}

#[test]
fn the_worst_examples_are_kept_and_no_more() {
    let stage = Stage::new(Settings { queue_max: 1000, ..Settings::default() });
    let (primary, shadow) =
        (stage.fake(1, &FakeModel::new(2, 0.0)), stage.fake(2, &FakeModel::new(2, 0.0)));
    let ids: Vec<Uuid> = (0..100_u16)
        .map(|at| stage.offer(&primary, &shadow, [0.0, 0.0], [f32::from(at * 7 % 100), 0.0]))
        .collect();
    stage.settle();
    let pair = stage.shadows.pair(&primary.model, version(2), version(1)).unwrap();
    let worst = &pair.outputs[0].worst;
    let off: Vec<f64> = worst.iter().map(|example| example.max_abs.unwrap()).collect();
    let wanted: Vec<f64> = (84..100).rev().map(f64::from).collect();
    assert_eq!(off, wanted);
    let first = (0..100).find(|at| at * 7 % 100 == 99).unwrap();
    assert_eq!(worst[0].prediction_id, ids[first]);
    assert_ne!(worst[0].shadow_prediction_id, ids[first]);
}

#[test]
fn a_full_queue_sheds_and_what_it_took_is_run() {
    let stage = Stage::new(Settings { queue_max: 3, running_max: 1, ..Settings::default() });
    let fake = FakeModel::new(2, 0.0);
    let primary = stage.fake(1, &fake);
    let (session, runs, release) = gated();
    let shadow = stage.served(2, 2, fake.signature(), session);
    let offer = || stage.offer(&primary, &shadow, [1.0, 1.0], [1.0, 1.0]);
    offer();
    runs.recv_timeout(PATIENCE).unwrap();
    // One runs, one is held by the thread for when that is done, three wait.
    for _ in 0..20 {
        offer();
    }
    assert_eq!(
        stage.shadows.in_progress(),
        1 + 20 - usize::try_from(outcomes(&shadow)["queue_full"]).unwrap()
    );
    (0..20).for_each(|_| release.send(()).unwrap());
    stage.settle();
    let outcomes = outcomes(&shadow);
    assert_eq!(outcomes["compared"] + outcomes["queue_full"], 21);
    assert!((4..=5).contains(&outcomes["compared"]), "{outcomes:?}");
}

#[test]
fn copies_keep_no_more_bytes_than_they_may() {
    let stage = Stage::new(Settings { queue_bytes_max: 40, ..Settings::default() });
    let fake = FakeModel::new(2, 0.0);
    let primary = stage.fake(1, &fake);
    let (session, runs, release) = gated();
    let shadow = stage.served(2, 2, fake.signature(), session);
    // Two numbers in, two out: 16 bytes each.
    for _ in 0..3 {
        stage.offer(&primary, &shadow, [1.0, 1.0], [1.0, 1.0]);
    }
    assert_eq!((stage.shadows.in_progress(), stage.shadows.bytes()), (2, 32));
    (0..2).for_each(|_| release.send(()).unwrap());
    stage.settle();
    assert!(runs.try_iter().count() >= 1);
    assert_eq!(outcomes(&shadow), BTreeMap::from([("compared", 2), ("queue_bytes", 1)]));
}

#[test]
fn no_copy_is_made_while_memory_is_short_or_the_gateway_stops() {
    let stage = Stage::new(Settings::default());
    let fake = FakeModel::new(2, 0.0);
    let (primary, shadow) = (stage.fake(1, &fake), stage.fake(2, &fake));
    let short = Arc::new(AtomicBool::new(true));
    let pressed = Arc::clone(&short);
    stage.shadows.shed_when(Box::new(move || pressed.load(Ordering::Relaxed)));
    stage.offer(&primary, &shadow, [1.0, 1.0], [1.0, 1.0]);
    short.store(false, Ordering::Relaxed);
    stage.offer(&primary, &shadow, [1.0, 1.0], [1.0, 1.0]);
    stage.settle();
    stage.shadows.drain();
    stage.offer(&primary, &shadow, [1.0, 1.0], [1.0, 1.0]);
    assert_eq!(stage.shadows.in_progress(), 0);
    let wanted = BTreeMap::from([("compared", 1), ("draining", 1), ("memory", 1)]);
    assert_eq!(outcomes(&shadow), wanted);
}

/// Fails every other run, and panics on the rest.
struct Broken(bool);

impl Session for Broken {
    fn run(&mut self, _: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        self.0 = !self.0;
        assert!(self.0, "told to panic");
        Err(EngineError::Run("told to fail".to_owned()))
    }
}

#[test]
fn a_broken_shadow_is_counted_and_nothing_else() {
    let stage = Stage::new(Settings::default());
    let fake = FakeModel::new(2, 0.0);
    let primary = stage.fake(1, &fake);
    let broken = stage.served(2, 2, fake.signature(), Box::new(Broken(false)));
    // Wants what nobody sends it.
    let wide = FakeModel::new(3, 0.0);
    let other = stage.fake(3, &wide);
    for _ in 0..4 {
        stage.offer(&primary, &broken, [1.0, 1.0], [1.0, 1.0]);
        stage.offer(&primary, &other, [1.0, 1.0], [1.0, 1.0]);
        stage.settle();
    }
    assert_eq!(outcomes(&broken), BTreeMap::from([("failed", 4)]));
    assert_eq!(outcomes(&other), BTreeMap::from([("failed", 4)]));
    assert_eq!(wide.runs.load(Ordering::Relaxed), 0);
    assert_eq!(stage.shadows.pair(&primary.model, version(2), version(1)), None);
}

#[test]
fn a_shadow_that_is_late_is_given_up() {
    let timeout = Duration::from_millis(30);
    let stage = Stage::new(Settings { timeout, running_max: 1, ..Settings::default() });
    let fake = FakeModel::new(2, 0.0);
    let primary = stage.fake(1, &fake);
    let (session, runs, release) = gated();
    let shadow = stage.served(2, 2, fake.signature(), session);
    stage.offer(&primary, &shadow, [1.0, 1.0], [1.0, 1.0]);
    stage.offer(&primary, &shadow, [1.0, 1.0], [1.0, 1.0]);
    stage.settle();
    assert_eq!(outcomes(&shadow), BTreeMap::from([("deadline", 2)]));
    release.send(()).unwrap();
    assert!(runs.try_iter().count() <= 1, "the second was late before it could begin");
}

#[test]
fn a_heavy_shadow_leaves_a_thread_to_requests() {
    let stage = Stage::new(Settings::default());
    let fake = FakeModel::new(2, 0.0);
    let (primary, shadow) = (stage.fake(1, &fake), stage.unknown(2, &fake));
    // One of two threads is in use, and nothing is known of what the shadow costs.
    let used = stage.budget.enter(None);
    stage.offer(&primary, &shadow, [1.0, 1.0], [1.0, 1.0]);
    stage.settle();
    assert_eq!(outcomes(&shadow), BTreeMap::from([("busy", 1)]));
    drop(used);
    stage.offer(&primary, &shadow, [1.0, 1.0], [1.0, 1.0]);
    stage.settle();
    assert_eq!(outcomes(&shadow), BTreeMap::from([("busy", 1), ("compared", 1)]));
}

#[test]
fn versions_are_not_kept_for_their_copies() {
    let stage = Stage::new(Settings { running_max: 1, ..Settings::default() });
    let fake = FakeModel::new(2, 0.0);
    let (primary, second) = (stage.fake(1, &fake), stage.fake(3, &fake));
    let (session, runs, release) = gated();
    let shadow = stage.served(2, 2, fake.signature(), session);
    stage.offer(&primary, &shadow, [1.0, 1.0], [1.0, 1.0]);
    runs.recv_timeout(PATIENCE).unwrap();
    stage.offer(&second, &shadow, [1.0, 1.0], [1.0, 1.0]);
    assert_eq!(Arc::strong_count(&second), 1);
    drop(second);
    release.send(()).unwrap();
    stage.settle();
    assert_eq!(outcomes(&shadow), BTreeMap::from([("compared", 1), ("retired", 1)]));
    until(|| Arc::strong_count(&shadow) == 1);
}

#[test]
fn other_bytes_begin_anew_and_so_does_a_reset() {
    let stage = Stage::new(Settings::default());
    let fake = FakeModel::new(2, 0.0);
    let primary = stage.fake(1, &fake);
    let compared = |shadow: &Arc<Served>| {
        stage.offer(&primary, shadow, [1.0, 1.0], [1.0, 1.0]);
        stage.settle();
        stage.shadows.pair(&primary.model, version(2), version(1)).unwrap().compared
    };
    let of = |digest| stage.served(2, digest, fake.signature(), fake.session().unwrap());
    let (first, again, other) = (of(2), of(2), of(7));
    assert_eq!([compared(&first), compared(&first), compared(&again)], [1, 2, 3]);
    assert_eq!(compared(&other), 1);
    stage.shadows.reset(&primary.model);
    assert_eq!(stage.shadows.pair(&primary.model, version(2), version(1)), None);
    assert_eq!(compared(&other), 1);
}

#[test]
fn a_snapshot_shows_what_runs_and_what_did() {
    let stage = Stage::new(Settings::default());
    let fake = FakeModel::new(2, 0.0);
    let versions = [1, 2, 3, 4].map(|number| (version(number), stage.fake(number, &fake)));
    let mut routes = ModelRoutes { versions: versions.into(), ..ModelRoutes::default() };
    let traffic = serde_json::from_str(
        r#"{"weights": {"1": 1}, "shadows": [{"version": "2", "percent": 12.5}]}"#,
    );
    routes.set_traffic(Some(&traffic.unwrap()), 1);
    let served = |number| &routes.versions[&version(number)];
    stage.offer(served(1), served(3), [1.0, 1.0], [1.0, 2.0]);
    stage.settle();
    let snapshot = stage.shadows.snapshot(&served(1).model, &routes);
    let shown = serde_json::to_value(&snapshot).unwrap();
    assert_eq!(shown["model"], "m");
    let numbers: Vec<_> = snapshot.shadows.iter().map(|shadow| shadow.version.get()).collect();
    assert_eq!(numbers, [2, 3], "one that is to run, and one that did");
    assert_eq!(shown["shadows"][0]["percent"], 12.5);
    assert_eq!(shown["shadows"][0]["pairs"], serde_json::json!([]));
    assert_eq!(shown["shadows"][0]["outcomes"]["compared"], 0);
    let ran = &shown["shadows"][1];
    assert!(ran.get("percent").is_none());
    assert_eq!(ran["outcomes"]["compared"], 1);
    let pair = &ran["pairs"][0];
    assert_eq!((&pair["primary"], &pair["compared"]), (&"1".into(), &1.into()));
    let output = &pair["outputs"][0];
    assert_eq!(output["max_abs"]["max"], 1.0);
    assert!(output.get("top1").is_none());
    assert_eq!(output["worst"][0]["unequal"], 1);
}
