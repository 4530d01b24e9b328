//! Figures against those of scikit-learn 1.9.1 and scipy 1.17.1, of data that both make by the same
//! arithmetic, and what has to hold of any tally.

use proptest::prelude::*;

use super::tally::Scores;
use super::*;

const ROWS: u64 = 200;

fn close(got: f64, want: f64) {
    assert!((got - want).abs() <= 1e-12 * want.abs().max(1.0), "{got} is not {want}");
}

fn row(label: usize, predicted: usize, probabilities: &[f64]) -> ClassRow {
    let brier: f64 = probabilities
        .iter()
        .enumerate()
        .map(|(at, p)| (p - f64::from(u8::from(at == label))).powi(2))
        .sum();
    let scores = Scores {
        probability: probabilities[label],
        confidence: probabilities[predicted],
        brier: if probabilities.len() == 2 { brier / 2.0 } else { brier },
    };
    ClassRow { label: label.to_string(), predicted: predicted.to_string(), scores: Some(scores) }
}

/// Three classes, as `p = raw / raw.sum()`.
fn three_classes() -> Judged {
    let one = |i: u64| {
        let part = |step: u64, of: u64| ((i * step) % of + 1) as f64 / of as f64;
        let raw = [part(7919, 101), part(104_729, 103), part(1_299_709, 107)];
        let sum: f64 = raw.iter().sum();
        let p = raw.map(|raw| raw / sum);
        let predicted = (1..3).fold(0, |best, at| if p[at] > p[best] { at } else { best });
        let label = usize::try_from((i * 31 + (i * i) % 7) % 3).unwrap();
        row(label, predicted, &p)
    };
    Judged::Classification((0..ROWS).map(one).collect())
}

fn classified(judged: &Judged) -> Classification {
    Figures::from(&Tally::of_label(Some(judged))).classification.unwrap()
}

#[test]
fn figures_of_three_classes_are_those_of_scikit_learn() {
    let figures = classified(&three_classes());
    close(figures.accuracy.value, 0.435);
    close(figures.precision, 0.434_869_755_373_511_47);
    close(figures.recall, 0.434_465_051_856_356_2);
    close(figures.f1, 0.434_460_663_925_449_3);
    close(figures.log_loss.unwrap().value, 1.305_633_344_603_504_2);
    close(figures.brier.unwrap().value, 0.741_721_485_954_371_9);
    close(figures.calibration.unwrap().ece, 0.118_003_056_106_369_02);
    let of = |class: &ClassFigures| {
        let value = |estimate: Option<Estimate>| estimate.unwrap().value;
        (class.support, value(class.precision), value(class.recall), value(class.f1))
    };
    let want = [
        (69, 0.438_356_164_383_561_6, 0.463_768_115_942_029, 0.450_704_225_352_112_7),
        (66, 0.430_769_230_769_230_8, 0.424_242_424_242_424_25, 0.427_480_916_030_534_34),
        (65, 0.435_483_870_967_741_94, 0.415_384_615_384_615_4, 0.425_196_850_393_700_8),
    ];
    for (class, want) in figures.classes.iter().zip(want) {
        let got = of(class);
        assert_eq!(got.0, want.0);
        close(got.1, want.1);
        close(got.2, want.2);
        close(got.3, want.3);
        let f1 = class.f1.unwrap();
        assert!(f1.low.unwrap() < f1.value && f1.value < f1.high.unwrap());
    }
}

#[test]
fn figures_of_two_classes_are_those_of_scikit_learn() {
    let one = |i: u64| {
        let q = ((i * 7919) % 997 + 1) as f64 / 999.0;
        row(usize::from((i * 613) % 11 < 5), usize::from(q >= 0.5), &[1.0 - q, q])
    };
    let figures = classified(&Judged::Classification((0..ROWS).map(one).collect()));
    close(figures.accuracy.value, 0.5);
    close(figures.log_loss.unwrap().value, 1.036_924_749_886_100_5);
    close(figures.brier.unwrap().value, 0.337_305_253_201_149_07);
}

#[test]
fn figures_of_a_regression_are_those_of_scikit_learn() {
    let part = |i: u64, step: u64, of: u64| ((i * step) % of) as f64 / 100.0;
    let one = |i| ValueRow { label: part(i, 7919, 1009), predicted: part(i, 104_729, 1013) };
    let judged = Judged::Regression((0..ROWS).map(one).collect());
    let figures = Figures::from(&Tally::of_label(Some(&judged))).regression.unwrap();
    close(figures.mae.value, 3.214_8);
    close(figures.rmse.value, 3.936_117_503_327_358_8);
    close(figures.bias.value, -0.033_4);
    let (low, high) = (figures.rmse.low.unwrap(), figures.rmse.high.unwrap());
    assert!(low < figures.rmse.value && figures.rmse.value < high);
}

#[test]
fn bounds_of_shares_are_those_of_scipy() {
    let (low, high) = share_bounds(37, 200).unwrap();
    close(low, 0.137_301_928_006_160_45);
    close(high, 0.244_570_627_611_517_52);
    let (low, high) = share_bounds(0, 10).unwrap();
    close(low, 0.0);
    close(high, 0.277_532_799_862_889_26);
    assert_eq!(share_bounds(0, 0), None);
}

