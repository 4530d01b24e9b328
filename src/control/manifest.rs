//! How a model is to be served: `config.pbtxt` and `tidegate.toml`, merged.
//!
//! Invariants:
//! - No file is needed; then everything is at its default and inferred from the graph.
//! - `tidegate.toml` wins over `config.pbtxt`, key by key.
//! - All problems are reported at once, each with its file and path. What is valid in Triton and
//!   has no effect here is a warning.
//! - Nothing outside the model's folder is read.

use std::path::{Component, Path};

use crate::domain::{DataType, ModelSettings};

mod padding;
mod pbtxt;
mod recording;
mod toml_file;

/// Largest file that is read of a model's configuration.
const FILE_SIZE_MAX: u64 = 4 << 20;

const PBTXT: &str = "config.pbtxt";
pub(super) const TOML: &str = "tidegate.toml";
/// The files that may configure a model.
pub(super) const FILES: [&str; 2] = [PBTXT, TOML];

/// What the files say.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Manifest {
    pub settings: ModelSettings,
    /// Names, datatypes and shapes to hold against the graph's.
    pub declared: Option<Declared>,
    /// What has no effect, one line each.
    pub warnings: Vec<String>,
}

/// What `config.pbtxt` claims about the model; either list may be empty.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Declared {
    pub inputs: Vec<DeclaredTensor>,
    pub outputs: Vec<DeclaredTensor>,
    /// Above 0, `dims` are without the batch dimension.
    pub max_batch_size: usize,
}

#[derive(Clone, Debug, PartialEq)]
pub struct DeclaredTensor {
    pub name: String,
    pub datatype: DataType,
    /// −1 for any size.
    pub dims: Vec<i64>,
}

/// Everything that is wrong; never empty.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", problems.join("; "))]
pub struct ManifestError {
    pub problems: Vec<String>,
}

/// Reads the files in a model's folder, whose last part is the model's name.
///
/// # Errors
/// Everything that is wrong with either file.
pub fn read(model_dir: &Path) -> Result<Manifest, ManifestError> {
    let name = model_dir.file_name().and_then(|name| name.to_str());
    read_named(model_dir, name)
}

/// As [`read`], of a folder whose name says nothing about the model's.
///
/// # Errors
/// Everything that is wrong with either file.
pub fn read_sole(model_dir: &Path) -> Result<Manifest, ManifestError> {
    read_named(model_dir, None)
}

fn read_named(model_dir: &Path, name: Option<&str>) -> Result<Manifest, ManifestError> {
    let mut draft = Draft { folder: Some(model_dir), name, ..Draft::default() };
    if let Some(text) = draft.text_of(PBTXT) {
        pbtxt::apply_text(&mut draft, &text);
    }
    if let Some(text) = draft.text_of(TOML) {
        draft.file = TOML;
        toml_file::apply(&mut draft, &text);
    }
    draft.finish()
}

/// Reads Triton's JSON mapping, as load calls for the model `name` bring it along.
///
/// # Errors
/// Everything that is wrong with it.
pub fn from_json(json: &str, name: &str) -> Result<Manifest, ManifestError> {
    let mut draft = Draft { file: "config", name: Some(name), ..Draft::default() };
    pbtxt::apply_json(&mut draft, json);
    draft.finish()
}

/// A manifest in the making.
struct Draft<'a> {
    folder: Option<&'a Path>,
    /// What the model has to be called; `None`: anything.
    name: Option<&'a str>,
    /// File being read, for messages.
    file: &'static str,
    manifest: Manifest,
    problems: Vec<String>,
}

impl Default for Draft<'_> {
    fn default() -> Self {
        Self {
            folder: None,
            name: None,
            file: PBTXT,
            manifest: Manifest::default(),
            problems: Vec::new(),
        }
    }
}

impl Draft<'_> {
    fn problem(&mut self, path: &str, message: impl std::fmt::Display) {
        self.problems.push(format!("{}: {path}: {message}", self.file));
    }

    fn warn(&mut self, path: &str, message: impl std::fmt::Display) {
        self.manifest.warnings.push(format!("{}: {path}: {message}", self.file));
    }

    /// Content of a file in the folder; `None` when there is none or it cannot be read.
    fn text_of(&mut self, name: &'static str) -> Option<String> {
        let folder = self.folder?;
        match read_inside(folder, name) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                self.problems.push(format!("{name}: cannot be read: {error}"));
                None
            }
        }
    }

    /// Class names of `output` from a file with one name per line.
    fn read_labels(&mut self, path: &str, output: &str, file: &str) {
        let Some(folder) = self.folder else {
            return self.warn(path, "has no effect in a configuration that a load call brings");
        };
        match read_inside(folder, file) {
            Ok(text) => self.set_labels(output, text.lines().map(str::to_owned).collect()),
            Err(error) => self.problem(path, format!("'{file}' cannot be read: {error}")),
        }
    }

    fn set_labels(&mut self, output: &str, names: Vec<String>) {
        let labels = &mut self.manifest.settings.labels;
        labels.retain(|(name, _)| name != output);
        labels.push((output.to_owned(), names));
    }

    fn set_model_file(&mut self, path: &str, name: &str) {
        if is_file_name(name) {
            self.manifest.settings.model_file = Some(name.to_owned());
        } else {
            self.problem(path, format!("expected a file name without folders, got '{name}'"));
        }
    }

    /// Checks what only the whole can tell.
    fn finish(mut self) -> Result<Manifest, ManifestError> {
        let batch = self.manifest.settings.batch.clone();
        if let Some(size) = batch.preferred.iter().find(|size| **size > batch.size_max) {
            let most = batch.size_max;
            let message = format!("preferred size {size} is over the largest batch, {most}");
            self.problem("batch", message);
        }
        if batch.padding.is_some() {
            if self.manifest.settings.batched == Some(false) {
                self.problem("batch.padding", "expected a batched model, batching is off");
            } else if batch.size_max == 1 {
                self.warn("batch.padding", "has no effect, requests are never joined");
            }
        }
        let (levels, default) = (batch.priority_levels, batch.priority_default);
        if default > levels || (levels > 0 && default == 0) {
            let message = format!("default priority {default} is not one of {levels} levels");
            self.problem("batch", message);
        }
        match self.problems.is_empty() {
            true => Ok(self.manifest),
            false => Err(ManifestError { problems: self.problems }),
        }
    }
}

fn is_file_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    matches!((parts.next(), parts.next()), (Some(Component::Normal(part)), None) if part == name)
}

/// Text of a file that lies inside `folder`, links followed.
fn read_inside(folder: &Path, relative: &str) -> std::io::Result<String> {
    let outside = || std::io::Error::other("path leaves the model's folder");
    if !Path::new(relative).components().all(|part| matches!(part, Component::Normal(_))) {
        return Err(outside());
    }
    let path = folder.join(relative).canonicalize()?;
    if !path.starts_with(folder.canonicalize()?) {
        return Err(outside());
    }
    let meta = std::fs::metadata(&path)?;
    if !meta.is_file() {
        return Err(std::io::Error::other("not a plain file"));
    }
    if meta.len() > FILE_SIZE_MAX {
        let why = format!("file has {} bytes, the limit is {FILE_SIZE_MAX}", meta.len());
        return Err(std::io::Error::other(why));
    }
    std::fs::read_to_string(path)
}

#[cfg(test)]
mod tests;
