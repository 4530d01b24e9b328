//! Takes versions from where they lie to where they serve.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Instant;

use super::place::{Place, Shelf};
use super::{Override, Remembered, Shared};
use crate::control::call::{Call, Check, CheckOutcome};
use crate::control::lineage::Lineage;
use crate::control::manifest::Manifest;
use crate::control::manifest_of;
use crate::control::scan;
use crate::control::source::ModelListing;
use crate::control::version::{Checked, PrepareError, Warmed, open_model};
use crate::control::view::Life;
use crate::domain::{
    Digest, ErrorKind, Failure, ModelName, ModelSettings, Signature, Version, VersionPolicy,
};
use crate::engine::release_memory;
use crate::observe::resident_bytes;

/// Newest versions that are loaded from a source that is no folder, where nobody says how many.
const REMOTE_VERSIONS_LATEST: usize = 3;

/// Which bytes are taken for a version that was seen before.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Accept {
    /// Those seen first; others are quarantined.
    Pinned,
    /// These, whatever was seen first.
    Digest(Digest),
    /// Any: somebody asked for what is there now.
    Any,
}

/// How one version is loaded.
#[derive(Clone, Copy)]
pub(super) struct How<'a> {
    accept: Accept,
    /// May not differ in its signature from what answers now, whatever its number.
    strict: bool,
    /// Of the source, so that the same files are not tried again by themselves.
    fingerprint: Option<&'a str>,
    call: &'a Call,
}

impl How<'_> {
    /// Notes which files were tried. What was not found by looking at the source (a client's own
    /// files, say) leaves what is known of the source as it is.
    fn tried(&self, record: &mut super::Record) {
        if let Some(fingerprint) = self.fingerprint {
            record.fingerprint = Some(fingerprint.to_owned());
        }
    }
}

impl Shared {
    /// A client's load of a whole model: what is there now, or what it brought.
    pub(super) fn load(
        &self,
        model: &ModelName,
        brought: &Override,
        call: &Call,
    ) -> Result<(), Failure> {
        let loaded = self.under_busy(model, || self.load_locked(model, brought, call));
        if let Err(failure) = &loaded {
            let mut models = self.models.lock();
            let known = models.entry(model.clone()).or_default();
            known.problem.clone_from(&failure.message);
            // A name that was only asked for is not part of the repository.
            if failure.kind == ErrorKind::NotFound && known.versions.is_empty() {
                models.remove(model);
            }
        }
        loaded.map_err(|failure| {
            let message = format!("failed to load '{model}': {}", failure.message);
            Failure { message, ..failure }
        })
    }

    /// What the source lists of a model, as far as it is settled, new and wanted.
    pub(super) fn reconcile(
        &self,
        model: &ModelName,
        listed: &ModelListing,
        call: &Call,
    ) -> Result<(), Failure> {
        let done = self.under_busy(model, || self.reconcile_locked(model, listed, call));
        if let Err(failure) = &done {
            let mut models = self.models.lock();
            models.entry(model.clone()).or_default().problem.clone_from(&failure.message);
        }
        done
    }

    fn under_busy<T>(&self, model: &ModelName, work: impl FnOnce() -> T) -> T {
        let busy = self.busy(model);
        let _one = busy.lock();
        let loading = self.loading.read();
        let done = work();
        drop(loading);
        self.sweep();
        done
    }

    fn reconcile_locked(
        &self,
        model: &ModelName,
        listed: &ModelListing,
        call: &Call,
    ) -> Result<(), Failure> {
        let settled = listed.versions.iter().filter(|(_, at)| at.settled && at.problem.is_none());
        let there: BTreeMap<Version, String> = settled
            .map(|(version, at)| (*version, format!("{} {}", at.fingerprint, listed.config)))
            .collect();
        for (version, at) in &listed.versions {
            if let Some(problem) = &at.problem {
                self.enter_if(model, *version, Life::Failed, problem, |record| !record.serves());
            }
        }
        if listed.versions.is_empty() {
            let missing = || "it has no version: no folder is named by a number".to_owned();
            return Err(Failure::invalid(listed.problem.clone().unwrap_or_else(missing)));
        }
        let new = |version: &Version| {
            let models = self.models.lock();
            let record = models.get(model).and_then(|known| known.versions.get(version));
            record.is_none_or(|record| record.fingerprint.as_ref() != there.get(version))
        };
        if there.keys().any(new) {
            self.clear_problem(model);
            let versions: Vec<Version> = there.keys().copied().collect();
            let shelf = Shelf::new(self, model);
            let policy = shelf.policy(versions.last().copied())?;
            let mut kept = self.overseer().named(model, true);
            kept.extend(listed.labels.values());
            kept.extend(scan::chosen(&versions, policy.as_ref()));
            // The highest first: it is what most callers get.
            for (version, fingerprint) in there.iter().rev() {
                if !kept.contains(version) || !self.is_wanted(model, *version) {
                    // It stays known, so that it can be loaded by its number.
                    self.with_record(model, *version, |record| {
                        record.fingerprint = Some(fingerprint.clone());
                        record.left_out |= record.state == Life::Discovered;
                    });
                } else if new(version) {
                    let fingerprint = Some(fingerprint.as_str());
                    let how = How { accept: Accept::Pinned, strict: false, fingerprint, call };
                    // Reported where it fails; the next one may do.
                    drop(shelf.load(*version, how));
                }
            }
            release_memory();
        }
        self.overseer().aliases(model, &listed.labels, call);
        self.retire_surplus(model, listed, call)
    }

