//! The life of one call that says what became of predictions.

use std::sync::Arc;
use std::time::SystemTime;

use tokio::time::{Instant, timeout_at};

use super::Gateway;
use crate::domain::{CallMeta, Durability, ErrorKind, Failure, ModelName};
use crate::feedback::{Call, Feedback, FeedbackError, Item, Outcome, RETRY_AFTER};

impl Gateway {
    /// With a part that takes labels and metrics.
    #[must_use]
    pub fn with_feedback(mut self, feedback: Arc<Feedback>) -> Self {
        self.feedback = Some(feedback);
        self
    }

    /// Takes what a caller says of predictions; what became of each item.
    ///
    /// # Errors
    /// `NotFound` when there is none of the predictions, `InvalidInput` for an item that cannot be,
    /// `Unsupported` for a model whose predictions are not recorded. Then nothing was taken.
    pub async fn feedback(
        &self,
        meta: &CallMeta,
        model: &ModelName,
        items: Vec<Item>,
    ) -> Result<Vec<Outcome>, Failure> {
        let Some(feedback) = &self.feedback else {
            return Err(Failure::unsupported("this gateway takes no feedback"));
        };
        let durability = self.durability_of(model);
        if durability == Durability::Off {
            return Err(Failure::unsupported(format!(
                "predictions of model '{model}' are not recorded ('ledger.durability' is 'off'), so \
                 nothing can be said of them"
            )));
        }
        let longest = self.settings.timeout_max;
        let deadline = meta.received + meta.timeout.unwrap_or(longest).min(longest);
        let call = Call {
            model: model.clone(),
            items,
            durability,
            received: SystemTime::now() - Instant::now().duration_since(meta.received),
            protocol: meta.protocol,
            principal: meta.principal.clone(),
            trace: meta.trace,
        };
        let late = |_| {
            let message = "deadline passed before the feedback was taken; it may be yet, and to \
                           say it again does no harm";
            Failure::new(ErrorKind::DeadlineExceeded, message)
        };
        let taken = timeout_at(deadline, feedback.send(call)).await.map_err(late)?;
        taken.map_err(|error| failure(&error))
    }

    /// As the strictest of a model's versions has it; of one that is not served, as the usual.
    fn durability_of(&self, model: &ModelName) -> Durability {
        let served = self.table.look(|table| {
            let versions = table.models.get(model)?.versions.values();
            let all: Vec<Durability> = versions.map(|it| it.recording.durability).collect();
            let strictest = [Durability::Sync, Durability::Buffered, Durability::Off];
            strictest.into_iter().find(|durability| all.contains(durability))
        });
        let usual = || self.ledger.as_ref().map_or(Durability::Off, |it| it.unrouted().durability);
        served.unwrap_or_else(usual)
    }
}

fn failure(error: &FeedbackError) -> Failure {
    let kind = match error {
        FeedbackError::TooMany { .. }
        | FeedbackError::TooManyLabels { .. }
        | FeedbackError::Item { .. } => ErrorKind::InvalidInput,
        FeedbackError::NotFound { .. } => ErrorKind::NotFound,
        FeedbackError::Busy => ErrorKind::Overloaded,
        FeedbackError::Unrecorded(_) | FeedbackError::Searching | FeedbackError::Broken => {
            ErrorKind::Unavailable
        }
    };
    // The log says why something cannot be recorded; the caller learns what it can do.
    let failure = match error {
        FeedbackError::Unrecorded(why) => {
            tracing::debug!(%why, "feedback could not be recorded");
            Failure::new(kind, "labels cannot be recorded at this moment")
        }
        error => Failure::new(kind, error.to_string()),
    };
    match kind {
        ErrorKind::Overloaded | ErrorKind::Unavailable => failure.retry_after(RETRY_AFTER),
        _ => failure,
    }
}
