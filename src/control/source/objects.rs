//! Models in a bucket: `<prefix>/<model>/<version>/<file>`.
//!
//! One listing of the prefix says everything: names, sizes, entity tags and times. When a key in it
//! is no path at all the library refuses the page; then each model is listed by itself, and only the
//! one with that key is not known.
//!
//! Invariants:
//! - A listing has a largest number of objects and ends in time, however many pages there are.
//! - What is staged is what was listed: each object is read on the condition that its entity tag is
//!   still the same.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use jiff::Timestamp;
use object_store::path::Path as Key;
use object_store::{ObjectMeta, ObjectStore};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::download::{Backoff, Wanted, download_all};
use super::net::{Gate, Net, Times};
use super::quiet::{Now, Observations, Verdict};
use super::store::{self, ObjectFile, Stores};
use super::{
    FILES_MAX, Fingerprint, LIST_TIME_MAX, Listing, MODELS_MAX, ModelListing, SIGNATURE_FILE,
    SUMS_FILE, SUMS_SIZE_MAX, Source, SourceError, Staged, VERSIONS_MAX, VersionListing,
    listed_in_sums, names, note,
};
use crate::bucket::Bucket;
use crate::control::Settings;
use crate::control::lineage::{Lineage, Registered};
use crate::domain::{ModelName, Version};

/// Most objects under the prefix.
const OBJECTS_MAX: usize = if cfg!(test) { 5_000 } else { 200_000 };
/// Largest file beside a model's versions, and how many are brought.
const CONFIG_SIZE_MAX: u64 = 4 << 20;
const CONFIG_FILES_MAX: usize = 64;
/// How far a store's clock may be from ours.
const SKEW_MAX: Duration = Duration::from_secs(60);

/// A bucket of one of the providers.
pub struct Objects {
    bucket: Bucket,
    stores: Stores,
    size_max: u64,
    /// Versions must bring a signature, so a list of digests without one is not whole.
    signed: bool,
    observed: Mutex<Observations>,
    wake: Notify,
    backoff: Backoff,
}

/// What lies under one model's prefix.
#[derive(Default)]
struct FoundModel {
    /// Files beside the versions, by name.
    config: BTreeMap<String, ObjectMeta>,
    versions: BTreeMap<Version, FoundVersion>,
    notes: Vec<String>,
}

#[derive(Default)]
struct FoundVersion {
    /// By path inside the version.
    files: BTreeMap<String, ObjectMeta>,
    problem: Option<String>,
}

impl Objects {
    /// # Errors
    /// When the bucket's address or credentials cannot be.
    pub fn new(bucket: Bucket, settings: &Settings) -> Result<Self, SourceError> {
        Self::with(bucket, settings, Times::USUAL, Backoff::NETWORK)
    }

    fn with(
        bucket: Bucket,
        settings: &Settings,
        times: Times,
        backoff: Backoff,
    ) -> Result<Self, SourceError> {
        let source = &settings.source;
        let mut hosts = store::hosts(&store::endpoints(&bucket, &source.store)?);
        hosts.extend(source.allowed_hosts.iter().cloned());
        let net = Net::new(Gate::new(hosts, source.allow_http), times)?;
        Ok(Self {
            bucket,
            stores: Stores::new(source.store.clone(), net, backoff),
            size_max: settings.model_size_max,
            signed: !settings.trusted_keys.is_empty(),
            observed: Mutex::new(Observations::new(source.quiet, SKEW_MAX)),
            wake: Notify::new(),
            backoff,
        })
    }

    fn key(&self, below: &str) -> Result<Key, SourceError> {
        let text = match self.bucket.prefix.as_str() {
            "" => below.to_owned(),
            prefix => format!("{prefix}/{below}"),
        };
        let wrong = |error: object_store::path::Error| {
            store::failed(&self.bucket.to_string(), error.into())
        };
        Key::parse(text.trim_end_matches('/')).map_err(wrong)
    }

