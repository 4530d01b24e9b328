//! The keys that checkpoints are signed with.
//!
//! ```text
//! <state>/ledger/keys/0001.pub         verifier keys, a line for each log
//!                     0002.key         private key of who signs now (PKCS #8, PEM, 0600)
//!                     0002.pub
//!                     0002.announced   the log has a record of it
//! ```
//!
//! One key pair signs for all logs of a state folder, in the name of each: a verifier key is the
//! log's origin, the key's id and the key, as C2SP `signed-note` writes it. A rotation adds a pair.
//! Each log's next checkpoint is signed by both and names the new one; then the old private key is
//! destroyed, and its public half stays.
//!
//! Invariants:
//! - A private key is in one file, which only this user can read, and in no log, error or debug
//!   output.
//! - Whoever trusts a public key can follow every rotation after it from the checkpoints alone.

use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair as _, UnparsedPublicKey};
use sha2::{Digest as _, Sha256};

use super::checkpoint::origin;
use super::durable::{self, PRIVATE, PUBLIC};
use super::{ADMIN, FEEDBACK, KEYS, PREDICTIONS};

/// Algorithm of a verifier key: Ed25519.
const ALGORITHM: u8 = 1;
/// All of a private key's PKCS #8 but its 32 bytes.
const PKCS8: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
const PEM_START: &str = "-----BEGIN PRIVATE KEY-----";
const PEM_END: &str = "-----END PRIVATE KEY-----";
/// More than a file of keys has.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Logs that a key signs for.
pub const LOGS: [&str; 3] = [PREDICTIONS, ADMIN, FEEDBACK];

/// First bytes of the hash of a key and its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KeyId(pub [u8; 4]);

impl std::fmt::Display for KeyId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What a log's signatures are checked with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VerifierKey {
    pub name: String,
    pub id: KeyId,
    public: [u8; 32],
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no verifier key: expected name+id+base64 of an Ed25519 key, {0}")]
pub struct KeyError(&'static str);

impl VerifierKey {
    pub fn new(name: &str, public: [u8; 32]) -> Self {
        let hash = Sha256::new()
            .chain_update(name)
            .chain_update([b'\n', ALGORITHM])
            .chain_update(public)
            .finalize();
        let mut id = [0; 4];
        id.copy_from_slice(&hash[..4]);
        Self { name: name.to_owned(), id: KeyId(id), public }
    }

    pub fn verify(&self, message: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.public).verify(message, signature).is_ok()
    }
}

impl std::fmt::Display for VerifierKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let key = STANDARD.encode([&[ALGORITHM], &self.public[..]].concat());
        write!(f, "{}+{}+{key}", self.name, self.id)
    }
}

impl std::str::FromStr for VerifierKey {
    type Err = KeyError;

    fn from_str(text: &str) -> Result<Self, KeyError> {
        // The key's base64 may have a `+`; the name and the id have none.
        let mut parts = text.splitn(3, '+');
        let (Some(name), Some(id), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(KeyError("its parts are not there"));
        };
        if name.is_empty() || name.contains(char::is_whitespace) {
            return Err(KeyError("its name is none"));
        }
        let key = STANDARD.decode(key).map_err(|_| KeyError("the last part is no base64"))?;
        let public = match key.split_first() {
            Some((&ALGORITHM, public)) => public.try_into().ok(),
            _ => return Err(KeyError("the key is of another kind")),
        };
        let key = Self::new(name, public.ok_or(KeyError("the key has another length"))?);
        match key.id.to_string() == id {
            true => Ok(key),
            false => Err(KeyError("the id is not that of the key")),
        }
    }
}

/// Reads a file with a verifier key on each line; empty lines and such with `#` are skipped.
///
/// # Errors
/// When it cannot be read, or has something else, or nothing.
pub fn read_public(file: &Path) -> io::Result<Vec<VerifierKey>> {
    let text = read(file)?;
    let lines =
        text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    let keys: Vec<VerifierKey> =
        lines.map(str::parse).collect::<Result<_, _>>().map_err(io::Error::other)?;
    match keys.is_empty() {
        true => Err(io::Error::other("no key in it")),
        false => Ok(keys),
    }
}

fn read(file: &Path) -> io::Result<String> {
    use std::io::Read as _;
    let mut text = String::new();
    std::fs::File::open(file)?.take(FILE_BYTES_MAX).read_to_string(&mut text)?;
    Ok(text)
}

/// Every public key that a ledger ever signed with, as its own folder has them, the newest last.
///
/// # Errors
/// When one cannot be read.
pub fn published(ledger: &Path) -> io::Result<Vec<VerifierKey>> {
    let mut keys = Vec::new();
    for serial in serials(&ledger.join(KEYS), "pub")? {
        keys.extend(read_public(&path(&ledger.join(KEYS), serial, "pub"))?);
    }
    Ok(keys)
}

