//! The most frequent of values that nobody has a list of, in little memory: Space-Saving.
//!
//! ```text
//! a value that is kept ───▶ its count + 1
//! one that is not ────────▶ takes the place of the least frequent: its count + 1, of which its count is over
//! ```
//!
//! Invariants (Metwally, Agrawal and El Abbadi 2005):
//! - The counts of all that is kept sum to the values that came.
//! - A value came `count` times at most and `count - over_count` times at least.
//! - One that came more often than one in [`KEPT_MAX`] is kept.
//! - Memory: [`KEPT_MAX`] texts of [`TEXT_LEN_MAX`] bytes, whatever comes. Texts that begin alike up to
//!   there are one.

use serde::{Deserialize, Serialize};

use super::grid::ROWS_MAX;

/// Values that are kept.
pub const KEPT_MAX: usize = 32;
/// Bytes of one that are kept.
pub const TEXT_LEN_MAX: usize = 64;

/// Values by how often they came.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frequent(Vec<Kept>);

/// One value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    pub text: String,
    /// It came so often at most.
    pub count: u64,
    /// Of which so many may have been other values.
    pub over_count: u64,
    /// When it came last, by whatever clock [`Frequent::add`] is given.
    pub last_at: i64,
}

impl Frequent {
    /// One more value came, at `now`.
    pub fn add(&mut self, text: &str, now: i64) {
        let text = cut(text);
        if let Some(kept) = self.0.iter_mut().find(|kept| kept.text == text) {
            kept.count = kept.count.saturating_add(1);
            kept.last_at = now;
            return;
        }
        if self.0.len() < KEPT_MAX {
            self.0.push(Kept { text: text.to_owned(), count: 1, over_count: 0, last_at: now });
            return;
        }
        // Of equally frequent ones that which came last the longest ago.
        if let Some(least) = self.0.iter_mut().min_by_key(|kept| (kept.count, kept.last_at)) {
            least.over_count = least.count;
            least.count = least.count.saturating_add(1);
            least.last_at = now;
            least.text.clear();
            least.text.push_str(text);
        }
    }

    /// Most frequent first; of equally frequent ones by text.
    pub fn ordered(&self) -> Vec<&Kept> {
        let mut kept: Vec<&Kept> = self.0.iter().collect();
        kept.sort_by(|a, b| b.count.cmp(&a.count).then_with(|| a.text.cmp(&b.text)));
        kept
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether it is within its limits. For what comes from a file.
    pub fn fits(&self) -> bool {
        self.0.len() <= KEPT_MAX
            && self.0.iter().all(|kept| {
                kept.text.len() <= TEXT_LEN_MAX
                    && kept.over_count < kept.count
                    && kept.count <= ROWS_MAX
            })
    }
}

fn cut(text: &str) -> &str {
    &text[..text.floor_char_boundary(TEXT_LEN_MAX)]
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn counts_are_bounds_and_nothing_frequent_is_missing(values in prop::collection::vec(0_u32..200, 0..2000), skew in 1_u32..60) {
            let (mut frequent, mut truth) = (Frequent::default(), HashMap::<String, u64>::new());
            for (at, value) in values.iter().enumerate() {
                // The larger `skew`, the more of them are one.
                let text = (value / skew).to_string();
                frequent.add(&text, i64::try_from(at).unwrap());
                *truth.entry(text).or_default() += 1;
            }
            let kept = frequent.ordered();
            prop_assert!(frequent.fits() && kept.len() <= KEPT_MAX);
            prop_assert_eq!(kept.iter().map(|kept| kept.count).sum::<u64>(), values.len() as u64);
            for kept in &kept {
                let came = truth[&kept.text];
                prop_assert!((kept.count - kept.over_count..=kept.count).contains(&came), "{:?}: {}", kept, came);
            }
            for (text, came) in &truth {
                let must = *came > values.len() as u64 / KEPT_MAX as u64;
                prop_assert!(!must || kept.iter().any(|kept| kept.text == *text), "{}: {}", text, came);
            }
        }
    }

    #[test]
    fn few_values_are_counted_exactly_and_long_ones_cut_within_no_character() {
        let mut frequent = Frequent::default();
        for text in ["b", "a", "b", "ä".repeat(33).as_str(), "ä".repeat(40).as_str()] {
            frequent.add(text, 7);
        }
        let found: Vec<_> =
            frequent.ordered().iter().map(|kept| (kept.text.clone(), kept.count)).collect();
        assert_eq!(found, [("b".to_owned(), 2), ("ä".repeat(32), 2), ("a".to_owned(), 1)]);
        assert!(frequent.ordered().iter().all(|kept| (kept.over_count, kept.last_at) == (0, 7)));
        let mut odd = frequent.clone();
        odd.0[0].over_count = 2;
        assert!(frequent.fits() && !odd.fits());
    }
}
