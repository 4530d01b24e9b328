//! The published table; picks a version for a request.
//!
//! Control builds an immutable [`RouteTable`] and publishes it; the request path takes one
//! snapshot per request. No lock is shared and neither side can wait for the other.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::batch::Lane;
use crate::domain::{
    Arm, Digest, Failure, Label, ModelName, ModelSettings, RouteReason, Signature, Version,
    VersionRef,
};
use crate::observe::VersionStats;

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
}

/// The loaded versions of one model.
#[derive(Default, Clone)]
pub struct ModelRoutes {
    pub versions: BTreeMap<Version, Arc<Served>>,
    pub labels: HashMap<Label, Version>,
}

/// Everything that can be routed to, immutable.
#[derive(Default, Clone)]
pub struct RouteTable {
    pub models: BTreeMap<ModelName, ModelRoutes>,
    /// Model that `/invocations` means; `None` when there is no single one.
    pub default_model: Option<ModelName>,
    /// Grows with every change.
    pub revision: u64,
}

/// The version picked for one request, and why.
#[derive(Clone)]
pub struct Pick {
    pub served: Arc<Served>,
    pub arm: Arm,
    pub reason: RouteReason,
}

impl RouteTable {
    /// # Errors
    /// `NotFound` for a model or version that is not served.
    pub fn pick(&self, model: &ModelName, version: Option<&VersionRef>) -> Result<Pick, Failure> {
        let Some(routes) = self.models.get(model) else {
            return Err(Failure::not_found(format!("model '{model}' is not found")));
        };
        let missing = |what: &dyn std::fmt::Display| {
            Failure::not_found(format!("model '{model}' has no ready version '{what}'"))
        };
        let number = match version {
            None => {
                let latest = routes.versions.last_key_value();
                let (_, served) = latest.ok_or_else(|| missing(&"latest"))?;
                let served = Arc::clone(served);
                return Ok(Pick { served, arm: Arm::Stable, reason: RouteReason::Latest });
            }
            Some(VersionRef::Number(number)) => *number,
            Some(VersionRef::Label(label)) => match routes.labels.get(label) {
                Some(number) => *number,
                // Until someone moves it, `stable` is what a caller without a wish gets.
                None if label.as_str() == "stable" => {
                    let latest = routes.versions.last_key_value();
                    *latest.ok_or_else(|| missing(label))?.0
                }
                None => return Err(missing(label)),
            },
        };
        let served = Arc::clone(routes.versions.get(&number).ok_or_else(|| missing(&number))?);
        let reason = match version {
            Some(VersionRef::Label(label)) => RouteReason::Label(label.clone()),
            _ => RouteReason::Version,
        };
        Ok(Pick { served, arm: Arm::Pinned, reason })
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

    /// Puts `next` in force for every snapshot taken from now on; gives the one before.
    pub fn publish(&self, next: T) -> Arc<T> {
        self.current.swap(Arc::new(next))
    }
}
