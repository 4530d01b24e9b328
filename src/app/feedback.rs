//! Feedback in the program: it knows the served models by the route table, and ends before the
//! ledger does.

use std::sync::Arc;

use anyhow::Context;

use crate::config::Config;
use crate::feedback::{Feedback, How, Models};
use crate::ledger::Ledger;
use crate::observe::Observer;
use crate::route::{Published, RouteTable, Served};

/// The versions in the route table.
struct Table(Arc<Published<RouteTable>>);

impl Models for Table {
    fn how(&self, model: &str, version: u64) -> Option<How> {
        let of = |served: &Arc<Served>| How {
            settings: served.settings.feedback.clone(),
            classes: served.settings.labels.clone(),
        };
        self.0.look(|table| {
            let versions = &table.models.get(model)?.versions;
            versions.get(&crate::domain::Version::new(version)?).map(of)
        })
    }

    fn serves(&self, model: &str) -> bool {
        self.0.look(|table| table.models.contains_key(model))
    }
}

/// Starts the part, and puts what it counts on the metrics page.
pub(super) fn start(
    config: &Config,
    ledger: &Arc<Ledger>,
    table: &Arc<Published<RouteTable>>,
    observer: &Observer,
) -> anyhow::Result<Arc<Feedback>> {
    let models = Arc::new(Table(Arc::clone(table)));
    let feedback = Feedback::start(config.feedback.clone(), Arc::clone(ledger), models);
    let feedback = feedback.context("start the thread that takes feedback")?;
    let shown = Arc::clone(&feedback);
    observer.add_families(Box::new(move || shown.families()));
    Ok(feedback)
}

/// Ends it, after what waits.
pub(super) async fn stop(feedback: Arc<Feedback>) {
    // It may wait for the disk, and this is the end.
    if tokio::task::spawn_blocking(move || feedback.stop()).await.is_err() {
        tracing::warn!("the part that takes feedback did not end as it should");
    }
}
