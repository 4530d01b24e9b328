//! ONNX Runtime without a server: callers that share a pool of sessions, as a gateway's lanes do.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use clap::Args;
use ort::environment::Environment;
use ort::logging::LogLevel;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::session::{Session, SessionInputValue};
use ort::value::{Tensor as Value, TensorElementType, ValueType};

use crate::process::Process;
use crate::record::{Record, Report, Usage, Window};
use crate::tensors::{self, Dims, Spec, Tensor};

/// Where the library is, as for the gateway.
const LIBRARY_VARIABLE: &str = "ORT_DYLIB_PATH";
const LIBRARY: &str = "libonnxruntime.so";

#[derive(Args)]
pub struct Options {
    /// The ONNX file
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    /// Callers, each with one request at a time
    #[arg(long, default_value_t = 8)]
    connections: usize,
    /// Sessions that they share; 0: one per core
    #[arg(long, default_value_t = 0)]
    sessions: usize,
    /// Threads inside one run
    #[arg(long, default_value_t = 1)]
    intra_threads: usize,
    /// Length of the measured part, in seconds
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// Seconds before it that are not counted
    #[arg(long, default_value_t = 0.5)]
    warmup: f64,
    /// Rows: the first dimension where it is free
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(i64).range(1..))]
    batch: i64,
    /// Size of another free dimension, as INPUT.AXIS=SIZE; repeatable
    #[arg(long = "dim", value_name = "INPUT.AXIS=SIZE", value_parser = crate::tensors::dim)]
    dims: Vec<(String, i64)>,
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Print the report as JSON
    #[arg(long)]
    json: bool,
}

/// Runs the model and prints the report.
///
/// # Errors
/// When there is no ONNX Runtime, or it cannot run the model.
pub fn run(options: &Options) -> Result<()> {
    let report = measure(options)?;
    match options.json {
        true => println!("{}", serde_json::to_string_pretty(&report)?),
        false => println!("{report}"),
    }
    Ok(())
}

fn measure(options: &Options) -> Result<Report> {
    ensure!(options.connections > 0, "expected connections, got 0");
    let library = std::env::var_os(LIBRARY_VARIABLE).unwrap_or_else(|| LIBRARY.into());
    let environment = ort::init_from(&library)
        .map_err(|error| anyhow!("ONNX Runtime at {}: {error}", library.display()))?
        .with_telemetry(false)
        .build()?;
    environment.set_log_level(LogLevel::Error);
    let count = match options.sessions {
        0 => (std::thread::available_parallelism()?.get() / options.intra_threads.max(1)).max(1),
        count => count,
    };
    let sessions: Vec<Session> = (0..count)
        .map(|_| session(&environment, &options.model, options.intra_threads))
        .collect::<Result<_>>()?;
    let specs = sessions.first().map(specs).context("no session")??;
    let dims = Dims { batch: options.batch, named: options.dims.iter().cloned().collect() };
    let inputs = tensors::random(&specs, &dims, options.seed)?;
    let pool = Pool { free: Mutex::new(sessions), given_back: Condvar::new() };
    load(options, &pool, &inputs)
}

fn session(environment: &Environment, model: &Path, intra_threads: usize) -> Result<Session> {
    let plain = |error: ort::Error<SessionBuilder>| anyhow!("{error}");
    let mut builder = SessionBuilder::new(environment)?
        .with_optimization_level(GraphOptimizationLevel::All)
        .map_err(plain)?
        .with_intra_threads(intra_threads.max(1))
        .map_err(plain)?
        .with_intra_op_spinning(false)
        .map_err(plain)?;
    builder.commit_from_file(model).with_context(|| format!("cannot load {}", model.display()))
}

fn specs(session: &Session) -> Result<Vec<Spec>> {
    let spec = |input: &ort::value::Outlet| match input.dtype() {
        ValueType::Tensor { ty, shape, .. } => Ok(Spec {
            name: input.name().to_owned(),
            datatype: datatype(*ty)?.to_owned(),
            shape: shape.to_vec(),
        }),
        other => Err(anyhow!("input '{}' is no tensor: {other}", input.name())),
    };
    session.inputs().iter().map(spec).collect()
}

fn datatype(element: TensorElementType) -> Result<&'static str> {
    Ok(match element {
        TensorElementType::Float32 => "FP32",
        TensorElementType::Float64 => "FP64",
        TensorElementType::Int64 => "INT64",
        TensorElementType::Int32 => "INT32",
        other => return Err(anyhow!("inputs of type {other} are not made in process")),
    })
}

