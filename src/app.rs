//! Builds every part from the configuration, wires them, and owns the order of start and end.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::domain::ModelControl;
use crate::engine::Engines;
use crate::gateway::Gateway;
use crate::observe::Observer;
use crate::observe::log::LogHandle;
use crate::panics;
use crate::route::{Published, RouteTable};
use crate::transport::accept;
use crate::transport::intake::Intake;
use crate::transport::listener::Listeners;
use crate::transport::shm::SharedMemory;
use crate::transport::toggles::Toggles;
use crate::transport::{Api, Health, metrics};

mod feedback;
mod recording;
mod release;
mod watching;

use release::{Recorded, Release};

/// Connections that the kernel holds until we accept them.
const LISTEN_BACKLOG: i32 = 1024;
/// How often metrics do what has to be done off the request path.
const UPKEEP_EVERY: Duration = Duration::from_secs(1);
/// Part of the bytes that requests may hold which copies of them for shadows may.
const SHADOW_BYTES_SHARE: usize = 4;
/// How often it is asked whether there is something to serve by now.
const READY_POLL: Duration = Duration::from_millis(100);
/// How long the last spans may take to leave.
const TRACES_FLUSH_MAX: Duration = Duration::from_secs(3);

/// Serves until SIGTERM or SIGINT, then drains.
///
/// # Errors
/// When an address cannot be bound, no engine can be opened, or the state folder cannot be used.
pub async fn serve(config: Config, log: LogHandle) -> anyhow::Result<()> {
    for note in &config.unsafe_notes {
        tracing::warn!("{note}");
    }
    accept::raise_descriptors();
    let mut stop = Stop::listen()?;
    let observer = Observer::new(config.observe.clone());
    let (choice, library) = (config.control.engine, config.control.ort_library.as_deref());
    let engines = Engines::open_with(choice, library, config.engine_memory_max)
        .context("open an inference engine")?;
    if let Some(problem) = engines.ort_problem() {
        tracing::warn!("serving without ONNX Runtime: {problem}");
    }
    let described = engines.describe();
    for (name, version) in described.clone() {
        observer.engine_info(name, &version);
        tracing::info!(engine = name, version, "engine ready");
    }
    let ledger = recording::open(&config, described, &observer)?;
    let table = Arc::new(Published::new(RouteTable::default()));
    recording::keep(&ledger, &table)?;
    let release = Release::open(&config, Arc::new(engines), Arc::clone(&table), &observer)?;
    let control: Arc<dyn ModelControl> = Arc::clone(&release.registry) as Arc<dyn ModelControl>;
    let intake = Intake::new(&config.transport);
    let feedback = feedback::start(&config, &ledger, &table, &observer)?;
    let mut settings = config.gateway.clone();
    // Copies for shadows hold the bytes of requests: they must never be what keeps others out.
    let copies = intake.budget().max() / SHADOW_BYTES_SHARE;
    settings.shadow.queue_bytes_max = settings.shadow.queue_bytes_max.min(copies);
    let monitor = watching::start(&config, copies, &release.registry, &observer)?;
    let gateway = Gateway::new(Arc::clone(&table), Arc::clone(&observer), control, settings)
        .with_ledger(Arc::clone(&ledger))
        .with_feedback(Arc::clone(&feedback));
    let api = Arc::new(Api {
        gateway: Arc::new(gateway),
        health: Arc::new(Health::default()),
        shm: SharedMemory::new(config.system_shared_memory),
        toggles: Toggles::default(),
        intake,
        settings: config.transport.clone(),
    });

    let budget = Arc::clone(api.intake.budget());
    tracing::info!(bytes = budget.max(), "requests in progress may hold");
    let held = Arc::clone(&budget);
    observer.set_intake(Box::new(move || (held.held(), held.refused())));
    api.gateway.shadows().shed_when(Box::new(move || budget.held() > budget.max() / 2));
    let level = config.log_level.clone();
    api.toggles.on_log(Box::new(move |wanted| {
        if let Err(error) = log.set_level(&wanted.filter(&level)) {
            tracing::error!(%error, "cannot change the log's level");
        }
    }));

    if let Some(tls) = &config.transport.tls {
        tokio::spawn(panics::fatal_async("certificates", Arc::clone(tls).follow()));
    }
    let mut listeners =
        Listeners::new(Arc::clone(&api)).context("start the threads that serve connections")?;
    for (protocol, address) in [("http", config.http), ("grpc", config.grpc)] {
        let listener = bind(address).with_context(|| format!("listen on {address}"))?;
        tracing::info!(protocol, address = %listener.local_addr()?, "listening");
        listeners.serve(listener);
    }
    let metrics_listener =
        bind(config.metrics).with_context(|| format!("listen on {}", config.metrics))?;
    tracing::info!(protocol = "metrics", address = %metrics_listener.local_addr()?, "listening");
    let page = metrics::serve(metrics_listener, Arc::clone(&api));
    tokio::spawn(panics::fatal_async("metrics listener", page));
    let upkeep = upkeep(Arc::clone(&observer), Arc::clone(&api.gateway));
    tokio::spawn(panics::fatal_async("upkeep", upkeep));
    let recorded = recording::watch(Arc::clone(&api), Arc::clone(&ledger));
    tokio::spawn(panics::fatal_async("ledger's watch", recorded));
    let traced = CancellationToken::new();
    let traces = tokio::spawn(export_traces(Arc::clone(&observer), traced.clone()));

    let shadows = Arc::clone(api.gateway.shadows());
    let (ledger_of, feedback_of) = (Arc::clone(&ledger), Arc::clone(&feedback));
    let watched = monitor.clone();
    let recorded = Recorded { ledger: ledger_of, table, feedback: feedback_of, monitor: watched };
    release.serve(&config, shadows, &observer, stop.asked.clone(), recorded)?;
    tokio::select! {
        loaded = release.director.start() => {
            loaded.context("read the model repository")?;
            let (director, every) = (Arc::clone(&release.director), config.control.source.poll);
            let watch = async move { director.watch(every).await };
            tokio::spawn(panics::fatal_async("watcher", watch));
            if !has_something_to_serve(&api, &*release.registry) {
                tracing::error!("no model could be loaded, not ready");
            }
            let (waiting, registry) = (Arc::clone(&api), Arc::clone(&release.registry));
            tokio::spawn(async move { ready_when_serving(&waiting, &*registry).await });
            stop.wait().await;
        }
        () = stop.wait() => {}
    }
    shut_down(&config, &api, listeners, stop).await;
    release.stop().await;
    feedback::stop(feedback).await;
    watching::stop(monitor).await;
    recording::close(&ledger).await;
    // The last requests have ended: what is left to send is sent, for as long as that is worth.
    traced.cancel();
    if timeout(TRACES_FLUSH_MAX, traces).await.is_err() {
        tracing::warn!("the collector did not take the last spans in time");
    }
    Ok(())
}

