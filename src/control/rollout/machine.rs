//! The state machine: what is seen and said in, decisions out; no clock, no side effects.
//!
//! ```text
//! start ─▶ [pending_hook: confirm-rollout] ─▶ [shadow] ─▶ step 0 ─▶ step 1 ─▶ … ─▶ last step
//!                                                 │ all guards pass, time, requests    │
//!                                                 ▼                                    ▼
//!   any of these ──a guard fails──▶ rolling_back ─▶ rolled_back    [pending_hook: confirm-promotion]
//!   any of these ──pause, or inconclusive for too long──▶ paused                       │
//!   any of these ──abort, or a table set by hand──▶ aborted              promoting ─▶ promoted
//! ```
//!
//! A decision is made on a copy of the record. Whoever carries it out takes the copy for the record
//! when that has worked, and keeps the old one when it has not: then the same is decided again.

use std::time::Duration;

use jiff::Timestamp;
use uuid::Uuid;

use super::evidence::{Event, Observation, Thresholds, bound_at, quantile_ns};
use super::guards::{self, GuardOutcome, GuardReport, LEARN_MIN, Sight};
use super::plan::{OnPass, STEPS_MAX};
use super::{
    Action, CONTROLLER, Cause, Command, Decision, HISTORY_MAX, HookKind, LatencyReference, Plan,
    Progress, Reason, Rollout, Stage, State, Transition, invariants, tables,
};
use crate::control::call::{Call, Refusal};
use crate::domain::{BUCKETS, ModelName, SHADOWS_MAX, Traffic, Version};
use crate::observe::LATENCY_BOUNDS_NS;

/// A version that has gone for so long will not come back by itself.
const ABSENT_MAX: Duration = Duration::from_secs(30);
/// Nor will one that has not come yet since the process was started.
const LOADING_MAX: Duration = Duration::from_secs(600);
/// Most time that one look may add to a step: a process that stood still has not seen anything.
const LOOK_MAX: Duration = Duration::from_secs(5);

/// A moment: the time of day for the record, and a clock that never jumps for decisions.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    pub at: Timestamp,
    /// Since some moment in the life of this process.
    pub monotonic: Duration,
}

/// Known only while the process lives.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Present {
    /// When it was last looked at.
    looked: Option<Duration>,
    /// The hook of the present state has been asked.
    asked: bool,
    candidate: Absence,
    stable: Absence,
    /// Requests that the stable version's quantile can be taken from.
    learnt_from: u64,
}

/// How long a version has not been loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Absence {
    seen: bool,
    lasts: Duration,
}

impl Absence {
    /// Whether it has lasted too long.
    fn look(&mut self, present: bool, passed: Duration) -> bool {
        self.seen |= present;
        self.lasts = if present { Duration::ZERO } else { self.lasts + passed };
        self.lasts >= if self.seen { ABSENT_MAX } else { LOADING_MAX }
    }
}

/// What a rollout begins with.
#[derive(Clone, Debug)]
pub struct Start {
    pub model: ModelName,
    /// What the plan's candidate resolves to.
    pub candidate: Version,
    pub stable: Version,
    pub plan: Plan,
    /// The traffic table in force; everything to the stable version where there is none.
    pub before: Traffic,
}

impl Start {
    /// # Errors
    /// Every problem of the plan and of the table that it would begin with.
    pub fn check(&self) -> Result<(), Vec<String>> {
        let mut problems = self.plan.check().err().unwrap_or_default();
        let Self { candidate, stable, before, .. } = self;
        if candidate == stable {
            problems.push(format!("candidate: {candidate} is the stable version already"));
        }
        let positive = before.weights.iter().filter(|(_, weight)| **weight > 0.0);
        let others: Vec<String> = positive
            .map(|(version, _)| version)
            .filter(|version| *version != candidate && *version != stable)
            .map(ToString::to_string)
            .collect();
        if !others.is_empty() {
            problems.push(format!(
                "candidate: version {} has a weight too, and a rollout compares two; set the \
                 traffic to one version first",
                others.join(" and version ")
            ));
        }
        let taken = before.shadows.iter().filter(|shadow| shadow.version != *candidate).count();
        if self.plan.clone().filled().shadow.is_some() && taken >= SHADOWS_MAX {
            problems.push(format!("shadow: the traffic table has {SHADOWS_MAX} shadows already"));
        }
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }
}

