//! Webhooks of MLflow: a signed hint that a look at the registry is worth it.
//!
//! ```text
//! size ─▶ headers ─▶ signature (constant time) ─▶ age ─▶ seen before? ─▶ Hint
//! ```
//!
//! Invariants:
//! - Nothing that a webhook says is believed beyond "look now": the registry is read all the same.
//! - Only what is signed is remembered, so that nobody without the secret can fill the memory.
//! - A delivery counts once: what was remembered is kept for as long as its time would still be good.

use std::collections::{HashSet, VecDeque};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit, Mac};
use http::{HeaderMap, HeaderName};
use jiff::Timestamp;
use parking_lot::Mutex;
use serde::Deserialize;
use sha2::Sha256;

use super::super::{SecretRef, Source};
use crate::control::lineage::short;
use crate::control::secret::{Secret, SecretError};
use crate::domain::ModelName;

/// How far a delivery's time may be from ours, in seconds.
const AGE_MAX_S: i64 = 300;
/// Deliveries remembered: a registry that sends more in ten minutes is told to wait.
const SEEN_MAX: usize = 4096;
/// Largest body.
pub const BODY_MAX: usize = 1 << 20;
const ID_LEN_MAX: usize = 128;
/// Signatures in one header: the old and the new secret's while it is replaced.
const SIGNATURES_MAX: usize = 4;

const ID: HeaderName = HeaderName::from_static("x-mlflow-delivery-id");
const TIME: HeaderName = HeaderName::from_static("x-mlflow-timestamp");
const SIGNATURE: HeaderName = HeaderName::from_static("x-mlflow-signature");

/// Why a delivery is refused.
#[derive(Debug, thiserror::Error)]
pub enum WebhookError {
    #[error("webhooks are not configured: repository.mlflow_webhook_secret is not set")]
    NotConfigured,
    #[error("the webhook secret cannot be read")]
    Secret(#[from] SecretError),
    #[error("the header {0} is missing or malformed")]
    Header(&'static str),
    #[error("the signature is wrong")]
    Forged,
    #[error("the delivery's time is more than {AGE_MAX_S} seconds from ours")]
    Late,
    #[error("the delivery came before")]
    Replayed,
    #[error("the body is larger than {BODY_MAX} bytes")]
    TooLarge,
    #[error("the body is no event: {0}")]
    Body(String),
    #[error("more than {SEEN_MAX} deliveries in ten minutes")]
    Busy,
}

impl WebhookError {
    /// HTTP status of the answer. A delivery that came before was taken: the sender may stop.
    pub fn status(&self) -> u16 {
        match self {
            Self::NotConfigured => 404,
            Self::Secret(_) => 500,
            Self::Header(_) | Self::Body(_) => 400,
            Self::Forged | Self::Late => 401,
            Self::Replayed => 200,
            Self::TooLarge => 413,
            Self::Busy => 429,
        }
    }
}

/// What a delivery says; for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hint {
    pub delivery: String,
    /// `model_version_alias.created` and the like.
    pub event: String,
    pub model: Option<ModelName>,
}

#[derive(Deserialize)]
struct Body {
    entity: String,
    action: String,
    #[serde(default)]
    data: Data,
}

#[derive(Default, Deserialize)]
struct Data {
    #[serde(default)]
    name: Option<String>,
}

/// A delivery whose signature and time are right; whether it came before is not known yet.
#[derive(Debug)]
pub struct Delivery {
    pub hint: Hint,
    sent: i64,
}

/// Checks a delivery's signature and time.
///
/// # Errors
/// Whatever is wrong with it.
pub fn verify_webhook(
    headers: &HeaderMap,
    body: &[u8],
    secret: &Secret,
    now: Timestamp,
) -> Result<Delivery, WebhookError> {
    if body.len() > BODY_MAX {
        return Err(WebhookError::TooLarge);
    }
    let id = text(headers, &ID, "X-MLflow-Delivery-Id")?;
    if id.is_empty() || id.len() > ID_LEN_MAX || id.contains('.') {
        return Err(WebhookError::Header("X-MLflow-Delivery-Id"));
    }
    let time = text(headers, &TIME, "X-MLflow-Timestamp")?;
    let digits = (1..=12).contains(&time.len()) && time.bytes().all(|byte| byte.is_ascii_digit());
    let sent: Option<i64> = if digits { time.parse().ok() } else { None };
    let sent = sent.ok_or(WebhookError::Header("X-MLflow-Timestamp"))?;
    let given = text(headers, &SIGNATURE, "X-MLflow-Signature")?;

    let mut mac = Hmac::<Sha256>::new_from_slice(secret.expose().as_bytes())
        .map_err(|_| WebhookError::Forged)?;
    for part in [id.as_bytes(), b".", time.as_bytes(), b".", body] {
        mac.update(part);
    }
    let signatures = given.split_whitespace().filter_map(|one| one.strip_prefix("v1,"));
    let mut signatures =
        signatures.take(SIGNATURES_MAX).filter_map(|one| STANDARD.decode(one).ok());
    // In constant time for each one that is given.
    if !signatures.any(|signature| mac.clone().verify_slice(&signature).is_ok()) {
        return Err(WebhookError::Forged);
    }
    if now.as_second().abs_diff(sent) > AGE_MAX_S.unsigned_abs() {
        return Err(WebhookError::Late);
    }
    let body: Body = serde_json::from_slice(body)
        .map_err(|error| WebhookError::Body(short(&error.to_string())))?;
    let event = short(&format!("{}.{}", body.entity, body.action));
    let model = body.data.name.and_then(|name| name.parse().ok());
    Ok(Delivery { hint: Hint { delivery: id.to_owned(), event, model }, sent })
}

fn text<'a>(
    headers: &'a HeaderMap,
    name: &HeaderName,
    shown: &'static str,
) -> Result<&'a str, WebhookError> {
    let mut values = headers.get_all(name).iter();
    match (values.next().map(http::HeaderValue::to_str), values.next()) {
        (Some(Ok(text)), None) => Ok(text),
        _ => Err(WebhookError::Header(shown)),
    }
}

