//! C3: weights, sticky keys, rules, labels and pinned numbers, held against the table of the moment
//! while tables change and the gateway is killed in between.

use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use serde_json::{Value, json};
use statrs::distribution::{Binomial, DiscreteCDF as _};

use crate::admin::Admin;
use crate::checker::{History, Verdict};
use crate::gateway::Gateway;
use crate::load::{Answer, Ask, Client, Stop, Wire, closed_loop, precise};
use crate::{alone, count, models};

const MODEL: &str = "sum";
const VERSIONS: u32 = 3;
/// Callers that ask one after another.
const CALLERS: usize = 12;
/// Sticky keys.
const KEYS: usize = 300;
/// A share outside of what 99.9 % of fair splits give is counted; one that a fair split of this run
/// would give less than once in a million runs is a failure.
const OUTSIDE: f64 = 0.001;
const IMPOSSIBLE: f64 = 1e-6;

/// What decides about requests.
#[derive(Clone, Debug, PartialEq)]
struct Table {
    /// In percent.
    weights: BTreeMap<u32, f64>,
    /// Version of requests whose `x-group` begins with `beta`.
    beta: u32,
    /// Version of the label `canary`.
    canary: u32,
    /// As the table before, but that version 2 has more.
    raised: bool,
}

impl Table {
    fn json(&self) -> Value {
        let weights: BTreeMap<String, f64> =
            self.weights.iter().map(|(version, weight)| (version.to_string(), *weight)).collect();
        json!({
            "weights": weights,
            "sticky": {"header": "x-user-id"},
            "rules": [{"name": "beta", "header": "x-group", "prefix": "beta",
                "version": self.beta.to_string()}],
        })
    }

    fn share(&self, version: u32) -> f64 {
        let sum: f64 = self.weights.values().sum();
        self.weights.get(&version).map_or(0.0, |weight| weight / sum)
    }

    /// Version 1 has the label `stable`, also with a weight of 0; where it has none, who has most.
    fn arm(&self, version: u32) -> &'static str {
        let most = self.weights.iter().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(a.0)));
        let stable = if self.weights.contains_key(&1) { 1 } else { *most.unwrap().0 };
        if version == stable { "stable" } else { "canary" }
    }
}

/// Weights in turn, and whether version 2 is raised by them.
fn weights(at: usize) -> (BTreeMap<u32, f64>, bool) {
    let turns: [(&[(u32, f64)], bool); 12] = [
        (&[(1, 100.0)], false),
        (&[(1, 99.0), (2, 1.0)], true),
        (&[(1, 95.0), (2, 5.0)], true),
        (&[(1, 75.0), (2, 25.0)], true),
        (&[(1, 50.0), (2, 50.0)], true),
        (&[(1, 25.0), (2, 75.0)], true),
        (&[(2, 1.0)], true),
        (&[(1, 60.0), (2, 30.0), (3, 10.0)], false),
        (&[(1, 60.0), (2, 60.0), (3, 10.0)], true),
        (&[(1, 1.0), (2, 1.0), (3, 1.0)], false),
        (&[(3, 7.0), (1, 0.0)], false),
        (&[(1, 99.5), (3, 0.5)], false),
    ];
    let (weights, raised) = turns[at % turns.len()];
    (weights.iter().copied().collect(), raised)
}

/// What a request asks, by its place.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Plain,
    Sticky(usize),
    Beta,
    Label,
    Number(u32),
}

fn kind(at: usize) -> Kind {
    match at % 8 {
        0..=3 => Kind::Plain,
        4 | 5 => Kind::Sticky(at / 8 % KEYS),
        6 => Kind::Beta,
        _ if at % 16 == 7 => Kind::Label,
        _ => Kind::Number(u32::try_from(at / 16 % 3).unwrap() + 1),
    }
}

