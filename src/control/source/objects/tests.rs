use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use super::*;
use crate::control::secret::SecretRef;
use crate::control::source::faults::{BACKOFF, Reply, Request, Server, TIMES, file, text};

/// Objects by key, as a bucket `models` of S3 would hold them.
#[derive(Clone)]
struct World(BTreeMap<String, Vec<u8>>);

/// More than one part.
fn content() -> Vec<u8> {
    (0..300_000_u32).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

fn tag(content: &[u8]) -> String {
    format!("\"{}-{}\"", content.len(), content.first().copied().unwrap_or(0))
}

impl World {
    fn new(objects: &[(&str, &[u8])]) -> Self {
        let objects = objects.iter().map(|(key, content)| ((*key).to_owned(), content.to_vec()));
        Self(objects.collect())
    }

    fn answer(&self, request: &Request) -> Reply {
        if request.path == "/models" {
            return self.list(request);
        }
        match self.0.get(request.path.strip_prefix("/models/").unwrap_or_default()) {
            None => text(404, "<Error><Code>NoSuchKey</Code></Error>"),
            Some(content) => {
                let own = tag(content);
                match request.headers.get("if-match") {
                    Some(wanted) if *wanted != own => text(412, ""),
                    _ => file(request, content, &own),
                }
            }
        }
    }

    /// `ListObjectsV2`, three keys a page.
    fn list(&self, request: &Request) -> Reply {
        let prefix = request.query.get("prefix").cloned().unwrap_or_default();
        let from = request.query.get("continuation-token").cloned().unwrap_or_default();
        let delimited = request.query.contains_key("delimiter");
        let mut page = String::new();
        let below = self.0.iter().filter(|(key, _)| key.starts_with(&prefix));
        let mut prefixes = std::collections::BTreeSet::new();
        let mut count = 0;
        let mut next = None;
        for (key, content) in below.filter(|(key, _)| **key > from) {
            if let (true, Some(at)) = (delimited, key[prefix.len()..].find('/')) {
                prefixes.insert(key[..=prefix.len() + at].to_owned());
                continue;
            }
            if count == 3 {
                break;
            }
            count += 1;
            next = Some(key.clone());
            let key = key.replace('&', "&amp;").replace('<', "&lt;");
            page.push_str(&format!(
                "<Contents><Key>{key}</Key><LastModified>2026-01-31T09:00:00.000Z</LastModified>\
                 <ETag>{}</ETag><Size>{}</Size></Contents>",
                tag(content).replace('"', "&quot;"),
                content.len()
            ));
        }
        for prefix in prefixes {
            page.push_str(&format!("<CommonPrefixes><Prefix>{prefix}</Prefix></CommonPrefixes>"));
        }
        let token = next.filter(|_| count == 3 && !delimited);
        let token = token.map_or_else(String::new, |token| {
            format!("<NextContinuationToken>{token}</NextContinuationToken>")
        });
        text(200, &format!("<ListBucketResult>{page}{token}</ListBucketResult>"))
    }
}

fn source(server: &Server, change: impl FnOnce(&mut Settings)) -> Objects {
    let mut settings = Settings::new("unused", "unused");
    settings.source.store.endpoint = Some(format!("http://{}", server.address).parse().unwrap());
    let key = std::env::temp_dir().join(format!("tidegate-test-key-{}", std::process::id()));
    std::fs::write(&key, "not-a-secret").unwrap();
    settings.source.store.key_id = Some(SecretRef::File(key.clone()));
    settings.source.store.secret = Some(SecretRef::File(key));
    change(&mut settings);
    Objects::with("s3://models/prod".parse().unwrap(), &settings, TIMES, BACKOFF).unwrap()
}

async fn serving(world: World) -> Server {
    Server::start(move |request| world.answer(request)).await
}

fn name(text: &str) -> ModelName {
    text.parse().unwrap()
}

fn version(number: u64) -> Version {
    Version::new(number).unwrap()
}

async fn staged(source: &Objects) -> Result<Vec<u8>, SourceError> {
    let dir = tempfile::tempdir().unwrap();
    source.stage(&name("m"), version(1), dir.path()).await?;
    Ok(std::fs::read(dir.path().join("m/1/model.onnx")).unwrap())
}

fn usual() -> World {
    World::new(&[
        ("prod/m/1/model.onnx", &content()),
        ("prod/m/1/samples/a.json", b"{}"),
        ("prod/m/2/model.onnx", b"second"),
        ("prod/m/config.pbtxt", b"max_batch_size: 4"),
        ("prod/m/notes/draft.txt", b"x"),
        ("prod/n/1/model.onnx", b"n"),
        ("prod/no name/1/model.onnx", b"x"),
        ("prod/README", b"x"),
        ("production/m/9/model.onnx", b"x"),
        ("m/9/model.onnx", b"x"),
    ])
}

#[tokio::test]
async fn a_bucket_is_listed_and_staged() {
    let server = serving(usual()).await;
    let source = source(&server, |_| {});
    let listing = source.list().await.unwrap();
    let names: Vec<&str> = listing.models.keys().map(ModelName::as_str).collect();
    assert_eq!(names, ["m", "n"]);
    assert_eq!(listing.notes.len(), 1, "{:?}", listing.notes);
    let versions = &listing.models[&name("m")].versions;
    assert_eq!(versions.keys().map(|version| version.get()).collect::<Vec<_>>(), [1, 2]);
    // Older than the quiet period and any skew at the first look.
    assert!(versions.values().all(|version| version.settled && version.problem.is_none()));
    assert_eq!(listing.recheck, None);
    let dir = tempfile::tempdir().unwrap();
    let staged = source.stage(&name("m"), version(1), dir.path()).await.unwrap();
    assert_eq!(staged.fingerprint, versions[&version(1)].fingerprint);
    assert_eq!((staged.files, staged.bytes), (2, 300_002));
    assert!(std::fs::read(dir.path().join("m/1/model.onnx")).unwrap() == content());
    assert_eq!(std::fs::read(dir.path().join("m/1/samples/a.json")).unwrap(), b"{}");
    assert_eq!(std::fs::read(dir.path().join("m/config.pbtxt")).unwrap(), b"max_batch_size: 4");
    assert!(!dir.path().join("m/2").exists());
    let gone = source.stage(&name("m"), version(3), dir.path()).await;
    assert!(matches!(gone, Err(SourceError::Missing { .. })), "{gone:?}");
    let lineage = source.lineage(&name("m"), version(1)).await.unwrap();
    assert_eq!(lineage.registry.unwrap().artifact.as_deref(), Some("prod/m/1"));
}

#[tokio::test]
async fn what_is_new_waits_unless_its_list_of_digests_is_there() {
    let world = Arc::new(Mutex::new(usual()));
    let shared = Arc::clone(&world);
    let server = Server::start(move |request| shared.lock().answer(request)).await;
    let source = source(&server, |settings| {
        settings.source.quiet = Duration::from_millis(300);
    });
    let settled =
        |listing: &Listing, at: u64| listing.models[&name("m")].versions[&version(at)].settled;
    source.list().await.unwrap();
    let put = |key: &str, content: &[u8]| {
        world.lock().0.insert(key.to_owned(), content.to_vec());
    };
    put("prod/m/3/model.onnx", b"third");
    let listing = source.list().await.unwrap();
    assert!(!settled(&listing, 3));
    assert!(listing.recheck.is_some_and(|wait| wait <= Duration::from_millis(300)));
    put("prod/m/3/weights.bin", b"w");
    tokio::time::sleep(Duration::from_millis(350)).await;
    assert!(!settled(&source.list().await.unwrap(), 3), "it changed meanwhile");
    tokio::time::sleep(Duration::from_millis(350)).await;
    assert!(settled(&source.list().await.unwrap(), 3));

    let sums = format!("{}  model.onnx\n", "0".repeat(64));
    put("prod/m/4/SHA256SUMS", sums.as_bytes());
    assert!(!settled(&source.list().await.unwrap(), 4), "what it names is not there");
    put("prod/m/4/model.onnx", b"fourth");
    assert!(settled(&source.list().await.unwrap(), 4), "at once");
    put("prod/m/5/model.onnx", b"fifth");
    put("prod/m/5/SHA256SUMS", sums.trim_end().as_bytes());
    assert!(!settled(&source.list().await.unwrap(), 5), "its last line has no end");
}

#[tokio::test]
async fn hostile_keys_hide_their_own_version_only() {
    let mut world = usual();
    let deep = format!("prod/n/1/{}", ["d"; 20].join("/"));
    for (key, number) in [
        ("prod/m/3/a\\..\\b", 3),
        ("prod/m/4/nul.txt", 4),
        ("prod/m/5/c:x", 5),
        ("prod/m/6/a\u{202e}b", 6),
        (deep.as_str(), 0),
    ] {
        world.0.insert(key.to_owned(), b"x".to_vec());
        if number > 0 {
            world.0.insert(format!("prod/m/{number}/model.onnx"), b"x".to_vec());
        }
    }
    world.0.insert("prod/m/7/a".to_owned(), b"file".to_vec());
    world.0.insert("prod/m/7/a/b".to_owned(), b"in a folder".to_vec());
    // A marker of a folder is none.
    world.0.insert("prod/m/2/sub".to_owned(), Vec::new());
    world.0.insert("prod/m/2/sub/x".to_owned(), b"x".to_vec());
    world.0.insert("prod/m/2".to_owned(), Vec::new());
    let server = serving(world.clone()).await;
    let listing = source(&server, |_| {}).list().await.unwrap();
    let versions = &listing.models[&name("m")].versions;
    let bad: Vec<u64> = versions
        .iter()
        .filter(|(_, found)| found.problem.is_some())
        .map(|(version, _)| version.get())
        .collect();
    assert_eq!(bad, [3, 4, 5, 6, 7], "{versions:?}");
    assert!(listing.models[&name("n")].versions[&version(1)].problem.is_some());
    assert_eq!(versions[&version(2)].files, 2);

    // A key that is no path at all: the library refuses the page, and the model is hidden.
    for key in ["prod/n/1/../../../etc/passwd", "prod/n/1//x", "prod/n/1/./x"] {
        let mut world = usual();
        world.0.insert(key.to_owned(), b"x".to_vec());
        let server = serving(world).await;
        let source = source(&server, |_| {});
        let listing = source.list().await.unwrap();
        assert!(listing.models[&name("n")].problem.is_some(), "{key}");
        assert!(listing.models[&name("m")].versions[&version(1)].settled, "{key}");
        assert!(staged(&source).await.is_ok(), "{key}");
        let dir = tempfile::tempdir().unwrap();
        assert!(source.stage(&name("n"), version(1), dir.path()).await.is_err(), "{key}");
    }
}

#[tokio::test]
async fn limits_are_kept() {
    let server = serving(usual()).await;
    let small = source(&server, |settings| settings.model_size_max = 1000);
    let listing = small.list().await.unwrap();
    assert!(listing.models[&name("m")].versions[&version(1)].problem.is_some());
    assert!(listing.models[&name("m")].versions[&version(2)].problem.is_none());
    assert!(staged(&small).await.is_err());
}

#[tokio::test]
async fn faults_bring_the_right_bytes_or_none() {
    type Fault = fn(&World, &Request) -> Option<Reply>;
    // Whether the right bytes have to come.
    let faults: &[(&str, bool, Fault)] = &[
        ("each second request is answered 500", true, |_, request| {
            (request.before % 2 == 0).then(|| text(500, "<Error/>"))
        }),
        ("each second connection is reset", true, |_, request| {
            (request.before % 2 == 0).then_some(Reply::Reset)
        }),
        ("each second answer is cut", true, |world, request| match world.answer(request) {
            Reply::Whole(status, headers, body) if request.before % 2 == 0 => {
                let at = body.len() / 2;
                Some(Reply::Cut(Box::new(Reply::Whole(status, headers, body)), at))
            }
            _ => None,
        }),
        ("each fourth request is never answered", true, |_, request| {
            (request.before % 4 == 0).then_some(Reply::Hang)
        }),
        ("500", false, |_, _| Some(text(500, "<Error/>"))),
        ("403", false, |_, _| Some(text(403, "<Error/>"))),
        ("reset", false, |_, _| Some(Reply::Reset)),
        ("silence", false, |_, request| {
            request.path.ends_with("m/1/model.onnx").then_some(Reply::Hang)
        }),
        ("no XML", false, |_, request| (request.path == "/models").then(|| text(200, "{}"))),
        ("a listing without end", false, |_, request| {
            (request.path == "/models").then_some(Reply::Endless)
        }),
        ("a larger size than it has", false, |_, request| {
            let page = "<ListBucketResult><Contents><Key>prod/m/1/model.onnx</Key><LastModified>2026-01-31T09:00:00.000Z</LastModified><Size>99</Size></Contents></ListBucketResult>";
            if request.path == "/models" {
                return Some(text(200, page));
            }
            request.path.ends_with("m/1/model.onnx").then(|| file(request, b"short", "\"x\""))
        }),
        ("a smaller size than it has", false, |_, request| {
            let page = "<ListBucketResult><Contents><Key>prod/m/1/model.onnx</Key><LastModified>2026-01-31T09:00:00.000Z</LastModified><Size>9</Size></Contents></ListBucketResult>";
            (request.path == "/models").then(|| text(200, page))
        }),
        ("another range than asked for", false, |world, request| {
            let content = &world.0["prod/m/1/model.onnx"];
            let size = content.len();
            let headers = vec![
                ("Content-Range", format!("bytes 1-{}/{size}", size - 1)),
                ("ETag", tag(content)),
                ("Last-Modified", "Sat, 31 Jan 2026 09:00:00 GMT".to_owned()),
            ];
            request
                .path
                .ends_with("m/1/model.onnx")
                .then(|| Reply::Whole(206, headers, content[1..].to_vec()))
        }),
        ("another file since it was listed", false, |world, request| {
            request.path.ends_with("m/1/model.onnx").then(|| {
                match request.headers.contains_key("if-match") {
                    true => text(412, ""),
                    false => file(request, &world.0["prod/m/1/model.onnx"], "\"x\""),
                }
            })
        }),
        ("a redirect", false, |_, request| {
            let to = request.headers.get("host")?.replace("127.0.0.1", "127.0.0.3");
            let headers = vec![("Location", format!("http://{to}{}", request.path))];
            Some(Reply::Whole(307, headers, Vec::new()))
        }),
    ];
    for (name, right, fault) in faults {
        let world = usual();
        let server = Server::start(move |request| {
            fault(&world, request).unwrap_or_else(|| world.answer(request))
        })
        .await;
        let source = source(&server, |_| {});
        let started = Instant::now();
        match staged(&source).await {
            Ok(bytes) => assert!(*right && bytes == content(), "{name}: {} bytes", bytes.len()),
            Err(error) => {
                assert!(!right, "{name}: {error}");
                assert!(error.to_string().chars().count() < 600, "{name}: {error}");
            }
        }
        assert!(started.elapsed() < Duration::from_secs(30), "{name} took {:?}", started.elapsed());
    }
}

#[tokio::test]
async fn pages_without_end_are_left() {
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    let server = Server::start(move |_| {
        let at = counter.fetch_add(1, Ordering::SeqCst);
        let mut page = String::new();
        for key in 0..1000 {
            page.push_str(&format!(
                "<Contents><Key>prod/m/1/{at}-{key}</Key><LastModified>2026-01-31T09:00:00.000Z\
                 </LastModified><Size>1</Size></Contents>"
            ));
        }
        let token = format!("<NextContinuationToken>{at}</NextContinuationToken>");
        text(200, &format!("<ListBucketResult>{page}{token}</ListBucketResult>"))
    })
    .await;
    let error = source(&server, |_| {}).list().await.unwrap_err();
    assert!(matches!(error, SourceError::Limit { .. }), "{error}");
    assert!(count.load(Ordering::SeqCst) <= 7);
}

#[tokio::test]
async fn metadata_services_are_not_asked_for_credentials() {
    // Without credentials the library asks 169.254.169.254 for some: the gate says no.
    let server = serving(usual()).await;
    let source = source(&server, |settings| {
        settings.source.store.key_id = None;
        settings.source.store.secret = None;
    });
    if std::env::vars().any(|(name, _)| name.starts_with("AWS_")) {
        return;
    }
    let error = source.list().await.unwrap_err();
    assert!(matches!(error, SourceError::Address(_)), "{error}");
    assert!(error.to_string().contains("169.254.169.254"), "{error}");
    assert_eq!(server.hits.load(Ordering::SeqCst), 0);
}
