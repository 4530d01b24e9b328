//! Starts gateways and floors as child processes on free loopback ports, and waits until they serve.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use http::StatusCode;
use nix::sched::CpuSet;
use tempfile::TempDir;

use crate::client;
use crate::drive;
use crate::floor::{Kind, Layout};
use crate::process::{Process, Running, free_address};
use crate::repository;

const READY_WITHIN: Duration = Duration::from_secs(60);
const READY_POLL: Duration = Duration::from_millis(1);

/// How to start a gateway.
#[derive(Clone, Debug)]
pub struct Gateway {
    pub binary: PathBuf,
    pub models: PathBuf,
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    /// Serves a copy of the repository in which requests are never joined.
    pub batching_off: bool,
}

/// A server that is ready.
pub struct Server {
    pub address: SocketAddr,
    pub ready_after: Duration,
    running: Running,
    /// State of a gateway and its copy of the repository, deleted with it.
    _folder: Option<TempDir>,
}

impl Server {
    #[must_use]
    pub fn process(&self) -> Process {
        self.running.process
    }

    /// Starts a gateway; `log` keeps its standard error.
    ///
    /// # Errors
    /// When it is not ready in time.
    pub fn gateway(gateway: &Gateway, cpus: Option<&CpuSet>, log: Option<&Path>) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let models = match gateway.batching_off {
            true => repository::without_batching(&gateway.models, &folder.path().join("models"))?,
            false => gateway.models.clone(),
        };
        let address = free_address()?;
        let mut command = Command::new(&gateway.binary);
        command.arg("serve").arg("--model-repository").arg(models);
        command.args(["--http-address", &address.to_string()]);
        for other in ["--grpc-address", "--metrics-address", "--admin-address"] {
            command.args([other, &free_address()?.to_string()]);
        }
        command.arg("--state-dir").arg(folder.path().join("state")).args(&gateway.args);
        command.envs(gateway.env.iter().cloned()).stdout(Stdio::null()).stdin(Stdio::null());
        let log = log.map_or_else(|| folder.path().join("log"), Path::to_path_buf);
        command.stderr(std::fs::File::create(&log)?);
        let started = Instant::now();
        let mut running = Running::start(command, cpus)?;
        let runtime = drive::runtime()?;
        let ready = || {
            let answer = runtime.block_on(client::get(address, "/v2/health/ready"));
            answer.is_ok_and(|(status, _)| status == StatusCode::OK)
        };
        wait(&mut running, started, ready).with_context(|| {
            let said = std::fs::read_to_string(&log).unwrap_or_default();
            format!("{} said:\n{said}", gateway.binary.display())
        })?;
        Ok(Self { address, ready_after: started.elapsed(), running, _folder: Some(folder) })
    }

    /// Starts this program as a floor.
    ///
    /// # Errors
    /// When it does not listen in time.
    pub fn floor(
        kind: Kind,
        layout: Layout,
        threads: usize,
        cpus: Option<&CpuSet>,
    ) -> Result<Self> {
        let own = std::env::current_exe()?;
        Self::floor_of(&own, kind, layout, threads, cpus)
    }

    /// Starts `program`, a build of this one, as a floor.
    ///
    /// # Errors
    /// When it does not listen in time.
    pub fn floor_of(
        program: &Path,
        kind: Kind,
        layout: Layout,
        threads: usize,
        cpus: Option<&CpuSet>,
    ) -> Result<Self> {
        let address = free_address()?;
        let name = |value: &dyn Fn() -> Option<clap::builder::PossibleValue>| {
            value().map(|value| value.get_name().to_owned()).unwrap_or_default()
        };
        let mut command = Command::new(program);
        command.arg("floor").arg(name(&|| clap::ValueEnum::to_possible_value(&kind)));
        command.args(["--address", &address.to_string(), "--threads", &threads.to_string()]);
        command.args(["--layout", &name(&|| clap::ValueEnum::to_possible_value(&layout))]);
        let started = Instant::now();
        let mut running = Running::start(command, cpus)?;
        wait(&mut running, started, || TcpStream::connect(address).is_ok())?;
        Ok(Self { address, ready_after: started.elapsed(), running, _folder: None })
    }
}

fn wait(running: &mut Running, started: Instant, ready: impl Fn() -> bool) -> Result<()> {
    while !ready() {
        if !running.is_running() {
            bail!("the server has ended before it was ready");
        }
        if started.elapsed() > READY_WITHIN {
            bail!("the server is not ready after {READY_WITHIN:?}");
        }
        std::thread::sleep(READY_POLL);
    }
    Ok(())
}
