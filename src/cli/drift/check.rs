//! Limits that somebody holds the scores to.

use super::report::Report;
use crate::drift::counters::Score;
use crate::drift::verdict::State;

/// What a limit is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Measure {
    /// A score of any feature.
    Score(Score),
    /// Features that are called drifted.
    Drifted,
    /// Features that have too few rows to be called anything, or none at all.
    Insufficient,
    /// Share of columns that Evidently would call drifted.
    Share,
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Limit {
    pub(super) measure: Measure,
    pub(super) limit: f64,
}

impl Measure {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Score(score) => score.name(),
            Self::Drifted => "drifted",
            Self::Insufficient => "insufficient",
            Self::Share => "share",
        }
    }
}

/// `psi=0.2`
pub(super) fn limit(text: &str) -> Result<Limit, String> {
    let (name, number) = text.split_once('=').ok_or("expected SCORE=LIMIT")?;
    let measure = match name {
        "drifted" => Measure::Drifted,
        "insufficient" => Measure::Insufficient,
        "share" => Measure::Share,
        name => Measure::Score(
            name.parse().map_err(|error| format!("{error}, drifted, insufficient, share"))?,
        ),
    };
    match number.parse::<f64>().ok().filter(|limit| limit.is_finite() && *limit >= 0.0) {
        Some(limit) => Ok(Limit { measure, limit }),
        None => Err(format!("expected a number of 0 or more after '{name}='")),
    }
}

/// One thing that is beyond a limit.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Failure {
    /// Of the data set as a whole `None`.
    pub(super) feature: Option<usize>,
    pub(super) measure: Measure,
    pub(super) value: f64,
    pub(super) limit: f64,
}

pub(super) fn failures(limits: &[Limit], report: &Report) -> Vec<Failure> {
    let mut found = Vec::new();
    for Limit { measure, limit } in limits.iter().copied() {
        let whole = |value: f64| Failure { feature: None, measure, value, limit };
        match measure {
            Measure::Drifted => found.push(whole(report.count(State::Drifted) as f64)),
            Measure::Insufficient => {
                found.push(whole(report.count(State::InsufficientData) as f64));
            }
            Measure::Share => found.push(whole(report.evidently().share)),
            Measure::Score(score) => {
                for (number, compared) in report.features.iter().enumerate() {
                    // Too few rows say nothing; `insufficient` is for those.
                    if compared.verdict.state == State::InsufficientData {
                        continue;
                    }
                    let value = compared.scores.iter().find(|(own, _)| *own == score);
                    let feature = Some(number);
                    found.extend(value.map(|(_, value)| Failure {
                        feature,
                        measure,
                        value: *value,
                        limit,
                    }));
                }
            }
        }
    }
    found.retain(|failure| match failure.measure {
        Measure::Score(score) if score.is_p_value() => failure.value < failure.limit,
        _ => failure.value > failure.limit,
    });
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_a_known_score_and_a_number() {
        let of = |text: &str| limit(text).map(|limit| (limit.measure, limit.limit));
        assert_eq!(of("psi=0.2"), Ok((Measure::Score(Score::Psi), 0.2)));
        assert_eq!(of("drifted=0"), Ok((Measure::Drifted, 0.0)));
        for wrong in ["psi", "psi=", "psi=-1", "psi=nan", "colour=1"] {
            assert!(of(wrong).is_err(), "{wrong}");
        }
        assert!(of("colour=1").unwrap_err().contains("wasserstein"));
    }
}
