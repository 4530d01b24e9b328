//! Answers kept by what was asked, for models whose operator asked for it.
//!
//! ```text
//! gateway ──key──▶ recall ──hit──▶ outputs, without the lane
//!                    └───miss──▶ lane ──outputs──▶ keep (a copy) ──▶ evicted, too old, or swept
//! ```
//!
//! Invariants:
//! - A key is the SHA-256 of everything that an answer hangs on: the artifact's digest, who serves
//!   it and how, and every input's datatype, shape and bytes. Nobody can make two requests that
//!   share a key and differ in any of these, so what comes back is what the model said.
//! - What is kept never passes `bytes_max`, whoever asks for what, and is a copy of its own: an
//!   entry keeps neither its batch's buffers nor an engine's memory alive.
//! - Only answers are kept, never failures.
//!
//! Deliberately absent: requests that are equal and under way at once each run; they batch well.

use std::hash::RandomState;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use quick_cache::sync::Cache as Entries;
use quick_cache::{Lifecycle, OptionsBuilder, Weighter};
use sha2::{Digest as _, Sha256};

use crate::domain::{Digest, ModelName, ModelSettings, Tensor, Version};

/// What an entry and its place in the table weigh beside the tensors' bytes.
const ENTRY_OVERHEAD_BYTES: usize = 256;
/// What a tensor weighs beside its bytes.
const TENSOR_OVERHEAD_BYTES: usize = 128;
/// A guess that sizes the table of keys lately evicted; being wrong tenfold costs little.
const ENTRY_LIKELY_BYTES: usize = 4096;
/// Parts with a lock of their own, at most.
const SHARDS_MAX: usize = 16;

/// Limits of what is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// All entries together, their overhead included.
    pub bytes_max: usize,
    /// Inputs of a request that is looked up, and outputs of one that is kept.
    pub entry_bytes_max: usize,
    /// `None`: until evicted.
    pub ttl: Option<Duration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self { bytes_max: 64 << 20, entry_bytes_max: 1 << 20, ttl: None }
    }
}

/// Who would answer: all but the inputs that an answer hangs on.
#[derive(Clone, Copy)]
pub struct Scope<'a> {
    pub model: &'a ModelName,
    pub version: Version,
    pub digest: &'a Digest,
    pub engine: &'static str,
    pub settings: &'a ModelSettings,
}

/// What was asked, and of whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// The key of inputs in the signature's order.
    pub fn new(scope: &Scope<'_>, inputs: &[Tensor]) -> Self {
        let mut hash = Sha256::new();
        // Every part has a fixed length or says it, so that no two lists of parts read the same.
        hash.update(scope.digest.as_bytes());
        hash.update(scope.version.get().to_le_bytes());
        part(&mut hash, scope.model.as_str().as_bytes());
        part(&mut hash, scope.engine.as_bytes());
        part(&mut hash, format!("{:?}", scope.settings.providers).as_bytes());
        number(&mut hash, scope.settings.intra_threads.unwrap_or(0));
        number(&mut hash, inputs.len());
        for tensor in inputs {
            part(&mut hash, tensor.datatype().name().as_bytes());
            number(&mut hash, tensor.shape().len());
            tensor.shape().iter().for_each(|dim| number(&mut hash, *dim));
            part(&mut hash, tensor.data());
        }
        Self(hash.finalize().into())
    }
}

fn part(hash: &mut Sha256, bytes: &[u8]) {
    number(hash, bytes.len());
    hash.update(bytes);
}

fn number(hash: &mut Sha256, number: usize) {
    hash.update((number as u64).to_le_bytes());
}

/// Outputs of one request, in the signature's order.
struct Entry {
    digest: Digest,
    outputs: Vec<Tensor>,
    weight: u64,
    kept_at: Instant,
}

/// How full the cache is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    pub bytes: u64,
    pub entries: u64,
    /// Entries that made room for others, since the start.
    pub evicted: u64,
}

/// The gateway's only cache, shared by all models that use it.
pub struct Cache {
    entries: Entries<Key, Arc<Entry>, Weigh, RandomState, Evicted>,
    settings: Settings,
    evicted: Evicted,
    /// Revision of the route table at the last sweep.
    swept: AtomicU64,
}

impl Cache {
    pub fn new(settings: Settings) -> Self {
        let evicted = Evicted::default();
        // Each shard must have room for several of the largest entries.
        let largest = weight_of(settings.entry_bytes_max, 1).saturating_mul(4);
        let shards = (settings.bytes_max / largest).clamp(1, SHARDS_MAX);
        // The builder rounds up, which could make the shards too small again.
        let shards = if shards.is_power_of_two() { shards } else { shards.next_power_of_two() / 2 };
        let options = OptionsBuilder::new()
            .shards(shards)
            .estimated_items_capacity((settings.bytes_max / ENTRY_LIKELY_BYTES).max(shards * 32))
            .weight_capacity(settings.bytes_max as u64)
            .build()
            .expect("both capacities are set");
        // The keys are digests, but whoever picks the inputs picks their low bits too: the table
        // hashes them with a secret of its own.
        let entries = Entries::with_options(options, Weigh, RandomState::new(), evicted.clone());
        Self { entries, settings, evicted, swept: AtomicU64::new(0) }
    }

