//! Decides which waiting requests run together. Pure: time is an argument, nothing is run.
//!
//! Invariants:
//! - An entry leaves exactly once: in a batch or as expired.
//! - A batch is never over a limit of its [`Rule`], unless one entry alone is.
//! - Entries of one batch are equal in everything but their rows (`joins`).
//! - What is spare ([`SPARE`]) goes last, and never in a batch with what is not.
//! - Within a priority, entries that may run together leave in the order they came, and all others
//!   too where the queue is told so (`in_order`). A lower priority waits longer, but
//!   not for ever: each level is worth a head start of `priority_age` and no more.

use std::collections::VecDeque;
use std::time::Duration;

use tokio::time::Instant;

/// Groups of entries that join each other which are looked at while the first ones wait for
/// company: with more, each take would compare everyone with everyone.
const GROUPS_MAX: usize = 16;

/// Priority of what nobody waits for: behind everything else, however long it has been there.
pub(super) const SPARE: u32 = u32::MAX;
/// How much later than it did [`SPARE`] came, for its turn: ten years.
const SPARE_DELAY: Duration = Duration::from_secs(10 * 365 * 86_400);

/// One waiting request.
#[derive(Debug)]
pub(super) struct Entry<T> {
    pub(super) rows: usize,
    /// Of all inputs.
    pub(super) elements: usize,
    /// Of all inputs.
    pub(super) bytes: usize,
    /// 1 is the highest; all equal where the model has no priorities; or [`SPARE`].
    pub(super) priority: u32,
    pub(super) queued_at: Instant,
    /// When it is of no use any more.
    pub(super) expires_at: Instant,
    pub(super) item: T,
}

/// When a batch is closed, and what it holds at most.
#[derive(Clone, Debug)]
pub(super) struct Rule<'a> {
    pub(super) rows_max: usize,
    pub(super) elements_max: usize,
    /// Rows at which a batch is closed at once.
    pub(super) preferred: &'a [usize],
    /// How long the first may be held back for others.
    pub(super) wait_max: Duration,
    /// Nobody came for so long: nobody is expected.
    pub(super) lull: Duration,
}

impl<T> Entry<T> {
    fn spare(&self) -> bool {
        self.priority == SPARE
    }
}

#[derive(Debug)]
pub(super) enum Take<T> {
    Batch(Vec<Entry<T>>),
    /// Nothing is due before then, unless more comes.
    Wait(Instant),
    Empty,
}

/// Waiting requests in the order in which they go.
#[derive(Debug)]
pub(super) struct Queue<T> {
    entries: VecDeque<Entry<T>>,
    /// Head start of each level of priority over the next.
    priority_age: Duration,
    /// Nothing overtakes, not even what could run with something before it.
    in_order: bool,
    elements: usize,
    bytes: usize,
}

impl<T> Queue<T> {
    pub(super) fn new(priority_age: Duration) -> Self {
        Self { entries: VecDeque::new(), priority_age, in_order: false, elements: 0, bytes: 0 }
    }

    /// Whether entries leave strictly in their order.
    pub(super) fn in_order(mut self, in_order: bool) -> Self {
        self.in_order = in_order;
        self
    }

    pub(super) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Elements of all that waits.
    pub(super) fn elements(&self) -> usize {
        self.elements
    }

    /// Bytes of all that waits.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Who goes first. One level more weighs as much as having come `priority_age` earlier, so
    /// that the order of two entries never changes while they wait.
    fn turn(&self, queued_at: Instant, priority: u32) -> Instant {
        let head_start = match priority {
            SPARE => SPARE_DELAY,
            priority => self.priority_age.saturating_mul(priority).min(SPARE_DELAY / 2),
        };
        queued_at.checked_add(head_start).unwrap_or(queued_at)
    }

    /// Where an entry of this turn belongs.
    fn place(&self, turn: Instant) -> usize {
        let earlier = |other: &Entry<T>| self.turn(other.queued_at, other.priority) <= turn;
        self.entries.iter().rposition(earlier).map_or(0, |at| at + 1)
    }

