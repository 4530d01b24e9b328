//! The listener over real sockets: both protocols, and what its limits do.

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use super::Bench;
use crate::admin::{Tls, limits, serve};
use crate::admit::Role;
use crate::transport::tls;

/// A bench that listens; gives its address.
async fn listening() -> (Bench, String) {
    let bench = Bench::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    tokio::spawn(serve(listener, Arc::clone(&bench.api), None));
    (bench, address)
}

/// What comes back until the other side closes.
async fn exchange(address: &str, sent: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    // It may be closed before all is sent.
    drop(stream.write_all(sent).await);
    let mut answer = Vec::new();
    let reading = stream.read_to_end(&mut answer);
    drop(tokio::time::timeout(Duration::from_secs(10), reading).await);
    String::from_utf8_lossy(&answer).into_owned()
}

fn client(builder: reqwest::ClientBuilder) -> reqwest::Client {
    drop(rustls::crypto::ring::default_provider().install_default());
    builder.no_proxy().build().unwrap()
}

#[tokio::test]
async fn both_protocols_are_answered() {
    let (bench, address) = listening().await;
    let token = bench.token("viewer");
    let builders = [
        (reqwest::Version::HTTP_11, reqwest::Client::builder().http1_only()),
        (reqwest::Version::HTTP_2, reqwest::Client::builder().http2_prior_knowledge()),
    ];
    for (version, builder) in builders {
        let client = client(builder);
        let url = format!("http://{address}/admin/v1/models");
        let answer = client.get(&url).bearer_auth(&token).send().await.unwrap();
        assert_eq!((answer.status().as_u16(), answer.version()), (200, version));
        let answer = client.get(&url).send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 401, "{version:?}");
        let head = client.head(&url).bearer_auth(&token).send().await.unwrap();
        assert_eq!((head.status().as_u16(), head.bytes().await.unwrap().len()), (200, 0));
    }
}

/// Certificates made for this test: a CA, and what it signs.
struct Signed {
    folder: tempfile::TempDir,
    ca: rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
}

impl Signed {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca = rcgen::CertifiedIssuer::self_signed(params, rcgen::KeyPair::generate().unwrap());
        let signed = Self { folder: tempfile::tempdir().unwrap(), ca: ca.unwrap() };
        std::fs::write(signed.folder.path().join("ca.pem"), signed.ca.pem()).unwrap();
        signed
    }

    /// Certificate and key as PEM, for a DNS name.
    fn leaf(&self, name: &str) -> (String, String) {
        let params = rcgen::CertificateParams::new([name.to_owned()]).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.ca).unwrap().pem(), key.serialize_pem())
    }

    fn tls(&self) -> Tls {
        let (cert, key) = self.leaf("localhost");
        let at = |name: &str| self.folder.path().join(name);
        std::fs::write(at("cert.pem"), cert).unwrap();
        std::fs::write(at("key.pem"), key).unwrap();
        let (cert, key, client_ca) = (at("cert.pem"), at("key.pem"), Some(at("ca.pem")));
        let tls = tls::Tls::open(tls::Files { cert, key, client_ca }).unwrap();
        Arc::new(move |stream| {
            let shaking = tls.accept(stream);
            Box::pin(async move {
                let stream = shaking.await?;
                let name = tls::peer_name(&stream);
                Ok((stream, name))
            })
        })
    }

    fn client(&self, own: Option<&str>) -> reqwest::Client {
        let ca = reqwest::Certificate::from_pem(self.ca.pem().as_bytes()).unwrap();
        let mut builder = reqwest::Client::builder().tls_certs_only([ca]);
        if let Some(name) = own {
            let (cert, key) = self.leaf(name);
            let identity = reqwest::Identity::from_pem(format!("{cert}{key}").as_bytes()).unwrap();
            builder = builder.identity(identity);
        }
        client(builder)
    }
}