/// Takes deliveries: checks each, lets each count once, and wakes the source.
pub struct Webhooks {
    secret: Option<SecretRef>,
    source: Arc<dyn Source>,
    seen: Mutex<Seen>,
}

/// Deliveries that were taken, the oldest first.
#[derive(Default)]
struct Seen {
    ids: HashSet<String>,
    order: VecDeque<(i64, String)>,
}

impl Webhooks {
    pub fn new(secret: Option<SecretRef>, source: Arc<dyn Source>) -> Self {
        Self { secret, source, seen: Mutex::default() }
    }

    /// Takes a delivery.
    ///
    /// # Errors
    /// Why it does not count.
    pub fn take(
        &self,
        headers: &HeaderMap,
        body: &[u8],
        now: Timestamp,
    ) -> Result<Hint, WebhookError> {
        let secret = self.secret.as_ref().ok_or(WebhookError::NotConfigured)?.read()?;
        let delivery = verify_webhook(headers, body, &secret, now)?;
        self.seen.lock().note(&delivery, now)?;
        self.source.hint();
        Ok(delivery.hint)
    }
}

impl Seen {
    fn note(&mut self, delivery: &Delivery, now: Timestamp) -> Result<(), WebhookError> {
        let id = &delivery.hint.delivery;
        // What was sent so long ago would be refused for its time.
        let oldest = now.as_second().saturating_sub(AGE_MAX_S);
        while self.order.front().is_some_and(|(sent, _)| *sent < oldest) {
            if let Some((_, old)) = self.order.pop_front() {
                self.ids.remove(&old);
            }
        }
        if self.ids.contains(id) {
            return Err(WebhookError::Replayed);
        }
        if self.ids.len() >= SEEN_MAX {
            // Not in the order of their times: some may be past theirs all the same.
            let (ids, order) = (&mut self.ids, &mut self.order);
            order.retain(|(sent, id)| *sent >= oldest || !ids.remove(id));
            if self.ids.len() >= SEEN_MAX {
                return Err(WebhookError::Busy);
            }
        }
        self.ids.insert(id.clone());
        self.order.push_back((delivery.sent, id.clone()));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use futures_util::future::BoxFuture;

    use super::super::super::{Listing, SourceError, Staged};
    use super::*;
    use crate::control::lineage::Lineage;
    use crate::domain::Version;

    const SECRET: &str = "webhook-secret-of-the-test";
    const SENT: i64 = 1_769_850_000;
    const BODY: &str = r#"{"entity":"model_version_alias","action":"created","timestamp":"2026-01-31T09:00:00+00:00","data":{"name":"iris","alias":"champion","version":"2"}}"#;
    /// `printf '%s' "$id.$sent.$body" | openssl dgst -sha256 -hmac "$secret" -binary | base64`
    const SIGNED: &str = "v1,DrBPOhfV4JBdMWlPHIZUQIvnbRx3hFSiGHFbS1GgFvI=";

    fn sign(secret: &str, id: &str, time: &str, body: &str) -> String {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret.as_bytes()).unwrap();
        mac.update(format!("{id}.{time}.{body}").as_bytes());
        format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
    }

