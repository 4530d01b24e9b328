//! `tidegate keys` as its user sees it: one token on standard output, exit codes, and a store that
//! another process has open.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::Value;
use tidegate::admit::{Action, AdmitError, Gatekeeper};
use tidegate::control::keys;
use tidegate::control::store::{EventOutcome, EventQuery, SqliteStore, Store};

fn tidegate(state: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tidegate"));
    command.arg("keys").args(args).arg("--state-dir").arg(state).output().unwrap()
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

fn create(state: &Path, args: &[&str]) -> String {
    let made = tidegate(state, &[&["create"], args].concat());
    assert_eq!(made.status.code(), Some(0), "{}", err(&made));
    let text = out(&made);
    let token = text.strip_suffix('\n').unwrap();
    assert!(token.len() == 63 && token.starts_with("tg_") && !token.contains('\n'), "{text}");
    assert!(!err(&made).contains(token), "on standard output alone");
    token.to_owned()
}

#[test]
fn a_key_is_made_listed_and_revoked_without_a_gateway() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let token = create(
        &state,
        &["--name", "ci", "--role", "predictor", "--models", "fraud-*", "--expires", "90"],
    );
    let listed = tidegate(&state, &["list"]);
    let text = out(&listed);
    let row = text.lines().nth(1).unwrap_or_else(|| panic!("{text}"));
    for part in [&token[..19], "ci", "predictor", "fraud-*", "live"] {
        assert!(row.contains(part), "{part}: {row}");
    }
    let json: Value = serde_json::from_str(&out(&tidegate(&state, &["list", "--json"]))).unwrap();
    assert_eq!(json[0]["state"], "live");
    assert_eq!(json[0]["grants"][0]["models"][0], "fraud-*");
    assert!(!json.to_string().contains(&token[20..]));
    for _ in 0..2 {
        let revoked = tidegate(&state, &["revoke", &token[..19], "--reason", "enough"]);
        assert_eq!(revoked.status.code(), Some(0), "{}", err(&revoked));
        assert!(revoked.stdout.is_empty());
    }
    assert!(out(&tidegate(&state, &["list"])).contains("revoked"));
    let journal = SqliteStore::open(&state).unwrap().events(&EventQuery::default()).unwrap();
    let done: Vec<_> = journal.iter().map(|event| event.action.as_str()).collect();
    assert_eq!(done, ["keys.create", "keys.revoke"]);
    assert!(journal.iter().all(|event| event.actor.starts_with("cli:")));
    assert_eq!(journal[1].reason.as_deref(), Some("enough"));
}

#[test]
fn wrong_usage_and_what_cannot_be_done_have_codes_of_their_own() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let cases: &[(&[&str], i32)] = &[
        (&["create", "--name", "ci"], 2),
        (&["create", "--role", "viewer"], 2),
        (&["create", "--name", "ci", "--role", "root"], 2),
        (&["create", "--name", "cli:root", "--role", "viewer"], 2),
        (&["create", "--name", "ci", "--role", "viewer", "--models", "["], 2),
        (&["create", "--name", "ci", "--role", "viewer", "--expires", "0"], 2),
        (&["revoke"], 2),
        (&["list"], 1),
        (&["revoke", "0123456789abcdef"], 1),
    ];
    for (args, code) in cases {
        let output = tidegate(&state, args);
        assert_eq!(output.status.code(), Some(*code), "{args:?}: {}", err(&output));
        assert!(output.stdout.is_empty() && !output.stderr.is_empty(), "{args:?}");
        assert!(!state.exists(), "{args:?} made a state");
    }
    create(&state, &["--name", "ci", "--role", "viewer"]);
    let output = tidegate(&state, &["revoke", "0123456789abcdef"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(err(&output).contains("there is no key '0123456789abcdef'"), "{}", err(&output));
    let store = SqliteStore::open(&state).unwrap();
    let last = store.events(&EventQuery { newest_first: true, limit: 1, ..EventQuery::default() });
    assert_eq!(last.unwrap()[0].outcome, EventOutcome::Refused);
    for command in ["create", "list", "revoke"] {
        let help = Command::new(env!("CARGO_BIN_EXE_tidegate"))
            .args(["keys", command, "--help"])
            .output()
            .unwrap();
        assert!(out(&help).contains("Example"), "{command}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_gateway_honours_a_revocation_within_five_seconds() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state");
    let token = create(&state, &["--name", "op", "--role", "admin"]);
    let store: Arc<dyn Store> = Arc::new(SqliteStore::open(&state).unwrap());
    let keeper = Arc::new(Gatekeeper::default());
    tokio::spawn(keys::watch_keys(Arc::clone(&store), Arc::clone(&keeper)));
    let value = format!("Bearer {token}");
    let until = async |expected: Option<AdmitError>| {
        let start = Instant::now();
        while keeper.identify(Some(&value)).err() != expected {
            assert!(start.elapsed() < Duration::from_secs(10), "{expected:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        start.elapsed()
    };
    until(None).await;
    assert!(keeper.identify(Some(&value)).unwrap().may(Action::ChangeKeys, None));
    let revoked = tidegate(&state, &["revoke", &token[3..19]]);
    assert_eq!(revoked.status.code(), Some(0), "{}", err(&revoked));
    let took = until(Some(AdmitError::Revoked)).await;
    eprintln!("revoked by another process, refused {took:?} after it returned");
    assert!(took < Duration::from_secs(5), "{took:?}");
}
