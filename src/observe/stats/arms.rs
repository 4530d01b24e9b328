//! What a rollout reads of a version: totals of its arms, and what is looked for on request.
//!
//! Looking for failures in a row and for outputs that are not finite costs something, so it is done
//! only while somebody holds a [`Watched`].
//!
//! Invariants:
//! - A version that nobody watches pays one look at a flag per request.
//! - Watching takes no lock, waits for nobody and allocates nothing.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use tokio::sync::Notify;

use super::{Arms, OUTCOMES, VersionStats, add, read};
use crate::domain::{Arm, Completion, DataType, ErrorKind, Outcome, Tensor};
use crate::observe::histogram::{LATENCY_BUCKETS, Latency};

/// Bytes of one output that are looked through for values that are not finite: 1 MiB takes some
/// 50 us, and a model whose numbers break down rarely does so only after the first 262,144.
const FINITE_BYTES_MAX: usize = 1 << 20;

/// What requests of some arms came to, since the version's counters began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ArmTotals {
    /// Tells these counters from those of another instance of the version, which begin at 0.
    pub instance: u64,
    /// Answered.
    pub ok: u64,
    /// Failed through no fault of the caller ([`is_server_fault`]).
    pub failures: u64,
    /// Refused for what the caller sent, or given up by it.
    pub others: u64,
    /// Waiting or running in the version, of whatever arm.
    pub in_flight: u64,
    /// Requests by their whole time; bounds are [`LATENCY_BOUNDS_NS`](crate::observe::LATENCY_BOUNDS_NS).
    pub latency: [u64; LATENCY_BUCKETS],
    /// Answers with a value that is not finite, while somebody watched.
    pub non_finite: u64,
    /// Most failures in a row, since the version is watched.
    pub failures_in_a_row: u64,
}

impl ArmTotals {
    /// Ended in an answer or a failure that counts.
    pub fn requests(&self) -> u64 {
        self.ok + self.failures
    }

    /// Given to the version, whatever became of them.
    pub fn started(&self) -> u64 {
        self.ok + self.failures + self.others + self.in_flight
    }
}

/// Whether a failure says something about the version (or the gateway) and not about its caller.
pub fn is_server_fault(kind: ErrorKind) -> bool {
    match kind {
        ErrorKind::Unavailable
        // A version that is too slow fills its queue.
        | ErrorKind::Overloaded
        | ErrorKind::DeadlineExceeded
        | ErrorKind::ModelFailed
        | ErrorKind::Internal => true,
        ErrorKind::InvalidInput
        | ErrorKind::Unauthenticated
        | ErrorKind::Forbidden
        | ErrorKind::NotFound
        | ErrorKind::MethodNotAllowed
        | ErrorKind::TooLarge
        | ErrorKind::UnsupportedMedia
        | ErrorKind::RateLimited
        | ErrorKind::Cancelled
        | ErrorKind::Unsupported => false,
    }
}

/// What is looked for while somebody asks for it, in requests that the weights sent here.
pub(super) struct Watch {
    instance: u64,
    watchers: AtomicUsize,
    in_a_row: AtomicU64,
    in_a_row_max: AtomicU64,
    non_finite: AtomicU64,
    /// Rung for each failure and each answer that is not finite.
    alarm: Arc<Notify>,
}

impl Watch {
    pub(super) fn new(alarm: Arc<Notify>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            instance: NEXT.fetch_add(1, Ordering::Relaxed),
            watchers: AtomicUsize::new(0),
            in_a_row: AtomicU64::new(0),
            in_a_row_max: AtomicU64::new(0),
            non_finite: AtomicU64::new(0),
            alarm,
        }
    }

    pub(super) fn completed(&self, completion: &Completion) {
        let watched = self.watchers.load(Ordering::Relaxed) > 0;
        if watched && matches!(completion.arm, Some(Arm::Stable | Arm::Canary)) {
            self.look_at(completion);
        }
    }

    fn look_at(&self, completion: &Completion) {
        match &completion.outcome {
            Outcome::Ok => {
                // Threads that only read do not take the line from each other.
                if read(&self.in_a_row) > 0 {
                    self.in_a_row.store(0, Ordering::Relaxed);
                }
                if completion.outputs.iter().any(has_non_finite) {
                    add(&self.non_finite, 1);
                    self.alarm.notify_one();
                }
            }
            Outcome::Failed { kind, .. } if is_server_fault(*kind) => {
                let in_a_row = self.in_a_row.fetch_add(1, Ordering::Relaxed) + 1;
                self.in_a_row_max.fetch_max(in_a_row, Ordering::Relaxed);
                self.alarm.notify_one();
            }
            Outcome::Failed { .. } => {}
        }
    }
}

