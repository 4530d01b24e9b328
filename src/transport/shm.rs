//! System shared memory regions that clients registered; off by default.
//!
//! Invariants:
//! - Nothing is mapped. Bytes are copied with positioned reads and writes, so a client that
//!   truncates or rewrites its file gets an error or its own bytes, never a signal in here.
//! - A key is one name directly under the system's shared memory folder, opened once.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::RwLock;

use crate::domain::{ErrorKind, Failure};

/// Most regions at once.
pub const REGIONS_MAX: usize = 256;
/// Longest region name or key, in bytes.
pub const SHM_NAME_LEN_MAX: usize = 255;
/// Largest region, in bytes.
pub const REGION_BYTES_MAX: usize = 1 << 30;

/// Keys that start so are ours.
const OWN_PREFIX: &str = "tidegate";
/// Where POSIX shared memory lives.
const SHM_DIR: &str = "/dev/shm";

/// A registered region as clients see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Region {
    pub name: String,
    pub key: String,
    pub offset: usize,
    pub byte_size: usize,
}

struct Open {
    region: Region,
    file: File,
}

/// Registered regions.
pub struct SharedMemory {
    enabled: bool,
    regions: RwLock<BTreeMap<String, Arc<Open>>>,
}

impl SharedMemory {
    pub fn new(enabled: bool) -> Self {
        Self { enabled, regions: RwLock::default() }
    }

    pub fn is_enabled(&self) -> bool {
        self.enabled
    }

    /// # Errors
    /// `Unsupported` when off; `InvalidInput` for a name in use, a bad key or a size that the
    /// memory does not have.
    pub fn register(
        &self,
        name: &str,
        key: &str,
        offset: usize,
        byte_size: usize,
    ) -> Result<(), Failure> {
        self.check_enabled()?;
        if name.is_empty() || name.len() > SHM_NAME_LEN_MAX {
            return Err(Failure::invalid(format!(
                "name of a shared memory region must have 1 to {SHM_NAME_LEN_MAX} bytes, got {}",
                name.len()
            )));
        }
        if byte_size > REGION_BYTES_MAX {
            return Err(Failure::invalid(format!(
                "shared memory region '{name}' has {byte_size} bytes, the limit is {REGION_BYTES_MAX}"
            )));
        }
        let file = open(key)?;
        check_size(&file, name, offset, byte_size)?;
        let region = Region { name: name.to_owned(), key: key.to_owned(), offset, byte_size };
        let mut regions = self.regions.write();
        if regions.contains_key(name) {
            return Err(Failure::invalid(format!(
                "shared memory region '{name}' is already registered"
            )));
        }
        if regions.len() >= REGIONS_MAX {
            let kind = ErrorKind::Overloaded;
            let text = format!("{REGIONS_MAX} shared memory regions are registered, no more fit");
            return Err(Failure::new(kind, text));
        }
        regions.insert(name.to_owned(), Arc::new(Open { region, file }));
        Ok(())
    }

    /// Forgets one region, or all; one that is not there is no error.
    ///
    /// # Errors
    /// `Unsupported` when off.
    pub fn unregister(&self, name: Option<&str>) -> Result<(), Failure> {
        // Clients clear all regions before they start, whether or not they will use any.
        if !self.enabled && name.is_none() {
            return Ok(());
        }
        self.check_enabled()?;
        let mut regions = self.regions.write();
        match name {
            Some(name) => drop(regions.remove(name)),
            None => regions.clear(),
        }
        Ok(())
    }

    /// One region, or all by name.
    ///
    /// # Errors
    /// `Unsupported` when off; `NotFound` for a region that is not registered.
    pub fn status(&self, name: Option<&str>) -> Result<Vec<Region>, Failure> {
        self.check_enabled()?;
        match name {
            Some(name) => Ok(vec![self.region(name)?.region.clone()]),
            None => Ok(self.regions.read().values().map(|open| open.region.clone()).collect()),
        }
    }

