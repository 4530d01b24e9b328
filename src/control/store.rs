//! What the gateway keeps: documents with revisions, and the journal of how they came to be.
//!
//! ```text
//! commit(puts, events) ──one transaction──┬─▶ documents  (kind, name) ▶ revision, body
//!                                         ├─▶ events     seq ▶ who, what, before, after, why
//!                                         └─▶ head       the counter that numbers both
//! who follows:  head() moved? ──▶ documents(kind) · events(after: cursor)
//! ```
//!
//! Made for many gateways on one store, of which SQLite's file is the smallest case: every row says
//! which gateway wrote it, and one counter in one row numbers all changes. Taking a number locks
//! that row until the commit, so that numbers become visible in their order, in PostgreSQL as well:
//! a cursor misses nothing.
//!
//! Invariants:
//! - A commit happens whole or not at all, and has reached the disk when it returns.
//! - What has a number up to [`Store::head`] is visible to whoever asks.
//! - A revision of a name is never used twice, not even after the document was deleted, so that an
//!   `ETag` has one meaning for ever.
//! - Events are never changed and never removed: the journal grows without bound (a hundred thousand
//!   changes take some 40 MB). Its texts have limits; what is longer is cut, and says so.

use std::collections::HashSet;
use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use utoipa::ToSchema;

use crate::domain::{Digest, ModelName};

mod sqlite;
#[cfg(test)]
mod tests;

pub use sqlite::{SqliteStore, state_file};

/// Largest document, as JSON.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// Documents of one kind that exist at once.
pub const DOCUMENTS_MAX: usize = 65_536;
/// Longest name of a document.
pub const NAME_BYTES_MAX: usize = 512;
/// Puts, and events, of one commit.
pub const COMMIT_ITEMS_MAX: usize = 1024;
/// Events that one query gives.
pub const EVENTS_MAX: usize = 1000;
/// Texts of an event; longer ones are cut.
const ACTOR_BYTES_MAX: usize = 256;
const ACTION_BYTES_MAX: usize = 64;
const SUBJECT_BYTES_MAX: usize = 512;
const REQUEST_ID_BYTES_MAX: usize = 128;
const TEXT_BYTES_MAX: usize = 4096;
/// `before` and `after` of an event, as JSON; a larger one is replaced by its size and hash.
const STATE_BYTES_MAX: usize = 64 << 10;

/// What a document is about. Closed: a new kind is one more line here.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// A model's traffic table.
    Traffic,
    /// A model's labels.
    Labels,
    /// A version: what is known of it, and its release record.
    Version,
    Rollout,
    Approval,
    /// An API key, hashed.
    Key,
    /// A model's alerts, and who was told of them.
    Alert,
}

impl Kind {
    pub const ALL: [Self; 7] = [
        Self::Traffic,
        Self::Labels,
        Self::Version,
        Self::Rollout,
        Self::Approval,
        Self::Key,
        Self::Alert,
    ];

    /// The word in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Traffic => "traffic",
            Self::Labels => "labels",
            Self::Version => "version",
            Self::Rollout => "rollout",
            Self::Approval => "approval",
            Self::Key => "key",
            Self::Alert => "alert",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    pub kind: Kind,
    pub name: String,
    /// Grows by one with every change of this name.
    pub revision: u64,
    /// `null` when the document was deleted, which only a commit's own answer shows.
    pub body: Value,
    /// Number of the commit that wrote it.
    pub seq: u64,
}

/// What has to be there for a put to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expect {
    Any,
    Absent,
    Revision(u64),
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("anything"),
            Self::Absent => f.write_str("nothing"),
            Self::Revision(revision) => write!(f, "revision {revision}"),
        }
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Put {
    pub kind: Kind,
    pub name: String,
    /// `None` deletes.
    pub body: Option<Value>,
    pub expect: Expect,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum EventOutcome {
    #[default]
    Done,
    /// Somebody was not allowed to, or it could not be done.
    Refused,
}

impl EventOutcome {
    fn as_str(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Refused => "refused",
        }
    }
}

