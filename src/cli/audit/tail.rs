//! `tidegate audit tail`: records as they come.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use serde_json::Value;

use super::export::value;
use super::select::Select;
use crate::cli::admin::table::{cell, plain};
use crate::cli::admin::{Stop, examples, finish};
use crate::ledger::export::{View, line, log_folder};
use crate::ledger::follow::{FollowError, Follower, Start};
use crate::ledger::frame::WriterId;
use crate::ledger::reader::{self, SegmentReader};

/// How often the log is looked at when nothing came.
const POLL: Duration = Duration::from_millis(100);

#[derive(clap::Args)]
#[command(after_help = examples!(
    "audit tail tidegate-state",
    "audit tail tidegate-state --model iris --status timeout --json",
    "audit tail tidegate-state --from 0 --limit 10 --json",
))]
pub(super) struct Args {
    /// Folder of the state, of the ledger or of one log
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    #[command(flatten)]
    select: Select,
    /// Begin with the record of this number [default: behind the last that is there]
    #[arg(long, value_name = "SEQ")]
    from: Option<u64>,
    /// End after so many
    #[arg(long, value_name = "COUNT")]
    limit: Option<u64>,
    /// Print the lines of 'audit export --format jsonl'
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &Args) -> ExitCode {
    finish(tail(args).map(|()| String::new()))
}

fn tail(args: &Args) -> Result<(), Stop> {
    let log = log_folder(&args.dir).map_err(Stop::usage)?;
    let wanted = args.select.selection(None);
    let start = args.from.map_or(Start::End, Start::At);
    let mut follower = Follower::new(&log, start).map_err(Stop::failed)?;
    let mut out = io::stdout().lock();
    let (mut printed, mut writer) = (0, None);
    while args.limit.is_none_or(|limit| printed < limit) {
        let next_seq = follower.next_seq();
        match follower.next_frame() {
            Ok(None) => std::thread::sleep(POLL),
            Ok(Some(frame)) => {
                let view = View::read(&frame).map_err(|what| {
                    Stop::failed(format_args!("{}: record {next_seq}: {what}", log.display()))
                })?;
                let writer = *writer.get_or_insert_with(|| of_writer(&log));
                if !wanted.takes(&view) {
                    continue;
                }
                match shown(&mut out, writer, &view, args.json) {
                    Ok(()) => printed += 1,
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
                    Err(error) => {
                        return Err(Stop::failed(format_args!("cannot print: {error}")));
                    }
                }
            }
            Err(FollowError::Gap(gap)) => {
                crate::cli::complain(&gap);
                follower.skip(gap.to);
            }
            Err(FollowError::Damage(damage)) => {
                crate::cli::complain(&damage);
                follower.skip(damage.to);
            }
            Err(FollowError::Read(error)) => return Err(Stop::failed(error)),
        }
    }
    Ok(())
}

/// Whose log it is; all of its segments are one writer's.
fn of_writer(log: &Path) -> WriterId {
    let last = reader::segments(log).ok().and_then(|mut all| all.pop());
    let head = last.and_then(|last| SegmentReader::open(&last).ok());
    head.map_or(WriterId([0; 8]), |reader| reader.head().writer)
}

fn shown(out: &mut impl Write, writer: WriterId, view: &View<'_>, json: bool) -> io::Result<()> {
    if json {
        let mut text = Vec::new();
        line(&mut text, &writer.to_string(), view);
        text.push(b'\n');
        out.write_all(&text)?;
    } else {
        writeln!(out, "{}", summary(&value(&writer.to_string(), view)))?;
    }
    out.flush()
}

/// One line for people.
fn summary(record: &Value) -> String {
    let of = |name: &str| cell(&record[name]);
    let what = match record["kind"].as_str() {
        Some("prediction") => format!(
            "{}/{} {} {} {} µs",
            of("model"),
            of("version"),
            of("arm"),
            of("status"),
            of("total_us")
        ),
        _ => format!("{} {} {}", of("kind"), of("action"), of("count")),
    };
    let parts =
        [of("seq"), of("time"), of("prediction_id"), plain(&what), of("principal"), of("error")];
    let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
    parts.join("  ")
}