    /// Every object under `prefix`; the error is the listing's.
    async fn objects(
        &self,
        store: &Arc<dyn ObjectStore>,
        prefix: &Key,
    ) -> Result<Vec<ObjectMeta>, object_store::Error> {
        let mut listed = store.list((!prefix.as_ref().is_empty()).then_some(prefix));
        let mut objects = Vec::new();
        while let Some(object) = listed.next().await {
            objects.push(object?);
            if objects.len() > OBJECTS_MAX {
                break;
            }
        }
        Ok(objects)
    }

    async fn look(&self) -> Result<Listing, SourceError> {
        let what = self.bucket.to_string();
        let store = self.stores.open(&self.bucket)?;
        let root = self.key("")?;
        let mut listing = Listing::default();
        let mut found = BTreeMap::new();
        match self.objects(&store, &root).await {
            Ok(objects) => self.sort(objects, &mut found, &mut listing.notes)?,
            Err(object_store::Error::InvalidPath { source }) => {
                note(&mut listing.notes, || crate::control::lineage::short(&source.to_string()));
                self.each_model(&store, &root, &mut found, &mut listing).await?;
            }
            Err(error) => return Err(store::failed(&what, error)),
        }
        let (now, mut wait) = (Now::read(), None::<Duration>);
        let mut doubtful = Vec::new();
        for (name, model) in &found {
            let mut shown = ModelListing {
                config: fingerprint(&model.config),
                notes: model.notes.clone(),
                ..ModelListing::default()
            };
            for (version, files) in &model.versions {
                let mut listed = self.version(files);
                let verdict = self.observed.lock().judge(
                    name,
                    *version,
                    listed.fingerprint,
                    listed.modified,
                    now,
                );
                match verdict {
                    Verdict::Settled => listed.settled = true,
                    Verdict::Wait(left) => {
                        wait = Some(wait.map_or(left, |wait| wait.min(left)));
                        doubtful.extend(
                            files.files.get(SUMS_FILE).map(|sums| (name, *version, sums, files)),
                        );
                    }
                }
                shown.versions.insert(*version, listed);
            }
            listing.models.entry(name.clone()).or_insert(shown);
        }
        for (name, version, sums, files) in doubtful {
            if !self.is_complete(&store, sums, files).await? {
                continue;
            }
            self.observed.lock().complete(name, version);
            let model = listing.models.get_mut(name);
            if let Some(listed) = model.and_then(|model| model.versions.get_mut(&version)) {
                listed.settled = true;
            }
        }
        self.observed.lock().finish();
        let waits = |model: &ModelListing| model.versions.values().any(|version| !version.settled);
        listing.recheck = wait.filter(|_| listing.models.values().any(waits));
        Ok(listing)
    }

    /// Lists the models one by one, so that one bad key hides one model.
    async fn each_model(
        &self,
        store: &Arc<dyn ObjectStore>,
        root: &Key,
        found: &mut BTreeMap<ModelName, FoundModel>,
        listing: &mut Listing,
    ) -> Result<(), SourceError> {
        let what = self.bucket.to_string();
        let prefix = (!root.as_ref().is_empty()).then_some(root);
        let top = store.list_with_delimiter(prefix).await;
        let top = top.map_err(|error| store::failed(&what, error))?;
        for prefix in top.common_prefixes.iter().take(MODELS_MAX) {
            let Some(name) = prefix.filename().and_then(|name| name.parse::<ModelName>().ok())
            else {
                continue;
            };
            match self.objects(store, prefix).await {
                Ok(objects) => self.sort(objects, found, &mut listing.notes)?,
                Err(object_store::Error::InvalidPath { source }) => {
                    let problem = crate::control::lineage::short(&source.to_string());
                    let model = ModelListing { problem: Some(problem), ..ModelListing::default() };
                    found.remove(&name);
                    listing.models.insert(name, model);
                }
                Err(error) => return Err(store::failed(&what, error)),
            }
        }
        Ok(())
    }

