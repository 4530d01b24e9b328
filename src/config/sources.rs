//! The keys that say where models come from.

use url::Url;

use super::layers::Layers;
use crate::bucket::{Bucket, StoreSettings};
use crate::control::TrustedKeys;
use crate::control::secret::SecretRef;
use crate::control::source::{HostPort, Location, MlflowSettings, Settings};
use crate::domain::Label;

/// Most hosts, and most prefixes of artifacts, in one list.
const LIST_MAX: usize = 64;

/// What `repository.path` means; `None` after a problem.
pub(super) fn location(from: &mut Layers, path: &str) -> Option<Location> {
    let parsed = path.parse::<Location>();
    parsed.map_err(|error| from.problems.add("repository.path", error.to_string())).ok()
}

pub(super) fn settings(from: &mut Layers, location: Option<Location>) -> Settings {
    let store = StoreSettings {
        endpoint: endpoint(from),
        region: from.text("repository.store_region"),
        virtual_hosted: from.flag("repository.store_virtual_hosted"),
        account: from.text("repository.store_account"),
        key_id: secret(from, "repository.store_key_id"),
        secret: secret(from, "repository.store_secret"),
        token: secret(from, "repository.store_token"),
    };
    if store.key_id.is_some() && store.secret.is_none() {
        from.problems.add("repository.store_key_id", "needs repository.store_secret beside it");
    }
    let mlflow = MlflowSettings {
        username: secret(from, "repository.mlflow_username"),
        password: secret(from, "repository.mlflow_password"),
        token: secret(from, "repository.mlflow_token"),
        stable_alias: from.text("repository.mlflow_stable_alias"),
        webhook_secret: secret(from, "repository.mlflow_webhook_secret"),
        artifacts: list(from, "repository.mlflow_artifacts", str::parse::<Bucket>),
    };
    for (one, other, missing) in [
        (&mlflow.username, &mlflow.password, "repository.mlflow_password"),
        (&mlflow.password, &mlflow.username, "repository.mlflow_username"),
    ] {
        if one.is_some() && other.is_none() {
            from.problems.add(missing, "is missing: a name and a password come together");
        }
    }
    if let Some(alias) = &mlflow.stable_alias
        && let Err(error) = alias.parse::<Label>()
    {
        from.problems.add("repository.mlflow_stable_alias", error.to_string());
    }
    Settings {
        location,
        poll: from.millis("repository.poll_ms"),
        quiet: from.millis("repository.quiet_ms"),
        allowed_hosts: list(from, "repository.allowed_hosts", str::parse::<HostPort>),
        allow_http: from.flag("repository.allow_http"),
        store,
        mlflow,
    }
}

pub(super) fn trusted_keys(from: &mut Layers) -> TrustedKeys {
    const PATH: &str = "repository.trusted_keys";
    let text = from.text(PATH).unwrap_or_default();
    TrustedKeys::parse(&text).unwrap_or_else(|error| {
        from.problems.add(PATH, error.to_string());
        TrustedKeys::default()
    })
}

fn endpoint(from: &mut Layers) -> Option<Url> {
    const PATH: &str = "repository.store_endpoint";
    let url = from.text(PATH)?.parse::<Url>().ok();
    let fit = url.filter(|url| {
        let plain = url.username().is_empty() && url.password().is_none();
        let rest = url.query().is_none() && url.fragment().is_none();
        matches!(url.scheme(), "http" | "https") && url.has_host() && plain && rest
    });
    if fit.is_none() {
        // Not repeated: it may hold a password.
        let message = "expected a URL like https://minio.example.com:9000, without a user";
        from.problems.add(PATH, message);
    }
    fit
}

pub(super) fn secret(from: &mut Layers, path: &'static str) -> Option<SecretRef> {
    let parsed = from.text(path)?.parse::<SecretRef>();
    parsed.map_err(|error| from.problems.add(path, error.to_string())).ok()
}

/// Values separated by commas.
pub(super) fn list<T, E: std::fmt::Display>(
    from: &mut Layers,
    path: &'static str,
    parse: impl Fn(&str) -> Result<T, E>,
) -> Vec<T> {
    let text = from.text(path).unwrap_or_default();
    let parts: Vec<&str> = text.split(',').map(str::trim).filter(|part| !part.is_empty()).collect();
    if parts.len() > LIST_MAX {
        let got = parts.len();
        from.problems.add(path, format!("expected at most {LIST_MAX} values, got {got}"));
    }
    let mut values = Vec::new();
    for part in parts.into_iter().take(LIST_MAX) {
        match parse(part) {
            Ok(value) => values.push(value),
            Err(error) => from.problems.add(path, error.to_string()),
        }
    }
    values
}

/// What travels unprotected.
pub(super) fn unsafe_notes(settings: &Settings) -> Vec<String> {
    let mut notes = Vec::new();
    let loopback = |url: &Url| match url.host() {
        Some(url::Host::Domain(name)) => name == "localhost" || name.ends_with(".localhost"),
        Some(url::Host::Ipv4(address)) => address.is_loopback(),
        Some(url::Host::Ipv6(address)) => address.is_loopback(),
        None => false,
    };
    if let Some(Location::Mlflow(tracking)) = &settings.location
        && tracking.base.scheme() == "http"
        && !loopback(&tracking.base)
    {
        notes.push(
            "repository.path: models and credentials travel without TLS; use mlflow+https"
                .to_owned(),
        );
    }
    if settings.allow_http {
        notes.push(
            "repository.allow_http: models may be read without TLS from other machines".to_owned(),
        );
    }
    notes
}
