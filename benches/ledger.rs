//! What the log's write path costs: `cargo bench --bench ledger`.
//!
//! `append and written` is one caller on one core, a record of 500 bytes each: number, copy, `pwrite`.
//! `synced` has 64 callers that wait for the disk together, on the disk below `LEDGER_BENCH_DIR`, or
//! on the one that temporary files are on.

#![expect(clippy::unwrap_used, reason = "a benchmark stops at the first surprise")]

use std::path::PathBuf;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tidegate::ledger::frame::{Draft, Form, WriterId};
use tidegate::ledger::log::{Log, LogSettings};
use tokio::runtime::{Builder, Runtime};

const RECORD_BYTES: usize = 500;
const CALLERS: usize = 64;

fn draft() -> Draft {
    let mut draft = Draft::default();
    draft.start();
    draft.buffer().extend_from_slice(&[7; 150]);
    draft.body(Form::Whole, &[1; 32]);
    let fill = RECORD_BYTES - draft.len();
    draft.buffer().extend(std::iter::repeat_n(3, fill));
    draft.finish();
    assert_eq!(draft.len(), RECORD_BYTES);
    draft
}

/// A log in a folder of its own, which goes when this does.
struct Bench {
    _dir: tempfile::TempDir,
    log: Log,
    runtime: Runtime,
}

fn bench() -> Bench {
    let dir = std::env::var_os("LEDGER_BENCH_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    let dir = tempfile::tempdir_in(dir).unwrap();
    let settings = LogSettings {
        dir: dir.path().join("predictions"),
        name: "predictions",
        segment_bytes: 64 << 20,
        segment_age_max: Duration::from_secs(3600),
        flush_interval: Duration::from_millis(50),
        queue_bytes_max: 64 << 20,
        free_bytes_min: 0,
    };
    let log = Log::open(settings, WriterId([1; 8])).unwrap().0;
    let runtime = Builder::new_current_thread().build().unwrap();
    Bench { _dir: dir, log, runtime }
}

fn written(c: &mut Criterion) {
    let mut group = c.benchmark_group("ledger");
    group.throughput(Throughput::Elements(1));
    let Bench { log, runtime, _dir } = bench();
    let draft = draft();
    group.bench_function("append and written", |b| {
        b.iter_custom(|count| {
            runtime.block_on(async {
                let began = Instant::now();
                for _ in 0..count {
                    let at = log.append(&draft).unwrap();
                    log.written(at).await.unwrap();
                }
                began.elapsed()
            })
        });
    });
    group.finish();
}

fn synced(c: &mut Criterion) {
    let mut group = c.benchmark_group("ledger");
    group.throughput(Throughput::Elements(CALLERS as u64));
    let Bench { log, runtime, _dir } = bench();
    let draft = draft();
    group.bench_function("64 callers synced", |b| {
        b.iter_custom(|count| {
            let caller = async || {
                for _ in 0..count {
                    let at = log.append(&draft).unwrap();
                    log.synced(at).await.unwrap();
                }
            };
            runtime.block_on(async {
                let began = Instant::now();
                futures_util::future::join_all((0..CALLERS).map(|_| caller())).await;
                began.elapsed()
            })
        });
    });
    group.finish();
}

criterion_group!(benches, written, synced);
criterion_main!(benches);
