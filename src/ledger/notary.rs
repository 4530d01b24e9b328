//! Reads the logs as they are written, keeps their trees, and signs checkpoints of them.
//!
//! ```text
//! segments ──read what is on the disk──▶ leaves ──▶ tree files ──▶ checkpoint ──▶ witnesses
//!                                                   (synced first)  every `interval`, at each seal, at the end
//! ```
//!
//! One thread for all logs, of low priority, behind everything that answers wait for.
//!
//! Invariants:
//! - It signs nothing that it did not read, and reads nothing that a power loss could still take: a
//!   log never is shorter than its last checkpoint, unless somebody cut it.
//! - When a log is shorter than that, or has another root, it signs nothing more for it and says so;
//!   what was signed stays as evidence.
//! - It holds nothing up. What it cannot do now is tried again.

use std::fs::OpenOptions;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::{Condvar, Mutex};

use super::checkpoint::{ALL, Checkpoint, LAST, Note, Stored, StoredError, origin};
use super::durable::{self, PUBLIC};
use super::frame::WriterId;
use super::keys::{self, Keys, KeysError};
use super::reader::{self, ReadError, SegmentReader};
use super::tree::{State, TreeError, TreeFiles};
use super::witness::{self, Witness, WitnessStats};
use crate::observe::page::{Family, Kind};
use crate::panics::caught;

/// Between two looks at whether the logs have grown.
const LOOK: Duration = Duration::from_millis(200);
/// Between two looks at whether the thread has ended.
const END_POLL: Duration = Duration::from_millis(5);
/// Wait after a failure.
const AGAIN: Duration = Duration::from_secs(5);
/// How nice the thread is: behind all that serves.
const NICE: i32 = 10;

/// How checkpoints are made.
#[derive(Clone, Debug)]
pub struct Settings {
    /// `<state>/ledger`.
    pub ledger: PathBuf,
    pub writer: WriterId,
    /// Time between two checkpoints of a log that grows.
    pub interval: Duration,
    pub witnesses: Vec<witness::Settings>,
}

/// A log that is followed.
pub struct Followed {
    pub name: &'static str,
    pub dir: PathBuf,
    /// Number after the last record that is on the disk; `None` as long as nobody opened the log.
    pub durable: Box<dyn Fn() -> Option<u64> + Send>,
}

/// Records that a key signs from now on: its number, and its verifier keys. Whether it is on the
/// disk by now.
pub type Announce = Box<dyn FnMut(u32, &[String]) -> bool + Send>;

