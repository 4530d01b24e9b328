//! What is seen of the gateway: metrics, statistics, access log, traces.
//!
//! ```text
//! gateway ──Completion──▶ Observer ──▶ VersionStats (sharded counters) ──fold──▶ page, statistics
//!                             ├──────▶ access log   (bounded queue, own thread)
//!                             └──────▶ spans        (bounded queue, exporter task)
//! ```
//!
//! Invariants:
//! - The request path hands over each finished [`Completion`] once and never waits here: what
//!   finds no room is dropped and counted.
//! - Labels come from closed sets; the series of a version end when it does.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::domain::{Completion, ErrorKind, Outcome, Protocol};

mod access;
mod families;
mod histogram;
pub mod log;
pub mod page;
mod process;
mod shadow;
mod stats;
mod trace;
mod triton;

pub use access::AccessLog;
pub use histogram::{BATCH_BOUNDS, LATENCY_BOUNDS_NS, LATENCY_BUCKETS};
pub use process::resident_bytes;
pub use shadow::{Agreement, OUTPUTS_MAX, ShadowOutcome};
pub use stats::{
    ARM_OTHER, ArmTotals, BATCH_SIZES_MAX, BatchStat, DurationStat, RULES_MAX, StatsSnapshot,
    VersionStats, Watched, is_server_fault,
};

use families::{VersionView, Versions};
use page::{Family, Kind};

/// Kinds of failure that are shed load, from zero on the page.
const SHED: [ErrorKind; 3] =
    [ErrorKind::Overloaded, ErrorKind::RateLimited, ErrorKind::DeadlineExceeded];

#[derive(Clone, Debug)]
pub struct Settings {
    /// Triton's metric names beside our own.
    pub triton_metrics: bool,
    pub access_log: AccessLog,
    /// Where spans go; `None`: nowhere.
    pub otlp: Option<Otlp>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { triton_metrics: true, access_log: AccessLog::Off, otlp: None }
    }
}

/// Export of spans over OTLP.
#[derive(Clone, Debug, PartialEq)]
pub struct Otlp {
    /// Collector's gRPC address: `http://127.0.0.1:4317`.
    pub endpoint: String,
    /// Share of requests traced when the caller has not decided; 0 to 1.
    pub sample_ratio: f64,
    pub service_name: String,
}

/// Makes families of what another part of the gateway counts.
type FamilySource = Box<dyn Fn() -> Vec<Family> + Send + Sync>;

/// Reads how many bytes requests hold, and how many requests were refused for bytes.
type IntakeGauges = Box<dyn Fn() -> (usize, u64) + Send + Sync>;

/// Receives every completion.
pub struct Observer {
    settings: Settings,
    /// Guards the list of versions: taken when one loads and when somebody reads the page, never
    /// by a request.
    versions: Mutex<Vec<Weak<VersionStats>>>,
    /// Guards the engines in use, as above.
    engines: Mutex<BTreeMap<String, String>>,
    /// Guards what the last page saw of the machine's processors.
    cpu: Mutex<triton::CpuTimes>,
    unrouted: [[AtomicU64; stats::OUTCOMES]; Protocol::ALL.len()],
    shed: [AtomicU64; SHED.len()],
    intake: OnceLock<IntakeGauges>,
    /// Guards the list of sources: taken when a part of the gateway starts and when somebody reads
    /// the page.
    sources: Mutex<Vec<FamilySource>>,
    /// Rung for each failure in a version that is watched.
    alarm: Arc<Notify>,
    traces: Option<trace::Traces>,
    process: process::Process,
}

impl Default for Observer {
    fn default() -> Self {
        Self::with(Settings::default())
    }
}

impl Observer {
    pub fn new(settings: Settings) -> Arc<Self> {
        Arc::new(Self::with(settings))
    }

    fn with(settings: Settings) -> Self {
        let process = process::Process::new();
        let otlp = settings.otlp.clone();
        let traces = otlp.map(|otlp| trace::Traces::new(otlp, process.spans_dropped.clone()));
        Self {
            settings,
            versions: Mutex::default(),
            engines: Mutex::default(),
            cpu: Mutex::default(),
            unrouted: Default::default(),
            shed: Default::default(),
            intake: OnceLock::new(),
            sources: Mutex::default(),
            alarm: Arc::default(),
            traces,
            process,
        }
    }

