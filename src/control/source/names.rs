//! Paths that a registry names, before they become files.
//!
//! Invariant: a path that passes is relative, goes only down, and means the same to every tool that
//! may look at the staged folder.

use super::super::lineage::short;

/// Longest part, as file systems have it.
const PART_LEN_MAX: usize = 255;
/// Longest path, as object stores have it.
const PATH_LEN_MAX: usize = 1024;
/// Deepest folder of a version.
pub(super) const DEPTH_MAX: usize = 8;

/// Why a path is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the path '{path}' {problem}")]
pub struct PathError {
    path: String,
    problem: &'static str,
}

/// Checks a path inside a version's folder.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check(path: &str) -> Result<(), PathError> {
    match problem(path) {
        None => Ok(()),
        Some(problem) => Err(PathError { path: short(path).chars().take(128).collect(), problem }),
    }
}

/// Checks one part of a path.
///
/// # Errors
/// What is wrong with it.
pub(super) fn check_part(part: &str) -> Result<(), PathError> {
    match part.contains('/') {
        true => Err(PathError {
            path: short(part).chars().take(128).collect(),
            problem: "has more than one part",
        }),
        false => check(part),
    }
}

fn problem(path: &str) -> Option<&'static str> {
    if path.is_empty() {
        return Some("is empty");
    }
    if path.len() > PATH_LEN_MAX {
        return Some("is longer than 1024 bytes");
    }
    if path.starts_with('/') {
        return Some("is absolute");
    }
    if path.split('/').count() > DEPTH_MAX {
        return Some("has more than 8 parts");
    }
    path.split('/').find_map(part_problem)
}

fn part_problem(part: &str) -> Option<&'static str> {
    if part.is_empty() {
        return Some("has an empty part");
    }
    if part == "." || part == ".." {
        return Some("leaves its folder");
    }
    if part.len() > PART_LEN_MAX {
        return Some("has a part longer than 255 bytes");
    }
    if part.chars().any(is_hidden) {
        return Some("has a control character");
    }
    if part.contains(['\\', ':']) {
        return Some("has a '\\' or ':'");
    }
    is_device(part).then_some("is the name of a device")
}

/// Control characters, and those that make a text look like another.
fn is_hidden(char: char) -> bool {
    char.is_control()
        || matches!(char, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// Names that some systems open as a device wherever they stand.
fn is_device(part: &str) -> bool {
    let stem = part.split('.').next().unwrap_or_default().trim_end();
    let is = |name: &str| stem.eq_ignore_ascii_case(name);
    let numbered = |kind: &str| {
        stem.len() == kind.len() + 1
            && stem.is_char_boundary(kind.len())
            && stem[..kind.len()].eq_ignore_ascii_case(kind)
            && stem.ends_with(|last: char| last.is_ascii_digit() && last != '0')
    };
    ["con", "prn", "aux", "nul"].into_iter().any(is) || numbered("com") || numbered("lpt")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_ways_down_pass() {
        for good in
            ["model.onnx", "samples/a.json", "a b", ".hidden", "ä", "console", "com", "a/b/c"]
        {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        let long = "x".repeat(256);
        let longer = vec!["y".repeat(200); 6].join("/");
        let deep = ["d"; 9].join("/");
        let bad = [
            "",
            "/",
            "/etc/passwd",
            "..",
            "../x",
            "a/../b",
            "a/./b",
            "a//b",
            "a/",
            "a\0b",
            "a\nb",
            "a\u{7f}",
            "a\\b",
            "c:\\x",
            "C:x",
            "nul",
            "NUL.onnx",
            "a/Con",
            "com1.bin",
            "LPT9",
            "a\u{202e}b",
            "\u{feff}a",
            long.as_str(),
            longer.as_str(),
            deep.as_str(),
        ];
        for bad in bad {
            assert!(check(bad).is_err(), "{bad:?}");
        }
        let shown = check("\x1b[2Jx").unwrap_err().to_string();
        assert!(!shown.contains('\x1b'), "{shown:?}");
    }
}
