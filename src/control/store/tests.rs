use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::sync::{Arc, Barrier};

use proptest::prelude::*;
use serde_json::json;

use super::*;

fn put(name: &str, body: Value, expect: Expect) -> Put {
    Put { kind: Kind::Traffic, name: name.to_owned(), body: Some(body), expect }
}

fn gone(name: &str, expect: Expect) -> Put {
    Put { kind: Kind::Traffic, name: name.to_owned(), body: None, expect }
}

fn event(action: &str) -> NewEvent {
    NewEvent { actor: "test".to_owned(), action: action.to_owned(), ..NewEvent::default() }
}

fn all(store: &dyn Store) -> Vec<Event> {
    store.events(&EventQuery::default()).unwrap()
}

#[test]
fn what_was_committed_is_there_with_its_events() {
    let store = SqliteStore::in_memory().unwrap();
    assert_eq!(store.head().unwrap(), 0);
    let asked = NewEvent {
        model: Some("iris".parse().unwrap()),
        subject: "iris".to_owned(),
        before: Some(json!(null)),
        after: Some(json!({"weights": {"1": 100}})),
        reason: Some("first".to_owned()),
        request_id: Some("r-1".to_owned()),
        detail: Some("because\0\u{202e}\n".to_owned()),
        outcome: EventOutcome::Refused,
        ..event("traffic.put")
    };
    let body = json!({"weights": {"1": 100}});
    let puts = [put("iris", body.clone(), Expect::Absent), put("risk", body.clone(), Expect::Any)];
    let done = store.commit(&puts, &[asked.clone(), event("other")]).unwrap();
    let revisions: Vec<_> = done.documents.iter().map(|made| (made.revision, made.seq)).collect();
    assert_eq!(revisions, [(1, 2), (1, 2)]);
    assert_eq!(done.events.iter().map(|event| event.seq).collect::<Vec<_>>(), [1, 2]);
    assert_eq!(store.document(Kind::Traffic, "iris").unwrap(), Some(done.documents[0].clone()));
    assert_eq!(store.documents(Kind::Traffic).unwrap(), done.documents);
    assert_eq!(store.document(Kind::Labels, "iris").unwrap(), None);
    assert_eq!(all(&store), done.events);
    let kept = &done.events[0];
    assert_eq!((&kept.detail, &kept.model), (&asked.detail, &asked.model));
    assert_eq!((kept.outcome, kept.cut), (EventOutcome::Refused, false));
    assert_eq!(kept.gateway, store.gateway());
    assert_eq!(store.head().unwrap(), 2);
    assert_eq!(store.commit(&[], &[]).unwrap(), Committed::default());
    assert_eq!(store.head().unwrap(), 2);
    store.commit(&puts[1..], &[]).unwrap();
    assert_eq!(store.head().unwrap(), 3, "a change without a word of it moves the cursor too");
}

#[test]
fn a_stale_put_leaves_everything_as_it_was() {
    let store = SqliteStore::in_memory().unwrap();
    store.commit(&[put("a", json!(1), Expect::Absent)], &[event("first")]).unwrap();
    // (expectation of `a`, what is said to be there)
    let cases =
        [(Expect::Absent, Some(1)), (Expect::Revision(0), Some(1)), (Expect::Revision(2), Some(1))];
    for (expect, there) in cases {
        let puts = [put("b", json!(1), Expect::Any), put("a", json!(2), expect)];
        match store.commit(&puts, &[event("lost")]).unwrap_err() {
            StoreError::Stale { kind, name, expected, current } => {
                assert_eq!((kind, name.as_str()), (Kind::Traffic, "a"));
                assert_eq!((expected, current), (expect, there));
            }
            other => panic!("{other}"),
        }
    }
    let missing = store.commit(&[put("c", json!(1), Expect::Revision(1))], &[]).unwrap_err();
    assert_eq!(missing.to_string(), "traffic 'c' was expected to be revision 1, and is not there");
    assert_eq!(store.documents(Kind::Traffic).unwrap().len(), 1);
    assert_eq!((all(&store).len(), store.head().unwrap()), (1, 1));
}

