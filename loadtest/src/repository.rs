//! Model repositories for comparisons.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use toml::{Table, Value};

/// Copies a repository to `to` with a batch size of 1 for every model: requests are never joined.
///
/// # Errors
/// When it cannot be copied or a model's `tidegate.toml` cannot be read.
pub fn without_batching(from: &Path, to: &Path) -> Result<PathBuf> {
    copy(from, to).with_context(|| format!("cannot copy {}", from.display()))?;
    for entry in fs::read_dir(to)? {
        let model = entry?.path();
        if model.is_dir() {
            set_size_max(&model.join("tidegate.toml"))?;
        }
    }
    Ok(to.to_path_buf())
}

fn set_size_max(file: &Path) -> Result<()> {
    let text = if file.exists() { fs::read_to_string(file)? } else { String::new() };
    let mut table: Table =
        text.parse().with_context(|| format!("cannot read {}", file.display()))?;
    let batch = table.entry("batch").or_insert_with(|| Table::new().into());
    let batch = batch.as_table_mut().with_context(|| format!("batch in {}", file.display()))?;
    // Sizes to wait for make no sense without batches.
    batch.remove("preferred");
    batch.insert("size_max".to_owned(), Value::Integer(1));
    Ok(fs::write(file, toml::to_string(&table)?)?)
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    fs::create_dir_all(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_never_batches_and_keeps_the_rest() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("models");
        fs::create_dir_all(from.join("a/1")).unwrap();
        fs::create_dir_all(from.join("b/1")).unwrap();
        fs::write(from.join("a/1/model.onnx"), "graph").unwrap();
        let had = "[engine]\nengine = \"tract\"\n[batch]\nsize_max = 32\npreferred = [8]\n";
        fs::write(from.join("a/tidegate.toml"), had).unwrap();
        let to = without_batching(&from, &folder.path().join("copy")).unwrap();
        assert_eq!(fs::read_to_string(to.join("a/1/model.onnx")).unwrap(), "graph");
        let read = |model: &str| -> Table {
            fs::read_to_string(to.join(model).join("tidegate.toml")).unwrap().parse().unwrap()
        };
        let a: Table = "engine.engine = \"tract\"\nbatch.size_max = 1".parse().unwrap();
        assert_eq!(read("a"), a);
        assert_eq!(read("b"), "batch.size_max = 1".parse().unwrap());
    }
}