    /// Copies `size` bytes out, from `offset` in the region.
    ///
    /// # Errors
    /// As `status`; `InvalidInput` when the range is not inside the region, or the client has cut
    /// the memory short.
    pub fn read(&self, region: &str, offset: usize, size: usize) -> Result<Bytes, Failure> {
        self.check_enabled()?;
        let open = self.region(region)?;
        let at = open.at(offset, size)?;
        let mut data = Vec::new();
        data.try_reserve_exact(size).map_err(|_| {
            Failure::new(ErrorKind::Overloaded, format!("no memory for {size} bytes of input"))
        })?;
        data.resize(size, 0);
        open.file.read_exact_at(&mut data, at).map_err(|error| open.broken(&error))?;
        Ok(data.into())
    }

    /// Copies `data` in, at `offset` in the region.
    ///
    /// # Errors
    /// As `read`.
    pub fn write(&self, region: &str, offset: usize, data: &[u8]) -> Result<(), Failure> {
        self.check_enabled()?;
        let open = self.region(region)?;
        let at = open.at(offset, data.len())?;
        // A write past the end would grow a file that its owner has cut.
        check_size(&open.file, region, open.region.offset, offset + data.len())?;
        open.file.write_all_at(data, at).map_err(|error| open.broken(&error))
    }

    fn check_enabled(&self) -> Result<(), Failure> {
        if self.enabled {
            return Ok(());
        }
        Err(Failure::unsupported(
            "system shared memory is off, set 'server.system_shared_memory' to turn it on",
        ))
    }

    fn region(&self, name: &str) -> Result<Arc<Open>, Failure> {
        self.regions.read().get(name).map(Arc::clone).ok_or_else(|| {
            let name: String = name.chars().take(SHM_NAME_LEN_MAX).collect();
            Failure::not_found(format!("shared memory region '{name}' is not registered"))
        })
    }
}

impl Open {
    /// Position in the file of a range in the region.
    fn at(&self, offset: usize, size: usize) -> Result<u64, Failure> {
        let Region { name, byte_size, .. } = &self.region;
        let inside = offset.checked_add(size).is_some_and(|end| end <= *byte_size);
        let at = self.region.offset.checked_add(offset).and_then(|at| u64::try_from(at).ok());
        match at {
            Some(at) if inside => Ok(at),
            _ => Err(Failure::invalid(format!(
                "{size} bytes at offset {offset} are not inside shared memory region '{name}' of \
                 {byte_size} bytes"
            ))),
        }
    }

    fn broken(&self, error: &std::io::Error) -> Failure {
        let Region { name, .. } = &self.region;
        tracing::debug!(region = name, %error, "shared memory");
        Failure::invalid(format!(
            "shared memory region '{name}' is shorter than it was, or cannot be used"
        ))
    }
}

fn open(key: &str) -> Result<File, Failure> {
    let bare = key.strip_prefix('/').unwrap_or(key);
    let one_name = !bare.is_empty()
        && bare.len() <= SHM_NAME_LEN_MAX
        && bare != "."
        && bare != ".."
        && !bare.bytes().any(|byte| byte == b'/' || byte == 0);
    if !one_name {
        return Err(Failure::invalid(format!(
            "shared memory key must be one name of 1 to {SHM_NAME_LEN_MAX} bytes after an optional '/'"
        )));
    }
    if bare.starts_with(OWN_PREFIX) {
        return Err(Failure::invalid(format!(
            "shared memory keys that start with '{OWN_PREFIX}' are reserved, got '{bare}'"
        )));
    }
    let cannot = || Failure::invalid(format!("cannot open shared memory '{bare}'"));
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        // A pipe in the folder must not block us, nor a link lead elsewhere.
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(Path::new(SHM_DIR).join(bare))
        .map_err(|_| cannot())?;
    match file.metadata() {
        Ok(metadata) if metadata.is_file() => Ok(file),
        _ => Err(cannot()),
    }
}

