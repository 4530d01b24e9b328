//! Where a version's files lie: behind the server, or in a bucket that it names.
//!
//! Invariants:
//! - An address that the server names is read only when it is the server's own, or lies in a bucket
//!   that the configuration allows for that: our credentials are not its to use.
//! - The list of files has a largest number and depth, and each name is one part of a path.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::stream::BoxStream;
use futures_util::{StreamExt, TryStreamExt};
use http::StatusCode;
use http::header::{CONTENT_RANGE, HeaderValue};
use object_store::path::Path as Key;
use object_store::{ObjectMeta, ObjectStore};
use percent_encoding::percent_decode_str;
use url::Url;

use super::super::download::{Parts, Ranges, again};
use super::super::net;
use super::super::store::{self, ObjectFile};
use super::super::{FILES_MAX, SourceError, names};
use super::api::{ARTIFACTS, Api, entity_tag};
use crate::bucket::{self, Bucket};

/// Parts of a path on the server, above the artifact.
const ROOT_DEPTH_MAX: usize = 32;

/// An artifact's folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// Behind the server, by the parts of its path.
    Proxied(Vec<String>),
    Direct(Bucket),
}

/// One file of an artifact.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Artifact {
    pub(super) size: u64,
    pub(super) tag: Option<String>,
    object: Option<ObjectMeta>,
}

impl Place {
    /// Reads an address that the server `base` names.
    pub(super) fn parse(uri: &str, base: &Url, allowed: &[Bucket]) -> Result<Self, SourceError> {
        let shown = bucket::detail(uri);
        let unsupported =
            |why: &str| SourceError::Unsupported(format!("the artifact lies at {shown}, {why}"));
        if let Ok(bucket) = uri.parse::<Bucket>() {
            return match allowed.iter().any(|known| known.contains(&bucket)) {
                true => Ok(Self::Direct(bucket)),
                false => Err(unsupported("which repository.mlflow_artifacts does not name")),
            };
        }
        let url = Url::parse(uri).map_err(|_| unsupported("which is no address"))?;
        if url.scheme() != "mlflow-artifacts" {
            let why = "which only the server itself can read; let it serve artifacts";
            return Err(unsupported(why));
        }
        // Resolved while the address is read, so that it would not be seen in the parts.
        if uri.contains("..") || uri.to_ascii_lowercase().contains("%2e") {
            return Err(unsupported("which leaves its folder"));
        }
        let elsewhere = url.host_str().is_some_and(|host| {
            let same = base.host_str().is_some_and(|own| own.eq_ignore_ascii_case(host));
            !same || url.port().is_some_and(|port| Some(port) != base.port_or_known_default())
        });
        let plain = url.username().is_empty() && url.password().is_none();
        if elsewhere || !plain || url.query().is_some() || url.fragment().is_some() {
            return Err(unsupported("which is not on the server"));
        }
        let mut parts = Vec::new();
        for part in url.path().split('/').filter(|part| !part.is_empty()) {
            let part = percent_decode_str(part).decode_utf8();
            let part = part.map_err(|_| unsupported("which is no path"))?.into_owned();
            names::check_part(&part)?;
            parts.push(part);
        }
        if parts.is_empty() || parts.len() > ROOT_DEPTH_MAX {
            return Err(unsupported("which is no path"));
        }
        Ok(Self::Proxied(parts))
    }
}

/// Files of an artifact by path.
pub(super) type Artifacts = BTreeMap<String, Artifact>;

/// Lists what lies behind the server.
pub(super) async fn list_proxied(api: &Api, root: &[String]) -> Result<Artifacts, SourceError> {
    let (mut files, mut folders) = (BTreeMap::new(), vec![String::new()]);
    let root = root.join("/");
    let mut entries = 0;
    while let Some(folder) = folders.pop() {
        let path = match folder.as_str() {
            "" => root.clone(),
            folder => format!("{root}/{folder}"),
        };
        for found in api.artifacts(&path).await? {
            entries += 1;
            if entries > FILES_MAX {
                let what = "the artifact has more files than fit".to_owned();
                return Err(SourceError::Limit { what, limit: FILES_MAX as u64 });
            }
            names::check_part(&found.path)?;
            let path = match folder.as_str() {
                "" => found.path,
                folder => format!("{folder}/{}", found.path),
            };
            names::check(&path)?;
            if found.is_dir {
                folders.push(path);
                continue;
            }
            let size = found.file_size.parse().map_err(|_| SourceError::Answer {
                what: path.clone(),
                reason: "expected a size".to_owned(),
            })?;
            files.insert(path, Artifact { size, tag: None, object: None });
        }
    }
    Ok(files)
}

