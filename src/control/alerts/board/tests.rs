//! When alerts fire, are over, and are told; time goes by as the tests say.

use super::*;
use crate::control::alerts::condition::FeatureDetail;
use crate::control::alerts::receiver::Target;
use crate::secret::SecretRef;

const HOUR: u64 = 3600;
const DAY: u64 = 24 * HOUR;

pub(in crate::control::alerts) fn receiver(name: &str, url: &str) -> Receiver {
    Receiver {
        name: name.to_owned(),
        target: Target::CloudEvents { url: crate::outbound::parse_url(url).unwrap() },
        secret: SecretRef::Env("NO_SUCH_VARIABLE".to_owned()),
        models: None,
        kinds: Kind::ALL.to_vec(),
        severity_min: Severity::Info,
        resolved: true,
        repeat: Duration::from_secs(DAY),
        cooldown: Duration::ZERO,
    }
}

pub(in crate::control::alerts) fn subject(kind: Kind, about: &str) -> Subject {
    let (arm, about) = ("stable".to_owned(), about.to_owned());
    Subject { version: Version::new(2).unwrap(), arm, kind, about }
}

pub(in crate::control::alerts) fn held() -> Found {
    let feature = FeatureDetail {
        feature: "income".to_owned(),
        tensor: "x".to_owned(),
        rows: 700,
        scores: BTreeMap::from([("cell_psi".to_owned(), 0.4)]),
        limits: BTreeMap::from([("cell_psi".to_owned(), 0.1)]),
        p_value: Some(1e-9),
        ..FeatureDetail::default()
    };
    let detail = Detail {
        window: Some("hour".to_owned()),
        rows: 700,
        features: vec![feature],
        features_beyond: 1,
        ..Detail::default()
    };
    Found::Holds(Box::new(detail))
}

/// One model, and the clock.
struct Sim {
    board: Board,
    receivers: Vec<Receiver>,
    model: ModelName,
    now: Timestamp,
    started: Timestamp,
    room: usize,
}

impl Sim {
    fn new(receivers: Vec<Receiver>) -> Self {
        let now: Timestamp = "2026-11-26T12:00:00Z".parse().unwrap();
        // It has been looking for a day.
        let started = now - SignedDuration::from_hours(24);
        let model = "loans".parse().unwrap();
        Self { board: Board::default(), receivers, model, now, started, room: 10 }
    }

    fn wait(&mut self, seconds: u64) {
        self.now = after(self.now, Duration::from_secs(seconds));
    }

    fn seen(&mut self, found: &[(Subject, Found)]) -> Seen {
        let found = found.iter().cloned().collect();
        let times =
            Times { for_: Duration::from_secs(300), keep_firing_for: Duration::from_secs(900) };
        let look = Look { times, now: self.now, started: self.started, room: self.room };
        let seen = self.board.look(&self.model, &found, &self.receivers, &look);
        self.board.plan(&self.receivers, self.now);
        seen
    }

    fn look(&mut self, found: &[(Subject, Found)]) -> Vec<Change> {
        self.seen(found).changes
    }

    /// An alert that has just fired.
    fn fired(&mut self, subject: &Subject) -> Alert {
        let holds = [(subject.clone(), held())];
        assert_eq!(self.look(&holds), [], "not at once");
        self.wait(300);
        match &self.look(&holds)[..] {
            [Change::Fired(alert)] => alert.clone(),
            other => panic!("{other:?}"),
        }
    }

    /// Ends what is pending for a receiver; its event's id.
    fn told(&mut self, receiver: &str, state: Progress) -> Option<String> {
        let (alert, phase, number) = self.board.next(receiver)?;
        let id = alert.event_id(phase, number);
        let (alert, receiver) = (alert.id.clone(), receiver.to_owned());
        let ending = Ending { alert, receiver, phase, state, detail: None };
        assert!(self.board.ended(&ending, self.now));
        assert!(!self.board.ended(&ending, self.now), "it ended already");
        Some(id)
    }

    fn restart(&mut self) {
        let kept = serde_json::to_value(&self.board.books).unwrap();
        self.board = Board::of(serde_json::from_value(kept).unwrap());
        self.started = self.now;
    }

