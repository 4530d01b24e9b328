//! From layered keys to the settings of each part, with the rules between keys.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::layers::{Layers, Problems};
use super::{Config, alerts, records, sinks, sources};
use crate::admit::Clients;
use crate::control::source::Location;
use crate::domain::{EngineChoice, ModelName};
use crate::observe::{AccessLog, Otlp, log};
use crate::transport::auth::Auth;
use crate::transport::intake::memory_limit;
use crate::transport::tls::{Files, Tls};
use crate::{cache, control, gateway, observe, outbound, shadow, transport};

/// Address space that a trial may have however small the container is.
const PROBE_MEMORY_FLOOR: u64 = 1 << 30;

pub(super) fn assemble(mut layers: Layers) -> Result<Config, Problems> {
    let from = &mut layers;
    let mut config = Config {
        http: from.address("server.http_address"),
        grpc: from.address("server.grpc_address"),
        metrics: from.address("server.metrics_address"),
        admin: from.address("server.admin_address"),
        allow_unauthenticated: from.flag("server.allow_unauthenticated"),
        admin_tls: tls(from, "admin"),
        admin_clients: admin_clients(from),
        admin_hosts: admin_hosts(from),
        control: control_settings(from),
        transport: transport_settings(from),
        gateway: gateway_settings(from),
        ledger: records::settings(from),
        feedback: records::feedback(from),
        monitor: records::monitor(from),
        sinks: sinks::settings(from),
        engine_memory_max: match from.size("engine.run_memory_max_mb") {
            // The rest is for weights, requests and everything else.
            0 => transport::intake::memory_limit()
                .map(|bytes| usize::try_from(bytes / 4 * 3).unwrap_or(usize::MAX)),
            mb => Some(mb << 20),
        },
        release: release_policy(from),
        hooks: hook_settings(from),
        alerts: alerts::settings(from),
        system_shared_memory: from.flag("server.system_shared_memory"),
        observe: observe_settings(from),
        log_format: log_format(from),
        log_level: log_level(from),
        drain_notice: from.millis("server.drain_notice_ms"),
        drain_grace: from.millis("server.drain_grace_ms"),
        unsafe_notes: Vec::new(),
    };
    records::witness_objects(&mut layers, &mut config);
    check_listeners(&config, &mut layers.problems);
    if !layers.problems.is_empty() {
        return Err(layers.problems);
    }
    config.unsafe_notes = unsafe_notes(&config);
    config.unsafe_notes.extend(layers.notes);
    Ok(config)
}

/// The certificates of a section, read here so that a wrong one is a problem like any other.
fn tls(from: &mut Layers, section: &str) -> Option<Arc<Tls>> {
    let path = |name: &str| format!("{section}.{name}");
    let (cert, key) = (path("tls_cert"), path("tls_key"));
    // The data plane knows its callers by their keys.
    let ca = (section == "admin").then(|| from.text("admin.client_ca")).flatten();
    let pair = match (from.text(&cert), from.text(&key)) {
        (Some(cert), Some(key)) => Some((cert, key)),
        (None, None) => None,
        (given, _) => {
            let (missing, other) = if given.is_none() { (cert, key) } else { (key, cert) };
            from.problems.add(missing, format!("is expected beside {other}"));
            return None;
        }
    };
    let Some((cert_file, key_file)) = pair else {
        if ca.is_some() {
            from.problems.add("admin.client_ca", format!("has no effect without {cert}"));
        }
        return None;
    };
    let client_ca = ca.map(PathBuf::from);
    let opened = Tls::open(Files { cert: cert_file.into(), key: key_file.into(), client_ca });
    opened.map_err(|error| from.problems.add(cert, error.to_string())).ok()
}

/// Names between commas, without ports.
fn admin_hosts(from: &mut Layers) -> Vec<String> {
    let text = from.text("admin.hosts").unwrap_or_default();
    let names = text.split(',').map(str::trim).filter(|name| !name.is_empty());
    let names: Vec<String> = names.map(ToOwned::to_owned).collect();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b".-_".contains(&byte);
    for name in names.iter().filter(|name| !name.bytes().all(plain)) {
        let message = format!("expected names of hosts between commas, got '{name}'");
        from.problems.add("admin.hosts", message);
    }
    names
}

