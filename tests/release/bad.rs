//! C2: nine bad versions in turn, under load. Six never take traffic; three that fail or are slow
//! only when they are used are taken back by a rollout. The version that answers is never disturbed.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::admin::{Admin, weights};
use crate::alone;
use crate::gateway::Gateway;
use crate::load::{Answer, Client, Stop, open_loop, quantile, times};
use crate::models::{self, Fails};

const MODEL: &str = "sum";
const RATE: f64 = 120.0;
/// A model may use so much of the processor while it is tried. One that is good takes a tenth.
const TRIAL_S: &str = "1";
/// Longer than any rollout here takes unless it hangs.
const PATIENCE: Duration = Duration::from_secs(60);
/// Sines: some 40 ms, where [`models::add`] takes 10 us, and a machine that is four times as fast is
/// slow enough for the plan's 10 ms.
const PASSES: usize = 240;

/// Puts the six in the repository that are found out before they serve; each with its number, its
/// name, and a word of the reason.
fn put_six(root: &std::path::Path) -> [(u32, &'static str, &'static str); 6] {
    models::put(root, MODEL, 2, &models::add(2)[7..]);
    models::put(root, MODEL, 3, &models::add(3));
    models::put_beside(root, MODEL, 3, "SHA256SUMS", &models::sums(b"something else"));
    models::put(root, MODEL, 4, &models::other_signature(4));
    models::put(root, MODEL, 5, &models::nan(5));
    models::put_beside(root, MODEL, 5, "samples.json", &models::samples(5, 3));
    models::put(root, MODEL, 6, &models::endless(6));
    models::put(root, MODEL, 7, &models::endless(70));
    [
        (2, "corrupt", "ONNX"),
        (3, "wrong sums", "SHA256SUMS"),
        (4, "another signature", "signature"),
        (5, "not a number", "sample"),
        (6, "too slow to try", "processor time"),
        (7, "a native crash", "crashed"),
    ]
}