    /// Sorts objects by model and version. What is neither a model's nor a version's file is none of
    /// ours.
    fn sort(
        &self,
        objects: Vec<ObjectMeta>,
        found: &mut BTreeMap<ModelName, FoundModel>,
        notes: &mut Vec<String>,
    ) -> Result<(), SourceError> {
        if objects.len() > OBJECTS_MAX {
            let what = format!("{} holds more objects than are listed", self.bucket);
            return Err(SourceError::Limit { what, limit: OBJECTS_MAX as u64 });
        }
        for object in objects {
            let Some(below) = below(&self.bucket.prefix, object.location.as_ref()) else {
                continue;
            };
            let below = below.to_owned();
            let Some((model, rest)) = below.split_once('/') else { continue };
            let name: ModelName = match model.parse() {
                Ok(name) => name,
                Err(error) => {
                    note(notes, || {
                        let model = crate::control::lineage::short(model);
                        format!("'{model}' is no model: {error}")
                    });
                    continue;
                }
            };
            if !found.contains_key(&name) && found.len() >= MODELS_MAX {
                let what = format!("{} holds more models than are listed", self.bucket);
                return Err(SourceError::Limit { what, limit: MODELS_MAX as u64 });
            }
            place(found.entry(name).or_default(), rest, object);
        }
        Ok(())
    }

    fn version(&self, found: &FoundVersion) -> VersionListing {
        let bytes = found.files.values().fold(0_u64, |sum, file| sum.saturating_add(file.size));
        let mut problem = found.problem.clone();
        if bytes > self.size_max {
            let limit = self.size_max;
            problem.get_or_insert_with(|| format!("has {bytes} bytes, the limit is {limit}"));
        }
        VersionListing {
            fingerprint: fingerprint(&found.files),
            settled: false,
            problem,
            files: found.files.len(),
            bytes,
            modified: found.files.values().map(modified).max(),
            tags: BTreeMap::new(),
            run: None,
        }
    }

    /// Whether `SHA256SUMS` is whole and everything that it names is there.
    async fn is_complete(
        &self,
        store: &Arc<dyn ObjectStore>,
        sums: &ObjectMeta,
        found: &FoundVersion,
    ) -> Result<bool, SourceError> {
        let signed = !self.signed || found.files.contains_key(SIGNATURE_FILE);
        if !signed || sums.size > SUMS_SIZE_MAX {
            return Ok(false);
        }
        let text = match store::small(store, &sums.location, SUMS_SIZE_MAX).await {
            Ok(text) => text,
            // Replaced or removed since it was listed: the next look says.
            Err(SourceError::Missing { .. } | SourceError::Changed { .. }) => return Ok(false),
            Err(error) => return Err(error),
        };
        let listed = std::str::from_utf8(&text).ok().and_then(listed_in_sums);
        Ok(listed.is_some_and(|names| {
            !names.is_empty() && names.iter().all(|name| found.files.contains_key(name))
        }))
    }

    async fn bring(
        &self,
        model: &ModelName,
        version: Version,
        into: &Path,
    ) -> Result<Staged, SourceError> {
        let store = self.stores.open(&self.bucket)?;
        let what = format!("version {version} of {model}");
        let prefix = self.key(model.as_str())?;
        let listed = tokio::time::timeout(LIST_TIME_MAX, self.objects(&store, &prefix)).await;
        let objects = match listed {
            Ok(listed) => listed.map_err(|error| store::failed(&what, error))?,
            Err(_) => return Err(SourceError::Slow { what, limit: LIST_TIME_MAX }),
        };
        let mut all = BTreeMap::new();
        self.sort(objects, &mut all, &mut Vec::new())?;
        let found = all.remove(model).unwrap_or_default();
        let Some(files) = found.versions.get(&version) else {
            return Err(SourceError::Missing { what });
        };
        let listed = self.version(files);
        if let Some(problem) = listed.problem {
            return Err(SourceError::Unsupported(format!("{what} {problem}")));
        }
        let folder = into.join(model.as_str());
        let config = found
            .config
            .iter()
            .filter(|(_, meta)| meta.size <= CONFIG_SIZE_MAX)
            .take(CONFIG_FILES_MAX)
            .map(|(name, meta)| (folder.join(name), meta));
        let inside = folder.join(version.to_string());
        let own = files.files.iter().map(|(name, meta)| (inside.join(name), meta));
        let wanted = config.chain(own).map(|(to, meta)| Wanted {
            size: meta.size,
            to,
            file: Box::new(ObjectFile {
                store: Arc::clone(&store),
                meta: meta.clone(),
                provider: self.bucket.provider,
            }),
        });
        download_all(wanted.collect(), into, self.backoff).await?;
        Ok(Staged { fingerprint: listed.fingerprint, files: listed.files, bytes: listed.bytes })
    }
}

