//! Who signed a version: minisign signatures over `SHA256SUMS`.
//!
//! Invariants:
//! - With keys configured, a version counts as signed only when one of them signed exactly the list
//!   of digests that its files are held against.
//! - A signature that names a model or version in its trusted comment is good for that one only: an
//!   old signed version does not come back under a new number.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use minisign_verify::{PublicKey, Signature};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::lineage::short;
use crate::domain::{ModelName, Version};

/// Most keys.
const KEYS_MAX: usize = 64;
/// Largest file of keys.
const KEY_FILE_SIZE_MAX: u64 = 64 << 10;

/// Keys that versions must be signed with; none: signatures are not asked for.
#[derive(Clone, Default)]
pub struct TrustedKeys(Arc<[TrustedKey]>);

struct TrustedKey {
    id: String,
    key: PublicKey,
}

/// A good signature.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Signed {
    /// Id of the key, as minisign prints it.
    pub key: String,
    /// The comment that the signature covers.
    pub comment: String,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    #[error("'{0}' is no minisign public key")]
    Key(String),
    #[error("key file '{path}' {reason}")]
    KeyFile { path: String, reason: String },
    #[error("more than {KEYS_MAX} keys")]
    TooManyKeys,
    #[error("expected a minisign signature: {0}")]
    Syntax(String),
    #[error("no trusted key made it")]
    Unknown,
    #[error("it does not fit the list of digests")]
    Wrong,
    #[error("it is for {what} {signed}, not for {expected}")]
    Elsewhere { what: &'static str, signed: String, expected: String },
}

impl fmt::Debug for TrustedKeys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|key| &key.id)).finish()
    }
}

impl TrustedKeys {
    /// Reads keys, separated by commas: each the key itself in base64, or `file:PATH` of a file that
    /// minisign wrote.
    ///
    /// # Errors
    /// The first that is wrong.
    pub fn parse(text: &str) -> Result<Self, SignatureError> {
        let mut keys = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            match part.strip_prefix("file:") {
                None => keys.push(TrustedKey::parse(part)?),
                Some(path) => keys.extend(from_file(Path::new(path))?),
            }
            if keys.len() > KEYS_MAX {
                return Err(SignatureError::TooManyKeys);
            }
        }
        Ok(Self(keys.into()))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Holds a signature against the list that it is said to be of.
    pub(super) fn verify(
        &self,
        sums: &[u8],
        signature: &str,
        model: &ModelName,
        version: Version,
    ) -> Result<Signed, SignatureError> {
        let signature = Signature::decode(signature)
            .map_err(|error| SignatureError::Syntax(error.to_string()))?;
        let mut known = false;
        for trusted in self.0.iter() {
            match trusted.key.verify(sums, &signature, false) {
                Ok(()) => {
                    let comment = short(signature.trusted_comment());
                    bound(&comment, "model", model.as_str())?;
                    bound(&comment, "version", &version.to_string())?;
                    return Ok(Signed { key: trusted.id.clone(), comment });
                }
                Err(minisign_verify::Error::UnexpectedKeyId) => {}
                Err(_) => known = true,
            }
        }
        Err(if known { SignatureError::Wrong } else { SignatureError::Unknown })
    }
}

/// Whether the comment says nothing of `what`, or what is expected.
fn bound(comment: &str, what: &'static str, expected: &str) -> Result<(), SignatureError> {
    for word in comment.split_whitespace() {
        if let Some(signed) = word.strip_prefix(what).and_then(|rest| rest.strip_prefix('='))
            && signed != expected
        {
            let (signed, expected) = (signed.to_owned(), expected.to_owned());
            return Err(SignatureError::Elsewhere { what, signed, expected });
        }
    }
    Ok(())
}

impl TrustedKey {
    fn parse(text: &str) -> Result<Self, SignatureError> {
        let wrong = || SignatureError::Key(short(text).chars().take(64).collect());
        let key = PublicKey::from_base64(text).map_err(|_| wrong())?;
        let bytes = STANDARD.decode(text).map_err(|_| wrong())?;
        let id = bytes.get(2..10).ok_or_else(wrong)?;
        let id = id.iter().rev().map(|byte| format!("{byte:02X}")).collect();
        Ok(Self { id, key })
    }
}

