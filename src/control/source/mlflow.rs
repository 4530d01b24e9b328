//! Models in an MLflow registry: its versions are ours, its aliases are labels.
//!
//! ```text
//! registered-models, model-versions ─▶ names, versions, aliases, tags
//! get-download-uri ─▶ artifact ─▶ MLmodel ─▶ the ONNX file, and what lies beside it
//! runs/get ─▶ lineage
//! ```
//!
//! MLflow gives no checksum of anything. A version's fingerprint is what it was registered from,
//! the names and sizes of its files, the content of `MLmodel` and the entity tags that the server
//! sends; the digest of the bytes is taken when they are fetched, and pinned.
//!
//! Invariants:
//! - Everything that the server says is bounded and checked; nothing is read from where it merely
//!   points ([`artifact::Place`]).
//! - One version that cannot be read is noted and hides no other.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use object_store::ObjectStore;
use parking_lot::Mutex;
use tokio::sync::Notify;

use self::api::{Api, Auth, ModelVersion, RegisteredModel, Run};
use self::artifact::{Artifacts, Place, ProxiedFile};
use self::mlmodel::MlModel;
use super::download::{Backoff, Wanted, download_all};
use super::net::{Gate, HostPort, Net, Times};
use super::quiet::{Now, Observations, Verdict};
use super::store::{self, Stores};
use super::{
    Fingerprint, LIST_TIME_MAX, Listing, ModelListing, SIGNATURE_FILE, SUMS_FILE, SUMS_SIZE_MAX,
    Source, SourceError, Staged, Tracking, VersionListing, io_error, listed_in_sums, note,
};
use crate::bucket::Bucket;
use crate::control::fetch::{MODEL_FILE, write_whole};
use crate::control::lineage::{self, Dataset, Git, Lineage, Registered, Training};
use crate::control::{Settings, manifest};
use crate::domain::{Label, ModelName, Version};

mod api;
mod artifact;
mod mlmodel;
pub(super) mod webhook;

/// Models, and of each versions whose artifacts, that are looked at at once; requests are fewer
/// ([`api`]).
const LOOKS_MAX: usize = 8;
/// Newest versions of a model whose artifacts are looked at; the others' only when an alias names
/// them or they were staged. A server with accounts takes a fifth of a second for each request.
const FACTS_MAX: usize = 8;
/// How long one look may look at artifacts; what is left is for the next.
const FACTS_TIME_MAX: Duration = Duration::from_secs(20);
/// When that is.
const NEXT_LOOK: Duration = Duration::from_millis(100);
/// Looks at the registry for each look at an artifact that is known.
const FACTS_EVERY: u32 = 4;
/// Files whose entity tags count: the model's and its weights'.
const TAGS_MAX: usize = 8;
/// What MLflow writes beside each model, and does not change what it answers.
const ACCESSORIES: [&str; 6] = [
    mlmodel::FILE,
    "conda.yaml",
    "python_env.yaml",
    "requirements.txt",
    "input_example.json",
    "serving_input_example.json",
];
/// How far the server's clock may be from ours.
const SKEW_MAX: Duration = Duration::from_secs(60);

/// A model registry of MLflow.
pub struct Mlflow {
    tracking: Tracking,
    api: Arc<Api>,
    stores: Stores,
    artifacts: Vec<Bucket>,
    stable_alias: Option<String>,
    size_max: u64,
    /// Versions must bring a signature, so a list of digests without one is not whole.
    signed: bool,
    facts_age_max: Duration,
    observed: Mutex<Observations>,
    known: Mutex<HashMap<(ModelName, Version), Known>>,
    wake: Notify,
    backoff: Backoff,
}

/// What was last found of a version's artifact.
#[derive(Clone)]
struct Known {
    registered: Fingerprint,
    at: Instant,
    facts: Facts,
}

#[derive(Clone, Default)]
struct Facts {
    fingerprint: Fingerprint,
    files: usize,
    bytes: u64,
    /// `SHA256SUMS` names what is there.
    complete: bool,
    problem: Option<String>,
}

