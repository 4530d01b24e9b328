//! Copies the journal into the ledger's log `admin`, where nobody can change it unseen.
//!
//! ```text
//! commit ─▶ store: events ──after the cursor──▶ AdminLog (a thread) ──append, synced──▶ log `admin`
//!                               ▲                                                            │
//!                               └──────── the last event that is there, at the start ◀───────┘
//! ```
//!
//! Invariants:
//! - Every event is in the log once, done and refused ones alike, in the order of their numbers:
//!   where to go on is read from the log itself, never from a file beside it.
//! - Nobody waits for it: the store has the event on the disk before its call is answered.

use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::Deserialize;
use tokio::runtime::Handle;

use super::store::{Event, EventOutcome, EventQuery, Store, StoreError};
use crate::ledger::log::{Appended, Unrecorded};
use crate::ledger::reader::{self, ReadError, SegmentReader};
use crate::ledger::record::{Head, Kind, Payload, Record};
use crate::ledger::{ADMIN, Ledger};
use crate::panics;

/// How often the store is asked for more.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Events taken at once: they are synced together.
const EVENTS_AT_ONCE: usize = 256;

#[derive(Debug, thiserror::Error)]
enum CopyError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Unrecorded(#[from] Unrecorded),
}

/// The thread that copies.
pub struct AdminLog {
    stop: SyncSender<()>,
    thread: JoinHandle<()>,
}

impl AdminLog {
    /// Starts copying; to be called inside a runtime.
    ///
    /// # Errors
    /// When there is no thread to be had.
    pub fn start(store: Arc<dyn Store>, ledger: Arc<Ledger>) -> std::io::Result<Self> {
        let (stop, stopped) = sync_channel(0);
        let mut copy =
            Copy { store, ledger, runtime: Handle::current(), next: None, failing: false };
        let run = move || loop {
            let asked = stopped.recv_timeout(LOOK_EVERY);
            // Once more at the end: the end itself is an event.
            copy.look();
            if !matches!(asked, Err(RecvTimeoutError::Timeout)) {
                return;
            }
        };
        let thread = std::thread::Builder::new()
            .name("admin log".to_owned())
            .spawn(move || panics::fatal("admin log", run))?;
        Ok(Self { stop, thread })
    }

    /// Copies what there is, and ends. Waits for the disk.
    pub fn stop(self) {
        drop(self.stop);
        if self.thread.join().is_err() {
            tracing::error!("the journal's copy ended badly");
        }
    }
}

struct Copy {
    store: Arc<dyn Store>,
    ledger: Arc<Ledger>,
    runtime: Handle,
    /// The last event in the log; `None`: the log has to be read for it.
    next: Option<Cursor>,
    failing: bool,
}

#[derive(Clone, Copy)]
struct Cursor {
    /// Of the last event that was copied.
    event: u64,
    /// Of the store, when there was nothing more.
    head: u64,
}

impl Copy {
    fn look(&mut self) {
        match self.copy() {
            Ok(()) if self.failing => {
                tracing::info!("the journal is copied into the ledger again");
                self.failing = false;
            }
            Ok(()) => {}
            Err(error) => {
                // What was on its way may be there or not: the log will tell.
                self.next = None;
                if !self.failing {
                    tracing::error!(%error, "the journal is not copied into the ledger");
                }
                self.failing = true;
            }
        }
    }

    fn copy(&mut self) -> Result<(), CopyError> {
        let mut cursor = match self.next {
            Some(cursor) => cursor,
            None => {
                let log = self.ledger.admin();
                log.check()?;
                if log.stats().queued_bytes > 0 {
                    return Ok(());
                }
                Cursor { event: last_event(&self.ledger.settings().dir.join(ADMIN))?, head: 0 }
            }
        };
        let head = self.store.head()?;
        if head == cursor.head {
            return Ok(());
        }
        loop {
            let query = EventQuery {
                after: Some(cursor.event),
                limit: EVENTS_AT_ONCE,
                ..EventQuery::default()
            };
            let events = self.store.events(&query)?;
            let mut last: Option<Appended> = None;
            for event in &events {
                let (head, payload) = record(event);
                last = Some(self.ledger.append_admin(&head, &payload)?);
                cursor.event = event.seq;
            }
            if let Some(last) = last {
                self.runtime.block_on(self.ledger.admin().synced(last))?;
            }
            if events.len() < EVENTS_AT_ONCE {
                self.next = Some(Cursor { head, ..cursor });
                return Ok(());
            }
        }
    }
}

