//! The versions of every model: found, loaded, kept, retired.
//!
//! ```text
//! source ──Listing──▶ reconcile ─┐
//! admin, data plane ──load/unload┴─▶ loader threads: fetch ▶ probe ▶ load ▶ warm ▶ Overseer ▶ Switchboard
//! ```
//!
//! Invariants:
//! - One load or unload of a model at a time; different models go in parallel.
//! - Slow work happens on threads of its own, never on the runtime that serves requests, and is
//!   finished even when the caller goes away.
//! - A version is remembered, durably, before it can take traffic; what serves is never disturbed by
//!   what a source says or fails to say.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Mutex, RwLock};
use tokio::sync::{Semaphore, oneshot};

use super::Settings;
use super::call::{Call, Check, Refusal};
use super::lineage::Lineage;
use super::probe::Report;
use super::scan::Repository;
use super::source::{Listing, Source};
use super::switchboard::Switchboard;
use super::turns;
use super::version::Preparer;
use super::view::Life;
use crate::domain::{
    Digest, ErrorKind, Failure, IndexEntry, Label, ModelControl, ModelFile, ModelName,
    ModelSettings, Version,
};
use crate::engine::{Engines, release_memory};
use crate::monitor::Monitor;
use crate::observe::Observer;

mod life;
mod load;
mod place;
mod retire;

pub use life::Record;

use life::Known;
use load::Accept;

/// Looks at the source at the start, while versions are still being written.
const START_LOOKS_MAX: usize = 3;
/// Longest wait between two of them.
const START_WAIT_MAX: std::time::Duration = std::time::Duration::from_secs(3);

type Done<'a> = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>>;

/// What the gateway remembers of a version, so that it can serve it again without its source.
#[derive(Clone, Debug, serde::Serialize, serde::Deserialize)]
pub struct Remembered {
    pub digest: Digest,
    pub settings: ModelSettings,
    pub(super) report: Report,
    pub lineage: Lineage,
    pub checks: Vec<Check>,
    /// Where it came from.
    pub source: String,
    /// Who brought it: nobody may approve his own.
    pub submitter: Option<String>,
    /// Loaded at the next start, too.
    pub wanted: bool,
}

/// Who decides over versions and remembers them: asked before, told after.
pub trait Overseer: Send + Sync {
    /// What is remembered of a version, its digest among it.
    fn remembered(&self, model: &ModelName, version: Version) -> Option<Remembered>;

    /// Digests of what is loaded again at the next start.
    fn wanted(&self) -> Vec<Digest>;

    /// Whether a loaded version may take traffic; else it is held.
    fn may_serve(&self, model: &ModelName, version: Version, digest: Digest) -> bool;

    /// Versions that stay loaded whatever the retention says: those that labels, tables and rollouts
    /// name. With `warm` also those that answer, that a rollback goes back to, or that somebody
    /// loaded by their numbers.
    fn named(&self, model: &ModelName, warm: bool) -> BTreeSet<Version>;

    /// Does something while nothing is decided: what [`Overseer::named`] says then, holds.
    fn undisturbed(&self, work: &mut dyn FnMut());

    /// Remembers a version before it is put in service.
    ///
    /// # Errors
    /// When it cannot be made durable: then it is not put in service.
    fn remember(
        &self,
        model: &ModelName,
        version: Version,
        what: &Remembered,
        by: &Call,
    ) -> Result<(), Refusal>;

    /// A version entered a state that others should know of.
    fn entered(&self, model: &ModelName, version: Version, state: Life, reason: &str, by: &Call);

    /// What the source calls its versions.
    fn aliases(&self, model: &ModelName, aliases: &BTreeMap<Label, Version>, by: &Call);
}

/// Nobody decides and nobody remembers: every version that loads serves.
struct Nobody;

impl Overseer for Nobody {
    fn remembered(&self, _model: &ModelName, _version: Version) -> Option<Remembered> {
        None
    }

    fn wanted(&self) -> Vec<Digest> {
        Vec::new()
    }

    fn may_serve(&self, _model: &ModelName, _version: Version, _digest: Digest) -> bool {
        true
    }

    fn named(&self, _model: &ModelName, _warm: bool) -> BTreeSet<Version> {
        BTreeSet::new()
    }

    fn undisturbed(&self, work: &mut dyn FnMut()) {
        work();
    }

    fn remember(
        &self,
        _model: &ModelName,
        _version: Version,
        _what: &Remembered,
        _by: &Call,
    ) -> Result<(), Refusal> {
        Ok(())
    }

    fn entered(
        &self,
        _model: &ModelName,
        _version: Version,
        _state: Life,
        _reason: &str,
        _by: &Call,
    ) {
    }

    fn aliases(&self, _model: &ModelName, _aliases: &BTreeMap<Label, Version>, _by: &Call) {}
}

/// Loads, reloads and retires versions.
pub struct Registry {
    shared: Arc<Shared>,
    /// Loads at one time.
    slots: Arc<Semaphore>,
}

