//! Divides the requests of one model that name no version.
//!
//! ```text
//! bucket = SipHash(salt, sticky key, or else prediction id) scaled to 0..10,000
//!
//! 0          500        700                                             10,000
//! ├─ version 2 ┼─ version 3 ┼──────────── stable version ─────────────────┤
//! ```
//!
//! Canaries take the low buckets in the order of their numbers, the stable version (the labelled
//! one, or else the oldest) all that is left. The buckets of a version that is not loaded are
//! divided over the others by their shares, and those keep what they have.
//!
//! Invariants:
//! - Choosing allocates nothing, takes no lock and reads no clock.
//! - One key, one salt, one split: one version.
//! - A share that is raised keeps all the keys it had.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Write as _};
use std::hash::Hasher as _;
use std::sync::Arc;

use siphasher::sip::SipHasher13;
use uuid::Uuid;

use super::{Keys, STABLE};
use crate::domain::{
    Arm, BUCKETS, Label, ParameterValue, RouteHeaders, RouteReason, Rule, STICKY_KEY_LEN_MAX,
    Shadow, Sticky, Traffic, Version, VersionRef,
};

/// A traffic table made ready to decide, for the versions that are loaded now.
pub struct Split {
    traffic: Traffic,
    salt: u64,
    hash: SipHasher13,
    /// Header names in lower case.
    sticky: Option<Sticky>,
    /// Those whose version is loaded.
    rules: Vec<Way>,
    /// In the order of their buckets.
    parts: Vec<Part>,
    /// Ascending, up to [`BUCKETS`]; empty when no version with a share is loaded.
    ranges: Vec<Range>,
    mirrors: Vec<Mirroring>,
    header_names: Vec<Arc<str>>,
}

/// A rule and where it leads.
struct Way {
    rule: Rule,
    /// In lower case.
    header: Arc<str>,
    version: Version,
}

/// A version with a weight.
struct Part {
    version: Version,
    arm: Arm,
    /// What it gets now, which is nothing if it is not loaded.
    share: u16,
}

/// Buckets from where the one before ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Range {
    to: u32,
    /// In `parts`.
    part: usize,
}

/// A shadow that is loaded.
struct Mirroring {
    version: Version,
    share: u16,
    /// Of its own, so that a sample is one of all requests and not of some version's.
    hash: SipHasher13,
}

/// What was decided about one request.
pub(super) struct Choice {
    pub(super) version: Version,
    pub(super) arm: Arm,
    pub(super) reason: RouteReason,
}

impl Split {
    /// `traffic` as it was found right by its check; of one that was not, as much as makes sense.
    pub fn compile<T>(
        traffic: &Traffic,
        labels: &HashMap<Label, Version>,
        salt: u64,
        versions: &BTreeMap<Version, T>,
    ) -> Self {
        let labelled = labels.get(STABLE).copied();
        let stable = traffic.stable(labelled);
        let layout = traffic.shares_beside(labelled);
        let loaded = |version: &Version| versions.contains_key(version);
        let ranges = ranges(&layout, loaded);
        let part = |(at, (version, _)): (usize, &(Version, u16))| Part {
            version: *version,
            arm: if Some(*version) == stable { Arm::Stable } else { Arm::Canary },
            share: share_of(&ranges, at),
        };
        let way = |rule: &Rule| {
            let version = match &rule.version {
                VersionRef::Number(version) => Some(*version),
                VersionRef::Label(label) => {
                    let unmoved = || stable.filter(|_| label.as_str() == STABLE);
                    labels.get(label).copied().or_else(unmoved)
                }
            };
            let version = version.filter(loaded)?;
            Some(Way { rule: rule.clone(), header: lower(&rule.header), version })
        };
        let mirroring = |shadow: &Shadow| Mirroring {
            version: shadow.version,
            share: shadow.share(),
            hash: SipHasher13::new_with_keys(salt, shadow.version.get()),
        };
        let shadows = traffic.shadows.iter().filter(|shadow| loaded(&shadow.version));
        let mirrors = shadows.map(mirroring).filter(|mirroring| mirroring.share > 0);
        let rules: Vec<Way> = traffic.rules.iter().filter_map(way).collect();
        let sticky = match &traffic.sticky {
            Some(Sticky::Header(name)) => Some(Sticky::Header(name.to_ascii_lowercase())),
            other => other.clone(),
        };
        Self {
            hash: SipHasher13::new_with_keys(salt, 0),
            header_names: header_names(&rules, sticky.as_ref()),
            sticky,
            rules,
            parts: layout.iter().enumerate().map(part).collect(),
            mirrors: mirrors.collect(),
            ranges,
            traffic: traffic.clone(),
            salt,
        }
    }

