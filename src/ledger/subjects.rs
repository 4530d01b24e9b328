//! A key for each subject that data is about: whoever destroys it has erased the data, wherever
//! copies of it went.
//!
//! ```text
//! <state>/ledger/keys/subjects
//!   head   128 bytes: TGSUBJ01 │ crc u32 │ log2 of slots u32 │ key that tags are made with, 32 │ 0…
//!   slot   128 bytes: state u8 (0 free, 1 used, 2 gone) │ 0 u8×3 │ crc u32 │ tag 32 │ key 32 │ 0…
//! ```
//!
//! A hash table on the disk: a tag's slot is the first that has it or is free, from where its first
//! bytes point. A slot never crosses a sector, so it is there whole or not.
//!
//! Invariants:
//! - A key is on the disk before the first use of it.
//! - A destroyed key is overwritten where it lay. Keys lie in no other file, but for a table that
//!   grew: the one before is overwritten whole.
//! - The subject itself is nowhere; records have its tag, an HMAC.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use hmac::{Hmac, KeyInit as _, Mac as _};
use parking_lot::Mutex;
use quick_cache::sync::Cache;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use sha2::Sha256;

use super::KEYS;
use super::capture::Subjects;
use super::durable::{self, PRIVATE, TEMPORARY};
use super::keys::private_folder;

const SUBJECTS: &str = "subjects";
const MAGIC: &[u8; 8] = b"TGSUBJ01";
const SLOT: usize = 128;
const USED: u8 = 1;
const GONE: u8 = 2;
/// Slots of a new table, and of the largest: two million subjects in a quarter of a gigabyte.
const SLOTS_MIN_LOG2: u32 = 10;
const SLOTS_MAX_LOG2: u32 = 21;
/// Keys in memory: that of most callers who come again, in half a megabyte.
const CACHED_MAX: usize = 4096;

/// Names a subject without saying who it is.
pub type Tag = [u8; 32];

/// Seals what is about one subject.
#[derive(Clone)]
pub struct SubjectKey([u8; 32]);

impl std::fmt::Debug for SubjectKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SubjectKey").finish_non_exhaustive()
    }
}

impl SubjectKey {
    fn aead(&self) -> Option<LessSafeKey> {
        UnboundKey::new(&AES_256_GCM, &self.0).ok().map(LessSafeKey::new)
    }

    /// A nonce, and `data` encrypted.
    ///
    /// # Errors
    /// When there is no randomness.
    pub fn seal(&self, data: &[u8]) -> io::Result<Vec<u8>> {
        let mut nonce = [0; NONCE_LEN];
        getrandom::fill(&mut nonce).map_err(io::Error::other)?;
        let mut sealed = Vec::with_capacity(NONCE_LEN + data.len() + AES_256_GCM.tag_len());
        sealed.extend_from_slice(&nonce);
        sealed.extend_from_slice(data);
        let too_long = || io::Error::other("more than AES-256-GCM takes");
        let key = self.aead().ok_or_else(too_long)?;
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = key.seal_in_place_separate_tag(nonce, Aad::empty(), &mut sealed[NONCE_LEN..]);
        sealed.extend_from_slice(tag.map_err(|_| too_long())?.as_ref());
        Ok(sealed)
    }

    /// What was sealed with this key.
    pub fn open(&self, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, data) = sealed.split_first_chunk()?;
        let mut data = data.to_vec();
        let nonce = Nonce::assume_unique_for_key(*nonce);
        let open = self.aead()?.open_in_place(nonce, Aad::empty(), &mut data).ok()?.len();
        data.truncate(open);
        Some(data)
    }
}

/// The keys of all subjects.
pub struct SubjectKeys {
    tags: [u8; 32],
    cache: Cache<Tag, SubjectKey>,
    /// Guards the file: one change at a time.
    table: Mutex<Table>,
}

struct Table {
    file: File,
    path: PathBuf,
    slots_log2: u32,
    /// Slots that are not free.
    taken: u64,
}