/// Lists what lies in a bucket.
pub(super) async fn list_direct(
    store: &Arc<dyn ObjectStore>,
    bucket: &Bucket,
) -> Result<Artifacts, SourceError> {
    let wrong = |error: object_store::Error| store::failed(&bucket.to_string(), error);
    let prefix = Key::parse(&bucket.prefix).map_err(|error| wrong(error.into()))?;
    let mut listed = store.list(Some(&prefix));
    let mut files = BTreeMap::new();
    while let Some(object) = listed.next().await {
        let object = object.map_err(wrong)?;
        let below = object.location.as_ref().strip_prefix(bucket.prefix.as_str());
        let Some(path) = below.map(|below| below.trim_start_matches('/')) else { continue };
        if path.is_empty() {
            continue;
        }
        names::check(path)?;
        if files.len() >= FILES_MAX {
            let what = "the artifact has more files than fit".to_owned();
            return Err(SourceError::Limit { what, limit: FILES_MAX as u64 });
        }
        let (path, size, tag) = (path.to_owned(), object.size, object.e_tag.clone());
        files.insert(path, Artifact { size, tag, object: Some(object) });
    }
    Ok(files)
}

/// A file behind the server.
pub(super) struct ProxiedFile {
    pub(super) api: Arc<Api>,
    pub(super) url: Url,
    pub(super) path: String,
    pub(super) size: u64,
    /// What every part has to be of, when the server says it.
    pub(super) tag: Option<String>,
}

/// Address of a file behind the server.
pub(super) fn url_of(api: &Api, root: &[String], path: &str) -> Url {
    let parts: Vec<&str> = root.iter().map(String::as_str).chain(path.split('/')).collect();
    api.url(ARTIFACTS, &parts, &[])
}

/// A file of a bucket.
pub(super) fn direct_file(
    store: &Arc<dyn ObjectStore>,
    bucket: &Bucket,
    artifact: &Artifact,
) -> Option<ObjectFile> {
    let meta = artifact.object.clone()?;
    Some(ObjectFile { store: Arc::clone(store), meta, provider: bucket.provider })
}

/// The entity tag that a part of a file comes with; nothing when the server knows no ranges.
pub(super) async fn tag_of(api: &Api, url: &Url) -> Result<Option<String>, SourceError> {
    again(api.backoff(), || async {
        let response = api.get(url, Some(&HeaderValue::from_static("bytes=0-0"))).await?;
        Ok(entity_tag(&response).filter(|_| response.status() == StatusCode::PARTIAL_CONTENT))
    })
    .await
}

impl Ranges for ProxiedFile {
    fn what(&self) -> String {
        bucket::detail(&self.path)
    }

    fn open(&self, range: Range<u64>) -> BoxFuture<'_, Result<Parts, SourceError>> {
        Box::pin(async move {
            let what = self.what();
            let wrong = |reason: String| SourceError::Answer { what: what.clone(), reason };
            let header = format!("bytes={}-{}", range.start, range.end - 1);
            let header = HeaderValue::try_from(header).map_err(|error| wrong(error.to_string()))?;
            let response = self.api.get(&self.url, Some(&header)).await.map_err(|error| {
                match error {
                    // The file is shorter than it was listed.
                    SourceError::Status { status: 416, .. } => {
                        SourceError::Changed { what: what.clone() }
                    }
                    other => other,
                }
            })?;
            if let (Some(known), Some(tag)) = (&self.tag, entity_tag(&response))
                && *known != tag
            {
                return Err(SourceError::Changed { what });
            }
            if response.status() == StatusCode::PARTIAL_CONTENT {
                let value = response.headers().get(CONTENT_RANGE).and_then(|v| v.to_str().ok());
                let (start, end, size) = value
                    .and_then(content_range)
                    .ok_or_else(|| wrong("a part of it came without Content-Range".to_owned()))?;
                if size != self.size {
                    let listed = self.size;
                    return Err(wrong(format!("it has {size} bytes, listed were {listed}")));
                }
                if start != range.start || end != range.end {
                    let asked = format!("{}-{}", range.start, range.end);
                    return Err(wrong(format!("asked for {asked}, it sent {start}-{end}")));
                }
                let bytes = bytes_of(response, what);
                return Ok(Parts { bytes, end });
            }
            // The server knows no ranges: this is the whole file.
            if let Some(size) = response.content_length()
                && size != self.size
            {
                let listed = self.size;
                return Err(wrong(format!("it has {size} bytes, listed were {listed}")));
            }
            let bytes = skip(bytes_of(response, what), range.start);
            Ok(Parts { bytes, end: self.size })
        })
    }
}

