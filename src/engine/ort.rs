//! ONNX Runtime, loaded from a shared library when the server starts.
//!
//! Invariants:
//! - One environment per process, without telemetry; the library is loaded by path and never by
//!   the binding's own lazy way, which panics when there is none.
//! - A session belongs to one thread at a time; no thread of the runtime spins.
//! - Inputs are borrowed when they are aligned, and outputs leave without a copy.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use ort::environment::Environment;
use ort::ep;
use ort::logging::LogLevel;
use ort::session::builder::{GraphOptimizationLevel, PrepackedWeights, SessionBuilder};
use ort::session::{NoSelectedOutputs, RunOptions};
use parking_lot::Mutex;

use super::onnx::{self, OnnxModel};
use super::{Artifact, Backend, EngineError, LoadOptions, Model, Session, Stop};
use crate::domain::{Provider, Signature, Tensor, TensorSpec};

mod arena;
mod tensors;
mod weights;

/// Name of this engine.
pub const NAME: &str = "onnxruntime";

/// Names the shared library; before every other place.
const LIBRARY_VARIABLE: &str = "ORT_DYLIB_PATH";

/// Where `make ort` puts the library, from the working directory.
const LIBRARY_CACHED: &str = ".cache/onnxruntime/lib/libonnxruntime.so";

/// What the system's loader knows the library by.
const LIBRARY_SYSTEM: &str = "libonnxruntime.so";

/// The process's only environment; kept until it ends.
static ENVIRONMENT: Mutex<Option<Started>> = Mutex::new(None);

#[derive(Clone)]
struct Started {
    environment: Environment,
    version: String,
    /// Sessions on the CPU share an arena with a limit.
    limited: bool,
}

/// ONNX Runtime, ready to load models.
pub struct OrtBackend {
    started: Started,
}

impl OrtBackend {
    /// Loads the runtime: from `ORT_DYLIB_PATH`, else `library`, else the usual places.
    pub fn open(library: Option<&Path>) -> Result<Self, EngineError> {
        Self::open_with(library, None)
    }

    /// The same, with a limit on what all runs on the CPU take together, in bytes. The first call
    /// of a process decides.
    pub fn open_with(
        library: Option<&Path>,
        memory_max: Option<usize>,
    ) -> Result<Self, EngineError> {
        let mut held = ENVIRONMENT.lock();
        let started = match &*held {
            Some(started) => started.clone(),
            None => held.insert(start(&find(library)?, memory_max)?).clone(),
        };
        Ok(Self { started })
    }
}

fn start(library: &Path, memory_max: Option<usize>) -> Result<Started, EngineError> {
    let started = ort::init_from(library).map_err(not_available)?;
    let environment =
        started.with_name("tidegate").with_telemetry(false).build().map_err(not_available)?;
    environment.set_log_level(LogLevel::Error);
    let limited = memory_max.is_some_and(|bytes| {
        arena::limit(&environment, bytes)
            .inspect_err(|error| tracing::warn!(%error, "the memory of runs has no limit"))
            .is_ok()
    });
    let version = version(library).unwrap_or_else(|| "unknown".to_owned());
    Ok(Started { environment, version, limited })
}

fn not_available(error: impl std::fmt::Display) -> EngineError {
    EngineError::NotAvailable { engine: NAME, reason: error.to_string() }
}

/// Path of the library. A place that was named must have it; the usual places are tried in turn.
fn find(configured: Option<&Path>) -> Result<PathBuf, EngineError> {
    let named =
        std::env::var_os(LIBRARY_VARIABLE).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(path) = named.or_else(|| configured.map(Path::to_path_buf)) {
        if !path.is_file() {
            let path = path.display();
            return Err(not_available(format_args!(
                "expected its library at {path}, there is no such file"
            )));
        }
        // Absolute, because the binding looks beside the executable first.
        return std::path::absolute(&path).map_err(not_available);
    }
    let cached = std::path::absolute(LIBRARY_CACHED).ok();
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join("lib").join(LIBRARY_SYSTEM)));
    let usual = [cached, beside].into_iter().flatten().find(|path| path.is_file());
    Ok(usual.unwrap_or_else(|| PathBuf::from(LIBRARY_SYSTEM)))
}

