//! API keys in the state: made, listed, revoked, and followed by the gateway that runs.
//!
//! ```text
//! keys create / revoke (any process) ──commit──▶ store ──head moved?──▶ watch_keys ─▶ Gatekeeper
//! ```
//!
//! Invariants:
//! - A change of keys and its row in the journal are one commit; a refused one has a row as well.
//! - No token and no hash of one is in the journal.
//! - A revoked key is refused within [`WATCH_EVERY`] and the time of one read, whichever process
//!   revoked it. Keys that cannot be read leave those in force that are.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;
use tokio::time::{MissedTickBehavior, interval};

use super::store::{Document, EventOutcome, Expect, Kind, NewEvent, Put, Store, StoreError};
use crate::admit::keys::{self, GrantRecord, KeyNameError, KeyState};
use crate::admit::{Gatekeeper, KeyRecord, KeySet, ModelPatterns, PatternError, Token, TokenError};

/// Records kept, ended ones included. At the limit a new key takes the place of the one that ended
/// longest ago; the journal goes on telling of it.
pub const KEYS_MAX: usize = 10_000;
/// How often the store is asked whether keys have changed.
pub const WATCH_EVERY: Duration = Duration::from_secs(1);
/// Tries to change a key that others change as well.
const TRIES: usize = 8;

/// A key to be made.
#[derive(Clone, Debug)]
pub struct NewKey {
    pub name: String,
    pub grants: Vec<GrantRecord>,
    pub expires_at: Option<Timestamp>,
}