fn admin_clients(from: &mut Layers) -> Clients {
    let Some(text) = from.text("admin.clients") else { return Clients::default() };
    if from.text("admin.client_ca").is_none() {
        from.problems.add("admin.clients", "has no effect without admin.client_ca");
    }
    let parsed = text.parse::<Clients>();
    parsed.unwrap_or_else(|error| {
        from.problems.add("admin.clients", error.to_string());
        Clients::default()
    })
}

fn gateway_settings(from: &mut Layers) -> gateway::Settings {
    let ttl = from.millis("cache.ttl_ms");
    let cache = cache::Settings {
        bytes_max: from.size("cache.bytes_max"),
        entry_bytes_max: from.size("cache.entry_bytes_max"),
        ttl: (!ttl.is_zero()).then_some(ttl),
    };
    // The cache is cut into parts, each with room for several entries.
    let most = cache.bytes_max / 8;
    if cache.entry_bytes_max > most {
        let got = cache.entry_bytes_max;
        let message = format!("expected at most an eighth of cache.bytes_max, {most}, got {got}");
        from.problems.add("cache.entry_bytes_max", message);
    }
    let watchdog = from.millis("server.watchdog_ms");
    gateway::Settings {
        timeout_max: from.millis("server.timeout_max_ms"),
        watchdog: (!watchdog.is_zero()).then_some(watchdog),
        output_bytes_max: from.size("server.output_bytes_max"),
        cache,
        shadow: shadow::Settings {
            queue_max: from.size("shadow.queue_max"),
            queue_bytes_max: from.size("shadow.queue_bytes_max"),
            running_max: from.size("shadow.running_max"),
            timeout: from.millis("shadow.timeout_ms"),
        },
    }
}

fn control_settings(from: &mut Layers) -> control::Settings {
    let path = from.text("repository.path").unwrap_or_default();
    let location = sources::location(from, &path);
    let state_dir = from.text("server.state_dir").unwrap_or_default();
    let mut settings = match &location {
        Some(Location::Folder(folder)) => control::Settings::new(folder, state_dir),
        // Not a folder: shown in messages only.
        _ => control::Settings::new(path, state_dir),
    };
    settings.source = sources::settings(from, location);
    settings.trusted_keys = sources::trusted_keys(from);
    settings.engine = match from.text("engine.engine").as_deref() {
        Some("ort") => EngineChoice::Ort,
        Some("tract") => EngineChoice::Tract,
        _ => EngineChoice::Auto,
    };
    settings.ort_library = from.text("engine.ort_library").map(PathBuf::from);
    match from.size("engine.threads") {
        0 => {}
        threads => settings.threads = threads,
    }
    settings.probe_enabled = from.flag("probe.enabled");
    settings.probe = control::ProbeLimits {
        memory_max_bytes: probe_memory(from.number("probe.memory_max_mb") << 20, memory_limit()),
        cpu_max: Duration::from_secs(from.number("probe.cpu_max_s")),
        wall_max: from.millis("probe.wall_max_ms"),
    };
    settings.copies_max = from.size("repository.copies_max");
    settings.versions_latest = from.size("repository.versions_latest");
    settings.pin_digests = from.flag("repository.pin_digests");
    settings.memory_max = memory_limit();
    settings.model_size_max = from.number("repository.model_size_max_mb") << 20;
    settings.model_name = model_name(from, "repository.model_name");
    settings.default_model = model_name(from, "models.default");
    settings.recording = records::recording(from);
    settings
}

fn hook_settings(from: &mut Layers) -> Option<control::hooks::Settings> {
    let (url, secret) = (from.text("hooks.url"), from.text("hooks.secret"));
    let outbound = outbound::Settings {
        timeout: from.millis("hooks.timeout_ms"),
        attempts_max: u32::try_from(from.number("hooks.attempts_max")).unwrap_or(u32::MAX),
        backoff: Duration::from_secs(1),
    };
    let queue_max = from.size("hooks.queue_max");
    if url.is_none() && secret.is_some() {
        from.notes.push("hooks.secret has no effect without hooks.url".to_owned());
    }
    let url = outbound::parse_url(&url?);
    let url = url.map_err(|problem| from.problems.add("hooks.url", problem)).ok();
    let secret: Option<control::secret::SecretRef> = match secret {
        Some(text) => {
            let parsed = text.parse::<control::secret::SecretRef>();
            parsed.map_err(|error| from.problems.add("hooks.secret", error.to_string())).ok()
        }
        None => {
            let message =
                "expected where the key of hooks.url's signatures is: env:NAME or file:PATH";
            from.problems.add("hooks.secret", message);
            None
        }
    };
    let (url, secret) = (url?, secret?);
    Some(control::hooks::Settings { url, secret, outbound, queue_max })
}

