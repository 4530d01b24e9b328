//! The loop that looks at every rollout, decides, and has decisions carried out.
//!
//! It looks once a second, and a moment after each failure in a version under watch, so that a bad
//! candidate is gone long before a step's interval is over. Going on waits for the interval.
//!
//! What it sees and does is a [`Desk`]'s business, whom it calls is a [`Callout`]'s; neither is
//! asked about anything but rollouts.
//!
//! Invariants:
//! - One rollout per model. All are changed by this loop alone, one after the other, so that a
//!   command and a decision never cross.
//! - A record is taken over only when what it says is durable and in force. A rollback that cannot be
//!   carried out is decided again every second until it is.
//! - Nothing here holds up another model's rollout but the desk's own waits.

use std::collections::BTreeMap;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use jiff::Timestamp;
use tokio::sync::{Notify, mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep_until};

use super::metrics::Board;
use super::{
    Action, CONTROLLER, Command, Decision, HookAnswer, HookKind, Now, Observation, Rollout, Start,
    State,
};
use crate::control::call::{Call, Refusal};
use crate::domain::ModelName;
use crate::observe::page::Family;

/// Time between two looks at every rollout.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Least time between two looks because of failures: some hundred requests a second to the candidate
/// bring at most a few more before it is gone.
const ALARM_GAP: Duration = Duration::from_millis(20);
/// Rollouts under way at once.
pub const ROLLOUTS_MAX: usize = 1024;
/// Commands that wait for the loop.
const ORDERS_MAX: usize = 64;
/// A rollback that cannot be carried out is in the log once in so many tries.
const LOG_EVERY: u32 = 60;

/// What a rollout may see and do.
pub trait Desk: Send + Sync + 'static {
    /// What is to be seen now of a rollout's versions; see [`Observation::of`].
    fn observe(&self, rollout: &Rollout) -> Observation;

    /// Makes a change durable and puts it in force; of a rollback, the other way round. Nothing is
    /// changed when it is refused. `Unavailable`, `Internal` and `Stale` are tried again.
    fn apply(&self, change: Change<'_>) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// Keeps what was seen, so that a restart goes on from there. Not worth a line in the journal.
    fn save(&self, rollout: &Rollout) -> impl Future<Output = Result<(), Refusal>> + Send;

    /// Ready when a version under watch has failed since it was ready last
    /// ([`Observer::alarm`](crate::observe::Observer::alarm)).
    fn alarmed(&self) -> impl Future<Output = ()> + Send;
}

/// A change of a rollout that is to be made.
#[derive(Clone, Copy, Debug)]
pub struct Change<'a> {
    /// As it is now; `None` for one that starts. A change of the table is to be refused as `Stale`
    /// when it does not own the one in force ([`Rollout::owns`]).
    pub before: Option<&'a Rollout>,
    /// As it will be.
    pub rollout: &'a Rollout,
    pub decision: &'a Decision,
    pub call: &'a Call,
}

/// Something to tell, or to ask.
#[derive(Clone, Debug)]
pub struct Notice {
    /// The same for the same transition, however often it is sent.
    pub id: String,
    pub kind: HookKind,
    pub at: Timestamp,
    pub rollout: Arc<Rollout>,
}

impl Notice {
    fn new(kind: HookKind, rollout: &Arc<Rollout>) -> Self {
        let transitions = rollout.history.len() as u64 + rollout.history_dropped;
        let at = rollout.history.last().map_or(rollout.started_at, |last| last.at);
        let id = format!("{}-{kind}-{transitions}", rollout.id);
        Self { id, kind, at, rollout: Arc::clone(rollout) }
    }
}

pub type Answering = Pin<Box<dyn Future<Output = HookAnswer> + Send>>;

/// Whom rollouts ask and tell.
pub trait Callout: Send + Sync {
    /// Asks until there is an answer or no use in asking.
    fn ask(&self, notice: Notice) -> Answering;
    /// Never waits.
    fn tell(&self, notice: Notice);
}

/// Reaches the loop from elsewhere.
#[derive(Clone)]
pub struct Handle {
    orders: mpsc::Sender<Order>,
    board: Arc<Board>,
    nudge: Arc<Notify>,
}

struct Order {
    what: What,
    call: Call,
    reply: oneshot::Sender<Result<Arc<Rollout>, Refusal>>,
}

enum What {
    Start(Box<Start>),
    Command { model: ModelName, id: String, command: Command },
}

impl Handle {
    /// Starts a rollout; ready when its first step is durable and in force.
    ///
    /// # Errors
    /// `Invalid` with every problem of the plan; `Conflict` when the model has one under way.
    pub async fn start(&self, start: Start, call: Call) -> Result<Arc<Rollout>, Refusal> {
        self.order(What::Start(Box::new(start)), call).await
    }

