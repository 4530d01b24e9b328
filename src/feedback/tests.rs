//! Feedback against a real ledger: predictions are recorded as the gateway records them.

use std::path::Path;

use bytes::Bytes;
use proptest::prelude::*;
use tempfile::TempDir;

use super::*;
use crate::domain::{
    Arm, Completion, DataType, FeedbackSettings, Outcome as Ended, Signature, Tensor, TensorSpec,
    Timings, Version,
};
use crate::ledger::export::{Selection, scan};
use crate::ledger::{About, FEEDBACK};
use crate::quality::Figures;

/// One version of one model, with three classes.
struct Iris;

impl Models for Iris {
    fn how(&self, model: &str, version: u64) -> Option<How> {
        let names = ["setosa", "versicolor", "virginica"].map(str::to_owned).to_vec();
        let settings = FeedbackSettings::default();
        let how = || How { settings, classes: vec![("y".to_owned(), names)] };
        (model == "iris" && version == 2).then(how)
    }

    fn serves(&self, model: &str) -> bool {
        model == "iris"
    }
}

struct Bench {
    dir: TempDir,
    ledger: Arc<Ledger>,
    feedback: Arc<Feedback>,
}

fn ledger(dir: &Path) -> Arc<Ledger> {
    let settings =
        crate::ledger::Settings { free_bytes_min: 0, ..crate::ledger::Settings::new(dir) };
    Ledger::open(settings, []).unwrap()
}

