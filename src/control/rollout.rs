//! New versions in small steps, forward only as long as everything holds, back at once when it does
//! not.
//!
//! ```text
//! Plan ──start──▶ Rollout (a record, and a state machine over it)
//!                   ▲ step(now, Observation)         ▲ pause · resume · promote · abort
//!                   │                                │
//!               Controller (once a second, and at each failure) ── Handle ◀── admin
//!                   │ Decision
//!                   ▼
//!                 Desk: journal, state store, traffic table             Hooks: signed webhooks
//! ```
//!
//! What is seen becomes counts per weight ([`evidence`]), counts become answers of guards
//! ([`guards`]), answers become decisions ([`machine`]). Only the [`controller`] has a clock and
//! side effects.
//!
//! Invariants (functions of [`invariants`], which property tests share):
//! - By itself a rollout gives a candidate more only when every guard passes, the step has had its
//!   time and its requests.
//! - After a rollback or an abort the candidate has nothing, forever.
//! - A rollout changes only a traffic table that it has made itself; a table set by hand ends it.
//! - Every change of state is recorded; a record that was written and read back goes on where it
//!   stood.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::domain::{ModelName, Traffic, Version};

pub mod controller;
pub mod evidence;
pub mod guards;
pub mod invariants;
mod labels;
mod machine;
mod metrics;
mod outputs;
pub mod plan;
mod tables;

#[cfg(test)]
pub(super) use machine::tests as machine_tests;
#[cfg(test)]
mod simulation;

pub use controller::{Change, Controller, Desk, Handle};
pub use evidence::{Count, Evidence, Observation, OwnDrift, ShadowTally, ShadowTotals};
pub use guards::{Guard, GuardOutcome, GuardReport};
pub use labels::{LabelEvidence, LabelTotals};
pub use machine::{HookAnswer, Now, Start};
pub use outputs::OutputEvidence;
pub use plan::{HookKind, Plan};

/// Actor of what a rollout decides by itself, in the journal.
pub const CONTROLLER: &str = "rollout-controller";
/// Changes of state that a record keeps; the journal has all of them.
pub const HISTORY_MAX: usize = 256;

/// One rollout, from its start to its end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Rollout {
    /// A UUID of version 7.
    pub id: String,
    pub model: ModelName,
    pub candidate: Version,
    /// What the candidate is compared with, and what gets everything back.
    pub stable: Version,
    pub plan: Plan,
    #[serde(flatten)]
    pub state: State,
    /// Why it is in this state.
    pub reason: Option<Reason>,
    /// Share of the requests that the rollout gives the candidate now, in percent. Stays 0 in a dry
    /// run.
    pub weight: f64,
    /// What the present step still waits for.
    pub waiting_for: Vec<String>,
    /// The guards' last answers.
    pub guards: Vec<GuardReport>,
    pub evidence: Evidence,
    #[schema(value_type = String, format = DateTime)]
    pub started_at: Timestamp,
    pub started_by: String,
    /// Why it was started.
    pub started_for: Option<String>,
    #[schema(value_type = Option<String>, format = DateTime)]
    pub ended_at: Option<Timestamp>,
    /// Changes of state, oldest first.
    pub history: Vec<Transition>,
    /// Older ones that found no room.
    pub history_dropped: u64,
    /// The traffic table that it began with.
    pub before: Traffic,
    /// The traffic table that it set last; `None` until it sets one.
    pub traffic: Option<Traffic>,
    pub progress: Progress,
    /// What `latency_ratio` compares with, once it is known.
    pub latency_reference: Option<LatencyReference>,
    /// What is known only while the process lives.
    #[serde(skip)]
    #[schema(ignore)]
    present: machine::Present,
}

/// Where a rollout stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum State {
    /// A hook is asked.
    PendingHook { hook: HookKind },
    /// The candidate gets copies of requests.
    Shadow,
    /// The candidate has the weight of this step of the plan, counted from 0.
    Step { step: usize },
    /// Changes nothing until somebody says so.
    Paused { at: Stage },
    /// Decided, and not yet durable and in force.
    Promoting,
    /// The candidate has everything.
    Promoted,
    /// Decided, and not yet durable and in force.
    RollingBack,
    /// The candidate has nothing.
    RolledBack,
    /// Ended by somebody, by a hook, or by a table set by hand.
    Aborted,
    /// It cannot go on.
    Failed,
}

/// A state that can be paused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "stage", rename_all = "snake_case")]
pub enum Stage {
    PendingHook { hook: HookKind },
    Shadow,
    Step { step: usize },
}

impl From<Stage> for State {
    fn from(stage: Stage) -> Self {
        match stage {
            Stage::PendingHook { hook } => Self::PendingHook { hook },
            Stage::Shadow => Self::Shadow,
            Stage::Step { step } => Self::Step { step },
        }
    }
}

impl State {
    /// Words of the metric's label.
    pub const WORDS: [&str; 10] = [
        "pending_hook",
        "shadow",
        "step",
        "paused",
        "promoting",
        "promoted",
        "rolling_back",
        "rolled_back",
        "aborted",
        "failed",
    ];

