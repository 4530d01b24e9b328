//! Keys as they are kept, and as they are looked up.
//!
//! A key is kept as a [`KeyRecord`], without its token. Whoever keeps them (the state store) hands
//! the records over; this module knows nothing of where they lie.

use std::collections::HashMap;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use subtle::ConstantTimeEq;
use utoipa::ToSchema;

use super::{AdmitError, Grant, ModelPatterns, PatternError, Principal, Role, Token, token};
use crate::domain::Digest;

/// Longest name of a key.
const NAME_LEN_MAX: usize = 64;

/// A key as it is kept. A field that this version does not know may be a limit that it would not
/// keep to, so such a record is no key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct KeyRecord {
    /// 16 hexadecimal digits, as in the token.
    pub id: String,
    /// Who it is for. Several may have the same: that is how one is replaced by the next.
    pub name: String,
    pub grants: Vec<GrantRecord>,
    /// SHA-256 of the token.
    pub digest: String,
    #[schema(value_type = String, format = DateTime)]
    pub created_at: Timestamp,
    pub created_by: String,
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    #[schema(value_type = Option<String>, format = DateTime)]
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revoked_by: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GrantRecord {
    pub role: Role,
    /// Globs of model names; none: all models.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub models: Vec<String>,
}

/// Whether a key may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum KeyState {
    Live,
    Expired,
    Revoked,
}

impl KeyState {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Expired => "expired",
            Self::Revoked => "revoked",
        }
    }
}

/// A record that is no key, and why.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("{0}")]
    Json(#[from] serde_json::Error),
    #[error("it is kept under another id")]
    OtherId,
    #[error("'{0}' is no SHA-256")]
    Digest(String),
    #[error(transparent)]
    Pattern(#[from] PatternError),
}

/// Why a name cannot be a key's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a key's name is expected to have 1 to {NAME_LEN_MAX} letters, digits, '.', '_', '-' or '@'"
)]
pub struct KeyNameError;

/// # Errors
/// When it cannot stand in a journal beside other kinds of names, such as `cn:…` or `cli:…`.
pub fn check_name(name: &str) -> Result<(), KeyNameError> {
    let right = |byte: u8| byte.is_ascii_alphanumeric() || b"._-@".contains(&byte);
    match !name.is_empty() && name.len() <= NAME_LEN_MAX && name.bytes().all(right) {
        true => Ok(()),
        false => Err(KeyNameError),
    }
}

/// The id of a key as people copy it: with the token's prefix or without.
pub fn id_of(text: &str) -> &str {
    token::id_of(text)
}

impl KeyRecord {
    /// What of its token may be shown: `tg_<id>`.
    pub fn shown(&self) -> String {
        token::shown(&self.id)
    }

    pub fn state(&self, now: Timestamp) -> KeyState {
        match self.expires_at {
            _ if self.revoked_at.is_some() => KeyState::Revoked,
            Some(end) if end <= now => KeyState::Expired,
            _ => KeyState::Live,
        }
    }

    /// Whether it may do everything.
    pub fn is_admin(&self) -> bool {
        self.grants.iter().any(|grant| {
            let all = ModelPatterns::parse(&grant.models);
            grant.role == Role::Admin && matches!(all, Ok(None))
        })
    }

    /// Without the token's hash: for journals and answers.
    pub fn public(&self) -> Value {
        let mut value = serde_json::to_value(self).unwrap_or_default();
        if let Some(members) = value.as_object_mut() {
            members.remove("digest");
        }
        value
    }

    fn key(&self) -> Result<Key, RecordError> {
        let digest = Digest::parse(&self.digest);
        let digest = digest.ok_or_else(|| RecordError::Digest(self.digest.clone()))?;
        let grants = self.grants.iter().map(|GrantRecord { role, models }| {
            Ok(Grant { role: *role, models: ModelPatterns::parse(models)? })
        });
        let grants = grants.collect::<Result<_, PatternError>>()?;
        Ok(Key {
            digest,
            principal: Principal { name: self.name.as_str().into(), grants },
            expires_at: self.expires_at,
            revoked: self.revoked_at.is_some(),
        })
    }
}

/// Every key there is, ready to be looked up; swapped whole.
#[derive(Default)]
pub struct KeySet {
    keys: HashMap<String, Key>,
}

struct Key {
    digest: Digest,
    principal: Principal,
    expires_at: Option<Timestamp>,
    revoked: bool,
}

impl KeySet {
    /// From records as they are kept, each under its id. What cannot be read is no key; it is given
    /// back with the reason, and the others hold.
    pub fn from_records<'a>(
        records: impl IntoIterator<Item = (&'a str, Value)>,
    ) -> (Self, Vec<(String, RecordError)>) {
        let mut set = Self::default();
        let mut wrong = Vec::new();
        for (id, record) in records {
            let key = serde_json::from_value(record).map_err(RecordError::from);
            let key = key.and_then(|record: KeyRecord| match record.id == id {
                true => record.key(),
                false => Err(RecordError::OtherId),
            });
            match key {
                Ok(key) => drop(set.keys.insert(id.to_owned(), key)),
                Err(error) => wrong.push((id.to_owned(), error)),
            }
        }
        (set, wrong)
    }

