//! Compares servers under the same load, in turns: many short rounds, so that what else the machine
//! does hits all sides alike, and a ratio for each round.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use nix::sched::CpuSet;
use serde::Serialize;

use crate::client::{self, Call, Protocol};
use crate::drive::{self, Load};
use crate::floor::{Kind, Layout};
use crate::record::{Report, median};
use crate::servers::{Gateway, Server};
use crate::tensors::{self, Dims, Encoding, Spec};

/// One way to ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum Scenario {
    Http1Binary,
    Http2Binary,
    Grpc,
    Http1Json,
}

impl Scenario {
    fn protocol(self) -> Protocol {
        match self {
            Self::Http1Binary | Self::Http1Json => Protocol::Http1,
            Self::Http2Binary => Protocol::Http2,
            Self::Grpc => Protocol::Grpc,
        }
    }

    fn encoding(self) -> Encoding {
        match self {
            Self::Http1Json => Encoding::Json,
            Self::Http1Binary | Self::Http2Binary | Self::Grpc => Encoding::Binary,
        }
    }

    fn floor(self) -> Kind {
        match self {
            Self::Http1Binary | Self::Http1Json => Kind::Http1,
            Self::Http2Binary => Kind::Http2,
            Self::Grpc => Kind::Grpc,
        }
    }
}

/// What is compared, and how.
pub struct Plan {
    pub gateway: Gateway,
    pub against: Option<Gateway>,
    /// Layout and threads of the floors; none when they are not wanted.
    pub floor: Option<(Layout, usize)>,
    /// A model file to run in process, beside the gateway.
    pub in_process: Option<InProcess>,
    pub models: Vec<String>,
    pub dims: Dims,
    /// Inputs to send instead of what the model's metadata says.
    pub inputs: Vec<Spec>,
    pub scenarios: Vec<Scenario>,
    pub connections: Vec<usize>,
    pub rounds: usize,
    /// Its connections are replaced by each of the plan's.
    pub load: Load,
    pub seed: u64,
    pub server_cpus: Option<CpuSet>,
    /// A turn during which others kept more processors busy is run again.
    pub others_max: f64,
    /// Every answer must have the first one's length.
    pub check: bool,
}

/// ONNX Runtime without a server.
#[derive(Clone, Debug)]
pub struct InProcess {
    pub model: PathBuf,
    pub args: Vec<String>,
}

/// The sides of a comparison, in the order of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    Gateway,
    Against,
    Floor,
    InProcess,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Gateway => "gateway",
            Self::Against => "against",
            Self::Floor => "floor",
            Self::InProcess => "in-process",
        })
    }
}

/// One scenario of one model with a number of connections.
#[derive(Serialize)]
pub struct Outcome {
    pub model: String,
    pub scenario: String,
    pub connections: usize,
    pub sides: BTreeMap<Side, Vec<Report>>,
}

/// Runs everything; `progress` is told each outcome when it is known.
///
/// # Errors
/// When a server does not start or a first request fails.
pub fn run(plan: &Plan, progress: impl Fn(&Outcome)) -> Result<Vec<Outcome>> {
    ensure!(plan.rounds > 0, "a comparison needs rounds");
    let cpus = plan.server_cpus.as_ref();
    let mut servers = vec![(Side::Gateway, Server::gateway(&plan.gateway, cpus, None)?)];
    if let Some(against) = &plan.against {
        servers.push((Side::Against, Server::gateway(against, cpus, None)?));
    }
    let mut outcomes = Vec::new();
    for model in &plan.models {
        let specs = match plan.inputs.is_empty() {
            true => drive::runtime()?.block_on(client::inputs(servers[0].1.address, model))?,
            false => plan.inputs.clone(),
        };
        let inputs = tensors::random(&specs, &plan.dims, plan.seed)?;
        for scenario in &plan.scenarios {
            let floor = match plan.floor {
                Some((layout, threads)) => {
                    Some((Side::Floor, Server::floor(scenario.floor(), layout, threads, cpus)?))
                }
                None => None,
            };
            let call = Call::new(scenario.protocol(), scenario.encoding(), model, &inputs)?;
            for connections in &plan.connections {
                let sides: Vec<_> = servers.iter().chain(&floor).collect();
                let outcome = Outcome {
                    model: model.clone(),
                    scenario: name(*scenario),
                    connections: *connections,
                    sides: rounds(plan, *connections, &call, &sides)
                        .with_context(|| format!("{model}, {}", name(*scenario)))?,
                };
                progress(&outcome);
                outcomes.push(outcome);
            }
        }
    }
    Ok(outcomes)
}