/// A version's artifact, opened.
struct Opened {
    place: Place,
    model: MlModel,
    mlmodel: bytes::Bytes,
    /// Those beside the model, by their path there.
    files: Artifacts,
    store: Option<Arc<dyn ObjectStore>>,
}

impl Mlflow {
    /// # Errors
    /// When an address or a credential cannot be.
    pub fn new(tracking: Tracking, settings: &Settings) -> Result<Self, SourceError> {
        Self::with(tracking, settings, Times::USUAL, Backoff::NETWORK)
    }

    fn with(
        tracking: Tracking,
        settings: &Settings,
        times: Times,
        backoff: Backoff,
    ) -> Result<Self, SourceError> {
        let source = &settings.source;
        let mut hosts: Vec<HostPort> = HostPort::of(&tracking.base).into_iter().collect();
        for bucket in &source.mlflow.artifacts {
            hosts.extend(store::hosts(&store::endpoints(bucket, &source.store)?));
        }
        hosts.extend(source.allowed_hosts.iter().cloned());
        // The operator wrote mlflow+http:// out: that is consent for this server.
        let plain = source.allow_http || tracking.base.scheme() == "http";
        let net = Net::new(Gate::new(hosts, plain), times)?;
        let (base, auth) = (tracking.base.clone(), Auth::new(&source.mlflow));
        Ok(Self {
            tracking,
            api: Arc::new(Api::new(net.clone(), base, auth, backoff)),
            stores: Stores::new(source.store.clone(), net, backoff),
            artifacts: source.mlflow.artifacts.clone(),
            stable_alias: source.mlflow.stable_alias.clone(),
            size_max: settings.model_size_max,
            signed: !settings.trusted_keys.is_empty(),
            facts_age_max: source.poll.saturating_mul(FACTS_EVERY),
            observed: Mutex::new(Observations::new(source.quiet, SKEW_MAX)),
            known: Mutex::default(),
            wake: Notify::new(),
            backoff,
        })
    }

    async fn look(&self) -> Result<Listing, SourceError> {
        let mut listing = Listing::default();
        let now = Now::read();
        let mut named = Vec::new();
        for model in self.registered(&mut listing.notes).await? {
            match model.name.parse::<ModelName>() {
                Ok(name) => named.push((name, model)),
                Err(error) => note(&mut listing.notes, || {
                    format!("'{}' is no model here: {error}", lineage::short(&model.name))
                }),
            }
        }
        let mut models = futures_util::stream::iter(named)
            .map(|(name, model)| async move {
                let listed = self.model(&name, model, now).await;
                (name, listed)
            })
            .buffer_unordered(LOOKS_MAX);
        while let Some((name, listed)) = models.next().await {
            let (listed, recheck) = match listed {
                Ok(listed) => listed,
                Err(error) if error.is_transient() => return Err(error),
                Err(error) => {
                    let problem = Some(error.to_string());
                    (ModelListing { problem, ..ModelListing::default() }, None)
                }
            };
            listing.recheck = listing.recheck.into_iter().chain(recheck).min();
            listing.models.insert(name, listed);
        }
        drop(models);
        self.observed.lock().finish();
        let listed = |(name, version): &(ModelName, Version)| {
            let model = listing.models.get(name);
            model.is_some_and(|model| model.versions.contains_key(version))
        };
        self.known.lock().retain(|key, _| listed(key));
        Ok(listing)
    }

    /// The models that the URL names, or all.
    async fn registered(
        &self,
        notes: &mut Vec<String>,
    ) -> Result<Vec<RegisteredModel>, SourceError> {
        if self.tracking.models.is_empty() {
            return self.api.models().await;
        }
        let mut models = Vec::new();
        for name in &self.tracking.models {
            match self.api.model(name.as_str()).await {
                Ok(model) if model.name == name.as_str() => models.push(model),
                Ok(_) => {
                    let what = format!("the registered model {name}");
                    let reason = "the server answered with another one".to_owned();
                    return Err(SourceError::Answer { what, reason });
                }
                Err(SourceError::Missing { .. }) => {
                    note(notes, || format!("'{name}' is not registered"));
                }
                Err(error) => return Err(error),
            }
        }
        Ok(models)
    }

