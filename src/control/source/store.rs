//! Buckets of the three providers, all through one [`Net`].
//!
//! Invariants:
//! - The libraries never connect by themselves: each request goes through [`Connector`], which asks
//!   the gate and limits the answer.
//! - Credentials come by reference or from the provider's own environment, and are read anew when a
//!   listing or a staging begins.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{StreamExt, TryStreamExt};
use http_body_util::BodyExt;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService,
};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::path::Path as Key;
use object_store::{
    BackoffConfig, ClientOptions, GetOptions, GetRange, ObjectMeta, ObjectStore, RetryConfig,
};
use parking_lot::Mutex;
use url::Url;

use super::download::{Backoff, Parts, Ranges};
use super::net::{self, HostPort, Net};
use super::{AddressError, Bucket, Fingerprint, Provider, SourceError, StoreSettings};

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

/// The secrets that the configuration refers to, as they are now.
struct Secrets {
    key_id: Option<String>,
    secret: Option<String>,
    token: Option<String>,
}

impl Secrets {
    fn read(settings: &StoreSettings) -> Result<Self, SourceError> {
        let read = |reference: &Option<super::SecretRef>| match reference {
            None => Ok(None),
            Some(reference) => reference.read().map(|secret| Some(secret.expose().to_owned())),
        };
        Ok(Self {
            key_id: read(&settings.key_id)?,
            secret: read(&settings.secret)?,
            token: read(&settings.token)?,
        })
    }

    fn fingerprint(&self) -> Fingerprint {
        let mut print = Fingerprint::build();
        for part in [&self.key_id, &self.secret, &self.token] {
            print.number(u64::from(part.is_some())).add(part.as_deref().unwrap_or_default());
        }
        print.done()
    }
}

impl Stores {
    pub(super) fn new(settings: StoreSettings, net: Net, backoff: Backoff) -> Self {
        Self { settings, net, backoff, opened: Mutex::default(), left: Arc::default() }
    }

    /// The bucket, with the credentials of now, for one look or one staging.
    pub(super) fn open(&self, bucket: &Bucket) -> Result<Arc<dyn ObjectStore>, SourceError> {
        self.left.store(LISTING_SIZE_MAX, Ordering::Relaxed);
        let secrets = Secrets::read(&self.settings)?;
        let fingerprint = secrets.fingerprint();
        let mut opened = self.opened.lock();
        if let Some((known, store)) = opened.get(bucket)
            && *known == fingerprint
        {
            return Ok(Arc::clone(store));
        }
        let connector = Connector { net: self.net.clone(), left: Arc::clone(&self.left) };
        let store = build(bucket, &self.settings, secrets, connector, self.backoff)?;
        if opened.len() >= OPENED_MAX {
            opened.clear();
        }
        opened.insert(bucket.clone(), (fingerprint, Arc::clone(&store)));
        Ok(store)
    }
}

/// Where a bucket is, by configuration and environment: its endpoint first, then where the
/// provider's tokens come from.
pub(super) fn endpoints(
    bucket: &Bucket,
    settings: &StoreSettings,
) -> Result<Vec<Url>, SourceError> {
    let configured = settings.endpoint.clone();
    match bucket.provider {
        Provider::S3 => {
            let (endpoint, sts) = s3_endpoints(bucket, settings)?;
            Ok(std::iter::once(endpoint).chain(sts).collect())
        }
        Provider::Gcs => {
            let endpoint = match configured {
                Some(endpoint) => endpoint,
                None => parse("https://storage.googleapis.com")?,
            };
            Ok(vec![endpoint, parse("https://oauth2.googleapis.com")?])
        }
        Provider::Azure => {
            let endpoint = match configured {
                Some(endpoint) => endpoint,
                None => {
                    let account = azure_account(settings)?;
                    parse(&format!("https://{account}.blob.core.windows.net"))?
                }
            };
            Ok(vec![endpoint, parse("https://login.microsoftonline.com")?])
        }
    }
}

/// The hosts that an endpoint's URLs mean.
pub(super) fn hosts(endpoints: &[Url]) -> Vec<HostPort> {
    endpoints.iter().filter_map(HostPort::of).collect()
}

fn s3_endpoints(
    bucket: &Bucket,
    settings: &StoreSettings,
) -> Result<(Url, Option<Url>), SourceError> {
    let environment = AmazonS3Builder::from_env();
    let known = |key| environment.get_config_value(&key).filter(|text| !text.is_empty());
    let region = s3_region(settings, &environment);
    let endpoint = match &settings.endpoint {
        Some(endpoint) => Some(endpoint.clone()),
        None => known(AmazonS3ConfigKey::S3Endpoint)
            .or_else(|| known(AmazonS3ConfigKey::Endpoint))
            .map(|text| parse(&text))
            .transpose()?,
    };
    let mut endpoint = match endpoint {
        Some(endpoint) => endpoint,
        None => parse(&format!("https://s3.{region}.amazonaws.com"))?,
    };
    if settings.virtual_hosted {
        let host = endpoint.host_str().unwrap_or_default();
        let host = format!("{}.{host}", bucket.name);
        endpoint.set_host(Some(&host)).map_err(|error| wrong("the endpoint", &error))?;
    }
    let sts = match known(AmazonS3ConfigKey::WebIdentityTokenFile) {
        None => None,
        Some(_) => Some(match known(AmazonS3ConfigKey::StsEndpoint) {
            Some(text) => parse(&text)?,
            None => parse(&format!("https://sts.{region}.amazonaws.com"))?,
        }),
    };
    Ok((endpoint, sts))
}

