//! Decides which waiting requests run together. Pure: time is an argument, nothing is run.
//!
//! Invariants:
//! - An entry leaves exactly once: in a batch or as expired.
//! - A batch never holds more rows than `size_max`, unless one entry alone brings more.
//! - Entries of one batch are equal in everything but their rows (`joins`).
//! - Within a priority, entries leave in the order they came.

use std::collections::VecDeque;

use tokio::time::Instant;

use crate::domain::BatchSettings;

/// One waiting request.
#[derive(Debug)]
pub(super) struct Entry<T> {
    pub(super) rows: usize,
    /// 1 is the highest; all equal where the model has no priorities.
    pub(super) priority: u32,
    pub(super) queued_at: Instant,
    /// When it is of no use any more.
    pub(super) expires_at: Instant,
    pub(super) item: T,
}

#[derive(Debug)]
pub(super) enum Take<T> {
    Batch(Vec<Entry<T>>),
    /// Nothing is due before then, unless more comes.
    Wait(Instant),
    Empty,
}

/// Waiting requests, highest priority first, then oldest.
#[derive(Debug)]
pub(super) struct Queue<T> {
    entries: VecDeque<Entry<T>>,
}

impl<T> Queue<T> {
    pub(super) fn new() -> Self {
        Self { entries: VecDeque::new() }
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn push(&mut self, entry: Entry<T>) {
        let at = self.entries.iter().rposition(|other| other.priority <= entry.priority);
        self.entries.insert(at.map_or(0, |at| at + 1), entry);
    }

    /// Removes what has expired, or what nobody waits for.
    pub(super) fn take_dead(&mut self, now: Instant, gone: impl Fn(&T) -> bool) -> Vec<Entry<T>> {
        let dead = |entry: &Entry<T>| entry.expires_at <= now || gone(&entry.item);
        let mut taken = Vec::new();
        let mut at = 0;
        while at < self.entries.len() {
            if dead(&self.entries[at]) {
                taken.extend(self.entries.remove(at));
            } else {
                at += 1;
            }
        }
        taken
    }

    /// The next batch, if one is due: full, of a preferred size, or its first entry has waited
    /// for `wait_max`. `joins` says whether two entries may run together.
    pub(super) fn take(
        &mut self,
        settings: &BatchSettings,
        now: Instant,
        joins: impl Fn(&T, &T) -> bool,
    ) -> Take<T> {
        let Some(head) = self.entries.front() else { return Take::Empty };
        let mut members = vec![0];
        let mut rows = head.rows;
        let mut full = rows >= settings.size_max;
        // The longest prefix of members whose rows are a preferred size.
        let mut preferred = settings.preferred.contains(&rows).then_some(1);
        for (at, entry) in self.entries.iter().enumerate().skip(1) {
            if full {
                break;
            }
            if !joins(&head.item, &entry.item) {
                continue;
            }
            if rows + entry.rows > settings.size_max {
                // Taking a later, smaller one instead would let it overtake.
                full = true;
                break;
            }
            members.push(at);
            rows += entry.rows;
            full = rows == settings.size_max;
            if settings.preferred.contains(&rows) {
                preferred = Some(members.len());
            }
        }
        let due_at = self.due_at(settings);
        match preferred {
            Some(count) if !full => members.truncate(count),
            _ if full || due_at <= now => {}
            _ => return Take::Wait(due_at),
        }
        Take::Batch(self.remove_all(&members))
    }

    /// When the oldest entry's window closes.
    fn due_at(&self, settings: &BatchSettings) -> Instant {
        let oldest = self.entries.iter().map(|entry| entry.queued_at).min();
        oldest.unwrap_or_else(Instant::now) + settings.wait_max
    }

    /// `members` ascend.
    fn remove_all(&mut self, members: &[usize]) -> Vec<Entry<T>> {
        let mut batch = Vec::with_capacity(members.len());
        for &at in members.iter().rev() {
            batch.extend(self.entries.remove(at));
        }
        batch.reverse();
        batch
    }

    /// The first time at which some entry expires.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.entries.iter().map(|entry| entry.expires_at).min()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    fn settings(size_max: usize, wait_ms: u64, preferred: &[usize]) -> BatchSettings {
        BatchSettings {
            size_max,
            wait_max: Duration::from_millis(wait_ms),
            preferred: preferred.to_vec(),
            ..BatchSettings::default()
        }
    }