impl Rollout {
    /// A rollout and its first decision. Check `start` before.
    pub fn start(start: Start, now: Now, call: &Call) -> (Self, Decision) {
        let Start { model, candidate, stable, plan, before } = start;
        let mut rollout = Self {
            id: Uuid::now_v7().to_string(),
            model,
            candidate,
            stable,
            plan: plan.filled(),
            // Left by the next lines.
            state: State::PendingHook { hook: HookKind::ConfirmRollout },
            reason: None,
            weight: 0.0,
            waiting_for: Vec::new(),
            guards: Vec::new(),
            evidence: super::Evidence::starting(),
            started_at: now.at,
            started_by: call.actor.clone(),
            started_for: call.reason.clone(),
            ended_at: None,
            history: Vec::new(),
            history_dropped: 0,
            before,
            traffic: None,
            progress: Progress::default(),
            latency_reference: None,
            present: Present { looked: Some(now.monotonic), ..Present::default() },
        };
        let first = match rollout.plan.calls(HookKind::ConfirmRollout) {
            true => Stage::PendingHook { hook: HookKind::ConfirmRollout },
            false => rollout.first_stage(),
        };
        let reason = call.reason.as_ref().map(|said| Reason::new(Cause::Person, said));
        let decision = rollout.enter(first, &By { at: now.at, actor: &call.actor }, reason);
        (rollout, decision)
    }

    /// The key that sticky keys and prediction ids are hashed with while it runs, so that it is not
    /// always the same users who get a new version first.
    pub fn salt(&self) -> u64 {
        // The random half of the id.
        self.id.parse::<Uuid>().map_or(0, |id| id.as_u64_pair().1)
    }

    /// Looks at what has happened, and decides.
    pub fn step(&mut self, now: Now, seen: &Observation) -> Decision {
        self.asserting(|rollout| rollout.decide(now, seen))
    }

    /// What a hook has answered. An answer that nobody waits for any more changes nothing.
    pub fn hook_answered(&mut self, now: Now, hook: HookKind, answer: &HookAnswer) -> Decision {
        self.asserting(|rollout| {
            if rollout.state != (State::PendingHook { hook }) {
                return rollout.hold();
            }
            let by = By::controller(now);
            let reason = |said: &str| Reason::new(Cause::Hook, format!("{hook}: {said}"));
            match (answer, hook) {
                (HookAnswer::Go, HookKind::ConfirmRollout) => {
                    let first = rollout.first_stage();
                    rollout.enter(first, &by, Some(reason("go")))
                }
                (HookAnswer::Go, _) => rollout.promoting(&by, reason("go")),
                (HookAnswer::No(said), HookKind::ConfirmRollout) => {
                    rollout.aborting(&by, reason(said))
                }
                (HookAnswer::No(said), _) => rollout.rolling_back(&by, reason(said)),
                (HookAnswer::None(why), _) => rollout.pausing(&by, reason(why)),
            }
        })
    }

    /// What somebody says.
    ///
    /// # Errors
    /// `Conflict` when the rollout is in no state for it.
    pub fn command(
        &mut self,
        now: Now,
        command: Command,
        call: &Call,
    ) -> Result<Decision, Refusal> {
        let (word, state) = (command.as_str(), self.state.as_str());
        let conflict = || {
            let id = &self.id;
            Refusal::Conflict(format!("rollout {id} is '{state}', so nothing is there to {word}"))
        };
        let paused = matches!(self.state, State::Paused { .. });
        let can = match command {
            Command::Pause => self.state.stage().is_some() && !paused,
            Command::Resume => paused,
            Command::Promote | Command::Abort => self.state.stage().is_some(),
        };
        if !can {
            return Err(conflict());
        }
        let said = call.reason.clone().unwrap_or_else(|| format!("{word} by {}", call.actor));
        let reason = Reason::new(Cause::Person, said);
        Ok(self.asserting(|rollout| {
            let by = By { at: now.at, actor: &call.actor };
            match command {
                Command::Pause => rollout.pausing(&by, reason),
                Command::Resume => rollout.resuming(&by, reason),
                Command::Promote => rollout.promoting(&by, reason),
                Command::Abort => rollout.aborting(&by, reason),
            }
        }))
    }

