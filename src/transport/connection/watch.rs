//! What a connection is doing, written by whoever does it and read by the one that times it.
//!
//! Invariants:
//! - Whoever serves a request only stores here; no timer is touched on the way of a request.
//! - [`Watch::due`] never names a moment later than the first limit that can be broken, as far as
//!   can be known; while requests are open it is asked again every [`Limits::tick`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed};
use std::task::Waker;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::Settings;
use crate::observe::CloseReason;

/// Time between looks at a connection that has requests open.
const TICK_MAX: Duration = Duration::from_secs(5);
const TICK_MIN: Duration = Duration::from_millis(20);
/// Time for a peer to close after it was asked to.
const CLOSE_GRACE: Duration = Duration::from_secs(5);
/// Time for a head, and for being idle, while connections are scarce.
const CROWDED_MAX: Duration = Duration::from_secs(5);

/// The times that a connection is held to.
#[derive(Clone, Debug)]
pub(super) struct Limits {
    header: Duration,
    idle: Duration,
    write: Duration,
    /// How late a limit of an open request may be noticed.
    pub(super) tick: Duration,
}

impl Limits {
    pub(super) fn new(settings: &Settings) -> Self {
        let shortest = settings.write_timeout.min(settings.body_grace);
        Self {
            header: settings.header_timeout,
            idle: settings.idle_timeout,
            write: settings.write_timeout,
            tick: (shortest / 4).clamp(TICK_MIN, TICK_MAX),
        }
    }

    /// The same while connections are scarce: who does nothing makes room.
    pub(super) fn crowded(&self) -> Self {
        Self {
            header: self.header.min(CROWDED_MAX),
            idle: self.idle.min(CROWDED_MAX),
            ..self.clone()
        }
    }

    /// Time between looks at a connection, whatever it does: the limits may have changed.
    pub(super) fn look(&self) -> Duration {
        CROWDED_MAX
    }

    /// Time for a request's head, from the first moment of the connection on.
    pub(super) fn header(&self) -> Duration {
        self.header
    }
}

/// State of one connection.
pub(super) struct Watch {
    born: Instant,
    age_max: Option<Duration>,
    /// Requests whose answer has not left for good.
    open: AtomicU32,
    /// When `open` became zero or the socket took what had waited, in microseconds after `born`.
    idle_since: AtomicU64,
    /// Part of a request's head has come, the rest has not.
    head_begun: AtomicBool,
    /// What came can be read in two ways.
    two_readings: AtomicBool,
    /// A request was answered before its body was read.
    unread: AtomicBool,
    /// The socket takes no more.
    blocked: AtomicBool,
    /// Times that the socket took something.
    writes: AtomicU64,
    /// Pieces of answers that the client has not taken, each with its last progress.
    pieces: Mutex<Slots<Instant>>,
    /// Requests whose body is awaited.
    bodies: Mutex<Slots<Awaited>>,
}

struct Awaited {
    deadline: Instant,
    waker: Waker,
    expired: bool,
}

/// What the timing side remembers between two looks.
#[derive(Default)]
pub(super) struct Seen {
    head: Option<Instant>,
    blocked: Option<(u64, Instant)>,
    /// The peer was asked to close, then.
    pub(super) closing: Option<Instant>,
}

impl Watch {
    pub(super) fn new(born: Instant, http1: bool, age_max: Option<Duration>) -> Arc<Self> {
        Arc::new(Self {
            born,
            age_max,
            open: AtomicU32::new(0),
            idle_since: AtomicU64::new(0),
            head_begun: AtomicBool::new(http1),
            two_readings: AtomicBool::new(false),
            unread: AtomicBool::new(false),
            blocked: AtomicBool::new(false),
            writes: AtomicU64::new(0),
            pieces: Mutex::default(),
            bodies: Mutex::default(),
        })
    }

    /// Bytes came that can only be the start of an HTTP/1 request when none is open.
    pub(super) fn head_bytes(&self) {
        if self.open.load(Relaxed) == 0 {
            self.head_begun.store(true, Relaxed);
        }
    }

    /// Nothing that came may be answered with anything but an error.
    pub(super) fn has_two_readings(&self) {
        self.two_readings.store(true, Relaxed);
    }

    pub(super) fn leaves_unread(&self) {
        self.unread.store(true, Relaxed);
    }

    pub(super) fn has_unread(&self) -> bool {
        self.unread.load(Relaxed)
    }