    async fn model(
        &self,
        name: &ModelName,
        registered: RegisteredModel,
        now: Now,
    ) -> Result<(ModelListing, Option<Duration>), SourceError> {
        let mut recheck = None;
        let mut listed =
            ModelListing { tags: api::tag_map(registered.tags), ..ModelListing::default() };
        let mut versions = BTreeMap::new();
        for found in self.api.versions(name.as_str()).await? {
            match found.version.parse::<Version>() {
                Ok(version) => drop(versions.insert(version, found)),
                Err(_) => {
                    let version = lineage::short(&found.version);
                    note(&mut listed.notes, || format!("'{version}' is no version"));
                }
            }
        }
        for alias in registered.aliases {
            self.label(&alias, &versions, &mut listed);
        }
        let looked_at = self.looked_at(name, &versions, &listed);
        let until = now.instant + FACTS_TIME_MAX;
        let mut facts: HashMap<Version, Result<Option<Facts>, SourceError>> =
            futures_util::stream::iter(looked_at)
                .map(|(version, found)| async move {
                    (version, self.facts(name, version, &found, until).await)
                })
                .buffer_unordered(LOOKS_MAX)
                .collect()
                .await;
        for (version, found) in versions {
            let facts = match facts.remove(&version) {
                None => Some(Facts::default()),
                Some(Ok(facts)) => {
                    if facts.is_none() {
                        recheck = Some(NEXT_LOOK);
                    }
                    facts
                }
                Some(Err(error)) => {
                    note(&mut listed.notes, || format!("version {version}: {error}"));
                    None
                }
            };
            let shown = self.version(name, version, &found, facts, now, &mut recheck);
            listed.versions.insert(version, shown);
        }
        Ok((listed, recheck))
    }

    /// Versions whose artifacts count: the newest, those with an alias, those that were staged.
    fn looked_at(
        &self,
        name: &ModelName,
        versions: &BTreeMap<Version, ModelVersion>,
        listed: &ModelListing,
    ) -> Vec<(Version, ModelVersion)> {
        let known = self.known.lock();
        let counts = |at: usize, version: Version| {
            at < FACTS_MAX
                || listed.labels.values().any(|labelled| *labelled == version)
                || known.contains_key(&(name.clone(), version))
        };
        let newest_first = versions.iter().rev().enumerate();
        newest_first
            .filter(|(at, (version, _))| counts(*at, **version))
            .map(|(_, (version, found))| (*version, found.clone()))
            .collect()
    }

    /// An alias becomes a label; the one that is configured to, `stable` as well.
    fn label(
        &self,
        alias: &api::Alias,
        versions: &BTreeMap<Version, ModelVersion>,
        listed: &mut ModelListing,
    ) {
        let version = alias.version.parse().ok().filter(|version| versions.contains_key(version));
        let (Some(version), Ok(label)) = (version, alias.alias.parse::<Label>()) else {
            let (alias, version) = (lineage::short(&alias.alias), lineage::short(&alias.version));
            note(&mut listed.notes, || format!("alias '{alias}' of '{version}' is no label"));
            return;
        };
        if self.stable_alias.as_deref() == Some(alias.alias.as_str())
            && let Ok(stable) = "stable".parse()
        {
            listed.labels.insert(stable, version);
        }
        // An alias of that name does not win over the one that is configured to be it.
        let taken = label.as_str() == "stable" && self.stable_alias.is_some();
        if !taken {
            listed.labels.insert(label, version);
        }
    }

