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

    /// Ends what has ended by now. A clock that went back ends nothing.
    pub(super) fn turn(&mut self, now: i64, empty: impl Fn() -> Vec<Counters>) -> Turned {
        if now < self.open.from + SLOT_S {
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

    /// Whether all of it was counted by somebody with these features. For what comes from a file.
    pub(super) fn fits(&self, fits: impl Fn(&[Counters]) -> bool) -> bool {
        let few = self.short.len() <= SHORT_MAX && self.hours.len() <= HOURS_MAX;
        let all = self.short.iter().chain(&self.hours).chain([&self.open, &self.hour]);
        few && all.into_iter().all(|slot| fits(&slot.counters))
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