    /// Elements that would go before a request that came now.
    pub(super) fn elements_before(&self, now: Instant, priority: u32) -> usize {
        let at = self.place(self.turn(now, priority));
        if at == self.entries.len() {
            return self.elements;
        }
        self.entries.range(..at).map(|entry| entry.elements).sum()
    }

    pub(super) fn push(&mut self, entry: Entry<T>) {
        self.elements = self.elements.saturating_add(entry.elements);
        self.bytes = self.bytes.saturating_add(entry.bytes);
        let at = self.place(self.turn(entry.queued_at, entry.priority));
        self.entries.insert(at, entry);
    }

    /// Removes what has expired, or what nobody waits for.
    pub(super) fn take_dead(&mut self, now: Instant, gone: impl Fn(&T) -> bool) -> Vec<Entry<T>> {
        let dead = |entry: &Entry<T>| entry.expires_at <= now || gone(&entry.item);
        if !self.entries.iter().any(dead) {
            return Vec::new();
        }
        let (dead, living) = self.entries.drain(..).partition::<Vec<_>, _>(dead);
        self.entries = living.into();
        dead.iter().for_each(|entry| self.forget(entry.elements, entry.bytes));
        dead
    }

    /// Removes what is spare, to make room.
    pub(super) fn take_spare(&mut self) -> Vec<Entry<T>> {
        let spare: Vec<_> = self.entries.drain(self.requests()..).collect();
        spare.iter().for_each(|entry| self.forget(entry.elements, entry.bytes));
        spare
    }

    /// How many are not spare; they are in front.
    fn requests(&self) -> usize {
        self.entries.partition_point(|entry| !entry.spare())
    }

    /// Whether something waits, and all of it is spare.
    pub(super) fn only_spare(&self) -> bool {
        self.entries.front().is_some_and(Entry::spare)
    }

