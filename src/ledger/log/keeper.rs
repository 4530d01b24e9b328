//! The thread that brings a log onto the disk: flushes, group commits, changes of segment, and what
//! to do when one of them fails.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use super::board::Stop;
use super::disk::is_full;
use super::record::{Head, Kind, Payload};
use super::segment::{self, OldSegment, Rescued, Segment, Spare};
use super::shared::{self, Missed, Shared, unix_nanos};
use super::{Draft, OpenError, Recovery, Unrecorded, closed, reader, record, stores};
use crate::ledger::frame::SEGMENT_HEAD_BYTES;

/// Segments are looked at this often, and a log that is broken is tried again.
const TICK: Duration = Duration::from_secs(1);
/// A group that waits for those of the last one waits at most this long, and half of a sync.
const GATHER_MAX: Duration = Duration::from_millis(3);
/// The segment's mark is moved no more often.
const MARK_EVERY: Duration = Duration::from_millis(250);
/// While syncs take longer a segment grows to twice its size: nobody can write during a change.
const ROLL_SYNC_MAX: Duration = Duration::from_millis(50);
/// Syncs at the end, until nobody writes any more.
const FINISH_ROUNDS_MAX: usize = 8;

pub(super) struct Keeper {
    shared: Arc<Shared>,
    /// How many were waiting for the disk when the last sync ended, or just got their answer.
    crowd: usize,
    sync_took: Duration,
    marked_at: Instant,
    broken: bool,
    draft: Draft,
}