fn release_policy(from: &mut Layers) -> control::director::Policy {
    let days = from.number("release.approval_age_max_days");
    control::director::Policy {
        reason_required: from.flag("release.reason_required"),
        approvals_required: from.size("release.approvals_required"),
        approval_age_max: Duration::from_secs(days * 24 * 3600),
    }
}

/// A trial shares the memory of the gateway's container: what is more than there is would only end both.
/// Address space is more than what is used of it, so even the smallest container lets a trial have some.
fn probe_memory(wanted: u64, limit: Option<u64>) -> u64 {
    wanted.min(limit.map_or(u64::MAX, |limit| limit.max(PROBE_MEMORY_FLOOR)))
}

fn model_name(from: &mut Layers, path: &str) -> Option<ModelName> {
    let parsed = from.text(path)?.parse::<ModelName>();
    parsed.map_err(|error| from.problems.add(path, error.to_string())).ok()
}

fn transport_settings(from: &mut Layers) -> transport::Settings {
    let sticky_header = from.text("server.sticky_header").map(|name| name.to_ascii_lowercase());
    if let Some(name) = &sticky_header
        && http::HeaderName::from_bytes(name.as_bytes()).is_err()
    {
        from.problems.add("server.sticky_header", format!("'{name}' is no header name"));
    }
    transport::Settings {
        auth: Auth {
            required: from.text("auth.data").as_deref() == Some("required"),
            ..Auth::default()
        },
        tls: tls(from, "server"),
        body_max_bytes: from.size("server.body_max_bytes"),
        in_flight_bytes_max: from.size("server.in_flight_bytes_max"),
        decode_queue_max: from.size("server.decode_queue_max"),
        answer_json_max_bytes: from.size("server.answer_json_max_bytes"),
        compression_ratio_max: from.size("server.compression_ratio_max"),
        compress_min_bytes: from.size("server.compress_min_bytes"),
        model_control: from.flag("repository.model_control"),
        sticky_header,
        subject_header: records::subject_header(from),
        mlserver_stream: from.flag("server.mlserver_stream"),
        stream_concurrency_max: from.size("server.stream_concurrency_max"),
        header_timeout: from.millis("server.header_timeout_ms"),
        idle_timeout: from.millis("server.idle_timeout_ms"),
        write_timeout: from.millis("server.write_timeout_ms"),
        body_timeout: from.millis("server.body_timeout_ms"),
        body_grace: from.millis("server.body_grace_ms"),
        body_rate_min: u32::try_from(from.number("server.body_rate_min")).unwrap_or(u32::MAX),
        header_max_bytes: from.size("server.header_max_bytes"),
        uri_max_bytes: from.size("server.uri_max_bytes"),
        http2_streams_max: u32::try_from(from.number("server.http2_streams_max"))
            .unwrap_or(u32::MAX),
        connections_max: from.size("server.connections_max"),
        io_threads: match from.size("server.io_threads") {
            0 => transport::Settings::default().io_threads,
            threads => threads,
        },
        connections_per_ip_max: from.size("server.connections_per_ip_max"),
        connection_age_max: Some(from.millis("server.connection_age_max_ms"))
            .filter(|age| !age.is_zero()),
    }
}

fn observe_settings(from: &mut Layers) -> observe::Settings {
    observe::Settings {
        triton_metrics: from.flag("telemetry.triton_metrics"),
        access_log: match from.text("log.access").as_deref() {
            Some("off") => AccessLog::Off,
            Some("all") => AccessLog::All,
            _ => AccessLog::Errors,
        },
        otlp: otlp_settings(from),
    }
}

fn log_format(from: &mut Layers) -> log::Format {
    match from.text("log.format").as_deref() {
        Some("json") => log::Format::Json,
        _ => log::Format::Text,
    }
}

