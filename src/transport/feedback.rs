//! What both protocols do alike with feedback.

use super::Api;
use super::auth::Caller;
use crate::admit::Action;
use crate::domain::{CallMeta, Failure, ModelName};
use crate::feedback::{Item, Outcome};

/// Takes the items of a call; what became of each, beside its prediction's id.
///
/// # Errors
/// As [`crate::gateway::Gateway::feedback`], and for who may not.
pub(super) async fn send(
    api: &Api,
    caller: &Caller,
    meta: CallMeta,
    model: &ModelName,
    items: Vec<Item>,
) -> Result<Vec<(String, Outcome)>, Failure> {
    caller.check(Action::Feedback, model)?;
    if items.is_empty() {
        return Err(Failure::invalid("expected at least one item"));
    }
    let meta = CallMeta { principal: caller.name(), ..meta };
    let ids: Vec<String> = items.iter().map(|item| item.id.to_string()).collect();
    let outcomes = api.gateway.feedback(&meta, model, items).await?;
    Ok(ids.into_iter().zip(outcomes).collect())
}

/// An item that cannot be read.
pub(super) fn wrong(at: usize, why: &impl std::fmt::Display) -> Failure {
    Failure::invalid(format!("item {at}: {why}"))
}
