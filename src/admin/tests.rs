//! The API without sockets and models: a desk of paper, and every route through the front.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http::{HeaderMap, Request};
use http_body_util::BodyExt;
use serde_json::{Value, json};

use super::problem::PROBLEM_JSON;
use super::{Api, Audit, Door, Hosts, Needs, PREFIX, Parts, Peer};
use crate::admit::keys::{GrantRecord, KeyRecord};
use crate::admit::{Clients, Gatekeeper, KeySet, Role, Token};
use crate::config::{self, ServeArgs};
use crate::control::alerts::{self, Alerts, Watcher};
use crate::control::call::Refusal;
use crate::control::store::{SqliteStore, Store as _};
use crate::feedback::{self, Feedback, How, Models};
use crate::ledger::{self, Ledger};
use crate::monitor::{self, Monitor};
use crate::route::{Published, RouteTable};

mod document;
mod paper;
mod sockets;

use paper::Paper;

/// No version is loaded.
struct NoModels;

impl Models for NoModels {
    fn how(&self, _: &str, _: u64) -> Option<How> {
        None
    }

    fn serves(&self, _: &str) -> bool {
        false
    }
}

/// The API over a desk of paper, and who may call it.
struct Bench {
    api: Arc<Api>,
    desk: Arc<Paper>,
    gatekeeper: Arc<Gatekeeper>,
    /// Names, tokens and what they may do.
    keys: Vec<(String, Token, KeyRecord)>,
    _state: tempfile::TempDir,
}

/// One answer, read.
struct Got {
    status: u16,
    headers: HeaderMap,
    body: Vec<u8>,
}

impl Got {
    fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or(Value::Null)
    }

    fn code(&self) -> String {
        self.json()["code"].as_str().unwrap_or_default().to_owned()
    }

    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", |value| value.to_str().unwrap())
    }
}

fn key(name: &str, role: Role, models: &[&str]) -> (String, Token, KeyRecord) {
    let token = Token::generate().unwrap();
    let models = models.iter().map(ToString::to_string).collect();
    let record = KeyRecord {
        id: token.id().to_owned(),
        name: name.to_owned(),
        grants: vec![GrantRecord { role, models }],
        digest: token.digest().to_string(),
        created_at: jiff::Timestamp::now(),
        created_by: "test".to_owned(),
        expires_at: None,
        revoked_at: None,
        revoked_by: None,
    };
    (name.to_owned(), token, record)
}

fn hand_out(gatekeeper: &Gatekeeper, keys: &[(String, Token, KeyRecord)]) {
    let records = keys
        .iter()
        .map(|(_, _, record)| (record.id.as_str(), serde_json::to_value(record).unwrap()));
    let (set, wrong) = KeySet::from_records(records);
    assert!(wrong.is_empty());
    gatekeeper.replace(set);
}

/// Nobody is told, and nothing is served that anybody could be told of.
fn alerts(state: &Path, feedback: Arc<Feedback>) -> Alerts {
    let store = Arc::new(SqliteStore::open(state).unwrap());
    let kept = Arc::clone(&store);
    let keep: alerts::Keep = Box::new(move |puts, events| {
        let kept = kept.commit(&puts, &events).map(drop);
        Box::pin(async move { kept.map_err(|error| Refusal::Internal(error.to_string())) })
    });
    let config = config::load_from(&ServeArgs::default(), std::iter::empty()).unwrap();
    let sight = alerts::Gateway {
        table: Arc::new(Published::new(RouteTable::default())),
        monitor: None,
        feedback,
    };
    let (alerts, watcher) = Watcher::new(config.alerts, Box::new(sight), &*store, keep).unwrap();
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn(watcher.run(std::future::pending()));
    }
    alerts
}

impl Bench {
    /// With a key for each role, named as it is, and `team`: a deployer of `iris` alone.
    fn new() -> Self {
        let mut keys: Vec<_> =
            Role::ALL.into_iter().map(|role| key(role.as_str(), role, &[])).collect();
        keys.push(key("team", Role::Deployer, &["iris"]));
        Self::with(keys, Clients::default()).unwrap()
    }

