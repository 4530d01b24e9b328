//! The command line: arguments, and one module per subcommand.

use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod admin;
mod alerts;
mod approvals;
mod audit;
mod check_config;
mod drift;
mod frame;
mod health;
mod infer;
mod journal;
mod keys;
mod labels;
mod list;
mod models;
mod profile;
mod quality;
mod replay;
mod rollout;
mod serve;
mod traffic;
mod versions;

#[derive(Parser)]
#[command(name = "tidegate", version, about = "Model-serving gateway for ONNX models")]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the gateway until SIGTERM or SIGINT, then drain and exit
    Serve(Box<serve::Args>),
    /// Validate a configuration, print every problem at once and what is unsafe
    CheckConfig(check_config::Args),
    /// List what a repository has, inspect a model file, validate a whole repository
    Models(models::Args),
    /// Send one request and print the answer
    Infer(infer::Args),
    /// Ask a running gateway whether it is ready; 0 if it is, 1 if not
    Health(health::Args),
    /// Make, list and revoke API keys
    Keys(keys::Args),
    /// Show and change what decides which version a request gets
    Traffic(traffic::Args),
    /// List, show, load and unload versions
    Versions(versions::Args),
    /// List and move labels of versions
    Labels(labels::Args),
    /// Approve and reject versions
    Approvals(approvals::Args),
    /// Bring a new version in small, watched, reversible steps
    Rollout(rollout::Args),
    /// Show how good a model's predictions were, by the labels that came for them
    Quality(quality::Args),
    /// Show what is wrong with models and who was told, test receivers, silence models
    Alerts(alerts::Args),
    /// Show who changed what, when and why, and who was refused
    Journal(journal::Args),
    /// Check, show and export what the ledger holds
    Audit(audit::Args),
    /// Send recorded inputs again and report how the outputs differ
    Replay(replay::Args),
    /// Make a reference profile for drift from Parquet or CSV
    Profile(profile::Args),
    /// Say how far rows have moved from a reference, as a gate for CI
    Drift(drift::Args),
    /// Try a model under limits, as told on stdin
    #[command(hide = true)]
    Probe,
}

/// Parses the arguments and runs; 0 on success, 1 on a failed check, 2 on wrong usage.
pub fn run() -> ExitCode {
    match Cli::parse().command {
        Command::Serve(args) => serve::run(&args),
        Command::CheckConfig(args) => check_config::run(&args),
        Command::Models(args) => models::run(&args),
        Command::Infer(args) => infer::run(&args),
        Command::Health(args) => health::run(&args),
        Command::Keys(args) => keys::run(&args),
        Command::Traffic(args) => traffic::run(&args),
        Command::Versions(args) => versions::run(&args),
        Command::Labels(args) => labels::run(&args),
        Command::Approvals(args) => approvals::run(&args),
        Command::Rollout(args) => rollout::run(&args),
        Command::Quality(args) => quality::run(&args),
        Command::Alerts(args) => alerts::run(&args),
        Command::Journal(args) => journal::run(&args),
        Command::Audit(args) => audit::run(&args),
        Command::Replay(args) => replay::run(&args),
        Command::Profile(args) => profile::run(&args),
        Command::Drift(args) => drift::run(&args),
        Command::Probe => crate::control::probe::child_main(),
    }
}

/// Tells the user what is wrong, on standard error.
fn complain(problem: &dyn std::fmt::Display) {
    use std::io::Write;
    // Nowhere is left to say that standard error is gone.
    drop(writeln!(std::io::stderr(), "tidegate: {problem}"));
}
