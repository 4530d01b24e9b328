//! The loop with a clock that tests move: what is carried out, when, and what is not.

use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::time::{advance, sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::control::rollout::machine_tests::plan;
use crate::domain::{
    Arm, Completion, Digest, ErrorKind, Outcome, Protocol, Timings, Traffic, Version,
};
use crate::observe::{Observer, VersionStats};

/// Real counters of two versions, a table, and a journal; refuses what it is told to.
struct FakeDesk {
    observer: Observer,
    stable: Arc<VersionStats>,
    candidate: Arc<VersionStats>,
    inner: Mutex<Inner>,
    began: Instant,
}

#[derive(Default)]
struct Inner {
    table: Option<Traffic>,
    /// Action, actor, and when it was carried out.
    journal: Vec<(String, String, Duration)>,
    refuse: Option<(Action, Refusal)>,
    refused: usize,
    kept: Option<Rollout>,
    saved: usize,
}

fn model() -> ModelName {
    "m".parse().unwrap()
}

fn version(number: u64) -> Version {
    Version::new(number).unwrap()
}

impl FakeDesk {
    fn new() -> Arc<Self> {
        let observer = Observer::default();
        let stats = |number| {
            VersionStats::new(&observer, &model(), version(number), &Digest::new([1; 32]), "fake")
        };
        let (stable, candidate) = (stats(1), stats(2));
        let table = Some(Traffic::all_to(version(1)));
        let inner = Mutex::new(Inner { table, ..Inner::default() });
        Arc::new(Self { observer, stable, candidate, inner, began: Instant::now() })
    }

    fn serve(&self, number: u64, outcome: &Outcome, times: usize) {
        let stats = if number == 1 { &self.stable } else { &self.candidate };
        let arm = Some(if number == 1 { Arm::Stable } else { Arm::Canary });
        for _ in 0..times {
            self.observer.completed(Some(stats), &completion(arm.clone(), outcome.clone()));
        }
    }

    fn journal(&self) -> Vec<String> {
        self.inner.lock().journal.iter().map(|(action, ..)| action.clone()).collect()
    }

    fn share(&self) -> u16 {
        let inner = self.inner.lock();
        let shares = inner.table.as_ref().map(Traffic::shares).unwrap_or_default();
        shares.get(&version(2)).copied().unwrap_or(0)
    }
}

fn completion(arm: Option<Arm>, outcome: Outcome) -> Completion {
    Completion {
        prediction_id: uuid::Uuid::nil(),
        request_id: String::new(),
        received_at: std::time::SystemTime::UNIX_EPOCH,
        model: model(),
        version: None,
        digest: None,
        arm,
        reason: None,
        protocol: Protocol::Http,
        principal: None,
        trace: None,
        outcome,
        timings: Timings { total: Duration::from_micros(300), ..Timings::default() },
        rows: 1,
        batch_size: 1,
        cached: false,
        shadow_of: None,
        inputs: Vec::new(),
        outputs: Vec::new(),
    }
}

fn failed() -> Outcome {
    Outcome::Failed { kind: ErrorKind::ModelFailed, message: String::new() }
}

impl Desk for FakeDesk {
    fn observe(&self, rollout: &Rollout) -> Observation {
        let table = self.inner.lock().table.clone();
        let (two, one) = (Some(&self.candidate), Some(&self.stable));
        Observation::of(
            (rollout.candidate, two),
            one,
            table,
            Default::default(),
            Default::default(),
        )
    }

    async fn apply(&self, change: Change<'_>) -> Result<(), Refusal> {
        // As a store would.
        sleep(Duration::from_millis(2)).await;
        let mut inner = self.inner.lock();
        let Change { before, rollout, decision, call } = change;
        if let Some((_, refusal)) =
            inner.refuse.as_ref().filter(|(action, _)| *action == decision.action)
        {
            let refusal = refusal.clone();
            inner.refused += 1;
            return Err(refusal);
        }
        if let Some(table) = &decision.traffic {
            if before.is_some_and(|before| !before.owns(inner.table.as_ref())) {
                let (expected, current) = ("ours".into(), "another".into());
                return Err(Refusal::Stale { expected, current });
            }
            inner.table = Some(table.clone());
        }
        let at = self.began.elapsed();
        inner.journal.push((decision.action.as_str().to_owned(), call.actor.clone(), at));
        inner.kept = Some(rollout.clone());
        Ok(())
    }

    async fn save(&self, rollout: &Rollout) -> Result<(), Refusal> {
        let mut inner = self.inner.lock();
        inner.kept = Some(rollout.clone());
        inner.saved += 1;
        Ok(())
    }

    async fn alarmed(&self) {
        let alarm = self.observer.alarm();
        alarm.notified().await;
    }
}

/// Answers what it is told to, and notes what it was asked and told.
#[derive(Default)]
struct FakeCallout {
    answers: Mutex<Vec<HookAnswer>>,
    asked: Mutex<Vec<String>>,
    told: Mutex<Vec<HookKind>>,
}

impl Callout for FakeCallout {
    fn ask(&self, notice: Notice) -> Answering {
        self.asked.lock().push(notice.id);
        let answer = self.answers.lock().pop();
        Box::pin(async move {
            sleep(Duration::from_millis(50)).await;
            match answer {
                Some(answer) => answer,
                None => std::future::pending().await,
            }
        })
    }

    fn tell(&self, notice: Notice) {
        self.told.lock().push(notice.kind);
    }
}

struct World {
    desk: Arc<FakeDesk>,
    callout: Arc<FakeCallout>,
    handle: Handle,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl World {
    fn new() -> Self {
        Self::over(FakeDesk::new(), Vec::new())
    }

    fn over(desk: Arc<FakeDesk>, under_way: Vec<Rollout>) -> Self {
        let callout = Arc::new(FakeCallout::default());
        let calls: Arc<dyn Callout> = Arc::clone(&callout) as Arc<dyn Callout>;
        let (handle, controller) = Controller::new(Arc::clone(&desk), Some(calls), under_way);
        let stop = CancellationToken::new();
        let stopped = stop.clone();
        let task = tokio::spawn(async move { controller.run(stopped.cancelled()).await });
        Self { desk, callout, handle, stop, task }
    }

    async fn start(&self, text: Value) -> Result<Arc<Rollout>, Refusal> {
        let call = Call { actor: "alice".into(), ..Call::default() };
        self.handle.start(start(plan(text)), call).await
    }

    async fn command(&self, command: Command) -> Result<Arc<Rollout>, Refusal> {
        let id = self.live().id.clone();
        let call = Call { actor: "bob".into(), ..Call::default() };
        self.handle.command(&model(), &id, command, call).await
    }

    fn live(&self) -> Arc<Rollout> {
        self.handle.live(&model()).unwrap()
    }
}

fn start(plan: super::super::Plan) -> Start {
    let before = Traffic::all_to(version(1));
    Start { model: model(), candidate: version(2), stable: version(1), plan, before }
}

fn short() -> Value {
    json!({
        "candidate": "2", "interval_s": 10,
        "steps": [
            {"weight": 5, "bake_s": 20, "min_samples": 100},
            {"weight": 50, "bake_s": 20, "min_samples": 100},
        ],
    })
}

/// Time for the loop to look and to act.
async fn seconds(count: u64) {
    for _ in 0..count * 10 {
        sleep(Duration::from_millis(100)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_rollout_runs_by_itself_from_start_to_promotion() {
    let world = World::new();
    let rollout = world.start(short()).await.unwrap();
    assert_eq!((rollout.state, world.desk.share()), (State::Step { step: 0 }, 500));
    world.desk.serve(1, &Outcome::Ok, 1_900);
    world.desk.serve(2, &Outcome::Ok, 100);
    seconds(22).await;
    assert_eq!(world.desk.share(), 5_000);
    world.desk.serve(1, &Outcome::Ok, 200);
    world.desk.serve(2, &Outcome::Ok, 200);
    seconds(22).await;
    assert_eq!(world.desk.share(), 10_000);
    assert_eq!(world.desk.journal(), ["set_traffic", "set_traffic", "promote"]);
    let actors: Vec<String> =
        world.desk.inner.lock().journal.iter().map(|(_, actor, _)| actor.clone()).collect();
    assert_eq!(actors, ["alice", CONTROLLER, CONTROLLER]);
    assert_eq!(*world.callout.told.lock(), [HookKind::Step, HookKind::Step, HookKind::Promoted]);
    let kept = world.desk.inner.lock().kept.clone();
    assert_eq!(kept.unwrap().state, State::Promoted);
    assert!(world.desk.inner.lock().saved >= 2, "progress is saved each interval");
    assert_eq!(world.live().state, State::Promoted);
    // Another may follow.
    world.desk.inner.lock().table = Some(Traffic::all_to(version(1)));
    assert!(world.start(short()).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_burst_of_failures_is_acted_upon_at_once() {
    let world = World::new();
    world.start(short()).await.unwrap();
    sleep(Duration::from_millis(3_310)).await;
    let before = world.desk.began.elapsed();
    // What was there before the rollout does not count, and neither does what callers got wrong.
    let wrong = Outcome::Failed { kind: ErrorKind::InvalidInput, message: String::new() };
    world.desk.serve(2, &wrong, 50);
    sleep(Duration::from_millis(100)).await;
    assert_eq!(world.desk.share(), 500);
    world.desk.serve(2, &failed(), 5);
    sleep(Duration::from_millis(30)).await;
    assert_eq!((world.desk.share(), world.live().state), (0, State::RolledBack));
    let (action, actor, at) = world.desk.inner.lock().journal.last().cloned().unwrap();
    assert_eq!((&*action, &*actor), ("roll_back", CONTROLLER));
    assert!(at - before < Duration::from_millis(130), "{:?}", at - before);
    assert_eq!(world.callout.told.lock().last(), Some(&HookKind::RolledBack));
    // It is over: nobody watches the versions any more.
    world.desk.serve(2, &failed(), 9);
    assert_eq!(world.desk.candidate.split_totals().failures_in_a_row, 5);
}

#[tokio::test(start_paused = true)]
async fn many_failures_bring_few_looks() {
    let world = World::new();
    let mut text = short();
    text["guards"] = json!({"error_rate": null, "floor": null});
    world.start(text).await.unwrap();
    // A look takes the whole table, so each shows in how often the counters are read; here by how
    // often the record is replaced.
    let mut looks = 0;
    let mut last = world.live();
    for _ in 0..1_000 {
        world.desk.serve(2, &failed(), 1);
        sleep(Duration::from_millis(1)).await;
        let now = world.live();
        looks += usize::from(!Arc::ptr_eq(&now, &last));
        last = now;
    }
    assert!((30..=60).contains(&looks), "{looks} looks in a second");
}

#[tokio::test(start_paused = true)]
async fn a_rollback_is_tried_until_it_works() {
    let world = World::new();
    world.start(short()).await.unwrap();
    let refusal = Refusal::Unavailable("the disk is full".into());
    world.desk.inner.lock().refuse = Some((Action::RollBack, refusal));
    world.desk.serve(2, &failed(), 5);
    seconds(5).await;
    assert_eq!((world.live().state, world.desk.share()), (State::RollingBack, 500));
    assert!(world.desk.inner.lock().refused >= 4);
    assert!(matches!(world.command(Command::Pause).await, Err(Refusal::Conflict(_))));
    world.desk.inner.lock().refuse = None;
    seconds(2).await;
    assert_eq!((world.live().state, world.desk.share()), (State::RolledBack, 0));
    assert_eq!(world.desk.journal(), ["set_traffic", "roll_back"]);
    // Somebody is faster: that table stays.
    let world = World::new();
    world.start(short()).await.unwrap();
    let refusal = Refusal::Unavailable("the disk is full".into());
    world.desk.inner.lock().refuse = Some((Action::RollBack, refusal));
    world.desk.serve(2, &failed(), 5);
    seconds(3).await;
    let by_hand = Traffic { weights: [(version(3), 1.0)].into(), ..Traffic::default() };
    world.desk.inner.lock().table = Some(by_hand.clone());
    world.desk.inner.lock().refuse = None;
    seconds(3).await;
    assert_eq!(
        (world.live().state, &world.desk.inner.lock().table),
        (State::Aborted, &Some(by_hand))
    );
}

#[tokio::test(start_paused = true)]
async fn what_is_refused_for_good_pauses_and_what_is_not_is_tried_again() {
    let world = World::new();
    world.start(short()).await.unwrap();
    world.desk.serve(1, &Outcome::Ok, 1_900);
    world.desk.serve(2, &Outcome::Ok, 100);
    world.desk.inner.lock().refuse = Some((Action::SetTraffic, Refusal::Internal("later".into())));
    seconds(45).await;
    assert_eq!(world.live().state, State::Step { step: 0 });
    assert!(world.desk.inner.lock().refused >= 2);
    world.desk.inner.lock().refuse =
        Some((Action::SetTraffic, Refusal::Forbidden("no approval".into())));
    seconds(12).await;
    let live = world.live();
    assert!(matches!(live.state, State::Paused { .. }), "{:?}", live.state);
    assert_eq!(live.reason.as_ref().unwrap().message, "no approval");
    assert_eq!(world.desk.share(), 500);
    // Somebody approves, and goes on.
    world.desk.inner.lock().refuse = None;
    world.command(Command::Resume).await.unwrap();
    seconds(12).await;
    assert_eq!(world.desk.share(), 5_000);
    // A command that is refused changes nothing.
    world.desk.inner.lock().refuse = Some((Action::Abort, Refusal::NeedsReason));
    assert_eq!(world.command(Command::Abort).await.unwrap_err(), Refusal::NeedsReason);
    assert_eq!((world.live().state, world.desk.share()), (State::Step { step: 1 }, 5_000));
    world.desk.inner.lock().refuse = None;
    world.command(Command::Abort).await.unwrap();
    assert_eq!(world.desk.share(), 0);
    assert_eq!(world.callout.told.lock().last(), Some(&HookKind::Ended));
}

#[tokio::test(start_paused = true)]
async fn a_start_is_refused_with_every_reason() {
    let world = World::new();
    let unchecked: super::super::Plan =
        serde_json::from_value(json!({"candidate": "2", "interval_s": 0, "alpha": 0})).unwrap();
    let refused = world.handle.start(start(unchecked), Call::default()).await.unwrap_err();
    assert!(matches!(refused, Refusal::Invalid(problems) if problems.len() == 2));
    let first = world.start(short()).await.unwrap();
    assert!(matches!(world.start(short()).await, Err(Refusal::Conflict(_))));
    let unknown = world.handle.command(&model(), "x", Command::Abort, Call::default()).await;
    assert!(matches!(unknown, Err(Refusal::NotFound(_))));
    assert_eq!(world.live().id, first.id);
    // Who cannot be asked.
    let (handle, controller) = Controller::new(FakeDesk::new(), None, Vec::new());
    let task = tokio::spawn(controller.run(std::future::pending()));
    let asks = plan(json!({"candidate": "2", "hooks": ["confirm-rollout"]}));
    let refused = handle.start(start(asks), Call::default()).await.unwrap_err();
    assert!(
        matches!(refused, Refusal::Invalid(problems) if problems[0].contains("confirm-rollout"))
    );
    task.abort();
    assert!(task.await.is_err());
    let gone = handle.start(start(plan(short())), Call::default()).await;
    assert!(matches!(gone, Err(Refusal::Unavailable(_))));
}

#[tokio::test(start_paused = true)]
async fn hooks_are_asked_and_their_answers_taken() {
    let world = World::new();
    let mut text = short();
    text["hooks"] = json!(["confirm-rollout", "confirm-promotion", "promoted"]);
    *world.callout.answers.lock() =
        vec![HookAnswer::Go, HookAnswer::None("away".into()), HookAnswer::Go];
    let rollout = world.start(text).await.unwrap();
    assert_eq!((rollout.state.as_str(), world.desk.share()), ("pending_hook", 0));
    seconds(1).await;
    assert_eq!(world.desk.share(), 500);
    for _ in 0..2 {
        world.desk.serve(1, &Outcome::Ok, if world.desk.share() == 500 { 1_900 } else { 100 });
        world.desk.serve(2, &Outcome::Ok, 100);
        seconds(22).await;
    }
    // Nobody answered what was asked at the end.
    assert!(matches!(world.live().state, State::Paused { .. }), "{:?}", world.live().waiting_for);
    world.command(Command::Resume).await.unwrap();
    seconds(1).await;
    assert_eq!((world.live().state, world.desk.share()), (State::Promoted, 10_000));
    let asked = world.callout.asked.lock().clone();
    assert_eq!(asked.len(), 3);
    assert!(asked[0].starts_with(&rollout.id) && asked[0].contains("confirm-rollout"));
    assert_ne!(asked[1], asked[2], "after a pause it is another question");
    assert_eq!(*world.callout.told.lock(), [HookKind::Promoted]);
}

#[tokio::test(start_paused = true)]
async fn a_restart_goes_on_where_it_stood() {
    let world = World::new();
    let mut text = short();
    text["hooks"] = json!(["confirm-promotion"]);
    world.start(text).await.unwrap();
    world.desk.serve(1, &Outcome::Ok, 1_900);
    world.desk.serve(2, &Outcome::Ok, 100);
    seconds(15).await;
    world.stop.cancel();
    timeout(Duration::from_secs(1), world.task).await.unwrap().unwrap();
    let kept = world.desk.inner.lock().kept.clone().unwrap();
    assert!(kept.progress.ms >= 14_000 && kept.evidence.candidate().requests == 100);
    let written = serde_json::to_string(&kept).unwrap();
    // Another process: its counters begin at nothing.
    let desk = FakeDesk::new();
    desk.inner.lock().table = world.desk.inner.lock().table.clone();
    let world = World::over(desk, vec![serde_json::from_str(&written).unwrap()]);
    assert_eq!(world.live().state, State::Step { step: 0 });
    seconds(8).await;
    assert_eq!(world.desk.share(), 5_000, "six seconds were left");
    world.desk.serve(1, &Outcome::Ok, 1_000);
    world.desk.serve(2, &Outcome::Ok, 1_000);
    seconds(22).await;
    assert_eq!(world.live().state.as_str(), "pending_hook");
    let asked = world.callout.asked.lock().clone();
    let written = serde_json::to_string(&*world.live()).unwrap();
    let desk = FakeDesk::new();
    desk.inner.lock().table = world.desk.inner.lock().table.clone();
    let again = World::over(desk, vec![serde_json::from_str(&written).unwrap()]);
    seconds(1).await;
    assert_eq!(*again.callout.asked.lock(), asked, "the same question has the same id");
}

#[tokio::test(start_paused = true)]
async fn a_table_set_by_hand_is_left_alone() {
    let world = World::new();
    world.start(short()).await.unwrap();
    advance(Duration::from_millis(1)).await;
    let by_hand =
        Traffic { weights: [(version(1), 70.0), (version(2), 30.0)].into(), ..Traffic::default() };
    world.desk.inner.lock().table = Some(by_hand.clone());
    world.handle.look_soon();
    sleep(Duration::from_millis(50)).await;
    assert_eq!(world.live().state, State::Aborted);
    assert_eq!(world.desk.inner.lock().table, Some(by_hand));
    assert_eq!(world.desk.journal(), ["set_traffic", "abort"]);
    assert_eq!(*world.callout.told.lock(), [HookKind::Step, HookKind::Ended]);
}

#[tokio::test(start_paused = true)]
async fn commands_have_a_bound() {
    let desk = FakeDesk::new();
    // A loop that does not run.
    let (handle, _controller) = Controller::new(desk, None, Vec::new());
    let mut waiting = Vec::new();
    for _ in 0..ORDERS_MAX {
        let handle = handle.clone();
        waiting.push(tokio::spawn(async move {
            handle.command(&model(), "x", Command::Abort, Call::default()).await
        }));
    }
    sleep(Duration::from_millis(1)).await;
    let full = handle.command(&model(), "x", Command::Abort, Call::default()).await;
    assert!(matches!(full, Err(Refusal::Unavailable(_))));
    waiting.iter().for_each(tokio::task::JoinHandle::abort);
}
