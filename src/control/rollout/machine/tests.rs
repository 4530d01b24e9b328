//! Courses of rollouts, and random steps held against the invariants.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::control::rollout::LabelTotals;
use crate::control::rollout::evidence::{Evidence, ShadowTotals};
use crate::control::rollout::invariants::broken;
use crate::observe::{ArmTotals, LATENCY_BUCKETS};

pub(in crate::control) fn plan(value: Value) -> Plan {
    let plan: Plan = serde_json::from_value(value).unwrap();
    assert!(plan.check().is_ok(), "{:?}", plan.check());
    plan
}

/// A rollout of version 2 of model `m` against version 1, with counters and a table that tests set.
pub(in crate::control) struct Sim {
    pub(in crate::control) rollout: Rollout,
    pub(in crate::control) candidate: Option<ArmTotals>,
    pub(in crate::control) stable: Option<ArmTotals>,
    pub(in crate::control) shadow: ShadowTotals,
    pub(in crate::control) labels: Option<LabelTotals>,
    pub(in crate::control) in_force: Option<Traffic>,
    pub(in crate::control) decisions: Vec<Decision>,
    now: Duration,
}

fn version(number: u64) -> Version {
    Version::new(number).unwrap()
}

impl Sim {
    pub(in crate::control) fn new(plan: Plan) -> Self {
        Self::over(plan, Traffic::all_to(version(1)))
    }

    fn over(plan: Plan, before: Traffic) -> Self {
        let model = "m".parse().unwrap();
        let (candidate, stable) = (version(2), version(1));
        let start = Start { model, candidate, stable, plan, before: before.clone() };
        assert_eq!(start.check(), Ok(()));
        let call = Call { actor: "alice".into(), ..Call::default() };
        let now = Now { at: Timestamp::UNIX_EPOCH, monotonic: Duration::ZERO };
        let (rollout, decision) = Rollout::start(start, now, &call);
        let mut sim = Self {
            rollout,
            candidate: Some(ArmTotals { instance: 2, ..ArmTotals::default() }),
            stable: Some(ArmTotals { instance: 1, ..ArmTotals::default() }),
            shadow: ShadowTotals { instance: 3, ..ShadowTotals::default() },
            labels: Some(LabelTotals::default()),
            in_force: Some(before),
            decisions: Vec::new(),
            now: Duration::ZERO,
        };
        sim.apply(decision);
        let decision = sim.step(0);
        sim.apply(decision);
        sim
    }

    pub(in crate::control) fn now(&self) -> Now {
        let at = Timestamp::UNIX_EPOCH + jiff::SignedDuration::try_from(self.now).unwrap();
        Now { at, monotonic: self.now }
    }

    fn observe(&self) -> Observation {
        let shares = self.in_force.as_ref().map(Traffic::shares).unwrap_or_default();
        Observation {
            share: shares.get(&version(2)).copied().unwrap_or(0),
            traffic: self.in_force.clone(),
            stable: self.stable.clone(),
            candidate: self.candidate.clone(),
            shadow: self.shadow,
            labels: self.labels,
            ..Observation::default()
        }
    }

    fn step(&mut self, seconds: u64) -> Decision {
        self.now += Duration::from_secs(seconds);
        let (now, seen) = (self.now(), self.observe());
        self.rollout.step(now, &seen)
    }

    /// Puts in force what was decided.
    fn apply(&mut self, decision: Decision) {
        if decision.holds() {
            return;
        }
        if decision.traffic.is_some() {
            self.in_force.clone_from(&decision.traffic);
        }
        self.rollout.carried_out(self.now());
        self.decisions.push(decision);
    }

    pub(in crate::control) fn count(&mut self, candidate: [u64; 2], stable: [u64; 2]) {
        let arms = [(&mut self.candidate, candidate), (&mut self.stable, stable)];
        for (totals, [ok, failures]) in arms {
            if let Some(totals) = totals {
                totals.ok += ok;
                totals.failures += failures;
                totals.latency[4] += ok + failures;
                let in_a_row = if ok > 0 { 0 } else { totals.failures_in_a_row + failures };
                totals.failures_in_a_row = totals.failures_in_a_row.max(in_a_row);
            }
        }
    }

    /// Counts requests, then looks once a second; the first decision ends it.
    pub(in crate::control) fn look(
        &mut self,
        seconds: u64,
        candidate_ok: u64,
        stable_ok: u64,
        candidate_failed: u64,
        stable_failed: u64,
    ) -> Action {
        self.count([candidate_ok, candidate_failed], [stable_ok, stable_failed]);
        for _ in 0..seconds {
            let decision = self.step(1);
            let action = decision.action;
            self.apply(decision);
            if action != Action::Hold {
                return action;
            }
        }
        Action::Hold
    }