fn s3_region(settings: &StoreSettings, environment: &AmazonS3Builder) -> String {
    let known = |key| environment.get_config_value(&key).filter(|text| !text.is_empty());
    settings
        .region
        .clone()
        .or_else(|| known(AmazonS3ConfigKey::Region))
        .or_else(|| known(AmazonS3ConfigKey::DefaultRegion))
        .unwrap_or_else(|| "us-east-1".to_owned())
}

fn azure_account(settings: &StoreSettings) -> Result<String, SourceError> {
    let account = settings.account.clone().or_else(|| {
        MicrosoftAzureBuilder::from_env().get_config_value(&AzureConfigKey::AccountName)
    });
    account.filter(|account| !account.is_empty()).ok_or_else(|| {
        let need =
            "an Azure container needs repository.store_account or AZURE_STORAGE_ACCOUNT_NAME";
        SourceError::Unsupported(need.to_owned())
    })
}

fn parse(text: &str) -> Result<Url, SourceError> {
    Url::parse(text).map_err(|error| wrong("the endpoint", &error))
}

fn wrong(what: &str, error: &dyn std::error::Error) -> SourceError {
    SourceError::Unsupported(format!("{what} is wrong: {}", net::chain(error)))
}

fn build(
    bucket: &Bucket,
    settings: &StoreSettings,
    secrets: Secrets,
    connector: Connector,
    backoff: Backoff,
) -> Result<Arc<dyn ObjectStore>, SourceError> {
    let endpoint = endpoints(bucket, settings)?.remove(0);
    let text = endpoint.as_str().trim_end_matches('/').to_owned();
    let retry = RetryConfig {
        backoff: BackoffConfig {
            init_backoff: backoff.first,
            max_backoff: backoff.longest,
            base: 2.0,
        },
        max_retries: RETRIES_MAX,
        retry_timeout: RETRY_TIME_MAX,
    };
    let name = bucket.name.as_str();
    let opened = match bucket.provider {
        Provider::S3 => {
            let mut builder = AmazonS3Builder::from_env();
            let region = s3_region(settings, &builder);
            builder = builder
                .with_bucket_name(name)
                .with_region(region)
                .with_virtual_hosted_style_request(settings.virtual_hosted)
                .with_s3_express(false)
                .with_config(AmazonS3ConfigKey::S3Endpoint, text)
                .with_http_connector(connector)
                .with_retry(retry);
            if let (Some(id), Some(secret)) = (secrets.key_id, secrets.secret) {
                builder = builder.with_access_key_id(id).with_secret_access_key(secret);
                if let Some(token) = secrets.token {
                    builder = builder.with_token(token);
                }
            }
            builder.build().map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
        Provider::Gcs => {
            let mut builder = GoogleCloudStorageBuilder::from_env()
                .with_bucket_name(name)
                .with_base_url(&text)
                .with_http_connector(connector)
                .with_retry(retry);
            if let Some(account) = secrets.secret {
                builder = builder.with_service_account_key(account);
            }
            builder.build().map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
        Provider::Azure => {
            let mut builder = MicrosoftAzureBuilder::from_env()
                .with_account(azure_account(settings)?)
                .with_container_name(name)
                .with_endpoint(text)
                .with_use_emulator(false)
                .with_http_connector(connector)
                .with_retry(retry);
            if let Some(key) = secrets.secret {
                builder = builder.with_access_key(key);
            }
            builder.build().map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
    };
    opened.map_err(|error| failed(&bucket.to_string(), error))
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
            SourceError::Answer { what, reason: net::detail(&source.to_string()) }
        }
        error => {
            let text = net::whole_chain(&error);
            let reason = net::detail(&text);
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
    let code = code.map(|(code, _)| net::detail(&format!(" ({code})")));
    Some((status, code.unwrap_or_default()))
}

/// Gives the library our client.
#[derive(Clone)]
struct Connector {
    net: Net,
    left: Arc<AtomicU64>,
}

impl HttpConnector for Connector {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

impl fmt::Debug for Connector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Connector")
    }
}

impl HttpService for Connector {
    fn call<'service, 'call>(
        &'service self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'call>>
    where
        'service: 'call,
        Self: 'call,
    {
        Box::pin(self.forward(request))
    }
}

impl Connector {
    /// Sends a request of the library through the gate, and bounds its answer.
    async fn forward(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let url = Url::parse(&parts.uri.to_string())
            .map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        let of_file = parts.headers.contains_key(http::header::RANGE);
        let mut request = reqwest::Request::new(parts.method, url);
        *request.headers_mut() = parts.headers;
        if of_file {
            *request.timeout_mut() = Some(net::FILE_TIME_MAX);
        }
        let body = body.collect().await?.to_bytes();
        if !body.is_empty() {
            *request.body_mut() = Some(body.into());
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
        net::detail(self.meta.location.as_ref())
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
    let what = net::detail(key.as_ref());
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
