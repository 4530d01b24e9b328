//! A gateway on real sockets, with threads of its own, in front of models of a known cost.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tidegate::batch::ThreadBudget;
use tidegate::domain::{BatchSettings, ModelControl, Tensor};
use tidegate::engine::fake::FakeModel;
use tidegate::engine::{EngineError, Model as _, Session};
use tidegate::gateway;
use tidegate::observe::{self, Observer};
use tidegate::transport::listener::Listeners;
use tidegate::transport::{Api, Settings, metrics};
use tokio::net::TcpListener;
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;

use crate::gateway_of;

/// Rows that a model ran: when, and the first number of each.
pub(crate) type Ran = Arc<Mutex<Vec<(Instant, f32)>>>;

/// A model whose every run takes `cost`, whatever the machine is doing, and gives its input back.
pub(crate) struct Slow {
    pub(crate) name: &'static str,
    pub(crate) cost: Duration,
    pub(crate) workers: usize,
    pub(crate) batch: BatchSettings,
    pub(crate) ran: Ran,
}

impl Slow {
    /// One row at a time.
    pub(crate) fn new(name: &'static str, cost: Duration, workers: usize) -> Self {
        let batch = BatchSettings { size_max: 1, ..BatchSettings::default() };
        Self { name, cost, workers, batch, ran: Ran::default() }
    }

    fn sessions(&self) -> Vec<Box<dyn Session>> {
        let session = || SlowSession { cost: self.cost, ran: Arc::clone(&self.ran) };
        (0..self.workers).map(|_| Box::new(session()) as Box<dyn Session>).collect()
    }
}

/// What a session throws: as awkward as it can be.
struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        panic!("a panic in what was thrown");
    }
}

/// Panics when a row begins with NaN.
struct SlowSession {
    cost: Duration,
    ran: Ran,
}

impl Session for SlowSession {
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        let started = Instant::now();
        let firsts: Vec<f32> = inputs[0].data().chunks_exact(8).map(first).collect();
        if firsts.iter().any(|x| x.is_nan()) {
            std::panic::panic_any(Bomb);
        }
        self.ran.lock().extend(firsts.iter().map(|x| (started, *x)));
        if !self.cost.is_zero() {
            std::thread::sleep(self.cost);
        }
        Ok(inputs.to_vec())
    }
}

fn first(row: &[u8]) -> f32 {
    f32::from_le_bytes([row[0], row[1], row[2], row[3]])
}

pub(crate) struct Server {
    pub(crate) data: SocketAddr,
    pub(crate) metrics: SocketAddr,
    pub(crate) api: Arc<Api>,
    runtime: Option<Runtime>,
    /// Dropping it would not stop what listens, but keeps it easy to see who owns it.
    _listeners: Listeners,
}

impl Server {
    pub(crate) fn start(models: &[&Slow]) -> Self {
        Self::with(models, gateway::Settings::default(), Settings::default())
    }

    pub(crate) fn with(models: &[&Slow], gateway: gateway::Settings, settings: Settings) -> Self {
        Self::controlled(Arc::new(gateway_of::NoControl), models, gateway, settings)
    }

    pub(crate) fn controlled(
        control: Arc<dyn ModelControl>,
        models: &[&Slow],
        gateway: gateway::Settings,
        settings: Settings,
    ) -> Self {
        let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let observer = Observer::new(observe::Settings::default());
        let budget = Arc::new(ThreadBudget::new(2));
        let signature = FakeModel::new(2, 0.0).signature().clone();
        let served = models.iter().map(|model| {
            let batch = model.batch.clone();
            gateway_of::served(&observer, &budget, model.name, &signature, model.sessions(), batch)
        });
        let served: Vec<_> = served.collect();
        let api = gateway_of::api(observer, control, served, gateway, settings);
        let _in_runtime = runtime.enter();
        let mut listeners = Listeners::new(Arc::clone(&api)).unwrap();
        let (data, data_address) = bind();
        listeners.serve(data);
        let (page, metrics_address) = bind();
        runtime.spawn(metrics::serve(page, Arc::clone(&api)));
        Self {
            data: data_address,
            metrics: metrics_address,
            api,
            runtime: Some(runtime),
            _listeners: listeners,
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// In the runtime that is entered now.
fn bind() -> (TcpListener, SocketAddr) {
    let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    socket.set_nonblocking(true).unwrap();
    let address = socket.local_addr().unwrap();
    (TcpListener::from_std(socket).unwrap(), address)
}
