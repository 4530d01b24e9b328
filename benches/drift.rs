//! What watching costs, by value: `cargo bench --bench drift`.
//!
//! Counters on grids of three sizes and on a dictionary, a ring of raw values, and a whole request of
//! 16 rows with 4 inputs and 3 scores, from tensors to counters. Then what is paid once a window, not
//! once a value: the scores of counters, and those of 8,192 raw values against 20,000.

#![expect(clippy::unwrap_used, reason = "a benchmark stops at the first surprise")]
#![expect(clippy::cast_possible_truncation, reason = "numbers of 64 bits become 32-bit ones")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tidegate::domain::{DataType, Tensor};
use tidegate::drift::counters::Counters;
use tidegate::drift::feature::{Feature, Role, Value, of_rows};
use tidegate::drift::learn::{LearnSettings, Learner};
use tidegate::drift::profile::Profile;
use tidegate::drift::random::normal;
use tidegate::drift::rows::{Plan, Scratch};
use tidegate::drift::scores::Sample;
use tidegate::drift::window::Ring;

const REFERENCE_ROWS: u64 = 20_000;
const VALUES: u64 = 4096;

fn learnt(
    features: Vec<Feature>,
    cells: usize,
    value: impl Fn(usize, u64) -> Option<f64>,
) -> Profile {
    let settings = LearnSettings { cells, keep_values: true, ..LearnSettings::default() };
    let count = features.len();
    let mut learner = Learner::new(features, settings).unwrap();
    for row in 0..REFERENCE_ROWS {
        for feature in 0..count {
            match value(feature, row) {
                Some(number) => learner.add(feature, Value::Number(number)),
                None => {
                    learner.add(feature, Value::Text(if row % 3 == 0 { b"red" } else { b"green" }))
                }
            }
        }
    }
    let model = ("bench".parse().unwrap(), None);
    learner.finish(model, "bench", jiff::Timestamp::UNIX_EPOCH).unwrap().profile
}

fn counted(c: &mut Criterion) {
    let mut group = c.benchmark_group("drift");
    group.throughput(Throughput::Elements(VALUES));
    let values: Vec<f64> = (0..VALUES).map(|row| normal(2, row) * 1.1).collect();
    let one = || of_rows(Role::Input, "x", DataType::Fp32, Some(&[]));
    for cells in [16, 64, 256] {
        let profile = learnt(one(), cells, |_, row| Some(normal(1, row)));
        let feature = &profile.features[0];
        let mut counters = feature.counters();
        group.bench_function(format!("count a number, {cells} cells"), |bench| {
            bench.iter(|| {
                for value in &values {
                    feature.add(&mut counters, Value::Number(*value));
                }
            });
        });
    }
    let profile = learnt(of_rows(Role::Input, "x", DataType::Bytes, Some(&[])), 64, |_, _| None);
    let feature = &profile.features[0];
    let mut counters = feature.counters();
    group.bench_function("count a category", |bench| {
        bench.iter(|| {
            for _ in 0..VALUES {
                feature.add(&mut counters, Value::Text(black_box(b"green")));
            }
        });
    });
    let mut ring = Ring::new(8192);
    group.bench_function("keep a raw value", |bench| {
        bench.iter(|| values.iter().for_each(|value| ring.push(black_box(*value))));
    });
    group.finish();
}

fn request(c: &mut Criterion) {
    const ROWS: usize = 16;
    let mut features = of_rows(Role::Input, "x", DataType::Fp32, Some(&[4]));
    features.extend(of_rows(Role::Output, "y", DataType::Fp32, Some(&[3])));
    // Scores are made from their row; what is learnt of them here does not matter for the cost.
    let profile = learnt(features, 64, |feature, row| Some(normal(feature as u64, row)));
    let plan = Plan::new(profile.features.iter().map(|feature| &feature.feature));
    let tensor = |columns: usize, of: &dyn Fn(usize) -> f32| {
        let data: Vec<u8> = (0..ROWS * columns).flat_map(|at| of(at).to_le_bytes()).collect();
        Tensor::new(DataType::Fp32, [ROWS, columns].as_slice().into(), data.into()).unwrap()
    };
    let x = tensor(4, &|at| normal(3, at as u64) as f32);
    let y = tensor(3, &|at| if at % 3 == 1 { 0.5 } else { 0.25 });
    let mut counters: Vec<Counters> = profile.features.iter().map(|f| f.counters()).collect();
    let mut scratch = Scratch::default();
    let mut group = c.benchmark_group("drift");
    group.throughput(Throughput::Elements((ROWS * profile.features.len()) as u64));
    group.bench_function("request of 16 rows, 11 features", |bench| {
        bench.iter(|| {
            for (role, name, tensor) in [(Role::Input, "x", &x), (Role::Output, "y", &y)] {
                plan.read(role, name, tensor, true, &mut scratch, |_, number, value| {
                    profile.features[number].add(&mut counters[number], value);
                });
            }
        });
    });
    group.finish();
}

fn scored(c: &mut Criterion) {
    let one = of_rows(Role::Input, "x", DataType::Fp32, Some(&[]));
    let profile = learnt(one, 64, |_, row| Some(normal(1, row)));
    let feature = &profile.features[0];
    let mut counters = feature.counters();
    let values: Vec<f64> = (0..8192).map(|row| normal(2, row) * 1.1).collect();
    values.iter().for_each(|value| feature.add(&mut counters, Value::Number(*value)));
    let mut group = c.benchmark_group("drift");
    group.bench_function("score counters", |bench| {
        bench.iter(|| feature.score(black_box(&counters)))
    });
    group.bench_function("score 8,192 values against 20,000", |bench| {
        bench.iter(|| feature.score_values(&Sample::new(values.clone(), false)));
    });
    group.finish();
}

criterion_group!(benches, counted, request, scored);
criterion_main!(benches);
