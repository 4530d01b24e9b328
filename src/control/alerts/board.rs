//! The alerts of one model: when one fires, when it is over, and who has still to be told.
//!
//! ```text
//! holds ──for_──▶ firing ──clear, or gone, for keep_firing_for──▶ resolved ──a week──▶ forgotten
//!                   │ told once, and again after repeat              │ told who was told
//! ```
//!
//! Invariants:
//! - Pure: decisions take `now`.
//! - One alert fires of each subject at most, with one id until it is resolved.
//! - A telling has a number, and so an id, before it is tried: whatever is tried again has the same.
//! - Memory is bounded: [`ALERTS_MAX`] alerts of a model; firing ones stay, resolved ones go.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::condition::{Detail, Found, Kind, Severity, Subject, summary};
use super::receiver::Receiver;
use crate::domain::{ModelName, Version};

/// Alerts of one model, resolved ones too.
pub const ALERTS_MAX: usize = 32;
/// Bytes of what is kept of a receiver's words.
const SAID_BYTES_MAX: usize = 256;
/// How long a resolved alert is shown.
pub const RESOLVED_KEPT: Duration = Duration::from_secs(7 * 86_400);
/// After a start, time for a version to load before it counts as gone.
pub const START_MAX: Duration = Duration::from_secs(600);

/// After which a telling that nobody heard is tried again.
pub const FAILED_AGAIN: Duration = Duration::from_secs(3600);

/// Why an alert is over.
const CLEAR: &str = "the condition does not hold any more";
const GONE: &str =
    "nothing judges it any more: the version, the arm, the reference or the limit went away";

/// How long something has to be so.
#[derive(Clone, Copy, Debug)]
pub struct Times {
    /// A condition, before it fires.
    pub for_: Duration,
    /// The contrary, before it is resolved.
    pub keep_firing_for: Duration,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Alert {
    /// Stays the same from its firing to its end, restarts included.
    pub id: String,
    #[schema(value_type = String)]
    pub model: ModelName,
    #[schema(value_type = String)]
    pub version: Version,
    /// `stable`, `canary`, `pinned`, a rule's name; `all` of labels.
    pub arm: String,
    pub kind: Kind,
    /// `inputs` or `outputs`; what is wrong with rows; a metric.
    pub about: String,
    pub severity: Severity,
    pub state: State,
    /// For people.
    pub summary: String,
    /// When the condition was seen first.
    #[schema(value_type = String, format = DateTime)]
    pub since: Timestamp,
    #[schema(value_type = String, format = DateTime)]
    pub fired_at: Timestamp,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>, format = DateTime)]
    pub resolved_at: Option<Timestamp>,
    /// Why it is over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolution: Option<String>,
    pub detail: Detail,
    /// By receiver.
    #[serde(default)]
    pub deliveries: BTreeMap<String, Told>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = AlertState)]
pub enum State {
    Firing,
    Resolved,
}

/// What one receiver was told of one alert.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = AlertTold)]
pub struct Told {
    /// Of the telling that it fires: 2 is the first time that this is said again.
    #[schema(minimum = 1)]
    pub number: u32,
    pub firing: Delivery,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resolved: Option<Delivery>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[schema(as = AlertDelivery)]
pub struct Delivery {
    pub state: Progress,
    /// Since when.
    #[schema(value_type = String, format = DateTime)]
    pub at: Timestamp,
    /// What the receiver said, or what is waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = AlertProgress)]
pub enum Progress {
    /// Not begun: a cool-down, or a silence.
    Waiting,
    /// Being told.
    Pending,
    Delivered,
    /// The receiver does not want it.
    Refused,
    /// Tried as often as may be.
    Failed,
    /// It was over before it was told, or nobody is there to be told.
    Skipped,
}

/// Nobody is told of a model's alerts for a while.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Silence {
    #[schema(value_type = String, format = DateTime)]
    pub until: Timestamp,
    pub reason: String,
    /// Who said so.
    pub by: String,
}

/// Which of an alert's two tellings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    Firing,
    Resolved,
}

/// What is remembered of one model.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Books {
    /// In the order of their firing.
    pub alerts: Vec<Alert>,
    /// When each receiver was told last; what cool-downs count from.
    #[serde(default)]
    pub told_at: BTreeMap<String, Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silence: Option<Silence>,
}

/// What a look changed.
#[derive(Clone, Debug, PartialEq)]
pub enum Change {
    Fired(Alert),
    Resolved(Alert),
}

