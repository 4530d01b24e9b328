//! Delivers the ledger to the engines that teams have: a bucket, Kafka, receivers of CloudEvents.
//!
//! ```text
//! segments ─▶ Follower ─▶ batch ─▶ Kafka, CloudEvents ─┬─ taken ─▶ offset, in sinks/<name>.json
//! parquet/ ─▶ files that are new or changed ─▶ bucket ─┘─ not ───▶ wait, read anew, again
//!             one thread for all of it, with a runtime of its own
//! ```
//!
//! Invariants:
//! - Nothing that a sink does reaches a request. A sink that is slow or away costs disk: what it has
//!   not taken yet stays ([`Delivery::delivered_up_to`]), up to a cap, and then `on_cap` decides.
//! - At least once: an offset is kept after the sink took what is before it, never before. Whatever
//!   comes twice has the same key and the same content, so that the sink can tell.
//! - A batch is read when it is sent, and read anew when it is sent again: data that was erased
//!   before does not leave.
//! - Every answer of a sink is taken, again or refused; every wait ends.
//! - What does not come is counted, logged, and said to the sink in its place.
//!
//! Deliberately absent: order between sinks, and exactly once, which no sink of these could promise.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use futures_util::future::{LocalBoxFuture, join_all};
use globset::{Glob, GlobSet, GlobSetBuilder};
use parking_lot::Mutex;
use serde::Serialize;
use tokio::sync::oneshot;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;

use super::{PREDICTIONS, follow};
use crate::observe::page::{Family, Kind};
use crate::panics;

mod events;
mod kafka;
mod objects;
mod offset;
mod pace;
mod stores;
mod worker;

pub use events::EventsSettings;
pub use kafka::{KafkaSettings, Mechanism};
pub use objects::ObjectsSettings;
pub(super) use stores::open as open_bucket;

use objects::Objects;
use worker::Worker;

/// Folder of the offsets, in the ledger's.
pub const SINKS: &str = "sinks";
/// How long the end of the program waits for what is still to be sent.
const STOP_MAX: Duration = Duration::from_secs(3);
/// How long a sink rests after an error of ours.
const PANIC_REST: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 10_000 });
/// How much nicer than the rest of the process this is.
const NICE: i32 = 5;
/// Most patterns of models.
const PATTERNS_MAX: usize = 64;

/// What goes where; by default nothing goes anywhere.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    pub objects: Option<ObjectsSettings>,
    pub kafka: Option<KafkaSettings>,
    pub events: Option<EventsSettings>,
    /// Of which models.
    pub models: Models,
    pub cap: Cap,
    /// Longest wait before a sink is tried again.
    pub backoff_max: Duration,
}

impl Settings {
    /// Nobody is delivered to.
    pub fn is_empty(&self) -> bool {
        self.objects.is_none() && self.kafka.is_none() && self.events.is_none()
    }
}

/// How much may wait for a sink.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cap {
    /// 0: no limit.
    pub bytes_max: u64,
    pub age_max: Option<Duration>,
    pub on_cap: OnCap,
}

/// What becomes of what waits beyond the cap.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnCap {
    /// It stays, and the disk may fill.
    #[default]
    Keep,
    /// The oldest is passed over, counted and said.
    Skip,
}

/// Patterns of models; none means all.
#[derive(Clone, Debug, Default)]
pub struct Models(Option<GlobSet>);

impl Models {
    /// Patterns between commas.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut set = GlobSetBuilder::new();
        let patterns = text.split(',').map(str::trim).filter(|pattern| !pattern.is_empty());
        let patterns: Vec<&str> = patterns.collect();
        if patterns.len() > PATTERNS_MAX {
            return Err(format!(
                "expected at most {PATTERNS_MAX} patterns, got {}",
                patterns.len()
            ));
        }
        for pattern in &patterns {
            set.add(Glob::new(pattern).map_err(|error| error.to_string())?);
        }
        let set = set.build().map_err(|error| error.to_string())?;
        Ok(Self((!patterns.is_empty()).then_some(set)))
    }

    fn contain(&self, model: &str) -> bool {
        self.0.as_ref().is_none_or(|set| set.is_match(model))
    }
}

