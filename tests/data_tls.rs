//! The data listeners over TLS: the same gateway, its limits included, and certificates that change
//! while it serves.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::Request;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use rcgen::{CertificateParams, KeyPair};
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tidegate::batch::ThreadBudget;
use tidegate::domain::BatchSettings;
use tidegate::engine::Model as _;
use tidegate::engine::fake::FakeModel;
use tidegate::observe::Observer;
use tidegate::proto::inference as pb;
use tidegate::transport::Settings;
use tidegate::transport::listener::Listeners;
use tidegate::transport::tls::{Files, Tls};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

#[expect(unreachable_pub, reason = "shared with other tests and the benchmarks")]
#[path = "support/gateway.rs"]
mod gateway;

struct Server {
    tls: Arc<Tls>,
    address: SocketAddr,
    observer: Arc<Observer>,
    folder: tempfile::TempDir,
    _listeners: Listeners,
}

/// Puts a new certificate in place; gives a client's end that trusts this one alone.
fn renew(folder: &std::path::Path, protocols: &[&str]) -> TlsConnector {
    let key = KeyPair::generate().unwrap();
    let params = CertificateParams::new(vec!["gateway".to_owned()]).unwrap();
    let cert = params.self_signed(&key).unwrap();
    std::fs::write(folder.join("key.pem"), key.serialize_pem()).unwrap();
    std::fs::write(folder.join("cert.pem"), cert.pem()).unwrap();
    connector(cert.der(), protocols)
}

fn connector(trusted: &CertificateDer<'_>, protocols: &[&str]) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.clone().into_owned()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = protocols.iter().map(|name| name.as_bytes().to_vec()).collect();
    TlsConnector::from(Arc::new(config))
}

async fn start(settings: Settings) -> (Server, TlsConnector) {
    let folder = tempfile::tempdir().unwrap();
    let client = renew(folder.path(), &[]);
    let at = |name: &str| folder.path().join(name);
    let files = Files { cert: at("cert.pem"), key: at("key.pem"), client_ca: None };
    let tls = Tls::open(files).unwrap();
    let observer = Observer::new(tidegate::observe::Settings::default());
    let fake = FakeModel::new(2, 1.0);
    let model = gateway::served(
        &observer,
        &Arc::new(ThreadBudget::new(2)),
        "m",
        fake.signature(),
        vec![fake.session().unwrap()],
        BatchSettings::default(),
    );
    let api = gateway::api(
        Arc::clone(&observer),
        Arc::new(gateway::NoControl),
        [model],
        tidegate::gateway::Settings::default(),
        Settings { tls: Some(Arc::clone(&tls)), ..settings },
    );
    let mut listeners = Listeners::new(api).unwrap();
    let socket = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = socket.local_addr().unwrap();
    listeners.serve(socket);
    (Server { tls, address, observer, folder, _listeners: listeners }, client)
}

impl Server {
    async fn connect(&self, client: &TlsConnector) -> std::io::Result<TlsStream<TcpStream>> {
        let stream = TcpStream::connect(self.address).await?;
        client.connect(ServerName::try_from("gateway").unwrap(), stream).await
    }

    fn closed(&self, reason: &str) -> bool {
        let page = String::from_utf8(self.observer.page(None).1.to_vec()).unwrap();
        let series = format!("tidegate_connections_closed_total{{reason=\"{reason}\"}} ");
        page.lines().any(|line| line.strip_prefix(&series).is_some_and(|count| count != "0"))
    }