/// What a look found.
#[derive(Debug, Default)]
pub struct Seen {
    pub changes: Vec<Change>,
    /// Conditions that hold, and that there was no room for.
    pub without_room: usize,
    /// Something was forgotten that was remembered.
    pub forgot: bool,
}

/// The alerts of one model.
#[derive(Debug, Default)]
pub struct Board {
    pub books: Books,
    /// Since when conditions hold that do not fire yet.
    holds: BTreeMap<Subject, Timestamp>,
    /// Since when firing ones do not hold, or are not judged by anybody.
    clear: BTreeMap<Subject, Timestamp>,
    gone: BTreeMap<Subject, Timestamp>,
    /// Firing ones that were judged since the start.
    judged: BTreeSet<Subject>,
}

/// What all looks share.
#[derive(Clone, Copy, Debug)]
pub struct Look {
    pub times: Times,
    pub now: Timestamp,
    /// When this process began to look.
    pub started: Timestamp,
    /// Alerts that may fire beside those that do, of all models.
    pub room: usize,
}

impl Alert {
    pub fn subject(&self) -> Subject {
        let (arm, about) = (self.arm.clone(), self.about.clone());
        Subject { version: self.version, arm, kind: self.kind, about }
    }

    /// Id of an event: the same however often it is tried.
    pub fn event_id(&self, phase: Phase, number: u32) -> String {
        match phase {
            Phase::Firing => format!("{}-firing-{number}", self.id),
            Phase::Resolved => format!("{}-resolved", self.id),
        }
    }

    fn end(&mut self, why: String, receivers: &[Receiver], now: Timestamp) {
        self.state = State::Resolved;
        (self.resolved_at, self.resolution) = (Some(now), Some(why));
        for (name, told) in &mut self.deliveries {
            if told.firing.state == Progress::Waiting {
                told.firing =
                    Delivery::new(Progress::Skipped, now, "it was over before it was told");
            }
            let wants = receivers.iter().any(|one| one.name == *name && one.resolved);
            let may_have = [Progress::Pending, Progress::Delivered, Progress::Failed];
            if wants && (told.number > 1 || may_have.contains(&told.firing.state)) {
                told.resolved = Some(Delivery { state: Progress::Pending, at: now, detail: None });
            }
        }
    }

    fn is_pending(&self) -> bool {
        let states =
            self.deliveries.values().flat_map(|told| [Some(&told.firing), told.resolved.as_ref()]);
        states.flatten().any(|delivery| delivery.state == Progress::Pending)
    }
}

impl Delivery {
    fn new(state: Progress, at: Timestamp, detail: impl Into<String>) -> Self {
        Self { state, at, detail: Some(detail.into()) }
    }
}

fn since(from: Timestamp, now: Timestamp) -> Duration {
    // A clock that went back has seen no time pass.
    Duration::try_from(now.duration_since(from)).unwrap_or_default()
}

fn after(from: Timestamp, wait: Duration) -> Timestamp {
    let wait = SignedDuration::try_from(wait).unwrap_or(SignedDuration::MAX);
    from.checked_add(wait).unwrap_or(Timestamp::MAX)
}

impl Board {
    pub fn of(books: Books) -> Self {
        Self { books, ..Self::default() }
    }

    pub fn firing(&self) -> impl Iterator<Item = &Alert> {
        self.books.alerts.iter().filter(|alert| alert.state == State::Firing)
    }

    /// Nothing is remembered or waited for.
    pub fn is_empty(&self) -> bool {
        self.books == Books::default() && self.holds.is_empty()
    }

    /// What fires and what is over by what was found now.
    pub fn look(
        &mut self,
        model: &ModelName,
        found: &BTreeMap<Subject, Found>,
        receivers: &[Receiver],
        look: &Look,
    ) -> Seen {
        let mut changes = self.resolve(found, receivers, look);
        let (fired, without_room) = self.fire(model, found, look);
        changes.extend(fired.into_iter().map(Change::Fired));
        Seen { changes, without_room, forgot: self.forget(look.now) }
    }

