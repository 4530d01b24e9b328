//! Buckets of the three providers, all through one [`Net`].
//!
//! Invariants:
//! - Each request goes through [`Gated`], which asks the gate and limits the answer.
//! - Credentials are read anew when a listing or a staging begins.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt, TryStreamExt};
use http_body_util::BodyExt;
use object_store::client::{HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody};
use object_store::path::Path as Key;
use object_store::{BackoffConfig, GetOptions, GetRange, ObjectMeta, ObjectStore, RetryConfig};
use parking_lot::Mutex;
use url::Url;

use super::download::{Backoff, Parts, Ranges};
use super::net::{self, HostPort, Net};
use super::{AddressError, Fingerprint, SourceError};
use crate::bucket::{
    self, Bucket, Client, NoAddress, OpenError, Provider, Secrets, StoreSettings, Way,
};

/// Largest answer that is no file: a page of a listing has 1,000 keys of at most 1 KiB each.
const ANSWER_SIZE_MAX: usize = 16 << 20;
/// Bytes of all answers to one look that are no files: pages without end must not fill the memory.
const LISTING_SIZE_MAX: u64 = 256 << 20;
/// Tries of one request inside the library, after which ours begin anew.
const RETRIES_MAX: usize = if cfg!(test) { 1 } else { 2 };
const RETRY_TIME_MAX: Duration = Duration::from_secs(60);
/// Opened buckets that are kept; only artifacts of MLflow lie in more than one.
const OPENED_MAX: usize = 64;

/// Opens buckets.
pub(super) struct Stores {
    settings: StoreSettings,
    net: Net,
    backoff: Backoff,
    opened: Mutex<HashMap<Bucket, Opened>>,
    /// What is left of [`LISTING_SIZE_MAX`].
    left: Arc<AtomicU64>,
}

/// A bucket, with the fingerprint of the secrets that it was opened with.
type Opened = (Fingerprint, Arc<dyn ObjectStore>);

/// Tells whether the secrets are others than they were.
fn fingerprint(secrets: &Secrets) -> Fingerprint {
    let mut print = Fingerprint::build();
    for part in [&secrets.key_id, &secrets.secret, &secrets.token] {
        print.number(u64::from(part.is_some())).add(part.as_deref().unwrap_or_default());
    }
    print.done()
}

impl Stores {
    pub(super) fn new(settings: StoreSettings, net: Net, backoff: Backoff) -> Self {
        Self { settings, net, backoff, opened: Mutex::default(), left: Arc::default() }
    }

    /// The bucket, with the credentials of now, for one look or one staging.
    pub(super) fn open(&self, bucket: &Bucket) -> Result<Arc<dyn ObjectStore>, SourceError> {
        self.left.store(LISTING_SIZE_MAX, Ordering::Relaxed);
        let secrets = Secrets::read(&self.settings)?;
        let fingerprint = fingerprint(&secrets);
        let mut opened = self.opened.lock();
        if let Some((known, store)) = opened.get(bucket)
            && *known == fingerprint
        {
            return Ok(Arc::clone(store));
        }
        let client = Gated { net: self.net.clone(), left: Arc::clone(&self.left) };
        let store = build(bucket, &self.settings, secrets, client, self.backoff)?;
        if opened.len() >= OPENED_MAX {
            opened.clear();
        }
        opened.insert(bucket.clone(), (fingerprint, Arc::clone(&store)));
        Ok(store)
    }
}

/// Where a bucket is: [`bucket::endpoints`].
pub(super) fn endpoints(
    bucket: &Bucket,
    settings: &StoreSettings,
) -> Result<Vec<Url>, SourceError> {
    bucket::endpoints(bucket, settings).map_err(|why| no_address(&why))
}

/// The hosts that an endpoint's URLs mean.
pub(super) fn hosts(endpoints: &[Url]) -> Vec<HostPort> {
    endpoints.iter().filter_map(HostPort::of).collect()
}