fn feedback(dir: &Path, ledger: &Arc<Ledger>) -> Arc<Feedback> {
    let settings = Settings { items_max: 20, ..Settings::new(dir.to_owned()) };
    Feedback::start(settings, Arc::clone(ledger), Arc::new(Iris)).unwrap()
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let ledger = ledger(dir.path());
        let feedback = feedback(dir.path(), &ledger);
        Self { dir, ledger, feedback }
    }

    /// As a restart does; what the process held is gone.
    async fn restarted(self, forget_index: bool) -> Self {
        let Self { dir, ledger: old, feedback: ended } = self;
        ended.stop();
        old.close().await;
        drop((ended, old));
        if forget_index {
            for end in ["", "-wal", "-shm"] {
                std::fs::remove_file(dir.path().join(format!("feedback.db{end}"))).ok();
            }
        }
        let ledger = ledger(dir.path());
        let feedback = feedback(dir.path(), &ledger);
        Self { dir, ledger, feedback }
    }

    /// Records a prediction of these rows of probabilities.
    async fn predict(&self, rows: &[[f32; 3]], arm: Arm) -> Uuid {
        self.predict_by(2, rows, arm).await
    }

    async fn predict_by(&self, version: u64, rows: &[[f32; 3]], arm: Arm) -> Uuid {
        let id = Uuid::now_v7();
        let data: Vec<u8> = rows.iter().flatten().flat_map(|p| p.to_le_bytes()).collect();
        let shape = [rows.len(), 3].into_iter().collect();
        let output = Tensor::new(DataType::Fp32, shape, Bytes::from(data)).unwrap();
        let completion = Completion {
            prediction_id: id,
            request_id: String::new(),
            received_at: SystemTime::now(),
            model: "iris".parse().unwrap(),
            version: Version::new(version),
            digest: None,
            arm: Some(arm),
            reason: None,
            protocol: Protocol::Http,
            principal: None,
            trace: None,
            outcome: Ended::Ok,
            timings: Timings::default(),
            rows: rows.len(),
            batch_size: rows.len(),
            cached: false,
            shadow_of: None,
            inputs: Vec::new(),
            outputs: vec![output],
        };
        let spec = TensorSpec { name: "y".to_owned(), datatype: DataType::Fp32, shape: None };
        let signature = Signature { inputs: Vec::new(), outputs: vec![spec], batched: true };
        let about = About {
            signature: Some(&signature),
            engine: "tract",
            recording: None,
            config_revision: 1,
            subject: None,
        };
        let at = self.ledger.append(&completion, &about).unwrap().unwrap();
        self.ledger.settled(at, Durability::Buffered).await.unwrap();
        id
    }

    async fn say(&self, items: Vec<Item>) -> Result<Vec<Outcome>, FeedbackError> {
        self.say_of("iris", items, Durability::Buffered).await
    }

    async fn say_of(
        &self,
        model: &str,
        items: Vec<Item>,
        durability: Durability,
    ) -> Result<Vec<Outcome>, FeedbackError> {
        let call = Call {
            model: model.parse().unwrap(),
            items,
            durability,
            received: SystemTime::now(),
            protocol: Protocol::Http,
            principal: Some("team".to_owned()),
            trace: None,
        };
        self.feedback.send(call).await
    }

    /// Figures of all arms together, once so many predictions are counted.
    async fn figures(&self, predictions: u64) -> Figures {
        loop {
            let report = self.feedback.report(&"iris".parse().unwrap(), None);
            if let Some(version) = report.versions.first()
                && version.all.predictions >= predictions
            {
                assert_eq!(version.all.predictions, predictions);
                return version.all.clone();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Bodies of the log of feedback.
    fn recorded(&self) -> Vec<Body> {
        let log = self.ledger.settings().dir.join(FEEDBACK);
        let mut bodies = Vec::new();
        scan::<crate::ledger::export::ExportError>(&log, &Selection::default(), |_, view| {
            bodies.extend(Body::read(view.body));
            Ok(std::ops::ControlFlow::Continue(()))
        })
        .unwrap();
        bodies
    }
}

fn label(id: Uuid, labels: &[i64]) -> Item {
    let labels = labels.iter().map(|label| Some(Label::Int(*label))).collect();
    Item { id, labels, metric: None, at: None }
}

fn metric(id: Uuid, name: &str, value: f64) -> Item {
    Item { id, labels: Vec::new(), metric: Some((name.to_owned(), value)), at: None }
}

const SURE: [f32; 3] = [0.125, 0.75, 0.125];

#[tokio::test]
async fn labels_count_once_and_the_last_one_counts() {
    use Outcome::{Corrected, NotFound, Recorded, Unchanged};
    let bench = Bench::new();
    let one = bench.predict(&[SURE], Arm::Stable).await;
    let two = bench.predict(&[SURE, SURE], Arm::Canary).await;
    let unlabelled = bench.predict(&[SURE], Arm::Stable).await;
    let gone = Uuid::now_v7();
    let said = bench.say(vec![label(one, &[1]), label(gone, &[1]), label(two, &[1, 2])]).await;
    assert_eq!(said, Ok(vec![Recorded, NotFound, Recorded]));
    assert_eq!(bench.say(vec![label(one, &[1])]).await, Ok(vec![Unchanged]));
    assert_eq!(bench.say(vec![label(one, &[0])]).await, Ok(vec![Corrected]));
    // In one list, too.
    let said = bench.say(vec![label(one, &[2]), label(one, &[2]), label(one, &[1])]).await;
    assert_eq!(said, Ok(vec![Corrected, Unchanged, Corrected]));
    let said = bench.say(vec![metric(one, "revenue", 2.0), metric(two, "revenue", 4.0)]).await;
    assert_eq!(said, Ok(vec![Recorded, Recorded]));
    assert_eq!(bench.say(vec![metric(one, "revenue", 3.0)]).await, Ok(vec![Corrected]));
    assert_eq!(bench.say(vec![metric(unlabelled, "clicks", 1.0)]).await, Ok(vec![Recorded]));
    assert_eq!(bench.recorded().len(), 9);

    let check = |figures: Figures| {
        assert_eq!((figures.labelled, figures.unjudged), (2, 0));
        let classes = figures.classification.unwrap();
        assert_eq!((classes.rows, classes.accuracy.value), (3, 2.0 / 3.0));
        let names: Vec<&str> = classes.classes.iter().map(|class| &*class.class).collect();
        assert_eq!(names, ["versicolor", "virginica"]);
        let revenue = &figures.metrics["revenue"];
        assert_eq!((revenue.count, revenue.mean.value), (2, 3.5));
        let estimated = figures.estimated_accuracy.unwrap();
        assert_eq!((estimated.value, estimated.rows), (0.75, 4));
        assert_eq!(figures.delay.unwrap().p99_s, 1);
    };
    check(bench.figures(3).await);
    let arms = bench.feedback.report(&"iris".parse().unwrap(), Some(1)).versions.remove(0).arms;
    assert_eq!((arms["stable"].labelled, arms["canary"].labelled), (1, 1));

    // The same after a start, from the index or from the logs alone.
    let (iris, two) = ("iris".parse().unwrap(), Version::new(2).unwrap());
    assert_eq!(bench.feedback.mistakes(&iris, two), Some((1, 3)));
    let bench = bench.restarted(false).await;
    check(bench.figures(3).await);
    assert_eq!(bench.feedback.mistakes(&iris, two), Some((1, 3)));
    assert_eq!(bench.say(vec![label(one, &[1])]).await, Ok(vec![Unchanged]));
    let bench = bench.restarted(true).await;
    check(bench.figures(3).await);
    assert_eq!(bench.say(vec![label(one, &[1])]).await, Ok(vec![Unchanged]));
    assert_eq!(bench.recorded().len(), 9);
    bench.feedback.stop();
}

#[tokio::test]
async fn what_cannot_be_is_refused_whole() {
    let bench = Bench::new();
    let one = bench.predict(&[SURE], Arm::Stable).await;
    let two = bench.predict(&[SURE, SURE], Arm::Stable).await;
    let why = |error: Result<Vec<Outcome>, FeedbackError>| error.unwrap_err().to_string();
    let said = why(bench.say(vec![label(one, &[1]), label(two, &[1])]).await);
    assert!(said.starts_with("item 1: the prediction has 2 rows and the label 1"), "{said}");
    let said = why(bench.say(vec![label(one, &[3])]).await);
    assert!(said.contains("none of the 3 classes"), "{said}");
    let said = why(bench.say((0..21).map(|_| label(one, &[1])).collect()).await);
    assert_eq!(said, "21 items, the limit is 20");
    let many = Item { labels: vec![Some(Label::Int(1)); LABELS_MAX + 1], ..label(one, &[1]) };
    assert!(why(bench.say(vec![many]).await).contains("the limit is 65536"));
    // An id that never was, and one of another model, are the same.
    for (model, id) in [("iris", Uuid::now_v7()), ("iris", Uuid::from_u128(17)), ("other", one)] {
        let said = bench.say_of(model, vec![label(id, &[1])], Durability::Buffered).await;
        let model = model.parse().unwrap();
        assert_eq!(said, Err(FeedbackError::NotFound { id, model }));
    }
    let names = (0..crate::quality::METRICS_MAX).map(|at| metric(one, &format!("m{at}"), 1.0));
    for items in names.collect::<Vec<_>>().chunks(20) {
        bench.say(items.to_vec()).await.unwrap();
    }
    let said = why(bench.say(vec![metric(two, "another", 1.0)]).await);
    assert!(said.contains("metric: 32 others"), "{said}");
    assert!(bench.say(vec![metric(two, "m0", 1.0)]).await.is_ok());
    assert!(bench.recorded().iter().all(|body| body.labels.is_empty()), "nothing was half taken");

    let families = crate::observe::page::text(&bench.feedback.families());
    for line in [
        "tidegate_feedback_total{model=\"iris\",outcome=\"refused\"} 26",
        "tidegate_feedback_total{model=\"iris\",outcome=\"not_found\"} 2",
        "tidegate_feedback_total{model=\"other\",outcome=\"not_found\"} 1",
    ] {
        assert!(families.contains(line), "{line} is not in\n{families}");
    }
}

#[tokio::test]
async fn a_version_that_is_gone_has_figures_and_no_series() {
    let bench = Bench::new();
    for version in [1, 2] {
        let id = bench.predict_by(version, &[SURE], Arm::Stable).await;
        bench.say(vec![label(id, &[1])]).await.unwrap();
    }
    let report = bench.feedback.report(&"iris".parse().unwrap(), None);
    assert_eq!(report.versions.len(), 2);
    let page = crate::observe::page::text(&bench.feedback.families());
    let series = "tidegate_quality_samples{model=\"iris\",version=\"2\",arm=\"stable\"} 1";
    assert!(page.contains(series), "{page}");
    assert!(!page.contains("version=\"1\""), "{page}");
}

#[tokio::test]
async fn calls_that_come_together_share_one_wait_and_agree() {
    let bench = Bench::new();
    let id = bench.predict(&[SURE], Arm::Stable).await;
    let calls =
        (0..20).map(|at| bench.say_of("iris", vec![label(id, &[at % 2])], Durability::Sync));
    let outcomes = futures_util::future::join_all(calls).await;
    let count =
        |outcome: Outcome| outcomes.iter().filter(|said| **said == Ok(vec![outcome])).count();
    let recorded = bench.recorded().len();
    assert_eq!(count(Outcome::Recorded), 1);
    assert_eq!(count(Outcome::Corrected) + 1, recorded);
    assert_eq!(recorded + count(Outcome::Unchanged), 20);
    let figures = bench.figures(1).await;
    assert_eq!((figures.labelled, figures.classification.unwrap().rows), (1, 1));
}

#[tokio::test]
async fn what_was_erased_is_neither_held_against_nor_forgotten() {
    let bench = Bench::new();
    let id = bench.predict(&[SURE], Arm::Stable).await;
    bench.say(vec![label(id, &[1])]).await.unwrap();
    let wanted = crate::ledger::erase::Wanted { ids: vec![id], subject: None };
    let why = crate::ledger::erase::Why::default();
    let ledger = Arc::clone(&bench.ledger);
    let erase = move || ledger.erase(&wanted, &why).unwrap().records;
    assert_eq!(tokio::task::spawn_blocking(erase).await.unwrap(), 2);
    // The prediction is known, what it said is not.
    assert_eq!(bench.say(vec![label(id, &[0])]).await, Ok(vec![Outcome::Recorded]));
    let figures = bench.figures(1).await;
    assert_eq!((figures.labelled, figures.unjudged), (1, 1));
}

/// A prediction of a hundred days ago, in a log whose segments are as old.
#[tokio::test]
async fn a_label_that_comes_months_later_is_recorded_and_too_late_to_count() {
    use crate::ledger::PREDICTIONS;
    use crate::ledger::record::{Head, Kind, Payload};
    use crate::ledger::testlog::TestLog;
    use uuid::{NoContext, Timestamp};

    let dir = tempfile::tempdir().unwrap();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let mut ids = Vec::new();
    let mut log = TestLog::new(&dir.path().join(crate::ledger::FOLDER), PREDICTIONS);
    for days in [100, 60, 5] {
        let made = now - Duration::from_secs(days * 86_400);
        let id = Uuid::new_v7(Timestamp::from_unix(NoContext, made.as_secs(), 0));
        let id_bytes = id.as_bytes().to_vec();
        log.created_ns = u64::try_from(made.as_nanos()).unwrap() - 1_000_000_000;
        let head = Head {
            kind: Kind::Prediction.into(),
            time_ns: i64::try_from(made.as_nanos()).unwrap(),
            prediction_id: id_bytes.into(),
            model: "iris".to_owned(),
            version: 2,
            arm: "stable".to_owned(),
            status: "ok".to_owned(),
            rows: 1,
            ..Head::default()
        };
        log.put(&head, &Payload::default());
        log.seal();
        ids.push(id);
    }
    let ledger = ledger(dir.path());
    let feedback = feedback(dir.path(), &ledger);
    let bench = Bench { dir, ledger, feedback };
    let said = bench.say(ids.iter().map(|id| label(*id, &[1])).collect()).await;
    assert_eq!(said, Ok(vec![Outcome::Recorded; 3]));
    // Nothing was kept of what it said, so the one that counts is held against nothing.
    let figures = bench.figures(1).await;
    assert_eq!((figures.labelled, figures.unjudged), (1, 1));
    assert_eq!(figures.delay.unwrap().p50_s, 1 << 19);
    let bench = bench.restarted(true).await;
    assert_eq!(bench.say(vec![label(ids[0], &[1])]).await, Ok(vec![Outcome::Unchanged]));
    assert_eq!(bench.say(vec![label(ids[0], &[2])]).await, Ok(vec![Outcome::Corrected]));
    assert_eq!(bench.figures(1).await.labelled, 1);
}

#[derive(Clone, Debug)]
enum Step {
    Say { prediction: usize, label: i64 },
    Restart { forget_index: bool },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let say =
        (0..4_usize, 0..3_i64).prop_map(|(prediction, label)| Step::Say { prediction, label });
    let restart = any::<bool>().prop_map(|forget_index| Step::Restart { forget_index });
    proptest::collection::vec(prop_oneof![8 => say, 1 => restart], 1..24)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Whatever is said, in whatever order, however often the gateway starts again: the last label
    /// of each prediction counts, once, and what says nothing new is not recorded.
    #[test]
    fn figures_are_those_of_the_last_labels(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut bench = Bench::new();
            let mut ids = Vec::new();
            for _ in 0..4 {
                ids.push(bench.predict(&[SURE], Arm::Stable).await);
            }
            let mut last: [Option<i64>; 4] = [None; 4];
            let mut records = 0;
            for step in steps {
                match step {
                    Step::Restart { forget_index } => bench = bench.restarted(forget_index).await,
                    Step::Say { prediction, label: said } => {
                        let want = match last[prediction] {
                            None => Outcome::Recorded,
                            Some(before) if before == said => Outcome::Unchanged,
                            Some(_) => Outcome::Corrected,
                        };
                        records += usize::from(want != Outcome::Unchanged);
                        last[prediction] = Some(said);
                        let got = bench.say(vec![label(ids[prediction], &[said])]).await;
                        assert_eq!(got, Ok(vec![want]));
                    }
                }
            }
            let labels: Vec<i64> = last.into_iter().flatten().collect();
            let figures = bench.figures(4).await;
            assert_eq!(figures.labelled, labels.len() as u64);
            if records > 0 {
                assert_eq!(bench.recorded().len(), records);
                let right = labels.iter().filter(|label| **label == 1).count();
                let accuracy = figures.classification.unwrap().accuracy.value;
                assert!((accuracy - right as f64 / labels.len() as f64).abs() < 1e-12);
            }
        });
    }
}
