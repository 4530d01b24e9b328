//! Models in a folder of this machine, watched and looked through.
//!
//! What the operating system tells of changes is a hint: network file systems tell nothing, and a
//! watch may be lost. Each look reads the whole tree's names, sizes and times.
//!
//! Invariants:
//! - Nothing outside the repository is looked at; links are followed beneath a version only.
//! - Looking changes nothing and wakes nobody: reading is no event.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use jiff::Timestamp;
use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use parking_lot::Mutex;
use tokio::sync::Notify;

use super::quiet::{Now, Observations, Verdict};
use super::{
    FILES_MAX, Fingerprint, Listing, MODELS_MAX, ModelListing, SIGNATURE_FILE, SUMS_FILE,
    SUMS_SIZE_MAX, Source, SourceError, Staged, VERSIONS_MAX, VersionListing, blocking, io_error,
    listed_in_sums, names, note,
};
use crate::control::Settings;
use crate::control::confined::{ConfineError, Facts, Folder, Kind};
use crate::control::fetch::{make_folder, sync_folder};
use crate::control::lineage::{Lineage, Registered};
use crate::control::scan::Repository;
use crate::domain::{ModelName, Version};

/// Pause after a hint, so that an upload of many writes makes few looks.
const SETTLE: Duration = Duration::from_millis(200);
/// Largest file beside a model's versions that is copied.
const CONFIG_SIZE_MAX: u64 = 4 << 20;

/// A folder of models, or the folder of one.
pub struct Directory {
    inner: Arc<Inner>,
}

struct Inner {
    settings: Settings,
    observed: Mutex<Observations>,
    wake: Arc<Notify>,
    watch: Mutex<Watch>,
}

/// The operating system's watch of the repository.
#[derive(Default)]
struct Watch {
    watcher: Option<RecommendedWatcher>,
    /// Which folder is watched: another one may be put in its place.
    of: Option<(u64, u64)>,
    /// It was said that there is none.
    warned: bool,
}

/// What lies in one version's folder.
#[derive(Default)]
struct Walk {
    /// Plain files by path.
    files: BTreeMap<String, Facts>,
    /// Whatever else there is, and what could not be looked at.
    others: BTreeMap<String, String>,
    newest: Option<SystemTime>,
    problem: Option<String>,
}

impl Directory {
    pub fn new(settings: Settings) -> Self {
        let observed = Mutex::new(Observations::new(settings.source.quiet, Duration::ZERO));
        let (wake, watch) = (Arc::new(Notify::new()), Mutex::default());
        Self { inner: Arc::new(Inner { settings, observed, wake, watch }) }
    }
}

impl Inner {
    fn look(&self, now: Now) -> Result<Listing, SourceError> {
        self.keep_watching();
        let repository = Repository::new(&self.settings);
        let unreadable = io_error(repository.root());
        let (names, notes) = repository.found().map_err(&unreadable)?;
        let mut listing = Listing::default();
        for text in notes {
            note(&mut listing.notes, || text);
        }
        if names.len() > MODELS_MAX {
            let what = "the repository holds more models than are listed".to_owned();
            return Err(SourceError::Limit { what, limit: MODELS_MAX as u64 });
        }
        let mut observed = self.observed.lock();
        for name in names {
            let folder = repository.open(&name).map_err(&unreadable)?;
            let listed = match folder {
                Ok(folder) => {
                    self.model(&repository, &name, folder, &mut observed, now, &mut listing.recheck)
                }
                Err(error) => unknown(&error),
            };
            listing.models.insert(name, listed);
        }
        observed.finish();
        Ok(listing)
    }

    fn model(
        &self,
        repository: &Repository,
        name: &ModelName,
        folder: Folder,
        observed: &mut Observations,
        now: Now,
        recheck: &mut Option<Duration>,
    ) -> ModelListing {
        let mut listed = ModelListing { config: config(&folder), ..ModelListing::default() };
        let versions = match repository.versions(&folder) {
            Ok(versions) => versions,
            Err(error) => return unknown(&error),
        };
        if versions.len() > VERSIONS_MAX {
            listed.notes.push(format!("only the latest {VERSIONS_MAX} versions are listed"));
        }
        for version in versions.into_iter().rev().take(VERSIONS_MAX) {
            let opened = repository.open(name).ok().and_then(Result::ok);
            let Some(opened) = opened.and_then(|model| repository.version(model, version).ok())
            else {
                // Removed while we looked, or a link that leads away.
                continue;
            };
            let walk = Walk::of(&opened);
            let mut found = walk.listing(self.settings.model_size_max);
            let verdict = observed.judge(name, version, found.fingerprint, walk.newest, now);
            found.settled = match verdict {
                Verdict::Settled => true,
                Verdict::Wait(_) if self.is_complete(&opened, &walk) => {
                    observed.complete(name, version);
                    true
                }
                Verdict::Wait(left) => {
                    *recheck = Some(recheck.map_or(left, |wait| wait.min(left)));
                    false
                }
            };
            listed.versions.insert(version, found);
        }
        listed
    }

