//! Runs a loaded model before it takes traffic: with made-up rows and with its samples.
//!
//! Invariant: a model is called batched only when its rows were seen not to depend on each other.

use std::time::{Duration, Instant};

use super::samples::{Sample, same};
use crate::domain::{DataType, Dim, NamedTensor, Shape, Signature, Tensor, TensorSpec};
use crate::engine::{EngineError, Session};

pub(super) mod padding;

/// Sizes tried for dynamic dimensions other than the batch, until the model runs.
const SIZES: [usize; 5] = [1, 8, 32, 128, 224];

/// Most bytes of one made-up input.
const INPUT_BYTES_MAX: usize = 1 << 30;

/// No larger batch is warmed when the smaller ones took so long; it will be when it comes.
const WARM_TIME_MAX: Duration = Duration::from_secs(2);

/// Joined and single runs may differ by so much: kernels add in another order.
const JOIN_TOLERANCE: f64 = 1e-3;

/// No more recorded inputs are run when those before took so long.
pub(super) const RERUN_TIME_MAX: Duration = Duration::from_secs(2);
/// Runs of each: the first of a shape is slow.
const RERUNS: usize = 2;

/// What became of inputs that were recorded.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(super) struct Rerun {
    /// Places of those that ran.
    pub(super) ran: Vec<usize>,
    /// Of those that fit the signature and failed. Why is not said: it may quote what was recorded.
    pub(super) failed: Vec<usize>,
}

/// What a trial found out.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub(super) struct Findings {
    pub(super) batched: bool,
    /// Size of the dynamic dimensions that the model ran with; `None`: it ran with none we tried.
    pub(super) size: Option<usize>,
    /// Rows of unequal length were padded and gave what they give alone.
    #[serde(default)]
    pub(super) padded: bool,
    pub(super) notes: Vec<String>,
}

/// Finds out whether `session` runs and whether its rows are independent.
///
/// # Errors
/// When the model leaves us no choice of shape and fails all the same.
pub(super) fn explore(
    session: &mut dyn Session,
    signature: &Signature,
    batched: Option<bool>,
) -> Result<Findings, String> {
    let mut findings = Findings::default();
    let mut first_error = None;
    for &size in sizes(signature) {
        match run(session, signature, &[0], size) {
            Ok(_) => {
                findings.size = Some(size);
                break;
            }
            Err(error) => {
                first_error.get_or_insert(error);
            }
        }
    }
    let Some(size) = findings.size else {
        let error = first_error.unwrap_or_else(|| "no shape to run with".to_owned());
        if sizes(signature).len() == 1 {
            return Err(format!("does not run on zeros: {error}"));
        }
        findings.notes.push(format!("not warmed, no made-up shape fits: {error}"));
        return Ok(findings);
    };
    if batched == Some(false) || !may_batch(signature) {
        if batched == Some(true) {
            let note = "not batched although configured: the first dimensions are not all dynamic";
            findings.notes.push(note.to_owned());
        }
        return Ok(findings);
    }
    match independent_rows(session, signature, size) {
        Ok(()) => findings.batched = true,
        Err(reason) => findings.notes.push(format!("not batched: {reason}")),
    }
    Ok(findings)
}

/// Runs zeros, `runs` times for each number of rows, the fewest first, for as long as
/// [`WARM_TIME_MAX`]. Gives what ran and the time it took, if every request will have these shapes:
/// made-up ones teach nothing about others.
pub(super) fn warm(
    session: &mut dyn Session,
    signature: &Signature,
    findings: &Findings,
    rows: &[usize],
    runs: usize,
) -> Result<Vec<(Vec<Tensor>, Duration)>, String> {
    let mut seen = Vec::new();
    let Some(size) = findings.size else { return Ok(seen) };
    let began = Instant::now();
    for &rows in rows {
        if began.elapsed() >= WARM_TIME_MAX {
            break;
        }
        let inputs = inputs(signature, &vec![0; rows], size)?;
        for _ in 0..runs {
            let started = Instant::now();
            session.run(&inputs).map_err(reason)?;
            seen.push((inputs.clone(), started.elapsed()));
        }
    }
    if sizes(signature).len() > 1 {
        seen.clear();
    }
    Ok(seen)
}

