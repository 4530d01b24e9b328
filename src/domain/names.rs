//! Names that cross a boundary, checked once.

use std::fmt;
use std::marker::PhantomData;
use std::str::FromStr;
use std::sync::Arc;

use serde::de::{self, Deserialize, Deserializer};
use serde::{Serialize, Serializer};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, OneOfBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// Longest model name or label, in bytes.
const NAME_LEN_MAX: usize = 128;
/// Longest version that the pattern takes: all of that length can be held.
const VERSION_LEN_MAX: usize = 19;
/// Of versions, in schemas.
pub(super) const VERSION_PATTERN: &str = "^[1-9][0-9]{0,18}$";

/// Name of a served model, as it stands in URLs, metric labels and folder names.
///
/// One to 128 bytes of `[A-Za-z0-9._-]` that start with a letter, digit or `_`: always one path
/// segment, never `..`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ModelName(Arc<str>);

/// Name of a version label (`stable`, `canary`, any): as a model name, and not only digits.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Label(Arc<str>);

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("name is empty")]
    Empty,
    #[error("name has {len} bytes, the limit is {NAME_LEN_MAX}")]
    TooLong { len: usize },
    #[error("name must start with a letter, a digit or '_'")]
    BadStart,
    #[error("name has a character other than letters, digits, '.', '_' and '-' at byte {at}")]
    BadByte { at: usize },
    #[error("version must be a positive integer or a label")]
    BadVersion,
}

fn checked(text: &str) -> Result<Arc<str>, NameError> {
    if text.len() > NAME_LEN_MAX {
        return Err(NameError::TooLong { len: text.len() });
    }
    let first = *text.as_bytes().first().ok_or(NameError::Empty)?;
    if !first.is_ascii_alphanumeric() && first != b'_' {
        return Err(NameError::BadStart);
    }
    match text.bytes().position(|b| !b.is_ascii_alphanumeric() && !b"._-".contains(&b)) {
        Some(at) => Err(NameError::BadByte { at }),
        None => Ok(text.into()),
    }
}

impl FromStr for ModelName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        checked(text).map(Self)
    }
}

impl FromStr for Label {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(NameError::BadVersion);
        }
        checked(text).map(Self)
    }
}

macro_rules! text_name {
    ($name:ty, $pattern:literal) => {
        impl $name {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
        impl std::borrow::Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(&self.0)
            }
        }
        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
            }
        }
        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                text_schema($pattern, NAME_LEN_MAX)
            }
        }
        impl ToSchema for $name {}
    };
}
text_name!(ModelName, "^[A-Za-z0-9_][A-Za-z0-9._-]*$");
text_name!(Label, "^([0-9]*[A-Za-z_][A-Za-z0-9._-]*|[0-9]+[._-][A-Za-z0-9._-]*)$");

/// Number of a model version; positive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Version(u64);

impl Version {
    pub fn new(number: u64) -> Option<Self> {
        (number > 0).then_some(Self(number))
    }

    pub fn get(self) -> u64 {
        self.0
    }
}

impl FromStr for Version {
    type Err = NameError;

    /// Plain decimal digits without a leading zero, so that a folder name has one reading.
    fn from_str(text: &str) -> Result<Self, NameError> {
        let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && !text.starts_with('0');
        let number = plain.then(|| text.parse().ok()).flatten();
        number.and_then(Self::new).ok_or(NameError::BadVersion)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Written as decimal text, which is what a key of an object has to be; a plain number is read too.
impl Serialize for Version {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrNumber(PhantomData))
    }
}

impl PartialSchema for Version {
    fn schema() -> RefOr<Schema> {
        or_number(text_schema(VERSION_PATTERN, VERSION_LEN_MAX))
    }
}

impl ToSchema for Version {}

/// What a caller may put where a version goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VersionRef {
    Number(Version),
    Label(Label),
}

impl VersionRef {
    /// `None` for an empty text, which leaves the choice to the traffic table.
    pub fn parse(text: &str) -> Result<Option<Self>, NameError> {
        if text.is_empty() {
            return Ok(None);
        }
        match text.parse() {
            Ok(version) => Ok(Some(Self::Number(version))),
            Err(_) => text.parse().map(|label| Some(Self::Label(label))),
        }
    }
}

impl fmt::Display for VersionRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Number(version) => version.fmt(f),
            Self::Label(label) => label.fmt(f),
        }
    }
}

impl FromStr for VersionRef {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)?.ok_or(NameError::Empty)
    }
}

/// Written as text; of a version a plain number is read too.
impl Serialize for VersionRef {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for VersionRef {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextOrNumber(PhantomData))
    }
}

impl PartialSchema for VersionRef {
    fn schema() -> RefOr<Schema> {
        const PATTERN: &str = "^([1-9][0-9]{0,18}|[0-9]*[A-Za-z_][A-Za-z0-9._-]*\
                               |[0-9]+[._-][A-Za-z0-9._-]*)$";
        or_number(text_schema(PATTERN, NAME_LEN_MAX))
    }
}