    /// Whether inputs of these sizes are looked up at all: hashing takes time in proportion.
    pub fn takes(&self, inputs: &[Tensor]) -> bool {
        bytes_of(inputs) <= self.settings.entry_bytes_max
    }

    /// The outputs kept under `key`.
    pub fn recall(&self, key: &Key) -> Option<Vec<Tensor>> {
        let entry = self.entries.get(key)?;
        if self.settings.ttl.is_some_and(|ttl| entry.kept_at.elapsed() >= ttl) {
            self.entries.remove_if(key, |kept| Arc::ptr_eq(kept, &entry));
            return None;
        }
        Some(entry.outputs.clone())
    }

    /// Keeps a copy of `outputs`; too large ones are not kept.
    pub fn keep(&self, key: Key, digest: Digest, outputs: &[Tensor]) {
        let bytes = bytes_of(outputs);
        if bytes > self.settings.entry_bytes_max {
            return;
        }
        let outputs: Vec<Tensor> = outputs.iter().map(Tensor::copied).collect();
        let weight = weight_of(bytes, outputs.len()) as u64;
        let entry = Entry { digest, outputs, weight, kept_at: Instant::now() };
        self.entries.insert(key, Arc::new(entry));
    }

    /// Drops what no version in `served` answers for, once per `revision` of the route table.
    pub fn sweep(&self, revision: u64, served: impl Fn(&Digest) -> bool) {
        if self.swept.swap(revision, Ordering::Relaxed) != revision {
            self.entries.retain(|_, entry| served(&entry.digest));
        }
    }

    pub fn load(&self) -> Load {
        Load {
            bytes: self.entries.weight(),
            entries: self.entries.len() as u64,
            evicted: self.evicted.0.load(Ordering::Relaxed),
        }
    }
}

fn bytes_of(tensors: &[Tensor]) -> usize {
    tensors.iter().map(|tensor| tensor.data().len()).fold(0, usize::saturating_add)
}

fn weight_of(bytes: usize, tensors: usize) -> usize {
    bytes.saturating_add(ENTRY_OVERHEAD_BYTES + tensors * TENSOR_OVERHEAD_BYTES)
}

#[derive(Clone)]
struct Weigh;

impl Weighter<Key, Arc<Entry>> for Weigh {
    fn weight(&self, _key: &Key, entry: &Arc<Entry>) -> u64 {
        entry.weight
    }
}

/// Counts entries that made room.
#[derive(Clone, Default)]
struct Evicted(Arc<AtomicU64>);

impl Lifecycle<Key, Arc<Entry>> for Evicted {
    type RequestState = ();

