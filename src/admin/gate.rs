//! Who is calling, and may they: the two questions before any route is looked at and before any
//! handler runs. One place, deny by default.
//!
//! Invariants:
//! - Nothing but [`Needs::Nothing`] is reached without a valid credential, known path or not.
//! - A model outside a caller's patterns is answered as one that does not exist: the same words,
//!   whether it exists or not.
//! - Every denied call of a known principal is journalled. Callers without a credential are
//!   journalled too, [`STRANGERS_JOURNALLED_MAX`] a minute; beyond that they are counted, and the
//!   next entry says how many there were, so that strangers cannot fill the disk.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http::HeaderMap;
use parking_lot::Mutex;
use tokio::time::Instant;

use super::asked::{Names, no_model};
use super::limits::STRANGERS_JOURNALLED_MAX;
use super::problem::{FORBIDDEN, Problem, UNAUTHENTICATED};
use crate::admit::{Action, AdmitError, Clients, Gatekeeper, PeerName, Principal, authorization};
use crate::domain::ModelName;

/// What a route wants of its caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Needs {
    /// Open, or with a proof of its own (a registry's webhook).
    Nothing,
    /// Any valid credential.
    Credential,
    /// The right to do this, to the model in the path.
    Right(Action),
    /// The right to do this to some model; the handler shows only what the caller may see.
    Some(Action),
}

/// The other end of a connection.
#[derive(Clone, Debug)]
pub struct Peer {
    pub address: SocketAddr,
    /// Of its certificate, which the TLS handshake has checked.
    pub name: Option<PeerName>,
}

/// Everybody that there is.
pub(super) struct Known {
    pub(super) gatekeeper: Arc<Gatekeeper>,
    pub(super) clients: Clients,
}

/// An authenticated caller.
#[derive(Clone)]
pub(super) struct Caller {
    pub(super) principal: Arc<Principal>,
    pub(super) request_id: String,
    credential: Credential,
}

/// What a caller proved itself with; looked at again while a call lasts.
#[derive(Clone)]
enum Credential {
    /// As it stood in the header.
    Token(Arc<str>),
    Certificate(PeerName),
}

impl Caller {
    /// # Errors
    /// `unauthenticated`. The detail says what is missing, never what would be right.
    pub(super) fn identify(
        known: &Known,
        peer: &Peer,
        headers: &HeaderMap,
        request_id: &str,
    ) -> Result<Self, Problem> {
        let sent = authorization(headers).map_err(unauthenticated)?;
        let credential = match (sent, &peer.name) {
            // A token goes first: who sends one means it.
            (Some(text), _) => Credential::Token(text.into()),
            (None, Some(name)) => Credential::Certificate(name.clone()),
            (None, None) => return Err(unauthenticated(AdmitError::Missing)),
        };
        let principal = credential.principal(known)?;
        Ok(Self { principal, request_id: request_id.to_owned(), credential })
    }

    /// The same caller, if the credential still holds; a reader of events may stay for long.
    pub(super) fn again(&self, known: &Known) -> Option<Self> {
        let principal = self.credential.principal(known).ok()?;
        Some(Self { principal, ..self.clone() })
    }

    /// Whether the caller may do it to this model, or, without one, to the gateway as a whole.
    pub(super) fn may(&self, action: Action, model: Option<&ModelName>) -> bool {
        self.principal.may(action, model)
    }

    /// Whether the caller may know that the model exists.
    pub(super) fn sees(&self, model: &ModelName) -> bool {
        OF_MODELS.iter().any(|action| self.may(*action, Some(model)))
    }

    /// # Errors
    /// `not_found` for a model that the caller may not know of, `forbidden` for what it may not do.
    pub(super) fn check(&self, needs: Needs, names: &Names) -> Result<(), Problem> {
        match (needs, &names.model) {
            (Needs::Nothing | Needs::Credential, _) => Ok(()),
            (Needs::Right(action), model) => {
                if let Some(model) = model
                    && !self.sees(model)
                {
                    return Err(no_model(model));
                }
                if self.may(action, model.as_ref()) { Ok(()) } else { Err(self.forbidden(action)) }
            }
            (Needs::Some(action), _) => {
                if self.principal.may_to_some(action) {
                    Ok(())
                } else {
                    Err(self.forbidden(action))
                }
            }
        }
    }

    fn forbidden(&self, action: Action) -> Problem {
        let name = &self.principal.name;
        FORBIDDEN.because(format!("'{name}' may not do this: it takes the right to {action}"))
    }
}

/// Rights that are about a model.
const OF_MODELS: [Action; 7] = [
    Action::ReadModels,
    Action::Predict,
    Action::Feedback,
    Action::ChangeVersions,
    Action::ChangeTraffic,
    Action::Rollout,
    Action::Approve,
];

impl Credential {
    fn principal(&self, known: &Known) -> Result<Arc<Principal>, Problem> {
        let found = match self {
            Self::Token(text) => known.gatekeeper.identify(Some(text)).map_err(unauthenticated),
            Self::Certificate(name) => known.clients.identify(name).ok_or_else(|| {
                UNAUTHENTICATED.because(format!("no client is configured as '{name}'"))
            }),
        };
        found.map(Arc::new)
    }
}

fn unauthenticated(error: AdmitError) -> Problem {
    UNAUTHENTICATED.because(error.to_string())
}

/// Callers without a valid credential.
#[derive(Debug, Default)]
pub(super) struct Strangers {
    /// Guards the minute that is counted.
    minute: Mutex<Minute>,
}

#[derive(Debug, Default)]
struct Minute {
    began: Option<Instant>,
    journalled: u32,
    only_counted: u64,
}

impl Strangers {
    /// Counts one. `Some`: journal it, together with so many before it that were not.
    pub(super) fn count(&self, now: Instant) -> Option<u64> {
        let mut minute = self.minute.lock();
        let over = |began: Instant| now.duration_since(began) >= Duration::from_secs(60);
        if minute.began.is_none_or(over) {
            minute.began = Some(now);
            minute.journalled = 0;
        }
        if minute.journalled == STRANGERS_JOURNALLED_MAX {
            minute.only_counted += 1;
            return None;
        }
        minute.journalled += 1;
        Some(std::mem::take(&mut minute.only_counted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strangers_are_journalled_up_to_a_rate_and_then_counted() {
        let strangers = Strangers::default();
        let start = Instant::now();
        let first: Vec<_> = (0..STRANGERS_JOURNALLED_MAX).map(|_| strangers.count(start)).collect();
        assert!(first.iter().all(|counted| *counted == Some(0)));
        assert!((0..1000).all(|_| strangers.count(start + Duration::from_secs(59)).is_none()));
        assert_eq!(strangers.count(start + Duration::from_secs(60)), Some(1000));
        assert_eq!(strangers.count(start + Duration::from_secs(61)), Some(0));
    }
}
