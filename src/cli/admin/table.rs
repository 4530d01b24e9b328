//! Tables and fields for terminals: aligned, and free of what a terminal would obey.

use serde_json::{Map, Value};

/// Widest cell that others are aligned to.
const WIDTH_MAX: usize = 48;

/// Rows under a head, columns aligned; no blanks at the ends of lines.
#[derive(Debug)]
pub(in crate::cli) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(in crate::cli) fn new<const N: usize>(head: [&str; N]) -> Self {
        Self { rows: vec![head.map(ToOwned::to_owned).to_vec()] }
    }

    /// Of objects that are alike: a row each, the columns as the first has them.
    pub(in crate::cli) fn of(objects: &[&Map<String, Value>]) -> Self {
        let names: Vec<&String> =
            objects.first().into_iter().flat_map(|first| first.keys()).collect();
        let row = |object: &&Map<String, Value>| {
            names.iter().map(|name| object.get(*name).map_or_else(String::new, cell)).collect()
        };
        let head = names.iter().map(|name| plain(name)).collect();
        Self { rows: std::iter::once(head).chain(objects.iter().map(row)).collect() }
    }

    pub(in crate::cli) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.iter().map(|cell| plain(cell)).collect());
    }

    pub(in crate::cli) fn text(&self) -> String {
        let columns = self.rows.first().map_or(0, Vec::len);
        let width = |column: usize| {
            let widths = self.rows.iter().filter_map(|row| row.get(column));
            widths.map(|cell| cell.chars().count()).max().unwrap_or(0).min(WIDTH_MAX)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line += &format!("{cell:<width$}  ");
            }
            text += line.trim_end();
            text.push('\n');
        }
        text
    }
}

/// Text without control characters and without those that reorder it.
pub(in crate::cli) fn plain(text: &str) -> String {
    let harmful = |char: char| {
        char.is_control()
            || matches!(char, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|char| if harmful(char) { '\u{fffd}' } else { char }).collect()
}

/// A value as a cell; nothing for null.
pub(in crate::cli) fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => plain(text),
        Value::Array(all) => all.iter().map(cell).collect::<Vec<_>>().join(", "),
        other => plain(&other.to_string()),
    }
}

/// `sha256:0123456789ab…` → `0123456789ab`: enough to compare by eye.
pub(in crate::cli) fn short_digest(value: &Value) -> String {
    let text = cell(value);
    text.strip_prefix("sha256:").unwrap_or(&text).chars().take(12).collect()
}

/// A number without needless digits: 95, 0.5, 33.33.
pub(in crate::cli) fn number(value: &Value) -> String {
    let Some(number) = value.as_f64() else { return cell(value) };
    let text = format!("{number:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// `2026-11-25T10:11:12.123456789Z` → `2026-11-25 10:11:12`
pub(in crate::cli) fn time(value: &Value) -> String {
    let text = cell(value);
    let short: String = text.chars().take(19).collect();
    if short.len() == 19 { short.replace('T', " ") } else { text }
}

/// Who changed something, when and why, in one line.
pub(in crate::cli) fn change(value: &Value) -> String {
    if value.is_null() {
        return String::new();
    }
    let reason = cell(&value["reason"]);
    let why = if reason.is_empty() { String::new() } else { format!(": {reason}") };
    format!("{} by {}{why}", time(&value["at"]), cell(&value["actor"]))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn columns_are_aligned_and_lines_end_with_text() {
        let mut table = Table::new(["version", "state", "weight"]);
        table.row(["1".to_owned(), "ready".to_owned(), "95".to_owned()]);
        table.row(["12".to_owned(), "quarantined".to_owned(), String::new()]);
        let want = "version  state        weight\n1        ready        95\n12       quarantined\n";
        assert_eq!(table.text(), want);
    }

    #[test]
    fn nothing_printed_moves_the_cursor() {
        assert_eq!(plain("a\u{1b}[31m\r\nb\u{202e}c"), "a\u{fffd}[31m\u{fffd}\u{fffd}b\u{fffd}c");
        let mut table = Table::new(["a"]);
        table.row(["\u{1b}]0;x\u{7}".to_owned()]);
        assert!(!table.text().contains('\u{1b}'));
    }

    #[test]
    fn cells_are_short() {
        for (value, want) in [
            (json!(95.0), "95"),
            (json!(0.5), "0.5"),
            (json!(33.333), "33.33"),
            (json!(null), ""),
            (json!(100), "100"),
        ] {
            assert_eq!(number(&value), want);
        }
        assert_eq!(short_digest(&json!("sha256:0123456789abcdef")), "0123456789ab");
        assert_eq!(time(&json!("2026-11-25T10:11:12.1Z")), "2026-11-25 10:11:12");
        assert_eq!(cell(&json!(["a", "b"])), "a, b");
        let changed = json!({"at": "2026-11-25T10:11:12Z", "actor": "ci", "reason": "why"});
        assert_eq!(change(&changed), "2026-11-25 10:11:12 by ci: why");
    }
}