    /// What it was made of.
    pub fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    pub fn salt(&self) -> u64 {
        self.salt
    }

    /// What each version with a weight gets now, in buckets, and as which arm.
    pub fn shares(&self) -> impl Iterator<Item = (Version, &Arm, u16)> {
        self.parts.iter().map(|part| (part.version, &part.arm, part.share))
    }

    /// In lower case, each once.
    pub(super) fn header_names(&self) -> &[Arc<str>] {
        &self.header_names
    }

    /// `None` when nothing that it could be is loaded.
    pub(super) fn choose(&self, keys: &Keys<'_>) -> Option<Choice> {
        if let Some(way) = self.rules.iter().find(|way| way.leads(&keys.call.headers)) {
            let name = &way.rule.name;
            let (arm, reason) = (Arm::Rule(name.clone()), RouteReason::Rule(name.clone()));
            return Some(Choice { version: way.version, arm, reason });
        }
        let by_key = self.key_hash(keys);
        let hash = by_key.unwrap_or_else(|| self.hash.hash(keys.prediction_id.as_bytes()));
        self.at(bucket(hash), by_key.is_some())
    }

    fn at(&self, bucket: u16, sticky: bool) -> Option<Choice> {
        let at = self.ranges.partition_point(|range| range.to <= u32::from(bucket));
        let Part { version, arm, share } = self.parts.get(self.ranges.get(at)?.part)?;
        let reason = RouteReason::Weight { bucket, share: *share, sticky };
        Some(Choice { version: *version, arm: arm.clone(), reason })
    }

    /// The stable version, or of those that are left the one with the largest share.
    pub(super) fn usual(&self) -> Option<Choice> {
        let rank = |part: &Part| (part.share > 0 && part.arm == Arm::Stable, part.share);
        let usual = (0..self.parts.len()).max_by_key(|at| rank(&self.parts[*at]))?;
        let range = self.ranges.iter().find(|range| range.part == usual)?;
        self.at(u16::try_from(range.to - 1).ok()?, false)
    }

    /// Shadows of a request that `primary` answers, with the share that they take.
    pub(super) fn mirrors(
        &self,
        prediction_id: Uuid,
        primary: Version,
    ) -> impl Iterator<Item = (Version, u16)> {
        let others = self.mirrors.iter().filter(move |mirroring| mirroring.version != primary);
        let hit = others.filter(move |mirroring| {
            bucket(mirroring.hash.hash(prediction_id.as_bytes())) < mirroring.share
        });
        hit.map(|mirroring| (mirroring.version, mirroring.share))
    }

    /// Hash of the request's sticky key: the one that is called so, else where the traffic table
    /// says, else where the configuration does.
    fn key_hash(&self, keys: &Keys<'_>) -> Option<u64> {
        let text = |key: &str| {
            let usable = (1..=STICKY_KEY_LEN_MAX).contains(&key.len());
            usable.then(|| self.hash.hash(key.as_bytes()))
        };
        if let Some(hash) = keys.call.sticky_key.as_deref().and_then(text) {
            return Some(hash);
        }
        let own = match &self.sticky {
            None => None,
            Some(Sticky::Header(name)) => keys.call.headers.get(name).and_then(text),
            Some(Sticky::Parameter(name)) => {
                let found = keys.parameters.iter().find(|(key, _)| key == name);
                found.and_then(|(_, value)| match value {
                    ParameterValue::String(key) => text(key),
                    other => Some(self.shown_hash(other)),
                })
            }
        };
        own.or_else(|| keys.call.headers.sticky_key.as_deref().and_then(text))
    }

