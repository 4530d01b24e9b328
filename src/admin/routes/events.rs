//! Server-sent events: everything that is journalled, as it happens.
//!
//! ```text
//! Last-Event-ID ─▶ journal, page by page ─▶ what this caller may see ─▶ id: seq
//!                        ▲                                              event: action
//! director's broadcast ──┘ there is more; lagged: say so                data: the entry
//! ```
//!
//! Invariants:
//! - Nothing is missed and nothing comes twice: every event is read from the journal, in the order
//!   of its numbers. The broadcast only says when to look, and may drop or swap what it likes.
//! - A reader holds a page at most. One that does not read holds only that, until the kernel cuts it.
//! - A credential that is revoked ends the stream within [`RECHECK_EVERY`].

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{Query, State};
use axum::response::Response;
use bytes::Bytes;
use futures_util::stream::unfold;
use http::HeaderValue;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use parking_lot::Mutex;
use serde::Deserialize;
use tokio::sync::broadcast::Receiver;
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::time::{Instant, timeout_at};
use utoipa::IntoParams;

use crate::admin::Admin;
use crate::admin::asked::Asked;
use crate::admin::gate::Caller;
use crate::admin::limits::{
    CATCH_UP_PAGE, HEARTBEAT_EVERY, READER_AGE_MAX, READERS_MAX, READERS_OF_ONE_MAX, RECHECK_EVERY,
};
use crate::admin::problem::{OVERLOADED, Problem};
use crate::admit::Action;
use crate::control::store::{Event, EventOutcome, EventQuery};

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct EventsQuery {
    /// Events after this number; the header `Last-Event-ID` wins. Without either: from now on.
    #[param(minimum = 0)]
    after: Option<u64>,
}

/// Everything that changes, as it happens: entries of the journal, each with its number as `id` and
/// its action as `event`. An event `lagged` says how many came faster than they were read; they
/// follow. Comments keep the connection alive.
#[utoipa::path(get, path = "/events", operation_id = "events.get", tag = "journal",
    params(EventsQuery,
        ("last-event-id" = Option<u64>, Header, description = "Number of the last event seen.",
            minimum = 0)),
    responses((status = 200, description = "A stream without an end.", body = String,
        content_type = "text/event-stream")))]
pub(super) async fn get(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    query: Result<Query<EventsQuery>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) =
        query.map_err(|rejection| Problem::invalid(vec![format!("query: {rejection}")]))?;
    let after = cursor(&asked, &query)?;
    let seat = admin.readers.sit(&asked.caller)?;
    // Subscribed first, then the journal: what comes between is in both, and its number tells.
    let live = admin.desk.events();
    let seen = match after {
        Some(after) => after,
        None => newest(&admin).await?,
    };
    let now = Instant::now();
    let reader = Reader {
        behind: true,
        seen,
        caller: asked.caller,
        admin,
        live,
        page: VecDeque::new(),
        ends: now + READER_AGE_MAX,
        recheck: now + RECHECK_EVERY,
        heartbeat: now + HEARTBEAT_EVERY,
        _seat: seat,
    };
    // Sent at once, so that the caller knows that it listens.
    let first = Some(Bytes::from(format!("retry: 1000\n: events after {seen}\n\n")));
    let stream = unfold((first, reader), |(first, mut reader)| async move {
        let chunk = match first {
            Some(first) => first,
            None => reader.next().await?,
        };
        Some((Ok::<_, Infallible>(chunk), (None, reader)))
    });
    let mut answer = Response::new(Body::from_stream(stream));
    let headers = answer.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    // For proxies that would wait for more.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    Ok(answer)
}

fn cursor(asked: &Asked, query: &EventsQuery) -> Result<Option<u64>, Problem> {
    let after = match asked.headers.get("last-event-id") {
        // A browser that has seen none sends an empty one.
        Some(value) if value.is_empty() => None,
        Some(value) => {
            let number = value.to_str().ok().and_then(|text| text.parse().ok());
            let expected = || Problem::invalid(vec!["last-event-id: expected a number".to_owned()]);
            Some(number.ok_or_else(expected)?)
        }
        None => query.after,
    };
    match after {
        // Numbers of the store are signed.
        Some(number) if i64::try_from(number).is_err() => {
            Err(Problem::invalid(vec![format!("after: the limit is {}", i64::MAX)]))
        }
        after => Ok(after),
    }
}

/// Number of the newest entry.
async fn newest(admin: &Admin) -> Result<u64, Problem> {
    let query = EventQuery { newest_first: true, limit: 1, ..EventQuery::default() };
    let newest = admin.desk.journal(query).await?;
    Ok(newest.first().map_or(0, |event| event.seq))
}

/// One stream of events.
struct Reader {
    admin: Arc<Admin>,
    caller: Caller,
    live: Receiver<Arc<Event>>,
    /// Out of the journal, yet to be sent.
    page: VecDeque<Event>,
    /// Whether the journal may have more.
    behind: bool,
    /// Number of the last event that was looked at.
    seen: u64,
    ends: Instant,
    recheck: Instant,
    heartbeat: Instant,
    _seat: Seat,
}

