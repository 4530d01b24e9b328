//! TLS of a listener: certificates from files that may change, and who a client's certificate says
//! that it is.
//!
//! ```text
//! cert, key, client CA ──read every 2 s, changed?──▶ ServerConfig ──ArcSwap──▶ next handshake
//!                                 └─ wrong: the one in force stays, and the log says so
//! ```
//!
//! Invariants:
//! - A handshake uses one whole configuration; connections that are open keep theirs.
//! - Certificate, key and CA are read together and take effect together, or none of them does: a
//!   certificate without its key, as between two writes, changes nothing.
//! - A new configuration knows no session of the one before: who resumes shows its certificate again.
//!
//! Deliberately absent: revocation lists (give clients certificates of a short life), and a choice of
//! ciphers (rustls has no weak ones).

use std::fmt;
use std::future::Future;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use sha2::{Digest as _, Sha256};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_rustls::TlsAcceptor;
pub use tokio_rustls::server::TlsStream;

use crate::admit::PeerName;

/// Longest time from a connection's first moment to its first request that a handshake may take.
pub const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// How often the files are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Largest file of certificates, or of a key.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Where a listener's certificates lie, as PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The listener's own certificate, and those between it and the root.
    pub cert: PathBuf,
    pub key: PathBuf,
    /// Roots of clients' certificates. With it a client may show one, and one that is shown has to
    /// be right; without it none is asked for.
    pub client_ca: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("'{}' cannot be read: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("'{}' holds no {expected}", path.display())]
    Empty { path: PathBuf, expected: &'static str },
    #[error("'{}' is not PEM: {problem}", path.display())]
    Pem { path: PathBuf, problem: String },
    #[error("'{}' and '{}' do not go together: {problem}", cert.display(), key.display())]
    Pair { cert: PathBuf, key: PathBuf, problem: String },
    #[error("'{}' holds a certificate that no client can be checked against: {problem}", path.display())]
    Roots { path: PathBuf, problem: String },
}

/// The certificates of one listener, as they are now.
pub struct Tls {
    files: Files,
    current: ArcSwap<Loaded>,
}

struct Loaded {
    config: Arc<ServerConfig>,
    /// Of the files that it was made of.
    digest: [u8; 32],
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.files.fmt(f)
    }
}

impl Tls {
    /// # Errors
    /// When a file cannot be read or is not what it should be.
    pub fn open(files: Files) -> Result<Arc<Self>, TlsError> {
        let loaded = Content::read(&files)?.load(&files)?;
        Ok(Arc::new(Self { current: ArcSwap::from_pointee(loaded), files }))
    }

    /// Reads the files again; whether something else is in force now.
    ///
    /// # Errors
    /// When what they hold now cannot be used; what was in force still is.
    pub fn reload(&self) -> Result<bool, TlsError> {
        let content = Content::read(&self.files)?;
        if content.digest == self.current.load().digest {
            return Ok(false);
        }
        self.current.store(Arc::new(content.load(&self.files)?));
        Ok(true)
    }

    /// Follows the files for as long as the process runs; a task for the app.
    pub async fn follow(self: Arc<Self>) {
        let mut every = interval(LOOK_EVERY);
        every.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut said = None;
        loop {
            every.tick().await;
            let tls = Arc::clone(&self);
            let looked = tokio::task::spawn_blocking(move || tls.reload()).await;
            let problem = match looked {
                Ok(Ok(changed)) => {
                    if changed {
                        tracing::info!(cert = %self.files.cert.display(), "certificates changed");
                    }
                    None
                }
                Ok(Err(error)) => Some(error.to_string()),
                Err(lost) => Some(lost.to_string()),
            };
            if let Some(error) = &problem
                && said.as_ref() != Some(error)
            {
                tracing::error!(error, "certificates cannot be used, those before stay in force");
            }
            said = problem;
        }
    }

