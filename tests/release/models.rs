//! Versions that prove themselves: version `k` of a model computes `y = x + k`, so that every answer
//! says which one ran. Some do something else beside that.

use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};
use tidegate::domain::{DataType, Shape, Tensor};
use tidegate::engine::ort::OrtBackend;
use tidegate::engine::{Artifact, Backend as _, LoadOptions};

use crate::wire::{FLOAT, INT64, bytes, info, model, node, number};

const BOOL: u64 = 9;
/// Numbers of a row in [`slow`].
const SLOW_WIDTH: i64 = 1 << 16;
/// No multiple of this is the size of a request here.
const MISFIT: i64 = 1_000_003;

/// When a version fails.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Fails {
    /// Not on zeros and ones, which are tried before it serves.
    Always,
    /// Whenever `x` divided by 20 leaves 7.
    OneInTwenty,
}

impl Fails {
    pub(crate) fn at(self, x: u32) -> bool {
        match self {
            Self::Always => x > 1,
            Self::OneInTwenty => x % 20 == 7,
        }
    }
}

fn tensor(name: &str, kind: u64, dims: &[u64], raw: &[u8]) -> Vec<u8> {
    let dims: Vec<u8> = dims.iter().flat_map(|dim| number(1, *dim)).collect();
    let tensor = [dims, number(2, kind), bytes(8, name.as_bytes()), bytes(9, raw)];
    bytes(5, &tensor.concat())
}

fn float(name: &str, value: f32) -> Vec<u8> {
    tensor(name, FLOAT, &[], &value.to_le_bytes())
}

fn int(name: &str, value: i64) -> Vec<u8> {
    tensor(name, INT64, &[], &value.to_le_bytes())
}

/// A list of one.
fn ints(name: &str, value: i64) -> Vec<u8> {
    tensor(name, INT64, &[1], &value.to_le_bytes())
}

/// A node with one attribute; `value` holds its value and type.
fn node_with(op: &str, inputs: &[&str], outputs: &[&str], name: &str, value: &[u8]) -> Vec<u8> {
    let inputs = inputs.iter().flat_map(|name| bytes(1, name.as_bytes()));
    let outputs = outputs.iter().flat_map(|name| bytes(2, name.as_bytes()));
    let mut content: Vec<u8> = inputs.chain(outputs).chain(bytes(4, op.as_bytes())).collect();
    content.extend(bytes(5, &[&bytes(1, name.as_bytes()), value].concat()));
    bytes(1, &content)
}

fn whole(value: u64) -> Vec<u8> {
    [number(3, value), number(20, 2)].concat()
}

fn row(name: &str) -> Vec<u8> {
    info(name, FLOAT, &[None, Some(1)])
}

/// Rows of one number in, rows of one number out; the nodes end with `y`.
fn rows(nodes: &[Vec<u8>]) -> Vec<u8> {
    model(&[nodes.concat(), bytes(11, &row("x")), bytes(12, &row("y"))])
}

#[expect(clippy::cast_precision_loss, reason = "versions are small numbers")]
fn k(version: u32) -> Vec<u8> {
    float("k", version as f32)
}

pub(crate) fn add(version: u32) -> Vec<u8> {
    rows(&[k(version), node("Add", &["x", "k"], &["y"])])
}

/// The last node makes rows of a width that does not divide what there is, if one row is bad.
pub(crate) fn failing(version: u32, fails: Fails) -> Vec<u8> {
    let bad = match fails {
        Fails::Always => [float("limit", 1.5), node("Greater", &["x", "limit"], &["bad"])].concat(),
        Fails::OneInTwenty => [
            int("twenty", 20),
            int("seven", 7),
            node_with("Cast", &["x"], &["whole"], "to", &whole(INT64)),
            node("Mod", &["whole", "twenty"], &["rest"]),
            node("Equal", &["rest", "seven"], &["bad"]),
        ]
        .concat(),
    };
    rows(&[
        k(version),
        int("misfit", MISFIT),
        int("one", 1),
        ints("first", 0),
        ints("any", -1),
        bad,
        node_with("Cast", &["bad"], &["ones"], "to", &whole(INT64)),
        node_with("ReduceSum", &["ones"], &["count"], "keepdims", &whole(0)),
        node("Mul", &["count", "misfit"], &["grown"]),
        node("Add", &["grown", "one"], &["width"]),
        node("Unsqueeze", &["width", "first"], &["last"]),
        node_with("Concat", &["any", "last"], &["shape"], "axis", &whole(0)),
        node("Add", &["x", "k"], &["sum"]),
        node("Reshape", &["sum", "shape"], &["y"]),
    ])
}

/// Computes as many sines of each row as `passes` says, 65,536 times each.
pub(crate) fn slow(version: u32, passes: usize) -> Vec<u8> {
    let mut nodes = vec![
        k(version),
        float("nothing", 0.0),
        ints("axis", 1),
        tensor("wide", INT64, &[2], &[1_i64.to_le_bytes(), SLOW_WIDTH.to_le_bytes()].concat()),
        node("Expand", &["x", "wide"], &["w0"]),
    ];
    let sine = |at: usize| node("Sin", &[&format!("w{at}")], &[&format!("w{}", at + 1)]);
    nodes.extend((0..passes).map(sine));
    nodes.extend([
        node("ReduceSum", &[&format!("w{passes}"), "axis"], &["total"]),
        node("Mul", &["total", "nothing"], &["zero"]),
        node("Add", &["x", "k"], &["sum"]),
        node("Add", &["sum", "zero"], &["y"]),
    ]);
    rows(&nodes)
}

