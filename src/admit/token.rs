//! Tokens: `tg_<id>.<secret>`.
//!
//! The id says which key is meant and is no secret: it stands in lists and in the journal. Both
//! have a fixed form, so that scanners of leaked secrets find a token by a pattern:
//! `tg_[0-9a-f]{16}\.[A-Za-z0-9_-]{43}`.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use sha2::{Digest as _, Sha256};

use super::Secret;
use crate::domain::Digest;

const PREFIX: &str = "tg_";
/// Hexadecimal digits: 64 bits, so that two keys never meet.
const ID_LEN: usize = 16;
/// Characters of 256 random bits.
const SECRET_LEN: usize = 43;
const SECRET_BYTES: usize = 32;
const LEN: usize = PREFIX.len() + ID_LEN + 1 + SECRET_LEN;

/// A token whose form is right; whether it is any key's is another question.
#[derive(Clone)]
pub struct Token {
    text: Secret<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    #[error("a token is expected to look like tg_<16 hexadecimal digits>.<43 characters>")]
    Malformed,
    #[error("the operating system gave no random bytes")]
    NoRandomness,
}

impl Token {
    /// A new one.
    ///
    /// # Errors
    /// When there is no randomness to be had.
    pub fn generate() -> Result<Self, TokenError> {
        let mut bytes = [0; ID_LEN / 2 + SECRET_BYTES];
        getrandom::fill(&mut bytes).map_err(|_| TokenError::NoRandomness)?;
        let (id, secret) = bytes.split_at(ID_LEN / 2);
        let id: String = id.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = format!("{PREFIX}{id}.{}", URL_SAFE_NO_PAD.encode(secret));
        Ok(Self { text: Secret::new(text) })
    }

    /// # Errors
    /// For every other form.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let id = |byte: u8| matches!(byte, b'0'..=b'9' | b'a'..=b'f');
        let secret = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
        let right = text.len() == LEN
            && text.strip_prefix(PREFIX).and_then(|rest| rest.split_once('.')).is_some_and(
                |(first, second)| {
                    first.len() == ID_LEN && first.bytes().all(id) && second.bytes().all(secret)
                },
            );
        match right {
            true => Ok(Self { text: Secret::new(text.to_owned()) }),
            false => Err(TokenError::Malformed),
        }
    }

    /// Which key it says it is.
    pub fn id(&self) -> &str {
        &self.text.expose()[PREFIX.len()..PREFIX.len() + ID_LEN]
    }

    /// What is kept of it.
    pub fn digest(&self) -> Digest {
        Digest::new(Sha256::digest(self.text.expose().as_bytes()).into())
    }

    /// All of it, to be shown to its owner once.
    pub fn text(&self) -> &Secret<String> {
        &self.text
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{}.(secret)", self.id())
    }
}

/// What of a token may be shown: `tg_<id>`.
pub(super) fn shown(id: &str) -> String {
    format!("{PREFIX}{id}")
}

/// An id as people copy it: with the prefix or without.
pub(super) fn id_of(text: &str) -> &str {
    text.strip_prefix(PREFIX).unwrap_or(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn tokens_have_one_form() {
        let token = Token::generate().unwrap();
        let text = token.text().expose().clone();
        assert_eq!(text.len(), 63);
        let again = Token::parse(&text).unwrap();
        assert_eq!((again.id(), again.digest()), (token.id(), token.digest()));
        assert_ne!(Token::generate().unwrap().digest(), token.digest());
        assert!(!format!("{token:?}").contains(&text[20..]), "{token:?}");
        let changed = [
            text.to_uppercase(),
            format!("{text} "),
            format!(" {text}"),
            text.replace("tg_", "tg-"),
            text.replace('.', "_"),
            text[..62].to_owned(),
            format!("{}=", &text[..62]),
            format!("{}é", &text[..61]),
            format!("tg_.{}", "a".repeat(59)),
            "x".repeat(8 << 10),
            String::new(),
        ];
        for text in changed {
            assert_eq!(Token::parse(&text).err(), Some(TokenError::Malformed), "{text}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read_or_refused(text in "(tg_)?[0-9a-f.]{0,20}\\.?\\PC{0,60}") {
            if let Ok(token) = Token::parse(&text) {
                prop_assert_eq!(token.id().len(), 16);
            }
        }
    }
}
