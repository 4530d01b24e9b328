//! What never happens to a rollout, as functions: the machine asserts them in debug builds, and
//! property tests hold random steps against them.

use super::guards::GuardOutcome;
use super::plan::{HookKind, OnPass};
use super::{Action, CONTROLLER, Cause, Decision, Rollout, Stage, State};
use crate::domain::Traffic;

/// Everything that is wrong with going from `before` to `after` by `decision`.
pub fn broken(before: &Rollout, after: &Rollout, decision: &Decision) -> Vec<&'static str> {
    let rules: [(&str, bool); 9] = [
        ("a rollout that has ended changed", !before.state.ended() || same(before, after)),
        ("a change of state was not recorded", recorded(before, after)),
        ("the weight rose without cause", after.weight <= before.weight || may_rise(before, after)),
        ("a paused rollout changed something", unmoved_while_paused(before, after)),
        ("a candidate that was taken out has traffic", out_means_out(after)),
        ("promoted without everything", promoted_means_all(after)),
        ("a dry run changed traffic", dry_run_is_dry(after, decision)),
        ("the table is not the one that was decided", decided_is_set(before, after, decision)),
        ("the weight is not the table's", weight_is_the_tables(after)),
    ];
    rules.into_iter().filter(|(_, holds)| !holds).map(|(name, _)| name).collect()
}

fn same(before: &Rollout, after: &Rollout) -> bool {
    before.state == after.state
        && before.traffic == after.traffic
        && before.history.len() == after.history.len()
}

fn recorded(before: &Rollout, after: &Rollout) -> bool {
    let records = |rollout: &Rollout| rollout.history.len() as u64 + rollout.history_dropped;
    if before.state == after.state {
        return true;
    }
    let last = after.history.last();
    records(after) > records(before) && last.is_some_and(|last| last.to == after.state)
}

/// By a person; or from nothing, once who has to be asked has said yes; or because the step that is
/// left has had its time and its requests, and every guard passes.
fn may_rise(before: &Rollout, after: &Rollout) -> bool {
    let Some(last) = after.history.last() else { return false };
    if last.by != CONTROLLER {
        return true;
    }
    match before.state {
        State::PendingHook { hook: HookKind::ConfirmRollout } => true,
        // It was asked for when the last step had passed.
        State::PendingHook { hook: HookKind::ConfirmPromotion } => last.action == Action::Promote,
        State::Shadow | State::Step { .. } => {
            let passes = |outcome| outcome == GuardOutcome::Pass;
            after.guards.iter().all(|report| passes(report.outcome)) && had_its_due(before, after)
        }
        _ => false,
    }
}

fn had_its_due(before: &Rollout, after: &Rollout) -> bool {
    let Some(progress) = after.history.last().map(|last| last.progress) else { return false };
    let (bake_s, samples) = match before.state.stage() {
        Some(Stage::Shadow) => match before.plan.shadow {
            Some(shadow) => (shadow.bake_s, shadow.samples),
            None => return false,
        },
        Some(Stage::Step { step }) => match before.plan.steps.get(step) {
            Some(step) => (step.bake_s, step.min_samples),
            None => return false,
        },
        _ => return false,
    };
    // Nothing but the last step leads to everything, and only if the plan does not wait.
    let to_all = matches!(after.state, State::Promoting | State::Promoted);
    let last = matches!(before.state, State::Step { step } if step + 1 == before.plan.steps.len());
    let asked = before.plan.calls(HookKind::ConfirmPromotion);
    let may_promote = last && !asked && before.plan.on_pass == OnPass::Promote;
    progress.ms >= bake_s * 1000 && progress.samples >= samples && (!to_all || may_promote)
}

fn unmoved_while_paused(before: &Rollout, after: &Rollout) -> bool {
    if !matches!(before.state, State::Paused { .. }) {
        return true;
    }
    if after.state == before.state {
        return after.traffic == before.traffic;
    }
    let Some(last) = after.history.last() else { return false };
    let by_person = last.by != CONTROLLER;
    let danger = matches!(after.state, State::RollingBack | State::RolledBack)
        && before.plan.roll_back_when_paused;
    let gone = matches!(after.state, State::Aborted | State::Failed);
    by_person || danger || gone
}

fn out_means_out(after: &Rollout) -> bool {
    let out = matches!(after.state, State::RollingBack | State::RolledBack);
    let ended_by_hand = after.state == State::Aborted
        && after.reason.as_ref().is_none_or(|reason| reason.cause != Cause::Superseded);
    if !out && !ended_by_hand {
        return true;
    }
    let has = |traffic: &Traffic| traffic.versions().contains(&after.candidate);
    after.weight <= 0.0 && !after.traffic.as_ref().is_some_and(has)
}

fn promoted_means_all(after: &Rollout) -> bool {
    if !matches!(after.state, State::Promoting | State::Promoted) || after.plan.dry_run {
        return true;
    }
    let all = |traffic: &Traffic| traffic.weights.keys().eq([&after.candidate]);
    after.weight >= 100.0 && after.traffic.as_ref().is_some_and(all)
}

fn dry_run_is_dry(after: &Rollout, decision: &Decision) -> bool {
    let nothing = after.traffic.is_none() && after.weight <= 0.0 && decision.traffic.is_none();
    !after.plan.dry_run || (nothing && decision.dry_run)
}

fn decided_is_set(before: &Rollout, after: &Rollout, decision: &Decision) -> bool {
    match &decision.traffic {
        Some(_) => after.traffic == decision.traffic,
        None => after.traffic == before.traffic,
    }
}

fn weight_is_the_tables(after: &Rollout) -> bool {
    let Some(traffic) = &after.traffic else { return after.weight <= 0.0 };
    // A table that somebody else set is not ours to know.
    let ours = after.reason.as_ref().is_none_or(|reason| reason.cause != Cause::Superseded);
    let share = traffic.shares().get(&after.candidate).copied().unwrap_or(0);
    !ours || super::tables::basis_points(after.weight) == share
}