fn name(value: impl ValueEnum) -> String {
    value.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default()
}

fn rounds(
    plan: &Plan,
    connections: usize,
    call: &Call,
    servers: &[&(Side, Server)],
) -> Result<BTreeMap<Side, Vec<Report>>> {
    let load = Load { connections, ..plan.load.clone() };
    let mut sides: BTreeMap<Side, Vec<Report>> = BTreeMap::new();
    for round in 0..plan.rounds {
        let mut turns: Vec<Option<&(Side, Server)>> = servers.iter().copied().map(Some).collect();
        turns.extend(plan.in_process.as_ref().map(|_| None));
        // Whoever goes first in one round goes last in the next.
        if round % 2 == 1 {
            turns.reverse();
        }
        for turn in turns {
            let (side, report) = match (turn, &plan.in_process) {
                (Some((side, server)), _) => (*side, quiet(plan, call, &load, server)?),
                (None, Some(in_process)) => (Side::InProcess, in_process.run(&load, plan)?),
                (None, None) => continue,
            };
            sides.entry(side).or_default().push(report);
        }
    }
    Ok(sides)
}

/// Loads one server, again while others are at work.
fn quiet(plan: &Plan, call: &Call, load: &Load, server: &Server) -> Result<Report> {
    let mut call = call.clone();
    if plan.check {
        call.answer_len = Some(drive::first(server.address, &call, load.timeout)?);
    }
    for _ in 0..=AGAIN_MAX {
        let report = drive::run(server.address, &call, load, Some(server.process()))?;
        if report.others_cores.is_none_or(|others| others <= plan.others_max) {
            return Ok(report);
        }
    }
    bail!("others kept more than {} processors busy in {AGAIN_MAX} turns", plan.others_max)
}

impl InProcess {
    /// Runs this program's `inprocess` as a child, so that it has the same processors as a server.
    fn run(&self, load: &Load, plan: &Plan) -> Result<Report> {
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("inprocess").arg("--json").arg("--model").arg(&self.model);
        command.args(["--connections", &load.connections.to_string()]);
        command.args(["--seconds", &load.length.as_secs_f64().to_string()]);
        command.args(["--warmup", &load.warmup.as_secs_f64().to_string()]);
        command.args(["--batch", &plan.dims.batch.to_string(), "--seed", &plan.seed.to_string()]);
        for (dim, size) in &plan.dims.named {
            command.args(["--dim", &format!("{dim}={size}")]);
        }
        let output = crate::process::output(command.args(&self.args), plan.server_cpus.as_ref())?;
        ensure!(
            output.status.success(),
            "inprocess failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).context("report of inprocess")
    }
}

/// Median, smallest and largest of the rounds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Spread {
    #[must_use]
    pub fn of(values: &[f64]) -> Self {
        Self {
            median: median(values),
            min: values.iter().copied().fold(f64::INFINITY, f64::min),
            max: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
        }
    }
}

impl fmt::Display for Spread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.3} ({:.3}–{:.3})", self.median, self.min, self.max)
    }
}

/// Times that a turn is run again because the machine was not quiet.
const AGAIN_MAX: usize = 20;

type Metric = fn(&Report) -> f64;

/// What is shown of a side, with its unit.
const COLUMNS: [(&str, Metric); 8] = [
    ("cpu us/req", |report| report.server.map_or(f64::NAN, |server| server.cpu_us_per_request)),
    ("requests/s", |report| report.requests_per_s),
    ("p50 us", |report| report.latency_us.p50),
    ("p99 us", |report| report.latency_us.p99),
    ("p99.9 us", |report| report.latency_us.p99_9),
    ("rss MiB", |report| report.server.map_or(f64::NAN, |server| server.rss_mib)),
    ("client us", |report| report.client_cpu_us_per_request),
    ("others", |report| report.others_cores.unwrap_or(f64::NAN)),
];

impl Outcome {
    fn values(&self, side: Side, metric: Metric) -> Vec<f64> {
        self.sides.get(&side).map(|all| all.iter().map(metric).collect()).unwrap_or_default()
    }

