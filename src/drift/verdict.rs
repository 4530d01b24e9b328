//! Alerts of one window: an effect that is large, and evidence that it is none of chance.

use serde::{Deserialize, Serialize};

use super::counters::{Counters, Score, Scores};
use super::evidence::{FALSE_SHARE, ROWS_MIN, findings};
use super::profile::FeatureProfile;
use super::scores::normal_two_sided;

/// The scores that alerts are made of; the others are for people.
pub const EFFECTS: [Score; 3] = [Score::CellPsi, Score::Mmd, Score::Missing];

/// What a window says about one feature.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Fewer than [`ROWS_MIN`] rows on either side: neither good nor bad.
    InsufficientData,
    Steady,
    Drifted,
}

impl State {
    pub fn name(self) -> &'static str {
        match self {
            Self::InsufficientData => "insufficient_data",
            Self::Steady => "steady",
            Self::Drifted => "drifted",
        }
    }
}

/// A score beyond its limit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Beyond {
    pub score: Score,
    pub value: f64,
    pub limit: f64,
}

/// One feature's part of a window.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    pub state: State,
    /// What is large, whether it is evidence or not.
    pub beyond: Vec<Beyond>,
    /// The smallest level at which this feature alone would be a finding.
    pub p: f64,
}

/// Features of a window are judged together: of those that are called drifted, one in twenty is
/// expected to be none, however many there are (Benjamini and Hochberg).
pub fn judge<'a>(
    features: impl IntoIterator<Item = (&'a FeatureProfile, &'a Counters, &'a Scores)>,
) -> Vec<Verdict> {
    let mut verdicts: Vec<Verdict> = features
        .into_iter()
        .map(|(feature, current, scores)| {
            let own = feature.own();
            let enough = own.rows() >= ROWS_MIN && current.rows() >= ROWS_MIN;
            let state = if enough { State::Steady } else { State::InsufficientData };
            let beyond = EFFECTS.iter().filter_map(|score| beyond(feature, scores, *score));
            Verdict { state, beyond: beyond.collect(), p: p_value(feature, &own, current, scores) }
        })
        .collect();
    let judged: Vec<usize> =
        (0..verdicts.len()).filter(|i| verdicts[*i].state == State::Steady).collect();
    let p_values: Vec<f64> = judged.iter().map(|i| verdicts[*i].p).collect();
    for (i, finding) in judged.into_iter().zip(findings(&p_values, FALSE_SHARE)) {
        if finding && !verdicts[i].beyond.is_empty() {
            verdicts[i].state = State::Drifted;
        }
    }
    verdicts
}

fn find(scores: &Scores, wanted: Score) -> Option<f64> {
    scores.iter().find(|(score, _)| *score == wanted).map(|(_, value)| *value)
}

fn beyond(feature: &FeatureProfile, scores: &Scores, score: Score) -> Option<Beyond> {
    let (value, limit) = (find(scores, score)?, feature.limit(score)?);
    (value >= limit).then_some(Beyond { score, value, limit })
}

/// Of the values and of the rows without one, twice the smaller: two looks at one feature.
fn p_value(feature: &FeatureProfile, own: &Counters, current: &Counters, scores: &Scores) -> f64 {
    let of_values = match (own, current) {
        (Counters::Mmd(a), Counters::Mmd(b)) => match (find(scores, Score::Mmd), a.rows, b.rows) {
            // What the distance of means of bounded features exceeds by chance (McDiarmid).
            (Some(distance), n, m) if n > 0 && m > 0 => {
                let mean = 1.0 / n as f64 + 1.0 / m as f64;
                let over = (distance.max(0.0).sqrt() - (2.0 * mean).sqrt()).max(0.0);
                (-over * over / (4.0 * mean)).exp()
            }
            _ => 1.0,
        },
        _ => find(scores, Score::CellP).unwrap_or(1.0),
    };
    let (n, m) = (own.rows() as f64, current.rows() as f64);
    let (a, b) = (n - own.len() as f64, m - current.len() as f64);
    if feature.limit(Score::Missing).is_none() || a + b == 0.0 || n == 0.0 || m == 0.0 {
        return of_values;
    }
    let both = (a + b) / (n + m);
    let spread = (both * (1.0 - both) * (1.0 / n + 1.0 / m)).sqrt();
    let of_missing = if spread > 0.0 { normal_two_sided((a / n - b / m) / spread) } else { 1.0 };
    (2.0 * of_values.min(of_missing)).min(1.0)
}

#[cfg(test)]
mod tests;
