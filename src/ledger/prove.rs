//! A proof that one record is in a log, which can be given away without the rest of the log.
//!
//! ```text
//! record ─▶ leaf ─▶ path of hashes ─▶ root ─▶ checkpoint ─▶ signature ─▶ key that is known
//! ```
//!
//! Invariants:
//! - A proof is checked from itself and public keys alone.
//! - It gives away the one record, or without its payload only the record's head, and hashes.

use std::fs::File;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use super::checkpoint::{ALL, Note, NoteError, Notes, Stored, StoredError};
use super::frame::{Form, Frame};
use super::keys::VerifierKey;
use super::reader::{self, ReadError, SegmentReader};
use super::record::{Head, Payload};
use super::tree::{self, Hash, PATH_MAX, TreeError, TreeReader};

const FORMAT: &str = "tidegate-proof/1";
/// Most rotations between a known key and the one that signed.
const HANDOVERS_MAX: usize = 1024;

/// As it is written to a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Proof {
    pub format: String,
    /// `tidegate/<writer>/<log>`.
    pub origin: String,
    pub seq: u64,
    /// A `Head` of `ledger.proto`, in base64.
    pub head: String,
    /// What the payload was hashed with, and the payload: a `Payload` of `ledger.proto`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub salt: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub payload: Option<String>,
    /// SHA-256 of the two.
    pub commitment: String,
    /// Hashes of the siblings on the way to the root, the leaf's first.
    pub path: Vec<String>,
    /// A signed note.
    pub checkpoint: String,
    /// Notes in which one key names the next, the oldest first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub handovers: Vec<String>,
}

/// Which record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    Seq(u64),
    Id(Uuid),
}