    fn version(
        &self,
        name: &ModelName,
        version: Version,
        found: &ModelVersion,
        facts: Option<Facts>,
        now: Now,
        recheck: &mut Option<Duration>,
    ) -> VersionListing {
        let created = found.creation_timestamp.parse().ok().map(Duration::from_millis);
        let modified = created.and_then(|since| SystemTime::UNIX_EPOCH.checked_add(since));
        let known = facts.is_some();
        let facts = facts.unwrap_or_default();
        let mut print = Fingerprint::build();
        print.add(fingerprint(found).0).add(facts.fingerprint.0);
        let too_large = facts.bytes > self.size_max;
        let problem = facts.problem.clone().or_else(|| {
            let (bytes, limit) = (facts.bytes, self.size_max);
            too_large.then(|| format!("has {bytes} bytes, the limit is {limit}"))
        });
        let mut shown = VersionListing {
            fingerprint: print.done(),
            settled: false,
            problem,
            files: facts.files,
            bytes: facts.bytes,
            modified,
            tags: found.tags.clone(),
            run: Some(lineage::short(&found.run_id)).filter(|run| !run.is_empty()),
        };
        match found.status.as_str() {
            "READY" if known => {}
            // Nothing is known of it now: it is as it was.
            "READY" | "PENDING_REGISTRATION" => return shown,
            status => {
                let why = lineage::short(&format!("{status} {}", found.status_message));
                shown.problem = Some(format!("its status is {}", why.trim_end()));
                shown.settled = true;
                return shown;
            }
        }
        let mut observed = self.observed.lock();
        let verdict = observed.judge(name, version, shown.fingerprint, modified, now);
        if facts.complete {
            observed.complete(name, version);
        }
        shown.settled = verdict == Verdict::Settled || facts.complete;
        if let Verdict::Wait(left) = verdict
            && !facts.complete
        {
            *recheck = Some(recheck.map_or(left, |wait| wait.min(left)));
        }
        shown
    }

    /// What is known of a version's artifact, looked at again once in a while; nothing when there is
    /// no time left for a first look.
    async fn facts(
        &self,
        name: &ModelName,
        version: Version,
        found: &ModelVersion,
        until: Instant,
    ) -> Result<Option<Facts>, SourceError> {
        let registered = fingerprint(found);
        let key = (name.clone(), version);
        let before = self.known.lock().get(&key).cloned();
        let before = before.filter(|before| before.registered == registered);
        if let Some(before) = &before
            && before.at.elapsed() < self.facts_age_max
        {
            return Ok(Some(before.facts.clone()));
        }
        if Instant::now() >= until {
            return Ok(before.map(|before| before.facts));
        }
        let facts = match self.open(name, version).await {
            Ok(opened) => self.facts_of(&opened).await,
            Err(error) => Err(error),
        };
        let facts = match facts {
            Ok(facts) => facts,
            Err(error) if error.is_transient() => {
                return before.map(|before| Some(before.facts)).ok_or(error);
            }
            Err(error) => Facts { problem: Some(error.to_string()), ..Facts::default() },
        };
        let known = Known { registered, at: Instant::now(), facts: facts.clone() };
        self.known.lock().insert(key, known);
        Ok(Some(facts))
    }

    async fn facts_of(&self, opened: &Opened) -> Result<Facts, SourceError> {
        let mut print = Fingerprint::build();
        print.add(&opened.mlmodel);
        for (path, file) in &opened.files {
            print.add(path).number(file.size).add(file.tag.as_deref().unwrap_or_default());
        }
        Ok(Facts {
            fingerprint: print.done(),
            files: opened.files.len(),
            bytes: bytes_of(&opened.files),
            complete: self.is_complete(opened).await?,
            problem: None,
        })
    }

