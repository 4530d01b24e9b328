//! Small files that are there whole or not at all, whatever happens while they are written.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

/// Readable by this user alone.
pub(super) const PRIVATE: u32 = 0o600;
pub(super) const PUBLIC: u32 = 0o644;
/// Ends the name of a file that is not whole yet.
pub(super) const TEMPORARY: &str = "tmp";

/// Puts `bytes` where a reader finds the old content or the new one, also after power loss.
///
/// # Errors
/// When it cannot be done; what was there is there still.
pub(super) fn replace(path: &Path, mode: u32, bytes: &[u8]) -> io::Result<()> {
    let temporary = path.with_added_extension(TEMPORARY);
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(mode);
    let mut file = options.open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&temporary, path)?;
    sync_folder_of(path)
}

/// Makes names that were given, changed or taken in the folder of `path` last.
///
/// # Errors
/// When it cannot be done.
pub(super) fn sync_folder_of(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}
