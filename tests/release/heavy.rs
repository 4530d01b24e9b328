//! A large model comes and goes; requests for another one notice nothing but the work beside them.

use std::time::{Duration, Instant};

use crate::gateway::Gateway;
use crate::load::{Client, Stop, open_loop, quantile, times};
use crate::{alone, count, models};

const RATE: f64 = 150.0;
const TIMES: usize = 2;
/// Until its memory is back.
const RETURNED_MAX: Duration = Duration::from_secs(20);

#[test]
fn a_large_model_comes_and_goes_beside() {
    let mib = count("RELEASE_HEAVY_MIB", 32);
    let root = tempfile::tempdir().unwrap();
    models::put(root.path(), "sum", 1, &models::add(1));
    // Other bytes each time: a model that was tried before is not tried again.
    let last = u32::try_from(TIMES).unwrap() + 2;
    for version in 1..=last {
        let content = if version == 1 { models::add(1) } else { models::heavy(version, mib) };
        models::put(root.path(), "large", version, &content);
    }
    models::keep_only(root.path(), "large", &[1]);
    alone(|runtime| {
        let gateway = Gateway::start(root.path(), &[]);
        let mut admin = gateway.admin();
        admin.all_to("large", 1).done();
        let client = {
            let _inside = runtime.enter();
            Client::new("sum", gateway.http, gateway.grpc)
        };
        let load = |work: &mut dyn FnMut()| {
            let stop = Stop::default();
            let load = runtime.spawn(open_loop(client.clone(), RATE, stop.clone()));
            work();
            stop.stop();
            runtime.block_on(load).unwrap()
        };
        let model = u64::try_from(mib).unwrap() << 10;
        // Its last worker may still be giving it back.
        let settled = |at_most_kib: u64| {
            let unloaded = Instant::now();
            let mut now = gateway.usage();
            while now.resident_kib > at_most_kib && unloaded.elapsed() < RETURNED_MAX {
                std::thread::sleep(Duration::from_millis(10));
                now = gateway.usage();
            }
            (now, unloaded.elapsed())
        };
        // Once beforehand: what of the program is read for the first time then is none of the model's.
        admin.load("large", 2).done();
        let first = gateway.usage();
        admin.unload("large", 2).done();
        let (before, _) = settled(first.resident_kib - model / 2);
        let started = Instant::now();
        let mut held = before;
        let beside = load(&mut || {
            for version in 3..=last {
                admin.load("large", version).done();
                held = gateway.usage();
                admin.unload("large", version).done();
            }
        });
        let took = started.elapsed();
        let (after, returned) = settled(before.resident_kib + model / 4);
        // As long without, on the same connections.
        let alone = load(&mut || std::thread::sleep(took));
        let (with, without) = (quantile(&times(&beside), 0.99), quantile(&times(&alone), 0.99));
        eprintln!(
            "C1 heavy: a model of {mib} MiB loaded and unloaded {TIMES} times in {took:?}: {} requests of \
             another, p99 {with:?} beside, {without:?} alone: {:.2} times",
            beside.len(),
            with.as_secs_f64() / without.as_secs_f64(),
        );
        eprintln!(
            "C1 heavy: resident memory {} MiB before, {} MiB with it, {} MiB {returned:?} after the unload",
            before.resident_kib >> 10,
            held.resident_kib >> 10,
            after.resident_kib >> 10,
        );
        for answer in beside.iter().chain(&alone) {
            assert_eq!(answer.ran.as_ref().map(|ran| ran.proven), Ok(1), "{answer:?}");
        }
        assert!(held.resident_kib >= before.resident_kib + model / 2, "it was loaded");
        assert!(after.resident_kib <= before.resident_kib + model / 4, "its memory went back");
    });
}