fn ask(at: usize) -> Ask {
    let mut ask = Ask::plain(at);
    match kind(at) {
        Kind::Plain => {}
        Kind::Sticky(key) => {
            // The table's header, and the one that needs none.
            let name = if at.is_multiple_of(2) { "x-user-id" } else { "tidegate-sticky-key" };
            ask.headers.push((name, format!("user-{key}")));
        }
        Kind::Beta => {
            ask.headers.push(("x-group", "beta-testers".to_owned()));
            ask.headers.push(("x-user-id", format!("user-{}", at % KEYS)));
        }
        Kind::Label => "canary".clone_into(&mut ask.version),
        Kind::Number(version) => ask.version = version.to_string(),
    }
    ask
}

/// Makes the change of this turn.
fn change(admin: &mut Admin, at: usize, turn: &mut usize, history: &mut History<Table>) {
    let mut next = history.now().clone();
    next.raised = false;
    let said = match at % 4 {
        1 => {
            next.beta = next.beta % VERSIONS + 1;
            admin.traffic(MODEL, &next.json())
        }
        3 => {
            next.canary = next.canary % VERSIONS + 1;
            admin.label(MODEL, "canary", next.canary)
        }
        _ => {
            *turn += 1;
            (next.weights, next.raised) = weights(*turn);
            admin.traffic(MODEL, &next.json())
        }
    };
    let said = said.done();
    history.change(said.sent, said.answered, next);
}

