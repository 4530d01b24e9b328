//! Each kind's call, as it arrives at a server on this machine that writes down what it gets.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;

use super::*;
use crate::control::alerts::board::tests::{held, receiver, subject};
use crate::control::alerts::board::{Board, Change, Look, Times};
use crate::control::alerts::condition::{Detail, FEATURES_MAX, FeatureDetail, Found};
use crate::control::alerts::tests::{SECRET, secret_file};
use crate::outbound::recorder::{Received, Recorder};
use crate::outbound::{Answer, Sender, Settings};

/// An alert that has fired.
fn fired(found: Found) -> Alert {
    let now: Timestamp = "2026-11-26T12:00:00Z".parse().unwrap();
    let times = Times { for_: Duration::ZERO, keep_firing_for: Duration::ZERO };
    let look = Look { times, now, started: now, room: 1 };
    let found = BTreeMap::from([(subject(Kind::Drift, "inputs"), found)]);
    let seen = Board::default().look(&"loans".parse().unwrap(), &found, &[], &look);
    match seen.changes.into_iter().next() {
        Some(Change::Fired(alert)) => alert,
        other => panic!("{other:?}"),
    }
}

/// What arrives when a receiver of this kind is told.
async fn told(alert: &Alert, answer: u16, target: impl Fn(&str) -> Target) -> (Received, Answer) {
    let recorder = Recorder::start(vec![(answer, None, "")]).await;
    let (secret, _kept) = secret_file();
    let one = Receiver {
        target: target(&recorder.url()),
        secret,
        ..receiver("ops", "https://ops.example/")
    };
    let settings =
        Settings { timeout: Duration::from_secs(5), attempts_max: 1, backoff: Duration::ZERO };
    let sender = Sender::new(one.target.url(), settings).unwrap();
    let event = Event::of(alert, Phase::Firing, 1);
    let answer = sender.deliver(&event.id, |client| one.request(client, &event)).await;
    (recorder.received().remove(0), answer)
}

fn url(text: &str) -> Url {
    outbound::parse_url(text).unwrap()
}

fn form(received: &Received) -> BTreeMap<String, String> {
    assert_eq!(received.header("content-type"), "application/x-www-form-urlencoded");
    url::form_urlencoded::parse(&received.body).into_owned().collect()
}

#[tokio::test]
async fn a_cloudevent_is_signed_as_standard_webhooks_are() {
    let alert = fired(held());
    let (got, answer) =
        told(&alert, 202, |base| Target::CloudEvents { url: url(&format!("{base}in?team=a")) })
            .await;
    assert_eq!(answer, Answer::Yes(None));
    assert_eq!((&*got.method, &*got.path), ("POST", "/in?team=a"));
    assert_eq!(got.header("content-type"), "application/cloudevents+json; charset=utf-8");
    // As a receiver does it, on its own.
    let id = got.header("webhook-id");
    let mut mac = Hmac::<Sha256>::new_from_slice(SECRET.as_bytes()).unwrap();
    mac.update(format!("{id}.{}.", got.header("webhook-timestamp")).as_bytes());
    mac.update(&got.body);
    let signature = got.header("webhook-signature");
    let signature = STANDARD.decode(signature.strip_prefix("v1,").unwrap()).unwrap();
    mac.verify_slice(&signature).unwrap();
    let age = jiff::Timestamp::now().as_second()
        - got.header("webhook-timestamp").parse::<i64>().unwrap();
    assert!(age.abs() < 60, "{age}");
    let event: Value = serde_json::from_slice(&got.body).unwrap();
    assert_eq!(event["specversion"], "1.0");
    assert_eq!((&event["id"], &*id), (&json!(id), &*format!("{}-firing-1", alert.id)));
    assert_eq!(event["type"], "dev.tidegate.alert.firing");
    assert_eq!(event["subject"], format!("models/loans/versions/2/alerts/{}", alert.id));
    assert_eq!(
        (&event["time"], &event["source"]),
        (&json!("2026-11-26T12:00:00Z"), &json!("/tidegate"))
    );
    let data = &event["data"];
    for (name, want) in [
        ("state", "firing"),
        ("model", "loans"),
        ("version", "2"),
        ("arm", "stable"),
        ("kind", "drift"),
        ("about", "inputs"),
        ("severity", "warning"),
    ] {
        assert_eq!(data[name], want, "{name}");
    }
    let feature = &data["detail"]["features"][0];
    assert_eq!(
        (&feature["feature"], &feature["scores"]["cell_psi"]),
        (&json!("income"), &json!(0.4))
    );
    assert_eq!((&feature["limits"]["cell_psi"], &feature["p_value"]), (&json!(0.1), &json!(1e-9)));
}

