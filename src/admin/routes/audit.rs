//! The ledger: whether predictions are recorded, how, and how its logs do.

use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use http::StatusCode;
use serde::Serialize;
use utoipa::ToSchema;

use super::json;
use crate::admin::asked::Asked;
use crate::admin::problem::{LATER, Problem};
use crate::admin::{Admin, Audit};
use crate::admit::Action;
use crate::domain::{Durability, Recording, SAMPLE_ALL};
use crate::ledger::delivery::SinkStats;

/// How the ledger does.
#[derive(Serialize, ToSchema)]
pub(super) struct AuditView {
    /// Who writes it: one state folder for as long as that exists.
    writer: String,
    /// Why no prediction can be recorded at this moment; none when they can.
    problem: Option<String>,
    /// Calls that got to no model.
    default: RecordingView,
    models: Vec<ModelRecordingView>,
    logs: Vec<LogView>,
    /// Where the ledger is delivered.
    sinks: Vec<SinkStats>,
}

/// What is recorded of a version that is loaded.
#[derive(Serialize, ToSchema)]
struct ModelRecordingView {
    model: String,
    version: String,
    #[serde(flatten)]
    recording: RecordingView,
}

/// How long an answer waits for its record, and what that holds.
#[derive(Serialize, ToSchema)]
struct RecordingView {
    /// `sync`, `buffered` or `off`.
    durability: &'static str,
    /// Nothing is recorded.
    #[serde(rename = "unsafe")]
    is_unsafe: bool,
    /// `refuse` or `serve`.
    on_error: &'static str,
    /// `full`, `digest` or `none`.
    capture: &'static str,
    /// Share of predictions whose tensors are kept.
    #[schema(minimum = 0, maximum = 1)]
    sample_rate: f64,
    /// Tensors with a rule of their own.
    #[schema(minimum = 0)]
    rules: usize,
    /// Name and hash of the policy, as records have it.
    policy: String,
}

/// One log.
#[derive(Serialize, ToSchema)]
struct LogView {
    /// `predictions`, `admin` or `feedback`.
    log: &'static str,
    /// Since the start, as the next three.
    #[schema(minimum = 0)]
    records: u64,
    #[schema(minimum = 0)]
    bytes: u64,
    #[schema(minimum = 0)]
    fsyncs: u64,
    /// Calls that have no record.
    #[schema(minimum = 0)]
    dropped: u64,
    /// Number after the last record that the operating system has.
    #[schema(minimum = 0)]
    written_seq: u64,
    /// Number after the last record on the disk.
    #[schema(minimum = 0)]
    synced_seq: u64,
    #[schema(minimum = 0)]
    queued_bytes: u64,
    #[schema(minimum = 0)]
    segments_sealed: u64,
    /// Age of the oldest record that is not on the disk.
    #[schema(minimum = 0)]
    lag_seconds: f64,
    /// Free on its disk.
    #[schema(minimum = 0)]
    free_bytes: u64,
}

/// Whether predictions are recorded, by model, and how the logs do.
#[utoipa::path(get, path = "/audit/stats", operation_id = "audit.stats", tag = "audit",
    responses((status = 200, description = "How the ledger does.", body = AuditView)))]
pub(super) async fn stats(
    State(admin): State<Arc<Admin>>,
    asked: Asked,
) -> Result<Response, Problem> {
    let Some(Audit { ledger, table }) = &admin.audit else {
        return Err(LATER.because("this gateway has no ledger"));
    };
    let health = ledger.health();
    let table = table.snapshot();
    let served = table.models.values().flat_map(|routes| routes.versions.values());
    let seen = served.filter(|served| asked.caller.may(Action::ReadJournal, Some(&served.model)));
    let models = seen.map(|served| ModelRecordingView {
        model: served.model.to_string(),
        version: served.version.to_string(),
        recording: RecordingView::new(&served.recording),
    });
    let view = AuditView {
        writer: health.writer,
        problem: health.problem,
        default: RecordingView::new(ledger.unrouted()),
        models: models.collect(),
        logs: health.logs.into_iter().map(LogView::from).collect(),
        sinks: health.sinks,
    };
    Ok(json(StatusCode::OK, &view))
}

impl RecordingView {
    fn new(recording: &Recording) -> Self {
        #[expect(clippy::cast_precision_loss, reason = "at most 2^32")]
        let sample_rate = recording.sample as f64 / SAMPLE_ALL as f64;
        Self {
            durability: recording.durability.as_str(),
            is_unsafe: recording.durability == Durability::Off,
            on_error: recording.on_error.as_str(),
            capture: recording.capture.as_str(),
            sample_rate,
            rules: recording.tensors.len(),
            policy: recording.stamp.clone(),
        }
    }
}

impl From<crate::ledger::LogHealth> for LogView {
    fn from(log: crate::ledger::LogHealth) -> Self {
        Self {
            log: log.log,
            records: log.records,
            bytes: log.bytes,
            fsyncs: log.fsyncs,
            dropped: log.dropped,
            written_seq: log.written_seq,
            synced_seq: log.synced_seq,
            queued_bytes: log.queued_bytes,
            segments_sealed: log.segments_sealed,
            lag_seconds: log.lag_seconds,
            free_bytes: log.free_bytes,
        }
    }
}
