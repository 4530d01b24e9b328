//! The ledger in the program: opened before anything is served, watched, and closed last.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::config::Config;
use crate::domain::{Durability, OnUnrecorded};
use crate::ledger::Ledger;
use crate::observe::Observer;
use crate::route::{Published, RouteTable};
use crate::transport::Api;

/// How often it is asked whether records can be written.
const WATCH_EVERY: Duration = Duration::from_millis(200);
/// How long the last records may take to the disk.
const CLOSE_MAX: Duration = Duration::from_secs(10);

/// Opens the ledger, and puts what it counts on the metrics page.
pub(super) fn open(
    config: &Config,
    engines: impl IntoIterator<Item = (&'static str, String)>,
    observer: &Observer,
) -> anyhow::Result<Arc<Ledger>> {
    let ledger = Ledger::open(config.ledger.clone(), engines).context("open the ledger")?;
    ledger.start_notary().context("sign the ledger's checkpoints")?;
    ledger.start_delivery(&config.sinks).context("deliver the ledger")?;
    let shown = Arc::clone(&ledger);
    observer.add_families(Box::new(move || shown.families()));
    Ok(ledger)
}

/// Starts what is done with the log's files: Parquet, and retention as the served models have it.
pub(super) fn keep(ledger: &Arc<Ledger>, table: &Arc<Published<RouteTable>>) -> anyhow::Result<()> {
    let (table, usual) = (Arc::clone(table), ledger.settings().retention_days);
    let days_of = move |model: &str| {
        let table = table.snapshot();
        let routes = table.models.iter().find(|(name, _)| name.as_str() == model)?.1;
        let days = routes.versions.values().map(|it| it.recording.retention_days.unwrap_or(usual));
        // For ever is the longest of all.
        days.reduce(|a, b| if a == 0 || b == 0 { 0 } else { a.max(b) })
    };
    ledger.start_upkeep(Arc::new(days_of)).context("keep the ledger's files")
}

/// Keeps readiness in step with the log: a gateway that would refuse its predictions for want of a
/// record is not ready.
pub(super) async fn watch(api: Arc<Api>, ledger: Arc<Ledger>) {
    let mut tick = interval(WATCH_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut failing, mut scarce) = (false, false);
    loop {
        tick.tick().await;
        let free_bytes = ledger.predictions().stats().free_bytes;
        let is_scarce = free_bytes < ledger.settings().free_bytes_warn;
        if is_scarce && !scarce {
            tracing::warn!(free_bytes, "the ledger's disk is getting full");
        }
        scarce = is_scarce;
        let problem = ledger.predictions().check().err();
        api.health.set_recorded(problem.is_none() || !refuses(&api, &ledger));
        match (&problem, failing) {
            (Some(problem), false) => tracing::error!(%problem, "predictions cannot be recorded"),
            (None, true) => tracing::info!("predictions can be recorded again"),
            _ => {}
        }
        failing = problem.is_some();
    }
}

/// Whether some model's predictions are refused when they cannot be recorded.
fn refuses(api: &Api, ledger: &Ledger) -> bool {
    let refuses =
        |durability, on_error| durability != Durability::Off && on_error == OnUnrecorded::Refuse;
    let table = api.gateway.table();
    let mut served = table.models.values().flat_map(|routes| routes.versions.values()).peekable();
    if served.peek().is_none() {
        let usual = ledger.unrouted();
        return refuses(usual.durability, usual.on_error);
    }
    served.any(|served| refuses(served.recording.durability, served.recording.on_error))
}

/// The last requests have ended: their records are handed over, and the logs sealed.
pub(super) async fn close(ledger: &Ledger) {
    if timeout(CLOSE_MAX, ledger.close()).await.is_err() {
        tracing::error!("the last records did not get to the disk in time");
    }
}
