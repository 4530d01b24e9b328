//! The gateway as a process: started, looked at, killed, started again over the same folders.

use std::fmt;
use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::Value;

use crate::admin::Admin;

/// A busy machine starts programs slowly.
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(3);
/// Lines of its log that are kept, the first ones.
const LINES_MAX: usize = 20_000;

/// Ends with the test.
pub(crate) struct Gateway {
    child: Child,
    /// What it wrote to standard error, JSON.
    lines: Arc<Mutex<Vec<String>>>,
    pub(crate) http: SocketAddr,
    pub(crate) grpc: SocketAddr,
    pub(crate) admin: SocketAddr,
    token: String,
    /// From its start until it said that it was ready.
    pub(crate) ready_after: Duration,
}

/// What a process holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    pub(crate) resident_kib: u64,
    pub(crate) threads: u64,
    /// But for sockets, of which there are as many as clients like.
    pub(crate) descriptors: usize,
    pub(crate) sockets: usize,
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resident_kib, threads, descriptors, sockets } = self;
        let mib = resident_kib / 1024;
        write!(f, "{mib} MiB, {threads} threads, {descriptors} files and {sockets} sockets")
    }
}

impl Gateway {
    /// Serves `root/models` with the state in `root/state`, and is ready.
    pub(crate) fn start(root: &Path, settings: &[(&str, &str)]) -> Self {
        let started = Instant::now();
        let mut gateway = Self::listen(root, settings);
        gateway.until(|line| (line["message"] == "ready").then_some(()));
        gateway.ready_after = started.elapsed();
        gateway.admin = gateway.address("admin");
        let token = root.join("state").join("admin-token");
        gateway.token = std::fs::read_to_string(token).unwrap().trim().to_owned();
        gateway
    }

    /// Takes predictions, and is not ready yet.
    pub(crate) fn listen(root: &Path, settings: &[(&str, &str)]) -> Self {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
        command.arg("serve");
        for variable in ["HTTP", "GRPC", "METRICS", "ADMIN"] {
            command.env(format!("TIDEGATE_SERVER_{variable}_ADDRESS"), "127.0.0.1:0");
        }
        command
            .env("TIDEGATE_REPOSITORY_PATH", root.join("models"))
            .env("TIDEGATE_SERVER_STATE_DIR", root.join("state"))
            .env("TIDEGATE_LOG_FORMAT", "json")
            .envs(settings.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in stderr.split(b'\n').map_while(Result::ok) {
                let mut lines = sink.lock();
                if lines.len() < LINES_MAX {
                    lines.push(String::from_utf8_lossy(&line).into_owned());
                }
            }
        });
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let (token, ready_after) = (String::new(), Duration::ZERO);
        let (http, grpc, admin) = (nowhere, nowhere, nowhere);
        let mut gateway = Self { child, lines, http, grpc, admin, token, ready_after };
        gateway.http = gateway.address("http");
        gateway.grpc = gateway.address("grpc");
        gateway
    }

    /// Waits for a line of its log.
    pub(crate) fn until<T>(&mut self, wanted: impl Fn(&Value) -> Option<T>) -> T {
        let (start, mut read) = (Instant::now(), 0);
        loop {
            let lines = self.lines.lock().clone();
            let news = lines[read..].iter().filter_map(|line| serde_json::from_str(line).ok());
            if let Some(found) = news.into_iter().find_map(|line: Value| wanted(&line)) {
                return found;
            }
            read = lines.len();
            assert!(self.alive() && start.elapsed() < PATIENCE, "{:#?}", self.lines.lock());
            std::thread::sleep(POLL);
        }
    }

    fn address(&mut self, protocol: &str) -> SocketAddr {
        self.until(|line| {
            let said = line["protocol"] == protocol;
            said.then(|| line["address"].as_str()?.parse().ok())?
        })
    }

    /// Whether it said that it is ready.
    pub(crate) fn is_ready(&self) -> bool {
        self.lines.lock().iter().any(|line| line.contains("\"message\":\"ready\""))
    }

    pub(crate) fn alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A connection to its admin listener, with the token that it made.
    pub(crate) fn admin(&self) -> Admin {
        Admin::new(self.admin, &self.token)
    }

    /// As kill -9 does; gives the moment after which nothing of it can answer.
    pub(crate) fn kill(&mut self) -> Instant {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
        Instant::now()
    }

    pub(crate) fn usage(&self) -> Usage {
        let process = Path::new("/proc").join(self.pid().to_string());
        let status = std::fs::read_to_string(process.join("status")).unwrap();
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
            line.trim().trim_end_matches(" kB").parse().unwrap()
        };
        let open = std::fs::read_dir(process.join("fd")).unwrap().filter_map(Result::ok);
        let targets = open.filter_map(|entry| std::fs::read_link(entry.path()).ok());
        let is_socket = |target: &PathBuf| target.to_string_lossy().starts_with("socket:");
        let (sockets, others): (Vec<PathBuf>, Vec<PathBuf>) = targets.partition(is_socket);
        Usage {
            resident_kib: field("VmRSS:"),
            threads: field("Threads:"),
            descriptors: others.len(),
            sockets: sockets.len(),
        }
    }

    /// Its children that try models.
    pub(crate) fn probes(&self) -> Vec<i32> {
        let processes = std::fs::read_dir("/proc").unwrap().filter_map(Result::ok);
        let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let parent = self.pid().to_string();
        let ours = |id: &i32| {
            let stat = std::fs::read_to_string(format!("/proc/{id}/stat")).unwrap_or_default();
            // The name in parentheses may hold blanks.
            let after = stat.rsplit(')').next().unwrap_or_default();
            let command = std::fs::read(format!("/proc/{id}/cmdline")).unwrap_or_default();
            after.split_whitespace().nth(1) == Some(&parent)
                && command.split(|byte| *byte == 0).any(|word| word == b"probe")
        };
        ids.filter(ours).collect()
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
