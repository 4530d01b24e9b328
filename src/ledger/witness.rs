//! Puts each checkpoint where whoever could change the log cannot change it.
//!
//! ```text
//! notary ──▶ the last checkpoint of each log ──▶ one thread a witness: file │ POST │ object
//!            (one place a log; a newer one takes it)          └── failed: again, later
//! ```
//!
//! Invariants:
//! - Nobody waits for a witness. What one could not take in time is covered by the next checkpoint.
//! - A checkpoint is given again until it is taken or a newer one is there.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use object_store::path::Path as ObjectPath;
use object_store::{ObjectStore, PutMode, PutOptions};
use parking_lot::{Condvar, Mutex};
use url::Url;

use super::checkpoint::Note;
use super::delivery::{ObjectsSettings, open_bucket};

/// Folder of checkpoints in a bucket.
const CHECKPOINTS: &str = "checkpoints";
/// First wait after a failure; each further one is twice as long.
const BACKOFF: Duration = Duration::from_secs(1);
const BACKOFF_MAX: Duration = Duration::from_secs(300);
/// Longest wait for an answer, connecting included.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Longest wait at the end for what is on its way.
const STOP_MAX: Duration = Duration::from_secs(5);

/// Where checkpoints go.
#[derive(Clone, Debug)]
pub enum Target {
    /// They are appended to this file, each with an empty line behind it.
    File(PathBuf),
    /// Each is the body of a POST; any 2xx takes it.
    Webhook(Url),
    /// Each is a new object `<prefix>/<origin>/<size>`; none is ever replaced.
    Object { store: Arc<dyn ObjectStore>, prefix: ObjectPath },
    /// The same in the bucket that the ledger is delivered to, below `checkpoints/`. It is opened
    /// each time: credentials change.
    Bucket(Box<ObjectsSettings>),
}

#[derive(Clone, Debug)]
pub struct Settings {
    /// For the log and the metrics.
    pub name: String,
    pub target: Target,
}

/// What came of the checkpoints that one witness was given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WitnessStats {
    pub name: String,
    pub taken: u64,
    pub failed: u64,
    /// A newer one came before they were taken.
    pub skipped: u64,
}

/// Gives checkpoints to one witness.
pub struct Witness {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    settings: Settings,
    /// Guards what waits: the last checkpoint of each log, by its origin.
    waiting: Mutex<Waiting>,
    woken: Condvar,
    taken: AtomicU64,
    failed: AtomicU64,
    skipped: AtomicU64,
}

#[derive(Default)]
struct Waiting {
    notes: BTreeMap<String, Note>,
    /// One is on its way.
    busy: bool,
    stopping: bool,
}

