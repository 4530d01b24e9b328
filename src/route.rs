//! The published table; picks a version for a request.
//!
//! Control builds an immutable [`RouteTable`] and publishes it; the request path takes one
//! snapshot per request. No lock is shared and neither side can wait for the other.
//!
//! ```text
//! request ─┬─ names a number or label ───────────────────────────▶ that version, arm `pinned`
//!          └─ names none ─┬─ model has no traffic table ─────────▶ label `stable`, or the highest
//!                         └─ Split ─┬─ a rule matches ───────────▶ the rule's version and arm
//!                                   └─ bucket of its sticky key,
//!                                      or of its prediction id ──▶ `stable` or `canary`
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::{Arc, OnceLock, Weak};
use std::time::Duration;

use arc_swap::ArcSwap;
use smallvec::SmallVec;
use uuid::Uuid;

use crate::batch::Lane;
use crate::domain::{
    Arm, CallMeta, Digest, ErrorKind, Failure, Label, ModelName, ModelSettings, ParameterValue,
    Recording, RouteReason, Signature, Traffic, Version, VersionRef,
};
use crate::monitor::Watch;
use crate::observe::VersionStats;

mod split;

use split::Choice;
pub use split::Split;

/// Label of the version that requests without a wish get.
const STABLE: &str = "stable";
/// When a caller may find again what takes a model's traffic.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// One loaded version, with all that serving it takes.
pub struct Served {
    pub model: ModelName,
    pub version: Version,
    pub digest: Digest,
    /// `onnxruntime` or `tract`.
    pub engine: &'static str,
    pub signature: Signature,
    pub settings: ModelSettings,
    pub lane: Lane,
    pub stats: Arc<VersionStats>,
    /// What the ledger keeps of its predictions.
    pub recording: Recording,
    /// Looks at its rows; `None` when nothing does.
    pub watch: Option<Arc<Watch>>,
}

/// The loaded versions of one model.
///
/// `split` is made of the other two: whoever changes them ends with [`ModelRoutes::refresh`].
#[derive(Default, Clone)]
pub struct ModelRoutes {
    pub versions: BTreeMap<Version, Arc<Served>>,
    pub labels: HashMap<Label, Version>,
    /// How requests without a version are divided; `None`: they all get one version.
    pub split: Option<Arc<Split>>,
}

/// Everything that can be routed to, immutable.
#[derive(Default, Clone)]
pub struct RouteTable {
    pub models: BTreeMap<ModelName, ModelRoutes>,
    /// Model that `/invocations` means; `None` when there is no single one.
    pub default_model: Option<ModelName>,
    /// Grows with every change.
    pub revision: u64,
    /// See [`RouteTable::header_names`].
    pub asked: HeaderNames,
}

/// The version picked for one request, and why.
#[derive(Clone)]
pub struct Pick {
    pub served: Arc<Served>,
    pub arm: Arm,
    pub reason: RouteReason,
    /// Versions that are to run on a copy of the request.
    pub mirrors: Mirrors,
}

/// Room for as many as a request usually has.
pub type Mirrors = SmallVec<[Mirror; 2]>;

/// A version that runs on copies of requests.
#[derive(Clone)]
pub struct Mirror {
    /// Held weakly: it does not live longer for the sake of a request that another one answers.
    pub served: Weak<Served>,
    /// Of all requests, in buckets.
    pub share: u16,
}

/// What a request brings that may decide its version, if it names none.
#[derive(Clone, Copy)]
pub struct Keys<'a> {
    pub call: &'a CallMeta,
    pub parameters: &'a [(String, ParameterValue)],
    pub prediction_id: Uuid,
}

impl RouteTable {
    /// The version that most requests get that ask like this: for what is said about a model.
    ///
    /// # Errors
    /// As [`RouteTable::pick_for`].
    pub fn pick(&self, model: &ModelName, version: Option<&VersionRef>) -> Result<Pick, Failure> {
        self.found(model, version, None)
    }

    /// The version that answers a request.
    ///
    /// # Errors
    /// `NotFound` for a model or version that is not served, `Unavailable` when none of those is
    /// that the model's traffic goes to.
    pub fn pick_for(
        &self,
        model: &ModelName,
        version: Option<&VersionRef>,
        keys: &Keys<'_>,
    ) -> Result<Pick, Failure> {
        self.found(model, version, Some(keys))
    }

    fn found(
        &self,
        model: &ModelName,
        version: Option<&VersionRef>,
        keys: Option<&Keys<'_>>,
    ) -> Result<Pick, Failure> {
        let Some(routes) = self.models.get(model) else {
            return Err(Failure::not_found(format!("model '{model}' is not found")));
        };
        let pick = match version {
            None => routes.by_traffic(keys),
            Some(VersionRef::Number(number)) => routes.pinned(*number, RouteReason::Version),
            Some(VersionRef::Label(label)) => routes.by_label(label),
        };
        pick.ok_or_else(|| match version {
            Some(version) => {
                Failure::not_found(format!("model '{model}' has no ready version '{version}'"))
            }
            None => {
                let message = format!("no version that takes model '{model}'s traffic is ready");
                Failure::new(ErrorKind::Unavailable, message).retry_after(RETRY_AFTER)
            }
        })
    }

