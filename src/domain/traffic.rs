//! How one model's traffic is divided over its versions: weights, sticky keys, rules, shadows.
//!
//! A [`Traffic`] is what an operator writes and reads, and what is kept. `route` makes of it what
//! decides about single requests.
//!
//! Invariants:
//! - Whatever is written, [`Traffic::check`] answers with every problem and never panics.
//! - Shares add up to [`BUCKETS`], each within one bucket of what its weight says.
//! - Raising one weight never lowers the place where its share ends, nor raises the one where it
//!   begins: who is counted in by a share stays in while it grows.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa::openapi::schema::{Object, ObjectBuilder, Type};

use super::names::VERSION_PATTERN;
use super::{Label, Version, VersionRef};

/// Parts that traffic is divided into: a share is so many of them, each 0.01 %.
pub const BUCKETS: u16 = 10_000;
/// Most versions with a weight.
pub const WEIGHTS_MAX: usize = 64;
/// Most rules. Metrics have as many series for them.
pub const RULES_MAX: usize = 32;
/// Most shadows.
pub const SHADOWS_MAX: usize = 8;
/// Longest header name of a rule or sticky key, in bytes.
pub const HEADER_LEN_MAX: usize = 64;
/// Longest parameter name of a sticky key, in bytes.
pub const PARAMETER_LEN_MAX: usize = 128;
/// Longest value that a rule compares a header with, in bytes.
pub const VALUE_LEN_MAX: usize = 256;

/// Names that rules may not have, because answers and metrics use them for other arms.
const ARMS: [&str; 4] = ["stable", "canary", "pinned", "other"];
/// Headers with secrets: a rule would put them where others read them.
const SECRET_HEADERS: [&str; 2] = ["authorization", "proxy-authorization"];

/// How requests without a version are divided over a model's versions.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
#[schema(example = json!({
    "weights": {"1": 95, "2": 5},
    "sticky": {"header": "x-user-id"},
    "rules": [{"name": "beta", "header": "x-group", "equals": "beta", "version": "canary"}],
    "shadows": [{"version": "3", "percent": 10}]
}))]
pub struct Traffic {
    /// Non-negative numbers, at least one of them positive: a version's share is its part of their
    /// sum, to 0.01 %. At most 64 versions.
    #[serde(deserialize_with = "weights")]
    #[schema(schema_with = weights_schema)]
    pub weights: BTreeMap<Version, f64>,
    /// Where a request's sticky key is, beside the header `tidegate-sticky-key`, which wins.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sticky: Option<Sticky>,
    /// Looked at in order, before the weights. At most 32.
    #[serde(default)]
    #[schema(max_items = 32)]
    pub rules: Vec<Rule>,
    /// Versions that run on copies of requests; nobody sees their answers. At most 8.
    #[serde(default)]
    #[schema(max_items = 8)]
    pub shadows: Vec<Shadow>,
}

/// Requests with the same value there get the same version for as long as the shares allow it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Sticky {
    /// A request header (gRPC: metadata).
    Header(String),
    /// A parameter of the request.
    Parameter(String),
}

/// Sends requests with a certain header (gRPC: metadata) to one version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The arm of its requests, in answers and metrics. Not `stable`, `canary`, `pinned`, `other`.
    pub name: Label,
    #[schema(min_length = 1, max_length = 64)]
    pub header: String,
    /// The header's whole value. Either this or `prefix`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(max_length = 256)]
    pub equals: Option<String>,
    /// What the header's value begins with. Either this or `equals`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(min_length = 1, max_length = 256)]
    pub prefix: Option<String>,
    /// A number or a label.
    pub version: VersionRef,
}

/// Runs a version on copies of requests.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Shadow {
    pub version: Version,
    /// Share of the requests that are copied, to 0.01 %; 0 to 100.
    #[schema(minimum = 0, maximum = 100)]
    pub percent: f64,
}

impl Traffic {
    /// Everything to one version.
    pub fn all_to(version: Version) -> Self {
        Self { weights: BTreeMap::from([(version, 100.0)]), ..Self::default() }
    }

