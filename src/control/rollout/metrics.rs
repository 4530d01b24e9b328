//! What the metrics page and the admin API see of rollouts, without asking the loop.
//!
//! Invariant: a rollout's series end with it, but for its state, which stays for [`LINGER`] so that
//! whoever scrapes sees how it ended.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use super::guards::GuardOutcome;
use super::{Rollout, State};
use crate::domain::ModelName;
use crate::observe::page::{Family, Kind, Labels};

/// How long the state of a rollout that has ended is shown.
const LINGER: Duration = Duration::from_secs(3600);
/// Ways in which a rollout ends, as labels.
const RESULTS: [State; 4] = [State::Promoted, State::RolledBack, State::Aborted, State::Failed];

/// The last record of each model's rollout.
#[derive(Default)]
pub(super) struct Board {
    /// Guards the records: taken for moments, by the loop and by who reads.
    shown: Mutex<BTreeMap<ModelName, Shown>>,
    ended: [AtomicU64; RESULTS.len()],
}

struct Shown {
    rollout: Arc<Rollout>,
    ended: Option<Instant>,
}

impl Board {
    pub(super) fn show(&self, rollout: &Arc<Rollout>) {
        let shown = Shown { rollout: Arc::clone(rollout), ended: None };
        self.shown.lock().insert(rollout.model.clone(), shown);
    }

    pub(super) fn ended(&self, rollout: &Arc<Rollout>) {
        if let Some(at) = RESULTS.iter().position(|state| *state == rollout.state) {
            self.ended[at].fetch_add(1, Ordering::Relaxed);
        }
        let mut shown = self.shown.lock();
        if let Some(shown) = shown.get_mut(&rollout.model) {
            shown.ended = Some(Instant::now());
        }
    }

    pub(super) fn get(&self, model: &ModelName) -> Option<Arc<Rollout>> {
        self.living()
            .into_iter()
            .find_map(|(rollout, _)| (rollout.model == *model).then_some(rollout))
    }

    /// Records, and whether each has ended.
    fn living(&self) -> Vec<(Arc<Rollout>, bool)> {
        let mut shown = self.shown.lock();
        shown.retain(|_, shown| shown.ended.is_none_or(|ended| ended.elapsed() < LINGER));
        shown.values().map(|shown| (Arc::clone(&shown.rollout), shown.ended.is_some())).collect()
    }

    pub(super) fn families(&self) -> Vec<Family> {
        let mut page = Page::default();
        for (rollout, ended) in self.living() {
            page.state(&rollout);
            if !ended {
                page.running(&rollout);
            }
        }
        let mut families = page.0;
        let mut ended = Family::new(ENDED.0, ENDED.1, ENDED.2);
        for (state, count) in RESULTS.iter().zip(&self.ended) {
            let labels = vec![("result".into(), state.as_str().to_owned())];
            ended.push(labels, count.load(Ordering::Relaxed) as f64);
        }
        families.push(ended);
        families
    }
}

type Named = (&'static str, Kind, &'static str);

const STATE: Named =
    ("tidegate_rollout_state", Kind::Gauge, "1 for the state that the model's rollout is in");
const WEIGHT: Named = (
    "tidegate_rollout_weight_ratio",
    Kind::Gauge,
    "Share of the traffic that a rollout gives its candidate",
);
const GUARD: Named =
    ("tidegate_rollout_guard", Kind::Gauge, "1 for the answer that a rollout's guard gave last");
const EVIDENCE: Named =
    ("tidegate_rollout_evidence", Kind::Gauge, "Number that a rollout's guard goes by");
const LIMIT: Named = (
    "tidegate_rollout_evidence_limit",
    Kind::Gauge,
    "Number at which that guard stops the rollout",
);
const REQUESTS: Named =
    ("tidegate_rollout_requests", Kind::Gauge, "Requests that a rollout has seen, by arm");
const FAILURES: Named =
    ("tidegate_rollout_failures", Kind::Gauge, "Of those, failures through no fault of the caller");
const ENDED: Named =
    ("tidegate_rollouts_ended_total", Kind::Counter, "Rollouts that have ended, by how");

/// The families of rollouts under way, in the order of the page.
struct Page(Vec<Family>);

impl Default for Page {
    fn default() -> Self {
        let all = [STATE, WEIGHT, GUARD, EVIDENCE, LIMIT, REQUESTS, FAILURES];
        Self(all.into_iter().map(|(name, kind, help)| Family::new(name, kind, help)).collect())
    }
}

