//! The store in one SQLite file, `<state>/state.db`.
//!
//! A write-ahead log, synced at every commit: one `fdatasync` each. One connection writes, another
//! reads, so that a long look at the journal holds up nobody's change. Other processes (the `keys`
//! command) may have the file open as well; SQLite's locks keep them apart.
//!
//! Invariants:
//! - A file that is not ours, is damaged or comes from a later version is left as it is.
//! - The file and its log belong to this user alone (mode 0600).

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use rusqlite::config::DbConfig;
use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension, Row as Record, Transaction,
    TransactionBehavior, named_params,
};
use rustix::fs::OFlags;
use serde_json::Value;

use super::{
    Committed, DOCUMENTS_MAX, Document, EVENTS_MAX, Event, EventOutcome, EventQuery, Expect, Kind,
    NewEvent, Prepared, Put, Row, Store, StoreError,
};
use crate::control::fetch::make_folder;

const FILE: &str = "state.db";
/// "TdGt", in the file's header: whose file it is.
const APPLICATION_ID: i64 = 0x5464_4774;
/// Longest wait for another process that writes.
const BUSY_MAX: Duration = Duration::from_secs(5);
/// Between tries of what SQLite does not wait for by itself.
const BUSY_POLL: Duration = Duration::from_millis(20);
/// Files up to this size are read whole when they are opened, to find damage before it matters.
const CHECK_BYTES_MAX: u64 = 64 << 20;
/// What is kept of the write-ahead log once its content is in the file.
const LOG_KEPT_BYTES: i64 = 16 << 20;

