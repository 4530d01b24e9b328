//! Which facts are known of which predictions, and the tallies of each day, in `<state>/feedback.db`.
//!
//! All of it is made from the logs and can be made again: the log `feedback` is what is promised.
//! How far both logs were taken in is written in the same transaction as what was taken from them,
//! so that whatever a crash leaves is where a start goes on from.
//!
//! Invariants:
//! - Nothing that was said is in here: of a label its prediction's id, and its record's number.
//! - A file that is damaged, from another version of this, or ahead of a log is made anew.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OptionalExtension as _, params};
use uuid::Uuid;

use super::board::{Day, Series};
use crate::quality::Tally;

const FILE: &str = "feedback.db";
/// Another number: the file is made anew from the logs.
const FORM: i64 = 1;

const TABLES: &str = "
    CREATE TABLE facts (
        prediction BLOB NOT NULL,
        metric TEXT NOT NULL,
        seq INTEGER NOT NULL,
        PRIMARY KEY (prediction, metric)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE tallies (
        model TEXT NOT NULL,
        version INTEGER NOT NULL,
        arm TEXT NOT NULL,
        day INTEGER NOT NULL,
        tally TEXT NOT NULL,
        PRIMARY KEY (model, version, arm, day)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE taken (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        feedback INTEGER NOT NULL,
        predictions INTEGER
    ) STRICT;
    INSERT INTO taken VALUES (1, 0, NULL);
";

/// How far the logs were taken in: the numbers of the records that come next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Taken {
    pub(super) feedback: u64,
    /// `None`: of predictions nothing was counted yet.
    pub(super) predictions: Option<u64>,
}

pub(super) struct Index {
    db: Connection,
    /// Something was written since the last commit.
    open: bool,
    /// Tallies of days before this one are gone.
    first: Day,
}

impl Index {
    /// Opens the index of this folder; a new one where there is none that can be used, or that is
    /// ahead of the log of feedback.
    ///
    /// # Errors
    /// When none can be made.
    pub(super) fn open(state_dir: &Path, feedback_end: u64) -> rusqlite::Result<Self> {
        let path = state_dir.join(FILE);
        let found = Self::existing(&path).and_then(|index| Ok((index.taken()?, index)));
        match found {
            Ok((taken, index)) if taken.feedback <= feedback_end => return Ok(index),
            Ok((taken, _)) => {
                let (has, log) = (taken.feedback, feedback_end);
                tracing::warn!(has, log, "the index of feedback is ahead of its log, made anew");
            }
            Err(_) if !path.exists() => {}
            Err(error) => tracing::warn!(%error, "the index of feedback is made anew"),
        }
        for end in ["", "-wal", "-shm"] {
            // What cannot be removed is told of by what comes next.
            std::fs::remove_file(with_end(&path, end)).ok();
        }
        let db = Connection::open(own_file(&path))?;
        let index = Self::with(db)?;
        index.db.execute_batch(TABLES)?;
        index.db.pragma_update(None, "user_version", FORM)?;
        Ok(index)
    }

    fn existing(path: &Path) -> rusqlite::Result<Self> {
        use rusqlite::OpenFlags;
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let index = Self::with(Connection::open_with_flags(path, flags)?)?;
        let form: i64 = index.db.pragma_query_value(None, "user_version", |row| row.get(0))?;
        match form {
            FORM => Ok(index),
            _ => Err(rusqlite::Error::QueryReturnedNoRows),
        }
    }

    fn with(db: Connection) -> rusqlite::Result<Self> {
        db.pragma_update(None, "journal_mode", "WAL")?;
        // A commit that power loss takes back is made again from the logs.
        db.pragma_update(None, "synchronous", "NORMAL")?;
        Ok(Self { db, open: false, first: Day::MIN })
    }

    pub(super) fn taken(&self) -> rusqlite::Result<Taken> {
        self.db.query_row("SELECT feedback, predictions FROM taken", [], |row| {
            let predictions: Option<i64> = row.get(1)?;
            Ok(Taken { feedback: number(row.get(0)?), predictions: predictions.map(number) })
        })
    }

    /// Every tally that is kept. One that cannot be read is as one that is not there.
    pub(super) fn tallies(&self) -> rusqlite::Result<Vec<(Series, Day, Tally)>> {
        let mut all = self.db.prepare("SELECT model, version, arm, day, tally FROM tallies")?;
        let rows = all.query_map([], |row| {
            let (model, arm): (String, String) = (row.get(0)?, row.get(2)?);
            let series = Series { model, version: number(row.get(1)?), arm };
            let tally: String = row.get(4)?;
            Ok((series, row.get(3)?, serde_json::from_str(&tally).unwrap_or_default()))
        })?;
        rows.collect()
    }

    /// The number of the record that says this of a prediction, if one does.
    pub(super) fn fact(&self, prediction: &Uuid, metric: &str) -> rusqlite::Result<Option<u64>> {
        let sql = "SELECT seq FROM facts WHERE prediction = ?1 AND metric = ?2";
        let mut statement = self.db.prepare_cached(sql)?;
        let found =
            statement.query_row(params![&prediction.as_bytes()[..], metric], |row| row.get(0));
        found.optional().map(|seq| seq.map(number))
    }

    /// Notes which record says this of a prediction from now on.
    pub(super) fn put(
        &mut self,
        prediction: &Uuid,
        metric: &str,
        seq: u64,
    ) -> rusqlite::Result<()> {
        self.begin()?;
        let sql = "INSERT INTO facts VALUES (?1, ?2, ?3)
            ON CONFLICT (prediction, metric) DO UPDATE SET seq = excluded.seq";
        let mut statement = self.db.prepare_cached(sql)?;
        statement.execute(params![&prediction.as_bytes()[..], metric, signed(seq)])?;
        Ok(())
    }

    /// Writes down how far the logs were taken in, and what changed by that; what is of days before
    /// `first` goes.
    pub(super) fn commit<'a>(
        &mut self,
        taken: Taken,
        changed: impl IntoIterator<Item = (&'a Series, Day, &'a Tally)>,
        first: Day,
    ) -> rusqlite::Result<()> {
        self.begin()?;
        for (series, day, tally) in changed {
            let sql = "INSERT INTO tallies VALUES (?1, ?2, ?3, ?4, ?5)
                ON CONFLICT (model, version, arm, day) DO UPDATE SET tally = excluded.tally";
            let Series { model, version, arm } = series;
            // Numbers and texts: it cannot fail.
            let text = serde_json::to_string(tally).unwrap_or_default();
            let mut statement = self.db.prepare_cached(sql)?;
            statement.execute(params![model, signed(*version), arm, day, text])?;
        }
        if first != self.first {
            self.db.execute("DELETE FROM tallies WHERE day < ?1", [first])?;
        }
        let predictions = taken.predictions.map(signed);
        let sql = "UPDATE taken SET feedback = ?1, predictions = ?2";
        self.db.execute(sql, params![signed(taken.feedback), predictions])?;
        self.db.execute_batch("COMMIT")?;
        (self.open, self.first) = (false, first);
        Ok(())
    }

    fn begin(&mut self) -> rusqlite::Result<()> {
        if !self.open {
            self.db.execute_batch("BEGIN IMMEDIATE")?;
            self.open = true;
        }
        Ok(())
    }
}

