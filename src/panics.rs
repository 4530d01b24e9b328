//! What a panic ends: the request it belongs to, or the whole process; never something in between.
//!
//! Invariants:
//! - The panic hook has told the log where it was before anything here returns.
//! - Work that the gateway cannot do without (accepting, batching, I/O) takes the process along:
//!   one that is gone is started again, one that lives on without it only looks well.

use std::future::{Future, poll_fn};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::task::Poll;

/// `None` when `work` panicked.
pub fn caught<T>(work: impl FnOnce() -> T) -> Option<T> {
    // What was thrown could panic again when it is dropped.
    catch_unwind(AssertUnwindSafe(work)).map_err(std::mem::forget).ok()
}

/// `None` when `future` panicked.
pub async fn caught_async<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = pin!(future);
    poll_fn(|cx| match caught(|| future.as_mut().poll(cx)) {
        Some(poll) => poll.map(Some),
        None => Poll::Ready(None),
    })
    .await
}

/// Ends the process when `work` panics. `name` is for the log.
pub fn fatal<T>(name: &str, work: impl FnOnce() -> T) -> T {
    caught(work).unwrap_or_else(|| end(name))
}

/// Ends the process when `future` panics. `name` is for the log.
pub async fn fatal_async<T>(name: &str, future: impl Future<Output = T>) -> T {
    caught_async(future).await.unwrap_or_else(|| end(name))
}

/// Aborts: an orderly exit would wait for threads that wait for the one that is gone.
fn end(name: &str) -> ! {
    tracing::error!(part = name, "a part that nothing works without has panicked, aborting");
    std::process::abort()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::*;

    /// Set in the process that is to panic.
    const CHILD: &str = "TIDEGATE_TEST_PANICS";

    /// Panics again when it is dropped.
    struct Bomb;

    impl Drop for Bomb {
        fn drop(&mut self) {
            std::hint::black_box(None::<u8>).unwrap();
        }
    }

    #[tokio::test]
    async fn a_caught_panic_is_none_whatever_was_thrown() {
        assert_eq!(caught(|| 1), Some(1));
        assert_eq!(caught(|| std::panic::panic_any(Bomb)), None::<()>);
        assert_eq!(caught_async(async { 1 }).await, Some(1));
        assert_eq!(caught_async(async { std::panic::panic_any(Bomb) }).await, None::<()>);
    }

    #[test]
    fn a_fatal_panic_ends_the_process() {
        let runtime = || tokio::runtime::Builder::new_multi_thread().build().unwrap();
        match std::env::var(CHILD).as_deref() {
            Ok("thread") => {
                let work = || std::hint::black_box(None::<u8>).unwrap();
                let ended = std::thread::spawn(move || fatal("thread", work)).join();
                assert!(ended.is_ok());
                return;
            }
            Ok("task") => {
                let work = async { std::hint::black_box(None::<u8>).unwrap() };
                let task = async { tokio::spawn(fatal_async("task", work)).await };
                assert!(runtime().block_on(task).is_ok());
                return;
            }
            _ => {}
        }
        let this = "panics::tests::a_fatal_panic_ends_the_process";
        for kind in ["thread", "task"] {
            let mut child = Command::new(std::env::current_exe().unwrap());
            let status = child.args(["--exact", this]).env(CHILD, kind).output().unwrap().status;
            assert_eq!(status.signal(), Some(libc::SIGABRT), "{kind}: {status}");
        }
        assert_eq!(fatal("fine", || 1), 1);
        assert_eq!(runtime().block_on(fatal_async("fine", async { 2 })), 2);
    }
}
