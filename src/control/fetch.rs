//! Private, verified copies of models, named by what they hold.
//!
//! ```text
//! <state>/cache/models/<digest>/model.onnx, external data beside it
//! <state>/cache/external/<digest of the model file>.json   which files it names
//! ```
//!
//! Invariants:
//! - A folder under `models` is complete and was written by us: filled aside, synced, renamed.
//! - What is loaded has the digest that it is named by, checked once per process.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use sha2::{Digest as _, Sha256};

use super::confined::{ConfineError, Folder, check_relative};
use super::signature::{SignatureError, Signed, TrustedKeys};
use super::source::{SIGNATURE_FILE, SUMS_FILE};
use super::sweep::touch;
use crate::domain::{Digest, ModelName, Version};

/// Folder of the copies in the state's.
const CACHE: &str = "cache";
/// Name of the model file in every copy.
pub(super) const MODEL_FILE: &str = "model.onnx";
const SUMS_SIZE_MAX: u64 = 1 << 20;
/// A signature has four lines.
const SIGNATURE_SIZE_MAX: u64 = 16 << 10;
/// Most files of external data.
const EXTERNAL_FILES_MAX: usize = 1024;
const COPY_BUFFER: usize = 1 << 18;

#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("'{name}' {source}")]
    Refused { name: String, source: ConfineErrorText },
    #[error("external data '{name}' {source}")]
    External { name: String, source: ConfineErrorText },
    #[error("the model has {got} files of external data, the limit is {EXTERNAL_FILES_MAX}")]
    TooManyFiles { got: usize },
    #[error("the model has more than the limit of {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("'{name}' is empty, expected an ONNX model")]
    Empty { name: String },
    #[error("'{name}' has sha256 {got}, SHA256SUMS says {expected}")]
    Sum { name: String, expected: String, got: String },
    #[error("'{name}' is not listed in SHA256SUMS")]
    NotListed { name: String },
    #[error("SHA256SUMS line {line}: expected 64 hexadecimal digits, two blanks and a file name")]
    SumsSyntax { line: usize },
    /// Keys are configured and the version does not show that one of them was used.
    #[error("it is not signed: there is no {missing}, and repository.trusted_keys asks for it")]
    Unsigned { missing: &'static str },
    #[error("{SIGNATURE_FILE}: {0}")]
    Signature(SignatureError),
    #[error("'{name}' changed while it was read")]
    Changed { name: String },
    /// The model file could not be read for the names of its external data.
    #[error("{0}")]
    Unreadable(String),
    #[error("could not copy the model: {0}")]
    Io(#[from] io::Error),
}

/// Why a file was refused, as text: the reasons themselves are private to this module.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct ConfineErrorText(String);

impl From<ConfineError> for ConfineErrorText {
    fn from(error: ConfineError) -> Self {
        Self(error.to_string())
    }
}

/// A complete copy.
#[derive(Clone, Debug)]
pub(super) struct Fetched {
    pub(super) digest: Digest,
    pub(super) model: PathBuf,
    /// All files together.
    pub(super) size: u64,
    /// Who signed it; `None` when nobody was asked for.
    pub(super) signed: Option<Signed>,
}

/// What is to be fetched from a version's folder, and on which conditions.
#[derive(Clone, Copy)]
pub(super) struct Wanted<'a> {
    pub(super) model: &'a ModelName,
    pub(super) version: Version,
    pub(super) model_file: &'a str,
    pub(super) size_max: u64,
    pub(super) trusted: &'a TrustedKeys,
}

pub(super) struct Cache {
    root: PathBuf,
    verified: Mutex<HashSet<[u8; 32]>>,
    next: AtomicU64,
}

/// One opened source file.
struct Source {
    /// Its path in the copy.
    name: String,
    file: File,
    sha256: [u8; 32],
    size: u64,
}

impl Cache {
    pub(super) fn open(state_dir: &Path) -> io::Result<Self> {
        let root = state_dir.join(CACHE);
        let cache = Self { root, verified: Mutex::default(), next: AtomicU64::new(0) };
        for folder in ["models", "external", "probe", "derived", "tmp"] {
            make_folder(&cache.root.join(folder))?;
        }
        Ok(cache)
    }

