//! Tags of resources: `If-Match` on changes, `If-None-Match` on reads (RFC 9110, section 13).
//!
//! The director compares one strong tag with the revision that it is about to replace, in the same
//! transaction; here only the header's forms are resolved to that one tag.

use http::header::{IF_MATCH, IF_NONE_MATCH};
use http::{HeaderMap, HeaderName};
use sha2::{Digest as _, Sha256};

use super::problem::{INVALID, Problem, STALE};

/// Tags that one header may list.
const TAGS_MAX: usize = 32;

/// One tag of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Tag {
    weak: bool,
    /// With its quotes.
    text: String,
}

/// What `If-Match` or `If-None-Match` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Condition {
    /// `*`
    Any,
    Tags(Tags),
}

/// One tag or more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tags(Vec<Tag>);

impl Condition {
    /// What a change is bound to; `None` when the header was not sent.
    ///
    /// # Errors
    /// `invalid` for one that is no list of tags, or with `If-None-Match`, which no change heeds.
    pub(super) fn of_change(headers: &HeaderMap) -> Result<Option<Self>, Problem> {
        if headers.contains_key(IF_NONE_MATCH) {
            let detail = "If-None-Match: changes heed If-Match only";
            return Err(Problem::invalid(vec![detail.to_owned()]));
        }
        Self::read(headers, &IF_MATCH)
    }

    /// Whether what the caller has is what there is.
    pub(super) fn not_modified(headers: &HeaderMap, current: &str) -> bool {
        match Self::read(headers, &IF_NONE_MATCH) {
            Ok(Some(Self::Any)) => true,
            // The weak comparison: for reads equal is equal enough.
            Ok(Some(Self::Tags(tags))) => tags.0.iter().any(|tag| tag.text == current),
            // A read is harmless: what cannot be read is as if it was not sent.
            Ok(None) | Err(_) => false,
        }
    }

    fn read(headers: &HeaderMap, name: &HeaderName) -> Result<Option<Self>, Problem> {
        let mut all = Vec::new();
        for value in headers.get_all(name) {
            let text = value.to_str().map_err(|_| malformed(name))?.trim();
            if text == "*" {
                return Ok(Some(Self::Any));
            }
            read_tags(text, &mut all).ok_or_else(|| malformed(name))?;
        }
        if !headers.contains_key(name) {
            return Ok(None);
        }
        match all.is_empty() {
            true => Err(malformed(name)),
            false => Ok(Some(Self::Tags(Tags(all)))),
        }
    }

    /// The one tag that the director is to find, of all that would do. `current` is asked for only
    /// where there is a choice.
    ///
    /// # Errors
    /// `stale` when none of them is the present one; a weak tag never is.
    pub(super) fn wanted(
        &self,
        current: impl FnOnce() -> Option<String>,
    ) -> Result<Option<String>, Problem> {
        let Self::Tags(Tags(tags)) = self else { return Ok(None) };
        if let [Tag { weak: false, text }] = &tags[..] {
            return Ok(Some(text.clone()));
        }
        // Without one the resource is not there, and the director says so.
        let Some(current) = current() else { return Ok(None) };
        if tags.iter().any(|tag| !tag.weak && tag.text == current) {
            return Ok(Some(current));
        }
        let sent = if tags.iter().all(|tag| tag.weak) {
            "only weak tags, which never match"
        } else {
            "another tag"
        };
        Err(STALE.because(format!("the resource is at {current} now, If-Match has {sent}")))
    }
}

fn malformed(name: &HeaderName) -> Problem {
    let expected = "expected '*' or up to 32 tags like \"7\", separated by commas";
    let mut problem = INVALID.because(format!("{name}: {expected}"));
    problem.problems = vec![problem.detail.clone()];
    problem
}