    pub fn len(&self) -> usize {
        self.keys.len()
    }

    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Whose token it is. An unknown id costs what a known one does; only who holds the secret
    /// learns that a key has ended.
    pub(super) fn check(&self, token: &Token, now: Timestamp) -> Result<Principal, AdmitError> {
        // No token has this hash.
        const NONE: [u8; 32] = [0; 32];
        let key = self.keys.get(token.id());
        let expected = key.map_or(&NONE, |key| key.digest.as_bytes());
        let same = bool::from(token.digest().as_bytes().ct_eq(expected));
        match key {
            Some(key) if same => match key.expires_at {
                _ if key.revoked => Err(AdmitError::Revoked),
                Some(end) if end <= now => Err(AdmitError::Expired),
                _ => Ok(key.principal.clone()),
            },
            _ => Err(AdmitError::Unknown),
        }
    }
}

impl std::fmt::Debug for KeySet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} keys", self.keys.len())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn record(token: &Token) -> KeyRecord {
        KeyRecord {
            id: token.id().to_owned(),
            name: "ci".to_owned(),
            grants: vec![GrantRecord { role: Role::Predictor, models: vec!["a-*".to_owned()] }],
            digest: token.digest().to_string(),
            created_at: Timestamp::from_second(1_000).unwrap(),
            created_by: "cli:root".to_owned(),
            expires_at: None,
            revoked_at: None,
            revoked_by: None,
        }
    }

    #[test]
    fn a_record_is_read_as_it_was_written() {
        let token = Token::generate().unwrap();
        let record = record(&token);
        let json = serde_json::to_value(&record).unwrap();
        assert_eq!(serde_json::from_value::<KeyRecord>(json.clone()).unwrap(), record);
        assert!(!json.to_string().contains(&token.text().expose()[20..]), "the token is not kept");
        assert_eq!(record.public().get("digest"), None);
        assert_eq!(record.shown(), format!("tg_{}", record.id));
        assert_eq!(id_of(&record.shown()), record.id);
    }

    #[test]
    fn what_cannot_be_read_is_no_key() {
        let good = Token::generate().unwrap();
        let with = |member: &str, value: Value| {
            let token = Token::generate().unwrap();
            let mut json = serde_json::to_value(record(&token)).unwrap();
            json[member] = value;
            (token.id().to_owned(), json)
        };
        let bad = [
            with("digest", json!("sha256:00")),
            with("grants", json!([{"role": "root"}])),
            with("grants", json!([{"role": "viewer", "models": ["["]}])),
            with("grants", json!([{"role": "viewer", "only_on": "monday"}])),
            with("not_before", json!("2030-01-01T00:00:00Z")),
            with("expires_at", json!("tomorrow")),
            with("id", json!("0123456789abcdef")),
            ("x".to_owned(), json!(3)),
        ];
        let good_record = (good.id(), serde_json::to_value(record(&good)).unwrap());
        let records = bad.iter().map(|(id, json)| (id.as_str(), json.clone())).chain([good_record]);
        let (set, wrong) = KeySet::from_records(records);
        assert_eq!((set.len(), wrong.len()), (1, bad.len()));
        assert!(set.check(&good, Timestamp::now()).is_ok());
    }

    #[test]
    fn a_keys_end_is_told_to_its_owner_alone() {
        let token = Token::generate().unwrap();
        let end = Timestamp::from_second(2_000).unwrap();
        let before = Timestamp::from_second(1_999).unwrap();
        let mut kept = record(&token);
        kept.expires_at = Some(end);
        let set = |record: &KeyRecord| {
            let json = serde_json::to_value(record).unwrap();
            KeySet::from_records([(record.id.as_str(), json)]).0
        };
        let check = |record: &KeyRecord, token: &Token, now| {
            set(record).check(token, now).map(|principal| principal.name.to_string())
        };
        assert_eq!(check(&kept, &token, before), Ok("ci".to_owned()));
        assert_eq!(check(&kept, &token, end), Err(AdmitError::Expired));
        let guess = format!("tg_{}.{}", token.id(), "A".repeat(43));
        let guess = Token::parse(&guess).unwrap();
        assert_eq!(check(&kept, &guess, end), Err(AdmitError::Unknown));
        let revoked = KeyRecord { revoked_at: Some(before), ..kept.clone() };
        assert_eq!(check(&revoked, &token, before), Err(AdmitError::Revoked));
        assert_eq!(check(&revoked, &guess, before), Err(AdmitError::Unknown));
        assert_eq!(check(&kept, &Token::generate().unwrap(), before), Err(AdmitError::Unknown));
        let states = [kept.state(before), kept.state(end), revoked.state(end)];
        assert_eq!(states, [KeyState::Live, KeyState::Expired, KeyState::Revoked]);
    }

    #[test]
    fn names_cannot_be_taken_for_others() {
        for good in ["ci", "a", "jane.doe@example.com", "A_1-b"] {
            assert_eq!(check_name(good), Ok(()), "{good}");
        }
        for bad in ["", "cli:root", "a b", "é", "a\n", &"x".repeat(65)] {
            assert_eq!(check_name(bad), Err(KeyNameError), "{bad}");
        }
    }

    #[test]
    fn an_admin_has_no_limit() {
        let token = Token::generate().unwrap();
        let of = |role, models: &[&str]| {
            let models = models.iter().map(|text| (*text).to_owned()).collect();
            KeyRecord { grants: vec![GrantRecord { role, models }], ..record(&token) }.is_admin()
        };
        assert!(of(Role::Admin, &[]) && of(Role::Admin, &["*"]));
        assert!(!of(Role::Admin, &["iris"]) && !of(Role::Auditor, &[]));
    }
}