/// A loop of years.
pub(crate) fn endless(version: u32) -> Vec<u8> {
    let scalar = |name: &str, kind| info(name, kind, &[]);
    let body = [
        bytes(2, b"body"),
        node("Identity", &["go"], &["on"]),
        node("Sin", &["v"], &["w"]),
        bytes(11, &scalar("i", INT64)),
        bytes(11, &scalar("go", BOOL)),
        bytes(11, &row("v")),
        bytes(12, &scalar("on", BOOL)),
        bytes(12, &row("w")),
    ];
    let body = [bytes(6, &body.concat()), number(20, 5)].concat();
    rows(&[
        k(version),
        int("turns", 1 << 40),
        tensor("true", BOOL, &[], &[1]),
        node_with("Loop", &["turns", "true", "x"], &["turned"], "body", &body),
        node("Add", &["turned", "k"], &["y"]),
    ])
}

/// Not a number, whatever it is asked.
pub(crate) fn nan(version: u32) -> Vec<u8> {
    rows(&[k(version), node("Add", &["x", "k"], &["sum"]), float("nan", f32::NAN), {
        node("Add", &["sum", "nan"], &["y"])
    }])
}

/// Whole numbers out, where the others give floating-point ones.
pub(crate) fn other_signature(version: u32) -> Vec<u8> {
    model(&[
        k(version),
        node("Add", &["x", "k"], &["sum"]),
        node_with("Cast", &["sum"], &["y"], "to", &whole(INT64)),
        bytes(11, &row("x")),
        bytes(12, &info("y", INT64, &[None, Some(1)])),
    ])
}

/// With a table of so many MiB, of which it reads one number a row.
pub(crate) fn heavy(version: u32, mib: usize) -> Vec<u8> {
    let count = (mib << 20) / size_of::<f32>();
    let table = vec![0x3d; mib << 20];
    rows(&[
        k(version),
        float("nothing", 0.0),
        tensor("table", FLOAT, &[u64::try_from(count).unwrap()], &table),
        node("Mul", &["x", "nothing"], &["zero"]),
        node_with("Cast", &["zero"], &["at"], "to", &whole(INT64)),
        node("Gather", &["table", "at"], &["read"]),
        node("Mul", &["read", "nothing"], &["none"]),
        node("Add", &["x", "k"], &["sum"]),
        node("Add", &["sum", "none"], &["y"]),
    ])
}

/// Where a repository under `root` keeps a version.
pub(crate) fn folder(root: &Path, model: &str, version: u32) -> PathBuf {
    root.join("models").join(model).join(version.to_string())
}

/// Puts a version into the repository under `root`; says that it is whole, so that nobody waits for
/// more.
pub(crate) fn put(root: &Path, model: &str, version: u32, content: &[u8]) {
    let folder = folder(root, model, version);
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("model.onnx"), content).unwrap();
    std::fs::write(folder.join("SHA256SUMS"), sums(content)).unwrap();
}

/// Puts a file beside a version's model.
pub(crate) fn put_beside(root: &Path, model: &str, version: u32, name: &str, content: &str) {
    std::fs::write(folder(root, model, version).join(name), content).unwrap();
}

/// Says which of a model's versions are loaded without being asked for.
pub(crate) fn keep_only(root: &Path, model: &str, versions: &[u32]) {
    let text = format!("[versions]\nspecific = {versions:?}\n");
    std::fs::write(root.join("models").join(model).join("tidegate.toml"), text).unwrap();
}

/// What `SHA256SUMS` says of a model file.
pub(crate) fn sums(content: &[u8]) -> String {
    let hex: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{hex}  model.onnx\n")
}

/// A samples file with the answer that version `k` gives to `x`.
#[expect(clippy::cast_precision_loss, reason = "small numbers")]
pub(crate) fn samples(version: u32, x: u32) -> String {
    let tensor = |name, value: f32| serde_json::json!([{"name": name, "datatype": "FP32", "shape": [1, 1], "data": [value]}]);
    let (input, output) = (tensor("x", x as f32), tensor("y", (x + version) as f32));
    let sample = serde_json::json!({"request": {"inputs": input}, "response": {"outputs": output}});
    serde_json::json!({"samples": [sample]}).to_string()
}

/// What one row gives.
fn run(content: &[u8], x: u32) -> Result<f32, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.onnx");
    std::fs::write(&path, content).unwrap();
    let options = LoadOptions { intra_threads: 1, sessions: 1, providers: Vec::new() };
    let artifact = Artifact { path, derived: None };
    let loaded = OrtBackend::open(None).and_then(|ort| ort.load(&artifact, &options));
    let mut session = loaded.map_err(|error| error.to_string())?.session().unwrap();
    #[expect(clippy::cast_precision_loss, reason = "small numbers")]
    let data = (x as f32).to_le_bytes().to_vec();
    let input = Tensor::new(DataType::Fp32, Shape::from_slice(&[1, 1]), data.into()).unwrap();
    let outputs = session.run(&[input]).map_err(|error| error.to_string())?;
    Ok(f32::from_le_bytes(*outputs[0].data().last_chunk().unwrap()))
}

#[test]
fn versions_do_what_the_tests_count_on() {
    assert_eq!(run(&add(3), 4), Ok(7.0));
    assert_eq!(run(&slow(3, 2), 4), Ok(7.0));
    assert_eq!(run(&heavy(3, 1), 4), Ok(7.0));
    assert!(run(&nan(3), 4).unwrap().is_nan());
    for fails in [Fails::Always, Fails::OneInTwenty] {
        let model = failing(3, fails);
        for (x, y) in [(0, 3.0), (1, 4.0), (2, 5.0), (6, 9.0), (7, 10.0), (27, 30.0)] {
            let got = run(&model, x);
            assert_eq!(got.is_err(), fails.at(x), "{fails:?} at {x}: {got:?}");
            assert!(got.is_err() || got == Ok(y), "{fails:?} at {x}: {got:?}");
        }
    }
}
