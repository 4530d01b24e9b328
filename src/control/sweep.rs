//! Removes what the state folder keeps of models that are not served any more.
//!
//! Invariants:
//! - What serves stays, and what a load may be using: the registry sweeps only between loads, and
//!   nothing goes that is so young that another process may be loading it.
//! - A copy is whole or gone, whenever the process ends: it is moved aside before it is removed.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use super::fetch::Cache;
use crate::domain::Digest;

/// Nothing younger is removed.
pub(super) const AGE_MIN: Duration = Duration::from_secs(600);
/// Most verdicts, and most lists of external data, that are remembered.
const FACTS_MAX: usize = 4096;
/// What is left of loads of a process that died goes after so long.
const LEFTOVER_AGE: Duration = Duration::from_secs(24 * 3600);

/// Something in the state folder, and when it was last used.
struct Found {
    path: PathBuf,
    name: String,
    used: SystemTime,
}

impl Cache {
    /// Removes copies that are not of `served`, but for the `spare` used last; and what was learnt
    /// of models long ago. Gives the number of copies removed.
    ///
    /// # Errors
    /// The first thing that could not be read or removed.
    pub(super) fn sweep(
        &self,
        served: &HashSet<Digest>,
        spare: usize,
        age_min: Duration,
    ) -> io::Result<usize> {
        let served: HashSet<String> = served.iter().map(Digest::hex).collect();
        let old =
            |found: &Found, age: Duration| found.used.elapsed().is_ok_and(|elapsed| elapsed >= age);
        let mut copies = newest_first(&self.folder("models"))?;
        copies.retain(|copy| !served.contains(&copy.name));
        let mut removed = 0;
        for copy in copies.iter().skip(spare).filter(|copy| old(copy, age_min)) {
            self.forget(&copy.name);
            self.remove(&copy.path)?;
            removed += 1;
        }
        for derived in newest_first(&self.folder("derived"))? {
            let of_copy = self.folder("models").join(&derived.name).exists();
            if !of_copy && old(&derived, age_min) {
                self.remove(&derived.path)?;
            }
        }
        for kind in ["probe", "external"] {
            for fact in newest_first(&self.folder(kind))?.iter().skip(FACTS_MAX) {
                if old(fact, age_min) {
                    fs::remove_file(&fact.path)?;
                }
            }
        }
        for leftover in newest_first(&self.folder("tmp"))? {
            if old(&leftover, LEFTOVER_AGE) {
                fs::remove_dir_all(&leftover.path)?;
            }
        }
        Ok(removed)
    }

    /// Takes a folder out of sight at once and then apart.
    fn remove(&self, folder: &Path) -> io::Result<()> {
        let aside = self.staging()?;
        fs::rename(folder, aside.path())
    }
}

/// Marks a copy as used now. Without, it goes sooner, and is made again when it is needed.
pub(super) fn touch(folder: &Path) {
    let touched = File::open(folder).and_then(|file| file.set_modified(SystemTime::now()));
    if let Err(error) = touched {
        tracing::debug!(folder = %folder.display(), %error, "time of use not noted");
    }
}

fn newest_first(folder: &Path) -> io::Result<Vec<Found>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let used = entry.metadata()?.modified()?;
        found.push(Found { path: entry.path(), name, used });
    }
    found.sort_by_key(|found| std::cmp::Reverse(found.used));
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(cache: &Cache, kind: &str, name: &str, age_s: u64) -> PathBuf {
        let path = cache.folder(kind).join(name);
        fs::create_dir(&path).unwrap();
        fs::write(path.join("file"), "content").unwrap();
        let used = SystemTime::now() - Duration::from_secs(age_s);
        File::open(&path).unwrap().set_modified(used).unwrap();
        path
    }

    #[test]
    fn what_serves_is_new_or_was_used_last_stays() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path()).unwrap();
        let digest = |at: u8| Digest::new([at; 32]);
        // The older, the higher its number.
        let copies: Vec<PathBuf> = (1..=6)
            .map(|at| made(&cache, "models", &digest(at).hex(), 1000 * u64::from(at)))
            .collect();
        let derived = made(&cache, "derived", &digest(6).hex(), 6000);
        let kept = made(&cache, "derived", &digest(5).hex(), 6000);
        let leftovers = [made(&cache, "tmp", "1-1", 200_000), made(&cache, "tmp", "1-2", 60)];
        let served = HashSet::from([digest(5)]);

        assert_eq!(cache.sweep(&served, 2, Duration::from_secs(3500)).unwrap(), 2);
        let there: Vec<bool> = copies.iter().map(|path| path.exists()).collect();
        assert_eq!(there, [true, true, true, false, true, false], "3 is too young, 5 serves");
        assert!(!derived.exists() && kept.exists());
        assert_eq!(leftovers.map(|path| path.exists()), [false, true]);

        touch(&copies[2]);
        assert_eq!(cache.sweep(&HashSet::new(), 1, Duration::ZERO).unwrap(), 3);
        let there: Vec<bool> = copies.iter().map(|path| path.exists()).collect();
        assert_eq!(there, [false, false, true, false, false, false], "3 was used last");
    }
}