#[test]
fn a_revision_is_never_used_twice() {
    let store = SqliteStore::in_memory().unwrap();
    let one = |put: Put| store.commit(&[put], &[]).map(|done| done.documents[0].revision);
    assert_eq!(one(put("a", json!(1), Expect::Absent)).unwrap(), 1);
    assert_eq!(one(put("a", json!(2), Expect::Revision(1))).unwrap(), 2);
    assert_eq!(one(gone("a", Expect::Revision(2))).unwrap(), 3);
    assert_eq!(store.document(Kind::Traffic, "a").unwrap(), None);
    assert!(one(put("a", json!(1), Expect::Revision(3))).is_err(), "what is gone has no revision");
    assert_eq!(one(gone("a", Expect::Any)).unwrap(), 3, "gone already");
    assert!(one(gone("a", Expect::Revision(3))).is_err());
    assert_eq!(one(put("a", json!(1), Expect::Absent)).unwrap(), 4);
}

#[test]
fn what_is_too_large_or_unclear_is_refused_whole() {
    let store = SqliteStore::in_memory().unwrap();
    let large = json!("x".repeat(BODY_BYTES_MAX));
    let refused = |puts: &[Put]| store.commit(puts, &[event("no")]).unwrap_err().to_string();
    let said = refused(&[put("a", json!(1), Expect::Any), put("b", large, Expect::Any)]);
    assert_eq!(said, "traffic 'b' has 1048578 bytes, the limit is 1048576");
    let twice = [put("a", json!(1), Expect::Any), put("a", json!(2), Expect::Any)];
    assert!(refused(&twice).contains("twice"));
    for name in ["", "a\nb", &"x".repeat(NAME_BYTES_MAX + 1)] {
        assert!(refused(&[put(name, json!(1), Expect::Any)]).contains("name"), "{name:?}");
    }
    assert!(refused(&[put("a", json!(null), Expect::Any)]).contains("null"));
    let many: Vec<NewEvent> = (0..=COMMIT_ITEMS_MAX).map(|_| event("x")).collect();
    assert!(store.commit(&[], &many).is_err());
    assert_eq!((all(&store).len(), store.documents(Kind::Traffic).unwrap().len()), (0, 0));
    let fits = json!("x".repeat(BODY_BYTES_MAX - 2));
    store.commit(&[put("b", fits, Expect::Any)], &[]).unwrap();
}

#[test]
fn long_texts_are_cut_and_say_so() {
    let store = SqliteStore::in_memory().unwrap();
    let long = NewEvent {
        // Two bytes each: the limits do not fall between characters.
        actor: "é".repeat(ACTOR_BYTES_MAX),
        subject: "s".repeat(SUBJECT_BYTES_MAX + 1),
        reason: Some(format!("a{}", "é".repeat(TEXT_BYTES_MAX))),
        request_id: Some("r".repeat(1 << 20)),
        before: Some(json!("b".repeat(STATE_BYTES_MAX))),
        after: Some(json!({"small": true})),
        ..event("long")
    };
    let made = store.commit(&[], &[long, event("short")]).unwrap().events;
    assert_eq!(all(&store), made, "the answer says what was kept");
    assert_eq!((made[0].cut, made[1].cut), (true, false));
    assert_eq!(made[0].actor.len(), ACTOR_BYTES_MAX);
    assert_eq!(made[0].subject.len(), SUBJECT_BYTES_MAX);
    assert_eq!(made[0].reason.as_ref().map(String::len), Some(TEXT_BYTES_MAX - 1));
    assert_eq!(made[0].request_id.as_ref().map(String::len), Some(REQUEST_ID_BYTES_MAX));
    assert_eq!(made[0].after, Some(json!({"small": true})));
    let instead = &made[0].before.as_ref().unwrap()["cut"];
    assert_eq!(instead["bytes"], STATE_BYTES_MAX + 2);
    assert!(instead["digest"].as_str().unwrap().starts_with("sha256:"));
}