/// The number after the last record of a log that is written.
pub type End = Arc<dyn Fn() -> u64 + Send + Sync>;

/// What is delivered.
#[derive(Clone)]
pub struct Source {
    /// The ledger's folder.
    pub dir: PathBuf,
    pub writer: String,
    /// Of the predictions.
    pub end: End,
}

/// How a sink does.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct SinkStats {
    /// `objects`, `kafka` or `events`.
    pub sink: &'static str,
    /// It took what it was given last.
    pub up: bool,
    /// Records that it has not taken; 0 for a bucket, which takes files.
    #[schema(minimum = 0)]
    pub lag_records: u64,
    /// Files that it has not taken.
    #[schema(minimum = 0)]
    pub lag_files: u64,
    /// Bytes of sealed segments, or of files, that are kept for it.
    #[schema(minimum = 0)]
    pub lag_bytes: u64,
    /// Age of the oldest that it has not taken.
    #[schema(minimum = 0)]
    pub lag_seconds: f64,
    /// Of this process: records, of a bucket files.
    #[schema(minimum = 0)]
    pub delivered: u64,
    /// Given up, since the sink refused them for good.
    #[schema(minimum = 0)]
    pub refused: u64,
    /// Passed over: removed before their turn, or beyond the cap.
    #[schema(minimum = 0)]
    pub skipped: u64,
    /// Passed over, since the log is damaged there.
    #[schema(minimum = 0)]
    pub damaged: u64,
    /// Tries that failed.
    #[schema(minimum = 0)]
    pub failures: u64,
    /// More waits than `sinks.retain_bytes_max` or `sinks.retain_age_max_s` says.
    pub over_cap: bool,
    /// Why it failed last, while it is not up.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// What a sink's worker says and others ask.
#[derive(Debug)]
struct Shared {
    name: &'static str,
    /// It is given files, not records.
    files: bool,
    /// Number after the last record that was taken.
    next_seq: AtomicU64,
    /// The same as it is on the disk: nothing before it is needed any more.
    saved_seq: AtomicU64,
    /// When the oldest came that was not taken, in nanoseconds since 1970; 0: there is none.
    oldest_ns: AtomicU64,
    lag_files: AtomicU64,
    lag_bytes: AtomicU64,
    delivered: AtomicU64,
    refused: AtomicU64,
    skipped: AtomicU64,
    damaged: AtomicU64,
    failures: AtomicU64,
    up: AtomicBool,
    over_cap: AtomicBool,
    /// Guards the text of the last failure.
    problem: Mutex<Option<String>>,
}

impl Shared {
    fn new(name: &'static str, files: bool) -> Arc<Self> {
        Arc::new(Self {
            name,
            files,
            next_seq: AtomicU64::new(0),
            saved_seq: AtomicU64::new(0),
            oldest_ns: AtomicU64::new(0),
            lag_files: AtomicU64::new(0),
            lag_bytes: AtomicU64::new(0),
            delivered: AtomicU64::new(0),
            refused: AtomicU64::new(0),
            skipped: AtomicU64::new(0),
            damaged: AtomicU64::new(0),
            failures: AtomicU64::new(0),
            up: AtomicBool::new(true),
            over_cap: AtomicBool::new(false),
            problem: Mutex::new(None),
        })
    }

    fn add(counter: &AtomicU64, count: u64) {
        counter.fetch_add(count, Ordering::Relaxed);
    }

    /// Says a failure when it is the first.
    fn failed(&self, why: &str) {
        Self::add(&self.failures, 1);
        let sink = self.name;
        match self.up.swap(false, Ordering::Relaxed) {
            true => tracing::warn!(sink, why, "the ledger's sink takes nothing, it is tried again"),
            false => tracing::debug!(sink, why, "the ledger's sink takes nothing still"),
        }
        *self.problem.lock() = Some(why.to_owned());
    }

    fn took(&self, count: u64) {
        Self::add(&self.delivered, count);
        if !self.up.swap(true, Ordering::Relaxed) {
            *self.problem.lock() = None;
            tracing::info!(sink = self.name, "the ledger's sink takes records again");
        }
    }

