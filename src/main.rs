//! Arguments and exit codes, nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate::cli::run()
}
