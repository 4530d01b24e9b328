use proptest::prelude::*;

use super::super::random::{normal, uniform};
use super::super::scores::{Sample, ks_distance, wasserstein};
use super::*;

fn filled(grid: &Grid, values: &[f64]) -> Cells {
    let mut cells = Cells::new(grid);
    values.iter().for_each(|value| cells.add(grid, *value));
    cells
}

/// Values of many forms: continuous, in steps, with atoms, far out.
fn form(form: u8, seed: u64, count: u64) -> Vec<f64> {
    let one = |at: u64| match form % 5 {
        0 => normal(seed, at),
        1 => (normal(seed, at) * 1.5 + 0.3).exp(),
        2 => (uniform(seed, at) * 7.0).floor(),
        3 if uniform(!seed, at) < 0.4 => 0.0,
        3 => uniform(seed, at),
        _ => normal(seed, at) * 50.0 - 20.0,
    };
    (0..count).map(one).collect()
}

#[test]
fn a_value_is_in_the_cell_whose_edges_enclose_it() {
    let grid = Grid::try_from(vec![0.0, 1.0, 3.0]).unwrap();
    let cells =
        filled(&grid, &[-2.0, 0.0, 0.5, 1.0, 2.0, 3.0, 8.0, f64::NAN, f64::INFINITY, -1e200]);
    assert_eq!(cells.counts, [1, 2, 2, 2]);
    assert_eq!(cells.sums, [2.0, 1.5, 3.0, 5.0]);
    assert_eq!((cells.len(), cells.rows(), cells.nan, cells.infinite), (7, 10, 1, 2));
    assert_eq!((cells.min, cells.max, cells.zeros, cells.out_of_range()), (-2.0, 8.0, 1, 3));
    let values = [-2.0, 0.0, 0.5, 1.0, 2.0, 3.0, 8.0];
    let sample = Sample::new(values.to_vec(), false);
    assert!(
        (cells.mean - sample.mean()).abs() < 1e-12 && (cells.std() - sample.std()).abs() < 1e-12
    );
}

#[test]
fn an_atom_has_a_cell_of_its_own() {
    let mut values = vec![0.1_f64; 500];
    values.extend((0..500).map(|i| f64::from(i) / 500.0));
    values.sort_by(f64::total_cmp);
    let grid = Grid::over(&values, CELLS).unwrap();
    let at = grid.edges().iter().position(|edge| *edge == 0.1).unwrap();
    assert_eq!(grid.edges()[at + 1], 0.1_f64.next_up());
    let cells = filled(&grid, &values);
    assert_eq!(cells.counts[at + 1], 501, "500, and the one in its place");
    assert_eq!(cells.out_of_range(), 0, "the reference has nothing outside its own range");
    assert!(Grid::over(&[], CELLS).is_none());
    assert_eq!(Grid::over(&[2.0; 9], CELLS).unwrap().edges(), [2.0, 2.0_f64.next_up()]);
}

#[test]
fn wrong_edges_are_refused() {
    for (edges, want) in [
        (vec![1.0], GridError::Edges(1)),
        (vec![0.0; EDGES_MAX + 1], GridError::Edges(EDGES_MAX + 1)),
        (vec![0.0, 0.0], GridError::Order(1)),
        (vec![0.0, f64::NAN], GridError::Order(1)),
        (vec![0.0, f64::INFINITY], GridError::Order(1)),
    ] {
        assert_eq!(Grid::try_from(edges), Err(want));
    }
}

#[test]
fn groups_have_about_a_tenth_each() {
    for form_number in 0..5 {
        let mut values = form(form_number, 5, 5000);
        values.sort_by(f64::total_cmp);
        let grid = Grid::over(&values, CELLS).unwrap();
        let reference = filled(&grid, &values);
        let groups = grid.groups(&reference);
        let counts = reference.grouped(&groups);
        assert_eq!((groups.len(), counts.iter().sum::<u64>()), (grid.edges().len() + 1, 5000));
        assert!((2..=GROUPS).contains(&counts.len()), "{form_number}: {counts:?}");
        assert!(counts.iter().all(|count| *count >= 250), "{form_number}: {counts:?}");
    }
}

/// The distances of monitoring's table, within the noise of a seed.
#[test]
fn the_lower_bound_is_close() {
    let mut reference = form(0, 1, 20_000);
    reference.sort_by(f64::total_cmp);
    let current: Vec<f64> = form(0, 2, 8000).iter().map(|value| value * 1.05 + 0.08).collect();
    let grid = Grid::over(&reference, CELLS).unwrap();
    let (a, b) = (filled(&grid, &reference), filled(&grid, &current));
    let current = Sample::new(current, false);
    let exact = wasserstein(&reference, current.sorted());
    let low = a.wasserstein_low(&b, &grid).unwrap();
    assert!(low <= exact && low > 0.99 * exact, "{low} of {exact}");
    let distance = ks_distance(&reference, current.sorted());
    let (low, high) = a.ks_bounds(&b, &grid).unwrap();
    assert!(low <= distance && distance <= high, "{low} <= {distance} <= {high}");
    assert!(high - low < 2.5 / CELLS as f64, "{low} to {high}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Bounds hold whatever the two samples are, and parts add up to the whole.
    #[test]
    fn bounds_hold_and_parts_add_up(
        forms in (0_u8..5, 0_u8..5),
        seed in any::<u64>(),
        sizes in (2_u64..400, 1_u64..400),
        cells in 16_usize..80,
        cut in any::<usize>(),
    ) {
        let mut reference = form(forms.0, seed, sizes.0);
        reference.sort_by(f64::total_cmp);
        let current = form(forms.1, !seed, sizes.1);
        let grid = Grid::over(&reference, cells).unwrap();
        let (a, b) = (filled(&grid, &reference), filled(&grid, &current));
        prop_assert!(a.fits(&grid) && b.fits(&grid));
        let sample = Sample::new(current.clone(), false);
        let exact = wasserstein(&reference, sample.sorted());
        let low = a.wasserstein_low(&b, &grid).unwrap();
        prop_assert!(low <= exact * (1.0 + 1e-9) + 1e-12, "{} > {}", low, exact);
        let distance = ks_distance(&reference, sample.sorted());
        let (low, high) = a.ks_bounds(&b, &grid).unwrap();
        prop_assert!(low <= distance + 1e-12 && distance <= high + 1e-12, "{low} {distance} {high}");

        let at = cut % (current.len() + 1);
        let mut merged = filled(&grid, &current[..at]);
        merged.merge(&filled(&grid, &current[at..]));
        prop_assert_eq!(&merged.counts, &b.counts);
        prop_assert_eq!((merged.len(), merged.zeros), (b.len(), b.zeros));
        prop_assert_eq!((merged.min, merged.max), (b.min, b.max));
        let near = |x: f64, y: f64| (x - y).abs() <= 1e-9 * (1.0 + x.abs().max(y.abs()));
        prop_assert!(near(merged.mean, b.mean) && near(merged.squares, b.squares));
        prop_assert!(merged.sums.iter().zip(&b.sums).all(|(x, y)| near(*x, *y)));
    }
}
