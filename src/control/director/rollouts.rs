//! Rollouts: what they begin with, what they may see, and how their decisions become durable and in
//! force. What they decide is [`crate::control::rollout`]'s.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;

use super::books::{self, Books, Doc, LabelEntry, LabelsDoc, Said, TrafficDoc};
use super::traffic::settled;
use super::{Director, Inner, check_match, committed, json, labels_of};
use crate::control::call::{Call, Refusal, Versioned};
use crate::control::desk::Pending;
use crate::control::rollout::controller::{Callout, Change, Controller, Desk, Handle};
use crate::control::rollout::{
    Action, Command, Count, LabelTotals, Observation, OwnDrift, Plan, Rollout, ShadowTally,
    ShadowTotals, Start,
};
use crate::control::store::{EventOutcome, Kind, NewEvent};
use crate::control::switchboard::InForce;
use crate::domain::{Arm, ModelName, Traffic, Version, VersionRef};
use crate::monitor::{Pair, VersionReport};
use crate::observe::ShadowOutcome;
use crate::shadow::Snapshot;

/// Rollouts of one model that are shown; the journal has all.
const SHOWN_MAX: usize = 100;

/// What rollouts see of the gateway and do to it.
pub struct RolloutDesk(Arc<Inner>);

impl Director {
    /// The loop that looks at rollouts, and takes up those that were under way; the app runs it.
    pub fn rollouts(&self, callout: Option<Arc<dyn Callout>>) -> Controller<RolloutDesk> {
        let books = self.inner.books.read();
        let docs = books.values().flat_map(|books| books.rollouts.values());
        let under_way = docs.map(|doc| doc.body.clone()).collect();
        drop(books);
        let desk = Arc::new(RolloutDesk(Arc::clone(&self.inner)));
        let (handle, controller) = Controller::new(desk, callout, under_way);
        drop(self.inner.rollouts.set(handle));
        controller
    }

    /// Reaches the loop, once [`Director::rollouts`] made it.
    pub fn rollout_handle(&self) -> Option<&Handle> {
        self.inner.rollouts.get()
    }
}

impl Desk for RolloutDesk {
    fn observe(&self, rollout: &Rollout) -> Observation {
        let inner = &self.0;
        let Rollout { model, stable, candidate, .. } = rollout;
        let (stable, candidate) = (*stable, *candidate);
        let stats = |version| inner.board.served(model, version).map(|served| served.stats.clone());
        let (ours, theirs) = (stats(candidate), stats(stable));
        let traffic = inner.books(model).traffic.body.traffic;
        let shadow = inner.shadow_totals(model, candidate, stable);
        let labels = inner.label_totals(model, candidate, stable);
        let of = (candidate, ours.as_ref());
        let mut seen = Observation::of(of, theirs.as_ref(), traffic, shadow, labels);
        if let Some(monitor) = inner.monitor.get() {
            let guards = &rollout.plan.guards;
            seen.outputs = guards.drift.map(|_| {
                monitor.compare(&rollout.id, &Pair { model: model.clone(), stable, candidate })
            });
            if guards.reference_drift.is_some() {
                seen.own_drift = own_drift(&monitor.reports(model), candidate);
            }
        }
        seen
    }

    fn apply(&self, change: Change<'_>) -> impl Future<Output = Result<(), Refusal>> + Send {
        let inner = &self.0;
        if change.decision.action == Action::RollBack && !change.decision.dry_run {
            // First in force: what hurts ends now, whatever the disk does.
            inner.swap_if_owned(change.before, &change);
        }
        let before = change.before.cloned();
        let (rollout, decision) = (change.rollout.clone(), change.decision.clone());
        let call = change.call.clone();
        inner.run(move |inner| {
            let change = Change {
                before: before.as_ref(),
                rollout: &rollout,
                decision: &decision,
                call: &call,
            };
            inner.apply(change)
        })
    }

    fn save(&self, rollout: &Rollout) -> impl Future<Output = Result<(), Refusal>> + Send {
        let rollout = rollout.clone();
        self.0.run(move |inner| {
            let _one = inner.writing.lock();
            let books = inner.books(&rollout.model);
            let expect = expect(&books, &rollout.id);
            let put = books::put(Kind::Rollout, rollout.id.clone(), &rollout, expect)?;
            let made = inner.store.commit(&[put], &[]).map_err(books::internal)?;
            let made: Doc<Rollout> = committed(&made.documents, Kind::Rollout)?;
            let (model, id) = (rollout.model.clone(), rollout.id.clone());
            inner.with_books(&model, |books| books.rollouts.insert(id, made));
            Ok(())
        })
    }