#[derive(Debug, thiserror::Error)]
pub enum ProveError {
    #[error("no such record in {}", .0.display())]
    NoRecord(PathBuf),
    #[error("record {seq} is not covered by a checkpoint yet: the last one has {signed} records")]
    NotSigned { seq: u64, signed: u64 },
    #[error("the proof does not hold: {0}; see 'tidegate audit verify'")]
    Wrong(#[from] Unproven),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error(transparent)]
    Stored(#[from] StoredError),
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error("{}: {error}", file.display())]
    Io { file: PathBuf, error: io::Error },
}

/// Why a proof proves nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unproven {
    #[error("not a proof of this format")]
    Format,
    #[error("'{0}' is not base64 of what is expected")]
    Encoding(&'static str),
    #[error("the payload is not the one that was recorded")]
    Payload,
    #[error("the record is not in the tree of the checkpoint")]
    Path,
    #[error("the checkpoint is of '{0}'")]
    Origin(String),
    #[error(transparent)]
    Note(#[from] NoteError),
    #[error("the record cannot be read")]
    Record,
}

/// What a proof proves.
#[derive(Clone, Debug, PartialEq)]
pub struct Proven {
    pub head: Head,
    /// `None` when the proof goes without it, or it was erased.
    pub payload: Option<Payload>,
    pub note: Note,
    pub key: VerifierKey,
}

/// Makes the proof of a record, from the files of its log.
///
/// # Errors
/// When it is not there, or no checkpoint covers it.
pub fn prove(log: &Path, which: Which, with_payload: bool) -> Result<Proof, ProveError> {
    let mut proof = record(log, which, with_payload)?;
    let note = Stored::read(log)?.last;
    let signed = note.as_ref().map_or(0, |note| note.checkpoint.tree.size);
    let Some(note) = note.filter(|_| proof.seq < signed) else {
        return Err(ProveError::NotSigned { seq: proof.seq, signed });
    };
    let path = tree::inclusion(&TreeReader::new(log), proof.seq, signed)?;
    proof.path = path.iter().map(|hash| STANDARD.encode(hash)).collect();
    proof.origin.clone_from(&note.checkpoint.origin);
    proof.checkpoint = note.to_string();
    proof.handovers = handovers(log)?;
    // What does not hold is not given away.
    proof.leaf().and_then(|leaf| proof.in_tree(&leaf, &note))?;
    Ok(proof)
}

fn record(log: &Path, which: Which, with_payload: bool) -> Result<Proof, ProveError> {
    let segments = reader::segments(log)?;
    let first = match which {
        Which::Id(_) => 0,
        Which::Seq(seq) => segments.iter().rposition(|s| s.first_seq <= seq).unwrap_or(0),
    };
    for segment in &segments[first..] {
        let mut reader = SegmentReader::open(segment)?;
        while let Some(frame) = reader.next_frame()? {
            if is(&frame, which) {
                return Ok(of(&frame, with_payload));
            }
        }
    }
    Err(ProveError::NoRecord(log.to_owned()))
}

fn is(frame: &Frame<'_>, which: Which) -> bool {
    match which {
        Which::Seq(seq) => frame.seq == seq,
        Which::Id(id) => {
            Head::decode(frame.head).is_ok_and(|head| head.prediction_id[..] == id.as_bytes()[..])
        }
    }
}

fn of(frame: &Frame<'_>, with_payload: bool) -> Proof {
    let whole = (with_payload && frame.form == Form::Whole).then_some(());
    Proof {
        format: FORMAT.to_owned(),
        origin: String::new(),
        seq: frame.seq,
        head: STANDARD.encode(frame.head),
        salt: whole.map(|()| STANDARD.encode(frame.salt)),
        payload: whole.map(|()| STANDARD.encode(frame.payload)),
        commitment: STANDARD.encode(frame.commitment()),
        path: Vec::new(),
        checkpoint: String::new(),
        handovers: Vec::new(),
    }
}

/// The checkpoints of a log in which one key names the next.
fn handovers(log: &Path) -> Result<Vec<String>, ProveError> {
    let file = log.join(ALL);
    let failed = |error| ProveError::Io { file: file.clone(), error };
    let all = match File::open(&file) {
        Ok(all) => all,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let (mut notes, mut found) = (Notes::new(BufReader::new(all), 0), Vec::new());
    while let Ok(Some((_, note))) = notes.next_note() {
        if note.checkpoint.next_key().is_some() {
            found.push(note.to_string());
        }
    }
    Ok(found)
}

impl Proof {
    /// Checks all of it, with keys that are known.
    ///
    /// # Errors
    /// What does not hold.
    pub fn check(&self, known: &[VerifierKey]) -> Result<Proven, Unproven> {
        if self.format != FORMAT || self.path.len() > PATH_MAX {
            return Err(Unproven::Format);
        }
        let head = decoded("head", &self.head)?;
        let payload =
            self.payload.as_ref().map(|payload| decoded("payload", payload)).transpose()?;
        let note: Note = self.checkpoint.parse()?;
        if note.checkpoint.origin != self.origin {
            return Err(Unproven::Origin(note.checkpoint.origin));
        }
        let leaf = self.leaf()?;
        self.in_tree(&leaf, &note)?;
        let keys = self.keys(known)?;
        let key = note.verify(&keys)?[0].clone();
        let read = |bytes: Vec<u8>| Payload::decode(&bytes[..]).map_err(|_| Unproven::Record);
        Ok(Proven {
            head: Head::decode(&head[..]).map_err(|_| Unproven::Record)?,
            payload: payload.map(read).transpose()?,
            note,
            key,
        })
    }

    /// The keys that are known, and those that they vouch for.
    fn keys(&self, known: &[VerifierKey]) -> Result<Vec<VerifierKey>, Unproven> {
        let mut keys = known.to_vec();
        for handover in self.handovers.iter().take(HANDOVERS_MAX) {
            let note: Note = handover.parse()?;
            let next = note.checkpoint.next_key().filter(|_| note.checkpoint.origin == self.origin);
            // One from before the known key proves nothing, and is not needed.
            if let Some(next) = next
                && note.verify(&keys).is_ok()
            {
                note.verify([&next])?;
                keys.push(next);
            }
        }
        Ok(keys)
    }

    fn leaf(&self) -> Result<Hash, Unproven> {
        let commitment = hash("commitment", &self.commitment)?;
        if let Some(payload) = &self.payload {
            let salt = hash("salt", self.salt.as_deref().unwrap_or_default())?;
            let payload = decoded("payload", payload)?;
            let found: Hash =
                Sha256::new().chain_update(salt).chain_update(payload).finalize().into();
            if found != commitment {
                return Err(Unproven::Payload);
            }
        }
        let hash = Sha256::new().chain_update([0]).chain_update(self.seq.to_le_bytes());
        let hash = hash.chain_update(decoded("head", &self.head)?);
        Ok(hash.chain_update(commitment).finalize().into())
    }

    fn in_tree(&self, leaf: &Hash, note: &Note) -> Result<(), Unproven> {
        let path: Vec<Hash> =
            self.path.iter().map(|step| hash("path", step)).collect::<Result<_, _>>()?;
        let tree = note.checkpoint.tree;
        match tree::includes(leaf, self.seq, tree.size, &path, &tree.root) {
            true => Ok(()),
            false => Err(Unproven::Path),
        }
    }
}

fn decoded(what: &'static str, text: &str) -> Result<Vec<u8>, Unproven> {
    STANDARD.decode(text).map_err(|_| Unproven::Encoding(what))
}

fn hash(what: &'static str, text: &str) -> Result<Hash, Unproven> {
    decoded(what, text)?.try_into().map_err(|_| Unproven::Encoding(what))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    use super::*;
    use crate::ledger::erase::{self, Wanted};
    use crate::ledger::keys;
    use crate::ledger::notary::{Followed, Notary, Settings};
    use crate::ledger::testlog::{TestLog, WRITER};

    fn sign(ledger: &Path, log: &TestLog, rotate: bool) {
        let next = Arc::clone(&log.next);
        let durable = Box::new(move || Some(next.load(Ordering::SeqCst)));
        let settings = Settings {
            ledger: ledger.to_owned(),
            writer: WRITER,
            interval: Duration::ZERO,
            witnesses: Vec::new(),
        };
        let followed = Followed { name: log.name, dir: log.dir.clone(), durable };
        let notary = Notary::start(settings, vec![followed], Box::new(|_, _| true)).unwrap();
        if rotate {
            notary.rotate().unwrap();
        }
    }

    #[test]
    fn every_record_is_proven_before_and_after_it_is_erased() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = TestLog::new(folder.path(), "predictions");
        for at in 0..300 {
            log.add(&format!("secret {at}"));
            if at % 70 == 0 {
                log.seal();
            }
        }
        log.seal();
        assert!(matches!(
            prove(&log.dir, Which::Seq(3), true),
            Err(ProveError::NotSigned { seq: 3, signed: 0 })
        ));
        sign(folder.path(), &log, false);
        let known = keys::published(folder.path()).unwrap();
        let proofs: Vec<Proof> = (0..300)
            .step_by(7)
            .map(|seq| prove(&log.dir, Which::Seq(seq), true).unwrap())
            .collect();
        let wanted = Wanted { ids: vec![Uuid::from_u128(8)], subject: None };
        let found = erase::find(&log.dir, &wanted).unwrap().0;
        assert_eq!(found, [(7, 8)]);
        for segment in reader::segments(&log.dir).unwrap() {
            erase::rewrite(&segment, &[(0, 300)]).unwrap();
        }
        assert!(erase::find(&log.dir, &wanted).unwrap().0.is_empty());
        sign(folder.path(), &log, true);
        log.add("more");
        log.seal();
        sign(folder.path(), &log, false);
        for before in proofs {
            let proven = before.check(&known).unwrap();
            assert_eq!(proven.payload.unwrap().error, format!("secret {}", before.seq));
            let which =
                Which::Id(proven.head.prediction_id[..].try_into().map(Uuid::from_bytes).unwrap());
            let after = prove(&log.dir, which, true).unwrap();
            assert_eq!((after.payload.as_ref(), after.seq), (None, before.seq));
            assert_eq!((&after.commitment, &after.head), (&before.commitment, &before.head));
            // Signed by a key that the known one named.
            let proven = after.check(&known).unwrap();
            assert!(!known.contains(&proven.key) && proven.payload.is_none());
        }
        let left = std::fs::read(&reader::segments(&log.dir).unwrap()[0].path).unwrap();
        assert!(!left.windows(6).any(|part| part == b"secret"));
    }

    #[test]
    fn a_proof_that_was_changed_proves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let mut log = TestLog::new(folder.path(), "predictions");
        (0..20).for_each(|_| drop(log.add("x").to_string()));
        sign(folder.path(), &log, false);
        let known = keys::published(folder.path()).unwrap();
        let proof = prove(&log.dir, Which::Seq(11), true).unwrap();
        proof.check(&known).unwrap();
        let without = prove(&log.dir, Which::Seq(11), false).unwrap();
        assert!(without.salt.is_none() && without.check(&known).unwrap().payload.is_none());
        let text = serde_json::to_string(&proof).unwrap();
        assert_eq!(serde_json::from_str::<Proof>(&text).unwrap(), proof);
        for bit in 0..text.len() * 8 {
            let mut bent = text.clone().into_bytes();
            bent[bit / 8] ^= 1 << (bit % 8);
            if let Ok(bent) = serde_json::from_slice::<Proof>(&bent) {
                assert!(bent.check(&known).is_err(), "bit {bit}: {bent:?}");
            }
        }
        let other = keys::SigningKey::generate().unwrap().verifier(&proof.origin);
        assert_eq!(proof.check(&[other]), Err(Unproven::Note(NoteError::Unsigned)));
        assert!(matches!(prove(&log.dir, Which::Seq(20), true), Err(ProveError::NoRecord(_))));
    }
}