    /// # Errors
    /// Every problem, each with its path: `weights.2: …`.
    pub fn check(&self) -> Result<(), Vec<String>> {
        let mut problems = Vec::new();
        self.check_weights(&mut problems);
        self.check_sticky(&mut problems);
        self.check_rules(&mut problems);
        self.check_shadows(&mut problems);
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    fn check_weights(&self, problems: &mut Vec<String>) {
        let count = self.weights.len();
        if count > WEIGHTS_MAX {
            let message = format!("expected at most {WEIGHTS_MAX} versions, got {count}");
            return problems.push(format!("weights: {message}"));
        }
        for (version, weight) in &self.weights {
            if !weight.is_finite() || *weight < 0.0 {
                let message = format!("expected a number of at least 0, got {weight}");
                problems.push(format!("weights.{version}: {message}"));
            }
        }
        if !problems.is_empty() {
            return;
        }
        let sum: f64 = self.weights.values().sum();
        if !sum.is_finite() {
            problems.push("weights: their sum is too large".to_owned());
        } else if sum <= 0.0 {
            problems.push("weights: at least one has to be positive".to_owned());
        }
    }

    fn check_sticky(&self, problems: &mut Vec<String>) {
        match &self.sticky {
            None => {}
            Some(Sticky::Header(name)) => {
                if let Some(problem) = header_problem(name) {
                    problems.push(format!("sticky.header: {problem}"));
                }
            }
            Some(Sticky::Parameter(name)) => {
                let len = name.len();
                if !(1..=PARAMETER_LEN_MAX).contains(&len) {
                    let message = format!("expected 1 to {PARAMETER_LEN_MAX} bytes, got {len}");
                    problems.push(format!("sticky.parameter: {message}"));
                }
            }
        }
    }

    fn check_rules(&self, problems: &mut Vec<String>) {
        let count = self.rules.len();
        if count > RULES_MAX {
            problems.push(format!("rules: expected at most {RULES_MAX}, got {count}"));
        }
        let mut names = BTreeSet::new();
        for (at, rule) in self.rules.iter().enumerate().take(RULES_MAX) {
            let mut problem = |key: &str, message: String| {
                problems.push(format!("rules.{at}{key}: {message}"));
            };
            let name = rule.name.as_str();
            if ARMS.contains(&name) {
                problem(".name", format!("'{name}' is the name of another arm"));
            }
            if !names.insert(name) {
                problem(".name", format!("'{name}' is the name of two rules"));
            }
            if let Some(message) = header_problem(&rule.header) {
                problem(".header", message);
            } else if SECRET_HEADERS.iter().any(|name| rule.header.eq_ignore_ascii_case(name)) {
                let message = "holds secrets, which a rule must not spell out";
                problem(".header", format!("'{}' {message}", rule.header));
            }
            match (&rule.equals, &rule.prefix) {
                (None, None) | (Some(_), Some(_)) => {
                    problem("", "expected either 'equals' or 'prefix'".to_owned());
                }
                (Some(value), None) => {
                    if let Some(message) = value_problem(value) {
                        problem(".equals", message);
                    }
                }
                (None, Some(value)) if value.is_empty() => {
                    problem(".prefix", "an empty one would match any value".to_owned());
                }
                (None, Some(value)) => {
                    if let Some(message) = value_problem(value) {
                        problem(".prefix", message);
                    }
                }
            }
        }
    }

    fn check_shadows(&self, problems: &mut Vec<String>) {
        let count = self.shadows.len();
        if count > SHADOWS_MAX {
            problems.push(format!("shadows: expected at most {SHADOWS_MAX}, got {count}"));
        }
        let mut versions = BTreeSet::new();
        for (at, Shadow { version, percent }) in self.shadows.iter().enumerate().take(SHADOWS_MAX) {
            // A NaN lies in no range.
            if !(0.0..=100.0).contains(percent) {
                let message = format!("expected a number from 0 to 100, got {percent}");
                problems.push(format!("shadows.{at}.percent: {message}"));
            }
            if !versions.insert(version) {
                problems.push(format!("shadows.{at}.version: {version} is there twice"));
            }
        }
    }

    /// The version that most would call the usual one: the labelled one if it has a weight, else
    /// the one with the largest, of equal ones the lowest number. `None` for weights that
    /// [`Self::check`] refuses.
    pub fn stable(&self, labelled: Option<Version>) -> Option<Version> {
        let mut problems = Vec::new();
        self.check_weights(&mut problems);
        if !problems.is_empty() {
            return None;
        }
        if let Some(labelled) = labelled.filter(|version| self.weights.contains_key(version)) {
            return Some(labelled);
        }
        let first = self.weights.first_key_value()?;
        let larger = |best: (_, f64), next: (_, f64)| if next.1 > best.1 { next } else { best };
        let all = self.weights.iter().map(|(version, weight)| (*version, *weight));
        Some(all.fold((*first.0, *first.1), larger).0)
    }

    /// Each version's part of [`BUCKETS`]. Empty for weights that [`Self::check`] refuses.
    pub fn shares(&self) -> BTreeMap<Version, u16> {
        self.shares_beside(None).into_iter().collect()
    }

    /// Versions and shares in the order in which they take the buckets: canaries by number, and
    /// then the labelled version, or else the oldest, which gets what is left. Who has most has no
    /// part in the order: it would turn round, and everyone change sides, when a canary gets more
    /// than half.
    ///
    /// It is the place where a share ends that is rounded, not the share: with each share rounded
    /// for itself (or by the largest remainder), raising one weight could move the places of others
    /// by a bucket, and users with them.
    pub fn shares_beside(&self, labelled: Option<Version>) -> Vec<(Version, u16)> {
        if self.stable(labelled).is_none() {
            return Vec::new();
        }
        let labelled = labelled.and_then(|version| self.weights.get_key_value(&version));
        let last = labelled.or(self.weights.first_key_value());
        let others = self
            .weights
            .iter()
            .filter(|(version, _)| last.is_none_or(|(last, _)| last != *version));
        let order: Vec<(Version, f64)> =
            others.chain(last).map(|(version, weight)| (*version, *weight)).collect();
        // What the ones behind it weigh, for each.
        let mut behind = vec![0.0; order.len()];
        for at in (1..order.len()).rev() {
            behind[at - 1] = behind[at] + order[at].1;
        }
        let (mut weight_to, mut from) = (0.0, 0);
        let share = |((version, weight), behind): ((Version, f64), f64)| {
            weight_to += weight;
            let to = bucket_at(weight_to, behind);
            let share = to - from;
            from = to;
            (version, share)
        };
        order.into_iter().zip(behind).map(share).collect()
    }

    /// Every version that is named by its number.
    pub fn versions(&self) -> BTreeSet<Version> {
        let by_rules = self.rules.iter().filter_map(|rule| match &rule.version {
            VersionRef::Number(version) => Some(*version),
            VersionRef::Label(_) => None,
        });
        let by_shadows = self.shadows.iter().map(|shadow| shadow.version);
        self.weights.keys().copied().chain(by_rules).chain(by_shadows).collect()
    }

    /// Every label that a rule names.
    pub fn labels(&self) -> BTreeSet<Label> {
        let labels = self.rules.iter().filter_map(|rule| match &rule.version {
            VersionRef::Number(_) => None,
            VersionRef::Label(label) => Some(label.clone()),
        });
        labels.collect()
    }
}

impl Rule {
    /// Whether a header's value is one that the rule asks for.
    pub fn matches(&self, value: &str) -> bool {
        match (&self.equals, &self.prefix) {
            (Some(equals), None) => value == equals,
            (None, Some(prefix)) => value.starts_with(&**prefix),
            _ => false,
        }
    }
}

impl Shadow {
    /// Share of the requests, in [`BUCKETS`].
    pub fn share(&self) -> u16 {
        buckets(self.percent / 100.0)
    }
}

/// Where a share ends that has `weight` up to there and `behind` after it.
///
/// Each step keeps the order of what goes in, rounding included, so that the result never falls
/// when `weight` grows, nor rises when `behind` does. Of two zeros it makes no NaN: one is positive.
fn bucket_at(weight: f64, behind: f64) -> u16 {
    buckets(1.0 / (1.0 + behind / weight))
}

fn buckets(share: f64) -> u16 {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a whole number from 0 to BUCKETS; NaN becomes 0"
    )]
    let buckets = (share.clamp(0.0, 1.0) * f64::from(BUCKETS)).round() as u16;
    buckets
}

