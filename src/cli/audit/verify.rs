//! `tidegate audit verify`: every record, read from the files alone.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use crate::cli::admin::{Stop, finish};
use crate::ledger::reader::{self, ReadError, Rest, SegmentReader};

#[derive(clap::Args)]
pub(super) struct Args {
    /// Folder of one log: `<state>/ledger/predictions`
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

pub(super) fn run(args: &Args) -> ExitCode {
    let records = records(&args.dir);
    finish(records.map(|records| format!("{records} records")).map_err(Stop::failed))
}

fn records(log: &Path) -> Result<u64, ReadError> {
    let mut records = 0;
    for segment in reader::segments(log)? {
        let mut reader = SegmentReader::open(&segment)?;
        while reader.next_frame()?.is_some() {
            records += 1;
        }
        if let Rest::Damage(fault) = reader.rest()? {
            return Err(fault.into());
        }
    }
    Ok(records)
}