    fn stats(&self, end: u64, now_ns: u64) -> SinkStats {
        let get = |value: &AtomicU64| value.load(Ordering::Relaxed);
        let lag_records = match self.files {
            true => 0,
            false => end.saturating_sub(get(&self.next_seq)),
        };
        let oldest = get(&self.oldest_ns);
        let lag_ns = if oldest == 0 { 0 } else { now_ns.saturating_sub(oldest) };
        SinkStats {
            sink: self.name,
            up: self.up.load(Ordering::Relaxed),
            lag_records,
            lag_files: get(&self.lag_files),
            lag_bytes: get(&self.lag_bytes),
            lag_seconds: lag_ns as f64 / 1e9,
            delivered: get(&self.delivered),
            refused: get(&self.refused),
            skipped: get(&self.skipped),
            damaged: get(&self.damaged),
            failures: get(&self.failures),
            over_cap: self.over_cap.load(Ordering::Relaxed),
            problem: self.problem.lock().clone(),
        }
    }
}

fn now_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

/// The sinks of a ledger, at work.
pub struct Delivery {
    sinks: Vec<Arc<Shared>>,
    end: End,
    stop: CancellationToken,
    /// Guards the word that the thread has ended, which is waited for once.
    ended: Mutex<Option<oneshot::Receiver<()>>>,
}

/// Makes a sink's work, anew after an error of ours.
type Make = Box<dyn Fn() -> LocalBoxFuture<'static, ()> + Send>;
type MakeSink = Box<dyn Fn() -> Box<dyn worker::Sink> + Send>;
type Work = Vec<(Arc<Shared>, Make)>;

