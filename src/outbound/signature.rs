//! The signature of a webhook, as Standard Webhooks has it.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use crate::secret::Secret;

/// Fewest bytes of a key: 128 bits.
const KEY_LEN_MIN: usize = 16;
/// Begins a key that is written in base64.
const ENCODED: &str = "whsec_";

/// What signatures are made with.
pub struct Key(Vec<u8>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    #[error("begins with '{ENCODED}', and base64 does not follow")]
    Base64,
    #[error("expected at least {KEY_LEN_MIN} bytes, got {got}")]
    TooShort { got: usize },
}

impl Key {
    /// # Errors
    /// For one that is too short to be a secret.
    pub fn of(secret: &Secret) -> Result<Self, KeyError> {
        let text = secret.expose();
        let bytes = match text.strip_prefix(ENCODED) {
            Some(encoded) => STANDARD.decode(encoded).map_err(|_| KeyError::Base64)?,
            None => text.as_bytes().to_vec(),
        };
        match bytes.len() {
            got @ 0..KEY_LEN_MIN => Err(KeyError::TooShort { got }),
            _ => Ok(Self(bytes)),
        }
    }

    /// The value of `webhook-signature`.
    pub fn sign(&self, id: &str, timestamp: &str, body: &[u8]) -> String {
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

    #[test]
    fn a_signature_is_the_one_of_the_standard() {
        // The example of the Standard Webhooks specification.
        let key = Key::of(&Secret::new("whsec_C2FVsBQIhrscChlQIMV+b5sSYspob7oD")).unwrap();
        let signed = key.sign(
            "msg_27UH4WbU6Z5A5EzD8u03UvzRbpk",
            "1649367553",
            br#"{"email":"test@example.com","username":"test_user"}"#,
        );
        assert_eq!(signed, "v1,tZ1I4/hDygAJgO5TYxiSd6Sd0kDW6hPenDe+bTa3Kkw=");
    }

    #[test]
    fn a_key_is_long_enough_or_none() {
        assert!(Key::of(&Secret::new("0123456789abcdef")).is_ok());
        let of = |text: &str| Key::of(&Secret::new(text)).err();
        assert_eq!(of("0123456789abcde"), Some(KeyError::TooShort { got: 15 }));
        assert_eq!(of("whsec_MDEyMzQ1Njc4OQ=="), Some(KeyError::TooShort { got: 10 }));
        assert_eq!(of("whsec_!"), Some(KeyError::Base64));
    }
}
