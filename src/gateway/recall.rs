//! Answers from the cache, for the models that ask for it.
//!
//! Invariant: a model that does not ask for it pays one look at a flag.

use std::time::Duration;

use tokio::time::Instant;

use super::Gateway;
use crate::cache::{Cache, Key, Scope};
use crate::domain::Tensor;
use crate::route::Served;

/// What came of asking the cache.
pub(super) enum Recalled {
    /// The model does not ask for it, or the inputs are too large to be looked up.
    Off,
    Hit(Vec<Tensor>),
    Miss(Asked),
}

/// What was not there, to be kept once the model has said it.
pub(super) struct Asked {
    key: Key,
    /// Time that asking took.
    took: Duration,
}

impl Gateway {
    pub(super) fn recall(&self, served: &Served, inputs: &[Tensor]) -> Recalled {
        if !served.settings.cached {
            return Recalled::Off;
        }
        let cache = self.cache();
        if !cache.takes(inputs) {
            return Recalled::Off;
        }
        let started = Instant::now();
        let Served { model, version, digest, engine, settings, .. } = served;
        let scope = Scope { model, version: *version, digest, engine, settings };
        let key = Key::new(&scope, inputs);
        match cache.recall(&key) {
            Some(outputs) => {
                served.stats.cache_hit(started.elapsed());
                Recalled::Hit(outputs)
            }
            None => Recalled::Miss(Asked { key, took: started.elapsed() }),
        }
    }

    pub(super) fn keep(&self, asked: Asked, served: &Served, outputs: &[Tensor]) {
        let started = Instant::now();
        // A version that was retired meanwhile would leave an entry that nobody asks for.
        let table = self.table.snapshot();
        let now = table.models.get(&served.model).and_then(|of| of.versions.get(&served.version));
        if now.is_some_and(|now| now.digest == served.digest) {
            self.cache().keep(asked.key, served.digest, outputs);
        }
        served.stats.cache_miss(asked.took + started.elapsed());
    }

    /// What somebody has to do once a second: drops what retired versions left, and shows how
    /// full the cache is.
    pub fn upkeep(&self) {
        let Some(cache) = self.cache.get() else { return };
        let table = self.table.snapshot();
        cache.sweep(table.revision, |digest| {
            let mut versions = table.models.values().flat_map(|of| of.versions.values());
            versions.any(|served| served.settings.cached && served.digest == *digest)
        });
        let load = cache.load();
        self.observer.cache(load.bytes, load.entries, load.evicted);
    }

    fn cache(&self) -> &Cache {
        self.cache.get_or_init(|| Cache::new(self.settings.cache))
    }
}
