//! The Merkle tree over a log's records, as RFC 6962 and RFC 9162 define it.
//!
//! ```text
//! <log>/tree/0    hash of each record's leaf, 32 bytes each, in order
//!            1    hash of each full run of 256 leaves
//!            2    hash of each full run of 256 × 256 leaves …
//! ```
//!
//! The files hold what any root, inclusion proof or consistency proof is computed from with a few
//! small reads, as the tiles of a transparency log do. They are only appended to, and all of them
//! can be made anew from the segments, so nothing depends on them.
//!
//! Invariants:
//! - The number of a record is the index of its leaf. A leaf outlives its record: what retention
//!   removes keeps its hash here.
//! - Proving and checking are functions of hashes alone: a checker needs no file.

use std::convert::Infallible;
use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

pub type Hash = [u8; 32];

/// Folder of a log's tree.
pub const TREE: &str = "tree";
/// The same while it is made anew.
const TREE_BEFORE: &str = "tree.before";
pub const HASH_BYTES: u64 = 32;
/// Each file has one hash for so many (2^8) of the file below.
pub(super) const STEP: u32 = 8;
/// Files: enough for 2^63 records.
pub const LEVELS: u32 = 8;
/// Longest proof that is taken: no tree of 2^64 leaves has a longer one.
pub const PATH_MAX: usize = 128;
/// Bytes of hashes that wait for a flush.
const PENDING_MAX: usize = 1 << 18;

/// Root of a tree without leaves.
pub fn empty() -> Hash {
    Sha256::digest(b"").into()
}

/// Hash of an inner node.
pub fn node(left: &Hash, right: &Hash) -> Hash {
    Sha256::new().chain_update([1]).chain_update(left).chain_update(right).finalize().into()
}

/// What is kept of a tree to add leaves to it and know its root: one hash for each bit of its size.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frontier {
    size: u64,
    /// Roots of the full subtrees that it is made of, the largest first.
    peaks: Vec<Hash>,
}

impl Frontier {
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Adds a leaf, and tells of each subtree that is full now: its height and its hash.
    pub fn push(&mut self, leaf: Hash, mut full: impl FnMut(u32, &Hash)) {
        let (mut hash, mut height, mut bits) = (leaf, 0, self.size);
        full(height, &hash);
        while bits & 1 == 1 {
            let Some(left) = self.peaks.pop() else { break };
            hash = node(&left, &hash);
            height += 1;
            bits >>= 1;
            full(height, &hash);
        }
        self.peaks.push(hash);
        self.size += 1;
    }

    pub fn root(&self) -> Hash {
        let mut peaks = self.peaks.iter().rev();
        let Some(last) = peaks.next() else { return empty() };
        peaks.fold(*last, |right, left| node(left, &right))
    }

    /// The frontier of the first `size` leaves.
    ///
    /// # Errors
    /// When `source` does not have them.
    pub fn of<S: Subtrees>(source: &S, size: u64) -> Result<Self, S::Error> {
        let (mut peaks, mut from) = (Vec::new(), 0);
        for height in (0..u64::BITS).rev().filter(|height| size >> height & 1 == 1) {
            peaks.push(source.full(height, from >> height)?);
            from += 1 << height;
        }
        Ok(Self { size, peaks })
    }
}

/// Whatever knows the hashes of full subtrees.
pub trait Subtrees {
    type Error;

    /// Hash of the `index`th subtree of 2^`height` leaves.
    ///
    /// # Errors
    /// When it is not there.
    fn full(&self, height: u32, index: u64) -> Result<Hash, Self::Error>;
}

/// Leaves in memory.
impl Subtrees for [Hash] {
    type Error = Infallible;

    fn full(&self, height: u32, index: u64) -> Result<Hash, Infallible> {
        if height == 0 {
            return Ok(usize::try_from(index)
                .ok()
                .and_then(|at| self.get(at))
                .map_or(empty(), |h| *h));
        }
        Ok(node(&self.full(height - 1, index * 2)?, &self.full(height - 1, index * 2 + 1)?))
    }
}