    /// Counts, and hands on to the access log and the trace exporter. `stats` is the version's,
    /// when one was picked. What a shadow did is no request of anybody: it has counters of its own.
    pub fn completed(&self, stats: Option<&VersionStats>, completion: &Completion) {
        if completion.shadow_of.is_some() {
            return;
        }
        match stats {
            Some(stats) => stats.completed(completion),
            None => {
                let outcome = stats::outcome_index(&completion.outcome);
                self.unrouted[completion.protocol as usize][outcome]
                    .fetch_add(1, Ordering::Relaxed);
            }
        }
        if let Outcome::Failed { kind, .. } = &completion.outcome {
            self.count_shed(*kind);
        }
        access::log(self.settings.access_log, completion);
        if let Some(traces) = &self.traces {
            traces.offer(completion);
        }
    }

    /// Exports spans until `stop` is ready and what was handed over before is sent; a task for the
    /// app to run. Ends at once when no collector is configured.
    pub async fn export_traces(&self, stop: impl Future<Output = ()>) {
        if let Some(traces) = &self.traces {
            traces.export(stop).await;
        }
    }

    /// Shows an engine that is ready to load models.
    pub fn engine_info(&self, name: &str, version: &str) {
        self.engines.lock().insert(name.to_owned(), version.to_owned());
    }

    /// Counts a prediction that was refused before it named a model.
    pub fn refused(&self, protocol: Protocol, kind: ErrorKind) {
        let outcome = Outcome::Failed { kind, message: String::new() };
        self.unrouted[protocol as usize][stats::outcome_index(&outcome)]
            .fetch_add(1, Ordering::Relaxed);
        self.count_shed(kind);
    }

