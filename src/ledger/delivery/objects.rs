//! Parquet files and their manifests into a bucket, under the names that they have here.
//!
//! ```text
//! parquet/model=iris/date=2026-11-25/<writer>-<seq>.parquet ─▶ s3://bucket/prefix/model=iris/date=…/…
//!         _segments/<writer>-<seq>.json                     ─▶ s3://bucket/prefix/_segments/…
//! ```
//!
//! Invariants:
//! - A file is made in the bucket on the condition that it is not there (`If-None-Match: *`), so one
//!   that is sent twice is there once. One that is there with other content, and that we did not
//!   put there, is not touched.
//! - A file that changed here, since payloads of it were erased, is put there anew.
//! - A manifest follows what it describes, and a file that does not match its manifest is not sent.
//! - Memory: one file up to [`WHOLE_BYTES_MAX`], or one part of a larger one.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use object_store::path::Path as Key;
use object_store::{
    Attribute, Attributes, GetOptions, MultipartUpload as _, ObjectStore, ObjectStoreExt as _,
    PutMode, PutMultipartOptions, PutOptions, PutPayload,
};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::offset::Keeper;
use super::pace::Pace;
use super::stores;
use super::{Cap, Models, OnCap, Settings, Shared, Source, now_ns};
use crate::bucket::{Bucket, StoreSettings, chain};
use crate::checksum;

/// Folder of the files, in the ledger's.
const PARQUET: &str = "parquet";
/// Folder of the manifests, in that.
const MANIFESTS: &str = "_segments";
const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// How often it is looked for new files.
const POLL: Duration = Duration::from_secs(1);
/// Larger files are sent in parts.
const WHOLE_BYTES_MAX: u64 = 16 << 20;
const PART_BYTES: usize = 8 << 20;
/// The list of what is there is kept as often.
const SAVE_EVERY: Duration = Duration::from_secs(1);
/// Name of the digest among an object's metadata.
const DIGEST: &str = "sha256";

/// Which bucket, and how it is reached.
#[derive(Clone, Debug)]
pub struct ObjectsSettings {
    pub bucket: Bucket,
    pub store: StoreSettings,
    /// Plain HTTP to other machines.
    pub allow_http: bool,
}

/// What is in the bucket, as we put it there; files that are gone here are forgotten.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
struct Taken {
    files: BTreeMap<String, Print>,
}

/// By what a file is known again without reading it, and what it held.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Print {
    size: u64,
    modified_ns: u64,
    sha256: String,
}

/// A file here.
#[derive(Clone, Debug, PartialEq)]
struct Found {
    /// Below the folder, with slashes.
    name: String,
    path: PathBuf,
    size: u64,
    modified_ns: u64,
}

/// Why a file is not there.
#[derive(Debug)]
enum Failed {
    /// It is gone here.
    Gone,
    /// It is written anew, and what describes it has not followed yet.
    Early,
    /// The bucket, or the way to it: the others would fare no better.
    Store(String),
    /// This file alone.
    File(String),
}

/// Opens the bucket.
type Open = Box<dyn Fn() -> Result<Arc<dyn ObjectStore>, String>>;

pub(super) struct Objects {
    folder: PathBuf,
    prefix: String,
    open: Open,
    store: Option<Arc<dyn ObjectStore>>,
    models: Models,
    cap: Cap,
    shared: Arc<Shared>,
    stop: CancellationToken,
    keeper: Keeper,
    taken: Taken,
    unsaved: bool,
    saved_at: std::time::Instant,
    pace: Pace,
}

impl Objects {
    pub(super) fn new(
        own: ObjectsSettings,
        settings: &Settings,
        source: &Source,
        shared: Arc<Shared>,
        stop: CancellationToken,
    ) -> Self {
        let prefix = own.bucket.prefix.clone();
        let open = move || stores::open(&own);
        Self::with(Box::new(open), prefix, settings, source, shared, stop)
    }

    fn with(
        open: Open,
        prefix: String,
        settings: &Settings,
        source: &Source,
        shared: Arc<Shared>,
        stop: CancellationToken,
    ) -> Self {
        let keeper = Keeper::new(&source.dir, shared.name);
        Self {
            folder: source.dir.join(PARQUET),
            prefix,
            open,
            store: None,
            models: settings.models.clone(),
            cap: settings.cap,
            shared,
            stop,
            taken: keeper.load().unwrap_or_default(),
            keeper,
            unsaved: false,
            saved_at: std::time::Instant::now(),
            pace: Pace::new(settings.backoff_max),
        }
    }

