//! What `repository.path` may be: a folder, a bucket, a registry.
//!
//! Invariant: a location holds no credential, and nothing that is not understood is passed over.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use url::Url;

use super::names;
use crate::bucket::{Bucket, Provider};
use crate::domain::ModelName;

/// Most models that an MLflow URL may name.
const NAMED_MAX: usize = 1_000;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    Folder(PathBuf),
    Objects(Bucket),
    Mlflow(Tracking),
}

/// `mlflow+https://host:port/path?models=a,b`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracking {
    /// Without query; the path ends with a slash.
    pub base: Url,
    /// Empty: every registered model.
    pub models: BTreeSet<ModelName>,
}

/// The text is not repeated: a URL may hold a password that should not be there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LocationError {
    #[error(
        "expected a folder or a URL that starts with s3://, gs://, az://, mlflow+http://, \
         mlflow+https:// or file:///"
    )]
    Scheme,
    #[error("a URL must not hold a user or a password; give them by reference")]
    Credentials,
    #[error("expected a bucket's name of 3 to 63 letters, digits, '.', '_' and '-'")]
    Bucket,
    #[error("the prefix is wrong: {0}")]
    Prefix(String),
    #[error("is no URL: {0}")]
    Url(url::ParseError),
    #[error("expected a host")]
    Host,
    #[error("'{0}' means nothing here; the only parameter is models=a,b")]
    Parameter(String),
    #[error("models: {0}")]
    Models(String),
}

impl FromStr for Location {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(Self::Folder(PathBuf::from(text)));
        };
        match scheme.to_ascii_lowercase().as_str() {
            "s3" => Bucket::parse(Provider::S3, rest).map(Self::Objects),
            "gs" => Bucket::parse(Provider::Gcs, rest).map(Self::Objects),
            "az" => Bucket::parse(Provider::Azure, rest).map(Self::Objects),
            "mlflow+http" => Tracking::parse("http", rest).map(Self::Mlflow),
            "mlflow+https" => Tracking::parse("https", rest).map(Self::Mlflow),
            "file" if rest.starts_with('/') => Ok(Self::Folder(PathBuf::from(rest))),
            _ => Err(LocationError::Scheme),
        }
    }
}

impl FromStr for Bucket {
    type Err = LocationError;

    fn from_str(text: &str) -> Result<Self, LocationError> {
        match text.parse()? {
            Location::Objects(bucket) => Ok(bucket),
            _ => Err(LocationError::Scheme),
        }
    }
}

impl Bucket {
    fn parse(provider: Provider, rest: &str) -> Result<Self, LocationError> {
        let (name, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        if name.contains('@') {
            return Err(LocationError::Credentials);
        }
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
        let bytes = name.as_bytes();
        let fits = (3..=63).contains(&bytes.len()) && bytes.iter().copied().all(plain);
        if !fits || !ends(bytes.first()) || !ends(bytes.last()) || name.contains("..") {
            return Err(LocationError::Bucket);
        }
        let prefix = prefix.trim_end_matches('/');
        if !prefix.is_empty() {
            names::check(prefix).map_err(|error| LocationError::Prefix(error.to_string()))?;
        }
        if prefix.contains(['?', '#', '%']) {
            let why = "it has a '?', '#' or '%', which are not decoded here";
            return Err(LocationError::Prefix(why.to_owned()));
        }
        Ok(Self { provider, name: name.to_owned(), prefix: prefix.to_owned() })
    }

    /// Whether `other` is this bucket's prefix or something beneath it.
    pub fn contains(&self, other: &Self) -> bool {
        let beneath = match other.prefix.strip_prefix(self.prefix.as_str()) {
            Some(rest) => self.prefix.is_empty() || rest.is_empty() || rest.starts_with('/'),
            None => false,
        };
        self.provider == other.provider && self.name == other.name && beneath
    }
}

impl Tracking {
    fn parse(scheme: &str, rest: &str) -> Result<Self, LocationError> {
        // Slashes too many are passed over by the library.
        if rest.starts_with(['/', '\\']) {
            return Err(LocationError::Host);
        }
        let mut base = Url::parse(&format!("{scheme}://{rest}")).map_err(LocationError::Url)?;
        if !base.username().is_empty() || base.password().is_some() {
            return Err(LocationError::Credentials);
        }
        if base.host_str().is_none_or(str::is_empty) {
            return Err(LocationError::Host);
        }
        if let Some(fragment) = base.fragment() {
            return Err(LocationError::Parameter(format!("#{fragment}")));
        }
        let mut models = BTreeSet::new();
        for (key, value) in base.query_pairs() {
            if key != "models" {
                return Err(LocationError::Parameter(key.chars().take(64).collect()));
            }
            for name in value.split(',').filter(|name| !name.is_empty()) {
                let parsed = name.parse::<ModelName>();
                models.insert(parsed.map_err(|error| LocationError::Models(error.to_string()))?);
            }
        }
        if models.len() > NAMED_MAX {
            let got = models.len();
            return Err(LocationError::Models(format!("{got} names, the limit is {NAMED_MAX}")));
        }
        base.set_query(None);
        if !base.path().ends_with('/') {
            let path = format!("{}/", base.path());
            base.set_path(&path);
        }
        Ok(Self { base, models })
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(path) => path.display().fmt(f),
            Self::Objects(bucket) => bucket.fmt(f),
            Self::Mlflow(tracking) => tracking.fmt(f),
        }
    }
}

