//! The promise is about many streams, so it is simulated. `lnΓ` of counts is cheap; drawing is what
//! takes time in a debug build, so a whole step of rows is drawn at once, by cell.

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

/// Counts of `rows` draws in ten equal cells, the first five of which have `tilt` more.
fn draw(random: &mut StdRng, rows: u64, tilt: f64) -> Vec<u64> {
    let mut counts = vec![0; 10];
    for _ in 0..rows {
        let lower = random.random::<f64>() < 0.5 * (1.0 + tilt);
        let within: usize = random.random_range(0..5);
        counts[if lower { within } else { 5 + within }] += 1;
    }
    counts
}

/// Rows until the alarm, looking every 50 rows; `None` when there was none in `rows`.
fn alarm(seed: u64, reference: u64, tilt: f64, rows: u64, restarting: usize) -> Option<u64> {
    let mut random = StdRng::seed_from_u64(seed);
    let own = draw(&mut random, reference, 0.0);
    let mut monitor = Monitor::new(&own, restarting);
    for look in 1..=rows / 50 {
        monitor.add(&draw(&mut random, 50, tilt));
        if monitor.ln_evidence() >= 20.0_f64.ln() {
            return Some(look * 50);
        }
        if restarting > 0 && look % 20 == 0 {
            monitor.restart(0);
        }
    }
    None
}

fn share(streams: u64, run: impl Fn(u64) -> bool) -> f64 {
    (0..streams).filter(|seed| run(*seed)).count() as f64 / streams as f64
}

#[test]
fn without_a_change_it_stays_silent() {
    // Nominal: 5 %. 120 streams of 5,000 rows and 100 looks each; docs/monitor.md has the figures of many
    // more.
    for reference in [1000, 10_000] {
        let rate = share(120, |seed| alarm(seed, reference, 0.0, 5000, 0).is_some());
        assert!(rate <= 0.05, "reference of {reference}: {rate}");
    }
    let rate = share(120, |seed| alarm(seed, 10_000, 0.0, 5000, 2).is_some());
    assert!(rate <= 0.05, "with restarts: {rate}");
}

#[test]
fn a_tilt_of_a_tenth_is_found() {
    let mut found: Vec<u64> =
        (0..60).filter_map(|seed| alarm(seed, 10_000, 0.1, 15_000, 0)).collect();
    found.sort_unstable();
    assert!(found.len() >= 54, "{} of 60", found.len());
    assert!((2000..6000).contains(&found[found.len() / 2]), "{found:?}");
}

#[test]
fn evidence_is_that_of_the_two_likelihoods() {
    // scipy 1.17.1, gammaln: reference (10, 20, 30), current (30, 20, 10).
    let mut monitor = Monitor::new(&[10, 20, 30], 0);
    monitor.add(&[30, 20, 10]);
    assert!((monitor.ln_evidence() - LN_EVIDENCE).abs() < 1e-9, "{}", monitor.ln_evidence());
    assert_eq!(monitor.rows(), 60);
    monitor.restart(0);
    assert_eq!(monitor.rows(), 60, "the first process never starts again");
    // One process of half the weight, the others at their first starts with half of theirs.
    let fresh = Monitor::new(&[10, 20, 30], 3).ln_evidence().exp();
    assert!((fresh - 0.75).abs() < 1e-12, "{fresh}");
}

#[test]
fn the_mean_stays_within_its_band() {
    // 200 streams of 4,000 rows at the nominal 5 %.
    let leaves = |seed: u64| {
        let mut sum = 0.0;
        (1..=4000_u64).any(|n| {
            sum += super::super::random::normal(seed, n);
            n % 10 == 0 && (sum / n as f64).abs() > mean_band(1.0, n, 1000, 0.05)
        })
    };
    let rate = share(200, leaves);
    assert!(rate <= 0.05, "{rate}");
    // 0.2 standard deviations are outside once there are enough rows, and not before.
    assert!(mean_band(1.0, 100, 1000, 0.05) > 0.2 && mean_band(1.0, 2000, 1000, 0.05) < 0.1);
    assert_eq!(mean_band(1.0, 0, 1000, 0.05), f64::INFINITY);
}

const LN_EVIDENCE: f64 = -2.2299182070368317;