    fn forget(&mut self, elements: usize, bytes: usize) {
        self.elements = self.elements.saturating_sub(elements);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    /// The next batch, if one is due: full, of a preferred size, or its window has closed. `joins`
    /// says whether two entries may run together. What is complete does not wait for the window of
    /// others before it that it cannot join.
    pub(super) fn take(
        &mut self,
        rule: &Rule<'_>,
        now: Instant,
        joins: impl Fn(&T, &T) -> bool,
    ) -> Take<T> {
        if self.entries.is_empty() {
            return Take::Empty;
        }
        let due_at = self.due_at(rule);
        if let Some(members) = self.group(0, rule, due_at <= now, &joins) {
            return Take::Batch(self.remove_all(&members));
        }
        let groups = if self.in_order { 1 } else { GROUPS_MAX };
        let mut leaders = vec![0];
        while leaders.len() < groups {
            let of_none = |entry: &Entry<T>| {
                leaders.iter().all(|leader| !fits(&self.entries[*leader], entry, &joins))
            };
            let last = leaders.last().copied().unwrap_or(0);
            let next = self.entries.iter().skip(last + 1).position(of_none);
            let Some(leader) = next.map(|at| last + 1 + at) else { break };
            if let Some(members) = self.group(leader, rule, false, &joins) {
                return Take::Batch(self.remove_all(&members));
            }
            leaders.push(leader);
        }
        Take::Wait(due_at)
    }

    /// The batch that the entry at `leader` is the first of, if it is complete or `due`.
    fn group(
        &self,
        leader: usize,
        rule: &Rule<'_>,
        due: bool,
        joins: &impl Fn(&T, &T) -> bool,
    ) -> Option<Vec<usize>> {
        let head = self.entries.get(leader)?;
        let mut members = vec![leader];
        let (mut rows, mut elements) = (head.rows, head.elements);
        // Full when another one like the head has no room.
        let full = |rows: usize, elements: usize| {
            rows >= rule.rows_max || elements.saturating_add(head.elements) > rule.elements_max
        };
        let mut closed = full(rows, elements);
        // The longest prefix of members whose rows are a preferred size.
        let mut preferred = rule.preferred.contains(&rows).then_some(1);
        for (at, entry) in self.entries.iter().enumerate().skip(leader + 1) {
            if closed {
                break;
            }
            let fits = fits(head, entry, joins);
            if !fits && self.in_order {
                // Nobody can be added any more.
                closed = true;
            }
            if !fits {
                continue;
            }
            let more = (rows + entry.rows, elements.saturating_add(entry.elements));
            if more.0 > rule.rows_max || more.1 > rule.elements_max {
                // Taking a later, smaller one instead would let it overtake.
                closed = true;
                break;
            }
            members.push(at);
            (rows, elements) = more;
            closed = full(rows, elements);
            if rule.preferred.contains(&rows) {
                preferred = Some(members.len());
            }
        }
        match preferred {
            Some(count) if !closed => members.truncate(count),
            _ if closed || due => {}
            _ => return None,
        }
        Some(members)
    }

    /// When the oldest entry's window closes, or nobody has come for a while.
    fn due_at(&self, rule: &Rule<'_>) -> Instant {
        // What is spare hurries nobody.
        let count = if self.only_spare() { self.entries.len() } else { self.requests() };
        let came = self.entries.range(..count).map(|entry| entry.queued_at);
        let (Some(oldest), Some(newest)) = (came.clone().min(), came.max()) else {
            return Instant::now();
        };
        let window = oldest + rule.wait_max;
        newest.checked_add(rule.lull).map_or(window, |lull| lull.min(window))
    }

    /// `members` ascend.
    fn remove_all(&mut self, members: &[usize]) -> Vec<Entry<T>> {
        let mut batch = Vec::with_capacity(members.len());
        let in_front = members.last().is_some_and(|last| last + 1 == members.len());
        if in_front {
            batch.extend(self.entries.drain(..members.len()));
        } else {
            for &at in members.iter().rev() {
                batch.extend(self.entries.remove(at));
            }
            batch.reverse();
        }
        batch.iter().for_each(|entry| self.forget(entry.elements, entry.bytes));
        batch
    }

    /// The first time at which some entry expires.
    pub(super) fn next_expiry(&self) -> Option<Instant> {
        self.entries.iter().map(|entry| entry.expires_at).min()
    }
}

/// Whether two may share a batch.
fn fits<T>(a: &Entry<T>, b: &Entry<T>, joins: &impl Fn(&T, &T) -> bool) -> bool {
    a.spare() == b.spare() && joins(&a.item, &b.item)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const AGE: Duration = Duration::from_millis(10);
    const NEVER: Duration = Duration::from_secs(1 << 40);

    fn rule(rows_max: usize, wait_ms: u64, preferred: &[usize]) -> Rule<'_> {
        let wait_max = Duration::from_millis(wait_ms);
        Rule { rows_max, elements_max: usize::MAX, preferred, wait_max, lull: NEVER }
    }

