//! Accepts connections on the data plane's ports and hands them to [`connection`].
//!
//! Invariants:
//! - Running out of descriptors or connections delays accepting and ends by itself.
//! - Draining: answers tell the client to close, then new connections are no longer accepted, then
//!   what is open finishes what it has.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::Api;
use super::accept::Refusals;
use super::connection::{Front, Graceful, connection};
use super::io::IoThreads;
use crate::panics;

/// Listeners of the data plane, and the connections that they accepted.
pub struct Listeners {
    front: Arc<Front>,
    graceful: Arc<Graceful>,
    stop: CancellationToken,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    io: Arc<IoThreads>,
}

impl Listeners {
    /// Starts the threads that will serve connections.
    ///
    /// # Errors
    /// When the operating system gives no thread.
    pub fn new(api: Arc<Api>) -> std::io::Result<Self> {
        let io = Arc::new(IoThreads::start(api.settings.io_threads)?);
        Ok(Self {
            front: Arc::new(Front::new(api)),
            graceful: Arc::new(Graceful::new()),
            stop: CancellationToken::new(),
            tasks: Vec::new(),
            io,
        })
    }

    /// Serves what `listener` accepts, until [`Listeners::drain`].
    pub fn serve(&mut self, listener: TcpListener) {
        let front = Arc::clone(&self.front);
        let (graceful, io) = (Arc::clone(&self.graceful), Arc::clone(&self.io));
        let task = accept_loop(front, listener, graceful, io, self.stop.clone());
        self.tasks.push(tokio::spawn(panics::fatal_async("accept loop", task)));
    }

    /// Stops accepting and lets every connection finish its requests; gives the number of
    /// connections that were still open after `grace`.
    pub async fn drain(self, grace: Duration) -> usize {
        self.stop.cancel();
        for task in self.tasks {
            if let Err(error) = task.await {
                tracing::error!(%error, "accept loop failed");
            }
        }
        // Only the accept loops shared it, and they have ended.
        let Some(graceful) = Arc::into_inner(self.graceful) else { return 0 };
        let open = graceful.count();
        match timeout(grace, graceful.shutdown()).await {
            Ok(()) => 0,
            Err(_) => open,
        }
    }
}

async fn accept_loop(
    front: Arc<Front>,
    listener: TcpListener,
    graceful: Arc<Graceful>,
    io: Arc<IoThreads>,
    stop: CancellationToken,
) {
    let mut refusals = Refusals::new();
    loop {
        let slot = tokio::select! {
            slot = Arc::clone(&front.connections).acquire_owned() => slot,
            () = stop.cancelled() => return,
        };
        let Ok(slot) = slot else { return };
        let accepted = tokio::select! {
            biased;
            accepted = listener.accept() => accepted,
            () = stop.cancelled() => return,
        };
        match accepted {
            Ok((stream, peer)) => {
                refusals.accepted();
                // Here, where connections come one after the other: the first ones keep their places.
                let Some(place) = front.admit(peer) else { continue };
                let counted = front.api.gateway.observer().connection();
                let (front, watcher) = (Arc::clone(&front), graceful.watcher());
                // Registered anew with the event queue of the thread that serves it.
                let stream = stream.into_std();
                io.spawn(async move {
                    match stream.and_then(TcpStream::from_std) {
                        Ok(stream) => connection(front, stream, peer, watcher).await,
                        Err(error) => tracing::warn!(%peer, %error, "connection lost on hand-over"),
                    }
                    drop((slot, place, counted));
                });
            }
            Err(error) => {
                front.api.gateway.observer().accept_failed();
                tokio::select! {
                    () = sleep(refusals.pause(&error)) => {}
                    () = stop.cancelled() => return,
                }
            }
        }
    }
}
