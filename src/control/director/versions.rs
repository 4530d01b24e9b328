//! Versions: loaded and unloaded by an operator's word.
//!
//! Invariants:
//! - What an operator loads is not retired by anyone else, from before it is loaded.
//! - What an operator unloads is given no traffic, from when that was decided.

use std::sync::Arc;

use super::books::{self, Doc, VersionDoc};
use super::{Decided, Inner, committed, json};
use crate::control::call::{Call, Refusal, Versioned};
use crate::control::desk::Pending;
use crate::control::store::Kind;
use crate::control::view::VersionView;
use crate::domain::{Digest, ErrorKind, ModelName, Version};

/// Versions in the hands of operators, each as often as it is.
#[derive(Default)]
pub(super) struct Hands {
    coming: Vec<(ModelName, Version)>,
    leaving: Vec<(ModelName, Version)>,
}

/// Which hand.
#[derive(Clone, Copy)]
enum Hand {
    Coming,
    Leaving,
}

impl Hands {
    fn of(&mut self, hand: Hand) -> &mut Vec<(ModelName, Version)> {
        match hand {
            Hand::Coming => &mut self.coming,
            Hand::Leaving => &mut self.leaving,
        }
    }

    /// Versions of a model that are being loaded.
    pub(super) fn coming<'a>(&'a self, model: &ModelName) -> impl Iterator<Item = Version> + 'a {
        let model = model.clone();
        self.coming.iter().filter(move |(of, _)| *of == model).map(|(_, version)| *version)
    }

    pub(super) fn is_leaving(&self, model: &ModelName, version: Version) -> bool {
        self.leaving.iter().any(|(of, leaving)| of == model && *leaving == version)
    }
}

/// Holds a version until it goes.
struct Held {
    inner: Arc<Inner>,
    hand: Hand,
    what: (ModelName, Version),
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut hands = self.inner.hands.lock();
        let held = hands.of(self.hand);
        if let Some(at) = held.iter().position(|what| *what == self.what) {
            held.swap_remove(at);
        }
    }
}

impl Inner {
    fn hold(self: &Arc<Self>, hand: Hand, model: &ModelName, version: Version) -> Held {
        let what = (model.clone(), version);
        self.hands.lock().of(hand).push(what.clone());
        Held { inner: Arc::clone(self), hand, what }
    }