    /// Retires what neither the retention keeps nor anything names any more.
    fn retire_surplus(
        &self,
        model: &ModelName,
        listed: &ModelListing,
        call: &Call,
    ) -> Result<(), Failure> {
        let loaded: Vec<Version> =
            self.board.loaded(model).iter().map(|served| served.version).collect();
        let Some(policy) = Shelf::new(self, model).policy(None)? else { return Ok(()) };
        let mut kept: BTreeSet<Version> =
            scan::chosen(&loaded, Some(&policy)).into_iter().collect();
        kept.extend(listed.labels.values());
        self.retire_others(model, &kept, true, call);
        Ok(())
    }

    pub(super) fn retention(&self) -> Option<VersionPolicy> {
        match (self.preparer.settings().versions_latest, self.source.local()) {
            (0, Some(_)) => None,
            (0, None) => Some(VersionPolicy::Latest(REMOTE_VERSIONS_LATEST)),
            (count, _) => Some(VersionPolicy::Latest(count)),
        }
    }

    /// Whether nobody unloaded it on purpose.
    fn is_wanted(&self, model: &ModelName, version: Version) -> bool {
        self.overseer().remembered(model, version).is_none_or(|what| what.wanted)
    }

    fn clear_problem(&self, model: &ModelName) {
        self.models.lock().entry(model.clone()).or_default().problem.clear();
    }

    fn load_locked(
        &self,
        model: &ModelName,
        brought: &Override,
        call: &Call,
    ) -> Result<(), Failure> {
        if self.source.local().is_none() && brought.files.is_empty() {
            return self.load_remote(model, brought, call);
        }
        let place = match brought.files.is_empty() {
            true => Place::here(self),
            false => self.brought(model, brought)?,
        };
        let folder = open_model(&place.repository, model).map_err(|error| match error {
            PrepareError::Folder { what: "model's folder", .. } => {
                Failure::not_found("it is not in the repository")
            }
            other => refused(&other),
        })?;
        let manifest = manifest_of(&place.repository, model, brought.config.as_deref())?;
        let there = place
            .repository
            .versions(&folder)
            .map_err(|error| Failure::invalid(format!("its folder cannot be read: {error}")))?;
        let policy = manifest.settings.versions.clone().or_else(|| self.retention());
        let chosen = scan::chosen(&there, policy.as_ref());
        if chosen.is_empty() {
            return Err(Failure::invalid("it has no version: no folder is named by a number"));
        }
        self.announce(model, &chosen);
        let mut latest = Ok(());
        // The highest first: it is what most callers get.
        for (at, version) in chosen.iter().rev().enumerate() {
            let how = How { accept: Accept::Any, strict: false, fingerprint: None, call };
            let done = self.load_version(&place, model, *version, &manifest, how);
            if at == 0 {
                latest = done;
            }
        }
        // A refused load takes nothing out of service: a broken new version must not end the old.
        if latest.is_ok() {
            // As the client's configuration has it: nothing is kept warm besides.
            self.retire_others(model, &chosen.iter().copied().collect(), false, call);
        }
        release_memory();
        latest
    }

    /// A client's load of a model that lies elsewhere: what the source has now.
    fn load_remote(
        &self,
        model: &ModelName,
        brought: &Override,
        call: &Call,
    ) -> Result<(), Failure> {
        if brought.config.is_some() {
            return Err(Failure::unsupported(
                "a configuration can be given only with files, or for a model in a folder",
            ));
        }
        let listing = self.wait(self.source.list())?;
        let listed = listing.models.get(model);
        let listed = listed.ok_or_else(|| Failure::not_found("it is not in the repository"))?;
        self.reconcile_locked(model, listed, call)?;
        match self.board.loaded(model).is_empty() {
            true => Err(Failure::invalid("none of its versions could be loaded")),
            false => Ok(()),
        }
    }