    fn on_evict(&self, _state: &mut (), _key: Key, _entry: Arc<Entry>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use smallvec::smallvec;

    use super::*;
    use crate::domain::{DataType, Provider, Shape};

    struct Who {
        model: ModelName,
        version: Version,
        digest: Digest,
        engine: &'static str,
        settings: ModelSettings,
    }

    impl Who {
        fn new() -> Self {
            Self {
                model: "m".parse().unwrap(),
                version: Version::new(1).unwrap(),
                digest: Digest::new([7; 32]),
                engine: "tract",
                settings: ModelSettings::default(),
            }
        }

        fn key(&self, inputs: &[Tensor]) -> Key {
            let Self { model, version, digest, engine, settings } = self;
            let version = *version;
            Key::new(&Scope { model, version, digest, engine, settings }, inputs)
        }
    }

    fn tensor(datatype: DataType, shape: &[usize], data: &[u8]) -> Tensor {
        let data = Bytes::copy_from_slice(data);
        Tensor::new(datatype, Shape::from_slice(shape), data).unwrap()
    }

    fn bytes(count: usize, value: u8) -> Tensor {
        tensor(DataType::Uint8, &[count], &vec![value; count])
    }

    #[test]
    fn a_key_hangs_on_everything_that_the_answer_does() {
        let who = Who::new();
        let x = tensor(DataType::Int32, &[2], &[1, 0, 0, 0, 2, 0, 0, 0]);
        let one = std::slice::from_ref(&x);
        let plain = who.key(one);
        assert_eq!(plain, who.key(&[x.copied()]), "equal inputs in other memory");
        let others = [
            ("bytes", who.key(&[tensor(DataType::Int32, &[2], &[1, 0, 0, 0, 3, 0, 0, 0])])),
            ("datatype", who.key(&[tensor(DataType::Uint32, &[2], x.data())])),
            ("shape", who.key(&[tensor(DataType::Int32, &[2, 1], x.data())])),
            ("one more input", who.key(&[x.clone(), x.clone()])),
            ("no input", who.key(&[])),
            ("model", Who { model: "n".parse().unwrap(), ..Who::new() }.key(one)),
            ("version", Who { version: Version::new(2).unwrap(), ..Who::new() }.key(one)),
            ("digest", Who { digest: Digest::new([8; 32]), ..Who::new() }.key(one)),
            ("engine", Who { engine: "onnxruntime", ..Who::new() }.key(one)),
            (
                "provider",
                Who {
                    settings: ModelSettings {
                        providers: vec![Provider::Cuda { device_id: 0, memory_max_bytes: None }],
                        ..ModelSettings::default()
                    },
                    ..Who::new()
                }
                .key(one),
            ),
        ];
        let mut seen = std::collections::HashSet::from([plain]);
        for (what, key) in others {
            assert!(seen.insert(key), "{what} is not part of the key");
        }
        // Where one tensor ends and the next begins is part of it too.
        let cut = |at: usize| who.key(&[bytes(at, 1), bytes(8 - at, 1)]);
        assert_ne!(cut(3), cut(4));
    }

    #[test]
    fn what_is_kept_comes_back_and_holds_no_foreign_memory() {
        let cache = Cache::new(Settings::default());
        let batch = Bytes::from(vec![5_u8; 1 << 20]);
        let row = Tensor::new(DataType::Uint8, smallvec![4], batch.slice(8..12)).unwrap();
        let key = Who::new().key(&[bytes(1, 1)]);
        assert_eq!(cache.recall(&key), None);
        cache.keep(key, Digest::new([7; 32]), std::slice::from_ref(&row));
        let kept = cache.recall(&key).unwrap();
        assert_eq!(kept, [row]);
        assert!(!batch.as_ptr_range().contains(&kept[0].data().as_ptr()));
        assert!(cache.load().bytes < 1024, "{:?}", cache.load());
    }

    #[test]
    fn bytes_are_bounded_and_the_largest_is_left_out() {
        let settings = Settings { bytes_max: 64 << 10, entry_bytes_max: 4 << 10, ttl: None };
        let cache = Cache::new(settings);
        let (who, digest) = (Who::new(), Digest::new([7; 32]));
        for at in 0..5000_u32 {
            let asked = tensor(DataType::Uint32, &[1], &at.to_le_bytes());
            cache.keep(who.key(&[asked]), digest, &[bytes(1000, 1)]);
            assert!(cache.load().bytes <= settings.bytes_max as u64, "{:?}", cache.load());
        }
        let load = cache.load();
        assert!(load.entries >= 20 && load.evicted >= 4900, "{load:?}");
        let key = who.key(&[bytes(2, 2)]);
        cache.keep(key, digest, &[bytes(4097, 1)]);
        assert_eq!(cache.recall(&key), None);
        cache.keep(key, digest, &[bytes(4096, 1)]);
        assert!(cache.recall(&key).is_some(), "the largest entry that is allowed fits a shard");
        assert!(cache.takes(&[bytes(4096, 1)]) && !cache.takes(&[bytes(4096, 1), bytes(1, 1)]));
    }

    #[test]
    fn an_old_entry_is_a_miss_and_goes() {
        let ttl = Some(Duration::from_millis(20));
        let cache = Cache::new(Settings { ttl, ..Settings::default() });
        let key = Who::new().key(&[]);
        cache.keep(key, Digest::new([7; 32]), &[bytes(1, 1)]);
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(cache.recall(&key), None);
        assert_eq!(cache.load().entries, 0);
    }

    #[test]
    fn a_sweep_drops_what_is_served_no_more() {
        let cache = Cache::new(Settings::default());
        let (old, new) = (Digest::new([1; 32]), Digest::new([2; 32]));
        for (at, digest) in [(1, old), (2, old), (3, new)] {
            cache.keep(Who::new().key(&[bytes(at, 1)]), digest, &[bytes(1, 1)]);
        }
        cache.sweep(1, |digest| *digest == new);
        assert_eq!(cache.load().entries, 1);
        // Nothing changed since: nothing is looked at.
        cache.sweep(1, |_| false);
        assert_eq!(cache.load().entries, 1);
    }

    #[test]
    fn threads_get_whole_answers_of_their_own_questions() {
        let cache = Cache::new(Settings { bytes_max: 32 << 10, ..Settings::default() });
        std::thread::scope(|scope| {
            for seed in 0..4_u8 {
                let cache = &cache;
                scope.spawn(move || {
                    let who = Who::new();
                    for at in 0..2000_usize {
                        let value = u8::try_from((at + usize::from(seed)) % 100).unwrap();
                        let key = who.key(&[bytes(1, value)]);
                        match cache.recall(&key) {
                            Some(kept) => assert_eq!(kept, [bytes(600, value)]),
                            None => cache.keep(key, Digest::new([7; 32]), &[bytes(600, value)]),
                        }
                    }
                });
            }
        });
        assert!(cache.load().bytes <= 32 << 10);
    }
}