struct Shared {
    preparer: Preparer,
    source: Arc<dyn Source>,
    board: Arc<Switchboard>,
    observer: Arc<Observer>,
    overseer: OnceLock<Arc<dyn Overseer>>,
    /// Guards the copies of models: read by each load, written by a sweep.
    loading: RwLock<()>,
    /// Every model of the repository was looked at: until then, what does not serve may do so soon.
    settled: AtomicBool,
    models: Mutex<BTreeMap<ModelName, Known>>,
    /// What sources do asynchronously is waited for on loader threads.
    runtime: tokio::runtime::Handle,
}

/// Keeps a model out of the table until it goes, whichever way.
struct Closed {
    board: Arc<Switchboard>,
    model: ModelName,
}

impl Closed {
    fn close(board: &Arc<Switchboard>, model: &ModelName) -> Self {
        board.set_closed(model, true);
        Self { board: Arc::clone(board), model: model.clone() }
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.board.set_closed(&self.model, false);
    }
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
        source: Arc<dyn Source>,
        board: Arc<Switchboard>,
        observer: Arc<Observer>,
    ) -> Arc<Self> {
        let slots = Arc::new(Semaphore::new(settings.threads.max(1)));
        let shared = Shared {
            preparer: Preparer::new(settings, engines),
            source,
            board,
            observer,
            overseer: OnceLock::new(),
            loading: RwLock::default(),
            settled: AtomicBool::new(false),
            models: Mutex::default(),
            runtime: tokio::runtime::Handle::current(),
        };
        Arc::new(Self { shared: Arc::new(shared), slots })
    }

    /// Says who looks at the rows of versions that are loaded from now on. Later calls have no effect.
    pub fn set_monitor(&self, monitor: Arc<Monitor>) {
        self.shared.preparer.set_monitor(monitor);
    }

    /// Says who decides. Later calls have no effect; without one, every version serves.
    pub(super) fn set_overseer(&self, overseer: Arc<dyn Overseer>) {
        drop(self.shared.overseer.set(overseer));
    }

    pub fn source(&self) -> &Arc<dyn Source> {
        &self.shared.source
    }

    /// Loads every model of the source, several at a time; each takes traffic as soon as it is
    /// ready. Broken ones are reported and skipped.
    ///
    /// # Errors
    /// When the source itself cannot be read.
    pub async fn load_all(&self) -> std::io::Result<()> {
        let source = Arc::clone(&self.shared.source);
        let call = Call::own("start", "found in the repository");
        for look in 0..START_LOOKS_MAX {
            let listing = source.list().await.map_err(|error| {
                let source = source.describe();
                tracing::error!(source, %error, "the model repository cannot be read");
                std::io::Error::other(error.to_string())
            })?;
            self.reconcile(&listing, &call).await;
            match listing.recheck.filter(|_| look + 1 < START_LOOKS_MAX) {
                // What was written just now is as good as there.
                Some(soon) => tokio::time::sleep(soon.min(START_WAIT_MAX)).await,
                None => break,
            }
        }
        self.settle().await;
        Ok(())
    }

    /// Puts versions that are remembered back in service, from the copies that are here, without the
    /// source.
    pub async fn restore(&self, remembered: Vec<(ModelName, Vec<Version>)>) {
        let work = remembered.into_iter().map(|(model, versions)| {
            move |shared: Arc<Shared>| {
                // All at once: a canary that came first would get what is not its own.
                let _closed = Closed::close(&shared.board, &model);
                for version in versions.into_iter().rev() {
                    if let Err(error) = shared.restore(&model, version) {
                        let reason = error.message;
                        tracing::warn!(%model, %version, reason, "version not restored");
                    }
                }
                Ok(())
            }
        });
        self.each(work.collect()).await;
    }

    /// Everything that was to be looked at was: copies that nobody needs may go.
    pub async fn settle(&self) {
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
    }

    /// Loads what the source has and we want, and retires what nobody wants any more. Failures are
    /// reported and change nothing for the other versions.
    pub async fn reconcile(&self, listing: &Listing, call: &Call) {
        let work = listing.models.iter().map(|(model, listed)| {
            let (model, listed, call) = (model.clone(), listed.clone(), call.clone());
            move |shared: Arc<Shared>| {
                if let Err(failure) = shared.reconcile(&model, &listed, &call) {
                    tracing::error!(%model, reason = failure.message, "model not loaded");
                }
                Ok(())
            }
        });
        self.each(work.collect()).await;
        let known: Vec<ModelName> = self.shared.models.lock().keys().cloned().collect();
        for model in known.iter().filter(|model| !listing.models.contains_key(*model)) {
            self.shared.missing(model);
        }
    }

    /// Runs every piece of work on a loader thread, several at a time.
    async fn each<W>(&self, work: Vec<W>)
    where
        W: FnOnce(Arc<Shared>) -> Result<(), Failure> + Send + 'static,
    {
        let loads: Vec<_> = work
            .into_iter()
            .map(|work| {
                let (shared, slots) = (Arc::clone(&self.shared), Arc::clone(&self.slots));
                tokio::spawn(on_loader(Some(slots), move || work(shared)))
            })
            .collect();
        for load in loads {
            match load.await {
                Ok(Ok(())) => {}
                Ok(Err(failure)) => tracing::error!(reason = failure.message, "a load failed"),
                Err(error) => tracing::error!(%error, "a load ended without a result"),
            }
        }
    }

    /// Loads one version, whatever the retention says. `accept` names the digest that is taken
    /// although another was seen under this number before.
    ///
    /// # Errors
    /// When it is not there, is refused, or does not load.
    pub async fn load_version(
        &self,
        model: &ModelName,
        version: Version,
        accept: Option<Digest>,
        call: &Call,
    ) -> Result<(), Failure> {
        let (shared, model, call) = (Arc::clone(&self.shared), model.clone(), call.clone());
        let accept = accept.map_or(Accept::Pinned, Accept::Digest);
        let work = move || shared.load_one(&model, version, accept, &call);
        on_loader(Some(Arc::clone(&self.slots)), work).await
    }

    /// Takes one version out of service; returns when its requests have drained.
    ///
    /// # Errors
    /// `NotFound` for a version that is not loaded.
    pub async fn unload_version(
        &self,
        model: &ModelName,
        version: Version,
        call: &Call,
    ) -> Result<(), Failure> {
        let (shared, model, call) = (Arc::clone(&self.shared), model.clone(), call.clone());
        on_loader(None, move || shared.unload_versions(&model, &[version], &call)).await
    }

    /// Every model's versions, and why a model has none.
    pub fn records(&self) -> BTreeMap<ModelName, (BTreeMap<Version, Record>, String)> {
        let models = self.shared.models.lock();
        let copy = |known: &Known| (known.versions.clone(), known.problem.clone());
        models.iter().map(|(model, known)| (model.clone(), copy(known))).collect()
    }

    pub fn record(&self, model: &ModelName, version: Version) -> Option<Record> {
        self.shared.models.lock().get(model)?.versions.get(&version).cloned()
    }

    pub fn knows(&self, model: &ModelName) -> bool {
        self.shared.models.lock().contains_key(model)
    }

    /// A held version may take traffic from now on, or not any more.
    pub(super) fn set_held(&self, model: &ModelName, version: Version, held: bool, reason: &str) {
        self.shared.board.set_held(model, version, held);
        let state = if held { Life::Held } else { Life::Ready };
        self.shared.enter_if(model, version, state, reason, Record::serves);
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
        turns::shorten();
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
        life::index(&self.shared.models.lock())
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
            let call = Call::own("data-plane", "a client's load call");
            let (shared, model) = (Arc::clone(&self.shared), model.clone());
            let work = move || shared.load(&model, &brought, &call);
            on_loader(Some(Arc::clone(&self.slots)), work).await
        })
    }

    fn unload<'a>(&'a self, model: &'a ModelName) -> Done<'a> {
        Box::pin(async move {
            let call = Call::own("data-plane", "a client's unload call");
            let (shared, model) = (Arc::clone(&self.shared), model.clone());
            on_loader(None, move || shared.unload(&model, &call)).await
        })
    }
}

