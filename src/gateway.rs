//! The life of one request.
//!
//! Invariants:
//! - Every call ends in exactly one [`Completion`], whatever becomes of it, cancellation included.
//! - One look at the route table decides where a request goes.
//! - Shadows get their copy when the answer is made, and nothing of theirs is waited for.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;
use uuid::Uuid;

use crate::cache::{self, Cache};
use crate::domain::{
    Answer, AnswerHead, CallMeta, Completion, Deadline, ErrorKind, Failure, InferRequest, Inputs,
    ModelControl, ModelName, NamedTensor, Outcome, ParameterValue, RequestedOutput, Tensor,
    Timings, VersionRef,
};
use crate::observe::Observer;
use crate::route::{Keys, Pick, Published, RouteTable, Served};
use crate::shadow::{self, Shadows};

mod classify;
mod outputs;
mod recall;
mod reserved;

/// Limits and waits of the request path.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Deadline when the caller sets none, and the longest one it may set.
    pub timeout_max: Duration,
    /// A model none of whose runs has ended for so long is stuck, and the process with it; `None`:
    /// never.
    pub watchdog: Option<Duration>,
    /// Most bytes of one request's outputs, for models that say nothing else.
    pub output_bytes_max: usize,
    /// Answers kept for the models that ask for it.
    pub cache: cache::Settings,
    /// Copies of requests for versions that nobody sees the answers of.
    pub shadow: shadow::Settings,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            timeout_max: Duration::from_secs(60),
            watchdog: Some(Duration::from_secs(600)),
            output_bytes_max: 256 << 20,
            cache: cache::Settings::default(),
            shadow: shadow::Settings::default(),
        }
    }
}

/// What a failed prediction's answer carries: as much as was known.
#[derive(Debug)]
pub struct Refused {
    pub head: AnswerHead,
    pub id: String,
    pub failure: Failure,
}

/// The request path behind every transport.
pub struct Gateway {
    table: Arc<Published<RouteTable>>,
    observer: Arc<Observer>,
    control: Arc<dyn ModelControl>,
    settings: Settings,
    /// Made for the first request that may be answered from it.
    cache: OnceLock<Cache>,
    shadows: Arc<Shadows>,
}

impl Gateway {
    pub fn new(
        table: Arc<Published<RouteTable>>,
        observer: Arc<Observer>,
        control: Arc<dyn ModelControl>,
        settings: Settings,
    ) -> Self {
        let shadows = Arc::new(Shadows::new(settings.shadow.clone(), Arc::clone(&observer)));
        Self { table, observer, control, settings, cache: OnceLock::new(), shadows }
    }

    /// The route table of this moment: for metadata, configuration, statistics and readiness.
    pub fn table(&self) -> Arc<RouteTable> {
        self.table.snapshot()
    }

    /// Looks at the route table of this moment, for no longer than an expression takes.
    pub fn look_at_table<R>(&self, at: impl FnOnce(&RouteTable) -> R) -> R {
        self.table.look(at)
    }

    /// What runs on copies of requests.
    pub fn shadows(&self) -> &Arc<Shadows> {
        &self.shadows
    }

    pub fn control(&self) -> &dyn ModelControl {
        &*self.control
    }

    pub fn observer(&self) -> &Observer {
        &self.observer
    }

    /// Whether every model that runs gets on with it. What is stuck in an engine cannot be helped
    /// from within: the process is to be started again.
    pub fn is_live(&self) -> bool {
        let Some(longest) = self.settings.watchdog else { return true };
        let table = self.table.snapshot();
        let mut served = table.models.values().flat_map(|routes| routes.versions.values());
        let stuck = served.find(|served| served.lane.stuck_for() > longest);
        if let Some(served) = stuck {
            let seconds = served.lane.stuck_for().as_secs();
            tracing::error!(model = %served.model, version = %served.version, seconds, "stuck");
        }
        stuck.is_none()
    }

