//! Erases in the folder of a ledger that no gateway has open.
//!
//! The whole ledger is opened as a gateway does, its lock first, so that what is done is the same:
//! recorded, signed, carried out, and sealed.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use uuid::Uuid;

use super::{EraseError, Erased, Hook, Wanted, Why};
use crate::ledger::export::Selection;
use crate::ledger::log::OpenError;
use crate::ledger::notary::NotaryError;
use crate::ledger::parquet::{self, Job, Manifest};
use crate::ledger::{FEEDBACK, LOCK, Ledger, PREDICTIONS, Settings, reader};

/// How long the last records may take to the disk.
const CLOSE_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    #[error("'{}' is no ledger: {error}", path.display())]
    NoLedger { path: PathBuf, error: io::Error },
    #[error("a gateway uses this ledger; ask it: leave --ledger out")]
    Used,
    #[error(transparent)]
    Open(#[from] OpenError),
    #[error("its keys cannot be used: {0}")]
    Keys(#[from] NotaryError),
    #[error(transparent)]
    Erase(#[from] EraseError),
    #[error("could not be ended: {0}")]
    Runtime(io::Error),
}

/// Erases payloads of predictions, or all about a subject. Waits until it is done and on the disk, for as
/// long as an erasure of a gateway does.
///
/// # Errors
/// When there is no ledger there, a gateway has it, or as [`Ledger::erase`].
pub fn erase_offline(
    dir: &Path,
    ids: Vec<Uuid>,
    subject: Option<&str>,
    why: &Why,
) -> Result<Erased, OfflineError> {
    // Nothing is made where there is none.
    let no_ledger = |error| OfflineError::NoLedger { path: dir.to_owned(), error };
    let lock = std::fs::File::options().write(true).open(dir.join(LOCK)).map_err(no_ledger)?;
    lock.try_lock().map_err(|_| OfflineError::Used)?;
    drop(lock);
    let settings = Settings { dir: dir.to_owned(), ..Settings::new(dir) };
    let ledger = Ledger::open(settings, [])?;
    if dir.join(FEEDBACK).is_dir() {
        ledger.feedback()?;
    }
    ledger.start_notary()?;
    ledger.set_erasure_hook(remake(dir.to_owned()));
    let subject = subject.and_then(|subject| Some(ledger.subject_keys()?.tag(subject.as_bytes())));
    let erased = ledger.erase(&Wanted { ids, subject }, why);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    runtime.map_err(OfflineError::Runtime)?.block_on(async {
        let late = |_| OfflineError::Runtime(io::Error::other("its last records take too long"));
        tokio::time::timeout(CLOSE_MAX, ledger.close()).await.map_err(late)
    })?;
    Ok(erased?)
}

/// Makes the Parquet of what was erased anew. How long models keep their records is known to a gateway
/// alone: what it noted stays.
fn remake(dir: PathBuf) -> Hook {
    Box::new(move |name, _| {
        if name != PREDICTIONS {
            return Ok(());
        }
        let root = dir.join(parquet::FOLDER);
        let segments = reader::segments(&dir.join(PREDICTIONS)).map_err(io::Error::other)?;
        for manifest in Manifest::all(&root) {
            let own = |it: &&reader::SegmentFile| it.first_seq == manifest.segment.first_seq;
            let Some(segment) = segments.iter().find(own).filter(|it| !manifest.fits(it)) else {
                continue;
            };
            let days_of = |model: &str| {
                let file = manifest.files.iter().find(|file| file.model == model)?;
                file.retention_days
            };
            let wanted = Selection::default();
            let job = Job { wanted: &wanted, stopped: &|| false, days_of: &days_of };
            parquet::convert(segment, &root, &job).map_err(io::Error::other)?;
        }
        Ok(())
    })
}
