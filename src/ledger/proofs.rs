//! The notary and the subjects' keys of a ledger that is open.

use std::sync::{Arc, Weak};

use super::keys::KeysError;
use super::log::Appended;
use super::notary::{self, Announce, Followed, Notary, NotaryError};
use super::record::{Head, Kind, Payload};
use super::subjects::SubjectKeys;
use super::{ADMIN, FEEDBACK, Ledger, PREDICTIONS};

/// What a record of a new key calls itself.
const KEY_ACTION: &str = "ledger.key";

#[derive(Debug, thiserror::Error)]
pub enum RotateError {
    #[error("the ledger makes no checkpoints")]
    NoNotary,
    #[error(transparent)]
    Keys(#[from] KeysError),
}

impl Ledger {
    /// Begins to sign what is in the logs, and makes keys for subjects where they are asked for.
    ///
    /// # Errors
    /// When the keys cannot be used.
    pub fn start_notary(self: &Arc<Self>) -> Result<(), NotaryError> {
        let settings = notary::Settings {
            ledger: self.settings.dir.clone(),
            writer: self.writer,
            interval: self.settings.checkpoint_interval,
            witnesses: self.settings.witnesses.clone(),
        };
        let logs = [PREDICTIONS, ADMIN, FEEDBACK].map(|name| {
            let ledger = Arc::downgrade(self);
            let durable = move || durable(&ledger, name);
            Followed { name, dir: self.settings.dir.join(name), durable: Box::new(durable) }
        });
        let announce = announce(Arc::downgrade(self));
        *self.notary.lock() = Some(Notary::start(settings, logs.into(), announce)?);
        let subjects = SubjectKeys::open(&self.settings.dir);
        let subjects = Arc::new(subjects.map_err(NotaryError::Subjects)?);
        self.set_subjects(Arc::clone(&subjects) as _);
        drop(self.subject_keys.set(subjects));
        self.keep_erasing().map_err(NotaryError::Thread)
    }

    /// The keys of subjects, once [`Ledger::start_notary`] opened them.
    pub fn subject_keys(&self) -> Option<&Arc<SubjectKeys>> {
        self.subject_keys.get()
    }

    /// Makes a new key for checkpoints; the verifier keys to give to whoever checks them.
    ///
    /// # Errors
    /// When it cannot be made, or the last rotation is not through.
    pub fn rotate_key(&self) -> Result<Vec<String>, RotateError> {
        let notary = self.notary.lock();
        Ok(notary.as_ref().ok_or(RotateError::NoNotary)?.rotate()?)
    }
}

fn durable(ledger: &Weak<Ledger>, name: &str) -> Option<u64> {
    let ledger = ledger.upgrade()?;
    let log = ledger.logs().find(|(of, _)| *of == name).map(|(_, log)| log)?;
    Some(log.stats().synced_seq)
}

/// Puts a record of each new key into the log of changes.
fn announce(ledger: Weak<Ledger>) -> Announce {
    let mut announced: Option<(u32, Appended)> = None;
    Box::new(move |serial, keys| {
        let Some(ledger) = ledger.upgrade() else { return false };
        if let Some((_, at)) = announced.filter(|(of, _)| *of == serial) {
            return ledger.admin().stats().synced_seq > at.seq;
        }
        let body = serde_json::json!({ "serial": serial, "keys": keys }).to_string();
        let head = Head {
            kind: Kind::Key.into(),
            time_ns: now_ns(),
            action: KEY_ACTION.to_owned(),
            ..Head::default()
        };
        let payload = Payload { body: body.into(), ..Payload::default() };
        // A log that cannot take it now is asked again.
        announced = ledger.append_admin(&head, &payload).ok().map(|at| (serial, at));
        false
    })
}

/// Nanoseconds since 1970.
pub(super) fn now_ns() -> i64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.ok().and_then(|since| i64::try_from(since.as_nanos()).ok()).unwrap_or_default()
}
