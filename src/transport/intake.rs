//! What requests bring, bytes and work, and how much of both there may be at once.
//!
//! Invariants:
//! - Every byte that is held for a request is counted as it arrives, decoded ones too, and counts
//!   until the last part of the request that uses it has gone.
//! - Nothing waits for bytes: where they do not fit, the request is refused at once.
//! - What takes long on the processor never runs on a thread that serves connections.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout_at};

use super::Settings;
use crate::domain::{ErrorKind, Failure};

mod memory;

pub use memory::limit as memory_limit;

/// Bodies up to this size are decoded where they arrive, and leave the counting to their request.
pub const INLINE_MAX_BYTES: usize = 64 << 10;
/// Bytes of this share are kept for requests that hold no more than [`INLINE_MAX_BYTES`].
const SMALL_SHARE: usize = 8;
/// Most bytes by default, and fewest.
const DEFAULT_MAX_BYTES: usize = 1 << 30;
const DEFAULT_MIN_BYTES: usize = 64 << 20;
/// When to try again after a refusal.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Counts bytes before they are there; refuses where they do not fit.
pub type Grow<'a> = &'a dyn Fn(usize) -> Result<(), Failure>;

/// Counts bytes and lends threads.
pub struct Intake {
    budget: Arc<ByteBudget>,
    /// As many large bodies as processors are decoded at once.
    threads: Arc<Semaphore>,
    waiting: AtomicUsize,
    waiting_max: usize,
}

impl Intake {
    pub fn new(settings: &Settings) -> Self {
        let max = match settings.in_flight_bytes_max {
            0 => default_max(memory::limit()),
            max => max,
        };
        let threads = std::thread::available_parallelism().map_or(1, Into::into);
        Self {
            budget: Arc::new(ByteBudget::new(max)),
            threads: Arc::new(Semaphore::new(threads)),
            waiting: AtomicUsize::new(0),
            waiting_max: settings.decode_queue_max,
        }
    }

    pub fn budget(&self) -> &Arc<ByteBudget> {
        &self.budget
    }

    /// The account of a request that holds nothing yet.
    pub fn open(&self) -> Arc<Held> {
        Arc::new(Held { budget: Arc::clone(&self.budget), bytes: AtomicUsize::new(0) })
    }

    /// Runs `job`, which may take long, on another thread.
    ///
    /// # Errors
    /// `Overloaded` when too many wait already, `DeadlineExceeded` when no thread was free by
    /// `deadline`, and the job's own.
    pub async fn run<T: Send + 'static>(
        &self,
        deadline: Instant,
        job: impl FnOnce() -> Result<T, Failure> + Send + 'static,
    ) -> Result<T, Failure> {
        let permit = match Arc::clone(&self.threads).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => self.wait(deadline).await?,
        };
        let task = tokio::task::spawn_blocking(move || {
            let done = job();
            drop(permit);
            done
        });
        task.await.unwrap_or_else(|error| {
            tracing::error!(%error, "work on a body did not end");
            Err(Failure::new(ErrorKind::Internal, "the body could not be processed"))
        })
    }

    async fn wait(&self, deadline: Instant) -> Result<OwnedSemaphorePermit, Failure> {
        let Some(_waiting) = Waiting::enter(&self.waiting, self.waiting_max) else {
            let message = format!(
                "{} large bodies wait to be decoded or encoded already, no more fit",
                self.waiting_max
            );
            return Err(Failure::new(ErrorKind::Overloaded, message).retry_after(RETRY_AFTER));
        };
        let late = || {
            let message = "deadline passed before the body could be decoded";
            Failure::new(ErrorKind::DeadlineExceeded, message)
        };
        match timeout_at(deadline, Arc::clone(&self.threads).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            // The semaphore is never closed.
            Ok(Err(_)) | Err(_) => Err(late()),
        }
    }
}

/// One that waits for a thread.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    fn enter(count: &'a AtomicUsize, max: usize) -> Option<Self> {
        let waiting = Self(count);
        // Leaves again when dropped, also when there is no room.
        (count.fetch_add(1, Ordering::Relaxed) < max).then_some(waiting)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A quarter of the memory that this process may use, within bounds.
fn default_max(memory: Option<u64>) -> usize {
    let quarter =
        memory.map_or(usize::MAX, |bytes| usize::try_from(bytes / 4).unwrap_or(usize::MAX));
    quarter.clamp(DEFAULT_MIN_BYTES, DEFAULT_MAX_BYTES)
}

/// Bytes that all requests together hold.
#[derive(Debug)]
pub struct ByteBudget {
    held: AtomicUsize,
    max: usize,
    refused: AtomicU64,
}

impl ByteBudget {
    pub fn new(max: usize) -> Self {
        Self { held: AtomicUsize::new(0), max, refused: AtomicU64::new(0) }
    }

    pub fn max(&self) -> usize {
        self.max
    }

    /// Bytes held now.
    pub fn held(&self) -> usize {
        self.held.load(Ordering::Relaxed)
    }

    /// Requests refused for bytes.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// Most bytes that a request with `own` bytes may fill up to.
    fn limit(&self, own: usize) -> usize {
        if own <= INLINE_MAX_BYTES { self.max } else { self.max - self.max / SMALL_SHARE }
    }

    /// Takes `more` for a request that will then hold `own`.
    fn take(&self, more: usize, own: usize) -> bool {
        let before = self.held.fetch_add(more, Ordering::Relaxed);
        let fits = before.saturating_add(more) <= self.limit(own);
        if !fits {
            self.held.fetch_sub(more, Ordering::Relaxed);
        }
        fits
    }

