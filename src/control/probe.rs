//! Tries a model in a child process, where it can neither crash nor starve the gateway.
//!
//! ```text
//! gateway ──job, JSON on stdin──▶ `tidegate probe` ──reply, one line on stdout──▶ gateway
//! ```
//!
//! Invariants:
//! - The child limits itself before it touches the model, and dies with its parent.
//! - Whatever the child does, the caller gets a reply or a reason within the limits.

use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::ProbeLimits;
use super::trial::{Findings, Rerun};
use crate::domain::{EngineChoice, ModelSettings, Signature};

mod child;
mod parcel;

pub use child::child_main;
pub(super) use child::run_here;
pub(super) use parcel::{Parcel, pack, unpack};

/// Starts the line that holds the reply; a library may print others.
const REPLY_MARK: &str = "tidegate-probe-reply:";
/// The line that comes before recorded inputs are run.
const RECORDED_MARK: &str = "tidegate-probe-recorded";
/// Most bytes of a reply.
const REPLY_SIZE_MAX: u64 = 64 << 20;
/// How much of the end of the child's stderr is logged.
const STDERR_KEPT: usize = 4 << 10;
/// How often a running child is looked at.
const POLL: Duration = Duration::from_millis(5);
/// Variables that the child inherits; others may hold secrets, and the model is a stranger.
const INHERITED: [&str; 4] = ["ORT_DYLIB_PATH", "LD_LIBRARY_PATH", "PATH", "TZ"];

#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// The child lived and said no.
    #[error("{0}")]
    Refused(String),
    #[error("loading the model took longer than the limit of {} s", .0.as_secs_f64())]
    TimedOut(Duration),
    #[error("loading the model took more processor time than the limit of {} s", .0.as_secs_f64())]
    Processor(Duration),
    #[error("loading the model took more memory than the limit of {0} bytes")]
    Memory(u64),
    #[error("loading the model wrote a file larger than the limit of {0} bytes")]
    FileSize(u64),
    #[error("loading the model crashed the engine ({0})")]
    Crashed(String),
    /// It came so far as to be warmed with what other versions were asked.
    #[error("running recorded inputs of this model: {0}")]
    Recorded(Box<Self>),
    #[error("could not try the model in a child process: {0}")]
    Start(#[from] io::Error),
}

impl ProbeError {
    /// Whether it may go better another time.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::TimedOut(_) | Self::Start(_) => true,
            Self::Recorded(error) => error.is_passing(),
            _ => false,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Order {
    /// So that a child whose parent died before it could ask to be told ends too.
    parent: u32,
    limits: ProbeLimits,
    job: Job,
}

#[derive(Serialize, Deserialize)]
pub(super) enum Job {
    /// Which files of external data a model file names.
    ExternalData {
        model: PathBuf,
    },
    Trial(Box<TrialJob>),
    Run(RunJob),
}

/// Load and run once.
#[derive(Serialize, Deserialize)]
pub(super) struct RunJob {
    pub(super) engine: EngineChoice,
    pub(super) ort_library: Option<PathBuf>,
    pub(super) model: PathBuf,
    pub(super) inputs: Vec<Parcel>,
}

/// What a run gave.
#[derive(Serialize, Deserialize)]
pub(super) struct Ran {
    /// Name and version.
    pub(super) engine: String,
    pub(super) outputs: Vec<Parcel>,
}

/// Load, warm, find out about batching, compare samples.
#[derive(Serialize, Deserialize)]
pub(super) struct TrialJob {
    pub(super) engine: EngineChoice,
    pub(super) ort_library: Option<PathBuf>,
    pub(super) model: PathBuf,
    pub(super) derived: Option<PathBuf>,
    pub(super) intra_threads: usize,
    pub(super) settings: ModelSettings,
    /// Name and text of each samples file.
    pub(super) samples: Vec<(String, String)>,
    /// What the model was asked lately.
    pub(super) recorded: Vec<Vec<Parcel>>,
}

/// What a passed trial tells.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Report {
    pub(super) engine: String,
    /// `batched` is as it was found, not as the graph suggests.
    pub(super) signature: Signature,
    pub(super) findings: Findings,
    pub(super) samples: usize,
    /// Of the recorded inputs; part of the answer, and no part of the verdict.
    #[serde(default)]
    pub(super) rerun: Rerun,
    /// Peak resident memory of the child.
    pub(super) memory_bytes: u64,
    pub(super) load_ms: u64,
}

