//! Arguments and exit codes, nothing else.

use std::process::ExitCode;

fn main() -> ExitCode {
    tidegate::engine::prepare_environment();
    tidegate::engine::keep_little_memory();
    tidegate::cli::run()
}