    pub(super) fn load(
        self: &Arc<Self>,
        model: ModelName,
        version: Version,
        accept: Option<Digest>,
        call: Call,
    ) -> Pending<'static, Versioned<VersionView>> {
        let inner = Arc::clone(self);
        // A task of its own: it is finished even when the caller goes away.
        let task = tokio::spawn(async move {
            let subject = books::version_name(&model, version);
            let _coming = inner.hold(Hand::Coming, &model, version);
            let checked = inner.check_reason(&call);
            let loaded = match checked.and_then(|()| inner.check_version(&model, version, &call)) {
                Ok(()) => inner.registry.load_version(&model, version, accept, &call).await,
                Err(refusal) => {
                    return inner.refuse_later("version.load", model, subject, call, refusal).await;
                }
            };
            match loaded {
                Ok(()) => {
                    let work = move |inner: &Arc<Inner>| {
                        inner.alone("version.load", Some(&model), &subject, &call, || {
                            inner.mark(&model, version, "version.load", true, true, &call)
                        })?;
                        inner.version(&model, version)
                    };
                    inner.run(work).await
                }
                Err(failure) => {
                    let refusal = Refusal::from(failure);
                    inner.refuse_later("version.load", model, subject, call, refusal).await
                }
            }
        });
        finish(task)
    }

    pub(super) fn unload(
        self: &Arc<Self>,
        model: ModelName,
        version: Version,
        call: Call,
    ) -> Pending<'static, Versioned<VersionView>> {
        let inner = Arc::clone(self);
        let task = tokio::spawn(async move {
            let (name, by) = (model.clone(), call.clone());
            let decided = inner.run(move |inner| inner.decide_unload(&name, version, &by)).await;
            let _leaving = decided?;
            match inner.registry.unload_version(&model, version, &call).await {
                // Nobody wanted it any more, so the registry may have been quicker.
                Err(failure) if failure.kind == ErrorKind::NotFound => {}
                done => done?,
            }
            inner.run(move |inner| inner.version(&model, version)).await
        });
        finish(task)
    }

    /// Remembers that nobody wants it any more, unless somebody does.
    fn decide_unload(
        self: &Arc<Self>,
        model: &ModelName,
        version: Version,
        call: &Call,
    ) -> Result<Held, Refusal> {
        let subject = books::version_name(model, version);
        self.alone("version.unload", Some(model), &subject, call, || {
            let books = self.known(model)?;
            self.check_version(model, version, call)?;
            if self.board.served(model, version).is_none() {
                let message = format!("version {version} of '{model}' is not loaded");
                return Err(Refusal::NotFound(message));
            }
            if let Some(use_) = self.in_use(model, &books, version) {
                return Err(Refusal::Conflict(format!(
                    "version {version} of '{model}' takes traffic: {use_}; take it out of there \
                     first"
                )));
            }
            self.mark(model, version, "version.unload", false, false, call)?;
            Ok(self.hold(Hand::Leaving, model, version))
        })
    }

    /// # Errors
    /// `Stale` when the caller read another revision of the version than there is now.
    fn check_version(
        &self,
        model: &ModelName,
        version: Version,
        call: &Call,
    ) -> Result<(), Refusal> {
        let books = self.books(model);
        let current = books.versions.get(&version).map_or_else(|| "\"0\"".to_owned(), Doc::etag);
        match &call.if_match {
            Some(expected) if *expected != current => {
                Err(Refusal::Stale { expected: expected.clone(), current })
            }
            _ => Ok(()),
        }
    }

    /// What sends requests to a version.
    fn in_use(&self, model: &ModelName, books: &books::Books, version: Version) -> Option<String> {
        if let Some(rollout) = books.running()
            && (rollout.body.candidate == version || rollout.body.stable == version)
        {
            return Some(format!("the rollout {} is under way", rollout.body.id));
        }
        if let Some(traffic) = &books.traffic.body.traffic
            && traffic.versions().contains(&version)
        {
            return Some("the traffic table names it".to_owned());
        }
        let label = books.labels.body.labels.iter().find(|(_, entry)| entry.version == version);
        if let Some((label, _)) = label {
            return Some(format!("it has the label '{label}'"));
        }
        let answers = self.default_version(model) == Some(version);
        answers.then(|| "it answers the requests that name no version".to_owned())
    }

    /// Notes whether a version is to be loaded at the next start, and whether an operator asked.
    fn mark(
        &self,
        model: &ModelName,
        version: Version,
        action: &str,
        wanted: bool,
        asked: bool,
        call: &Call,
    ) -> Result<(), Refusal> {
        let books = self.books(model);
        let Some(doc) = books.versions.get(&version) else { return Ok(()) };
        let mut body = doc.body.clone();
        (body.what.wanted, body.asked) = (wanted, asked);
        let name = books::version_name(model, version);
        let put = books::put(Kind::Version, name.clone(), &body, doc.expect())?;
        let decided = Decided {
            action,
            model: Some(model),
            subject: name,
            before: json(&doc.body.what.wanted),
            after: json(&wanted),
            puts: vec![put],
        };
        let made: Doc<VersionDoc> = committed(&self.commit(decided, call)?, Kind::Version)?;
        self.with_books(model, |books| books.versions.insert(version, made));
        Ok(())
    }

    pub(super) async fn refuse_later<T: Send + 'static>(
        self: &Arc<Self>,
        action: &'static str,
        model: ModelName,
        subject: String,
        call: Call,
        refusal: Refusal,
    ) -> Result<T, Refusal> {
        let detail = refusal.to_string();
        let noted = self.run(move |inner| {
            inner.journal_refused(action, Some(&model), &subject, &call, &detail);
            Ok(())
        });
        noted.await?;
        Err(refusal)
    }
}

/// The answer of a change that runs as a task of its own.
pub(super) fn finish<T: Send + 'static>(
    task: tokio::task::JoinHandle<Result<T, Refusal>>,
) -> Pending<'static, T> {
    Box::pin(async move {
        task.await.unwrap_or_else(|error| {
            tracing::error!(%error, "a change ended without a result");
            Err(Refusal::Internal("the change ended without a result".to_owned()))
        })
    })
}