/// The point of a confidence sequence: whoever looks at every step is wrong as seldom as promised.
#[test]
fn bounds_of_a_mean_hold_at_every_look() {
    use rand::SeedableRng as _;
    use rand::{RngExt as _, rngs::StdRng};
    let (runs, mut missed, mut naive) = (400, 0, 0);
    for seed in 0..runs {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut moments = Moments::default();
        let (mut out, mut out_naive) = (false, false);
        for step in 1..=2000 {
            let value: f64 = rng.random();
            moments.count += 1;
            moments.sum += value;
            moments.squares += value * value;
            if step < 30 {
                continue;
            }
            let (low, high) = mean_bounds(&moments).unwrap();
            out |= !(low..=high).contains(&0.5);
            let half = 1.96 * (moments.variance() / step as f64).sqrt();
            out_naive |= (moments.mean() - 0.5).abs() > half;
        }
        missed += u32::from(out);
        naive += u32::from(out_naive);
    }
    assert!(missed <= 20, "{missed} of {runs} runs left the bounds");
    assert!(naive > 100, "bounds for one look would have done as well: {naive}");
}

#[test]
fn delays_are_told_within_twice() {
    let mut tally = Tally::default();
    for seconds in [0, 1, 3, 100, 86_400, 90 * 86_400, u64::MAX] {
        tally.first_label(std::time::Duration::from_secs(seconds));
    }
    tally.predictions = 5;
    let figures = Figures::from(&tally);
    let delay = figures.delay.unwrap();
    assert_eq!((delay.p50_s, delay.p90_s), (128, 1 << 27));
    // The count of predictions is a moment behind that of labels.
    close(figures.coverage.unwrap().value, 1.0);
}

#[test]
fn what_has_a_limit_keeps_it() {
    let mut tally = Tally::default();
    for at in 0..CLASSES_MAX + 50 {
        let (label, predicted) = (format!("c{at:04}"), "c0000".to_owned());
        let row = ClassRow { label, predicted, scores: None };
        tally.add(&Tally::of_label(Some(&Judged::Classification(vec![row]))));
        tally.add(&Tally::of_metric(&format!("m{at}"), 1.0));
    }
    let figures = Figures::from(&tally);
    let classification = figures.classification.unwrap();
    assert_eq!(classification.classes.len(), CLASSES_MAX);
    assert_eq!(classification.rows, CLASSES_MAX as u64 + 50);
    assert_eq!(figures.metrics.len(), METRICS_MAX);
    assert_eq!(tally.metric_names().count(), METRICS_MAX);
}

fn labels() -> impl Strategy<Value = Vec<Tally>> {
    let class = (0..4_usize, 0..4_usize, 0.0..1.0_f64).prop_map(|(label, predicted, score)| {
        let scores = Scores { probability: score, confidence: score, brier: score };
        let row = ClassRow {
            label: label.to_string(),
            predicted: predicted.to_string(),
            scores: Some(scores),
        };
        Tally::of_label(Some(&Judged::Classification(vec![row])))
    });
    let value = (-9.0..9.0_f64, -9.0..9.0_f64).prop_map(|(label, predicted)| {
        Tally::of_label(Some(&Judged::Regression(vec![ValueRow { label, predicted }])))
    });
    let metric = (0..3_u8, -9.0..9.0_f64)
        .prop_map(|(name, value)| Tally::of_metric(&format!("m{name}"), value));
    let none = Just(Tally::of_label(None));
    proptest::collection::vec(prop_oneof![class, value, metric, none], 0..40)
}

fn sum(tallies: &[Tally]) -> Tally {
    let mut all = Tally::default();
    tallies.iter().for_each(|tally| all.add(tally));
    all
}

/// Equal in what is counted, and in what is summed up to rounding.
fn same(a: &Tally, b: &Tally) {
    let text = |tally: &Tally| {
        let mut value = serde_json::to_value(Figures::from(tally)).unwrap();
        round(&mut value);
        value.to_string()
    };
    assert_eq!(text(a), text(b));
}

fn round(value: &mut serde_json::Value) {
    match value {
        serde_json::Value::Number(number) => {
            let rounded = (number.as_f64().unwrap() * 1e4).round() / 1e4;
            // Zero has one sign here.
            *value = serde_json::json!(rounded + 0.0);
        }
        serde_json::Value::Array(all) => all.iter_mut().for_each(round),
        serde_json::Value::Object(all) => all.values_mut().for_each(round),
        _ => {}
    }
}

proptest! {
    #[test]
    fn tallies_add_up_in_any_order_and_go_again(first in labels(), second in labels()) {
        let (one, other) = (sum(&first), sum(&second));
        let mut there = one.clone();
        there.add(&other);
        let mut back = other.clone();
        back.add(&one);
        same(&there, &back);
        same(&there, &sum(&[first, second.clone()].concat()));
        // A correction takes away what it corrects, whenever that came.
        for tally in second.iter().rev() {
            there.remove(tally);
        }
        same(&there, &one);
        // As it is kept.
        let kept: Tally = serde_json::from_str(&serde_json::to_string(&one).unwrap()).unwrap();
        same(&kept, &one);
    }
}
