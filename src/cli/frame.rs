//! Tables of rows out of files: Parquet, CSV, or a folder of the ledger's Parquet.
//!
//! A file is read as it comes, some thousand rows at a time; nothing of it is kept here. [`features`]
//! says which features it has, [`bind`] which of its columns are which, and [`inputs`] makes its rows
//! into what a model takes.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use super::admin::Stop;
use crate::domain::DataType;

mod bind;
mod csv;
mod features;
mod inputs;
mod parquet;

pub(super) use bind::Binding;
pub(super) use features::{of_signature, of_table};
pub(super) use inputs::Inputs;

/// Columns of one file.
const COLUMNS_MAX: usize = 10_000;
/// Files of one folder.
const FILES_MAX: usize = 100_000;
/// Folders in folders.
const DEPTH_MAX: usize = 8;

/// A column, and what is in its cells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Column {
    pub(super) name: String,
    pub(super) datatype: DataType,
    pub(super) list: bool,
}

/// What a row has in one column.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Cell<'a> {
    Missing,
    Number(f64),
    Text(&'a [u8]),
    /// An element that is missing is NaN.
    Numbers(&'a [f64]),
    /// The list's elements from the first to before the second are this row's.
    Texts(&'a [Option<&'a [u8]>]),
}

/// A file, or files that are one table.
#[derive(Debug)]
pub(super) struct Table {
    path: PathBuf,
    files: Vec<PathBuf>,
    format: Format,
    pub(super) columns: Vec<Column>,
    /// Its rows are records of the ledger: only predictions that were answered count.
    pub(super) ledger: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Parquet,
    Csv,
}

impl Table {
    /// Finds out what `path` is and which columns it has. Of a folder with several models only that of
    /// `model` is taken.
    pub(super) fn open(path: &Path, model: Option<&str>) -> Result<Self, Stop> {
        let files = match path.is_dir() {
            true => in_folder(path, model)?,
            false => vec![path.to_owned()],
        };
        let Some(first) = files.first() else {
            let problem = "there is no Parquet file in it";
            return Err(Stop::usage(format_args!("'{}': {problem}", path.display())));
        };
        let format = match first.extension().and_then(|extension| extension.to_str()) {
            Some("csv") => Format::Csv,
            _ => Format::Parquet,
        };
        let (mut columns, mut names) = (Vec::<Column>::new(), HashSet::new());
        for file in &files {
            let of_file = match format {
                Format::Parquet => parquet::columns(file)?,
                Format::Csv => csv::columns(file)?,
            };
            columns.extend(of_file.into_iter().filter(|column| names.insert(column.name.clone())));
            if columns.len() > COLUMNS_MAX {
                let problem = format_args!("more than {COLUMNS_MAX} columns");
                return Err(Stop::usage(format_args!("'{}': {problem}", path.display())));
            }
        }
        let has = |name: &str| names.contains(name);
        let ledger = has("prediction_id") && has("status") && has("kind") && has("seq");
        Ok(Self { path: path.to_owned(), files, format, columns, ledger })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn column(&self, name: &str) -> Option<usize> {
        self.columns.iter().position(|column| column.name == name)
    }

    /// Calls `row` for each row with its cells in the columns `wanted`, until it says no. A column that
    /// one of several files lacks has missing cells there.
    pub(super) fn scan(
        &self,
        wanted: &[usize],
        mut row: impl FnMut(&[Cell<'_>]) -> bool,
    ) -> Result<(), Stop> {
        let columns: Vec<&Column> = wanted.iter().map(|at| &self.columns[*at]).collect();
        for file in &self.files {
            let more = match self.format {
                Format::Parquet => parquet::scan(file, &columns, &mut row)?,
                Format::Csv => csv::scan(file, &columns, &mut row)?,
            };
            if !more {
                break;
            }
        }
        Ok(())
    }
}

/// The Parquet files below a folder, in order; what begins with `.` or `_` is none.
fn in_folder(path: &Path, model: Option<&str>) -> Result<Vec<PathBuf>, Stop> {
    let wanted = model.map(|model| format!("model={model}"));
    let mut files = Vec::new();
    let mut models: Vec<String> = Vec::new();
    let mut folders = vec![(path.to_owned(), 0)];
    while let Some((folder, depth)) = folders.pop() {
        let failed =
            |error| Stop::usage(format_args!("'{}' cannot be read: {error}", folder.display()));
        for entry in std::fs::read_dir(&folder).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(['.', '_']) {
                continue;
            }
            let is_model = name.starts_with("model=");
            if is_model && wanted.as_ref().is_some_and(|wanted| *wanted != name) {
                continue;
            }
            let path = entry.path();
            if path.is_dir() && depth < DEPTH_MAX {
                if is_model {
                    models.push(name);
                }
                folders.push((path, depth + 1));
            } else if path.extension().is_some_and(|extension| extension == "parquet") {
                files.push(path);
            }
            if files.len() > FILES_MAX {
                let problem = format_args!("more than {FILES_MAX} files");
                return Err(Stop::usage(format_args!("'{}': {problem}", folder.display())));
            }
        }
    }
    if models.len() > 1 {
        models.sort();
        return Err(Stop::usage(format_args!(
            "'{}' has several models, name the folder of one: {}",
            path.display(),
            models.join(", ")
        )));
    }
    files.sort();
    Ok(files)
}
