//! Counters by time: short slots that make an hour, and hours that make a day.
//!
//! Only the open slot is counted into; a window is the sum of its slots, exactly.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::drift::counters::Counters;

/// Seconds of a short slot.
pub(super) const SLOT_S: i64 = 300;
const HOUR_S: i64 = 3600;
const DAY_S: i64 = 24 * HOUR_S;
/// One more than end within an hour, and within a day: the oldest is there in part.
const SHORT_MAX: usize = 13;
const HOURS_MAX: usize = 25;

/// No slot of a file begins later: in the year 36812.
const FROM_MAX: i64 = 1 << 40;

/// Counters of all features over some time.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Slot {
    /// Seconds since 1970.
    pub(super) from: i64,
    pub(super) counters: Vec<Counters>,
}

/// What a change of slot brings with it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turned {
    Nothing,
    Slot,
    Hour,
    Day,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Slots {
    pub(super) open: Slot,
    short: VecDeque<Slot>,
    /// The short ones of this hour that have ended.
    hour: Slot,
    hours: VecDeque<Slot>,
}

/// A stretch of time that is judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Window {
    Hour,
    Day,
}

impl Slots {
    pub(super) fn new(now: i64, empty: Vec<Counters>) -> Self {
        Self {
            open: Slot { from: start(now, SLOT_S), counters: empty.clone() },
            short: VecDeque::new(),
            hour: Slot { from: start(now, HOUR_S), counters: empty },
            hours: VecDeque::new(),
        }
    }

    /// Whether the open slot has ended by now.
    pub(super) fn is_due(&self, now: i64) -> bool {
        now >= self.open.from + SLOT_S
    }

    /// Ends what has ended by now. When the clock went back, what lies before it now is kept, and the
    /// open slot goes on from there.
    pub(super) fn turn(&mut self, now: i64, empty: impl Fn() -> Vec<Counters>) -> Turned {
        if now < self.open.from {
            self.open.from = start(now, SLOT_S);
            self.hour.from = self.hour.from.min(start(now, HOUR_S));
            self.short.retain(|slot| slot.from <= now);
            self.hours.retain(|slot| slot.from <= now);
        }
        if !self.is_due(now) {
            return Turned::Nothing;
        }
        let next = Slot { from: start(now, SLOT_S), counters: empty() };
        let ended = std::mem::replace(&mut self.open, next);
        add(&mut self.hour.counters, &ended.counters);
        self.short.push_back(ended);
        let mut turned = Turned::Slot;
        if now >= self.hour.from + HOUR_S {
            let day = start(now, DAY_S) > start(self.hour.from, DAY_S);
            turned = if day { Turned::Day } else { Turned::Hour };
            let next = Slot { from: start(now, HOUR_S), counters: empty() };
            self.hours.push_back(std::mem::replace(&mut self.hour, next));
        }
        self.forget(now);
        turned
    }

    fn forget(&mut self, now: i64) {
        self.short.retain(|slot| slot.from + SLOT_S > now - HOUR_S);
        self.hours.retain(|slot| slot.from + HOUR_S > now - DAY_S);
    }

    /// The sum of a window, and since when it counts.
    pub(super) fn sum(&self, window: Window) -> Slot {
        let mut sum = self.open.clone();
        let slots: Vec<&Slot> = match window {
            Window::Hour => self.short.iter().collect(),
            Window::Day => self.hours.iter().chain([&self.hour]).collect(),
        };
        for slot in slots {
            sum.from = sum.from.min(slot.from);
            add(&mut sum.counters, &slot.counters);
        }
        sum
    }

    /// Whether no row came for a day.
    pub(super) fn is_empty(&self) -> bool {
        let all = self.short.iter().chain(&self.hours).chain([&self.open, &self.hour]);
        all.into_iter().all(|slot| slot.counters.iter().all(|counters| counters.rows() == 0))
    }

    /// Whether all of it was counted by somebody with these features. For what comes from a file.
    pub(super) fn fits(&self, fits: impl Fn(&[Counters]) -> bool) -> bool {
        let few = self.short.len() <= SHORT_MAX && self.hours.len() <= HOURS_MAX;
        let of_time = |slot: &&Slot| (0..FROM_MAX).contains(&slot.from);
        let all = self.short.iter().chain(&self.hours).chain([&self.open, &self.hour]);
        few && all.into_iter().all(|slot| of_time(&slot) && fits(&slot.counters))
    }
}

fn start(now: i64, len: i64) -> i64 {
    now.div_euclid(len) * len
}

fn add(into: &mut [Counters], more: &[Counters]) {
    for (have, more) in into.iter_mut().zip(more) {
        have.merge(more);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::drift::tally::Tally;

    fn empty() -> Vec<Counters> {
        vec![Counters::Cat(Tally::default())]
    }

    /// Rows of a window, each a minute apart from 0 on, after those of `minutes`.
    fn rows(minutes: i64, window: Window) -> u64 {
        let mut slots = Slots::new(0, empty());
        for minute in 0..minutes {
            slots.turn(minute * 60, empty);
            count(&mut slots);
        }
        slots.turn(minutes * 60, empty);
        slots.sum(window).counters[0].rows()
    }

    fn count(slots: &mut Slots) {
        let Counters::Cat(tally) = &mut slots.open.counters[0] else { unreachable!() };
        tally.outside += 1;
    }

    #[test]
    fn windows_are_sums_of_their_slots() {
        assert_eq!((rows(3, Window::Hour), rows(3, Window::Day)), (3, 3));
        assert_eq!((rows(59, Window::Hour), rows(59, Window::Day)), (59, 59));
        // Whole slots go.
        assert_eq!((rows(600, Window::Hour), rows(600, Window::Day)), (60, 600));
        assert_eq!((rows(603, Window::Hour), rows(603, Window::Day)), (63, 603));
        assert_eq!(rows(3 * 24 * 60, Window::Day), 24 * 60);
        assert_eq!(rows(3 * 24 * 60 + 30, Window::Day), 24 * 60 + 30);
    }

    #[test]
    fn hours_and_days_are_told() {
        let mut slots = Slots::new(0, empty());
        assert_eq!(slots.turn(299, empty), Turned::Nothing);
        assert_eq!(slots.turn(300, empty), Turned::Slot);
        assert_eq!(slots.turn(3600, empty), Turned::Hour);
        assert_eq!(slots.turn(DAY_S + 5, empty), Turned::Day);
        assert!(slots.is_empty());
    }

    #[test]
    fn a_clock_that_goes_back_stops_nothing() {
        let mut slots = Slots::new(10 * DAY_S, empty());
        count(&mut slots);
        slots.turn(10 * DAY_S + SLOT_S, empty);
        count(&mut slots);
        assert_eq!(slots.turn(DAY_S, empty), Turned::Nothing);
        assert_eq!(slots.open.from, DAY_S);
        count(&mut slots);
        assert_eq!(slots.turn(DAY_S + SLOT_S, empty), Turned::Slot);
        assert_eq!(slots.sum(Window::Hour).counters[0].rows(), 2);
    }
}
