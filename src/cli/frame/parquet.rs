//! Parquet: columns of numbers, booleans and texts, and lists of those. Others are not seen.

use std::fs::File;
use std::path::Path;

use arrow_array::cast::AsArray as _;
use arrow_array::types::{
    Float32Type, Float64Type, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type,
    UInt32Type, UInt64Type,
};
use arrow_array::{Array, ArrayRef, BooleanArray, RecordBatch};
use arrow_schema::{DataType as ArrowType, Field};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReaderBuilder};

use super::{Cell, Column};
use crate::cli::admin::Stop;
use crate::domain::DataType;

/// Rows that are read at a time, and about how many bytes.
const BATCH_ROWS: usize = 8 << 10;
const BATCH_BYTES: usize = 16 << 20;

pub(super) fn columns(path: &Path) -> Result<Vec<Column>, Stop> {
    let builder = open(path)?;
    let fields = builder.schema().fields();
    Ok(fields.iter().filter_map(|field| column(field)).collect())
}

/// Whether there may be more.
pub(super) fn scan(
    path: &Path,
    columns: &[&Column],
    row: &mut impl FnMut(&[Cell<'_>]) -> bool,
) -> Result<bool, Stop> {
    let failed =
        |error: &dyn std::fmt::Display| Stop::failed(format_args!("'{}': {error}", path.display()));
    let builder = open(path)?;
    let fields = builder.schema().fields();
    // By name and type: what another file of the folder has by that name may be something else.
    let place = |wanted: &&Column| fields.iter().position(|f| f.name() == &wanted.name);
    let places: Vec<Option<usize>> = columns.iter().map(place).collect();
    let mask = ProjectionMask::roots(builder.parquet_schema(), places.iter().flatten().copied());
    let rows = batch_rows(&builder, &mask);
    let reader = builder.with_projection(mask).with_batch_size(rows).build();
    for batch in reader.map_err(|error| failed(&error))? {
        let batch = batch.map_err(|error| failed(&error))?;
        let held: Vec<Option<Held>> =
            columns.iter().map(|column| Held::of(&batch, column)).collect();
        let texts: Vec<Vec<Option<&[u8]>>> =
            held.iter().map(|held| held.as_ref().map_or_else(Vec::new, Held::texts)).collect();
        for at in 0..batch.num_rows() {
            let cells: Vec<Cell<'_>> = held
                .iter()
                .zip(&texts)
                .map(|(held, texts)| match held {
                    Some(held) => held.cell(at, texts),
                    None => Cell::Missing,
                })
                .collect();
            if !row(&cells) {
                return Ok(false);
            }
        }
    }
    Ok(true)
}

fn open(path: &Path) -> Result<ParquetRecordBatchReaderBuilder<File>, Stop> {
    let failed = |error: &dyn std::fmt::Display| {
        Stop::usage(format_args!("'{}' cannot be read: {error}", path.display()))
    };
    let file = File::open(path).map_err(|error| failed(&error))?;
    // Parquet's own types: a program's dictionaries and wide lists are texts and lists there.
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    ParquetRecordBatchReaderBuilder::try_new_with_options(file, options)
        .map_err(|error| failed(&error))
}

/// Fewer rows at a time where rows are large.
fn batch_rows(builder: &ParquetRecordBatchReaderBuilder<File>, mask: &ProjectionMask) -> usize {
    let bytes_of_row = builder.metadata().row_groups().iter().map(|group| {
        let taken = group.columns().iter().enumerate().filter(|(at, _)| mask.leaf_included(*at));
        let bytes: i64 = taken.map(|(_, column)| column.uncompressed_size()).sum();
        bytes / group.num_rows().max(1)
    });
    let largest = usize::try_from(bytes_of_row.max().unwrap_or(0)).unwrap_or(0).max(1);
    // Encodings make a column smaller than its values, by some tens of times at most.
    (BATCH_BYTES / largest / 8).clamp(1, BATCH_ROWS)
}

fn column(field: &Field) -> Option<Column> {
    let (item, list) = match field.data_type() {
        ArrowType::List(item) => (item.data_type(), true),
        other => (other, false),
    };
    Some(Column { name: field.name().clone(), datatype: datatype(item)?, list })
}

fn datatype(of: &ArrowType) -> Option<DataType> {
    Some(match of {
        ArrowType::Boolean => DataType::Bool,
        ArrowType::UInt8 => DataType::Uint8,
        ArrowType::UInt16 => DataType::Uint16,
        ArrowType::UInt32 => DataType::Uint32,
        ArrowType::UInt64 => DataType::Uint64,
        ArrowType::Int8 => DataType::Int8,
        ArrowType::Int16 => DataType::Int16,
        ArrowType::Int32 => DataType::Int32,
        ArrowType::Int64 => DataType::Int64,
        ArrowType::Float32 => DataType::Fp32,
        ArrowType::Float64 => DataType::Fp64,
        ArrowType::Utf8 | ArrowType::Binary => DataType::Bytes,
        _ => return None,
    })
}

/// A batch's column.
struct Held {
    array: ArrayRef,
    /// Of a list the lists' array; else the array itself.
    items: ArrayRef,
    /// As doubles, where they are numbers; what is missing is NaN.
    numbers: Option<Vec<f64>>,
    offsets: Option<Vec<usize>>,
}

impl Held {
    /// `None` when the batch has no such column, or one of another type.
    fn of(batch: &RecordBatch, wanted: &Column) -> Option<Self> {
        let array = batch.column_by_name(&wanted.name)?;
        let field = batch.schema_ref().field_with_name(&wanted.name).ok()?;
        if column(field)?.list != wanted.list {
            return None;
        }
        let (items, offsets) = match array.as_list_opt::<i32>() {
            Some(list) => {
                let offsets = list.value_offsets().iter();
                let offsets: Option<Vec<usize>> =
                    offsets.map(|offset| usize::try_from(*offset).ok()).collect();
                (list.values().clone(), Some(offsets?))
            }
            None => (array.clone(), None),
        };
        let numbers = numbers(&items);
        // Numbers where texts were, or the other way round, in another file.
        if numbers.is_none() != (wanted.datatype == DataType::Bytes) {
            return None;
        }
        Some(Self { array: array.clone(), items, numbers, offsets })
    }

    fn texts(&self) -> Vec<Option<&[u8]>> {
        if let Some(texts) = self.items.as_string_opt::<i32>() {
            return texts.iter().map(|text| text.map(str::as_bytes)).collect();
        }
        match self.items.as_binary_opt::<i32>() {
            Some(texts) => texts.iter().collect(),
            None => Vec::new(),
        }
    }

    fn cell<'a>(&'a self, row: usize, texts: &'a [Option<&'a [u8]>]) -> Cell<'a> {
        if self.array.is_null(row) {
            return Cell::Missing;
        }
        match (&self.offsets, &self.numbers) {
            (None, Some(numbers)) => Cell::Number(numbers[row]),
            (None, None) => texts.get(row).copied().flatten().map_or(Cell::Missing, Cell::Text),
            (Some(offsets), Some(numbers)) => {
                Cell::Numbers(&numbers[offsets[row]..offsets[row + 1]])
            }
            (Some(offsets), None) => Cell::Texts(&texts[offsets[row]..offsets[row + 1]]),
        }
    }
}