    /// One look, so long after the one before.
    pub(in crate::control) fn look_after(&mut self, passed: Duration) -> Action {
        self.now += passed;
        let (now, seen) = (self.now(), self.observe());
        let decision = self.rollout.step(now, &seen);
        let action = decision.action;
        self.apply(decision);
        action
    }

    fn tell(&mut self, command: Command) -> Result<Action, Refusal> {
        let call = Call { actor: "bob".into(), ..Call::default() };
        let decision = self.rollout.command(self.now(), command, &call)?;
        let action = decision.action;
        self.apply(decision);
        Ok(action)
    }

    fn answer(&mut self, hook: HookKind, answer: &HookAnswer) -> Action {
        let decision = self.rollout.hook_answered(self.now(), hook, answer);
        let action = decision.action;
        self.apply(decision);
        action
    }

    fn share(&self) -> u16 {
        self.observe().share
    }

    fn cause(&self) -> Option<Cause> {
        self.rollout.reason.as_ref().map(|reason| reason.cause)
    }

    /// What a restart leaves: the record as it was written.
    fn restart(&mut self) {
        let text = serde_json::to_string(&self.rollout).unwrap();
        let read: Rollout = serde_json::from_str(&text).unwrap();
        let same = |value: &Rollout| {
            let Rollout { state, progress, history, reason, traffic, before, plan, .. } = value;
            let levels = &value.evidence.levels;
            let weight = value.weight.to_bits();
            let history: Vec<_> = history.iter().map(|one| (one.from, one.to, one.at)).collect();
            format!(
                "{state:?}{progress:?}{levels:?}{history:?}{reason:?}{traffic:?}{before:?}{plan:?}{weight}"
            )
        };
        assert_eq!(same(&read), same(&self.rollout));
        assert_eq!(read.evidence.shadow, self.rollout.evidence.shadow);
        self.rollout = read;
        // Counters begin anew with the process.
        for (instance, totals) in [(20, &mut self.candidate), (10, &mut self.stable)] {
            if let Some(totals) = totals {
                *totals =
                    ArmTotals { instance: totals.instance + instance, ..ArmTotals::default() };
            }
        }
        self.now = Duration::ZERO;
    }
}

fn short() -> Value {
    json!({
        "candidate": "2", "interval_s": 10, "inconclusive_max_s": 30,
        "steps": [
            {"weight": 5, "bake_s": 20, "min_samples": 100},
            {"weight": 50, "bake_s": 20, "min_samples": 100},
        ],
    })
}

fn short_with(key: &str, value: Value) -> Plan {
    let mut text = short();
    text[key] = value;
    plan(text)
}

#[test]
fn a_good_candidate_takes_every_step_when_it_is_due_and_is_promoted() {
    let mut sim = Sim::new(plan(short()));
    assert_eq!((sim.rollout.state, sim.share()), (State::Step { step: 0 }, 500));
    // Enough requests, too little time.
    assert_eq!(sim.look(19, 200, 3_800, 0, 0), Action::Hold);
    assert_eq!(sim.rollout.waiting_for, ["19 of 20 s"]);
    assert_eq!(sim.look(1, 0, 0, 0, 0), Action::SetTraffic);
    assert_eq!((sim.rollout.state, sim.share()), (State::Step { step: 1 }, 5_000));
    // Enough time, too few requests: those of the step before do not count.
    assert_eq!(sim.look(60, 99, 99, 0, 0), Action::Hold);
    assert_eq!(sim.rollout.waiting_for, ["99 of 100 requests"]);
    assert_eq!(sim.look(10, 1, 1, 0, 0), Action::Promote);
    assert_eq!((sim.rollout.state, sim.share()), (State::Promoted, 10_000));
    assert!(sim.rollout.ended_at.is_some());
    assert_eq!(sim.look(99, 0, 0, 900, 0), Action::Hold, "it has ended");
    let states: Vec<&str> = sim.rollout.history.iter().map(|one| one.to.as_str()).collect();
    assert_eq!(states, ["step", "step", "promoting", "promoted"]);
    let weights: Vec<f64> = sim.rollout.history.iter().map(|one| one.weight).collect();
    assert_eq!(weights, [5.0, 50.0, 100.0, 100.0]);
    let by: Vec<&str> = sim.rollout.history.iter().map(|one| &*one.by).collect();
    assert_eq!(by, ["alice", CONTROLLER, CONTROLLER, CONTROLLER]);
    let reason = sim.decisions[1].reason.as_ref().unwrap();
    assert_eq!(reason.message, "200 requests in 20 s, every guard passes");
    assert!(sim.decisions[1].guards.iter().all(|report| report.outcome == GuardOutcome::Pass));
}