    /// # Errors
    /// `NotFound` for a rollout that is not under way, `Conflict` in a state that does not allow it.
    pub async fn command(
        &self,
        model: &ModelName,
        id: &str,
        command: Command,
        call: Call,
    ) -> Result<Arc<Rollout>, Refusal> {
        let what = What::Command { model: model.clone(), id: id.to_owned(), command };
        self.order(what, call).await
    }

    async fn order(&self, what: What, call: Call) -> Result<Arc<Rollout>, Refusal> {
        let (reply, answer) = oneshot::channel();
        let order = Order { what, call, reply };
        let full = |_| Refusal::Unavailable("too many commands to rollouts wait".to_owned());
        self.orders.try_send(order).map_err(full)?;
        let gone = |_| Refusal::Unavailable("the gateway is stopping".to_owned());
        answer.await.map_err(gone)?
    }

    /// The model's rollout as of this moment: under way, or ended not long ago.
    pub fn live(&self, model: &ModelName) -> Option<Arc<Rollout>> {
        self.board.get(model)
    }

    /// Has every rollout looked at now: somebody changed a traffic table.
    pub fn look_soon(&self) {
        self.nudge.notify_one();
    }

    /// For the metrics page.
    pub fn families(&self) -> Vec<Family> {
        self.board.families()
    }
}

/// The loop. Made with a [`Handle`] to it.
pub struct Controller<D> {
    desk: Arc<D>,
    callout: Option<Arc<dyn Callout>>,
    orders: mpsc::Receiver<Order>,
    nudge: Arc<Notify>,
    board: Arc<Board>,
    running: BTreeMap<ModelName, Running>,
    answers: FuturesUnordered<Pin<Box<dyn Future<Output = Answered> + Send>>>,
    began: Instant,
}

struct Running {
    rollout: Arc<Rollout>,
    /// As it was carried out last: the same, but for a rollback that could not be.
    in_force: Arc<Rollout>,
    /// Holds the watch over its versions.
    seen: Option<Observation>,
    saved: Instant,
    asking: Option<HookKind>,
    /// Tries in a row that could not be carried out.
    failed: u32,
}

struct Answered {
    model: ModelName,
    id: String,
    hook: HookKind,
    answer: HookAnswer,
}

impl<D: Desk> Controller<D> {
    /// `under_way`: what a process before has left, as the store holds it.
    pub fn new(
        desk: Arc<D>,
        callout: Option<Arc<dyn Callout>>,
        under_way: Vec<Rollout>,
    ) -> (Handle, Self) {
        let (sender, orders) = mpsc::channel(ORDERS_MAX);
        let (board, nudge) = (Arc::<Board>::default(), Arc::<Notify>::default());
        let handle =
            Handle { orders: sender, board: Arc::clone(&board), nudge: Arc::clone(&nudge) };
        let mut controller = Self {
            desk,
            callout,
            orders,
            nudge,
            board,
            running: BTreeMap::new(),
            answers: FuturesUnordered::new(),
            began: Instant::now(),
        };
        for rollout in under_way.into_iter().filter(|rollout| !rollout.state.ended()) {
            controller.take(Arc::new(rollout));
        }
        (handle, controller)
    }

    /// Runs until `stop` is ready. What is under way is saved then, and goes on after a restart.
    pub async fn run(mut self, stop: impl Future<Output = ()>) {
        let mut stop = pin!(stop);
        let mut tick = interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut quiet_until = Instant::now();
        loop {
            let (desk, nudge) = (Arc::clone(&self.desk), Arc::clone(&self.nudge));
            let alarm = async {
                sleep_until(quiet_until).await;
                desk.alarmed().await;
            };
            tokio::select! {
                () = &mut stop => break,
                Some(order) = self.orders.recv() => {
                    self.obey(order).await;
                    continue;
                }
                Some(answered) = self.answers.next(), if !self.answers.is_empty() => {
                    self.answered(answered).await;
                    continue;
                }
                _ = tick.tick() => {}
                () = alarm, if !self.running.is_empty() => {}
                () = nudge.notified() => {}
            }
            self.look_at_all().await;
            quiet_until = Instant::now() + ALARM_GAP;
        }
        for running in self.running.values() {
            save(&*self.desk, &running.in_force).await;
        }
    }

    async fn look_at_all(&mut self) {
        let models: Vec<ModelName> = self.running.keys().cloned().collect();
        for model in models {
            self.look_at(&model).await;
        }
    }

