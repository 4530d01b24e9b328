//! Loads and unloads leave nothing behind.

use crate::gateway::Gateway;
use crate::load::precise;
use crate::swaps::slope;
use crate::{alone, count, models};

/// Large enough to be seen in the memory of the process if any of it stayed.
const MIB: usize = 4;
/// Until what is kept for the next time is there.
const SETTLED: usize = 10;

#[test]
fn loads_and_unloads_leave_nothing_behind() {
    let cycles = count("RELEASE_CYCLES", 50);
    let root = tempfile::tempdir().unwrap();
    models::put(root.path(), "sum", 1, &models::add(1));
    models::put(root.path(), "sum", 2, &models::heavy(2, MIB));
    models::keep_only(root.path(), "sum", &[1]);
    alone(|_| {
        let gateway = Gateway::start(root.path(), &[]);
        let mut admin = gateway.admin();
        // What comes is never what answers who names no version.
        admin.all_to("sum", 1).done();
        let mut cycle = || {
            admin.load("sum", 2).done();
            admin.unload("sum", 2).done();
            gateway.usage()
        };
        let before = (0..SETTLED).map(|_| cycle()).last().unwrap();
        let held: Vec<_> = (0..cycles).map(|_| cycle()).collect();
        let after = held.last().unwrap();
        let grown = after.resident_kib.saturating_sub(before.resident_kib);
        eprintln!(
            "C1 cycles: {cycles} loads and unloads of a model of {MIB} MiB: {before} before, {after} \
             after, {:+.2} KiB a cycle by least squares, {:.2} from end to end",
            slope(&held),
            precise(usize::try_from(grown).unwrap()) / precise(cycles),
        );
        let parts = held.chunks(cycles.div_ceil(8)).filter_map(|part| part.last());
        let parts: Vec<u64> = parts.map(|usage| usage.resident_kib).collect();
        eprintln!("C1 cycles: KiB after each eighth of them: {parts:?}");
        // A tenth of what was loaded meanwhile, and one model.
        let loaded = u64::try_from(cycles * MIB).unwrap() << 10;
        assert!(grown < loaded / 10 + (u64::try_from(MIB).unwrap() << 10));
        assert!(after.threads < before.threads + 8);
        assert!(after.descriptors < before.descriptors + 8);
    });
}
