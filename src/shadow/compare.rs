//! How far one output of a shadow is from the same output of the answer. Pure.
//!
//! - `max_abs`: the largest |a − b|. `max_rel`: the largest |a − b| / max(|a|, |b|), 0 for two
//!   zeros, so it never passes 2.
//! - `cosine`: a·b / (|a| |b|) over the whole output; 1 for two outputs of zeros, 0 when one is.
//! - `flips`: rows of class scores whose highest score stands in another place; of equal scores the
//!   first counts.
//! - Elements of which one is no number are counted apart, unless both are the same.
//!
//! What agrees: class scores (the output has names for its classes, or the answer's rows are
//! probabilities) when no row flips; other floats when each is within [`TOLERANCE`]; anything else
//! when all elements are equal.

use crate::domain::{DataType, Tensor};

/// Two numbers agree that differ by no more than this, plus this share of the answer's.
pub const TOLERANCE: f64 = 1e-3;
/// A row of probabilities sums to one as nearly as this.
const SUM_TOLERANCE: f64 = 1e-3;
/// Numbers that are decoded at once.
const CHUNK: usize = 256;

/// The answer's output beside the shadow's.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Difference {
    /// Of the answer's output.
    pub(super) elements: u64,
    /// Exact elements that differ, or numbers beyond the tolerance.
    pub(super) unequal: u64,
    /// Elements of which one is no finite number and the other not the same.
    pub(super) non_finite: u64,
    pub(super) floats: Option<Floats>,
    /// Rows of class scores; 0 for an output that has none.
    pub(super) rows: u64,
    pub(super) flips: u64,
    /// Why they could not be compared element by element.
    pub(super) unlike: Option<&'static str>,
    pub(super) agrees: bool,
}

/// Of elements that are finite in both.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Floats {
    pub(super) max_abs: f64,
    pub(super) max_rel: f64,
    /// `None` when there is none, or the numbers are too large.
    pub(super) cosine: Option<f64>,
}

/// Compares; `labelled`: the output has names for its classes.
pub(super) fn compare(answer: &Tensor, shadow: Option<&Tensor>, labelled: bool) -> Difference {
    let elements = answer.elements() as u64;
    let unlike = |why| Difference { elements, unlike: Some(why), ..Difference::default() };
    let Some(shadow) = shadow else { return unlike("missing") };
    let floats = is_float(answer.datatype()) && is_float(shadow.datatype());
    if !floats && answer.datatype() != shadow.datatype() {
        return unlike("datatype");
    }
    if answer.shape() != shadow.shape() {
        return unlike("shape");
    }
    if !floats {
        let unequal = unequal(answer, shadow);
        return Difference { elements, unequal, agrees: unequal == 0, ..Difference::default() };
    }
    let scores = labelled || has_probabilities(answer);
    let classes = answer.shape().last().copied().filter(|classes| scores && *classes > 1);
    let mut pass = Pass::new(classes.unwrap_or(0));
    chunks(answer, shadow, |a, b| a.iter().zip(b).for_each(|(a, b)| pass.element(*a, *b)));
    let decided = if pass.classes > 0 { pass.flips == 0 } else { pass.beyond == 0 };
    Difference {
        elements,
        unequal: pass.beyond,
        non_finite: pass.non_finite,
        floats: Some(pass.floats()),
        rows: pass.rows,
        flips: pass.flips,
        unlike: None,
        agrees: decided && pass.non_finite == 0,
    }
}

fn is_float(datatype: DataType) -> bool {
    matches!(datatype, DataType::Fp16 | DataType::Bf16 | DataType::Fp32 | DataType::Fp64)
}

/// Elements that differ, of two tensors of one shape and datatype.
fn unequal(a: &Tensor, b: &Tensor) -> u64 {
    if a.data() == b.data() {
        return 0;
    }
    let count = match a.datatype().size() {
        None => a.bytes_elements().zip(b.bytes_elements()).filter(|(a, b)| a != b).count(),
        Some(size) => {
            let pairs = a.data().chunks_exact(size).zip(b.data().chunks_exact(size));
            pairs.filter(|(a, b)| a != b).count()
        }
    };
    count as u64
}

