//! From half to eight times the capacity, requests due at fixed times.

use std::time::Duration;

use tokio::time::{Instant, MissedTickBehavior, interval};

use crate::alone;
use crate::client::{Client, Seen, Wire, open_loop, quantile};
use crate::server::{Server, Slow};

const FACTORS: [f64; 5] = [0.5, 1.0, 2.0, 4.0, 8.0];
const COST: Duration = Duration::from_millis(20);
const WORKERS: usize = 2;
const QUEUE_MAX: usize = 32;
/// Of each stretch of load.
const LASTING: Duration = Duration::from_millis(1500);
/// Share of the best goodput that is kept in any overload; 0.9 and more is what is seen.
const GOODPUT_MIN: f64 = 0.6;
/// Of the median of probes: the promise is for the 99th percentile, which is printed, but that
/// is the machine's as much as the gateway's.
const PROBE_MAX: Duration = Duration::from_millis(100);

/// Times of probes that ran beside the load.
#[derive(Default)]
struct Probes {
    live: Vec<Duration>,
    page: Vec<Duration>,
}

async fn probe(client: Client, server: [std::net::SocketAddr; 2]) -> Probes {
    let [data, metrics] = server;
    let mut probes = Probes::default();
    let mut tick = interval(Duration::from_millis(20));
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let start = Instant::now();
    while start.elapsed() < LASTING {
        tick.tick().await;
        for (address, path, times) in
            [(data, "/v2/health/live", &mut probes.live), (metrics, "/metrics", &mut probes.page)]
        {
            let asked = Instant::now();
            let (status, _) = client.get(address, path).await;
            times.push(asked.elapsed());
            assert_eq!(status, 200, "{path}");
        }
    }
    probes
}

fn report(name: &str, seen: &Seen) {
    eprintln!(
        "{name}: sent {}, ok {}, shed {}, late {}; goodput {:.0}/s; accepted p50 {:?} p99 {:?}",
        seen.sent,
        seen.ok,
        seen.shed,
        seen.late,
        seen.goodput,
        seen.quantile(0.5),
        seen.quantile(0.99),
    );
}

/// Goodput at each factor; every request has one of the answers that a request may have.
fn sweep(name: &str, wire: Wire, slow: &Slow, wait: Option<Duration>) -> Vec<Seen> {
    let mut all = Vec::new();
    let mut probes = Probes::default();
    alone(|runtime| {
        let server = Server::start(&[slow]);
        runtime.block_on(async {
            let client = Client::new(server.data);
            // Known, because the model sleeps.
            let capacity = WORKERS as f64 / COST.as_secs_f64();
            for factor in FACTORS {
                let probing = tokio::spawn(probe(client.clone(), [server.data, server.metrics]));
                let rate = capacity * factor;
                let seen = open_loop(&client, wire, "slow", rate, LASTING, wait).await;
                let beside = probing.await.unwrap();
                probes.live.extend(beside.live);
                probes.page.extend(beside.page);
                report(&format!("{name} {wire:?} {factor}x"), &seen);
                assert!(seen.other.is_empty(), "{factor}x: {:?}", seen.other.first());
                assert_eq!(seen.ok + seen.shed + seen.late, seen.sent, "each has its answer");
                all.push(seen);
            }
        });
    });
    for (what, times) in [("live", &probes.live), ("metrics", &probes.page)] {
        let p99 = quantile(times, 0.99);
        eprintln!("{name} {wire:?}: {what} p50 {:?} p99 {p99:?}", quantile(times, 0.5));
        let judged = all.iter().all(|seen: &Seen| seen.counts("probes"));
        assert!(!judged || quantile(times, 0.5) < PROBE_MAX, "{what} took too long");
    }
    all
}

/// The least share of the best goodput that was kept over the capacity.
fn goodput_kept(name: &str, wire: Wire, all: &[Seen]) -> f64 {
    let best = all.iter().map(|seen| seen.goodput).fold(0.0, f64::max);
    let mut least = 1.0_f64;
    for (factor, seen) in FACTORS.iter().zip(all).filter(|(factor, _)| **factor >= 2.0) {
        let share = seen.goodput / best;
        eprintln!("{name} {wire:?}: goodput at {factor}x is {:.0} % of peak", 100.0 * share);
        if seen.counts(name) {
            least = least.min(share);
        }
    }
    least
}

