use super::super::feature::{Part, Role, of_rows};
use super::super::random::{normal, uniform};
use super::super::wide::DIMENSIONS;
use super::*;
use crate::domain::DataType;

pub(crate) fn learner(features: Vec<Feature>, keep_values: bool) -> Learner {
    Learner::new(features, LearnSettings { keep_values, ..LearnSettings::default() }).unwrap()
}

pub(crate) fn finished(learner: Learner) -> Learnt {
    let model = "iris".parse().unwrap();
    learner.finish((model, None), "train.csv", jiff::Timestamp::UNIX_EPOCH).unwrap()
}

fn one(datatype: DataType) -> Vec<Feature> {
    of_rows(Role::Input, "x", datatype, Some(&[]))
}

#[test]
fn the_kind_follows_from_type_and_values() {
    type Case<'a> = (&'a str, DataType, &'a [f64], bool);
    let many: Vec<f64> = (0..40).map(f64::from).collect();
    let cases: &[Case<'_>] = &[
        ("floats", DataType::Fp32, &[1.0, 2.0, 1.0], false),
        ("few integers", DataType::Int64, &[1.0, 2.0, 1.0], true),
        ("many integers", DataType::Int64, &many, false),
        ("booleans", DataType::Bool, &[0.0, 1.0], true),
    ];
    for (name, datatype, values, categories) in cases {
        let mut learner = learner(one(*datatype), false);
        values.iter().for_each(|value| learner.add(0, Value::Number(*value)));
        let learnt = finished(learner);
        let found = matches!(learnt.profile.features[0].reference, Reference::Cat(_));
        assert_eq!(found, *categories, "{name}");
    }
    let mut learner = learner(one(DataType::Bytes), false);
    [&b"b"[..], b"a", b"b"].iter().for_each(|text| learner.add(0, Value::Text(text)));
    learner.add(0, Value::Missing);
    let learnt = finished(learner);
    let Reference::Cat(cat) = &learnt.profile.features[0].reference else { panic!("a text") };
    assert_eq!(
        (cat.categories.names(), &cat.tally.counts[..], cat.tally.missing),
        (&["b".to_owned(), "a".to_owned()][..], &[2, 1][..], 1)
    );
}

#[test]
fn numbers_have_quantiles_and_counts() {
    let mut learner = learner(one(DataType::Fp64), true);
    (0..=1000).for_each(|at| learner.add(0, Value::Number(f64::from(at) / 10.0)));
    learner.add(0, Value::Number(f64::NAN));
    learner.add(0, Value::Number(f64::INFINITY));
    learner.add(0, Value::Missing);
    let learnt = finished(learner);
    let Reference::Num(numeric) = &learnt.profile.features[0].reference else { panic!("numbers") };
    // numpy.quantile(numpy.arange(1001) / 10, …)
    let q = &numeric.quantiles;
    let near = |got: f64, want: f64| assert!((got - want).abs() < 1e-9, "{got}, expected {want}");
    near(q.p0_1, 0.1);
    near(q.p5, 5.0);
    near(q.p50, 50.0);
    near(q.p99_9, 99.9);
    near(q.mad, 25.0);
    let cells = &numeric.cells;
    assert_eq!((cells.len(), cells.nan, cells.infinite, cells.missing), (1001, 1, 1, 1));
    assert_eq!((numeric.distinct, learnt.profile.source.rows), (1001, 1004));
    assert_eq!(learnt.profile.features[0].sample().unwrap().len(), 1001);
}

#[test]
fn outputs_that_are_no_distributions_have_no_class() {
    let features = of_rows(Role::Output, "y", DataType::Fp32, Some(&[2]));
    let class = features.iter().position(|feature| feature.part == Part::Class).unwrap();
    let mut learner = learner(features, false);
    for row in 0..1000 {
        learner.add(0, Value::Number(uniform(1, row)));
        learner.add(1, Value::Number(uniform(2, row)));
        learner.add(class, if row < 20 { Value::Missing } else { Value::Text(b"1") });
    }
    let learnt = finished(learner);
    assert_eq!(learnt.profile.features.len(), 2);
    assert_eq!(learnt.notes.len(), 4, "{:?}", learnt.notes);
    assert!(learnt.notes[0].contains("class(y)"), "{:?}", learnt.notes);
}

