//! The repository's state and the only writer of the route table.
//!
//! Invariants:
//! - The table changes under one lock; each change is a whole new table.
//! - One load or unload of a model at a time; different models go in parallel.
//! - Slow work happens on threads of its own, never on the runtime that serves requests, and is
//!   finished even when the caller goes away.

use std::collections::BTreeMap;
use std::future::Future;
use std::path::{Component, Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{Semaphore, oneshot};

use super::manifest::Manifest;
use super::scan::{self, Repository};
use super::version::{PrepareError, Preparer, open_model};
use super::{Settings, manifest_of};
use crate::domain::{
    ErrorKind, Failure, IndexEntry, ModelControl, ModelFile, ModelName, Version, VersionState,
};
use crate::engine::{Engines, release_memory};
use crate::observe::Observer;
use crate::route::{Published, RouteTable, Served};

/// How often a retired version is looked at.
const DRAIN_POLL: Duration = Duration::from_millis(5);
/// After this long, a version without requests is let go even if its `Arc` is still held.
const DRAIN_HELD_MAX: Duration = Duration::from_secs(1);

type Done<'a> = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>>;

/// Loads, reloads and retires the models of one repository.
pub struct Registry {
    shared: Arc<Shared>,
    /// Loads at one time.
    slots: Arc<Semaphore>,
}

struct Shared {
    preparer: Preparer,
    table: Arc<Published<RouteTable>>,
    observer: Arc<Observer>,
    /// Held while the table is changed.
    writer: Mutex<()>,
    /// Guards the copies of models: read by each load, written by a sweep.
    loading: RwLock<()>,
    /// Every model of the repository was looked at: until then, what does not serve may do so soon.
    settled: AtomicBool,
    models: Mutex<BTreeMap<ModelName, Known>>,
}

/// What is known of one model.
#[derive(Default)]
struct Known {
    versions: BTreeMap<Version, (VersionState, String)>,
    /// Why it has no versions.
    problem: String,
    /// Held during a load or unload.
    busy: Arc<Mutex<()>>,
}

/// What a load call brought along.
struct Override {
    config: Option<String>,
    files: Vec<ModelFile>,
}

impl Registry {
    pub fn new(
        settings: Settings,
        engines: Arc<Engines>,
        table: Arc<Published<RouteTable>>,
        observer: Arc<Observer>,
    ) -> Arc<Self> {
        let slots = Arc::new(Semaphore::new(settings.threads.max(1)));
        let shared = Shared {
            preparer: Preparer::new(settings, engines),
            table,
            observer,
            writer: Mutex::default(),
            loading: RwLock::default(),
            settled: AtomicBool::new(false),
            models: Mutex::default(),
        };
        Arc::new(Self { shared: Arc::new(shared), slots })
    }

    /// Loads every model of the repository, several at a time; each takes traffic as soon as it
    /// is ready. Broken ones are reported and skipped.
    ///
    /// # Errors
    /// When the repository itself cannot be read.
    pub async fn load_all(&self) -> std::io::Result<()> {
        let repository = Repository::new(self.shared.preparer.settings());
        let models = match repository.models() {
            Ok(models) => models,
            Err(error) => {
                let repository = repository.root().display();
                tracing::error!(%repository, %error, "the model repository cannot be read");
                return Err(error);
            }
        };
        for model in &models {
            self.shared.models.lock().entry(model.clone()).or_default();
        }
        let loads: Vec<_> = models
            .into_iter()
            .map(|model| {
                let (shared, slots) = (Arc::clone(&self.shared), Arc::clone(&self.slots));
                tokio::spawn(async move {
                    let none = Override { config: None, files: Vec::new() };
                    let name = model.clone();
                    let work = move || shared.load(&model, &none);
                    if let Err(failure) = on_loader(Some(slots), work).await {
                        tracing::error!(model = %name, reason = failure.message, "model not loaded");
                    }
                })
            })
            .collect();
        for load in loads {
            if let Err(error) = load.await {
                tracing::error!(%error, "a load ended without a result");
            }
        }
        release_memory();
        self.shared.settled.store(true, Ordering::Release);
        let shared = Arc::clone(&self.shared);
        let tidied = on_loader(None, move || {
            shared.sweep();
            Ok(())
        });
        if let Err(failure) = tidied.await {
            tracing::warn!(reason = failure.message, "the state folder was not tidied");
        }
        Ok(())
    }
}

/// Runs `work` on a thread of its own, one of `slots` at a time.
async fn on_loader(
    slots: Option<Arc<Semaphore>>,
    work: impl FnOnce() -> Result<(), Failure> + Send + 'static,
) -> Result<(), Failure> {
    let internal = |reason: String| Failure::new(ErrorKind::Internal, reason);
    let slot =
        match slots {
            Some(slots) => Some(slots.acquire_owned().await.map_err(|_| {
                Failure::new(ErrorKind::Unavailable, "the server is shutting down")
            })?),
            None => None,
        };
    let (sender, done) = oneshot::channel();
    let thread = std::thread::Builder::new().name("loader".to_owned()).spawn(move || {
        let result = work();
        drop(slot);
        // Nobody waits any more when the caller went away; the work is done all the same.
        drop(sender.send(result));
    });
    thread.map_err(|error| internal(format!("no thread to load on: {error}")))?;
    done.await.unwrap_or_else(|_| Err(internal("the loader ended without a result".to_owned())))
}

impl ModelControl for Registry {
    fn index(&self) -> Vec<IndexEntry> {
        let models = self.shared.models.lock();
        let entries = models.iter().flat_map(|(model, known)| {
            let versions = known.versions.iter().map(|(version, (state, reason))| IndexEntry {
                model: model.clone(),
                version: Some(*version),
                state: *state,
                reason: reason.clone(),
            });
            let alone = known.versions.is_empty().then(|| IndexEntry {
                model: model.clone(),
                version: None,
                state: VersionState::Unavailable,
                reason: known.problem.clone(),
            });
            versions.chain(alone).collect::<Vec<_>>()
        });
        entries.collect()
    }

    fn load<'a>(
        &'a self,
        model: &'a ModelName,
        config: Option<&'a str>,
        files: Vec<ModelFile>,
    ) -> Done<'a> {
        Box::pin(async move {
            if !files.is_empty() && config.is_none() {
                return Err(Failure::invalid("files can be given only together with a config"));
            }
            let brought = Override { config: config.map(str::to_owned), files };
            let (shared, model) = (Arc::clone(&self.shared), model.clone());
            let work = move || shared.load(&model, &brought);
            on_loader(Some(Arc::clone(&self.slots)), work).await
        })
    }

    fn unload<'a>(&'a self, model: &'a ModelName) -> Done<'a> {
        Box::pin(async move {
            let (shared, model) = (Arc::clone(&self.shared), model.clone());
            on_loader(None, move || shared.unload(&model)).await
        })
    }
}