/// What the library calls itself: `1.31.1`. The build information has only the branch's name.
#[expect(unsafe_code, reason = "the binding reads this when it loads the library and keeps it")]
fn version(library: &Path) -> Option<String> {
    type Base = unsafe extern "C" fn() -> *const ort::sys::OrtApiBase;
    // SAFETY: the binding has this library open already, so no initialiser runs; the function has
    // had this signature, and the base this layout, since the first release.
    unsafe {
        let library = libloading::Library::new(library).ok()?;
        let base = library.get::<Base>(b"OrtGetApiBase").ok()?().as_ref()?;
        let text = std::ffi::CStr::from_ptr((base.GetVersionString)());
        Some(text.to_string_lossy().into_owned())
    }
}

impl Backend for OrtBackend {
    fn name(&self) -> &'static str {
        NAME
    }

    fn version(&self) -> String {
        self.started.version.clone()
    }

    fn load(
        &self,
        artifact: &Artifact,
        options: &LoadOptions,
    ) -> Result<Arc<dyn Model>, EngineError> {
        let described = onnx::read(&artifact.path)?;
        described.confine_external_data(artifact.path.parent().unwrap_or(Path::new(".")))?;
        let mut recipe = Recipe {
            environment: self.started.environment.clone(),
            limited: self.started.limited,
            path: artifact.path.clone(),
            intra_threads: options.intra_threads.max(1),
            providers: options.providers.clone(),
            sharing: Sharing::None,
        };
        let mut notes = Vec::new();
        let sharing = options.sessions > 1
            && recipe.on_cpu()
            && described.weight_bytes >= weights::SHARED_BYTES_MIN;
        let shared =
            sharing.then(|| weights::share(&recipe, artifact, &self.started.version, &mut notes));
        let first = match shared.flatten() {
            Some((shared, session)) => {
                recipe = shared;
                session
            }
            None => recipe.first(&mut notes)?,
        };
        agree(&described, &first)?;
        Ok(Arc::new(OrtModel {
            loops: described.loops(),
            signature: Arc::new(described.signature),
            recipe,
            spare: Mutex::new(Some(first)),
            notes,
        }))
    }
}

/// The runtime must see the inputs and outputs that we read from the file, in this order.
fn agree(described: &OnnxModel, session: &ort::session::Session) -> Result<(), EngineError> {
    let ours = |specs: &[TensorSpec]| -> Vec<String> {
        specs.iter().map(|spec| spec.name.clone()).collect()
    };
    let theirs = |outlets: &[ort::value::Outlet]| -> Vec<String> {
        outlets.iter().map(|outlet| outlet.name().to_owned()).collect()
    };
    let signature = &described.signature;
    let expected = (ours(&signature.inputs), ours(&signature.outputs));
    let got = (theirs(session.inputs()), theirs(session.outputs()));
    if expected == got {
        return Ok(());
    }
    Err(EngineError::Broken(format!(
        "expected the inputs and outputs {expected:?} of the file, {NAME} sees {got:?}"
    )))
}

/// All that it takes to make one more session of a model.
#[derive(Clone)]
struct Recipe {
    environment: Environment,
    /// As in [`Started`].
    limited: bool,
    path: PathBuf,
    intra_threads: usize,
    providers: Vec<Provider>,
    sharing: Sharing,
}

/// What the sessions of one model have in common.
#[derive(Clone)]
enum Sharing {
    None,
    /// The graph at `Recipe::path` is optimised already; its weights are these.
    Weights {
        prepacked: PrepackedWeights,
        weights: Arc<Vec<weights::Weight>>,
    },
}

