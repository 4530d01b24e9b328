//! Grants: a role, and the models that it is for.

use std::fmt;
use std::sync::Arc;

use globset::{Glob, GlobSet, GlobSetBuilder};

use super::{Action, Role};
use crate::domain::ModelName;

/// Patterns of one grant.
const PATTERNS_MAX: usize = 64;
const PATTERN_BYTES_MAX: usize = 256;
/// What stands for all models, so that it is no limit.
const ALL: &str = "*";

/// Globs of model names: `fraud-*`, `iris`, `{risk,topics}`. Cheap to clone.
#[derive(Clone)]
pub struct ModelPatterns(Arc<Patterns>);

struct Patterns {
    texts: Vec<String>,
    set: GlobSet,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PatternError {
    #[error("there are {count} patterns, the limit is {PATTERNS_MAX}")]
    TooMany { count: usize },
    #[error("a pattern has {len} bytes, expected 1 to {PATTERN_BYTES_MAX}")]
    Length { len: usize },
    #[error("pattern '{pattern}': {problem}")]
    Syntax { pattern: String, problem: String },
}

impl ModelPatterns {
    /// `None` for no pattern at all, or one that is `*`: every model.
    ///
    /// # Errors
    /// When one of them is no glob.
    pub fn parse<S: AsRef<str>>(patterns: &[S]) -> Result<Option<Self>, PatternError> {
        if patterns.len() > PATTERNS_MAX {
            return Err(PatternError::TooMany { count: patterns.len() });
        }
        let mut set = GlobSetBuilder::new();
        for pattern in patterns.iter().map(AsRef::as_ref) {
            if pattern.is_empty() || pattern.len() > PATTERN_BYTES_MAX {
                return Err(PatternError::Length { len: pattern.len() });
            }
            set.add(Glob::new(pattern).map_err(|error| syntax(pattern, &error))?);
        }
        let set = set.build().map_err(|error| syntax("", &error))?;
        let texts: Vec<String> = patterns.iter().map(|text| text.as_ref().to_owned()).collect();
        if texts.is_empty() || texts.iter().any(|text| text == ALL) {
            return Ok(None);
        }
        Ok(Some(Self(Arc::new(Patterns { texts, set }))))
    }

    pub fn matches(&self, model: &ModelName) -> bool {
        self.0.set.is_match(model.as_str())
    }

    pub fn texts(&self) -> &[String] {
        &self.0.texts
    }
}

fn syntax(pattern: &str, error: &globset::Error) -> PatternError {
    PatternError::Syntax { pattern: pattern.to_owned(), problem: error.kind().to_string() }
}

impl fmt::Debug for ModelPatterns {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.texts.fmt(f)
    }
}

#[derive(Clone, Debug)]
pub struct Grant {
    pub role: Role,
    /// `None`: all of them.
    pub models: Option<ModelPatterns>,
}

impl Grant {
    fn allows(&self, action: Action, model: Option<&ModelName>) -> bool {
        self.role.may(action)
            && match (&self.models, model) {
                (None, _) => true,
                (Some(patterns), Some(model)) => !action.is_of_gateway() && patterns.matches(model),
                (Some(_), None) => false,
            }
    }
}

/// Somebody whose identity was checked.
#[derive(Clone, Debug)]
pub struct Principal {
    /// As it stands in the journal and in records of predictions.
    pub name: Arc<str>,
    pub grants: Vec<Grant>,
}

impl Principal {
    /// Whether it may do this to `model`; `None` asks for what concerns no model alone, or all of
    /// them, which takes a grant without a limit.
    pub fn may(&self, action: Action, model: Option<&ModelName>) -> bool {
        self.grants.iter().any(|grant| grant.allows(action, model))
    }