impl Shared {
    fn busy(&self, model: &ModelName) -> Arc<Mutex<()>> {
        Arc::clone(&self.models.lock().entry(model.clone()).or_default().busy)
    }

    fn load(&self, model: &ModelName, brought: &Override) -> Result<(), Failure> {
        let busy = self.busy(model);
        let _one = busy.lock();
        let loading = self.loading.read();
        let loaded = self.load_locked(model, brought);
        drop(loading);
        self.sweep();
        if let Err(failure) = &loaded {
            let mut models = self.models.lock();
            let known = models.entry(model.clone()).or_default();
            known.problem.clone_from(&failure.message);
            // A name that was only asked for is not part of the repository.
            if failure.kind == ErrorKind::NotFound && known.versions.is_empty() {
                models.remove(model);
            }
        }
        loaded.map_err(|failure| {
            let message = format!("failed to load '{model}': {}", failure.message);
            Failure { message, ..failure }
        })
    }

    fn load_locked(&self, model: &ModelName, brought: &Override) -> Result<(), Failure> {
        let staging;
        let repository = if brought.files.is_empty() {
            Repository::new(self.preparer.settings())
        } else {
            staging = self.preparer.staging().map_err(|error| refused(&error))?;
            place(&staging.path().join(model.as_str()), &brought.files)?;
            Repository::of_models(staging.path())
        };
        let folder = open_model(&repository, model).map_err(|error| match error {
            PrepareError::Folder { what: "model's folder", .. } => {
                Failure::not_found("it is not in the repository")
            }
            other => refused(&other),
        })?;
        let manifest = manifest_of(&repository, model, brought.config.as_deref())?;
        let there = repository
            .versions(&folder)
            .map_err(|error| Failure::invalid(format!("its folder cannot be read: {error}")))?;
        let chosen = scan::chosen(&there, manifest.settings.versions.as_ref());
        if chosen.is_empty() {
            return Err(Failure::invalid("it has no version: no folder is named by a number"));
        }
        self.announce(model, &chosen);
        let mut latest = Ok(());
        // The highest first: it is what most callers get.
        for (at, version) in chosen.iter().rev().enumerate() {
            let done = self.load_version(&repository, model, *version, &manifest);
            if at == 0 {
                latest = done;
            }
        }
        // A refused load takes nothing out of service: a broken new version must not end the old.
        if latest.is_ok() {
            self.retire_others(model, &chosen);
        }
        release_memory();
        latest
    }

