//! Opens files of a repository without ever leaving it.
//!
//! Invariants:
//! - A path resolves beneath the folder it is opened from, symbolic links included.
//! - Only regular files are opened, and opening one never waits (a FIFO would).

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Component, Path};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;

/// Tries of one lookup while others rename folders under it.
const RACE_TRIES: usize = 16;

/// An open folder; what is opened from it lies beneath it.
pub(super) struct Folder {
    fd: OwnedFd,
}

/// What lies under a name, as far as can be told without opening it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) kind: Kind,
    pub(super) size: u64,
    /// When the content was written, as whoever wrote it says.
    pub(super) written: SystemTime,
    /// When content, name or mode last changed: nobody can set this one back.
    pub(super) changed: SystemTime,
    pub(super) inode: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Folder,
    /// A link to a folder beneath: what lies in it is seen where it lies.
    FolderLink,
    Special,
}

/// What may be refused about a file, besides its not being there.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConfineError {
    #[error("is not there")]
    Missing,
    #[error("leaves its folder")]
    Escapes,
    #[error("is {what}, expected a regular file")]
    NotRegular { what: &'static str },
    #[error("has another hard link, expected a file of its own")]
    HardLinked,
    #[error("cannot be opened: {0}")]
    Io(Errno),
}

impl From<Errno> for ConfineError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT | Errno::NOTDIR => Self::Missing,
            Errno::XDEV | Errno::LOOP => Self::Escapes,
            Errno::NXIO => Self::NotRegular { what: "a socket or device" },
            other => Self::Io(other),
        }
    }
}

impl Folder {
    /// The root, which the operator chose: links in `path` itself are followed.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { fd: rustix::fs::openat(CWD, path, flags, Mode::empty())? })
    }

    pub(super) fn folder(&self, relative: &str) -> Result<Self, ConfineError> {
        let fd = self.beneath(relative, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(Self { fd })
    }

    /// A regular file beneath this folder.
    pub(super) fn file(&self, relative: &str) -> Result<File, ConfineError> {
        let fd = self.beneath(relative, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?;
        let stat = rustix::fs::fstat(&fd)?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok(File::from(fd)),
            other => Err(ConfineError::NotRegular { what: kind(other) }),
        }
    }

    /// What lies under a name; links are followed beneath this folder.
    pub(super) fn facts(&self, name: &str) -> Result<Facts, ConfineError> {
        let facts = facts(&rustix::fs::fstat(self.beneath(name, OFlags::PATH)?)?);
        let own = rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let link = FileType::from_raw_mode(own.st_mode) == FileType::Symlink;
        Ok(match facts.kind {
            Kind::Folder if link => Facts { kind: Kind::FolderLink, ..facts },
            _ => facts,
        })
    }

    /// What this folder itself is.
    pub(super) fn own_facts(&self) -> Result<Facts, ConfineError> {
        Ok(facts(&rustix::fs::fstat(&self.fd)?))
    }

    /// As [`Folder::file`], and no other name may lead to the same content.
    pub(super) fn sole_file(&self, relative: &str) -> Result<File, ConfineError> {
        let file = self.file(relative)?;
        if rustix::fs::fstat(&file)?.st_nlink > 1 {
            return Err(ConfineError::HardLinked);
        }
        Ok(file)
    }

    /// The file's text, if it is there; an error when it is larger than `size_max`.
    pub(super) fn text(&self, relative: &str, size_max: u64) -> io::Result<Option<String>> {
        let file = match self.file(relative) {
            Ok(file) => file,
            Err(ConfineError::Missing) => return Ok(None),
            Err(error) => return Err(io::Error::other(format!("'{relative}' {error}"))),
        };
        let mut text = String::new();
        let read = file.take(size_max + 1).read_to_string(&mut text)?;
        if u64::try_from(read).is_ok_and(|read| read > size_max) {
            let message = format!("'{relative}' is larger than the limit of {size_max} bytes");
            return Err(io::Error::other(message));
        }
        Ok(Some(text))
    }

    /// Names in this folder that are text, sorted.
    pub(super) fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            let entry = entry?;
            match entry.file_name().to_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(name) => names.push(name.to_owned()),
            }
        }
        names.sort();
        Ok(names)
    }

    /// Whether `name` is a folder, or a link to one; where it leads is checked when it is opened.
    pub(super) fn is_folder(&self, name: &str) -> bool {
        rustix::fs::statat(&self.fd, name, AtFlags::empty())
            .is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Directory)
    }

    fn beneath(&self, relative: &str, flags: OFlags) -> Result<OwnedFd, ConfineError> {
        check_relative(relative)?;
        let flags = flags | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        for _ in 0..RACE_TRIES {
            match rustix::fs::openat2(&self.fd, relative, flags, Mode::empty(), resolve) {
                Err(Errno::AGAIN) => {}
                // Kernels before 5.6, and sandboxes that do not know the call.
                Err(Errno::NOSYS | Errno::PERM) => return self.step_by_step(relative, flags),
                other => return Ok(other?),
            }
        }
        Err(ConfineError::Io(Errno::AGAIN))
    }

    /// Follows no link at all.
    fn step_by_step(&self, relative: &str, flags: OFlags) -> Result<OwnedFd, ConfineError> {
        let mut at = self.fd.try_clone().map_err(|_| ConfineError::Io(Errno::MFILE))?;
        let mut parts = Path::new(relative).components().peekable();
        while let Some(part) = parts.next() {
            let last = parts.peek().is_none();
            let step = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let step = OFlags::NOFOLLOW | if last { flags } else { step };
            at = rustix::fs::openat(&at, part.as_os_str(), step, Mode::empty())?;
        }
        Ok(at)
    }
}