    /// A copy of this digest will be removed.
    pub(super) fn forget(&self, hex_digest: &str) {
        self.verified.lock().retain(|digest| hex(digest) != hex_digest);
    }

    pub(super) fn folder(&self, kind: &str) -> PathBuf {
        self.root.join(kind)
    }

    /// A fresh folder that is removed when dropped.
    pub(super) fn staging(&self) -> io::Result<Staging> {
        let number = self.next.fetch_add(1, Ordering::Relaxed);
        let path = self.root.join("tmp").join(format!("{}-{number}", std::process::id()));
        // Left by a process that died and had our number.
        ignore_missing(fs::remove_dir_all(&path))?;
        make_folder(&path)?;
        Ok(Staging { path })
    }

    /// Copies a version's files unless a copy is there. `external` gives the names of external
    /// data that a model file holds; it is asked once per content.
    pub(super) fn fetch(
        &self,
        version: &Folder,
        wanted: &Wanted<'_>,
        external: &dyn Fn(&Path) -> Result<BTreeSet<String>, String>,
    ) -> Result<Fetched, FetchError> {
        let (model_file, size_max) = (wanted.model_file, wanted.size_max);
        let sums = Sums::read(version, wanted)?;
        let refused = |source: ConfineError| FetchError::Refused {
            name: model_file.to_owned(),
            source: source.into(),
        };
        let file = version.file(model_file).map_err(refused)?;
        let mut model = Source::open(MODEL_FILE.to_owned(), file, size_max)?;
        if model.size == 0 {
            return Err(FetchError::Empty { name: model_file.to_owned() });
        }
        sums.check(model_file, &model.sha256)?;
        let staging = self.staging()?;
        let names = self.external_names(&mut model, &staging, external)?;
        let mut left = size_max.saturating_sub(model.size);
        let mut sources = vec![model];
        for name in names {
            let source = open_external(version, &name, left, size_max)?;
            sums.check(&name, &source.sha256)?;
            left -= source.size;
            sources.push(source);
        }
        let signed = sums.signed;
        Ok(Fetched { signed, ..self.keep(sources, &staging)? })
    }

    /// The copy with this digest, if it is there and still holds what it is named by.
    pub(super) fn recall(&self, digest: &Digest) -> Result<Option<Fetched>, FetchError> {
        let Some(fetched) = copy_at(&self.root, digest)? else { return Ok(None) };
        let mut verified = self.verified.lock();
        verified.insert(*digest.as_bytes());
        fetched.model.parent().map(touch);
        Ok(Some(fetched))
    }

    fn external_names(
        &self,
        model: &mut Source,
        staging: &Staging,
        external: &dyn Fn(&Path) -> Result<BTreeSet<String>, String>,
    ) -> Result<Vec<String>, FetchError> {
        let known = self.root.join("external").join(hex(&model.sha256) + ".json");
        if let Ok(text) = fs::read(&known)
            && let Ok(names) = serde_json::from_slice(&text)
        {
            return Ok(names);
        }
        let copy = model.copy_to(&staging.path)?;
        let mut names = Vec::new();
        for location in external(&copy).map_err(FetchError::Unreadable)? {
            names.push(normal(&location)?);
        }
        names.sort();
        names.dedup();
        if names.len() > EXTERNAL_FILES_MAX {
            return Err(FetchError::TooManyFiles { got: names.len() });
        }
        let text = serde_json::to_vec(&names).map_err(io::Error::from)?;
        write_whole(&known, &text)?;
        Ok(names)
    }

    fn keep(&self, mut sources: Vec<Source>, staging: &Staging) -> Result<Fetched, FetchError> {
        let digest = digest_of(&sources);
        let size = sources.iter().map(|source| source.size).sum();
        let home = self.root.join("models").join(hex(&digest));
        let done = Fetched {
            digest: Digest::new(digest),
            model: home.join(MODEL_FILE),
            size,
            signed: None,
        };
        let mut verified = self.verified.lock();
        if verified.contains(&digest) && home.exists() {
            touch(&home);
            return Ok(done);
        }
        if home.exists() && sources.iter().all(|source| source.is_at(&home)) {
            verified.insert(digest);
            touch(&home);
            return Ok(done);
        }
        ignore_missing(fs::remove_dir_all(&home))?;
        for source in &mut sources {
            if !staging.path.join(&source.name).exists() {
                source.copy_to(&staging.path)?;
            }
        }
        sync_folder(&staging.path)?;
        fs::rename(&staging.path, &home)?;
        sync_folder(&self.root.join("models"))?;
        verified.insert(digest);
        Ok(done)
    }
}

