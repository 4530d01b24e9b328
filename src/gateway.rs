//! The life of one request.
//!
//! Invariants:
//! - Every call ends in exactly one [`Completion`](crate::domain::Completion), whatever becomes of it, cancellation included,
//!   and has one record in the ledger at most.
//! - No answer with a prediction leaves before its record is where the model's `durability` says,
//!   and by then it is in its caller's form: what cannot be written is recorded as failed.
//! - One look at the route table decides where a request goes.
//! - Shadows get their copy when the answer is made, and nothing of theirs is waited for.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use crate::cache::{self, Cache};
use crate::domain::{
    Answer, AnswerHead, CallMeta, Deadline, ErrorKind, Failure, InferRequest, Inputs, ModelControl,
    ModelName, NamedTensor, ParameterValue, RequestedOutput, Tensor, VersionRef,
};
use crate::feedback::Feedback;
use crate::ledger::Ledger;
use crate::observe::Observer;
use crate::route::{Keys, Published, RouteTable, Served};
use crate::shadow::{self, Shadows};

mod classify;
mod feedback;
mod outputs;
mod recall;
mod record;
mod reserved;

use record::Record;

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
    /// `None`: nothing is recorded.
    ledger: Option<Arc<Ledger>>,
    /// `None`: nothing can be said of predictions.
    feedback: Option<Arc<Feedback>>,
}

impl Gateway {
    pub fn new(
        table: Arc<Published<RouteTable>>,
        observer: Arc<Observer>,
        control: Arc<dyn ModelControl>,
        settings: Settings,
    ) -> Self {
        let shadows = Arc::new(Shadows::new(settings.shadow.clone(), Arc::clone(&observer)));
        Self {
            table,
            observer,
            control,
            settings,
            cache: OnceLock::new(),
            shadows,
            ledger: None,
            feedback: None,
        }
    }

    /// With a ledger that has a record of every call.
    #[must_use]
    pub fn with_ledger(mut self, ledger: Arc<Ledger>) -> Self {
        self.shadows.record_in(Arc::clone(&ledger));
        self.ledger = Some(ledger);
        self
    }

    pub fn ledger(&self) -> Option<&Arc<Ledger>> {
        self.ledger.as_ref()
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

    /// Makes one prediction, has `write` put it into its caller's form, and records it: what cannot
    /// be written is a prediction that failed. Gives what was written, and the head that goes with it.
    ///
    /// # Errors
    /// A failure with everything that the answer's headers need. When the returned future is
    /// dropped, the request is withdrawn and recorded as cancelled.
    pub async fn infer<R>(
        &self,
        meta: CallMeta,
        request: InferRequest,
        write: impl AsyncFnOnce(Answer) -> Result<R, Failure>,
    ) -> Result<(R, AnswerHead), Box<Refused>> {
        let InferRequest { model, version, id, inputs, outputs, parameters } = request;
        let mut record = Record::new(self, &meta, model, id);
        let done = async {
            let run = self.run(&mut record, &meta, version, inputs, &outputs, &parameters);
            let (outputs, deadline) = run.await?;
            let written = write(record.answer(outputs)).await?;
            record.settle(deadline).await.map(|()| written)
        };
        match done.await {
            Ok(written) => {
                let head = record.head();
                record.answered();
                Ok((written, head))
            }
            Err(failure) => {
                let id = record.caller_id();
                Err(Box::new(Refused { head: record.failed(&failure), id, failure }))
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
        let mut record = Record::new(self, meta, model, String::new());
        // Refused already: nothing more is to be said if there is no such version.
        drop(self.pick(&mut record, meta, version, &[]));
        record.failed(failure)
    }

    /// As [`Gateway::refuse`], for a model that the caller may not know of: nothing of a model of
    /// this name is looked at, and the answer is that of an unknown one.
    pub fn refuse_unseen(
        &self,
        meta: &CallMeta,
        model: ModelName,
        failure: &Failure,
    ) -> AnswerHead {
        Record::new(self, meta, model, String::new()).failed(failure)
    }

    /// Looks once at the route table.
    fn pick(
        &self,
        record: &mut Record<'_>,
        meta: &CallMeta,
        version: Option<&VersionRef>,
        parameters: &[(String, ParameterValue)],
    ) -> Result<Arc<Served>, Failure> {
        let keys = Keys { call: meta, parameters, prediction_id: record.id() };
        let model = record.model();
        let look = |table: &RouteTable| (table.revision, table.pick_for(model, version, &keys));
        let (revision, pick) = self.table.look(look);
        record.looked_at(revision);
        let pick = pick?;
        let served = Arc::clone(&pick.served);
        record.picked(pick, &keys);
        Ok(served)
    }

    async fn run(
        &self,
        record: &mut Record<'_>,
        meta: &CallMeta,
        version: Option<VersionRef>,
        inputs: Inputs,
        requested: &[RequestedOutput],
        parameters: &[(String, ParameterValue)],
    ) -> Result<(Vec<NamedTensor>, Deadline), Failure> {
        let served = self.pick(record, meta, version.as_ref(), parameters)?;
        record.check()?;
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
                let named = select(&served, &wanted, &outputs, output_bytes_max)?;
                return Ok((named, deadline));
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
        Ok((select(&served, &wanted, &ran.outputs, output_bytes_max)?, deadline))
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
