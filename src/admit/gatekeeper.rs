//! Looks at what a caller shows and says who it is.

use arc_swap::ArcSwap;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use jiff::Timestamp;

use super::{KeySet, Principal, Token, TokenError};
use crate::domain::{ErrorKind, Failure};

/// Longest value of an `Authorization` header that is looked at.
pub const CREDENTIAL_BYTES_MAX: usize = 8 << 10;
const SCHEME: &str = "bearer";

/// Why somebody is not let in. The texts are for the caller, and say nothing that it could not
/// know: whether a token is unknown or its secret wrong is one answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AdmitError {
    #[error("a credential is expected: 'Authorization: Bearer <token>'")]
    Missing,
    #[error("one 'Authorization' header is expected, got several")]
    Several,
    #[error("the credential has more than {CREDENTIAL_BYTES_MAX} bytes")]
    TooLong,
    #[error("'Authorization' is expected to be 'Bearer' and a token of this gateway")]
    Malformed,
    #[error("the token is not valid")]
    Unknown,
    #[error("the token has expired")]
    Expired,
    #[error("the token was revoked")]
    Revoked,
}

impl From<TokenError> for AdmitError {
    fn from(_: TokenError) -> Self {
        Self::Malformed
    }
}

impl From<AdmitError> for Failure {
    fn from(error: AdmitError) -> Self {
        Self::new(ErrorKind::Unauthenticated, error.to_string())
    }
}

/// The value of the one `Authorization` header, or gRPC metadata, if there is one. Only headers
/// are looked at: what comes in trailers comes after the decision.
///
/// # Errors
/// When there are several, or it is too long or no text.
pub fn authorization(headers: &HeaderMap) -> Result<Option<&str>, AdmitError> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let Some(value) = values.next() else { return Ok(None) };
    if values.next().is_some() {
        return Err(AdmitError::Several);
    }
    if value.len() > CREDENTIAL_BYTES_MAX {
        return Err(AdmitError::TooLong);
    }
    value.to_str().map(Some).map_err(|_| AdmitError::Malformed)
}

/// The keys in force. One look-up sees one whole set; a new set holds for the next.
#[derive(Debug, Default)]
pub struct Gatekeeper {
    keys: ArcSwap<KeySet>,
}

impl Gatekeeper {
    pub fn new(keys: KeySet) -> Self {
        Self { keys: ArcSwap::from_pointee(keys) }
    }

    /// Whose token the value of an `Authorization` header holds, now.
    ///
    /// # Errors
    /// When there is none, or not one that holds.
    pub fn identify(&self, authorization: Option<&str>) -> Result<Principal, AdmitError> {
        self.identify_at(authorization, Timestamp::now())
    }

    /// As [`Gatekeeper::identify`], at another time.
    ///
    /// # Errors
    /// As there.
    pub fn identify_at(
        &self,
        authorization: Option<&str>,
        now: Timestamp,
    ) -> Result<Principal, AdmitError> {
        let token = bearer(authorization.ok_or(AdmitError::Missing)?)?;
        self.keys.load().check(&Token::parse(token)?, now)
    }

    /// Puts other keys in force.
    pub fn replace(&self, keys: KeySet) {
        self.keys.store(keys.into());
    }

    pub fn len(&self) -> usize {
        self.keys.load().len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The token of `Bearer <token>`; the scheme's case does not matter.
fn bearer(authorization: &str) -> Result<&str, AdmitError> {
    if authorization.len() > CREDENTIAL_BYTES_MAX {
        return Err(AdmitError::TooLong);
    }
    match authorization.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case(SCHEME) => Ok(token.trim_matches(' ')),
        _ => Err(AdmitError::Malformed),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;
    use crate::admit::Role;
    use crate::admit::keys::{GrantRecord, KeyRecord};

    fn keys(tokens: &[&Token]) -> KeySet {
        let records = tokens.iter().map(|token| KeyRecord {
            id: token.id().to_owned(),
            name: format!("name-{}", token.id()),
            grants: vec![GrantRecord { role: Role::Viewer, models: Vec::new() }],
            digest: token.digest().to_string(),
            created_at: Timestamp::UNIX_EPOCH,
            created_by: "test".to_owned(),
            expires_at: None,
            revoked_at: None,
            revoked_by: None,
        });
        let records: Vec<_> = records.collect();
        let records = records
            .iter()
            .map(|record| (record.id.as_str(), serde_json::to_value(record).unwrap()));
        KeySet::from_records(records).0
    }

    #[test]
    fn a_token_is_looked_up_and_a_replaced_set_holds_at_once() {
        let (one, two) = (Token::generate().unwrap(), Token::generate().unwrap());
        let keeper = Gatekeeper::new(keys(&[&one]));
        let who = |token: &Token| {
            let value = format!("Bearer {}", token.text().expose());
            keeper.identify(Some(&value)).map(|principal| principal.name.to_string())
        };
        assert_eq!(who(&one), Ok(format!("name-{}", one.id())));
        assert_eq!(who(&two), Err(AdmitError::Unknown));
        keeper.replace(keys(&[&two]));
        assert_eq!(who(&one), Err(AdmitError::Unknown));
        assert_eq!(who(&two), Ok(format!("name-{}", two.id())));
        assert_eq!(Gatekeeper::default().identify(None).err(), Some(AdmitError::Missing));
    }

    #[test]
    fn only_one_form_of_header_is_a_credential() {
        let token = Token::generate().unwrap();
        let keeper = Gatekeeper::new(keys(&[&token]));
        let text = token.text().expose();
        for good in ["Bearer", "bearer", "BEARER", "bEaReR"] {
            assert!(keeper.identify(Some(&format!("{good} {text}"))).is_ok(), "{good}");
        }
        assert!(keeper.identify(Some(&format!("Bearer  {text} "))).is_ok(), "more blanks");
        let long = "x".repeat(CREDENTIAL_BYTES_MAX);
        for bad in [
            String::new(),
            text.clone(),
            "Bearer".to_owned(),
            "Bearer ".to_owned(),
            format!("Bearer{text}"),
            format!("Bearer\t{text}"),
            format!("Basic {text}"),
            format!("Bearer {text},Bearer {text}"),
            format!("Bearer {text} {text}"),
            format!("Bearer Bearer {text}"),
            format!("Token {text}"),
        ] {
            assert_eq!(keeper.identify(Some(&bad)).err(), Some(AdmitError::Malformed), "{bad}");
        }
        assert_eq!(keeper.identify(Some(&long)).err(), Some(AdmitError::Malformed));
        let long = format!("Bearer {long}");
        assert_eq!(keeper.identify(Some(&long)).err(), Some(AdmitError::TooLong));
    }

    #[test]
    fn one_header_or_none() {
        let mut headers = HeaderMap::new();
        assert_eq!(authorization(&headers), Ok(None));
        headers.append(AUTHORIZATION, HeaderValue::from_static("Bearer a"));
        assert_eq!(authorization(&headers), Ok(Some("Bearer a")));
        headers.append(AUTHORIZATION, HeaderValue::from_static("Bearer a"));
        assert_eq!(authorization(&headers), Err(AdmitError::Several));
        let long = HeaderValue::from_str(&"x".repeat(CREDENTIAL_BYTES_MAX + 1)).unwrap();
        headers.insert(AUTHORIZATION, long);
        assert_eq!(authorization(&headers), Err(AdmitError::TooLong));
        headers.insert(AUTHORIZATION, HeaderValue::from_bytes(b"Bearer \xff").unwrap());
        assert_eq!(authorization(&headers), Err(AdmitError::Malformed));
    }
}
