//! Requests whose head can be read in two ways are answered with an error and nothing after them
//! is read.
//!
//! hyper refuses most of what is malformed: lengths that are no numbers or contradict each other,
//! folded lines, spaces before a colon, control characters. What it lets pass, and others on the
//! way might read differently, is refused here, or found by [`super::lines`].

use http::header::{CONNECTION, CONTENT_TYPE, EXPECT, HOST, TRANSFER_ENCODING};
use http::uri::Authority;
use http::{HeaderValue, Request, Response, StatusCode, Version};
use http_body_util::Full;

use super::Body;

/// Why a request is not looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Refused {
    status: StatusCode,
    message: &'static str,
}

impl Refused {
    const fn bad(message: &'static str) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message }
    }

    /// The answer; over HTTP/1 the last one of its connection.
    pub(super) fn answer(self, http2: bool) -> Response<Body> {
        let body = format!(r#"{{"error":"{}","code":"invalid_input"}}"#, self.message);
        let mut answer = Response::new(Body::new(Full::new(body.into())));
        *answer.status_mut() = self.status;
        let headers = answer.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if !http2 {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        answer
    }
}

/// What [`super::lines`] finds.
pub(super) const TWO_READINGS: Refused =
    Refused::bad("lines are expected to end with CR LF, and a length or an encoding, not both");

/// Refuses what could be read in two ways, and what is too long.
pub(super) fn check<B>(request: &Request<B>, uri_max_bytes: usize) -> Result<(), Refused> {
    let uri = request.uri();
    let path_and_query = uri.path_and_query().map_or("", http::uri::PathAndQuery::as_str);
    if path_and_query.len() > uri_max_bytes {
        let (status, message) = (StatusCode::URI_TOO_LONG, "URL is longer than is taken here");
        return Err(Refused { status, message });
    }
    check_host(request)?;
    let headers = request.headers();
    let mut encodings = headers.get_all(TRANSFER_ENCODING).iter();
    if let Some(encoding) = encodings.next()
        && (encodings.next().is_some() || !encoding.as_bytes().eq_ignore_ascii_case(b"chunked"))
    {
        return Err(Refused::bad("transfer-encoding is expected to be chunked, once"));
    }
    let mut expectations = headers.get_all(EXPECT).iter();
    if expectations.any(|value| !value.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
        let (status, message) = (StatusCode::EXPECTATION_FAILED, "expect can be 100-continue only");
        return Err(Refused { status, message });
    }
    Ok(())
}

/// One host, the same wherever it is said.
fn check_host<B>(request: &Request<B>) -> Result<(), Refused> {
    let mut hosts = request.headers().get_all(HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() {
        return Err(Refused::bad("host is expected once"));
    }
    let Some(host) = host else {
        return match request.version() {
            Version::HTTP_11 => Err(Refused::bad("host is expected")),
            _ => Ok(()),
        };
    };
    let host = host.as_bytes();
    // An empty one is what a client without a name for us sends.
    if !host.is_empty() && (host.contains(&b'@') || Authority::try_from(host).is_err()) {
        return Err(Refused::bad("host is expected to be a name and perhaps a port"));
    }
    let said = request.uri().authority().map(|authority| authority.as_str().as_bytes());
    match said {
        Some(said) if !said.eq_ignore_ascii_case(host) => {
            Err(Refused::bad("host and the URL's authority are expected to be the same"))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checked(request: http::request::Builder) -> Option<StatusCode> {
        check(&request.body(()).unwrap(), 100).err().map(|refused| refused.status)
    }

    #[test]
    fn what_has_two_readings_is_refused() {
        let get = || Request::get("/v2").header("host", "a");
        assert_eq!(checked(get()), None);
        assert_eq!(checked(Request::get("/v2")), Some(StatusCode::BAD_REQUEST));
        assert_eq!(checked(Request::get("/v2").version(Version::HTTP_10)), None);
        assert_eq!(checked(get().header("host", "a")), Some(StatusCode::BAD_REQUEST));
        assert_eq!(checked(get().header("transfer-encoding", "Chunked")), None);
        for encoding in ["xchunked", "gzip, chunked", "chunked, chunked", "identity", ""] {
            let status = checked(get().header("transfer-encoding", encoding));
            assert_eq!(status, Some(StatusCode::BAD_REQUEST), "{encoding}");
        }
        assert_eq!(checked(get().header("expect", "100-Continue")), None);
        assert_eq!(checked(get().header("expect", "x")), Some(StatusCode::EXPECTATION_FAILED));
        let long = format!("/{}", "a".repeat(100));
        let status = checked(Request::get(long).header("host", "a"));
        assert_eq!(status, Some(StatusCode::URI_TOO_LONG));
    }

    #[test]
    fn hosts_must_agree() {
        let to = |uri: &str, host: &str| checked(Request::get(uri).header("host", host));
        assert_eq!(to("http://A:80/v2", "a:80"), None);
        assert_eq!(to("http://a/v2", "b"), Some(StatusCode::BAD_REQUEST));
        assert_eq!(to("/v2", ""), None);
        assert_eq!(to("/v2", "[::1]:8000"), None);
        assert_eq!(to("/v2", "a@b"), Some(StatusCode::BAD_REQUEST));
        assert_eq!(to("/v2", "a b"), Some(StatusCode::BAD_REQUEST));
        assert_eq!(to("/v2", "a, b"), Some(StatusCode::BAD_REQUEST));
    }
}
