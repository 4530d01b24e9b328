//! What is different between two listings of one source.

use std::collections::BTreeSet;

use super::{Fingerprint, Listing, ModelListing, VersionListing};
use crate::domain::{Label, ModelName, Version};

/// One difference. They come in the order of models; versions before labels.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    /// A version that was not there, or could not be served as it was, can be taken.
    Appeared { model: ModelName, version: Version },
    /// The files of a known version are others. Whether its bytes are is for the digest to say.
    Changed { model: ModelName, version: Version, before: Fingerprint, after: Fingerprint },
    /// A version is there and cannot be served as it is.
    Refused { model: ModelName, version: Version, problem: String },
    /// A version is no longer there.
    Gone { model: ModelName, version: Version },
    /// The model's configuration was written.
    Configured { model: ModelName },
    /// The source moved, made or removed a label.
    Labelled { model: ModelName, label: Label, before: Option<Version>, after: Option<Version> },
}

impl Listing {
    /// What of this listing may be acted on, knowing `previous`, which was acted on: a version that
    /// has not settled is as it was before, and so is a model whose versions are not known now.
    #[must_use]
    pub fn over(mut self, previous: &Self) -> Self {
        for (name, model) in &mut self.models {
            let before = previous.models.get(name);
            if model.problem.is_some() {
                if let Some(before) = before {
                    let problem = model.problem.take();
                    *model = ModelListing { problem, ..before.clone() };
                }
                continue;
            }
            let versions = std::mem::take(&mut model.versions);
            model.versions = versions
                .into_iter()
                .filter_map(|(version, found)| match found.settled {
                    true => Some((version, found)),
                    false => {
                        let known = before.and_then(|before| before.versions.get(&version));
                        Some((version, known?.clone()))
                    }
                })
                .collect();
        }
        self
    }

    /// What changed from `previous` to this; both as [`Listing::over`] gives them.
    pub fn diff(&self, previous: &Self) -> Vec<Change> {
        let names: BTreeSet<&ModelName> =
            self.models.keys().chain(previous.models.keys()).collect();
        let none = ModelListing::default();
        let mut changes = Vec::new();
        for name in names {
            let before = previous.models.get(name).unwrap_or(&none);
            let after = self.models.get(name).unwrap_or(&none);
            of_versions(name, before, after, &mut changes);
            let known = previous.models.contains_key(name) && self.models.contains_key(name);
            if known && before.config != after.config {
                changes.push(Change::Configured { model: name.clone() });
            }
            let labels: BTreeSet<&Label> =
                before.labels.keys().chain(after.labels.keys()).collect();
            for label in labels {
                let (before, after) = (before.labels.get(label), after.labels.get(label));
                if before != after {
                    let (before, after) = (before.copied(), after.copied());
                    let (model, label) = (name.clone(), label.clone());
                    changes.push(Change::Labelled { model, label, before, after });
                }
            }
        }
        changes
    }
}

fn of_versions(
    name: &ModelName,
    before: &ModelListing,
    after: &ModelListing,
    changes: &mut Vec<Change>,
) {
    let numbers: BTreeSet<Version> =
        before.versions.keys().chain(after.versions.keys()).copied().collect();
    for version in numbers {
        let pair = (before.versions.get(&version), after.versions.get(&version));
        changes.extend(of_version(name, version, pair));
    }
}

