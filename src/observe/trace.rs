//! Spans of finished requests, exported over OTLP.
//!
//! A request hands over a small copy of its figures; one task turns those into spans and sends
//! them. The queue between is bounded: what finds no room is dropped and counted, so a slow or
//! absent collector costs nothing else.
//!
//! A trace keeps the caller's trace id, and its decision whether to sample. Without a caller's
//! trace the prediction id is the trace id, so that one finds the other.
//!
//! We know how long each phase took but not when each began: the phases are laid end to end so that
//! the last ends with the request. What comes before them is our own work on the inputs.

use std::time::{Duration, SystemTime};

use opentelemetry::trace::{
    SpanContext, SpanId, SpanKind, Status, TraceFlags, TraceId, TraceState,
};
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use parking_lot::Mutex;
use tokio::sync::mpsc::{Receiver, Sender, channel};

use super::Otlp;
use crate::domain::{Completion, Outcome, Timings, TraceContext};

/// Requests waiting to be exported: about 1 MB.
const QUEUE_MAX: usize = 4096;
/// Requests in one export, with up to six spans each.
const BATCH_MAX: usize = 256;
/// Longest wait for the collector's answer.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// What of a request becomes spans.
#[derive(Clone, Debug)]
struct Finished {
    trace_id: u128,
    span: u64,
    parent: Option<u64>,
    started: SystemTime,
    timings: Timings,
    attributes: Vec<KeyValue>,
    failed: Option<&'static str>,
}

/// The requests' end of the export.
pub(super) struct Traces {
    settings: Otlp,
    queue: Sender<Finished>,
    /// Holds the other end until the exporter task takes it, once.
    waiting: Mutex<Option<Receiver<Finished>>>,
    dropped: metrics::Counter,
}

impl Traces {
    pub(super) fn new(settings: Otlp, dropped: metrics::Counter) -> Self {
        let (queue, waiting) = channel(QUEUE_MAX);
        Self { settings, queue, waiting: Mutex::new(Some(waiting)), dropped }
    }

    /// Hands a request over if it is sampled. Never waits.
    pub(super) fn offer(&self, completion: &Completion) {
        let trace_id = match completion.trace {
            Some(TraceContext { sampled: false, .. }) => return,
            Some(trace) => trace.trace_id,
            None => completion.prediction_id.as_u128(),
        };
        if completion.trace.is_none() && !sampled(trace_id, self.settings.sample_ratio) {
            return;
        }
        if self.queue.try_send(finished(trace_id, completion)).is_err() {
            self.dropped.increment(1);
        }
    }

    /// Exports until `stop` is ready and everything handed over before has been sent or given up.
    pub(super) async fn export(&self, stop: impl Future<Output = ()>) {
        let taken = self.waiting.lock().take();
        let Some(mut waiting) = taken else { return };
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(self.settings.endpoint.clone())
            .with_timeout(EXPORT_TIMEOUT)
            .build();
        let mut exporter = match exporter {
            Ok(exporter) => exporter,
            Err(error) => {
                tracing::error!(%error, "traces are not exported: the exporter cannot be set up");
                return;
            }
        };
        let service = self.settings.service_name.clone();
        exporter.set_resource(&Resource::builder().with_service_name(service).build());
        tokio::pin!(stop);
        let mut stopping = false;
        let mut healthy = true;
        loop {
            let mut batch = Vec::new();
            let count = tokio::select! {
                () = &mut stop, if !stopping => {
                    stopping = true;
                    waiting.close();
                    continue;
                }
                count = waiting.recv_many(&mut batch, BATCH_MAX) => count,
            };
            if count == 0 {
                return;
            }
            let spans = batch.iter().flat_map(spans).collect();
            let sent = exporter.export(spans).await;
            if let Err(error) = &sent {
                self.dropped.increment(count as u64);
                if healthy {
                    tracing::warn!(%error, "traces are not exported for now");
                }
                // At the end there is no later, so a collector that is away is not waited for.
                if stopping {
                    return;
                }
            } else if !healthy {
                tracing::info!("traces are exported again");
            }
            healthy = sent.is_ok();
        }
    }
}

