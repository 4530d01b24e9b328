//! A gateway as a process of its own, and plain HTTP to it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde_json::Value;

const START_MAX: Duration = Duration::from_secs(120);

/// Ends with the test.
pub(crate) struct Process {
    child: Child,
    /// What it wrote to standard error, JSON.
    pub(crate) lines: Arc<Mutex<Vec<String>>>,
    pub(crate) http: SocketAddr,
}

/// Puts a model where the repository wants it.
pub(crate) fn put(repository: &Path, model: &str, content: &[u8]) {
    let folder = repository.join(model).join("1");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("model.onnx"), content).unwrap();
}

impl Process {
    /// Serves `root/models` with the state in `root/state`; `limit` is put before the program.
    pub(crate) fn start(root: &Path, config: &[(&str, &str)], limit: &str) -> Self {
        Self::start_logging(root, config, limit, "json")
    }

    pub(crate) fn start_logging(
        root: &Path,
        config: &[(&str, &str)],
        limit: &str,
        format: &str,
    ) -> Self {
        let binary = env!("CARGO_BIN_EXE_tidegate");
        let mut command = Command::new("sh");
        command.arg("-c").arg(format!("{limit} exec {binary} serve"));
        for variable in ["HTTP", "GRPC", "METRICS", "ADMIN"] {
            command.env(format!("TIDEGATE_SERVER_{variable}_ADDRESS"), "127.0.0.1:0");
        }
        command
            .env("TIDEGATE_REPOSITORY_PATH", root.join("models"))
            .env("TIDEGATE_SERVER_STATE_DIR", root.join("state"))
            // The models were written just now, whole.
            .env("TIDEGATE_REPOSITORY_QUIET_MS", "0")
            .env("TIDEGATE_LOG_FORMAT", format)
            .envs(config.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let lines = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&lines);
        std::thread::spawn(move || {
            for line in stderr.split(b'\n').map_while(Result::ok) {
                sink.lock().push(String::from_utf8_lossy(&line).into_owned());
            }
        });
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut process = Self { child, lines, http: nowhere };
        process.http = process.until(|line| {
            let Ok(line) = serde_json::from_str::<Value>(line) else {
                let (_, address) = line.split_once("protocol=\"http\" address=")?;
                return address.trim().parse().ok();
            };
            (line["protocol"] == "http").then(|| line["address"].as_str()?.parse().ok())?
        });
        process
            .until(|line| (line.contains("\"ready\"") || line.ends_with(" ready")).then_some(()));
        process
    }

    /// Waits for a line.
    fn until<T>(&mut self, wanted: impl Fn(&str) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(found) = self.lines.lock().iter().find_map(|line| wanted(line)) {
                return found;
            }
            assert!(self.alive() && start.elapsed() < START_MAX, "{:#?}", self.lines.lock());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    pub(crate) fn alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Resident memory in MiB.
    pub(crate) fn resident_mb(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
    }

    pub(crate) fn connect(&self) -> Connection {
        let stream = TcpStream::connect(self.http).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Connection(BufReader::new(stream))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// One connection, kept alive.
pub(crate) struct Connection(BufReader<TcpStream>);

/// Status, head and body.
pub(crate) type Raw = (u16, String, Vec<u8>);

impl Connection {
    pub(crate) fn get(&mut self, path: &str) -> Raw {
        self.send(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).unwrap()
    }

    pub(crate) fn post(&mut self, path: &str, headers: &str, body: &[u8]) -> Raw {
        let length = body.len();
        let head =
            format!("POST {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {length}\r\n\r\n");
        self.send(&[head.as_bytes(), body].concat()).unwrap()
    }

    /// Bytes as they are; `None` when the server hung up.
    pub(crate) fn send(&mut self, request: &[u8]) -> Option<Raw> {
        self.0.get_mut().write_all(request).ok()?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.0.read_line(&mut head).ok()? == 0 {
                return None;
            }
        }
        let status = head.split(' ').nth(1)?.parse().ok()?;
        let header = |name: &str| {
            head.lines().find_map(|line| {
                let (key, value) = line.split_once(':')?;
                key.eq_ignore_ascii_case(name).then(|| value.trim().to_owned())
            })
        };
        let length = header("content-length").map_or(0, |value| value.parse().unwrap());
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).ok()?;
        Some((status, head, body))
    }
}
