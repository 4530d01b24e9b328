#![expect(clippy::print_stdout, reason = "docs/rollouts.md has these figures")]

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};

use super::*;

const CELLS: usize = 10;
const LIMIT: f64 = 20.0;
const SCORE_MAX: f64 = 0.1;

fn compared(epoch: u64, stable: &[u64], candidate: &[u64]) -> Arc<Compared> {
    Arc::new(Compared {
        epoch,
        features: vec![ComparedFeature {
            name: "y".to_owned(),
            stable: stable.to_vec(),
            candidate: candidate.to_vec(),
        }],
        ..Compared::default()
    })
}

/// Equal shares, but for a tilt: one half of the cells has `1 + tilt` times its share, the other less.
fn draw(rng: &mut StdRng, tilt: f64) -> usize {
    let half = usize::from(rng.random::<f64>() >= (1.0 + tilt) / 2.0);
    half * CELLS / 2 + rng.random_range(0..CELLS / 2)
}

/// Population stability index of a tilt against none.
fn psi(tilt: f64) -> f64 {
    let of = |q: f64| (q - 0.5) * (q / 0.5).ln();
    of(0.5 + tilt / 2.0) + of(0.5 - tilt / 2.0)
}

/// What a guard that looks every second would have decided: after how many of the candidate's rows it
/// failed, and whether it had been evident.
fn rollout(seed: u64, tilt: f64, looks: usize) -> (Option<u64>, bool) {
    let mut rng = StdRng::seed_from_u64(seed);
    let (mut stable, mut candidate) = (vec![0; CELLS + 1], vec![0; CELLS + 1]);
    let mut evidence = OutputEvidence::default();
    let mut evident = false;
    for _ in 0..looks {
        for _ in 0..rng.random_range(0..=8) {
            candidate[draw(&mut rng, tilt)] += 1;
        }
        for _ in 0..40 {
            stable[draw(&mut rng, 0.0)] += 1;
        }
        evidence.add(Some(&compared(1, &stable, &candidate)));
        let own = &evidence.features[0];
        evident |= own.ln >= LIMIT.ln();
        if own.ln >= LIMIT.ln() && own.distance().is_some_and(|found| found.low >= SCORE_MAX) {
            return (Some(evidence.rows().0), evident);
        }
    }
    (None, evident)
}

#[test]
fn equals_are_seldom_accused_and_others_soon() {
    let runs = 150;
    let all = |tilt: f64, looks| -> (Vec<u64>, usize) {
        let runs: Vec<_> = (0..runs).map(|seed| rollout(seed, tilt, looks)).collect();
        let evident = runs.iter().filter(|(_, evident)| *evident).count();
        let mut failed: Vec<u64> = runs.into_iter().filter_map(|(failed, _)| failed).collect();
        failed.sort_unstable();
        (failed, evident)
    };
    let (failed, evident) = all(0.0, 800);
    println!("the same: {} failed, {evident} evident of {runs}", failed.len());
    assert!(failed.is_empty() && evident <= 8, "{} failed, {evident} evident", failed.len());
    // Half of what is allowed: evident, and no reason to go back.
    let tilt = 0.2224;
    assert!((psi(tilt) - 0.05).abs() < 1e-3, "{}", psi(tilt));
    let (failed, evident) = all(tilt, 500);
    println!("half of what is allowed: {} failed, {evident} evident", failed.len());
    assert!(failed.len() <= 3, "{} failed", failed.len());
    assert!(evident >= 145, "{evident}");
    for (tilt, median_max) in [(0.45, 1500), (0.9, 150)] {
        let (failed, _) = all(tilt, 800);
        let median = failed.get(failed.len() / 2).copied();
        println!("index {:.3}: {} failed, median {median:?}", psi(tilt), failed.len());
        assert!(failed.len() >= 147, "{} at {tilt}", failed.len());
        assert!(median.is_some_and(|rows| rows <= median_max), "{median:?} at {tilt}");
    }
}