    /// Whether the table in force is the one that this rollout set, or began with. Another one is
    /// somebody's own, and not to be replaced.
    pub fn owns(&self, in_force: Option<&Traffic>) -> bool {
        match (&self.traffic, in_force) {
            (Some(ours), Some(found)) => tables::same(ours, found),
            (Some(_), None) => false,
            (None, Some(found)) => tables::same(&self.before, found),
            (None, None) => true,
        }
    }

    /// What it wanted was refused, and would be again. Where the candidate has nothing yet, that is
    /// the end; otherwise somebody has to look.
    pub fn refused(&mut self, now: Now, why: &str) -> Decision {
        self.asserting(|rollout| {
            let reason = Reason::new(Cause::Refused, why);
            let by = By::controller(now);
            match rollout.state.stage() {
                None => rollout.hold(),
                Some(_) if matches!(rollout.state, State::Paused { .. }) => rollout.hold(),
                Some(_) if rollout.traffic.is_none() => rollout.failing(&by, reason),
                Some(_) => rollout.pausing(&by, reason),
            }
        })
    }

    /// What was decided last is durable and in force.
    pub fn carried_out(&mut self, now: Now) {
        let to = match self.state {
            State::Promoting => State::Promoted,
            State::RollingBack => State::RolledBack,
            _ => return,
        };
        let last = self.history.last();
        let action = last.map_or(Action::Hold, |last| last.action);
        let actor = last.map_or_else(|| CONTROLLER.to_owned(), |last| last.by.clone());
        let reason = self.reason.clone();
        self.record(to, &By { at: now.at, actor: &actor }, action, reason);
        self.ended_at = Some(now.at);
    }

    fn asserting(&mut self, decide: impl FnOnce(&mut Self) -> Decision) -> Decision {
        let before = cfg!(debug_assertions).then(|| self.clone());
        let decision = decide(self);
        if let Some(before) = before {
            let broken = invariants::broken(&before, self, &decision);
            let (from, to) = (before.state, self.state);
            debug_assert!(broken.is_empty(), "{broken:?}: {from:?} to {to:?} by {decision:?}");
        }
        decision
    }

    fn decide(&mut self, now: Now, seen: &Observation) -> Decision {
        let passed = self.pass_time(now);
        let by = By::controller(now);
        match self.state {
            // Once more, until it is carried out.
            State::RollingBack => return self.again(Action::RollBack),
            State::Promoting => return self.again(Action::Promote),
            state if state.ended() => return self.hold(),
            _ => {}
        }
        if !self.plan.dry_run && !self.owns(seen.traffic.as_ref()) {
            let message = "the traffic table is not the rollout's any more".to_owned();
            return self.leaving_table(&by, message);
        }
        self.look(seen);
        let paused = matches!(self.state, State::Paused { .. });
        let armed = !paused || self.plan.roll_back_when_paused;
        if let Some(decision) = self.gone(seen, passed, armed, &by) {
            return decision;
        }
        let failed = self.guards.iter().find(|report| report.outcome == GuardOutcome::Fail);
        if let Some(report) = failed.filter(|_| armed) {
            let message = format!("{}: {}", report.guard, report.why);
            let mut decision = self.rolling_back(&by, Reason::new(Cause::Guard, message));
            decision.guards.clone_from(&self.guards);
            return decision;
        }
        match self.state {
            State::PendingHook { hook } if !self.present.asked => {
                self.present.asked = true;
                Decision { hook: Some(hook), ..self.decision(Action::CallHook, None) }
            }
            State::Shadow | State::Step { .. } => self.go_on(passed, seen, &by),
            _ => self.hold(),
        }
    }

    /// Time since the last look, as far as it counts.
    fn pass_time(&mut self, now: Now) -> Duration {
        let before = self.present.looked.replace(now.monotonic).unwrap_or(now.monotonic);
        now.monotonic.saturating_sub(before).min(LOOK_MAX)
    }

    /// Counts what happened and asks every guard.
    fn look(&mut self, seen: &Observation) {
        self.learn(seen);
        let thresholds = self.thresholds();
        self.evidence.add(seen, thresholds);
        self.guards = guards::evaluate(&Sight {
            guards: &self.plan.guards,
            evidence: &self.evidence,
            own_drift: &seen.own_drift,
            share: seen.share,
            sticky: self.before.sticky.is_some(),
            thresholds,
            learnt_from: self.present.learnt_from,
        });
    }

