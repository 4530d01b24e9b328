//! What survives a restart: a version's learnt reference and its arms, below `<state>/monitor`.
//!
//! ```text
//! <state>/monitor/<model>/<version>-<start of the digest>/learnt.json     a provisional reference
//!                                                         frozen.json     one that somebody took for good: it stays
//!                                                         given.json      the one that came with its files
//!                                                         counters        of which reference, and the arms
//! ```
//!
//! What somebody may want to read is JSON. Counters, which are written every five minutes and may be
//! many, are a [`form`] of their own. Whatever does not fit is left aside, said in the log, and counting
//! begins anew: these are statistics, not records.

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io::{self, BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::arm::ArmState;
use super::form;
use super::{ARMS_MAX, Id, Reference};
use crate::domain::Digest;
use crate::drift::profile::{PROFILE_BYTES_MAX, Profile};

const LEARNT: &str = "learnt.json";
const FROZEN: &str = "frozen.json";
const GIVEN: &str = "given.json";
const COUNTERS: &str = "counters";
/// Largest file of counters: those of the most features.
pub(super) const COUNTERS_BYTES_MAX: u64 = 256 << 20;
/// What was not written for so long is of a version that is gone.
const KEPT: Duration = Duration::from_secs(30 * 86_400);

/// One version's folder.
#[derive(Clone, Debug)]
pub(super) struct StateDir(PathBuf);

impl StateDir {
    pub(super) fn new(root: &Path, id: &Id) -> Self {
        let digest = id.digest.hex();
        let start = digest.get(..16).unwrap_or(&digest);
        Self(root.join(id.model.as_str()).join(format!("{}-{start}", id.version)))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// The reference that was learnt here, if one was.
    pub(super) fn learnt(&self) -> Option<Reference> {
        self.reference(FROZEN).or_else(|| self.reference(LEARNT))
    }

    /// The one that came with the version's files when they were seen last.
    pub(super) fn given(&self) -> Option<Reference> {
        self.reference(GIVEN)
    }

    fn reference(&self, name: &str) -> Option<Reference> {
        let path = self.0.join(name);
        let bytes = read(&path, PROFILE_BYTES_MAX as u64)?;
        match Profile::read(&bytes) {
            Ok(profile) => Some((Arc::new(profile), Profile::digest(&bytes))),
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "a reference cannot be read");
                None
            }
        }
    }

    pub(super) fn keep_learnt(&self, profile: &Profile) -> io::Result<Digest> {
        let bytes = profile.write().map_err(io::Error::other)?;
        self.write(LEARNT, |file| file.write_all(&bytes))?;
        Ok(Profile::digest(&bytes))
    }

    pub(super) fn keep_frozen(&self, profile: &Profile) -> io::Result<Digest> {
        let bytes = profile.write().map_err(io::Error::other)?;
        self.write(FROZEN, |file| file.write_all(&bytes))?;
        Ok(Profile::digest(&bytes))
    }

    pub(super) fn keep_given(&self, bytes: &[u8]) -> io::Result<()> {
        self.write(GIVEN, |file| file.write_all(bytes))
    }

    pub(super) fn forget_given(&self) {
        // Mostly there is none.
        std::fs::remove_file(self.0.join(GIVEN)).ok();
    }

    /// The arms as they were, if they were compared with this reference.
    pub(super) fn arms(&self, (profile, digest): &Reference) -> BTreeMap<String, ArmState> {
        let Some(bytes) = read(&self.0.join(COUNTERS), COUNTERS_BYTES_MAX) else {
            return BTreeMap::new();
        };
        match form::read(&bytes) {
            Ok((reference, arms)) => {
                let fit = arms.len() <= ARMS_MAX && arms.values().all(|arm| arm.fits(profile));
                if reference == digest.to_string() && fit { arms } else { BTreeMap::new() }
            }
            Err(error) => {
                let path = self.0.display();
                tracing::warn!(%error, %path, "counters cannot be read, counting begins anew");
                BTreeMap::new()
            }
        }
    }

    pub(super) fn keep_arms(
        &self,
        digest: &Digest,
        arms: &BTreeMap<String, ArmState>,
    ) -> io::Result<()> {
        self.write(COUNTERS, |file| form::write(file, &digest.to_string(), arms))
    }

    fn write(
        &self,
        name: &str,
        content: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
    ) -> io::Result<()> {
        std::fs::create_dir_all(&self.0)?;
        let part = self.0.join(format!(".{name}.part"));
        let mut file = BufWriter::new(File::create(&part)?);
        content(&mut file)?;
        file.flush()?;
        let file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        if file.metadata()?.len() > COUNTERS_BYTES_MAX {
            std::fs::remove_file(&part)?;
            return Err(io::Error::other("more than would be read again"));
        }
        // A reference may be somebody's decision.
        if name != COUNTERS {
            file.sync_all()?;
        }
        std::fs::rename(part, self.0.join(name))
    }
}

fn read(path: &Path, max: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| file.take(max + 1).read_to_end(&mut bytes));
    (read.is_ok() && bytes.len() as u64 <= max).then_some(bytes)
}

/// Removes folders of versions that were not watched for long.
pub(super) fn sweep(root: &Path) {
    let of = |path: &Path| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(path).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).collect()
    };
    let changed = |about: Metadata| about.modified().unwrap_or(SystemTime::UNIX_EPOCH);
    for version in of(root).iter().flat_map(|model| of(model)) {
        let latest = of(&version).iter().filter_map(|file| file.metadata().ok()).map(changed).max();
        let frozen = version.join(FROZEN).exists();
        let old = latest.is_none_or(|at| at.elapsed().is_ok_and(|age| age > KEPT));
        if old
            && !frozen
            && let Err(error) = std::fs::remove_dir_all(&version)
        {
            tracing::debug!(%error, path = %version.display(), "old statistics stay");
        }
    }
}
