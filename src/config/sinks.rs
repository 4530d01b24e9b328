//! From the section `[sinks]` to where the ledger is delivered.

use std::time::Duration;

use url::{Host, Url};

use super::layers::Layers;
use super::sources::{list, secret};
use crate::bucket::{Bucket, StoreSettings};
use crate::control::source::HostPort;
use crate::ledger::delivery::{
    Cap, EventsSettings, KafkaSettings, Mechanism, Models, ObjectsSettings, OnCap, Settings,
};

/// Longest name of a topic.
const TOPIC_LEN_MAX: usize = 249;

pub(super) fn settings(from: &mut Layers) -> Settings {
    let models = from.text("sinks.models").unwrap_or_default();
    let models = Models::parse(&models).unwrap_or_else(|problem| {
        from.problems.add("sinks.models", problem);
        Models::default()
    });
    let age = Duration::from_secs(from.number("sinks.retain_age_max_s"));
    Settings {
        objects: objects(from),
        kafka: kafka(from),
        events: events(from),
        models,
        cap: Cap {
            bytes_max: from.number("sinks.retain_bytes_max"),
            age_max: (!age.is_zero()).then_some(age),
            on_cap: match from.text("sinks.on_cap").as_deref() {
                Some("skip") => OnCap::Skip,
                _ => OnCap::Keep,
            },
        },
        backoff_max: from.millis("sinks.backoff_max_ms"),
    }
}

fn objects(from: &mut Layers) -> Option<ObjectsSettings> {
    let store = StoreSettings {
        endpoint: url(from, "sinks.objects_endpoint"),
        region: from.text("sinks.objects_region"),
        virtual_hosted: from.flag("sinks.objects_virtual_hosted"),
        account: from.text("sinks.objects_account"),
        key_id: secret(from, "sinks.objects_key_id"),
        secret: secret(from, "sinks.objects_secret"),
        token: secret(from, "sinks.objects_token"),
    };
    if store.key_id.is_some() && store.secret.is_none() {
        from.problems.add("sinks.objects_key_id", "needs sinks.objects_secret beside it");
    }
    let bucket = from.text("sinks.objects_url")?.parse::<Bucket>();
    let bucket =
        bucket.map_err(|error| from.problems.add("sinks.objects_url", error.to_string())).ok()?;
    Some(ObjectsSettings { bucket, store, allow_http: from.flag("sinks.allow_http") })
}

fn kafka(from: &mut Layers) -> Option<KafkaSettings> {
    const BROKERS: &str = "sinks.kafka_brokers";
    let brokers = list(from, BROKERS, |text| text.parse::<HostPort>().map(|_| text.to_owned()));
    let topic = from.text("sinks.kafka_topic").unwrap_or_default();
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    if topic.len() > TOPIC_LEN_MAX || !topic.bytes().all(fits) {
        let message = format!("expected letters, digits, '.', '_' and '-', got '{topic}'");
        from.problems.add("sinks.kafka_topic", message);
    }
    let tls = from.flag("sinks.kafka_tls");
    let mechanism = match from.text("sinks.kafka_sasl").as_deref() {
        Some("scram-sha-256") => Mechanism::ScramSha256,
        Some("scram-sha-512") => Mechanism::ScramSha512,
        _ => Mechanism::Plain,
    };
    let name = secret(from, "sinks.kafka_username");
    let password = secret(from, "sinks.kafka_password");
    if name.is_some() != password.is_some() {
        let missing = if name.is_some() { "sinks.kafka_password" } else { "sinks.kafka_username" };
        from.problems.add(missing, "is missing: a name and a password come together");
    }
    let login = name.zip(password).map(|(name, password)| (mechanism, name, password));
    let near = brokers.iter().all(|broker| is_near_broker(broker));
    if login.is_some() && !tls && !near && !from.flag("sinks.allow_http") {
        let message = "needs sinks.kafka_tls, so that the password is not sent in the clear";
        from.problems.add("sinks.kafka_password", message);
    }
    let timeout = from.millis("sinks.kafka_timeout_ms");
    (!brokers.is_empty()).then_some(KafkaSettings { brokers, topic, tls, login, timeout })
}

fn events(from: &mut Layers) -> Option<EventsSettings> {
    let token = secret(from, "sinks.events_token");
    let attempts = from.number("sinks.events_attempts_max");
    let url = url(from, "sinks.events_url");
    let mut word = |path: &str| {
        let word = from.text(path).unwrap_or_default();
        if !word.bytes().all(|byte| byte.is_ascii_graphic()) {
            from.problems.add(path, "expected visible ASCII without spaces");
        }
        word
    };
    let namespace = word("sinks.events_namespace");
    let component = word("sinks.events_component");
    let url = url?;
    if url.scheme() == "http" && !is_near(&url) && !from.flag("sinks.allow_http") {
        let message = "expected https; plain http to another machine needs sinks.allow_http";
        from.problems.add("sinks.events_url", message);
    }
    Some(EventsSettings {
        url,
        token,
        timeout: from.millis("sinks.events_timeout_ms"),
        attempts_max: u32::try_from(attempts).unwrap_or(u32::MAX),
        in_flight_max: from.size("sinks.events_in_flight_max"),
        namespace,
        component,
    })
}

fn url(from: &mut Layers, path: &'static str) -> Option<Url> {
    let url = from.text(path)?.parse::<Url>().ok();
    let fit = url.filter(|url| {
        let plain = url.username().is_empty() && url.password().is_none();
        matches!(url.scheme(), "http" | "https") && url.has_host() && plain
    });
    if fit.is_none() {
        // Not repeated: it may hold a password.
        from.problems
            .add(path, "expected a URL like https://host.example.com:9000, without a user");
    }
    fit
}

fn is_near(url: &Url) -> bool {
    match url.host() {
        Some(Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(Host::Ipv4(address)) => address.is_loopback(),
        Some(Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    }
}

fn is_near_broker(broker: &str) -> bool {
    Url::parse(&format!("http://{broker}/")).is_ok_and(|url| is_near(&url))
}

/// What travels unprotected.
pub(super) fn unsafe_notes(settings: &Settings) -> Vec<String> {
    let mut notes = Vec::new();
    if let Some(kafka) = &settings.kafka
        && !kafka.tls
        && !kafka.brokers.iter().all(|broker| is_near_broker(broker))
    {
        let note = "sinks.kafka_brokers: predictions travel without TLS; set sinks.kafka_tls";
        notes.push(note.to_owned());
    }
    let plain = |url: Option<&Url>| url.is_some_and(|url| url.scheme() == "http" && !is_near(url));
    let objects = settings.objects.as_ref().and_then(|objects| objects.store.endpoint.as_ref());
    for (path, url) in [
        ("sinks.objects_endpoint", objects),
        ("sinks.events_url", settings.events.as_ref().map(|events| &events.url)),
    ] {
        if plain(url) {
            notes.push(format!("{path}: predictions travel without TLS"));
        }
    }
    notes
}
