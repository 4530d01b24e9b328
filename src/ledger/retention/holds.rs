//! Legal holds: what must not go, whatever its retention says.

use std::fs::File;
use std::io::{self, Write as _};
use std::path::PathBuf;

use parking_lot::RwLock;
use serde::{Deserialize, Serialize};

use crate::ledger::parquet::FileEntry;

/// File of the holds in the ledger's folder.
const FILE: &str = "holds.json";
/// Holds that there may be at once.
pub const HOLDS_MAX: usize = 1_000;
/// Longest name of one.
const NAME_LEN_MAX: usize = 64;

/// Records that are kept: of one model or all, that arrived in a time or at any.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    pub name: String,
    #[serde(default)]
    pub model: Option<String>,
    /// Nanoseconds since 1970; records that arrived then or later.
    #[serde(default)]
    pub since_ns: Option<i64>,
    /// Records that arrived before that.
    #[serde(default)]
    pub until_ns: Option<i64>,
    pub reason: String,
    pub by: String,
    pub put_ns: i64,
}

impl Hold {
    /// What it keeps.
    fn scope(&self) -> (Option<&str>, Option<i64>, Option<i64>) {
        (self.model.as_deref(), self.since_ns, self.until_ns)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum HoldError {
    #[error("a hold's name has 1 to {NAME_LEN_MAX} letters, digits, '.', '_' and '-'")]
    Name,
    #[error("there is a hold '{0}' of other records already")]
    Exists(String),
    #[error("there is no hold '{0}'")]
    Unknown(String),
    #[error("there are {HOLDS_MAX} holds already")]
    TooMany,
    #[error("its time ends before it begins")]
    Time,
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

/// All holds of a ledger.
#[derive(Debug)]
pub struct Holds {
    path: PathBuf,
    /// Guards the list, and the file that it is written to while it is held.
    all: RwLock<Vec<Hold>>,
}

impl Holds {
    /// Reads the holds of the ledger in this folder; there may be none.
    ///
    /// # Errors
    /// When they cannot be read: then nothing must go.
    pub fn open(ledger: &std::path::Path) -> Result<Self, HoldError> {
        let path = ledger.join(FILE);
        let all = match std::fs::read(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(error) => return Err(HoldError::Io { path, error }),
            Ok(bytes) => match serde_json::from_slice(&bytes) {
                Ok(all) => all,
                Err(error) => return Err(HoldError::Io { path, error: error.into() }),
            },
        };
        Ok(Self { path, all: RwLock::new(all) })
    }

    pub fn all(&self) -> Vec<Hold> {
        self.all.read().clone()
    }

    /// # Errors
    /// When it is none, or cannot be written down: it does not hold then.
    pub fn put(&self, hold: Hold) -> Result<(), HoldError> {
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
        if hold.name.is_empty() || hold.name.len() > NAME_LEN_MAX || !hold.name.bytes().all(plain) {
            return Err(HoldError::Name);
        }
        if hold.since_ns.zip(hold.until_ns).is_some_and(|(since, until)| since >= until) {
            return Err(HoldError::Time);
        }
        let mut all = self.all.write();
        if let Some(other) = all.iter().find(|other| other.name == hold.name) {
            // Asked once more, since the first answer did not come.
            return match other.scope() == hold.scope() {
                true => Ok(()),
                false => Err(HoldError::Exists(hold.name)),
            };
        }
        if all.len() >= HOLDS_MAX {
            return Err(HoldError::TooMany);
        }
        let mut next = all.clone();
        next.push(hold);
        self.write(&next)?;
        *all = next;
        Ok(())
    }

    /// # Errors
    /// When there is none of the name, or it cannot be written down: it still holds then.
    pub fn lift(&self, name: &str) -> Result<Hold, HoldError> {
        let mut all = self.all.write();
        let at = all.iter().position(|hold| hold.name == name);
        let at = at.ok_or_else(|| HoldError::Unknown(name.to_owned()))?;
        let mut next = all.clone();
        let lifted = next.remove(at);
        self.write(&next)?;
        *all = next;
        Ok(lifted)
    }

    /// Whether any hold is about a record of this file.
    pub(super) fn hold(&self, file: &FileEntry) -> bool {
        self.all.read().iter().any(|hold| {
            hold.model.as_ref().is_none_or(|model| *model == file.model)
                && hold.since_ns.is_none_or(|since| file.last_time_ns >= since)
                && hold.until_ns.is_none_or(|until| file.first_time_ns < until)
        })
    }

    fn write(&self, all: &[Hold]) -> Result<(), HoldError> {
        let part = self.path.with_extension("part");
        let write = || {
            let mut file = File::create(&part)?;
            file.write_all(&serde_json::to_vec_pretty(all)?)?;
            file.sync_all()?;
            std::fs::rename(&part, &self.path)?;
            self.path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
        };
        write().map_err(|error| HoldError::Io { path: self.path.clone(), error })
    }
}