    fn with(
        keys: Vec<(String, Token, KeyRecord)>,
        clients: Clients,
    ) -> Result<Self, super::NoCredentials> {
        let desk = Arc::new(Paper::new());
        let gatekeeper = Arc::new(Gatekeeper::default());
        hand_out(&gatekeeper, &keys);
        let drained = Arc::clone(&desk);
        let state = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(ledger::Settings::new(state.path()), []).unwrap();
        let feedback = feedback::Settings::new(state.path().to_owned());
        let feedback = Feedback::start(feedback, Arc::clone(&ledger), Arc::new(NoModels)).unwrap();
        let kept = Arc::clone(&feedback);
        let api = Api::new(Parts {
            desk: Arc::clone(&desk) as _,
            gatekeeper: Arc::clone(&gatekeeper),
            clients,
            hosts: Hosts::new(["gate.example".to_owned()]),
            drain: Box::new(move |call| {
                drained.write_down("drain", None, &call);
                Box::pin(async { Ok(()) })
            }),
            mlflow: Some(Box::new(|headers, _| match headers.get("x-mlflow-signature") {
                Some(right) if right == "right" => Ok(()),
                _ => Err(Refusal::Forbidden("the signature is wrong".to_owned())),
            })),
            audit: Some(Audit { ledger, table: Arc::new(Published::new(RouteTable::default())) }),
            feedback: Some(feedback),
            monitor: Monitor::start(monitor::Settings::new(state.path())).unwrap(),
            alerts: Some(alerts(state.path(), Arc::clone(&kept))),
        })?;
        Ok(Self { api, desk, gatekeeper, keys, _state: state })
    }

    fn revoke(&mut self, name: &str) {
        self.keys.retain(|(known, ..)| known != name);
        hand_out(&self.gatekeeper, &self.keys);
    }

    fn token(&self, name: &str) -> String {
        let (_, token, _) = self.keys.iter().find(|(known, ..)| known == name).unwrap();
        token.text().expose().clone()
    }

    fn peer() -> Peer {
        Peer { address: "127.0.0.1:5".parse().unwrap(), name: None }
    }

    async fn send(&self, request: Request<Body>) -> Got {
        let answer = self.api.answer(&Self::peer(), request).await;
        let (head, body) = answer.into_parts();
        let body = body.collect().await.unwrap().to_bytes().to_vec();
        Got { status: head.status.as_u16(), headers: head.headers, body }
    }

    /// As the role or key `who`; nobody for an empty name.
    async fn call(
        &self,
        who: &str,
        method: &str,
        path: &str,
        body: &Value,
        more: &[(&str, &str)],
    ) -> Got {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{PREFIX}{path}"))
            .header("host", "localhost");
        if !who.is_empty() {
            request = request.header("authorization", format!("Bearer {}", self.token(who)));
        }
        let body = if body.is_null() { String::new() } else { body.to_string() };
        if !body.is_empty() {
            request = request.header("content-type", "application/json");
        }
        for (name, value) in more {
            request = request.header(*name, *value);
        }
        self.send(request.body(Body::from(body)).unwrap()).await
    }

    async fn get(&self, who: &str, path: &str) -> Got {
        self.call(who, "GET", path, &Value::Null, &[]).await
    }

    async fn put_traffic(&self, who: &str, body: &Value, more: &[(&str, &str)]) -> Got {
        self.call(who, "PUT", "/models/iris/traffic", body, more).await
    }
}

/// The path of a door, with names that the desk of paper knows.
fn example(door: &Door, model: &str) -> String {
    door.path
        .replace("{model}", model)
        .replace("{version}", "2")
        .replace("{label}", "stable")
        .replace("{rollout}", "r-1")
        .replace("{hold}", "case-1")
        .replace("{receiver}", "ops")
        .replace("{id}", "0193e5a0-7c1d-7b7a-8d8e-2f4f7b1c9a10")
}

/// A body that the door takes.
fn body(door: &Door) -> Value {
    match door.name.as_str() {
        "traffic.put" => json!({"weights": {"1": 95, "2": 5}}),
        "label.put" => json!({"version": "2"}),
        "rollout.start" => json!({"candidate": "2"}),
        "approval.post" => json!({"decision": "approve", "comment": "looked at"}),
        "silence.put" => {
            let until = jiff::Timestamp::now() + jiff::SignedDuration::from_hours(1);
            json!({"until": until.to_string(), "reason": "we know"})
        }
        "audit.erase" => json!({"ids": [uuid::Uuid::nil().to_string()], "reason": "asked for"}),
        "webhook.mlflow" => json!({"entity": "MODEL_VERSION", "action": "CREATED"}),
        _ => Value::Null,
    }
}

