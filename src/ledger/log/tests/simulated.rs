//! A disk that forgets: what was not synced, sector by sector, and names whose folder was not.
//!
//! The files are real, so that whatever reads sees them; beside each is kept what would be there
//! after the power went.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::path::PathBuf;

use parking_lot::Mutex as Lock;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::super::disk::DiskFile;
use super::*;

const SECTOR: usize = 512;
const PAGE: usize = 4096;

pub(super) struct Simulated {
    state: Arc<Lock<State>>,
    /// Answers to a sync without doing one.
    lies: bool,
}

#[derive(Default)]
struct State {
    inodes: Vec<Inode>,
    names: HashMap<PathBuf, usize>,
    /// What a folder holds on the disk, and what was done to it since, in order.
    durable: BTreeMap<PathBuf, usize>,
    since: Vec<Change>,
    syncs: u64,
}

#[derive(Clone)]
enum Change {
    Made(PathBuf, usize),
    Renamed(PathBuf, PathBuf, usize),
    Removed(PathBuf),
}

#[derive(Default)]
struct Inode {
    durable: Vec<u8>,
    current: Vec<u8>,
    /// Sectors written since the last sync ended; and of those, since one began that goes on.
    dirty: BTreeSet<usize>,
    again: BTreeSet<usize>,
}

impl Simulated {
    pub(super) fn new(lies: bool) -> Arc<Self> {
        Arc::new(Self { state: Arc::default(), lies })
    }

    pub(super) fn syncs(&self) -> u64 {
        self.state.lock().syncs
    }

    /// Writes into `folder` what is left when the power goes now.
    pub(super) fn cut(&self, folder: &Path, seed: u64) {
        let mut random = StdRng::seed_from_u64(seed);
        let state = self.state.lock();
        let mut names = state.durable.clone();
        // A journal keeps the first of them; not every file system has one.
        let journal = random.random_bool(0.5);
        let kept = random.random_range(0..=state.since.len());
        for (at, change) in state.since.iter().enumerate() {
            if if journal { kept <= at } else { random.random_bool(0.5) } {
                continue;
            }
            match change.clone() {
                Change::Made(path, inode) => {
                    names.insert(path, inode);
                }
                Change::Renamed(from, to, inode) => {
                    names.remove(&from);
                    names.insert(to, inode);
                }
                Change::Removed(path) => {
                    names.remove(&path);
                }
            }
        }
        for (path, inode) in names {
            let bytes = state.inodes[inode].after(&mut random);
            std::fs::write(folder.join(path.file_name().unwrap()), bytes).unwrap();
        }
    }
}

impl Inode {
    fn after(&self, random: &mut StdRng) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        if random.random_bool(0.5) {
            bytes.resize(self.current.len(), 0);
        }
        let share = [0.1, 0.5, 0.9, 1.0][random.random_range(0..4)];
        let pages: BTreeSet<usize> =
            self.dirty.iter().map(|sector| sector * SECTOR / PAGE).collect();
        for page in pages {
            let whole = random.random_bool(0.8);
            let written = random.random_bool(share);
            for sector in self.dirty.range(page * PAGE / SECTOR..(page + 1) * PAGE / SECTOR) {
                let written = if whole { written } else { random.random_bool(share) };
                let from = sector * SECTOR;
                let to = (from + SECTOR).min(bytes.len()).min(self.current.len());
                if written && from < to {
                    bytes[from..to].copy_from_slice(&self.current[from..to]);
                }
            }
        }
        bytes
    }

    fn touch(&mut self, from: usize, to: usize) {
        for sector in from / SECTOR..to.div_ceil(SECTOR) {
            self.dirty.insert(sector);
            self.again.insert(sector);
        }
    }
}

impl Disk for Simulated {
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let file = RealDisk.create(path)?;
        let mut state = self.state.lock();
        let inode = state.inodes.len();
        state.inodes.push(Inode::default());
        state.names.insert(path.to_owned(), inode);
        state.since.push(Change::Made(path.to_owned(), inode));
        Ok(Arc::new(SimulatedFile { file, state: self.state.clone(), inode, lies: self.lies }))
    }

    fn open(&self, _: &Path) -> io::Result<Arc<dyn DiskFile>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let mut state = self.state.lock();
        RealDisk.rename(from, to)?;
        let inode = state.names.remove(from).unwrap();
        state.names.insert(to.to_owned(), inode);
        state.since.push(Change::Renamed(from.to_owned(), to.to_owned(), inode));
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let mut state = self.state.lock();
        RealDisk.remove(path)?;
        state.names.remove(path);
        state.since.push(Change::Removed(path.to_owned()));
        Ok(())
    }

    fn sync_dir(&self, _: &Path) -> io::Result<()> {
        let mut state = self.state.lock();
        state.since.clear();
        state.durable = state.names.iter().map(|(path, inode)| (path.clone(), *inode)).collect();
        Ok(())
    }

    fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        RealDisk.free_bytes(path)
    }
}

struct SimulatedFile {
    file: Arc<dyn DiskFile>,
    state: Arc<Lock<State>>,
    inode: usize,
    lies: bool,
}

impl DiskFile for SimulatedFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<usize> {
        let mut state = self.state.lock();
        let done = self.file.write_at(bytes, offset)?;
        let inode = &mut state.inodes[self.inode];
        let (from, to) = (offset as usize, offset as usize + done);
        if inode.current.len() < to {
            inode.current.resize(to, 0);
        }
        inode.current[from..to].copy_from_slice(&bytes[..done]);
        inode.touch(from, to);
        Ok(done)
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(bytes, offset)
    }

    fn sync(&self) -> io::Result<()> {
        let snapshot = {
            let mut state = self.state.lock();
            state.syncs += 1;
            let inode = &mut state.inodes[self.inode];
            inode.again.clear();
            inode.current.clone()
        };
        // What is on its way may be there or not when the power goes.
        std::thread::sleep(Duration::from_micros(300));
        if !self.lies {
            let inode = &mut self.state.lock().inodes[self.inode];
            inode.durable = snapshot;
            inode.dirty = inode.again.clone();
        }
        Ok(())
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        self.file.allocate(offset, len)?;
        let current = &mut state.inodes[self.inode].current;
        let to = (offset + len) as usize;
        if current.len() < to {
            current.resize(to, 0);
        }
        Ok(())
    }

    fn truncate(&self, len: u64) -> io::Result<()> {
        let mut state = self.state.lock();
        self.file.truncate(len)?;
        state.inodes[self.inode].current.resize(len as usize, 0);
        Ok(())
    }
}