    fn progress(&self, at: usize, receiver: &str) -> Progress {
        self.board.books.alerts[at].deliveries[receiver].firing.state
    }
}

fn drift() -> Subject {
    subject(Kind::Drift, "inputs")
}

fn ops() -> Receiver {
    receiver("ops", "https://ops.example/")
}

fn pipeline() -> Receiver {
    Receiver {
        resolved: false,
        repeat: Duration::ZERO,
        cooldown: Duration::from_secs(DAY),
        ..receiver("train", "https://ci.example/")
    }
}

#[test]
fn it_fires_once_and_is_resolved_once() {
    let mut sim = Sim::new(vec![ops()]);
    let alert = sim.fired(&drift());
    assert_eq!(alert.summary, "1 input of loans version 2 (stable) drifted: income");
    assert_eq!(alert.severity, Severity::Warning);
    assert_eq!((alert.fired_at, alert.since), (sim.now, sim.now - SignedDuration::from_secs(300)));
    let first = sim.told("ops", Progress::Delivered).unwrap();
    assert_eq!(first, format!("{}-firing-1", alert.id));
    for _ in 0..60 {
        sim.wait(60);
        assert_eq!(sim.look(&[(drift(), held())]), []);
        assert_eq!(sim.told("ops", Progress::Delivered), None, "once");
    }
    assert_eq!(sim.look(&[(drift(), Found::Clear)]), []);
    sim.wait(900);
    let changes = sim.look(&[(drift(), Found::Clear)]);
    let [Change::Resolved(over)] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!((&over.id, over.resolved_at), (&alert.id, Some(sim.now)));
    assert_eq!(over.resolution.as_deref(), Some(CLEAR));
    assert_eq!(sim.told("ops", Progress::Delivered), Some(format!("{}-resolved", alert.id)));
    assert_eq!(sim.told("ops", Progress::Delivered), None);
    // Another time it is another alert.
    assert_ne!(sim.fired(&drift()).id, alert.id);
    assert_eq!(sim.board.books.alerts.len(), 2);
}

#[test]
fn what_comes_and_goes_neither_fires_nor_resolves() {
    let mut sim = Sim::new(vec![ops()]);
    for at in 0..40 {
        let found = [held(), Found::Clear, held(), Found::Unknown][at % 4].clone();
        assert_eq!(sim.look(&[(drift(), found)]), []);
        sim.wait(200);
    }
    let alert = sim.fired(&drift());
    for at in 0..40 {
        // Too few rows to say is no good news either.
        let found = [Found::Clear, held(), Found::Clear, Found::Unknown][at % 4].clone();
        assert_eq!(sim.look(&[(drift(), found)]), []);
        sim.wait(800);
    }
    assert_eq!(sim.board.firing().map(|firing| &*firing.id).collect::<Vec<_>>(), [alert.id]);
}

#[test]
fn a_version_that_goes_away_takes_its_alerts_along() {
    let mut sim = Sim::new(vec![ops()]);
    let alert = sim.fired(&drift());
    assert_eq!(sim.look(&[]), []);
    sim.wait(899);
    assert_eq!(sim.look(&[]), []);
    sim.wait(1);
    let changes = sim.look(&[]);
    let [Change::Resolved(over)] = &changes[..] else { panic!("{changes:?}") };
    assert_eq!((&over.id, over.resolution.as_deref()), (&alert.id, Some(GONE)));
}

#[test]
fn a_restart_tells_nobody_twice_and_forgets_nobody() {
    let mut sim = Sim::new(vec![ops(), receiver("away", "https://away.example/")]);
    let alert = sim.fired(&drift());
    sim.told("ops", Progress::Delivered).unwrap();
    let waiting = |sim: &Sim| {
        let (alert, phase, number) = sim.board.next("away").unwrap();
        alert.event_id(phase, number)
    };
    let before = waiting(&sim);
    sim.restart();
    // Versions are still being loaded, for longer than alerts are kept firing without them.
    for _ in 0..9 {
        assert_eq!(sim.look(&[]), []);
        sim.wait(60);
    }
    for _ in 0..30 {
        assert_eq!(sim.look(&[(drift(), Found::Unknown)]), []);
        assert_eq!(sim.look(&[(drift(), held())]), []);
        sim.wait(60);
    }
    assert_eq!(sim.board.firing().next().unwrap().id, alert.id);
    assert_eq!(sim.board.next("ops"), None, "told before");
    assert_eq!(waiting(&sim), before, "the same event, by the same id");
    assert_eq!(sim.told("away", Progress::Delivered), Some(before));
}

