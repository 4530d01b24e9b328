//! MLflow and SageMaker: `POST /invocations`.
//!
//! Takes `dataframe_split`, `dataframe_records`, `instances`, `inputs` or CSV with a header row.
//! Columns go in their order to the one input of a model, or by name to its several inputs.
//! Missing values are refused, because no datatype but floats could carry them.

use bytes::Bytes;
use http::HeaderMap;
use http::header::CONTENT_TYPE;
use serde::Deserialize;
use serde_json::value::RawValue;

use super::elements::{self, ElementError};
use super::infer::Typing;
use super::json::{AtMost, COLUMNS_MAX, Members, Object, ROWS_MAX, Rows, from_slice};
use super::v1::{self, table_shape, textual};
use crate::domain::{DataType, ErrorKind, Failure, NamedTensor, Signature, TensorSpec};

#[derive(Deserialize)]
struct RequestJson<'a> {
    #[serde(borrow)]
    dataframe_split: Option<Object<SplitJson<'a>>>,
    #[serde(borrow)]
    dataframe_records: Option<AtMost<Members<'a>, ROWS_MAX>>,
    #[serde(borrow)]
    instances: Option<&'a RawValue>,
    #[serde(borrow)]
    inputs: Option<&'a RawValue>,
}

#[derive(Deserialize)]
struct SplitJson<'a> {
    columns: Vec<String>,
    #[serde(borrow)]
    data: Rows<'a>,
}

/// Form of a body.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    Json,
    Csv,
}

/// The inputs of an `/invocations` body, typed later.
///
/// # Errors
/// `UnsupportedMedia` for another content type than JSON and CSV.
pub(super) fn typing(body: Bytes, headers: &HeaderMap) -> Result<Typing, Failure> {
    let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
    let essence = content_type.and_then(|text| text.split(';').next()).map(str::trim);
    let form = match essence.map(str::to_ascii_lowercase).as_deref() {
        None | Some("application/json") => Form::Json,
        Some("text/csv") => Form::Csv,
        Some(other) => {
            let message =
                format!("content-type is '{other}', expected application/json or text/csv");
            return Err(Failure::new(ErrorKind::UnsupportedMedia, message));
        }
    };
    Ok(Box::new(move |signature| decode(signature, form, &body)))
}

/// Reads a body for a model of this signature.
///
/// # Errors
/// `InvalidInput` for whatever is wrong.
pub fn decode(signature: &Signature, form: Form, body: &[u8]) -> Result<Vec<NamedTensor>, Failure> {
    match form {
        Form::Csv => read_csv(body)?.tensors(signature, push_text),
        Form::Json => {
            let Object(request) = from_slice::<Object<RequestJson<'_>>>(body)?;
            let RequestJson { dataframe_split, dataframe_records, instances, inputs } = request;
            match (dataframe_split, dataframe_records, instances, inputs) {
                (Some(Object(split)), None, None, None) => {
                    split_table(split)?.tensors(signature, push_json)
                }
                (None, Some(AtMost(records)), None, None) => {
                    record_table(records)?.tensors(signature, push_json)
                }
                (None, None, Some(instances), None) => v1::instances(signature, instances),
                (None, None, None, Some(inputs)) => whole_inputs(signature, inputs),
                _ => Err(Failure::invalid(
                    "expected exactly one of dataframe_split, dataframe_records, instances, inputs",
                )),
            }
        }
    }
}

/// `inputs`: the one tensor, or an object of tensors by name.
fn whole_inputs(signature: &Signature, inputs: &RawValue) -> Result<Vec<NamedTensor>, Failure> {
    if inputs.get().starts_with('{') {
        let Members(members) = from_slice(inputs.get().as_bytes())?;
        let one = |(name, value): &(std::borrow::Cow<'_, str>, &RawValue)| {
            let spec = input_named(signature, name)?;
            v1::tensor(spec, [value.get()].into_iter(), None)
        };
        return members.iter().map(one).collect();
    }
    match &signature.inputs[..] {
        [input] => Ok(vec![v1::tensor(input, [inputs.get()].into_iter(), None)?]),
        several => Err(Failure::invalid(format!(
            "the model has {} inputs, expected 'inputs' to be an object of them",
            several.len()
        ))),
    }
}

fn input_named<'a>(signature: &'a Signature, name: &str) -> Result<&'a TensorSpec, Failure> {
    signature.inputs.iter().find(|input| input.name == *name).ok_or_else(|| {
        let known: Vec<&str> = signature.inputs.iter().map(|input| input.name.as_str()).collect();
        let shown: String = name.chars().take(64).collect();
        Failure::invalid(format!("unexpected input '{shown}', the model's inputs are {known:?}"))
    })
}

/// A table of unread cells, row by row.
struct Table<C> {
    columns: Vec<String>,
    cells: C,
}

