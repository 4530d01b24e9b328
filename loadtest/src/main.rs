//! The command line of the load generator.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use loadtest::client::{self, Call, Protocol};
use loadtest::compare::{self, InProcess, Plan, Scenario};
use loadtest::drive::{self, Load, Pace};
use loadtest::floor::{self, Kind, Layout};
use loadtest::process::{self, Process};
use loadtest::record::median;
use loadtest::schedule::Arrivals;
use loadtest::servers::{Gateway, Server};
use loadtest::tensors::{self, Dims, Encoding, Spec};

/// Load generator, floors and comparisons for Tidegate.
#[derive(Parser)]
#[command(version, max_term_width = 110, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "Examples:
  loadtest run --model iris --connections 64 --seconds 5
  loadtest run --model iris --protocol grpc --rate 2000 --pid $(pidof tidegate) --json
  loadtest floor grpc --address 127.0.0.1:9000
  loadtest compare --gateway-binary target/release/tidegate --models loadtest/models
  loadtest compare --gateway-binary target/release/tidegate --models models --model iris,digits \\
      --against-batching-off --no-floor --scenario grpc --connections 64
  loadtest start --gateway-binary target/release/tidegate --models models";

#[derive(Subcommand)]
enum Command {
    /// Drive one server and report what came back
    Run(Run),
    /// Serve a bare echo until ended: the least that a server can cost
    Floor(Floor),
    /// Measure a gateway, floors and a second gateway in turns
    Compare(Box<Compare>),
    /// Measure the time from start to ready, and the resident memory when idle
    Start(Start),
    /// Run a model with ONNX Runtime without any server
    #[cfg(feature = "inprocess")]
    Inprocess(loadtest::inprocess::Options),
}

/// What every load has.
#[derive(Args)]
struct LoadArgs {
    /// Requests in flight on each connection (HTTP/2 and gRPC)
    #[arg(long, default_value_t = 1, value_name = "M")]
    streams_per_connection: usize,
    /// Client threads, each with its share of the connections
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Length of the measured part, in seconds
    #[arg(long, default_value_t = 3.0, value_parser = seconds)]
    seconds: f64,
    /// Seconds of load before it that are not counted
    #[arg(long, default_value_t = 0.5, value_parser = seconds)]
    warmup: f64,
    /// Seconds after which a request has failed
    #[arg(long, default_value_t = 10.0, value_parser = seconds)]
    timeout: f64,
    /// Open loop: requests per second, on a schedule that is fixed before the load starts
    #[arg(long, value_name = "R", value_parser = rate)]
    rate: Option<f64>,
    /// How the arrivals of an open loop are spread
    #[arg(long, value_enum, default_value_t = Arrivals::Poisson, requires = "rate")]
    arrivals: Arrivals,
    /// Every answer must have the first one's length
    #[arg(long)]
    check: bool,
    #[command(flatten)]
    inputs: Inputs,
}

/// What is sent.
#[derive(Args)]
struct Inputs {
    /// Rows: the first dimension where it is free
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(i64).range(1..))]
    batch: i64,
    /// Size of another free dimension, as INPUT.AXIS=SIZE or INPUT=SIZE; repeatable
    #[arg(long = "dim", value_name = "INPUT.AXIS=SIZE", value_parser = tensors::dim)]
    dims: Vec<(String, i64)>,
    /// Input to send instead of what the metadata says, as NAME:DATATYPE:D1,D2,…; repeatable
    #[arg(long = "tensor", value_name = "SPEC")]
    tensors: Vec<Spec>,
    /// Seed of the values and of the schedule
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

impl Inputs {
    fn dims(&self) -> Dims {
        Dims { batch: self.batch, named: BTreeMap::from_iter(self.dims.clone()) }
    }
}

impl LoadArgs {
    fn load(&self, connections: usize) -> Load {
        let Self { arrivals, inputs: Inputs { seed, .. }, .. } = *self;
        Load {
            pace: self.rate.map_or(Pace::Closed, |rate| Pace::Open { rate, arrivals, seed }),
            connections,
            streams_per_connection: self.streams_per_connection,
            threads: self.threads,
            warmup: Duration::from_secs_f64(self.warmup),
            length: Duration::from_secs_f64(self.seconds),
            timeout: Duration::from_secs_f64(self.timeout),
        }
    }
}

#[derive(Args)]
struct Run {
    /// Address of the server; its two data ports speak every protocol
    #[arg(long, default_value = "127.0.0.1:8000")]
    address: SocketAddr,
    #[arg(long)]
    model: String,
    #[arg(long, value_enum, default_value_t = Protocol::Http1)]
    protocol: Protocol,
    /// How tensors are written over HTTP; gRPC always sends raw contents
    #[arg(long, value_enum, default_value_t = Encoding::Binary)]
    encoding: Encoding,
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// Process of the server, to report its processor time and memory
    #[arg(long)]
    pid: Option<u32>,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    load: LoadArgs,
}

