//! From the section `[ledger]` to the settings of the ledger.

use std::path::Path;
use std::time::Duration;

use super::Config;
use super::layers::Layers;
use crate::domain::{Capture, Durability, OnUnrecorded, RecordSettings, sample_of};
use crate::feedback;
use crate::ledger;
use crate::ledger::witness::{self, Target};
use crate::monitor;

pub(super) fn settings(from: &mut Layers) -> ledger::Settings {
    let state_dir = from.text("server.state_dir").unwrap_or_default();
    ledger::Settings {
        segment_bytes: from.number("ledger.segment_bytes"),
        segment_age_max: Duration::from_secs(from.number("ledger.segment_age_s")),
        flush_interval: from.millis("ledger.flush_interval_ms"),
        queue_bytes_max: from.size("ledger.queue_bytes_max"),
        free_bytes_min: from.number("ledger.free_bytes_min"),
        free_bytes_warn: from.number("ledger.free_bytes_warn"),
        checkpoint_interval: Duration::from_secs(from.number("ledger.checkpoint_interval_s")),
        witnesses: witnesses(from),
        retention_days: u32::try_from(from.number("ledger.retention_days")).unwrap_or(0),
        recording: recording(from),
        subject_parameter: from.text("ledger.subject_parameter"),
        ..ledger::Settings::new(Path::new(&state_dir))
    }
}

/// What is taken in of what callers say of predictions.
pub(super) fn feedback(from: &mut Layers) -> feedback::Settings {
    let state_dir = from.text("server.state_dir").unwrap_or_default();
    let usual = feedback::Settings::new(state_dir.into());
    feedback::Settings {
        items_max: from.size("feedback.items_max"),
        queue_max: from.size("feedback.queue_max"),
        window_days: u32::try_from(from.number("feedback.window_days")).unwrap_or(u32::MAX),
        // A model may have a longer deadline of its own, for which there is an hour.
        made_within: usual.made_within + from.millis("server.timeout_max_ms"),
        ..usual
    }
}

/// What looking at rows may cost.
pub(super) fn monitor(from: &mut Layers) -> monitor::Settings {
    let state_dir = from.text("server.state_dir").unwrap_or_default();
    monitor::Settings {
        enabled: from.flag("monitor.enabled"),
        values_per_second_max: from.number("monitor.values_per_second_max"),
        interval: Duration::from_secs(from.number("monitor.interval_s")),
        window_values: from.size("monitor.window_values"),
        features_max: from.size("monitor.features_max"),
        provisional_rows: from.number("monitor.provisional_rows"),
        new_categories: from.flag("monitor.new_categories"),
        ..monitor::Settings::new(Path::new(&state_dir))
    }
}

/// Where checkpoints go, so that nobody can change the log unseen who can change its files.
fn witnesses(from: &mut Layers) -> Vec<witness::Settings> {
    let mut witnesses = Vec::new();
    if let Some(file) = from.text("ledger.witness_file") {
        let target = Target::File(file.into());
        witnesses.push(witness::Settings { name: "file".to_owned(), target });
    }
    if let Some(url) = from.text("ledger.witness_url") {
        match crate::outbound::parse_url(&url) {
            Ok(url) => {
                let target = Target::Webhook(url);
                witnesses.push(witness::Settings { name: "url".to_owned(), target });
            }
            Err(problem) => from.problems.add("ledger.witness_url", problem),
        }
    }
    witnesses
}

/// The bucket that the ledger is delivered to may be a witness as well.
pub(super) fn witness_objects(from: &mut Layers, config: &mut Config) {
    if !from.flag("ledger.witness_objects") {
        return;
    }
    match &config.sinks.objects {
        Some(objects) => config.ledger.witnesses.push(witness::Settings {
            name: "objects".to_owned(),
            target: Target::Bucket(Box::new(objects.clone())),
        }),
        None => from.problems.add("ledger.witness_objects", "needs sinks.objects_url"),
    }
}

/// What is kept of models that say nothing else.
pub(super) fn recording(from: &mut Layers) -> RecordSettings {
    let mut word = |path: &str| from.text(path).unwrap_or_default();
    RecordSettings {
        durability: Durability::parse(&word("ledger.durability")),
        on_error: OnUnrecorded::parse(&word("ledger.on_error")),
        capture: Capture::parse(&word("ledger.capture")),
        sample: Some(sample_of(from.ratio("ledger.sample_rate"))),
        tensor_bytes_max: Some(from.size("ledger.tensor_bytes_max")),
        record_bytes_max: Some(from.size("ledger.record_bytes_max")),
        // The ledger's own setting has it.
        retention_days: None,
        tensors: Vec::new(),
    }
}

pub(super) fn subject_header(from: &mut Layers) -> Option<String> {
    let name = from.text("ledger.subject_header")?.to_ascii_lowercase();
    if http::HeaderName::from_bytes(name.as_bytes()).is_err() {
        from.problems.add("ledger.subject_header", format!("'{name}' is no header name"));
        return None;
    }
    Some(name)
}

pub(super) fn unsafe_notes(settings: &ledger::Settings) -> Vec<String> {
    let recording = &settings.recording;
    let mut notes = Vec::new();
    if recording.durability == Some(Durability::Off) {
        notes.push("ledger.durability: predictions are not recorded".to_owned());
    }
    if recording.on_error == Some(OnUnrecorded::Serve) {
        notes.push(
            "ledger.on_error: predictions whose record cannot be written are answered".to_owned(),
        );
    }
    notes
}
