//! Which names this listener answers to, and which pages may call it: nobody's browser is made to
//! act for it (reliability B31).
//!
//! - DNS rebinding: a page of another name that points to this address sends that name as `Host`.
//!   Names are therefore allowed by list; addresses cannot be re-bound.
//! - Cross-site calls: there are no CORS headers, so no script of another origin reads an answer;
//!   and what a browser sends along with `Origin` or `Sec-Fetch-Site` of another site is refused,
//!   because a client certificate is sent without asking, as a cookie would be.
//! - WebSockets are not spoken here.

use std::net::IpAddr;

use http::header::{HOST, ORIGIN};
use http::uri::Authority;
use http::{HeaderMap, Uri};

use super::problem::{CROSS_ORIGIN, INVALID, MISDIRECTED, Problem};

/// Names beside addresses and `localhost`, without ports; lower case.
#[derive(Clone, Debug, Default)]
pub struct Hosts(Vec<String>);

impl Hosts {
    /// `names` without ports.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self(names.into_iter().map(|name| name.to_ascii_lowercase()).collect())
    }

    /// # Errors
    /// `invalid` without one host, `misdirected` for a name that is not ours, `cross_origin` for a
    /// call that another site's page makes.
    pub(super) fn check(&self, uri: &Uri, headers: &HeaderMap) -> Result<(), Problem> {
        let host = one_host(uri, headers)?;
        if !self.ours(host.host()) {
            let name: String = host.host().chars().take(100).collect();
            return Err(MISDIRECTED.because(format!("'{name}' is no name of this listener")));
        }
        same_origin(&host, headers)
    }

    fn ours(&self, host: &str) -> bool {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let host = host.trim_end_matches('.').to_ascii_lowercase();
        host == "localhost" || bare.parse::<IpAddr>().is_ok() || self.0.contains(&host)
    }
}

/// The authority that the request is for; over HTTP/2 it stands in the URI.
fn one_host(uri: &Uri, headers: &HeaderMap) -> Result<Authority, Problem> {
    let invalid = |detail: &str| INVALID.because(detail);
    let mut named = headers.get_all(HOST).iter();
    let in_header = match (named.next(), named.next()) {
        (None, _) => None,
        (Some(value), None) => {
            let read =
                value.to_str().ok().and_then(|text| text.parse().ok()).filter(is_host_and_port);
            Some(read.ok_or_else(|| invalid("Host: expected a host and a port"))?)
        }
        (Some(_), Some(_)) => return Err(invalid("Host: sent twice")),
    };
    match (uri.authority(), in_header) {
        (None, Some(host)) => Ok(host),
        (Some(host), None) if is_host_and_port(host) => Ok(host.clone()),
        (Some(host), Some(other)) if *host == other => Ok(other),
        (Some(_), _) => Err(invalid("Host: is not what the request line has")),
        (None, None) => Err(invalid("Host: is missing")),
    }
}

/// The parser takes anything behind the last colon for a port, and a name before an `@`.
fn is_host_and_port(authority: &Authority) -> bool {
    let port = authority.as_str().strip_prefix(authority.host());
    match port.map(|port| port.strip_prefix(':')) {
        Some(Some(port)) => port.parse::<u16>().is_ok(),
        Some(None) => authority.as_str() == authority.host(),
        None => false,
    }
}

fn same_origin(host: &Authority, headers: &HeaderMap) -> Result<(), Problem> {
    if let Some(site) = headers.get("sec-fetch-site") {
        // `none`: typed into the address bar.
        if !matches!(site.as_bytes(), b"same-origin" | b"none") {
            return Err(CROSS_ORIGIN.because("Sec-Fetch-Site says that another site calls"));
        }
    }
    for origin in headers.get_all(ORIGIN) {
        let of = origin.to_str().ok().and_then(|text| text.parse::<Uri>().ok());
        let own = of.as_ref().and_then(Uri::authority).is_some_and(|from| from == host);
        if !own {
            return Err(CROSS_ORIGIN.because("Origin is not this listener"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(uri: &str, sent: &[(&'static str, &str)]) -> Result<(), &'static str> {
        let mut headers = HeaderMap::new();
        for (name, value) in sent {
            headers.append(*name, value.parse().unwrap());
        }
        let hosts = Hosts::new(["gate.Example".to_owned()]);
        hosts.check(&uri.parse().unwrap(), &headers).map_err(|problem| problem.kind.code)
    }

    #[test]
    fn names_are_listed_and_addresses_are_not_names() {
        for host in [
            "127.0.0.1:8003",
            "localhost",
            "LOCALHOST:1",
            "localhost.:1",
            "[::1]:8003",
            "10.1.2.3",
            "gate.example:8003",
            "Gate.Example",
        ] {
            assert_eq!(check("/", &[("host", host)]), Ok(()), "{host}");
        }
        for host in
            ["evil.example", "127.0.0.1.evil.example:8003", "gate.example.evil", "local", "0x7f.1"]
        {
            assert_eq!(check("/", &[("host", host)]), Err("misdirected"), "{host}");
        }
        for host in
            ["127.0.0.1:80.evil.example", "user@localhost", "localhost:99999", "localhost:", "a b"]
        {
            assert_eq!(check("/", &[("host", host)]), Err("invalid"), "{host}");
        }
        for sent in [&[][..], &[("host", "localhost"), ("host", "localhost")]] {
            assert_eq!(check("/", sent), Err("invalid"), "{sent:?}");
        }
        assert_eq!(check("http://localhost/", &[]), Ok(()));
        assert_eq!(check("http://evil.example/", &[]), Err("misdirected"));
        assert_eq!(check("http://localhost/", &[("host", "127.0.0.1")]), Err("invalid"));
    }

    #[test]
    fn pages_of_other_sites_are_refused() {
        let host = ("host", "localhost:8003");
        assert_eq!(check("/", &[host, ("origin", "http://localhost:8003")]), Ok(()));
        assert_eq!(check("/", &[host, ("sec-fetch-site", "same-origin")]), Ok(()));
        assert_eq!(check("/", &[host, ("sec-fetch-site", "none")]), Ok(()));
        for (name, value) in [
            ("origin", "http://localhost:3000"),
            ("origin", "http://evil.example"),
            ("origin", "null"),
            ("origin", "file://"),
            ("sec-fetch-site", "cross-site"),
            ("sec-fetch-site", "same-site"),
        ] {
            assert_eq!(check("/", &[host, (name, value)]), Err("cross_origin"), "{name}: {value}");
        }
    }
}
