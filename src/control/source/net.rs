//! Connections to where models come from, and to nowhere else.
//!
//! ```text
//! URL ─▶ Gate: scheme, host and port are configured ─▶ Resolver: the name's addresses are fit ─▶ connect
//! ```
//!
//! Invariants:
//! - A host and port are connected to only when the configuration names them, whoever else names
//!   another one: a redirect, an index, an artifact's address.
//! - A name that resolves to this machine, a link-local or a metadata address is not followed there
//!   unless that address itself is configured. What was checked is what is connected to.
//! - Every wait ends: connecting, a silence, a whole answer. Every answer has a largest size.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

use super::SourceError;
use crate::bucket::{chain, detail};

/// Longest whole answer that is a file. How fast it has to come is for the download to say.
pub(super) const FILE_TIME_MAX: Duration = Duration::from_secs(24 * 3600);
/// Connections that are kept for the next request.
const IDLE_CONNECTIONS_MAX: usize = 8;
const IDLE_MAX: Duration = Duration::from_secs(60);
const HEADERS_MAX: usize = 64;
/// Longest part of a server's text that is repeated.
const DETAIL_MAX: usize = 200;

/// How long is waited for what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Times {
    /// For a connection.
    pub(super) connect: Duration,
    /// For the next bytes of an answer.
    pub(super) silence: Duration,
    /// For a whole answer that is no file.
    pub(super) answer: Duration,
}

impl Times {
    pub(super) const USUAL: Self = Self {
        connect: Duration::from_secs(5),
        silence: Duration::from_secs(20),
        answer: Duration::from_secs(60),
    };
}

/// A host and a port, as the configuration names them.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct HostPort {
    host: Host,
    port: u16,
}

/// Why an address is not connected to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("expected host:port, got '{0}'")]
    Syntax(String),
    #[error("'{0}' is no http or https URL")]
    Scheme(String),
    #[error("a URL with a user or a password is not used")]
    Credentials,
    #[error("{0} is not configured; repository.allowed_hosts can name it")]
    NotAllowed(String),
    #[error("{0} is reached without TLS only with repository.allow_http")]
    Plain(String),
    #[error(
        "the name {name} leads to {address}, which is {what}; if that is meant, name the address \
         in repository.allowed_hosts"
    )]
    Unfit { name: String, address: IpAddr, what: &'static str },
    #[error("the name {0} leads nowhere")]
    Unresolved(String),
}

impl FromStr for HostPort {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let syntax = || AddressError::Syntax(text.chars().take(DETAIL_MAX).collect());
        if text.contains(['/', '@', '?', '#', '\\']) {
            return Err(syntax());
        }
        let (host, port) = text.rsplit_once(':').ok_or_else(syntax)?;
        let port = port.parse().ok().filter(|port| *port > 0).ok_or_else(syntax)?;
        // A special scheme, so that hosts have the same one reading as in requests.
        let url = Url::parse(&format!("http://{host}/")).map_err(|_| syntax())?;
        let host = url.host().ok_or_else(syntax)?.to_owned();
        Ok(Self { host, port })
    }
}

impl fmt::Display for HostPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

impl HostPort {
    pub(super) fn of(url: &Url) -> Option<Self> {
        Some(Self { host: url.host()?.to_owned(), port: url.port_or_known_default()? })
    }

    fn address(&self) -> Option<IpAddr> {
        match self.host {
            Host::Ipv4(address) => Some(address.into()),
            Host::Ipv6(address) => Some(address.into()),
            Host::Domain(_) => None,
        }
    }

    /// What needs no TLS: this machine, and what the cloud tells it over its own link.
    fn is_near(&self) -> bool {
        match &self.host {
            Host::Domain(name) => is_localhost(name),
            Host::Ipv4(address) => address.is_loopback() || address.is_link_local(),
            Host::Ipv6(address) => address.is_loopback(),
        }
    }
}

fn is_localhost(name: &str) -> bool {
    let name = name.trim_end_matches('.');
    name == "localhost" || name.ends_with(".localhost")
}

/// What may be connected to.
#[derive(Debug)]
pub(super) struct Gate {
    hosts: Vec<HostPort>,
    /// `http` is allowed for hosts that are not this machine.
    plain: bool,
}

