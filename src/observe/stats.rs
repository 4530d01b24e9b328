//! Counters of one loaded version.
//!
//! Every request adds to them from an I/O thread, so each series is kept once per thread shard and
//! folded when somebody reads. A series comes to life with the first request of its arm and
//! protocol, and goes with the version.
//!
//! Invariants:
//! - Recording takes no lock, waits for nobody and allocates only for a series' first request.
//! - The set of series is bounded: four fixed arms, [`RULES_MAX`] rules, three protocols.
//!
//! What a rollout reads and watches is in [`arms`].

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;

mod arms;

pub use arms::{ArmTotals, Watched, is_server_fault};

use super::histogram::{BatchSizes, Latency, LatencyShard, nanos};
use super::shadow::{ShadowCounts, ShadowFold, ShadowOutcome};
use crate::domain::{
    Arm, Completion, Digest, ErrorKind, Label, ModelName, Outcome, Protocol, Timings, Version,
};

/// Routing rules with series of their own, which is as many as a traffic table may hold; those of
/// tables before it count too, and what is beyond as [`ARM_OTHER`].
pub const RULES_MAX: usize = crate::domain::RULES_MAX;
/// Arm of requests beyond [`RULES_MAX`].
pub const ARM_OTHER: &str = "other";
/// Different batch sizes that the statistics list; executions of further ones are only counted.
pub const BATCH_SIZES_MAX: usize = 1024;

/// Copies of each series. More threads than this share; a power of two near the I/O threads of a
/// usual machine.
const SHARDS: usize = 8;
pub(super) const OUTCOMES: usize = 1 + ErrorKind::ALL.len();
const PROTOCOLS: usize = Protocol::ALL.len();
const FIXED_ARMS: [&str; 4] = ["stable", "canary", "pinned", ARM_OTHER];

/// How often and for how long, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DurationStat {
    pub count: u64,
    pub ns: u64,
}

impl DurationStat {
    fn add(&mut self, count: u64, ns: u64) {
        self.count += count;
        self.ns += ns;
    }
}

/// Executions of one batch size.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BatchStat {
    pub batch_size: u64,
    pub compute_input: DurationStat,
    pub compute_infer: DurationStat,
    pub compute_output: DurationStat,
}

/// What the statistics extension shows of a version.
///
/// As Triton counts: the compute durations of a batch count once for each of its requests in the
/// totals, and once for the execution in `batches`. `queue` holds the batch window too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StatsSnapshot {
    /// Milliseconds since the epoch; 0 when there was none.
    pub last_inference_ms: u64,
    /// Rows answered.
    pub inference_count: u64,
    pub execution_count: u64,
    pub success: DurationStat,
    pub fail: DurationStat,
    pub queue: DurationStat,
    pub compute_input: DurationStat,
    pub compute_infer: DurationStat,
    pub compute_output: DurationStat,
    /// Answered by the cache: time to find the answer. Not part of `inference_count`.
    pub cache_hit: DurationStat,
    /// Asked of the cache in vain, then answered by the model: time to look and to keep.
    pub cache_miss: DurationStat,
    pub batches: Vec<BatchStat>,
}

/// Requests in a lane at one moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct LaneLoad {
    /// Waiting or running.
    pub(super) in_flight: usize,
    /// Waiting.
    pub(super) queue_depth: usize,
}

type Gauges = Box<dyn Fn() -> (usize, usize) + Send + Sync>;

/// Made when a version loads, gone with it.
pub struct VersionStats {
    pub(super) model: ModelName,
    pub(super) version: Version,
    pub(super) digest: Digest,
    pub(super) engine: &'static str,
    fixed: [Arms; FIXED_ARMS.len()],
    rules: Box<[OnceLock<(Label, Arms)>; RULES_MAX]>,
    /// Guards the counters of executions, which the lane adds to once per batch, beside a run of
    /// the model that costs far more. Nothing else happens under it.
    executions: Mutex<Executions>,
    cache_hit: DurationCount,
    cache_miss: DurationCount,
    shadow: ShadowCounts,
    gauges: OnceLock<Gauges>,
    loaded_in: OnceLock<Duration>,
    watch: arms::Watch,
}

/// The series of one arm, by protocol.
#[derive(Default)]
struct Arms([OnceLock<Box<Series>>; PROTOCOLS]);

/// Requests of one arm and protocol.
#[derive(Default)]
struct Series([Shard; SHARDS]);

