//! `tidegate replay`: the inputs that a ledger recorded, sent to a model again, and how its outputs
//! differ from those that were given then.

use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use http::Uri;

use super::admin::{Stop, examples, finish};
use super::audit::Select;
use crate::domain::{ModelName, VersionRef};
use crate::ledger::export::{ExportError, line, log_folder, scan};
use crate::ledger::record::Kind;

mod compare;
mod recorded;
mod reproduce;
mod send;

pub(super) use reproduce::{Again, reproduce, state_dirs};

use compare::{Limits, Report};
use recorded::Recorded;
use send::{Answer, Sender};

/// The gateway that runs them.
#[derive(clap::Args)]
pub(super) struct Gateway {
    /// The gateway that runs the inputs; a key's token is taken from TIDEGATE_TOKEN
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:8000")]
    url: Uri,
    /// Largest difference of an output's value that is none
    #[arg(long, value_name = "NUMBER", default_value_t = 0.0)]
    tolerance: f64,
}

#[derive(clap::Args)]
#[command(after_help = examples!(
    "replay --log tidegate-state --to iris@2 --since 24h --limit 1000",
    "replay --log tidegate-state/ledger --to iris@canary --model iris --rate 50 --json",
    "replay --log /backup/predictions --to iris --fail-on max-abs=1e-4,flips=0,errors=0",
))]
pub(super) struct Args {
    /// Folder of the state, of the ledger or of one log
    #[arg(long, value_name = "DIR")]
    log: PathBuf,
    /// Where they are sent: a model, with its version or label if not the one of its traffic
    #[arg(long, value_name = "MODEL[@VERSION]", value_parser = target)]
    to: (ModelName, Option<VersionRef>),
    #[command(flatten)]
    select: Select,
    /// Send at most so many
    #[arg(long, value_name = "COUNT", default_value_t = 1000)]
    limit: u64,
    /// Send at most so many a second; one after the other in any case
    #[arg(long, value_name = "PER_SECOND")]
    rate: Option<f64>,
    /// Exit with 1 beyond one of: max-abs=NUMBER, max-rel=NUMBER, flips=SHARE, errors=COUNT,
    /// different=SHARE
    #[arg(long, value_name = "LIMITS", value_delimiter = ',', value_parser = compare::limit)]
    fail_on: Vec<(compare::Measure, f64)>,
    #[command(flatten)]
    gateway: Gateway,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

fn target(text: &str) -> Result<(ModelName, Option<VersionRef>), crate::domain::NameError> {
    let (model, version) = text.split_once('@').unwrap_or((text, ""));
    Ok((model.parse()?, VersionRef::parse(version)?))
}

pub(super) fn run(args: &Args) -> ExitCode {
    match replay(args) {
        Ok((text, false)) => finish(Ok(text)),
        Ok((text, true)) => {
            finish(Ok(text));
            ExitCode::FAILURE
        }
        Err(stop) => finish(Err(stop)),
    }
}

/// The report, and whether it is beyond a limit.
fn replay(args: &Args) -> Result<(String, bool), Stop> {
    let log = log_folder(&args.log).map_err(Stop::usage)?;
    let sender = Sender::open(&args.gateway.url)?;
    let pause = args.rate.map(|rate| match rate.is_finite() && rate > 0.0 {
        true => Ok(Duration::from_secs_f64(1.0 / rate)),
        false => Err(Stop::usage("--rate: expected a number above 0")),
    });
    let pause = pause.transpose()?;
    let mut wanted = args.select.selection(None);
    // What is sent from now on is in the log too, if that is the log of who it is sent to.
    let now = jiff::Timestamp::now().as_nanosecond();
    wanted.until_ns.get_or_insert(i64::try_from(now).unwrap_or(i64::MAX));
    // Another model's inputs would only be refused.
    wanted.model.get_or_insert_with(|| args.to.0.to_string());
    let mut report = Report::new(args.gateway.tolerance);
    let (mut due, mut text) = (Instant::now(), Vec::new());
    scan::<Wrong>(&log, &wanted, |head, view| {
        if view.kind != Kind::Prediction as u64 || view.status != "ok" || !view.shadow_of.is_empty()
        {
            return Ok(ControlFlow::Continue(()));
        }
        text.clear();
        line(&mut text, &head.writer.to_string(), view);
        let Some(recorded) = std::str::from_utf8(&text).ok().and_then(Recorded::of) else {
            report.skipped += 1;
            return Ok(ControlFlow::Continue(()));
        };
        if let Some(pause) = pause {
            std::thread::sleep(due.saturating_duration_since(Instant::now()));
            due += pause;
        }
        match sender.send(&args.to.0, args.to.1.as_ref(), &recorded)? {
            Answer::Outputs { outputs, .. } => report.add(&recorded, &outputs),
            Answer::Refused(why) => report.refused(&recorded, why),
        }
        Ok(if report.sent >= args.limit {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    })?;
    let limits = Limits(&args.fail_on);
    let beyond = limits.beyond(&report);
    let text = match args.json {
        true => format!("{:#}\n", report.json(&beyond)),
        false => report.text(&beyond),
    };
    Ok((text, !beyond.is_empty()))
}

/// What ends a replay.
#[derive(Debug)]
enum Wrong {
    Log(ExportError),
    Gateway(Stop),
}

impl From<ExportError> for Wrong {
    fn from(error: ExportError) -> Self {
        Self::Log(error)
    }
}

impl From<Stop> for Wrong {
    fn from(stop: Stop) -> Self {
        Self::Gateway(stop)
    }
}

impl From<Wrong> for Stop {
    fn from(wrong: Wrong) -> Self {
        match wrong {
            Wrong::Log(error) => Self::failed(error),
            Wrong::Gateway(stop) => stop,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_may_name_a_version() {
        let of = |text: &str| {
            target(text).map(|(model, version)| {
                (model.to_string(), version.map(|version| version.to_string()))
            })
        };
        assert_eq!(of("iris"), Ok(("iris".to_owned(), None)));
        assert_eq!(of("iris@2"), Ok(("iris".to_owned(), Some("2".to_owned()))));
        assert_eq!(of("iris@canary"), Ok(("iris".to_owned(), Some("canary".to_owned()))));
        assert!(of("../iris").is_err() && of("iris@../2").is_err());
    }
}