/// Holds a version under watch until it goes.
#[derive(Debug)]
pub struct Watched(Weak<VersionStats>);

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(stats) = self.0.upgrade() {
            stats.watch.watchers.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl VersionStats {
    /// Counts failures in a row and outputs that are not finite until the guard goes, and rings
    /// [`Observer::alarm`](crate::observe::Observer::alarm) for each.
    #[must_use]
    pub fn watch(self: &Arc<Self>) -> Watched {
        if self.watch.watchers.fetch_add(1, Ordering::Relaxed) == 0 {
            // Of an earlier watch.
            self.watch.in_a_row.store(0, Ordering::Relaxed);
            self.watch.in_a_row_max.store(0, Ordering::Relaxed);
        }
        Watched(Arc::downgrade(self))
    }

    /// Tells these counters from those of another instance of the version.
    pub fn instance(&self) -> u64 {
        self.watch.instance
    }

    /// Totals of one arm.
    pub fn arm_totals(&self, arm: &Arm) -> ArmTotals {
        self.totals([self.arms(Some(arm))])
    }

    /// Totals of what the weights sent here: of the arms `stable` and `canary`, because a version
    /// may be one today and the other tomorrow. Pinned requests and those of rules are not in it.
    pub fn split_totals(&self) -> ArmTotals {
        self.totals([self.arms(Some(&Arm::Stable)), self.arms(Some(&Arm::Canary))])
    }

    fn totals<const N: usize>(&self, arms: [&Arms; N]) -> ArmTotals {
        let mut outcomes = [0; OUTCOMES];
        let mut latency = Latency::default();
        for series in arms.iter().flat_map(|arms| arms.0.iter().filter_map(OnceLock::get)) {
            for shard in &series.0 {
                for (total, count) in outcomes.iter_mut().zip(&shard.outcomes) {
                    *total += read(count);
                }
                shard.request.fold_into(&mut latency);
            }
        }
        let mut totals = ArmTotals {
            instance: self.watch.instance,
            ok: outcomes[0],
            latency: latency.buckets,
            non_finite: read(&self.watch.non_finite),
            failures_in_a_row: read(&self.watch.in_a_row_max),
            ..ArmTotals::default()
        };
        for (kind, count) in ErrorKind::ALL.into_iter().zip(&outcomes[1..]) {
            *(if is_server_fault(kind) { &mut totals.failures } else { &mut totals.others }) +=
                count;
        }
        let (in_flight, _) = self.gauges.get().map_or((0, 0), |read| read());
        totals.in_flight = in_flight as u64;
        totals
    }
}

/// Whether one of the first values of a tensor of floats is infinite or no number.
fn has_non_finite(tensor: &Tensor) -> bool {
    let data = tensor.data();
    let data = &data[..data.len().min(FINITE_BYTES_MAX)];
    match tensor.datatype() {
        DataType::Fp64 => any(data.as_chunks().0, |bytes| {
            u64::from_le_bytes(bytes) & 0x7ff0_0000_0000_0000 == 0x7ff0_0000_0000_0000
        }),
        DataType::Fp32 => {
            any(data.as_chunks().0, |bytes| u32::from_le_bytes(bytes) & 0x7f80_0000 == 0x7f80_0000)
        }
        DataType::Fp16 => {
            any(data.as_chunks().0, |bytes| u16::from_le_bytes(bytes) & 0x7c00 == 0x7c00)
        }
        DataType::Bf16 => {
            any(data.as_chunks().0, |bytes| u16::from_le_bytes(bytes) & 0x7f80 == 0x7f80)
        }
        _ => false,
    }
}

/// In blocks without a way out, so that each becomes a few vector instructions.
fn any<const N: usize>(values: &[[u8; N]], is: impl Fn([u8; N]) -> bool) -> bool {
    values.chunks(256).any(|block| block.iter().fold(false, |found, bytes| found | is(*bytes)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use smallvec::smallvec;

    use super::super::tests::{completion, failed, stats};
    use super::*;
    use crate::domain::Protocol;
    use crate::observe::Observer;

    fn floats(values: &[f32]) -> Tensor {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor::new(DataType::Fp32, smallvec![values.len()], bytes.into()).unwrap()
    }

    #[test]
    fn the_split_holds_what_the_weights_sent_and_counts_only_what_is_the_servers_fault() {
        let observer = Observer::default();
        let stats = stats(&observer);
        stats.set_gauges(Box::new(|| (3, 1)));
        for arm in [Arm::Stable, Arm::Canary, Arm::Pinned, Arm::Rule("r".parse().unwrap())] {
            stats.completed(&completion(arm.clone(), Protocol::Http));
            for kind in ErrorKind::ALL {
                stats.completed(&failed(completion(arm.clone(), Protocol::Grpc), kind));
            }
        }
        let one = stats.arm_totals(&Arm::Canary);
        assert_eq!((one.ok, one.failures, one.others, one.in_flight), (1, 5, 10, 3));
        assert_eq!((one.requests(), one.started()), (6, 19));
        let both = stats.split_totals();
        assert_eq!((both.ok, both.failures, both.others), (2, 10, 20));
        // 500 us for an answer, 20 us for a failure.
        let mut latency = [0; LATENCY_BUCKETS];
        (latency[0], latency[4]) = (30, 2);
        assert_eq!(both.latency, latency);
        assert_eq!(both.instance, one.instance);
        let other = super::super::tests::stats(&observer).split_totals();
        assert_ne!(other.instance, one.instance);
        assert_eq!(other.started(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_watched_version_is_looked_at() {
        let observer = Observer::default();
        let stats = stats(&observer);
        let fail = failed(completion(Arm::Canary, Protocol::Http), ErrorKind::ModelFailed);
        let mut broken = completion(Arm::Stable, Protocol::Http);
        broken.outputs = vec![floats(&[1.0, 2.0]), floats(&[0.0, f32::NAN])];
        let feed = |times: usize| {
            (0..times).for_each(|_| stats.completed(&fail));
            stats.completed(&broken);
            stats.completed(&failed(broken.clone(), ErrorKind::InvalidInput));
        };
        let seen = || {
            let totals = stats.split_totals();
            (totals.failures_in_a_row, totals.non_finite)
        };
        let rung = async || {
            let alarm = observer.alarm();
            let waited = tokio::time::timeout(Duration::from_secs(1), alarm.notified()).await;
            waited.is_ok()
        };
        feed(4);
        assert_eq!(seen(), (0, 0));
        assert!(!rung().await);
        let watched = stats.watch();
        feed(3);
        feed(2);
        assert_eq!(seen(), (3, 2));
        assert!(rung().await);
        assert!(!rung().await, "rings of the past are one");
        let pinned = failed(completion(Arm::Pinned, Protocol::Http), ErrorKind::ModelFailed);
        (0..9).for_each(|_| stats.completed(&pinned));
        assert_eq!(seen(), (3, 2));
        drop(watched);
        feed(7);
        assert_eq!(seen(), (3, 2));
        let again = stats.watch();
        assert_eq!(seen().0, 0, "a new watch begins anew");
        drop((stats, again));
    }

    #[test]
    fn each_kind_of_float_shows_what_is_not_finite() {
        let tensor = |datatype, bytes: Vec<u8>, size: usize| {
            let shape = smallvec![bytes.len() / size];
            has_non_finite(&Tensor::new(datatype, shape, Bytes::from(bytes)).unwrap())
        };
        for (value, want) in [(0.0, false), (-1e30, false), (f32::MAX, false), (1e-40, false)]
            .into_iter()
            .chain([f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY].map(|x| (x, true)))
        {
            assert_eq!(has_non_finite(&floats(&[1.0, value, 2.0])), want, "{value}");
            let double = f64::from(value).to_le_bytes().to_vec();
            assert_eq!(tensor(DataType::Fp64, double, 8), want, "{value}");
            let bf16 = half::bf16::from_f32(value).to_le_bytes().to_vec();
            // The largest f32 is beyond the largest bf16.
            assert_eq!(tensor(DataType::Bf16, bf16, 2), want || value == f32::MAX, "{value}");
            let small = if value.abs() > 60_000.0 && value.is_finite() { 60_000.0 } else { value };
            let half = half::f16::from_f32(small).to_le_bytes().to_vec();
            assert_eq!(tensor(DataType::Fp16, half, 2), want, "{value}");
        }
        let mut long = vec![0.0; 5_000];
        assert!(!has_non_finite(&floats(&long)));
        long[4_999] = f32::INFINITY;
        assert!(has_non_finite(&floats(&long)));
        assert!(!tensor(DataType::Int32, vec![0xff; 8], 4));
    }
}
