//! A panic fails its own request, and nothing but that.

use std::time::Duration;

use tokio::task::JoinSet;

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
            eprintln!("C6: {failed} of 400 failed, all of them the engine's panics");
            assert_eq!(failed, 50);
        });
    });
}