/// The copy with this digest in a state folder, which may be another process's: only reads.
///
/// # Errors
/// When it is there and cannot be read.
pub(super) fn copy_in(state_dir: &Path, digest: &Digest) -> Result<Option<Fetched>, FetchError> {
    copy_at(&state_dir.join(CACHE), digest)
}

fn copy_at(cache: &Path, digest: &Digest) -> Result<Option<Fetched>, FetchError> {
    let home = cache.join("models").join(digest.hex());
    if !home.join(MODEL_FILE).exists() {
        return Ok(None);
    }
    let mut names = files_beneath(&home)?;
    // As they were listed when the digest was made: the model first, then the others by name.
    names.retain(|name| name != MODEL_FILE);
    names.sort();
    names.insert(0, MODEL_FILE.to_owned());
    let open = |name: String| Source::open(name.clone(), File::open(home.join(&name))?, u64::MAX);
    let sources: Vec<Source> = names.into_iter().map(open).collect::<Result<_, _>>()?;
    if digest_of(&sources) != *digest.as_bytes() {
        return Ok(None);
    }
    let size = sources.iter().map(|source| source.size).sum();
    let model = home.join(MODEL_FILE);
    Ok(Some(Fetched { digest: *digest, model, size, signed: None }))
}

fn open_external(
    version: &Folder,
    name: &str,
    left: u64,
    limit: u64,
) -> Result<Source, FetchError> {
    let refused = |source: ConfineError| FetchError::External {
        name: name.to_owned(),
        source: source.into(),
    };
    let file = version.sole_file(name).map_err(refused)?;
    Source::open(name.to_owned(), file, left).map_err(|error| match error {
        FetchError::TooLarge { .. } => FetchError::TooLarge { limit },
        other => other,
    })
}

/// The model file's own SHA-256 when it is alone, so that it can be checked with any tool; else
/// that of the list of all files as `sha256sum` prints it.
fn digest_of(sources: &[Source]) -> [u8; 32] {
    if let [model] = sources {
        return model.sha256;
    }
    let mut list = String::new();
    for source in sources {
        list.push_str(&format!("{}  {}\n", hex(&source.sha256), source.name));
    }
    Sha256::digest(list.as_bytes()).into()
}

impl Source {
    fn open(name: String, mut file: File, size_max: u64) -> Result<Self, FetchError> {
        let (sha256, size) = hash(&mut file, size_max, |_| Ok(()))?;
        Ok(Self { name, file, sha256, size })
    }

    /// Writes the file under `folder`, on the disk for good; checks that it is what was hashed.
    fn copy_to(&mut self, folder: &Path) -> Result<PathBuf, FetchError> {
        let to = folder.join(&self.name);
        if let Some(parent) = to.parent() {
            make_folder(parent)?;
        }
        let mut out =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&to)?;
        self.file.rewind()?;
        let (sha256, _) = hash(&mut self.file, self.size, |bytes| out.write_all(bytes))
            .map_err(|error| self.changed(error))?;
        if sha256 != self.sha256 {
            return Err(FetchError::Changed { name: self.name.clone() });
        }
        out.sync_all()?;
        Ok(to)
    }

    fn changed(&self, error: FetchError) -> FetchError {
        match error {
            FetchError::TooLarge { .. } => FetchError::Changed { name: self.name.clone() },
            other => other,
        }
    }

    fn is_at(&self, home: &Path) -> bool {
        let Ok(mut file) = File::open(home.join(&self.name)) else { return false };
        hash(&mut file, self.size, |_| Ok(())).is_ok_and(|(sha256, _)| sha256 == self.sha256)
    }
}

