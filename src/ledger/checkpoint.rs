//! Checkpoints: what a log's tree was, signed, in the form that transparency logs use.
//!
//! ```text
//! tidegate/0123456789abcdef/predictions      origin: the writer and the log
//! 4711                                       records
//! CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=   root of the tree over them
//! after 4200                                 size of the checkpoint before this one
//! time 2026-11-25T10:00:00Z                  when it was signed
//! next-key tidegate/0123…+…+…                only in the last one of a key: who signs from here on
//!
//! — tidegate/0123456789abcdef/predictions base64(key id ‖ Ed25519 of all above the empty line)
//! ```
//!
//! This is a C2SP signed note (`signed-note`) with a `tlog-checkpoint` in it; the lines behind the
//! root are its extensions. `<log>/checkpoint` is the last one, `<log>/checkpoints` has all of them,
//! each with an empty line behind it.
//!
//! Invariants:
//! - A note that was read is written again to the same bytes: there is one way to write each.
//! - A checkpoint is written where it is the last one before it is appended to all of them; a half
//!   written end of `checkpoints` is the beginning of that one, or it is a fault.

use std::fmt::Write as _;
use std::fs::File;
use std::io::{self, BufRead, Read as _, Seek as _, SeekFrom};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::keys::{KeyId, SigningKey, VerifierKey};
use super::tree::{Hash, State};

/// The last checkpoint.
pub const LAST: &str = "checkpoint";
/// All of them.
pub const ALL: &str = "checkpoints";
/// Longest note that is read.
pub const NOTE_BYTES_MAX: usize = 64 << 10;
/// What is read of the end of all checkpoints: the longest note and the one before it.
const TAIL_BYTES: u64 = 4 * NOTE_BYTES_MAX as u64;
/// Most signatures of one note; witnesses may have added theirs.
const SIGNATURES_MAX: usize = 64;
const SIGNATURE_START: &str = "\u{2014} ";

/// What is signed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    pub origin: String,
    pub tree: State,
    /// Lines behind the root.
    pub extensions: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Signature {
    pub name: String,
    pub id: KeyId,
    pub bytes: Vec<u8>,
}

/// A checkpoint and who signed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    pub checkpoint: Checkpoint,
    pub signatures: Vec<Signature>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    #[error("not a signed checkpoint: {0}")]
    Form(&'static str),
    #[error("the checkpoint is signed by none of the keys that are trusted")]
    Unsigned,
    #[error("a signature of the checkpoint by key {0} is wrong")]
    Forged(KeyId),
}

/// The origin of a log's checkpoints; it stays the same for as long as the state folder exists.
pub fn origin(writer: impl std::fmt::Display, log: &str) -> String {
    format!("tidegate/{writer}/{log}")
}

impl Checkpoint {
    /// What is signed.
    pub fn text(&self) -> String {
        let State { size, root } = &self.tree;
        let mut text = format!("{}\n{size}\n{}\n", self.origin, STANDARD.encode(root));
        for line in &self.extensions {
            text.push_str(line);
            text.push('\n');
        }
        text
    }

    /// # Errors
    /// What it is no checkpoint for.
    pub fn parse(text: &str) -> Result<Self, NoteError> {
        let form = NoteError::Form;
        let text = text.strip_suffix('\n').ok_or(form("its text does not end with a line"))?;
        let mut lines = text.split('\n');
        let origin = lines.next().filter(|line| !line.is_empty()).ok_or(form("no origin"))?;
        let size = lines.next().ok_or(form("no size"))?;
        let root = lines.next().ok_or(form("no root"))?;
        let root = STANDARD.decode(root).ok().and_then(|root| Hash::try_from(root).ok());
        let checkpoint = Self {
            origin: origin.to_owned(),
            tree: State {
                size: size.parse().map_err(|_| form("its size is no number"))?,
                root: root.ok_or(form("its root is no hash"))?,
            },
            extensions: lines.map(ToOwned::to_owned).collect(),
        };
        // `007` or `+7` would be other ways to write the same.
        match checkpoint.text().strip_suffix('\n') == Some(text) {
            true => Ok(checkpoint),
            false => Err(form("not written as it should be")),
        }
    }

    /// The rest of the first extension that begins with this word.
    pub fn extension(&self, word: &str) -> Option<&str> {
        let of = |line: &'_ str| line.strip_prefix(word).is_some_and(|rest| rest.starts_with(' '));
        self.extensions.iter().find(|line| of(line)).map(|line| &line[word.len() + 1..])
    }