fn bytes_of(
    response: reqwest::Response,
    what: String,
) -> BoxStream<'static, Result<Bytes, SourceError>> {
    response.bytes_stream().map_err(move |error| net::failed(&what, &error)).boxed()
}

/// Without the first `left` bytes, which are there already.
fn skip(
    bytes: BoxStream<'static, Result<Bytes, SourceError>>,
    mut left: u64,
) -> BoxStream<'static, Result<Bytes, SourceError>> {
    bytes
        .map_ok(move |mut chunk| {
            let over = usize::try_from(left).unwrap_or(usize::MAX).min(chunk.len());
            left -= over as u64;
            chunk.split_off(over)
        })
        .boxed()
}

/// `bytes 0-9/100`, as start, end behind the last, and size.
fn content_range(text: &str) -> Option<(u64, u64, u64)> {
    let (range, size) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, last) = range.split_once('-')?;
    Some((first.parse().ok()?, last.parse::<u64>().ok()?.checked_add(1)?, size.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_server_s_own_addresses_and_allowed_buckets_are_read() {
        let base: Url = "http://ml.example.com:5000/".parse().unwrap();
        let allowed: Vec<Bucket> = vec!["s3://models/prod".parse().unwrap()];
        let parse = |uri: &str| Place::parse(uri, &base, &allowed);
        let parts =
            |parts: &[&str]| Place::Proxied(parts.iter().map(|part| (*part).to_owned()).collect());
        for (uri, want) in [
            (
                "mlflow-artifacts:/0/models/m-1/artifacts",
                parts(&["0", "models", "m-1", "artifacts"]),
            ),
            ("mlflow-artifacts:///0/a%20b", parts(&["0", "a b"])),
            ("mlflow-artifacts://ml.example.com:5000/0/x", parts(&["0", "x"])),
            ("mlflow-artifacts://ML.example.com/0/x", parts(&["0", "x"])),
            ("s3://models/prod/1", Place::Direct("s3://models/prod/1".parse().unwrap())),
        ] {
            assert_eq!(parse(uri).unwrap(), want, "{uri}");
        }
        for bad in [
            "mlflow-artifacts://evil.test/0/x",
            "mlflow-artifacts://ml.example.com:5001/0/x",
            "mlflow-artifacts://u:p@ml.example.com:5000/x",
            "mlflow-artifacts:/",
            "mlflow-artifacts:",
            "mlflow-artifacts:/a/%2e%2e/b",
            "mlflow-artifacts:/a%2fb",
            "mlflow-artifacts:/a%00b",
            "mlflow-artifacts:/a?x=1",
            "s3://models/production",
            "s3://other/x",
            "gs://models/prod",
            "file:///etc/passwd",
            "/etc/passwd",
            "http://169.254.169.254/latest",
            "gopher://x/y",
            "dbfs:/x",
            "",
            "runs:/1/model",
            "models:/m-1",
        ] {
            assert!(parse(bad).is_err(), "{bad}: {:?}", parse(bad));
        }
    }

    #[test]
    fn content_ranges_are_read_strictly() {
        assert_eq!(content_range("bytes 0-9/100"), Some((0, 10, 100)));
        for bad in [
            "",
            "bytes 0-9/*",
            "bytes */100",
            "bytes 0-18446744073709551615/5",
            "0-9/100",
            "bytes 5/10",
        ] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }

    #[tokio::test]
    async fn what_is_there_already_is_skipped() {
        for at in 0..=6 {
            let chunks =
                ["ab", "", "cde", "f"].map(|chunk| Ok(Bytes::from_static(chunk.as_bytes())));
            let bytes = skip(futures_util::stream::iter(chunks).boxed(), at);
            let got: Vec<Bytes> = bytes.try_collect().await.unwrap();
            assert_eq!(got.concat(), &b"abcdef"[usize::try_from(at).unwrap()..]);
        }
    }
}
