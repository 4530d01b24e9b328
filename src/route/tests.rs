use tokio::time::Instant;

use super::*;
use crate::batch::{LaneParts, ThreadBudget};
use crate::domain::{BatchSettings, Protocol, Recording, RouteHeaders};
use crate::engine::Model as _;
use crate::engine::fake::FakeModel;
use crate::observe::Observer;

fn version(number: u64) -> Version {
    Version::new(number).unwrap()
}

/// Has nobody who would run it.
fn served(number: u64) -> Arc<Served> {
    let (model, version) = ("m".parse::<ModelName>().unwrap(), version(number));
    let digest = Digest::new([0; 32]);
    let stats = VersionStats::new(&Observer::default(), &model, version, &digest, "fake");
    let lane = Lane::new(LaneParts {
        model: model.clone(),
        version,
        batch: BatchSettings::default(),
        batched: true,
        padding: None,
        sessions: Vec::new(),
        stats: Arc::clone(&stats),
        budget: Arc::new(ThreadBudget::new(1)),
    });
    Arc::new(Served {
        model,
        version,
        digest,
        engine: "fake",
        signature: FakeModel::new(1, 0.0).signature().clone(),
        settings: ModelSettings::default(),
        lane: lane.unwrap(),
        stats,
        recording: Recording::default(),
        watch: None,
    })
}

fn routes(loaded: &[u64], labels: &[(&str, u64)]) -> ModelRoutes {
    let label = |(name, number): &(&str, u64)| (name.parse().unwrap(), version(*number));
    ModelRoutes {
        versions: loaded.iter().map(|number| (version(*number), served(*number))).collect(),
        labels: labels.iter().map(label).collect(),
        split: None,
    }
}

fn table(routes: &ModelRoutes) -> RouteTable {
    let models = BTreeMap::from([("m".parse().unwrap(), routes.clone())]);
    RouteTable { models, ..RouteTable::default() }
}

fn traffic(text: &str) -> Traffic {
    let traffic: Traffic = serde_json::from_str(text).unwrap();
    traffic.check().unwrap();
    traffic
}

/// What a request gets: version, arm and reason; or the kind of its failure.
fn picked(
    routes: &ModelRoutes,
    asked: &str,
    headers: &[(&str, &str)],
) -> Result<(u64, String, String), ErrorKind> {
    let table = table(routes);
    let wanted = VersionRef::parse(asked).unwrap();
    let named = headers.iter().map(|(name, value)| ((*name).into(), (*value).to_owned()));
    let call = CallMeta {
        protocol: Protocol::Http,
        received: Instant::now(),
        timeout: None,
        trace: None,
        sticky_key: None,
        headers: RouteHeaders { named: named.collect(), ..RouteHeaders::default() },
        principal: None,
    };
    let keys = Keys { call: &call, parameters: &[], prediction_id: Uuid::nil() };
    let model = "m".parse().unwrap();
    let pick = table.pick_for(&model, wanted.as_ref(), &keys).map_err(|failure| failure.kind)?;
    let arm = pick.arm.as_str().to_owned();
    Ok((pick.served.version.get(), arm, pick.reason.to_string()))
}

#[test]
fn without_traffic_the_label_stable_decides_or_the_highest() {
    let got = |loaded: &[u64], labels: &[(&str, u64)]| picked(&routes(loaded, labels), "", &[]);
    let is = |number, reason: &str| Ok((number, "stable".to_owned(), reason.to_owned()));
    assert_eq!(got(&[1, 2], &[]), is(2, "latest"));
    assert_eq!(got(&[1, 2], &[("stable", 1), ("canary", 2)]), is(1, "label stable"));
    assert_eq!(got(&[2], &[("stable", 1)]), Err(ErrorKind::Unavailable));
    assert_eq!(got(&[], &[]), Err(ErrorKind::Unavailable));
}