#[test]
fn thresholds_are_what_chunks_of_the_reference_score() {
    let learn = |jump: bool| {
        let mut learner = learner(one(DataType::Fp64), false);
        for row in 0..5000_u64 {
            // A reference that has two regimes scores more against itself.
            let shift = if jump && row >= 2500 { 2.0 } else { 0.0 };
            learner.add(0, Value::Number(normal(9, row) + shift));
        }
        finished(learner).profile.features.remove(0)
    };
    let (calm, restless) = (learn(false), learn(true));
    let psi = calm.thresholds[&Score::CellPsi];
    assert_eq!((psi.chunk_rows, psi.chunks, psi.usual), (500, 10, 0.1));
    // The null's mean for 500 rows out of 5,000 themselves: 9 (1/500 - 1/5000) = 0.0162.
    assert!((0.008..0.03).contains(&psi.learnt_mean), "{psi:?}");
    assert_eq!(psi.limit(), 0.1);
    assert!(restless.thresholds[&Score::CellPsi].learnt_mean > 0.5);
    assert!(restless.limit(Score::CellPsi).unwrap() > 0.5);
    assert_eq!(calm.limit(Score::CellP), None);
    assert_eq!(calm.limit(Score::Psi), Some(0.1));
}

#[test]
fn a_shifted_projection_is_seen_and_the_same_is_not() {
    let features = of_rows(Role::Input, "x", DataType::Fp32, Some(&[64, 64]));
    let at = features.iter().position(|feature| feature.part == Part::Mmd).unwrap();
    let mut learner = learner(features, false);
    let row = |seed: u64, row: u64, shift: f64| -> [f64; DIMENSIONS] {
        std::array::from_fn(|d| normal(seed, row * 16 + d as u64) + shift)
    };
    (0..4000).for_each(|at_row| learner.add(at, Value::Vector(&row(1, at_row, 0.0))));
    let feature = finished(learner).profile.features.remove(0);
    let score = |seed: u64, shift: f64| {
        let mut counters = feature.counters();
        (0..1000).for_each(|at_row| {
            feature.add(&mut counters, Value::Vector(&row(seed, at_row, shift)))
        });
        let scores = feature.score(&counters);
        scores.iter().find(|(score, _)| *score == Score::Mmd).unwrap().1
    };
    let limit = feature.thresholds[&Score::Mmd].learnt();
    assert!(score(2, 0.0) < limit && limit < 0.01, "{} {limit}", score(2, 0.0));
    assert!(score(3, 0.3) > 3.0 * limit, "{} {limit}", score(3, 0.3));
}