#[test]
fn a_bad_candidate_goes_at_the_next_look_and_never_comes_back() {
    let mut sim = Sim::new(plan(short()));
    assert_eq!(sim.look(3, 50, 950, 0, 5), Action::Hold);
    assert_eq!(sim.look(1, 10, 200, 8, 1), Action::RollBack);
    assert_eq!((sim.rollout.state, sim.share()), (State::RolledBack, 0));
    assert_eq!((sim.cause(), sim.rollout.weight), (Some(Cause::Guard), 0.0));
    let decision = sim.decisions.last().unwrap();
    assert!(decision.guards.iter().any(|report| report.outcome == GuardOutcome::Fail));
    assert!(decision.reason.as_ref().unwrap().message.starts_with("error_rate: "));
    assert_eq!(sim.look(999, 9_999, 9_999, 0, 0), Action::Hold);
    for command in [Command::Pause, Command::Resume, Command::Promote, Command::Abort] {
        assert!(matches!(sim.tell(command), Err(Refusal::Conflict(_))));
    }
    // No statistics: five failures and nothing else.
    let mut sim = Sim::new(plan(short()));
    assert_eq!(sim.look(1, 0, 0, 5, 0), Action::RollBack);
    let floor = sim.rollout.guards.iter().find(|report| report.guard == guards::Guard::Floor);
    assert_eq!(floor.unwrap().why, "5 failures in a row");
}

#[test]
fn a_rollback_is_decided_again_until_it_is_carried_out() {
    let mut sim = Sim::new(plan(short()));
    sim.count([0, 9], [0, 0]);
    let first = sim.step(1);
    assert_eq!((first.action, sim.rollout.state), (Action::RollBack, State::RollingBack));
    let records = sim.rollout.history.len();
    for _ in 0..3 {
        let again = sim.step(1);
        assert_eq!((again.action, &again.traffic), (Action::RollBack, &first.traffic));
    }
    assert_eq!(sim.rollout.history.len(), records);
    assert!(matches!(sim.tell(Command::Pause), Err(Refusal::Conflict(_))));
    sim.restart();
    assert_eq!(sim.step(1).action, Action::RollBack);
    sim.apply(first);
    assert_eq!((sim.rollout.state, sim.share()), (State::RolledBack, 0));
}

#[test]
fn copies_come_first_and_are_gone_with_the_first_weight() {
    let mut text = short();
    text["shadow"] = json!({"percent": 50, "bake_s": 10, "samples": 300});
    text["guards"] = json!({"shadow_disagreement": {"max": 0.05}});
    let mut sim = Sim::new(plan(text));
    assert_eq!((sim.rollout.state, sim.share()), (State::Shadow, 0));
    assert_eq!(sim.in_force.as_ref().unwrap().shadows[0].share(), 5_000);
    sim.shadow.tally.compared = 100;
    assert_eq!(sim.look(20, 0, 500, 0, 3), Action::Hold);
    assert_eq!(sim.rollout.waiting_for[0], "100 of 300 copied requests");
    sim.shadow.tally.compared = 1_000;
    assert_eq!(sim.look(10, 0, 500, 0, 3), Action::SetTraffic);
    assert!(sim.in_force.as_ref().unwrap().shadows.is_empty());
    assert_eq!(sim.share(), 500);
    // Copies that disagree.
    let mut other = short();
    other["shadow"] = json!({});
    other["guards"] = json!({"shadow_disagreement": {"max": 0.05}});
    let mut sim = Sim::new(plan(other));
    sim.shadow.tally.compared = 200;
    sim.shadow.tally.disagreed = 60;
    assert_eq!(sim.look(1, 0, 0, 0, 0), Action::RollBack);
    assert!(sim.in_force.as_ref().unwrap().shadows.is_empty());
}

