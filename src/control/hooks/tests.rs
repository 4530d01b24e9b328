//! Against a receiver that checks signatures: a real HTTP server on loopback.

use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use serde_json::Value;
use sha2::Sha256;
use tokio::time::sleep;

use super::*;
use crate::control::rollout::machine_tests::{Sim, plan};
use crate::outbound::recorder::{Canned, Received, Recorder};

const SECRET: &[u8] = b"0123456789abcdef0123456789abcdef";

/// Checks what a receiver should check.
struct Receiver(Recorder);

impl Receiver {
    async fn start(answers: Vec<Canned>) -> Self {
        Self(Recorder::start(answers).await)
    }

    fn received(&self) -> Vec<Received> {
        let received = self.0.received();
        for one in &received {
            assert_eq!((&*one.method, &*one.path), ("POST", "/hooks?team=a"));
        }
        received
    }

    fn settings(&self, secret: &tempfile::NamedTempFile) -> Settings {
        std::fs::write(secret.path(), SECRET).unwrap();
        Settings {
            url: outbound::parse_url(&format!("http://{}/hooks?team=a", self.0.address)).unwrap(),
            secret: SecretRef::File(secret.path().to_owned()),
            outbound: outbound::Settings {
                timeout: Duration::from_millis(500),
                attempts_max: 3,
                backoff: Duration::from_millis(20),
            },
            queue_max: 4,
        }
    }
}

/// As a receiver does it, on its own.
fn signed(received: &Received) -> bool {
    let (id, timestamp) = (received.header("webhook-id"), received.header("webhook-timestamp"));
    let mut mac = Hmac::<Sha256>::new_from_slice(SECRET).unwrap();
    mac.update(format!("{id}.{timestamp}.").as_bytes());
    mac.update(&received.body);
    let signature = received.header("webhook-signature");
    let signature = signature.strip_prefix("v1,").and_then(|text| STANDARD.decode(text).ok());
    signature.is_some_and(|signature| mac.verify_slice(&signature).is_ok())
}

fn notice(kind: HookKind) -> Notice {
    let plan = plan(json!({"candidate": "2", "steps": [{"weight": 5}]}));
    let rollout = Arc::new(Sim::new(plan).rollout);
    let at = "2026-11-25T12:00:00Z".parse().unwrap();
    Notice { id: format!("{}-{kind}-1", rollout.id), kind, at, rollout }
}

fn status(code: u16) -> Canned {
    (code, None, "")
}

fn outcomes(hooks: &Hooks) -> Vec<(String, f64)> {
    let text = crate::observe::page::text(&hooks.families());
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.ends_with(" 0"));
    let pairs = lines.map(|line| line.rsplit_once(' ').unwrap());
    pairs.map(|(series, value)| (series.to_owned(), value.parse().unwrap())).collect()
}