impl Reader {
    /// The next piece of the stream; `None` ends it.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            let now = Instant::now();
            if now >= self.ends {
                return None;
            }
            if now >= self.recheck {
                self.caller = self.caller.again(&self.admin.known)?;
                self.recheck = now + RECHECK_EVERY;
            }
            if let Some(event) = self.page.pop_front() {
                if let Some(chunk) = self.take(&event) {
                    return Some(chunk);
                }
                continue;
            }
            if self.behind {
                // What the broadcast holds is in the journal by now.
                match self.live.try_recv() {
                    Ok(_) => continue,
                    Err(TryRecvError::Lagged(missed)) => return Some(lagged(missed)),
                    // The director is gone: the process ends.
                    Err(TryRecvError::Closed) => return None,
                    Err(TryRecvError::Empty) => {}
                }
                self.read_journal().await?;
                continue;
            }
            if now >= self.heartbeat {
                self.heartbeat = now + HEARTBEAT_EVERY;
                // Other processes write to the journal too (`tidegate keys`), and tell nobody.
                self.behind = true;
                return Some(Bytes::from_static(b": still here\n\n"));
            }
            let wake = self.recheck.min(self.heartbeat).min(self.ends);
            match timeout_at(wake, self.live.recv()).await {
                Err(_) => {}
                Ok(Ok(event)) => self.behind |= event.seq > self.seen,
                Ok(Err(RecvError::Lagged(missed))) => {
                    self.behind = true;
                    return Some(lagged(missed));
                }
                Ok(Err(RecvError::Closed)) => return None,
            }
        }
    }

    async fn read_journal(&mut self) -> Option<()> {
        let after = Some(self.seen);
        let query = EventQuery { after, limit: CATCH_UP_PAGE, ..EventQuery::default() };
        match self.admin.desk.journal(query).await {
            Ok(events) => {
                self.behind = events.len() == CATCH_UP_PAGE;
                self.page = events.into();
                Some(())
            }
            Err(error) => {
                tracing::warn!(%error, "a reader of events was let go, the journal cannot be read");
                None
            }
        }
    }

    /// The event as it is sent; `None` when it was sent before or is not for this caller.
    fn take(&mut self, event: &Event) -> Option<Bytes> {
        if event.seq <= self.seen {
            return None;
        }
        self.seen = event.seq;
        if !visible(&self.caller, event) {
            return None;
        }
        self.heartbeat = Instant::now() + HEARTBEAT_EVERY;
        Some(chunk(event))
    }
}

/// That events came faster than they were read; they follow, out of the journal.
fn lagged(missed: u64) -> Bytes {
    format!("event: lagged\ndata: {{\"missed\":{missed}}}\n\n").into()
}

/// Changes of models that the caller may see; refusals and the gateway's own affairs are for who
/// may read the journal.
fn visible(caller: &Caller, event: &Event) -> bool {
    let reads = || caller.may(Action::ReadJournal, event.model.as_ref());
    let sees = |model| caller.may(Action::ReadModels, Some(model));
    match (&event.model, event.outcome) {
        (Some(model), EventOutcome::Done) => sees(model) || reads(),
        _ => reads(),
    }
}

/// JSON has no line breaks, and an action no characters but letters and dots.
fn chunk(event: &Event) -> Bytes {
    let json = serde_json::to_string(event).unwrap_or_else(|_| "{}".to_owned());
    let action: String = event.action.chars().filter(|char| !char.is_control()).collect();
    format!("id: {}\nevent: {action}\ndata: {json}\n\n", event.seq).into()
}

/// Who reads events now.
#[derive(Debug, Default)]
pub(in crate::admin) struct Readers {
    /// Guards how many streams each principal has open.
    seats: Arc<Mutex<HashMap<Arc<str>, usize>>>,
}

/// A place among the readers, given back when it is dropped.
struct Seat {
    seats: Arc<Mutex<HashMap<Arc<str>, usize>>>,
    name: Arc<str>,
}

impl Readers {
    fn sit(&self, caller: &Caller) -> Result<Seat, Problem> {
        self.sit_as(&caller.principal.name)
    }

    fn sit_as(&self, name: &Arc<str>) -> Result<Seat, Problem> {
        let mut seats = self.seats.lock();
        let all: usize = seats.values().sum();
        let own = seats.get(name).copied().unwrap_or(0);
        if all >= READERS_MAX || own >= READERS_OF_ONE_MAX {
            let detail = format!(
                "{own} streams of events are open for '{name}' and {all} in all; the limits are \
                 {READERS_OF_ONE_MAX} and {READERS_MAX}"
            );
            return Err(OVERLOADED.because(detail));
        }
        seats.insert(Arc::clone(name), own + 1);
        Ok(Seat { seats: Arc::clone(&self.seats), name: Arc::clone(name) })
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut seats = self.seats.lock();
        if let Some(count) = seats.get_mut(&self.name) {
            *count -= 1;
            if *count == 0 {
                seats.remove(&self.name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seats_are_limited_and_given_back() {
        let readers = Readers::default();
        let names: Vec<Arc<str>> = (0..5).map(|n| format!("reader-{n}").into()).collect();
        let mut seats = Vec::new();
        for name in &names[..4] {
            seats.extend((0..READERS_OF_ONE_MAX).map(|_| readers.sit_as(name).unwrap()));
            assert!(readers.sit_as(name).is_err(), "of one");
        }
        assert_eq!(seats.len(), READERS_MAX);
        assert!(readers.sit_as(&names[4]).is_err(), "of all");
        seats.pop();
        assert!(readers.sit_as(&names[4]).is_ok());
        seats.clear();
        assert!(readers.seats.lock().is_empty());
    }
}
