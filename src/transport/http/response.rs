//! The answer to an inference request: JSON, and raw tensors behind it where asked for.

use super::binary::{Form, SharedSlice};
use super::elements::{self, ElementError, json};
use super::pieces::Pieces;
use super::reply::Reply;
use crate::domain::{Answer, ErrorKind, Failure, NamedTensor};

/// Room for the JSON around outputs that are few.
const HEAD_USUAL_BYTES: usize = 512;
/// Raw outputs that are smaller together are sent in one piece with the JSON before them: a copy
/// costs less than another piece.
const COPY_MAX_BYTES: usize = 16 << 10;

/// Puts an output into shared memory on behalf of a request.
pub(super) type WriteShared<'a> = &'a dyn Fn(&SharedSlice, &[u8]) -> Result<(), Failure>;

/// Writes `answer`, each output in its form: those of `forms`, or `form` when there are none. Its
/// JSON may take `json_max` bytes.
///
/// # Errors
/// `InvalidInput` for an output that JSON cannot carry or that its shared memory is too small
/// for, `TooLarge` for too much JSON, and what `shared` answers.
pub(super) fn write(
    answer: &Answer,
    forms: &[Form],
    form: &Form,
    shared: WriteShared<'_>,
    json_max: usize,
) -> Result<Reply, Failure> {
    // JSON digits take about three times the bytes of a float.
    let digits = written(answer, forms, form).saturating_mul(3).min(json_max);
    let mut out = Vec::with_capacity(HEAD_USUAL_BYTES + digits);
    out.extend_from_slice(b"{\"model_name\":");
    json(answer.model.as_str(), &mut out);
    if let Some(version) = answer.version {
        out.extend_from_slice(b",\"model_version\":");
        json(&version.to_string(), &mut out);
    }
    if !answer.id.is_empty() {
        out.extend_from_slice(b",\"id\":");
        json(&answer.id, &mut out);
    }
    out.extend_from_slice(b",\"outputs\":[");
    let mut raw = Vec::new();
    for (at, output) in answer.outputs.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        let form = forms.get(at).unwrap_or(form);
        write_output(output, form, shared, json_max, &mut out)?;
        if *form == Form::Binary {
            raw.push(output.tensor.data());
        }
    }
    out.extend_from_slice(b"]}");
    // Some readers take the mere presence of the header as a sign of raw tensors.
    if raw.is_empty() {
        return Ok(Reply::json(http::StatusCode::OK, out));
    }
    let json_len = out.len();
    if raw.iter().map(|data| data.len()).sum::<usize>() <= COPY_MAX_BYTES {
        raw.iter().for_each(|data| out.extend_from_slice(data));
        return Ok(Reply::binary(json_len, out.into()));
    }
    let mut pieces = Pieces::from(out);
    raw.into_iter().for_each(|data| pieces.push(data.clone()));
    Ok(Reply::binary(json_len, pieces))
}

/// Bytes of the outputs that are written as JSON.
fn written(answer: &Answer, forms: &[Form], form: &Form) -> usize {
    let outputs = answer.outputs.iter().enumerate();
    let json = outputs.filter(|(at, _)| *forms.get(*at).unwrap_or(form) == Form::Json);
    json.map(|(_, output)| output.tensor.data().len()).sum()
}

fn write_output(
    output: &NamedTensor,
    form: &Form,
    shared: WriteShared<'_>,
    json_max: usize,
    out: &mut Vec<u8>,
) -> Result<(), Failure> {
    let NamedTensor { name, tensor } = output;
    out.extend_from_slice(b"{\"name\":");
    json(name, out);
    out.extend_from_slice(b",\"datatype\":");
    json(tensor.datatype().name(), out);
    out.extend_from_slice(b",\"shape\":");
    json(tensor.shape(), out);
    match form {
        Form::Json => {
            out.extend_from_slice(b",\"data\":");
            elements::write_flat_within(tensor, json_max, out)
                .map_err(|error| refused(name, &error, ""))?;
        }
        Form::Binary => {
            out.extend_from_slice(b",\"parameters\":{\"binary_data_size\":");
            json(&tensor.data().len(), out);
            out.push(b'}');
        }
        Form::Shared(slice) => {
            let len = tensor.data().len();
            if u64::try_from(len).map_or(true, |len| len > slice.byte_size) {
                return Err(Failure::invalid(format!(
                    "output '{name}' has {len} bytes, its shared_memory_byte_size is {}",
                    slice.byte_size
                )));
            }
            shared(slice, tensor.data())?;
            let mut parameters = serde_json::json!({
                "shared_memory_region": slice.region,
                "shared_memory_byte_size": len,
            });
            if slice.offset > 0 {
                parameters["shared_memory_offset"] = slice.offset.into();
            }
            out.extend_from_slice(b",\"parameters\":");
            json(&parameters, out);
        }
    }
    out.push(b'}');
    Ok(())
}

/// Values of a prediction as KServe v1 and MLflow show them: one output as its nested rows,
/// several as one object per row, or as one object of tensors when they have no rows in common.
///
/// # Errors
/// `InvalidInput` for an output that JSON cannot carry, `TooLarge` for more than `json_max` bytes.
pub(super) fn write_predictions(
    outputs: &[NamedTensor],
    json_max: usize,
) -> Result<Reply, Failure> {
    let mut out = Vec::from(*b"{\"predictions\":");
    let rows = |output: &NamedTensor| output.tensor.shape().first().copied();
    let common = outputs.first().and_then(rows);
    match (outputs, common) {
        ([output], _) => nested(output, None, json_max, &mut out)?,
        (_, Some(count)) if outputs.iter().all(|output| rows(output) == common) => {
            out.push(b'[');
            for row in 0..count {
                if row > 0 {
                    out.push(b',');
                }
                members(outputs, Some(row), json_max, &mut out)?;
            }
            out.push(b']');
        }
        _ => members(outputs, None, json_max, &mut out)?,
    }
    out.push(b'}');
    Ok(Reply::json(http::StatusCode::OK, out))
}

fn members(
    outputs: &[NamedTensor],
    row: Option<usize>,
    json_max: usize,
    out: &mut Vec<u8>,
) -> Result<(), Failure> {
    out.push(b'{');
    for (at, output) in outputs.iter().enumerate() {
        if at > 0 {
            out.push(b',');
        }
        json(&output.name, out);
        out.push(b':');
        nested(output, row, json_max, out)?;
    }
    out.push(b'}');
    Ok(())
}

fn nested(
    output: &NamedTensor,
    row: Option<usize>,
    json_max: usize,
    out: &mut Vec<u8>,
) -> Result<(), Failure> {
    let NamedTensor { name, tensor } = output;
    let written = match row {
        None => elements::write_nested_within(tensor, json_max, out),
        Some(row) => {
            let gone = || Failure::new(ErrorKind::Internal, "an output lost a row");
            let one = tensor.rows(row, row + 1).ok_or_else(gone)?;
            let inner = crate::domain::Shape::from_slice(&one.shape()[1..]);
            let one = one.reshaped(inner).map_err(|_| gone())?;
            elements::write_nested_within(&one, json_max, out)
        }
    };
    written.map_err(|error| {
        refused(
            name,
            &error,
            "; this form of request has JSON answers only, try /v2/models/…/infer",
        )
    })
}

fn refused(name: &str, error: &ElementError, hint: &str) -> Failure {
    let kind = match error {
        ElementError::TooLong { .. } => ErrorKind::TooLarge,
        _ => ErrorKind::InvalidInput,
    };
    Failure::new(kind, format!("output '{name}': {error}{hint}"))
}