#[test]
fn every_request_obeys_the_table_of_its_moment() {
    let total = count("RELEASE_ROUTED", 8_000);
    let changes = count("RELEASE_ROUTED_CHANGES", if total >= 100_000 { 100 } else { 16 });
    let kills = count("RELEASE_ROUTED_KILLS", if total >= 100_000 { 20 } else { 1 });
    let root = tempfile::tempdir().unwrap();
    for version in 1..=VERSIONS {
        models::put(root.path(), MODEL, version, &models::add(version));
    }
    alone(|runtime| {
        let first =
            Table { weights: BTreeMap::from([(1, 100.0)]), beta: 2, canary: 2, raised: false };
        let mut history = History::new(first.clone());
        let (mut answers, mut deaths) = (Vec::new(), Vec::new());
        let (mut turn, mut at) = (0, 0);
        for life in 0..=kills {
            let mut gateway = Gateway::start(root.path(), &[]);
            let mut admin = gateway.admin();
            if life == 0 {
                admin.label(MODEL, "stable", 1).done();
                admin.label(MODEL, "canary", first.canary).done();
                admin.traffic(MODEL, &first.json()).done();
                history = History::new(first.clone());
            }
            let client = {
                let _inside = runtime.enter();
                Client::new(MODEL, gateway.http, gateway.grpc)
            };
            let stop = Stop::default();
            // Each life asks other rows, so that all kinds meet all wires.
            let ask = move |at: usize| ask(at + life);
            let load = runtime.spawn(closed_loop(client, CALLERS, stop.clone(), ask));
            let share = changes * (life + 1) / (kills + 1);
            let wait = |done: usize| {
                while stop.done() < done {
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
            };
            let step = total / (changes + kills + 1);
            let mut wanted = step;
            while at < share {
                wait(wanted);
                change(&mut admin, at, &mut turn, &mut history);
                at += 1;
                wanted += step;
            }
            wait(wanted);
            let begins = Instant::now();
            if life < kills {
                deaths.push((life, begins));
                gateway.kill();
            }
            stop.stop();
            answers.extend(runtime.block_on(load).unwrap().into_iter().map(|a| (life, a)));
        }
        report(&answers, &history, &deaths);
    });
}

/// What was seen of the requests that only one table can have decided.
#[derive(Default)]
struct Seen {
    /// By table and version, of requests without a key; and of all such requests of a table.
    plain: BTreeMap<(usize, u32), usize>,
    plain_of: BTreeMap<usize, usize>,
    /// By key and table.
    sticky: HashMap<usize, BTreeMap<usize, u32>>,
}

fn report(answers: &[(usize, Answer)], history: &History<Table>, deaths: &[(usize, Instant)]) {
    let (mut verdict, mut seen, mut cut) = (Verdict::default(), Seen::default(), 0);
    for (life, answer) in answers {
        verdict.requests += 1;
        let died = deaths.iter().find(|(of, _)| of == life);
        if answer.ran.is_err() && died.is_some_and(|(_, at)| answer.ended >= *at) {
            // Its gateway was killed before it could answer.
            cut += 1;
            continue;
        }
        judge(answer, history, &mut verdict, &mut seen);
    }
    let (keys, moved) = sticky(&seen, history);
    let (tests, outside, impossible) = split(&seen, history);
    eprintln!(
        "C3: {} requests over {} changes and {} kills ({cut} cut by them), one table possible for {}: {} \
         failed, {} against their table, {} mislabelled",
        verdict.requests,
        history.changes(),
        deaths.len(),
        verdict.sure,
        verdict.failed.len(),
        verdict.disallowed.len(),
        verdict.mislabelled.len(),
    );
    eprintln!(
        "C3: {keys} keys, {} moved back or between while a weight was raised; shares: {outside} of {tests} \
         outside of the exact 99.9 % interval",
        moved.len(),
    );
    verdict.assert_clean();
    assert_eq!(moved, Vec::<String>::new());
    assert_eq!(impossible, Vec::<String>::new());
    assert!(verdict.sure * 2 > verdict.requests, "most requests are sure");
}

/// Holds one answer against the tables that may have decided.
fn judge(answer: &Answer, history: &History<Table>, verdict: &mut Verdict, seen: &mut Seen) {
    let ran = match &answer.ran {
        Ok(ran) => ran,
        Err(failed) => return verdict.failed.push(format!("{answer:?}: {}", failed.text)),
    };
    if ran.proven != ran.named {
        verdict.mislabelled.push(format!("{answer:?}"));
    }
    let (first, tables) = history.possible(answer);
    let kind = kind_of(&answer.ask);
    let by = |table: &&Table| match kind {
        Kind::Plain | Kind::Sticky(_) => {
            table.share(ran.proven) > 0.0 && ran.arm == table.arm(ran.proven)
        }
        Kind::Beta => table.beta == ran.proven && ran.arm == "beta",
        Kind::Label => table.canary == ran.proven && ran.arm == "pinned",
        Kind::Number(version) => version == ran.proven && ran.arm == "pinned",
    };
    if !tables.iter().any(by) {
        verdict.disallowed.push(format!("{answer:?}: possible were {tables:?}"));
    }
    if tables.len() > 1 {
        return;
    }
    verdict.sure += 1;
    match kind {
        Kind::Plain => {
            *seen.plain.entry((first, ran.proven)).or_default() += 1;
            *seen.plain_of.entry(first).or_default() += 1;
        }
        Kind::Sticky(key) => {
            let before = seen.sticky.entry(key).or_default().insert(first, ran.proven);
            if before.is_some_and(|before| before != ran.proven) {
                verdict.disallowed.push(format!("{answer:?}: its key had {before:?} before"));
            }
        }
        _ => {}
    }
}

fn kind_of(ask: &Ask) -> Kind {
    let header = |name: &str| {
        ask.headers.iter().find(|(header, _)| *header == name).map(|(_, value)| value.as_str())
    };
    let key = header("tidegate-sticky-key").or_else(|| header("x-user-id"));
    match (ask.version.parse(), header("x-group"), key) {
        (Ok(version), _, _) => Kind::Number(version),
        (Err(_), _, _) if !ask.version.is_empty() => Kind::Label,
        (_, Some(_), _) => Kind::Beta,
        (_, _, Some(key)) => Kind::Sticky(key.trim_start_matches("user-").parse().unwrap()),
        _ => Kind::Plain,
    }
}

/// Keys that a version lost although its weight was only raised.
fn sticky(seen: &Seen, history: &History<Table>) -> (usize, Vec<String>) {
    let mut moved = Vec::new();
    for (key, versions) in &seen.sticky {
        let steps = versions.iter().zip(versions.iter().skip(1));
        for ((from, before), (to, after)) in steps {
            // Tables between the two may have moved it, unless each was as the one before or raised 2.
            let only_raised = (from + 1..=*to).all(|at| {
                let (old, new) = (history.table(at - 1), history.table(at));
                new.raised || new.weights == old.weights
            });
            let same = (from + 1..=*to)
                .all(|at| history.table(at - 1).weights == history.table(at).weights);
            if (only_raised && *before == 2 && *after != 2) || (same && before != after) {
                moved.push(format!("user-{key}: {before} by table {from}, {after} by {to}"));
            }
        }
    }
    (seen.sticky.len(), moved)
}

/// How many shares there were, how many of them outside of the interval, and those that cannot be.
fn split(seen: &Seen, history: &History<Table>) -> (usize, usize, Vec<String>) {
    let (mut tests, mut outside, mut impossible) = (0, 0, Vec::new());
    for (table, requests) in &seen.plain_of {
        for version in 1..=VERSIONS {
            let share = history.table(*table).share(version);
            if !(share > 0.0 && share < 1.0) {
                continue;
            }
            tests += 1;
            let got = seen.plain.get(&(*table, version)).copied().unwrap_or(0);
            let chance = chance(share, *requests, got);
            outside += usize::from(chance < OUTSIDE);
            if chance < IMPOSSIBLE {
                impossible.push(format!("version {version} got {got} of {requests} for {share}"));
            }
        }
    }
    (tests, outside, impossible)
}

/// Of a split that is as far off as this one, or further, to the same side; twice, for two sides.
fn chance(share: f64, requests: usize, got: usize) -> f64 {
    let binomial = Binomial::new(share, requests as u64).unwrap();
    let least = binomial.cdf(got as u64);
    let most = if got == 0 { 1.0 } else { binomial.sf(got as u64 - 1) };
    2.0 * least.min(most)
}

/// Whoever the new version has answered once is answered by it for as long as its weight only grows,
/// also where nobody said which version is the stable one, and where the new one gets most.
#[test]
fn raising_a_weight_moves_nobody_back() {
    let root = tempfile::tempdir().unwrap();
    for version in 1..=2 {
        models::put(root.path(), MODEL, version, &models::add(version));
    }
    alone(|runtime| {
        let gateway = Gateway::start(root.path(), &[]);
        let mut admin = gateway.admin();
        let client = {
            let _inside = runtime.enter();
            Client::new(MODEL, gateway.http, gateway.grpc)
        };
        let versions = |weight: u32| -> Vec<u32> {
            let ask = |key: usize| {
                let headers = vec![("tidegate-sticky-key", format!("user-{key}"))];
                let asked = Ask { headers, ..Ask::plain(key) };
                let wire = Wire::of(key + usize::try_from(weight).unwrap());
                let asked = client.ask(wire, asked, Instant::now());
                runtime.block_on(asked).ran.unwrap().proven
            };
            (0..100).map(ask).collect()
        };
        for labelled in [false, true] {
            if labelled {
                admin.label(MODEL, "stable", 1).done();
            }
            let mut before = vec![1; 100];
            for weight in [5, 25, 45, 55, 75, 95, 100] {
                let table = json!({"weights": {"1": 100 - weight, "2": weight}});
                admin.traffic(MODEL, &table).done();
                let after = versions(weight);
                let back = before.iter().zip(&after).filter(|(b, a)| **b == 2 && **a == 1).count();
                let got = after.iter().filter(|version| **version == 2).count();
                eprintln!(
                    "C3: {got} of 100 keys at {weight} %, {back} moved back, labelled: {labelled}"
                );
                assert_eq!(back, 0, "at {weight} %, labelled: {labelled}");
                before = after;
            }
        }
    });
}

/// The interval is exact: of fair splits, at most one in a thousand is counted as outside.
#[test]
fn a_fair_split_is_seldom_outside() {
    for (share, requests) in [(0.01, 500), (0.5, 40), (0.05, 2000)] {
        let binomial = Binomial::new(share, requests as u64).unwrap();
        let mass = |got: usize| {
            let below = if got == 0 { 0.0 } else { binomial.cdf(got as u64 - 1) };
            binomial.cdf(got as u64) - below
        };
        let outside: f64 =
            (0..=requests).filter(|got| chance(share, requests, *got) < OUTSIDE).map(mass).sum();
        assert!(outside <= OUTSIDE, "{share} of {requests}: {outside}");
        let middle = (0..=requests).find(|got| precise(*got) >= share * precise(requests)).unwrap();
        assert!(chance(share, requests, middle) > 0.5);
    }
}