#[test]
fn who_names_a_version_gets_it_whatever_the_traffic_is() {
    let mut routes = routes(&[1, 2, 3], &[("next", 3), ("gone", 9)]);
    let one = r#"{"weights": {"1": 1}, "rules": [
        {"name": "all", "header": "x", "prefix": "a", "version": "2"}]}"#;
    for split in [None, Some(traffic(one))] {
        routes.set_traffic(split.as_ref(), 1);
        let is = |number, reason: &str| Ok((number, "pinned".to_owned(), reason.to_owned()));
        assert_eq!(picked(&routes, "2", &[("x", "a")]), is(2, "version"));
        assert_eq!(picked(&routes, "next", &[("x", "a")]), is(3, "label next"));
        for missing in ["9", "gone", "unknown"] {
            assert_eq!(picked(&routes, missing, &[]), Err(ErrorKind::NotFound), "{missing}");
        }
        // Until it is put somewhere, it is where those without a wish usually go.
        let usual = if split.is_some() { 1 } else { 3 };
        assert_eq!(picked(&routes, "stable", &[("x", "a")]), is(usual, "label stable"));
    }
    let wanted = Ok((2, "all".to_owned(), "rule all".to_owned()));
    assert_eq!(picked(&routes, "", &[("x", "a")]), wanted);
    let (number, arm, reason) = picked(&routes, "", &[]).unwrap();
    assert_eq!((number, arm.as_str()), (1, "stable"));
    assert!(reason.starts_with("weight share 10000, bucket "), "{reason}");
}

#[test]
fn a_split_follows_what_is_loaded_once_it_is_refreshed() {
    let mut routes = routes(&[1, 2], &[]);
    routes.set_traffic(Some(&traffic(r#"{"weights": {"1": 1, "3": 99}}"#)), 5);
    assert_eq!(picked(&routes, "", &[]).unwrap().0, 1, "all of it while 3 is not there");
    routes.versions.insert(version(3), served(3));
    routes.refresh();
    let shares: Vec<u16> =
        routes.split.as_ref().unwrap().shares().map(|(_, _, share)| share).collect();
    assert_eq!(shares, [9900, 100], "the oldest comes last");
    routes.versions.retain(|version, _| version.get() == 2);
    // Not refreshed: nothing is served that is not there.
    assert_eq!(picked(&routes, "", &[]), Err(ErrorKind::Unavailable));
    routes.refresh();
    assert_eq!(picked(&routes, "", &[]), Err(ErrorKind::Unavailable));
    assert!(table(&routes).pick(&"m".parse().unwrap(), None).is_err());
}

#[test]
fn a_table_knows_the_headers_that_its_models_ask_for() {
    let mut first = routes(&[1], &[]);
    let mut table = table(&first);
    assert!(table.header_names().is_empty());
    first.set_traffic(
        Some(&traffic(
            r#"{"weights": {"1": 1}, "sticky": {"header": "X-User"}, "rules": [
            {"name": "a", "header": "b", "equals": "c", "version": "1"},
            {"name": "d", "header": "A", "equals": "c", "version": "9"},
            {"name": "e", "header": "B", "equals": "e", "version": "1"}]}"#,
        )),
        1,
    );
    // A copy that is changed does not keep what was found for the one before.
    let mut next = table.clone();
    next.models.insert("m".parse().unwrap(), first.clone());
    next.models.insert("n".parse().unwrap(), first);
    let names: Vec<&str> = next.header_names().iter().map(|name| &**name).collect();
    assert_eq!(names, ["b", "x-user"], "those of rules that lead nowhere are not needed");
    table.models.clear();
    assert!(table.header_names().is_empty());
}

#[test]
fn mirrors_are_versions_that_are_loaded_and_not_the_one_that_answers() {
    let mut routes = routes(&[1, 2, 3], &[]);
    let split = r#"{"weights": {"1": 1}, "shadows": [{"version": "1", "percent": 100},
        {"version": "2", "percent": 100}, {"version": "3", "percent": 0},
        {"version": "4", "percent": 100}]}"#;
    routes.set_traffic(Some(&traffic(split)), 1);
    let table = table(&routes);
    let call = CallMeta {
        protocol: Protocol::Grpc,
        received: Instant::now(),
        timeout: None,
        trace: None,
        sticky_key: None,
        headers: RouteHeaders::default(),
        principal: None,
    };
    let keys = Keys { call: &call, parameters: &[], prediction_id: Uuid::now_v7() };
    let model = "m".parse().unwrap();
    let mirrors = |version: Option<&VersionRef>| -> Vec<(u64, u16)> {
        let pick = table.pick_for(&model, version, &keys).unwrap();
        let number = |mirror: &Mirror| mirror.served.upgrade().unwrap().version.get();
        pick.mirrors.iter().map(|mirror| (number(mirror), mirror.share)).collect()
    };
    assert_eq!(mirrors(None), [(2, 10_000)]);
    assert!(mirrors(Some(&version(1).into())).is_empty(), "who names a version tries something");
}