impl Keeper {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            crowd: 0,
            sync_took: Duration::ZERO,
            marked_at: Instant::now(),
            broken: false,
            draft: Draft::default(),
        }
    }

    /// Makes the first segment, and records what was found in the last one.
    pub(super) fn start(&mut self, found: &Recovery) -> Result<(), OpenError> {
        if let Some(free) = stores::free_bytes(&self.shared) {
            self.shared.set_low(free < self.shared.settings.free_bytes_min);
        }
        match self.mend() {
            Ok(()) => {}
            Err(error) if is_full(&error) => self.break_off(&error),
            Err(error) => {
                let path = self.shared.settings.dir.join(reader::SEGMENTS);
                return Err(OpenError::Io { path, error });
            }
        }
        if found.cut_bytes > 0 || found.damage.is_some() {
            self.recovered(found);
        }
        Ok(())
    }

    fn recovered(&mut self, found: &Recovery) {
        let body = serde_json::json!({ "cut_bytes": found.cut_bytes, "damage": found.damage });
        let now = unix_nanos(SystemTime::now());
        let head = Head { count: found.cut_bytes, time_ns: now, ..of_kind(Kind::Recovered) };
        let payload = Payload { body: body.to_string().into(), ..Payload::default() };
        record::other(&mut self.draft, &head, &payload, &salt());
        if let Err(error) = self.shared.append_own(&self.draft) {
            let log = self.shared.settings.name;
            tracing::error!(log, %error, "what was recovered is not recorded");
        }
    }

    pub(super) fn spawn(mut self) -> io::Result<JoinHandle<()>> {
        let shared = self.shared.clone();
        shared::spawn(&shared, "keeper", move |_| self.run())
    }

    fn run(&mut self) {
        let mut tick_at = Instant::now() + TICK;
        loop {
            let want = self.shared.board.wait(tick_at);
            match want.stop {
                Some(Stop::Close) => self.finish(),
                Some(Stop::Drop) => {}
                None => {}
            }
            if want.stop.is_some() {
                break;
            }
            if want.due {
                tick_at = Instant::now() + TICK;
            }
            if self.broken {
                if want.due {
                    self.probe();
                }
                continue;
            }
            if want.mend {
                self.mend_or_break();
            }
            if want.write {
                self.write();
            }
            if want.sync {
                self.gather();
                self.sync();
                self.roll();
            }
            if want.due {
                self.roll();
            }
            self.gap();
        }
        self.shared.stores.stop();
    }

    fn write(&self) {
        let mut active = self.shared.active.lock();
        self.shared.write_pending(&mut active);
        self.shared.give_back(active);
    }

    /// Gives those who got their answer together the time to come again together.
    ///
    /// Callers that wait for the disk are mostly the same few. When half of them come just after a
    /// sync began, two halves take turns and every sync does half of what it could.
    fn gather(&self) {
        if self.crowd > 1 && self.shared.board.crowd() > 0 {
            let most = (self.sync_took / 2).min(GATHER_MAX);
            self.shared.board.gather(self.crowd, most / 4, most);
        }
    }

    /// Writes what is pending and brings all that is written onto the disk; whether it is there.
    fn sync(&mut self) -> bool {
        let shared = self.shared.clone();
        shared.disarm();
        let began = Instant::now();
        let mut active = shared.active.lock();
        shared.write_pending(&mut active);
        let written_seq = shared.board.written_seq();
        let Some(segment) = active.segment.as_ref().filter(|_| active.failed.is_none()) else {
            drop(active);
            return false;
        };
        let old = OldSegment::from(segment);
        if old.end == old.synced_end {
            shared.counts.all_synced();
            shared.give_back(active);
            shared.board.synced(written_seq);
            return true;
        }
        shared.counts.sync_begins();
        shared.give_back(active);
        let done = self.mark(&old).and_then(|()| old.file.sync());
        self.sync_took = began.elapsed();
        shared.counts.sync_ended(self.sync_took, done.is_ok());
        match done {
            Ok(()) => {
                if let Some(segment) = &mut shared.active.lock().segment {
                    segment.synced_end = old.end;
                }
                let answered = shared.board.synced(written_seq);
                self.crowd = answered + shared.board.crowd();
                shared.answered();
                true
            }
            Err(error) => {
                self.fail(error);
                false
            }
        }
    }

    fn mark(&mut self, old: &OldSegment) -> io::Result<()> {
        if old.synced_end == SEGMENT_HEAD_BYTES as u64 || self.marked_at.elapsed() < MARK_EVERY {
            return Ok(());
        }
        self.marked_at = Instant::now();
        segment::mark(&*old.file, old.synced_end)
    }

    /// Nothing more is written to this segment.
    fn fail(&mut self, error: io::Error) {
        self.shared.active.lock().failed = Some(error);
        self.mend_or_break();
    }

    fn mend_or_break(&mut self) {
        let log = self.shared.settings.name;
        {
            let active = self.shared.active.lock();
            let Some(error) = &active.failed else { return };
            tracing::error!(log, %error, "a segment of the ledger failed, going on in a new one");
        }
        if let Err(error) = self.mend() {
            self.break_off(&error);
        }
    }

    fn break_off(&mut self, error: &io::Error) {
        let log = self.shared.settings.name;
        tracing::error!(log, %error, "the ledger cannot be written, records are refused");
        let why = if is_full(error) {
            Unrecorded::DiskFull
        } else {
            Unrecorded::Broken(error.to_string())
        };
        self.broken = true;
        self.shared.break_with(&why);
    }

    /// Tries whether a log that is broken can be written again.
    fn probe(&mut self) {
        let enough = stores::free_bytes(&self.shared)
            .is_none_or(|free| self.shared.settings.free_bytes_min <= free);
        if enough && self.mend().is_ok() {
            self.broken = false;
            let missed = self.shared.take_missed();
            if let Some(missed) = missed {
                gap(&mut self.draft, missed);
            }
            self.shared.resume(missed.map(|_| &self.draft));
            let log = self.shared.settings.name;
            tracing::info!(log, "the ledger can be written again");
        }
    }

    /// Goes on in a new segment, which begins with the first record that is not known to be on the
    /// disk. On an error things are as before, but that the group is gone: the log breaks then.
    fn mend(&mut self) -> io::Result<()> {
        let shared = self.shared.clone();
        let (old, group, group_end) = {
            let mut active = shared.active.lock();
            let old = active.segment.as_ref().map(OldSegment::from);
            (old, std::mem::take(&mut active.group), active.group_end)
        };
        let seqs = shared.board.synced_seq()..shared.board.written_seq();
        let next_seq = if group.is_empty() { seqs.end } else { group_end };
        let rescued = |old, seqs| Rescued {
            old,
            seqs,
            group: &group,
            writer: shared.writer,
            log: shared.settings.name,
        };
        let mut made = self.rescue(&rescued(old.as_ref(), seqs.clone()))?;
        let lost = made.is_none();
        if lost {
            let log = shared.settings.name;
            tracing::error!(
                log,
                from = seqs.start,
                to = seqs.end,
                "records that were handed over may not have reached the disk"
            );
            made = self.rescue(&rescued(None, seqs.end..seqs.end))?;
        }
        let Some((segment, named)) = made else { return Err(io::ErrorKind::InvalidData.into()) };
        let path = segment.path.clone();
        let failed = self.install(segment, named, next_seq);
        match (failed, old) {
            (Some(error), _) => Err(error),
            (None, Some(old)) if old.path != path => {
                // Cut where the new one begins. The sync of that is no second try: whatever the
                // old one keeps was on the disk before.
                let len = if lost { old.end } else { old.synced_end };
                shared.stores.seal(old, len);
                Ok(())
            }
            (None, _) => Ok(()),
        }
    }

    /// A segment with what is to be taken along, and whether its name is on the disk; `None` when
    /// what is to be taken along cannot be read.
    fn rescue(&self, from: &Rescued<'_>) -> io::Result<Option<(Segment, io::Result<()>)>> {
        let shared = &*self.shared;
        let spare = match shared.stores.take() {
            Some(spare) => spare,
            None => shared.stores.prepare(shared)?,
        };
        let discard = |spare: Spare, error| {
            spare.discard(&*shared.disk);
            Err(error)
        };
        let end = match spare.rescue(from) {
            Ok(Ok(end)) => end,
            Ok(Err(segment::Lost)) => {
                spare.discard(&*shared.disk);
                return Ok(None);
            }
            Err(error) => return discard(spare, error),
        };
        match spare.adopt(&*shared.disk, &shared.settings, from.seqs.start, end) {
            Ok(segment) => {
                let folder = shared.settings.dir.join(reader::SEGMENTS);
                Ok(Some((segment, shared.disk.sync_dir(&folder))))
            }
            Err((spare, error)) => discard(spare, error),
        }
    }

    /// Has callers write to a segment that has everything up to `next_seq`.
    fn install(
        &mut self,
        mut segment: Segment,
        named: io::Result<()>,
        next_seq: u64,
    ) -> Option<io::Error> {
        let shared = &*self.shared;
        let mut active = shared.active.lock();
        let failed = named.err();
        if failed.is_none() {
            segment.synced_end = segment.end;
        }
        active.failed = failed.as_ref().map(|error| error.kind().into());
        active.segment = Some(segment);
        active.group_end = next_seq;
        shared.board.wrote(next_seq);
        if failed.is_none() {
            shared.counts.all_synced();
            shared.board.synced(next_seq);
        }
        shared.give_back(active);
        failed
    }

    /// Begins the next segment when this one has its size or its age.
    fn roll(&mut self) {
        let shared = self.shared.clone();
        let settings = &shared.settings;
        // Whoever asked and got nothing, for want of a spare, asks again.
        let asked = shared.seal_asked.swap(false, Ordering::AcqRel);
        let due = shared.active.lock().segment.as_ref().is_some_and(|segment| {
            let patient = self.sync_took > ROLL_SYNC_MAX;
            let size = if patient { 2 * settings.segment_bytes } else { settings.segment_bytes };
            let old = settings.segment_age_max <= segment.began.elapsed();
            segment.first_seq < shared.board.written_seq() && (size <= segment.end || old || asked)
        });
        if !due {
            return;
        }
        // Without a spare this one grows until there is one.
        let Some(spare) = shared.stores.take() else { return };
        // Most of it without holding anybody up.
        if !self.sync() {
            shared.stores.put_back(spare, &shared);
            return;
        }
        match self.change(spare) {
            Ok(Some(old)) => match shared.disk.sync_dir(&settings.dir.join(reader::SEGMENTS)) {
                Ok(()) => shared.stores.seal(old.clone(), old.end),
                Err(error) => {
                    // Its turn comes when the log is opened again.
                    self.fail(error);
                }
            },
            Ok(None) => {}
            Err(error) => self.fail(error),
        }
    }

    /// Puts the next segment in the place of this one, once all of this one is on the disk. An error
    /// is one of this segment; that the next cannot begin is none.
    fn change(&self, spare: Spare) -> io::Result<Option<OldSegment>> {
        let shared = &*self.shared;
        let mut active = shared.active.lock();
        let failed = active.failed.is_some();
        let Some(segment) = active.segment.as_mut().filter(|_| !failed) else {
            shared.stores.put_back(spare, shared);
            return Ok(None);
        };
        if segment.synced_end < segment.end
            && let Err(error) = segment.file.sync()
        {
            shared.stores.put_back(spare, shared);
            return Err(error);
        }
        segment.synced_end = segment.end;
        let old = OldSegment::from(&*segment);
        let next_seq = shared.board.written_seq();
        shared.board.synced(next_seq);
        match spare.begin(&*shared.disk, &shared.settings, shared.writer, next_seq) {
            Ok(next) => {
                active.segment = Some(next);
                shared.counts.all_synced();
                shared.give_back(active);
                Ok(Some(old))
            }
            Err((spare, error)) => {
                shared.give_back(active);
                let log = shared.settings.name;
                tracing::warn!(log, %error, "the next segment cannot begin yet");
                spare.discard(&*shared.disk);
                Ok(None)
            }
        }
    }

    /// Records what was answered without a record.
    fn gap(&mut self) {
        if self.broken {
            return;
        }
        let Some(missed) = self.shared.take_missed() else { return };
        gap(&mut self.draft, missed);
        if self.shared.append_own(&self.draft).is_err() {
            self.shared.put_missed(missed);
        }
    }

    /// Everything onto the disk, sealed, and nobody left waiting.
    fn finish(&mut self) {
        let shared = self.shared.clone();
        if self.broken {
            self.probe();
        }
        self.gap();
        for _ in 0..FINISH_ROUNDS_MAX {
            if self.broken || (self.sync() && self.end()) {
                break;
            }
        }
        shared.break_with(&closed());
        shared.stores.stop();
        shared.stores.finish(&shared);
        shared.end();
    }

    /// Seals the last segment, if nobody has written to it since the sync.
    fn end(&self) -> bool {
        let shared = &*self.shared;
        let mut active = shared.active.lock();
        if active.segment.as_ref().is_none_or(|segment| segment.synced_end < segment.end) {
            return false;
        }
        shared.pending.lock().refusals.broken = Some(closed());
        let Some(segment) = active.segment.take() else { return false };
        drop(active);
        if segment.first_seq == shared.board.written_seq() {
            if let Err(error) = shared.disk.remove(&segment.path) {
                tracing::warn!(path = %segment.path.display(), %error, "an empty segment stays");
            }
        } else {
            let end = segment.end;
            shared.stores.seal(OldSegment::from(&segment), end);
        }
        true
    }
}

fn of_kind(kind: Kind) -> Head {
    Head { kind: kind.into(), ..Head::default() }
}

fn gap(draft: &mut Draft, missed: Missed) {
    let head = Head {
        time_ns: unix_nanos(missed.first),
        until_ns: unix_nanos(missed.last),
        count: missed.count,
        ..of_kind(Kind::Gap)
    };
    record::other(draft, &head, &Payload::default(), &salt());
}

fn salt() -> [u8; 32] {
    rand::random()
}