    fn refusal(&self, own: usize) -> Failure {
        let limit = self.limit(own);
        if own > limit {
            // It never will fit: no use in trying again.
            let message = format!(
                "request takes {own} bytes once decoded, all requests together may hold {limit}"
            );
            return Failure::new(ErrorKind::TooLarge, message);
        }
        self.refused.fetch_add(1, Ordering::Relaxed);
        let message = "the requests in progress hold as many bytes as there is room for";
        Failure::new(ErrorKind::Overloaded, message).retry_after(RETRY_AFTER)
    }
}

/// Bytes that one request holds; given back when the last user of it goes.
#[derive(Debug)]
pub struct Held {
    budget: Arc<ByteBudget>,
    bytes: AtomicUsize,
}

impl Held {
    /// Counts `more` bytes, before they are there.
    ///
    /// # Errors
    /// `Overloaded` when they do not fit now, `TooLarge` when they never would.
    pub fn grow(&self, more: usize) -> Result<(), Failure> {
        let own = self.bytes.load(Ordering::Relaxed).saturating_add(more);
        if !self.budget.take(more, own) {
            return Err(self.budget.refusal(own));
        }
        self.bytes.fetch_add(more, Ordering::Relaxed);
        Ok(())
    }

    /// Says early that `more` bytes, announced but not there yet, would not fit.
    ///
    /// # Errors
    /// As [`Held::grow`].
    pub fn expect(&self, more: usize) -> Result<(), Failure> {
        let own = self.bytes.load(Ordering::Relaxed).saturating_add(more);
        match self.budget.held().saturating_add(more) <= self.budget.limit(own) {
            true => Ok(()),
            false => Err(self.budget.refusal(own)),
        }
    }

    pub fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Ties large `bytes` to this account: a queue may hold them longer than the request's handler
    /// lives, when its caller goes away.
    pub fn keep(self: &Arc<Self>, bytes: Bytes) -> Bytes {
        struct Owned {
            bytes: Bytes,
            _held: Arc<Held>,
        }
        impl AsRef<[u8]> for Owned {
            fn as_ref(&self) -> &[u8] {
                &self.bytes
            }
        }
        if bytes.len() <= INLINE_MAX_BYTES {
            return bytes;
        }
        Bytes::from_owner(Owned { bytes, _held: Arc::clone(self) })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(*self.bytes.get_mut(), Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn intake(max: usize, waiting: usize) -> Intake {
        let settings =
            Settings { in_flight_bytes_max: max, decode_queue_max: waiting, ..Settings::default() };
        Intake::new(&settings)
    }

    #[test]
    fn bytes_are_given_back_by_the_last_user() {
        let intake = intake(8 << 20, 1);
        let held = intake.open();
        held.grow(1 << 20).unwrap();
        let body = held.keep(vec![7; 1 << 20].into());
        let tensor = body.slice(100..200);
        drop((held, body));
        assert_eq!(intake.budget().held(), 1 << 20, "a queue still has a part of the body");
        assert_eq!(tensor[..2], [7, 7]);
        drop(tensor);
        assert_eq!(intake.budget().held(), 0);
    }

    #[test]
    fn what_does_not_fit_is_refused_and_small_ones_get_through() {
        let intake = intake(8 << 20, 1);
        let large = intake.open();
        assert_eq!(large.grow(9 << 20).unwrap_err().kind, ErrorKind::TooLarge);
        large.grow(7 << 20).unwrap();
        let other = intake.open();
        let failure = other.grow(100 << 10).unwrap_err();
        assert_eq!(failure.kind, ErrorKind::Overloaded);
        assert!(failure.retry_after.is_some());
        assert_eq!(other.expect(100 << 10).unwrap_err().kind, ErrorKind::Overloaded);
        // The last eighth is for small requests.
        intake.open().grow(10 << 10).unwrap();
        assert_eq!(intake.budget().refused(), 2);
        drop((large, other));
        assert_eq!(intake.budget().held(), 0);
    }

    #[tokio::test]
    async fn work_waits_in_a_short_queue() {
        let intake = intake(0, 1);
        let soon = Instant::now() + Duration::from_millis(30);
        let count = u32::try_from(intake.threads.available_permits()).unwrap();
        let all = Arc::clone(&intake.threads).acquire_many_owned(count).await.unwrap();
        let late = intake.run(soon, || Ok(()));
        let refused = async {
            tokio::task::yield_now().await;
            intake.run(soon, || Ok(())).await
        };
        let (late, refused) = tokio::join!(late, refused);
        assert_eq!(late.unwrap_err().kind, ErrorKind::DeadlineExceeded);
        assert_eq!(refused.unwrap_err().kind, ErrorKind::Overloaded);
        drop(all);
        assert_eq!(intake.run(soon, || Ok(5)).await.unwrap(), 5);
        let failed: Result<(), _> = intake.run(soon, || Err(Failure::invalid("no"))).await;
        assert_eq!(failed.unwrap_err().kind, ErrorKind::InvalidInput);
    }

    #[test]
    fn the_default_is_a_quarter_of_the_memory_within_bounds() {
        assert_eq!(default_max(None), 1 << 30);
        assert_eq!(default_max(Some(64 << 30)), 1 << 30);
        assert_eq!(default_max(Some(512 << 20)), 128 << 20);
        assert_eq!(default_max(Some(1 << 20)), 64 << 20);
    }
}