#[test]
fn a_guard_that_stays_inconclusive_pauses_and_one_that_fails_still_counts_then() {
    let paused = |roll_back: bool| {
        let mut sim = Sim::new(short_with("roll_back_when_paused", json!(roll_back)));
        // 10 % where 5 % was meant.
        assert_eq!(sim.look(49, 200, 1_800, 0, 0), Action::Hold);
        assert!(sim.rollout.waiting_for[0].starts_with("sample_ratio: "));
        assert_eq!(sim.look(1, 0, 0, 0, 0), Action::Pause);
        assert_eq!((sim.cause(), sim.share()), (Some(Cause::Inconclusive), 500));
        assert_eq!(sim.look(500, 9, 9, 0, 0), Action::Hold);
        sim
    };
    let mut sim = paused(true);
    assert_eq!(sim.look(1, 0, 0, 9, 0), Action::RollBack);
    let mut sim = paused(false);
    assert_eq!(sim.look(9, 0, 0, 9, 0), Action::Hold);
    assert_eq!(sim.tell(Command::Resume), Ok(Action::Resume));
    assert_eq!(sim.look(1, 0, 0, 0, 0), Action::RollBack);
}

#[test]
fn who_waits_at_the_end_is_promoted_by_hand() {
    for command in [Command::Resume, Command::Promote] {
        let mut sim = Sim::new(short_with("on_pass", json!("pause")));
        assert_eq!(sim.look(20, 500, 9_500, 0, 0), Action::SetTraffic);
        assert_eq!(sim.look(20, 500, 500, 0, 0), Action::Pause);
        assert_eq!((sim.cause(), sim.share()), (Some(Cause::Passed), 5_000));
        assert_eq!(sim.tell(command), Ok(Action::Promote));
        assert_eq!((sim.rollout.state, sim.share()), (State::Promoted, 10_000));
        assert_eq!(sim.rollout.history.last().unwrap().by, "bob");
    }
}

#[test]
fn people_pause_resume_promote_and_abort() {
    let mut sim = Sim::new(plan(short()));
    assert_eq!(sim.look(15, 200, 3_800, 0, 0), Action::Hold);
    assert!(matches!(sim.tell(Command::Resume), Err(Refusal::Conflict(_))));
    assert_eq!(sim.tell(Command::Pause), Ok(Action::Pause));
    assert!(matches!(sim.tell(Command::Pause), Err(Refusal::Conflict(_))));
    assert_eq!(sim.look(500, 1_000, 19_000, 0, 0), Action::Hold);
    assert_eq!(sim.tell(Command::Resume), Ok(Action::Resume));
    // A pause is no time at the weight.
    assert_eq!(sim.look(4, 0, 0, 0, 0), Action::Hold);
    assert_eq!(sim.look(6, 0, 0, 0, 0), Action::SetTraffic);
    assert_eq!(sim.tell(Command::Promote), Ok(Action::Promote));
    assert_eq!(sim.share(), 10_000);
    let mut sim = Sim::new(plan(short()));
    assert_eq!(sim.tell(Command::Abort), Ok(Action::Abort));
    assert_eq!((sim.rollout.state, sim.share()), (State::Aborted, 0));
    assert_eq!(sim.cause(), Some(Cause::Person));
}

#[test]
fn hooks_hold_the_start_and_the_promotion() {
    let asked = || Sim::new(short_with("hooks", json!(["confirm-rollout", "confirm-promotion"])));
    let (start, end) = (HookKind::ConfirmRollout, HookKind::ConfirmPromotion);
    let mut sim = asked();
    assert_eq!(sim.decisions[0].hook, Some(start));
    assert_eq!(sim.look(99, 0, 0, 0, 0), Action::Hold);
    assert_eq!((sim.share(), &sim.rollout.traffic), (0, &None));
    assert_eq!(sim.answer(end, &HookAnswer::Go), Action::Hold, "nobody asked that");
    assert_eq!(sim.answer(start, &HookAnswer::Go), Action::SetTraffic);
    assert_eq!(sim.answer(start, &HookAnswer::No("late".into())), Action::Hold);
    assert_eq!(sim.look(20, 500, 9_500, 0, 0), Action::SetTraffic);
    assert_eq!(sim.look(20, 500, 500, 0, 0), Action::CallHook);
    assert_eq!((sim.decisions.last().unwrap().hook, sim.share()), (Some(end), 5_000));
    // Asked again after a restart, and after a pause.
    sim.restart();
    assert_eq!(sim.look(1, 0, 0, 0, 0), Action::CallHook);
    assert_eq!(sim.answer(end, &HookAnswer::None("away".into())), Action::Pause);
    assert_eq!(sim.tell(Command::Resume), Ok(Action::Resume));
    assert_eq!(sim.decisions.last().unwrap().hook, Some(end));
    assert_eq!(sim.answer(end, &HookAnswer::Go), Action::Promote);
    assert_eq!(sim.share(), 10_000);
    // A no is an end; before anything changed it changes nothing.
    let mut sim = asked();
    assert_eq!(sim.answer(start, &HookAnswer::No("freeze".into())), Action::Abort);
    assert_eq!((sim.rollout.state, &sim.rollout.traffic), (State::Aborted, &None));
    let mut sim = asked();
    sim.answer(start, &HookAnswer::Go);
    sim.look(20, 500, 9_500, 0, 0);
    sim.look(20, 500, 500, 0, 0);
    assert_eq!(sim.answer(end, &HookAnswer::No("worse".into())), Action::RollBack);
    assert_eq!(sim.rollout.reason.as_ref().unwrap().message, "confirm-promotion: worse");
    // A guard that fails meanwhile does not wait for the answer.
    let mut sim = asked();
    sim.answer(start, &HookAnswer::Go);
    sim.look(20, 500, 9_500, 0, 0);
    sim.look(20, 500, 500, 0, 0);
    assert_eq!(sim.look(1, 0, 0, 9, 0), Action::RollBack);
}