fn of_version(
    name: &ModelName,
    version: Version,
    pair: (Option<&VersionListing>, Option<&VersionListing>),
) -> Option<Change> {
    let model = name.clone();
    let (before, after) = match pair {
        (Some(_), None) => return Some(Change::Gone { model, version }),
        (before, Some(after)) => (before, after),
        (None, None) => return None,
    };
    if let Some(problem) = &after.problem {
        let known = before.is_some_and(|before| before.problem.as_ref() == Some(problem));
        let problem = problem.clone();
        return (!known).then_some(Change::Refused { model, version, problem });
    }
    match before {
        Some(before) if before.problem.is_none() => {
            let (before, after) = (before.fingerprint, after.fingerprint);
            (before != after).then_some(Change::Changed { model, version, before, after })
        }
        _ => Some(Change::Appeared { model, version }),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn print(number: u64) -> Fingerprint {
        let mut print = Fingerprint::build();
        print.number(number);
        print.done()
    }

    fn version(number: u64, settled: bool, problem: Option<&str>) -> VersionListing {
        VersionListing {
            fingerprint: print(number),
            settled,
            problem: problem.map(str::to_owned),
            files: 1,
            bytes: 1,
            modified: None,
            tags: BTreeMap::new(),
            run: None,
        }
    }

    /// `number: (fingerprint, settled, problem)` of the model `m`.
    type Versions<'a> = &'a [(u64, (u64, bool, Option<&'a str>))];

    fn listing(versions: Versions<'_>, labels: &[(&str, u64)]) -> Listing {
        let number = |number: u64| Version::new(number).unwrap();
        let model = ModelListing {
            versions: versions
                .iter()
                .map(|(at, (print, settled, problem))| {
                    (number(*at), version(*print, *settled, *problem))
                })
                .collect(),
            labels: labels.iter().map(|(name, at)| (name.parse().unwrap(), number(*at))).collect(),
            ..ModelListing::default()
        };
        Listing { models: BTreeMap::from([("m".parse().unwrap(), model)]), ..Listing::default() }
    }

    fn shown(changes: &[Change]) -> Vec<String> {
        let show = |change: &Change| match change {
            Change::Appeared { version, .. } => format!("+{version}"),
            Change::Changed { version, .. } => format!("~{version}"),
            Change::Refused { version, .. } => format!("!{version}"),
            Change::Gone { version, .. } => format!("-{version}"),
            Change::Configured { .. } => "config".to_owned(),
            Change::Labelled { label, before, after, .. } => {
                let text = |version: &Option<Version>| {
                    version.map_or_else(|| "_".to_owned(), |version| version.to_string())
                };
                format!("{label}:{}>{}", text(before), text(after))
            }
        };
        changes.iter().map(show).collect()
    }

    #[test]
    fn differences_are_what_is_to_be_done() {
        let ok = |print| (print, true, None);
        let cases: &[(&str, Versions<'_>, Versions<'_>, &[&str])] = &[
            ("the first look", &[], &[(1, ok(1)), (2, ok(2))], &["+1", "+2"]),
            ("nothing", &[(1, ok(1))], &[(1, ok(1))], &[]),
            ("written anew", &[(1, ok(1))], &[(1, ok(9))], &["~1"]),
            ("gone", &[(1, ok(1)), (2, ok(2))], &[(2, ok(2))], &["-1"]),
            ("still arriving", &[(1, ok(1))], &[(1, ok(1)), (2, (2, false, None))], &[]),
            ("being written over", &[(1, ok(1))], &[(1, (9, false, None))], &[]),
            ("broken", &[], &[(1, (1, true, Some("bad")))], &["!1"]),
            ("broken still", &[(1, (1, true, Some("bad")))], &[(1, (2, true, Some("bad")))], &[]),
            ("mended", &[(1, (1, true, Some("bad")))], &[(1, ok(2))], &["+1"]),
            ("broken now", &[(1, ok(1))], &[(1, (2, true, Some("bad")))], &["!1"]),
        ];
        for (name, before, after, want) in cases {
            let before = listing(before, &[]);
            let after = listing(after, &[]).over(&before);
            assert_eq!(shown(&after.diff(&before)), *want, "{name}");
            assert!(after.diff(&after).is_empty(), "{name}");
        }
    }

    #[test]
    fn a_change_that_settles_late_is_not_lost() {
        let first = listing(&[(1, (1, true, None))], &[]);
        let second = listing(&[(1, (2, false, None))], &[]).over(&first);
        assert!(second.diff(&first).is_empty());
        let third = listing(&[(1, (2, true, None))], &[]).over(&second);
        assert_eq!(shown(&third.diff(&second)), ["~1"]);
    }

    #[test]
    fn labels_move() {
        let versions: Versions<'_> = &[(1, (1, true, None)), (2, (2, true, None))];
        let before = listing(versions, &[("champion", 1), ("old", 1)]);
        let after = listing(versions, &[("champion", 2), ("new", 2)]);
        assert_eq!(shown(&after.diff(&before)), ["champion:1>2", "new:_>2", "old:1>_"]);
    }

    #[test]
    fn a_model_that_cannot_be_read_now_keeps_what_was_known() {
        let before = listing(&[(1, (1, true, None))], &[("stable", 1)]);
        let mut now = listing(&[], &[]);
        now.models.values_mut().for_each(|model| model.problem = Some("no access".to_owned()));
        let now = now.over(&before);
        assert!(now.diff(&before).is_empty());
        let empty = Listing::default();
        assert_eq!(shown(&empty.diff(&before)), ["-1", "stable:1>_"]);
        let mut configured = before.clone();
        configured.models.values_mut().for_each(|model| model.config = print(5));
        assert_eq!(shown(&configured.diff(&before)), ["config"]);
    }
}
