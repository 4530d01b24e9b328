//! More load than the gateway can carry, deadlines, and clients that vanish: what it answers, what
//! it runs, and what is left afterwards. Figures go to standard error; `docs/reliability.md` has
//! those that were seen.
//!
//! Models sleep instead of computing, so that their capacity is known on any machine, and bounds
//! are ratios within one run or very wide.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

#[expect(unreachable_pub, reason = "shared with the benchmarks")]
#[path = "../support/gateway.rs"]
mod gateway_of;

mod aborts;
mod client;
mod deadlines;
mod load;
mod panics;
mod process;
mod server;
mod watchdog;

use tokio::runtime::{Builder, Runtime};

/// One test at a time, in whatever way they are started: each measures.
static ALONE: parking_lot::Mutex<()> = parking_lot::Mutex::new(());

/// Runs a test with the machine to itself, as far as this program goes.
fn alone(test: impl FnOnce(&Runtime)) {
    let _alone = ALONE.lock();
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    test(&runtime);
    runtime.shutdown_background();
}
