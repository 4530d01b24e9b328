//! The engines of this process, and which of them runs a model.
//!
//! Invariant: a model that is refused says what is missing and whether another engine would do.

use std::path::Path;
use std::sync::Arc;

use super::{Artifact, Backend, EngineError, LoadOptions, Model};
use crate::domain::EngineChoice;

/// ONNX Runtime goes by this name in messages, also where it isn't built in.
const ORT: &str = "onnxruntime";
const TRACT: &str = "tract";

/// Turns ONNX Runtime's telemetry off, which is on by default and calls home.
const TELEMETRY_VARIABLE: &str = "ORT_DISABLE_TELEMETRY";

/// Engines that this process has.
pub struct Engines {
    choice: EngineChoice,
    ort: Option<Arc<dyn Backend>>,
    /// Why ONNX Runtime isn't there.
    ort_problem: Option<String>,
    tract: Option<Arc<dyn Backend>>,
}

impl Engines {
    /// Opens what `choice` asks for. `Auto` does without ONNX Runtime when it doesn't load; `Ort`
    /// fails then. `library` is where its shared library lies, when the operator said so.
    pub fn open(choice: EngineChoice, library: Option<&Path>) -> Result<Self, EngineError> {
        Self::open_with(choice, library, None)
    }

    /// The same, with a limit on the memory of runs on the CPU, as each engine can hold it.
    pub fn open_with(
        choice: EngineChoice,
        library: Option<&Path>,
        memory_max: Option<usize>,
    ) -> Result<Self, EngineError> {
        let ort = |library| ort(library, memory_max);
        let tract = tract(memory_max);
        let (ort, ort_problem) = match choice {
            EngineChoice::Tract => (None, Some("the engine was chosen to be tract".to_owned())),
            EngineChoice::Ort => (Some(ort(library)?), None),
            EngineChoice::Auto => match ort(library) {
                Ok(ort) => (Some(ort), None),
                Err(error) if tract.is_none() => return Err(error),
                Err(error) => (None, Some(error.to_string())),
            },
        };
        if ort.is_none() && tract.is_none() {
            return Err(EngineError::NotAvailable {
                engine: TRACT,
                reason: "it is not part of this build".to_owned(),
            });
        }
        Ok(Self { choice, ort, ort_problem, tract })
    }

    /// Why ONNX Runtime isn't used, for the log; `None` when it is.
    pub fn ort_problem(&self) -> Option<&str> {
        self.ort_problem.as_deref()
    }

    /// Name and version of each engine, the default first.
    pub fn describe(&self) -> Vec<(&'static str, String)> {
        self.ort.iter().chain(&self.tract).map(|engine| (engine.name(), engine.version())).collect()
    }

    /// Loads a model on the engine that `choice` names, or on the default one, and says which.
    pub fn load(
        &self,
        choice: EngineChoice,
        artifact: &Artifact,
        options: &LoadOptions,
    ) -> Result<(&'static str, Arc<dyn Model>), EngineError> {
        let choice = if choice == EngineChoice::Auto { self.choice } else { choice };
        let (engine, other) = match (choice, &self.ort, &self.tract) {
            (EngineChoice::Auto | EngineChoice::Ort, Some(ort), tract) => (ort, tract.as_ref()),
            (EngineChoice::Auto | EngineChoice::Tract, ort, Some(tract)) => (tract, ort.as_ref()),
            (EngineChoice::Tract, _, None) => {
                return Err(not_available(TRACT, "it is not part of this build"));
            }
            (_, None, _) => {
                return Err(not_available(
                    ORT,
                    self.ort_problem.as_deref().unwrap_or("not loaded"),
                ));
            }
        };
        match engine.load(artifact, options) {
            Ok(model) => Ok((engine.name(), model)),
            Err(EngineError::Unsupported { engine: refused, missing })
                if refused == engine.name() =>
            {
                let advice = self.advice(other, artifact, options);
                Err(EngineError::Unsupported {
                    engine: refused,
                    missing: format!("{missing}; {advice}"),
                })
            }
            Err(error) => Err(error),
        }
    }

    /// Whether the other engine would do; found out by trying, once for a model that fails.
    fn advice(
        &self,
        other: Option<&Arc<dyn Backend>>,
        artifact: &Artifact,
        options: &LoadOptions,
    ) -> String {
        let Some(other) = other else {
            return match &self.ort_problem {
                Some(problem) => format!("{ORT} may run it, but was not tried: {problem}"),
                None => "no other engine is there to try".to_owned(),
            };
        };
        let name = other.name();
        let alone = LoadOptions { sessions: 1, ..options.clone() };
        match other.load(artifact, &alone) {
            Ok(_) => format!("{name} can run it"),
            Err(EngineError::Unsupported { missing, .. }) => {
                format!("{name} cannot run it either ({missing})")
            }
            Err(error) => format!("{name} cannot run it either ({error})"),
        }
    }
}

fn not_available(engine: &'static str, reason: &str) -> EngineError {
    EngineError::NotAvailable { engine, reason: reason.to_owned() }
}

#[cfg(feature = "ort")]
fn ort(library: Option<&Path>, memory_max: Option<usize>) -> Result<Arc<dyn Backend>, EngineError> {
    Ok(Arc::new(super::ort::OrtBackend::open_with(library, memory_max)?))
}

#[cfg(not(feature = "ort"))]
fn ort(
    _library: Option<&Path>,
    _memory_max: Option<usize>,
) -> Result<Arc<dyn Backend>, EngineError> {
    Err(not_available(ORT, "it is not part of this build"))
}

#[cfg(feature = "tract")]
fn tract(memory_max: Option<usize>) -> Option<Arc<dyn Backend>> {
    Some(Arc::new(super::tract::TractBackend::with_memory_max(memory_max)))
}

#[cfg(not(feature = "tract"))]
fn tract(_memory_max: Option<usize>) -> Option<Arc<dyn Backend>> {
    None
}

/// Sets what engines read from the environment; ONNX Runtime's telemetry off, above all.
///
/// To be called first in `main`, while the process has one thread.
#[expect(unsafe_code, reason = "changing the environment is unsafe since edition 2024")]
pub fn prepare_environment() {
    // SAFETY: the caller has the only thread, so nobody reads the environment meanwhile.
    unsafe { std::env::set_var(TELEMETRY_VARIABLE, "1") };
}

/// Makes large buffers go back to the system when they are freed.
///
/// By itself the C library keeps up to 64 MiB of them per thread, once it has seen some: what a few
/// large bodies left would stay resident. Not called: more memory is kept, nothing else.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "a function of the C library")]
pub fn keep_little_memory() {
    const LARGE_BYTES: libc::c_int = 1 << 20;
    // SAFETY: takes no pointer; values that it refuses change nothing.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 4 * LARGE_BYTES);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_little_memory() {}

/// Gives memory that loads and unloads freed back to the system, where the allocator keeps it.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
#[expect(unsafe_code, reason = "a function of the C library")]
pub fn release_memory() {
    // SAFETY: takes no pointer and may be called at any time from any thread.
    unsafe { libc::malloc_trim(0) };
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn release_memory() {}

/// Ends the process at once, with this exit code.
///
/// A usual end runs what libraries have registered for it: ONNX Runtime takes down its globals, and
/// a thread that is still in a run then reads what is no longer there.
#[expect(unsafe_code, reason = "a function of the C library")]
pub fn leave(code: i32) -> ! {
    // SAFETY: never returns and runs nothing of this process; the caller has flushed what it wrote.
    unsafe { libc::_exit(code) }
}