fn no_address(why: &NoAddress) -> SourceError {
    SourceError::Unsupported(match why {
        NoAddress::Account => {
            "an Azure container needs repository.store_account or AZURE_STORAGE_ACCOUNT_NAME"
                .to_owned()
        }
        NoAddress::Endpoint(_) => why.to_string(),
    })
}

fn build(
    bucket: &Bucket,
    settings: &StoreSettings,
    secrets: Secrets,
    client: Gated,
    backoff: Backoff,
) -> Result<Arc<dyn ObjectStore>, SourceError> {
    let retry = RetryConfig {
        backoff: BackoffConfig {
            init_backoff: backoff.first,
            max_backoff: backoff.longest,
            base: 2.0,
        },
        max_retries: RETRIES_MAX,
        retry_timeout: RETRY_TIME_MAX,
    };
    bucket::open(bucket, settings, secrets, Way { client, retry, checksum: None }).map_err(
        |error| match error {
            OpenError::Address(why) => no_address(&why),
            OpenError::Store(error) => failed(&bucket.to_string(), error),
        },
    )
}

/// An error of the library as one of ours.
pub(super) fn failed(what: &str, error: object_store::Error) -> SourceError {
    use object_store::Error;
    let mut source = std::error::Error::source(&error);
    while let Some(inner) = source {
        if let Some(refused) = inner.downcast_ref::<AddressError>() {
            return refused.clone().into();
        }
        source = inner.source();
    }
    let what = what.to_owned();
    let status = |status| SourceError::Status { what: what.clone(), status, detail: String::new() };
    match error {
        Error::NotFound { .. } => SourceError::Missing { what },
        Error::PermissionDenied { .. } => status(403),
        Error::Unauthenticated { .. } => status(401),
        Error::Precondition { .. } => SourceError::Changed { what },
        Error::InvalidPath { source } => {
            SourceError::Answer { what, reason: bucket::detail(&source.to_string()) }
        }
        error => {
            let text = bucket::whole_chain(&error);
            let reason = bucket::detail(&text);
            // How the library words what its own retries gave up on.
            match (status_in(&text), text.contains("Error performing")) {
                (Some((status, detail)), _) => SourceError::Status { what, status, detail },
                (None, true) => SourceError::Unreachable { what, reason },
                (None, false) => SourceError::Answer { what, reason },
            }
        }
    }
}

/// The status that the library tells of, and the store's own word for it.
fn status_in(text: &str) -> Option<(u16, String)> {
    let (_, rest) = text.split_once("non-2xx status code: ")?;
    let status = rest.get(..3)?.parse().ok()?;
    let code = rest.split_once("<Code>").and_then(|(_, rest)| rest.split_once("</Code>"));
    let code = code.map(|(code, _)| bucket::detail(&format!(" ({code})")));
    Some((status, code.unwrap_or_default()))
}

/// Sends the libraries' requests through the gate, and bounds their answers.
#[derive(Clone)]
struct Gated {
    net: Net,
    left: Arc<AtomicU64>,
}

impl Client for Gated {
    async fn send(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let mut request = bucket::for_client(request).await?;
        let of_file = request.headers().contains_key(http::header::RANGE);
        if of_file {
            *request.timeout_mut() = Some(net::FILE_TIME_MAX);
        }
        let response = self.net.send(request).await.map_err(of_http)?;
        if of_file && response.status().is_success() {
            // Counted by who reads it.
            let (parts, body) = http::Response::<reqwest::Body>::from(response).into_parts();
            let body = body.map_err(|error| HttpError::new(HttpErrorKind::Interrupted, error));
            return Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(body)));
        }
        let mut head = http::Response::new(());
        *head.status_mut() = response.status();
        *head.headers_mut() = response.headers().clone();
        let body = net::read(response, ANSWER_SIZE_MAX).await.map_err(of_http)?;
        let size = body.len() as u64;
        let spent = |left: u64| left.checked_sub(size);
        if self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spent).is_err() {
            let what = "the listing is larger than fits".to_owned();
            return Err(of_http(SourceError::Limit { what, limit: LISTING_SIZE_MAX }));
        }
        Ok(head.map(|()| body.into()))
    }
}

