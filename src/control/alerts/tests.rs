//! The whole of it: a real store, real HTTP receivers on this machine, and reports as the test says.

use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use super::board::tests::receiver;
use super::*;
use crate::control::store::{EventQuery, SqliteStore};
use crate::drift::counters::Score;
use crate::drift::feature::Role;
use crate::drift::verdict::State;
use crate::monitor::{ArmReport, Counted, FeatureReport, ReferenceReport, WindowReport};
use crate::outbound::recorder::{Received, Recorder};
use crate::secret::SecretRef;

pub(super) const SECRET: &str = "0123456789abcdef0123456789abcdef";

/// A secret's reference, and its file for as long as it is held.
pub(super) fn secret_file() -> (SecretRef, tempfile::NamedTempFile) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), SECRET).unwrap();
    (SecretRef::File(file.path().to_owned()), file)
}

/// The type and the id of each event that was received.
fn events(recorder: &Recorder) -> Vec<(String, String)> {
    let event = |received: Received| {
        let event: Value = serde_json::from_slice(&received.body).unwrap();
        assert_eq!(event["id"], received.header("webhook-id"));
        let text = |name: &str| event[name].as_str().unwrap().to_owned();
        (text("type"), text("id"))
    };
    recorder.received().into_iter().map(event).collect()
}

/// One version, and whether its one input has drifted.
#[derive(Clone)]
struct World(Arc<Mutex<State>>);

impl Sight for World {
    fn served(&self) -> BTreeMap<ModelName, Vec<Version>> {
        BTreeMap::from([(loans(), vec![Version::new(2).unwrap()])])
    }

    fn rows(&self, _: &ModelName) -> Vec<Arc<VersionReport>> {
        let state = *self.0.lock();
        let feature = FeatureReport {
            feature: "income".to_owned(),
            role: Role::Input,
            tensor: "x".to_owned(),
            rows: 1000,
            state,
            scores: BTreeMap::from([(Score::CellPsi, 0.4)]),
            beyond: BTreeMap::from([(Score::CellPsi, 0.1)]),
            p_value: Some(1e-9),
            ln_evidence: None,
            alarm: false,
            constant: false,
            mean: None,
            odd: BTreeMap::new(),
        };
        let features = vec![feature];
        let window =
            WindowReport { window: "hour", since: None, rows: 1000, state, drifted: 1, features };
        let (total, own) = (Counted::default(), Counted::default());
        let arm = ArmReport {
            arm: "stable".to_owned(),
            total,
            own,
            windows: vec![window],
            confidence_drop: Vec::new(),
            new_categories: Vec::new(),
        };
        vec![Arc::new(VersionReport {
            model: "loans".to_owned(),
            version: "2".to_owned(),
            model_digest: String::new(),
            reference: ReferenceReport { kind: "file", ..ReferenceReport::default() },
            skipped_rows: 0,
            arms: vec![arm],
        })]
    }

    fn labels(&self, _: &ModelName, _: Option<u32>) -> Report {
        let (model, from, to) = ("loans".to_owned(), String::new(), String::new());
        Report { model, from, to, versions: Vec::new() }
    }
}

fn loans() -> ModelName {
    "loans".parse().unwrap()
}

/// A gateway's state, whose alerts can be started again.
struct Bench {
    world: World,
    store: Arc<SqliteStore>,
    /// Whether the disk is full.
    full: Arc<Mutex<bool>>,
    settings: Settings,
    _state: tempfile::TempDir,
    _secret: tempfile::NamedTempFile,
}