impl Shared {
    fn overseer(&self) -> &dyn Overseer {
        self.overseer.get().map_or(&Nobody, |overseer| &**overseer)
    }

    fn busy(&self, model: &ModelName) -> Arc<Mutex<()>> {
        Arc::clone(&self.models.lock().entry(model.clone()).or_default().busy)
    }

    fn repository(&self) -> Repository {
        Repository::new(self.preparer.settings())
    }

    /// Tidies the state folder, unless something loads: then that load will.
    fn sweep(&self) {
        if !self.settled.load(Ordering::Acquire) {
            return;
        }
        let Some(_nothing_loads) = self.loading.try_write() else { return };
        let mut kept: std::collections::HashSet<Digest> =
            self.board.everything().iter().map(|served| served.digest).collect();
        // What is remembered is served again after a restart, source or none.
        kept.extend(self.overseer().wanted());
        self.preparer.sweep(&kept);
    }

    fn with_record<T>(
        &self,
        model: &ModelName,
        version: Version,
        change: impl FnOnce(&mut Record) -> T,
    ) -> T {
        let mut models = self.models.lock();
        let known = models.entry(model.clone()).or_default();
        change(known.versions.entry(version).or_insert_with(Record::new))
    }

    fn enter(&self, model: &ModelName, version: Version, state: Life, reason: &str) {
        self.with_record(model, version, |record| record.enter(state, reason));
    }

    /// Why a version could not even be read.
    fn enter_unless_serving(&self, model: &ModelName, version: Version, reason: &str) {
        self.with_record(model, version, |record| {
            if !record.serves() {
                record.enter(Life::Failed, reason);
            }
        });
    }

    fn enter_if(
        &self,
        model: &ModelName,
        version: Version,
        state: Life,
        reason: &str,
        when: impl FnOnce(&Record) -> bool,
    ) {
        let mut models = self.models.lock();
        let record = models.get_mut(model).and_then(|known| known.versions.get_mut(&version));
        if let Some(record) = record.filter(|record| when(record)) {
            record.enter(state, reason);
        }
    }
}