    /// Hash of a value that is no text, as the text that it is shown as: 42 is the key `42`.
    fn shown_hash(&self, value: &ParameterValue) -> u64 {
        let mut hashed = Hashed(self.hash);
        let written = match value {
            ParameterValue::Bool(value) => write!(hashed, "{value}"),
            ParameterValue::Int(value) => write!(hashed, "{value}"),
            ParameterValue::Uint(value) => write!(hashed, "{value}"),
            ParameterValue::Double(value) => write!(hashed, "{value}"),
            ParameterValue::String(value) => hashed.write_str(value),
        };
        debug_assert!(written.is_ok(), "nothing here can fail");
        hashed.0.finish()
    }
}

impl Way {
    fn leads(&self, headers: &RouteHeaders) -> bool {
        headers.get(&self.header).is_some_and(|value| self.rule.matches(value))
    }
}

/// Hashes what is written into it.
struct Hashed(SipHasher13);

impl fmt::Write for Hashed {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.write(text.as_bytes());
        Ok(())
    }
}

/// Which of the buckets a hash falls into; all are as likely, to 2 in 10^15.
fn bucket(hash: u64) -> u16 {
    let scaled = (u128::from(hash) * u128::from(BUCKETS)) >> u64::BITS;
    u16::try_from(scaled).expect("a fraction of BUCKETS is below BUCKETS")
}

/// Who has which buckets, when only some versions are `loaded`.
fn ranges(layout: &[(Version, u16)], loaded: impl Fn(&Version) -> bool) -> Vec<Range> {
    let here = |(_, (version, share)): &(usize, &(Version, u16))| *share > 0 && loaded(version);
    let heirs: Vec<(usize, u32)> = layout
        .iter()
        .enumerate()
        .filter(here)
        .map(|(part, (_, share))| (part, u32::from(*share)))
        .collect();
    let left: u32 = heirs.iter().map(|(_, share)| share).sum();
    let mut ranges = Vec::with_capacity(layout.len());
    if left == 0 {
        return ranges;
    }
    let mut from = 0;
    for (part, (version, share)) in layout.iter().enumerate() {
        let share = u32::from(*share);
        if loaded(version) {
            extend(&mut ranges, Range { to: from + share, part });
        } else {
            let mut shares = 0;
            for (heir, of_heir) in &heirs {
                shares += of_heir;
                // Rounded; the last one's is all of it.
                let to = from + (2 * share * shares + left) / (2 * left);
                extend(&mut ranges, Range { to, part: *heir });
            }
        }
        from += share;
    }
    ranges
}

/// Adds a range, unless nothing is in it.
fn extend(ranges: &mut Vec<Range>, next: Range) {
    match ranges.last_mut() {
        Some(last) if last.to == next.to => {}
        Some(last) if last.part == next.part => last.to = next.to,
        None if next.to == 0 => {}
        _ => ranges.push(next),
    }
}

fn share_of(ranges: &[Range], part: usize) -> u16 {
    let mut from = 0;
    let mut share = 0;
    for range in ranges {
        if range.part == part {
            share += range.to - from;
        }
        from = range.to;
    }
    u16::try_from(share).expect("no more than all BUCKETS")
}

fn lower(name: &str) -> Arc<str> {
    name.to_ascii_lowercase().into()
}

fn header_names(rules: &[Way], sticky: Option<&Sticky>) -> Vec<Arc<str>> {
    let by_rules = rules.iter().map(|way| Arc::clone(&way.header));
    let by_key = sticky.and_then(|sticky| match sticky {
        Sticky::Header(name) => Some(name.as_str().into()),
        Sticky::Parameter(_) => None,
    });
    let mut names: Vec<Arc<str>> = by_rules.chain(by_key).collect();
    names.sort_unstable();
    names.dedup();
    names
}

#[cfg(test)]
mod tests;