    /// Delivers until it is stopped, and then what is there without waiting.
    pub(super) async fn run(mut self) {
        loop {
            let wait = match self.round().await {
                Ok(()) => {
                    self.pace.reset();
                    POLL
                }
                Err(why) => {
                    self.shared.failed(&why);
                    // Credentials may have been replaced.
                    self.store = None;
                    self.pace.wait(None)
                }
            };
            self.save(Duration::ZERO);
            if self.stop.is_cancelled() {
                return;
            }
            tokio::select! {
                () = sleep(wait) => {}
                () = self.stop.cancelled() => {}
            }
        }
    }

    /// Sends what is new; the error is that of the bucket, or of the last file that failed alone.
    async fn round(&mut self) -> Result<(), String> {
        let found = found(&self.folder, &self.models).map_err(|error| error.to_string())?;
        let names = |name: &String| found.iter().any(|file| file.name == *name);
        let known = self.taken.files.len();
        self.taken.files.retain(|name, _| names(name));
        self.unsaved |= known != self.taken.files.len();
        let mut new: Vec<Found> = found.into_iter().filter(|file| !self.is_there(file)).collect();
        self.pass_over(&mut new);
        self.show(&new);
        if new.is_empty() {
            return Ok(());
        }
        let mut problem = None;
        let mut left = new.clone();
        for file in new {
            match self.send(&file).await {
                Ok(sha256) => {
                    let (size, modified_ns) = (file.size, file.modified_ns);
                    let print = Print { size, modified_ns, sha256 };
                    self.taken.files.insert(file.name.clone(), print);
                    self.unsaved = true;
                    self.shared.took(1);
                }
                Err(Failed::Gone) => {}
                Err(Failed::Early) => continue,
                Err(Failed::Store(why)) => return Err(why),
                Err(Failed::File(why)) => {
                    problem = Some(format!("{}: {why}", file.name));
                    continue;
                }
            }
            left.retain(|other| other.name != file.name);
            self.show(&left);
            self.save(SAVE_EVERY);
        }
        problem.map_or(Ok(()), Err)
    }

    fn is_there(&self, file: &Found) -> bool {
        self.taken
            .files
            .get(&file.name)
            .is_some_and(|print| print.size == file.size && print.modified_ns == file.modified_ns)
    }