#[test]
fn wrong_rows_are_counted_by_kind() {
    use super::super::quality::Oddities;
    let count = |feature: &FeatureProfile, values: &[Value<'_>]| {
        let (mut found, mut outliers) = (Oddities::default(), 0);
        for value in values {
            outliers += u32::from(found.count(feature.oddity(*value), *value));
        }
        (found, outliers)
    };
    let mut learner = learner(one(DataType::Fp64), false);
    (0..5000).for_each(|row| learner.add(0, Value::Number(normal(4, row))));
    let numbers = finished(learner).profile.features.remove(0);
    let odd = [0.5, -4.0, 9.0, f64::NAN, f64::INFINITY].map(Value::Number);
    let want = Oddities {
        missing: 1,
        nan: 1,
        infinite: 1,
        out_of_range: 1,
        far_out: 1,
        ..Oddities::default()
    };
    assert_eq!(count(&numbers, &[&odd[..], &[Value::Missing]].concat()), (want, 1));
    assert_eq!(
        Oddities::KINDS.into_iter().zip(want.counts()).find(|(_, n)| *n == 0),
        Some(("shape", 0))
    );
    let mut learner = self::learner(one(DataType::Bytes), false);
    [&b"a"[..], b"b"].iter().for_each(|text| learner.add(0, Value::Text(text)));
    let texts = finished(learner).profile.features.remove(0);
    let want = Oddities { unseen_category: 2, missing: 1, ..Oddities::default() };
    let values = [Value::Text(b"c"), Value::Text(b"a"), Value::Text(b"c"), Value::Missing];
    assert_eq!(count(&texts, &values), (want, 2));
    // Of a tensor whose length varies: between 3 and 12, and no other.
    let features = of_rows(Role::Input, "x", DataType::Int64, None);
    let of_length = features.into_iter().filter(|feature| feature.name == "length(x)").collect();
    let mut learner = self::learner(of_length, false);
    (0..1000).for_each(|row| learner.add(0, Value::Number(f64::from(3 + row % 10))));
    let length = finished(learner).profile.features.remove(0);
    let want = Oddities { shape: 3, ..Oddities::default() };
    let lengths = [0.0, 2.0, 3.0, 12.0, 13.0].map(Value::Number);
    assert_eq!(count(&length, &lengths), (want, 3));
}

#[test]
fn one_value_where_the_reference_has_several_is_constant() {
    let constant = |feature: &FeatureProfile, values: &[Value<'_>], rows: usize| {
        let mut counters = feature.counters();
        values.iter().cycle().take(rows).for_each(|value| feature.add(&mut counters, *value));
        feature.is_constant(&counters)
    };
    let mut learner = learner(one(DataType::Fp64), false);
    (0..1000).for_each(|row| learner.add(0, Value::Number(uniform(4, row))));
    let numbers = finished(learner).profile.features.remove(0);
    let (half, both) = ([Value::Number(0.5)], [0.5, 0.6].map(Value::Number));
    assert!(constant(&numbers, &half, 200) && !constant(&numbers, &both, 200));
    assert!(!constant(&numbers, &half, 199), "too few rows");
    let mut learner = self::learner(one(DataType::Bytes), false);
    [&b"a"[..], b"b"].iter().for_each(|text| learner.add(0, Value::Text(text)));
    let texts = finished(learner).profile.features.remove(0);
    let (a, both) = ([Value::Text(b"a")], [&b"a"[..], b"b"].map(Value::Text));
    assert!(constant(&texts, &a, 200) && !constant(&texts, &both, 200));
    let mut learner = self::learner(one(DataType::Fp64), false);
    (0..1000).for_each(|_| learner.add(0, Value::Number(0.5)));
    let same = finished(learner).profile.features.remove(0);
    assert!(!constant(&same, &half, 200), "as the reference is");
}

#[test]
fn odd_values_are_told() {
    use super::super::outliers::Oddity;
    let mut learner = learner(one(DataType::Fp64), false);
    (0..5000).for_each(|row| learner.add(0, Value::Number(normal(4, row))));
    let feature = finished(learner).profile.features.remove(0);
    assert_eq!(feature.oddity(Value::Number(1.0)), None);
    assert_eq!(feature.oddity(Value::Number(4.0)), Some(Oddity::OutOfRange));
    assert_eq!(feature.oddity(Value::Number(9.0)), Some(Oddity::FarOut));
    assert_eq!(feature.oddity(Value::Number(f64::NAN)), Some(Oddity::NoValue));
    let mut learner = super::tests::learner(one(DataType::Bytes), false);
    learner.add(0, Value::Text(b"a"));
    let feature = finished(learner).profile.features.remove(0);
    assert_eq!(feature.oddity(Value::Text(b"a")), None);
    assert_eq!(feature.oddity(Value::Text(b"b")), Some(Oddity::UnseenCategory));
}