impl Gate {
    pub(super) fn new(hosts: Vec<HostPort>, plain: bool) -> Self {
        Self { hosts, plain }
    }

    /// Whether a request may go to `url`.
    pub(super) fn check(&self, url: &Url) -> Result<(), AddressError> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(AddressError::Scheme(url.scheme().to_owned()));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(AddressError::Credentials);
        }
        let host =
            HostPort::of(url).ok_or_else(|| AddressError::Scheme(url.scheme().to_owned()))?;
        if !self.hosts.contains(&host) {
            return Err(AddressError::NotAllowed(host.to_string()));
        }
        if url.scheme() == "http" && !self.plain && !host.is_near() {
            return Err(AddressError::Plain(host.to_string()));
        }
        Ok(())
    }

    /// Whether a name that is configured may lead to `address`.
    fn admit(&self, name: &str, address: IpAddr) -> Result<(), AddressError> {
        let what = match unfit(address) {
            None => return Ok(()),
            Some("loopback") if is_localhost(name) => return Ok(()),
            Some(what) => what,
        };
        let configured = self.hosts.iter().filter_map(HostPort::address);
        if configured.map(|host| host.to_canonical()).any(|host| host == address.to_canonical()) {
            return Ok(());
        }
        Err(AddressError::Unfit { name: name.to_owned(), address, what })
    }

    fn names(&self, name: &str) -> bool {
        let is = |host: &HostPort| matches!(&host.host, Host::Domain(known) if known == name);
        self.hosts.iter().any(is)
    }
}

/// What an address is that a name should not lead to; `None` for one that it may.
fn unfit(address: IpAddr) -> Option<&'static str> {
    match address.to_canonical() {
        IpAddr::V4(address) => unfit_v4(address),
        IpAddr::V6(address) => unfit_v6(address),
    }
}

fn unfit_v4(address: Ipv4Addr) -> Option<&'static str> {
    const METADATA: [Ipv4Addr; 2] =
        [Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(192, 0, 0, 192)];
    if address.is_loopback() {
        Some("loopback")
    } else if address.is_link_local() {
        Some("link-local")
    } else if METADATA.contains(&address) {
        Some("a cloud's metadata service")
    } else if address.octets()[0] == 0 {
        Some("unspecified")
    } else if address.is_multicast() || address.is_broadcast() || address.octets()[0] >= 240 {
        Some("no address of one host")
    } else {
        None
    }
}

fn unfit_v6(address: Ipv6Addr) -> Option<&'static str> {
    const METADATA: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
    let segments = address.segments();
    let inner = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        unfit_v4(Ipv4Addr::new(a, b, c, d))
    };
    if address.is_loopback() {
        return Some("loopback");
    }
    if address.is_unspecified() {
        return Some("unspecified");
    }
    if segments[0] & 0xffc0 == 0xfe80 {
        return Some("link-local");
    }
    if address == METADATA {
        return Some("a cloud's metadata service");
    }
    if address.is_multicast() {
        return Some("no address of one host");
    }
    match segments {
        // NAT64, 6to4 and the old way to write IPv4: another address is meant.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] | [0, 0, 0, 0, 0, 0, high, low] => inner(high, low),
        [0x2002, high, low, ..] => inner(high, low),
        _ => None,
    }
}

/// Resolves configured names to addresses that are fit.
struct Resolver(Arc<Gate>);

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let gate = Arc::clone(&self.0);
        Box::pin(async move {
            let name = name.as_str().to_ascii_lowercase();
            if !gate.names(&name) {
                return Err(AddressError::NotAllowed(name).into());
            }
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            Ok(fit_addresses(&gate, &name, found)?)
        })
    }
}