/// Signs checkpoints.
pub struct SigningKey {
    pair: Ed25519KeyPair,
    public: [u8; 32],
    seed: [u8; 32],
}

impl std::fmt::Debug for SigningKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SigningKey").finish_non_exhaustive()
    }
}

impl SigningKey {
    /// # Errors
    /// When there is no randomness.
    pub fn generate() -> io::Result<Self> {
        let mut seed = [0; 32];
        getrandom::fill(&mut seed).map_err(io::Error::other)?;
        Self::of(seed)
    }

    fn of(seed: [u8; 32]) -> io::Result<Self> {
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed);
        let pair = pair.map_err(|_| io::Error::other("no Ed25519 key"))?;
        let public = pair.public_key().as_ref().try_into().map_err(io::Error::other)?;
        Ok(Self { pair, public, seed })
    }

    fn from_pem(text: &str) -> io::Result<Self> {
        let wrong = || io::Error::other("not a private Ed25519 key (PKCS #8, PEM)");
        let body = text.trim().strip_prefix(PEM_START).and_then(|rest| rest.strip_suffix(PEM_END));
        let encoded: String = body.ok_or_else(wrong)?.split_whitespace().collect();
        let bytes = STANDARD.decode(encoded).map_err(|_| wrong())?;
        let seed = bytes.strip_prefix(&PKCS8).and_then(|seed| seed.try_into().ok());
        Self::of(seed.ok_or_else(wrong)?)
    }

    fn pem(&self) -> String {
        let encoded = STANDARD.encode([&PKCS8[..], &self.seed].concat());
        format!("{PEM_START}\n{encoded}\n{PEM_END}\n")
    }

    pub fn sign(&self, message: &[u8]) -> Vec<u8> {
        self.pair.sign(message).as_ref().to_vec()
    }

    /// What its signatures in this name are checked with.
    pub fn verifier(&self, name: &str) -> VerifierKey {
        VerifierKey::new(name, self.public)
    }
}

/// The keys of a ledger that is written here.
#[derive(Debug)]
pub struct Keys {
    folder: PathBuf,
    writer: String,
    current: (u32, SigningKey),
    /// Signs along until each log has a checkpoint by both.
    previous: Option<(u32, SigningKey)>,
}

#[derive(Debug, thiserror::Error)]
pub enum KeysError {
    #[error("{}: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
    #[error("the last rotation is not through with every log yet; try again in a while")]
    Rotating,
}

impl Keys {
    /// Opens the keys of a ledger, and makes the first one if there is none.
    ///
    /// # Errors
    /// When a key cannot be read or made.
    pub fn open(ledger: &Path, writer: impl std::fmt::Display) -> Result<Self, KeysError> {
        let (folder, writer) = (ledger.join(KEYS), writer.to_string());
        let at = |path: &Path, error| KeysError::Io { path: path.to_owned(), error };
        private_folder(&folder).map_err(|error| at(&folder, error))?;
        let mut serials = serials(&folder, "key").map_err(|error| at(&folder, error))?;
        let load = |serial| {
            let path = path(&folder, serial, "key");
            let key = read(&path).and_then(|text| SigningKey::from_pem(&text));
            key.map(|key| (serial, key)).map_err(|error| at(&path, error))
        };
        let current = match serials.pop() {
            Some(serial) => load(serial)?,
            None => make(&folder, &writer, 1)?,
        };
        let previous = serials.pop().map(load).transpose()?;
        // The public half, should the last process have ended between the two.
        let keys = Self { folder, writer, current, previous };
        keys.publish().map_err(|error| at(&keys.folder, error))?;
        Ok(keys)
    }

    fn publish(&self) -> io::Result<()> {
        let path = path(&self.folder, self.current.0, "pub");
        match path.exists() {
            true => Ok(()),
            false => {
                durable::replace(&path, PUBLIC, public(&self.current.1, &self.writer).as_bytes())
            }
        }
    }

    /// Who signs, the newest first.
    pub fn signing(&self) -> &SigningKey {
        &self.current.1
    }

    /// Who signed before, while there is a log that does not say so yet.
    pub fn previous(&self) -> Option<&SigningKey> {
        self.previous.as_ref().map(|(_, key)| key)
    }

    /// Makes a new key that signs from now on.
    ///
    /// # Errors
    /// When it cannot be made, or the last rotation is not through.
    pub fn rotate(&mut self) -> Result<(), KeysError> {
        if self.previous.is_some() {
            return Err(KeysError::Rotating);
        }
        let new = make(&self.folder, &self.writer, self.current.0 + 1)?;
        self.previous = Some(std::mem::replace(&mut self.current, new));
        Ok(())
    }

