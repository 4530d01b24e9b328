//! The classification extension: the best classes of a row instead of its scores.

use crate::domain::{DataType, Failure, Shape, Tensor};

/// The `count` highest scores of each row as `value:index[:label]`, highest first.
///
/// `tensor` is `[batch,] classes` of a numeric datatype; the result is `BYTES` of shape
/// `[batch,] min(count, classes)`. Equal scores keep the lower index first; NaN comes last.
///
/// # Errors
/// `InvalidInput` for a `BYTES` output.
pub(super) fn top_classes(
    name: &str,
    tensor: &Tensor,
    count: usize,
    labels: &[String],
    batched: bool,
) -> Result<Tensor, Failure> {
    let scores = scores(tensor)
        .ok_or_else(|| Failure::invalid(format!("output '{name}' has no scores to classify by")))?;
    let rows = if batched { tensor.shape().first().copied().unwrap_or(1) } else { 1 };
    let classes = scores.len().checked_div(rows).unwrap_or(0);
    let count = count.min(classes);
    let mut elements = Vec::with_capacity(rows * count);
    for row in scores.chunks_exact(classes.max(1)) {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| rank(row[b]).total_cmp(&rank(row[a])).then(a.cmp(&b)));
        for &at in &order[..count] {
            let label = labels.get(at).map(|label| format!(":{label}")).unwrap_or_default();
            elements.push(format!("{}:{at}{label}", shown(tensor.datatype(), row[at])));
        }
    }
    let shape =
        if batched { Shape::from_slice(&[rows, count]) } else { Shape::from_slice(&[count]) };
    Tensor::from_elements(shape, &elements)
        .map_err(|error| Failure::invalid(format!("output '{name}': {error}")))
}

fn rank(score: f64) -> f64 {
    if score.is_nan() { f64::NEG_INFINITY } else { score }
}

/// As C's `%f` for floats, as clients of the extension parse it; plain digits for integers.
fn shown(datatype: DataType, score: f64) -> String {
    match datatype {
        DataType::Fp16 | DataType::Bf16 | DataType::Fp32 | DataType::Fp64 => format!("{score:.6}"),
        _ => format!("{score}"),
    }
}

fn scores(tensor: &Tensor) -> Option<Vec<f64>> {
    let data = tensor.data();
    macro_rules! read {
        ($number:ty, $size:literal) => {
            data.as_chunks::<$size>()
                .0
                .iter()
                .map(|chunk| <$number>::from_le_bytes(*chunk) as f64)
                .collect()
        };
    }
    Some(match tensor.datatype() {
        DataType::Bytes => return None,
        DataType::Bool | DataType::Uint8 => data.iter().map(|&byte| f64::from(byte)).collect(),
        DataType::Int8 => read!(i8, 1),
        DataType::Uint16 => read!(u16, 2),
        DataType::Int16 => read!(i16, 2),
        DataType::Uint32 => read!(u32, 4),
        DataType::Int32 => read!(i32, 4),
        DataType::Uint64 => read!(u64, 8),
        DataType::Int64 => read!(i64, 8),
        DataType::Fp32 => read!(f32, 4),
        DataType::Fp64 => read!(f64, 8),
        DataType::Fp16 => {
            data.as_chunks::<2>().0.iter().map(|b| half::f16::from_le_bytes(*b).to_f64()).collect()
        }
        DataType::Bf16 => {
            data.as_chunks::<2>().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f64()).collect()
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_come_first_and_nan_last() {
        let data: Vec<u8> =
            [0.1_f32, f32::NAN, 0.7, 0.7].iter().flat_map(|x| x.to_le_bytes()).collect();
        let scores = Tensor::new(DataType::Fp32, Shape::from_slice(&[1, 4]), data.into()).unwrap();
        let labels = ["a".to_owned(), "b".to_owned(), "c".to_owned()];
        let best = top_classes("p", &scores, 9, &labels, true).unwrap();
        assert_eq!(best.shape(), [1, 4]);
        let text: Vec<&[u8]> = best.bytes_elements().collect();
        assert_eq!(text[..3], [&b"0.700000:2:c"[..], b"0.700000:3", b"0.100000:0:a"]);
    }
}
