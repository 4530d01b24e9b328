//! The values of one feature as they come: a sample of them, in memory that has a limit.

use std::collections::HashMap;

use super::{INTEGER_CATEGORIES_MAX, VECTORS_MAX};
use crate::domain::DataType;
use crate::drift::counters::number_name;
use crate::drift::feature::{Feature, Part, Value};
use crate::drift::grid::LARGEST;
use crate::drift::scores::{Counts, Sample};
use crate::drift::tally::category;
use crate::drift::wide::DIMENSIONS;
use crate::drift::window::Reservoir;

/// What one feature's rows had.
#[derive(Clone, Debug)]
pub struct Column {
    pub(super) numbers: Reservoir<f64>,
    /// Categories by number, in the order of rows.
    pub(super) texts: Reservoir<u32>,
    pub(super) numbered: HashMap<Box<str>, u32>,
    texts_max: usize,
    pub(super) vectors: Reservoir<[f64; DIMENSIONS]>,
    pub missing: u64,
    pub nan: u64,
    pub infinite: u64,
}

/// A column's values, ready to be compared.
#[derive(Clone, Debug)]
pub enum Data {
    Numbers(Sample),
    Categories(Counts),
    Vectors,
}

impl Column {
    /// Keeps `size` values and tells `texts_max` texts apart at most, in a sample that depends on `seed`.
    pub fn new(size: usize, texts_max: usize, seed: u64) -> Self {
        Self {
            numbers: Reservoir::new(size, seed),
            texts: Reservoir::new(size, seed),
            numbered: HashMap::new(),
            texts_max,
            vectors: Reservoir::new(size.min(VECTORS_MAX), seed),
            missing: 0,
            nan: 0,
            infinite: 0,
        }
    }

    pub fn add(&mut self, value: Value<'_>) {
        match value {
            Value::Number(number) if number.is_nan() => self.nan += 1,
            Value::Number(number) if number.abs() > LARGEST => self.infinite += 1,
            Value::Number(number) => self.numbers.push(number),
            Value::Text(bytes) => self.add_text(&category(bytes)),
            Value::Vector(vector) => self.vectors.push(*vector),
            Value::Missing => self.missing += 1,
        }
    }

    /// Of more than `texts_max` different texts the later ones are one.
    fn add_text(&mut self, text: &str) {
        let number = match self.numbered.get(text) {
            Some(number) => *number,
            None => {
                let text = if self.numbered.len() < self.texts_max { text } else { OTHERS };
                let next = u32::try_from(self.numbered.len()).unwrap_or(u32::MAX);
                *self.numbered.entry(text.into()).or_insert(next)
            }
        };
        self.texts.push(number);
    }

    /// Rows, whatever they had.
    pub fn rows(&self) -> u64 {
        self.numbers.seen()
            + self.texts.seen()
            + self.vectors.seen()
            + self.missing
            + self.nan
            + self.infinite
    }

    /// Rows that had a value, and how many of them were kept.
    pub fn kept(&self) -> (u64, u64) {
        let lens =
            [self.numbers.values().len(), self.texts.values().len(), self.vectors.values().len()];
        let seen = self.numbers.seen() + self.texts.seen() + self.vectors.seen();
        (seen, lens.iter().sum::<usize>() as u64)
    }

    /// As numbers or as categories. Integers with missing ones among them are no integers any more, as
    /// data frames have it.
    pub fn data(&self, feature: &Feature, categories: bool) -> Data {
        if feature.part == Part::Mmd {
            return Data::Vectors;
        }
        if categories {
            return Data::Categories(self.counts());
        }
        let numbers = self.numbers.values();
        let integers = is_integer(feature.datatype)
            && matches!(feature.part, Part::Element(_))
            && self.missing + self.nan + self.infinite == 0
            && numbers.iter().all(|number| number.fract() == 0.0);
        Data::Numbers(Sample::new(numbers.to_vec(), integers))
    }

    fn counts(&self) -> Counts {
        let mut counts = Counts::new();
        let mut of_numbers = vec![0_u64; self.numbered.len()];
        for number in self.texts.values() {
            of_numbers[*number as usize] += 1;
        }
        for (text, number) in &self.numbered {
            counts.insert(text.to_string(), of_numbers[*number as usize]);
        }
        for number in self.numbers.values() {
            *counts.entry(number_name(*number)).or_default() += 1;
        }
        counts.retain(|_, count| *count > 0);
        counts
    }

    /// Of rows without a value as many as the sample stands for.
    pub(super) fn scaled(&self, rows: u64) -> u64 {
        let (seen, kept) = self.kept();
        match seen {
            0 => rows,
            seen => u64::try_from(u128::from(rows) * u128::from(kept) / u128::from(seen))
                .unwrap_or(u64::MAX),
        }
    }

    pub(super) fn is_categories(&self, feature: &Feature) -> bool {
        let own = matches!(feature.part, Part::Element(_));
        if self.texts.seen() > 0 || feature.part == Part::Class {
            return true;
        }
        own && (matches!(feature.datatype, DataType::Bytes | DataType::Bool)
            || (is_integer(feature.datatype) && self.few_numbers()))
    }

    fn few_numbers(&self) -> bool {
        let mut seen: Vec<f64> = Vec::with_capacity(INTEGER_CATEGORIES_MAX + 1);
        for number in self.numbers.values() {
            if !seen.contains(number) {
                seen.push(*number);
            }
            if seen.len() > INTEGER_CATEGORIES_MAX {
                return false;
            }
        }
        true
    }
}

fn is_integer(datatype: DataType) -> bool {
    use DataType::{Int8, Int16, Int32, Int64, Uint8, Uint16, Uint32, Uint64};
    matches!(datatype, Uint8 | Uint16 | Uint32 | Uint64 | Int8 | Int16 | Int32 | Int64)
}

/// The name of texts that came after too many others.
const OTHERS: &str = "…";