    /// Whether `SHA256SUMS` is whole and everything that it names is there.
    async fn is_complete(&self, opened: &Opened) -> Result<bool, SourceError> {
        let signed = !self.signed || opened.files.contains_key(SIGNATURE_FILE);
        let Some(sums) = opened.files.get(SUMS_FILE) else { return Ok(false) };
        if !signed || sums.size > SUMS_SIZE_MAX {
            return Ok(false);
        }
        let text = self.small(opened, SUMS_FILE).await?;
        let listed = std::str::from_utf8(&text).ok().and_then(listed_in_sums);
        Ok(listed.is_some_and(|names| {
            !names.is_empty() && names.iter().all(|name| opened.files.contains_key(name))
        }))
    }

    async fn small(&self, opened: &Opened, path: &str) -> Result<bytes::Bytes, SourceError> {
        let path = format!("{}{path}", opened.model.folder());
        self.small_at(&opened.place, opened.store.as_ref(), &path).await.map(|(bytes, _)| bytes)
    }

    async fn small_at(
        &self,
        place: &Place,
        store: Option<&Arc<dyn ObjectStore>>,
        path: &str,
    ) -> Result<(bytes::Bytes, Option<String>), SourceError> {
        match (place, store) {
            (Place::Direct(bucket), Some(store)) => {
                let key = format!("{}/{path}", bucket.prefix);
                let key = object_store::path::Path::parse(key)
                    .map_err(|error| store::failed(&bucket.to_string(), error.into()))?;
                let size_max = mlmodel::SIZE_MAX as u64;
                Ok((store::small(store, &key, size_max).await?, None))
            }
            (Place::Proxied(root), _) => {
                let url = artifact::url_of(&self.api, root, path);
                self.api.small(&url, mlmodel::SIZE_MAX).await
            }
            (Place::Direct(bucket), None) => {
                Err(SourceError::Unsupported(format!("{bucket} is not open")))
            }
        }
    }

    /// Finds a version's artifact, reads its `MLmodel` and lists its files.
    async fn open(&self, name: &ModelName, version: Version) -> Result<Opened, SourceError> {
        let uri = self.api.artifact_of(name.as_str(), &version.to_string()).await?;
        let place = Place::parse(&uri, self.api.base(), &self.artifacts)?;
        let (store, all) = match &place {
            Place::Proxied(root) => (None, artifact::list_proxied(&self.api, root).await?),
            Place::Direct(bucket) => {
                let store = self.stores.open(bucket)?;
                let all = artifact::list_direct(&store, bucket).await?;
                (Some(store), all)
            }
        };
        if !all.contains_key(mlmodel::FILE) {
            let reason = "the artifact has no MLmodel".to_owned();
            return Err(SourceError::Unsupported(reason));
        }
        let (mlmodel, tag) = self.small_at(&place, store.as_ref(), mlmodel::FILE).await?;
        let text = std::str::from_utf8(&mlmodel).map_err(|_| SourceError::Answer {
            what: mlmodel::FILE.to_owned(),
            reason: "expected text".to_owned(),
        })?;
        let model = MlModel::parse(text)?;
        let mut files = Artifacts::new();
        for (path, file) in all {
            if let Some(path) = path.strip_prefix(model.folder()) {
                files.insert(path.to_owned(), file);
            }
        }
        if !files.contains_key(model.file_name()) {
            let missing = &model.model;
            let reason = format!("MLmodel names '{missing}', which is not in the artifact");
            return Err(SourceError::Unsupported(reason));
        }
        // A server that keeps its artifacts elsewhere copies a whole file to say its tag, and
        // sends none with MLmodel.
        if let (Place::Proxied(root), true) = (&place, tag.is_some()) {
            let counts = |path: &str| !ACCESSORIES.contains(&path);
            let sized = files.iter_mut().filter(|(path, file)| file.size > 0 && counts(path));
            for (path, file) in sized.take(TAGS_MAX) {
                let path = format!("{}{path}", model.folder());
                let url = artifact::url_of(&self.api, root, &path);
                file.tag = artifact::tag_of(&self.api, &url).await?;
            }
        }
        Ok(Opened { place, model, mlmodel, files, store })
    }

