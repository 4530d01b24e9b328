//! `tidegate audit`: what the ledger holds, and whether it was touched.

use std::process::ExitCode;

use clap::Subcommand;

mod erase;
mod export;
mod hold;
mod prove;
mod rotate;
mod select;
mod show;
mod stats;
mod tail;
mod verify;

pub(super) use select::Select;

#[derive(clap::Args)]
pub(super) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check every record, tree and checkpoint of a ledger, offline
    Verify(verify::Args),
    /// Make a proof that a record is in the log, to be given away
    Prove(prove::ProveArgs),
    /// Check such a proof, without the log
    CheckProof(prove::CheckArgs),
    /// Take out what a record, or everything about somebody, held; its proofs go on to hold
    Erase(erase::Args),
    /// Make a new key that checkpoints are signed with
    RotateKey(rotate::Args),
    /// Print the verifier keys that this ledger signs with
    PublicKey(rotate::PublicArgs),
    /// Write records as lines of JSON or as Parquet
    Export(export::Args),
    /// Show one prediction, and run it again
    Show(show::Args),
    /// Show how much a ledger holds, and of what
    Stats(stats::Args),
    /// Print records as they come
    Tail(tail::Args),
    /// Keep records that their retention would remove, or let them go
    Hold(hold::HoldArgs),
    /// List what is held
    Holds(hold::HoldsArgs),
}

pub(super) fn run(args: &Args) -> ExitCode {
    match &args.command {
        Command::Verify(args) => verify::run(args),
        Command::Prove(args) => prove::run(args),
        Command::CheckProof(args) => prove::check(args),
        Command::Erase(args) => erase::run(args),
        Command::RotateKey(args) => rotate::run(args),
        Command::PublicKey(args) => rotate::public(args),
        Command::Export(args) => export::run(args),
        Command::Show(args) => show::run(args),
        Command::Stats(args) => stats::run(args),
        Command::Tail(args) => tail::run(args),
        Command::Hold(args) => hold::hold(args),
        Command::Holds(args) => hold::holds(args),
    }
}
