//! The ledger: every prediction, every change and every label, in logs that nobody alters unseen.
//!
//! ```text
//! Completion ─▶ record (bytes of a frame) ─▶ Log ──▶ segments ─┬─▶ tree, checkpoints, witnesses
//!                                             │                ├─▶ Parquet, sinks
//!                          answer waits ◀─────┘                └─▶ audit: show, export, verify, replay
//! ```
//!
//! Invariants:
//! - An answer leaves after its record was handed to the operating system (`buffered`) or is on the
//!   disk (`sync`).
//! - What was written is never changed, but for payloads that somebody erased, and then a record of
//!   that is written first.
//! - A call has one record at most, whatever becomes of it; one that was answered has one.
//! - Everything behind the log reads its segments; nothing behind it can hold back a record.

use std::cell::RefCell;
use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use rand::Rng as _;
use ring::hmac;
use serde::Serialize;

use crate::domain::{Completion, Durability, OnUnrecorded, RecordSettings, Recording, Signature};
use capture::{Keeper, Subjects};
use delivery::{Delivery, SinkStats};
use frame::{Draft, WriterId};
use log::{Appended, Log, LogSettings, LogStats, OpenError, Recovery, Unrecorded};
use notary::Notary;
use record::{Context, Head, Payload};
use subjects::SubjectKeys;

pub mod capture;
pub mod checkpoint;
pub mod delivery;
mod durable;
pub mod erase;
pub mod export;
pub mod follow;
pub mod frame;
pub mod keys;
pub mod log;
mod metrics;
pub mod notary;
pub mod parquet;
pub mod proofs;
pub mod prove;
pub mod reader;
pub mod recent;
pub mod record;
pub mod retention;
pub mod subjects;
#[cfg(test)]
pub(crate) mod testlog;
pub mod tree;
pub mod upkeep;
pub mod verify;
pub mod witness;

/// Folder of the ledger in the state's.
pub const FOLDER: &str = "ledger";
/// The three logs, each a folder.
pub const PREDICTIONS: &str = "predictions";
pub const ADMIN: &str = "admin";
pub const FEEDBACK: &str = "feedback";
/// Folder of keys.
pub const KEYS: &str = "keys";

/// File that tells writers apart.
const WRITER: &str = "writer";
/// File that one process at a time holds.
const LOCK: &str = "lock";
const HASH_KEY: &str = "hash";
/// How long a gateway that ends may still hold the ledger.
const LOCK_WAIT_MAX: Duration = Duration::from_secs(10);
const LOCK_POLL: Duration = Duration::from_millis(50);
/// A thread's draft that has grown beyond this is not kept.
const DRAFT_KEPT_MAX: usize = 1 << 20;

/// How the ledger is written.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Folder of all of it.
    pub dir: PathBuf,
    pub segment_bytes: u64,
    pub segment_age_max: Duration,
    pub flush_interval: Duration,
    pub queue_bytes_max: usize,
    pub free_bytes_min: u64,
    /// With less than this free, the log says so.
    pub free_bytes_warn: u64,
    /// Time between two checkpoints.
    pub checkpoint_interval: Duration,
    /// Where checkpoints go.
    pub witnesses: Vec<witness::Settings>,
    /// Days that records are kept of models that say nothing else; 0: for ever.
    pub retention_days: u32,
    /// Of models that say nothing else.
    pub recording: RecordSettings,
    /// Request parameter that says whom the data is about.
    pub subject_parameter: Option<String>,
}

impl Settings {
    /// The defaults, in this state folder.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            dir: state_dir.join(FOLDER),
            segment_bytes: 64 << 20,
            segment_age_max: Duration::from_secs(3600),
            flush_interval: Duration::from_millis(50),
            queue_bytes_max: 64 << 20,
            free_bytes_min: 256 << 20,
            free_bytes_warn: 1 << 30,
            checkpoint_interval: Duration::from_secs(10),
            witnesses: Vec::new(),
            retention_days: retention::DAYS,
            recording: RecordSettings::default(),
            subject_parameter: None,
        }
    }

    /// Of one of the three logs.
    pub fn log(&self, name: &'static str) -> LogSettings {
        LogSettings {
            dir: self.dir.join(name),
            name,
            segment_bytes: self.segment_bytes,
            segment_age_max: self.segment_age_max,
            flush_interval: self.flush_interval,
            queue_bytes_max: self.queue_bytes_max,
            free_bytes_min: self.free_bytes_min,
        }
    }
}

