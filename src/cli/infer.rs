//! `tidegate infer`.

use std::process::ExitCode;

#[derive(clap::Args)]
pub(super) struct Args {}

pub(super) fn run(_args: &Args) -> ExitCode {
    ExitCode::SUCCESS
}
