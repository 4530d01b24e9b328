//! The thread that turns sealed segments into Parquet, `ledger-parquet`.
//!
//! It looks at the log's folder now and then and converts what has no manifest, or another than its
//! segment. Nobody waits for it, and it runs when nobody else wants the processor.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use tokio::sync::oneshot;
use tokio::time::timeout;

use super::{Job, Manifest, ParquetError, SegmentEntry, convert};
use crate::ledger::export::Selection;
use crate::ledger::frame::WriterId;
use crate::ledger::reader::{self, SegmentFile, SegmentReader};
use crate::ledger::retention::DaysOf;

/// A segment that could not be converted is tried again after this.
const AGAIN_AFTER: Duration = Duration::from_secs(60);
/// How long the end of the program waits for the thread once its time is over.
const LATE_MAX: Duration = Duration::from_millis(500);
/// Below what serves: the processor's idle time, for the most part.
const NICE: i32 = 10;

/// What is converted, and to where.
#[derive(Clone)]
pub struct ConverterSettings {
    /// Folder of the log of predictions.
    pub log: PathBuf,
    /// Folder of the Parquet files.
    pub root: PathBuf,
    /// Days that a model's records are kept, if that is known.
    pub days_of: DaysOf,
    /// How often the log's folder is looked at.
    pub every: Duration,
}

/// How far the conversion is, for metrics and `audit stats`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Progress {
    /// Of this process.
    pub segments: u64,
    pub rows: u64,
    pub failures: u64,
    /// Records that their segments have damaged, and that no file has.
    pub unreadable: u64,
    /// Sealed segments that are not converted yet.
    pub waiting: u64,
    /// Why the latest failure was.
    pub failure: Option<String>,
}

/// The thread; dropped, it ends.
pub struct Converter {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
    /// Guards the word that the thread has ended, which is waited for once.
    ended: Mutex<Option<oneshot::Receiver<()>>>,
}

#[derive(Default)]
struct Shared {
    /// Guards only itself: it is held for no longer than a copy takes.
    progress: Mutex<Progress>,
    /// Guards the wish to end, which the thread sleeps on: until then it may convert what there is.
    stop: Mutex<Option<Instant>>,
    woken: Condvar,
}

impl Converter {
    /// Starts the thread. `between` runs on it after each look: what else is to be done with files
    /// of the log.
    ///
    /// # Errors
    /// When there can be no thread.
    pub fn start(
        settings: ConverterSettings,
        between: impl FnMut() + Send + 'static,
    ) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let its = Arc::clone(&shared);
        let (done, ended) = oneshot::channel();
        let thread = std::thread::Builder::new().name("ledger-parquet".to_owned());
        let thread = thread.spawn(move || {
            work(&settings, &its, between);
            // Nobody may be waiting.
            done.send(()).ok();
        })?;
        Ok(Self { shared, thread: Some(thread), ended: Mutex::new(Some(ended)) })
    }

    pub fn progress(&self) -> Progress {
        self.shared.progress.lock().clone()
    }

    /// Converts what is sealed by now, for as long as `time_max`, and ends the thread. What is not done
    /// by then is done after the next start.
    pub async fn finish(&self, time_max: Duration) {
        self.end_at(Instant::now() + time_max);
        let ended = self.ended.lock().take();
        if let Some(ended) = ended {
            // It looks now and then whether its time is over; an error means that it is gone.
            timeout(time_max + LATE_MAX, ended).await.ok();
        }
    }

    fn end_at(&self, at: Instant) {
        *self.shared.stop.lock() = Some(at);
        self.shared.woken.notify_all();
    }

    /// Ends the thread; a file that is half written is given up.
    pub fn stop(&mut self) {
        self.end_at(Instant::now());
        // The thread itself may be the last that had the ledger: it ends by itself then.
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
            && thread.join().is_err()
        {
            tracing::error!("the thread that makes Parquet of the ledger had panicked");
        }
    }
}

impl Drop for Converter {
    fn drop(&mut self) {
        self.stop();
    }
}

