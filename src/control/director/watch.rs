//! Looks at the source: at the start, when it says that something changed, and from time to time.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::{Director, Inner};
use crate::control::call::{Call, Refusal};
use crate::control::desk::Pending;
use crate::control::source::Listing;
use crate::control::view::ReloadView;
use crate::domain::{ModelName, Version};

/// After failures in a row, the pause grows to so many times what it is otherwise: a source that comes
/// back is to be seen soon.
const BACKOFF_MAX: u32 = 4;
/// Hints within so long are one.
const HINT_PAUSE: Duration = Duration::from_millis(200);

impl Director {
    /// Puts what served before the restart back in service, then loads what the source has. Without
    /// the source, what is remembered serves.
    ///
    /// # Errors
    /// When the source cannot be read and nothing is remembered.
    pub async fn start(&self) -> anyhow::Result<()> {
        let inner = &self.inner;
        let remembered = inner.remembered_versions();
        let restored = !remembered.is_empty();
        inner.registry.restore(remembered).await;
        inner.forget_moves();
        match inner.registry.load_all().await {
            Ok(()) => {}
            // Another folder does not come by itself; a server that is away does come back.
            Err(error) if restored || inner.registry.source().local().is_none() => {
                tracing::warn!(%error, "the source cannot be read, serving what is remembered");
                inner.registry.settle().await;
            }
            Err(error) => return Err(error.into()),
        }
        inner.forget_moves();
        Ok(())
    }

    /// Follows the source until the process ends.
    pub async fn watch(&self, every: Duration) {
        let inner = &self.inner;
        let source = Arc::clone(inner.registry.source());
        let mut pause = every;
        loop {
            let started = Instant::now();
            tokio::select! {
                () = sleep(pause) => {}
                () = source.changed() => sleep(HINT_PAUSE).await,
                () = inner.hint.notified() => sleep(HINT_PAUSE).await,
            }
            match source.list().await {
                Ok(listing) => {
                    // What was still being written may be there before the next look is due.
                    pause = listing.recheck.map_or(every, |soon| soon.min(every));
                    inner
                        .take(&listing, &Call::own("registry-watcher", "found in the source"))
                        .await;
                }
                Err(error) => {
                    pause = (pause * 2).clamp(every, every * BACKOFF_MAX);
                    let took = started.elapsed();
                    tracing::warn!(%error, ?took, ?pause, "the source cannot be read, serving on");
                }
            }
        }
    }
}

impl Inner {
    async fn take(&self, listing: &Listing, call: &Call) {
        self.registry.reconcile(listing, call).await;
    }

    /// Looks at the source now, by an operator's word.
    pub(super) fn reload(self: &Arc<Self>, call: Call) -> Pending<'static, ReloadView> {
        /// A source that does not answer in this time is one that is away.
        const LIST_MAX: Duration = Duration::from_secs(60);
        let inner = Arc::clone(self);
        let task = tokio::spawn(async move {
            inner.check_reason(&call)?;
            let source = Arc::clone(inner.registry.source());
            let listing = match timeout(LIST_MAX, source.list()).await {
                Ok(listing) => listing.map_err(|error| Refusal::Unavailable(error.to_string())),
                Err(_) => Err(Refusal::Unavailable("the source did not answer in time".to_owned())),
            };
            let by = call.clone();
            match listing {
                Ok(listing) => {
                    inner.take(&listing, &call).await;
                    let versions = listing.models.values().map(|model| model.versions.len()).sum();
                    let view = ReloadView { models: listing.models.len(), versions };
                    let work = move |inner: &Arc<Inner>| {
                        inner.append(&[inner.event("reload", None, "source", &by)])
                    };
                    inner.run(work).await?;
                    Ok(view)
                }
                Err(refusal) => {
                    let detail = refusal.to_string();
                    let work = move |inner: &Arc<Inner>| {
                        inner.journal_refused("reload", None, "source", &by, &detail);
                        Ok(())
                    };
                    inner.run(work).await?;
                    Err(refusal)
                }
            }
        });
        super::versions::finish(task)
    }

    /// What to serve again, the versions in ascending order.
    fn remembered_versions(&self) -> Vec<(ModelName, Vec<Version>)> {
        let books = self.books.read();
        let wanted = books.iter().map(|(model, books)| {
            let named: BTreeSet<Version> = books.kept();
            let versions: Vec<Version> = books
                .versions
                .iter()
                .filter(|(version, doc)| doc.body.serves_again() || named.contains(version))
                .map(|(version, _)| *version)
                .collect();
            (model.clone(), versions)
        });
        wanted.filter(|(_, versions)| !versions.is_empty()).collect()
    }

    /// Who answers now is where moves are counted from.
    fn forget_moves(&self) {
        let models: Vec<ModelName> = self.board.table().models.keys().cloned().collect();
        for model in models {
            self.note_follows(&model);
        }
    }
}
