//! What runs where, and why, as the admin API shows it.

use std::collections::BTreeMap;

use super::Inner;
use super::books::{Books, version_name};
use crate::control::call::{Refusal, Versioned};
use crate::control::registry::Record;
use crate::control::view::{ModelView, VersionView};
use crate::domain::{Label, ModelName, Rule, Traffic, Version, VersionRef};

impl Inner {
    pub(super) fn models(&self) -> Vec<ModelView> {
        let records = self.registry.records();
        let mut names: Vec<ModelName> = records.keys().cloned().collect();
        names.extend(self.books.read().keys().cloned());
        names.sort();
        names.dedup();
        names.iter().filter_map(|name| self.view(name, records.get(name))).collect()
    }

    pub(super) fn model(&self, model: &ModelName) -> Option<ModelView> {
        let records = self.registry.records();
        self.view(model, records.get(model))
    }

    /// # Errors
    /// `NotFound`.
    pub(super) fn version(
        &self,
        model: &ModelName,
        version: Version,
    ) -> Result<Versioned<VersionView>, Refusal> {
        let missing =
            || Refusal::NotFound(format!("version {} is not known", version_name(model, version)));
        let record = self.registry.record(model, version).ok_or_else(missing)?;
        let books = self.books(model);
        let in_force = self.in_force(model, &books);
        let value = version_view(&books, in_force.as_ref(), version, &record);
        let revision = books.versions.get(&version).map_or(0, |doc| doc.revision);
        Ok(Versioned { value, etag: format!("\"{revision}\"") })
    }

    fn view(
        &self,
        model: &ModelName,
        known: Option<&(BTreeMap<Version, Record>, String)>,
    ) -> Option<ModelView> {
        let books = self.known(model).ok()?;
        let view = self.traffic(model).ok()?.value;
        let in_force = self.in_force(model, &books);
        let versions = known.map(|(versions, _)| versions.clone()).unwrap_or_default();
        let versions = versions
            .iter()
            .map(|(version, record)| version_view(&books, in_force.as_ref(), *version, record));
        let labels = books.labels.body.labels.iter();
        Some(ModelView {
            name: model.clone(),
            follow: view.follow,
            labels: labels.map(|(label, entry)| (label.clone(), entry.version)).collect(),
            traffic: view.traffic,
            last_good: view.last_good,
            changed: view.changed,
            rollout: books.running().map(|doc| doc.body.id.clone()),
            versions: versions.collect(),
            problem: known.map(|(_, problem)| problem.clone()).unwrap_or_default(),
        })
    }
}

fn version_view(
    books: &Books,
    in_force: Option<&Traffic>,
    version: Version,
    record: &Record,
) -> VersionView {
    let doc = books.versions.get(&version);
    let labels = books.labels.body.labels.iter().filter(|(_, entry)| entry.version == version);
    let labels: Vec<_> = labels.map(|(label, _)| label.clone()).collect();
    let share = in_force.and_then(|traffic| traffic.shares().get(&version).copied()).unwrap_or(0);
    // Of what decides over it now, whatever was said last.
    let moved = books.traffic.body.said.as_ref().map(|said| said.change(books.traffic.seq));
    let named = in_force.is_some_and(|traffic| traffic.versions().contains(&version));
    let loaded = doc.map(|doc| doc.body.said.change(doc.seq));
    VersionView {
        version,
        state: record.state,
        since: record.since,
        reason: record.reason.clone(),
        digest: record.digest.map(|digest| digest.to_string()),
        engine: record.engine.clone(),
        source: doc.map(|doc| doc.body.what.source.clone()),
        size_bytes: record.size,
        memory_predicted_bytes: record.memory_predicted,
        memory_measured_bytes: record.memory_measured,
        arms: arms(books, in_force, &labels, version),
        labels,
        weight: f64::from(share) / 100.0,
        changed: moved.filter(|_| named).or(loaded),
        lineage: record.lineage.clone(),
        checks: record.checks.clone(),
        approvals: books.approvals.get(&version).map(|doc| doc.body.clone()).unwrap_or_default(),
        history: record.history(),
    }
}

/// Which requests a version gets, by the names that answers carry.
fn arms(
    books: &Books,
    in_force: Option<&Traffic>,
    labels: &[Label],
    version: Version,
) -> Vec<String> {
    let Some(traffic) = in_force else { return Vec::new() };
    let mut arms = Vec::new();
    if traffic.weights.get(&version).is_some_and(|weight| *weight > 0.0) {
        let entries = &books.labels.body.labels;
        let labelled = entries.iter().find(|(label, _)| label.as_str() == "stable");
        let stable = traffic.stable(labelled.map(|(_, entry)| entry.version));
        arms.push(if stable == Some(version) { "stable" } else { "canary" }.to_owned());
    }
    let leads_here = |rule: &&Rule| match &rule.version {
        VersionRef::Number(number) => *number == version,
        VersionRef::Label(label) => labels.contains(label),
    };
    arms.extend(traffic.rules.iter().filter(leads_here).map(|rule| rule.name.to_string()));
    if traffic.shadows.iter().any(|shadow| shadow.version == version) {
        arms.push("shadow".to_owned());
    }
    arms
}