    /// Size of the checkpoint before this one.
    pub fn after(&self) -> Option<u64> {
        self.extension("after")?.parse().ok()
    }

    pub fn next_key(&self) -> Option<VerifierKey> {
        self.extension("next-key")?.parse().ok()
    }

    /// Signs with each of these keys, in the name of the log.
    pub fn sign(self, keys: &[&SigningKey]) -> Note {
        let text = self.text();
        let sign = |key: &&SigningKey| Signature {
            name: self.origin.clone(),
            id: key.verifier(&self.origin).id,
            bytes: key.sign(text.as_bytes()),
        };
        Note { signatures: keys.iter().map(sign).collect(), checkpoint: self }
    }
}

impl std::fmt::Display for Note {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.checkpoint.text())?;
        f.write_char('\n')?;
        self.signatures.iter().try_for_each(|signature| {
            let Signature { name, id, bytes } = signature;
            let encoded = STANDARD.encode([&id.0[..], bytes].concat());
            writeln!(f, "{SIGNATURE_START}{name} {encoded}")
        })
    }
}

impl std::str::FromStr for Note {
    type Err = NoteError;

    fn from_str(text: &str) -> Result<Self, NoteError> {
        let form = NoteError::Form;
        if text.len() > NOTE_BYTES_MAX {
            return Err(form("too long"));
        }
        let (signed, signatures) = text.split_once("\n\n").ok_or(form("no empty line"))?;
        let signatures = signatures.strip_suffix('\n').ok_or(form("half a line at its end"))?;
        let signatures: Vec<Signature> = signatures
            .split('\n')
            .map(signature)
            .collect::<Option<_>>()
            .ok_or(form("a line behind the empty one is no signature"))?;
        if signatures.len() > SIGNATURES_MAX {
            return Err(form("too many signatures"));
        }
        let note = Self { checkpoint: Checkpoint::parse(&format!("{signed}\n"))?, signatures };
        match note.to_string() == text {
            true => Ok(note),
            false => Err(form("not written as it should be")),
        }
    }
}

fn signature(line: &str) -> Option<Signature> {
    let (name, encoded) = line.strip_prefix(SIGNATURE_START)?.split_once(' ')?;
    let bytes = STANDARD.decode(encoded).ok()?;
    let (id, bytes) = bytes.split_first_chunk()?;
    let (name, bytes) = (name.to_owned(), bytes.to_vec());
    (!name.is_empty() && !bytes.is_empty()).then_some(Signature { name, id: KeyId(*id), bytes })
}

impl Note {
    /// Checks every signature by one of these keys; that of one is needed. Whose it was.
    ///
    /// # Errors
    /// When there is none, or a wrong one in the name of such a key.
    pub fn verify<'a>(
        &self,
        keys: impl IntoIterator<Item = &'a VerifierKey>,
    ) -> Result<Vec<&'a VerifierKey>, NoteError> {
        let (text, mut good) = (self.checkpoint.text(), Vec::new());
        for key in keys {
            let of = |signature: &&Signature| signature.name == key.name && signature.id == key.id;
            for signature in self.signatures.iter().filter(of) {
                if !key.verify(text.as_bytes(), &signature.bytes) {
                    return Err(NoteError::Forged(key.id));
                }
                good.push(key);
            }
        }
        if good.is_empty() { Err(NoteError::Unsigned) } else { Ok(good) }
    }
}

/// Reads notes that were appended one after the other.
pub struct Notes<R> {
    from: R,
    /// Offset behind the last whole note.
    end: u64,
    /// What is behind that.
    torn: Vec<u8>,
}

impl<R: BufRead> Notes<R> {
    /// `offset` is where `from` begins in its file.
    pub fn new(from: R, offset: u64) -> Self {
        Self { from, end: offset, torn: Vec::new() }
    }

    /// The next note, and where it begins; `None` where there is no whole one.
    ///
    /// # Errors
    /// When it cannot be read, or something else is there.
    pub fn next_note(&mut self) -> Result<Option<(u64, Note)>, NotesError> {
        let mut text = std::mem::take(&mut self.torn);
        let mut blank_lines = 0;
        // A note has an empty line inside, and one behind it.
        while blank_lines < 2 {
            let before = text.len();
            let room = (2 * NOTE_BYTES_MAX).saturating_sub(before) as u64;
            self.from.by_ref().take(room).read_until(b'\n', &mut text)?;
            match text.get(before..) {
                Some(b"\n") => blank_lines += 1,
                Some([.., b'\n']) => {}
                _ if room == 0 => return Err(NoteError::Form("too long").into()),
                _ => {
                    self.torn = text;
                    return Ok(None);
                }
            }
        }
        let note = std::str::from_utf8(&text[..text.len() - 1]);
        let note = note.map_err(|_| NoteError::Form("no text"))?.parse()?;
        let at = self.end;
        self.end += text.len() as u64;
        Ok(Some((at, note)))
    }

