//! Buckets that files are delivered to.
//!
//! Invariants:
//! - Requests go to the configured endpoint, and where its tokens come from, only.
//! - Credentials are read anew each time a bucket is opened.

use std::sync::Arc;
use std::time::Duration;

use futures_util::TryStreamExt as _;
use object_store::aws::Checksum;
use object_store::client::{HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody};
use object_store::{BackoffConfig, ObjectStore, RetryConfig};
use url::{Host, Url};

use super::objects::ObjectsSettings;
use crate::bucket::{self, Client, NoAddress, OpenError, Secrets, Way, chain};

/// Tries of one request inside the library, after which ours begin anew.
const RETRIES_MAX: usize = 1;
/// How long is waited for a connection, for the next bytes, and for a whole part of a file to be
/// taken.
const CONNECT_MAX: Duration = Duration::from_secs(5);
const SILENCE_MAX: Duration = Duration::from_secs(60);
const REQUEST_MAX: Duration = Duration::from_secs(300);

/// Opens the bucket with the credentials of now.
///
/// # Errors
/// What is wrong with the settings or the secrets.
pub(in crate::ledger) fn open(settings: &ObjectsSettings) -> Result<Arc<dyn ObjectStore>, String> {
    let ObjectsSettings { bucket, store, allow_http } = settings;
    let secrets = Secrets::read(store).map_err(|error| error.to_string())?;
    let endpoints = bucket::endpoints(bucket, store).map_err(|why| no_address(&why))?;
    let client = Sender::new(&endpoints, *allow_http)?;
    let retry = RetryConfig {
        backoff: BackoffConfig::default(),
        max_retries: RETRIES_MAX,
        retry_timeout: REQUEST_MAX,
    };
    // The store itself checks what arrives.
    let way = Way { client, retry, checksum: Some(Checksum::SHA256) };
    bucket::open(bucket, store, secrets, way).map_err(|error| match error {
        OpenError::Address(why) => no_address(&why),
        OpenError::Store(error) => chain(&error),
    })
}

fn no_address(why: &NoAddress) -> String {
    match why {
        NoAddress::Account => {
            "an Azure container needs sinks.objects_account or AZURE_STORAGE_ACCOUNT_NAME"
                .to_owned()
        }
        NoAddress::Endpoint(_) => why.to_string(),
    }
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

/// Sends to the bucket's own addresses.
#[derive(Clone)]
struct Sender {
    client: reqwest::Client,
    /// What may be connected to: scheme, host and port.
    origins: Arc<[url::Origin]>,
}

impl Sender {
    fn new(endpoints: &[Url], allow_http: bool) -> Result<Self, String> {
        for url in endpoints {
            if url.scheme() == "http" && !allow_http && !is_near(url) {
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
        Ok(Self { client: client.map_err(|error| chain(&error))?, origins })
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the library asked for another host than is configured")]
struct Elsewhere;

impl Client for Sender {
    async fn send(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let request = bucket::for_client(request).await?;
        if !self.origins.contains(&request.url().origin()) {
            return Err(HttpError::new(HttpErrorKind::Request, Elsewhere));
        }
        let response = self.client.execute(request).await.map_err(|error| {
            let kind = match error.is_timeout() {
                true => HttpErrorKind::Timeout,
                false => HttpErrorKind::Connect,
            };
            HttpError::new(kind, error.without_url())
        })?;
        let (parts, body) = http::Response::<reqwest::Body>::from(response).into_parts();
        let body = http_body_util::BodyExt::into_data_stream(body);
        let body = http_body_util::StreamBody::new(
            body.map_ok(http_body::Frame::data)
                .map_err(|error| HttpError::new(HttpErrorKind::Interrupted, error)),
        );
        Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(body)))
    }
}
