//! Whether a score says anything: what it is when nothing has changed, and across many features.

use statrs::distribution::{ChiSquared, ContinuousCDF as _};

/// Share of false alerts among all alerts that the features of one window are held to.
pub const FALSE_SHARE: f64 = 0.05;
/// Fewer rows on either side are no evidence at all.
pub const ROWS_MIN: u64 = 200;

/// The quantile `1 - alpha` of χ² with `cells - 1` degrees of freedom; `alpha` within (0, 1).
fn chi_square_critical(cells: usize, alpha: f64) -> f64 {
    match ChiSquared::new(cells.saturating_sub(1) as f64) {
        Ok(distribution) => distribution.inverse_cdf(1.0 - alpha),
        Err(_) => 0.0,
    }
}

/// What PSI over `cells` cells stays below with probability `1 - alpha` when nothing has changed, with
/// `n` reference and `m` current rows. Holds where each cell expects some five rows.
pub fn psi_critical(n: u64, m: u64, cells: usize, alpha: f64) -> f64 {
    (1.0 / n as f64 + 1.0 / m as f64) * chi_square_critical(cells, alpha)
}

/// The same for the Jensen-Shannon distance.
pub fn jensen_shannon_critical(n: u64, m: u64, cells: usize, alpha: f64) -> f64 {
    (psi_critical(n, m, cells, alpha) / 8.0).sqrt()
}

/// Benjamini and Hochberg: which of the p-values are findings, so that of all findings a share of
/// `false_share` at most is expected to be none. What is not a number is none.
pub fn findings(p_values: &[f64], false_share: f64) -> Vec<bool> {
    let mut order: Vec<usize> = (0..p_values.len()).filter(|i| !p_values[*i].is_nan()).collect();
    order.sort_by(|a, b| p_values[*a].total_cmp(&p_values[*b]));
    let count = order.len() as f64;
    let below =
        |(rank, i): (usize, &usize)| p_values[*i] <= false_share * (rank as f64 + 1.0) / count;
    let taken = order.iter().enumerate().rposition(below).map_or(0, |last| last + 1);
    let mut found = vec![false; p_values.len()];
    for i in &order[..taken] {
        found[*i] = true;
    }
    found
}

#[cfg(test)]
mod tests {
    use super::super::random::mix;
    use super::super::scores::Shares;
    use super::*;

    #[test]
    fn findings_are_those_of_the_step_up_procedure() {
        // scipy 1.17.1: stats.false_discovery_control(p) <= 0.05.
        let p = [0.01, 0.04, 0.03, 0.005, 0.5, f64::NAN];
        assert_eq!(findings(&p, 0.05), [true, true, true, true, false, false]);
        let p = [0.04, 0.03, 0.049, 0.9, 0.2];
        assert_eq!(findings(&p, 0.05), [false; 5]);
        assert!(findings(&[], 0.05).is_empty());
    }

    #[test]
    fn a_window_exceeds_the_critical_value_as_often_as_it_says() {
        // 400 pairs of 1,000 and 500 rows in ten cells at a nominal 5 %: 0.05 + 3 standard errors.
        let draw = |seed: u64, rows: u64| {
            let mut cells = [0_u64; 10];
            for row in 0..rows {
                cells[(mix(seed, row) >> 32) as usize % 10] += 1;
            }
            cells
        };
        let critical = psi_critical(1000, 500, 10, 0.05);
        let of_distance = jensen_shannon_critical(1000, 500, 10, 0.05);
        let (mut psi, mut distance, mut p) = (0, 0, 0);
        for seed in 0..400 {
            let cells = draw(seed, 1000).into_iter().zip(draw(!seed, 500)).collect();
            let shares = Shares::new(cells).unwrap();
            psi += u32::from(shares.psi() > critical);
            distance += u32::from(shares.jensen_shannon() > of_distance);
            p += u32::from(shares.same_source_p() < 0.05);
        }
        for (name, count) in [("PSI", psi), ("Jensen-Shannon", distance), ("p", p)] {
            assert!((7..=33).contains(&count), "{name}: {count} of 400");
        }
    }

    #[test]
    fn critical_values_are_scaled_quantiles() {
        // scipy 1.17.1: chi2.ppf(0.95, 9) = 16.918977604620448.
        let want = 16.918977604620448 * (1.0 / 1000.0 + 1.0 / 500.0);
        let got = psi_critical(1000, 500, 10, 0.05);
        assert!((got - want).abs() < 1e-9 * want, "{got}");
        let got = jensen_shannon_critical(1000, 500, 10, 0.05);
        assert!((got - (want / 8.0).sqrt()).abs() < 1e-9, "{got}");
        assert_eq!(psi_critical(1000, 500, 1, 0.05), 0.0);
    }
}