#[derive(Args)]
struct Floor {
    #[arg(value_enum)]
    kind: Kind,
    #[arg(long)]
    address: SocketAddr,
    #[arg(long, value_enum, default_value_t)]
    layout: Layout,
    /// 0: one per core
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

#[derive(Args)]
struct GatewayArgs {
    /// The gateway's program
    #[arg(long, value_name = "FILE")]
    gateway_binary: PathBuf,
    /// Model repository that it serves
    #[arg(long, value_name = "DIR")]
    models: PathBuf,
    /// Flag of `tidegate serve`; repeatable
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    gateway_arg: Vec<String>,
    /// Environment variable of the gateway; repeatable
    #[arg(long, value_name = "K=V", value_parser = key_value)]
    gateway_env: Vec<(String, String)>,
    /// Serve a copy of the repository in which requests are never joined
    #[arg(long)]
    batching_off: bool,
    /// Processors of the servers, such as 0,2-3
    #[arg(long, value_name = "CPUS")]
    pin_server: Option<String>,
}

impl GatewayArgs {
    fn gateway(&self) -> Gateway {
        Gateway {
            binary: self.gateway_binary.clone(),
            models: self.models.clone(),
            args: self.gateway_arg.clone(),
            env: self.gateway_env.clone(),
            batching_off: self.batching_off,
        }
    }
}

#[derive(Args)]
struct Compare {
    #[command(flatten)]
    gateway: GatewayArgs,
    /// Compare with a second gateway that has these flags besides the first one's (split at spaces; may be empty)
    #[arg(long, value_name = "ARGS", allow_hyphen_values = true)]
    against: Option<String>,
    /// Program of the second gateway
    #[arg(long, value_name = "FILE")]
    against_binary: Option<PathBuf>,
    /// Model repository of the second gateway
    #[arg(long, value_name = "DIR")]
    against_models: Option<PathBuf>,
    /// Environment variable of the second gateway, besides the first one's; repeatable
    #[arg(long, value_name = "K=V", value_parser = key_value)]
    against_env: Vec<(String, String)>,
    /// The second gateway never joins requests
    #[arg(long)]
    against_batching_off: bool,
    /// Measure no floor
    #[arg(long)]
    no_floor: bool,
    #[arg(long, value_enum, default_value_t)]
    floor_layout: Layout,
    /// Threads of a floor; 0: one per core
    #[arg(long, default_value_t = 0)]
    floor_threads: usize,
    /// Also run this model file in process (a build with the feature `inprocess`)
    #[arg(long, value_name = "FILE")]
    in_process: Option<PathBuf>,
    /// Flag of `loadtest inprocess`; repeatable
    #[arg(long, value_name = "ARG", allow_hyphen_values = true, requires = "in_process")]
    in_process_arg: Vec<String>,
    /// Models to ask, in turn
    #[arg(long = "model", value_delimiter = ',', default_value = "mlp", value_name = "NAME")]
    names: Vec<String>,
    #[arg(long = "scenario", value_enum, value_delimiter = ',', default_values_t =
        [Scenario::Http1Binary, Scenario::Http2Binary, Scenario::Grpc, Scenario::Http1Json])]
    scenarios: Vec<Scenario>,
    #[arg(long, value_delimiter = ',', default_values_t = [64, 1])]
    connections: Vec<usize>,
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Run a turn again when everything else on the machine kept more processors busy than this
    #[arg(long, value_name = "CORES", default_value_t = f64::INFINITY)]
    others_max: f64,
    /// Processors of the client, such as 0,2-3
    #[arg(long, value_name = "CPUS")]
    pin_client: Option<String>,
    /// Print every report and the ratios as JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    load: LoadArgs,
}

#[derive(Args)]
struct Start {
    #[command(flatten)]
    gateway: GatewayArgs,
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Seconds of idleness before its memory is read
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    idle: f64,
}

fn main() -> ExitCode {
    let done = match Cli::parse().command {
        Command::Run(options) => run(&options),
        Command::Floor(Floor { kind, address, layout, threads }) => {
            floor::serve(kind, address, layout, threads)
        }
        Command::Compare(options) => compare(*options),
        Command::Start(options) => start(&options),
        #[cfg(feature = "inprocess")]
        Command::Inprocess(options) => loadtest::inprocess::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Run) -> Result<()> {
    let inputs = &options.load.inputs;
    let specs = match inputs.tensors.is_empty() {
        true => drive::runtime()?.block_on(client::inputs(options.address, &options.model))?,
        false => inputs.tensors.clone(),
    };
    let tensors = tensors::random(&specs, &inputs.dims(), inputs.seed)?;
    let mut call = Call::new(options.protocol, options.encoding, &options.model, &tensors)?;
    let load = options.load.load(options.connections);
    if options.load.check {
        call.answer_len = Some(drive::first(options.address, &call, load.timeout)?);
    }
    let server = options.pid.map(Process::new).transpose()?;
    let report = drive::run(options.address, &call, &load, server)?;
    match options.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => println!("{report}"),
    }
    ensure!(report.requests > 0, "no request was answered");
    Ok(())
}