    fn alarmed(&self) -> impl Future<Output = ()> + Send {
        let alarm = self.0.observer.alarm();
        async move { alarm.notified().await }
    }
}

/// What the monitor says of the rows that the split sent to a version.
fn own_drift(reports: &[Arc<VersionReport>], candidate: Version) -> OwnDrift {
    let problem =
        |problem: &str| OwnDrift { problem: Some(problem.to_owned()), ..OwnDrift::default() };
    let name = candidate.to_string();
    let Some(report) = reports.iter().find(|report| report.version == name) else {
        return problem("the candidate is not watched yet");
    };
    if !matches!(report.reference.kind, "file" | "frozen") {
        return problem("the candidate has no reference, or a provisional one");
    }
    let arms = report.arms.iter().filter(|arm| Arm::is_of_split(&arm.arm));
    let hours = arms.flat_map(|arm| arm.windows.iter().filter(|window| window.window == "hour"));
    let (mut rows, mut drifted) = (0, BTreeSet::new());
    for hour in hours {
        rows += hour.rows;
        let certain = hour.features.iter().filter(|own| own.alarm && !own.beyond.is_empty());
        drifted.extend(certain.map(|own| own.feature.clone()));
    }
    OwnDrift { rows, drifted: drifted.into_iter().collect(), problem: None }
}

fn expect(books: &Books, id: &str) -> crate::control::store::Expect {
    books.rollouts.get(id).map_or(crate::control::store::Expect::Absent, Doc::expect)
}

