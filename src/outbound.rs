//! What this gateway says to other systems over HTTP by itself: webhooks, and calls that start a
//! pipeline.
//!
//! ```text
//! deliver ──▶ POST, made anew for each try ──▶ 2xx yes · 4xx no · else again, after a wait
//! ```
//!
//! Invariants:
//! - A delivery ends: after [`Settings::attempts_max`] tries, each no longer than its time.
//! - The address is one that the operator wrote: redirects are not followed, and plain HTTP goes to
//!   this machine only.
//! - The secret is read where it is kept for each try, and is in no log, error or debug output, even
//!   when the receiver says it back.

use std::time::Duration;

use reqwest::header::{HeaderMap, LOCATION, RETRY_AFTER};
use reqwest::{Client, RequestBuilder, StatusCode};
use tokio::time::sleep;
use url::{Host, Url};

use crate::secret::{Secret, SecretError};

#[cfg(test)]
pub(crate) mod recorder;
mod signature;

pub use signature::{Key, KeyError};

/// Longest wait between two tries, whatever the receiver asks for.
pub const BACKOFF_MAX: Duration = Duration::from_secs(60);
/// Bytes of an answer that are read for what it says.
const ANSWER_BYTES_MAX: usize = 4096;
/// Characters of what an answer says that are kept.
const SAID_MAX: usize = 200;
/// What stands where a receiver says the secret back.
const HIDDEN: &str = "(secret)";

/// How hard it is tried.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Longest wait for an answer, connecting included.
    pub timeout: Duration,
    /// Tries of one delivery, the first included.
    pub attempts_max: u32,
    /// First wait before another try; each further one is twice as long, up to a minute.
    pub backoff: Duration,
}

/// How a delivery ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// 2xx, and where it says that what it made is.
    Yes(Option<String>),
    /// A 4xx that stands, and what was said.
    No(String),
    /// Tried as often as may be.
    None(String),
}

/// Speaks to one receiver.
#[derive(Debug)]
pub struct Sender {
    client: Client,
    settings: Settings,
}

/// Why there is nothing to be sent.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("the secret {0}")]
    Key(#[from] KeyError),
}

/// What came of one try.
enum Attempt {
    Yes(Option<String>),
    No(String),
    /// Why not yet, and how long the receiver asks to wait.
    Again(String, Option<Duration>),
}

/// Reads a receiver's address.
///
/// # Errors
/// What is wrong with it.
pub fn parse_url(text: &str) -> Result<Url, String> {
    let url: Url = text.parse().map_err(|error| format!("'{text}' is no URL: {error}"))?;
    match url.scheme() {
        "https" => {}
        "http" if is_near(&url) => {}
        "http" => return Err("expected https; plain http only goes to this machine".to_owned()),
        other => return Err(format!("expected https, got '{other}'")),
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("holds a name or password, which belong into a secret".to_owned());
    }
    Ok(url)
}

fn is_near(url: &Url) -> bool {
    match url.host() {
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        Some(Host::Domain(name)) => name == "localhost",
        None => false,
    }
}

/// Signs as Standard Webhooks has it, at this moment.
pub fn signed(request: RequestBuilder, key: &Key, id: &str, body: Vec<u8>) -> RequestBuilder {
    let timestamp = jiff::Timestamp::now().as_second().to_string();
    let signature = key.sign(id, &timestamp, &body);
    let request = request.header("webhook-id", id).header("webhook-timestamp", timestamp);
    request.header("webhook-signature", signature).body(body)
}

impl Sender {
    /// # Errors
    /// When no client can be made.
    pub fn new(url: &Url, settings: Settings) -> Result<Self, reqwest::Error> {
        // Whoever comes first installs it; it is the same for all.
        drop(rustls::crypto::ring::default_provider().install_default());
        let mut client = Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .timeout(settings.timeout)
            .connect_timeout(settings.timeout)
            .user_agent(concat!("tidegate/", env!("CARGO_PKG_VERSION")));
        if url.scheme() == "http" {
            // To this machine, and not through a proxy on the way there.
            client = client.no_proxy();
        }
        Ok(Self { client: client.build()?, settings })
    }

    /// Sends what `request` makes, with the secret in it, until it is answered or was tried often
    /// enough. `id` is for the log.
    pub async fn deliver(
        &self,
        id: &str,
        request: impl Fn(&Client) -> Result<(RequestBuilder, Secret), RequestError>,
    ) -> Answer {
        self.tried(id, self.settings.attempts_max, request).await
    }

    /// The same, tried once.
    pub async fn deliver_once(
        &self,
        id: &str,
        request: impl Fn(&Client) -> Result<(RequestBuilder, Secret), RequestError>,
    ) -> Answer {
        self.tried(id, 1, request).await
    }