impl Recipe {
    /// The first session tells if the providers work; without them the CPU does it all.
    fn first(&mut self, notes: &mut Vec<String>) -> Result<ort::session::Session, EngineError> {
        if self.on_cpu() {
            notes.push("provider: cpu".to_owned());
            return self.session();
        }
        let wanted = std::mem::take(&mut self.providers);
        let on_cpu = self.clone();
        self.providers = wanted;
        match self.session() {
            Ok(session) => {
                notes.push("provider: cuda, then cpu".to_owned());
                Ok(session)
            }
            Err(error) => {
                let session = on_cpu.session()?;
                *self = on_cpu;
                notes.push(format!("provider: cpu, because cuda is not usable: {error}"));
                Ok(session)
            }
        }
    }

    fn on_cpu(&self) -> bool {
        !matches!(self.providers.first(), Some(Provider::Cuda { .. }))
    }

    fn session(&self) -> Result<ort::session::Session, EngineError> {
        let mut builder = self.builder().map_err(|error| self.refused(&error))?;
        builder.commit_from_file(&self.path).map_err(|error| self.refused(&error))
    }

    fn builder(&self) -> Result<SessionBuilder, ort::Error> {
        // A failed step hands the builder back inside the error, which is of no use here.
        fn plain(error: ort::Error<SessionBuilder>) -> ort::Error {
            ort::Error::new_with_code(error.code(), error.message())
        }
        let level = match self.sharing {
            Sharing::None => GraphOptimizationLevel::All,
            Sharing::Weights { .. } => GraphOptimizationLevel::Disable,
        };
        let mut builder = SessionBuilder::new(&self.environment)?;
        builder = builder.with_optimization_level(level).map_err(plain)?;
        builder = builder.with_log_level(LogLevel::Error).map_err(plain)?;
        builder = builder.with_intra_threads(self.intra_threads).map_err(plain)?;
        builder = builder.with_inter_threads(1).map_err(plain)?;
        builder = builder.with_intra_op_spinning(false).map_err(plain)?;
        builder = builder.with_inter_op_spinning(false).map_err(plain)?;
        if self.limited && self.on_cpu() {
            builder = builder.with_env_allocators().map_err(plain)?;
            builder = builder.with_device_allocated_initializers().map_err(plain)?;
        }
        let providers: Vec<_> = self.providers.iter().map_while(provider).collect();
        if !providers.is_empty() {
            builder = builder.with_execution_providers(providers).map_err(plain)?;
        }
        if let Sharing::Weights { prepacked, weights } = &self.sharing {
            builder = builder.with_prepacked_weights(prepacked).map_err(plain)?;
            for weight in weights.iter() {
                let value = Arc::clone(&weight.value);
                builder = if weight.external {
                    builder.with_external_initializer(&weight.name, value)
                } else {
                    builder.with_initializer(&weight.name, value)
                }
                .map_err(plain)?;
            }
        }
        Ok(builder)
    }

    /// What an error of the runtime while loading means for the operator, without paths.
    fn refused(&self, error: &ort::Error) -> EngineError {
        let message = error.message().replace(&*self.path.to_string_lossy(), "the model");
        let message = told(&message);
        match missing(error.code(), &message) {
            Some(missing) => EngineError::Unsupported { engine: NAME, missing },
            None => EngineError::Broken(message),
        }
    }
}

/// A provider before the CPU, registered strictly: by default the binding would only log.
fn provider(provider: &Provider) -> Option<ep::ExecutionProviderDispatch> {
    let Provider::Cuda { device_id, memory_max_bytes } = provider else { return None };
    let mut cuda = ep::CUDA::default().with_device_id(*device_id);
    if let Some(limit) = memory_max_bytes {
        cuda = cuda.with_memory_limit(*limit);
    }
    Some(cuda.build().error_on_failure())
}

