//! Turns bytes into typed requests and results into bytes. Only these modules know a protocol.
//!
//! ```text
//! listener ─▶ connection ─┬─▶ http (REST, KServe v1, MLflow, SageMaker) ──┐
//!                         └─▶ grpc (Open Inference Protocol v2) ──────────┴─▶ gateway::Gateway
//! ```

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use crate::gateway::Gateway;

pub mod accept;
pub mod auth;
mod connection;
mod feedback;
pub mod grpc;
pub mod http;
pub mod intake;
mod io;
pub mod listener;
pub mod meta;
pub mod metrics;
pub mod model_config;
pub mod shm;
pub mod status;
pub mod tls;
pub mod toggles;

/// Body of every answer.
pub type Body = tonic::body::Body;

/// Name that server metadata gives.
pub const SERVER_NAME: &str = "tidegate";

/// Largest body of a call that is no prediction, and no load where loading is on.
const CONTROL_BYTES_MAX: usize = 1 << 20;

/// Extensions of the protocol that always work here.
const EXTENSIONS: [&str; 10] = [
    "classification",
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "trace",
    "logging",
];

/// What both protocols stand on.
pub struct Api {
    pub gateway: Arc<Gateway>,
    pub health: Arc<Health>,
    pub shm: shm::SharedMemory,
    pub toggles: toggles::Toggles,
    pub intake: intake::Intake,
    pub settings: Settings,
}

impl Api {
    /// Extensions of the protocol that work here and now.
    pub fn extensions(&self) -> Vec<&'static str> {
        let mut extensions = EXTENSIONS.to_vec();
        if self.shm.is_enabled() {
            extensions.push("system_shared_memory");
        }
        extensions
    }
}

/// Limits of the data plane, and its door.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Who may call.
    pub auth: auth::Auth,
    /// Certificates of the data listeners; `None`: they speak plain HTTP.
    pub tls: Option<Arc<tls::Tls>>,
    /// Largest request body, decoded, in bytes; over it: 413 / RESOURCE_EXHAUSTED.
    pub body_max_bytes: usize,
    /// Most bytes that all requests in progress hold, decoded ones too; 0: by the memory there is.
    /// Over it: 503 / UNAVAILABLE.
    pub in_flight_bytes_max: usize,
    /// Large bodies that wait to be decoded or encoded; more: 503 / UNAVAILABLE.
    pub decode_queue_max: usize,
    /// Largest JSON part of an answer, before compression; over it: 413.
    pub answer_json_max_bytes: usize,
    /// Largest ratio of decoded to encoded body bytes, beyond the first MiB.
    pub compression_ratio_max: usize,
    /// Answers smaller than this are never compressed.
    pub compress_min_bytes: usize,
    /// Repository load and unload from the data plane.
    pub model_control: bool,
    /// Request header (lower case) that holds the sticky key beside `tidegate-sticky-key`.
    pub sticky_header: Option<String>,
    /// Request header (lower case) that says whom the data of a request is about.
    pub subject_header: Option<String>,
    /// `ModelStreamInfer` answers in MLServer's form instead of Triton's.
    pub mlserver_stream: bool,
    /// Requests of one gRPC stream that run at once.
    pub stream_concurrency_max: usize,
    /// Time for a connection to send a request's headers, from its first byte on.
    pub header_timeout: Duration,
    /// Time for a connection to have no request open.
    pub idle_timeout: Duration,
    /// Time for a client to take nothing of what waits for it.
    pub write_timeout: Duration,
    /// Time for a request's whole body, as far as it is waited for.
    pub body_timeout: Duration,
    /// Time before [`Settings::body_rate_min`] counts.
    pub body_grace: Duration,
    /// Bytes per second that a request's body has to come with; zero: any.
    pub body_rate_min: u32,
    /// Largest head of a request.
    pub header_max_bytes: usize,
    /// Longest path and query; over it: 414.
    pub uri_max_bytes: usize,
    /// HTTP/2 streams per connection.
    pub http2_streams_max: u32,
    /// Open connections on all data listeners; more wait to be accepted.
    pub connections_max: usize,
    /// Threads that serve connections; at least 1.
    pub io_threads: usize,
    /// Of those, one client's; more are closed at once. Zero: no limit.
    pub connections_per_ip_max: usize,
    /// Age at which a connection is asked to end.
    pub connection_age_max: Option<Duration>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            auth: auth::Auth::default(),
            tls: None,
            body_max_bytes: 64 << 20,
            in_flight_bytes_max: 0,
            decode_queue_max: 256,
            answer_json_max_bytes: 256 << 20,
            compression_ratio_max: 100,
            compress_min_bytes: 1024,
            model_control: false,
            sticky_header: None,
            subject_header: None,
            mlserver_stream: false,
            stream_concurrency_max: 64,
            header_timeout: Duration::from_secs(30),
            idle_timeout: Duration::from_secs(300),
            write_timeout: Duration::from_secs(30),
            body_timeout: Duration::from_secs(60),
            body_grace: Duration::from_secs(10),
            body_rate_min: 1024,
            header_max_bytes: 16 << 10,
            uri_max_bytes: 8 << 10,
            http2_streams_max: 256,
            connections_max: 8192,
            io_threads: std::thread::available_parallelism().map_or(1, usize::from),
            connections_per_ip_max: 4096,
            connection_age_max: None,
        }
    }
}

/// Whether the process lives and wants traffic.
#[derive(Debug, Default)]
pub struct Health {
    state: watch::Sender<State>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct State {
    phase: Phase,
    /// Predictions cannot be recorded, and are refused for it.
    unrecorded: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    #[default]
    Starting,
    Ready,
    Draining,
}

/// Wakes whoever follows [`Health`]; ask there what it is now.
pub struct HealthChanges(watch::Receiver<State>);

impl HealthChanges {
    /// Waits for a change since the last call; `false` when there will be none.
    pub async fn changed(&mut self) -> bool {
        self.0.changed().await.is_ok()
    }
}

impl Health {
    pub fn is_ready(&self) -> bool {
        *self.state.borrow() == State { phase: Phase::Ready, unrecorded: false }
    }

    pub fn is_draining(&self) -> bool {
        self.state.borrow().phase == Phase::Draining
    }

    /// Has no effect once draining.
    pub fn set_ready(&self) {
        let ready = self.state.send_if_modified(|state| {
            let starting = state.phase == Phase::Starting;
            if starting {
                state.phase = Phase::Ready;
            }
            starting
        });
        if ready {
            tracing::info!("ready");
        }
    }

    pub fn set_draining(&self) {
        self.state.send_modify(|state| state.phase = Phase::Draining);
    }

    /// Whether predictions can be recorded, where none is made without: not ready while they cannot.
    pub fn set_recorded(&self, recorded: bool) {
        self.state.send_if_modified(|state| {
            let changed = state.unrecorded == recorded;
            state.unrecorded = !recorded;
            changed
        });
    }

    pub fn changes(&self) -> HealthChanges {
        HealthChanges(self.state.subscribe())
    }
}