    async fn look_at(&mut self, model: &ModelName) {
        let now = self.now();
        let Some(running) = self.running.get_mut(model) else { return };
        let seen = self.desk.observe(&running.rollout);
        let mut next = Rollout::clone(&running.rollout);
        let decision = next.step(now, &seen);
        running.seen = Some(seen);
        if decision.holds() {
            running.rollout = Arc::new(next);
            running.in_force = Arc::clone(&running.rollout);
            self.board.show(&running.rollout);
            let interval = Duration::from_secs(running.rollout.plan.interval_s);
            if running.saved.elapsed() >= interval {
                running.saved = Instant::now();
                save(&*self.desk, &running.rollout).await;
            }
            return;
        }
        self.decided(model, next, decision).await;
    }

    /// Carries out what a rollout decided by itself.
    async fn decided(&mut self, model: &ModelName, next: Rollout, decision: Decision) {
        let why = decision.reason.as_ref().map(|reason| reason.message.clone());
        let call = Call { actor: CONTROLLER.to_owned(), reason: why, ..Call::default() };
        let Err(refusal) = self.carry_out(model, next, &decision, &call).await else { return };
        let again = matches!(
            refusal,
            Refusal::Unavailable(_) | Refusal::Internal(_) | Refusal::Stale { .. }
        );
        if again || decision.action == Action::RollBack {
            return;
        }
        let now = self.now();
        let Some(running) = self.running.get(model) else { return };
        let mut next = Rollout::clone(&running.rollout);
        let decision = next.refused(now, &refusal.to_string());
        if !decision.holds() {
            let call = Call::own(CONTROLLER, refusal.to_string());
            if let Err(refusal) = self.carry_out(model, next, &decision, &call).await {
                tracing::error!(%model, %refusal, "a refused rollout could not be stopped");
            }
        }
    }

    /// Has a decision carried out, and takes the record over when it was.
    async fn carry_out(
        &mut self,
        model: &ModelName,
        next: Rollout,
        decision: &Decision,
        call: &Call,
    ) -> Result<Arc<Rollout>, Refusal> {
        let now = self.now();
        let Some(running) = self.running.get_mut(model) else {
            return Err(Refusal::NotFound(format!("model '{model}' has no rollout under way")));
        };
        let (before, next) = (Arc::clone(&running.in_force), Arc::new(next));
        if matches!(next.state, State::Promoting | State::RollingBack) {
            self.board.show(&next);
        }
        let mut done = Rollout::clone(&next);
        done.carried_out(now);
        let change = Change { before: Some(&before), rollout: &done, decision, call };
        if let Err(refusal) = self.desk.apply(change).await {
            if running.failed.is_multiple_of(LOG_EVERY) {
                let action = decision.action.as_str();
                tracing::error!(%model, rollout = before.id, action, %refusal, "not carried out");
            }
            running.failed += 1;
            // That it has to go back stands, unless somebody has put another table in force: the next
            // look sees that.
            let stale = matches!(refusal, Refusal::Stale { .. });
            let stands = decision.action == Action::RollBack && !stale;
            running.rollout = if stands { next } else { before };
            self.board.show(&running.rollout);
            return Err(refusal);
        }
        let done = Arc::new(done);
        running.failed = 0;
        running.rollout = Arc::clone(&done);
        running.in_force = Arc::clone(&done);
        self.follow(&done, decision);
        Ok(done)
    }

    /// What follows a change that is in force: lines in the log, hooks, the end.
    fn follow(&mut self, rollout: &Arc<Rollout>, decision: &Decision) {
        let Rollout { model, id, candidate, weight, state, .. } = &**rollout;
        let (action, state) = (decision.action.as_str(), state.as_str());
        let why = decision.reason.as_ref().map_or("", |reason| &reason.message);
        let dry_run = decision.dry_run;
        tracing::info!(%model, rollout = id, %candidate, action, state, weight, dry_run, why, "rollout");
        self.board.show(rollout);
        if let Some(kind) = telling(rollout, decision)
            && rollout.plan.calls(kind)
            && let Some(callout) = &self.callout
        {
            callout.tell(Notice::new(kind, rollout));
        }
        if let Some(hook) = decision.hook {
            self.ask(rollout, hook);
        }
        if rollout.state.ended() {
            self.board.ended(rollout);
            self.running.remove(&rollout.model);
        }
    }

    fn ask(&mut self, rollout: &Arc<Rollout>, hook: HookKind) {
        let Some(running) = self.running.get_mut(&rollout.model) else { return };
        if running.asking == Some(hook) {
            return;
        }
        running.asking = Some(hook);
        let asked: Answering = match &self.callout {
            Some(callout) => callout.ask(Notice::new(hook, rollout)),
            None => {
                let why = "no hook is configured".to_owned();
                Box::pin(std::future::ready(HookAnswer::None(why)))
            }
        };
        let (model, id) = (rollout.model.clone(), rollout.id.clone());
        self.answers.push(Box::pin(async move {
            let answer = asked.await;
            Answered { model, id, hook, answer }
        }));
    }