    fn thresholds(&self) -> Thresholds {
        let at = |ms: f64| bound_at((ms * 1e6).round());
        Thresholds {
            slow: self.plan.guards.slow_share.and_then(|guard| at(guard.threshold_ms)),
            over: self.latency_reference.and_then(|reference| reference.threshold_ms).and_then(at),
        }
    }

    /// Takes the stable version's quantile, once, from all that it has answered since it was loaded.
    fn learn(&mut self, seen: &Observation) {
        let Some(guard) = self.plan.guards.latency_ratio else { return };
        let Some(stable) = seen.stable.as_ref() else { return };
        if self.latency_reference.is_some() {
            return;
        }
        let requests = stable.latency.iter().sum();
        self.present.learnt_from = requests;
        let Some(ns) = quantile_ns(&stable.latency, guard.quantile) else { return };
        if requests >= LEARN_MIN {
            let bound = bound_at(ns * guard.ratio_max).and_then(|at| LATENCY_BOUNDS_NS.get(at));
            self.latency_reference = Some(LatencyReference {
                quantile_ms: ns / 1e6,
                requests,
                threshold_ms: bound.map(|ns| *ns as f64 / 1e6),
            });
        }
    }

    /// Acts when one of the versions has not been there for long. (A reload takes moments.)
    fn gone(
        &mut self,
        seen: &Observation,
        passed: Duration,
        armed: bool,
        by: &By<'_>,
    ) -> Option<Decision> {
        let candidate_gone = self.present.candidate.look(seen.candidate.is_some(), passed);
        let stable_gone = self.present.stable.look(seen.stable.is_some(), passed);
        if !armed {
            return None;
        }
        if stable_gone {
            let message = format!("version {} is not loaded: nothing to go back to", self.stable);
            return Some(self.failing(by, Reason::new(Cause::StableGone, message)));
        }
        if candidate_gone {
            let message = format!("version {} is not loaded", self.candidate);
            return Some(self.rolling_back(by, Reason::new(Cause::CandidateGone, message)));
        }
        None
    }

    /// Goes to the next stage when all that it waits for has come.
    fn go_on(&mut self, passed: Duration, seen: &Observation, by: &By<'_>) -> Decision {
        let passed = u64::try_from(passed.as_millis()).unwrap_or(u64::MAX);
        // Time without one of the versions is no time at a weight.
        if seen.candidate.is_some() && seen.stable.is_some() {
            self.progress.ms += passed;
        }
        self.progress.since_look_ms += passed;
        self.progress.samples = self.samples().saturating_sub(self.progress.samples_before);
        let (due, guards) = (self.due(seen), self.unsure());
        let only_guards = due.is_empty() && !guards.is_empty();
        self.progress.blocked_ms = if only_guards { self.progress.blocked_ms + passed } else { 0 };
        let ready = due.is_empty() && guards.is_empty();
        self.waiting_for = due.into_iter().chain(guards).collect();
        if self.progress.since_look_ms < self.plan.interval_s * 1000 {
            return self.hold();
        }
        self.progress.since_look_ms = 0;
        if ready {
            self.next_stage(by)
        } else if self.progress.blocked_ms >= self.plan.inconclusive_max_s * 1000 {
            let message = self.waiting_for.join("; ");
            let mut decision = self.pausing(by, Reason::new(Cause::Inconclusive, message));
            decision.guards.clone_from(&self.guards);
            decision
        } else {
            self.hold()
        }
    }

    /// Samples since the rollout began.
    fn samples(&self) -> u64 {
        match self.state {
            State::Shadow => self.evidence.shadow.samples(),
            _ => self.evidence.candidate().count(Event::Failure).of,
        }
    }

    /// Time, requests and versions that are still to come.
    fn due(&self, seen: &Observation) -> Vec<String> {
        let (bake_s, samples, of) = match self.state {
            State::Shadow => {
                let shadow = self.plan.shadow.unwrap_or_default();
                (shadow.bake_s, shadow.samples, "copied requests")
            }
            State::Step { step } => match self.plan.steps.get(step) {
                Some(step) => (step.bake_s, step.min_samples, "requests"),
                None => (0, 0, "requests"),
            },
            _ => (0, 0, "requests"),
        };
        let Progress { ms, samples: had, .. } = self.progress;
        let mut due = Vec::new();
        if ms < bake_s * 1000 {
            due.push(format!("{} of {bake_s} s", ms / 1000));
        }
        if had < samples {
            due.push(format!("{had} of {samples} {of}"));
        }
        let versions = [(self.candidate, &seen.candidate), (self.stable, &seen.stable)];
        for (version, _) in versions.iter().filter(|(_, totals)| totals.is_none()) {
            due.push(format!("version {version} is not loaded"));
        }
        due
    }