/// Whether a trace falls into the share. Mixed first: much of a prediction id is a clock and a
/// counter, so that neighbours would all fall on one side.
fn sampled(trace_id: u128, ratio: f64) -> bool {
    (mixed(trace_id, 0) as f64) < ratio * u64::MAX as f64
}

fn finished(trace_id: u128, completion: &Completion) -> Finished {
    let mut attributes = vec![
        KeyValue::new("tidegate.model", completion.model.to_string()),
        KeyValue::new("tidegate.protocol", completion.protocol.as_str()),
        KeyValue::new("tidegate.prediction_id", completion.prediction_id.to_string()),
        KeyValue::new("tidegate.outcome", completion.outcome.code()),
        KeyValue::new("tidegate.batch_size", i64::try_from(completion.batch_size).unwrap_or(-1)),
    ];
    if let Some(version) = completion.version {
        attributes.push(KeyValue::new("tidegate.version", version.to_string()));
    }
    if let Some(arm) = &completion.arm {
        attributes.push(KeyValue::new("tidegate.arm", arm.as_str().to_owned()));
    }
    Finished {
        trace_id,
        span: span_id(completion.prediction_id.as_u128(), 0),
        parent: completion.trace.map(|trace| trace.parent_span),
        started: completion.received_at,
        timings: completion.timings,
        attributes,
        failed: match &completion.outcome {
            Outcome::Ok => None,
            Outcome::Failed { kind, .. } => Some(kind.code()),
        },
    }
}

/// A span id from the prediction id, which is unique, so that no other source of chance is needed.
/// Never 0, which would be no id.
fn span_id(prediction: u128, number: u64) -> u64 {
    mixed(prediction, number + 1).max(1)
}

/// Spreads an id over 64 bits, differently for each number; the steps are splitmix64's.
fn mixed(id: u128, number: u64) -> u64 {
    let halves = id.to_be_bytes();
    let (high, low) = halves.split_at(8);
    let half = |bytes: &[u8]| bytes.iter().fold(0, |sum: u64, byte| sum << 8 | u64::from(*byte));
    let step = |mut x: u64| {
        x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    };
    step(step(half(high) ^ number) ^ half(low))
}

/// The request's span, then one for each phase that it reached.
fn spans(request: &Finished) -> Vec<SpanData> {
    let timings = &request.timings;
    let ended = request.started + timings.total;
    let status = match request.failed {
        None => Status::Ok,
        Some(code) => Status::error(code),
    };
    let mut spans = vec![SpanData {
        attributes: request.attributes.clone(),
        status,
        span_kind: SpanKind::Server,
        parent_span_is_remote: request.parent.is_some(),
        ..span(request, request.span, request.parent.unwrap_or(0), "infer", request.started, ended)
    }];
    let phases = [
        ("queue", timings.queue),
        ("batch_wait", timings.batch_wait),
        ("compute_input", timings.compute_input),
        ("compute_infer", timings.compute_infer),
        ("compute_output", timings.compute_output),
    ];
    let all: Duration = phases.iter().map(|(_, took)| *took).sum();
    let mut at = request.started + timings.total.saturating_sub(all);
    for (number, (name, took)) in phases.into_iter().enumerate() {
        if !took.is_zero() {
            let id = span_id(u128::from(request.span), number as u64);
            spans.push(span(request, id, request.span, name, at, at + took));
        }
        at += took;
    }
    spans
}

fn span(
    request: &Finished,
    id: u64,
    parent: u64,
    name: &'static str,
    start_time: SystemTime,
    end_time: SystemTime,
) -> SpanData {
    SpanData {
        span_context: SpanContext::new(
            TraceId::from(request.trace_id),
            SpanId::from(id),
            TraceFlags::SAMPLED,
            false,
            TraceState::default(),
        ),
        parent_span_id: SpanId::from(parent),
        parent_span_is_remote: false,
        span_kind: SpanKind::Internal,
        name: name.into(),
        start_time,
        end_time,
        attributes: Vec::new(),
        dropped_attributes_count: 0,
        events: Default::default(),
        links: Default::default(),
        status: Status::Unset,
        instrumentation_scope: InstrumentationScope::builder("tidegate").build(),
    }
}

#[cfg(test)]
mod tests;
