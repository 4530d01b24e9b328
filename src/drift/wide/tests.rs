use super::*;

fn rows(seed: u64, count: u64, shift: f64) -> Vec<[f64; DIMENSIONS]> {
    let value = |row: u64, d: usize| normal(seed, row * 16 + d as u64) + shift;
    (0..count).map(|row| std::array::from_fn(|d| value(row, d))).collect()
}

fn summed(waves: &Waves, rows: &[[f64; DIMENSIONS]]) -> Fourier {
    let mut sums = Fourier::default();
    rows.iter().for_each(|row| sums.add(waves, row));
    sums
}

/// The discrepancy itself, over all pairs.
fn exact(a: &[[f64; DIMENSIONS]], b: &[[f64; DIMENSIONS]], sigma: f64) -> f64 {
    let mean = |a: &[[f64; DIMENSIONS]], b: &[[f64; DIMENSIONS]]| {
        let kernel = |x: &[f64; DIMENSIONS], y: &[f64; DIMENSIONS]| {
            let square: f64 = x.iter().zip(y).map(|(x, y)| (x - y).powi(2)).sum();
            (-square / (2.0 * sigma * sigma)).exp()
        };
        let sum: f64 = a.iter().flat_map(|x| b.iter().map(move |y| kernel(x, y))).sum();
        sum / (a.len() * b.len()) as f64
    };
    mean(a, a) + mean(b, b) - 2.0 * mean(a, b)
}

#[test]
fn random_features_give_the_discrepancy_of_the_kernel() {
    let (a, b) = (rows(1, 200, 0.0), rows(2, 150, 0.6));
    let kernel = Kernel::over(&a, SEED);
    // The median distance of 16 standard normal numbers: sqrt(2 * 15.34).
    assert!((kernel.sigma - 5.54).abs() < 0.15, "{}", kernel.sigma);
    let waves = kernel.waves();
    let (found, want) =
        (summed(&waves, &a).mmd2(&summed(&waves, &b)).unwrap(), exact(&a, &b, kernel.sigma));
    assert!((found / want - 1.0).abs() < 0.2, "{found}, expected {want}");
}

#[test]
fn parts_add_up_and_what_is_not_finite_is_missing() {
    let all = rows(3, 90, 0.0);
    let waves = Kernel::over(&all, SEED).waves();
    let whole = summed(&waves, &all);
    let mut merged = Fourier::default();
    all.chunks(20).for_each(|part| merged.merge(&summed(&waves, part)));
    assert_eq!(merged.rows, 90);
    assert!(merged.mmd2(&whole).unwrap() < 1e-20);
    merged.add(&waves, &[f64::NAN; DIMENSIONS]);
    merged.add(&waves, &[f64::INFINITY; DIMENSIONS]);
    assert_eq!((merged.rows, merged.missing), (90, 2));
    assert!(merged.fits() && Fourier::default().mmd2(&whole).is_none());
}

#[test]
fn a_projection_keeps_lengths_on_average_and_is_always_the_same() {
    let image: Vec<f64> = (0..3000).map(|at| normal(5, at)).collect();
    let square: f64 = image.iter().map(|value| value * value).sum::<f64>() / 3000.0;
    // Over 200 images: each of the 16 numbers has the mean square of an element.
    let mut sum = 0.0;
    for seed in 0..200 {
        sum += project(&image, 1, seed).iter().map(|number| number * number).sum::<f64>();
    }
    let mean = sum / 200.0 / DIMENSIONS as f64;
    assert!((mean / square - 1.0).abs() < 0.1, "{mean}, expected {square}");
    // Written down: what is stored in profiles depends on it.
    let first = project(&[1.0, 2.0, 4.0], 1, SEED);
    assert_eq!(first.map(|number| (number * 3.0_f64.sqrt()).round()), PROJECTED);
}

const PROJECTED: [f64; DIMENSIONS] =
    [-5.0, -7.0, 1.0, 3.0, 7.0, 7.0, -1.0, 7.0, -3.0, 7.0, -3.0, -7.0, 1.0, 5.0, 7.0, 1.0];

#[test]
fn a_row_is_summed_up() {
    let found = Summary::of(&[0.0, 0.0, 255.0, 100.0, f64::NAN]).unwrap();
    assert_eq!((found.min, found.max, found.mean, found.saturated), (0.0, 255.0, 88.75, 0.75));
    assert!((found.norm - (255.0_f64.powi(2) + 100.0_f64.powi(2)).sqrt()).abs() < 1e-9);
    // numpy.std([0, 0, 255, 100])
    assert!((found.std - 104.30574049399199).abs() < 1e-9, "{}", found.std);
    assert_eq!(Summary::of(&[f64::NAN]), None);
}
