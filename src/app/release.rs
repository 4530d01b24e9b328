//! The parts that decide: state, director, rollouts, keys, and the listener they are reached by.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use futures_util::future::OptionFuture;
use jiff::Timestamp;
use parking_lot::Mutex;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::bind;
use crate::admin::{self, Hosts, Parts};
use crate::admit::Gatekeeper;
use crate::config::Config;
use crate::control::admin_log::AdminLog;
use crate::control::alerts::{self, Alerts, Watcher};
use crate::control::call::{Call, Refusal};
use crate::control::desk::Desk;
use crate::control::hooks::Hooks;
use crate::control::rollout::controller::Callout;
use crate::control::source::{Source, Webhooks};
use crate::control::store::{SqliteStore, Store};
use crate::control::{Director, Registry, Switchboard, bootstrap, keys, source};
use crate::engine::Engines;
use crate::feedback::Feedback;
use crate::ledger::Ledger;
use crate::monitor::Monitor;
use crate::observe::Observer;
use crate::panics;
use crate::route::{Published, RouteTable};
use crate::shadow::Shadows;
use crate::transport::tls::{Tls, peer_name};

/// How long it may take to write down where rollouts are, and that this is the end.
const END_MAX: Duration = Duration::from_secs(3);

/// Who decides, and what is needed to reach him.
pub(super) struct Release {
    pub(super) director: Arc<Director>,
    pub(super) registry: Arc<Registry>,
    store: Arc<dyn Store>,
    source: Arc<dyn Source>,
    gatekeeper: Arc<Gatekeeper>,
    stop: CancellationToken,
    /// Guards the loop that looks at rollouts, for whoever waits for its end.
    rollouts: Mutex<Option<JoinHandle<()>>>,
    /// Guards the loop that looks at alerts, for whoever waits for its end.
    alerts: Mutex<Option<JoinHandle<()>>>,
    /// Guards the copy of the journal, for whoever ends it.
    admin_log: Mutex<Option<AdminLog>>,
}

/// What is recorded, and of whom.
pub(super) struct Recorded {
    pub(super) ledger: Arc<Ledger>,
    pub(super) table: Arc<Published<RouteTable>>,
    pub(super) feedback: Arc<Feedback>,
    pub(super) monitor: Option<Arc<Monitor>>,
}

impl Release {
    /// Opens the state and the source; loads nothing yet.
    pub(super) fn open(
        config: &Config,
        engines: Arc<Engines>,
        table: Arc<Published<RouteTable>>,
        observer: &Arc<Observer>,
    ) -> anyhow::Result<Self> {
        let state_dir = &config.control.state_dir;
        let store: Arc<dyn Store> =
            Arc::new(SqliteStore::open(state_dir).context("open the state")?);
        if let Some(path) =
            bootstrap::admin_token(&*store, state_dir).context("make an admin's key")?
        {
            let path = path.display();
            tracing::info!(%path, "the admin API's token lies there");
        }
        let gatekeeper = Arc::clone(&config.transport.auth.gatekeeper);
        gatekeeper.replace(keys::key_set(&*store).context("read the keys")?);
        let source = source::open(&config.control).context("open the source of models")?;
        tracing::info!(source = source.describe(), "models come from");
        let board = Arc::new(Switchboard::new(table, config.control.default_model.clone()));
        let registry = Registry::new(
            config.control.clone(),
            engines,
            Arc::clone(&source),
            Arc::clone(&board),
            Arc::clone(observer),
        );
        let director = Director::open(
            Arc::clone(&store),
            Arc::clone(&registry),
            board,
            Arc::clone(observer),
            config.release.clone(),
        );
        let director = Arc::new(director.context("read the state")?);
        let stop = CancellationToken::new();
        Ok(Self {
            director,
            registry,
            store,
            source,
            gatekeeper,
            stop,
            rollouts: Mutex::default(),
            alerts: Mutex::default(),
            admin_log: Mutex::default(),
        })
    }