impl Delivery {
    /// Starts the thread that delivers. Before anything is recorded: what a crash of the machine
    /// took from the log's end is then told apart from what is new.
    ///
    /// # Errors
    /// When the log cannot be read, or the thread cannot be started.
    pub fn start(settings: &Settings, source: Source) -> anyhow::Result<Self> {
        let stop = CancellationToken::new();
        let end = follow::end(&source.dir.join(PREDICTIONS))?;
        let (mut sinks, mut work) = (Vec::new(), Work::new());
        let mut add = |shared: Arc<Shared>, make: Make| {
            sinks.push(Arc::clone(&shared));
            work.push((shared, make));
        };
        if let Some(own) = &settings.objects {
            let shared = Shared::new("objects", true);
            let parts = (own.clone(), settings.clone(), source.clone(), stop.clone());
            let given = Arc::clone(&shared);
            add(
                shared,
                Box::new(move || {
                    let (own, settings, source, stop) = parts.clone();
                    Box::pin(Objects::new(own, &settings, &source, Arc::clone(&given), stop).run())
                }),
            );
        }
        let mut add_worker = |name, sink: MakeSink| {
            let shared = Shared::new(name, false);
            worker::place(&source, end, &shared);
            let (settings, source) = (settings.clone(), source.clone());
            let (given, stop) = (Arc::clone(&shared), stop.clone());
            let make = move || -> LocalBoxFuture<'static, ()> {
                let shared = Arc::clone(&given);
                Box::pin(Worker::new(&settings, &source, shared, stop.clone(), sink()).run())
            };
            add(shared, Box::new(make));
        };
        if let Some(own) = settings.kafka.clone() {
            let writer = source.writer.clone();
            add_worker(
                "kafka",
                Box::new(move || Box::new(kafka::Kafka::new(own.clone(), writer.clone()))),
            );
        }
        if let Some(own) = settings.events.clone() {
            let writer = source.writer.clone();
            add_worker(
                "events",
                Box::new(move || Box::new(events::Events::new(own.clone(), &writer))),
            );
        }
        let (done, ended) = oneshot::channel();
        let stopping = stop.clone();
        let thread = std::thread::Builder::new().name("ledger-sinks".to_owned());
        thread.spawn(move || {
            run(work, &stopping);
            // Nobody may be waiting.
            done.send(()).ok();
        })?;
        Ok(Self { sinks, end: source.end, stop, ended: Mutex::new(Some(ended)) })
    }

    /// Records of the predictions before this number are not needed for delivery any more.
    pub fn delivered_up_to(&self) -> u64 {
        let saved = self.sinks.iter().map(|sink| sink.saved_seq.load(Ordering::Relaxed));
        saved.min().unwrap_or(u64::MAX)
    }

    pub fn stats(&self) -> Vec<SinkStats> {
        let (end, now) = ((self.end)(), now_ns());
        self.sinks.iter().map(|sink| sink.stats(end, now)).collect()
    }

    /// For the metrics page.
    pub fn families(&self) -> Vec<Family> {
        let stats = self.stats();
        let family = |name, kind, help, of: fn(&SinkStats) -> f64| {
            let mut family = Family::new(name, kind, help);
            for sink in &stats {
                family.push(vec![("sink".into(), sink.sink.to_owned())], of(sink));
            }
            family
        };
        let gauge = |name, help, of| family(name, Kind::Gauge, help, of);
        let mut taken = Family::new(
            "tidegate_ledger_sink_records_total",
            Kind::Counter,
            "Records, of a bucket files, by what came of them",
        );
        for sink in &stats {
            let counts = [
                ("delivered", sink.delivered),
                ("refused", sink.refused),
                ("skipped", sink.skipped),
                ("damaged", sink.damaged),
            ];
            for (outcome, count) in counts {
                let labels = vec![
                    ("sink".into(), sink.sink.to_owned()),
                    ("outcome".into(), outcome.to_owned()),
                ];
                taken.push(labels, count as f64);
            }
        }
        vec![
            gauge("tidegate_ledger_sink_up", "Whether it took what it was given last", |sink| {
                f64::from(u8::from(sink.up))
            }),
            gauge("tidegate_ledger_sink_lag_records", "Records not taken yet", |sink| {
                sink.lag_records as f64
            }),
            gauge("tidegate_ledger_sink_lag_files", "Files not taken yet", |sink| {
                sink.lag_files as f64
            }),
            gauge("tidegate_ledger_sink_lag_bytes", "Bytes on the disk kept for it", |sink| {
                sink.lag_bytes as f64
            }),
            gauge("tidegate_ledger_sink_lag_seconds", "Age of the oldest not taken yet", |sink| {
                sink.lag_seconds
            }),
            gauge("tidegate_ledger_sink_over_cap", "Whether more waits than may", |sink| {
                f64::from(u8::from(sink.over_cap))
            }),
            taken,
            family(
                "tidegate_ledger_sink_failures_total",
                Kind::Counter,
                "Tries that failed",
                |sink| sink.failures as f64,
            ),
        ]
    }

    /// Sends what is left, as far as that goes in [`STOP_MAX`]; the rest goes after the next start.
    pub async fn stop(&self) {
        self.stop.cancel();
        let ended = self.ended.lock().take();
        if let Some(ended) = ended {
            // An error means that the thread is gone.
            ended.await.ok();
        }
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// The thread: all sinks on one runtime, which blocks nobody else.
fn run(work: Work, stop: &CancellationToken) {
    // Whatever is left to delivery is what requests do not need. It works as well without.
    rustix::process::setpriority_process(None, NICE).ok();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(%error, "nothing of the ledger is delivered"),
    };
    runtime.block_on(async {
        let all = join_all(work.iter().map(|(shared, make)| keep_up(shared, make, stop)));
        let late = async {
            stop.cancelled().await;
            sleep(STOP_MAX).await;
        };
        tokio::select! {
            _ = all => {}
            () = late => tracing::warn!("a sink of the ledger was left with something to take"),
        }
    });
}

/// An error of ours in one sink ends neither the others nor the gateway.
async fn keep_up(shared: &Shared, make: &Make, stop: &CancellationToken) {
    loop {
        if panics::caught_async(make()).await.is_some() {
            return;
        }
        shared.failed("delivery panicked");
        tracing::error!(sink = shared.name, "delivery panicked, it begins anew after a rest");
        tokio::select! {
            () = sleep(PANIC_REST) => {}
            () = stop.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests;