/// Largest power of two below `len`, which is two at least.
fn split(len: u64) -> u64 {
    1 << (u64::BITS - 1 - (len - 1).leading_zeros())
}

/// Hash over the leaves `from..to`, which a proof or a root cuts a tree into.
fn range<S: Subtrees + ?Sized>(source: &S, from: u64, to: u64) -> Result<Hash, S::Error> {
    let len = to - from;
    match len {
        0 => Ok(empty()),
        _ if len.is_power_of_two() => {
            let height = len.trailing_zeros();
            source.full(height, from >> height)
        }
        _ => {
            let middle = from + split(len);
            Ok(node(&range(source, from, middle)?, &range(source, middle, to)?))
        }
    }
}

/// Root of the first `size` leaves.
///
/// # Errors
/// When `source` does not have them.
pub fn root<S: Subtrees + ?Sized>(source: &S, size: u64) -> Result<Hash, S::Error> {
    range(source, 0, size)
}

/// Proof that leaf `index` is in the tree of the first `size` leaves (RFC 6962, 2.1.1); empty if it
/// is not.
///
/// # Errors
/// When `source` does not have them.
pub fn inclusion<S: Subtrees + ?Sized>(
    source: &S,
    index: u64,
    size: u64,
) -> Result<Vec<Hash>, S::Error> {
    let mut path = Vec::new();
    let (mut from, mut to) = (0, size);
    while index < size && to - from > 1 {
        let middle = from + split(to - from);
        if index < middle {
            path.push(range(source, middle, to)?);
            to = middle;
        } else {
            path.push(range(source, from, middle)?);
            from = middle;
        }
    }
    path.reverse();
    Ok(path)
}

/// Proof that the tree of the first `old` leaves is the beginning of that of the first `size`
/// (RFC 6962, 2.1.2).
///
/// # Errors
/// When `source` does not have them.
pub fn consistency<S: Subtrees + ?Sized>(
    source: &S,
    old: u64,
    size: u64,
) -> Result<Vec<Hash>, S::Error> {
    let mut path = Vec::new();
    if old == 0 || old >= size {
        return Ok(path);
    }
    let (mut from, mut to, mut whole) = (0, size, true);
    while old != to {
        let middle = from + split(to - from);
        if old <= middle {
            path.push(range(source, middle, to)?);
            to = middle;
        } else {
            path.push(range(source, from, middle)?);
            (from, whole) = (middle, false);
        }
    }
    if !whole {
        path.push(range(source, from, to)?);
    }
    path.reverse();
    Ok(path)
}

/// Whether `path` proves that `leaf` is at `index` of the tree of `size` leaves with this root
/// (RFC 9162, 2.1.3.2).
pub fn includes(leaf: &Hash, index: u64, size: u64, path: &[Hash], root: &Hash) -> bool {
    if index >= size || path.len() > PATH_MAX {
        return false;
    }
    let (mut at, mut last, mut hash) = (index, size - 1, *leaf);
    for step in path {
        if last == 0 {
            return false;
        }
        if at & 1 == 1 || at == last {
            hash = node(step, &hash);
            while at & 1 == 0 && at != 0 {
                (at, last) = (at >> 1, last >> 1);
            }
        } else {
            hash = node(&hash, step);
        }
        (at, last) = (at >> 1, last >> 1);
    }
    last == 0 && hash == *root
}

/// A tree that somebody vouches for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    pub size: u64,
    pub root: Hash,
}

