//! What is done with the files of the predictions' log while the gateway runs: Parquet is made of
//! them, and what has been kept for long enough goes. One thread, behind everything that serves.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant, SystemTime};

use super::erase::Hook;
use super::frame::WriterId;
use super::log::Unrecorded;
use super::parquet::{self, Converter, ConverterSettings, Manifest, Progress};
use super::proofs::now_ns;
use super::reader;
use super::record::{Head, Kind, Payload};
use super::retention::{DaysOf, Delivered, Hold, HoldError, Holds, Retention};
use super::{Ledger, PREDICTIONS};
use crate::observe::page::{Family, Kind as Shown};

/// How often the log's folder is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How often it is asked what has been kept for long enough.
const RETENTION_EVERY: Duration = Duration::from_secs(if cfg!(test) { 0 } else { 60 });
/// How long the end of the program waits for the last segment to become Parquet.
const FINISH_MAX: Duration = Duration::from_secs(2);
/// How long the record of a change may take to the disk, and how often that is looked at.
const SYNC_MAX: Duration = Duration::from_secs(10);
const SYNC_POLL: Duration = Duration::from_millis(5);

/// The thread, and what others ask of it.
pub(super) struct Upkeep {
    converter: Converter,
    holds: Arc<Holds>,
    gone: Arc<Gone>,
}

/// What went as its retention says.
#[derive(Default)]
struct Gone {
    records: AtomicU64,
    payloads: AtomicU64,
}