/// How it stands with one log.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    pub name: &'static str,
    /// Records in the tree, and in the last checkpoint.
    pub tree: u64,
    pub signed: u64,
    /// Unix time of the last checkpoint of this process; 0: none.
    pub signed_at: u64,
    pub checkpoints: u64,
    pub failures: u64,
    /// Why nothing is signed.
    pub refused: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum NotaryError {
    #[error(transparent)]
    Keys(#[from] KeysError),
    #[error("no thread: {0}")]
    Thread(io::Error),
    #[error("keys of subjects: {0}")]
    Subjects(io::Error),
}

/// The thread, until it is dropped: it signs what is there then.
pub struct Notary {
    shared: Arc<Shared>,
    thread: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    /// Guards the keys: a rotation is one step for the thread.
    keys: Mutex<Keys>,
    /// Guards what others read: how it stands with each log.
    stats: Mutex<(Vec<Standing>, Vec<WitnessStats>)>,
    /// Guards the wish to end, and that for a checkpoint at once.
    asked: Mutex<Asked>,
    woken: Condvar,
}

#[derive(Default)]
struct Asked {
    stop: bool,
    look: bool,
}

impl Notary {
    /// Opens the keys, or makes the first, and follows the logs.
    ///
    /// # Errors
    /// When the keys cannot be used, or there is no thread for it.
    pub fn start(
        settings: Settings,
        logs: Vec<Followed>,
        announce: Announce,
    ) -> Result<Self, NotaryError> {
        let keys = Keys::open(&settings.ledger, settings.writer)?;
        let witnesses = settings.witnesses.iter().cloned().map(Witness::start);
        let witnesses = witnesses.collect::<Result<Vec<_>, _>>().map_err(NotaryError::Thread)?;
        let shared = Arc::new(Shared {
            keys: Mutex::new(keys),
            stats: Mutex::default(),
            asked: Mutex::default(),
            woken: Condvar::new(),
        });
        let logs = logs.into_iter().map(|log| Follower::new(log, &settings)).collect();
        let desk = Desk { shared: Arc::clone(&shared), logs, witnesses, announce };
        let thread = std::thread::Builder::new().name("notary".to_owned());
        let thread = thread.spawn(move || desk.run()).map_err(NotaryError::Thread)?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Makes a new key. It signs from the next checkpoint of each log, which is made soon.
    ///
    /// # Errors
    /// When it cannot be made, or the last rotation is not through.
    pub fn rotate(&self) -> Result<Vec<String>, KeysError> {
        let public = {
            let mut keys = self.shared.keys.lock();
            keys.rotate()?;
            keys.public()
        };
        self.shared.asked.lock().look = true;
        self.shared.woken.notify_all();
        Ok(public)
    }

    pub fn stats(&self) -> (Vec<Standing>, Vec<WitnessStats>) {
        self.shared.stats.lock().clone()
    }

    /// For the metrics page.
    pub fn families(&self) -> Vec<Family> {
        let (logs, witnesses) = self.stats();
        families(&logs, &witnesses)
    }
}

impl Notary {
    fn stop(&self) {
        self.shared.asked.lock().stop = true;
        self.shared.woken.notify_all();
    }

    /// Signs what is there and ends, without holding up whoever waits.
    pub async fn close(self) {
        self.stop();
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            tokio::time::sleep(END_POLL).await;
        }
    }
}

impl Drop for Notary {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take() {
            // It has told the log of its panic.
            drop(thread.join());
        }
    }
}

fn families(logs: &[Standing], witnesses: &[WitnessStats]) -> Vec<Family> {
    let mut tree = Family::new(
        "tidegate_ledger_tree_records",
        Kind::Gauge,
        "Records in the tree of each log of the ledger",
    );
    let mut signed = Family::new(
        "tidegate_ledger_checkpoint_records",
        Kind::Gauge,
        "Records that the last checkpoint of each log covers",
    );
    let mut at = Family::new(
        "tidegate_ledger_checkpoint_timestamp_seconds",
        Kind::Gauge,
        "When the last checkpoint of each log was signed; 0 before the first of this process",
    );
    let mut made = Family::new(
        "tidegate_ledger_checkpoints_total",
        Kind::Counter,
        "Checkpoints that were signed, by log",
    );
    let mut failures = Family::new(
        "tidegate_ledger_checkpoint_failures_total",
        Kind::Counter,
        "Times that a log could not be read or a checkpoint not be written; tried again",
    );
    let mut refused = Family::new(
        "tidegate_ledger_checkpoint_refused",
        Kind::Gauge,
        "1 while nothing is signed for a log, because it contradicts its last checkpoint",
    );
    for log in logs {
        let labels = || vec![("log".into(), log.name.to_owned())];
        tree.push(labels(), log.tree as f64);
        signed.push(labels(), log.signed as f64);
        at.push(labels(), log.signed_at as f64);
        made.push(labels(), log.checkpoints as f64);
        failures.push(labels(), log.failures as f64);
        refused.push(labels(), f64::from(u8::from(log.refused.is_some())));
    }
    let mut given = Family::new(
        "tidegate_ledger_witness_checkpoints_total",
        Kind::Counter,
        "Checkpoints given to each witness, by what came of it",
    );
    for witness in witnesses {
        for (outcome, count) in
            [("taken", witness.taken), ("failed", witness.failed), ("skipped", witness.skipped)]
        {
            let labels = vec![
                ("witness".into(), witness.name.clone()),
                ("outcome".into(), outcome.to_owned()),
            ];
            given.push(labels, count as f64);
        }
    }
    vec![tree, signed, at, made, failures, refused, given]
}

/// Why a log is not followed now.
#[derive(Debug, thiserror::Error)]
enum Halt {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Stored(#[from] StoredError),
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("no segment has record {0}")]
    Missing(u64),
    /// Somebody cut or changed the log.
    #[error("{0}")]
    Contradicted(String),
}