    /// Destroys the private key of who signed before.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn retire(&mut self) -> Result<(), KeysError> {
        let Some((serial, _)) = &self.previous else { return Ok(()) };
        let path = path(&self.folder, *serial, "key");
        destroy(&path).map_err(|error| KeysError::Io { path, error })?;
        self.previous = None;
        Ok(())
    }

    /// Whether the log has a record of the key that signs.
    pub fn announced(&self) -> bool {
        path(&self.folder, self.current.0, "announced").exists()
    }

    /// Remembers that it has.
    ///
    /// # Errors
    /// When it cannot.
    pub fn set_announced(&self) -> Result<(), KeysError> {
        let path = path(&self.folder, self.current.0, "announced");
        durable::replace(&path, PUBLIC, b"").map_err(|error| KeysError::Io { path, error })
    }

    /// The verifier keys of who signs, one for each log.
    pub fn public(&self) -> Vec<String> {
        public(&self.current.1, &self.writer).lines().map(ToOwned::to_owned).collect()
    }

    /// Number of the key that signs.
    pub fn serial(&self) -> u32 {
        self.current.0
    }
}

/// Makes the folder of keys, for this user alone.
pub(super) fn private_folder(folder: &Path) -> io::Result<()> {
    use std::os::unix::fs::DirBuilderExt as _;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    durable::sync_folder_of(folder)
}

fn make(folder: &Path, writer: &str, serial: u32) -> Result<(u32, SigningKey), KeysError> {
    let made = SigningKey::generate().and_then(|key| {
        let public = public(&key, writer);
        durable::replace(&path(folder, serial, "key"), PRIVATE, key.pem().as_bytes())?;
        durable::replace(&path(folder, serial, "pub"), PUBLIC, public.as_bytes())?;
        Ok((serial, key))
    });
    made.map_err(|error| KeysError::Io { path: folder.to_owned(), error })
}

fn public(key: &SigningKey, writer: &str) -> String {
    LOGS.iter().map(|log| format!("{}\n", key.verifier(&origin(writer, log)))).collect()
}

/// Overwrites a secret where it lies, and removes its file. What a file system keeps elsewhere
/// (snapshots, copies on write) is out of reach.
fn destroy(path: &Path) -> io::Result<()> {
    use std::io::Write as _;
    let mut file = std::fs::OpenOptions::new().write(true).open(path)?;
    let len = usize::try_from(file.metadata()?.len()).unwrap_or(0);
    file.write_all(&vec![0; len])?;
    file.sync_all()?;
    std::fs::remove_file(path)?;
    durable::sync_folder_of(path)
}

fn path(folder: &Path, serial: u32, extension: &str) -> PathBuf {
    folder.join(format!("{serial:04}.{extension}"))
}

/// Numbers of the keys that have such a file, in order.
fn serials(folder: &Path, extension: &str) -> io::Result<Vec<u32>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|of| of == extension) {
            found.extend(path.file_stem().and_then(|stem| stem.to_str()?.parse::<u32>().ok()));
        }
    }
    found.sort_unstable();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn a_verifier_key_comes_back() {
        let key = SigningKey::generate().unwrap().verifier("tidegate/0011/admin");
        assert_eq!(key.to_string().parse(), Ok(key.clone()));
        let bent = key.to_string().replace("admin", "edmin");
        assert!(bent.parse::<VerifierKey>().is_err());
        for wrong in ["", "a", "a+b", "a+00000000+AA==", "+00000000+AA=="] {
            assert!(wrong.parse::<VerifierKey>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn keys_are_made_once_and_rotated() {
        let ledger = tempfile::tempdir().unwrap();
        let first = Keys::open(ledger.path(), "0011").unwrap().public();
        let mut keys = Keys::open(ledger.path(), "0011").unwrap();
        assert_eq!(keys.public(), first);
        let secret = ledger.path().join("keys/0001.key");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&secret), mode(&ledger.path().join(KEYS))), (0o600, 0o700));
        assert!(!format!("{keys:?}").contains(&STANDARD.encode(keys.current.1.seed)[..8]));
        keys.rotate().unwrap();
        assert!(matches!(keys.rotate(), Err(KeysError::Rotating)));
        assert_ne!(keys.public(), first);
        // Not through: both are there after a restart too.
        let mut keys = Keys::open(ledger.path(), "0011").unwrap();
        assert!(keys.previous().is_some());
        keys.retire().unwrap();
        assert!(!secret.exists());
        let keys = Keys::open(ledger.path(), "0011").unwrap();
        assert!(keys.previous().is_none() && keys.serial() == 2);
        let published: Vec<String> =
            published(ledger.path()).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(published, [first, keys.public()].concat());
    }
}