fn hash(
    file: &mut File,
    size_max: u64,
    mut each: impl FnMut(&[u8]) -> io::Result<()>,
) -> Result<([u8; 32], u64), FetchError> {
    let mut sha256 = Sha256::new();
    let mut buffer = vec![0; COPY_BUFFER];
    let mut size = 0_u64;
    loop {
        let read = match file.read(&mut buffer) {
            Ok(0) => return Ok((sha256.finalize().into(), size)),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        size += read as u64;
        if size > size_max {
            return Err(FetchError::TooLarge { limit: size_max });
        }
        sha256.update(&buffer[..read]);
        each(&buffer[..read])?;
    }
}

/// A location as the model writes it, without `./`; refused when it is no plain relative path.
fn normal(location: &str) -> Result<String, FetchError> {
    let refused = |source: ConfineError| FetchError::External {
        name: location.chars().take(256).collect(),
        source: source.into(),
    };
    if location.contains('\0') || location.len() > 4096 {
        return Err(refused(ConfineError::Escapes));
    }
    let parts = Path::new(location).components().filter(|part| *part != Component::CurDir);
    let path: PathBuf = parts.collect();
    let name = path.to_str().unwrap_or_default().to_owned();
    check_relative(&name).map_err(refused)?;
    if name == MODEL_FILE {
        return Err(refused(ConfineError::NotRegular { what: "the model file itself" }));
    }
    Ok(name)
}

/// What `SHA256SUMS` says; nothing when there is none.
struct Sums {
    sums: Option<BTreeMap<String, String>>,
    signed: Option<Signed>,
}

impl Sums {
    fn read(version: &Folder, wanted: &Wanted<'_>) -> Result<Self, FetchError> {
        let text = version.text(SUMS_FILE, SUMS_SIZE_MAX)?;
        let signed = match wanted.trusted.is_empty() {
            true => None,
            false => Some(signed(version, text.as_deref(), wanted)?),
        };
        Ok(Self { sums: text.as_deref().map(parse_sums).transpose()?, signed })
    }

    fn check(&self, name: &str, sha256: &[u8; 32]) -> Result<(), FetchError> {
        let Some(sums) = &self.sums else { return Ok(()) };
        let expected =
            sums.get(name).ok_or_else(|| FetchError::NotListed { name: name.to_owned() })?;
        let got = hex(sha256);
        if *expected != got {
            let (name, expected) = (name.to_owned(), expected.clone());
            return Err(FetchError::Sum { name, expected, got });
        }
        Ok(())
    }
}

/// Who signed the list of digests; an error unless it is one of the trusted keys.
fn signed(version: &Folder, sums: Option<&str>, wanted: &Wanted<'_>) -> Result<Signed, FetchError> {
    let sums = sums.ok_or(FetchError::Unsigned { missing: SUMS_FILE })?;
    let signature = version.text(SIGNATURE_FILE, SIGNATURE_SIZE_MAX)?;
    let signature = signature.ok_or(FetchError::Unsigned { missing: SIGNATURE_FILE })?;
    let verified = wanted.trusted.verify(sums.as_bytes(), &signature, wanted.model, wanted.version);
    verified.map_err(FetchError::Signature)
}

/// Digests by file name, from what `sha256sum` prints.
pub(super) fn parse_sums(text: &str) -> Result<BTreeMap<String, String>, FetchError> {
    let mut sums = BTreeMap::new();
    for (at, line) in text.lines().enumerate() {
        if line.trim().is_empty() || line.starts_with('#') {
            continue;
        }
        let syntax = || FetchError::SumsSyntax { line: at + 1 };
        let (sum, name) = line.split_once(' ').ok_or_else(syntax)?;
        let name = name.strip_prefix([' ', '*']).unwrap_or(name);
        if sum.len() != 64 || !sum.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(syntax());
        }
        let name = name.strip_prefix("./").unwrap_or(name);
        sums.insert(name.to_owned(), sum.to_ascii_lowercase());
    }
    Ok(sums)
}

/// A folder that goes when this does, unless it was renamed away.
pub(super) struct Staging {
    path: PathBuf,
}

impl Staging {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if let Err(error) = ignore_missing(fs::remove_dir_all(&self.path)) {
            tracing::warn!(path = %self.path.display(), %error, "staging folder not removed");
        }
    }
}

pub(super) fn hex(bytes: &[u8; 32]) -> String {
    Digest::new(*bytes).hex()
}

