//! The two-sample Kolmogorov-Smirnov test: D and its p-value as `scipy.stats.ks_2samp` gives them
//! with `method="auto"`: exact while both samples have at most 10,000 values, else the distribution
//! of one sample of nm/(n+m) values.

use std::f64::consts::PI;

use statrs::function::gamma::ln_gamma;

/// Larger samples get the asymptotic p-value.
const EXACT_MAX: usize = 10_000;
/// Up to so many values the one-sample distribution is computed by its matrix, not by its series.
const MATRIX_MAX: u64 = 140;

/// Largest distance of the two distribution functions; 0 to 1. Both samples ascending, not empty.
pub fn ks_distance(a: &[f64], b: &[f64]) -> f64 {
    let (n, m) = (a.len() as f64, b.len() as f64);
    let mut largest = 0.0_f64;
    super::walk(a, b, |below_a, below_b, _, _| {
        largest = largest.max((below_a as f64 / n - below_b as f64 / m).abs());
    });
    largest
}

/// Two-sided p-value of a distance between samples of `n` and `m` values.
pub fn ks_p_value(distance: f64, n: usize, m: usize) -> f64 {
    if n == 0 || m == 0 {
        return 1.0;
    }
    if n.max(m) <= EXACT_MAX {
        return exact(distance, n, m);
    }
    let effective = (n as f64 * m as f64 / (n as f64 + m as f64)).round_ties_even();
    one_sample(distance, effective.max(1.0))
}

/// Share of the lattice paths from (0, 0) to (m, n) that touch the bounds which `distance` sets:
/// `p(i, j) = (p(i-1, j) i + p(i, j-1) j) / (i + j)`, and 1 outside. One column is kept.
fn exact(distance: f64, n: usize, m: usize) -> f64 {
    let (n, m) = (n.min(m), n.max(m));
    let common = gcd(n, m);
    let (ng, mg) = ((n / common) as f64, (m / common) as f64);
    let h = (distance * ng * m as f64).round_ties_even();
    if h <= 0.0 {
        return 1.0;
    }
    // Column i has the rows j with |ng i - mg j| < h; what is not in it is outside.
    let first = |i: usize| ((ng * i as f64 - h) / mg).floor() + 1.0;
    let end = |i: usize| ((ng * i as f64 + h) / mg).ceil();
    let window = |i: usize| {
        #[expect(clippy::cast_possible_truncation, reason = "held within 0..=n + 1")]
        #[expect(clippy::cast_sign_loss, reason = "held within 0..=n + 1")]
        let held = |edge: f64| edge.clamp(0.0, n as f64 + 1.0) as usize;
        (held(first(i)), held(end(i)))
    };
    let mut column = vec![1.0; n + 1];
    let (mut low, mut high) = window(0);
    column[low..high].fill(0.0);
    for i in 1..=m {
        let (next_low, next_high) = window(i);
        // Rows that leave the window are outside from now on.
        column[low..next_low.min(high)].fill(1.0);
        if next_high <= next_low {
            return 1.0;
        }
        let mut below = if next_low == 0 { 0.0 } else { 1.0 };
        for (j, cell) in column[..next_high].iter_mut().enumerate().skip(next_low) {
            below = (*cell * i as f64 + below * j as f64) / (i + j) as f64;
            *cell = below;
        }
        (low, high) = (next_low, next_high);
    }
    column[n].clamp(0.0, 1.0)
}

fn gcd(a: usize, b: usize) -> usize {
    if b == 0 { a } else { gcd(b, a % b) }
}

/// P(D_n >= x) for one sample of `n` values; each range by the method that is exact enough there
/// (Simard and L'Ecuyer 2011).
fn one_sample(x: f64, n: f64) -> f64 {
    if x <= 0.0 || n * x <= 0.5 {
        return 1.0;
    }
    if x >= 1.0 {
        return 0.0;
    }
    let spread = n * x * x;
    let small = n <= MATRIX_MAX as f64;
    let p = if x >= 0.5 || spread >= if small { 4.0 } else { 2.2 } {
        2.0 * one_sided(x, n)
    } else if small {
        1.0 - matrix(x, n)
    } else {
        1.0 - series(x, n)
    };
    p.clamp(0.0, 1.0)
}

/// P(D_n+ >= x), by the sum of Birnbaum and Tingey.
fn one_sided(x: f64, n: f64) -> f64 {
    let last = (n * (1.0 - x)).floor();
    let mut sum = 0.0;
    let mut k = 0.0;
    while k <= last {
        let (up, down) = (k / n + x, 1.0 - k / n - x);
        let choose = ln_gamma(n + 1.0) - ln_gamma(k + 1.0) - ln_gamma(n - k + 1.0);
        let rest = if n > k { (n - k) * down.max(0.0).ln() } else { 0.0 };
        sum += (choose + (k - 1.0) * up.ln() + rest).exp();
        k += 1.0;
    }
    x * sum
}

