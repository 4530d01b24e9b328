//! Secrets, named by where they are and never by what they are.
//!
//! Invariants:
//! - Configuration holds references only: `env:NAME` or `file:PATH`.
//! - A secret is read when it is used, so one that was replaced counts from the next use.
//! - Nothing of a secret, nor of a text that was meant to be a reference and is none, is printed.

use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::str::FromStr;

/// Largest secret; certificates and service accounts are a few KiB.
const SECRET_SIZE_MAX: u64 = 64 << 10;

/// A secret in memory. `Debug` prints nothing of it.
#[derive(Clone)]
pub struct Secret(Box<str>);

impl Secret {
    pub fn new(text: impl Into<Box<str>>) -> Self {
        Self(text.into())
    }

    /// The secret itself: for the wire and the comparison, never for a message.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Where a secret is.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum SecretRef {
    /// A variable of the process's environment.
    Env(String),
    /// A file, without its last line's end.
    File(PathBuf),
}

/// The text is not repeated: it may be the secret itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected a reference, env:NAME or file:PATH")]
pub struct NoReference;

#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("environment variable {name} is not set, or empty")]
    Unset { name: String },
    #[error("secret file '{}' cannot be read: {error}", path.display())]
    Unreadable { path: PathBuf, error: std::io::Error },
    #[error("secret file '{}' is empty", path.display())]
    Empty { path: PathBuf },
    #[error("secret file '{}' is larger than the limit of {SECRET_SIZE_MAX} bytes", path.display())]
    TooLarge { path: PathBuf },
}

impl FromStr for SecretRef {
    type Err = NoReference;

    fn from_str(text: &str) -> Result<Self, NoReference> {
        if let Some(path) = text.strip_prefix("file:") {
            return match path.is_empty() {
                true => Err(NoReference),
                false => Ok(Self::File(path.into())),
            };
        }
        let name = text.strip_prefix("env:").ok_or(NoReference)?;
        let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
        let starts = name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
        match plain && starts {
            true => Ok(Self::Env(name.to_owned())),
            false => Err(NoReference),
        }
    }
}

impl fmt::Display for SecretRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Env(name) => write!(f, "env:{name}"),
            Self::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

impl SecretRef {
    /// Reads the secret now.
    ///
    /// # Errors
    /// When it is not there, empty, or too large.
    pub fn read(&self) -> Result<Secret, SecretError> {
        match self {
            Self::Env(name) => match std::env::var(name) {
                Ok(text) if !text.is_empty() => Ok(Secret::new(text)),
                _ => Err(SecretError::Unset { name: name.clone() }),
            },
            Self::File(path) => {
                let unreadable = |error| SecretError::Unreadable { path: path.clone(), error };
                let file = std::fs::File::open(path).map_err(unreadable)?;
                let mut text = String::new();
                let read =
                    file.take(SECRET_SIZE_MAX + 1).read_to_string(&mut text).map_err(unreadable)?;
                if u64::try_from(read).is_ok_and(|read| read > SECRET_SIZE_MAX) {
                    return Err(SecretError::TooLarge { path: path.clone() });
                }
                let text = text.strip_suffix('\n').unwrap_or(&text);
                let text = text.strip_suffix('\r').unwrap_or(text);
                match text.is_empty() {
                    true => Err(SecretError::Empty { path: path.clone() }),
                    false => Ok(Secret::new(text)),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reference_says_where_and_nothing_else() {
        assert_eq!("env:A_1".parse(), Ok(SecretRef::Env("A_1".to_owned())));
        assert_eq!("file:/run/x".parse(), Ok(SecretRef::File("/run/x".into())));
        for bad in ["", "env:", "env:1A", "env:A B", "file:", "hunter2", "ENV:A"] {
            let error = bad.parse::<SecretRef>().unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_file_is_read_anew_each_time_and_not_shown() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("token");
        let reference = SecretRef::File(path.clone());
        assert!(matches!(reference.read(), Err(SecretError::Unreadable { .. })));
        std::fs::write(&path, "first\r\n").unwrap();
        assert_eq!(reference.read().unwrap().expose(), "first");
        std::fs::write(&path, "second").unwrap();
        let secret = reference.read().unwrap();
        assert_eq!(secret.expose(), "second");
        assert!(!format!("{secret:?} {reference:?} {reference}").contains("second"));
        std::fs::write(&path, "\n").unwrap();
        assert!(matches!(reference.read(), Err(SecretError::Empty { .. })));
        std::fs::write(&path, "x".repeat(70_000)).unwrap();
        assert!(matches!(reference.read(), Err(SecretError::TooLarge { .. })));
        let unset = SecretRef::Env("TIDEGATE_NO_SUCH_VARIABLE".to_owned());
        assert!(matches!(unset.read(), Err(SecretError::Unset { .. })));
    }
}