    /// Whether there may be a model to which it may do this: for lists, whose entries are then
    /// each asked about with [`Principal::may`].
    pub fn may_to_some(&self, action: Action) -> bool {
        self.grants.iter().any(|grant| {
            grant.role.may(action) && (grant.models.is_none() || !action.is_of_gateway())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn patterns(texts: &[&str]) -> Option<ModelPatterns> {
        ModelPatterns::parse(texts).unwrap()
    }

    fn model(name: &str) -> ModelName {
        name.parse().unwrap()
    }

    #[test]
    fn patterns_are_globs_of_whole_names() {
        let some = patterns(&["fraud-*", "iris", "{a,b}.?"]).unwrap();
        for name in ["fraud-", "fraud-2.x", "iris", "a.1", "b.z"] {
            assert!(some.matches(&model(name)), "{name}");
        }
        for name in ["fraud", "iris2", "xiris", "Iris", "a.", "c.1", "my-fraud-1"] {
            assert!(!some.matches(&model(name)), "{name}");
        }
        assert!(patterns(&[]).is_none());
        assert!(patterns(&["iris", "*"]).is_none(), "all is no limit");
    }

    #[test]
    fn what_is_no_pattern_is_refused() {
        for bad in ["[", "{a", "", "a**[", &"x".repeat(257)] {
            assert!(ModelPatterns::parse(&[bad]).is_err(), "{bad}");
        }
        assert!(ModelPatterns::parse(&vec!["a"; 65]).is_err());
        assert!(ModelPatterns::parse(&["*", "["]).is_err(), "a wrong one is said even beside all");
    }

    /// The cells written out once more, by hand, from what each role is for.
    fn expected(role: Role, action: Action) -> bool {
        let yes: &[Action] = match role {
            Role::Viewer => &[Action::ReadModels],
            Role::Predictor => &[Action::ReadModels, Action::Predict, Action::Feedback],
            Role::Deployer => &[
                Action::ReadModels,
                Action::ChangeVersions,
                Action::ChangeTraffic,
                Action::Rollout,
                Action::Approve,
                Action::ReadJournal,
                Action::TestAlerts,
            ],
            Role::Auditor => &[
                Action::ReadModels,
                Action::ReadJournal,
                Action::ReadPredictions,
                Action::Hold,
                Action::ReadKeys,
            ],
            Role::Admin => &Action::ALL,
        };
        yes.contains(&action)
    }

    #[test]
    fn every_role_action_and_model() {
        let names = ["iris", "fraud-a", "fraud-b", "risk"];
        let limits: [(&[&str], &[&str]); 4] = [
            (&[], &names),
            (&["fraud-*"], &["fraud-a", "fraud-b"]),
            (&["iris", "risk"], &["iris", "risk"]),
            (&["nothing"], &[]),
        ];
        let mut cells = 0;
        for role in Role::ALL {
            for (limit, covered) in limits {
                let grant = Grant { role, models: patterns(limit) };
                let principal = Principal { name: "p".into(), grants: vec![grant] };
                for action in Action::ALL {
                    let role_may = expected(role, action);
                    for name in names {
                        let may = principal.may(action, Some(&model(name)));
                        let whole = limit.is_empty();
                        let right = role_may
                            && (whole || (covered.contains(&name) && !action.is_of_gateway()));
                        assert_eq!(may, right, "{role} {limit:?} {action} {name}");
                        cells += 1;
                    }
                    let of_all = principal.may(action, None);
                    assert_eq!(of_all, role_may && limit.is_empty(), "{role} {limit:?} {action}");
                    let somewhere = principal.may_to_some(action);
                    let right = role_may && (limit.is_empty() || !action.is_of_gateway());
                    assert_eq!(somewhere, right, "{role} {limit:?} {action}");
                    cells += 2;
                }
            }
        }
        eprintln!("roles x limits x actions x models: {cells} cells, 0 wrong");
        assert_eq!(cells, 5 * 4 * Action::ALL.len() * (4 + 2));
    }

    #[test]
    fn grants_add_up_and_none_allows_nothing() {
        let nobody = Principal { name: "p".into(), grants: Vec::new() };
        let of = |role, limit: &[&str]| Grant { role, models: patterns(limit) };
        let grants = vec![of(Role::Viewer, &[]), of(Role::Deployer, &["iris"])];
        let somebody = Principal { name: "p".into(), grants };
        for action in Action::ALL {
            assert!(!nobody.may(action, None) && !nobody.may_to_some(action));
        }
        assert!(somebody.may(Action::ReadModels, Some(&model("risk"))));
        assert!(!somebody.may(Action::ChangeTraffic, Some(&model("risk"))));
        assert!(somebody.may(Action::ChangeTraffic, Some(&model("iris"))));
        assert!(!somebody.may(Action::ChangeTraffic, None));
    }
}
