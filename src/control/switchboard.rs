//! The only writer of the route table.
//!
//! ```text
//! registry (versions) ──┐
//! director (traffic,    ├──▶ Switchboard ──▶ a whole new RouteTable ──▶ Published
//!           labels)  ───┘
//! ```
//!
//! Invariants:
//! - One change at a time; each publishes one new table, made before anything is swapped.
//! - A version that is held is loaded and warm and in no table.
//! - Publishing cannot fail and never waits for the disk.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use parking_lot::Mutex;

use crate::domain::{Label, ModelName, Traffic, Version};
use crate::route::{ModelRoutes, Published, RouteTable, Served};

/// Builds and publishes route tables.
pub struct Switchboard {
    table: Arc<Published<RouteTable>>,
    /// Model that `/invocations` means; `None`: the only one, if there is only one.
    default_model: Option<ModelName>,
    /// Guards what the table is made of, and the order of tables.
    models: Mutex<BTreeMap<ModelName, Lines>>,
}

/// What one model's part of the table is made of.
#[derive(Clone, Default)]
struct Lines {
    served: BTreeMap<Version, Arc<Served>>,
    held: BTreeSet<Version>,
    labels: HashMap<Label, Version>,
    traffic: Option<InForce>,
    /// Its versions are still being put back: in no table until all of them are there.
    closed: bool,
}

/// A traffic table, and what its sticky keys are hashed with.
#[derive(Clone, Debug, PartialEq)]
pub struct InForce {
    pub traffic: Traffic,
    pub salt: u64,
}

impl Switchboard {
    pub fn new(table: Arc<Published<RouteTable>>, default_model: Option<ModelName>) -> Self {
        Self { table, default_model, models: Mutex::default() }
    }

    /// The table of this moment.
    pub fn table(&self) -> Arc<RouteTable> {
        self.table.snapshot()
    }

    /// Puts a version in service, or beside it when `held`; gives the one that it replaces.
    pub(super) fn put(&self, served: Arc<Served>, held: bool) -> Option<Arc<Served>> {
        let (model, version) = (served.model.clone(), served.version);
        self.change(&model, |lines| {
            match held {
                true => lines.held.insert(version),
                false => lines.held.remove(&version),
            };
            lines.served.insert(version, served)
        })
    }

    /// Takes versions out of service; gives those that were there.
    pub(super) fn remove(&self, model: &ModelName, versions: &[Version]) -> Vec<Arc<Served>> {
        self.change(model, |lines| {
            lines.held.retain(|version| !versions.contains(version));
            versions.iter().filter_map(|version| lines.served.remove(version)).collect()
        })
    }

    /// Lets a version that was held take traffic, or holds it.
    pub(super) fn set_held(&self, model: &ModelName, version: Version, held: bool) {
        self.change(model, |lines| match held && lines.served.contains_key(&version) {
            true => lines.held.insert(version),
            false => lines.held.remove(&version),
        });
    }

    /// Keeps a model out of the table, or lets it in. With some of its versions only, those would get
    /// what is the others'.
    pub(super) fn set_closed(&self, model: &ModelName, closed: bool) {
        self.change(model, |lines| lines.closed = closed);
    }

    pub(super) fn set_traffic(&self, model: &ModelName, traffic: Option<InForce>) {
        self.change(model, |lines| lines.traffic = traffic);
    }

    pub(super) fn set_labels(&self, model: &ModelName, labels: HashMap<Label, Version>) {
        self.change(model, |lines| lines.labels = labels);
    }

    /// A loaded version, held or not.
    pub(super) fn served(&self, model: &ModelName, version: Version) -> Option<Arc<Served>> {
        self.models.lock().get(model)?.served.get(&version).cloned()
    }

    /// The loaded versions of a model, held ones too.
    pub(super) fn loaded(&self, model: &ModelName) -> Vec<Arc<Served>> {
        let models = self.models.lock();
        models.get(model).map(|lines| lines.served.values().cloned().collect()).unwrap_or_default()
    }

    /// Every loaded version.
    pub(super) fn everything(&self) -> Vec<Arc<Served>> {
        let models = self.models.lock();
        models.values().flat_map(|lines| lines.served.values().cloned()).collect()
    }

    pub(super) fn is_held(&self, model: &ModelName, version: Version) -> bool {
        self.models.lock().get(model).is_some_and(|lines| lines.held.contains(&version))
    }

    fn change<T>(&self, model: &ModelName, change: impl FnOnce(&mut Lines) -> T) -> T {
        let mut models = self.models.lock();
        let lines = models.entry(model.clone()).or_default();
        let result = change(lines);
        let mut next = RouteTable::clone(&self.table.snapshot());
        match lines.routes() {
            Some(routes) => drop(next.models.insert(model.clone(), routes)),
            None => drop(next.models.remove(model)),
        }
        // What is kept of a model without versions is what somebody said of it.
        let said = !lines.labels.is_empty() || lines.traffic.is_some() || lines.closed;
        if lines.served.is_empty() && !said {
            models.remove(model);
        }
        let mut names = next.models.keys();
        let only = names.next().filter(|_| next.models.len() == 1).cloned();
        next.default_model = self.default_model.clone().or(only);
        next.revision += 1;
        self.table.publish(next);
        result
    }
}

impl Lines {
    /// `None` when nothing of the model may take traffic.
    fn routes(&self) -> Option<ModelRoutes> {
        let open = self.served.iter().filter(|(version, _)| !self.held.contains(version));
        let versions: BTreeMap<Version, Arc<Served>> =
            open.map(|(version, served)| (*version, Arc::clone(served))).collect();
        if versions.is_empty() || self.closed {
            return None;
        }
        let mut routes =
            ModelRoutes { versions, labels: self.labels.clone(), ..ModelRoutes::default() };
        let (traffic, salt) = match &self.traffic {
            Some(in_force) => (Some(&in_force.traffic), in_force.salt),
            None => (None, 0),
        };
        routes.set_traffic(traffic, salt);
        Some(routes)
    }
}