/// Why a hold was not put or lifted.
#[derive(Debug, thiserror::Error)]
pub enum HoldingError {
    #[error(transparent)]
    Hold(#[from] HoldError),
    #[error("it cannot be recorded: {0}")]
    Unrecorded(#[from] Unrecorded),
    #[error("its record is not on the disk yet")]
    Unsynced,
    #[error("this ledger removes nothing")]
    NoUpkeep,
}

impl Ledger {
    /// Starts the thread. `days_of` says how long a model keeps its records, if it says anything.
    ///
    /// # Errors
    /// When there is no thread, or the holds cannot be read: then nothing may go.
    pub fn start_upkeep(self: &Arc<Self>, days_of: DaysOf) -> io::Result<()> {
        let (dir, log) = (self.settings.dir.clone(), self.settings.dir.join(PREDICTIONS));
        let root = dir.join(parquet::FOLDER);
        let holds = Arc::new(Holds::open(&dir).map_err(io::Error::other)?);
        let gone = Arc::new(Gone::default());
        let weak = Arc::downgrade(self);
        let retention = Retention {
            log: log.clone(),
            name: PREDICTIONS,
            parquet: root.clone(),
            days: self.settings.retention_days,
            days_of: Arc::clone(&days_of),
            delivered: delivered(weak.clone()),
            holds: Arc::clone(&holds),
            announce: Box::new(move |head, payload| {
                weak.upgrade().is_some_and(|ledger| ledger.record_change(head, payload).is_ok())
            }),
        };
        let settings =
            ConverterSettings { log: log.clone(), root: root.clone(), days_of, every: LOOK_EVERY };
        let between = remover(retention, Arc::clone(&gone));
        let converter = Converter::start(settings, between)?;
        self.set_erasure_hook(erased(self.writer, log, root));
        drop(self.upkeep.set(Upkeep { converter, holds, gone }));
        Ok(())
    }

    /// How far the conversion to Parquet is; `None` when there is none.
    pub fn parquet(&self) -> Option<Progress> {
        self.upkeep.get().map(|upkeep| upkeep.converter.progress())
    }

    /// All holds.
    pub fn holds(&self) -> Vec<Hold> {
        self.upkeep.get().map(|upkeep| upkeep.holds.all()).unwrap_or_default()
    }

    /// Puts a hold. Waits for the disk.
    ///
    /// # Errors
    /// When it is none, or cannot be written down or recorded; written down, it holds.
    pub fn put_hold(&self, hold: Hold) -> Result<(), HoldingError> {
        let upkeep = self.upkeep.get().ok_or(HoldingError::NoUpkeep)?;
        // It holds before it is recorded: nothing goes in between.
        upkeep.holds.put(hold.clone())?;
        self.record_change(&head("hold.put", &hold, &hold.by), &body(&hold, &hold.reason))
    }

    /// Lifts a hold. Waits for the disk.
    ///
    /// # Errors
    /// When there is none of the name, or it cannot be recorded: then it still holds.
    pub fn lift_hold(&self, name: &str, by: &str, reason: &str) -> Result<Hold, HoldingError> {
        let upkeep = self.upkeep.get().ok_or(HoldingError::NoUpkeep)?;
        let unknown = || HoldError::Unknown(name.to_owned());
        let hold = upkeep.holds.all().into_iter().find(|hold| hold.name == name);
        let hold = hold.ok_or_else(unknown)?;
        self.record_change(&head("hold.lift", &hold, by), &body(&hold, reason))?;
        Ok(upkeep.holds.lift(name)?)
    }

    /// For the metrics page.
    pub(super) fn upkeep_families(&self) -> Vec<Family> {
        let Some(upkeep) = self.upkeep.get() else { return Vec::new() };
        let progress = upkeep.converter.progress();
        let family = |name, kind, help, value: u64| {
            let mut family = Family::new(name, kind, help);
            family.push(Vec::new(), value as f64);
            family
        };
        vec![
            family(
                "tidegate_ledger_parquet_segments_total",
                Shown::Counter,
                "Segments that became Parquet",
                progress.segments,
            ),
            family(
                "tidegate_ledger_parquet_waiting",
                Shown::Gauge,
                "Sealed segments that are not Parquet yet",
                progress.waiting,
            ),
            family(
                "tidegate_ledger_parquet_failures_total",
                Shown::Counter,
                "Times that a segment could not be made Parquet, or removed",
                progress.failures,
            ),
            family(
                "tidegate_ledger_parquet_unreadable_records_total",
                Shown::Counter,
                "Records that their segments have damaged, and that are in no file",
                progress.unreadable,
            ),
            family(
                "tidegate_ledger_removed_records_total",
                Shown::Counter,
                "Records that went, as their retention says",
                upkeep.gone.records.load(Ordering::Relaxed),
            ),
            family(
                "tidegate_ledger_erased_payloads_total",
                Shown::Counter,
                "Payloads that went before their records, as their model's retention says",
                upkeep.gone.payloads.load(Ordering::Relaxed),
            ),
        ]
    }

    /// The logs are sealed: what that made is converted, if it is quick, and nothing more removed.
    pub(super) async fn finish_upkeep(&self) {
        if let Some(upkeep) = self.upkeep.get() {
            upkeep.converter.finish(FINISH_MAX).await;
        }
    }

    /// Records a change of what is kept, and waits until that is on the disk.
    fn record_change(&self, head: &Head, payload: &Payload) -> Result<(), HoldingError> {
        let at = self.append_admin(head, payload)?;
        let until = Instant::now() + SYNC_MAX;
        while self.admin.stats().synced_seq <= at.seq {
            self.admin.check()?;
            if Instant::now() > until {
                return Err(HoldingError::Unsynced);
            }
            std::thread::sleep(SYNC_POLL);
        }
        Ok(())
    }
}

/// A ledger that is closed removes nothing more.
fn delivered(ledger: Weak<Ledger>) -> Delivered {
    Arc::new(move || ledger.upgrade().map_or(0, |ledger| ledger.delivered_up_to()))
}

/// Looks now and then at what may go.
fn remover(mut retention: Retention, gone: Arc<Gone>) -> impl FnMut() + Send {
    let mut last: Option<Instant> = None;
    move || {
        if last.is_some_and(|last| last.elapsed() < RETENTION_EVERY) {
            return;
        }
        last = Some(Instant::now());
        match retention.step(SystemTime::now()) {
            Ok(step) => {
                gone.records.fetch_add(step.records, Ordering::Relaxed);
                gone.payloads.fetch_add(step.erased, Ordering::Relaxed);
            }
            Err(error) => tracing::warn!(%error, "records cannot be removed"),
        }
    }
}

/// Whether the Parquet of what was erased is made anew by now; the thread finds that it has to be.
fn erased(writer: WriterId, log: std::path::PathBuf, root: std::path::PathBuf) -> Hook {
    Box::new(move |name, ranges| {
        if name != PREDICTIONS {
            return Ok(());
        }
        let segments = reader::segments(&log).map_err(io::Error::other)?;
        for segment in segments.iter().filter(|segment| segment.sealed) {
            let Some(manifest) = Manifest::read(&root, writer, segment.first_seq) else { continue };
            let last = manifest.segment.last_seq.unwrap_or(segment.first_seq);
            let about = |(from, to): &(u64, u64)| *from <= last && *to > segment.first_seq;
            if ranges.iter().any(about) && !manifest.fits(segment) {
                return Err(io::Error::other("its Parquet is being made anew"));
            }
        }
        Ok(())
    })
}

fn head(action: &str, hold: &Hold, by: &str) -> Head {
    Head {
        kind: Kind::Retention.into(),
        time_ns: now_ns(),
        model: hold.model.clone().unwrap_or_default(),
        principal: by.to_owned(),
        action: action.to_owned(),
        ..Head::default()
    }
}

fn body(hold: &Hold, reason: &str) -> Payload {
    let body = serde_json::json!({ "log": PREDICTIONS, "hold": hold, "reason": reason });
    Payload { body: body.to_string().into_bytes().into(), ..Payload::default() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ledger::Settings;

    #[tokio::test]
    async fn payloads_that_go_early_leave_a_ledger_that_is_right() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(Settings::new(folder.path()), []).unwrap();
        ledger.start_notary().unwrap();
        // Of 2023, and kept for a day; the other for ever.
        ledger.start_upkeep(Arc::new(|model| Some(u32::from(model == "iris")))).unwrap();
        let about = crate::ledger::About {
            signature: None,
            engine: "",
            recording: None,
            config_revision: 0,
            subject: None,
        };
        for (id, model) in (1_u128..).zip(["iris", "digits", "iris"]) {
            let mut call = crate::ledger::tests::completion(id, "r");
            call.model = model.parse().unwrap();
            let at = ledger.append(&call, &about).unwrap().unwrap();
            ledger.predictions().synced(at).await.unwrap();
        }
        ledger.predictions().seal();
        let wanted = crate::ledger::verify::Wanted {
            dir: ledger.settings().dir.clone(),
            ..Default::default()
        };
        let until = Instant::now() + Duration::from_secs(60);
        let log = loop {
            let report = crate::ledger::verify::verify(&wanted).unwrap();
            let log = report.logs.into_iter().find(|log| log.log == PREDICTIONS).unwrap();
            let parquet = report.parquet.unwrap_or_default();
            if log.erased == 2 && parquet.stale == 0 && parquet.removed == 1 {
                break log;
            }
            assert!(Instant::now() < until, "{log:?} {parquet:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        };
        assert_eq!(log.next_seq - log.first_seq, 3);
        let upkeep = ledger.upkeep.get().unwrap();
        assert_eq!(upkeep.gone.payloads.load(Ordering::Relaxed), 2);
        // What is sealed at the end is Parquet when that is reached.
        let call = crate::ledger::tests::completion(9, "r");
        let at = ledger.append(&call, &about).unwrap().unwrap();
        ledger.predictions().synced(at).await.unwrap();
        ledger.close().await;
        let parquet = crate::ledger::verify::verify(&wanted).unwrap().parquet.unwrap();
        assert_eq!((parquet.segments, parquet.waiting), (2, 0), "{parquet:?}");
    }

    #[test]
    fn a_hold_is_recorded_when_it_is_put_and_lifted() {
        let folder = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(Settings::new(folder.path()), []).unwrap();
        assert!(matches!(ledger.lift_hold("a", "b", "c"), Err(HoldingError::NoUpkeep)));
        ledger.start_upkeep(Arc::new(|_| None)).unwrap();
        let hold = Hold {
            name: "case-1".to_owned(),
            model: Some("iris".to_owned()),
            since_ns: None,
            until_ns: Some(7),
            reason: "court".to_owned(),
            by: "counsel".to_owned(),
            put_ns: 1,
        };
        ledger.put_hold(hold.clone()).unwrap();
        assert_eq!(ledger.holds(), std::slice::from_ref(&hold));
        let other = Hold { model: None, ..hold.clone() };
        assert!(matches!(ledger.put_hold(other), Err(HoldingError::Hold(HoldError::Exists(_)))));
        assert_eq!(ledger.lift_hold("case-1", "admin", "over").unwrap(), hold);
        assert!(ledger.holds().is_empty());
        let mut said = Vec::new();
        let admin = ledger.settings().dir.join(crate::ledger::ADMIN);
        crate::ledger::export::scan::<crate::ledger::export::ExportError>(
            &admin,
            &crate::ledger::export::Selection::default(),
            |_, view| {
                said.push((view.action.to_owned(), view.principal.to_owned()));
                Ok(std::ops::ControlFlow::Continue(()))
            },
        )
        .unwrap();
        let of = |action: &str, by: &str| (action.to_owned(), by.to_owned());
        assert_eq!(said, [of("hold.put", "counsel"), of("hold.lift", "admin")]);
    }
}