/// Kills the child that tries a model while it does, as a fault of native code would. The one before
/// it only looks for external data, and is soon gone.
fn crash_its_trial(gateway: &Gateway) {
    let start = Instant::now();
    let mut first_seen: BTreeMap<i32, Instant> = BTreeMap::new();
    loop {
        for child in gateway.probes() {
            let seen = first_seen.entry(child).or_insert_with(Instant::now);
            let working = seen.elapsed() > Duration::from_millis(150);
            let child = rustix::process::Pid::from_raw(child).unwrap();
            // Of a segmentation fault that is none, Rust's own handler thinks nothing.
            let signal = rustix::process::Signal::ABORT;
            if working && rustix::process::kill_process(child, signal).is_ok() {
                return;
            }
        }
        assert!(start.elapsed() < PATIENCE, "nothing is tried");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn six_bad_versions_never_take_traffic() {
    let root = tempfile::tempdir().unwrap();
    models::put(root.path(), MODEL, 1, &models::add(1));
    let six = put_six(root.path());
    models::keep_only(root.path(), MODEL, &[1]);
    alone(|runtime| {
        let gateway = Gateway::start(root.path(), &[("TIDEGATE_PROBE_CPU_MAX_S", TRIAL_S)]);
        let mut admin = gateway.admin();
        let (stop, client) = (Stop::default(), client(runtime, &gateway));
        let load = runtime.spawn(open_loop(client, RATE, stop.clone()));
        for (version, name, word) in six {
            let started = Instant::now();
            let said = std::thread::scope(|scope| {
                let loading = scope.spawn(|| admin.load(MODEL, version));
                if name == "a native crash" {
                    crash_its_trial(&gateway);
                }
                loading.join().unwrap()
            });
            let took = started.elapsed();
            assert_eq!(said.status, 409, "{name}: {}", said.body);
            let view = admin.version(MODEL, version).unwrap();
            assert_eq!(view["state"], "failed", "{name}: {view}");
            let reason = view["reason"].as_str().unwrap();
            assert!(reason.contains(word), "{name}: {reason}");
            eprintln!("C2 {name}: refused after {took:?}: {reason}");
            // Nor by a table, a rule or a label.
            let rule = json!({"weights": {"1": 1}, "rules": [{"name": "r", "header": "h",
                "equals": "v", "version": version.to_string()}]});
            for refused in [
                admin.all_to(MODEL, version),
                admin.traffic(MODEL, &rule),
                admin.label(MODEL, "canary", version),
            ] {
                assert_eq!(refused.status, 409, "{name}: {}", refused.body);
            }
        }
        stop.stop();
        let answers = runtime.block_on(load).unwrap();
        undisturbed(&answers);
        eprintln!("C2: {} requests beside, all answered by version 1", answers.len());
        let journal = admin.journal();
        for (version, name, _) in six {
            let subject = format!("{MODEL}/{version}");
            let told = |action: &str| {
                journal
                    .iter()
                    .any(|event| event["subject"] == *subject && event["action"] == action)
            };
            assert!(told("version.failed") || told("version.load"), "{name}: {journal:#?}");
        }
    });
}

fn client(runtime: &tokio::runtime::Runtime, gateway: &Gateway) -> Client {
    let _inside = runtime.enter();
    Client::new(MODEL, gateway.http, gateway.grpc)
}

/// Everything was answered, and by version 1.
#[track_caller]
fn undisturbed(answers: &[Answer]) {
    for answer in answers {
        assert_eq!(answer.ran.as_ref().map(|ran| ran.proven), Ok(1), "{answer:?}");
    }
}

/// A plan that nothing but a guard can end before the test does.
pub(crate) fn plan(candidate: u32) -> Value {
    json!({
        "candidate": candidate.to_string(),
        "steps": [{"weight": 20, "bake_s": 600, "min_samples": 1_000_000}, {"weight": 100}],
        "interval_s": 1,
        "guards": {"slow_share": {"threshold_ms": 10}},
        "reason": "a test of what guards see",
    })
}

/// Waits until a rollout was rolled back; gives its end, and the time from `since` to it.
pub(crate) fn ended(admin: &mut Admin, model: &str, id: &str, since: Instant) -> (Value, Duration) {
    loop {
        let rollout = admin.get(&format!("/models/{model}/rollouts/{id}")).done().body;
        let took = since.elapsed();
        if rollout["state"] == "rolled_back" {
            return (rollout, took);
        }
        assert!(took < PATIENCE, "{rollout:#}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Starts a rollout and waits for its end; gives its end and the time that took.
fn roll_out(admin: &mut Admin, candidate: u32) -> (Value, Duration) {
    let path = format!("/models/{MODEL}/rollouts");
    let said = admin.call("POST", &path, Some(&plan(candidate))).unwrap().done();
    ended(admin, MODEL, said.body["id"].as_str().unwrap(), said.answered)
}

/// An operator who goes back in the middle of a rollout ends it.
#[test]
fn a_rollback_by_hand_ends_a_rollout() {
    let root = tempfile::tempdir().unwrap();
    for version in 1..=2 {
        models::put(root.path(), MODEL, version, &models::add(version));
    }
    alone(|runtime| {
        let gateway = Gateway::start(root.path(), &[]);
        let mut admin = gateway.admin();
        admin.all_to(MODEL, 1).done();
        let (stop, client) = (Stop::default(), client(runtime, &gateway));
        let load = runtime.spawn(open_loop(client, RATE, stop.clone()));
        let path = format!("/models/{MODEL}/rollouts");
        let said = admin.call("POST", &path, Some(&plan(2))).unwrap().done();
        let id = said.body["id"].as_str().unwrap().to_owned();
        std::thread::sleep(Duration::from_millis(500));
        let back = admin.post(&format!("/models/{MODEL}:rollback")).done();
        let rollout = admin.get(&format!("{path}/{id}")).done().body;
        // One look of the controller: it must not take the candidate up again.
        std::thread::sleep(Duration::from_millis(1_500));
        stop.stop();
        let answers = runtime.block_on(load).unwrap();
        let by = |answer: &Answer| answer.ran.as_ref().unwrap().proven;
        let canary = answers.iter().filter(|answer| by(answer) == 2).count();
        let later = answers.iter().filter(|answer| answer.started > back.answered);
        assert!(canary > 0 && later.clone().count() > 0);
        later.for_each(|answer| assert_eq!(by(answer), 1, "{answer:?}"));
        let ended = admin.get(&format!("{path}/{id}")).done().body;
        eprintln!(
            "C2: rolled back by hand after {canary} requests to the candidate; the rollout said {} when \
             that was answered, {} later: {}",
            rollout["state"], ended["state"], ended["reason"]["message"]
        );
        assert!(["rolled_back", "aborted"].contains(&ended["state"].as_str().unwrap()));
        assert_eq!(admin.get(&format!("/models/{MODEL}")).body["rollout"], Value::Null);
    });
}

#[test]
fn three_bad_versions_are_rolled_back() {
    let root = tempfile::tempdir().unwrap();
    let bad: [(u32, &str, Option<Fails>, Vec<u8>); 3] = [
        (2, "fails always", Some(Fails::Always), models::failing(2, Fails::Always)),
        (3, "fails 5 %", Some(Fails::OneInTwenty), models::failing(3, Fails::OneInTwenty)),
        (4, "ten times slower", None, models::slow(4, PASSES)),
    ];
    models::put(root.path(), MODEL, 1, &models::add(1));
    for (version, _, _, content) in &bad {
        models::put(root.path(), MODEL, *version, content);
    }
    models::keep_only(root.path(), MODEL, &[1]);
    alone(|runtime| {
        let gateway = Gateway::start(root.path(), &[]);
        let mut admin = gateway.admin();
        admin.all_to(MODEL, 1).done();
        for (version, name, fails, _) in &bad {
            admin.load(MODEL, *version).done();
            let (stop, client) = (Stop::default(), client(runtime, &gateway));
            // Failures cost nothing; a slow version at this rate, a third of a core.
            let rate = if fails.is_some() { 150.0 } else { 60.0 };
            let load = open_loop(client, rate, stop.clone());
            let load = runtime.spawn(load);
            let (rollout, took) = roll_out(&mut admin, *version);
            let back = Instant::now();
            let table = admin.get(&format!("/models/{MODEL}/traffic")).done();
            assert_eq!(weights(&table.body).unwrap(), [(1, 100.0)], "{name}: {table:?}");
            std::thread::sleep(Duration::from_millis(300));
            stop.stop();
            let answers = runtime.block_on(load).unwrap();
            judge(name, *version, *fails, &answers, back);
            eprintln!("C2 {name}: rolled back {took:?} after its start: {}", rollout["reason"]);
        }
        let journal = admin.journal();
        let ends = journal.iter().filter(|event| event["action"] == "rollout.roll_back").count();
        assert_eq!(ends, bad.len(), "{journal:#?}");
    });
}

/// Version 1 answered everything that it got; the candidate got its share, and nothing after the end.
fn judge(name: &str, version: u32, fails: Option<Fails>, answers: &[Answer], back: Instant) {
    let (mut canary, mut failed) = (Vec::new(), 0);
    for answer in answers {
        let by = match &answer.ran {
            Ok(ran) => {
                assert_eq!(ran.proven, ran.named);
                ran.named
            }
            Err(error) => {
                failed += 1;
                assert!(fails.is_some_and(|fails| fails.at(answer.ask.x)), "{name}: {answer:?}");
                error.named.unwrap()
            }
        };
        assert!(by == 1 || by == version, "{name}: {answer:?}");
        assert!(by == 1 || answer.started < back, "{name}: {answer:?} after it was rolled back");
        if by == version {
            canary.push(answer);
        }
        assert!(answer.ran.is_ok() || by == version, "{name}: {answer:?}");
    }
    let share = canary.len() * 100 / answers.len();
    eprintln!(
        "C2 {name}: {failed} of {} requests failed, all of them the candidate's; it got {} ({share} %), at a \
         median of {:?}",
        answers.len(),
        canary.len(),
        quantile(&times(canary.iter().copied()), 0.5),
    );
    assert!(!canary.is_empty());
    assert!(failed > 0 || fails.is_none());
}
