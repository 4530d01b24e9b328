//! Broken and hostile models are refused with a reason; the others and the process live on.
#![expect(clippy::unwrap_used, reason = "a test")]

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tidegate::control::{ProbeLimits, Registry, Settings, Switchboard, source};
use tidegate::domain::{EngineChoice, ModelControl, ModelName, VersionState};
use tidegate::engine::Engines;
use tidegate::observe::Observer;
use tidegate::route::{Published, RouteTable};

/// A hand encoder: enough of the protobuf wire format for an ONNX model.
mod onnx {
    const FLOAT: u64 = 1;
    const INT64: u64 = 7;

    fn varint(mut value: u64, out: &mut Vec<u8>) {
        while value >= 0x80 {
            out.push(u8::try_from(value & 0x7f).unwrap() | 0x80);
            value >>= 7;
        }
        out.push(u8::try_from(value).unwrap());
    }

    pub(super) fn number(field: u64, value: u64) -> Vec<u8> {
        let mut out = Vec::new();
        varint(field << 3, &mut out);
        varint(value, &mut out);
        out
    }

    pub(super) fn bytes(field: u64, value: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        varint(field << 3 | 2, &mut out);
        varint(value.len() as u64, &mut out);
        out.extend_from_slice(value);
        out
    }

    fn info(name: &str, dims: &[Option<u64>]) -> Vec<u8> {
        let dim = |dim: &Option<u64>| match dim {
            Some(size) => bytes(1, &number(1, *size)),
            None => bytes(1, &bytes(2, b"n")),
        };
        let shape: Vec<u8> = dims.iter().flat_map(dim).collect();
        let tensor = [number(1, FLOAT), bytes(2, &shape)].concat();
        [bytes(1, name.as_bytes()), bytes(2, &bytes(1, &tensor))].concat()
    }

    fn node(op: &str, inputs: &[&str], outputs: &[&str]) -> Vec<u8> {
        let inputs = inputs.iter().flat_map(|name| bytes(1, name.as_bytes()));
        let outputs = outputs.iter().flat_map(|name| bytes(2, name.as_bytes()));
        inputs.chain(outputs).chain(bytes(4, op.as_bytes())).collect()
    }

    fn model(graph: &[Vec<u8>]) -> Vec<u8> {
        let graph = [bytes(2, b"g"), graph.concat()].concat();
        let opset = [bytes(1, b""), number(2, 13)].concat();
        [number(1, 8), bytes(7, &graph), bytes(8, &opset)].concat()
    }

    /// `y = relu(x)` over rows of two.
    pub(super) fn relu() -> Vec<u8> {
        model(&[
            bytes(1, &node("Relu", &["x"], &["y"])),
            bytes(11, &info("x", &[None, Some(2)])),
            bytes(12, &info("y", &[None, Some(2)])),
        ])
    }

    /// `y = x + w`, the weights in another file.
    pub(super) fn external(location: &str) -> Vec<u8> {
        let entry = [bytes(1, b"location"), bytes(2, location.as_bytes())].concat();
        let weight =
            [number(1, 2), number(2, FLOAT), bytes(8, b"w"), bytes(13, &entry), number(14, 1)];
        model(&[
            bytes(1, &node("Add", &["x", "w"], &["y"])),
            bytes(5, &weight.concat()),
            bytes(11, &info("x", &[None, Some(2)])),
            bytes(12, &info("y", &[None, Some(2)])),
        ])
    }

    /// A tensor of 2^40 zeros from a few bytes of file.
    pub(super) fn bomb() -> Vec<u8> {
        let size = (1_u64 << 40).to_le_bytes();
        let shape = [number(1, 1), number(2, INT64), bytes(8, b"s"), bytes(9, &size)].concat();
        model(&[
            bytes(1, &node("ConstantOfShape", &["s"], &["zeros"])),
            bytes(1, &node("ReduceSum", &["zeros"], &["sum"])),
            bytes(1, &node("Add", &["x", "sum"], &["y"])),
            bytes(5, &shape),
            bytes(11, &info("x", &[Some(1)])),
            bytes(12, &info("y", &[Some(1)])),
        ])
    }