    pub(super) fn is_unequivocal(&self) -> bool {
        !self.two_readings.load(Relaxed)
    }

    pub(super) fn wrote(&self) {
        if self.blocked.load(Relaxed) {
            self.blocked.store(false, Relaxed);
            self.writes.fetch_add(1, Relaxed);
            // HTTP/1 takes an answer's last bytes from its request before the client has them.
            self.rests();
        }
    }

    pub(super) fn blocked(&self) {
        self.blocked.store(true, Relaxed);
    }

    pub(super) fn is_open(&self) -> bool {
        self.open.load(Relaxed) > 0
    }

    fn enter(&self) {
        self.open.fetch_add(1, Relaxed);
    }

    fn leave(&self) {
        if self.open.fetch_sub(1, Relaxed) == 1 {
            self.rests();
        }
    }

    fn rests(&self) {
        let micros = u64::try_from(self.born.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.idle_since.store(micros, Relaxed);
    }

    /// When the next limit is broken unless something happens, and which.
    pub(super) fn due(&self, limits: &Limits, seen: &mut Seen) -> (Instant, CloseReason) {
        let open = self.is_open();
        let blocked = self.blocked.load(Relaxed);
        let idle = self.born + Duration::from_micros(self.idle_since.load(Relaxed));
        let mut due = match seen.closing {
            // Asked to close and without work: not for the whole idle time again.
            Some(since) if !open && !blocked => (since.max(idle) + CLOSE_GRACE, CloseReason::Idle),
            _ if open || blocked => {
                (idle + Duration::from_secs(u64::from(u32::MAX)), CloseReason::Idle)
            }
            _ => (idle + limits.idle, CloseReason::Idle),
        };
        let mut earlier = |at: Instant, reason| {
            if at < due.0 {
                due = (at, reason);
            }
        };
        if self.head_begun.load(Relaxed) {
            let since = *seen.head.get_or_insert_with(Instant::now);
            earlier(since + limits.header, CloseReason::HeaderTimeout);
        } else {
            seen.head = None;
        }
        if blocked {
            let writes = self.writes.load(Relaxed);
            let since = match seen.blocked {
                Some((at, since)) if at == writes => since,
                _ => Instant::now(),
            };
            seen.blocked = Some((writes, since));
            earlier(since + limits.write, CloseReason::WriteStall);
        } else {
            seen.blocked = None;
        }
        if open && let Some(progress) = self.pieces.lock().iter().min() {
            earlier(*progress + limits.write, CloseReason::WriteStall);
        }
        if let Some(age) = self.age_max
            && seen.closing.is_none()
        {
            earlier(self.born + age, CloseReason::Age);
        }
        due
    }

    /// Wakes the requests whose body is overdue.
    pub(super) fn expire_bodies(&self, now: Instant) {
        for awaited in self.bodies.lock().iter_mut() {
            if !awaited.expired && awaited.deadline <= now {
                awaited.expired = true;
                awaited.waker.wake_by_ref();
            }
        }
    }

    /// A body waits for its client from now on, until `deadline` at most.
    pub(super) fn await_body(&self, deadline: Instant, waker: &Waker) -> usize {
        self.bodies.lock().put(Awaited { deadline, waker: waker.clone(), expired: false })
    }

    /// Whether the body at `slot` has waited too long; it is woken when it has.
    pub(super) fn body_expired(&self, slot: usize, waker: &Waker) -> bool {
        let mut bodies = self.bodies.lock();
        let Some(awaited) = bodies.get(slot) else { return false };
        awaited.waker.clone_from(waker);
        awaited.expired
    }

    pub(super) fn body_came(&self, slot: usize) {
        self.bodies.lock().take(slot);
    }
}

/// A request that is open until this goes.
pub(super) struct Open(Arc<Watch>);

impl Open {
    /// A request's head is complete.
    pub(super) fn new(watch: &Arc<Watch>) -> Self {
        watch.enter();
        watch.head_begun.store(false, Relaxed);
        Self(Arc::clone(watch))
    }

