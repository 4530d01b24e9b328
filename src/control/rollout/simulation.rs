//! Simulated canaries, seeded: how often a good one is taken back, and how soon a bad one.
//!
//! Two kinds. *Events*: the evidence alone, looked at after every failure, over the traffic that the
//! published figures were measured with (1 % of 20,000 requests, then 5, 25 and 50 % of 40,000
//! each). *Rollouts*: the whole machine with its default plan and guards, fed with counters, looked
//! at as the controller does.
//!
//! `cargo nextest run simulation --no-capture` prints the figures.

use std::time::Duration;

use serde_json::json;

use super::evidence::Mixture;
use super::guards::{Guard, GuardOutcome};
use super::machine::tests::{Sim, plan};
use super::{Action, State};

const ALPHA: f64 = 0.05;
/// Share of the candidate, and requests at that share.
const COURSE: [(f64, u64); 4] = [(0.01, 20_000), (0.05, 40_000), (0.25, 40_000), (0.5, 40_000)];

/// SplitMix64: enough for a simulation, and the same everywhere.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0, below 1.
    fn share(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn happens(&mut self, p: f64) -> bool {
        self.share() < p
    }

    /// Trials up to and with the first success of such as succeed with probability `p`, of which
    /// `ln(1 − p)` is given.
    fn until(&mut self, ln_miss: f64) -> u64 {
        if ln_miss >= 0.0 {
            return u64::MAX / 2;
        }
        whole((1.0 - self.share()).ln() / ln_miss) + 1
    }

    /// Successes among `n`, one gap after the other.
    fn successes(&mut self, n: u64, p: f64) -> u64 {
        let ln_miss = (-p).ln_1p();
        let (mut at, mut count) = (self.until(ln_miss), 0);
        while at <= n {
            count += 1;
            at += self.until(ln_miss);
        }
        count
    }
}

fn whole(number: f64) -> u64 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counts of requests, far below 2^53"
    )]
    let whole = number as u64;
    whole
}

/// The candidate's requests until the evidence is enough; `None` when it never is.
fn caught_after(chance: &mut Chance, candidate: f64, stable: f64) -> Option<u64> {
    let mut mixture = Mixture::default();
    let mut before = 0;
    for (share, requests) in COURSE {
        let failing = share * candidate + (1.0 - share) * stable;
        let ln_miss = (-failing).ln_1p();
        let mut at = chance.until(ln_miss);
        // A failure of the stable version only takes evidence away, so looking can wait.
        let mut others = 0;
        while at <= requests {
            others += 1;
            if chance.happens(share * candidate / failing) {
                mixture.add(share, 1, others - 1);
                others = 0;
                if mixture.ln() >= (1.0 / ALPHA).ln() {
                    return Some(before + whole(at as f64 * share));
                }
            }
            at += chance.until(ln_miss);
        }
        mixture.add(share, 0, others);
        before += whole(requests as f64 * share);
    }
    None
}

struct Figures {
    /// Share of the runs that were stopped.
    stopped: f64,
    /// Median of the candidate's requests in those.
    median: u64,
}

fn figures(what: &str, runs: u64, run: impl Fn(&mut Chance) -> Option<u64>) -> Figures {
    let mut stopped: Vec<u64> =
        (0..runs).filter_map(|seed| run(&mut Chance(seed * 7919 + 1))).collect();
    stopped.sort_unstable();
    let median = stopped.get(stopped.len() / 2).copied().unwrap_or(0);
    let share = stopped.len() as f64 / runs as f64;
    eprintln!(
        "{what}: stopped {:.1} % of {runs}, after a median of {median} canary requests",
        share * 100.0
    );
    Figures { stopped: share, median }
}

#[test]
fn evidence_on_failures_or_slow_requests_keeps_to_its_alpha_and_finds_what_is_bad() {
    // What is counted, failures or slow requests, makes no difference to the evidence.
    let course = |candidate, stable, runs| {
        let what = format!("{} % against {} %", candidate * 100.0, stable * 100.0);
        figures(&what, runs, |chance| caught_after(chance, candidate, stable))
    };
    for rate in [0.005, 0.05] {
        let equal = course(rate, rate, 1000);
        assert!(equal.stopped <= ALPHA, "{}", equal.stopped);
    }
    for candidate in [0.0, 0.001] {
        assert!(course(candidate, 0.005, 1000).stopped <= 0.0);
    }
    let bad = course(0.1, 0.005, 1000);
    assert!(bad.stopped >= 1.0 && bad.median <= 30, "{}", bad.median);
    assert!(course(0.1, 0.0, 1000).stopped >= 1.0);
    // For the record.
    assert!(course(0.0025, 0.005, 1000).stopped <= 0.005);
    assert!(course(0.02, 0.005, 1000).stopped >= 1.0);
    assert!(course(0.01, 0.005, 1000).stopped >= 0.95);
}

/// What one second of a simulated canary's life brings.
#[derive(Clone, Copy)]
struct Traffic {
    rate: u64,
    /// Shares of failures.
    candidate: f64,
    stable: f64,
    /// Shares of requests that take over 10 ms.
    candidate_slow: f64,
    stable_slow: f64,
}