/// Two cache lines, which processors fetch together, so that neighbours do not disturb each other.
#[derive(Default)]
#[repr(align(128))]
struct Shard {
    outcomes: [AtomicU64; OUTCOMES],
    rows: AtomicU64,
    fail_ns: AtomicU64,
    success_ns: AtomicU64,
    executed: AtomicU64,
    waited_ns: AtomicU64,
    compute_input_ns: AtomicU64,
    compute_infer_ns: AtomicU64,
    compute_output_ns: AtomicU64,
    last_ms: AtomicU64,
    request: LatencyShard,
    queue: LatencyShard,
    batch_wait: LatencyShard,
    compute: LatencyShard,
    overhead: LatencyShard,
}

/// Folded numbers of one arm and protocol.
#[derive(Clone, Debug, Default)]
pub(super) struct SeriesFold {
    pub(super) outcomes: [u64; OUTCOMES],
    pub(super) request: Latency,
    pub(super) queue: Latency,
    pub(super) batch_wait: Latency,
    pub(super) compute: Latency,
    pub(super) overhead: Latency,
}

impl SeriesFold {
    fn add(&mut self, other: &Self) {
        for (total, more) in self.outcomes.iter_mut().zip(other.outcomes) {
            *total += more;
        }
        self.request.add(&other.request);
        self.queue.add(&other.queue);
        self.batch_wait.add(&other.batch_wait);
        self.compute.add(&other.compute);
        self.overhead.add(&other.overhead);
    }
}

/// Folded numbers of one version, for the metrics page.
#[derive(Clone, Debug, Default)]
pub(super) struct VersionFold {
    pub(super) series: BTreeMap<(String, &'static str), SeriesFold>,
    pub(super) stats: StatsSnapshot,
    pub(super) batch_sizes: BatchSizes,
    /// Elements of padded inputs; `None` for a model without padding.
    pub(super) padded: Option<PaddedElements>,
    pub(super) load: LaneLoad,
    pub(super) loaded_in: Option<Duration>,
    pub(super) shadow: ShadowFold,
}

/// What executions of a model with padding ran on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct PaddedElements {
    pub(super) real: u64,
    pub(super) padding: u64,
}

impl VersionFold {
    /// Joins what two instances of one version counted: while a reload replaces an instance, both
    /// live for a moment, and a page may hold each series only once.
    pub(super) fn add(&mut self, other: Self) {
        for (key, series) in other.series {
            self.series.entry(key).or_default().add(&series);
        }
        self.batch_sizes.add(&other.batch_sizes);
        self.shadow.add(other.shadow);
        self.padded = match (self.padded, other.padded) {
            (Some(ours), Some(theirs)) => Some(PaddedElements {
                real: ours.real + theirs.real,
                padding: ours.padding + theirs.padding,
            }),
            (ours, theirs) => ours.or(theirs),
        };
        self.load.in_flight += other.load.in_flight;
        self.load.queue_depth += other.load.queue_depth;
        self.loaded_in = other.loaded_in.or(self.loaded_in);
        let (ours, theirs) = (&mut self.stats, &other.stats);
        ours.inference_count += theirs.inference_count;
        ours.execution_count += theirs.execution_count;
        for (mine, more) in [
            (&mut ours.success, theirs.success),
            (&mut ours.fail, theirs.fail),
            (&mut ours.queue, theirs.queue),
            (&mut ours.compute_input, theirs.compute_input),
            (&mut ours.compute_infer, theirs.compute_infer),
            (&mut ours.compute_output, theirs.compute_output),
            (&mut ours.cache_hit, theirs.cache_hit),
            (&mut ours.cache_miss, theirs.cache_miss),
        ] {
            mine.add(more.count, more.ns);
        }
    }
}

/// A [`DurationStat`] that is added to; of models that use the cache only, so kept once.
#[derive(Default)]
struct DurationCount {
    count: AtomicU64,
    ns: AtomicU64,
}

impl DurationCount {
    fn add(&self, took: Duration) {
        add(&self.count, 1);
        add(&self.ns, nanos(took));
    }

    fn read(&self) -> DurationStat {
        DurationStat { count: read(&self.count), ns: read(&self.ns) }
    }
}

#[derive(Default)]
struct Executions {
    count: u64,
    sizes: BatchSizes,
    by_size: BTreeMap<u64, BatchStat>,
    padded: Option<PaddedElements>,
}

impl VersionStats {
    /// Registers the version's series with `observer`; they end when the last `Arc` goes.
    pub fn new(
        observer: &super::Observer,
        model: &ModelName,
        version: Version,
        digest: &Digest,
        engine: &'static str,
    ) -> Arc<Self> {
        let stats = Arc::new(Self {
            model: model.clone(),
            version,
            digest: *digest,
            engine,
            fixed: Default::default(),
            rules: Box::new([const { OnceLock::new() }; RULES_MAX]),
            executions: Mutex::default(),
            cache_hit: DurationCount::default(),
            cache_miss: DurationCount::default(),
            shadow: ShadowCounts::default(),
            gauges: OnceLock::new(),
            loaded_in: OnceLock::new(),
            watch: arms::Watch::new(observer.alarm()),
        });
        observer.register(&stats);
        stats
    }