/// Each takes the file from one schema version to the next; the first from an empty file.
const MIGRATIONS: &[&str] = &["
    CREATE TABLE feed (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        head INTEGER NOT NULL,
        gateway TEXT NOT NULL
    ) STRICT;
    INSERT INTO feed VALUES (1, 0, lower(hex(randomblob(8))));

    CREATE TABLE documents (
        kind TEXT NOT NULL,
        name TEXT NOT NULL,
        revision INTEGER NOT NULL,
        body TEXT, -- NULL: deleted; the row stays, so that its revisions are not used again
        seq INTEGER NOT NULL,
        gateway TEXT NOT NULL,
        PRIMARY KEY (kind, name)
    ) STRICT;
    CREATE INDEX documents_live ON documents (kind) WHERE body IS NOT NULL;
    CREATE INDEX documents_seq ON documents (seq);

    CREATE TABLE events (
        seq INTEGER PRIMARY KEY,
        at TEXT NOT NULL,
        gateway TEXT NOT NULL,
        actor TEXT NOT NULL,
        action TEXT NOT NULL,
        model TEXT,
        subject TEXT NOT NULL,
        outcome TEXT NOT NULL,
        before TEXT,
        after TEXT,
        reason TEXT,
        request_id TEXT,
        detail TEXT,
        cut INTEGER NOT NULL
    ) STRICT;
    CREATE INDEX events_model ON events (model, seq) WHERE model IS NOT NULL;
    CREATE TRIGGER events_stay BEFORE DELETE ON events
        BEGIN SELECT RAISE(ABORT, 'the journal keeps every row'); END;
    CREATE TRIGGER events_stand BEFORE UPDATE ON events
        BEGIN SELECT RAISE(ABORT, 'the journal keeps every row as it was written'); END;
"];

/// Where the state of a folder lies.
pub fn state_file(state_dir: &Path) -> PathBuf {
    state_dir.join(FILE)
}

/// See the module.
pub struct SqliteStore {
    /// For messages.
    path: String,
    gateway: String,
    /// Guards the connection that writes.
    writer: Mutex<Writer>,
    /// Guards the one that reads; a store in memory has only the other.
    reader: Option<Mutex<Connection>>,
}

struct Writer {
    connection: Connection,
    /// SQLite's count of changes by other connections, when it was last looked at.
    data_version: i64,
}

impl SqliteStore {
    /// Opens the state of this folder, or begins one.
    ///
    /// # Errors
    /// When the folder or the file cannot be used, is damaged, or is not ours.
    pub fn open(state_dir: &Path) -> Result<Self, StoreError> {
        let path = state_file(state_dir);
        let shown = path.display().to_string();
        let size = make_folder(state_dir)
            .and_then(|()| own_file(&path))
            .map_err(|source| StoreError::File { path: shown.clone(), source })?;
        let fails = |error: rusqlite::Error| failed(&shown, &error);
        let mut writer = connect(&path).map_err(fails)?;
        version(&writer, &shown)?;
        if size <= CHECK_BYTES_MAX {
            check(&writer, &shown)?;
        }
        // Ours, so it is made ours alone; SQLite gives its log the same mode.
        fs::set_permissions(&path, Permissions::from_mode(0o600))
            .map_err(|source| StoreError::File { path: shown.clone(), source })?;
        migrate(&mut writer, &shown)?;
        keep_log(&writer).map_err(fails)?;
        let reader = connect(&path).map_err(fails)?;
        reader.pragma_update(None, "query_only", true).map_err(fails)?;
        Self::new(shown, writer, Some(reader))
    }

    /// One that ends with the process, for tests.
    ///
    /// # Errors
    /// When SQLite has no memory.
    pub fn in_memory() -> Result<Self, StoreError> {
        let shown = ":memory:".to_owned();
        let mut writer = Connection::open_in_memory().map_err(|error| failed(&shown, &error))?;
        migrate(&mut writer, &shown)?;
        Self::new(shown, writer, None)
    }

    fn new(
        path: String,
        connection: Connection,
        reader: Option<Connection>,
    ) -> Result<Self, StoreError> {
        let read = connection
            .query_row("SELECT gateway FROM feed", [], |row| row.get(0))
            .and_then(|gateway: String| Ok((gateway, data_version(&connection)?)));
        let (gateway, data_version) = read.map_err(|error| failed(&path, &error))?;
        let writer = Mutex::new(Writer { connection, data_version });
        Ok(Self { path, gateway, writer, reader: reader.map(Mutex::new) })
    }

    /// Id of the gateway whose file this is: 16 hexadecimal digits.
    pub fn gateway(&self) -> &str {
        &self.gateway
    }

    /// Journal mode and `synchronous` of the connection that writes.
    #[cfg(test)]
    pub(super) fn settings(&self) -> (String, i64) {
        let writer = self.writer.lock();
        let ask = |name: &str| writer.connection.pragma_query_value(None, name, |row| row.get(0));
        let mode = ask("journal_mode").expect("SQLite says its mode");
        let synchronous = writer
            .connection
            .pragma_query_value(None, "synchronous", |row| row.get(0))
            .expect("SQLite says how it syncs");
        (mode, synchronous)
    }

    fn read<T>(
        &self,
        read: impl FnOnce(&Connection) -> Result<T, rusqlite::Error>,
    ) -> Result<T, StoreError> {
        let done = match &self.reader {
            Some(reader) => read(&reader.lock()),
            None => read(&self.writer.lock().connection),
        };
        done.map_err(|error| self.failed(&error))
    }

    fn failed(&self, error: &rusqlite::Error) -> StoreError {
        failed(&self.path, error)
    }
}

impl Store for SqliteStore {
    fn commit(&self, puts: &[Put], events: &[NewEvent]) -> Result<Committed, StoreError> {
        let prepared = Prepared::new(puts, events)?;
        if puts.is_empty() && events.is_empty() {
            return Ok(Committed::default());
        }
        let mut writer = self.writer.lock();
        let begun = writer.connection.transaction_with_behavior(TransactionBehavior::Immediate);
        let transaction = begun.map_err(|error| self.failed(&error))?;
        let change = Change { transaction: &transaction, gateway: &self.gateway };
        let committed = change.write(puts, &prepared).map_err(|error| match error {
            WriteError::Refused(refused) => refused,
            WriteError::Database(error) => self.failed(&error),
        })?;
        transaction.commit().map_err(|error| self.failed(&error))?;
        Ok(committed)
    }

    fn document(&self, kind: Kind, name: &str) -> Result<Option<Document>, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached(
                "SELECT name, revision, body, seq FROM documents
                 WHERE kind = ?1 AND name = ?2 AND body IS NOT NULL",
            )?;
            statement.query_row((kind.as_str(), name), |row| document(kind, row)).optional()
        })
    }

    fn documents(&self, kind: Kind) -> Result<Vec<Document>, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached(
                "SELECT name, revision, body, seq FROM documents
                 WHERE kind = ?1 AND body IS NOT NULL ORDER BY name",
            )?;
            statement.query_map((kind.as_str(),), |row| document(kind, row))?.collect()
        })
    }

    fn events(&self, query: &EventQuery) -> Result<Vec<Event>, StoreError> {
        let sql = format!(
            "SELECT seq, at, gateway, actor, action, model, subject, outcome, before, after,
                    reason, request_id, detail, cut
             FROM events WHERE seq > :after AND seq < :before {} {} ORDER BY seq {} LIMIT :limit",
            // Left out, not `OR :model IS NULL`: then the index is of use.
            if query.model.is_some() { "AND model = :model" } else { "AND :model IS NULL" },
            "AND substr(action, 1, length(:action)) = :action",
            if query.newest_first { "DESC" } else { "ASC" },
        );
        self.read(|connection| {
            let mut statement = connection.prepare_cached(&sql)?;
            let rows = statement.query_map(
                named_params! {
                    ":after": bound(query.after.unwrap_or(0)),
                    ":before": bound(query.before.unwrap_or(u64::MAX)),
                    ":model": query.model.as_ref().map(ToString::to_string),
                    ":action": query.action.as_deref().unwrap_or_default(),
                    ":limit": bound(query.limit.min(EVENTS_MAX) as u64),
                },
                event,
            )?;
            rows.collect()
        })
    }

    fn head(&self) -> Result<u64, StoreError> {
        self.read(|connection| {
            let mut statement = connection.prepare_cached("SELECT head FROM feed")?;
            statement.query_row([], |row| number(row, 0))
        })
    }

    fn changed_elsewhere(&self) -> Result<bool, StoreError> {
        let mut writer = self.writer.lock();
        let now = data_version(&writer.connection).map_err(|error| self.failed(&error))?;
        Ok(std::mem::replace(&mut writer.data_version, now) != now)
    }
}