pub(super) fn make_folder(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Writes a small file so that a reader sees all of it or none.
pub(super) fn write_whole(path: &Path, content: &[u8]) -> io::Result<()> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let aside = path.with_extension(format!("{}-{number}.tmp", std::process::id()));
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(aside, path)
}

/// Paths of all files in a folder of ours, relative to it.
fn files_beneath(root: &Path) -> io::Result<Vec<String>> {
    let (mut folders, mut files) = (vec![root.to_owned()], Vec::new());
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if let Ok(relative) = path.strip_prefix(root)
                && let Some(name) = relative.to_str()
            {
                files.push(name.to_owned());
            }
        }
    }
    Ok(files)
}

pub(super) fn sync_folder(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

fn ignore_missing(done: io::Result<()>) -> io::Result<()> {
    match done {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fetch(cache: &Cache, version: &Path, external: &[&str]) -> Result<Fetched, FetchError> {
        fetch_signed(cache, version, external, &TrustedKeys::default())
    }

    fn fetch_signed(
        cache: &Cache,
        version: &Path,
        external: &[&str],
        trusted: &TrustedKeys,
    ) -> Result<Fetched, FetchError> {
        let names: BTreeSet<String> = external.iter().map(|name| (*name).to_owned()).collect();
        let folder = Folder::open(version).unwrap();
        let wanted = Wanted {
            model: &"m".parse().unwrap(),
            version: Version::new(1).unwrap(),
            model_file: MODEL_FILE,
            size_max: 1000,
            trusted,
        };
        cache.fetch(&folder, &wanted, &|_| Ok(names.clone()))
    }

    #[test]
    fn a_copy_is_made_once_and_mended_when_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let version = dir.path().join("m/1");
        fs::create_dir_all(version.join("sub")).unwrap();
        fs::write(version.join(MODEL_FILE), "model").unwrap();
        let first = fetch(&cache, &version, &[]).unwrap();
        assert_eq!(fs::read(&first.model).unwrap(), b"model");
        let own: [u8; 32] = Sha256::digest(b"model").into();
        assert_eq!(first.digest, Digest::new(own));

        fs::write(&first.model, "damaged").unwrap();
        let again = fetch(&Cache::open(dir.path()).unwrap(), &version, &[]).unwrap();
        assert_eq!(fs::read(&again.model).unwrap(), b"model");

        fs::write(version.join(MODEL_FILE), "other").unwrap();
        fs::write(version.join("sub/w.bin"), "weights").unwrap();
        let other = fetch(&cache, &version, &["./sub/w.bin"]).unwrap();
        assert_ne!(other.digest, first.digest);
        assert_eq!(other.size, 12);
        assert_eq!(fs::read(other.model.with_file_name("sub").join("w.bin")).unwrap(), b"weights");
        assert!(fs::read_dir(cache.folder("tmp")).unwrap().next().is_none(), "staging is removed");
    }

    #[test]
    fn sums_and_limits_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let version = dir.path().join("m/1");
        fs::create_dir_all(&version).unwrap();
        fs::write(version.join(MODEL_FILE), "model").unwrap();
        let sum = hex(&Sha256::digest(b"model").into());
        let cases = [
            (format!("{sum}  model.onnx\n"), true),
            (format!("# made by hand\n{} *./model.onnx\n", sum.to_uppercase()), true),
            (format!("{}  model.onnx\n", "0".repeat(64)), false),
            (format!("{sum}  other\n"), false),
            ("nonsense".to_owned(), false),
        ];
        for (text, ok) in cases {
            fs::write(version.join(SUMS_FILE), &text).unwrap();
            assert_eq!(fetch(&cache, &version, &[]).is_ok(), ok, "{text}");
        }
        fs::remove_file(version.join(SUMS_FILE)).unwrap();
        fs::write(version.join(MODEL_FILE), [0; 1001]).unwrap();
        assert!(matches!(fetch(&cache, &version, &[]), Err(FetchError::TooLarge { .. })));
        for (at, bad) in ["../secret", "/etc/passwd", "", "./model.onnx", "gone"].iter().enumerate()
        {
            fs::write(version.join(MODEL_FILE), [u8::try_from(at).unwrap(); 9]).unwrap();
            let refused = fetch(&cache, &version, &[bad]);
            assert!(matches!(refused, Err(FetchError::External { .. })), "{bad}: {refused:?}");
        }
    }
}