    /// Says where the load of the version's lane is read: requests in flight, and waiting. Hold the
    /// lane weakly in there: it holds these counters. Later calls have no effect.
    pub fn set_gauges(&self, gauges: Box<dyn Fn() -> (usize, usize) + Send + Sync>) {
        drop(self.gauges.set(gauges));
    }

    /// Records how long loading and warming took. Later calls have no effect.
    pub fn loaded_in(&self, duration: Duration) {
        self.loaded_in.get_or_init(|| duration);
    }

    /// One finished request.
    pub fn completed(&self, completion: &Completion) {
        let series = self.arms(completion.arm.as_ref()).series(completion.protocol);
        series.0[shard_index()].record(completion);
        self.watch.completed(completion);
    }

    /// One execution of a batch of `rows`.
    pub fn executed(&self, rows: usize, timings: &Timings) {
        let rows = rows as u64;
        let mut executions = self.executions.lock();
        executions.count += 1;
        executions.sizes.record(rows);
        let room = executions.by_size.len() < BATCH_SIZES_MAX;
        if room || executions.by_size.contains_key(&rows) {
            let stat = executions.by_size.entry(rows).or_default();
            stat.batch_size = rows;
            stat.compute_input.add(1, nanos(timings.compute_input));
            stat.compute_infer.add(1, nanos(timings.compute_infer));
            stat.compute_output.add(1, nanos(timings.compute_output));
        }
    }

    /// One request that the cache answered.
    pub fn cache_hit(&self, took: Duration) {
        self.cache_hit.add(took);
    }

    /// One request that the cache could not answer and the model did.
    pub fn cache_miss(&self, took: Duration) {
        self.cache_miss.add(took);
    }

    /// What became of a copy of a request that this version was to run on.
    pub fn shadow_ended(&self, outcome: ShadowOutcome) {
        self.shadow.ended(outcome);
    }

    /// Whether an output was as in the answer that `primary` gave.
    pub fn shadow_compared(&self, primary: Version, output: &Arc<str>, agreed: bool) {
        self.shadow.compared(primary, output, agreed);
    }

    /// In the order of [`ShadowOutcome::ALL`].
    pub fn shadow_outcomes(&self) -> [u64; ShadowOutcome::ALL.len()] {
        self.shadow.outcomes()
    }

    /// Elements of padded inputs in one execution: those that callers sent, and padding.
    pub fn padded(&self, real: usize, padding: usize) {
        let mut executions = self.executions.lock();
        let padded = executions.padded.get_or_insert_default();
        padded.real += real as u64;
        padded.padding += padding as u64;
    }

    pub fn snapshot(&self) -> StatsSnapshot {
        let mut stats = StatsSnapshot {
            cache_hit: self.cache_hit.read(),
            cache_miss: self.cache_miss.read(),
            ..StatsSnapshot::default()
        };
        for (_, arms) in self.every_arm() {
            for series in arms.0.iter().filter_map(OnceLock::get) {
                series.fold_stats(&mut stats);
            }
        }
        let executions = self.executions.lock();
        stats.execution_count = executions.count;
        stats.batches = executions.by_size.values().copied().collect();
        stats
    }

    pub(super) fn fold(&self) -> VersionFold {
        let mut series = BTreeMap::new();
        for (arm, arms) in self.every_arm() {
            for (protocol, one) in Protocol::ALL.iter().zip(&arms.0) {
                if let Some(one) = one.get() {
                    series.insert((arm.to_owned(), protocol.as_str()), one.fold());
                }
            }
        }
        let (batch_sizes, padded) = {
            let executions = self.executions.lock();
            (executions.sizes.clone(), executions.padded)
        };
        let (in_flight, queue_depth) = self.gauges.get().map_or((0, 0), |read| read());
        VersionFold {
            series,
            stats: self.snapshot(),
            batch_sizes,
            padded,
            load: LaneLoad { in_flight, queue_depth },
            loaded_in: self.loaded_in.get().copied(),
            shadow: self.shadow.fold(),
        }
    }

    fn every_arm(&self) -> impl Iterator<Item = (&str, &Arms)> {
        let rules = self.rules.iter().filter_map(OnceLock::get);
        let rules = rules.map(|(name, arms)| (name.as_str(), arms));
        FIXED_ARMS.into_iter().zip(&self.fixed).chain(rules)
    }