    /// Whether `SHA256SUMS` is whole and everything that it names is there.
    fn is_complete(&self, version: &Folder, walk: &Walk) -> bool {
        if !walk.files.contains_key(SUMS_FILE) {
            return false;
        }
        if !self.settings.trusted_keys.is_empty() && !walk.files.contains_key(SIGNATURE_FILE) {
            return false;
        }
        let text = version.text(SUMS_FILE, SUMS_SIZE_MAX).ok().flatten();
        let listed = text.as_deref().and_then(listed_in_sums);
        listed.is_some_and(|names| {
            !names.is_empty() && names.iter().all(|name| walk.files.contains_key(name))
        })
    }

    /// Watches the repository's folder, unless that very folder is watched already.
    fn keep_watching(&self) {
        let root = &self.settings.repository;
        let Ok(there) = std::fs::metadata(root) else { return };
        let of = Some((there.dev(), there.ino()));
        let mut watch = self.watch.lock();
        if watch.of == of {
            return;
        }
        watch.of = of;
        let wake = Arc::clone(&self.wake);
        let handler = move |event: notify::Result<notify::Event>| {
            // An error may mean that something was missed.
            if event.is_err() || event.is_ok_and(|event| is_change(event.kind)) {
                wake.notify_one();
            }
        };
        let config = notify::Config::default().with_follow_symlinks(false);
        let started = RecommendedWatcher::new(handler, config).and_then(|mut watcher| {
            watcher.watch(root, RecursiveMode::Recursive)?;
            Ok(watcher)
        });
        match started {
            Ok(watcher) => watch.watcher = Some(watcher),
            Err(error) => {
                watch.watcher = None;
                if !std::mem::replace(&mut watch.warned, true) {
                    let root = root.display();
                    tracing::warn!(%root, %error, "the repository is polled, not watched");
                }
            }
        }
    }

    fn copy(
        &self,
        model: &ModelName,
        version: Version,
        into: &Path,
    ) -> Result<Staged, SourceError> {
        let repository = Repository::new(&self.settings);
        let what = format!("version {version} of {model}");
        let missing = || SourceError::Missing { what: what.clone() };
        let open = || {
            let opened = repository.open(model).map_err(io_error(repository.root()))?;
            opened.map_err(|_| missing())
        };
        let folder = repository.version(open()?, version).map_err(|_| missing())?;
        let walk = Walk::of(&folder);
        let listed = walk.listing(self.settings.model_size_max);
        if let Some(problem) = listed.problem {
            return Err(SourceError::Unsupported(format!("{what} {problem}")));
        }
        let own = into.join(model.as_str());
        make_folder(&own).map_err(io_error(&own))?;
        let beside = open()?;
        for (name, facts) in files(&beside) {
            if facts.size <= CONFIG_SIZE_MAX {
                copy_file(&beside, &name, facts.size, &own.join(&name))?;
            }
        }
        let home = own.join(version.to_string());
        make_folder(&home).map_err(io_error(&home))?;
        for (path, facts) in &walk.files {
            let to = home.join(path);
            if let Some(parent) = to.parent() {
                make_folder(parent).map_err(io_error(parent))?;
            }
            copy_file(&folder, path, facts.size, &to)?;
            if let Some(parent) = to.parent() {
                sync_folder(parent).map_err(io_error(parent))?;
            }
        }
        for folder in [&home, &own, into] as [&Path; 3] {
            sync_folder(folder).map_err(io_error(folder))?;
        }
        Ok(Staged { fingerprint: listed.fingerprint, files: listed.files, bytes: listed.bytes })
    }
}

/// A model of which nothing is known now.
fn unknown(error: &dyn std::fmt::Display) -> ModelListing {
    let problem = Some(format!("its folder cannot be read: {error}"));
    ModelListing { problem, ..ModelListing::default() }
}

/// Reading is no change; closing what was written is one, and the last of an upload.
fn is_change(kind: EventKind) -> bool {
    match kind {
        EventKind::Access(kind) => kind == AccessKind::Close(AccessMode::Write),
        _ => true,
    }
}

/// Plain files directly in a folder.
fn files(folder: &Folder) -> Vec<(String, Facts)> {
    let names = folder.names().unwrap_or_default();
    let facts = |name: String| Some((folder.facts(&name).ok()?, name));
    let found = names.into_iter().filter_map(facts).take(FILES_MAX);
    found.filter(|(facts, _)| facts.kind == Kind::File).map(|(facts, name)| (name, facts)).collect()
}

/// Of the files beside the versions.
fn config(folder: &Folder) -> Fingerprint {
    let mut print = Fingerprint::build();
    for (name, facts) in files(folder) {
        print.add(name);
        add(&mut print, &facts);
    }
    print.done()
}

fn add(print: &mut super::FingerprintBuilder, facts: &Facts) {
    let since = facts.written.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    print.number(facts.size).number(since.as_secs()).number(since.subsec_nanos().into());
    print.number(facts.inode);
}

impl Walk {
    fn of(version: &Folder) -> Self {
        let mut walk = Self::default();
        walk.step(version, "", 1);
        walk
    }