/// Where a tag is, or would be.
enum Found {
    At(u64, SubjectKey),
    Free(u64),
}

impl SubjectKeys {
    /// Opens the keys of a ledger; there are none at first.
    ///
    /// # Errors
    /// When the file cannot be used, or is something else.
    pub fn open(ledger: &Path) -> io::Result<Self> {
        let folder = ledger.join(KEYS);
        private_folder(&folder)?;
        let path = folder.join(SUBJECTS);
        if !path.exists() {
            let mut tags = [0; 32];
            getrandom::fill(&mut tags).map_err(io::Error::other)?;
            let mut empty = vec![0; SLOT << SLOTS_MIN_LOG2];
            empty.splice(0..0, head(SLOTS_MIN_LOG2, &tags));
            durable::replace(&path, PRIVATE, &empty)?;
        }
        // A table that was growing when the process ended has keys too.
        shred(&path.with_added_extension(TEMPORARY))?;
        let (table, tags) = Table::open(path)?;
        Ok(Self { tags, cache: Cache::new(CACHED_MAX), table: Mutex::new(table) })
    }

    /// What records about this subject have in their head.
    pub fn tag(&self, subject: &[u8]) -> Tag {
        let mut mac =
            Hmac::<Sha256>::new_from_slice(&self.tags).expect("a key may have any length");
        mac.update(subject);
        mac.finalize().into_bytes().into()
    }

    /// The key of a subject, by its tag. The first time it is made, and waits for the disk.
    ///
    /// # Errors
    /// When it cannot be put on the disk, or there are too many subjects.
    pub fn key_for(&self, tag: &Tag) -> io::Result<SubjectKey> {
        if let Some(key) = self.cache.get(tag) {
            return Ok(key);
        }
        let mut table = self.table.lock();
        let key = match table.find(tag)? {
            Found::At(_, key) => key,
            Found::Free(at) => table.add(at, tag)?,
        };
        // Under the lock, so that a key that is destroyed does not come back to the cache.
        self.cache.insert(*tag, key.clone());
        Ok(key)
    }

    /// The key of a subject that has one.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn existing(&self, tag: &Tag) -> io::Result<Option<SubjectKey>> {
        match self.table.lock().find(tag)? {
            Found::At(_, key) => Ok(Some(key)),
            Found::Free(_) => Ok(None),
        }
    }

    /// Destroys the key of a subject; whether there was one.
    ///
    /// # Errors
    /// When it cannot be overwritten on the disk.
    pub fn destroy(&self, tag: &Tag) -> io::Result<bool> {
        let table = self.table.lock();
        self.cache.remove(tag);
        let Found::At(at, _) = table.find(tag)? else { return Ok(false) };
        let mut gone = [0; SLOT];
        gone[0] = GONE;
        table.put(at, &gone)?;
        Ok(true)
    }
}

impl Subjects for SubjectKeys {
    fn name(&self, subject: &str) -> Vec<u8> {
        self.tag(subject.as_bytes()).to_vec()
    }

    fn seal(&self, subject: &str, data: &[u8]) -> Option<Vec<u8>> {
        let key = self.key_for(&self.tag(subject.as_bytes()));
        match key.and_then(|key| key.seal(data)) {
            Ok(sealed) => Some(sealed),
            Err(error) => {
                tracing::error!(%error, "no key for a subject: its data is not recorded");
                None
            }
        }
    }
}