fn check_size(file: &File, name: &str, offset: usize, byte_size: usize) -> Result<(), Failure> {
    let size = file.metadata().map_or(0, |metadata| metadata.len());
    let end = offset.checked_add(byte_size).and_then(|end| u64::try_from(end).ok());
    if end.is_some_and(|end| end <= size) {
        return Ok(());
    }
    Err(Failure::invalid(format!(
        "shared memory region '{name}' needs {byte_size} bytes at offset {offset}, the memory has {size}"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A shared memory file that goes away with the test.
    struct Memory(tempfile::NamedTempFile);

    impl Memory {
        fn new(content: &[u8]) -> Self {
            let file = tempfile::Builder::new().prefix("shm-test-").tempfile_in(SHM_DIR).unwrap();
            std::fs::write(file.path(), content).unwrap();
            Self(file)
        }

        fn key(&self) -> String {
            format!("/{}", self.0.path().file_name().unwrap().to_str().unwrap())
        }
    }

    #[test]
    fn bytes_go_in_and_out_of_a_region() {
        let memory = Memory::new(b"0123456789");
        let shm = SharedMemory::new(true);
        shm.register("r", &memory.key(), 2, 6).unwrap();
        assert_eq!(&shm.read("r", 1, 3).unwrap()[..], b"345");
        shm.write("r", 4, b"xy").unwrap();
        assert_eq!(std::fs::read(memory.0.path()).unwrap(), b"012345xy89");
        assert!(shm.write("r", 5, b"xy").is_err());
        assert!(shm.read("r", 0, 7).is_err());
        assert!(shm.read("r", usize::MAX, 2).is_err());
        assert!(shm.register("r", &memory.key(), 0, 1).is_err(), "the name is taken");
        assert_eq!(shm.status(None).unwrap().len(), 1);
        assert_eq!(shm.status(Some("r")).unwrap()[0].offset, 2);
        shm.unregister(Some("r")).unwrap();
        assert_eq!(shm.read("r", 0, 1).unwrap_err().kind, ErrorKind::NotFound);
    }

    #[test]
    fn memory_cut_short_is_an_error() {
        let memory = Memory::new(&[7; 64]);
        let shm = SharedMemory::new(true);
        shm.register("r", &memory.key(), 0, 64).unwrap();
        memory.0.as_file().set_len(8).unwrap();
        assert!(shm.read("r", 0, 64).is_err());
        assert!(shm.write("r", 0, &[1; 64]).is_err());
        assert_eq!(memory.0.as_file().metadata().unwrap().len(), 8, "a write does not grow it");
    }

    #[test]
    fn only_plain_keys_of_existing_memory_are_taken() {
        let memory = Memory::new(&[0; 4]);
        let shm = SharedMemory::new(true);
        for bad in ["", "/", "..", "/..", "a/b", "//a", "/../etc/passwd", "tidegate-x", "/tidegate"]
        {
            assert!(shm.register("r", bad, 0, 1).is_err(), "{bad}");
        }
        assert!(shm.register("r", "/surely-not-there", 0, 1).is_err());
        assert!(shm.register("r", &memory.key(), 0, 5).is_err());
        assert!(shm.register("r", &memory.key(), usize::MAX, 5).is_err());
        assert!(shm.register("", &memory.key(), 0, 1).is_err());
        assert!(shm.register("r", &memory.key(), 0, 4).is_ok());
    }

    #[test]
    fn off_means_off_but_clearing_is_harmless() {
        let shm = SharedMemory::new(false);
        assert_eq!(shm.register("r", "/k", 0, 1).unwrap_err().kind, ErrorKind::Unsupported);
        assert_eq!(shm.status(None).unwrap_err().kind, ErrorKind::Unsupported);
        assert!(shm.read("r", 0, 1).unwrap_err().message.contains("server.system_shared_memory"));
        assert!(shm.unregister(None).is_ok());
    }
}