fn numbers(array: &ArrayRef) -> Option<Vec<f64>> {
    macro_rules! of {
        ($type:ty, $to:expr) => {{
            let values = array.as_primitive_opt::<$type>()?;
            Some(values.iter().map(|value| value.map_or(f64::NAN, $to)).collect())
        }};
    }
    match array.data_type() {
        ArrowType::Boolean => {
            let values: &BooleanArray = array.as_boolean_opt()?;
            let number = |is: bool| f64::from(u8::from(is));
            Some(values.iter().map(|value| value.map_or(f64::NAN, number)).collect())
        }
        ArrowType::UInt8 => of!(UInt8Type, f64::from),
        ArrowType::UInt16 => of!(UInt16Type, f64::from),
        ArrowType::UInt32 => of!(UInt32Type, f64::from),
        ArrowType::UInt64 => of!(UInt64Type, |value| value as f64),
        ArrowType::Int8 => of!(Int8Type, f64::from),
        ArrowType::Int16 => of!(Int16Type, f64::from),
        ArrowType::Int32 => of!(Int32Type, f64::from),
        ArrowType::Int64 => of!(Int64Type, |value| value as f64),
        ArrowType::Float32 => of!(Float32Type, f64::from),
        ArrowType::Float64 => of!(Float64Type, |value| value),
        _ => None,
    }
}