#[test]
fn a_table_set_by_hand_ends_it_and_stays() {
    let by_hand =
        Traffic { weights: [(version(1), 80.0), (version(2), 20.0)].into(), ..Traffic::default() };
    for table in [Some(by_hand), None] {
        let mut sim = Sim::new(plan(short()));
        sim.look(3, 50, 950, 0, 0);
        sim.in_force.clone_from(&table);
        assert_eq!(sim.look(1, 0, 0, 9, 0), Action::Abort);
        assert_eq!((sim.cause(), &sim.in_force), (Some(Cause::Superseded), &table));
        assert!(sim.rollout.state.ended());
    }
    // While it waits to begin, too.
    let mut sim = Sim::new(short_with("hooks", json!(["confirm-rollout"])));
    sim.in_force = Some(Traffic::all_to(version(2)));
    assert_eq!(sim.look(1, 0, 0, 0, 0), Action::Abort);
    // The same table in other numbers is the same table.
    let mut sim = Sim::new(plan(short()));
    sim.in_force.as_mut().unwrap().weights.values_mut().for_each(|weight| *weight /= 100.0);
    assert_eq!(sim.look(3, 0, 0, 0, 0), Action::Hold);
}

#[test]
fn a_dry_run_decides_and_changes_nothing() {
    let before =
        Traffic { weights: [(version(1), 95.0), (version(2), 5.0)].into(), ..Traffic::default() };
    let mut sim = Sim::over(short_with("dry_run", json!(true)), before.clone());
    assert_eq!(sim.look(20, 500, 9_500, 0, 0), Action::SetTraffic);
    assert_eq!(sim.look(20, 500, 9_500, 0, 0), Action::Promote);
    assert_eq!((sim.rollout.state, sim.rollout.weight), (State::Promoted, 0.0));
    assert_eq!((&sim.in_force, &sim.rollout.traffic), (&Some(before.clone()), &None));
    let mut sim = Sim::over(short_with("dry_run", json!(true)), before.clone());
    assert_eq!(sim.look(1, 0, 0, 9, 0), Action::RollBack);
    assert_eq!(sim.in_force, Some(before));
    assert!(sim.decisions.iter().all(|decision| decision.dry_run && decision.traffic.is_none()));
}

#[test]
fn versions_that_are_gone_for_long_end_it() {
    let mut sim = Sim::new(plan(short()));
    let (stable, candidate) = (sim.stable.clone(), sim.candidate.clone());
    sim.candidate = None;
    assert_eq!(sim.look(29, 0, 9_500, 0, 0), Action::Hold);
    assert!(sim.rollout.waiting_for.iter().any(|what| what == "version 2 is not loaded"));
    sim.candidate.clone_from(&candidate);
    assert_eq!(sim.look(9, 0, 9_500, 0, 0), Action::Hold);
    sim.candidate = None;
    assert_eq!(sim.look(30, 0, 9_500, 0, 0), Action::RollBack);
    assert_eq!((sim.cause(), sim.share()), (Some(Cause::CandidateGone), 0));
    let mut sim = Sim::new(plan(short()));
    sim.stable = None;
    assert_eq!(sim.look(30, 10, 0, 0, 0), Action::Fail);
    assert_eq!(
        (sim.rollout.state, sim.cause(), sim.share()),
        (State::Failed, Some(Cause::StableGone), 500)
    );
    // After a restart they may take their time to load.
    let mut sim = Sim::new(plan(short()));
    sim.restart();
    (sim.stable, sim.candidate) = (None, None);
    assert_eq!(sim.look(599, 0, 0, 0, 0), Action::Hold);
    assert_eq!(sim.rollout.progress.ms, 0);
    (sim.stable, sim.candidate) = (stable, candidate);
    assert_eq!(sim.look(19, 200, 3_800, 0, 0), Action::Hold);
    // Whether to go on is looked at every ten seconds.
    assert_eq!(sim.look(3, 0, 0, 0, 0), Action::SetTraffic);
}

