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
    // 200 streams of 4,000 rows at the nominal 5 %; the reference's mean is the truth.
    let band = Band { std: 1.0, reference: None, expected: 1000 };
    let leaves = |seed: u64| {
        let mut sum = 0.0;
        (1..=4000_u64).any(|n| {
            sum += super::super::random::normal(seed, n);
            n % 10 == 0 && (sum / n as f64).abs() > band.half_width(n, 0.05)
        })
    };
    let rate = share(200, leaves);
    assert!(rate <= 0.05, "{rate}");
    // 0.2 standard deviations are outside once there are enough rows, and not before.
    assert!(band.half_width(100, 0.05) > 0.2 && band.half_width(2000, 0.05) < 0.1);
    assert_eq!(band.half_width(0, 0.05), f64::INFINITY);
}

/// Rows until a mean that is watched as a gateway does leaves its band; `None` when none of `rows` does.
/// The reference, its mean and its standard deviation are of `reference` draws; the others are moved by
/// `shift` of its standard deviations.
fn leaves(
    seed: u64,
    reference: u64,
    rows: u64,
    shift: f64,
    draw: impl Fn(&mut StdRng) -> f64,
) -> Option<u64> {
    let mut random = StdRng::seed_from_u64(seed);
    let own: Vec<f64> = (0..reference).map(|_| draw(&mut random)).collect();
    let mean = own.iter().sum::<f64>() / reference as f64;
    let squares: f64 = own.iter().map(|value| (value - mean).powi(2)).sum();
    let std = (squares / reference as f64).sqrt();
    let band = Band { std, reference: Some(reference), expected: 2000 };
    let mut means = Means::new(2);
    for look in 1..=rows / 50 {
        let sum: f64 = (0..50).map(|_| draw(&mut random) + shift * std).sum();
        means.add(50, sum);
        let left = |found: &MeanFound| found.count >= 200 && (found.mean - mean).abs() > found.band;
        if means.found(&band, 0.05).iter().any(left) {
            return Some(look * 50);
        }
        // An hour of 1,000 rows, a day of 4,000.
        if look % 20 == 0 {
            means.restart(1);
        }
        if look % 80 == 0 {
            means.restart(0);
        }
    }
    None
}

/// Of a classifier that is mostly sure: between 1/3 and 1, skewed.
fn confidence(random: &mut StdRng) -> f64 {
    1.0 - 2.0 / 3.0 * random.random::<f64>().powi(4)
}

fn exponential(random: &mut StdRng) -> f64 {
    -(1.0 - random.random::<f64>()).ln()
}

#[test]
fn a_mean_stays_within_the_bands_of_all_its_processes() {
    // Nominal: 5 %. 150 streams of 6,000 rows and 120 looks each, with starts by the hour and the day; the
    // mean and the standard deviation that they are held against are those of a sample.
    for reference in [500, 5000] {
        let rate = share(150, |seed| leaves(seed, reference, 6000, 0.0, confidence).is_some());
        assert!(rate <= 0.05, "confidence, reference of {reference}: {rate}");
        let rate = share(150, |seed| leaves(seed, reference, 6000, 0.0, exponential).is_some());
        assert!(rate <= 0.05, "exponential, reference of {reference}: {rate}");
    }
}

#[test]
fn a_mean_that_moves_by_a_fifth_of_a_standard_deviation_is_found() {
    let mut found: Vec<u64> =
        (0..60).filter_map(|seed| leaves(seed, 5000, 6000, -0.2, confidence)).collect();
    found.sort_unstable();
    assert!(found.len() >= 57, "{} of 60", found.len());
    assert!((200..2000).contains(&found[found.len() / 2]), "{found:?}");
}

#[test]
fn a_band_is_that_of_the_truth_when_the_reference_is_large() {
    let band = |reference| Band { std: 2.0, reference, expected: 1000 };
    let (sampled, true_mean) = (band(Some(1 << 40)), band(None));
    for n in [1, 100, 10_000] {
        let (a, b) = (sampled.half_width(n, 0.05), true_mean.half_width(n, 0.05));
        assert!((a / b - 1.0).abs() < 1e-4, "{n}: {a} and {b}");
        // The closed form, as it is printed.
        let rho2 = (2.0 * 20.0_f64.ln() + (2.0 * 20.0_f64.ln() + 1.0).ln()) / 1000.0;
        let grown = n as f64 * rho2 + 1.0;
        let root = 2.0 * grown / ((n * n) as f64 * rho2) * (grown.sqrt() / 0.05).ln();
        assert!((b - 2.0 * root.sqrt()).abs() < 1e-9 * b, "{n}: {b}");
    }
    // A reference of 500 values leaves room for its own error for ever.
    let (soon, late) =
        (band(Some(500)).half_width(10_000, 0.05), band(Some(500)).half_width(1 << 40, 0.05));
    assert!(soon > late && late > 3.0 * 2.0 / 500.0_f64.sqrt() / 2.0, "{soon}, {late}");
    let mut means = Means::new(2);
    means.add(100, 250.0);
    means.restart(1);
    let found = means.found(&band(Some(500)), 0.05);
    assert_eq!(found.iter().map(|found| found.mean).collect::<Vec<_>>(), [2.5, 2.5]);
    assert!(found[0].band < found[1].band, "the one that started again has a smaller share");
}

const LN_EVIDENCE: f64 = -2.2299182070368317;