impl Witness {
    /// # Errors
    /// When there is no thread for it, or no HTTP client.
    pub fn start(settings: Settings) -> std::io::Result<Self> {
        let name = settings.name.clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = client(&settings.target)?;
        let shared = Arc::new(Shared {
            settings,
            waiting: Mutex::default(),
            woken: Condvar::new(),
            taken: AtomicU64::new(0),
            failed: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
        });
        let of_thread = Arc::clone(&shared);
        let thread = std::thread::Builder::new().name("witness".to_owned()).spawn(move || {
            let run = || of_thread.run(&runtime, client.as_ref());
            if crate::panics::caught(run).is_none() {
                tracing::error!(witness = name, "a witness's thread has panicked: it gets nothing");
            }
        })?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Gives it a checkpoint, instead of the one of the same log that still waits.
    pub fn give(&self, note: &Note) {
        let mut waiting = self.shared.waiting.lock();
        if waiting.notes.insert(note.checkpoint.origin.clone(), note.clone()).is_some() {
            self.shared.skipped.fetch_add(1, Ordering::Relaxed);
        }
        drop(waiting);
        self.shared.woken.notify_all();
    }

    pub fn stats(&self) -> WitnessStats {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        let Shared { settings, taken, failed, skipped, .. } = &*self.shared;
        WitnessStats {
            name: settings.name.clone(),
            taken: of(taken),
            failed: of(failed),
            skipped: of(skipped),
        }
    }
}

impl Drop for Witness {
    /// Gives what waits one more try, for a short time.
    fn drop(&mut self) {
        let until = std::time::Instant::now() + STOP_MAX;
        let mut waiting = self.shared.waiting.lock();
        waiting.stopping = true;
        self.shared.woken.notify_all();
        while (waiting.busy || !waiting.notes.is_empty())
            && !self.shared.woken.wait_until(&mut waiting, until).timed_out()
        {}
        let done = !waiting.busy;
        drop(waiting);
        if let (true, Some(thread)) = (done, self.thread.take()) {
            // It has told the log of its panic.
            drop(thread.join());
        }
    }
}

impl Shared {
    fn run(&self, runtime: &tokio::runtime::Runtime, client: Option<&reqwest::Client>) {
        let mut backoff = BACKOFF;
        while let Some((origin, note)) = self.next() {
            let result = runtime.block_on(async {
                let given = tokio::time::timeout(ANSWER_MAX, self.deliver(client, &note)).await;
                given.unwrap_or_else(|_| Err(format!("no answer in {ANSWER_MAX:?}")))
            });
            let Err(why) = result else {
                self.taken.fetch_add(1, Ordering::Relaxed);
                backoff = BACKOFF;
                continue;
            };
            self.failed.fetch_add(1, Ordering::Relaxed);
            let witness = &self.settings.name;
            tracing::warn!(witness, origin, why, "a witness did not take a checkpoint");
            self.again(origin, note, backoff);
            backoff = (backoff * 2).min(BACKOFF_MAX);
        }
    }

    /// Waits for a checkpoint. `None` at the end.
    fn next(&self) -> Option<(String, Note)> {
        let mut waiting = self.waiting.lock();
        waiting.busy = false;
        loop {
            self.woken.notify_all();
            if let Some(next) = waiting.notes.pop_first() {
                waiting.busy = true;
                return Some(next);
            }
            if waiting.stopping {
                return None;
            }
            self.woken.wait(&mut waiting);
        }
    }

    /// Puts one back that was not taken, unless a newer one is there, and waits.
    fn again(&self, origin: String, note: Note, backoff: Duration) {
        let until = std::time::Instant::now() + backoff;
        let mut waiting = self.waiting.lock();
        if waiting.stopping {
            return;
        }
        waiting.notes.entry(origin).or_insert(note);
        while !waiting.stopping && !self.woken.wait_until(&mut waiting, until).timed_out() {}
    }