    fn count_shed(&self, kind: ErrorKind) {
        if let Some(at) = SHED.iter().position(|shed| *shed == kind) {
            self.shed[at].fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Says where the bytes that requests hold are read. Later calls have no effect.
    pub fn set_intake(&self, gauges: IntakeGauges) {
        drop(self.intake.set(gauges));
    }

    /// Adds to the page what another part counts. Its names must be its own.
    pub fn add_families(&self, source: FamilySource) {
        self.sources.lock().push(source);
    }

    /// Rung for each failure, and each answer that is not finite, in a version that is watched
    /// ([`VersionStats::watch`]); rings that nobody waited for are one.
    pub fn alarm(&self) -> Arc<Notify> {
        Arc::clone(&self.alarm)
    }

    /// Counts a connection until the guard goes.
    pub fn connection(&self) -> Connection {
        self.process.connections.increment(1.0);
        Connection(self.process.connections.clone())
    }

    /// Counts a connection that a limit closed.
    pub fn connection_closed(&self, reason: CloseReason) {
        self.process.closed[reason as usize].increment(1);
    }

    /// Counts a connection that the operating system could not give us.
    pub fn accept_failed(&self) {
        self.process.accept_errors.increment(1);
    }

    /// Counts a version that failed to load.
    pub fn load_failed(&self) {
        self.process.load_failures.increment(1);
    }

    /// Shows how full the cache of answers is, and how many it dropped to make room so far.
    pub fn cache(&self, bytes: u64, entries: u64, evicted: u64) {
        self.process.cache_bytes.set(bytes as f64);
        self.process.cache_entries.set(entries as f64);
        self.process.cache_evictions.absolute(evicted);
    }

    /// Work that somebody has to do once a second.
    pub fn upkeep(&self) {
        self.process.lines_dropped.increment(log::take_dropped());
        process::upkeep();
    }

    /// The metrics page in the form that an `Accept` header asks for, and its content type.
    pub fn page(&self, accept: Option<&str>) -> (&'static str, Bytes) {
        page::render(&self.families(), accept)
    }

    fn families(&self) -> Vec<Family> {
        let versions = self.versions();
        let unrouted = std::array::from_fn(|protocol| {
            std::array::from_fn(|at| self.unrouted[protocol][at].load(Ordering::Relaxed))
        });
        let mut families = families::requests(&versions, &unrouted);
        families.push(self.shed());
        families.push(self.in_flight_bytes());
        families.push(self.engines());
        families.extend(families::models(&versions));
        families.extend(self.sources.lock().iter().flat_map(|source| source()));
        families.extend(shadow::families(&versions));
        families.extend(process::families());
        if self.settings.triton_metrics {
            families.extend(triton::families(&versions));
            let read = |path| std::fs::read_to_string(path).unwrap_or_default();
            let (stat, meminfo) = (read("/proc/stat"), read("/proc/meminfo"));
            families.extend(triton::machine(&stat, &meminfo, &mut self.cpu.lock()));
        }
        families
    }

    fn shed(&self) -> Family {
        let help = "Requests turned away or given up for lack of capacity or time";
        let mut family = Family::new("tidegate_shed_total", Kind::Counter, help);
        let (_, for_bytes) = self.intake.get().map_or((0, 0), |read| read());
        let mut push = |reason: &str, count: u64| {
            family.push(vec![("reason".into(), reason.to_owned())], count as f64);
        };
        for (kind, count) in SHED.iter().zip(&self.shed) {
            let mut count = count.load(Ordering::Relaxed);
            // To the caller they are overloaded too; the page tells them apart.
            if *kind == ErrorKind::Overloaded {
                count = count.saturating_sub(for_bytes);
            }
            push(kind.code(), count);
        }
        push("bytes", for_bytes);
        family
    }

    fn in_flight_bytes(&self) -> Family {
        let help = "Bytes that requests in progress hold";
        let mut family = Family::new("tidegate_in_flight_bytes", Kind::Gauge, help);
        let (held, _) = self.intake.get().map_or((0, 0), |read| read());
        family.push(Vec::new(), held as f64);
        family
    }

    fn engines(&self) -> Family {
        let mut family = Family::new("tidegate_engine_info", Kind::Gauge, "Engines; always 1");
        for (name, version) in self.engines.lock().iter() {
            let labels = vec![("engine".into(), name.clone()), ("version".into(), version.clone())];
            family.push(labels, 1.0);
        }
        family
    }

    /// Everything loaded, instances of one version joined; the newest tells digest and engine.
    fn versions(&self) -> Versions {
        let mut versions = Versions::new();
        for stats in self.living() {
            let view =
                VersionView { digest: stats.digest, engine: stats.engine, fold: stats.fold() };
            let key = (stats.model.clone(), stats.version);
            match versions.get_mut(&key) {
                None => drop(versions.insert(key, view)),
                Some(known) => {
                    (known.digest, known.engine) = (view.digest, view.engine);
                    known.fold.add(view.fold);
                }
            }
        }
        versions
    }

    /// In the order they were registered. The lock is free again before anything is folded.
    fn living(&self) -> Vec<Arc<VersionStats>> {
        let mut versions = self.versions.lock();
        versions.retain(|stats| stats.strong_count() > 0);
        versions.iter().filter_map(Weak::upgrade).collect()
    }

    fn register(&self, stats: &Arc<VersionStats>) {
        let mut versions = self.versions.lock();
        versions.retain(|stats| stats.strong_count() > 0);
        versions.push(Arc::downgrade(stats));
    }
}

/// Limits that close connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CloseReason {
    /// The client had all the connections that one may have.
    PerIp,
    HeaderTimeout,
    Idle,
    /// It was open for as long as one may be.
    Age,
    /// The client took nothing of its answer.
    WriteStall,
    /// A request's body came too slowly; over HTTP/2 only its stream ends.
    SlowBody,
    /// A head that can be read in two ways; over HTTP/2 only its stream ends.
    Malformed,
}

impl CloseReason {
    pub const ALL: [Self; 7] = [
        Self::PerIp,
        Self::HeaderTimeout,
        Self::Idle,
        Self::Age,
        Self::WriteStall,
        Self::SlowBody,
        Self::Malformed,
    ];

    /// Label of the metric.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::PerIp => "per_ip",
            Self::HeaderTimeout => "header_timeout",
            Self::Idle => "idle",
            Self::Age => "age",
            Self::WriteStall => "write_stall",
            Self::SlowBody => "slow_body",
            Self::Malformed => "malformed",
        }
    }
}

/// An open connection, counted.
pub struct Connection(metrics::Gauge);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}