    /// The version that a call without a sticky key would get, for its metadata.
    ///
    /// # Errors
    /// `NotFound` for a model or version that is not served.
    pub fn served(
        &self,
        model: &ModelName,
        version: Option<&VersionRef>,
    ) -> Result<Arc<Served>, Failure> {
        self.table.look(|table| Ok(table.pick(model, version)?.served))
    }

    /// Makes one prediction.
    ///
    /// # Errors
    /// A failure with everything that the answer's headers need. When the returned future is
    /// dropped, the request is withdrawn and recorded as cancelled.
    pub async fn infer(
        &self,
        meta: CallMeta,
        request: InferRequest,
    ) -> Result<Answer, Box<Refused>> {
        let InferRequest { model, version, id, inputs, outputs, parameters } = request;
        let mut record = Record::new(&self.observer, &meta, model, id);
        let done = self.run(&mut record, &meta, version, inputs, &outputs, &parameters).await;
        let head = record.head();
        let (model, id) = record.names();
        match done {
            Ok(outputs) => {
                record.answered(&self.shadows);
                Ok(Answer { head, model, id, outputs })
            }
            Err(failure) => {
                let message = failure.message.clone();
                record.finish(Outcome::Failed { kind: failure.kind, message });
                Err(Box::new(Refused { head, id, failure }))
            }
        }
    }

    /// Records a call that transport refused before it became a request (a body that does not
    /// parse), and gives the head its answer carries.
    pub fn refuse(
        &self,
        meta: &CallMeta,
        model: ModelName,
        version: Option<&VersionRef>,
        failure: &Failure,
    ) -> AnswerHead {
        let mut record = Record::new(&self.observer, meta, model.clone(), String::new());
        let keys = Keys { call: meta, parameters: &[], prediction_id: record.id() };
        if let Ok(pick) = self.table.look(|table| table.pick_for(&model, version, &keys)) {
            record.picked(pick);
        }
        let head = record.head();
        let message = failure.message.clone();
        record.finish(Outcome::Failed { kind: failure.kind, message });
        head
    }

    /// As [`Gateway::refuse`], for a model that the caller may not know of: nothing of a model of
    /// this name is looked at, and the answer is that of an unknown one.
    pub fn refuse_unseen(
        &self,
        meta: &CallMeta,
        model: ModelName,
        failure: &Failure,
    ) -> AnswerHead {
        let record = Record::new(&self.observer, meta, model, String::new());
        let head = record.head();
        let message = failure.message.clone();
        record.finish(Outcome::Failed { kind: failure.kind, message });
        head
    }

    async fn run(
        &self,
        record: &mut Record<'_>,
        meta: &CallMeta,
        version: Option<VersionRef>,
        inputs: Inputs,
        requested: &[RequestedOutput],
        parameters: &[(String, ParameterValue)],
    ) -> Result<Vec<NamedTensor>, Failure> {
        let keys = Keys { call: meta, parameters, prediction_id: record.id() };
        let asked = (record.model(), version.as_ref());
        let pick = self.table.look(|table| table.pick_for(asked.0, asked.1, &keys))?;
        let served = Arc::clone(&pick.served);
        record.picked(pick);
        reserved::check(parameters)?;
        let deadline = self.deadline(meta, &served, parameters)?;
        let wanted = wanted_outputs(&served, requested)?;
        let mut named = match inputs {
            Inputs::Named(named) => named,
            Inputs::Deferred(make) => make(&served.signature).await?,
        };
        if let Some(padding) = &served.lane.form().padding {
            padding.fill_mask(&mut named);
        }
        let bound = served.signature.bind(named)?;
        record.bound(&served, &bound);
        let output_bytes_max =
            served.settings.output_bytes_max.unwrap_or(self.settings.output_bytes_max);
        outputs::check_expected(&served.signature, &bound, output_bytes_max)?;
        let priority = priority(parameters)?;
        let asked = match self.recall(&served, &bound) {
            recall::Recalled::Hit(outputs) => {
                record.recalled(&outputs);
                return select(&served, &wanted, &outputs, output_bytes_max);
            }
            recall::Recalled::Miss(asked) => Some(asked),
            recall::Recalled::Off => None,
        };
        let ran = served.lane.infer(bound, deadline, priority).await.map_err(|error| {
            tracing::debug!(model = %served.model, version = %served.version, %error, "not run");
            error.into_failure()
        })?;
        record.ran(&ran);
        let made = outputs::check_made(&served.signature, &ran.outputs, output_bytes_max);
        made.inspect_err(|_| record.without_outputs())?;
        if let Some(asked) = asked {
            self.keep(asked, &served, &ran.outputs);
        }
        select(&served, &wanted, &ran.outputs, output_bytes_max)
    }