impl ToSchema for VersionRef {}

impl From<Version> for VersionRef {
    fn from(version: Version) -> Self {
        Self::Number(version)
    }
}

/// Reads a text, or a number as if it were its text.
struct TextOrNumber<T>(PhantomData<T>);

impl<T: FromStr<Err = NameError>> de::Visitor<'_> for TextOrNumber<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a version")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        self.visit_str(&number.to_string())
    }
}

fn or_number(text: RefOr<Schema>) -> RefOr<Schema> {
    let number = ObjectBuilder::new().schema_type(Type::Integer).minimum(Some(1));
    OneOfBuilder::new().item(text).item(number).into()
}

fn text_schema(pattern: &str, len_max: usize) -> RefOr<Schema> {
    let text = ObjectBuilder::new().schema_type(Type::String);
    text.pattern(Some(pattern)).min_length(Some(1)).max_length(Some(len_max)).into()
}

/// SHA-256 of a model artifact; shown as `sha256:<hex>`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Digest([u8; 32]);

impl Digest {
    pub fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    pub fn hex(&self) -> String {
        self.hex_digits().iter().copied().map(char::from).collect()
    }

    /// Every answer carries it, so it is written without the formatter and without an allocation.
    fn hex_digits(&self) -> [u8; 64] {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let mut digits = [0; 64];
        for (pair, byte) in digits.chunks_exact_mut(2).zip(self.0) {
            pair[0] = DIGITS[usize::from(byte >> 4)];
            pair[1] = DIGITS[usize::from(byte & 15)];
        }
        digits
    }

    /// From 64 hexadecimal digits, with or without the `sha256:` prefix.
    pub fn parse(text: &str) -> Option<Self> {
        let hex = text.strip_prefix("sha256:").unwrap_or(text);
        if hex.len() != 64 || !hex.is_ascii() {
            return None;
        }
        let mut bytes = [0; 32];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&hex[2 * at..2 * at + 2], 16).ok()?;
        }
        Some(Self(bytes))
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("sha256:")?;
        f.write_str(std::str::from_utf8(&self.hex_digits()).map_err(|_| fmt::Error)?)
    }
}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::parse(&text)
            .ok_or_else(|| de::Error::custom("expected 'sha256:' and 64 hexadecimal digits"))
    }
}

impl PartialSchema for Digest {
    fn schema() -> RefOr<Schema> {
        text_schema("^sha256:[0-9a-f]{64}$", 71)
    }
}

impl ToSchema for Digest {}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_one_path_segment() {
        for good in ["iris", "a", "0", "_x", "My.Model-2_b"] {
            assert!(good.parse::<ModelName>().is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "-a", "a/b", "a\0", "é", &"x".repeat(129)] {
            assert!(bad.parse::<ModelName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_version_has_one_reading() {
        assert_eq!("7".parse::<Version>().unwrap().get(), 7);
        for bad in ["", "0", "07", "+7", "7 ", "-1", "18446744073709551616"] {
            assert!(bad.parse::<Version>().is_err(), "{bad}");
        }
        assert_eq!(VersionRef::parse("").unwrap(), None);
        assert!(matches!(VersionRef::parse("stable"), Ok(Some(VersionRef::Label(_)))));
        assert!(VersionRef::parse("00").is_err());
    }

    #[test]
    fn names_are_json_texts() {
        use serde_json::{from_value, json, to_value};
        let version = Version::new(7).unwrap();
        assert_eq!(to_value(version).unwrap(), json!("7"));
        for good in [json!("7"), json!(7)] {
            assert_eq!(from_value::<Version>(good.clone()).unwrap(), version);
            assert_eq!(from_value::<VersionRef>(good).unwrap(), VersionRef::Number(version));
        }
        for bad in [json!("07"), json!(0), json!(-7), json!(7.5), json!(""), json!(null)] {
            assert!(from_value::<Version>(bad.clone()).is_err(), "{bad}");
            assert!(from_value::<VersionRef>(bad.clone()).is_err(), "{bad}");
        }
        let label: VersionRef = from_value(json!("next-best")).unwrap();
        assert_eq!(to_value(&label).unwrap(), json!("next-best"));
        assert!(from_value::<Label>(json!("12")).is_err());
        assert!(from_value::<ModelName>(json!("../x")).is_err());
        let digest = Digest::new([0xab; 32]);
        assert_eq!(from_value::<Digest>(to_value(digest).unwrap()).unwrap(), digest);
        assert!(from_value::<Digest>(json!("sha256:12")).is_err());
    }

    #[test]
    fn versions_are_keys_of_json_objects() {
        let table = std::collections::BTreeMap::from([(Version::new(3).unwrap(), 1.5)]);
        let text = serde_json::to_string(&table).unwrap();
        assert_eq!(text, r#"{"3":1.5}"#);
        assert_eq!(
            serde_json::from_str::<std::collections::BTreeMap<Version, f64>>(&text).unwrap(),
            table
        );
    }
}