#[test]
fn what_is_refused_pauses_or_fails() {
    let mut sim = Sim::new(plan(short()));
    let now = sim.now();
    let decision = sim.rollout.refused(now, "no approval");
    assert_eq!((decision.action, sim.cause()), (Action::Pause, Some(Cause::Refused)));
    assert!(sim.rollout.refused(now, "no approval").holds());
    let mut sim = Sim::new(short_with("hooks", json!(["confirm-rollout"])));
    assert_eq!(sim.rollout.refused(now, "no approval").action, Action::Fail);
}

#[test]
fn latency_is_compared_with_what_the_stable_version_took_before() {
    let mut sim = Sim::new(short_with("guards", json!({"latency_ratio": {"ratio_max": 1.5}})));
    assert_eq!(sim.look(10, 20, 999, 0, 0), Action::Hold);
    assert_eq!(sim.rollout.latency_reference, None);
    assert!(sim.rollout.waiting_for.iter().any(|what| what.contains("999 of 1000")));
    sim.look(1, 80, 901, 0, 0);
    let reference = sim.rollout.latency_reference.unwrap();
    // All took 250 to 500 us: p95 is 487.5 us, half as much again is beyond 500 us.
    assert!((reference.quantile_ms - 0.4875).abs() < 1e-9, "{reference:?}");
    assert_eq!(reference.threshold_ms, Some(1.0));
    assert_eq!(sim.look(9, 0, 0, 0, 0), Action::SetTraffic);
    // A fifth of the candidate's take 5 to 10 ms.
    let candidate = sim.candidate.as_mut().unwrap();
    candidate.ok += 300;
    candidate.latency[7] += 60;
    candidate.latency[4] += 240;
    assert_eq!(sim.look(1, 0, 300, 0, 0), Action::RollBack);
    assert!(sim.rollout.reason.as_ref().unwrap().message.starts_with("latency_ratio: "));
    let report =
        sim.rollout.guards.iter().find(|report| report.guard == guards::Guard::LatencyRatio);
    assert_eq!(report.unwrap().threshold_ms, Some(1.0));
}

#[test]
fn a_rollout_begins_between_two_versions_or_not_at_all() {
    let start = |candidate, before: Value, plan: Value| Start {
        model: "m".parse().unwrap(),
        candidate: version(candidate),
        stable: version(1),
        plan: serde_json::from_value(plan).unwrap(),
        before: serde_json::from_value(before).unwrap(),
    };
    let check = |start: Start| start.check().err().unwrap_or_default();
    assert!(check(start(2, json!({"weights": {"1": 1, "3": 0}}), short())).is_empty());
    let problems = check(start(
        1,
        json!({"weights": {"1": 1, "3": 1}}),
        json!({"candidate": "1", "interval_s": 0}),
    ));
    assert_eq!(problems.len(), 3, "{problems:?}");
    let shadows: Vec<Value> = (3..11).map(|at| json!({"version": at, "percent": 1})).collect();
    let full = json!({"weights": {"1": 1}, "shadows": shadows});
    assert_eq!(check(start(2, full.clone(), json!({"candidate": "2"}))).len(), 1);
    assert!(check(start(2, full, short())).is_empty());
}

#[test]
fn each_rollout_has_its_own_salt() {
    let (one, other) = (Sim::new(plan(short())), Sim::new(plan(short())));
    assert_ne!(one.rollout.salt(), other.rollout.salt());
    assert_ne!(one.rollout.salt(), 0);
    let text = serde_json::to_string(&one.rollout).unwrap();
    let read: Rollout = serde_json::from_str(&text).unwrap();
    assert_eq!(read.salt(), one.rollout.salt());
}