impl Table {
    fn open(path: PathBuf) -> io::Result<(Self, [u8; 32])> {
        let mut file = OpenOptions::new().read(true).write(true).open(&path)?;
        let mut bytes = [0; SLOT];
        file.read_exact(&mut bytes)?;
        let mut tags = [0; 32];
        tags.copy_from_slice(&bytes[16..48]);
        let slots_log2 = u32::from_le_bytes([bytes[12], bytes[13], bytes[14], bytes[15]]);
        if bytes != head(slots_log2, &tags) || slots_log2 > SLOTS_MAX_LOG2 {
            let what = format!("{}: not a file of subjects' keys", path.display());
            return Err(io::Error::other(what));
        }
        let mut table = Self { file, path, slots_log2, taken: 0 };
        let mut taken = 0;
        table.each(|slot| {
            taken += u64::from(slot[0] != 0);
            Ok(())
        })?;
        table.taken = taken;
        Ok((table, tags))
    }

    /// Every slot, in order.
    fn each(&self, mut visit: impl FnMut(&[u8; SLOT]) -> io::Result<()>) -> io::Result<()> {
        let mut chunk = vec![0; SLOT << SLOTS_MIN_LOG2];
        for part in 0..1_u64 << (self.slots_log2 - SLOTS_MIN_LOG2) {
            self.file.read_exact_at(&mut chunk, offset(part << SLOTS_MIN_LOG2))?;
            chunk.as_chunks().0.iter().try_for_each(&mut visit)?;
        }
        Ok(())
    }

    fn find(&self, tag: &Tag) -> io::Result<Found> {
        let mask = (1_u64 << self.slots_log2) - 1;
        let first = u64::from_le_bytes(*tag.first_chunk().expect("a tag has 32 bytes"));
        for step in 0..=mask {
            let at = first.wrapping_add(step) & mask;
            let mut slot = [0; SLOT];
            self.file.read_exact_at(&mut slot, offset(at))?;
            match slot[0] {
                0 => return Ok(Found::Free(at)),
                USED if slot[8..40] == *tag => {
                    let mut key = [0; 32];
                    key.copy_from_slice(&slot[40..72]);
                    if slot != used(tag, &key) {
                        let what = format!("{}: slot {at} is damaged", self.path.display());
                        return Err(io::Error::other(what));
                    }
                    return Ok(Found::At(at, SubjectKey(key)));
                }
                _ => {}
            }
        }
        Err(io::Error::other("no free slot for a subject's key"))
    }

    fn add(&mut self, at: u64, tag: &Tag) -> io::Result<SubjectKey> {
        let mut key = [0; 32];
        getrandom::fill(&mut key).map_err(io::Error::other)?;
        let mut at = at;
        if (self.taken + 1) * 4 > 3 << self.slots_log2 {
            self.grow()?;
            if let Found::Free(free) = self.find(tag)? {
                at = free;
            }
        }
        self.put(at, &used(tag, &key))?;
        self.taken += 1;
        Ok(SubjectKey(key))
    }

    fn put(&self, at: u64, slot: &[u8; SLOT]) -> io::Result<()> {
        self.file.write_all_at(slot, offset(at))?;
        self.file.sync_data()
    }

    /// Moves to a table of twice the size; slots of keys that are gone stay behind.
    fn grow(&mut self) -> io::Result<()> {
        let slots_log2 = self.slots_log2 + 1;
        if slots_log2 > SLOTS_MAX_LOG2 {
            return Err(io::Error::other("too many subjects have keys"));
        }
        let mut old_head = [0; SLOT];
        self.file.read_exact_at(&mut old_head, 0)?;
        let mut tags = [0; 32];
        tags.copy_from_slice(&old_head[16..48]);
        let temporary = self.path.with_added_extension(TEMPORARY);
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(PRIVATE);
        let file = options.open(&temporary)?;
        file.set_len(offset(1 << slots_log2))?;
        file.write_all_at(&head(slots_log2, &tags), 0)?;
        let mut larger = Self { file, path: self.path.clone(), slots_log2, taken: 0 };
        self.each(|slot| {
            let Some(tag) = (slot[0] == USED).then(|| slot[8..40].first_chunk()).flatten() else {
                return Ok(());
            };
            if let Found::Free(at) = larger.find(tag)? {
                larger.file.write_all_at(slot, offset(at))?;
                larger.taken += 1;
            }
            Ok(())
        })?;
        larger.file.sync_all()?;
        std::fs::rename(&temporary, &self.path)?;
        durable::sync_folder_of(&self.path)?;
        let old = std::mem::replace(self, larger);
        zero(&old.file)
    }
}