impl Page {
    fn push(
        &mut self,
        named: Named,
        model: &ModelName,
        labels: &[(&'static str, &str)],
        value: f64,
    ) {
        let model = ("model".into(), model.to_string());
        let rest = labels.iter().map(|(name, value)| ((*name).into(), (*value).to_owned()));
        let labels: Labels = std::iter::once(model).chain(rest).collect();
        if let Some(family) = self.0.iter_mut().find(|family| family.name == named.0) {
            family.push(labels, value);
        }
    }

    fn state(&mut self, rollout: &Rollout) {
        for word in State::WORDS {
            let is = word == rollout.state.as_str();
            self.push(STATE, &rollout.model, &[("state", word)], f64::from(u8::from(is)));
        }
    }

    fn running(&mut self, rollout: &Rollout) {
        let model = &rollout.model;
        let candidate = rollout.candidate.to_string();
        self.push(WEIGHT, model, &[("version", &candidate)], rollout.weight / 100.0);
        for report in &rollout.guards {
            let guard = ("guard", report.guard.as_str());
            for outcome in GuardOutcome::ALL {
                let is = f64::from(u8::from(outcome == report.outcome));
                self.push(GUARD, model, &[guard, ("outcome", outcome.as_str())], is);
            }
            if let Some(evidence) = report.evidence {
                self.push(EVIDENCE, model, &[guard], evidence);
            }
            if let Some(limit) = report.limit {
                self.push(LIMIT, model, &[guard], limit);
            }
        }
        let arms =
            [("canary", rollout.evidence.candidate()), ("stable", rollout.evidence.stable())];
        for (arm, tally) in arms {
            self.push(REQUESTS, model, &[("arm", arm)], tally.requests as f64);
            self.push(FAILURES, model, &[("arm", arm)], tally.failures as f64);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::machine::tests::{Sim, plan};
    use super::*;

    fn page(board: &Board) -> String {
        crate::observe::page::text(&board.families())
    }

    #[tokio::test(start_paused = true)]
    async fn series_follow_a_rollout_and_end_with_it() {
        let board = Board::default();
        let mut sim =
            Sim::new(plan(serde_json::json!({"candidate": "2", "steps": [{"weight": 5}]})));
        sim.look(1, 100, 1_900, 0, 10);
        board.show(&Arc::new(sim.rollout.clone()));
        let text = page(&board);
        for line in [
            "tidegate_rollout_state{model=\"m\",state=\"step\"} 1",
            "tidegate_rollout_state{model=\"m\",state=\"rolled_back\"} 0",
            "tidegate_rollout_weight_ratio{model=\"m\",version=\"2\"} 0.05",
            "tidegate_rollout_guard{model=\"m\",guard=\"error_rate\",outcome=\"pass\"} 1",
            "tidegate_rollout_guard{model=\"m\",guard=\"floor\",outcome=\"fail\"} 0",
            "tidegate_rollout_evidence_limit{model=\"m\",guard=\"error_rate\"} 20",
            "tidegate_rollout_requests{model=\"m\",arm=\"canary\"} 100",
            "tidegate_rollout_failures{model=\"m\",arm=\"stable\"} 10",
            "tidegate_rollouts_ended_total{result=\"rolled_back\"} 0",
        ] {
            assert!(text.lines().any(|found| found == line), "no {line} in\n{text}");
        }
        sim.look(1, 20, 0, 20, 0);
        let ended = Arc::new(sim.rollout.clone());
        board.show(&ended);
        board.ended(&ended);
        let text = page(&board);
        assert!(text.contains("tidegate_rollout_state{model=\"m\",state=\"rolled_back\"} 1"));
        assert!(text.contains("tidegate_rollouts_ended_total{result=\"rolled_back\"} 1"));
        assert!(!text.contains("tidegate_rollout_guard") && !text.contains("weight_ratio"));
        assert!(board.get(&ended.model).is_some());
        tokio::time::advance(LINGER).await;
        assert!(!page(&board).contains("model=\"m\""));
        assert!(board.get(&ended.model).is_none());
    }

    #[test]
    fn every_family_is_documented() {
        let document = include_str!("../../../docs/metrics.md");
        let named = [STATE, WEIGHT, GUARD, EVIDENCE, LIMIT, REQUESTS, FAILURES, ENDED];
        for (name, ..) in named {
            assert!(document.contains(&format!("`{name}")), "docs/metrics.md lacks {name}");
        }
    }
}