/// Whether `path` proves that the tree `old` is the beginning of `new` (RFC 9162, 2.1.4.2).
pub fn extends(old: &State, new: &State, path: &[Hash]) -> bool {
    if old.size > new.size || path.len() > PATH_MAX {
        return false;
    }
    if old.size == new.size || old.size == 0 {
        return path.is_empty() && (old.size == 0 || old.root == new.root);
    }
    let (mut at, mut last) = (old.size - 1, new.size - 1);
    while at & 1 == 1 {
        (at, last) = (at >> 1, last >> 1);
    }
    // A full old tree is a node of the new one, and not repeated in the proof.
    let first =
        if old.size.is_power_of_two() { Some((&old.root, path)) } else { path.split_first() };
    let Some((first, rest)) = first else { return false };
    let (mut was, mut is) = (*first, *first);
    for step in rest {
        if last == 0 {
            return false;
        }
        if at & 1 == 1 || at == last {
            (was, is) = (node(step, &was), node(step, &is));
            while at & 1 == 0 && at != 0 {
                (at, last) = (at >> 1, last >> 1);
            }
        } else {
            is = node(&is, step);
        }
        (at, last) = (at >> 1, last >> 1);
    }
    last == 0 && was == old.root && is == new.root
}

#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    #[error("{}: {error}", file.display())]
    Io { file: PathBuf, error: io::Error },
    #[error("{}: {have} hashes, expected {needed}", file.display())]
    Short { file: PathBuf, have: u64, needed: u64 },
}

/// Path of a level's file.
pub fn level_path(log: &Path, level: u32) -> PathBuf {
    log.join(TREE).join(level.to_string())
}

/// Hashes that a level has once there are `size` leaves.
pub fn level_len(level: u32, size: u64) -> u64 {
    size >> (STEP * level)
}

/// Reads the files of a tree; others may append to them meanwhile.
#[derive(Debug)]
pub struct TreeReader {
    log: PathBuf,
}

impl TreeReader {
    pub fn new(log: &Path) -> Self {
        Self { log: log.to_owned() }
    }

    /// Whole hashes that a level's file has; none when there is no file.
    ///
    /// # Errors
    /// When it cannot be looked at.
    pub fn len(&self, level: u32) -> Result<u64, TreeError> {
        let file = level_path(&self.log, level);
        match std::fs::metadata(&file) {
            Ok(meta) => Ok(meta.len() / HASH_BYTES),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
            Err(error) => Err(TreeError::Io { file, error }),
        }
    }
}

impl Subtrees for TreeReader {
    type Error = TreeError;

    /// One read of at most 128 hashes.
    fn full(&self, height: u32, index: u64) -> Result<Hash, TreeError> {
        let (level, above) = (height / STEP, height % STEP);
        let file = level_path(&self.log, level);
        let mut bytes = vec![0; usize::try_from(HASH_BYTES << above).unwrap_or(0)];
        let first = index << above;
        let read = File::open(&file).and_then(|f| f.read_exact_at(&mut bytes, first * HASH_BYTES));
        match read {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                let have = self.len(level)?;
                return Err(TreeError::Short { file, have, needed: first + (1 << above) });
            }
            Err(error) => return Err(TreeError::Io { file, error }),
        }
        let mut hashes: Vec<Hash> = bytes.as_chunks().0.to_vec();
        while hashes.len() > 1 {
            hashes = hashes.chunks(2).map(|two| node(&two[0], &two[1])).collect();
        }
        Ok(hashes[0])
    }
}

/// Appends to the files of a tree. There is one in the process that writes the log.
#[derive(Debug)]
pub struct TreeFiles {
    reader: TreeReader,
    files: Vec<File>,
    pending: Vec<Vec<u8>>,
    frontier: Frontier,
}

impl TreeFiles {
    /// Continues after the first `size` leaves; whatever is behind them goes.
    ///
    /// # Errors
    /// When the files have fewer, or cannot be used. [`TreeFiles::create`] begins anew then.
    pub fn open(log: &Path, size: u64) -> Result<Self, TreeError> {
        let mut tree = Self::files(log)?;
        for (level, file) in (0..LEVELS).zip(&tree.files) {
            let path = || level_path(log, level);
            let (have, needed) = (tree.reader.len(level)?, level_len(level, size));
            if have < needed {
                return Err(TreeError::Short { file: path(), have, needed });
            }
            file.set_len(needed * HASH_BYTES)
                .map_err(|error| TreeError::Io { file: path(), error })?;
        }
        tree.frontier = Frontier::of(&tree.reader, size)?;
        Ok(tree)
    }