fn header_problem(name: &str) -> Option<String> {
    let len = name.len();
    if !(1..=HEADER_LEN_MAX).contains(&len) {
        return Some(format!("expected 1 to {HEADER_LEN_MAX} bytes, got {len}"));
    }
    let token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
    (!name.bytes().all(token)).then(|| format!("'{}' is no header name", name.escape_debug()))
}

fn value_problem(value: &str) -> Option<String> {
    let len = value.len();
    if len > VALUE_LEN_MAX {
        return Some(format!("expected at most {VALUE_LEN_MAX} bytes, got {len}"));
    }
    value.chars().any(char::is_control).then(|| "a header holds no control characters".to_owned())
}

fn weights_schema() -> Object {
    let weight = ObjectBuilder::new().schema_type(Type::Number).minimum(Some(0));
    let names = ObjectBuilder::new().schema_type(Type::String);
    ObjectBuilder::new()
        .schema_type(Type::Object)
        .property_names(Some(names.pattern(Some(VERSION_PATTERN)).build()))
        .additional_properties(Some(weight))
        .min_properties(Some(1))
        .max_properties(Some(WEIGHTS_MAX))
        .build()
}

/// Refuses a version that is there twice, of which a map would keep the last.
fn weights<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<Version, f64>, D::Error> {
    struct Weights;

    impl<'de> de::Visitor<'de> for Weights {
        type Value = BTreeMap<Version, f64>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object of versions and numbers")
        }

        fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
            let mut weights = BTreeMap::new();
            while let Some((version, weight)) = map.next_entry::<Version, f64>()? {
                if weights.insert(version, weight).is_some() {
                    return Err(de::Error::custom(format!("version {version} is there twice")));
                }
            }
            Ok(weights)
        }
    }

    from.deserialize_map(Weights)
}

#[cfg(test)]
mod tests;
