//! Work that nobody waits for any more is not done.

use std::sync::Arc;
use std::time::Duration;

use tidegate::gateway;
use tidegate::transport::Settings;
use tokio::time::Instant;

use crate::alone;
use crate::client::{Client, Outcome, Wire, open_loop};
use crate::server::{Server, Slow};

const COST: Duration = Duration::from_millis(20);
const WORKERS: usize = 2;
/// Executions for requests that were already dead, of all.
const DEAD_SHARE_MAX: f64 = 0.05;
/// Executions whose answer came too late, of all. 0.05 and less is what is seen; a run that the
/// machine holds up is no fault of the gateway's.
const WASTED_SHARE_MAX: f64 = 0.4;

#[test]
fn the_dead_are_not_executed_over_http() {
    the_dead_are_not_executed(Wire::Http);
}

#[test]
fn the_dead_are_not_executed_over_grpc() {
    the_dead_are_not_executed(Wire::Grpc);
}

/// Four times the capacity, and deadlines of a few runs: what the model itself saw.
fn the_dead_are_not_executed(wire: Wire) {
    alone(|runtime| {
        let slow = Slow::new("slow", COST, WORKERS);
        let server = Server::start(&[&slow]);
        runtime.block_on(async {
            let client = Client::new(server.data);
            let (rate, wait) = (400.0, Duration::from_millis(70));
            let start = Instant::now();
            let lasting = Duration::from_secs(2);
            let seen = open_loop(&client, wire, "slow", rate, lasting, Some(wait)).await;
            assert!(seen.other.is_empty(), "{:?}", seen.other.first());
            // What began last must have ended.
            tokio::time::sleep(2 * COST).await;
            let ran = slow.ran.lock().clone();
            let counted = client.metric(server.metrics, "tidegate_executions_total").await;
            assert_eq!(ran.len() as f64, counted, "the model and the metric agree");
            // Requests arrive after they are due, so those that count as dead here are at least
            // `slack` older than their deadline.
            let slack = Duration::from_millis(20);
            let due = |x: f32| start + Duration::from_secs_f64(f64::from(x) / rate);
            let dead = ran.iter().filter(|(at, x)| *at > due(*x) + wait + slack).count();
            let wasted = ran.len().saturating_sub(seen.ok);
            let share = |count: usize| count as f64 / ran.len() as f64;
            eprintln!(
                "C9 {wire:?}: sent {}, ok {}, shed {}, late {}; executed {}, for the dead {dead} \
                 ({:.1} %), without an answer in time {wasted} ({:.1} %)",
                seen.sent,
                seen.ok,
                seen.shed,
                seen.late,
                ran.len(),
                100.0 * share(dead),
                100.0 * share(wasted),
            );
            if !seen.counts("C9") {
                return;
            }
            assert!(share(dead) <= DEAD_SHARE_MAX, "{dead} of {}", ran.len());
            assert!(share(wasted) <= WASTED_SHARE_MAX, "{wasted} of {}", ran.len());
            assert!(seen.shed > seen.late, "who cannot be served in time is told so at once");
        });
    });
}

/// A caller may ask for an hour; the gateway gives what it is configured to.
#[test]
fn deadlines_are_cut_to_the_servers_longest() {
    alone(|runtime| {
        let slow = Slow::new("slow", Duration::from_secs(2), 1);
        let longest = Duration::from_millis(300);
        let settings = gateway::Settings { timeout_max: longest, ..gateway::Settings::default() };
        let server = Server::with(&[&slow], settings, Settings::default());
        runtime.block_on(async {
            let client = Client::new(server.data);
            for wire in [Wire::Http, Wire::Grpc] {
                let hour = Some(Duration::from_secs(3600));
                let asked = Instant::now();
                assert_eq!(client.infer(wire, "slow", 0.0, hour).await, Outcome::Late);
                let took = asked.elapsed();
                eprintln!("C9 {wire:?}: an hour was cut to {took:?}");
                assert!(took >= longest && took < Duration::from_secs(3), "{took:?}");
            }
            assert_eq!(Arc::clone(&slow.ran).lock().len(), 1, "the second never ran");
        });
    });
}