    fn resolve(
        &mut self,
        found: &BTreeMap<Subject, Found>,
        receivers: &[Receiver],
        look: &Look,
    ) -> Vec<Change> {
        let mut changes = Vec::new();
        for alert in self.books.alerts.iter_mut().filter(|alert| alert.state == State::Firing) {
            let subject = alert.subject();
            let now = found.get(&subject);
            if now.is_some() {
                self.gone.remove(&subject);
                self.judged.insert(subject.clone());
            }
            if !matches!(now, Some(Found::Clear)) {
                self.clear.remove(&subject);
            }
            let (timer, why) = match now {
                Some(Found::Holds(detail)) => {
                    alert.detail = Detail::clone(detail);
                    continue;
                }
                // Neither good nor bad: it stays as it is.
                Some(Found::Unknown) => continue,
                Some(Found::Clear) => (&mut self.clear, CLEAR),
                // Its version may still be loaded.
                None if !self.judged.contains(&subject)
                    && since(look.started, look.now) < START_MAX =>
                {
                    continue;
                }
                None => (&mut self.gone, GONE),
            };
            let from = *timer.entry(subject.clone()).or_insert(look.now);
            if since(from, look.now) >= look.times.keep_firing_for {
                timer.remove(&subject);
                self.judged.remove(&subject);
                alert.end(why.to_owned(), receivers, look.now);
                changes.push(Change::Resolved(alert.clone()));
            }
        }
        changes
    }

    fn fire(
        &mut self,
        model: &ModelName,
        found: &BTreeMap<Subject, Found>,
        look: &Look,
    ) -> (Vec<Alert>, usize) {
        let firing: BTreeSet<Subject> = self.firing().map(Alert::subject).collect();
        let mut room = look.room.min(ALERTS_MAX.saturating_sub(firing.len()));
        let (mut fired, mut without_room) = (Vec::new(), 0);
        let mut holds = BTreeMap::new();
        for (subject, found) in found {
            let Found::Holds(detail) = found else { continue };
            if firing.contains(subject) {
                continue;
            }
            let from = self.holds.get(subject).copied().unwrap_or(look.now);
            if since(from, look.now) < look.times.for_ {
                holds.insert(subject.clone(), from);
                continue;
            }
            if room == 0 {
                holds.insert(subject.clone(), from);
                without_room += 1;
                continue;
            }
            room -= 1;
            let alert = Alert {
                id: Uuid::now_v7().to_string(),
                model: model.clone(),
                version: subject.version,
                arm: subject.arm.clone(),
                kind: subject.kind,
                about: subject.about.clone(),
                severity: subject.kind.severity(),
                state: State::Firing,
                summary: summary(model, subject, detail),
                since: from,
                fired_at: look.now,
                resolved_at: None,
                resolution: None,
                detail: Detail::clone(detail),
                deliveries: BTreeMap::new(),
            };
            self.judged.insert(subject.clone());
            self.books.alerts.push(alert.clone());
            fired.push(alert);
        }
        self.holds = holds;
        (fired, without_room)
    }

    /// Resolved alerts go after a week, and earlier when there are too many; whether anything went.
    fn forget(&mut self, now: Timestamp) -> bool {
        let Books { alerts, told_at, silence } = &mut self.books;
        let before = (alerts.len(), told_at.len(), silence.is_some());
        let over = |alert: &Alert| alert.resolved_at.filter(|_| !alert.is_pending());
        alerts.retain(|alert| over(alert).is_none_or(|at| since(at, now) < RESOLVED_KEPT));
        while alerts.len() > ALERTS_MAX
            && let Some(at) = alerts.iter().position(|alert| alert.resolved_at.is_some())
        {
            alerts.remove(at);
        }
        told_at.retain(|_, at| since(*at, now) < super::COOLDOWN_MAX);
        *silence = silence.take().filter(|silence| silence.until > now);
        before != (alerts.len(), told_at.len(), silence.is_some())
    }

    /// Decides who is to be told of what; whether anything changed.
    pub fn plan(&mut self, receivers: &[Receiver], now: Timestamp) -> bool {
        let Books { alerts, told_at, silence } = &mut self.books;
        let mut changed = false;
        let known = |name: &String| receivers.iter().any(|receiver| receiver.name == *name);
        let all = alerts.iter_mut().flat_map(|alert| &mut alert.deliveries);
        for (_, told) in all.filter(|(name, _)| known(name)) {
            let failed = |one: &&mut Delivery| {
                one.state == Progress::Failed && since(one.at, now) >= FAILED_AGAIN
            };
            if let Some(resolved) = told.resolved.as_mut().filter(failed) {
                *resolved = Delivery { state: Progress::Pending, at: now, detail: None };
                changed = true;
            }
        }
        for alert in alerts.iter_mut().filter(|alert| alert.state == State::Firing) {
            for receiver in receivers {
                let told = alert.deliveries.get(&receiver.name);
                let due = told.is_none_or(|told| is_due(told, receiver, now));
                if !due || !receiver.wants(alert) {
                    continue;
                }
                // What was not heard is the same event, by the same id.
                let number = match told {
                    None => 1,
                    Some(told) if told.firing.state == Progress::Delivered => told.number + 1,
                    Some(told) => told.number,
                };
                let cool = told_at.get(&receiver.name).map(|at| after(*at, receiver.cooldown));
                let wait = match (&silence, cool) {
                    (Some(silence), _) => Some(format!("silenced until {}", silence.until)),
                    (None, Some(until)) if until > now => {
                        Some(format!("cool-down of the model until {until}"))
                    }
                    _ => None,
                };
                let state = if wait.is_some() { Progress::Waiting } else { Progress::Pending };
                let same = |told: &Told| told.firing.state == state && told.firing.detail == wait;
                if state == Progress::Waiting && told.is_some_and(same) {
                    continue;
                }
                if state == Progress::Pending {
                    told_at.insert(receiver.name.clone(), now);
                }
                let firing = Delivery { state, at: now, detail: wait };
                let told = Told { number, firing, resolved: None };
                alert.deliveries.insert(receiver.name.clone(), told);
                changed = true;
            }
        }
        changed
    }