#[test]
fn without_anybody_who_may_call_there_is_no_api() {
    assert_eq!(Bench::with(Vec::new(), Clients::default()).err(), Some(super::NoCredentials));
    let clients: Clients = "cn:alice = viewer".parse().unwrap();
    assert!(Bench::with(Vec::new(), clients).is_ok());
    assert!(Bench::with(vec![key("a", Role::Viewer, &[])], Clients::default()).is_ok());
}

#[tokio::test]
async fn every_route_and_every_role() {
    let bench = Bench::new();
    let mut cells = 0;
    for door in bench.api.doors() {
        if door.name == "events.get" {
            continue; // It never ends; its own test has it.
        }
        let path = example(door, "iris");
        let body = body(door);
        let call = |who: &'static str| bench.call(who, door.method.as_str(), &path, &body, &[]);
        let open = door.needs == Needs::Nothing;
        let nobody = call("").await;
        match door.name.as_str() {
            "health" => assert_eq!(nobody.status, 200),
            // By its own signature.
            "webhook.mlflow" => assert_eq!(nobody.code(), "forbidden"),
            _ => assert_eq!(
                (nobody.status, nobody.code().as_str()),
                (401, "unauthenticated"),
                "{path}"
            ),
        }
        cells += 1;
        for role in Role::ALL {
            let may = match door.needs {
                Needs::Nothing | Needs::Credential => true,
                Needs::Right(action) | Needs::Some(action) => role.may(action),
            };
            let got = call(role.as_str()).await;
            let denied = got.status == 403 && !open;
            assert_eq!(!denied, may, "{role} {} {path}: {}", door.method, got.status);
            if may && !open {
                // This ledger is empty, nobody signs it, and holds take a reason.
                let idle = match door.name.as_str() {
                    "audit.erase" | "prediction.get" => got.status == 404,
                    "hold.put" | "hold.delete" => got.code() == "needs_reason",
                    "audit.rotateKey" => got.status == 503,
                    // No version is watched here.
                    "reference.freeze" => got.status == 409,
                    // Nobody is told, and somebody else was faster.
                    "alert.test" | "silence.delete" => got.status == 404,
                    _ => false,
                };
                let good = matches!(got.status, 200..=202) || idle;
                assert!(good, "{role} {} {path}: {} {:?}", door.method, got.status, got.json());
            }
            cells += 1;
        }
        // A deployer of another model: it is as if there was none.
        if let Needs::Right(_) = door.needs
            && door.path.contains("{model}")
        {
            let method = door.method.as_str();
            let outside = bench.call("team", method, &example(door, "risk"), &body, &[]).await;
            let absent = bench.call("team", method, &example(door, "none"), &body, &[]).await;
            assert_eq!((outside.status, absent.status), (404, 404), "{path}");
            let detail = |got: &Got| got.json()["detail"].as_str().unwrap().replace("risk", "none");
            assert_eq!(detail(&outside), detail(&absent), "{path}");
            cells += 2;
        }
    }
    eprintln!("routes x callers: {cells} cells, 0 wrong");
    assert!(cells > 180, "{cells}");
}

#[tokio::test]
async fn nothing_but_the_open_routes_is_answered_to_strangers() {
    let bench = Bench::new();
    let paths = [
        "/admin/v1/models",
        "/admin/v1/MODELS",
        "/admin/v1//models",
        "/admin/v1/models/",
        "/admin/v1/",
        "/admin/v1",
        "/",
        "/metrics",
        "/v2/health/live",
        "/admin/v1/models/iris/~rollback",
        "/admin/v1/health/../models",
        "/admin/v1/%6dodels",
        "/admin/v1/models?token=x",
        "/admin/v1/health/",
        "/admin/v1/none",
        "/admin/v1/openapi.json",
        "/admin/v1/health:x",
    ];
    let bad = [
        "",
        "Bearer",
        "Bearer x",
        "Basic YWRtaW46YWRtaW4=",
        "Bearer tg_0123456789abcdef.x",
        "Negotiate x",
    ];
    let mut probes = 0;
    for path in paths {
        for method in ["GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"] {
            for credential in bad {
                let mut request =
                    Request::builder().method(method).uri(path).header("host", "localhost");
                if !credential.is_empty() {
                    request = request.header("authorization", credential);
                }
                // Nowhere but in its header a token is one.
                request = request.header("cookie", format!("token={}", bench.token("admin")));
                let got = bench.send(request.body(Body::empty()).unwrap()).await;
                assert_eq!(got.status, 401, "{method} {path} {credential}");
                assert!(got.header("www-authenticate").starts_with("Bearer"), "{method} {path}");
                probes += 1;
            }
        }
    }
    eprintln!("{probes} probes, 0 answered");
    assert!(bench.desk.changes().is_empty());
    let journalled = bench.desk.refusals();
    assert_eq!(
        journalled.len(),
        super::limits::STRANGERS_JOURNALLED_MAX as usize,
        "the others are counted"
    );
    assert!(journalled[0].contains("from 127.0.0.1"), "{journalled:?}");
}