    /// Guards that do not pass.
    fn unsure(&self) -> Vec<String> {
        let unsure = |report: &&GuardReport| report.outcome != GuardOutcome::Pass;
        let guards = self.guards.iter().filter(unsure);
        guards.map(|report| format!("{}: {}", report.guard, report.why)).collect()
    }

    fn first_stage(&self) -> Stage {
        match self.plan.shadow {
            Some(_) => Stage::Shadow,
            None => Stage::Step { step: 0 },
        }
    }

    fn next_stage(&mut self, by: &By<'_>) -> Decision {
        let next = match self.state {
            State::Shadow => 0,
            State::Step { step } => step + 1,
            _ => return self.hold(),
        };
        let guards = self.guards.clone();
        let mut decision = if next < self.plan.steps.len() {
            let Progress { ms, samples, .. } = self.progress;
            let message = format!("{samples} requests in {} s, every guard passes", ms / 1000);
            let reason = Reason::new(Cause::Advanced, message);
            self.enter(Stage::Step { step: next }, by, Some(reason))
        } else if self.plan.on_pass == OnPass::Pause {
            let message =
                "every step has passed; resume or promote to give the candidate everything";
            self.pausing(by, Reason::new(Cause::Passed, message))
        } else {
            self.pass(by)
        };
        decision.guards = guards;
        decision
    }

    /// Promotes, or asks whether to.
    fn pass(&mut self, by: &By<'_>) -> Decision {
        let reason = Reason::new(Cause::Passed, "every step has passed");
        if self.plan.calls(HookKind::ConfirmPromotion) {
            let stage = Stage::PendingHook { hook: HookKind::ConfirmPromotion };
            self.enter(stage, by, Some(reason))
        } else {
            self.promoting(by, reason)
        }
    }

    /// Begins a stage.
    fn enter(&mut self, stage: Stage, by: &By<'_>, reason: Option<Reason>) -> Decision {
        debug_assert!(self.plan.steps.len() <= STEPS_MAX, "an unchecked plan was started");
        let (action, hook) = match stage {
            Stage::PendingHook { hook } => (Action::CallHook, Some(hook)),
            Stage::Shadow | Stage::Step { .. } => (Action::SetTraffic, None),
        };
        self.present.asked = hook.is_some();
        let before = self.state;
        let progress = self.progress;
        self.state = stage.into();
        self.progress = Progress { samples_before: self.samples(), ..Progress::default() };
        let traffic = match stage {
            Stage::PendingHook { .. } => None,
            Stage::Shadow => {
                let percent = self.plan.shadow.unwrap_or_default().percent;
                Some((0.0, self.table(0.0, Some(percent))))
            }
            Stage::Step { step } => {
                let weight = self.plan.steps.get(step).map_or(0.0, |step| step.weight);
                Some((weight, self.table(weight, None)))
            }
        };
        let traffic = self.set(traffic);
        self.note(before, by, action, reason.clone(), progress);
        self.reason = reason;
        self.waiting_for.clear();
        Decision { traffic, hook, ..self.decision(action, self.reason.clone()) }
    }

    fn table(&self, weight: f64, shadow: Option<f64>) -> Traffic {
        tables::step(&self.before, self.stable, self.candidate, weight, shadow)
    }

    /// Takes a weight and its table for the rollout's; what is to be put in force.
    fn set(&mut self, table: Option<(f64, Traffic)>) -> Option<Traffic> {
        let (weight, traffic) = table.filter(|_| !self.plan.dry_run)?;
        self.weight = weight;
        self.traffic = Some(traffic);
        self.traffic.clone()
    }

    fn promoting(&mut self, by: &By<'_>, reason: Reason) -> Decision {
        let traffic = self.set(Some((100.0, self.table(100.0, None))));
        self.record(State::Promoting, by, Action::Promote, Some(reason));
        Decision { traffic, ..self.decision(Action::Promote, self.reason.clone()) }
    }