fn record(event: &Event) -> (Head, Payload) {
    let head = Head {
        kind: Kind::Admin.into(),
        time_ns: i64::try_from(event.at.as_nanosecond()).unwrap_or(i64::MAX),
        model: event.model.as_ref().map(ToString::to_string).unwrap_or_default(),
        principal: event.actor.clone(),
        status: match event.outcome {
            EventOutcome::Done => "ok".to_owned(),
            EventOutcome::Refused => "refused".to_owned(),
        },
        action: event.action.clone(),
        ..Head::default()
    };
    let payload = Payload {
        request_id: event.request_id.clone().unwrap_or_default(),
        // Texts, numbers and JSON values: it cannot fail.
        body: serde_json::to_vec(event).unwrap_or_default().into(),
        ..Payload::default()
    };
    (head, payload)
}

/// Number of the last event that the log has; 0 when there is none.
fn last_event(log: &Path) -> Result<u64, ReadError> {
    #[derive(Deserialize)]
    struct Numbered {
        seq: u64,
    }
    for segment in reader::segments(log)?.iter().rev() {
        let mut reader = SegmentReader::open(segment)?;
        let mut last = None;
        while let Some(frame) = reader.next_frame()? {
            let Ok(record) = Record::read(&frame) else { continue };
            if record.head.kind() != Kind::Admin {
                continue;
            }
            let body = record.payload.map(|payload| payload.body).unwrap_or_default();
            let numbered = serde_json::from_slice::<Numbered>(&body).ok();
            last = numbered.map(|numbered| numbered.seq).or(last);
        }
        if let Some(seq) = last {
            return Ok(seq);
        }
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::store::{NewEvent, SqliteStore};
    use crate::ledger;

    fn open(dir: &Path) -> Arc<Ledger> {
        let settings = ledger::Settings { free_bytes_min: 0, ..ledger::Settings::new(dir) };
        Ledger::open(settings, []).unwrap()
    }

    fn note(store: &dyn Store, action: &str, outcome: EventOutcome) {
        let event = NewEvent {
            actor: "ci".to_owned(),
            action: action.to_owned(),
            subject: "iris".to_owned(),
            outcome,
            reason: Some("because".to_owned()),
            ..NewEvent::default()
        };
        store.commit(&[], &[event]).unwrap();
    }

    fn admin_records(dir: &Path) -> Vec<Record> {
        let mut found = Vec::new();
        for segment in reader::segments(&dir.join(ledger::FOLDER).join(ADMIN)).unwrap() {
            let mut reader = SegmentReader::open(&segment).unwrap();
            while let Some(frame) = reader.next_frame().unwrap() {
                let record = Record::read(&frame).unwrap();
                found.extend((record.head.kind() == Kind::Admin).then_some(record));
            }
        }
        found
    }

    #[test]
    fn every_event_is_copied_once_whatever_is_started_again() {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let _inside = runtime.enter();
        let dir = tempfile::tempdir().unwrap();
        let store: Arc<dyn Store> = Arc::new(SqliteStore::open(dir.path()).unwrap());
        let mut wanted = Vec::new();
        for round in 0..3 {
            let ledger = open(dir.path());
            let copy = AdminLog::start(Arc::clone(&store), Arc::clone(&ledger)).unwrap();
            // More than are taken at once.
            for at in 0..300 {
                let action = format!("test.{round}.{at}");
                let outcome = if at % 2 == 0 { EventOutcome::Done } else { EventOutcome::Refused };
                note(&*store, &action, outcome);
                wanted.push((action, if at % 2 == 0 { "ok" } else { "refused" }.to_owned()));
            }
            copy.stop();
            if round == 1 {
                // As if the process had been killed.
                continue;
            }
            runtime.block_on(ledger.close());
        }
        let found = admin_records(dir.path());
        let got: Vec<_> = found
            .iter()
            .map(|record| (record.head.action.clone(), record.head.status.clone()))
            .collect();
        assert_eq!(got, wanted);
        let payload = found[0].payload.as_ref().unwrap();
        let body: serde_json::Value = serde_json::from_slice(&payload.body).unwrap();
        assert_eq!((&body["reason"], &body["action"]), (&"because".into(), &"test.0.0".into()));
    }
}