    fn headers(id: &str, time: &str, signature: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in [(ID, id), (TIME, time), (SIGNATURE, signature)] {
            headers.insert(name, value.parse().unwrap());
        }
        headers
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn verify(headers: &HeaderMap, body: &str, now: i64) -> Result<Hint, WebhookError> {
        let secret = Secret::new(SECRET);
        verify_webhook(headers, body.as_bytes(), &secret, at(now)).map(|delivery| delivery.hint)
    }

    #[test]
    fn a_signed_delivery_is_taken() {
        let hint = verify(&headers("d-1", "1769850000", SIGNED), BODY, SENT + 5).unwrap();
        assert_eq!(hint.event, "model_version_alias.created");
        assert_eq!(hint.model, Some("iris".parse().unwrap()));
        // While a secret is replaced there are two signatures.
        let two = format!("{} {SIGNED}", sign("old", "d-1", "1769850000", BODY));
        assert!(verify(&headers("d-1", "1769850000", &two), BODY, SENT).is_ok());
    }

    #[test]
    fn forgeries_are_refused() {
        let time = SENT.to_string();
        let good = sign(SECRET, "d-1", &time, BODY);
        let cases: &[(&str, HeaderMap, &str)] = &[
            ("another secret", headers("d-1", &time, &sign("guess", "d-1", &time, BODY)), BODY),
            ("another body", headers("d-1", &time, &good), r#"{"entity":"x","action":"y"}"#),
            ("another id", headers("d-2", &time, &good), BODY),
            ("another time", headers("d-1", "1769850001", &good), BODY),
            ("no version", headers("d-1", &time, &good[3..]), BODY),
            ("another version", headers("d-1", &time, &good.replace("v1", "v2")), BODY),
            ("cut", headers("d-1", &time, &good[..20]), BODY),
            ("empty", headers("d-1", &time, "v1,"), BODY),
            ("none", headers("d-1", &time, ""), BODY),
            ("not base64", headers("d-1", &time, "v1,%%%%"), BODY),
            (
                "five before it",
                headers("d-1", &time, &format!("v1,AA v1,AA v1,AA v1,AA {good}")),
                BODY,
            ),
        ];
        for (name, headers, body) in cases {
            let got = verify(headers, body, SENT);
            assert!(matches!(got, Err(WebhookError::Forged)), "{name}: {got:?}");
        }
        let empty = verify_webhook(
            &headers("d-1", &time, &good),
            BODY.as_bytes(),
            &Secret::new(""),
            at(SENT),
        );
        assert!(matches!(empty, Err(WebhookError::Forged)));
    }

    #[test]
    fn malformed_and_late_deliveries_are_refused() {
        let time = SENT.to_string();
        let sign = |id: &str, time: &str| sign(SECRET, id, time, BODY);
        for (id, time) in [
            ("", &*time),
            ("a.b", &*time),
            (&*"x".repeat(200), &*time),
            ("d", ""),
            ("d", "-5"),
            ("d", "1e9"),
            ("d", " 1769850000"),
            ("d", "9999999999999"),
        ] {
            let got = verify(&headers(id, time, &sign(id, time)), BODY, SENT);
            assert!(matches!(got, Err(WebhookError::Header(_))), "{id} {time}: {got:?}");
        }
        let mut twice = headers("d-1", &time, &sign("d-1", &time));
        twice.append(TIME, "1769850000".parse().unwrap());
        assert!(matches!(verify(&twice, BODY, SENT), Err(WebhookError::Header(_))));
        twice.remove(TIME);
        assert!(matches!(verify(&twice, BODY, SENT), Err(WebhookError::Header(_))));
        let good = headers("d-1", &time, &sign("d-1", &time));
        for (now, ok) in [(-301, false), (-300, true), (0, true), (300, true), (301, false)] {
            let got = verify(&good, BODY, SENT + now);
            assert_eq!(got.is_ok(), ok, "{now}: {got:?}");
        }
        let signed =
            |body: &str| headers("d-1", &time, &super::tests::sign(SECRET, "d-1", &time, body));
        for bad in ["", "[]", "{}", r#"{"entity":1,"action":"x"}"#] {
            assert!(matches!(verify(&signed(bad), bad, SENT), Err(WebhookError::Body(_))), "{bad}");
        }
        let large = "x".repeat(BODY_MAX + 1);
        assert!(matches!(verify(&signed(&large), &large, SENT), Err(WebhookError::TooLarge)));
    }

    struct Counted(Mutex<usize>);

    impl Source for Counted {
        fn describe(&self) -> String {
            String::new()
        }
        fn list(&self) -> BoxFuture<'_, Result<Listing, SourceError>> {
            Box::pin(async { Ok(Listing::default()) })
        }
        fn stage<'a>(
            &'a self,
            _: &'a ModelName,
            _: Version,
            _: &'a std::path::Path,
        ) -> BoxFuture<'a, Result<Staged, SourceError>> {
            Box::pin(async { Err(SourceError::Unsupported(String::new())) })
        }
        fn lineage<'a>(
            &'a self,
            _: &'a ModelName,
            _: Version,
        ) -> BoxFuture<'a, Result<Lineage, SourceError>> {
            Box::pin(async { Ok(Lineage::default()) })
        }
        fn changed(&self) -> BoxFuture<'_, ()> {
            Box::pin(async {})
        }
        fn hint(&self) {
            *self.0.lock() += 1;
        }
    }

    #[test]
    fn a_delivery_counts_once_and_the_memory_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("secret");
        std::fs::write(&file, SECRET).unwrap();
        let source = Arc::new(Counted(Mutex::new(0)));
        let webhooks =
            Webhooks::new(Some(SecretRef::File(file)), Arc::clone(&source) as Arc<dyn Source>);
        let take = |id: &str, sent: i64, now: i64| {
            let time = sent.to_string();
            let headers = headers(id, &time, &sign(SECRET, id, &time, BODY));
            webhooks.take(&headers, BODY.as_bytes(), at(now))
        };
        assert!(take("d-1", SENT, SENT).is_ok());
        assert!(matches!(take("d-1", SENT, SENT + 300), Err(WebhookError::Replayed)));
        assert!(matches!(take("d-1", SENT, SENT + 301), Err(WebhookError::Late)));
        assert_eq!(*source.0.lock(), 1);
        // Signed ones of the near future fill it; then it is full until their time has passed.
        for at in 1..SEEN_MAX {
            assert!(take(&format!("f-{at}"), SENT + 300, SENT).is_ok(), "{at}");
        }
        assert!(matches!(take("d-2", SENT, SENT), Err(WebhookError::Busy)));
        assert!(take("d-3", SENT + 301, SENT + 301).is_ok(), "the first one's time has passed");
        assert!(matches!(take("f-1", SENT + 300, SENT + 301), Err(WebhookError::Replayed)));
        assert!(take("d-4", SENT + 700, SENT + 700).is_ok());
        assert_eq!(webhooks.seen.lock().ids.len(), 1);
        let none = Webhooks::new(None, source);
        assert!(matches!(
            none.take(&HeaderMap::new(), b"", at(SENT)),
            Err(WebhookError::NotConfigured)
        ));
    }
}