#[test]
fn what_was_there_since_the_start_may_go_at_once() {
    let mut sim = Sim::new(vec![ops()]);
    sim.fired(&drift());
    sim.restart();
    sim.look(&[(drift(), held())]);
    sim.look(&[]);
    sim.wait(900);
    // A start is no excuse for one that has been seen.
    sim.started = sim.now;
    let changes = sim.look(&[]);
    assert!(matches!(&changes[..], [Change::Resolved(_)]), "{changes:?}");
    // Not even for one that went when it had just fired.
    sim.fired(&drift());
    sim.started = sim.now;
    sim.look(&[]);
    sim.wait(900);
    sim.started = sim.now;
    assert_eq!(sim.look(&[]).len(), 1);
    // For one that has not been seen it is, for a while.
    sim.fired(&drift());
    sim.restart();
    for _ in 0..10 {
        assert_eq!(sim.look(&[]), []);
        sim.wait(60);
    }
    assert_eq!(sim.look(&[]), []);
    sim.wait(900);
    assert_eq!(sim.look(&[]).len(), 1);
}

#[test]
fn it_is_told_again_after_a_while_and_sooner_when_nobody_heard() {
    let mut sim = Sim::new(vec![ops()]);
    let alert = sim.fired(&drift());
    let after_a_while = |sim: &mut Sim, seconds| {
        sim.wait(seconds - 1);
        sim.look(&[(drift(), held())]);
        assert_eq!(sim.board.next("ops"), None);
        sim.wait(1);
        sim.look(&[(drift(), held())]);
    };
    let id = |number| Some(format!("{}-firing-{number}", alert.id));
    assert_eq!(sim.told("ops", Progress::Failed), id(1));
    after_a_while(&mut sim, HOUR);
    assert_eq!(sim.told("ops", Progress::Refused), id(1), "the same event: nobody heard it");
    after_a_while(&mut sim, DAY);
    assert_eq!(sim.told("ops", Progress::Delivered), id(1));
    after_a_while(&mut sim, DAY);
    assert_eq!(sim.told("ops", Progress::Delivered), id(2));
    // Its end is said until it is heard, and a pipeline is let cool down.
    sim.look(&[(drift(), Found::Clear)]);
    sim.wait(900);
    sim.look(&[(drift(), Found::Clear)]);
    assert_eq!(sim.told("ops", Progress::Failed), Some(format!("{}-resolved", alert.id)));
    sim.wait(HOUR);
    sim.look(&[(drift(), Found::Clear)]);
    assert_eq!(sim.told("ops", Progress::Delivered), Some(format!("{}-resolved", alert.id)));
    let mut sim = Sim::new(vec![pipeline()]);
    sim.fired(&drift());
    sim.told("train", Progress::Failed).unwrap();
    sim.wait(DAY - 1);
    sim.look(&[(drift(), held())]);
    assert_eq!(sim.board.next("train"), None);
    sim.wait(1);
    sim.look(&[(drift(), held())]);
    sim.told("train", Progress::Delivered).unwrap();
    sim.wait(30 * DAY);
    sim.look(&[(drift(), held())]);
    assert_eq!(sim.board.next("train"), None, "never again");
}

#[test]
fn a_repetition_that_a_silence_holds_back_is_another_event() {
    let mut sim = Sim::new(vec![ops()]);
    let alert = sim.fired(&drift());
    sim.told("ops", Progress::Delivered).unwrap();
    sim.wait(DAY - 60);
    let until = after(sim.now, Duration::from_secs(HOUR));
    sim.board.books.silence = Some(Silence { until, reason: "we know".into(), by: "ci".into() });
    sim.wait(120);
    sim.look(&[(drift(), held())]);
    assert_eq!(sim.progress(0, "ops"), Progress::Waiting);
    let mut over = Board::of(sim.board.books.clone());
    sim.wait(HOUR);
    sim.look(&[(drift(), held())]);
    assert_eq!(sim.told("ops", Progress::Delivered), Some(format!("{}-firing-2", alert.id)));
    // Who heard the first time hears of the end, too.
    std::mem::swap(&mut sim.board, &mut over);
    sim.board.books.silence = None;
    sim.board.books.alerts[0].end("over".to_owned(), &[ops()], sim.now);
    assert_eq!(sim.told("ops", Progress::Delivered), Some(format!("{}-resolved", alert.id)));
}