/// Whether each row along the last axis is one of probabilities.
fn has_probabilities(tensor: &Tensor) -> bool {
    let classes = tensor.shape().last().copied().unwrap_or(0);
    if classes < 2 || tensor.elements() == 0 {
        return false;
    }
    let (mut sum, mut at, mut fine) = (0.0, 0, true);
    chunks(tensor, tensor, |values, _| {
        for value in values {
            fine &= (0.0..=1.0 + SUM_TOLERANCE).contains(value);
            sum += value;
            at += 1;
            if at == classes {
                fine &= (sum - 1.0_f64).abs() <= SUM_TOLERANCE;
                (sum, at) = (0.0, 0);
            }
        }
        fine
    });
    fine
}

/// Whether to go on.
trait Go {
    fn go(self) -> bool;
}

impl Go for () {
    fn go(self) -> bool {
        true
    }
}

impl Go for bool {
    fn go(self) -> bool {
        self
    }
}

/// Decodes two float tensors side by side, a part at a time.
fn chunks<G: Go>(a: &Tensor, b: &Tensor, mut each: impl FnMut(&[f64], &[f64]) -> G) {
    let (mut left, mut right) = ([0.0; CHUNK], [0.0; CHUNK]);
    let mut from = 0;
    loop {
        let count = decode(a, from, &mut left).min(decode(b, from, &mut right));
        if count == 0 || !each(&left[..count], &right[..count]).go() {
            return;
        }
        from += count;
    }
}

/// Reads elements from `from` on; how many there were.
fn decode(tensor: &Tensor, from: usize, into: &mut [f64; CHUNK]) -> usize {
    let data = tensor.data();
    macro_rules! read {
        ($size:literal, $number:expr) => {{
            let rest = data.get(from * $size..).unwrap_or_default().as_chunks::<$size>().0;
            for (slot, bytes) in into.iter_mut().zip(rest) {
                *slot = $number(*bytes);
            }
            rest.len().min(CHUNK)
        }};
    }
    match tensor.datatype() {
        DataType::Fp64 => read!(8, f64::from_le_bytes),
        DataType::Fp32 => read!(4, |bytes| f64::from(f32::from_le_bytes(bytes))),
        DataType::Fp16 => read!(2, |bytes| half::f16::from_le_bytes(bytes).to_f64()),
        DataType::Bf16 => read!(2, |bytes| half::bf16::from_le_bytes(bytes).to_f64()),
        _ => 0,
    }
}

/// One walk over two outputs.
struct Pass {
    /// Scores in a row; 0: the output has no classes.
    classes: usize,
    max_abs: f64,
    max_rel: f64,
    dot: f64,
    answer_norm: f64,
    shadow_norm: f64,
    finite: u64,
    beyond: u64,
    non_finite: u64,
    rows: u64,
    flips: u64,
    /// Place in the row, and the best so far of either.
    at: usize,
    best: [(usize, f64); 2],
}

const NO_BEST: [(usize, f64); 2] = [(0, f64::NEG_INFINITY); 2];

impl Pass {
    fn new(classes: usize) -> Self {
        Self {
            classes,
            max_abs: 0.0,
            max_rel: 0.0,
            dot: 0.0,
            answer_norm: 0.0,
            shadow_norm: 0.0,
            finite: 0,
            beyond: 0,
            non_finite: 0,
            rows: 0,
            flips: 0,
            at: 0,
            best: NO_BEST,
        }
    }

    fn element(&mut self, answer: f64, shadow: f64) {
        if answer.is_finite() && shadow.is_finite() {
            self.numbers(answer, shadow);
        } else if answer != shadow && !(answer.is_nan() && shadow.is_nan()) {
            self.non_finite += 1;
        }
        if self.classes > 0 {
            self.score(answer, shadow);
        }
    }

