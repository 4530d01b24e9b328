//! The admin API over one connection that is kept, with the times at which a change was sent and
//! answered.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// No answer after this is a failed test.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) struct Admin {
    stream: BufReader<TcpStream>,
    token: String,
}

/// An answer, and when.
#[derive(Clone, Debug)]
pub(crate) struct Said {
    pub(crate) status: u16,
    pub(crate) body: Value,
    pub(crate) sent: Instant,
    pub(crate) answered: Instant,
}

impl Said {
    pub(crate) fn took(&self) -> Duration {
        self.answered - self.sent
    }

    /// The answer to what had to work.
    #[track_caller]
    pub(crate) fn done(self) -> Self {
        assert!(self.status < 300, "{} {}", self.status, self.body);
        self
    }
}

impl Admin {
    pub(crate) fn new(address: SocketAddr, token: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        Self { stream: BufReader::new(stream), token: token.to_owned() }
    }

    /// # Errors
    /// When the gateway is gone.
    pub(crate) fn call(
        &mut self,
        method: &str,
        path: &str,
        body: Option<&Value>,
    ) -> io::Result<Said> {
        let token = &self.token;
        let mut request = format!(
            "{method} /admin/v1{path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {token}\r\n"
        );
        let body = body.map(Value::to_string).unwrap_or_default();
        if !body.is_empty() {
            request += "content-type: application/json\r\n";
        }
        let length = body.len();
        request += &format!("content-length: {length}\r\n\r\n{body}");
        let sent = Instant::now();
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut head = String::new();
        while !head.ends_with("\r\n\r\n") {
            if self.stream.read_line(&mut head)? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        let odd = || io::Error::other(head.clone());
        let status = head.split(' ').nth(1).and_then(|word| word.parse().ok()).ok_or_else(odd)?;
        let length = head.lines().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
        });
        let mut content = vec![0; length.ok_or_else(odd)?];
        self.stream.read_exact(&mut content)?;
        let answered = Instant::now();
        let body = serde_json::from_slice(&content).unwrap_or(Value::Null);
        Ok(Said { status, body, sent, answered })
    }

    pub(crate) fn get(&mut self, path: &str) -> Said {
        self.call("GET", path, None).unwrap()
    }

    pub(crate) fn post(&mut self, path: &str) -> Said {
        self.call("POST", path, None).unwrap()
    }

    pub(crate) fn load(&mut self, model: &str, version: u32) -> Said {
        self.post(&format!("/models/{model}/versions/{version}:load"))
    }

    pub(crate) fn unload(&mut self, model: &str, version: u32) -> Said {
        self.post(&format!("/models/{model}/versions/{version}:unload"))
    }

    /// Puts a whole traffic table.
    pub(crate) fn traffic(&mut self, model: &str, table: &Value) -> Said {
        self.call("PUT", &format!("/models/{model}/traffic"), Some(table)).unwrap()
    }

    /// Everything to one version.
    pub(crate) fn all_to(&mut self, model: &str, version: u32) -> Said {
        self.traffic(model, &all_to(version))
    }

    pub(crate) fn label(&mut self, model: &str, label: &str, version: u32) -> Said {
        let body = json!({"version": version.to_string()});
        self.call("PUT", &format!("/models/{model}/labels/{label}"), Some(&body)).unwrap()
    }

    /// A version as `GET /models/{m}` shows it.
    pub(crate) fn version(&mut self, model: &str, version: u32) -> Option<Value> {
        let view = self.get(&format!("/models/{model}"));
        let versions = view.body["versions"].as_array().cloned().unwrap_or_default();
        versions.into_iter().find(|found| number(&found["version"]) == Some(version))
    }

    /// Waits until a version is in this state.
    pub(crate) fn until(&mut self, model: &str, version: u32, state: &str) -> Value {
        let start = Instant::now();
        loop {
            let found = self.version(model, version);
            if let Some(view) = &found
                && view["state"] == state
            {
                return view.clone();
            }
            assert!(start.elapsed() < PATIENCE, "{model} {version} is not {state}: {found:?}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Events of the journal, the oldest first.
    pub(crate) fn journal(&mut self) -> Vec<Value> {
        let (mut events, mut after) = (Vec::new(), 0);
        loop {
            let page = self.get(&format!("/journal?after={after}&limit=500")).done().body;
            events.extend(page["events"].as_array().cloned().unwrap_or_default());
            match page["next"].as_u64() {
                Some(next) => after = next,
                None => return events,
            }
        }
    }
}

pub(crate) fn all_to(version: u32) -> Value {
    json!({"weights": {version.to_string(): 100}})
}

/// A version's number, written as one or as text.
pub(crate) fn number(value: &Value) -> Option<u32> {
    match value {
        Value::String(text) => text.parse().ok(),
        other => u32::try_from(other.as_u64()?).ok(),
    }
}

/// Shares of the versions in a traffic view's table, those with something, as they were written.
pub(crate) fn weights(view: &Value) -> Option<Vec<(u32, f64)>> {
    let weights = view["traffic"]["weights"].as_object()?;
    let positive = weights.iter().filter_map(|(version, weight)| {
        let weight = weight.as_f64().filter(|weight| *weight > 0.0)?;
        Some((version.parse().ok()?, weight))
    });
    Some(positive.collect())
}
