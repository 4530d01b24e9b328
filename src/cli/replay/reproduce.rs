//! One recorded prediction run again on the model that made it: at a gateway that has that model,
//! or else here.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::Gateway;
use super::compare::Report;
use super::recorded::{Recorded, Tensor};
use super::send::{Answer, Sender};
use crate::cli::admin::Stop;
use crate::cli::admin::table::plain;
use crate::cli::models::Scratch;
use crate::control::reproduce::{Places, Prediction, reproduce as run_here};
use crate::domain::{Digest, EngineChoice, ModelName, NamedTensor, Version, VersionRef};

/// How a prediction is run again.
#[derive(clap::Args)]
pub(in crate::cli) struct Again {
    /// Run the recorded inputs on the recorded model again, and compare the outputs: at the gateway
    /// at '--url', or here when that has not got the model
    #[arg(long)]
    reproduce: bool,
    /// Ask no gateway: run it here
    #[arg(long, requires = "reproduce")]
    offline: bool,
    /// Folder of models, where the recorded one is looked for besides the copies in the state folder
    #[arg(long, value_name = "DIR", requires = "reproduce")]
    model_repository: Option<PathBuf>,
    /// ONNX Runtime's shared library, if it is not in a usual place
    #[arg(long, value_name = "PATH", requires = "reproduce")]
    ort_library: Option<PathBuf>,
    #[command(flatten)]
    gateway: Gateway,
}

impl Again {
    pub(in crate::cli) fn is_wanted(&self) -> bool {
        self.reproduce
    }
}

/// A record, as far as it says what ran.
struct Subject<'a> {
    recorded: &'a Recorded,
    model: ModelName,
    version: Version,
    digest: Digest,
    /// Name and version.
    engine: String,
}

/// What came of it.
struct Rerun {
    outputs: Vec<Tensor>,
    /// For people.
    place: String,
    /// Id of the new prediction, if a gateway ran it.
    id: Option<String>,
    engine: Option<String>,
}

/// Runs one record's inputs on the very bytes that it ran on, and compares. `state_dirs` may have
/// copies of them.
pub(in crate::cli) fn reproduce(
    again: &Again,
    line: &str,
    state_dirs: Vec<PathBuf>,
    as_json: bool,
) -> Result<String, Stop> {
    let recorded = Recorded::of(line).ok_or_else(|| {
        Stop::failed("its inputs and outputs are not in the ledger whole: they cannot be run again")
    })?;
    let subject = Subject::of(&recorded, line)?;
    let asked = if again.offline { None } else { Some(at_gateway(&again.gateway, &subject)?) };
    let rerun = match asked {
        Some(Ok(rerun)) => rerun,
        other => here(again, &subject, state_dirs).map_err(|here| match other {
            Some(Err(there)) => Stop::failed(format_args!("{there}; {here}")),
            _ => Stop::failed(here),
        })?,
    };
    let mut report = Report::new(again.gateway.tolerance);
    report.add(&recorded, &rerun.outputs);
    let same = report.different == 0;
    let text = match as_json {
        true => format!("{:#}\n", subject.json(&rerun, &report, same)),
        false => subject.text(&rerun, &report, same),
    };
    match same {
        true => Ok(text),
        false => {
            // What differs is the answer; that it does is the exit code.
            std::io::stdout().lock().write_all(text.as_bytes()).map_err(Stop::failed)?;
            Err(Stop::failed("the recorded outputs were not reproduced"))
        }
    }
}

/// What a gateway gives, or why it has not got that model.
fn at_gateway(gateway: &Gateway, subject: &Subject<'_>) -> Result<Result<Rerun, String>, Stop> {
    let Subject { recorded, model, version, digest, .. } = subject;
    let sender = Sender::open(&gateway.url)?;
    let number = VersionRef::parse(&version.to_string()).map_err(Stop::failed)?;
    let (outputs, ran_on, id) = match sender.send(model, number.as_ref(), recorded) {
        Ok(Answer::Outputs { outputs, digest, id }) => (outputs, digest, id),
        Ok(Answer::Refused(why)) => return Ok(Err(format!("{}: {why}", gateway.url))),
        Err(Stop::Failed(why)) => return Ok(Err(why)),
        Err(stop) => return Err(stop),
    };
    if ran_on != digest.to_string() {
        let url = &gateway.url;
        return Ok(Err(format!("{url}: {model}/{version} has {ran_on} there, not {digest}")));
    }
    Ok(Ok(Rerun { outputs, place: format!("at {}", gateway.url), id: Some(id), engine: None }))
}