    fn rolling_back(&mut self, by: &By<'_>, reason: Reason) -> Decision {
        let traffic = self.take_back();
        self.record(State::RollingBack, by, Action::RollBack, Some(reason));
        Decision { traffic, ..self.decision(Action::RollBack, self.reason.clone()) }
    }

    fn aborting(&mut self, by: &By<'_>, reason: Reason) -> Decision {
        let traffic = self.take_back();
        self.record(State::Aborted, by, Action::Abort, Some(reason));
        self.ended_at = Some(by.at);
        Decision { traffic, ..self.decision(Action::Abort, self.reason.clone()) }
    }

    /// Nothing for the candidate. A table that gave it nothing and is not ours stays.
    fn take_back(&mut self) -> Option<Traffic> {
        let had = self.before.shares().get(&self.candidate).is_some_and(|share| *share > 0);
        let ours = self.traffic.is_some();
        let back = tables::back(&self.before, self.stable, self.candidate);
        self.set((had || ours).then_some((0.0, back)))
    }

    fn leaving_table(&mut self, by: &By<'_>, message: String) -> Decision {
        let reason = Reason::new(Cause::Superseded, message);
        self.record(State::Aborted, by, Action::Abort, Some(reason));
        self.ended_at = Some(by.at);
        self.decision(Action::Abort, self.reason.clone())
    }

    fn failing(&mut self, by: &By<'_>, reason: Reason) -> Decision {
        self.record(State::Failed, by, Action::Fail, Some(reason));
        self.ended_at = Some(by.at);
        self.decision(Action::Fail, self.reason.clone())
    }

    fn pausing(&mut self, by: &By<'_>, reason: Reason) -> Decision {
        let Some(at) = self.state.stage() else { return self.hold() };
        self.progress.blocked_ms = 0;
        self.record(State::Paused { at }, by, Action::Pause, Some(reason));
        self.decision(Action::Pause, self.reason.clone())
    }

    fn resuming(&mut self, by: &By<'_>, reason: Reason) -> Decision {
        let State::Paused { at } = self.state else { return self.hold() };
        let passed = self.reason.as_ref().is_some_and(|reason| reason.cause == Cause::Passed);
        if passed {
            return self.pass(by);
        }
        self.record(at.into(), by, Action::Resume, Some(reason));
        let hook = match at {
            Stage::PendingHook { hook } => Some(hook),
            _ => None,
        };
        self.present.asked = hook.is_some();
        Decision { hook, ..self.decision(Action::Resume, self.reason.clone()) }
    }

    fn again(&self, action: Action) -> Decision {
        let traffic = self.traffic.clone();
        let guards = self.guards.clone();
        Decision { traffic, guards, ..self.decision(action, self.reason.clone()) }
    }

    fn hold(&self) -> Decision {
        self.decision(Action::Hold, None)
    }

    fn decision(&self, action: Action, reason: Option<Reason>) -> Decision {
        let dry_run = self.plan.dry_run;
        Decision { action, traffic: None, hook: None, reason, guards: Vec::new(), dry_run }
    }

    /// Changes the state, and writes down that it did.
    fn record(&mut self, to: State, by: &By<'_>, action: Action, reason: Option<Reason>) {
        let from = std::mem::replace(&mut self.state, to);
        if to.ended() {
            self.waiting_for.clear();
        }
        self.note(from, by, action, reason.clone(), self.progress);
        self.reason = reason;
    }

    fn note(
        &mut self,
        from: State,
        by: &By<'_>,
        action: Action,
        reason: Option<Reason>,
        progress: Progress,
    ) {
        if self.history.len() >= HISTORY_MAX {
            // The start stays: it says how everything began.
            self.history.remove(1);
            self.history_dropped += 1;
        }
        let (at, by) = (by.at, by.actor.to_owned());
        let (to, weight) = (self.state, self.weight);
        self.history.push(Transition { at, from, to, by, action, reason, weight, progress });
    }
}

/// What a hook says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum HookAnswer {
    Go,
    /// With what it said.
    No(String),
    /// No answer that can be understood, for as long as it is asked.
    None(String),
}

/// Who changes something, and when.
struct By<'a> {
    at: Timestamp,
    actor: &'a str,
}

impl By<'_> {
    fn controller(now: Now) -> Self {
        Self { at: now.at, actor: CONTROLLER }
    }
}

const _: () = assert!(BUCKETS == super::evidence::SHARE_WHOLE, "shares have one unit");

#[cfg(test)]
pub(in crate::control) mod tests;
