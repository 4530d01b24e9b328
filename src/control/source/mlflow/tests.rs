use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::json;

use super::*;
use crate::control::source::Location;
use crate::control::source::faults::{BACKOFF, Reply, Request, Server, TIMES, file, text};

const RUN: &str = "0f3a";
const ROOT: &str = "0/models/m-1/artifacts";
const MLMODEL: &str = "flavors:\n  onnx:\n    data: model.onnx\n  python_function: {data: model.onnx}\nrun_id: 0f3a\n";

/// More than one part, so that a download can break between two.
fn content() -> Vec<u8> {
    (0..300_000_u32).map(|at| u8::try_from(at % 251).unwrap()).collect()
}

/// What a healthy server answers.
struct World {
    content: Vec<u8>,
    mlmodel: String,
}

impl World {
    fn new(content: Vec<u8>) -> Self {
        Self { content, mlmodel: MLMODEL.to_owned() }
    }

    fn answer(&self, request: &Request) -> Reply {
        let json = |value: serde_json::Value| text(200, &value.to_string());
        let version = |number: u32| {
            json!({"name": "m", "version": number.to_string(), "creation_timestamp": 1769850000000_i64,
                   "status": "READY", "source": "models:/m-1", "run_id": RUN, "description": "d",
                   "tags": [{"key": "owner", "value": "risk"}]})
        };
        let path = request.path.strip_prefix("/prefix/api/2.0/").unwrap_or_default();
        match path {
            "mlflow/registered-models/search" => json(json!({"registered_models": [
                {"name": "m", "aliases": [{"alias": "champion", "version": "1"}, {"alias": "stable", "version": "2"},
                 {"alias": "7", "version": "1"}, {"alias": "gone", "version": "9"}], "tags": [{"key": "team", "value": "x"}]},
                {"name": "not a name"}]})),
            "mlflow/registered-models/get" if request.query["name"] == "m" => json(
                json!({"registered_model": {"name": "m", "aliases": [{"alias": "champion", "version": 1}]}}),
            ),
            "mlflow/model-versions/search" => {
                assert_eq!(request.query["filter"], "name='m'");
                match request.query.get("page_token").map(String::as_str) {
                    None => json(json!({"model_versions": [version(2)], "next_page_token": "two"})),
                    Some(_) => json(json!({"model_versions": [version(1)]})),
                }
            }
            "mlflow/model-versions/get" => {
                let number = request.query["version"].parse().unwrap();
                json(json!({"model_version": version(number)}))
            }
            "mlflow/model-versions/get-download-uri" => {
                json(json!({"artifact_uri": format!("mlflow-artifacts:/{ROOT}")}))
            }
            "mlflow/runs/get" => json(json!({"run": {
                "info": {"user_id": "bob", "start_time": 1769850000000_i64, "end_time": "1769850060000"},
                "data": {"metrics": [{"key": "auc", "value": 0.9}, {"key": "loss", "value": "NaN"}],
                         "params": [{"key": "k", "value": "3"}],
                         "tags": [{"key": "mlflow.source.git.commit", "value": "4f3c"},
                                  {"key": "mlflow.source.name", "value": "train.py"}]},
                "inputs": {"dataset_inputs": [{"tags": [{"key": "mlflow.data.context", "value": "training"}],
                           "dataset": {"name": "claims", "digest": "ab12", "source_type": "local"}}]}}})),
            "mlflow-artifacts/artifacts" => {
                let size = self.content.len();
                match request.query["path"].strip_prefix(ROOT).unwrap() {
                    "" => json(json!({"files": [
                        {"path": "MLmodel", "is_dir": false, "file_size": self.mlmodel.len()},
                        {"path": "model.onnx", "is_dir": false, "file_size": size},
                        {"path": "samples", "is_dir": true}]})),
                    "/samples" => json(
                        json!({"files": [{"path": "a.json", "is_dir": false, "file_size": "2"}]}),
                    ),
                    _ => text(404, "{}"),
                }
            }
            path => match path.strip_prefix(&format!("mlflow-artifacts/artifacts/{ROOT}/")) {
                Some("MLmodel") => file(request, self.mlmodel.as_bytes(), "\"m\""),
                Some("model.onnx") => file(request, &self.content, "\"o\""),
                Some("samples/a.json") => file(request, b"{}", "\"s\""),
                _ => text(404, r#"{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no"}"#),
            },
        }
    }
}

fn source(server: &Server, change: impl FnOnce(&mut Settings)) -> Mlflow {
    let url = format!("mlflow+http://{}/prefix/", server.address);
    let Ok(Location::Mlflow(tracking)) = url.parse() else { panic!("{url}") };
    let mut settings = Settings::new("unused", "unused");
    settings.source.quiet = Duration::ZERO;
    change(&mut settings);
    Mlflow::with(tracking, &settings, TIMES, BACKOFF).unwrap()
}

fn name() -> ModelName {
    "m".parse().unwrap()
}

fn version(number: u64) -> Version {
    Version::new(number).unwrap()
}

async fn healthy(content: Vec<u8>) -> Server {
    let world = World::new(content);
    Server::start(move |request| world.answer(request)).await
}

/// Stages version 1; what the model file holds.
async fn staged(source: &Mlflow) -> Result<Vec<u8>, SourceError> {
    let dir = tempfile::tempdir().unwrap();
    let staged = source.stage(&name(), version(1), dir.path()).await?;
    let model = std::fs::read(dir.path().join("m/1/model.onnx")).unwrap();
    assert_eq!(staged.files, 3);
    assert_eq!(std::fs::read(dir.path().join("m/1/samples/a.json")).unwrap(), b"{}");
    Ok(model)
}

#[tokio::test]
async fn a_registry_is_listed_staged_and_traced() {
    let server = healthy(content()).await;
    let source = source(&server, |settings| {
        settings.source.mlflow.stable_alias = Some("champion".to_owned());
    });
    let listing = source.list().await.unwrap();
    assert_eq!(listing.notes.len(), 1, "{:?}", listing.notes);
    let model = &listing.models[&name()];
    let labels: Vec<(String, u64)> =
        model.labels.iter().map(|(label, at)| (label.to_string(), at.get())).collect();
    // The alias that is configured is `stable`, whatever else is called so.
    assert_eq!(labels, [("champion".to_owned(), 1), ("stable".to_owned(), 1)]);
    assert_eq!(model.notes.len(), 2, "{:?}", model.notes);
    assert_eq!(model.tags["team"], "x");
    let first = &model.versions[&version(1)];
    assert!(first.settled && first.problem.is_none(), "{first:?}");
    assert_eq!(first.files, 3);
    assert_eq!(first.run.as_deref(), Some(RUN));
    assert_eq!(model.versions.len(), 2, "two pages");

    assert!(staged(&source).await.unwrap() == content());
    let again = source.list().await.unwrap();
    assert_eq!(again, listing, "looking and staging change nothing");

    let lineage = source.lineage(&name(), version(1)).await.unwrap();
    assert_eq!(lineage.owner.as_deref(), Some("risk"));
    assert_eq!(lineage.git.unwrap().commit.as_deref(), Some("4f3c"));
    let training = lineage.training.unwrap();
    assert_eq!(training.user.as_deref(), Some("bob"));
    assert_eq!(
        training.ended_at.unwrap().as_second() - training.started_at.unwrap().as_second(),
        60
    );
    assert_eq!(training.metrics.len(), 1, "NaN is no figure");
    assert_eq!(lineage.datasets[0].context.as_deref(), Some("training"));
    assert!(!source.describe().contains('@'));
}

#[tokio::test]
async fn a_model_by_name_that_is_not_registered_is_noted() {
    let server = healthy(vec![1; 100]).await;
    let url = format!("mlflow+http://{}/prefix/?models=m,other", server.address);
    let Ok(Location::Mlflow(tracking)) = url.parse() else { panic!("{url}") };
    let source =
        Mlflow::with(tracking, &Settings::new("unused", "unused"), TIMES, BACKOFF).unwrap();
    let listing = source.list().await.unwrap();
    assert_eq!(listing.models.len(), 1);
    assert_eq!(listing.notes, ["'other' is not registered"]);
}

#[tokio::test]
async fn credentials_are_sent_and_read_anew() {
    let world = World::new(vec![1; 100]);
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    std::fs::write(&token, "old\n").unwrap();
    let server = Server::start(move |request| match request.headers.get("authorization") {
        Some(value) if value == "Bearer new" => world.answer(request),
        _ => text(401, r#"{"error_code": "UNAUTHENTICATED", "message": "who?"}"#),
    })
    .await;
    let source = source(&server, |settings| {
        settings.source.mlflow.token = Some(super::super::SecretRef::File(token.clone()));
    });
    let error = source.list().await.unwrap_err();
    assert!(matches!(error, SourceError::Status { status: 401, .. }), "{error}");
    assert!(!error.to_string().contains("old"), "{error}");
    std::fs::write(&token, "new").unwrap();
    assert_eq!(source.list().await.unwrap().models.len(), 1);
    std::fs::remove_file(&token).unwrap();
    assert!(matches!(source.list().await, Err(SourceError::Secret(_))));
}

#[tokio::test]
async fn a_server_that_knows_no_ranges_is_read_whole() {
    let world = World::new(content());
    let server = Server::start(move |request| {
        if request.path.ends_with("model.onnx") {
            // As MLflow does when its artifacts are in a bucket of its own.
            return Reply::Whole(200, Vec::new(), world.content.clone());
        }
        match world.answer(request) {
            Reply::Whole(status, mut headers, body) => {
                headers.retain(|(name, _)| *name != "ETag");
                Reply::Whole(status, headers, body)
            }
            other => other,
        }
    })
    .await;
    assert!(staged(&source(&server, |_| {})).await.unwrap() == content());
}

#[tokio::test]
async fn a_model_of_another_name_is_configured() {
    let mut world = World::new(vec![1; 100]);
    world.mlmodel = MLMODEL.replace("model.onnx", "net.onnx");
    let server = Server::start(move |request| {
        if request.path.ends_with("/artifacts") {
            return text(
                200,
                &json!({"files": [
                {"path": "MLmodel", "is_dir": false, "file_size": world.mlmodel.len()},
                {"path": "tidegate.toml", "is_dir": false, "file_size": 27},
                {"path": "net.onnx", "is_dir": false, "file_size": 100}]})
                .to_string(),
            );
        }
        match request.path.rsplit('/').next() {
            Some("net.onnx") => file(request, &world.content, "\"o\""),
            Some("tidegate.toml") => file(request, b"[batch]\nsize_max = 4     \n\n", "\"t\""),
            _ => world.answer(request),
        }
    })
    .await;
    let source = source(&server, |_| {});
    let dir = tempfile::tempdir().unwrap();
    source.stage(&name(), version(1), dir.path()).await.unwrap();
    let manifest = manifest::read(&dir.path().join("m")).unwrap();
    assert_eq!(manifest.settings.model_file.as_deref(), Some("net.onnx"));
    assert_eq!(manifest.settings.batch.size_max, 4);
    assert!(dir.path().join("m/1/net.onnx").exists());
}

/// Faults that end by themselves: the right bytes arrive all the same.
#[tokio::test]
async fn passing_faults_are_overcome() {
    type Fault = fn(&Request, Reply) -> Reply;
    let faults: &[(&str, Fault)] = &[
        ("each second request is answered 500", |request, reply| match request.before % 2 {
            0 => text(500, "oops"),
            _ => reply,
        }),
        ("each second connection is reset", |request, reply| match request.before % 2 {
            0 => Reply::Reset,
            _ => reply,
        }),
        ("each third request is told to wait", |request, reply| match request.before % 3 {
            0 => text(429, ""),
            _ => reply,
        }),
        ("each second answer is cut in the middle", |request, reply| {
            match (request.before % 2, reply) {
                (0, Reply::Whole(status, headers, body)) => {
                    let at = body.len() / 2;
                    Reply::Cut(Box::new(Reply::Whole(status, headers, body)), at)
                }
                (_, reply) => reply,
            }
        }),
        ("each fourth request is never answered", |request, reply| match request.before % 4 {
            0 => Reply::Hang,
            _ => reply,
        }),
    ];
    for (name, fault) in faults {
        let world = World::new(content());
        let server = Server::start(move |request| fault(request, world.answer(request))).await;
        let source = source(&server, |_| {});
        let got = staged(&source).await;
        assert!(got.as_ref().is_ok_and(|got| *got == content()), "{name}: {:?}", got.err());
        let listing = source.list().await;
        assert!(listing.is_ok(), "{name}: {listing:?}");
    }
}

/// Faults that do not end: an error each time, never other bytes, and never long.
#[tokio::test]
async fn lasting_faults_never_bring_anything_wrong() {
    type Fault = fn(&World, &Request) -> Option<Reply>;
    const INDEX: &str = "/mlflow-artifacts/artifacts";
    let faults: &[(&str, Fault)] = &[
        ("500", |_, _| Some(text(500, &"<html>".repeat(1000)))),
        ("503 with a secret looking body", |_, _| Some(text(503, "\x1b[31mred"))),
        ("reset", |_, _| Some(Reply::Reset)),
        ("silence", |_, request| request.path.ends_with("get-download-uri").then_some(Reply::Hang)),
        ("no HTTP", |_, _| Some(Reply::Raw(b"SSH-2.0-OpenSSH\r\n".to_vec()))),
        ("an index that is HTML", |_, request| {
            request.path.ends_with(INDEX).then(|| text(200, "<html></html>"))
        }),
        ("an index of another kind", |_, request| {
            request.path.ends_with(INDEX).then(|| text(200, r#"{"files": {"a": 1}}"#))
        }),
        ("an index without end", |_, request| {
            request.path.ends_with(INDEX).then_some(Reply::Endless)
        }),
        ("folders in folders without end", |_, request| {
            let more = r#"{"files": [{"path": "d", "is_dir": true}]}"#;
            request.path.ends_with(INDEX).then(|| text(200, more))
        }),
        ("a hostile name", |_, request| {
            let files = r#"{"files": [{"path": "../../../etc/cron.d/x", "is_dir": false, "file_size": 1}]}"#;
            request.path.ends_with(INDEX).then(|| text(200, files))
        }),
        ("a size that is too large", |world, request| {
            let files = json!({"files": [{"path": "MLmodel", "is_dir": false, "file_size": world.mlmodel.len()},
                {"path": "model.onnx", "is_dir": false, "file_size": 99_000_000}]});
            request.path.ends_with(INDEX).then(|| text(200, &files.to_string()))
        }),
        ("a size that is too small", |world, request| {
            let files = json!({"files": [{"path": "MLmodel", "is_dir": false, "file_size": world.mlmodel.len()},
                {"path": "model.onnx", "is_dir": false, "file_size": 10}]});
            request.path.ends_with(INDEX).then(|| text(200, &files.to_string()))
        }),
        ("a size beyond the limit", |world, request| {
            let files = json!({"files": [{"path": "MLmodel", "is_dir": false, "file_size": world.mlmodel.len()},
                {"path": "model.onnx", "is_dir": false, "file_size": u64::MAX}]});
            request.path.ends_with(INDEX).then(|| text(200, &files.to_string()))
        }),
        ("another range than asked for", |world, request| {
            let size = world.content.len();
            let range = format!("bytes 1-{}/{size}", size - 1);
            let headers = vec![("Content-Range", range), ("ETag", "\"o\"".to_owned())];
            let whole = Reply::Whole(206, headers, world.content[1..].to_vec());
            let asked = request.headers.get("range").is_some_and(|range| range != "bytes=0-0");
            (asked && request.path.ends_with("model.onnx")).then_some(whole)
        }),
        ("more bytes than it says", |world, request| {
            let mut raw = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n".to_vec();
            raw.extend(&world.content);
            raw.push(0);
            request.path.ends_with("model.onnx").then_some(Reply::Raw(raw))
        }),
        ("always cut before it starts", |world, request| {
            let reply = file(request, &world.content, "\"o\"");
            request.path.ends_with("model.onnx").then(|| Reply::Cut(Box::new(reply), 10))
        }),
        ("a file that becomes another between two parts", |world, request| {
            let asked = request.headers.get("range")?;
            let later = request.path.ends_with("model.onnx") && !asked.starts_with("bytes=0-");
            later.then(|| file(request, &world.content, "\"other\""))
        }),
        ("a redirect", |_, request| {
            let to = request.headers.get("host")?.replace("127.0.0.1", "127.0.0.3");
            let headers = vec![("Location", format!("http://{to}{}", request.path))];
            request.path.ends_with("model.onnx").then(|| Reply::Whole(302, headers, Vec::new()))
        }),
        ("an artifact elsewhere", |_, request| {
            let uri = r#"{"artifact_uri": "http://169.254.169.254/latest"}"#;
            request.path.ends_with("get-download-uri").then(|| text(200, uri))
        }),
        ("no ONNX model", |world, request| {
            let sklearn = world.mlmodel.replace("onnx:", "sklearn:");
            request.path.ends_with("/MLmodel").then(|| file(request, sklearn.as_bytes(), "\"m\""))
        }),
        ("a version that is not ready", |_, request| {
            let pending =
                r#"{"model_version": {"version": "1", "status": "PENDING_REGISTRATION"}}"#;
            request.path.ends_with("model-versions/get").then(|| text(200, pending))
        }),
    ];
    for (name, fault) in faults {
        let world = World::new(content());
        let server = Server::start(move |request| {
            fault(&world, request).unwrap_or_else(|| world.answer(request))
        })
        .await;
        let source = source(&server, |_| {});
        let started = Instant::now();
        let got = staged(&source).await;
        let error = got.map(|bytes| bytes.len()).expect_err(name).to_string();
        assert!(error.chars().count() < 600 && !error.contains('\x1b'), "{name}: {error}");
        assert!(started.elapsed() < Duration::from_secs(20), "{name} took {:?}", started.elapsed());
        // A listing says nothing is there to be taken, or keeps the trouble to the version.
        if let Ok(listing) = source.list().await {
            for (version, found) in &listing.models[&super::tests::name()].versions {
                let model_fault = [
                    "a version that is not ready",
                    "another range than asked for",
                    "always cut before it starts",
                    "a file that becomes another between two parts",
                ];
                let taken = found.settled && found.problem.is_none();
                let sizes = name.starts_with("a size") || name.starts_with("more bytes");
                assert!(
                    !taken || sizes || model_fault.contains(name),
                    "{name}: {version} {found:?}"
                );
            }
        }
    }
}

#[tokio::test]
async fn pages_without_end_are_left() {
    let count = Arc::new(AtomicUsize::new(0));
    for same in [true, false] {
        let counter = Arc::clone(&count);
        let server = Server::start(move |_| {
            let at = counter.fetch_add(1, Ordering::SeqCst);
            let token = if same { "again".to_owned() } else { at.to_string() };
            text(200, &json!({"registered_models": [], "next_page_token": token}).to_string())
        })
        .await;
        let error = source(&server, |_| {}).list().await.unwrap_err();
        assert!(error.to_string().contains("no end"), "{error}");
    }
    assert!(count.load(Ordering::SeqCst) < 300);
}

#[tokio::test]
async fn nothing_but_the_server_is_connected_to() {
    // The same port of another loopback address.
    let canary = tokio::net::TcpListener::bind("127.0.0.3:0").await.unwrap();
    let port = canary.local_addr().unwrap().port();
    let hits = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&hits);
    let watch = tokio::spawn(async move {
        while canary.accept().await.is_ok() {
            seen.fetch_add(1, Ordering::SeqCst);
        }
    });
    for uri in [
        format!("http://127.0.0.3:{port}/x"),
        format!("mlflow-artifacts://127.0.0.3:{port}/x"),
        format!("mlflow-artifacts://[::ffff:127.0.0.3]:{port}/x"),
        format!("mlflow-artifacts://u@127.0.0.3:{port}/x"),
        format!("s3://127.0.0.3:{port}/x"),
        format!("http:127.0.0.3:{port}/x"),
        format!("//127.0.0.3:{port}/x"),
        format!("mlflow-artifacts:/x/@127.0.0.3:{port}/y"),
        format!("mlflow-artifacts:/\\127.0.0.3:{port}/y"),
    ] {
        let world = World::new(vec![1; 10]);
        let server = Server::start(move |request| {
            if request.path.ends_with("get-download-uri") {
                return text(200, &json!({"artifact_uri": uri}).to_string());
            }
            if request.before % 2 == 1 {
                let to = format!("http://127.0.0.3:{port}{}", request.path);
                return Reply::Whole(307, vec![("Location", to)], Vec::new());
            }
            world.answer(request)
        })
        .await;
        assert!(staged(&source(&server, |_| {})).await.is_err());
        drop(source(&server, |_| {}).list().await);
    }
    assert_eq!(hits.load(Ordering::SeqCst), 0);
    watch.abort();
}

#[tokio::test]
async fn a_server_that_is_down_is_said_to_be() {
    // Nobody listens there any more once it is dropped.
    let server = healthy(Vec::new()).await;
    let source = source(&server, |_| {});
    drop(server);
    let error = source.list().await.unwrap_err();
    assert!(error.is_transient(), "{error}");
}

#[tokio::test]
async fn a_changed_artifact_changes_the_fingerprint() {
    let world = Arc::new(Mutex::new(World::new(vec![1; 100])));
    let shared = Arc::clone(&world);
    let server = Server::start(move |request| {
        let world = shared.lock();
        if request.path.ends_with("/model.onnx") {
            return file(request, &world.content, &format!("\"{}\"", world.content[0]));
        }
        world.answer(request)
    })
    .await;
    let source = source(&server, |settings| settings.source.poll = Duration::ZERO);
    let print = |listing: &Listing| listing.models[&name()].versions[&version(1)].fingerprint;
    let before = source.list().await.unwrap();
    assert_eq!(print(&before), print(&source.list().await.unwrap()));
    // Same size, other bytes.
    world.lock().content = vec![2; 100];
    let after = source.list().await.unwrap();
    assert_ne!(print(&before), print(&after));
    let changes = after.diff(&before);
    assert!(matches!(changes[0], super::super::Change::Changed { .. }), "{changes:?}");
    let dir = tempfile::tempdir().unwrap();
    let staged = source.stage(&name(), version(1), dir.path()).await.unwrap();
    assert_eq!(staged.fingerprint, print(&after));
}
