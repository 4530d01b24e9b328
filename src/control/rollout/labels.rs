//! What labels say of two arms: how often each was mistaken, among what is labelled.
//!
//! Labels come later than requests, and how many come of which arm is not the split's to say, so the
//! test takes no weight. It is the two-sample test of Turner, Ly and Grünwald ("Generic E-variables
//! for exact sequential k-sample tests that allow for optional stopping", 2024): of the labels that
//! came between two looks, *n₁* of the candidate with *k₁* mistakes and *n₀* of the stable version
//! with *k₀*,
//!
//! ```text
//! E ·= p₁^k₁ (1−p₁)^(n₁−k₁) p₀^k₀ (1−p₀)^(n₀−k₀) / p^(k₁+k₀) (1−p)^(n₁+n₀−k₁−k₀)
//!                                                      p = (n₁p₁ + n₀p₀) / (n₁ + n₀)
//! ```
//!
//! with p₁ and p₀ guessed from the labels before. Whatever the common share of mistakes is, the
//! expected value of the factor is at most 1 for a candidate that makes as many; where the guess says
//! that it makes fewer, the factor is 1.
//!
//! Invariant: the order of labels matters, so the logarithm is kept, beside the counts.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::evidence::Count;

/// What the guess of a share begins with, of mistakes and of others (the paper's).
const PRIOR: f64 = 0.18;

/// Rows with a label, and those of them that the model was mistaken in, of one version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LabelTotals {
    pub candidate: Count,
    pub stable: Count,
}

/// Labels that came since a rollout began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LabelEvidence {
    pub candidate: Count,
    pub stable: Count,
    /// Logarithm of the e-value.
    pub ln: f64,
    /// What was counted at the last look; what is counted stays over a restart.
    #[serde(default)]
    seen: Option<LabelTotals>,
}

impl LabelEvidence {
    /// Takes what has come since the last look, if that is known now. Corrections that take mistakes
    /// back are no labels.
    pub fn add(&mut self, now: Option<LabelTotals>) {
        let Some(now) = now else { return };
        let Some(before) = self.seen.replace(now) else { return };
        let candidate = since(now.candidate, before.candidate);
        let stable = since(now.stable, before.stable);
        if candidate.of + stable.of == 0 {
            return;
        }
        self.ln += factor((guess(self.candidate), candidate), (guess(self.stable), stable));
        add(&mut self.candidate, candidate);
        add(&mut self.stable, stable);
    }
}

fn since(now: Count, before: Count) -> Count {
    let of = now.of.saturating_sub(before.of);
    Count { events: now.events.saturating_sub(before.events).min(of), of }
}

fn add(total: &mut Count, more: Count) {
    total.events += more.events;
    total.of += more.of;
}

fn guess(before: Count) -> f64 {
    (before.events as f64 + PRIOR) / (before.of as f64 + 2.0 * PRIOR)
}

/// Logarithm of what the labels of one look say.
fn factor((p1, candidate): (f64, Count), (p0, stable): (f64, Count)) -> f64 {
    if p1 <= p0 {
        return 0.0;
    }
    let (n1, n0) = (candidate.of as f64, stable.of as f64);
    let p = (n1 * p1 + n0 * p0) / (n1 + n0);
    let ln = |p: f64, count: Count| {
        let (events, others) = (count.events as f64, (count.of - count.events) as f64);
        events * p.ln() + others * (-p).ln_1p()
    };
    let both = Count { events: candidate.events + stable.events, of: candidate.of + stable.of };
    ln(p1, candidate) + ln(p0, stable) - ln(p, both)
}

#[cfg(test)]
mod tests {
    use rand::rngs::StdRng;
    use rand::{RngExt as _, SeedableRng as _};

    use super::*;

    /// Labels come in looks of some of each arm; when the evidence reaches the limit, if it does.
    fn alarm(seed: u64, candidate: f64, stable: f64, looks: usize) -> Option<u64> {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut totals = LabelTotals::default();
        let mut evidence = LabelEvidence::default();
        evidence.add(Some(totals));
        for _ in 0..looks {
            for (count, share, most) in
                [(&mut totals.candidate, candidate, 3), (&mut totals.stable, stable, 20)]
            {
                for _ in 0..rng.random_range(0..=most) {
                    count.of += 1;
                    count.events += u64::from(rng.random::<f64>() < share);
                }
            }
            evidence.add(Some(totals));
            if evidence.ln >= f64::ln(20.0) {
                return Some(evidence.candidate.of);
            }
        }
        None
    }

    #[test]
    fn equals_are_seldom_accused_and_worse_ones_soon() {
        let runs = 200;
        for share in [0.02, 0.1, 0.4] {
            let alarms = (0..runs).filter(|seed| alarm(*seed, share, share, 300).is_some()).count();
            assert!(alarms <= 10, "{alarms} of {runs} at {share}");
        }
        let better = (0..runs).filter(|seed| alarm(*seed, 0.05, 0.1, 300).is_some()).count();
        assert!(better <= 4, "{better} of {runs}");
        let mut found: Vec<u64> = (0..runs).filter_map(|seed| alarm(seed, 0.3, 0.1, 300)).collect();
        found.sort_unstable();
        assert!(found.len() >= 198, "{} of {runs} were found", found.len());
        let median = found[found.len() / 2];
        assert!((20..150).contains(&median), "after {median} labels");
    }

    #[test]
    fn what_was_there_before_and_what_is_taken_back_says_nothing() {
        let count = |events, of| Count { events, of };
        let mut evidence = LabelEvidence::default();
        let totals = |candidate, stable| Some(LabelTotals { candidate, stable });
        evidence.add(totals(count(90, 100), count(0, 100)));
        assert_eq!((evidence.ln, evidence.candidate.of), (0.0, 0));
        evidence.add(totals(count(80, 100), count(0, 90)));
        assert_eq!((evidence.ln, evidence.candidate.of, evidence.stable.of), (0.0, 0, 0));
        // At a start nothing is known for a moment.
        evidence.add(None);
        evidence.add(totals(count(85, 110), count(0, 100)));
        assert_eq!((evidence.candidate, evidence.stable), (count(5, 10), count(0, 10)));
        // As it is kept in a rollout's record.
        let text = serde_json::to_string(&evidence).unwrap();
        assert_eq!(serde_json::from_str::<LabelEvidence>(&text).unwrap(), evidence);
    }
}
