//! What the registry asks and tells.

use std::collections::{BTreeMap, BTreeSet};

use super::books::{self, Doc, Said, TrafficDoc, VersionDoc};
use super::{Decided, Inner, committed, json, now};
use crate::control::call::{Call, Refusal};
use crate::control::registry::{Overseer, Remembered};
use crate::control::store::Kind;
use crate::control::view::Life;
use crate::domain::{Digest, Label, ModelName, Traffic, Version};

impl Overseer for Inner {
    fn remembered(&self, model: &ModelName, version: Version) -> Option<Remembered> {
        let books = self.books.read();
        books.get(model)?.versions.get(&version).map(|doc| doc.body.what.clone())
    }

    fn wanted(&self) -> Vec<Digest> {
        let books = self.books.read();
        let docs = books.values().flat_map(|books| books.versions.values());
        docs.filter(|doc| doc.body.serves_again()).map(|doc| doc.body.what.digest).collect()
    }

    fn may_serve(&self, model: &ModelName, version: Version, digest: Digest) -> bool {
        self.is_cleared(model, version, digest)
    }

    fn named(&self, model: &ModelName, warm: bool) -> BTreeSet<Version> {
        let books = self.books.read();
        let of = |books: &super::Books| if warm { books.kept() } else { books.named() };
        let mut named = books.get(model).map(of).unwrap_or_default();
        drop(books);
        named.extend(self.default_version(model).filter(|_| warm));
        named.extend(self.hands.lock().coming(model));
        named
    }

    fn undisturbed(&self, work: &mut dyn FnMut()) {
        let _one = self.writing.lock();
        work();
    }

    fn remember(
        &self,
        model: &ModelName,
        version: Version,
        what: &Remembered,
        by: &Call,
    ) -> Result<(), Refusal> {
        let cleared = self.is_cleared(model, version, what.digest);
        let asked = self.hands.lock().coming(model).any(|coming| coming == version);
        let _one = self.writing.lock();
        let books = self.books(model);
        let known = books.versions.get(&version);
        let same = known.filter(|doc| doc.body.what.digest == what.digest);
        let doc = VersionDoc {
            what: what.clone(),
            cleared,
            retired: false,
            // With the load's answer on its way, it stays all the same.
            asked: asked || known.is_some_and(|doc| doc.body.asked),
            first_seen: same.map_or_else(now, |doc| doc.body.first_seen),
            said: Said::now(by),
        };
        let expect =
            known.cloned().map_or(crate::control::store::Expect::Absent, |doc| doc.expect());
        let name = books::version_name(model, version);
        let decided = Decided {
            action: "version.loaded",
            model: Some(model),
            subject: name.clone(),
            before: json(&known.map(|doc| doc.body.what.digest)),
            after: json(&what.digest),
            puts: vec![books::put(Kind::Version, name, &doc, expect)?],
        };
        let made: Doc<VersionDoc> = committed(&self.commit(decided, by)?, Kind::Version)?;
        self.with_books(model, |books| books.versions.insert(version, made));
        Ok(())
    }

    fn entered(&self, model: &ModelName, version: Version, state: Life, reason: &str, by: &Call) {
        match state {
            // That it was loaded is in the journal; what is new is who gets it.
            Life::Ready => {
                let _one = self.writing.lock();
                self.followed(model, by);
            }
            Life::Held => self.journal(model, version, "version.held", reason, by),
            Life::Retired => self.retired(model, version, reason, by),
            Life::Failed => self.journal(model, version, "version.failed", reason, by),
            Life::Quarantined => self.journal(model, version, "version.quarantined", reason, by),
            _ => {}
        }
    }

    fn aliases(&self, model: &ModelName, aliases: &BTreeMap<Label, Version>, by: &Call) {
        if let Err(refusal) = self.take_aliases(model, aliases, by) {
            tracing::error!(%model, %refusal, "the source's aliases were not taken over");
        }
    }
}

impl Inner {
    /// Remembers that a version is out of service, and journals it.
    fn retired(&self, model: &ModelName, version: Version, reason: &str, by: &Call) {
        let _one = self.writing.lock();
        let books = self.books(model);
        let name = books::version_name(model, version);
        let written = books.versions.get(&version).map(|doc| {
            let body = VersionDoc { retired: true, ..doc.body.clone() };
            let decided = Decided {
                action: "version.retired",
                model: Some(model),
                subject: name.clone(),
                before: serde_json::Value::Null,
                after: json(&reason),
                puts: vec![books::put(Kind::Version, name.clone(), &body, doc.expect())?],
            };
            committed::<VersionDoc>(&self.commit(decided, by)?, Kind::Version)
        });
        match written {
            Some(Ok(made)) => {
                drop(self.with_books(model, |books| books.versions.insert(version, made)))
            }
            Some(Err(refusal)) => {
                tracing::error!(%model, %version, %refusal, "that it is retired is not written down");
            }
            None => {}
        }
    }

    fn journal(&self, model: &ModelName, version: Version, action: &str, detail: &str, by: &Call) {
        let mut event = self.event(action, Some(model), &books::version_name(model, version), by);
        event.detail = Some(detail.to_owned()).filter(|detail| !detail.is_empty());
        if let Err(refusal) = self.append(&[event]) {
            tracing::error!(%model, %version, action, %refusal, "not journalled");
        }
    }

    /// Remembers who answers now, without a word.
    pub(super) fn note_follows(&self, model: &ModelName) {
        let follows = self.default_version(model);
        self.with_books(model, |books| books.follows = follows);
    }

    /// Journals that another version answers now for a model without a traffic table, and keeps the
    /// one before to go back to. The caller holds the right to write.
    pub(super) fn followed(&self, model: &ModelName, by: &Call) {
        let follows = self.default_version(model);
        let books = self.books(model);
        let before = books.follows;
        self.with_books(model, |books| books.follows = follows);
        let (Some(was), Some(is)) = (before, follows) else { return };
        if was == is || books.traffic.body.traffic.is_some() {
            return;
        }
        let doc = TrafficDoc {
            good: Some(Traffic::all_to(was)),
            said: Some(Said::now(by)),
            ..books.traffic.body.clone()
        };
        let written = books::put(Kind::Traffic, model.as_str(), &doc, books.traffic.expect())
            .and_then(|put| {
                let decided = Decided {
                    action: "traffic.follow",
                    model: Some(model),
                    subject: model.to_string(),
                    before: json(&was),
                    after: json(&is),
                    puts: vec![put],
                };
                committed(&self.commit(decided, by)?, Kind::Traffic)
            });
        match written {
            Ok(made) => self.with_books(model, |books| books.traffic = made),
            Err(refusal) => tracing::error!(%model, %refusal, "the move is not journalled"),
        }
    }
}
