//! The director without a socket in between: what is in force when its changes are written down, and
//! how long the way back takes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tidegate::control::call::Call;
use tidegate::control::desk::Desk as _;
use tidegate::control::director::Policy;
use tidegate::control::store::{
    Committed, Document, Event, EventQuery, Kind, NewEvent, Put, SqliteStore, Store, StoreError,
};
use tidegate::control::{Director, Registry, Settings, Switchboard, source};
use tidegate::domain::{EngineChoice, ModelName, Traffic, Version};
use tidegate::engine::Engines;
use tidegate::observe::Observer;
use tidegate::route::{Published, RouteTable};
use tokio::runtime::Runtime;

use crate::load::{Stop, quantile};
use crate::{alone, count, models};

const MODEL: &str = "sum";
/// The figure of the issue, with room for a busy machine and a build that is not optimised.
const SWAP_MAX: Duration = Duration::from_millis(20);

fn model() -> ModelName {
    MODEL.parse().unwrap()
}

fn version(number: u32) -> Version {
    Version::new(number.into()).unwrap()
}

/// Which version answers most of those who name none.
fn answers(table: &Published<RouteTable>) -> Option<u64> {
    table.snapshot().pick(&model(), None).ok().map(|pick| pick.served.version.get())
}

/// A store that notes which version answered when a table was written, and may refuse to write.
struct Noting {
    inner: SqliteStore,
    table: Arc<Published<RouteTable>>,
    seen: Mutex<Vec<Option<u64>>>,
    broken: Mutex<bool>,
}

impl Store for Noting {
    fn commit(&self, puts: &[Put], events: &[NewEvent]) -> Result<Committed, StoreError> {
        if puts.iter().any(|put| put.kind == Kind::Traffic) {
            self.seen.lock().push(answers(&self.table));
            if *self.broken.lock() {
                return Err(StoreError::Database("the disk is full, as the test wants it".into()));
            }
        }
        self.inner.commit(puts, events)
    }

    fn document(&self, kind: Kind, name: &str) -> Result<Option<Document>, StoreError> {
        self.inner.document(kind, name)
    }

    fn documents(&self, kind: Kind) -> Result<Vec<Document>, StoreError> {
        self.inner.documents(kind)
    }

    fn events(&self, query: &EventQuery) -> Result<Vec<Event>, StoreError> {
        self.inner.events(query)
    }

    fn head(&self) -> Result<u64, StoreError> {
        self.inner.head()
    }

    fn changed_elsewhere(&self) -> Result<bool, StoreError> {
        self.inner.changed_elsewhere()
    }
}

/// Versions 1 and 2 of a model, and a director over them.
struct Inside {
    director: Director,
    store: Arc<Noting>,
    table: Arc<Published<RouteTable>>,
    root: tempfile::TempDir,
}

impl Inside {
    fn start(runtime: &Runtime, policy: Policy) -> Self {
        let root = tempfile::tempdir().unwrap();
        for version in 1..=2 {
            models::put(root.path(), MODEL, version, &models::add(version));
        }
        let mut settings = Settings::new(root.path().join("models"), root.path().join("state"));
        settings.engine = EngineChoice::Tract;
        settings.probe_enabled = false;
        settings.source.quiet = Duration::ZERO;
        let _runtime = runtime.enter();
        let table = Arc::new(Published::new(RouteTable::default()));
        let board = Arc::new(Switchboard::new(Arc::clone(&table), None));
        let observer = Observer::new(tidegate::observe::Settings::default());
        let engines = Arc::new(Engines::open(EngineChoice::Tract, None).unwrap());
        let from = source::open(&settings).unwrap();
        let registry = Registry::new(
            settings.clone(),
            engines,
            from,
            Arc::clone(&board),
            Arc::clone(&observer),
        );
        let store = Arc::new(Noting {
            inner: SqliteStore::open(&settings.state_dir).unwrap(),
            table: Arc::clone(&table),
            seen: Mutex::default(),
            broken: Mutex::default(),
        });
        let kept = Arc::clone(&store) as Arc<dyn Store>;
        let director = Director::open(kept, registry, board, observer, policy).unwrap();
        runtime.block_on(director.start()).unwrap();
        assert_eq!(answers(&table), Some(2));
        Self { director, store, table, root }
    }

    fn put(&self, runtime: &Runtime, number: u32) {
        let (model, traffic) = (model(), Traffic::all_to(version(number)));
        let put = async { self.director.put_traffic(&model, traffic, call(Some("a test"))).await };
        runtime.block_on(put).unwrap();
    }
}

fn call(reason: Option<&str>) -> Call {
    let reason = reason.map(str::to_owned);
    Call { actor: "tester".to_owned(), reason, ..Call::default() }
}