    /// Offset behind the last whole note, and what is there.
    pub fn rest(self) -> (u64, Vec<u8>) {
        (self.end, self.torn)
    }

    pub fn end(&self) -> u64 {
        self.end
    }
}

#[derive(Debug, thiserror::Error)]
pub enum NotesError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Note(#[from] NoteError),
}

/// The end of a log's checkpoints, as its files have them.
#[derive(Debug, Default)]
pub struct Stored {
    /// The last one in [`ALL`].
    pub newest: Option<Note>,
    /// Offset behind it, and what is there.
    pub end: u64,
    pub torn: Vec<u8>,
    /// The last one; [`ALL`] may lack it, when it was not appended yet.
    pub last: Option<Note>,
}

#[derive(Debug, thiserror::Error)]
pub enum StoredError {
    #[error("{}: {error}", file.display())]
    Io { file: PathBuf, error: io::Error },
    #[error("{}: at byte {offset}: {error}", file.display())]
    Note { file: PathBuf, offset: u64, error: NoteError },
}

impl Stored {
    /// Reads the last checkpoint, and the end of the file of all. Neither file has to be there.
    ///
    /// # Errors
    /// When one cannot be read, or one holds what is no checkpoint.
    pub fn read(log: &Path) -> Result<Self, StoredError> {
        // In this order: the last one that is read is never older than those that are listed.
        let mut stored = Self::read_all(&log.join(ALL))?;
        let file = log.join(LAST);
        let fault = |error| StoredError::Note { file: file.clone(), offset: 0, error };
        let text = match std::fs::read(&file) {
            Ok(bytes) => String::from_utf8(bytes).map_err(|_| fault(NoteError::Form("no text")))?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(StoredError::Io { file, error }),
        };
        if !text.is_empty() {
            stored.last = Some(text.parse().map_err(fault)?);
        }
        if !format!("{text}\n").as_bytes().starts_with(&stored.torn) {
            let what = "neither a checkpoint nor the beginning of the last one";
            let (file, offset) = (log.join(ALL), stored.end);
            return Err(StoredError::Note { file, offset, error: NoteError::Form(what) });
        }
        let size = stored.newest.as_ref().map_or(0, |note| note.checkpoint.tree.size);
        let after = stored.last.as_ref().and_then(|last| last.checkpoint.after());
        match stored.last == stored.newest || after == Some(size) {
            true => Ok(stored),
            false => Err(fault(NoteError::Form("does not follow the last one of the others"))),
        }
    }

    fn read_all(file: &Path) -> Result<Self, StoredError> {
        let io = |error| StoredError::Io { file: file.to_owned(), error };
        let mut all = match File::open(file) {
            Ok(all) => all,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(io(error)),
        };
        let len = all.metadata().map_err(io)?.len();
        let from = len.saturating_sub(TAIL_BYTES);
        let mut tail = Vec::new();
        all.seek(SeekFrom::Start(from)).and_then(|_| all.read_to_end(&mut tail)).map_err(io)?;
        let start = if from == 0 { 0 } else { boundary(&tail) };
        let mut notes = Notes::new(&tail[start..], from + start as u64);
        let mut newest = None;
        loop {
            match notes.next_note() {
                Ok(Some((_, note))) => newest = Some(note),
                Ok(None) => break,
                Err(NotesError::Io(error)) => return Err(io(error)),
                Err(NotesError::Note(error)) => {
                    let (file, offset) = (file.to_owned(), notes.end());
                    return Err(StoredError::Note { file, offset, error });
                }
            }
        }
        let (end, torn) = notes.rest();
        Ok(Self { newest, end, torn, last: None })
    }

    /// The last checkpoint's size and root.
    pub fn tree(&self) -> Option<State> {
        self.last.as_ref().map(|note| note.checkpoint.tree)
    }
}