    /// The gateway's value over the other side's, round by round.
    #[must_use]
    pub fn ratio(&self, other: Side, metric: Metric) -> Spread {
        self.paired(other, metric, |gateway, other| gateway / other)
    }

    fn paired(&self, other: Side, metric: Metric, combine: fn(f64, f64) -> f64) -> Spread {
        let (gateway, other) = (self.values(Side::Gateway, metric), self.values(other, metric));
        let pairs = gateway.iter().zip(&other).map(|(gateway, other)| combine(*gateway, *other));
        Spread::of(&pairs.collect::<Vec<_>>())
    }

    #[must_use]
    pub fn errors(&self) -> u64 {
        self.sides.values().flatten().map(Report::errors_total).sum()
    }

    /// For programs: every report, and the ratios.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        let others = self.sides.keys().filter(|side| **side != Side::Gateway);
        let ratios: BTreeMap<String, BTreeMap<&str, Spread>> = others
            .map(|other| {
                let of =
                    |(name, metric): &(&'static str, Metric)| (*name, self.ratio(*other, *metric));
                (format!("gateway/{other}"), COLUMNS.iter().map(of).collect())
            })
            .collect();
        serde_json::json!({
            "model": self.model,
            "scenario": self.scenario,
            "connections": self.connections,
            "ratios": ratios,
            "sides": self.sides,
        })
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let rounds = self.sides.values().map(Vec::len).max().unwrap_or_default();
        let Self { model, scenario, connections, .. } = self;
        writeln!(f, "{model}, {scenario}, {connections} connections, median of {rounds} rounds")?;
        write!(f, "{:12}", "")?;
        for (name, _) in COLUMNS {
            write!(f, "{name:>12}")?;
        }
        writeln!(f, "{:>9}", "errors")?;
        for (side, reports) in &self.sides {
            write!(f, "{side:12}")?;
            for (_, metric) in COLUMNS {
                write!(f, "{:12.1}", median(&self.values(*side, metric)))?;
            }
            writeln!(f, "{:9}", reports.iter().map(Report::errors_total).sum::<u64>())?;
        }
        for other in self.sides.keys().filter(|side| **side != Side::Gateway) {
            let [cpu, rate, p50, p99, ..] = COLUMNS.map(|(_, metric)| metric);
            writeln!(
                f,
                "gateway/{other}: cpu {}, requests/s {}, p50 {}, p99 {}, p50 difference us {}",
                self.ratio(*other, cpu),
                self.ratio(*other, rate),
                self.ratio(*other, p50),
                self.ratio(*other, p99),
                self.paired(*other, p50, |gateway, other| gateway - other),
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::Usage;

    fn outcome() -> Outcome {
        let report = |cpu_us_per_request, requests_per_s| Report {
            requests_per_s,
            server: Some(Usage { cpu_us_per_request, ..Usage::default() }),
            ..Report::default()
        };
        let gateway = vec![report(20.0, 100.0), report(30.0, 90.0), report(25.0, 50.0)];
        let floor = vec![report(10.0, 200.0), report(10.0, 100.0), report(10.0, 100.0)];
        let sides = BTreeMap::from([(Side::Gateway, gateway), (Side::Floor, floor)]);
        Outcome { model: "mlp".to_owned(), scenario: "grpc".to_owned(), connections: 64, sides }
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let ratio = outcome().ratio(Side::Floor, COLUMNS[0].1);
        assert_eq!((ratio.median, ratio.min, ratio.max), (2.5, 2.0, 3.0));
        let ratio = outcome().ratio(Side::Floor, COLUMNS[1].1);
        assert_eq!((ratio.median, ratio.min, ratio.max), (0.5, 0.5, 0.9));
    }

    #[test]
    fn an_outcome_says_what_was_compared_and_the_ratios() {
        let text = outcome().to_string();
        for part in ["mlp, grpc, 64 connections, median of 3 rounds", "cpu 2.500 (2.000–3.000)"] {
            assert!(text.contains(part), "'{part}' in {text}");
        }
        let json = outcome().to_json();
        assert_eq!(json["ratios"]["gateway/floor"]["cpu us/req"]["median"], 2.5);
        assert_eq!(json["sides"]["gateway"].as_array().unwrap().len(), 3);
    }
}