    /// The next telling for a receiver: that it fires before that it is over.
    pub fn next(&self, receiver: &str) -> Option<(&Alert, Phase, u32)> {
        let pending = self.books.alerts.iter().filter_map(|alert| {
            let told = alert.deliveries.get(receiver)?;
            let is = |delivery: &Delivery| delivery.state == Progress::Pending;
            if is(&told.firing) {
                return Some((told.firing.at, alert, Phase::Firing, told.number));
            }
            let resolved = told.resolved.as_ref().filter(|delivery| is(delivery))?;
            Some((resolved.at, alert, Phase::Resolved, told.number))
        });
        let first = pending.min_by_key(|(at, ..)| *at)?;
        Some((first.1, first.2, first.3))
    }

    /// How a telling ended; whether it was waited for.
    pub fn ended(&mut self, of: &Ending, now: Timestamp) -> bool {
        let alert = self.books.alerts.iter_mut().find(|alert| alert.id == of.alert);
        let Some(told) = alert.and_then(|alert| alert.deliveries.get_mut(&of.receiver)) else {
            return false;
        };
        let delivery = match of.phase {
            Phase::Firing => Some(&mut told.firing),
            Phase::Resolved => told.resolved.as_mut(),
        };
        let Some(delivery) = delivery.filter(|one| one.state == Progress::Pending) else {
            return false;
        };
        let said = |said: &String| said[..said.floor_char_boundary(SAID_BYTES_MAX)].to_owned();
        *delivery = Delivery { state: of.state, at: now, detail: of.detail.as_ref().map(said) };
        if of.phase == Phase::Firing && of.state == Progress::Refused {
            // Nothing was begun that has to cool down.
            self.books.told_at.remove(&of.receiver);
        }
        true
    }

    /// What waits for receivers that are not there any more waits no longer; whether anything did.
    pub fn without(&mut self, receivers: &[Receiver], now: Timestamp) -> bool {
        let mut changed = false;
        for alert in &mut self.books.alerts {
            for (name, told) in &mut alert.deliveries {
                if receivers.iter().any(|receiver| receiver.name == *name) {
                    continue;
                }
                for delivery in std::iter::once(&mut told.firing).chain(told.resolved.as_mut()) {
                    if matches!(delivery.state, Progress::Pending | Progress::Waiting) {
                        let why = "there is no such receiver any more";
                        *delivery = Delivery::new(Progress::Skipped, now, why);
                        changed = true;
                    }
                }
            }
        }
        changed
    }
}

/// How a telling ended.
#[derive(Clone, Debug)]
pub struct Ending {
    pub alert: String,
    pub receiver: String,
    pub phase: Phase,
    pub state: Progress,
    pub detail: Option<String>,
}

/// Whether it is time to tell a receiver again that an alert fires.
fn is_due(told: &Told, receiver: &Receiver, now: Timestamp) -> bool {
    // Of zero: never again.
    let passed = |wait: Duration| !wait.is_zero() && since(told.firing.at, now) >= wait;
    match told.firing.state {
        Progress::Pending => false,
        Progress::Waiting | Progress::Skipped => true,
        Progress::Delivered => passed(receiver.repeat),
        // A pipeline may have begun all the same.
        Progress::Failed => passed(receiver.cooldown.max(FAILED_AGAIN)),
        Progress::Refused => passed(receiver.repeat.max(receiver.cooldown)),
    }
}

#[cfg(test)]
pub(super) mod tests;
