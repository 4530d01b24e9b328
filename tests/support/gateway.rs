//! A whole gateway in this process, made of the models that a test or a benchmark brings.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use tidegate::batch::{Lane, LaneParts, ThreadBudget};
use tidegate::domain::{
    BatchSettings, Digest, Failure, IndexEntry, ModelControl, ModelFile, ModelName, ModelSettings,
    Recording, Signature, Version,
};
use tidegate::engine::Session;
use tidegate::gateway::{self, Gateway};
use tidegate::observe::{Observer, VersionStats};
use tidegate::route::{ModelRoutes, Published, RouteTable, Served};
use tidegate::transport::shm::SharedMemory;
use tidegate::transport::toggles::Toggles;
use tidegate::transport::{Api, Health, Settings};

type Done<'a> = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>>;

/// No repository: nothing to list, to load or to unload.
pub struct NoControl;

impl ModelControl for NoControl {
    fn index(&self) -> Vec<IndexEntry> {
        Vec::new()
    }

    fn load<'a>(
        &'a self,
        _model: &'a ModelName,
        _config: Option<&'a str>,
        _files: Vec<ModelFile>,
    ) -> Done<'a> {
        Box::pin(async { Err(Failure::unsupported("there is no repository")) })
    }

    fn unload<'a>(&'a self, _model: &'a ModelName) -> Done<'a> {
        Box::pin(async { Err(Failure::unsupported("there is no repository")) })
    }
}

/// Version 1 of a model, with one worker for each session.
pub fn served(
    observer: &Observer,
    budget: &Arc<ThreadBudget>,
    name: &str,
    signature: &Signature,
    sessions: Vec<Box<dyn Session>>,
    batch: BatchSettings,
) -> Arc<Served> {
    let model = (name.parse().unwrap(), Version::new(1).unwrap());
    served_as(observer, budget, model, signature, sessions, batch)
}

/// Some version of a model.
pub fn served_as(
    observer: &Observer,
    budget: &Arc<ThreadBudget>,
    (model, version): (ModelName, Version),
    signature: &Signature,
    sessions: Vec<Box<dyn Session>>,
    batch: BatchSettings,
) -> Arc<Served> {
    let digest = Digest::new([7; 32]);
    let stats = VersionStats::new(observer, &model, version, &digest, "fake");
    let settings = ModelSettings { batch: batch.clone(), ..ModelSettings::default() };
    let parts = LaneParts {
        model: model.clone(),
        version,
        batch,
        batched: signature.batched,
        padding: None,
        sessions,
        stats: Arc::clone(&stats),
        budget: Arc::clone(budget),
    };
    let lane = Lane::new(parts).unwrap();
    stats.set_gauges(Box::new(lane.gauges()));
    let signature = signature.clone();
    let recording = Recording::default();
    Arc::new(Served {
        model,
        version,
        digest,
        engine: "fake",
        signature,
        settings,
        lane,
        stats,
        recording,
        watch: None,
    })
}

/// A table of these models, each under its own name.
pub fn table(models: impl IntoIterator<Item = Arc<Served>>) -> RouteTable {
    let routes = |served: Arc<Served>| {
        let name = served.model.clone();
        let versions = BTreeMap::from([(served.version, served)]);
        (name, ModelRoutes { versions, ..ModelRoutes::default() })
    };
    let models = models.into_iter().map(routes).collect();
    RouteTable { models, revision: 1, ..RouteTable::default() }
}

/// Everything behind the listeners, ready.
pub fn api(
    observer: Arc<Observer>,
    control: Arc<dyn ModelControl>,
    models: impl IntoIterator<Item = Arc<Served>>,
    gateway: gateway::Settings,
    settings: Settings,
) -> Arc<Api> {
    let table = Arc::new(Published::new(table(models)));
    let health = Arc::new(Health::default());
    health.set_ready();
    Arc::new(Api {
        gateway: Arc::new(Gateway::new(table, observer, control, gateway)),
        health,
        shm: SharedMemory::new(false),
        toggles: Toggles::default(),
        intake: tidegate::transport::intake::Intake::new(&settings),
        settings,
    })
}
