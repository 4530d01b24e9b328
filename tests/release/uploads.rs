//! Versions that are still being written are left alone, and whole ones are found.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::gateway::Gateway;
use crate::{alone, models};

const MODEL: &str = "sum";
/// How long files must have been left alone, in ms.
const QUIET_MS: u64 = 1_500;
/// Between two pieces of a file.
const PAUSE: Duration = Duration::from_millis(400);
const PIECES: usize = 5;

/// Writes as a slow copy does.
fn write_slowly(path: &Path, content: &[u8]) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    let mut file = File::create(path).unwrap();
    for piece in content.chunks(content.len().div_ceil(PIECES)) {
        file.write_all(piece).unwrap();
        file.flush().unwrap();
        std::thread::sleep(PAUSE);
    }
}

fn settings(quiet_ms: &str) -> [(&str, &str); 2] {
    [("TIDEGATE_REPOSITORY_QUIET_MS", quiet_ms), ("TIDEGATE_REPOSITORY_POLL_MS", "500")]
}

#[test]
fn half_of_a_version_is_never_loaded() {
    let root = tempfile::tempdir().unwrap();
    models::put(root.path(), MODEL, 1, &models::add(1));
    alone(|_| {
        let quiet = QUIET_MS.to_string();
        let gateway = Gateway::start(root.path(), &settings(&quiet));
        let mut admin = gateway.admin();
        // Two slow copies at once: one that is good when it is whole, and one whose model is whole long
        // before the samples that it does not match.
        let folder = |version| models::folder(root.path(), MODEL, version);
        std::thread::scope(|scope| {
            scope.spawn(|| write_slowly(&folder(2).join("model.onnx"), &models::heavy(2, 1)));
            std::fs::create_dir_all(folder(3)).unwrap();
            std::fs::write(folder(3).join("model.onnx"), models::add(3)).unwrap();
            let wrong = models::samples(4, 5);
            write_slowly(&folder(3).join("samples.json"), wrong.as_bytes());
        });
        let written = Instant::now();
        admin.until(MODEL, 3, "failed");
        admin.until(MODEL, 2, "ready");
        eprintln!(
            "uploads: a copy that took {:?} was ready {:?} after its end, with a quiet period of {QUIET_MS} ms",
            PAUSE * u32::try_from(PIECES).unwrap(),
            written.elapsed()
        );
        // Version 3 was tried once, whole; version 2 never before it was.
        let journal = admin.journal();
        let failed: Vec<&serde_json::Value> =
            journal.iter().filter(|event| event["action"] == "version.failed").collect();
        assert_eq!(failed.len(), 1, "{failed:#?}");
        assert!(failed[0]["detail"].as_str().unwrap().contains("sample"), "{failed:#?}");
        let loaded = |version: u32| {
            journal.iter().any(|event| {
                event["action"] == "version.loaded"
                    && event["subject"] == format!("{MODEL}/{version}")
            })
        };
        assert!(loaded(2) && !loaded(3));
    });
}

/// The quiet period is longer than the test would wait.
#[test]
fn what_says_that_it_is_whole_is_loaded_at_once() {
    let root = tempfile::tempdir().unwrap();
    models::put(root.path(), MODEL, 1, &models::add(1));
    alone(|_| {
        let gateway = Gateway::start(root.path(), &settings("600000"));
        let mut admin = gateway.admin();
        let content = models::heavy(2, 1);
        write_slowly(&models::folder(root.path(), MODEL, 2).join("model.onnx"), &content);
        assert!(admin.version(MODEL, 2).is_none_or(|view| view["state"] == "discovered"));
        models::put_beside(root.path(), MODEL, 2, "SHA256SUMS", &models::sums(&content));
        let written = Instant::now();
        admin.until(MODEL, 2, "ready");
        eprintln!("uploads: ready {:?} after SHA256SUMS was written", written.elapsed());
    });
}
