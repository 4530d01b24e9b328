//! What a repository folder holds: models and their versions.

use std::io;
use std::path::{Path, PathBuf};

use super::Settings;
use super::confined::{ConfineError, Folder};
use super::fetch::MODEL_FILE;
use super::manifest;
use crate::domain::{ModelName, Version, VersionPolicy};

/// Where the models lie: a folder of models, or the folder of one.
///
/// ```text
/// many:  <root>/<model>/<version>/model.onnx
/// sole:  <root>/<version>/model.onnx   or   <root>/model.onnx, which is version 1
/// ```
#[derive(Clone, Debug)]
pub(super) struct Repository {
    root: PathBuf,
    /// The name of the model whose folder `root` is.
    sole: Option<ModelName>,
}

impl Repository {
    pub(super) fn of_models(root: impl Into<PathBuf>) -> Self {
        Self { root: root.into(), sole: None }
    }

    /// As configured. A name alone makes no sole model: its folder has to look like one.
    pub(super) fn new(settings: &Settings) -> Self {
        let root = settings.repository.clone();
        let sole = settings.model_name.clone().filter(|_| is_model(&root));
        Self { root, sole }
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn sole(&self) -> Option<&ModelName> {
        self.sole.as_ref()
    }

    pub(super) fn models(&self) -> io::Result<Vec<ModelName>> {
        let (models, notes) = self.found()?;
        for note in notes {
            tracing::warn!("{note}");
        }
        Ok(models)
    }

    /// The models, and what is no model's folder, and why.
    pub(super) fn found(&self) -> io::Result<(Vec<ModelName>, Vec<String>)> {
        match &self.sole {
            Some(model) => Ok((vec![model.clone()], Vec::new())),
            None => models(&self.root),
        }
    }

    /// A model's folder in a folder of models, whether or not it is there.
    pub(super) fn path(&self, model: &ModelName) -> PathBuf {
        self.root.join(model.as_str())
    }

    /// The model's folder, opened; the outer error is the repository's own.
    pub(super) fn open(&self, model: &ModelName) -> io::Result<Result<Folder, ConfineError>> {
        let root = Folder::open(&self.root)?;
        Ok(match &self.sole {
            Some(sole) if sole == model => Ok(root),
            Some(_) => Err(ConfineError::Missing),
            None => root.folder(model.as_str()),
        })
    }

    pub(super) fn versions(&self, model: &Folder) -> io::Result<Vec<Version>> {
        let there = versions(model)?;
        match self.sole {
            Some(_) if there.is_empty() => Ok(Version::new(1).into_iter().collect()),
            _ => Ok(there),
        }
    }

    /// One version's folder in the model's, which is the same for a sole model without versions.
    pub(super) fn version(&self, model: Folder, version: Version) -> Result<Folder, ConfineError> {
        let flat = self.sole.is_some() && versions(&model).is_ok_and(|there| there.is_empty());
        match flat && version.get() == 1 {
            true => Ok(model),
            false => model.folder(&version.to_string()),
        }
    }
}

/// Whether a folder is one model's: it holds a model file, a model's configuration, or a version.
fn is_model(path: &Path) -> bool {
    let Ok(folder) = Folder::open(path) else { return false };
    let is_file = |name: &str| folder.file(name).is_ok();
    if is_file(MODEL_FILE) || manifest::FILES.into_iter().any(is_file) {
        return true;
    }
    let there = versions(&folder).unwrap_or_default();
    there.iter().any(|version| is_file(&format!("{version}/{MODEL_FILE}")))
}

/// Models of the repository, by name. A folder whose name is no model name is reported, not served.
fn models(repository: &Path) -> io::Result<(Vec<ModelName>, Vec<String>)> {
    let folder = Folder::open(repository)?;
    let (mut models, mut notes) = (Vec::new(), Vec::new());
    for name in folder.names()? {
        if name.starts_with('.') || !folder.is_folder(&name) {
            continue;
        }
        match name.parse() {
            Ok(model) => models.push(model),
            Err(error) => notes.push(format!("folder '{name}' is no model's: {error}")),
        }
    }
    Ok((models, notes))
}

/// Versions in a model's folder, ascending. Other folders are none of ours.
fn versions(model: &Folder) -> io::Result<Vec<Version>> {
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
        let (names, notes) = models(dir.path()).unwrap();
        assert_eq!(names.iter().map(ModelName::as_str).collect::<Vec<_>>(), ["iris"]);
        assert_eq!(notes.len(), 1, "{notes:?}");

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

    #[test]
    fn a_named_model_may_be_the_whole_repository() {
        let dir = tempfile::tempdir().unwrap();
        let name: ModelName = "iris".parse().unwrap();
        let open = || {
            let settings = Settings {
                model_name: Some(name.clone()),
                ..Settings::new(dir.path(), dir.path().join("state"))
            };
            Repository::new(&settings)
        };
        let numbers = |repository: &Repository| -> Vec<u64> {
            let folder = repository.open(&name).unwrap().unwrap();
            repository.versions(&folder).unwrap().into_iter().map(Version::get).collect()
        };

        // A model file alone: version 1 is the folder itself.
        std::fs::write(dir.path().join("model.onnx"), "flat").unwrap();
        let repository = open();
        assert_eq!(repository.models().unwrap(), std::slice::from_ref(&name));
        assert_eq!(numbers(&repository), [1]);
        let folder = repository.open(&name).unwrap().unwrap();
        let first = repository.version(folder, Version::new(1).unwrap()).unwrap();
        assert_eq!(first.text("model.onnx", 10).unwrap().as_deref(), Some("flat"));
        let folder = repository.open(&name).unwrap().unwrap();
        assert!(repository.version(folder, Version::new(2).unwrap()).is_err());
        assert!(repository.open(&"other".parse().unwrap()).unwrap().is_err());

        // Folders of versions: the file beside them is none.
        std::fs::create_dir(dir.path().join("3")).unwrap();
        std::fs::write(dir.path().join("3/model.onnx"), "third").unwrap();
        assert_eq!(numbers(&open()), [3]);
        std::fs::remove_file(dir.path().join("model.onnx")).unwrap();
        assert_eq!(numbers(&open()), [3]);
        std::fs::rename(dir.path().join("3/model.onnx"), dir.path().join("3/net.onnx")).unwrap();
        std::fs::write(dir.path().join("tidegate.toml"), "[model]\nfile = 'net.onnx'").unwrap();
        assert_eq!(numbers(&open()), [3]);
    }

    #[test]
    fn a_folder_of_models_stays_one_whatever_the_name() {
        let dir = tempfile::tempdir().unwrap();
        // '7' is a model here: what lies in it is a version, not a model file.
        for path in ["iris/1", "7/1"] {
            std::fs::create_dir_all(dir.path().join(path)).unwrap();
            std::fs::write(dir.path().join(path).join("model.onnx"), "").unwrap();
        }
        let settings = Settings {
            model_name: Some("iris".parse().unwrap()),
            ..Settings::new(dir.path(), dir.path().join("state"))
        };
        let names = Repository::new(&settings).models().unwrap();
        assert_eq!(names.iter().map(ModelName::as_str).collect::<Vec<_>>(), ["7", "iris"]);
    }
}