/// What a record says beside the completion.
#[derive(Clone, Copy, Debug)]
pub struct About<'a> {
    /// Of the version that was picked, if one was.
    pub signature: Option<&'a Signature>,
    /// `onnxruntime` or `tract`; empty when no version was picked.
    pub engine: &'a str,
    /// How it is recorded; `None`: as a call that got to no model.
    pub recording: Option<&'a Recording>,
    /// Of the route table that the request saw.
    pub config_revision: u64,
    /// Whom the data is about.
    pub subject: Option<&'a str>,
}

/// The logs of one gateway, and what is decided about their records.
pub struct Ledger {
    settings: Settings,
    writer: WriterId,
    predictions: Log,
    admin: Log,
    /// Opened by the first who has feedback to record.
    feedback: OnceLock<Log>,
    /// Name of each engine, and the name with its version.
    engines: Vec<(String, String)>,
    unrouted: Recording,
    hash_key: hmac::Key,
    subjects: OnceLock<Arc<dyn Subjects>>,
    subject_keys: OnceLock<Arc<SubjectKeys>>,
    /// Guards the one that signs; it ends when the logs are closed.
    notary: Mutex<Option<Notary>>,
    /// Guards the rewriting of segments: one erasure at a time.
    erasing: Mutex<()>,
    erasure_hook: OnceLock<erase::Hook>,
    delivery: OnceLock<Delivery>,
    upkeep: OnceLock<upkeep::Upkeep>,
    /// Given back when the process ends, however it does.
    _lock: File,
}

