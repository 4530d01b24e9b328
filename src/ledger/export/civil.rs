//! Times as text: RFC 3339, UTC, always with nine digits, so that texts sort as times do.

const SECOND: i64 = 1_000_000_000;
const DAY: i64 = 86_400;

/// A day in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Date {
    pub year: i64,
    pub month: i64,
    pub day: i64,
}

impl Date {
    /// Of a time in nanoseconds since 1970.
    pub fn of(time_ns: i64) -> Self {
        Self::of_day(time_ns.div_euclid(SECOND * DAY))
    }

    /// Of a number of days since 1970; the Gregorian calendar counted from 1 March of the year 0,
    /// so that the leap day is a year's last.
    fn of_day(days: i64) -> Self {
        let days = days + 719_468;
        let era = days.div_euclid(146_097);
        let of_era = days.rem_euclid(146_097);
        let year = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
        let of_year = of_era - (365 * year + year / 4 - year / 100);
        let month = (5 * of_year + 2) / 153;
        let day = of_year - (153 * month + 2) / 5 + 1;
        let month = if month < 10 { month + 3 } else { month - 9 };
        Self { year: year + era * 400 + i64::from(month <= 2), month, day }
    }
}

impl std::fmt::Display for Date {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:04}-{:02}-{:02}", self.year, self.month, self.day)
    }
}

/// `2026-11-25T10:11:12.123456789Z`
pub fn time(time_ns: i64) -> String {
    let seconds = time_ns.div_euclid(SECOND);
    let (date, of_day) = (Date::of_day(seconds.div_euclid(DAY)), seconds.rem_euclid(DAY));
    let (hour, minute, second) = (of_day / 3600, of_day / 60 % 60, of_day % 60);
    let nanos = time_ns.rem_euclid(SECOND);
    format!("{date}T{hour:02}:{minute:02}:{second:02}.{nanos:09}Z")
}