    /// One version, by an operator's word.
    pub(super) fn load_one(
        &self,
        model: &ModelName,
        version: Version,
        accept: Accept,
        call: &Call,
    ) -> Result<(), Failure> {
        self.under_busy(model, || {
            if self.source.local().is_some() && open_model(&self.repository(), model).is_err() {
                let message = format!("model '{model}' is not in the repository");
                return Err(Failure::not_found(message));
            }
            let how = How { accept, strict: true, fingerprint: None, call };
            let done = Shelf::new(self, model).load(version, how);
            release_memory();
            done
        })
    }

    /// A version that served before the restart, from the copy that is here.
    pub(super) fn restore(&self, model: &ModelName, version: Version) -> Result<(), Failure> {
        self.under_busy(model, || {
            let what = self.overseer().remembered(model, version);
            let what = what.ok_or_else(|| Failure::not_found("nothing is remembered of it"))?;
            let started = Instant::now();
            let restored = self
                .preparer
                .recall(what.digest, what.report.clone())
                .map_err(|error| refused(&error))?;
            self.with_record(model, version, |record| {
                record.lineage = what.lineage.clone();
                record.checks.clone_from(&what.checks);
                note(record, &restored);
                record.enter(Life::Loading, "");
            });
            let served =
                self.preparer.load(model, version, &restored, &what.settings, &self.observer);
            match served {
                Ok((served, _)) => {
                    let may = self.overseer().may_serve(model, version, what.digest);
                    self.put(Arc::new(served), may, started);
                    Ok(())
                }
                Err(error) => {
                    self.enter(model, version, Life::Failed, &error.to_string());
                    Err(refused(&error))
                }
            }
        })
    }

    /// Shows the chosen versions as loading, unless they serve, and forgets failed ones that are
    /// no longer chosen.
    fn announce(&self, model: &ModelName, chosen: &[Version]) {
        self.clear_problem(model);
        let mut models = self.models.lock();
        let known = models.entry(model.clone()).or_default();
        known.versions.retain(|version, record| record.serves() || chosen.contains(version));
        for version in chosen {
            let record = known.versions.entry(*version).or_insert_with(super::Record::new);
            if !record.serves() {
                record.enter(Life::Discovered, "");
            }
        }
    }

    pub(super) fn load_version(
        &self,
        place: &Place,
        model: &ModelName,
        version: Version,
        manifest: &Manifest,
        how: How<'_>,
    ) -> Result<(), Failure> {
        let started = Instant::now();
        let before = self.board.served(model, version);
        let result = self.prepare(place, model, version, manifest, how);
        match result {
            Ok(Prepared::Same) => {
                self.with_record(model, version, |record| {
                    how.tried(record);
                    if record.serves() {
                        let state = record.state;
                        record.enter(state, "");
                    }
                });
                Ok(())
            }
            Ok(Prepared::New(served)) => {
                self.with_record(model, version, |record| how.tried(record));
                let may = self.overseer().may_serve(model, version, served.digest);
                let state = self.put(Arc::new(*served), may, started);
                self.overseer().entered(model, version, state, "", how.call);
                Ok(())
            }
            Err(problem) => Err(self.failed(model, version, before.is_some(), problem, how)),
        }
    }

    /// Puts a loaded version in service, or beside it.
    fn put(&self, served: Arc<crate::route::Served>, may_serve: bool, started: Instant) -> Life {
        let (model, version) = (served.model.clone(), served.version);
        let (engine, digest, batched) = (served.engine, served.digest, served.signature.batched);
        let took = started.elapsed();
        served.stats.loaded_in(took);
        served.stats.set_gauges(Box::new(served.lane.gauges()));
        let replaced = self.board.put(served, !may_serve);
        let state = if may_serve { Life::Ready } else { Life::Held };
        let reason = if may_serve { "" } else { "loaded, and waits to be approved" };
        self.enter(&model, version, state, reason);
        tracing::info!(%model, %version, engine, %digest, batched, ?took, held = !may_serve, "version ready");
        if let Some(replaced) = replaced {
            self.drop_aside(replaced);
        }
        state
    }