/// What the runtime lacks for a model, when that is why it was refused.
fn missing(code: ort::ErrorCode, message: &str) -> Option<String> {
    // "Fatal error: mine:Frobnicate(-1) is not a registered function/op"
    if let Some((before, _)) = message.split_once(" is not a registered function/op") {
        let operator = before.rsplit(' ').next().unwrap_or(before);
        let operator = operator.split('(').next().unwrap_or(operator).trim_start_matches(':');
        return Some(format!("operator {operator}"));
    }
    // "Could not find an implementation for Frobnicate(13) node with name 'f'"
    if let Some((_, after)) = message.split_once("Could not find an implementation for ") {
        let operator = after.split([' ', ':']).next().unwrap_or(after);
        return Some(format!("an implementation of operator {operator} for these datatypes"));
    }
    let about_versions = message.contains("Unsupported model IR version")
        || message.contains("is under development and support for this is limited")
        || message.contains("No opset import for domain");
    (about_versions || code == ort::ErrorCode::NotImplemented).then(|| message.to_owned())
}

struct OrtModel {
    signature: Arc<Signature>,
    loops: bool,
    recipe: Recipe,
    /// The session that the load made, for whoever asks first.
    spare: Mutex<Option<ort::session::Session>>,
    notes: Vec<String>,
}

impl Model for OrtModel {
    fn signature(&self) -> &Signature {
        &self.signature
    }

    fn session(&self) -> Result<Box<dyn Session>, EngineError> {
        let spare = self.spare.lock().take();
        let session = match spare {
            Some(session) => session,
            None => self.recipe.session()?,
        };
        let options = RunOptions::new().map_err(|error| self.recipe.refused(&error))?;
        Ok(Box::new(OrtSession {
            signature: Arc::clone(&self.signature),
            session,
            options: Arc::new(Stopper(options)),
            loops: self.loops,
        }))
    }

    fn notes(&self) -> Vec<String> {
        self.notes.clone()
    }
}

struct OrtSession {
    signature: Arc<Signature>,
    session: ort::session::Session,
    /// Of every run but those that give memory back, which cannot be stopped.
    options: Arc<Stopper>,
    loops: bool,
}

struct Stopper(RunOptions<NoSelectedOutputs>);

impl Stop for Stopper {
    fn stop(&self) {
        if let Err(error) = self.0.terminate() {
            tracing::warn!(%error, "a run cannot be stopped");
        }
    }

    fn reset(&self) {
        if let Err(error) = self.0.unterminate() {
            tracing::error!(%error, "a session stays stopped");
        }
    }
}

impl Drop for OrtSession {
    /// What its runs took of the arena goes back with the next run of another.
    fn drop(&mut self) {
        arena::took(None);
    }
}

impl Session for OrtSession {
    fn run(&mut self, inputs: &[Tensor]) -> Result<Vec<Tensor>, EngineError> {
        let specs = &self.signature.inputs;
        super::check_inputs(specs, inputs)?;
        let values = specs
            .iter()
            .zip(inputs)
            .map(|(spec, tensor)| tensors::value(&spec.name, tensor))
            .collect::<Result<Vec<_>, _>>()?;
        let give_back = arena::give_back();
        let ran = match &give_back {
            None => self.session.run_with_options(&values[..], &self.options.0),
            Some(options) => self.session.run_with_options(&values[..], options),
        };
        let outputs = ran.map_err(|error| {
            // Other errors must not: who sends bad input would make everyone's next run slower.
            if error.message().contains(ARENA_FULL) {
                arena::took(None);
            }
            failed(specs, &error)
        })?;
        let outputs: Vec<Tensor> = outputs
            .into_iter()
            .map(|(name, value)| tensors::tensor(name, value))
            .collect::<Result<_, _>>()?;
        arena::took(Some(&outputs));
        Ok(outputs)
    }

    fn stopper(&self) -> Option<Arc<dyn Stop>> {
        Some(Arc::clone(&self.options) as Arc<dyn Stop>)
    }

    fn loops(&self) -> bool {
        self.loops
    }
}

