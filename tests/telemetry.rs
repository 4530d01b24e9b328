//! ONNX Runtime calls home by default: it keeps a thread for that and opens its first connection
//! some nine seconds after its first session. Neither may be seen here.
//!
//! One test in a program of its own, because it counts the threads of the whole process.

#![cfg(feature = "ort")]
#![expect(clippy::unwrap_used, reason = "a test may stop at what it did not expect")]

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tidegate::engine::ort::OrtBackend;
use tidegate::engine::{Artifact, Backend, LoadOptions};

/// How long to look on after the sessions are made.
const WATCH: Duration = Duration::from_secs(2);

fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

fn sockets() -> Vec<PathBuf> {
    let links = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(Result::ok);
    let targets = links.filter_map(|link| std::fs::read_link(link.path()).ok());
    targets.filter(|target| target.to_string_lossy().starts_with("socket:")).collect()
}

#[test]
fn the_runtime_starts_no_thread_and_opens_no_connection() {
    tidegate::engine::prepare_environment();
    let before = (threads(), sockets());
    let backend = OrtBackend::open(None).unwrap_or_else(|error| {
        panic!("this test needs ONNX Runtime, which `make ort` fetches: {error}")
    });
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/mlp.onnx");
    let options = LoadOptions { intra_threads: 1, sessions: 2, providers: Vec::new() };
    let model = backend.load(&Artifact { path, derived: None }, &options).unwrap();
    let _sessions = [model.session().unwrap(), model.session().unwrap()];
    let start = Instant::now();
    while start.elapsed() < WATCH {
        assert_eq!((threads(), sockets()), before);
        std::thread::sleep(Duration::from_millis(1));
    }
}