trait Cells {
    fn count(&self) -> usize;
    fn cell(&self, at: usize) -> &str;
}

impl Cells for Vec<&RawValue> {
    fn count(&self) -> usize {
        self.len()
    }

    fn cell(&self, at: usize) -> &str {
        self[at].get()
    }
}

/// All cells in one text: most are a few bytes, less than a `String` of their own would take.
#[derive(Default)]
struct CsvCells {
    text: String,
    /// Where each cell ends.
    ends: Vec<usize>,
}

impl Cells for CsvCells {
    fn count(&self) -> usize {
        self.ends.len()
    }

    fn cell(&self, at: usize) -> &str {
        let start = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.text[start..self.ends[at]]
    }
}

type Push = fn(&str, DataType, usize, &mut Vec<u8>) -> Result<(), ElementError>;

impl<C: Cells> Table<C> {
    fn tensors(&self, signature: &Signature, push: Push) -> Result<Vec<NamedTensor>, Failure> {
        let width = self.columns.len();
        if let [input] = &signature.inputs[..] {
            let all: Vec<usize> = (0..width).collect();
            return Ok(vec![self.tensor(input, &all, push)?]);
        }
        if width != signature.inputs.len() {
            return Err(Failure::invalid(format!(
                "the table has {width} columns, the model has {} inputs",
                signature.inputs.len()
            )));
        }
        let columns = self.columns.iter().enumerate();
        columns.map(|(at, name)| self.tensor(input_named(signature, name)?, &[at], push)).collect()
    }

    fn tensor(
        &self,
        input: &TensorSpec,
        columns: &[usize],
        push: Push,
    ) -> Result<NamedTensor, Failure> {
        textual(input)?;
        let mut data = Vec::new();
        let width = self.columns.len().max(1);
        let rows = self.cells.count() / width;
        for row in 0..rows {
            for &column in columns {
                let cell = self.cells.cell(row * width + column);
                push(cell, input.datatype, row, &mut data).map_err(|error| {
                    let name = &self.columns[column];
                    Failure::invalid(format!("column '{name}', counting rows: {error}"))
                })?;
            }
        }
        let shape = table_shape(input, rows, columns.len());
        let tensor = v1::build(input, shape, data)
            .map_err(|error| Failure::invalid(format!("input '{}': {error}", input.name)))?;
        Ok(NamedTensor { name: input.name.clone(), tensor })
    }
}

fn split_table(split: SplitJson<'_>) -> Result<Table<Vec<&RawValue>>, Failure> {
    let SplitJson { columns, data: Rows { cells, widths } } = split;
    check_columns(&columns)?;
    for (row, width) in widths.into_iter().enumerate() {
        check_width(row, usize::try_from(width).unwrap_or(usize::MAX), columns.len())?;
    }
    Ok(Table { columns, cells })
}

/// The first record says the order of columns; the others have the same, in any order.
fn record_table(records: Vec<Members<'_>>) -> Result<Table<Vec<&RawValue>>, Failure> {
    let Some(Members(first)) = records.first() else {
        return Err(Failure::invalid("dataframe_records is empty"));
    };
    let columns: Vec<String> = first.iter().map(|(name, _)| name.to_string()).collect();
    check_columns(&columns)?;
    let mut cells = Vec::new();
    for (row, Members(members)) in records.iter().enumerate() {
        check_width(row, members.len(), columns.len())?;
        for (at, column) in columns.iter().enumerate() {
            // Mostly in place; looked for otherwise.
            let in_place = members.get(at).filter(|(name, _)| name == column);
            let found = in_place.or_else(|| members.iter().find(|(name, _)| name == column));
            let Some((_, cell)) = found else {
                return Err(Failure::invalid(format!("record {row} lacks column '{column}'")));
            };
            cells.push(*cell);
        }
    }
    Ok(Table { columns, cells })
}

fn read_csv(body: &[u8]) -> Result<Table<CsvCells>, Failure> {
    let wrong = |error: csv::Error| Failure::invalid(format!("request body is no CSV: {error}"));
    let mut reader = csv::ReaderBuilder::new().trim(csv::Trim::Headers).from_reader(body);
    let columns: Vec<String> =
        reader.headers().map_err(wrong)?.iter().map(ToOwned::to_owned).collect();
    check_columns(&columns)?;
    let mut cells = CsvCells::default();
    let mut record = csv::StringRecord::new();
    let mut rows = 0;
    // The reader refuses rows of another width than the header's.
    while reader.read_record(&mut record).map_err(wrong)? {
        rows += 1;
        if rows > ROWS_MAX {
            return Err(Failure::invalid(format!("the table has more than {ROWS_MAX} rows")));
        }
        for cell in &record {
            cells.text.push_str(cell);
            cells.ends.push(cells.text.len());
        }
    }
    Ok(Table { columns, cells })
}

