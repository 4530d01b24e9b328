//! One arena for the runs of all sessions on the CPU, with a limit.
//!
//! Without it each session has an arena of its own without a limit: a model whose output's size
//! hangs on an input's *values* then takes what the machine has, and the kernel ends the process.
//! With it the runtime says that there is no more, and the run fails.
//!
//! Invariants:
//! - Weights are not part of the arena, so that a model that goes gives its memory back.
//! - After a run that took unusually much, and after a session's end, the next run gives back what
//!   lies unused.

use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};

use ort::AsPointer as _;
use ort::environment::Environment;
use ort::session::{NoSelectedOutputs, RunOptions};
use ort::sys;

use crate::domain::Tensor;

/// A run whose outputs take more leaves the arena larger than is worth keeping.
const OUTPUTS_USUAL_BYTES: usize = 64 << 20;

/// The next run on any session is to give back what the arena does not use.
static GIVE_BACK: AtomicBool = AtomicBool::new(false);

/// Registers the arena; sessions take part that ask for the environment's allocators.
#[expect(unsafe_code, reason = "the binding has no safe form of these calls")]
pub(super) fn limit(environment: &Environment, bytes: usize) -> Result<(), ort::Error> {
    let api = ort::api();
    let keys = [c"max_mem".as_ptr()];
    let values = [bytes];
    let mut info = ptr::null_mut();
    let mut arena = ptr::null_mut();
    // SAFETY: every pointer is to a live local or a string constant; the runtime copies what it
    // needs of the two objects before it returns, and each is released once, after its last use.
    unsafe {
        let kind = sys::OrtAllocatorType::OrtArenaAllocator;
        let memory = sys::OrtMemType::OrtMemTypeDefault;
        ort::Error::result_from_status((api.CreateCpuMemoryInfo)(kind, memory, &raw mut info))?;
        let status =
            (api.CreateArenaCfgV2)(keys.as_ptr(), values.as_ptr(), keys.len(), &raw mut arena);
        let registered = ort::Error::result_from_status(status).and_then(|()| {
            let environment = environment.ptr().cast_mut();
            let status = (api.CreateAndRegisterAllocator)(environment, info, arena);
            ort::Error::result_from_status(status)
        });
        if !arena.is_null() {
            (api.ReleaseArenaCfg)(arena);
        }
        (api.ReleaseMemoryInfo)(info);
        registered
    }
}

/// Options for a run that gives unused memory back, when an earlier one took unusually much.
pub(super) fn give_back() -> Option<RunOptions<NoSelectedOutputs>> {
    if !GIVE_BACK.load(Ordering::Relaxed) || !GIVE_BACK.swap(false, Ordering::Relaxed) {
        return None;
    }
    let mut options = RunOptions::new().ok()?;
    options.set("memory.enable_memory_arena_shrinkage", "cpu:0").ok()?;
    Some(options)
}

/// Notes what a run took; `None` when that is not known, or nothing will be wanted any more.
pub(super) fn took(outputs: Option<&[Tensor]>) {
    let usual = outputs.is_some_and(|outputs| {
        let bytes = outputs.iter().map(|output| output.data().len());
        bytes.fold(0, usize::saturating_add) <= OUTPUTS_USUAL_BYTES
    });
    if !usual {
        GIVE_BACK.store(true, Ordering::Relaxed);
    }
}