#[tokio::test]
async fn denied_calls_are_journalled_with_who_and_what() {
    let bench = Bench::new();
    bench.put_traffic("viewer", &json!({"weights": {"1": 1}}), &[("x-request-id", "my-id")]).await;
    let [first] = &bench.desk.refusals()[..] else { panic!("one is expected") };
    for part in ["viewer", "traffic.put", "iris", "my-id", "forbidden"] {
        assert!(first.contains(part), "{part}: {first}");
    }
    // What the listener refuses by its form is a refused change too.
    bench.put_traffic("admin", &json!({"weights": {"1": 1}, "wieghts": {}}), &[]).await;
    bench.call("admin", "PUT", "/models/iris/labels/7", &json!({"version": "1"}), &[]).await;
    bench.call("team", "POST", "/models/risk:rollback", &Value::Null, &[]).await;
    assert_eq!(bench.desk.refusals().len(), 4);
    // The director journals its own.
    bench.put_traffic("admin", &json!({"weights": {"9": 1}}), &[]).await;
    assert_eq!(bench.desk.refusals().len(), 4);
    // A read that finds nothing is no refusal; one that is not allowed is.
    bench.get("admin", "/models/none").await;
    assert_eq!(bench.desk.refusals().len(), 4);
    bench.get("viewer", "/journal").await;
    assert_eq!(bench.desk.refusals().len(), 5);
}

#[tokio::test]
async fn a_revoked_key_is_refused_at_once() {
    let mut bench = Bench::new();
    let token = bench.token("admin");
    assert_eq!(bench.get("admin", "/models").await.status, 200);
    bench.revoke("admin");
    let request = Request::builder()
        .uri(format!("{PREFIX}/models"))
        .header("host", "localhost")
        .header("authorization", format!("Bearer {token}"));
    assert_eq!(bench.send(request.body(Body::empty()).unwrap()).await.status, 401);
}