/// One of our errors on its way through the library.
fn of_http(error: SourceError) -> HttpError {
    let kind = match &error {
        SourceError::Unreachable { .. } => HttpErrorKind::Interrupted,
        _ => HttpErrorKind::Unknown,
    };
    match error {
        SourceError::Address(error) => HttpError::new(kind, error),
        error => HttpError::new(kind, error),
    }
}

/// One object, as a listing names it.
#[derive(Clone)]
pub(super) struct ObjectFile {
    pub(super) store: Arc<dyn ObjectStore>,
    pub(super) meta: ObjectMeta,
    pub(super) provider: Provider,
}

impl Ranges for ObjectFile {
    fn what(&self) -> String {
        bucket::detail(self.meta.location.as_ref())
    }

    fn open(&self, range: std::ops::Range<u64>) -> BoxFuture<'_, Result<Parts, SourceError>> {
        Box::pin(async move {
            let what = self.what();
            let end = range.end;
            let options = GetOptions {
                range: Some(GetRange::Bounded(range)),
                if_match: self.meta.e_tag.as_deref().map(|tag| quoted(self.provider, tag)),
                ..GetOptions::default()
            };
            let got = self.store.get_opts(&self.meta.location, options).await;
            let got = got.map_err(|error| failed(&what, error))?;
            if got.meta.size != self.meta.size {
                return Err(SourceError::Changed { what });
            }
            let bytes = got.into_stream().map_err(move |error| failed(&what, error)).boxed();
            Ok(Parts { bytes, end })
        })
    }
}

/// Azure lists tags without the quotes that it wants back.
fn quoted(provider: Provider, tag: &str) -> String {
    match provider == Provider::Azure && !tag.starts_with('"') {
        true => format!("\"{tag}\""),
        false => tag.to_owned(),
    }
}

/// A whole small object.
pub(super) async fn small(
    store: &Arc<dyn ObjectStore>,
    key: &Key,
    size_max: u64,
) -> Result<Bytes, SourceError> {
    let what = bucket::detail(key.as_ref());
    let got = store.get_opts(key, GetOptions::default()).await;
    let got = got.map_err(|error| failed(&what, error))?;
    let too_large = SourceError::Limit { what: format!("{what} is too large"), limit: size_max };
    if got.meta.size > size_max {
        return Err(too_large);
    }
    let bytes = got.bytes().await.map_err(|error| failed(&what, error))?;
    match bytes.len() as u64 > size_max {
        true => Err(too_large),
        false => Ok(bytes),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bucket(text: &str) -> Bucket {
        text.parse().unwrap()
    }

    #[test]
    fn the_configuration_says_which_hosts_a_bucket_means() {
        let settings = StoreSettings {
            region: Some("eu-west-1".to_owned()),
            account: Some("acct".to_owned()),
            ..StoreSettings::default()
        };
        let shown = |bucket_text: &str, settings: &StoreSettings| -> Vec<String> {
            let endpoints = endpoints(&bucket(bucket_text), settings).unwrap();
            hosts(&endpoints).iter().map(ToString::to_string).collect()
        };
        assert_eq!(shown("s3://b-1/x", &settings)[0], "s3.eu-west-1.amazonaws.com:443");
        assert_eq!(shown("gs://b-1", &settings)[0], "storage.googleapis.com:443");
        assert_eq!(shown("az://b-1", &settings)[0], "acct.blob.core.windows.net:443");
        let virtual_hosted = StoreSettings { virtual_hosted: true, ..settings.clone() };
        assert_eq!(shown("s3://b-1", &virtual_hosted)[0], "b-1.s3.eu-west-1.amazonaws.com:443");
        let endpoint = Some("http://127.0.0.1:9000".parse().unwrap());
        let local = StoreSettings { endpoint, ..settings };
        assert_eq!(shown("s3://b-1", &local)[0], "127.0.0.1:9000");
        assert_eq!(shown("az://b-1", &local)[0], "127.0.0.1:9000");
    }
}