    async fn closes(&self, reason: &str) -> Duration {
        let started = Instant::now();
        while !self.closed(reason) {
            assert!(started.elapsed() < Duration::from_secs(30), "{reason}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        started.elapsed()
    }
}

const BODY: &str = r#"{"inputs":[{"name":"x","datatype":"FP32","shape":[1,2],"data":[1,2]}]}"#;

fn message() -> Bytes {
    let data: Vec<u8> = [1.0_f32, 2.0].iter().flat_map(|value| value.to_le_bytes()).collect();
    let request = pb::ModelInferRequest {
        model_name: "m".to_owned(),
        inputs: vec![pb::model_infer_request::InferInputTensor {
            name: "x".to_owned(),
            datatype: "FP32".to_owned(),
            shape: vec![1, 2],
            ..Default::default()
        }],
        raw_input_contents: vec![data.into()],
        ..Default::default()
    };
    let mut framed = BytesMut::new();
    framed.put_u8(0);
    framed.put_u32(u32::try_from(request.encoded_len()).unwrap());
    request.encode(&mut framed).unwrap();
    framed.freeze()
}

#[tokio::test(flavor = "multi_thread")]
async fn both_protocols_over_tls() {
    let (server, client) = start(Settings::default()).await;
    let stream = TokioIo::new(server.connect(&client).await.unwrap());
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    for _ in 0..3 {
        sender.ready().await.unwrap();
        let request = Request::post("/v2/models/m/infer").header("host", "gateway");
        let request = request.body(Full::new(Bytes::from(BODY))).unwrap();
        let answer = sender.send_request(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(String::from_utf8_lossy(&body).contains("[2.0,3.0]"), "{body:?}");
    }
    for (protocols, agreed) in
        [(&["h2"][..], Some("h2")), (&[], None), (&["h2", "http/1.1"], Some("h2"))]
    {
        let client = renewed_protocols(&server, protocols);
        let stream = server.connect(&client).await.unwrap();
        let said = stream.get_ref().1.alpn_protocol().map(|name| name.to_vec());
        assert_eq!(said.as_deref(), agreed.map(str::as_bytes));
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream))
                .await
                .unwrap();
        tokio::spawn(connection);
        let request = Request::post("https://gateway/inference.GRPCInferenceService/ModelInfer");
        let request = request.header("content-type", "application/grpc").header("te", "trailers");
        let request = request.body(Full::new(message())).unwrap();
        let answer = sender.send_request(request).await.unwrap();
        assert_eq!(answer.status(), 200);
        let body = answer.into_body().collect().await.unwrap();
        let status = body.trailers().and_then(|trailers| trailers.get("grpc-status").cloned());
        assert_eq!(status.unwrap(), "0");
        let decoded = pb::ModelInferResponse::decode(&body.to_bytes()[5..]).unwrap();
        assert_eq!(decoded.raw_output_contents[0].len(), 8);
    }
}

/// A client that trusts what is in place and says that it speaks these.
fn renewed_protocols(server: &Server, protocols: &[&str]) -> TlsConnector {
    use rustls::pki_types::pem::PemObject as _;
    let cert = CertificateDer::from_pem_file(server.folder.path().join("cert.pem")).unwrap();
    connector(&cert, protocols)
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_does_not_speak_tls_is_not_answered() {
    let (server, client) = start(Settings::default()).await;
    let mut plain = TcpStream::connect(server.address).await.unwrap();
    plain.write_all(b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    drop(plain.read_to_end(&mut answer).await);
    assert!(!String::from_utf8_lossy(&answer).contains("HTTP"), "{answer:?}");
    assert!(server.connect(&client).await.is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn times_hold_over_tls() {
    let settings = Settings {
        header_timeout: Duration::from_millis(500),
        write_timeout: Duration::from_secs(1),
        ..Settings::default()
    };
    let (server, client) = start(settings).await;
    // One that connects and says nothing, and one that stops in the middle of its handshake.
    let silent = TcpStream::connect(server.address).await.unwrap();
    let mut half = TcpStream::connect(server.address).await.unwrap();
    half.write_all(&[22, 3, 1, 2]).await.unwrap();
    let took = server.closes("header_timeout").await;
    assert!(took < Duration::from_secs(5), "{took:?}");
    drop((silent, half));
    // One that asks for much and takes nothing.
    let mut greedy = server.connect(&client).await.unwrap();
    let rows = 4096;
    let numbers = vec!["1"; rows * 2].join(",");
    let body = format!(
        r#"{{"inputs":[{{"name":"x","datatype":"FP32","shape":[{rows},2],"data":[{numbers}]}}]}}"#
    );
    let request = format!(
        "POST /v2/models/m/infer HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let asking = async {
        // It stops being read long before all is sent.
        for _ in 0..2000 {
            if greedy.write_all(request.as_bytes()).await.is_err() {
                break;
            }
        }
    };
    let started = Instant::now();
    tokio::select! {
        () = asking => {}
        _ = server.closes("write_stall") => {}
    }
    server.closes("write_stall").await;
    let took = started.elapsed();
    assert!(took >= Duration::from_secs(1), "{took:?}");
    eprintln!("a client that takes nothing was cut {took:?} after it began");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_certificate_is_used_within_five_seconds() {
    let (server, before) = start(Settings::default()).await;
    let following = tokio::spawn(Arc::clone(&server.tls).follow());
    let mut open = server.connect(&before).await.unwrap();
    let after = renew(server.folder.path(), &[]);
    let started = Instant::now();
    while server.connect(&after).await.is_err() {
        assert!(started.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    eprintln!("a renewed certificate was in use after {:?}", started.elapsed());
    assert!(server.connect(&before).await.is_err());
    // Who was connected notices nothing.
    open.write_all(b"GET /v2/health/live HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        .await
        .unwrap();
    let mut answer = String::new();
    open.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    following.abort();
}