    /// Starts what follows the state: keys, rollouts, and the admin listener.
    pub(super) fn serve(
        &self,
        config: &Config,
        shadows: Arc<Shadows>,
        observer: &Arc<Observer>,
        drain: CancellationToken,
        Recorded { ledger, table, feedback, monitor }: Recorded,
    ) -> anyhow::Result<()> {
        self.director.set_shadows(shadows);
        self.director.set_feedback(Arc::clone(&feedback));
        if let Some(monitor) = &monitor {
            self.director.set_monitor(Arc::clone(monitor));
        }
        let copied = AdminLog::start(Arc::clone(&self.store), Arc::clone(&ledger));
        *self.admin_log.lock() = Some(copied.context("start the copy of the journal")?);
        let watched = keys::watch_keys(Arc::clone(&self.store), Arc::clone(&self.gatekeeper));
        tokio::spawn(panics::fatal_async("keys", watched));
        let controller = self.director.rollouts(callout(config, observer)?);
        if let Some(handle) = self.director.rollout_handle() {
            let handle = handle.clone();
            observer.add_families(Box::new(move || handle.families()));
        }
        let stopped = self.stop.clone();
        let looking = async move { controller.run(stopped.cancelled()).await };
        *self.rollouts.lock() = Some(tokio::spawn(panics::fatal_async("rollouts", looking)));
        let sight = alerts::Gateway {
            table: Arc::clone(&table),
            monitor: monitor.clone(),
            feedback: Arc::clone(&feedback),
        };
        let alerts = self.alerts(config, sight, observer)?;

        let listener = bind(config.admin).with_context(|| format!("listen on {}", config.admin))?;
        tracing::info!(protocol = "admin", address = %listener.local_addr()?, "listening");
        let api = admin::Api::new(Parts {
            desk: Arc::clone(&self.director) as Arc<dyn Desk>,
            gatekeeper: Arc::clone(&self.gatekeeper),
            clients: config.admin_clients.clone(),
            hosts: Hosts::new(config.admin_hosts.iter().cloned()),
            drain: self.drain(drain),
            mlflow: self.webhook(config),
            audit: Some(admin::Audit { ledger: Arc::clone(&ledger), table }),
            feedback: Some(feedback),
            monitor,
            alerts,
        })?;
        let served = admin::serve(listener, api, config.admin_tls.as_ref().map(handshakes));
        tokio::spawn(panics::fatal_async("admin listener", served));
        Ok(())
    }

    /// Who looks at models and tells of what is wrong with them, unless nobody shall.
    fn alerts(
        &self,
        config: &Config,
        sight: alerts::Gateway,
        observer: &Arc<Observer>,
    ) -> anyhow::Result<Option<Alerts>> {
        if !config.alerts.enabled {
            return Ok(None);
        }
        let director = Arc::clone(&self.director);
        let keep: alerts::Keep = Box::new(move |puts, events| director.keep_alerts(puts, events));
        let made = Watcher::new(config.alerts.clone(), Box::new(sight), &*self.store, keep);
        let (alerts, watcher) = made.context("take up the alerts")?;
        let shown = alerts.clone();
        observer.add_families(Box::new(move || shown.families()));
        let stopped = self.stop.clone();
        let looking = async move { watcher.run(stopped.cancelled()).await };
        *self.alerts.lock() = Some(tokio::spawn(panics::fatal_async("alerts", looking)));
        Ok(Some(alerts))
    }

    /// Begins the drain as SIGTERM does.
    fn drain(&self, drain: CancellationToken) -> admin::Drain {
        let director = Arc::clone(&self.director);
        Box::new(move |call: Call| {
            let (director, drain) = (Arc::clone(&director), drain.clone());
            Box::pin(async move {
                director.journal_call("drain", "gateway", call).await?;
                drain.cancel();
                Ok(())
            })
        })
    }

    fn webhook(&self, config: &Config) -> Option<admin::Webhook> {
        let secret = config.control.source.mlflow.webhook_secret.clone()?;
        let hooks = Webhooks::new(Some(secret), Arc::clone(&self.source));
        Some(Box::new(move |headers, body| {
            let taken = hooks.take(headers, body, Timestamp::now());
            taken.map(drop).map_err(|error| Refusal::Forbidden(error.to_string()))
        }))
    }

    /// Rollouts write down where they are.
    pub(super) async fn stop(&self) {
        self.stop.cancel();
        let rollouts = self.rollouts.lock().take();
        let alerts = self.alerts.lock().take();
        let ended = async {
            if let Some(Err(error)) = OptionFuture::from(alerts).await {
                tracing::warn!(%error, "alerts did not write down who was told");
            }
            if let Some(Err(error)) = OptionFuture::from(rollouts).await {
                tracing::warn!(%error, "rollouts did not write down where they are");
            }
            self.director.note("gateway.stop", "drained".to_owned()).await;
        };
        if tokio::time::timeout(END_MAX, ended).await.is_err() {
            tracing::warn!("what was going on was not written down in time");
        }
        // A thread of its own: it may wait for the disk, and this is the end.
        let copy = self.admin_log.lock().take();
        if let Some(copy) = copy
            && tokio::task::spawn_blocking(move || copy.stop()).await.is_err()
        {
            tracing::warn!("the journal was not copied to its end");
        }
    }
}

/// Handshakes with the certificates of this moment, which follow their files.
fn handshakes(tls: &Arc<Tls>) -> admin::Tls {
    tokio::spawn(panics::fatal_async("admin certificates", Arc::clone(tls).follow()));
    let tls = Arc::clone(tls);
    Arc::new(move |stream| {
        let accepted = tls.accept(stream);
        Box::pin(async move {
            let stream = accepted.await?;
            let name = peer_name(&stream);
            Ok((stream, name))
        })
    })
}

/// Who is told of rollouts and asked about them, if anybody is.
fn callout(config: &Config, observer: &Observer) -> anyhow::Result<Option<Arc<dyn Callout>>> {
    let Some(settings) = config.hooks.clone() else { return Ok(None) };
    let (hooks, courier) = Hooks::new(settings).context("open the webhooks")?;
    tokio::spawn(panics::fatal_async("webhooks", courier.run()));
    let shown = hooks.clone();
    observer.add_families(Box::new(move || shown.families()));
    Ok(Some(Arc::new(hooks)))
}
