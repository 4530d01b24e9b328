//! The threads that serve connections: one current-thread runtime each.
//!
//! A connection lives on one thread from its first byte to its last, so that what it touches stays
//! in that core's caches and its tasks are never woken from another core. The threads take no part
//! in running models but for the cheapest, see [`crate::batch`].
//!
//! Decided by measurement: `docs/decisions/0006-io-threads.md`.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::sync_channel;

use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

use crate::panics;

/// Every I/O thread of the process. They end when this is dropped.
pub(super) struct IoThreads {
    threads: Vec<IoThread>,
    stop: CancellationToken,
}

struct IoThread {
    runtime: Handle,
    /// Connections that it serves now.
    connections: Arc<AtomicUsize>,
}

/// Counts a connection on its thread for as long as it lives.
struct Placed(Arc<AtomicUsize>);

impl Drop for Placed {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl IoThreads {
    /// Starts `count` threads, at least one.
    ///
    /// # Errors
    /// When the operating system gives no thread or no event queue.
    pub(super) fn start(count: usize) -> std::io::Result<Self> {
        let mut started = Self { threads: Vec::new(), stop: CancellationToken::new() };
        for at in 0..count.max(1) {
            let (built, handle) = sync_channel(1);
            let stop = started.stop.clone();
            let thread = std::thread::Builder::new().name(format!("io-{at}"));
            // Built on its own thread: a runtime must not be dropped on the caller's, which is
            // another runtime's, and that is where it ends when there is no thread for it.
            thread.spawn(move || {
                let runtime = match Builder::new_current_thread().enable_all().build() {
                    Ok(runtime) => runtime,
                    Err(error) => return drop(built.send(Err(error))),
                };
                drop(built.send(Ok(runtime.handle().clone())));
                panics::fatal("I/O thread", || runtime.block_on(stop.cancelled()));
                // What is still open was given its grace; nobody waits for it any more.
                runtime.shutdown_background();
            })?;
            let runtime = handle.recv().map_err(std::io::Error::other)??;
            started.threads.push(IoThread { runtime, connections: Arc::default() });
        }
        Ok(started)
    }

    /// Runs `connection` on the thread that serves the fewest.
    pub(super) fn spawn(&self, connection: impl Future<Output = ()> + Send + 'static) {
        let least = |thread: &&IoThread| thread.connections.load(Ordering::Relaxed);
        let Some(thread) = self.threads.iter().min_by_key(least) else { return };
        thread.connections.fetch_add(1, Ordering::Relaxed);
        let placed = Placed(Arc::clone(&thread.connections));
        thread.runtime.spawn(async move {
            connection.await;
            drop(placed);
        });
    }
}

impl Drop for IoThreads {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::thread;

    use super::*;

    #[tokio::test]
    async fn connections_are_spread_and_places_given_back() {
        let threads = IoThreads::start(3).unwrap();
        let (sender, mut names) = tokio::sync::mpsc::channel(12);
        let end = CancellationToken::new();
        for _ in 0..12 {
            let (sender, end) = (sender.clone(), end.clone());
            threads.spawn(async move {
                let name = thread::current().name().unwrap_or_default().to_owned();
                sender.send(name).await.unwrap();
                end.cancelled().await;
            });
        }
        let mut served: HashMap<String, usize> = HashMap::new();
        for _ in 0..12 {
            *served.entry(names.recv().await.unwrap()).or_default() += 1;
        }
        assert_eq!(served.len(), 3, "{served:?}");
        assert!(served.values().all(|count| *count == 4), "{served:?}");
        end.cancel();
        let open = || {
            threads
                .threads
                .iter()
                .map(|thread| thread.connections.load(Ordering::Relaxed))
                .sum::<usize>()
        };
        while open() > 0 {
            tokio::task::yield_now().await;
        }
    }
}