    fn entry(item: u32, rows: usize, priority: u32, queued_at: Instant) -> Entry<u32> {
        let expires_at = queued_at + Duration::from_secs(60);
        Entry { rows, elements: 10 * rows, bytes: 40 * rows, priority, queued_at, expires_at, item }
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
        let lull = Rule { lull: Duration::from_millis(2), ..rule(8, 5, &[]) };
        let elements = |elements_max| Rule { elements_max, ..rule(8, 5, &[]) };
        type Case<'a> = (&'a str, Rule<'a>, &'a [usize], u64, Option<usize>);
        let cases: &[Case<'_>] = &[
            ("no window: at once", rule(8, 0, &[]), &[1, 1], 0, Some(2)),
            ("window open", rule(8, 5, &[]), &[1, 1], 4, None),
            ("window over", rule(8, 5, &[]), &[1, 1], 5, Some(2)),
            ("nobody comes", lull.clone(), &[1, 1], 2, Some(2)),
            ("somebody may come", lull, &[1, 1], 1, None),
            ("full", rule(2, 5, &[]), &[1, 1, 1], 0, Some(2)),
            ("next does not fit", rule(4, 5, &[]), &[3, 2], 0, Some(1)),
            ("one brings more than a batch", rule(4, 5, &[]), &[9, 1], 0, Some(1)),
            ("elements are full", elements(20), &[1, 1, 1], 0, Some(2)),
            ("no room for one more", elements(25), &[1, 1], 0, Some(2)),
            ("one brings more elements", elements(5), &[1, 1], 0, Some(1)),
            ("preferred", rule(8, 5, &[2, 4]), &[1, 1, 1], 0, Some(2)),
            ("largest preferred", rule(8, 5, &[2, 4]), &[1, 1, 1, 1, 1], 0, Some(4)),
        ];
        for (name, rule, rows, after_ms, want) in cases {
            let mut queue = Queue::new(AGE);
            for (item, rows) in (0..).zip(*rows) {
                queue.push(entry(item, *rows, 1, start));
            }
            let now = start + Duration::from_millis(*after_ms);
            let got = items(queue.take(rule, now, |_, _| true)).map(|batch| batch.len());
            assert_eq!(got, *want, "{name}");
        }
    }

    #[test]
    fn other_shapes_do_not_hold_up_what_is_complete() {
        let start = Instant::now();
        let kind = |item: &u32| item / 100;
        let joins = |a: &u32, b: &u32| kind(a) == kind(b);
        let filled = |items: &[u32]| {
            let mut queue = Queue::new(AGE);
            items.iter().for_each(|item| queue.push(entry(*item, 1, 1, start)));
            queue
        };
        let window = rule(2, 5, &[]);
        let mut queue = filled(&[0, 100, 200, 101]);
        assert_eq!(items(queue.take(&window, start, joins)), Some(vec![100, 101]));
        assert_eq!(items(queue.take(&window, start, joins)), None, "the others have a window");
        let later = start + Duration::from_millis(5);
        assert_eq!(items(queue.take(&window, later, joins)), Some(vec![0]));
        assert_eq!(items(queue.take(&window, later, joins)), Some(vec![200]));

        // Without a window each goes when a worker is free, the oldest first.
        let mut queue = filled(&[0, 100, 1, 101]);
        assert_eq!(items(queue.take(&rule(8, 0, &[]), start, joins)), Some(vec![0, 1]));
        assert_eq!(items(queue.take(&rule(8, 0, &[]), start, joins)), Some(vec![100, 101]));

        let mut queue = filled(&[0, 100, 1, 101]).in_order(true);
        for item in [0, 100, 1] {
            assert_eq!(items(queue.take(&window, start, joins)), Some(vec![item]));
        }
        assert_eq!(items(queue.take(&window, start, joins)), None);
        assert_eq!(items(queue.take(&window, later, joins)), Some(vec![101]));
    }

    #[test]
    fn the_highest_priority_goes_first_and_keeps_order() {
        let now = Instant::now();
        let mut queue = Queue::new(AGE);
        for (item, priority) in [(0, 2), (1, 1), (2, 2), (3, 1)] {
            queue.push(entry(item, 1, priority, now));
        }
        assert_eq!((queue.elements_before(now, 1), queue.elements_before(now, 2)), (20, 40));
        let all = items(queue.take(&rule(9, 0, &[]), now, |_, _| true));
        assert_eq!(all, Some(vec![1, 3, 0, 2]));
        assert_eq!((queue.elements(), queue.bytes()), (0, 0));
    }

    #[test]
    fn a_low_priority_waits_only_so_long_under_a_flood_of_higher_ones() {
        let start = Instant::now();
        for levels in 1..5_u32 {
            let mut queue = Queue::new(AGE);
            queue.push(entry(0, 1, levels, start));
            // One more of the highest comes each millisecond than can run: one runs each.
            let mut left_after = None;
            for ms in 0..200_u32 {
                let now = start + Duration::from_millis(ms.into());
                queue.push(entry(2 * ms + 1, 1, 1, now));
                queue.push(entry(2 * ms + 2, 1, 1, now));
                if items(queue.take(&rule(1, 0, &[]), now, |_, _| true)) == Some(vec![0]) {
                    left_after = Some(Duration::from_millis(ms.into()));
                    break;
                }
            }
            // What came within its levels' head start goes first, at one a millisecond.
            let bound = AGE * (levels - 1) * 2 + Duration::from_millis(2);
            assert!(left_after.is_some_and(|after| after <= bound), "{levels}: {left_after:?}");
        }
    }

    #[test]
    fn what_is_spare_goes_last_and_alone() {
        let start = Instant::now();
        let window = rule(8, 5, &[]);
        let mut queue = Queue::new(AGE);
        for (item, priority) in [(0, SPARE), (1, 3), (2, SPARE), (3, 1)] {
            queue.push(entry(item, 1, priority, start + Duration::from_millis(item.into())));
        }
        assert!(!queue.only_spare());
        // Nothing of it is before a request that comes later, and its window is the requests' own.
        assert_eq!(queue.elements_before(start + Duration::from_millis(9), 3), 20);
        let due = start + Duration::from_millis(5);
        assert!(matches!(queue.take(&window, due, |_, _| true), Take::Wait(at) if at > due));
        let due = start + Duration::from_millis(6);
        assert_eq!(items(queue.take(&window, due, |_, _| true)), Some(vec![3, 1]));
        assert!(queue.only_spare());
        assert_eq!(items(queue.take(&window, due, |_, _| true)), Some(vec![0, 2]));

        for (item, priority) in [(0, SPARE), (1, 0), (2, SPARE)] {
            queue.push(entry(item, 1, priority, start));
        }
        let spare: Vec<u32> = queue.take_spare().into_iter().map(|entry| entry.item).collect();
        assert_eq!(spare, [0, 2]);
        assert_eq!((queue.len(), queue.elements(), queue.bytes()), (1, 10, 40));
    }

    proptest! {
        #[test]
        fn nothing_is_lost_doubled_mixed_or_over(
            entries in prop::collection::vec((1_usize..6, prop_oneof![1_u32..4, Just(SPARE)], 0_u32..3, 0_u64..9), 1..60),
            size_max in 1_usize..9,
            elements_max in 10_usize..90,
            wait_ms in 0_u64..4,
            lull_ms in 0_u64..9,
        ) {
            let start = Instant::now();
            let lull = Duration::from_millis(lull_ms);
            let rule = Rule { elements_max, lull, ..rule(size_max, wait_ms, &[]) };
            let mut queue = Queue::new(AGE);
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
                if let Take::Batch(batch) = queue.take(&rule, now, joins) {
                    let rows: usize = batch.iter().map(|entry| entry.rows).sum();
                    let elements: usize = batch.iter().map(|entry| entry.elements).sum();
                    prop_assert!(batch.len() == 1 || rows <= size_max);
                    prop_assert!(batch.len() == 1 || elements <= elements_max);
                    for pair in batch.windows(2) {
                        prop_assert_eq!(kind[pair[0].item as usize], kind[pair[1].item as usize]);
                        prop_assert_eq!(pair[0].spare(), pair[1].spare());
                    }
                    for entry in batch {
                        prop_assert!(entry.expires_at > now, "expired work is never run");
                        prop_assert!(seen.insert(entry.item));
                    }
                }
            }
            while let Take::Batch(batch) = queue.take(&rule, start + Duration::from_secs(9), |a, b| {
                kind[*a as usize] == kind[*b as usize]
            }) {
                for entry in batch {
                    prop_assert!(seen.insert(entry.item));
                }
            }
            prop_assert_eq!(seen.len(), entries.len());
            prop_assert_eq!((queue.len(), queue.elements(), queue.bytes()), (0, 0, 0));
        }
    }
}