/// Who changes keys, and why; for the journal.
#[derive(Clone, Debug, Default)]
pub struct By {
    pub actor: String,
    pub reason: Option<String>,
    pub request_id: Option<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error(transparent)]
    Name(#[from] KeyNameError),
    #[error(transparent)]
    Pattern(#[from] PatternError),
    #[error("a key is expected to have a role")]
    NoRole,
    #[error("the key would have expired already, at {0}")]
    Past(Timestamp),
    #[error("there are {KEYS_MAX} keys and all of them hold; revoke some first")]
    TooMany,
    #[error("there is no key '{0}'")]
    Unknown(String),
    #[error("key '{0}' cannot be read")]
    Unreadable(String),
    #[error(transparent)]
    Token(#[from] TokenError),
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// The keys as they can be looked up.
///
/// # Errors
/// When the store cannot be read. A record that is none is left out, and the log says so.
pub fn key_set(store: &dyn Store) -> Result<KeySet, StoreError> {
    let documents = store.documents(Kind::Key)?;
    let records = documents.iter().map(|found| (found.name.as_str(), found.body.clone()));
    let (keys, wrong) = KeySet::from_records(records);
    for (id, error) in wrong {
        tracing::error!(id, %error, "a key cannot be read and is not accepted");
    }
    Ok(keys)
}

/// Every key that can be read, the newest first.
///
/// # Errors
/// When the store cannot be read.
pub fn list(store: &dyn Store) -> Result<Vec<KeyRecord>, StoreError> {
    let documents = store.documents(Kind::Key)?;
    let mut records: Vec<KeyRecord> =
        documents.into_iter().filter_map(|found| record(found).ok()).collect();
    records.sort_by(|a, b| (b.created_at, &b.id).cmp(&(a.created_at, &a.id)));
    Ok(records)
}

/// Makes a key; its token is in the answer and nowhere else.
///
/// # Errors
/// When what is asked for is wrong, or the store cannot be written.
pub fn create(store: &dyn Store, asked: &NewKey, by: &By) -> Result<(KeyRecord, Token), KeyError> {
    let now = Timestamp::now();
    let token = Token::generate()?;
    match checked(asked, now).and_then(|()| add(store, asked, by, &token, now)) {
        Ok(record) => Ok((record, token)),
        Err(error) => Err(refused(store, by, "keys.create", &asked.name, error)),
    }
}

fn checked(asked: &NewKey, now: Timestamp) -> Result<(), KeyError> {
    keys::check_name(&asked.name)?;
    if asked.grants.is_empty() {
        return Err(KeyError::NoRole);
    }
    for grant in &asked.grants {
        ModelPatterns::parse(&grant.models)?;
    }
    match asked.expires_at {
        Some(end) if end <= now => Err(KeyError::Past(end)),
        _ => Ok(()),
    }
}

/// Puts the key of this token into the store.
pub(super) fn add(
    store: &dyn Store,
    asked: &NewKey,
    by: &By,
    token: &Token,
    now: Timestamp,
) -> Result<KeyRecord, KeyError> {
    let record = KeyRecord {
        id: token.id().to_owned(),
        name: asked.name.clone(),
        grants: asked.grants.clone(),
        digest: token.digest().to_string(),
        created_at: now,
        created_by: by.actor.clone(),
        expires_at: asked.expires_at,
        revoked_at: None,
        revoked_by: None,
    };
    let body =
        serde_json::to_value(&record).map_err(|_| KeyError::Unreadable(record.id.clone()))?;
    let mut puts = vec![put(&record.id, Some(body), Expect::Absent)];
    let mut events = vec![done(by, "keys.create", &record.id, None, Some(record.public()))];
    if let Some((gone, revision)) = superfluous(store, now)? {
        puts.push(put(&gone.id, None, Expect::Revision(revision)));
        events.push(done(by, "keys.forget", &gone.id, Some(gone.public()), None));
    }
    store.commit(&puts, &events)?;
    Ok(record)
}

/// The key to be forgotten so that another fits, if one has to be.
fn superfluous(store: &dyn Store, now: Timestamp) -> Result<Option<(KeyRecord, u64)>, KeyError> {
    let documents = store.documents(Kind::Key)?;
    if documents.len() < KEYS_MAX {
        return Ok(None);
    }
    let ended = documents.into_iter().filter_map(|found| {
        let revision = found.revision;
        record(found).ok().map(|record| (record, revision))
    });
    let ended = ended.filter(|(record, _)| record.state(now) != KeyState::Live);
    let longest = ended.min_by_key(|(record, _)| record.revoked_at.or(record.expires_at));
    longest.map(Some).ok_or(KeyError::TooMany)
}

/// Ends a key; one that has ended already stays as it is.
///
/// # Errors
/// When there is no such key, or the store cannot be written.
pub fn revoke(store: &dyn Store, id: &str, by: &By) -> Result<KeyRecord, KeyError> {
    let id = keys::id_of(id);
    for _ in 0..TRIES {
        match end(store, id, by) {
            // Somebody was quicker; look again.
            Err(KeyError::Store(StoreError::Stale { .. })) => {}
            Err(error) => return Err(refused(store, by, "keys.revoke", id, error)),
            done => return done,
        }
    }
    end(store, id, by)
}

fn end(store: &dyn Store, id: &str, by: &By) -> Result<KeyRecord, KeyError> {
    let unknown = || KeyError::Unknown(id.chars().take(64).collect());
    let found = store.document(Kind::Key, id)?.ok_or_else(unknown)?;
    let revision = found.revision;
    let before = record(found)?;
    if before.revoked_at.is_some() {
        return Ok(before);
    }
    let mut after = before.clone();
    after.revoked_at = Some(Timestamp::now());
    after.revoked_by = Some(by.actor.clone());
    let body = serde_json::to_value(&after).map_err(|_| KeyError::Unreadable(id.to_owned()))?;
    let event = done(by, "keys.revoke", id, Some(before.public()), Some(after.public()));
    store.commit(&[put(id, Some(body), Expect::Revision(revision))], &[event])?;
    Ok(after)
}

fn record(found: Document) -> Result<KeyRecord, KeyError> {
    serde_json::from_value(found.body).map_err(|_| KeyError::Unreadable(found.name))
}

fn put(id: &str, body: Option<Value>, expect: Expect) -> Put {
    Put { kind: Kind::Key, name: id.to_owned(), body, expect }
}

fn done(by: &By, action: &str, id: &str, before: Option<Value>, after: Option<Value>) -> NewEvent {
    let By { actor, reason, request_id } = by.clone();
    let (action, subject) = (action.to_owned(), id.to_owned());
    NewEvent { actor, reason, request_id, action, subject, before, after, ..NewEvent::default() }
}

/// Journals that it was not done, and why; the error is the answer either way.
fn refused(store: &dyn Store, by: &By, action: &str, subject: &str, error: KeyError) -> KeyError {
    let event = NewEvent {
        outcome: EventOutcome::Refused,
        detail: Some(error.to_string()),
        ..done(by, action, subject, None, None)
    };
    if let Err(unwritten) = store.commit(&[], &[event]) {
        tracing::error!(action, %error, %unwritten, "a refused change of keys is not in the journal");
    }
    error
}

/// Keeps the gatekeeper's keys those of the store, for as long as the process runs.
///
/// Compares the store's cursor, not [`Store::changed_elsewhere`]: that answer is given once, and
/// others wait for it too.
pub async fn watch_keys(store: Arc<dyn Store>, gatekeeper: Arc<Gatekeeper>) {
    let mut every = interval(WATCH_EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut watched = Watched::default();
    loop {
        every.tick().await;
        let store = Arc::clone(&store);
        let seen = watched.seen;
        // The disk may be slow; this thread has others to serve.
        let looked = tokio::task::spawn_blocking(move || look(&*store, seen)).await;
        let looked = looked.unwrap_or_else(|lost| Err(StoreError::Database(lost.to_string())));
        watched.apply(looked, &gatekeeper);
    }
}

/// What the watch remembers between two looks.
#[derive(Default)]
struct Watched {
    /// Cursor of the keys in force.
    seen: Option<u64>,
    /// The last look failed, which was said.
    failing: bool,
}

impl Watched {
    fn apply(&mut self, looked: Result<Option<(u64, KeySet)>, StoreError>, keeper: &Gatekeeper) {
        match looked {
            Ok(found) => {
                if std::mem::take(&mut self.failing) {
                    tracing::info!("keys can be read again");
                }
                if let Some((head, keys)) = found {
                    self.seen = Some(head);
                    keeper.replace(keys);
                }
            }
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    tracing::error!(%error, "keys cannot be read, those read last stay in force");
                }
            }
        }
    }
}

/// The keys, unless nothing has changed since `seen`.
fn look(store: &dyn Store, seen: Option<u64>) -> Result<Option<(u64, KeySet)>, StoreError> {
    // Read before the keys: a change in between is found by the next look.
    let head = store.head()?;
    if seen == Some(head) {
        return Ok(None);
    }
    Ok(Some((head, key_set(store)?)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admit::{AdmitError, Role};
    use crate::control::store::{EventQuery, SqliteStore};

    fn by() -> By {
        By { actor: "cli:test".to_owned(), ..By::default() }
    }

    fn asked(role: Role) -> NewKey {
        let grants = vec![GrantRecord { role, models: Vec::new() }];
        NewKey { name: "ci".to_owned(), grants, expires_at: None }
    }

    fn who(keeper: &Gatekeeper, token: &Token) -> Result<String, AdmitError> {
        let value = format!("Bearer {}", token.text().expose());
        keeper.identify(Some(&value)).map(|principal| principal.name.to_string())
    }

    fn journal(store: &dyn Store) -> Vec<(String, EventOutcome)> {
        let events = store.events(&EventQuery::default()).unwrap();
        events.into_iter().map(|event| (event.action, event.outcome)).collect()
    }

    #[test]
    fn a_key_is_made_used_and_revoked() {
        let store = SqliteStore::in_memory().unwrap();
        let (made, token) = create(&store, &asked(Role::Viewer), &by()).unwrap();
        let keeper = Gatekeeper::new(key_set(&store).unwrap());
        assert_eq!(who(&keeper, &token), Ok("ci".to_owned()));
        assert_eq!(list(&store).unwrap(), std::slice::from_ref(&made));
        let revoked = revoke(&store, &made.shown(), &by()).unwrap();
        assert!(revoked.revoked_at.is_some());
        assert_eq!(revoke(&store, &made.id, &by()).unwrap(), revoked, "once is enough");
        keeper.replace(key_set(&store).unwrap());
        assert_eq!(who(&keeper, &token), Err(AdmitError::Revoked));
        let done = |action: &str| (action.to_owned(), EventOutcome::Done);
        assert_eq!(journal(&store), [done("keys.create"), done("keys.revoke")]);
        let events = store.events(&EventQuery::default()).unwrap();
        let told = serde_json::to_string(&events).unwrap();
        assert!(!told.contains(&token.text().expose()[20..]) && !told.contains(&made.digest));
        assert!(told.contains("cli:test"));
    }

    #[test]
    fn what_is_refused_is_journalled() {
        let store = SqliteStore::in_memory().unwrap();
        let past = Some(Timestamp::UNIX_EPOCH);
        let with = |change: &dyn Fn(&mut NewKey)| {
            let mut asked = asked(Role::Viewer);
            change(&mut asked);
            create(&store, &asked, &by()).unwrap_err()
        };
        assert!(matches!(with(&|key| key.name.clear()), KeyError::Name(_)));
        assert!(matches!(with(&|key| key.grants.clear()), KeyError::NoRole));
        assert!(matches!(with(&|key| key.expires_at = past), KeyError::Past(_)));
        let pattern = with(&|key| key.grants[0].models.push("[".to_owned()));
        assert!(matches!(pattern, KeyError::Pattern(_)));
        let unknown = revoke(&store, "0123456789abcdef", &by()).unwrap_err();
        assert_eq!(unknown.to_string(), "there is no key '0123456789abcdef'");
        assert!(list(&store).unwrap().is_empty());
        let journal = journal(&store);
        assert_eq!(journal.len(), 5);
        assert!(journal.iter().all(|(_, outcome)| *outcome == EventOutcome::Refused));
    }

    #[test]
    fn at_the_limit_the_longest_ended_makes_room() {
        let store = SqliteStore::in_memory().unwrap();
        let (first, _) = create(&store, &asked(Role::Viewer), &by()).unwrap();
        let (second, _) = create(&store, &asked(Role::Viewer), &by()).unwrap();
        let body = serde_json::to_value(&first).unwrap();
        let fill: Vec<Put> = (2..KEYS_MAX)
            .map(|at| {
                let mut body = body.clone();
                body["id"] = format!("{at:016x}").into();
                put(&format!("{at:016x}"), Some(body), Expect::Absent)
            })
            .collect();
        for part in fill.chunks(1000) {
            store.commit(part, &[]).unwrap();
        }
        assert!(matches!(create(&store, &asked(Role::Viewer), &by()), Err(KeyError::TooMany)));
        revoke(&store, &second.id, &by()).unwrap();
        revoke(&store, &first.id, &by()).unwrap();
        create(&store, &asked(Role::Viewer), &by()).unwrap();
        let there = list(&store).unwrap();
        assert_eq!(there.len(), KEYS_MAX);
        assert!(there.iter().any(|key| key.id == first.id));
        assert!(!there.iter().any(|key| key.id == second.id), "it ended first");
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_by_another_process_holds_within_two_looks() {
        let folder = tempfile::tempdir().unwrap();
        let ours: Arc<dyn Store> = Arc::new(SqliteStore::open(folder.path()).unwrap());
        let theirs = SqliteStore::open(folder.path()).unwrap();
        let keeper = Arc::new(Gatekeeper::default());
        let watching = tokio::spawn(watch_keys(Arc::clone(&ours), Arc::clone(&keeper)));
        let until = async |token: &Token, expected: Result<String, AdmitError>| {
            for _ in 0..5 {
                tokio::time::sleep(WATCH_EVERY).await;
                if who(&keeper, token) == expected {
                    return;
                }
            }
            panic!("expected {expected:?}, got {:?}", who(&keeper, token));
        };
        let (key, token) = create(&theirs, &asked(Role::Viewer), &by()).unwrap();
        until(&token, Ok("ci".to_owned())).await;
        revoke(&theirs, &key.id, &by()).unwrap();
        until(&token, Err(AdmitError::Revoked)).await;
        // One's own changes are seen as well.
        let (_, token) = create(&*ours, &asked(Role::Viewer), &by()).unwrap();
        until(&token, Ok("ci".to_owned())).await;
        watching.abort();
    }

    #[test]
    fn keys_that_cannot_be_read_leave_those_in_force() {
        let store = SqliteStore::in_memory().unwrap();
        let (_, token) = create(&store, &asked(Role::Viewer), &by()).unwrap();
        let keeper = Gatekeeper::default();
        let mut watched = Watched::default();
        watched.apply(look(&store, None), &keeper);
        let seen = watched.seen;
        watched.apply(Err(StoreError::Database("gone".to_owned())), &keeper);
        assert!(who(&keeper, &token).is_ok() && watched.failing && watched.seen == seen);
        watched.apply(look(&store, seen), &keeper);
        assert!(!watched.failing);
        assert!(look(&store, seen).unwrap().is_none(), "nothing has changed");
    }
}
