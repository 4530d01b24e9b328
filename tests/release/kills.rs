//! C4: kill -9 at random moments while tables, labels and versions change. After each restart that is
//! in force which was answered last, or what was on its way; also without the model repository.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::admin::{Admin, number, weights};
use crate::bad::{ended, plan};
use crate::gateway::Gateway;
use crate::load::{Ask, Client, Stop, Wire, closed_loop, open_loop, quantile};
use crate::models::Fails;
use crate::{alone, count, models};

const MODEL: &str = "sum";
/// Loaded and unloaded by hand.
const GUEST: u32 = 3;
/// The longest that a gateway lives.
const LIFE_MAX_MS: u64 = 120;

/// What was decided.
#[derive(Clone, Debug, PartialEq)]
struct State {
    weights: Vec<(u32, f64)>,
    canary: Option<u32>,
    guest: bool,
}

impl State {
    /// As the gateway has it.
    fn read(admin: &mut Admin) -> Self {
        let traffic = admin.get(&format!("/models/{MODEL}/traffic")).done();
        let labels = admin.get(&format!("/models/{MODEL}/labels")).done();
        let guest = admin.version(MODEL, GUEST);
        Self {
            weights: weights(&traffic.body).unwrap_or_default(),
            canary: number(&labels.body["labels"]["canary"]),
            guest: guest.is_some_and(|view| view["state"] == "ready"),
        }
    }

    /// Makes the change of this turn; gives the state after it, and whether it was answered.
    fn change(&self, admin: &mut Admin, turn: u32) -> (Self, bool) {
        let mut next = self.clone();
        let done = match turn % 7 {
            2 => {
                next.canary = Some(turn % 2 + 1);
                let body = json!({"version": (turn % 2 + 1).to_string()});
                admin.call("PUT", &format!("/models/{MODEL}/labels/canary"), Some(&body))
            }
            5 => {
                next.guest = !self.guest;
                let action = if next.guest { "load" } else { "unload" };
                let path = format!("/models/{MODEL}/versions/{GUEST}:{action}");
                admin.call("POST", &path, None)
            }
            _ => {
                // Each table is another one.
                let canary = f64::from(turn % 9_998 + 1) / 100.0;
                let stable = (10_000.0 - f64::from(turn % 9_998 + 1)) / 100.0;
                next.weights = vec![(1, stable), (2, canary)];
                let table: BTreeMap<String, f64> =
                    next.weights.iter().map(|(v, weight)| (v.to_string(), *weight)).collect();
                let body = json!({"weights": table, "reason": format!("turn {turn}")});
                admin.call("PUT", &format!("/models/{MODEL}/traffic"), Some(&body))
            }
        };
        (next, done.map(crate::admin::Said::done).is_ok())
    }
}

/// Changes until the gateway is gone: the last state that was answered, the one on its way, and the
/// number of answers.
fn change_until_gone(admin: &mut Admin, from: State, turn: &mut u32) -> (State, State, u32) {
    let (mut state, mut answered) = (from, 0);
    loop {
        *turn += 1;
        let (next, done) = state.change(admin, *turn);
        if !done {
            return (state, next, answered);
        }
        state = next;
        answered += 1;
    }
}

/// Every prediction is answered by a version that has a share.
fn serves(runtime: &tokio::runtime::Runtime, gateway: &Gateway, state: &State) {
    let client = {
        let _inside = runtime.enter();
        Client::new(MODEL, gateway.http, gateway.grpc)
    };
    for at in 0..6 {
        let asked = client.ask(Wire::of(at), Ask::plain(at), Instant::now());
        let ran = runtime.block_on(asked).ran.unwrap();
        assert_eq!(ran.proven, ran.named);
        assert!(state.weights.iter().any(|(version, _)| *version == ran.proven), "{state:?}");
    }
}

#[test]
fn what_was_answered_survives_kill_9() {
    let kills = count("RELEASE_KILLS", 8);
    let root = tempfile::tempdir().unwrap();
    for version in 1..=GUEST {
        models::put(root.path(), MODEL, version, &models::add(version));
    }
    models::keep_only(root.path(), MODEL, &[1, 2]);
    let (here, away) = (root.path().join("models"), root.path().join("away"));
    alone(|runtime| {
        let mut random = Random(0x5eed);
        let (mut ready, mut turn, mut answers, mut lost_kept) = (Vec::new(), 0, 0, 0);
        let (mut last, mut on_its_way): (Option<State>, Option<State>) = (None, None);
        for life in 0..=kills {
            let mut gateway = start(root.path(), &here, &away, life % 2 == 1);
            let mut admin = gateway.admin();
            if life > 0 {
                ready.push(gateway.ready_after);
            }
            let state = match (&last, &on_its_way) {
                (Some(last), Some(lost)) => {
                    let state = State::read(&mut admin);
                    assert!(state == *last || state == *lost, "{state:?} of {last:?}, {lost:?}");
                    lost_kept += u32::from(state != *last);
                    serves(runtime, &gateway, &state);
                    state
                }
                _ => {
                    admin.all_to(MODEL, 1).done();
                    State::read(&mut admin)
                }
            };
            if away.exists() {
                std::fs::rename(&away, &here).unwrap();
            }
            if life == kills {
                break;
            }
            let life = Duration::from_millis(random.below(LIFE_MAX_MS));
            let (before, after, answered) = std::thread::scope(|scope| {
                let changing = scope.spawn(|| change_until_gone(&mut admin, state, &mut turn));
                std::thread::sleep(life);
                gateway.kill();
                changing.join().unwrap()
            });
            answers += answered;
            (last, on_its_way) = (Some(before), Some(after));
        }
        eprintln!(
            "C4: {kills} kills, {answers} changes answered: none lost; {lost_kept} kept of those whose \
             answer was lost; every other restart without the model repository; ready after {:?} (median), \
             {:?} (p99)",
            quantile(&ready, 0.5),
            quantile(&ready, 0.99),
        );
    });
}