    /// Shakes hands, within [`HANDSHAKE_MAX`].
    ///
    /// # Errors
    /// When the peer does not speak TLS, is not content with us or we not with it, or takes longer.
    pub fn accept<IO>(&self, io: IO) -> impl Future<Output = io::Result<TlsStream<IO>>> + use<IO>
    where
        IO: AsyncRead + AsyncWrite + Unpin,
    {
        let config = Arc::clone(&self.current.load().config);
        // Boxed: it holds the buffers of the handshake.
        let shaking = Box::pin(TlsAcceptor::from(config).accept(io));
        async move {
            match timeout(HANDSHAKE_MAX, shaking).await {
                Ok(done) => done,
                Err(_) => Err(io::Error::new(io::ErrorKind::TimedOut, "handshake took too long")),
            }
        }
    }
}

/// Who the client's certificate says that it is; `None` when it showed none, or one without a name
/// that we can take ([`PeerName::of`]).
pub fn peer_name<IO>(stream: &TlsStream<IO>) -> Option<PeerName> {
    let (_, session) = stream.get_ref();
    session.peer_certificates()?.first().and_then(|leaf| PeerName::of(leaf))
}

/// The files, read.
struct Content {
    cert: Vec<u8>,
    key: Vec<u8>,
    client_ca: Option<Vec<u8>>,
    digest: [u8; 32],
}

impl Content {
    fn read(files: &Files) -> Result<Self, TlsError> {
        let cert = read(&files.cert)?;
        let key = read(&files.key)?;
        let client_ca = files.client_ca.as_deref().map(read).transpose()?;
        let mut digest = Sha256::new();
        for content in [&cert, &key, client_ca.as_ref().unwrap_or(&Vec::new())] {
            // Each apart, so that no two sets of files give the same.
            digest.update(Sha256::digest(content));
        }
        Ok(Self { cert, key, client_ca, digest: digest.finalize().into() })
    }

    fn load(&self, files: &Files) -> Result<Loaded, TlsError> {
        let pair = |error: rustls::Error| TlsError::Pair {
            cert: files.cert.clone(),
            key: files.key.clone(),
            problem: error.to_string(),
        };
        let chain = certificates(&files.cert, &self.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key)
            .map_err(|error| pem(&files.key, "private key", &error))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(pair)?;
        let builder = match (&files.client_ca, &self.client_ca) {
            (Some(path), Some(content)) => {
                let wrong = |problem: String| TlsError::Roots { path: path.clone(), problem };
                let mut roots = RootCertStore::empty();
                for root in certificates(path, content)? {
                    roots.add(root).map_err(|error| wrong(error.to_string()))?;
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider)
                        .allow_unauthenticated()
                        .build()
                        .map_err(|error| wrong(error.to_string()))?;
                builder.with_client_cert_verifier(verifier)
            }
            _ => builder.with_no_client_auth(),
        };
        let mut config = builder.with_single_cert(chain, key).map_err(pair)?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(Loaded { config: Arc::new(config), digest: self.digest })
    }
}

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let mut content = Vec::new();
    let done = std::fs::File::open(path)
        .and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_end(&mut content));
    let done = done.and_then(|len| match len as u64 > FILE_BYTES_MAX {
        true => Err(io::Error::other(format!("it has more than {FILE_BYTES_MAX} bytes"))),
        false => Ok(content),
    });
    done.map_err(|source| TlsError::Read { path: path.to_owned(), source })
}

fn certificates(path: &Path, content: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(content).collect();
    let found = found.map_err(|error| pem(path, "certificate", &error))?;
    match found.is_empty() {
        true => Err(TlsError::Empty { path: path.to_owned(), expected: "certificate" }),
        false => Ok(found),
    }
}

fn pem(path: &Path, expected: &'static str, error: &rustls::pki_types::pem::Error) -> TlsError {
    use rustls::pki_types::pem::Error;
    let path = path.to_owned();
    match error {
        Error::NoItemsFound => TlsError::Empty { path, expected },
        error => TlsError::Pem { path, problem: error.to_string() },
    }
}

#[cfg(test)]
mod tests;