/// Runs inputs that were recorded, those that fit the signature, for as long as `time_max`. What
/// they give is compared with nothing: another version may answer otherwise. Gives what ran and the
/// time it took.
pub(super) fn rerun(
    session: &mut dyn Session,
    signature: &Signature,
    recorded: &[&[NamedTensor]],
    time_max: Duration,
) -> (Rerun, Vec<(Vec<Tensor>, Duration)>) {
    let (mut rerun, mut seen) = (Rerun::default(), Vec::new());
    let began = Instant::now();
    for (at, named) in recorded.iter().enumerate() {
        if began.elapsed() >= time_max {
            break;
        }
        let Ok(inputs) = signature.bind(named.to_vec()) else { continue };
        let mut runs = (0..RERUNS).map(|_| {
            let started = Instant::now();
            session.run(&inputs).map(|_| started.elapsed())
        });
        match runs.try_for_each(|took| took.map(|took| seen.push((inputs.clone(), took)))) {
            Ok(()) => rerun.ran.push(at),
            Err(_) => rerun.failed.push(at),
        }
    }
    (rerun, seen)
}

/// Runs every sample and compares.
pub(super) fn check_samples(
    session: &mut dyn Session,
    signature: &Signature,
    samples: &[Sample],
) -> Result<(), String> {
    for (at, sample) in samples.iter().enumerate() {
        let compared = sample.inputs(signature).and_then(|inputs| {
            let outputs = session.run(&inputs).map_err(|error| error.to_string())?;
            sample.compare(signature, &outputs)
        });
        compared.map_err(|what| format!("sample {at}: {what}"))?;
    }
    Ok(())
}

/// One size when there is no dimension to choose.
fn sizes(signature: &Signature) -> &'static [usize] {
    let dynamic = |spec: &TensorSpec| match &spec.shape {
        None => true,
        Some(dims) => {
            let skipped = usize::from(matches!(dims.first(), Some(Dim::Dynamic(_))));
            dims[skipped..].iter().any(|dim| matches!(dim, Dim::Dynamic(_)))
        }
    };
    if signature.inputs.iter().any(dynamic) { &SIZES } else { &SIZES[..1] }
}

/// Whether the declared shapes allow a batch dimension: dynamic, first, and nowhere else.
fn may_batch(signature: &Signature) -> bool {
    let mut symbols = Vec::new();
    for spec in &signature.inputs {
        match spec.shape.as_ref().and_then(|dims| dims.first()) {
            Some(Dim::Dynamic(symbol)) => symbols.extend(symbol),
            _ => return false,
        }
    }
    let first = |spec: &TensorSpec| match &spec.shape {
        None => true,
        Some(dims) => matches!(dims.first(), Some(Dim::Dynamic(_))),
    };
    let inner = |spec: &TensorSpec| {
        let dims = spec.shape.iter().flat_map(|dims| dims.iter().skip(1));
        dims.into_iter().any(|dim| matches!(dim, Dim::Dynamic(Some(s)) if symbols.contains(&s)))
    };
    !signature.inputs.is_empty()
        && signature.outputs.iter().all(first)
        && !signature.inputs.iter().any(inner)
}

/// Rows 0, 1, 0 together give what they give alone.
fn independent_rows(
    session: &mut dyn Session,
    signature: &Signature,
    size: usize,
) -> Result<(), String> {
    let zero = run(session, signature, &[0], size)?;
    // Ones may be no valid input (an index into a table of one); zeros were seen to be.
    let one = run(session, signature, &[1], size).ok();
    let value = u8::from(one.is_some());
    let joined = run(session, signature, &[0, value, 0], size)
        .map_err(|error| format!("three rows together fail: {error}"))?;
    let alone = [&zero, one.as_ref().unwrap_or(&zero), &zero];
    for (at, (spec, joined)) in signature.outputs.iter().zip(&joined).enumerate() {
        let name = &spec.name;
        if joined.shape().first() != Some(&3) {
            let shape = joined.shape();
            return Err(format!("three rows give output '{name}' of shape {shape:?}"));
        }
        for (row, alone) in alone.iter().enumerate() {
            let cut = joined.rows(row, row + 1);
            let equal = cut.zip(alone.get(at)).is_some_and(|(cut, alone)| {
                cut.shape() == alone.shape() && same(alone, &cut, JOIN_TOLERANCE).is_ok()
            });
            if !equal {
                return Err(format!("output '{name}' of a row depends on the rows beside it"));
            }
        }
    }
    Ok(())
}