/// Says who gets what.
type Decide<'a> = &'a dyn Fn(&mut Admin);

/// Who asks while a gateway starts is answered as before it ended, or not at all. Version 1 has
/// everything, or nearly, and takes longest to load.
#[test]
fn nobody_is_answered_otherwise_during_a_restart() {
    let canary = json!({"weights": {"1": 99.99, "2": 0.01}});
    let tables: [(&str, Decide<'_>); 3] = [
        ("a canary of 0.01 %", &|admin| drop(admin.traffic(MODEL, &canary).done())),
        ("a table", &|admin| drop(admin.all_to(MODEL, 1).done())),
        ("the label stable", &|admin| drop(admin.label(MODEL, "stable", 1).done())),
    ];
    for (name, decide) in tables {
        let root = tempfile::tempdir().unwrap();
        models::put(root.path(), MODEL, 1, &models::heavy(1, 32));
        models::put(root.path(), MODEL, 2, &models::add(2));
        alone(|runtime| {
            let mut gateway = Gateway::start(root.path(), &[]);
            decide(&mut gateway.admin());
            gateway.kill();
            let gateway = Gateway::listen(root.path(), &[]);
            let client = {
                let _inside = runtime.enter();
                Client::new(MODEL, gateway.http, gateway.grpc)
            };
            let stop = Stop::default();
            let load = runtime.spawn(closed_loop(client, 3, stop.clone(), Ask::plain));
            while !gateway.is_ready() {
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(Duration::from_millis(50));
            stop.stop();
            let answers = runtime.block_on(load).unwrap();
            let ran = answers.iter().filter_map(|answer| answer.ran.as_ref().ok());
            let by: Vec<u32> = ran.map(|ran| ran.proven).collect();
            eprintln!(
                "C4: {} requests during a restart with {name}: {} answered by what had everything, {} \
                 otherwise",
                answers.len(),
                by.iter().filter(|version| **version == 1).count(),
                by.iter().filter(|version| **version != 1).count(),
            );
            let others = by.iter().filter(|version| **version != 1).count();
            // One in ten thousand may be the canary's.
            assert!(by.contains(&1) && others <= usize::from(name.contains("canary")), "{name}");
        });
    }
}

/// A rollout that was under way when its gateway was killed goes on: where it was, with its guards.
#[test]
fn a_rollout_survives_kill_9() {
    let root = tempfile::tempdir().unwrap();
    models::put(root.path(), MODEL, 1, &models::add(1));
    models::put(root.path(), MODEL, 2, &models::failing(2, Fails::OneInTwenty));
    models::keep_only(root.path(), MODEL, &[1]);
    alone(|runtime| {
        let mut gateway = Gateway::start(root.path(), &[]);
        let mut admin = gateway.admin();
        admin.all_to(MODEL, 1).done();
        admin.load(MODEL, 2).done();
        let started = admin.call("POST", &format!("/models/{MODEL}/rollouts"), Some(&plan(2)));
        let id = started.unwrap().done().body["id"].as_str().unwrap().to_owned();
        gateway.kill();
        let gateway = Gateway::start(root.path(), &[]);
        let mut admin = gateway.admin();
        let table = admin.get(&format!("/models/{MODEL}/traffic")).done();
        assert_eq!(weights(&table.body).unwrap(), [(1, 80.0), (2, 20.0)]);
        let stop = Stop::default();
        let client = {
            let _inside = runtime.enter();
            Client::new(MODEL, gateway.http, gateway.grpc)
        };
        let load = runtime.spawn(open_loop(client, 150.0, stop.clone()));
        let (rollout, took) = ended(&mut admin, MODEL, &id, Instant::now());
        stop.stop();
        let answers = runtime.block_on(load).unwrap();
        let failed = answers.iter().filter_map(|answer| answer.ran.as_ref().err());
        let failed: Vec<_> = failed.map(|failed| failed.named).collect();
        eprintln!(
            "C4: a rollout was killed with its gateway and rolled back {took:?} after the restart, after \
             {} failures: {}",
            failed.len(),
            rollout["reason"]["message"]
        );
        assert!(failed.iter().all(|named| *named == Some(2)), "{failed:?}");
        let table = admin.get(&format!("/models/{MODEL}/traffic")).done();
        assert_eq!(weights(&table.body).unwrap(), [(1, 100.0)]);
    });
}

/// Starts with the repository where it is, or moved away.
fn start(root: &Path, here: &Path, away: &Path, without: bool) -> Gateway {
    if without {
        std::fs::rename(here, away).unwrap();
    }
    Gateway::start(root, &[])
}

/// Xorshift: the same moments in every run, as far as clocks go.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}