    fn step(&mut self, folder: &Folder, above: &str, depth: usize) {
        match folder.own_facts() {
            Ok(facts) => self.newest = self.newest.max(Some(facts.changed)),
            Err(error) => drop(self.others.insert(above.to_owned(), error.to_string())),
        }
        let names = match folder.names() {
            Ok(names) => names,
            Err(error) => {
                self.others.insert(above.to_owned(), error.to_string());
                return;
            }
        };
        for name in names {
            if self.files.len() + self.others.len() >= FILES_MAX {
                self.problem = Some(format!("has more than {FILES_MAX} files"));
                return;
            }
            let path = format!("{above}{name}");
            self.entry(folder, &name, path, depth);
        }
    }

    fn entry(&mut self, folder: &Folder, name: &str, path: String, depth: usize) {
        let facts = match folder.facts(name) {
            Ok(facts) => facts,
            Err(error) => return drop(self.others.insert(path, error.to_string())),
        };
        self.newest = self.newest.max(Some(facts.changed.max(facts.written)));
        match facts.kind {
            Kind::File => drop(self.files.insert(path, facts)),
            Kind::Folder if depth < names::DEPTH_MAX => match folder.folder(name) {
                Ok(inner) => self.step(&inner, &format!("{path}/"), depth + 1),
                Err(error) => drop(self.others.insert(path, error.to_string())),
            },
            Kind::Folder | Kind::FolderLink | Kind::Special => {
                self.others.insert(path, format!("{:?}", facts.kind));
            }
        }
    }

    fn listing(&self, size_max: u64) -> VersionListing {
        let mut print = Fingerprint::build();
        for (path, facts) in &self.files {
            print.add(path);
            add(&mut print, facts);
        }
        for (path, what) in &self.others {
            print.add(path).add(what);
        }
        let bytes = self.files.values().fold(0_u64, |sum, file| sum.saturating_add(file.size));
        let too_large =
            (bytes > size_max).then(|| format!("has {bytes} bytes, the limit is {size_max}"));
        VersionListing {
            fingerprint: print.done(),
            settled: false,
            problem: self.problem.clone().or(too_large),
            files: self.files.len(),
            bytes,
            modified: self.files.values().map(|file| file.written).max(),
            tags: BTreeMap::new(),
            run: None,
        }
    }
}

/// Copies one file of `size` bytes, on the disk for good.
fn copy_file(folder: &Folder, path: &str, size: u64, to: &Path) -> Result<(), SourceError> {
    let refused = |error: ConfineError| SourceError::Io {
        what: path.to_owned(),
        error: io::Error::other(error.to_string()),
    };
    let file = folder.file(path).map_err(refused)?;
    let mut options = std::fs::OpenOptions::new();
    let mut out =
        options.write(true).create_new(true).mode(0o600).open(to).map_err(io_error(to))?;
    // One more than there should be, so that growth is seen and does not fill the disk.
    let copied = io::copy(&mut io::Read::take(file, size + 1), &mut out).map_err(io_error(to))?;
    if copied != size {
        return Err(SourceError::Changed { what: path.to_owned() });
    }
    out.flush().and_then(|()| out.sync_all()).map_err(io_error(to))
}

impl Source for Directory {
    fn describe(&self) -> String {
        self.inner.settings.repository.display().to_string()
    }

    fn local(&self) -> Option<&Path> {
        Some(&self.inner.settings.repository)
    }

    fn list(&self) -> BoxFuture<'_, Result<Listing, SourceError>> {
        let inner = Arc::clone(&self.inner);
        Box::pin(blocking("the repository", move || inner.look(Now::read())))
    }

    fn stage<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
        into: &'a Path,
    ) -> BoxFuture<'a, Result<Staged, SourceError>> {
        let (inner, model, into) = (Arc::clone(&self.inner), model.clone(), into.to_owned());
        Box::pin(blocking("the repository", move || inner.copy(&model, version, &into)))
    }

    fn lineage<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
    ) -> BoxFuture<'a, Result<Lineage, SourceError>> {
        let (inner, model) = (Arc::clone(&self.inner), model.clone());
        Box::pin(blocking("the repository", move || {
            let repository = Repository::new(&inner.settings);
            let what = format!("version {version} of {model}");
            let model = repository.open(&model).map_err(io_error(repository.root()))?;
            let folder = model.and_then(|model| repository.version(model, version));
            let folder = folder.map_err(|_| SourceError::Missing { what })?;
            let newest = Walk::of(&folder).files.values().map(|file| file.written).max();
            let registry = Registered {
                source: inner.settings.repository.display().to_string(),
                created_at: newest.and_then(|newest| Timestamp::try_from(newest).ok()),
                ..Registered::default()
            };
            Ok(Lineage { registry: Some(registry), ..Lineage::default() })
        }))
    }

    fn changed(&self) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.inner.wake.notified().await;
            tokio::time::sleep(SETTLE).await;
        })
    }

    fn hint(&self) {
        self.inner.wake.notify_one();
    }
}

#[cfg(test)]
mod tests;