    fn deadline(
        &self,
        meta: &CallMeta,
        served: &Served,
        parameters: &[(String, ParameterValue)],
    ) -> Result<Deadline, Failure> {
        let longest = served.settings.timeout_max.unwrap_or(self.settings.timeout_max);
        let mut wait = meta.timeout.unwrap_or(longest).min(longest);
        if let Some(micros) = unsigned(parameters, "timeout")?
            && micros > 0
        {
            wait = wait.min(Duration::from_micros(micros));
        }
        Ok(Deadline::new(meta.received, wait))
    }
}

/// The parameter `key` as a non-negative integer, if it is there.
fn unsigned(parameters: &[(String, ParameterValue)], key: &str) -> Result<Option<u64>, Failure> {
    let Some((_, value)) = parameters.iter().find(|(name, _)| name == key) else {
        return Ok(None);
    };
    let number = match value {
        ParameterValue::Uint(number) => Some(*number),
        ParameterValue::Int(number) => u64::try_from(*number).ok(),
        _ => None,
    };
    match number {
        Some(number) => Ok(Some(number)),
        None => Err(Failure::invalid(format!(
            "parameter '{key}' must be a non-negative integer, got {value:?}"
        ))),
    }
}

fn priority(parameters: &[(String, ParameterValue)]) -> Result<u32, Failure> {
    let level = unsigned(parameters, "priority")?.unwrap_or(0);
    u32::try_from(level)
        .map_err(|_| Failure::invalid(format!("parameter 'priority' is {level}, too large")))
}

/// Position of each wanted output in the signature, and the classes to give instead, if asked.
fn wanted_outputs(
    served: &Served,
    requested: &[RequestedOutput],
) -> Result<Vec<(usize, Option<usize>)>, Failure> {
    if requested.is_empty() {
        return Ok((0..served.signature.outputs.len()).map(|at| (at, None)).collect());
    }
    let mut wanted: Vec<(usize, Option<usize>)> = Vec::with_capacity(requested.len());
    for output in requested {
        let name = &output.name;
        let Some(at) = served.signature.output_at(name) else {
            let model = &served.model;
            return Err(Failure::invalid(format!("model '{model}' has no output '{name}'")));
        };
        if wanted.iter().any(|(have, _)| *have == at) {
            return Err(Failure::invalid(format!("output '{name}' is asked for twice")));
        }
        wanted.push((at, output.classification));
    }
    Ok(wanted)
}

fn select(
    served: &Served,
    wanted: &[(usize, Option<usize>)],
    outputs: &[Tensor],
    bytes_max: usize,
) -> Result<Vec<NamedTensor>, Failure> {
    let mut named = Vec::with_capacity(wanted.len());
    for &(at, classes) in wanted {
        let (Some(spec), Some(tensor)) = (served.signature.outputs.get(at), outputs.get(at)) else {
            return Err(Failure::new(ErrorKind::Internal, "the model gave too few outputs"));
        };
        let tensor = match classes {
            None => tensor.clone(),
            Some(count) => {
                let labels = served.settings.labels.iter().find(|(name, _)| *name == spec.name);
                let labels = labels.map_or(&[][..], |(_, labels)| labels);
                outputs::check_classes(&spec.name, tensor, count, labels, bytes_max)?;
                classify::top_classes(&spec.name, tensor, count, labels, served.signature.batched)?
            }
        };
        named.push(NamedTensor { name: spec.name.clone(), tensor });
    }
    Ok(named)
}