/// The path of a key under a prefix; nothing for the prefix itself.
fn below<'a>(prefix: &str, key: &'a str) -> Option<&'a str> {
    match prefix {
        "" => Some(key),
        prefix => key.strip_prefix(prefix)?.strip_prefix('/'),
    }
    .filter(|below| !below.is_empty())
}

/// Puts an object where it belongs in its model.
fn place(model: &mut FoundModel, rest: &str, object: ObjectMeta) {
    let Some((folder, path)) = rest.split_once('/') else {
        // A folder's own marker is no file.
        let marker = object.size == 0 && rest.parse::<Version>().is_ok();
        if !marker && names::check(rest).is_ok() {
            model.config.insert(rest.to_owned(), object);
        }
        return;
    };
    let Ok(version) = folder.parse::<Version>() else { return };
    if !model.versions.contains_key(&version) && model.versions.len() >= VERSIONS_MAX {
        if model.notes.is_empty() {
            model
                .notes
                .push(format!("has more than {VERSIONS_MAX} versions; the rest are not listed"));
        }
        return;
    }
    let found = model.versions.entry(version).or_default();
    if let Err(error) = names::check(path) {
        found.problem.get_or_insert_with(|| error.to_string());
        return;
    }
    if found.files.len() >= FILES_MAX {
        found.problem.get_or_insert_with(|| format!("has more than {FILES_MAX} files"));
        return;
    }
    // A folder cannot also be a file. Its empty marker is left out, whichever comes first.
    let beneath = format!("{path}/");
    let holds = found.files.range(beneath.clone()..).next();
    if holds.is_some_and(|(name, _)| name.starts_with(&beneath)) {
        if object.size > 0 {
            found.problem.get_or_insert_with(|| format!("'{path}' is a file and a folder"));
        }
        return;
    }
    for (at, _) in path.match_indices('/') {
        if let Some(above) = found.files.remove(&path[..at])
            && above.size > 0
        {
            let above = &path[..at];
            found.problem.get_or_insert_with(|| format!("'{above}' is a file and a folder"));
        }
    }
    found.files.insert(path.to_owned(), object);
}

fn modified(object: &ObjectMeta) -> SystemTime {
    let (seconds, nanos) =
        (object.last_modified.timestamp(), object.last_modified.timestamp_subsec_nanos());
    let seconds = Duration::new(u64::try_from(seconds).unwrap_or(0), nanos.min(999_999_999));
    SystemTime::UNIX_EPOCH + seconds
}

fn fingerprint(files: &BTreeMap<String, ObjectMeta>) -> Fingerprint {
    let mut print = Fingerprint::build();
    for (name, object) in files {
        print.add(name).number(object.size);
        print.add(object.e_tag.as_deref().unwrap_or_default());
        print.add(object.version.as_deref().unwrap_or_default());
        let since = modified(object).duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        print.number(u64::try_from(since.as_micros()).unwrap_or(u64::MAX));
    }
    print.done()
}

impl Source for Objects {
    fn describe(&self) -> String {
        self.bucket.to_string()
    }

    fn list(&self) -> BoxFuture<'_, Result<Listing, SourceError>> {
        Box::pin(async move {
            let look = tokio::time::timeout(LIST_TIME_MAX, self.look()).await;
            look.unwrap_or_else(|_| {
                let what = format!("listing {}", self.bucket);
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
        Box::pin(async move {
            let prefix = self.key(&format!("{model}/{version}"))?;
            let store = self.stores.open(&self.bucket)?;
            let listed = self.objects(&store, &prefix).await;
            let what = format!("version {version} of {model}");
            let objects = listed.map_err(|error| store::failed(&what, error))?;
            let newest = objects.iter().map(modified).max();
            let Some(newest) = newest else { return Err(SourceError::Missing { what }) };
            let registry = Registered {
                source: self.bucket.to_string(),
                artifact: Some(prefix.to_string()),
                created_at: Timestamp::try_from(newest).ok(),
                ..Registered::default()
            };
            Ok(Lineage { registry: Some(registry), ..Lineage::default() })
        })
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