fn facts(stat: &rustix::fs::Stat) -> Facts {
    Facts {
        kind: match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Kind::File,
            FileType::Directory => Kind::Folder,
            _ => Kind::Special,
        },
        size: u64::try_from(stat.st_size).unwrap_or(0),
        written: time(stat.st_mtime, stat.st_mtime_nsec),
        changed: time(stat.st_ctime, stat.st_ctime_nsec),
        inode: stat.st_ino,
    }
}

/// A time since 1970; before that there were no files.
fn time(seconds: i64, nanos: impl TryInto<u32>) -> SystemTime {
    let nanos = nanos.try_into().unwrap_or(0).min(999_999_999);
    SystemTime::UNIX_EPOCH + Duration::new(u64::try_from(seconds).unwrap_or(0), nanos)
}

/// Only plain names: no root, no `..`, no `.`.
pub(super) fn check_relative(relative: &str) -> Result<(), ConfineError> {
    let plain = Path::new(relative).components().all(|part| matches!(part, Component::Normal(_)));
    if relative.is_empty() || relative.contains(['\0', '\\']) || !plain {
        return Err(ConfineError::Escapes);
    }
    Ok(())
}

fn kind(file_type: FileType) -> &'static str {
    match file_type {
        FileType::Directory => "a folder",
        FileType::Fifo => "a FIFO",
        FileType::Socket => "a socket",
        FileType::CharacterDevice | FileType::BlockDevice => "a device",
        _ => "a special file",
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn nothing_outside_the_folder_is_opened() {
        let dir = tempfile::tempdir().unwrap();
        let inside = dir.path().join("in");
        std::fs::create_dir_all(inside.join("sub")).unwrap();
        std::fs::write(dir.path().join("secret"), "s").unwrap();
        std::fs::write(inside.join("sub/data"), "d").unwrap();
        symlink("../secret", inside.join("out")).unwrap();
        symlink("sub/data", inside.join("near")).unwrap();
        symlink("/etc", inside.join("etc")).unwrap();
        std::fs::hard_link(dir.path().join("secret"), inside.join("linked")).unwrap();
        let fifo = inside.join("fifo");
        rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RUSR, 0).unwrap();

        let folder = Folder::open(&inside).unwrap();
        assert!(folder.file("sub/data").is_ok());
        assert!(folder.file("near").is_ok());
        assert!(folder.file("linked").is_ok());
        for bad in ["../secret", "/etc/passwd", "out", "etc/passwd", "fifo", "sub", "", "a\0b"] {
            assert!(folder.file(bad).is_err(), "{bad}");
            let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let by_steps = check_relative(bad).and_then(|()| folder.step_by_step(bad, flags));
            assert!(by_steps.is_err() || ["fifo", "sub"].contains(&bad), "{bad}");
        }
        assert!(matches!(folder.sole_file("linked"), Err(ConfineError::HardLinked)));
        assert!(matches!(folder.file("gone"), Err(ConfineError::Missing)));
        let data = folder.facts("sub/data").unwrap();
        assert_eq!((data.kind, data.size), (Kind::File, 1));
        assert_eq!(folder.facts("near").unwrap(), data);
        assert_eq!(folder.facts("sub").unwrap().kind, Kind::Folder);
        assert_eq!(folder.facts("fifo").unwrap().kind, Kind::Special);
        for bad in ["out", "etc", "gone", "..", "/etc"] {
            assert!(folder.facts(bad).is_err(), "{bad}");
        }
        assert!(folder.text("sub/data", 0).is_err());
        assert_eq!(folder.text("sub/data", 1).unwrap().as_deref(), Some("d"));
    }
}
