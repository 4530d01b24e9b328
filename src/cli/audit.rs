//! `tidegate audit`: what the ledger holds, and whether it was touched.

use std::process::ExitCode;

use clap::Subcommand;

mod verify;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check every record of a ledger, offline
    Verify(verify::Args),
}

pub(super) fn run(args: &Args) -> ExitCode {
    match &args.command {
        Command::Verify(args) => verify::run(args),
    }
}
