//! CSV with a head. A column is numbers when every cell of it is one, or missing.

use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::Path;

use csv::{ByteRecord, Reader, ReaderBuilder};

use super::{Cell, Column};
use crate::cli::admin::Stop;
use crate::domain::DataType;

/// Longest record: of more, the file is no CSV.
const RECORD_BYTES_MAX: usize = 16 << 20;
/// What programs write for a value that is not there, beside nothing.
const MISSING: [&[u8]; 7] = [b"NA", b"N/A", b"null", b"NULL", b"None", b"<NA>", b"#N/A"];

pub(super) fn columns(path: &Path) -> Result<Vec<Column>, Stop> {
    let failed = |error| Stop::failed(format_args!("'{}': {error}", path.display()));
    let mut reader = open(path)?;
    let names = reader.byte_headers().map_err(failed)?.clone();
    let mut kinds = vec![Kind::Nothing; names.len()];
    let mut record = ByteRecord::new();
    while reader.read_byte_record(&mut record).map_err(failed)? {
        for (kind, cell) in kinds.iter_mut().zip(&record) {
            *kind = kind.with(cell);
        }
    }
    let column = |(name, kind): (&[u8], &Kind)| Column {
        name: String::from_utf8_lossy(name).trim().to_owned(),
        datatype: match kind {
            Kind::Bool => DataType::Bool,
            Kind::Integer => DataType::Int64,
            Kind::Nothing | Kind::Float => DataType::Fp64,
            Kind::Text => DataType::Bytes,
        },
        list: false,
    };
    Ok(names.iter().zip(&kinds).map(column).collect())
}

/// Whether there may be more.
pub(super) fn scan(
    path: &Path,
    columns: &[&Column],
    row: &mut impl FnMut(&[Cell<'_>]) -> bool,
) -> Result<bool, Stop> {
    let failed = |error| Stop::failed(format_args!("'{}': {error}", path.display()));
    let mut reader = open(path)?;
    let names = reader.byte_headers().map_err(failed)?.clone();
    let place = |column: &&Column| {
        names.iter().position(|name| String::from_utf8_lossy(name).trim() == column.name)
    };
    let places: Vec<Option<usize>> = columns.iter().map(place).collect();
    let mut record = ByteRecord::new();
    while reader.read_byte_record(&mut record).map_err(failed)? {
        let cell = |(place, column): (&Option<usize>, &&Column)| {
            let bytes = place.and_then(|place| record.get(place)).unwrap_or_default();
            cell(bytes, column.datatype)
        };
        let cells: Vec<Cell<'_>> = places.iter().zip(columns).map(cell).collect();
        if !row(&cells) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn open(path: &Path) -> Result<Reader<impl Read>, Stop> {
    let file = File::open(path).map_err(|error| {
        Stop::usage(format_args!("'{}' cannot be read: {error}", path.display()))
    })?;
    let lines = Lines { file: BufReader::with_capacity(1 << 16, file), since_end: 0 };
    Ok(ReaderBuilder::new().flexible(true).from_reader(lines))
}

/// Ends with an error when a record has no end for too long.
struct Lines<R> {
    file: R,
    since_end: usize,
}

impl<R: Read> Read for Lines<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let len = self.file.read(into)?;
        self.since_end = match memchr::memrchr(b'\n', &into[..len]) {
            Some(at) => len - at,
            None => self.since_end + len,
        };
        match self.since_end > RECORD_BYTES_MAX {
            true => Err(io::Error::other(format!("a line has more than {RECORD_BYTES_MAX} bytes"))),
            false => Ok(len),
        }
    }
}

/// What all cells of a column so far are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Nothing,
    Bool,
    Integer,
    Float,
    Text,
}

impl Kind {
    fn with(self, cell: &[u8]) -> Self {
        let cell = cell.trim_ascii();
        if missing(cell) || self == Self::Text {
            return self;
        }
        let text = std::str::from_utf8(cell).unwrap_or("?");
        let of_cell = if boolean(cell).is_some() {
            Self::Bool
        } else if text.parse::<i64>().is_ok() {
            Self::Integer
        } else if text.parse::<f64>().is_ok() {
            Self::Float
        } else {
            Self::Text
        };
        match (self, of_cell) {
            (Self::Nothing, other) => other,
            (a, b) if a == b => a,
            (Self::Integer, Self::Float) | (Self::Float, Self::Integer) => Self::Float,
            _ => Self::Text,
        }
    }
}

fn missing(cell: &[u8]) -> bool {
    cell.is_empty() || MISSING.contains(&cell)
}

fn boolean(cell: &[u8]) -> Option<bool> {
    match cell {
        b"true" | b"True" | b"TRUE" => Some(true),
        b"false" | b"False" | b"FALSE" => Some(false),
        _ => None,
    }
}

fn cell(bytes: &[u8], datatype: DataType) -> Cell<'_> {
    let trimmed = bytes.trim_ascii();
    if missing(trimmed) {
        return Cell::Missing;
    }
    match datatype {
        DataType::Bytes => Cell::Text(bytes),
        DataType::Bool => {
            boolean(trimmed).map_or(Cell::Missing, |is| Cell::Number(f64::from(u8::from(is))))
        }
        _ => {
            let number = std::str::from_utf8(trimmed).ok().and_then(|text| text.parse().ok());
            number.map_or(Cell::Missing, Cell::Number)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_have_the_narrowest_type_of_their_cells() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("rows.csv");
        let text = "a,b,c,d,e\n1,2.5,true,x,\n,1,False,3,\n-3,nan,NA,\"y, z\",\n";
        std::fs::write(&path, text).unwrap();
        let columns = columns(&path).unwrap();
        let types: Vec<DataType> = columns.iter().map(|column| column.datatype).collect();
        use DataType::{Bool, Bytes, Fp64, Int64};
        assert_eq!(types, [Int64, Fp64, Bool, Bytes, Fp64]);
        let mut rows = Vec::new();
        let wanted: Vec<&Column> = columns.iter().collect();
        let row = |cells: &[Cell<'_>]| {
            rows.push(format!("{cells:?}"));
            rows.len() < 2
        };
        assert!(!scan(&path, &wanted, &mut { row }).unwrap());
        assert!(rows[0].starts_with("[Number(1.0), Number(2.5), Number(1.0), Text("), "{rows:?}");
        assert!(rows[1].starts_with("[Missing, Number(1.0), Number(0.0), Text("), "{rows:?}");
    }

    #[test]
    fn a_line_without_an_end_is_an_error() {
        let mut lines = Lines { file: io::repeat(b'x'), since_end: 0 };
        let mut total = 0;
        let mut into = vec![0; 1 << 20];
        let error = loop {
            match lines.read(&mut into) {
                Ok(len) => total += len,
                Err(error) => break error,
            }
        };
        assert!(total <= RECORD_BYTES_MAX && error.to_string().contains("a line"), "{error}");
    }
}
