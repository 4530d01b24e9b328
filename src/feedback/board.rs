//! Tallies by model, version, arm and day: what figures are made of.
//!
//! Invariants:
//! - A label counts on the day that its prediction was made, however late it comes.
//! - Memory is bounded: days of the window, and [`TALLIES_MAX`] tallies; the oldest day goes first.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use utoipa::ToSchema;

use crate::ledger::export::Date;
use crate::quality::{Figures, Tally};

/// Tallies that are kept, of all models together.
pub const TALLIES_MAX: usize = 16_384;
const DAY_MS: u64 = 86_400_000;

/// Days since 1970.
pub type Day = i64;

/// What has figures of its own.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Series {
    pub model: String,
    pub version: u64,
    pub arm: String,
}

/// How good a model's predictions were.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
#[schema(as = QualityReport)]
pub struct Report {
    pub model: String,
    /// First and last day that the predictions are of, UTC.
    #[schema(format = Date)]
    pub from: String,
    #[schema(format = Date)]
    pub to: String,
    pub versions: Vec<VersionQuality>,
}

#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct VersionQuality {
    #[schema(value_type = String)]
    pub version: crate::domain::Version,
    /// Of all arms together.
    pub all: Figures,
    /// `stable`, `canary`, `pinned`, or a rule's name.
    pub arms: BTreeMap<String, Figures>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Board {
    /// All that is in the log of feedback is counted; until then counts may be behind those of before.
    pub(super) whole: bool,
    days: BTreeMap<Day, BTreeMap<Series, Tally>>,
    changed: BTreeSet<(Day, Series)>,
}

/// The day of a time in milliseconds since 1970.
pub(super) fn day_of(ms: u64) -> Day {
    i64::try_from(ms / DAY_MS).unwrap_or(Day::MAX)
}

impl Board {
    /// As it was written down.
    pub(super) fn of(tallies: Vec<(Series, Day, Tally)>) -> Self {
        let mut board = Self::default();
        for (series, day, tally) in tallies {
            board.days.entry(day).or_default().insert(series, tally);
        }
        board
    }

    pub(super) fn change(&mut self, series: &Series, day: Day, change: impl FnOnce(&mut Tally)) {
        change(self.days.entry(day).or_default().entry(series.clone()).or_default());
        self.changed.insert((day, series.clone()));
    }

    /// Forgets days before this one, and the oldest while there are too many tallies; the first
    /// that is left.
    pub(super) fn forget(&mut self, first: Day) -> Day {
        let mut first = first;
        self.days = self.days.split_off(&first);
        let mut all: usize = self.days.values().map(BTreeMap::len).sum();
        while all > TALLIES_MAX
            && self.days.len() > 1
            && let Some((day, gone)) = self.days.pop_first()
        {
            all -= gone.len();
            first = day + 1;
        }
        self.changed.retain(|(day, _)| *day >= first);
        first
    }

    /// What changed since this was asked the last time.
    pub(super) fn changed(&self) -> impl Iterator<Item = (&Series, Day, &Tally)> {
        self.changed.iter().filter_map(|(day, series)| {
            let tally = self.days.get(day)?.get(series)?;
            Some((series, *day, tally))
        })
    }

    pub(super) fn is_changed(&self) -> bool {
        !self.changed.is_empty()
    }

    pub(super) fn written(&mut self) {
        self.changed.clear();
    }

    /// Sums over the days from this one on, by series.
    pub(super) fn sums(
        &self,
        first: Day,
        wants: impl Fn(&Series) -> bool,
    ) -> BTreeMap<Series, Tally> {
        let mut sums: BTreeMap<Series, Tally> = BTreeMap::new();
        for (series, tally) in self.days.range(first..).flat_map(|(_, day)| day) {
            if !wants(series) {
                continue;
            }
            match sums.get_mut(series) {
                Some(sum) => sum.add(tally),
                None => drop(sums.insert(series.clone(), tally.clone())),
            }
        }
        sums
    }

    /// Mistakes, and rows that labels were held against, of all days.
    /// `None` as long as they are not whole.
    pub(super) fn mistakes(&self, wants: impl Fn(&Series) -> bool) -> Option<(u64, u64)> {
        let all = self.days.values().flatten().filter(|(series, _)| wants(series));
        let add = |(events, of), more: (u64, u64)| (events + more.0, of + more.1);
        self.whole.then(|| all.map(|(_, tally)| tally.mistakes()).fold((0, 0), add))
    }

    /// Names of the metrics of callers that a series has on a day.
    pub(super) fn metrics(&self, series: &Series, day: Day) -> BTreeSet<String> {
        let tally = self.days.get(&day).and_then(|day| day.get(series));
        tally.map(|tally| tally.metric_names().map(str::to_owned).collect()).unwrap_or_default()
    }

    /// Of a model's predictions from the first day to the last.
    pub(super) fn report(&self, model: &str, first: Day, last: Day) -> Report {
        let mut versions: BTreeMap<u64, (Tally, BTreeMap<String, Figures>)> = BTreeMap::new();
        for (series, tally) in self.sums(first, |series| series.model == model) {
            let (all, arms) = versions.entry(series.version).or_default();
            all.add(&tally);
            arms.insert(series.arm, Figures::from(&tally));
        }
        let versions = versions.into_iter().filter_map(|(version, (all, arms))| {
            let version = crate::domain::Version::new(version)?;
            Some(VersionQuality { version, all: Figures::from(&all), arms })
        });
        Report {
            model: model.to_owned(),
            from: date(first),
            to: date(last),
            versions: versions.collect(),
        }
    }
}

fn date(day: Day) -> String {
    Date::of(day.saturating_mul(86_400_000_000_000)).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(version: u64, arm: &str) -> Series {
        Series { model: "iris".into(), version, arm: arm.into() }
    }

    #[test]
    fn days_and_arms_add_up_and_old_days_go() {
        let mut board = Board::default();
        for day in 10..20 {
            board.change(&series(1, "stable"), day, |tally| tally.predictions += 2);
            board.change(&series(1, "canary"), day, |tally| tally.predictions += 1);
        }
        board.change(&series(2, ""), 19, |tally| tally.predictions += 5);
        let report = board.report("iris", 15, 19);
        assert_eq!((&*report.from, &*report.to), ("1970-01-16", "1970-01-20"));
        let [one, two] = &report.versions[..] else { panic!("{report:?}") };
        assert_eq!((one.all.predictions, one.arms["stable"].predictions), (15, 10));
        assert_eq!((two.all.predictions, two.arms.len()), (5, 1));
        assert_eq!(board.report("other", 0, 99).versions, []);
        assert_eq!(board.changed().count(), 21);
        board.written();
        assert!(!board.is_changed());
        board.change(&series(1, "stable"), 12, |tally| tally.labelled += 1);
        assert_eq!(board.forget(14), 14);
        assert_eq!(board.changed().count(), 0);
        assert_eq!(board.report("iris", 0, 99).versions[0].all.predictions, 18);
    }

    #[test]
    fn the_oldest_day_goes_when_there_are_too_many() {
        let mut board = Board::default();
        for version in 0..TALLIES_MAX as u64 / 2 + 1 {
            for day in [3, 4] {
                board.change(&series(version, ""), day, |tally| tally.predictions += 1);
            }
        }
        assert_eq!(board.forget(0), 4);
        assert_eq!(board.days.len(), 1);
    }
}