fn offset(slot: u64) -> u64 {
    (slot + 1) * SLOT as u64
}

fn head(slots_log2: u32, tags: &[u8; 32]) -> [u8; SLOT] {
    let mut bytes = [0; SLOT];
    bytes[..8].copy_from_slice(MAGIC);
    bytes[12..16].copy_from_slice(&slots_log2.to_le_bytes());
    bytes[16..48].copy_from_slice(tags);
    let crc = crc32c::crc32c(&bytes[12..]);
    bytes[8..12].copy_from_slice(&crc.to_le_bytes());
    bytes
}

fn used(tag: &Tag, key: &[u8; 32]) -> [u8; SLOT] {
    let mut bytes = [0; SLOT];
    bytes[0] = USED;
    bytes[8..40].copy_from_slice(tag);
    bytes[40..72].copy_from_slice(key);
    let crc = crc32c::crc32c(&bytes[8..]);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Overwrites a file whole, and asks it onto the disk.
fn zero(file: &File) -> io::Result<()> {
    let (len, zeros) = (file.metadata()?.len(), vec![0; SLOT << SLOTS_MIN_LOG2]);
    let mut at = 0;
    while at < len {
        let part = zeros.len().min(usize::try_from(len - at).unwrap_or(usize::MAX));
        file.write_all_at(&zeros[..part], at)?;
        at += part as u64;
    }
    file.sync_all()
}

fn shred(path: &Path) -> io::Result<()> {
    match OpenOptions::new().write(true).open(path) {
        Ok(file) => {
            zero(&file)?;
            std::fs::remove_file(path)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_stays_until_it_is_destroyed() {
        let ledger = tempfile::tempdir().unwrap();
        let keys = SubjectKeys::open(ledger.path()).unwrap();
        let tag = keys.tag(b"anna");
        assert!(keys.existing(&tag).unwrap().is_none());
        let sealed = keys.key_for(&tag).unwrap().seal(b"secret").unwrap();
        assert_ne!(keys.tag(b"bert"), tag);
        let keys = SubjectKeys::open(ledger.path()).unwrap();
        assert_eq!(keys.tag(b"anna"), tag);
        let key = keys.existing(&tag).unwrap().unwrap();
        assert_eq!(key.open(&sealed).unwrap(), b"secret");
        let mut bent = sealed.clone();
        bent[14] ^= 1;
        assert!(key.open(&bent).is_none() && key.open(b"short").is_none());
        assert!(keys.destroy(&tag).unwrap());
        assert!(!keys.destroy(&tag).unwrap());
        let file = std::fs::read(ledger.path().join("keys/subjects")).unwrap();
        assert!(!file.windows(32).any(|part| part == key.0));
        assert!(keys.key_for(&tag).unwrap().open(&sealed).is_none());
    }

    #[test]
    fn a_table_grows_with_what_is_in_it() {
        let ledger = tempfile::tempdir().unwrap();
        let keys = SubjectKeys::open(ledger.path()).unwrap();
        let tags: Vec<Tag> = (0..2000_u32).map(|at| keys.tag(&at.to_le_bytes())).collect();
        let made: Vec<[u8; 32]> = tags.iter().map(|tag| keys.key_for(tag).unwrap().0).collect();
        keys.destroy(&tags[7]).unwrap();
        let keys = SubjectKeys::open(ledger.path()).unwrap();
        for (at, (tag, key)) in tags.iter().zip(&made).enumerate() {
            let found = keys.existing(tag).unwrap().map(|found| found.0);
            assert_eq!(found, (at != 7).then_some(*key));
        }
        assert_eq!(keys.table.lock().taken, 2000);
    }
}