#[test]
fn history_is_bounded_and_keeps_the_start() {
    let mut sim = Sim::new(plan(short()));
    for _ in 0..HISTORY_MAX {
        sim.tell(Command::Pause).unwrap();
        sim.tell(Command::Resume).unwrap();
    }
    assert_eq!(sim.rollout.history.len(), HISTORY_MAX);
    assert_eq!(sim.rollout.history_dropped, HISTORY_MAX as u64 + 1);
    assert_eq!(sim.rollout.history[0].by, "alice");
}

/// Something that happens to a rollout.
#[derive(Clone, Debug)]
enum Op {
    Look {
        seconds: u64,
        candidate: [u64; 2],
        stable: [u64; 2],
        slow: u64,
        copies: [u64; 3],
    },
    Tell(Command),
    Answer(HookKind, HookAnswer),
    /// The table of another.
    Hand(u8),
    Gone {
        candidate: bool,
        stable: bool,
    },
    Restart,
    Refused,
    /// What is decided next is not carried out, and the old record stays.
    NotCarriedOut,
}

fn ops() -> impl Strategy<Value = Op> {
    let count = || (0_u64..400, prop_oneof![4 => Just(0_u64), 1 => 0_u64..4, 1 => 0_u64..40]);
    let pair = |(ok, failed)| [ok, failed];
    let copies = (0_u64..300, 0_u64..3, 0_u64..2).prop_map(|(a, b, c)| [a, b, c]);
    let look = (1_u64..40, count(), count(), 0_u64..4, copies);
    let look = look.prop_map(move |(seconds, candidate, stable, slow, copies)| Op::Look {
        seconds,
        candidate: pair(candidate),
        stable: pair(stable),
        slow,
        copies,
    });
    let command = prop_oneof![
        4 => Just(Command::Pause),
        6 => Just(Command::Resume),
        1 => Just(Command::Promote),
        1 => Just(Command::Abort),
    ];
    let hook = prop_oneof![Just(HookKind::ConfirmRollout), Just(HookKind::ConfirmPromotion)];
    let answer = prop_oneof![
        6 => Just(HookAnswer::Go),
        1 => Just(HookAnswer::No("no".to_owned())),
        1 => Just(HookAnswer::None("away".to_owned())),
    ];
    let gone = (any::<bool>(), any::<bool>());
    prop_oneof![
        30 => look,
        4 => command.prop_map(Op::Tell),
        8 => (hook, answer).prop_map(|(hook, answer)| Op::Answer(hook, answer)),
        1 => (0_u8..3).prop_map(Op::Hand),
        1 => gone.prop_map(|(candidate, stable)| Op::Gone { candidate, stable }),
        2 => Just(Op::Restart),
        1 => Just(Op::Refused),
        4 => Just(Op::NotCarriedOut),
    ]
}

fn plans() -> impl Strategy<Value = Plan> {
    let steps = prop::collection::btree_set(1_u16..=10_000, 1..5);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (steps, 0_u64..40, 0_u64..300, 1_u64..20, flags).prop_map(
        |(steps, bake_s, min_samples, interval_s, (dry_run, shadow, asks, pause, armed))| {
            let steps: Vec<Value> = steps
                .into_iter()
                .map(|points| json!({"weight": f64::from(points) / 100.0, "bake_s": bake_s, "min_samples": min_samples}))
                .collect();
            let mut text = json!({
                "candidate": "2", "steps": steps, "interval_s": interval_s,
                "inconclusive_max_s": 60, "dry_run": dry_run, "roll_back_when_paused": armed,
                "on_pass": if pause { "pause" } else { "promote" },
                "hooks": if asks { json!(["confirm-rollout", "confirm-promotion"]) } else { json!([]) },
                "guards": {"slow_share": {"threshold_ms": 10}, "latency_ratio": {"ratio_max": 2}},
            });
            if shadow && !dry_run {
                text["shadow"] = json!({"samples": min_samples, "bake_s": bake_s});
                text["guards"]["shadow_disagreement"] = json!({"max": 0.1});
            }
            plan(text)
        },
    )
}

/// One change: decides on the record, and holds the outcome against the invariants.
fn checked(
    sim: &mut Sim,
    carried_out: bool,
    decide: impl FnOnce(&mut Rollout) -> Decision,
) -> Result<(), TestCaseError> {
    let before = sim.rollout.clone();
    let decision = decide(&mut sim.rollout);
    let wrong = broken(&before, &sim.rollout, &decision);
    prop_assert!(wrong.is_empty(), "{wrong:?}: {:?} to {:?}", before.state, sim.rollout.state);
    if !carried_out && decision.action != Action::RollBack {
        sim.rollout = before;
        return Ok(());
    }
    if carried_out {
        sim.apply(decision);
    }
    Ok(())
}