/// A failed run. What the runtime calls an invalid argument, such as an index past a table's end,
/// came with the inputs; it doesn't say with which.
fn failed(specs: &[TensorSpec], error: &ort::Error) -> EngineError {
    let reason = told(error.message());
    if error.code() != ort::ErrorCode::InvalidArgument {
        return EngineError::Run(reason);
    }
    let names: Vec<&str> = specs.iter().map(|spec| spec.name.as_str()).collect();
    EngineError::Input { name: names.join("', '"), reason }
}

/// How the runtime begins to say that a tensor does not fit its arena.
const ARENA_FULL: &str = "Available memory of ";

/// What the runtime says of a run, for the caller: without places in its source code.
fn told(message: &str) -> String {
    if let Some((_, rest)) = message.split_once(ARENA_FULL)
        && let Some((left, needed)) = rest.split_once(" is smaller than requested bytes of ")
    {
        let needed = needed.trim();
        return format!(
            "a tensor of {needed} bytes does not fit, {left} are left of the memory for runs"
        );
    }
    // "/onnxruntime_src/…/bfc_arena.cc:360 void* onnxruntime::BFCArena::Alloc(size_t) reason"
    let mut told = String::with_capacity(message.len());
    let mut rest = message.trim();
    while let Some(at) = rest.find("/onnxruntime") {
        told.push_str(&rest[..at]);
        let after = rest[at..].split_once(' ').map_or("", |(_, after)| after);
        let function = after.split_once(") ").filter(|(name, _)| name.contains('('));
        let after = function.map_or(after, |(_, after)| after);
        rest = after.strip_prefix("const ").unwrap_or(after);
    }
    told.push_str(rest);
    // "tensor.cc:57 CalculateTensorStorageSize reason"
    let place = |word: &&str| {
        let line = [".cc:", ".h:", ".cpp:"].iter().find_map(|ending| word.split_once(ending));
        line.is_some_and(|(_, line)| line.starts_with(|digit: char| digit.is_ascii_digit()))
    };
    if told.split(' ').any(|word| place(&word)) {
        told = told.split(' ').filter(|word| !place(word)).collect::<Vec<_>>().join(" ");
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runs_error_names_no_place_in_the_source() {
        let cases = [
            ("Gather: indices out of range", "Gather: indices out of range"),
            (
                "Status Message: /onnxruntime_src/onnxruntime/core/framework/bfc_arena.cc:360 void* \
                 onnxruntime::BFCArena::AllocateRawInternal(size_t, bool) Available memory of 10 \
                 is smaller than requested bytes of 20",
                "a tensor of 20 bytes does not fit, 10 are left of the memory for runs",
            ),
            (
                "A: /onnxruntime_src/core/x.cc:1 virtual void onnxruntime::F(int) const bad B",
                "A: bad B",
            ),
            ("A: /onnxruntime_src/core/x.cc:1", "A: "),
            ("[1] : FAIL : tensor.cc:57 Size must be >= 0", "[1] : FAIL : Size must be >= 0"),
        ];
        for (message, expected) in cases {
            assert_eq!(told(message), expected);
        }
    }

    #[test]
    fn what_is_missing_is_named() {
        let cases = [
            (
                "Fatal error: mine:Frobnicate(-1) is not a registered function/op",
                Some("operator mine:Frobnicate"),
            ),
            (
                "Could not find an implementation for Conv(11) node with name 'c'",
                Some("an implementation of operator Conv(11) for these datatypes"),
            ),
            ("Protobuf parsing failed.", None),
        ];
        for (message, expected) in cases {
            let got = missing(ort::ErrorCode::GenericFailure, message);
            assert_eq!(got.as_deref(), expected, "{message}");
        }
    }

    #[test]
    fn a_library_that_was_named_must_be_there() {
        let error = find(Some(Path::new("/nowhere/libonnxruntime.so"))).unwrap_err();
        assert!(matches!(error, EngineError::NotAvailable { .. }), "{error}");
    }
}