fn log_level(from: &mut Layers) -> String {
    let level = from.text("log.level").unwrap_or_else(|| "info".to_owned());
    if let Err(error) = level.parse::<tracing_subscriber::filter::Targets>() {
        from.problems.add("log.level", format!("'{level}' is no level or filter: {error}"));
    }
    level
}

fn otlp_settings(from: &mut Layers) -> Option<Otlp> {
    let sample_ratio = from.ratio("telemetry.sample_ratio");
    let service_name = from.text("telemetry.service_name").unwrap_or_default();
    let endpoint = from.text("telemetry.otlp_endpoint")?;
    let scheme =
        endpoint.parse::<http::Uri>().ok().and_then(|uri| uri.scheme_str().map(str::to_owned));
    if !matches!(scheme.as_deref(), Some("http")) {
        let message = format!("expected a URL like http://127.0.0.1:4317, got '{endpoint}'");
        from.problems.add("telemetry.otlp_endpoint", message);
    }
    Some(Otlp { endpoint, sample_ratio, service_name })
}

fn listeners(config: &Config) -> [(&'static str, SocketAddr); 4] {
    [
        ("server.http_address", config.http),
        ("server.grpc_address", config.grpc),
        ("server.metrics_address", config.metrics),
        ("server.admin_address", config.admin),
    ]
}

fn check_listeners(config: &Config, problems: &mut Problems) {
    let listeners = listeners(config);
    let consent = config.transport.auth.required || config.allow_unauthenticated;
    for (path, address) in &listeners[..2] {
        if !address.ip().is_loopback() && !consent {
            problems.add(
                *path,
                format!(
                    "{address} can be reached by others and there is no authentication; set \
                     auth.data to \"required\", use a loopback address, or set \
                     server.allow_unauthenticated"
                ),
            );
        }
    }
    for (at, (path, address)) in listeners.iter().enumerate() {
        let same = |other: &&(&str, SocketAddr)| other.1 == *address && address.port() != 0;
        if let Some((other, _)) = listeners[..at].iter().find(same) {
            problems.add(*path, format!("{address} is taken by {other}"));
        }
    }
}

fn unsafe_notes(config: &Config) -> Vec<String> {
    let mut notes = Vec::new();
    let transport = &config.transport;
    for (at, (path, address)) in listeners(config)[..3].iter().enumerate() {
        // The third is for metrics, which need no key.
        let keys = at < 2 && transport.auth.required;
        let why = match (keys, &transport.tls) {
            _ if address.ip().is_loopback() => continue,
            (true, Some(_)) => continue,
            (true, None) => {
                "takes keys over connections that are not encrypted; set server.tls_cert, or see \
                 that what is in front of it speaks TLS"
            }
            (false, _) => "is open to everyone who can reach it",
        };
        notes.push(format!("{path}: {address} {why}"));
    }
    if !config.admin.ip().is_loopback() && config.admin_tls.is_none() {
        notes.push(format!(
            "server.admin_address: {} takes tokens over connections that are not encrypted; set \
             admin.tls_cert, or see that what is in front of it speaks TLS",
            config.admin
        ));
    }
    if transport.model_control && !transport.auth.required {
        notes.push("repository.model_control: every caller can load and unload models".to_owned());
    }
    if config.system_shared_memory {
        notes.push(
            "server.system_shared_memory: callers can have shared memory of this machine read \
             and written"
                .to_owned(),
        );
    }
    notes.extend(sources::unsafe_notes(&config.control.source));
    notes.extend(records::unsafe_notes(&config.ledger));
    notes.extend(sinks::unsafe_notes(&config.sinks));
    if !config.control.probe_enabled {
        notes.push(
            "probe.enabled: models are loaded without a trial in a child process first".to_owned(),
        );
    }
    notes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trial_is_not_given_more_than_the_container_has() {
        const GIB: u64 = 1 << 30;
        assert_eq!(probe_memory(4 * GIB, None), 4 * GIB);
        assert_eq!(probe_memory(4 * GIB, Some(64 * GIB)), 4 * GIB);
        assert_eq!(probe_memory(4 * GIB, Some(2 * GIB)), 2 * GIB);
        assert_eq!(probe_memory(4 * GIB, Some(GIB / 4)), GIB);
        assert_eq!(probe_memory(GIB / 2, Some(GIB / 4)), GIB / 2);
    }
}
