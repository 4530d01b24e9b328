//! Two samples of one feature, ready to be compared.

use std::collections::BTreeMap;

/// The values of one feature that are numbers, ascending.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sample {
    sorted: Vec<f64>,
    /// Every value comes from a column of integers.
    pub integers: bool,
}

impl Sample {
    /// Takes out NaN and infinities, and sorts.
    pub fn new(mut values: Vec<f64>, integers: bool) -> Self {
        values.retain(|value| value.is_finite());
        values.sort_unstable_by(f64::total_cmp);
        // What compares equal has to stand together: -0.0 is 0.0.
        for value in &mut values {
            *value += 0.0;
        }
        Self { sorted: values, integers }
    }

    pub fn sorted(&self) -> &[f64] {
        &self.sorted
    }

    pub fn len(&self) -> usize {
        self.sorted.len()
    }

    pub fn is_empty(&self) -> bool {
        self.sorted.is_empty()
    }

    /// How many different values there are.
    pub fn distinct(&self) -> usize {
        self.sorted.chunk_by(|a, b| a == b).count()
    }

    pub fn mean(&self) -> f64 {
        self.sorted.iter().sum::<f64>() / self.len() as f64
    }

    /// Standard deviation of the values as a population (`ddof=0`).
    pub fn std(&self) -> f64 {
        let mean = self.mean();
        let squares: f64 = self.sorted.iter().map(|value| (value - mean).powi(2)).sum();
        (squares / self.len() as f64).sqrt()
    }
}

/// How often each category occurs.
pub type Counts = BTreeMap<String, u64>;

/// Both sides of a comparison; neither is changed by it.
#[derive(Clone, Copy, Debug)]
pub enum Sides<'a> {
    Numbers { reference: &'a Sample, current: &'a Sample },
    Categories { reference: &'a Counts, current: &'a Counts },
}

impl Sides<'_> {
    /// Rows of both sides.
    pub fn rows(&self) -> (u64, u64) {
        match self {
            Self::Numbers { reference, current } => (reference.len() as u64, current.len() as u64),
            Self::Categories { reference, current } => {
                (reference.values().sum(), current.values().sum())
            }
        }
    }

    /// Counts of each distinct value of either side, ascending by value.
    pub fn by_value(&self) -> Vec<(u64, u64)> {
        match self {
            Self::Numbers { reference, current } => {
                let (mut cells, mut before) = (Vec::new(), (0, 0));
                super::walk(reference.sorted(), current.sorted(), |below_a, below_b, _, _| {
                    cells.push(((below_a - before.0) as u64, (below_b - before.1) as u64));
                    before = (below_a, below_b);
                });
                cells
            }
            Self::Categories { reference, current } => {
                let mut cells: BTreeMap<&str, (u64, u64)> = BTreeMap::new();
                for (key, count) in reference.iter().filter(|(_, count)| **count > 0) {
                    cells.entry(key).or_default().0 = *count;
                }
                for (key, count) in current.iter().filter(|(_, count)| **count > 0) {
                    cells.entry(key).or_default().1 = *count;
                }
                cells.into_values().collect()
            }
        }
    }
}
