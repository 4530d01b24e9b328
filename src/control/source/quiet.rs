//! When a version counts as written.
//!
//! ```text
//! SHA256SUMS names what is there ────────────────▶ settled
//! unchanged for `quiet` by our own clock ────────▶ settled
//! first look of all, and older than `quiet` ─────▶ settled, so that a start does not wait
//! otherwise ─────────────────────────────────────▶ wait
//! ```
//!
//! Invariant: after the first look only our own monotonic clock counts. Times that others wrote may
//! be set back by the tool that copies, or be of a clock that is not ours.

use std::collections::HashMap;
use std::time::{Duration, Instant, SystemTime};

use super::Fingerprint;
use crate::domain::{ModelName, Version};

/// One reading of both clocks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Now {
    pub(super) instant: Instant,
    pub(super) wall: SystemTime,
}

impl Now {
    pub(super) fn read() -> Self {
        Self { instant: Instant::now(), wall: SystemTime::now() }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Settled,
    /// It would be, unchanged, after this long.
    Wait(Duration),
}

/// What was seen of each version, from look to look.
pub(super) struct Observations {
    quiet: Duration,
    /// How far the clock that wrote the times may be from ours.
    skew: Duration,
    /// No look was finished yet.
    first: bool,
    seen: HashMap<(ModelName, Version), Seen>,
}

struct Seen {
    fingerprint: Fingerprint,
    since: Instant,
    settled: bool,
    /// In the look that is under way.
    now: bool,
}

impl Observations {
    pub(super) fn new(quiet: Duration, skew: Duration) -> Self {
        Self { quiet, skew, first: true, seen: HashMap::new() }
    }

    /// Whether it has settled without a look at `SHA256SUMS`; notes what is seen.
    pub(super) fn judge(
        &mut self,
        model: &ModelName,
        version: Version,
        fingerprint: Fingerprint,
        newest: Option<SystemTime>,
        now: Now,
    ) -> Verdict {
        let fresh = || Seen { fingerprint, since: now.instant, settled: false, now: true };
        let seen = self.seen.entry((model.clone(), version)).or_insert_with(fresh);
        if seen.fingerprint != fingerprint {
            *seen = fresh();
        }
        seen.now = true;
        let age = newest.and_then(|newest| now.wall.duration_since(newest).ok());
        let old = self.first && age.is_some_and(|age| age >= self.quiet + self.skew);
        let unchanged = now.instant.saturating_duration_since(seen.since);
        seen.settled |= old || unchanged >= self.quiet;
        match seen.settled {
            true => Verdict::Settled,
            false => Verdict::Wait(self.quiet - unchanged),
        }
    }

    /// `SHA256SUMS` says that it is whole.
    pub(super) fn complete(&mut self, model: &ModelName, version: Version) {
        if let Some(seen) = self.seen.get_mut(&(model.clone(), version)) {
            seen.settled = true;
        }
    }

    /// Ends a look: what was not seen in it is forgotten.
    pub(super) fn finish(&mut self) {
        self.first = false;
        self.seen.retain(|_, seen| std::mem::take(&mut seen.now));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUIET: Duration = Duration::from_millis(2000);

    fn print(number: u64) -> Fingerprint {
        let mut print = Fingerprint::build();
        print.number(number);
        print.done()
    }

    struct Clock(Now);

    impl Clock {
        fn at(&self, ms: i64) -> Now {
            let by = Duration::from_millis(ms.unsigned_abs());
            let wall = if ms < 0 { self.0.wall - by } else { self.0.wall + by };
            Now { instant: self.0.instant + if ms < 0 { Duration::ZERO } else { by }, wall }
        }
    }

    #[test]
    fn a_version_settles_when_left_alone() {
        // (time of the look in ms, fingerprint, age of the newest file in ms, settled)
        type Look = (i64, u64, i64, bool);
        let cases: &[(&str, &[Look])] = &[
            ("old at the first look", &[(0, 1, 5000, true), (100, 1, 5100, true)]),
            (
                "new at the first look",
                &[(0, 1, 100, false), (1999, 1, 2099, false), (2000, 1, 2100, true)],
            ),
            ("written from the future", &[(0, 1, -60_000, false), (2000, 1, -58_000, true)]),
            (
                "changed before it settled",
                &[(0, 1, 0, false), (1500, 2, 0, false), (3000, 2, 0, false), (3500, 2, 0, true)],
            ),
            (
                "changed after it settled",
                &[(0, 1, 5000, true), (50, 2, 0, false), (2050, 2, 0, true)],
            ),
            (
                "times set back count only at first",
                &[(0, 1, 5000, true), (50, 2, 9000, false), (2050, 2, 9000, true)],
            ),
            (
                "back to what it was",
                &[(0, 1, 5000, true), (50, 2, 0, false), (60, 1, 0, false), (2060, 1, 0, true)],
            ),
        ];
        let (model, version): (ModelName, _) = ("m".parse().unwrap(), Version::new(1).unwrap());
        for (name, looks) in cases {
            let clock = Clock(Now::read());
            let mut observed = Observations::new(QUIET, Duration::ZERO);
            for (at, fingerprint, age, settled) in *looks {
                let now = clock.at(*at);
                let by = Duration::from_millis(age.unsigned_abs());
                let newest = if *age < 0 { now.wall + by } else { now.wall - by };
                let verdict =
                    observed.judge(&model, version, print(*fingerprint), Some(newest), now);
                observed.finish();
                assert_eq!(verdict == Verdict::Settled, *settled, "{name} at {at}: {verdict:?}");
            }
        }
    }

    #[test]
    fn what_comes_later_waits_whatever_its_times_say() {
        let clock = Clock(Now::read());
        let mut observed = Observations::new(QUIET, Duration::from_secs(60));
        let (model, number): (ModelName, _) = ("m".parse().unwrap(), Version::new);
        let (one, two) = (number(1).unwrap(), number(2).unwrap());
        let old = |ms| Some(clock.0.wall - Duration::from_millis(ms));
        let judge = |observed: &mut Observations, version, age, at| {
            observed.judge(&model, version, print(1), old(age), clock.at(at))
        };
        // Within the skew of a clock that is not ours, its age proves nothing.
        assert_eq!(judge(&mut observed, one, 61_999, 0), Verdict::Wait(QUIET));
        observed.finish();
        assert_eq!(
            judge(&mut observed, one, 61_999, 500),
            Verdict::Wait(Duration::from_millis(1500))
        );
        assert_eq!(judge(&mut observed, two, 999_999, 500), Verdict::Wait(QUIET));
        observed.complete(&model, two);
        assert_eq!(judge(&mut observed, two, 999_999, 600), Verdict::Settled);
        observed.finish();
        // Gone and back again: it starts anew.
        observed.finish();
        assert_eq!(judge(&mut observed, two, 999_999, 700), Verdict::Wait(QUIET));
    }
}
