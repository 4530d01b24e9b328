//! Counters of one categorical feature on the reference's categories.
//!
//! Invariants:
//! - Counters of parts add up to those of the whole, exactly.
//! - Memory: 8 bytes a category, of which there are [`CATEGORIES_MAX`] at most. What the dictionary lacks
//!   is counted in one place: as *unseen* when the dictionary has every category of the reference, as
//!   *other* when it has not.

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use super::scores::Counts;

/// Categories of a reference that are told apart: the most frequent ones.
pub const CATEGORIES_MAX: usize = 1000;
/// Longest name of a category; of what is longer only so much is read.
pub const CATEGORY_LEN_MAX: usize = 256;

/// A category's name from bytes: what is no UTF-8 is replaced, what is too long cut.
pub fn category(bytes: &[u8]) -> std::borrow::Cow<'_, str> {
    let cut = &bytes[..bytes.len().min(CATEGORY_LEN_MAX)];
    match std::str::from_utf8(cut) {
        Ok(text) => text.into(),
        // Cut within a character.
        Err(error) if error.error_len().is_none() => {
            String::from_utf8_lossy(&cut[..error.valid_up_to()])
        }
        Err(_) => String::from_utf8_lossy(cut),
    }
}

/// The categories of a reference, most frequent first.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct Dictionary {
    names: Vec<String>,
    numbers: HashMap<Box<str>, usize>,
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DictionaryError {
    #[error("a feature has at most {CATEGORIES_MAX} categories, got {0}")]
    Size(usize),
    #[error("category {0} is twice in the list, or longer than {CATEGORY_LEN_MAX} bytes")]
    Name(usize),
}

impl TryFrom<Vec<String>> for Dictionary {
    type Error = DictionaryError;

    fn try_from(names: Vec<String>) -> Result<Self, DictionaryError> {
        if names.len() > CATEGORIES_MAX {
            return Err(DictionaryError::Size(names.len()));
        }
        let mut numbers = HashMap::with_capacity(names.len());
        for (number, name) in names.iter().enumerate() {
            // Replaced bytes take more room than they had.
            let long = name.len() > 3 * CATEGORY_LEN_MAX;
            if long || numbers.insert(name.as_str().into(), number).is_some() {
                return Err(DictionaryError::Name(number));
            }
        }
        Ok(Self { names, numbers })
    }
}

impl From<Dictionary> for Vec<String> {
    fn from(dictionary: Dictionary) -> Self {
        dictionary.names
    }
}

impl Dictionary {
    /// The most frequent categories of `counts`, and the reference's counters on them.
    pub fn over(counts: &Counts, missing: u64) -> (Self, Tally) {
        let mut order: Vec<(&String, u64)> =
            counts.iter().map(|(name, count)| (name, *count)).collect();
        // Of equally frequent ones those that come first by name: `counts` is in that order.
        order.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
        let (taken, rest) = order.split_at(order.len().min(CATEGORIES_MAX));
        let names: Vec<String> = taken.iter().map(|(name, _)| (*name).clone()).collect();
        let numbers = names.iter().zip(0..).map(|(name, number)| (name.as_str().into(), number));
        let tally = Tally {
            counts: taken.iter().map(|(_, count)| *count).collect(),
            outside: rest.iter().map(|(_, count)| count).sum(),
            missing,
        };
        (Self { numbers: numbers.collect(), names }, tally)
    }

    pub fn names(&self) -> &[String] {
        &self.names
    }

    pub fn number(&self, name: &str) -> Option<usize> {
        self.numbers.get(name).copied()
    }
}

/// Counters over a dictionary's categories.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tally {
    /// Rows of each category of the dictionary.
    #[serde(with = "super::sparse")]
    pub counts: Vec<u64>,
    /// Rows whose category is not in it.
    pub outside: u64,
    pub missing: u64,
}

impl Tally {
    pub fn new(dictionary: &Dictionary) -> Self {
        Self { counts: vec![0; dictionary.names.len()], outside: 0, missing: 0 }
    }

    pub fn add(&mut self, dictionary: &Dictionary, name: &str) {
        match dictionary.number(name).and_then(|number| self.counts.get_mut(number)) {
            Some(count) => *count += 1,
            None => self.outside += 1,
        }
    }

    /// Rows that had a category.
    pub fn len(&self) -> u64 {
        self.counts.iter().sum::<u64>() + self.outside
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub fn rows(&self) -> u64 {
        self.len() + self.missing
    }

    /// Adds the counters of other rows on the same dictionary; of another one nothing is added.
    pub fn merge(&mut self, other: &Self) {
        if self.counts.len() != other.counts.len() {
            return;
        }
        for (have, more) in self.counts.iter_mut().zip(&other.counts) {
            *have += more;
        }
        self.outside += other.outside;
        self.missing += other.missing;
    }

    /// Rows of each category, and of those outside the dictionary.
    pub fn cells(&self) -> Vec<u64> {
        self.counts.iter().copied().chain([self.outside]).collect()
    }

    pub(super) fn fits(&self, dictionary: &Dictionary) -> bool {
        let max = super::grid::ROWS_MAX;
        self.counts.len() == dictionary.names.len()
            && self.counts.iter().chain([&self.outside, &self.missing]).all(|count| *count <= max)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_dictionary_lacks_is_outside() {
        let counts = Counts::from([("a".into(), 5), ("b".into(), 9), ("c".into(), 5)]);
        let (dictionary, reference) = Dictionary::over(&counts, 2);
        assert_eq!(dictionary.names(), ["b", "a", "c"]);
        assert_eq!((reference.cells(), reference.rows()), (vec![9, 5, 5, 0], 21));
        let mut tally = Tally::new(&dictionary);
        for name in ["c", "zebra", "a", "c"] {
            tally.add(&dictionary, name);
        }
        let mut twice = tally.clone();
        twice.merge(&tally);
        assert_eq!((tally.cells(), twice.cells()), (vec![0, 1, 2, 1], vec![0, 2, 4, 2]));
        let many: Counts = (0..2000).map(|i| (format!("{i:04}"), 1)).collect();
        let (dictionary, reference) = Dictionary::over(&many, 0);
        assert_eq!((dictionary.names().len(), reference.outside), (CATEGORIES_MAX, 1000));
    }

    #[test]
    fn names_are_cut_within_no_character() {
        assert_eq!(category(b"plain"), "plain");
        assert_eq!(category(&[b'a', 0xff]), "a\u{fffd}");
        let long = "ä".repeat(200);
        assert_eq!(category(long.as_bytes()), "ä".repeat(128));
        let odd = format!("x{long}");
        assert_eq!(category(odd.as_bytes()), format!("x{}", "ä".repeat(127)));
        let twice = Dictionary::try_from(vec!["a".to_owned(), "a".to_owned()]);
        assert_eq!(twice, Err(DictionaryError::Name(1)));
    }
}