#[test]
fn a_pipeline_cools_down() {
    let mut sim = Sim::new(vec![pipeline()]);
    let outputs = subject(Kind::Drift, "outputs");
    let both = [(drift(), held()), (outputs.clone(), held())];
    sim.look(&both);
    sim.wait(300);
    assert_eq!(sim.look(&both).len(), 2, "two alerts fire at once");
    assert_eq!(
        (sim.progress(0, "train"), sim.progress(1, "train")),
        (Progress::Pending, Progress::Waiting)
    );
    sim.told("train", Progress::Delivered).unwrap();
    assert_eq!(sim.board.next("train"), None, "and start one run");
    // A restart does not shorten it, and neither does an alert that is over and fires again.
    sim.restart();
    for _ in 0..23 {
        sim.wait(HOUR);
        sim.look(&[(drift(), Found::Clear), (outputs.clone(), held())]);
        sim.wait(900);
        sim.look(&[(drift(), Found::Clear), (outputs.clone(), held())]);
        sim.fired(&drift());
        assert_eq!(sim.board.next("train"), None);
        if since(sim.board.books.told_at["train"], sim.now) > Duration::from_secs(DAY - 3 * HOUR) {
            break;
        }
    }
    sim.wait(3 * HOUR);
    sim.look(&both);
    let (second, ..) = sim.board.next("train").unwrap();
    assert_eq!(second.about, "outputs", "what still fires is not lost");
    // A pipeline is never told that it is over.
    sim.told("train", Progress::Delivered).unwrap();
    sim.look(&[(drift(), Found::Clear), (outputs.clone(), Found::Clear)]);
    sim.wait(900);
    assert_eq!(sim.look(&[(drift(), Found::Clear), (outputs, Found::Clear)]).len(), 2);
    assert_eq!(sim.board.next("train"), None);
    let skipped = |alert: &Alert| alert.deliveries["train"].firing.state == Progress::Skipped;
    assert!(sim.board.books.alerts.iter().any(skipped), "it was over before it was told");
}

#[test]
fn a_refusal_began_nothing_that_has_to_cool_down() {
    let mut sim = Sim::new(vec![pipeline()]);
    sim.fired(&drift());
    sim.told("train", Progress::Refused).unwrap();
    sim.fired(&subject(Kind::Quality, "accuracy"));
    assert_eq!(sim.board.next("train").unwrap().0.kind, Kind::Quality);
}

#[test]
fn a_silence_holds_back_what_is_told_and_ends() {
    let mut sim = Sim::new(vec![ops()]);
    let until = after(sim.now, Duration::from_secs(HOUR));
    let silence = Silence { until, reason: "we know".into(), by: "ci".into() };
    sim.board.books.silence = Some(silence);
    let alert = sim.fired(&drift());
    assert_eq!((sim.progress(0, "ops"), sim.board.next("ops")), (Progress::Waiting, None));
    sim.wait(HOUR);
    assert!(sim.seen(&[(drift(), held())]).forgot, "the silence");
    assert_eq!(sim.told("ops", Progress::Delivered), Some(format!("{}-firing-1", alert.id)));
}

#[test]
fn receivers_get_what_they_want() {
    let picky = |change: fn(&mut Receiver)| {
        let mut receiver = ops();
        change(&mut receiver);
        let mut sim = Sim::new(vec![receiver]);
        sim.fired(&drift());
        sim.board.next("ops").is_some()
    };
    assert!(picky(|_| {}));
    assert!(!picky(|one| one.kinds = vec![Kind::Quality]));
    assert!(!picky(|one| one.severity_min = Severity::Critical));
    let patterns = |text: &str| crate::admit::ModelPatterns::parse(&[text]).unwrap();
    assert!(patterns("lo*").unwrap().matches(&"loans".parse().unwrap()));
    assert!(picky(|one| one.models = crate::admit::ModelPatterns::parse(&["lo*"]).unwrap()));
    assert!(!picky(|one| one.models = crate::admit::ModelPatterns::parse(&["fraud"]).unwrap()));
}