    fn arms(&self, arm: Option<&Arm>) -> &Arms {
        match arm {
            Some(Arm::Stable) => &self.fixed[0],
            Some(Arm::Canary) => &self.fixed[1],
            Some(Arm::Pinned) => &self.fixed[2],
            // A rule may bear a fixed arm's name, and a page may hold each series only once.
            Some(Arm::Rule(rule)) => {
                match FIXED_ARMS.iter().position(|name| *name == rule.as_str()) {
                    Some(at) => &self.fixed[at],
                    None => self.rule(rule),
                }
            }
            None => &self.fixed[3],
        }
    }

    /// The rule's slot, or the next free one; threads that race for it agree on who got it.
    fn rule(&self, rule: &Label) -> &Arms {
        for slot in self.rules.iter() {
            let (name, arms) = slot.get_or_init(|| (rule.clone(), Arms::default()));
            if name == rule {
                return arms;
            }
        }
        &self.fixed[3]
    }
}

impl Arms {
    fn series(&self, protocol: Protocol) -> &Series {
        self.0[protocol as usize].get_or_init(Box::default)
    }
}

impl Series {
    fn fold(&self) -> SeriesFold {
        let mut folded = SeriesFold::default();
        for shard in &self.0 {
            for (total, count) in folded.outcomes.iter_mut().zip(&shard.outcomes) {
                *total += read(count);
            }
            shard.request.fold_into(&mut folded.request);
            shard.queue.fold_into(&mut folded.queue);
            shard.batch_wait.fold_into(&mut folded.batch_wait);
            shard.compute.fold_into(&mut folded.compute);
            shard.overhead.fold_into(&mut folded.overhead);
        }
        folded
    }

    fn fold_stats(&self, stats: &mut StatsSnapshot) {
        for shard in &self.0 {
            let failed = shard.outcomes[1..].iter().map(read).sum();
            let executed = read(&shard.executed);
            stats.last_inference_ms = stats.last_inference_ms.max(read(&shard.last_ms));
            stats.inference_count += read(&shard.rows);
            stats.success.add(read(&shard.outcomes[0]), read(&shard.success_ns));
            stats.fail.add(failed, read(&shard.fail_ns));
            stats.queue.add(executed, read(&shard.waited_ns));
            stats.compute_input.add(executed, read(&shard.compute_input_ns));
            stats.compute_infer.add(executed, read(&shard.compute_infer_ns));
            stats.compute_output.add(executed, read(&shard.compute_output_ns));
        }
    }
}

impl Shard {
    fn record(&self, completion: &Completion) {
        let timings = &completion.timings;
        let ok = completion.outcome == Outcome::Ok;
        let ran = completion.batch_size > 0;
        add(&self.outcomes[outcome_index(&completion.outcome)], 1);
        add(if ok { &self.success_ns } else { &self.fail_ns }, nanos(timings.total));
        self.request.record(timings.total);
        if ran {
            self.queue.record(timings.queue);
            self.batch_wait.record(timings.batch_wait);
            self.compute.record(timings.compute_infer);
            self.overhead.record(timings.overhead());
        }
        if ok && ran {
            self.record_success(completion);
        }
        if ok && completion.cached {
            self.record_last(completion);
        }
    }

    fn record_success(&self, completion: &Completion) {
        let timings = &completion.timings;
        add(&self.executed, 1);
        add(&self.rows, completion.rows as u64);
        add(&self.waited_ns, nanos(timings.queue + timings.batch_wait));
        add(&self.compute_input_ns, nanos(timings.compute_input));
        add(&self.compute_infer_ns, nanos(timings.compute_infer));
        add(&self.compute_output_ns, nanos(timings.compute_output));
        self.record_last(completion);
    }

    fn record_last(&self, completion: &Completion) {
        let since_epoch = completion.received_at.duration_since(SystemTime::UNIX_EPOCH);
        let ms = since_epoch.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(0));
        self.last_ms.fetch_max(ms, Ordering::Relaxed);
    }
}

/// Counters only ever grow and nobody infers one from another while they do, so no ordering.
fn add(counter: &AtomicU64, more: u64) {
    counter.fetch_add(more, Ordering::Relaxed);
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// 0 for success, else one more than the kind's place in [`ErrorKind::ALL`].
pub(super) fn outcome_index(outcome: &Outcome) -> usize {
    match outcome {
        Outcome::Ok => 0,
        Outcome::Failed { kind, .. } => 1 + *kind as usize,
    }
}

/// The word that stands at an [`outcome_index`].
pub(super) fn outcome_word(index: usize) -> &'static str {
    match index.checked_sub(1).and_then(|at| ErrorKind::ALL.get(at)) {
        Some(kind) => kind.code(),
        None => "ok",
    }
}

fn shard_index() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static INDEX: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS;
    }
    INDEX.try_with(|index| *index).unwrap_or(0)
}

#[cfg(test)]
mod tests;