    pub(super) fn watch(&self) -> &Arc<Watch> {
        &self.0
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// A piece of an answer that the client has yet to take.
pub(super) struct Piece {
    watch: Arc<Watch>,
    slot: usize,
}

impl Piece {
    pub(super) fn new(watch: &Arc<Watch>) -> Self {
        watch.enter();
        let slot = watch.pieces.lock().put(Instant::now());
        Self { watch: Arc::clone(watch), slot }
    }

    pub(super) fn progressed(&self) {
        if let Some(progress) = self.watch.pieces.lock().get(self.slot) {
            *progress = Instant::now();
        }
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        self.watch.pieces.lock().take(self.slot);
        self.watch.leave();
    }
}

/// Things at places that are used again.
struct Slots<T>(Vec<Option<T>>);

impl<T> Default for Slots<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Slots<T> {
    fn put(&mut self, value: T) -> usize {
        match self.0.iter().position(Option::is_none) {
            Some(slot) => {
                self.0[slot] = Some(value);
                slot
            }
            None => {
                self.0.push(Some(value));
                self.0.len() - 1
            }
        }
    }

    fn get(&mut self, slot: usize) -> Option<&mut T> {
        self.0.get_mut(slot)?.as_mut()
    }

    fn take(&mut self, slot: usize) {
        if let Some(place) = self.0.get_mut(slot) {
            *place = None;
        }
    }

    fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter().flatten()
    }

    fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits::new(&Settings {
            header_timeout: Duration::from_secs(10),
            idle_timeout: Duration::from_secs(100),
            write_timeout: Duration::from_secs(20),
            ..Settings::default()
        })
    }

    fn after(watch: &Watch, seen: &mut Seen) -> (u64, CloseReason) {
        let (at, reason) = watch.due(&limits(), seen);
        (at.saturating_duration_since(Instant::now()).as_secs(), reason)
    }

    #[tokio::test(start_paused = true)]
    async fn each_state_has_its_own_time() {
        let watch = Watch::new(Instant::now(), true, None);
        let mut seen = Seen::default();
        assert_eq!(after(&watch, &mut seen), (10, CloseReason::HeaderTimeout));
        // A byte now and then does not buy more time.
        tokio::time::advance(Duration::from_secs(4)).await;
        watch.head_bytes();
        assert_eq!(after(&watch, &mut seen), (6, CloseReason::HeaderTimeout));
        let open = Open::new(&watch);
        watch.head_bytes();
        assert!(after(&watch, &mut seen).0 > 1_000_000, "a request at work is not idle");
        drop(open);
        assert_eq!(after(&watch, &mut seen), (100, CloseReason::Idle));
        watch.blocked();
        assert_eq!(after(&watch, &mut seen), (20, CloseReason::WriteStall));
        tokio::time::advance(Duration::from_secs(15)).await;
        assert_eq!(after(&watch, &mut seen), (5, CloseReason::WriteStall));
        watch.wrote();
        watch.blocked();
        assert_eq!(after(&watch, &mut seen), (20, CloseReason::WriteStall));
        tokio::time::advance(Duration::from_secs(10)).await;
        watch.wrote();
        assert_eq!(after(&watch, &mut seen), (100, CloseReason::Idle), "idle when all is taken");
    }

    #[tokio::test(start_paused = true)]
    async fn one_piece_that_stands_still_is_noticed_among_others_that_move() {
        let watch = Watch::new(Instant::now(), false, None);
        let mut seen = Seen::default();
        let (stuck, moving) = (Piece::new(&watch), Piece::new(&watch));
        tokio::time::advance(Duration::from_secs(15)).await;
        moving.progressed();
        assert_eq!(after(&watch, &mut seen), (5, CloseReason::WriteStall));
        drop(stuck);
        assert_eq!(after(&watch, &mut seen), (20, CloseReason::WriteStall));
        drop(moving);
        assert_eq!(after(&watch, &mut seen), (100, CloseReason::Idle));
        assert_eq!(watch.pieces.lock().iter().count(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn an_overdue_body_is_woken_once() {
        let watch = Watch::new(Instant::now(), false, None);
        let waker = futures_waker();
        let slot = watch.await_body(Instant::now() + Duration::from_secs(1), &waker);
        watch.expire_bodies(Instant::now());
        assert!(!watch.body_expired(slot, &waker));
        tokio::time::advance(Duration::from_secs(2)).await;
        watch.expire_bodies(Instant::now());
        assert!(watch.body_expired(slot, &waker));
        watch.body_came(slot);
        assert!(!watch.body_expired(slot, &waker));
    }

    fn futures_waker() -> Waker {
        Waker::noop().clone()
    }
}