struct Running {
    alerts: Alerts,
    stop: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

impl Running {
    async fn stop(self) {
        drop(self.stop);
        timeout(Duration::from_secs(20), self.task).await.unwrap().unwrap();
    }
}

impl Bench {
    fn new(urls: &[(&str, String)]) -> Self {
        let state = tempfile::tempdir().unwrap();
        let (secret, file) = secret_file();
        let receivers = urls
            .iter()
            .map(|(name, url)| Receiver { secret: secret.clone(), ..receiver(name, url) });
        let settings = Settings {
            enabled: true,
            interval: Duration::from_millis(10),
            times: Times { for_: Duration::ZERO, keep_firing_for: Duration::from_millis(50) },
            limits: Limits {
                rows_min: 500,
                window: "hour",
                odd_max: BTreeMap::new(),
                quality: Vec::new(),
            },
            receivers: receivers.collect(),
            outbound: outbound::Settings {
                timeout: Duration::from_secs(5),
                attempts_max: 3,
                backoff: Duration::from_millis(5),
            },
        };
        Self {
            world: World(Arc::new(Mutex::new(State::Steady))),
            store: Arc::new(SqliteStore::open(state.path()).unwrap()),
            full: Arc::default(),
            settings,
            _state: state,
            _secret: file,
        }
    }

    fn start(&self) -> Running {
        let (kept, full) = (Arc::clone(&self.store), Arc::clone(&self.full));
        let keep: Keep = Box::new(move |puts, events| {
            let done = match *full.lock() {
                true => Err(Refusal::Internal("the disk is full".to_owned())),
                false => kept.commit(&puts, &events).map(drop).map_err(|_| Refusal::NeedsReason),
            };
            Box::pin(async move { done })
        });
        let sight = Box::new(self.world.clone());
        let made = Watcher::new(self.settings.clone(), sight, &*self.store, keep);
        let (alerts, watcher) = made.unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let task = tokio::spawn(watcher.run(async { drop(stopped.await) }));
        Running { alerts, stop, task }
    }

    fn drifts(&self, drifts: bool) {
        *self.world.0.lock() = if drifts { State::Drifted } else { State::Steady };
    }

    fn journal(&self) -> Vec<crate::control::store::Event> {
        self.store.events(&EventQuery::default()).unwrap()
    }

