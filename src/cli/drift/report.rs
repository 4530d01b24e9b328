//! What a comparison says, for people and as JSON.

use serde_json::{Map, Value, json};

use super::Compared;
use super::check::Failure;
use crate::cli::admin::table::{Table, plain};
use crate::drift::counters::Score;
use crate::drift::scores::dataset_drifts;
use crate::drift::verdict::State;

pub(super) struct Report {
    pub(super) reference: String,
    pub(super) current: String,
    pub(super) rows: (u64, u64),
    pub(super) features: Vec<Compared>,
    pub(super) notes: Vec<String>,
}

/// What Evidently's preset for data drift would say.
pub(super) struct Evidently {
    pub(super) drifted: usize,
    pub(super) columns: usize,
    pub(super) share: f64,
}

impl Report {
    /// Features in this state; drifted are those that a gateway would alert on.
    pub(super) fn count(&self, state: State) -> usize {
        self.features.iter().filter(|compared| compared.verdict.state == state).count()
    }

    pub(super) fn evidently(&self) -> Evidently {
        let verdicts = || self.features.iter().filter_map(|compared| compared.evidently);
        let columns = verdicts().count();
        let drifted = verdicts().filter(|verdict| verdict.drifted).count();
        let share = if columns == 0 { 0.0 } else { drifted as f64 / columns as f64 };
        Evidently { drifted, columns, share }
    }

    fn sampled(&self) -> Vec<String> {
        let sampled = self.features.iter().filter(|compared| compared.kept.0 > compared.kept.1);
        sampled
            .map(|compared| {
                let (came, kept) = compared.kept;
                let label = compared.feature.label();
                format!("{label}: {kept} of {came} current values were compared, a uniform sample")
            })
            .collect()
    }

    pub(super) fn json(&self, failures: &[Failure]) -> String {
        let Evidently { drifted, columns, share } = self.evidently();
        let report = json!({
            "reference": {"path": self.reference, "rows": self.rows.0},
            "current": {"path": self.current, "rows": self.rows.1},
            "features": self.features.iter().map(feature).collect::<Vec<_>>(),
            "drifted": self.count(State::Drifted),
            "insufficient": self.count(State::InsufficientData),
            "evidently": {
                "drifted": drifted, "columns": columns, "share": share,
                "dataset_drift": dataset_drifts(drifted, columns),
            },
            "failures": failures.iter().map(|failure| self.failure(failure)).collect::<Vec<_>>(),
            "notes": self.notes.iter().cloned().chain(self.sampled()).collect::<Vec<_>>(),
        });
        format!("{report:#}\n")
    }

    fn failure(&self, failure: &Failure) -> Value {
        json!({
            "feature": failure.feature.map(|number| &self.features[number].feature.name),
            "role": failure.feature.map(|number| self.features[number].feature.role),
            "score": failure.measure.name(), "value": failure.value, "limit": failure.limit,
        })
    }

    pub(super) fn told(&self, failure: &Failure) -> String {
        let label = failure.feature.map(|number| self.features[number].feature.label() + ": ");
        let (name, value, limit) = (failure.measure.name(), failure.value, failure.limit);
        format!("{}{name} is {value:.6}, the limit is {limit}", label.unwrap_or_default())
    }

    pub(super) fn text(&self, failures: &[Failure]) -> String {
        let shown = [
            Score::CellPsi,
            Score::Wasserstein,
            Score::WassersteinLow,
            Score::Jensenshannon,
            Score::Mmd,
            Score::Missing,
        ];
        let mut table = Table::new([
            "FEATURE",
            "STATE",
            "ROWS",
            "CELL_PSI",
            "WASSERSTEIN",
            "WASSERSTEIN_LOW",
            "JENSENSHANNON",
            "MMD",
            "MISSING",
            "EVIDENTLY",
        ]);
        for compared in &self.features {
            let [psi, wasserstein, low, js, mmd, missing] = shown.map(|wanted| {
                let score = compared.scores.iter().find(|(score, _)| *score == wanted);
                score.map_or_else(|| "-".to_owned(), |(_, value)| format!("{value:.4}"))
            });
            let evidently = compared.evidently.map_or("-", |verdict| match verdict.drifted {
                true => "drift",
                false => "ok",
            });
            let label = plain(&compared.feature.label());
            let state = compared.verdict.state.name().to_owned();
            let rows = compared.current.rows().to_string();
            table.row([
                label,
                state,
                rows,
                psi,
                wasserstein,
                low,
                js,
                mmd,
                missing,
                evidently.to_owned(),
            ]);
        }
        let Evidently { drifted, columns, share } = self.evidently();
        let mut text = table.text();
        text += &format!(
            "{} of {} features drifted, {} have too few rows; Evidently: {drifted} of {columns} columns, {:.0} %\n",
            self.count(State::Drifted),
            self.features.len(),
            self.count(State::InsufficientData),
            share * 100.0
        );
        for note in self.notes.iter().chain(&self.sampled()) {
            text += &format!("note: {}\n", plain(note));
        }
        for failure in failures {
            text += &format!("beyond: {}\n", plain(&self.told(failure)));
        }
        text
    }
}

fn feature(compared: &Compared) -> Value {
    let scores: Map<String, Value> = compared
        .scores
        .iter()
        .map(|(score, value)| (score.name().to_owned(), json!(value)))
        .collect();
    let side = |counters: &crate::drift::counters::Counters| json!({"rows": counters.rows(), "without_value": counters.rows() - counters.len()});
    json!({
        "name": compared.feature.name,
        "role": compared.feature.role,
        "tensor": compared.feature.tensor,
        "kind": compared.kind,
        "reference": side(&compared.reference),
        "current": side(&compared.current),
        "quality": compared.quality,
        "state": compared.verdict.state,
        "p": compared.verdict.p,
        "beyond": compared.verdict.beyond,
        "scores": scores,
        "evidently": compared.evidently,
    })
}
