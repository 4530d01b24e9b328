//! The real program in front of identity models, watched from outside.

use std::collections::VecDeque;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

pub(crate) struct Gateway {
    child: Child,
    /// The last lines of its log.
    log: Arc<Mutex<VecDeque<String>>>,
    pub(crate) data: SocketAddr,
    metrics: SocketAddr,
    _folder: tempfile::TempDir,
}

pub(crate) const MODELS: [&str; 4] =
    ["identity_fp32", "identity_int64", "identity_bytes", "identity_bool"];

impl Gateway {
    /// Starts the program; `server` are further keys of its `[server]` section.
    pub(crate) fn start(server: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        for model in MODELS {
            let version = folder.path().join("models").join(model).join("1");
            std::fs::create_dir_all(&version).unwrap();
            let file = fixtures.join(format!("{model}.onnx"));
            std::fs::copy(file, version.join("model.onnx")).unwrap();
        }
        let root = folder.path().display();
        let config = format!(
            "[server]\nhttp_address = '127.0.0.1:0'\ngrpc_address = '127.0.0.1:0'\n\
             metrics_address = '127.0.0.1:0'\nstate_dir = '{root}/state'\n{server}\n\
             [repository]\npath = '{root}/models'\n[models]\ndefault = 'identity_fp32'\n\
             [engine]\nengine = 'tract'\n[probe]\nenabled = false\n[log]\naccess = 'off'\n"
        );
        let file = folder.path().join("tidegate.toml");
        std::fs::write(&file, config).unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_tidegate"))
            .args(["serve", "--config"])
            .arg(&file)
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let (mut data, mut metrics) = (None, None);
        for line in lines.by_ref() {
            let line = line.unwrap();
            let address = line.rsplit("address=").next().and_then(|text| text.trim().parse().ok());
            match address {
                Some(address) if line.contains("protocol=\"http\"") => data = Some(address),
                Some(address) if line.contains("protocol=\"metrics\"") => metrics = Some(address),
                _ if line.trim_end().ends_with(" ready") || line.contains(": ready") => break,
                _ => {}
            }
        }
        let log = Arc::new(Mutex::new(VecDeque::new()));
        let kept = Arc::clone(&log);
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let mut kept = kept.lock();
                if kept.len() == 40 {
                    kept.pop_front();
                }
                kept.push_back(line);
            }
        });
        let (data, metrics) = (data.unwrap(), metrics.unwrap());
        Self { child, log, data, metrics, _folder: folder }
    }

    pub(crate) fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.data).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    }

    /// One request on a connection of its own; status and body. A server that answers before it
    /// has read everything may close on us while we write.
    pub(crate) fn post(&self, path: &str, headers: &str, body: &[u8]) -> (u16, String) {
        let mut stream = self.connect();
        let len = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {len}\r\n{headers}\r\n"
        );
        let sent = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(body));
        let mut answer = Vec::new();
        let read = stream.read_to_end(&mut answer);
        let answer = String::from_utf8_lossy(&answer);
        let status = answer.get(9..12).and_then(|text| text.parse().ok());
        let Some(status) = status else {
            panic!("no answer to {path}: {sent:?}, {read:?}");
        };
        (status, answer.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
    }

    /// A small prediction, of which the answer is checked.
    pub(crate) fn is_well(&self) -> bool {
        let body = br#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[1,2]}]}"#;
        let (status, answer) = self.post("/v2/models/identity_fp32/infer", "", body);
        status == 200 && answer.contains("\"data\":[1.0,2.0]")
    }

    fn page(&self) -> String {
        let mut stream = TcpStream::connect(self.metrics).unwrap();
        stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut page = String::new();
        stream.read_to_string(&mut page).unwrap();
        page
    }

    /// The value of a metric, as its line begins.
    pub(crate) fn metric(&self, begins: &str) -> f64 {
        let page = self.page();
        let line = page.lines().find_map(|line| line.strip_prefix(begins)?.strip_prefix(' '));
        line.and_then(|value| value.trim().parse().ok()).unwrap_or(-1.0)
    }

    /// The sum of a metric's series that have `label`.
    pub(crate) fn sum(&self, begins: &str, label: &str) -> f64 {
        let page = self.page();
        let lines = page.lines().filter(|line| line.starts_with(begins) && line.contains(label));
        lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok()).sum()
    }

    /// Waits until nobody holds bytes any more.
    pub(crate) fn settles(&self) -> bool {
        for _ in 0..200 {
            if self.metric("tidegate_in_flight_bytes") <= 0.0 {
                return true;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        false
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Resident bytes now, and the most since the last call of [`Gateway::forget_peak`].
    pub(crate) fn memory(&self) -> (u64, u64) {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            let line = line.unwrap_or_else(|| panic!("it is gone: {:#?}", self.log.lock()));
            line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
        };
        (field("VmRSS:"), field("VmHWM:"))
    }

    pub(crate) fn forget_peak(&self) {
        std::fs::write(format!("/proc/{}/clear_refs", self.child.id()), "5").unwrap();
    }
}

impl Drop for Gateway {
    fn drop(&mut self) {
        // It may have died already, which the tests find out.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