    async fn bring(
        &self,
        model: &ModelName,
        version: Version,
        into: &Path,
    ) -> Result<Staged, SourceError> {
        let what = format!("version {version} of {model}");
        let found = self.api.version(model.as_str(), &version.to_string()).await?;
        if found.status != "READY" {
            let status = lineage::short(&found.status);
            return Err(SourceError::Unsupported(format!("{what}: its status is {status}")));
        }
        let opened = self.open(model, version).await?;
        let facts = self.facts_of(&opened).await?;
        if facts.bytes > self.size_max {
            let limit = self.size_max;
            return Err(SourceError::Limit {
                what: format!("{what} has {} bytes", facts.bytes),
                limit,
            });
        }
        let folder = into.join(model.as_str());
        let home = folder.join(version.to_string());
        let mut wanted = Vec::new();
        for (path, file) in &opened.files {
            // A model's configuration lies above its versions.
            let of_model = manifest::FILES.contains(&path.as_str());
            let to = if of_model { folder.join(path) } else { home.join(path) };
            let inside = format!("{}{path}", opened.model.folder());
            let (size, file) = (file.size, self.file(&opened, inside, file)?);
            wanted.push(Wanted { file, size, to });
        }
        download_all(wanted, into, self.backoff).await?;
        let name = opened.model.file_name().to_owned();
        super::blocking("the staging folder", move || name_model(&folder, &name)).await?;
        let registered = fingerprint(&found);
        let mut print = Fingerprint::build();
        print.add(registered.0).add(facts.fingerprint.0);
        let staged = Staged { fingerprint: print.done(), files: facts.files, bytes: facts.bytes };
        let known = Known { registered, at: Instant::now(), facts };
        self.known.lock().insert((model.clone(), version), known);
        Ok(staged)
    }

    fn file(
        &self,
        opened: &Opened,
        path: String,
        file: &artifact::Artifact,
    ) -> Result<Box<dyn super::download::Ranges>, SourceError> {
        let missing = || SourceError::Missing { what: path.clone() };
        Ok(match (&opened.place, &opened.store) {
            (Place::Proxied(root), _) => Box::new(ProxiedFile {
                api: Arc::clone(&self.api),
                url: artifact::url_of(&self.api, root, &path),
                size: file.size,
                tag: file.tag.clone(),
                path,
            }),
            (Place::Direct(bucket), Some(store)) => {
                Box::new(artifact::direct_file(store, bucket, file).ok_or_else(missing)?)
            }
            (Place::Direct(_), None) => return Err(missing()),
        })
    }

