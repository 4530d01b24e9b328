//! Buckets that files are delivered to.
//!
//! Invariants:
//! - The library never connects by itself: each request goes through [`Connector`], which sends to
//!   the configured endpoint, and where its tokens come from, only.
//! - Credentials come by reference or from the provider's own environment, and are read anew each
//!   time a bucket is opened.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use http_body_util::BodyExt as _;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse,
    HttpResponseBody, HttpService,
};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, RetryConfig};
use url::{Host, Url};

use crate::secret::SecretRef;

/// Longest part of an error that is repeated.
const DETAIL_MAX: usize = 300;
/// Tries of one request inside the library, after which ours begin anew.
const RETRIES_MAX: usize = 1;
/// How long is waited for a connection, for the next bytes, and for a whole part of a file to be
/// taken.
const CONNECT_MAX: Duration = Duration::from_secs(5);
const SILENCE_MAX: Duration = Duration::from_secs(60);
const REQUEST_MAX: Duration = Duration::from_secs(300);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Provider {
    S3,
    Gcs,
    Azure,
}

/// A bucket and the prefix in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub provider: Provider,
    pub bucket: String,
    /// Without slashes at its ends; may be empty.
    pub prefix: String,
}

/// How a bucket is reached; as for the repository's.
#[derive(Clone, Debug, Default)]
pub struct StoreSettings {
    pub endpoint: Option<Url>,
    pub region: Option<String>,
    pub virtual_hosted: bool,
    pub account: Option<String>,
    pub key_id: Option<SecretRef>,
    pub secret: Option<SecretRef>,
    pub token: Option<SecretRef>,
    /// Plain HTTP to other machines.
    pub allow_http: bool,
}