    fn numbers(&mut self, answer: f64, shadow: f64) {
        let off = (answer - shadow).abs().min(f64::MAX);
        let largest = answer.abs().max(shadow.abs());
        self.max_abs = self.max_abs.max(off);
        if largest > 0.0 {
            // Divided first: the difference of two large numbers may be too large.
            self.max_rel = self.max_rel.max((answer / largest - shadow / largest).abs());
        }
        self.beyond += u64::from(off > TOLERANCE + TOLERANCE * answer.abs());
        self.dot += answer * shadow;
        self.answer_norm += answer * answer;
        self.shadow_norm += shadow * shadow;
        self.finite += 1;
    }

    fn score(&mut self, answer: f64, shadow: f64) {
        for (best, score) in self.best.iter_mut().zip([answer, shadow]) {
            // A NaN is better than nothing.
            if score > best.1 {
                *best = (self.at, score);
            }
        }
        self.at += 1;
        if self.at == self.classes {
            self.rows += 1;
            self.flips += u64::from(self.best[0].0 != self.best[1].0);
            (self.at, self.best) = (0, NO_BEST);
        }
    }

    fn floats(&self) -> Floats {
        let cosine = match (self.answer_norm > 0.0, self.shadow_norm > 0.0) {
            _ if self.finite == 0 => None,
            _ if self.max_abs == 0.0 => Some(1.0),
            (true, true) => {
                let cosine = self.dot / (self.answer_norm.sqrt() * self.shadow_norm.sqrt());
                cosine.is_finite().then(|| cosine.clamp(-1.0, 1.0))
            }
            (false, false) => Some(1.0),
            _ => Some(0.0),
        };
        Floats { max_abs: self.max_abs, max_rel: self.max_rel, cosine }
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::domain::Shape;

    fn fp32(shape: &[usize], values: &[f32]) -> Tensor {
        let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor::new(DataType::Fp32, Shape::from_slice(shape), data.into()).unwrap()
    }

    fn near(got: f64, wanted: f64) {
        assert!((got - wanted).abs() <= 1e-9 * wanted.abs().max(1.0), "{got}, wanted {wanted}");
    }

    #[test]
    fn numbers_differ_as_the_formulas_say() {
        let a = fp32(&[2, 3], &[1.0, 2.0, 3.0, -4.0, 0.0, 6.0]);
        let b = fp32(&[2, 3], &[1.5, 2.0, 2.0, -4.0, 0.25, -6.0]);
        let difference = compare(&a, Some(&b), false);
        let floats = difference.floats.unwrap();
        near(floats.max_abs, 12.0);
        near(floats.max_rel, 2.0);
        // 1.5 + 4 + 6 + 16 + 0 − 36 over √66 · √(2.25 + 4 + 4 + 16 + 0.0625 + 36)
        near(floats.cosine.unwrap(), -8.5 / (66.0_f64.sqrt() * 62.3125_f64.sqrt()));
        assert_eq!((difference.unequal, difference.rows, difference.flips), (4, 0, 0));
        assert!(!difference.agrees && difference.unlike.is_none());

        let c = fp32(&[2, 3], &[1.001, 2.0, 3.003, -4.004, 0.0005, 6.0]);
        let difference = compare(&a, Some(&c), false);
        assert!(difference.agrees, "{difference:?}");
        let same = compare(&a, Some(&a), false);
        let wanted = Floats { max_abs: 0.0, max_rel: 0.0, cosine: Some(1.0) };
        assert_eq!((same.agrees, same.floats), (true, Some(wanted)));
    }

    /// `at * by % modulus / modulus` for a thousand places, as numpy makes it too.
    fn series(by: u32, modulus: u32) -> impl Iterator<Item = f64> {
        (0..1000).map(move |at| f64::from(at * by % modulus) / f64::from(modulus))
    }

    #[expect(clippy::cast_possible_truncation, reason = "as numpy's astype does")]
    fn single(value: f64) -> f32 {
        value as f32
    }

    /// What numpy 2.4.6 says of the same numbers.
    #[test]
    fn a_thousand_numbers_differ_as_numpy_says() {
        let a: Vec<f32> = series(7919, 10_007).map(|x| single(x - 0.5)).collect();
        let noise = series(104_729, 10_009).map(|x| 0.001 * single(x));
        let b: Vec<f32> = a.iter().zip(noise).map(|(a, noise)| a + noise).collect();
        let difference = compare(&fp32(&[1000], &a), Some(&fp32(&[1000], &b)), false);
        let floats = difference.floats.unwrap();
        near(floats.max_abs, 0.0009998977184295654);
        near(floats.max_rel, 0.47598569364574145);
        near(floats.cosine.unwrap(), 0.9999980029113188);
        assert_eq!((difference.unequal, difference.agrees), (0, true));

        // Rows of five probabilities.
        let rows = |by, modulus: u32| -> Vec<f32> {
            let raw: Vec<f64> = (0..1000_u32).map(|at| f64::from(at * by % modulus + 1)).collect();
            let rows = raw.chunks(5).map(|row| (row, row.iter().sum::<f64>()));
            rows.flat_map(|(row, sum)| row.iter().map(move |x| single(x / sum))).collect()
        };
        let (p, q) = (rows(7919, 10_007), rows(104_729, 10_009));
        let difference = compare(&fp32(&[200, 5], &p), Some(&fp32(&[200, 5], &q)), false);
        assert_eq!((difference.rows, difference.flips), (200, 159));
    }

    #[test]
    fn probabilities_flip_when_another_class_wins() {
        let a = fp32(&[3, 3], &[0.7, 0.2, 0.1, 0.4, 0.4, 0.2, 0.0, 0.0, 1.0]);
        let b = fp32(&[3, 3], &[0.5, 0.3, 0.2, 0.3, 0.5, 0.2, 0.0, 0.1, 0.9]);
        let difference = compare(&a, Some(&b), false);
        assert_eq!((difference.rows, difference.flips, difference.agrees), (3, 1, false));
        near(difference.floats.unwrap().max_abs, f64::from(0.7_f32) - 0.5);
        // The same class wins everywhere, however far the numbers are.
        let c = fp32(&[3, 3], &[0.4, 0.3, 0.3, 0.9, 0.1, 0.0, 0.3, 0.3, 0.4]);
        let difference = compare(&a, Some(&c), false);
        assert_eq!((difference.rows, difference.flips, difference.agrees), (3, 0, true));
        // Scores that are no probabilities are classes only where they have names.
        let (a, b) = (fp32(&[1, 2], &[3.0, -1.0]), fp32(&[1, 2], &[-1.0, 3.0]));
        assert_eq!(compare(&a, Some(&b), false).rows, 0);
        assert_eq!(compare(&a, Some(&b), true).flips, 1);
        // One number is no choice.
        assert_eq!(compare(&fp32(&[2, 1], &[1.0, 1.0]), Some(&a), true).rows, 0);
    }

    #[test]
    fn what_is_no_number_is_counted_apart() {
        let (nan, inf) = (f32::NAN, f32::INFINITY);
        let a = fp32(&[5], &[nan, inf, -inf, 1.0, nan]);
        let b = fp32(&[5], &[nan, inf, inf, nan, 2.0]);
        let difference = compare(&a, Some(&b), false);
        assert_eq!((difference.non_finite, difference.unequal, difference.agrees), (3, 0, false));
        assert_eq!(difference.floats.unwrap().cosine, None);
        assert!(compare(&a, Some(&a), false).agrees);
        // A row of nothing but NaN has its first place as the best.
        let (a, b) = (fp32(&[1, 2], &[nan, nan]), fp32(&[1, 2], &[nan, 1.0]));
        let difference = compare(&a, Some(&b), true);
        assert_eq!((difference.rows, difference.flips, difference.non_finite), (1, 1, 1));
    }

    #[test]
    fn zeros_and_large_numbers_have_a_cosine_or_none() {
        let cosine = |a: &[f32], b: &[f32]| {
            compare(&fp32(&[2], a), Some(&fp32(&[2], b)), false).floats.unwrap().cosine
        };
        assert_eq!(cosine(&[0.0, 0.0], &[0.0, -0.0]), Some(1.0));
        assert_eq!(cosine(&[0.0, 0.0], &[1.0, 0.0]), Some(0.0));
        near(cosine(&[3e38, 3e38], &[3e38, -3e38]).unwrap(), 0.0);
        let huge = |values: [f64; 2]| {
            let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            Tensor::new(DataType::Fp64, Shape::from_slice(&[2]), data.into()).unwrap()
        };
        let (a, b) = (huge([1e200, 1.0]), huge([-1e200, 1.0]));
        let floats = compare(&a, Some(&b), false).floats.unwrap();
        assert_eq!(floats, Floats { max_abs: 2e200, max_rel: 2.0, cosine: None });
        let (most, least) = (huge([f64::MAX, 0.0]), huge([f64::MIN, 0.0]));
        assert_eq!(compare(&most, Some(&least), false).floats.unwrap().max_rel, 2.0);
    }

    #[test]
    fn integers_booleans_and_texts_are_equal_or_not() {
        let ints = |values: [i64; 3]| {
            let data: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            Tensor::new(DataType::Int64, Shape::from_slice(&[3]), data.into()).unwrap()
        };
        let difference = compare(&ints([1, 2, 3]), Some(&ints([1, 5, 4])), true);
        assert_eq!((difference.elements, difference.unequal, difference.agrees), (3, 2, false));
        assert!(difference.floats.is_none());
        assert!(compare(&ints([1, 2, 3]), Some(&ints([1, 2, 3])), false).agrees);
        let texts =
            |values: [&str; 2]| Tensor::from_elements(Shape::from_slice(&[2]), &values).unwrap();
        assert_eq!(compare(&texts(["a", "bc"]), Some(&texts(["a", "b"])), false).unequal, 1);
        assert!(compare(&texts(["", "b"]), Some(&texts(["", "b"])), false).agrees);
        let flags = |values: &'static [u8]| {
            Tensor::new(DataType::Bool, Shape::from_slice(&[2]), Bytes::from_static(values))
                .unwrap()
        };
        assert_eq!(compare(&flags(&[0, 1]), Some(&flags(&[1, 1])), false).unequal, 1);
    }

