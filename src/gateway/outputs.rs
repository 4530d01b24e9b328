//! How large one request's outputs may be.
//!
//! Invariants:
//! - What the signature and the inputs tell beforehand is refused before the model runs.
//! - What only the run tells is refused before anything of it is copied or written out.

use crate::domain::{Dim, ErrorKind, Failure, Signature, Tensor, TensorSpec};

/// Most bytes that one class of the classification extension takes, beside its label: the score,
/// its index, two colons and what keeps the text.
const CLASS_BYTES: usize = 80;

/// Refuses a request whose outputs are known to be too large before they are made.
///
/// # Errors
/// `TooLarge` that names the sizes.
pub(super) fn check_expected(
    signature: &Signature,
    inputs: &[Tensor],
    max: usize,
) -> Result<(), Failure> {
    let mut bytes = 0_usize;
    for spec in &signature.outputs {
        bytes = bytes.saturating_add(expected(signature, spec, inputs).unwrap_or(0));
    }
    if bytes <= max {
        return Ok(());
    }
    Err(too_large(&format!("the outputs would take {bytes} bytes"), max))
}

/// Bytes of one output, when fixed dimensions, rows and named dimensions tell.
fn expected(signature: &Signature, spec: &TensorSpec, inputs: &[Tensor]) -> Option<usize> {
    let mut bytes = spec.datatype.size()?;
    for (axis, dim) in spec.shape.as_ref()?.iter().enumerate() {
        let size = match dim {
            Dim::Fixed(size) => *size,
            Dim::Dynamic(_) if axis == 0 && signature.batched => {
                *inputs.first()?.shape().first()?
            }
            Dim::Dynamic(symbol) => named(signature, symbol.as_deref()?, inputs)?,
        };
        bytes = bytes.saturating_mul(size);
    }
    Some(bytes)
}

/// The size that an input gives a named dimension.
fn named(signature: &Signature, symbol: &str, inputs: &[Tensor]) -> Option<usize> {
    signature.inputs.iter().zip(inputs).find_map(|(spec, tensor)| {
        let is = |dim: &Dim| matches!(dim, Dim::Dynamic(Some(name)) if name == symbol);
        let axis = spec.shape.as_ref()?.iter().position(is)?;
        tensor.shape().get(axis).copied()
    })
}

/// Refuses what the model gave when it is too large.
///
/// # Errors
/// `TooLarge` that names the largest output and the sizes.
pub(super) fn check_made(
    signature: &Signature,
    outputs: &[Tensor],
    max: usize,
) -> Result<(), Failure> {
    let size = |tensor: &Tensor| tensor.data().len();
    let bytes = outputs.iter().map(size).fold(0, usize::saturating_add);
    if bytes <= max {
        return Ok(());
    }
    let largest = signature.outputs.iter().zip(outputs).max_by_key(|(_, tensor)| size(tensor));
    let largest = largest.map_or_else(String::new, |(spec, tensor)| {
        let (name, shape, bytes) = (&spec.name, tensor.shape(), size(tensor));
        format!(", '{name}' of shape {shape:?} has {bytes} of them")
    });
    Err(too_large(&format!("the outputs take {bytes} bytes{largest}"), max))
}

/// Refuses a classification whose texts would be too large.
///
/// # Errors
/// `TooLarge` that names the output and the sizes.
pub(super) fn check_classes(
    name: &str,
    tensor: &Tensor,
    count: usize,
    labels: &[String],
    max: usize,
) -> Result<(), Failure> {
    let label = labels.iter().map(String::len).max().unwrap_or(0);
    let rows = tensor.shape().first().copied().unwrap_or(1).max(1);
    // Either reading of the first dimension gives no more than this.
    let classes = count.saturating_mul(rows).min(tensor.elements());
    let bytes = classes.saturating_mul(CLASS_BYTES + label);
    // Every score is sorted too, with its place.
    let bytes = bytes.max(tensor.elements().saturating_mul(2 * size_of::<f64>()));
    if bytes <= max {
        return Ok(());
    }
    Err(too_large(&format!("the classes of output '{name}' may take {bytes} bytes"), max))
}