#[test]
fn a_receiver_that_went_away_is_not_waited_for() {
    let mut sim = Sim::new(vec![ops()]);
    sim.fired(&drift());
    assert!(sim.board.without(&[], sim.now));
    assert_eq!(sim.progress(0, "ops"), Progress::Skipped);
    assert!(!sim.board.without(&[], sim.now));
    // It comes back, and is told.
    sim.look(&[(drift(), held())]);
    assert_eq!(sim.progress(0, "ops"), Progress::Pending);
}

#[test]
fn alerts_have_room_and_a_document_fits() {
    let mut sim =
        Sim::new((0..16).map(|at| receiver(&format!("{at:064}"), "https://a.example/")).collect());
    sim.room = 1000;
    let long = FeatureDetail {
        feature: "\"".repeat(128),
        tensor: "\"".repeat(128),
        scores: BTreeMap::from([("cell_psi".to_owned(), 0.123_456_789_012_345_67)]),
        limits: BTreeMap::from([("cell_psi".to_owned(), 0.123_456_789_012_345_67)]),
        ..FeatureDetail::default()
    };
    let detail = Detail { features: vec![long; 16], features_beyond: 900, ..Detail::default() };
    let found: Vec<_> = (0..100)
        .map(|at| {
            let version = Version::new(at + 1).unwrap();
            (
                Subject { version, arm: "r".repeat(128), ..drift() },
                Found::Holds(Box::new(detail.clone())),
            )
        })
        .collect();
    sim.look(&found);
    sim.wait(300);
    let seen = sim.seen(&found);
    assert_eq!((seen.changes.len(), seen.without_room), (ALERTS_MAX, 100 - ALERTS_MAX));
    for at in 0..16 {
        let name = format!("{at:064}");
        while let Some((alert, phase, _)) = sim.board.next(&name) {
            let (alert, receiver) = (alert.id.clone(), name.clone());
            let detail = Some("€".repeat(1000));
            let ending = Ending { alert, receiver, phase, state: Progress::Delivered, detail };
            assert!(sim.board.ended(&ending, sim.now));
        }
    }
    for told in sim.board.books.alerts.iter_mut().flat_map(|alert| alert.deliveries.values_mut()) {
        assert!(told.firing.detail.as_ref().is_some_and(|said| said.len() <= SAID_BYTES_MAX));
        told.resolved = Some(told.firing.clone());
    }
    let bytes = serde_json::to_vec(&sim.board.books).unwrap().len();
    assert!(bytes <= crate::control::store::BODY_BYTES_MAX, "{bytes}");
    // Of all models together there is a limit, too.
    let mut sim = Sim::new(vec![]);
    sim.room = 1;
    sim.look(&found);
    sim.wait(300);
    let seen = sim.seen(&found);
    assert_eq!((seen.changes.len(), seen.without_room), (1, 99));
}

#[test]
fn what_is_over_is_forgotten_in_time() {
    let mut sim = Sim::new(vec![ops()]);
    sim.fired(&drift());
    sim.told("ops", Progress::Delivered).unwrap();
    sim.look(&[(drift(), Found::Clear)]);
    sim.wait(900);
    sim.look(&[(drift(), Found::Clear)]);
    sim.wait(8 * DAY);
    sim.look(&[(drift(), Found::Clear)]);
    assert_eq!(sim.board.books.alerts.len(), 1, "its end was not told yet");
    sim.told("ops", Progress::Delivered).unwrap();
    assert!(sim.seen(&[(drift(), Found::Clear)]).forgot);
    assert_eq!(sim.board.books.alerts, []);
    sim.wait(40 * DAY);
    sim.look(&[]);
    assert!(sim.board.is_empty());
    // A clock that goes back neither fires nor resolves anything.
    sim.fired(&drift());
    sim.now -= SignedDuration::from_hours(400);
    assert_eq!(sim.look(&[(drift(), Found::Clear)]), []);
    assert_eq!(sim.board.firing().count(), 1);
}
