//! Buckets of the three providers: where one is, and how it is opened.
//!
//! For who reads models from a bucket and for who delivers the ledger to one; each brings its own
//! client.
//!
//! Invariants:
//! - The libraries never connect by themselves: each request goes through a [`Client`] of ours.
//! - Credentials come by reference or from the provider's own environment, and are read when a
//!   bucket is opened.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use http_body_util::BodyExt as _;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, Checksum};
use object_store::azure::{AzureConfigKey, MicrosoftAzureBuilder};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpService,
};
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::{ClientOptions, ObjectStore, RetryConfig};
use url::Url;

use crate::secret::{SecretError, SecretRef};

/// Longest text of others that is repeated.
const DETAIL_MAX: usize = 200;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Provider {
    S3,
    Gcs,
    Azure,
}

impl Provider {
    pub fn scheme(self) -> &'static str {
        match self {
            Self::S3 => "s3",
            Self::Gcs => "gs",
            Self::Azure => "az",
        }
    }
}

/// `s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Bucket {
    pub provider: Provider,
    pub name: String,
    /// Without slashes at its ends; empty for the whole bucket.
    pub prefix: String,
}

impl fmt::Display for Bucket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.provider.scheme(), self.name)?;
        match self.prefix.as_str() {
            "" => Ok(()),
            prefix => write!(f, "/{prefix}"),
        }
    }
}

/// How buckets are reached. What is not set here is taken from the provider's own environment.
#[derive(Clone, Debug, Default)]
pub struct StoreSettings {
    pub endpoint: Option<Url>,
    pub region: Option<String>,
    /// S3: the bucket is part of the host name, not of the path.
    pub virtual_hosted: bool,
    /// Azure: storage account.
    pub account: Option<String>,
    /// S3: access key id.
    pub key_id: Option<SecretRef>,
    /// S3: secret access key. Azure: account key. GCS: the service account's JSON.
    pub secret: Option<SecretRef>,
    /// S3: session token.
    pub token: Option<SecretRef>,
}

/// The secrets that the settings refer to, as they are now.
pub struct Secrets {
    pub key_id: Option<String>,
    pub secret: Option<String>,
    pub token: Option<String>,
}

impl Secrets {
    /// # Errors
    /// When one of them cannot be read.
    pub fn read(settings: &StoreSettings) -> Result<Self, SecretError> {
        let read = |reference: &Option<SecretRef>| match reference {
            None => Ok(None),
            Some(reference) => reference.read().map(|secret| Some(secret.expose().to_owned())),
        };
        Ok(Self {
            key_id: read(&settings.key_id)?,
            secret: read(&settings.secret)?,
            token: read(&settings.token)?,
        })
    }
}

/// Why a bucket has no address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NoAddress {
    #[error("the endpoint is wrong: {0}")]
    Endpoint(#[from] url::ParseError),
    /// The storage account is neither configured nor in the environment.
    #[error("an Azure container needs an account, or AZURE_STORAGE_ACCOUNT_NAME")]
    Account,
}

#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Address(#[from] NoAddress),
    #[error(transparent)]
    Store(#[from] object_store::Error),
}

/// How the library sends, and tries again.
pub struct Way<C> {
    pub client: C,
    pub retry: RetryConfig,
    /// S3: have the store check what arrives.
    pub checksum: Option<Checksum>,
}

/// Where a bucket is, by settings and environment: its endpoint first, then where the provider's
/// tokens come from.
///
/// # Errors
/// When that cannot be told.
pub fn endpoints(bucket: &Bucket, settings: &StoreSettings) -> Result<Vec<Url>, NoAddress> {
    let configured = |usual: &str| match &settings.endpoint {
        Some(endpoint) => Ok(endpoint.clone()),
        None => Url::parse(usual),
    };
    match bucket.provider {
        Provider::S3 => s3_endpoints(bucket, settings),
        Provider::Gcs => Ok(vec![
            configured("https://storage.googleapis.com")?,
            Url::parse("https://oauth2.googleapis.com")?,
        ]),
        Provider::Azure => {
            let endpoint = match &settings.endpoint {
                Some(endpoint) => endpoint.clone(),
                None => {
                    let account = azure_account(settings)?;
                    Url::parse(&format!("https://{account}.blob.core.windows.net"))?
                }
            };
            Ok(vec![endpoint, Url::parse("https://login.microsoftonline.com")?])
        }
    }
}

