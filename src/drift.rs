//! How far inputs and outputs have moved from a reference: scores, counters, profiles.
//!
//! ```text
//! tensors ─▶ rows::Plan ─▶ values of features ─┬─▶ counters: cells, tallies   tier 1, adds up, always on
//!            (feature: the rule of names)      └─▶ window: ring, reservoir    tier 2, raw values
//!                                                        │
//!            profile ◀── learn ◀── rows of a reference   ▼
//!               └──────────────────────────────▶ scores · evidence · thresholds
//! ```
//!
//! Which features a model has, and what they are called, is said in [`feature`]. *Tier 1* counts on
//! cells that a [`profile::Profile`] says; its scores are exact by their own definition, and bounds of
//! what raw values would give. *Tier 2* keeps raw values and computes what Evidently and scipy would.
//! A score says how much has changed; [`evidence`] and [`sequential`] whether it has.
//!
//! Invariants:
//! - Pure: no IO, no clock, no thread. Who has them hands in what they read.
//! - Counters of parts add up to those of the whole, so slots of time and replicas can be added.
//! - Memory depends on the profile, never on what comes: per feature and set of counters some 1.2 KB
//!   for numbers (64 cells, 16 bytes each), 8 bytes for each category (8 KB at most), 2 KB for a
//!   projection; a ring of raw values 64 KB.

pub mod counters;
pub mod evidence;
pub mod feature;
pub mod frequent;
pub mod grid;
pub mod learn;
pub mod outliers;
pub mod profile;
pub mod quality;
pub mod random;
pub mod rows;
pub mod scored;
pub mod scores;
pub mod sequential;
mod sparse;
pub mod tally;
pub mod verdict;
pub mod wide;
pub mod window;