const EQUAL: Traffic =
    Traffic { rate: 500, candidate: 0.005, stable: 0.005, candidate_slow: 0.01, stable_slow: 0.01 };

/// A rollout of the default weights with every guard that needs no shadow, in short steps.
fn rollout() -> Sim {
    let steps: Vec<_> = [1, 5, 25, 50, 100]
        .map(|weight| json!({"weight": weight, "bake_s": 20, "min_samples": 100}))
        .to_vec();
    Sim::new(plan(json!({
        "candidate": "2", "steps": steps, "guards": {"slow_share": {"threshold_ms": 10}},
    })))
}

fn count(sim: &mut Sim, chance: &mut Chance, requests: u64, traffic: &Traffic) {
    let share = sim.rollout.weight / 100.0;
    let candidate = chance.successes(requests, share);
    let arms = [
        (&mut sim.candidate, candidate, traffic.candidate, traffic.candidate_slow),
        (&mut sim.stable, requests - candidate, traffic.stable, traffic.stable_slow),
    ];
    for (totals, requests, failing, slow) in arms {
        let Some(totals) = totals else { continue };
        let (failures, slow) =
            (chance.successes(requests, failing), chance.successes(requests, slow));
        totals.ok += requests - failures;
        totals.failures += failures;
        totals.latency[4] += requests - slow;
        totals.latency[9] += slow;
    }
}

/// Lives until it ends; gives its state and the candidate's requests. `looks` a second.
fn live(chance: &mut Chance, traffic: &Traffic, looks: u64) -> (Sim, u64) {
    let mut sim = rollout();
    for _ in 0..3_000 {
        for _ in 0..looks {
            count(&mut sim, chance, traffic.rate / looks, traffic);
            let action = sim.look_after(Duration::from_secs(1) / u32::try_from(looks).unwrap_or(1));
            if sim.rollout.state.ended() {
                assert!(matches!(action, Action::Promote | Action::RollBack));
                let requests =
                    sim.candidate.as_ref().map_or(0, |totals| totals.ok + totals.failures);
                return (sim, requests);
            }
        }
    }
    panic!("a rollout that does not end: {:?}", sim.rollout.waiting_for);
}

fn rolled_back(what: &str, runs: u64, looks: u64, traffic: &Traffic) -> Figures {
    figures(what, runs, |chance| {
        let (sim, requests) = live(chance, traffic, looks);
        (sim.rollout.state == State::RolledBack).then_some(requests)
    })
}

#[test]
fn whole_rollouts_take_back_what_is_bad_and_little_else() {
    let equal = rolled_back("rollouts of equals", 100, 1, &EQUAL);
    assert!(equal.stopped <= ALPHA, "{}", equal.stopped);
    let better = Traffic { candidate: 0.001, candidate_slow: 0.002, ..EQUAL };
    assert!(rolled_back("rollouts of better ones", 60, 1, &better).stopped <= 0.0);
    // Looks come 20 ms after a failure at the latest, as alarms bring them.
    let bad = Traffic { candidate: 0.1, ..EQUAL };
    let bad = rolled_back("rollouts with 10 % against 0.5 % failures", 100, 50, &bad);
    assert!(bad.stopped >= 1.0 && bad.median <= 30, "{} {}", bad.stopped, bad.median);
    let slow = Traffic { candidate_slow: 0.2, ..EQUAL };
    let slow = rolled_back("rollouts with 20 % against 1 % slow requests", 60, 10, &slow);
    assert!(slow.stopped >= 1.0 && slow.median <= 30, "{} {}", slow.stopped, slow.median);
    // Those of `reliability.md` that load and are bad: 5 % failures, ten times as slow, all failures.
    let worse = Traffic { candidate: 0.05, ..EQUAL };
    let worse = rolled_back("rollouts with 5 % against 0.5 % failures", 60, 10, &worse);
    assert!(worse.stopped >= 1.0, "{}", worse.stopped);
    let slower = Traffic { candidate_slow: 1.0, ..EQUAL };
    let slower = rolled_back("rollouts of one that is ten times as slow", 30, 10, &slower);
    assert!(slower.stopped >= 1.0 && slower.median <= 10, "{} {}", slower.stopped, slower.median);
    let dead = Traffic { candidate: 1.0, ..EQUAL };
    let dead = rolled_back("rollouts of one that always fails", 30, 10, &dead);
    assert!(dead.stopped >= 1.0 && dead.median <= 5, "{} {}", dead.stopped, dead.median);
}

#[test]
fn a_rollout_of_equals_says_what_each_guard_went_by() {
    let (sim, _) = live(&mut Chance(1), &EQUAL, 1);
    assert_eq!(sim.rollout.state, State::Promoted);
    let passes = |report: &super::GuardReport| report.outcome == GuardOutcome::Pass;
    assert!(sim.rollout.guards.iter().all(passes));
    let rate = sim.rollout.guards.iter().find(|report| report.guard == Guard::ErrorRate).unwrap();
    assert!(rate.evidence.unwrap() < rate.limit.unwrap());
    assert!(rate.candidate.unwrap().of > 1_000 && rate.stable.unwrap().of > 1_000);
}