/// Opens the bucket with the credentials of now.
///
/// # Errors
/// What is wrong with the settings or the secrets.
pub(in crate::ledger) fn open(
    place: &Place,
    settings: &StoreSettings,
) -> Result<Arc<dyn ObjectStore>, String> {
    let read = |secret: &Option<SecretRef>| match secret {
        None => Ok(None),
        Some(secret) => {
            let read = secret.read().map_err(|error| error.to_string())?;
            Ok::<_, String>(Some(read.expose().to_owned()))
        }
    };
    let (key_id, secret) = (read(&settings.key_id)?, read(&settings.secret)?);
    let token = read(&settings.token)?;
    let retry = RetryConfig {
        backoff: BackoffConfig::default(),
        max_retries: RETRIES_MAX,
        retry_timeout: REQUEST_MAX,
    };
    let opened = match place.provider {
        Provider::S3 => {
            let (endpoint, region, sts) = s3(place, settings)?;
            let connector = connector([endpoint.clone()].into_iter().chain(sts), settings)?;
            let mut builder = AmazonS3Builder::from_env()
                .with_bucket_name(&place.bucket)
                .with_region(region)
                .with_virtual_hosted_style_request(settings.virtual_hosted)
                .with_s3_express(false)
                .with_config(AmazonS3ConfigKey::S3Endpoint, text(&endpoint))
                // The store itself checks what arrives.
                .with_checksum_algorithm(Checksum::SHA256)
                .with_http_connector(connector)
                .with_retry(retry);
            if let (Some(id), Some(secret)) = (key_id, secret) {
                builder = builder.with_access_key_id(id).with_secret_access_key(secret);
                if let Some(token) = token {
                    builder = builder.with_token(token);
                }
            }
            builder.build().map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
        Provider::Gcs => {
            let endpoint = endpoint(settings, "https://storage.googleapis.com")?;
            let tokens = parse("https://oauth2.googleapis.com")?;
            let mut builder = GoogleCloudStorageBuilder::from_env()
                .with_bucket_name(&place.bucket)
                .with_base_url(&text(&endpoint))
                .with_http_connector(connector([endpoint, tokens], settings)?)
                .with_retry(retry);
            if let Some(account) = secret {
                builder = builder.with_service_account_key(account);
            }
            builder.build().map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
        Provider::Azure => {
            let account = azure_account(settings)?;
            let endpoint = endpoint(settings, &format!("https://{account}.blob.core.windows.net"))?;
            let tokens = parse("https://login.microsoftonline.com")?;
            let mut builder = MicrosoftAzureBuilder::from_env()
                .with_account(account)
                .with_container_name(&place.bucket)
                .with_endpoint(text(&endpoint))
                .with_use_emulator(false)
                .with_http_connector(connector([endpoint, tokens], settings)?)
                .with_retry(retry);
            if let Some(key) = secret {
                builder = builder.with_access_key(key);
            }
            builder.build().map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
    };
    opened.map_err(|error| chain(&error))
}

fn s3(place: &Place, settings: &StoreSettings) -> Result<(Url, String, Option<Url>), String> {
    let environment = AmazonS3Builder::from_env();
    let known = |key| environment.get_config_value(&key).filter(|text| !text.is_empty());
    let region = settings.region.clone();
    let region = region
        .or_else(|| known(AmazonS3ConfigKey::Region))
        .or_else(|| known(AmazonS3ConfigKey::DefaultRegion))
        .unwrap_or_else(|| "us-east-1".to_owned());
    let named = known(AmazonS3ConfigKey::S3Endpoint).or_else(|| known(AmazonS3ConfigKey::Endpoint));
    let usual = named.unwrap_or_else(|| format!("https://s3.{region}.amazonaws.com"));
    let mut endpoint = endpoint(settings, &usual)?;
    if settings.virtual_hosted {
        let host = format!("{}.{}", place.bucket, endpoint.host_str().unwrap_or_default());
        endpoint.set_host(Some(&host)).map_err(|error| error.to_string())?;
    }
    let sts = match known(AmazonS3ConfigKey::WebIdentityTokenFile) {
        None => None,
        Some(_) => {
            let usual = || format!("https://sts.{region}.amazonaws.com");
            Some(parse(&known(AmazonS3ConfigKey::StsEndpoint).unwrap_or_else(usual))?)
        }
    };
    Ok((endpoint, region, sts))
}

fn azure_account(settings: &StoreSettings) -> Result<String, String> {
    let named = settings.account.clone().or_else(|| {
        MicrosoftAzureBuilder::from_env().get_config_value(&AzureConfigKey::AccountName)
    });
    named.filter(|account| !account.is_empty()).ok_or_else(|| {
        "an Azure container needs sinks.objects_account or AZURE_STORAGE_ACCOUNT_NAME".to_owned()
    })
}

fn endpoint(settings: &StoreSettings, usual: &str) -> Result<Url, String> {
    settings.endpoint.clone().map_or_else(|| parse(usual), Ok)
}

fn parse(text: &str) -> Result<Url, String> {
    Url::parse(text).map_err(|error| format!("the endpoint is wrong: {error}"))
}

fn text(url: &Url) -> String {
    url.as_str().trim_end_matches('/').to_owned()
}

/// Whether a URL means this machine.
pub(super) fn is_near(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

/// An error with its causes, without addresses' queries, fit to be repeated.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let one = error.to_string();
        let one = one.split(" for url (").next().unwrap_or_default();
        if !text.contains(one) {
            let colon = if text.is_empty() { "" } else { ": " };
            text.push_str(colon);
            text.push_str(one);
        }
        next = error.source();
    }
    text.chars().filter(|char| !char.is_control()).take(DETAIL_MAX).collect()
}

/// Gives the library our client.
#[derive(Clone)]
struct Connector {
    client: reqwest::Client,
    /// What may be connected to: scheme, host and port.
    origins: Arc<[url::Origin]>,
}

fn connector(
    endpoints: impl IntoIterator<Item = Url>,
    settings: &StoreSettings,
) -> Result<Connector, String> {
    let endpoints: Vec<Url> = endpoints.into_iter().collect();
    for url in &endpoints {
        if url.scheme() == "http" && !settings.allow_http && !is_near(url) {
            return Err("plain HTTP to another machine needs sinks.allow_http".to_owned());
        }
    }
    // Whoever comes first installs it; it is the same for all.
    drop(rustls::crypto::ring::default_provider().install_default());
    let builder = || {
        let builder = reqwest::Client::builder()
            .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .http1_only()
            .connect_timeout(CONNECT_MAX)
            .read_timeout(SILENCE_MAX)
            .timeout(REQUEST_MAX);
        if endpoints.iter().all(is_near) { builder.no_proxy() } else { builder }
    };
    let client = builder().build().or_else(|error| {
        // A minimal container may have no certificates; what needs none is served all the same.
        tracing::warn!(%error, "no root certificates: https buckets will not be trusted");
        builder().tls_certs_only([]).build()
    });
    let origins = endpoints.iter().map(Url::origin).collect();
    Ok(Connector { client: client.map_err(|error| chain(&error))?, origins })
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

#[derive(Debug, thiserror::Error)]
#[error("the library asked for another host than is configured")]
struct Elsewhere;

impl Connector {
    async fn forward(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (parts, body) = request.into_parts();
        let url = Url::parse(&parts.uri.to_string())
            .map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
        if !self.origins.contains(&url.origin()) {
            return Err(HttpError::new(HttpErrorKind::Request, Elsewhere));
        }
        let mut request = reqwest::Request::new(parts.method, url);
        *request.headers_mut() = parts.headers;
        let body = body.collect().await?.to_bytes();
        if !body.is_empty() {
            *request.body_mut() = Some(body.into());
        }
        let sent = self.client.execute(request).await;
        let response = sent.map_err(|error| {
            let kind = match error.is_timeout() {
                true => HttpErrorKind::Timeout,
                false => HttpErrorKind::Connect,
            };
            HttpError::new(kind, error.without_url())
        })?;
        let (parts, body) = http::Response::<reqwest::Body>::from(response).into_parts();
        let body = body.into_data_stream();
        let body = http_body_util::StreamBody::new(
            body.map_ok(http_body::Frame::data)
                .map_err(|error| HttpError::new(HttpErrorKind::Interrupted, error)),
        );
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(body)))
    }
}