#[test]
fn a_distance_is_the_index_less_what_chance_makes() {
    let of = |stable: &[u64], candidate: &[u64]| {
        let (stable, candidate) = (stable.to_vec(), candidate.to_vec());
        OutputFeature { feature: "y".to_owned(), stable, candidate, ln: 0.0 }.distance()
    };
    // Σ (p - q) ln(p / q) of 0.5, 0.5 and 0.6, 0.4 is 0.040547; less (1/1000 + 1/1000)(2 - 1).
    let found = of(&[500, 500], &[600, 400]).unwrap();
    assert!((found.score - (0.040_546_51 - 0.002)).abs() < 1e-6, "{found:?}");
    assert!(found.low < found.score && found.score < found.high);
    // Rare cells count together: of a thousand cells with a row each nothing is known.
    let (one, other) = ([[1, 0]; 500].concat(), [[0, 1]; 500].concat());
    let found = of(&one, &other).unwrap();
    assert!(found.score.abs() < 1e-9, "{found:?}");
    assert_eq!(of(&[10, 10], &[0, 0]), None);
    let nothing_in_common = of(&[1000, 0], &[0, 1000]).unwrap();
    assert!(nothing_in_common.low > 1.0, "{nothing_in_common:?}");
}

#[test]
fn the_distance_and_its_band_hold_what_they_say() {
    // Of 500 samples of an index of 0.207, nearly all bands of three standard errors have it in them.
    let (tilt, runs) = (0.45, 500);
    let (mut sum, mut outside) = (0.0, 0);
    for seed in 0..runs {
        let mut rng = StdRng::seed_from_u64(seed);
        let (mut stable, mut candidate) = (vec![0; CELLS], vec![0; CELLS]);
        (0..5000).for_each(|_| stable[draw(&mut rng, 0.0)] += 1);
        (0..1000).for_each(|_| candidate[draw(&mut rng, tilt)] += 1);
        let own = OutputFeature { feature: String::new(), stable, candidate, ln: 0.0 };
        let found = own.distance().unwrap();
        sum += found.score;
        outside += u32::from(psi(tilt) < found.low || psi(tilt) > found.high);
    }
    let mean = sum / runs as f64;
    assert!((mean - psi(tilt)).abs() < 0.01, "{mean} of {}", psi(tilt));
    assert!(outside <= 8, "{outside} of {runs}");
}

#[test]
fn rows_in_other_cells_begin_anew() {
    let mut evidence = OutputEvidence::default();
    evidence.add(None);
    assert_eq!(evidence.rows(), (0, 0));
    let learning = Compared { epoch: 1, problem: Some("none".to_owned()), ..Compared::default() };
    evidence.add(Some(&Arc::new(learning.clone())));
    assert_eq!((evidence.rows(), evidence.problem.as_deref()), ((0, 0), Some("none")));
    evidence.add(Some(&compared(1, &[50, 50], &[8, 2])));
    evidence.add(Some(&compared(1, &[60, 60], &[9, 5])));
    assert_eq!((evidence.rows(), evidence.problem.as_deref()), ((14, 120), None));
    assert!(evidence.features[0].ln.abs() > 0.0);
    // A restart: what was kept is of other cells.
    let text = serde_json::to_string(&evidence).unwrap();
    let mut read: OutputEvidence = serde_json::from_str(&text).unwrap();
    assert_eq!((read.rows(), read.features[0].ln), (evidence.rows(), evidence.features[0].ln));
    read.add(Some(&compared(1, &[7, 0, 0], &[1, 0, 0])));
    assert_eq!(read.rows(), (1, 7));
    evidence.add(Some(&compared(2, &[4, 4, 4], &[1, 1, 1])));
    assert_eq!((evidence.rows(), evidence.features[0].stable.len()), ((3, 12), 3));
}