    fn actions(&self) -> Vec<String> {
        self.journal().iter().map(|event| event.action.clone()).collect()
    }
}

async fn until(what: impl Fn() -> bool) {
    let all = async {
        while !what() {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(20), all).await.unwrap();
}

/// Long enough for several looks.
async fn a_while() {
    sleep(Duration::from_millis(150)).await;
}

fn all(alerts: &Alerts) -> Vec<Alert> {
    alerts.view(|_| true).alerts
}

fn progress_of(alerts: &Alerts, receiver: &str) -> Option<Progress> {
    Some(all(alerts).first()?.deliveries.get(receiver)?.firing.state)
}

#[tokio::test]
async fn a_drift_is_told_once_and_its_end_once_whatever_is_started_again() {
    let ops = Recorder::start(vec![(204, None, "")]).await;
    let bench = Bench::new(&[("ops", ops.url())]);
    let running = bench.start();
    a_while().await;
    assert!(all(&running.alerts).is_empty() && bench.actions().is_empty());
    bench.drifts(true);
    until(|| progress_of(&running.alerts, "ops") == Some(Progress::Delivered)).await;
    let id = all(&running.alerts)[0].id.clone();
    let page = crate::observe::page::text(&running.alerts.families());
    let firing =
        "tidegate_alerts_firing{model=\"loans\",version=\"2\",arm=\"stable\",kind=\"drift\"} 1";
    assert!(page.contains(firing), "{page}");
    running.stop().await;
    let running = bench.start();
    assert_eq!(all(&running.alerts)[0].id, id, "shown from the first moment on");
    a_while().await;
    assert_eq!(events(&ops), [("dev.tidegate.alert.firing".to_owned(), format!("{id}-firing-1"))]);
    bench.drifts(false);
    until(|| events(&ops).len() == 2).await;
    assert_eq!(
        events(&ops)[1],
        ("dev.tidegate.alert.resolved".to_owned(), format!("{id}-resolved"))
    );
    until(|| bench.actions().len() == 4).await;
    assert_eq!(bench.actions(), ["alert.fire", "alert.tell", "alert.resolve", "alert.tell"]);
    let fired = bench.journal().remove(0);
    assert_eq!((&*fired.actor, &*fired.subject), (ACTOR, &*id));
    assert_eq!(fired.after.unwrap()["detail"]["features"][0]["feature"], "income");
    running.stop().await;
    let running = bench.start();
    a_while().await;
    assert_eq!(ops.received().len(), 2);
    let page = crate::observe::page::text(&running.alerts.families());
    assert!(!page.contains("kind=\"drift\"} 1"), "{page}");
    running.stop().await;
}

#[tokio::test]
async fn what_was_on_its_way_is_told_after_a_restart_by_the_same_id() {
    let silent = Recorder::start(vec![(0, None, ""), (204, None, "")]).await;
    let bench = Bench::new(&[("ops", silent.url())]);
    let running = bench.start();
    bench.drifts(true);
    until(|| silent.received().len() == 1).await;
    running.stop().await;
    let running = bench.start();
    until(|| progress_of(&running.alerts, "ops") == Some(Progress::Delivered)).await;
    let events = events(&silent);
    assert_eq!((events.len(), &events[0]), (2, &events[1]));
    running.stop().await;
}

#[tokio::test]
async fn tries_end_and_one_receiver_holds_up_no_other() {
    let busy =
        Recorder::start(vec![(503, Some(("retry-after", "0".to_owned())), ""), (204, None, "")])
            .await;
    let never = Recorder::start(vec![(500, None, "")]).await;
    let no = Recorder::start(vec![(
        422,
        None,
        "{\"message\": \"No such 0123456789abcdef0123456789abcdef\"}",
    )])
    .await;
    let away =
        Recorder::start(vec![(307, Some(("location", "http://127.0.0.1:9/".to_owned())), "")])
            .await;
    let silent = Recorder::start(vec![(0, None, "")]).await;
    let receivers = [
        ("a-silent", silent.url()),
        ("busy", busy.url()),
        ("never", never.url()),
        ("no", no.url()),
        ("away", away.url()),
    ];
    let mut bench = Bench::new(&receivers);
    // The secret of one cannot be read: it is not told unsigned.
    bench.settings.receivers.push(receiver("mute", &busy.url()));
    let running = bench.start();
    bench.drifts(true);
    let wanted = [
        ("busy", Progress::Delivered, 2),
        ("never", Progress::Failed, 3),
        ("no", Progress::Refused, 1),
        ("away", Progress::Failed, 3),
    ];
    for (name, progress, _) in wanted {
        until(|| progress_of(&running.alerts, name) == Some(progress)).await;
    }
    until(|| progress_of(&running.alerts, "mute") == Some(Progress::Failed)).await;
    for (recorder, tries) in [(&busy, 2), (&never, 3), (&no, 1), (&away, 3)] {
        let events = events(recorder);
        assert_eq!(events.len(), tries);
        assert!(events.iter().all(|event| *event == events[0]), "one event, however often");
    }
    assert_eq!(progress_of(&running.alerts, "a-silent"), Some(Progress::Pending));
    let page = crate::observe::page::text(&running.alerts.families());
    for line in
        ["receiver=\"busy\",outcome=\"delivered\"} 1", "receiver=\"no\",outcome=\"refused\"} 1"]
    {
        assert!(page.contains(line), "{page}");
    }
    let alert = all(&running.alerts).remove(0);
    assert_eq!(
        alert.deliveries["no"].firing.detail.as_deref(),
        Some("status 422: No such (secret)")
    );
    // Nowhere is the secret, nor where receivers are.
    let view = serde_json::to_string(&running.alerts.view(|_| true)).unwrap();
    let journal = serde_json::to_string(&bench.journal()).unwrap();
    let settings = format!("{:?}", bench.settings);
    for text in [&view, &journal, &settings, &page] {
        assert!(!text.contains(SECRET), "{text}");
    }
    for text in [&view, &journal] {
        assert!(!text.contains("127.0.0.1"), "{text}");
    }
    running.stop().await;
}

#[tokio::test]
async fn what_cannot_be_written_down_is_not_told_until_it_can() {
    let ops = Recorder::start(vec![(204, None, "")]).await;
    let bench = Bench::new(&[("ops", ops.url())]);
    let running = bench.start();
    *bench.full.lock() = true;
    bench.drifts(true);
    until(|| !all(&running.alerts).is_empty()).await;
    a_while().await;
    assert!(ops.received().is_empty() && bench.actions().is_empty());
    let silence = Silence {
        until: Timestamp::now() + jiff::SignedDuration::from_hours(1),
        reason: "we know".to_owned(),
        by: "ci".to_owned(),
    };
    let refused = running.alerts.silence(&loans(), Some(silence), Call::default()).await;
    assert!(matches!(refused, Err(Refusal::Unavailable(_))), "{refused:?}");
    assert!(running.alerts.view(|_| true).silences.is_empty());
    *bench.full.lock() = false;
    until(|| ops.received().len() == 1).await;
    until(|| bench.actions() == ["alert.fire", "alert.tell"]).await;
    running.stop().await;
}

#[tokio::test]
async fn a_silence_is_journalled_and_holds_over_a_restart() {
    let ops = Recorder::start(vec![(204, None, "")]).await;
    let bench = Bench::new(&[("ops", ops.url())]);
    let running = bench.start();
    let silence = Silence {
        until: Timestamp::now() + jiff::SignedDuration::from_hours(1),
        reason: "we know".to_owned(),
        by: "ci".to_owned(),
    };
    let call =
        Call { actor: "ci".to_owned(), reason: Some("we know".to_owned()), ..Call::default() };
    running.alerts.silence(&loans(), Some(silence.clone()), call.clone()).await.unwrap();
    running.stop().await;
    let running = bench.start();
    assert_eq!(running.alerts.view(|_| true).silences["loans"], silence);
    assert!(running.alerts.view(|_| false).silences.is_empty());
    bench.drifts(true);
    until(|| progress_of(&running.alerts, "ops") == Some(Progress::Waiting)).await;
    a_while().await;
    assert!(ops.received().is_empty());
    running.alerts.silence(&loans(), None, call.clone()).await.unwrap();
    until(|| ops.received().len() == 1).await;
    let none = running.alerts.silence(&loans(), None, call).await;
    assert!(matches!(none, Err(Refusal::NotFound(_))), "{none:?}");
    let row = bench.journal().remove(0);
    assert_eq!(
        (&*row.action, &*row.actor, row.reason.as_deref()),
        ("silence.put", "ci", Some("we know"))
    );
    running.stop().await;
}

#[tokio::test]
async fn a_test_says_that_it_is_one_and_changes_nothing() {
    let ops = Recorder::start(vec![(204, None, ""), (500, None, "")]).await;
    let bench = Bench::new(&[("ops", ops.url())]);
    let running = bench.start();
    let told = running.alerts.test("ops").await.unwrap();
    assert_eq!((told.outcome, told.detail), (Progress::Delivered, None));
    assert_eq!(events(&ops), [("dev.tidegate.alert.test".to_owned(), told.event)]);
    let data: Value = serde_json::from_slice(&ops.received()[0].body).unwrap();
    assert_eq!((&data["data"]["state"], &data["data"]["model"]), (&json!("test"), &json!("test")));
    let told = running.alerts.test("ops").await.unwrap();
    assert_eq!((told.outcome, ops.received().len()), (Progress::Failed, 2), "tried once");
    assert!(matches!(running.alerts.test("nobody").await, Err(Refusal::NotFound(_))));
    assert!(all(&running.alerts).is_empty() && bench.actions().is_empty());
    running.stop().await;
}