/// What was broken may be mended, and a source that was away come back.
async fn ready_when_serving(api: &Api, control: &impl ModelControl) {
    let mut tick = interval(READY_POLL);
    while !has_something_to_serve(api, control) {
        tick.tick().await;
    }
    api.health.set_ready();
}

async fn export_traces(observer: Arc<Observer>, stop: CancellationToken) {
    observer.export_traces(stop.cancelled()).await;
}

/// An empty repository is ready: models may come. One whose every model is broken is not.
fn has_something_to_serve(api: &Api, control: &impl ModelControl) -> bool {
    !api.gateway.table().models.is_empty() || control.index().is_empty()
}

/// The order is the contract: stop promising, keep accepting for a while, stop accepting, finish.
async fn shut_down(config: &Config, api: &Api, listeners: Listeners, mut stop: Stop) {
    tracing::info!("draining");
    api.health.set_draining();
    api.gateway.shadows().drain();
    tokio::select! {
        () = sleep(config.drain_notice) => {}
        () = stop.wait() => return tracing::warn!("second signal, stopping now"),
    }
    tokio::select! {
        cut = listeners.drain(config.drain_grace) => match cut {
            0 => tracing::info!("drained"),
            cut => tracing::warn!(connections = cut, "grace is over, open connections were cut"),
        },
        () = stop.wait() => tracing::warn!("second signal, stopping now"),
    }
}

/// SIGTERM and SIGINT, and an operator's word.
struct Stop {
    term: tokio::signal::unix::Signal,
    int: tokio::signal::unix::Signal,
    asked: CancellationToken,
    /// The operator's word counts once; signals every time.
    heard: bool,
}

impl Stop {
    fn listen() -> std::io::Result<Self> {
        let (term, int) = (SignalKind::terminate(), SignalKind::interrupt());
        let asked = CancellationToken::new();
        Ok(Self { term: signal(term)?, int: signal(int)?, asked, heard: false })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.term.recv() => {}
            _ = self.int.recv() => {}
            () = self.asked.cancelled(), if !self.heard => self.heard = true,
        }
    }
}

fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = socket2::Socket::new(
        socket2::Domain::for_address(address),
        socket2::Type::STREAM,
        Some(socket2::Protocol::TCP),
    )?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(LISTEN_BACKLOG)?;
    TcpListener::from_std(socket.into())
}

async fn upkeep(observer: Arc<Observer>, gateway: Arc<Gateway>) {
    let mut tick = interval(UPKEEP_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        observer.upkeep();
        gateway.upkeep();
    }
}
