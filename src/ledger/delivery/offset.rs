//! What a sink has taken, kept where it survives: a small file for each sink.
//!
//! Invariants:
//! - A file is there whole, old or new, also after power loss.
//! - One that is lost or damaged means that all is delivered again: never that something is not.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::SINKS;
use crate::ledger::durable;

/// Largest file that is read: a bucket's list of some 100,000 files.
const SIZE_MAX: u64 = 64 << 20;

/// How far a sink of records is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Offset {
    /// Whose log it is.
    pub(super) writer: String,
    /// Number after the last record that was taken.
    pub(super) next_seq: u64,
}

/// The file of a sink.
#[derive(Clone, Debug)]
pub(super) struct Keeper {
    path: PathBuf,
}

impl Keeper {
    pub(super) fn new(ledger: &Path, sink: &str) -> Self {
        Self { path: ledger.join(SINKS).join(format!("{sink}.json")) }
    }

    /// `None` when there is none, or none that can be used, which is said.
    pub(super) fn load<T: DeserializeOwned>(&self) -> Option<T> {
        let read = fs::metadata(&self.path).and_then(|meta| match meta.len() {
            size if size > SIZE_MAX => Err(io::Error::other("it is larger than any of ours")),
            _ => fs::read(&self.path),
        });
        let parsed = match read {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => Err(error.to_string()),
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| error.to_string()),
        };
        let path = self.path.display();
        parsed
            .map_err(|why| {
                tracing::error!(%path, why, "cannot be read, all is delivered again to this sink");
            })
            .ok()
    }

    pub(super) fn save<T: Serialize>(&self, content: &T) -> io::Result<()> {
        if let Some(folder) = self.path.parent() {
            fs::create_dir_all(folder)?;
        }
        durable::replace(&self.path, durable::PUBLIC, &serde_json::to_vec(content)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_offset_comes_back_and_a_damaged_one_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let keeper = Keeper::new(dir.path(), "kafka");
        assert_eq!(keeper.load::<Offset>(), None);
        let offset = Offset { writer: "0102".to_owned(), next_seq: 77 };
        keeper.save(&offset).unwrap();
        assert_eq!(keeper.load(), Some(offset));
        for damage in ["", "{", "{\"writer\":1}", "\u{0}\u{0}"] {
            fs::write(dir.path().join(SINKS).join("kafka.json"), damage).unwrap();
            assert_eq!(keeper.load::<Offset>(), None, "{damage:?}");
        }
    }
}
