//! Who may call the data plane. Every call of either protocol passes [`Auth::admit`] before anything
//! looks for its route; what it may do there is asked of the [`Caller`] that this gives.
//!
//! ```text
//! http::handle ─┐                         ┌─▶ 401 / UNAUTHENTICATED, whatever the path
//!               ├─▶ Auth::admit(headers) ─┤
//! Grpc::call ───┘                         └─▶ Caller ─▶ route ─▶ Caller::check(action, model)
//! ```
//!
//! Invariants:
//! - A [`Caller`] is made nowhere else, and nothing that answers is reached without one.
//! - Deny by default: a route answers without a credential only if [`OPEN`] names it, byte by byte.
//! - A model that a caller may not see is, for that caller, one that does not exist; which models
//!   these are is a question of names alone, so no answer tells whether there is one.

use std::fmt;
use std::sync::Arc;

use http::HeaderMap;

use crate::admit::{Action, AdmitError, Gatekeeper, Principal, Secret, authorization};
use crate::domain::{ErrorKind, Failure, ModelName, Protocol};

/// What answers without a credential, always, and never looks at one: is the process there?
const OPEN: [(Protocol, &str); 7] = [
    (Protocol::Http, "/v2/health/live"),
    (Protocol::Http, "/v2/health/ready"),
    (Protocol::Http, "/ping"),
    (Protocol::Grpc, "/inference.GRPCInferenceService/ServerLive"),
    (Protocol::Grpc, "/inference.GRPCInferenceService/ServerReady"),
    (Protocol::Grpc, "/grpc.health.v1.Health/Check"),
    (Protocol::Grpc, "/grpc.health.v1.Health/Watch"),
];

/// The door of the data plane, and who has a key to it.
#[derive(Clone, Default)]
pub struct Auth {
    /// Whether a call without a credential is refused. Without this it may do everything; one with
    /// a credential is let in, or not, by that.
    pub required: bool,
    /// Shared with whoever keeps its keys up to date.
    pub gatekeeper: Arc<Gatekeeper>,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("required", &self.required).finish_non_exhaustive()
    }
}

/// Somebody who was let in.
#[derive(Clone, Debug)]
pub(super) struct Caller(Who);

#[derive(Clone, Debug)]
enum Who {
    /// Asks for what anybody may ask for, and may do nothing else.
    Prober,
    /// Nobody has to say who he is.
    Anyone,
    Known {
        principal: Arc<Principal>,
        /// To be looked at again while the call lasts.
        credential: Option<Secret<Arc<str>>>,
    },
}

impl Auth {
    /// Lets a call in by its headers; trailers come too late to say anything.
    ///
    /// # Errors
    /// When it shows no credential and has to, or one that does not hold.
    pub(super) fn admit(
        &self,
        protocol: Protocol,
        path: &str,
        headers: &HeaderMap,
    ) -> Result<Caller, AdmitError> {
        let listed = match protocol {
            Protocol::Http => Protocol::Http,
            Protocol::Grpc | Protocol::GrpcStream => Protocol::Grpc,
        };
        if OPEN.contains(&(listed, path)) {
            return Ok(Caller(Who::Prober));
        }
        let credential = authorization(headers)?;
        if credential.is_none() && !self.required {
            return Ok(Caller(Who::Anyone));
        }
        let principal = Arc::new(self.gatekeeper.identify(credential)?);
        // A stream may last longer than its key.
        let kept = credential.filter(|_| protocol == Protocol::GrpcStream);
        let credential = kept.map(|text| Secret::new(text.into()));
        Ok(Caller(Who::Known { principal, credential }))
    }

    /// The caller of a stream as its credential stands now.
    ///
    /// # Errors
    /// When it has ended.
    pub(super) fn renewed(&self, caller: &Caller) -> Result<Caller, AdmitError> {
        match &caller.0 {
            Who::Known { credential: Some(text), .. } => {
                let principal = Arc::new(self.gatekeeper.identify(Some(text.expose()))?);
                Ok(Caller(Who::Known { principal, credential: Some(text.clone()) }))
            }
            _ => Ok(caller.clone()),
        }
    }
}

