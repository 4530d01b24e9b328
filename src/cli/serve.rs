//! `tidegate serve`.

use std::process::ExitCode;

use crate::config::{self, ServeArgs};

/// Threads for all but the data plane's connections: control, metrics, signals. Two, so that one
/// long page does not hold up the other.
const CONTROL_THREADS: usize = 2;

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
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(CONTROL_THREADS)
        .enable_all()
        .build();
    let served = runtime
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(crate::app::serve(config, log)));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("cannot serve: {error:#}");
            ExitCode::FAILURE
        }
    }
}
