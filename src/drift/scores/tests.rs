use super::*;

fn close(what: &str, got: f64, want: f64, relative: f64) {
    let apart = (got - want).abs();
    assert!(apart <= relative * want.abs(), "{what}: {got}, expected {want}");
}

/// `(i * step mod modulus) / modulus`, the numbers that the vectors were made with.
fn spread(step: u64, modulus: u64, count: u64) -> Vec<f64> {
    (0..count).map(|i| (i * step % modulus) as f64 / modulus as f64).collect()
}

fn value(test: ColumnTest, sides: &Sides<'_>) -> f64 {
    test.value(sides).unwrap()
}

// All numbers here: Evidently 0.7.23 and scipy 1.17.1, with pandas 2.3.3 and numpy 2.4.6.

#[test]
fn numbers_agree_with_evidently() {
    let reference = Sample::new(spread(7919, 10007, 5000), false);
    let current = spread(104_729, 10009, 3000).into_iter().map(|x| x.powf(1.2)).collect();
    let current = Sample::new(current, false);
    let sides = Sides::Numbers { reference: &reference, current: &current };
    for (test, want, relative) in [
        (ColumnTest::Psi, 0.029960129135346673, 1e-9),
        (ColumnTest::Jensenshannon, 0.061044239987053626, 1e-9),
        (ColumnTest::KlDiv, 0.01440507008866872, 1e-9),
        (ColumnTest::Wasserstein, 0.1564004358127325, 1e-9),
        (ColumnTest::Hellinger, 0.061120100000894, 1e-9),
        (ColumnTest::Ks, 5.047887204618146e-08, 1e-6),
    ] {
        close(&format!("{test:?}"), value(test, &sides), want, relative);
    }
    let (a, b) = (reference.sorted(), current.sorted());
    close("D", ks_distance(a, b), 0.0682, 1e-9);
    close("W1", wasserstein(a, b), 0.045158195227186004, 1e-9);
}

#[test]
fn large_samples_get_the_asymptotic_p_value() {
    let reference = Sample::new(spread(7919, 100_003, 20_000), false);
    for (power, distance, p) in LARGE {
        let current: Vec<f64> = spread(104_729, 100_019, 15_000);
        let current = current.into_iter().map(|x| x.powf(*power)).collect();
        let current = Sample::new(current, false);
        let found = ks_distance(reference.sorted(), current.sorted());
        close("D", found, *distance, 1e-9);
        close("p", ks_p_value(found, 20_000, 15_000), *p, 1e-6);
    }
}

const LARGE: &[(f64, f64, f64)] = &[
    (1.05, 0.018400000000000027, 0.005958107506152577),
    (1.1, 0.03553333333333336, 7.736818802825426e-10),
    (1.3, 0.09668333333333334, 3.460459433382627e-70),
];

#[test]
fn few_numbers_have_a_bin_each() {
    let of = |counts: &[(f64, usize)]| {
        Sample::new(counts.iter().flat_map(|(x, n)| vec![*x; *n]).collect(), false)
    };
    let reference = of(&[(0.0, 500), (1.0, 300), (2.0, 200)]);
    let current = of(&[(0.0, 100), (1.0, 150), (2.0, 90), (7.0, 3)]);
    let sides = Sides::Numbers { reference: &reference, current: &current };
    for (test, want) in [
        (ColumnTest::Psi, 0.21979516926725537),
        (ColumnTest::Jensenshannon, 0.15956416641133617),
        (ColumnTest::KlDiv, 0.10178251233997554),
        (ColumnTest::Wasserstein, 0.4139734689375556),
        (ColumnTest::Hellinger, 0.06620258478801942),
    ] {
        close(&format!("{test:?}"), value(test, &sides), want, 1e-9);
    }
    close("ks", value(ColumnTest::Ks, &sides), 3.309901517014482e-10, 1e-6);
    // 7 is new: no expected row, so no chance.
    assert_eq!(value(ColumnTest::Chisquare, &sides), 0.0);
}

#[test]
fn bins_of_integers_are_at_least_one_wide() {
    let of = |step: u64, modulus: u64, count: u64| {
        Sample::new((0..count).map(|i| (i * step % modulus) as f64).collect(), true)
    };
    let (reference, current) = (of(7919, 37, 3000), of(104_729, 41, 2000));
    let sides = Sides::Numbers { reference: &reference, current: &current };
    for (test, want) in [
        (ColumnTest::Psi, 0.49968913445317514),
        (ColumnTest::Jensenshannon, 0.16546075337164162),
        (ColumnTest::KlDiv, 0.08029953352297517),
        (ColumnTest::Wasserstein, 0.18848345663966207),
        (ColumnTest::Hellinger, 0.11178929448287438),
    ] {
        close(&format!("{test:?}"), value(test, &sides), want, 1e-9);
    }
    assert_eq!(evidently::sturges((0.0, 8.0), 5000, true).len() - 1, 8);
    assert_eq!(evidently::sturges((0.0, 8.0), 5000, false).len() - 1, 14);
}