/// The thread's own.
struct Desk {
    shared: Arc<Shared>,
    logs: Vec<Follower>,
    witnesses: Vec<Witness>,
    announce: Announce,
}

impl Desk {
    fn run(mut self) {
        if let Err(error) = rustix::process::setpriority_process(None, NICE) {
            tracing::debug!(%error, "the notary's thread keeps its priority");
        }
        let round = |desk: &mut Self, last| {
            if caught(|| desk.round(last)).is_none() {
                tracing::error!("the notary has panicked; it begins anew in a while");
                desk.logs.iter_mut().for_each(Follower::close);
                std::thread::sleep(LOOK);
            }
        };
        while !self.wait() {
            round(&mut self, false);
        }
        round(&mut self, true);
    }

    /// Until the next look; whether it is the end.
    fn wait(&self) -> bool {
        let mut asked = self.shared.asked.lock();
        if !asked.stop && !asked.look {
            self.shared.woken.wait_for(&mut asked, LOOK);
        }
        asked.look = false;
        asked.stop
    }

    fn round(&mut self, last: bool) {
        let keys = Arc::clone(&self.shared);
        let mut keys = keys.keys.lock();
        if !keys.announced()
            && (self.announce)(keys.serial(), &keys.public())
            && let Err(error) = keys.set_announced()
        {
            tracing::warn!(%error, "a key may be announced twice");
        }
        for log in &mut self.logs {
            log.step(&keys, last, &self.witnesses);
        }
        if keys.previous().is_some() && self.logs.iter().all(|log| log.handed_over(&keys)) {
            match keys.retire() {
                Ok(()) => tracing::info!("the ledger's new key signs for every log"),
                Err(error) => tracing::error!(%error, "a replaced key cannot be destroyed"),
            }
        }
        let stats = self.logs.iter().map(|log| log.stats.clone()).collect();
        *self.shared.stats.lock() = (stats, self.witnesses.iter().map(Witness::stats).collect());
    }
}

/// Follows one log.
struct Follower {
    log: Followed,
    ledger: PathBuf,
    origin: String,
    interval: Duration,
    open: Option<Open>,
    again_at: Option<Instant>,
    stats: Standing,
}

/// What is known of a log once it is read from.
struct Open {
    tree: TreeFiles,
    reader: Option<SegmentReader>,
    /// The last checkpoint, and when it was made.
    last: Option<Note>,
    at: Instant,
    /// What the tree was when it was signed last, as long as it is not there again.
    anchor: Option<State>,
}

impl Follower {
    fn new(log: Followed, settings: &Settings) -> Self {
        Self {
            origin: origin(settings.writer, log.name),
            ledger: settings.ledger.clone(),
            interval: settings.interval,
            open: None,
            again_at: None,
            stats: Standing { name: log.name, ..Standing::default() },
            log,
        }
    }

    fn close(&mut self) {
        self.open = None;
    }

    /// Reads what is new and signs when it is time. What goes wrong is told once, and tried again.
    fn step(&mut self, keys: &Keys, last: bool, witnesses: &[Witness]) {
        let waits = self.again_at.is_some_and(|at| Instant::now() < at && !last);
        if waits || (self.stats.refused.is_some() && self.again_at.is_none()) {
            return;
        }
        let result = self.follow(keys, last, witnesses);
        if let Some(open) = &self.open {
            self.stats.tree = open.tree.frontier().size();
            self.stats.signed = open.signed();
        }
        let Err(halt) = result else {
            self.again_at = None;
            self.stats.refused = None;
            return;
        };
        self.open = None;
        self.stats.failures += 1;
        let (log, why) = (self.log.name, halt.to_string());
        let new = self.stats.refused.as_ref() != Some(&why);
        self.again_at = Some(Instant::now() + AGAIN);
        if let Halt::Contradicted(_) = halt {
            // It would say the same again; a person has to look.
            self.again_at = None;
            tracing::error!(
                log,
                why,
                "the ledger contradicts its last checkpoint: no more are signed"
            );
        } else if new {
            tracing::error!(log, why, "the ledger's checkpoints stand still");
        }
        self.stats.refused = Some(why);
    }

