//! Every key of the gateway's configuration.

/// What a key's value may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    Text,
    Bool,
    /// Whole number between the two, both included.
    Int(i64, i64),
    /// Number between 0 and 1.
    Ratio,
    Address,
    OneOf(&'static [&'static str]),
}

#[derive(Clone, Copy, Debug)]
pub struct Key {
    /// `section.name`.
    pub path: &'static str,
    pub kind: Kind,
    /// As it would stand in the file, without quotes; empty when there is none.
    pub default: &'static str,
}

const fn key(path: &'static str, kind: Kind, default: &'static str) -> Key {
    Key { path, kind, default }
}

const HOUR_MS: i64 = 3_600_000;
const U32_MAX: i64 = u32::MAX as i64;
/// A frame of the ledger holds so much, and room for its texts and shapes.
const RECORD_BYTES_MAX: i64 = 24 << 20;

/// In the order of the documentation.
pub const KEYS: &[Key] = &[
    key("server.http_address", Kind::Address, "127.0.0.1:8000"),
    key("server.grpc_address", Kind::Address, "127.0.0.1:8001"),
    key("server.metrics_address", Kind::Address, "127.0.0.1:8002"),
    key("server.admin_address", Kind::Address, "127.0.0.1:8003"),
    key("server.state_dir", Kind::Text, "tidegate-state"),
    key("server.allow_unauthenticated", Kind::Bool, "false"),
    key("server.timeout_max_ms", Kind::Int(1, 24 * HOUR_MS), "60000"),
    key("server.watchdog_ms", Kind::Int(0, 24 * HOUR_MS), "600000"),
    key("server.body_max_bytes", Kind::Int(1024, i32::MAX as i64), "67108864"),
    key("server.in_flight_bytes_max", Kind::Int(0, i64::MAX), "0"),
    key("server.decode_queue_max", Kind::Int(0, 1_000_000), "256"),
    key("server.output_bytes_max", Kind::Int(1024, 1 << 40), "268435456"),
    key("server.answer_json_max_bytes", Kind::Int(1024, 1 << 40), "268435456"),
    key("server.compression_ratio_max", Kind::Int(1, 100_000), "100"),
    key("server.compress_min_bytes", Kind::Int(0, i32::MAX as i64), "1024"),
    key("server.header_timeout_ms", Kind::Int(1, HOUR_MS), "30000"),
    key("server.idle_timeout_ms", Kind::Int(1, 24 * HOUR_MS), "300000"),
    key("server.write_timeout_ms", Kind::Int(1, HOUR_MS), "30000"),
    key("server.body_timeout_ms", Kind::Int(1, HOUR_MS), "60000"),
    key("server.body_grace_ms", Kind::Int(1, HOUR_MS), "10000"),
    key("server.body_rate_min", Kind::Int(0, 1 << 30), "1024"),
    key("server.header_max_bytes", Kind::Int(1024, 65_536), "16384"),
    key("server.uri_max_bytes", Kind::Int(64, 65_536), "8192"),
    key("server.connections_max", Kind::Int(1, 1_000_000), "8192"),
    key("server.io_threads", Kind::Int(0, 1024), "0"),
    key("server.connections_per_ip_max", Kind::Int(0, 1_000_000), "4096"),
    key("server.connection_age_max_ms", Kind::Int(0, 24 * HOUR_MS), "0"),
    key("server.http2_streams_max", Kind::Int(1, U32_MAX), "256"),
    key("server.stream_concurrency_max", Kind::Int(1, 65_536), "64"),
    key("server.mlserver_stream", Kind::Bool, "false"),
    key("server.sticky_header", Kind::Text, ""),
    key("server.system_shared_memory", Kind::Bool, "false"),
    key("server.drain_notice_ms", Kind::Int(0, HOUR_MS), "1000"),
    key("server.drain_grace_ms", Kind::Int(0, HOUR_MS), "30000"),
    key("server.tls_cert", Kind::Text, ""),
    key("server.tls_key", Kind::Text, ""),
    key("auth.data", Kind::OneOf(&["open", "required"]), "open"),
    key("admin.tls_cert", Kind::Text, ""),
    key("admin.tls_key", Kind::Text, ""),
    key("admin.client_ca", Kind::Text, ""),
    key("admin.clients", Kind::Text, ""),
    key("admin.hosts", Kind::Text, ""),
    key("repository.path", Kind::Text, "models"),
    key("repository.model_name", Kind::Text, ""),
    key("repository.model_control", Kind::Bool, "false"),
    key("repository.copies_max", Kind::Int(0, 100_000), "8"),
    key("repository.versions_latest", Kind::Int(0, 1000), "0"),
    key("repository.pin_digests", Kind::Bool, "true"),
    key("repository.model_size_max_mb", Kind::Int(1, 1 << 30), "16384"),
    key("repository.poll_ms", Kind::Int(100, 24 * HOUR_MS), "15000"),
    key("repository.quiet_ms", Kind::Int(0, HOUR_MS), "2000"),
    key("repository.trusted_keys", Kind::Text, ""),
    key("repository.allowed_hosts", Kind::Text, ""),
    key("repository.allow_http", Kind::Bool, "false"),
    key("repository.store_endpoint", Kind::Text, ""),
    key("repository.store_region", Kind::Text, ""),
    key("repository.store_virtual_hosted", Kind::Bool, "false"),
    key("repository.store_account", Kind::Text, ""),
    key("repository.store_key_id", Kind::Text, ""),
    key("repository.store_secret", Kind::Text, ""),
    key("repository.store_token", Kind::Text, ""),
    key("repository.mlflow_username", Kind::Text, ""),
    key("repository.mlflow_password", Kind::Text, ""),
    key("repository.mlflow_token", Kind::Text, ""),
    key("repository.mlflow_stable_alias", Kind::Text, ""),
    key("repository.mlflow_webhook_secret", Kind::Text, ""),
    key("repository.mlflow_artifacts", Kind::Text, ""),
    key("models.default", Kind::Text, ""),
    key("release.reason_required", Kind::Bool, "false"),
    key("release.approvals_required", Kind::Int(0, 16), "0"),
    key("release.approval_age_max_days", Kind::Int(1, 3650), "30"),
    key("hooks.url", Kind::Text, ""),
    key("hooks.secret", Kind::Text, ""),
    key("hooks.timeout_ms", Kind::Int(100, HOUR_MS), "5000"),
    key("hooks.attempts_max", Kind::Int(1, 100), "8"),
    key("hooks.queue_max", Kind::Int(1, 65_536), "256"),
    key("engine.engine", Kind::OneOf(&["auto", "ort", "tract"]), "auto"),
    key("engine.ort_library", Kind::Text, ""),
    key("engine.threads", Kind::Int(0, 4096), "0"),
    key("engine.run_memory_max_mb", Kind::Int(0, 1 << 30), "0"),
    key("cache.bytes_max", Kind::Int(1 << 16, 1 << 40), "67108864"),
    key("cache.entry_bytes_max", Kind::Int(1024, 1 << 30), "1048576"),
    key("cache.ttl_ms", Kind::Int(0, 365 * 24 * HOUR_MS), "0"),
    key("shadow.queue_max", Kind::Int(1, 65_536), "256"),
    key("shadow.queue_bytes_max", Kind::Int(1024, 1 << 40), "16777216"),
    key("shadow.running_max", Kind::Int(1, 1024), "8"),
    key("shadow.timeout_ms", Kind::Int(1, 24 * HOUR_MS), "10000"),
    key("ledger.durability", Kind::OneOf(&["sync", "buffered", "off"]), "buffered"),
    key("ledger.on_error", Kind::OneOf(&["refuse", "serve"]), "refuse"),
    key("ledger.flush_interval_ms", Kind::Int(1, 60_000), "50"),
    key("ledger.segment_bytes", Kind::Int(1 << 16, 1 << 40), "67108864"),
    key("ledger.segment_age_s", Kind::Int(1, 30 * 86_400), "3600"),
    key("ledger.queue_bytes_max", Kind::Int(1 << 16, 1 << 40), "67108864"),
    key("ledger.free_bytes_min", Kind::Int(0, 1 << 50), "268435456"),
    key("ledger.free_bytes_warn", Kind::Int(0, 1 << 50), "1073741824"),
    key("ledger.checkpoint_interval_s", Kind::Int(1, 86_400), "10"),
    key("ledger.witness_file", Kind::Text, ""),
    key("ledger.witness_url", Kind::Text, ""),
    key("ledger.capture", Kind::OneOf(&["full", "digest", "none"]), "full"),
    key("ledger.sample_rate", Kind::Ratio, "1.0"),
    key("ledger.tensor_bytes_max", Kind::Int(0, RECORD_BYTES_MAX), "1048576"),
    key("ledger.record_bytes_max", Kind::Int(0, RECORD_BYTES_MAX), "4194304"),
    key("ledger.subject_header", Kind::Text, ""),
    key("ledger.subject_parameter", Kind::Text, ""),
    key("probe.enabled", Kind::Bool, "true"),
    key("probe.memory_max_mb", Kind::Int(64, 1 << 30), "4096"),
    key("probe.cpu_max_s", Kind::Int(1, 86_400), "120"),
    key("probe.wall_max_ms", Kind::Int(100, 24 * HOUR_MS), "60000"),
    key("log.format", Kind::OneOf(&["text", "json"]), "text"),
    key("log.level", Kind::Text, "info"),
    key("log.access", Kind::OneOf(&["off", "errors", "all"]), "errors"),
    key("telemetry.otlp_endpoint", Kind::Text, ""),
    key("telemetry.sample_ratio", Kind::Ratio, "1.0"),
    key("telemetry.service_name", Kind::Text, "tidegate"),
    key("telemetry.triton_metrics", Kind::Bool, "true"),
];

pub fn find(path: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.path == path)
}

/// Environment variable of a key: `server.http_address` is `TIDEGATE_SERVER_HTTP_ADDRESS`.
pub fn variable(path: &str) -> String {
    format!("TIDEGATE_{}", path.replace('.', "_").to_ascii_uppercase())
}