#[test]
fn the_journal_is_asked_by_cursor_model_and_action() {
    let store = SqliteStore::in_memory().unwrap();
    for at in 0..30_u32 {
        let model = if at % 3 == 0 { "iris" } else { "risk" };
        let action = if at % 2 == 0 { "traffic.put" } else { "rollout.start" };
        let model = Some(model.parse().unwrap());
        store.commit(&[], &[NewEvent { model, ..event(action) }]).unwrap();
    }
    store.commit(&[], &[event("keys.create")]).unwrap();
    let seqs = |query: EventQuery| -> Vec<u64> {
        store.events(&query).unwrap().iter().map(|event| event.seq).collect()
    };
    let query = EventQuery::default;
    assert_eq!(seqs(query()), (1..=31).collect::<Vec<_>>());
    assert_eq!(seqs(EventQuery { after: Some(28), ..query() }), [29, 30, 31]);
    assert_eq!(seqs(EventQuery { before: Some(3), ..query() }), [1, 2]);
    assert_eq!(seqs(EventQuery { newest_first: true, limit: 2, ..query() }), [31, 30]);
    let older = EventQuery { newest_first: true, limit: 2, before: Some(30), ..query() };
    assert_eq!(seqs(older), [29, 28]);
    let iris = Some("iris".parse().unwrap());
    let of_iris = EventQuery { model: iris.clone(), after: Some(20), ..query() };
    assert_eq!(seqs(of_iris), [22, 25, 28]);
    let both = EventQuery { model: iris, action: Some("rollout.".to_owned()), limit: 2, ..query() };
    assert_eq!(seqs(both), [4, 10]);
    assert_eq!(seqs(EventQuery { action: Some("keys".to_owned()), ..query() }), [31]);
    assert_eq!(seqs(EventQuery { action: Some("%".to_owned()), ..query() }), [0; 0]);
    assert_eq!(seqs(EventQuery { limit: 0, ..query() }), [0; 0]);
    let many: Vec<NewEvent> = (0..COMMIT_ITEMS_MAX).map(|_| event("x")).collect();
    store.commit(&[], &many).unwrap();
    assert_eq!(seqs(EventQuery { limit: usize::MAX, ..query() }).len(), EVENTS_MAX);
}

#[test]
fn the_journal_cannot_be_rewritten() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(folder.path()).unwrap();
    store.commit(&[], &[event("first")]).unwrap();
    let other = rusqlite::Connection::open(state_file(folder.path())).unwrap();
    for sql in ["DELETE FROM events", "UPDATE events SET actor = 'me'"] {
        let refused = other.execute(sql, []).unwrap_err().to_string();
        assert!(refused.contains("the journal keeps every row"), "{refused}");
    }
}

#[test]
fn it_is_written_through_to_the_disk_and_private() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("a/state");
    let store = SqliteStore::open(&state).unwrap();
    store.commit(&[put("a", json!(1), Expect::Any)], &[]).unwrap();
    for name in ["state.db", "state.db-wal", "state.db-shm"] {
        let mode = fs::metadata(state.join(name)).unwrap().mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    assert_eq!(fs::metadata(&state).unwrap().mode() & 0o777, 0o700);
    let settings = store.settings();
    assert_eq!(settings, ("wal".to_owned(), 2), "2 is FULL: every commit is synced");
    drop(store);
    // Made readable by somebody's copy; made right again.
    fs::set_permissions(state_file(&state), fs::Permissions::from_mode(0o644)).unwrap();
    drop(SqliteStore::open(&state).unwrap());
    assert_eq!(fs::metadata(state_file(&state)).unwrap().mode() & 0o777, 0o600);
}