fn s3_endpoints(bucket: &Bucket, settings: &StoreSettings) -> Result<Vec<Url>, NoAddress> {
    let environment = AmazonS3Builder::from_env();
    let known = |key| known(&environment, key);
    let region = s3_region(settings, &environment);
    let named =
        || known(AmazonS3ConfigKey::S3Endpoint).or_else(|| known(AmazonS3ConfigKey::Endpoint));
    let mut endpoint = match (&settings.endpoint, named()) {
        (Some(endpoint), _) => endpoint.clone(),
        (None, Some(named)) => Url::parse(&named)?,
        (None, None) => Url::parse(&format!("https://s3.{region}.amazonaws.com"))?,
    };
    if settings.virtual_hosted {
        let host = format!("{}.{}", bucket.name, endpoint.host_str().unwrap_or_default());
        endpoint.set_host(Some(&host))?;
    }
    let mut all = vec![endpoint];
    if known(AmazonS3ConfigKey::WebIdentityTokenFile).is_some() {
        let usual = || format!("https://sts.{region}.amazonaws.com");
        all.push(Url::parse(&known(AmazonS3ConfigKey::StsEndpoint).unwrap_or_else(usual))?);
    }
    Ok(all)
}

fn known(environment: &AmazonS3Builder, key: AmazonS3ConfigKey) -> Option<String> {
    environment.get_config_value(&key).filter(|text| !text.is_empty())
}

fn s3_region(settings: &StoreSettings, environment: &AmazonS3Builder) -> String {
    settings
        .region
        .clone()
        .or_else(|| known(environment, AmazonS3ConfigKey::Region))
        .or_else(|| known(environment, AmazonS3ConfigKey::DefaultRegion))
        .unwrap_or_else(|| "us-east-1".to_owned())
}

fn azure_account(settings: &StoreSettings) -> Result<String, NoAddress> {
    let account = settings.account.clone().or_else(|| {
        MicrosoftAzureBuilder::from_env().get_config_value(&AzureConfigKey::AccountName)
    });
    account.filter(|account| !account.is_empty()).ok_or(NoAddress::Account)
}

/// Opens the bucket. Nothing is sent yet.
///
/// # Errors
/// When its address cannot be told, or the library does not take what it is given.
pub fn open<C: Client>(
    bucket: &Bucket,
    settings: &StoreSettings,
    secrets: Secrets,
    way: Way<C>,
) -> Result<Arc<dyn ObjectStore>, OpenError> {
    let endpoint = endpoints(bucket, settings)?.remove(0);
    let text = endpoint.as_str().trim_end_matches('/').to_owned();
    let (name, client) = (bucket.name.as_str(), Through(way.client));
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
                .with_http_connector(client)
                .with_retry(way.retry);
            if let Some(checksum) = way.checksum {
                builder = builder.with_checksum_algorithm(checksum);
            }
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
                .with_http_connector(client)
                .with_retry(way.retry);
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
                .with_http_connector(client)
                .with_retry(way.retry);
            if let Some(key) = secrets.secret {
                builder = builder.with_access_key(key);
            }
            builder.build().map(|store| Arc::new(store) as Arc<dyn ObjectStore>)
        }
    };
    Ok(opened?)
}

/// Sends what the libraries ask for.
pub trait Client: Clone + Send + Sync + 'static {
    fn send(
        &self,
        request: HttpRequest,
    ) -> impl Future<Output = Result<HttpResponse, HttpError>> + Send;
}

/// A request of the library as one of our client's.
///
/// # Errors
/// When its body cannot be read, or its address is none.
pub async fn for_client(request: HttpRequest) -> Result<reqwest::Request, HttpError> {
    let (parts, body) = request.into_parts();
    let url = Url::parse(&parts.uri.to_string())
        .map_err(|error| HttpError::new(HttpErrorKind::Unknown, error))?;
    let mut request = reqwest::Request::new(parts.method, url);
    *request.headers_mut() = parts.headers;
    let body = body.collect().await?.to_bytes();
    if !body.is_empty() {
        *request.body_mut() = Some(body.into());
    }
    Ok(request)
}

/// Gives the library our client.
#[derive(Clone)]
struct Through<C>(C);

impl<C: Client> HttpConnector for Through<C> {
    fn connect(&self, _options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(self.clone()))
    }
}

impl<C> fmt::Debug for Through<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Through")
    }
}

impl<C: Client> HttpService for Through<C> {
    fn call<'service, 'call>(
        &'service self,
        request: HttpRequest,
    ) -> Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'call>>
    where
        'service: 'call,
        Self: 'call,
    {
        Box::pin(self.0.send(request))
    }
}

/// An error with its causes, without the URL: queries are nobody's business.
pub fn chain(error: &dyn std::error::Error) -> String {
    detail(&whole_chain(error))
}

/// As [`chain`], as long as it is: for what has to be found in it.
pub fn whole_chain(error: &dyn std::error::Error) -> String {
    let mut text = String::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let one = error.to_string();
        let one = one.split(" for url (").next().unwrap_or_default();
        if !text.contains(one) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(one);
        }
        next = error.source();
    }
    text
}

/// A server's text, fit to be repeated.
pub fn detail(text: &str) -> String {
    text.chars().filter(|char| !char.is_control()).take(DETAIL_MAX).collect()
}