impl Caller {
    /// One who may do nothing, for what should never be asked.
    pub(super) fn nobody() -> Self {
        Self(Who::Prober)
    }

    /// As it stands in the record of a prediction.
    pub(super) fn name(&self) -> Option<String> {
        match &self.0 {
            Who::Known { principal, .. } => Some(principal.name.to_string()),
            Who::Prober | Who::Anyone => None,
        }
    }

    fn may(&self, action: Action, model: Option<&ModelName>) -> bool {
        match &self.0 {
            Who::Prober => false,
            Who::Anyone => true,
            Who::Known { principal, .. } => principal.may(action, model),
        }
    }

    /// Whether there is such a model, as far as this caller is concerned.
    pub(super) fn sees(&self, model: &ModelName) -> bool {
        self.may(Action::ReadModels, Some(model))
    }

    /// # Errors
    /// `NotFound` for a model that it may not see, `Forbidden` for what it may not do to one that it
    /// may.
    pub(super) fn check(&self, action: Action, model: &ModelName) -> Result<(), Failure> {
        if self.may(action, Some(model)) {
            return Ok(());
        }
        match self.sees(model) {
            true => Err(forbidden(format!("this key may not {action} for model '{model}'"))),
            // In the words of the route table.
            false => Err(Failure::not_found(format!("model '{model}' is not found"))),
        }
    }

    /// For what no model is named in, or several are.
    ///
    /// # Errors
    /// `Forbidden` when it may do this to no model at all.
    pub(super) fn check_some(&self, action: Action) -> Result<(), Failure> {
        let may = match &self.0 {
            Who::Known { principal, .. } => principal.may_to_some(action),
            _ => self.may(action, None),
        };
        may.then_some(()).ok_or_else(|| forbidden(format!("this key may not {action}")))
    }

    /// For what concerns the gateway as a whole.
    ///
    /// # Errors
    /// `Forbidden` when it may not.
    pub(super) fn check_gateway(&self, action: Action) -> Result<(), Failure> {
        let may = self.may(action, None);
        may.then_some(()).ok_or_else(|| forbidden(format!("this key may not {action}")))
    }
}

fn forbidden(message: String) -> Failure {
    Failure::new(ErrorKind::Forbidden, message)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use http::header::AUTHORIZATION;

    use super::*;

    fn headers(value: Option<&'static str>) -> HeaderMap {
        let value = value.map(|value| (AUTHORIZATION, HeaderValue::from_static(value)));
        HeaderMap::from_iter(value)
    }

    #[test]
    fn only_what_is_listed_answers_without_a_credential() {
        let auth = Auth { required: true, ..Auth::default() };
        let ask = |protocol, path: &str| auth.admit(protocol, path, &headers(None));
        for (protocol, path) in OPEN {
            let prober = ask(protocol, path).unwrap();
            assert!(!prober.sees(&"iris".parse().unwrap()), "{path}");
            assert!(prober.check_some(Action::ReadModels).is_err(), "{path}");
            for other in [
                format!("{path}/"),
                format!("/{path}"),
                format!("{path}/x"),
                path.to_uppercase(),
                path.replacen('e', "%65", 1),
                path[..path.len() - 1].to_owned(),
            ] {
                let answer = ask(protocol, &other);
                // `/ping` has no such letter.
                assert!(answer.is_err() || other == path, "{other}");
            }
        }
        assert!(ask(Protocol::Grpc, "/v2/health/live").is_err());
        assert!(ask(Protocol::Http, "/grpc.health.v1.Health/Check").is_err());
    }

    #[test]
    fn an_open_door_still_looks_at_what_it_is_shown() {
        let auth = Auth::default();
        let ask = |value| auth.admit(Protocol::Http, "/v2/models", &headers(value));
        let anyone = ask(None).unwrap();
        assert!(anyone.sees(&"iris".parse().unwrap()) && anyone.name().is_none());
        assert!(anyone.check_gateway(Action::Reload).is_ok());
        assert_eq!(ask(Some("Bearer x")).err(), Some(AdmitError::Malformed));
        let health = auth.admit(Protocol::Http, "/ping", &headers(Some("Bearer x")));
        assert!(health.is_ok(), "health never looks");
    }
}