/// P(D_n < x), by the matrix of Durbin as Marsaglia, Tsang and Wang compute it; `n` is small.
fn matrix(x: f64, n: f64) -> f64 {
    #[expect(clippy::cast_possible_truncation, reason = "n is at most MATRIX_MAX")]
    #[expect(clippy::cast_sign_loss, reason = "it is above 0")]
    let k = (n * x).floor() as usize + 1;
    let size = 2 * k - 1;
    let h = k as f64 - n * x;
    let power = |x: f64, exponent: usize| x.powi(i32::try_from(exponent).unwrap_or(i32::MAX));
    let corner = if 2.0 * h > 1.0 { power(2.0 * h - 1.0, size) } else { 0.0 };
    let factorial = |to: usize| (1..=to).map(|factor| factor as f64).product::<f64>();
    let cell = |i: usize, j: usize| {
        let mut cell = if i + 1 >= j { 1.0 } else { 0.0 };
        cell -= if j == 0 { power(h, i + 1) } else { 0.0 };
        cell -= if i == size - 1 { power(h, size - j) } else { 0.0 };
        cell += if (i, j) == (size - 1, 0) { corner } else { 0.0 };
        cell / factorial((i + 1).saturating_sub(j))
    };
    let base: Vec<Vec<f64>> = (0..size).map(|i| (0..size).map(|j| cell(i, j)).collect()).collect();
    // n is small: as many products as it says, each scaled by i/n, so that nothing overflows.
    let mut row = vec![0.0; size];
    row[k - 1] = 1.0;
    let mut i = 1.0;
    while i <= n {
        let mut next = vec![0.0; size];
        for (from, share) in row.iter().enumerate() {
            for (to, cell) in next.iter_mut().enumerate() {
                *cell += share * base[from][to];
            }
        }
        row = next.iter().map(|share| share * i / n).collect();
        i += 1.0;
    }
    row[k - 1]
}

/// P(D_n < x), by the series of Pelz and Good to the order n^-1.5.
fn series(x: f64, n: f64) -> f64 {
    let z = n.sqrt() * x;
    let (z2, z3, z4, z6) = (z * z, z.powi(3), z.powi(4), z.powi(6));
    let (pi2, pi4, pi6) = (PI * PI, PI.powi(4), PI.powi(6));
    let root = (2.0 * PI).sqrt();
    let terms = (16.0 * z / PI).ceil().max(1.0);
    let mut sums = [0.0; 4];
    let mut k = 1.0;
    while k <= terms {
        let odd = (2.0 * k - 1.0).powi(2);
        let q = (-pi2 * odd / (8.0 * z2)).exp();
        sums[0] += q;
        sums[1] += q * (-z2 + pi2 / 4.0 * odd);
        sums[2] += q
            * (6.0 * z6
                + 2.0 * z4
                + (2.0 * z4 - 5.0 * z2) * pi2 / 4.0 * odd
                + pi4 * (1.0 - 2.0 * z2) / 16.0 * odd * odd);
        sums[3] += q
            * (-30.0 * z6 - 90.0 * z4 * z4
                + pi2 * (135.0 * z4 - 96.0 * z6) / 4.0 * odd
                + pi4 * (-60.0 * z2 + 212.0 * z4) / 16.0 * odd * odd
                + pi6 * (5.0 - 30.0 * z2) / 64.0 * odd.powi(3));
        k += 1.0;
    }
    let scale = [z, 6.0 * z4, 72.0 * z.powi(7), 6480.0 * z.powi(10)];
    for (sum, by) in sums.iter_mut().zip(scale) {
        *sum *= root / by;
    }
    let mut k = 1.0;
    while k <= terms {
        let square = k * k;
        let q = (-pi2 * square / (2.0 * z2)).exp() * square * pi2 * root;
        sums[2] -= q / (36.0 * z3);
        sums[3] += q * (3.0 * z2 - pi2 * square) / (216.0 * z6);
        k += 1.0;
    }
    sums[0] + sums[1] / n.sqrt() + sums[2] / n + sums[3] / n.powf(1.5)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(got: f64, want: f64, relative: f64) {
        assert!((got - want).abs() <= relative * want.abs(), "{got}, expected {want}");
    }

    #[test]
    fn small_samples_have_the_shares_of_all_arrangements() {
        // Two of two: of the 6 arrangements 2 have D = 1 and 2 have D = 0 only where D >= 0.5 always.
        close(ks_p_value(1.0, 2, 2), 2.0 / 6.0, 1e-12);
        close(ks_p_value(0.5, 2, 2), 1.0, 1e-12);
        // scipy 1.17.1: ks_2samp(range(3), [3, 4, 5, 6]).
        close(ks_p_value(1.0, 3, 4), 2.0 / 35.0, 1e-12);
        assert_eq!(ks_p_value(0.0, 7, 9), 1.0);
    }

    #[test]
    fn each_range_of_one_sample_agrees_with_scipy() {
        // scipy 1.17.1: kstwo.sf(x, n).
        for (x, n, want) in ONE_SAMPLE {
            close(one_sample(*x, *n), *want, 1e-6);
        }
    }

    const ONE_SAMPLE: &[(f64, f64, f64)] = &[
        (0.05, 50.0, 0.9990238098461883),
        (0.12, 50.0, 0.4337679661310233),
        (0.2, 100.0, 0.0005551927327988775),
        (0.3, 100.0, 1.7719869892662917e-08),
        (0.6, 30.0, 7.392006292214292e-11),
        (0.01, 8571.0, 0.35577624429321764),
        (0.0147, 8571.0, 0.04875417536351312),
        (0.02, 8571.0, 0.002075777528008902),
        (0.04, 8571.0, 2.3660923679641005e-12),
        (0.05, 200.0, 0.6802625495871704),
        (0.1, 200.0, 0.03411035080315383),
        (0.003, 50000.0, 0.7579000443487147),
        (0.006, 50000.0, 0.05442749636006261),
        (0.009, 50000.0, 0.0006033803687140785),
        (0.0015, 1_000_000.0, 0.022195758430640866),
    ];
}