    fn failed(
        &self,
        model: &ModelName,
        version: Version,
        serves: bool,
        problem: Problem,
        how: How<'_>,
    ) -> Failure {
        let reason = problem.reason;
        tracing::error!(%model, %version, reason, "version not loaded");
        self.observer.load_failed();
        self.with_record(model, version, |record| {
            how.tried(record);
            // What may be otherwise next time is tried again.
            if how.fingerprint.is_some() && !problem.lasting {
                record.fingerprint = None;
            }
            match serves {
                true => {
                    let state = record.state;
                    record.enter(state, &format!("still the one loaded before: {reason}"));
                }
                false => record.enter(problem.state, &reason),
            }
        });
        self.overseer().entered(model, version, problem.state, &reason, how.call);
        Failure::new(problem.kind, format!("version {version}: {reason}"))
    }

    /// The version, ready to be put in service.
    fn prepare(
        &self,
        place: &Place,
        model: &ModelName,
        version: Version,
        manifest: &Manifest,
        how: How<'_>,
    ) -> Result<Prepared, Problem> {
        let before = self.board.served(model, version);
        let progress = |state: Life| {
            if before.is_none() {
                self.enter(model, version, state, "");
            }
        };
        progress(Life::Fetching);
        let checked =
            self.preparer.check(&place.repository, model, version, manifest, &progress)?;
        let remembered = self.overseer().remembered(model, version);
        let pinned = remembered.as_ref().map(|what| what.digest);
        if let Some(pinned) = pinned.filter(|pinned| *pinned != checked.digest) {
            let taken = match how.accept {
                Accept::Any => true,
                Accept::Digest(digest) => digest == checked.digest,
                Accept::Pinned => !self.preparer.settings().pin_digests,
            };
            if !taken {
                return Err(Problem::quarantine(pinned, checked.digest));
            }
        }
        let settings = &manifest.settings;
        if let Some(before) = &before
            && before.digest == checked.digest
            && before.settings == *settings
        {
            // Its profile is not one of the bytes that the digest is of.
            if let Some(watch) = &before.watch {
                watch.given(checked.reference.clone());
            }
            return Ok(Prepared::Same);
        }
        let mut checks = checks_of(&checked);
        checks.push(self.siblings(model, version, &checked.signature, settings, how.strict)?);
        self.room_for(&checked)?;
        let lineage = self.lineage(model, version, place, checked.lineage.clone());
        self.with_record(model, version, |record| {
            note(record, &checked);
            record.lineage = lineage.clone();
            record.checks.clone_from(&checks);
        });
        let before_bytes = resident_bytes();
        progress(Life::Loading);
        let (served, warmed) =
            self.preparer.load(model, version, &checked, settings, &self.observer)?;
        checks.extend(recorded_inputs(&warmed));
        progress(Life::Warming);
        let held = resident_bytes().saturating_sub(before_bytes);
        self.with_record(model, version, |record| {
            record.memory_measured = Some(held);
            record.checks.clone_from(&checks);
        });
        let what = Remembered {
            digest: checked.digest,
            settings: settings.clone(),
            report: checked.into_report(),
            submitter: submitter(&lineage, how.call),
            lineage,
            checks,
            source: self.source.describe(),
            wanted: true,
        };
        self.overseer()
            .remember(model, version, &what, how.call)
            .map_err(|refusal| Problem::passing(Failure::invalid(refusal.to_string())))?;
        Ok(Prepared::New(Box::new(served)))
    }

    /// Where the version comes from, by its own files and by what a registry says of it.
    fn lineage(&self, model: &ModelName, version: Version, place: &Place, own: Lineage) -> Lineage {
        if place.brought || self.source.local().is_some() {
            return own.bounded();
        }
        match self.wait(self.source.lineage(model, version)) {
            Ok(said) => own.merged(said).bounded(),
            Err(failure) => {
                let reason = failure.message;
                tracing::warn!(%model, %version, reason, "the source did not tell its lineage");
                own.bounded()
            }
        }
    }

    /// Whether the version speaks as the one that answers now: callers must not notice a swap.
    fn siblings(
        &self,
        model: &ModelName,
        version: Version,
        signature: &Signature,
        settings: &ModelSettings,
        strict: bool,
    ) -> Result<Check, Problem> {
        let check =
            |outcome, detail: String| Check { name: "io_signature".to_owned(), outcome, detail };
        let table = self.board.table();
        let now = table.pick(model, None).ok().map(|pick| pick.served);
        let now = now.filter(|now| now.version != version);
        let Some(now) = now else { return Ok(check(CheckOutcome::Pass, String::new())) };
        let Some(difference) = now.signature.difference(signature) else {
            let detail = format!("as version {}", now.version);
            return Ok(check(CheckOutcome::Pass, detail));
        };
        let detail = format!(
            "its signature differs from that of version {}, which answers now: {difference}",
            now.version
        );
        if settings.signature_change {
            return Ok(check(CheckOutcome::Warn, detail));
        }
        // An older one beside the one that answers surprises nobody: only who names it gets it.
        match strict || version > now.version {
            true => Err(Problem::lasting(format!(
                "{detail}; set 'versions.signature_change = true' in the model's tidegate.toml if \
                 that is meant"
            ))),
            false => Ok(check(CheckOutcome::Warn, detail)),
        }
    }