fn here(again: &Again, subject: &Subject<'_>, state_dirs: Vec<PathBuf>) -> Result<Rerun, String> {
    let scratch = Scratch::new().map_err(|error| format!("no temporary folder: {error}"))?;
    let places = Places {
        state_dirs,
        repository: again.model_repository.clone(),
        scratch: scratch.path.clone(),
        ort_library: again.ort_library.clone(),
    };
    let inputs = subject.recorded.inputs.iter().map(Tensor::named).collect::<Result<_, _>>()?;
    let prediction = Prediction {
        model: subject.model.clone(),
        version: subject.version,
        digest: subject.digest,
        engine: subject.choice()?,
        inputs,
    };
    let ran = run_here(&prediction, &places).map_err(|error| error.to_string())?;
    Ok(Rerun {
        outputs: ran.outputs.iter().map(Tensor::from_named).collect(),
        place: format!("here, from {}", ran.found.display()),
        id: None,
        engine: Some(ran.engine),
    })
}

impl<'a> Subject<'a> {
    fn of(recorded: &'a Recorded, line: &str) -> Result<Self, Stop> {
        let record: Value = serde_json::from_str(line).map_err(Stop::failed)?;
        let none = || Stop::failed("it ran on no version of a model");
        Ok(Self {
            recorded,
            model: recorded.model.parse().map_err(Stop::failed)?,
            version: record["version"].as_u64().and_then(Version::new).ok_or_else(none)?,
            digest: record["model_digest"].as_str().and_then(Digest::parse).ok_or_else(none)?,
            engine: record["engine"].as_str().unwrap_or_default().to_owned(),
        })
    }

    fn choice(&self) -> Result<EngineChoice, String> {
        match self.engine.split(' ').next() {
            Some("onnxruntime") => Ok(EngineChoice::Ort),
            Some("tract") => Ok(EngineChoice::Tract),
            _ => Err(format!("it ran on engine '{}', which is none of ours", plain(&self.engine))),
        }
    }

    /// When the engine is another one than then: outputs may differ by that.
    fn engine_note(&self, rerun: &Rerun) -> Option<String> {
        let now = rerun.engine.as_ref().filter(|now| **now != self.engine)?;
        Some(format!("recorded on {}, run on {now}", plain(&self.engine)))
    }

    fn json(&self, rerun: &Rerun, report: &Report, same: bool) -> Value {
        json!({
            "prediction_id": self.recorded.id, "reproduced_as": rerun.id,
            "model_digest": self.digest.to_string(), "ran": rerun.place,
            "engine": rerun.engine, "recorded_engine": self.engine, "same": same,
            "report": report.json(&[]),
        })
    }

    fn text(&self, rerun: &Rerun, report: &Report, same: bool) -> String {
        let what = if same { "the same outputs" } else { "other outputs" };
        let note = self.engine_note(rerun).map(|note| format!("{note}\n")).unwrap_or_default();
        let (model, version, digest) = (&self.model, self.version, self.digest);
        let place = &rerun.place;
        format!("{model}/{version} {digest}\nran {place}\n{note}{what}\n{}", report.text(&[]))
    }
}

impl Tensor {
    fn named(&self) -> Result<NamedTensor, String> {
        let dims = self.shape.iter().map(|dim| usize::try_from(*dim).ok());
        let shape = dims.collect::<Option<_>>().ok_or("a shape beyond what can be")?;
        let data = self.data.clone().into();
        let tensor = crate::domain::Tensor::new(self.datatype, shape, data);
        let tensor = tensor.map_err(|error| format!("input '{}': {error}", self.name))?;
        Ok(NamedTensor { name: self.name.clone(), tensor })
    }

    fn from_named(named: &NamedTensor) -> Self {
        Self {
            name: named.name.clone(),
            datatype: named.tensor.datatype(),
            shape: named.tensor.shape().iter().map(|dim| *dim as u64).collect(),
            data: named.tensor.data().to_vec(),
        }
    }
}

/// State folders that may belong to a log's folder: it, and the two above.
pub(in crate::cli) fn state_dirs(log: &Path) -> Vec<PathBuf> {
    let real = std::fs::canonicalize(log).unwrap_or_else(|_| log.to_owned());
    let above = real.ancestors().take(3).map(Path::to_owned);
    above.filter(|folder| folder.join("cache").is_dir()).collect()
}