#[test]
fn two_that_share_a_file_see_each_other() {
    let folder = tempfile::tempdir().unwrap();
    let here = SqliteStore::open(folder.path()).unwrap();
    let there = SqliteStore::open(folder.path()).unwrap();
    assert_eq!(here.gateway(), there.gateway());
    assert!(!here.changed_elsewhere().unwrap());
    here.commit(&[put("a", json!(1), Expect::Any)], &[]).unwrap();
    assert!(!here.changed_elsewhere().unwrap(), "one's own changes are no news");
    assert!(there.changed_elsewhere().unwrap());
    assert!(!there.changed_elsewhere().unwrap(), "told once");
    assert_eq!(there.document(Kind::Traffic, "a").unwrap().unwrap().revision, 1);
    there.commit(&[put("a", json!(2), Expect::Revision(1))], &[event("x")]).unwrap();
    assert!(here.changed_elsewhere().unwrap());
    assert_eq!((here.head().unwrap(), there.head().unwrap()), (2, 2));
    assert!(here.commit(&[put("a", json!(3), Expect::Revision(1))], &[]).is_err());
}

#[test]
fn writers_at_once_lose_nothing() {
    const WRITERS: u64 = 4;
    const EACH: u64 = 25;
    let folder = tempfile::tempdir().unwrap();
    let start = Arc::new(Barrier::new(usize::try_from(WRITERS).unwrap()));
    let writers = (0..WRITERS).map(|_| {
        let (path, start) = (folder.path().to_owned(), Arc::clone(&start));
        std::thread::spawn(move || {
            start.wait();
            // They also make the file together.
            let store = SqliteStore::open(&path).unwrap();
            let mut stale = 0_u64;
            for _ in 0..EACH {
                loop {
                    let now = store.document(Kind::Traffic, "count").unwrap();
                    let count = now.as_ref().map_or(0, |now| now.body.as_u64().unwrap());
                    let expect = now.map_or(Expect::Absent, |now| Expect::Revision(now.revision));
                    let next = put("count", json!(count + 1), expect);
                    match store.commit(&[next], &[event("count")]) {
                        Ok(_) => break,
                        Err(StoreError::Stale { .. }) => stale += 1,
                        Err(other) => panic!("{other}"),
                    }
                }
            }
            stale
        })
    });
    let stale: u64 = writers.collect::<Vec<_>>().into_iter().map(|w| w.join().unwrap()).sum();
    let store = SqliteStore::open(folder.path()).unwrap();
    let count = store.document(Kind::Traffic, "count").unwrap().unwrap();
    eprintln!("{WRITERS} writers, {} changes, {stale} met another", WRITERS * EACH);
    assert_eq!((count.body, count.revision), (json!(WRITERS * EACH), WRITERS * EACH));
    let events = all(&store);
    assert!(events.is_sorted_by_key(|event| event.seq) && events.len() == 100);
}

#[test]
fn what_is_not_ours_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = state_file(folder.path());
    let refused = |part: &str| {
        let before = fs::read(&path).unwrap();
        let error = SqliteStore::open(folder.path()).err().unwrap().to_string();
        assert!(error.contains(part) && error.contains("state.db"), "{error}");
        assert!(fs::read(&path).unwrap() == before, "changed: {error}");
    };
    fs::write(&path, "weights = 1\n".repeat(1000)).unwrap();
    refused("it is not a SQLite database");
    fs::remove_file(&path).unwrap();
    let foreign = rusqlite::Connection::open(&path).unwrap();
    foreign.execute_batch("CREATE TABLE songs (name TEXT)").unwrap();
    drop(foreign);
    refused("it is the database of another program");
    fs::remove_file(&path).unwrap();
    symlink("/etc/hostname", &path).unwrap();
    let error = SqliteStore::open(folder.path()).err().unwrap();
    assert!(matches!(error, StoreError::File { .. }), "{error}");
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(matches!(SqliteStore::open(folder.path()), Err(StoreError::File { .. })));
}