impl Ledger {
    /// Opens the ledger's folder, for this process alone. `engines` are names and versions.
    ///
    /// # Errors
    /// When the folder cannot be used, or another process uses it.
    pub fn open(
        settings: Settings,
        engines: impl IntoIterator<Item = (&'static str, String)>,
    ) -> Result<Arc<Self>, OpenError> {
        let lock = lock(&settings.dir)?;
        let writer = writer(&settings.dir)?;
        let hash_key = hmac::Key::new(hmac::HMAC_SHA256, &hash_key(&settings.dir)?);
        let (predictions, recovered) = Log::open(settings.log(PREDICTIONS), writer)?;
        say(PREDICTIONS, &recovered);
        let (admin, recovered) = Log::open(settings.log(ADMIN), writer)?;
        say(ADMIN, &recovered);
        let engines = engines.into_iter();
        Ok(Arc::new(Self {
            engines: engines.map(|(name, is)| (name.to_owned(), format!("{name} {is}"))).collect(),
            unrouted: capture::unrouted(&settings.recording),
            settings,
            writer,
            predictions,
            admin,
            feedback: OnceLock::new(),
            hash_key,
            subjects: OnceLock::new(),
            subject_keys: OnceLock::new(),
            notary: Mutex::new(None),
            erasing: Mutex::default(),
            erasure_hook: OnceLock::new(),
            delivery: OnceLock::new(),
            upkeep: OnceLock::new(),
            _lock: lock,
        }))
    }

    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    pub fn writer(&self) -> WriterId {
        self.writer
    }

    pub fn predictions(&self) -> &Log {
        &self.predictions
    }

    pub fn admin(&self) -> &Log {
        &self.admin
    }

    /// Labels and metrics of earlier predictions; opened by the first call.
    ///
    /// # Errors
    /// As [`Ledger::open`].
    pub fn feedback(&self) -> Result<&Log, OpenError> {
        if let Some(log) = self.feedback.get() {
            return Ok(log);
        }
        let (log, recovered) = Log::open(self.settings.log(FEEDBACK), self.writer)?;
        say(FEEDBACK, &recovered);
        Ok(self.feedback.get_or_init(|| log))
    }

    /// Says where the keys of those are whom data is about. Later calls have no effect.
    pub fn set_subjects(&self, subjects: Arc<dyn Subjects>) {
        drop(self.subjects.set(subjects));
    }

    /// How calls are recorded that get to no model.
    pub fn unrouted(&self) -> &Recording {
        &self.unrouted
    }

    /// Whether a prediction may be begun: one that would have to be refused for want of a record
    /// had better not run.
    ///
    /// # Errors
    /// Why its record could not be taken.
    pub fn check(&self, recording: &Recording) -> Result<(), Unrecorded> {
        match (recording.durability, recording.on_error) {
            (Durability::Off, _) | (_, OnUnrecorded::Serve) => Ok(()),
            _ => self.predictions.check(),
        }
    }

    /// Takes the record of a call; `None` when it is to have none. Does not wait for the disk.
    ///
    /// # Errors
    /// When the log cannot take it.
    pub fn append(
        &self,
        completion: &Completion,
        about: &About<'_>,
    ) -> Result<Option<Appended>, Unrecorded> {
        let recording = about.recording.unwrap_or(&self.unrouted);
        if recording.durability == Durability::Off {
            return Ok(None);
        }
        let subjects = self.subjects.get().filter(|_| recording.needs_subject);
        let subject = subjects.and_then(|subjects| Some((&**subjects, about.subject?)));
        let name = subject.map(|(subjects, subject)| subjects.name(subject)).unwrap_or_default();
        let context = Context {
            signature: about.signature,
            engine: self.engine(about.engine),
            config_revision: about.config_revision,
            capture: &recording.stamp,
            subject: &name,
        };
        // A shadow is in the sample when the prediction is that it ran on a copy of.
        let id = completion.shadow_of.unwrap_or(completion.prediction_id);
        let mut keeper = Keeper {
            recording,
            hash_key: &self.hash_key,
            subject,
            sampled: capture::is_sampled(id, recording.sample),
            left: recording.record_bytes_max,
        };
        with_draft(|draft| {
            let salt = salt();
            record::prediction(draft, completion, &context, &salt, |name, tensor| {
                keeper.keep(name, tensor)
            });
            self.predictions.append(draft)
        })
        .map(Some)
    }

    /// Returns when the record of a prediction is where its answer may leave.
    ///
    /// # Errors
    /// When it does not get there; it may be in the log nevertheless.
    pub async fn settled(&self, at: Appended, durability: Durability) -> Result<(), Unrecorded> {
        match durability {
            Durability::Off => Ok(()),
            Durability::Buffered => self.predictions.written(at).await,
            Durability::Sync => self.predictions.synced(at).await,
        }
    }

    /// Takes the record of a change of the gateway's state. Does not wait for the disk.
    ///
    /// # Errors
    /// When the log cannot take it.
    pub fn append_admin(&self, head: &Head, payload: &Payload) -> Result<Appended, Unrecorded> {
        with_draft(|draft| {
            record::other(draft, head, payload, &salt());
            self.admin.append(draft)
        })
    }

    /// Takes the record of a label or a metric. Does not wait for the disk.
    ///
    /// # Errors
    /// When the log cannot take it, or not be opened.
    pub fn append_feedback(&self, head: &Head, payload: &Payload) -> Result<Appended, Unrecorded> {
        let log = self.feedback().map_err(|error| Unrecorded::Broken(error.to_string()))?;
        with_draft(|draft| {
            record::other(draft, head, payload, &salt());
            log.append(draft)
        })
    }

    /// Returns when the record of a label is where its answer may leave.
    ///
    /// # Errors
    /// When it does not get there; it may be in the log nevertheless.
    pub async fn feedback_settled(
        &self,
        at: Appended,
        durability: Durability,
    ) -> Result<(), Unrecorded> {
        let Some(log) = self.feedback.get() else { return Ok(()) };
        match durability {
            Durability::Off => Ok(()),
            Durability::Buffered => log.written(at).await,
            Durability::Sync => log.synced(at).await,
        }
    }

    /// Notes that a call of this time has no record. A record of the gap says how many there are.
    pub fn miss(&self, arrived: SystemTime) {
        self.predictions.missed(arrived);
    }

    /// The logs that are open, by name.
    pub fn logs(&self) -> impl Iterator<Item = (&'static str, &Log)> {
        let feedback = self.feedback.get().map(|log| (FEEDBACK, log));
        [(PREDICTIONS, &self.predictions), (ADMIN, &self.admin)].into_iter().chain(feedback)
    }

    /// What the logs have done so far.
    pub fn stats(&self) -> Vec<(&'static str, LogStats)> {
        self.logs().map(|(name, log)| (name, log.stats())).collect()
    }

    /// Hands over what waits and seals the logs. Records that come later are refused.
    pub async fn close(&self) {
        for (_, log) in self.logs() {
            log.close().await;
        }
        let notary = self.notary.lock().take();
        if let Some(notary) = notary {
            notary.close().await;
        }
        // After the last checkpoint, which its manifest has, and before the last delivery.
        self.finish_upkeep().await;
        if let Some(delivery) = self.delivery() {
            delivery.stop().await;
        }
    }

    /// Begins to deliver, if there is anyone to deliver to. Before the first record of this process.
    ///
    /// # Errors
    /// When the log cannot be read, or its thread not be started.
    pub fn start_delivery(self: &Arc<Self>, settings: &delivery::Settings) -> anyhow::Result<()> {
        if settings.is_empty() {
            return Ok(());
        }
        let log = Arc::downgrade(self);
        let end = move || log.upgrade().map_or(0, |ledger| ledger.predictions.stats().written_seq);
        let source = delivery::Source {
            dir: self.settings.dir.clone(),
            writer: self.writer.to_string(),
            end: Arc::new(end),
        };
        drop(self.delivery.set(Delivery::start(settings, source)?));
        Ok(())
    }

    /// What delivers, if there is anyone to deliver to.
    pub fn delivery(&self) -> Option<&Delivery> {
        self.delivery.get()
    }

    /// Predictions before this number are not needed for delivery any more.
    pub fn delivered_up_to(&self) -> u64 {
        self.delivery().map_or(u64::MAX, Delivery::delivered_up_to)
    }

    /// The engine with its version, if that is known.
    fn engine<'a>(&'a self, name: &'a str) -> &'a str {
        let found = self.engines.iter().find(|(known, _)| known == name);
        found.map_or(name, |(_, full)| full)
    }
}

/// How a ledger does, for `audit/stats`.
#[derive(Clone, Debug, Serialize)]
pub struct Health {
    pub writer: String,
    /// Why nothing can be recorded at this moment, if so.
    pub problem: Option<String>,
    pub logs: Vec<LogHealth>,
    pub sinks: Vec<SinkStats>,
}

#[derive(Clone, Debug, Serialize)]
pub struct LogHealth {
    pub log: &'static str,
    /// Of this process.
    pub records: u64,
    pub bytes: u64,
    pub fsyncs: u64,
    pub dropped: u64,
    /// Number after the last record with the operating system, and after the last on the disk.
    pub written_seq: u64,
    pub synced_seq: u64,
    pub queued_bytes: u64,
    pub segments_sealed: u64,
    /// Age of the oldest record that is not on the disk.
    pub lag_seconds: f64,
    pub free_bytes: u64,
}

impl Ledger {
    pub fn health(&self) -> Health {
        let log = |(log, stats): (&'static str, LogStats)| LogHealth {
            log,
            records: stats.records,
            bytes: stats.bytes,
            fsyncs: stats.fsyncs,
            dropped: stats.dropped,
            written_seq: stats.written_seq,
            synced_seq: stats.synced_seq,
            queued_bytes: stats.queued_bytes,
            segments_sealed: stats.segments_sealed,
            lag_seconds: stats.lag.as_secs_f64(),
            free_bytes: stats.free_bytes,
        };
        Health {
            writer: self.writer.to_string(),
            problem: self.predictions.check().err().map(|problem| problem.to_string()),
            logs: self.stats().into_iter().map(log).collect(),
            sinks: self.delivery().map(Delivery::stats).unwrap_or_default(),
        }
    }
}

/// One draft for each thread that answers: records are made without asking for memory.
fn with_draft<T>(work: impl FnOnce(&mut Draft) -> T) -> T {
    thread_local!(static DRAFT: RefCell<Draft> = RefCell::default());
    DRAFT.with_borrow_mut(|draft| {
        let done = work(draft);
        if draft.len() > DRAFT_KEPT_MAX {
            *draft = Draft::default();
        }
        done
    })
}

/// Keeps what a payload holds from being guessed from its hash, once it is erased.
fn salt() -> [u8; 32] {
    let mut salt = [0; 32];
    rand::rng().fill_bytes(&mut salt);
    salt
}

fn say(log: &str, found: &Recovery) {
    if let Some(damage) = &found.damage {
        tracing::error!(log, damage, "the ledger was damaged, see 'tidegate audit verify'");
    }
    let (records, cut_bytes) = (found.next_seq, found.cut_bytes);
    match cut_bytes {
        0 => tracing::info!(log, records, "ledger open"),
        _ => {
            tracing::warn!(log, records, cut_bytes, "ledger open, an unfinished record was cut off")
        }
    }
}

/// Takes the ledger for this process.
fn lock(dir: &Path) -> Result<File, OpenError> {
    let path = dir.join(LOCK);
    let failed = |error| OpenError::Io { path: path.clone(), error };
    std::fs::create_dir_all(dir).map_err(failed)?;
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.map_err(failed)?;
    let until = Instant::now() + LOCK_WAIT_MAX;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(std::fs::TryLockError::Error(error)) => return Err(failed(error)),
            Err(std::fs::TryLockError::WouldBlock) if Instant::now() < until => {
                std::thread::sleep(LOCK_POLL);
            }
            Err(std::fs::TryLockError::WouldBlock) => {
                return Err(OpenError::Locked { path: dir.to_owned() });
            }
        }
    }
}