/// One commit under way.
struct Change<'a> {
    transaction: &'a Transaction<'a>,
    gateway: &'a str,
}

enum WriteError {
    Refused(StoreError),
    Database(rusqlite::Error),
}

impl From<rusqlite::Error> for WriteError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error)
    }
}

impl Change<'_> {
    fn write(&self, puts: &[Put], prepared: &Prepared) -> Result<Committed, WriteError> {
        // A commit without an event takes a number as well: whoever follows sees that it moved.
        let numbers = prepared.events.len().max(1) as u64;
        let mut statement =
            self.transaction.prepare_cached("UPDATE feed SET head = head + ?1 RETURNING head")?;
        let head = statement.query_row((bound(numbers),), |row| number(row, 0))?;
        let documents = puts.iter().zip(&prepared.bodies);
        let documents = documents.map(|(put, body)| self.put(put, body.as_deref(), head));
        let documents = documents.collect::<Result<_, _>>()?;
        for kind in puts.iter().map(|put| put.kind).collect::<BTreeSet<_>>() {
            self.check_count(kind)?;
        }
        let at = jiff::Timestamp::now();
        let events = prepared.events.iter().zip(head - numbers + 1..);
        let events = events.map(|(row, seq)| self.append(row, seq, at));
        Ok(Committed { documents, events: events.collect::<Result<_, _>>()? })
    }

    fn put(&self, put: &Put, body: Option<&str>, head: u64) -> Result<Document, WriteError> {
        let Put { kind, name, expect, .. } = put;
        let mut statement = self.transaction.prepare_cached(
            "SELECT revision, body IS NOT NULL FROM documents WHERE kind = ?1 AND name = ?2",
        )?;
        let last: Option<(u64, bool)> = statement
            .query_row((kind.as_str(), name), |row| Ok((number(row, 0)?, row.get(1)?)))
            .optional()?;
        let current = last.and_then(|(revision, live)| live.then_some(revision));
        let as_expected = match expect {
            Expect::Any => true,
            Expect::Absent => current.is_none(),
            Expect::Revision(revision) => current == Some(*revision),
        };
        if !as_expected {
            let (kind, name, expected) = (*kind, name.clone(), *expect);
            return Err(WriteError::Refused(StoreError::Stale { kind, name, expected, current }));
        }
        let before = last.map_or(0, |(revision, _)| revision);
        let document = |revision, seq| Document {
            kind: *kind,
            name: name.clone(),
            revision,
            body: put.body.clone().unwrap_or_default(),
            seq,
        };
        if body.is_none() && current.is_none() {
            // Gone already.
            return Ok(document(before, head));
        }
        let mut statement = self.transaction.prepare_cached(
            "INSERT INTO documents (kind, name, revision, body, seq, gateway)
             VALUES (?1, ?2, ?3, ?4, ?5, ?6)
             ON CONFLICT (kind, name) DO UPDATE SET revision = excluded.revision,
                 body = excluded.body, seq = excluded.seq, gateway = excluded.gateway",
        )?;
        let revision = before + 1;
        statement.execute((
            kind.as_str(),
            name,
            bound(revision),
            body,
            bound(head),
            self.gateway,
        ))?;
        Ok(document(revision, head))
    }

    fn check_count(&self, kind: Kind) -> Result<(), WriteError> {
        let mut statement = self.transaction.prepare_cached(
            "SELECT count(*) FROM documents WHERE kind = ?1 AND body IS NOT NULL",
        )?;
        let there = statement.query_row((kind.as_str(),), |row| number(row, 0))?;
        if there <= DOCUMENTS_MAX as u64 {
            return Ok(());
        }
        Err(WriteError::Refused(StoreError::TooMany { kind }))
    }

    fn append(&self, row: &Row, seq: u64, at: jiff::Timestamp) -> Result<Event, WriteError> {
        let Row { event, before, after, cut } = row;
        let mut statement = self.transaction.prepare_cached(
            "INSERT INTO events (seq, at, gateway, actor, action, model, subject, outcome, before,
                                 after, reason, request_id, detail, cut)
             VALUES (:seq, :at, :gateway, :actor, :action, :model, :subject, :outcome, :before,
                     :after, :reason, :request_id, :detail, :cut)",
        )?;
        statement.execute(named_params! {
            ":seq": bound(seq),
            ":at": at.to_string(),
            ":gateway": self.gateway,
            ":actor": event.actor,
            ":action": event.action,
            ":model": event.model.as_ref().map(ToString::to_string),
            ":subject": event.subject,
            ":outcome": event.outcome.as_str(),
            ":before": before,
            ":after": after,
            ":reason": event.reason,
            ":request_id": event.request_id,
            ":detail": event.detail,
            ":cut": cut,
        })?;
        Ok(row.event(seq, at, self.gateway))
    }
}