fn from_file(path: &Path) -> Result<Vec<TrustedKey>, SignatureError> {
    let fault =
        |reason: String| SignatureError::KeyFile { path: path.display().to_string(), reason };
    let meta =
        std::fs::metadata(path).map_err(|error| fault(format!("cannot be read: {error}")))?;
    if meta.len() > KEY_FILE_SIZE_MAX {
        return Err(fault(format!("is larger than the limit of {KEY_FILE_SIZE_MAX} bytes")));
    }
    let text =
        std::fs::read_to_string(path).map_err(|error| fault(format!("cannot be read: {error}")))?;
    let lines = text.lines().map(str::trim);
    let keys = lines.filter(|line| !line.is_empty() && !line.contains("comment:"));
    let keys: Result<Vec<TrustedKey>, _> = keys.map(TrustedKey::parse).collect();
    let keys = keys?;
    match keys.is_empty() {
        true => Err(fault("has no key".to_owned())),
        false => Ok(keys),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Keys and signatures that minisign made, over the text `SIGNED`.
    pub(in crate::control) const SIGNED: &str = "test";
    const KEY: &str = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";
    const SIGNATURE: &str = "untrusted comment: signature from minisign secret key\n\
        RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=\n\
        trusted comment: timestamp:1633700835\tfile:test\tprehashed\n\
        wLMDjy9FLAuxZ3q4NlEvkgtyhrr0gtTu6KC4KBJdITbbOeAi1zBIYo0v4iTgt8jJpIidRJnp94ABQkJAgAooBQ==\n";
    const OTHER_KEY: &str = "RWSmKaOrT6m3TGwjwBovgOmlhSbyBUw3hyhnSOYruHXbJa36xHr8rq2M";

    fn verify(keys: &str, sums: &str, signature: &str) -> Result<Signed, SignatureError> {
        let keys = TrustedKeys::parse(keys).unwrap();
        keys.verify(sums.as_bytes(), signature, &"iris".parse().unwrap(), Version::new(3).unwrap())
    }

    #[test]
    fn a_signature_is_good_for_its_text_and_key_only() {
        let signed = verify(&format!("{OTHER_KEY}, {KEY}"), SIGNED, SIGNATURE).unwrap();
        assert_eq!(signed.key, "E7620F1842B4E81F");
        assert!(signed.comment.contains("file:test"));
        assert_eq!(verify(KEY, "tesT", SIGNATURE), Err(SignatureError::Wrong));
        assert_eq!(verify(OTHER_KEY, SIGNED, SIGNATURE), Err(SignatureError::Unknown));
        // The comment is signed too.
        let other_comment = SIGNATURE.replace("1633700835", "1633700836");
        assert_eq!(verify(KEY, SIGNED, &other_comment), Err(SignatureError::Wrong));
        for bad in ["", "untrusted comment: x\nAAAA", SIGNATURE.lines().next().unwrap()] {
            assert!(matches!(verify(KEY, SIGNED, bad), Err(SignatureError::Syntax(_))), "{bad}");
        }
    }

    #[test]
    fn a_comment_may_bind_a_signature() {
        let check =
            |comment: &str| bound(comment, "version", "3").and(bound(comment, "model", "iris"));
        for good in ["", "timestamp:1 file:x", "model=iris version=3", "modelled=x version=3"] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in ["version=2", "model=other", "model=iris\tversion=4", "version="] {
            assert!(matches!(check(bad), Err(SignatureError::Elsewhere { .. })), "{bad}");
        }
    }

    #[test]
    fn keys_come_as_text_or_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("minisign.pub");
        std::fs::write(&file, format!("untrusted comment: key\n{KEY}\n")).unwrap();
        let keys = TrustedKeys::parse(&format!("file:{},{OTHER_KEY}", file.display())).unwrap();
        assert_eq!(format!("{keys:?}"), r#"["E7620F1842B4E81F", "4CB7A94FABA329A6"]"#);
        assert!(TrustedKeys::parse("").unwrap().is_empty());
        for bad in ["nonsense", "file:/nonexistent", &KEY[1..]] {
            assert!(TrustedKeys::parse(bad).is_err(), "{bad}");
        }
    }
}