/// A pool that callers wait at.
struct Pool {
    free: Mutex<Vec<Session>>,
    given_back: Condvar,
}

impl Pool {
    fn with<T>(&self, run: impl FnOnce(&mut Session) -> T) -> T {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut session = loop {
            if let Some(session) = free.pop() {
                break session;
            }
            free = self.given_back.wait(free).unwrap_or_else(PoisonError::into_inner);
        };
        drop(free);
        let value = run(&mut session);
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(session);
        self.given_back.notify_one();
        value
    }
}

fn load(options: &Options, pool: &Pool, inputs: &[Tensor]) -> Result<Report> {
    let answer_bytes = pool.with(|session| once(session, inputs))?;
    let length = Duration::from_secs_f64(options.seconds);
    let start = Instant::now() + Duration::from_secs_f64(options.warmup);
    let window = Window { start, end: start + length };
    let own = Process::new(std::process::id())?;
    let all = Arc::new(Mutex::new(Record::default()));
    let locked = || all.lock().unwrap_or_else(PoisonError::into_inner);
    let (mut cpu, mut system) = (Duration::ZERO, Duration::ZERO);
    std::thread::scope(|scope| -> Result<()> {
        let caller = || -> Result<()> {
            let mut record = Record::default();
            while Instant::now() < window.end {
                let sent = Instant::now();
                pool.with(|session| once(session, inputs))?;
                let now = Instant::now();
                if window.has(now) {
                    record.answered += 1;
                    record.latency(now - sent);
                }
            }
            locked().add(&record);
            Ok(())
        };
        let callers: Vec<_> = (0..options.connections).map(|_| scope.spawn(caller)).collect();
        std::thread::sleep(window.start.saturating_duration_since(Instant::now()));
        let before = own.cpu()?;
        std::thread::sleep(window.end.saturating_duration_since(Instant::now()));
        let after = own.cpu()?;
        (cpu, system) = (after.total - before.total, after.system.saturating_sub(before.system));
        callers
            .into_iter()
            .try_for_each(|caller| caller.join().map_err(|_| anyhow!("a caller panicked"))?)
    })?;
    let record = std::mem::take(&mut *locked());
    let usage = Usage {
        cpu_us_per_request: cpu.as_secs_f64() * 1e6 / record.answered.max(1) as f64,
        cores: cpu.as_secs_f64() / options.seconds,
        system_share: (system.as_secs_f64() / cpu.as_secs_f64().max(1e-9)).min(1.0),
        rss_mib: own.rss_mib()?,
    };
    Ok(Report {
        seconds: options.seconds,
        requests: record.answered,
        requests_per_s: record.answered as f64 / options.seconds,
        latency_us: record.latencies(),
        server: Some(usage),
        request_bytes: inputs.iter().map(|input| input.raw.len()).sum(),
        answer_bytes,
        ..Report::default()
    })
}

/// One run, with the inputs copied in and the outputs' size as proof that it ran.
fn once(session: &mut Session, inputs: &[Tensor]) -> Result<usize> {
    let values = inputs
        .iter()
        .map(|input| Ok((input.name.as_str(), value(input)?)))
        .collect::<Result<Vec<_>>>()?;
    let outputs = session.run(values)?;
    let elements = |value: ort::value::ValueRef<'_>| match value.dtype() {
        ValueType::Tensor { shape, .. } => shape.num_elements(),
        _ => 0,
    };
    Ok(outputs.values().map(elements).sum::<usize>() * size_of::<f32>())
}

fn value(input: &Tensor) -> Result<SessionInputValue<'static>> {
    let shape = input.shape.clone();
    fn elements<T, const N: usize>(raw: &[u8], of: fn([u8; N]) -> T) -> Vec<T> {
        raw.as_chunks::<N>().0.iter().map(|chunk| of(*chunk)).collect()
    }
    let raw = &input.raw;
    Ok(match input.datatype.as_str() {
        "FP32" => Value::from_array((shape, elements(raw, f32::from_le_bytes)))?.into(),
        "FP64" => Value::from_array((shape, elements(raw, f64::from_le_bytes)))?.into(),
        "INT64" => Value::from_array((shape, elements(raw, i64::from_le_bytes)))?.into(),
        _ => Value::from_array((shape, elements(raw, i32::from_le_bytes)))?.into(),
    })
}