    async fn deliver(&self, client: Option<&reqwest::Client>, note: &Note) -> Result<(), String> {
        let text = note.to_string();
        match &self.settings.target {
            Target::File(path) => append(path, &text).map_err(|error| error.to_string()),
            Target::Webhook(url) => {
                let client = client.ok_or("no HTTP client")?;
                let request =
                    client.post(url.clone()).header("content-type", "text/plain; charset=utf-8");
                let answer = request.body(text).send().await;
                // The address stays out of what is shown: its path may be a secret.
                let answer = answer.map_err(|error| error.without_url().to_string())?;
                match answer.status().is_success() {
                    true => Ok(()),
                    false => Err(format!("status {}", answer.status().as_u16())),
                }
            }
            Target::Object { store, prefix } => put(&**store, prefix, note, text).await,
            Target::Bucket(objects) => {
                let store = open_bucket(objects)?;
                let prefix = ObjectPath::from(objects.bucket.prefix.as_str()).join(CHECKPOINTS);
                put(&*store, &prefix, note, text).await
            }
        }
    }
}

/// Puts a checkpoint where no other is.
async fn put(
    store: &dyn ObjectStore,
    prefix: &ObjectPath,
    note: &Note,
    text: String,
) -> Result<(), String> {
    let mut path = prefix.clone();
    for part in note.checkpoint.origin.split('/') {
        path = path.join(part);
    }
    let path = path.join(format!("{:020}", note.checkpoint.tree.size));
    let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
    match store.put_opts(&path, text.into(), options).await {
        // It is there since an earlier try whose answer was lost.
        Ok(_) | Err(object_store::Error::AlreadyExists { .. }) => Ok(()),
        Err(error) => Err(error.to_string()),
    }
}

fn client(target: &Target) -> std::io::Result<Option<reqwest::Client>> {
    let Target::Webhook(url) = target else { return Ok(None) };
    // Whoever comes first installs it; it is the same for all.
    drop(rustls::crypto::ring::default_provider().install_default());
    let mut client = reqwest::Client::builder()
        .redirect(reqwest::redirect::Policy::none())
        .timeout(ANSWER_MAX)
        .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")));
    if url.scheme() == "http" {
        // To this machine, and not through a proxy on the way there.
        client = client.no_proxy();
    }
    client.build().map(Some).map_err(std::io::Error::other)
}

fn append(path: &std::path::Path, text: &str) -> std::io::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::OpenOptions::new().append(true).create(true).open(path)?;
    file.write_all(format!("{text}\n").as_bytes())?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, Read as _, Write as _};

    use object_store::ObjectStoreExt as _;

    use super::*;
    use crate::ledger::checkpoint::{Checkpoint, Notes};
    use crate::ledger::keys::SigningKey;
    use crate::ledger::tree::State;

    fn note(size: u64) -> Note {
        let tree = State { size, root: [1; 32] };
        let checkpoint =
            Checkpoint { origin: "tidegate/01/admin".to_owned(), tree, extensions: Vec::new() };
        checkpoint.sign(&[&SigningKey::generate().unwrap()])
    }

    fn start(target: Target) -> Witness {
        Witness::start(Settings { name: "w".to_owned(), target }).unwrap()
    }

    #[test]
    fn a_file_and_a_store_get_what_is_given() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("seen");
        let store = Arc::new(object_store::memory::InMemory::new());
        let object = Target::Object { store: store.clone(), prefix: ObjectPath::from("a/b") };
        for target in [Target::File(file.clone()), object] {
            let witness = start(target);
            // The same one again is taken again, wherever it lies already.
            for _ in 0..2 {
                witness.give(&note(7));
                while !witness.shared.waiting.lock().notes.is_empty() {
                    std::thread::yield_now();
                }
            }
            drop(witness);
        }
        let seen = std::fs::read(file).unwrap();
        let mut notes = Notes::new(&seen[..], 0);
        assert_eq!(std::iter::from_fn(|| notes.next_note().unwrap()).count(), 2);
        let path = ObjectPath::from("a/b/tidegate/01/admin/00000000000000000007");
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        assert!(runtime.block_on(store.head(&path)).is_ok());
    }

    /// Answers 500, then 200, and gives the bodies.
    fn receiver() -> (Url, std::thread::JoinHandle<Vec<String>>) {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap()).parse().unwrap();
        let thread = std::thread::spawn(move || {
            let answer = |status: &str| {
                let mut stream = std::io::BufReader::new(listener.accept().unwrap().0);
                let mut length = 0;
                loop {
                    let mut line = String::new();
                    stream.read_line(&mut line).unwrap();
                    if let Some(text) = line.to_lowercase().strip_prefix("content-length:") {
                        length = text.trim().parse().unwrap();
                    }
                    if line.trim().is_empty() {
                        break;
                    }
                }
                let mut body = vec![0; length];
                stream.read_exact(&mut body).unwrap();
                let head =
                    format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                stream.get_mut().write_all(head.as_bytes()).unwrap();
                String::from_utf8(body).unwrap()
            };
            vec![answer("500 No"), answer("200 OK")]
        });
        (url, thread)
    }

    #[test]
    fn a_webhook_is_asked_again_with_the_newest() {
        let (url, receiver) = receiver();
        let witness = start(Target::Webhook(url));
        witness.give(&note(7));
        while witness.stats().failed == 0 {
            std::thread::sleep(Duration::from_millis(5));
        }
        witness.give(&note(9));
        let bodies = receiver.join().unwrap();
        let size = |text: &String| text.parse::<Note>().unwrap().checkpoint.tree.size;
        assert_eq!(bodies.iter().map(size).collect::<Vec<_>>(), [7, 9]);
    }
}