    /// Says how much waits; `new` is in order.
    fn show(&self, new: &[Found]) {
        let shared = &self.shared;
        let oldest = new.iter().map(|file| file.modified_ns).min().unwrap_or(0);
        shared.oldest_ns.store(oldest, Ordering::Relaxed);
        shared.lag_files.store(new.len() as u64, Ordering::Relaxed);
        shared.lag_bytes.store(new.iter().map(|file| file.size).sum(), Ordering::Relaxed);
        let first = new.iter().filter_map(|file| first_seq(&file.name)).min();
        shared.saved_seq.store(first.unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Does what is decided about too much that waits.
    fn pass_over(&mut self, new: &mut Vec<Found>) {
        new.sort_by(|one, other| by_age(one).cmp(&by_age(other)));
        let now = now_ns();
        let mut bytes = 0_u64;
        let fits = |file: &&Found| {
            bytes = bytes.saturating_add(file.size);
            let age = Duration::from_nanos(now.saturating_sub(file.modified_ns));
            (self.cap.bytes_max == 0 || bytes <= self.cap.bytes_max)
                && self.cap.age_max.is_none_or(|most| age <= most)
        };
        let over = new.len() - new.iter().rev().take_while(fits).count();
        let keep = self.cap.on_cap == OnCap::Keep;
        let was = self.shared.over_cap.swap(over > 0 && keep, Ordering::Relaxed);
        let sink = self.shared.name;
        if over > 0 && keep && !was {
            let files = new.len();
            tracing::error!(sink, files, "more waits for a sink than may, it is kept nevertheless");
        }
        if over > 0 && !keep {
            tracing::error!(
                sink,
                files = over,
                "more waits for a sink than may, the oldest is passed over"
            );
            Shared::add(&self.shared.skipped, over as u64);
            for file in new.drain(..over) {
                let (size, modified_ns) = (file.size, file.modified_ns);
                let print = Print { size, modified_ns, sha256: String::new() };
                self.taken.files.insert(file.name, print);
                self.unsaved = true;
            }
        }
    }

    fn save(&mut self, every: Duration) {
        if !self.unsaved || self.saved_at.elapsed() < every {
            return;
        }
        self.saved_at = std::time::Instant::now();
        match self.keeper.save(&self.taken) {
            Ok(()) => self.unsaved = false,
            Err(error) => {
                tracing::error!(sink = self.shared.name, %error, "the list of files cannot be kept");
            }
        }
    }

    fn key(&self, name: &str) -> Result<Key, Failed> {
        let prefix = self.prefix.as_str();
        let slash = if prefix.is_empty() { "" } else { "/" };
        Key::parse(format!("{prefix}{slash}{name}")).map_err(|error| Failed::File(chain(&error)))
    }

    /// Sends a file; its digest.
    async fn send(&mut self, file: &Found) -> Result<String, Failed> {
        let store = match &self.store {
            Some(store) => Arc::clone(store),
            None => {
                let opened = (self.open)().map_err(Failed::Store)?;
                Arc::clone(self.store.insert(opened))
            }
        };
        let key = self.key(&file.name)?;
        let ours = self.taken.files.get(&file.name).filter(|print| !print.sha256.is_empty());
        let (sha256, whole) = digest(file)?;
        if ours.is_some_and(|print| print.sha256 == sha256) {
            return Ok(sha256);
        }
        if described(&self.folder, &file.name).is_some_and(|other| other != sha256) {
            return Err(Failed::Early);
        }
        let mut attributes = Attributes::new();
        attributes.insert(Attribute::ContentType, content_type(&file.name).into());
        attributes.insert(Attribute::Metadata(DIGEST.into()), sha256.clone().into());
        let mode = if ours.is_some() { PutMode::Overwrite } else { PutMode::Create };
        let put = Put { store: &*store, key: &key, sha256: &sha256, size: file.size, attributes };
        match whole {
            Some(bytes) => put.whole(bytes, mode).await?,
            None => put.parts(file, mode == PutMode::Create).await?,
        }
        Ok(sha256)
    }
}

/// One file on its way.
struct Put<'a> {
    store: &'a dyn ObjectStore,
    key: &'a Key,
    sha256: &'a str,
    size: u64,
    attributes: Attributes,
}

impl Put<'_> {
    async fn whole(&self, bytes: Bytes, mode: PutMode) -> Result<(), Failed> {
        let put = |mode| {
            let options =
                PutOptions { mode, attributes: self.attributes.clone(), ..PutOptions::default() };
            self.store.put_opts(self.key, PutPayload::from_bytes(bytes.clone()), options)
        };
        match put(mode).await {
            Ok(_) => Ok(()),
            Err(object_store::Error::AlreadyExists { .. }) => match self.there().await? {
                true => Ok(()),
                // Removed since.
                false => Err(Failed::File("is not there although it was".to_owned())),
            },
            // A store without conditions: looked first, then put.
            Err(object_store::Error::NotImplemented { .. }) => match self.there().await? {
                true => Ok(()),
                false => put(PutMode::Overwrite).await.map(drop).map_err(failed),
            },
            Err(error) => Err(failed(error)),
        }
    }

    /// A large file: it appears whole, with its last part.
    async fn parts(&self, file: &Found, new: bool) -> Result<(), Failed> {
        if new && self.there().await? {
            return Ok(());
        }
        let options =
            PutMultipartOptions { attributes: self.attributes.clone(), ..Default::default() };
        let upload = self.store.put_multipart_opts(self.key, options).await;
        let mut upload = upload.map_err(failed)?;
        let sent = async {
            let mut from = File::open(&file.path).map_err(local)?;
            loop {
                let mut part = Vec::new();
                from.by_ref().take(PART_BYTES as u64).read_to_end(&mut part).map_err(local)?;
                if part.is_empty() {
                    break;
                }
                upload.put_part(PutPayload::from(part)).await.map_err(failed)?;
            }
            upload.complete().await.map(drop).map_err(failed)
        };
        if let Err(error) = sent.await {
            // What was sent of it would be kept, and paid for.
            upload.abort().await.ok();
            return Err(error);
        }
        match self.there().await? {
            true => Ok(()),
            false => Err(Failed::Store("a file is not there after it was sent".to_owned())),
        }
    }

