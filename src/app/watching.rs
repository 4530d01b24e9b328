//! The monitor in the program: it is told of versions as they are loaded, and keeps its state last.

use std::sync::Arc;

use anyhow::Context;

use crate::config::Config;
use crate::control::Registry;
use crate::monitor::Monitor;
use crate::observe::Observer;

/// Starts it before anything is loaded, and puts what it finds on the metrics page. What waits for it
/// holds at most `bytes_max`.
pub(super) fn start(
    config: &Config,
    bytes_max: usize,
    registry: &Registry,
    observer: &Observer,
) -> anyhow::Result<Option<Arc<Monitor>>> {
    let mut settings = config.monitor.clone();
    settings.queue_bytes_max = settings.queue_bytes_max.min(bytes_max);
    let monitor = Monitor::start(settings).context("start the monitor")?;
    if let Some(monitor) = &monitor {
        registry.set_monitor(Arc::clone(monitor));
        let shown = Arc::clone(monitor);
        observer.add_families(Box::new(move || shown.families()));
    }
    Ok(monitor)
}

/// Ends it, after what waits.
pub(super) async fn stop(monitor: Option<Arc<Monitor>>) {
    let Some(monitor) = monitor else { return };
    // It writes files, and this is the end.
    if tokio::task::spawn_blocking(move || monitor.stop()).await.is_err() {
        tracing::warn!("the monitor did not end as it should");
    }
}
