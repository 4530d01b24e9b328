//! C1: versions are loaded, take all traffic and are unloaded, again and again, while three kinds of
//! clients ask for predictions.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use crate::checker::{self, History};
use crate::gateway::{Gateway, Usage};
use crate::load::{Answer, Client, Stop, Wire, open_loop, precise, quantile, times};
use crate::{alone, count, models};

const MODEL: &str = "sum";
/// Versions that take turns. At most two are loaded beside the one that is being loaded.
const VERSIONS: u32 = 5;
/// Requests a second that an unoptimised build on two cores answers with time to spare.
const RATE: usize = 200;
/// Of load without swaps, to compare with; and between two that only move traffic.
const QUIET: Duration = Duration::from_secs(4);
const PAUSE: Duration = Duration::from_millis(50);
/// Swaps until everything was loaded once and memory has found its size.
const SETTLED: usize = 10;
/// Resident memory may grow by so much: what the allocator keeps, and the request path's own.
const GROWTH_MAX_KIB: u64 = 48 << 10;
/// Threads and descriptors may differ by so many: the runtime's own come and go.
const SPARE: u64 = 8;

/// One version after another, each loaded before and unloaded after; gives what the process held
/// after each swap.
fn swap(gateway: &Gateway, swaps: usize, history: &mut History<BTreeSet<u32>>) -> Vec<Usage> {
    let mut admin = gateway.admin();
    let mut held = Vec::with_capacity(swaps);
    let mut now = 1;
    for _ in 0..swaps {
        let next = now % VERSIONS + 1;
        admin.load(MODEL, next).done();
        let said = admin.all_to(MODEL, next).done();
        history.change(said.sent, said.answered, BTreeSet::from([next]));
        // At once, with requests still in it.
        admin.unload(MODEL, now).done();
        now = next;
        held.push(gateway.usage());
    }
    held
}

/// As many swaps between two versions that stay loaded, with a pause after each.
fn move_to_and_fro(gateway: &Gateway, swaps: usize, history: &mut History<BTreeSet<u32>>) {
    let mut admin = gateway.admin();
    let now = *history.now().first().unwrap();
    let other = now % VERSIONS + 1;
    admin.load(MODEL, other).done();
    for at in 0..swaps {
        let next = if at % 2 == 0 { other } else { now };
        let said = admin.all_to(MODEL, next).done();
        history.change(said.sent, said.answered, BTreeSet::from([next]));
        std::thread::sleep(PAUSE);
    }
}

/// The answers of requests that were due between two moments.
fn between(answers: &[Answer], from: Instant, to: Instant) -> Vec<&Answer> {
    answers.iter().filter(|answer| (from..to).contains(&answer.due)).collect()
}

#[test]
fn swaps_under_load_fail_nobody() {
    let swaps = count("RELEASE_SWAPS", 60);
    let rate = count("RELEASE_RATE", RATE);
    let root = tempfile::tempdir().unwrap();
    for version in 1..=VERSIONS {
        models::put(root.path(), MODEL, version, &models::add(version));
    }
    models::keep_only(root.path(), MODEL, &[1]);
    alone(|runtime| {
        let mut gateway = Gateway::start(root.path(), &[]);
        gateway.admin().all_to(MODEL, 1).done();
        let mut history = History::new(BTreeSet::from([1]));
        let stop = Stop::default();
        let client = {
            let _inside = runtime.enter();
            Client::new(MODEL, gateway.http, gateway.grpc)
        };
        let load = runtime.spawn(open_loop(client, precise(rate), stop.clone()));
        let begun = Instant::now();
        // Connections are made and versions tried in children for the first time.
        let first = swap(&gateway, SETTLED, &mut history);
        let quiet = Instant::now();
        std::thread::sleep(QUIET);
        let swapping = Instant::now();
        let held = swap(&gateway, swaps, &mut history);
        let moving = Instant::now();
        move_to_and_fro(&gateway, swaps, &mut history);
        let ended = Instant::now();
        stop.stop();
        let answers = runtime.block_on(load).unwrap();

        let verdict = checker::check(&answers, &history);
        let p99 = |from, to| quantile(&times(between(&answers, from, to)), 0.99);
        let (alone, beside) = (p99(quiet, swapping), p99(swapping, moving));
        let moved = p99(moving, ended);
        let over = [Wire::Http1, Wire::Http2, Wire::Grpc]
            .map(|wire| answers.iter().filter(|answer| answer.wire == wire).count());
        let took = (moving - swapping) / u32::try_from(swaps).unwrap();
        eprintln!(
            "C1: {} requests ({over:?} over HTTP/1.1, HTTP/2 and gRPC) over {} swaps, {swaps} of them \
             with a load and an unload, one after another ({took:?}): {} failed, {} by a version that was not allowed, {} mislabelled; \
             one table possible for {}",
            verdict.requests,
            history.changes(),
            verdict.failed.len(),
            verdict.disallowed.len(),
            verdict.mislabelled.len(),
            verdict.sure,
        );
        eprintln!(
            "C1: p99 {alone:?} without swaps, {moved:?} ({:.2} times) with one every {PAUSE:?}, {beside:?} \
             ({:.2} times) with a load and an unload for each; at {rate} requests a second; the first \
             {SETTLED} took {:?}",
            moved.as_secs_f64() / alone.as_secs_f64(),
            beside.as_secs_f64() / alone.as_secs_f64(),
            quiet - begun,
        );
        let (before, after) = (first.last().unwrap(), held.last().unwrap());
        eprintln!(
            "C1: {before} before, {after} after; resident memory {:+.2} KiB a swap",
            slope(&held)
        );
        verdict.assert_clean();
        assert!(gateway.alive());
        assert!(after.resident_kib < before.resident_kib + GROWTH_MAX_KIB);
        assert!(after.threads < before.threads + SPARE);
        assert!(after.descriptors < before.descriptors + usize::try_from(SPARE).unwrap());
    });
}

/// KiB of resident memory for each more of what was done, by least squares over the second half.
pub(crate) fn slope(held: &[Usage]) -> f64 {
    let half = &held[held.len() / 2..];
    let points = || {
        half.iter()
            .enumerate()
            .map(|(at, usage)| (precise(at), precise(usize::try_from(usage.resident_kib).unwrap())))
    };
    let count = precise(half.len());
    let mean = |of: fn((f64, f64)) -> f64| points().map(of).sum::<f64>() / count;
    let (x_mean, y_mean) = (mean(|point| point.0), mean(|point| point.1));
    let covariance: f64 = points().map(|(x, y)| (x - x_mean) * (y - y_mean)).sum();
    let variance: f64 = points().map(|(x, _)| (x - x_mean).powi(2)).sum();
    if variance > 0.0 { covariance / variance } else { 0.0 }
}