/// A row of the journal to be written.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NewEvent {
    pub actor: String,
    /// `traffic.put`, `rollout.start`: what was to be done, the most general word first.
    pub action: String,
    pub model: Option<ModelName>,
    /// What it was done to.
    pub subject: String,
    pub outcome: EventOutcome,
    pub before: Option<Value>,
    pub after: Option<Value>,
    pub reason: Option<String>,
    pub request_id: Option<String>,
    /// Why it was refused, or what else there is to say.
    pub detail: Option<String>,
}

/// A row of the journal.
#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Event {
    /// Grows from row to row; not every number is a row of the journal.
    pub seq: u64,
    /// By the clock of the gateway that wrote it; `seq` tells the order.
    #[schema(value_type = String, format = DateTime)]
    pub at: jiff::Timestamp,
    /// Id of the gateway that wrote it.
    pub gateway: String,
    pub actor: String,
    pub action: String,
    #[schema(value_type = Option<String>)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelName>,
    pub subject: String,
    pub outcome: EventOutcome,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub before: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after: Option<Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub request_id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Something was longer than a row may hold and was cut.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub cut: bool,
}

/// Which events to give.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventQuery {
    /// Those after this number; a cursor.
    pub after: Option<u64>,
    /// Those before this number.
    pub before: Option<u64>,
    pub model: Option<ModelName>,
    /// Start of the action: `rollout.`.
    pub action: Option<String>,
    /// The newest first, for people; otherwise the oldest first, for who follows.
    pub newest_first: bool,
    /// At most [`EVENTS_MAX`].
    pub limit: usize,
}

impl Default for EventQuery {
    fn default() -> Self {
        Self {
            after: None,
            before: None,
            model: None,
            action: None,
            newest_first: false,
            limit: EVENTS_MAX,
        }
    }
}

/// What a commit made.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Committed {
    /// One for each put, in their order.
    pub documents: Vec<Document>,
    pub events: Vec<Event>,
}

/// Every call may wait for the disk: make them where waiting is allowed, never on a thread that
/// serves requests.
pub trait Store: Send + Sync {
    /// One transaction: checks every `expect`, writes, appends the events; durable when it returns.
    ///
    /// # Errors
    /// [`StoreError::Stale`] when something else is there than was expected; nothing is written
    /// then, nor on any other error.
    fn commit(&self, puts: &[Put], events: &[NewEvent]) -> Result<Committed, StoreError>;

    /// # Errors
    /// When the store cannot be read.
    fn document(&self, kind: Kind, name: &str) -> Result<Option<Document>, StoreError>;

    /// By name.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn documents(&self, kind: Kind) -> Result<Vec<Document>, StoreError>;

    /// # Errors
    /// When the store cannot be read.
    fn events(&self, query: &EventQuery) -> Result<Vec<Event>, StoreError>;

    /// Number of the last change: the cursor of who follows.
    ///
    /// # Errors
    /// When the store cannot be read.
    fn head(&self) -> Result<u64, StoreError>;

    /// Whether another process wrote since the last call; the first call tells of what came since
    /// the store was opened. For one follower: each answer is given once. Others keep a cursor and
    /// compare it with [`Store::head`].
    ///
    /// # Errors
    /// When the store cannot be read.
    fn changed_elsewhere(&self) -> Result<bool, StoreError>;
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{kind} '{name}' was expected to be {expected}, and is {}", Current(*.current))]
    Stale { kind: Kind, name: String, expected: Expect, current: Option<u64> },
    #[error("{0}")]
    Invalid(String),
    #[error("{kind} '{name}' has {size} bytes, the limit is {BODY_BYTES_MAX}")]
    TooLarge { kind: Kind, name: String, size: usize },
    #[error("there are {DOCUMENTS_MAX} documents of kind {kind} already, no more fit")]
    TooMany { kind: Kind },
    #[error("'{path}' cannot be used: {source}")]
    File { path: String, source: std::io::Error },
    #[error(
        "'{path}' is no state of a gateway: {detail}; put back a copy of it, or move it away to \
         start with none"
    )]
    Broken { path: String, detail: String },
    #[error(
        "'{path}' was written by a later version of this program (schema {found}, this one knows \
         {known}): use that version, or put back a copy made before"
    )]
    TooNew { path: String, found: i64, known: i64 },
    #[error("the state is locked by another process, gave up after {0:?}")]
    Busy(std::time::Duration),
    #[error("the state could not be read or written: {0}")]
    Database(String),
}