/// Who writes here: made once for each folder.
fn writer(dir: &Path) -> Result<WriterId, OpenError> {
    let path = dir.join(WRITER);
    let made = || {
        let mut id = [0; 8];
        rand::rng().fill_bytes(&mut id);
        WriterId(id).to_string().into_bytes()
    };
    let text = kept(&path, made)?;
    let foreign = || OpenError::Foreign { path: path.clone(), what: "expected 16 hex digits" };
    let digits = std::str::from_utf8(&text).ok().map(str::trim).filter(|text| text.len() == 16);
    let id = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok());
    Ok(WriterId(id.ok_or_else(foreign)?.to_be_bytes()))
}

fn hash_key(dir: &Path) -> Result<Vec<u8>, OpenError> {
    let path = dir.join(KEYS).join(HASH_KEY);
    let key = kept(&path, || salt().to_vec())?;
    match key.len() {
        32 => Ok(key),
        _ => Err(OpenError::Foreign { path, what: "expected a key of 32 bytes" }),
    }
}

/// What a small file of the ledger holds; if it is not there, what `make` gives.
fn kept(path: &Path, make: impl FnOnce() -> Vec<u8>) -> Result<Vec<u8>, OpenError> {
    let failed = |error| OpenError::Io { path: path.to_owned(), error };
    match std::fs::read(path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        read => return read.map_err(failed),
    }
    let (made, part) = (make(), path.with_extension("part"));
    let write = || {
        let folder = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(folder)?;
        let mut options = File::options();
        let mut file = options.create(true).truncate(true).write(true).mode(0o600).open(&part)?;
        file.write_all(&made)?;
        file.sync_all()?;
        std::fs::rename(&part, path)?;
        File::open(folder)?.sync_all()
    };
    write().map_err(failed)?;
    Ok(made)
}

#[cfg(test)]
mod tests;