fn work(settings: &ConverterSettings, shared: &Shared, mut between: impl FnMut()) {
    // On Linux of this thread alone. Without it the work is done all the same.
    if let Err(error) = rustix::process::nice(NICE) {
        tracing::debug!(%error, "the thread that makes Parquet runs as others do");
    }
    let mut seen = Seen::default();
    loop {
        let ends = shared.stop.lock().is_some();
        // A panic must not end the conversion for good; the hook has told where it was.
        if crate::panics::caught(|| look(settings, shared, &mut seen)).is_none() {
            shared.progress.lock().failures += 1;
        }
        if ends {
            return;
        }
        if crate::panics::caught(&mut between).is_none() {
            shared.progress.lock().failures += 1;
        }
        let mut stop = shared.stop.lock();
        // Asked to end, it looks once more: the last segment was sealed just now.
        if stop.is_none() {
            shared.woken.wait_for(&mut stop, settings.every);
        }
    }
}

/// What the thread knows of segments, by their first numbers.
#[derive(Default)]
struct Seen {
    failed: HashMap<u64, Instant>,
    /// Size and time of those that are converted: their manifests need not be read again.
    converted: HashMap<u64, (u64, u64)>,
}

fn look(settings: &ConverterSettings, shared: &Shared, seen: &mut Seen) {
    let todo = match todo(settings, &mut seen.converted) {
        Ok(todo) => todo,
        Err(error) => return shared.failed(settings, None, &error),
    };
    shared.progress.lock().waiting = todo.len() as u64;
    for segment in todo {
        let at = segment.first_seq;
        if seen.failed.get(&at).is_some_and(|when| when.elapsed() < AGAIN_AFTER) {
            continue;
        }
        let stopped = || shared.stop.lock().is_some_and(|at| Instant::now() >= at);
        if stopped() {
            return;
        }
        let days_of = &*settings.days_of;
        let job = Job { wanted: &Selection::default(), stopped: &stopped, days_of };
        match convert(&segment, &settings.root, &job) {
            Ok(manifest) => {
                seen.failed.remove(&at);
                let mut progress = shared.progress.lock();
                progress.segments += 1;
                progress.rows += manifest.segment.records;
                progress.unreadable += manifest
                    .unreadable
                    .iter()
                    .map(|it| it.last_seq + 1 - it.first_seq)
                    .sum::<u64>();
                progress.waiting = progress.waiting.saturating_sub(1);
                progress.failure = None;
            }
            Err(ParquetError::Stopped) => return,
            Err(error) => {
                seen.failed.insert(at, Instant::now());
                shared.failed(settings, Some(at), &error);
            }
        }
    }
}

/// Sealed segments without a manifest, or with one of what they were before.
fn todo(
    settings: &ConverterSettings,
    converted: &mut HashMap<u64, (u64, u64)>,
) -> Result<Vec<SegmentFile>, ParquetError> {
    let all = match reader::segments(&settings.log) {
        Err(error) if super::super::export::is_gone(&error) => return Ok(Vec::new()),
        all => all.map_err(super::ExportError::from)?,
    };
    let first = all.first().map_or(0, |segment| segment.first_seq);
    converted.retain(|first_seq, _| *first_seq >= first);
    let mut todo = Vec::new();
    for segment in all.into_iter().filter(|segment| segment.sealed) {
        let Ok(now) = SegmentEntry::of(&segment) else { continue };
        let now = (now.bytes, now.modified_ns);
        if converted.get(&segment.first_seq) == Some(&now) {
            continue;
        }
        // One that has no head is told of when it is converted.
        let writer = writer(&segment).unwrap_or(WriterId([0; 8]));
        let manifest = Manifest::read(&settings.root, writer, segment.first_seq);
        match manifest.is_some_and(|manifest| manifest.fits(&segment)) {
            true => drop(converted.insert(segment.first_seq, now)),
            false => todo.push(segment),
        }
    }
    Ok(todo)
}

fn writer(segment: &SegmentFile) -> Option<WriterId> {
    SegmentReader::open(segment).ok().map(|reader| reader.head().writer)
}

impl Shared {
    fn failed(&self, settings: &ConverterSettings, segment: Option<u64>, error: &ParquetError) {
        let text = error.to_string();
        let mut progress = self.progress.lock();
        progress.failures += 1;
        if progress.failure.as_ref() != Some(&text) {
            let log = settings.log.display();
            tracing::warn!(%error, %log, segment, "a segment of the ledger cannot be made Parquet");
        }
        progress.failure = Some(text);
    }
}