    fn follow(&mut self, keys: &Keys, last: bool, witnesses: &[Witness]) -> Result<(), Halt> {
        let durable = (self.log.durable)();
        // Nothing comes to a log that nobody opened, but it has to know a new key.
        if durable.is_none() && (keys.previous().is_none() || !self.log.dir.join(LAST).exists()) {
            return Ok(());
        }
        let mut open = match self.open.take() {
            Some(open) => open,
            None => self.open(durable)?,
        };
        loop {
            let sealed = open.read(&self.log.dir, durable.unwrap_or(0))?;
            let grown = open.tree.frontier().size() > open.signed() && open.anchor.is_none();
            let due = last || sealed || open.at.elapsed() >= self.interval;
            if (grown && due)
                || (open.anchor.is_none() && !handed_over(&self.origin, open.last.as_ref(), keys))
            {
                let note = self.sign(&mut open, keys)?;
                witnesses.iter().for_each(|witness| witness.give(&note));
            }
            if !sealed {
                break;
            }
        }
        if open.tree.frontier().size() > self.stats.tree {
            open.tree.flush()?;
        }
        self.open = Some(open);
        Ok(())
    }

    /// Whether the key that signs now is known from this log's checkpoints.
    fn handed_over(&self, keys: &Keys) -> bool {
        match &self.open {
            Some(open) => handed_over(&self.origin, open.last.as_ref(), keys),
            None => (self.log.durable)().is_none() && !self.log.dir.join(LAST).exists(),
        }
    }

    /// Goes on where the last checkpoint was made, if the tree is still there.
    fn open(&self, durable: Option<u64>) -> Result<Open, Halt> {
        let dir = &self.log.dir;
        std::fs::create_dir_all(dir).map_err(|error| Halt::Io { path: dir.clone(), error })?;
        let stored = Stored::read(dir)?;
        repair(dir, &stored)?;
        let at = Instant::now();
        let Some(last) = stored.last else {
            let tree = TreeFiles::create(dir)?;
            return Ok(Open { tree, reader: None, last: None, at, anchor: None });
        };
        let signed = last.checkpoint.tree;
        let trusted = keys::published(&self.ledger)
            .map_err(|error| Halt::Io { path: self.ledger.clone(), error })?;
        if let Err(error) = last.verify(&trusted) {
            return Err(Halt::Contradicted(format!("its last checkpoint: {error}")));
        }
        if last.checkpoint.origin != self.origin {
            let what = format!("its last checkpoint is of '{}'", last.checkpoint.origin);
            return Err(Halt::Contradicted(what));
        }
        if let Some(durable) = durable.filter(|durable| *durable < signed.size) {
            let size = signed.size;
            let what = format!("it has {durable} records, its last checkpoint says {size}");
            return Err(Halt::Contradicted(what));
        }
        let found = TreeFiles::open(dir, signed.size);
        let (tree, anchor) = match found {
            Ok(tree) if tree.frontier().root() == signed.root => (tree, None),
            other => {
                let why = other.err().map_or("another root".to_owned(), |error| error.to_string());
                let log = self.log.name;
                tracing::warn!(log, why, "the tree's files are made anew from the segments");
                // Leaves of records that are gone are nowhere else.
                let first = reader::segments(dir)?.first().map_or(0, |segment| segment.first_seq);
                (TreeFiles::remake(dir, first)?, Some(signed))
            }
        };
        let mut open = Open { tree, reader: None, last: Some(last), at, anchor };
        open.check()?;
        Ok(open)
    }

    fn sign(&mut self, open: &mut Open, keys: &Keys) -> Result<Note, Halt> {
        open.tree.sync()?;
        let frontier = open.tree.frontier();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let time =
            i64::try_from(now.as_secs()).ok().and_then(|s| jiff::Timestamp::from_second(s).ok());
        let mut extensions = vec![format!("after {}", open.signed())];
        extensions.extend(time.map(|time| format!("time {time}")));
        let mut signing = vec![keys.signing()];
        if let Some(previous) = keys.previous()
            && !handed_over(&self.origin, open.last.as_ref(), keys)
        {
            extensions.push(format!("next-key {}", keys.signing().verifier(&self.origin)));
            signing.insert(0, previous);
        }
        let tree = State { size: frontier.size(), root: frontier.root() };
        let note = Checkpoint { origin: self.origin.clone(), tree, extensions }.sign(&signing);
        store(&self.log.dir, &note)?;
        self.stats.checkpoints += 1;
        self.stats.signed_at = now.as_secs();
        (open.last, open.at) = (Some(note.clone()), Instant::now());
        Ok(note)
    }
}