    /// Tidies the state folder, unless something loads: then that load will.
    fn sweep(&self) {
        if !self.settled.load(Ordering::Acquire) {
            return;
        }
        let Some(_nothing_loads) = self.loading.try_write() else { return };
        let table = self.table.snapshot();
        let versions = table.models.values().flat_map(|routes| routes.versions.values());
        self.preparer.sweep(&versions.map(|served| served.digest).collect());
    }

    /// Shows the chosen versions as loading, unless they serve, and forgets failed ones that are
    /// no longer chosen.
    fn announce(&self, model: &ModelName, chosen: &[Version]) {
        let mut models = self.models.lock();
        let known = models.entry(model.clone()).or_default();
        known.problem.clear();
        known.versions.retain(|version, (state, _)| {
            *state == VersionState::Ready || chosen.contains(version)
        });
        for version in chosen {
            let entry = known
                .versions
                .entry(*version)
                .or_insert_with(|| (VersionState::Loading, String::new()));
            if entry.0 != VersionState::Ready {
                *entry = (VersionState::Loading, String::new());
            }
        }
    }

    fn mark(&self, model: &ModelName, version: Version, state: VersionState, reason: &str) {
        let mut models = self.models.lock();
        let known = models.entry(model.clone()).or_default();
        known.versions.insert(version, (state, reason.to_owned()));
    }

    fn load_version(
        &self,
        repository: &Repository,
        model: &ModelName,
        version: Version,
        manifest: &Manifest,
    ) -> Result<(), Failure> {
        let started = Instant::now();
        let before = self.served(model, version);
        match self.prepare(repository, model, version, manifest, before.as_ref()) {
            Ok(None) => {
                self.mark(model, version, VersionState::Ready, "");
                Ok(())
            }
            Ok(Some(served)) => {
                let (engine, digest) = (served.engine, served.digest);
                let batched = served.signature.batched;
                let took = started.elapsed();
                served.stats.loaded_in(took);
                served.stats.set_gauges(Box::new(served.lane.gauges()));
                self.publish(|table| {
                    let routes = table.models.entry(model.clone()).or_default();
                    routes.versions.insert(version, Arc::new(served));
                    routes.refresh();
                });
                self.mark(model, version, VersionState::Ready, "");
                tracing::info!(%model, %version, engine, %digest, batched, ?took, "version ready");
                if let Some(before) = before {
                    self.retire_aside(before);
                }
                Ok(())
            }
            Err(error) => {
                let reason = error.to_string();
                tracing::error!(%model, %version, reason, "version not loaded");
                self.observer.load_failed();
                match before {
                    Some(_) => {
                        let note = format!("still the one loaded before: {reason}");
                        self.mark(model, version, VersionState::Ready, &note);
                    }
                    None => self.mark(model, version, VersionState::Unavailable, &reason),
                }
                Err(Failure::invalid(format!("version {version}: {reason}")))
            }
        }
    }

    /// The version, ready to serve; `None` when the one that serves is the same.
    fn prepare(
        &self,
        repository: &Repository,
        model: &ModelName,
        version: Version,
        manifest: &Manifest,
        before: Option<&Arc<Served>>,
    ) -> Result<Option<Served>, PrepareError> {
        let checked = self.preparer.check(repository, model, version, manifest)?;
        let settings = &manifest.settings;
        let same =
            |before: &Arc<Served>| before.digest == checked.digest && before.settings == *settings;
        if before.is_some_and(same) {
            return Ok(None);
        }
        self.preparer.load(model, version, &checked, settings, &self.observer).map(Some)
    }

    fn served(&self, model: &ModelName, version: Version) -> Option<Arc<Served>> {
        let table = self.table.snapshot();
        table.models.get(model)?.versions.get(&version).cloned()
    }

