//! `tidegate serve`.

use std::process::ExitCode;

use anyhow::Context as _;
use parking_lot::Mutex;

use crate::config::{self, ServeArgs};

/// Threads for all but the data plane's connections: control, metrics, signals. Two, so that one
/// long page does not hold up the other.
const CONTROL_THREADS: usize = 2;

/// Threads beside those and the ones for connections: for the disk, the log, what watches folders.
const OTHER_THREADS: usize = 8;

/// Descriptors that the runtimes, the state and the listeners open for themselves, generously.
const FILES_MIN: usize = 32;

#[derive(clap::Args)]
#[command(
    after_help = "Example:\n  tidegate serve --model-repository models --state-dir /var/lib/tidegate"
)]
pub(super) struct Args {
    #[command(flatten)]
    serve: ServeArgs,
}

pub(super) fn run(args: &Args) -> ExitCode {
    let config = match config::load(&args.serve) {
        Ok(config) => config,
        Err(problems) => {
            super::complain(&problems);
            return ExitCode::from(2);
        }
    };
    let log = match crate::observe::log::init(config.log_format, &config.log_level) {
        Ok(log) => log,
        Err(error) => {
            super::complain(&error);
            return ExitCode::from(2);
        }
    };
    let threads = CONTROL_THREADS + config.transport.io_threads + OTHER_THREADS;
    let given = threads_are_given(threads).and_then(|()| files_are_given(FILES_MIN));
    let runtime = given.and_then(|()| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(CONTROL_THREADS).enable_all().build()
    });
    let served = runtime
        .context("start the runtime")
        .and_then(|runtime| runtime.block_on(crate::app::serve(config, log)));
    let code = match served {
        Ok(()) => 0,
        Err(error) => {
            tracing::error!("cannot serve: {error:#}");
            1
        }
    };
    // Runs that were cut off may still be in an engine.
    crate::engine::leave(code)
}

/// Whether this process may have `count` more files open. For want of one the runtime panics.
fn files_are_given(count: usize) -> std::io::Result<()> {
    let opened: std::io::Result<Vec<_>> =
        (0..count).map(|_| std::fs::File::open("/dev/null")).collect();
    opened.map(drop)
}

/// Whether the system lets `count` more threads run at once. For want of one the runtime panics,
/// and then may wait forever for those it did get.
fn threads_are_given(count: usize) -> std::io::Result<()> {
    let gate = Mutex::new(());
    let closed = gate.lock();
    std::thread::scope(|scope| {
        let start = |_| std::thread::Builder::new().spawn_scoped(scope, || drop(gate.lock()));
        let started: std::io::Result<Vec<_>> = (0..count).map(start).collect();
        drop(closed);
        started.map(drop)
    })
}