    async fn tried(
        &self,
        id: &str,
        attempts_max: u32,
        request: impl Fn(&Client) -> Result<(RequestBuilder, Secret), RequestError>,
    ) -> Answer {
        let mut wait = self.settings.backoff;
        let mut attempt = 1;
        loop {
            let tried = match request(&self.client) {
                Ok((request, secret)) => self.attempt(request, &secret).await,
                Err(error) => Attempt::Again(error.to_string(), None),
            };
            let (why, asked) = match tried {
                Attempt::Yes(made) => return Answer::Yes(made),
                Attempt::No(said) => {
                    tracing::warn!(id, said, "delivery refused");
                    return Answer::No(said);
                }
                Attempt::Again(why, asked) => (why, asked),
            };
            if attempt >= attempts_max {
                tracing::warn!(id, attempt, why, "delivery given up");
                return Answer::None(format!("no answer after {attempt} tries: {why}"));
            }
            tracing::debug!(id, attempt, why, "delivery to be tried again");
            sleep(asked.unwrap_or_else(|| jittered(wait)).min(BACKOFF_MAX)).await;
            wait = (wait * 2).min(BACKOFF_MAX);
            attempt += 1;
        }
    }

    async fn attempt(&self, request: RequestBuilder, secret: &Secret) -> Attempt {
        let response = match request.send().await {
            Ok(response) => response,
            // The address stays out of what is shown: its path may be a secret.
            Err(error) => return Attempt::Again(causes(&error.without_url()), None),
        };
        let status = response.status();
        if status.is_success() {
            let made = header(response.headers(), LOCATION.as_str());
            return Attempt::Yes(made.map(|made| shown(made, secret)));
        }
        let asked = header(response.headers(), RETRY_AFTER.as_str());
        if is_for_later(status, asked.is_some()) {
            let asked = asked.and_then(|text| text.trim().parse().ok()).map(Duration::from_secs);
            return Attempt::Again(format!("status {}", status.as_u16()), asked);
        }
        let said = said(response).await;
        let said = said.map_or_else(String::new, |said| format!(": {}", shown(&said, secret)));
        Attempt::No(format!("status {}{said}", status.as_u16()))
    }
}

/// GitHub tells who asks too often by a 403 that says when to come back.
fn is_for_later(status: StatusCode, says_when: bool) -> bool {
    let later = [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_EARLY, StatusCode::TOO_MANY_REQUESTS];
    !status.is_client_error()
        || later.contains(&status)
        || (status == StatusCode::FORBIDDEN && says_when)
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name).and_then(|value| value.to_str().ok())
}

/// Why it is refused, of an answer that is JSON and says so by one of the usual names.
async fn said(mut response: reqwest::Response) -> Option<String> {
    let mut body = Vec::new();
    while let Ok(Some(chunk)) = response.chunk().await {
        body.extend_from_slice(&chunk);
        if body.len() > ANSWER_BYTES_MAX {
            return None;
        }
    }
    let answer: serde_json::Value = serde_json::from_slice(&body).ok()?;
    let reason = ["reason", "message", "error"].iter().find_map(|name| answer.get(name)?.as_str());
    reason.map(ToOwned::to_owned)
}

/// What a receiver says goes to logs and terminals.
fn shown(said: &str, secret: &Secret) -> String {
    let said = said.replace(secret.expose(), HIDDEN);
    said.chars().filter(|char| !char.is_control()).take(SAID_MAX).collect()
}

/// An error with what is behind it: a client's own text says only that it could not send.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// Between half of it and all of it, so that gateways do not come back in step.
fn jittered(wait: Duration) -> Duration {
    let part = getrandom::u32().map_or(1.0, |random| f64::from(random) / f64::from(u32::MAX));
    wait.mul_f64(0.5 + part / 2.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_https_or_this_machine() {
        for good in [
            "https://ci.example/hooks",
            "https://10.0.0.1:8443/a?b=c",
            "http://127.0.0.1:9000/",
            "http://[::1]:9000/",
            "http://localhost/hooks",
        ] {
            assert!(parse_url(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "ci.example/hooks",
            "http://ci.example/hooks",
            "http://127.0.0.1.example/",
            "http://169.254.169.254/latest",
            "http://[::ffff:10.0.0.1]/",
            "http://0.0.0.0/",
            "file:///etc/passwd",
            "ftp://ci.example/",
            "https://user:secret@ci.example/",
            "https://",
        ] {
            assert!(parse_url(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn waits_differ_within_half_of_them() {
        for _ in 0..1000 {
            let wait = jittered(Duration::from_secs(2));
            assert!((1.0..=2.0).contains(&wait.as_secs_f64()), "{wait:?}");
        }
    }

    #[test]
    fn a_receiver_that_says_the_secret_back_is_not_believed() {
        let secret = Secret::new("hunter2hunter2hunter2");
        let said = shown("bad token hunter2hunter2hunter2\u{7}, sorry", &secret);
        assert_eq!(said, "bad token (secret), sorry");
        assert_eq!(shown(&"x".repeat(900), &secret).len(), SAID_MAX);
    }

    #[test]
    fn what_is_for_later_is_not_refused() {
        let of =
            |code: u16, says_when| is_for_later(StatusCode::from_u16(code).unwrap(), says_when);
        assert!([307, 408, 425, 429, 500, 503].iter().all(|code| of(*code, false)));
        assert!([400, 401, 403, 404, 409, 422].iter().all(|code| !of(*code, false)));
        assert!(of(403, true) && !of(404, true));
    }
}
