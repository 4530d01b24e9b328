//! Releases against the real program: swaps under load, bad versions, changes of traffic, kills.
//! Figures go to standard error with the id of what they belong to; `docs/reliability.md` has those
//! that were seen.
//!
//! Version `k` of every model computes `y = x + k`, so that each answer proves which version ran.
//! What is promised is checked against the times at which changes were sent and answered; no test
//! depends on how fast anything is.
//!
//! The runs here are short. `RELEASE_SWAPS=1000 RELEASE_ROUTED=100000 RELEASE_KILLS=500
//! RELEASE_CYCLES=1000 RELEASE_HEAVY_MIB=512 LEDGER_KILLS=500 cargo test --release --test release -- --nocapture`
//! makes them long ones.

#![cfg(all(feature = "ort", feature = "tract"))]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

#[expect(unreachable_pub, reason = "shared with other tests")]
#[path = "../support/wire.rs"]
mod wire;

mod admin;
mod bad;
mod checker;
mod cycles;
mod gateway;
mod heavy;
mod inside;
mod kills;
mod ledger;
mod load;
mod models;
mod routing;
mod swaps;
mod timing;
mod uploads;

use tokio::runtime::{Builder, Runtime};

/// One test at a time, in whatever way they are started: each measures.
static ALONE: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

/// Runs a test with the machine to itself, as far as this program goes. The runtime is for clients.
fn alone(test: impl FnOnce(&Runtime)) {
    let _alone = ALONE.lock();
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    test(&runtime);
    runtime.shutdown_background();
}

/// A number that the environment may set to something longer.
fn count(variable: &str, usual: usize) -> usize {
    std::env::var(variable).map_or(usual, |text| text.parse().unwrap())
}