#[tokio::test]
async fn github_gets_a_repository_dispatch() {
    let (got, answer) = told(&fired(held()), 204, |base| Target::GitHub {
        api: url(&format!("{base}api/v3")),
        owner: "acme".to_owned(),
        repository: "models".to_owned(),
        event_type: "retrain".to_owned(),
    })
    .await;
    assert_eq!(answer, Answer::Yes(None));
    assert_eq!((&*got.method, &*got.path), ("POST", "/api/v3/repos/acme/models/dispatches"));
    assert_eq!(got.header("accept"), "application/vnd.github+json");
    assert_eq!(got.header("x-github-api-version"), "2022-11-28");
    assert_eq!(got.header("authorization"), format!("Bearer {SECRET}"));
    assert!(got.header("user-agent").starts_with("tidegate/"), "GitHub refuses calls without one");
    let body: Value = serde_json::from_slice(&got.body).unwrap();
    let names: Vec<&str> = body.as_object().unwrap().keys().map(String::as_str).collect();
    assert_eq!(
        (names, &body["event_type"]),
        (vec!["client_payload", "event_type"], &json!("retrain"))
    );
    let payload = body["client_payload"].as_object().unwrap();
    assert!(payload.len() <= 10, "{payload:?}");
    assert_eq!((&payload["model"], &payload["version"]), (&json!("loans"), &json!("2")));
    assert_eq!(payload["detail"]["features"][0]["feature"], "income");
}

#[tokio::test]
async fn gitlab_gets_a_trigger_with_variables() {
    let (got, answer) = told(&fired(held()), 201, |base| Target::GitLab {
        url: url(base),
        project: "ml group/loans".to_owned(),
        branch: "main".to_owned(),
        parameters: usual_parameters(),
    })
    .await;
    assert_eq!(answer, Answer::Yes(None));
    let path = "/api/v4/projects/ml%20group%2Floans/trigger/pipeline";
    assert_eq!((&*got.method, &*got.path), ("POST", path));
    let form = form(&got);
    assert_eq!((&*form["token"], &*form["ref"]), (SECRET, "main"));
    assert_eq!(form["variables[TIDEGATE_MODEL]"], "loans");
    assert_eq!(form["variables[TIDEGATE_FEATURES]"], "income");
    assert_eq!(form.len(), 2 + PLACEHOLDERS.len());
    assert_eq!(got.header("authorization"), "");
}