    pub fn as_str(&self) -> &'static str {
        match self {
            Self::PendingHook { .. } => "pending_hook",
            Self::Shadow => "shadow",
            Self::Step { .. } => "step",
            Self::Paused { .. } => "paused",
            Self::Promoting => "promoting",
            Self::Promoted => "promoted",
            Self::RollingBack => "rolling_back",
            Self::RolledBack => "rolled_back",
            Self::Aborted => "aborted",
            Self::Failed => "failed",
        }
    }

    /// Nothing ever happens to it again.
    pub fn ended(&self) -> bool {
        matches!(self, Self::Promoted | Self::RolledBack | Self::Aborted | Self::Failed)
    }

    /// Where it stands, or stood when it was paused.
    pub fn stage(&self) -> Option<Stage> {
        match *self {
            Self::PendingHook { hook } => Some(Stage::PendingHook { hook }),
            Self::Shadow => Some(Stage::Shadow),
            Self::Step { step } => Some(Stage::Step { step }),
            Self::Paused { at } => Some(at),
            _ => None,
        }
    }
}

/// Why something was decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reason {
    pub cause: Cause,
    pub message: String,
}

impl Reason {
    pub fn new(cause: Cause, message: impl Into<String>) -> Self {
        Self { cause, message: message.into() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Cause {
    /// A guard failed.
    Guard,
    /// The stage before had what it waits for.
    Advanced,
    /// A guard was inconclusive for too long.
    Inconclusive,
    /// The last step has passed, and the plan says to wait.
    Passed,
    /// What a hook answered, or that it did not.
    Hook,
    /// The candidate is not loaded any more.
    CandidateGone,
    /// The stable version is not loaded any more.
    StableGone,
    /// Somebody set another traffic table.
    Superseded,
    /// Somebody said so.
    Person,
    /// What the rollout wanted was refused.
    Refused,
}

/// What a step of a rollout comes to.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Decision {
    pub action: Action,
    /// Table to put in force; `None`: leave the one that is there.
    pub traffic: Option<Traffic>,
    /// Hook to ask now.
    pub hook: Option<HookKind>,
    pub reason: Option<Reason>,
    /// What the guards said; empty where they had no part in it.
    pub guards: Vec<GuardReport>,
    /// Only recorded: nothing is put in force.
    pub dry_run: bool,
}

impl Decision {
    pub fn holds(&self) -> bool {
        self.action == Action::Hold
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Nothing is to be done.
    Hold,
    /// The traffic table of a step.
    SetTraffic,
    CallHook,
    Pause,
    Resume,
    /// Everything to the candidate; the label `stable`, where it is used, goes along.
    Promote,
    /// Everything back to the stable version, and first in force, then durable.
    RollBack,
    /// As `roll_back`, because somebody wants it; without a table, the one there is stays.
    Abort,
    /// Ends where it is.
    Fail,
}

impl Action {
    /// For the journal: `rollout.<word>`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Hold => "hold",
            Self::SetTraffic => "set_traffic",
            Self::CallHook => "call_hook",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Promote => "promote",
            Self::RollBack => "roll_back",
            Self::Abort => "abort",
            Self::Fail => "fail",
        }
    }
}

/// What somebody may tell a rollout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Change nothing until further notice.
    Pause,
    /// Go on, or promote a rollout that has passed and waits.
    Resume,
    /// Give the candidate everything now, whatever is left of the plan.
    Promote,
    /// Give the stable version everything back, and end.
    Abort,
}

impl Command {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Promote => "promote",
            Self::Abort => "abort",
        }
    }
}

/// A change of state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Transition {
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    pub from: State,
    pub to: State,
    /// A principal, or `rollout-controller`.
    pub by: String,
    pub action: Action,
    pub reason: Option<Reason>,
    /// The candidate's weight from then on, in percent.
    pub weight: f64,
    /// What the stage that was left had had.
    pub progress: Progress,
}

/// How far a stage has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    /// Time in it, without pauses and without the time that the gateway was down.
    pub ms: u64,
    /// The candidate's requests in it; copies in the shadow step.
    pub samples: u64,
    /// For how long nothing but a guard that is inconclusive has held it.
    pub blocked_ms: u64,
    /// Since it was last looked at whether to go on.
    pub since_look_ms: u64,
    /// Samples there were when it began.
    pub samples_before: u64,
}

/// The stable version's latency, from before the candidate got requests.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LatencyReference {
    pub quantile_ms: f64,
    /// Requests that it was taken from.
    pub requests: u64,
    /// The next bound of the latency histograms at or above `ratio_max` times that; `None` when it
    /// is beyond the last.
    pub threshold_ms: Option<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_the_json() {
        let states = [
            State::PendingHook { hook: HookKind::ConfirmRollout },
            State::Shadow,
            State::Step { step: 3 },
            State::Paused { at: Stage::Step { step: 3 } },
            State::Promoting,
            State::Promoted,
            State::RollingBack,
            State::RolledBack,
            State::Aborted,
            State::Failed,
        ];
        for (state, word) in states.into_iter().zip(State::WORDS) {
            let json = serde_json::to_value(state).unwrap();
            assert_eq!((json["state"].as_str(), state.as_str()), (Some(word), word));
            assert_eq!(serde_json::from_value::<State>(json).unwrap(), state);
        }
        let paused = serde_json::to_value(states[3]).unwrap();
        let want = serde_json::json!({"state": "paused", "at": {"stage": "step", "step": 3}});
        assert_eq!(paused, want);
        for action in [Action::Hold, Action::SetTraffic, Action::CallHook, Action::RollBack] {
            assert_eq!(serde_json::to_value(action).unwrap(), action.as_str());
        }
        for command in [Command::Pause, Command::Resume, Command::Promote, Command::Abort] {
            assert_eq!(serde_json::to_value(command).unwrap(), command.as_str());
        }
    }
}