    /// Names, in lower case, of the headers that some model's traffic asks for: in order, each
    /// once. Found by the first who asks, once for each table.
    pub fn header_names(&self) -> &[Arc<str>] {
        self.asked.0.get_or_init(|| {
            let splits = self.models.values().filter_map(|routes| routes.split.as_deref());
            let names: BTreeSet<&Arc<str>> = splits.flat_map(Split::header_names).collect();
            names.into_iter().cloned().collect()
        })
    }
}

/// Names of headers, found when they are first asked for. A copy knows none: the table that it is
/// a part of is about to be changed.
#[derive(Debug, Default)]
pub struct HeaderNames(OnceLock<Box<[Arc<str>]>>);

impl Clone for HeaderNames {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl ModelRoutes {
    /// Divides traffic by `traffic` from now on; `None`: all of it goes to the version with the
    /// label `stable`, or else to the highest. Another salt makes another assignment of keys.
    pub fn set_traffic(&mut self, traffic: Option<&Traffic>, salt: u64) {
        let compile = |traffic| Split::compile(traffic, &self.labels, salt, &self.versions);
        self.split = traffic.map(compile).map(Arc::new);
    }

    /// Makes the split anew, of the versions and labels that there are now.
    pub fn refresh(&mut self) {
        if let Some(split) = self.split.take() {
            self.set_traffic(Some(split.traffic()), split.salt());
        }
    }

    fn by_traffic(&self, keys: Option<&Keys<'_>>) -> Option<Pick> {
        let Some(split) = &self.split else { return self.usual() };
        let Choice { version, arm, reason } = match keys {
            Some(keys) => split.choose(keys),
            None => split.usual(),
        }?;
        let served = Arc::clone(self.versions.get(&version)?);
        let mirrors = match keys {
            Some(keys) => self.mirrors(split, keys.prediction_id, version),
            None => Mirrors::new(),
        };
        Some(Pick { served, arm, reason, mirrors })
    }

    /// Without a split: the version with the label `stable`, and until somebody puts that, the
    /// highest. A label whose version is not there is not passed over: what is the highest then
    /// may be what nobody wants to be used yet.
    fn usual(&self) -> Option<Pick> {
        let (served, reason) = match self.labels.get_key_value(STABLE) {
            Some((label, version)) => {
                (self.versions.get(version)?, RouteReason::Label(label.clone()))
            }
            None => (self.versions.last_key_value()?.1, RouteReason::Latest),
        };
        let (served, mirrors) = (Arc::clone(served), Mirrors::new());
        Some(Pick { served, arm: Arm::Stable, reason, mirrors })
    }

    fn by_label(&self, label: &Label) -> Option<Pick> {
        let version = match self.labels.get(label) {
            Some(version) => *version,
            // Until someone moves it, `stable` is what a caller without a wish usually gets.
            None if label.as_str() == STABLE => self.by_traffic(None)?.served.version,
            None => return None,
        };
        self.pinned(version, RouteReason::Label(label.clone()))
    }

    fn pinned(&self, version: Version, reason: RouteReason) -> Option<Pick> {
        let served = Arc::clone(self.versions.get(&version)?);
        Some(Pick { served, arm: Arm::Pinned, reason, mirrors: Mirrors::new() })
    }

    fn mirrors(&self, split: &Split, id: Uuid, primary: Version) -> Mirrors {
        let hit = split.mirrors(id, primary);
        let mirror = |(version, share)| {
            let served = Arc::downgrade(self.versions.get(&version)?);
            Some(Mirror { served, share })
        };
        hit.filter_map(mirror).collect()
    }
}

/// A value that is swapped whole.
pub struct Published<T> {
    current: ArcSwap<T>,
}

impl<T> Published<T> {
    pub fn new(first: T) -> Self {
        Self { current: ArcSwap::from_pointee(first) }
    }

    /// One consistent view. Take it once per request and pass it down: two calls may see two.
    pub fn snapshot(&self) -> Arc<T> {
        self.current.load_full()
    }

    /// Looks at the current value, for no longer than an expression takes: cheaper than a
    /// snapshot, which many threads have to count.
    pub fn look<R>(&self, at: impl FnOnce(&T) -> R) -> R {
        at(&self.current.load())
    }

    /// Puts `next` in force for every snapshot taken from now on; gives the one before.
    pub fn publish(&self, next: T) -> Arc<T> {
        self.current.swap(Arc::new(next))
    }
}

#[cfg(test)]
mod tests;