#[test]
fn categories_agree_with_evidently() {
    let of = |counts: &[(&str, u64)]| -> Counts {
        counts.iter().map(|(name, count)| ((*name).to_owned(), *count)).collect()
    };
    let reference = of(&[("a", 1200), ("b", 900), ("c", 900)]);
    let current = of(&[("a", 292), ("b", 236), ("c", 236), ("d", 236)]);
    let sides = Sides::Categories { reference: &reference, current: &current };
    close("psi", value(ColumnTest::Psi, &sides), 1.8968001923982398, 1e-9);
    close("js", value(ColumnTest::Jensenshannon, &sides), 0.2997541367820494, 1e-9);
    close("kl", value(ColumnTest::KlDiv, &sides), 0.2689511579088085, 1e-9);
    close("hellinger", value(ColumnTest::Hellinger, &sides), 0.3550696584633724, 1e-9);
    assert_eq!(value(ColumnTest::Chisquare, &sides), 0.0);
    let current = of(&[("a", 292), ("b", 236), ("c", 236)]);
    let sides = Sides::Categories { reference: &reference, current: &current };
    close("chi-square", value(ColumnTest::Chisquare, &sides), 0.6038901298926083, 1e-9);
    close("psi", value(ColumnTest::Psi, &sides), 0.0013308076215234098, 1e-9);
    let (a, b) = (of(&[("a", 700), ("b", 300)]), of(&[("a", 180), ("b", 120)]));
    let sides = Sides::Categories { reference: &a, current: &b };
    close("z", value(ColumnTest::Z, &sides), 0.001160656964265483, 1e-9);
}

#[test]
fn the_test_is_chosen_by_rows_and_distinct_values() {
    use ColumnTest::{Chisquare, Jensenshannon, Ks, Wasserstein, Z};
    let cases: &[(usize, usize, bool, ColumnTest)] = &[
        (1000, 6, true, Ks),
        (1000, 5, true, Chisquare),
        (1000, 2, true, Z),
        (1001, 6, true, Wasserstein),
        (1001, 5, true, Jensenshannon),
        (1000, 9, false, Chisquare),
        (1000, 2, false, Z),
        (1001, 9, false, Jensenshannon),
    ];
    for (rows, distinct, numbers, want) in cases {
        let values: Vec<f64> = (0..*rows).map(|row| (row % distinct) as f64).collect();
        let mut counts = Counts::new();
        for value in &values {
            *counts.entry(value.to_string()).or_default() += 1;
        }
        let sample = Sample::new(values, false);
        let sides = match numbers {
            true => Sides::Numbers { reference: &sample, current: &sample },
            false => Sides::Categories { reference: &counts, current: &counts },
        };
        let found = column_test(&sides).unwrap();
        assert_eq!((found.test, found.drifted), (*want, false), "{rows} rows, {distinct} values");
    }
    assert!(dataset_drifts(1, 2) && !dataset_drifts(1, 3) && !dataset_drifts(0, 0));
}

#[test]
fn what_cannot_be_scored_has_no_score() {
    let (empty, some) = (Sample::default(), Sample::new(vec![1.0, f64::NAN, f64::INFINITY], false));
    assert_eq!(some.sorted(), [1.0]);
    let sides = Sides::Numbers { reference: &some, current: &empty };
    assert_eq!(column_test(&sides), None);
    let counts = Counts::from([("a".to_owned(), 3)]);
    let sides = Sides::Categories { reference: &counts, current: &counts };
    assert_eq!(ColumnTest::Ks.value(&sides), None);
    assert_eq!(column_test(&sides).map(|found| found.value), Some(1.0));
    assert_eq!(Shares::new(vec![(0, 4)]), None);
    assert_eq!(chi_square_sf(f64::INFINITY, 3), 0.0);
    // scipy 1.17.1: chi2_contingency([[30, 20, 50], [25, 40, 35]], correction=False).
    let shares = Shares::new(vec![(30, 25), (20, 40), (50, 35)]).unwrap();
    close("same source", shares.same_source_p(), 0.00756566165907572, 1e-9);
}

#[test]
fn one_value_is_one_bin() {
    let one = Sample::new(vec![4.0; 30], false);
    let sides = Sides::Numbers { reference: &one, current: &one };
    for test in [ColumnTest::Psi, ColumnTest::Jensenshannon, ColumnTest::Hellinger] {
        assert_eq!(value(test, &sides), 0.0, "{test:?}");
    }
    assert_eq!(value(ColumnTest::Wasserstein, &sides), 0.0);
}