fn compare(options: Compare) -> Result<()> {
    process::end_children_on_signals()?;
    let gateway = options.gateway.gateway();
    let against = against(&options, &gateway);
    let server_cpus = options.gateway.pin_server.as_deref().map(process::cpu_set).transpose()?;
    if let Some(cpus) = &options.pin_client {
        process::pin(&process::cpu_set(cpus)?)?;
    }
    if options.in_process.is_some() && !cfg!(feature = "inprocess") {
        bail!("--in-process needs a build with --features inprocess");
    }
    let inputs = &options.load.inputs;
    let plan = Plan {
        gateway,
        against,
        floor: (!options.no_floor).then_some((options.floor_layout, options.floor_threads)),
        in_process: options
            .in_process
            .map(|model| InProcess { model, args: options.in_process_arg.clone() }),
        models: options.names,
        dims: inputs.dims(),
        inputs: inputs.tensors.clone(),
        scenarios: options.scenarios,
        connections: options.connections,
        rounds: options.rounds,
        load: options.load.load(1),
        seed: inputs.seed,
        server_cpus,
        others_max: options.others_max,
        check: options.load.check,
    };
    let json = options.json;
    let outcomes = compare::run(&plan, |outcome| {
        if !json {
            println!("{outcome}");
        }
    })?;
    if json {
        let all: Vec<_> = outcomes.iter().map(compare::Outcome::to_json).collect();
        println!("{}", serde_json::to_string_pretty(&all)?);
    }
    let errors: u64 = outcomes.iter().map(compare::Outcome::errors).sum();
    ensure!(errors == 0, "{errors} requests failed, so the figures do not count");
    Ok(())
}

fn against(options: &Compare, gateway: &Gateway) -> Option<Gateway> {
    let wanted = options.against.is_some()
        || options.against_binary.is_some()
        || options.against_models.is_some()
        || !options.against_env.is_empty()
        || options.against_batching_off;
    let more = options.against.iter().flat_map(|args| args.split_whitespace()).map(str::to_owned);
    wanted.then(|| Gateway {
        binary: options.against_binary.clone().unwrap_or_else(|| gateway.binary.clone()),
        models: options.against_models.clone().unwrap_or_else(|| gateway.models.clone()),
        args: gateway.args.iter().cloned().chain(more).collect(),
        env: gateway.env.iter().chain(&options.against_env).cloned().collect(),
        batching_off: gateway.batching_off || options.against_batching_off,
    })
}

fn start(options: &Start) -> Result<()> {
    process::end_children_on_signals()?;
    let gateway = options.gateway.gateway();
    let cpus = options.gateway.pin_server.as_deref().map(process::cpu_set).transpose()?;
    let (mut ready, mut resident) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        let server = Server::gateway(&gateway, cpus.as_ref(), None)?;
        ready.push(server.ready_after.as_secs_f64() * 1e3);
        std::thread::sleep(Duration::from_secs_f64(options.idle));
        resident.push(server.process().rss_mib()?);
    }
    let line = |name: &str, values: &[f64], unit: &str| {
        let compare::Spread { min, max, .. } = compare::Spread::of(values);
        println!("{name:14}{:8.1} {unit} ({min:.1}–{max:.1})", median(values));
    };
    line("start to ready", &ready, "ms");
    line("idle resident", &resident, "MiB");
    Ok(())
}

fn key_value(text: &str) -> Result<(String, String)> {
    let (key, value) =
        text.split_once('=').with_context(|| format!("expected K=V, got '{text}'"))?;
    Ok((key.to_owned(), value.to_owned()))
}

fn seconds(text: &str) -> Result<f64> {
    number(text, "seconds")
}

fn rate(text: &str) -> Result<f64> {
    let rate = number(text, "requests per second")?;
    ensure!(rate > 0.0, "expected requests per second above 0, got {text}");
    Ok(rate)
}

fn number(text: &str, what: &str) -> Result<f64> {
    let value: f64 = text.parse().with_context(|| format!("expected {what}, got '{text}'"))?;
    ensure!(value.is_finite() && value >= 0.0, "expected {what}, got {text}");
    Ok(value)
}