fn document(kind: Kind, row: &Record<'_>) -> Result<Document, rusqlite::Error> {
    Ok(Document {
        kind,
        name: row.get(0)?,
        revision: number(row, 1)?,
        body: state(row, 2)?.unwrap_or_default(),
        seq: number(row, 3)?,
    })
}

fn event(row: &Record<'_>) -> Result<Event, rusqlite::Error> {
    let at: String = row.get(1)?;
    let model: Option<String> = row.get(5)?;
    let outcome: String = row.get(7)?;
    Ok(Event {
        seq: number(row, 0)?,
        at: at.parse().map_err(|error| unreadable(1, error))?,
        gateway: row.get(2)?,
        actor: row.get(3)?,
        action: row.get(4)?,
        model: model
            .map(|model| model.parse())
            .transpose()
            .map_err(|error| unreadable(5, error))?,
        subject: row.get(6)?,
        outcome: match outcome.as_str() {
            "done" => EventOutcome::Done,
            _ => EventOutcome::Refused,
        },
        before: state(row, 8)?,
        after: state(row, 9)?,
        reason: row.get(10)?,
        request_id: row.get(11)?,
        detail: row.get(12)?,
        cut: row.get(13)?,
    })
}

/// A column of JSON.
fn state(row: &Record<'_>, column: usize) -> Result<Option<Value>, rusqlite::Error> {
    let text: Option<String> = row.get(column)?;
    text.map(|text| serde_json::from_str(&text))
        .transpose()
        .map_err(|error| unreadable(column, error))
}

fn number(row: &Record<'_>, column: usize) -> Result<u64, rusqlite::Error> {
    let number: i64 = row.get(column)?;
    u64::try_from(number).map_err(|error| unreadable(column, error))
}

/// SQLite's numbers have a sign; no counter gets that far.
fn bound(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn unreadable(
    column: usize,
    error: impl std::error::Error + Send + Sync + 'static,
) -> rusqlite::Error {
    let text = rusqlite::types::Type::Text;
    rusqlite::Error::FromSqlConversionFailure(column, text, Box::new(error))
}

fn failed(path: &str, error: &rusqlite::Error) -> StoreError {
    let broken = |detail: String| StoreError::Broken { path: path.to_owned(), detail };
    match error.sqlite_error_code() {
        Some(ErrorCode::NotADatabase) => broken("it is not a SQLite database".to_owned()),
        Some(ErrorCode::DatabaseCorrupt) => broken(format!("it is damaged ({error})")),
        Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => StoreError::Busy(BUSY_MAX),
        _ => StoreError::Database(error.to_string()),
    }
}

/// Makes the file if there is none, for this user alone; gives its size.
fn own_file(path: &Path) -> io::Result<u64> {
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file: File = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(i32::try_from(flags.bits()).unwrap_or_default())
        .open(path)?;
    let about = file.metadata()?;
    if !about.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    if about.len() == 0
        && let Some(folder) = path.parent()
    {
        // So that the name is there after a loss of power.
        File::open(folder)?.sync_all()?;
    }
    Ok(about.len())
}

fn connect(path: &Path) -> Result<Connection, rusqlite::Error> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
        | OpenFlags::SQLITE_OPEN_NO_MUTEX
        | OpenFlags::SQLITE_OPEN_EXRESCODE;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(BUSY_MAX)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_DEFENSIVE, true)?;
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_TRUSTED_SCHEMA, false)?;
    // Of the connection, not of the file: nothing is written yet.
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "cell_size_check", true)?;
    Ok(connection)
}