/// The addresses that may be connected to; the reason for the first that may not when none is left.
fn fit_addresses(
    gate: &Gate,
    name: &str,
    found: impl Iterator<Item = SocketAddr>,
) -> Result<Addrs, AddressError> {
    let (mut fit, mut refused) = (Vec::new(), None);
    for address in found {
        match gate.admit(name, address.ip()) {
            Ok(()) => fit.push(address),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    match fit.is_empty() {
        false => Ok(Box::new(fit.into_iter())),
        true => Err(refused.unwrap_or_else(|| AddressError::Unresolved(name.to_owned()))),
    }
}

/// A client that goes through the gate.
#[derive(Clone, Debug)]
pub(super) struct Net {
    gate: Arc<Gate>,
    client: reqwest::Client,
}

impl Net {
    pub(super) fn new(gate: Gate, times: Times) -> Result<Self, SourceError> {
        // Already there when another part of the program needed one: then that one serves.
        drop(rustls::crypto::ring::default_provider().install_default());
        let gate = Arc::new(gate);
        let builder = || {
            reqwest::Client::builder()
                .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::none())
                .referer(false)
                // A proxy would be connected to instead of what was checked.
                .no_proxy()
                .http1_only()
                .http1_max_headers(HEADERS_MAX)
                .connect_timeout(times.connect)
                .read_timeout(times.silence)
                .timeout(times.answer)
                .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
                .pool_idle_timeout(IDLE_MAX)
                .dns_resolver(Arc::new(Resolver(Arc::clone(&gate))))
        };
        let client = builder().build().or_else(|error| {
            // A minimal container may have no certificates; what needs none is served all the same.
            tracing::warn!(%error, "no root certificates: https sources will not be trusted");
            builder().tls_certs_only([]).build()
        });
        let client = client.map_err(|error| SourceError::Unreachable {
            what: "the source".to_owned(),
            reason: chain(&error),
        })?;
        Ok(Self { gate, client })
    }

    /// Sends a request and gives the answer's head, whatever its status.
    pub(super) async fn send(
        &self,
        request: reqwest::Request,
    ) -> Result<reqwest::Response, SourceError> {
        self.gate.check(request.url())?;
        let what = shown(request.url());
        let sent = self.client.execute(request).await;
        sent.map_err(|error| failed(&what, &error))
    }
}

/// A request's failure; one that the gate caused is no failure of the network.
pub(super) fn failed(what: &str, error: &reqwest::Error) -> SourceError {
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(refused) = inner.downcast_ref::<AddressError>() {
            return refused.clone().into();
        }
        source = inner.source();
    }
    SourceError::Unreachable { what: what.to_owned(), reason: chain(error) }
}

/// A URL without its query.
pub(super) fn shown(url: &Url) -> String {
    let host = HostPort::of(url).map(|host| host.to_string()).unwrap_or_default();
    detail(&format!("{}://{host}{}", url.scheme(), url.path()))
}

