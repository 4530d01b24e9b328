//! Where models come from: a folder, a bucket, a registry.
//!
//! ```text
//! directory ─┐            ┌─ list ──▶ Listing: versions with fingerprints, settled or not; labels
//! objects   ─┼─▶ Source ──┼─ stage ─▶ a private folder in the repository's layout ─▶ fetch, probe, load
//! mlflow    ─┘            └─ changed, lineage
//! ```
//!
//! A source only ever answers what is there. Whether a version is loaded, takes traffic or is held
//! back is decided elsewhere, from listings and their [differences](Listing::diff).
//!
//! Invariants:
//! - A version that is still being written is never called settled: all its files were left alone
//!   for the quiet period, or `SHA256SUMS`, which is written last, names what is there.
//! - What a source says is not trusted: names, sizes, page tokens and addresses are checked or
//!   bounded, and what is staged lies beneath the folder that was given.
//! - Only hosts that the configuration names are connected to ([`net`]).
//! - A listing is whole or an error; what failed for one model or version is said beside it, and
//!   [`Listing::over`] keeps what was known before.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::BoxFuture;
use sha2::{Digest as _, Sha256};

use super::lineage::{Lineage, LineageError};
use super::secret::{SecretError, SecretRef};
use crate::bucket::{Bucket, StoreSettings};
use crate::domain::{Label, ModelName, Version};

mod difference;
mod directory;
mod download;
#[cfg(test)]
mod faults;
mod location;
mod mlflow;
mod names;
mod net;
mod objects;
mod quiet;
mod store;

pub use difference::Change;
pub use directory::Directory;
pub use location::{Location, LocationError, Tracking};
pub use mlflow::Mlflow;
pub use mlflow::webhook::{
    BODY_MAX as WEBHOOK_BODY_MAX, Delivery, Hint, WebhookError, Webhooks, verify_webhook,
};
pub use names::PathError;
pub use net::{AddressError, HostPort};
pub use objects::Objects;

/// Most models in one listing.
const MODELS_MAX: usize = 10_000;
/// Most versions of one model.
const VERSIONS_MAX: usize = 1_000;
/// Most files of one version: 1024 of external data, and samples.
const FILES_MAX: usize = 2_048;
/// Most notes of one listing about what is not served.
const NOTES_MAX: usize = 64;
/// Longest time that one listing may take.
const LIST_TIME_MAX: Duration = Duration::from_secs(120);
/// Files that are downloaded at once.
const DOWNLOADS_MAX: usize = 4;
/// List of digests that a version may bring, written last.
pub(super) const SUMS_FILE: &str = "SHA256SUMS";
/// Its signature.
pub(super) const SIGNATURE_FILE: &str = "SHA256SUMS.minisig";
/// Largest of the two.
const SUMS_SIZE_MAX: u64 = 1 << 20;

/// A place that models come from.
pub trait Source: Send + Sync {
    /// For logs and the admin API; never a secret.
    fn describe(&self) -> String;

    /// The folder that can be served from in place; `None` when versions have to be staged.
    fn local(&self) -> Option<&Path> {
        None
    }

    /// Every model and version there is.
    fn list(&self) -> BoxFuture<'_, Result<Listing, SourceError>>;

    /// Brings one version's files to `into`, an empty private folder:
    /// `<into>/<model>/{config.pbtxt,tidegate.toml}` and `<into>/<model>/<version>/…`, on the disk
    /// for good.
    fn stage<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
        into: &'a Path,
    ) -> BoxFuture<'a, Result<Staged, SourceError>>;

    /// What the source itself knows of a version's origin, and what its files say.
    fn lineage<'a>(
        &'a self,
        model: &'a ModelName,
        version: Version,
    ) -> BoxFuture<'a, Result<Lineage, SourceError>>;

    /// Completes when a look is worth it. A hint only: the caller looks every
    /// [`Settings::poll`] regardless.
    fn changed(&self) -> BoxFuture<'_, ()>;

    /// Somebody says that something changed: completes [`Source::changed`].
    fn hint(&self);
}

/// Everything that a source has.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Listing {
    pub models: BTreeMap<ModelName, ModelListing>,
    /// What is there and can be no model, and why.
    pub notes: Vec<String>,
    /// Something may have settled by then: look again, if the next poll is later.
    pub recheck: Option<Duration>,
}

#[derive(Clone, Debug, Default, PartialEq)]
pub struct ModelListing {
    pub versions: BTreeMap<Version, VersionListing>,
    /// Names that the source itself gives to versions.
    pub labels: BTreeMap<Label, Version>,
    pub tags: BTreeMap<String, String>,
    /// Of the files beside the versions: `config.pbtxt`, `tidegate.toml`, label files.
    pub config: Fingerprint,
    /// Why its versions are not known now.
    pub problem: Option<String>,
    /// What the source says that means nothing here.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq)]
pub struct VersionListing {
    /// Other when any file was added, removed or written.
    pub fingerprint: Fingerprint,
    /// Nobody is writing it any more, as far as can be told.
    pub settled: bool,
    /// Why it cannot be served as it is.
    pub problem: Option<String>,
    pub files: usize,
    pub bytes: u64,
    /// When its last file was written, or the version registered.
    pub modified: Option<SystemTime>,
    pub tags: BTreeMap<String, String>,
    /// The run that made it, where the source names one.
    pub run: Option<String>,
}

/// What was brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Staged {
    /// Of what was brought: a listing that says otherwise is older or newer.
    pub fingerprint: Fingerprint,
    pub files: usize,
    pub bytes: u64,
}

