//! How a model's requests are divided: set, taken back, rolled back.

use std::sync::Arc;

use super::books::{self, Books, Doc, Said, TrafficDoc};
use super::{Decided, Inner, check_match, committed, json};
use crate::control::call::{Call, Refusal, Versioned};
use crate::control::store::Kind;
use crate::control::switchboard::InForce;
use crate::control::view::{Follow, Life, TrafficView};
use crate::domain::{Label, ModelName, Traffic, Version, VersionRef};
use crate::route::Served;

impl Inner {
    pub(super) fn put_traffic(
        &self,
        model: &ModelName,
        traffic: Traffic,
        call: &Call,
    ) -> Result<Versioned<TrafficView>, Refusal> {
        self.alone("traffic.put", Some(model), model.as_str(), call, || {
            let books = self.known(model)?;
            check_match(call, &books.traffic)?;
            self.check_table(model, &books, &traffic)?;
            let salt = match &books.traffic.body.salt {
                0 => fresh_salt()?,
                salt => *salt,
            };
            self.set_table(model, &books, "traffic.put", Some(traffic), salt, call)
        })
    }

    pub(super) fn delete_traffic(
        &self,
        model: &ModelName,
        call: &Call,
    ) -> Result<Versioned<TrafficView>, Refusal> {
        self.alone("traffic.delete", Some(model), model.as_str(), call, || {
            let books = self.known(model)?;
            check_match(call, &books.traffic)?;
            if books.traffic.body.traffic.is_none() {
                return Err(Refusal::Conflict(format!(
                    "model '{model}' has no traffic table: it follows a label or the latest version"
                )));
            }
            let salt = books.traffic.body.salt;
            self.set_table(model, &books, "traffic.delete", None, salt, call)
        })
    }

    /// Puts the last good table in force, before anything is written: that needs nothing but memory.
    /// What will be refused is not begun.
    pub(super) fn swap_back(&self, model: &ModelName, call: &Call) {
        let doc = self.books(model).traffic;
        if self.check_reason(call).and_then(|()| check_match(call, &doc)).is_err() {
            return;
        }
        let TrafficDoc { good, salt, .. } = doc.body;
        if let Some(traffic) = good.filter(|good| self.is_loaded(model, good)) {
            self.board.set_traffic(model, Some(InForce { traffic, salt }));
        }
    }

    /// Back to the last good table. The caller has [swapped](Self::swap_back) already; what could not
    /// be written is not in force.
    pub(super) fn rollback(
        &self,
        model: &ModelName,
        call: &Call,
    ) -> Result<Versioned<TrafficView>, Refusal> {
        let done = self.write_rollback(model, call);
        if done.is_err() {
            let _one = self.writing.lock();
            let TrafficDoc { traffic, salt, .. } = self.books(model).traffic.body;
            self.board.set_traffic(model, traffic.map(|traffic| InForce { traffic, salt }));
        }
        done
    }

    fn write_rollback(
        &self,
        model: &ModelName,
        call: &Call,
    ) -> Result<Versioned<TrafficView>, Refusal> {
        self.alone("traffic.rollback", Some(model), model.as_str(), call, || {
            let books = self.known(model)?;
            check_match(call, &books.traffic)?;
            let Some(good) = books.traffic.body.good.clone() else {
                return Err(Refusal::Conflict(format!(
                    "model '{model}' has no table to go back to: nothing replaced a good one yet"
                )));
            };
            if !self.is_loaded(model, &good) {
                return Err(Refusal::Conflict(format!(
                    "a version of the last good table of '{model}' is not loaded any more: load it \
                     and set the table yourself"
                )));
            }
            let salt = books.traffic.body.salt;
            self.set_table(model, &books, "traffic.rollback", Some(good), salt, call)
        })
    }

    /// Writes a table, puts it in force and gives it. The caller holds the right to write.
    pub(super) fn set_table(
        &self,
        model: &ModelName,
        books: &Books,
        action: &str,
        traffic: Option<Traffic>,
        salt: u64,
        call: &Call,
    ) -> Result<Versioned<TrafficView>, Refusal> {
        let before = &books.traffic.body;
        let rolls_back = action == "traffic.rollback";
        let good = match self.in_force(model, books) {
            // What is gone back to stays what can be gone back to.
            _ if rolls_back => before.good.clone(),
            Some(now) if settled(&now) && Some(&now) != traffic.as_ref() => Some(now),
            _ => before.good.clone(),
        };
        let doc = TrafficDoc { traffic: traffic.clone(), salt, good, said: Some(Said::now(call)) };
        let put = books::put(Kind::Traffic, model.as_str(), &doc, books.traffic.expect())?;
        let decided = Decided {
            action,
            model: Some(model),
            subject: model.to_string(),
            before: json(&before.traffic),
            after: json(&traffic),
            puts: vec![put],
        };
        let made: Doc<TrafficDoc> = committed(&self.commit(decided, call)?, Kind::Traffic)?;
        self.with_books(model, |books| books.traffic = made);
        self.board.set_traffic(model, traffic.map(|traffic| InForce { traffic, salt }));
        self.note_follows(model);
        if let Some(rollouts) = self.rollouts.get() {
            // A rollout whose table this was not ends.
            rollouts.look_soon();
        }
        self.traffic(model)
    }