/// The whole body, if it is no larger than `size_max`.
pub(super) async fn read(
    mut response: reqwest::Response,
    size_max: usize,
) -> Result<Bytes, SourceError> {
    let what = shown(response.url());
    let too_large = || SourceError::Limit {
        what: format!("{what} answered more than fits"),
        limit: size_max as u64,
    };
    let said = response.content_length().unwrap_or(0);
    if usize::try_from(said).map_or(true, |said| said > size_max) {
        return Err(too_large());
    }
    let mut body = BytesMut::new();
    loop {
        match response.chunk().await {
            Ok(None) => return Ok(body.freeze()),
            Ok(Some(chunk)) if body.len() + chunk.len() > size_max => return Err(too_large()),
            Ok(Some(chunk)) => body.extend_from_slice(&chunk),
            Err(error) => return Err(failed(&what, &error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(hosts: &[&str], plain: bool) -> Gate {
        Gate::new(hosts.iter().map(|host| host.parse().unwrap()).collect(), plain)
    }

    #[test]
    fn only_what_is_configured_passes() {
        let gate = gate(&["127.0.0.2:5000", "ml.example.com:443", "[::1]:80"], false);
        let check = |text: &str| gate.check(&Url::parse(text).unwrap());
        for good in [
            "http://127.0.0.2:5000/x",
            "https://ml.example.com/a?b",
            "https://ML.example.com:443/",
            "http://[::1]/",
            // Another way to write what is configured.
            "http://0x7f.0.0.2:5000/",
            "http://2130706434:5000/",
        ] {
            assert_eq!(check(good), Ok(()), "{good}");
        }
        for bad in [
            "http://127.0.0.3:5000/",
            "http://127.0.0.2/",
            "http://127.0.0.2:5001/",
            "http://[::ffff:127.0.0.2]:5000/",
            "http://[::ffff:7f00:3]:5000/",
            "http://0x7f000003:5000/",
            "http://017700000003:5000/",
            "http://127.0.0.2:5000@127.0.0.3:5000/",
            "http://user@127.0.0.2:5000/",
            "http://:pass@127.0.0.2:5000/",
            "http://ml.example.com:443/",
            "http://ml.example.com/",
            "https://ml.example.com.evil.test/",
            "https://ml.example.com:8443/",
            "https://evil.test\\@ml.example.com/",
            "ftp://127.0.0.2:5000/",
            "gopher://127.0.0.2:5000/",
            "file:///etc/passwd",
            "http://169.254.169.254/latest/meta-data/",
            "http://localhost:5000/",
        ] {
            assert!(check(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn plain_http_beyond_this_machine_needs_consent() {
        let url = Url::parse("http://minio:9000/x").unwrap();
        assert!(matches!(gate(&["minio:9000"], false).check(&url), Err(AddressError::Plain(_))));
        assert_eq!(gate(&["minio:9000"], true).check(&url), Ok(()));
        let local = Url::parse("http://localhost:9000/x").unwrap();
        assert_eq!(gate(&["localhost:9000"], false).check(&local), Ok(()));
        let metadata = Url::parse("http://169.254.169.254/latest").unwrap();
        assert_eq!(gate(&["169.254.169.254:80"], false).check(&metadata), Ok(()));
    }

    #[test]
    fn a_name_does_not_lead_to_what_is_not_meant() {
        let gate = gate(&["ml.example.com:443", "localhost:80", "10.1.2.3:80"], false);
        let admit = |name: &str, address: &str| gate.admit(name, address.parse().unwrap());
        for good in ["93.184.216.34", "10.0.0.1", "192.168.1.1", "fd12::1", "2606:2800::1"] {
            assert_eq!(admit("ml.example.com", good), Ok(()), "{good}");
        }
        assert_eq!(admit("localhost", "127.0.0.1"), Ok(()));
        assert_eq!(admit("localhost", "::1"), Ok(()));
        for bad in [
            "127.0.0.1",
            "127.8.9.1",
            "::1",
            "169.254.169.254",
            "fe80::1",
            "0.0.0.0",
            "0.1.2.3",
            "::",
            "224.0.0.1",
            "255.255.255.255",
            "240.0.0.1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "64:ff9b::a9fe:a9fe",
            "2002:7f00:1::",
            "::7f00:1",
            "100.100.100.200",
            "192.0.0.192",
            "fd00:ec2::254",
        ] {
            assert!(admit("ml.example.com", bad).is_err(), "{bad}");
        }
        assert!(admit("localhost", "169.254.169.254").is_err());
        let named = super::Gate::new(vec!["127.0.0.1:5000".parse().unwrap()], false);
        assert_eq!(named.admit("mlflow", "127.0.0.1".parse().unwrap()), Ok(()));
        assert!(named.admit("mlflow", "127.0.0.2".parse().unwrap()).is_err());
    }

    #[test]
    fn one_bad_address_of_several_is_left_out() {
        let gate = gate(&["ml.example.com:443"], false);
        let found = |texts: &[&str]| -> Result<Vec<String>, AddressError> {
            let addresses = texts.iter().map(|text| SocketAddr::new(text.parse().unwrap(), 0));
            let fit =
                fit_addresses(&gate, "ml.example.com", addresses.collect::<Vec<_>>().into_iter())?;
            Ok(fit.map(|address| address.ip().to_string()).collect())
        };
        assert_eq!(found(&["127.0.0.1", "10.0.0.1"]).unwrap(), ["10.0.0.1"]);
        assert!(matches!(found(&["127.0.0.1"]), Err(AddressError::Unfit { .. })));
        assert!(matches!(found(&[]), Err(AddressError::Unresolved(_))));
    }

    #[test]
    fn hosts_are_read_as_in_urls() {
        for (text, want) in [
            ("ML.Example.com:443", "ml.example.com:443"),
            ("127.1:80", "127.0.0.1:80"),
            ("[::1]:80", "[::1]:80"),
        ] {
            assert_eq!(text.parse::<HostPort>().unwrap().to_string(), want);
        }
        for bad in [
            "",
            "host",
            "host:",
            "host:0",
            "host:x",
            "host:99999",
            ":80",
            "a@b:80",
            "http://h:80",
            "a/b:80",
            "::1:80",
        ] {
            assert!(bad.parse::<HostPort>().is_err(), "{bad}");
        }
    }
}