fn too_large(what: &str, max: usize) -> Failure {
    Failure::new(ErrorKind::TooLarge, format!("{what}, the limit is {max}"))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use smallvec::smallvec;

    use super::*;
    use crate::domain::{DataType, Shape};

    fn spec(name: &str, dims: Vec<Dim>) -> TensorSpec {
        TensorSpec { name: name.to_owned(), datatype: DataType::Fp32, shape: Some(dims) }
    }

    fn symbol(name: &str) -> Dim {
        Dim::Dynamic(Some(name.to_owned()))
    }

    fn zeros(shape: &[usize]) -> Tensor {
        let bytes = vec![0; shape.iter().product::<usize>() * 4];
        Tensor::new(DataType::Fp32, Shape::from_slice(shape), bytes.into()).unwrap()
    }

    #[test]
    fn what_is_known_beforehand_is_refused_beforehand() {
        let signature = |batched, dims| Signature {
            inputs: vec![spec("x", vec![symbol("n"), symbol("width")])],
            outputs: vec![spec("y", dims)],
            batched,
        };
        let inputs = [zeros(&[3, 5])];
        let cases = [
            ("fixed", true, vec![Dim::Fixed(2), Dim::Fixed(4)], Some(32)),
            ("rows", true, vec![Dim::Dynamic(None), Dim::Fixed(4)], Some(48)),
            ("named", false, vec![symbol("width"), symbol("n")], Some(60)),
            ("unknown", false, vec![Dim::Dynamic(None), Dim::Fixed(4)], None),
            ("another name", true, vec![symbol("n"), symbol("made")], None),
            ("overflow", true, vec![Dim::Fixed(usize::MAX), Dim::Fixed(9)], Some(usize::MAX)),
        ];
        for (what, batched, dims, bytes) in cases {
            let signature = signature(batched, dims);
            let got = expected(&signature, &signature.outputs[0], &inputs);
            assert_eq!(got, bytes, "{what}");
            let Some(bytes) = bytes else { continue };
            assert!(check_expected(&signature, &inputs, bytes).is_ok(), "{what}");
            let refused = check_expected(&signature, &inputs, bytes - 1).unwrap_err();
            assert_eq!(refused.kind, ErrorKind::TooLarge, "{what}");
            assert!(refused.message.contains(&bytes.to_string()), "{refused}");
        }
    }

    #[test]
    fn what_the_run_made_is_measured_and_named() {
        let dims = || vec![Dim::Dynamic(None)];
        let signature = Signature {
            inputs: Vec::new(),
            outputs: vec![spec("small", dims()), spec("large", dims())],
            batched: false,
        };
        let made = [zeros(&[1]), zeros(&[9])];
        assert!(check_made(&signature, &made, 40).is_ok());
        let refused = check_made(&signature, &made, 39).unwrap_err();
        assert_eq!(
            refused.message,
            "the outputs take 40 bytes, 'large' of shape [9] has 36 of them, the limit is 39"
        );
    }

    #[test]
    fn classes_are_counted_by_their_texts() {
        let scores = Tensor::new(DataType::Uint8, smallvec![4, 250], Bytes::from(vec![0; 1000]));
        let scores = scores.unwrap();
        let label = ["x".repeat(920)];
        assert!(check_classes("y", &scores, 20, &label, 80_000).is_ok());
        assert!(check_classes("y", &scores, 20, &label, 79_999).is_err());
        // More classes than there are cannot be given.
        assert!(check_classes("y", &scores, usize::MAX, &[], 80_000).is_ok());
        assert!(check_classes("y", &scores, usize::MAX, &[], 79_999).is_err());
    }
}