#[tokio::test]
async fn what_is_told_is_a_signed_cloudevent() {
    let receiver = Receiver::start(vec![status(204)]).await;
    let secret = tempfile::NamedTempFile::new().unwrap();
    let (hooks, courier) = Hooks::new(receiver.settings(&secret)).unwrap();
    let told = notice(HookKind::Step);
    hooks.tell(told.clone());
    let shown = hooks.clone();
    drop(hooks);
    tokio::time::timeout(Duration::from_secs(5), async {
        tokio::spawn(courier.run());
        while receiver.received().is_empty() {
            sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    let got = receiver.received().remove(0);
    let sent: i64 = got.header("webhook-timestamp").parse().unwrap();
    assert!(signed(&got) && (got.at.as_second() - sent).abs() <= 5, "{got:?}");
    assert_eq!(got.header("webhook-id"), told.id);
    assert_eq!(got.header("content-type"), "application/cloudevents+json; charset=utf-8");
    let event: Value = serde_json::from_slice(&got.body).unwrap();
    assert_eq!(event["specversion"], "1.0");
    assert_eq!(event["id"], told.id);
    assert_eq!(event["type"], "dev.tidegate.rollout.step");
    assert_eq!(event["subject"], format!("models/m/rollouts/{}", told.rollout.id));
    assert_eq!(event["time"], "2026-11-25T12:00:00Z");
    assert_eq!(event["data"]["candidate"], "2");
    assert_eq!(event["data"]["state"], "step");
    assert_eq!(event["data"]["weight"], 5.0);
    while outcomes(&shown).is_empty() {
        sleep(Duration::from_millis(5)).await;
    }
    let series = "tidegate_hook_deliveries_total{kind=\"step\",outcome=\"delivered\"}";
    assert_eq!(outcomes(&shown), [(series.to_owned(), 1.0)]);
}

#[tokio::test]
async fn an_answer_is_go_no_or_asked_for_again() {
    let reason = (409, None, "{\"reason\": \"change\\u0007 freeze\"}");
    let cases: Vec<(&str, Vec<Canned>, HookAnswer, usize)> = vec![
        ("go", vec![status(200)], HookAnswer::Go, 1),
        ("accepted", vec![status(202)], HookAnswer::Go, 1),
        ("no", vec![reason], HookAnswer::No("status 409: change freeze".into()), 1),
        ("no, without a word", vec![status(404)], HookAnswer::No("status 404".into()), 1),
        ("no, at length", vec![(403, None, LONG)], HookAnswer::No("status 403".into()), 1),
        ("go at last", vec![status(500), status(429), status(200)], HookAnswer::Go, 3),
        (
            "never",
            vec![status(503)],
            HookAnswer::None("no answer after 3 tries: status 503".into()),
            3,
        ),
    ];
    for (name, answers, want, tries) in cases {
        let receiver = Receiver::start(answers).await;
        let secret = tempfile::NamedTempFile::new().unwrap();
        let (hooks, _courier) = Hooks::new(receiver.settings(&secret)).unwrap();
        let asked = notice(HookKind::ConfirmPromotion);
        assert_eq!(hooks.ask(asked.clone()).await, want, "{name}");
        let received = receiver.received();
        assert_eq!(received.len(), tries, "{name}");
        // One delivery, however often it is tried.
        assert!(
            received.iter().all(|one| signed(one) && one.header("webhook-id") == asked.id),
            "{name}"
        );
        assert!(received.iter().all(|one| one.body == received[0].body), "{name}");
    }
}

static LONG: &str = {
    const BYTES: [u8; 9000] = [b' '; 9000];
    match std::str::from_utf8(&BYTES) {
        Ok(text) => text,
        Err(_) => "",
    }
};

#[tokio::test]
async fn redirects_are_not_followed_and_silence_has_an_end() {
    let elsewhere = Receiver::start(vec![status(200)]).await;
    let location = format!("http://{}/hooks?team=a", elsewhere.0.address);
    let away = (307, Some(("location", location)), "");
    let secret = tempfile::NamedTempFile::new().unwrap();
    let receiver = Receiver::start(vec![away]).await;
    let (hooks, _courier) = Hooks::new(receiver.settings(&secret)).unwrap();
    let answer = hooks.ask(notice(HookKind::ConfirmRollout)).await;
    assert!(matches!(answer, HookAnswer::None(why) if why.contains("status 307")));
    assert!(elsewhere.received().is_empty());
    let silent = Receiver::start(vec![status(0)]).await;
    let mut settings = silent.settings(&secret);
    settings.outbound.attempts_max = 2;
    let (hooks, _courier) = Hooks::new(settings).unwrap();
    let began = Instant::now();
    let answer = hooks.ask(notice(HookKind::ConfirmRollout)).await;
    let HookAnswer::None(why) = answer else { panic!("{answer:?}") };
    assert!(!why.contains("127.0.0.1"), "{why}");
    assert!((900..5_000).contains(&began.elapsed().as_millis()), "{:?}", began.elapsed());
}

#[tokio::test]
async fn the_receiver_says_how_long_to_wait_within_limits() {
    let later = (503, Some(("retry-after", "1".to_owned())), "");
    let receiver = Receiver::start(vec![later, status(200)]).await;
    let secret = tempfile::NamedTempFile::new().unwrap();
    let (hooks, _courier) = Hooks::new(receiver.settings(&secret)).unwrap();
    let began = Instant::now();
    assert_eq!(hooks.ask(notice(HookKind::ConfirmRollout)).await, HookAnswer::Go);
    assert!(began.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn who_is_told_holds_up_nobody() {
    let silent = Receiver::start(vec![status(0)]).await;
    let secret = tempfile::NamedTempFile::new().unwrap();
    let (hooks, courier) = Hooks::new(silent.settings(&secret)).unwrap();
    let courier = tokio::spawn(courier.run());
    let began = Instant::now();
    for _ in 0..20 {
        hooks.tell(notice(HookKind::Step));
    }
    assert!(began.elapsed() < Duration::from_millis(400), "{:?}", began.elapsed());
    let dropped = outcomes(&hooks).iter().map(|(_, count)| *count).sum::<f64>();
    // Four wait; one may be on its way.
    assert!((15.0..=16.0).contains(&dropped), "{dropped}");
    courier.abort();
}

#[tokio::test]
async fn the_secret_is_read_anew_for_each_try() {
    let receiver = Receiver::start(vec![status(200)]).await;
    let secret = tempfile::NamedTempFile::new().unwrap();
    let (hooks, _courier) = Hooks::new(receiver.settings(&secret)).unwrap();
    std::fs::write(secret.path(), b"another secret of some length").unwrap();
    assert_eq!(hooks.ask(notice(HookKind::ConfirmRollout)).await, HookAnswer::Go);
    assert!(!signed(&receiver.received()[0]), "signed with what was there before");
    std::fs::write(secret.path(), SECRET).unwrap();
    assert_eq!(hooks.ask(notice(HookKind::ConfirmRollout)).await, HookAnswer::Go);
    assert!(signed(&receiver.received()[1]));
    // Gone: not sent unsigned.
    std::fs::remove_file(secret.path()).unwrap();
    let answer = hooks.ask(notice(HookKind::ConfirmRollout)).await;
    assert!(matches!(answer, HookAnswer::None(_)), "{answer:?}");
    assert_eq!(receiver.received().len(), 2);
    assert!(Hooks::new(receiver.settings(&tempfile::NamedTempFile::new().unwrap())).is_ok());
    let missing = SecretRef::File("/nonexistent/secret".into());
    let settings =
        Settings { secret: missing, ..receiver.settings(&tempfile::NamedTempFile::new().unwrap()) };
    assert!(matches!(Hooks::new(settings), Err(HookError::Request(RequestError::Secret(_)))));
}