/// A change is durable before it is in force, and going back is in force before it is durable.
#[test]
fn the_way_back_does_not_wait_for_the_disk() {
    let times = count("RELEASE_ROLLBACKS", 200);
    alone(|runtime| {
        let inside = Inside::start(runtime, Policy::default());
        let (model, mut took) = (model(), Vec::new());
        for _ in 0..times {
            inside.put(runtime, 1);
            inside.put(runtime, 2);
            inside.store.seen.lock().clear();
            // What a request would do, on a thread of its own.
            let table = Arc::clone(&inside.table);
            let watching = std::thread::spawn(move || {
                while answers(&table) != Some(1) {
                    std::hint::spin_loop();
                }
                Instant::now()
            });
            std::thread::sleep(Duration::from_micros(200));
            let called = Instant::now();
            let rolled = {
                let _runtime = runtime.enter();
                inside.director.rollback(&model, call(Some("back")))
            };
            let back = watching.join().unwrap();
            runtime.block_on(rolled).unwrap();
            took.push(back.saturating_duration_since(called));
            assert_eq!(*inside.store.seen.lock(), [Some(1)], "in force before it was written");
        }
        let (median, p99) = (quantile(&took, 0.5), quantile(&took, 0.99));
        eprintln!(
            "rollback by pointer, {times} times: a request is routed back {median:?} after the call \
             (median), {p99:?} (p99)"
        );
        assert!(median < SWAP_MAX, "{median:?}");
    });
}

#[test]
fn a_table_is_written_before_it_is_in_force() {
    alone(|runtime| {
        let inside = Inside::start(runtime, Policy::default());
        inside.put(runtime, 1);
        inside.put(runtime, 2);
        assert_eq!(*inside.store.seen.lock(), [Some(2), Some(1)]);
        assert_eq!(answers(&inside.table), Some(2));
    });
}

/// What is refused changes nothing, also where the change comes before the checks.
#[test]
fn a_rollback_that_is_refused_changes_nothing() {
    alone(|runtime| {
        let policy = Policy { reason_required: true, ..Policy::default() };
        let inside = Inside::start(runtime, policy);
        inside.put(runtime, 1);
        inside.put(runtime, 2);
        let stale = Call { if_match: Some("\"999\"".to_owned()), ..call(Some("back")) };
        for (name, call) in [("no reason", call(None)), ("another revision", stale)] {
            let refused =
                runtime.block_on(async { inside.director.rollback(&model(), call).await });
            assert!(refused.is_err(), "{name}");
            assert_eq!(answers(&inside.table), Some(2), "{name}");
        }
    });
}

/// What cannot be written is not in force: a restart would forget it.
#[test]
fn a_change_that_cannot_be_written_is_not_in_force() {
    alone(|runtime| {
        let inside = Inside::start(runtime, Policy::default());
        inside.put(runtime, 1);
        inside.put(runtime, 2);
        *inside.store.broken.lock() = true;
        let traffic = Traffic::all_to(version(1));
        let put = runtime.block_on(async {
            inside.director.put_traffic(&model(), traffic, call(Some("a test"))).await
        });
        assert_eq!(put.unwrap_err().status(), 503);
        assert_eq!(answers(&inside.table), Some(2));
        let back = async { inside.director.rollback(&model(), call(Some("back"))).await };
        assert_eq!(runtime.block_on(back).unwrap_err().status(), 503);
        assert_eq!(answers(&inside.table), Some(2), "it would be this one after a restart, too");
        *inside.store.broken.lock() = false;
        inside.put(runtime, 1);
        assert_eq!(answers(&inside.table), Some(1));
    });
}

/// The source is looked at all the time, by somebody who would keep version 1 only, while an operator
/// loads and unloads version 3: what he loaded is there until he unloads it.
#[test]
fn what_an_operator_loads_is_not_retired_by_the_watcher() {
    const TIMES: usize = 60;
    alone(|runtime| {
        let inside = Arc::new(Inside::start(runtime, Policy::default()));
        inside.put(runtime, 1);
        models::keep_only(inside.root.path(), MODEL, &[1]);
        // Not one of those that are kept to go back to.
        models::put(inside.root.path(), MODEL, 3, &models::add(3));
        let stop = Stop::default();
        let (looking, stopped) = (Arc::clone(&inside), stop.clone());
        let looks = runtime.spawn(async move {
            let mut looks = 0;
            while !stopped.is_set() {
                looking.director.reload(call(Some("a look"))).await.unwrap();
                looks += 1;
            }
            looks
        });
        runtime.block_on(async {
            let (model, three, director) = (model(), version(3), &inside.director);
            let loaded = || inside.table.snapshot().pick(&model, Some(&three.into())).is_ok();
            for _ in 0..TIMES {
                director.load(&model, three, None, call(Some("a test"))).await.unwrap();
                assert!(loaded(), "its load was answered");
                tokio::time::sleep(Duration::from_millis(2)).await;
                director.unload(&model, three, call(Some("a test"))).await.unwrap();
                assert!(!loaded(), "its unload was answered");
            }
        });
        stop.stop();
        let looks = runtime.block_on(looks).unwrap();
        eprintln!("{TIMES} loads and unloads by an operator beside {looks} looks at the source");
    });
}
