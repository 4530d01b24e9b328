use std::fs;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, SanType};
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex};
use tokio_rustls::TlsConnector;

use super::*;

type Ca = CertifiedIssuer<'static, KeyPair>;

fn ca(name: &str) -> Ca {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, name);
    CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Certificate and key as PEM.
fn leaf(ca: &Ca, common: &str, names: Vec<SanType>) -> (String, String) {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, common);
    params.subject_alt_names = names;
    let key = KeyPair::generate().unwrap();
    (params.signed_by(&key, ca).unwrap().pem(), key.serialize_pem())
}

fn server_leaf(ca: &Ca) -> (String, String) {
    leaf(ca, "gateway", vec![SanType::DnsName("gateway".try_into().unwrap())])
}

struct Place {
    folder: tempfile::TempDir,
    files: Files,
}

impl Place {
    fn new(ca: &Ca, client_ca: Option<&Ca>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let files = Files {
            cert: at("cert.pem"),
            key: at("key.pem"),
            client_ca: client_ca.map(|_| at("ca.pem")),
        };
        let place = Self { folder, files };
        place.put(&server_leaf(ca));
        if let Some(client_ca) = client_ca {
            fs::write(place.folder.path().join("ca.pem"), client_ca.pem()).unwrap();
        }
        place
    }

    fn put(&self, (cert, key): &(String, String)) {
        fs::write(&self.files.cert, cert).unwrap();
        fs::write(&self.files.key, key).unwrap();
    }
}