fn check_columns(columns: &[String]) -> Result<(), Failure> {
    match columns.len() {
        0 => Err(Failure::invalid("the table has no columns")),
        width if width > COLUMNS_MAX => Err(Failure::invalid(format!(
            "the table has {width} columns, the limit is {COLUMNS_MAX}"
        ))),
        _ => Ok(()),
    }
}

fn check_width(row: usize, got: usize, expected: usize) -> Result<(), Failure> {
    if got == expected {
        return Ok(());
    }
    Err(Failure::invalid(format!("row {row} has {got} values, the table has {expected} columns")))
}

/// A cell of a JSON table: a plain value.
fn push_json(
    text: &str,
    datatype: DataType,
    row: usize,
    out: &mut Vec<u8>,
) -> Result<(), ElementError> {
    elements::push(text, datatype, row, out)
}

/// A cell of a CSV: text as it stands, numbers and booleans without the spaces around.
fn push_text(
    text: &str,
    datatype: DataType,
    row: usize,
    out: &mut Vec<u8>,
) -> Result<(), ElementError> {
    match datatype {
        DataType::Bytes => elements::push_bytes(text.as_bytes(), row, out),
        DataType::Bool => {
            match text.trim().to_ascii_lowercase().as_str() {
                "true" | "1" => out.push(1),
                "false" | "0" => out.push(0),
                _ => return Err(elements::bad(row, text, "true, false, 1 or 0")),
            }
            Ok(())
        }
        _ => elements::push_number(text.trim(), datatype, row, out),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Dim;

    fn signature(batched_inputs: &[(&str, DataType, &[usize])]) -> Signature {
        let inputs = batched_inputs.iter().map(|(name, datatype, row)| TensorSpec {
            name: (*name).to_owned(),
            datatype: *datatype,
            shape: Some(
                std::iter::once(Dim::Dynamic(None))
                    .chain(row.iter().copied().map(Dim::Fixed))
                    .collect(),
            ),
        });
        Signature { inputs: inputs.collect(), outputs: Vec::new(), batched: true }
    }

    #[test]
    fn columns_go_to_inputs_by_name() {
        let model = signature(&[
            ("age", DataType::Int64, &[1]),
            ("city", DataType::Bytes, &[]),
            ("member", DataType::Bool, &[1, 1]),
        ]);
        let csv = b"city,age,member\n\"Paris, FR\", 40,True\nOslo,-2,0\n";
        let split = br#"{"dataframe_split": {"columns": ["city", "age", "member"],
            "data": [["Paris, FR", 40, true], ["Oslo", -2, false]]}}"#;
        let rows = br#"{"instances": [{"age": 40, "member": true, "city": "Paris, FR"},
            {"city": "Oslo", "age": -2, "member": false}]}"#;
        for (form, body) in
            [(Form::Csv, &csv[..]), (Form::Json, &split[..]), (Form::Json, &rows[..])]
        {
            let named = decode(&model, form, body).unwrap();
            let bound = model.bind(named).unwrap();
            assert_eq!(bound[0].data()[..8], 40_i64.to_le_bytes());
            assert_eq!(bound[1].bytes_elements().last(), Some(&b"Oslo"[..]));
            assert_eq!((bound[2].shape(), &bound[2].data()[..]), (&[2, 1, 1][..], &[1, 0][..]));
        }
    }

    #[test]
    fn tables_that_do_not_fit_are_refused() {
        let model = signature(&[("a", DataType::Fp32, &[1]), ("b", DataType::Fp32, &[1])]);
        let cases: &[(&str, &str)] = &[
            ("a\n1\n", "the table has 1 columns, the model has 2 inputs"),
            ("a,c\n1,2\n", "unexpected input 'c'"),
            ("a,b\n1,\n", "column 'b'"),
            ("a,b\n1,nan\n", "expected a finite number"),
        ];
        for (csv, error) in cases {
            let failure = decode(&model, Form::Csv, csv.as_bytes()).unwrap_err();
            assert!(failure.message.contains(error), "{csv:?}: {failure}");
        }
        let one = signature(&[("x", DataType::Fp16, &[2])]);
        let failure = decode(&one, Form::Csv, b"a,b\n1,2\n").unwrap_err();
        assert!(failure.message.contains("binary tensor extension"), "{failure}");
    }

    #[test]
    fn a_list_has_its_limit() {
        let rows =
            |count: usize| format!("{{\"dataframe_records\":[{}]}}", vec!["{}"; count].join(","));
        let one = signature(&[("x", DataType::Fp32, &[2])]);
        let failure = decode(&one, Form::Json, rows(ROWS_MAX + 1).as_bytes()).unwrap_err();
        assert!(failure.message.contains("a list of at most 100000 elements"), "{failure}");
    }
}
