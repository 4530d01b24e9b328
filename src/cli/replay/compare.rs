//! How outputs differ, output by output, and whether that is more than somebody allows.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Value, json};

use super::recorded::{Recorded, Tensor};
use crate::cli::admin::table::{Table, plain};

/// Predictions that are named for each output.
const WORST_MAX: usize = 5;

/// What a limit is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Measure {
    MaxAbs,
    MaxRel,
    Flips,
    Errors,
    Different,
}

const MEASURES: [(&str, Measure); 5] = [
    ("max-abs", Measure::MaxAbs),
    ("max-rel", Measure::MaxRel),
    ("flips", Measure::Flips),
    ("errors", Measure::Errors),
    ("different", Measure::Different),
];

/// `max-abs=1e-4`
pub(super) fn limit(text: &str) -> Result<(Measure, f64), String> {
    let (name, number) = text.split_once('=').unwrap_or((text, ""));
    let measure = MEASURES.iter().find(|(known, _)| *known == name);
    let number = number.parse::<f64>().ok().filter(|number| *number >= 0.0);
    match (measure, number) {
        (Some((_, measure)), Some(number)) => Ok((*measure, number)),
        _ => {
            let names: Vec<&str> = MEASURES.iter().map(|(name, _)| *name).collect();
            Err(format!("expected one of {}, = and a number", names.join(", ")))
        }
    }
}

/// What came of a replay.
#[derive(Default)]
pub(super) struct Report {
    tolerance: f64,
    /// Inputs that were sent.
    pub(super) sent: u64,
    /// Records that have not all of their inputs and outputs.
    pub(super) skipped: u64,
    pub(super) refused: u64,
    /// Predictions with an output that is not the same.
    pub(super) different: u64,
    refusals: Vec<(String, String)>,
    outputs: BTreeMap<String, Output>,
}

/// Of one output, over all predictions.
#[derive(Default)]
struct Output {
    compared: u64,
    different: u64,
    /// It is not in the answer, or of another shape or datatype.
    unlike: u64,
    max_abs: f64,
    max_rel: f64,
    rows: u64,
    flips: u64,
    worst: Vec<(f64, String)>,
}

impl Report {
    pub(super) fn new(tolerance: f64) -> Self {
        Self { tolerance, ..Self::default() }
    }

    pub(super) fn refused(&mut self, recorded: &Recorded, why: String) {
        self.sent += 1;
        self.refused += 1;
        if self.refusals.len() < WORST_MAX {
            self.refusals.push((recorded.id.clone(), why));
        }
    }

    pub(super) fn add(&mut self, recorded: &Recorded, outputs: &[Tensor]) {
        self.sent += 1;
        let mut same = true;
        for then in &recorded.outputs {
            let now = outputs.iter().find(|now| now.name == then.name);
            let report = self.outputs.entry(then.name.clone()).or_default();
            same &= report.add(&recorded.id, then, now, self.tolerance);
        }
        // One that was not there then; a caller may have asked for some outputs only.
        self.different += u64::from(!same);
    }

    /// The largest of each measure.
    fn measured(&self, measure: Measure) -> f64 {
        let outputs = self.outputs.values();
        let share = |part: u64, all: u64| if all == 0 { 0.0 } else { part as f64 / all as f64 };
        match measure {
            Measure::MaxAbs => outputs.map(Output::abs).fold(0.0, f64::max),
            Measure::MaxRel => outputs.map(Output::rel).fold(0.0, f64::max),
            Measure::Flips => outputs.map(|it| share(it.flips, it.rows)).fold(0.0, f64::max),
            Measure::Errors => self.refused as f64,
            Measure::Different => share(self.different, self.sent),
        }
    }

    pub(super) fn json(&self, beyond: &[String]) -> Value {
        let outputs: Vec<Value> = self.outputs.iter().map(|(name, it)| it.json(name)).collect();
        let refusals: Vec<Value> = self
            .refusals
            .iter()
            .map(|(id, why)| json!({"prediction_id": id, "error": why}))
            .collect();
        json!({
            "sent": self.sent, "skipped": self.skipped, "errors": self.refused,
            "different": self.different, "tolerance": self.tolerance, "outputs": outputs,
            "first_errors": refusals, "beyond": beyond,
        })
    }

