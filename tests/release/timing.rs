//! How long a change of weights takes to be answered, and a rollback to be in force. These are
//! figures; what is asserted is their order.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::gateway::Gateway;
use crate::load::{Ask, Client, Stop, closed_loop, quantile};
use crate::{alone, count, models};

const MODEL: &str = "sum";

fn start(root: &std::path::Path) -> Gateway {
    for version in 1..=2 {
        models::put(root, MODEL, version, &models::add(version));
    }
    Gateway::start(root, &[])
}

#[test]
fn a_change_of_weights_is_answered_soon() {
    let changes = count("RELEASE_CHANGES", 200);
    let root = tempfile::tempdir().unwrap();
    alone(|_| {
        let gateway = start(root.path());
        let mut admin = gateway.admin();
        let took: Vec<Duration> = (0..changes)
            .map(|at| {
                let canary = at % 100;
                let table = json!({"weights": {"1": 100 - canary, "2": canary}});
                admin.traffic(MODEL, &table).done().took()
            })
            .collect();
        eprintln!(
            "C3: {changes} changes of weights, each durable when answered: median {:?}, p99 {:?}",
            quantile(&took, 0.5),
            quantile(&took, 0.99)
        );
    });
}

/// From before the call is written to the start of the first request that the old version answers;
/// requests are sent one after another, so this is too long by up to one request.
#[test]
fn a_rollback_is_in_force_before_it_is_answered() {
    let times = count("RELEASE_ROLLBACKS", 50);
    let root = tempfile::tempdir().unwrap();
    alone(|runtime| {
        let gateway = start(root.path());
        let mut admin = gateway.admin();
        let client = {
            let _inside = runtime.enter();
            Client::new(MODEL, gateway.http, gateway.grpc)
        };
        let (mut back, mut answered) = (Vec::new(), Vec::new());
        for _ in 0..times {
            admin.all_to(MODEL, 1).done();
            admin.all_to(MODEL, 2).done();
            let stop = Stop::default();
            let asking = runtime.spawn(closed_loop(client.clone(), 2, stop.clone(), Ask::plain));
            std::thread::sleep(Duration::from_millis(15));
            let said = admin.post(&format!("/models/{MODEL}:rollback")).done();
            std::thread::sleep(Duration::from_millis(15));
            stop.stop();
            let answers = runtime.block_on(asking).unwrap();
            let mut first: Option<Instant> = None;
            for answer in &answers {
                let ran = answer.ran.as_ref().unwrap();
                assert_eq!(ran.proven, ran.named);
                if answer.ended < said.sent {
                    assert_eq!(ran.proven, 2, "not before it is called");
                }
                if answer.started > said.answered {
                    assert_eq!(ran.proven, 1, "not after it is answered");
                }
                if ran.proven == 1 {
                    first = Some(first.map_or(answer.started, |at| at.min(answer.started)));
                }
            }
            back.push(first.unwrap().saturating_duration_since(said.sent));
            answered.push(said.took());
        }
        eprintln!(
            "rollback over HTTP, {times} times: the first request routed back began {:?} after the call \
             was written (median, p99 {:?}); answered, durable, after {:?} (p99 {:?})",
            quantile(&back, 0.5),
            quantile(&back, 0.99),
            quantile(&answered, 0.5),
            quantile(&answered, 0.99),
        );
    });
}
