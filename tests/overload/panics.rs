//! A panic fails its own request, and nothing but that.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tidegate::domain::{
    CallMeta, Failure, IndexEntry, InferRequest, Inputs, ModelControl, ModelFile, ModelName,
    Protocol, RouteHeaders,
};
use tidegate::gateway;
use tidegate::proto::inference as pb;
use tidegate::transport::Settings;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tonic::Code;

use crate::alone;
use crate::client::{Client, Outcome, Wire};
use crate::server::{Server, Slow};

/// One request in eight makes the engine panic, in batches with others.
#[test]
fn a_panicking_engine_fails_one_request() {
    alone(|runtime| {
        let mut slow = Slow::new("slow", Duration::from_millis(5), 2);
        slow.batch.size_max = 8;
        let server = Server::start(&[&slow]);
        runtime.block_on(async {
            let client = Client::new(server.data);
            let mut calls = JoinSet::new();
            for at in 0..400_u16 {
                let client = client.clone();
                calls.spawn(async move {
                    let bad = at % 8 == 3;
                    let x = if bad { f32::NAN } else { f32::from(at) };
                    let wire = if at % 2 == 0 { Wire::Http } else { Wire::Grpc };
                    (bad, client.infer(wire, "slow", x, None).await)
                });
            }
            let mut failed = 0;
            for (bad, outcome) in calls.join_all().await {
                match outcome {
                    Outcome::Ok => assert!(!bad),
                    Outcome::Other(what) => {
                        assert!(bad, "{what}");
                        assert!(what.contains("500") || what.contains("Internal"), "{what}");
                        failed += 1;
                    }
                    outcome => panic!("{outcome:?}"),
                }
            }
            for (worker, wire) in [(1, Wire::Http), (2, Wire::Grpc)] {
                let outcome = client.infer(wire, "slow", 1.0, None).await;
                assert_eq!(outcome, Outcome::Ok, "worker {worker} is there");
            }
            eprintln!("C6: {failed} of 400 failed, all of them the engine's panics");
            assert_eq!(failed, 50);
        });
    });
}

type Done<'a> = Pin<Box<dyn Future<Output = Result<(), Failure>> + Send + 'a>>;

/// A repository that panics whatever it is asked.
struct Panics;

impl ModelControl for Panics {
    fn index(&self) -> Vec<IndexEntry> {
        panic!("asked to panic")
    }

    fn load<'a>(&'a self, _: &'a ModelName, _: Option<&'a str>, _: Vec<ModelFile>) -> Done<'a> {
        Box::pin(async { panic!("asked to panic") })
    }

    fn unload<'a>(&'a self, _: &'a ModelName) -> Done<'a> {
        panic!("asked to panic")
    }
}

/// Requests that run on the same connection as handlers that panic are answered.
#[test]
fn a_panicking_handler_fails_one_request() {
    alone(|runtime| {
        let slow = Slow::new("slow", Duration::from_millis(200), 2);
        let settings = Settings { model_control: true, ..Settings::default() };
        let gateway = gateway::Settings::default();
        let server = Server::controlled(Arc::new(Panics), &[&slow], gateway, settings);
        runtime.block_on(async {
            let client = Client::new(server.data);
            let beside: Vec<_> = [Wire::Http, Wire::Grpc]
                .map(|wire| {
                    let client = client.clone();
                    tokio::spawn(async move { client.infer(wire, "slow", 1.0, None).await })
                })
                .into();
            tokio::time::sleep(Duration::from_millis(50)).await;
            let mut failed = 0;
            for path in ["index", "models/slow/load", "models/slow/unload"] {
                let (status, body) = client.post(&format!("/v2/repository/{path}")).await;
                assert_eq!(status, 500, "{path}: {body}");
                assert_eq!(body, r#"{"error":"internal error","code":"internal"}"#);
                failed += 1;
            }
            let index = pb::RepositoryIndexRequest::default();
            let load = pb::RepositoryModelLoadRequest {
                model_name: "slow".to_owned(),
                ..Default::default()
            };
            let answers = [
                client.call::<_, pb::RepositoryIndexResponse>("RepositoryIndex", index).await.err(),
                client
                    .call::<_, pb::RepositoryModelLoadResponse>("RepositoryModelLoad", load)
                    .await
                    .err(),
            ];
            for status in answers {
                assert_eq!(status.map(|status| status.code()), Some(Code::Internal));
                failed += 1;
            }
            for call in beside {
                assert_eq!(call.await.unwrap(), Outcome::Ok);
            }
            eprintln!("C6: {failed} handlers panicked, {failed} answers of 500 / INTERNAL");
        });
    });
}

/// A prediction whose code panics is recorded as the gateway's failure, not as the caller's leave.
#[test]
fn a_panicking_prediction_is_counted() {
    alone(|runtime| {
        let slow = Slow::new("slow", Duration::ZERO, 1);
        let server = Server::start(&[&slow]);
        runtime.block_on(async {
            let request = InferRequest {
                model: "slow".parse().unwrap(),
                version: None,
                id: String::new(),
                inputs: Inputs::Deferred(Box::new(|_| panic!("asked to panic"))),
                outputs: Vec::new(),
                parameters: Vec::new(),
            };
            let meta = CallMeta {
                protocol: Protocol::Http,
                received: Instant::now(),
                timeout: None,
                trace: None,
                sticky_key: None,
                headers: RouteHeaders::default(),
                principal: None,
            };
            let gateway = Arc::clone(&server.api.gateway);
            let ended = tokio::spawn(async move {
                gateway.infer(meta, request, async |_| Ok(())).await.is_ok()
            });
            assert!(ended.await.unwrap_err().is_panic());
            let client = Client::new(server.data);
            let (_, page) = client.get(server.metrics, "/metrics").await;
            let mut counted = page.lines().filter(|line| {
                line.starts_with("tidegate_requests_total") && line.contains("\"internal\"")
            });
            assert!(counted.any(|line| line.ends_with(" 1")), "{page}");
            assert_eq!(client.infer(Wire::Http, "slow", 1.0, None).await, Outcome::Ok);
        });
    });
}