impl fmt::Display for Tracking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "mlflow+{}", self.base)?;
        for (at, model) in self.models.iter().enumerate() {
            write!(f, "{}{model}", if at == 0 { "?models=" } else { "," })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_have_one_reading() {
        let cases = [
            ("models", "models"),
            ("/srv/models", "/srv/models"),
            ("file:///srv/models", "/srv/models"),
            ("s3://bucket", "s3://bucket"),
            ("S3://bucket/", "s3://bucket"),
            ("s3://bucket/a/b/", "s3://bucket/a/b"),
            ("gs://my_bucket/m", "gs://my_bucket/m"),
            ("az://container/m", "az://container/m"),
            ("mlflow+http://127.0.0.1:5000", "mlflow+http://127.0.0.1:5000/"),
            ("mlflow+https://ml.example.com/x", "mlflow+https://ml.example.com/x/"),
            ("mlflow+https://h/?models=b,a", "mlflow+https://h/?models=a,b"),
        ];
        for (text, want) in cases {
            let location: Location = text.parse().unwrap();
            assert_eq!(location.to_string(), want, "{text}");
            assert_eq!(location.to_string().parse::<Location>().unwrap(), location, "{text}");
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_and_not_repeated() {
        for bad in [
            "gopher://h/x",
            "http://h/",
            "https://h",
            "ftp://h",
            "file://host/x",
            "file:://",
            "s3://",
            "s3://a",
            "s3://user:hunter2@bucket",
            "s3://bu cket",
            "s3://../x",
            "s3://bucket/../x",
            "s3://bucket//x",
            "s3://bucket/a%2e",
            "s3://bucket/a?x=1",
            "mlflow+http://",
            "mlflow+http:///x",
            "mlflow+http://u:hunter2@h/",
            "mlflow+http://hunter2@h/",
            "mlflow+ftp://h",
            "mlflow+http://h/?model=a",
            "mlflow+http://h/?models=a b",
            "mlflow+http://h/#x",
            "mlflow+http://h:99999/",
        ] {
            let error = bad.parse::<Location>().unwrap_err().to_string();
            assert!(!error.contains("hunter2"), "{bad}: {error}");
        }
    }

    #[test]
    fn a_prefix_holds_what_lies_beneath_it() {
        let bucket = |text: &str| text.parse::<Bucket>().unwrap();
        assert!(bucket("s3://b-1/a").contains(&bucket("s3://b-1/a/b")));
        assert!(bucket("s3://b-1/a").contains(&bucket("s3://b-1/a")));
        assert!(bucket("s3://b-1").contains(&bucket("s3://b-1/a")));
        for (outer, inner) in [
            ("s3://b-1/a", "s3://b-1/ab"),
            ("s3://b-1/a", "s3://b-1"),
            ("s3://b-1", "gs://b-1"),
            ("s3://b-1", "s3://b-2"),
        ] {
            assert!(!bucket(outer).contains(&bucket(inner)), "{outer} {inner}");
        }
        assert!("models".parse::<Bucket>().is_err());
    }
}