/// Reads the whole file and refuses a damaged one.
fn check(connection: &Connection, path: &str) -> Result<(), StoreError> {
    let mut found: Option<String> = None;
    let looked = connection.pragma(None, "quick_check", 1, |row| {
        found = Some(row.get(0)?);
        Ok(())
    });
    looked.map_err(|error| failed(path, &error))?;
    match found {
        Some(found) if found != "ok" => {
            let detail = format!("it is damaged ({})", found.lines().next().unwrap_or_default());
            Err(StoreError::Broken { path: path.to_owned(), detail })
        }
        _ => Ok(()),
    }
}

/// Schema version that this program writes.
fn known() -> i64 {
    i64::try_from(MIGRATIONS.len()).unwrap_or(i64::MAX)
}

/// Schema version of the file; 0 for an empty one.
fn version(connection: &Connection, path: &str) -> Result<i64, StoreError> {
    let read = |name: &str| connection.pragma_query_value(None, name, |row| row.get(0));
    let tables = || {
        connection.query_row("SELECT count(*) FROM sqlite_schema", [], |row| row.get::<_, i64>(0))
    };
    let all = read("application_id")
        .and_then(|id: i64| Ok((id, read("user_version")?, tables()?)))
        .map_err(|error| failed(path, &error))?;
    let known = known();
    match all {
        (0, 0, 0) => Ok(0),
        (APPLICATION_ID, found, _) if found > known => {
            Err(StoreError::TooNew { path: path.to_owned(), found, known })
        }
        (APPLICATION_ID, found, _) if found > 0 => Ok(found),
        _ => {
            let detail = "it is the database of another program".to_owned();
            Err(StoreError::Broken { path: path.to_owned(), detail })
        }
    }
}

/// Brings the file to the schema of this version.
fn migrate(connection: &mut Connection, path: &str) -> Result<(), StoreError> {
    if version(connection, path)? == known() {
        return Ok(());
    }
    let fails = |error: rusqlite::Error| failed(path, &error);
    let begun = connection.transaction_with_behavior(TransactionBehavior::Immediate);
    let transaction = begun.map_err(fails)?;
    // Read again inside: another process may be doing the same.
    let at = usize::try_from(version(&transaction, path)?).unwrap_or_default();
    for (step, sql) in MIGRATIONS.iter().enumerate().skip(at) {
        let done = transaction
            .execute_batch(sql)
            .and_then(|()| transaction.pragma_update(None, "application_id", APPLICATION_ID))
            .and_then(|()| {
                let version = i64::try_from(step + 1).unwrap_or(i64::MAX);
                transaction.pragma_update(None, "user_version", version)
            });
        done.map_err(fails)?;
    }
    transaction.commit().map_err(fails)
}

/// Turns the write-ahead log on, which the file remembers.
fn keep_log(connection: &Connection) -> Result<(), rusqlite::Error> {
    let started = Instant::now();
    loop {
        let set = connection
            .pragma_update_and_check(None, "journal_mode", "WAL", |row| row.get::<_, String>(0));
        match set {
            // SQLite does not wait by itself where two open a new file at once.
            Err(error)
                if error.sqlite_error_code() == Some(ErrorCode::DatabaseBusy)
                    && started.elapsed() < BUSY_MAX =>
            {
                std::thread::sleep(BUSY_POLL);
            }
            set => {
                set?;
                break;
            }
        }
    }
    connection.pragma_update_and_check(None, "journal_size_limit", LOG_KEPT_BYTES, |_| Ok(()))
}

fn data_version(connection: &Connection) -> Result<i64, rusqlite::Error> {
    connection.pragma_query_value(None, "data_version", |row| row.get(0))
}