/// Runs `job` in a child and waits for its reply.
pub(super) fn run<R: DeserializeOwned>(
    program: &Path,
    limits: &ProbeLimits,
    job: Job,
) -> Result<R, ProbeError> {
    let order = Order { parent: std::process::id(), limits: *limits, job };
    let order = serde_json::to_vec(&order).map_err(io::Error::from)?;
    let mut child = command(program).spawn()?;
    let mut stdin = child.stdin.take();
    let stdout = child.stdout.take();
    let stderr = child.stderr.take();
    let (status, reply, stderr) = std::thread::scope(|scope| -> io::Result<_> {
        let thread = || std::thread::Builder::new().name("probe".to_owned());
        let write = move || stdin.take().map(|mut stdin| stdin.write_all(&order));
        // A child that dies early leaves a broken pipe, and its status says more than that.
        let threads = thread().spawn_scoped(scope, write).and_then(|_| {
            let reply = thread().spawn_scoped(scope, move || read_reply(stdout))?;
            Ok((reply, thread().spawn_scoped(scope, move || read_tail(stderr))?))
        });
        let (reply, stderr) = match threads {
            Ok(threads) => threads,
            Err(error) => {
                child.kill()?;
                child.wait()?;
                return Err(error);
            }
        };
        let status = wait(&mut child, limits.wall_max)?;
        Ok((status, reply.join().unwrap_or_default(), stderr.join().unwrap_or_default()))
    })?;
    let said = |mark: &str| reply.lines().rev().find_map(|line| line.strip_prefix(mark));
    // Why there is no verdict, and how far it had come.
    let ended = |error: ProbeError| match said(RECORDED_MARK) {
        Some(_) => ProbeError::Recorded(Box::new(error)),
        None => error,
    };
    if !stderr.trim().is_empty() {
        tracing::warn!(stderr = stderr.trim(), "the child process that tried a model said");
    }
    let Some(status) = status else { return Err(ended(ProbeError::TimedOut(limits.wall_max))) };
    match said(REPLY_MARK) {
        Some(reply) => {
            let reply: Result<R, String> = serde_json::from_str(reply).map_err(io::Error::from)?;
            reply.map_err(|why| ended(ProbeError::Refused(why)))
        }
        None => Err(ended(death(status, limits, &stderr))),
    }
}

fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("probe").env_clear().env("ORT_DISABLE_TELEMETRY", "1");
    for name in INHERITED {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// The child's end; `None` when it had to be killed.
fn wait(child: &mut Child, wall_max: Duration) -> io::Result<Option<ExitStatus>> {
    let end = Instant::now() + wall_max;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status));
        }
        if Instant::now() >= end {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

fn read_reply(stdout: Option<impl Read>) -> String {
    let mut text = Vec::new();
    // What came before an error may hold a mark all the same.
    stdout.map(|stdout| stdout.take(REPLY_SIZE_MAX).read_to_end(&mut text).ok());
    String::from_utf8_lossy(&text).into_owned()
}

/// The last bytes, however much there is.
fn read_tail(stderr: Option<impl Read>) -> String {
    let mut tail = Vec::new();
    let mut buffer = [0; 4096];
    if let Some(mut stderr) = stderr {
        while let Ok(read @ 1..) = stderr.read(&mut buffer) {
            tail.extend_from_slice(&buffer[..read]);
            let surplus = tail.len().saturating_sub(STDERR_KEPT);
            tail.drain(..surplus);
        }
    }
    String::from_utf8_lossy(&tail).into_owned()
}

/// Why a child that gave no reply ended.
fn death(status: ExitStatus, limits: &ProbeLimits, stderr: &str) -> ProbeError {
    let out_of_memory = ["memory allocation of", "bad_alloc", "out of memory"];
    if out_of_memory.iter().any(|text| stderr.contains(text)) {
        return ProbeError::Memory(limits.memory_max_bytes);
    }
    match status.signal() {
        Some(libc::SIGXCPU) => ProbeError::Processor(limits.cpu_max),
        Some(libc::SIGXFSZ) => ProbeError::FileSize(limits.memory_max_bytes),
        // Not from us: a timeout was told apart before. The hard CPU limit and the kernel's
        // out-of-memory killer send it.
        Some(libc::SIGKILL) => ProbeError::Crashed("killed by the system".to_owned()),
        Some(libc::SIGSEGV) => ProbeError::Crashed("segmentation fault".to_owned()),
        Some(libc::SIGABRT) => ProbeError::Crashed("abort".to_owned()),
        Some(signal) => ProbeError::Crashed(format!("signal {signal}")),
        None => ProbeError::Crashed(status.to_string()),
    }
}