/// `"1", W/"2"`; empty elements are allowed, as lists of headers have them.
fn read_tags(text: &str, into: &mut Vec<Tag>) -> Option<()> {
    let mut rest = text;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        if rest.is_empty() {
            return Some(());
        }
        let weak = rest.starts_with("W/");
        let opaque = if weak { &rest[2..] } else { rest };
        let inner = opaque.strip_prefix('"')?;
        let end = inner.find('"')?;
        // Visible characters; the quote ends it.
        if inner[..end].bytes().any(|byte| !byte.is_ascii_graphic()) || into.len() == TAGS_MAX {
            return None;
        }
        into.push(Tag { weak, text: opaque[..end + 2].to_owned() });
        rest = inner[end + 1..].trim_start_matches([' ', '\t']);
        if !rest.is_empty() && !rest.starts_with(',') {
            return None;
        }
    }
}

/// The tag of a view that has no revision of its own: of its bytes.
pub(super) fn of_bytes(bytes: &[u8]) -> String {
    let digits: String =
        Sha256::digest(bytes)[..12].iter().map(|byte| format!("{byte:02x}")).collect();
    format!("\"{digits}\"")
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn headers(name: HeaderName, values: &[&str]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(&name, HeaderValue::from_str(value).unwrap());
        }
        headers
    }

    #[test]
    fn if_match_resolves_to_the_one_tag_that_must_be_found() {
        let present = "\"7\"";
        type Case = (&'static [&'static str], Result<Option<&'static str>, &'static str>);
        let cases: &[Case] = &[
            (&["*"], Ok(None)),
            (&["\"7\""], Ok(Some("\"7\""))),
            // The director says that it is stale, in its transaction.
            (&["\"6\""], Ok(Some("\"6\""))),
            (&["\"6\", \"7\""], Ok(Some("\"7\""))),
            (&["\"6\"", "\"7\""], Ok(Some("\"7\""))),
            (&[", \"6\",,\"7\" ,"], Ok(Some("\"7\""))),
            (&["\"5\", \"6\""], Err("stale")),
            (&["W/\"7\""], Err("stale")),
            (&["W/\"7\", \"6\""], Err("stale")),
            (&["W/\"7\", \"7\""], Ok(Some("\"7\""))),
            (&["\"\""], Ok(Some("\"\""))),
            (&["\"a,b\""], Ok(Some("\"a,b\""))),
            (&["7"], Err("invalid")),
            (&["\"7"], Err("invalid")),
            (&["\"7\" \"8\""], Err("invalid")),
            (&["w/\"7\""], Err("invalid")),
            (&[""], Err("invalid")),
            (&["\"a b\""], Err("invalid")),
        ];
        for (sent, want) in cases {
            let got = Condition::of_change(&headers(IF_MATCH, sent))
                .and_then(|condition| condition.unwrap().wanted(|| Some(present.to_owned())));
            let got = got.map_err(|problem| problem.kind.code);
            assert_eq!(got.as_ref().map(Option::as_deref).map_err(|code| *code), *want, "{sent:?}");
        }
        assert_eq!(Condition::of_change(&HeaderMap::new()), Ok(None));
        let many = vec!["\"1\""; TAGS_MAX + 1].join(",");
        assert!(Condition::of_change(&headers(IF_MATCH, &[&many])).is_err());
    }

    #[test]
    fn a_change_does_not_ignore_a_condition_that_it_cannot_keep() {
        assert!(Condition::of_change(&headers(IF_NONE_MATCH, &["*"])).is_err());
    }

    #[test]
    fn a_read_of_what_the_caller_has_is_not_modified() {
        for (sent, want) in
            [("\"7\"", true), ("W/\"7\"", true), ("*", true), ("\"6\"", false), ("7", false)]
        {
            let headers = headers(IF_NONE_MATCH, &[sent]);
            assert_eq!(Condition::not_modified(&headers, "\"7\""), want, "{sent}");
        }
        assert!(!Condition::not_modified(&HeaderMap::new(), "\"7\""));
    }

    #[test]
    fn bytes_have_a_tag_that_changes_with_them() {
        assert_eq!(of_bytes(b"a"), of_bytes(b"a"));
        assert_ne!(of_bytes(b"a"), of_bytes(b"b"));
        assert_eq!(of_bytes(b"a").len(), 26);
    }
}