fn run(
    session: &mut dyn Session,
    signature: &Signature,
    rows: &[u8],
    size: usize,
) -> Result<Vec<Tensor>, String> {
    session.run(&inputs(signature, rows, size)?).map_err(reason)
}

fn inputs(signature: &Signature, rows: &[u8], size: usize) -> Result<Vec<Tensor>, String> {
    signature.inputs.iter().map(|spec| made_up(spec, rows, size)).collect()
}

fn reason(error: EngineError) -> String {
    match error {
        EngineError::Run(reason) => reason,
        other => other.to_string(),
    }
}

/// A tensor whose rows are filled with the values of `rows`. A fixed first dimension takes the
/// first value throughout.
fn made_up(spec: &TensorSpec, rows: &[u8], size: usize) -> Result<Tensor, String> {
    filled(spec, shape_of(spec, rows.len(), size), rows)
}

const UNKNOWN: &[Dim] = &[Dim::Dynamic(None)];

fn shape_of(spec: &TensorSpec, rows: usize, size: usize) -> Shape {
    let dims = spec.shape.as_deref().unwrap_or(UNKNOWN);
    let size = |(at, dim): (usize, &Dim)| match dim {
        Dim::Fixed(size) => *size,
        Dim::Dynamic(_) if at == 0 => rows,
        Dim::Dynamic(_) => size,
    };
    dims.iter().enumerate().map(size).collect()
}

fn filled(spec: &TensorSpec, shape: Shape, rows: &[u8]) -> Result<Tensor, String> {
    let dims = spec.shape.as_deref().unwrap_or(UNKNOWN);
    let elements = shape.iter().try_fold(1_usize, |product, &dim| product.checked_mul(dim));
    let width = spec.datatype.size().unwrap_or(5);
    let bytes = elements.and_then(|elements| elements.checked_mul(width));
    if bytes.is_none_or(|bytes| bytes > INPUT_BYTES_MAX) {
        let name = &spec.name;
        return Err(format!("input '{name}' takes more than {INPUT_BYTES_MAX} bytes for one row"));
    }
    let elements = elements.unwrap_or(0);
    let follows = matches!(dims.first(), Some(Dim::Dynamic(_)));
    let per_row = if follows { elements / rows.len().max(1) } else { elements };
    let mut data = Vec::with_capacity(bytes.unwrap_or(0));
    for &row in if follows { rows } else { &rows[..1] } {
        let element = element(spec.datatype, row);
        (0..per_row).for_each(|_| data.extend_from_slice(&element));
    }
    Tensor::new(spec.datatype, shape, data.into()).map_err(|error| error.to_string())
}