/// SHA-256 over what tells one state of a version's files from another, without reading them:
/// names, sizes, times and entity tags.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    fn build() -> FingerprintBuilder {
        FingerprintBuilder(Sha256::new())
    }

    pub fn hex(&self) -> String {
        super::fetch::hex(&self.0)
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hex())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.hex()[..12])
    }
}

struct FingerprintBuilder(Sha256);

impl FingerprintBuilder {
    /// Each part with its length, so that no two lists of parts are the same bytes.
    fn add(&mut self, part: impl AsRef<[u8]>) -> &mut Self {
        let part = part.as_ref();
        self.0.update((part.len() as u64).to_be_bytes());
        self.0.update(part);
        self
    }

    fn number(&mut self, number: u64) -> &mut Self {
        self.add(number.to_be_bytes())
    }

    fn done(self) -> Fingerprint {
        Fingerprint(self.0.finalize().into())
    }
}

/// Why a source could not do what was asked. Texts that a server sent are cut and without control
/// characters.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error("{what} cannot be reached: {reason}")]
    Unreachable { what: String, reason: String },
    #[error("{what}: the server answered {status}{detail}")]
    Status { what: String, status: u16, detail: String },
    #[error("{what}: {reason}")]
    Answer { what: String, reason: String },
    #[error("{what} is not there")]
    Missing { what: String },
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("{what}, the limit is {limit}")]
    Limit { what: String, limit: u64 },
    #[error("{what} changed while it was read")]
    Changed { what: String },
    #[error("{what} took longer than {limit:?}")]
    Slow { what: String, limit: Duration },
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("lineage of the version: {0}")]
    Lineage(#[from] LineageError),
    #[error("{what}: {error}")]
    Io { what: String, error: std::io::Error },
    #[error("{0}")]
    Unsupported(String),
}

impl SourceError {
    /// Whether the same call may succeed a moment later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::Slow { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500..=599),
            _ => false,
        }
    }
}

/// What a source needs to know of the configuration, beside where it is.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where models come from; `None`: the folder of [`super::Settings::repository`].
    pub location: Option<Location>,
    /// How often it is looked at.
    pub poll: Duration,
    /// How long a version's files must have been left alone.
    pub quiet: Duration,
    /// Hosts that may be connected to beside the ones that the location means.
    pub allowed_hosts: Vec<HostPort>,
    /// A bucket may be reached without TLS on hosts that are not loopback.
    pub allow_http: bool,
    pub store: StoreSettings,
    pub mlflow: MlflowSettings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            location: None,
            poll: Duration::from_secs(15),
            quiet: Duration::from_secs(2),
            allowed_hosts: Vec::new(),
            allow_http: false,
            store: StoreSettings::default(),
            mlflow: MlflowSettings::default(),
        }
    }
}

/// How an MLflow server is talked to.
#[derive(Clone, Debug, Default)]
pub struct MlflowSettings {
    pub username: Option<SecretRef>,
    pub password: Option<SecretRef>,
    /// Bearer token; wins over name and password.
    pub token: Option<SecretRef>,
    /// The alias that is our label `stable`.
    pub stable_alias: Option<String>,
    /// What webhooks are signed with; none: they are refused.
    pub webhook_secret: Option<SecretRef>,
    /// Buckets and prefixes that artifacts may be read from directly.
    pub artifacts: Vec<Bucket>,
}

/// The source that the configuration names.
///
/// # Errors
/// When it cannot be reached by its own rules: an address that is refused, a secret that is not there.
pub fn open(settings: &super::Settings) -> Result<Arc<dyn Source>, SourceError> {
    Ok(match &settings.source.location {
        None | Some(Location::Folder(_)) => Arc::new(Directory::new(settings.clone())),
        Some(Location::Objects(bucket)) => Arc::new(Objects::new(bucket.clone(), settings)?),
        Some(Location::Mlflow(tracking)) => Arc::new(Mlflow::new(tracking.clone(), settings)?),
    })
}

/// Adds a note unless there are too many.
fn note(notes: &mut Vec<String>, text: impl FnOnce() -> String) {
    if notes.len() < NOTES_MAX {
        notes.push(text());
    }
}

/// Runs what reads or writes files away from the threads that answer.
async fn blocking<T: Send + 'static>(
    what: &str,
    work: impl FnOnce() -> Result<T, SourceError> + Send + 'static,
) -> Result<T, SourceError> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
        Err(SourceError::Io { what: what.to_owned(), error: std::io::Error::other(error) })
    })
}

fn io_error(path: &Path) -> impl Fn(std::io::Error) -> SourceError {
    let what = path.file_name().map_or_else(PathBuf::new, PathBuf::from);
    move |error| SourceError::Io { what: what.display().to_string(), error }
}

/// Names that a list of digests holds, if it can be a whole one: each line is right and the last
/// one ended.
fn listed_in_sums(text: &str) -> Option<Vec<String>> {
    if !text.ends_with('\n') {
        return None;
    }
    super::fetch::parse_sums(text).ok().map(|sums| sums.into_keys().collect())
}