#[tokio::test]
async fn a_client_with_a_certificate_is_whom_the_configuration_names() {
    drop(rustls::crypto::ring::default_provider().install_default());
    let signed = Signed::new();
    let clients = "dns:ci.example = deployer iris".parse().unwrap();
    let bench = Bench::with(vec![super::key("viewer", Role::Viewer, &[])], clients).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(serve(listener, Arc::clone(&bench.api), Some(signed.tls())));
    let url = |path: &str| format!("https://localhost:{port}/admin/v1{path}");
    let status = async |client: &reqwest::Client, path: &str| {
        client.post(url(path)).send().await.unwrap().status().as_u16()
    };
    let named = signed.client(Some("ci.example"));
    assert_eq!(status(&named, "/models/iris:rollback").await, 200);
    assert_eq!(status(&named, "/models/risk:rollback").await, 404, "of another team");
    assert_eq!(status(&named, "/drain").await, 403);
    let [change] = &bench.desk.changes()[..] else { panic!("one is expected") };
    assert!(change.contains("by dns:ci.example"), "{change}");
    // A token goes first, a right one and a wrong one.
    let viewer = named.post(url("/models/iris:rollback")).bearer_auth(bench.token("viewer"));
    assert_eq!(viewer.send().await.unwrap().status().as_u16(), 403);
    let wrong = named.get(url("/models")).bearer_auth("wrong").send().await.unwrap();
    assert_eq!(wrong.status().as_u16(), 401);
    for nobody in [signed.client(Some("other.example")), signed.client(None)] {
        assert_eq!(status(&nobody, "/models/iris:rollback").await, 401);
    }
    let plain = exchange(&format!("127.0.0.1:{port}"), b"GET / HTTP/1.1\r\n\r\n").await;
    assert!(!plain.contains("HTTP/1.1 "), "{plain}");
}

#[tokio::test]
async fn events_are_streamed() {
    let (bench, address) = listening().await;
    let client = client(reqwest::Client::builder());
    let url = format!("http://{address}/admin/v1/events?after=0");
    let mut answer = client.get(&url).bearer_auth(bench.token("auditor")).send().await.unwrap();
    assert_eq!(answer.headers()["content-type"], "text/event-stream");
    bench.desk.journal_one("traffic.put", "iris");
    let mut text = String::new();
    while !text.contains("\n\ndata") && !text.contains("event: traffic.put\ndata: {") {
        let chunk = tokio::time::timeout(Duration::from_secs(5), answer.chunk()).await.unwrap();
        text += std::str::from_utf8(&chunk.unwrap().unwrap()).unwrap();
    }
    assert!(text.contains("id: 1\n"), "{text}");
}

#[tokio::test]
async fn heads_that_are_too_large_or_none_are_refused() {
    let (_bench, address) = listening().await;
    let large = format!("GET / HTTP/1.1\r\nhost: localhost\r\nx: {}\r\n\r\n", "x".repeat(20_000));
    assert!(exchange(&address, large.as_bytes()).await.starts_with("HTTP/1.1 431 "), "large");
    let many: String = (0..200).map(|n| format!("x-{n}: y\r\n")).collect();
    let many = format!("GET / HTTP/1.1\r\nhost: localhost\r\n{many}\r\n");
    assert!(exchange(&address, many.as_bytes()).await.starts_with("HTTP/1.1 431 "), "many");
    let none = exchange(&address, b"\x16\x03\x01\x00\xa5hello, is this TLS?\r\n\r\n").await;
    assert!(none.is_empty() || none.starts_with("HTTP/1.1 400 "), "{none}");
    let twice = "GET /admin/v1/health HTTP/1.1\r\nhost: localhost\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    assert!(exchange(&address, twice.as_bytes()).await.starts_with("HTTP/1.1 400 "));
    let fine = "GET /admin/v1/health HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    assert!(exchange(&address, fine.as_bytes()).await.starts_with("HTTP/1.1 200 "));
}

#[tokio::test]
async fn who_is_silent_is_closed() {
    let (_bench, address) = listening().await;
    let fine = "GET /admin/v1/health HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let preface = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0";
    let cases = [
        ("sends nothing", "", limits::IDLE_MAX),
        ("begins a head", "GET /admin/v1/health HTTP/1.1\r\nhost: loc", limits::HEADER_WAIT_MAX),
        ("has been answered", fine, limits::IDLE_MAX),
        ("begins HTTP/2", preface, limits::IDLE_MAX),
    ];
    for (what, sent, max) in cases {
        let mut stream = TcpStream::connect(&address).await.unwrap();
        stream.write_all(sent.as_bytes()).await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        // From here on waiting costs nothing.
        tokio::time::pause();
        let begun = tokio::time::Instant::now();
        let mut answer = Vec::new();
        let limit = max + limits::LAST_ANSWER_MAX + Duration::from_secs(5);
        let closed = tokio::time::timeout(limit, stream.read_to_end(&mut answer)).await;
        let waited = begun.elapsed();
        tokio::time::resume();
        assert!(closed.is_ok(), "{what}: still open after {waited:?}");
        assert!(waited <= max + Duration::from_secs(5), "{what}: {waited:?}");
        assert_eq!(!answer.is_empty(), sent == fine || sent == preface, "{what}");
    }
}