/// For messages.
struct Current(Option<u64>);

impl fmt::Display for Current {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(revision) => write!(f, "at revision {revision}"),
            None => f.write_str("not there"),
        }
    }
}

/// A commit that could be written: its names are right and everything is as long as it may be.
struct Prepared {
    /// Each put's body as JSON.
    bodies: Vec<Option<String>>,
    events: Vec<Row>,
}

/// An event within the limits, with its JSON.
struct Row {
    event: NewEvent,
    before: Option<String>,
    after: Option<String>,
    cut: bool,
}

impl Prepared {
    fn new(puts: &[Put], events: &[NewEvent]) -> Result<Self, StoreError> {
        if puts.len().max(events.len()) > COMMIT_ITEMS_MAX {
            return Err(StoreError::Invalid(format!(
                "a commit has {} puts and {} events, the limit is {COMMIT_ITEMS_MAX} each",
                puts.len(),
                events.len()
            )));
        }
        let mut names = HashSet::new();
        let bodies = puts.iter().map(|put| {
            if !names.insert((put.kind, &put.name)) {
                let message = format!("{} '{}' is written twice in one commit", put.kind, put.name);
                return Err(StoreError::Invalid(message));
            }
            body(put)
        });
        let bodies = bodies.collect::<Result<_, _>>()?;
        Ok(Self { bodies, events: events.iter().cloned().map(Row::new).collect() })
    }
}

fn body(put: &Put) -> Result<Option<String>, StoreError> {
    let Put { kind, name, body, .. } = put;
    if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(char::is_control) {
        return Err(StoreError::Invalid(format!(
            "a name of kind {kind} is expected to have 1 to {NAME_BYTES_MAX} bytes and no control \
             characters"
        )));
    }
    let Some(body) = body else { return Ok(None) };
    if body.is_null() {
        let message = format!("{kind} '{name}' cannot be null, leave the body out to delete it");
        return Err(StoreError::Invalid(message));
    }
    let text = body.to_string();
    if text.len() > BODY_BYTES_MAX {
        return Err(StoreError::TooLarge { kind: *kind, name: name.clone(), size: text.len() });
    }
    Ok(Some(text))
}

impl Row {
    fn new(mut event: NewEvent) -> Self {
        let mut any = false;
        let mut text = |text: &mut String, max: usize| any |= cut(text, max);
        text(&mut event.actor, ACTOR_BYTES_MAX);
        text(&mut event.action, ACTION_BYTES_MAX);
        text(&mut event.subject, SUBJECT_BYTES_MAX);
        for (optional, max) in [
            (&mut event.reason, TEXT_BYTES_MAX),
            (&mut event.detail, TEXT_BYTES_MAX),
            (&mut event.request_id, REQUEST_ID_BYTES_MAX),
        ] {
            if let Some(optional) = optional {
                text(optional, max);
            }
        }
        let mut state = |state: &mut Option<Value>| {
            let json = state.as_ref()?.to_string();
            if json.len() <= STATE_BYTES_MAX {
                return Some(json);
            }
            any = true;
            let digest = Digest::new(Sha256::digest(json.as_bytes()).into());
            let instead = json!({"cut": {"bytes": json.len(), "digest": digest.to_string()}});
            let json = instead.to_string();
            *state = Some(instead);
            Some(json)
        };
        let (before, after) = (state(&mut event.before), state(&mut event.after));
        Self { event, before, after, cut: any }
    }

    fn event(&self, seq: u64, at: jiff::Timestamp, gateway: &str) -> Event {
        let event = self.event.clone();
        Event {
            seq,
            at,
            gateway: gateway.to_owned(),
            actor: event.actor,
            action: event.action,
            model: event.model,
            subject: event.subject,
            outcome: event.outcome,
            before: event.before,
            after: event.after,
            reason: event.reason,
            request_id: event.request_id,
            detail: event.detail,
            cut: self.cut,
        }
    }
}

/// Shortens a text to whole characters within `max` bytes; whether it had to.
fn cut(text: &mut String, max: usize) -> bool {
    let long = text.len() > max;
    text.truncate(text.floor_char_boundary(max));
    long
}