#[tokio::test]
async fn jenkins_gets_a_build_with_parameters_and_says_where_it_is() {
    let alert = fired(held());
    let recorder =
        Recorder::start(vec![(201, Some(("location", "https://ci/queue/item/7/".to_owned())), "")])
            .await;
    let (secret, _kept) = secret_file();
    let target = Target::Jenkins {
        job: url(&format!("{}job/ml/job/train/", recorder.url())),
        user: "tidegate".to_owned(),
        parameters: Parameters::from([
            ("WHAT".to_owned(), "{model}@{version} {nothing} {".to_owned()),
            ("BRANCH".to_owned(), "main".to_owned()),
        ]),
    };
    let one = Receiver { target, secret, ..receiver("ops", "https://ops.example/") };
    let settings =
        Settings { timeout: Duration::from_secs(5), attempts_max: 1, backoff: Duration::ZERO };
    let sender = Sender::new(one.target.url(), settings).unwrap();
    let event = Event::of(&alert, Phase::Firing, 1);
    let answer = sender.deliver(&event.id, |client| one.request(client, &event)).await;
    assert_eq!(answer, Answer::Yes(Some("https://ci/queue/item/7/".to_owned())));
    let got = recorder.received().remove(0);
    assert_eq!((&*got.method, &*got.path), ("POST", "/job/ml/job/train/buildWithParameters"));
    let basic = STANDARD.encode(format!("tidegate:{SECRET}"));
    assert_eq!(got.header("authorization"), format!("Basic {basic}"));
    let form = form(&got);
    assert_eq!((&*form["WHAT"], &*form["BRANCH"]), ("loans@2 {nothing} {", "main"));
}

#[tokio::test]
async fn kubeflow_gets_a_run_of_a_pipeline() {
    let alert = fired(held());
    let target = |version: Option<&str>, experiment: Option<&str>| {
        let (version, experiment) =
            (version.map(ToOwned::to_owned), experiment.map(ToOwned::to_owned));
        move |base: &str| Target::Kubeflow {
            url: url(&format!("{base}pipeline")),
            pipeline: "p-1".to_owned(),
            pipeline_version: version.clone(),
            experiment: experiment.clone(),
            parameters: Parameters::from([("model".to_owned(), "{model}".to_owned())]),
        }
    };
    let (got, answer) = told(&alert, 200, target(Some("v-2"), Some("e-3"))).await;
    assert_eq!(answer, Answer::Yes(None));
    assert_eq!((&*got.method, &*got.path), ("POST", "/pipeline/apis/v2beta1/runs"));
    assert_eq!(got.header("authorization"), format!("Bearer {SECRET}"));
    assert_eq!(got.header("content-type"), "application/json");
    let body: Value = serde_json::from_slice(&got.body).unwrap();
    assert_eq!(body["display_name"], format!("tidegate loans 2 {}-firing-1", alert.id));
    let reference = json!({"pipeline_id": "p-1", "pipeline_version_id": "v-2"});
    assert_eq!(body["pipeline_version_reference"], reference);
    assert_eq!(body["runtime_config"], json!({"parameters": {"model": "loans"}}));
    assert_eq!(body["experiment_id"], "e-3");
    let (got, _) = told(&alert, 200, target(None, None)).await;
    let body: Value = serde_json::from_slice(&got.body).unwrap();
    assert_eq!(body["pipeline_version_reference"], json!({"pipeline_id": "p-1"}));
    assert_eq!(body.get("experiment_id"), None);
}

#[tokio::test]
async fn bodies_are_bounded_whatever_features_are_called() {
    let long = FeatureDetail {
        feature: "\u{1}".repeat(128),
        tensor: "\u{1}".repeat(128),
        scores: BTreeMap::from([("cell_psi".to_owned(), 0.123_456_789_012_345)]),
        limits: BTreeMap::from([("cell_psi".to_owned(), 0.123_456_789_012_345)]),
        ..FeatureDetail::default()
    };
    let detail =
        Detail { features: vec![long; FEATURES_MAX], features_beyond: 4096, ..Detail::default() };
    let alert = fired(Found::Holds(Box::new(detail)));
    let targets: [fn(&str) -> Target; 3] = [
        |base| Target::CloudEvents { url: url(base) },
        |base| Target::GitHub {
            api: url(base),
            owner: "a".into(),
            repository: "b".into(),
            event_type: "c".into(),
        },
        |base| Target::Jenkins { job: url(base), user: "u".into(), parameters: usual_parameters() },
    ];
    for target in targets {
        let (got, _) = told(&alert, 200, target).await;
        // GitHub takes 64 KiB.
        assert!(got.body.len() < 64 << 10, "{}", got.body.len());
    }
}
