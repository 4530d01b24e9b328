//! What a repository folder holds: models and their versions.

use std::io;
use std::path::Path;

use super::confined::Folder;
use crate::domain::{ModelName, Version, VersionPolicy};

/// Models of the repository, by name. A folder whose name is no model name is reported, not served.
pub(super) fn models(repository: &Path) -> io::Result<Vec<ModelName>> {
    let folder = Folder::open(repository)?;
    let mut models = Vec::new();
    for name in folder.names()? {
        if name.starts_with('.') || !folder.is_folder(&name) {
            continue;
        }
        match name.parse() {
            Ok(model) => models.push(model),
            Err(error) => tracing::warn!(folder = name, %error, "not a model's folder"),
        }
    }
    Ok(models)
}

/// Versions in a model's folder, ascending. Other folders are none of ours.
pub(super) fn versions(model: &Folder) -> io::Result<Vec<Version>> {
    let names = model.names()?;
    let numbers = names.iter().filter(|name| model.is_folder(name));
    let mut versions: Vec<Version> = numbers.filter_map(|name| name.parse().ok()).collect();
    versions.sort();
    Ok(versions)
}

/// The versions that `policy` wants of those there are; ones it names and that are missing too,
/// so that their absence is seen.
pub(super) fn chosen(there: &[Version], policy: Option<&VersionPolicy>) -> Vec<Version> {
    match policy {
        None | Some(VersionPolicy::All) => there.to_vec(),
        Some(VersionPolicy::Latest(count)) => {
            there[there.len().saturating_sub((*count).max(1))..].to_vec()
        }
        Some(VersionPolicy::Specific(numbers)) => {
            let mut versions: Vec<_> = numbers.iter().filter_map(|&n| Version::new(n)).collect();
            versions.sort();
            versions.dedup();
            versions
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_models_and_versions() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["iris/1", "iris/10", "iris/2", "iris/02", "iris/draft", ".git", "a b/1"] {
            std::fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        std::fs::write(dir.path().join("README.md"), "").unwrap();
        let names = models(dir.path()).unwrap();
        assert_eq!(names.iter().map(ModelName::as_str).collect::<Vec<_>>(), ["iris"]);

        let folder = Folder::open(&dir.path().join("iris")).unwrap();
        let there = versions(&folder).unwrap();
        let numbers = |versions: Vec<Version>| -> Vec<u64> {
            versions.into_iter().map(Version::get).collect()
        };
        assert_eq!(numbers(there.clone()), [1, 2, 10]);
        assert_eq!(numbers(chosen(&there, Some(&VersionPolicy::Latest(2)))), [2, 10]);
        let specific = VersionPolicy::Specific(vec![3, 1, 1]);
        assert_eq!(numbers(chosen(&there, Some(&specific))), [1, 3]);
    }
}