impl Inner {
    pub(super) fn start_rollout(
        self: &Arc<Self>,
        model: ModelName,
        plan: Plan,
        call: Call,
    ) -> Pending<'static, Versioned<Rollout>> {
        let inner = Arc::clone(self);
        let task = tokio::spawn(async move {
            let started = match inner.check_reason(&call).and_then(|()| inner.begin(&model, plan)) {
                Ok(start) => inner.handle()?.start(start, call.clone()).await,
                Err(refusal) => Err(refusal),
            };
            match started {
                Ok(rollout) => inner.rollout(&model, &rollout.id),
                Err(refusal) => {
                    let subject = model.to_string();
                    inner.refuse_later("rollout.start", model, subject, call, refusal).await
                }
            }
        });
        super::versions::finish(task)
    }

    /// What a plan begins with as things stand.
    fn begin(&self, model: &ModelName, plan: Plan) -> Result<Start, Refusal> {
        let books = self.known(model)?;
        let candidate = match &plan.candidate {
            VersionRef::Number(version) => *version,
            VersionRef::Label(label) => self.labelled(&books, label)?,
        };
        let served = self.ready(model, candidate)?;
        let Some(before) = self.in_force(model, &books) else {
            let message = format!("nothing of '{model}' serves that a rollout could begin with");
            return Err(Refusal::Conflict(message));
        };
        let label = books.labels.body.labels.iter().find(|(label, _)| label.as_str() == "stable");
        let stable = before.stable(label.map(|(_, entry)| entry.version));
        let stable =
            stable.filter(|stable| *stable != candidate).or(label.map(|(_, at)| at.version));
        let Some(stable) = stable else {
            return Err(Refusal::Conflict(format!("nothing of '{model}' serves to compare with")));
        };
        if stable != candidate {
            let other = self.ready(model, stable)?;
            if let Some(difference) = other.signature.difference(&served.signature)
                && !served.settings.signature_change
            {
                return Err(Refusal::Conflict(format!(
                    "version {candidate} cannot take over from {stable}, their signatures differ: \
                     {difference}"
                )));
            }
        }
        let guards = &plan.guards;
        let watched = guards.drift.is_some() || guards.reference_drift.is_some();
        if watched && self.monitor.get().is_none() {
            let message = "the guards drift and reference_drift need the monitor, which is turned off \
                           (monitor.enabled)";
            return Err(Refusal::Conflict(message.to_owned()));
        }
        Ok(Start { model: model.clone(), candidate, stable, plan, before })
    }

    fn handle(&self) -> Result<&Handle, Refusal> {
        let none = || Refusal::Unavailable("the gateway is starting".to_owned());
        self.rollouts.get().ok_or_else(none)
    }

    /// # Errors
    /// `NotFound`.
    pub(super) fn rollouts(&self, model: &ModelName) -> Result<Vec<Rollout>, Refusal> {
        let books = self.known(model)?;
        // Ids grow with time.
        let docs = books.rollouts.values().rev().take(SHOWN_MAX);
        Ok(docs.map(|doc| self.fresh(&doc.body)).collect())
    }

    /// # Errors
    /// `NotFound`.
    pub(super) fn rollout(
        &self,
        model: &ModelName,
        id: &str,
    ) -> Result<Versioned<Rollout>, Refusal> {
        let books = self.known(model)?;
        let missing = || Refusal::NotFound(format!("'{model}' has no rollout {id}"));
        let doc = books.rollouts.get(id).ok_or_else(missing)?;
        Ok(Versioned { value: self.fresh(&doc.body), etag: doc.etag() })
    }

    /// As the loop sees it, which writes down what it counts only now and then.
    fn fresh(&self, kept: &Rollout) -> Rollout {
        let live = self.rollouts.get().and_then(|handle| handle.live(&kept.model));
        live.filter(|live| live.id == kept.id).map_or_else(|| kept.clone(), |live| (*live).clone())
    }

    pub(super) fn command_rollout(
        self: &Arc<Self>,
        model: ModelName,
        id: String,
        command: Command,
        call: Call,
    ) -> Pending<'static, Versioned<Rollout>> {
        let inner = Arc::clone(self);
        let task = tokio::spawn(async move {
            let may = inner.check_reason(&call).and_then(|()| {
                let books = inner.known(&model)?;
                let missing = || Refusal::NotFound(format!("'{model}' has no rollout {id}"));
                check_match(&call, books.rollouts.get(&id).ok_or_else(missing)?)
            });
            let done = match may {
                Ok(()) => inner.handle()?.command(&model, &id, command, call.clone()).await,
                Err(refusal) => Err(refusal),
            };
            match done {
                Ok(_) => inner.rollout(&model, &id),
                Err(refusal) => {
                    let action = match command {
                        Command::Pause => "rollout.pause",
                        Command::Resume => "rollout.resume",
                        Command::Promote => "rollout.promote",
                        Command::Abort => "rollout.abort",
                    };
                    inner.refuse_later(action, model, id, call, refusal).await
                }
            }
        });
        super::versions::finish(task)
    }

    /// What shadows of a model answered.
    ///
    /// # Errors
    /// `NotFound`.
    pub(super) fn shadow(&self, model: &ModelName) -> Result<Snapshot, Refusal> {
        self.known(model)?;
        let none = || Refusal::Unavailable("the gateway is starting".to_owned());
        let shadows = self.shadows.get().ok_or_else(none)?;
        let table = self.board.table();
        let none = crate::route::ModelRoutes::default();
        Ok(shadows.snapshot(model, table.models.get(model).unwrap_or(&none)))
    }

    /// Mistakes by the labels of what the split sent to both, once they are known.
    fn label_totals(
        &self,
        model: &ModelName,
        candidate: Version,
        stable: Version,
    ) -> Option<LabelTotals> {
        let feedback = self.feedback.get()?;
        let count = |version: Version| {
            let (events, of) = feedback.mistakes(model, version)?;
            Some(Count { events, of })
        };
        Some(LabelTotals { candidate: count(candidate)?, stable: count(stable)? })
    }

    fn shadow_totals(
        &self,
        model: &ModelName,
        candidate: Version,
        stable: Version,
    ) -> ShadowTotals {
        let Some(served) = self.board.served(model, candidate) else {
            return ShadowTotals::default();
        };
        // One that fails on every copy is never compared, so there may be no pair.
        let pair = self.shadows.get().and_then(|shadows| shadows.pair(model, candidate, stable));
        let pair = pair.as_ref();
        let compared = pair.map_or(0, |pair| pair.compared);
        let non_finite = pair.map(|pair| pair.outputs.iter().map(|output| output.non_finite).sum());
        let tally = ShadowTally {
            compared,
            disagreed: compared.saturating_sub(pair.map_or(0, |pair| pair.agreed)),
            failed: served.stats.shadow_outcomes()[ShadowOutcome::Failed as usize],
            non_finite: non_finite.unwrap_or(0),
        };
        ShadowTotals { instance: served.stats.instance(), tally }
    }

    /// A version may have been unloaded since the rollout looked. Going back asks nothing: what is
    /// not there gives its share to what is.
    fn check_loaded(
        &self,
        model: &ModelName,
        table: &Traffic,
        action: Action,
    ) -> Result<(), Refusal> {
        if matches!(action, Action::RollBack | Action::Abort) {
            return Ok(());
        }
        table.versions().into_iter().try_for_each(|version| self.ready(model, version).map(drop))
    }

    /// Puts a rollback's table in force, if the one in force is the rollout's own.
    fn swap_if_owned(&self, before: Option<&Rollout>, change: &Change<'_>) {
        let model = &change.rollout.model;
        let books = self.books(model);
        let owns = before.is_some_and(|rollout| rollout.owns(books.traffic.body.traffic.as_ref()));
        if let (true, Some(traffic)) = (owns, change.decision.traffic.clone()) {
            let salt = change.rollout.salt();
            self.board.set_traffic(model, Some(InForce { traffic, salt }));
        }
    }

    fn apply(&self, change: Change<'_>) -> Result<(), Refusal> {
        let Change { before, rollout, decision, call } = change;
        let model = &rollout.model;
        let _one = self.writing.lock();
        let books = self.books(model);
        let mut puts = vec![books::put(
            Kind::Rollout,
            rollout.id.clone(),
            rollout,
            expect(&books, &rollout.id),
        )?];
        let table = decision.traffic.clone().filter(|_| !decision.dry_run);
        let in_force = books.traffic.body.traffic.clone();
        if let Some(table) = &table {
            let owned = match before {
                Some(before) => before.owns(in_force.as_ref()),
                None => in_force.as_ref().is_none_or(|table| *table == rollout.before),
            };
            if !owned {
                let (expected, current) = (rollout.id.clone(), "a table set by hand".to_owned());
                return Err(Refusal::Stale { expected, current });
            }
            self.check_loaded(model, table, decision.action)?;
            let doc = rollout_table(&books, table, rollout, call);
            puts.push(books::put(Kind::Traffic, model.as_str(), &doc, books.traffic.expect())?);
            if decision.action == Action::Promote
                && let Some(labels) = moved_stable(&books, rollout.candidate, call)
            {
                let expect = books.labels.expect();
                puts.push(books::put(Kind::Labels, model.as_str(), &labels, expect)?);
            }
        }
        let event = NewEvent {
            actor: call.actor.clone(),
            action: match before {
                None => "rollout.start".to_owned(),
                Some(_) => format!("rollout.{}", decision.action.as_str()),
            },
            model: Some(model.clone()),
            subject: rollout.id.clone(),
            outcome: EventOutcome::Done,
            before: in_force.as_ref().filter(|_| table.is_some()).map(json),
            after: table.as_ref().map(json),
            reason: call.reason.clone(),
            request_id: call.request_id.clone(),
            detail: decision.reason.as_ref().map(|reason| reason.message.clone()),
        };
        let made = self.store.commit(&puts, &[event]).map_err(books::internal)?;
        if let (None, Some(shadows)) = (before, self.shadows.get()) {
            // What shadows did before says nothing of this rollout.
            shadows.reset(model);
        }
        let rollout_doc: Doc<Rollout> = committed(&made.documents, Kind::Rollout)?;
        let traffic_doc: Option<Doc<TrafficDoc>> = committed(&made.documents, Kind::Traffic).ok();
        let labels_doc: Option<Doc<LabelsDoc>> = committed(&made.documents, Kind::Labels).ok();
        let (traffic, labels) = self.with_books(model, |books| {
            books.rollouts.insert(rollout.id.clone(), rollout_doc);
            let traffic = traffic_doc.map(|doc| {
                let salt = doc.body.salt;
                let traffic = doc.body.traffic.clone();
                books.traffic = doc;
                traffic.map(|traffic| InForce { traffic, salt })
            });
            let labels = labels_doc.map(|doc| {
                books.labels = doc;
                labels_of(books)
            });
            (traffic, labels)
        });
        if let Some(traffic) = traffic {
            self.board.set_traffic(model, traffic);
        }
        if let Some(labels) = labels {
            self.board.set_labels(model, labels);
        }
        self.note_follows(model);
        self.tell(made.events);
        Ok(())
    }
}

fn rollout_table(books: &Books, table: &Traffic, rollout: &Rollout, call: &Call) -> TrafficDoc {
    // What it began with, without what it added to it.
    let good = match settled(&rollout.before) && rollout.before.weights != table.weights {
        true => Some(rollout.before.clone()),
        false => books.traffic.body.good.clone(),
    };
    TrafficDoc {
        traffic: Some(table.clone()),
        salt: rollout.salt(),
        good,
        said: Some(Said::now(call)),
    }
}

/// The labels with `stable` on the version that was promoted, where that label is used.
fn moved_stable(books: &Books, candidate: Version, call: &Call) -> Option<LabelsDoc> {
    let mut doc = books.labels.body.clone();
    let (_, entry) = doc.labels.iter_mut().find(|(label, _)| label.as_str() == "stable")?;
    *entry = LabelEntry { version: candidate, said: Said::now(call) };
    Some(doc)
}