    async fn origin(&self, name: &ModelName, version: Version) -> Result<Lineage, SourceError> {
        let text = |text: &str| Some(lineage::short(text)).filter(|text| !text.is_empty());
        let found = self.api.version(name.as_str(), &version.to_string()).await?;
        let uri = self.api.artifact_of(name.as_str(), &version.to_string()).await;
        let mut origin = Lineage {
            owner: found.tags.get("owner").and_then(|owner| text(owner)),
            registry: Some(Registered {
                source: self.describe(),
                artifact: uri.ok().or_else(|| text(&found.source)),
                description: text(&found.description),
                created_at: time(&found.creation_timestamp),
                tags: found.tags.clone(),
            }),
            training: Some(Training {
                run: text(&found.run_id),
                user: text(&found.user_id),
                ..Training::default()
            }),
            ..Lineage::default()
        };
        if !found.run_id.is_empty() {
            match self.api.run(&found.run_id).await {
                Ok(run) => add_run(&mut origin, run),
                // A run may be deleted long before its model.
                Err(SourceError::Missing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        if origin.training == Some(Training::default()) {
            origin.training = None;
        }
        Ok(origin.bounded())
    }
}

/// What a run says, on top of what its version says.
fn add_run(origin: &mut Lineage, run: Run) {
    let tag = |name: &str| run.data.tags.get(name).filter(|value| !value.is_empty()).cloned();
    let git = Git {
        commit: tag("mlflow.source.git.commit"),
        repository: tag("mlflow.source.git.repoURL"),
        branch: tag("mlflow.source.git.branch"),
    };
    origin.git = (git != Git::default()).then_some(git);
    let training = origin.training.get_or_insert_default();
    let user = Some(run.info.user_id).filter(|user| !user.is_empty());
    training.user = tag("mlflow.user").or(user).or(training.user.take());
    training.entry_point = tag("mlflow.source.name");
    training.started_at = time(&run.info.start_time);
    training.ended_at = time(&run.info.end_time);
    let metrics = run.data.metrics.into_iter().filter_map(|metric| {
        let value = metric.value.as_f64().filter(|value| value.is_finite())?;
        Some((metric.key, value))
    });
    training.metrics = metrics.collect();
    training.parameters = api::tag_map(run.data.params);
    let text = |text: String| Some(text).filter(|text| !text.is_empty());
    let datasets = run.inputs.dataset_inputs.into_iter().map(|mut input| Dataset {
        name: input.dataset.name,
        digest: text(input.dataset.digest),
        source: text(input.dataset.source),
        context: input.tags.remove("mlflow.data.context"),
    });
    origin.datasets = datasets.collect();
}

/// Milliseconds since 1970.
fn time(text: &str) -> Option<Timestamp> {
    Timestamp::from_millisecond(text.parse().ok().filter(|ms| *ms > 0)?).ok()
}

/// Of what a version was registered as; aliases, tags and descriptions may change.
fn fingerprint(found: &ModelVersion) -> Fingerprint {
    let mut print = Fingerprint::build();
    for part in [&found.version, &found.creation_timestamp, &found.source, &found.run_id] {
        print.add(part);
    }
    print.done()
}

fn bytes_of(files: &Artifacts) -> u64 {
    files.values().fold(0, |sum, file| sum.saturating_add(file.size))
}

/// Writes which file the model is, when it is not called as ours are and its own configuration
/// does not say it.
fn name_model(folder: &Path, name: &str) -> Result<(), SourceError> {
    if name == MODEL_FILE {
        return Ok(());
    }
    let path = folder.join(manifest::TOML);
    let wrong = |reason: String| SourceError::Answer { what: manifest::TOML.to_owned(), reason };
    let mut table: toml::Table = match std::fs::read_to_string(&path) {
        Ok(text) => {
            text.parse().map_err(|error: toml::de::Error| wrong(error.message().to_owned()))?
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => toml::Table::new(),
        Err(error) => return Err(io_error(&path)(error)),
    };
    let model = table.entry("model").or_insert_with(|| toml::Table::new().into());
    let toml::Value::Table(model) = model else {
        return Err(wrong("model: expected a section".to_owned()));
    };
    model.entry("file").or_insert_with(|| name.into());
    write_whole(&path, table.to_string().as_bytes()).map_err(io_error(&path))
}

impl Source for Mlflow {
    fn describe(&self) -> String {
        self.tracking.to_string()
    }

    fn list(&self) -> BoxFuture<'_, Result<Listing, SourceError>> {
        Box::pin(async move {
            let look = tokio::time::timeout(LIST_TIME_MAX, self.look()).await;
            look.unwrap_or_else(|_| {
                let what = format!("listing {}", self.tracking);
                Err(SourceError::Slow { what, limit: LIST_TIME_MAX })
            })
        })
    }

    fn stage<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
        into: &'a Path,
    ) -> BoxFuture<'a, Result<Staged, SourceError>> {
        Box::pin(self.bring(model, version, into))
    }

    fn lineage<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
    ) -> BoxFuture<'a, Result<Lineage, SourceError>> {
        Box::pin(self.origin(model, version))
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(self.wake.notified())
    }

    fn hint(&self) {
        self.wake.notify_one();
    }
}

#[cfg(test)]
mod tests;