fn client(ca: &Ca, own: Option<&(String, String)>) -> TlsConnector {
    let mut roots = RootCertStore::empty();
    roots.add(ca.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots);
    let config = match own {
        None => builder.with_no_client_auth(),
        Some((cert, key)) => {
            let cert = CertificateDer::from_pem_slice(cert.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
            builder.with_client_auth_cert(vec![cert], key).unwrap()
        }
    };
    TlsConnector::from(Arc::new(config))
}

/// One handshake and a word each way; the client's name as the server sees it.
async fn shake(tls: &Tls, client: &TlsConnector) -> io::Result<Option<String>> {
    let (near, far): (DuplexStream, DuplexStream) = duplex(64 << 10);
    let serving = async {
        let mut stream = tls.accept(far).await?;
        let name = peer_name(&stream).map(|name| name.to_string());
        let mut word = [0; 4];
        stream.read_exact(&mut word).await?;
        stream.write_all(&word).await?;
        stream.shutdown().await?;
        Ok(name)
    };
    let asking = async {
        let name = ServerName::try_from("gateway").unwrap();
        let mut stream = client.connect(name, near).await?;
        stream.write_all(b"ping").await?;
        let mut word = [0; 4];
        stream.read_exact(&mut word).await?;
        Ok::<_, io::Error>(())
    };
    let (served, asked): (io::Result<Option<String>>, io::Result<()>) =
        tokio::join!(serving, asking);
    asked?;
    served
}

#[tokio::test]
async fn a_client_is_known_by_its_certificate_or_unknown() {
    let (ours, theirs, strangers) = (ca("ours"), ca("theirs"), ca("strangers"));
    let place = Place::new(&ours, Some(&theirs));
    let tls = Tls::open(place.files.clone()).unwrap();
    let shown = async |own: Option<(String, String)>| {
        shake(&tls, &client(&ours, own.as_ref())).await.map_err(|error| error.kind())
    };
    let uri = |text: &str| SanType::URI(text.try_into().unwrap());
    assert_eq!(shown(None).await, Ok(None), "a token may come instead");
    let named = leaf(&theirs, "alice", vec![uri("spiffe://prod/ci")]);
    assert_eq!(shown(Some(named)).await, Ok(Some("uri:spiffe://prod/ci".to_owned())));
    let common = leaf(&theirs, "alice", vec![]);
    assert_eq!(shown(Some(common)).await, Ok(Some("cn:alice".to_owned())));
    let ambiguous = leaf(&theirs, "alice", vec![uri("spiffe://a/b"), uri("spiffe://a/c")]);
    assert_eq!(shown(Some(ambiguous)).await, Ok(None));
    assert!(shown(Some(leaf(&strangers, "alice", vec![]))).await.is_err());
    assert!(shown(Some(leaf(&ours, "alice", vec![]))).await.is_err(), "not the clients' CA");
    let mut old = CertificateParams::default();
    old.distinguished_name.push(DnType::CommonName, "alice");
    old.not_after = rcgen::date_time_ymd(2020, 1, 1);
    let key = KeyPair::generate().unwrap();
    let expired = (old.signed_by(&key, &theirs).unwrap().pem(), key.serialize_pem());
    assert!(shown(Some(expired)).await.is_err());
    // Without a CA for clients none is asked for, and none is believed.
    let tls = Tls::open(Files { client_ca: None, ..place.files.clone() }).unwrap();
    let named = leaf(&theirs, "alice", vec![]);
    assert_eq!(shake(&tls, &client(&ours, Some(&named))).await.unwrap(), None);
}

#[tokio::test]
async fn new_files_take_effect_and_garbage_does_not() {
    let (first, second) = (ca("first"), ca("second"));
    let place = Place::new(&first, Some(&first));
    let tls = Tls::open(place.files.clone()).unwrap();
    let trusts = async |ca: &Ca| shake(&tls, &client(ca, None)).await.is_ok();
    assert!(trusts(&first).await && !trusts(&second).await);
    assert!(!tls.reload().unwrap(), "nothing changed");
    let (cert, key) = server_leaf(&second);
    // Between two writes: a certificate without its key.
    fs::write(&place.files.cert, &cert).unwrap();
    let error = tls.reload().unwrap_err();
    assert!(matches!(error, TlsError::Pair { .. }), "{error}");
    assert!(trusts(&first).await);
    fs::write(&place.files.key, &key).unwrap();
    assert!(tls.reload().unwrap());
    assert!(trusts(&second).await && !trusts(&first).await);
    let other_key = server_leaf(&second).1;
    let ca_file = place.files.client_ca.clone().unwrap();
    let wrong: [(&Path, &str); 8] = [
        (&place.files.cert, ""),
        (&place.files.cert, "hello"),
        (&place.files.cert, &cert[..cert.len() / 2]),
        (&place.files.cert, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
        (&place.files.key, ""),
        (&place.files.key, &other_key),
        (&ca_file, ""),
        (&ca_file, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
    ];
    for (path, content) in wrong {
        let before = fs::read(path).unwrap();
        fs::write(path, content).unwrap();
        let error = tls.reload().unwrap_err().to_string();
        assert!(!error.contains("AAAA") && error.contains(".pem"), "{error}");
        assert!(Tls::open(place.files.clone()).is_err(), "{path:?} {content:?}");
        assert!(trusts(&second).await, "{path:?} {content:?}");
        fs::write(path, before).unwrap();
    }
    fs::write(&place.files.cert, vec![b'x'; (1 << 20) + 1]).unwrap();
    assert!(tls.reload().unwrap_err().to_string().contains("1048576"));
    fs::remove_file(&place.files.cert).unwrap();
    assert!(matches!(tls.reload(), Err(TlsError::Read { .. })));
    assert!(trusts(&second).await);
}

#[tokio::test]
async fn who_resumes_after_the_ca_changed_is_looked_at_again() {
    let (ours, theirs, others) = (ca("ours"), ca("theirs"), ca("others"));
    let place = Place::new(&ours, Some(&theirs));
    let tls = Tls::open(place.files.clone()).unwrap();
    // One connector remembers its sessions.
    let connector = client(&ours, Some(&leaf(&theirs, "alice", vec![])));
    for _ in 0..2 {
        assert_eq!(shake(&tls, &connector).await.unwrap(), Some("cn:alice".to_owned()));
    }
    fs::write(place.files.client_ca.as_ref().unwrap(), others.pem()).unwrap();
    assert!(tls.reload().unwrap());
    assert!(shake(&tls, &connector).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_handshake_that_does_not_go_on_ends() {
    let ours = ca("ours");
    let place = Place::new(&ours, None);
    let tls = Tls::open(place.files.clone()).unwrap();
    let started = tokio::time::Instant::now();
    let (_near, far) = duplex(1024);
    let error = tls.accept(far).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    assert_eq!(started.elapsed(), HANDSHAKE_MAX);
    let (mut near, far) = duplex(1024);
    near.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let error = tls.accept(far).await.map(drop).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotation_fails_no_handshake() {
    const ROTATIONS: usize = 200;
    let ours = ca("ours");
    let place = Place::new(&ours, None);
    let tls = Tls::open(place.files.clone()).unwrap();
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let shaking = {
        let (tls, stop, done) = (Arc::clone(&tls), Arc::clone(&stop), Arc::clone(&done));
        let connector = client(&ours, None);
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                shake(&tls, &connector).await.unwrap();
                done.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let mut changed = 0;
    for _ in 0..ROTATIONS {
        // In two writes, as tools do it; a look in between changes nothing.
        let (cert, key) = server_leaf(&ours);
        fs::write(&place.files.cert, cert).unwrap();
        assert!(tls.reload().is_err());
        fs::write(&place.files.key, key).unwrap();
        changed += usize::from(tls.reload().unwrap());
        tokio::task::yield_now().await;
    }
    stop.store(true, Ordering::Relaxed);
    shaking.await.unwrap();
    let done = done.load(Ordering::Relaxed);
    assert_eq!(changed, ROTATIONS);
    assert!(done > 0);
    eprintln!("{ROTATIONS} rotations, {done} handshakes, 0 failed");
}
