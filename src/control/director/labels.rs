//! Names for versions: set by hand, or by the source's aliases.

use std::collections::BTreeMap;

use super::books::{self, Books, Doc, LabelEntry, LabelsDoc, Said};
use super::{Decided, Inner, check_match, committed, json, labels_of};
use crate::control::call::{Call, Refusal, Versioned};
use crate::control::desk::Labels;
use crate::control::store::Kind;
use crate::domain::{Label, ModelName, Rule, Version, VersionRef};

/// Labels of one model.
const LABELS_MAX: usize = 64;

impl Inner {
    /// # Errors
    /// `NotFound`.
    pub(super) fn labels(&self, model: &ModelName) -> Result<Versioned<Labels>, Refusal> {
        let books = self.known(model)?;
        let labels = books.labels.body.labels.iter();
        let value = labels.map(|(label, entry)| (label.clone(), entry.version)).collect();
        Ok(Versioned { value, etag: books.labels.etag() })
    }

    pub(super) fn put_label(
        &self,
        model: &ModelName,
        label: Label,
        version: Version,
        call: &Call,
    ) -> Result<Versioned<Labels>, Refusal> {
        let subject = format!("{model}/{label}");
        self.alone("label.put", Some(model), &subject, call, || {
            let books = self.known(model)?;
            check_match(call, &books.labels)?;
            self.ready(model, version)?;
            let mut doc = books.labels.body.clone();
            doc.labels.insert(label, LabelEntry { version, said: Said::now(call) });
            if doc.labels.len() > LABELS_MAX {
                let problem = format!("label: expected at most {LABELS_MAX} of one model");
                return Err(Refusal::Invalid(vec![problem]));
            }
            self.set_labels(model, &books, "label.put", doc, call)
        })
    }

    pub(super) fn delete_label(
        &self,
        model: &ModelName,
        label: &Label,
        call: &Call,
    ) -> Result<Versioned<Labels>, Refusal> {
        let subject = format!("{model}/{label}");
        self.alone("label.delete", Some(model), &subject, call, || {
            let books = self.known(model)?;
            check_match(call, &books.labels)?;
            let mut doc = books.labels.body.clone();
            if doc.labels.remove(label).is_none() {
                return Err(Refusal::NotFound(format!("'{model}' has no label '{label}'")));
            }
            let mut rules = books.traffic.body.traffic.iter().flat_map(|traffic| &traffic.rules);
            let named =
                |rule: &&Rule| matches!(&rule.version, VersionRef::Label(name) if name == label);
            if let Some(rule) = rules.find(named) {
                let rule = &rule.name;
                return Err(Refusal::Conflict(format!("the rule '{rule}' sends requests to it")));
            }
            self.set_labels(model, &books, "label.delete", doc, call)
        })
    }

    /// What the source calls its versions: only what it says anew moves a label, so that an operator's
    /// word stands until then; and only to versions that are ready.
    pub(super) fn take_aliases(
        &self,
        model: &ModelName,
        aliases: &BTreeMap<Label, Version>,
        call: &Call,
    ) -> Result<(), Refusal> {
        let said = self.books(model).labels.body.source;
        let news = aliases.iter().any(|(label, version)| said.get(label) != Some(version))
            || said.keys().any(|label| !aliases.contains_key(label));
        if !news {
            return Ok(());
        }
        let _one = self.writing.lock();
        let books = self.books(model);
        let mut doc = books.labels.body.clone();
        for (label, version) in aliases {
            let moved = doc.source.get(label) != Some(version);
            if !moved || self.ready(model, *version).is_err() || doc.labels.len() >= LABELS_MAX {
                continue;
            }
            doc.source.insert(label.clone(), *version);
            let entry = LabelEntry { version: *version, said: Said::now(call) };
            doc.labels.insert(label.clone(), entry);
        }
        let gone: Vec<Label> =
            doc.source.keys().filter(|label| !aliases.contains_key(*label)).cloned().collect();
        for label in gone {
            let last = doc.source.remove(&label);
            if doc.labels.get(&label).map(|entry| entry.version) == last {
                doc.labels.remove(&label);
            }
        }
        if doc.source == books.labels.body.source {
            return Ok(());
        }
        self.set_labels(model, &books, "label.source", doc, call).map(drop)
    }

    fn set_labels(
        &self,
        model: &ModelName,
        books: &Books,
        action: &str,
        doc: LabelsDoc,
        call: &Call,
    ) -> Result<Versioned<Labels>, Refusal> {
        let plain = |doc: &LabelsDoc| -> BTreeMap<Label, Version> {
            doc.labels.iter().map(|(label, entry)| (label.clone(), entry.version)).collect()
        };
        let put = books::put(Kind::Labels, model.as_str(), &doc, books.labels.expect())?;
        let decided = Decided {
            action,
            model: Some(model),
            subject: model.to_string(),
            before: json(&plain(&books.labels.body)),
            after: json(&plain(&doc)),
            puts: vec![put],
        };
        let made: Doc<LabelsDoc> = committed(&self.commit(decided, call)?, Kind::Labels)?;
        let labels = self.with_books(model, |books| {
            books.labels = made;
            labels_of(books)
        });
        self.board.set_labels(model, labels);
        self.followed(model, call);
        self.labels(model)
    }
}