    pub(super) fn text(&self, beyond: &[String]) -> String {
        let mut out = format!(
            "{} sent, {} different, {} refused; {} records without all of their tensors\n",
            self.sent, self.different, self.refused, self.skipped
        );
        let head =
            ["output", "compared", "different", "unlike", "max abs", "max rel", "flips", "worst"];
        let mut table = Table::new(head);
        for (name, it) in &self.outputs {
            table.row([
                name.clone(),
                it.compared.to_string(),
                it.different.to_string(),
                it.unlike.to_string(),
                number(it.max_abs),
                number(it.max_rel),
                format!("{}/{}", it.flips, it.rows),
                it.worst.iter().map(|(_, id)| id.as_str()).collect::<Vec<_>>().join(" "),
            ]);
        }
        out += &table.text();
        for (id, why) in &self.refusals {
            writeln!(out, "refused {}: {}", plain(id), plain(why)).ok();
        }
        for what in beyond {
            writeln!(out, "beyond its limit: {what}").ok();
        }
        out
    }
}

fn number(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        value => format!("{value:.3e}"),
    }
}

impl Output {
    /// Whether they are the same, within the tolerance.
    fn add(&mut self, id: &str, then: &Tensor, now: Option<&Tensor>, tolerance: f64) -> bool {
        let like = |now: &&Tensor| now.datatype == then.datatype && now.shape == then.shape;
        let Some(now) = now.filter(like) else {
            self.unlike += 1;
            self.note(f64::INFINITY, id);
            return false;
        };
        self.compared += 1;
        let (Some(then_values), Some(now_values)) = (then.numbers(), now.numbers()) else {
            self.rows += 1;
            let same = then.data == now.data;
            self.flips += u64::from(!same);
            self.different += u64::from(!same);
            if !same {
                self.note(f64::INFINITY, id);
            }
            return same;
        };
        let mut largest = 0.0_f64;
        for (then, now) in then_values.iter().zip(&now_values) {
            let abs = difference(*then, *now);
            largest = largest.max(abs);
            self.max_rel = self.max_rel.max(relative(abs, *then, *now));
        }
        self.max_abs = self.max_abs.max(largest);
        self.flip(then, &then_values, &now_values);
        let same = largest <= tolerance;
        self.different += u64::from(!same);
        if largest > 0.0 {
            self.note(largest, id);
        }
        same
    }

    /// Rows whose largest value is in another place; of a row of one value, whether a whole number
    /// is another: a class.
    fn flip(&mut self, of: &Tensor, then: &[f64], now: &[f64]) {
        use crate::domain::DataType;
        let last = of.shape.last().and_then(|last| usize::try_from(*last).ok()).unwrap_or(1);
        let float = matches!(
            of.datatype,
            DataType::Fp16 | DataType::Bf16 | DataType::Fp32 | DataType::Fp64
        );
        match (float, last) {
            (true, 0 | 1) => {}
            (true, last) => {
                for (then, now) in then.chunks(last).zip(now.chunks(last)) {
                    self.rows += 1;
                    self.flips += u64::from(largest_at(then) != largest_at(now));
                }
            }
            (false, _) => {
                self.rows += then.len() as u64;
                let other = then.iter().zip(now).filter(|(then, now)| then != now);
                self.flips += other.count() as u64;
            }
        }
    }

    fn note(&mut self, much: f64, id: &str) {
        self.worst.push((much, id.to_owned()));
        self.worst.sort_by(|(a, _), (b, _)| b.total_cmp(a));
        self.worst.truncate(WORST_MAX);
    }

    /// What is unlike has no difference in numbers: it is beyond any.
    fn abs(&self) -> f64 {
        if self.unlike > 0 { f64::INFINITY } else { self.max_abs }
    }

    fn rel(&self) -> f64 {
        if self.unlike > 0 { f64::INFINITY } else { self.max_rel }
    }

    fn json(&self, name: &str) -> Value {
        // JSON has no infinity.
        let number = |value: f64| if value.is_finite() { json!(value) } else { json!("Infinity") };
        let worst =
            self.worst.iter().map(|(much, id)| json!({"prediction_id": id, "abs": number(*much)}));
        json!({
            "name": name, "compared": self.compared, "different": self.different,
            "unlike": self.unlike, "max_abs": number(self.max_abs), "max_rel": number(self.max_rel),
            "rows": self.rows, "flips": self.flips, "worst": worst.collect::<Vec<_>>(),
        })
    }
}