fn element(datatype: DataType, value: u8) -> Vec<u8> {
    let bit = value == 1;
    match datatype {
        DataType::Fp16 => half::f16::from_f32(value.into()).to_le_bytes().to_vec(),
        DataType::Bf16 => half::bf16::from_f32(value.into()).to_le_bytes().to_vec(),
        DataType::Fp32 => f32::from(value).to_le_bytes().to_vec(),
        DataType::Fp64 => f64::from(value).to_le_bytes().to_vec(),
        DataType::Bytes if bit => vec![1, 0, 0, 0, b'1'],
        DataType::Bytes => vec![0; 4],
        _ => {
            let mut bytes = vec![0; datatype.size().unwrap_or(1)];
            bytes[0] = value;
            bytes
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Model;
    use crate::engine::fake::FakeModel;

    /// Gives each row the sum of all rows: looks batched and is not.
    struct Mixing;

    impl Session for Mixing {
        fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
            let values = inputs[0].data().as_chunks().0.iter().map(|&b| f32::from_le_bytes(b));
            let sum: f32 = values.sum();
            let rows = inputs[0].shape()[0];
            let data: Vec<u8> = (0..rows).flat_map(|_| sum.to_le_bytes()).collect();
            let shape = Shape::from_slice(&[rows, 1]);
            Ok(vec![Tensor::new(DataType::Fp32, shape, data.into()).unwrap()])
        }
    }

    struct Failing;

    impl Session for Failing {
        fn run(&mut self, _inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
            Err(EngineError::Run("never".to_owned()))
        }
    }

    #[test]
    fn only_independent_rows_are_batched() {
        let model = FakeModel::new(4, 1.0);
        let signature = model.signature().clone();
        let mut session = model.session().unwrap();
        let found = explore(&mut *session, &signature, None).unwrap();
        assert!(found.batched, "{found:?}");
        let seen = warm(&mut *session, &signature, &found, &[1, 8], 2).unwrap();
        let rows: Vec<usize> = seen.iter().map(|(inputs, _)| inputs[0].shape()[0]).collect();
        assert_eq!(rows, [1, 1, 8, 8]);
        let found = explore(&mut *session, &signature, Some(false)).unwrap();
        assert!(!found.batched);

        let found = explore(&mut Mixing, &signature, None).unwrap();
        assert!(!found.batched);
        assert!(found.notes[0].contains("depends on the rows beside it"), "{found:?}");
    }

    #[test]
    fn recorded_inputs_run_if_they_fit_and_their_errors_are_noted() {
        let model = FakeModel::new(4, 1.0);
        let signature = model.signature().clone();
        let spec = &signature.inputs[0];
        let named = |tensor| vec![NamedTensor { name: spec.name.clone(), tensor }];
        let fits = made_up(spec, &[0, 1], 1).unwrap();
        let other = Tensor::new(DataType::Int8, Shape::from_slice(&[1]), vec![1].into()).unwrap();
        let recorded = [named(fits.clone()), named(other), named(fits)];
        let mut session = model.session().unwrap();
        let recorded: Vec<&[NamedTensor]> = recorded.iter().map(Vec::as_slice).collect();
        let (told, seen) = rerun(&mut *session, &signature, &recorded, RERUN_TIME_MAX);
        assert_eq!(told, Rerun { ran: vec![0, 2], failed: vec![] });
        assert_eq!(seen.len(), 2 * RERUNS);
        let (told, seen) = rerun(&mut Failing, &signature, &recorded, RERUN_TIME_MAX);
        assert_eq!(told, Rerun { ran: vec![], failed: vec![0, 2] });
        assert!(seen.is_empty());
        let (told, _) = rerun(&mut *session, &signature, &recorded, Duration::ZERO);
        assert_eq!(told, Rerun::default());
    }

    #[test]
    fn a_failing_model_is_refused_unless_the_shape_was_a_guess() {
        let mut signature = FakeModel::new(4, 1.0).signature().clone();
        let error = explore(&mut Failing, &signature, None).unwrap_err();
        assert_eq!(error, "does not run on zeros: never");
        signature.inputs[0].shape = Some(vec![Dim::Dynamic(None), Dim::Dynamic(None)]);
        let found = explore(&mut Failing, &signature, None).unwrap();
        assert_eq!(found.size, None);
        signature.inputs[0].shape = Some(vec![Dim::Fixed(1 << 40)]);
        assert!(explore(&mut Failing, &signature, None).unwrap_err().contains("takes more than"));
    }

    #[test]
    fn made_up_tensors_are_valid_for_every_datatype() {
        for datatype in DataType::ALL {
            let shape = Some(vec![Dim::Dynamic(None), Dim::Fixed(2)]);
            let spec = TensorSpec { name: "x".to_owned(), datatype, shape };
            let tensor = made_up(&spec, &[0, 1, 0], 1).unwrap();
            assert_eq!(tensor.shape(), [3, 2], "{datatype}");
        }
    }
}
