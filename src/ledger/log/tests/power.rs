//! Power cuts, on a disk that forgets what was not synced.

use std::sync::atomic::AtomicBool;

use parking_lot::Mutex as Lock;
use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::simulated::Simulated;
use super::*;

const CUTS: u64 = 100;
const THREADS: usize = 4;

#[derive(Default)]
struct Tally {
    cuts: u64,
    acked: u64,
    /// Acked and not there, of those that must be.
    missing: u64,
    /// The same of those that need not.
    young: u64,
    damaged: u64,
    syncs: u64,
}

/// Writes from several threads until the power goes, `cuts` times.
fn power_cuts(cuts: u64, sync: bool, lies: bool) -> Tally {
    let mut tally = Tally::default();
    for seed in 0..cuts {
        one_cut(seed, sync, lies, &mut tally);
    }
    let Tally { cuts, acked, missing, young, damaged, syncs } = tally;
    eprintln!(
        "sync {sync}, lies {lies}: {cuts} cuts, {syncs} syncs, {acked} acked, {missing} missing, \
         {young} younger than the last flush missing, {damaged} with damage"
    );
    tally
}

fn one_cut(seed: u64, sync: bool, lies: bool, tally: &mut Tally) {
    let (before, after) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let small = |dir: &Path| LogSettings {
        segment_bytes: 64 << 10,
        flush_interval: Duration::from_millis(3),
        ..settings(dir)
    };
    let mut random = StdRng::seed_from_u64(seed);
    let disk = Simulated::new(lies);
    let (log, _) = Log::open_on(disk.clone(), small(before.path()), WRITER).unwrap();
    let (acked, stop) = (Lock::new(Vec::new()), AtomicBool::new(false));
    let settings = small(after.path());
    std::fs::create_dir_all(settings.dir.join(reader::SEGMENTS)).unwrap();
    let (acked, synced) = std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (log, acked, stop) = (&log, &acked, &stop);
            let size = random.random_range(100..2000);
            scope.spawn(move || {
                block_on(async {
                    for at in 0_usize.. {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        let text = format!("{thread}-{at}");
                        let Ok(done) = log.append(&draft(&text, size + at % 100)) else { continue };
                        match sync {
                            true => log.synced(done).await.unwrap(),
                            false => {
                                log.written(done).await.unwrap();
                                std::thread::sleep(Duration::from_micros(100));
                            }
                        }
                        acked.lock().push((done.seq, text));
                    }
                });
            });
        }
        std::thread::sleep(Duration::from_micros(random.random_range(1_000..60_000)));
        // What is known to be safe is noted before the power goes.
        let known = (acked.lock().clone(), log.stats().synced_seq);
        disk.cut(&settings.dir.join(reader::SEGMENTS), seed);
        stop.store(true, Ordering::Relaxed);
        known
    });
    tally.syncs += disk.syncs();
    drop(log);
    let (log, found) = open(&settings);
    tally.cuts += 1;
    tally.acked += acked.len() as u64;
    if let Some(damage) = &found.damage {
        tally.damaged += 1;
        eprintln!("cut {seed}: {damage}");
    }
    let next = block_on(put(&log, "next")).unwrap();
    block_on(log.close());
    let there = whatever_is_there(&settings);
    assert_eq!(there.get(&next.seq).map(|text| &**text), Some("next"), "cut {seed}");
    for (seq, text) in acked {
        if there.get(&seq) != Some(&text) {
            match sync || seq < synced {
                true => tally.missing += 1,
                false => tally.young += 1,
            }
        }
    }
    if found.damage.is_none() && !lies {
        assert_eq!(texts(&settings).len(), there.len(), "cut {seed}: no gap");
    }
}

/// Texts of all records, from segments with damage as well.
fn whatever_is_there(settings: &LogSettings) -> std::collections::BTreeMap<u64, String> {
    let mut there = std::collections::BTreeMap::new();
    for segment in segments(&settings.dir).unwrap() {
        let bytes = std::fs::read(&segment.path).unwrap();
        let mut at = 0;
        while at < bytes.len() {
            match frame::later(&bytes[at..], segment.first_seq) {
                Some(frame) => {
                    let text = String::from_utf8_lossy(frame.head).into_owned();
                    there.insert(frame.seq, text);
                    at += frame.bytes.len();
                }
                None => at += 1,
            }
        }
    }
    there
}

#[test]
fn a_power_cut_takes_nothing_that_was_synced() {
    let tally = power_cuts(CUTS, true, false);
    assert_eq!((tally.cuts, tally.missing, tally.young), (CUTS, 0, 0));
    assert!(tally.acked > CUTS * 10, "there was something to lose");
    assert_eq!(tally.damaged, 0);
}

#[test]
fn a_power_cut_takes_no_more_than_was_written_since_the_last_flush() {
    let tally = power_cuts(CUTS, false, false);
    assert_eq!((tally.cuts, tally.missing), (CUTS, 0));
    assert!(tally.young > 0, "the cut takes what is not synced");
    assert_eq!(tally.damaged, 0);
}

/// The two tests above would see it if the log left out its syncs.
#[test]
fn without_syncs_a_power_cut_takes_records() {
    let tally = power_cuts(CUTS / 4, true, true);
    assert!(tally.missing > 0);
    let tally = power_cuts(CUTS / 4, false, true);
    assert!(tally.missing > 0);
}