fn difference(then: f64, now: f64) -> f64 {
    // Two NaN are the same, two infinities of one sign too.
    if then == now || (then.is_nan() && now.is_nan()) {
        return 0.0;
    }
    let abs = (then - now).abs();
    if abs.is_nan() { f64::INFINITY } else { abs }
}

fn relative(abs: f64, then: f64, now: f64) -> f64 {
    let size = then.abs().max(now.abs());
    match abs {
        0.0 => 0.0,
        abs if abs.is_infinite() || size.is_nan() => f64::INFINITY,
        abs => abs / size,
    }
}

fn largest_at(row: &[f64]) -> Option<usize> {
    // The first of equals, as most programs have it.
    let better = |best: Option<usize>, at: usize| match best {
        Some(best) if row[best].total_cmp(&row[at]).is_ge() => Some(best),
        _ => Some(at),
    };
    (0..row.len()).fold(None, better)
}

pub(super) struct Limits<'a>(pub(super) &'a [(Measure, f64)]);

impl Limits<'_> {
    /// Each limit that the report is beyond, in words.
    pub(super) fn beyond(&self, report: &Report) -> Vec<String> {
        let beyond = |(measure, limit): &(Measure, f64)| {
            let found = report.measured(*measure);
            let name = MEASURES.iter().find(|(_, known)| known == measure).map_or("", |it| it.0);
            (found > *limit).then(|| format!("{name} {} > {limit}", number(found)))
        };
        self.0.iter().filter_map(beyond).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::DataType;

    fn floats(name: &str, shape: &[u64], values: &[f32]) -> Tensor {
        let data = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Tensor { name: name.to_owned(), datatype: DataType::Fp32, shape: shape.to_vec(), data }
    }

    fn recorded(output: Tensor) -> Recorded {
        let inputs = vec![floats("x", &[1], &[0.0])];
        Recorded { id: "id".to_owned(), model: "m".to_owned(), inputs, outputs: vec![output] }
    }

    fn report(then: Tensor, now: Tensor, tolerance: f64) -> Report {
        let mut report = Report::new(tolerance);
        report.add(&recorded(then), &[now]);
        report
    }

    #[test]
    fn outputs_are_compared_by_value_and_by_class() {
        let then = || floats("y", &[2, 2], &[0.9, 0.1, 0.4, 0.6]);
        let same = report(then(), then(), 0.0);
        assert_eq!((same.different, same.measured(Measure::MaxAbs)), (0, 0.0));
        let now = floats("y", &[2, 2], &[0.9, 0.1, 0.6, 0.4]);
        let flipped = report(then(), now, 0.0);
        assert_eq!(
            (flipped.different, flipped.outputs["y"].flips, flipped.outputs["y"].rows),
            (1, 1, 2)
        );
        assert!((flipped.measured(Measure::MaxAbs) - 0.2).abs() < 1e-6);
        assert_eq!(flipped.outputs["y"].worst[0].1, "id");
        let near = report(then(), floats("y", &[2, 2], &[0.9, 0.1, 0.4, 0.600001]), 1e-3);
        assert_eq!(near.different, 0);
        let unlike = report(then(), floats("y", &[4], &[0.9, 0.1, 0.4, 0.6]), 1.0);
        assert_eq!((unlike.different, unlike.measured(Measure::MaxAbs)), (1, f64::INFINITY));
        let nan = || floats("y", &[1], &[f32::NAN]);
        assert_eq!(report(nan(), nan(), 0.0).different, 0);
        assert_eq!(report(nan(), floats("y", &[1], &[0.0]), 1e9).different, 1);
    }

    #[test]
    fn limits_are_told_when_they_are_passed() {
        let then = floats("y", &[1, 2], &[0.9, 0.1]);
        let report = report(then, floats("y", &[1, 2], &[0.1, 0.9]), 0.0);
        let limits: Vec<(Measure, f64)> = ["max-abs=0.5", "flips=1", "errors=0", "different=0.5"]
            .map(|text| limit(text).unwrap())
            .into();
        let beyond = Limits(&limits).beyond(&report);
        assert_eq!(beyond, ["max-abs 8.000e-1 > 0.5", "different 1.000e0 > 0.5"]);
        assert!(report.text(&beyond).contains("beyond its limit: max-abs"));
        assert_eq!(report.json(&beyond)["outputs"][0]["flips"], 1);
        for wrong in ["max-abs", "max-abs=", "max-abs=-1", "worst=1", "flips=NaN"] {
            assert!(limit(wrong).is_err(), "{wrong}");
        }
    }
}