#[test]
fn a_later_versions_file_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    drop(SqliteStore::open(folder.path()).unwrap());
    let path = state_file(folder.path());
    let later = rusqlite::Connection::open(&path).unwrap();
    later.pragma_update(None, "user_version", 7).unwrap();
    drop(later);
    let before = fs::read(&path).unwrap();
    let error = SqliteStore::open(folder.path()).err().unwrap();
    assert!(matches!(error, StoreError::TooNew { found: 7, known: 1, .. }), "{error}");
    assert!(fs::read(&path).unwrap() == before);
}

#[test]
fn damage_is_found_when_it_is_opened() {
    let folder = tempfile::tempdir().unwrap();
    let store = SqliteStore::open(folder.path()).unwrap();
    for at in 0..200 {
        let body = json!({"text": "x".repeat(500)});
        store.commit(&[put(&format!("m{at}"), body, Expect::Any)], &[event("x")]).unwrap();
    }
    drop(store);
    let path = state_file(folder.path());
    let whole = fs::read(&path).unwrap();
    // A page overwritten, and the end cut off.
    let mut overwritten = whole.clone();
    overwritten[4096 * 6..4096 * 7].fill(0xa5);
    for broken in [&overwritten[..], &whole[..whole.len() / 2]] {
        fs::write(&path, broken).unwrap();
        let error = SqliteStore::open(folder.path()).err().unwrap();
        assert!(matches!(error, StoreError::Broken { .. }), "{error}");
        assert!(error.to_string().contains("damaged"), "{error}");
    }
    fs::write(&path, &whole).unwrap();
    assert_eq!(SqliteStore::open(folder.path()).unwrap().head().unwrap(), 200);
}

#[derive(Clone, Debug)]
enum Step {
    Put(u8, Expect),
    Delete(u8, Expect),
}

fn steps() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let expect = prop_oneof![
        Just(Expect::Any),
        Just(Expect::Absent),
        (0_u64..6).prop_map(Expect::Revision),
    ];
    let step = (0_u8..3, expect, any::<bool>()).prop_map(|(name, expect, delete)| match delete {
        true => Step::Delete(name, expect),
        false => Step::Put(name, expect),
    });
    prop::collection::vec(prop::collection::vec(step, 1..4), 1..20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Against the simplest thing that could be right: names, each with its revisions and a body.
    #[test]
    fn it_does_what_the_simplest_store_would(commits in steps()) {
        let store = SqliteStore::in_memory().unwrap();
        let mut model: [(u64, Option<u64>); 3] = [(0, None); 3];
        let mut events = 0;
        for (at, commit) in (0_u64..).zip(&commits) {
            let mut next = model;
            let mut seen = std::collections::HashSet::new();
            let mut ok = true;
            let puts: Vec<Put> = commit.iter().map(|step| {
                let (name, expect, body) = match step {
                    Step::Put(name, expect) => (*name, *expect, Some(at)),
                    Step::Delete(name, expect) => (*name, *expect, None),
                };
                let (revision, live) = &mut next[usize::from(name)];
                ok &= seen.insert(name) && match expect {
                    Expect::Any => true,
                    Expect::Absent => live.is_none(),
                    Expect::Revision(asked) => live.is_some() && *revision == asked,
                };
                if body.is_some() || live.is_some() {
                    *revision += 1;
                }
                *live = body;
                let name = name.to_string();
                Put { kind: Kind::Labels, name, body: body.map(|at| json!(at)), expect }
            }).collect();
            prop_assert_eq!(store.commit(&puts, &[event("x")]).is_ok(), ok);
            if ok {
                model = next;
                events += 1;
            }
            let there: Vec<_> = store.documents(Kind::Labels).unwrap().into_iter()
                .map(|found| (found.name, found.revision, found.body.as_u64().unwrap())).collect();
            let expected: Vec<_> = (0_u8..).zip(&model)
                .filter_map(|(name, (revision, live))| Some((name.to_string(), *revision, (*live)?)))
                .collect();
            prop_assert_eq!(there, expected);
        }
        prop_assert_eq!(store.events(&EventQuery::default()).unwrap().len(), events);
        prop_assert_eq!(store.head().unwrap(), events as u64);
    }
}
