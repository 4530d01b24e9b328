//! The journal: who changed what, when and why, and who was refused.

use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, State};
use axum::response::Response;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::json;
use crate::admin::Admin;
use crate::admin::asked::Asked;
use crate::admin::gate::Caller;
use crate::admin::limits::{
    JOURNAL_LOOKED_AT_MAX, JOURNAL_PAGE, JOURNAL_PAGE_BYTES_MAX, JOURNAL_PAGE_MAX,
};
use crate::admin::problem::Problem;
use crate::admit::Action;
use crate::control::store::{Event, EventOutcome, EventQuery};
use crate::domain::ModelName;

/// Entries that are taken from the store at a time; a large one has 128 KiB.
const LOOK: usize = 64;

/// Which entries to show.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct JournalQuery {
    /// Entries after this number, the oldest first: for who follows.
    #[param(minimum = 0)]
    after: Option<u64>,
    /// Entries before this number, the newest first: `next` of the page before.
    #[param(minimum = 0)]
    before: Option<u64>,
    /// Of this model.
    #[param(pattern = "^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]
    model: Option<String>,
    /// Start of the action: `rollout.`, `traffic.put`.
    #[param(max_length = 64)]
    action: Option<String>,
    /// Whoever did it.
    #[param(max_length = 256)]
    actor: Option<String>,
    /// `done` or `refused`.
    #[param(inline)]
    outcome: Option<EventOutcome>,
    /// How many at most.
    #[param(minimum = 1, maximum = 500, default = 100)]
    limit: Option<usize>,
}

/// A page of the journal.
#[derive(Serialize, ToSchema)]
pub(super) struct JournalView {
    events: Vec<Event>,
    /// Cursor for the next page, in the same direction; none when this was the last.
    #[schema(minimum = 0)]
    next: Option<u64>,
}

/// The journal, the newest first; with `after` the oldest first.
#[utoipa::path(get, path = "/journal", operation_id = "journal.get", tag = "journal",
    params(JournalQuery),
    responses((status = 200, description = "A page.", body = JournalView)))]
pub(super) async fn get(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
    query: Result<Query<JournalQuery>, QueryRejection>,
) -> Result<Response, Problem> {
    let Query(query) = query.map_err(|rejection| {
        use std::error::Error as _;
        let inner = rejection.source().map_or_else(|| rejection.to_string(), ToString::to_string);
        Problem::invalid(vec![format!("query: {inner}")])
    })?;
    let wanted = Wanted::new(query)?;
    Ok(json(StatusCode::OK, &page(&admin, &asked.caller, wanted).await?))
}

/// A query that is right.
struct Wanted {
    query: EventQuery,
    actor: Option<String>,
    outcome: Option<EventOutcome>,
    limit: usize,
}

impl Wanted {
    fn new(asked: JournalQuery) -> Result<Self, Problem> {
        let JournalQuery { after, before, model, action, actor, outcome, limit } = asked;
        let mut problems = Vec::new();
        let model = model.map(|text| text.parse::<ModelName>()).transpose();
        let model = model.unwrap_or_else(|error| {
            problems.push(format!("model: {error}"));
            None
        });
        if after.is_some() && before.is_some() {
            problems.push("after, before: only one of them".to_owned());
        }
        for (name, text, max) in [("action", &action, 64), ("actor", &actor, 256)] {
            if text.as_ref().is_some_and(|text| text.len() > max) {
                problems.push(format!("{name}: the limit is {max} bytes"));
            }
        }
        // Numbers of the store are signed.
        for (name, number) in [("after", after), ("before", before)] {
            if number.is_some_and(|number| i64::try_from(number).is_err()) {
                problems.push(format!("{name}: the limit is {}", i64::MAX));
            }
        }
        let limit = limit.unwrap_or(JOURNAL_PAGE);
        if !(1..=JOURNAL_PAGE_MAX).contains(&limit) {
            problems.push(format!("limit: expected 1 to {JOURNAL_PAGE_MAX}, got {limit}"));
        }
        if !problems.is_empty() {
            return Err(Problem::invalid(problems));
        }
        let newest_first = after.is_none();
        let query = EventQuery { after, before, model, action, newest_first, limit: LOOK };
        Ok(Self { query, actor, outcome, limit })
    }

    fn takes(&self, event: &Event, caller: &Caller) -> bool {
        self.actor.as_ref().is_none_or(|actor| *actor == event.actor)
            && self.outcome.is_none_or(|outcome| outcome == event.outcome)
            && caller.may(Action::ReadJournal, event.model.as_ref())
    }
}

/// Looks until the page is full: by number, by bytes, or by what was looked at in vain.
async fn page(admin: &Admin, caller: &Caller, mut wanted: Wanted) -> Result<JournalView, Problem> {
    let (mut events, mut bytes, mut looked_at) = (Vec::new(), 0, 0);
    loop {
        let found = admin.desk.journal(wanted.query.clone()).await?;
        let all = found.len() < wanted.query.limit;
        for event in found {
            let seq = event.seq;
            looked_at += 1;
            if wanted.takes(&event, caller) {
                bytes += size_of_event(&event);
                events.push(event);
            }
            let full = events.len() == wanted.limit
                || bytes > JOURNAL_PAGE_BYTES_MAX
                || looked_at == JOURNAL_LOOKED_AT_MAX;
            if full {
                return Ok(JournalView { events, next: Some(seq) });
            }
            match wanted.query.newest_first {
                true => wanted.query.before = Some(seq),
                false => wanted.query.after = Some(seq),
            }
        }
        if all {
            return Ok(JournalView { events, next: None });
        }
    }
}

/// What is large of an event.
fn size_of_event(event: &Event) -> usize {
    let json = |value: &Option<serde_json::Value>| {
        value.as_ref().map_or(0, |value| value.to_string().len())
    };
    json(&event.before) + json(&event.after) + 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(query: JournalQuery) -> Vec<String> {
        Wanted::new(query).err().map(|problem| problem.problems).unwrap_or_default()
    }

    #[test]
    fn a_query_is_told_everything_that_is_wrong_with_it() {
        let right = JournalQuery { after: Some(0), limit: Some(500), ..JournalQuery::default() };
        assert!(problems(right).is_empty());
        let wrong = JournalQuery {
            after: Some(1),
            before: Some(u64::MAX),
            model: Some("a b".to_owned()),
            action: Some("x".repeat(65)),
            limit: Some(501),
            ..JournalQuery::default()
        };
        assert_eq!(problems(wrong).len(), 5);
    }
}