/// Becomes the request's one completion; as cancelled if it is dropped unfinished.
struct Record<'a> {
    observer: &'a Observer,
    completion: Option<Completion>,
    pick: Option<Pick>,
    received: Instant,
}

impl<'a> Record<'a> {
    fn new(observer: &'a Observer, meta: &CallMeta, model: ModelName, id: String) -> Self {
        let received_at = SystemTime::now()
            .checked_sub(meta.received.elapsed())
            .unwrap_or(SystemTime::UNIX_EPOCH);
        let completion = Completion {
            prediction_id: Uuid::now_v7(),
            request_id: id,
            received_at,
            model,
            version: None,
            digest: None,
            arm: None,
            reason: None,
            protocol: meta.protocol,
            principal: meta.principal.clone(),
            trace: meta.trace,
            outcome: Outcome::Ok,
            timings: Timings::default(),
            rows: 1,
            batch_size: 0,
            cached: false,
            shadow_of: None,
            inputs: Vec::new(),
            outputs: Vec::new(),
        };
        Self { observer, completion: Some(completion), pick: None, received: meta.received }
    }

    fn open(&mut self) -> &mut Completion {
        self.completion.as_mut().expect("a record is finished once, by a call that consumes it")
    }

    fn model(&self) -> &ModelName {
        &self.completion.as_ref().expect("as in open").model
    }

    fn id(&self) -> Uuid {
        self.completion.as_ref().expect("as in open").prediction_id
    }

    fn names(&self) -> (ModelName, String) {
        let completion = self.completion.as_ref().expect("as in open");
        (completion.model.clone(), completion.request_id.clone())
    }

    fn head(&self) -> AnswerHead {
        let completion = self.completion.as_ref().expect("as in open");
        AnswerHead {
            prediction_id: completion.prediction_id,
            version: completion.version,
            digest: completion.digest,
            arm: completion.arm.clone(),
        }
    }

    fn picked(&mut self, pick: Pick) {
        let completion = self.open();
        completion.version = Some(pick.served.version);
        completion.digest = Some(pick.served.digest);
        completion.arm = Some(pick.arm.clone());
        completion.reason = Some(pick.reason.clone());
        self.pick = Some(pick);
    }

    fn bound(&mut self, served: &Served, inputs: &[Tensor]) {
        let completion = self.open();
        if served.signature.batched {
            completion.rows = inputs.first().and_then(|x| x.shape().first().copied()).unwrap_or(1);
        }
        completion.inputs = inputs.to_vec();
    }

    fn ran(&mut self, ran: &crate::batch::Ran) {
        let completion = self.open();
        completion.timings = ran.timings;
        completion.batch_size = ran.batch_size;
        completion.outputs.clone_from(&ran.outputs);
    }

    fn without_outputs(&mut self) {
        self.open().outputs = Vec::new();
    }

    fn recalled(&mut self, outputs: &[Tensor]) {
        let completion = self.open();
        completion.cached = true;
        completion.outputs = outputs.to_vec();
    }

    /// Finishes a request that was answered, and leaves a copy of it to its shadows.
    fn answered(mut self, shadows: &Shadows) {
        let completion = self.send(Outcome::Ok);
        if let (Some(pick), Some(completion)) = (&self.pick, completion)
            && !pick.mirrors.is_empty()
        {
            shadows.offer(pick, completion);
        }
    }

    fn finish(mut self, outcome: Outcome) {
        self.send(outcome);
    }

    fn send(&mut self, outcome: Outcome) -> Option<Completion> {
        let mut completion = self.completion.take()?;
        completion.outcome = outcome;
        completion.timings.total = self.received.elapsed();
        let stats = self.pick.as_ref().map(|pick| &*pick.served.stats);
        self.observer.completed(stats, &completion);
        Some(completion)
    }
}

impl Drop for Record<'_> {
    fn drop(&mut self) {
        let (kind, message) = match std::thread::panicking() {
            true => (ErrorKind::Internal, "internal error"),
            false => (ErrorKind::Cancelled, "the caller went away"),
        };
        self.send(Outcome::Failed { kind, message: message.to_owned() });
    }
}
