//! The traffic tables that a rollout makes of the one that it found.
//!
//! Invariant: sticky keys, rules and shadows that are not about the candidate stay as they are.

use std::collections::BTreeMap;

use crate::domain::{BUCKETS, Shadow, Traffic, Version, VersionRef};

/// Percent, to 0.01, in basis points.
pub(super) fn basis_points(percent: f64) -> u16 {
    let points = (percent * 100.0).round().clamp(0.0, f64::from(BUCKETS));
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a whole number from 0 to 10,000; NaN becomes 0"
    )]
    let points = points as u16;
    points
}

/// `weight` percent for the candidate and the rest for the stable version; copies only if asked.
pub(super) fn step(
    before: &Traffic,
    stable: Version,
    candidate: Version,
    weight: f64,
    shadow: Option<f64>,
) -> Traffic {
    let points = basis_points(weight);
    let percent = |points: u16| f64::from(points) / 100.0;
    let weights = [(stable, percent(BUCKETS - points)), (candidate, percent(points))];
    let weights = weights.into_iter().filter(|(_, weight)| *weight > 0.0).collect();
    let mut table = Traffic { weights, ..without_shadow(before, candidate) };
    let shadow = shadow.map(|percent| Shadow { version: candidate, percent });
    table.shadows.extend(shadow);
    table
}

/// Everything to the stable version, nothing to the candidate: no rule and no copy either.
pub(super) fn back(before: &Traffic, stable: Version, candidate: Version) -> Traffic {
    let mut table = step(before, stable, candidate, 0.0, None);
    table.rules.retain(|rule| rule.version != VersionRef::Number(candidate));
    table
}

fn without_shadow(before: &Traffic, candidate: Version) -> Traffic {
    let mut table = before.clone();
    table.shadows.retain(|shadow| shadow.version != candidate);
    table
}

/// Whether two tables send the same requests to the same versions. Numbers that were written and
/// read back may differ in their last digit, so shares are compared and not weights.
pub(super) fn same(one: &Traffic, other: &Traffic) -> bool {
    let shares = |table: &Traffic| -> BTreeMap<Version, u16> {
        table.shares().into_iter().filter(|(_, share)| *share > 0).collect()
    };
    let shadows = |table: &Traffic| -> BTreeMap<Version, u16> {
        table.shadows.iter().map(|shadow| (shadow.version, shadow.share())).collect()
    };
    shares(one) == shares(other)
        && shadows(one) == shadows(other)
        && one.sticky == other.sticky
        && one.rules == other.rules
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn version(number: u64) -> Version {
        Version::new(number).unwrap()
    }

    fn found() -> Traffic {
        serde_json::from_value(json!({
            "weights": {"1": 97, "2": 3},
            "sticky": {"header": "x-user-id"},
            "rules": [
                {"name": "beta", "header": "x-group", "equals": "beta", "version": "2"},
                {"name": "old", "header": "x-group", "equals": "old", "version": "1"},
                {"name": "new", "header": "x-group", "equals": "new", "version": "canary"},
            ],
            "shadows": [{"version": "2", "percent": 5}, {"version": "3", "percent": 1}],
        }))
        .unwrap()
    }

    #[test]
    fn a_step_changes_weights_and_the_candidates_copies_and_nothing_else() {
        let (stable, candidate) = (version(1), version(2));
        for weight in [0.01, 1.0, 33.33, 50.0, 99.99] {
            let table = step(&found(), stable, candidate, weight, None);
            assert!(table.check().is_ok());
            assert_eq!(table.shares()[&candidate], basis_points(weight), "{weight}");
            assert_eq!(table.shares()[&stable], BUCKETS - basis_points(weight), "{weight}");
            assert_eq!((&table.rules, &table.sticky), (&found().rules, &found().sticky));
            assert_eq!(table.shadows.len(), 1);
        }
        let shadow = step(&found(), stable, candidate, 0.0, Some(12.5));
        assert_eq!(shadow.weights, Traffic::all_to(stable).weights);
        assert_eq!(shadow.shadows[1], Shadow { version: candidate, percent: 12.5 });
        let all = step(&found(), stable, candidate, 100.0, None);
        assert_eq!(all.weights, Traffic::all_to(candidate).weights);
        let back = back(&found(), stable, candidate);
        assert_eq!(back.weights, Traffic::all_to(stable).weights);
        assert!(!back.versions().contains(&candidate));
        assert_eq!(back.rules.len(), 2);
    }

    #[test]
    fn tables_are_the_same_when_they_do_the_same() {
        let table = found();
        let mut other = table.clone();
        other.weights = [(version(1), 0.97), (version(2), 0.030_000_000_000_1)].into();
        other.weights.insert(version(3), 0.0);
        assert!(same(&table, &other));
        other.weights.insert(version(3), 0.1);
        assert!(!same(&table, &other));
        for change in [
            |table: &mut Traffic| table.sticky = None,
            |table: &mut Traffic| drop(table.rules.pop()),
            |table: &mut Traffic| table.shadows[0].percent = 6.0,
        ] {
            let mut other = table.clone();
            change(&mut other);
            assert!(!same(&table, &other));
        }
    }
}