fn play(sim: &mut Sim, op: &Op, carried_out: bool) -> Result<(), TestCaseError> {
    match op {
        Op::Look { seconds, candidate, stable, slow, copies } => {
            if sim.share() > 0 {
                sim.count(*candidate, [0, 0]);
            }
            sim.count([0, 0], *stable);
            if let Some(totals) = &mut sim.candidate {
                totals.latency[LATENCY_BUCKETS - 2] += slow;
            }
            if sim.rollout.state == State::Shadow {
                let tally = &mut sim.shadow.tally;
                tally.compared += copies[0];
                tally.disagreed += copies[1].min(copies[0]);
                tally.failed += copies[2];
            }
            for _ in 0..*seconds {
                sim.now += Duration::from_secs(1);
                let (now, seen) = (sim.now(), sim.observe());
                checked(sim, carried_out, |rollout| rollout.step(now, &seen))?;
            }
        }
        Op::Tell(command) => {
            let (now, before) = (sim.now(), sim.rollout.clone());
            let call = Call { actor: "bob".into(), ..Call::default() };
            checked(sim, carried_out, |rollout| {
                rollout.command(now, *command, &call).unwrap_or_else(|_| before.hold())
            })?;
        }
        Op::Answer(hook, answer) => {
            let now = sim.now();
            checked(sim, carried_out, |rollout| rollout.hook_answered(now, *hook, answer))?;
        }
        Op::Hand(which) => {
            let half = [(version(1), 50.0), (version(2), 50.0)].into();
            sim.in_force = match which {
                0 => None,
                1 => Some(Traffic::all_to(version(1))),
                _ => Some(Traffic { weights: half, ..Traffic::default() }),
            };
        }
        Op::Gone { candidate, stable } => {
            let new = |instance| Some(ArmTotals { instance, ..ArmTotals::default() });
            sim.candidate = if *candidate { None } else { new(200) };
            sim.stable = if *stable { None } else { new(100) };
        }
        Op::Restart => sim.restart(),
        Op::Refused => {
            let now = sim.now();
            checked(sim, carried_out, |rollout| rollout.refused(now, "no"))?;
        }
        Op::NotCarriedOut => {}
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn random_steps_break_no_invariant(plan in plans(), ops in prop::collection::vec(ops(), 1..60)) {
        let mut sim = Sim::new(plan);
        let dry_run = sim.rollout.plan.dry_run;
        let mut by_hand = false;
        let mut carried_out = true;
        for op in &ops {
            let before = sim.in_force.clone();
            play(&mut sim, op, carried_out)?;
            carried_out = !matches!(op, Op::NotCarriedOut);
            by_hand |= matches!(op, Op::Hand(_));
            if dry_run && !matches!(op, Op::Hand(_)) {
                prop_assert_eq!(&before, &sim.in_force);
            }
            if sim.rollout.state == State::RolledBack && !dry_run && !by_hand {
                prop_assert_eq!(sim.share(), 0);
            }
            if sim.rollout.state == State::Promoted && !dry_run && !by_hand {
                prop_assert_eq!(sim.share(), 10_000);
            }
            prop_assert!(sim.rollout.history.windows(2).all(|pair| pair[0].to == pair[1].from));
            prop_assert!(sim.rollout.evidence.levels.len() <= 8);
            prop_assert_eq!(sim.rollout.state.ended(), sim.rollout.ended_at.is_some());
        }
    }
}

#[test]
fn a_record_reads_back_in_every_state() {
    let mut sim = Sim::new(short_with("hooks", json!(["confirm-rollout"])));
    sim.restart();
    sim.answer(HookKind::ConfirmRollout, &HookAnswer::Go);
    sim.look(5, 50, 950, 0, 3);
    sim.restart();
    sim.tell(Command::Pause).unwrap();
    sim.restart();
    assert!(matches!(sim.rollout.state, State::Paused { .. }));
    sim.tell(Command::Resume).unwrap();
    sim.look(20, 200, 3_800, 1, 20);
    assert_eq!(sim.rollout.evidence.candidate().requests, 251);
    let value = serde_json::to_value(&sim.rollout).unwrap();
    assert_eq!(value["state"], "step");
    assert_eq!(value["evidence"].get("before"), None);
    assert!(serde_json::from_value::<Evidence>(value["evidence"].clone()).is_ok());
    sim.tell(Command::Abort).unwrap();
    sim.restart();
    assert!(sim.rollout.state.ended());
}
