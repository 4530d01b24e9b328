//! What a row of scores says: the class, and how sure.

use super::feature::Part;

/// The features of a row of scores.
pub const PARTS: [Part; 4] = [Part::Class, Part::Confidence, Part::Margin, Part::Entropy];
/// A row's sum may differ from 1 by as much, and a score be below 0 by as much: 16-bit floats do.
const TOLERANCE: f64 = 1e-2;

/// The scores of one row, summed up.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scored {
    /// Place of the largest; of equal ones the first.
    pub class: usize,
    pub confidence: f64,
    pub margin: f64,
    pub entropy: f64,
}

/// `None` when the row is no distribution: fewer than two numbers, one that is none, one below 0, or a
/// sum other than 1.
pub fn scored(row: &[f64]) -> Option<Scored> {
    let sum: f64 = row.iter().sum();
    let within = row.iter().all(|score| *score >= -TOLERANCE);
    if row.len() < 2 || !within || (sum - 1.0).abs().is_nan() || (sum - 1.0).abs() > TOLERANCE {
        return None;
    }
    let (mut class, mut first, mut second) = (0, f64::NEG_INFINITY, f64::NEG_INFINITY);
    let mut entropy = 0.0;
    for (at, score) in row.iter().copied().enumerate() {
        if score > first {
            (class, second, first) = (at, first, score);
        } else if score > second {
            second = score;
        }
        if score > 0.0 {
            entropy -= score * score.ln();
        }
    }
    Some(Scored { class, confidence: first, margin: first - second, entropy })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_distribution_is_summed_up_and_nothing_else_is() {
        let found = scored(&[0.2, 0.7, 0.1]).unwrap();
        assert_eq!((found.class, found.confidence), (1, 0.7));
        assert!((found.margin - 0.5).abs() < 1e-12);
        // scipy.stats.entropy([0.2, 0.7, 0.1])
        assert!((found.entropy - 0.801_818_552_543_337_3).abs() < 1e-12, "{}", found.entropy);
        assert_eq!(scored(&[0.5, 0.5]).map(|found| (found.class, found.margin)), Some((0, 0.0)));
        for wrong in
            [&[1.0][..], &[0.4, 0.4], &[1.5, -0.5], &[f64::NAN, 1.0], &[f64::INFINITY, 0.0]]
        {
            assert_eq!(scored(wrong), None, "{wrong:?}");
        }
    }
}