    /// The table that describes what requests get now, written down or not.
    pub(super) fn in_force(&self, model: &ModelName, books: &Books) -> Option<Traffic> {
        match &books.traffic.body.traffic {
            Some(traffic) => Some(traffic.clone()),
            None => self.default_version(model).map(Traffic::all_to),
        }
    }

    /// What a caller gets who names no version, by label or as the latest.
    pub(super) fn default_version(&self, model: &ModelName) -> Option<Version> {
        let table = self.board.table();
        table.pick(model, None).ok().map(|pick| pick.served.version)
    }

    fn is_loaded(&self, model: &ModelName, traffic: &Traffic) -> bool {
        let named = traffic.versions();
        named.into_iter().all(|version| self.board.served(model, version).is_some())
    }

    /// Every problem of a table as things stand.
    pub(super) fn check_table(
        &self,
        model: &ModelName,
        books: &Books,
        traffic: &Traffic,
    ) -> Result<(), Refusal> {
        traffic.check().map_err(Refusal::Invalid)?;
        for rule in &traffic.rules {
            if let VersionRef::Label(label) = &rule.version {
                self.labelled(books, label)?;
            }
        }
        let mut speaks: Option<Arc<Served>> = None;
        for version in traffic.versions() {
            let served = self.ready(model, version)?;
            match &speaks {
                None => speaks = Some(served),
                Some(first) => {
                    if let Some(difference) = first.signature.difference(&served.signature)
                        && !served.settings.signature_change
                    {
                        let first = first.version;
                        return Err(Refusal::Conflict(format!(
                            "versions {first} and {version} cannot share traffic, their signatures \
                             differ: {difference}"
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn labelled(&self, books: &Books, label: &Label) -> Result<Version, Refusal> {
        let entry = books.labels.body.labels.get(label);
        entry
            .map(|entry| entry.version)
            .ok_or_else(|| Refusal::Conflict(format!("no version has the label '{label}'")))
    }

    /// A version that may take traffic.
    pub(super) fn ready(
        &self,
        model: &ModelName,
        version: Version,
    ) -> Result<Arc<Served>, Refusal> {
        let served = self.board.served(model, version);
        match served {
            Some(_) if self.hands.lock().is_leaving(model, version) => {
                let message = format!("version {version} of '{model}' is being unloaded");
                Err(Refusal::Conflict(message))
            }
            Some(_) if self.board.is_held(model, version) => {
                Err(self.needs_approval(model, version))
            }
            Some(served) => Ok(served),
            None => {
                let record = self.registry.record(model, version);
                let state = match record {
                    None => "it is not known; look at the versions there are".to_owned(),
                    Some(record) if record.reason.is_empty() => {
                        format!("its state is {}", word(record.state))
                    }
                    Some(record) => {
                        format!("its state is {}: {}", word(record.state), record.reason)
                    }
                };
                let message = format!("version {version} of '{model}' is not ready: {state}");
                Err(Refusal::Conflict(message))
            }
        }
    }

    /// # Errors
    /// `NotFound`.
    pub(super) fn traffic(&self, model: &ModelName) -> Result<Versioned<TrafficView>, Refusal> {
        let books = self.known(model)?;
        let TrafficDoc { traffic, good, said, .. } = books.traffic.body.clone();
        let stable = books.labels.body.labels.keys().any(|label| label.as_str() == "stable");
        let follow = match (&traffic, stable) {
            (Some(_), _) => Follow::Traffic,
            (None, true) => Follow::Stable,
            (None, false) => Follow::Latest,
        };
        let changed = said.map(|said| said.change(books.traffic.seq));
        let value = TrafficView {
            follow,
            version: self.default_version(model),
            traffic,
            last_good: good,
            changed,
        };
        Ok(Versioned { value, etag: books.traffic.etag() })
    }
}

/// Whether one version gets everything.
pub(super) fn settled(traffic: &Traffic) -> bool {
    traffic.weights.values().filter(|weight| **weight > 0.0).count() == 1
}

/// A new secret for sticky keys; never 0, which stands for none.
pub(super) fn fresh_salt() -> Result<u64, Refusal> {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes)
        .map_err(|error| Refusal::Internal(format!("the system gives no randomness: {error}")))?;
    // SQLite and JSON readers keep 63 bits.
    Ok((u64::from_le_bytes(bytes) >> 12).max(1))
}

/// As the admin API writes it.
pub(super) fn word(state: Life) -> String {
    json(&state).as_str().unwrap_or_default().to_owned()
}
