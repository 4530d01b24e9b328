//! Roles, actions, and the one table that joins them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What somebody is there for. None includes another: who needs two has two grants.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Sees what is served and how it does.
    Viewer,
    /// Calls models and tells what came of it.
    Predictor,
    /// Puts versions into service and moves traffic.
    Deployer,
    /// Reads everything that was recorded, changes nothing.
    Auditor,
    /// Everything, keys included.
    Admin,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected viewer, predictor, deployer, auditor or admin, got '{0}'")]
pub struct RoleError(String);

impl Role {
    pub const ALL: [Self; 5] =
        [Self::Viewer, Self::Predictor, Self::Deployer, Self::Auditor, Self::Admin];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Predictor => "predictor",
            Self::Deployer => "deployer",
            Self::Auditor => "auditor",
            Self::Admin => "admin",
        }
    }

    pub fn may(self, action: Action) -> bool {
        allowed(action).contains(&self)
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = RoleError;

    fn from_str(text: &str) -> Result<Self, RoleError> {
        let found = Self::ALL.into_iter().find(|role| role.as_str() == text);
        found.ok_or_else(|| RoleError(text.chars().take(64).collect()))
    }
}

/// What somebody wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Metadata, readiness, statistics, versions and their states, traffic, rollouts, scores.
    ReadModels,
    Predict,
    Feedback,
    /// Load, unload, and labels.
    ChangeVersions,
    ChangeTraffic,
    /// Start, pause, resume, promote, abort, and roll back.
    Rollout,
    Approve,
    ReadJournal,
    /// Recorded predictions, with their inputs and outputs.
    ReadPredictions,
    /// Put and lift legal holds on records of the ledger.
    Hold,
    /// Take out what records of the ledger hold.
    Erase,
    ReadKeys,
    ChangeKeys,
    Drain,
    /// Read the source or the configuration anew, and set what is logged and traced.
    Reload,
    /// Send a test to a receiver of alerts, which may start a pipeline.
    TestAlerts,
}

impl Action {
    pub const ALL: [Self; 16] = [
        Self::ReadModels,
        Self::Predict,
        Self::Feedback,
        Self::ChangeVersions,
        Self::ChangeTraffic,
        Self::Rollout,
        Self::Approve,
        Self::ReadJournal,
        Self::ReadPredictions,
        Self::Hold,
        Self::Erase,
        Self::ReadKeys,
        Self::ChangeKeys,
        Self::Drain,
        Self::Reload,
        Self::TestAlerts,
    ];

    /// Word for messages, logs and the documentation.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::ReadModels => "read models",
            Self::Predict => "predict",
            Self::Feedback => "give feedback",
            Self::ChangeVersions => "change versions",
            Self::ChangeTraffic => "change traffic",
            Self::Rollout => "roll out",
            Self::Approve => "approve",
            Self::ReadJournal => "read the journal",
            Self::ReadPredictions => "read predictions",
            Self::Hold => "hold records",
            Self::Erase => "erase records",
            Self::ReadKeys => "read keys",
            Self::ChangeKeys => "change keys",
            Self::Drain => "drain",
            Self::Reload => "reload",
            Self::TestAlerts => "test alerts",
        }
    }

    /// Concerns no model but the gateway: a grant limited to models does not allow it, or whoever
    /// administers one model could give himself the others.
    pub fn is_of_gateway(self) -> bool {
        matches!(
            self,
            Self::Hold
                | Self::Erase
                | Self::ReadKeys
                | Self::ChangeKeys
                | Self::Drain
                | Self::Reload
                | Self::TestAlerts
        )
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Who may do what: the whole of it. `docs/secure.md` shows it as a table, which a test compares.
fn allowed(action: Action) -> &'static [Role] {
    use Role::{Admin, Auditor, Deployer, Predictor, Viewer};
    match action {
        Action::ReadModels => &[Viewer, Predictor, Deployer, Auditor, Admin],
        Action::Predict => &[Predictor, Admin],
        Action::Feedback => &[Predictor, Admin],
        Action::ChangeVersions => &[Deployer, Admin],
        Action::ChangeTraffic => &[Deployer, Admin],
        Action::Rollout => &[Deployer, Admin],
        Action::Approve => &[Deployer, Admin],
        Action::ReadJournal => &[Deployer, Auditor, Admin],
        Action::ReadPredictions => &[Auditor, Admin],
        Action::Hold => &[Auditor, Admin],
        Action::Erase => &[Admin],
        Action::ReadKeys => &[Auditor, Admin],
        Action::ChangeKeys => &[Admin],
        Action::Drain => &[Admin],
        Action::Reload => &[Admin],
        Action::TestAlerts => &[Deployer, Admin],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_have_one_name_each() {
        for role in Role::ALL {
            assert_eq!(role.to_string().parse::<Role>().unwrap(), role);
            assert_eq!(serde_json::to_value(role).unwrap(), role.as_str());
        }
        for wrong in ["", "Admin", "root", " admin"] {
            assert!(wrong.parse::<Role>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_documentation_shows_this_table() {
        let page = include_str!("../../docs/secure.md");
        for action in Action::ALL {
            let cells = Role::ALL.map(|role| if role.may(action) { " yes |" } else { " |" });
            let start = format!("| {action} |{}", cells.concat());
            assert!(page.contains(&start), "docs/secure.md lacks a row that begins with '{start}'");
        }
    }
}