/// Without a checkpoint there is nobody who knows another key.
fn handed_over(origin: &str, last: Option<&Note>, keys: &Keys) -> bool {
    let current = keys.signing().verifier(origin).id;
    keys.previous().is_none()
        || last.is_none_or(|note| note.signatures.iter().any(|by| by.id == current))
}

impl Open {
    fn signed(&self) -> u64 {
        self.last.as_ref().map_or(0, |note| note.checkpoint.tree.size)
    }

    /// Takes leaves up to record `durable`; whether it stopped because a segment was at its end.
    fn read(&mut self, log: &Path, durable: u64) -> Result<bool, Halt> {
        while self.tree.frontier().size() < durable {
            let size = self.tree.frontier().size();
            let reader = match &mut self.reader {
                Some(reader) => reader,
                None => self.reader.insert(reader_at(log, size)?),
            };
            let Some(frame) = reader.next_frame()? else {
                let next = reader.next_seq();
                let there = |sealed| reader::segment_path(log, next, sealed).exists();
                if there(false) || there(true) {
                    self.reader = None;
                    return Ok(true);
                }
                return match reader.segment().sealed {
                    true => Err(Halt::Missing(next)),
                    false => Ok(false),
                };
            };
            // A rebuilt tree begins where it begins, a continued one in the middle of a segment.
            if frame.seq < size {
                continue;
            }
            self.tree.push(frame.leaf())?;
            self.check()?;
        }
        Ok(false)
    }

    /// At the size of the last checkpoint a tree that was made anew has its root again.
    fn check(&mut self) -> Result<(), Halt> {
        let frontier = self.tree.frontier();
        match self.anchor {
            Some(anchor) if anchor.size == frontier.size() => {
                if frontier.root() != anchor.root {
                    let size = anchor.size;
                    let what = format!("its first {size} records are not those that were signed");
                    return Err(Halt::Contradicted(what));
                }
                self.anchor = None;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

/// The segment that record `seq` is in, or comes into.
fn reader_at(log: &Path, seq: u64) -> Result<SegmentReader, Halt> {
    let segments = reader::segments(log)?;
    let segment = segments.iter().rev().find(|segment| segment.first_seq <= seq);
    Ok(SegmentReader::open(segment.ok_or(Halt::Missing(seq))?)?)
}

/// Puts a checkpoint where the last one is, and behind all of them.
fn store(log: &Path, note: &Note) -> Result<(), Halt> {
    let last = log.join(LAST);
    let text = note.to_string();
    durable::replace(&last, PUBLIC, text.as_bytes())
        .map_err(|error| Halt::Io { path: last, error })?;
    append(log, format!("{text}\n").as_bytes())
}

fn append(log: &Path, bytes: &[u8]) -> Result<(), Halt> {
    let all = log.join(ALL);
    let new = !all.exists();
    let file = OpenOptions::new().append(true).create(true).open(&all);
    let written = file.and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_data()
    });
    let written = written.and_then(|()| if new { durable::sync_folder_of(&all) } else { Ok(()) });
    written.map_err(|error| Halt::Io { path: all, error })
}

/// Appends the last checkpoint, if the last process ended before it did.
fn repair(log: &Path, stored: &Stored) -> Result<(), Halt> {
    let all = log.join(ALL);
    let Some(last) = stored.last.as_ref().filter(|_| stored.last != stored.newest) else {
        return Ok(());
    };
    if !stored.torn.is_empty() {
        let cut = OpenOptions::new().write(true).open(&all);
        let cut = cut.and_then(|file| file.set_len(stored.end));
        cut.map_err(|error| Halt::Io { path: all.clone(), error })?;
    }
    append(log, format!("{last}\n").as_bytes())
}

#[cfg(test)]
mod tests;