/// A queue bounded by count: what is over the bound is turned away at once with a time to come
/// back, and what is accepted waits no longer than the queue is long.
fn a_full_queue_sheds(wire: Wire) {
    let mut slow = Slow::new("slow", COST, WORKERS);
    slow.batch.queue_max = QUEUE_MAX;
    let all = sweep("C8", wire, &slow, None);
    assert!(goodput_kept("C8", wire, &all) >= GOODPUT_MIN);
    let longest = COST * u32::try_from(QUEUE_MAX / WORKERS + 2).unwrap();
    for (factor, seen) in FACTORS.iter().zip(&all) {
        let p99 = seen.quantile(0.99);
        assert_eq!(seen.late, 0, "{factor}x: nobody set a deadline");
        if !seen.counts("C8") {
            continue;
        }
        assert!(p99 < 3 * longest, "{factor}x: {p99:?} for a queue of {longest:?}");
        assert!(*factor < 4.0 || seen.shed > 0, "{factor}x: nothing was turned away");
        assert!(*factor > 0.5 || seen.shed == 0, "at half the capacity somebody was turned away");
    }
}

#[test]
fn a_full_queue_sheds_over_http() {
    a_full_queue_sheds(Wire::Http);
}

#[test]
fn a_full_queue_sheds_over_grpc() {
    a_full_queue_sheds(Wire::Grpc);
}

/// The queue's default length, far more than can be served before the deadline: goodput must not
/// drown in work that comes too late.
fn deadlines_bound_the_queue(wire: Wire) {
    let slow = Slow::new("slow", COST, WORKERS);
    let wait = Duration::from_millis(300);
    let all = sweep("C8 with deadlines", wire, &slow, Some(wait));
    assert!(goodput_kept("C8 with deadlines", wire, &all) >= GOODPUT_MIN);
    let ran = slow.ran.lock().len();
    let ok: usize = all.iter().map(|seen| seen.ok).sum();
    eprintln!("C8 with deadlines {wire:?}: {ran} executed, {ok} answered in the sweep");
}

#[test]
fn deadlines_bound_the_queue_over_http() {
    deadlines_bound_the_queue(Wire::Http);
}

#[test]
fn deadlines_bound_the_queue_over_grpc() {
    deadlines_bound_the_queue(Wire::Grpc);
}

/// A heavy model at eight times its capacity, and a tiny one beside it.
#[test]
fn a_heavy_model_leaves_a_tiny_one_alone() {
    let mut heavy = Slow::new("heavy", Duration::from_millis(50), WORKERS);
    heavy.batch.queue_max = QUEUE_MAX;
    let tiny = Slow::new("tiny", Duration::ZERO, 1);
    alone(|runtime| {
        let server = Server::start(&[&heavy, &tiny]);
        runtime.block_on(async {
            let client = Client::new(server.data);
            let load = |model, rate| open_loop(&client, Wire::Http, model, rate, LASTING, None);
            let alone = load("tiny", 100.0).await;
            let (beside, overload) = tokio::join!(load("tiny", 100.0), load("heavy", 8.0 * 40.0));
            report("fairness: tiny alone", &alone);
            report("fairness: tiny beside heavy", &beside);
            report("fairness: heavy", &overload);
            for (name, seen) in [("alone", &alone), ("beside", &beside)] {
                assert_eq!(seen.ok, seen.sent, "{name}: {:?}", seen.other.first());
            }
            assert!(overload.shed > overload.ok, "the heavy one is overloaded");
            let judged = alone.counts("fairness") && beside.counts("fairness");
            let (alone, beside) = (alone.quantile(0.5), beside.quantile(0.5));
            let ratio = beside.as_secs_f64() / alone.as_secs_f64();
            eprintln!("fairness: tiny's median {alone:?} alone, {beside:?} beside: {ratio:.2}x");
            // One run of the heavy one takes 50 ms: who stood behind it would show.
            let most = alone + Duration::from_millis(25);
            assert!(!judged || beside < most, "{alone:?} {beside:?}");
        });
    });
}