    /// Whether the file is there, as it is here.
    async fn there(&self) -> Result<bool, Failed> {
        let head = self.store.get_opts(self.key, GetOptions { head: true, ..Default::default() });
        let found = match head.await {
            Err(object_store::Error::NotFound { .. }) => return Ok(false),
            found => found.map_err(failed)?,
        };
        let digest = found.attributes.get(&Attribute::Metadata(DIGEST.into()));
        let digest = match digest {
            Some(digest) => digest.to_string(),
            None => self.read_digest().await?,
        };
        match found.meta.size == self.size && digest == self.sha256 {
            true => Ok(true),
            false => Err(Failed::File("is there with other content".to_owned())),
        }
    }

    /// Of an object whose metadata was not kept.
    async fn read_digest(&self) -> Result<String, Failed> {
        use futures_util::TryStreamExt as _;
        let mut stream = self.store.get(self.key).await.map_err(failed)?.into_stream();
        let mut hash = Sha256::new();
        while let Some(bytes) = stream.try_next().await.map_err(failed)? {
            hash.update(&bytes);
        }
        Ok(hex(&hash.finalize()))
    }
}

fn failed(error: object_store::Error) -> Failed {
    Failed::Store(chain(&error))
}

fn local(error: io::Error) -> Failed {
    match error.kind() {
        io::ErrorKind::NotFound => Failed::Gone,
        _ => Failed::File(error.to_string()),
    }
}

/// The digest of a file, and all of it when it is small.
fn digest(file: &Found) -> Result<(String, Option<Bytes>), Failed> {
    if file.size <= WHOLE_BYTES_MAX {
        let bytes = fs::read(&file.path).map_err(local)?;
        return Ok((hex(&Sha256::digest(&bytes)), Some(bytes.into())));
    }
    let digest = File::open(&file.path).and_then(checksum::sha256).map_err(local)?.0;
    Ok((digest.hex(), None))
}

/// The digest of a Parquet file, by the manifest of its segment.
fn described(folder: &Path, name: &str) -> Option<String> {
    let stem = name.rsplit('/').next()?.strip_suffix(".parquet")?;
    let path = folder.join(MANIFESTS).join(format!("{stem}.json"));
    let size = fs::metadata(&path).ok()?.len();
    let bytes = (size <= MANIFEST_BYTES_MAX).then(|| fs::read(path).ok()).flatten()?;
    let manifest: Manifest = serde_json::from_slice(&bytes).ok()?;
    let entry = manifest.files.into_iter().find(|entry| entry.file == name);
    entry.map(|entry| entry.sha256)
}

/// What is read of a manifest.
#[derive(Deserialize)]
struct Manifest {
    files: Vec<Entry>,
}

#[derive(Deserialize)]
struct Entry {
    file: String,
    sha256: String,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn content_type(name: &str) -> &'static str {
    if name.ends_with(".json") { "application/json" } else { "application/vnd.apache.parquet" }
}

/// The first record of a file: `<writer>-<first_seq>.parquet`.
fn first_seq(name: &str) -> Option<u64> {
    let file = name.rsplit('/').next()?;
    let (_, rest) = file.split_once('-')?;
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    rest.get(..digits)?.parse().ok()
}

/// The oldest first; of the same records the data before what describes it.
fn by_age(file: &Found) -> (u64, bool, &str) {
    (first_seq(&file.name).unwrap_or(u64::MAX), file.name.ends_with(".json"), &file.name)
}

/// The files that are whole, of the models that are wanted.
fn found(folder: &Path, models: &Models) -> io::Result<Vec<Found>> {
    let mut files = Vec::new();
    let mut folders = vec![(folder.to_owned(), String::new())];
    while let Some((folder, below)) = folders.pop() {
        let entries = match fs::read_dir(&folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            let Ok(name) = entry.file_name().into_string() else { continue };
            // Not whole yet, or nobody's business.
            if name.starts_with('.') {
                continue;
            }
            let Ok(meta) = entry.metadata() else { continue };
            let below = if below.is_empty() { name } else { format!("{below}/{name}") };
            if meta.is_dir() {
                let model = below.strip_prefix("model=");
                if model.is_none_or(|model| model.contains('/') || models.contain(model)) {
                    folders.push((entry.path(), below));
                }
            } else if meta.is_file() && (below.ends_with(".parquet") || below.ends_with(".json")) {
                let modified = meta.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                let modified = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
                files.push(Found {
                    name: below,
                    path: entry.path(),
                    size: meta.len(),
                    modified_ns: u64::try_from(modified.as_nanos()).unwrap_or(u64::MAX),
                });
            }
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests;