    /// Nodes of two bytes each, which take a hundred times as much when they are read.
    pub(super) fn many_nodes() -> Vec<u8> {
        model(&[bytes(1, b"").repeat(20_000_000)])
    }
}

fn put(repository: &Path, model: &str, content: &[u8]) -> std::path::PathBuf {
    let folder = repository.join(model).join("1");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("model.onnx"), content).unwrap();
    folder
}

fn registry(root: &Path) -> (Arc<Registry>, Arc<Published<RouteTable>>) {
    let settings = Settings {
        engine: EngineChoice::Tract,
        threads: 2,
        probe: ProbeLimits {
            memory_max_bytes: 1 << 30,
            cpu_max: Duration::from_secs(30),
            wall_max: Duration::from_secs(30),
        },
        probe_program: Some(env!("CARGO_BIN_EXE_tidegate").into()),
        source: source::Settings { quiet: Duration::ZERO, ..source::Settings::default() },
        ..Settings::new(root.join("models"), root.join("state"))
    };
    let engines = Arc::new(Engines::open(EngineChoice::Tract, None).unwrap());
    let table = Arc::new(Published::new(RouteTable::default()));
    let source = source::open(&settings).unwrap();
    let board = Arc::new(Switchboard::new(Arc::clone(&table), None));
    let observer = Arc::new(Observer::default());
    (Registry::new(settings, engines, source, board, observer), table)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_is_refused_with_a_reason_and_the_good_one_serves() {
    let root = tempfile::tempdir().unwrap();
    let models = root.path().join("models");
    std::fs::write(root.path().join("secret"), [0; 8]).unwrap();
    put(&models, "good", &onnx::relu());
    let beside = put(&models, "good_external", &onnx::external("./w.bin"));
    std::fs::write(beside.join("w.bin"), [0; 8]).unwrap();

    put(&models, "empty", b"");
    put(&models, "random", &[0xa5; 4096]);
    let relu = onnx::relu();
    put(&models, "truncated", &relu[..relu.len() / 2]);
    put(&models, "upward", &onnx::external("../../../secret"));
    put(&models, "absolute", &onnx::external("/etc/passwd"));
    let linked = put(&models, "linked", &onnx::external("w.bin"));
    symlink(root.path().join("secret"), linked.join("w.bin")).unwrap();
    let hard = put(&models, "hard", &onnx::external("w.bin"));
    std::fs::hard_link(root.path().join("secret"), hard.join("w.bin")).unwrap();
    let fifo = put(&models, "fifo", &onnx::external("w.bin"));
    let (kind, mode) = (rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR);
    rustix::fs::mknodat(rustix::fs::CWD, fifo.join("w.bin"), kind, mode, 0).unwrap();
    put(&models, "bomb", &onnx::bomb());
    put(&models, "many_nodes", &onnx::many_nodes());

    let (registry, table) = registry(root.path());
    registry.load_all().await.unwrap();
    for entry in registry.index() {
        let good = entry.model.as_str().starts_with("good");
        let expected = if good { VersionState::Ready } else { VersionState::Unavailable };
        assert_eq!(entry.state, expected, "{}: {}", entry.model, entry.reason);
        assert_eq!(entry.reason.is_empty(), good, "{}: {}", entry.model, entry.reason);
    }
    let names: Vec<ModelName> = table.snapshot().models.keys().cloned().collect();
    assert_eq!(names.iter().map(ModelName::as_str).collect::<Vec<_>>(), ["good", "good_external"]);

    // Breaking a served model leaves what serves.
    put(&models, "good", b"broken");
    let good: ModelName = "good".parse().unwrap();
    assert!(registry.load(&good, None, Vec::new()).await.is_err());
    assert!(table.snapshot().models.contains_key(&good));
    registry.unload(&good).await.unwrap();
    assert!(!table.snapshot().models.contains_key(&good));
}