#[tokio::test]
async fn lists_show_what_their_reader_may_see() {
    let bench = Bench::new();
    let names = |got: &Got| -> Vec<String> {
        let models = got.json()["models"].as_array().unwrap().clone();
        models.iter().map(|model| model["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names(&bench.get("admin", "/models").await), ["iris", "risk"]);
    assert_eq!(names(&bench.get("team", "/models").await), ["iris"]);
    bench.desk.journal_three();
    let actions = |got: &Got| -> Vec<String> {
        let events = got.json()["events"].as_array().unwrap().clone();
        events.iter().map(|event| event["action"].as_str().unwrap().to_owned()).collect()
    };
    let all = bench.get("auditor", "/journal").await;
    assert_eq!(actions(&all), ["reload", "traffic.put", "label.put"], "the newest first");
    assert_eq!(actions(&bench.get("team", "/journal").await), ["label.put"]);
    let filtered =
        bench.get("auditor", "/journal?action=traffic.&actor=ci&outcome=done&limit=5").await;
    assert_eq!(actions(&filtered), ["traffic.put"]);
    assert!(actions(&bench.get("auditor", "/journal?outcome=refused").await).is_empty());
    assert_eq!(actions(&bench.get("auditor", "/journal?model=iris").await), ["label.put"]);
    for wrong in [
        "limit=0",
        "limit=501",
        "limit=x",
        "model=a%20b",
        "after=1&before=2",
        "nothing=1",
        "outcome=maybe",
        "after=-1",
        "limit=1&limit=2",
    ] {
        let got = bench.get("auditor", &format!("/journal?{wrong}")).await;
        assert_eq!((got.status, got.code().as_str()), (400, "invalid"), "{wrong}");
    }
}

#[tokio::test]
async fn a_journal_is_read_page_by_page_in_both_directions() {
    let bench = Bench::new();
    for at in 0..250 {
        bench.desk.journal_one("traffic.put", if at % 5 == 0 { "iris" } else { "risk" });
    }
    for (direction, who, want) in
        [("before", "auditor", 250), ("after", "auditor", 250), ("before", "team", 50)]
    {
        let mut seqs = Vec::new();
        let mut path = "/journal?limit=7".to_owned();
        if direction == "after" {
            path += "&after=0";
        }
        loop {
            let got = bench.get(who, &path).await.json();
            let page = got["events"].as_array().unwrap();
            assert!(page.len() <= 7);
            seqs.extend(page.iter().map(|event| event["seq"].as_u64().unwrap()));
            let Some(next) = got["next"].as_u64() else { break };
            path = format!("/journal?limit=7&{direction}={next}");
        }
        let unique: BTreeSet<u64> = seqs.iter().copied().collect();
        assert_eq!((seqs.len(), unique.len()), (want, want), "{direction} {who}");
        match direction {
            "before" => assert!(seqs.is_sorted_by(|a, b| a > b)),
            _ => assert!(seqs.is_sorted()),
        }
    }
}

#[tokio::test]
async fn changes_say_who_why_and_on_what_condition() {
    let bench = Bench::new();
    let table = json!({"weights": {"1": 95, "2": 5}, "reason": "canary"});
    let more = [("x-request-id", "my-id"), ("if-match", "\"1\", \"0\"")];
    let got = bench.put_traffic("deployer", &table, &more).await;
    assert_eq!((got.status, got.header("etag")), (200, "\"1\""), "{:?}", got.json());
    assert_eq!(got.header("x-request-id"), "my-id");
    assert_eq!(got.json()["traffic"]["weights"], json!({"1": 95.0, "2": 5.0}));
    let [change] = &bench.desk.changes()[..] else { panic!("one is expected") };
    assert_eq!(change, "traffic.put iris by deployer: canary if \"0\" (my-id)");
    // Stale by now; weak tags and others never match.
    for tag in ["\"0\"", "W/\"1\"", "\"5\", \"6\""] {
        let got = bench.put_traffic("deployer", &table, &[("if-match", tag)]).await;
        assert_eq!((got.status, got.code().as_str()), (412, "stale"), "{tag}");
    }
    for tag in ["*", "\"1\""] {
        let got = bench.put_traffic("deployer", &table, &[("if-match", tag)]).await;
        assert_eq!(got.status, 200, "{tag}");
        bench.desk.back_to_revision_one();
    }
    assert_eq!(bench.put_traffic("deployer", &table, &[("if-match", "1")]).await.status, 400);
    let got = bench.put_traffic("deployer", &table, &[("if-none-match", "*")]).await;
    assert_eq!(got.status, 400, "a condition that is not kept is not ignored");
}

#[tokio::test]
async fn reasons_come_in_the_body_or_the_header() {
    let bench = Bench::new();
    let rollback = "/models/iris:rollback";
    bench
        .call("admin", "POST", rollback, &Value::Null, &[("tidegate-reason", "from a header")])
        .await;
    bench
        .call(
            "admin",
            "POST",
            rollback,
            &json!({"reason": "from a body"}),
            &[("tidegate-reason", "no")],
        )
        .await;
    bench
        .call(
            "admin",
            "DELETE",
            "/models/iris/traffic",
            &Value::Null,
            &[("tidegate-reason", "away")],
        )
        .await;
    bench.call("admin", "POST", rollback, &json!({}), &[]).await;
    let reasons: Vec<String> = bench
        .desk
        .changes()
        .iter()
        .map(|change| change.split(": ").nth(1).unwrap().split(" (").next().unwrap().to_owned())
        .collect();
    assert_eq!(reasons, ["from a header", "from a body", "away", "-"]);
    bench.desk.want_reasons();
    let got = bench.call("admin", "POST", rollback, &json!({}), &[]).await;
    assert_eq!((got.status, got.code().as_str()), (400, "needs_reason"));
    let long = "x".repeat(2001);
    let got =
        bench.call("admin", "POST", rollback, &Value::Null, &[("tidegate-reason", &long)]).await;
    assert_eq!((got.status, got.code().as_str()), (400, "invalid"));
}

#[tokio::test]
async fn reads_have_tags_and_are_not_sent_twice() {
    let bench = Bench::new();
    for path in [
        "/models",
        "/models/iris",
        "/models/iris/versions/2",
        "/models/iris/labels",
        "/models/iris/traffic",
        "/models/iris/rollouts",
        "/models/iris/rollouts/r-1",
        "/models/iris/versions/2/approvals",
        "/models/iris/shadow",
    ] {
        let first = bench.get("viewer", path).await;
        let tag = first.header("etag").to_owned();
        assert!(first.status == 200 && tag.starts_with('"') && tag.ends_with('"'), "{path}: {tag}");
        let again =
            bench.call("viewer", "GET", path, &Value::Null, &[("if-none-match", &tag)]).await;
        assert_eq!(
            (again.status, again.body.len(), again.header("etag")),
            (304, 0, &*tag),
            "{path}"
        );
        let other =
            bench.call("viewer", "GET", path, &Value::Null, &[("if-none-match", "\"x\"")]).await;
        assert_eq!(other.status, 200, "{path}");
    }
}

#[tokio::test]
async fn bodies_are_json_and_nothing_else() {
    let bench = Bench::new();
    let send = |content_type: Option<&'static str>, body: String| {
        let mut request = Request::builder()
            .method("PUT")
            .uri(format!("{PREFIX}/models/iris/traffic"))
            .header("host", "localhost")
            .header("authorization", format!("Bearer {}", bench.token("admin")));
        if let Some(content_type) = content_type {
            request = request.header("content-type", content_type);
        }
        bench.send(request.body(Body::from(body)).unwrap())
    };
    let table = r#"{"weights": {"1": 1}}"#.to_owned();
    assert_eq!(send(Some("application/json"), table.clone()).await.status, 200);
    for other in [
        None,
        Some("text/plain"),
        Some("application/x-www-form-urlencoded"),
        Some("multipart/form-data"),
    ] {
        let got = send(other, table.clone()).await;
        assert_eq!((got.status, got.code().as_str()), (415, "unsupported_media"), "{other:?}");
    }
    let big = format!("{{\"weights\": {{}}, \"reason\": \"{}\"}}", "x".repeat(1 << 20));
    assert_eq!(send(Some("application/json"), big).await.status, 413);
    for (body, path) in [
        (r#"{"weights": {"1": 1}, "weight": {}}"#, "weight: unknown field"),
        (
            r#"{"weights": {"1": 1}, "rules": [{"name": "a", "header": "b", "equal": "c", "version": "1"}]}"#,
            "rules[0].equal: unknown field",
        ),
        (r#"{"weights": {"1": "x"}}"#, "weights.1: "),
        (r#"{"weights": {"one": 1}}"#, "weights"),
        (r#"{"weights": {"1": 1, "1": 2}}"#, "body: duplicate key"),
        ("[]", "body: "),
        ("", "missing field `weights`"),
    ] {
        let got = send(Some("application/json"), body.to_owned()).await;
        let problems = got.json()["problems"].clone();
        assert_eq!((got.status, got.code().as_str()), (400, "invalid"), "{body}");
        let first = problems[0].as_str().unwrap();
        assert!(first.starts_with(path), "{body}: {first}");
    }
    assert_eq!(bench.desk.changes().len(), 1);
}

#[tokio::test]
async fn browsers_of_other_sites_have_no_effect() {
    let bench = Bench::new();
    let token = format!("Bearer {}", bench.token("admin"));
    let cases: &[&[(&str, &str)]] = &[
        &[("host", "evil.example")],
        &[("host", "127.0.0.1.evil.example")],
        &[("host", "localhost"), ("origin", "http://evil.example")],
        &[("host", "localhost"), ("origin", "null")],
        &[("host", "localhost"), ("origin", "http://localhost:3000")],
        &[("host", "localhost"), ("sec-fetch-site", "cross-site")],
        &[("host", "localhost"), ("sec-fetch-site", "same-site")],
        &[("host", "localhost"), ("host", "localhost")],
        &[],
        &[
            ("host", "localhost"),
            ("origin", "http://evil.example"),
            ("access-control-request-method", "POST"),
        ],
    ];
    for (at, headers) in cases.iter().enumerate() {
        let method = if at == 9 { "OPTIONS" } else { "POST" };
        let mut request =
            Request::builder().method(method).uri(format!("{PREFIX}/models/iris:rollback"));
        request = request.header("authorization", &token);
        for (name, value) in *headers {
            request = request.header(*name, *value);
        }
        let got = bench.send(request.body(Body::empty()).unwrap()).await;
        assert!(matches!(got.status, 400 | 403 | 421), "{headers:?}: {}", got.status);
        assert!(got.headers.keys().all(|name| !name.as_str().starts_with("access-control")));
    }
    assert!(bench.desk.changes().is_empty(), "{} cases, 0 effects", cases.len());
}

#[tokio::test]
async fn every_refusal_has_one_form() {
    let bench = Bench::new();
    let long = format!("/models/{}", "x".repeat(9000));
    let cases = [
        ("GET", "/none", 404, "not_found"),
        ("GET", "/models/none", 404, "not_found"),
        ("GET", "/models/a%20b", 404, "not_found"),
        ("GET", "/models/%ff", 404, "not_found"),
        ("GET", "/models/iris/versions/x:load", 405, "method_not_allowed"),
        ("POST", "/models/iris/versions/x:load", 404, "not_found"),
        ("GET", "/models/iris:none", 404, "not_found"),
        ("PATCH", "/models", 405, "method_not_allowed"),
        ("GET", long.as_str(), 414, "uri_too_long"),
        ("POST", "/models/broken:rollback", 500, "internal"),
        ("POST", "/models/panic:rollback", 500, "internal"),
        ("POST", "/models/busy:rollback", 503, "unavailable"),
        ("POST", "/models/locked:rollback", 409, "needs_approval"),
    ];
    for (method, path, status, code) in cases {
        let got = bench.call("admin", method, path, &Value::Null, &[]).await;
        let body = got.json();
        assert_eq!(
            (got.status, body["code"].as_str().unwrap_or("?")),
            (status, code),
            "{method} {path}"
        );
        assert_eq!(got.header("content-type"), PROBLEM_JSON);
        assert_eq!(body["status"], status);
        assert_eq!(body["request_id"], got.header("x-request-id"));
        for key in ["type", "title", "detail", "hint"] {
            assert!(!body[key].as_str().unwrap_or_default().is_empty(), "{path}: {key}");
        }
        assert!(!body.to_string().contains("/var/lib"), "{path}: {body}");
        assert_eq!(status == 405, !got.header("allow").is_empty(), "{path}");
        assert_eq!(status == 503, !got.header("retry-after").is_empty(), "{path}");
    }
}

#[tokio::test]
async fn an_id_that_is_none_is_replaced() {
    let bench = Bench::new();
    let got = bench
        .call("viewer", "GET", "/models", &Value::Null, &[("x-request-id", "has blanks")])
        .await;
    assert_eq!(got.header("x-request-id").len(), 36);
    let long = "x".repeat(129);
    let got =
        bench.call("viewer", "GET", "/models", &Value::Null, &[("x-request-id", &long)]).await;
    assert_eq!(got.header("x-request-id").len(), 36);
}

#[tokio::test]
async fn a_change_goes_on_without_its_caller() {
    let bench = Bench::new();
    let call = bench.call("admin", "POST", "/models/slow:rollback", &Value::Null, &[]);
    // Long enough to begin, too short to end.
    assert!(tokio::time::timeout(Duration::from_millis(50), call).await.is_err());
    for _ in 0..200 {
        if !bench.desk.changes().is_empty() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("the change ended with its caller");
}

#[tokio::test]
async fn a_webhook_proves_itself() {
    let bench = Bench::new();
    let event = json!({"entity": "MODEL_VERSION_ALIAS", "action": "CREATED"});
    let path = "/webhooks/mlflow";
    let forged = bench.call("", "POST", path, &event, &[("x-mlflow-signature", "wrong")]).await;
    assert_eq!((forged.status, bench.desk.hints()), (403, 0));
    let right = bench.call("", "POST", path, &event, &[("x-mlflow-signature", "right")]).await;
    assert_eq!((right.status, bench.desk.hints()), (202, 1));
    let big = json!({"text": "x".repeat(1 << 20)});
    let got = bench.call("", "POST", path, &big, &[("x-mlflow-signature", "right")]).await;
    assert_eq!((got.status, bench.desk.hints()), (413, 1));
    assert_eq!(bench.get("", path).await.status, 401, "another method is not open");
}

#[tokio::test]
async fn events_come_in_order_from_the_cursor_and_are_for_their_reader() {
    let bench = Bench::new();
    bench.desk.journal_three();
    let read = |got: Vec<u8>| String::from_utf8(got).unwrap();
    // The first events of a stream: the reader is let go when the key is.
    let stream = |who: &str, more: &[(&str, &str)]| {
        let mut request = Request::builder()
            .uri(format!("{PREFIX}/events"))
            .header("host", "localhost")
            .header("authorization", format!("Bearer {}", bench.token(who)));
        for (name, value) in more {
            request = request.header(*name, *value);
        }
        let request = request.body(Body::empty()).unwrap();
        let api = Arc::clone(&bench.api);
        async move { api.answer(&Bench::peer(), request).await.into_body() }
    };
    let mut all = stream("auditor", &[("last-event-id", "0")]).await;
    let mut team = stream("team", &[("last-event-id", "0")]).await;
    let mut now = stream("auditor", &[]).await;
    bench.desk.journal_one("traffic.put", "iris");
    let next = async |body: &mut Body, events: usize| {
        let mut text = String::new();
        while text.matches("\nevent: ").count() < events {
            let frame = tokio::time::timeout(Duration::from_secs(5), body.frame()).await.unwrap();
            text += &read(frame.unwrap().unwrap().into_data().unwrap().to_vec());
        }
        let ids = text.lines().filter_map(|line| line.strip_prefix("id: "));
        ids.map(|id| id.parse::<u64>().unwrap()).collect::<Vec<_>>()
    };
    assert_eq!(next(&mut all, 4).await, [1, 2, 3, 4]);
    assert_eq!(next(&mut team, 2).await, [1, 4], "of its model only");
    assert_eq!(next(&mut now, 1).await, [4], "from now on");
    for wrong in ["x", "-1", "99999999999999999999"] {
        let got = bench
            .call("auditor", "GET", "/events", &Value::Null, &[("last-event-id", wrong)])
            .await;
        assert_eq!(got.status, 400, "{wrong}");
    }
}

#[tokio::test]
async fn a_reader_that_lags_is_told_and_misses_nothing() {
    let bench = Bench::new();
    let request = Request::builder()
        .uri(format!("{PREFIX}/events"))
        .header("host", "localhost")
        .header("authorization", format!("Bearer {}", bench.token("auditor")));
    let request = request.body(Body::empty()).unwrap();
    let mut body = bench.api.answer(&Bench::peer(), request).await.into_body();
    for _ in 0..500 {
        bench.desk.journal_one("traffic.put", "iris");
    }
    let mut text = String::new();
    while text.matches("\nid: ").count() + usize::from(text.starts_with("id: ")) < 500 {
        let frame = tokio::time::timeout(Duration::from_secs(5), body.frame()).await.unwrap();
        text += std::str::from_utf8(&frame.unwrap().unwrap().into_data().unwrap()).unwrap();
    }
    assert!(text.contains("event: lagged\ndata: {\"missed\":"), "told");
    let ids: Vec<u64> =
        text.lines().filter_map(|line| line.strip_prefix("id: ")?.parse().ok()).collect();
    assert_eq!(ids, (1..=500).collect::<Vec<u64>>());
}

#[tokio::test(start_paused = true)]
async fn a_stream_ends_with_its_key() {
    let mut bench = Bench::new();
    let request = Request::builder()
        .uri(format!("{PREFIX}/events"))
        .header("host", "localhost")
        .header("authorization", format!("Bearer {}", bench.token("auditor")));
    let request = request.body(Body::empty()).unwrap();
    let mut body = bench.api.answer(&Bench::peer(), request).await.into_body();
    assert!(body.frame().await.is_some());
    let silent = tokio::time::timeout(Duration::from_secs(16), body.frame()).await;
    let beat = silent.unwrap().unwrap().unwrap().into_data().unwrap();
    assert!(beat.starts_with(b":"), "a heartbeat");
    bench.revoke("auditor");
    let ended = tokio::time::timeout(Duration::from_secs(5), body.frame()).await;
    assert!(ended.unwrap().is_none(), "within 5 s");
}
