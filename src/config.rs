//! The gateway's configuration: file, environment and flags, checked whole.
//!
//! ```text
//! defaults ◀─ file (TOML) ◀─ TIDEGATE_<SECTION>_<KEY> ◀─ flags        later wins
//! ```
//!
//! Invariants:
//! - Every problem is reported at once, each with the path of its key.
//! - A key exists when [`schema::KEYS`] lists it, and then `docs/configuration.md` explains it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crate::admit::Clients;
use crate::domain::ModelName;
use crate::transport::tls::Tls;
use crate::{control, feedback, gateway, ledger, monitor, observe, transport};

mod alerts;
mod assemble;
mod layers;
mod records;
pub mod schema;
mod sinks;
mod sources;

pub use layers::{Problem, Problems};

/// Everything the gateway is told.
#[derive(Clone, Debug)]
pub struct Config {
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    pub metrics: SocketAddr,
    /// Reserved: nothing listens there yet.
    pub admin: SocketAddr,
    pub allow_unauthenticated: bool,
    /// Of the admin listener; `None`: it speaks plain HTTP.
    pub admin_tls: Option<Arc<Tls>>,
    /// What callers of the admin listener with a certificate may do.
    pub admin_clients: Clients,
    /// Names that the admin listener answers to, beside addresses and `localhost`.
    pub admin_hosts: Vec<String>,
    pub control: control::Settings,
    pub transport: transport::Settings,
    pub gateway: gateway::Settings,
    pub ledger: ledger::Settings,
    /// Labels and metrics of predictions.
    pub feedback: feedback::Settings,
    pub monitor: monitor::Settings,
    /// Where the ledger is delivered.
    pub sinks: ledger::delivery::Settings,
    /// Memory of all of ONNX Runtime's runs on the CPU, in bytes; `None`: no limit.
    pub engine_memory_max: Option<usize>,
    /// What is demanded of releases.
    pub release: control::director::Policy,
    /// Who is told of rollouts, and asked about them.
    pub hooks: Option<control::hooks::Settings>,
    /// When alerts fire, and who is told.
    pub alerts: control::alerts::Settings,
    pub system_shared_memory: bool,
    pub observe: observe::Settings,
    pub log_format: observe::log::Format,
    /// A level or a filter expression: `info`, `tidegate=debug,warn`.
    pub log_level: String,
    /// How long connections are still accepted after the signal to stop.
    pub drain_notice: Duration,
    /// How long running requests may take after that.
    pub drain_grace: Duration,
    /// What an operator should know: unsafe choices, and settings without effect.
    pub unsafe_notes: Vec<String>,
}

impl Config {
    /// Model that `/invocations` means.
    pub fn default_model(&self) -> Option<&ModelName> {
        self.control.default_model.as_ref()
    }
}

/// Flags of `serve`; they win over the environment and the file.
#[derive(clap::Args, Clone, Debug, Default)]
pub struct ServeArgs {
    /// Configuration file (TOML)
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Folder of models, <DIR>/<model>/<version>/model.onnx, or a URL of a bucket or registry
    /// (s3://, gs://, az://, mlflow+https://) [default: models]
    #[arg(long, value_name = "DIR|URL")]
    pub model_repository: Option<String>,
    /// Name of the model, when that folder is one model's own: <DIR>/model.onnx
    #[arg(long, value_name = "NAME")]
    pub model_name: Option<String>,
    /// Folder for what the gateway keeps [default: tidegate-state]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<String>,
    /// Where REST and gRPC are served [default: 127.0.0.1:8000]
    #[arg(long, value_name = "IP:PORT")]
    pub http_address: Option<String>,
    /// Where gRPC and REST are served [default: 127.0.0.1:8001]
    #[arg(long, value_name = "IP:PORT")]
    pub grpc_address: Option<String>,
    /// Where metrics are served [default: 127.0.0.1:8002]
    #[arg(long, value_name = "IP:PORT")]
    pub metrics_address: Option<String>,
    /// Address of the admin API [default: 127.0.0.1:8003]
    #[arg(long, value_name = "IP:PORT")]
    pub admin_address: Option<String>,
    /// Engine of models that choose none: auto, ort or tract [default: auto]
    #[arg(long, value_name = "ENGINE")]
    pub engine: Option<String>,
    /// text or json [default: text]
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Serve without authentication on an address that others can reach
    #[arg(long)]
    pub allow_unauthenticated: bool,
    /// Serve Triton's metric names beside our own [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub triton_metrics: Option<bool>,
}

/// Reads the file that `args` names, the process's environment and the flags.
///
/// # Errors
/// Every problem there is.
pub fn load(args: &ServeArgs) -> Result<Config, Problems> {
    load_from(args, std::env::vars())
}

/// As [`load`], with this environment.
///
/// # Errors
/// Every problem there is.
pub fn load_from(
    args: &ServeArgs,
    environment: impl Iterator<Item = (String, String)>,
) -> Result<Config, Problems> {
    let mut layers = layers::Layers::default();
    if let Some(path) = &args.config {
        layers.read_file(path);
    }
    layers.add_environment(environment);
    layers.add_flags(args);
    assemble::assemble(layers)
}

#[cfg(test)]
mod tests;
