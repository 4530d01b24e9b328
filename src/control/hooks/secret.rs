//! A secret that is kept elsewhere: named in the configuration, read when it is used.
//!
//! Read each time, so that a file that is replaced counts from the next delivery on.

use std::fmt;
use std::io::Read as _;
use std::path::PathBuf;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

/// Fewest bytes of a secret.
const SECRET_LEN_MIN: usize = 16;
/// Most bytes of a secret.
const SECRET_LEN_MAX: usize = 4096;

/// Where a secret is kept: `env:NAME` or `file:/path`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SecretRef {
    Env(String),
    File(PathBuf),
}

#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("expected 'env:NAME' or 'file:/path', and never the secret itself")]
    Form,
    #[error("environment variable {0} is not set, or is no text")]
    Variable(String),
    #[error("cannot read {path}: {error}")]
    File { path: PathBuf, error: std::io::Error },
    #[error("expected {SECRET_LEN_MIN} to {SECRET_LEN_MAX} bytes, got {got}")]
    Length { got: usize },
    #[error("begins with 'whsec_', and base64 does not follow")]
    Base64,
}

impl FromStr for SecretRef {
    type Err = SecretError;

    fn from_str(text: &str) -> Result<Self, SecretError> {
        match text.split_once(':') {
            Some(("env", name)) if !name.is_empty() => Ok(Self::Env(name.to_owned())),
            Some(("file", path)) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(SecretError::Form),
        }
    }
}

impl SecretRef {
    /// # Errors
    /// When it is not there, or cannot be a secret.
    pub fn read(&self) -> Result<Secret, SecretError> {
        let bytes = match self {
            Self::Env(name) => std::env::var(name)
                .map_err(|_| SecretError::Variable(name.clone()))?
                .into_bytes(),
            Self::File(path) => {
                let unread = |error| SecretError::File { path: path.clone(), error };
                let mut bytes = Vec::new();
                let file = std::fs::File::open(path).map_err(unread)?;
                let most = SECRET_LEN_MAX as u64 + 2;
                file.take(most).read_to_end(&mut bytes).map_err(unread)?;
                bytes
            }
        };
        // Editors end files with a line.
        let bytes = bytes.trim_ascii_end();
        let bytes = match bytes.strip_prefix(b"whsec_") {
            Some(encoded) => STANDARD.decode(encoded).map_err(|_| SecretError::Base64)?,
            None => bytes.to_vec(),
        };
        if !(SECRET_LEN_MIN..=SECRET_LEN_MAX).contains(&bytes.len()) {
            return Err(SecretError::Length { got: bytes.len() });
        }
        Ok(Secret(bytes))
    }
}

/// Key of the signatures.
pub struct Secret(Vec<u8>);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

impl Secret {
    /// The value of `webhook-signature`.
    pub(super) fn sign(&self, id: &str, timestamp: &str, body: &[u8]) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.0).expect("a key may have any length");
        for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
            mac.update(part);
        }
        format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[u8]) -> (tempfile::NamedTempFile, SecretRef) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), content).unwrap();
        let secret = format!("file:{}", file.path().display()).parse().unwrap();
        (file, secret)
    }

    #[test]
    fn a_signature_is_the_one_of_the_standard() {
        // The example of the Standard Webhooks specification.
        let (_file, secret) = file(b"whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD\n");
        let signed = secret.read().unwrap().sign(
            "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk",
            "1649367553",
            br#"{"email":"test@example.com","username":"test_user"}"#,
        );
        assert_eq!(signed, "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=");
    }

    #[test]
    fn a_secret_is_named_and_never_shown() {
        for wrong in ["", "hunter2hunter2hunter2", "env:", "file:", "vault:x"] {
            let error = wrong.parse::<SecretRef>().unwrap_err().to_string();
            assert!(wrong.is_empty() || !error.contains(wrong), "{error}");
        }
        let (file, secret) = file(b"0123456789abcdef\n");
        assert_eq!(format!("{:?}", secret.read().unwrap()), "Secret");
        std::fs::write(file.path(), b"short").unwrap();
        assert!(matches!(secret.read(), Err(SecretError::Length { got: 5 })));
        std::fs::write(file.path(), [b'x'; 5000]).unwrap();
        assert!(matches!(secret.read(), Err(SecretError::Length { got: 4098 })));
        std::fs::write(file.path(), b"whsec_!").unwrap();
        assert!(matches!(secret.read(), Err(SecretError::Base64)));
        drop(file);
        assert!(matches!(secret.read(), Err(SecretError::File { .. })));
        let unset: SecretRef = "env:TIDEGATE_TEST_NO_SUCH_SECRET".parse().unwrap();
        assert!(matches!(unset.read(), Err(SecretError::Variable(_))));
    }
}