/// Where the first note begins that is whole in the end of a file: behind an empty line after
/// signatures.
fn boundary(tail: &[u8]) -> usize {
    let mut signed = false;
    let mut at = 0;
    for line in tail.split_inclusive(|byte| *byte == b'\n') {
        at += line.len();
        if signed && line == b"\n" {
            return at;
        }
        signed = line.starts_with(SIGNATURE_START.as_bytes());
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// From the C2SP specification of signed notes: the text and key of Go's `note` package.
    #[test]
    fn a_note_of_another_program_is_read() {
        let key = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
        let key: VerifierKey = key.parse().unwrap();
        let text = "If you think cryptography is the answer to your problem,\n\
                    then you don't know what your problem is.\n";
        let signature = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=";
        let line = format!("\u{2014} PeterNeumann {signature}");
        let signature = super::signature(&line).unwrap();
        assert_eq!(signature.id, key.id);
        assert!(key.verify(text.as_bytes(), &signature.bytes));
        assert!(!key.verify(b"other", &signature.bytes));
    }

    fn note(size: u64, after: u64, key: &SigningKey) -> Note {
        let extensions = vec![format!("after {after}"), "time 2026-11-25T10:00:00Z".to_owned()];
        let tree = State { size, root: [9; 32] };
        Checkpoint { origin: "tidegate/01/admin".to_owned(), tree, extensions }.sign(&[key])
    }

    #[test]
    fn a_note_comes_back_and_no_bit_of_it_can_be_changed() {
        let key = SigningKey::generate().unwrap();
        let verifier = key.verifier("tidegate/01/admin");
        let note = note(7, 3, &key);
        let text = note.to_string();
        assert_eq!(text.parse(), Ok(note.clone()));
        assert_eq!(note.checkpoint.after(), Some(3));
        assert_eq!(note.verify([&verifier]).unwrap(), [&verifier]);
        for bit in 0..text.len() * 8 {
            let mut bent = text.clone().into_bytes();
            bent[bit / 8] ^= 1 << (bit % 8);
            let Ok(bent) = String::from_utf8(bent) else { continue };
            let bad = bent.parse::<Note>().and_then(|n| n.verify([&verifier]).map(|_| ()));
            assert!(bad.is_err(), "bit {bit}");
        }
        let other = SigningKey::generate().unwrap().verifier("tidegate/01/admin");
        assert_eq!(note.verify([&other]), Err(NoteError::Unsigned));
    }

    #[test]
    fn the_end_of_many_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let key = SigningKey::generate().unwrap();
        let all: Vec<Note> = (0..1500).map(|at| note(at + 1, at, &key)).collect();
        let text: String = all.iter().map(|note| format!("{note}\n")).collect();
        assert!(text.len() as u64 > TAIL_BYTES);
        std::fs::write(folder.path().join(ALL), &text).unwrap();
        std::fs::write(folder.path().join(LAST), all[1499].to_string()).unwrap();
        let stored = Stored::read(folder.path()).unwrap();
        assert_eq!((stored.newest.as_ref(), stored.end), (all.last(), text.len() as u64));
        let mut notes = Notes::new(text.as_bytes(), 0);
        let mut read = Vec::new();
        while let Some((_, note)) = notes.next_note().unwrap() {
            read.push(note);
        }
        assert_eq!(read, all);
    }

    #[test]
    fn stored_checkpoints_follow_each_other() {
        let folder = tempfile::tempdir().unwrap();
        let key = SigningKey::generate().unwrap();
        let (first, second) = (note(3, 0, &key), note(7, 3, &key));
        let write = |all: &[u8], last: &str| {
            std::fs::write(folder.path().join(ALL), all).unwrap();
            std::fs::write(folder.path().join(LAST), last).unwrap();
            Stored::read(folder.path())
        };
        assert!(Stored::read(folder.path()).unwrap().last.is_none());
        let both = format!("{first}\n{second}\n");
        let both = both.as_bytes();
        let stored = write(both, &second.to_string()).unwrap();
        assert_eq!(stored.newest.as_ref(), Some(&second));
        assert_eq!(stored.end, both.len() as u64);
        // Cut short while the second was appended, or before that.
        for cut in first.to_string().len() + 1..both.len() {
            assert!(write(&both[..cut], &second.to_string()).is_ok(), "{cut}");
            let bent = [&both[..cut], b"x"].concat();
            assert!(both.starts_with(&bent) || write(&bent, &second.to_string()).is_err(), "{cut}");
        }
        // The one before is gone too.
        assert!(write(b"", &second.to_string()).is_err());
        assert!(write(both, &first.to_string()).is_err());
        assert!(write(both, "").is_err());
    }
}