    async fn answered(&mut self, answered: Answered) {
        let now = self.now();
        let Answered { model, id, hook, answer } = answered;
        let Some(running) = self.running.get_mut(&model) else { return };
        if running.rollout.id != id {
            return;
        }
        running.asking = None;
        let mut next = Rollout::clone(&running.rollout);
        let decision = next.hook_answered(now, hook, &answer);
        if !decision.holds() {
            let before = running.failed;
            self.decided(&model, next, decision).await;
            let failed = self.running.get(&model).is_some_and(|now| now.failed > before);
            if failed {
                self.ask_again(&model, hook);
            }
        }
    }

    /// The answer could not be acted upon: the next one may be.
    fn ask_again(&mut self, model: &ModelName, hook: HookKind) {
        let Some(running) = self.running.get(model) else { return };
        let rollout = Arc::clone(&running.rollout);
        if rollout.state == (State::PendingHook { hook }) {
            self.ask(&rollout, hook);
        }
    }

    async fn obey(&mut self, order: Order) {
        let Order { what, call, reply } = order;
        let done = match what {
            What::Start(start) => self.start(*start, &call).await,
            What::Command { model, id, command } => self.command(&model, &id, command, &call).await,
        };
        // Nobody may be there any more to hear it.
        drop(reply.send(done));
    }

    async fn start(&mut self, start: Start, call: &Call) -> Result<Arc<Rollout>, Refusal> {
        start.check().map_err(Refusal::Invalid)?;
        if self.callout.is_none()
            && let Some(hook) = start.plan.asks().next()
        {
            let problem = format!("hooks: '{hook}' cannot be asked, because no hook is configured");
            return Err(Refusal::Invalid(vec![problem]));
        }
        if let Some(running) = self.running.get(&start.model) {
            let (model, id) = (&start.model, &running.rollout.id);
            return Err(Refusal::Conflict(format!("rollout {id} of '{model}' is under way")));
        }
        if self.running.len() >= ROLLOUTS_MAX {
            let message = format!("{ROLLOUTS_MAX} rollouts are under way already");
            return Err(Refusal::Unavailable(message));
        }
        let (rollout, decision) = Rollout::start(start, self.now(), call);
        let change = Change { before: None, rollout: &rollout, decision: &decision, call };
        self.desk.apply(change).await?;
        let rollout = Arc::new(rollout);
        self.take(Arc::clone(&rollout));
        self.follow(&rollout, &decision);
        // Counting begins now, and not at the next look.
        self.look_at(&rollout.model.clone()).await;
        Ok(rollout)
    }

    async fn command(
        &mut self,
        model: &ModelName,
        id: &str,
        command: Command,
        call: &Call,
    ) -> Result<Arc<Rollout>, Refusal> {
        let now = self.now();
        let running = self.running.get(model).filter(|running| running.rollout.id == id);
        let Some(running) = running else {
            let message = format!("rollout {id} of '{model}' is not under way");
            return Err(Refusal::NotFound(message));
        };
        let mut next = Rollout::clone(&running.rollout);
        let decision = next.command(now, command, call)?;
        self.carry_out(model, next, &decision, call).await
    }

    fn take(&mut self, rollout: Arc<Rollout>) {
        self.board.show(&rollout);
        let running = Running {
            rollout: Arc::clone(&rollout),
            in_force: Arc::clone(&rollout),
            seen: None,
            saved: Instant::now(),
            asking: None,
            failed: 0,
        };
        self.running.insert(rollout.model.clone(), running);
    }

    fn now(&self) -> Now {
        Now { at: Timestamp::now(), monotonic: self.began.elapsed() }
    }
}

async fn save(desk: &impl Desk, rollout: &Rollout) {
    if let Err(refusal) = desk.save(rollout).await {
        let Rollout { model, id, .. } = rollout;
        tracing::warn!(%model, rollout = id, %refusal, "progress not saved");
    }
}

/// The hook that is told of a decision.
fn telling(rollout: &Rollout, decision: &Decision) -> Option<HookKind> {
    match decision.action {
        Action::SetTraffic => Some(HookKind::Step),
        Action::Pause => Some(HookKind::Paused),
        Action::Promote => Some(HookKind::Promoted),
        Action::RollBack => Some(HookKind::RolledBack),
        Action::Abort | Action::Fail if rollout.state.ended() => Some(HookKind::Ended),
        Action::Abort | Action::Fail | Action::Hold | Action::CallHook | Action::Resume => None,
    }
}

#[cfg(test)]
mod tests;
