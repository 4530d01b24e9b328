//! Which records of a ledger: what `export`, `tail` and `replay` take alike.

use std::str::FromStr;

use jiff::{SignedDuration, Timestamp};
use uuid::Uuid;

use crate::domain::{ModelName, Version};
use crate::ledger::export::Selection;

#[derive(clap::Args, Debug, Default)]
pub(in crate::cli) struct Select {
    /// Arrived then or later: a time, a day, or how long ago: 2026-11-25T10:00:00Z, 2026-11-25, 90m
    #[arg(long, value_name = "TIME")]
    since: Option<Moment>,
    /// Arrived before that
    #[arg(long, value_name = "TIME")]
    until: Option<Moment>,
    /// Only of this model
    #[arg(long, value_name = "MODEL")]
    model: Option<ModelName>,
    /// Only of this version
    #[arg(long = "version", value_name = "NUMBER")]
    model_version: Option<Version>,
    /// Only with this status: ok, or an error's word
    #[arg(long, value_name = "WORD")]
    status: Option<String>,
}

impl Select {
    pub(in crate::cli) fn selection(&self, id: Option<Uuid>) -> Selection {
        let of_id = id.map(Selection::of).unwrap_or_default();
        let later = |a: Option<i64>, b: Option<i64>| a.max(b);
        let earlier = |a: Option<i64>, b: Option<i64>| match (a, b) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        Selection {
            since_ns: later(self.since.map(|at| at.0), of_id.since_ns),
            until_ns: earlier(self.until.map(|at| at.0), of_id.until_ns),
            model: self.model.as_ref().map(ToString::to_string),
            version: self.model_version.map(Version::get),
            status: self.status.clone(),
            prediction_id: id,
            labels: None,
        }
    }
}

/// A time in nanoseconds since 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::cli) struct Moment(pub(in crate::cli) i64);

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "expected a time like 2026-11-25T10:00:00Z, a day like 2026-11-25 (UTC), or how \
                 long ago: 30s, 90m, 24h, 7d; got '{text}'"
            )
        };
        let at = match ago(text) {
            Some(ago) => Timestamp::now().checked_sub(ago).map_err(|_| wrong())?,
            None if text.len() == 10 => format!("{text}T00:00:00Z").parse().map_err(|_| wrong())?,
            None => text.parse::<Timestamp>().map_err(|_| wrong())?,
        };
        i64::try_from(at.as_nanosecond()).map(Self).map_err(|_| wrong())
    }
}

fn ago(text: &str) -> Option<SignedDuration> {
    let unit = text.chars().last()?;
    let number: i64 = text[..text.len() - unit.len_utf8()].parse().ok()?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return None,
    };
    let all = number.checked_mul(seconds).filter(|all| (0..=1 << 40).contains(all))?;
    Some(SignedDuration::from_secs(all))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_said_in_three_ways() {
        let of = |text: &str| text.parse::<Moment>().map(|at| at.0);
        assert_eq!(of("1970-01-02"), Ok(86_400_000_000_000));
        assert_eq!(of("1970-01-01T00:00:01.000000002Z"), Ok(1_000_000_002));
        assert_eq!(of("1970-01-01T01:00:00+01:00"), Ok(0));
        let now = i64::try_from(Timestamp::now().as_nanosecond()).unwrap();
        let hour_ago = of("1h").unwrap();
        assert!((now - hour_ago - 3_600_000_000_000).abs() < 60_000_000_000);
        for wrong in ["", "h", "1w", "-1h", "yesterday", "2026-13-01", "99999999999999999999d", "ü"]
        {
            assert!(of(wrong).is_err(), "{wrong}");
        }
    }
}