/// An empty file that belongs to this user alone; SQLite's others follow it.
fn own_file(path: &Path) -> &Path {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut options = std::fs::File::options();
    // What it cannot be is told of by SQLite.
    options.create(true).append(true).mode(0o600).open(path).ok();
    path
}

fn with_end(path: &Path, end: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(end);
    name.into()
}

/// SQLite's numbers are signed; ours never get so far.
fn number(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series() -> Series {
        Series { model: "iris".into(), version: 3, arm: "canary".into() }
    }

    #[test]
    fn what_was_committed_is_there_again_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let tally = Tally::of_metric("clicks", 7.0);
        let mut index = Index::open(dir.path(), 0).unwrap();
        assert_eq!(index.taken().unwrap(), Taken::default());
        index.put(&one, "", 4).unwrap();
        index.put(&one, "", 5).unwrap();
        index.put(&one, "clicks", 6).unwrap();
        let taken = Taken { feedback: 7, predictions: Some(9) };
        let changed = [(&series(), 20, &tally), (&series(), 2, &tally)];
        index.commit(taken, changed, 10).unwrap();
        index.put(&other, "", 7).unwrap();
        assert_eq!(index.fact(&other, "").unwrap(), Some(7));
        drop(index);
        let index = Index::open(dir.path(), 7).unwrap();
        assert_eq!(index.taken().unwrap(), taken);
        assert_eq!(index.tallies().unwrap(), [(series(), 20, tally)]);
        assert_eq!(index.fact(&one, "").unwrap(), Some(5));
        assert_eq!(index.fact(&one, "clicks").unwrap(), Some(6));
        assert_eq!(index.fact(&other, "").unwrap(), None);
    }

    #[test]
    fn what_cannot_be_used_is_made_anew() {
        let dir = tempfile::tempdir().unwrap();
        let full = |end| {
            let mut index = Index::open(dir.path(), end).unwrap();
            let was = index.taken().unwrap().feedback;
            index.put(&Uuid::from_u128(1), "", 4).unwrap();
            index.commit(Taken { feedback: 7, predictions: None }, [], 0).unwrap();
            was
        };
        assert_eq!(full(0), 0);
        assert_eq!(full(7), 7);
        // The log lost its last records.
        assert_eq!(full(6), 0);
        std::fs::write(dir.path().join(FILE), b"something else, and long enough to be looked at")
            .unwrap();
        assert_eq!(full(7), 0);
        let other = Connection::open(dir.path().join(FILE)).unwrap();
        other.pragma_update(None, "user_version", FORM + 1).unwrap();
        drop(other);
        assert_eq!(full(7), 0);
    }
}