    /// Begins anew, with no leaves.
    ///
    /// # Errors
    /// When the files cannot be used.
    pub fn create(log: &Path) -> Result<Self, TreeError> {
        Self::open(log, 0)
    }

    /// Begins anew, but for the hashes of the first `keep` leaves.
    ///
    /// # Errors
    /// When there are fewer, or the files cannot be used.
    pub fn remake(log: &Path, keep: u64) -> Result<Self, TreeError> {
        let (now, before) = (log.join(TREE), log.join(TREE_BEFORE));
        let leaves = before.join("0");
        let at = |error| TreeError::Io { file: leaves.clone(), error };
        // Not there yet, unless this was begun by a process that ended.
        if keep > 0 && !before.exists() {
            std::fs::rename(&now, &before).map_err(at)?;
        }
        let mut tree = Self::create(log)?;
        if keep > 0 {
            let mut file =
                io::BufReader::with_capacity(PENDING_MAX, File::open(&leaves).map_err(at)?);
            for _ in 0..keep {
                let mut leaf = [0; 32];
                file.read_exact(&mut leaf).map_err(at)?;
                tree.push(leaf)?;
            }
            tree.sync()?;
            std::fs::remove_dir_all(&before).map_err(at)?;
        }
        Ok(tree)
    }

    fn files(log: &Path) -> Result<Self, TreeError> {
        let folder = log.join(TREE);
        let failed = |file: &Path, error| TreeError::Io { file: file.to_owned(), error };
        std::fs::create_dir_all(&folder).map_err(|error| failed(&folder, error))?;
        let open = |level| {
            let path = level_path(log, level);
            let opened = OpenOptions::new().append(true).create(true).open(&path);
            opened.map_err(|error| failed(&path, error))
        };
        let files = (0..LEVELS).map(open).collect::<Result<_, _>>()?;
        let pending = vec![Vec::new(); LEVELS as usize];
        let reader = TreeReader::new(log);
        Ok(Self { reader, files, pending, frontier: Frontier::default() })
    }

    pub fn frontier(&self) -> &Frontier {
        &self.frontier
    }

    /// Adds the next leaf. It is in the files after a flush.
    ///
    /// # Errors
    /// When much waited and could not be written; the tree has to be opened again then.
    pub fn push(&mut self, leaf: Hash) -> Result<(), TreeError> {
        let pending = &mut self.pending;
        self.frontier.push(leaf, |height, hash| {
            if height.is_multiple_of(STEP)
                && let Some(level) = pending.get_mut((height / STEP) as usize)
            {
                level.extend_from_slice(hash);
            }
        });
        match self.pending[0].len() < PENDING_MAX {
            true => Ok(()),
            false => self.flush(),
        }
    }

    /// Hands what waits to the operating system.
    ///
    /// # Errors
    /// When it cannot be written; the tree has to be opened again then.
    pub fn flush(&mut self) -> Result<(), TreeError> {
        for (level, (file, bytes)) in (0..).zip(self.files.iter_mut().zip(&mut self.pending)) {
            let path = || level_path(&self.reader.log, level);
            file.write_all(bytes).map_err(|error| TreeError::Io { file: path(), error })?;
            bytes.clear();
        }
        Ok(())
    }

    /// Flushes, and asks all of it onto the disk.
    ///
    /// # Errors
    /// As [`TreeFiles::flush`].
    pub fn sync(&mut self) -> Result<(), TreeError> {
        self.flush()?;
        for (level, file) in (0..).zip(&self.files) {
            // Levels without a hash have nothing to lose.
            if level == 0 || level_len(level, self.frontier.size) > 0 {
                file.sync_data().map_err(|error| TreeError::Io {
                    file: level_path(&self.reader.log, level),
                    error,
                })?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