    #[test]
    fn what_cannot_be_compared_says_why() {
        let a = fp32(&[1, 2], &[1.0, 2.0]);
        let why = |shadow: Option<&Tensor>| compare(&a, shadow, false).unlike;
        assert_eq!(why(None), Some("missing"));
        assert_eq!(why(Some(&fp32(&[2], &[1.0, 2.0]))), Some("shape"));
        let bytes = Tensor::new(DataType::Uint8, Shape::from_slice(&[1, 2]), vec![1, 2].into());
        assert_eq!(why(bytes.as_ref().ok()), Some("datatype"));
        assert!(!compare(&a, None, false).agrees);
        // Another precision is no other datatype.
        let half: Vec<u8> =
            [1.0, 2.0].iter().flat_map(|x| half::f16::from_f64(*x).to_le_bytes()).collect();
        let half = Tensor::new(DataType::Fp16, Shape::from_slice(&[1, 2]), half.into()).unwrap();
        assert!(compare(&a, Some(&half), false).agrees);
        let bf16: Vec<u8> =
            [1.0, 2.5].iter().flat_map(|x| half::bf16::from_f64(*x).to_le_bytes()).collect();
        let bf16 = Tensor::new(DataType::Bf16, Shape::from_slice(&[1, 2]), bf16.into()).unwrap();
        assert_eq!(compare(&a, Some(&bf16), false).floats.unwrap().max_abs, 0.5);
    }

    #[test]
    fn long_outputs_are_compared_to_the_end() {
        let count = 3 * CHUNK + 7;
        let mut values: Vec<f32> = (0..count).map(|at| (at % 10) as f32).collect();
        let a = fp32(&[count], &values);
        values[count - 1] += 2.5;
        let difference = compare(&a, Some(&fp32(&[count], &values)), false);
        assert_eq!((difference.unequal, difference.floats.unwrap().max_abs), (1, 2.5));
        assert!(compare(&fp32(&[0, 3], &[]), Some(&fp32(&[0, 3], &[])), false).agrees);
    }
}