    fn entry(item: u32, rows: usize, priority: u32, queued_at: Instant) -> Entry<u32> {
        let expires_at = queued_at + Duration::from_secs(60);
        Entry { rows, priority, queued_at, expires_at, item }
    }

    fn items(take: Take<u32>) -> Option<Vec<u32>> {
        match take {
            Take::Batch(batch) => Some(batch.into_iter().map(|entry| entry.item).collect()),
            Take::Wait(_) | Take::Empty => None,
        }
    }

    #[test]
    fn a_batch_closes_when_full_preferred_or_due() {
        let start = Instant::now();
        type Case<'a> = (&'a str, BatchSettings, &'a [usize], u64, Option<usize>);
        let cases: &[Case<'_>] = &[
            ("no window: at once", settings(8, 0, &[]), &[1, 1], 0, Some(2)),
            ("window open", settings(8, 5, &[]), &[1, 1], 4, None),
            ("window over", settings(8, 5, &[]), &[1, 1], 5, Some(2)),
            ("full", settings(2, 5, &[]), &[1, 1, 1], 0, Some(2)),
            ("next does not fit", settings(4, 5, &[]), &[3, 2], 0, Some(1)),
            ("one brings more than a batch", settings(4, 5, &[]), &[9, 1], 0, Some(1)),
            ("preferred", settings(8, 5, &[2, 4]), &[1, 1, 1], 0, Some(2)),
            ("largest preferred", settings(8, 5, &[2, 4]), &[1, 1, 1, 1, 1], 0, Some(4)),
        ];
        for (name, settings, rows, after_ms, want) in cases {
            let mut queue = Queue::new();
            for (item, rows) in (0..).zip(*rows) {
                queue.push(entry(item, *rows, 1, start));
            }
            let now = start + Duration::from_millis(*after_ms);
            let got = items(queue.take(settings, now, |_, _| true)).map(|batch| batch.len());
            assert_eq!(got, *want, "{name}");
        }
    }

    #[test]
    fn the_highest_priority_goes_first_and_keeps_order() {
        let now = Instant::now();
        let mut queue = Queue::new();
        for (item, priority) in [(0, 2), (1, 1), (2, 2), (3, 1)] {
            queue.push(entry(item, 1, priority, now));
        }
        let all = items(queue.take(&settings(9, 0, &[]), now, |_, _| true));
        assert_eq!(all, Some(vec![1, 3, 0, 2]));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_doubled_mixed_or_over(
            entries in prop::collection::vec((1_usize..6, 1_u32..4, 0_u32..3, 0_u64..9), 1..60),
            size_max in 1_usize..9,
            wait_ms in 0_u64..4,
        ) {
            let start = Instant::now();
            let settings = settings(size_max, wait_ms, &[]);
            let mut queue = Queue::new();
            let mut seen = BTreeSet::new();
            let mut kind = Vec::new();
            for (item, (rows, priority, shape, expires_ms)) in (0_u32..).zip(&entries) {
                kind.push(*shape);
                let mut entry = entry(item, *rows, *priority, start);
                entry.expires_at = start + Duration::from_millis(*expires_ms + 1);
                queue.push(entry);
            }
            for step in 0_u64..20 {
                let now = start + Duration::from_millis(step);
                for entry in queue.take_dead(now, |_| false) {
                    prop_assert!(entry.expires_at <= now);
                    prop_assert!(seen.insert(entry.item));
                }
                let joins = |a: &u32, b: &u32| kind[*a as usize] == kind[*b as usize];
                if let Take::Batch(batch) = queue.take(&settings, now, joins) {
                    let rows: usize = batch.iter().map(|entry| entry.rows).sum();
                    prop_assert!(batch.len() == 1 || rows <= size_max);
                    for entry in batch {
                        prop_assert!(entry.expires_at > now, "expired work is never run");
                        prop_assert!(seen.insert(entry.item));
                    }
                }
            }
            while let Take::Batch(batch) = queue.take(&settings, start + Duration::from_secs(9), |a, b| {
                kind[*a as usize] == kind[*b as usize]
            }) {
                for entry in batch {
                    prop_assert!(seen.insert(entry.item));
                }
            }
            prop_assert_eq!(seen.len(), entries.len());
        }
    }
}
