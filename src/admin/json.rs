//! JSON bodies of changes, read strictly: objects only, each key once, known keys only, and every
//! complaint with its path.
//!
//! Invariants:
//! - Nothing is nested deeper than [`DEPTH_MAX`]; what is skipped counts too.
//! - A key given twice is refused, wherever it stands: two readers would see two bodies.
//! - `reason` belongs to every change, and never to the resource.

use std::error::Error as _;
use std::fmt;

use serde::de::{
    DeserializeOwned, DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor,
};
use serde_json::{Map, Value};

use super::problem::Problem;
use crate::control::call::REASON_LEN_MAX;

/// Deepest nesting of lists and objects.
pub(super) const DEPTH_MAX: usize = 100;

/// Most characters of a key or a reason that an error shows.
const SHOWN_MAX: usize = 40;

/// The body of a change: the resource, and why.
pub(super) fn read<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, Option<String>), Problem> {
    let mut members = object(bytes)?;
    let reason = match members.remove("reason") {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => reason(&text)?,
        Some(_) => return Err(invalid("reason: expected a string")),
    };
    Ok((typed(&Value::Object(members))?, reason))
}

/// A reason as it is kept: `None` when it says nothing.
pub(super) fn reason(text: &str) -> Result<Option<String>, Problem> {
    let text = text.trim();
    if text.len() > REASON_LEN_MAX {
        let len = text.len();
        return Err(invalid(format!("reason: has {len} bytes, the limit is {REASON_LEN_MAX}")));
    }
    Ok((!text.is_empty()).then(|| text.to_owned()))
}

/// An empty body is an object without members: what is missing is then said by name.
fn object(bytes: &[u8]) -> Result<Map<String, Value>, Problem> {
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Ok(Map::new());
    }
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = Strict { depth: DEPTH_MAX }.deserialize(&mut reader);
    let value = value.and_then(|value| reader.end().map(|()| value));
    match value {
        Ok(Value::Object(members)) => Ok(members),
        Ok(_) => Err(invalid("body: expected an object")),
        Err(error) => Err(invalid(format!("body: {error}"))),
    }
}

/// Reads `T` and says where it failed: `rules[0].version: …`.
fn typed<T: DeserializeOwned>(value: &Value) -> Result<T, Problem> {
    // axum reads with the path at hand; a text of ours is never read by its users.
    let text = serde_json::to_vec(value).map_err(|error| invalid(format!("body: {error}")))?;
    axum::Json::<T>::from_bytes(&text).map(|axum::Json(read)| read).map_err(|rejection| {
        let inner = rejection.source().map(ToString::to_string);
        invalid(without_place(&inner.unwrap_or_else(|| rejection.to_string())))
    })
}

/// Drops ` at line 1 column 9`: of the text between, not of the caller's.
fn without_place(message: &str) -> &str {
    match message.rfind(" at line ") {
        Some(at) => &message[..at],
        None => message,
    }
}

fn invalid(problem: impl Into<String>) -> Problem {
    Problem::invalid(vec![problem.into()])
}

/// Any value with `depth` levels below it at most.
#[derive(Clone, Copy)]
struct Strict {
    depth: usize,
}

impl Strict {
    fn below<E: Error>(self) -> Result<Self, E> {
        match self.depth.checked_sub(1) {
            Some(depth) => Ok(Self { depth }),
            None => Err(E::custom(format_args!("nested deeper than {DEPTH_MAX} levels"))),
        }
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Value, A::Error> {
        let below = self.below()?;
        let mut all = Vec::new();
        while let Some(value) = list.next_element_seed(below)? {
            all.push(value);
        }
        Ok(Value::Array(all))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let below = self.below()?;
        let mut all = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if all.contains_key(&key) {
                let shown: String = key.chars().take(SHOWN_MAX).collect();
                return Err(A::Error::custom(format_args!("duplicate key '{shown}'")));
            }
            let value = map.next_value_seed(below)?;
            all.insert(key, value);
        }
        Ok(Value::Object(all))
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Plan {
        steps: Vec<Step>,
        #[serde(default)]
        name: Option<String>,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Step {
        weight: f64,
    }

    fn problems(body: &str) -> String {
        read::<Plan>(body.as_bytes()).map(|_| ()).unwrap_err().problems.join("; ")
    }

    #[test]
    fn the_reason_is_taken_out_of_any_body() {
        let (plan, reason) =
            read::<Plan>(br#"{"steps": [{"weight": 0.1}], "reason": " why "}"#).unwrap();
        assert_eq!((plan.steps[0].weight, reason.as_deref()), (0.1, Some("why")));
        assert!(plan.name.is_none());
        for none in [
            r#"{"steps": []}"#,
            r#"{"steps": [], "reason": null}"#,
            r#"{"steps": [], "reason": "  "}"#,
        ] {
            assert_eq!(read::<Plan>(none.as_bytes()).unwrap().1, None, "{none}");
        }
        assert!(problems(r#"{"steps": [], "reason": 1}"#).starts_with("reason: "));
        let long = format!(r#"{{"steps": [], "reason": "{}"}}"#, "x".repeat(REASON_LEN_MAX + 1));
        assert!(problems(&long).starts_with("reason: has 2001 bytes"));
    }

    #[test]
    fn complaints_have_their_path() {
        let cases = [
            (r#"{"steps": [{"weight": 1}, {"weight": "x"}]}"#, "steps[1].weight: "),
            (r#"{"steps": [{"weight": 1, "wieght": 1}]}"#, "steps[0].wieght: unknown field"),
            (r#"{"stpes": []}"#, "stpes: unknown field"),
            ("{}", "missing field `steps`"),
            ("", "missing field `steps`"),
        ];
        for (body, want) in cases {
            let got = problems(body);
            assert!(got.starts_with(want) && !got.contains("column"), "{body}: {got}");
        }
    }

    #[test]
    fn what_has_two_readings_or_no_end_is_refused() {
        let deep =
            |levels: usize| format!("{{\"name\": {}{}}}", "[".repeat(levels), "]".repeat(levels));
        let cases = [
            (r#"{"steps": [], "steps": []}"#.to_owned(), "duplicate key 'steps'"),
            (r#"{"steps": [{"weight": 1, "weight": 2}]}"#.to_owned(), "duplicate key 'weight'"),
            (r#"{"steps": [], "st\u0065ps": []}"#.to_owned(), "duplicate key 'steps'"),
            (deep(DEPTH_MAX), "nested deeper than 100 levels"),
            (deep(50_000), "nested deeper than 100 levels"),
            (r#"{"steps": []} {}"#.to_owned(), "trailing"),
            ("[]".to_owned(), "expected an object"),
            ("7".to_owned(), "expected an object"),
            ("{\"steps\": [}".to_owned(), "line 1"),
            ("\u{feff}{}".to_owned(), "line 1"),
        ];
        for (body, want) in cases {
            let got = problems(&body);
            assert!(got.starts_with("body: ") && got.contains(want), "{got}");
        }
        assert!(
            problems(&deep(DEPTH_MAX - 1)).starts_with("name: "),
            "the limit itself is allowed"
        );
    }
}