    /// Changes the table: the one place that does.
    fn publish(&self, change: impl FnOnce(&mut RouteTable)) {
        let _writer = self.writer.lock();
        let mut next = RouteTable::clone(&self.table.snapshot());
        change(&mut next);
        next.models.retain(|_, routes| !routes.versions.is_empty());
        let mut names = next.models.keys();
        let only = names.next().filter(|_| next.models.len() == 1).cloned();
        next.default_model = self.preparer.settings().default_model.clone().or(only);
        next.revision += 1;
        self.table.publish(next);
    }

    /// Takes the versions out of service that are not chosen any more.
    fn retire_others(&self, model: &ModelName, chosen: &[Version]) {
        let table = self.table.snapshot();
        let Some(routes) = table.models.get(model) else { return };
        let gone = routes.versions.iter().filter(|(version, _)| !chosen.contains(version));
        let gone: Vec<Arc<Served>> = gone.map(|(_, served)| Arc::clone(served)).collect();
        drop(table);
        for served in gone {
            let version = served.version;
            self.remove(model, &[version]);
            if let Some(known) = self.models.lock().get_mut(model) {
                known.versions.remove(&version);
            }
            self.retire_aside(served);
        }
    }

    fn remove(&self, model: &ModelName, versions: &[Version]) {
        self.publish(|table| {
            if let Some(routes) = table.models.get_mut(model) {
                routes.versions.retain(|version, _| !versions.contains(version));
                routes.labels.retain(|_, version| !versions.contains(version));
                routes.refresh();
            }
        });
    }

    /// Lets a version go once its requests are done, without keeping anyone waiting.
    fn retire_aside(&self, served: Arc<Served>) {
        let longest = self.preparer.settings().drain_max;
        let thread = std::thread::Builder::new().name("retire".to_owned()).spawn(move || {
            drain(served, longest);
            release_memory();
        });
        if let Err(error) = thread {
            tracing::warn!(%error, "no thread to retire a version on");
        }
    }

    fn unload(&self, model: &ModelName) -> Result<(), Failure> {
        if !self.models.lock().contains_key(model) {
            let message = format!("failed to unload '{model}': it is not in the repository");
            return Err(Failure::not_found(message));
        }
        let busy = self.busy(model);
        let _one = busy.lock();
        let table = self.table.snapshot();
        let routes = table.models.get(model);
        let gone: Vec<Arc<Served>> =
            routes.map(|routes| routes.versions.values().cloned().collect()).unwrap_or_default();
        drop(table);
        let versions: Vec<Version> = gone.iter().map(|served| served.version).collect();
        for version in &versions {
            self.mark(model, *version, VersionState::Unloading, "");
        }
        self.remove(model, &versions);
        let longest = self.preparer.settings().drain_max;
        for served in gone {
            let version = served.version;
            drain(served, longest);
            self.mark(model, version, VersionState::Unavailable, "unloaded");
        }
        release_memory();
        self.sweep();
        tracing::info!(%model, "model unloaded");
        Ok(())
    }
}

/// Waits until nobody uses the version, then drops it.
fn drain(served: Arc<Served>, longest: Duration) {
    let started = Instant::now();
    loop {
        let waited = started.elapsed();
        let held = Arc::strong_count(&served) > 1 && waited < DRAIN_HELD_MAX;
        if served.lane.in_flight() == 0 && !held {
            return;
        }
        if waited >= longest {
            let (model, version) = (&served.model, served.version);
            let requests = served.lane.in_flight();
            tracing::warn!(%model, %version, requests, "version retired with requests left");
            return;
        }
        std::thread::sleep(DRAIN_POLL);
    }
}

fn refused(error: &PrepareError) -> Failure {
    Failure::invalid(error.to_string())
}

/// Writes the files of a load call into a private folder.
fn place(folder: &Path, files: &[ModelFile]) -> Result<(), Failure> {
    for file in files {
        let path = Path::new(&file.path);
        let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
        if !plain || file.path.is_empty() || file.path.contains('\0') {
            let path = &file.path;
            let message = format!("file '{path}' must be a path inside the model's folder");
            return Err(Failure::invalid(message));
        }
        let to: PathBuf = folder.join(path);
        let made = to.parent().map_or(Ok(()), super::fetch::make_folder);
        made.and_then(|()| std::fs::write(&to, &file.content)).map_err(|error| {
            tracing::error!(file = file.path, %error, "file of a load call not written");
            let message = format!("file '{}' could not be stored", file.path);
            Failure::new(ErrorKind::Internal, message)
        })?;
    }
    Ok(())
}
