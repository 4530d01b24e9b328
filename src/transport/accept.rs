//! Accepting when the operating system has nothing to give: how many connections it has room for,
//! and what to do when it refuses one all the same.
//!
//! Invariants:
//! - Connections leave descriptors for everything else: models, logs, the metrics listener.
//! - A refusal costs a pause, longer while refusals last, and at most one log line in
//!   [`SAY_EVERY`]; the first connection that is accepted ends it.

use std::io;
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::time::Instant;

/// Pause after the first refusal, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(320);
const SAY_EVERY: Duration = Duration::from_secs(10);
/// Descriptors that connections leave to the rest of the process.
const RESERVED: usize = 128;
/// Served even where the process may open next to nothing.
const CONNECTIONS_MIN: usize = 16;

/// Raises the limit of descriptors as far as the process may.
pub fn raise_descriptors() {
    let limit = getrlimit(Resource::Nofile);
    if limit.current == limit.maximum {
        return;
    }
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of descriptors");
    }
}

/// Connections to accept at once: `wanted`, or as many as there are descriptors for.
pub(super) fn connections_max(wanted: usize) -> usize {
    let limit = getrlimit(Resource::Nofile).current;
    let limit = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    let room = limit.saturating_sub(RESERVED).max(CONNECTIONS_MIN);
    if room < wanted {
        tracing::warn!(
            wanted,
            connections_max = room,
            descriptors = limit,
            "fewer connections than configured, there are not more descriptors (ulimit -n)"
        );
    }
    wanted.min(room)
}

/// Refusals of one listener.
#[derive(Debug)]
pub(super) struct Refusals {
    pause: Duration,
    said: Option<Instant>,
    unsaid: u64,
}

impl Refusals {
    pub(super) fn new() -> Self {
        Self { pause: PAUSE_MIN, said: None, unsaid: 0 }
    }

    /// How long to wait before trying again.
    pub(super) fn pause(&mut self, error: &io::Error) -> Duration {
        if self.said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
            let before = std::mem::take(&mut self.unsaid);
            tracing::warn!(%error, before, "cannot accept a connection, trying again");
            self.said = Some(Instant::now());
        } else {
            self.unsaid += 1;
        }
        if !is_shortage(error) {
            // That one connection is gone; the next may be there already.
            return Duration::ZERO;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(PAUSE_MAX);
        pause
    }

    pub(super) fn accepted(&mut self) {
        self.pause = PAUSE_MIN;
    }
}

/// The machine or the process has too little of something, and will for a while.
fn is_shortage(error: &io::Error) -> bool {
    let shortages = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
    Errno::from_io_error(error).is_none_or(|error| shortages.contains(&error))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn error(errno: Errno) -> io::Error {
        io::Error::from_raw_os_error(errno.raw_os_error())
    }

    #[test]
    fn pauses_grow_to_a_limit_and_start_over() {
        let mut refusals = Refusals::new();
        let pauses: Vec<_> = (0..8).map(|_| refusals.pause(&error(Errno::MFILE))).collect();
        assert_eq!(pauses[0], PAUSE_MIN);
        assert!(pauses.is_sorted() && pauses[7] == PAUSE_MAX, "{pauses:?}");
        assert_eq!(refusals.unsaid, 7, "said once");
        refusals.accepted();
        assert_eq!(refusals.pause(&error(Errno::NFILE)), PAUSE_MIN);
    }

    #[test]
    fn a_connection_that_is_gone_already_costs_no_pause() {
        let mut refusals = Refusals::new();
        for errno in [Errno::CONNABORTED, Errno::PERM, Errno::PROTO] {
            assert_eq!(refusals.pause(&error(errno)), Duration::ZERO);
        }
    }

    #[test]
    fn connections_leave_descriptors() {
        assert_eq!(connections_max(1), 1);
        let limit = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let max = connections_max(usize::MAX) as u64;
        assert!(max < limit || max == CONNECTIONS_MIN as u64, "{max} of {limit}");
    }
}