    /// Whether the process has room for what the trial took.
    fn room_for(&self, checked: &Checked) -> Result<(), Problem> {
        let Some(limit) = self.preparer.settings().memory_max else { return Ok(()) };
        let free = limit.saturating_sub(resident_bytes());
        if checked.memory_bytes <= free {
            return Ok(());
        }
        let mib = |bytes: u64| bytes >> 20;
        Err(Problem::passing(Failure::new(
            ErrorKind::Unavailable,
            format!(
                "it took {} MiB in its trial and {} MiB are free: unload another version first",
                mib(checked.memory_bytes),
                mib(free)
            ),
        )))
    }
}

enum Prepared {
    /// The one that serves is the same.
    Same,
    New(Box<crate::route::Served>),
}

/// Why a version was not loaded.
struct Problem {
    state: Life,
    reason: String,
    kind: ErrorKind,
    /// The same bytes would fail again.
    lasting: bool,
}

impl Problem {
    fn lasting(reason: String) -> Self {
        Self { state: Life::Failed, reason, kind: ErrorKind::InvalidInput, lasting: true }
    }

    fn passing(failure: Failure) -> Self {
        let Failure { kind, message: reason, .. } = failure;
        Self { state: Life::Failed, reason, kind, lasting: false }
    }

    fn quarantine(first: Digest, now: Digest) -> Self {
        let reason = format!(
            "its bytes changed: first seen as {first}, now {now}; give it a new number, or load it \
             with 'accept_digest' if that is meant"
        );
        let kind = ErrorKind::InvalidInput;
        Self { state: Life::Quarantined, reason, kind, lasting: true }
    }
}

impl From<PrepareError> for Problem {
    fn from(error: PrepareError) -> Self {
        let lasting = !error.is_passing();
        let reason = error.to_string();
        Self { state: Life::Failed, reason, kind: ErrorKind::InvalidInput, lasting }
    }
}

fn note(record: &mut super::Record, checked: &Checked) {
    record.digest = Some(checked.digest);
    record.size = Some(checked.size);
    record.memory_predicted = Some(checked.memory_bytes);
    record.engine = Some(checked.engine.clone());
}

/// What a version that came so far has passed.
fn checks_of(checked: &Checked) -> Vec<Check> {
    let pass = |name: &str, detail: String| Check {
        name: name.to_owned(),
        outcome: CheckOutcome::Pass,
        detail,
    };
    let mut checks = vec![
        pass("digest", checked.digest.to_string()),
        pass("loads", format!("on {} in a child process", checked.engine)),
    ];
    let signed = checked.signed.iter();
    checks.extend(signed.map(|by| pass("signature", format!("by {}: {}", by.key, by.comment))));
    match checked.samples {
        0 => checks.push(Check {
            name: "samples".to_owned(),
            outcome: CheckOutcome::Warn,
            detail: "it brings none".to_owned(),
        }),
        count => checks.push(pass("samples", format!("{count} matched"))),
    }
    checks
}

/// How it did on recorded inputs, if there were any for it.
fn recorded_inputs(warmed: &Warmed) -> Option<Check> {
    let (ran, failed) = (warmed.ran, warmed.failed.len());
    let (outcome, detail) = match warmed.failed.last() {
        // The ledger has the inputs; here they are not quoted.
        Some(id) => (CheckOutcome::Warn, format!("{ran} ran, {failed} failed: prediction {id}")),
        None if ran == 0 => return None,
        None => (CheckOutcome::Pass, format!("{ran} ran")),
    };
    Some(Check { name: "recorded_inputs".to_owned(), outcome, detail })
}

/// Who brought a version: who trained it, if that is known, else who asked for the load.
fn submitter(lineage: &Lineage, call: &Call) -> Option<String> {
    let trained = lineage.training.as_ref().and_then(|training| training.user.clone());
    trained.or_else(|| Some(call.actor.clone()))
}

pub(super) fn refused(error: &PrepareError) -> Failure {
    Failure::invalid(error.to_string())
}
