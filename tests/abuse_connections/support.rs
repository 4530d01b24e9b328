//! The gateway as a child process, and clients that write what they like.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::{Duration, Instant};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

/// Longer than anything here takes unless it hangs.
pub(crate) const FOREVER: Duration = Duration::from_secs(60);

/// `tidegate serve` with one model: `echo` gives its rows of two FP32 back.
pub(crate) struct Server {
    child: Child,
    pub(crate) http: SocketAddr,
    metrics: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Server {
    /// Starts with `settings`, lines of the section `[server]`, under `limits`, arguments of
    /// `prlimit`.
    pub(crate) async fn start(settings: &str, limits: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let version = folder.path().join("models/echo/1");
        std::fs::create_dir_all(&version).unwrap();
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        std::fs::copy(fixtures.join("identity_fp32.onnx"), version.join("model.onnx")).unwrap();
        let rows = "[batch]\nrows_max = 1048576\n";
        std::fs::write(folder.path().join("models/echo/tidegate.toml"), rows).unwrap();
        let config = folder.path().join("gateway.toml");
        let settings = format!(
            "[server]\nhttp_address = '127.0.0.1:0'\ngrpc_address = '127.0.0.1:0'\n\
             metrics_address = '127.0.0.1:0'\nadmin_address = '127.0.0.1:0'\n{settings}\n\
             [log]\nformat = 'json'\n[engine]\nengine = 'tract'\n[probe]\nenabled = false\n"
        );
        std::fs::write(&config, settings).unwrap();
        let program = env!("CARGO_BIN_EXE_tidegate");
        let mut command = match limits {
            [] => Command::new(program),
            limits => {
                let mut command = Command::new("prlimit");
                command.args(limits).arg(program);
                command
            }
        };
        let mut child = command
            .args(["serve", "--config"])
            .arg(&config)
            .arg("--model-repository")
            .arg(folder.path().join("models"))
            .arg("--state-dir")
            .arg(folder.path().join("state"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let [http, metrics] = addresses(child.stderr.take().unwrap());
        let server = Self { child, http, metrics, _folder: folder };
        let start = Instant::now();
        while !server.is_ready().await {
            assert!(start.elapsed() < FOREVER, "not ready");
            sleep(Duration::from_millis(20)).await;
        }
        server
    }

    async fn is_ready(&self) -> bool {
        let request = "GET /v2/health/ready HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        ask(self.http, request.as_bytes()).await.is_ok_and(|answer| answer.is_ok())
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Resident memory in MiB.
    pub(crate) fn resident_mib(&self) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        let kib: f64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        kib / 1024.0
    }

    /// Sum of a metric's series whose line holds `label`.
    pub(crate) async fn metric(&self, name: &str, label: &str) -> f64 {
        let request = "GET /metrics HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
        let page = ask(self.metrics, request.as_bytes()).await.unwrap();
        let page = String::from_utf8(page.bytes).unwrap();
        let series = page.lines().filter(|line| {
            let rest = line.strip_prefix(name);
            rest.is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(label)
        });
        series.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    /// Waits until `name` has the value, as gauges have some time after.
    pub(crate) async fn metric_becomes(&self, name: &str, label: &str, value: f64) {
        let start = Instant::now();
        loop {
            let now = self.metric(name, label).await;
            if (now - value).abs() < 0.5 {
                return;
            }
            assert!(start.elapsed() < FOREVER, "{name} {label} is {now}, expected {value}");
            sleep(Duration::from_millis(50)).await;
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Reads the log until both listeners are up, and goes on reading it so that it never blocks.
fn addresses(log: std::process::ChildStderr) -> [SocketAddr; 2] {
    let mut lines = BufReader::new(log).lines();
    let mut seen = Vec::new();
    let mut found = |protocol: &str| loop {
        let line = lines.next().unwrap_or_else(|| panic!("ended: {}", seen.join("\n"))).unwrap();
        seen.push(line.clone());
        if !line.contains("listening") || !line.contains(&format!("\"{protocol}\"")) {
            continue;
        }
        let (_, rest) = line.split_once("\"address\":\"").unwrap();
        break rest.split('"').next().unwrap().parse::<SocketAddr>().unwrap();
    };
    let addresses = [found("http"), found("metrics")];
    let print = std::env::var_os("ABUSE_LOG").is_some();
    std::thread::spawn(move || {
        for line in lines.map_while(Result::ok) {
            if print {
                println!("{line}");
            }
        }
    });
    addresses
}

/// What came back.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) bytes: Vec<u8>,
}

impl Answer {
    pub(crate) fn is_ok(&self) -> bool {
        self.bytes.starts_with(b"HTTP/1.1 200")
    }
}

/// Sends `request`, which asks to close, and reads to the end.
pub(crate) async fn ask(address: SocketAddr, request: &[u8]) -> std::io::Result<Answer> {
    timeout(FOREVER, async {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(request).await?;
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await?;
        Ok(Answer { bytes })
    })
    .await
    .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
}

/// Waits for the server to close, reading nothing of use; `None` when it does not in time.
pub(crate) async fn closed(stream: &mut TcpStream, within: Duration) -> Option<Duration> {
    let start = Instant::now();
    let mut buffer = [0; 4096];
    loop {
        let left = within.checked_sub(start.elapsed())?;
        match timeout(left, stream.read(&mut buffer)).await {
            Err(_) => return None,
            Ok(Ok(0) | Err(_)) => return Some(start.elapsed()),
            Ok(Ok(_)) => {}
        }
    }
}

/// A prediction of `rows` rows as binary tensors.
pub(crate) fn infer(rows: usize, extra: &str) -> Vec<u8> {
    let bytes = rows * 8;
    let json = format!(
        r#"{{"inputs":[{{"name":"x","datatype":"FP32","shape":[{rows},2],"parameters":{{"binary_data_size":{bytes}}}}}],"outputs":[{{"name":"y","parameters":{{"binary_data":true}}}}]}}"#
    );
    let mut request = format!(
        "POST /v2/models/echo/infer HTTP/1.1\r\nhost: a\r\n{extra}\
         inference-header-content-length: {}\r\ncontent-length: {}\r\n\r\n{json}",
        json.len(),
        json.len() + bytes
    )
    .into_bytes();
    request.resize(request.len() + bytes, 0);
    request
}

/// A well-behaved client beside the hostile ones: 20 predictions a second, each on a connection of
/// its own.
pub(crate) struct Control {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Seen>,
}

/// What the well-behaved client saw.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    pub(crate) sent: usize,
    pub(crate) failures: Vec<String>,
    times: Vec<Duration>,
}

impl Seen {
    pub(crate) fn percentile_ms(&self, of_hundred: usize) -> f64 {
        let mut times = self.times.clone();
        times.sort();
        let at = (times.len() * of_hundred / 100).min(times.len().saturating_sub(1));
        times.get(at).copied().unwrap_or_default().as_secs_f64() * 1e3
    }

    pub(crate) fn unharmed(&self) {
        assert!(self.sent > 0, "the control client was never heard");
        assert!(self.failures.is_empty(), "of {}: {:?}", self.sent, self.failures);
    }
}

impl Control {
    pub(crate) fn start(address: SocketAddr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let task = tokio::spawn(async move {
            let request = infer(1, "connection: close\r\n");
            let mut seen = Seen::default();
            while !stopped.load(Relaxed) {
                let start = Instant::now();
                seen.sent += 1;
                match ask(address, &request).await {
                    Ok(answer) if answer.is_ok() => seen.times.push(start.elapsed()),
                    other => seen.failures.push(format!("{other:?}")),
                }
                sleep(Duration::from_millis(50).saturating_sub(start.elapsed())).await;
            }
            seen
        });
        Self { stop, task }
    }

    pub(crate) async fn stop(self) -> Seen {
        self.stop.store(true, Relaxed);
        self.task.await.unwrap()
    }
}

/// HTTP/2 by hand.
pub(crate) mod h2 {
    pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    pub(crate) const DATA: u8 = 0;
    pub(crate) const HEADERS: u8 = 1;
    pub(crate) const PRIORITY: u8 = 2;
    pub(crate) const RST_STREAM: u8 = 3;
    pub(crate) const SETTINGS: u8 = 4;
    pub(crate) const PING: u8 = 6;
    pub(crate) const WINDOW_UPDATE: u8 = 8;
    pub(crate) const CONTINUATION: u8 = 9;
    pub(crate) const END_STREAM: u8 = 1;
    pub(crate) const END_HEADERS: u8 = 4;
    /// Initial window, as a setting.
    pub(crate) const WINDOW: u16 = 4;

    pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags];
        frame.extend_from_slice(&stream.to_be_bytes());
        frame.extend_from_slice(payload);
        frame
    }

    pub(crate) fn setting(name: u16, value: u32) -> Vec<u8> {
        let mut payload = name.to_be_bytes().to_vec();
        payload.extend_from_slice(&value.to_be_bytes());
        payload
    }

    /// Preface and settings.
    pub(crate) fn hello(settings: &[u8]) -> Vec<u8> {
        let mut hello = PREFACE.to_vec();
        hello.extend(frame(SETTINGS, 0, 0, settings));
        hello
    }

    /// A header that is in no table and goes into none.
    pub(crate) fn header(name: &str, value: &str) -> Vec<u8> {
        let mut header = vec![0];
        for text in [name, value] {
            assert!(text.len() < 127, "one byte of length");
            header.push(u8::try_from(text.len()).unwrap());
            header.extend_from_slice(text.as_bytes());
        }
        header
    }

    pub(crate) fn head(method: &str, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
        let mut block = Vec::new();
        let usual =
            [(":method", method), (":scheme", "http"), (":path", path), (":authority", "a")];
        for (name, value) in usual.iter().chain(more) {
            block.extend(header(name, value));
        }
        block
    }
}

/// Raises the limit of descriptors as far as it goes, and gives how many connections that is.
pub(crate) fn descriptors() -> usize {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        println!("the limit of descriptors stays: {error}");
    }
    let current = getrlimit(Resource::Nofile).current.unwrap_or(1 << 20);
    usize::try_from(current.min(1 << 20)).unwrap() - 100
}
